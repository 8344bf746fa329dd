//! Memory of the device that others own: read and written by runs, behind the owner's stream, and refused where it is not the
//! device's. The owner has a context and a stream of its own, as a host in the same process would.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use half::bf16;
use libloading::os::unix::Library;
use megacontext_kernels::cuda::cudarc::driver::result::memcpy_dtod_async;
use megacontext_kernels::cuda::cudarc::driver::sys::CUstream;
use megacontext_kernels::cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DeviceRepr};
use megacontext_kernels::cuda::{CudaError, Device, Foreign};

use crate::emulated::emulated_image;
use crate::probing::{emulated, load};
use crate::support::{device, device_alone};

/// Who owns the memory.
struct Owner {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

impl Owner {
    fn new(ordinal: usize) -> Result<Self> {
        let context = CudaContext::new(ordinal)?;
        Ok(Self { stream: context.new_stream()?, context })
    }

    /// Memory with these values, which are there.
    fn memory<T: DeviceRepr>(&self, values: &[T]) -> Result<CudaSlice<T>> {
        let memory = self.stream.clone_htod(values)?;
        self.stream.synchronize()?;
        Ok(memory)
    }

    /// What is in it when all work of the owner's is done.
    fn values<T: DeviceRepr>(&self, memory: &CudaSlice<T>) -> Result<Vec<T>> {
        Ok(self.stream.clone_dtoh(memory)?)
    }

    /// Its addresses.
    fn bytes<T>(&self, memory: &CudaSlice<T>) -> Range<usize> {
        let start = memory.device_ptr(&self.stream).0 as usize;
        start..start + memory.num_bytes()
    }

    fn number(&self) -> Option<NonZeroUsize> {
        NonZeroUsize::new(self.stream.cu_stream() as usize)
    }
}

fn foreign<T: Copy>(
    device: &Device,
    bytes: Range<usize>,
    stream: Option<NonZeroUsize>,
) -> std::result::Result<Foreign<'_, T>, CudaError> {
    // SAFETY: tests hand in memory that they own and use from this one thread, or what is refused; the emulated driver looks
    // streams up.
    unsafe { device.foreign(bytes, stream) }
}

/// That it is refused with this text.
fn refused<T, E: std::fmt::Display>(result: std::result::Result<T, E>, expected: &str) -> Result<()> {
    let said = result.err().with_context(|| format!("expected {expected:?}, was not refused"))?.to_string();
    ensure!(said == expected, "expected {expected:?}, got {said:?}");
    Ok(())
}

fn round_trip<T>(device: &Device, owner: &Owner, values: [T; 12], other: T) -> Result<()>
where
    T: DeviceRepr + Copy + Default + PartialEq + std::fmt::Debug,
{
    let memory = owner.memory(&values)?;
    let mut theirs = foreign::<T>(device, owner.bytes(&memory), owner.number())?;
    let mut all = [T::default(); 12];
    theirs.read(12, [0].into_iter(), &mut all)?;
    ensure!(all == values);
    // Out of order, and one of them twice.
    let mut some = [T::default(); 6];
    theirs.read(2, [9, 1, 9].into_iter(), &mut some)?;
    ensure!(some == [values[9], values[10], values[1], values[2], values[9], values[10]], "{some:?}");
    theirs.write(2, [5, 10].into_iter(), &[other; 4])?;
    let mut expected = values;
    for place in [5, 6, 10, 11] {
        expected[place] = other;
    }
    let got = owner.values(&memory)?;
    ensure!(got == expected, "{got:?}");
    Ok(())
}

#[test]
fn runs_are_read_and_written_and_what_lies_between_stays() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let (device, owner) = (lease.device, Owner::new(0)?);
    round_trip(device, &owner, std::array::from_fn(|i| i as f32 - 3.5), 9.25)?;
    round_trip(device, &owner, std::array::from_fn(|i| i as f64 * 1e-300), -0.5)?;
    round_trip(device, &owner, std::array::from_fn(|i| bf16::from_f32(i as f32)), bf16::NEG_ONE)?;
    round_trip(device, &owner, std::array::from_fn(|i| u32::MAX - i as u32), 7)?;
    round_trip(device, &owner, std::array::from_fn(|i| i64::MIN + i as i64), 7)
}

