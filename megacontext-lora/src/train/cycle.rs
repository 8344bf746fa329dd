//! Settings of a run of alternating optimisation, as they stand in `config.toml` and in the parameters of the job `train`, and
//! the phases that follow from them. What the run will cost is in the module `plan`.
//!
//! Source: MegaContext's joint training: a warm start (GistNet, then LensNet), then cycles of JT1 (GistNet, on the spans that the
//! policy collapses), JT2 (LensNet, on labels made with the gists of the time) and JT3 (LoRA, on the contexts that the policy
//! builds). The defaults are those of its documents where they name any (K 32, H 64, seven of eight tokens of the history behind
//! gists); they give λ1 and λ2 no value, which is why both are settings.
//!
//! Units: tokens, entries, nats, steps. Errors: a value out of range, by key.

use std::path::PathBuf;

use gistnet_adapter::curriculum::Stage;
use lensnet_adapter::allocator::AllocatorConfig;
use lensnet_adapter::counterfactual::CounterfactualConfig;
use lensnet_adapter::preference::PreferenceConfig;
use megacontext_base::config::DecoderConfig;
use megacontext_base::context::Limits;
use megacontext_base::device::DeviceChoice;
use megacontext_base::lora::LoraConfig;
use megacontext_base::params::Group;
use megacontext_base::rope::{RopeScaling, ScalingChoice};
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::precision::Precision;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::config::{
    Attention, CheckpointConfig, GroupSize, LONGEST_CONTEXT, OptimizerConfig, Schedule, pattern, stretched,
};
use super::gistnet::{NetworkSettings, PlaceSettings};
use super::lensnet::{LabelSettings, LensSettings};
use crate::error::{PluginError, Result};
use crate::jobs::model_error;
use crate::run::folder::config_hash_without;

mod plan;
#[cfg(test)]
mod tests;

pub use plan::CyclePlan;

/// A phase that trains GistNet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GistPhase {
    /// Optimiser steps; 0 leaves the phase out.
    pub steps: usize,
    /// Histories of a step.
    pub batch: usize,
    /// Spans of a history and step, each replaced by itself.
    pub spans: usize,
    /// Share of the histories whose collapsed spans are all replaced at once, as the context shows them (JT1 alone).
    pub whole: f64,
    /// Factor of ΔNLL@H.
    pub nll: f64,
    /// Factor of its divergence form.
    pub kl: f64,
    /// Optimiser and learning rate.
    pub optimizer: OptimizerConfig,
}

/// A phase that trains LensNet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LensPhase {
    /// Optimiser steps after each round of labels; 0 leaves the phase out.
    pub steps: usize,
    /// Labels of a step.
    pub batch: usize,
    /// How labels are made.
    pub labels: LabelSettings,
    /// Optimiser and learning rate.
    pub optimizer: OptimizerConfig,
}

/// A phase that trains LoRA on working contexts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraPhase {
    /// Optimiser steps; 0 leaves the phase out.
    pub steps: usize,
    /// Contexts of a step.
    pub batch: usize,
    /// What learns: `lora`, and besides it `embeddings`, `norms` or `sigma`.
    pub groups: Vec<Group>,
    /// λ1: factor of loss@H behind contexts that random focus chose, so that gists stay of use where the policy would not have
    /// put them.
    pub keep_alive: f64,
    /// λ2: factor of the divergence from the model as it entered the phase, which saw the history whole.
    pub teacher: f64,
    /// Attention while training.
    pub attention: Attention,
    /// Group of `s2`.
    pub group: GroupSize,
    /// Optimiser and learning rate.
    pub optimizer: OptimizerConfig,
}

/// When a phase is undone, and when the cycles end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Judge {
    /// Nats that loss@H may rise by in a phase; beyond it the phase is rolled back.
    pub tolerance: f64,
    /// Nats that the loss behind the whole history as tokens may rise by in JT3; beyond it the phase is rolled back.
    pub full_tolerance: f64,
    /// A cycle that lowers loss@H by fewer nats than this is the last one; 0 never is.
    pub plateau: f64,
}

