//! Rows of values into rows of words, and blocks of words transposed.
//!
//! Every function is compiled for the instruction sets of [`crate::cpu`] as a whole loop over rows, so that a short row
//! does not pay for a choice of its own. Where the processor has bf16 instructions it converts with them; they take
//! denormals for zero, as its products do.

use super::Engine;
use crate::cpu::{Level, multiversion, vectors};
use crate::gemm::Mat;
use crate::store::{Store, bf16};

/// Words along the rows of `mat`, whose values lie side by side: `out[row·ld + word]`, zero from the end of the row to
/// `words`.
pub(super) fn along<S: Store>(engine: Engine, mat: Mat<'_, S>, out: &mut [u32], ld: usize, words: usize) {
    if mat.rows() == 0 || words == 0 {
        return;
    }
    assert!(mat.cols() == 0 || mat.col_stride == 1, "values lie side by side");
    assert!((mat.rows() - 1) * ld + words <= out.len(), "the output holds its rows");
    match engine {
        Engine::F32(_) => copy_rows(mat, out, ld, words),
        Engine::Pairs(_) => {
            #[cfg(target_arch = "x86_64")]
            if let (Some(values), true) = (S::as_f32(mat.values()), converts()) {
                // SAFETY: the machine has AVX-512 with bf16.
                return unsafe { convert::along(mat.over(values), out, ld, words) };
            }
            #[cfg(target_endian = "little")]
            if let Some(values) = S::as_bf16(mat.values()) {
                return copy_pairs(mat.over(values), out, ld, words);
            }
            pairs_along(mat, out, ld, words);
        }
    }
}

/// Words down the columns of `mat` [depth, lanes]: `out[word·ld + lane]` for `words` words and `width` lanes, zero past
/// the operand's.
pub(super) fn across<S: Store>(
    engine: Engine,
    mat: Mat<'_, S>,
    out: &mut [u32],
    ld: usize,
    words: usize,
    width: usize,
) {
    if words == 0 || width == 0 {
        return;
    }
    assert!(mat.cols() <= width && (words - 1) * ld + width <= out.len(), "the output holds its words");
    if mat.cols() > 0 && mat.col_stride != 1 {
        return gather(engine, mat, out, ld, words, width);
    }
    match engine {
        Engine::F32(_) => {
            let rows = mat.rows().min(words);
            copy_rows(mat.part(0..rows, 0..mat.cols()), out, ld, width);
            (rows..words).for_each(|word| out[word * ld..][..width].fill(0));
        }
        Engine::Pairs(_) => {
            #[cfg(target_arch = "x86_64")]
            if let (Some(values), true) = (S::as_f32(mat.values()), converts()) {
                // SAFETY: the machine has AVX-512 with bf16.
                return unsafe { convert::across(mat.over(values), out, ld, words, width) };
            }
            pairs_across(mat, out, ld, words, width);
        }
    }
}

/// An operand whose values lie apart both ways.
fn gather<S: Store>(engine: Engine, mat: Mat<'_, S>, out: &mut [u32], ld: usize, words: usize, width: usize) {
    let value = |row: usize, lane: usize| match row < mat.rows() && lane < mat.cols() {
        true => mat.at(row, lane),
        false => S::default(),
    };
    for word in 0..words {
        for (lane, out) in out[word * ld..][..width].iter_mut().enumerate() {
            *out = match engine {
                Engine::F32(_) => value(word, lane).get().to_bits(),
                Engine::Pairs(_) => pair(value(2 * word, lane), value(2 * word + 1, lane)),
            };
        }
    }
}

/// Two values in one word, the first in the low half.
#[inline(always)]
fn pair<S: Store>(first: S, second: S) -> u32 {
    u32::from(first.bits()) | u32::from(second.bits()) << 16
}

#[cfg(target_arch = "x86_64")]
fn converts() -> bool {
    crate::cpu::best() >= Level::Avx512Bf16 && vectors() == Level::Avx512
}

multiversion! {
    fn copy_rows<S: Store>(mat: Mat<'_, S>, out: &mut [u32], ld: usize, words: usize) {
        for row in 0..mat.rows() {
            let out = &mut out[row * ld..][..words];
            let values = mat.row(row);
            let (values, out) = (&values[..values.len().min(words)], out);
            let (filled, rest) = out.split_at_mut(values.len());
            for (out, x) in filled.iter_mut().zip(values) {
                *out = x.get().to_bits();
            }
            rest.fill(0);
        }
    }
}

