//! [`crate::rows`] on a device, and values into another storage type.
//!
//! Shapes: x and y of one length, or a bias \[O\] beside y [n, O]; fused heads [N, H, 3, D] (GPT-NeoX) and their three parts
//! [N, H, D]. Storage: y as x, or one of the two in f32; every value is computed in f32 and rounded once. Sums over rows of
//! g [n, O] are f32, made in up to 256 pieces of rows whose partial sums are added in their order.
//!
//! Vectors of 16 bytes where sizes and addresses allow, any length otherwise. Nothing is done for no values.
//! Errors: sizes that do not agree, storage for which there is no kernel, memory of another device.

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceSlice};

use super::arguments::{HeadsArgs, RowsArgs, SumArgs};
use super::check::{blocks, fits, here, int, pair, product, rows, values};
use super::device::{Device, config};
use super::kernels::{Forms, Pairs};
use super::stored::Stored;
use crate::error::Result;

const OP: &str = "cuda rows";
const THREADS: u32 = 256;
/// Pieces of rows at most.
const PIECES: usize = 256;
/// The parts of fused heads.
const PARTS: [&str; 3] = ["queries", "keys", "values"];

/// Values of 16 bytes.
fn vector<T>() -> usize {
    16 / size_of::<T>()
}

/// One of the kernels over `y`, for an `x` of its length or one that repeats; sizes are checked.
fn each<X: Stored, Y: Stored>(
    device: &Device,
    kernels: &Pairs,
    names: [&str; 2],
    x: &impl DevicePtr<X>,
    y: &mut impl DevicePtrMut<Y>,
) -> Result<()> {
    let (pair, vector) = pair::<X, Y>(OP, names)?;
    let (width, count) = (x.len(), y.len());
    if count == 0 {
        return Ok(());
    }
    let (x, _x) = x.device_ptr(device.stream());
    let (y, _y) = y.device_ptr_mut(device.stream());
    let vectors =
        (width == count || width.is_multiple_of(vector)) && fits::<X>(x, vector) && fits::<Y>(y, vector);
    let arguments = RowsArgs { x, y, count: count as i64, width: width as i64, factor: 1.0 };
    let grid = blocks(OP, count, THREADS as usize * if vectors { vector } else { 1 })?;
    let function = &kernels[pair][usize::from(vectors)];
    // SAFETY: y has `count` values, x as many or `width` that are whole rows of them; vectors are used where addresses are
    // multiples of them, and where rows are if there are several.
    unsafe { device.launch(function, config([grid, 1, 1], THREADS, 0), &arguments)? };
    Ok(())
}

/// `y` = `x` in its own storage type.
///
/// # Errors
/// When sizes do not agree, there is no kernel for the two storage types, or memory belongs to another device.
pub fn convert<A: Stored, B: Stored>(
    device: &Device,
    x: &impl DevicePtr<A>,
    y: &mut impl DevicePtrMut<B>,
) -> Result<()> {
    here(OP, "x", x, device)?;
    values(OP, "y", x.len(), y, device)?;
    each(device, &device.kernels.rows.convert, ["x", "y"], x, y)
}

/// `y` += `x`.
///
/// # Errors
/// As [`convert`].
pub fn add_assign<A: Stored, B: Stored>(
    device: &Device,
    x: &impl DevicePtr<A>,
    y: &mut impl DevicePtrMut<B>,
) -> Result<()> {
    here(OP, "x", x, device)?;
    values(OP, "y", x.len(), y, device)?;
    each(device, &device.kernels.rows.add, ["x", "y"], x, y)
}

/// `x` *= `factor`.
///
/// # Errors
/// When memory belongs to another device.
pub fn scale<T: Stored>(device: &Device, x: &mut impl DevicePtrMut<T>, factor: f32) -> Result<()> {
    here(OP, "x", x, device)?;
    let (count, vector) = (x.len(), vector::<T>());
    if count == 0 {
        return Ok(());
    }
    let (x, _x) = x.device_ptr_mut(device.stream());
    let vectors = fits::<T>(x, vector);
    let arguments = RowsArgs { x, y: x, count: count as i64, width: count as i64, factor };
    let grid = blocks(OP, count, THREADS as usize * if vectors { vector } else { 1 })?;
    let function = &device.kernels.rows.scale[T::KIND as usize][usize::from(vectors)];
    // SAFETY: x has `count` values, each read and written by one thread; vectors are used where its address is a multiple.
    unsafe { device.launch(function, config([grid, 1, 1], THREADS, 0), &arguments)? };
    Ok(())
}

