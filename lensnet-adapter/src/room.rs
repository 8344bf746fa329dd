//! Room for the tokens that a history has got since its working context was chosen.
//!
//! Source: MegaContext's working context, which its code cuts off at the head when it grows too long. Here nothing is lost:
//! what is worth least as it is collapses. The new tokens come in as tokens ([`widen`]); then whole siblings collapse, those of the lowest
//! mean score first, until the budget holds again ([`make_room`]). These collapses have to be, so thresholds and N_diff do not hold
//! for them; what expanded less than `cooldown` iterations ago goes last. The lower index comes first where scores are equal.
//! Gists that were made here have no score yet: only where nothing else is left are scores asked for again.
//!
//! Units: tokens, entries, iterations for ages. Errors: a context with nothing left to collapse; what scoring fails with.
//! Nothing has changed then.

use std::ops::Range;

use megacontext_base::context::{Change, GistTree, Limits, WorkingContext};
use megacontext_base::error::{BaseError, Result};

use crate::allocator::{Action, Edit, check_scores};
use crate::legality;
use crate::metrics::mean;

/// The context with all tokens of the tree, the new ones as tokens, within `limits` but for the budget where that is too small.
///
/// # Errors
/// A tree of other blocks or levels, or with fewer tokens than are covered; a gist in a protected tail that became longer.
pub fn widen(context: &WorkingContext, tree: &GistTree, limits: Limits) -> Result<WorkingContext> {
    let new = tree.len().saturating_sub(context.coverage().end) as usize;
    let budget = limits.budget().max(context.cost() + new);
    // In this order: a gist may end within the newest tokens as they were, and not any more.
    let mut wide = context.with_limits(Limits::new(budget, context.limits().protected())?)?;
    wide.extend_to(tree)?;
    wide.with_limits(Limits::new(budget, limits.protected())?)
}

/// Collapses entries until a context keeps to `limits`. `score` says what they are worth, one for each entry of what it is shown.
///
/// # Errors
/// See the module.
pub fn make_room(
    context: &mut WorkingContext,
    limits: Limits,
    cooldown: u32,
    score: &mut dyn FnMut(&WorkingContext) -> Result<Vec<f32>>,
) -> Result<Vec<Edit>> {
    let mut edited = context.clone();
    let mut edits = Vec::new();
    while edited.cost() > limits.budget() {
        let before = edits.len();
        let scores = score(&edited)?;
        check_scores(&edited, &scores)?;
        for candidate in candidates(&edited, &scores, cooldown) {
            if edited.cost() <= limits.budget() {
                break;
            }
            edits.push(candidate.make(&mut edited)?);
        }
        if edits.len() == before {
            let coverage = edited.coverage();
            let message = format!(
                "budget: expected room for {} entries at least, the coarsest view of the tokens {}..{} with {} protected ones, \
                 got {}",
                edited.cost(),
                coverage.start,
                coverage.end,
                limits.protected(),
                limits.budget()
            );
            return Err(BaseError::WorkingContext { message });
        }
    }
    *context = edited.with_limits(limits)?;
    Ok(edits)
}

/// Siblings that may collapse.
struct Candidate {
    /// First token of the first.
    start: u64,
    score: f32,
    age: u32,
    /// They expanded too short a time ago.
    rests: bool,
}

impl Candidate {
    fn of(context: &WorkingContext, siblings: Range<usize>, scores: &[f32], cooldown: u32) -> Self {
        let residency = &context.residency()[siblings.clone()];
        let of_each: Vec<f64> = scores[siblings.clone()].iter().map(|score| f64::from(*score)).collect();
        Self {
            start: context.entries()[siblings.start].start,
            score: mean(&of_each) as f32,
            age: residency.iter().map(|r| r.age).min().unwrap_or(0),
            rests: residency.iter().any(|r| r.change == Change::Expanded && r.age < cooldown),
        }
    }

    fn make(&self, context: &mut WorkingContext) -> Result<Edit> {
        let at = context.index_at(self.start).expect("edits keep what a context covers");
        let (entry, cost_before) = (context.entries()[at], context.cost());
        context.collapse(at)?;
        let Self { score, age, .. } = *self;
        Ok(Edit { action: Action::Collapse, entry, score, age, cost_before, cost_after: context.cost() })
    }
}

/// All siblings that may collapse, in the order in which they do; no entry is in two.
fn candidates(context: &WorkingContext, scores: &[f32], cooldown: u32) -> Vec<Candidate> {
    let mut scores = scores.to_vec();
    let lods: Vec<u8> = context.entries().iter().map(|entry| entry.lod).collect();
    legality::mask(&mut scores, &lods, context.hierarchy().levels());
    let block = context.hierarchy().block();
    let mut all: Vec<Candidate> = (0..context.cost())
        .filter(|at| context.check_collapse(*at).is_ok())
        .map(|at| Candidate::of(context, at..at + block, &scores, cooldown))
        .collect();
    all.sort_by(|a, b| a.rests.cmp(&b.rests).then(a.score.total_cmp(&b.score)));
    all
}