/// Rows of bf16 are their own words.
#[cfg(target_endian = "little")]
fn copy_pairs(mat: Mat<'_, bf16>, out: &mut [u32], ld: usize, words: usize) {
    for row in 0..mat.rows() {
        let values = mat.row(row);
        let values = &values[..values.len().min(2 * words)];
        let out = &mut out[row * ld..][..words];
        let (filled, rest) = out.split_at_mut(values.len().div_ceil(2));
        if let ([.., last], [_]) = (&mut *filled, values.chunks_exact(2).remainder()) {
            *last = 0;
        }
        let bytes: &[u8] = bytemuck::cast_slice(values);
        bytemuck::cast_slice_mut::<u32, u8>(filled)[..bytes.len()].copy_from_slice(bytes);
        rest.fill(0);
    }
}

multiversion! {
    fn pairs_along<S: Store>(mat: Mat<'_, S>, out: &mut [u32], ld: usize, words: usize) {
        for row in 0..mat.rows() {
            let values = mat.row(row);
            let (filled, rest) = out[row * ld..][..words].split_at_mut((values.len() / 2).min(words));
            let mut halves = values.chunks_exact(2);
            for (out, x) in filled.iter_mut().zip(&mut halves) {
                *out = pair(x[0], x[1]);
            }
            rest.fill(0);
            if let (Some(word), [last]) = (rest.first_mut(), halves.remainder()) {
                *word = pair(*last, S::default());
            }
        }
    }
}

multiversion! {
    fn pairs_across<S: Store>(mat: Mat<'_, S>, out: &mut [u32], ld: usize, words: usize, width: usize) {
        for word in 0..words {
            let (filled, rest) = out[word * ld..][..width].split_at_mut(mat.cols());
            rest.fill(0);
            match mat.rows().saturating_sub(2 * word) {
                0 => filled.fill(0),
                1 => {
                    for (out, x) in filled.iter_mut().zip(mat.row(2 * word)) {
                        *out = pair(*x, S::default());
                    }
                }
                _ => {
                    for ((out, x), y) in filled.iter_mut().zip(mat.row(2 * word)).zip(mat.row(2 * word + 1)) {
                        *out = pair(*x, *y);
                    }
                }
            }
        }
    }
}

