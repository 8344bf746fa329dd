//! Linear layers on candle's tape: the formulas of [`Layer`] as operations with a backward.
//!
//! A frozen weight is held by the operation, not by the graph: candle would compute its gradient and keep it.
//! Left out: DoRA and PiSSA, which exist on slices only.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Shape, Tensor};

use super::{Dropout, Layer, LayerGradients, LoraSlices, OP, Scratch, Weight};
use crate::cpu::{contiguous, tensor, with_values};
use crate::error::{KernelError, Result};
use crate::gemm::Products;

/// LoRA's factors as tensors.
#[derive(Clone, Copy, Debug)]
pub struct Lora<'a> {
    /// A [r, I].
    pub a_ri: &'a Tensor,
    /// B [O, r].
    pub b_or: &'a Tensor,
    /// s = alpha / r.
    pub scale: f64,
    /// Dropout on LoRA's input, while training.
    pub dropout: Option<Dropout>,
}

fn layer<'a>(w: &'a [f32], [out, inp]: [usize; 2], lora: Option<LoraSlices<'a>>) -> Layer<'a> {
    Layer { weight: Weight::F32(w), out, inp, lora, products: Products::F32 }
}

/// The result of a layer for a tensor of this layout.
fn apply(layer: &Layer, x: &[f32], layout: &Layout) -> (CpuStorage, Shape) {
    let mut y = vec![0f32; x.len() / layer.inp.max(1) * layer.out];
    layer.forward(x, &mut y, false, &mut Scratch::default());
    let mut dims = layout.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = layer.out;
    }
    (CpuStorage::F32(y), Shape::from(dims))
}

/// Gradients of a layer: the input's, where something upstream learns, and those that `into` has room for.
fn gradients(layer: &Layer, x: &Tensor, g: &Tensor, into: LayerGradients) -> Result<Option<Tensor>> {
    let mut dx = x.track_op().then(|| vec![0f32; x.elem_count()]);
    with_values(OP, x, |x| {
        with_values(OP, g, |g| {
            layer.backward(x, g, dx.as_mut().map(|dx| (&mut dx[..], false)), into, &mut Scratch::default());
        })
    })??;
    dx.map(|dx| tensor(dx, x.shape())).transpose()
}

struct Frozen {
    w_oi: Tensor,
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "linear-frozen"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = contiguous(OP, x, layout)?;
        let sizes = self.w_oi.dims2()?.into();
        Ok(with_values(OP, &self.w_oi, |w| apply(&layer(w, sizes, None), &x, layout))?)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let sizes = self.w_oi.dims2()?.into();
        Ok(with_values(OP, &self.w_oi, |w| {
            gradients(&layer(w, sizes, None), x, g, LayerGradients::default())
        })??)
    }
}

struct Trained;

impl CustomOp2 for Trained {
    fn name(&self) -> &'static str {
        "linear-trained"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, w) = (contiguous(OP, x, x_layout)?, contiguous(OP, w, w_layout)?);
        Ok(apply(&layer(&w, w_layout.shape().dims2()?.into(), None), &x, x_layout))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let mut dw = vec![0f32; w.elem_count()];
        let sizes = w.dims2()?.into();
        let into = LayerGradients { weight: Some(&mut dw), ..Default::default() };
        let dx = with_values(OP, w, |values| gradients(&layer(values, sizes, None), x, g, into))??;
        Ok((dx, Some(tensor(dw, w.shape())?)))
    }
}

struct WithLora {
    w_oi: Tensor,
    scale: f32,
    dropout: Option<Dropout>,
}

impl WithLora {
    /// Calls `f` with the layer over these factors.
    fn with<R>(&self, a: &[f32], b: &[f32], f: impl FnOnce(&Layer) -> R) -> Result<R> {
        let sizes: [usize; 2] = self.w_oi.dims2()?.into();
        let rank = a.len() / sizes[1].max(1);
        let (scale, dropout) = (self.scale, self.dropout);
        let lora = LoraSlices { a, b, rank, scale, dropout, initial: None, dora: None };
        with_values(OP, &self.w_oi, |w| f(&layer(w, sizes, Some(lora))))
    }
}

impl CustomOp3 for WithLora {
    fn name(&self) -> &'static str {
        "linear-lora"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = contiguous(OP, x, x_layout)?;
        let (a, b) = (contiguous(OP, a, a_layout)?, contiguous(OP, b, b_layout)?);
        Ok(self.with(&a, &b, |layer| apply(layer, &x, x_layout))?)
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (mut da, mut db) = (vec![0f32; a.elem_count()], vec![0f32; b.elem_count()]);
        let into = LayerGradients { a: Some(&mut da), b: Some(&mut db), ..Default::default() };
        let dx = with_values(OP, a, |a| {
            with_values(OP, b, |b| self.with(a, b, |layer| gradients(layer, x, g, into)))
        })????;
        Ok((dx, Some(tensor(da, a.shape())?), Some(tensor(db, b.shape())?)))
    }
}

/// y = x·Wᵀ, plus LoRA where given. W gets a gradient only if it learns and carries no LoRA.
///
/// # Errors
/// When shapes do not agree, or W learns while LoRA is attached to it.
pub fn linear(x: &Tensor, w_oi: &Tensor, lora: Option<Lora>) -> Result<Tensor> {
    let [out, inp] = w_oi.dims() else {
        return Err(KernelError::shape(OP, "a weight of rank 2 [O, I]", format!("{:?}", w_oi.dims())));
    };
    if x.dims().last() != Some(inp) {
        return Err(KernelError::shape(OP, format!("x [.., {inp}]"), format!("{:?}", x.dims())));
    }
    let Some(lora) = lora else {
        return Ok(if w_oi.track_op() {
            x.apply_op2(w_oi, Trained)?
        } else {
            x.apply_op1(Frozen { w_oi: w_oi.clone() })?
        });
    };
    let rank = lora.a_ri.dims().first().copied().unwrap_or(0);
    if lora.a_ri.dims() != [rank, *inp] || lora.b_or.dims() != [*out, rank] || rank == 0 {
        return Err(KernelError::shape(
            OP,
            format!("LoRA A [r, {inp}] and B [{out}, r] with r of at least 1"),
            format!("A {:?} and B {:?}", lora.a_ri.dims(), lora.b_or.dims()),
        ));
    }
    if w_oi.track_op() {
        return Err(KernelError::argument(OP, "a weight that carries LoRA has to be frozen"));
    }
    if let Some(Dropout { p, .. }) = lora.dropout
        && !(0.0..1.0).contains(&p)
    {
        return Err(KernelError::argument(OP, format!("dropout: expected 0 <= p < 1, got {p}")));
    }
    let dropout = lora.dropout.filter(|d| d.p > 0.0);
    let op = WithLora { w_oi: w_oi.clone(), scale: lora.scale as f32, dropout };
    Ok(x.apply_op3(lora.a_ri, lora.b_or, op)?)
}
