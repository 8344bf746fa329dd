//! Being written.
pub mod corpus;
pub mod data;
pub mod error;
pub mod run;
