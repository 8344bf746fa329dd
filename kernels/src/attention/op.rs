//! The candle operation: checks, forward, backward.
//!
//! The op keeps the log-sum-exp of its own forward pass ([B, T, H], f32) for its backward pass; candle drops both
//! when the graph is dropped, or at once when nothing tracks gradients.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Storage, Tensor};

use super::Dims;
use super::pattern::{OP, Pattern, Rows};
use super::slices::{Gradients, Mixed, Prepared};
use super::view::View;
use crate::error::{KernelError, Result};
use crate::micro::Products;
use crate::store::{Store, bf16};

/// What attention is told besides its operands.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Multiplies q·k, usually 1/√D.
    pub scale: f64,
    /// Which keys a query sees.
    pub pattern: Pattern,
    /// Row lengths and packed segments.
    pub rows: &'a Rows,
    /// ALiBi's slope of each query head.
    pub slopes: Option<&'a [f32]>,
    /// How products are computed.
    pub products: Products,
}

struct Attention {
    prepared: Prepared,
    lse: OnceLock<Vec<f32>>,
}

impl Attention {
    fn forward<S: Store>(
        &self,
        [q, k, v]: [(&CpuStorage, &Layout); 3],
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let view = |(storage, layout): (_, _)| View::<S>::new(storage, layout);
        let mut mixed = Mixed::default();
        self.prepared.forward_views([view(q)?, view(k)?, view(v)?], &mut mixed);
        // An op runs forward once; were it run again, on the same inputs, the value would be the same.
        let _ = self.lse.set(mixed.lse);
        Ok((S::storage(mixed.out), q.1.shape().clone()))
    }

    fn backward<S: Store>(
        &self,
        operands: [&Tensor; 3],
        out: &Tensor,
        d_out: &Tensor,
    ) -> candle_core::Result<Gradients> {
        let lse = self.lse.get().ok_or_else(|| {
            KernelError::argument(OP, "expected a forward pass before the backward pass, got none")
        })?;
        let out = crate::cpu::with_values(OP, &out.to_dtype(DType::F32)?, <[f32]>::to_vec)?;
        let out = out.into_iter().map(S::put).collect();
        let mixed = Mixed::<S> { out, lse: lse.clone() };
        let operands = operands.map(Tensor::storage_and_layout);
        let view = |i: usize| {
            let (storage, layout) = &operands[i];
            match &**storage {
                Storage::Cpu(storage) => View::<S>::new(storage, layout),
                _ => Err(KernelError::shape(OP, "CPU tensors", "another device")),
            }
        };
        let views = [view(0)?, view(1)?, view(2)?];
        let mut gradients = Gradients::default();
        crate::cpu::with_values(OP, &d_out.to_dtype(DType::F32)?, |d_out| {
            self.prepared.backward_views(views, &mixed, d_out, &mut gradients);
        })?;
        Ok(gradients)
    }
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
        let operands = [(q, q_layout), (k, k_layout), (v, v_layout)];
        match q {
            CpuStorage::BF16(_) => self.forward::<bf16>(operands),
            _ => self.forward::<f32>(operands),
        }
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Gradients { q: dq, k: dk, v: dv } = match q.dtype() {
            DType::BF16 => self.backward::<bf16>([q, k, v], out, d_out)?,
            _ => self.backward::<f32>([q, k, v], out, d_out)?,
        };
        let gradient = |of: &Tensor, values: Vec<f32>| -> Result<Option<Tensor>> {
            match of.track_op() {
                true => Ok(Some(crate::cpu::tensor(values, of.shape())?.to_dtype(of.dtype())?)),
                false => Ok(None),
            }
        };
        Ok((gradient(q, dq)?, gradient(k, dk)?, gradient(v, dv)?))
    }
}

fn dims(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Dims> {
    let dtype = if q.dtype() == DType::BF16 { DType::BF16 } else { DType::F32 };
    for (name, operand) in [("q", q), ("k", k), ("v", v)] {
        if operand.dtype() != dtype || !operand.device().is_cpu() {
            return Err(KernelError::shape(
                OP,
                format!("{name} as {} on the CPU", dtype.as_str()),
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
    Ok(Dims { batch, entries, heads, kv_heads, width })
}

/// softmax(scale·QKᵀ)·V over the keys that `pattern` and `rows` let each query see: [B, T, H, D].
///
/// Differentiable in `q_bthd`, `k_btgd` and `v_btgd`. A row of length zero gives zeros.
///
/// # Errors
/// When shapes, dtypes or devices disagree; when H is not a multiple of the kv heads; when D is not in 1..=256;
/// when a group is below 2 or a window below 1; when there is not one length (at most T) or one segment list (ascending,
/// from 0, below T) per row.
pub fn attention(
    q_bthd: &Tensor,
    k_btgd: &Tensor,
    v_btgd: &Tensor,
    scale: f64,
    pattern: Pattern,
    rows: &Rows,
) -> Result<Tensor> {
    let options = Options { scale, pattern, rows, slopes: None, products: Products::F32 };
    attention_with(q_bthd, k_btgd, v_btgd, &options)
}

/// As [`attention`], with everything that can be chosen. Operands are f32, or all three bf16: then the result is bf16, and
/// so are the gradients, which are summed in f32.
///
/// # Errors
/// As [`attention`]; when there is not one finite slope per query head.
pub fn attention_with(
    q_bthd: &Tensor,
    k_btgd: &Tensor,
    v_btgd: &Tensor,
    options: &Options<'_>,
) -> Result<Tensor> {
    let Dims { batch, entries, heads, kv_heads, width } = dims(q_bthd, k_btgd, v_btgd)?;
    let sizes = [batch, entries, heads, kv_heads, width];
    let mut prepared =
        Prepared::new(sizes, options.scale, options.pattern, options.rows)?.with_products(options.products);
    if let Some(slopes) = options.slopes {
        prepared = prepared.with_slopes(slopes)?;
    }
    let op = Attention { prepared, lse: OnceLock::new() };
    Ok(q_bthd.apply_op3(k_btgd, v_btgd, op)?)
}
