//! The preference loss against the original's own numbers.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use anyhow::{Context, Result};
use candle_core::{Tensor, Var};
use common::{close, folder, golden, random, size};
use lensnet_adapter::preference::{Pair, PreferenceConfig, Variant, divergence, loss, pairs, targets};
use serde_json::Value;

const CASES: [&str; 7] =
    ["default", "collapse2_temp05_margin03", "maxpairs3", "hardneg05", "smooth", "kl", "big_delta"];

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

fn settings(case: &Value) -> PreferenceConfig {
    let of = |key: &str| case["config"][key].as_f64().unwrap();
    PreferenceConfig {
        max_pairs: of("max_lens_pairs") as usize,
        hard_negative_ratio: of("lens_hard_negative_ratio"),
        temperature: of("lens_temperature"),
        collapse_weight: of("lens_collapse_weight"),
        rank_weight: of("lens_rank_weight"),
        margin: of("lens_margin"),
        budget_weight: of("lens_budget_weight"),
        smooth_weight: of("lens_budget_smooth_weight"),
        smooth_beta: of("lens_budget_smooth_beta"),
        kl_weight: of("lens_kl_weight"),
    }
}

struct History {
    lod: Vec<Vec<u8>>,
    start: Vec<Vec<u64>>,
}

impl History {
    fn of(case: &Value) -> Self {
        let lists = |key: &str| case[key].as_array().unwrap().iter().map(numbers).collect::<Vec<_>>();
        Self {
            lod: lists("lods").iter().map(|list| list.iter().map(|v| *v as u8).collect()).collect(),
            start: lists("positions").iter().map(|list| list.iter().map(|v| *v as u64).collect()).collect(),
        }
    }

    fn variants(&self) -> Vec<Variant<'_>> {
        self.lod.iter().zip(&self.start).map(|(lod, start)| Variant { lod, start }).collect()
    }
}

fn holds(name: &str, case: &Value) -> Result<()> {
    let tensors = golden("pref_loss")?;
    let config = settings(case);
    let history = History::of(case);
    let variants = history.variants();
    let pairs = pairs(&numbers(&case["losses"]), &config);
    let near = |got: f64, want: &Value, what: &str| {
        let want = want.as_f64().unwrap();
        assert!((got - want).abs() < 2e-6 * want.abs().max(1.0), "{name}: {what} {got}, expected {want}");
    };
    let wanted = case["pairs_unshuffled"].as_array().unwrap();
    assert_eq!(pairs.len(), wanted.len(), "{name}");
    for (pair, want) in pairs.iter().zip(wanted) {
        assert_eq!([pair.better, pair.worse], [0, 1].map(|side| want[side].as_u64().unwrap() as usize));
        near(pair.delta, &want[2], "difference");
    }
    for (pair, want) in pairs.iter().zip(case["per_pair"].as_array().unwrap()) {
        let found = targets(variants[pair.better], variants[pair.worse], pair.delta, 4, 2);
        let masks = numbers(&want["mask"]);
        assert_eq!(found.len(), masks.len());
        for ((target, want), mask) in found.iter().zip(want["targets"].as_array().unwrap()).zip(masks) {
            assert_eq!(*target != 0.0, mask != 0.0, "{name}: {pair:?}");
            near(*target, want, "target");
        }
    }

    let leaves: Vec<Tensor> = (0..variants.len())
        .map(|i| {
            let scores = tensors.get(&format!("in.{name}.scores{i}"))?.squeeze(0)?;
            Ok(Var::from_tensor(&scores)?.into_inner())
        })
        .collect::<Result<_>>()?;
    let found = loss(&leaves, &variants, &pairs, None, 4, 2, &config)?;
    let components = &case["components"];
    for (at, (_, terms)) in found.pairs.iter().enumerate() {
        near(terms.preference, &components["pref"][at], "preference");
        near(terms.rank, &components["rank_unweighted"][at], "rank");
        near(terms.budget, &components["budget_unweighted"][at], "budget");
        near(terms.smooth, &components["budget_smooth_unweighted"][at], "smoothing");
        near(terms.alignment, &components["signed_alignment"][at], "alignment");
    }
    assert_eq!(found.pairs.len(), components["pref"].as_array().unwrap().len());
    near(f64::from(found.loss.to_scalar::<f32>()?), &case["loss"], "loss");
    near(found.agreement().context("pairs")?, &case["agreement"], "agreement");

    let grads = found.loss.backward()?;
    for (i, leaf) in leaves.iter().enumerate() {
        let want = tensors.get(&format!("fp32.{name}.grad.scores{i}"))?.squeeze(0)?;
        let zeros = leaf.zeros_like()?;
        let off = close(grads.get(leaf).unwrap_or(&zeros), &want)? / size(&want)?.max(1e-3);
        assert!(off < 1e-4, "{name}: gradient of the scores of variant {i} differs by {off}");
    }
    Ok(())
}

