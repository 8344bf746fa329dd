//! What every CPU operation here shares: reading operands, splitting work over threads, choosing instructions.
//!
//! Operations work on rows of contiguous f32. An operand that is not contiguous is copied once, here; attention reads
//! strides itself and does not come through this door.
//!
//! Threads: rayon's current pool, and fixed splits of the work, so that a result does not depend on which thread ran
//! what.

use std::borrow::Cow;

use candle_core::{CpuStorage, DType, Layout, Storage, StorageRef, Tensor};
use rayon::prelude::*;

use crate::error::{KernelError, Result};

/// The values of a CPU f32 operand in row-major order, borrowed where the layout allows.
pub(crate) fn contiguous<'a>(
    op: &'static str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<Cow<'a, [f32]>> {
    let CpuStorage::F32(data) = storage else {
        return Err(KernelError::shape(op, "f32 operands", format!("{:?}", storage_dtype(storage))));
    };
    Ok(match layout.contiguous_offsets() {
        Some((start, end)) => Cow::Borrowed(&data[start..end]),
        None => Cow::Owned(gather_strided(data, layout)),
    })
}

/// Row-major copy of a strided operand, odometer fashion.
fn gather_strided(data: &[f32], layout: &Layout) -> Vec<f32> {
    let (dims, strides) = (layout.dims(), layout.stride());
    let total = layout.shape().elem_count();
    let mut copy = Vec::with_capacity(total);
    let mut index = vec![0usize; dims.len()];
    let mut at = layout.start_offset();
    while copy.len() < total {
        copy.push(data[at]);
        for axis in (0..dims.len()).rev() {
            index[axis] += 1;
            at += strides[axis];
            if index[axis] < dims[axis] {
                break;
            }
            at -= strides[axis] * dims[axis];
            index[axis] = 0;
        }
    }
    copy
}

fn storage_dtype(storage: &CpuStorage) -> candle_core::DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}

/// The values of a contiguous CPU f32 tensor, borrowed for as long as this lives.
pub struct Values<'a> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
}

impl<'a> Values<'a> {
    /// Borrows.
    ///
    /// # Errors
    /// When the tensor is not f32, not contiguous or not on the CPU.
    pub fn of(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let (Some((start, end)), Storage::Cpu(CpuStorage::F32(_))) = (layout.contiguous_offsets(), &*storage)
        else {
            let got = format!("{:?} {layout:?} on {:?}", tensor.dtype(), tensor.device().location());
            return Err(KernelError::shape("values", format!("contiguous {:?} on the CPU", DType::F32), got));
        };
        Ok(Self { storage, start, len: end - start })
    }
}

impl std::ops::Deref for Values<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.start..self.start + self.len],
            _ => &[],
        }
    }
}

/// Calls `f` with the row-major values of a CPU f32 tensor.
pub(crate) fn with_values<R>(op: &'static str, tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        return Err(KernelError::shape(op, "a CPU tensor", format!("{:?}", tensor.device())));
    };
    Ok(f(&contiguous(op, storage, layout)?))
}

/// Adds the values of a CPU f32 tensor to a buffer of the same size.
///
/// # Errors
/// When the sizes differ.
pub fn accumulate(buffer: &mut [f32], tensor: &Tensor) -> Result<()> {
    with_values("accumulate", tensor, |values| {
        if values.len() != buffer.len() {
            return Err(KernelError::shape(
                "accumulate",
                format!("{} values", buffer.len()),
                format!("{}", values.len()),
            ));
        }
        buffer.par_iter_mut().zip(values).with_min_len(16_384).for_each(|(sum, value)| *sum += value);
        Ok(())
    })?
}

/// A new CPU tensor over `values`.
pub(crate) fn tensor(values: Vec<f32>, dims: impl Into<candle_core::Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, dims, &candle_core::Device::Cpu)?)
}

/// Rows handled by one task: big enough to pay for the hand-over, fixed so that results do not depend on threads.
pub(crate) fn rows_per_task(width: usize) -> usize {
    (16_384 / width.max(1)).max(1)
}

/// Runs `f(first_row, rows)` over blocks of rows of `out` in parallel.
pub(crate) fn for_rows(out: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    if width == 0 || out.is_empty() {
        return;
    }
    let rows = rows_per_task(width);
    out.par_chunks_mut(rows * width).enumerate().for_each(|(task, chunk)| f(task * rows, chunk));
}

/// Sums per-task partial rows into one row, in task order.
pub(crate) fn sum_partials(partials: Vec<Vec<f32>>, width: usize) -> Vec<f32> {
    let mut total = vec![0f32; width];
    for partial in partials {
        for (sum, value) in total.iter_mut().zip(partial) {
            *sum += value;
        }
    }
    total
}

/// Defines a function that is compiled three times, for AVX-512, for AVX2 with FMA and for any machine, and picks
/// one at run time. The body is ordinary Rust over slices that the compiler vectorises.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }

                match $crate::cpu::level() {
                    // SAFETY: `level` saw these features on this machine.
                    $crate::cpu::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::cpu::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::cpu::Level::Portable => {}
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// Instruction sets the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// AVX-512 F, VL, BW, DQ.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// Whatever the target guarantees.
    Portable,
}

/// The instruction set in use: the best the machine has, or a lower one named by `MEGACONTEXT_CPU`
/// (`avx512`, `avx2`, `portable`). Read once.
pub fn level() -> Level {
    static LEVEL: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
    *LEVEL.get_or_init(|| {
        let best = detect();
        match std::env::var("MEGACONTEXT_CPU").as_deref() {
            Ok("portable") => Level::Portable,
            Ok("avx2") if best != Level::Portable => Level::Avx2,
            _ => best,
        }
    })
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    use std::arch::is_x86_feature_detected as has;
    if has!("avx512f")
        && has!("avx512vl")
        && has!("avx512bw")
        && has!("avx512dq")
        && has!("avx2")
        && has!("fma")
    {
        Level::Avx512
    } else if has!("avx2") && has!("fma") {
        Level::Avx2
    } else {
        Level::Portable
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Portable
}
