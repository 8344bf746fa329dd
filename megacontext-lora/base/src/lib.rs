//! The base model of the plugin: a trainable decoder and everything that belongs to it.
//!
//! [`decoder`] runs and trains a decoder, described as data by [`architecture`], whose parameters live in a
//! [`params::ParamStore`], each in one group;
//! [`device`] is what passes run on;
//! [`gradients`] holds their gradients and the optimiser; [`buffers`] is the memory of a pass, and how much it is; [`lora`] attaches low-rank updates; [`rope`] maps positions to
//! angles. [`config`], [`weights`] and [`tokenizer`] read a Hugging Face folder, [`hf_export`] writes one, [`adapter`]
//! reads and writes PEFT folders, [`merge`] folds one into its base, [`lora_only`] and
//! [`gguf`] write it for readers that take LoRA factors alone. [`atomic`] makes folders appear whole or not at all;
//! [`generate`] continues prompts over a cache of keys and values. [`context`] keeps a long history at several resolutions
//! and the working context that is shown of it.
//! [`tower`] is the stack of blocks that GistNet and LensNet share, [`network_file`] the file of such a network.
//! [`random`] is the one source of random numbers.
//!
//! Errors are [`error::BaseError`]: what was refused, what was expected, what was found, and where.

pub mod adapter;
mod adapter_config;
pub mod architecture;
pub mod atomic;
mod block;
pub mod buffers;
pub mod config;
pub mod context;
pub mod decoder;
pub mod device;
pub mod error;
mod families;
pub mod generate;
pub mod gguf;
pub mod gradients;
pub mod hf_export;
pub mod lora;
pub mod lora_only;
mod machine;
pub mod merge;
mod names;
pub mod network_file;
mod norms;
pub mod params;
mod projection;
pub mod random;
pub mod rope;
mod stack;
pub mod tokenizer;
pub mod tower;
pub mod weights;
