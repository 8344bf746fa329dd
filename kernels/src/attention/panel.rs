//! What the kernels work on: panels of up to 32 queries, and tiles of keys and values packed for products.
//!
//! All products keep the queries of a panel across, one per lane, so that the softmax runs down the keys:
//!
//!   scores   Sᵀ  [keys, 32] = K · Qᵀ          result   Oᵀ [D, 32] += Vᵀ · Pᵀ
//!   backward dPᵀ [keys, 32] = V · dOᵀ         dQᵀ [D, 32] += Kᵀ · dSᵀ
//!            dV  [keys, D] += Pᵀ · dO         dK [keys, D] += dSᵀ · Q
//!
//! so K, V, Kᵀ and Vᵀ are packed in A-form and the rest in B-form (see [`crate::micro`]).

use std::cell::Cell;
use std::ops::Range;

use super::softmax::{Bias, Mask, PerLane};
use crate::cpu::multiversion;
use crate::gemm::Mat;
use crate::micro::{Aligned, Block, Engine, LANES, Products, ROWS, pack};
use crate::store::Store;

/// Keys in a tile.
pub(super) const KEYS: usize = 64;
/// Products over part of a tile's keys begin at a multiple of this.
const STEP: usize = 32;

/// What all products of an attention share.
#[derive(Clone, Copy)]
pub(super) struct Spec<'a> {
    pub engine: Engine,
    /// D.
    pub width: usize,
    pub scale: f32,
    /// Slope of each query head.
    pub slopes: Option<&'a [f32]>,
    /// Place of each entry of a row, for biases; none where it is its number.
    pub positions: Option<&'a [f32]>,
}

impl Spec<'_> {
    /// scale·log2(e): from products to powers of two.
    pub fn factor(&self) -> f32 {
        self.scale * std::f32::consts::LOG2_E
    }

    /// Place of an entry of a row.
    pub fn position(&self, entry: usize) -> f32 {
        self.positions.map_or(entry as f32, |positions| positions[entry])
    }

    /// D padded for outputs of products.
    pub fn padded(&self) -> usize {
        self.width.next_multiple_of(ROWS)
    }
}

/// How scores and products are made: what every form of attention is told besides its sizes.
#[derive(Clone, Debug)]
pub(super) struct Making {
    pub scale: f32,
    /// Slope of each query head.
    pub slopes: Option<Vec<f32>>,
    /// Place of each entry of a row, for biases; none where it is its number.
    pub positions: Option<Vec<f32>>,
    pub products: Products,
}

impl Making {
    pub fn new(scale: f64) -> Self {
        Self { scale: scale as f32, slopes: None, positions: None, products: Products::F32 }
    }

    /// The same for heads of this width on this machine.
    pub fn spec(&self, width: usize) -> Spec<'_> {
        Spec {
            engine: Engine::new(self.products),
            width,
            scale: self.scale,
            slopes: self.slopes.as_deref(),
            positions: self.positions.as_deref(),
        }
    }
}

/// Up to 32 queries that share keys and values.
#[derive(Clone)]
pub(super) struct Panel {
    /// Queries in use.
    pub count: usize,
    /// Entry and query head of each.
    pub query: [(u32, u32); LANES],
    pub lo: [i32; LANES],
    pub hi: [i32; LANES],
    /// Position of each, for biases.
    positions: PerLane,
    /// Slope of each one's head, times log2(e).
    slopes: PerLane,
    /// Keys that at least one query may see.
    pub keys: Range<usize>,
    /// Keys that every lane sees; a panel that is not full has none.
    common: Range<i32>,
}

impl Panel {
    pub fn new(spec: &Spec<'_>, queries: impl Iterator<Item = Query>) -> Self {
        let mut panel = Self {
            count: 0,
            query: [(0, 0); LANES],
            lo: [0; LANES],
            hi: [0; LANES],
            positions: [0.0; LANES],
            slopes: [0.0; LANES],
            keys: Range { start: usize::MAX, end: 0 },
            common: 0..i32::MAX,
        };
        for (lane, query) in queries.take(LANES).enumerate() {
            panel.count = lane + 1;
            panel.query[lane] = (query.entry as u32, query.head as u32);
            panel.lo[lane] = query.keys.start as i32;
            panel.hi[lane] = query.keys.end as i32;
            panel.positions[lane] = query.position;
            panel.slopes[lane] = spec.slopes.map_or(0.0, |s| s[query.head] * std::f32::consts::LOG2_E);
            panel.keys.start = panel.keys.start.min(query.keys.start);
            panel.keys.end = panel.keys.end.max(query.keys.end);
            panel.common.start = panel.common.start.max(query.keys.start as i32);
            panel.common.end = panel.common.end.min(query.keys.end as i32);
        }
        if panel.count < LANES {
            panel.common.end = 0;
        }
        panel
    }

