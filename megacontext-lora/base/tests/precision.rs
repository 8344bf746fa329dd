//! The precision classes: what is stored how, how far gradients are from those of f32, and how much memory a pass holds.
//!
//! The bound: bf16 keeps 8 bits, so rounding once is off by at most 2⁻⁹ of a value. On its way from the embeddings to the
//! loss and back through three blocks a value is rounded some 20 times in a row, with signs that are as good as random:
//! √20·2⁻⁹ is 0.9 %. Over a parameter's whole gradient 4 % is allowed for `bf16`, half of that for `mixed`, which rounds
//! operands only.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use megacontext_base::buffers::{Buffers, PassShape, evaluation_bytes, training_bytes};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::{Decoder, Forward};
use megacontext_base::gradients::{AdamWConfig, Gradients, Optimizer};
use megacontext_base::lora::LoraConfig;
use megacontext_base::params::{Group, ParamStore};
use megacontext_base::random::Random;
use megacontext_base::rope::{RopeScaling, RopeTables};
use megacontext_base::weights::Weights;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::linear::Weight;
use megacontext_kernels::loss::IGNORE;
use megacontext_kernels::precision::Precision;
use megacontext_kernels::store::{Store, bf16};
use serde_json::json;

const TUNED: [Group; 3] = [Group::Lora, Group::Embeddings, Group::Norms];
const ALL: [Group; 3] = [Group::Base, Group::Embeddings, Group::Norms];
const BATCH: usize = 2;
const LENGTH: usize = 24;

fn config(tied: bool) -> DecoderConfig {
    let value = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": 211, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "tie_word_embeddings": tied, "attention_bias": false, "mlp_bias": false,
    });
    DecoderConfig::from_json(&value, Path::new("config.json")).unwrap()
}

/// A random decoder of a class with LoRA whose B is not zero, so that every path carries signal.
fn adapted(precision: Precision, tied: bool, dropout: f64) -> Result<Decoder> {
    let mut decoder = Decoder::random(config(tied), 3, precision, &TUNED)?;
    decoder.attach_lora(LoraConfig { r: 3, dropout, ..LoraConfig::default() }, 5)?;
    let names: Vec<String> =
        decoder.params().names().filter(|n| n.contains("lora_B")).map(String::from).collect();
    for name in names {
        let shape = decoder.params().shape(&name).context("B")?.to_vec();
        let mut random = Random::named(7, &name);
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| (random.normal() * 0.05) as f32).collect();
        decoder.params_mut().set(&name, &Tensor::from_vec(values, shape, &Device::Cpu)?)?;
    }
    decoder.params_mut().set_learning(TUNED)?;
    Ok(decoder)
}

fn tokens() -> Vec<u32> {
    let mut random = Random::new(11);
    (0..BATCH * LENGTH).map(|_| random.below(211) as u32).collect()
}

/// Next tokens within each row; nothing is scored at a row's end.
fn targets(tokens: &[u32]) -> Vec<u32> {
    (0..tokens.len()).map(|i| if (i + 1) % LENGTH == 0 { IGNORE } else { tokens[i + 1] }).collect()
}

fn rope(decoder: &Decoder) -> Result<RopeTables> {
    let c = decoder.config();
    Ok(c.rope(&RopeScaling::None).sequence(LENGTH)?)
}

fn gradients_of(decoder: &Decoder, recompute: bool, dropout_seed: Option<u64>) -> Result<(f64, Gradients)> {
    let (tokens, rope, rows) = (tokens(), rope(decoder)?, Rows::default());
    let with =
        Forward { pattern: Pattern::ShiftedSparse { group: 8 }, rope: &rope, rows: &rows, dropout_seed };
    let mut gradients = Gradients::new();
    let targets = targets(&tokens);
    let mut step =
        || decoder.accumulate_gradients(&tokens, BATCH, &targets, &with, 0.02, recompute, &mut gradients);
    // Twice: a step finds what the one before left in its buffers.
    let (loss, again) = (step()?, step()?);
    assert_eq!(loss, again);
    Ok((loss.sum / loss.count as f64, gradients))
}

