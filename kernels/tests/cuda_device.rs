//! The launches of `megacontext_kernels::cuda` against the CPU's operations: on a GPU where the probe finds one, otherwise
//! on the emulated driver of `cu/emulate/driver.cpp`, which needs a C++ compiler and is skipped with a line where there is
//! none.
//!
//! Bounds, relative to the greatest value: 1e-4 for f32, 2e-2 for bf16, 5e-3 for f16.

#[path = "cuda_device/attention.rs"]
mod attention;
mod emulated;
#[path = "cuda_device/foreign.rs"]
mod foreign;
#[path = "cuda_device/images.rs"]
mod images;
#[path = "cuda_device/inside.rs"]
mod inside;
#[path = "cuda_device/layers.rs"]
mod layers;
#[path = "cuda_device/linear.rs"]
mod linear;
#[path = "cuda_device/opening.rs"]
mod opening;
#[path = "cuda_device/ops.rs"]
mod ops;
#[path = "cuda_device/probing.rs"]
mod probing;
#[path = "cuda_device/rejects.rs"]
mod rejects;
#[path = "cuda_device/rows.rs"]
mod rows;
#[path = "cuda_device/support.rs"]
mod support;
