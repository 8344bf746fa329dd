//! A host's own focus allocator: what it is asked, and how its answer is read.
//!
//! The question, JSON: `entries` (\[first token, level\] of each), `scores` (−1 to 1), `residency` (\[age in iterations, `placed`,
//! `expanded` or `collapsed`\]), `budget` (W_max), `protected` (the newest tokens that stay tokens), `block` (K), `levels`. The
//! answer: none, and the plugin's allocator chooses; `{edits: [{action, start, lod}, …]}`, made in their order; or
//! `{entries: [[first token, level], …]}`, the context for the same tokens as it should be in the end.
//!
//! Units: tokens, entries, iterations. Errors: what the host fails with, an answer that is neither, entries that are no
//! context; edits are checked where they are made (`lensnet_adapter::edits`).

use std::cell::Cell;

use lensnet_adapter::allocator::Action;
use lensnet_adapter::edits::{Allocator, Wanted, towards};
use megacontext_base::context::{Change, Entry, WorkingContext};
use megacontext_base::error::{BaseError, Result};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::host::HostApi;
use crate::jobs::parse;

/// The name of this in errors.
const HOST: &str = "the host's focus allocator";

/// A host as an allocator.
pub struct HostAllocator<'a> {
    host: &'a dyn HostApi,
    answered: Cell<bool>,
}

#[derive(Deserialize)]
struct Answer {
    edits: Option<Vec<GivenEdit>>,
    entries: Option<Vec<(u64, u8)>>,
}

#[derive(Deserialize)]
struct GivenEdit {
    action: Action,
    start: u64,
    lod: u8,
}

impl<'a> HostAllocator<'a> {
    /// Of this host.
    pub fn new(host: &'a dyn HostApi) -> Self {
        Self { host, answered: Cell::new(false) }
    }

    /// Did the host choose when it was last asked?
    pub fn answered(&self) -> bool {
        self.answered.get()
    }
}

impl Allocator for HostAllocator<'_> {
    fn choose(&self, context: &WorkingContext, scores: &[f32]) -> Result<Option<Vec<Wanted>>> {
        let refuse = |message: String| BaseError::network(HOST, message);
        let answer = self.host.allocate(&question(context, scores)).map_err(|e| refuse(e.to_string()))?;
        self.answered.set(answer.is_some());
        let Some(answer) = answer else { return Ok(None) };
        let Answer { edits, entries } = parse(answer).map_err(|e| refuse(e.to_string()))?;
        match (edits, entries) {
            (Some(edits), None) => {
                let wanted = edits
                    .into_iter()
                    .map(|GivenEdit { action, start, lod }| Wanted { action, entry: Entry { start, lod } });
                Ok(Some(wanted.collect()))
            }
            (None, Some(entries)) => {
                let entries: Vec<Entry> =
                    entries.into_iter().map(|(start, lod)| Entry { start, lod }).collect();
                towards(context, &entries).map(Some).map_err(|e| refuse(e.to_string()))
            }
            (edits, _) => {
                let got = if edits.is_some() { "both" } else { "neither" };
                Err(refuse(format!("expected an answer with either edits or entries, got {got}")))
            }
        }
    }
}

fn question(context: &WorkingContext, scores: &[f32]) -> Value {
    let hierarchy = context.hierarchy();
    let entries: Vec<(u64, u8)> = context.entries().iter().map(|entry| (entry.start, entry.lod)).collect();
    let change = |change| match change {
        Change::Placed => "placed",
        Change::Expanded => "expanded",
        Change::Collapsed => "collapsed",
    };
    let residency: Vec<(u32, &str)> = context.residency().iter().map(|r| (r.age, change(r.change))).collect();
    json!({
        "entries": entries,
        "scores": scores,
        "residency": residency,
        "budget": context.limits().budget(),
        "protected": context.limits().protected(),
        "block": hierarchy.block(),
        "levels": hierarchy.levels(),
    })
}
