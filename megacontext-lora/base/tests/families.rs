//! Every family against transformers' own numbers, and nanochat's GPT against MegaContext's.
//!
//! The fixtures are small random folders; where they come from stands in integration-tests/fixtures/README.md.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use megacontext_base::buffers::{Buffers, PassShape, evaluation_bytes, training_bytes};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::{Decoder, Forward};
use megacontext_base::gradients::Gradients;
use megacontext_base::hf_export::{Dtype, write_model_dir};
use megacontext_base::params::Group;
use megacontext_base::rope::RopeTables;
use megacontext_base::weights::Weights;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::loss::IGNORE;
use megacontext_kernels::precision::Precision;
use serde_json::json;

const FOLDERS: [&str; 9] = [
    "llama_bias_f16",
    "mistral_window_bf16",
    "qwen2_f16",
    "qwen3_bf16_sharded",
    "smollm3_bf16",
    "gpt_neox_f32",
    "gpt_neox_sequential_f16",
    "gemma3_bf16",
    "nanochat_bf16",
];
const BASE: [Group; 3] = [Group::Base, Group::Embeddings, Group::Norms];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures")
}

fn folder(name: &str) -> PathBuf {
    fixtures().join("families").join(name)
}

fn open(dir: &Path, precision: Precision) -> Result<Decoder> {
    Ok(Decoder::from_weights(DecoderConfig::from_dir(dir)?, &Weights::open(dir)?, precision, &[])?)
}

struct Case {
    tokens: Vec<u32>,
    targets: Vec<u32>,
    batch: usize,
    rope: RopeTables,
    rows: Rows,
}

impl Case {
    fn of(decoder: &Decoder, tokens: &Tensor) -> Result<Self> {
        let (batch, length) = tokens.dims2()?;
        let tokens: Vec<u32> =
            tokens.flatten_all()?.to_vec1::<i64>()?.into_iter().map(|t| t as u32).collect();
        let targets =
            (0..tokens.len()).map(|i| if (i + 1) % length == 0 { IGNORE } else { tokens[i + 1] }).collect();
        let c = decoder.config();
        let rope = c.rope(&c.rope_scaling).sequence(length)?;
        Ok(Self { tokens, targets, batch, rope, rows: Rows::default() })
    }

    fn forward(&self, pattern: Pattern) -> Forward<'_> {
        Forward { pattern, rope: &self.rope, rows: &self.rows, dropout_seed: None }
    }

    fn dense(&self) -> Forward<'_> {
        self.forward(Pattern::Dense)
    }

    fn logits(&self, decoder: &Decoder, pattern: Pattern) -> Result<Tensor> {
        let x = decoder.embed(&self.tokens, self.batch)?;
        Ok(decoder.logits(&x, &self.forward(pattern))?)
    }

    /// Gradients of the mean loss.
    fn gradients(&self, decoder: &Decoder, pattern: Pattern, recompute: bool) -> Result<Gradients> {
        let count = self.targets.iter().filter(|t| **t != IGNORE).count();
        let mut gradients = Gradients::new();
        let (scale, with) = (1.0 / count as f64, self.forward(pattern));
        // Twice: a step finds what the one before left in its buffers.
        for _ in 0..2 {
            gradients.clear();
            decoder.accumulate_gradients(
                &self.tokens,
                self.batch,
                &self.targets,
                &with,
                scale,
                recompute,
                &mut gradients,
            )?;
        }
        Ok(gradients)
    }
}

fn golden(name: &str) -> Result<HashMap<String, Tensor>> {
    Ok(candle_core::safetensors::load(folder(name).join("expected.safetensors"), &Device::Cpu)?)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()?)
}

/// The largest difference from `want`, as a share of its largest value.
fn share(got: &[f32], want: &Tensor) -> Result<f32> {
    let size = want.abs()?.max_all()?.to_scalar::<f32>()?;
    Ok(largest_difference(&Tensor::from_slice(got, want.shape(), &Device::Cpu)?, want)? / size)
}

