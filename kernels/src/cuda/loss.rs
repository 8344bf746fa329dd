//! [`crate::loss`] on a device, from logits on: they become their own gradient in place.
//!
//! The walk over chunks of positions and the products with the head are the caller's.
//!
//! Shapes: logits [rows, V] in f32 before the cap, the teacher's [rows, V]; targets, scales and losses \[rows\]. Units:
//! nats. A row of scale 0 has its loss, and zeros for a gradient; a target of [`IGNORE`] has loss 0 and zeros. Scales lie
//! in device memory and are not looked at: one that is not finite gives a gradient that is not.

use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};

use super::arguments::LossArgs;
use super::check::{at_most, blocks, here, int, rows, threads, values};
use super::device::{Device, config};
use super::stored::Stored;
use crate::error::{KernelError, Result};
pub use crate::loss::IGNORE;

const OP: &str = "cuda loss";
const THREADS: u32 = 256;
/// What a block's sums use.
const SCRATCH: usize = 32 * size_of::<f32>();

/// Targets that were checked against a vocabulary.
pub struct Targets {
    ids: CudaSlice<u32>,
    vocab: usize,
}

impl Targets {
    /// The next token of each position, or [`IGNORE`].
    ///
    /// # Errors
    /// When a target is outside the vocabulary, or there is none at all.
    pub fn new(device: &Device, ids: &[u32], vocab: usize) -> Result<Self> {
        if let Some(bad) = ids.iter().find(|id| **id != IGNORE && **id as usize >= vocab) {
            return Err(KernelError::argument(OP, format!("target: expected below {vocab}, got {bad}")));
        }
        Ok(Self { ids: device.upload(ids)?, vocab })
    }
}

/// Rows of logits of `vocab` values, and what else both losses take.
fn check(
    device: &Device,
    logits: &impl DevicePtrMut<f32>,
    vocab: usize,
    scales: &impl DevicePtr<f32>,
    losses: &impl DevicePtrMut<f32>,
    cap: Option<f32>,
) -> Result<usize> {
    let count = rows(OP, "logits", logits.len(), vocab)?;
    here(OP, "logits", logits, device)?;
    // A thread steps past the end of a row once.
    at_most(OP, "the vocabulary", vocab, i32::MAX as usize - THREADS as usize)?;
    values(OP, "scales", count, scales, device)?;
    values(OP, "losses", count, losses, device)?;
    match cap {
        Some(cap) if !(cap > 0.0 && cap.is_finite()) => {
            Err(KernelError::argument(OP, format!("softcap: expected above 0, got {cap}")))
        }
        _ => Ok(count),
    }
}

/// Cross-entropy of the rows' targets, which are those from number `first` on: `losses` are set, and `logits` become
/// scale·(softmax − onehot) through the cap.
///
/// # Errors
/// When sizes do not agree, the cap is not above 0, or memory belongs to another device.
pub fn cross_entropy(
    device: &Device,
    logits: &mut impl DevicePtrMut<f32>,
    targets: &Targets,
    first: usize,
    scales: &impl DevicePtr<f32>,
    cap: Option<f32>,
    losses: &mut impl DevicePtrMut<f32>,
) -> Result<()> {
    let count = check(device, logits, targets.vocab, scales, losses, cap)?;
    here(OP, "targets", &targets.ids, device)?;
    let targets_of_rows = targets.ids.slice(first.min(targets.ids.len())..);
    if targets_of_rows.len() < count {
        let got = format!("{} of {} from number {first} on", targets_of_rows.len(), targets.ids.len());
        return Err(KernelError::shape(OP, format!("targets for {count} rows"), got));
    }
    if count == 0 {
        return Ok(());
    }
    let (logits, _logits) = logits.device_ptr_mut(device.stream());
    let (ids, _ids) = targets_of_rows.device_ptr(device.stream());
    let (scales, _scales) = scales.device_ptr(device.stream());
    let (losses, _losses) = losses.device_ptr_mut(device.stream());
    let arguments = LossArgs {
        logits,
        targets: ids,
        teacher: 0,
        scales,
        losses,
        vocab: int(OP, "the vocabulary", targets.vocab)?,
        cap: cap.unwrap_or(0.0),
    };
    let launch = config([blocks(OP, count, 1)?, 1, 1], threads(targets.vocab, THREADS), SCRATCH);
    // SAFETY: logits are [rows, V], the others have a value for each row, and targets are below V or ignored; a block's
    // sums have their 32 values.
    unsafe { device.launch(&device.kernels.nll, launch, &arguments)? };
    Ok(())
}

/// KL(teacher ‖ student) of rows of `vocab` logits: `losses` are set, and the student's `logits` become scale·(q − p)
/// through the cap. The teacher's are after its own cap.
///
/// # Errors
/// As [`cross_entropy`].
pub fn divergence<T: Stored>(
    device: &Device,
    logits: &mut impl DevicePtrMut<f32>,
    vocab: usize,
    teacher: &impl DevicePtr<T>,
    scales: &impl DevicePtr<f32>,
    cap: Option<f32>,
    losses: &mut impl DevicePtrMut<f32>,
) -> Result<()> {
    let count = check(device, logits, vocab, scales, losses, cap)?;
    values(OP, "the teacher's logits", logits.len(), teacher, device)?;
    if count == 0 {
        return Ok(());
    }
    let (logits, _logits) = logits.device_ptr_mut(device.stream());
    let (teacher, _teacher) = teacher.device_ptr(device.stream());
    let (scales, _scales) = scales.device_ptr(device.stream());
    let (losses, _losses) = losses.device_ptr_mut(device.stream());
    let vocab_of_kernel = int(OP, "the vocabulary", vocab)?;
    let cap = cap.unwrap_or(0.0);
    let arguments = LossArgs { logits, targets: 0, teacher, scales, losses, vocab: vocab_of_kernel, cap };
    let launch = config([blocks(OP, count, 1)?, 1, 1], threads(vocab, THREADS), SCRATCH);
    // SAFETY: both logits are [rows, V], the others have a value for each row; a block's sums have their 32 values.
    unsafe { device.launch(&device.kernels.kl[T::KIND as usize], launch, &arguments)? };
    Ok(())
}
