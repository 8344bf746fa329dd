//! Matrix products of slices: f32 or bf16 in, sums in f32, f32 or bf16 out.
//!
//! Three ways, chosen by shape and by [`Products`]:
//! - large f32 products of f32 operands go to the gemm crate (AVX-512 where the machine has it), which is as fast as
//!   the machine there;
//! - products with a side of LoRA's rank have loops of their own ([`crate::skinny`]): that crate packs operands that
//!   are used once;
//! - everything else (bf16 products, bf16 storage) is packed here and multiplied by `micro`.
//!
//! Packing: B whole (a slab of at most `SLAB_WORDS` words at a time), by all threads, in panels of 32 lanes; A by each
//! task, a block of rows that stays in the second cache level. A task sums a block of rows × 32 lanes over the whole
//! depth in f32 and writes it once.
//!
//! A safe door in front of unsafe products: bounds are checked against the slices here. All threads of rayon's current
//! pool; each output value is summed in an order that does not depend on the number of threads.
//! Sources: Goto and van de Geijn 2008; the BLIS papers.

use std::cell::RefCell;
use std::marker::PhantomData;

use gemm::Parallelism;
use rayon::prelude::*;

use crate::cpu::multiversion;
pub use crate::micro::Products;
use crate::micro::{Aligned, Block, Engine, LANES, ROWS, pack};
use crate::store::Store;

/// Words of packed B alive at one time, about.
const SLAB_WORDS: usize = 1 << 20;
/// Words of depth that a task's rows of A are packed for at once; a longer sum is made in several passes over C, where C
/// is f32.
const DEPTH_WORDS: usize = 2048;
/// Steps of the depth are a multiple of this many words, if the depth is.
const STEP_UNIT: usize = 16;
/// Rows of a task are a multiple of this: two tiles.
const TASK_UNIT: usize = 2 * ROWS;
/// Products below this many multiply-adds are not worth a second thread.
const SMALL: usize = 64 * 64 * 64;

/// How a product is cut for an engine.
struct Blocking {
    /// Rows of A in a task, at most: they stay in the second cache level, and B is read once for each task.
    task_rows: usize,
    /// Words of depth between two visits to the block of C, at most: a panel of B of this depth stays in the first cache
    /// level beside the rows of A that pass by.
    step_words: usize,
}

impl Blocking {
    /// Measured: the vectors' on a Zen 4 (32 KiB and 1 MiB), the tiles' on a Sapphire Rapids (48 KiB and 2 MiB).
    fn of(engine: Engine) -> Self {
        if engine.works_on_tiles() {
            Self { task_rows: 256, step_words: 128 }
        } else {
            Self { task_rows: 96, step_words: 192 }
        }
    }

    /// Rows of a task, and tasks, for `m` rows shared out evenly.
    fn tasks(&self, m: usize) -> (usize, usize) {
        let rows = m.div_ceil(m.div_ceil(self.task_rows)).next_multiple_of(TASK_UNIT).min(m);
        (rows, m.div_ceil(rows))
    }

    /// Words of a step, and steps, for a depth of `words`.
    fn steps(&self, words: usize) -> (usize, usize) {
        let step = words.div_ceil(words.div_ceil(self.step_words)).next_multiple_of(STEP_UNIT).min(words);
        (step, words.div_ceil(step))
    }
}

/// A read-only matrix over a slice.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a, S = f32> {
    data: &'a [S],
    rows: usize,
    cols: usize,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl<'a, S: Copy> Mat<'a, S> {
    /// Row-major, `rows`·`cols` values.
    ///
    /// # Panics
    /// When `data` is shorter.
    pub fn new(data: &'a [S], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols, "a {rows}x{cols} matrix over {} values", data.len());
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Any strides, in values.
    ///
    /// # Panics
    /// When the last value lies past the end of `data`.
    pub fn strided(data: &'a [S], [rows, cols]: [usize; 2], [row_stride, col_stride]: [usize; 2]) -> Self {
        if rows > 0 && cols > 0 {
            let last = (rows - 1) * row_stride + (cols - 1) * col_stride;
            assert!(last < data.len(), "a {rows}x{cols} matrix reaches value {last} of {}", data.len());
        }
        Self { data, rows, cols, row_stride, col_stride }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// One value.
    pub fn at(&self, row: usize, col: usize) -> S {
        self.data[row * self.row_stride + col * self.col_stride]
    }

    /// The slice from the first value on.
    pub(crate) fn values(&self) -> &'a [S] {
        self.data
    }

    /// The same matrix over the same values in another type.
    pub(crate) fn over<T>(self, data: &[T]) -> Mat<'_, T> {
        assert_eq!(data.len(), self.data.len(), "the same values");
        Mat {
            data,
            rows: self.rows,
            cols: self.cols,
            row_stride: self.row_stride,
            col_stride: self.col_stride,
        }
    }

    /// A row whose values lie side by side.
    pub(crate) fn row(&self, row: usize) -> &'a [S] {
        debug_assert_eq!(self.col_stride, 1);
        &self.data[row * self.row_stride..][..self.cols]
    }

    /// Part of the matrix.
    pub(crate) fn part(self, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>) -> Self {
        assert!(rows.end <= self.rows && cols.end <= self.cols, "a part lies inside");
        let at = (rows.start * self.row_stride + cols.start * self.col_stride).min(self.data.len());
        Self { data: &self.data[at..], rows: rows.len(), cols: cols.len(), ..self }
    }
}

