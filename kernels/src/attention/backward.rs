//! The backward pass: probabilities are found again from the log-sum-exp, tile by tile.
//!
//! Source: Dao 2023. With P = e^(scale·QKᵀ − lse) and δ_i = Σ_d dO_id·O_id:
//!   dV = PᵀdO,   dP = dO·Vᵀ,   dS = P∘(dP − δ)·scale,   dQ = dS·K,   dK = dSᵀQ.
//!
//! Order: entries are cut into blocks, and round r handles the pairs (query block x, key block x − r, wrapping
//! around). Within a round no two tasks share a query block or a key block of the same row and kv head, so every
//! output has one owner at a time, and the sums are formed in the order of the rounds whatever the scheduling.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::forward::Dims;
use super::pattern::Plan;
use crate::math::dot;

use super::tile::{Matrix, Output, View, add_row, multiply, softmax_backward};

/// Entries in a block.
const BLOCK: usize = 256;
/// Queries in a tile.
const QUERIES: usize = 96;

/// The operands of a backward pass.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub q: View<'a>,
    pub k: View<'a>,
    pub v: View<'a>,
    /// Gradient of the result.
    pub d_out: View<'a>,
    /// Log-sum-exp [B, T, H].
    pub lse: &'a [f32],
    /// δ [B, T, H].
    pub delta: &'a [f32],
}