fn stored_in_bf16(params: &ParamStore, name: &str) -> bool {
    matches!(params.values(name).unwrap().weight(), Weight::Bf16(_))
}

#[test]
fn frozen_matrices_are_stored_in_bf16_and_what_learns_in_f32() -> Result<()> {
    for precision in Precision::ALL {
        let decoder = adapted(precision, false, 0.0)?;
        let params = decoder.params();
        for name in params.names() {
            let group = params.group(name).context("group")?;
            let expected = precision == Precision::Bf16 && group == Group::Base;
            assert_eq!(stored_in_bf16(params, name), expected, "{name} in {precision}");
        }
        let frozen = Decoder::random(config(true), 3, precision, &[])?;
        let embeddings = stored_in_bf16(frozen.params(), "model.embed_tokens.weight");
        assert_eq!(embeddings, precision == Precision::Bf16);
    }
    Ok(())
}

#[test]
fn every_learning_parameter_gets_a_gradient_in_each_class() -> Result<()> {
    for precision in Precision::ALL {
        for tied in [true, false] {
            let mut decoder = adapted(precision, tied, 0.0)?;
            for learning in [&TUNED[..], &[Group::Lora], &[Group::Norms], &[Group::Embeddings]] {
                decoder.params_mut().set_learning(learning.iter().copied())?;
                let (_, gradients) = gradients_of(&decoder, true, None)?;
                let names: Vec<String> =
                    decoder.params().trainable().unwrap().into_iter().map(|(n, _)| n).collect();
                assert_eq!(gradients.names().collect::<Vec<_>>(), names, "{precision}");
                for name in names {
                    let gradient = gradients.get(&name).context("gradient")?;
                    assert!(gradient.iter().any(|g| *g != 0.0), "{name} in {precision}");
                    assert!(gradient.iter().all(|g| g.is_finite()), "{name} in {precision}");
                }
            }
        }
        let mut decoder = Decoder::random(config(true), 3, precision, &ALL)?;
        decoder.params_mut().set_learning(ALL)?;
        let (_, gradients) = gradients_of(&decoder, false, None)?;
        assert_eq!(gradients.names().count(), decoder.params().names().count());
        assert!(gradients.names().all(|n| gradients.get(n).unwrap().iter().any(|g| *g != 0.0)));
    }
    Ok(())
}

#[test]
fn recomputation_gives_the_same_bits_in_each_class() -> Result<()> {
    for precision in Precision::ALL {
        for dropout in [0.0, 0.2] {
            let decoder = adapted(precision, true, dropout)?;
            let (kept_loss, kept) = gradients_of(&decoder, false, Some(3))?;
            let (again_loss, again) = gradients_of(&decoder, true, Some(3))?;
            assert_eq!(kept_loss.to_bits(), again_loss.to_bits(), "{precision}");
            for name in kept.names() {
                assert!(kept.get(name) == again.get(name), "{name} in {precision}");
            }
        }
    }
    Ok(())
}

/// ‖a − b‖ / ‖b‖.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f64| v * v;
    let norm: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    let apart: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    (apart / norm).sqrt()
}

#[test]
fn gradients_are_those_of_f32_up_to_rounding() -> Result<()> {
    for tied in [true, false] {
        let (loss, exact) = gradients_of(&adapted(Precision::F32, tied, 0.0)?, true, None)?;
        for (precision, bound) in [(Precision::Mixed, 0.02), (Precision::Bf16, 0.04)] {
            let (rounded_loss, rounded) = gradients_of(&adapted(precision, tied, 0.0)?, true, None)?;
            assert!((rounded_loss - loss).abs() < bound * loss, "{precision}: {rounded_loss}, f32 {loss}");
            for name in exact.names() {
                let apart = distance(rounded.get(name).context("gradient")?, exact.get(name).context("f32")?);
                assert!(apart < bound, "{name} in {precision}: off by {apart}");
            }
        }
        let bf16 = gradients_of(&adapted(Precision::Bf16, tied, 0.0)?, true, None)?.1;
        assert!(bf16.names().any(|n| bf16.get(n) != exact.get(n)), "bf16 rounded nothing");
    }
    Ok(())
}

