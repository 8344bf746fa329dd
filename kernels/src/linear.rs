//! Linear layers: frozen, trained, and frozen with LoRA.
//!
//! Source: y = x·Wᵀ; LoRA (Hu et al. 2021) y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ with s = alpha/r.
//! Backward for the gradient g of y:
//!   dx = g·W + s·drop(g·B·A),  dA = s·(g·B)ᵀ·drop(x),  dB = s·gᵀ·(drop(x)·Aᵀ),  dW = gᵀ·x only where W learns.
//! A frozen weight is held by the operation, not by the graph, so that no gradient is ever computed for it, and an
//! input nothing learns from gets none either.
//!
//! Shapes: x [.., I], W [O, I], A [r, I], B [O, r], y [.., O].
//! Dropout masks come from a counter: the same seed gives the same mask when a block is recomputed.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Shape, Tensor};
use rayon::prelude::*;

use crate::cpu::{contiguous, tensor, with_values};
use crate::error::{KernelError, Result};
use crate::gemm::{Mat, matmul};

const OP: &str = "linear";
const MASK_CHUNK: usize = 16_384;

/// Zeroes inputs at random and scales the others up, so that the expectation stays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of a zero, 0 ≤ p < 1.
    pub p: f64,
    /// The mask is a function of this and the position in the tensor alone.
    pub seed: u64,
}