/// Held-out histories.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CycleValidation {
    /// Histories that phases are judged by.
    pub histories: usize,
    /// Histories of other documents, measured at the end.
    pub test_histories: usize,
    /// Collapsed spans of a history whose ΔNLL@H is measured.
    pub spans: usize,
    /// Group of the sparse attention that contexts are measured under besides; none measures dense attention alone.
    pub sparse_group: Option<GroupSize>,
}

/// Everything a run is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CycleConfig {
    /// The base model's folder.
    pub base: PathBuf,
    /// An adapter on it, whose LoRA goes on learning.
    pub adapter: Option<PathBuf>,
    /// A GistNet to begin with, instead of a fresh one.
    pub gistnet: Option<PathBuf>,
    /// A LensNet to begin with, instead of a fresh one.
    pub lensnet: Option<PathBuf>,
    /// Sources of text: files, folders, globs; `corpus:held-out` stands for text found on this machine.
    pub data: Vec<String>,
    /// The run folder.
    pub out: PathBuf,
    /// Tokens of a passage, history and horizon, by cycle; the last one holds for all later cycles. Empty means what the model,
    /// or the adapter, was trained for.
    pub contexts: Vec<usize>,
    /// How positions are stretched for contexts beyond what the model was trained for; none means linear interpolation.
    pub scaling: Option<ScalingChoice>,
    /// H.
    pub horizon: usize,
    /// W_max, entries of a working context; none means a quarter of the history.
    pub budget: Option<usize>,
    /// The newest tokens that stay tokens.
    pub protected: u64,
    /// Levels of gists above the tokens.
    pub levels: u8,
    /// Refocuses of a context, one after another.
    pub refocuses: usize,
    /// Share of the documents kept for validation and test.
    pub holdout: f64,
    /// Seed of everything random.
    pub seed: u64,
    /// GistNet.
    pub network: NetworkSettings,
    /// LensNet.
    pub lens: LensSettings,
    /// Where entries stand.
    pub places: PlaceSettings,
    /// LoRA, where there is no adapter yet.
    pub lora: Option<LoraConfig>,
    /// The focus allocator.
    pub allocator: AllocatorConfig,
    /// Loss of counterfactual labels.
    pub counterfactual: CounterfactualConfig,
    /// Loss of preferences.
    pub preference: PreferenceConfig,
    /// Warm start of GistNet, on spans drawn from everywhere.
    pub warm_gistnet: GistPhase,
    /// Warm start of LensNet, on contexts of recency and random focus.
    pub warm_lensnet: LensPhase,
    /// Cycles.
    pub cycles: usize,
    /// GistNet.
    pub jt1: GistPhase,
    /// LensNet.
    pub jt2: LensPhase,
    /// LoRA.
    pub jt3: LoraPhase,
    /// When phases are undone.
    pub judge: Judge,
    /// At the end, the run again with each module frozen from its beginning, in turn: does it hurt?
    pub ablation: bool,
    /// Held-out histories.
    pub validation: CycleValidation,
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

fn optimizer(lr: f64, warmup_steps: usize) -> OptimizerConfig {
    OptimizerConfig {
        lr,
        schedule: Schedule::Cosine,
        warmup_steps,
        betas: [0.9, 0.999],
        weight_decay: 0.01,
        ..OptimizerConfig::default()
    }
}

impl Default for GistPhase {
    fn default() -> Self {
        Self {
            steps: 2000,
            batch: 8,
            spans: 8,
            whole: 0.5,
            nll: 1.0,
            kl: 0.0,
            optimizer: optimizer(1e-3, 50),
        }
    }
}

impl Default for LensPhase {
    fn default() -> Self {
        Self {
            steps: 2000,
            batch: 8,
            labels: LabelSettings { rounds: 1, histories: 2000, ..LabelSettings::default() },
            optimizer: optimizer(1e-3, 50),
        }
    }
}

impl Default for LoraPhase {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch: 8,
            groups: vec![Group::Lora],
            keep_alive: 0.1,
            teacher: 0.0,
            attention: Attention::Dense,
            group: GroupSize::Part(0.5),
            optimizer: OptimizerConfig { weight_decay: 0.0, ..optimizer(1e-4, 50) },
        }
    }
}

