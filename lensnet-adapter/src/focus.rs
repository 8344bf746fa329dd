//! Working contexts as a policy chooses them: scores, and the focus allocator that follows them.
//!
//! Source: MegaContext's loop of LensNet and focus allocator. The same loop runs with other scores where LensNet has to be held
//! against something: none at all (the coarse beginning stays as it is, which is recency), random ones, and those of an
//! oracle, which are what every edit was measured to be worth just now.
//!
//! Units: entries, tokens, nats. Errors: those of scoring, measuring and allocating; the context is then what it was.

use std::ops::Range;
use std::time::Instant;

use crate::allocator::{AllocatorConfig, Refocus, decide};
use crate::counterfactual::{Scale, targets};
use crate::edits::Allocator;
use crate::legality;
use crate::network::LensNet;
use crate::trainer::{Seen, focus};
use crate::utility;
use megacontext_base::buffers::Buffers;
use megacontext_base::context::{GistTree, HorizonLoss, Limits, WorkingContext};
use megacontext_base::error::Result;
use megacontext_base::random::Random;

/// A history, and what comes after it.
#[derive(Clone, Debug)]
pub struct History {
    /// Its tokens and gists.
    pub tree: GistTree,
    /// The H tokens behind it.
    pub future: Vec<u32>,
    /// The tokens that the future cannot be predicted without, where that is known.
    pub fact: Option<Range<u64>>,
}

/// Where scores come from.
#[derive(Clone, Copy)]
pub enum Policy<'a> {
    /// Nowhere: the context stays as it begins, the newest tokens fine and everything before as coarse as the budget asks for.
    Recency,
    /// Uniform in [−1, 1].
    Random,
    /// A network.
    Lens(&'a LensNet),
    /// What each edit is worth, measured anew for every round.
    Oracle(Scale),
}

/// How contexts are chosen.
pub struct Focus<'a> {
    /// What measures and embeds.
    pub loss: &'a HorizonLoss<'a>,
    /// The allocator's settings.
    pub allocator: &'a AllocatorConfig,
    /// An allocator that is asked first.
    pub other: Option<&'a dyn Allocator>,
    /// Budget and protected tail.
    pub limits: Limits,
    /// Refocuses, one after another.
    pub refocuses: usize,
}

/// A chosen context, and how it came to be.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The context.
    pub context: WorkingContext,
    /// Every refocus, with the context that it left and the first scores it followed.
    pub steps: Vec<Step>,
}

/// One refocus of a context.
#[derive(Clone, Debug)]
pub struct Step {
    /// The context that was scored.
    pub before: WorkingContext,
    /// Its scores, of the first round.
    pub scores: Vec<f32>,
    /// What the allocator did.
    pub refocus: Refocus,
    /// Seconds that scoring and editing took.
    pub seconds: f64,
}

impl Focus<'_> {
    /// The context that every policy begins with.
    ///
    /// # Errors
    /// As [`WorkingContext::rebuild`].
    pub fn begin(&self, history: &History) -> Result<WorkingContext> {
        WorkingContext::rebuild(&history.tree, self.limits, u64::MAX)
    }

    /// What LensNet reads of a context.
    ///
    /// # Errors
    /// As [`Seen::of`].
    pub fn seen(&self, context: &WorkingContext, history: &History) -> Result<Seen> {
        Seen::of(context, &history.tree, self.loss.decoder(), self.loss.rule())
    }

    /// Scores of a context by a policy; none for [`Policy::Recency`].
    ///
    /// # Errors
    /// See the module.
    pub fn scores(
        &self,
        policy: Policy,
        context: &WorkingContext,
        history: &History,
        random: &mut Random,
        buffers: &mut Buffers,
    ) -> Result<Option<Vec<f32>>> {
        let max_lod = context.hierarchy().levels();
        let mut scores = match policy {
            Policy::Recency => return Ok(None),
            Policy::Random => (0..context.cost()).map(|_| random.uniform(-1.0, 1.0) as f32).collect(),
            Policy::Lens(network) => {
                let seen = self.seen(context, history)?;
                return Ok(Some(focus(network, &seen, self.loss.rule(), max_lod)?));
            }
            Policy::Oracle(scale) => {
                let found = utility::measure(
                    self.loss,
                    &history.tree,
                    context,
                    &history.future,
                    None,
                    random,
                    buffers,
                )?;
                let targets = targets(found.now, &found.measured, scale)?;
                targets.into_iter().map(|y| y.unwrap_or(0.0) as f32).collect::<Vec<f32>>()
            }
        };
        let lod: Vec<u8> = context.entries().iter().map(|entry| entry.lod).collect();
        legality::mask(&mut scores, &lod, max_lod);
        Ok(Some(scores))
    }

    /// The context that a policy chooses of a history.
    ///
    /// # Errors
    /// See the module.
    pub fn choose(
        &self,
        policy: Policy,
        history: &History,
        random: &mut Random,
        buffers: &mut Buffers,
    ) -> Result<Chosen> {
        let mut context = self.begin(history)?;
        let mut steps = Vec::new();
        if matches!(policy, Policy::Recency) {
            return Ok(Chosen { context, steps });
        }
        let mut drawn = Random::new(random.next_u64());
        for _ in 0..self.refocuses {
            let begun = Instant::now();
            let before = context.clone();
            let mut first: Option<Vec<f32>> = None;
            let mut score = |context: &WorkingContext| {
                let scores = self.scores(policy, context, history, random, buffers)?.unwrap_or_default();
                first.get_or_insert_with(|| scores.clone());
                Ok(scores)
            };
            context.advance_residency();
            let refocus = decide(self.other, self.allocator, &mut context, &mut score, &mut drawn)?;
            let done = refocus.edits().next().is_none();
            let seconds = begun.elapsed().as_secs_f64();
            steps.push(Step { before, scores: first.unwrap_or_default(), refocus, seconds });
            if done {
                break;
            }
        }
        Ok(Chosen { context, steps })
    }
}

/// Is every token of a span an entry of its own?
pub fn shows(context: &WorkingContext, span: &Range<u64>) -> bool {
    let level = |token| context.index_at(token).map(|at| context.entries()[at].lod);
    span.clone().all(|token| level(token) == Some(0))
}
