//! Bringing operands into the layouts that [`super`] describes: A-form (depth across) and B-form (depth down).
//!
//! Each form is a copy where the operand's depth lies the same way, and a transposition by small blocks where it does
//! not; both convert the storage type to words on the way. Values past the depth become zero.

use super::Engine;
use crate::cpu::multiversion;
use crate::gemm::Mat;
use crate::store::Store;

/// Rows or lanes of a transposed block.
const SIDE: usize = 16;
/// Words of a transposed block.
const LONG: usize = 64;

/// A-form of `mat` [rows, depth]: `out[row·ld + word]`, `ld` at least `engine.words(depth)`.
pub(crate) fn a_form<S: Store>(engine: Engine, mat: Mat<'_, S>, out: &mut [u32], ld: usize) {
    let (rows, depth, words) = (mat.rows(), mat.cols(), engine.words(mat.cols()));
    debug_assert!(ld >= words);
    if mat.col_stride == 1 {
        for row in 0..rows {
            along(engine, mat.row(row), &mut out[row * ld..][..words]);
        }
        return;
    }
    // The transpose of B-form blocks of the transposed operand.
    let mut block = [0u32; SIDE * LONG];
    for first in (0..rows).step_by(SIDE) {
        let count = SIDE.min(rows - first);
        for start in (0..words).step_by(LONG) {
            let long = LONG.min(words - start);
            for word in 0..long {
                across(engine, mat.t(), depth, start + word, first, &mut block[word * SIDE..][..count]);
            }
            for row in 0..count {
                let out = &mut out[(first + row) * ld + start..][..long];
                for (word, out) in out.iter_mut().enumerate() {
                    *out = block[word * SIDE + row];
                }
            }
        }
    }
}

/// B-form of `mat` [depth, lanes]: `out[word·ld + lane]` for lanes below `width`, zero past the operand's.
pub(crate) fn b_form<S: Store>(engine: Engine, mat: Mat<'_, S>, out: &mut [u32], ld: usize, width: usize) {
    let (depth, lanes, words) = (mat.rows(), mat.cols(), engine.words(mat.rows()));
    debug_assert!(ld >= width && width >= lanes);
    if mat.row_stride != 1 || mat.col_stride == 1 {
        for word in 0..words {
            let (filled, rest) = out[word * ld..][..width].split_at_mut(lanes);
            across(engine, mat, depth, word, 0, filled);
            rest.fill(0);
        }
        return;
    }
    let columns = mat.t();
    let mut block = [0u32; SIDE * LONG];
    for first in (0..width).step_by(SIDE) {
        let count = SIDE.min(width - first);
        for start in (0..words).step_by(LONG) {
            let long = LONG.min(words - start);
            for lane in 0..count {
                let block = &mut block[lane * LONG..][..long];
                match first + lane < lanes {
                    true => along(engine, tail(columns.row(first + lane), start * engine.values()), block),
                    false => block.fill(0),
                }
            }
            for word in 0..long {
                let out = &mut out[(start + word) * ld + first..][..count];
                for (lane, out) in out.iter_mut().enumerate() {
                    *out = block[lane * LONG + word];
                }
            }
        }
    }
}

fn tail<S>(values: &[S], from: usize) -> &[S] {
    &values[from.min(values.len())..]
}

/// Words of values that lie side by side, zero past their end.
fn along<S: Store>(engine: Engine, values: &[S], out: &mut [u32]) {
    match engine {
        Engine::F32(_) => {
            let n = values.len().min(out.len());
            copy_values(&values[..n], &mut out[..n]);
            out[n..].fill(0);
        }
        Engine::Pairs(_) => {
            let whole = (values.len() / 2).min(out.len());
            pairs_along(&values[..2 * whole], &mut out[..whole]);
            let rest = &mut out[whole..];
            rest.fill(0);
            if let (Some(word), Some(last)) = (rest.first_mut(), values.get(2 * whole)) {
                *word = u32::from(last.bits());
            }
        }
    }
}

