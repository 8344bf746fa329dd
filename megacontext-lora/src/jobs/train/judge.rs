//! What the modules together are worth on held-out histories, and whether a phase is kept.
//!
//! Source: MegaContext's JT metrics. Every phase is judged by loss@H of the contexts that the policy chooses at the fixed budget W;
//! the same histories before and after, so the difference is paired. A phase of GistNet is judged in the contexts that the policy had
//! chosen when it began: what others LensNet would choose of gists that it never saw is what JT2 is for, and is in the figures that
//! JT2 begins with. GistNet's warm start, before which gists are noise, is judged by ΔNLL@H of the gists. Definitions:
//! - `loss_at_h`: mean NLL of the H tokens behind the chosen contexts.
//! - `full_loss`: the same behind the whole history as tokens.
//! - `delta_nll_degradation`: `loss_at_h` − `full_loss`: what the budget costs.
//! - `delta_nll`: mean ΔNLL@H of spans that the contexts show as gists, each replaced by itself, by what stands for it.
//! - `swap_rate`, `residency_mean`, `utilization`: of the refocuses, as the allocator defines them.
//! - `sparse_dense_gap`: loss@H of the same contexts under shifted sparse attention, less that under dense.
//!
//! Units: nats per token. Errors: those of choosing and measuring; a loss that is not finite.

use std::collections::BTreeMap;

use gistnet_adapter::GistNet;
use gistnet_adapter::delta_nll::{DeltaNll, StandIn};
use lensnet_adapter::LensNet;
use lensnet_adapter::focus::{Focus, History, Policy};
use lensnet_adapter::metrics::mean;
use lensnet_adapter::validate::Difference;
use megacontext_base::buffers::Buffers;
use megacontext_base::context::HorizonLoss;
use megacontext_base::random::Random;
use serde::{Deserialize, Serialize};

use super::learners::{collapsed, singly};
use super::text::Maker;
use crate::error::Result;
use crate::host::HostApi;
use crate::jobs::model_error;
use crate::train::cycle::{Judge, PhaseKind};
use crate::train::histories::Passage;

/// What stands for a span when its cost is measured.
pub const STAND_INS: [&str; 4] = ["gist", "deleted", "mean", "last_token"];

/// What the modules are worth on some histories.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Histories measured.
    pub histories: usize,
    /// See the module.
    pub loss_at_h: f64,
    /// See the module.
    pub full_loss: f64,
    /// See the module.
    pub delta_nll_degradation: f64,
    /// See the module; by what stands for the span. Empty where no context shows one.
    pub delta_nll: BTreeMap<String, f64>,
    /// Spans that those are means over.
    pub spans: usize,
    /// See the module.
    pub swap_rate: f64,
    /// See the module.
    pub residency_mean: f64,
    /// See the module.
    pub utilization: f64,
    /// See the module; none where it was not asked for.
    pub sparse_dense_gap: Option<f64>,
    /// Loss@H by history.
    pub losses: Vec<f64>,
}

/// Why a phase was undone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Verdict {
    /// It was not.
    Kept,
    /// Loss@H (in GistNet's warm start ΔNLL@H of gists) rose by more than the tolerance.
    Worse {
        /// Nats that it rose by.
        by: f64,
    },
    /// The loss behind whole histories rose by more than its tolerance.
    Forgot {
        /// Nats that it rose by.
        by: f64,
    },
    /// A loss or gradient was not finite.
    NotFinite {
        /// What the step said.
        message: String,
    },
    /// The host asked for it.
    Host,
}

impl Verdict {
    /// Was the phase kept?
    pub fn kept(&self) -> bool {
        matches!(self, Self::Kept)
    }

    /// For people.
    pub fn text(&self) -> String {
        match self {
            Self::Kept => "kept".to_string(),
            Self::Worse { by } => format!("rolled back: what it is judged by rose by {by:.4} nats"),
            Self::Forgot { by } => {
                format!("rolled back: the loss behind whole histories rose by {by:.4} nats")
            }
            Self::NotFinite { message } => format!("rolled back: {message}"),
            Self::Host => "rolled back: the host asked for it".to_string(),
        }
    }

