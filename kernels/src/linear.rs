//! Linear layers: frozen, trained, and frozen with LoRA, DoRA or PiSSA beside them.
//!
//! Sources: LoRA (Hu et al. 2021) y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ with s = alpha/r. Backward for the gradient g of y:
//!   dx = g·W + s·drop(g·B·A),  dA = s·(g·B)ᵀ·drop(x),  dB = s·gᵀ·(drop(x)·Aᵀ),  dW = gᵀ·x only where W learns.
//! A frozen weight gets no gradient product, and an input nothing learns from gets none either.
//! DoRA (Liu et al. 2024) scales every result by m/n: see [`Dora`].
//! PiSSA (Meng et al. 2024) trains B·A from the best approximation B₀·A₀ of W and freezes what is left of W. Here W stays as
//! it is and the fixed s·B₀·A₀ is taken off in the product, y = x·Wᵀ + s·(drop(x)·Aᵀ·Bᵀ − x·A₀ᵀ·B₀ᵀ): two thin products more,
//! and W needs no second copy, no rounding of the rest, and can stay where it is mapped.
//!
//! [`Layer`] works on slices and holds these formulas; [`linear`] is the same on candle's tape.
//!
//! Shapes: x [.., I], W [O, I], A [r, I], B [O, r], y [.., O]. On slices x, W, y and g are stored in f32 or bf16; A, B and
//! all gradients are f32. Products with W are taken as the layer says, those with A and B in f32. A y stored in bf16 is
//! rounded once, with LoRA's part in it: added to a rounded value, small factors would be lost.
//! Dropout masks come from a counter: the same seed gives the same mask when a block is recomputed.

mod dora;
mod tape;

use rayon::prelude::*;

pub use self::dora::{Dora, row_norms};
pub use self::tape::{Lora, linear};
use crate::cpu::{for_rows, multiversion};
use crate::gemm::{Mat, Products, matmul_with};
use crate::math::convert;
use crate::skinny;
use crate::store::{Store, bf16};

const OP: &str = "linear";
const MASK_CHUNK: usize = 16_384;
/// Values of a result that are held in f32 at a time, where it is rounded or scaled after LoRA's part is added.
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
        let (threshold, factor) = self.threshold_and_factor();
        mask(values, self.seed, first as u64, threshold, factor);
    }

    /// What 32 bits of a place's hash are below where a value is zeroed, and what the others are multiplied by.
    pub(crate) fn threshold_and_factor(&self) -> (u64, f32) {
        ((self.p * 4_294_967_296.0) as u64, (1.0 / (1.0 - self.p)) as f32)
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
    /// PiSSA's fixed part: factors whose product is taken off the weight. Not together with DoRA.
    pub initial: Option<Factors<'a>>,
    /// DoRA's magnitudes.
    pub dora: Option<Dora<'a>>,
}

/// Two factors of the rank of those that learn.
#[derive(Clone, Copy, Debug)]
pub struct Factors<'a> {
    /// A [r, I].
    pub a: &'a [f32],
    /// B [O, r].
    pub b: &'a [f32],
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
    /// dm \[O\], of DoRA's magnitudes.
    pub magnitude: Option<&'a mut [f32]>,
}

/// Buffers of a layer, used again from call to call: 2·n·r values, and where y is stored in bf16 or scaled by DoRA and there
/// is LoRA at most 8 MiB more.
#[derive(Default)]
pub struct Scratch {
    low: Vec<f32>,
    low_gradient: Vec<f32>,
    rows: Vec<f32>,
}

/// What decides the buffers of a layer with LoRA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoraShape {
    /// O.
    pub out: usize,
    /// r.
    pub rank: usize,
    /// Whether it has DoRA's magnitudes.
    pub dora: bool,
    /// Whether it has PiSSA's fixed part.
    pub initial: bool,
}

impl Scratch {
    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let values = self.low.capacity() + self.low_gradient.capacity() + self.rows.capacity();
        (values * size_of::<f32>()) as u64
    }

    /// What these layers hold for `rows` rows once all have been walked forward and, where `backward`, back; `rounded` where
    /// the results are stored in bf16.
    pub fn planned_bytes(rows: usize, layers: &[LoraShape], rounded: bool, backward: bool) -> u64 {
        let most = |of: &dyn Fn(&LoraShape) -> usize| layers.iter().map(of).max().unwrap_or(0);
        let held = |l: &LoraShape| if rounded || l.dora { rows.min(many(l.out)) * l.out } else { 0 };
        let second = |l: &LoraShape| if backward || l.initial { rows * l.rank } else { 0 };
        let values = most(&|l| rows * l.rank) + most(&second) + most(&held);
        (values * size_of::<f32>()) as u64
    }
}

