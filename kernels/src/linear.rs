//! Linear layers: frozen, trained, and frozen with LoRA.
//!
//! Source: y = x·Wᵀ; LoRA (Hu et al. 2021) y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ with s = alpha/r.
//! Backward for the gradient g of y:
//!   dx = g·W + s·drop(g·B·A),  dA = s·(g·B)ᵀ·drop(x),  dB = s·gᵀ·(drop(x)·Aᵀ),  dW = gᵀ·x only where W learns.
//! A frozen weight gets no gradient product, and an input nothing learns from gets none either.
//!
//! [`Layer`] works on slices and holds these formulas; [`linear`] is the same on candle's tape, where a frozen weight is
//! held by the operation, not by the graph.
//!
//! Shapes: x [.., I], W [O, I], A [r, I], B [O, r], y [.., O]. On slices x, W, y and g are stored in f32 or bf16; A, B and
//! all gradients are f32. Products with W are taken as the layer says, those with A and B in f32. A y stored in bf16 is
//! rounded once, with LoRA's part in it: added to a rounded value, small factors would be lost.
//! Dropout masks come from a counter: the same seed gives the same mask when a block is recomputed.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Shape, Tensor};
use rayon::prelude::*;

use crate::cpu::{contiguous, for_rows, multiversion, tensor, with_values};
use crate::error::{KernelError, Result};
use crate::gemm::{Mat, Products, matmul_with};
use crate::math::convert;
use crate::skinny;
use crate::store::{Store, bf16};

const OP: &str = "linear";
const MASK_CHUNK: usize = 16_384;
/// Values of a bf16 result that are held in f32 at a time while LoRA's part is added.
const ROUNDED_LATER: usize = 2 << 20;

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
        let chunks = values.par_chunks_mut(MASK_CHUNK).enumerate();
        chunks.for_each(|(chunk, values)| self.apply_at(chunk * MASK_CHUNK, values));
    }

    /// As [`Dropout::apply`], for the values from place `first` of a tensor on.
    pub(crate) fn apply_at(&self, first: usize, values: &mut [f32]) {
        let threshold = (self.p * 4_294_967_296.0) as u64;
        mask(values, self.seed, first as u64, threshold, (1.0 / (1.0 - self.p)) as f32);
    }
}

multiversion! {
    fn mask(values: &mut [f32], seed: u64, first: u64, threshold: u64, keep: f32) {
        for (i, value) in values.iter_mut().enumerate() {
            let z = seed.wrapping_add((first + i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
            let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            *value = if (z >> 32) < threshold { 0.0 } else { *value * keep };
        }
    }
}

/// A matrix that is stored in f32 or bf16, row-major.
#[derive(Clone, Copy, Debug)]
pub enum Weight<'a> {
    /// f32 values.
    F32(&'a [f32]),
    /// bf16 values.
    Bf16(&'a [bf16]),
}

impl Weight<'_> {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(w) => w.len(),
            Self::Bf16(w) => w.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `y` [n, O] (+)= `x` [n, I]·Wᵀ for W [O, I].
    pub(crate) fn apply<X: Store, Y: Store>(
        self,
        [out, inp]: [usize; 2],
        x: &[X],
        y: &mut [Y],
        accumulate: bool,
        products: Products,
    ) {
        let x = Mat::new(x, y.len() / out.max(1), inp);
        match self {
            Self::F32(w) => matmul_with(y, x, Mat::new(w, out, inp).t(), 1.0, accumulate, products),
            Self::Bf16(w) => matmul_with(y, x, Mat::new(w, out, inp).t(), 1.0, accumulate, products),
        }
    }

    /// `dx` [n, I] (+)= `g` [n, O]·W for W [O, I].
    pub(crate) fn apply_transposed<G: Store>(
        self,
        [out, inp]: [usize; 2],
        g: &[G],
        dx: &mut [f32],
        accumulate: bool,
        products: Products,
    ) {
        let g = Mat::new(g, dx.len() / inp.max(1), out);
        match self {
            Self::F32(w) => matmul_with(dx, g, Mat::new(w, out, inp), 1.0, accumulate, products),
            Self::Bf16(w) => matmul_with(dx, g, Mat::new(w, out, inp), 1.0, accumulate, products),
        }
    }
}

/// LoRA's factors beside a weight.
#[derive(Clone, Copy, Debug)]
pub struct LoraSlices<'a> {
    /// A [r, I].
    pub a: &'a [f32],
    /// B [O, r].
    pub b: &'a [f32],
    /// r.
    pub rank: usize,
    /// s = alpha / r.
    pub scale: f32,
    /// Dropout on LoRA's input, while training.
    pub dropout: Option<Dropout>,
}

/// A linear layer over slices. Sizes are the caller's to check: a slice that is too short panics.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// W [O, I].
    pub weight: Weight<'a>,
    /// O.
    pub out: usize,
    /// I.
    pub inp: usize,
    /// LoRA, where it is attached.
    pub lora: Option<LoraSlices<'a>>,
    /// How products with W are computed.
    pub products: Products,
}