#[test]
fn logits_and_nll_are_those_of_f32_up_to_rounding() -> Result<()> {
    let rows = Rows::default();
    let read = |precision| -> Result<(Vec<f32>, Vec<f32>, Vec<f32>)> {
        let decoder = adapted(precision, true, 0.0)?;
        let rope = rope(&decoder)?;
        let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
        let (tokens, targets) = (tokens(), targets(&tokens()));
        let x = decoder.embed(&tokens, BATCH)?;
        let logits = decoder.logits(&x, &with)?.flatten_all()?.to_vec1()?;
        let nll = decoder.nll(&x, &targets, &with)?;
        let score = decoder.score(&tokens, BATCH, &targets, &with, &mut Buffers::default())?;
        assert!(nll == score, "{precision}: given as tensor or as tokens");
        let hidden = decoder.hidden(&x, &with)?.flatten_all()?.to_vec1()?;
        Ok((logits, nll, hidden))
    };
    let exact = read(Precision::F32)?;
    for (precision, bound) in [(Precision::Mixed, 0.02), (Precision::Bf16, 0.04)] {
        let rounded = read(precision)?;
        for (rounded, exact) in [(&rounded.0, &exact.0), (&rounded.1, &exact.1), (&rounded.2, &exact.2)] {
            let apart = distance(rounded, exact);
            assert!(apart < bound, "{precision}: off by {apart}");
        }
    }
    Ok(())
}

#[test]
fn a_group_that_begins_to_learn_becomes_f32_without_a_change_of_value() -> Result<()> {
    let mut decoder = Decoder::random(config(true), 3, Precision::Bf16, &[])?;
    let name = "model.layers.1.mlp.up_proj.weight";
    let before = decoder.params().values(name)?.to_f32();
    let copy = decoder.params().get(name).context("weight")?.copy()?;
    let hash = decoder.params().group_hash(Group::Base)?;
    let count = decoder.params().count_by_group()[&Group::Base];

    assert_eq!(decoder.params_mut().set_learning([Group::Norms])?, 0);
    assert_eq!(decoder.params().group_hash(Group::Base)?, hash);
    assert_eq!(decoder.params_mut().set_learning([Group::Base])?, count);
    assert!(!stored_in_bf16(decoder.params(), name));
    assert_eq!(decoder.params().values(name)?.f32()?, before);
    // Frozen again it stays what it is, so that nothing that was learned is rounded away.
    decoder.params_mut().freeze();
    assert_eq!(decoder.params_mut().set_learning([Group::Base])?, 0);
    assert!(!stored_in_bf16(decoder.params(), name));
    decoder.params_mut().insert(name, Group::Base, copy)?;
    assert!(stored_in_bf16(decoder.params(), name));
    assert_eq!(decoder.params().values(name)?.to_f32(), before);
    Ok(())
}

#[test]
fn bf16_where_f32_is_needed_is_refused() -> Result<()> {
    let decoder = Decoder::random(config(true), 3, Precision::Bf16, &[])?;
    let values = decoder.params().values("model.layers.0.mlp.up_proj.weight")?;
    let error = values.f32().err().context("an error")?.to_string();
    assert!(error.contains("up_proj.weight: expected f32, got bf16"), "{error}");
    Ok(())
}

#[test]
fn values_that_do_not_fit_their_shape_are_refused() {
    let mut params = ParamStore::new();
    let error = params.insert_values("w", Group::Base, vec![0f32; 5], &[2, 3]).err().unwrap().to_string();
    assert!(error.contains("expected [2, 3] values, got 5"), "{error}");
}

