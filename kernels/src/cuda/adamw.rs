//! [`crate::adamw`] on a device: one pass over parameter, gradient and both moments, all in f32.
//!
//! Shapes: a parameter of any shape as its values; a table [V, E] whose gradient is some of its rows. Parameter, gradient
//! and moments begin at multiples of 16 bytes.

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, PushKernelArg};

use super::arguments::AdamWArgs;
use super::check::{aligned, at_most, blocks, here, int, product, threads, values};
use super::device::{Device, config, launched};
use crate::adamw::{AdamW, Untouched};
use crate::error::{KernelError, Result};

const OP: &str = "cuda adamw";
const THREADS: u32 = 256;
/// Values of a thread.
const VECTOR: usize = 4;
/// Values of a block's partial sum of squares, as on the CPU.
const CHUNK: usize = 16_384;

fn constants(with: &AdamW) -> AdamWArgs {
    let c = with.constants();
    AdamWArgs {
        decay: c.decay,
        beta1: c.beta1,
        beta2: c.beta2,
        step_size: c.step_size,
        root_scale: c.root_scale,
        eps: c.eps,
        gradient_scale: c.gradient_scale,
        ..AdamWArgs::default()
    }
}

/// One step on a parameter with its gradient and its two moments.
///
/// # Errors
/// When sizes do not agree, an address is not a multiple of 16 bytes, or memory belongs to another device.
pub fn step(
    device: &Device,
    parameter: &mut impl DevicePtrMut<f32>,
    gradient: &impl DevicePtr<f32>,
    [exp_avg, exp_avg_sq]: [&mut impl DevicePtrMut<f32>; 2],
    with: &AdamW,
) -> Result<()> {
    let count = parameter.len();
    here(OP, "the parameter", parameter, device)?;
    values(OP, "the gradient", count, gradient, device)?;
    values(OP, "the first moment", count, exp_avg, device)?;
    values(OP, "the second moment", count, exp_avg_sq, device)?;
    if count == 0 {
        return Ok(());
    }
    let (p, _p) = parameter.device_ptr_mut(device.stream());
    let (g, _g) = gradient.device_ptr(device.stream());
    let (m, _m) = exp_avg.device_ptr_mut(device.stream());
    let (v, _v) = exp_avg_sq.device_ptr_mut(device.stream());
    let names = ["the parameter", "the gradient", "the first moment", "the second moment"];
    for (what, address) in names.into_iter().zip([p, g, m, v]) {
        aligned(OP, what, address)?;
    }
    let arguments = AdamWArgs { p, g, m, v, count: count as i64, ..constants(with) };
    let grid = blocks(OP, count, VECTOR * THREADS as usize)?;
    // SAFETY: all four have `count` values and begin where vectors of four may be read.
    unsafe { device.launch(&device.kernels.adamw, config([grid, 1, 1], THREADS, 0), &arguments)? };
    Ok(())
}

/// The rows of a table that have a gradient: ids ascending, each once.
pub struct TouchedRows {
    ids: Option<CudaSlice<u32>>,
    count: usize,
    last: Option<u32>,
}

impl TouchedRows {
    /// As [`crate::embedding::SparseRows::ids`] gives them.
    ///
    /// # Errors
    /// When ids do not ascend.
    pub fn new(device: &Device, ids: &[u32]) -> Result<Self> {
        if let Some(pair) = ids.windows(2).find(|pair| pair[0] >= pair[1]) {
            let message = format!("expected ascending rows, got {} after {}", pair[1], pair[0]);
            return Err(KernelError::argument(OP, message));
        }
        let on_device = if ids.is_empty() { None } else { Some(device.upload(ids)?) };
        Ok(Self { ids: on_device, count: ids.len(), last: ids.last().copied() })
    }
}

/// One step on a table [V, `width`] whose gradient is `values_of_rows` [rows, `width`].
///
/// # Errors
/// When sizes do not agree, a row is not in the table, or memory belongs to another device.
pub fn step_rows(
    device: &Device,
    table: &mut impl DevicePtrMut<f32>,
    width: usize,
    rows: &TouchedRows,
    values_of_rows: &impl DevicePtr<f32>,
    untouched: Untouched,
    [exp_avg, exp_avg_sq]: [&mut impl DevicePtrMut<f32>; 2],
    with: &AdamW,
) -> Result<()> {
    let vocab = super::check::rows(OP, "the table", table.len(), width)?;
    // A thread steps past the end of a row once.
    at_most(OP, "the width", width, i32::MAX as usize - THREADS as usize)?;
    here(OP, "the table", table, device)?;
    values(OP, "the first moment", table.len(), exp_avg, device)?;
    values(OP, "the second moment", table.len(), exp_avg_sq, device)?;
    let expected = product(OP, "the gradient", &[rows.count, width])?;
    if values_of_rows.len() < expected {
        let got = values_of_rows.len().to_string();
        return Err(KernelError::shape(OP, format!("a gradient of at least {expected} values"), got));
    }
    here(OP, "the gradient", values_of_rows, device)?;
    if let Some(last) = rows.last.filter(|last| *last as usize >= vocab) {
        return Err(KernelError::argument(OP, format!("row: expected below {vocab}, got {last}")));
    }
    if let Some(ids) = &rows.ids {
        here(OP, "rows", ids, device)?;
    }
    if vocab == 0 {
        return Ok(());
    }
    let (p, _p) = table.device_ptr_mut(device.stream());
    let (g, _g) = values_of_rows.device_ptr(device.stream());
    let (m, _m) = exp_avg.device_ptr_mut(device.stream());
    let (v, _v) = exp_avg_sq.device_ptr_mut(device.stream());
    let ids = rows.ids.as_ref().map(|ids| ids.device_ptr(device.stream()));
    let arguments = AdamWArgs {
        p,
        g,
        m,
        v,
        ids: ids.as_ref().map_or(0, |(ids, _)| *ids),
        touched: int(OP, "touched rows", rows.count)?,
        width: int(OP, "the width", width)?,
        step_untouched: i32::from(untouched == Untouched::Step),
        ..constants(with)
    };
    let launch = config([blocks(OP, vocab, 1)?, 1, 1], threads(width, THREADS), 0);
    // SAFETY: table and moments are [V, E], the gradient has a row for each id, and ids are below V.
    unsafe { device.launch(&device.kernels.adamw_rows, launch, &arguments)? };
    Ok(())
}

/// Σ g² in f64, summed in a fixed order; waits for it.
///
/// # Errors
/// When memory belongs to another device.
pub fn sum_of_squares(device: &Device, gradient: &impl DevicePtr<f32>) -> Result<f64> {
    here(OP, "the gradient", gradient, device)?;
    let count = gradient.len();
    if count == 0 {
        return Ok(0.0);
    }
    let grid = blocks(OP, count, CHUNK)?;
    // SAFETY: every block writes its sum before they are read.
    let mut partials = unsafe { device.unset::<f64>(grid as usize)? };
    let (g, g_guard) = gradient.device_ptr(device.stream());
    let (length, per_block) = (count as i64, CHUNK as i32);
    let mut builder = device.stream().launch_builder(&device.kernels.sum_of_squares);
    builder.arg(&g).arg(&length).arg(&per_block).arg(&mut partials);
    let launch = config([grid, 1, 1], THREADS, THREADS as usize * size_of::<f64>());
    // SAFETY: the arguments are the kernel's own, in its order; there is a partial sum for each block, and shared memory
    // of one f64 for each thread, whose number is a power of two.
    launched(unsafe { builder.launch(launch) })?;
    drop(g_guard);
    Ok(device.download(&partials)?.into_iter().sum())
}
