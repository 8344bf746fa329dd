//! ΔNLL@H, its divergence form and their gradients for GistNet against the values that belong to MegaContext's code.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use candle_core::{Device, Tensor};
use gistnet_adapter::delta_nll::{DeltaNll, Span, StandIn, Substitution};
use gistnet_adapter::{GistNet, GistNetConfig};
use megacontext_base::buffers::Buffers;
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::Decoder;
use megacontext_base::gradients::Gradients;
use megacontext_base::hf_export::{Dtype, write_model_dir};
use megacontext_base::params::Group;
use megacontext_base::rope::{SIGMA, SigmaPreset, SigmaRule};
use megacontext_base::weights::Weights;
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::precision::Precision;
use serde_json::json;

const K: usize = 8;
const H: usize = 8;
const START: usize = 16;

type Golden = HashMap<String, Tensor>;

fn golden(name: &str) -> Result<Golden> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/megacontext");
    Ok(candle_core::safetensors::load(dir.join(format!("{name}.safetensors")), &Device::Cpu)?)
}

fn without_prefix(golden: &Golden, prefix: &str) -> Golden {
    golden.iter().filter_map(|(key, t)| Some((key.strip_prefix(prefix)?.to_string(), t.clone()))).collect()
}

/// The original GPT, whose entries stand at certain places: every level's spread is scaled to 0.
fn decoder(dir: &Path) -> Result<Decoder> {
    let config = json!({
        "model_type": "nanochat", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 4,
        "sequence_len": 64,
    });
    let config = DecoderConfig::from_json(&config, Path::new("config.json"))?;
    let folder = dir.join("gpt");
    let tensors = without_prefix(&golden("gpt_mha")?, "w.");
    write_model_dir(&folder, &config, tensors, Dtype::F32, None)?;
    let config = DecoderConfig::from_dir(&folder)?;
    let mut decoder = Decoder::from_weights(config, &Weights::open(&folder)?, Precision::F32, &[])?;
    decoder.attach_sigma(2)?;
    decoder.params_mut().set(SIGMA, &Tensor::zeros(2, candle_core::DType::F32, &Device::Cpu)?)?;
    Ok(decoder)
}

fn gistnet(dir: &Path, golden: &Golden) -> Result<GistNet> {
    let path = dir.join("gist.safetensors");
    candle_core::safetensors::save(&without_prefix(golden, "w.gist."), &path)?;
    let config = GistNetConfig { block: K, layers: 1, ..GistNetConfig::new(32, 4) }.original();
    let mut network = GistNet::load_weights(&path, config)?;
    network.params_mut().set_learning([Group::Gistnet])?;
    Ok(network)
}

fn off(got: &[f32], want: &Tensor) -> f32 {
    let want: Vec<f32> = want.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(got.len(), want.len());
    got.iter().zip(&want).fold(0.0, |most, (a, b)| most.max((a - b).abs()))
}

#[test]
fn losses_and_gradients_equal_megacontexts() -> Result<()> {
    let golden = golden("delta_nll")?;
    let dir = tempfile::tempdir()?;
    let decoder = decoder(dir.path())?;
    let network = gistnet(dir.path(), &golden)?;
    let tokens: Vec<u32> =
        golden["in.tokens"].flatten_all()?.to_vec1::<i64>()?.into_iter().map(|t| t as u32).collect();
    for (place, preset) in [("start", SigmaPreset::Original), ("centre", SigmaPreset::Document)] {
        let rule = SigmaRule { preset, block: K, uniform: false };
        let c = decoder.config();
        let delta = DeltaNll::new(&decoder, &c.rope_scaling, rule, Pattern::Dense, H)?;
        for (form, objective) in [
            ("grad_delta", Substitution { nll: 0.5, kl: 0.0, weights: None }),
            ("grad_kl", Substitution { nll: 0.0, kl: 0.5, weights: None }),
        ] {
            let mut gradients = Gradients::new();
            for (row, tokens) in tokens.chunks_exact(32).enumerate() {
                let want = |name: &str| golden[&format!("derived.{place}.{name}")].get(row).unwrap();
                let mut buffers = Buffers::default();
                let passage = delta.run(tokens, true, &mut buffers)?;
                let mut rows =
                    delta.rows(&passage, &[vec![Span { start: START, lod: 1 }]], StandIn::Entry)?;
                let children = passage.x_te[START * 32..][..K * 32].to_vec();
                let gist = network.forward(&Tensor::from_vec(children, (1, K, 32), &Device::Cpu)?, None)?;
                rows.fill(&gist.flatten_all()?.to_vec1::<f32>()?)?;
                let got = delta.measure(&passage, &rows, Some(&objective), &mut buffers)?;
                let losses = &got.rows[0];
                assert!(off(&losses.full, &golden["derived.nll_full"].get(row)?) < 2e-4);
                assert!(off(&losses.replaced, &want("nll_replaced")) < 2e-4, "{place}: replaced");
                assert!(off(&[got.delta() as f32], &want("delta_nll").unsqueeze(0)?) < 1e-4, "{place}: ΔNLL");
                assert_eq!(losses.kl.is_some(), objective.kl != 0.0);
                if let Some(kl) = losses.divergence() {
                    assert!(off(&[kl as f32], &want("kl").unsqueeze(0)?) < 1e-4, "{place}: KL");
                }
                let d = Tensor::from_vec(got.d_slots.unwrap(), (1, 32), &Device::Cpu)?;
                network.backward(&gist, d, None, &mut gradients)?;
            }
            let prefix = format!("derived.{place}.{form}.");
            let wanted = without_prefix(&golden, &prefix);
            assert_eq!(wanted.len(), 10);
            for (name, want) in wanted {
                let size = want.abs()?.max_all()?.to_scalar::<f32>()?;
                let share = off(gradients.get(&name).unwrap(), &want) / size;
                assert!(share < 1e-4, "{place} {form} {name}: differs by {share} of its largest value");
            }
        }
    }
    Ok(())
}
