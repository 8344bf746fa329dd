//! The job `train_lensnet`: LensNet learns where a closer look at a history is worth its entries.
//!
//! Order: everything is read, checked and planned; then the run folder is made; gists of all histories are made; what other
//! policies come to on the held-out histories is measured once. Then, round by round: labels are made on the contexts of the
//! policy as it is, LensNet learns from all labels so far, and is validated. The best network so far, by loss@H of the
//! contexts that it chooses on held-out histories, stands in `lensnet.safetensors` at any time.
//!
//! The lowest of several validations on the same histories is a little too good. So the figures that a run ends with come from
//! other held-out histories, on which nothing was chosen: measured once, when the best network stands.
//!
//! Labels are written as they are made (`labels/round-N.jsonl`; whole rounds as tables, `labels/round-N.parquet`), each one following from the seed, the round and the network
//! with which the round began; a run that is taken up goes on where it stopped and ends with the same network.
//!
//! Units: nats, tokens, entries, seconds, bytes. Errors: before the run folder exists, anything about settings, model, data,
//! memory.

mod labelling;
mod outcome;

use std::collections::BTreeMap;
use std::time::Instant;

use lensnet_adapter::counterfactual::Scale;
use lensnet_adapter::focus::{Focus, History};
use lensnet_adapter::labels::Label;
use lensnet_adapter::trainer::{LensTrainer, Lesson, Objective};
use lensnet_adapter::validate::{Reference, References, Validation, Validator};
use lensnet_adapter::{Identity, LensNet};
use megacontext_base::buffers::Buffers;
use megacontext_base::context::{BaseModel, HorizonLoss};
use megacontext_base::decoder::Decoder;
use megacontext_base::params::{Group, ParamStore};
use megacontext_base::random::Random;
use megacontext_kernels::attention::Pattern;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::host_allocator::HostAllocator;
use crate::jobs::begin::{Begun, Resumable, begin};
use crate::jobs::device::{OnDevice, network_beside};
use crate::jobs::evaluation::Inputs;
use crate::jobs::{ModelDir, model_error, parse, to_value, with_threads};
use crate::run::Telemetry;
use crate::run::checkpoint::{self, Loaded};
use crate::run::folder::{RunFolder, expect_run};
use crate::run::metrics::{LensStepRecord, LensValidationRecord, Record, wall_time};
use crate::train::device_plan::DeviceMemory;
use crate::train::histories::{self, Passage};
use crate::train::lensnet::{LensPlan, LensRunConfig};
use crate::train::plan::since;

/// The best network's file in a run folder.
pub const NETWORK: &str = "lensnet.safetensors";
/// What other policies came to on the histories that the network is chosen by, and on those to test on, in a run folder.
const REFERENCES: &str = "references.json";
/// See there.
const TEST_REFERENCES: &str = "test-references.json";
/// Refocuses of the contexts in the report, in a run folder.
const TRACES: &str = "traces.jsonl";

#[derive(Deserialize)]
struct Params {
    #[serde(default)]
    resume: bool,
    #[serde(flatten)]
    config: Map<String, Value>,
}

/// A finished run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LensSummary {
    /// The best network on the test histories, on which nothing was chosen.
    pub test: Validation,
    /// The same network on the histories that it was chosen by.
    pub validation: Validation,
    /// Mean loss@H on the test histories of contexts by policy, LensNet's among them (`lensnet`, `recency`, `random`, `oracle`),
    /// nats per token.
    pub focus_loss: BTreeMap<String, f64>,
    /// Share of the test histories whose planted fact a policy's context shows, where facts were planted.
    pub facts_shown: BTreeMap<String, f64>,
    /// W_max.
    pub budget: usize,
    /// Tokens of a history.
    pub history: usize,
    /// H.
    pub horizon: usize,
    /// Nats that a score of 1 stands for.
    pub unit: f64,
    /// Labels made.
    pub labels: usize,
    /// Optimiser steps done, and at which the best network was found.
    pub steps: u64,
    /// See there.
    pub best_step: u64,
    /// Parameters of the network.
    pub parameters: usize,
    /// Version of the gists that labels were made with.
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
    /// GistNet's file.
    pub gistnet: String,
    /// Where the text came from.
    pub data: Vec<String>,
    /// Histories to learn from, to choose by, and to test on.
    pub histories: usize,
    /// See there.
    pub held_out_histories: usize,
    /// See there.
    pub test_histories: usize,
    /// The network's file.
    pub network: String,
}

