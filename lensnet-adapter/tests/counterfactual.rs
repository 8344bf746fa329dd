//! Labels and loss of measured edits, against plain f64 code and its differences.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor, Var};
use lensnet_adapter::counterfactual::{CounterfactualConfig, Measured, Scale, targets, terms, unit};

const LOD: [u8; 6] = [2, 1, 1, 0, 0, 2];
const Y: [Option<f64>; 6] = [Some(0.4), Some(-0.05), Some(0.35), None, Some(-0.08), Some(0.0)];
const U: [f64; 6] = [0.3, -0.2, 0.15, 0.25, -0.6, -0.35];
const K: usize = 4;
/// As in the documents: a score is a nat.
const SCALE: Scale = Scale { unit: 1.0, margin: 0.1, signed: false };

fn both(expanded: Option<f64>, collapsed: Option<f64>) -> Measured {
    Measured { expanded, collapsed }
}

/// The loss by its definition.
fn plain(u: &[f64], config: &CounterfactualConfig) -> f64 {
    let known: Vec<(f64, f64)> = u.iter().zip(Y).filter_map(|(u, y)| Some((*u, y?))).collect();
    let regression = known.iter().map(|(u, y)| (u - y).powi(2)).sum::<f64>() / known.len() as f64;
    let mut gaps = Vec::new();
    for (u, y) in &known {
        gaps.extend(
            known.iter().filter(|(_, low)| *y > low + 0.1).map(|(lower, _)| (1.0 + (lower - u).exp()).ln()),
        );
    }
    let rank = gaps.iter().sum::<f64>() / gaps.len() as f64;
    let sum = |sign: f64, of: &dyn Fn(u8) -> bool| {
        u.iter().zip(LOD).filter(|(_, lod)| of(*lod)).map(|(u, _)| (sign * u).max(0.0)).sum::<f64>()
    };
    let (added, freed) = (3.0 * sum(1.0, &|lod| lod > 0), 0.75 * sum(-1.0, &|lod| lod < 2));
    let budget = ((added - freed) / (added + freed + 1e-6)).powi(2);
    let illegal = sum(1.0, &|lod| lod == 0) + sum(-1.0, &|lod| lod == 2);
    regression + config.rank_weight * rank + config.budget_weight * budget + config.illegal_weight * illegal
}

fn scores(values: &[f64]) -> Result<Tensor> {
    let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
    let count = values.len();
    Ok(Var::from_vec(values, count, &Device::Cpu)?.into_inner())
}

#[test]
fn the_loss_equals_its_definition_and_its_gradient_the_differences() -> Result<()> {
    let config = CounterfactualConfig::default();
    let u = scores(&U)?;
    let loss = terms(&u, &Y, &LOD, K, 2, &config)?.loss(&config)?;
    let (got, want) = (f64::from(loss.to_scalar::<f32>()?), plain(&U, &config));
    assert!((got - want).abs() < 1e-6, "{got}, plain {want}");
    let gradient: Vec<f32> = loss.backward()?.get(&u).context("scores")?.to_vec1()?;
    for at in 0..U.len() {
        let side = |step: f64| {
            let mut moved = U;
            moved[at] += step;
            plain(&moved, &config)
        };
        let measured = (side(1e-6) - side(-1e-6)) / 2e-6;
        assert!(
            (f64::from(gradient[at]) - measured).abs() < 1e-5,
            "[{at}]: {}, plain {measured}",
            gradient[at]
        );
    }
    Ok(())
}

#[test]
fn what_saves_more_scores_higher_and_what_costs_less_is_collapsed_first() -> Result<()> {
    let measured = [
        both(Some(1.5), None),
        both(Some(1.9), None),
        both(Some(2.1), None),
        both(None, Some(2.0)),
        both(None, Some(2.05)),
        both(None, Some(2.3)),
        both(None, None),
    ];
    let found = targets(2.0, &measured, SCALE)?;
    let wanted = [Some(0.5), Some(0.1), Some(0.0), Some(-0.1), Some(-0.05), Some(0.0), None];
    for (found, wanted) in found.iter().zip(wanted) {
        assert_eq!(found.is_some(), wanted.is_some());
        assert!(
            (found.unwrap_or(0.0) - wanted.unwrap_or(0.0)).abs() < 1e-12,
            "{found:?}, expected {wanted:?}"
        );
    }
    Ok(())
}

#[test]
fn an_entry_that_can_do_both_keeps_the_larger() -> Result<()> {
    let measured = [both(Some(1.5), Some(2.0)), both(Some(1.99), Some(1.9)), both(Some(2.5), Some(2.5))];
    let found: Vec<f64> = targets(2.0, &measured, SCALE)?.into_iter().map(|y| y.unwrap()).collect();
    assert!((found[0] - 0.5).abs() < 1e-12 && (found[1] + 0.2).abs() < 1e-12 && found[2] == 0.0, "{found:?}");
    Ok(())
}

