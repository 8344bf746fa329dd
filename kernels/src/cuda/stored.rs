//! The types that values may be stored in on a device.

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use half::{bf16, f16};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

/// A storage type, as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// 32 bits.
    F32,
    /// f32's exponent, 7 bits of fraction.
    Bf16,
    /// IEEE's half.
    F16,
}

impl Kind {
    /// All of them, by number.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F16];

    /// As in the names of kernels.
    pub fn name(self) -> &'static str {
        ["f32", "bf16", "f16"][self as usize]
    }

    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        [4, 2, 2][self as usize]
    }
}

/// A storage type: f32, bf16 or f16.
pub trait Stored:
    sealed::Sealed + DeviceRepr + ValidAsZeroBits + Copy + Default + Send + Sync + 'static
{
    /// Which.
    const KIND: Kind;
    /// The value in f32, exactly.
    fn get(self) -> f32;
    /// The nearest value, ties to even.
    fn put(value: f32) -> Self;
}

impl Stored for f32 {
    const KIND: Kind = Kind::F32;

    fn get(self) -> f32 {
        self
    }

    fn put(value: f32) -> Self {
        value
    }
}

impl Stored for bf16 {
    const KIND: Kind = Kind::Bf16;

    fn get(self) -> f32 {
        self.to_f32()
    }

    fn put(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Stored for f16 {
    const KIND: Kind = Kind::F16;

    fn get(self) -> f32 {
        self.to_f32()
    }

    fn put(value: f32) -> Self {
        Self::from_f32(value)
    }
}