/// What a checkpoint knows besides tensors.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    config_hash: String,
    seed: u64,
    inputs: Inputs,
    /// Hashes of the frozen models' groups: base, adapter, GistNet.
    frozen: Vec<String>,
    /// Nats that a score of 1 stands for, once it is measured.
    unit: Option<f64>,
    best: Option<Validation>,
    best_step: u64,
    /// Rounds that are validated.
    validated: usize,
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

/// Runs the job.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let Params { resume, config } = parse(params)?;
    let config: LensRunConfig = parse(Value::Object(config))?;
    if resume {
        expect_run(&config.out)?;
    }
    let threads = config.threads;
    with_threads(threads, || prepare(config, resume, host))?
}

fn prepare(config: LensRunConfig, resume: bool, host: &dyn HostApi) -> Result<Value> {
    let started = Instant::now();
    let model = ModelDir::open(&config.base)?;
    let fingerprint = model.weights.fingerprint();
    if config.gistnet.as_os_str().is_empty() {
        return Err(PluginError::usage(
            "gistnet: expected the file of a GistNet, gistnet.safetensors of a run, got none",
        ));
    }
    let expected = gistnet_adapter::Expected {
        block: None,
        width: Some(model.config.hidden_size),
        base_fingerprint: Some(&fingerprint),
        ..gistnet_adapter::Expected::default()
    };
    let opened = gistnet_adapter::GistNet::load(&config.gistnet, expected).map_err(model_error)?;
    let (mut gistnet, made_beside) = (opened.network, opened.identity);
    let block = gistnet.config().block;
    let lora = model.lora_of(config.adapter.as_deref())?;
    let trained = model.trained_context(config.adapter.as_deref())?;
    let config = config.resolve(&model.config, block, trained)?;
    let limits = config.limits()?;
    let on = OnDevice::open(config.device, host)?.running(&model.config, host)?;
    let [text, held_out, test] = histories::read(&config, &model, block, host)?;
    let count = text.len() + held_out.len() + test.len();
    let plan = LensPlan::new(&config, &model.config, lora.as_ref(), gistnet.config(), count, on.device())?;
    let mut network =
        LensNet::new(config.network.of(&model.config, block), config.seed).map_err(model_error)?;
    network_beside("GistNet", gistnet.set_device(on.device()), host);
    network_beside("LensNet", network.set_device(on.device()), host);
    let parameters = network.config().parameters();
    let mut told = to_value(plan)?;
    told["text"] = json!(plan.text(&config, parameters));
    host.event("plan", &told);

    let (mut decoder, scaling, adapter) = model.decoder_with(config.adapter.as_deref(), config.dtype)?;
    on.take(&mut decoder)?;
    let on_base = model.adapter_fingerprint(&decoder, &scaling, adapter.as_ref())?;
    drop(adapter);
    let objective =
        Objective { counterfactual: config.counterfactual.clone(), preference: config.preference.clone() };
    let rule = config.rule(block);
    let trainer = LensTrainer::new(network, rule, config.levels, objective, config.optimizer.adamw())
        .map_err(model_error)?;
    let loss = HorizonLoss::new(&decoder, &scaling, rule, Pattern::Dense).map_err(model_error)?;
    let other = HostAllocator::new(host);
    let focus = Focus {
        loss: &loss,
        allocator: &config.allocator,
        other: Some(&other),
        limits,
        refocuses: config.validation.refocuses,
    };
    let identity = Identity {
        adapter_fingerprint: Some(on_base.clone()),
        place_rule: Some(rule),
        gist_version: Some(gistnet.gist_version()),
        ..Identity::of_base(&fingerprint)
    };
    let frozen = hashes(decoder.params(), gistnet.params())?;
    let folder = RunFolder::open(&config.out, resume)?;
    let tokens = text.iter().chain(&held_out).chain(&test).map(|passage| &passage.tokens);
    let state = State {
        config_hash: config.identity()?,
        seed: config.seed,
        inputs: Inputs::of(&model, decoder.device(), tokens),
        frozen: frozen.clone(),
        ..State::default()
    };
    let given = "--adapter and --gistnet";
    let Begun { state, telemetry, loaded, mut warnings } = begin(&folder, &config, state, resume, given)?;
    if let Err(error) = made_beside.check_adapter(&on_base, "GistNet", &config.gistnet) {
        warnings.push(format!("warning: {error}"));
    }
    for warning in warnings {
        host.event("log", &json!({ "message": warning }));
    }
    let name = config.base.file_name().map_or("base".to_string(), |name| name.to_string_lossy().into_owned());
    let base = BaseModel { name, fingerprint };
    let mut run = Run {
        host,
        before: state.seconds,
        config: &config,
        focus: &focus,
        device: decoder.device().describe(),
        identity,
        trainer,
        folder,
        telemetry,
        state,
        started,
        step: 0,
        labels: Vec::new(),
        buffers: Buffers::default(),
    };
    if let Some(loaded) = loaded {
        run.restore(loaded)?;
        run.say(&format!("resuming after step {} of {}", run.step, config.all_steps()));
    }
    let trees = |passages: &[Passage], what: &str| {
        make_trees(passages, what, &decoder, &gistnet, config.levels, &base, host)
    };
    let data = Data {
        text: trees(&text, "histories to learn from")?,
        held_out: trees(&held_out, "held-out histories")?,
        test: trees(&test, "histories to test on")?,
        gist_version: gistnet.gist_version(),
    };
    let result = run.finish(&data, &plan, parameters)?;
    if hashes(decoder.params(), gistnet.params())? != frozen {
        return Err(PluginError::internal(
            "a frozen parameter of the base model or GistNet changed while training",
        ));
    }
    Ok(result)
}

