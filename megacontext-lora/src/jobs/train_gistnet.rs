//! The job `train_gistnet`: GistNet learns to stand for spans of a frozen base model's context.
//!
//! Order: everything is read, checked and planned; then the run folder is made; what else could stand for a block is measured;
//! the stages train, with validations between; the best network so far stands in `gistnet.safetensors` at any time. A stage
//! ends after its steps, when its loss stops improving, or when its validations have got worse a number of times in a row; a
//! run ends with its last stage.
//!
//! The best network is that of the lowest ΔNLL@H on held-out text, compared within a stage: another horizon is another
//! measure. A new stage begins with its own best, and starts from the weights that the last one ended with, whichever way it
//! ended.
//!
//! The lowest of many validations on the same blocks is a little too good. So the figures that a run ends with come from other
//! documents, the test text, on which nothing was chosen: measured once, when the best network stands.
//!
//! Interrupted and taken up again, a run ends with the same network. Before a validation that is due there is a checkpoint
//! that says so, whatever `checkpoint.every` is: a run that is stopped while it measures takes up the measuring.
//!
//! Units: nats, tokens, seconds, bytes. Errors: before the run folder exists, anything about settings, model, data, memory.

mod outcome;

use std::collections::BTreeMap;
use std::time::Instant;

use gistnet_adapter::costs::Costs;
use gistnet_adapter::curriculum::Stage;
use gistnet_adapter::trainer::{GistTrainer, Lesson, Setting};
use gistnet_adapter::validate::{Baseline, Baselines, Kept, Validation, Validator};
use gistnet_adapter::{Expected, GistNet, Identity};
use megacontext_base::buffers::Buffers;
use megacontext_base::decoder::Decoder;
use megacontext_base::params::{Group, ParamStore};
use megacontext_base::random::Random;
use megacontext_kernels::attention::Pattern;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::begin::{Begun, Resumable, begin};
use crate::jobs::device::{OnDevice, network_beside};
use crate::jobs::evaluation::Inputs;
use crate::jobs::gist_text::{GistText, read_text};
use crate::jobs::{ModelDir, model_error, parse, to_value, with_threads};
use crate::report::stand_ins::StandIns;
use crate::run::Telemetry;
use crate::run::checkpoint::{self, Loaded};
use crate::run::folder::{RunFolder, expect_run};
use crate::run::metrics::{GistBaselinesRecord, GistStepRecord, GistValidationRecord, Record, wall_time};
use crate::train::device_plan::DeviceMemory;
use crate::train::gistnet::{GistPlan, GistRunConfig, Passages};
use crate::train::plan::since;

/// The best network's file in a run folder.
pub const NETWORK: &str = "gistnet.safetensors";
/// The network with which a stage (numbered from 1) began, where stability asks for it.
fn anchor_name(stage: usize) -> String {
    format!("stage-{}-start.safetensors", stage + 1)
}

#[derive(Deserialize)]
struct Params {
    #[serde(default)]
    resume: bool,
    #[serde(flatten)]
    config: Map<String, Value>,
}

/// What a network was measured to cost, beside what else could stand for the same blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Of gists.
    pub validation: Validation,
    /// ΔNLL@H of what else could stand for the same blocks, nats.
    pub baselines: BTreeMap<Baseline, f64>,
    /// The same for people.
    pub table: StandIns,
    /// ΔNLL@H of every block by passage: of `gist` and of each baseline.
    pub blocks: BTreeMap<String, Costs>,
}

impl Measured {
    /// Of one measurement.
    pub fn new(validation: Validation, baselines: &Baselines) -> Self {
        let mut blocks: BTreeMap<String, Costs> =
            baselines.blocks.iter().map(|(b, costs)| (b.name().to_string(), costs.clone())).collect();
        blocks.insert("gist".to_string(), validation.costs.clone());
        Self {
            table: StandIns::new(&validation, baselines),
            baselines: baselines.means(),
            blocks,
            validation,
        }
    }
}

