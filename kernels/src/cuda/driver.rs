//! Whether there is a driver, and what devices it has.
//!
//! cudarc panics where the library is missing, so that is looked at first, and so is the version, since a driver of before
//! CUDA 12.0 lacks functions that cudarc looks for when they are called.

use cudarc::driver::{CudaContext, DriverError, result, sys};

use super::device::Capability;
use super::error::{CudaError, loader_said};

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number, from 0.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Its compute capability.
    pub capability: Capability,
    /// Bytes of memory.
    pub memory_total: usize,
    /// Bytes of memory that are free now.
    pub memory_free: usize,
}

/// The driver's version of CUDA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Driver {
    pub major: i32,
    /// Devices, at least one.
    pub devices: usize,
}

impl Driver {
    /// Opens and starts the driver.
    pub fn start() -> Result<Self, CudaError> {
        // SAFETY: libraries of these names are the driver's; opening it runs its initialisers, as any use of a GPU does.
        if !unsafe { sys::is_culib_present() } {
            // SAFETY: as above. What comes back is why not.
            let reason = match unsafe { libloading::Library::new("libcuda.so.1") } {
                Err(error) => loader_said(&error),
                Ok(_) => "it came while this was looked at".into(),
            };
            return Err(CudaError::NoDriver { reason });
        }
        let mut version = 0;
        // SAFETY: `version` outlives the call, which needs no context.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }
            .result()
            .map_err(CudaError::call("cuDriverGetVersion"))?;
        let (major, minor) = (version / 1000, version % 1000 / 10);
        if major < 12 {
            return Err(CudaError::OldDriver { major, minor });
        }
        let none = DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE);
        result::init().map_err(|error| match error {
            error if error == none => CudaError::NoDevice,
            error => CudaError::Call { call: "cuInit".into(), error },
        })?;
        let devices = result::device::get_count().map_err(CudaError::call("cuDeviceGetCount"))?;
        match usize::try_from(devices) {
            Ok(devices) if devices > 0 => Ok(Self { major, devices }),
            _ => Err(CudaError::NoDevice),
        }
    }
}

/// The devices of this machine. Each is opened to ask for its free memory.
///
/// # Errors
/// [`CudaError::NoDriver`], [`CudaError::OldDriver`], [`CudaError::NoDevice`], or what a call says.
pub fn probe() -> Result<Vec<DeviceInfo>, CudaError> {
    let driver = Driver::start()?;
    let info = |ordinal: usize| {
        let context = CudaContext::new(ordinal)?;
        let (memory_free, memory_total) = context.mem_get_info()?;
        let capability = Capability::from(context.compute_capability()?);
        Ok(DeviceInfo { ordinal, name: context.name()?, capability, memory_total, memory_free })
    };
    (0..driver.devices)
        .map(|ordinal| info(ordinal).map_err(CudaError::call(format!("opening device {ordinal}"))))
        .collect()
}
