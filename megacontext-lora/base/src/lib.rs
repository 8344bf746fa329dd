//! Base model of the plugin: a trainable decoder, LoRA, positions, parameter groups and adapter files.
pub mod random;
pub mod rope;
