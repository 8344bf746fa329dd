//! Token embeddings: gathering rows, and their gradients.
//!
//! The gradient of a gather comes in two forms. [`scatter_add`] adds it to a buffer of the table's shape, which tied
//! embeddings share with the output head. [`SparseRows`] keeps only the rows that were touched: for a table that is
//! learned but not the head, a few thousand rows instead of the vocabulary. Either way a row's gradients are added in
//! token order, so that the bytes do not depend on threads.
//!
//! A frozen table may carry LoRA ([`LoraTable`]: Hu et al. 2021, a row is E_t + s·B·A_t), or rows that learn by themselves in
//! place of some of its own ([`gather_rows_into`]).
//!
//! Shapes: table [V, E], ids N, rows [N, E]; A [r, V], B [E, r].
//! Errors: an id that is not in the table; sizes that do not agree.

mod adapted;

use std::ops::Range;

use candle_core::Tensor;
use rayon::prelude::*;

pub use self::adapted::{HELD, LoraTable, gather_rows_into, scatter_rows};
use crate::cpu::{rows_per_task, tensor, with_values};
use crate::error::{KernelError, Result};
use crate::linear::Weight;
use crate::math::{add_row, convert};
use crate::store::Store;

const OP: &str = "embedding";

fn check(ids: &[u32], vocab: usize) -> Result<()> {
    match ids.iter().find(|id| **id as usize >= vocab) {
        Some(bad) => Err(KernelError::argument(OP, format!("token id: expected below {vocab}, got {bad}"))),
        None => Ok(()),
    }
}

/// Rows of `width` values in a buffer of `len`.
fn rows_of(len: usize, width: usize) -> Result<usize> {
    if width == 0 || !len.is_multiple_of(width) {
        return Err(KernelError::shape(OP, format!("whole rows of {width} values"), format!("{len} values")));
    }
    Ok(len / width)
}

fn check_rows(rows: usize, ids: &[u32], width: usize) -> Result<()> {
    if rows != ids.len() * width {
        let expected = format!("{} rows of {width} values, one for each id", ids.len());
        return Err(KernelError::shape(OP, expected, format!("{rows} values")));
    }
    Ok(())
}

/// Rows `ids` of a table of rows of `width` values into `out` [N, E].
///
/// # Errors
/// When sizes do not agree or an id is not in the table.
pub fn gather_into<X: Store>(table: Weight, width: usize, ids: &[u32], out: &mut [X]) -> Result<()> {
    check_rows(out.len(), ids, width)?;
    check(ids, rows_of(table.len(), width)?)?;
    let row = |id: u32| id as usize * width..(id as usize + 1) * width;
    out.par_chunks_mut(width).zip(ids).with_min_len(rows_per_task(width)).for_each(|(out, id)| match table {
        Weight::F32(table) => convert(&table[row(*id)], out),
        Weight::Bf16(table) => convert(&table[row(*id)], out),
    });
    Ok(())
}

/// Rows `ids` of the table, outside any graph: its gradient is [`scatter_add`]'s job.
///
/// # Errors
/// When an id is not in the table, or the table is not f32.
pub fn gather(table_ve: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let (_, width) = table_ve.dims2()?;
    let mut rows = vec![0f32; ids.len() * width];
    with_values(OP, table_ve, |table| gather_into(Weight::F32(table), width, ids, &mut rows))??;
    tensor(rows, (ids.len(), width))
}

/// Places of tokens, sorted by id and then by place.
fn by_id(ids: &[u32]) -> Vec<(u32, u32)> {
    let mut order: Vec<(u32, u32)> = ids.iter().enumerate().map(|(place, id)| (*id, place as u32)).collect();
    order.sort_unstable();
    order
}

/// The part of a list sorted by id whose ids lie in `ids`.
fn part<T>(sorted: &[T], id: impl Fn(&T) -> usize, ids: Range<usize>) -> Range<usize> {
    sorted.partition_point(|e| id(e) < ids.start)..sorted.partition_point(|e| id(e) < ids.end)
}

/// Adds the gradient rows [N, E] of a gather to the table's gradient buffer [V, E], in token order.
///
/// # Errors
/// When sizes do not agree or an id is not in the table; then nothing has been added.
pub fn scatter_add(rows: &[f32], width: usize, ids: &[u32], table: &mut [f32]) -> Result<()> {
    check_rows(rows.len(), ids, width)?;
    check(ids, rows_of(table.len(), width)?)?;
    let order = by_id(ids);
    let block = rows_per_task(width);
    table.par_chunks_mut(block * width).enumerate().for_each(|(task, table)| {
        let first = task * block;
        let own = part(&order, |(id, _)| *id as usize, first..first + table.len() / width);
        for (id, place) in &order[own] {
            let row = &rows[*place as usize * width..][..width];
            add_row(&mut table[(*id as usize - first) * width..][..width], row);
        }
    });
    Ok(())
}

/// The gradient of an embedding table, only the rows that were touched: ids ascending, each once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SparseRows {
    width: usize,
    ids: Vec<u32>,
    values: Vec<f32>,
}

impl SparseRows {
    /// No rows of `width` values.
    pub fn new(width: usize) -> Self {
        Self { width, ids: Vec::new(), values: Vec::new() }
    }

    /// E.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows that were touched, ascending.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Their gradients, [ids, E].
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The gradients of the rows `ids` of the table, with the first of them: those that were touched.
    pub(crate) fn within(&self, ids: Range<usize>) -> (&[u32], &[f32]) {
        let own = part(&self.ids, |id| *id as usize, ids);
        (&self.ids[own.clone()], &self.values[own.start * self.width..own.end * self.width])
    }

    /// Forgets every row, keeping the memory.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.values.clear();
    }

    /// Adds the gradient rows [N, E] of a gather of `ids`.
    ///
    /// # Errors
    /// When there is not one row for each id; then nothing has been added.
    pub fn add(&mut self, ids: &[u32], rows: &[f32]) -> Result<()> {
        check_rows(rows.len(), ids, self.width)?;
        let order = by_id(ids);
        let groups: Vec<&[(u32, u32)]> = order.chunk_by(|a, b| a.0 == b.0).collect();
        let mut merged: Vec<u32> = self.ids.iter().copied().chain(groups.iter().map(|g| g[0].0)).collect();
        merged.sort_unstable();
        merged.dedup();
        let mut values = vec![0f32; merged.len() * self.width];
        let width = self.width;
        if width > 0 {
            values.par_chunks_mut(width).zip(&merged).with_min_len(rows_per_task(width)).for_each(
                |(sum, id)| {
                    if let Ok(at) = self.ids.binary_search(id) {
                        sum.copy_from_slice(&self.values[at * width..][..width]);
                    }
                    if let Ok(at) = groups.binary_search_by_key(id, |g| g[0].0) {
                        for (_, place) in groups[at] {
                            add_row(sum, &rows[*place as usize * width..][..width]);
                        }
                    }
                },
            );
        }
        (self.ids, self.values) = (merged, values);
        Ok(())
    }

    /// Adds the rows to a gradient buffer of the table's shape [V, E].
    ///
    /// # Errors
    /// When the buffer is not whole rows or a row is not in it; then nothing has been added.
    pub fn add_to(&self, table: &mut [f32]) -> Result<()> {
        check(&self.ids, rows_of(table.len(), self.width)?)?;
        for (id, row) in self.ids.iter().zip(self.values.chunks_exact(self.width)) {
            add_row(&mut table[*id as usize * self.width..][..self.width], row);
        }
        Ok(())
    }
}