/// A finished run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GistSummary {
    /// The best network of the last stage on the test text, on which nothing was chosen.
    pub test: Measured,
    /// What it recovers there of what deletion costs; none where that is nothing.
    pub recovered: Option<f64>,
    /// The same network on the text that it was chosen by.
    pub validation: Validation,
    /// ΔNLL@H of what else could stand for those blocks, nats.
    pub baselines: BTreeMap<Baseline, f64>,
    /// Nats between sparse and dense attention beyond which the run warns.
    pub most_gap: f64,
    /// Optimiser steps done, and at which the best network was found.
    pub steps: u64,
    /// See there.
    pub best_step: u64,
    /// Why the run ended.
    pub ended: String,
    /// Parameters of the network.
    pub parameters: usize,
    /// Version of the gists.
    pub gist_version: u16,
    /// Seed of everything random.
    pub seed: u64,
    /// Worker threads.
    pub threads: usize,
    /// What the base model's passes ran on, at last; empty in summaries of older versions.
    #[serde(default)]
    pub device: String,
    /// Seconds, of all parts of an interrupted run.
    pub seconds: f64,
    /// Bytes as planned, and at the peak.
    pub planned_bytes: u64,
    /// See there.
    pub peak_bytes: u64,
    /// The same of a GPU, where the model's passes ran on one.
    #[serde(default)]
    pub device_memory: Option<DeviceMemory>,
    /// The base model's folder.
    pub base: String,
    /// Fingerprint of its weights.
    pub base_fingerprint: String,
    /// Where the text came from.
    pub data: Vec<String>,
    /// Passages to learn from, to choose by, and to test on.
    pub passages: usize,
    /// See there.
    pub held_out_passages: usize,
    /// See there.
    pub test_passages: usize,
    /// SHA-256 of the test text's tokens.
    pub test_text: String,
    /// The network's file.
    pub network: String,
}

/// What a checkpoint knows besides tensors.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct State {
    config_hash: String,
    seed: u64,
    inputs: Inputs,
    /// Hashes of the frozen model's groups, an adapter's among them.
    frozen: Vec<String>,
    stage: usize,
    stage_step: usize,
    /// Losses of the stage so far, for its end.
    losses: Vec<f64>,
    baselines: BTreeMap<usize, Baselines>,
    best: Option<Validation>,
    best_step: u64,
    last: Option<f64>,
    rises: usize,
    /// The network as it is has yet to be measured.
    validation_due: bool,
    /// The gap between sparse and dense attention was told.
    warned: bool,
    ended: Option<String>,
    metric_lines: u64,
    seconds: f64,
}

impl Resumable for State {
    fn config_hash(&self) -> &str {
        &self.config_hash
    }

    fn inputs(&self) -> &Inputs {
        &self.inputs
    }

    fn began_with(&self) -> &[String] {
        &self.frozen
    }

    fn metric_lines(&self) -> u64 {
        self.metric_lines
    }
}

impl State {
    /// Takes up a validation of the stage; true if it is the best so far.
    ///
    /// # Errors
    /// When it is not finite: everything would be better than it, or nothing.
    fn judge(&mut self, delta_nll: f64) -> Result<bool> {
        if !delta_nll.is_finite() {
            return Err(PluginError::model(format!(
                "validation: expected a finite ΔNLL@H, got {delta_nll}; dtype f32, or a lower optimizer.lr from the checkpoint \
                 before, may help"
            )));
        }
        let rose = self.last.is_some_and(|last| delta_nll > last);
        self.rises = if rose { self.rises + 1 } else { 0 };
        self.last = Some(delta_nll);
        Ok(self.best.as_ref().is_none_or(|best| delta_nll < best.delta_nll))
    }
}

/// Why a stage ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Steps,
    Improvement,
    Rises(usize),
}

/// Runs the job.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let Params { resume, config } = parse(params)?;
    let config: GistRunConfig = parse(Value::Object(config))?;
    if resume {
        expect_run(&config.out)?;
    }
    let threads = config.threads;
    with_threads(threads, || prepare(config, resume, host))?
}

