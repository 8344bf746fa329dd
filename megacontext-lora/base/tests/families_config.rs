//! Each family's `config.json`: what is read, what is listed, what is written back; and what is refused.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use megacontext_base::config::DecoderConfig;
use megacontext_base::params::Group;
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
