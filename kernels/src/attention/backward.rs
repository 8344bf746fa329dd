//! The backward pass: probabilities are found again from the log-sum-exp, tile by tile.
//!
//! Source: Dao 2023. With P = e^(scale·QKᵀ − lse) and δ_i = Σ_d dO_id·O_id:
//!   dV = PᵀdO,   dP = dO·Vᵀ,   dS = P∘(dP − δ)·scale,   dQ = dS·K,   dK = dSᵀQ.
//!
//! Order: entries are cut into blocks, and round r handles the pairs (query block x, key block x − r, wrapping
//! around). Within a round no two tasks share a query block or a key block of the same row and kv head, so every
//! output has one owner at a time, and the sums are formed in the order of the rounds whatever the scheduling.
//!
//! Inside a pair, up to [`PANELS`] panels of one head are taken together, so that dV and dK are sums over 128 queries
//! at a time.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::Dims;
use super::forward::{plan_panels, query_rows, tiles, turn};
use super::panel::{KEYS, Keys, Panel, Spec, Tile, finite, product, wide_product};
use super::pattern::Plan;
use super::softmax::{PerLane, backward as softmax_backward, finish_scores};
use super::view::{Output, View};
use crate::gemm::Mat;
use crate::math::{add_row, dot};
use crate::micro::{Aligned, Engine, LANES, ROWS, bits, pack};
use crate::store::Store;

/// Entries in a block: more of them share more packing, fewer give more tasks. In tiles a product is so fast that packing
/// decides: with 16 kv heads at 8192 entries, 1024 take a quarter less time than 512.
fn block_entries(entries: usize) -> usize {
    match entries {
        0..=1024 => 256,
        1025..=2048 => 512,
        2049..=8192 => 1024,
        _ => 2048,
    }
}

/// Panels taken together.
pub(super) const PANELS: usize = 4;

/// The operands of a backward pass.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a, S> {
    pub q: View<'a, S>,
    pub k: View<'a, S>,
    pub v: View<'a, S>,
    /// Gradient of the result.
    pub d_out: View<'a, f32>,
    /// Log-sum-exp [B, T, H].
    pub lse: &'a [f32],
    /// δ [B, T, H].
    pub delta: &'a [f32],
}

/// Panels of one head, packed.
#[derive(Default)]
pub(super) struct Queries {
    pub panels: Vec<Panel>,
    lse: Vec<PerLane>,
    delta: Vec<PerLane>,
    /// Qᵀ and dOᵀ in B-form, a panel after the other.
    qt: Aligned<u32>,
    dot: Aligned<u32>,
    /// Q and dO in B-form over the queries, a panel after the other.
    q: Aligned<u32>,
    d_out: Aligned<u32>,
    /// dQᵀ [D, 32] of each panel.
    dq: Aligned<f32>,
    finite: bool,
    /// Q and dO [32, D] of each panel, as they came.
    rows: Aligned<f32>,
    gradient_rows: Aligned<f32>,
}

/// Per-thread buffers of products between queries and a tile.
#[derive(Default)]
pub(super) struct Products {
    scores: Aligned<f32>,
    ds: Aligned<f32>,
    p_a: Aligned<u32>,
    ds_a: Aligned<u32>,
    ds_b: Aligned<u32>,
}

/// Per-thread buffers, kept between tasks.
#[derive(Default)]
pub(super) struct Scratch {
    pub tiles: Vec<Tile>,
    pub queries: Queries,
    pub products: Products,
    pub dk: Aligned<f32>,
    pub dv: Aligned<f32>,
    pub rows: Aligned<f32>,
}