/// Per-thread buffers, kept between tasks.
#[derive(Default)]
struct Scratch {
    p: Vec<f32>,
    ds: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// δ [B, T, H] from contiguous [B, T, H, D].
pub(super) fn delta(out: &[f32], d_out: &[f32], width: usize) -> Vec<f32> {
    out.par_chunks_exact(width)
        .with_min_len(256)
        .zip(d_out.par_chunks_exact(width))
        .map(|(out, d_out)| dot(out, d_out))
        .collect()
}

/// Gradients of q, k and v.
pub(super) fn backward(x: Operands<'_>, scale: f32, plan: &Plan, dims: Dims) -> [Vec<f32>; 3] {
    let Dims { batch, entries, heads, kv_heads, width } = dims;
    let mut dq = vec![0f32; batch * entries * heads * width];
    let mut dk = vec![0f32; batch * entries * kv_heads * width];
    let mut dv = vec![0f32; dk.len()];
    let out = [
        Output::new(&mut dq, [batch, entries, heads, width]),
        Output::new(&mut dk, [batch, entries, kv_heads, width]),
        Output::new(&mut dv, [batch, entries, kv_heads, width]),
    ];
    let blocks = entries.div_ceil(BLOCK);
    let range = |block: usize| block * BLOCK..((block + 1) * BLOCK).min(entries);
    for round in 0..blocks {
        let mut tasks = Vec::new();
        for b in 0..batch {
            for kv_head in 0..kv_heads {
                for block in 0..blocks {
                    let (queries, keys) = (range(block), range((block + blocks - round) % blocks));
                    let own = kv_head * (heads / kv_heads)..(kv_head + 1) * (heads / kv_heads);
                    if own.into_iter().any(|h| !meeting(plan, b, h, &queries, &keys).1.is_empty()) {
                        tasks.push((b, kv_head, queries, keys));
                    }
                }
            }
        }
        tasks.into_par_iter().with_max_len(1).for_each(|(b, kv_head, queries, keys)| {
            SCRATCH.with_borrow_mut(|scratch| {
                pair(x, scale, plan, dims, b, kv_head, &queries, &keys, &out, scratch)
            });
        });
    }
    [dq, dk, dv]
}

/// The valid queries among `queries`, and the part of `keys` they see.
fn meeting(
    plan: &Plan,
    b: usize,
    h: usize,
    queries: &Range<usize>,
    keys: &Range<usize>,
) -> (Range<usize>, Range<usize>) {
    let bounds = plan.bounds(b, h);
    let queries = queries.start..queries.end.min(bounds.len());
    if queries.is_empty() {
        return (queries, 0..0);
    }
    let seen = bounds.keys(&queries);
    (queries, keys.start.max(seen.start)..keys.end.min(seen.end))
}

/// One block of queries against one block of keys, for the query heads of one kv head.
fn pair(
    x: Operands<'_>,
    scale: f32,
    plan: &Plan,
    dims: Dims,
    b: usize,
    kv_head: usize,
    queries: &Range<usize>,
    keys: &Range<usize>,
    out: &[Output<'_>; 3],
    scratch: &mut Scratch,
) {
    let Dims { entries, heads, kv_heads, width, .. } = dims;
    let Scratch { p, ds, dq, dk, dv } = scratch;
    for buffer in [&mut *dk, &mut *dv] {
        buffer.clear();
        buffer.resize(keys.len() * width, 0.0);
    }
    let group = heads / kv_heads;
    for h in kv_head * group..(kv_head + 1) * group {
        let bounds = plan.bounds(b, h);
        let (queries, _) = meeting(plan, b, h, queries, keys);
        for queries in bounds.tiles(queries, QUERIES) {
            let (_, seen) = meeting(plan, b, h, &queries, keys);
            if seen.is_empty() {
                continue;
            }
            let (rows, n) = (queries.len(), seen.len());
            let (q, d_out) = (x.q.rows(b, &queries, h), x.d_out.rows(b, &queries, h));
            let (k, v) = (x.k.rows(b, &seen, kv_head), x.v.rows(b, &seen, kv_head));
            let offset = (seen.start - keys.start) * width;
            let (dk, dv) = (&mut dk[offset..][..n * width], &mut dv[offset..][..n * width]);
            for (buffer, len) in [(&mut *p, rows * n), (&mut *ds, rows * n), (&mut *dq, rows * width)] {
                buffer.resize(len, 0.0);
            }
            multiply(p, q, k.transposed(), scale, false);
            multiply(ds, d_out, v.transposed(), 1.0, false);
            for (i, (p, ds)) in p.chunks_exact_mut(n).zip(ds.chunks_exact_mut(n)).enumerate() {
                let t = queries.start + i;
                let cols = bounds.seen(t, &seen);
                for row in [&mut *p, &mut *ds] {
                    row[..cols.start].fill(0.0);
                    row[cols.end..].fill(0.0);
                }
                let at = (b * entries + t) * heads + h;
                softmax_backward(&mut p[cols.clone()], &mut ds[cols], x.lse[at], x.delta[at], scale);
            }
            if !bounds.masked(&queries, &seen) || (q.finite() && k.finite() && d_out.finite()) {
                multiply(dv, Matrix::tile(p, rows, n).transposed(), d_out, 1.0, true);
                multiply(dk, Matrix::tile(ds, rows, n).transposed(), q, 1.0, true);
                multiply(dq, Matrix::tile(ds, rows, n), k, 1.0, false);
            } else {
                // 0·inf is NaN: with such values a query and a key may meet only where one sees the other.
                dq.fill(0.0);
                for i in 0..rows {
                    for j in bounds.seen(queries.start + i, &seen) {
                        let (p, ds) = (p[i * n + j], ds[i * n + j]);
                        for d in 0..width {
                            dv[j * width + d] += p * d_out.at(i, d);
                            dk[j * width + d] += ds * q.at(i, d);
                            dq[i * width + d] += ds * k.at(j, d);
                        }
                    }
                }
            }
            for (i, t) in queries.enumerate() {
                // SAFETY: in this round only this task has queries of this block, row and kv head.
                add_row(unsafe { out[0].row(b, t, h) }, &dq[i * width..][..width]);
            }
        }
    }
    for (j, t) in keys.clone().enumerate() {
        // SAFETY: in this round only this task has keys of this block, row and kv head.
        let (dk_row, dv_row) = unsafe { (out[1].row(b, t, kv_head), out[2].row(b, t, kv_head)) };
        add_row(dk_row, &dk[j * width..][..width]);
        add_row(dv_row, &dv[j * width..][..width]);
    }
}
