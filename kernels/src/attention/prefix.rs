//! Attention of short rows that continue one document: the shared-prefix form.
//!
//! Row r of n continues the document's first `prefix[r]` entries with R entries of its own. Everything before is the same
//! in all rows, so its keys and values are taken from one pass over the document, and its queries are not run again:
//! n·R queries instead of n·(T + R). The result is that of [`super::attention`] over the document's first entries followed
//! by the row's own, filled up to the document's length, at the row's own entries.
//!
//! Query i of row r stands at index prefix\[r\] + i of that sequence, and sees the keys max(start, lower\[r\]) ..= itself,
//! with the start that the pattern gives there: of the document as far as the prefix goes, then of the row itself. Groups are
//! those of the document's length where the row ends before it, so that a group that is shorter than the document is not
//! taken for dense attention in a row that fits into it.
//! Gradients are those of the rows' q, k and v; the document is a constant.
//!
//! Shapes: q [n, R, H, D], k and v [n, R, Hkv, D], the document's k and v [T, Hkv, D], all row-major. Units: entries.
//! Errors: sizes as for attention; a prefix longer than the document, a lower bound beyond the prefix; a pattern that is not
//! causal. Left out: gradients for the document.

use rayon::prelude::*;

use super::backward::{Operands, Queries, SCRATCH, Scratch, delta};
use super::forward::{run, tiles};
use super::panel::Tile;
use super::panel::{Keys, Making, Panel, Query, Spec};
use super::pattern::{OP, Pattern, lower, shifted};
use super::slices::{Gradients, Mixed};
use super::view::{Output, View};
use super::{Dims, backward::PANELS};
use crate::error::{KernelError, Result};
use crate::math::add_row;
use crate::micro::{LANES, Products, ROWS};
use crate::store::Store;

/// Where rows continue their document.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Continuations {
    /// Entries of the document before each row.
    pub prefix: Vec<usize>,
    /// Valid entries of each row; none means all R.
    pub lengths: Option<Vec<usize>>,
    /// The first entry of the document that each row may see, for example the start of its segment; none means 0.
    pub lower: Option<Vec<usize>>,
}

impl Continuations {
    /// Refuses what [`PrefixAttention::new`] says.
    pub(crate) fn check(&self, dims: Dims, document: usize, pattern: Pattern) -> Result<()> {
        let refuse = |message: String| Err(KernelError::argument(OP, message));
        let Dims { batch: n, entries, .. } = dims;
        dims.check(None)?;
        pattern.check()?;
        if matches!(pattern, Pattern::Bidirectional | Pattern::ShiftedBidirectional { .. }) {
            return refuse(
                "expected a causal pattern for rows that continue a document, got bidirectional".into(),
            );
        }
        let counts = [
            ("prefixes", Some(&self.prefix)),
            ("row lengths", self.lengths.as_ref()),
            ("lower bounds", self.lower.as_ref()),
        ];
        for (what, values) in counts {
            if let Some(values) = values.filter(|values| values.len() != n) {
                return refuse(format!("expected {n} {what}, got {}", values.len()));
            }
        }
        for (row, prefix) in self.prefix.iter().enumerate() {
            if *prefix > document {
                return refuse(format!(
                    "row {row}: expected a prefix of at most T = {document}, got {prefix}"
                ));
            }
            if let Some(length) = self.lengths.as_ref().map(|l| l[row]).filter(|length| *length > entries) {
                return refuse(format!(
                    "row {row}: expected a length of at most R = {entries}, got {length}"
                ));
            }
            if let Some(lower) = self.lower.as_ref().map(|l| l[row]).filter(|lower| lower > prefix) {
                return refuse(format!(
                    "row {row}: expected a lower bound of at most its prefix {prefix}, got {lower}"
                ));
            }
        }
        Ok(())
    }
}

/// The document's keys and values.
#[derive(Clone, Copy, Debug)]
pub struct Document<'a, S> {
    /// [T, Hkv, D].
    pub k: &'a [S],
    /// [T, Hkv, D].
    pub v: &'a [S],
}

/// The rows' own operands.
#[derive(Clone, Copy, Debug)]
pub struct Own<'a, S> {
    /// [n, R, H, D].
    pub q: &'a [S],
    /// [n, R, Hkv, D].
    pub k: &'a [S],
    /// [n, R, Hkv, D].
    pub v: &'a [S],
}

/// Checked sizes and rows: built once for all blocks of a pass.
#[derive(Debug)]
pub struct PrefixAttention {
    dims: Dims,
    document: usize,
    rows: Continuations,
    pattern: Pattern,
    making: Making,
}

impl PrefixAttention {
    /// For n rows of R entries, H query heads, G kv heads and head width D, continuing a document of `document` entries.
    ///
    /// # Errors
    /// See the module.
    pub fn new(
        [n, entries, heads, kv_heads, width]: [usize; 5],
        document: usize,
        scale: f64,
        pattern: Pattern,
        rows: Continuations,
    ) -> Result<Self> {
        let dims = Dims { batch: n, entries, heads, kv_heads, width };
        rows.check(dims, document, pattern)?;
        Ok(Self { dims, document, rows, pattern, making: Making::new(scale) })
    }

