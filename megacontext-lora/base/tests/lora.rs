//! LoRA of every kind learns what it should and nothing else; one test for each thing refused.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::{Decoder, Forward};
use megacontext_base::gradients::{AdamWConfig, Gradients, Optimizer};
use megacontext_base::lora::{LoraConfig, LoraInit, Names, TokenIndices};
use megacontext_base::params::Group;
use megacontext_base::weights::Weights;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::precision::Precision;
use serde_json::json;

const BATCH: usize = 2;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/llama").join(name)
}

fn config(name: &str) -> DecoderConfig {
    DecoderConfig::from_dir(&fixture(name)).unwrap()
}

fn kinds() -> Vec<(&'static str, &'static str, LoraConfig)> {
    let lora = |edit: serde_json::Value| -> LoraConfig { serde_json::from_value(edit).unwrap() };
    let tokens = TokenIndices::Embedding(vec![3, 17]);
    vec![
        (
            "patterns",
            "untied_f32_linear",
            lora(json!({"r": 2, "layers": "last:1", "rank_pattern": {"q_proj": 4}})),
        ),
        ("rslora, gaussian", "tied_f32", lora(json!({"r": 2, "use_rslora": true, "init": "gaussian"}))),
        (
            "dora",
            "untied_f32_linear",
            lora(json!({"r": 2, "target_modules": "all-linear", "use_dora": true})),
        ),
        ("pissa", "tied_f32", lora(json!({"r": 2, "target_modules": "all-linear", "init": "pissa"}))),
        ("head", "untied_f32_linear", lora(json!({"r": 2, "target_modules": ["lm_head", "up_proj"]}))),
        (
            "embedding",
            "untied_f32_linear",
            lora(json!({"r": 2, "target_modules": ["embed_tokens", "q_proj"]})),
        ),
        ("tied embedding", "tied_f32", lora(json!({"r": 2, "target_modules": ["embed_tokens", "q_proj"]}))),
        (
            "tokens",
            "tied_f32",
            LoraConfig { r: 2, trainable_token_indices: Some(tokens), ..Default::default() },
        ),
    ]
}

fn decoder(base: &str, lora: &LoraConfig) -> Decoder {
    let dir = fixture(base);
    let mut decoder =
        Decoder::from_weights(config(base), &Weights::open(&dir).unwrap(), Precision::F32, &[]).unwrap();
    decoder.attach_lora(lora.clone(), 5).unwrap();
    decoder.params_mut().set_learning([Group::Lora]).unwrap();
    decoder
}

fn tokens() -> Vec<u32> {
    (0..BATCH * 12).map(|i| [3, 17, 9, 60, 3, 22, 41, 5][i * 5 % 8]).collect()
}

/// Loss of predicting the next token, and its gradients.
fn step(decoder: &Decoder, gradients: &mut Gradients) -> f64 {
    let tokens = tokens();
    let targets: Vec<u32> = tokens[1..].iter().copied().chain([tokens[0]]).collect();
    let c = decoder.config();
    let rope = c.rope(&c.rope_scaling).sequence(tokens.len() / BATCH).unwrap();
    let rows = Rows::default();
    let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
    let scale = 1.0 / tokens.len() as f64;
    let loss = decoder.accumulate_gradients(&tokens, BATCH, &targets, &with, scale, true, gradients).unwrap();
    loss.sum / loss.count as f64
}

#[test]
fn every_kind_learns_and_leaves_the_rest_alone() {
    for (kind, base, lora) in kinds() {
        let decoder = decoder(base, &lora);
        let frozen = [Group::Base, Group::Embeddings, Group::Norms];
        let hashes = |d: &Decoder| frozen.map(|group| d.params().group_hash(group).unwrap());
        let before = hashes(&decoder);
        let mut optimizer = Optimizer::new(AdamWConfig { lora_plus_lr_ratio: 2.0, ..Default::default() });
        let mut losses = Vec::new();
        for _ in 0..30 {
            let mut gradients = Gradients::new();
            losses.push(step(&decoder, &mut gradients));
            for (name, _) in decoder.params().trainable().unwrap() {
                assert!(gradients.get(&name).is_some(), "{kind}: {name} got no gradient");
            }
            optimizer.step(decoder.params(), &gradients, 1e-2).unwrap();
        }
        let (first, last) = (losses[0], losses[29]);
        assert!(last < 0.8 * first, "{kind}: the loss went from {first} to {last}");
        assert_eq!(hashes(&decoder), before, "{kind}: something frozen changed");
    }
}

