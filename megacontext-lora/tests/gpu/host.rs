//! A host that has its tensors on the emulated GPU: it allocates by the driver, in the context that all libraries of a process share
//! and on a stream of its own, and loads the plugin as any host does.

use std::path::Path;
use std::sync::Arc;

use libloading::os::unix::Library;
use megacontext_kernels::cuda::cudarc::driver::result::memcpy_dtod_async;
use megacontext_kernels::cuda::cudarc::driver::sys::CUstream;
use megacontext_kernels::cuda::cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DeviceRepr, ValidAsZeroBits,
};
use megacontext_lora_abi::loader::find_in;
use megacontext_lora_abi::tensor::Element;
use megacontext_lora_abi::{LoadOptions, Plugin, Session, Stream, TensorView, TensorViewMut};
use serde_json::Value;

/// Elements as both sides know them.
pub trait Number: Element + DeviceRepr + ValidAsZeroBits + PartialEq + std::fmt::Debug {}
impl<T: Element + DeviceRepr + ValidAsZeroBits + PartialEq + std::fmt::Debug> Number for T {}

/// The host.
pub struct Host {
    pub context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    driver: Library,
    pub plugin: Plugin,
}

impl Host {
    pub fn new() -> Self {
        let context = CudaContext::new(0).unwrap();
        // SAFETY: the library is the emulated driver, which the context has opened already.
        let driver = unsafe { Library::new("libcuda.so.1") }.unwrap();
        let folder = Path::new(env!("CARGO_BIN_EXE_mclora")).parent().unwrap();
        let plugin = Plugin::load(find_in(folder).unwrap(), &LoadOptions::default()).unwrap();
        Self { stream: context.new_stream().unwrap(), context, driver, plugin }
    }

    pub fn open(&self, config: &Value) -> Session {
        self.plugin.open_session(config, ()).unwrap()
    }

    /// The stream that its memory is written on.
    pub fn stream(&self) -> Option<Stream> {
        Stream::new(self.stream.cu_stream() as usize)
    }

    /// A row-major tensor.
    pub fn dense<T: Number>(&self, values: &[T], shape: &[usize]) -> There<T> {
        let strides: Vec<usize> = (0..shape.len()).map(|d| shape[d + 1..].iter().product()).collect();
        self.strided(values, shape, &strides, values[0])
    }

    /// A tensor whose values, in row-major order, lie so many places apart; `gap` in all other places.
    pub fn strided<T: Number>(&self, values: &[T], shape: &[usize], strides: &[usize], gap: T) -> There<T> {
        let offsets = offsets(shape, strides);
        assert_eq!(values.len(), offsets.len());
        // A few places behind the last one too.
        let mut all = vec![gap; offsets.iter().max().unwrap() + 4];
        for (offset, value) in offsets.into_iter().zip(values) {
            all[offset] = *value;
        }
        let memory = self.stream.clone_htod(&all).unwrap();
        self.stream.synchronize().unwrap();
        let address = memory.device_ptr(&self.stream).0 as usize;
        There { memory, address, shape: shape.to_vec(), strides: strides.to_vec(), gap }
    }

    /// What a tensor holds in row-major order; what lies between has to be as it was.
    #[track_caller]
    pub fn values<T: Number>(&self, of: &There<T>) -> Vec<T> {
        let all = self.stream.clone_dtoh(&of.memory).unwrap();
        self.stream.synchronize().unwrap();
        let offsets = offsets(&of.shape, &of.strides);
        let between = (0..all.len()).filter(|place| !offsets.contains(place));
        for place in between {
            assert_eq!(all[place], of.gap, "place {place} between the values");
        }
        offsets.into_iter().map(|offset| all[offset]).collect()
    }

    /// Copies on this stream are held back until somebody waits for them.
    pub fn late(&self, stream: Option<Stream>, late: bool) {
        // SAFETY: the library is `cu/emulate/driver.cpp`, and this is the function's type.
        let set = unsafe { self.driver.get::<extern "C" fn(usize, i32) -> i32>(b"emulated_late") }.unwrap();
        assert_eq!(set(stream.unwrap().number(), i32::from(late)), 0);
    }

    /// Queues a copy of dense tensors on a stream.
    pub fn queue<T: Number>(&self, from: &There<T>, to: &There<T>, on: Option<Stream>) {
        let bytes = from.shape.iter().product::<usize>() * size_of::<T>();
        let stream = on.unwrap().number() as CUstream;
        self.context.bind_to_thread().unwrap();
        // SAFETY: both have as many bytes, and live until the copy is done.
        unsafe { memcpy_dtod_async(to.address as u64, from.address as u64, bytes, stream) }.unwrap();
    }
}

/// A tensor on the GPU.
pub struct There<T> {
    memory: CudaSlice<T>,
    pub address: usize,
    pub shape: Vec<usize>,
    strides: Vec<usize>,
    gap: T,
}

impl<T: Number> There<T> {
    fn signed(&self) -> Vec<isize> {
        self.strides.iter().map(|stride| *stride as isize).collect()
    }

    /// As an input.
    pub fn view(&self, stream: Option<Stream>) -> TensorView<'_> {
        // SAFETY: the memory is this value's, and the test has one thread.
        unsafe { TensorView::from_cuda(self.address, T::DTYPE, 0, stream, &self.shape, &self.signed()) }
    }

    /// As an output.
    pub fn out(&mut self, stream: Option<Stream>) -> TensorViewMut<'_> {
        // SAFETY: as above.
        unsafe { TensorViewMut::from_cuda(self.address, T::DTYPE, 0, stream, &self.shape, &self.signed()) }
    }
}

/// Where the values of a tensor lie, in row-major order.
fn offsets(shape: &[usize], strides: &[usize]) -> Vec<usize> {
    shape.iter().zip(strides).fold(vec![0], |before, (dim, stride)| {
        before.iter().flat_map(|offset| (0..*dim).map(move |i| offset + i * stride)).collect()
    })
}