#[test]
fn what_is_not_the_devices_memory_is_refused() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let (device, owner) = (lease.device, Owner::new(0)?);
    let memory = owner.memory(&[1f32; 8])?;
    let bytes = owner.bytes(&memory);
    let unknown = |address: usize| {
        format!("expected memory of cuda:0, got the address {address:#x} that CUDA does not know")
    };
    let of_program = [1f32; 8];
    let address = of_program.as_ptr() as usize;
    refused(foreign::<f32>(device, address..address + 32, None), &unknown(address))?;
    refused(foreign::<f32>(device, 64..96, None), &unknown(64))?;
    // The last byte lies beyond everything that there is.
    let far = bytes.start + (1 << 46);
    refused(foreign::<f32>(device, bytes.start..far + 1, None), &unknown(far))?;
    // SAFETY: nothing is read from it.
    let pinned = unsafe { owner.context.alloc_pinned::<f32>(8) }?;
    let address = pinned.as_ptr()? as usize;
    refused(
        foreign::<f32>(device, address..address + 32, None),
        "expected memory of cuda:0, got the host's memory",
    )?;
    refused(
        foreign::<f32>(device, bytes.start..bytes.start, None),
        "CUDA: expected memory for at least one value, got none",
    )
}

#[test]
fn runs_that_are_not_the_values_are_refused() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let (device, owner) = (lease.device, Owner::new(0)?);
    let memory = owner.memory(&[1f32; 8])?;
    let mut theirs = foreign::<f32>(device, owner.bytes(&memory), None)?;
    let mut values = [0f32; 4];
    refused(
        theirs.read(2, [0, 2, 4].into_iter(), &mut values),
        "cuda foreign memory: expected 3 runs of 2 values, at least one in each, got 4 values",
    )?;
    refused(
        theirs.read(0, [0].into_iter(), &mut []),
        "cuda foreign memory: expected 1 runs of 0 values, at least one in each, got 0 values",
    )?;
    let beyond = "cuda foreign memory: expected a run inside of 8 values, got 4 from 5 on";
    refused(theirs.read(4, [5].into_iter(), &mut values), beyond)?;
    refused(theirs.write(4, [5].into_iter(), &values), beyond)?;
    ensure!(owner.values(&memory)? == [1f32; 8]);
    Ok(())
}

/// What the emulated driver has for tests.
struct Late<'a>(&'a Library);

impl Late<'_> {
    /// Copies within device memory on this stream are held back until somebody waits for them.
    fn set(&self, stream: Option<NonZeroUsize>, late: bool) -> Result<()> {
        // SAFETY: the library is `cu/emulate/driver.cpp`, and this is the function's type.
        let set = unsafe { self.0.get::<extern "C" fn(usize, i32) -> i32>(b"emulated_late") }?;
        ensure!(set(stream.map_or(0, NonZeroUsize::get), i32::from(late)) == 0, "no such stream");
        Ok(())
    }

    /// Copies that are held back.
    fn held(&self, stream: Option<NonZeroUsize>) -> Result<usize> {
        // SAFETY: as above.
        let held = unsafe { self.0.get::<extern "C" fn(usize) -> usize>(b"emulated_held") }?;
        Ok(held(stream.map_or(0, NonZeroUsize::get)))
    }
}

/// Queues a copy within device memory.
fn queue(from: &Range<usize>, to: &Range<usize>, on: Option<NonZeroUsize>) -> Result<()> {
    let stream = on.map_or(0, NonZeroUsize::get) as CUstream;
    // SAFETY: both are memory of the test's, equally long, that lives until the copy is done.
    Ok(unsafe { memcpy_dtod_async(to.start as u64, from.start as u64, from.len(), stream) }?)
}

