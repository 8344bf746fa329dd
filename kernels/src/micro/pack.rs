//! Bringing operands into the layouts that [`super`] describes: A-form (depth across) and B-form (depth down).
//!
//! Each form is a copy where the operand's depth lies the same way, and a transposition by blocks of 16 × 16 words where it
//! does not; both convert the storage type to words on the way. Values past the depth become zero.

use super::Engine;
use super::words::{across, along, transpose};
use crate::gemm::Mat;
use crate::store::Store;

/// Rows, lanes and words of a transposed block.
const SIDE: usize = 16;

/// A-form of `mat` [rows, depth]: `out[row·ld + word]`, `ld` at least `engine.words(depth)`.
pub(crate) fn a_form<S: Store>(engine: Engine, mat: Mat<'_, S>, out: &mut [u32], ld: usize) {
    let (rows, depth, words) = (mat.rows(), mat.cols(), engine.words(mat.cols()));
    debug_assert!(ld >= words);
    if mat.col_stride == 1 {
        return along(engine, mat, out, ld, words);
    }
    // The transpose of B-form blocks of the transposed operand.
    let across_mat = mat.t();
    let mut block = [0u32; SIDE * SIDE];
    for first in (0..rows).step_by(SIDE) {
        let count = SIDE.min(rows - first);
        for start in (0..words).step_by(SIDE) {
            let long = SIDE.min(words - start);
            let out = &mut out[first * ld + start..];
            if let Some(source) = plain(engine, across_mat, start..start + long, first..first + count) {
                transpose(source, across_mat.row_stride, out, ld, long, count);
                continue;
            }
            let values = start * engine.values()..depth.min((start + long) * engine.values());
            let part = across_mat
                .part(values.start.min(depth)..values.end.max(values.start.min(depth)), first..first + count);
            across(engine, part, &mut block, SIDE, long, count);
            transpose(&block, SIDE, out, ld, long, count);
        }
    }
}

/// B-form of `mat` [depth, lanes]: `out[word·ld + lane]` for lanes below `width`, zero past the operand's.
pub(crate) fn b_form<S: Store>(engine: Engine, mat: Mat<'_, S>, out: &mut [u32], ld: usize, width: usize) {
    let (depth, lanes, words) = (mat.rows(), mat.cols(), engine.words(mat.rows()));
    debug_assert!(ld >= width && width >= lanes);
    if mat.row_stride != 1 || mat.col_stride == 1 {
        return across(engine, mat, out, ld, words, width);
    }
    let columns = mat.t();
    let mut block = [0u32; SIDE * SIDE];
    for first in (0..width).step_by(SIDE) {
        let (count, filled) = (SIDE.min(width - first), SIDE.min(lanes.saturating_sub(first)));
        for start in (0..words).step_by(SIDE) {
            let long = SIDE.min(words - start);
            let out = &mut out[start * ld + first..];
            if filled == count
                && let Some(source) = plain(engine, columns, first..first + count, start..start + long)
            {
                transpose(source, columns.row_stride, out, ld, count, long);
                continue;
            }
            block.fill(0);
            let begin = (start * engine.values()).min(depth);
            let end = depth.min((start + long) * engine.values());
            let part = columns.part(first.min(lanes)..first.min(lanes) + filled, begin..end);
            along(engine, part, &mut block, SIDE, long);
            transpose(&block, SIDE, out, ld, count, long);
        }
    }
}

/// Part of an operand that is its own words: f32 rows that lie side by side, with nothing to pad.
fn plain<'a, S: Store>(
    engine: Engine,
    mat: Mat<'a, S>,
    rows: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
) -> Option<&'a [u32]> {
    if !matches!(engine, Engine::F32(_))
        || mat.col_stride != 1
        || rows.end > mat.rows()
        || cols.end > mat.cols()
    {
        return None;
    }
    S::as_f32(mat.part(rows, cols).values()).map(super::bits)
}