fn prepare(config: GistRunConfig, resume: bool, host: &dyn HostApi) -> Result<Value> {
    let started = Instant::now();
    let model = ModelDir::open(&config.base)?;
    let adapted = model.adapted(config.adapter.as_deref(), config.dtype)?;
    let config = config.resolve(&adapted.config, adapted.context)?;
    let on = OnDevice::open(config.device, host)?.running(&adapted.config, host)?;
    let GistText { train: text, validation: held_out, test } = read_text(&config, &model, host)?;
    let scarce = config.check_level2(&text)?;
    let plan = GistPlan::new(&config, &adapted, &text, &held_out, &test, on.device())?;
    let mut told = to_value(plan)?;
    let parameters = config.network.of(&adapted.config).parameters();
    told["text"] = json!(plan.text(config.steps(), parameters));
    host.event("plan", &told);

    let (mut decoder, scaling, adapter) = model.decoder_with(config.adapter.as_deref(), config.dtype)?;
    on.take(&mut decoder)?;
    let identity = Identity {
        adapter_fingerprint: Some(model.adapter_fingerprint(&decoder, &scaling, adapter.as_ref())?),
        place_rule: Some(config.rule()),
        ..Identity::of_base(&model.weights.fingerprint())
    };
    // Its tensors were copied into the model.
    drop(adapter);
    let mut network = GistNet::new(config.network.of(decoder.config()), config.seed).map_err(model_error)?;
    network_beside("GistNet", network.set_device(on.device()), host);
    let setting = |pattern: Pattern| Setting { scaling: scaling.clone(), rule: config.rule(), pattern };
    let trainer = GistTrainer::new(
        &decoder,
        setting(config.pattern()?),
        network,
        config.optimizer.adamw(),
        config.passage_bytes - config.validation_bytes(decoder.config()),
    )
    .map_err(model_error)?;
    let frozen = hashes(decoder.params())?;
    let folder = RunFolder::open(&config.out, resume)?;
    let state = State {
        config_hash: config.identity()?,
        seed: config.seed,
        inputs: Inputs::of(&model, decoder.device(), text.tokens.iter().chain(&held_out).chain(&test)),
        frozen: frozen.clone(),
        ..State::default()
    };
    let given = "--adapter";
    let Begun { state, telemetry, loaded, warnings } = begin(&folder, &config, state, resume, given)?;
    for warning in warnings {
        host.event("log", &json!({ "message": warning }));
    }
    for remark in config.no_sparse().into_iter().chain(scarce) {
        host.event("log", &json!({ "message": format!("warning: {remark}") }));
    }
    let sparse = config.sparse()?.map(&setting);
    let dense = setting(Pattern::Dense);
    let kept = Kept::new(config.validation_bytes(decoder.config()), sparse.is_some());
    let mut run = Run {
        host,
        before: state.seconds,
        config: &config,
        decoder: &decoder,
        trainer,
        text: &text,
        held_out: &held_out,
        test: &test,
        kept,
        dense: &dense,
        sparse,
        identity: &identity,
        folder,
        telemetry,
        state,
        started,
        step: 0,
    };
    if let Some(loaded) = loaded {
        run.restore(loaded)?;
        run.say(&format!("resuming after step {} of {}", run.step, config.steps()));
    }
    let result = run.finish(&plan, parameters)?;
    if hashes(decoder.params())? != frozen {
        return Err(PluginError::internal("a frozen parameter of the base model changed while training"));
    }
    Ok(result)
}

/// Hashes of the base model's groups.
fn hashes(params: &ParamStore) -> Result<Vec<String>> {
    let groups = [Group::Base, Group::Embeddings, Group::Norms, Group::Lora, Group::Sigma];
    groups.into_iter().map(|group| params.group_hash(group).map_err(model_error)).collect()
}

/// Baselines and a network on text that is measured once; none where the host stopped it.
pub(crate) fn measure_once(
    validator: &Validator,
    network: &GistNet,
    buffers: &mut Buffers,
    host: &dyn HostApi,
) -> Result<Option<Measured>> {
    let mut going = || !host.cancelled();
    // Baselines and gists read the same passages, but all of them at once may be too many to keep.
    let mut kept = Kept::new(0, validator.sparse.is_some());
    let Some(baselines) = validator.baselines(&mut kept, buffers, &mut going).map_err(model_error)? else {
        return Ok(None);
    };
    let found =
        validator.measure(network, &baselines, &mut kept, buffers, &mut going).map_err(model_error)?;
    Ok(found.map(|found| Measured::new(found, &baselines)))
}

