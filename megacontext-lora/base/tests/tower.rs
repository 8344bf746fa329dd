//! The tower against the original's own decoder, whose blocks it has, and the rules of what learns in it.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor, Var};
use megacontext_base::gradients::{AdamWConfig, Gradients, Optimizer};
use megacontext_base::params::{Group, ParamStore};
use megacontext_base::random::Random;
use megacontext_base::rope::{Rope, RopeScaling, RopeTables};
use megacontext_base::tower::{Angles, EPS, Sees, THETA, Tower, TowerConfig};
use megacontext_kernels::attention::{Pattern, Rows};

fn golden(name: &str) -> Result<HashMap<String, Tensor>> {
    let folder =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/megacontext");
    Ok(candle_core::safetensors::load(folder.join(name).with_extension("safetensors"), &Device::Cpu)?)
}

fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()?)
}

fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
    let mut random = Random::new(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.normal() as f32).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

fn tables(config: TowerConfig, entries: usize) -> Result<RopeTables> {
    Ok(Rope::new(config.head_width(), THETA, RopeScaling::None).sequence(entries)?)
}

fn angles(tables: &RopeTables) -> Angles<'_> {
    Angles { cos: &tables.cos_nd, sin: &tables.sin_nd }
}

const GROUPED: TowerConfig = TowerConfig { layers: 2, width: 16, heads: 4, kv_heads: 2 };

fn fresh(config: TowerConfig) -> Result<(Tower, ParamStore)> {
    let tower = Tower::new("tower", config)?;
    let mut params = ParamStore::new();
    tower.insert_parameters(&mut params, Group::Lensnet, 3)?;
    Ok((tower, params))
}

#[test]
fn it_is_the_stack_of_the_originals_decoder() -> Result<()> {
    for (name, kv_heads) in [("gpt_mha", 4), ("gpt_gqa", 2)] {
        let case = golden(name)?;
        let (tower, mut params) = fresh(TowerConfig { layers: 2, width: 32, heads: 4, kv_heads })?;
        for (parameter, _) in tower.config().tensors() {
            let theirs = parameter.replace("blocks.", "w.transformer.h.");
            params.set(&parameter, case.get(&theirs).with_context(|| theirs.clone())?)?;
        }
        let norm = |x: &Tensor| -> Result<Tensor> {
            Ok(x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?)?)
        };
        let tokens = case["in.tokens"].to_dtype(DType::U32)?;
        let (batch, entries) = tokens.dims2()?;
        let embedded = case["w.transformer.wte.weight"].index_select(&tokens.flatten_all()?, 0)?;
        let x_bte = norm(&embedded.reshape((batch, entries, 32))?)?;
        let tables = tables(*tower.config(), entries)?;
        let rows = Rows::default();
        let last = tower.forward(&params, &x_bte, angles(&tables), Sees::Pattern(Pattern::Dense, &rows))?;
        let logits = norm(&last)?.broadcast_matmul(&case["w.lm_head.weight"].t()?)?;
        let logits = ((logits / 15.0)?.tanh()? * 15.0)?;
        let off = difference(&logits, &case["fp32.logits"])?;
        println!("{name}: logits within {off:e}");
        assert!(off < 2e-4, "{name}: logits differ by {off}");
    }
    Ok(())
}