impl Dropout {
    /// Zeroes and scales `values` in place; the same values of the same tensor every time.
    pub fn apply(&self, values: &mut [f32]) {
        let threshold = (self.p * 4_294_967_296.0) as u64;
        let keep = (1.0 / (1.0 - self.p)) as f32;
        values.par_chunks_mut(MASK_CHUNK).enumerate().for_each(|(chunk, values)| {
            for (i, value) in values.iter_mut().enumerate() {
                let z = self
                    .seed
                    .wrapping_add(((chunk * MASK_CHUNK + i) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
                let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
                *value = if (z >> 32) < threshold { 0.0 } else { *value * keep };
            }
        });
    }
}

/// LoRA factors beside a frozen weight.
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

struct Sizes {
    rows: usize,
    inp: usize,
    out: usize,
}

fn sizes(x: &Layout, w: &Tensor) -> Sizes {
    let (out, inp) = (w.dims()[0], w.dims()[1]);
    Sizes { rows: x.shape().elem_count() / inp.max(1), inp, out }
}

fn out_shape(x: &Layout, out: usize) -> Shape {
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = out;
    }
    Shape::from(dims)
}

/// dx = g·W, or nothing when nothing upstream learns.
fn input_gradient(x: &Tensor, w: &Tensor, g: &Tensor) -> Result<Option<Vec<f32>>> {
    if !x.track_op() {
        return Ok(None);
    }
    let s = sizes(x.layout(), w);
    let mut dx = vec![0f32; s.rows * s.inp];
    with_values(OP, g, |g| {
        with_values(OP, w, |w| {
            matmul(&mut dx, Mat::new(g, s.rows, s.out), Mat::new(w, s.out, s.inp), 1.0, false);
        })
    })
    .and_then(|r| r)?;
    Ok(Some(dx))
}

struct Frozen {
    w_oi: Tensor,
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "linear-frozen"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let s = sizes(layout, &self.w_oi);
        let x = contiguous(OP, x, layout)?;
        let mut y = vec![0f32; s.rows * s.out];
        with_values(OP, &self.w_oi, |w| {
            matmul(&mut y, Mat::new(&x, s.rows, s.inp), Mat::new(w, s.out, s.inp).t(), 1.0, false);
        })?;
        Ok((CpuStorage::F32(y), out_shape(layout, s.out)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        match input_gradient(x, &self.w_oi, g)? {
            Some(dx) => Ok(Some(tensor(dx, x.shape())?)),
            None => Ok(None),
        }
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
        let (out, inp) = (w_layout.dims()[0], w_layout.dims()[1]);
        let (x, w) = (contiguous(OP, x, x_layout)?, contiguous(OP, w, w_layout)?);
        let rows = x.len() / inp.max(1);
        let mut y = vec![0f32; rows * out];
        matmul(&mut y, Mat::new(&x, rows, inp), Mat::new(&w, out, inp).t(), 1.0, false);
        Ok((CpuStorage::F32(y), out_shape(x_layout, out)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let s = sizes(x.layout(), w);
        let dx = match input_gradient(x, w, g)? {
            Some(dx) => Some(tensor(dx, x.shape())?),
            None => None,
        };
        let mut dw = vec![0f32; s.out * s.inp];
        with_values(OP, x, |x| {
            with_values(OP, g, |g| {
                matmul(&mut dw, Mat::new(g, s.rows, s.out).t(), Mat::new(x, s.rows, s.inp), 1.0, false);
            })
        })
        .and_then(|r| r)?;
        Ok((dx, Some(tensor(dw, w.shape())?)))
    }
}

struct WithLora {
    w_oi: Tensor,
    scale: f32,
    dropout: Option<Dropout>,
}

impl WithLora {
    fn dropped<'a>(&self, x: std::borrow::Cow<'a, [f32]>) -> std::borrow::Cow<'a, [f32]> {
        match &self.dropout {
            None => x,
            Some(dropout) => {
                let mut copy = x.into_owned();
                dropout.apply(&mut copy);
                copy.into()
            }
        }
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
        let s = sizes(x_layout, &self.w_oi);
        let rank = a_layout.dims()[0];
        let x = contiguous(OP, x, x_layout)?;
        let (a, b) = (contiguous(OP, a, a_layout)?, contiguous(OP, b, b_layout)?);
        let mut y = vec![0f32; s.rows * s.out];
        with_values(OP, &self.w_oi, |w| {
            matmul(&mut y, Mat::new(&x, s.rows, s.inp), Mat::new(w, s.out, s.inp).t(), 1.0, false);
        })?;
        let x = self.dropped(x);
        let mut low = vec![0f32; s.rows * rank];
        matmul(&mut low, Mat::new(&x, s.rows, s.inp), Mat::new(&a, rank, s.inp).t(), 1.0, false);
        matmul(&mut y, Mat::new(&low, s.rows, rank), Mat::new(&b, s.out, rank).t(), self.scale, true);
        Ok((CpuStorage::F32(y), out_shape(x_layout, s.out)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let s = sizes(x.layout(), &self.w_oi);
        let rank = a.dims()[0];
        let mut dx = input_gradient(x, &self.w_oi, g)?;
        let mut da = vec![0f32; rank * s.inp];
        let mut db = vec![0f32; s.out * rank];
        with_values(OP, x, |x| {
            with_values(OP, g, |g| {
                with_values(OP, a, |a| {
                    with_values(OP, b, |b| {
                        let g = Mat::new(g, s.rows, s.out);
                        let a = Mat::new(a, rank, s.inp);
                        let x = self.dropped(x.into());
                        let x = Mat::new(&x, s.rows, s.inp);
                        let mut g_low = vec![0f32; s.rows * rank];
                        matmul(&mut g_low, g, Mat::new(b, s.out, rank), self.scale, false);
                        let g_low = Mat::new(&g_low, s.rows, rank);
                        matmul(&mut da, g_low.t(), x, 1.0, false);
                        let mut low = vec![0f32; s.rows * rank];
                        matmul(&mut low, x, a.t(), self.scale, false);
                        matmul(&mut db, g.t(), Mat::new(&low, s.rows, rank), 1.0, false);
                        if let Some(dx) = &mut dx {
                            match &self.dropout {
                                None => matmul(dx, g_low, a, 1.0, true),
                                Some(dropout) => {
                                    let mut through = vec![0f32; s.rows * s.inp];
                                    matmul(&mut through, g_low, a, 1.0, false);
                                    dropout.apply(&mut through);
                                    dx.par_iter_mut().zip(through).for_each(|(d, t)| *d += t);
                                }
                            }
                        }
                    })
                })
            })
        })
        .and_then(|r| r)
        .and_then(|r| r)
        .and_then(|r| r)?;
        let dx = match dx {
            Some(dx) => Some(tensor(dx, x.shape())?),
            None => None,
        };
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
