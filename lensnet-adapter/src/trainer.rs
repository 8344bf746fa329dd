//! One step of LensNet's training: contexts scored together, the loss of each by what was measured of it, and the way back.
//!
//! Source: MegaContext's JT2. A lesson is one history's: either a working context whose edits were measured one by one
//! ([`crate::counterfactual`]), or several contexts that were measured whole ([`crate::preference`]). The loss of a step is
//! the mean over its lessons. Contexts of different lengths are scored in one call; a row's scores are its own.
//!
//! Shapes: W entries of a context, E width. Units: nats in lessons, none in scores. Errors: lessons that are none; a loss or
//! gradient that is not finite, after which weights are as before.

use candle_core::{Device, Tensor};
use megacontext_base::context::{GistTree, TokenEmbeddings, WorkingContext};
use megacontext_base::error::{BaseError, Result};
use megacontext_base::gradients::{AdamWConfig, Gradients, Optimizer};
use megacontext_base::params::Group;
use megacontext_base::rope::{RopeTables, SigmaRule};
use megacontext_base::tower::Angles;

use crate::config::{Kind, NETWORK};
use crate::counterfactual::{self, CounterfactualConfig};
use crate::dual::{Tail, tail_gists};
use crate::network::{Contexts, LensNet};
use crate::preference::{self, PreferenceConfig, Variant};

/// A working context as LensNet reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// Embeddings and gists, [W, E] row-major.
    pub entries_we: Vec<f32>,
    /// Level of each.
    pub lod: Vec<u8>,
    /// First token of each one's span.
    pub start: Vec<u64>,
    /// Tail gists of the history, [G, E] row-major, which the dual form reads.
    pub tail_ge: Vec<f32>,
}

impl Seen {
    /// A context over a tree.
    ///
    /// # Errors
    /// As [`WorkingContext::input`].
    pub fn of(
        context: &WorkingContext,
        tree: &GistTree,
        embeddings: &dyn TokenEmbeddings,
        rule: &SigmaRule,
    ) -> Result<Self> {
        let input = context.input(tree, embeddings, rule)?;
        Ok(Self {
            entries_we: input.embeddings_we,
            lod: context.entries().iter().map(|entry| entry.lod).collect(),
            start: context.entries().iter().map(|entry| entry.start).collect(),
            tail_ge: tail_gists(tree),
        })
    }

    /// W.
    pub fn len(&self) -> usize {
        self.lod.len()
    }

    /// Is there no entry?
    pub fn is_empty(&self) -> bool {
        self.lod.is_empty()
    }
}

/// What one history teaches.
#[derive(Clone, Debug, PartialEq)]
pub enum Lesson {
    /// A context and the target of each of its entries; none where no edit was measured.
    Utilities {
        /// The context.
        seen: Seen,
        /// See [`counterfactual::targets`].
        targets: Vec<Option<f64>>,
    },
    /// Contexts of which some predict better.
    Preference {
        /// The contexts.
        seen: Vec<Seen>,
        /// Loss of each, nats per token.
        losses: Vec<f64>,
    },
}

impl Lesson {
    fn seen(&self) -> &[Seen] {
        match self {
            Self::Utilities { seen, .. } => std::slice::from_ref(seen),
            Self::Preference { seen, .. } => seen,
        }
    }
}

/// Loss and its settings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Objective {
    /// Of lessons with utilities.
    pub counterfactual: CounterfactualConfig,
    /// Of lessons with preferences.
    pub preference: PreferenceConfig,
}

/// What a step found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean loss of the lessons.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Contexts scored.
    pub contexts: usize,
}

/// Contexts side by side, filled up to the longest.
struct Batch {
    entries_bwe: Tensor,
    lod: Vec<u8>,
    start: Vec<u64>,
    lengths: Vec<usize>,
    tail: Option<(Tensor, Vec<usize>)>,
    angles: RopeTables,
}

impl Batch {
    /// None of no contexts.
    fn new(network: &LensNet, seen: &[&Seen], rule: &SigmaRule) -> Result<Option<Self>> {
        let Some(w) = seen.iter().map(|one| one.len()).max() else { return Ok(None) };
        let (b, e) = (seen.len(), network.config().width);
        let mut entries = vec![0f32; b * w * e];
        let (mut lod, mut start) = (vec![0u8; b * w], vec![0u64; b * w]);
        for (row, one) in seen.iter().enumerate() {
            entries[row * w * e..][..one.entries_we.len()].copy_from_slice(&one.entries_we);
            lod[row * w..][..one.len()].copy_from_slice(&one.lod);
            start[row * w..][..one.len()].copy_from_slice(&one.start);
        }
        let tail = match network.config().kind {
            Kind::Transformer => None,
            Kind::Dual => {
                let lengths: Vec<usize> = seen.iter().map(|one| one.tail_ge.len() / e).collect();
                let most = lengths.iter().copied().max().unwrap_or(0).max(1);
                let mut gists = vec![0f32; b * most * e];
                for (row, one) in seen.iter().enumerate() {
                    gists[row * most * e..][..one.tail_ge.len()].copy_from_slice(&one.tail_ge);
                }
                Some((Tensor::from_vec(gists, (b, most, e), &Device::Cpu)?, lengths))
            }
        };
        Ok(Some(Self {
            entries_bwe: Tensor::from_vec(entries, (b, w, e), &Device::Cpu)?,
            angles: network.angles(&lod, &start, rule)?,
            lod,
            start,
            lengths: seen.iter().map(|one| one.len()).collect(),
            tail,
        }))
    }

