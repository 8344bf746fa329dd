//! Settings of a run that trains LensNet, as they stand in `config.toml` and in the parameters of the job `train_lensnet`, the
//! histories it learns from, and what it will cost.
//!
//! A document is cut into passages of `history` tokens and the `horizon` behind them; each is one history with a gist tree of its
//! own. `planted:N` among the sources stands for N documents with a known answer ([`super::planted`]).
//!
//! Units: tokens, entries, bytes, seconds. Errors: a value out of range, by key; text too short.

use std::path::PathBuf;

use gistnet_adapter::GistNetConfig;
use lensnet_adapter::allocator::AllocatorConfig;
use lensnet_adapter::counterfactual::CounterfactualConfig;
use lensnet_adapter::preference::PreferenceConfig;
use lensnet_adapter::{Features, Head, Kind, LensNetConfig};
use megacontext_base::buffers::gpu::{self, GpuBytes};
use megacontext_base::buffers::{PassShape, evaluation_bytes, keys_values_bytes};
use megacontext_base::config::DecoderConfig;
use megacontext_base::context::Limits;
use megacontext_base::device::{Device, DeviceChoice};
use megacontext_base::lora::LoraModules;
use megacontext_base::rope::SigmaRule;
use megacontext_kernels::precision::Precision;
use serde::{Deserialize, Serialize};

use super::config::{CheckpointConfig, LONGEST_CONTEXT, MOST, OptimizerConfig, Schedule};
use super::device_plan::{DevicePlan, with_device};
use super::gistnet::PlaceSettings;
use super::plan::{available_bytes, bytes, count, frozen_bytes, packed_bytes, resident_bytes};
use crate::error::{PluginError, Result};
use crate::jobs::model_error;
use crate::run::folder::config_hash_without;

/// Begins the name of a source of planted facts; how many documents follows.
pub const PLANTED: &str = "planted:";

/// The network, but for what the base model and GistNet decide.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LensSettings {
    /// `transformer`, or `dual`, whose entries and tail gists look at each other.
    pub kind: Kind,
    /// Blocks of the transformer, or stacks of the dual form.
    pub layers: usize,
    /// Heads; none means the base model's, where they divide its width evenly.
    pub heads: Option<usize>,
    /// `mlp` or `linear`.
    pub head: Head,
    /// Do entries attend to earlier ones alone?
    pub causal: bool,
    /// Shifted sparse attention in groups of so many entries; none means dense.
    pub group: Option<usize>,
    /// `scaled` or `original`.
    pub features: Features,
}

impl Default for LensSettings {
    fn default() -> Self {
        Self {
            kind: Kind::default(),
            layers: 2,
            heads: None,
            head: Head::default(),
            causal: false,
            group: None,
            features: Features::default(),
        }
    }
}

impl LensSettings {
    /// The network for a base model and blocks of `block`.
    pub fn of(&self, model: &DecoderConfig, block: usize) -> LensNetConfig {
        if self.kind == Kind::Dual {
            return LensNetConfig { block, layers: self.layers, ..LensNetConfig::dual(model.hidden_size) };
        }
        LensNetConfig {
            block,
            layers: self.layers,
            head: self.head,
            causal: self.causal,
            group: self.group,
            features: self.features,
            ..LensNetConfig::new(model.hidden_size, self.heads.unwrap_or(model.num_attention_heads))
        }
    }
}

/// What is measured to learn from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LabelKind {
    /// Every edit of a context.
    #[default]
    Counterfactual,
    /// Several variants of a context, each as a whole.
    Preference,
}

/// How labels are made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LabelSettings {
    /// `counterfactual` or `preference`.
    pub kind: LabelKind,
    /// Times that labels are made anew, each by the policy of the time.
    pub rounds: usize,
    /// Histories measured in a round.
    pub histories: usize,
    /// Edits tried of a context, at most; 0 means all.
    pub edits: usize,
    /// Share of contexts that random focus chooses instead of the policy.
    pub explore: f64,
    /// With `preference`: contexts of a history besides the first.
    pub variants: usize,
}

impl Default for LabelSettings {
    fn default() -> Self {
        Self {
            kind: LabelKind::Counterfactual,
            rounds: 3,
            histories: 160,
            edits: 0,
            explore: 0.25,
            variants: 7,
        }
    }
}

