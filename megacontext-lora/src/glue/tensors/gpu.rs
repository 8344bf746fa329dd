//! Tensors of the session's own GPU, through vectors of the host.
//!
//! Inputs wait for the stream that their view names, are copied, and are there; outputs are checked whole before anything is computed,
//! and copied when all of it went well. Every run of neighbours is a copy of its own, so what lies between the rows of an output
//! stays as it was, and a tensor whose innermost neighbours lie apart costs a copy for every value.

use std::num::NonZeroUsize;

use megacontext_base::device::Device;
use megacontext_kernels::cuda::{self, CudaError, Foreign};
use megacontext_lora_abi::tensor::{DeviceKind, Element, Memory, Runs, Stream};
use megacontext_lora_abi::{Device as Place, TensorError, TensorView, TensorViewMut};

use crate::error::{PluginError, Result};

/// The session's GPU where memory lies on it, none where it is the ABI's to read or to refuse.
///
/// # Errors
/// For memory of another GPU.
pub(super) fn own<'a>(device: &'a Device, lies: Place, what: &str) -> Result<Option<&'a cuda::Device>> {
    let Some(gpu) = device.kernels() else { return Ok(None) };
    match lies.kind {
        DeviceKind::Cpu => Ok(None),
        DeviceKind::Cuda if usize::try_from(lies.id) == Ok(gpu.ordinal()) => Ok(Some(gpu)),
        DeviceKind::Cuda => {
            let own = device.name();
            Err(PluginError::usage(format!("{what}: expected memory on cpu or {own}, got {lies}")))
        }
    }
}

/// The values of a view of this GPU's memory, in row-major order.
pub(super) fn read<T: Element>(
    gpu: &cuda::Device,
    view: &TensorView<'_>,
    what: &str,
    dims: &[Option<usize>],
) -> Result<Vec<T>> {
    let runs = view.runs(view.device(), what, T::DTYPE, dims)?;
    if runs.len() == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the view's maker promised values that nobody writes during the call, once the work on its stream is done; elements have
    // no padding and take every bit pattern.
    let memory = unsafe { foreign::<T>(gpu, view.memory(), view.stream(), what) }?;
    let mut values = room(&runs, view.shape(), what)?;
    memory.read(runs.length(), runs, &mut values)?;
    Ok(values)
}

/// Lets `fill` write the values in row-major order and brings them to a view of this GPU's memory.
pub(super) fn fill<T: Element, R>(
    gpu: &cuda::Device,
    view: &mut TensorViewMut<'_>,
    what: &str,
    dims: &[Option<usize>],
    fill: impl FnOnce(&mut [T]) -> Result<R>,
) -> Result<R> {
    let runs = view.runs(view.device(), what, T::DTYPE, dims)?;
    if runs.len() == 0 {
        return fill(&mut []);
    }
    // SAFETY: the view's maker promised values that only this call uses, once the work on its stream is done; elements have no
    // padding and take every bit pattern.
    let mut memory = unsafe { foreign::<T>(gpu, view.memory(), view.stream(), what) }?;
    let mut values = room(&runs, view.shape(), what)?;
    let result = fill(&mut values)?;
    memory.write(runs.length(), runs, &values)?;
    Ok(result)
}

/// Memory of a view. What is wrong with it, or with its stream, is the caller's mistake.
///
/// # Safety
/// As for [`cuda::Device::foreign`].
unsafe fn foreign<'a, T: Element>(
    gpu: &'a cuda::Device,
    memory: Memory,
    stream: Option<Stream>,
    what: &str,
) -> Result<Foreign<'a, T>> {
    let stream = stream.and_then(|stream| NonZeroUsize::new(stream.number()));
    // SAFETY: the caller's promise.
    unsafe { gpu.foreign(memory.bytes, stream) }.map_err(|error| match error {
        CudaError::Foreign { .. } | CudaError::Stream { .. } => {
            PluginError::usage(format!("{what}: {error}"))
        }
        error => PluginError::internal(format!("{what}: {error}")),
    })
}

/// A vector for all values.
fn room<T: Element>(runs: &Runs, shape: &[usize], what: &str) -> Result<Vec<T>> {
    let (mut values, elements) = (Vec::new(), runs.len() * runs.length());
    values.try_reserve_exact(elements).map_err(|_| TensorError::Memory {
        what: what.to_owned(),
        shape: format!("{shape:?}"),
        elements,
    })?;
    values.resize(elements, T::default());
    Ok(values)
}
