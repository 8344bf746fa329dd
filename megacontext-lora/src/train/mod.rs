//! Training: settings, memory plan, the step loop, and perplexity before and after.
pub mod config;
pub mod eval;
pub mod plan;
pub mod rank;
pub mod trainer;
pub mod work;
