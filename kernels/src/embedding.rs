//! Token embeddings: gathering rows, and adding their gradients back.
//!
//! The gradient of a gather is written straight into a buffer of the table's shape, so that tied embeddings and
//! several micro-batches share one. Rows are added in token order, on one thread: the work is a memory copy.
//!
//! Shapes: table [V, E], ids N, rows [N, E].

use candle_core::Tensor;
use rayon::prelude::*;

use crate::cpu::{tensor, with_values};
use crate::error::{KernelError, Result};

const OP: &str = "embedding";

fn check(ids: &[u32], vocab: usize) -> Result<()> {
    match ids.iter().find(|id| **id as usize >= vocab) {
        Some(bad) => Err(KernelError::argument(OP, format!("token id: expected below {vocab}, got {bad}"))),
        None => Ok(()),
    }
}

/// Rows `ids` of the table, outside any graph: its gradient is [`scatter_add`]'s job.
///
/// # Errors
/// When an id is not in the table.
pub fn gather(table_ve: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let (vocab, width) = table_ve.dims2()?;
    check(ids, vocab)?;
    let rows = with_values(OP, table_ve, |table| {
        let mut rows = vec![0f32; ids.len() * width];
        rows.par_chunks_mut(width.max(1)).zip(ids).for_each(|(row, id)| {
            row.copy_from_slice(&table[*id as usize * width..][..width]);
        });
        rows
    })?;
    tensor(rows, (ids.len(), width))
}

/// Adds the gradient rows [N, E] of a gather to the table's gradient buffer [V, E].
///
/// # Errors
/// When sizes do not agree or an id is not in the table.
pub fn scatter_add(rows_ne: &Tensor, ids: &[u32], table: &mut [f32]) -> Result<()> {
    let (n, width) = rows_ne.dims2()?;
    if n != ids.len() || width == 0 || !table.len().is_multiple_of(width) {
        return Err(KernelError::shape(
            OP,
            format!("{} gradient rows and a table of rows of {width}", ids.len()),
            format!("{n} rows and {} values", table.len()),
        ));
    }
    check(ids, table.len() / width)?;
    with_values(OP, rows_ne, |rows| {
        for (row, id) in rows.chunks_exact(width).zip(ids) {
            for (sum, value) in table[*id as usize * width..][..width].iter_mut().zip(row) {
                *sum += value;
            }
        }
    })
}