    fn contexts(&self) -> Contexts<'_> {
        Contexts {
            entries_bwe: &self.entries_bwe,
            lod: &self.lod,
            start: &self.start,
            lengths: Some(&self.lengths),
            tail: self.tail.as_ref().map(|(gists_bge, lengths)| Tail { gists_bge, lengths: Some(lengths) }),
        }
    }

    fn angles(&self) -> Angles<'_> {
        Angles { cos: &self.angles.cos_nd, sin: &self.angles.sin_nd }
    }
}

/// Scores of contexts [W each], with their graph: one call for all.
///
/// # Errors
/// As [`LensNet::forward`].
pub fn score(network: &LensNet, seen: &[&Seen], rule: &SigmaRule) -> Result<Vec<Tensor>> {
    let Some(batch) = Batch::new(network, seen, rule)? else { return Ok(Vec::new()) };
    let scores_bw = network.forward(&batch.contexts(), batch.angles())?;
    let row = |(row, length): (usize, &usize)| Ok(scores_bw.get(row)?.narrow(0, 0, *length)?);
    batch.lengths.iter().enumerate().map(row).collect()
}

/// Scores of one context as an allocator reads them, legal and finite.
///
/// # Errors
/// As [`LensNet::focus_scores`].
pub fn focus(network: &LensNet, seen: &Seen, rule: &SigmaRule, max_lod: u8) -> Result<Vec<f32>> {
    match Batch::new(network, &[seen], rule)? {
        Some(batch) => network.focus_scores(&batch.contexts(), batch.angles(), max_lod),
        None => Ok(Vec::new()),
    }
}

/// Trains a LensNet.
pub struct LensTrainer {
    /// The network.
    pub network: LensNet,
    /// Its optimiser.
    pub optimizer: Optimizer,
    rule: SigmaRule,
    max_lod: u8,
    objective: Objective,
    gradients: Gradients,
    /// The policy that the divergence of preferences holds scores to.
    previous: Option<LensNet>,
}

impl LensTrainer {
    /// Of a network that has not learned or of one that goes on. `rule` places entries, levels go up to `max_lod`.
    ///
    /// # Errors
    /// A rule of another block.
    pub fn new(
        mut network: LensNet,
        rule: SigmaRule,
        max_lod: u8,
        objective: Objective,
        adamw: AdamWConfig,
    ) -> Result<Self> {
        if rule.block != network.config().block {
            let (expected, got) = (network.config().block, rule.block);
            return refuse(format!("expected places of blocks of {expected}, the network's, got {got}"));
        }
        network.params_mut().set_learning([Group::Lensnet])?;
        let (optimizer, gradients) = (Optimizer::new(adamw), Gradients::staying());
        Ok(Self { network, optimizer, rule, max_lod, objective, gradients, previous: None })
    }

    /// Holds scores to those of this policy from now on, where the preference loss asks for it; it runs where the network does.
    ///
    /// # Errors
    /// When it has other settings.
    pub fn hold_to(&mut self, mut previous: LensNet) -> Result<()> {
        if previous.config() != self.network.config() {
            return refuse("previous policy: expected one of the network's settings, got others".to_string());
        }
        previous.set_device(&self.network.device())?;
        self.previous = Some(previous);
        Ok(())
    }

    /// One step over some lessons.
    ///
    /// # Errors
    /// See the module.
    pub fn step(&mut self, lessons: &[Lesson], lr: f64) -> Result<StepReport> {
        let seen: Vec<&Seen> = lessons.iter().flat_map(Lesson::seen).collect();
        if seen.is_empty() {
            return refuse("expected a step of at least one lesson with a context, got none".to_string());
        }
        let scores = score(&self.network, &seen, &self.rule)?;
        let previous = match &self.previous {
            Some(previous) if self.objective.preference.kl_weight != 0.0 => {
                Some(score(previous, &seen, &self.rule)?)
            }
            _ => None,
        };
        // Lessons that say nothing leave every gradient 0 instead of missing.
        let mut sum = (scores[0].sum_all()? * 0.0)?;
        let mut at = 0;
        for lesson in lessons {
            let rows = at..at + lesson.seen().len();
            at = rows.end;
            let before = previous.as_ref().map(|all| &all[rows.clone()]);
            sum = (sum + self.loss(lesson, &scores[rows], before)?)?;
        }
        let loss = (sum / lessons.len() as f64)?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        if !value.is_finite() {
            return Err(BaseError::NonFinite { what: "loss".to_string(), value });
        }
        self.gradients.clear();
        self.gradients.add_backward(&loss, self.network.params())?;
        let grad_norm = self.optimizer.step(self.network.params(), &self.gradients, lr)?;
        Ok(StepReport { loss: value, grad_norm, contexts: seen.len() })
    }

    fn loss(&self, lesson: &Lesson, scores: &[Tensor], before: Option<&[Tensor]>) -> Result<Tensor> {
        let (block, max_lod) = (self.rule.block, self.max_lod);
        match lesson {
            Lesson::Utilities { seen, targets } => {
                let config = &self.objective.counterfactual;
                counterfactual::terms(&scores[0], targets, &seen.lod, block, max_lod, config)?.loss(config)
            }
            Lesson::Preference { seen, losses } => {
                let config = &self.objective.preference;
                if losses.len() != seen.len() {
                    let (expected, got) = (seen.len(), losses.len());
                    return refuse(format!("preference: expected {expected} losses, got {got}"));
                }
                let variants: Vec<Variant> =
                    seen.iter().map(|one| Variant { lod: &one.lod, start: &one.start }).collect();
                let pairs = preference::pairs(losses, config);
                Ok(preference::loss(scores, &variants, &pairs, before, block, max_lod, config)?.loss)
            }
        }
    }
}

fn refuse<T>(message: String) -> Result<T> {
    Err(BaseError::network(NETWORK, message))
}
