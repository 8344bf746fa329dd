//! [`crate::attention`] on a device: every pattern, row lengths, packed segments, slopes, rows that continue a document;
//! forward and backward.
//!
//! Shapes: q [B, T, H, D]; k and v [B, T, Hkv, D] with H a multiple of Hkv, each where its [`Operand`] says; a document's
//! k and v [.., Hkv, D]; results and gradients row-major, log-sum-exp [B, T, H] in f32. D is a multiple of 8 up to 256,
//! and every row of D values begins at a multiple of 16 bytes. Units: entries. Gradients have the operands' storage type;
//! sums are f32.
//!
//! [`Prepared`] is made once for all layers of a pass: which keys each query sees is found on the device, two ints per
//! query and shift. Tiles, threads and shared memory are those of `Sizes` in `cu/attention.cuh`.
//!
//! Errors: as on the CPU, with its messages; widths, strides and addresses that the kernels cannot read. Left out: other
//! widths; the CPU's care for values that are not finite (see `docs/cuda.md`).

mod launch;
pub(super) mod sizes;

use cudarc::driver::{CudaSlice, CudaView, CudaViewMut, DevicePtr, DevicePtrMut};

use super::arguments::BoundsArgs;
use super::check::{blocks, here, int, product};
use super::device::{Device, config};
use crate::attention::prefix::Continuations;
use crate::attention::{Dims, Pattern, Rows};
use crate::error::{KernelError, Result};

const OP: &str = "cuda attention";
const THREADS: u32 = 256;

/// Heads of D values in device memory, which may lie among other things: value d of head h of entry t of row b is number
/// b·strides\[0\] + t·strides\[1\] + h·strides\[2\] + d.
#[derive(Debug)]
pub struct Operand<'a, T> {
    /// From the first value on.
    pub values: CudaView<'a, T>,
    /// Of row, entry and head, in values.
    pub strides: [usize; 3],
}

impl<'a, T> Operand<'a, T> {
    /// Rows of `entries` entries of `heads` heads of `width` values, one after the other.
    pub fn row_major(values: CudaView<'a, T>, [entries, heads, width]: [usize; 3]) -> Self {
        let entry = heads.saturating_mul(width);
        Self { values, strides: [entries.saturating_mul(entry), entry, width] }
    }
}

/// Queries, keys and values of the rows themselves.
#[derive(Debug)]
pub struct Own<'a, T> {
    /// [B, T, H, D].
    pub q: Operand<'a, T>,
    /// [B, T, Hkv, D].
    pub k: Operand<'a, T>,
    /// [B, T, Hkv, D].
    pub v: Operand<'a, T>,
}

/// Keys and values of the document that rows continue; their strides of rows are not read.
#[derive(Debug)]
pub struct Document<'a, T> {
    /// [document's entries, Hkv, D].
    pub k: Operand<'a, T>,
    /// [document's entries, Hkv, D].
    pub v: Operand<'a, T>,
}

/// What backward needs of a forward pass besides its operands.
#[derive(Debug)]
pub struct Mixed<'a, T> {
    /// The result, [B, T, H, D].
    pub out: CudaView<'a, T>,
    /// Log-sum-exp of every query, [B, T, H].
    pub lse: CudaView<'a, f32>,
}

/// Where the gradients of the rows' operands are written, row-major in their shapes.
#[derive(Debug)]
pub struct Gradients<'a, T> {
    /// Of q.
    pub q: CudaViewMut<'a, T>,
    /// Of k.
    pub k: CudaViewMut<'a, T>,
    /// Of v.
    pub v: CudaViewMut<'a, T>,
}

/// Checked sizes, and the keys that each query sees.
pub struct Prepared {
    dims: Dims,
    scale: f32,
    /// The document's entries, for rows that continue one.
    document: Option<usize>,
    prefix: Option<CudaSlice<i32>>,
    lengths: Option<CudaSlice<i32>>,
    /// [B, 2, T]: for heads with groups in place, then for those with groups that are moved.
    lo: CudaSlice<i32>,
    hi: CudaSlice<i32>,
    slopes: Option<CudaSlice<f32>>,
    positions: Option<CudaSlice<f32>>,
}

/// A pattern as attention_bounds.cu numbers it, and its size.
fn numbers(pattern: Pattern) -> [i32; 2] {
    // Any size of at least the row's entries is the same.
    let size = |size: usize| i32::try_from(size).unwrap_or(i32::MAX);
    match pattern {
        Pattern::Dense => [0, 0],
        Pattern::ShiftedSparse { group } => [1, size(group)],
        Pattern::ShiftedBidirectional { group } => [2, size(group)],
        Pattern::SlidingWindow { window } => [3, size(window)],
        Pattern::Bidirectional => [4, 0],
    }
}

/// Sizes that were checked against B, T or a document, as the kernels take them.
fn ints(device: &Device, values: &[usize]) -> Result<CudaSlice<i32>> {
    let values: Vec<i32> = values.iter().map(|value| int(OP, "entries", *value)).collect::<Result<_>>()?;
    Ok(device.upload(&values)?)
}

impl Prepared {
    /// For B·T entries, H query heads, G kv heads and head width D, all at least 1.
    ///
    /// # Errors
    /// As [`crate::attention::attention`]; a width that is no multiple of 8; no entries.
    pub fn new(device: &Device, dims: [usize; 5], scale: f64, pattern: Pattern, rows: &Rows) -> Result<Self> {
        let dims = checked(dims)?;
        pattern.check()?;
        rows.check(dims.batch, dims.entries)?;
        let mut bounds = Bounds::new(device, rows.lengths.as_deref())?;
        if let Some(segments) = &rows.segments {
            let mut offsets = vec![0];
            for starts in segments {
                offsets.push(offsets[offsets.len() - 1] + starts.len());
            }
            bounds.offsets = Some(ints(device, &offsets)?);
            bounds.segments = Some(ints(device, &segments.concat())?);
        }
        bounds.find(device, dims, scale, pattern, None)
    }

