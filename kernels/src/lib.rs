//! Differentiable operations for training a decoder on long contexts, as candle custom ops.
pub mod error;
