//! Dot products of a few rows of x with eight rows of a small operand, all at once in registers.
//!
//! Depth lies across the lanes: no lane is idle whatever the rank, and a value of x that was loaded is used eight times.
//! AVX-512 keeps three rows by eight sums, AVX2 one by eight, plain Rust the same in arrays.

use crate::cpu::{Level, vectors};

/// Rows of the small operand that are taken together.
pub(super) const GROUP: usize = 8;
/// Depth comes in multiples of this.
pub(super) const STEP: usize = 16;

/// `sums[i·GROUP + j]` = Σ x_i·m_j over the first `depth` values of each of the `rows` rows of `x`, `width` apart, and of
/// the GROUP rows of `m`, `stride` apart. `depth` is a multiple of [`STEP`].
///
/// # Panics
/// When a row reaches past the end of its slice.
pub(super) fn dots(
    x: &[f32],
    width: usize,
    rows: usize,
    m: &[f32],
    stride: usize,
    depth: usize,
    sums: &mut [f32],
) {
    if rows == 0 {
        return;
    }
    assert!(depth.is_multiple_of(STEP) && x.len() >= (rows - 1) * width + depth);
    assert!(m.len() >= (GROUP - 1) * stride + depth && sums.len() >= rows * GROUP);
    let mut row = 0;
    while row < rows {
        let (x, sums) = (&x[row * width..], &mut sums[row * GROUP..]);
        row += match vectors() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                let take = (rows - row).min(3);
                // SAFETY: the machine has AVX-512, and the assertions above leave room for these rows.
                unsafe {
                    match take {
                        1 => x86::avx512::<1>(x, width, m, stride, depth, sums),
                        2 => x86::avx512::<2>(x, width, m, stride, depth, sums),
                        _ => x86::avx512::<3>(x, width, m, stride, depth, sums),
                    }
                }
                take
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => {
                // SAFETY: the machine has AVX2 and FMA, and the assertions above leave room for this row.
                unsafe { x86::avx2(x, m, stride, depth, sums) };
                1
            }
            _ => {
                portable(x, m, stride, depth, sums);
                1
            }
        };
    }
}

fn portable(x: &[f32], m: &[f32], stride: usize, depth: usize, sums: &mut [f32]) {
    for (j, sum) in sums[..GROUP].iter_mut().enumerate() {
        let mut lanes = [0f32; STEP];
        let m = &m[j * stride..][..depth];
        for (x, m) in x[..depth].chunks_exact(STEP).zip(m.chunks_exact(STEP)) {
            for i in 0..STEP {
                lanes[i] += x[i] * m[i];
            }
        }
        *sum = lanes.iter().sum();
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::GROUP;

    /// # Safety
    /// As the assertions of [`super::dots`], for `M` rows; AVX-512.
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx2")]
    pub unsafe fn avx512<const M: usize>(
        x: &[f32],
        width: usize,
        m: &[f32],
        stride: usize,
        depth: usize,
        sums: &mut [f32],
    ) {
        let mut acc = [[_mm512_setzero_ps(); GROUP]; M];
        for at in (0..depth).step_by(16) {
            // SAFETY: the caller's promise: `at + 16` is within `depth` for each row.
            unsafe {
                let mut rows = [_mm512_setzero_ps(); M];
                for i in 0..M {
                    rows[i] = _mm512_loadu_ps(x.as_ptr().add(i * width + at));
                }
                for j in 0..GROUP {
                    let m = _mm512_loadu_ps(m.as_ptr().add(j * stride + at));
                    for i in 0..M {
                        acc[i][j] = _mm512_fmadd_ps(rows[i], m, acc[i][j]);
                    }
                }
            }
        }
        for i in 0..M {
            let halves =
                acc[i].map(|v| _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)));
            // SAFETY: `sums` has room for `M` rows of GROUP sums.
            unsafe { _mm256_storeu_ps(sums.as_mut_ptr().add(i * GROUP), totals(halves)) };
        }
    }

    /// # Safety
    /// As the assertions of [`super::dots`], for one row; AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(x: &[f32], m: &[f32], stride: usize, depth: usize, sums: &mut [f32]) {
        let mut acc = [_mm256_setzero_ps(); GROUP];
        for at in (0..depth).step_by(8) {
            // SAFETY: the caller's promise: `at + 8` is within `depth` for each row.
            unsafe {
                let x = _mm256_loadu_ps(x.as_ptr().add(at));
                for (j, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm256_fmadd_ps(x, _mm256_loadu_ps(m.as_ptr().add(j * stride + at)), *acc);
                }
            }
        }
        // SAFETY: `sums` has room for GROUP sums.
        unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), totals(acc)) };
    }

    /// The sum of the lanes of each vector.
    #[target_feature(enable = "avx2")]
    fn totals(v: [__m256; GROUP]) -> __m256 {
        let pairs = |a, b| _mm256_hadd_ps(a, b);
        let low = pairs(pairs(v[0], v[1]), pairs(v[2], v[3]));
        let high = pairs(pairs(v[4], v[5]), pairs(v[6], v[7]));
        // Each half of `low` holds half sums of the first four, each half of `high` of the last four.
        _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high))
    }
}
