//! Dropout on LoRA's input: the mask of [`crate::linear::Dropout`], by the place of each value.
//!
//! The kernels keep values or write zeros; the factor 1/(1 − p) is the product's, so that what is kept is not rounded again.

use cudarc::driver::{CudaView, CudaViewMut, DevicePtr, DevicePtrMut};

use super::OP;
use crate::cuda::arguments::DropoutArgs;
use crate::cuda::check::{blocks, fits, values};
use crate::cuda::device::{Device, config};
use crate::cuda::kernels::Forms;
use crate::cuda::stored::Stored;
use crate::error::{KernelError, Result};
use crate::linear::Dropout;

const THREADS: u32 = 256;

/// Which values are kept.
#[derive(Clone, Copy)]
pub(super) struct Mask {
    seed: u64,
    threshold: u64,
    /// What those that are kept are multiplied by.
    pub factor: f32,
}

impl Mask {
    /// None where nothing is dropped.
    pub fn new(dropout: Option<Dropout>) -> Result<Option<Self>> {
        let Some(Dropout { p, seed }) = dropout else { return Ok(None) };
        if !(0.0..1.0).contains(&p) {
            return Err(KernelError::argument(OP, format!("dropout: expected 0 <= p < 1, got {p}")));
        }
        let (threshold, factor) = Dropout { p, seed }.threshold_and_factor();
        Ok((p > 0.0).then_some(Self { seed, threshold, factor }))
    }

    /// `y` = `x` where it is kept, 0 elsewhere; `first` is the place of the first value in its tensor.
    pub fn apply<T: Stored>(
        &self,
        device: &Device,
        x: &CudaView<'_, T>,
        y: &mut CudaViewMut<'_, T>,
        first: usize,
    ) -> Result<()> {
        self.launch(device, &device.kernels.rows.dropout[T::KIND as usize], x, y, first)
    }

    /// `y` += `x` where it is kept.
    pub fn add(
        &self,
        device: &Device,
        x: &CudaView<'_, f32>,
        y: &mut CudaViewMut<'_, f32>,
        first: usize,
    ) -> Result<()> {
        self.launch(device, &device.kernels.rows.dropout_add, x, y, first)
    }

    fn launch<T: Stored>(
        &self,
        device: &Device,
        kernels: &Forms,
        x: &CudaView<'_, T>,
        y: &mut CudaViewMut<'_, T>,
        first: usize,
    ) -> Result<()> {
        let (count, vector) = (x.len(), 16 / size_of::<T>());
        values(OP, "values under dropout", count, y, device)?;
        if count == 0 {
            return Ok(());
        }
        let (x, _x) = x.device_ptr(device.stream());
        let (y, _y) = y.device_ptr_mut(device.stream());
        let vectors = fits::<T>(x, vector) && fits::<T>(y, vector);
        let arguments = DropoutArgs {
            x,
            y,
            count: count as i64,
            first: first as u64,
            seed: self.seed,
            threshold: self.threshold,
        };
        let grid = blocks(OP, count, THREADS as usize * if vectors { vector } else { 1 })?;
        let launch = config([grid, 1, 1], THREADS, 0);
        // SAFETY: x and y have `count` values of the kernel's type; vectors are used where addresses are multiples of them.
        unsafe { device.launch(&kernels[usize::from(vectors)], launch, &arguments)? };
        Ok(())
    }
}
