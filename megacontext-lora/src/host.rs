//! What the plugin asks of its host, in plain Rust.
//!
//! The ABI glue wraps a host's callbacks in this trait; jobs and sessions know nothing else of the host.

use serde_json::Value;

/// A host, seen from inside the plugin.
pub trait HostApi: Send + Sync {
    /// Something happened: `kind` names it, `json` describes it.
    fn event(&self, kind: &str, json: &Value);

    /// Should the job stop? Asked at least once a step.
    fn cancelled(&self) -> bool;
}
