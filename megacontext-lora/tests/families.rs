//! The whole pipeline on models that are no Llamas: extend, merge, and the merged folder's logits.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::{EXTENDED, Fixture, VOCAB, mclora, numbers, read_json, with};
use megacontext_base::config::DecoderConfig;
use serde_json::{Value, json};

/// Extends a micro model of a family in a few steps, merges it, and holds merged, adapted and base against each other.
fn extends_and_merges(other: Value) -> Value {
    let fixture = Fixture::new();
    fixture.model_of("family", 3, other);
    let [base, run, merged] = ["family", "run", "merged"].map(|name| fixture.at(name));
    let flags =
        [("--base", &base[..]), ("--stages", "64:6,128:6"), ("--lr", "5e-3"), ("--eval-tokens", "512")];
    let mut args = with(fixture.extend("run"), &flags);
    args.push("--json".into());
    let summary = mclora(&args).success().json();
    let loss = |stage: usize, key: &str| summary["stages"][stage][key].as_f64().unwrap();
    assert!(loss(1, "last_loss") < loss(0, "first_loss") - 0.05, "{summary}");

    let adapter = format!("{run}/adapter");
    let flags =
        ["merge", "--base", &base, "--adapter", &adapter, "--out", &merged, "--dtype", "f32", "--json"];
    let report = mclora(&flags).success().json();
    assert!(report["merged"].as_u64().unwrap() > 0, "{report}");
    let config = read_json(&fixture.path("merged/config.json"));
    let read = |value: &Value| DecoderConfig::from_json(value, Path::new("config.json")).unwrap();
    let (of_merged, of_base) = (read(&config), read(&read_json(&fixture.path("family/config.json"))));
    assert_eq!(of_merged.architecture, of_base.architecture);
    assert_eq!(of_merged.rope_scaling.factor(), 4.0);
    assert_eq!(of_merged.max_position_embeddings, EXTENDED);

    let tokens: Vec<usize> = (0..EXTENDED).map(|i| (i * 37 + 11) % VOCAB).collect();
    fs::write(fixture.path("tokens.json"), json!(tokens).to_string()).unwrap();
    let tokens = fixture.at("tokens.json");
    let logits = |flags: &[&str], name: &str| {
        let out = fixture.at(name);
        mclora(&[&["logits"], flags, &["--tokens", &tokens, "--out", &out]].concat()).success();
        numbers(&fixture.path(name), "logits")
    };
    let of_adapter = logits(&["--base", &base, "--adapter", &adapter], "adapter.safetensors");
    let of_merged = logits(&["--base", &merged], "merged.safetensors");
    let of_base = logits(&["--base", &base], "base.safetensors");
    let apart = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    println!(
        "merged differs by {}, base by {}",
        apart(&of_merged, &of_adapter),
        apart(&of_base, &of_adapter)
    );
    assert!(apart(&of_merged, &of_adapter) < 1e-4);
    assert!(apart(&of_base, &of_adapter) > 0.05, "the adapter changes something");
    config
}

#[test]
fn gpt_neox_is_extended_and_merged() {
    let config = extends_and_merges(json!({
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_act": "gelu",
        "layer_norm_eps": 1e-5, "rotary_pct": 0.5, "rotary_emb_base": 10000, "rope_theta": null,
        "tie_word_embeddings": false, "attention_bias": true,
    }));
    assert_eq!(config["model_type"], "gpt_neox");
    assert_eq!(config["architectures"], json!(["GPTNeoXForCausalLM"]));
    assert_eq!(
        (&config["rotary_pct"], &config["rope_parameters"]["partial_rotary_factor"]),
        (&json!(0.5), &json!(0.5))
    );
    assert_eq!(config["rope_scaling"]["factor"], json!(4.0));
}

#[test]
fn qwen3_is_extended_and_merged() {
    let config = extends_and_merges(json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16, "use_sliding_window": true,
        "sliding_window": 24, "max_window_layers": 1,
    }));
    assert_eq!(config["model_type"], "qwen3");
    assert_eq!((&config["head_dim"], &config["sliding_window"]), (&json!(16), &json!(24)));
}

#[test]
fn gemma3_is_extended_and_merged() {
    let config = extends_and_merges(json!({
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 8, "hidden_act": null,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8, "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"], "rope_local_base_freq": 1000.0,
    }));
    let rope = &config["rope_parameters"];
    assert_eq!(rope["full_attention"]["factor"], json!(4.0));
    assert_eq!(rope["sliding_attention"], json!({"rope_type": "default", "rope_theta": 1000.0}));
}

#[test]
fn nanochat_is_extended_and_merged() {
    let config = extends_and_merges(json!({
        "architectures": ["GPT"], "model_type": "nanochat", "hidden_act": "relu2", "n_embd": 32, "n_layer": 2, "n_head": 4,
        "n_kv_head": 2, "sequence_len": 32, "tie_word_embeddings": false,
    }));
    assert_eq!((&config["model_type"], &config["sequence_len"]), (&json!("nanochat"), &json!(EXTENDED)));
}
