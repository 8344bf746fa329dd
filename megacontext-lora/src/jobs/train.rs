//! The job `train`: alternating optimisation of GistNet, LensNet and LoRA over one base model.
//!
//! Order: everything is read, checked and planned; then the run folder is made. A phase then is: what the modules are worth is
//! measured; the host is asked; the phase's module learns while everything else is frozen (their bytes are hashed before and
//! after); what the modules are worth is measured again on the same histories; the phase is kept or rolled back. A phase that is
//! rolled back leaves the module, its optimiser and the version of the gists as they were.
//!
//! Swapping what learns copies nothing: a module's parameters are the same before, in and after a phase, and only which group learns
//! changes. Optimiser states of modules that pause lie on the disk (the private module `modules`).
//!
//! After a kept JT1 the gists are others: `gist_version` rises, every label is stale, and JT2 makes its own anew. Labels state what
//! they were made with, and labels of anything else are refused.
//!
//! Interrupted and taken up again, a run ends with the same bytes: a checkpoint stands at every border of a phase and every so many
//! steps, and everything drawn follows from seed, phase and step.
//!
//! Units: nats per token, tokens, entries, seconds, bytes. Errors: before the run folder exists, anything about settings, model,
//! data, memory.

mod judge;
mod learners;
mod learning;
mod modules;
mod outcome;
mod phase;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Instant;

use gistnet_adapter::GistNet;
use lensnet_adapter::LensNet;
use lensnet_adapter::validate::Difference;
use megacontext_base::buffers::Buffers;
use megacontext_base::context::{BaseModel, Limits};
use megacontext_base::decoder::Decoder;
use megacontext_base::params::{Group, ParamStore};
use megacontext_base::rope::{RopeScaling, SigmaRule};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{PluginError, Result};
use crate::host::{Answer, HostApi};
use crate::jobs::begin::{Begun, Resumable, begin};
use crate::jobs::device::{OnDevice, network_beside};
use crate::jobs::evaluation::Inputs;
use crate::jobs::{ModelDir, model_error, parse, to_value, with_threads};
use crate::run::Telemetry;
use crate::run::checkpoint;
use crate::run::folder::{RunFolder, expect_run};
use crate::run::tensor_file::Named;
use crate::train::cycle::{CycleConfig, CyclePlan, PhasePlace};
use crate::train::device_plan::DeviceMemory;
use crate::train::gistnet::NetworkSettings;
use crate::train::lensnet::LensSettings;
use crate::train::plan::since;

pub use judge::{Evaluation, STAND_INS, Verdict};
pub(crate) use outcome::by_loss;

use modules::{Modules, Moments, Stored};
use text::{Data, Text};

/// Levels of sigma's scales, where they learn.
const SIGMA_LEVELS: usize = 4;
/// Groups of the base model.
const MODEL: [Group; 5] = [Group::Base, Group::Embeddings, Group::Norms, Group::Lora, Group::Sigma];

#[derive(Deserialize)]
struct Params {
    #[serde(default)]
    resume: bool,
    /// Stops, as a cancelled run does, after so many optimiser steps of this call; none runs to the end.
    #[serde(default)]
    pause_after: Option<u64>,
    /// Gives back the plan and does nothing else.
    #[serde(default)]
    plan_only: bool,
    #[serde(flatten)]
    config: Map<String, Value>,
}

/// What a phase came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PhaseSummary {
    /// Which.
    #[serde(flatten)]
    pub place: PhasePlace,
    /// What became of it.
    pub verdict: Verdict,
    /// Tokens of a passage.
    pub context: usize,
    /// What the modules were worth before it, on the validation histories.
    pub before: Evaluation,
    /// After it, before it was undone where it was.
    pub after: Evaluation,
    /// Loss@H after less before, paired.
    pub change: Difference,
    /// Optimiser steps.
    pub steps: u64,
    /// Version of the gists when it ended.
    pub gist_version: u16,
}

/// What a pass through all cycles ended with, on the test histories.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PassSummary {
    /// The module that stayed frozen from the start; none for the run itself.
    pub without: Option<Group>,
    /// What the modules are worth.
    pub test: Evaluation,
    /// Loss@H less that of the run itself, paired; none for the run itself.
    pub change: Option<Difference>,
}

