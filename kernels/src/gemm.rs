//! Matrix products of f32 slices, through the gemm crate (AVX-512 where the machine has it).
//!
//! A safe door in front of one unsafe call: bounds are checked against the slices here. Row-major views and their
//! transposes; all threads of rayon's current pool; each output value is summed in an order that does not depend on
//! the number of threads.

use gemm::Parallelism;

/// A read-only matrix over a slice.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: isize,
    col_stride: isize,
}

impl<'a> Mat<'a> {
    /// Row-major, `rows`·`cols` values.
    ///
    /// # Panics
    /// When `data` is shorter.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols, "a {rows}x{cols} matrix over {} values", data.len());
        Self { data, rows, cols, row_stride: cols as isize, col_stride: 1 }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// `out` (row-major) = `scale`·`a`·`b`, added to what is there when `accumulate`.
///
/// # Panics
/// When the inner sizes differ or `out` is too short: sizes are the caller's to check.
pub fn matmul(out: &mut [f32], a: Mat, b: Mat, scale: f32, accumulate: bool) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(k, b.rows, "inner sizes agree");
    assert!(out.len() >= m * n, "a {m}x{n} product into {} values", out.len());
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            out[..m * n].fill(0.0);
        }
        return;
    }
    let threads = if m * n * k < 64 * 64 * 64 { Parallelism::None } else { Parallelism::Rayon(0) };
    // SAFETY: `Mat` holds at least rows·cols values reachable with its strides, `out` at least m·n, both checked
    // above; `out` is a unique borrow, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride,
            a.row_stride,
            b.data.as_ptr(),
            b.col_stride,
            b.row_stride,
            1.0,
            scale,
            false,
            false,
            false,
            threads,
        );
    }
}

/// Floating-point operations per second of a 512-cubed product on this machine now, for planning: the best of a few.
pub fn measured_flops() -> f64 {
    const N: usize = 512;
    let a = vec![0.5f32; N * N];
    let mut out = vec![0f32; N * N];
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = std::time::Instant::now();
        matmul(&mut out, Mat::new(&a, N, N), Mat::new(&a, N, N), 1.0, false);
        best = best.min(start.elapsed().as_secs_f64());
    }
    2.0 * (N * N * N) as f64 / best.max(1e-9)
}
