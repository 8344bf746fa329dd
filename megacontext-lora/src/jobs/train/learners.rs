//! What learns in a phase, one step at a time: GistNet on the spans that the policy collapses, LensNet on labels of the gists of
//! the time, LoRA on the contexts that the policy builds.
//!
//! Everything drawn follows from the seed, the phase and the step, and histories are made from the modules as they stand, so a phase
//! that is taken up at any step goes on as it would have.
//!
//! Units: nats per token. Errors: those of the trainers; labels of another run.

use std::path::Path;
use std::rc::Rc;

use gistnet_adapter::curriculum::Stage;
use gistnet_adapter::delta_nll::Span;
use gistnet_adapter::trainer::{GistTrainer, Lesson as GistLesson};
use lensnet_adapter::LensNet;
use lensnet_adapter::counterfactual::Scale;
use lensnet_adapter::focus::{Focus, History, Policy};
use lensnet_adapter::labels::Label;
use lensnet_adapter::trainer::{LensTrainer, Lesson};
use megacontext_base::buffers::Buffers;
use megacontext_base::context::{HorizonObjective, WorkingContext};
use megacontext_base::decoder::Decoder;
use megacontext_base::error::{BaseError, Result as BaseResult};
use megacontext_base::gradients::{Gradients, Optimizer};
use megacontext_base::params::Group;
use megacontext_base::random::{Random, mix};
use serde_json::{Value, json};

use super::modules::{Part, parts};
use super::text::{Data, Maker, Order};
use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::model_error;
use crate::run::label_log::LabelLog;
use crate::run::labels::{LabelStamp, write};
use crate::run::metrics::wall_time;
use crate::train::cycle::{GistPhase, LensPhase, LoraPhase, PhasePlace};
use crate::train::labelling::{label_of, rows, told};
use crate::train::plan::since;

/// What a step found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Stepped {
    /// What was made smaller.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Mean ΔNLL@H of GistNet's rows, or loss@H of JT3's contexts, nats.
    pub measured: Option<f64>,
    /// Rows, labels or contexts.
    pub items: usize,
}

/// A step that did not come about.
pub(super) enum Failure {
    /// A loss or gradient is not finite: the phase is rolled back.
    NotFinite(String),
    /// Anything else ends the run.
    Other(PluginError),
}

impl From<PluginError> for Failure {
    fn from(error: PluginError) -> Self {
        Self::Other(error)
    }
}

impl From<BaseError> for Failure {
    fn from(error: BaseError) -> Self {
        match error {
            BaseError::NonFinite { .. } => Self::NotFinite(error.to_string()),
            other => Self::Other(model_error(other)),
        }
    }
}

/// What learns.
pub(super) trait Learner {
    /// Makes what the steps from here on need; false where the host stopped it.
    fn prepare(&mut self, _step: usize) -> Result<bool> {
        Ok(true)
    }

    /// One optimiser step, numbered within the phase from 0.
    fn step(&mut self, step: usize, lr: f64) -> std::result::Result<Stepped, Failure>;

    /// Parameters of all modules, as they stand.
    fn parts(&self) -> [Part<'_>; 3];

    /// Moments of what learns.
    fn optimizer(&self) -> &Optimizer;
}

/// What all learners look at.
#[derive(Clone, Copy)]
pub(super) struct Scene<'a> {
    pub place: PhasePlace,
    /// Names what is drawn in the phase ([`PhasePlace::number`]).
    pub phase: usize,
    pub seed: u64,
    pub data: &'a Data,
    pub maker: Maker<'a>,
    pub focus: &'a Focus<'a>,
    /// Has LensNet learned anything? Else contexts are those of recency.
    pub lens_ready: bool,
    /// Groups of the base model that JT3 trains.
    pub model_groups: &'a [Group],
}

impl<'a> Scene<'a> {
    /// Random state of one thing in one step.
    fn random(&self, what: &str, step: usize) -> Random {
        Random::named(self.seed, &format!("{what}, phase {}, step {step}", self.phase))
    }

