//! GELU, exact and by tanh, of one layer and gating another.
//!
//! Sources: Hendrycks and Gimpel 2016. Exact: x·Φ(x) with Φ(x) = (1 + erf(x/√2))/2 and derivative Φ(x) + x·φ(x). By tanh:
//! x·σ(2u), u = √(2/π)·(x + 0.044715·x³), which is ½·x·(1 + tanh u); derivative σ + x·σ·(1 − σ)·2u'.
//! erf is x·P(x²)/Q(x²) on [−4, 4], beyond which it is ±1 to the last bit of f32 (the coefficients are those that Eigen
//! uses, found by minimax).
//!
//! Shapes: operands of one length. Values are stored in f32 or bf16, gradients of results come in f32; backward writes
//! gradients in the place of the operands. NaN stays NaN.
//! Left out: operations on candle's tape; the decoder walks its own graph.

use rayon::prelude::*;

use crate::cpu::{for_rows, multiversion};
use crate::math::exp;
use crate::store::Store;

const CHUNK: usize = 16_384;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// By the error function.
    Exact,
    /// By tanh.
    Tanh,
}

/// erf of one lane; inlines into loops that become vector code. Absolute error below 5e-7.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let z = x * x;
    let mut p = -2.726_142_3e-10;
    p = p * z + 2.770_681_4e-8;
    p = p * z - 2.101_024e-6;
    p = p * z - 5.692_506_4e-5;
    p = p * z - 7.349_906e-4;
    p = p * z - 2.954_6e-3;
    p = p * z - 1.609_603_3e-2;
    let mut q = -1.456_607_2e-5;
    q = q * z - 2.133_740_6e-4;
    q = q * z - 1.682_827e-3;
    q = q * z - 7.373_329e-3;
    q = q * z - 1.426_473_9e-2;
    // Written so that NaN comes through.
    if z > 16.0 { 1f32.copysign(x) } else { x * p / q }
}

/// GELU and its derivative.
#[inline(always)]
fn exact(x: f32) -> (f32, f32) {
    const PHI: f32 = 0.398_942_3;
    let phi = 0.5 + 0.5 * erf(x * std::f32::consts::FRAC_1_SQRT_2);
    (x * phi, phi + x * PHI * exp(-0.5 * x * x))
}

/// GELU by tanh and its derivative.
#[inline(always)]
fn tanh(x: f32) -> (f32, f32) {
    // 2·√(2/π).
    const TWICE: f32 = 1.595_769;
    const CUBIC: f32 = 0.044_715;
    let z = x * x;
    let s = 1.0 / (1.0 + exp(-TWICE * x * (1.0 + CUBIC * z)));
    (x * s, s + x * s * (1.0 - s) * TWICE * (1.0 + 3.0 * CUBIC * z))
}

macro_rules! loops {
    ($gelu:ident, $plain:ident, $plain_backward:ident, $gated:ident, $gated_backward:ident) => {
        multiversion! {
            fn $plain<S: Store>(x: &[S], out: &mut [S]) {
                for (o, x) in out.iter_mut().zip(x) {
                    *o = S::put($gelu(x.get()).0);
                }
            }
        }

        multiversion! {
            fn $plain_backward<S: Store>(x: &mut [S], g: &[f32]) {
                for (x, g) in x.iter_mut().zip(g) {
                    *x = S::put($gelu(x.get()).1 * g);
                }
            }
        }

        multiversion! {
            fn $gated<S: Store>(gate: &[S], up: &[S], out: &mut [S]) {
                for ((o, z), u) in out.iter_mut().zip(gate).zip(up) {
                    *o = S::put($gelu(z.get()).0 * u.get());
                }
            }
        }

        multiversion! {
            fn $gated_backward<S: Store>(gate: &mut [S], up: &mut [S], g: &[f32]) {
                let n = gate.len();
                let (up, g) = (&mut up[..n], &g[..n]);
                for i in 0..n {
                    let (value, slope) = $gelu(gate[i].get());
                    let u = up[i].get();
                    gate[i] = S::put(g[i] * u * slope);
                    up[i] = S::put(g[i] * value);
                }
            }
        }
    };
}

loops!(exact, exact_chunk, exact_backward_chunk, exact_gated_chunk, exact_gated_backward_chunk);
loops!(tanh, tanh_chunk, tanh_backward_chunk, tanh_gated_chunk, tanh_gated_backward_chunk);

/// `out` = gelu(`x`), on slices of one length.
pub fn gelu_into<S: Store>(kind: Gelu, x: &[S], out: &mut [S]) {
    for_rows(out, 1, |first, out| {
        let x = &x[first..first + out.len()];
        match kind {
            Gelu::Exact => exact_chunk(x, out),
            Gelu::Tanh => tanh_chunk(x, out),
        }
    });
}

/// Backward of [`gelu_into`], in place: `x` becomes its own gradient, given that of the result.
pub fn gelu_backward_in_place<S: Store>(kind: Gelu, x: &mut [S], g: &[f32]) {
    x.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK)).for_each(|(x, g)| match kind {
        Gelu::Exact => exact_backward_chunk(x, g),
        Gelu::Tanh => tanh_backward_chunk(x, g),
    });
}

/// `out` = gelu(`gate`)·`up`, on slices of one length.
pub fn geglu_into<S: Store>(kind: Gelu, gate: &[S], up: &[S], out: &mut [S]) {
    for_rows(out, 1, |first, out| {
        let place = first..first + out.len();
        let (gate, up) = (&gate[place.clone()], &up[place]);
        match kind {
            Gelu::Exact => exact_gated_chunk(gate, up, out),
            Gelu::Tanh => tanh_gated_chunk(gate, up, out),
        }
    });
}

/// Backward of [`geglu_into`], in place: `gate` and `up` become their own gradients, given that of the result.
pub fn geglu_backward_in_place<S: Store>(kind: Gelu, gate: &mut [S], up: &mut [S], g: &[f32]) {
    gate.par_chunks_mut(CHUNK).zip(up.par_chunks_mut(CHUNK)).zip(g.par_chunks(CHUNK)).for_each(
        |((gate, up), g)| match kind {
            Gelu::Exact => exact_gated_backward_chunk(gate, up, g),
            Gelu::Tanh => tanh_gated_backward_chunk(gate, up, g),
        },
    );
}
