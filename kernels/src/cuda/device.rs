//! An opened device: context, stream, kernels.

use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, LaunchConfig,
    PushKernelArg, ValidAsZeroBits,
};
use cudarc::nvrtc::Ptx;

use super::driver::Driver;
use super::error::CudaError;
use super::image::{Compiler, Image, Module, cache_folder};
use super::kernels::Kernels;
use super::pool::Pool;
use super::stored::Stored;

/// A device's generation, as NVIDIA counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Capability {
    /// 8 for Ampere and Ada, 9 for Hopper.
    pub major: i32,
    /// Within it.
    pub minor: i32,
}

impl Capability {
    /// The compiler's name for it, for example `sm_90`.
    pub fn target(self) -> String {
        format!("sm_{}{}", self.major, self.minor)
    }
}

impl From<(i32, i32)> for Capability {
    fn from((major, minor): (i32, i32)) -> Self {
        Self { major, minor }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The kernels use what Ampere brought: asynchronous copies, tensor cores for bf16.
const LEAST: Capability = Capability { major: 8, minor: 0 };

/// A GPU with the kernels of this crate loaded. Work is queued on one stream, the context's default one, in the order of the
/// calls; memory on other streams of the same context is waited for as cudarc does it.
pub struct Device {
    stream: Arc<CudaStream>,
    name: String,
    capability: Capability,
    cuda_major: i32,
    shared_limit: usize,
    pool: Option<Pool>,
    pub(super) kernels: Kernels,
}

impl Device {
    /// Opens device number `ordinal` and loads all kernels. Without built-in code ([`super::image`]) the first time takes a
    /// minute or two.
    ///
    /// # Errors
    /// As [`super::probe`]; a number without a device; a device older than 8.0; machine code that cannot be had or that the
    /// driver does not take.
    pub fn open(ordinal: usize) -> Result<Self, CudaError> {
        let mut compiler = None;
        Self::open_with(ordinal, |module, capability, newest| {
            if let Some(bytes) = module.built_in(capability, newest) {
                return Ok(Image { bytes: bytes.into(), origin: "built in".into() });
            }
            let compiler = match &mut compiler {
                Some(compiler) => compiler,
                none => none.insert(Compiler::new(newest, &capability.target(), cache_folder())?),
            };
            compiler.image(module, capability)
        })
    }

    /// As [`Self::open`], with machine code from elsewhere: `image` is asked for each file, for a device of this
    /// capability and a driver of this major version of CUDA.
    ///
    /// # Errors
    /// As [`Self::open`], and those of `image`.
    pub fn open_with(
        ordinal: usize,
        mut image: impl FnMut(Module, Capability, i32) -> Result<Image, CudaError>,
    ) -> Result<Self, CudaError> {
        let driver = Driver::start()?;
        if ordinal >= driver.devices {
            return Err(CudaError::NoSuchDevice { ordinal, count: driver.devices });
        }
        let opening = || CudaError::call(format!("opening device {ordinal}"));
        let context = CudaContext::new(ordinal).map_err(opening())?;
        let name = context.name().map_err(opening())?;
        let capability = Capability::from(context.compute_capability().map_err(opening())?);
        if capability < LEAST {
            return Err(CudaError::OldDevice { ordinal, name, capability });
        }
        let limit = context
            .attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
            .map_err(opening())?
            .max(0) as usize;
        let kernels = Kernels::load(limit, |module| {
            let Image { bytes, origin } = image(module, capability, driver.major)?;
            context.load_module(Ptx::from_binary(bytes.into_owned())).map_err(|error| CudaError::Image {
                module: module.name(),
                target: capability.target(),
                origin,
                error,
            })
        })?;
        let pool = Pool::of(&context)?;
        let (stream, cuda_major) = (context.default_stream(), driver.major);
        Ok(Self { stream, name, capability, cuda_major, shared_limit: limit, pool, kernels })
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.stream.context().ordinal()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its compute capability.
    pub fn capability(&self) -> Capability {
        self.capability
    }

    /// The driver's major version of CUDA: libraries of newer ones are of no use to it.
    pub(super) fn cuda_major(&self) -> i32 {
        self.cuda_major
    }

    /// Bytes of dynamic shared memory that a block may have.
    pub(super) fn shared_limit(&self) -> usize {
        self.shared_limit
    }

    /// The most bytes that were in use at one time since [`Device::forget_most_bytes`]; none where the driver does not count.
    ///
    /// # Errors
    /// What the driver says.
    pub fn most_bytes(&self) -> Result<Option<u64>, CudaError> {
        self.pool.as_ref().map(Pool::most).transpose()
    }

    /// Counts from what is in use now.
    ///
    /// # Errors
    /// What the driver says.
    pub fn forget_most_bytes(&self) -> Result<(), CudaError> {
        self.pool.as_ref().map_or(Ok(()), Pool::forget)
    }

    /// What work is queued on; memory is allocated on it.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Zeros, at least one.
    ///
    /// # Errors
    /// When there is no memory, or nothing is asked for.
    pub fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, count: usize) -> Result<CudaSlice<T>, CudaError> {
        if count == 0 {
            return Err(CudaError::Empty);
        }
        let bytes = count.saturating_mul(size_of::<T>());
        self.stream.alloc_zeros(count).map_err(CudaError::call(format!("allocating {bytes} bytes")))
    }

    /// Memory for values that are written before they matter: what is in it is whatever was there. At least one value.
    ///
    /// # Errors
    /// As [`Device::zeros`].
    pub fn room<T: Stored>(&self, count: usize) -> Result<CudaSlice<T>, CudaError> {
        if count == 0 {
            return Err(CudaError::Empty);
        }
        // SAFETY: every pattern of bits is a value of these types, and the memory is the device's.
        unsafe { self.unset(count) }
    }

    /// A copy of host memory, at least one value.
    ///
    /// # Errors
    /// When there is no memory, or nothing to copy.
    pub fn upload<T: DeviceRepr>(&self, values: &[T]) -> Result<CudaSlice<T>, CudaError> {
        if values.is_empty() {
            return Err(CudaError::Empty);
        }
        let bytes = size_of_val(values);
        self.stream
            .clone_htod(values)
            .map_err(CudaError::call(format!("copying {bytes} bytes to the device")))
    }

    /// A copy in host memory, after the work that was queued before.
    ///
    /// # Errors
    /// Also those of the work that was queued before.
    pub fn download<T: DeviceRepr + Clone + Default>(
        &self,
        of: &impl DevicePtr<T>,
    ) -> Result<Vec<T>, CudaError> {
        let mut values = vec![T::default(); of.len()];
        if !values.is_empty() {
            self.stream
                .memcpy_dtoh(of, &mut values)
                .and_then(|()| self.stream.synchronize())
                .map_err(CudaError::call(format!("copying {} bytes from the device", of.num_bytes())))?;
        }
        Ok(values)
    }

    /// Waits for all work that was queued.
    ///
    /// # Errors
    /// Those of that work.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.stream.synchronize().map_err(CudaError::call("waiting for the device"))
    }

    /// Memory that is not set.
    ///
    /// # Safety
    /// It is written before it is read.
    pub(super) unsafe fn unset<T: DeviceRepr>(&self, count: usize) -> Result<CudaSlice<T>, CudaError> {
        let bytes = count.max(1).saturating_mul(size_of::<T>());
        // SAFETY: the caller's promise.
        unsafe { self.stream.alloc(count.max(1)) }
            .map_err(CudaError::call(format!("allocating {bytes} bytes")))
    }

    /// Queues a launch of a kernel that takes one struct.
    ///
    /// # Safety
    /// `arguments` is what the kernel takes, and all its accesses lie in memory that lives until they are done.
    pub(super) unsafe fn launch(
        &self,
        function: &CudaFunction,
        config: LaunchConfig,
        arguments: &impl DeviceRepr,
    ) -> Result<(), CudaError> {
        let mut launch = self.stream.launch_builder(function);
        launch.arg(arguments);
        // SAFETY: the caller's promise.
        launched(unsafe { launch.launch(config) })
    }
}

/// A grid of blocks, threads of a block, bytes of dynamic shared memory.
pub(super) fn config(grid: [u32; 3], threads: u32, shared: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: grid.into(),
        block_dim: (threads, 1, 1),
        shared_mem_bytes: u32::try_from(shared).unwrap_or(u32::MAX),
    }
}

/// What a launch gave back.
pub(super) fn launched<T>(result: Result<T, DriverError>) -> Result<(), CudaError> {
    result.map(|_| ()).map_err(CudaError::call("launching a kernel"))
}
