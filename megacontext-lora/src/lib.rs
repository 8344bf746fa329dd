//! The MegaContext plugin: LongLoRA-style adaptation of a base model, as jobs and sessions behind a stable ABI.
pub mod bpe;
pub mod corpus;
pub mod data;
pub mod error;
pub mod glue;
pub mod ngram;
pub mod report;
pub mod run;
pub mod host;
pub mod jobs;
pub mod train;
pub mod session;