#[test]
fn logits_and_gradients_equal_transformers() -> Result<()> {
    for name in FOLDERS {
        let mut decoder = open(&folder(name), Precision::F32)?;
        let expected = golden(name)?;
        let case = Case::of(&decoder, &expected["tokens"])?;
        let difference = largest_difference(&case.logits(&decoder, Pattern::Dense)?, &expected["logits"])?;
        println!("{name}: logits {difference:.1e}");
        assert!(difference < 1e-4, "{name}: logits differ by {difference}");

        decoder.params_mut().set_learning(BASE)?;
        let gradients = case.gradients(&decoder, Pattern::Dense, false)?;
        let mut checked = 0;
        for (key, want) in expected.iter().filter(|(k, _)| k.starts_with("grad.")) {
            let got = gradients.get(&key["grad.".len()..]).with_context(|| format!("{name}: no {key}"))?;
            let difference = share(got, want)?;
            println!("{name}: {key} {difference:.1e}");
            assert!(difference < 1e-3, "{name}: {key} differs by {difference} of its largest value");
            checked += 1;
        }
        assert!(checked > 2, "{name}: only {checked} gradients in the fixture");
        // Every parameter learns something.
        assert_eq!(gradients.names().count(), decoder.params().names().count(), "{name}");
        for name in gradients.names() {
            assert!(gradients.get(name).unwrap().iter().any(|g| *g != 0.0), "{name}: gradient 0");
        }
    }
    Ok(())
}

#[test]
fn folders_hold_the_tensors_that_are_listed() -> Result<()> {
    for name in FOLDERS {
        let config = DecoderConfig::from_dir(&folder(name))?;
        let weights = Weights::open(&folder(name))?;
        let listed: Vec<String> = config.tensors().into_iter().map(|(name, _)| name).collect();
        assert_eq!(listed, weights.names().collect::<Vec<_>>(), "{name}");
        weights.check(&config.tensors())?;
        for linear in config.linears() {
            let shape = weights.shape(&format!("{}.weight", linear.name));
            assert_eq!(shape, Some(&[linear.out, linear.inp][..]), "{name}: {}", linear.name);
        }
    }
    Ok(())
}

#[test]
fn recomputation_gives_the_same_bits_in_every_family_and_class() -> Result<()> {
    for name in FOLDERS {
        for precision in Precision::ALL {
            let mut decoder = open(&folder(name), precision)?;
            decoder.params_mut().set_learning(BASE)?;
            let case = Case::of(&decoder, &golden(name)?["tokens"])?;
            let pattern = Pattern::ShiftedSparse { group: 4 };
            let kept = case.gradients(&decoder, pattern, false)?;
            let again = case.gradients(&decoder, pattern, true)?;
            assert!(kept.names().all(|n| kept.get(n) == again.get(n)), "{name} in {precision}");
        }
    }
    Ok(())
}

/// ‖a − b‖ / ‖b‖.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let norm: f64 = b.iter().map(|b| f64::from(*b).powi(2)).sum();
    let apart: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    (apart / norm).sqrt()
}

#[test]
fn rounded_classes_stay_near_f32_in_every_family() -> Result<()> {
    for name in FOLDERS {
        let of = |precision| -> Result<(Vec<f32>, Gradients)> {
            let mut decoder = open(&folder(name), precision)?;
            decoder.params_mut().set_learning([Group::Norms, Group::Embeddings])?;
            let case = Case::of(&decoder, &golden(name)?["tokens"])?;
            let logits = case.logits(&decoder, Pattern::Dense)?.flatten_all()?.to_vec1()?;
            Ok((logits, case.gradients(&decoder, Pattern::Dense, true)?))
        };
        let (logits, gradients) = of(Precision::F32)?;
        for precision in [Precision::Mixed, Precision::Bf16] {
            let (rounded, rounded_gradients) = of(precision)?;
            let apart = distance(&rounded, &logits);
            assert!(apart < 0.05, "{name} in {precision}: logits off by {apart}");
            // Random weights of this size are far from smooth: what is looked for is a part left out, not rounding.
            for parameter in gradients.names() {
                let got = rounded_gradients.get(parameter).context("gradient")?;
                let apart = distance(got, gradients.get(parameter).context("f32")?);
                assert!(apart < 0.25, "{name}: {parameter} in {precision} off by {apart}");
            }
        }
    }
    Ok(())
}

