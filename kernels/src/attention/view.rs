//! Strided operands and outputs that several threads write, row by row.

use std::marker::PhantomData;

use candle_core::{CpuStorage, Layout};

use super::pattern::OP;
use crate::error::{KernelError, Result};
use crate::gemm::Mat;
use crate::store::Store;

/// A [B, T, heads, D] operand read where it lies.
#[derive(Clone, Copy)]
pub(super) struct View<'a, S> {
    data: &'a [S],
    strides: [usize; 4],
    width: usize,
}

impl<'a, S: Store> View<'a, S> {
    pub fn new(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let Some(data) = S::values(storage) else {
            use candle_core::backend::BackendStorage;
            let got = format!("{:?}", storage.dtype());
            return Err(KernelError::shape(OP, format!("{:?} operands", S::DTYPE), got));
        };
        let strides = match layout.stride() {
            [b, t, h, d] => [*b, *t, *h, *d],
            _ => return Err(KernelError::shape(OP, "rank 4 [B, T, H, D]", format!("{:?}", layout.dims()))),
        };
        Ok(Self { data: &data[layout.start_offset().min(data.len())..], strides, width: layout.dims()[3] })
    }

    /// A row-major operand.
    pub fn row_major(data: &'a [S], [batch, entries, heads, width]: [usize; 4]) -> Self {
        assert!(data.len() >= batch * entries * heads * width, "an operand holds its shape");
        Self { data, strides: [entries * heads * width, heads * width, width, 1], width }
    }

    /// Entries `t` of one row and head as a matrix [entries, D].
    pub fn rows(&self, b: usize, t: &std::ops::Range<usize>, head: usize) -> Mat<'a, S> {
        let [sb, st, sh, sd] = self.strides;
        let at = (b * sb + t.start * st + head * sh).min(self.data.len());
        Mat::strided(&self.data[at..], [t.len(), self.width], [st, sd])
    }

    /// One entry of one head, into a contiguous row of f32.
    pub fn read_row(&self, b: usize, t: usize, head: usize, out: &mut [f32]) {
        let [sb, st, sh, sd] = self.strides;
        let at = b * sb + t * st + head * sh;
        if sd == 1 {
            for (out, x) in out.iter_mut().zip(&self.data[at..at + self.width]) {
                *out = x.get();
            }
        } else {
            for (d, out) in out.iter_mut().enumerate() {
                *out = self.data[at + d * sd].get();
            }
        }
    }
}

/// A contiguous [B, T, heads, width] output whose rows are written by several threads, each row by one at a time.
pub(super) struct Output<'a, S> {
    data: *mut S,
    dims: [usize; 4],
    owner: PhantomData<&'a mut [S]>,
}

// SAFETY: the only access is `row`, whose callers promise that no two threads hold the same row.
unsafe impl<S: Send> Sync for Output<'_, S> {}

impl<'a, S> Output<'a, S> {
    pub fn new(data: &'a mut [S], dims: [usize; 4]) -> Self {
        assert_eq!(data.len(), dims.iter().product::<usize>(), "an output holds its shape");
        Self { data: data.as_mut_ptr(), dims, owner: PhantomData }
    }

    /// One row of `width` values.
    ///
    /// # Safety
    /// No other reference to this row may exist while the result lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row(&self, b: usize, t: usize, head: usize) -> &mut [S] {
        let [batch, entries, heads, width] = self.dims;
        assert!(b < batch && t < entries && head < heads, "a row lies in its output");
        // SAFETY: the row lies inside the slice `new` borrowed for 'a; the caller keeps it exclusive.
        unsafe {
            std::slice::from_raw_parts_mut(self.data.add(((b * entries + t) * heads + head) * width), width)
        }
    }
}
