//! Differentiable operations for training a decoder on long contexts, on candle tensors.
//!
//! Two layers. Custom operations for candle's tape, each a named struct with its forward and backward side by side:
//! [`attention::attention`], [`linear::linear`], [`norm::rms_norm`], [`norm::layer_norm`], [`rope::rope`],
//! [`mlp::swiglu`], [`mlp::relu2`]. Underneath, the same work on slices, for composites that walk their graph themselves:
//! [`attention::slices`], [`gemm`], [`linear::Layer`], and the `*_into`, `*_add` and `*_in_place` functions beside each
//! operation. The loss over the output head ([`loss`]), embeddings ([`embedding`]) and the optimiser ([`adamw`]) exist on
//! slices only.
//!
//! All of it runs on the CPU; with the feature `cuda`, attention, RoPE, norms, linear layers, activations, embeddings, losses over logits
//! and AdamW also run on buffers of an NVIDIA GPU (module `cuda`). Tensors are f32; slices are stored in f32 or bf16 ([`store`]) and computed in
//! f32, but for products, which [`precision`] may take in bf16. Code is compiled for AVX-512, AVX2 with FMA and any
//! machine, and chosen when the program runs ([`cpu::level`]). The same inputs and the same number of threads give the
//! same bytes.
//!
//! Errors are [`error::KernelError`]: operation, expectation, finding.

pub mod adamw;
pub mod attention;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod embedding;
pub mod error;
pub mod gelu;
pub mod gemm;
pub mod linear;
pub mod loss;
pub mod math;
mod micro;
pub mod mlp;
pub mod norm;
pub mod precision;
pub mod rope;
pub mod rows;
pub mod skinny;
pub mod store;
pub mod vjp;
