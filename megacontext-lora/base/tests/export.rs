//! Adapters out: merged with head and embedding apart, split for readers of LoRA alone, as GGUF, and merged in memory.
//!
//! The adapters are PEFT's own on a golden folder, changed where a test says so.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{Content, Value as GgufValue};
use candle_core::{Device, Tensor};
use megacontext_base::adapter::{Adapter, read_adapter};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::{Decoder, Forward};
use megacontext_base::gguf::export_gguf;
use megacontext_base::gradients::Gradients;
use megacontext_base::hf_export::Dtype;
use megacontext_base::lora_only::export_lora_only;
use megacontext_base::merge::merge;
use megacontext_base::params::Group;
use megacontext_base::rope::RopeScaling;
use megacontext_base::weights::Weights;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::precision::Precision;
use serde_json::{Value, json};

const ADAPTER: &str = "tied_f32_peft";
const HEAD: &str = "base_model.model.lm_head.weight";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/llama").join(name)
}

/// PEFT's adapter on a base, its config and tensors changed.
struct Made {
    root: tempfile::TempDir,
    base: PathBuf,
    config: DecoderConfig,
    weights: Weights,
    adapter: Adapter,
}

impl Made {
    fn new(
        base: &str,
        config: impl FnOnce(&mut Value),
        tensors: impl FnOnce(&mut HashMap<String, Tensor>),
    ) -> Self {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("adapter");
        fs::create_dir(&dir).unwrap();
        let text = fs::read_to_string(fixture(ADAPTER).join("adapter_config.json")).unwrap();
        let mut value: Value = serde_json::from_str(&text).unwrap();
        if base.starts_with("untied") {
            own_head(&mut value);
        }
        config(&mut value);
        fs::write(dir.join("adapter_config.json"), value.to_string()).unwrap();
        let from = fixture(ADAPTER).join("adapter_model.safetensors");
        let mut all = candle_core::safetensors::load(from, &Device::Cpu).unwrap();
        tensors(&mut all);
        candle_core::safetensors::save(&all, dir.join("adapter_model.safetensors")).unwrap();
        let base = fixture(base);
        Self {
            config: DecoderConfig::from_dir(&base).unwrap(),
            weights: Weights::open(&base).unwrap(),
            adapter: read_adapter(&dir).unwrap(),
            base,
            root,
        }
    }

    /// LoRA alone: no module trained in full.
    fn lora_alone(base: &str) -> Self {
        Self::new(base, lora_alone, |t| t.retain(|name, _| name.contains(".lora_")))
    }

    /// On a base, with a scaling of its own: `linear x4`.
    fn stretched(base: &str) -> Self {
        let weights = Weights::open(&fixture(base)).unwrap();
        Self::new(
            base,
            |c| {
                c["megacontext"] = json!({
                    "format": 1, "base_fingerprint": weights.fingerprint(),
                    "rope_scaling": { "rope_type": "linear", "factor": 4.0 }, "base_rope_scaling": null,
                    "original_max_position_embeddings": 32, "context_length": 128,
                });
            },
            |_| {},
        )
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Base and adapter.
    fn adapted(&self) -> Decoder {
        adapted(&self.base, &self.adapter, Precision::F32)
    }

    fn scaling(&self) -> RopeScaling {
        self.adapter.rope_scaling().unwrap_or(&self.config.rope_scaling).clone()
    }
}

/// The head is a module of its own, trained in full.
fn own_head(config: &mut Value) {
    config["ensure_weight_tying"] = json!(false);
    config["modules_to_save"].as_array_mut().unwrap().push(json!("lm_head"));
}

fn lora_alone(config: &mut Value) {
    config["modules_to_save"] = Value::Null;
    config["ensure_weight_tying"] = json!(false);
}

fn load(dir: &Path, precision: Precision) -> Decoder {
    let (config, weights) = (DecoderConfig::from_dir(dir).unwrap(), Weights::open(dir).unwrap());
    Decoder::from_weights(config, &weights, precision, &[]).unwrap()
}

fn adapted(base: &Path, adapter: &Adapter, precision: Precision) -> Decoder {
    let mut model = load(base, precision);
    if adapter.unties(model.config()).unwrap() {
        model.untie().unwrap();
    }
    let config = model.config().clone();
    adapter.check_against(&config, &Weights::open(base).unwrap().fingerprint()).unwrap();
    adapter.load_into(&config, model.params_mut()).unwrap();
    model.set_lora(Some(adapter.lora())).unwrap();
    model
}

fn logits(model: &Decoder, scaling: &RopeScaling) -> Tensor {
    let tokens: Vec<u32> = (0..40).map(|i| (i * i + 5 * i) % 64).collect();
    let rope = model.config().rope(scaling).sequence(20).unwrap();
    let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &Rows::default(), dropout_seed: None };
    model.logits(&model.embed(&tokens, 2).unwrap(), &with).unwrap()
}

