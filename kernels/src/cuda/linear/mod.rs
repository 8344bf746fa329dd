//! Linear layers on a device, frozen, trained, and with LoRA, PiSSA or DoRA beside them: [`crate::linear`]'s formulas as products
//! of cuBLASLt.
//!
//! Source: LoRA (Hu et al. 2021). Forward h = drop(x)·Aᵀ, y (+)= s·h·Bᵀ + x·Wᵀ; LoRA's part is made first and W's added to it in
//! the product: a y in 16 bits keeps LoRA's part to its own precision until the sum is rounded, so small factors are not lost.
//! Backward for the gradient g of y, with t = g·B:
//!   dx (+)= g·W + s·drop(t·A),  dA += s·tᵀ·drop(x),  dB += s·gᵀ·h,  dW += gᵀ·x where W learns.
//! A frozen weight gets no product of its own, nothing that is not asked for is computed, and without dropout and DoRA no pass but
//! the products touches x, y or dx.
//! PiSSA (Meng et al. 2024) takes the fixed s·B₀·A₀ off: y −= s·(x·A₀ᵀ)·B₀ᵀ. DoRA (Liu et al. 2024) scales results by columns
//! ([`Dora`]).
//!
//! Where a y in 16 bits is added to beside LoRA, or what is rounded is a difference (PiSSA) or scaled later (DoRA), sums are made in
//! f32 a part of the rows at a time and rounded once, as on the CPU.
//! Dropout: the same mask as on the CPU, a hash of a value's place, so that a layer that is run again drops the same.
//!
//! Shapes, row-major: x [n, I], W [O, I], A [r, I], B [O, r], h [n, r], y and g [n, O]. Operands are of one storage type, y of the
//! same or f32, gradients f32. Sums are f32, without TF32; h, t and DoRA's c∘g are rounded to the storage type, where the CPU keeps
//! them in f32. r and the widths may be anything; products of 16-bit operands are fastest where they are multiples of 8.
//! Errors: sizes that do not agree, memory of another device, no cuBLASLt. A product that cuBLASLt itself refuses ends a call when
//! others may have been queued: what the call adds to is then of no use.
//! Left out: DoRA and PiSSA beside one weight.

mod backward;
mod dora;
mod dropout;
mod forward;
mod products;

use cudarc::driver::{CudaView, CudaViewMut};

pub use self::dora::{Dora, row_norms};
use self::dropout::Mask;
pub use self::products::Products;
use super::check::{int, product, rows, values};
use super::device::Device;
use super::stored::Stored;
use crate::error::{KernelError, Result};
use crate::linear::Dropout;

const OP: &str = "cuda linear";

/// LoRA's factors.
#[derive(Clone, Copy)]
pub struct Lora<'a, T> {
    /// A [r, I].
    pub a: &'a CudaView<'a, T>,
    /// B [O, r].
    pub b: &'a CudaView<'a, T>,
    /// r.
    pub rank: usize,
    /// s = alpha / r.
    pub scale: f32,
    /// Dropout on LoRA's input, while training.
    pub dropout: Option<Dropout>,
    /// PiSSA's fixed part: factors whose product is taken off the weight. Not together with DoRA.
    pub initial: Option<Factors<'a, T>>,
    /// DoRA's magnitudes.
    pub dora: Option<Dora<'a>>,
}

/// Two factors of the rank of those that learn.
#[derive(Clone, Copy)]
pub struct Factors<'a, T> {
    /// A [r, I].
    pub a: &'a CudaView<'a, T>,
    /// B [O, r].
    pub b: &'a CudaView<'a, T>,
}

/// A linear layer, with LoRA or without.
#[derive(Clone, Copy)]
pub struct Layer<'a, T> {
    /// W [O, I].
    pub weight: &'a CudaView<'a, T>,
    /// O and I.
    pub shape: [usize; 2],
    /// What learns beside it.
    pub lora: Option<Lora<'a, T>>,
}

/// Where gradients of LoRA's factors are added: dA [r, I] and dB [O, r].
pub struct FactorGradients<'a, 'b> {
    /// dA.
    pub a: &'a mut CudaViewMut<'b, f32>,
    /// dB.
    pub b: &'a mut CudaViewMut<'b, f32>,
}

/// Where a layer's gradients are added; none where a parameter is frozen.
#[derive(Default)]
pub struct LayerGradients<'a, 'b> {
    /// dW [O, I].
    pub weight: Option<&'a mut CudaViewMut<'b, f32>>,
    /// dA and dB.
    pub factors: Option<FactorGradients<'a, 'b>>,
    /// dm \[O\], of DoRA's magnitudes.
    pub magnitude: Option<&'a mut CudaViewMut<'b, f32>>,
}

/// What backward reads.
#[derive(Clone, Copy)]
pub struct Saved<'a, T> {
    /// x [n, I].
    pub x: &'a CudaView<'a, T>,
    /// drop(x)·Aᵀ [n, r], as forward left it; made again where it is wanted and not here.
    pub reduced: Option<&'a CudaView<'a, T>>,
    /// The gradient of y, [n, O].
    pub gradient: &'a CudaView<'a, T>,
}

impl<T: Stored> Lora<'_, T> {
    /// Sizes beside W [O, I].
    fn check(&self, device: &Device, [out, inp]: [usize; 2]) -> Result<()> {
        let (of_a, of_b) = (product(OP, "A", &[self.rank, inp])?, product(OP, "B", &[out, self.rank])?);
        values(OP, "A", of_a, self.a, device)?;
        values(OP, "B", of_b, self.b, device)?;
        if self.rank == 0 {
            return Err(KernelError::shape(OP, "a rank of at least 1", "0"));
        }
        if let Some(initial) = &self.initial {
            values(OP, "the initial A", of_a, initial.a, device)?;
            values(OP, "the initial B", of_b, initial.b, device)?;
        }
        if let Some(dora) = &self.dora {
            values(OP, "DoRA's scales", out, dora.scale, device)?;
            values(OP, "DoRA's lengths", out, dora.norms, device)?;
        }
        if self.initial.is_some() && self.dora.is_some() {
            return Err(KernelError::shape(OP, "DoRA or PiSSA beside one weight", "both"));
        }
        Mask::new(self.dropout).map(|_| ())
    }
}

impl<T: Stored> Layer<'_, T> {
    fn check(&self, device: &Device, products: &Products) -> Result<()> {
        products.check(device)?;
        let [out, inp] = self.shape;
        values(OP, "W", product(OP, "W", &[out, inp])?, self.weight, device)?;
        if let Some(lora) = &self.lora {
            lora.check(device, self.shape)?;
        }
        let rank = self.lora.as_ref().map_or(0, |lora| lora.rank);
        for (what, size) in [("the width of y", out), ("the width of x", inp), ("the rank", rank)] {
            int(OP, what, size)?;
        }
        Ok(())
    }

    /// n, for x.
    fn rows(&self, device: &Device, products: &Products, x: &CudaView<'_, T>) -> Result<usize> {
        self.check(device, products)?;
        let n = rows(OP, "x", x.len(), self.shape[1])?;
        super::check::here(OP, "x", x, device)?;
        int(OP, "rows", n)?;
        Ok(n)
    }
}