/// Hashes of what does not learn.
fn hashes(base: &ParamStore, gistnet: &ParamStore) -> Result<Vec<String>> {
    let groups = [Group::Base, Group::Embeddings, Group::Norms, Group::Lora, Group::Sigma];
    let of_base = groups.into_iter().map(|group| base.group_hash(group));
    of_base.chain([gistnet.group_hash(Group::Gistnet)]).map(|hash| hash.map_err(model_error)).collect()
}

fn make_trees(
    passages: &[Passage],
    what: &str,
    decoder: &Decoder,
    gistnet: &gistnet_adapter::GistNet,
    levels: u8,
    base: &BaseModel,
    host: &dyn HostApi,
) -> Result<Vec<History>> {
    host.event("log", &json!({ "message": format!("making the gists of {} {what}", passages.len()) }));
    let mut made = Vec::with_capacity(passages.len());
    for passage in passages {
        if host.cancelled() {
            return Err(PluginError::cancelled("stopped while gists were made; go on with --resume"));
        }
        made.push(passage.history(decoder, gistnet, levels, base)?);
    }
    Ok(made)
}

/// What a run learns from and is measured on.
struct Data {
    text: Vec<History>,
    held_out: Vec<History>,
    test: Vec<History>,
    gist_version: u16,
}

struct Run<'a> {
    host: &'a dyn HostApi,
    config: &'a LensRunConfig,
    focus: &'a Focus<'a>,
    /// What the base model's passes run on.
    device: String,
    /// What the network belongs to.
    identity: Identity,
    trainer: LensTrainer,
    folder: RunFolder,
    telemetry: Telemetry,
    state: State,
    started: Instant,
    /// Seconds of the parts before this one.
    before: f64,
    step: usize,
    /// Of all rounds so far.
    labels: Vec<Label>,
    buffers: Buffers,
}