#[track_caller]
fn gap(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
}

#[track_caller]
fn close(a: &Tensor, b: &Tensor, tolerance: f32) {
    let gap = gap(a, b);
    assert!(gap <= tolerance, "largest difference {gap:e}, allowed {tolerance:e}");
}

#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "\"{part}\" is missing in: {message}");
    }
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

// Merging with head and embedding apart.

/// Merges and compares with base + adapter; the written `config.json`.
fn merged_untied(made: &Made) -> DecoderConfig {
    let out = made.path("merged");
    let report = merge(&made.weights, &made.config, &made.adapter, &out, Some(Dtype::F32)).unwrap();
    assert!(report.untied);
    let merged = load(&out, Precision::F32);
    close(&logits(&merged, &made.scaling()), &logits(&made.adapted(), &made.scaling()), 1e-4);
    let file: Value = serde_json::from_str(&fs::read_to_string(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(file["tie_word_embeddings"], false);
    merged.config().clone()
}

#[test]
fn a_head_trained_apart_from_the_embedding_unties_the_merged_model() {
    let made = Made::new("tied_f32", own_head, |t| {
        let other = (&t[HEAD] * 1.5).unwrap();
        t.insert(HEAD.to_string(), other);
    });
    merged_untied(&made);
}

#[test]
fn an_embedding_trained_alone_leaves_the_head_at_the_bases_values() {
    let made = Made::new(
        "tied_f32",
        |c| {
            c["ensure_weight_tying"] = json!(false);
            c["modules_to_save"].as_array_mut().unwrap().retain(|m| m != "lm_head");
        },
        |t| {
            t.remove(HEAD).unwrap();
        },
    );
    let config = merged_untied(&made);
    let merged = Weights::open(&made.path("merged")).unwrap();
    let shape = [config.vocab_size, config.hidden_size];
    let head = merged.tensor_f32("lm_head.weight", &shape).unwrap();
    assert_eq!(values(&head), values(&made.weights.tensor_f32("model.embed_tokens.weight", &shape).unwrap()));
    let embedding = merged.tensor_f32("model.embed_tokens.weight", &shape).unwrap();
    assert_eq!(values(&embedding), values(&made.adapter.tensors["model.embed_tokens.weight"]));
}

#[test]
fn one_embedding_for_both_ends_keeps_the_tie() {
    let made = Made::new("tied_f32", |_| {}, |_| {});
    let out = made.path("merged");
    let report = merge(&made.weights, &made.config, &made.adapter, &out, Some(Dtype::F32)).unwrap();
    assert!(!report.untied && report.config.tie_word_embeddings);
    assert!(!Weights::open(&out).unwrap().has("lm_head.weight"));
}

#[test]
fn untying_a_model_with_a_head_of_its_own_is_refused() {
    let mut model = load(&fixture("untied_bf16_sharded"), Precision::F32);
    says(&model.untie().unwrap_err().to_string(), &["lm_head.weight", "expected a tied model"]);
}

// LoRA alone, and a base with the rest.

#[test]
fn patched_base_and_lora_alone_give_the_same_logits() {
    for name in ["tied_f32", "untied_bf16_sharded"] {
        let made = Made::stretched(name);
        let out = made.path("out");
        let report = export_lora_only(&made.weights, &made.config, &made.adapter, &out, Dtype::F32).unwrap();
        assert_eq!((report.base.clone(), report.adapter.clone()), (out.join("base"), out.join("adapter")));
        assert_eq!((report.modules, report.untied), (8, false));
        let config = DecoderConfig::from_dir(&report.base).unwrap();
        assert_eq!(config.rope_scaling, RopeScaling::Linear { factor: 4.0 });
        assert_eq!((config.max_position_embeddings, config.original_context()), (128, 32));
        assert!(report.patched.iter().any(|n| n == "model.embed_tokens.weight"), "{:?}", report.patched);
        assert!(report.patched.iter().all(|n| !n.contains("proj")), "{:?}", report.patched);

        let split = read_adapter(&report.adapter).unwrap();
        assert!(split.tensors.keys().all(|name| name.contains(".lora_")));
        let file = fs::read_to_string(report.adapter.join("adapter_config.json")).unwrap();
        let file: Value = serde_json::from_str(&file).unwrap();
        assert_eq!(file["modules_to_save"], Value::Null);
        let (one, other) = (adapted(&report.base, &split, Precision::F32), made.adapted());
        // The same factors on the same weights: nothing is rounded anywhere.
        assert_eq!(values(&logits(&one, &config.rope_scaling)), values(&logits(&other, &made.scaling())));
        assert!(
            gap(
                &logits(&load(&report.base, Precision::F32), &config.rope_scaling),
                &logits(&one, &config.rope_scaling)
            ) > 1e-2
        );
    }
}

#[test]
fn a_split_adapter_is_refused_on_the_base_it_was_trained_on() {
    let made = Made::stretched("tied_f32");
    let report =
        export_lora_only(&made.weights, &made.config, &made.adapter, &made.path("out"), Dtype::F32).unwrap();
    let split = read_adapter(&report.adapter).unwrap();
    let error = split.check_against(&made.config, &made.weights.fingerprint()).unwrap_err().to_string();
    says(&error, &["fingerprint", "out/base"]);
}

#[test]
fn splitting_into_a_folder_with_content_is_refused() {
    let made = Made::stretched("tied_f32");
    let out = made.path("adapter");
    let error = export_lora_only(&made.weights, &made.config, &made.adapter, &out, Dtype::F32)
        .unwrap_err()
        .to_string();
    says(&error, &["is empty"]);
    assert_eq!(fs::read_dir(&out).unwrap().count(), 2);
}

// GGUF.

struct Gguf {
    content: Content,
    file: File,
}

impl Gguf {
    fn open(path: &Path) -> Self {
        let mut file = File::open(path).unwrap();
        Self { content: Content::read(&mut file).unwrap(), file }
    }

    fn tensor(&mut self, name: &str) -> Tensor {
        let tensor = self.content.tensor(&mut self.file, name, &Device::Cpu).unwrap();
        tensor.dequantize(&Device::Cpu).unwrap()
    }
}

#[test]
fn gguf_says_what_llama_cpp_asks_for_and_holds_the_factors_in_its_order() {
    let made = Made::lora_alone("tied_f32");
    let out = made.path("adapter.gguf");
    let report = export_gguf(&made.config, &made.adapter, &out, Dtype::F32).unwrap();
    assert_eq!((report.architecture, report.modules, &report.notes[..]), ("llama", 8, &[][..]));
    let mut gguf = Gguf::open(&out);
    let text = |key: &str| match &gguf.content.metadata[key] {
        GgufValue::String(text) => text.clone(),
        other => panic!("{key}: {other:?}"),
    };
    assert_eq!(text("general.type"), "adapter");
    assert_eq!(text("general.architecture"), "llama");
    assert_eq!(text("adapter.type"), "lora");
    assert!(matches!(gguf.content.metadata["adapter.lora.alpha"], GgufValue::F32(6.0)));
    assert_eq!(gguf.content.tensor_infos.len(), 16);
    for layer in 0..2 {
        for (ours, theirs, heads) in [
            ("q_proj", "attn_q", 4),
            ("k_proj", "attn_k", 2),
            ("v_proj", "attn_v", 0),
            ("o_proj", "attn_output", 0),
        ] {
            let module = format!("model.layers.{layer}.self_attn.{ours}");
            let a = gguf.tensor(&format!("blk.{layer}.{theirs}.weight.lora_a"));
            assert_eq!(values(&a), values(&made.adapter.tensors[&format!("{module}.lora_A.weight")]));
            let b = gguf.tensor(&format!("blk.{layer}.{theirs}.weight.lora_b"));
            let b_or = &made.adapter.tensors[&format!("{module}.lora_B.weight")];
            assert_eq!(b.dims(), b_or.dims());
            // Heads of width 8: llama.cpp's row 2i + j is Hugging Face's i + 4j.
            let expected = match heads {
                0 => b_or.clone(),
                heads => {
                    b_or.reshape((heads, 2, 4, 2)).unwrap().transpose(1, 2).unwrap().contiguous().unwrap()
                }
            };
            assert_eq!(values(&b), values(&expected), "{module}");
        }
    }
    assert_eq!(fs::read_dir(made.root.path()).unwrap().count(), 2, "no temporary file may stay");
}

#[test]
fn gguf_in_f16_rounds_and_carries_another_strength_in_b() {
    let made = Made::new(
        "tied_f32",
        |c| {
            lora_alone(c);
            c["use_rslora"] = json!(true);
        },
        |t| t.retain(|name, _| name.contains(".lora_")),
    );
    let out = made.path("adapter.gguf");
    export_gguf(&made.config, &made.adapter, &out, Dtype::F16).unwrap();
    let mut gguf = Gguf::open(&out);
    let b = values(&gguf.tensor("blk.1.attn_v.weight.lora_b"));
    let ours = values(&made.adapter.tensors["model.layers.1.self_attn.v_proj.lora_B.weight"]);
    // The reader multiplies by alpha / r = 3; rsLoRA means alpha / √r.
    for (b, ours) in b.iter().zip(ours) {
        let meant = ours * 2f32.sqrt();
        assert!((b - meant).abs() <= meant.abs() / 1024.0 + 1e-6, "{b} {meant}");
    }
}

/// What an export of this adapter is refused with.
fn gguf_refused(made: &Made) -> String {
    let out = made.path("adapter.gguf");
    let error = export_gguf(&made.config, &made.adapter, &out, Dtype::F32).unwrap_err().to_string();
    assert!(!out.exists());
    error
}

#[test]
fn gguf_of_modules_trained_in_full_is_refused() {
    says(&gguf_refused(&Made::new("tied_f32", |_| {}, |_| {})), &["trained in full", "--format lora-only"]);
}

#[test]
fn gguf_of_a_family_that_llama_cpp_does_not_have_is_refused() {
    let mut made = Made::lora_alone("tied_f32");
    made.config.raw.insert("model_type".into(), json!("nanochat"));
    says(&gguf_refused(&made), &["nanochat", "mclora merge"]);
}

#[test]
fn gguf_over_a_file_is_refused() {
    let made = Made::lora_alone("tied_f32");
    let out = made.path("adapter/adapter_config.json");
    let before = fs::read(&out).unwrap();
    let error = export_gguf(&made.config, &made.adapter, &out, Dtype::F32).unwrap_err().to_string();
    says(&error, &["expected no file", "adapter_config.json"]);
    assert_eq!(fs::read(&out).unwrap(), before);
}

#[test]
fn gguf_in_bf16_is_refused() {
    let made = Made::lora_alone("tied_f32");
    let out = made.path("adapter.gguf");
    let error = export_gguf(&made.config, &made.adapter, &out, Dtype::BF16).unwrap_err().to_string();
    says(&error, &["f32 or f16", "bf16"]);
}

#[test]
fn gguf_says_that_it_cannot_carry_positions() {
    let mut made = Made::stretched("tied_f32");
    made.adapter.tensors.retain(|name, _| name.contains(".lora_"));
    let report = export_gguf(&made.config, &made.adapter, &made.path("a.gguf"), Dtype::F32).unwrap();
    assert_eq!(report.notes.len(), 1);
    says(&report.notes[0], &["linear x4", "--rope-scaling linear --rope-scale 4"]);
}

// In memory.

fn hashes(model: &Decoder) -> [String; 4] {
    [Group::Base, Group::Embeddings, Group::Norms, Group::Lora].map(|g| model.params().group_hash(g).unwrap())
}

#[test]
fn unmerging_restores_the_bytes() {
    // Mapped f32, read from bf16 shards, mapped bf16.
    let cases = [
        ("tied_f32", Precision::F32, 1e-4, true),
        ("untied_bf16_sharded", Precision::F32, 1e-4, false),
        ("untied_bf16_sharded", Precision::Bf16, 0.5, true),
    ];
    for (name, precision, tolerance, in_file) in cases {
        let made = Made::new(name, |_| {}, |_| {});
        let mut model = adapted(&made.base, &made.adapter, precision);
        let (before, mapped) = (hashes(&model), model.params().mapped_bytes());
        let adapted = logits(&model, &RopeScaling::None);
        assert_eq!(model.merge_adapter().unwrap(), 8);
        assert!(model.is_merged() && model.lora().is_none());
        assert_ne!(hashes(&model)[0], before[0]);
        assert_eq!(hashes(&model)[1..], before[1..]);
        assert_eq!(
            model.params().mapped_bytes() < mapped,
            in_file,
            "merged weights have memory of their own"
        );
        close(&logits(&model, &RopeScaling::None), &adapted, tolerance);
        assert_eq!(model.unmerge_adapter().unwrap(), 8);
        assert_eq!(hashes(&model), before);
        assert_eq!(model.params().mapped_bytes(), mapped);
        assert_eq!(values(&logits(&model, &RopeScaling::None)), values(&adapted));
        // And again.
        model.merge_adapter().unwrap();
        model.unmerge_adapter().unwrap();
        assert_eq!(hashes(&model), before);
    }
}

fn model() -> Decoder {
    Made::new("tied_f32", |_| {}, |_| {}).adapted()
}

#[test]
fn merging_twice_is_refused() {
    let mut model = model();
    model.merge_adapter().unwrap();
    let before = hashes(&model);
    says(&model.merge_adapter().unwrap_err().to_string(), &["merge_adapter", "unmerge it first"]);
    assert_eq!(hashes(&model), before);
}

#[test]
fn merging_without_lora_is_refused() {
    let mut model = load(&fixture("tied_f32"), Precision::F32);
    says(&model.merge_adapter().unwrap_err().to_string(), &["expected LoRA, none is attached"]);
}

#[test]
fn merging_what_learns_is_refused() {
    for group in [Group::Base, Group::Lora] {
        let mut model = model();
        model.params_mut().set_learning([group]).unwrap();
        let before = hashes(&model);
        says(&model.merge_adapter().unwrap_err().to_string(), &[group.name(), "frozen"]);
        assert_eq!(hashes(&model), before);
    }
}

#[test]
fn unmerging_what_is_not_merged_is_refused() {
    says(&model().unmerge_adapter().unwrap_err().to_string(), &["expected merged LoRA"]);
}

#[test]
fn other_lora_on_merged_weights_is_refused() {
    let mut model = model();
    let lora = model.lora().cloned();
    model.merge_adapter().unwrap();
    says(&model.set_lora(lora).unwrap_err().to_string(), &["set_lora", "unmerge it first"]);
}

#[test]
fn training_merged_weights_is_refused() {
    let mut model = model();
    model.merge_adapter().unwrap();
    model.params_mut().set_learning([Group::Lora]).unwrap();
    let rope = model.config().rope(&RopeScaling::None).sequence(4).unwrap();
    let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &Rows::default(), dropout_seed: None };
    let mut gradients = Gradients::new();
    let step = |model: &Decoder, gradients: &mut Gradients| {
        model.accumulate_gradients(&[1, 2, 3, 4], 1, &[2, 3, 4, 5], &with, 1.0, false, gradients)
    };
    let error = step(&model, &mut gradients).unwrap_err().to_string();
    says(&error, &["accumulate_gradients", "unmerge it first"]);
    // What LoRA does not touch may learn.
    model.params_mut().set_learning([Group::Norms]).unwrap();
    step(&model, &mut gradients).unwrap();
}