#[test]
fn passes_hold_as_many_bytes_as_planned_in_every_family() -> Result<()> {
    for name in FOLDERS {
        for precision in Precision::ALL {
            for recompute in [true, false] {
                let mut decoder = open(&folder(name), precision)?;
                decoder.params_mut().set_learning([Group::Norms, Group::Base, Group::Embeddings])?;
                let case = Case::of(&decoder, &golden(name)?["tokens"])?;
                let c = decoder.config();
                let pass = PassShape { entries: case.tokens.len(), precision, lora: None };
                let gradients = case.gradients(&decoder, Pattern::Dense, recompute)?;
                let walked = c.num_hidden_layers - decoder.lowest_learning_block();
                let planned = training_bytes(c, pass, walked, recompute);
                let held = gradients.passes().bytes();
                assert_eq!(held, planned.activations + planned.workspace, "{name} in {precision}");

                let mut buffers = Buffers::default();
                decoder.score(&case.tokens, case.batch, &case.targets, &case.dense(), &mut buffers)?;
                let planned = evaluation_bytes(c, pass);
                assert_eq!(buffers.bytes(), planned.activations + planned.workspace, "{name} in {precision}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_window_bites_in_dense_attention_alone() -> Result<()> {
    let name = "mistral_window_bf16";
    let dir = folder(name);
    let mut config = DecoderConfig::from_dir(&dir)?;
    let windowed = open(&dir, Precision::F32)?;
    for layer in &mut config.architecture.layers {
        assert_eq!(layer.window.take(), Some(6));
    }
    let open = Decoder::from_weights(config, &Weights::open(&dir)?, Precision::F32, &[])?;
    let case = Case::of(&windowed, &golden(name)?["tokens"])?;
    let apart = |pattern| -> Result<f32> {
        largest_difference(&case.logits(&windowed, pattern)?, &case.logits(&open, pattern)?)
    };
    assert!(apart(Pattern::Dense)? > 0.1);
    assert_eq!(apart(Pattern::ShiftedSparse { group: 8 })?, 0.0);
    Ok(())
}

#[test]
fn a_written_folder_gives_the_same_logits() -> Result<()> {
    for name in FOLDERS {
        let decoder = open(&folder(name), Precision::F32)?;
        let written = tempfile::tempdir()?;
        let dir = written.path().join("again");
        let params = decoder.params();
        let tensors = params.names().map(|n| (n.to_string(), params.get(n).unwrap()));
        write_model_dir(&dir, decoder.config(), tensors, Dtype::F32, None)?;
        let again = open(&dir, Precision::F32)?;
        let case = Case::of(&decoder, &golden(name)?["tokens"])?;
        let logits = |decoder: &Decoder| case.logits(decoder, Pattern::Dense);
        assert_eq!(largest_difference(&logits(&decoder)?, &logits(&again)?)?, 0.0, "{name}");
        let original = DecoderConfig::from_dir(&folder(name))?.architecture;
        assert_eq!(again.config().architecture, original, "{name}");
    }
    Ok(())
}

/// nanochat's GPT as MegaContext's own code computes it.
struct Nanochat {
    _dir: tempfile::TempDir,
    golden: HashMap<String, Tensor>,
    decoder: Decoder,
}

impl Nanochat {
    fn open(name: &str) -> Result<Self> {
        let path = fixtures().join("megacontext").join(format!("{name}.safetensors"));
        let golden = candle_core::safetensors::load(path, &Device::Cpu)?;
        let kv_heads = golden["w.transformer.h.0.attn.c_k.weight"].dims()[0] / 8;
        let config = json!({
            "model_type": "nanochat", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_kv_head": kv_heads,
            "sequence_len": 64,
        });
        let config = DecoderConfig::from_json(&config, Path::new("config.json"))?;
        let dir = tempfile::tempdir()?;
        let tensors =
            golden.iter().filter_map(|(key, t)| Some((key.strip_prefix("w.")?.to_string(), t.clone())));
        let folder = dir.path().join("gpt");
        write_model_dir(&folder, &config, tensors, Dtype::F32, None)?;
        let decoder = open(&folder, Precision::F32)?;
        assert_eq!(decoder.config().architecture, config.architecture);
        Ok(Self { _dir: dir, golden, decoder })
    }

    fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let ids = self.golden[key].flatten_all()?.to_vec1::<i64>()?;
        Ok(ids.into_iter().map(|t| if t < 0 { IGNORE } else { t as u32 }).collect())
    }
}

/// Tables whose values are rounded to bf16, as the original does.
fn rounded(tables: &RopeTables) -> Result<RopeTables> {
    let round = |t: &Tensor| t.to_dtype(DType::BF16)?.to_dtype(DType::F32);
    Ok(RopeTables { cos_nd: round(&tables.cos_nd)?, sin_nd: round(&tables.sin_nd)?, ..tables.clone() })
}

#[test]
fn nanochat_equals_megacontext() -> Result<()> {
    for name in ["gpt_mha", "gpt_gqa"] {
        let mut model = Nanochat::open(name)?;
        model.decoder.params_mut().set_learning(BASE)?;
        let (tokens, targets) = (model.ids("in.tokens")?, model.ids("in.targets")?);
        let (batch, length) = model.golden["in.tokens"].dims2()?;
        assert!(targets.contains(&IGNORE), "{name}: some positions are not scored");
        let c = model.decoder.config();
        let exact = c.rope(&c.rope_scaling).sequence(length)?;
        for (variant, rope) in [("fp32", exact.clone()), ("bf16", rounded(&exact)?)] {
            let case =
                Case { tokens: tokens.clone(), targets: targets.clone(), batch, rope, rows: Rows::default() };
            let want = |key: &str| &model.golden[&format!("{variant}.{key}")];
            let logits = case.logits(&model.decoder, Pattern::Dense)?;
            let difference = largest_difference(&logits, want("logits"))?;
            println!("{name} {variant}: logits {difference:.1e}");
            assert!(difference < 2e-4, "{name} {variant}: logits differ by {difference}");
            let x = model.decoder.embed(&case.tokens, batch)?;
            let nll = model.decoder.nll(&x, &case.targets, &case.dense())?;
            let difference = largest_difference(
                &Tensor::from_vec(nll, want("loss_none").shape(), &Device::Cpu)?,
                want("loss_none"),
            )?;
            assert!(difference < 2e-4, "{name} {variant}: losses differ by {difference}");
            let gradients = case.gradients(&model.decoder, Pattern::Dense, true)?;
            let prefix = format!("{variant}.grad.w.");
            let golden: Vec<_> = model.golden.iter().filter(|(key, _)| key.starts_with(&prefix)).collect();
            assert_eq!(golden.len(), if name == "gpt_mha" { 14 } else { 0 });
            for (key, want) in golden {
                let got = gradients.get(&key[prefix.len()..]).with_context(|| format!("no {key}"))?;
                let difference = share(got, want)?;
                assert!(difference < 1e-4, "{name}: {key} differs by {difference} of its largest value");
            }
        }
    }
    Ok(())
}

#[test]
fn nanochat_over_mixed_entries_equals_megacontext() -> Result<()> {
    for name in ["gpt_mha", "gpt_gqa"] {
        let model = Nanochat::open(name)?;
        let (x, targets) = (&model.golden["in.mixed.embeds"], model.ids("in.mixed.targets")?);
        for variant in ["fp32", "bf16"] {
            let want = |key: &str| &model.golden[&format!("{variant}.mixed.{key}")];
            let table = |key: &str| -> Result<Tensor> {
                Ok(want(key).to_dtype(DType::F32)?.reshape((32, 4))?.contiguous()?)
            };
            let rope = RopeTables {
                cos_nd: table("cos")?,
                sin_nd: table("sin")?,
                local: None,
                mu: None,
                spread: None,
            };
            let rows = Rows::default();
            let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
            let difference = largest_difference(&model.decoder.logits(x, &with)?, want("logits"))?;
            assert!(difference < 2e-4, "{name} {variant}: logits differ by {difference}");
            let scored = targets.iter().filter(|t| **t != IGNORE).count();
            let mut gradients = Gradients::new();
            for recompute in [true, false] {
                let (loss, d) = model.decoder.entry_gradients(
                    x,
                    &targets,
                    &with,
                    1.0 / scored as f64,
                    recompute,
                    &mut gradients,
                )?;
                let mean = want("loss_mean").flatten_all()?.to_vec1::<f32>()?[0];
                assert!((loss.sum / loss.count as f64 - f64::from(mean)).abs() < 1e-5, "{name} {variant}");
                let difference = share(&d.flatten_all()?.to_vec1::<f32>()?, want("grad.embeds"))?;
                println!("{name} {variant}: gradient of the entries {difference:.1e}");
                assert!(difference < 1e-4, "{name} {variant}: the entries' gradient differs by {difference}");
            }
            assert_eq!(gradients.names().count(), 0, "frozen parameters get no gradient");
        }
    }
    Ok(())
}
