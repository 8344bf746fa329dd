//! DoRA: [`crate::linear::Dora`]'s formulas on a device.
//!
//! Source: Liu et al. 2024, W' = diag(m/n)·(W + s·B·A), n the lengths of the rows of W + s·B·A and a constant in the backward
//! pass. With c = m/n, y = c∘z and the gradients of x, A and B are LoRA's for c∘g, which is rounded to the storage type; z is
//! made again for dm.
//!
//! Shapes: W [O, I], c and n \[O\], g and z [n, O].

use cudarc::driver::{CudaView, CudaViewMut, DevicePtr, DevicePtrMut, PushKernelArg};

use super::products::{Products, plain, values_of};
use super::{Layer, Lora, OP};
use crate::cuda::arguments::ColumnsArgs;
use crate::cuda::check::{blocks, fits, pair, values};
use crate::cuda::device::{Device, config, launched};
use crate::cuda::rows;
use crate::cuda::stored::Stored;
use crate::error::Result;

const THREADS: u32 = 256;

/// DoRA's magnitudes beside a layer, as what the results are multiplied by.
#[derive(Clone, Copy)]
pub struct Dora<'a> {
    /// c = m/n \[O\].
    pub scale: &'a CudaView<'a, f32>,
    /// n \[O\], of [`row_norms`].
    pub norms: &'a CudaView<'a, f32>,
}

impl Dora<'_> {
    /// `y` (+)= c∘`x`, both [n, O].
    pub(super) fn columns<X: Stored, Y: Stored>(
        &self,
        device: &Device,
        x: &impl DevicePtr<X>,
        y: &mut impl DevicePtrMut<Y>,
        add: bool,
    ) -> Result<()> {
        let (pair, vector) = pair::<X, Y>(OP, ["z", "y"])?;
        let (width, count) = (self.scale.len(), x.len());
        values(OP, "y", count, y, device)?;
        if count == 0 {
            return Ok(());
        }
        let (x, _x) = x.device_ptr(device.stream());
        let (y, _y) = y.device_ptr_mut(device.stream());
        let (c, _c) = self.scale.device_ptr(device.stream());
        let vectors = width.is_multiple_of(vector) && fits::<X>(x, vector) && fits::<Y>(y, vector);
        let arguments =
            ColumnsArgs { x, c, y, count: count as i64, width: width as i64, add: i32::from(add) };
        let grid = blocks(OP, count, THREADS as usize * if vectors { vector } else { 1 })?;
        let function = &device.kernels.dora.columns[pair][usize::from(vectors)];
        // SAFETY: x and y have `count` values, whole rows of as many as c has; vectors are used where those and addresses are
        // multiples of them.
        unsafe { device.launch(function, config([grid, 1, 1], THREADS, 0), &arguments)? };
        Ok(())
    }
}

impl<T: Stored> Layer<'_, T> {
    /// `dm` \[O\] += Σ g∘z / n, z made again from `x` and `h` = drop(x)·Aᵀ, a part of the rows at a time.
    pub(super) fn magnitude_gradient(
        &self,
        device: &Device,
        products: &Products,
        (lora, dora): (&Lora<'_, T>, &Dora<'_>),
        [x, h, g]: [&CudaView<'_, T>; 3],
        dm: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let [out, inp] = self.shape;
        let n = g.len() / out;
        // SAFETY: products write all of a part before it is read.
        let mut held = unsafe { device.unset::<f32>(products.most(n, out))? };
        for part in products.parts(n, out) {
            let mut z = held.slice_mut(..part.len() * out);
            let x = x.slice(values_of(&part, inp));
            let h = h.slice(values_of(&part, lora.rank));
            self.add_up(device, products, &x, (lora, &h, None), &mut z, false)?;
            let weighted = Some((&z.as_view(), dora.norms));
            rows::add_sums(device, &g.slice(values_of(&part, out)), weighted, dm)?;
        }
        Ok(())
    }
}

/// Lengths of the rows of W + s·B·A into `norms` \[O\], for W [O, I]; squares are summed in f64.
///
/// # Errors
/// When sizes do not agree, or memory belongs to another device.
pub fn row_norms<T: Stored>(
    device: &Device,
    products: &Products,
    layer: &Layer<'_, T>,
    norms: &mut CudaViewMut<'_, f32>,
) -> Result<()> {
    let [out, inp] = layer.shape;
    layer.check(device, products)?;
    values(OP, "lengths of rows", out, norms, device)?;
    if out == 0 {
        return Ok(());
    }
    // SAFETY: all of a part is written before it is read.
    let mut held = unsafe { device.unset::<f32>(products.most(out, inp))? };
    for part in products.parts(out, inp) {
        let mut rows_of_w = held.slice_mut(..part.len() * inp);
        rows::convert(device, &layer.weight.slice(values_of(&part, inp)), &mut rows_of_w)?;
        if let Some(lora) = &layer.lora {
            let b = lora.b.slice(values_of(&part, lora.rank));
            let sizes = [part.len(), inp, lora.rank];
            products.multiply(device, sizes, plain(&b), plain(lora.a), &mut rows_of_w, [lora.scale, 1.0])?;
        }
        let grid = blocks(OP, part.len(), 1)?;
        let mut lengths = norms.slice_mut(part);
        let (rows_of_w, _rows) = rows_of_w.device_ptr(device.stream());
        let (lengths, _lengths) = lengths.device_ptr_mut(device.stream());
        let width = inp as i64;
        let mut builder = device.stream().launch_builder(&device.kernels.dora.lengths);
        builder.arg(&rows_of_w).arg(&width).arg(&lengths);
        let launch = config([grid, 1, 1], THREADS, THREADS as usize * size_of::<f64>());
        // SAFETY: the arguments are the kernel's own, in its order: rows of `width` values and a length for each; shared memory
        // of one f64 for each thread, whose number is a power of two.
        launched(unsafe { builder.launch(launch) })?;
    }
    Ok(())
}