#[test]
fn pairs_targets_loss_and_gradients_of_every_case() -> Result<()> {
    let cases: Value = serde_json::from_slice(&std::fs::read(folder().join("pref_loss.json"))?)?;
    for name in CASES {
        holds(name, &cases[name])?;
    }
    Ok(())
}

#[test]
fn the_divergence_from_the_policy_before() -> Result<()> {
    let tensors = golden("pref_loss")?;
    let u = tensors.leaf("in.kl_explicit.cur")?;
    let found = divergence(&u, tensors.get("in.kl_explicit.prev")?, 0.7)?;
    let want = tensors.get("fp32.kl_explicit.loss")?.squeeze(0)?;
    assert!(close(&found, &want)? < 1e-6, "{found} {want}");
    let want = tensors.get("fp32.kl_explicit.grad")?;
    let grads = found.backward()?;
    assert!(close(grads.get(&u).context("scores")?, want)? < 1e-4 * size(want)?);
    Ok(())
}

fn two() -> History {
    History { lod: vec![vec![1, 0], vec![0; 5]], start: vec![vec![0, 4], vec![0, 1, 2, 3, 4]] }
}

const PAIR: Pair = Pair { better: 0, worse: 1, delta: 0.5 };

#[test]
fn the_policy_before_is_really_kept() -> Result<()> {
    let history = two();
    let config = PreferenceConfig { kl_weight: 1.0, ..PreferenceConfig::default() };
    let scores = [random(&[2], 1), random(&[5], 2)];
    let of = |previous: Option<&[Tensor]>| -> Result<f32> {
        Ok(loss(&scores, &history.variants(), &[PAIR], previous, 4, 2, &config)?.loss.to_scalar()?)
    };
    assert_eq!(of(None)?, of(Some(&scores))?);
    let other = [random(&[2], 3), random(&[5], 4)];
    assert!(of(Some(&other))? > of(None)? + 1e-3);
    Ok(())
}

#[test]
fn variants_that_are_alike_say_nothing() -> Result<()> {
    let history = History { lod: vec![vec![0; 2]; 2], start: vec![vec![0, 1]; 2] };
    let scores = [random(&[2], 1), random(&[2], 2)];
    let config = PreferenceConfig::default();
    let found = loss(&scores, &history.variants(), &[PAIR], None, 4, 2, &config)?;
    assert!(found.pairs.is_empty() && found.agreement().is_none());
    assert_eq!(found.loss.to_scalar::<f32>()?, 0.0);
    assert!(pairs(&[], &config).is_empty() && pairs(&[1.0], &config).is_empty());
    Ok(())
}

fn refused(scores: &[Tensor], previous: Option<&[Tensor]>, pair: Pair, what: &str) {
    let history = two();
    let config = PreferenceConfig::default();
    let error =
        loss(scores, &history.variants(), &[pair], previous, 4, 2, &config).err().unwrap().to_string();
    assert!(error.contains(what), "expected {what:?} in {error:?}");
}

#[test]
fn scores_of_fewer_variants_are_refused() {
    refused(&[random(&[2], 1)], None, PAIR, "scores: expected those of 2 variants, got 1");
}

#[test]
fn scores_of_other_entries_are_refused() {
    let scores = [random(&[2], 1), random(&[4], 1)];
    refused(&scores, None, PAIR, "scores of variant 1: expected [5], got [4]");
}

#[test]
fn previous_scores_of_other_entries_are_refused() {
    let scores = [random(&[2], 1), random(&[5], 1)];
    refused(
        &scores,
        Some(&[random(&[3], 1), random(&[5], 1)]),
        PAIR,
        "previous scores of variant 0: expected [2]",
    );
}

#[test]
fn a_pair_of_a_variant_that_there_is_none_of_is_refused() {
    let scores = [random(&[2], 1), random(&[5], 1)];
    refused(&scores, None, Pair { worse: 2, ..PAIR }, "pairs: expected variants below 2");
}
