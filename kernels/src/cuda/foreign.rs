//! Memory of the device that others own: a host's tensors, read and written where they lie.
//!
//! Two things have to be known of it. Whose it is: the driver says that of the first and of the last byte, and what lies
//! between is its owner's promise. When it may be used: its owner names the stream that the last work on it was queued on, by the
//! numbers of the CUDA Array Interface, which are the driver's own handles: 1 the legacy default stream (`CU_STREAM_LEGACY`), 2
//! the thread's default one (`CU_STREAM_PER_THREAD`), any other a stream's address. An event is recorded there, and the device's
//! own stream waits for it: what the owner queues later is not held up. When a copy returns it is done, in either
//! direction, so that the owner has nothing to wait for.
//!
//! Source: CUDA driver API, "Unified Addressing" and "Event Management"; CUDA Array Interface, version 3.
//! Units: addresses and spans are bytes, runs and offsets count values.
//! Errors: [`CudaError::Foreign`] with whose memory it is; what the driver says of a stream that is none.
//! Left out: streams that are being captured into a graph; copies in two dimensions: every run is a copy of its own.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::Range;

use cudarc::driver::sys::{self, CUdeviceptr, CUmemorytype, CUpointer_attribute};
use cudarc::driver::{CudaEvent, result};

use super::device::Device;
use super::error::CudaError;
use crate::error::{KernelError, Result};

/// Values of the device's that somebody else owns, and what has to be done before they are used.
pub struct Foreign<'a, T> {
    device: &'a Device,
    start: CUdeviceptr,
    /// Values from the first to behind the last one.
    span: usize,
    /// The work that comes first.
    before: Option<CudaEvent>,
    values: PhantomData<T>,
}

impl Device {
    /// Memory of somebody else's on this device: `bytes` are its addresses, from the first byte to behind the last one, and
    /// what was queued on `stream` before this call comes before any use of it here.
    ///
    /// # Errors
    /// Before anything is queued: for no bytes, for memory of another device, of the host, or of nobody, and for a stream that
    /// the driver does not know.
    ///
    /// # Safety
    /// As long as the result lives, these are values of T (without padding, and valid whatever their bits are) that nobody else
    /// writes, nor reads where [`Foreign::write`] is called, once the work on `stream` is done; `stream` is a stream.
    pub unsafe fn foreign<T: Copy>(
        &self,
        bytes: Range<usize>,
        stream: Option<NonZeroUsize>,
    ) -> std::result::Result<Foreign<'_, T>, CudaError> {
        if bytes.is_empty() {
            return Err(CudaError::Empty);
        }
        self.check_own(bytes.start)?;
        self.check_own(bytes.end - 1)?;
        // SAFETY: the caller's promise.
        let before = stream.map(|stream| unsafe { self.queued_on(stream) }).transpose()?;
        let span = bytes.len() / size_of::<T>().max(1);
        Ok(Foreign { device: self, start: bytes.start as CUdeviceptr, span, before, values: PhantomData })
    }

    /// Refuses an address that is not of this device's memory.
    fn check_own(&self, address: usize) -> std::result::Result<(), CudaError> {
        const DEVICE: u32 = CUmemorytype::CU_MEMORYTYPE_DEVICE as u32;
        const HOST: u32 = CUmemorytype::CU_MEMORYTYPE_HOST as u32;
        const ASK: &str = "cuPointerGetAttributes";

        self.stream().context().bind_to_thread().map_err(CudaError::call("cuCtxSetCurrent"))?;
        let (mut kind, mut managed, mut ordinal) = (0u32, 0u32, 0i32);
        let mut attributes = [
            CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
            CUpointer_attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED,
            CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
        ];
        let mut into: [*mut c_void; 3] =
            [(&raw mut kind).cast(), (&raw mut managed).cast(), (&raw mut ordinal).cast()];
        // SAFETY: there is a place for each of the three, as large as the driver writes at most; it looks the address up in its
        // tables and does not follow it.
        let asked = unsafe {
            sys::cuPointerGetAttributes(3, attributes.as_mut_ptr(), into.as_mut_ptr(), address as CUdeviceptr)
        };
        // What it does not know gives zeros here, and an error where one attribute is asked for.
        let known = match asked.result() {
            Ok(()) => true,
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_INVALID_VALUE => false,
            Err(error) => return Err(CudaError::Call { call: ASK.into(), error }),
        };
        let of_device = known && (kind == DEVICE || managed != 0);
        let expected = self.ordinal();
        if of_device && usize::try_from(ordinal) == Ok(expected) {
            return Ok(());
        }
        let got = match kind {
            _ if of_device => format!("memory of cuda:{ordinal}"),
            HOST if known => "the host's memory".to_string(),
            _ => format!("the address {address:#x} that CUDA does not know"),
        };
        Err(CudaError::Foreign { ordinal: expected, got })
    }

    /// The work that is queued on a stream now.
    ///
    /// # Safety
    /// It is a stream: the driver follows handles that it does not know.
    unsafe fn queued_on(&self, stream: NonZeroUsize) -> std::result::Result<CudaEvent, CudaError> {
        use sys::CUresult::{
            CUDA_ERROR_INVALID_CONTEXT, CUDA_ERROR_INVALID_HANDLE, CUDA_ERROR_INVALID_VALUE,
        };

        let event = self.stream().context().new_event(None).map_err(CudaError::call("cuEventCreate"))?;
        let handle = stream.get() as sys::CUstream;
        // SAFETY: the event was made in the context that is current now; the caller's promise for the stream.
        let recorded = unsafe { result::event::record(event.cu_event(), handle) };
        recorded.map_err(|error| match error.0 {
            CUDA_ERROR_INVALID_CONTEXT | CUDA_ERROR_INVALID_HANDLE | CUDA_ERROR_INVALID_VALUE => {
                CudaError::Stream { ordinal: self.ordinal(), stream: stream.get(), error }
            }
            _ => CudaError::Call { call: "cuEventRecord".into(), error },
        })?;
        Ok(event)
    }
}