    /// For n rows of R entries that continue a document of `document` entries; `dims` are [n, R, H, Hkv, D].
    ///
    /// # Errors
    /// As [`crate::attention::prefix::PrefixAttention::new`] and [`Self::new`].
    pub fn continuing(
        device: &Device,
        dims: [usize; 5],
        document: usize,
        scale: f64,
        pattern: Pattern,
        rows: &Continuations,
    ) -> Result<Self> {
        let dims = checked(dims)?;
        rows.check(dims, document, pattern)?;
        if document > i32::MAX as usize / 2 {
            return Err(KernelError::shape(
                OP,
                "a document of at most 1073741823 entries",
                document.to_string(),
            ));
        }
        let mut bounds = Bounds::new(device, rows.lengths.as_deref())?;
        bounds.prefix = Some(ints(device, &rows.prefix)?);
        bounds.floor = rows.lower.as_deref().map(|lower| ints(device, lower)).transpose()?;
        bounds.find(device, dims, scale, pattern, Some(document))
    }

    /// Lowers the scores of query head h by slopes\[h\]·|i − j|.
    ///
    /// # Errors
    /// When there is not one finite slope per query head, or the bounds are on another device.
    pub fn with_slopes(mut self, device: &Device, slopes: &[f32]) -> Result<Self> {
        self.dims.check(Some(slopes))?;
        here(OP, "the bounds", &self.lo, device)?;
        self.slopes = Some(device.upload(slopes)?);
        Ok(self)
    }

    /// Places of the T entries of a row, as [`crate::attention::slices::Prepared::with_positions`].
    ///
    /// # Errors
    /// When there is not one finite position per entry, rows continue a document, or the bounds are on another device.
    pub fn with_positions(mut self, device: &Device, positions: &[f32]) -> Result<Self> {
        self.dims.check_positions(positions)?;
        here(OP, "the bounds", &self.lo, device)?;
        if self.document.is_some() {
            let message = "expected rows of their own with positions, got rows that continue a document";
            return Err(KernelError::argument(OP, message));
        }
        self.positions = Some(device.upload(positions)?);
        Ok(self)
    }
}

fn checked([batch, entries, heads, kv_heads, width]: [usize; 5]) -> Result<Dims> {
    let dims = Dims { batch, entries, heads, kv_heads, width };
    dims.check(None)?;
    if !width.is_multiple_of(8) {
        return Err(KernelError::shape(OP, "a head width that is a multiple of 8", width.to_string()));
    }
    if batch == 0 || entries == 0 {
        let got = format!("{batch} rows of {entries}");
        return Err(KernelError::shape(OP, "at least one row and one entry", got));
    }
    // A grid's second and third dimension.
    for (what, size) in [("rows", batch), ("query heads", heads)] {
        if size > 65_535 {
            return Err(KernelError::shape(OP, format!("at most 65535 {what}"), size.to_string()));
        }
    }
    product(OP, "operands", &[batch, entries, heads, width])?;
    Ok(dims)
}

/// What attention_bounds.cu reads of the rows.
struct Bounds {
    lengths: Option<CudaSlice<i32>>,
    offsets: Option<CudaSlice<i32>>,
    segments: Option<CudaSlice<i32>>,
    prefix: Option<CudaSlice<i32>>,
    floor: Option<CudaSlice<i32>>,
}

impl Bounds {
    fn new(device: &Device, lengths: Option<&[usize]>) -> Result<Self> {
        let lengths = lengths.map(|lengths| ints(device, lengths)).transpose()?;
        Ok(Self { lengths, offsets: None, segments: None, prefix: None, floor: None })
    }

    fn find(
        self,
        device: &Device,
        dims: Dims,
        scale: f64,
        pattern: Pattern,
        document: Option<usize>,
    ) -> Result<Prepared> {
        let count = product(OP, "bounds", &[dims.batch, 2, dims.entries])?;
        // SAFETY: the kernel writes every bound, and nothing reads one before.
        let (mut lo, mut hi) = unsafe { (device.unset::<i32>(count)?, device.unset::<i32>(count)?) };
        {
            let stream = device.stream();
            let lists = [&self.lengths, &self.offsets, &self.segments, &self.prefix, &self.floor]
                .map(|list| list.as_ref().map(|list| list.device_ptr(stream)));
            let [lengths, offsets, segments, prefix, floor] =
                lists.each_ref().map(|list| list.as_ref().map_or(0, |(address, _)| *address));
            let (lo, _lo) = lo.device_ptr_mut(stream);
            let (hi, _hi) = hi.device_ptr_mut(stream);
            let [pattern, size] = numbers(pattern);
            let arguments = BoundsArgs {
                pattern,
                size,
                batch: int(OP, "rows", dims.batch)?,
                entries: int(OP, "entries", dims.entries)?,
                lengths,
                offsets,
                segments,
                prefix,
                floor,
                document: int(OP, "the document's entries", document.unwrap_or(0))?,
                lo,
                hi,
            };
            let launch = config([blocks(OP, count, THREADS as usize)?, 1, 1], THREADS, 0);
            // SAFETY: lo and hi have B·2·T ints, lengths, prefix and floor B, offsets B + 1 that ascend within segments.
            unsafe { device.launch(&device.kernels.bounds, launch, &arguments)? };
        }
        let Self { lengths, prefix, .. } = self;
        let scale = scale as f32;
        Ok(Prepared { dims, scale, document, prefix, lengths, lo, hi, slopes: None, positions: None })
    }
}
