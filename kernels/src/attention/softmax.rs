//! The elementwise part of attention on a block of scores [keys, 32 queries]: masks, biases, the online softmax and its
//! backward.
//!
//! Queries lie across, one per lane, so that maxima and sums over keys need no step across lanes. Exponentials are
//! powers of two: scores are multiplied by scale·log2(e) on the way.
//!
//! Source: online softmax (Milakov and Gimelshein 2018; Dao 2023). ALiBi (Press et al. 2022): a head's scores are lowered
//! by slope·|distance|.

use crate::cpu::multiversion;
use crate::math::exp2;
use crate::micro::LANES;

/// One value per query of a panel.
pub(super) type PerLane = [f32; LANES];

/// What is added to the scores of a block.
pub(super) struct Bias<'a> {
    /// Position of each key.
    pub keys: &'a [f32],
    /// Position of each query.
    pub queries: &'a PerLane,
    /// Slope of each query's head, times log2(e).
    pub slopes: &'a PerLane,
}

/// Which keys of a block each query sees: lo ≤ key < hi, counted like `first`.
pub(super) struct Mask<'a> {
    pub first: i32,
    pub lo: &'a [i32; LANES],
    pub hi: &'a [i32; LANES],
}

/// Running state of a panel's softmax, in powers of two.
pub(super) struct Running {
    /// Largest score so far.
    pub top: PerLane,
    /// Σ 2^(score − top).
    pub total: PerLane,
}

impl Running {
    pub fn new() -> Self {
        Self { top: [f32::NEG_INFINITY; LANES], total: [0.0; LANES] }
    }
}

multiversion! {
    /// scores = scores·factor + bias, −inf where masked; only what a mask or a bias makes necessary.
    pub(super) fn finish_scores(scores: &mut [f32], ld: usize, factor: f32, bias: Option<&Bias<'_>>, mask: Option<&Mask<'_>>) {
        for (key, row) in scores.chunks_mut(ld).enumerate() {
            let row = &mut row[..LANES];
            for s in row.iter_mut() {
                *s *= factor;
            }
            if let Some(bias) = bias {
                let at = bias.keys[key];
                for i in 0..LANES {
                    row[i] -= bias.slopes[i] * (at - bias.queries[i]).abs();
                }
            }
            if let Some(mask) = mask {
                let at = mask.first + key as i32;
                for i in 0..LANES {
                    let seen = (mask.lo[i] <= at) & (at < mask.hi[i]);
                    row[i] = if seen { row[i] } else { f32::NEG_INFINITY };
                }
            }
        }
    }
}

/// How far, in powers of two, a score may lie above the running top before earlier sums are rescaled. Any value gives the
/// same result; a small one rescales at almost every tile, a large one would lose small probabilities to rounding.
const SLACK: f32 = 8.0;

multiversion! {
    /// Scores become 2^(factor·score − top); returns whether earlier sums have to be rescaled, and then `keep` is what earlier sums are
    /// to be multiplied by, per lane.
    pub(super) fn online(scores: &mut [f32], factor: f32, running: &mut Running, keep: &mut PerLane) -> bool {
        let mut top = [f32::NEG_INFINITY; LANES];
        for row in scores.chunks_exact(LANES) {
            for i in 0..LANES {
                // A comparison with NaN is false: NaN shows up in the sum instead.
                top[i] = if row[i] > top[i] { row[i] } else { top[i] };
            }
        }
        // Each lane decides for itself: what a query gets must not depend on another query.
        let mut moved = false;
        for i in 0..LANES {
            let (old, new) = (running.top[i], factor * top[i]);
            let moves = new > old + SLACK;
            // Before the first score there is nothing to rescale: 2^−inf is 0.
            keep[i] = if moves { exp2(old - new) } else { 1.0 };
            running.top[i] = if moves { new } else { old };
            moved |= moves && running.total[i] != 0.0;
            running.total[i] *= keep[i];
        }
        let mut against = [0f32; LANES];
        for i in 0..LANES {
            // Scores that are all −inf so far are 2^−inf = 0 against any finite top.
            against[i] = if running.top[i] == f32::NEG_INFINITY { 0.0 } else { running.top[i] };
        }
        let mut sums = [0f32; LANES];
        for row in scores.chunks_exact_mut(LANES) {
            for i in 0..LANES {
                let p = exp2(factor * row[i] - against[i]);
                row[i] = p;
                sums[i] += p;
            }
        }
        for i in 0..LANES {
            running.total[i] += sums[i];
        }
        moved
    }
}

multiversion! {
    /// p = 2^(factor·p − lse), ds = p·(ds − delta)·scale. On entry p holds scores and ds the gradient of the
    /// probabilities; where masked both become 0.
    pub(super) fn backward(
        p: &mut [f32],
        ds: &mut [f32],
        ld: usize,
        factor: f32,
        scale: f32,
        lse: &PerLane,
        delta: &PerLane,
        mask: Option<&Mask<'_>>,
    ) {
        for (key, (p, ds)) in p.chunks_mut(ld).zip(ds.chunks_mut(ld)).enumerate() {
            let (p, ds) = (&mut p[..LANES], &mut ds[..LANES]);
            for i in 0..LANES {
                let e = exp2(factor * p[i] - lse[i]);
                p[i] = e;
                ds[i] = e * (ds[i] - delta[i]) * scale;
            }
            if let Some(mask) = mask {
                let at = mask.first + key as i32;
                for i in 0..LANES {
                    let seen = (mask.lo[i] <= at) & (at < mask.hi[i]);
                    p[i] = if seen { p[i] } else { 0.0 };
                    ds[i] = if seen { ds[i] } else { 0.0 };
                }
            }
        }
    }
}

multiversion! {
    /// Every row of [rows, 32] times `factors`, lane by lane.
    pub(super) fn scale_lanes(rows: &mut [f32], factors: &PerLane) {
        for row in rows.chunks_exact_mut(LANES) {
            for i in 0..LANES {
                row[i] *= factors[i];
            }
        }
    }
}
