//! Attention on slices, for composites that keep their own graph: the same kernels without candle's tape.

use super::backward::{Operands, backward, delta};
use super::forward::{Dims, forward};
use super::pattern::{Pattern, Plan, Rows};
use super::tile::View;
use crate::error::Result;

/// Sizes of the operands and the checked pattern: built once for all blocks of a pass.
#[derive(Debug)]
pub struct Prepared {
    dims: Dims,
    plan: Plan,
    scale: f32,
}

/// What backward needs of a forward pass besides its operands.
#[derive(Debug, Default)]
pub struct Mixed {
    /// The result, [B, T, H, D].
    pub out: Vec<f32>,
    /// Log-sum-exp of every query, [B, T, H].
    pub lse: Vec<f32>,
}

/// Gradients of the operands, in their shapes.
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
        dims.check()?;
        pattern.check()?;
        rows.check(batch, entries)?;
        Ok(Self { dims, plan: Plan::new(pattern, rows, batch, entries, heads), scale: scale as f32 })
    }

    fn views<'a>(&self, q: &'a [f32], k: &'a [f32], v: &'a [f32]) -> [View<'a>; 3] {
        let d = self.dims;
        let kv = [d.batch, d.entries, d.kv_heads, d.width];
        [
            View::row_major(q, [d.batch, d.entries, d.heads, d.width]),
            View::row_major(k, kv),
            View::row_major(v, kv),
        ]
    }

    /// The forward pass over row-major operands.
    ///
    /// # Panics
    /// When an operand is shorter than its shape.
    pub fn forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> Mixed {
        let [q, k, v] = self.views(q, k, v);
        let (out, lse) = forward(q, k, v, self.scale, &self.plan, self.dims);
        Mixed { out, lse }
    }

    /// The backward pass for the gradient `d_out` of the result.
    ///
    /// # Panics
    /// When an operand is shorter than its shape.
    pub fn backward(&self, q: &[f32], k: &[f32], v: &[f32], mixed: &Mixed, d_out: &[f32]) -> Gradients {
        let delta = delta(&mixed.out, d_out, self.dims.width);
        let d = self.dims;
        let [q, k, v] = self.views(q, k, v);
        let d_out = View::row_major(d_out, [d.batch, d.entries, d.heads, d.width]);
        let x = Operands { q, k, v, d_out, lse: &mixed.lse, delta: &delta };
        let [q, k, v] = backward(x, self.scale, &self.plan, self.dims);
        Gradients { q, k, v }
    }
}