    /// Computes products so.
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

    fn length(&self, row: usize) -> usize {
        self.rows.lengths.as_ref().map_or(self.dims.entries, |lengths| lengths[row])
    }

    /// Panels of the heads that share a kv head: heads with the same groups side by side, so that no lane stays empty
    /// between them.
    fn panels(&self, spec: &Spec<'_>, row: usize, kv_head: usize) -> Vec<Panel> {
        let (prefix, length) = (self.rows.prefix[row], self.length(row));
        let floor = self.rows.lower.as_ref().map_or(0, |lower| lower[row]);
        let whole = self.document.max(prefix + length);
        let group = self.dims.heads / self.dims.kv_heads;
        let mut panels = Vec::new();
        for of_shift in [false, true] {
            let heads: Vec<usize> = (kv_head * group..(kv_head + 1) * group)
                .filter(|head| shifted(*head, self.dims.heads) == of_shift)
                .collect();
            let queries: Vec<(usize, usize)> =
                heads.iter().flat_map(|head| (0..length).map(move |entry| (*head, entry))).collect();
            panels.extend(queries.chunks(LANES).map(|queries| {
                Panel::new(
                    spec,
                    queries.iter().map(|(head, entry)| {
                        let index = prefix + entry;
                        let start = lower(self.pattern, whole, of_shift, index).max(floor);
                        Query { entry: *entry, head: *head, keys: start..index + 1, position: index as f32 }
                    }),
                )
            }));
        }
        panels
    }

    /// The keys that `panels` see, tile by tile: the document's, then the row's own.
    fn keys<'a, S: Store>(
        &self,
        row: usize,
        kv_head: usize,
        panels: &[Panel],
        document: [View<'a, S>; 2],
        own: [View<'a, S>; 2],
    ) -> impl Iterator<Item = Keys<'a, S>> + use<'a, S> {
        let (prefix, length) = (self.rows.prefix[row], self.length(row));
        let start = panels.iter().map(|panel| panel.keys.start).min().unwrap_or(prefix);
        let of_document = tiles(start.min(prefix)..prefix).map(move |range| Keys {
            k: document[0].rows(0, &range, kv_head),
            v: document[1].rows(0, &range, kv_head),
            range,
        });
        let of_row = tiles(0..length).map(move |range| Keys {
            k: own[0].rows(row, &range, kv_head),
            v: own[1].rows(row, &range, kv_head),
            range: prefix + range.start..prefix + range.end,
        });
        of_document.chain(of_row)
    }

    fn views<'a, S: Store>(
        &self,
        own: Own<'a, S>,
        document: Document<'a, S>,
    ) -> ([View<'a, S>; 3], [View<'a, S>; 2]) {
        let Dims { batch, entries, heads, kv_heads, width } = self.dims;
        let (kv, whole) = ([batch, entries, kv_heads, width], [1, self.document, kv_heads, width]);
        let own = [
            View::row_major(own.q, [batch, entries, heads, width]),
            View::row_major(own.k, kv),
            View::row_major(own.v, kv),
        ];
        (own, [View::row_major(document.k, whole), View::row_major(document.v, whole)])
    }

    fn tasks(&self) -> Vec<(usize, usize)> {
        let rows = (0..self.dims.batch).filter(|row| self.length(*row) > 0);
        let mut tasks: Vec<(usize, usize)> =
            rows.flat_map(|row| (0..self.dims.kv_heads).map(move |kv_head| (row, kv_head))).collect();
        // The longest first, so that no thread is left with one at the end.
        tasks.sort_by_key(|(row, _)| std::cmp::Reverse(self.rows.prefix[*row]));
        tasks
    }

    /// The forward pass, into `mixed`: out [n, R, H, D] and lse [n, R, H]; zeros past a row's length.
    ///
    /// # Panics
    /// When an operand is shorter than its shape.
    pub fn forward_into<S: Store>(&self, own: Own<'_, S>, document: Document<'_, S>, mixed: &mut Mixed<S>) {
        let Dims { batch, entries, heads, width, .. } = self.dims;
        mixed.out.resize(batch * entries * heads * width, S::default());
        mixed.lse.resize(batch * entries * heads, 0.0);
        self.forward_to(own, document, &mut mixed.out, &mut mixed.lse);
    }

