//! RMSNorm and LayerNorm, with gradients for gain and bias.
//!
//! Sources: Zhang and Sennrich 2019 (RMSNorm), Ba et al. 2016 (LayerNorm), over the last dimension:
//!   rms:    y = x·r·w,              r = 1/√(mean(x²) + eps);
//!   layer:  y = (x − μ)·r·w + b,    r = 1/√(mean((x − μ)²) + eps), μ = mean(x).
//! Backward, with n = E and g the gradient of y:
//!   rms:    dx = r·g·w − x·r³/n·Σ(g·w·x),                                        dw = Σ_rows g·x·r;
//!   layer:  dx = r·(g·w − mean(g·w) − z·mean(g·w·z)) with z = (x − μ)·r,         dw = Σ_rows g·z, db = Σ_rows g.
//!
//! Shapes: x [.., E], w and b `[E]`. x and y are stored in f32 or bf16 on slices, in f32 on candle tensors; sums are f32
//! per row, those of gain and bias over rows in a fixed order. A frozen gain or bias gets no gradient.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor};
use rayon::prelude::*;

use crate::cpu::{contiguous, for_rows, multiversion, rows_per_task, sum_partials, tensor, with_values};
use crate::error::{KernelError, Result};
use crate::math::dot;
use crate::store::Store;

const RMS: &str = "rms_norm";
const LAYER: &str = "layer_norm";

multiversion! {
    fn rms_row<X: Store, Y: Store>(x: &[X], w: &[f32], eps: f32, out: &mut [Y]) {
        let r = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
        for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
            *o = Y::put(x.get() * r * w);
        }
    }
}

multiversion! {
    /// Adds the row's gradient to `dx` and, where there is one, the gain's to `dw`.
    fn rms_backward_row<X: Store>(x: &[X], w: &[f32], g: &[f32], eps: f32, dx: &mut [f32], dw: &mut [f32]) {
        let n = x.len();
        let (w, g, dx) = (&w[..n], &g[..n], &mut dx[..n]);
        let r = 1.0 / (dot(x, x) / n as f32 + eps).sqrt();
        let pull = sum(n, #[inline(always)] |i| g[i] * w[i] * x[i].get()) * r * r * r / n as f32;
        for i in 0..n {
            dx[i] += g[i] * w[i] * r - x[i].get() * pull;
        }
        for ((dw, x), g) in dw.iter_mut().zip(x).zip(g) {
            *dw += g * x.get() * r;
        }
    }
}

/// Σ f(i) for i below `n`, in 16 lanes.
#[inline(always)]
fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    let whole = n / 16 * 16;
    for first in (0..whole).step_by(16) {
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane += f(first + i);
        }
    }
    lanes.iter().sum::<f32>() + (whole..n).map(f).sum::<f32>()
}

/// Mean of a row and 1/√(variance + eps).
#[inline(always)]
fn moments<X: Store>(x: &[X], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum(
        x.len(),
        #[inline(always)]
        |i| x[i].get(),
    ) / n;
    let square = |i: usize| {
        let z = x[i].get() - mean;
        z * z
    };
    (mean, 1.0 / (sum(x.len(), square) / n + eps).sqrt())
}

multiversion! {
    fn layer_row<X: Store, Y: Store>(x: &[X], w: &[f32], b: &[f32], eps: f32, out: &mut [Y]) {
        let n = x.len();
        let (w, out) = (&w[..n], &mut out[..n]);
        let (mean, r) = moments(x, eps);
        if b.is_empty() {
            for i in 0..n {
                out[i] = Y::put((x[i].get() - mean) * r * w[i]);
            }
        } else {
            let b = &b[..n];
            for i in 0..n {
                out[i] = Y::put((x[i].get() - mean) * r * w[i] + b[i]);
            }
        }
    }
}