impl Default for Judge {
    fn default() -> Self {
        Self { tolerance: 0.0, full_tolerance: 0.05, plateau: 0.002 }
    }
}

impl Default for CycleValidation {
    fn default() -> Self {
        Self { histories: 64, test_histories: 64, spans: 4, sparse_group: None }
    }
}

impl Default for CycleConfig {
    fn default() -> Self {
        Self {
            base: PathBuf::new(),
            adapter: None,
            gistnet: None,
            lensnet: None,
            data: Vec::new(),
            out: PathBuf::from("runs/train"),
            contexts: Vec::new(),
            scaling: None,
            horizon: 64,
            budget: None,
            protected: 32,
            levels: 2,
            refocuses: 2,
            holdout: 0.1,
            seed: 0,
            network: NetworkSettings::default(),
            lens: LensSettings::default(),
            places: PlaceSettings::default(),
            lora: None,
            allocator: AllocatorConfig::default(),
            counterfactual: CounterfactualConfig::default(),
            preference: PreferenceConfig::default(),
            warm_gistnet: GistPhase { optimizer: optimizer(3e-3, 50), ..GistPhase::default() },
            warm_lensnet: LensPhase::default(),
            cycles: 3,
            jt1: GistPhase::default(),
            jt2: LensPhase::default(),
            jt3: LoraPhase::default(),
            judge: Judge::default(),
            ablation: false,
            validation: CycleValidation::default(),
            checkpoint: CheckpointConfig { every: 100, keep: 2 },
            dtype: Precision::F32,
            memory_budget_bytes: None,
            threads: None,
            device: DeviceChoice::Auto,
        }
    }
}

/// What a phase trains, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PhaseKind {
    /// GistNet, before the first cycle.
    WarmGistnet,
    /// LensNet, before the first cycle.
    WarmLensnet,
    /// GistNet.
    Jt1,
    /// LensNet.
    Jt2,
    /// LoRA.
    Jt3,
}

impl PhaseKind {
    /// As in files and events.
    pub fn name(self) -> &'static str {
        match self {
            Self::WarmGistnet => "warm_gistnet",
            Self::WarmLensnet => "warm_lensnet",
            Self::Jt1 => "jt1",
            Self::Jt2 => "jt2",
            Self::Jt3 => "jt3",
        }
    }

    /// The module that it is about.
    pub fn module(self) -> Group {
        match self {
            Self::WarmGistnet | Self::Jt1 => Group::Gistnet,
            Self::WarmLensnet | Self::Jt2 => Group::Lensnet,
            Self::Jt3 => Group::Lora,
        }
    }

    /// Is it part of the warm start?
    pub fn warm(self) -> bool {
        matches!(self, Self::WarmGistnet | Self::WarmLensnet)
    }
}

/// One phase of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhasePlace {
    /// What it trains.
    pub kind: PhaseKind,
    /// Its cycle from 1, 0 for the warm start.
    pub cycle: usize,
    /// The module that stays frozen in all of the pass that it belongs to; none for the run itself.
    pub without: Option<Group>,
}

impl PhasePlace {
    /// Names what is drawn in it: the same in an ablation as in the run itself, so that passes differ by what is frozen and not by
    /// chance.
    pub fn number(&self) -> usize {
        match self.kind {
            PhaseKind::WarmGistnet => 0,
            PhaseKind::WarmLensnet => 1,
            PhaseKind::Jt1 => 3 * self.cycle - 1,
            PhaseKind::Jt2 => 3 * self.cycle,
            PhaseKind::Jt3 => 3 * self.cycle + 1,
        }
    }
}

