//! Buffers in a GPU's memory.

use megacontext_kernels::cuda::cudarc::driver::{CudaSlice, CudaView, CudaViewMut};
use megacontext_kernels::cuda::{Device, Stored};
use megacontext_kernels::store::bf16;

use crate::buffers::Activation;
use crate::error::{BaseError, Result};

/// Values on a GPU, in memory that is used again.
pub(crate) struct GpuBuffer<X: Activation> {
    memory: Option<CudaSlice<X::OnGpu>>,
    len: usize,
}

impl<X: Activation> Default for GpuBuffer<X> {
    fn default() -> Self {
        Self { memory: None, len: 0 }
    }
}

impl<X: Activation> GpuBuffer<X> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn bytes(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| (memory.len() * size_of::<X>()) as u64)
    }

    /// Makes it exactly `len` values; what is in it is whatever was there. One that is too small is let go before its successor
    /// is made.
    pub fn size(&mut self, device: &Device, len: usize) -> Result<()> {
        if self.memory.as_ref().is_none_or(|memory| memory.len() < len) {
            self.memory = None;
            self.memory = Some(device.room(len.max(1))?);
        }
        self.len = len;
        Ok(())
    }

    pub fn view(&self) -> Result<CudaView<'_, X::OnGpu>> {
        self.memory.as_ref().map(|memory| memory.slice(..self.len)).ok_or_else(unmade)
    }

    pub fn view_mut(&mut self) -> Result<CudaViewMut<'_, X::OnGpu>> {
        self.memory.as_mut().map(|memory| memory.slice_mut(..self.len)).ok_or_else(unmade)
    }
}

fn unmade() -> BaseError {
    BaseError::Device { message: "expected a buffer that was made, got one without memory".to_string() }
}

/// A storage that products are computed in.
pub(crate) trait Product: Activation<OnGpu = Self> + Stored {
    /// What linear layers convert their operands into.
    fn rooms(scratch: &mut LinearRooms) -> &mut Rooms<Self>;
}

/// An operand x and a gradient g as products read them, where they are stored otherwise.
pub(crate) struct Rooms<P: Product> {
    pub x: GpuBuffer<P>,
    pub g: GpuBuffer<P>,
}

impl<P: Product> Default for Rooms<P> {
    fn default() -> Self {
        Self { x: GpuBuffer::default(), g: GpuBuffer::default() }
    }
}

/// [`Rooms`] for each class of products.
#[derive(Default)]
pub(crate) struct LinearRooms {
    f32: Rooms<f32>,
    bf16: Rooms<bf16>,
}

impl LinearRooms {
    pub fn bytes(&self) -> u64 {
        self.f32.x.bytes() + self.f32.g.bytes() + self.bf16.x.bytes() + self.bf16.g.bytes()
    }
}

impl Product for f32 {
    fn rooms(scratch: &mut LinearRooms) -> &mut Rooms<Self> {
        &mut scratch.f32
    }
}

impl Product for bf16 {
    fn rooms(scratch: &mut LinearRooms) -> &mut Rooms<Self> {
        &mut scratch.bf16
    }
}

/// `view` as the other type, where it is the same one.
fn same<'a, A: Stored, B: Stored>(view: &CudaView<'a, A>) -> Option<CudaView<'a, B>> {
    if A::KIND != B::KIND {
        return None;
    }
    // SAFETY: there is one type of each kind, so A is B.
    unsafe { view.transmute(view.len()) }
}

/// As [`same`], of memory that is written.
fn same_mut<'a, A: Stored, B: Stored>(view: &'a mut CudaViewMut<'_, A>) -> Option<CudaViewMut<'a, B>> {
    if A::KIND != B::KIND {
        return None;
    }
    let len = view.len();
    // SAFETY: as above.
    unsafe { view.transmute_mut(len) }
}

/// The values of `view` stored as P: themselves where they are, a copy in `room` otherwise.
pub(crate) fn stored_as<'a, A: Stored, P: Product>(
    device: &Device,
    view: CudaView<'a, A>,
    room: &'a mut GpuBuffer<P>,
) -> Result<CudaView<'a, P>> {
    if let Some(view) = same(&view) {
        return Ok(view);
    }
    room.size(device, view.len())?;
    megacontext_kernels::cuda::rows::convert(device, &view, &mut room.view_mut()?)?;
    room.view()
}

/// Runs `write` on `view` stored as P: on itself where it is, on `room` otherwise, whose values are then copied into `view`.
pub(crate) fn written_as<A: Stored, P: Product>(
    device: &Device,
    view: &mut CudaViewMut<'_, A>,
    room: &mut GpuBuffer<P>,
    write: impl FnOnce(&mut CudaViewMut<'_, P>) -> Result<()>,
) -> Result<()> {
    if let Some(mut view) = same_mut(view) {
        return write(&mut view);
    }
    room.size(device, view.len())?;
    write(&mut room.view_mut()?)?;
    Ok(megacontext_kernels::cuda::rows::convert(device, &room.view()?, view)?)
}