multiversion! {
    /// As [`rms_backward_row`], and the bias's gradient to `db`.
    fn layer_backward_row<X: Store>(x: &[X], w: &[f32], g: &[f32], eps: f32, dx: &mut [f32], dw: &mut [f32], db: &mut [f32]) {
        let n = x.len();
        let (w, g, dx) = (&w[..n], &g[..n], &mut dx[..n]);
        let (mean, r) = moments(x, eps);
        let even = sum(n, #[inline(always)] |i| g[i] * w[i]) / n as f32;
        let pull = sum(n, #[inline(always)] |i| g[i] * w[i] * (x[i].get() - mean)) * r * r / n as f32;
        for i in 0..n {
            dx[i] += r * (g[i] * w[i] - even - (x[i].get() - mean) * pull);
        }
        for ((dw, x), g) in dw.iter_mut().zip(x).zip(g) {
            *dw += g * (x.get() - mean) * r;
        }
        for (db, g) in db.iter_mut().zip(g) {
            *db += g;
        }
    }
}

/// RMSNorm of rows of `w.len()` values.
pub fn rms_forward_into<X: Store, Y: Store>(x: &[X], w: &[f32], eps: f32, out: &mut [Y]) {
    let width = w.len();
    for_rows(out, width, |first, rows| {
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            rms_row(&x[(first + i) * width..][..width], w, eps, row);
        }
    });
}

/// LayerNorm of rows of `w.len()` values.
pub fn layer_forward_into<X: Store, Y: Store>(
    x: &[X],
    w: &[f32],
    b: Option<&[f32]>,
    eps: f32,
    out: &mut [Y],
) {
    let (width, b) = (w.len(), b.unwrap_or_default());
    for_rows(out, width, |first, rows| {
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            layer_row(&x[(first + i) * width..][..width], w, b, eps, row);
        }
    });
}

/// Calls `f(first value of the row, row of dx, dw, db)` for all rows in parallel, and adds up what the rows left in `dw`
/// and `db`, which are empty where their sums are not wanted.
fn backward_rows(
    width: usize,
    dx: &mut [f32],
    sums: [Option<&mut [f32]>; 2],
    f: impl Fn(usize, &mut [f32], &mut [f32], &mut [f32]) + Sync,
) {
    if width == 0 {
        return;
    }
    let rows = rows_per_task(width);
    let lengths = sums.each_ref().map(|s| if s.is_some() { width } else { 0 });
    let partials: Vec<Vec<f32>> = dx
        .par_chunks_mut(rows * width)
        .enumerate()
        .map(|(task, chunk)| {
            let mut partial = vec![0f32; lengths[0] + lengths[1]];
            let (dw, db) = partial.split_at_mut(lengths[0]);
            for (i, row) in chunk.chunks_exact_mut(width).enumerate() {
                f((task * rows + i) * width, row, dw, db);
            }
            partial
        })
        .collect();
    let mut totals = sum_partials(partials, lengths[0] + lengths[1]).into_iter();
    for wanted in sums.into_iter().flatten() {
        for (sum, value) in wanted.iter_mut().zip(&mut totals) {
            *sum += value;
        }
    }
}

/// Backward of [`rms_forward_into`]: adds the input's gradient to `dx` and, where the gain learns, its own to `dw`.
pub fn rms_backward_add<X: Store>(
    x: &[X],
    w: &[f32],
    g: &[f32],
    eps: f32,
    dx: &mut [f32],
    dw: Option<&mut [f32]>,
) {
    let width = w.len();
    backward_rows(width, dx, [dw, None], |at, row, dw, _| {
        rms_backward_row(&x[at..at + width], w, &g[at..at + width], eps, row, dw);
    });
}

/// Backward of [`layer_forward_into`]: adds the input's gradient to `dx` and, where gain and bias learn, theirs to `dw`
/// and `db`.
pub fn layer_backward_add<X: Store>(
    x: &[X],
    w: &[f32],
    g: &[f32],
    eps: f32,
    dx: &mut [f32],
    dw: Option<&mut [f32]>,
    db: Option<&mut [f32]>,
) {
    let width = w.len();
    backward_rows(width, dx, [dw, db], |at, row, dw, db| {
        layer_backward_row(&x[at..at + width], w, &g[at..at + width], eps, row, dw, db);
    });
}

/// Calls `f` with the values of x, w and g.
fn with_three(
    op: &'static str,
    [x, w, g]: [&Tensor; 3],
    f: impl FnOnce(&[f32], &[f32], &[f32]),
) -> Result<()> {
    with_values(op, x, |x| with_values(op, w, |w| with_values(op, g, |g| f(x, w, g))))??
}

