//! [`crate::norm`] on a device.
//!
//! Shapes: x and y [rows, E] in their storage types, gain, bias and gradients in f32. y is stored as x is, or one of the
//! two is f32. The gradients of gain and bias are summed in up to 256 pieces of rows, whose partial sums are added in
//! their order.

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaView, CudaViewMut, DevicePtr, DevicePtrMut, PushKernelArg};

use super::arguments::NormArgs;
use super::check::{at_most, blocks, fits, here, int, pair, product, rows, threads, values};
use super::device::{Device, config, launched};
use super::stored::Stored;
use crate::error::{KernelError, Result};

const RMS: &str = "cuda rms_norm";
const LAYER: &str = "cuda layer_norm";
const THREADS: u32 = 256;
/// Values that a block's sums use.
const SCRATCH: usize = 32 * size_of::<f32>();
/// Pieces of rows at most.
const PIECES: usize = 256;

/// Which norm, and what it takes besides x.
#[derive(Clone, Copy)]
struct Norm<'a, G> {
    gain: &'a G,
    bias: Option<&'a CudaView<'a, f32>>,
    eps: f32,
    layer: bool,
}

impl<G: DevicePtr<f32>> Norm<'_, G> {
    fn op(&self) -> &'static str {
        if self.layer { LAYER } else { RMS }
    }

    /// Rows of x, and E.
    fn rows<X>(&self, device: &Device, x: &impl DevicePtr<X>) -> Result<[usize; 2]> {
        let op = self.op();
        let width = self.gain.len();
        let count = rows(op, "x", x.len(), width)?;
        // The kernels step over a row in ints.
        at_most(op, "the width", width, i32::MAX as usize / 2)?;
        here(op, "x", x, device)?;
        here(op, "the gain", self.gain, device)?;
        if let Some(bias) = self.bias {
            values(op, "the bias", width, bias, device)?;
        }
        Ok([count, width])
    }

    fn forward<X: Stored, Y: Stored>(
        &self,
        device: &Device,
        x: &impl DevicePtr<X>,
        y: &mut impl DevicePtrMut<Y>,
    ) -> Result<()> {
        let op = self.op();
        let [count, width] = self.rows(device, x)?;
        values(op, "y", x.len(), y, device)?;
        let (pair, vector) = pair::<X, Y>(op, ["x", "y"])?;
        if count == 0 {
            return Ok(());
        }
        let (x, _x) = x.device_ptr(device.stream());
        let (y, _y) = y.device_ptr_mut(device.stream());
        let (gain, _gain) = self.gain.device_ptr(device.stream());
        let bias = self.bias.map(|bias| bias.device_ptr(device.stream()));
        let vectors = width.is_multiple_of(vector) && fits::<X>(x, vector) && fits::<Y>(y, vector);
        let arguments = NormArgs {
            x,
            gain,
            bias: bias.as_ref().map_or(0, |(bias, _)| *bias),
            y,
            rows: count as i64,
            width: int(op, "the width", width)?,
            eps: self.eps,
            ..NormArgs::default()
        };
        let function = &device.kernels.norms[usize::from(self.layer)].forward[pair][usize::from(vectors)];
        let threads = threads(if vectors { width / vector } else { width }, THREADS);
        let launch = config([blocks(op, count, 1)?, 1, 1], threads, SCRATCH);
        // SAFETY: x and y have rows·E values, gain and bias E; vectors are used where E and addresses are multiples of
        // them; a block's sums have their 32 values.
        unsafe { device.launch(function, launch, &arguments)? };
        Ok(())
    }

    fn backward<X: Stored>(
        &self,
        device: &Device,
        x: &impl DevicePtr<X>,
        gradient: &impl DevicePtr<f32>,
        dx: &mut impl DevicePtrMut<f32>,
        [d_gain, d_bias]: [Option<CudaViewMut<'_, f32>>; 2],
    ) -> Result<()> {
        let op = self.op();
        let [count, width] = self.rows(device, x)?;
        values(op, "the gradient of y", x.len(), gradient, device)?;
        values(op, "the gradient of x", x.len(), dx, device)?;
        for (what, sum) in [("the gradient of the gain", &d_gain), ("the gradient of the bias", &d_bias)] {
            sum.as_ref().map_or(Ok(()), |sum| values(op, what, width, sum, device))?;
        }
        if count == 0 {
            return Ok(());
        }
        let learns = d_gain.is_some() || d_bias.is_some();
        let rows_per_block = if learns { count.div_ceil(PIECES) } else { 1 };
        let pieces = count.div_ceil(rows_per_block);
        let shared = SCRATCH + if learns { 2 * width * size_of::<f32>() } else { 0 };
        if shared > device.shared_limit() {
            let limit = (device.shared_limit() - SCRATCH) / (2 * size_of::<f32>());
            let expected =
                format!("a width of at most {limit} where gain or bias learns on {}", device.name());
            return Err(KernelError::shape(op, expected, width.to_string()));
        }
        let vector = 16 / size_of::<X>();
        let (x, _x) = x.device_ptr(device.stream());
        let (gradient, _gradient) = gradient.device_ptr(device.stream());
        let (dx, _dx) = dx.device_ptr_mut(device.stream());
        let (gain, _gain) = self.gain.device_ptr(device.stream());
        let vectors = width.is_multiple_of(vector) && fits::<X>(x, vector);
        let count_of_partials = if learns { product(op, "partial sums", &[pieces, 2, width])? } else { 1 };
        // SAFETY: every block writes its part of it before norm_sums reads it.
        let mut partials = unsafe { device.unset::<f32>(count_of_partials)? };
        let (address, partials_guard) = partials.device_ptr_mut(device.stream());
        let arguments = NormArgs {
            x,
            gain,
            gradient,
            dx,
            partials: if learns { address } else { 0 },
            rows: count as i64,
            width: int(op, "the width", width)?,
            rows_per_block: int(op, "rows of a block", rows_per_block)?,
            eps: self.eps,
            ..NormArgs::default()
        };
        let kernels = &device.kernels.norms[usize::from(self.layer)];
        let function = &kernels.backward[X::KIND as usize][usize::from(vectors)];
        let block = threads(if vectors { width / vector } else { width }, THREADS);
        let launch = config([blocks(op, pieces, 1)?, 1, 1], block, shared);
        // SAFETY: x and both gradients have rows·E values, the gain E; there are partial sums [pieces, 2, E] and shared
        // memory for a block's own; vectors are used where E and x's address are multiples of them.
        unsafe { device.launch(function, launch, &arguments)? };
        drop(partials_guard);
        if !learns {
            return Ok(());
        }
        let (pieces, width) = (int(op, "pieces", pieces)?, arguments.width);
        let mut sums = [d_gain, d_bias];
        let [d_gain, d_bias] = &mut sums;
        let d_gain = d_gain.as_mut().map(|sum| sum.device_ptr_mut(device.stream()));
        let d_bias = d_bias.as_mut().map(|sum| sum.device_ptr_mut(device.stream()));
        let gain: CUdeviceptr = d_gain.as_ref().map_or(0, |(sum, _)| *sum);
        let bias: CUdeviceptr = d_bias.as_ref().map_or(0, |(sum, _)| *sum);
        let launch = config([blocks(op, width as usize, THREADS as usize)?, 1, 1], THREADS, 0);
        let mut builder = device.stream().launch_builder(&device.kernels.norm_sums);
        builder.arg(&partials).arg(&pieces).arg(&width).arg(&gain).arg(&bias);
        // SAFETY: the arguments are norm_sums' own, in its order; partials are [pieces, 2, E], the sums E or null.
        launched(unsafe { builder.launch(launch) })?;
        Ok(())
    }
}