    /// Lanes that products compute.
    pub fn lanes(&self) -> usize {
        if self.count <= LANES / 2 { LANES / 2 } else { LANES }
    }

    /// The rows of a tile that the panel has to look at, counted in the tile; beginning at a multiple of [`STEP`].
    pub fn rows(&self, tile: &Range<usize>) -> Range<usize> {
        let start = self.keys.start.max(tile.start);
        let end = self.keys.end.min(tile.end);
        if start >= end {
            return 0..0;
        }
        (start - tile.start) / STEP * STEP..end - tile.start
    }

    /// The mask of keys `first..first + count`, where they need one.
    pub fn mask(&self, first: usize, count: usize) -> Option<Mask<'_>> {
        let (first, end) = (first as i32, (first + count) as i32);
        (self.common.start > first || self.common.end < end).then_some(Mask {
            first,
            lo: &self.lo,
            hi: &self.hi,
        })
    }

    /// Whether products over `rows` of a tile touch keys that some lane does not see: masked ones, and the
    /// rest of a tile that the panel sees in part.
    pub fn partial(&self, tile: &Range<usize>, rows: &Range<usize>) -> bool {
        *rows != (0..tile.len()) || self.mask(tile.start, rows.len()).is_some()
    }

    /// The bias of keys at `positions`.
    pub fn bias<'a>(&'a self, spec: &Spec<'_>, positions: &'a [f32]) -> Option<Bias<'a>> {
        spec.slopes.map(|_| Bias { keys: positions, queries: &self.positions, slopes: &self.slopes })
    }

    /// The same for one query and key.
    pub fn bias_of(&self, lane: usize, key_position: f32) -> f32 {
        -self.slopes[lane] * (key_position - self.positions[lane]).abs()
    }

    /// Whether query `lane` sees key `key`.
    pub fn sees(&self, lane: usize, key: usize) -> bool {
        (self.lo[lane]..self.hi[lane]).contains(&(key as i32))
    }
}

/// One query of a panel.
pub(super) struct Query {
    pub entry: usize,
    pub head: usize,
    /// The keys it sees.
    pub keys: Range<usize>,
    pub position: f32,
}

/// Some keys with their values, and where they lie.
#[derive(Clone)]
pub(super) struct Keys<'a, S> {
    /// Numbers of these keys.
    pub range: Range<usize>,
    /// K [keys, D].
    pub k: Mat<'a, S>,
    /// V [keys, D].
    pub v: Mat<'a, S>,
}

/// A tile of at most [`KEYS`] keys, packed.
#[derive(Default)]
pub(super) struct Tile {
    pub range: Range<usize>,
    /// Positions of the keys, for biases.
    pub positions: Vec<f32>,
    /// Whether all of V (and, packed for backward, of K) is finite, once someone has asked.
    finite: Cell<Option<bool>>,
    pub k: Aligned<u32>,
    pub v: Aligned<u32>,
    pub kt: Aligned<u32>,
    pub vt: Aligned<u32>,
}

impl Tile {
    /// Words between the rows of K and V.
    pub fn ld(spec: &Spec<'_>) -> usize {
        // Not a multiple of 4096 bytes for any common width.
        spec.engine.words(spec.width) + 16
    }

    /// Words between the rows of Kᵀ and Vᵀ.
    pub fn ldt(spec: &Spec<'_>) -> usize {
        spec.engine.words(KEYS) + 16
    }