    /// The policy of the time.
    pub fn policy<'p>(&self, network: &'p LensNet) -> Policy<'p> {
        if self.lens_ready { Policy::Lens(network) } else { Policy::Recency }
    }

    /// The context that the policy chooses.
    fn chosen(
        &self,
        policy: Policy,
        history: &History,
        random: &mut Random,
        buffers: &mut Buffers,
    ) -> BaseResult<WorkingContext> {
        Ok(self.focus.choose(policy, history, random, buffers)?.context)
    }
}

/// Spans that a context shows as gists.
pub(super) fn collapsed(context: &WorkingContext) -> Vec<Span> {
    let coarse = context.entries().iter().filter(|entry| entry.lod > 0);
    coarse.map(|entry| Span { start: entry.start as usize, lod: u32::from(entry.lod) }).collect()
}

/// Some of the spans, those that have an entry before them, each replaced by itself.
pub(super) fn singly(spans: &[Span], count: usize, random: &mut Random) -> Vec<Vec<Span>> {
    let mut all: Vec<Span> = spans.iter().copied().filter(|span| span.start > 0).collect();
    gistnet_adapter::curriculum::shuffle(&mut all, random);
    all.truncate(count);
    all.sort_unstable_by_key(|span| span.start);
    all.into_iter().map(|span| vec![span]).collect()
}

/// GistNet.
pub(super) struct GistLearner<'a> {
    pub scene: Scene<'a>,
    pub settings: &'a GistPhase,
    pub stage: Stage,
    pub trainer: GistTrainer<'a>,
    pub lensnet: &'a LensNet,
    pub order: Order,
    pub buffers: Buffers,
}

impl GistLearner<'_> {
    /// Rows over one history: spans that its context shows as gists, all at once or one by one. None where it shows none.
    fn rows(&mut self, number: usize, random: &mut Random) -> std::result::Result<Vec<Vec<Span>>, Failure> {
        let scene = &self.scene;
        // With the gists of the network as it is: what the policy would see now.
        let history = scene.maker.make(&scene.data.train[number], &self.trainer.network)?;
        let policy = scene.policy(self.lensnet);
        let context = scene.chosen(policy, &history, random, &mut self.buffers)?;
        let spans = collapsed(&context);
        let whole = random.unit() < self.settings.whole;
        let single = singly(&spans, self.settings.spans, random);
        Ok(if whole && !spans.is_empty() { vec![spans] } else { single })
    }
}

impl Learner for GistLearner<'_> {
    fn step(&mut self, step: usize, lr: f64) -> std::result::Result<Stepped, Failure> {
        let batch = self.settings.batch;
        let mut random = self.scene.random("spans", step);
        let numbers: Vec<usize> = (step * batch..(step + 1) * batch).map(|at| self.order.at(at)).collect();
        let warm = self.scene.place.kind.warm();
        let mut own = Vec::with_capacity(batch);
        if !warm {
            for number in &numbers {
                own.push(self.rows(*number, &mut random)?);
            }
        }
        let train = &self.scene.data.train;
        let lessons: Vec<GistLesson> = numbers
            .iter()
            .enumerate()
            .map(|(at, number)| GistLesson {
                number: *number,
                tokens: &train[*number].tokens,
                rows: own.get(at).map(Vec::as_slice),
            })
            .collect();
        let report = self.trainer.step(&lessons, &self.stage, self.settings.spans, lr, &mut random)?;
        Ok(Stepped {
            loss: report.loss,
            grad_norm: report.grad_norm,
            measured: Some(report.delta_nll),
            items: report.rows,
        })
    }

    fn parts(&self) -> [Part<'_>; 3] {
        let scene = &self.scene;
        parts(scene.maker.decoder, &self.trainer.network, self.lensnet, scene.model_groups)
    }

    fn optimizer(&self) -> &Optimizer {
        &self.trainer.optimizer
    }
}

