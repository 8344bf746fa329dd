//! Blocks of bf16 pair products in AVX-512 registers (`vdpbf16ps`).
//!
//! Per lane and word: c += a₁·b₁, then c += a₀·b₀ in f32, as the instruction defines it (denormals count as zero).

use super::Block;
use crate::cpu::Level;

/// # Safety
/// As [`super::Engine::block`], and the machine has `level`.
#[inline]
pub(super) unsafe fn block(level: Level, block: Block) {
    debug_assert_eq!(level, Level::Avx512Bf16);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise.
    unsafe {
        super::vectors::rows::<12>(block, x86::dot);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = block;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Block;

    /// # Safety
    /// As [`super::super::Engine::block`] with at most 12 rows; AVX-512 with bf16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn dot(block: Block) {
        macro_rules! rows {
            ($($n:literal)*) => {
                // SAFETY: the caller's promise.
                unsafe {
                    match (block.rows, block.lanes) {
                        $(($n, 32) => wide::<$n, 2>(block), ($n, _) => wide::<$n, 1>(block),)*
                        _ => {}
                    }
                }
            };
        }
        rows!(1 2 3 4 5 6 7 8 9 10 11 12);
    }

    /// # Safety
    /// As [`super::super::Engine::block`] with `M` rows and 16·`V` lanes.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn wide<const M: usize, const V: usize>(block: Block) {
        let Block { words, a, lda, b, ldb, c, ldc, add, .. } = block;
        let mut sums = [[_mm512_setzero_ps(); V]; M];
        // SAFETY: the caller's promise about A, B and C; loads and stores are unaligned ones; a vector of 16 words
        // and one of 32 bf16 are the same 64 bytes.
        unsafe {
            if add {
                for m in 0..M {
                    for v in 0..V {
                        sums[m][v] = _mm512_loadu_ps(c.add(m * ldc + 16 * v));
                    }
                }
            }
            for word in 0..words {
                let mut y = [_mm512_setzero_si512(); V];
                for v in 0..V {
                    y[v] = _mm512_loadu_si512(b.add(word * ldb + 16 * v).cast());
                }
                for m in 0..M {
                    let x = _mm512_set1_epi32(*a.add(m * lda + word) as i32);
                    for v in 0..V {
                        sums[m][v] = _mm512_dpbf16_ps(
                            sums[m][v],
                            std::mem::transmute::<__m512i, __m512bh>(x),
                            std::mem::transmute::<__m512i, __m512bh>(y[v]),
                        );
                    }
                }
            }
            for m in 0..M {
                for v in 0..V {
                    _mm512_storeu_ps(c.add(m * ldc + 16 * v), sums[m][v]);
                }
            }
        }
    }
}
