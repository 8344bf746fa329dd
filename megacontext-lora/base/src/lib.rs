//! Base model of the plugin: a trainable decoder, LoRA, positions, parameter groups and adapter files.
mod block;
pub mod config;
pub mod error;
pub mod random;
pub mod rope;
pub mod decoder;
pub mod gradients;
pub mod lora;
pub mod params;
pub mod weights;
pub mod adapter;
mod adapter_config;
pub mod atomic;
pub mod hf_export;
pub mod merge;
pub mod tokenizer;
