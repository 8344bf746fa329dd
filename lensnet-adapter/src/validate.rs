//! What a LensNet is worth on held-out histories: loss@H of the contexts that it chooses, beside those of other policies with
//! the same budget, and how far its scores can be trusted.
//!
//! Source: MegaContext's validation of LensNet, and what it leaves to be shown: a context that follows LensNet must predict
//! better than one that follows chance or recency, and comes close to one that follows what every edit is really worth.
//! The contexts of all policies begin the same and keep to the same budget. Means and their standard errors are over
//! histories; differences are paired, history by history.
//!
//! Units: nats per token, entries, iterations. Errors: those of choosing and measuring; no history.

use std::collections::BTreeMap;

use megacontext_base::buffers::Buffers;
use megacontext_base::context::WorkingContext;
use megacontext_base::error::{BaseError, Result};
use megacontext_base::random::Random;
use serde::{Deserialize, Serialize};

use crate::config::NETWORK;
use crate::counterfactual::{Scale, targets};
use crate::focus::{Focus, History, Policy, shows};
use crate::metrics::{self, Part, mean};
use crate::network::LensNet;
use crate::trainer::score;
use crate::utility::{self, Utilities};

/// What LensNet is held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    /// See [`Policy::Recency`].
    Recency,
    /// See [`Policy::Random`].
    Random,
    /// See [`Policy::Oracle`].
    Oracle,
}

impl Reference {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Recency, Self::Random, Self::Oracle];

    /// As in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Recency => "recency",
            Self::Random => "random",
            Self::Oracle => "oracle",
        }
    }
}

/// What a policy came to on every history.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Loss@H by history.
    pub losses: Vec<f64>,
    /// Does the context show the fact as tokens? By history, where facts are known.
    pub shown: Vec<bool>,
}

impl Outcome {
    /// Mean loss@H.
    pub fn loss(&self) -> f64 {
        mean(&self.losses)
    }

    /// Share of histories whose fact is shown; none where facts are not known.
    pub fn shows(&self) -> Option<f64> {
        let count = self.shown.iter().filter(|shown| **shown).count();
        (!self.shown.is_empty()).then(|| count as f64 / self.shown.len() as f64)
    }
}

/// What does not depend on the network: measured once.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct References {
    /// By policy.
    pub outcomes: BTreeMap<Reference, Outcome>,
    /// What every edit of the contexts that policies begin with is worth, by history.
    pub utilities: Vec<Utilities>,
}

/// A difference of two policies' losses, history by history.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Mean of LensNet's loss less the other's; below 0 LensNet is better.
    pub mean: f64,
    /// Standard error of that mean.
    pub error: f64,
}

/// What a network was measured to be worth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Histories measured.
    pub histories: usize,
    /// Mean loss@H of LensNet's contexts.
    pub loss_at_h: f64,
    /// What it came to on every history.
    pub outcome: Outcome,
    /// Against the others.
    pub against: BTreeMap<Reference, Difference>,
    /// 1 where LensNet is as good as the oracle, 0 where it is as good as recency; none where the oracle is no better.
    pub of_oracle: Option<f64>,
    /// Pairs of entries that scores rank as their utilities do.
    pub ranking_accuracy: Option<f64>,
    /// Correlation of scores and utilities.
    pub pearson: Option<f64>,
    /// |P − N|/(P + N) of the scores.
    pub budget_balance: Option<f64>,
    /// Part of the scores that ask for nothing impossible.
    pub legality_rate: Option<f64>,
    /// Mean edits of a refocus over entries.
    pub swap_rate: f64,
    /// Mean age of entries.
    pub residency_mean: f64,
    /// Mean entries over the budget.
    pub utilization: f64,
    /// Histories whose fact the chosen context shows as tokens.
    pub facts_shown: Option<f64>,
}

/// Held-out histories, and how contexts are chosen of them.
pub struct Validator<'a> {
    /// How contexts are chosen.
    pub focus: &'a Focus<'a>,
    /// The histories.
    pub histories: &'a [History],
    /// What nats come to as targets.
    pub scale: Scale,
    /// Of random focus.
    pub seed: u64,
}

