//! Linear layers with LoRA on a device: [`crate::linear`]'s formulas as products of cuBLASLt.
//!
//! Source: LoRA (Hu et al. 2021). Forward h = x·Aᵀ, y = s·h·Bᵀ + x·Wᵀ; LoRA's part is made first and W's added to it in the product:
//! a y in 16 bits keeps LoRA's part to its own precision until the sum is rounded, so small factors are not lost. Backward for the gradient g of y, with
//! t = g·B:
//!   dx += g·W + s·t·A,  dA += s·tᵀ·x,  dB += s·gᵀ·h.
//! A frozen weight gets no product of its own, nothing that is not asked for is computed, and no pass but the products touches
//! x, y or dx.
//!
//! Shapes, row-major: x [n, I], W [O, I], A [r, I], B [O, r], h [n, r], y and g [n, O]. Operands are of one storage type, y of the
//! same or f32, gradients f32. Sums are f32, without TF32. r and the widths may be anything; products of 16-bit operands are fastest
//! where they are multiples of 8.
//! Errors: sizes that do not agree, memory of another device, no cuBLASLt. A product that cuBLASLt itself refuses ends a call when
//! others may have been queued: what the call adds to is then of no use.
//! Left out: dropout, DoRA and PiSSA, a trained W.

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaView, CudaViewMut, DevicePtr, DevicePtrMut};

use super::check::{here, int, product, rows, values};
use super::cublaslt::{CublasLt, Matrix, Product, alignment};
use super::device::Device;
use super::stored::{Kind, Stored};
use crate::error::{KernelError, Result};

const OP: &str = "cuda linear";

/// Bytes that products may work in: what NVIDIA recommends for Hopper, and for what came before it.
const WORKSPACE: [usize; 2] = [32 << 20, 4 << 20];

/// cuBLASLt, ready for products on one device.
pub struct Products {
    library: CublasLt,
}

impl Products {
    /// Opens the library; where it is looked for is as with NVRTC ([`super::image`]).
    ///
    /// # Errors
    /// When there is none that the driver can run, with what was tried, or no memory.
    pub fn open(device: &Device) -> Result<Self> {
        let workspace = WORKSPACE[usize::from(device.capability().major < 9)];
        Ok(Self { library: CublasLt::open(device.cuda_major(), device.stream(), workspace)? })
    }

    /// `d` [m, n] = alpha·a·b + beta·d, for a [m, k] and b [k, n], or [k, m] and [n, k] where they are turned.
    ///
    /// # Safety
    /// As many values lie at the addresses, in memory of this device.
    unsafe fn row_major<T: Stored, D: Stored>(
        &self,
        device: &Device,
        [m, n, k]: [usize; 3],
        a: Operand,
        b: Operand,
        d: CUdeviceptr,
        [alpha, beta]: [f32; 2],
    ) -> Result<()> {
        // A row-major [rows, columns] is a column-major [columns, rows], and (a·b)ᵀ = bᵀ·aᵀ.
        let matrix = |kind, address, [rows, columns]: [usize; 2]| Matrix {
            kind,
            rows: columns,
            columns: rows,
            leading: columns,
            alignment: alignment(address),
        };
        let product = Product {
            a: matrix(T::KIND, b.address, if b.turned { [n, k] } else { [k, n] }),
            b: matrix(T::KIND, a.address, if a.turned { [k, m] } else { [m, k] }),
            d: matrix(D::KIND, d, [m, n]),
            transposed: [b.turned, a.turned],
        };
        // SAFETY: the caller's promise; all is queued on the device's stream.
        unsafe {
            self.library.multiply(device.stream(), &product, [b.address, a.address, d], alpha, beta)?;
        }
        Ok(())
    }
}

/// A factor of a row-major product.
#[derive(Clone, Copy)]
struct Operand {
    address: CUdeviceptr,
    /// Stored with rows and columns exchanged.
    turned: bool,
}

fn plain(address: CUdeviceptr) -> Operand {
    Operand { address, turned: false }
}

fn turned(address: CUdeviceptr) -> Operand {
    Operand { address, turned: true }
}

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
}

/// A frozen linear layer, with LoRA or without.
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