#[test]
fn targets_lie_where_scores_do() -> Result<()> {
    let found = targets(9.0, &[both(Some(1.0), None), both(None, Some(1.0))], SCALE)?;
    assert_eq!(found, [Some(1.0), Some(-1.0)]);
    Ok(())
}

#[test]
fn fewer_pairs_are_spread_over_all() -> Result<()> {
    let config = CounterfactualConfig { max_rank_pairs: 2, ..CounterfactualConfig::default() };
    let u = scores(&U)?;
    let some = terms(&u, &Y, &LOD, K, 2, &config)?.rank.to_scalar::<f32>()?;
    let all = terms(&u, &Y, &LOD, K, 2, &CounterfactualConfig::default())?.rank.to_scalar::<f32>()?;
    assert!(some > 0.0 && some != all);
    let none = CounterfactualConfig { max_rank_pairs: 0, ..config };
    assert_eq!(terms(&u, &Y, &LOD, K, 2, &none)?.rank.to_scalar::<f32>()?, 0.0);
    Ok(())
}

#[test]
fn without_targets_only_what_is_possible_counts() -> Result<()> {
    let u = scores(&U)?;
    let found = terms(&u, &[None; 6], &LOD, K, 2, &CounterfactualConfig::default())?;
    assert_eq!(found.regression.to_scalar::<f32>()? + found.rank.to_scalar::<f32>()?, 0.0);
    assert!((found.illegal.to_scalar::<f32>()? - 0.6).abs() < 1e-6);
    Ok(())
}

#[test]
fn a_measurement_that_is_no_number_is_refused() {
    let error = targets(2.0, &[both(None, Some(f64::NAN))], SCALE).unwrap_err().to_string();
    assert!(error.contains("NLL after collapsing entry 0: expected a finite number, got NaN"), "{error}");
    let error = targets(f64::INFINITY, &[], SCALE).unwrap_err().to_string();
    assert!(error.contains("NLL of the working context: expected a finite number, got inf"), "{error}");
}

#[test]
fn targets_of_fewer_entries_are_refused() -> Result<()> {
    let u = scores(&U)?;
    let error = terms(&u, &Y[..5], &LOD, K, 2, &CounterfactualConfig::default()).err().unwrap().to_string();
    assert!(error.contains("expected 6 scores and targets, one for every level, got [6] and 5"), "{error}");
    Ok(())
}

#[test]
fn a_unit_is_the_median_of_what_the_best_expands_save() {
    let contexts = [
        (2.0, vec![both(Some(1.9), None), both(Some(1.5), None), both(None, Some(0.1))]),
        (1.0, vec![both(Some(0.9), None), both(Some(f64::NAN), None)]),
        (1.0, vec![both(Some(0.8), Some(3.0))]),
        // Nothing to be saved: says nothing.
        (1.0, vec![both(Some(1.2), None)]),
    ];
    let of = |count: usize| unit(contexts[..count].iter().map(|(now, measured)| (*now, &measured[..])));
    assert!((of(4) - 0.2).abs() < 1e-12, "{}", of(4));
    assert_eq!([of(0), unit([(1.0, &contexts[3].1[..])].into_iter())], [1.0, 1.0]);
}

#[test]
fn signed_targets_keep_what_a_wrong_edit_costs() -> Result<()> {
    let measured =
        [both(Some(1.3), None), both(None, Some(1.3)), both(Some(1.3), Some(1.3)), both(Some(9.0), None)];
    let of = |signed| targets(1.0, &measured, Scale { unit: 1.0, margin: 0.1, signed });
    // Both edits lose 0.3. What an entry that can do both wants stays one sign for each edit.
    let want = [[0.0, 0.0, 0.0, 0.0], [-0.3, 0.2, 0.0, -1.0]];
    for (signed, want) in [false, true].into_iter().zip(want) {
        let found: Vec<f64> = of(signed)?.into_iter().flatten().collect();
        assert!(found.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-9), "{signed}: {found:?}");
    }
    Ok(())
}

#[test]
fn the_unit_stretches_targets() -> Result<()> {
    let scale = Scale { unit: 0.2, margin: 0.1, signed: false };
    let found = targets(1.0, &[both(Some(0.9), None), both(None, Some(1.04)), both(Some(0.5), None)], scale)?;
    let found: Vec<f64> = found.into_iter().flatten().collect();
    assert!(found.iter().zip([0.5, -0.3, 1.0]).all(|(got, want)| (got - want).abs() < 1e-9), "{found:?}");
    Ok(())
}
