//! The pool that a device's memory comes from.
//!
//! Allocations are ordered on the stream and taken from the device's default pool, which gives unused memory back to the system
//! whenever the stream is waited for, unless it is told to keep it. It is told to: a training step waits several times, and
//! would pay for the same memory anew each time. The pool also counts the most that was in use.
//!
//! Source: CUDA driver API, stream-ordered memory allocator. Units: bytes. Errors: what the driver says.

use std::ffi::c_void;

use cudarc::driver::CudaContext;
use cudarc::driver::result::{device, mem_pool};
use cudarc::driver::sys::{CUmemPool_attribute, CUmemoryPool};

use super::error::CudaError;

/// A device's default pool.
pub(super) struct Pool(CUmemoryPool);

// SAFETY: a pool's handle names it for all threads, and the driver's functions on pools may be called from any.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

impl Pool {
    /// Told to keep what it has; none where the device allocates otherwise.
    pub fn of(context: &CudaContext) -> Result<Option<Self>, CudaError> {
        if !context.has_async_alloc() {
            return Ok(None);
        }
        // SAFETY: the device is the context's, which lives.
        let pool = unsafe { device::get_default_mem_pool(context.cu_device()) };
        let pool = Self(pool.map_err(CudaError::call("cuDeviceGetDefaultMemPool"))?);
        pool.set(CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)?;
        Ok(Some(pool))
    }

    /// The most that was in use since it was asked to forget, or since the program began.
    pub fn most(&self) -> Result<u64, CudaError> {
        let mut bytes = 0u64;
        let into = (&raw mut bytes).cast::<c_void>();
        // SAFETY: the pool is a device's default one, which lives as long as the driver; this attribute is a u64.
        let asked = unsafe {
            mem_pool::get_attribute(self.0, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, into)
        };
        asked.map_err(CudaError::call("cuMemPoolGetAttribute"))?;
        Ok(bytes)
    }

    /// Forgets what was in use before now.
    pub fn forget(&self) -> Result<(), CudaError> {
        self.set(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)
    }

    fn set(&self, attribute: CUmemPool_attribute, mut value: u64) -> Result<(), CudaError> {
        // SAFETY: as in `most`; both attributes are u64s.
        let set = unsafe { mem_pool::set_attribute(self.0, attribute, (&raw mut value).cast::<c_void>()) };
        set.map_err(CudaError::call("cuMemPoolSetAttribute"))
    }
}
