//! Pieces the forward and backward kernels share: strided operands, tile products, row loops, disjoint outputs.
//!
//! A tile is a small row-major matrix: queries down, keys (or head width) across.

use std::marker::PhantomData;

use candle_core::{CpuStorage, Layout};

use super::pattern::OP;
use crate::cpu::multiversion;
use crate::error::{KernelError, Result};
use crate::math::exp;

/// A [B, T, heads, D] operand read where it lies.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    data: &'a [f32],
    strides: [usize; 4],
    width: usize,
}

impl<'a> View<'a> {
    pub fn new(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let CpuStorage::F32(data) = storage else {
            use candle_core::backend::BackendStorage;
            return Err(KernelError::shape(OP, "f32 operands", format!("{:?}", storage.dtype())));
        };
        let strides = match layout.stride() {
            [b, t, h, d] => [*b, *t, *h, *d],
            _ => return Err(KernelError::shape(OP, "rank 4 [B, T, H, D]", format!("{:?}", layout.dims()))),
        };
        Ok(Self { data: &data[layout.start_offset().min(data.len())..], strides, width: layout.dims()[3] })
    }

    /// A row-major operand.
    pub fn row_major(data: &'a [f32], [batch, entries, heads, width]: [usize; 4]) -> Self {
        assert!(data.len() >= batch * entries * heads * width, "an operand holds its shape");
        Self { data, strides: [entries * heads * width, heads * width, width, 1], width }
    }

    /// Entries `t` of one row and head as a matrix [entries, D].
    pub fn rows(&self, b: usize, t: &std::ops::Range<usize>, head: usize) -> Matrix<'a> {
        let [sb, st, sh, sd] = self.strides;
        Matrix::new(&self.data[b * sb + t.start * st + head * sh..], t.len(), self.width, st, sd)
    }
}

/// A read-only matrix with any strides.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Self {
        assert!(rows > 0 && cols > 0, "a tile is never empty");
        assert!((rows - 1) * row_stride + (cols - 1) * col_stride < data.len(), "a tile lies in its operand");
        Self { data, rows, cols, row_stride, col_stride }
    }

    /// A row-major matrix.
    pub fn tile(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols, 1)
    }

    pub fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    pub fn at(&self, row: usize, col: usize) -> f32 {
        self.data[row * self.row_stride + col * self.col_stride]
    }

    /// Whether every value is finite.
    pub fn finite(&self) -> bool {
        (0..self.rows).all(|row| {
            if self.col_stride == 1 {
                all_finite(&self.data[row * self.row_stride..][..self.cols])
            } else {
                (0..self.cols).all(|col| self.at(row, col).is_finite())
            }
        })
    }
}

/// out = scale·a·b, or out += scale·a·b; `out` is row-major [a.rows, b.cols].
pub(super) fn multiply(out: &mut [f32], a: Matrix<'_>, b: Matrix<'_>, scale: f32, accumulate: bool) {
    assert!(a.cols == b.rows && out.len() == a.rows * b.cols, "tile shapes agree");
    // SAFETY: `Matrix::new` checked that every element of a and b lies in its slice (transposing keeps the set of
    // elements), `out` holds exactly the rows × cols elements written, and is exclusively borrowed.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out.as_mut_ptr(),
            1,
            b.cols as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

multiversion! {
    fn all_finite(values: &[f32]) -> bool {
        let mut bad = 0u32;
        for x in values {
            bad |= u32::from(x.to_bits() & 0x7f80_0000 == 0x7f80_0000);
        }
        bad == 0
    }
}

multiversion! {
    /// The largest value that is not NaN, or −inf.
    pub(super) fn largest(values: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; 64];
        let (head, tail) = values.split_at(values.len() / 64 * 64);
        for chunk in head.chunks_exact(64) {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                *lane = if *x > *lane { *x } else { *lane };
            }
        }
        lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |most, x| if *x > most { *x } else { most })
    }
}

multiversion! {
    /// Replaces each x by e^(x − top) and returns the sum.
    pub(super) fn exp_sum(values: &mut [f32], top: f32) -> f32 {
        let mut lanes = [0f32; 32];
        let (head, tail) = values.split_at_mut(values.len() / 32 * 32);
        for chunk in head.chunks_exact_mut(32) {
            for (lane, x) in lanes.iter_mut().zip(chunk) {
                let e = exp(*x - top);
                *x = e;
                *lane += e;
            }
        }
        let mut sum = lanes.iter().sum::<f32>();
        for x in tail {
            *x = exp(*x - top);
            sum += *x;
        }
        sum
    }
}

multiversion! {
    /// p = e^(p − lse); ds = p·(ds − delta)·scale. On entry p holds scores and ds the gradient of p.
    pub(super) fn softmax_backward(p: &mut [f32], ds: &mut [f32], lse: f32, delta: f32, scale: f32) {
        for (p, ds) in p.iter_mut().zip(ds) {
            let e = exp(*p - lse);
            *p = e;
            *ds = e * (*ds - delta) * scale;
        }
    }
}

multiversion! {
    /// values *= factor.
    pub(super) fn scale_row(values: &mut [f32], factor: f32) {
        for x in values {
            *x *= factor;
        }
    }
}

multiversion! {
    /// out += values.
    pub(super) fn add_row(out: &mut [f32], values: &[f32]) {
        for (o, x) in out.iter_mut().zip(values) {
            *o += x;
        }
    }
}

/// A contiguous [B, T, heads, width] output whose rows are written by several threads, each row by one at a time.
pub(super) struct Output<'a> {
    data: *mut f32,
    dims: [usize; 4],
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: the only access is `row`, whose callers promise that no two threads hold the same row.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    pub fn new(data: &'a mut [f32], dims: [usize; 4]) -> Self {
        assert_eq!(data.len(), dims.iter().product::<usize>(), "an output holds its shape");
        Self { data: data.as_mut_ptr(), dims, owner: PhantomData }
    }

    /// One row of `width` values.
    ///
    /// # Safety
    /// No other reference to this row may exist while the result lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row(&self, b: usize, t: usize, head: usize) -> &mut [f32] {
        let [batch, entries, heads, width] = self.dims;
        assert!(b < batch && t < entries && head < heads, "a row lies in its output");
        // SAFETY: the row lies inside the slice `new` borrowed for 'a; the caller keeps it exclusive.
        unsafe {
            std::slice::from_raw_parts_mut(self.data.add(((b * entries + t) * heads + head) * width), width)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::largest;

    #[test]
    fn row_loops_reach_every_value() {
        for len in 0..150 {
            let values: Vec<f32> = (0..len).map(|i| i as f32).collect();
            let most = if len == 0 { f32::NEG_INFINITY } else { len as f32 - 1.0 };
            assert_eq!(largest(&values), most);
            assert_eq!(crate::math::dot(&values, &vec![2.0; len]), values.iter().sum::<f32>() * 2.0);
        }
    }
}
