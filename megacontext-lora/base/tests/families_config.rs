//! Each family's `config.json`: what is read, what is listed, what is written back; and what is refused, of a configuration
//! and of weights that contradict it.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use megacontext_base::architecture::{Mlp, NormKind, QkNorm, Residual, Rotation};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::Decoder;
use megacontext_base::params::Group;
use megacontext_base::rope::RopeScaling;
use megacontext_base::weights::Weights;
use megacontext_kernels::precision::Precision;
use serde_json::{Value, json};

fn read(value: &Value) -> Result<DecoderConfig, String> {
    DecoderConfig::from_json(value, Path::new("x/config.json")).map_err(|e| e.to_string())
}

#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "\"{part}\" is missing in: {message}");
    }
}

fn gpt_neox() -> Value {
    json!({
        "model_type": "gpt_neox", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128, "hidden_act": "gelu",
        "rotary_pct": 0.25, "rotary_emb_base": 500, "layer_norm_eps": 1e-5
    })
}

#[test]
fn gpt_neox_lists_its_own_names() {
    let config = read(&gpt_neox()).unwrap();
    let linears = config.linears();
    let named: Vec<(&str, usize, usize)> =
        linears.iter().take(4).map(|l| (l.target(), l.out, l.inp)).collect();
    assert_eq!(
        named,
        [
            ("query_key_value", 96, 32),
            ("dense", 32, 32),
            ("dense_h_to_4h", 128, 32),
            ("dense_4h_to_h", 32, 128)
        ]
    );
    assert_eq!((linears.len(), linears[8].name.as_str(), linears[8].layer), (9, "embed_out", None));
    let group = |name: &str| config.group_of(name);
    assert_eq!(group("gpt_neox.embed_in.weight"), Group::Embeddings);
    assert_eq!(group("gpt_neox.final_layer_norm.bias"), Group::Norms);
    assert_eq!(group("gpt_neox.layers.1.post_attention_layernorm.bias"), Group::Norms);
    assert_eq!(group("gpt_neox.layers.1.attention.dense.bias"), Group::Base);
    assert_eq!(group("gpt_neox.layers.1.attention.dense.lora_A.weight"), Group::Lora);
    assert_eq!(group("embed_out.weight"), Group::Base);
    // 4 linear layers and 2 norms a block, each with a bias; the last norm; embedding and head.
    assert_eq!(config.tensors().len(), 2 * 12 + 2 + 2);
}

#[test]
fn encoder_decoder_is_refused() {
    let message = read(&json!({"model_type": "t5"})).unwrap_err();
    says(&message, &["\"llama\"", "got \"t5\", an encoder-decoder"]);
    let message = read(&json!({"model_type": "new", "is_encoder_decoder": true})).unwrap_err();
    says(&message, &["got \"new\", an encoder-decoder"]);
}

#[test]
fn mixture_of_experts_is_refused() {
    says(
        &read(&json!({"model_type": "qwen3_moe"})).unwrap_err(),
        &["got \"qwen3_moe\", a mixture of experts"],
    );
    let message = read(&json!({"model_type": "llama", "num_local_experts": 8})).unwrap_err();
    says(&message, &["a mixture of experts (num_local_experts)"]);
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/families").join(name)
}

fn of(name: &str) -> DecoderConfig {
    DecoderConfig::from_dir(&fixture(name)).unwrap()
}

/// A folder's configuration with one key set otherwise.
fn refused(name: &str, key: &str, value: Value) -> String {
    let mut raw = Value::Object(of(name).raw);
    raw[key] = value;
    read(&raw).unwrap_err()
}