impl<T: Copy> Foreign<'_, T> {
    /// Copies runs of `length` values, which begin at `offsets`, into `values`, one behind another; they are there on return.
    ///
    /// # Errors
    /// When runs and values are not of one number or not inside of the memory, and what the driver says.
    pub fn read(
        &self,
        length: usize,
        offsets: impl ExactSizeIterator<Item = usize>,
        values: &mut [T],
    ) -> Result<()> {
        self.begin(length, offsets.len(), values.len())?;
        let stream = self.device.stream().cu_stream();
        let queued = values.chunks_exact_mut(length).zip(offsets).try_for_each(|(to, offset)| {
            let from = self.place(length, offset)?;
            // SAFETY: the run lies in the memory that `foreign` was promised; `to` is not used before the device was waited for.
            Ok(unsafe { result::memcpy_dtoh_async(to, from, stream) }
                .map_err(CudaError::call(format!("copying {} bytes from the device", size_of_val(to))))?)
        });
        self.end(queued)
    }

    /// Copies `values` to runs of `length` values, which begin at `offsets`; they are there on return. Nothing between the runs is
    /// touched.
    ///
    /// # Errors
    /// As [`Foreign::read`].
    pub fn write(
        &mut self,
        length: usize,
        offsets: impl ExactSizeIterator<Item = usize>,
        values: &[T],
    ) -> Result<()> {
        self.begin(length, offsets.len(), values.len())?;
        let stream = self.device.stream().cu_stream();
        let queued = values.chunks_exact(length).zip(offsets).try_for_each(|(from, offset)| {
            let to = self.place(length, offset)?;
            // SAFETY: as in `read`.
            Ok(unsafe { result::memcpy_htod_async(to, from, stream) }
                .map_err(CudaError::call(format!("copying {} bytes to the device", size_of_val(from))))?)
        });
        self.end(queued)
    }

    /// Refuses runs that are not as many values, then lets the device's stream wait for what comes before.
    fn begin(&self, length: usize, runs: usize, values: usize) -> Result<()> {
        if length == 0 || length.checked_mul(runs) != Some(values) {
            let expected = format!("{runs} runs of {length} values, at least one in each");
            return Err(KernelError::shape("cuda foreign memory", expected, format!("{values} values")));
        }
        let Some(before) = &self.before else { return Ok(()) };
        Ok(self.device.stream().wait(before).map_err(CudaError::call("cuStreamWaitEvent"))?)
    }

    /// Where a run lies.
    fn place(&self, length: usize, offset: usize) -> Result<CUdeviceptr> {
        if offset.checked_add(length).is_none_or(|end| end > self.span) {
            let expected = format!("a run inside of {} values", self.span);
            let got = format!("{length} from {offset} on");
            return Err(KernelError::shape("cuda foreign memory", expected, got));
        }
        Ok(self.start + (offset * size_of::<T>()) as CUdeviceptr)
    }

    /// Copies that were queued are waited for whatever became of the others: their host side is the caller's again.
    fn end(&self, queued: Result<()>) -> Result<()> {
        let done = self.device.synchronize();
        queued?;
        Ok(done?)
    }
}
