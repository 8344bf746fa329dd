//! Attention of new entries over caches of keys and values: the form that generation uses.
//!
//! A row is a sequence of its own, and its cache holds the keys and values of all its entries so far, the new ones among
//! them. The new entries of all rows lie one after the other, however many each row has: a long prompt beside rows that
//! take one token, no padding anywhere. Entry i of a row's new ones stands at index past + i of the row, and sees the keys
//! that the pattern gives there. The result is that of [`super::attention`] over the whole row, at its new entries.
//!
//! Two ways, chosen by a row's own number of entries, so that no row feels its neighbours. Several entries go as panels over
//! tiles of keys, as everywhere else. A single one (a step of generation) is bound by reading the cache once: its scores are
//! dot products where the keys lie, nothing is packed, and long caches are cut into pieces of `PIECE` keys that threads
//! share; the pieces' sums are put together by their largest scores (Flash-Decoding, Dao et al. 2023). Pieces are fixed by
//! the row's length: the same inputs give the same bytes on any number of threads. Products of a single entry are f32
//! whatever [`CacheAttention::with_products`] says.
//!
//! Shapes: N new entries of all rows; q and the result [N, H, D]; k and v of all caches [C, Hkv, D], each row's entries side
//! by side in it. Row-major, f32 or bf16. Units: entries. No gradients.
//! Errors: sizes as for attention; a pattern that changes its mind about old entries when the row grows (shifted sparse,
//! bidirectional). Left out: caches that wrap around.

use rayon::prelude::*;

use super::Dims;
use super::forward::{run, tiles};
use super::forward_panels;
use super::panel::{Keys, Making, Panel, Query, Spec};
use super::pattern::{OP, Pattern, lower};
use super::slices::Mixed;
use super::view::{Output, View};
use crate::cpu::multiversion;
use crate::error::{KernelError, Result};
use crate::math::exp2;
use crate::micro::{LANES, Products};
use crate::store::Store;

/// Keys of a cache that one task looks at for a single entry.
const PIECE: usize = 1024;
/// Keys whose scores are made before their values are summed.
const TILE: usize = 64;
/// Values along D that are taken together.
const STEP: usize = 16;
/// Query heads that are taken together.
const TOGETHER: usize = 4;

/// One row of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CachedRow {
    /// New entries.
    pub entries: usize,
    /// Entries of the row before them.
    pub past: usize,
    /// Where the row's first entry lies in the caches, [0, C).
    pub first: usize,
}

/// Keys and values of all rows.
#[derive(Clone, Copy, Debug)]
pub struct Cache<'a, S> {
    /// [C, Hkv, D].
    pub k: &'a [S],
    /// [C, Hkv, D].
    pub v: &'a [S],
}

/// Checked sizes and rows: built once for all blocks of a step.
#[derive(Debug)]
pub struct CacheAttention {
    dims: Dims,
    rows: Vec<CachedRow>,
    /// Where each row's new entries begin in [0, N).
    starts: Vec<usize>,
    pattern: Pattern,
    making: Making,
}

/// A piece of the work: some new entries of a row for one kv head, and where an only one is concerned, some keys.
#[derive(Clone, Copy)]
struct Task {
    row: usize,
    kv_head: usize,
    /// Of the row's new ones.
    entries: (usize, usize),
}

impl CacheAttention {
    /// For rows whose new entries lie one after the other; H query heads, G kv heads, head width D.
    ///
    /// # Errors
    /// See the module.
    pub fn new(
        [heads, kv_heads, width]: [usize; 3],
        scale: f64,
        pattern: Pattern,
        rows: Vec<CachedRow>,
    ) -> Result<Self> {
        let longest = rows.iter().map(|row| row.past.saturating_add(row.entries)).max().unwrap_or(0);
        let dims = Dims { batch: 1, entries: longest, heads, kv_heads, width };
        dims.check(None)?;
        pattern.check()?;
        if !matches!(pattern, Pattern::Dense | Pattern::SlidingWindow { .. }) {
            return Err(KernelError::argument(
                OP,
                format!("expected dense or sliding-window attention over a cache, got {pattern:?}"),
            ));
        }
        let mut starts = Vec::with_capacity(rows.len());
        let mut entries = 0;
        for row in &rows {
            starts.push(entries);
            entries += row.entries;
        }
        let dims = Dims { entries, ..dims };
        Ok(Self { dims, rows, starts, pattern, making: Making::new(scale) })
    }

    /// Computes products of rows with several new entries so.
    pub fn with_products(mut self, products: Products) -> Self {
        self.making.products = products;
        self
    }

    /// Lowers the scores of query head h by slopes\[h\]·|i − j|.
    ///
    /// # Errors
    /// When there is not one finite slope per query head.
    pub fn with_slopes(mut self, slopes: &[f32]) -> Result<Self> {
        self.dims.check(Some(slopes))?;
        self.making.slopes = Some(slopes.to_vec());
        Ok(self)
    }