#[test]
fn every_description_is_what_the_family_is() {
    let windows = |c: &DecoderConfig| c.architecture.layers.iter().map(|l| l.window).collect::<Vec<_>>();
    let mistral = of("mistral_window_bf16");
    assert_eq!(windows(&mistral), [Some(6); 2]);
    let qwen2 = of("qwen2_f16");
    assert_eq!(windows(&qwen2), [None, Some(5), Some(5)]);
    assert!(qwen2.architecture.qkv_bias && !qwen2.architecture.out_bias);
    assert_eq!(of("qwen3_bf16_sharded").architecture.qk_norm, QkNorm::BeforeRotary);
    let smollm3 = of("smollm3_bf16");
    let rotates: Vec<bool> =
        smollm3.architecture.layers.iter().map(|l| l.rotation != Rotation::None).collect();
    assert_eq!(rotates, [true, false, true, false]);
    assert_eq!(windows(&smollm3), [None, Some(7), None, Some(7)]);
    let neox = of("gpt_neox_f32").architecture;
    assert_eq!((neox.norm, neox.mlp, neox.residual), (NormKind::Layer, Mlp::Gelu, Residual::Parallel));
    assert_eq!((neox.rotary_width, neox.fused_qkv, neox.mlp_bias), (4, true, true));
    let old = of("gpt_neox_sequential_f16");
    assert_eq!((old.architecture.rotary_width, old.architecture.residual), (2, Residual::Sequential));
    assert_eq!((old.rope_theta, old.architecture.mlp), (500.0, Mlp::GeluTanh));
    let gemma = of("gemma3_bf16");
    assert_eq!(windows(&gemma), [Some(6), None, Some(6)]);
    assert_eq!((gemma.rope_theta, gemma.architecture.local_theta), (5000.0, Some(100.0)));
    assert_eq!(gemma.rope_scaling, RopeScaling::Linear { factor: 4.0 });
    assert_eq!(gemma.architecture.query_scale, 1.0 / 24f64.sqrt());
    assert_eq!((gemma.architecture.softcap, gemma.tie_word_embeddings), (Some(5.0), true));
    let nanochat = of("nanochat_bf16").architecture;
    assert_eq!(
        (nanochat.norm, nanochat.mlp, nanochat.qk_norm),
        (NormKind::RmsPlain, Mlp::Relu2, QkNorm::AfterRotary)
    );
    assert_eq!((nanochat.rotary_direction, nanochat.softcap), (-1.0, Some(15.0)));
}

#[test]
fn absent_keys_have_their_familys_defaults() {
    let absent = |name: &str, keys: &[&str]| {
        let mut raw = of(name).raw;
        for key in keys {
            raw.remove(*key).unwrap();
        }
        read(&Value::Object(raw)).unwrap()
    };
    let mistral = absent("mistral_window_bf16", &["sliding_window"]);
    assert_eq!(mistral.architecture.layers[0].window, Some(4096));
    let mut null = of("mistral_window_bf16").raw;
    null.insert("sliding_window".into(), Value::Null);
    assert_eq!(read(&Value::Object(null)).unwrap().architecture.layers[0].window, None);
    let smollm3 =
        absent("smollm3_bf16", &["rope_parameters", "no_rope_layers", "layer_types", "tie_word_embeddings"]);
    assert_eq!((smollm3.rope_theta, smollm3.tie_word_embeddings), (2_000_000.0, true));
    let bare: Vec<usize> =
        (0..4).filter(|l| smollm3.architecture.layers[*l].rotation == Rotation::None).collect();
    assert_eq!(bare, [3]);
    let gemma = absent("gemma3_bf16", &["rope_parameters", "layer_types", "final_logit_softcapping"]);
    assert_eq!((gemma.rope_theta, gemma.architecture.local_theta), (1_000_000.0, Some(10_000.0)));
    assert_eq!(gemma.architecture.softcap, None);
    assert!(gemma.architecture.layers.iter().all(|l| l.window == Some(6)), "every sixth block is full");
}

