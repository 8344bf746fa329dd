//! Differentiable operations for training a decoder on long contexts, as candle custom ops.
pub mod adamw;
pub mod attention;
pub mod cpu;
pub mod embedding;
pub mod error;
pub mod gemm;
pub mod linear;
pub mod loss;
pub mod math;
pub mod mlp;
pub mod norm;
pub mod rope;
pub mod vjp;
