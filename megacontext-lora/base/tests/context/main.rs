//! Gist trees, working contexts and their files: invariants over random trees and edits, plain references, and one test
//! for each thing that is refused.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod horizon;
mod storage;
mod support;
mod tree;
mod working;