#[test]
fn writing_reads_back_in_every_family() {
    for name in [
        "mistral_window_bf16",
        "qwen2_f16",
        "qwen3_bf16_sharded",
        "smollm3_bf16",
        "gpt_neox_f32",
        "gpt_neox_sequential_f16",
        "gemma3_bf16",
        "nanochat_bf16",
    ] {
        let config = of(name).extended(RopeScaling::Linear { factor: 8.0 }, 512);
        let written = config.to_json();
        let again = read(&written).unwrap();
        assert_eq!(again.to_json(), written, "{name}");
        assert_eq!(again.architecture, config.architecture, "{name}");
        assert_eq!(
            (again.rope_theta, &again.rope_scaling),
            (config.rope_theta, &config.rope_scaling),
            "{name}"
        );
        assert_eq!((again.max_position_embeddings, again.original_context()), (512, 64), "{name}");
        assert_eq!(written["model_type"], json!(config.family.model_type()));
    }
}

#[test]
fn our_dialect_of_nanochat_is_read_and_written() {
    let value = json!({
        "model_type": "nanochat", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "sequence_len": 128,
    });
    let config = read(&value).unwrap();
    assert_eq!((config.intermediate_size, config.num_key_value_heads, config.head_dim), (128, 4, 8));
    assert_eq!(config.rms_norm_eps, f64::from(f32::EPSILON));
    assert_eq!(config.linears()[4].name, "transformer.h.0.mlp.c_fc");
    assert_eq!(config.group_of("transformer.wte.weight"), Group::Embeddings);
    assert_eq!(config.tensors().len(), 2 * 6 + 2);
    let written = config.extended(RopeScaling::Linear { factor: 2.0 }, 256).to_json();
    assert_eq!((&written["sequence_len"], written.get("max_position_embeddings")), (&json!(256), None));
    assert_eq!(read(&written).unwrap().max_position_embeddings, 256);
}

#[test]
fn nanochat_without_a_length_is_refused() {
    let value = json!({"model_type": "nanochat", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4});
    says(&read(&value).unwrap_err(), &["sequence_len", "missing"]);
}

#[test]
fn a_cap_on_attention_scores_is_refused() {
    says(
        &refused("gemma3_bf16", "attn_logit_softcapping", json!(50.0)),
        &["attn_logit_softcapping", "got 50.0"],
    );
    says(&read(&json!({"model_type": "gemma2"})).unwrap_err(), &["\"gemma2\"", "cap on attention scores"]);
}

#[test]
fn bidirectional_attention_is_refused() {
    says(
        &refused("gemma3_bf16", "use_bidirectional_attention", json!(true)),
        &["use_bidirectional_attention"],
    );
}

#[test]
fn an_activation_of_another_family_is_refused() {
    says(
        &refused("gpt_neox_f32", "hidden_act", json!("relu")),
        &["hidden_act: expected one of", "gelu", "\"relu\""],
    );
    says(&refused("nanochat_bf16", "hidden_act", json!("silu")), &["expected \"relu2\", got \"silu\""]);
    says(&refused("gemma3_bf16", "hidden_activation", json!("gelu")), &["gelu_pytorch_tanh", "got \"gelu\""]);
}

#[test]
fn heads_that_do_not_divide_are_refused() {
    says(
        &refused("gpt_neox_f32", "num_attention_heads", json!(5)),
        &["num_attention_heads", "divisor", "got 5"],
    );
    says(
        &refused("qwen2_f16", "num_key_value_heads", json!(3)),
        &["num_key_value_heads", "divisor", "got 3"],
    );
}

#[test]
fn an_odd_share_of_a_head_is_refused() {
    let mut raw = gpt_neox();
    for share in [0.1, 1.5, 0.0] {
        raw["rotary_pct"] = json!(share);
        says(&read(&raw).unwrap_err(), &["rotary_pct", "even", &share.to_string()]);
    }
}

#[test]
fn layer_types_of_another_length_are_refused() {
    let message = refused("gemma3_bf16", "layer_types", json!(["full_attention"]));
    says(&message, &["layer_types", "one for each of 3 blocks"]);
}

#[test]
fn an_unknown_layer_type_is_refused() {
    let types = json!(["chunked_attention", "full_attention", "full_attention"]);
    says(&refused("gemma3_bf16", "layer_types", types), &["layer_types", "\"chunked_attention\""]);
}

