//! The candle operation: checks, forward, backward.
//!
//! The op keeps the log-sum-exp of its own forward pass ([B, T, H], f32) for its backward pass; candle drops both
//! when the graph is dropped, or at once when nothing tracks gradients.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Storage, Tensor};

use super::backward::{Operands, backward, delta};
use super::forward::{Dims, forward};
use super::pattern::{OP, Pattern, Plan, Rows};
use super::tile::View;
use crate::cpu::tensor;
use crate::error::{KernelError, Result};

struct Attention {
    scale: f32,
    plan: Plan,
    dims: Dims,
    lse: OnceLock<Vec<f32>>,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (q, k, v) = (View::new(q, q_layout)?, View::new(k, k_layout)?, View::new(v, v_layout)?);
        let (out, lse) = forward(q, k, v, self.scale, &self.plan, self.dims);
        // An op runs forward once; were it run again, on the same inputs, the value would be the same.
        let _ = self.lse.set(lse);
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let lse = self.lse.get().ok_or_else(|| {
            KernelError::argument(OP, "expected a forward pass before the backward pass, got none")
        })?;
        let (d_out, out) = (d_out.contiguous()?, out.contiguous()?);
        let delta = crate::cpu::with_values(OP, &out, |out| {
            crate::cpu::with_values(OP, &d_out, |d_out| delta(out, d_out, self.dims.width))
        })??;
        let operands = [q, k, v, &d_out].map(Tensor::storage_and_layout);
        let view = |i: usize| {
            let (storage, layout) = &operands[i];
            match &**storage {
                Storage::Cpu(storage) => View::new(storage, layout),
                _ => Err(KernelError::shape(OP, "CPU tensors", "another device")),
            }
        };
        let x = Operands { q: view(0)?, k: view(1)?, v: view(2)?, d_out: view(3)?, lse, delta: &delta };
        let [dq, dk, dv] = backward(x, self.scale, &self.plan, self.dims);
        let gradient = |of: &Tensor, values: Vec<f32>| -> Result<Option<Tensor>> {
            if of.track_op() { Ok(Some(tensor(values, of.shape())?)) } else { Ok(None) }
        };
        Ok((gradient(q, dq)?, gradient(k, dk)?, gradient(v, dv)?))
    }
}

fn dims(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Dims> {
    for (name, operand) in [("q", q), ("k", k), ("v", v)] {
        if operand.dtype() != DType::F32 || !operand.device().is_cpu() {
            return Err(KernelError::shape(
                OP,
                format!("{name} as f32 on the CPU"),
                format!("{:?} on {:?}", operand.dtype(), operand.device().location()),
            ));
        }
    }
    let &[batch, entries, heads, width] = q.dims() else {
        return Err(KernelError::shape(OP, "q_bthd of rank 4 [B, T, H, D]", format!("{:?}", q.dims())));
    };
    let kv_heads = match k.dims() {
        &[b, t, kv_heads, d] if (b, t, d) == (batch, entries, width) => kv_heads,
        other => {
            let expected = format!("k_btgd [{batch}, {entries}, kv heads, {width}]");
            return Err(KernelError::shape(OP, expected, format!("{other:?}")));
        }
    };
    if v.dims() != k.dims() {
        return Err(KernelError::shape(OP, format!("v_btgd {:?}", k.dims()), format!("{:?}", v.dims())));
    }
    let dims = Dims { batch, entries, heads, kv_heads, width };
    dims.check()?;
    Ok(dims)
}

/// softmax(scale·QKᵀ)·V over the keys that `pattern` and `rows` let each query see: [B, T, H, D].
///
/// Differentiable in `q_bthd`, `k_btgd` and `v_btgd`. A row of length zero gives zeros.
///
/// # Errors
/// When shapes, dtypes or devices disagree; when H is not a multiple of the kv heads; when D is not in 1..=256;
/// when a group is below 2; when there is not one length (at most T) or one segment list (ascending, from 0, below T)
/// per row.
pub fn attention(
    q_bthd: &Tensor,
    k_btgd: &Tensor,
    v_btgd: &Tensor,
    scale: f64,
    pattern: Pattern,
    rows: &Rows,
) -> Result<Tensor> {
    let dims = dims(q_bthd, k_btgd, v_btgd)?;
    pattern.check()?;
    rows.check(dims.batch, dims.entries)?;
    let plan = Plan::new(pattern, rows, dims.batch, dims.entries, dims.heads);
    let op = Attention { scale: scale as f32, plan, dims, lse: OnceLock::new() };
    Ok(q_bthd.apply_op3(k_btgd, v_btgd, op)?)
}