impl std::fmt::Display for PhasePlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            PhaseKind::WarmGistnet => f.write_str("warm start of GistNet")?,
            PhaseKind::WarmLensnet => f.write_str("warm start of LensNet")?,
            PhaseKind::Jt1 => write!(f, "cycle {}, JT1 (GistNet)", self.cycle)?,
            PhaseKind::Jt2 => write!(f, "cycle {}, JT2 (LensNet)", self.cycle)?,
            PhaseKind::Jt3 => write!(f, "cycle {}, JT3 (LoRA)", self.cycle)?,
        }
        match self.without {
            None => Ok(()),
            Some(group) => write!(f, ", {group} frozen"),
        }
    }
}

/// Modules that an ablation freezes in turn.
pub const MODULES: [Group; 3] = [Group::Gistnet, Group::Lensnet, Group::Lora];

/// Puts settings over defaults, key by key in tables.
fn over(defaults: &mut Value, settings: Value) {
    match (defaults, settings) {
        (Value::Object(defaults), Value::Object(settings)) => {
            for (key, value) in settings {
                over(defaults.entry(key).or_insert(Value::Null), value);
            }
        }
        (place, value) => *place = value,
    }
}

impl CycleConfig {
    /// Settings of a file or a job: what they leave out is as in [`CycleConfig::default`], in every phase's table too.
    ///
    /// # Errors
    /// A key that there is not, a value of another type; by key.
    pub fn from_json(settings: Value) -> Result<Self> {
        let mut whole = crate::jobs::to_value(Self::default())?;
        over(&mut whole, settings);
        crate::jobs::parse(whole)
    }

    /// All phases in their order, those of ablations last. LoRA has no part in the warm start, which is not run again without it.
    pub fn phases(&self) -> Vec<PhasePlace> {
        let mut all = Vec::new();
        let passes = [None].into_iter().chain(MODULES.map(Some).into_iter().filter(|_| self.ablation));
        for without in passes {
            if without != Some(Group::Lora) {
                let warm = [PhaseKind::WarmGistnet, PhaseKind::WarmLensnet];
                all.extend(warm.map(|kind| PhasePlace { kind, cycle: 0, without }));
            }
            for cycle in 1..=self.cycles {
                for kind in [PhaseKind::Jt1, PhaseKind::Jt2, PhaseKind::Jt3] {
                    all.push(PhasePlace { kind, cycle, without });
                }
            }
        }
        all.retain(|phase| self.steps_of(phase.kind) > 0 && phase.without != Some(phase.kind.module()));
        all
    }

    /// Optimiser steps of a phase.
    pub fn steps_of(&self, kind: PhaseKind) -> usize {
        match kind {
            PhaseKind::WarmGistnet | PhaseKind::Jt1 => self.gist_phase(kind).steps,
            PhaseKind::WarmLensnet | PhaseKind::Jt2 => {
                let phase = self.lens_phase(kind);
                phase.steps * phase.labels.rounds
            }
            PhaseKind::Jt3 => self.jt3.steps,
        }
    }

    /// Settings of a phase that trains GistNet.
    pub fn gist_phase(&self, kind: PhaseKind) -> &GistPhase {
        if kind.warm() { &self.warm_gistnet } else { &self.jt1 }
    }

    /// Settings of a phase that trains LensNet.
    pub fn lens_phase(&self, kind: PhaseKind) -> &LensPhase {
        if kind.warm() { &self.warm_lensnet } else { &self.jt2 }
    }

    /// Optimiser of a phase.
    pub fn optimizer_of(&self, kind: PhaseKind) -> &OptimizerConfig {
        match kind {
            PhaseKind::WarmGistnet | PhaseKind::Jt1 => &self.gist_phase(kind).optimizer,
            PhaseKind::WarmLensnet | PhaseKind::Jt2 => &self.lens_phase(kind).optimizer,
            PhaseKind::Jt3 => &self.jt3.optimizer,
        }
    }

    /// Tokens of a passage in a cycle; the warm start has those of the first.
    pub fn context_of(&self, cycle: usize) -> usize {
        let at = cycle.saturating_sub(1).min(self.contexts.len().saturating_sub(1));
        self.contexts.get(at).copied().unwrap_or(0)
    }

    /// The longest passage of all cycles.
    pub fn longest(&self) -> usize {
        (1..=self.cycles.max(1)).map(|cycle| self.context_of(cycle)).max().unwrap_or(0)
    }