thread_local! {
    pub(super) static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// δ [B, T, H] from contiguous [B, T, H, D].
pub(super) fn delta<S: Store>(out: &[S], d_out: &[f32], width: usize) -> Vec<f32> {
    out.par_chunks_exact(width)
        .with_min_len(256)
        .zip(d_out.par_chunks_exact(width))
        .map(|(out, d_out)| dot(out, d_out))
        .collect()
}

/// Words of a panel's queries as depth.
fn panel_words(engine: Engine) -> usize {
    LANES / engine.values()
}

/// Whether rows [32, D] of f32 are their own B-form over the queries.
fn rows_are_packed(spec: &Spec<'_>) -> bool {
    matches!(spec.engine, Engine::F32(_)) && spec.padded() == spec.width
}

impl Queries {
    /// Packs panels of row `b`.
    pub fn pack<S: Store>(
        &mut self,
        spec: &Spec<'_>,
        panels: Vec<Panel>,
        b: usize,
        x: Operands<'_, S>,
        [entries, heads]: [usize; 2],
    ) {
        let (engine, depth, padded) = (spec.engine, spec.engine.words(spec.width), spec.padded());
        self.panels = panels;
        let n = self.panels.len();
        self.qt.resize(PANELS * depth * LANES);
        self.dot.resize(PANELS * depth * LANES);
        self.q.resize(PANELS * panel_words(engine) * padded);
        self.d_out.resize(PANELS * panel_words(engine) * padded);
        self.dq.resize_zeroed(n * padded * LANES);
        self.rows.resize(n * LANES * spec.width);
        self.gradient_rows.resize(n * LANES * spec.width);
        self.finite = true;
        self.lse.clear();
        self.delta.clear();
        for (i, panel) in self.panels.iter().enumerate() {
            let rows = i * LANES * spec.width..(i + 1) * LANES * spec.width;
            let q = query_rows(spec, panel, b, x.q, &mut self.rows[rows.clone()]);
            let d_out = query_rows(spec, panel, b, x.d_out, &mut self.gradient_rows[rows]);
            self.finite &= finite(q) && finite(d_out);
            pack::b_form(engine, q.t(), &mut self.qt[i * depth * LANES..][..depth * LANES], LANES, LANES);
            pack::b_form(
                engine,
                d_out.t(),
                &mut self.dot[i * depth * LANES..][..depth * LANES],
                LANES,
                LANES,
            );
            if !rows_are_packed(spec) {
                let words = panel_words(engine) * padded;
                pack::b_form(engine, q, &mut self.q[i * words..][..words], padded, padded);
                pack::b_form(engine, d_out, &mut self.d_out[i * words..][..words], padded, padded);
            }
            let (mut lse, mut delta) = ([0f32; LANES], [0f32; LANES]);
            for lane in 0..panel.count {
                let (entry, head) = panel.query[lane];
                let at = (b * entries + entry as usize) * heads + head as usize;
                // A query that saw nothing has none; any finite value will do.
                lse[lane] =
                    if x.lse[at] == f32::NEG_INFINITY { 0.0 } else { x.lse[at] * std::f32::consts::LOG2_E };
                delta[lane] = x.delta[at];
            }
            self.lse.push(lse);
            self.delta.push(delta);
        }
    }

    /// Adds dQ to the output rows.
    ///
    /// # Safety
    /// No one else holds the rows of these queries.
    pub unsafe fn finish(&self, spec: &Spec<'_>, b: usize, out: &Output<'_, f32>, rows: &mut Aligned<f32>) {
        for (panel, dq) in self.panels.iter().zip(self.dq.chunks_exact(spec.padded() * LANES)) {
            turn(dq, rows);
            for lane in 0..panel.count {
                let (entry, head) = panel.query[lane];
                let row = &rows[lane * spec.padded()..][..spec.width];
                // SAFETY: the caller's promise.
                add_row(unsafe { out.row(b, entry as usize, head as usize) }, row);
            }
        }
    }

    /// Adds what meeting the keys of a tile gives: dQ here, and dK and dV [keys, padded D] where they are wanted.
    pub fn meet<S: Store>(
        &mut self,
        spec: &Spec<'_>,
        tile: &Tile,
        keys: &Keys<'_, S>,
        products: &mut Products,
        gradients: Option<(&mut [f32], &mut [f32])>,
    ) {
        let rows: Vec<Range<usize>> = self.panels.iter().map(|p| p.rows(&tile.range)).collect();
        let Some(first) = rows.iter().position(|r| !r.is_empty()) else { return };
        let last = rows.iter().rposition(|r| !r.is_empty()).unwrap_or(first);
        let partial = |i: usize| self.panels[i].partial(&tile.range, &rows[i]);
        if (first..=last).any(partial) && !(self.finite && tile.finite(|| finite(keys.k) && finite(keys.v))) {
            // 0·inf is NaN: with such values a query and a key may meet only where one sees the other.
            return self.meet_by_hand(spec, tile, keys, gradients);
        }
        let engine = spec.engine;
        // Rows of dK and dV that these panels touch; up to a whole tile where the engine works on such.
        let met = || rows[first..=last].iter().filter(|r| !r.is_empty());
        let start = met().map(|r| r.start).min().unwrap_or(0);
        let end = met().map(|r| r.end).max().unwrap_or(0).next_multiple_of(ROWS);
        products.prepare(engine);
        for i in first..=last {
            products.clear(engine, i, start..end, &rows[i]);
            if !rows[i].is_empty() {
                self.meet_panel(spec, tile, i, &rows[i], products);
            }
        }
        let Some((dk, dv)) = gradients else { return };
        let (words, padded) = (panel_words(engine), spec.padded());
        let depth = (last + 1 - first) * words;
        let of = first * words * padded..(last + 1) * words * padded;
        let sizes = [end - start, padded, depth];
        let (q, d_out) = match rows_are_packed(spec) {
            true => (bits(&self.rows), bits(&self.gradient_rows)),
            false => (&self.q[..], &self.d_out[..]),
        };
        let (p, ds, lda) = products.a_forms(engine);
        let at = start * lda + first * words;
        wide_product(
            engine,
            sizes,
            (&p[at..], lda),
            (&d_out[of.clone()], padded),
            (&mut dv[start * padded..], padded),
        );
        wide_product(engine, sizes, (&ds[at..], lda), (&q[of], padded), (&mut dk[start * padded..], padded));
    }

    /// P and dS of one panel and the tile's keys `rows`, and what they add to dQ.
    fn meet_panel(
        &mut self,
        spec: &Spec<'_>,
        tile: &Tile,
        i: usize,
        rows: &Range<usize>,
        products: &mut Products,
    ) {
        let (engine, depth, padded) = (spec.engine, spec.engine.words(spec.width), spec.padded());
        let panel = &self.panels[i];
        let (count, lanes, ld) = (rows.len(), panel.lanes(), Tile::ld(spec));
        let of = i * depth * LANES..(i + 1) * depth * LANES;
        let (ld_s, at) = products.place(engine, i, rows.start);
        let sizes = [count, lanes, depth];
        for (packed, other, out) in
            [(&tile.k, &self.qt, &mut products.scores), (&tile.v, &self.dot, &mut products.ds)]
        {
            product(
                engine,
                sizes,
                (&packed[rows.start * ld..], ld),
                (&other[of.clone()], LANES),
                (&mut out[at..], ld_s),
                false,
            );
        }
        let used = at..at + (count - 1) * ld_s + LANES;
        let (p, ds) = (&mut products.scores[used.clone()], &mut products.ds[used]);
        let mask = panel.mask(tile.range.start + rows.start, count);
        let mut factor = spec.factor();
        if let Some(bias) = panel.bias(spec, &tile.positions[rows.clone()]) {
            finish_scores(p, ld_s, factor, Some(&bias), None);
            factor = 1.0;
        }
        softmax_backward(p, ds, ld_s, factor, spec.scale, &self.lse[i], &self.delta[i], mask.as_ref());
        let ds_b = match engine {
            Engine::F32(_) => (bits(ds), ld_s),
            Engine::Pairs(_) => {
                let (p, ds) = (Mat::new(p, count, LANES), Mat::new(ds, count, LANES));
                let ld = PANELS * panel_words(engine);
                let at = rows.start * ld + i * panel_words(engine);
                pack::a_form(engine, p, &mut products.p_a[at..], ld);
                pack::a_form(engine, ds, &mut products.ds_a[at..], ld);
                pack::b_form(engine, ds, &mut products.ds_b, LANES, LANES);
                (&products.ds_b[..], LANES)
            }
        };
        product(
            engine,
            [spec.width, lanes, engine.words(count)],
            (&tile.kt[rows.start / engine.values()..], Tile::ldt(spec)),
            ds_b,
            (&mut self.dq[i * padded * LANES..][..padded * LANES], LANES),
            true,
        );
    }

    /// The same in plain loops over the pairs that see each other.
    fn meet_by_hand<S: Store>(
        &mut self,
        spec: &Spec<'_>,
        tile: &Tile,
        keys: &Keys<'_, S>,
        mut gradients: Option<(&mut [f32], &mut [f32])>,
    ) {
        let (width, padded) = (spec.width, spec.padded());
        // The probabilities of the forward pass are found again only from the values that it multiplied.
        let engine = spec.engine;
        let k = |at: usize, d: usize| engine.value(keys.k.at(at, d));
        for (i, panel) in self.panels.iter().enumerate() {
            for lane in 0..panel.count {
                let row = (i * LANES + lane) * width;
                let (q, d_out) = (&self.rows[row..][..width], &self.gradient_rows[row..][..width]);
                for (at, key) in tile.range.clone().enumerate() {
                    if !panel.sees(lane, key) {
                        continue;
                    }
                    let (mut score, mut dp) = (0f32, 0f32);
                    for d in 0..width {
                        score += engine.value(q[d]) * k(at, d);
                        dp += engine.value(d_out[d]) * engine.value(keys.v.at(at, d));
                    }
                    let score = score * spec.factor() + panel.bias_of(lane, tile.positions[at]);
                    let p = (score - self.lse[i][lane]).exp2();
                    let ds = p * (dp - self.delta[i][lane]) * spec.scale;
                    for d in 0..width {
                        self.dq[(i * padded + d) * LANES + lane] += ds * k(at, d);
                        if let Some((dk, dv)) = &mut gradients {
                            dk[at * padded + d] += ds * q[d];
                            dv[at * padded + d] += p * d_out[d];
                        }
                    }
                }
            }
        }
    }
}

impl Products {
    fn prepare(&mut self, engine: Engine) {
        let wide = PANELS * LANES;
        self.scores.resize(KEYS * wide);
        self.ds.resize(KEYS * wide);
        if let Engine::Pairs(_) = engine {
            self.p_a.resize(KEYS * PANELS * panel_words(engine));
            self.ds_a.resize(KEYS * PANELS * panel_words(engine));
            self.ds_b.resize(engine.words(KEYS) * LANES);
        }
    }

    /// Distance between rows of scores, and where those of panel `i` begin at row `row`. f32 words are used as they are,
    /// so each panel has its columns of one wide block; pairs are packed from one panel's block.
    fn place(&self, engine: Engine, i: usize, row: usize) -> (usize, usize) {
        match engine {
            Engine::F32(_) => (PANELS * LANES, row * PANELS * LANES + i * LANES),
            Engine::Pairs(_) => (LANES, row * LANES),
        }
    }

    /// Zeroes what panel `i` does not write of `rows`: all but `written`.
    fn clear(&mut self, engine: Engine, i: usize, rows: Range<usize>, written: &Range<usize>) {
        let words = panel_words(engine);
        for row in rows.filter(|row| !written.contains(row)) {
            match engine {
                Engine::F32(_) => {
                    let at = row * PANELS * LANES + i * LANES;
                    self.scores[at..at + LANES].fill(0.0);
                    self.ds[at..at + LANES].fill(0.0);
                }
                Engine::Pairs(_) => {
                    let at = (row * PANELS + i) * words;
                    self.p_a[at..at + words].fill(0);
                    self.ds_a[at..at + words].fill(0);
                }
            }
        }
    }

    /// P and dS in A-form, and the words between their rows.
    fn a_forms(&self, engine: Engine) -> (&[u32], &[u32], usize) {
        match engine {
            Engine::F32(_) => (bits(&self.scores), bits(&self.ds), PANELS * LANES),
            Engine::Pairs(_) => (&self.p_a, &self.ds_a, PANELS * panel_words(engine)),
        }
    }
}

/// Gradients of q, k and v, written over what is there.
pub(super) fn backward<S: Store>(
    x: Operands<'_, S>,
    spec: &Spec<'_>,
    plan: &Plan,
    dims: Dims,
    [dq, dk, dv]: [&mut [f32]; 3],
) {
    let Dims { batch, entries, heads, kv_heads, width } = dims;
    for gradient in [&mut *dq, &mut *dk, &mut *dv] {
        gradient.par_chunks_mut(1 << 16).for_each(|part| part.fill(0.0));
    }
    let out = [
        Output::new(dq, [batch, entries, heads, width]),
        Output::new(dk, [batch, entries, kv_heads, width]),
        Output::new(dv, [batch, entries, kv_heads, width]),
    ];
    let group = heads / kv_heads;
    let size = block_entries(entries);
    let blocks = entries.div_ceil(size);
    let range = |block: usize| block * size..((block + 1) * size).min(entries);
    for round in 0..blocks {
        let mut tasks = Vec::new();
        for b in 0..batch {
            for kv_head in 0..kv_heads {
                for block in 0..blocks {
                    let (queries, keys) = (range(block), range((block + blocks - round) % blocks));
                    let meets = |head: usize| {
                        let seen = plan.bounds(b, head).keys(&queries);
                        seen.start.max(keys.start) < seen.end.min(keys.end)
                    };
                    if (kv_head * group..(kv_head + 1) * group).any(meets) {
                        tasks.push((b, kv_head, queries, keys));
                    }
                }
            }
        }
        tasks.into_par_iter().with_max_len(1).for_each(|(b, kv_head, queries, keys)| {
            let _guard = spec.engine.enter();
            SCRATCH.with_borrow_mut(|scratch| {
                pair(x, spec, plan, dims, b, kv_head, &queries, &keys, &out, scratch)
            });
        });
    }
}

/// One block of queries against one block of keys, for the query heads of one kv head.
fn pair<S: Store>(
    x: Operands<'_, S>,
    spec: &Spec<'_>,
    plan: &Plan,
    dims: Dims,
    b: usize,
    kv_head: usize,
    queries: &Range<usize>,
    keys: &Range<usize>,
    out: &[Output<'_, f32>; 3],
    scratch: &mut Scratch,
) {
    let (group, padded) = (dims.heads / dims.kv_heads, spec.padded());
    let Scratch { tiles: packed, queries: block, products, dk, dv, rows } = scratch;
    for gradient in [&mut *dk, &mut *dv] {
        gradient.resize_zeroed((keys.len() + ROWS) * padded);
    }
    let parts: Vec<Keys<'_, S>> = tiles(keys.clone())
        .map(|range| Keys { k: x.k.rows(b, &range, kv_head), v: x.v.rows(b, &range, kv_head), range })
        .collect();
    packed.resize_with(packed.len().max(parts.len()), Tile::default);
    for (tile, part) in packed.iter_mut().zip(&parts) {
        tile.pack_backward(spec, part);
    }
    for head in kv_head * group..(kv_head + 1) * group {
        let panels: Vec<Panel> = plan_panels(spec, plan, b, head, queries.clone())
            .filter(|panel| !panel.rows(keys).is_empty())
            .collect();
        for panels in panels.chunks(PANELS) {
            block.pack(spec, panels.to_vec(), b, x, [dims.entries, dims.heads]);
            for (part, tile) in parts.iter().zip(packed.iter()) {
                let at = (part.range.start - keys.start) * padded;
                block.meet(spec, tile, part, products, Some((&mut dk[at..], &mut dv[at..])));
            }
            // SAFETY: in this round only this task has queries of this block, row and kv head.
            unsafe { block.finish(spec, b, &out[0], rows) };
        }
    }
    for (row, t) in keys.clone().enumerate() {
        // SAFETY: in this round only this task has keys of this block, row and kv head.
        let (dk_row, dv_row) = unsafe { (out[1].row(b, t, kv_head), out[2].row(b, t, kv_head)) };
        add_row(dk_row, &dk[row * padded..][..spec.width]);
        add_row(dv_row, &dv[row * padded..][..spec.width]);
    }
}
