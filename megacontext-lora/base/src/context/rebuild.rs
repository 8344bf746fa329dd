//! Working contexts made anew: the newest tokens alone, or a whole history that is coarse as far back as it has to be.
//!
//! Source: MegaContext's baseline and the rebuild of its focus allocator: the recent tail as tokens, what is before it
//! greedily coarsened until it fits. Here greedily means: level by level, the oldest first, and no block more than needed;
//! so a level is only begun when everything before the tail is as coarse as the one below allows.
//!
//! Units: tokens; entries for the budget. Errors: an empty history, a budget that even the coarsest entries exceed.

use std::ops::Range;

use super::hierarchy::Hierarchy;
use super::tree::GistTree;
use super::working::{Entry, Limits, WorkingContext, fail};
use crate::error::Result;

impl WorkingContext {
    /// The newest tokens, as tokens: as many as there are and the budget takes.
    pub fn recent(tree: &GistTree, limits: Limits) -> Result<Self> {
        let start = tree.len().saturating_sub(limits.budget() as u64);
        Self::new((start..tree.len()).map(|start| Entry { start, lod: 0 }).collect(), tree, limits)
    }

    /// The newest `newest` tokens (`u64::MAX` for all), with the protected tail as tokens and the rest no coarser than the
    /// budget asks for.
    ///
    /// # Errors
    /// An empty history; more entries than the budget though all are as coarse as they can be.
    pub fn rebuild(tree: &GistTree, limits: Limits, newest: u64) -> Result<Self> {
        let hierarchy = tree.hierarchy();
        let end = tree.len();
        let start = end.saturating_sub(newest);
        let tail = end.saturating_sub(limits.protected()).max(start);
        let cost = |lod| count(hierarchy, start..tail, lod) + (end - tail);
        let budget = limits.budget() as u64;
        let Some(lod) = (0..=hierarchy.levels()).find(|lod| cost(*lod) <= budget) else {
            return fail(format!(
                "budget: expected at least {} entries for {} tokens of which {} are protected, got {budget}",
                cost(hierarchy.levels()),
                end - start,
                end - tail
            ));
        };
        let mut entries = Vec::with_capacity(limits.budget().min((end - start) as usize));
        let fine = match lod.checked_sub(1) {
            None => start..tail,
            Some(below) => {
                let blocks = (cost(below) - budget).div_ceil(hierarchy.block() as u64 - 1);
                let span = hierarchy.span(lod);
                let cut = (start.div_ceil(span) + blocks) * span;
                tile(hierarchy, start..cut, lod, &mut entries);
                cut..tail
            }
        };
        tile(hierarchy, fine, lod.saturating_sub(1), &mut entries);
        tile(hierarchy, tail..end, 0, &mut entries);
        Self::new(entries, tree, limits)
    }
}

/// The whole nodes of a level within a range: the tokens they stand for; none where there is no such node.
fn whole(hierarchy: Hierarchy, range: &Range<u64>, lod: u8) -> Option<Range<u64>> {
    let span = hierarchy.span(lod);
    let nodes = range.start.div_ceil(span)..range.end / span;
    (nodes.start < nodes.end).then(|| nodes.start * span..nodes.end * span)
}

/// Entries of at most this level that tile a range, at least.
fn count(hierarchy: Hierarchy, range: Range<u64>, lod: u8) -> u64 {
    if lod == 0 {
        return range.end - range.start;
    }
    match whole(hierarchy, &range, lod) {
        None => count(hierarchy, range, lod - 1),
        Some(nodes) => {
            count(hierarchy, range.start..nodes.start, lod - 1)
                + (nodes.end - nodes.start) / hierarchy.span(lod)
                + count(hierarchy, nodes.end..range.end, lod - 1)
        }
    }
}

/// Those entries, added to `entries`.
fn tile(hierarchy: Hierarchy, range: Range<u64>, lod: u8, entries: &mut Vec<Entry>) {
    match whole(hierarchy, &range, lod) {
        None if lod == 0 => {}
        None => tile(hierarchy, range, lod - 1, entries),
        Some(nodes) => {
            if lod > 0 {
                tile(hierarchy, range.start..nodes.start, lod - 1, entries);
            }
            let starts = nodes.clone().step_by(hierarchy.span(lod) as usize);
            entries.extend(starts.map(|start| Entry { start, lod }));
            if lod > 0 {
                tile(hierarchy, nodes.end..range.end, lod - 1, entries);
            }
        }
    }
}