/// Every row of `y` [n, O] = `bias` \[O\].
///
/// # Errors
/// As [`convert`].
pub fn fill<B: Stored, Y: Stored>(
    device: &Device,
    bias: &impl DevicePtr<B>,
    y: &mut impl DevicePtrMut<Y>,
) -> Result<()> {
    beside(device, bias, y)?;
    each(device, &device.kernels.rows.fill, ["the bias", "y"], bias, y)
}

/// Every row of `y` [n, O] += `bias` \[O\].
///
/// # Errors
/// As [`convert`].
pub fn add_bias<B: Stored, Y: Stored>(
    device: &Device,
    bias: &impl DevicePtr<B>,
    y: &mut impl DevicePtrMut<Y>,
) -> Result<()> {
    beside(device, bias, y)?;
    each(device, &device.kernels.rows.add_bias, ["the bias", "y"], bias, y)
}

/// That y is whole rows for a bias.
fn beside<B, Y>(device: &Device, bias: &impl DeviceSlice<B>, y: &impl DeviceSlice<Y>) -> Result<()> {
    rows(OP, "y", y.len(), bias.len())?;
    here(OP, "the bias", bias, device)?;
    here(OP, "y", y, device)
}

/// `sum` \[O\] += Σ of the rows of `g` [n, O].
///
/// # Errors
/// When sizes do not agree, or memory belongs to another device.
pub fn sum_rows<G: Stored>(
    device: &Device,
    g: &impl DevicePtr<G>,
    sum: &mut impl DevicePtrMut<f32>,
) -> Result<()> {
    add_sums(device, g, None, sum)
}

/// `sum` \[O\] += Σ of the rows of `g` [n, O]; or, for z [n, O] and n \[O\], of those of g∘z by n.
pub(super) fn add_sums<G: Stored>(
    device: &Device,
    g: &impl DevicePtr<G>,
    weighted: Option<(&CudaView<'_, f32>, &CudaView<'_, f32>)>,
    sum: &mut impl DevicePtrMut<f32>,
) -> Result<()> {
    let (width, vector) = (sum.len(), vector::<G>());
    let count = rows(OP, "g", g.len(), width)?;
    here(OP, "g", g, device)?;
    here(OP, "the sum", sum, device)?;
    if let Some((z, norms)) = weighted {
        values(OP, "z", g.len(), z, device)?;
        values(OP, "what sums are divided by", width, norms, device)?;
    }
    if count == 0 {
        return Ok(());
    }
    let rows_per_piece = count.div_ceil(PIECES);
    let pieces = count.div_ceil(rows_per_piece);
    // SAFETY: every piece writes its part of it before rows_sum reads it.
    let mut partials = unsafe { device.unset::<f32>(product(OP, "partial sums", &[pieces, width])?)? };
    let stream = device.stream();
    let (g, _g) = g.device_ptr(stream);
    let weighted = weighted.map(|(z, norms)| (z.device_ptr(stream), norms.device_ptr(stream)));
    let [z, norms] = weighted.as_ref().map_or([0, 0], |((z, _), (norms, _))| [*z, *norms]);
    let (sum, _sum) = sum.device_ptr_mut(stream);
    let (partials, _partials) = partials.device_ptr_mut(stream);
    let vectors = width.is_multiple_of(vector) && fits::<G>(g, vector) && fits::<f32>(z, 4);
    let arguments = SumArgs {
        g,
        z,
        norms,
        partials,
        sum,
        rows: count as i64,
        width: width as i64,
        rows_per_piece: rows_per_piece as i64,
        pieces: int(OP, "pieces", pieces)?,
    };
    let columns = |per_thread: usize| blocks(OP, width, THREADS as usize * per_thread);
    let launch = config([columns(if vectors { vector } else { 1 })?, arguments.pieces as u32, 1], THREADS, 0);
    let function = &device.kernels.rows.sum_piece[G::KIND as usize][usize::from(vectors)];
    // SAFETY: g is [rows, O] and so is z, where it is; there is a partial sum for each piece and column; vectors are used where O
    // and addresses are multiples of them.
    unsafe { device.launch(function, launch, &arguments)? };
    // SAFETY: as above; the sum has O values, and so has what it is divided by, where it is.
    unsafe { device.launch(&device.kernels.rows.sum, config([columns(1)?, 1, 1], THREADS, 0), &arguments)? };
    Ok(())
}