    /// N.
    pub fn entries(&self) -> usize {
        self.dims.entries
    }

    /// The rows as given.
    pub fn rows(&self) -> &[CachedRow] {
        &self.rows
    }

    /// The keys that a row's new entry sees.
    fn keys(&self, row: CachedRow, entry: usize) -> std::ops::Range<usize> {
        let index = row.past + entry;
        lower(self.pattern, index + 1, false, index)..index + 1
    }

    fn tasks(&self) -> Vec<Task> {
        let step = LANES * forward_panels(self.dims.heads / self.dims.kv_heads);
        let mut tasks = Vec::new();
        for (row, of) in self.rows.iter().enumerate() {
            for kv_head in 0..self.dims.kv_heads {
                let blocks = (0..of.entries).step_by(step);
                tasks.extend(blocks.map(|first| Task {
                    row,
                    kv_head,
                    entries: (first, of.entries.min(first + step)),
                }));
            }
        }
        // The longest first, so that no thread is left with one at the end.
        tasks.sort_by_key(|task| std::cmp::Reverse(self.rows[task.row].past + task.entries.1));
        tasks
    }

    /// The result [N, H, D] and the log-sum-exps [N, H], into `mixed`. The caches hold the new entries too.
    ///
    /// # Panics
    /// When `q` is shorter than its shape, or a cache ends before a row does.
    pub fn forward_into<S: Store>(&self, q: &[S], cache: Cache<'_, S>, mixed: &mut Mixed<S>) {
        let Dims { entries, heads, width, .. } = self.dims;
        mixed.out.resize(entries * heads * width, S::default());
        mixed.lse.resize(entries * heads, 0.0);
        self.forward_to(q, cache, &mut mixed.out, &mut mixed.lse);
    }

    /// As [`CacheAttention::forward_into`], into memory of the caller's: `out` [N, H, D] and `lse` [N, H].
    ///
    /// # Panics
    /// When an operand is shorter than its shape, or a result is of another length.
    pub fn forward_to<S: Store>(&self, q: &[S], cache: Cache<'_, S>, out: &mut [S], lse: &mut [f32]) {
        let Dims { entries, heads, kv_heads, width, .. } = self.dims;
        let held = self.rows.iter().map(|row| row.first + row.past + row.entries).max().unwrap_or(0);
        assert!(q.len() >= entries * heads * width, "q holds its shape");
        let least = held * kv_heads * width;
        assert!(cache.k.len() >= least && cache.v.len() >= least, "the caches hold every row");
        assert_eq!(out.len(), entries * heads * width, "the result holds its shape");
        assert_eq!(lse.len(), entries * heads, "there is one log-sum-exp per query");
        let out = Output::new(out, [1, entries, heads, width]);
        let lse = Output::new(lse, [1, entries, heads, 1]);
        let spec = self.making.spec(width);
        let views = (View::row_major(q, [1, entries, heads, width]), {
            let whole = [1, held, kv_heads, width];
            [View::row_major(cache.k, whole), View::row_major(cache.v, whole)]
        });
        self.tasks().into_par_iter().with_max_len(1).for_each(|task| {
            if self.rows[task.row].entries == 1 {
                self.single(&spec, task, q, cache, &out, &lse);
            } else {
                self.several(&spec, task, views, &out, &lse);
            }
        });
    }

