//! Terms on gists against plain f64 code, value and gradient.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use anyhow::{Context, Result};
use candle_core::{Tensor, Var};
use common::random;
use gistnet_adapter::losses::{contrastive, pooling, stability};

const N: usize = 5;
const E: usize = 6;
const PAIRS: [[usize; 2]; 4] = [[0, 1], [1, 2], [3, 4], [2, 0]];

fn wide(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
}

/// Holds a term against `plain`, and its gradient against central differences of `plain` in f64.
fn holds(
    what: &str,
    gists: &Tensor,
    term: impl Fn(&Tensor) -> Result<Tensor>,
    plain: impl Fn(&[f64]) -> f64,
) -> Result<()> {
    let leaf = Var::from_tensor(gists)?.into_inner();
    let loss = term(&leaf)?;
    let values = wide(gists)?;
    let (got, want) = (f64::from(loss.to_scalar::<f32>()?), plain(&values));
    assert!((got - want).abs() < 1e-6 * want.abs().max(1.0), "{what}: {got}, plain {want}");
    let gradient = wide(loss.backward()?.get(&leaf).context("no gradient")?)?;
    for at in 0..values.len() {
        let side = |step: f64| {
            let mut moved = values.clone();
            moved[at] += step;
            plain(&moved)
        };
        let measured = (side(1e-5) - side(-1e-5)) / 2e-5;
        assert!((gradient[at] - measured).abs() < 1e-5, "{what}[{at}]: {}, plain {measured}", gradient[at]);
    }
    Ok(())
}

fn row(values: &[f64], n: usize) -> &[f64] {
    &values[n * E..(n + 1) * E]
}

fn cosine(values: &[f64], [a, b]: [usize; 2]) -> f64 {
    let dot = |a: usize, b: usize| row(values, a).iter().zip(row(values, b)).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn the_hinge_equals_its_definition() -> Result<()> {
    let gists = random(&[N, E], 1);
    for margin in [0.2, 0.9, 1.9] {
        let plain = |values: &[f64]| {
            let of = |pair: &[usize; 2]| (margin - (1.0 - cosine(values, *pair))).max(0.0);
            PAIRS.iter().map(of).sum::<f64>() / PAIRS.len() as f64
        };
        holds("hinge", &gists, |gists| Ok(contrastive(gists, &PAIRS, margin)?), plain)?;
    }
    Ok(())
}

#[test]
fn walking_down_the_hinge_moves_neighbours_apart() -> Result<()> {
    let gists = Var::from_tensor(&random(&[2, E], 1))?.into_inner();
    let loss = contrastive(&gists, &[[0, 1]], 2.0)?;
    let grads = loss.backward()?;
    let moved = (&gists - (grads.get(&gists).context("gists")? * 0.1)?)?;
    assert!(cosine(&wide(&moved)?, [0, 1]) < cosine(&wide(&gists)?, [0, 1]) - 1e-3);
    Ok(())
}

#[test]
fn gists_of_zeros_have_a_gradient_that_is_a_number() -> Result<()> {
    let gists = Var::from_tensor(&random(&[2, E], 1).zeros_like()?)?.into_inner();
    let loss = contrastive(&gists, &[[0, 1]], 1.5)?;
    assert!((loss.to_scalar::<f32>()? - 0.5).abs() < 1e-6);
    assert!(wide(loss.backward()?.get(&gists).context("gists")?)?.iter().all(|v| v.is_finite()));
    Ok(())
}

#[test]
fn without_neighbours_there_is_nothing_to_push() -> Result<()> {
    assert_eq!(contrastive(&random(&[2, E], 1), &[], 0.2)?.to_scalar::<f32>()?, 0.0);
    Ok(())
}

#[test]
fn stability_equals_its_definition() -> Result<()> {
    let (gists, before) = (random(&[N, E], 1), random(&[N, E], 2));
    let fixed = wide(&before)?;
    let plain =
        |values: &[f64]| values.iter().zip(&fixed).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / N as f64;
    holds("stability", &gists, |gists| Ok(stability(gists, &before)?), plain)
}

#[test]
fn pooling_equals_its_definition() -> Result<()> {
    let (gists, children) = (random(&[N, E], 1), random(&[N, 3, E], 2));
    let fixed = wide(&children)?;
    let plain = |values: &[f64]| {
        let mean = |at: usize| (0..3).map(|k| fixed[(at / E * 3 + k) * E + at % E]).sum::<f64>() / 3.0;
        let squares = values.iter().enumerate().map(|(at, v)| (v - mean(at)).powi(2));
        squares.sum::<f64>() / values.len() as f64
    };
    holds("pooling", &gists, |gists| Ok(pooling(gists, &children)?), plain)
}

#[test]
fn blocks_of_other_gists_are_refused() {
    let error = pooling(&random(&[N, E], 1), &random(&[N + 1, 3, E], 2)).unwrap_err().to_string();
    assert!(error.contains("pooling: expected blocks of gists [5, 6], got [6, 3, 6]"), "{error}");
}