/// LensNet.
pub(super) struct LensLearner<'a> {
    pub scene: Scene<'a>,
    pub settings: &'a LensPhase,
    pub trainer: LensTrainer,
    pub gistnet: &'a gistnet_adapter::GistNet,
    pub scale: Scale,
    pub order: Order,
    pub buffers: Buffers,
    pub host: &'a dyn HostApi,
    pub folder: &'a Path,
    /// What labels hold for.
    pub stated: Value,
    pub stamp: LabelStamp,
    /// Number of the phase's first round of labels in the run, from 1.
    pub first_round: usize,
    /// Of the phase's rounds so far.
    pub labels: Vec<Label>,
    pub rounds_made: usize,
}

impl LensLearner<'_> {
    fn history(&self, number: usize) -> Result<Rc<History>> {
        self.scene.data.history(number, self.scene.maker, self.gistnet)
    }

    /// Reads the labels of a round as far as they are there, makes the others; false where the host stopped it.
    fn round(&mut self, round: usize, learned_from: bool) -> Result<bool> {
        let count = self.settings.labels.histories;
        let mut stated = self.stated.clone();
        stated["round"] = json!(round);
        let number = self.first_round + round;
        let (mut log, mut labels) = LabelLog::open(self.folder, number, &stated)?;
        labels.truncate(count);
        if labels.len() < count && learned_from {
            return Err(PluginError::data(format!(
                "{}: expected the {count} labels that the phase learned from, found {}; begin a new run in another folder",
                log.path().display(),
                labels.len()
            )));
        }
        let begun = (std::time::Instant::now(), labels.len());
        while labels.len() < count {
            if self.host.cancelled() {
                log.sync()?;
                return Ok(false);
            }
            let at = labels.len();
            let history = self.order.at(round * count + at);
            let mut random = self.scene.random(&format!("label {at} of round {round}"), 0);
            let made = self.history(history)?;
            let learned = (round > 0 || self.scene.lens_ready).then_some(&self.trainer.network);
            let label = label_of(
                &self.settings.labels,
                self.scene.focus,
                learned,
                (history, &made),
                &mut random,
                &mut self.buffers,
            )?;
            log.append(&label)?;
            let block = self.scene.focus.loss.rule().block;
            self.host.event("label", &told(&label, number - 1, at, block));
            labels.push(label);
            let done = labels.len();
            let left = since(begun.0) / (done - begun.1) as f64 * (count - done) as f64;
            self.host.event(
                "progress",
                &json!({
                    "job": "train", "labels": done, "phase": self.scene.place.kind.name(), "cycle": self.scene.place.cycle,
                    "stage": round + 1, "stages": self.settings.labels.rounds, "step": done, "steps": count, "eta_s": left,
                }),
            );
        }
        log.sync()?;
        let path = log.path().with_extension("parquet");
        if !path.is_file() {
            let hierarchy = self.history(labels[0].history())?.tree.hierarchy();
            let rows = rows(&labels, hierarchy, self.scale, (wall_time() * 1e3) as i64)?;
            write(&path, &self.stamp, &rows)?;
        }
        self.labels.append(&mut labels);
        Ok(true)
    }
}

impl Learner for LensLearner<'_> {
    fn prepare(&mut self, step: usize) -> Result<bool> {
        while self.rounds_made <= step / self.settings.steps {
            let round = self.rounds_made;
            if !self.round(round, step > round * self.settings.steps)? {
                return Ok(false);
            }
            self.rounds_made += 1;
        }
        Ok(true)
    }

    fn step(&mut self, step: usize, lr: f64) -> std::result::Result<Stepped, Failure> {
        let mut random = self.scene.random("labels", step);
        let mut lessons: Vec<Lesson> = Vec::with_capacity(self.settings.batch);
        for _ in 0..self.settings.batch {
            let label = &self.labels[random.below(self.labels.len())];
            let history = self.history(label.history())?;
            lessons.push(label.lesson(self.scene.focus, &history, self.scale)?);
        }
        let report = self.trainer.step(&lessons, lr)?;
        Ok(Stepped { loss: report.loss, grad_norm: report.grad_norm, measured: None, items: report.contexts })
    }

    fn parts(&self) -> [Part<'_>; 3] {
        let scene = &self.scene;
        parts(scene.maker.decoder, self.gistnet, &self.trainer.network, scene.model_groups)
    }

    fn optimizer(&self) -> &Optimizer {
        &self.trainer.optimizer
    }
}

