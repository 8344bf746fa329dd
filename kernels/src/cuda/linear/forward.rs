//! Results of linear layers.

use cudarc::driver::{CudaSlice, CudaView, CudaViewMut};

use super::products::{Products, beta, plain, turned, values_of};
use super::{Layer, Lora, Mask, OP};
use crate::cuda::check::{product, values};
use crate::cuda::device::Device;
use crate::cuda::rows;
use crate::cuda::stored::{Kind, Stored};
use crate::error::{KernelError, Result};

/// LoRA, drop(x)·Aᵀ, and x·A₀ᵀ of PiSSA's fixed part.
type Reduced<'a, 'b, T> = (&'a Lora<'a, T>, &'a CudaView<'b, T>, Option<&'a CudaView<'b, T>>);

impl<T: Stored> Lora<'_, T> {
    /// `h` [n, r] = drop(x)·Aᵀ for x [n, I], a part of the rows at a time where there is dropout.
    pub(super) fn reduce(
        &self,
        device: &Device,
        products: &Products,
        x: &CudaView<'_, T>,
        [n, inp]: [usize; 2],
        h: &mut CudaViewMut<'_, T>,
    ) -> Result<()> {
        let r = self.rank;
        let Some(mask) = Mask::new(self.dropout)? else {
            return products.multiply(device, [n, r, inp], plain(x), turned(self.a), h, [1.0, 0.0]);
        };
        // SAFETY: all of a part is written before it is read.
        let mut held = unsafe { device.unset::<T>(products.most(n, inp))? };
        for part in products.parts(n, inp) {
            let own = values_of(&part, inp);
            let mut dropped = held.slice_mut(..own.len());
            mask.apply(device, &x.slice(own.clone()), &mut dropped, own.start)?;
            let (dropped, mut h) = (dropped.as_view(), h.slice_mut(values_of(&part, r)));
            let sizes = [part.len(), r, inp];
            products.multiply(device, sizes, plain(&dropped), turned(self.a), &mut h, [mask.factor, 0.0])?;
        }
        Ok(())
    }
}

impl<T: Stored> Layer<'_, T> {
    /// `y` [n, O] = the layer's result for `x` [n, I], added to what is there when `accumulate`. `reduced` [n, r] takes drop(x)·Aᵀ
    /// beside LoRA, for [`Layer::backward`] to read; without it the call has memory of its own.
    ///
    /// # Errors
    /// When sizes do not agree, y is stored in another 16-bit type, `reduced` is given without LoRA, dropout is not below 1, or
    /// memory belongs to another device.
    pub fn forward<Y: Stored>(
        &self,
        device: &Device,
        products: &Products,
        x: &CudaView<'_, T>,
        reduced: Option<&mut CudaViewMut<'_, T>>,
        y: &mut CudaViewMut<'_, Y>,
        accumulate: bool,
    ) -> Result<()> {
        let n = self.rows(device, products, x)?;
        let [out, inp] = self.shape;
        values(OP, "y", product(OP, "y", &[n, out])?, y, device)?;
        if Y::KIND != T::KIND && Y::KIND != Kind::F32 {
            let expected = match T::KIND {
                Kind::F32 => "y stored in f32".to_string(),
                kind => format!("y stored in {} or f32", kind.name()),
            };
            return Err(KernelError::shape(OP, expected, Y::KIND.name()));
        }
        let of_reduced = match &self.lora {
            Some(lora) => product(OP, "x·Aᵀ", &[n, lora.rank])?,
            None if reduced.is_some() => {
                return Err(KernelError::shape(OP, "room for x·Aᵀ beside LoRA only", "a layer without LoRA"));
            }
            None => 0,
        };
        if let Some(reduced) = &reduced {
            values(OP, "room for x·Aᵀ", of_reduced, &**reduced, device)?;
        }
        if n == 0 || out == 0 {
            return Ok(());
        }
        let Some(lora) = &self.lora else {
            let factors = [1.0, beta(accumulate)];
            return products.multiply(device, [n, out, inp], plain(x), turned(self.weight), y, factors);
        };
        let mut own: CudaSlice<T>;
        let mut h = match reduced {
            Some(reduced) => reduced.slice_mut(..),
            None => {
                // SAFETY: `reduce` writes all of it before it is read.
                own = unsafe { device.unset(of_reduced)? };
                own.as_view_mut()
            }
        };
        lora.reduce(device, products, x, [n, inp], &mut h)?;
        let h = h.as_view();
        let mut fixed = None;
        if let Some(initial) = &lora.initial {
            // SAFETY: the product writes all of it before it is read.
            let memory = fixed.insert(unsafe { device.unset::<T>(of_reduced)? });
            let sizes = [n, lora.rank, inp];
            products.multiply(device, sizes, plain(x), turned(initial.a), memory, [1.0, 0.0])?;
        }
        let fixed = fixed.as_ref().map(|fixed| fixed.as_view());
        let narrow = Y::KIND != Kind::F32;
        if lora.dora.is_none() && !(narrow && (accumulate || fixed.is_some())) {
            return self.add_up(device, products, x, (lora, &h, fixed.as_ref()), y, accumulate);
        }
        // SAFETY: all of a part is written before it is read.
        let mut held = unsafe { device.unset::<f32>(products.most(n, out))? };
        for part in products.parts(n, out) {
            let mut y = y.slice_mut(values_of(&part, out));
            let mut sums = held.slice_mut(..part.len() * out);
            // What DoRA does not scale is added after it has scaled the rest.
            let inside = accumulate && lora.dora.is_none();
            if inside {
                rows::convert(device, &y, &mut sums)?;
            }
            let x = x.slice(values_of(&part, inp));
            let h = h.slice(values_of(&part, lora.rank));
            let fixed = fixed.as_ref().map(|fixed| fixed.slice(values_of(&part, lora.rank)));
            self.add_up(device, products, &x, (lora, &h, fixed.as_ref()), &mut sums, inside)?;
            match &lora.dora {
                None => rows::convert(device, &sums, &mut y)?,
                Some(dora) => dora.columns(device, &sums, &mut y, accumulate)?,
            }
        }
        Ok(())
    }

    /// `d` [n, O] (+)= s·h·Bᵀ − s·(x·A₀ᵀ)·B₀ᵀ + x·Wᵀ, in this order.
    pub(super) fn add_up<D: Stored>(
        &self,
        device: &Device,
        products: &Products,
        x: &CudaView<'_, T>,
        (lora, h, fixed): Reduced<'_, '_, T>,
        d: &mut CudaViewMut<'_, D>,
        accumulate: bool,
    ) -> Result<()> {
        let ([out, inp], r) = (self.shape, lora.rank);
        let n = x.len() / inp;
        let factors = [lora.scale, beta(accumulate)];
        products.multiply(device, [n, out, r], plain(h), turned(lora.b), d, factors)?;
        if let (Some(initial), Some(fixed)) = (&lora.initial, fixed) {
            products.multiply(device, [n, out, r], plain(fixed), turned(initial.b), d, [-lora.scale, 1.0])?;
        }
        products.multiply(device, [n, out, inp], plain(x), turned(self.weight), d, [1.0, 1.0])
    }
}
