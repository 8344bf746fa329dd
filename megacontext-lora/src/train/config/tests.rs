//! Settings that are refused, and defaults.

use super::*;

#[test]
fn default_stages_double_and_give_the_last_half() {
    let stages = default_stages(256, 1024, 300);
    let shape: Vec<(usize, usize)> = stages.iter().map(|s| (s.context, s.steps)).collect();
    assert_eq!(shape, [(512, 150), (1024, 150)]);
    assert_eq!(stages[1].pattern(), Pattern::ShiftedSparse { group: 256 });
    assert_eq!(default_stages(256, 256, 10).len(), 1);
}

#[test]
fn micro_batches_cover_the_step() {
    let batch = BatchConfig { tokens_per_step: 8192, micro_batch_tokens: 2048 };
    assert_eq!(batch.shape(1024), (2, 4));
    assert_eq!(batch.shape(100_000), (1, 1));
}

#[test]
fn schedule_warms_up_and_falls() {
    let o = OptimizerConfig { lr: 1.0, schedule: Schedule::Cosine, warmup_steps: 4, ..Default::default() };
    assert_eq!(o.lr_at(0, 0, 100), 0.25);
    assert!((o.lr_at(50, 50, 100) - 0.55).abs() < 1e-12);
    assert!(o.lr_at(99, 100, 100) - 0.1 < 1e-12);
}

fn model() -> DecoderConfig {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-llama");
    DecoderConfig::from_dir(&dir).unwrap()
}

fn resolved(extra: serde_json::Value) -> Result<ExtendConfig> {
    let mut value = serde_json::json!({ "data": ["x"], "context": 512 });
    value.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    ExtendConfig::from_json(value)?.resolve(&model())
}

#[test]
fn embeddings_are_a_choice_and_the_older_key_is_read() {
    let policy = |extra| resolved(extra).unwrap().policy();
    assert_eq!(policy(serde_json::json!({})), EmbeddingPolicy::Full);
    assert_eq!(policy(serde_json::json!({ "train_embeddings": false })), EmbeddingPolicy::Frozen);
    for extra in [
        serde_json::json!({ "embeddings": "lora" }),
        serde_json::json!({ "embeddings": "new-tokens", "new_tokens": [5, 6] }),
    ] {
        let config = resolved(extra).unwrap();
        assert!(config.lora.resolve(&model()).unwrap().changes_embedding());
        assert!(!config.groups().contains(&Group::Embeddings));
        assert_eq!(config.clone().resolve(&model()).unwrap(), config, "resolving twice changes nothing");
    }
}

#[test]
fn embeddings_that_contradict_other_settings_are_refused() {
    for (extra, what) in [
        (serde_json::json!({ "embeddings": "full", "train_embeddings": true }), "train_embeddings"),
        (serde_json::json!({ "embeddings": "new-tokens" }), "new_tokens: expected the tokens"),
        (serde_json::json!({ "new_tokens": [3] }), "new_tokens: expected none"),
        (
            serde_json::json!({ "lora": { "target_modules": ["embed_tokens"] } }),
            "write embeddings = \"lora\"",
        ),
        (serde_json::json!({ "optimizer": { "lora_plus_lr_ratio": 0.0 } }), "lora_plus_lr_ratio"),
    ] {
        let error = resolved(extra).unwrap_err();
        assert!(error.message.contains(what), "{error}");
    }
}

#[test]
fn unknown_key_is_refused_by_name() {
    let error = ExtendConfig::from_json(serde_json::json!({"contxt": 1})).unwrap_err();
    assert!(error.message.contains("contxt") && error.message.contains("context"), "{error}");
}

#[test]
fn sigma_is_refused_since_tokens_have_none() {
    for (extra, got) in [
        (serde_json::json!({ "train_sigma": true }), "got train_sigma = true"),
        (serde_json::json!({ "sigma": { "lr": 1.0 } }), "got sigma = {\"lr\":1.0}"),
        (serde_json::json!({ "groups": ["lora", "sigma"] }), "got groups = [\"lora\",\"sigma\"]"),
    ] {
        let message = resolved(extra).unwrap_err().to_string();
        for part in ["expected a session", "JT3", got] {
            assert!(message.contains(part), "{message}");
        }
    }
    // Any other word is unknown as before.
    let message = resolved(serde_json::json!({ "groups": ["lora"] })).unwrap_err().to_string();
    assert!(message.contains("unknown field `groups`"), "{message}");
}