/// `out` (row-major) = `scale`·`a`·`b` in f32, added to what is there when `accumulate`.
///
/// # Panics
/// When the inner sizes differ or `out` is too short: sizes are the caller's to check.
pub fn matmul(out: &mut [f32], a: Mat, b: Mat, scale: f32, accumulate: bool) {
    matmul_with(out, a, b, scale, accumulate, Products::F32);
}

/// `out` (row-major) = `scale`·`a`·`b`, added to what is there when `accumulate`, with operands and result stored as they
/// are and products computed as `products` says.
///
/// # Panics
/// As [`matmul`].
pub fn matmul_with<A: Store, B: Store, C: Store>(
    out: &mut [C],
    a: Mat<A>,
    b: Mat<B>,
    scale: f32,
    accumulate: bool,
    products: Products,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(k, b.rows, "inner sizes agree");
    assert!(out.len() >= m * n, "a {m}x{n} product into {} values", out.len());
    let out = &mut out[..m * n];
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            out.fill(C::default());
        }
        return;
    }
    let engine = Engine::new(products);
    if matches!(engine, Engine::F32(_))
        && let (Some(a_data), Some(b_data)) = (A::as_f32(a.data), B::as_f32(b.data))
        && let Some(out) = C::as_f32_mut(out)
    {
        library(out, a.over(a_data), b.over(b_data), scale, accumulate);
    } else {
        packed(engine, out, a, b, scale, accumulate);
    }
}

/// The gemm crate's product.
fn library(out: &mut [f32], a: Mat, b: Mat, scale: f32, accumulate: bool) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let threads = if m * n * k < SMALL { Parallelism::None } else { Parallelism::Rayon(0) };
    // SAFETY: `Mat` holds at least rows·cols values reachable with its strides, `out` m·n, both checked when they were
    // made; `out` is a unique borrow, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            threads,
        );
    }
}

/// Per-thread buffers of a task.
#[derive(Default)]
struct Scratch {
    a: Aligned<u32>,
    c: Aligned<f32>,
    /// The slab of B, of the thread that asks for the product.
    b: Aligned<u32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// C, of which tasks write parts, each row and column by one of them.
struct Target<C> {
    data: *mut C,
    width: usize,
}

// SAFETY: tasks write disjoint parts (see `packed`).
unsafe impl<C: Send> Sync for Target<C> {}

impl<C> Target<C> {
    /// The part of so many rows and columns that begins at a place.
    ///
    /// # Safety
    /// It lies in the output, and is no one else's while it lives.
    unsafe fn part(&self, [row, col]: [usize; 2], [rows, cols]: [usize; 2]) -> Part<'_, C> {
        // SAFETY: the caller's promise.
        let data = unsafe { self.data.add(row * self.width + col) };
        Part { data, width: self.width, rows, cols, of: PhantomData }
    }
}

/// Some rows of a few columns of C, held by one task.
struct Part<'a, C> {
    data: *mut C,
    width: usize,
    rows: usize,
    cols: usize,
    of: PhantomData<&'a mut C>,
}

impl<C> Part<'_, C> {
    fn row(&mut self, row: usize) -> &mut [C] {
        assert!(row < self.rows, "a row of the part");
        // SAFETY: the row is inside, and whoever made the part promised that it is no one else's.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(row * self.width), self.cols) }
    }
}

