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

/// A new CPU tensor over `values`.
pub(crate) fn tensor(values: Vec<f32>, dims: impl Into<candle_core::Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, dims, &candle_core::Device::Cpu)?)
}

/// Rows handled by one task: big enough to pay for the hand-over, fixed so that results do not depend on threads.
pub(crate) fn rows_per_task(width: usize) -> usize {
    (16_384 / width.max(1)).max(1)
}

/// Runs `f(first_row, rows)` over blocks of rows of `out` in parallel.
pub(crate) fn for_rows<S: Send>(out: &mut [S], width: usize, f: impl Fn(usize, &mut [S]) + Sync) {
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
/// one at run time. The body is ordinary Rust over slices that the compiler vectorises. One storage type may be a
/// parameter: `fn name<S: Store>(..)`.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($s:ident: $bound:path),+>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name $(<$($s: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body $(<$($s: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                fn avx512 $(<$($s: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn avx2 $(<$($s: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }

                match $crate::cpu::vectors() {
                    // SAFETY: `vectors` saw these features on this machine.
                    $crate::cpu::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::cpu::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    _ => {}
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// Instruction sets the kernels are compiled for, each with everything of those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the target guarantees.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, VL, BW, DQ.
    Avx512,
    /// AVX-512 with bf16 dot products.
    Avx512Bf16,
    /// AMX tiles in software, over whatever else the machine has: the reference of the level below.
    SoftwareTiles,
    /// AMX tiles with bf16 products.
    Amx,
}

impl Level {
    /// Every level, lowest first.
    pub const ALL: [Self; 6] =
        [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::SoftwareTiles, Self::Amx];

    /// Its name in `MEGACONTEXT_CPU` and in what benchmarks print.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::SoftwareTiles => "software-tiles",
            Self::Amx => "amx",
        }
    }

    /// Whether this machine can run it.
    pub fn available(self) -> bool {
        match self {
            Self::Portable | Self::SoftwareTiles => true,
            other => other <= best(),
        }
    }
}

/// The instruction set in use: the best the machine has, or the one that `MEGACONTEXT_CPU` names. Read once. A name that
/// is unknown, or that this machine cannot run, is reported on standard error, and the best is used.
pub fn level() -> Level {
    static LEVEL: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
    *LEVEL.get_or_init(|| {
        let Ok(name) = std::env::var("MEGACONTEXT_CPU") else { return best() };
        match Level::ALL.into_iter().find(|level| level.name() == name) {
            Some(level) if level.available() => level,
            found => {
                let names = Level::ALL.map(Level::name).join(", ");
                let why = if found.is_some() { "which this machine does not have" } else { "which is no level" };
                eprintln!(
                    "MEGACONTEXT_CPU: expected one of {names} that this machine has, got {name:?}, {why}; using {}",
                    best().name()
                );
                best()
            }
        }
    })
}

/// The instruction set of ordinary vector code at the level in use: never more than AVX-512.
pub(crate) fn vectors() -> Level {
    match level() {
        Level::SoftwareTiles => best().min(Level::Avx512),
        other => other.min(Level::Avx512),
    }
}

/// The best level of this machine.
pub fn best() -> Level {
    static BEST: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
    *BEST.get_or_init(detect)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    use std::arch::is_x86_feature_detected as has;
    if !(has!("avx2") && has!("fma")) {
        Level::Portable
    } else if !(has!("avx512f") && has!("avx512vl") && has!("avx512bw") && has!("avx512dq")) {
        Level::Avx2
    } else if !has!("avx512bf16") {
        Level::Avx512
    } else if !crate::micro::amx::usable() {
        Level::Avx512Bf16
    } else {
        Level::Amx
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Portable
}
