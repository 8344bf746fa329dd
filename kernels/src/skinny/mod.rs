//! Products with one side of LoRA's rank: what packing for a large product would cost more than the product.
//!
//! Three shapes, for values x [n, I] that are stored in f32 or bf16 and are read once, in order:
//!   [`down`]       low = s·drop(x)·Mᵀ     low [n, r], M [r, I]
//!   [`up_add`]     y += drop(low·M)       y [n, I], M [r, I]
//!   [`outer_add`]  out += lowᵀ·drop(x)    out [r, I]
//! `M` is a [`Mat`], so that A [r, I] and the transpose of B [O, r] are the same to it. Dropout is that of LoRA's input,
//! by the value's place in x or y.
//!
//! The small operand is packed whole and stays in a cache; x and y go by in blocks of rows. All are f32 products
//! whatever the storage, in the blocks of `micro`. Splits are fixed by the sizes, so that the same inputs give
//! the same bytes on any number of threads.
//!
//! Shapes: n entries, r rank (any), I width. Errors: none; sizes are the caller's to check, and the slices are.

mod dots;

use std::cell::RefCell;

use rayon::prelude::*;

use crate::gemm::{Mat, Products, matmul};
use crate::linear::Dropout;
use crate::math::{add_row, convert};
use crate::micro::{Block, Engine, LANES, pack};
use crate::store::Store;

/// Rows of a task of [`down`] and [`up_add`].
const TASK_ROWS: usize = 48;
/// Rows of [`up_add`] that are finished together: what registers hold.
const FEW: usize = 12;
/// Rows of x that [`outer_add`] has in cache at a time.
const DEPTH: usize = 64;
/// Most tasks of [`outer_add`], each with sums of its own.
const TASKS: usize = 16;
/// Depth of [`down`] between two visits to its sums: a group of rows of the small operand stays in the first cache level.
const STEP: usize = 512;

/// Per-thread buffers of a task.
#[derive(Default)]
struct Scratch {
    rows: Vec<f32>,
    sums: Vec<f32>,
    low: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// Values `first..` of a tensor as f32 in `buffer`, dropped where there is dropout.
fn copied<'a, X: Store>(
    x: &[X],
    first: usize,
    dropout: Option<Dropout>,
    buffer: &'a mut Vec<f32>,
) -> &'a [f32] {
    let buffer = sized(buffer, x.len());
    convert(x, buffer);
    if let Some(dropout) = dropout {
        dropout.apply_at(first, buffer);
    }
    buffer
}

/// `mat` [depth, lanes] in panels of [`LANES`] lanes, zero past its end: panel after panel, depth down.
fn panels(engine: Engine, mat: Mat) -> Vec<u32> {
    let (depth, lanes) = (mat.rows(), mat.cols());
    let count = lanes.div_ceil(LANES);
    let mut packed = vec![0u32; count * depth * LANES];
    if depth > 0 {
        packed.par_chunks_mut(depth * LANES).with_min_len(8).enumerate().for_each(|(panel, out)| {
            let first = panel * LANES;
            let part = mat.part(0..depth, first..lanes.min(first + LANES));
            pack::b_form(engine, part, out, LANES, LANES);
        });
    }
    packed
}

