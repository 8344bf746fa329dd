//! GistNet: K entries of a working context become one gist, a vector in the base model's embedding space that stands for
//! them.
//!
//! | to | look at |
//! |---|---|
//! | describe a network | [`GistNetConfig`] |
//! | make gists, with or without a graph | [`GistNet::forward`], [`GistNet::hierarchy`], [`GistNet::gists`] |
//! | train it | [`trainer`], [`curriculum`], [`losses`], [`GistNet::backward`] |
//! | save and load it | [`GistNet::save`], [`GistNet::load`], [`GistNet::load_weights`] |
//! | ask what gists cost the base model | [`delta_nll`] |
//! | judge gists | [`validate`], [`costs`], [`metrics`], [`GistNet::attention_entropy`] |
//! | build a tree of gists | `megacontext_base::context`, which [`GistNet`] is a source for |
//!
//! Should I use this? If some of the context may be vague: a gist takes the place of K tokens, and of K gists in turn. What it
//! costs in prediction is ΔNLL@H, measured and differentiated over the frozen base model ([`delta_nll`]); the other terms of
//! the loss need nothing but gists ([`losses`]).
//!
//! Shapes: N blocks, K entries of a block, E model width. Inputs are embeddings of tokens as the base's table has them, or
//! gists. Everything is f32 on the CPU. Errors are `BaseError`: what was expected, and what came.

mod checkpoint;
mod config;
pub mod costs;
pub mod curriculum;
pub mod delta_nll;
mod head;
pub mod losses;
pub mod metrics;
mod network;
pub mod passages;
mod source;
pub mod trainer;
mod valid;
pub mod validate;

pub use checkpoint::{Expected, FORMAT_VERSION, Identity, Loaded};
pub use config::{GistNetConfig, Head, Mode, Padding, Pooling};
pub use network::GistNet;