    /// W_max and protected tail at a context.
    ///
    /// # Errors
    /// A budget smaller than the tail.
    pub fn limits(&self, context: usize) -> Result<Limits> {
        Limits::new(self.budget_of(context), self.protected).map_err(model_error)
    }

    /// W_max at a context.
    pub fn budget_of(&self, context: usize) -> usize {
        self.budget.unwrap_or((context - self.horizon.min(context)) / 4)
    }

    /// How positions are stretched at a context; `trained` is what the model with its adapter has been trained for, with `own`
    /// scaling.
    ///
    /// # Errors
    /// A scaling that does not fit the model.
    pub fn scaling_of(
        &self,
        model: &DecoderConfig,
        own: &RopeScaling,
        trained: usize,
        context: usize,
    ) -> Result<RopeScaling> {
        if context <= trained && self.scaling.is_none() {
            return Ok(own.clone());
        }
        stretched(model, self.scaling.as_ref(), None, context.max(trained))
    }

    /// Attention of JT3 over so many entries.
    ///
    /// # Errors
    /// A group that is none.
    pub fn jt3_pattern(&self, entries: usize) -> Result<Pattern> {
        pattern(self.jt3.attention, self.jt3.group, entries)
    }

    /// The curriculum's stage that a phase of GistNet comes to.
    pub fn stage_of(&self, kind: PhaseKind) -> Stage {
        let phase = self.gist_phase(kind);
        let level2 = if self.levels > 1 { 0.25 } else { 0.0 };
        Stage {
            horizon: self.horizon,
            steps: phase.steps.max(1),
            nll: phase.nll,
            kl: phase.kl,
            level2: if kind.warm() { level2 } else { 0.0 },
            ..Stage::default()
        }
    }

    /// Fills in what depends on the model and refuses what does not fit it; `trained` is the context that it was trained for.
    pub fn resolve(mut self, model: &DecoderConfig, trained: usize) -> Result<Self> {
        let usage = |message: String| Err(PluginError::usage(message));
        let gist = self.network.of(model);
        gist.check().map_err(|e| PluginError::usage(format!("network: {e}")))?;
        self.network.heads = Some(gist.heads);
        let lens = self.lens.of(model, self.network.block);
        lens.check().map_err(|e| PluginError::usage(format!("lens: {e}")))?;
        self.lens.heads = Some(lens.heads);
        self.allocator.check().map_err(|e| PluginError::usage(format!("allocator: {e}")))?;
        if !(1..=lensnet_adapter::LEVELS as u8 - 1).contains(&self.levels) {
            let most = lensnet_adapter::LEVELS - 1;
            return usage(format!("levels: expected 1 to {most}, got {}", self.levels));
        }
        if self.adapter.is_some() && self.lora.is_some() {
            return usage(
                "lora: expected none beside an adapter, whose own LoRA goes on learning, got settings"
                    .to_string(),
            );
        }
        if self.adapter.is_none() {
            self.lora.get_or_insert_default().validate(model).map_err(model_error)?;
        }
        for (key, value) in [
            ("horizon", self.horizon),
            ("refocuses", self.refocuses),
            ("validation.histories", self.validation.histories),
            ("validation.test_histories", self.validation.test_histories),
            ("validation.spans", self.validation.spans),
            ("checkpoint.every", self.checkpoint.every),
        ] {
            if value == 0 {
                return usage(format!("{key}: expected at least 1, got 0"));
            }
        }
        if !(self.holdout > 0.0 && self.holdout < 1.0) {
            return usage(format!("holdout: expected a share between 0 and 1, got {}", self.holdout));
        }
        self.check_phases()?;
        if self.contexts.is_empty() {
            self.contexts = vec![trained];
        }
        let block = self.network.block;
        let least = 2 * block + self.protected as usize + self.horizon;
        for context in self.contexts.clone() {
            if !(least..=LONGEST_CONTEXT).contains(&context) {
                return usage(format!(
                    "contexts: expected {least} to {LONGEST_CONTEXT} tokens, for two blocks of {block}, a protected tail of {} and \
                     a horizon of {}, got {context}",
                    self.protected, self.horizon
                ));
            }
            self.limits(context)?;
            let own = &model.rope_scaling;
            self.scaling_of(model, own, trained, context)?;
        }
        if self.contexts.windows(2).any(|pair| pair[1] < pair[0]) {
            return usage(format!("contexts: expected lengths that never fall, got {:?}", self.contexts));
        }
        if self.phases().is_empty() {
            return usage("cycles: expected at least one phase with steps, got none".to_string());
        }
        Ok(self)
    }

