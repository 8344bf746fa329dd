//! The step loop: stages, batches, learning rate, one optimiser.
//!
//! A trainer holds a decoder, its optimiser and the text, and does one optimiser step at a time; whoever drives it, the
//! plugin's own job or a host, decides when to evaluate, save or stop. Where a run stands is one number, the step:
//! data order, dropout and learning rate are functions of it and the seed, so that resuming needs nothing else.
//!
//! Units: loss in nats per token. Errors: a loss or gradient that is not finite, before anything has been changed.

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use megacontext_base::decoder::{Decoder, Forward};
use megacontext_base::error::BaseError;
use megacontext_base::gradients::{Gradients, Optimizer};
use megacontext_base::params::Group;
use megacontext_base::random::mix;
use megacontext_base::rope::{RopeScaling, RopeTables};
use megacontext_kernels::attention::{Pattern, Rows};
use serde::Serialize;
use serde_json::Value;

use crate::data::packing::Batches;
use crate::error::{PluginError, Result};
use crate::jobs::model_error;
use crate::run::checkpoint::{self, Loaded};
use crate::train::config::{BatchConfig, OptimizerConfig, StageConfig};

/// What one optimiser step did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepReport {
    /// Number of this step, from 1.
    pub step: usize,
    /// Stage, from 0.
    pub stage: usize,
    /// Mean NLL in nats per token, with the attention of training.
    pub loss: f64,
    /// Learning rate used.
    pub lr: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens seen in this step.
    pub tokens: usize,
    /// Context of the stage.
    pub context: usize,
}

/// The part of a stage that is built once.
struct Stage {
    index: usize,
    batches: Batches,
    rope: RopeTables,
    pattern: Pattern,
    scaling: RopeScaling,
    micro: usize,
}

/// Trains a decoder through stages.
pub struct Trainer {
    /// The model; parameters are changed in place.
    pub decoder: Decoder,
    optimizer: Optimizer,
    gradients: Gradients,
    settings: OptimizerConfig,
    batch: BatchConfig,
    stages: Vec<StageConfig>,
    stream: Vec<u32>,
    seed: u64,
    recompute: bool,
    step: usize,
    current: Option<Stage>,
}

impl Trainer {
    /// A trainer at step 0; `groups` are what learns.
    pub fn new(
        mut decoder: Decoder,
        groups: &[Group],
        settings: OptimizerConfig,
        batch: BatchConfig,
        stages: Vec<StageConfig>,
        stream: Vec<u32>,
        seed: u64,
        recompute: bool,
    ) -> Result<Self> {
        decoder.params_mut().set_learning(groups.iter().copied()).map_err(model_error)?;
        if decoder.params().trainable().map_err(model_error)?.is_empty() {
            return Err(PluginError::usage("parameter groups: expected at least one that learns, got none"));
        }
        let optimizer = Optimizer::new(settings.adamw());
        let trainer = Self {
            decoder,
            optimizer,
            gradients: Gradients::staying(),
            settings,
            batch,
            stages,
            stream,
            seed,
            recompute,
            step: 0,
            current: None,
        };
        // Every stage is tried before the first step, so that a run does not die of its last one.
        for index in 0..trainer.stages.len() {
            trainer.build_stage(index)?;
        }
        Ok(trainer)
    }

    /// The trained model and the text.
    pub fn into_parts(self) -> (Decoder, Vec<u32>) {
        (self.decoder, self.stream)
    }

    /// Steps done.
    pub fn step_count(&self) -> usize {
        self.step
    }

    /// Steps of all stages.
    pub fn steps(&self) -> usize {
        self.stages.iter().map(|s| s.steps).sum()
    }

    /// Stage and step within it (both from 0) of the next step; none when all are done.
    pub fn position(&self) -> Option<(usize, usize)> {
        let mut left = self.step;
        for (index, stage) in self.stages.iter().enumerate() {
            if left < stage.steps {
                return Some((index, left));
            }
            left -= stage.steps;
        }
        None
    }

    /// Scaling of the stage that runs next, or of the last one.
    pub fn scaling(&self) -> Result<RopeScaling> {
        let index = self.position().map_or(self.stages.len().saturating_sub(1), |(index, _)| index);
        self.stages.get(index).map_or(Ok(RopeScaling::None), |s| s.scaling(self.decoder.config()))
    }

    fn build_stage(&self, index: usize) -> Result<Stage> {
        let stage = &self.stages[index];
        let (rows, micro) = self.batch.shape(stage.context);
        let batches = Batches::new(self.stream.len(), stage.context, rows, self.seed, index)?;
        let c = self.decoder.config();
        let scaling = stage.scaling(c)?;
        let rope = c.rope(&scaling).sequence(stage.context)?;
        Ok(Stage { index, batches, rope, pattern: stage.pattern(), scaling, micro })
    }

