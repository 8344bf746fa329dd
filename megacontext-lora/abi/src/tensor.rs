//! Borrowed tensors: how numbers cross the ABI without a copy.
//!
//! A view is a pointer with dtype, device, shape and strides. It borrows: the side that made it keeps the memory alive
//! and still for the duration of the call. The side that receives it trusts nothing and calls [`TensorView::check`]
//! (or a reader such as [`TensorView::read`], which checks first): rank, dimensions, dtype, device, overflow, null
//! pointer, alignment, and for outputs that no two elements share memory. What cannot be checked is that the pointer
//! really has that much memory behind it: this is what `from_raw_parts` and `from_cuda` make their caller promise.
//!
//! A view may be of a GPU's memory (`from_cuda`): then it carries the device's address and the stream that the memory's last
//! writes, or for an output its last uses, were queued on ([`Stream`]). A receiver that works on the device queues its own work
//! behind that stream, and what it did is ordered on the same stream when the call returns. Whatever reads or writes values on
//! the host refuses such a view with [`TensorError::Device`] before anything is touched.
//!
//! Shapes: dims are counted outermost first, at most [`MAX_RANK`] of them. Units: strides count elements, not bytes, and
//! are never negative. Values are in native byte order.
//!
//! Sources: for streams the CUDA Array Interface, version 3 (`stream`), whose numbers DLPack's `__dlpack__(stream)` shares.
//! Left out: other devices than these two, and copies between them: a receiver makes them by [`TensorView::runs`]. The plugin takes
//! the CPU's views, and those of the GPU that a session's passes run on.

use abi_stable::StableAbi;
use std::borrow::Cow;
use std::ffi::c_void;
use std::marker::PhantomData;

use layout::{Layout, text};

pub use layout::Runs;
pub(crate) use layout::contiguous_strides;
pub use memory::{Memory, Stream};

pub mod hostile;
mod layout;
mod memory;

/// Most dimensions that a view can have.
pub const MAX_RANK: usize = 6;

/// Element type of a tensor.
#[repr(u8)]
#[derive(StableAbi, Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary64.
    F64,
    /// The upper half of a binary32.
    Bf16,
    /// IEEE binary16.
    F16,
    /// Unsigned 32 bits: token ids.
    U32,
    /// Signed 64 bits.
    I64,
}

impl DType {
    /// Bytes of one element, which is its alignment too.
    pub const fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 | Self::U32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }

    /// As safetensors writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F64 => "F64",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::U32 => "U32",
            Self::I64 => "I64",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Where memory lies. The numbers are DLPack's.
#[repr(i32)]
#[derive(StableAbi, Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// Memory that the CPU addresses.
    Cpu = 1,
    /// CUDA device memory.
    Cuda = 2,
}

/// A device: its kind and which one.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Device {
    /// The kind.
    pub kind: DeviceKind,
    /// Which of that kind; 0 for the CPU.
    pub id: i32,
}

impl Device {
    /// The CPU.
    pub const CPU: Self = Self { kind: DeviceKind::Cpu, id: 0 };
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            DeviceKind::Cpu => f.write_str("cpu"),
            DeviceKind::Cuda => write!(f, "cuda:{}", self.id),
        }
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that is the element of a [`DType`]. Every bit pattern of it is valid.
pub trait Element: sealed::Sealed + Copy + Default + Send + Sync + 'static {
    /// The dtype.
    const DTYPE: DType;
}

macro_rules! element {
    ($($rust:ty => $dtype:ident),*) => {$(
        impl sealed::Sealed for $rust {}
        impl Element for $rust {
            const DTYPE: DType = DType::$dtype;
        }
    )*};
}
element!(f32 => F32, f64 => F64, half::bf16 => Bf16, half::f16 => F16, u32 => U32, i64 => I64);

