//! LensNet: for every entry of a working context, how much a closer look is worth, or how little.
//!
//! | to | look at |
//! |---|---|
//! | describe a network | [`LensNetConfig`] |
//! | let entries and tail gists look at each other instead of entries at all others | [`Kind::Dual`], [`dual`] |
//! | score entries, with or without a graph | [`LensNet::forward`], [`LensNet::focus_scores`] |
//! | let nothing impossible be asked for | [`legality`] |
//! | learn from what every expand and collapse was worth | [`counterfactual`] |
//! | learn from which of several contexts predicts better | [`preference`] |
//! | make contexts to compare, at one length | [`variants`] |
//! | bring what they lose to one scale | [`advantage`] |
//! | let scores edit a working context within its budget | [`allocator`] |
//! | let somebody else choose the edits | [`edits`] |
//! | take in new tokens where there is no room | [`room`] |
//! | say how good scores are | [`metrics`] |
//! | measure what every edit of a context is worth | [`utility`] |
//! | train it | [`labels`], [`trainer`] |
//! | choose contexts by it, and see what that is worth | [`focus`], [`validate`] |
//! | save and load it | [`LensNet::save`], [`LensNet::load`], [`LensNet::load_weights`] |
//!
//! A score u lies in [−1, 1]: above 0 the entry should be expanded into what it stands for, below 0 collapsed with its
//! siblings. LensNet knows gists only as embeddings in a working context (`megacontext_base::context`); what makes them is
//! not its business.
//!
//! Shapes: B working contexts, W entries, E width. Everything is f32 on the CPU. Errors are `BaseError`: what was expected,
//! and what came.

pub mod advantage;
pub mod allocator;
mod checkpoint;
mod config;
pub mod counterfactual;
pub mod dual;
pub mod edits;
mod features;
pub mod focus;
pub mod labels;
pub mod legality;
pub mod metrics;
mod network;
pub mod preference;
pub mod room;
mod scoring;
pub mod trainer;
pub mod utility;
pub mod validate;
pub mod variants;

pub use checkpoint::{Expected, FORMAT_VERSION, Identity, Loaded};
pub use config::{Features, Head, Kind, LEVELS, LensNetConfig};
pub use dual::Tail;
pub use network::{Contexts, LensNet};
