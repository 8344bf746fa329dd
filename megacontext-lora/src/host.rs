//! What the plugin asks of its host, in plain Rust.
//!
//! The ABI glue wraps a host's callbacks in this trait; jobs and sessions know nothing else of the host.

use serde_json::Value;

use crate::error::Result;
use crate::learned::Learned;

/// What becomes of a phase. What an answer does depends on where it is given:
///
/// | | session, phase entered | session, phase left | `extend`, phase entered | `extend`, phase left | `train`, phase entered | `train`, phase left |
/// |---|---|---|---|---|---|---|
/// | `Continue` | the phase is open | what was learned stays | training begins | the adapter is written | it begins | kept, or undone by its bounds |
/// | `RollBack` | `Cancelled`, nothing has changed | all is as before the phase | as `Stop` | as `Stop` | it is left out | it is undone |
/// | `Stop` | as `RollBack` | as `Continue` | `Cancelled` before training | `Cancelled`, no adapter is written | `Cancelled` | as `Continue`, then `Cancelled` |
///
/// `extend` keeps its checkpoints whatever the answer, so a later run can resume and ask again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Go on; keep what was learned.
    Continue,
    /// Undo the phase: what learned is as it was when the phase began.
    RollBack,
    /// Go no further.
    Stop,
}

/// A host, seen from inside the plugin.
pub trait HostApi: Send + Sync {
    /// Something happened: `kind` names it, `json` describes it.
    fn event(&self, kind: &str, json: &Value);

    /// Should the job stop? Asked at least once a step.
    fn cancelled(&self) -> bool;

    /// Documents `start .. start + count` of the host's split `split`, the NAME of an entry `host:NAME` in a job's data;
    /// fewer than `count` means there are no more.
    fn documents(&self, split: &str, start: u64, count: u64) -> Result<Vec<String>> {
        let _ = (split, start, count);
        Ok(Vec::new())
    }

    /// Edits of a working context by a focus allocator of the host's own; none leaves them to the plugin's. What is asked and
    /// answered is at [`crate::host_allocator`]. A session holds no lock here: the host may read from it.
    fn allocate(&self, json: &Value) -> Result<Option<Value>> {
        let _ = json;
        Ok(None)
    }

    /// A phase begins. A session holds no lock here: the host may read from it; calls that would change it, `save` and
    /// `export` are refused until this returns.
    fn phase_entered(&self, json: &Value) -> Answer {
        let _ = json;
        Answer::Continue
    }

    /// A phase ended. The same holds as for [`HostApi::phase_entered`].
    fn phase_left(&self, json: &Value) -> Answer {
        let _ = json;
        Answer::Continue
    }

    /// A moment of the job `train`: `phase_entering`, `step`, `evaluation`, `labels_stale`, `checkpoint`. What an answer does is at
    /// `Host::hook` of the ABI.
    fn hook(&self, kind: &str, json: &Value) -> Answer {
        let _ = (kind, json);
        Answer::Continue
    }

    /// What the job `train` holds where it is about to ask `when` (`phase_entered`, `phase_left`) with this JSON, to be read.
    fn parameters(&self, when: &str, json: &Value, learned: &Learned) {
        let _ = (when, json, learned);
    }
}

/// A host that hears nothing and never interrupts.
#[cfg(test)]
pub(crate) struct Silent;

#[cfg(test)]
impl HostApi for Silent {
    fn event(&self, _: &str, _: &Value) {}

    fn cancelled(&self) -> bool {
        false
    }
}
