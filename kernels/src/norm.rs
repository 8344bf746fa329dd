//! RMSNorm with a gradient for its gain.
//!
//! Source: Zhang and Sennrich 2019: y = x / sqrt(mean(x²) + eps) · w over the last dimension.
//! Backward, with r = 1/sqrt(mean(x²)+eps), n = E and g the gradient of y:
//!   dx = r·(g·w) − x·r³/n·Σ(g·w·x),   dw = Σ_rows g·x·r.
//!
//! Shapes: x [.., E], w `[E]`. Sums in f32 per row, the gain's gradient summed over rows in a fixed order.
//! A frozen gain gets no gradient.

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};
use rayon::prelude::*;

use crate::cpu::{contiguous, for_rows, multiversion, rows_per_task, sum_partials, tensor, with_values};
use crate::error::{KernelError, Result};
use crate::math::dot;

const OP: &str = "rms_norm";

struct RmsNorm {
    eps: f32,
    gain_learns: bool,
}

multiversion! {
    fn forward_row(x: &[f32], w: &[f32], r: f32, out: &mut [f32]) {
        for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
            *o = x * r * w;
        }
    }
}

multiversion! {
    /// Adds the row's gradient to `dx` and the gain's to `dw`; `gw` is scratch.
    fn backward_row(x: &[f32], w: &[f32], g: &[f32], eps: f32, dx: &mut [f32], dw: &mut [f32], gw: &mut [f32]) {
        let n = x.len() as f32;
        let r = 1.0 / (dot(x, x) / n + eps).sqrt();
        for i in 0..x.len() {
            gw[i] = g[i] * w[i];
            dw[i] += g[i] * x[i] * r;
        }
        let pull = dot(gw, x) * r * r * r / n;
        for i in 0..x.len() {
            dx[i] += gw[i] * r - x[i] * pull;
        }
    }
}

/// The forward pass on slices: rows of `w.len()` values.
pub fn forward_into(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let width = w.len();
    for_rows(out, width, |first, rows| {
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            let x = &x[(first + i) * width..][..width];
            let r = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
            forward_row(x, w, r, row);
        }
    });
}

/// The backward pass on slices: adds the input's gradient to `dx` and, where the gain learns, its own to `dw`.
pub fn backward_add(x: &[f32], w: &[f32], g: &[f32], eps: f32, dx: &mut [f32], dw: Option<&mut [f32]>) {
    let width = w.len();
    let rows = rows_per_task(width);
    let partials: Vec<Vec<f32>> = dx
        .par_chunks_mut(rows * width)
        .enumerate()
        .map(|(task, chunk)| {
            let (mut dw, mut gw) = (vec![0f32; width], vec![0f32; width]);
            for (i, row) in chunk.chunks_exact_mut(width).enumerate() {
                let at = (task * rows + i) * width;
                backward_row(&x[at..at + width], w, &g[at..at + width], eps, row, &mut dw, &mut gw);
            }
            dw
        })
        .collect();
    if let Some(dw) = dw {
        for (sum, value) in dw.iter_mut().zip(sum_partials(partials, width)) {
            *sum += value;
        }
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, w) = (contiguous(OP, x, x_layout)?, contiguous(OP, w, w_layout)?);
        let mut out = vec![0f32; x.len()];
        forward_into(&x, &w, self.eps, &mut out);
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let mut dw = vec![0f32; w.elem_count()];
        let dx = with_values(OP, x, |x| {
            with_values(OP, w, |w| {
                with_values(OP, g, |g| {
                    let mut dx = vec![0f32; x.len()];
                    backward_add(x, w, g, self.eps, &mut dx, self.gain_learns.then_some(&mut dw[..]));
                    dx
                })
            })
        })
        .and_then(|r| r)
        .and_then(|r| r)?;
        let dw = if self.gain_learns { Some(tensor(dw, w.shape())?) } else { None };
        Ok((Some(tensor(dx, x.shape())?), dw))
    }
}

/// RMSNorm of the last dimension of `x` with gain `w_e`.
///
/// # Errors
/// When `w_e` is not one value per entry of the last dimension.
pub fn rms_norm(x: &Tensor, w_e: &Tensor, eps: f64) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(0);
    if w_e.dims() != [width] || width == 0 {
        return Err(KernelError::shape(
            OP,
            format!("a gain of shape [{width}]"),
            format!("{:?}", w_e.dims()),
        ));
    }
    let op = RmsNorm { eps: eps as f32, gain_learns: w_e.track_op() };
    Ok(x.apply_op2(w_e, op)?)
}
