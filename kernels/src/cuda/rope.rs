//! [`crate::rope`] on a device.
//!
//! Shapes: x [entries, heads·width], of which the first `rotated` values of each head turn; cos and sin [positions,
//! rotated/2] in f32, which repeat when there are more entries than positions.

use cudarc::driver::{DevicePtr, DevicePtrMut};

use super::arguments::{DampingArgs, RopeArgs};
use super::check::{ALIGNMENT, blocks, here, int, product, rows, values};
use super::device::{Device, config};
use super::stored::{Kind, Stored};
use crate::error::{KernelError, Result};

const OP: &str = "cuda rope";
const THREADS: u32 = 256;
const DAMPING_THREADS: u32 = 128;

/// Refuses more than fits into a head; half of what is rotated.
fn half(heads: usize, width: usize, rotated: usize) -> Result<usize> {
    if heads == 0 || rotated == 0 || !rotated.is_multiple_of(2) || rotated > width {
        let expected = "at least one head, and an even number of rotated values of 2 up to its width";
        return Err(KernelError::shape(OP, expected, format!("{heads} heads, {rotated} of {width} values")));
    }
    Ok(rotated / 2)
}

/// Rotates entries in place, as [`crate::rope::rotate_part`]; `direction` is 1 forward and −1 for the transposed map.
///
/// # Errors
/// When sizes do not agree, or memory belongs to another device.
pub fn rotate<T: Stored>(
    device: &Device,
    x: &mut impl DevicePtrMut<T>,
    heads: usize,
    [width, rotated]: [usize; 2],
    [cos, sin]: [&impl DevicePtr<f32>; 2],
    direction: f32,
) -> Result<()> {
    let half = half(heads, width, rotated)?;
    let entries = rows(OP, "x", x.len(), product(OP, "an entry", &[heads, width])?)?;
    let positions = rows(OP, "tables", cos.len(), half)?;
    if positions == 0 {
        return Err(KernelError::shape(OP, "tables of at least one position", "none"));
    }
    here(OP, "x", x, device)?;
    here(OP, "cos", cos, device)?;
    values(OP, "sin", cos.len(), sin, device)?;
    if direction.abs() != 1.0 {
        return Err(KernelError::argument(OP, format!("direction: expected 1 or -1, got {direction}")));
    }
    if entries == 0 {
        return Ok(());
    }
    let vector = if T::KIND == Kind::F32 { 4 } else { 8 };
    let (x, _x) = x.device_ptr_mut(device.stream());
    let (cos, _cos) = cos.device_ptr(device.stream());
    let (sin, _sin) = sin.device_ptr(device.stream());
    let vectors = width.is_multiple_of(vector)
        && half.is_multiple_of(vector)
        && [x, cos, sin].iter().all(|address| address.is_multiple_of(ALIGNMENT));
    let parts = if vectors { half / vector } else { half };
    let grid = blocks(OP, product(OP, "work", &[entries, heads, parts])?, THREADS as usize)?;
    let arguments = RopeArgs {
        x,
        cos,
        sin,
        entries: entries as i64,
        positions: int(OP, "positions", positions)?,
        heads: int(OP, "heads", heads)?,
        width: int(OP, "the head width", width)?,
        rotated: int(OP, "rotated values", rotated)?,
        direction,
    };
    let function = &device.kernels.rope[T::KIND as usize][usize::from(vectors)];
    // SAFETY: x has entries·heads·width values, of which the kernel touches the first `rotated` of each head, and the tables
    // positions·half each; vectors are used where widths and addresses are multiples of them.
    unsafe { device.launch(function, config([grid, 1, 1], THREADS, 0), &arguments)? };
    Ok(())
}

/// [`crate::rope::damping_gradient`]: adds to each of `sums`, one for every position, Σ over its entries, heads and bands of
/// ω²·(g₁·y₁ + g₂·y₂).
///
/// # Errors
/// When sizes do not agree, or memory belongs to another device.
pub fn damping_gradient<T: Stored>(
    device: &Device,
    y: &impl DevicePtr<T>,
    gradient: &impl DevicePtr<f32>,
    heads: usize,
    width: usize,
    omega_squared: &impl DevicePtr<f32>,
    sums: &mut impl DevicePtrMut<f64>,
) -> Result<()> {
    let bands = half(heads, width, 2 * omega_squared.len())?;
    let entries = rows(OP, "y", y.len(), product(OP, "an entry", &[heads, width])?)?;
    here(OP, "y", y, device)?;
    values(OP, "the gradient", y.len(), gradient, device)?;
    here(OP, "omega squared", omega_squared, device)?;
    here(OP, "sums", sums, device)?;
    let positions = sums.len();
    if positions == 0 {
        return Ok(());
    }
    // The kernel counts a position's products in an int.
    int(OP, "bands of an entry", heads * bands)?;
    let (y, _y) = y.device_ptr(device.stream());
    let (gradient, _gradient) = gradient.device_ptr(device.stream());
    let (omega_squared, _omega) = omega_squared.device_ptr(device.stream());
    let (sums, _sums) = sums.device_ptr_mut(device.stream());
    let arguments = DampingArgs {
        y,
        gradient,
        omega_squared,
        sums,
        entries: entries as i64,
        positions: int(OP, "positions", positions)?,
        heads: int(OP, "heads", heads)?,
        width: int(OP, "the head width", width)?,
        bands: int(OP, "bands", bands)?,
    };
    let grid = blocks(OP, positions, 1)?;
    let shared = DAMPING_THREADS as usize * size_of::<f64>();
    let function = &device.kernels.damping[T::KIND as usize];
    // SAFETY: y and its gradient have entries·heads·width values, 2·bands at most of each head are read; there is one sum
    // per position, and one f64 of shared memory per thread.
    unsafe { device.launch(function, config([grid, 1, 1], DAMPING_THREADS, shared), &arguments)? };
    Ok(())
}
