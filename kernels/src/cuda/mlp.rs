//! [`crate::mlp`] and [`crate::gelu`] on a device: the nonlinearities of feed-forward layers.
//!
//! Sources and formulas: `mlp.cu`. Backward makes sigmoid and erf again instead of storing them.
//!
//! Shapes: all operands of one length, gate, up and result stored alike, the gradient of the result in f32; any length,
//! vectors of 16 bytes where addresses allow.
//! Errors: sizes that do not agree, a gate that is missing or not wanted, memory of another device.

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaView, CudaViewMut, DevicePtr, DevicePtrMut};

use super::arguments::MlpArgs;
use super::check::{ALIGNMENT, blocks, here, values};
use super::device::{Device, config};
use super::kernels::Forms;
use super::stored::Stored;
use crate::error::{KernelError, Result};

const OP: &str = "cuda mlp";
const THREADS: u32 = 256;

/// What becomes of a feed-forward layer's first products, as numbered in `mlp.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// silu(gate)·up.
    SwiGlu,
    /// gelu(gate)·up, by tanh.
    GeGlu,
    /// gelu(up), by the error function.
    Gelu,
    /// gelu(up), by tanh.
    GeluTanh,
    /// relu(up)².
    Relu2,
}

impl Activation {
    /// Whether it takes a gate.
    pub fn gated(self) -> bool {
        matches!(self, Self::SwiGlu | Self::GeGlu)
    }

    /// Refuses a gate where there is none to be, and the other way round.
    fn check(self, gate: bool) -> Result<()> {
        let found = |gate| if gate { "a gate" } else { "no gate" };
        if gate != self.gated() {
            return Err(KernelError::shape(OP, format!("{} for {self:?}", found(!gate)), found(gate)));
        }
        Ok(())
    }
}

/// Queues a kernel over operands of `count` values.
///
/// # Safety
/// All addresses but null are those of as many values, stored as T, the gradient as f32.
unsafe fn each<T: Stored>(
    device: &Device,
    kernels: &[Forms; 3],
    activation: Activation,
    count: usize,
    [gate, up, out, gradient]: [CUdeviceptr; 4],
) -> Result<()> {
    let vectors = [gate, up, out, gradient].iter().all(|address| address.is_multiple_of(ALIGNMENT));
    let per_thread = if vectors { ALIGNMENT as usize / size_of::<T>() } else { 1 };
    let arguments = MlpArgs { gate, up, out, gradient, count: count as i64, activation: activation as i32 };
    let launch = config([blocks(OP, count, THREADS as usize * per_thread)?, 1, 1], THREADS, 0);
    // SAFETY: the caller's promise; vectors are used where all addresses are multiples of them.
    unsafe { device.launch(&kernels[T::KIND as usize][usize::from(vectors)], launch, &arguments)? };
    Ok(())
}

/// `out` from `up`, and from `gate` where the activation takes one.
///
/// # Errors
/// When sizes do not agree, a gate is missing or not wanted, or memory belongs to another device.
pub fn forward<T: Stored>(
    device: &Device,
    activation: Activation,
    gate: Option<&CudaView<'_, T>>,
    up: &CudaView<'_, T>,
    out: &mut CudaViewMut<'_, T>,
) -> Result<()> {
    activation.check(gate.is_some())?;
    let count = up.len();
    here(OP, "up", up, device)?;
    if let Some(gate) = gate {
        values(OP, "the gate", count, gate, device)?;
    }
    values(OP, "the result", count, out, device)?;
    if count == 0 {
        return Ok(());
    }
    let stream = device.stream();
    let gate = gate.map(|gate| gate.device_ptr(stream));
    let (up, _up) = up.device_ptr(stream);
    let (out, _out) = out.device_ptr_mut(stream);
    let addresses = [gate.as_ref().map_or(0, |(gate, _)| *gate), up, out, 0];
    // SAFETY: the sizes of all were checked above.
    unsafe { each::<T>(device, &device.kernels.mlp_forward, activation, count, addresses) }
}

/// Backward of [`forward`], in place: `gate` and `up` become their own gradients, given that of the result.
///
/// # Errors
/// As [`forward`].
pub fn backward_in_place<T: Stored>(
    device: &Device,
    activation: Activation,
    gate: Option<&mut CudaViewMut<'_, T>>,
    up: &mut CudaViewMut<'_, T>,
    gradient: &CudaView<'_, f32>,
) -> Result<()> {
    activation.check(gate.is_some())?;
    let count = up.len();
    here(OP, "up", up, device)?;
    if let Some(gate) = &gate {
        values(OP, "the gate", count, &**gate, device)?;
    }
    values(OP, "the gradient of the result", count, gradient, device)?;
    if count == 0 {
        return Ok(());
    }
    let stream = device.stream();
    let gate = gate.map(|gate| gate.device_ptr_mut(stream));
    let (up, _up) = up.device_ptr_mut(stream);
    let (gradient, _gradient) = gradient.device_ptr(stream);
    let addresses = [gate.as_ref().map_or(0, |(gate, _)| *gate), up, 0, gradient];
    // SAFETY: as above.
    unsafe { each::<T>(device, &device.kernels.mlp_backward, activation, count, addresses) }
}