impl Run<'_> {
    fn say(&self, message: &str) {
        self.host.event("log", &json!({ "message": message }));
    }

    fn cancelled<T>(&mut self) -> Result<T> {
        self.checkpoint()?;
        Err(PluginError::cancelled(format!(
            "stopped after step {} of {}; go on with --resume and the same settings",
            self.step,
            self.config.all_steps()
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

    /// Holds scores to those of the policy with which the round began, where the preference loss asks for it. It stands in a
    /// file, so that a run that is taken up in the middle of a round has the same.
    fn hold(&mut self, round: usize) -> Result<()> {
        if self.config.preference.kl_weight == 0.0 {
            return Ok(());
        }
        let path = self.folder.path().join(format!("round-{}-start.safetensors", round + 1));
        if self.step == round * self.config.steps {
            self.trainer.network.save(&path, &self.identity).map_err(model_error)?;
        }
        let before = LensNet::load(&path, lensnet_adapter::Expected::default()).map_err(model_error)?;
        self.trainer.hold_to(before.network).map_err(model_error)
    }

    fn scale(&self) -> Scale {
        self.config.counterfactual.scale(self.state.unit.unwrap_or(1.0))
    }

    fn validator<'a>(&'a self, histories: &'a [History]) -> Validator<'a> {
        Validator { focus: self.focus, histories, scale: self.scale(), seed: self.config.seed }
    }

    /// What other policies come to, kept in the file `name`; none where the host stopped it.
    fn references(&mut self, histories: &[History], name: &str) -> Result<Option<References>> {
        let path = self.folder.path().join(name);
        if path.is_file() {
            let text = std::fs::read_to_string(&path)
                .map_err(|e| PluginError::data(format!("{}: {e}", path.display())))?;
            let found = serde_json::from_str(&text).map_err(|e| {
                PluginError::data(format!("{}: expected what other policies came to: {e}", path.display()))
            })?;
            return Ok(Some(found));
        }
        let mut which = Reference::ALL.to_vec();
        which.retain(|reference| self.config.validation.oracle || *reference != Reference::Oracle);
        let names: Vec<&str> = which.iter().map(|reference| reference.name()).collect();
        self.say(&format!("measuring {} on {} histories", names.join(", "), histories.len()));
        let mut buffers = std::mem::take(&mut self.buffers);
        let host = self.host;
        let found = self.validator(histories).references_of(&which, &mut buffers, &mut || !host.cancelled());
        self.buffers = buffers;
        let Some(found) = found.map_err(model_error)? else { return Ok(None) };
        self.folder.write_json(name, &found)?;
        Ok(Some(found))
    }

    /// Validates the network as it is, keeps it if it is the best; false where the host stopped it.
    fn validate(&mut self, data: &Data, references: &References) -> Result<bool> {
        let begun = Instant::now();
        let mut buffers = std::mem::take(&mut self.buffers);
        let host = self.host;
        let found = self.validator(&data.held_out).measure(
            &self.trainer.network,
            references,
            &mut buffers,
            &mut || !host.cancelled(),
        );
        self.buffers = buffers;
        let Some(found) = found.map_err(model_error)? else { return Ok(false) };
        if !found.loss_at_h.is_finite() {
            return Err(PluginError::model(format!(
                "validation after step {}: expected a finite loss@{}, got {}",
                self.step, self.config.horizon, found.loss_at_h
            )));
        }
        self.telemetry.record(Record::LensValidation(Box::new(LensValidationRecord {
            step: self.step as u64,
            validation: found.clone(),
            wall_time: wall_time(),
            wall_seconds: since(begun),
        })))?;
        let mut event = to_value(&found)?;
        event["step"] = json!(self.step);
        event["text"] = json!(self.told(&found, references));
        self.host.event("validation", &event);
        if self.state.best.as_ref().is_none_or(|best| found.loss_at_h < best.loss_at_h) {
            let path = self.folder.path().join(NETWORK);
            self.trainer.network.save(&path, &self.identity).map_err(model_error)?;
            self.state.best = Some(found);
            self.state.best_step = self.step as u64;
        }
        Ok(true)
    }

    fn told(&self, found: &Validation, references: &References) -> String {
        let horizon = self.config.horizon;
        let mut text = format!("  step {:>5}  loss@{horizon} LensNet {:.4}", self.step, found.loss_at_h);
        for (reference, outcome) in &references.outcomes {
            text += &format!("  {} {:.4}", reference.name(), outcome.loss());
        }
        if let Some(shown) = found.facts_shown {
            text += &format!("  facts shown {:.0} %", 100.0 * shown);
        }
        text
    }

    fn train(&mut self, data: &Data, begun: (Instant, usize)) -> Result<()> {
        let c = self.config;
        let start = Instant::now();
        let mut random = Random::named(c.seed, &format!("labels of step {}", self.step));
        let scale = self.scale();
        let lessons: Vec<Lesson> = (0..c.batch)
            .map(|_| {
                let label = &self.labels[random.below(self.labels.len())];
                label.lesson(self.focus, &data.text[label.history()], scale).map_err(model_error)
            })
            .collect::<Result<_>>()?;
        let lr = c.optimizer.lr_at(self.step, self.step, c.all_steps());
        let report = self.trainer.step(&lessons, lr).map_err(|e| {
            PluginError::model(format!(
                "step {} (lr {lr:.2e}): {e}. The weights are as before this step; a lower optimizer.lr or a longer warm-up \
                 helps where a value is not finite",
                self.step + 1
            ))
        })?;
        self.step += 1;
        let seconds = since(start);
        self.telemetry.record(Record::LensStep(LensStepRecord {
            step: self.step as u64,
            loss: report.loss,
            lr,
            grad_norm: report.grad_norm,
            contexts: report.contexts as u64,
            wall_time: wall_time(),
            wall_seconds: seconds,
        }))?;
        let done = (self.step - begun.1) as f64;
        let left = (c.all_steps() - self.step) as f64;
        self.host.event(
            "progress",
            &json!({
                "job": "train_lensnet", "stage": (self.step - 1) / c.steps + 1, "stages": c.labels.rounds,
                "step": self.step, "steps": c.all_steps(), "loss": report.loss, "lr": lr,
                "eta_s": since(begun.0) / done * left,
            }),
        );
        Ok(())
    }

    /// All rounds.
    fn rounds(&mut self, data: &Data) -> Result<()> {
        let c = self.config;
        if self.state.unit.is_none() {
            self.state.unit = Some(self.measure_unit(data)?);
        }
        // Rounds that are over: their labels are learned from in the next ones too.
        for round in 0..self.step / c.steps {
            let mut labels = self.label(data, round)?;
            self.labels.append(&mut labels);
        }
        let mut known = None;
        for round in self.step / c.steps..=c.labels.rounds {
            // What a round ended with comes before the next one, also where that was interrupted.
            if round > self.state.validated {
                let references = match known.take() {
                    Some(references) => references,
                    None => match self.references(&data.held_out, REFERENCES)? {
                        Some(references) => references,
                        None => return self.cancelled(),
                    },
                };
                if !self.validate(data, &references)? {
                    return self.cancelled();
                }
                self.state.validated = round;
                known = Some(references);
                self.checkpoint()?;
            }
            if round == c.labels.rounds {
                break;
            }
            self.say(&format!("round {} of {}: making labels", round + 1, c.labels.rounds));
            let mut labels = self.label(data, round)?;
            self.labels.append(&mut labels);
            self.hold(round)?;
            let begun = (Instant::now(), self.step);
            while self.step < (round + 1) * c.steps {
                if self.host.cancelled() {
                    return self.cancelled();
                }
                self.train(data, begun)?;
                if self.step.is_multiple_of(c.checkpoint.every) || self.step == (round + 1) * c.steps {
                    self.checkpoint()?;
                }
            }
        }
        Ok(())
    }

    /// The best network.
    fn best(&self) -> Result<LensNet> {
        let path = self.folder.path().join(NETWORK);
        let mut best =
            LensNet::load(&path, lensnet_adapter::Expected::default()).map_err(model_error)?.network;
        best.set_device(&self.trainer.network.device()).map_err(model_error)?;
        Ok(best)
    }

    /// The best network and other policies on the test histories.
    fn test(&mut self, data: &Data) -> Result<(Validation, References)> {
        let Some(references) = self.references(&data.test, TEST_REFERENCES)? else { return self.cancelled() };
        let best = self.best()?;
        let mut buffers = std::mem::take(&mut self.buffers);
        let host = self.host;
        let found =
            self.validator(&data.test).measure(&best, &references, &mut buffers, &mut || !host.cancelled());
        self.buffers = buffers;
        match found.map_err(model_error)? {
            Some(found) => Ok((found, references)),
            None => self.cancelled(),
        }
    }
}