impl LabelSettings {
    /// Refuses settings that mean nothing.
    ///
    /// # Errors
    /// Names the key under `labels`.
    pub fn check(&self) -> Result<()> {
        if self.kind == LabelKind::Preference && self.variants == 0 {
            return Err(PluginError::usage("labels.variants: expected at least 1, got 0"));
        }
        if !(0.0..=1.0).contains(&self.explore) {
            let got = self.explore;
            return Err(PluginError::usage(format!(
                "labels.explore: expected a share from 0 to 1, got {got}"
            )));
        }
        Ok(())
    }

    /// Contexts that a label scores.
    pub fn contexts(&self) -> usize {
        match self.kind {
            LabelKind::Counterfactual => 1,
            LabelKind::Preference => self.variants + 1,
        }
    }
}

/// Validation while training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LensValidation {
    /// Held-out histories that the network is chosen by.
    pub histories: usize,
    /// Other held-out histories, on which the chosen network is measured once.
    pub test_histories: usize,
    /// Measure the oracle too? It takes longer than everything else of a validation.
    pub oracle: bool,
    /// Refocuses of a context, one after another.
    pub refocuses: usize,
}

impl Default for LensValidation {
    fn default() -> Self {
        Self { histories: 32, test_histories: 32, oracle: true, refocuses: 2 }
    }
}

/// Everything a run is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LensRunConfig {
    /// The base model's folder.
    pub base: PathBuf,
    /// An adapter on it.
    pub adapter: Option<PathBuf>,
    /// The GistNet that makes gists: `gistnet.safetensors` of a run.
    pub gistnet: PathBuf,
    /// Sources of text: files, folders, globs; `corpus:held-out` stands for text found on this machine, `planted:N` for N
    /// documents with a known answer.
    pub data: Vec<String>,
    /// The run folder.
    pub out: PathBuf,
    /// Tokens of a history; none means what the model, or the adapter, was trained for, less the horizon.
    pub history: Option<usize>,
    /// H.
    pub horizon: usize,
    /// W_max, entries of a working context; none means a quarter of the history.
    pub budget: Option<usize>,
    /// The newest tokens that stay tokens.
    pub protected: u64,
    /// Levels of gists above the tokens.
    pub levels: u8,
    /// Share of the documents kept for validation.
    pub holdout: f64,
    /// Seed of initial weights, order of the text, and everything drawn.
    pub seed: u64,
    /// The network.
    pub network: LensSettings,
    /// Where entries stand.
    pub places: PlaceSettings,
    /// Labels.
    pub labels: LabelSettings,
    /// Loss of counterfactual labels.
    pub counterfactual: CounterfactualConfig,
    /// Loss of preferences.
    pub preference: PreferenceConfig,
    /// The focus allocator.
    pub allocator: AllocatorConfig,
    /// Optimiser steps after each round of labels.
    pub steps: usize,
    /// Labels of a step.
    pub batch: usize,
    /// Optimiser and learning rate.
    pub optimizer: OptimizerConfig,
    /// Validation.
    pub validation: LensValidation,
    /// When to write checkpoints.
    pub checkpoint: CheckpointConfig,
    /// Precision class of the base model.
    pub dtype: Precision,
    /// Refuse to run beyond this many bytes; none means what the machine has free.
    pub memory_budget_bytes: Option<u64>,
    /// Threads; none means all cores.
    pub threads: Option<usize>,
    /// What passes run on: `cpu`, `cuda:N`, or `auto`.
    pub device: DeviceChoice,
}

impl Default for LensRunConfig {
    fn default() -> Self {
        Self {
            base: PathBuf::new(),
            adapter: None,
            gistnet: PathBuf::new(),
            data: Vec::new(),
            out: PathBuf::from("runs/lensnet"),
            history: None,
            horizon: 32,
            budget: None,
            protected: 32,
            levels: 2,
            holdout: 0.1,
            seed: 0,
            network: LensSettings::default(),
            places: PlaceSettings::default(),
            labels: LabelSettings::default(),
            counterfactual: CounterfactualConfig::default(),
            preference: PreferenceConfig::default(),
            allocator: AllocatorConfig::default(),
            steps: 120,
            batch: 8,
            optimizer: OptimizerConfig {
                lr: 1e-3,
                schedule: Schedule::Cosine,
                warmup_steps: 20,
                betas: [0.9, 0.999],
                weight_decay: 0.01,
                ..OptimizerConfig::default()
            },
            validation: LensValidation::default(),
            checkpoint: CheckpointConfig { every: 60, keep: 2 },
            dtype: Precision::F32,
            memory_budget_bytes: None,
            threads: None,
            device: DeviceChoice::Auto,
        }
    }
}

