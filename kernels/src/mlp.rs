//! The nonlinearities of feed-forward layers: SwiGLU, silu(gate) · up, and relu².
//!
//! Sources: SwiGLU, Shazeer 2020, as Llama uses it: silu(z) = z·σ(z), silu'(z) = σ(z)·(1 + z·(1 − σ(z))). relu², So et
//! al. 2021 (Primer), as nanochat uses it: relu(z)², with derivative 2·relu(z); NaN stays NaN.
//!
//! Shapes: operands of one shape, any rank. Backward recomputes σ instead of storing it. On slices values are stored in
//! f32 or bf16, gradients of the result come in f32; on candle tensors everything is f32.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor};
use rayon::prelude::*;

use crate::cpu::{contiguous, for_rows, multiversion, tensor, with_values};
use crate::error::{KernelError, Result};
use crate::math::exp;
use crate::store::Store;

const SWIGLU: &str = "swiglu";
const RELU2: &str = "relu2";
const CHUNK: usize = 16_384;

#[inline(always)]
fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + exp(-z))
}

#[inline(always)]
fn relu(z: f32) -> f32 {
    if z < 0.0 { 0.0 } else { z }
}

multiversion! {
    fn swiglu_chunk<S: Store>(gate: &[S], up: &[S], out: &mut [S]) {
        for ((o, z), u) in out.iter_mut().zip(gate).zip(up) {
            let z = z.get();
            *o = S::put(z * sigmoid(z) * u.get());
        }
    }
}

multiversion! {
    fn swiglu_backward_chunk<S: Store>(gate: &mut [S], up: &mut [S], g: &[f32]) {
        let n = gate.len();
        let (up, g) = (&mut up[..n], &g[..n]);
        for i in 0..n {
            let (z, u) = (gate[i].get(), up[i].get());
            let s = sigmoid(z);
            gate[i] = S::put(g[i] * u * s * (1.0 + z * (1.0 - s)));
            up[i] = S::put(g[i] * z * s);
        }
    }
}

multiversion! {
    fn relu2_chunk<S: Store>(x: &[S], out: &mut [S]) {
        for (o, x) in out.iter_mut().zip(x) {
            let z = relu(x.get());
            *o = S::put(z * z);
        }
    }
}

multiversion! {
    fn silu_chunk_in_place<S: Store>(x: &mut [S]) {
        for x in x.iter_mut() {
            let z = x.get();
            *x = S::put(z * sigmoid(z));
        }
    }
}

multiversion! {
    fn relu2_chunk_in_place<S: Store>(x: &mut [S]) {
        for x in x.iter_mut() {
            let z = relu(x.get());
            *x = S::put(z * z);
        }
    }
}

multiversion! {
    fn relu2_backward_chunk<S: Store>(x: &mut [S], g: &[f32]) {
        for (x, g) in x.iter_mut().zip(g) {
            *x = S::put(2.0 * relu(x.get()) * g);
        }
    }
}

/// `out` = silu(`gate`)·`up`, on slices of one length.
pub fn swiglu_into<S: Store>(gate: &[S], up: &[S], out: &mut [S]) {
    for_rows(out, 1, |first, out| {
        let n = out.len();
        swiglu_chunk(&gate[first..first + n], &up[first..first + n], out);
    });
}

/// Backward of [`swiglu_into`], in place: `gate` and `up` become their own gradients, given that of the result.
pub fn swiglu_backward_in_place<S: Store>(gate: &mut [S], up: &mut [S], g: &[f32]) {
    gate.par_chunks_mut(CHUNK)
        .zip(up.par_chunks_mut(CHUNK))
        .zip(g.par_chunks(CHUNK))
        .for_each(|((gate, up), g)| swiglu_backward_chunk(gate, up, g));
}

/// `out` = relu(`x`)², on slices of one length.
pub fn relu2_into<S: Store>(x: &[S], out: &mut [S]) {
    for_rows(out, 1, |first, out| relu2_chunk(&x[first..first + out.len()], out));
}

/// silu(`x`) in the place of `x`.
pub fn silu_in_place<S: Store>(x: &mut [S]) {
    for_rows(x, 1, |_, x| silu_chunk_in_place(x));
}

/// relu(`x`)² in the place of `x`.
pub fn relu2_in_place<S: Store>(x: &mut [S]) {
    for_rows(x, 1, |_, x| relu2_chunk_in_place(x));
}

/// Backward of [`relu2_into`], in place: `x` becomes its own gradient, given that of the result.
pub fn relu2_backward_in_place<S: Store>(x: &mut [S], g: &[f32]) {
    x.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK)).for_each(|(x, g)| relu2_backward_chunk(x, g));
}

fn copy(op: &'static str, t: &Tensor) -> Result<Vec<f32>> {
    with_values(op, t, <[f32]>::to_vec)
}

struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        SWIGLU
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (gate, up) = (contiguous(SWIGLU, gate, gate_layout)?, contiguous(SWIGLU, up, up_layout)?);
        let mut out = vec![0f32; gate.len()];
        swiglu_into(&gate, &up, &mut out);
        Ok((CpuStorage::F32(out), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut dgate, mut dup) = (copy(SWIGLU, gate)?, copy(SWIGLU, up)?);
        with_values(SWIGLU, g, |g| swiglu_backward_in_place(&mut dgate, &mut dup, g))?;
        Ok((Some(tensor(dgate, gate.shape())?), Some(tensor(dup, up.shape())?)))
    }
}

struct Relu2;

impl CustomOp1 for Relu2 {
    fn name(&self) -> &'static str {
        RELU2
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = contiguous(RELU2, x, layout)?;
        let mut out = vec![0f32; x.len()];
        relu2_into(&x, &mut out);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let mut dx = copy(RELU2, x)?;
        with_values(RELU2, g, |g| relu2_backward_in_place(&mut dx, g))?;
        Ok(Some(tensor(dx, x.shape())?))
    }
}

/// silu(gate) · up.
///
/// # Errors
/// When the shapes differ, or a tensor is not f32.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.shape() != up.shape() {
        return Err(KernelError::shape(SWIGLU, format!("up {:?}", gate.dims()), format!("{:?}", up.dims())));
    }
    Ok(gate.apply_op2(up, SwiGlu)?)
}

/// relu(x)².
///
/// # Errors
/// When the tensor is not f32.
pub fn relu2(x: &Tensor) -> Result<Tensor> {
    Ok(x.apply_op1(Relu2)?)
}
