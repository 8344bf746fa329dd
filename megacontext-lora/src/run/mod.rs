//! What a run leaves on disk (DESIGN.md §8), and how an interrupted one finds its way back.
//!
//! [`checkpoint`] holds what training needs to go on.

pub mod checkpoint;
mod tensor_file;
