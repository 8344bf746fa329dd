//! Every operation against finite differences of a plain f64 reference written out here.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod adapted;
mod dora;
mod embedding;
mod gelu;
mod linear;
mod loss;
mod mlp;
mod norm;
mod optimiser;
mod rope;
mod rows;
mod skinny;
mod support;
mod vjp;