#[test]
fn what_the_owner_queued_before_comes_first_and_what_it_queues_after_is_not_waited_for() -> Result<()> {
    let Some(lease) = device_alone()? else { return Ok(()) };
    let (device, Some(library)) = (lease.device, lease.emulated) else {
        println!("skipped: nothing holds copies back on a real device");
        return Ok(());
    };
    let (owner, late) = (Owner::new(0)?, Late(library));
    let [legacy, per_thread] = [1, 2].map(NonZeroUsize::new);
    for stream in [owner.number(), legacy, per_thread] {
        let [old, new, out] = [1f32, 2.0, 3.0].map(|value| owner.memory(&[value; 4]));
        let (old, new, out) = (old?, new?, out?);
        let [at_old, at_new, at_out] = [&old, &new, &out].map(|memory| owner.bytes(memory));
        late.set(stream, true)?;
        // An input that its owner has queued, but not written yet.
        queue(&at_new, &at_old, stream)?;
        let mut got = [0f32; 4];
        foreign::<f32>(device, at_old.clone(), None)?.read(4, [0].into_iter(), &mut got)?;
        ensure!(got == [1.0; 4] && late.held(stream)? == 1, "it was waited for though no stream was named");
        let theirs = foreign::<f32>(device, at_old.clone(), stream)?;
        // The owner goes on with other work.
        queue(&at_old, &at_out, stream)?;
        theirs.read(4, [0].into_iter(), &mut got)?;
        ensure!(got == [2.0; 4], "{stream:?}: read before it was written: {got:?}");
        ensure!(late.held(stream)? == 1, "{stream:?}: what was queued later was waited for");
        // An output that its owner has queued a last use of.
        foreign::<f32>(device, at_old, stream)?.write(4, [0].into_iter(), &[5.0; 4])?;
        ensure!(late.held(stream)? == 0);
        late.set(stream, false)?;
        ensure!(owner.values(&old)? == [5.0; 4]);
        ensure!(owner.values(&out)? == [2.0; 4], "{stream:?}: written before its last use was done");
    }
    Ok(())
}

#[test]
fn a_stream_that_the_driver_does_not_know_is_refused() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    if lease.emulated.is_none() {
        println!("skipped: a real driver follows the handle");
        return Ok(());
    }
    let (device, owner) = (lease.device, Owner::new(0)?);
    let memory = owner.memory(&[1f32; 8])?;
    refused(
        foreign::<f32>(device, owner.bytes(&memory), NonZeroUsize::new(0x1234)),
        "expected a stream of cuda:0, got 0x1234: CUDA_ERROR_INVALID_HANDLE (CUDA_ERROR_INVALID_HANDLE)",
    )
}

#[test]
#[ignore = "run by the others, in a process of its own"]
fn elsewhere() -> Result<()> {
    let _library = load()?;
    let device = Device::open_with(1, |module, _, _| Ok(emulated_image(module)))?;
    let [own, other] = [Owner::new(1)?, Owner::new(0)?];
    let (here, there) = (own.memory(&[2u32; 3])?, other.memory(&[3u32; 3])?);
    let mut got = [0u32; 3];
    // The owner's context is the thread's current one, and stays no obstacle.
    foreign::<u32>(&device, own.bytes(&here), own.number())?.read(3, [0].into_iter(), &mut got)?;
    println!("here: {got:?}");
    let result = foreign::<u32>(&device, other.bytes(&there), None);
    println!("there: {}", result.err().context("memory of another device")?);
    let result = foreign::<u32>(&device, own.bytes(&here), other.number());
    println!("stream: {}", result.err().context("a stream of another device")?);
    Ok(())
}

#[test]
fn memory_and_streams_of_another_device_are_refused() -> Result<()> {
    let Some(text) = emulated("foreign::elsewhere", &[("EMULATED_DEVICES", "2")])? else { return Ok(()) };
    for expected in [
        "here: [2, 2, 2]\n",
        "there: expected memory of cuda:1, got memory of cuda:0\n",
        "stream: expected a stream of cuda:1, got 0x",
        ": CUDA_ERROR_INVALID_HANDLE (",
    ] {
        ensure!(text.contains(expected), "expected {expected:?} in {text}");
    }
    Ok(())
}
