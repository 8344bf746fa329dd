//! Shape, strides and place of a view: its checks, and where in memory its values lie.
//!
//! Shapes: dims are counted outermost first. Units: strides and offsets count elements, spans bytes.
//! Errors: [`TensorError`], with what was expected and what came.

use std::ffi::c_void;

use abi_stable::StableAbi;

use super::{DType, Device, DeviceKind, Element, MAX_RANK, Memory, Stream, TensorError};

/// Shape, strides and place: what both views have in common. Fixed size, so nothing in it needs freeing.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) data: *const c_void,
    pub(super) dtype: DType,
    pub(super) device: Device,
    /// A [`Stream`]'s number; 0 where nothing has to be waited for.
    pub(super) stream: usize,
    rank: usize,
    shape: [usize; MAX_RANK],
    strides: [isize; MAX_RANK],
}

/// As lists are written in messages.
pub(super) fn text<T: std::fmt::Display>(values: &[T]) -> String {
    let parts: Vec<_> = values.iter().map(ToString::to_string).collect();
    format!("[{}]", parts.join(", "))
}

impl Layout {
    pub fn new(
        data: *const c_void,
        dtype: DType,
        device: Device,
        shape: &[usize],
        strides: &[isize],
    ) -> Self {
        // A rank beyond MAX_RANK is kept as it is, for `check` on the other side to refuse.
        let mut layout = Self {
            data,
            dtype,
            device,
            stream: 0,
            rank: shape.len(),
            shape: [0; MAX_RANK],
            strides: [0; MAX_RANK],
        };
        for (to, from) in layout.shape.iter_mut().zip(shape) {
            *to = *from;
        }
        for (to, from) in layout.strides.iter_mut().zip(strides) {
            *to = *from;
        }
        layout
    }

    /// Memory of a GPU, whose address no pointer of the host's follows.
    pub fn cuda(
        address: usize,
        dtype: DType,
        id: i32,
        stream: Option<Stream>,
        shape: &[usize],
        strides: &[isize],
    ) -> Self {
        let data = std::ptr::without_provenance(address);
        let device = Device { kind: DeviceKind::Cuda, id };
        Self { stream: stream.map_or(0, Stream::number), ..Self::new(data, dtype, device, shape, strides) }
    }

    pub fn stream(&self) -> Option<Stream> {
        Stream::new(self.stream)
    }

    pub fn contiguous<T: Element>(data: *const T, len: usize, shape: &[usize]) -> Result<Self, TensorError> {
        let what = || "tensor view".to_owned();
        if shape.len() > MAX_RANK {
            return Err(TensorError::Rank {
                what: what(),
                expected: format!("at most {MAX_RANK}"),
                got: shape.len(),
            });
        }
        let needed = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if needed != Some(len) {
            return Err(TensorError::Length {
                what: what(),
                shape: text(shape),
                expected: needed.map_or("more than fit".to_owned(), |n| n.to_string()),
                got: len,
            });
        }
        let strides = contiguous_strides(shape);
        Ok(Self::new(data.cast(), T::DTYPE, Device::CPU, shape, &strides[..shape.len()]))
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.rank.min(MAX_RANK)]
    }

    pub fn strides(&self) -> &[isize] {
        &self.strides[..self.rank.min(MAX_RANK)]
    }

    /// Number of elements; call after `check`.
    pub fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// Bytes from the first element to behind the last one, `None` if that overflows.
    fn span_bytes(&self) -> Option<usize> {
        if self.shape().contains(&0) {
            return Some(0);
        }
        let mut last = 0usize;
        for (&dim, &stride) in self.shape().iter().zip(self.strides()) {
            last = last.checked_add((dim - 1).checked_mul(usize::try_from(stride).ok()?)?)?;
        }
        let bytes = last.checked_add(1)?.checked_mul(self.dtype.size())?;
        (bytes <= isize::MAX as usize).then_some(bytes)
    }

    pub fn check(
        &self,
        what: &str,
        expected: Device,
        dtype: DType,
        dims: &[Option<usize>],
    ) -> Result<(), TensorError> {
        let what = what.to_owned();
        if self.rank != dims.len() || self.rank > MAX_RANK {
            return Err(TensorError::Rank { what, expected: dims.len().to_string(), got: self.rank });
        }
        if self.dtype != dtype {
            return Err(TensorError::DType { what, expected: dtype, got: self.dtype });
        }
        if self.device != expected {
            return Err(TensorError::Device { what, expected, got: self.device });
        }
        if let Some(got) = self.stream().filter(|_| self.device.kind != DeviceKind::Cuda) {
            return Err(TensorError::Stream { what, device: self.device, got });
        }
        if dims.iter().zip(self.shape()).any(|(want, got)| want.is_some_and(|w| w != *got)) {
            let expected: Vec<_> =
                dims.iter().map(|d| d.map_or("any".to_owned(), |d| d.to_string())).collect();
            return Err(TensorError::Shape { what, expected: text(&expected), got: text(self.shape()) });
        }
        if let Some((dim, &got)) = self.strides().iter().enumerate().find(|(_, s)| **s < 0) {
            return Err(TensorError::Stride { what, dim, got });
        }
        let shape = || text(self.shape());
        let count = self.shape().iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let (Some(count), Some(span)) = (count, self.span_bytes()) else {
            return Err(TensorError::Overflow { what, shape: shape() });
        };
        // A broadcast stride of 0 makes the count larger than the span: the copy must fit as well.
        if count.checked_mul(dtype.size()).is_none_or(|b| b > isize::MAX as usize) {
            return Err(TensorError::Overflow { what, shape: shape() });
        }
        let address = self.data as usize;
        if count > 0 && address == 0 {
            return Err(TensorError::Null { what });
        }
        if !address.is_multiple_of(dtype.size()) {
            return Err(TensorError::Alignment { what, expected: dtype.size(), address });
        }
        if address.checked_add(span).is_none() {
            return Err(TensorError::Overflow { what, shape: shape() });
        }
        Ok(())
    }

    /// Room for a copy of all elements; call after `check`.
    pub fn room<T>(&self, what: &str) -> Result<Vec<T>, TensorError> {
        let (mut values, elements) = (Vec::new(), self.len());
        match values.try_reserve_exact(elements) {
            Ok(()) => Ok(values),
            Err(_) => Err(TensorError::Memory { what: what.to_owned(), shape: text(self.shape()), elements }),
        }
    }

    /// Do all values lie one behind another? Call after `check`.
    pub fn is_contiguous(&self) -> bool {
        self.runs().length == self.len()
    }

    /// Sorted by stride, every dimension steps over everything that the ones before it reach: no two elements meet.
    pub fn is_disjoint(&self) -> bool {
        let mut dims: Vec<(usize, usize)> = self
            .shape()
            .iter()
            .zip(self.strides())
            .filter(|(d, _)| **d > 1)
            .map(|(&d, &s)| (usize::try_from(s).unwrap_or(0), d))
            .collect();
        dims.sort_unstable();
        let mut reach = 0usize;
        for (stride, dim) in dims {
            if stride <= reach {
                return false;
            }
            reach = reach.saturating_add(stride.saturating_mul(dim - 1));
        }
        true
    }

    pub fn memory(&self) -> Memory {
        let start = self.data as usize;
        Memory { device: self.device, bytes: start..start.saturating_add(self.span_bytes().unwrap_or(0)) }
    }

    /// The offset of every element in row-major order; call after `check`.
    pub fn offsets(&self) -> Offsets {
        Offsets::new(self.shape(), self.strides())
    }

    /// The memory as runs; call after `check`.
    pub fn runs(&self) -> Runs {
        if self.len() == 0 {
            return Runs { length: 0, offsets: Offsets::new(&[0], &[1]) };
        }
        let (mut length, mut outer) = (1usize, self.shape().len());
        for (&dim, &stride) in self.shape().iter().zip(self.strides()).rev() {
            // Nobody steps over a dimension of one, whatever its stride.
            if dim != 1 && usize::try_from(stride) != Ok(length) {
                break;
            }
            length *= dim;
            outer -= 1;
        }
        Runs { length, offsets: Offsets::new(&self.shape()[..outer], &self.strides()[..outer]) }
    }
}