/// RMSNorm of rows of `gain.len()` values.
///
/// # Errors
/// When sizes do not agree, there is no kernel for the two storage types, or memory belongs to another device.
pub fn rms_forward<X: Stored, Y: Stored>(
    device: &Device,
    x: &impl DevicePtr<X>,
    gain: &impl DevicePtr<f32>,
    eps: f32,
    y: &mut impl DevicePtrMut<Y>,
) -> Result<()> {
    Norm { gain, bias: None, eps, layer: false }.forward(device, x, y)
}

/// LayerNorm of rows of `gain.len()` values.
///
/// # Errors
/// As [`rms_forward`].
pub fn layer_forward<X: Stored, Y: Stored>(
    device: &Device,
    x: &impl DevicePtr<X>,
    gain: &impl DevicePtr<f32>,
    bias: Option<&CudaView<'_, f32>>,
    eps: f32,
    y: &mut impl DevicePtrMut<Y>,
) -> Result<()> {
    Norm { gain, bias, eps, layer: true }.forward(device, x, y)
}

/// Backward of [`rms_forward`]: adds the gradient of x to `dx` and, where the gain learns, its own to `d_gain`.
///
/// # Errors
/// As [`rms_forward`], and when a row's sums do not fit into a block's memory.
pub fn rms_backward<X: Stored>(
    device: &Device,
    x: &impl DevicePtr<X>,
    gain: &impl DevicePtr<f32>,
    gradient: &impl DevicePtr<f32>,
    eps: f32,
    dx: &mut impl DevicePtrMut<f32>,
    d_gain: Option<CudaViewMut<'_, f32>>,
) -> Result<()> {
    Norm { gain, bias: None, eps, layer: false }.backward(device, x, gradient, dx, [d_gain, None])
}

/// Backward of [`layer_forward`]: adds the gradient of x to `dx` and, where they learn, those of gain and bias to `sums`.
///
/// # Errors
/// As [`rms_backward`].
pub fn layer_backward<X: Stored>(
    device: &Device,
    x: &impl DevicePtr<X>,
    gain: &impl DevicePtr<f32>,
    gradient: &impl DevicePtr<f32>,
    eps: f32,
    dx: &mut impl DevicePtrMut<f32>,
    sums: [Option<CudaViewMut<'_, f32>>; 2],
) -> Result<()> {
    Norm { gain, bias: None, eps, layer: true }.backward(device, x, gradient, dx, sums)
}
