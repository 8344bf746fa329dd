//! Small work on rows: biases of linear layers, sums of streams, and queries, keys and values that lie together.
//!
//! A bias b \[O\] of y = x·Wᵀ + b is added to rows before the product is, so that a result stored in bf16 is rounded with
//! everything in it but once more; its gradient is the sum over rows of y's.
//!
//! Fused heads: one linear layer may give queries, keys and values of each head side by side, [N, H, 3, D] (GPT-NeoX);
//! [`split_heads`] takes them apart into three [N, H, D] and [`join_heads`] is its transpose.
//!
//! Values are stored in f32 or bf16; gradients are f32, summed in a fixed order whatever the threads. Sizes are the
//! caller's to check: slices that do not fit panic.

use rayon::prelude::*;

use crate::cpu::{for_rows, multiversion, rows_per_task, sum_partials};
use crate::linear::Weight;
use crate::math::{add_row, convert};
use crate::store::Store;

/// Pieces that sums over rows are made of.
const PIECES: usize = 64;

multiversion! {
    fn add<A: Store, B: Store>(values: &[A], out: &mut [B]) {
        for (o, x) in out.iter_mut().zip(values) {
            *o = B::put(o.get() + x.get());
        }
    }
}

/// Every row of `y` [n, O] = `bias` \[O\].
pub fn fill<S: Store>(bias: Weight<'_>, y: &mut [S]) {
    let width = bias.len();
    for_rows(y, width, |_, rows| {
        for row in rows.chunks_exact_mut(width) {
            match bias {
                Weight::F32(bias) => convert(bias, row),
                Weight::Bf16(bias) => convert(bias, row),
            }
        }
    });
}

/// Every row of `y` [n, O] += `bias` \[O\].
pub fn add_bias<S: Store>(bias: Weight<'_>, y: &mut [S]) {
    let width = bias.len();
    for_rows(y, width, |_, rows| {
        for row in rows.chunks_exact_mut(width) {
            match bias {
                Weight::F32(bias) => add(bias, row),
                Weight::Bf16(bias) => add(bias, row),
            }
        }
    });
}

/// `y` += `x`, of one length.
pub fn add_assign<S: Store>(x: &[S], y: &mut [S]) {
    for_rows(y, 1, |first, y| add(&x[first..first + y.len()], y));
}

/// `y` = `x`, of one length, by all threads: one alone does not fill the memory's bandwidth.
pub fn copy<S: Store>(x: &[S], y: &mut [S]) {
    for_rows(y, 1, |first, y| y.copy_from_slice(&x[first..first + y.len()]));
}

/// `x` *= `factor`.
pub fn scale<S: Store>(x: &mut [S], factor: f32) {
    for_rows(x, 1, |_, x| scale_chunk(x, factor));
}

multiversion! {
    fn scale_chunk<S: Store>(x: &mut [S], factor: f32) {
        for x in x {
            *x = S::put(x.get() * factor);
        }
    }
}

/// `sum` \[O\] += Σ of the rows of `g` [n, O].
pub fn sum_rows<G: Store>(g: &[G], sum: &mut [f32]) {
    let width = sum.len();
    if width == 0 {
        return;
    }
    let rows = rows_per_task(width).max((g.len() / width).div_ceil(PIECES));
    let partials: Vec<Vec<f32>> = g
        .par_chunks(rows * width)
        .map(|piece| {
            let mut partial = vec![0f32; width];
            piece.chunks_exact(width).for_each(|row| add(row, &mut partial));
            partial
        })
        .collect();
    add_row(sum, &sum_partials(partials, width));
}

/// [N, H, 3, D] apart into queries, keys and values [N, H, D].
pub fn split_heads<S: Store>(fused: &[S], width: usize, heads: usize, parts: [&mut [S]; 3]) {
    for (which, part) in parts.into_iter().enumerate() {
        for_rows(part, heads * width, |first, rows| {
            for (i, head) in rows.chunks_exact_mut(width).enumerate() {
                let at = ((first * heads + i) * 3 + which) * width;
                head.copy_from_slice(&fused[at..at + width]);
            }
        });
    }
}

/// The transpose of [`split_heads`].
pub fn join_heads(parts: [&[f32]; 3], width: usize, heads: usize, fused: &mut [f32]) {
    for_rows(fused, 3 * heads * width, |first, rows| {
        for (i, three) in rows.chunks_exact_mut(3 * width).enumerate() {
            let at = (first * heads + i) * width;
            for (part, out) in parts.iter().zip(three.chunks_exact_mut(width)) {
                out.copy_from_slice(&part[at..at + width]);
            }
        }
    });
}