impl LensRunConfig {
    /// Where entries of blocks of `block` stand.
    pub fn rule(&self, block: usize) -> SigmaRule {
        SigmaRule { preset: self.places.preset, block, uniform: self.places.uniform }
    }

    /// Steps of all rounds.
    pub fn all_steps(&self) -> usize {
        self.labels.rounds.saturating_mul(self.steps)
    }

    /// Budget and protected tail of a resolved run.
    ///
    /// # Errors
    /// A budget smaller than the tail.
    pub fn limits(&self) -> Result<Limits> {
        Limits::new(self.budget.unwrap_or(0), self.protected).map_err(model_error)
    }

    /// Fills in what depends on the model and refuses what does not fit it; `trained` is the context that it was trained for.
    pub fn resolve(mut self, model: &DecoderConfig, block: usize, trained: usize) -> Result<Self> {
        let usage = |message: String| Err(PluginError::usage(message));
        let network = self.network.of(model, block);
        network.check().map_err(|e| PluginError::usage(format!("network: {e}")))?;
        self.network.heads = Some(network.heads);
        self.allocator.check().map_err(|e| PluginError::usage(format!("allocator: {e}")))?;
        if !(1..=lensnet_adapter::LEVELS as u8 - 1).contains(&self.levels) {
            let most = lensnet_adapter::LEVELS - 1;
            return usage(format!("levels: expected 1 to {most}, got {}", self.levels));
        }
        for (key, value) in [
            ("horizon", self.horizon),
            ("steps", self.steps),
            ("batch", self.batch),
            ("labels.rounds", self.labels.rounds),
            ("labels.histories", self.labels.histories),
            ("validation.histories", self.validation.histories),
            ("validation.test_histories", self.validation.test_histories),
            ("validation.refocuses", self.validation.refocuses),
            ("checkpoint.every", self.checkpoint.every),
        ] {
            if value == 0 {
                return usage(format!("{key}: expected at least 1, got 0"));
            }
            if value > MOST {
                return usage(format!("{key}: expected at most {MOST}, got {value}"));
            }
        }
        if !(self.holdout > 0.0 && self.holdout < 1.0) {
            return usage(format!("holdout: expected a share between 0 and 1, got {}", self.holdout));
        }
        self.labels.check()?;
        if self.counterfactual.unit.is_some_and(|unit| !(unit.is_finite() && unit > 0.0)) {
            let got = self.counterfactual.unit.unwrap_or_default();
            return usage(format!("counterfactual.unit: expected nats above 0, got {got}"));
        }
        self.optimizer.validate()?;
        if self.horizon > LONGEST_CONTEXT {
            return usage(format!(
                "horizon: expected at most {LONGEST_CONTEXT} tokens, got {}",
                self.horizon
            ));
        }
        let history = *self.history.get_or_insert(trained.saturating_sub(self.horizon));
        if history > LONGEST_CONTEXT {
            return usage(format!("history: expected at most {LONGEST_CONTEXT} tokens, got {history}"));
        }
        let least = 2 * block + self.protected as usize;
        if history < least {
            return usage(format!(
                "history: expected at least {least} tokens, for two blocks of {block} and a protected tail of {}, got {history}",
                self.protected
            ));
        }
        self.budget.get_or_insert(history / 4);
        self.limits()?;
        Ok(self)
    }

    /// Hash of what the result depends on.
    ///
    /// # Errors
    /// When the settings are no JSON.
    pub fn identity(&self) -> Result<String> {
        let beside =
            ["base", "adapter", "gistnet", "data", "out", "threads", "device", "memory_budget_bytes"];
        config_hash_without(self, &beside)
    }
}

/// Bytes that a run takes, by kind.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LensPlan {
    /// What the process held when it planned.
    pub program: u64,
    /// The base model, an adapter among it, and GistNet.
    pub weights: u64,
    /// LensNet, its gradients and its optimiser's moments.
    pub network: u64,
    /// What LensNet's graph keeps of a step.
    pub graph: u64,
    /// Tokens and gists of all histories.
    pub histories: u64,
    /// Keys and values of a context, buffers of passes over its variants, packed operands of products.
    pub passes: u64,
    /// Of all kinds.
    pub total: u64,
    /// What the run takes of a GPU, where its passes run on one.
    pub device: Option<DevicePlan>,
}