#[test]
fn steps_change_what_learns_and_nothing_else_in_each_class() -> Result<()> {
    for precision in Precision::ALL {
        let decoder = adapted(precision, false, 0.0)?;
        let hash = |group| decoder.params().group_hash(group);
        let before = (hash(Group::Base)?, hash(Group::Lora)?, hash(Group::Embeddings)?, hash(Group::Norms)?);
        let (_, gradients) = gradients_of(&decoder, true, None)?;
        Optimizer::new(AdamWConfig::default()).step(decoder.params(), &gradients, 1e-2)?;
        assert_eq!(hash(Group::Base)?, before.0, "{precision}");
        assert_ne!(hash(Group::Lora)?, before.1, "{precision}");
        assert_ne!(hash(Group::Embeddings)?, before.2, "{precision}");
        assert_ne!(hash(Group::Norms)?, before.3, "{precision}");
    }
    Ok(())
}

#[test]
fn a_loss_that_is_not_finite_leaves_no_gradient_behind_in_each_class() -> Result<()> {
    for precision in Precision::ALL {
        let mut decoder = adapted(precision, true, 0.0)?;
        let gain = Tensor::full(f32::NAN, 48, &Device::Cpu)?;
        decoder.params_mut().set("model.norm.weight", &gain)?;
        let (tokens, rope, rows) = (tokens(), rope(&decoder)?, Rows::default());
        let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
        let mut gradients = Gradients::new();
        let targets = targets(&tokens);
        let loss = decoder.accumulate_gradients(&tokens, BATCH, &targets, &with, 1.0, true, &mut gradients);
        assert!(loss.err().context("an error")?.to_string().contains("loss: expected a finite number"));
        assert_eq!(gradients.norm().unwrap(), 0.0, "{precision}");
    }
    Ok(())
}

#[test]
fn weights_are_read_in_bf16_as_rounded_f32() -> Result<()> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/llama");
    for folder in ["tied_f32", "untied_bf16_sharded", "tied_f16_linear_old_keys"] {
        let dir = fixtures.join(folder);
        let config = DecoderConfig::from_dir(&dir)?;
        let weights = Weights::open(&dir)?;
        let decoder = Decoder::from_weights(config.clone(), &weights, Precision::Bf16, &[])?;
        for (name, shape) in config.tensors() {
            let exact: Vec<f32> = weights.values(&name, &shape)?;
            let rounded: Vec<f32> = exact.iter().map(|v| bf16::put(*v).get()).collect();
            let norm = config.group_of(&name) == Group::Norms;
            assert_eq!(
                decoder.params().values(&name)?.to_f32(),
                if norm { exact } else { rounded },
                "{name}"
            );
            assert_eq!(stored_in_bf16(decoder.params(), &name), !norm, "{name}");
        }
    }
    Ok(())
}

#[test]
fn passes_hold_as_many_bytes_as_planned() -> Result<()> {
    for precision in Precision::ALL {
        for recompute in [true, false] {
            let decoder = adapted(precision, true, 0.0)?;
            let c = decoder.config();
            let pass = PassShape { entries: BATCH * LENGTH, precision, lora: decoder.lora_modules() };
            let (_, gradients) = gradients_of(&decoder, recompute, None)?;
            let walked = c.num_hidden_layers - decoder.lowest_learning_block();
            let planned = training_bytes(c, pass, walked, recompute);
            assert_eq!(gradients.passes().bytes(), planned.activations + planned.workspace, "{precision}");

            let (tokens, rope, rows) = (tokens(), rope(&decoder)?, Rows::default());
            let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
            let mut buffers = Buffers::default();
            for _ in 0..2 {
                decoder.score(&tokens, BATCH, &targets(&tokens), &with, &mut buffers)?;
            }
            let planned = evaluation_bytes(c, pass);
            assert_eq!(buffers.bytes(), planned.activations + planned.workspace, "{precision}");
        }
    }
    Ok(())
}
