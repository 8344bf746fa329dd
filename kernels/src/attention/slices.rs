//! Attention on slices, for composites that keep their own graph: the same kernels without candle's tape.

use super::Dims;
use super::backward::{Operands, backward, delta};
use super::forward::forward;
use super::panel::Making;
use super::pattern::{Pattern, Plan, Rows};
use super::view::View;
use crate::error::Result;
use crate::micro::Products;
use crate::store::Store;

/// Sizes of the operands and the checked pattern: built once for all blocks of a pass.
#[derive(Debug)]
pub struct Prepared {
    dims: Dims,
    plan: Plan,
    making: Making,
    /// Some queries are not valid: what they would write is zeroed.
    gaps: bool,
}

/// What backward needs of a forward pass besides its operands.
#[derive(Clone, Debug, Default)]
pub struct Mixed<S = f32> {
    /// The result, [B, T, H, D].
    pub out: Vec<S>,
    /// Log-sum-exp of every query, [B, T, H].
    pub lse: Vec<f32>,
}

/// Gradients of the operands, in their shapes.
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    /// Of q.
    pub q: Vec<f32>,
    /// Of k.
    pub k: Vec<f32>,
    /// Of v.
    pub v: Vec<f32>,
}

impl Prepared {
    /// Checks pattern and rows for B·T entries, H query heads, G kv heads and head width D.
    ///
    /// # Errors
    /// As [`super::attention`].
    pub fn new(
        [batch, entries, heads, kv_heads, width]: [usize; 5],
        scale: f64,
        pattern: Pattern,
        rows: &Rows,
    ) -> Result<Self> {
        let dims = Dims { batch, entries, heads, kv_heads, width };
        dims.check(None)?;
        pattern.check()?;
        rows.check(batch, entries)?;
        let gaps = rows.lengths.as_ref().is_some_and(|l| l.iter().any(|length| *length < entries));
        let plan = Plan::new(pattern, rows, batch, entries, heads);
        Ok(Self { dims, plan, making: Making::new(scale), gaps })
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

    /// Places of the T entries of a row, the same in every row of the batch: with slopes, scores are lowered by
    /// slopes\[h\]·|position(i) − position(j)|.
    ///
    /// # Errors
    /// When there is not one finite position per entry.
    pub fn with_positions(mut self, positions: &[f32]) -> Result<Self> {
        self.dims.check_positions(positions)?;
        self.making.positions = Some(positions.to_vec());
        Ok(self)
    }

    pub(super) fn shape(&self) -> [usize; 4] {
        let Dims { batch, entries, heads, width, .. } = self.dims;
        [batch, entries, heads, width]
    }

    fn views<'a, S: Store>(&self, q: &'a [S], k: &'a [S], v: &'a [S]) -> [View<'a, S>; 3] {
        let d = self.dims;
        let kv = [d.batch, d.entries, d.kv_heads, d.width];
        [View::row_major(q, self.shape()), View::row_major(k, kv), View::row_major(v, kv)]
    }

    /// The forward pass over row-major operands, into `mixed`.
    ///
    /// # Panics
    /// When an operand is shorter than its shape.
    pub fn forward_into<S: Store>(&self, q: &[S], k: &[S], v: &[S], mixed: &mut Mixed<S>) {
        self.forward_views(self.views(q, k, v), mixed);
    }

    /// As [`Prepared::forward_into`], into memory of the caller's: `out` [B, T, H, D] and `lse` [B, T, H].
    ///
    /// # Panics
    /// When an operand is shorter than its shape, or a result is of another length.
    pub fn forward_to<S: Store>(&self, q: &[S], k: &[S], v: &[S], out: &mut [S], lse: &mut [f32]) {
        self.forward_views_to(self.views(q, k, v), out, lse);
    }

    pub(super) fn forward_views<S: Store>(&self, views: [View<'_, S>; 3], mixed: &mut Mixed<S>) {
        let [batch, entries, heads, width] = self.shape();
        mixed.out.resize(batch * entries * heads * width, S::default());
        mixed.lse.resize(batch * entries * heads, 0.0);
        self.forward_views_to(views, &mut mixed.out, &mut mixed.lse);
    }

    fn forward_views_to<S: Store>(&self, views: [View<'_, S>; 3], out: &mut [S], lse: &mut [f32]) {
        let [batch, entries, heads, width] = self.shape();
        assert_eq!(out.len(), batch * entries * heads * width, "the result holds its shape");
        assert_eq!(lse.len(), batch * entries * heads, "there is one log-sum-exp per query");
        if self.gaps {
            out.fill(S::default());
            lse.fill(0.0);
        }
        forward(views, &self.making.spec(self.dims.width), &self.plan, self.dims, out, lse);
    }

    /// The backward pass for the gradient `d_out` of the result, into `gradients`.
    ///
    /// # Panics
    /// When an operand is shorter than its shape.
    pub fn backward_into<S: Store>(
        &self,
        q: &[S],
        k: &[S],
        v: &[S],
        mixed: &Mixed<S>,
        d_out: &[f32],
        gradients: &mut Gradients,
    ) {
        self.backward_views(self.views(q, k, v), mixed, d_out, gradients);
    }

    /// As [`Prepared::backward_into`], for results in memory of the caller's, into the gradients of q, k and v there.
    ///
    /// # Panics
    /// When an operand is shorter than its shape, or a gradient is of another length.
    pub fn backward_to<S: Store>(
        &self,
        [q, k, v]: [&[S]; 3],
        out: &[S],
        lse: &[f32],
        d_out: &[f32],
        into: [&mut [f32]; 3],
    ) {
        self.backward_views_to(self.views(q, k, v), out, lse, d_out, into);
    }

    pub(super) fn backward_views<S: Store>(
        &self,
        views: [View<'_, S>; 3],
        mixed: &Mixed<S>,
        d_out: &[f32],
        gradients: &mut Gradients,
    ) {
        let Dims { batch, entries, heads, kv_heads, width } = self.dims;
        gradients.q.resize(batch * entries * heads * width, 0.0);
        gradients.k.resize(batch * entries * kv_heads * width, 0.0);
        gradients.v.resize(batch * entries * kv_heads * width, 0.0);
        let Gradients { q, k, v } = gradients;
        self.backward_views_to(views, &mixed.out, &mixed.lse, d_out, [q, k, v]);
    }

    fn backward_views_to<S: Store>(
        &self,
        [q, k, v]: [View<'_, S>; 3],
        out: &[S],
        lse: &[f32],
        d_out: &[f32],
        into: [&mut [f32]; 3],
    ) {
        let Dims { batch, entries, heads, kv_heads, width } = self.dims;
        for (gradient, heads) in into.iter().zip([heads, kv_heads, kv_heads]) {
            assert_eq!(gradient.len(), batch * entries * heads * width, "a gradient has its operand's shape");
        }
        let delta = delta(out, d_out, width);
        let d_out = View::row_major(d_out, self.shape());
        let x = Operands { q, k, v, d_out, lse, delta: &delta };
        backward(x, &self.making.spec(self.dims.width), &self.plan, self.dims, into);
    }
}
