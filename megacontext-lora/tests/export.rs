//! `mclora export`: what it writes is read back and computes the same; what it refuses.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;

use common::{Fixture, edit_json, edit_tensor, mclora, numbers, read_json};

/// A base, its adapter of two steps, and tokens to compare logits on.
fn prepared() -> (Fixture, String) {
    let fixture = Fixture::new();
    let adapter = fixture.adapter("run");
    let tokens: Vec<u32> = (0..40).map(|i| 1 + (i * 7) % 290).collect();
    fs::write(fixture.path("tokens.json"), format!("{tokens:?}")).unwrap();
    (fixture, adapter)
}

/// Logits of a base with or without an adapter.
fn logits(fixture: &Fixture, base: &str, adapter: Option<&str>) -> Vec<f32> {
    let (base, tokens, out) = (fixture.at(base), fixture.at("tokens.json"), fixture.at("logits.safetensors"));
    let mut args = vec!["logits", "--base", &base, "--tokens", &tokens, "--out", &out];
    args.extend(adapter.iter().flat_map(|adapter| ["--adapter", adapter]));
    mclora(&args).success();
    numbers(&fixture.path("logits.safetensors"), "logits")
}

#[test]
fn extend_says_before_training_that_some_readers_need_an_export() {
    let fixture = Fixture::new();
    let args = common::with(fixture.extend("run"), &[("--stages", "128:1"), ("--eval-tokens", "256")]);
    let said = mclora(&args).success().stderr;
    let (note, training) =
        (said.find("modules_to_save").unwrap(), said.find("measuring the base model").unwrap());
    assert!(note < training, "{said}");
    let line = said.lines().find(|line| line.contains("modules_to_save")).unwrap();
    let command = format!("mclora export --format lora-only --base {}", fixture.at("base"));
    assert!(line.contains("embeddings and norms") && line.contains(&command), "{line}");
    // With LoRA alone there is nothing to say.
    let mut args = common::with(args, &[("--out", &fixture.at("other"))]);
    args.extend(["--freeze-embeddings", "--freeze-norms"].map(str::to_owned));
    assert!(!mclora(&args).success().stderr.contains("modules_to_save"));
}

#[test]
fn lora_only_gives_the_same_logits_and_goes_on_as_gguf() {
    let (fixture, adapter) = prepared();
    let (base, out, file) = (fixture.at("base"), fixture.at("out"), fixture.at("adapter.gguf"));
    let gguf = ["export", "--format", "gguf", "--base", &base, "--adapter", &adapter, "--out", &file];
    mclora(&gguf).refused(1, &["trained in full", "--format lora-only"]);

    let told =
        mclora(&["export", "--format", "lora-only", "--base", &base, "--adapter", &adapter, "--out", &out])
            .success()
            .stdout;
    assert!(
        told.contains("LoRA on 8 linear layers") && told.contains("linear x4, up to 128 tokens"),
        "{told}"
    );
    let split = fixture.at("out/adapter");
    assert_eq!(logits(&fixture, "base", Some(&adapter)), logits(&fixture, "out/base", Some(&split)));
    assert!(read_json(&fixture.path("out/adapter/adapter_config.json"))["modules_to_save"].is_null());
    assert!(fixture.path("out/base/tokenizer.json").is_file());

    let base = fixture.at("out/base");
    let told = mclora(&["export", "--format", "gguf", "--base", &base, "--adapter", &split, "--out", &file]);
    let told = told.success().stdout;
    assert!(told.contains("for           llama, LoRA on 8") && !told.contains("note"), "{told}");
    assert_eq!(&fs::read(fixture.path("adapter.gguf")).unwrap()[..4], b"GGUF");
}

#[test]
fn a_merged_model_with_a_head_of_its_own_says_so() {
    let (fixture, adapter) = prepared();
    // The head trained apart from the embedding, as PEFT does where it is not told about the tie.
    edit_json(&fixture.path("run/adapter/adapter_config.json"), |c| c["ensure_weight_tying"] = false.into());
    edit_tensor(
        &fixture.path("run/adapter/adapter_model.safetensors"),
        "base_model.model.lm_head.weight",
        |head| (head * 1.25).unwrap(),
    );
    let (base, out) = (fixture.at("base"), fixture.at("merged"));
    let told = mclora(&["merge", "--base", &base, "--adapter", &adapter, "--out", &out]).success().stdout;
    assert!(told.contains("tie_word_embeddings is false"), "{told}");
    assert_eq!(read_json(&fixture.path("merged/config.json"))["tie_word_embeddings"], false);
    let (adapted, merged) = (logits(&fixture, "base", Some(&adapter)), logits(&fixture, "merged", None));
    let gap = adapted.iter().zip(&merged).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(gap < 1e-4, "{gap}");
}

#[test]
fn an_unknown_format_is_refused() {
    let fixture = Fixture::new();
    let base = fixture.at("base");
    mclora(&["export", "--format", "onnx", "--base", &base, "--adapter", "a", "--out", "o"])
        .refused(2, &["format", "onnx", "lora-only", "gguf"]);
}

#[test]
fn gguf_in_bf16_is_refused() {
    let fixture = Fixture::new();
    let base = fixture.at("base");
    mclora(&[
        "export",
        "--format",
        "gguf",
        "--base",
        &base,
        "--adapter",
        "a",
        "--out",
        "o",
        "--dtype",
        "bf16",
    ])
    .refused(2, &["dtype", "f32 or f16", "bf16"]);
}

#[test]
fn exporting_into_a_folder_with_content_is_refused() {
    let (fixture, adapter) = prepared();
    let (base, out) = (fixture.at("base"), fixture.at("run"));
    mclora(&["export", "--format", "lora-only", "--base", &base, "--adapter", &adapter, "--out", &out])
        .refused(1, &[&out, "is empty"]);
}

#[test]
fn exporting_an_adapter_of_another_base_is_refused() {
    let (fixture, adapter) = prepared();
    fixture.model("other", 2);
    let (base, out) = (fixture.at("other"), fixture.at("out"));
    mclora(&["export", "--format", "lora-only", "--base", &base, "--adapter", &adapter, "--out", &out])
        .refused(1, &["fingerprint"]);
    assert!(!fixture.path("out").exists());
}
