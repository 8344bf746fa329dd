//! A host's tensors in and out of a session's calls, wherever they lie.
//!
//! The processor's are read and written where they lie, as the ABI's views do it. Those of the GPU that the session's passes run on
//! come and go through vectors of the host (module `gpu`): a session works on such vectors, since parameters and files are
//! the host's, and a context's few megabytes are little beside a model's pass over it. A host that has its values on the GPU
//! need not bring them itself, nor wait for its own stream.
//!
//! Errors: those of [`TensorView::read`] and [`TensorViewMut::fill`]; memory of neither the processor nor the session's device, of
//! an address or a stream that CUDA does not know. All of them are told before anything is computed. A session without a model, or
//! whose model is on the processor, takes the processor's tensors alone.
//!
//! Left out: tensors that passes read in place, and what a running job lends ([`super::lending`]).

use std::borrow::Cow;

use megacontext_base::device::Device;
use megacontext_lora_abi::tensor::Element;
use megacontext_lora_abi::{TensorView, TensorViewMut};

use crate::error::Result;

#[cfg(feature = "cuda")]
mod gpu;

/// As [`TensorView::read`], for a session whose passes run on `device`.
pub(super) fn read<'a, T: Element>(
    device: &Device,
    view: &TensorView<'a>,
    what: &str,
    dims: &[Option<usize>],
) -> Result<Cow<'a, [T]>> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = gpu::own(device, view.device(), what)? {
        return Ok(Cow::Owned(gpu::read(gpu, view, what, dims)?));
    }
    debug_assert!(cfg!(feature = "cuda") || device.is_cpu());
    Ok(view.read(what, dims)?)
}

/// As [`TensorViewMut::fill`], for a session whose passes run on `device`. On an error of `fill` memory of the device is untouched.
pub(super) fn fill<T: Element, R>(
    device: &Device,
    view: &mut TensorViewMut<'_>,
    what: &str,
    dims: &[Option<usize>],
    fill: impl FnOnce(&mut [T]) -> Result<R>,
) -> Result<R> {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = gpu::own(device, view.device(), what)? {
        return gpu::fill(gpu, view, what, dims, fill);
    }
    debug_assert!(cfg!(feature = "cuda") || device.is_cpu());
    view.fill(what, dims, fill)
}
