//! Reading and writing `config.json`: what is accepted, and one test for each thing that is refused.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use megacontext_base::config::DecoderConfig;
use megacontext_base::rope::RopeScaling;
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/llama").join(name)
}

fn plain() -> Value {
    json!({
        "model_type": "llama", "hidden_act": "silu", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 500.0, "max_position_embeddings": 128, "tie_word_embeddings": true, "eos_token_id": [3, 5],
        "something_else": {"kept": [1, 2]}
    })
}

fn read(value: &Value) -> Result<DecoderConfig, String> {
    DecoderConfig::from_json(value, Path::new("x/config.json")).map_err(|e| e.to_string())
}

fn refused(key: &str, value: Value) -> String {
    let mut config = plain();
    config[key] = value;
    let message = read(&config).unwrap_err();
    assert!(message.contains("x/config.json"), "{message}");
    message
}

#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "\"{part}\" is missing in: {message}");
    }
}

#[test]
fn every_field_is_read() {
    let config = read(&plain()).unwrap();
    assert_eq!((config.vocab_size, config.hidden_size, config.intermediate_size), (64, 32, 48));
    assert_eq!((config.num_attention_heads, config.num_key_value_heads, config.head_dim), (4, 2, 8));
    assert_eq!((config.rms_norm_eps, config.rope_theta), (1e-5, 500.0));
    assert_eq!((config.max_position_embeddings, config.tie_word_embeddings), (128, true));
    assert_eq!((config.bos_token_id, config.eos_token_id), (None, Some(3)));
    assert_eq!(config.rope_scaling, RopeScaling::None);
}

#[test]
fn golden_folders_are_read() {
    let of = |name: &str| DecoderConfig::from_dir(&fixture(name)).unwrap();
    assert!(of("tied_f32").tie_word_embeddings);
    assert_eq!(of("untied_f32_linear").rope_scaling, RopeScaling::Linear { factor: 4.0 });
    let old = of("tied_f16_linear_old_keys");
    assert_eq!((old.rope_scaling, old.rope_theta), (RopeScaling::Linear { factor: 2.0 }, 500.0));
}

#[test]
fn writing_keeps_unknown_keys_and_reads_back() {
    let config = read(&plain()).unwrap().extended(RopeScaling::Linear { factor: 4.0 }, 512);
    let written = config.to_json();
    assert_eq!(written["something_else"]["kept"], json!([1, 2]));
    assert_eq!(written["eos_token_id"], json!([3, 5]));
    assert_eq!(written["rope_scaling"]["type"], "linear");
    assert_eq!(written["rope_scaling"]["factor"], 4.0);
    assert_eq!(
        written["rope_parameters"],
        json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0})
    );
    let again = read(&written).unwrap();
    assert_eq!(again.to_json(), written);
    assert_eq!(again.max_position_embeddings, 512);
    assert_eq!(again.original_context(), 128);
    assert_eq!(again.extended(RopeScaling::Linear { factor: 8.0 }, 1024).original_context(), 128);
}

#[test]
fn unscaled_rope_is_written_both_ways() {
    let written = read(&plain()).unwrap().to_json();
    assert_eq!(written["rope_scaling"], Value::Null);
    assert_eq!(written["rope_parameters"], json!({"rope_type": "default", "rope_theta": 500.0}));
}

#[test]
fn tensors_lists_the_golden_models() {
    for name in ["tied_f32", "untied_bf16_sharded"] {
        let config = DecoderConfig::from_dir(&fixture(name)).unwrap();
        let weights = megacontext_base::weights::Weights::open(&fixture(name)).unwrap();
        let listed: Vec<String> = config.tensors().into_iter().map(|(name, _)| name).collect();
        assert_eq!(listed, weights.names().collect::<Vec<_>>());
        weights.check(&config.tensors()).unwrap();
    }
}

#[test]
fn missing_folder_is_refused() {
    let message = DecoderConfig::from_dir(Path::new("/no/such/folder")).unwrap_err().to_string();
    says(&message, &["/no/such/folder", "does not exist", "config.json"]);
}

#[test]
fn file_in_place_of_folder_is_refused() {
    let message = DecoderConfig::from_dir(&fixture("tied_f32/config.json")).unwrap_err().to_string();
    says(&message, &["is a file"]);
}

#[test]
fn missing_config_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    says(&DecoderConfig::from_dir(dir.path()).unwrap_err().to_string(), &["config.json", "there is none"]);
}

#[test]
fn half_written_config_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let text = plain().to_string();
    fs::write(dir.path().join("config.json"), &text[..text.len() / 2]).unwrap();
    says(
        &DecoderConfig::from_dir(dir.path()).unwrap_err().to_string(),
        &["expected complete JSON", "config.json"],
    );
}

