//! Logits of PEFT against ours, and of a merged folder against base + adapter.
//!
//! The numbers are those of `integration-tests/fixtures/llama`, see the README there.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use megacontext_base::adapter::{AdapterConfig, MegacontextKey, read_adapter, write_adapter};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::{Decoder, Forward};
use megacontext_base::hf_export::Dtype;
use megacontext_base::lora::LoraConfig;
use megacontext_base::merge::merge;
use megacontext_base::rope::RopeScaling;
use megacontext_base::weights::Weights;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::precision::Precision;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/llama").join(name)
}

/// Tokens and logits of a golden folder.
fn expected(dir: &Path) -> (Vec<Vec<u32>>, Tensor) {
    let file = candle_core::safetensors::load(dir.join("expected.safetensors"), &Device::Cpu).unwrap();
    let tokens = file["tokens"].to_vec2::<i64>().unwrap();
    (
        tokens.into_iter().map(|row| row.into_iter().map(|t| t as u32).collect()).collect(),
        file["logits"].clone(),
    )
}

fn load(dir: &Path) -> Decoder {
    Decoder::from_weights(
        DecoderConfig::from_dir(dir).unwrap(),
        &Weights::open(dir).unwrap(),
        Precision::F32,
        &[],
    )
    .unwrap()
}

fn logits(model: &Decoder, scaling: &RopeScaling, rows: &[Vec<u32>]) -> Tensor {
    let c = model.config();
    let rope = c.rope(scaling).sequence(rows[0].len()).unwrap();
    let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &Rows::default(), dropout_seed: None };
    model.logits(&model.embed(&rows.concat(), rows.len()).unwrap(), &with).unwrap()
}

#[track_caller]
fn close(a: &Tensor, b: &Tensor, tolerance: f32) {
    assert_eq!(a.dims(), b.dims());
    let gap = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(gap <= tolerance, "largest difference {gap:e}, allowed {tolerance:e}");
}

#[test]
fn logits_with_an_adapter_are_those_of_peft() {
    let (rows, golden) = expected(&fixture("tied_f32_peft"));
    let adapter = read_adapter(&fixture("tied_f32_peft")).unwrap();
    let mut model = load(&fixture("tied_f32"));
    let config = model.config().clone();
    adapter.load_into(&config, model.params_mut()).unwrap();
    model.set_lora(Some(adapter.lora())).unwrap();
    close(&logits(&model, &RopeScaling::None, &rows), &golden, 5e-5);
}

/// Writes `tensors` as an adapter of ours on a golden folder, with a scaling of its own, merges it, and compares the
/// merged model with base + adapter as read back.
fn merged_equals_adapted(name: &str, lora: LoraConfig, tensors: &[(String, Tensor)]) {
    let root = tempfile::tempdir().unwrap();
    let (rows, _) = expected(&fixture(name));
    let weights = Weights::open(&fixture(name)).unwrap();
    let mut model = load(&fixture(name));
    let base = model.config().clone();
    let trained = tensors.iter().map(|(name, _)| name.as_str()).filter(|name| !name.contains("lora_"));
    let scaling = RopeScaling::Linear { factor: 4.0 };
    let own = MegacontextKey {
        base_fingerprint: weights.fingerprint(),
        rope_scaling: scaling.clone(),
        base_rope_scaling: Some(RopeScaling::None),
        base_rope_theta: None,
        original_max_position_embeddings: 32,
        context_length: 128,
        positions: Default::default(),
        sigma_scales: None,
    };
    let config = AdapterConfig::new(&lora, &base, trained, &fixture(name), own).unwrap();
    let dir = root.path().join("adapter");
    write_adapter(&dir, &config, tensors).unwrap();

    let adapter = read_adapter(&dir).unwrap();
    adapter.check_against(&base, &weights.fingerprint()).unwrap();
    adapter.load_into(&base, model.params_mut()).unwrap();
    model.set_lora(Some(adapter.lora())).unwrap();
    let merged = root.path().join("merged");
    merge(&weights, &base, &adapter, &merged, Some(Dtype::F32)).unwrap();
    let alone = load(&merged);
    assert_eq!(alone.config().rope_scaling, scaling);
    let adapted = logits(&model, &scaling, &rows);
    close(&logits(&alone, &scaling, &rows), &adapted, 1e-4);
}

#[test]
fn merged_tied_folder_gives_the_logits_of_base_and_adapter() {
    let peft = read_adapter(&fixture("tied_f32_peft")).unwrap();
    let base = DecoderConfig::from_dir(&fixture("tied_f32")).unwrap();
    let tensors: Vec<_> = peft.parameters(&base).map(|(name, t)| (name.to_string(), t.clone())).collect();
    merged_equals_adapted("tied_f32", peft.lora(), &tensors);
}

#[test]
fn merged_untied_folder_gives_the_logits_of_base_and_adapter() {
    let base = DecoderConfig::from_dir(&fixture("untied_bf16_sharded")).unwrap();
    let lora = LoraConfig { r: 2, alpha: 6.0, layers: Some(vec![1].into()), ..LoraConfig::default() };
    let peft = read_adapter(&fixture("tied_f32_peft")).unwrap();
    // The same shapes fit: LoRA in the second block only, norms and embedding in full, the head as it is.
    let tensors: Vec<_> = peft
        .parameters(&base)
        .filter(|(name, _)| {
            !(name.contains("layers.0") && name.contains("lora_")) && *name != "lm_head.weight"
        })
        .map(|(name, t)| (name.to_string(), t.clone()))
        .collect();
    merged_equals_adapted("untied_bf16_sharded", lora, &tensors);
}