#[test]
fn too_few_rotating_layers_are_refused() {
    says(&refused("smollm3_bf16", "no_rope_layers", json!([1, 0])), &["no_rope_layers", "each of 4 blocks"]);
}

#[test]
fn a_window_of_zero_is_refused() {
    says(&refused("mistral_window_bf16", "sliding_window", json!(0)), &["sliding_window", "got 0"]);
}

#[test]
fn a_stretched_local_base_is_refused() {
    let rope = json!({
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    });
    says(&refused("gemma3_bf16", "rope_parameters", rope), &["sliding_attention", "\"linear\""]);
}

/// Opening a copy of a folder after a change of its tensors, and the first pass.
fn opened(name: &str, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let path = fixture(name).join("model.safetensors");
    let mut tensors: BTreeMap<String, Tensor> =
        candle_core::safetensors::load(path, &Device::Cpu).unwrap().into_iter().collect();
    change(&mut tensors);
    safetensors::serialize_to_file(&tensors, None, &dir.path().join("model.safetensors")).unwrap();
    let weights = Weights::open(dir.path()).unwrap();
    let decoder =
        Decoder::from_weights(of(name), &weights, Precision::F32, &[]).map_err(|e| e.to_string())?;
    decoder.params().check_mapped().map_err(|e| e.to_string())
}

const QKV: &str = "gpt_neox.layers.1.attention.query_key_value";

#[test]
fn a_missing_bias_is_refused() {
    let error = opened("gpt_neox_f32", |t| drop(t.remove(&format!("{QKV}.bias")))).unwrap_err();
    says(&error, &[QKV, "bias", "none of this name"]);
}

#[test]
fn an_unexpected_tensor_is_refused() {
    let error = opened("gpt_neox_f32", |t| {
        t.insert(
            "gpt_neox.layers.2.attention.dense.bias".into(),
            Tensor::zeros(32, candle_core::DType::F32, &Device::Cpu).unwrap(),
        );
    })
    .unwrap_err();
    says(&error, &["layers.2.attention.dense.bias", "gpt_neox", "none of this name"]);
}

#[test]
fn what_old_files_carry_besides_parameters_is_passed_over() {
    opened("gpt_neox_f32", |t| {
        let zeros = |n: usize| Tensor::zeros(n, candle_core::DType::F32, &Device::Cpu).unwrap();
        t.insert("gpt_neox.layers.0.attention.masked_bias".into(), zeros(1));
        t.insert("gpt_neox.layers.0.attention.rotary_emb.inv_freq".into(), zeros(2));
    })
    .unwrap();
}

#[test]
fn separate_projections_where_one_is_expected_are_refused() {
    let error = opened("gpt_neox_f32", |t| {
        let whole = t.remove(&format!("{QKV}.weight")).unwrap();
        t.insert(
            "gpt_neox.layers.1.attention.q_proj.weight".into(),
            whole.narrow(0, 0, 32).unwrap().contiguous().unwrap(),
        );
    })
    .unwrap_err();
    says(&error, &["layers.1.attention.q_proj.weight", "none of this name"]);
}

#[test]
fn a_shape_that_contradicts_the_configuration_is_refused() {
    let error = opened("gpt_neox_f32", |t| {
        let name = format!("{QKV}.weight");
        let narrow = t[&name].narrow(0, 0, 64).unwrap().contiguous().unwrap();
        t.insert(name, narrow);
    })
    .unwrap_err();
    says(&error, &[QKV, "expected shape [96, 32]", "got [64, 32]"]);
}

#[test]
fn a_nan_in_a_bias_is_refused() {
    let error = opened("gpt_neox_f32", |t| {
        t.insert(format!("{QKV}.bias"), Tensor::full(f32::NAN, 96, &Device::Cpu).unwrap());
    })
    .unwrap_err();
    says(&error, &[QKV, "NaN"]);
}
