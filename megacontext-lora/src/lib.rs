//! The MegaContext plugin: LongLoRA-style adaptation of a base model, as jobs and sessions behind a stable ABI.
//!
//! A host loads the built library through `megacontext-lora-abi` and never sees this crate; [`glue`] is the one module
//! that knows the ABI's types. Inside it is plain Rust: [`session`] holds a model for a host, [`jobs`] runs whole tasks,
//! [`learned`] is what either lets a host read, [`train`] is the step loop with its settings, plan and evaluation, [`run`]
//! and [`report`] are what a run leaves on disk, [`data`], [`corpus`], [`bpe`] and [`ngram`] are text, [`untrusted`] is
//! what fuzzers call.
//!
//! Errors are [`error::PluginError`]: what failed, what was expected, what came.

pub mod bpe;
pub mod corpus;
pub mod data;
pub mod error;
mod fault;
pub mod glue;
pub mod host;
pub mod host_allocator;
pub mod jobs;
pub mod learned;
pub mod ngram;
pub mod report;
pub mod run;
pub mod session;
pub mod train;
pub mod untrusted;