    /// As [`PrefixAttention::forward_into`], into memory of the caller's: `out` [n, R, H, D] and `lse` [n, R, H].
    ///
    /// # Panics
    /// When an operand is shorter than its shape, or a result is of another length.
    pub fn forward_to<S: Store>(
        &self,
        own: Own<'_, S>,
        document: Document<'_, S>,
        out: &mut [S],
        lse: &mut [f32],
    ) {
        let Dims { batch, entries, heads, width, .. } = self.dims;
        let ([q, k, v], whole) = self.views(own, document);
        assert_eq!(out.len(), batch * entries * heads * width, "the result holds its shape");
        assert_eq!(lse.len(), batch * entries * heads, "there is one log-sum-exp per query");
        if self.rows.lengths.is_some() {
            out.fill(S::default());
            lse.fill(0.0);
        }
        let out = Output::new(out, [batch, entries, heads, width]);
        let lse = Output::new(lse, [batch, entries, heads, 1]);
        let spec = self.making.spec(self.dims.width);
        self.tasks().into_par_iter().with_max_len(1).for_each(|(row, kv_head)| {
            let panels = self.panels(&spec, row, kv_head);
            let keys = self.keys(row, kv_head, &panels, whole, [k, v]);
            run(&spec, row, panels, q, keys, &out, &lse);
        });
    }

    /// The backward pass for the gradient `d_out` [n, R, H, D], into `gradients` of the rows' q, k and v.
    ///
    /// # Panics
    /// When an operand is shorter than its shape.
    pub fn backward_into<S: Store>(
        &self,
        own: Own<'_, S>,
        document: Document<'_, S>,
        mixed: &Mixed<S>,
        d_out: &[f32],
        gradients: &mut Gradients,
    ) {
        let Dims { batch, entries, heads, kv_heads, width } = self.dims;
        gradients.q.resize(batch * entries * heads * width, 0.0);
        gradients.k.resize(batch * entries * kv_heads * width, 0.0);
        gradients.v.resize(batch * entries * kv_heads * width, 0.0);
        let Gradients { q, k, v } = gradients;
        self.backward_to(own, document, &mixed.out, &mixed.lse, d_out, [q, k, v]);
    }

    /// As [`PrefixAttention::backward_into`], for results in memory of the caller's, into the gradients of the rows' q, k and v
    /// there.
    ///
    /// # Panics
    /// When an operand is shorter than its shape, or a gradient is of another length.
    pub fn backward_to<S: Store>(
        &self,
        own: Own<'_, S>,
        document: Document<'_, S>,
        out: &[S],
        lse: &[f32],
        d_out: &[f32],
        into: [&mut [f32]; 3],
    ) {
        let Dims { batch, entries, heads, kv_heads, width } = self.dims;
        let ([q, k, v], whole) = self.views(own, document);
        let delta = delta(out, d_out, width);
        let d_out = View::row_major(d_out, [batch, entries, heads, width]);
        let x = Operands { q, k, v, d_out, lse, delta: &delta };
        let [dq, dk, dv] = into;
        for (gradient, heads) in [(&mut *dq, heads), (&mut *dk, kv_heads), (&mut *dv, kv_heads)] {
            assert_eq!(gradient.len(), batch * entries * heads * width, "a gradient has its operand's shape");
            gradient.fill(0.0);
        }
        let dq = Output::new(dq, [batch, entries, heads, width]);
        let dk = Output::new(dk, [batch, entries, kv_heads, width]);
        let dv = Output::new(dv, [batch, entries, kv_heads, width]);
        let spec = self.making.spec(self.dims.width);
        let padded = spec.padded();
        self.tasks().into_par_iter().with_max_len(1).for_each(|(row, kv_head)| {
            let _guard = spec.engine.enter();
            let panels = self.panels(&spec, row, kv_head);
            let (prefix, length) = (self.rows.prefix[row], self.length(row));
            let keys: Vec<Keys<'_, S>> = self.keys(row, kv_head, &panels, whole, [k, v]).collect();
            let mut blocks: Vec<Queries> = Vec::new();
            for panels in panels.chunks(PANELS) {
                let mut block = Queries::default();
                block.pack(&spec, panels.to_vec(), row, x, [entries, heads]);
                blocks.push(block);
            }
            SCRATCH.with_borrow_mut(|scratch| {
                let Scratch { tiles, products, dk: dk_rows, dv: dv_rows, rows, .. } = scratch;
                tiles.resize_with(tiles.len().max(1), Tile::default);
                let tile = &mut tiles[0];
                for gradient in [&mut *dk_rows, &mut *dv_rows] {
                    gradient.resize_zeroed((length + ROWS) * padded);
                }
                for part in &keys {
                    tile.pack_backward(&spec, part);
                    for block in &mut blocks {
                        let own = part.range.start.checked_sub(prefix).map(|first| first * padded);
                        let into = own.map(|at| (&mut dk_rows[at..], &mut dv_rows[at..]));
                        block.meet(&spec, tile, part, products, into);
                    }
                }
                for block in &blocks {
                    // SAFETY: this task alone has the queries of this row and kv head.
                    unsafe { block.finish(&spec, row, &dq, rows) };
                }
                for t in 0..length {
                    // SAFETY: this task alone has the keys of this row and kv head.
                    let (dk, dv) = unsafe { (dk.row(row, t, kv_head), dv.row(row, t, kv_head)) };
                    add_row(dk, &dk_rows[t * padded..][..width]);
                    add_row(dv, &dv_rows[t * padded..][..width]);
                }
            });
        });
    }
}
