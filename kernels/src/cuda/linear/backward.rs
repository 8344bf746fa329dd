//! Gradients of linear layers.

use cudarc::driver::{CudaSlice, CudaView, CudaViewMut};

use super::products::{Products, beta, plain, turned, values_of};
use super::{FactorGradients, Layer, LayerGradients, Lora, Mask, OP, Saved};
use crate::cuda::check::{product, values};
use crate::cuda::device::Device;
use crate::cuda::error::CudaError;
use crate::cuda::stored::Stored;
use crate::error::{KernelError, Result};

/// Memory of a call beside its operands: made before anything is added to a gradient.
struct Held<T> {
    /// g·B, [n, r].
    low: Option<CudaSlice<T>>,
    /// A part of x under dropout.
    dropped: Option<CudaSlice<T>>,
    /// A part of the gradient of x before its mask.
    masked: Option<CudaSlice<f32>>,
}

impl<T: Stored> Layer<'_, T> {
    /// The gradients for that of the result: the input's into `dx` [n, I] where it is wanted, added to what is there when its flag
    /// says so; the parameters' added to `into`.
    ///
    /// # Errors
    /// When sizes do not agree, gradients of factors or magnitudes are wanted that are not there, dropout is not below 1, or memory
    /// belongs to another device.
    pub fn backward(
        &self,
        device: &Device,
        products: &Products,
        saved: Saved<'_, T>,
        dx: Option<(&mut CudaViewMut<'_, f32>, bool)>,
        into: LayerGradients<'_, '_>,
    ) -> Result<()> {
        let n = self.rows(device, products, saved.x)?;
        self.check_backward(device, n, &saved, dx.as_ref().map(|(dx, _)| &**dx), &into)?;
        let [out, inp] = self.shape;
        let LayerGradients { weight, factors, magnitude } = into;
        if n == 0 || out == 0 {
            return match dx {
                Some((dx, false)) if n > 0 => zero(device, dx),
                _ => Ok(()),
            };
        }
        let dora = self.lora.as_ref().and_then(|lora| lora.dora.as_ref());
        let mut held = self.held(device, products, n, [dx.is_some(), factors.is_some()])?;
        // c∘g, or g itself.
        let mut scaled: CudaSlice<T>;
        let g = match dora.filter(|_| dx.is_some() || factors.is_some()) {
            None => saved.gradient.slice(..),
            Some(dora) => {
                // SAFETY: all of it is written before it is read.
                scaled = unsafe { device.unset(n * out)? };
                dora.columns(device, saved.gradient, &mut scaled, false)?;
                scaled.as_view()
            }
        };
        // drop(x)·Aᵀ.
        let mut own: CudaSlice<T>;
        let h = match (saved.reduced, &self.lora) {
            (Some(reduced), _) => Some(reduced.slice(..)),
            (None, Some(lora)) if factors.is_some() || magnitude.is_some() => {
                // SAFETY: `reduce` writes all of it before it is read.
                own = unsafe { device.unset(n * lora.rank)? };
                lora.reduce(device, products, saved.x, [n, inp], &mut own.as_view_mut())?;
                Some(own.as_view())
            }
            _ => None,
        };
        if let (Some(dm), Some(lora), Some(dora), Some(h)) = (magnitude, &self.lora, dora, &h) {
            let operands = [saved.x, h, saved.gradient];
            self.magnitude_gradient(device, products, (lora, dora), operands, dm)?;
        }
        if let Some(dw) = weight {
            let (x, g) = (plain(saved.x), turned(saved.gradient));
            products.multiply(device, [out, inp, n], g, x, dw, [1.0, 1.0])?;
        }
        let mut dx = dx;
        if let Some((dx, accumulate)) = &mut dx {
            let factors = [1.0, beta(*accumulate)];
            products.multiply(device, [n, inp, out], plain(&g), plain(self.weight), *dx, factors)?;
        }
        if let Some(lora) = &self.lora {
            let dx = dx.map(|(dx, _)| dx);
            lora.backward(device, products, self.shape, [saved.x, &g], h.as_ref(), &mut held, dx, factors)?;
        }
        Ok(())
    }

    fn check_backward(
        &self,
        device: &Device,
        n: usize,
        saved: &Saved<'_, T>,
        dx: Option<&CudaViewMut<'_, f32>>,
        into: &LayerGradients<'_, '_>,
    ) -> Result<()> {
        let [out, inp] = self.shape;
        values(OP, "the gradient of y", product(OP, "y", &[n, out])?, saved.gradient, device)?;
        if let Some(dx) = dx {
            values(OP, "the gradient of x", n * inp, dx, device)?;
        }
        if let Some(dw) = &into.weight {
            values(OP, "the gradient of W", self.weight.len(), &**dw, device)?;
        }
        let Some(lora) = &self.lora else {
            let only = |what: &str, found: &str| Err(KernelError::shape(OP, format!("{what} only"), found));
            return match into {
                LayerGradients { factors: Some(_), .. } => {
                    only("gradients of factors beside LoRA", "a layer without LoRA")
                }
                LayerGradients { magnitude: Some(_), .. } => {
                    only("a gradient of magnitudes beside DoRA", "a layer without DoRA")
                }
                _ => Ok(()),
            };
        };
        if let Some(FactorGradients { a, b }) = &into.factors {
            values(OP, "the gradient of A", lora.a.len(), &**a, device)?;
            values(OP, "the gradient of B", lora.b.len(), &**b, device)?;
        }
        if let Some(dm) = &into.magnitude {
            if lora.dora.is_none() {
                let expected = "a gradient of magnitudes beside DoRA only";
                return Err(KernelError::shape(OP, expected, "a layer without DoRA"));
            }
            values(OP, "the gradient of magnitudes", out, &**dm, device)?;
        }
        if let Some(reduced) = saved.reduced {
            values(OP, "x·Aᵀ", product(OP, "x·Aᵀ", &[n, lora.rank])?, reduced, device)?;
        }
        Ok(())
    }

    fn held(
        &self,
        device: &Device,
        products: &Products,
        n: usize,
        [input, factors]: [bool; 2],
    ) -> Result<Held<T>> {
        let Some(lora) = &self.lora else { return Ok(Held { low: None, dropped: None, masked: None }) };
        let dropout = Mask::new(lora.dropout)?.is_some();
        let part = products.most(n, self.shape[1]);
        // SAFETY: all that is read was written before, by products and masks.
        unsafe {
            Ok(Held {
                low: memory(device, input || factors, n * lora.rank)?,
                dropped: memory(device, dropout && factors, part)?,
                masked: memory(device, dropout && input, part)?,
            })
        }
    }
}