/// A finished run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CycleSummary {
    /// Every phase of the run itself, and of its ablations.
    pub phases: Vec<PhaseSummary>,
    /// What the modules were worth after the warm start, on test histories that nothing was chosen by.
    pub test_before: Evaluation,
    /// At the end.
    pub test: Evaluation,
    /// Loss@H at the end less after the warm start, paired; none where contexts rose between.
    pub test_change: Option<Difference>,
    /// ΔNLL@H of spans that contexts show as gists, by what stands for them, on the test histories.
    pub delta_nll: BTreeMap<String, f64>,
    /// Loss@H on the test histories by who chooses contexts, at the same budget.
    pub focus_loss: BTreeMap<String, f64>,
    /// LensNet's loss@H less each other's, paired.
    pub focus_against: BTreeMap<String, Difference>,
    /// With each module frozen in turn; empty where that was not asked for.
    pub ablation: Vec<PassSummary>,
    /// Why the cycles ended.
    pub ended: String,
    /// Cycles done.
    pub cycles: usize,
    /// Optimiser steps of all phases.
    pub steps: u64,
    /// Tokens of a passage, at the end.
    pub context: usize,
    /// W_max, at the end.
    pub budget: usize,
    /// H.
    pub horizon: usize,
    /// Version of the gists.
    pub gist_version: u16,
    /// Seed of everything random.
    pub seed: u64,
    /// Worker threads.
    pub threads: usize,
    /// What the model's passes ran on, at last; empty in summaries of older versions.
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
    /// Histories to learn from, to judge by, and to test on.
    pub histories: [usize; 3],
    /// Files: the adapter's folder, and both networks.
    pub adapter: String,
    /// See there.
    pub gistnet: String,
    /// See there.
    pub lensnet: String,
}

/// The modules as they stood at some time, for ablations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Kept {
    tensors: Stored,
    moments: Moments,
    gist_version: u16,
    lens_ready: bool,
    unit: Option<f64>,
}

/// What a checkpoint knows besides tensors.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct State {
    config_hash: String,
    seed: u64,
    inputs: Inputs,
    /// Hashes of what the run began with: base model, adapter, networks.
    began_with: Vec<String>,
    /// The phase that comes next, or that is open.
    phase: usize,
    entered: bool,
    phase_step: usize,
    /// Optimiser steps of all phases.
    step: u64,
    /// Why the open phase ended before its steps, to be undone.
    failed: Option<Verdict>,
    /// Tokens of a passage, of what was measured last.
    context: usize,
    gist_version: u16,
    lens_ready: bool,
    /// Nats that a score of 1 stands for.
    unit: Option<f64>,
    before: Option<Evaluation>,
    /// The open phase's module as the phase began, and the teacher's hidden states.
    start: Option<Stored>,
    teacher: Option<Stored>,
    moments: Moments,
    phases: Vec<PhaseSummary>,
    /// After the warm start.
    warm: Option<Kept>,
    /// Before it; kept where there will be ablations.
    origin: Option<Kept>,
    test_before: Option<Evaluation>,
    /// The module that the open pass leaves out.
    without: Option<Group>,
    passes: Vec<PassSummary>,
    focus_loss: BTreeMap<String, f64>,
    focus_against: BTreeMap<String, Difference>,
    /// The last cycle, and why.
    last_cycle: Option<usize>,
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
        &self.began_with
    }

    fn metric_lines(&self) -> u64 {
        self.metric_lines
    }
}

/// Where contexts of a cycle are.
#[derive(Clone)]
struct Scope {
    context: usize,
    scaling: RopeScaling,
    limits: Limits,
    rule: SigmaRule,
}

/// Runs the job.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let Params { resume, pause_after, plan_only, config } = parse(params)?;
    let config = CycleConfig::from_json(Value::Object(config))?;
    if resume {
        expect_run(&config.out)?;
    }
    let threads = config.threads;
    with_threads(threads, || prepare(config, resume, pause_after, plan_only, host))?
}

/// A network's settings, where the run begins with one from a file.
fn settings_of_files(
    config: &mut CycleConfig,
    model: &ModelDir,
) -> Result<(Option<GistNet>, Option<LensNet>)> {
    let fingerprint = model.weights.fingerprint();
    let width = Some(model.config.hidden_size);
    let mut gistnet = None;
    if let Some(path) = &config.gistnet {
        let expected = gistnet_adapter::Expected {
            width,
            base_fingerprint: Some(&fingerprint),
            ..gistnet_adapter::Expected::default()
        };
        let network = GistNet::load(path, expected).map_err(model_error)?.network;
        let c = network.config();
        config.network = NetworkSettings {
            block: c.block,
            mode: c.mode,
            layers: c.layers,
            heads: Some(c.heads),
            pooling: c.pooling,
            head: c.head,
            causal: c.causal,
        };
        gistnet = Some(network);
    }
    let mut lensnet = None;
    if let Some(path) = &config.lensnet {
        let expected = lensnet_adapter::Expected {
            width,
            block: Some(config.network.block),
            base_fingerprint: Some(&fingerprint),
            ..lensnet_adapter::Expected::default()
        };
        let network = LensNet::load(path, expected).map_err(model_error)?.network;
        let c = network.config();
        config.lens = LensSettings {
            kind: c.kind,
            layers: c.layers,
            heads: Some(c.heads),
            head: c.head,
            causal: c.causal,
            group: c.group,
            features: c.features,
        };
        lensnet = Some(network);
    }
    Ok((gistnet, lensnet))
}

