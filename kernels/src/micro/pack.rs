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

multiversion! {
    /// Two values each.
    fn pairs_along<S: Store>(values: &[S], out: &mut [u32]) {
        for (out, x) in out.iter_mut().zip(values.chunks_exact(2)) {
            *out = u32::from(x[0].bits()) | u32::from(x[1].bits()) << 16;
        }
    }
}

multiversion! {
    pub(crate) fn pairs_across<S: Store>(first: &[S], second: &[S], out: &mut [u32]) {
        for ((out, x), y) in out.iter_mut().zip(first).zip(second) {
            *out = u32::from(x.bits()) | u32::from(y.bits()) << 16;
        }
    }
}