#[test]
fn gradients_of_every_kind_match_differences() {
    for (kind, base, lora) in kinds() {
        // DoRA's lengths are constants of the backward pass: differences of A and B would move them.
        let mut decoder = decoder(base, &lora);
        let names: Vec<String> =
            decoder.params().trainable().unwrap().into_iter().map(|(name, _)| name).collect();
        for (i, name) in names.iter().enumerate().filter(|(_, name)| !name.contains("magnitude")) {
            let value = decoder.params().get(name).unwrap().copy().unwrap();
            let noise: Vec<f32> =
                (0..value.elem_count()).map(|j| ((i * 7 + j * 13) % 11) as f32 * 0.01 - 0.05).collect();
            let noise = Tensor::from_vec(noise, value.shape(), &Device::Cpu).unwrap();
            decoder.params_mut().set(name, &(value + noise).unwrap()).unwrap();
        }
        let mut gradients = Gradients::new();
        step(&decoder, &mut gradients);
        for name in names.iter().filter(|name| !lora.use_dora || name.contains("magnitude")) {
            let value = decoder.params().get(name).unwrap().copy().unwrap();
            let values = value.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let gradient = gradients.get(name).unwrap();
            // Along the gradient itself: the slope is its length.
            let length = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            // Far enough for f32 to see, near enough for a line.
            let by = (3e-3 / (length * length)).min(4e-3 / length);
            let mut loss_at = |sign: f64| {
                let moved: Vec<f32> = values
                    .iter()
                    .zip(gradient)
                    .map(|(v, g)| (f64::from(*v) + sign * by * f64::from(*g)) as f32)
                    .collect();
                let moved = Tensor::from_vec(moved, value.shape(), &Device::Cpu).unwrap();
                decoder.params_mut().set(name, &moved).unwrap();
                step(&decoder, &mut Gradients::new())
            };
            let slope = (loss_at(1.0) - loss_at(-1.0)) / (2.0 * by);
            decoder.params_mut().set(name, &value).unwrap();
            let (got, want) = (length * length, slope);
            assert!((got - want).abs() <= 2e-2 * want.abs() + 1e-5, "{kind}: {name}: {got} against {want}");
        }
    }
}

#[test]
fn first_values_change_nothing() {
    for (kind, base, lora) in kinds() {
        let dir = fixture(base);
        let plain =
            Decoder::from_weights(config(base), &Weights::open(&dir).unwrap(), Precision::F32, &[]).unwrap();
        let (a, b) =
            (step(&plain, &mut Gradients::new()), step(&decoder(base, &lora), &mut Gradients::new()));
        assert!((a - b).abs() < 1e-4, "{kind}: loss {a} became {b}");
    }
}

#[test]
fn pissa_is_saved_as_plain_lora_of_the_same_change() {
    let lora = LoraConfig { r: 2, init: LoraInit::Pissa, use_rslora: true, ..Default::default() };
    let mut decoder = decoder("tied_f32", &lora);
    let mut optimizer = Optimizer::new(AdamWConfig::default());
    for _ in 0..3 {
        let mut gradients = Gradients::new();
        step(&decoder, &mut gradients);
        optimizer.step(decoder.params(), &gradients, 1e-2).unwrap();
    }
    let trained = step(&decoder, &mut Gradients::new());
    let (plain, tensors) = decoder.saved_lora(decoder.params().trainable().unwrap()).unwrap();
    assert_eq!((plain.r, plain.init), (4, LoraInit::Default));
    assert!((plain.scale() - lora.scale()).abs() < 1e-12);
    for (name, tensor) in tensors {
        decoder.params_mut().insert(name, Group::Lora, tensor.detach()).unwrap();
    }
    decoder.set_lora(Some(plain)).unwrap();
    let again = step(&decoder, &mut Gradients::new());
    assert!((trained - again).abs() < 1e-5, "{trained} became {again}");
}