fn prepare(
    mut config: CycleConfig,
    resume: bool,
    pause_after: Option<u64>,
    plan_only: bool,
    host: &dyn HostApi,
) -> Result<Value> {
    let started = Instant::now();
    let model = ModelDir::open(&config.base)?;
    let (gistnet, lensnet) = settings_of_files(&mut config, &model)?;
    let trained = model.trained_context(config.adapter.as_deref())?;
    let config = config.resolve(&model.config, trained)?;
    let lora = match model.lora_of(config.adapter.as_deref())? {
        Some(lora) => lora,
        None => config.lora.clone().unwrap_or_default().resolve(&model.config).map_err(model_error)?,
    };
    let on = OnDevice::open(config.device, host)?.running(&model.config, host)?;
    let text = Text::read(&config, &model, host)?;
    let count = config.validation.histories + config.validation.test_histories;
    let plan = CyclePlan::new(&config, &model.config, &lora, count, on.device())?;
    let mut told = to_value(&plan)?;
    told["text"] = json!(plan.text());
    host.event("plan", &told);
    if plan_only {
        return Ok(told);
    }

    let (mut decoder, own_scaling, adapter) = model.decoder_with(config.adapter.as_deref(), config.dtype)?;
    let replaced: BTreeSet<String> = adapter
        .iter()
        .flat_map(|adapter| adapter.parameters(decoder.config()))
        .map(|(name, _)| name.to_string())
        .collect();
    drop(adapter);
    if config.adapter.is_none() {
        decoder.attach_lora(config.lora.clone().unwrap_or_default(), config.seed).map_err(model_error)?;
    }
    if config.jt3.groups.contains(&Group::Sigma) && decoder.sigma_scales().is_none() {
        decoder.attach_sigma(SIGMA_LEVELS).map_err(model_error)?;
    }
    on.take(&mut decoder)?;
    // What will learn is stored as what learns is, from the start.
    decoder.params_mut().set_learning(config.jt3.groups.iter().copied()).map_err(model_error)?;
    decoder.params_mut().freeze();
    let lens_ready = lensnet.is_some();
    let mut gistnet = match gistnet {
        Some(network) => network,
        None => GistNet::new(config.network.of(decoder.config()), config.seed).map_err(model_error)?,
    };
    let mut lensnet = match lensnet {
        Some(network) => network,
        None => {
            let settings = config.lens.of(decoder.config(), config.network.block);
            LensNet::new(settings, config.seed).map_err(model_error)?
        }
    };
    network_beside("GistNet", gistnet.set_device(on.device()), host);
    network_beside("LensNet", lensnet.set_device(on.device()), host);
    let mut modules = Modules { decoder, gistnet, lensnet };
    let began_with = hashes(&modules)?;
    let folder = RunFolder::open(&config.out, resume)?;
    let state = State {
        config_hash: config.identity()?,
        seed: config.seed,
        inputs: Inputs::of(&model, modules.decoder.device(), text.documents()),
        began_with,
        gist_version: modules.gistnet.gist_version(),
        lens_ready,
        ..State::default()
    };
    let given = "the adapter and the networks";
    let Begun { state, telemetry, loaded, warnings } = begin(&folder, &config, state, resume, given)?;
    let mut taken_up = None;
    if let Some(loaded) = loaded {
        modules.put(loaded.tensors)?;
        modules.gistnet.set_gist_version(state.gist_version);
        taken_up = Some(loaded.optim);
    }
    for warning in warnings {
        host.event("log", &json!({ "message": warning }));
    }
    let name = config.base.file_name().map_or("base".to_string(), |name| name.to_string_lossy().into_owned());
    let mut run = Run {
        host,
        base: BaseModel { name, fingerprint: model.weights.fingerprint() },
        phases: config.phases(),
        before: state.seconds,
        config: &config,
        model: &model,
        text: &text,
        plan: &plan,
        trained,
        own_scaling,
        replaced,
        data: None,
        folder,
        telemetry,
        state,
        taken_up,
        started,
        pause_at: None,
        buffers: Buffers::default(),
    };
    run.pause_at = pause_after.map(|steps| run.state.step + steps);
    if resume && run.taken_up.is_some() {
        let phase = run.phases.get(run.state.phase).map_or("the end".to_string(), ToString::to_string);
        run.say(&format!("resuming at {phase}, step {}", run.state.phase_step));
    }
    run.finish(modules)
}