struct RmsNorm {
    eps: f32,
    gain_learns: bool,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        RMS
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, w) = (contiguous(RMS, x, x_layout)?, contiguous(RMS, w, w_layout)?);
        let mut out = vec![0f32; x.len()];
        rms_forward_into(&x, &w, self.eps, &mut out);
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut dx, mut dw) = (vec![0f32; x.elem_count()], vec![0f32; w.elem_count()]);
        with_three(RMS, [x, w, g], |x, w, g| {
            rms_backward_add(x, w, g, self.eps, &mut dx, self.gain_learns.then_some(&mut dw[..]));
        })?;
        let dw = if self.gain_learns { Some(tensor(dw, w.shape())?) } else { None };
        Ok((Some(tensor(dx, x.shape())?), dw))
    }
}

struct LayerNorm {
    eps: f32,
    gain_learns: bool,
    bias_learns: bool,
}

impl LayerNorm {
    fn backward(&self, x: &Tensor, w: &Tensor, g: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let (mut dx, mut dw) = (vec![0f32; x.elem_count()], vec![0f32; w.elem_count()]);
        let mut db = vec![0f32; w.elem_count()];
        with_three(LAYER, [x, w, g], |x, w, g| {
            let (dw, db) = (self.gain_learns.then_some(&mut dw[..]), self.bias_learns.then_some(&mut db[..]));
            layer_backward_add(x, w, g, self.eps, &mut dx, dw, db);
        })?;
        let learned = |learns: bool, values| learns.then(|| tensor(values, w.shape())).transpose();
        Ok([Some(tensor(dx, x.shape())?), learned(self.gain_learns, dw)?, learned(self.bias_learns, db)?])
    }
}

impl CustomOp2 for LayerNorm {
    fn name(&self) -> &'static str {
        LAYER
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, w) = (contiguous(LAYER, x, x_layout)?, contiguous(LAYER, w, w_layout)?);
        let mut out = vec![0f32; x.len()];
        layer_forward_into(&x, &w, None, self.eps, &mut out);
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, _] = self.backward(x, w, g)?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        LAYER
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, w) = (contiguous(LAYER, x, x_layout)?, contiguous(LAYER, w, w_layout)?);
        let b = contiguous(LAYER, b, b_layout)?;
        let mut out = vec![0f32; x.len()];
        layer_forward_into(&x, &w, Some(&b), self.eps, &mut out);
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, db] = self.backward(x, w, g)?;
        Ok((dx, dw, db))
    }
}

fn check(op: &'static str, what: &str, x: &Tensor, row: &Tensor) -> Result<()> {
    let width = x.dims().last().copied().unwrap_or(0);
    if row.dims() != [width] || width == 0 {
        let expected = format!("a {what} of shape [{width}], at least one wide");
        return Err(KernelError::shape(op, expected, format!("{:?}", row.dims())));
    }
    Ok(())
}

/// RMSNorm of the last dimension of `x` with gain `w_e`.
///
/// # Errors
/// When `w_e` is not one value per entry of the last dimension, or a tensor is not f32.
pub fn rms_norm(x: &Tensor, w_e: &Tensor, eps: f64) -> Result<Tensor> {
    check(RMS, "gain", x, w_e)?;
    let op = RmsNorm { eps: eps as f32, gain_learns: w_e.track_op() };
    Ok(x.apply_op2(w_e, op)?)
}

/// LayerNorm of the last dimension of `x` with gain `w_e` and, where given, bias `b_e`.
///
/// # Errors
/// As [`rms_norm`].
pub fn layer_norm(x: &Tensor, w_e: &Tensor, b_e: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    check(LAYER, "gain", x, w_e)?;
    let op = |bias_learns| LayerNorm { eps: eps as f32, gain_learns: w_e.track_op(), bias_learns };
    match b_e {
        None => Ok(x.apply_op2(w_e, op(false))?),
        Some(b_e) => {
            check(LAYER, "bias", x, b_e)?;
            Ok(x.apply_op3(w_e, b_e, op(b_e.track_op()))?)
        }
    }
}