/// Why a view was refused. `what` is the argument's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // The fields are what their names say; the sentences say the rest.
pub enum TensorError {
    /// More dimensions than a view can have, or another number than expected.
    #[error("{what}: expected {expected} dimensions, got {got}")]
    Rank { what: String, expected: String, got: usize },
    /// A dimension of another length.
    #[error("{what}: expected the shape {expected}, got {got}")]
    Shape { what: String, expected: String, got: String },
    /// Another element type.
    #[error("{what}: expected {expected}, got {got}")]
    DType { what: String, expected: DType, got: DType },
    /// Memory that this side cannot read.
    #[error("{what}: expected memory on {expected}, got {got}")]
    Device { what: String, expected: Device, got: Device },
    /// A stream under memory that is not a GPU's.
    #[error("{what}: expected no stream for memory on {device}, got {got}")]
    Stream { what: String, device: Device, got: Stream },
    /// Shape and strides span more than an address space.
    #[error("{what}: the shape {shape} with its strides overflows the address space")]
    Overflow { what: String, shape: String },
    /// A copy for which there is no memory: a broadcast view counts more elements than it has.
    #[error("{what}: no memory for a copy of {elements} elements (shape {shape})")]
    Memory { what: String, shape: String, elements: usize },
    /// A negative stride.
    #[error("{what}: expected strides of at least 0, got {got} in dimension {dim}")]
    Stride { what: String, dim: usize, got: isize },
    /// A null pointer under a tensor that has elements.
    #[error("{what}: null pointer")]
    Null { what: String },
    /// A pointer that is not a multiple of the element's size.
    #[error("{what}: expected a pointer aligned to {expected} bytes, got {address:#x}")]
    Alignment { what: String, expected: usize, address: usize },
    /// An output in which two elements share memory.
    #[error("{what}: an output's elements overlap in memory (shape {shape}, strides {strides})")]
    Overlap { what: String, shape: String, strides: String },
    /// Two arguments share memory, and one of them is written.
    #[error("{first} and {second} share memory")]
    Shared { first: String, second: String },
    /// A slice whose length is not the product of its dimensions.
    #[error("{what}: the shape {shape} needs {expected} elements, the slice has {got}")]
    Length { what: String, shape: String, expected: String, got: usize },
}

/// A tensor that the receiver reads during one call.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Copy)]
pub struct TensorView<'a> {
    layout: Layout,
    lives: PhantomData<&'a u8>,
}

impl<'a> TensorView<'a> {
    /// A row-major view of a slice; the product of `shape` must be its length.
    pub fn new<T: Element>(values: &'a [T], shape: &[usize]) -> Result<Self, TensorError> {
        Ok(Self { layout: Layout::contiguous(values.as_ptr(), values.len(), shape)?, lives: PhantomData })
    }

    /// A one-dimensional view of a slice.
    pub fn of<T: Element>(values: &'a [T]) -> Self {
        let layout = Layout::new(values.as_ptr().cast(), T::DTYPE, Device::CPU, &[values.len()], &[1]);
        Self { layout, lives: PhantomData }
    }

    /// A view of memory that is not a slice. Nothing is checked here; the receiver does.
    ///
    /// # Safety
    /// For `'a`, the memory that shape and strides reach from `data` is readable, initialised and written by no one.
    pub unsafe fn from_raw_parts(
        data: *const c_void,
        dtype: DType,
        device: Device,
        shape: &[usize],
        strides: &[isize],
    ) -> Self {
        Self { layout: Layout::new(data, dtype, device, shape, strides), lives: PhantomData }
    }

    /// A view of a GPU's memory at `address` of the device `id`. Nothing is checked here; the receiver does.
    ///
    /// # Safety
    /// For `'a`, the memory that shape and strides reach from `address` is that device's, is readable and initialised once the work
    /// that was queued on `stream` before this call is done, without a stream already now, and is written by no one; `stream` is a
    /// stream of the device's primary context.
    pub unsafe fn from_cuda(
        address: usize,
        dtype: DType,
        id: i32,
        stream: Option<Stream>,
        shape: &[usize],
        strides: &[isize],
    ) -> Self {
        Self { layout: Layout::cuda(address, dtype, id, stream, shape, strides), lives: PhantomData }
    }

    /// Where the memory lies.
    pub fn device(&self) -> Device {
        self.layout.device
    }

    /// The stream that the memory's last writes were queued on; none where there is nothing to wait for.
    pub fn stream(&self) -> Option<Stream> {
        self.layout.stream()
    }

