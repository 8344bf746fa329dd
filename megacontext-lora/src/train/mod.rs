//! Training: settings, memory plan, the step loop, and what is measured of a model: perplexity, passkeys.
pub mod config;
pub mod cycle;
pub mod device_plan;
pub mod eval;
pub mod gistnet;
pub mod histories;
pub(crate) mod labelling;
pub mod lensnet;
pub mod passkey;
pub mod plan;
pub mod planted;
pub mod rank;
pub mod trainer;
pub mod work;