/// Hashes of everything in a run.
fn hashes(modules: &Modules) -> Result<Vec<String>> {
    let of_model = MODEL.map(|group| modules.decoder.params().group_hash(group));
    let networks = [
        modules.gistnet.params().group_hash(Group::Gistnet),
        modules.lensnet.params().group_hash(Group::Lensnet),
    ];
    of_model.into_iter().chain(networks).map(|hash| hash.map_err(model_error)).collect()
}

/// Hashes of what a phase must not change, by name.
fn frozen_hashes(modules: &Modules, learning: &[Group]) -> Result<Vec<(Group, String)>> {
    let stores: [(&ParamStore, &[Group]); 3] = [
        (modules.decoder.params(), &MODEL),
        (modules.gistnet.params(), &[Group::Gistnet]),
        (modules.lensnet.params(), &[Group::Lensnet]),
    ];
    let groups = stores.iter().flat_map(|(params, groups)| groups.iter().map(move |group| (*params, *group)));
    groups
        .filter(|(_, group)| !learning.contains(group))
        .map(|(params, group)| Ok((group, params.group_hash(group).map_err(model_error)?)))
        .collect()
}

struct Run<'a> {
    host: &'a dyn HostApi,
    base: BaseModel,
    phases: Vec<PhasePlace>,
    config: &'a CycleConfig,
    model: &'a ModelDir,
    text: &'a Text,
    plan: &'a CyclePlan,
    /// Context that the model with its adapter was trained for.
    trained: usize,
    own_scaling: RopeScaling,
    /// Tensors of the base model that the adapter replaces.
    replaced: BTreeSet<String>,
    /// Histories of the context of the time.
    data: Option<Rc<Data>>,
    folder: RunFolder,
    telemetry: Telemetry,
    state: State,
    /// Moments of the open phase's module, of a checkpoint that the run goes on from.
    taken_up: Option<Vec<Named<'static>>>,
    started: Instant,
    /// Seconds of the parts before this one.
    before: f64,
    /// Step after which this call stops.
    pause_at: Option<u64>,
    buffers: Buffers,
}

impl Run<'_> {
    fn say(&self, message: &str) {
        self.host.event("log", &json!({ "message": message }));
    }

    fn stopped<T>(&self) -> Result<T> {
        Err(PluginError::cancelled(format!(
            "stopped after step {}; go on with --resume and the same settings",
            self.state.step
        )))
    }

    /// Does the host, or the number of steps of this call, ask to stop?
    fn stops(&self) -> bool {
        self.host.cancelled() || self.pause_at.is_some_and(|at| self.state.step >= at)
    }

    /// Writes where the run stands, with the moments of what learns.
    fn checkpoint(
        &mut self,
        parts: &[modules::Part],
        optimizer: Option<&megacontext_base::gradients::Optimizer>,
    ) -> Result<()> {
        self.telemetry.sync()?;
        self.state.metric_lines = self.telemetry.lines();
        self.state.seconds = self.before + since(self.started);
        let mut state = to_value(&self.state)?;
        state["stage"] = json!(self.state.phase);
        let optim = checkpoint::moments(optimizer)?;
        let keep = self.config.checkpoint.keep;
        let path = modules::with_named(parts, |tensors| {
            checkpoint::save(self.folder.path(), self.state.step, &state, tensors, &optim, keep)
        })?;
        let told = json!({ "path": path, "step": self.state.step });
        self.host.event("checkpoint", &told);
        match self.host.hook("checkpoint", &told) {
            Answer::Continue => Ok(()),
            Answer::RollBack | Answer::Stop => self.stopped(),
        }
    }

    /// Contexts of a cycle.
    fn scope(&self, cycle: usize) -> Result<Scope> {
        let context = self.config.context_of(cycle);
        let scaling = self.config.scaling_of(&self.model.config, &self.own_scaling, self.trained, context)?;
        Ok(Scope {
            context,
            scaling,
            limits: self.config.limits(context)?,
            rule: self.config.places.rule(self.config.network.block),
        })
    }

    /// Histories of a context.
    fn data(&mut self, context: usize) -> Result<Rc<Data>> {
        match &self.data {
            Some(data) if data.context == context => Ok(data.clone()),
            _ => {
                let data = Rc::new(self.text.cut(self.config, context)?);
                self.data = Some(data.clone());
                Ok(data)
            }
        }
    }

    /// Names of the model's tensors that are not the base's: the adapter's, LoRA's, and what JT3 trains.
    fn own_tensors(&self, decoder: &Decoder) -> BTreeSet<String> {
        let params = decoder.params();
        let learns = |name: &&str| {
            params
                .group(name)
                .is_some_and(|group| group == Group::Lora || self.config.jt3.groups.contains(&group))
        };
        let learned = params.names().filter(learns).map(str::to_string);
        learned.chain(self.replaced.iter().cloned()).filter(|name| params.contains(name)).collect()
    }
}