    /// The address of the first element, on its device.
    pub fn address(&self) -> usize {
        self.layout.data as usize
    }

    /// Elements between two neighbours of each dimension.
    pub fn strides(&self) -> &[isize] {
        self.layout.strides()
    }

    /// The dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.layout.dtype
    }

    /// Refuses everything that this side could not read on the host. `dims` are the expected dimensions, `None` for any length.
    pub fn check(&self, what: &str, dtype: DType, dims: &[Option<usize>]) -> Result<(), TensorError> {
        self.check_on(Device::CPU, what, dtype, dims)
    }

    /// The same for who reads on this device.
    pub fn check_on(
        &self,
        device: Device,
        what: &str,
        dtype: DType,
        dims: &[Option<usize>],
    ) -> Result<(), TensorError> {
        self.layout.check(what, device, dtype, dims)
    }

    /// Checks for who reads on this device, then gives the memory as runs from [`Self::address`] on.
    pub fn runs(
        &self,
        device: Device,
        what: &str,
        dtype: DType,
        dims: &[Option<usize>],
    ) -> Result<Runs, TensorError> {
        self.check_on(device, what, dtype, dims)?;
        Ok(self.layout.runs())
    }

    /// Checks, then the values in row-major order: borrowed if they lie so, else copied.
    pub fn read<T: Element>(&self, what: &str, dims: &[Option<usize>]) -> Result<Cow<'a, [T]>, TensorError> {
        self.check(what, T::DTYPE, dims)?;
        let len = self.layout.len();
        if len == 0 {
            return Ok(Cow::Borrowed(&[]));
        }
        let data = self.layout.data.cast::<T>();
        if self.layout.is_contiguous() {
            // SAFETY: `check` found the pointer non-null and aligned for T and the length within isize::MAX bytes; the
            // maker of the view promised readable, initialised, unwritten memory for 'a, and T takes every bit pattern.
            return Ok(Cow::Borrowed(unsafe { std::slice::from_raw_parts(data, len) }));
        }
        let mut values = self.layout.room(what)?;
        // SAFETY: as above, and every offset lies inside the span that `check` found free of overflow.
        values.extend(self.layout.offsets().map(|offset| unsafe { *data.add(offset) }));
        Ok(Cow::Owned(values))
    }

    /// Where it lies, from the first byte to behind the last one.
    pub fn memory(&self) -> Memory {
        self.layout.memory()
    }
}

/// A tensor in the caller's memory that the receiver writes during one call. The memory is initialised beforehand.
#[repr(C)]
#[derive(StableAbi, Debug)]
pub struct TensorViewMut<'a> {
    layout: Layout,
    lives: PhantomData<&'a mut u8>,
}

impl<'a> TensorViewMut<'a> {
    /// A row-major view of a slice; the product of `shape` must be its length.
    pub fn new<T: Element>(values: &'a mut [T], shape: &[usize]) -> Result<Self, TensorError> {
        let len = values.len();
        Ok(Self { layout: Layout::contiguous(values.as_mut_ptr(), len, shape)?, lives: PhantomData })
    }

    /// A one-dimensional view of a slice.
    pub fn of<T: Element>(values: &'a mut [T]) -> Self {
        let len = values.len();
        let layout = Layout::new(values.as_mut_ptr().cast(), T::DTYPE, Device::CPU, &[len], &[1]);
        Self { layout, lives: PhantomData }
    }

    /// A view of memory that is not a slice. Nothing is checked here; the receiver does.
    ///
    /// # Safety
    /// For `'a`, the memory that shape and strides reach from `data` is readable, writable, initialised and used by no
    /// one else.
    pub unsafe fn from_raw_parts(
        data: *mut c_void,
        dtype: DType,
        device: Device,
        shape: &[usize],
        strides: &[isize],
    ) -> Self {
        Self { layout: Layout::new(data, dtype, device, shape, strides), lives: PhantomData }
    }

