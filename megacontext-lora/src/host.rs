//! What the plugin asks of its host, in plain Rust.
//!
//! The ABI glue wraps a host's callbacks in this trait; jobs and sessions know nothing else of the host.

use serde_json::Value;

use crate::error::Result;

/// What becomes of a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Go on.
    Continue,
    /// Undo the phase: what learned is as it was when the phase began.
    RollBack,
    /// End the job here, in good order.
    Stop,
}

/// A host, seen from inside the plugin.
pub trait HostApi: Send + Sync {
    /// Something happened: `kind` names it, `json` describes it.
    fn event(&self, kind: &str, json: &Value);

    /// Should the job stop? Asked at least once a step.
    fn cancelled(&self) -> bool;

    /// Documents `start .. start + count` of the host's split `split`; fewer than `count` means there are no more.
    fn documents(&self, split: &str, start: u64, count: u64) -> Result<Vec<String>> {
        let _ = (split, start, count);
        Ok(Vec::new())
    }

    /// A phase begins.
    fn phase_entered(&self, json: &Value) -> Answer {
        let _ = json;
        Answer::Continue
    }

    /// A phase ended.
    fn phase_left(&self, json: &Value) -> Answer {
        let _ = json;
        Answer::Continue
    }
}