/// Offsets of elements in row-major order.
#[derive(Debug, Clone)]
pub(super) struct Offsets {
    rank: usize,
    shape: [usize; MAX_RANK],
    strides: [usize; MAX_RANK],
    index: [usize; MAX_RANK],
    offset: usize,
    left: usize,
}

impl Offsets {
    /// Of a layout that was checked: no stride is negative, and nothing of the span overflows.
    fn new(shape: &[usize], strides: &[isize]) -> Self {
        let mut offsets = Self {
            rank: shape.len(),
            shape: [0; MAX_RANK],
            strides: [0; MAX_RANK],
            index: [0; MAX_RANK],
            offset: 0,
            left: shape.iter().product(),
        };
        for (d, (&dim, &stride)) in shape.iter().zip(strides).enumerate() {
            (offsets.shape[d], offsets.strides[d]) = (dim, stride.unsigned_abs());
        }
        offsets
    }
}

impl Iterator for Offsets {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.left = self.left.checked_sub(1)?;
        let offset = self.offset;
        for d in (0..self.rank).rev() {
            self.index[d] += 1;
            self.offset += self.strides[d];
            if self.index[d] < self.shape[d] {
                break;
            }
            self.offset -= self.strides[d] * self.shape[d];
            self.index[d] = 0;
        }
        Some(offset)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

/// A tensor's memory as runs of values that lie one behind another, all of one length, in row-major order. The iterator gives
/// where each begins: elements from the address of the view. A contiguous tensor is one run, an empty one none; a tensor whose
/// innermost neighbours lie apart has a run for every value.
#[derive(Debug, Clone)]
pub struct Runs {
    length: usize,
    offsets: Offsets,
}

impl Runs {
    /// Elements of each run.
    pub fn length(&self) -> usize {
        self.length
    }
}

impl Iterator for Runs {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.offsets.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.offsets.size_hint()
    }
}

impl ExactSizeIterator for Runs {}

/// Strides of a row-major tensor, in elements; the entries beyond the rank are 0.
pub(crate) fn contiguous_strides(shape: &[usize]) -> [isize; MAX_RANK] {
    let mut strides = [0isize; MAX_RANK];
    let mut step = 1usize;
    for d in (0..shape.len().min(MAX_RANK)).rev() {
        strides[d] = isize::try_from(step).unwrap_or(isize::MAX);
        step = step.saturating_mul(shape[d]);
    }
    strides
}