/// Where a layer's gradients are added; none where a parameter is frozen.
#[derive(Default)]
pub struct LayerGradients<'a> {
    /// dW [O, I].
    pub weight: Option<&'a mut [f32]>,
    /// dA [r, I].
    pub a: Option<&'a mut [f32]>,
    /// dB [O, r].
    pub b: Option<&'a mut [f32]>,
}

/// Buffers of a layer, used again from call to call: 2·n·r values, and where y is stored in bf16 and there is LoRA at most
/// 8 MiB more.
#[derive(Default)]
pub struct Scratch {
    low: Vec<f32>,
    low_gradient: Vec<f32>,
    rows: Vec<f32>,
}

fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

impl LoraSlices<'_> {
    fn a_mat(&self, inp: usize) -> Mat<'_> {
        Mat::new(self.a, self.rank, inp)
    }

    /// The transpose of B, [r, O].
    fn b_mat(&self, out: usize) -> Mat<'_> {
        Mat::new(self.b, out, self.rank).t()
    }
}

impl Layer<'_> {
    fn rows(&self, x: usize, y: usize) -> usize {
        let rows = x / self.inp.max(1);
        assert!(
            x == rows * self.inp && y == rows * self.out,
            "rows of {} and {} values, got {x} and {y} values",
            self.inp,
            self.out
        );
        rows
    }

    /// `y` [n, O] = the layer's result for `x` [n, I], added to what is there when `accumulate`.
    ///
    /// # Panics
    /// When sizes do not agree.
    pub fn forward<X: Store, Y: Store>(&self, x: &[X], y: &mut [Y], accumulate: bool, scratch: &mut Scratch) {
        let rows = self.rows(x.len(), y.len());
        let sizes = [self.out, self.inp];
        let Some(lora) = &self.lora else {
            return self.weight.apply(sizes, x, y, accumulate, self.products);
        };
        let Scratch { low, rows: held, .. } = scratch;
        let low = sized(low, rows * lora.rank);
        skinny::down(x, lora.a_mat(self.inp), lora.scale, lora.dropout, low);
        if let Some(y) = Y::as_f32_mut(y) {
            self.weight.apply(sizes, x, y, accumulate, self.products);
            return skinny::up_add(low, lora.b_mat(self.out), None, y);
        }
        let many = (ROUNDED_LATER / self.out.max(1)).max(1);
        for (i, y) in y.chunks_mut((many * self.out).max(1)).enumerate() {
            let first = i * many;
            let count = y.len() / self.out;
            let sums = sized(held, y.len());
            if accumulate {
                for_rows(sums, 1, |at, sums| convert(&y[at..at + sums.len()], sums));
            }
            let x = &x[first * self.inp..][..count * self.inp];
            self.weight.apply(sizes, x, sums, accumulate, self.products);
            skinny::up_add(&low[first * lora.rank..][..count * lora.rank], lora.b_mat(self.out), None, sums);
            for_rows(y, 1, |at, y| convert(&sums[at..at + y.len()], y));
        }
    }

    /// The gradients for `g` [n, O], that of the result for `x` [n, I]: the input's into `dx` [n, I] where it is wanted,
    /// added to what is there when its flag says so; the parameters' added to `into`.
    ///
    /// # Panics
    /// When sizes do not agree.
    pub fn backward<X: Store, G: Store>(
        &self,
        x: &[X],
        g: &[G],
        mut dx: Option<(&mut [f32], bool)>,
        into: LayerGradients<'_>,
        scratch: &mut Scratch,
    ) {
        let rows = self.rows(x.len(), g.len());
        let sizes = [self.out, self.inp];
        if let Some(dw) = into.weight {
            let (x, g) = (Mat::new(x, rows, self.inp), Mat::new(g, rows, self.out));
            matmul_with(dw, g.t(), x, 1.0, true, self.products);
        }
        if let Some((dx, accumulate)) = &mut dx {
            assert_eq!(dx.len(), x.len(), "dx is as large as x");
            self.weight.apply_transposed(sizes, g, dx, *accumulate, self.products);
        }
        let Some(lora) = &self.lora else { return };
        if into.a.is_some() || dx.is_some() {
            let low_gradient = sized(&mut scratch.low_gradient, rows * lora.rank);
            skinny::down(g, lora.b_mat(self.out), lora.scale, None, low_gradient);
            if let Some(da) = into.a {
                skinny::outer_add(low_gradient, lora.rank, x, self.inp, lora.dropout, da, false);
            }
            if let Some((dx, _)) = dx {
                skinny::up_add(low_gradient, lora.a_mat(self.inp), lora.dropout, dx);
            }
        }
        if let Some(db) = into.b {
            let low = sized(&mut scratch.low, rows * lora.rank);
            skinny::down(x, lora.a_mat(self.inp), lora.scale, lora.dropout, low);
            skinny::outer_add(low, lora.rank, g, self.out, None, db, true);
        }
    }
}

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
        let lora = LoraSlices { a, b, rank, scale: self.scale, dropout: self.dropout };
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
        let into = LayerGradients { weight: None, a: Some(&mut da), b: Some(&mut db) };
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
