//! Being written.
pub mod data;
pub mod error;
pub mod run;