    /// Of a phase by what was measured before and after.
    pub fn of(kind: PhaseKind, before: &Evaluation, after: &Evaluation, judge: &Judge) -> Self {
        let gist = |of: &Evaluation| of.delta_nll.get(STAND_INS[0]).copied();
        let rose = match gist(before).zip(gist(after)) {
            Some((before, after)) if kind == PhaseKind::WarmGistnet => after - before,
            _ => after.loss_at_h - before.loss_at_h,
        };
        let forgot = after.full_loss - before.full_loss;
        if !after.loss_at_h.is_finite() || !after.full_loss.is_finite() {
            return Self::NotFinite { message: format!("expected a finite loss@H, got {}", after.loss_at_h) };
        }
        match (rose, forgot) {
            (by, _) if by > judge.tolerance => Self::Worse { by },
            (_, by) if by > judge.full_tolerance => Self::Forgot { by },
            _ => Self::Kept,
        }
    }
}

/// How evaluations are made.
pub(super) struct Judging<'a> {
    pub focus: &'a Focus<'a>,
    pub delta: &'a DeltaNll<'a>,
    /// Under sparse attention, where that is measured.
    pub sparse: Option<&'a HorizonLoss<'a>>,
    pub maker: Maker<'a>,
    pub lens_ready: bool,
    /// Spans of a history.
    pub spans: usize,
    pub seed: u64,
    pub host: &'a dyn HostApi,
}

impl Judging<'_> {
    /// Measures the modules; none where the host stopped it. With `chooser` the policy sees gists of that network, and what is
    /// measured are `gistnet`'s in the same contexts.
    ///
    /// # Errors
    /// See the module.
    pub fn measure(
        &self,
        passages: &[Passage],
        gistnet: &GistNet,
        lensnet: &LensNet,
        chooser: Option<&GistNet>,
        buffers: &mut Buffers,
    ) -> Result<Option<Evaluation>> {
        let mut all = Evaluation { histories: passages.len(), ..Evaluation::default() };
        let (mut full, mut gaps) = (Vec::new(), Vec::new());
        let (mut swaps, mut ages, mut used) = (Vec::new(), Vec::new(), Vec::new());
        let mut costs = [0f64; STAND_INS.len()];
        for (number, passage) in passages.iter().enumerate() {
            if self.host.cancelled() {
                return Ok(None);
            }
            let history = self.maker.make(passage, gistnet)?;
            let policy = if self.lens_ready { Policy::Lens(lensnet) } else { Policy::Recency };
            let mut random = Random::named(self.seed, &format!("judging of history {number}"));
            let other = chooser.map(|network| self.maker.make(passage, network)).transpose()?;
            let seen = other.as_ref().unwrap_or(&history);
            let chosen = self.focus.choose(policy, seen, &mut random, buffers).map_err(model_error)?;
            let context = &chosen.context;
            let losses = self.focus.loss.measure(&history.tree, &[context], &history.future, buffers);
            let loss = losses.map_err(model_error)?[0];
            all.losses.push(loss);
            if let Some(sparse) = self.sparse {
                let found = sparse.measure(&history.tree, &[context], &history.future, buffers);
                gaps.push(found.map_err(model_error)?[0] - loss);
            }
            swaps.extend(chosen.steps.iter().map(|step| step.refocus.swap_rate));
            match chosen.steps.last() {
                Some(last) => {
                    ages.push(last.refocus.residency_mean);
                    used.push(last.refocus.utilization);
                }
                None => used.push(context.cost() as f64 / self.focus.limits.budget() as f64),
            }

            let document = self.delta.run(&passage.tokens, false, buffers).map_err(model_error)?;
            let behind = &document.document.nll()[passage.cursor - 1..];
            full.push(behind.iter().map(|nll| f64::from(*nll)).sum::<f64>() / behind.len() as f64);
            let spans = singly(&collapsed(context), self.spans, &mut random);
            if spans.is_empty() {
                continue;
            }
            all.spans += spans.len();
            let mut cost = |at: usize, stand_in: StandIn| -> Result<()> {
                let mut rows = self.delta.rows(&document, &spans, stand_in).map_err(model_error)?;
                if stand_in == StandIn::Entry {
                    let vectors = match at {
                        0 => gists(&history, &rows),
                        _ => rows.means(&document, self.delta.block()),
                    };
                    rows.fill(&vectors).map_err(model_error)?;
                }
                let found = self.delta.measure(&document, &rows, None, buffers).map_err(model_error)?;
                costs[at] += found.delta() * spans.len() as f64;
                Ok(())
            };
            cost(0, StandIn::Entry)?;
            cost(1, StandIn::Nothing)?;
            cost(2, StandIn::Entry)?;
            cost(3, StandIn::LastTokens(1))?;
        }
        all.loss_at_h = mean(&all.losses);
        all.full_loss = mean(&full);
        all.delta_nll_degradation = all.loss_at_h - all.full_loss;
        if all.spans > 0 {
            let named = STAND_INS.iter().zip(costs);
            all.delta_nll = named.map(|(name, sum)| (name.to_string(), sum / all.spans as f64)).collect();
        }
        all.swap_rate = mean(&swaps);
        all.residency_mean = mean(&ages);
        all.utilization = mean(&used);
        all.sparse_dense_gap = (!gaps.is_empty()).then(|| mean(&gaps));
        Ok(Some(all))
    }
}

