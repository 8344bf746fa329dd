//! Blocks of products in vector registers: f32 with AVX-512, AVX2 with FMA, and plain Rust; bf16 pairs with AVX-512's
//! `vdpbf16ps`.
//!
//! One row of A is broadcast value by value against one or two vectors of B; up to 12 rows are held in registers, 6 with
//! AVX2, whose 16 registers hold 12 sums, two vectors of B and one value of A.

use super::Block;
use crate::cpu::Level;

/// # Safety
/// As [`super::Engine::block`], and the machine has `level`.
#[inline]
pub(super) unsafe fn block(level: Level, block: Block) {
    // SAFETY: the caller's promise.
    unsafe {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => x86::rows::<12>(block, x86::dot),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => x86::rows::<12>(block, x86::avx512),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => x86::rows::<6>(block, x86::avx2),
            _ => portable(block),
        }
    }
}

/// # Safety
/// As [`super::Engine::block`].
unsafe fn portable(block: Block) {
    const WIDE: usize = 16;
    let Block { rows, lanes, words, a, lda, b, ldb, c, ldc, add } = block;
    for lane in (0..lanes).step_by(WIDE) {
        for row in 0..rows {
            // SAFETY: rows, words and lanes lie in the operands by the caller's promise; words are f32 values.
            unsafe {
                let c = c.add(row * ldc + lane).cast::<[f32; WIDE]>();
                let mut sum = if add { c.read() } else { [0.0; WIDE] };
                for word in 0..words {
                    let x = f32::from_bits(*a.add(row * lda + word));
                    let y = b.add(word * ldb + lane).cast::<[f32; WIDE]>().read();
                    for i in 0..WIDE {
                        sum[i] += x * y[i];
                    }
                }
                c.write(sum);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Block;

    /// Cuts the rows of a block into pieces of at most `MOST`, as even as they can be.
    ///
    /// # Safety
    /// That of `piece`, which is given rows of the block.
    #[inline(always)]
    pub unsafe fn rows<const MOST: usize>(block: Block, piece: unsafe fn(Block)) {
        let pieces = block.rows.div_ceil(MOST).max(1);
        let mut first = 0;
        for i in 0..pieces {
            let rows = (block.rows - first).div_ceil(pieces - i);
            // SAFETY: rows `first..first + rows` of operands that hold all of them.
            unsafe {
                piece(Block {
                    rows,
                    a: block.a.add(first * block.lda),
                    c: block.c.add(first * block.ldc),
                    ..block
                });
            }
            first += rows;
        }
    }

    /// Calls `$wide` with the block's numbers of rows and of vectors as constants.
    macro_rules! for_rows {
        ($block:ident, $wide:ident: $($n:literal)*) => {
            match ($block.rows, $block.lanes) {
                $(($n, 32) => $wide::<$n, 2>($block), ($n, _) => $wide::<$n, 1>($block),)*
                _ => {}
            }
        };
    }

    /// Defines a block of at most 12 rows over AVX-512 registers: what `$value` makes of a sum, one word of A in all lanes
    /// and a vector of B.
    macro_rules! register_block {
        ($(#[$meta:meta])* $name:ident, $features:literal, |$sum:ident, $x:ident, $y:ident| $value:expr) => {
            $(#[$meta])*
            #[target_feature(enable = $features)]
            pub unsafe fn $name(block: Block) {
                /// # Safety
                /// As [`super::super::Engine::block`] with `M` rows and 16·`V` lanes.
                #[target_feature(enable = $features)]
                unsafe fn wide<const M: usize, const V: usize>(block: Block) {
                    let Block { words, a, lda, b, ldb, c, ldc, add, .. } = block;
                    let mut sums = [[_mm512_setzero_ps(); V]; M];
                    // SAFETY: the caller's promise about A, B and C; loads and stores are unaligned ones. Vectors of
                    // 16 words, of 16 f32 and of 32 bf16 are the same 64 bytes.
                    unsafe {
                        if add {
                            for m in 0..M {
                                for v in 0..V {
                                    sums[m][v] = _mm512_loadu_ps(c.add(m * ldc + 16 * v));
                                }
                            }
                        }
                        for word in 0..words {
                            let mut row = [_mm512_setzero_si512(); V];
                            for v in 0..V {
                                row[v] = _mm512_loadu_si512(b.add(word * ldb + 16 * v).cast());
                            }
                            for m in 0..M {
                                let $x = _mm512_set1_epi32(*a.add(m * lda + word) as i32);
                                for v in 0..V {
                                    let ($sum, $y) = (sums[m][v], row[v]);
                                    sums[m][v] = $value;
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
                // SAFETY: the caller's promise.
                unsafe { for_rows!(block, wide: 1 2 3 4 5 6 7 8 9 10 11 12) }
            }
        };
    }

    register_block!(
        /// f32 words.
        ///
        /// # Safety
        /// As [`super::super::Engine::block`] with at most 12 rows; AVX-512.
        avx512, "avx512f",
        |sum, x, y| _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), sum)
    );

    register_block!(
        /// Pairs of bf16: per lane and word, c += a₁·b₁, then c += a₀·b₀ in f32 (denormals count as zero).
        ///
        /// # Safety
        /// As [`super::super::Engine::block`] with at most 12 rows; AVX-512 with bf16.
        dot, "avx512f,avx512bf16",
        |sum, x, y| _mm512_dpbf16_ps(
            sum,
            std::mem::transmute::<__m512i, __m512bh>(x),
            std::mem::transmute::<__m512i, __m512bh>(y),
        )
    );

    /// # Safety
    /// As [`super::super::Engine::block`] with at most 6 rows; AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(block: Block) {
        for lane in (0..block.lanes).step_by(16) {
            // SAFETY: 16 of the block's lanes, by the caller's promise.
            unsafe {
                let half = Block { b: block.b.add(lane), c: block.c.add(lane), lanes: 16, ..block };
                match block.rows {
                    1 => half_wide::<1>(half),
                    2 => half_wide::<2>(half),
                    3 => half_wide::<3>(half),
                    4 => half_wide::<4>(half),
                    5 => half_wide::<5>(half),
                    6 => half_wide::<6>(half),
                    _ => {}
                }
            }
        }
    }

    /// # Safety
    /// As [`super::super::Engine::block`] with `M` rows and 16 lanes.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn half_wide<const M: usize>(block: Block) {
        let Block { words, a, lda, b, ldb, c, ldc, add, .. } = block;
        let mut sums = [[_mm256_setzero_ps(); 2]; M];
        // SAFETY: the caller's promise about A, B and C; loads and stores are unaligned ones.
        unsafe {
            if add {
                for m in 0..M {
                    for v in 0..2 {
                        sums[m][v] = _mm256_loadu_ps(c.add(m * ldc + 8 * v));
                    }
                }
            }
            for word in 0..words {
                let y = [
                    _mm256_loadu_ps(b.add(word * ldb).cast()),
                    _mm256_loadu_ps(b.add(word * ldb + 8).cast()),
                ];
                for m in 0..M {
                    let x = _mm256_set1_ps(f32::from_bits(*a.add(m * lda + word)));
                    for v in 0..2 {
                        sums[m][v] = _mm256_fmadd_ps(x, y[v], sums[m][v]);
                    }
                }
            }
            for m in 0..M {
                for v in 0..2 {
                    _mm256_storeu_ps(c.add(m * ldc + 8 * v), sums[m][v]);
                }
            }
        }
    }
}