/// `low` [n, r] = `scale`·drop(`x`)·`m`ᵀ, m [r, I].
///
/// # Panics
/// When `x` or `low` is not n rows.
pub fn down<X: Store>(x: &[X], m: Mat, scale: f32, dropout: Option<Dropout>, low: &mut [f32]) {
    let (rank, width) = (m.rows(), m.cols());
    if rank == 0 || width == 0 {
        low.fill(0.0);
        return;
    }
    assert_eq!(x.len() * rank, low.len() * width, "x and low have one number of rows");
    if rank > dots::GROUP
        && dropout.is_none()
        && let Some(x) = X::as_f32(x)
    {
        // Measured: the general product is the faster one here.
        return matmul(low, Mat::new(x, low.len() / rank, width), m.t(), scale, false);
    }
    // Rows of m lie side by side, in groups, and not a multiple of 4096 bytes apart.
    let stride = width.next_multiple_of(dots::STEP) + dots::STEP;
    let mut packed = vec![0f32; rank.next_multiple_of(dots::GROUP) * stride];
    for (r, row) in packed.chunks_exact_mut(stride).take(rank).enumerate() {
        for (i, value) in row[..width].iter_mut().enumerate() {
            *value = m.at(r, i) * scale;
        }
    }
    let whole = width / dots::STEP * dots::STEP;
    low.par_chunks_mut(TASK_ROWS * rank).enumerate().for_each(|(task, low)| {
        let (first, rows) = (task * TASK_ROWS * width, low.len() / rank);
        SCRATCH.with_borrow_mut(|scratch| {
            let x = &x[first..first + rows * width];
            let x = match (X::as_f32(x), dropout) {
                (Some(x), None) => x,
                _ => copied(x, first, dropout, &mut scratch.rows),
            };
            let mut sums = [0f32; TASK_ROWS * dots::GROUP];
            for (row, low) in low.chunks_exact_mut(rank).enumerate() {
                for (r, low) in low.iter_mut().enumerate() {
                    let m = &packed[r * stride..];
                    *low = (whole..width).map(|i| x[row * width + i] * m[i]).sum();
                }
            }
            for start in (0..whole).step_by(STEP) {
                let depth = STEP.min(whole - start);
                for (group, m) in packed.chunks_exact(dots::GROUP * stride).enumerate() {
                    dots::dots(&x[start..], width, rows, &m[start..], stride, depth, &mut sums);
                    let own = group * dots::GROUP..rank.min((group + 1) * dots::GROUP);
                    for (low, sums) in low.chunks_exact_mut(rank).zip(sums.chunks_exact(dots::GROUP)) {
                        for (low, sum) in low[own.clone()].iter_mut().zip(sums) {
                            *low += sum;
                        }
                    }
                }
            }
        });
    });
}

/// `y` [n, I] += drop(`low`·`m`), low [n, r], m [r, I].
///
/// # Panics
/// When `y` or `low` is not n rows.
pub fn up_add<Y: Store>(low: &[f32], m: Mat, dropout: Option<Dropout>, y: &mut [Y]) {
    let (rank, width) = (m.rows(), m.cols());
    if rank == 0 || width == 0 {
        return;
    }
    assert_eq!(y.len() * rank, low.len() * width, "y and low have one number of rows");
    let engine = Engine::new(Products::F32);
    let packed = panels(engine, m);
    let (count, whole) = (width.div_ceil(LANES), width / LANES);
    y.par_chunks_mut(TASK_ROWS * width).enumerate().for_each(|(task, y)| {
        let first = task * TASK_ROWS;
        let low = &low[first * rank..][..y.len() / width * rank];
        let block = |rows: usize, low: &[f32], b: &[u32], c: &mut [f32], ldc: usize, add: bool| {
            assert!(low.len() >= rows * rank && c.len() >= (rows - 1) * ldc + LANES);
            // SAFETY: low holds `rows` rows of `rank` words, b `rank` rows of LANES words, c `rows` rows of LANES values
            // at stride `ldc`; an f32 engine asks for no more.
            unsafe {
                engine.block(Block {
                    rows,
                    lanes: LANES,
                    words: rank,
                    a: low.as_ptr().cast(),
                    lda: rank,
                    b: b.as_ptr(),
                    ldb: LANES,
                    c: c.as_mut_ptr(),
                    ldc,
                    add,
                });
            }
        };
        SCRATCH.with_borrow_mut(|scratch| {
            // A few rows at a time, so that y goes by in order.
            for (i, (y, low)) in y.chunks_mut(FEW * width).zip(low.chunks(FEW * rank)).enumerate() {
                let rows = y.len() / width;
                let direct = dropout.is_none().then(|| Y::as_f32_mut(y)).flatten();
                let straight = if direct.is_some() { whole } else { 0 };
                if let Some(y) = direct {
                    for (panel, b) in packed.chunks_exact(rank * LANES).take(whole).enumerate() {
                        block(rows, low, b, &mut y[panel * LANES..], width, true);
                    }
                }
                let stride = (count - straight) * LANES;
                let sums = sized(&mut scratch.sums, rows * stride);
                for (panel, b) in packed.chunks_exact(rank * LANES).skip(straight).enumerate() {
                    block(rows, low, b, &mut sums[panel * LANES..], stride, false);
                }
                let lane = straight * LANES;
                for (row, (y, sums)) in
                    y.chunks_exact_mut(width).zip(sums.chunks_exact_mut(stride.max(1))).enumerate()
                {
                    let sums = &mut sums[..width - lane];
                    if let Some(dropout) = dropout {
                        dropout.apply_at((first + i * FEW + row) * width + lane, sums);
                    }
                    add_row(&mut y[lane..], sums);
                }
            }
        });
    });
}