/// Rows of a result of width `out` that are held in f32 at a time.
fn many(out: usize) -> usize {
    (ROUNDED_LATER / out.max(1)).max(1)
}

/// A buffer of exactly `len` values, without slack where it had to be made anew.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.capacity() < len {
        *buffer = Vec::with_capacity(len);
    }
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
        let both = self.lora.is_some_and(|lora| lora.dora.is_some() && lora.initial.is_some());
        assert!(!both, "DoRA and PiSSA beside one weight");
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
        let Scratch { low, low_gradient: fixed, rows: held } = scratch;
        let low = sized(low, rows * lora.rank);
        skinny::down(x, lora.a_mat(self.inp), lora.scale, lora.dropout, low);
        let fixed = match &lora.initial {
            None => &[],
            Some(initial) => {
                let fixed = sized(fixed, rows * lora.rank);
                skinny::down(x, Mat::new(initial.a, lora.rank, self.inp), -lora.scale, None, fixed);
                &*fixed
            }
        };
        let add_low_rank = |first: usize, y: &mut [f32]| {
            let part = first * lora.rank..(first + y.len() / self.out.max(1)) * lora.rank;
            skinny::up_add(&low[part.clone()], lora.b_mat(self.out), None, y);
            if let Some(initial) = &lora.initial {
                skinny::up_add(&fixed[part], Mat::new(initial.b, self.out, lora.rank).t(), None, y);
            }
        };
        if lora.dora.is_none()
            && let Some(y) = Y::as_f32_mut(y)
        {
            self.weight.apply(sizes, x, y, accumulate, self.products);
            return add_low_rank(0, y);
        }
        let many = many(self.out);
        for (i, y) in y.chunks_mut((many * self.out).max(1)).enumerate() {
            let first = i * many;
            let count = y.len() / self.out;
            let sums = sized(held, y.len());
            // What DoRA does not scale is added after it has scaled the rest.
            let inside = accumulate && lora.dora.is_none();
            if inside {
                for_rows(sums, 1, |at, sums| convert(&y[at..at + sums.len()], sums));
            }
            let x = &x[first * self.inp..][..count * self.inp];
            self.weight.apply(sizes, x, sums, inside, self.products);
            add_low_rank(first, sums);
            match &lora.dora {
                None => for_rows(y, 1, |at, y| convert(&sums[at..at + y.len()], y)),
                Some(dora) => dora.finish(sums, y, accumulate),
            }
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
        let dora = self.lora.as_ref().and_then(|lora| lora.dora);
        if let Some((dx, accumulate)) = &mut dx {
            assert_eq!(dx.len(), x.len(), "dx is as large as x");
            match dora {
                None => self.weight.apply_transposed(sizes, g, dx, *accumulate, self.products),
                Some(dora) => self.through_scaled(dora, g, dx, *accumulate, &mut scratch.rows),
            }
        }
        let Some(lora) = &self.lora else { return };
        if into.a.is_some() || dx.is_some() {
            let low_gradient = sized(&mut scratch.low_gradient, rows * lora.rank);
            let scaled = dora.map(|dora| dora.scaled_rows(lora.b, lora.rank));
            let b = Mat::new(scaled.as_deref().unwrap_or(lora.b), self.out, lora.rank).t();
            skinny::down(g, b, lora.scale, None, low_gradient);
            if let Some(da) = into.a {
                skinny::outer_add(low_gradient, lora.rank, x, self.inp, lora.dropout, da, false);
            }
            if let Some((dx, _)) = dx {
                skinny::up_add(low_gradient, lora.a_mat(self.inp), lora.dropout, dx);
                if let Some(initial) = &lora.initial {
                    let b = Mat::new(initial.b, self.out, lora.rank).t();
                    skinny::down(g, b, -lora.scale, None, low_gradient);
                    skinny::up_add(low_gradient, Mat::new(initial.a, lora.rank, self.inp), None, dx);
                }
            }
        }
        if into.b.is_none() && into.magnitude.is_none() {
            return;
        }
        let low = sized(&mut scratch.low, rows * lora.rank);
        skinny::down(x, lora.a_mat(self.inp), lora.scale, lora.dropout, low);
        if let Some(db) = into.b {
            match dora {
                None => skinny::outer_add(low, lora.rank, g, self.out, None, db, true),
                Some(dora) => {
                    let mut unscaled = vec![0f32; db.len()];
                    skinny::outer_add(low, lora.rank, g, self.out, None, &mut unscaled, true);
                    dora.add_scaled_rows(&unscaled, lora.rank, db);
                }
            }
        }
        if let (Some(dm), Some(dora)) = (into.magnitude, dora) {
            self.magnitude_gradient(lora, dora, x, g, low, dm, &mut scratch.rows);
        }
    }
}
