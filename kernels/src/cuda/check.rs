//! What every launch refuses: sizes, addresses, devices, storage, grids.

use cudarc::driver::DeviceSlice;
use cudarc::driver::sys::CUdeviceptr;

use super::device::Device;
use super::kernels::PAIRS;
use super::stored::Stored;
use crate::error::{KernelError, Result};

/// Bytes that vector accesses and asynchronous copies are aligned to.
pub(super) const ALIGNMENT: u64 = 16;

/// Refuses memory of another device or stream.
pub(super) fn here<T>(
    op: &'static str,
    what: &str,
    of: &(impl DeviceSlice<T> + ?Sized),
    device: &Device,
) -> Result<()> {
    if of.stream() != device.stream() {
        let theirs = of.stream().context();
        let got = if theirs == device.stream().context() {
            "memory of another stream".to_string()
        } else {
            format!("memory of device {}", theirs.ordinal())
        };
        return Err(KernelError::shape(op, format!("{what} on device {}", device.ordinal()), got));
    }
    Ok(())
}

/// Refuses anything but `expected` values on this device.
pub(super) fn values<T>(
    op: &'static str,
    what: &str,
    expected: usize,
    of: &(impl DeviceSlice<T> + ?Sized),
    device: &Device,
) -> Result<()> {
    if of.len() != expected {
        return Err(KernelError::shape(op, format!("{what} of {expected} values"), of.len().to_string()));
    }
    here(op, what, of, device)
}

/// The whole rows of `width` values that `length` values are.
pub(super) fn rows(op: &'static str, what: &str, length: usize, width: usize) -> Result<usize> {
    if width == 0 || !length.is_multiple_of(width) {
        let expected = format!("{what} of whole rows of {width} values, at least one value in each");
        return Err(KernelError::shape(op, expected, format!("{length} values")));
    }
    Ok(length / width)
}

/// The product of sizes.
pub(super) fn product(op: &'static str, what: &str, sizes: &[usize]) -> Result<usize> {
    let product = sizes.iter().try_fold(1usize, |product, size| product.checked_mul(*size));
    product.filter(|product| *product <= isize::MAX as usize / 8).ok_or_else(|| {
        KernelError::shape(op, format!("{what} whose bytes can be counted"), format!("{sizes:?}"))
    })
}

/// Refuses an address that is not a multiple of 16 bytes.
pub(super) fn aligned(op: &'static str, what: &str, address: CUdeviceptr) -> Result<()> {
    if !address.is_multiple_of(ALIGNMENT) {
        let got = format!("{} bytes past one", address % ALIGNMENT);
        return Err(KernelError::shape(op, format!("{what} at a multiple of {ALIGNMENT} bytes"), got));
    }
    Ok(())
}

/// Whether vectors of `count` values may be read there.
pub(super) fn fits<T>(address: CUdeviceptr, count: usize) -> bool {
    address.is_multiple_of((count * size_of::<T>()) as u64)
}

/// The number of the kernels for values stored as X and results stored as Y, and the values of their vectors.
pub(super) fn pair<X: Stored, Y: Stored>(op: &'static str, [x, y]: [&str; 2]) -> Result<(usize, usize)> {
    let found = PAIRS.iter().position(|(from, to, _)| (*from, *to) == (X::KIND, Y::KIND));
    found.map(|number| (number, PAIRS[number].2)).ok_or_else(|| {
        let got = format!("{} to {}", X::KIND.name(), Y::KIND.name());
        KernelError::shape(op, format!("{y} stored as {x} is, or one of the two in f32"), got)
    })
}

/// Refuses a size beyond `most`.
pub(super) fn at_most(op: &'static str, what: &str, value: usize, most: usize) -> Result<()> {
    if value > most {
        return Err(KernelError::argument(op, format!("{what}: expected at most {most}, got {value}")));
    }
    Ok(())
}

/// A size as the kernels take it.
pub(super) fn int(op: &'static str, what: &str, value: usize) -> Result<i32> {
    i32::try_from(value)
        .map_err(|_| KernelError::argument(op, format!("{what}: expected at most {}, got {value}", i32::MAX)))
}

/// Blocks of a grid's first dimension for `count` pieces of work, `per_block` in each.
pub(super) fn blocks(op: &'static str, count: usize, per_block: usize) -> Result<u32> {
    let blocks = count.div_ceil(per_block);
    int(op, "blocks of a launch", blocks).map(|blocks| blocks as u32)
}

/// Threads of a block for `count` pieces of work: whole warps, at most `most`.
pub(super) fn threads(count: usize, most: u32) -> u32 {
    count.min(most as usize).next_multiple_of(32).max(32) as u32
}
