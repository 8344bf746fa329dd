//! What a run leaves on disk, and how an interrupted one finds its way back.
//!
//! [`folder`] guards the run folder and writes its small files, [`checkpoint`] holds what training needs to go on,
//! [`metrics`] is the log of what was measured and [`tensorboard`] the same for TensorBoard ([`Telemetry`] writes both),
//! [`summary`] the outcome; [`labels`] holds what was measured to learn from, [`traces`] what the focus allocator did.
//! Each file is whole or absent, or is cut back to what the checkpoint knows, so that an interrupted and an uninterrupted
//! run end with the same bytes.

pub mod cells;
pub mod checkpoint;
pub mod folder;
pub mod label_log;
pub mod labels;
pub mod metrics;
pub mod summary;
mod telemetry;
pub(crate) mod tensor_file;
pub mod tensorboard;
pub mod traces;

pub use telemetry::Telemetry;
