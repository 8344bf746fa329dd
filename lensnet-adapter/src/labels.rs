//! Labels: what was measured of working contexts, to learn from as often as it stays true.
//!
//! Source: MegaContext's JT2. Labels are made on the contexts that a policy chooses with the allocator (a share of them
//! by random focus, so that what is not preferred is tried too); then either every edit of the context is measured
//! ([`crate::utility`]) or several variants of it are ([`crate::variants`]). They hold for the base model, the adapter and
//! the gists that they were measured with, and for nothing else.
//!
//! Units: nats per token. Errors: those of choosing and measuring; entries that are no context of the history.

use megacontext_base::buffers::Buffers;
use megacontext_base::context::{Entry, WorkingContext};
use megacontext_base::error::Result;
use megacontext_base::random::Random;
use serde::{Deserialize, Serialize};

use crate::counterfactual::{Scale, targets};
use crate::focus::{Focus, History, Policy};
use crate::trainer::Lesson;
use crate::utility::{self, Utilities};

/// An entry as it is stored: the first token of its span, and its level.
pub type Stored = (u64, u8);

/// What was measured of one history's contexts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Label {
    /// Edits of one context.
    Utilities {
        /// Number of the history.
        history: usize,
        /// The context.
        entries: Vec<Stored>,
        /// What its edits came to.
        #[serde(flatten)]
        utilities: Utilities,
    },
    /// Several contexts.
    Variants {
        /// Number of the history.
        history: usize,
        /// The contexts.
        contexts: Vec<Vec<Stored>>,
        /// Loss@H of each.
        losses: Vec<f64>,
    },
}

fn stored(context: &WorkingContext) -> Vec<Stored> {
    context.entries().iter().map(|entry| (entry.start, entry.lod)).collect()
}

impl Label {
    /// Measures edits, at most `most`, of the context that `policy` chooses.
    ///
    /// # Errors
    /// See the module.
    pub fn of_edits(
        focus: &Focus,
        policy: Policy,
        history: (usize, &History),
        most: Option<usize>,
        random: &mut Random,
        buffers: &mut Buffers,
    ) -> Result<Self> {
        let (number, history) = history;
        let context = focus.choose(policy, history, random, buffers)?.context;
        let utilities =
            utility::measure(focus.loss, &history.tree, &context, &history.future, most, random, buffers)?;
        Ok(Self::Utilities { history: number, entries: stored(&context), utilities })
    }

    /// Measures contexts of one history whole.
    ///
    /// # Errors
    /// See the module.
    pub fn of_variants(
        focus: &Focus,
        contexts: &[WorkingContext],
        history: (usize, &History),
        buffers: &mut Buffers,
    ) -> Result<Self> {
        let (number, history) = history;
        let all: Vec<&WorkingContext> = contexts.iter().collect();
        let losses = focus.loss.measure(&history.tree, &all, &history.future, buffers)?;
        Ok(Self::Variants { history: number, contexts: contexts.iter().map(stored).collect(), losses })
    }

    /// Number of the history.
    pub fn history(&self) -> usize {
        match self {
            Self::Utilities { history, .. } | Self::Variants { history, .. } => *history,
        }
    }

    /// What LensNet learns from it.
    ///
    /// # Errors
    /// See the module.
    pub fn lesson(&self, focus: &Focus, history: &History, scale: Scale) -> Result<Lesson> {
        let seen = |entries: &[Stored]| {
            let entries = entries.iter().map(|(start, lod)| Entry { start: *start, lod: *lod }).collect();
            focus.seen(&WorkingContext::new(entries, &history.tree, focus.limits)?, history)
        };
        Ok(match self {
            Self::Utilities { entries, utilities, .. } => Lesson::Utilities {
                seen: seen(entries)?,
                targets: targets(utilities.now, &utilities.measured, scale)?,
            },
            Self::Variants { contexts, losses, .. } => Lesson::Preference {
                seen: contexts.iter().map(|entries| seen(entries)).collect::<Result<_>>()?,
                losses: losses.clone(),
            },
        })
    }
}
