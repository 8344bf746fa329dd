//! Applying rotary positions to queries and keys.
//!
//! Source: RoPE (Su et al. 2021) in the half-split layout of Hugging Face's Llama: with x = [x1, x2] along D,
//!   y1 = x1·cos − x2·sin,   y2 = x2·cos + x1·sin.
//! The tables may be damped (Gaussian positions); the transpose of the map is its backward either way.
//!
//! Shapes: x [B, T, H, D], cos and sin [T, D/2] shared by all rows of the batch, or [B·T, D/2]. Tables get no gradient.
//! On slices x is stored in f32 or bf16; on candle tensors in f32.
//!
//! [`damping_gradient`] is what a learned uncertainty needs: with y the damped output and g its gradient,
//! ∂y/∂sigma = −ω²·sigma·y in every band.

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use rayon::prelude::*;

use crate::cpu::{contiguous, for_rows, multiversion, with_values};
use crate::error::{KernelError, Result};
use crate::store::Store;

const OP: &str = "rope";

struct Rope {
    cos: Tensor,
    sin: Tensor,
    /// +1 forward, −1 for the transposed map.
    direction: f32,
}

multiversion! {
    fn rotate_row<S: Store>(x: &mut [S], cos: &[f32], sin: &[f32], direction: f32) {
        let half = cos.len();
        let (x1, x2) = x.split_at_mut(half);
        let (x1, x2, sin) = (&mut x1[..half], &mut x2[..half], &sin[..half]);
        for i in 0..half {
            let s = sin[i] * direction;
            let (a, b) = (x1[i].get(), x2[i].get());
            x1[i] = S::put(a * cos[i] - b * s);
            x2[i] = S::put(b * cos[i] + a * s);
        }
    }
}

/// Rotates entries of `heads`·`width` values in place; `direction` is 1 forward and −1 for the transposed map. The
/// tables hold one row of `width`/2 values per position and repeat when there are more entries than positions.
pub fn rotate<S: Store>(x: &mut [S], heads: usize, width: usize, cos: &[f32], sin: &[f32], direction: f32) {
    rotate_part(x, heads, [width, width], cos, sin, direction);
}

/// [`rotate`] of the first `rotated` elements of each head; the others stay. The tables hold rows of `rotated`/2 values.
pub fn rotate_part<S: Store>(
    x: &mut [S],
    heads: usize,
    [width, rotated]: [usize; 2],
    cos: &[f32],
    sin: &[f32],
    direction: f32,
) {
    let half = rotated / 2;
    let positions = cos.len() / half;
    for_rows(x, heads * width, |first, entries| {
        for (i, entry) in entries.chunks_exact_mut(heads * width).enumerate() {
            let at = (first + i) % positions * half;
            for head in entry.chunks_exact_mut(width) {
                rotate_row(&mut head[..rotated], &cos[at..at + half], &sin[at..at + half], direction);
            }
        }
    });
}

multiversion! {
    /// Σ over bands of ω²·(g₁·y₁ + g₂·y₂) of one head.
    fn damped_product<S: Store>(y: &[S], g: &[f32], omega_squared: &[f32]) -> f32 {
        const LANES: usize = 8;
        let half = omega_squared.len();
        let (y1, y2) = y.split_at(half);
        let (g1, g2) = g.split_at(half);
        let (y2, g2) = (&y2[..half], &g2[..half]);
        // Fixed lanes, so that the sum is the same at every level.
        let mut sums = [0f32; LANES];
        for i in 0..half {
            sums[i % LANES] += omega_squared[i] * (g1[i] * y1[i].get() + g2[i] * y2[i].get());
        }
        sums.iter().sum()
    }
}

/// Adds to each of `sums`, one for every position, Σ over its heads and bands of ω²·(g₁·y₁ + g₂·y₂): times −sigma it is the
/// gradient of that position's uncertainty. `y` are rotated entries of `heads`·`width` values, `g` the gradient of them;
/// there may be several times as many entries as positions. `omega_squared` has half as many values as a head has rotated
/// ones, which come first in it; 0 where a band is not damped.
pub fn damping_gradient<S: Store>(
    y: &[S],
    g: &[f32],
    heads: usize,
    width: usize,
    omega_squared: &[f32],
    sums: &mut [f64],
) {
    let (positions, entry) = (sums.len(), heads * width);
    if positions == 0 {
        return;
    }
    let entries = y.len() / entry;
    sums.par_iter_mut().enumerate().with_min_len(16).for_each(|(position, sum)| {
        for at in (position..entries).step_by(positions) {
            let at = at * entry..(at + 1) * entry;
            let heads = y[at.clone()].chunks_exact(width).zip(g[at].chunks_exact(width));
            *sum += heads.map(|(y, g)| f64::from(damped_product(y, g, omega_squared))).sum::<f64>();
        }
    });
}

impl Rope {
    fn apply(&self, x: &[f32], dims: &[usize]) -> Result<Vec<f32>> {
        let mut out = x.to_vec();
        with_values(OP, &self.cos, |cos| {
            with_values(OP, &self.sin, |sin| rotate(&mut out, dims[2], dims[3], cos, sin, self.direction))
        })
        .and_then(|r| r)?;
        Ok(out)
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = self.apply(&contiguous(OP, x, layout)?, layout.dims())?;
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let back = Rope { cos: self.cos.clone(), sin: self.sin.clone(), direction: -self.direction };
        Ok(Some(gradient.apply_op1_no_bwd(&back)?))
    }
}

/// Rotates `x_bthd` by the given tables.
///
/// # Errors
/// When D is odd, or the tables are neither [T, D/2] nor [B·T, D/2].
pub fn rope(x_bthd: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let dims = x_bthd.dims();
    let [b, t, _, d] = dims else {
        return Err(KernelError::shape(OP, "x of rank 4 [B, T, H, D]", format!("{dims:?}")));
    };
    if d % 2 != 0 {
        return Err(KernelError::shape(OP, "an even head width", format!("{d}")));
    }
    let fits = |table: &Tensor| table.dims() == [*t, d / 2] || table.dims() == [b * t, d / 2];
    if !fits(cos) || cos.dims() != sin.dims() {
        return Err(KernelError::shape(
            OP,
            format!("cos and sin of shape [{t}, {half}] or [{bt}, {half}]", half = d / 2, bt = b * t),
            format!("{:?} and {:?}", cos.dims(), sin.dims()),
        ));
    }
    Ok(x_bthd.apply_op1(Rope { cos: cos.detach(), sin: sin.detach(), direction: 1.0 })?)
}