#[test]
fn config_that_is_not_utf8_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), [0xff, 0xfe, 0x00]).unwrap();
    says(&DecoderConfig::from_dir(dir.path()).unwrap_err().to_string(), &["UTF-8"]);
}

#[test]
fn config_that_is_no_object_is_refused() {
    says(&read(&json!([1])).unwrap_err(), &["expected a JSON object"]);
}

#[test]
fn other_family_is_refused() {
    says(&refused("model_type", json!("phi3")), &["one of \"llama\"", "\"gpt_neox\"", "got \"phi3\""]);
}

#[test]
fn missing_family_is_refused() {
    says(&refused("model_type", Value::Null), &["model_type", "missing"]);
}

#[test]
fn other_activation_is_refused() {
    says(&refused("hidden_act", json!("gelu")), &["silu", "gelu"]);
}

#[test]
fn quantised_model_is_refused() {
    says(&refused("quantization_config", json!({"bits": 4})), &["quantised"]);
}

#[test]
fn partial_rotation_is_refused() {
    says(&refused("partial_rotary_factor", json!(0.5)), &["partial_rotary_factor", "0.5"]);
}

#[test]
fn missing_size_is_refused() {
    says(&refused("hidden_size", Value::Null), &["hidden_size", "missing"]);
}

#[test]
fn size_of_zero_is_refused() {
    says(&refused("num_hidden_layers", json!(0)), &["num_hidden_layers", "got 0"]);
}

#[test]
fn negative_size_is_refused() {
    says(&refused("vocab_size", json!(-4)), &["vocab_size", "got -4"]);
}

#[test]
fn absurd_size_is_refused() {
    says(&refused("intermediate_size", json!(1u64 << 60)), &["intermediate_size", "whole number"]);
}

#[test]
fn absurd_depth_is_refused() {
    says(&refused("num_hidden_layers", json!(100_000)), &["num_hidden_layers", "at most", "100000"]);
}

#[test]
fn absurd_head_width_is_refused() {
    says(&refused("head_dim", json!(1 << 24)), &["head_dim", "at most"]);
}

#[test]
fn size_as_text_is_refused() {
    says(&refused("vocab_size", json!("64")), &["vocab_size", "\"64\""]);
}

#[test]
fn kv_heads_that_do_not_divide_are_refused() {
    says(&refused("num_key_value_heads", json!(3)), &["num_key_value_heads", "divisor", "got 3"]);
}

#[test]
fn heads_that_do_not_divide_the_width_are_refused() {
    let mut config = plain();
    config["num_attention_heads"] = json!(6);
    says(&read(&config).unwrap_err(), &["num_attention_heads", "divisor", "got 6"]);
    config["head_dim"] = json!(10);
    assert_eq!(read(&config).unwrap().head_dim, 10);
}

#[test]
fn odd_head_width_is_refused() {
    says(&refused("head_dim", json!(7)), &["head_dim", "even", "got 7"]);
}

#[test]
fn eps_of_zero_is_refused() {
    says(&refused("rms_norm_eps", json!(0.0)), &["rms_norm_eps", "positive"]);
}

#[test]
fn negative_theta_is_refused() {
    says(&refused("rope_theta", json!(-1)), &["rope_theta", "positive"]);
}

#[test]
fn two_thetas_are_refused() {
    says(&refused("rope_parameters", json!({"rope_theta": 10.0})), &["rope_theta", "500.0", "10.0"]);
}

#[test]
fn unknown_rope_type_is_refused() {
    says(&refused("rope_scaling", json!({"type": "spiral", "factor": 2.0})), &["spiral", "linear"]);
}

#[test]
fn contradicting_rope_keys_are_refused() {
    let mut config = plain();
    config["rope_parameters"] = json!({"rope_type": "linear", "factor": 2.0});
    config["rope_scaling"] = json!({"type": "linear", "factor": 4.0});
    says(&read(&config).unwrap_err(), &["rope_scaling", "rope_parameters", "x2", "x4"]);
}

#[test]
fn flag_that_is_no_flag_is_refused() {
    says(&refused("tie_word_embeddings", json!("yes")), &["tie_word_embeddings", "true or false"]);
}

#[test]
fn end_token_beyond_the_vocabulary_is_refused() {
    says(&refused("eos_token_id", json!(64)), &["eos_token_id", "below vocab_size = 64", "got 64"]);
}

#[test]
fn end_token_that_is_no_id_is_refused() {
    says(&refused("eos_token_id", json!("</s>")), &["eos_token_id", "</s>"]);
}

#[test]
fn bad_original_length_is_refused() {
    says(
        &refused("megacontext", json!({"original_max_position_embeddings": 0})),
        &["original_max_position_embeddings", "positive"],
    );
}
