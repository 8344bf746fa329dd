//! Types that values may be stored in: f32, and bf16 for frozen weights and activations.
//!
//! Storage only: every operation of this crate reads values into f32, sums in f32, and rounds once when it writes.
//! bf16 keeps f32's exponent and 7 bits of fraction; rounding is to nearest, ties to even (as torch and oneDNN do), NaN
//! stays NaN. Loops over [`Store::get`] and [`Store::put`] become vector code.

use candle_core::{CpuStorage, DType};
pub use half::bf16;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
}

/// A storage type.
pub trait Store:
    sealed::Sealed + Copy + Default + PartialEq + std::fmt::Debug + Send + Sync + 'static
{
    /// candle's name for it.
    const DTYPE: DType;
    /// Whether values are stored as they are computed.
    const EXACT: bool;
    /// The value in f32, exactly.
    fn get(self) -> f32;
    /// The nearest value of this type.
    fn put(value: f32) -> Self;
    /// The bits of the nearest bf16.
    fn bits(self) -> u16;
    /// The values of a CPU storage of this type.
    fn values(storage: &CpuStorage) -> Option<&[Self]>;
    /// A CPU storage over values of this type.
    fn storage(values: Vec<Self>) -> CpuStorage;
    /// The same slice where this type is f32.
    fn as_f32(values: &[Self]) -> Option<&[f32]>;
    /// The same slice where this type is f32.
    fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]>;
    /// The same slice where this type is bf16.
    fn as_bf16(values: &[Self]) -> Option<&[bf16]>;
}

impl Store for f32 {
    const DTYPE: DType = DType::F32;
    const EXACT: bool = true;

    #[inline(always)]
    fn get(self) -> f32 {
        self
    }

    #[inline(always)]
    fn put(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn bits(self) -> u16 {
        round(self)
    }

    fn values(storage: &CpuStorage) -> Option<&[Self]> {
        match storage {
            CpuStorage::F32(values) => Some(values),
            _ => None,
        }
    }

    fn storage(values: Vec<Self>) -> CpuStorage {
        CpuStorage::F32(values)
    }

    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }

    fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]> {
        Some(values)
    }

    fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
        None
    }
}

impl Store for bf16 {
    const DTYPE: DType = DType::BF16;
    const EXACT: bool = false;

    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn put(value: f32) -> Self {
        Self::from_bits(round(value))
    }

    #[inline(always)]
    fn bits(self) -> u16 {
        self.to_bits()
    }

    fn values(storage: &CpuStorage) -> Option<&[Self]> {
        match storage {
            CpuStorage::BF16(values) => Some(values),
            _ => None,
        }
    }

    fn storage(values: Vec<Self>) -> CpuStorage {
        CpuStorage::BF16(values)
    }

    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }

    fn as_f32_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }

    fn as_bf16(values: &[Self]) -> Option<&[bf16]> {
        Some(values)
    }
}

/// The bits of the nearest bf16, without branches.
#[inline(always)]
pub(crate) fn round(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    // Rounding could carry a NaN's fraction away: a quiet NaN keeps it one.
    let nan = (bits >> 16) | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_half_crate() {
        let edges = [
            0.0,
            -0.0,
            1.0,
            -1.5,
            f32::MAX,
            f32::MIN,
            f32::MIN_POSITIVE,
            1e-45,
            -1e-40,
            f32::INFINITY,
            f32::NEG_INFINITY,
            3.402e38,
        ];
        let spread = (0..1_000_000u32).map(|i| f32::from_bits(i.wrapping_mul(4_294_967)));
        for x in edges.into_iter().chain(spread) {
            let (got, want) = (bf16::put(x), bf16::from_f32(x));
            if want.is_nan() {
                assert!(got.is_nan(), "{x}");
            } else {
                assert_eq!(got.to_bits(), want.to_bits(), "{x}");
            }
        }
    }
}