/// LoRA, and what else of the base model learns with it.
pub(super) struct LoraLearner<'a> {
    pub scene: Scene<'a>,
    pub settings: &'a LoraPhase,
    pub decoder: &'a Decoder,
    pub gistnet: &'a gistnet_adapter::GistNet,
    pub lensnet: &'a LensNet,
    pub optimizer: Optimizer,
    pub gradients: Gradients,
    pub order: Order,
    pub buffers: Buffers,
    /// Attends as the phase is told to; the policy's own losses are measured densely.
    pub loss: megacontext_base::context::HorizonLoss<'a>,
    /// Hidden states of the teacher by history, [H, E] each; empty without one.
    pub teacher: Vec<(usize, Vec<f32>)>,
}

impl LoraLearner<'_> {
    fn teacher(&self, history: usize) -> Option<&[f32]> {
        let found = self.teacher.binary_search_by_key(&history, |(number, _)| *number).ok()?;
        Some(&self.teacher[found].1)
    }
}

impl Learner for LoraLearner<'_> {
    fn step(&mut self, step: usize, lr: f64) -> std::result::Result<Stepped, Failure> {
        let batch = self.settings.batch;
        let scene = self.scene;
        let embeddings = self.settings.groups.contains(&Group::Embeddings);
        let mut random = scene.random("contexts", step);
        self.gradients.clear();
        let (mut sum, mut loss) = (0f64, 0f64);
        for at in step * batch..(step + 1) * batch {
            let number = self.order.at(at);
            let history = if embeddings {
                // Gists follow the embeddings, which move.
                Rc::new(scene.maker.make(&scene.data.train[number], self.gistnet)?)
            } else {
                scene.data.history(number, scene.maker, self.gistnet)?
            };
            let dropout = mix(scene.seed ^ mix((scene.phase as u64) << 40 ^ at as u64));
            let teacher = self.teacher(number).map(<[f32]>::to_vec);
            let own = HorizonObjective {
                weight: 1.0 / batch as f64,
                kl: self.settings.teacher,
                teacher: teacher.as_deref(),
                dropout_seed: Some(dropout),
                recompute: true,
            };
            let kept_alive = HorizonObjective {
                weight: self.settings.keep_alive / batch as f64,
                kl: 0.0,
                teacher: None,
                dropout_seed: Some(mix(dropout)),
                recompute: true,
            };
            for (policy, objective) in [(scene.policy(self.lensnet), own), (Policy::Random, kept_alive)] {
                if objective.weight == 0.0 {
                    continue;
                }
                let context = scene.chosen(policy, &history, &mut random, &mut self.buffers)?;
                let (tree, future) = (&history.tree, &history.future);
                let found = self.loss.accumulate(tree, &context, future, &objective, &mut self.gradients)?;
                loss += objective.weight * (found.loss + objective.kl * found.kl.unwrap_or(0.0));
                if !matches!(policy, Policy::Random) {
                    sum += found.loss / batch as f64;
                }
            }
        }
        let grad_norm = self.optimizer.step(self.decoder.params(), &self.gradients, lr)?;
        Ok(Stepped { loss, grad_norm, measured: Some(sum), items: batch })
    }

    fn parts(&self) -> [Part<'_>; 3] {
        parts(self.decoder, self.gistnet, self.lensnet, self.scene.model_groups)
    }

    fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }
}

/// The teacher's hidden states of some histories as a file's tensor has them, [n, H, E], and back.
pub(super) fn by_history(numbers: &[usize], values: &[f32]) -> Vec<(usize, Vec<f32>)> {
    let each = values.len() / numbers.len().max(1);
    numbers.iter().copied().zip(values.chunks_exact(each.max(1)).map(<[f32]>::to_vec)).collect()
}