impl Validator<'_> {
    fn random(&self, history: usize) -> Random {
        Random::named(self.seed, &format!("random focus of held-out history {history}"))
    }

    /// Measures what needs no network. `going` is asked before every history whether to go on.
    ///
    /// # Errors
    /// See the module; none where the answer was no.
    pub fn references(
        &self,
        buffers: &mut Buffers,
        going: &mut dyn FnMut() -> bool,
    ) -> Result<Option<References>> {
        self.references_of(&Reference::ALL, buffers, going)
    }

    /// The same of some policies only: the oracle measures every edit anew for every round, which costs more than all else.
    ///
    /// # Errors
    /// See the module; none where the answer was no.
    pub fn references_of(
        &self,
        which: &[Reference],
        buffers: &mut Buffers,
        going: &mut dyn FnMut() -> bool,
    ) -> Result<Option<References>> {
        let mut found = References::default();
        for (number, history) in self.histories.iter().enumerate() {
            if !going() {
                return Ok(None);
            }
            let begun = self.focus.begin(history)?;
            let loss = self.focus.loss;
            let mut random = self.random(number);
            found.utilities.push(utility::measure(
                loss,
                &history.tree,
                &begun,
                &history.future,
                None,
                &mut random,
                buffers,
            )?);
            let mut chosen = Vec::with_capacity(which.len());
            for reference in which {
                let policy = match reference {
                    Reference::Recency => Policy::Recency,
                    Reference::Random => Policy::Random,
                    Reference::Oracle => Policy::Oracle(self.scale),
                };
                chosen.push(self.focus.choose(policy, history, &mut random, buffers)?.context);
            }
            let contexts: Vec<&WorkingContext> = chosen.iter().collect();
            let losses = loss.measure(&history.tree, &contexts, &history.future, buffers)?;
            for ((reference, loss), context) in which.iter().zip(losses).zip(&chosen) {
                found.outcomes.entry(*reference).or_default().add(loss, context, history);
            }
        }
        Ok(Some(found))
    }

    /// What a network is worth. `going` as in [`Validator::references`].
    ///
    /// # Errors
    /// See the module.
    pub fn measure(
        &self,
        network: &LensNet,
        references: &References,
        buffers: &mut Buffers,
        going: &mut dyn FnMut() -> bool,
    ) -> Result<Option<Validation>> {
        if self.histories.is_empty() {
            let message = "validation: expected at least one held-out history, got none".to_string();
            return Err(BaseError::network(NETWORK, message));
        }
        let mut outcome = Outcome::default();
        let (mut ranked, mut legal) = (Part::default(), Part::default());
        let (mut pairs, mut balances) = (Vec::new(), Vec::new());
        let (mut swaps, mut ages, mut used) = (Vec::new(), Vec::new(), Vec::new());
        for (number, history) in self.histories.iter().enumerate() {
            if !going() {
                return Ok(None);
            }
            let begun = self.focus.begin(history)?;
            let max_lod = begun.hierarchy().levels();
            let seen = self.focus.seen(&begun, history)?;
            let raw: Vec<f32> = match score(network, &[&seen], self.focus.loss.rule())?.first() {
                Some(scores) => scores.to_vec1()?,
                None => Vec::new(),
            };
            let utilities = &references.utilities[number];
            let wanted = targets(utilities.now, &utilities.measured, self.scale)?;
            ranked += metrics::ranking(&raw, &wanted);
            legal += metrics::legality(&raw, &seen.lod, max_lod, self.focus.allocator.expand_threshold);
            let known = raw.iter().zip(&wanted).filter_map(|(u, y)| Some([f64::from(*u), (*y)?]));
            pairs.extend(known);
            balances.extend(metrics::budget_balance(&raw, &seen.lod, begun.hierarchy().block(), max_lod));

            let chosen =
                self.focus.choose(Policy::Lens(network), history, &mut self.random(number), buffers)?;
            let losses =
                self.focus.loss.measure(&history.tree, &[&chosen.context], &history.future, buffers)?;
            outcome.add(losses[0], &chosen.context, history);
            swaps.extend(chosen.steps.iter().map(|step| step.refocus.swap_rate));
            if let Some(last) = chosen.steps.last() {
                ages.push(last.refocus.residency_mean);
                used.push(last.refocus.utilization);
            }
        }
        let loss = outcome.loss();
        let of = |reference| references.outcomes.get(&reference);
        let against =
            |reference: Reference| Some((reference, difference(&outcome.losses, &of(reference)?.losses)));
        let span = |to: &Outcome| Some(of(Reference::Recency)?.loss() - to.loss());
        let best = of(Reference::Oracle).and_then(span).filter(|best| *best > 0.0);
        Ok(Some(Validation {
            histories: self.histories.len(),
            loss_at_h: loss,
            against: Reference::ALL.into_iter().filter_map(against).collect(),
            of_oracle: best.and_then(|best| Some(span(&outcome)? / best)),
            ranking_accuracy: ranked.rate(),
            pearson: metrics::pearson(&pairs),
            budget_balance: (!balances.is_empty()).then(|| mean(&balances)),
            legality_rate: legal.rate(),
            swap_rate: mean(&swaps),
            residency_mean: mean(&ages),
            utilization: mean(&used),
            facts_shown: outcome.shows(),
            outcome,
        }))
    }
}

impl Outcome {
    fn add(&mut self, loss: f64, context: &WorkingContext, history: &History) {
        self.losses.push(loss);
        self.shown.extend(history.fact.as_ref().map(|fact| shows(context, fact)));
    }
}

/// Mean of one policy's losses less another's, history by history, and its standard error.
pub fn difference(ours: &[f64], theirs: &[f64]) -> Difference {
    let all: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours - theirs).collect();
    let n = all.len().max(1) as f64;
    let centre = mean(&all);
    let variance = all.iter().map(|d| (d - centre).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    Difference { mean: centre, error: (variance / n).sqrt() }
}