/// Sums of [`outer_add`] over the rows of one task: [r, panels·LANES], rows of `width` values from row `first` on.
fn outer_part<X: Store>(
    engine: Engine,
    low: &[f32],
    rank: usize,
    x: &[X],
    width: usize,
    first: usize,
    dropout: Option<Dropout>,
) -> Vec<f32> {
    let count = width.div_ceil(LANES);
    let stride = count * LANES;
    let mut sums = vec![0f32; rank * stride];
    SCRATCH.with_borrow_mut(|scratch| {
        let Scratch { rows: buffer, sums: tail, low: turned } = scratch;
        let turned = sized(turned, rank * DEPTH);
        let tail = sized(tail, DEPTH * LANES);
        for (block, (x, low)) in x.chunks(DEPTH * width).zip(low.chunks(DEPTH * rank)).enumerate() {
            let depth = x.len() / width;
            // A copy even of f32: panels are read across the rows, which memory is slow at and the cache is not.
            let x = copied(x, (first + block * DEPTH) * width, dropout, buffer);
            for (at, low) in low.chunks_exact(rank).enumerate() {
                for (r, value) in low.iter().enumerate() {
                    turned[r * DEPTH + at] = *value;
                }
            }
            for panel in 0..count {
                let lane = panel * LANES;
                let (b, ldb) = if lane + LANES <= width {
                    (&x[lane..], width)
                } else {
                    for (tail, x) in tail.chunks_exact_mut(LANES).zip(x.chunks_exact(width)) {
                        tail[..width - lane].copy_from_slice(&x[lane..]);
                        tail[width - lane..].fill(0.0);
                    }
                    (&tail[..], LANES)
                };
                assert!(b.len() >= (depth - 1) * ldb + LANES);
                // SAFETY: turned holds `rank` rows of DEPTH words, b `depth` rows of LANES words at stride `ldb`, sums
                // `rank` rows of LANES values at `stride`; an f32 engine asks for no more.
                unsafe {
                    engine.block(Block {
                        rows: rank,
                        lanes: LANES,
                        words: depth,
                        a: turned.as_ptr().cast(),
                        lda: DEPTH,
                        b: b.as_ptr().cast(),
                        ldb,
                        c: sums.as_mut_ptr().add(lane),
                        ldc: stride,
                        add: block > 0,
                    });
                }
            }
        }
    });
    sums
}

/// `out` += `low`ᵀ·drop(`x`), low [n, r], x [n, I]; out is [r, I], or [I, r] where `transposed`.
///
/// # Panics
/// When sizes do not agree.
pub fn outer_add<X: Store>(
    low: &[f32],
    rank: usize,
    x: &[X],
    width: usize,
    dropout: Option<Dropout>,
    out: &mut [f32],
    transposed: bool,
) {
    if rank == 0 || width == 0 || x.is_empty() {
        return;
    }
    assert!(x.len() * rank == low.len() * width && out.len() == rank * width, "sizes agree");
    let engine = Engine::new(Products::F32);
    let rows = x.len() / width;
    let share = rows.div_ceil(TASKS).next_multiple_of(DEPTH);
    let parts: Vec<Vec<f32>> = x
        .par_chunks(share * width)
        .zip(low.par_chunks(share * rank))
        .enumerate()
        .map(|(task, (x, low))| outer_part(engine, low, rank, x, width, task * share, dropout))
        .collect();
    let stride = width.div_ceil(LANES) * LANES;
    for part in parts {
        if transposed {
            for (i, out) in out.chunks_exact_mut(rank).enumerate() {
                for (r, out) in out.iter_mut().enumerate() {
                    *out += part[r * stride + i];
                }
            }
        } else {
            for (out, part) in out.chunks_exact_mut(width).zip(part.chunks_exact(stride)) {
                add_row(out, &part[..width]);
            }
        }
    }
}