    /// Panels of a block of entries over tiles of the row's keys.
    fn several<S: Store>(
        &self,
        spec: &Spec<'_>,
        task: Task,
        (q, [k, v]): (View<'_, S>, [View<'_, S>; 2]),
        out: &Output<'_, S>,
        lse: &Output<'_, f32>,
    ) {
        let (row, start) = (self.rows[task.row], self.starts[task.row]);
        let group = self.dims.heads / self.dims.kv_heads;
        let heads = task.kv_head * group..(task.kv_head + 1) * group;
        let queries: Vec<(usize, usize)> =
            heads.flat_map(|head| (task.entries.0..task.entries.1).map(move |entry| (head, entry))).collect();
        let panels: Vec<Panel> = queries
            .chunks(LANES)
            .map(|queries| {
                Panel::new(
                    spec,
                    queries.iter().map(|(head, entry)| Query {
                        entry: start + entry,
                        head: *head,
                        keys: self.keys(row, *entry),
                        position: (row.past + entry) as f32,
                    }),
                )
            })
            .collect();
        let first = panels.iter().map(|panel| panel.keys.start).min().unwrap_or(0);
        let end = panels.iter().map(|panel| panel.keys.end).max().unwrap_or(0);
        let keys = tiles(first..end).map(|range| {
            let held = row.first + range.start..row.first + range.end;
            Keys { k: k.rows(0, &held, task.kv_head), v: v.rows(0, &held, task.kv_head), range }
        });
        run(spec, 0, panels, q, keys, out, lse);
    }

    /// A row's only new entry, for the query heads of one kv head.
    fn single<S: Store>(
        &self,
        spec: &Spec<'_>,
        task: Task,
        q: &[S],
        cache: Cache<'_, S>,
        out: &Output<'_, S>,
        lse: &Output<'_, f32>,
    ) {
        let Dims { heads, kv_heads, width, .. } = self.dims;
        let (row, entry) = (self.rows[task.row], self.starts[task.row]);
        let group = heads / kv_heads;
        let first_head = task.kv_head * group;
        let query = Lanes::new(spec, &q[(entry * heads + first_head) * width..], group, first_head, row.past);
        let keys = self.keys(row, 0);
        // Counted from 0, so that where pieces end does not depend on where a window begins.
        let pieces: Vec<std::ops::Range<usize>> = (keys.start / PIECE..keys.end.div_ceil(PIECE))
            .map(|piece| keys.start.max(piece * PIECE)..keys.end.min((piece + 1) * PIECE))
            .collect();
        let stride = kv_heads * width;
        let parts: Vec<Sums> = pieces
            .into_par_iter()
            .with_max_len(1)
            .map(|range| {
                let at = (row.first + range.start) * stride + task.kv_head * width;
                let mut sums = Sums::new(query.padded_heads(), query.ld);
                look(&query, &cache.k[at..], &cache.v[at..], stride, range.start, range.len(), &mut sums);
                sums
            })
            .collect();
        for lane in 0..group {
            let (top, total, values) = together(&parts, lane, query.ld);
            // SAFETY: each query head of an entry belongs to exactly one kv head, and each of those to one task.
            let (row, lse) =
                unsafe { (out.row(0, entry, first_head + lane), lse.row(0, entry, first_head + lane)) };
            let inverse = if total == 0.0 { 0.0 } else { 1.0 / total };
            for (value, x) in row.iter_mut().zip(&values) {
                *value = S::put(x * inverse);
            }
            lse[0] = (top + total.log2()) * std::f32::consts::LN_2;
        }
    }
}

/// The query heads of one kv head at one entry, ready to be multiplied.
struct Lanes {
    /// Rows of `ld` values, scale·log2(e) multiplied in; rows up to a multiple of [`TOGETHER`], values past D zero.
    rows: Vec<f32>,
    /// Values between rows: D, to a multiple of [`STEP`].
    ld: usize,
    /// D.
    width: usize,
    /// Slope of each head times log2(e), where there are slopes.
    slopes: Option<Vec<f32>>,
    /// Where the entry stands.
    position: usize,
}

impl Lanes {
    fn new<S: Store>(spec: &Spec<'_>, q: &[S], heads: usize, first_head: usize, position: usize) -> Self {
        let (width, ld) = (spec.width, spec.width.next_multiple_of(STEP));
        let padded = heads.next_multiple_of(TOGETHER);
        let mut rows = vec![0f32; padded * ld];
        for (row, q) in rows.chunks_exact_mut(ld).zip(q.chunks_exact(width)).take(heads) {
            for (value, q) in row.iter_mut().zip(q) {
                *value = q.get() * spec.factor();
            }
        }
        let slopes = spec.slopes.map(|slopes| {
            let mut own = vec![0f32; padded];
            for (own, slope) in own.iter_mut().zip(&slopes[first_head..first_head + heads]) {
                *own = slope * std::f32::consts::LOG2_E;
            }
            own
        });
        Self { rows, ld, width, slopes, position }
    }

    fn padded_heads(&self) -> usize {
        self.rows.len() / self.ld
    }
}

/// What a piece of the keys gives, per head, in powers of two.
struct Sums {
    /// Largest score.
    top: Vec<f32>,
    /// Σ 2^(score − top).
    total: Vec<f32>,
    /// Σ 2^(score − top)·v, rows of `ld` values.
    values: Vec<f32>,
}

impl Sums {
    fn new(heads: usize, ld: usize) -> Self {
        Self { top: vec![f32::NEG_INFINITY; heads], total: vec![0.0; heads], values: vec![0.0; heads * ld] }
    }
}

/// The sums of all pieces for one head, against the largest score of all.
fn together(parts: &[Sums], lane: usize, ld: usize) -> (f32, f32, Vec<f32>) {
    let top = parts.iter().fold(f32::NEG_INFINITY, |top, part| top.max(part.top[lane]));
    // Scores that are all −inf: 2^−inf is 0 against any finite top.
    let against = if top == f32::NEG_INFINITY { 0.0 } else { top };
    let (mut total, mut values) = (0f32, vec![0f32; ld]);
    for part in parts {
        let keep = exp2(part.top[lane] - against);
        total += keep * part.total[lane];
        for (value, x) in values.iter_mut().zip(&part.values[lane * ld..]) {
            *value += keep * x;
        }
    }
    (top, total, values)
}