/// What a refusal of these settings on a tied model says.
fn refused(edit: serde_json::Value) -> String {
    let lora: LoraConfig = serde_json::from_value(edit).unwrap();
    lora.validate(&config("tied_f32")).unwrap_err().to_string()
}

#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "\"{part}\" is missing in: {message}");
    }
}

#[test]
fn rank_0_is_refused() {
    says(&refused(json!({"r": 0})), &["r (rank)", "at least 1"]);
}

#[test]
fn rank_0_in_a_pattern_is_refused() {
    says(&refused(json!({"rank_pattern": {"q_proj": 0}})), &["rank_pattern", "q_proj"]);
}

#[test]
fn an_unknown_target_is_refused_with_the_models_own() {
    says(&refused(json!({"target_modules": ["c_attn"]})), &["c_attn", "q_proj", "down_proj", "embed_tokens"]);
}

#[test]
fn a_tied_head_as_target_is_refused() {
    says(&refused(json!({"target_modules": ["lm_head"]})), &["lm_head", "tied to the embedding"]);
}

#[test]
fn an_expression_that_means_nothing_is_refused() {
    says(&refused(json!({"target_modules": ".*nowhere"})), &["nowhere", "means none"]);
}

#[test]
fn a_broken_expression_is_refused() {
    says(
        &refused(json!({"target_modules": "(q_proj"})),
        &["target_modules", "regular expression", "(q_proj"],
    );
}

#[test]
fn a_rank_pattern_that_means_nothing_is_refused() {
    says(&refused(json!({"rank_pattern": {"up_proj": 2}})), &["rank_pattern", "up_proj", "means none"]);
}

#[test]
fn an_alpha_pattern_that_means_nothing_is_refused() {
    says(&refused(json!({"alpha_pattern": {"up_proj": 2.0}})), &["alpha_pattern", "up_proj", "means none"]);
}

#[test]
fn blocks_beside_an_expression_are_refused() {
    says(&refused(json!({"target_modules": ".*q_proj", "layers": [0]})), &["layers", "regular expression"]);
}

#[test]
fn more_blocks_than_there_are_is_refused() {
    says(&refused(json!({"layers": "first:3"})), &["1 to 2 blocks", "first:3"]);
}

#[test]
fn dora_on_the_embedding_is_refused() {
    says(
        &refused(json!({"use_dora": true, "target_modules": ["embed_tokens"]})),
        &["use_dora", "embed_tokens"],
    );
}

#[test]
fn dora_with_pissa_is_refused() {
    says(&refused(json!({"use_dora": true, "init": "pissa"})), &["init", "use_dora", "pissa"]);
}

#[test]
fn a_token_beyond_the_vocabulary_is_refused() {
    says(&refused(json!({"trainable_token_indices": [64]})), &["trainable_token_indices", "64"]);
}

#[test]
fn a_token_named_twice_is_refused() {
    says(&refused(json!({"trainable_token_indices": [4, 4]})), &["trainable_token_indices", "4 twice"]);
}

#[test]
fn rows_of_an_embedding_with_lora_are_refused() {
    let both = json!({"trainable_token_indices": [4], "target_modules": ["embed_tokens"]});
    says(&refused(both), &["trainable_token_indices", "embed_tokens", "LoRA of its own"]);
}

#[test]
fn the_embedding_joins_blocks_by_their_full_names() {
    let model = config("tied_f32");
    let lora = LoraConfig { layers: Some(vec![1].into()), ..Default::default() };
    let with = lora.with_embedding(&model).unwrap();
    assert!(with.layers.is_none() && matches!(with.target_modules, Names::List(_)));
    let modules = with.resolve(&model).unwrap();
    assert!(modules.changes_embedding() && modules.in_block(1) && !modules.in_block(0));
}
