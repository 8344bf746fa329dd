//! The program on a GPU, from its command line to its files, against the same program on the processor.
//!
//! The GPU is the emulated one of `kernels/cu/emulate`, in a process that knows nothing of emulation: the loader finds its driver,
//! compiler and cuBLASLt under their names. It needs a C++ compiler and is skipped with a line where there is none.
//!
//! The plugin too, in a host that has its tensors on the GPU (`tensors`): the same bytes as from the host's own.
//!
//! Bounds: losses and perplexities of f32 1e-3, tensors 1e-3 of their greatest value; numbers of networks' runs and of a cycle, in
//! which what was learned decides what is learned next, 1e-2 of each value.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "../../kernels/tests/emulated/compiler.rs"]
mod compiler;
#[path = "../../kernels/tests/emulated/libraries.rs"]
mod libraries;

#[path = "gpu/choosing.rs"]
mod choosing;
#[path = "gpu/cycle.rs"]
mod cycle;
#[path = "gpu/extending.rs"]
mod extending;
#[path = "gpu/generating.rs"]
mod generating;
#[path = "gpu/host.rs"]
mod host;
#[path = "gpu/networks.rs"]
mod networks;
#[path = "gpu/support.rs"]
mod support;
#[path = "gpu/telling.rs"]
mod telling;
#[path = "gpu/tensors.rs"]
mod tensors;