struct Run<'a> {
    host: &'a dyn HostApi,
    config: &'a GistRunConfig,
    decoder: &'a Decoder,
    trainer: GistTrainer<'a>,
    text: &'a Passages,
    held_out: &'a [Vec<u32>],
    test: &'a [Vec<u32>],
    kept: Kept,
    dense: &'a Setting,
    sparse: Option<Setting>,
    /// What the network belongs to.
    identity: &'a Identity,
    folder: RunFolder,
    telemetry: Telemetry,
    state: State,
    started: Instant,
    /// Seconds of the parts before this one.
    before: f64,
    step: usize,
}

impl<'a> Run<'a> {
    fn say(&self, message: &str) {
        self.host.event("log", &json!({ "message": message }));
    }

    fn cancelled<T>(&mut self) -> Result<T> {
        self.checkpoint()?;
        Err(PluginError::cancelled(format!(
            "stopped after step {} of {}; go on with --resume and the same settings",
            self.step,
            self.config.steps()
        )))
    }

    fn checkpoint(&mut self) -> Result<()> {
        self.telemetry.sync()?;
        self.state.metric_lines = self.telemetry.lines();
        self.state.seconds = self.before + since(self.started);
        let params = self.trainer.network.params();
        let names: Vec<&str> = params.names().collect();
        let path = checkpoint::save_parameters(
            self.folder.path(),
            self.step as u64,
            &to_value(&self.state)?,
            params,
            &names,
            Some(&self.trainer.optimizer),
            self.config.checkpoint.keep,
        )?;
        self.host.event("checkpoint", &json!({ "path": path, "step": self.step }));
        Ok(())
    }

    fn restore(&mut self, loaded: Loaded) -> Result<()> {
        checkpoint::restore_parameters(
            loaded.tensors,
            loaded.optim,
            self.trainer.network.params_mut(),
            &mut self.trainer.optimizer,
        )?;
        self.step = loaded.step as usize;
        Ok(())
    }

    /// What stability holds gists to: the network with which the stage began, in a file, so that a run that is taken up in the
    /// middle of a stage has the same.
    fn anchor(&mut self) -> Result<()> {
        let path = self.folder.path().join(anchor_name(self.state.stage));
        if self.state.stage_step == 0 {
            self.trainer.network.save(&path, self.identity).map_err(model_error)?;
        }
        if self.state.stage_step == 0 || !self.trainer.is_anchored() {
            let expected = Expected {
                base_fingerprint: Some(&self.identity.base_fingerprint),
                adapter_fingerprint: self.identity.adapter_fingerprint.as_deref(),
                ..Expected::default()
            };
            let anchor = GistNet::load(&path, expected).map_err(model_error)?;
            self.trainer.anchor(anchor.network).map_err(model_error)?;
        }
        Ok(())
    }

