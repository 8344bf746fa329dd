//! Rotary positions: which angle a position gets, how a context is stretched, how vague positions blur.
//!
//! Source: RoPE (Su et al. 2021), the scalings of [`scaling`], Gaussian damping (MegaContext's positional encoding: a
//! position known only as N(mu, sigma²) keeps the expectation of its rotation, which is the rotation of mu shrunk by
//! exp(−½(ω·sigma)²) in each band).
//!
//! | to | look at |
//! |---|---|
//! | get tables of positions | [`Rope::sequence`], [`Rope::at`], [`Rope::place`] |
//! | stretch a model as a user asks | [`Stretched::scaling`] |
//! | read or write a scaling | [`RopeKeys`], [`RopeScaling::to_json`] |
//! | place the entries of a working context | [`SigmaRule`] |
//! | let sigma learn | [`SIGMA`], [`Entries::scales`] |
//! | change what a model was pre-trained with | [`PositionOptions`] |
//!
//! Units: mu and sigma in tokens, angles in radians.
//!
//! Left out on purpose: how heads are turned by the tables (`megacontext_kernels::rope`), and which layers do (the
//! decoder).

mod choice;
mod keys;
mod options;
pub mod scaling;
mod sigma;
mod tables;

pub use choice::{ScalingChoice, Stretched};
pub use keys::RopeKeys;
pub use options::PositionOptions;
pub use scaling::RopeScaling;
pub use sigma::{MOST_LEVELS, SIGMA, SigmaPreset, SigmaRule, Spread, sigma_scales};
pub use tables::{Entries, Rope, RopeTables, damping};
