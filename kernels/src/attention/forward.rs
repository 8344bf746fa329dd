//! The forward pass: tiles of queries, an online softmax over tiles of keys.
//!
//! Per query, over the key tiles in ascending order: top = the largest score so far, total = Σ e^(score − top), and
//! o = Σ e^(score − top)·v; a larger top rescales what was gathered. The result is o / total, and the row's
//! log-sum-exp top + ln(total) is what backward needs to find the same probabilities again.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::pattern::{Bounds, OP, Plan};
use crate::error::{KernelError, Result};

use super::tile::{Matrix, Output, View, exp_sum, largest, multiply, scale_row};

/// Queries in a tile.
const QUERIES: usize = 96;
/// Keys in a tile.
const KEYS: usize = 512;

/// [B, T, H, Hkv, D].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dims {
    pub batch: usize,
    pub entries: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub width: usize,
}

impl Dims {
    /// Refuses head counts and widths the kernels are not made for.
    pub fn check(self) -> Result<()> {
        let Self { heads, kv_heads, width, .. } = self;
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(KernelError::shape(
                OP,
                "query heads that are a multiple of the kv heads, both at least 1",
                format!("{heads} query heads and {kv_heads} kv heads"),
            ));
        }
        if width == 0 || width > 256 {
            return Err(KernelError::shape(OP, "a head width of 1 to 256", format!("{width}")));
        }
        Ok(())
    }
}

/// Per-thread buffers, kept between tiles.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    gathered: Vec<f32>,
    top: Vec<f32>,
    total: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The result [B, T, H, D] and the log-sum-exp of every query [B, T, H].
pub(super) fn forward(
    q: View<'_>,
    k: View<'_>,
    v: View<'_>,
    scale: f32,
    plan: &Plan,
    dims: Dims,
) -> (Vec<f32>, Vec<f32>) {
    let Dims { batch, entries, heads, kv_heads, width } = dims;
    let mut out = vec![0f32; batch * entries * heads * width];
    let mut lse = vec![0f32; batch * entries * heads];
    let out_rows = Output::new(&mut out, [batch, entries, heads, width]);
    let lse_rows = Output::new(&mut lse, [batch, entries, heads, 1]);
    let mut tasks = Vec::new();
    for b in 0..batch {
        for h in 0..heads {
            let bounds = plan.bounds(b, h);
            tasks.extend(bounds.tiles(0..bounds.len(), QUERIES).into_iter().map(|queries| (b, h, queries)));
        }
    }
    tasks.into_par_iter().with_max_len(1).for_each(|(b, h, queries)| {
        let head = h / (heads / kv_heads);
        SCRATCH.with_borrow_mut(|scratch| {
            let bounds = plan.bounds(b, h);
            let q = q.rows(b, &queries, h);
            gather(
                q,
                |keys| (k.rows(b, keys, head), v.rows(b, keys, head)),
                scale,
                bounds,
                &queries,
                width,
                scratch,
            );
            for (i, t) in queries.enumerate() {
                let (top, total) = (scratch.top[i], scratch.total[i]);
                // SAFETY: each (b, h, t) belongs to exactly one task.
                let (row, lse) = unsafe { (out_rows.row(b, t, h), lse_rows.row(b, t, h)) };
                row.copy_from_slice(&scratch.gathered[i * width..][..width]);
                scale_row(row, 1.0 / total);
                lse[0] = top + total.ln();
            }
        });
    });
    (out, lse)
}

fn gather<'a>(
    q: Matrix<'_>,
    kv: impl Fn(&Range<usize>) -> (Matrix<'a>, Matrix<'a>),
    scale: f32,
    bounds: &Bounds,
    queries: &Range<usize>,
    width: usize,
    scratch: &mut Scratch,
) {
    let rows = queries.len();
    let Scratch { scores, gathered, top, total } = scratch;
    for (buffer, len, value) in
        [(&mut *gathered, rows * width, 0.0), (&mut *top, rows, f32::NEG_INFINITY), (&mut *total, rows, 0.0)]
    {
        buffer.clear();
        buffer.resize(len, value);
    }
    let all = bounds.keys(queries);
    for start in all.clone().step_by(KEYS) {
        let keys = start..(start + KEYS).min(all.end);
        let n = keys.len();
        let (k, v) = kv(&keys);
        scores.resize((rows * n).max(scores.len()), 0.0);
        let scores = &mut scores[..rows * n];
        multiply(scores, q, k.transposed(), scale, false);
        for (i, row) in scores.chunks_exact_mut(n).enumerate() {
            let seen = bounds.seen(queries.start + i, &keys);
            row[..seen.start].fill(0.0);
            row[seen.end..].fill(0.0);
            if seen.is_empty() {
                continue;
            }
            let row = &mut row[seen];
            let new_top = top[i].max(largest(row));
            // Scores that are all −inf so far are e^−inf = 0 against any finite top.
            let against = if new_top == f32::NEG_INFINITY { 0.0 } else { new_top };
            let keep = (top[i] - against).exp();
            let sum = exp_sum(row, against);
            total[i] = total[i] * keep + sum;
            if keep != 1.0 {
                scale_row(&mut gathered[i * width..][..width], keep);
            }
            top[i] = new_top;
        }
        if !bounds.masked(queries, &keys) || v.finite() {
            multiply(gathered, Matrix::tile(scores, rows, n), v, 1.0, true);
        } else {
            // 0·inf is NaN: with such values a query may touch only the keys that it sees.
            for i in 0..rows {
                for j in bounds.seen(queries.start + i, &keys) {
                    for d in 0..width {
                        gathered[i * width + d] += scores[i * n + j] * v.at(j, d);
                    }
                }
            }
        }
    }
}