/// `out[col·ldo + row] = from[row·ldf + col]` for a block of `rows` × `cols` words, at most 16 each.
pub(crate) fn transpose(from: &[u32], ldf: usize, out: &mut [u32], ldo: usize, rows: usize, cols: usize) {
    if rows == 0 || cols == 0 {
        return;
    }
    assert!(rows <= 16 && cols <= 16, "one block");
    assert!((rows - 1) * ldf + cols <= from.len(), "the block lies in its source");
    assert!((cols - 1) * ldo + rows <= out.len(), "the block lies in its output");
    #[cfg(target_arch = "x86_64")]
    if rows == 16 && cols == 16 && vectors() == Level::Avx512 {
        // SAFETY: the machine has AVX-512; 16 rows of 16 words lie in both operands.
        return unsafe { convert::transpose(from.as_ptr(), ldf, out.as_mut_ptr(), ldo) };
    }
    for col in 0..cols {
        for row in 0..rows {
            out[col * ldo + row] = from[row * ldf + col];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod convert {
    use std::arch::x86_64::*;

    use super::pair;
    use crate::gemm::Mat;

    /// Values by which rows are asked for ahead of their use: rows packed together are too many for the processor's own
    /// prefetching.
    const AHEAD: usize = 128;
    /// The same down the rows of an operand, a stride apart.
    const ROWS_AHEAD: usize = 24;

    /// 32 values as 16 words.
    ///
    /// # Safety
    /// 32 values are readable.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    #[inline]
    unsafe fn round(low: *const f32, high: *const f32) -> __m512i {
        // SAFETY: the caller's promise; a vector of 32 bf16 and one of 16 words are the same 64 bytes.
        unsafe {
            let (low, high) = (_mm512_loadu_ps(low), _mm512_loadu_ps(high));
            std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn along(mat: Mat<'_, f32>, out: &mut [u32], ld: usize, words: usize) {
        for row in 0..mat.rows() {
            let values = mat.row(row);
            let out = &mut out[row * ld..][..words];
            let whole = (values.len() / 32 * 16).min(words / 16 * 16);
            for word in (0..whole).step_by(16) {
                // SAFETY: 2·word + 32 ≤ 2·whole values and word + 16 ≤ whole words, inside both rows. A prefetch reads
                // nothing, wherever it points.
                unsafe {
                    let x = values.as_ptr().add(2 * word);
                    _mm_prefetch::<_MM_HINT_T0>(x.wrapping_add(AHEAD).cast());
                    _mm_prefetch::<_MM_HINT_T0>(x.wrapping_add(AHEAD + 16).cast());
                    _mm512_storeu_si512(out.as_mut_ptr().add(word).cast(), round(x, x.add(16)));
                }
            }
            for (word, out) in out.iter_mut().enumerate().skip(whole) {
                let value = |at: usize| values.get(at).copied().unwrap_or(0.0);
                *out = pair(value(2 * word), value(2 * word + 1));
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn across(mat: Mat<'_, f32>, out: &mut [u32], ld: usize, words: usize, width: usize) {
        let mut places = [0u16; 32];
        for (i, at) in places.iter_mut().enumerate() {
            *at = (i / 2 + 16 * (i % 2)) as u16;
        }
        // SAFETY: 64 bytes are read.
        let places = unsafe { _mm512_loadu_si512(places.as_ptr().cast()) };
        for word in 0..words {
            let row = |at: usize| if at < mat.rows() { mat.row(at) } else { &[] };
            let (first, second) = (row(2 * word), row(2 * word + 1));
            let out = &mut out[word * ld..][..width];
            let whole = first.len().min(second.len()) / 16 * 16;
            let ahead = ROWS_AHEAD * mat.row_stride;
            for lane in (0..whole).step_by(16) {
                _mm_prefetch::<_MM_HINT_T0>(first.as_ptr().wrapping_add(ahead + lane).cast());
                _mm_prefetch::<_MM_HINT_T0>(second.as_ptr().wrapping_add(ahead + lane).cast());
                // SAFETY: lane + 16 ≤ whole, inside both rows and, as width is at least mat.cols(), inside the output.
                unsafe {
                    let halves = round(first.as_ptr().add(lane), second.as_ptr().add(lane));
                    let pairs = _mm512_permutexvar_epi16(places, halves);
                    _mm512_storeu_si512(out.as_mut_ptr().add(lane).cast(), pairs);
                }
            }
            for (lane, out) in out.iter_mut().enumerate().skip(whole) {
                let value = |of: &[f32]| of.get(lane).copied().unwrap_or(0.0);
                *out = pair(value(first), value(second));
            }
        }
    }

    /// # Safety
    /// 16 rows of 16 words are readable at `from` and writable at `out`, `ldf` and `ldo` words apart.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn transpose(from: *const u32, ldf: usize, out: *mut u32, ldo: usize) {
        // Pairs of words, then of doubles, then of quarters: log2(16) rounds.
        let mut r = [_mm512_setzero_si512(); 16];
        let mut t = [_mm512_setzero_si512(); 16];
        // SAFETY: the caller's promise.
        unsafe {
            for i in 0..16 {
                r[i] = _mm512_loadu_si512(from.add(i * ldf).cast());
            }
        }
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..4 {
            r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        // Now r[4·i + c] holds, in quarter q, column 4·q + c of rows 4·i to 4·i + 3.
        for c in 0..4 {
            t[c] = _mm512_shuffle_i32x4::<0x88>(r[c], r[4 + c]);
            t[4 + c] = _mm512_shuffle_i32x4::<0xdd>(r[c], r[4 + c]);
            t[8 + c] = _mm512_shuffle_i32x4::<0x88>(r[8 + c], r[12 + c]);
            t[12 + c] = _mm512_shuffle_i32x4::<0xdd>(r[8 + c], r[12 + c]);
        }
        // SAFETY: the caller's promise.
        unsafe {
            for c in 0..4 {
                let store = |col: usize, x| _mm512_storeu_si512(out.add(col * ldo).cast(), x);
                store(c, _mm512_shuffle_i32x4::<0x88>(t[c], t[8 + c]));
                store(8 + c, _mm512_shuffle_i32x4::<0xdd>(t[c], t[8 + c]));
                store(4 + c, _mm512_shuffle_i32x4::<0x88>(t[4 + c], t[12 + c]));
                store(12 + c, _mm512_shuffle_i32x4::<0xdd>(t[4 + c], t[12 + c]));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::transpose;

    #[test]
    fn blocks_of_every_size_are_transposed() {
        let from: Vec<u32> = (0..16 * 20).collect();
        for (rows, cols) in (1..=16).flat_map(|rows| (1..=16).map(move |cols| (rows, cols))) {
            let mut out = vec![u32::MAX; 16 * 18];
            transpose(&from, 20, &mut out, 18, rows, cols);
            for (at, x) in out.iter().enumerate() {
                let (col, row) = (at / 18, at % 18);
                let want = if col < cols && row < rows { (row * 20 + col) as u32 } else { u32::MAX };
                assert_eq!(*x, want, "{rows} x {cols}: column {col}, row {row}");
            }
        }
    }
}
