//! Being written.
pub mod error;