/// Memory for values that are wanted.
///
/// # Safety
/// It is written before it is read.
unsafe fn memory<T: Stored>(device: &Device, wanted: bool, count: usize) -> Result<Option<CudaSlice<T>>> {
    // SAFETY: the caller's promise.
    Ok(wanted.then(|| unsafe { device.unset(count) }).transpose()?)
}

fn zero(device: &Device, values: &mut CudaViewMut<'_, f32>) -> Result<()> {
    Ok(device.stream().memset_zeros(values).map_err(CudaError::call("setting memory to zero"))?)
}

impl<T: Stored> Lora<'_, T> {
    /// LoRA's part of the gradient of x added to `dx`, and the gradients of the factors, for `g` behind DoRA's scales and `h` =
    /// drop(x)·Aᵀ.
    fn backward(
        &self,
        device: &Device,
        products: &Products,
        [out, inp]: [usize; 2],
        [x, g]: [&CudaView<'_, T>; 2],
        h: Option<&CudaView<'_, T>>,
        held: &mut Held<T>,
        mut dx: Option<&mut CudaViewMut<'_, f32>>,
        factors: Option<FactorGradients<'_, '_>>,
    ) -> Result<()> {
        let (n, r, s) = (g.len() / out, self.rank, self.scale);
        let Held { low: Some(low), dropped, masked } = held else { return Ok(()) };
        let mask = Mask::new(self.dropout)?;
        products.multiply(device, [n, r, out], plain(g), plain(self.b), low, [1.0, 0.0])?;
        let t = low.as_view();
        match (&mut dx, &mask, masked) {
            (Some(dx), Some(mask), Some(held)) => {
                for part in products.parts(n, inp) {
                    let own = values_of(&part, inp);
                    let (t, mut masked) = (t.slice(values_of(&part, r)), held.slice_mut(..own.len()));
                    let (sizes, factors) = ([part.len(), inp, r], [s * mask.factor, 0.0]);
                    products.multiply(device, sizes, plain(&t), plain(self.a), &mut masked, factors)?;
                    mask.add(device, &masked.as_view(), &mut dx.slice_mut(own.clone()), own.start)?;
                }
            }
            (Some(dx), ..) => {
                products.multiply(device, [n, inp, r], plain(&t), plain(self.a), *dx, [s, 1.0])?;
            }
            (None, ..) => {}
        }
        if let (Some(FactorGradients { a, b }), Some(h)) = (factors, h) {
            match (&mask, dropped) {
                (Some(mask), Some(held)) => {
                    for part in products.parts(n, inp) {
                        let own = values_of(&part, inp);
                        let mut dropped = held.slice_mut(..own.len());
                        mask.apply(device, &x.slice(own.clone()), &mut dropped, own.start)?;
                        let (t, dropped) = (t.slice(values_of(&part, r)), dropped.as_view());
                        let (sizes, factors) = ([r, inp, part.len()], [s * mask.factor, 1.0]);
                        products.multiply(device, sizes, turned(&t), plain(&dropped), a, factors)?;
                    }
                }
                _ => products.multiply(device, [r, inp, n], turned(&t), plain(x), a, [s, 1.0])?,
            }
            products.multiply(device, [out, r, n], turned(g), plain(h), b, [s, 1.0])?;
        }
        if let (Some(dx), Some(initial)) = (dx, &self.initial) {
            products.multiply(device, [n, r, out], plain(g), plain(initial.b), low, [1.0, 0.0])?;
            let t = low.as_view();
            products.multiply(device, [n, inp, r], plain(&t), plain(initial.a), dx, [-s, 1.0])?;
        }
        Ok(())
    }
}
