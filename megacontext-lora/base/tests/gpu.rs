//! The decoder on a GPU against the same decoder on the processor: losses, gradients, training, rows that continue documents,
//! generation, the networks' blocks.
//!
//! Runs on the first GPU where there is one, otherwise on the emulated device of `kernels/cu/emulate`, which needs a C++
//! compiler and is skipped with a line where there is none.
//!
//! Bounds: f32 1e-4 of the greatest value of each gradient; rounded classes by their distance from f32, beside the processor's.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

#[path = "gpu/adapters.rs"]
mod adapters;
#[path = "gpu/documents.rs"]
mod documents;
#[path = "../../../kernels/tests/emulated/mod.rs"]
mod emulated;
#[path = "gpu/generating.rs"]
mod generating;
#[path = "gpu/memory.rs"]
mod memory;
mod models;
#[path = "gpu/networks.rs"]
mod networks;
#[path = "gpu/optimizing.rs"]
mod optimizing;
#[path = "gpu/steps.rs"]
mod steps;
#[path = "gpu/support.rs"]
mod support;