#[test]
fn biases_of_scores_are_what_patterns_are() -> Result<()> {
    let (tower, mut params) = fresh(GROUPED)?;
    params.set_learning([Group::Lensnet])?;
    let entries = 7;
    let x = Var::from_tensor(&random(&[2, entries, 16], 1)?)?.into_inner();
    let probe = random(&[2, entries, 16], 2)?;
    let tables = tables(GROUPED, entries)?;
    for (pattern, causal) in [(Pattern::Bidirectional, false), (Pattern::Dense, true)] {
        let rows = Rows::default();
        let never =
            |at: usize| if causal && at % entries > at / entries % entries { f32::NEG_INFINITY } else { 0.0 };
        let bias: Vec<f32> = (0..2 * entries * entries).map(never).collect();
        let bias = Tensor::from_vec(bias, (2, entries, entries), &Device::Cpu)?;
        let mut found = Vec::new();
        for sees in [Sees::Pattern(pattern, &rows), Sees::Bias(&bias)] {
            let out = tower.forward(&params, &x, angles(&tables), sees)?;
            let grads = (&out * &probe)?.sum_all()?.backward()?;
            let mut of = vec![out, grads.get(&x).context("x")?.clone()];
            for (name, leaf) in params.trainable().unwrap() {
                of.push(grads.get(&leaf).with_context(|| format!("no gradient of {name}"))?.clone());
            }
            found.push(of);
        }
        for (of_pattern, of_bias) in found[0].iter().zip(&found[1]) {
            let off = difference(of_pattern, of_bias)?;
            assert!(off < 2e-5, "{pattern:?}: {off} apart");
        }
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    let (tower, mut params) = fresh(GROUPED)?;
    params.set_learning([Group::Lensnet])?;
    // Rows of other lengths, each entry at an angle of its own.
    let rows = Rows { lengths: Some(vec![5, 6]), segments: None };
    let places: Vec<f64> = (0..12).map(|at| (at * at % 17) as f64).collect();
    let tables = Rope::new(4, THETA, RopeScaling::None).at(&places, None)?;
    let sees = Sees::Pattern(Pattern::Bidirectional, &rows);
    let (x, probe) = (random(&[2, 6, 16], 1)?, random(&[2, 6, 16], 2)?);
    let loss = |params: &ParamStore| -> Result<Tensor> {
        Ok((tower.forward(params, &x, angles(&tables), sees)? * &probe)?.sum_all()?)
    };
    let mut gradients = Gradients::new();
    gradients.add_backward(&loss(&params)?, &params)?;
    for (name, _) in tower.config().tensors() {
        let value = params.get(&name).context("value")?.copy()?;
        let gradient =
            Tensor::from_slice(gradients.get(&name).context("gradient")?, value.shape(), &Device::Cpu)?;
        let length = gradient.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt();
        let mut side = |step: f64| -> Result<f32> {
            params.set(&name, &(&value + (&gradient * (step / f64::from(length)))?)?)?;
            Ok(loss(&params)?.to_scalar::<f32>()?)
        };
        let measured = (side(1e-2)? - side(-1e-2)?) / 2e-2;
        params.set(&name, &value)?;
        assert!((measured - length).abs() < 0.01 * length, "{name}: {length}, differences give {measured}");
    }
    Ok(())
}

#[test]
fn a_gradient_that_gets_lost_is_told() -> Result<()> {
    let (tower, mut params) = fresh(GROUPED)?;
    params.insert("unused", Group::Lensnet, random(&[2], 1)?)?;
    params.set_learning([Group::Lensnet])?;
    let tables = tables(GROUPED, 4)?;
    let rows = Rows::default();
    let sees = Sees::Pattern(Pattern::Bidirectional, &rows);
    let loss = tower.forward(&params, &random(&[1, 4, 16], 1)?, angles(&tables), sees)?;
    let mut gradients = Gradients::new();
    let error = gradients.add_backward(&loss.sum_all()?, &params).unwrap_err().to_string();
    assert!(error.contains("parameter unused: expected a gradient, since it learns, got none"), "{error}");
    assert_eq!(gradients.names().count(), 0);
    let error = gradients.add_backward(&loss, &params).unwrap_err().to_string();
    assert!(error.contains("loss: expected a scalar, got [1, 4, 16]"), "{error}");
    Ok(())
}

#[test]
fn weights_of_networks_decay_and_what_embeds_does_not() -> Result<()> {
    let mut params = ParamStore::new();
    for (name, group, shape) in [
        ("blocks.0.attn.c_q.weight", Group::Gistnet, &[2, 2][..]),
        ("head.proj.bias", Group::Gistnet, &[2]),
        ("cls_token", Group::Gistnet, &[1, 1, 2]),
        ("scorer.weight", Group::Lensnet, &[1, 2]),
        ("level_embed.weight", Group::Lensnet, &[4, 2]),
    ] {
        params.insert(name, group, Tensor::ones(shape, DType::F32, &Device::Cpu)?)?;
    }
    params.set_learning([Group::Gistnet, Group::Lensnet])?;
    let mut gradients = Gradients::new();
    for (name, leaf) in params.trainable().unwrap() {
        gradients.buffer(&name, leaf.elem_count());
    }
    let config = AdamWConfig { weight_decay: 0.5, ..AdamWConfig::default() };
    Optimizer::new(config).step(&params, &gradients, 0.1)?;
    for (name, leaf) in params.trainable().unwrap() {
        let decays = ["blocks.0.attn.c_q.weight", "scorer.weight"].contains(&name.as_str());
        let value = leaf.flatten_all()?.get(0)?.to_scalar::<f32>()?;
        assert!((value - if decays { 0.95 } else { 1.0 }).abs() < 1e-6, "{name}: {value}");
    }
    Ok(())
}

#[test]
fn a_frozen_tower_tapes_nothing() -> Result<()> {
    let (tower, params) = fresh(GROUPED)?;
    let tables = tables(GROUPED, 4)?;
    let rows = Rows::default();
    let sees = Sees::Pattern(Pattern::Bidirectional, &rows);
    assert!(!tower.forward(&params, &random(&[1, 4, 16], 1)?, angles(&tables), sees)?.track_op());
    Ok(())
}

#[test]
fn kv_heads_that_do_not_divide_the_heads_are_refused() {
    let error = Tower::new("lensnet", TowerConfig { kv_heads: 3, ..GROUPED }).err().unwrap().to_string();
    assert_eq!(error, "lensnet: kv_heads: expected a divisor of the 4 heads, got 3");
}