/// N·H of fused heads of `length` values, and the values of each part.
fn sizes(length: usize, width: usize, heads: usize) -> Result<[usize; 2]> {
    let entries = rows(OP, "fused heads", length, product(OP, "an entry", &[3, heads, width])?)?;
    Ok([entries * heads, length / 3])
}

/// Moves every head; all four addresses were checked for `heads` of `width` values.
///
/// # Safety
/// Fused heads are [heads, 3, width], parts [heads, width] each, in memory of this device.
unsafe fn regroup<T: Stored>(
    device: &Device,
    kernels: &[Forms; 3],
    fused: CUdeviceptr,
    [q, k, v]: [CUdeviceptr; 3],
    [heads, width]: [usize; 2],
) -> Result<()> {
    let vector = vector::<T>();
    let vectors = width.is_multiple_of(vector) && [fused, q, k, v].iter().all(|at| fits::<T>(*at, vector));
    let count = heads * 3 * width / if vectors { vector } else { 1 };
    let arguments = HeadsArgs { fused, q, k, v, heads: heads as i64, width: width as i64 };
    let launch = config([blocks(OP, count, THREADS as usize)?, 1, 1], THREADS, 0);
    // SAFETY: the caller's promise; vectors are used where D and addresses are multiples of them.
    unsafe { device.launch(&kernels[T::KIND as usize][usize::from(vectors)], launch, &arguments)? };
    Ok(())
}

/// [N, H, 3, D] apart into queries, keys and values [N, H, D], for `heads` H of `width` D.
///
/// # Errors
/// When sizes do not agree, or memory belongs to another device.
pub fn split_heads<T: Stored>(
    device: &Device,
    fused: &impl DevicePtr<T>,
    width: usize,
    heads: usize,
    parts: [&mut CudaViewMut<'_, T>; 3],
) -> Result<()> {
    let [count, each] = sizes(fused.len(), width, heads)?;
    here(OP, "fused heads", fused, device)?;
    for (what, part) in PARTS.iter().zip(&parts) {
        values(OP, what, each, &**part, device)?;
    }
    if count == 0 {
        return Ok(());
    }
    let stream = device.stream();
    let (fused, _fused) = fused.device_ptr(stream);
    let [q, k, v] = parts.map(|part| part.device_ptr_mut(stream));
    // SAFETY: the sizes of all four were checked above.
    unsafe { regroup::<T>(device, &device.kernels.rows.split, fused, [q.0, k.0, v.0], [count, width]) }
}

/// The transpose of [`split_heads`].
///
/// # Errors
/// As [`split_heads`].
pub fn join_heads<T: Stored>(
    device: &Device,
    parts: [&CudaView<'_, T>; 3],
    width: usize,
    heads: usize,
    fused: &mut impl DevicePtrMut<T>,
) -> Result<()> {
    let [count, each] = sizes(fused.len(), width, heads)?;
    here(OP, "fused heads", fused, device)?;
    for (what, part) in PARTS.iter().zip(parts) {
        values(OP, what, each, part, device)?;
    }
    if count == 0 {
        return Ok(());
    }
    let stream = device.stream();
    let (fused, _fused) = fused.device_ptr_mut(stream);
    let [q, k, v] = parts.map(|part| part.device_ptr(stream));
    // SAFETY: the sizes of all four were checked above.
    unsafe { regroup::<T>(device, &device.kernels.rows.join, fused, [q.0, k.0, v.0], [count, width]) }
}