fn packed<A: Store, B: Store, C: Store>(
    engine: Engine,
    out: &mut [C],
    a: Mat<A>,
    b: Mat<B>,
    scale: f32,
    accumulate: bool,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    // A result that is rounded when it is written is summed over the whole depth first.
    let depth = if C::EXACT { DEPTH_WORDS * engine.values() } else { k };
    for (pass, first) in (0..k).step_by(depth).enumerate() {
        let depth = first..k.min(first + depth);
        let words = engine.words(depth.len());
        let slab = (SLAB_WORDS / words / LANES).max(1) * LANES;
        // Kept from product to product: fresh pages cost more than packing into them.
        let mut panels = SCRATCH.with_borrow_mut(|scratch| std::mem::take(&mut scratch.b));
        for lane in (0..n).step_by(slab) {
            let lanes = lane..n.min(lane + slab);
            let count = lanes.len().div_ceil(LANES);
            panels.resize(count * words * LANES);
            let pack_panel = |(i, panel): (usize, &mut [u32])| {
                let first = lanes.start + i * LANES;
                let part = b.part(depth.clone(), first..lanes.end.min(first + LANES));
                pack::b_form(engine, part, panel, LANES, LANES);
            };
            let small = m * n * k < SMALL;
            if small {
                panels.chunks_mut(words * LANES).enumerate().for_each(pack_panel);
            } else {
                panels.par_chunks_mut(words * LANES).enumerate().for_each(pack_panel);
            }
            let target = Target { data: out.as_mut_ptr(), width: n };
            let (task_rows, blocks) = Blocking::of(engine).tasks(m);
            // Columns are shared out too where there are too few rows to keep all threads busy; each piece packs A anew.
            let pieces = (4 * rayon::current_num_threads()).div_ceil(blocks).min(count);
            let run = |task: usize| {
                let (block, piece) = (task / pieces, task % pieces);
                let first = block * task_rows;
                let own = piece * count / pieces..(piece + 1) * count / pieces;
                let part = a.part(first..m.min(first + task_rows), depth.clone());
                // SAFETY: this task alone writes these rows of these panels' columns, all inside `out`.
                unsafe {
                    task_product(
                        engine,
                        part,
                        &panels,
                        own,
                        &target,
                        first,
                        &lanes,
                        scale,
                        accumulate || pass > 0,
                    );
                }
            };
            if small {
                (0..blocks * pieces).for_each(run);
            } else {
                (0..blocks * pieces).into_par_iter().with_max_len(1).for_each(run);
            }
        }
        SCRATCH.with_borrow_mut(|scratch| scratch.b = panels);
    }
}

/// Rows `first_row..` of C (those of `a`) for the panels `own`, whose columns start at `lanes.start`.
///
/// # Safety
/// These parts of C lie in the output and are this task's alone.
unsafe fn task_product<A: Store, C: Store>(
    engine: Engine,
    a: Mat<A>,
    panels: &[u32],
    own: std::ops::Range<usize>,
    out: &Target<C>,
    first_row: usize,
    lanes: &std::ops::Range<usize>,
    scale: f32,
    accumulate: bool,
) {
    let (m, words) = (a.rows, engine.words(a.cols));
    let padded = m.next_multiple_of(ROWS);
    // For each step of the depth the rows of A lie close together.
    let (step, steps) = Blocking::of(engine).steps(words);
    let _guard = engine.enter();
    SCRATCH.with_borrow_mut(|scratch| {
        // Rows that lie a multiple of 4096 bytes apart would share their places in the cache.
        let lda = if step % 64 == 0 { step + 16 } else { step };
        let slice = padded * lda;
        scratch.a.reserve(steps * slice);
        scratch.c.reserve(padded * LANES);
        for (i, slice) in scratch.a.chunks_exact_mut(slice).take(steps).enumerate() {
            let values = step * engine.values();
            let part = a.part(0..m, i * values..a.cols.min((i + 1) * values));
            pack::a_form(engine, part, slice, lda);
        }
        for panel in own {
            let b = &panels[panel * words * LANES..][..words * LANES];
            for (i, start) in (0..words).step_by(step).enumerate() {
                // SAFETY: a slice of A is padded to whole tiles of rows and holds `lda` words of each, B holds `words` rows
                // of LANES words, C is padded like A; lengths of steps are multiples of 16 where tiles need it, as `words`
                // and STEP_UNIT are.
                unsafe {
                    engine.block(Block {
                        rows: m,
                        lanes: LANES,
                        words: step.min(words - start),
                        a: scratch.a.as_ptr().add(i * slice),
                        lda,
                        b: b.as_ptr().add(start * LANES),
                        ldb: LANES,
                        c: scratch.c.as_mut_ptr(),
                        ldc: LANES,
                        add: start > 0,
                    });
                }
            }
            let first = lanes.start + panel * LANES;
            let count = LANES.min(lanes.end - first);
            // SAFETY: the caller's promise.
            let part = unsafe { out.part([first_row, first], [m, count]) };
            write(part, &scratch.c, scale, accumulate);
        }
    });
}

multiversion! {
    /// `out` (+)= scale·sums, whose rows are [`LANES`] apart.
    fn write<C: Store>(out: Part<'_, C>, sums: &[f32], scale: f32, accumulate: bool) {
        let mut part = out;
        for (row, sums) in sums.chunks_exact(LANES).take(part.rows).enumerate() {
            let out = part.row(row);
            if accumulate {
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = C::put(out.get() + scale * sum);
                }
            } else {
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = C::put(scale * sum);
                }
            }
        }
    }
}

/// Floating-point operations per second of a 512-cubed product on this machine now, for planning: the best of a few.
pub fn measured_flops(products: Products) -> f64 {
    const N: usize = 512;
    let a = vec![0.5f32; N * N];
    let mut out = vec![0f32; N * N];
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = std::time::Instant::now();
        matmul_with(&mut out, Mat::new(&a, N, N), Mat::new(&a, N, N), 1.0, false, products);
        best = best.min(start.elapsed().as_secs_f64());
    }
    2.0 * (N * N * N) as f64 / best.max(1e-9)
}