/// Values of an entry that LensNet's graph keeps, in widths of the model and per block; see GistNet's. Features and scorer
/// come to less than another block.
const GRAPH_WIDTHS: u64 = 40;

impl LensPlan {
    /// Plans a resolved run over `histories` histories before any weight is in memory; what it would hold must fit.
    ///
    /// # Errors
    /// When it does not, with the numbers and what would help.
    pub fn new(
        config: &LensRunConfig,
        model: &DecoderConfig,
        lora: Option<&LoraModules>,
        gistnet: &GistNetConfig,
        histories: usize,
        device: &Device,
    ) -> Result<Self> {
        let (e, block) = (model.hidden_size as u64, gistnet.block);
        let (budget, history) = (config.budget.unwrap_or(0), config.history.unwrap_or(0));
        let network = config.network.of(model, block);
        // A context with room for one more expand, and its future.
        let entries = budget + block + config.horizon;
        let pass = |entries| PassShape { entries, precision: config.dtype, lora };
        let (largest, kept) = (pass(entries.max(512)), keys_values_bytes(model, config.dtype, entries));
        let rows = config.batch * config.labels.contexts();
        let scored = rows * (budget + block);
        // The policy that a round begins with has its weights there too, and the best network in the end.
        let other = network.gpu_bytes(device, scored, false);
        let held_to = if config.preference.kl_weight != 0.0 { other } else { GpuBytes::default() };
        let on_gpu = gpu::evaluation_bytes(model, largest)
            .with(network.gpu_bytes(device, scored, true))
            .with(gistnet.gpu_bytes(device, gistnet.entries_at_once(), false))
            .with(other)
            .with(held_to);
        let blocks = if network.goes_to(device) { 0 } else { network.layers as u64 };
        let device = DevicePlan::of(device, on_gpu, kept)?;
        let passes = match device {
            None => evaluation_bytes(model, largest).total() + kept,
            Some(_) => 0,
        } + packed_bytes();
        let graph = 4 * scored as u64 * e * GRAPH_WIDTHS * (blocks + 1);
        let nodes = (history / block * 2) as u64;
        let plan = Self {
            program: resident_bytes().unwrap_or(0),
            weights: frozen_bytes(model, lora, config.dtype) + 4 * gistnet.parameters() as u64,
            network: 16 * network.parameters() as u64,
            graph,
            histories: histories as u64 * (4 * history as u64 + nodes * (4 * e + 2)),
            passes,
            total: 0,
            device,
        };
        let total = plan.program + plan.weights + plan.network + plan.graph + plan.histories + plan.passes;
        let plan = Self { total, ..plan };
        let free = available_bytes().map(|free| free + plan.program);
        let allowed = config.memory_budget_bytes.or(free).unwrap_or(u64::MAX);
        let mut help = vec!["a smaller batch", "a smaller budget of entries", "a smaller history"];
        if let Some(plan) = &plan.device {
            plan.check(config.dtype, &help)?;
        }
        if total > allowed {
            help.extend((!config.dtype.stores_bf16()).then_some("--dtype bf16"));
            return Err(PluginError::memory(format!(
                "the run needs about {}, but may use {}: {}. What would help: {}",
                bytes(total),
                bytes(allowed),
                plan.kinds(),
                help.join(", ")
            )));
        }
        Ok(plan)
    }

    fn kinds(&self) -> String {
        format!(
            "program {}, weights {}, LensNet {}, its graph {}, histories {}, passes {}",
            bytes(self.program),
            bytes(self.weights),
            bytes(self.network),
            bytes(self.graph),
            bytes(self.histories),
            bytes(self.passes)
        )
    }

    /// The plan in a sentence.
    pub fn text(&self, config: &LensRunConfig, parameters: usize) -> String {
        let text = format!(
            "plan: at most about {} of memory ({}); {} rounds of labels and {} steps; {} parameters of LensNet learn",
            bytes(self.total),
            self.kinds(),
            config.labels.rounds,
            config.all_steps(),
            count(parameters as u64)
        );
        with_device(text, self.device.as_ref())
    }
}
