//! The operations of this crate on an NVIDIA GPU: checked launches of the kernels under `cu/`.
//!
//! | on the CPU | here | kernels |
//! |---|---|---|
//! | a slice | cudarc's [`CudaSlice`], [`CudaView`] and [`CudaViewMut`] | |
//! | [`crate::attention::slices`], [`crate::attention::prefix`] | [`attention`] | `attention_bounds.cu`, `attention_forward.cu`, `attention_backward.cu` |
//! | [`crate::rope`] | [`rope`] | `rope.cu` |
//! | [`crate::norm`] | [`norm`] | `norm.cu` |
//! | [`crate::linear`] | [`linear`] | cuBLASLt's, `rows.cu`, `dora.cu` |
//! | [`crate::loss`], from logits on | [`loss`] | `loss.cu` |
//! | [`crate::adamw`] | [`adamw`] | `adamw.cu` |
//! | [`crate::rows`] | [`rows`] | `rows.cu` |
//! | [`crate::mlp`], [`crate::gelu`] | [`mlp`] | `mlp.cu` |
//! | [`crate::embedding`] | [`embedding`] | `embedding.cu` |
//!
//! [`probe`] says which devices there are, or why none; [`Device::open`] gets one ready. The driver is opened when the
//! program asks for it and nothing is linked: the same library works on machines without a GPU. Where machine code comes
//! from is in [`image`]: put into the library when it was built, or compiled by NVRTC on the machine and kept in a cache.
//!
//! A launch is queued on the device's stream and returns at once; [`Device::download`] waits. Everything that can be wrong
//! with it (sizes, alignment, the device that memory belongs to) is refused before it is queued, but for what cuBLASLt itself refuses. What lies in device
//! memory is not looked at: numbers that index memory are taken from host slices and checked there ([`loss::Targets`],
//! [`adamw::TouchedRows`], token ids, row lengths and segments).
//!
//! Memory that others own on the device is read and written as [`Foreign`], behind a stream of theirs; launches do not take it.
//!
//! Shapes and units are those of the CPU's operations. Storage is f32, bf16 or f16 ([`Stored`]), sums are f32. The same
//! inputs give the same bytes where the kernels are this crate's; of cuBLASLt's products that is not known.
//!
//! Errors are [`crate::error::KernelError`] with the expectation and the finding; what the driver and the compiler say is in
//! [`CudaError`]. Left out: several devices at once, graphs of launches.
//!
//! [`CudaSlice`]: cudarc::driver::CudaSlice
//! [`CudaView`]: cudarc::driver::CudaView
//! [`CudaViewMut`]: cudarc::driver::CudaViewMut

pub mod adamw;
mod arguments;
pub mod attention;
mod check;
mod cublaslt;
mod device;
mod driver;
pub mod embedding;
mod error;
mod foreign;
pub mod image;
#[doc(hidden)]
pub mod inside;
mod kernels;
mod libraries;
pub mod linear;
pub mod loss;
pub mod mlp;
pub mod norm;
mod nvrtc;
mod pool;
pub mod rope;
pub mod rows;
mod stored;

pub use device::{Capability, Device};
pub use driver::{DeviceInfo, probe};
pub use error::CudaError;
pub use foreign::Foreign;
pub use stored::{Kind, Stored};

pub use cudarc;
