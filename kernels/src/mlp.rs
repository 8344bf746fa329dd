//! SwiGLU: silu(gate) · up.
//!
//! Source: Shazeer 2020, as Llama uses it. silu(z) = z·σ(z), silu'(z) = σ(z)·(1 + z·(1 − σ(z))).
//! Shapes: gate and up of one shape, any rank. Backward recomputes σ instead of storing it.

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};
use rayon::prelude::*;

use crate::cpu::{contiguous, for_rows, multiversion, tensor, with_values};
use crate::error::{KernelError, Result};
use crate::math::exp;

const OP: &str = "swiglu";
const CHUNK: usize = 16_384;

struct SwiGlu;

#[inline(always)]
fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + exp(-z))
}

multiversion! {
    fn forward_chunk(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((o, z), u) in out.iter_mut().zip(gate).zip(up) {
            *o = z * sigmoid(*z) * u;
        }
    }
}

multiversion! {
    /// `gate` and `up` become their own gradients.
    fn backward_chunk(gate: &mut [f32], up: &mut [f32], g: &[f32]) {
        let n = gate.len();
        let (up, g) = (&mut up[..n], &g[..n]);
        for i in 0..n {
            let z = gate[i];
            let s = sigmoid(z);
            gate[i] = g[i] * up[i] * s * (1.0 + z * (1.0 - s));
            up[i] = g[i] * z * s;
        }
    }
}

/// The forward pass on slices of one length.
pub fn forward_into(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for_rows(out, 1, |first, out| {
        let n = out.len();
        forward_chunk(&gate[first..first + n], &up[first..first + n], out);
    });
}

/// The backward pass on slices, in place: `gate` and `up` become their own gradients, given that of the result.
pub fn backward_in_place(gate: &mut [f32], up: &mut [f32], g: &[f32]) {
    gate.par_chunks_mut(CHUNK)
        .zip(up.par_chunks_mut(CHUNK))
        .zip(g.par_chunks(CHUNK))
        .for_each(|((gate, up), g)| backward_chunk(gate, up, g));
}

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (gate, up) = (contiguous(OP, gate, gate_layout)?, contiguous(OP, up, up_layout)?);
        let mut out = vec![0f32; gate.len()];
        forward_into(&gate, &up, &mut out);
        Ok((CpuStorage::F32(out), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let copy = |t: &Tensor| with_values(OP, t, <[f32]>::to_vec);
        let (mut dgate, mut dup) = (copy(gate)?, copy(up)?);
        with_values(OP, g, |g| backward_in_place(&mut dgate, &mut dup, g))?;
        Ok((Some(tensor(dgate, gate.shape())?), Some(tensor(dup, up.shape())?)))
    }
}

/// silu(gate) · up.
///
/// # Errors
/// When the shapes differ.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.shape() != up.shape() {
        return Err(KernelError::shape(OP, format!("up {:?}", gate.dims()), format!("{:?}", up.dims())));
    }
    Ok(gate.apply_op2(up, SwiGlu)?)
}