multiversion! {
    /// Takes in `count` keys and values, rows of D values `stride` apart, of which the first is number `first` of its row.
    fn look<S: Store>(query: &Lanes, k: &[S], v: &[S], stride: usize, first: usize, count: usize, sums: &mut Sums) {
        let (ld, width) = (query.ld, query.width);
        let mut scores = [[0f32; TILE]; TOGETHER];
        for tile in (0..count).step_by(TILE) {
            let keys = TILE.min(count - tile);
            for heads in (0..query.rows.len() / ld).step_by(TOGETHER) {
                let rows = &query.rows[heads * ld..(heads + TOGETHER) * ld];
                for key in 0..keys {
                    let k = &k[(tile + key) * stride..][..width];
                    let products = dots(rows, ld, k);
                    for i in 0..TOGETHER {
                        scores[i][key] = products[i];
                    }
                }
                if let Some(slopes) = &query.slopes {
                    for i in 0..TOGETHER {
                        for key in 0..keys {
                            let distance = query.position - (first + tile + key);
                            scores[i][key] -= slopes[heads + i] * distance as f32;
                        }
                    }
                }
                for i in 0..TOGETHER {
                    let head = heads + i;
                    let scores = &mut scores[i][..keys];
                    let mut top = sums.top[head];
                    for score in scores.iter() {
                        // A comparison with NaN is false: NaN shows up in the sum instead.
                        top = if *score > top { *score } else { top };
                    }
                    let against = if top == f32::NEG_INFINITY { 0.0 } else { top };
                    let keep = exp2(sums.top[head] - against);
                    let mut parts = [0f32; STEP];
                    for (at, score) in scores.iter_mut().enumerate() {
                        *score = exp2(*score - against);
                        parts[at % STEP] += *score;
                    }
                    sums.top[head] = top;
                    sums.total[head] = sums.total[head] * keep + folded(parts);
                    for value in &mut sums.values[head * ld..(head + 1) * ld] {
                        *value *= keep;
                    }
                }
                let values = &mut sums.values[heads * ld..(heads + TOGETHER) * ld];
                for from in (0..width).step_by(STEP) {
                    add_values(&scores, keys, &v[tile * stride + from..], stride, STEP.min(width - from), ld, &mut values[from..]);
                }
            }
        }
    }
}

/// The products of [`TOGETHER`] rows of queries with one key.
#[inline(always)]
fn dots<S: Store>(rows: &[f32], ld: usize, k: &[S]) -> [f32; TOGETHER] {
    let mut lanes = [[0f32; STEP]; TOGETHER];
    let whole = k.len() / STEP * STEP;
    for at in (0..whole).step_by(STEP) {
        let mut key = [0f32; STEP];
        for i in 0..STEP {
            key[i] = k[at + i].get();
        }
        for (row, lanes) in lanes.iter_mut().enumerate() {
            let q = &rows[row * ld + at..][..STEP];
            for i in 0..STEP {
                lanes[i] += q[i] * key[i];
            }
        }
    }
    let mut sums = lanes.map(folded);
    for (row, sum) in sums.iter_mut().enumerate() {
        for at in whole..k.len() {
            *sum += rows[row * ld + at] * k[at].get();
        }
    }
    sums
}

/// The sum of the lanes, halves onto halves.
#[inline(always)]
fn folded(mut lanes: [f32; STEP]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// Adds Σ p·v of some keys for [`TOGETHER`] heads to `width` ≤ [`STEP`] values of each.
#[inline(always)]
fn add_values<S: Store>(
    p: &[[f32; TILE]; TOGETHER],
    keys: usize,
    v: &[S],
    stride: usize,
    width: usize,
    ld: usize,
    values: &mut [f32],
) {
    let mut lanes = [[0f32; STEP]; TOGETHER];
    for key in 0..keys {
        let v = &v[key * stride..][..width];
        let mut value = [0f32; STEP];
        if width == STEP {
            for i in 0..STEP {
                value[i] = v[i].get();
            }
        } else {
            for (value, v) in value.iter_mut().zip(v) {
                *value = v.get();
            }
        }
        for (head, lanes) in lanes.iter_mut().enumerate() {
            for i in 0..STEP {
                lanes[i] += p[head][key] * value[i];
            }
        }
    }
    for (head, lanes) in lanes.iter().enumerate() {
        for (value, lane) in values[head * ld..].iter_mut().zip(&lanes[..width]) {
            *value += lane;
        }
    }
}
