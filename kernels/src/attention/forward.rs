//! The forward pass: panels of queries, an online softmax over tiles of keys.
//!
//! Per query, over the key tiles in ascending order: top = the largest score so far, total = Σ e^(score − top), and
//! o = Σ e^(score − top)·v; a larger top rescales what was gathered. The result is o / total, and the row's
//! log-sum-exp top + ln(total) is what backward needs to find the same probabilities again. A query that sees nothing
//! gets zeros.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::panel::{KEYS, Keys, Panel, Query, Spec, Tile, finite, product};
use super::pattern::Plan;
use super::softmax::{PerLane, Running, finish_scores, online, scale_lanes};
use super::view::{Output, View};
use super::{Dims, forward_panels};
use crate::gemm::Mat;
use crate::micro::{Aligned, Engine, LANES, bits, bits_mut, pack, transpose};
use crate::store::Store;

/// One panel with what it has gathered.
pub(super) struct Gathering {
    pub panel: Panel,
    /// Qᵀ in B-form.
    q: Aligned<u32>,
    running: Running,
    /// Oᵀ [D, 32].
    out: Aligned<f32>,
}

/// Per-thread buffers, kept between tasks.
#[derive(Default)]
pub(super) struct Scratch {
    tile: Tile,
    scores: Aligned<f32>,
    p: Aligned<u32>,
    rows: Aligned<f32>,
}

thread_local! {
    pub(super) static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Gathering {
    pub fn new<S: Store>(
        spec: &Spec<'_>,
        panel: Panel,
        b: usize,
        q: View<'_, S>,
        scratch: &mut Scratch,
    ) -> Self {
        let words = spec.engine.words(spec.width);
        let mut packed = Aligned::zeroed(words * LANES);
        scratch.rows.reserve(LANES * spec.width);
        let rows = query_rows(spec, &panel, b, q, &mut scratch.rows[..LANES * spec.width]);
        pack::b_form(spec.engine, rows.t(), &mut packed, LANES, LANES);
        Self { panel, q: packed, running: Running::new(), out: Aligned::zeroed(spec.padded() * LANES) }
    }

    /// Takes in the keys of a tile.
    pub fn gather<S: Store>(
        &mut self,
        spec: &Spec<'_>,
        tile: &Tile,
        v: Mat<'_, S>,
        scores: &mut [f32],
        p: &mut [u32],
    ) {
        let rows = self.panel.rows(&tile.range);
        if rows.is_empty() {
            return;
        }
        let (engine, lanes, count) = (spec.engine, self.panel.lanes(), rows.len());
        let (ld, first) = (Tile::ld(spec), tile.range.start + rows.start);
        product(
            engine,
            [count, lanes, engine.words(spec.width)],
            (&tile.k[rows.start * ld..], ld),
            (&self.q, LANES),
            (scores, LANES),
            false,
        );
        let scores = &mut scores[..count * LANES];
        let mask = self.panel.mask(first, count);
        let bias = self.panel.bias(spec, &tile.positions[rows.clone()]);
        let mut factor = spec.factor();
        if mask.is_some() || bias.is_some() || factor <= 0.0 {
            finish_scores(scores, LANES, factor, bias.as_ref(), mask.as_ref());
            factor = 1.0;
        }
        let mut keep: PerLane = [1.0; LANES];
        if online(scores, factor, &mut self.running, &mut keep) {
            scale_lanes(&mut self.out, &keep);
        }
        if self.panel.partial(&tile.range, &rows) && !tile.finite(|| finite(v)) {
            // 0·inf is NaN: with such values a query may touch only the keys that it sees.
            for (key, row) in rows.clone().zip(scores.chunks_exact(LANES)) {
                for lane in (0..self.panel.count).filter(|l| self.panel.sees(*l, tile.range.start + key)) {
                    for d in 0..spec.width {
                        self.out[d * LANES + lane] += row[lane] * v.at(key, d).get();
                    }
                }
            }
            return;
        }
        let words = engine.words(count);
        let p: &[u32] = match engine {
            Engine::F32(_) => bits(scores),
            Engine::Pairs(_) => {
                pack::b_form(engine, Mat::new(scores, count, LANES), p, LANES, LANES);
                p
            }
        };
        product(
            engine,
            [spec.width, lanes, words],
            (&tile.vt[rows.start / engine.values()..], Tile::ldt(spec)),
            (p, LANES),
            (&mut self.out, LANES),
            true,
        );
    }

    /// Hands out the result of each query, and its log-sum-exp.
    pub fn finish<S: Store>(
        &mut self,
        b: usize,
        out: &Output<'_, S>,
        lse: &Output<'_, f32>,
        rows: &mut Aligned<f32>,
    ) {
        let mut inverse: PerLane = [0.0; LANES];
        for lane in 0..LANES {
            let total = self.running.total[lane];
            inverse[lane] = if total == 0.0 { 0.0 } else { 1.0 / total };
        }
        scale_lanes(&mut self.out, &inverse);
        let padded = self.out.len() / LANES;
        turn(&self.out, rows);
        for lane in 0..self.panel.count {
            let (entry, head) = self.panel.query[lane];
            // SAFETY: each query belongs to exactly one panel, and each panel to one task.
            let (row, lse) = unsafe {
                (out.row(b, entry as usize, head as usize), lse.row(b, entry as usize, head as usize))
            };
            for (value, x) in row.iter_mut().zip(&rows[lane * padded..]) {
                *value = S::put(*x);
            }
            let (top, total) = (self.running.top[lane], self.running.total[lane]);
            lse[0] = (top + total.log2()) * std::f32::consts::LN_2;
        }
    }
}

/// [D, 32] to [32, D]; D is a multiple of 16.
pub(super) fn turn(columns: &[f32], rows: &mut Aligned<f32>) {
    let width = columns.len() / LANES;
    rows.reserve(columns.len());
    for d in (0..width).step_by(16) {
        for lane in (0..LANES).step_by(16) {
            let out = &mut bits_mut(rows)[lane * width + d..];
            transpose(&bits(columns)[d * LANES + lane..], LANES, out, width, 16, 16);
        }
    }
}

/// A panel's queries (or anything of their shape) as rows [32, D] in f32, zero past the last one.
pub(super) fn query_rows<'a, S: Store>(
    spec: &Spec<'_>,
    panel: &Panel,
    b: usize,
    of: View<'_, S>,
    rows: &'a mut [f32],
) -> Mat<'a> {
    let used = panel.count * spec.width;
    for (lane, out) in rows[..used].chunks_exact_mut(spec.width).enumerate() {
        let (entry, head) = panel.query[lane];
        of.read_row(b, entry as usize, head as usize, out);
    }
    rows[used..].fill(0.0);
    Mat::new(rows, LANES, spec.width)
}