    fn check_phases(&self) -> Result<()> {
        let usage = |message: String| Err(PluginError::usage(message));
        for (name, phase) in [("warm_gistnet", &self.warm_gistnet), ("jt1", &self.jt1)] {
            for (key, value) in [("batch", phase.batch), ("spans", phase.spans)] {
                if value == 0 {
                    return usage(format!("{name}.{key}: expected at least 1, got 0"));
                }
            }
            if !(0.0..=1.0).contains(&phase.whole) {
                return usage(format!("{name}.whole: expected a share from 0 to 1, got {}", phase.whole));
            }
        }
        for kind in [PhaseKind::WarmGistnet, PhaseKind::Jt1] {
            self.stage_of(kind)
                .check(self.data.len())
                .map_err(|e| PluginError::usage(format!("{}: {e}", kind.name())))?;
        }
        for (name, phase) in [("warm_lensnet", &self.warm_lensnet), ("jt2", &self.jt2)] {
            for (key, value) in [
                ("batch", phase.batch),
                ("labels.rounds", phase.labels.rounds),
                ("labels.histories", phase.labels.histories),
            ] {
                if value == 0 {
                    return usage(format!("{name}.{key}: expected at least 1, got 0"));
                }
            }
            phase
                .labels
                .check()
                .map_err(|e| PluginError { message: format!("{name}.{}", e.message), ..e })?;
        }
        let jt3 = &self.jt3;
        if jt3.batch == 0 {
            return usage("jt3.batch: expected at least 1, got 0".to_string());
        }
        let known = [Group::Lora, Group::Embeddings, Group::Norms, Group::Sigma];
        if let Some(bad) = jt3.groups.iter().find(|group| !known.contains(group)) {
            return usage(format!("jt3.groups: expected lora, embeddings, norms or sigma, got {bad}"));
        }
        if !jt3.groups.contains(&Group::Lora) {
            return usage(format!("jt3.groups: expected lora among them, got {:?}", jt3.groups));
        }
        if jt3.teacher != 0.0 && jt3.groups.contains(&Group::Embeddings) {
            return usage(
                "jt3.teacher: expected 0 where the embeddings learn, since the teacher has the same output head, got more"
                    .to_string(),
            );
        }
        for (key, value) in [
            ("jt3.keep_alive", jt3.keep_alive),
            ("jt3.teacher", jt3.teacher),
            ("judge.tolerance", self.judge.tolerance),
            ("judge.full_tolerance", self.judge.full_tolerance),
            ("judge.plateau", self.judge.plateau),
        ] {
            if !value.is_finite() || value < 0.0 {
                return usage(format!("{key}: expected a number of at least 0, got {value}"));
            }
        }
        for kind in
            [PhaseKind::WarmGistnet, PhaseKind::WarmLensnet, PhaseKind::Jt1, PhaseKind::Jt2, PhaseKind::Jt3]
        {
            self.optimizer_of(kind)
                .validate()
                .map_err(|e| PluginError { message: format!("{}.{}", kind.name(), e.message), ..e })?;
        }
        Ok(())
    }

    /// Hash of what the result depends on.
    ///
    /// # Errors
    /// When the settings are no JSON.
    pub fn identity(&self) -> Result<String> {
        let beside = [
            "base",
            "adapter",
            "gistnet",
            "lensnet",
            "data",
            "out",
            "threads",
            "device",
            "memory_budget_bytes",
        ];
        config_hash_without(self, &beside)
    }
}
