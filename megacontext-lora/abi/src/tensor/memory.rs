//! Where a tensor's memory lies, and what has to be waited for before it is read.
//!
//! Source: the CUDA Array Interface, version 3. Units: bytes.

use std::num::NonZeroUsize;
use std::ops::Range;

use super::Device;

/// A CUDA stream, by the numbers of the CUDA Array Interface, version 3: 1 the legacy default stream, 2 the default stream of
/// the thread, any other the address of a `cudaStream_t` or `CUstream`, which are the same. 0 is none of them, since it could mean
/// two things: a null handle of CUDA's own is [`Stream::LEGACY_DEFAULT`].
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stream(NonZeroUsize);

impl Stream {
    /// The legacy default stream, which waits for all others of its device and they for it.
    pub const LEGACY_DEFAULT: Self = Self(NonZeroUsize::MIN);
    /// The default stream of the thread that makes the call.
    pub const PER_THREAD_DEFAULT: Self = Self(NonZeroUsize::MIN.saturating_add(1));

    /// The stream of a number of the interface; none for 0.
    pub const fn new(number: usize) -> Option<Self> {
        match NonZeroUsize::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// The number.
    pub const fn number(self) -> usize {
        self.0.get()
    }
}

impl std::fmt::Display for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::LEGACY_DEFAULT => f.write_str("1 (the legacy default)"),
            Self::PER_THREAD_DEFAULT => f.write_str("2 (the thread's default)"),
            Self(address) => write!(f, "{address:#x}"),
        }
    }
}

/// The memory of a tensor: addresses of its device from the first byte to behind the last one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    /// Where it lies.
    pub device: Device,
    /// Its addresses there.
    pub bytes: Range<usize>,
}

impl Memory {
    /// Do both have a byte in common? Equal addresses of two devices are not the same memory.
    pub fn meets(&self, other: &Self) -> bool {
        let (a, b) = (&self.bytes, &other.bytes);
        self.device == other.device && !a.is_empty() && !b.is_empty() && a.start < b.end && b.start < a.end
    }
}