/// Runs panels over keys: `tiles` calls back with each tile of keys in ascending order.
pub(super) fn run<'a, S: Store>(
    spec: &Spec<'_>,
    b: usize,
    panels: Vec<Panel>,
    q: View<'_, S>,
    keys: impl Iterator<Item = Keys<'a, S>>,
    out: &Output<'_, S>,
    lse: &Output<'_, f32>,
) {
    let _guard = spec.engine.enter();
    SCRATCH.with_borrow_mut(|scratch| {
        let mut gathering: Vec<Gathering> =
            panels.into_iter().map(|panel| Gathering::new(spec, panel, b, q, scratch)).collect();
        scratch.scores.resize(KEYS * LANES);
        scratch.p.resize(spec.engine.words(KEYS) * LANES);
        let Scratch { tile, scores, p, rows } = scratch;
        for keys in keys {
            if gathering.iter().all(|g| g.panel.rows(&keys.range).is_empty()) {
                continue;
            }
            tile.pack_forward(spec, &keys);
            for g in &mut gathering {
                g.gather(spec, tile, keys.v, scores, p);
            }
        }
        for g in &mut gathering {
            g.finish(b, out, lse, rows);
        }
    });
}

/// Cuts a range of keys into tiles.
pub(super) fn tiles(keys: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = keys.end;
    keys.step_by(KEYS).map(move |start| start..(start + KEYS).min(end))
}

/// The result [B, T, H, D] and the log-sum-exp of every query [B, T, H].
pub(super) fn forward<S: Store>(
    [q, k, v]: [View<'_, S>; 3],
    spec: &Spec<'_>,
    plan: &Plan,
    dims: Dims,
    out: &mut [S],
    lse: &mut [f32],
) {
    let Dims { batch, entries, heads, kv_heads, width } = dims;
    let out = Output::new(out, [batch, entries, heads, width]);
    let lse = Output::new(lse, [batch, entries, heads, 1]);
    let group = heads / kv_heads;
    let step = LANES * forward_panels(group);
    let mut tasks: Vec<(usize, usize, usize)> = (0..batch)
        .flat_map(|b| {
            (0..kv_heads).flat_map(move |g| (0..entries).step_by(step).map(move |first| (b, g, first)))
        })
        .filter(|(b, g, first)| *first < plan.bounds(*b, g * group).len())
        .collect();
    // The longest first, so that no thread is left with one at the end.
    tasks.sort_by_key(|(b, g, first)| {
        std::cmp::Reverse(plan.bounds(*b, g * group).keys(&(*first..first + step)).len())
    });
    tasks.into_par_iter().with_max_len(1).for_each(|(b, kv_head, first)| {
        let mut panels = Vec::new();
        for head in kv_head * group..(kv_head + 1) * group {
            panels.extend(plan_panels(spec, plan, b, head, first..first + step));
        }
        let start = panels.iter().map(|p: &Panel| p.keys.start).min().unwrap_or(0);
        let end = panels.iter().map(|p| p.keys.end).max().unwrap_or(0);
        let keys = tiles(start..end).map(|range| Keys {
            k: k.rows(b, &range, kv_head),
            v: v.rows(b, &range, kv_head),
            range,
        });
        run(spec, b, panels, q, keys, &out, &lse);
    });
}

/// Panels over the valid ones among `queries` of one head.
pub(super) fn plan_panels(
    spec: &Spec<'_>,
    plan: &Plan,
    b: usize,
    head: usize,
    queries: Range<usize>,
) -> impl Iterator<Item = Panel> {
    let bounds = plan.bounds(b, head);
    let end = queries.end.min(bounds.len());
    (queries.start..end).step_by(LANES).map(move |first| {
        Panel::new(
            spec,
            (first..end.min(first + LANES)).map(|entry| Query {
                entry,
                head,
                keys: bounds.lo[entry] as usize..bounds.hi[entry] as usize,
                position: spec.position(entry),
            }),
        )
    })
}
