//! Edits of a working context that another allocator chose, a host's above all: checked by the context's own rules, and made.
//!
//! Source: MegaContext, where the focus allocator is whatever turns scores into expands and collapses. Edits are made in their
//! order, and each has to be legal in the context that those before it left: an expand needs room, a collapse all siblings as
//! entries that end before the protected tail. Who would rather say what the context should be in the end gets the edits that
//! lead there ([`towards`]).
//!
//! Thresholds, cooldown and N_diff are rules of the allocator in [`crate::allocator`], not of working contexts; they do not
//! hold here.
//!
//! Units: entries for costs, iterations for ages. Errors: the first edit that is not legal, by its number; nothing has
//! changed then.

use std::collections::HashMap;

use megacontext_base::context::{Entry, Node, WorkingContext};
use megacontext_base::error::{BaseError, Result};

use crate::allocator::{Action, Edit};
use crate::metrics::mean;

/// The name of this in errors.
const EDITS: &str = "edits of a working context";

/// An edit that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which.
    pub action: Action,
    /// The gist, or the first of the siblings.
    pub entry: Entry,
}

/// An allocator.
pub trait Allocator {
    /// Chooses edits of a context by one score for each of its entries, legal and finite; none leaves the choice to
    /// [`crate::allocator`].
    ///
    /// # Errors
    /// Its own.
    fn choose(&self, context: &WorkingContext, scores: &[f32]) -> Result<Option<Vec<Wanted>>>;
}

/// Makes edits. Each one's score is that of the gist, or the siblings' mean, by `scores`, one for each entry of the context
/// as it comes; NaN where an edit before it made the entries, which have none.
///
/// # Errors
/// See the module.
pub fn follow(context: &mut WorkingContext, scores: &[f32], wanted: &[Wanted]) -> Result<Vec<Edit>> {
    let scored: HashMap<Entry, f32> = context.entries().iter().copied().zip(scores.iter().copied()).collect();
    let mut edited = context.clone();
    let mut edits = Vec::with_capacity(wanted.len());
    for (number, wanted) in wanted.iter().enumerate() {
        let edit = make(&mut edited, &scored, *wanted).map_err(|error| match error {
            BaseError::WorkingContext { message } => {
                BaseError::network(EDITS, format!("edit {number}: {message}"))
            }
            other => other,
        })?;
        edits.push(edit);
    }
    *context = edited;
    Ok(edits)
}

fn make(context: &mut WorkingContext, scored: &HashMap<Entry, f32>, wanted: Wanted) -> Result<Edit> {
    let Wanted { action, entry } = wanted;
    let at = context.index_at(entry.start).filter(|at| context.entries()[*at] == entry).ok_or_else(|| {
        let message = format!("expected an entry of the context, got {entry}");
        BaseError::WorkingContext { message }
    })?;
    let range = match action {
        Action::Expand => {
            context.check_expand(at)?;
            at..at + 1
        }
        Action::Collapse => {
            context.check_collapse(at)?;
            at..at + context.hierarchy().block()
        }
    };
    let of_each: Option<Vec<f64>> = context.entries()[range.clone()]
        .iter()
        .map(|entry| scored.get(entry).map(|score| f64::from(*score)))
        .collect();
    let age = context.residency()[range].iter().map(|r| r.age).min().unwrap_or(0);
    let cost_before = context.cost();
    match action {
        Action::Expand => context.expand(at)?,
        Action::Collapse => context.collapse(at)?,
    }
    let score = of_each.map_or(f32::NAN, |scores| mean(&scores) as f32);
    Ok(Edit { action, entry, score, age, cost_before, cost_after: context.cost() })
}

/// The edits that make `entries` of a context: all collapses, then all expands, so that none lacks room.
///
/// # Errors
/// When the entries are no context for the same tokens within the same limits.
pub fn towards(context: &WorkingContext, entries: &[Entry]) -> Result<Vec<Wanted>> {
    let target = context.with_entries(entries.to_vec())?;
    let mut wanted = Vec::new();
    for entry in target.entries() {
        if lod_at(context, entry.start) < entry.lod {
            collapse(context, target.node_of(*entry), &mut wanted);
        }
    }
    for entry in context.entries() {
        if lod_at(&target, entry.start) < entry.lod {
            expand(&target, context.node_of(*entry), &mut wanted);
        }
    }
    Ok(wanted)
}

/// The level of the entry that stands for a token, which the context covers.
fn lod_at(context: &WorkingContext, token: u64) -> u8 {
    let at = context.index_at(token).expect("a token that the context covers");
    context.entries()[at].lod
}

fn children(context: &WorkingContext, node: Node) -> impl Iterator<Item = (Node, Entry)> {
    let hierarchy = context.hierarchy();
    let lod = node.lod - 1;
    let indices = hierarchy.children(node).into_iter().flatten();
    indices.map(move |index| {
        let child = Node { lod, index };
        (child, Entry { start: hierarchy.tokens(child).start, lod })
    })
}

/// What makes a node of the finer entries that a context has in its place, from below.
fn collapse(context: &WorkingContext, node: Node, wanted: &mut Vec<Wanted>) {
    for (child, entry) in children(context, node) {
        if lod_at(context, entry.start) < entry.lod {
            collapse(context, child, wanted);
        }
    }
    let start = context.hierarchy().tokens(node).start;
    wanted.push(Wanted { action: Action::Collapse, entry: Entry { start, lod: node.lod - 1 } });
}

/// What makes the finer entries that `target` has in a node's place of it.
fn expand(target: &WorkingContext, node: Node, wanted: &mut Vec<Wanted>) {
    let start = target.hierarchy().tokens(node).start;
    wanted.push(Wanted { action: Action::Expand, entry: Entry { start, lod: node.lod } });
    for (child, entry) in children(target, node) {
        if lod_at(target, entry.start) < entry.lod {
            expand(target, child, wanted);
        }
    }
}
