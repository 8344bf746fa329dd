//! Products of row-major matrices by cuBLASLt.

use std::ops::Range;

use cudarc::driver::{CudaView, DevicePtr, DevicePtrMut};

use super::OP;
use crate::cuda::check::{product, values};
use crate::cuda::cublaslt::{CublasLt, Matrix, Product, alignment};
use crate::cuda::device::Device;
use crate::cuda::stored::Stored;
use crate::error::{KernelError, Result};

/// Bytes that products may work in: what NVIDIA recommends for Hopper, and for what came before it.
const WORKSPACE: [usize; 2] = [32 << 20, 4 << 20];
/// Values that a layer holds beside its operands at a time, 32 MiB in f32.
const PART: usize = 8 << 20;

/// cuBLASLt, ready for products on one device.
pub struct Products {
    library: CublasLt,
    part: usize,
}

/// A factor of a row-major product.
#[derive(Clone, Copy)]
pub(super) struct Factor<'a, T> {
    values: &'a CudaView<'a, T>,
    /// Stored with rows and columns exchanged.
    turned: bool,
}

pub(super) fn plain<'a, T>(values: &'a CudaView<'a, T>) -> Factor<'a, T> {
    Factor { values, turned: false }
}

pub(super) fn turned<'a, T>(values: &'a CudaView<'a, T>) -> Factor<'a, T> {
    Factor { values, turned: true }
}

/// What a product does to the values that are there.
pub(super) fn beta(accumulate: bool) -> f32 {
    f32::from(u8::from(accumulate))
}

/// The values of rows of `width` values.
pub(super) fn values_of(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}

impl Products {
    /// Opens the library; where it is looked for is as with NVRTC ([`crate::cuda::image`]).
    ///
    /// # Errors
    /// When there is none that the driver can run, with what was tried, or no memory.
    pub fn open(device: &Device) -> Result<Self> {
        let workspace = WORKSPACE[usize::from(device.capability().major < 9)];
        let library = CublasLt::open(device.cuda_major(), device.stream(), workspace)?;
        Ok(Self { library, part: PART })
    }

    /// The same, whose layers hold `values` at most beside their operands at a time, but at least a row: sums that are rounded
    /// or scaled later, and inputs under dropout. 8 Mi unless this is called.
    pub fn holding(self, values: usize) -> Self {
        Self { part: values, ..self }
    }

    /// Refuses another device than that of the products.
    pub(super) fn check(&self, device: &Device) -> Result<()> {
        let theirs = self.library.context();
        if theirs != device.stream().context() {
            let expected = format!("products of device {}", device.ordinal());
            return Err(KernelError::shape(OP, expected, format!("those of device {}", theirs.ordinal())));
        }
        Ok(())
    }

    fn rows_of_part(&self, width: usize) -> usize {
        (self.part / width.max(1)).max(1)
    }

    /// `rows` of `width` values, as many at a time as may be held.
    pub(super) fn parts(&self, rows: usize, width: usize) -> impl Iterator<Item = Range<usize>> {
        let many = self.rows_of_part(width);
        (0..rows).step_by(many).map(move |first| first..rows.min(first.saturating_add(many)))
    }

    /// Values of the largest of these parts.
    pub(super) fn most(&self, rows: usize, width: usize) -> usize {
        rows.min(self.rows_of_part(width)) * width
    }

    /// `d` [m, n] = alpha·a·b + beta·d, for a [m, k] and b [k, n], or [k, m] and [n, k] where they are turned.
    pub(super) fn multiply<T: Stored, D: Stored>(
        &self,
        device: &Device,
        [m, n, k]: [usize; 3],
        a: Factor<'_, T>,
        b: Factor<'_, T>,
        d: &mut impl DevicePtrMut<D>,
        [alpha, beta]: [f32; 2],
    ) -> Result<()> {
        values(OP, "the first factor", product(OP, "the first factor", &[m, k])?, a.values, device)?;
        values(OP, "the second factor", product(OP, "the second factor", &[k, n])?, b.values, device)?;
        values(OP, "the product", product(OP, "the product", &[m, n])?, d, device)?;
        let stream = device.stream();
        let (of_a, _a) = a.values.device_ptr(stream);
        let (of_b, _b) = b.values.device_ptr(stream);
        let (of_d, _d) = d.device_ptr_mut(stream);
        // A row-major [rows, columns] is a column-major [columns, rows], and (a·b)ᵀ = bᵀ·aᵀ.
        let matrix = |kind, address, [rows, columns]: [usize; 2]| Matrix {
            kind,
            rows: columns,
            columns: rows,
            leading: columns,
            alignment: alignment(address),
        };
        let product = Product {
            a: matrix(T::KIND, of_b, if b.turned { [n, k] } else { [k, n] }),
            b: matrix(T::KIND, of_a, if a.turned { [k, m] } else { [m, k] }),
            d: matrix(D::KIND, of_d, [m, n]),
            transposed: [b.turned, a.turned],
        };
        // SAFETY: the sizes of all three were checked above, on this device; all is queued on its stream, and d is borrowed
        // alone.
        unsafe { self.library.multiply(stream, &product, [of_b, of_a, of_d], alpha, beta)? };
        Ok(())
    }
}
