//! Traces: what the focus allocator did at every refocus, one JSON object a line.
//!
//! Source: MegaContext's `artifacts/traces/*.jsonl`. A line has
//!   step             number of the refocus;
//!   expanded         edits, in their order: the gist (`block_id`, level in the topmost byte; `start`, `lod`), `utility` (the
//!                    score it was made for), `budget_before` and `budget_after` (entries), `residency` (its age before, iterations);
//!   collapsed        likewise, of the first sibling; `block_id` is the gist that the siblings became;
//!   working_context  the context after: runs of entries of one level, \[start, level, how many\];
//!   latency_ms       what it took; the only field that depends on the clock.
//!
//! A line is written at once, so a killed writer leaves a torn last line at most, which readers pass over. Errors: `Io` with
//! the path; `Data` for a broken line before the end.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use lensnet_adapter::allocator::{Action, Edit, Refocus};
use megacontext_base::context::{Entry, WorkingContext};
use serde::{Deserialize, Serialize};

use crate::error::{IoResultExt, PluginError, Result};

/// One edit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceEdit {
    /// The gist that was expanded, or that the siblings became.
    pub block_id: u64,
    /// First token of the gist, or of the siblings.
    pub start: u64,
    /// Level before.
    pub lod: u8,
    /// The score it was made for.
    pub utility: f32,
    /// Entries before.
    pub budget_before: usize,
    /// Entries after.
    pub budget_after: usize,
    /// Iterations since the gist, or the youngest sibling, had changed.
    pub residency: u32,
}

/// One refocus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trace {
    /// Its number.
    pub step: u64,
    /// Expands, in their order.
    pub expanded: Vec<TraceEdit>,
    /// Collapses, in their order.
    pub collapsed: Vec<TraceEdit>,
    /// The context after: first token, level and number of entries of each run of one level.
    pub working_context: Vec<(u64, u8, usize)>,
    /// Milliseconds.
    pub latency_ms: f64,
}

impl Trace {
    /// What `done` made of a context, which is `after` now.
    pub fn of(step: u64, done: &Refocus, after: &WorkingContext, latency_ms: f64) -> Self {
        let of_action = |action| {
            let edits = done.edits().filter(|edit| edit.action == action);
            edits.map(|edit| TraceEdit::of(edit, after)).collect()
        };
        let mut runs: Vec<(u64, u8, usize)> = Vec::new();
        for entry in after.entries() {
            match runs.last_mut() {
                Some((_, lod, count)) if *lod == entry.lod => *count += 1,
                _ => runs.push((entry.start, entry.lod, 1)),
            }
        }
        Self {
            step,
            expanded: of_action(Action::Expand),
            collapsed: of_action(Action::Collapse),
            working_context: runs,
            latency_ms,
        }
    }
}

impl TraceEdit {
    fn of(edit: &Edit, context: &WorkingContext) -> Self {
        let Edit { entry, score, age, cost_before, cost_after, action } = *edit;
        let lod = if action == Action::Expand { entry.lod } else { entry.lod + 1 };
        Self {
            block_id: context.node_of(Entry { lod, ..entry }).id(),
            start: entry.start,
            lod: entry.lod,
            utility: score,
            budget_before: cost_before,
            budget_after: cost_after,
            residency: age,
        }
    }
}

/// A file of traces, open at its end.
#[derive(Debug)]
pub struct TraceLog {
    path: PathBuf,
    file: File,
}

impl TraceLog {
    /// Opens a file, new or written by an earlier run, and drops what is of step `before` or a later one: a run that resumes
    /// there does it again. A torn last line is dropped too.
    pub fn open(path: impl Into<PathBuf>, before: u64) -> Result<Self> {
        let path = path.into();
        let keep = if path.exists() {
            let bytes = std::fs::read(&path).at(&path)?;
            let kept = lines(&path, &bytes)?.into_iter().take_while(|(trace, _)| trace.step < before);
            kept.last().map_or(0, |(_, end)| end)
        } else {
            0
        };
        let file = OpenOptions::new().append(true).create(true).open(&path).at(&path)?;
        file.set_len(keep as u64).and_then(|()| file.sync_all()).at(&path)?;
        Ok(Self { path, file })
    }

    /// Appends one line.
    pub fn append(&mut self, trace: &Trace) -> Result<()> {
        let mut line = serde_json::to_vec(trace).map_err(|e| PluginError::internal(format!("trace: {e}")))?;
        line.push(b'\n');
        self.file.write_all(&line).at(&self.path)
    }

    /// Makes all lines durable.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_all().at(&self.path)
    }
}

/// All traces of a file.
pub fn read(path: &Path) -> Result<Vec<Trace>> {
    let bytes = std::fs::read(path).at(path)?;
    Ok(lines(path, &bytes)?.into_iter().map(|(trace, _)| trace).collect())
}

/// Traces with the byte that each one's line ends before.
fn lines(path: &Path, bytes: &[u8]) -> Result<Vec<(Trace, usize)>> {
    let mut end = 0;
    let whole = bytes.split_inclusive(|b| *b == b'\n').filter_map(|line| line.strip_suffix(b"\n"));
    whole
        .enumerate()
        .map(|(at, line)| {
            end += line.len() + 1;
            let trace = serde_json::from_slice(line)
                .map_err(|e| PluginError::data(format!("{}: line {}: {e}", path.display(), at + 1)))?;
            Ok((trace, end))
        })
        .collect()
}