/// The tree's gists of the rows' slots, [S, E].
fn gists(history: &History, rows: &gistnet_adapter::delta_nll::Rows) -> Vec<f32> {
    let of = |slot: &gistnet_adapter::delta_nll::Slot| {
        let node = history.tree.node_at(slot.span.lod as u8, slot.span.start as u64);
        node.and_then(|node| history.tree.gist(node)).unwrap_or_default().iter().copied()
    };
    rows.slots().iter().flat_map(of).collect()
}

/// Loss@H after less before, history by history.
pub(super) fn change(before: &Evaluation, after: &Evaluation) -> Difference {
    lensnet_adapter::validate::difference(&after.losses, &before.losses)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluation(loss_at_h: f64, full_loss: f64) -> Evaluation {
        Evaluation { loss_at_h, full_loss, ..Evaluation::default() }
    }

    #[test]
    fn a_phase_is_kept_or_undone_by_its_bounds() {
        let judge = Judge { tolerance: 0.01, full_tolerance: 0.05, plateau: 0.0 };
        let before = evaluation(2.0, 1.5);
        let of = |loss, full| Verdict::of(PhaseKind::Jt3, &before, &evaluation(loss, full), &judge);
        assert_eq!(of(1.9, 1.5), Verdict::Kept);
        assert_eq!(of(2.005, 1.54), Verdict::Kept);
        assert!(matches!(of(2.02, 1.5), Verdict::Worse { by } if (by - 0.02).abs() < 1e-9));
        assert!(matches!(of(1.9, 1.6), Verdict::Forgot { by } if (by - 0.1).abs() < 1e-9));
        assert!(matches!(of(f64::NAN, 1.5), Verdict::NotFinite { .. }));
        assert!(matches!(of(1.0, f64::INFINITY), Verdict::NotFinite { .. }));
        // GistNet's warm start is judged by its gists.
        let with = |loss, gist| Evaluation {
            delta_nll: [("gist".to_string(), gist)].into(),
            ..evaluation(loss, 1.5)
        };
        let of = |kind| Verdict::of(kind, &with(2.0, 0.9), &with(2.1, 0.5), &judge);
        assert_eq!(of(PhaseKind::WarmGistnet), Verdict::Kept);
        assert!(matches!(of(PhaseKind::Jt1), Verdict::Worse { .. }));
    }
}
