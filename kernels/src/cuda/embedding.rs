//! [`crate::embedding`] on a device: gathering rows of a table, and adding their gradients to it.
//!
//! Ids are host values: they are checked against the table, then copied to the device. For gradients their places are sorted
//! here, so that each id that came has one owner, which adds its rows in token order.
//!
//! Shapes: table [V, E], ids N, rows [N, E]. Gathered rows are stored as the table is, or one of the two in f32; gradients
//! are f32. Vectors of 16 bytes where E and addresses allow, any E otherwise.
//! Errors: an id that is not in the table; sizes that do not agree; memory of another device. Then nothing has been done.
//! Left out: LoRA beside a table, and rows that learn in place of some of its own.

use cudarc::driver::{DevicePtr, DevicePtrMut, DeviceSlice};

use super::arguments::{GatherArgs, ScatterArgs};
use super::check::{at_most, blocks, fits, here, int, pair, product, rows, values};
use super::device::{Device, config};
use super::stored::Stored;
use crate::error::{KernelError, Result};

const OP: &str = "cuda embedding";
const THREADS: u32 = 256;
/// f32 values of a vector.
const VECTOR: usize = 4;

/// That ids are rows of the table, and that there is a row of `width` values for each.
fn check<W, X>(
    device: &Device,
    table: &impl DeviceSlice<W>,
    width: usize,
    ids: &[u32],
    of_ids: &impl DeviceSlice<X>,
) -> Result<()> {
    let vocab = rows(OP, "the table", table.len(), width)?;
    here(OP, "the table", table, device)?;
    values(OP, "rows", product(OP, "rows", &[ids.len(), width])?, of_ids, device)?;
    match ids.iter().find(|id| **id as usize >= vocab) {
        Some(bad) => Err(KernelError::argument(OP, format!("token id: expected below {vocab}, got {bad}"))),
        None => Ok(()),
    }
}

/// Rows `ids` of a table of rows of `width` values into `out` [N, E].
///
/// # Errors
/// When sizes do not agree, an id is not in the table, there is no kernel for the two storage types, or memory belongs to
/// another device.
pub fn gather<W: Stored, X: Stored>(
    device: &Device,
    table: &impl DevicePtr<W>,
    width: usize,
    ids: &[u32],
    out: &mut impl DevicePtrMut<X>,
) -> Result<()> {
    let (pair, vector) = pair::<W, X>(OP, ["the table", "rows"])?;
    check(device, table, width, ids, out)?;
    if ids.is_empty() {
        return Ok(());
    }
    let on_device = device.upload(ids)?;
    let (table, _table) = table.device_ptr(device.stream());
    let (out, _out) = out.device_ptr_mut(device.stream());
    let (on_device, _ids) = on_device.device_ptr(device.stream());
    let vectors = width.is_multiple_of(vector) && fits::<W>(table, vector) && fits::<X>(out, vector);
    let work = ids.len() * (width / if vectors { vector } else { 1 });
    let arguments = GatherArgs { table, ids: on_device, out, count: ids.len() as i64, width: width as i64 };
    let launch = config([blocks(OP, work, THREADS as usize)?, 1, 1], THREADS, 0);
    // SAFETY: ids are rows of the table, the result has one for each; vectors are used where E and addresses are multiples.
    unsafe { device.launch(&device.kernels.gather[pair][usize::from(vectors)], launch, &arguments)? };
    Ok(())
}

/// Places of tokens by id: ids that came, where the places of each begin and the last one's end, places.
fn by_id(ids: &[u32]) -> Result<[Vec<u32>; 3]> {
    // Places are counted in 32 bits.
    int(OP, "tokens", ids.len())?;
    let mut order: Vec<(u32, u32)> = ids.iter().zip(0..).map(|(id, place)| (*id, place)).collect();
    order.sort_unstable();
    let (mut distinct, mut starts) = (Vec::new(), vec![0]);
    for group in order.chunk_by(|a, b| a.0 == b.0) {
        distinct.push(group[0].0);
        starts.push(starts[starts.len() - 1] + group.len() as u32);
    }
    Ok([distinct, starts, order.into_iter().map(|(_, place)| place).collect()])
}

/// Adds the gradient rows [N, E] of a gather to the table's gradient [V, E], in token order.
///
/// # Errors
/// As [`gather`].
pub fn scatter_add(
    device: &Device,
    rows: &impl DevicePtr<f32>,
    width: usize,
    ids: &[u32],
    table: &mut impl DevicePtrMut<f32>,
) -> Result<()> {
    check(device, table, width, ids, rows)?;
    // Columns are blocks of a grid's second dimension.
    at_most(OP, "the width", width, 65_535 * THREADS as usize)?;
    let [distinct, starts, places] = by_id(ids)?;
    if distinct.is_empty() {
        return Ok(());
    }
    // One copy for all three.
    let [of_starts, of_places] =
        [distinct.len(), distinct.len() + starts.len()].map(|count| 4 * count as u64);
    let lists = device.upload(&[&distinct[..], &starts, &places].concat())?;
    let (rows, _rows) = rows.device_ptr(device.stream());
    let (table, _table) = table.device_ptr_mut(device.stream());
    let (lists, _lists) = lists.device_ptr(device.stream());
    let vectors = width.is_multiple_of(VECTOR) && fits::<f32>(rows, VECTOR) && fits::<f32>(table, VECTOR);
    let arguments = ScatterArgs {
        rows,
        table,
        ids: lists,
        starts: lists + of_starts,
        places: lists + of_places,
        width: width as i64,
    };
    let columns = blocks(OP, width, THREADS as usize * if vectors { VECTOR } else { 1 })?;
    let launch = config([blocks(OP, distinct.len(), 1)?, columns, 1], THREADS, 0);
    // SAFETY: ids are rows of the table and differ, starts and places are theirs, and there is a row for each place; vectors
    // are used where E and addresses are multiples of them.
    unsafe { device.launch(&device.kernels.scatter[usize::from(vectors)], launch, &arguments)? };
    Ok(())
}