/// What backward reads.
#[derive(Clone, Copy)]
pub struct Saved<'a, T> {
    /// x [n, I].
    pub x: &'a CudaView<'a, T>,
    /// x·Aᵀ [n, r], as forward left it; read where factors learn.
    pub reduced: Option<&'a CudaView<'a, T>>,
    /// The gradient of y, [n, O].
    pub gradient: &'a CudaView<'a, T>,
}

impl<T: Stored> Layer<'_, T> {
    /// n, for x.
    fn check(&self, device: &Device, products: &Products, x: &CudaView<'_, T>) -> Result<usize> {
        let [out, inp] = self.shape;
        let theirs = products.library.context();
        if theirs != device.stream().context() {
            let expected = format!("products of device {}", device.ordinal());
            return Err(KernelError::shape(OP, expected, format!("those of device {}", theirs.ordinal())));
        }
        values(OP, "W", product(OP, "W", &[out, inp])?, self.weight, device)?;
        if let Some(lora) = &self.lora {
            values(OP, "A", product(OP, "A", &[lora.rank, inp])?, lora.a, device)?;
            values(OP, "B", product(OP, "B", &[out, lora.rank])?, lora.b, device)?;
            if lora.rank == 0 {
                return Err(KernelError::shape(OP, "a rank of at least 1", "0"));
            }
        }
        let n = rows(OP, "x", x.len(), inp)?;
        here(OP, "x", x, device)?;
        let rank = self.lora.as_ref().map_or(0, |lora| lora.rank);
        for (what, size) in
            [("rows", n), ("the width of y", out), ("the width of x", inp), ("the rank", rank)]
        {
            int(OP, what, size)?;
        }
        Ok(n)
    }

    /// y [n, O] from x [n, I]. `reduced` [n, r] takes x·Aᵀ beside LoRA, for [`Layer::backward`] to read.
    ///
    /// # Errors
    /// When sizes do not agree, `reduced` is missing beside LoRA or given without it, or memory belongs to another device.
    pub fn forward<Y: Stored>(
        &self,
        device: &Device,
        products: &Products,
        x: &CudaView<'_, T>,
        reduced: Option<&mut CudaViewMut<'_, T>>,
        y: &mut CudaViewMut<'_, Y>,
    ) -> Result<()> {
        let n = self.check(device, products, x)?;
        let [out, inp] = self.shape;
        values(OP, "y", product(OP, "y", &[n, out])?, y, device)?;
        if Y::KIND != T::KIND && Y::KIND != Kind::F32 {
            let expected = match T::KIND {
                Kind::F32 => "y stored in f32".to_string(),
                kind => format!("y stored in {} or f32", kind.name()),
            };
            return Err(KernelError::shape(OP, expected, Y::KIND.name()));
        }
        let lora = both(&self.lora, reduced, "room for x·Aᵀ")?;
        if let Some((lora, reduced)) = &lora {
            values(OP, "room for x·Aᵀ", product(OP, "x·Aᵀ", &[n, lora.rank])?, *reduced, device)?;
        }
        if n == 0 || out == 0 {
            return Ok(());
        }
        let stream = device.stream();
        let (x, _x) = x.device_ptr(stream);
        let (w, _w) = self.weight.device_ptr(stream);
        let (y, _y) = y.device_ptr_mut(stream);
        let mut beta = 0.0;
        if let Some((lora, reduced)) = lora {
            let (h, _h) = reduced.device_ptr_mut(stream);
            let (a, _a) = lora.a.device_ptr(stream);
            let (b, _b) = lora.b.device_ptr(stream);
            let r = lora.rank;
            // SAFETY: the sizes of all four were checked above.
            unsafe {
                products.row_major::<T, T>(device, [n, r, inp], plain(x), turned(a), h, [1.0, 0.0])?;
                products.row_major::<T, Y>(device, [n, out, r], plain(h), turned(b), y, [lora.scale, 0.0])?;
            }
            beta = 1.0;
        }
        // SAFETY: as above.
        unsafe { products.row_major::<T, Y>(device, [n, out, inp], plain(x), turned(w), y, [1.0, beta]) }
    }

    /// Adds the gradient of x [n, I] to `dx`, and those of LoRA's factors to `factors`.
    ///
    /// # Errors
    /// When sizes do not agree, factors that are not there are to learn, x·Aᵀ is missing where they are, or memory belongs to
    /// another device.
    pub fn backward(
        &self,
        device: &Device,
        products: &Products,
        saved: Saved<'_, T>,
        dx: Option<&mut CudaViewMut<'_, f32>>,
        factors: Option<FactorGradients<'_, '_>>,
    ) -> Result<()> {
        let n = self.check(device, products, saved.x)?;
        let [out, inp] = self.shape;
        values(OP, "the gradient of y", product(OP, "y", &[n, out])?, saved.gradient, device)?;
        if let Some(dx) = &dx {
            values(OP, "the gradient of x", n * inp, *dx, device)?;
        }
        let reduced = match (&self.lora, &factors) {
            (None, Some(_)) => {
                return Err(KernelError::shape(
                    OP,
                    "gradients of factors beside LoRA only",
                    "a layer without LoRA",
                ));
            }
            (Some(lora), Some(into)) => {
                values(OP, "the gradient of A", lora.a.len(), into.a, device)?;
                values(OP, "the gradient of B", lora.b.len(), into.b, device)?;
                let reduced = saved
                    .reduced
                    .ok_or_else(|| KernelError::shape(OP, "x·Aᵀ from forward where factors learn", "none"))?;
                values(OP, "x·Aᵀ", product(OP, "x·Aᵀ", &[n, lora.rank])?, reduced, device)?;
                Some(reduced)
            }
            _ => None,
        };
        if n == 0 || out == 0 || (dx.is_none() && factors.is_none()) {
            return Ok(());
        }
        // SAFETY: the product writes all of it before anything reads it. Made before anything is added to a gradient.
        let t = self.lora.map(|lora| unsafe { device.unset::<T>(n * lora.rank) }).transpose()?;
        let stream = device.stream();
        let (g, _g) = saved.gradient.device_ptr(stream);
        let (x, _x) = saved.x.device_ptr(stream);
        let dx = dx.map(|dx| dx.device_ptr_mut(stream));
        if let Some((dx, _)) = &dx {
            let (w, _w) = self.weight.device_ptr(stream);
            // SAFETY: the sizes of all three were checked above; so below.
            unsafe {
                products.row_major::<T, f32>(device, [n, inp, out], plain(g), plain(w), *dx, [1.0, 1.0])?
            };
        }
        let Some((lora, mut t)) = self.lora.zip(t) else { return Ok(()) };
        let (r, s) = (lora.rank, lora.scale);
        let (a, _a) = lora.a.device_ptr(stream);
        let (b, _b) = lora.b.device_ptr(stream);
        let (t, _t) = t.device_ptr_mut(stream);
        // SAFETY: t has n·r values.
        unsafe { products.row_major::<T, T>(device, [n, r, out], plain(g), plain(b), t, [1.0, 0.0])? };
        if let Some((dx, _)) = &dx {
            // SAFETY: as above.
            unsafe { products.row_major::<T, f32>(device, [n, inp, r], plain(t), plain(a), *dx, [s, 1.0])? };
        }
        if let (Some(into), Some(reduced)) = (factors, reduced) {
            let (da, _da) = into.a.device_ptr_mut(stream);
            let (db, _db) = into.b.device_ptr_mut(stream);
            let (h, _h) = reduced.device_ptr(stream);
            // SAFETY: as above.
            unsafe {
                products.row_major::<T, f32>(device, [r, inp, n], turned(t), plain(x), da, [s, 1.0])?;
                products.row_major::<T, f32>(device, [out, r, n], turned(g), plain(h), db, [s, 1.0])?;
            }
        }
        Ok(())
    }
}

/// Either both or neither.
fn both<'a, A, B>(of: &'a Option<A>, with: Option<B>, what: &str) -> Result<Option<(&'a A, B)>> {
    match (of, with) {
        (Some(of), Some(with)) => Ok(Some((of, with))),
        (None, None) => Ok(None),
        (Some(_), None) => Err(KernelError::shape(OP, format!("{what} beside LoRA"), "none")),
        (None, Some(_)) => {
            Err(KernelError::shape(OP, format!("{what} beside LoRA only"), "a layer without LoRA"))
        }
    }
}