    fn validator(&self, documents: &'a [Vec<u32>], horizon: usize) -> Validator<'a> {
        Validator {
            decoder: self.decoder,
            setting: self.dense,
            sparse: self.sparse.clone(),
            documents,
            horizon,
            most_blocks: self.config.validation.blocks,
        }
    }

    /// What else could stand for the blocks, measured once for each horizon; false where the host stopped it.
    fn baselines(&mut self, horizon: usize) -> Result<bool> {
        if self.state.baselines.contains_key(&horizon) {
            return Ok(true);
        }
        self.say(&format!("measuring what else could stand for a block, over {horizon} tokens"));
        let (host, validator) = (self.host, self.validator(self.held_out, horizon));
        let found = validator.baselines(&mut self.kept, self.trainer.buffers(), &mut || !host.cancelled());
        let Some(found) = found.map_err(model_error)? else { return Ok(false) };
        let deleted = |costs: &Option<Costs>| costs.as_ref().and_then(Costs::mean).map(|found| found.mean);
        self.telemetry.record(Record::GistBaselines(GistBaselinesRecord {
            step: self.step as u64,
            horizon,
            delta_nll: found.means(),
            sparse_deleted: deleted(&found.sparse_deleted),
            level2_deleted: deleted(&found.level2_deleted),
            wall_time: wall_time(),
        }))?;
        self.state.baselines.insert(horizon, found);
        Ok(true)
    }

    /// Validates the network as it is, keeps it if it is the best; false where the host stopped it.
    fn validate(&mut self, horizon: usize) -> Result<bool> {
        let begun = Instant::now();
        let (host, validator) = (self.host, self.validator(self.held_out, horizon));
        let baselines = self.state.baselines.get(&horizon).cloned().unwrap_or_default();
        let (network, buffers) = self.trainer.network_and_buffers();
        let found =
            validator.measure(network, &baselines, &mut self.kept, buffers, &mut || !host.cancelled());
        let Some(found) = found.map_err(model_error)? else { return Ok(false) };
        let better = self
            .state
            .judge(found.delta_nll)
            .map_err(|e| PluginError { message: format!("after step {}: {}", self.step, e.message), ..e })?;
        self.telemetry.record(Record::GistValidation(Box::new(GistValidationRecord {
            step: self.step as u64,
            stage: self.state.stage,
            validation: found.clone(),
            wall_time: wall_time(),
            wall_seconds: since(begun),
        })))?;
        let mut text = format!("  step {:>5}  ΔNLL@{horizon} {:.4}", self.step, found.delta_nll);
        let deleted = baselines.means().get(&Baseline::Deleted).copied();
        if let Some((recovered, deleted)) = found.recovered.zip(deleted) {
            text += &format!("  recovered {:.1} % of deletion's {deleted:.4}", 100.0 * recovered);
        }
        let mut event = to_value(&found)?;
        event["step"] = json!(self.step);
        event["text"] = json!(text);
        self.host.event("validation", &event);
        let most = self.config.validation.most_gap;
        let gap = found.sparse_dense_gap().filter(|gap| gap.abs() > most && !self.state.warned);
        if let Some(gap) = gap {
            self.state.warned = true;
            self.say(&format!(
                "warning: ΔNLL@{horizon} under sparse attention is {gap:+.3} nats from that under dense attention, beyond the \
                 stated {}: a larger group, or training with the attention that will be used, helps",
                most
            ));
        }
        if better {
            let path = self.folder.path().join(NETWORK);
            self.trainer.network.save(&path, self.identity).map_err(model_error)?;
            self.state.best = Some(found);
            self.state.best_step = self.step as u64;
        }
        Ok(true)
    }

    /// One optimiser step of a stage.
    fn train(&mut self, stage: &Stage, begun: (Instant, usize)) -> Result<()> {
        let c = self.config;
        let start = Instant::now();
        let numbers = self.text.of_step(self.step, c.passages_per_step, &stage.mix, c.seed);
        let lessons: Vec<Lesson> = numbers
            .iter()
            .map(|at| Lesson { number: *at, tokens: &self.text.tokens[*at], rows: None })
            .collect();
        let lr = c.optimizer.lr_at(self.state.stage_step, self.step, c.steps());
        let mut random = Random::named(c.seed, &format!("spans of step {}", self.step));
        let report =
            self.trainer.step(&lessons, stage, c.spans_per_passage, lr, &mut random).map_err(|e| {
                PluginError::model(format!(
                    "step {} (stage {}, lr {lr:.2e}): {e}. The weights are as before this step; a lower optimizer.lr or a \
                     longer warm-up helps where a value is not finite",
                    self.step + 1,
                    self.state.stage + 1
                ))
            })?;
        self.step += 1;
        self.state.stage_step += 1;
        if stage.patience_steps > 0 {
            self.state.losses.push(report.loss);
        }
        let seconds = since(start);
        self.telemetry.record(Record::GistStep(GistStepRecord {
            step: self.step as u64,
            stage: self.state.stage,
            horizon: stage.horizon,
            loss: report.loss,
            delta_nll: report.delta_nll,
            lr,
            grad_norm: report.grad_norm,
            rows: report.rows as u64,
            wall_time: wall_time(),
            wall_seconds: seconds,
        }))?;
        let done = (self.step - begun.1) as f64;
        let left = (c.steps() - self.step) as f64;
        self.host.event(
            "progress",
            &json!({
                "job": "train_gistnet", "stage": self.state.stage + 1, "stages": c.stages.len(),
                "step": self.step, "steps": c.steps(), "loss": report.loss, "lr": lr,
                "delta_nll": report.delta_nll, "horizon": stage.horizon,
                "blocks_per_s": report.rows as f64 / seconds, "eta_s": since(begun.0) / done * left,
            }),
        );
        Ok(())
    }

    fn stages(&mut self) -> Result<()> {
        let begun = (Instant::now(), self.step);
        let c = self.config;
        while self.state.ended.is_none() && self.state.stage < c.stages.len() {
            let stage = &c.stages[self.state.stage];
            if !self.baselines(stage.horizon)? {
                return self.cancelled();
            }
            if stage.loss.stability != 0.0 {
                self.anchor()?;
            }
            if !self.state.validation_due {
                if self.host.cancelled() {
                    return self.cancelled();
                }
                self.train(stage, begun)?;
                let every = self.state.stage_step.is_multiple_of(c.validation.every);
                self.state.validation_due = every || self.end(stage).is_some();
                if self.state.validation_due || self.step.is_multiple_of(c.checkpoint.every) {
                    self.checkpoint()?;
                }
            }
            if self.state.validation_due {
                if !self.validate(stage.horizon)? {
                    return self.cancelled();
                }
                self.state.validation_due = false;
                if let Some(end) = self.end(stage) {
                    self.leave_stage(end);
                    self.checkpoint()?;
                }
            }
        }
        Ok(())
    }

    /// Why the stage ends here, if it does; it follows from the state alone.
    fn end(&self, stage: &Stage) -> Option<End> {
        let patience = self.config.validation.stop_after_rises;
        match &self.state {
            state if state.stage_step >= stage.steps => Some(End::Steps),
            state if patience > 0 && state.rises >= patience => Some(End::Rises(state.rises)),
            state if stage.advances(&state.losses) => Some(End::Improvement),
            _ => None,
        }
    }

    fn leave_stage(&mut self, end: End) {
        let steps = self.state.stage_step;
        let why = match end {
            End::Steps => None,
            End::Improvement => Some(format!("its loss improved no more after {steps} steps")),
            End::Rises(times) => Some(format!("its ΔNLL@H rose {times} times in a row, up to step {steps}")),
        };
        if let Some(why) = &why {
            self.say(&format!("stage {} ends: {why}", self.state.stage + 1));
        }
        self.state.stage += 1;
        self.state.losses.clear();
        if self.state.stage == self.config.stages.len() {
            self.state.ended = Some(
                why.map_or("all stages are done".to_string(), |why| format!("the last stage ended: {why}")),
            );
            return;
        }
        self.state.stage_step = 0;
        (self.state.best, self.state.last, self.state.rises) = (None, None, 0);
    }

    /// The best network on the test text; none where the host stopped it.
    fn test(&mut self, horizon: usize) -> Result<Option<Measured>> {
        self.say("measuring the best network on text that nothing was chosen by");
        let path = self.folder.path().join(NETWORK);
        let mut best = GistNet::load(&path, Expected::default()).map_err(model_error)?;
        best.network.set_device(&self.trainer.network.device()).map_err(model_error)?;
        let (host, validator) = (self.host, self.validator(self.test, horizon));
        measure_once(&validator, &best.network, self.trainer.buffers(), host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_are_counted_in_a_row() {
        let mut state = State::default();
        let rises: Vec<usize> = [0.9, 0.8, 0.85, 0.86, 0.5, 0.5]
            .into_iter()
            .map(|delta| {
                state.judge(delta).unwrap();
                state.rises
            })
            .collect();
        assert_eq!(rises, [0, 0, 1, 2, 0, 0]);
    }

    #[test]
    fn a_validation_that_is_no_number_is_refused_and_never_the_best() {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut state = State::default();
            let error = state.judge(bad).unwrap_err().message;
            assert!(error.contains("expected a finite ΔNLL@H, got "), "{error}");
            assert!(state.judge(0.7).unwrap() && state.rises == 0);
        }
    }
}
