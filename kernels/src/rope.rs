//! Applying rotary positions to queries and keys.
//!
//! Source: RoPE (Su et al. 2021) in the half-split layout of Hugging Face's Llama: with x = [x1, x2] along D,
//!   y1 = x1·cos − x2·sin,   y2 = x2·cos + x1·sin.
//! The tables may be damped (Gaussian positions); the transpose of the map is its backward either way.
//!
//! Shapes: x [B, T, H, D], cos and sin [T, D/2] shared by all rows of the batch, or [B·T, D/2]. Tables get no gradient.

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use crate::cpu::{contiguous, for_rows, multiversion, with_values};
use crate::error::{KernelError, Result};

const OP: &str = "rope";

struct Rope {
    cos: Tensor,
    sin: Tensor,
    /// +1 forward, −1 for the transposed map.
    direction: f32,
}

multiversion! {
    fn rotate_row(x: &[f32], cos: &[f32], sin: &[f32], direction: f32, out: &mut [f32]) {
        let half = cos.len();
        let (x1, x2) = (&x[..half], &x[half..2 * half]);
        let (y1, y2) = out.split_at_mut(half);
        for i in 0..half {
            let s = sin[i] * direction;
            y1[i] = x1[i] * cos[i] - x2[i] * s;
            y2[i] = x2[i] * cos[i] + x1[i] * s;
        }
    }
}

impl Rope {
    fn apply(&self, x: &[f32], dims: &[usize]) -> Result<Vec<f32>> {
        let (heads, width) = (dims[2], dims[3]);
        let half = width / 2;
        with_values(OP, &self.cos, |cos| {
            with_values(OP, &self.sin, |sin| {
                let positions = cos.len() / half;
                let mut out = vec![0f32; x.len()];
                for_rows(&mut out, heads * width, |first, entries| {
                    for (i, entry) in entries.chunks_exact_mut(heads * width).enumerate() {
                        let at = (first + i) % positions * half;
                        let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
                        let x = &x[(first + i) * heads * width..][..heads * width];
                        for (x, out) in x.chunks_exact(width).zip(entry.chunks_exact_mut(width)) {
                            rotate_row(x, cos, sin, self.direction, out);
                        }
                    }
                });
                out
            })
        })
        .and_then(|r| r)
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
