//! AdamW, one pass over parameter, gradient and both moments.
//!
//! Source: Loshchilov and Hutter 2019, in PyTorch's order of operations: the weight decays by lr·λ first, then
//!   m = β1·m + (1−β1)·g,  v = β2·v + (1−β2)·g²,  p −= lr·(m/(1−β1ᵗ)) / (√(v/(1−β2ᵗ)) + eps).
//!
//! The parameter is changed in place, so every view of it sees the new value. Each value of parameter, gradient and moments
//! is read once and written once, which is what memory allows.
//!
//! The gradient of an embedding table may come as the rows that were touched ([`step_rows`]). What happens to the others is
//! the caller's to say: AdamW as it is defined moves them too, as their moments decay.

use std::sync::Mutex;

use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor};
use rayon::prelude::*;

use crate::cpu::{multiversion, rows_per_task};
use crate::embedding::SparseRows;
use crate::error::{KernelError, Result};

const OP: &str = "adamw";
const CHUNK: usize = 16_384;

/// Hyper-parameters of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay λ.
    pub weight_decay: f64,
    /// The gradient is multiplied by this first (clipping).
    pub gradient_scale: f64,
    /// Number of this step, from 1, for the bias correction.
    pub step: u64,
}

/// What a step does to rows that have no gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untouched {
    /// What AdamW does where the gradient is 0: the same bytes as [`step`] with the whole table's gradient.
    Step,
    /// Nothing: neither the parameter nor its moments change (PyTorch's SparseAdam).
    Leave,
}

enum Gradient<'a> {
    Dense(&'a [f32]),
    Rows(&'a SparseRows, Untouched),
}

struct Update<'a> {
    gradient: Gradient<'a>,
    moments: Mutex<(&'a mut [f32], &'a mut [f32])>,
    with: AdamW,
}

/// What a step multiplies with, made in f64: 1 − lr·λ, the betas, lr/(1 − β1ᵗ), 1/√(1 − β2ᵗ), eps, the gradient's scale.
pub(crate) struct Constants {
    pub decay: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub step_size: f32,
    pub root_scale: f32,
    pub eps: f32,
    pub gradient_scale: f32,
}

impl AdamW {
    pub(crate) fn constants(&self) -> Constants {
        let correction1 = 1.0 - self.beta1.powi(self.step as i32);
        let correction2 = 1.0 - self.beta2.powi(self.step as i32);
        Constants {
            decay: (1.0 - self.lr * self.weight_decay) as f32,
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            step_size: (self.lr / correction1) as f32,
            root_scale: (1.0 / correction2.sqrt()) as f32,
            eps: self.eps as f32,
            gradient_scale: self.gradient_scale as f32,
        }
    }
}

multiversion! {
    fn update(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], c: &Constants) {
        let n = p.len();
        let (g, m, v) = (&g[..n], &mut m[..n], &mut v[..n]);
        for i in 0..n {
            let g = g[i] * c.gradient_scale;
            m[i] = c.beta1 * m[i] + (1.0 - c.beta1) * g;
            v[i] = c.beta2 * v[i] + (1.0 - c.beta2) * g * g;
            p[i] = p[i] * c.decay - c.step_size * m[i] / (v[i].sqrt() * c.root_scale + c.eps);
        }
    }
}

impl InplaceOp1 for Update<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (Some((start, end)), CpuStorage::F32(data)) = (layout.contiguous_offsets(), storage) else {
            return Err(KernelError::shape(OP, "a contiguous f32 parameter", format!("{layout:?}")).into());
        };
        let constants = self.with.constants();
        let mut moments = self.moments.lock().unwrap_or_else(|e| e.into_inner());
        let (m, v) = &mut *moments;
        let data = &mut data[start..end];
        match self.gradient {
            Gradient::Dense(gradient) => data
                .par_chunks_mut(CHUNK)
                .zip(gradient.par_chunks(CHUNK))
                .zip(m.par_chunks_mut(CHUNK))
                .zip(v.par_chunks_mut(CHUNK))
                .for_each(|(((p, g), m), v)| update(p, g, m, v, &constants)),
            Gradient::Rows(rows, untouched) => {
                let width = rows.width();
                let block = rows_per_task(width);
                let zeros = vec![0f32; width];
                data.par_chunks_mut(block * width)
                    .zip(m.par_chunks_mut(block * width))
                    .zip(v.par_chunks_mut(block * width))
                    .enumerate()
                    .for_each(|(task, ((p, m), v))| {
                        let first = task * block;
                        let (ids, values) = rows.within(first..first + p.len() / width);
                        let mut touched = ids.iter().zip(values.chunks_exact(width)).peekable();
                        let parts = p.chunks_exact_mut(width).zip(m.chunks_exact_mut(width));
                        for (i, ((p, m), v)) in parts.zip(v.chunks_exact_mut(width)).enumerate() {
                            match touched.next_if(|(id, _)| **id as usize == first + i) {
                                Some((_, g)) => update(p, g, m, v, &constants),
                                None if untouched == Untouched::Step => update(p, &zeros, m, v, &constants),
                                None => {}
                            }
                        }
                    });
            }
        }
        Ok(())
    }
}

fn check_moments(n: usize, exp_avg: &[f32], exp_avg_sq: &[f32]) -> Result<()> {
    if exp_avg.len() != n || exp_avg_sq.len() != n {
        return Err(KernelError::shape(
            OP,
            format!("moments of {n} values"),
            format!("{} and {}", exp_avg.len(), exp_avg_sq.len()),
        ));
    }
    Ok(())
}

/// One step on `parameter`; `exp_avg` and `exp_avg_sq` are its moments, `gradient` its gradient, all row-major.
///
/// # Errors
/// When sizes do not agree, or the parameter is not contiguous f32.
pub fn step(
    parameter: &Tensor,
    gradient: &[f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    with: AdamW,
) -> Result<()> {
    let n = parameter.elem_count();
    check_moments(n, exp_avg, exp_avg_sq)?;
    if gradient.len() != n {
        return Err(KernelError::shape(
            OP,
            format!("a gradient of {n} values"),
            format!("{}", gradient.len()),
        ));
    }
    let gradient = Gradient::Dense(gradient);
    parameter.inplace_op1(&Update { gradient, moments: Mutex::new((exp_avg, exp_avg_sq)), with })?;
    Ok(())
}

/// One step on a table [V, E] whose gradient is `rows`.
///
/// # Errors
/// As [`step`], and when a row is not in the table.
pub fn step_rows(
    table: &Tensor,
    rows: &SparseRows,
    untouched: Untouched,
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    with: AdamW,
) -> Result<()> {
    let (vocab, width) = table.dims2()?;
    check_moments(vocab * width, exp_avg, exp_avg_sq)?;
    if width != rows.width() || width == 0 {
        let expected = format!("rows of the table's {width} values, at least one");
        return Err(KernelError::shape(OP, expected, format!("{}", rows.width())));
    }
    if let Some(last) = rows.ids().last()
        && *last as usize >= vocab
    {
        return Err(KernelError::argument(OP, format!("row: expected below {vocab}, got {last}")));
    }
    let gradient = Gradient::Rows(rows, untouched);
    table.inplace_op1(&Update { gradient, moments: Mutex::new((exp_avg, exp_avg_sq)), with })?;
    Ok(())
}

/// Σ g² in f64, summed in a fixed order.
pub fn sum_of_squares(gradient: &[f32]) -> f64 {
    gradient
        .par_chunks(CHUNK)
        .map(|chunk| chunk.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>())
        .collect::<Vec<f64>>()
        .into_iter()
        .sum()
}