/// Word `word` of lanes `first..first + out.len()` of an operand [depth, lanes].
fn across<S: Store>(
    engine: Engine,
    mat: Mat<'_, S>,
    depth: usize,
    word: usize,
    first: usize,
    out: &mut [u32],
) {
    let n = out.len();
    if mat.col_stride != 1 {
        let bits = |at: usize, lane: usize| match at < depth {
            true => mat.at(at, first + lane),
            false => S::default(),
        };
        for (lane, out) in out.iter_mut().enumerate() {
            *out = match engine {
                Engine::F32(_) => bits(word, lane).get().to_bits(),
                Engine::Pairs(_) => {
                    u32::from(bits(2 * word, lane).bits()) | u32::from(bits(2 * word + 1, lane).bits()) << 16
                }
            };
        }
        return;
    }
    let row = |at: usize| &mat.row(at)[first..first + n];
    match engine {
        Engine::F32(_) if word < depth => copy_values(row(word), out),
        Engine::Pairs(_) if 2 * word + 1 < depth => pairs_across(row(2 * word), row(2 * word + 1), out),
        Engine::Pairs(_) if 2 * word < depth => {
            for (out, x) in out.iter_mut().zip(row(2 * word)) {
                *out = u32::from(x.bits());
            }
        }
        _ => out.fill(0),
    }
}

multiversion! {
    fn copy_values<S: Store>(values: &[S], out: &mut [u32]) {
        for (out, x) in out.iter_mut().zip(values) {
            *out = x.get().to_bits();
        }
    }
}

/// Pairs of values that lie side by side; two values for each word.
fn pairs_along<S: Store>(values: &[S], out: &mut [u32]) {
    #[cfg(target_arch = "x86_64")]
    if let (Some(values), true) = (S::as_f32(values), crate::cpu::best() >= crate::cpu::Level::Avx512Bf16) {
        // SAFETY: the machine has AVX-512 with bf16.
        return unsafe { convert::along(values, out) };
    }
    round_along(values, out);
}

/// Pairs of values of two rows.
fn pairs_across<S: Store>(first: &[S], second: &[S], out: &mut [u32]) {
    #[cfg(target_arch = "x86_64")]
    if let (Some(first), Some(second), true) =
        (S::as_f32(first), S::as_f32(second), crate::cpu::best() >= crate::cpu::Level::Avx512Bf16)
    {
        // SAFETY: the machine has AVX-512 with bf16.
        return unsafe { convert::across(first, second, out) };
    }
    round_across(first, second, out);
}

multiversion! {
    fn round_along<S: Store>(values: &[S], out: &mut [u32]) {
        for (out, x) in out.iter_mut().zip(values.chunks_exact(2)) {
            *out = u32::from(x[0].bits()) | u32::from(x[1].bits()) << 16;
        }
    }
}

multiversion! {
    fn round_across<S: Store>(first: &[S], second: &[S], out: &mut [u32]) {
        for ((out, x), y) in out.iter_mut().zip(first).zip(second) {
            *out = u32::from(x.bits()) | u32::from(y.bits()) << 16;
        }
    }
}

/// The same with the processor's own conversion, which also takes denormals for zero, as its products do.
#[cfg(target_arch = "x86_64")]
mod convert {
    use std::arch::x86_64::*;

    use super::{round_across, round_along};

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn along(values: &[f32], out: &mut [u32]) {
        let whole = out.len().min(values.len() / 2) / 16 * 16;
        for (out, x) in out[..whole].chunks_exact_mut(16).zip(values.chunks_exact(32)) {
            // SAFETY: 32 values are read and 16 words written, all inside the two chunks; a vector of 32 bf16 and one
            // of 16 words are the same 64 bytes.
            unsafe {
                let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16)));
                let pairs = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(out.as_mut_ptr().cast(), pairs);
            }
        }
        round_along(&values[2 * whole..], &mut out[whole..]);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn across(first: &[f32], second: &[f32], out: &mut [u32]) {
        let mut interleave = [0u16; 32];
        for (i, at) in interleave.iter_mut().enumerate() {
            *at = (i / 2 + 16 * (i % 2)) as u16;
        }
        let whole = out.len().min(first.len()).min(second.len()) / 16 * 16;
        // SAFETY: 16 values are read and 16 words written, all inside the chunks; vectors of 32 bf16, of 32 places and
        // of 16 words are the same 64 bytes.
        unsafe {
            let interleave = _mm512_loadu_si512(interleave.as_ptr().cast());
            for ((out, x), y) in
                out[..whole].chunks_exact_mut(16).zip(first.chunks_exact(16)).zip(second.chunks_exact(16))
            {
                let (x, y) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(y.as_ptr()));
                let halves = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(y, x));
                let pairs = _mm512_permutexvar_epi16(interleave, halves);
                _mm512_storeu_si512(out.as_mut_ptr().cast(), pairs);
            }
        }
        round_across(&first[whole..], &second[whole..], &mut out[whole..]);
    }
}