    /// A view of a GPU's memory at `address` of the device `id`. Nothing is checked here; the receiver does.
    ///
    /// # Safety
    /// For `'a`, the memory that shape and strides reach from `address` is that device's, is readable, writable and initialised once the
    /// work that was queued on `stream` before this call is done, without a stream already now, and is used by no one else; `stream` is
    /// a stream of the device's primary context.
    pub unsafe fn from_cuda(
        address: usize,
        dtype: DType,
        id: i32,
        stream: Option<Stream>,
        shape: &[usize],
        strides: &[isize],
    ) -> Self {
        Self { layout: Layout::cuda(address, dtype, id, stream, shape, strides), lives: PhantomData }
    }

    /// Where the memory lies.
    pub fn device(&self) -> Device {
        self.layout.device
    }

    /// The stream that the memory's last uses were queued on; none where there is nothing to wait for.
    pub fn stream(&self) -> Option<Stream> {
        self.layout.stream()
    }

    /// The address of the first element, on its device.
    pub fn address(&self) -> usize {
        self.layout.data as usize
    }

    /// Elements between two neighbours of each dimension.
    pub fn strides(&self) -> &[isize] {
        self.layout.strides()
    }

    /// The dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.layout.dtype
    }

    /// Refuses everything that this side could not write on the host, elements that overlap included.
    pub fn check(&self, what: &str, dtype: DType, dims: &[Option<usize>]) -> Result<(), TensorError> {
        self.check_on(Device::CPU, what, dtype, dims)
    }

    /// The same for who writes on this device.
    pub fn check_on(
        &self,
        device: Device,
        what: &str,
        dtype: DType,
        dims: &[Option<usize>],
    ) -> Result<(), TensorError> {
        self.layout.check(what, device, dtype, dims)?;
        if !self.layout.is_disjoint() {
            return Err(TensorError::Overlap {
                what: what.to_owned(),
                shape: text(self.layout.shape()),
                strides: text(self.layout.strides()),
            });
        }
        Ok(())
    }

    /// Checks for who writes on this device, then gives the memory as runs from [`Self::address`] on.
    pub fn runs(
        &self,
        device: Device,
        what: &str,
        dtype: DType,
        dims: &[Option<usize>],
    ) -> Result<Runs, TensorError> {
        self.check_on(device, what, dtype, dims)?;
        Ok(self.layout.runs())
    }

    /// Checks, then lets `fill` write the values in row-major order; into the memory itself if it lies so, else into a
    /// buffer that is spread afterwards. On an error of `fill` the contents are whatever it left.
    pub fn fill<T: Element, R, E: From<TensorError>>(
        &mut self,
        what: &str,
        dims: &[Option<usize>],
        fill: impl FnOnce(&mut [T]) -> Result<R, E>,
    ) -> Result<R, E> {
        self.check(what, T::DTYPE, dims)?;
        let len = self.layout.len();
        if len == 0 {
            return fill(&mut []);
        }
        let data = self.layout.data.cast::<T>().cast_mut();
        if self.layout.is_contiguous() {
            // SAFETY: `check` found the pointer non-null and aligned for T and the length within isize::MAX bytes; the
            // maker of the view promised initialised memory that only this call uses, and T takes every bit pattern.
            return fill(unsafe { std::slice::from_raw_parts_mut(data, len) });
        }
        let mut values = self.layout.room(what)?;
        values.resize(len, T::default());
        let result = fill(&mut values)?;
        for (offset, value) in self.layout.offsets().zip(values) {
            // SAFETY: as above, and every offset lies inside the span that `check` found free of overflow.
            unsafe { *data.add(offset) = value };
        }
        Ok(result)
    }

    /// Where it lies, from the first byte to behind the last one.
    pub fn memory(&self) -> Memory {
        self.layout.memory()
    }
}

/// Refuses a call in which memory that is written (`outputs`) is also another argument's.
pub fn check_disjoint(outputs: &[(&str, Memory)], inputs: &[(&str, Memory)]) -> Result<(), TensorError> {
    for (i, (first, a)) in outputs.iter().enumerate() {
        if let Some((second, _)) = outputs[i + 1..].iter().chain(inputs).find(|(_, b)| a.meets(b)) {
            return Err(TensorError::Shared { first: (*first).to_owned(), second: (*second).to_owned() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