    /// Packs what the forward pass reads.
    pub fn pack_forward<S: Store>(&mut self, spec: &Spec<'_>, keys: &Keys<'_, S>) {
        self.begin(spec, keys);
        form(&mut self.k, spec.engine, keys.k, KEYS, Self::ld(spec));
        form(&mut self.vt, spec.engine, keys.v.t(), spec.padded(), Self::ldt(spec));
    }

    /// Packs what the backward pass reads.
    pub fn pack_backward<S: Store>(&mut self, spec: &Spec<'_>, keys: &Keys<'_, S>) {
        self.begin(spec, keys);
        form(&mut self.k, spec.engine, keys.k, KEYS, Self::ld(spec));
        form(&mut self.v, spec.engine, keys.v, KEYS, Self::ld(spec));
        form(&mut self.kt, spec.engine, keys.k.t(), spec.padded(), Self::ldt(spec));
    }

    /// Whether its values are finite, by `look` where no one has asked yet.
    pub fn finite(&self, look: impl FnOnce() -> bool) -> bool {
        let finite = self.finite.get().unwrap_or_else(look);
        self.finite.set(Some(finite));
        finite
    }

    fn begin<S>(&mut self, spec: &Spec<'_>, keys: &Keys<'_, S>) {
        self.range = keys.range.clone();
        self.finite.set(None);
        self.positions.clear();
        self.positions.extend(keys.range.clone().map(|key| spec.position(key)));
    }
}

/// A-form of `mat` in a buffer of `rows` rows.
fn form<S: Store>(out: &mut Aligned<u32>, engine: Engine, mat: Mat<'_, S>, rows: usize, ld: usize) {
    out.reserve(rows * ld);
    pack::a_form(engine, mat, out, ld);
}

/// Whether every value is finite, in bf16 too.
pub(super) fn finite<S: Store>(mat: Mat<'_, S>) -> bool {
    (0..mat.rows()).all(|row| match mat.col_stride {
        1 => all_finite(mat.row(row)),
        _ => (0..mat.cols()).all(|col| !infinite(mat.at(row, col))),
    })
}

multiversion! {
    fn all_finite<S: Store>(values: &[S]) -> bool {
        let mut bad = 0u32;
        for x in values {
            bad |= u32::from(infinite(*x));
        }
        bad == 0
    }
}

/// NaN, infinity, and what rounds to infinity in bf16.
#[inline(always)]
fn infinite<S: Store>(x: S) -> bool {
    x.get().to_bits() & 0x7fff_ffff >= 0x7f7f_8000
}

/// C [rows, lanes ≤ 32] (+)= A·B with `C`, `A`, `B` given from their first word on.
///
/// # Panics
/// When an operand is shorter than [`Engine::block`] reads or writes.
pub(super) fn product(
    engine: Engine,
    [rows, lanes, words]: [usize; 3],
    (a, lda): (&[u32], usize),
    (b, ldb): (&[u32], usize),
    (c, ldc): (&mut [f32], usize),
    add: bool,
) {
    if rows == 0 || words == 0 {
        return;
    }
    let padded = match engine {
        Engine::F32(_) => rows,
        Engine::Pairs(_) => rows.next_multiple_of(ROWS),
    };
    assert!((padded - 1) * lda + words <= a.len(), "A holds its rows");
    assert!((words - 1) * ldb + lanes <= b.len(), "B holds its words");
    assert!((padded - 1) * ldc + lanes <= c.len(), "C holds its rows");
    // SAFETY: the three lines above; C is a unique borrow; the callers hold `engine.enter()`'s guard.
    unsafe {
        engine.block(Block {
            rows,
            lanes,
            words,
            a: a.as_ptr(),
            lda,
            b: b.as_ptr(),
            ldb,
            c: c.as_mut_ptr(),
            ldc,
            add,
        });
    }
}

/// C [rows, cols] += A·B for any number of columns, at most 32 at a time; `cols` is a multiple of 16.
pub(super) fn wide_product(
    engine: Engine,
    [rows, cols, words]: [usize; 3],
    a: (&[u32], usize),
    (b, ldb): (&[u32], usize),
    (c, ldc): (&mut [f32], usize),
) {
    for first in (0..cols).step_by(LANES) {
        let lanes = LANES.min(cols - first);
        product(engine, [rows, lanes, words], a, (&b[first..], ldb), (&mut c[first..], ldc), true);
    }
}