    /// One optimiser step.
    ///
    /// # Errors
    /// When all stages are done, or loss or gradient is not finite: then the parameters are as before.
    pub fn step(&mut self) -> Result<StepReport> {
        let Some((index, stage_step)) = self.position() else {
            return Err(PluginError::usage(format!("step: all {} steps are done", self.steps())));
        };
        if self.current.as_ref().is_none_or(|s| s.index != index) {
            let built = self.build_stage(index)?;
            self.assert_positions_changed(&built)?;
            self.current = Some(built);
        }
        let stage = self.current.as_ref().ok_or_else(|| PluginError::internal("no stage was built"))?;
        let context = self.stages[index].context;
        let lr = self.settings.lr_at(stage_step, self.step, self.steps());
        let place = format!("step {} (stage {}, context {context}, lr {lr:.2e})", self.step + 1, index + 1);
        let failed = |error: BaseError| match error {
            BaseError::NonFinite { .. } => PluginError::model(format!(
                "{place}: {error}. The parameters are as before this step; a lower optimizer.lr or a longer warm-up helps"
            )),
            other => model_error(other),
        };
        let rows = Rows::default();
        self.gradients.clear();
        let (mut sum, mut count) = (0f64, 0usize);
        let per_step = stage.micro * self.batch.shape(context).0 * context;
        for micro in 0..stage.micro {
            let batch = stage.batches.rows(&self.stream, (stage_step * stage.micro + micro) as u64);
            let mut tokens = Vec::with_capacity(batch.len() * context);
            let mut targets = Vec::with_capacity(batch.len() * context);
            for row in &batch {
                tokens.extend_from_slice(&row[..context]);
                targets.extend_from_slice(&row[1..]);
            }
            let seed = mix(self.seed ^ mix((self.step as u64) << 20 | micro as u64));
            let with =
                Forward { pattern: stage.pattern, rope: &stage.rope, rows: &rows, dropout_seed: Some(seed) };
            let loss = self
                .decoder
                .accumulate_gradients(
                    &tokens,
                    batch.len(),
                    &targets,
                    &with,
                    1.0 / per_step as f64,
                    self.recompute,
                    &mut self.gradients,
                )
                .map_err(&failed)?;
            sum += loss.sum;
            count += loss.count;
        }
        let grad_norm = self.optimizer.step(self.decoder.params(), &self.gradients, lr).map_err(&failed)?;
        self.step += 1;
        Ok(StepReport {
            step: self.step,
            stage: index,
            loss: sum / count as f64,
            lr,
            grad_norm,
            tokens: count,
            context,
        })
    }

    /// A stage that names a scaling has to see other angles than the model's own, or, where it names the same, than those of
    /// a model that is not scaled: checked on the tables in use, before the first step of the stage.
    fn assert_positions_changed(&self, stage: &Stage) -> Result<()> {
        let c = self.decoder.config();
        let context = self.stages[stage.index].context;
        let before = if c.rope_scaling == stage.scaling { &RopeScaling::None } else { &c.rope_scaling };
        // Kinds that look at the length leave a short context alone.
        if stage.scaling == *before || context <= stage.scaling.unscaled_up_to() {
            return Ok(());
        }
        let last = context - 1;
        let other = c.rope(before).sequence_in(&[last as f64], context).map_err(model_error)?;
        let differs = |used: &Tensor, other: &Tensor| -> candle_core::Result<f32> {
            (used.narrow(0, last, 1)? - other)?.abs()?.max_all()?.to_scalar::<f32>()
        };
        let rope = &stage.rope;
        if differs(&rope.cos_nd, &other.cos_nd)?.max(differs(&rope.sin_nd, &other.sin_nd)?) == 0.0 {
            return Err(PluginError::internal(format!(
                "rope scaling {} changed no angle at position {last} against {before}",
                stage.scaling
            )));
        }
        Ok(())
    }

    /// Writes a checkpoint of where the run stands; see [`checkpoint::save`].
    pub fn save(&self, run_dir: &Path, state: &Value, keep: usize) -> Result<PathBuf> {
        let params = self.decoder.params();
        let learning: Vec<&str> =
            params.names().filter(|name| params.group(name).is_some_and(|g| params.learns(g))).collect();
        checkpoint::save_parameters(
            run_dir,
            self.step as u64,
            state,
            params,
            &learning,
            Some(&self.optimizer),
            keep,
        )
    }

    /// Goes on from a checkpoint.
    ///
    /// # Errors
    /// When a parameter is missing or has another shape.
    pub fn restore(&mut self, loaded: Loaded) -> Result<()> {
        checkpoint::restore_parameters(
            loaded.tensors,
            loaded.optim,
            self.decoder.params_mut(),
            &mut self.optimizer,
        )?;
        self.step = loaded.step as usize;
        Ok(())
    }

    /// Lets the memory of a step's passes go, until the next step: for an evaluation.
    pub fn release_passes(&mut self) {
        self.gradients.release_passes();
    }
}
