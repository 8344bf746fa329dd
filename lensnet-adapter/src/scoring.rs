//! Scores that nobody walks back from, on plain buffers: what [`crate::LensNet::focus_scores`] runs.
//!
//! What [`crate::LensNet::forward`] computes, without a tensor for every step. An entry's level decides what level and span
//! add to its features, so that sum is made once for each level. Everything behind the tower goes over some rows at a time.
//!
//! Shapes: n = B·W entries, row-major; x and features [n, E]; z [n, M], M the width between the layers of the head. Errors:
//! those of the forward pass.

use megacontext_base::error::{BaseError, Result};
use megacontext_base::params::{Held, ParamStore};
use megacontext_base::tower::{Affine, Angles, ROWS, Tower, product_into};
use megacontext_kernels::attention::Rows;
use megacontext_kernels::cpu::Values;
use megacontext_kernels::gemm::{Mat, matmul};
use megacontext_kernels::linear::Weight;
use megacontext_kernels::mlp::silu_in_place;
use megacontext_kernels::rows;

use crate::config::{LEVEL_EMBED, LEVELS, LensNetConfig, NETWORK};
use crate::features;
use crate::network::Contexts;

/// The scores of operands that have been checked; what is past a row's length is 0.
pub(crate) fn scores(
    config: &LensNetConfig,
    params: &ParamStore,
    tower: &Tower,
    of: &Contexts,
    lengths: &[usize],
    angles: Angles,
) -> Result<Vec<f32>> {
    let rows = Rows { lengths: of.lengths.map(<[usize]>::to_vec), segments: None };
    let entries = of.entries_bwe.contiguous()?;
    let mut x = Values::of(&entries)?.to_vec();
    tower.forward_in_place(params, &mut x, lengths.len(), angles, config.pattern(), &rows)?;
    let mut scores = behind(config, params, of, lengths, &x)?;
    for (row, length) in scores.chunks_mut(of.lod.len() / lengths.len()).zip(lengths) {
        row[*length..].fill(0.0);
    }
    Ok(scores)
}

/// tanh(scorer([x, features])) of the stream behind the tower.
fn behind(
    config: &LensNetConfig,
    params: &ParamStore,
    of: &Contexts,
    lengths: &[usize],
    x: &[f32],
) -> Result<Vec<f32>> {
    let e = config.width;
    let [_, [first, second]] = config.feature_layers();
    let of_level = of_level(config, params)?;
    let [_, distance] = features::measured(config, of, lengths);
    let scorer = config.scorer();
    let last = scorer[scorer.len() - 1];
    let (weight, bias) = (values(params, last, "weight")?, values(params, last, "bias")?);
    let (weight, bias) = (f32s(&weight)?, f32s(&bias)?);
    let middle = scorer[0].out;
    let (mut hidden, mut f) =
        (vec![0f32; ROWS.min(of.lod.len()) * e], vec![0f32; ROWS.min(of.lod.len()) * e]);
    let mut z = vec![0f32; ROWS.min(of.lod.len()) * middle];
    let mut scores = Vec::with_capacity(of.lod.len());
    for ((x, lod), distance) in x.chunks(ROWS * e).zip(of.lod.chunks(ROWS)).zip(distance.chunks(ROWS)) {
        let (hidden, f) = (&mut hidden[..x.len()], &mut f[..x.len()]);
        affine(params, first, distance, hidden)?;
        silu_in_place(hidden);
        for (f, lod) in f.chunks_exact_mut(e).zip(lod) {
            f.copy_from_slice(&of_level[usize::from(*lod) * e..][..e]);
        }
        product_into(params, &name(second, "weight"), [second.out, second.inp], hidden, f, true)?;
        // The first layer over [x, f] is the sum of two, each over its half of the weight's columns.
        let held = values(params, scorer[0], "weight")?;
        let of_both = f32s(&held)?;
        let z = &mut z[..lod.len() * middle];
        rows::fill(values(params, scorer[0], "bias")?.weight(), z);
        for (half, part) in [x, &*f].into_iter().enumerate() {
            let columns = Mat::strided(&of_both[half * e..], [middle, e], [2 * e, 1]);
            matmul(z, Mat::new(part, lod.len(), e), columns.t(), 1.0, true);
        }
        match scorer.len() {
            1 => scores.extend(z.iter().map(|z| z.tanh())),
            _ => scores.extend(z.chunks_exact(middle).map(|z| (dot_relu(z, weight) + bias[0]).tanh())),
        }
    }
    Ok(scores)
}

/// What level and span add to the features, with the bias of what distance adds, [LEVELS, E].
fn of_level(config: &LensNetConfig, params: &ParamStore) -> Result<Vec<f32>> {
    let e = config.width;
    let [[first, second], [_, distance]] = config.feature_layers();
    let spans: Vec<f32> = (0..LEVELS as u8).map(|lod| features::measured_span(config, lod)).collect();
    let mut hidden = vec![0f32; LEVELS * e];
    affine(params, first, &spans, &mut hidden)?;
    silu_in_place(&mut hidden);
    let mut sum = vec![0f32; LEVELS * e];
    affine(params, second, &hidden, &mut sum)?;
    let levels = params.values(LEVEL_EMBED)?;
    rows::add_assign(f32s(&levels)?, &mut sum);
    rows::add_bias(values(params, distance, "bias")?.weight(), &mut sum);
    Ok(sum)
}

/// `y` = x·Wᵀ + b.
fn affine(params: &ParamStore, layer: Affine, x: &[f32], y: &mut [f32]) -> Result<()> {
    rows::fill(values(params, layer, "bias")?.weight(), y);
    product_into(params, &name(layer, "weight"), [layer.out, layer.inp], x, y, true)
}

fn name(layer: Affine, of: &str) -> String {
    format!("{}.{of}", layer.name)
}

fn values<'a>(params: &'a ParamStore, layer: Affine, of: &str) -> Result<Held<'a>> {
    params.values(&name(layer, of))
}

fn f32s<'a>(held: &'a Held) -> Result<&'a [f32]> {
    match held.weight() {
        Weight::F32(values) => Ok(values),
        Weight::Bf16(_) => Err(BaseError::network(NETWORK, "expected weights in f32, got bf16".to_string())),
    }
}

/// Σ max(z, 0)·w, in eight lanes; NaN stays NaN.
fn dot_relu(z: &[f32], w: &[f32]) -> f32 {
    let mut sums = [0f32; 8];
    for (z, w) in z.chunks(8).zip(w.chunks(8)) {
        for ((sum, z), w) in sums.iter_mut().zip(z).zip(w) {
            let z = if *z < 0.0 { 0.0 } else { *z };
            *sum += z * w;
        }
    }
    sums.iter().sum()
}
