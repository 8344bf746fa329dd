//! Settings of an extension run, as they stand in `config.toml` and in the parameters of the job `extend`.
//!
//! Source of the defaults: the LongLoRA recipe (Chen et al. 2023): rank 8, alpha 16, no dropout, embeddings and norms
//! trained, AdamW with β2 0.95, no weight decay, constant learning rate after a short warm-up, S²-Attn with groups of
//! a quarter of the context. The stages are ours: the context doubles until it is reached, instead of in one jump.
//!
//! Units: contexts and groups in tokens, factors relative to the base model's original context.
//! Errors: every value out of range names its key, what was expected and what came. An unknown key is refused.

use std::path::PathBuf;

use megacontext_base::config::DecoderConfig;
use megacontext_base::device::DeviceChoice;
use megacontext_base::gradients::AdamWConfig;
use megacontext_base::lora::{LoraConfig, LoraKind, Names, TokenIndices};
use megacontext_base::params::Group;
use megacontext_base::rope::{RopeScaling, ScalingChoice};
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::precision::Precision;
use serde::{Deserialize, Serialize};

use crate::error::{PluginError, Result};
use crate::run::folder::config_hash_without;

/// The longest context: what a merged model's `config.json` may state. Beyond it a number is a slip of the pen.
pub const LONGEST_CONTEXT: usize = 1 << 24;
/// Most steps, and most tokens of a step: far beyond any run, and no product of sizes overflows.
pub(super) const MOST: usize = 1 << 32;

/// Optimiser steps over the default stages.
pub const DEFAULT_STEPS: usize = 300;

/// Everything a run is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExtendConfig {
    /// The base model's folder.
    pub base: PathBuf,
    /// Files, folders and globs with text; `corpus:held-out` stands for text found on this machine.
    pub data: Vec<String>,
    /// The run folder.
    pub out: PathBuf,
    /// The context to reach, in tokens.
    pub context: usize,
    /// Seed of initial values, data order and hold-out.
    pub seed: u64,
    /// How positions are stretched: a name (linear, ntk, dynamic, yarn, longrope, llama3), or a table as in `rope_scaling`
    /// of a `config.json`; none means the model's own kind, linear where it has none.
    pub scaling: Option<ScalingChoice>,
    /// Stretch from the original context for every stage that names none; none means context / original context.
    pub factor: Option<f64>,
    /// Share of the documents kept for evaluation.
    pub holdout: f64,
    /// LoRA on the attention projections.
    pub lora: LoraConfig,
    /// What of the token embeddings learns; `full` where absent.
    pub embeddings: Option<EmbeddingPolicy>,
    /// Tokens whose rows learn under `new-tokens`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub new_tokens: Vec<u32>,
    /// The older key for `embeddings`: true is `full`, false is `frozen`. Read, never written.
    #[serde(skip_serializing)]
    pub train_embeddings: Option<bool>,
    /// Train the normalisation gains in full.
    pub train_norms: bool,
    /// Optimiser and learning rate.
    pub optimizer: OptimizerConfig,
    /// How many tokens a step sees.
    pub batch: BatchConfig,
    /// Stages; none means [`default_stages`].
    pub stages: Vec<StageConfig>,
    /// Optimiser steps shared out over the default stages, [`DEFAULT_STEPS`] where absent; with stages given, their sum.
    pub steps: Option<usize>,
    /// Perplexity before and after.
    pub eval: EvalConfig,
    /// When to write checkpoints.
    pub checkpoint: CheckpointConfig,
    /// Precision class.
    pub dtype: Precision,
    /// Recompute blocks in the backward pass.
    pub activation_checkpointing: Recompute,
    /// Refuse to run beyond this many bytes; none means what the machine has free.
    pub memory_budget_bytes: Option<u64>,
    /// Threads; none means all cores.
    pub threads: Option<usize>,
    /// What passes run on: `cpu`, `cuda:N`, or `auto`.
    pub device: DeviceChoice,
}

impl Default for ExtendConfig {
    fn default() -> Self {
        Self {
            base: PathBuf::new(),
            data: Vec::new(),
            out: PathBuf::from("runs/extend"),
            context: 0,
            seed: 0,
            scaling: None,
            factor: None,
            holdout: 0.1,
            lora: LoraConfig::default(),
            embeddings: None,
            new_tokens: Vec::new(),
            train_embeddings: None,
            train_norms: true,
            optimizer: OptimizerConfig::default(),
            batch: BatchConfig::default(),
            stages: Vec::new(),
            steps: None,
            eval: EvalConfig::default(),
            checkpoint: CheckpointConfig::default(),
            dtype: Precision::F32,
            activation_checkpointing: Recompute::Auto,
            memory_budget_bytes: None,
            threads: None,
            device: DeviceChoice::Auto,
        }
    }
}

/// What of the token embeddings learns. LongLoRA needs them to (its table of embeddings and norms); what that costs is theirs
/// to weigh, and the plan says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EmbeddingPolicy {
    /// Nothing.
    Frozen,
    /// Two factors beside the table, of LoRA's rank; a tied head moves with them.
    Lora,
    /// The table, and with it a tied head.
    Full,
    /// The rows of `new_tokens`, and the head's of the same tokens.
    NewTokens,
}

impl EmbeddingPolicy {
    /// All, the cheapest first.
    pub const ALL: [Self; 4] = [Self::Frozen, Self::NewTokens, Self::Lora, Self::Full];

    /// The word used in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Frozen => "frozen",
            Self::Lora => "lora",
            Self::Full => "full",
            Self::NewTokens => "new-tokens",
        }
    }
}

/// AdamW and the learning-rate schedule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub lr: f64,
    /// Shape of the schedule after the warm-up.
    pub schedule: Schedule,
    /// Steps of linear warm-up at the start of every stage, since every stage changes the angles.
    pub warmup_steps: usize,
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay; norms, biases and embeddings are left out.
    pub weight_decay: f64,
    /// Largest global gradient norm, 0 for no clipping.
    pub clip: f64,
    /// LoRA+: the learning rate of LoRA's B in learning rates of everything else.
    pub lora_plus_lr_ratio: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        let adamw = AdamWConfig::default();
        Self {
            lr: 2e-4,
            schedule: Schedule::Constant,
            warmup_steps: 20,
            betas: adamw.betas,
            eps: adamw.eps,
            weight_decay: adamw.weight_decay,
            clip: adamw.clip,
            lora_plus_lr_ratio: adamw.lora_plus_lr_ratio,
        }
    }
}

impl OptimizerConfig {
    /// The part the optimiser keeps.
    pub fn adamw(&self) -> AdamWConfig {
        AdamWConfig {
            betas: self.betas,
            eps: self.eps,
            weight_decay: self.weight_decay,
            clip: self.clip,
            lora_plus_lr_ratio: self.lora_plus_lr_ratio,
        }
    }

    /// Learning rate of step `stage_step` of a stage (from 0) that is step `step` of `steps` of the run.
    ///
    /// Linear warm-up, then constant, or a cosine over the whole run down to a tenth of the peak.
    pub fn lr_at(&self, stage_step: usize, step: usize, steps: usize) -> f64 {
        let warm = ((stage_step + 1) as f64 / self.warmup_steps.max(1) as f64).min(1.0);
        let shape = match self.schedule {
            Schedule::Constant => 1.0,
            Schedule::Cosine => {
                let done = step as f64 / steps.max(1) as f64;
                0.1 + 0.45 * (1.0 + (std::f64::consts::PI * done).cos())
            }
        };
        self.lr * warm * shape
    }

    /// Refuses values out of range, by key.
    pub fn validate(&self) -> Result<()> {
        let positive = |key: &str, value: f64| {
            if value.is_finite() && value > 0.0 {
                Ok(())
            } else {
                Err(PluginError::usage(format!("optimizer.{key}: expected a positive number, got {value}")))
            }
        };
        positive("lr", self.lr)?;
        positive("eps", self.eps)?;
        positive("lora_plus_lr_ratio", self.lora_plus_lr_ratio)?;
        for beta in self.betas {
            if !(0.0..1.0).contains(&beta) {
                return Err(PluginError::usage(format!(
                    "optimizer.betas: expected 0 <= beta < 1, got {beta}"
                )));
            }
        }
        for (key, value) in [("weight_decay", self.weight_decay), ("clip", self.clip)] {
            if !value.is_finite() || value < 0.0 {
                return Err(PluginError::usage(format!("optimizer.{key}: expected 0 or more, got {value}")));
            }
        }
        Ok(())
    }
}

/// What the learning rate does after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls along a cosine to a tenth.
    Cosine,
}

/// Tokens of a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchConfig {
    /// Tokens an optimiser step sees, at least one sequence.
    pub tokens_per_step: usize,
    /// Tokens held in memory at once; a step is split into micro-batches of at most this many, at least one sequence.
    pub micro_batch_tokens: usize,
}

impl Default for BatchConfig {
    fn default() -> Self {
        Self { tokens_per_step: 8192, micro_batch_tokens: 8192 }
    }
}

impl BatchConfig {
    /// (rows of a micro-batch, micro-batches of a step) at a context length.
    pub fn shape(&self, context: usize) -> (usize, usize) {
        let rows = (self.tokens_per_step / context).max(1);
        let micro = (self.micro_batch_tokens / context).clamp(1, rows);
        (micro, rows.div_ceil(micro))
    }
}

/// Attention while training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Attention {
    /// Shifted sparse attention (S²-Attn).
    S2,
    /// Causal attention over everything.
    Dense,
}

/// Group size of S²-Attn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum GroupSize {
    /// So many tokens.
    Tokens(u64),
    /// So large a part of the context, 0 < part ≤ 1.
    Part(f64),
}

/// One stage of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageConfig {
    /// Length of the training sequences in tokens.
    pub context: usize,
    /// Attention while training; evaluation is dense.
    #[serde(default = "s2")]
    pub attention: Attention,
    /// Group size of S²-Attn.
    #[serde(default = "quarter")]
    pub group: GroupSize,
    /// Stretch from the original context; none means the run's, then context / original context (1 for dynamic, which looks
    /// at the length itself).
    #[serde(default)]
    pub factor: Option<f64>,
    /// How positions are stretched; none means as the run says.
    #[serde(default)]
    pub scaling: Option<ScalingChoice>,
    /// Optimiser steps.
    pub steps: usize,
}

impl GroupSize {
    /// Tokens of a group at a context length.
    pub fn tokens(self, context: usize) -> usize {
        match self {
            Self::Tokens(tokens) => tokens as usize,
            Self::Part(part) => (context as f64 * part).round() as usize,
        }
    }
}

/// The attention pattern at a context length.
///
/// # Errors
/// When the group is no part of the context, or below 2 tokens.
pub fn pattern(attention: Attention, group: GroupSize, context: usize) -> Result<Pattern> {
    if let GroupSize::Part(part) = group
        && !(part > 0.0 && part <= 1.0)
    {
        return Err(PluginError::usage(format!(
            "group: expected a part of the context, 0 < group <= 1, got {part}"
        )));
    }
    match (attention, group.tokens(context)) {
        (Attention::Dense, _) => Ok(Pattern::Dense),
        (Attention::S2, group @ 0..2) => {
            Err(PluginError::usage(format!("group: expected at least 2 tokens, got {group}")))
        }
        (Attention::S2, group) => Ok(Pattern::ShiftedSparse { group }),
    }
}

fn s2() -> Attention {
    Attention::S2
}

fn quarter() -> GroupSize {
    GroupSize::Part(0.25)
}

impl StageConfig {
    /// The attention pattern, with the group in tokens.
    pub fn pattern(&self) -> Pattern {
        match self.attention {
            Attention::Dense => Pattern::Dense,
            Attention::S2 => Pattern::ShiftedSparse { group: self.group.tokens(self.context) },
        }
    }

    /// The scaling of this stage on a model.
    pub fn scaling(&self, model: &DecoderConfig) -> Result<RopeScaling> {
        stretched(model, self.scaling.as_ref(), self.factor, self.context)
    }
}

/// The scaling that stretches a model to a context as asked.
pub fn stretched(
    model: &DecoderConfig,
    choice: Option<&ScalingChoice>,
    factor: Option<f64>,
    context: usize,
) -> Result<RopeScaling> {
    model.stretched().scaling(choice, factor, context).map_err(PluginError::usage)
}

/// Perplexity evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalConfig {
    /// Context lengths; empty means the original context and its doublings up to the one to reach.
    pub contexts: Vec<usize>,
    /// Tokens the window moves by; none means half the context.
    pub stride: Option<usize>,
    /// Stop after about so many scored tokens.
    pub max_tokens: usize,
    /// Measure what the adapted model is compared with, too: the base model, interpolation alone, sparse attention.
    pub baselines: bool,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self { contexts: Vec::new(), stride: None, max_tokens: 65_536, baselines: true }
    }
}

/// Checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Steps between two.
    pub every: usize,
    /// How many to keep.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every: 50, keep: 2 }
    }
}

/// Activation checkpointing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// When the plan without would take more than half of the memory that may be used.
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// The context doubles from the original until it is reached; `steps` are shared out so that the last stage has half.
pub fn default_stages(original: usize, context: usize, steps: usize) -> Vec<StageConfig> {
    let mut lengths = Vec::new();
    let mut length = original * 2;
    while length < context {
        lengths.push(length);
        length *= 2;
    }
    let early = lengths.len();
    let share = (steps / 2).checked_div(early).map_or(0, |share| share.max(1));
    let stage = |context, steps| StageConfig {
        context,
        attention: s2(),
        group: quarter(),
        factor: None,
        scaling: None,
        steps,
    };
    let mut stages: Vec<StageConfig> = lengths.into_iter().map(|c| stage(c, share)).collect();
    stages.push(stage(context, steps.saturating_sub(share * early).max(1)));
    stages
}

/// Refuses an evaluation's settings out of range; `at` stands in front of their keys.
pub fn check_evaluation(
    at: &str,
    contexts: &[usize],
    stride: Option<usize>,
    max_tokens: usize,
) -> Result<()> {
    let usage = |message: String| Err(PluginError::usage(message));
    if contexts.is_empty() {
        return usage(format!("{at}contexts: expected at least one length, got none"));
    }
    if let Some(bad) = contexts.iter().find(|c| !(2..=LONGEST_CONTEXT).contains(*c)) {
        return usage(format!("{at}contexts: expected 2 to {LONGEST_CONTEXT} tokens, got {bad}"));
    }
    if stride == Some(0) {
        return usage(format!("{at}stride: expected at least 1 token, got 0"));
    }
    if !(1..=MOST).contains(&max_tokens) {
        return usage(format!("{at}max_tokens: expected 1 to {MOST}, got {max_tokens}"));
    }
    Ok(())
}

impl ExtendConfig {
    /// What of the embeddings learns.
    pub fn policy(&self) -> EmbeddingPolicy {
        self.embeddings.unwrap_or(EmbeddingPolicy::Full)
    }

    /// These settings with another policy for the embeddings, LoRA's included.
    ///
    /// # Errors
    /// When the policy does not fit the other settings, or LoRA the model.
    pub fn with_policy(&self, policy: EmbeddingPolicy, model: &DecoderConfig) -> Result<Self> {
        let failed = |e: megacontext_base::error::BaseError| PluginError::usage(e.to_string());
        let mut out = self.clone();
        out.embeddings = Some(policy);
        out.lora.trainable_token_indices = None;
        if policy == EmbeddingPolicy::NewTokens {
            if self.new_tokens.is_empty() {
                return Err(PluginError::usage(
                    "new_tokens: expected the tokens whose rows learn under embeddings = \"new-tokens\", got none",
                ));
            }
            let module = |weight: &str| weight.trim_end_matches(".weight").to_string();
            let tables = [model.embedding_name(), model.head_name()].map(module);
            let rows = tables.map(|table| (table, self.new_tokens.clone()));
            out.lora.trainable_token_indices = Some(TokenIndices::Modules(rows.into()));
        } else if policy == EmbeddingPolicy::Lora {
            let resolved = out.lora.resolve(model).map_err(failed)?;
            if resolved.of_kind(LoraKind::Embedding).is_none() {
                out.lora = out.lora.with_embedding(model).map_err(failed)?;
            }
        }
        if policy != EmbeddingPolicy::Lora {
            let resolved = out.lora.resolve(model).map_err(failed)?;
            if let Some(embedding) = resolved.of_kind(LoraKind::Embedding) {
                let excluded = out.lora.exclude_modules.take().unwrap_or(Names::List(Vec::new()));
                out.lora.exclude_modules = Some(excluded.and(&[embedding.name.as_str()]));
            }
        }
        Ok(out)
    }

    /// The groups that learn.
    pub fn groups(&self) -> Vec<Group> {
        let mut groups = vec![Group::Lora];
        groups.extend((self.policy() == EmbeddingPolicy::Full).then_some(Group::Embeddings));
        groups.extend(self.train_norms.then_some(Group::Norms));
        groups
    }

    /// Reads a job's parameters.
    ///
    /// # Errors
    /// A key that does not exist, or a value of another type, by key; `sigma` among what is to learn.
    pub fn from_json(value: serde_json::Value) -> Result<Self> {
        let asks = |key: &str| match &value[key] {
            serde_json::Value::Null | serde_json::Value::Bool(false) => false,
            serde_json::Value::Array(groups) if key == "groups" => groups.iter().any(|g| g == "sigma"),
            _ => key != "groups",
        };
        if let Some(key) = ["sigma", "train_sigma", "groups"].into_iter().find(|key| asks(key)) {
            // Tokens have sigma 0, which no scale changes.
            return Err(PluginError::usage(format!(
                "{key}: extend trains on tokens, which have no sigma to learn from; expected a session, whose phase JT3 \
                 trains working contexts with the group sigma among its groups, got {key} = {}",
                value[key]
            )));
        }
        crate::jobs::parse(value)
    }

    /// Settles what of the embeddings learns.
    fn resolve_embeddings(mut self, model: &DecoderConfig) -> Result<Self> {
        let usage = |message: String| Err(PluginError::usage(message));
        let policy = match (self.embeddings, self.train_embeddings.take()) {
            (Some(policy), Some(older)) => {
                return usage(format!(
                    "train_embeddings: expected it left out beside embeddings = \"{}\", got {older}",
                    policy.name()
                ));
            }
            (Some(policy), None) => policy,
            (None, Some(false)) => EmbeddingPolicy::Frozen,
            (None, Some(true) | None) => EmbeddingPolicy::Full,
        };
        if policy != EmbeddingPolicy::NewTokens && !self.new_tokens.is_empty() {
            return usage(format!(
                "new_tokens: expected none beside embeddings = \"{}\"; embeddings = \"new-tokens\" trains them alone",
                policy.name()
            ));
        }
        if policy != EmbeddingPolicy::NewTokens && self.lora.trainable_token_indices.is_some() {
            return usage(
                "lora.trainable_token_indices: write embeddings = \"new-tokens\" and new_tokens".into(),
            );
        }
        let resolved = self.lora.resolve(model).map_err(|e| PluginError::usage(e.to_string()))?;
        if policy != EmbeddingPolicy::Lora && resolved.of_kind(LoraKind::Embedding).is_some() {
            return usage(format!(
                "lora.target_modules means the embedding, but embeddings = \"{}\"; write embeddings = \"lora\"",
                policy.name()
            ));
        }
        self.with_policy(policy, model)
    }

    /// Fills what was left open and refuses what cannot be run on this model.
    pub fn resolve(mut self, model: &DecoderConfig) -> Result<Self> {
        let usage = |message: String| Err(PluginError::usage(message));
        let original = model.original_context();
        if !(2..=LONGEST_CONTEXT).contains(&self.context) {
            return usage(format!("context: expected 2 to {LONGEST_CONTEXT} tokens, got {}", self.context));
        }
        if self.data.is_empty() {
            return usage("data: expected at least one file, folder or glob, got none".into());
        }
        if !(0.0..1.0).contains(&self.holdout) || self.holdout == 0.0 {
            return usage(format!("holdout: expected a share between 0 and 1, got {}", self.holdout));
        }
        self = self.resolve_embeddings(model)?;
        self.lora.validate(model).map_err(|e| PluginError::usage(e.to_string()))?;
        self.optimizer.validate()?;
        if let Some(steps) = self.steps.filter(|steps| !(1..=MOST).contains(steps)) {
            return usage(format!("steps: expected 1 to {MOST}, got {steps}"));
        }
        if self.stages.is_empty() {
            self.stages = default_stages(original, self.context, self.steps.unwrap_or(DEFAULT_STEPS));
            self.steps = None;
        }
        for (i, stage) in self.stages.iter_mut().enumerate() {
            let at = format!("stages[{i}]");
            if !(2..=LONGEST_CONTEXT).contains(&stage.context) {
                return usage(format!(
                    "{at}.context: expected 2 to {LONGEST_CONTEXT} tokens, got {}",
                    stage.context
                ));
            }
            if !(1..=MOST).contains(&stage.steps) {
                return usage(format!("{at}.steps: expected 1 to {MOST}, got {}", stage.steps));
            }
            pattern(stage.attention, stage.group, stage.context)
                .map_err(|e| PluginError::usage(format!("{at}.{e}")))?;
            stage.factor = stage.factor.or(self.factor);
            stage.scaling = stage.scaling.take().or_else(|| self.scaling.clone());
            let scaling =
                stage.scaling(model).map_err(|e| PluginError::usage(format!("{at}.{}", e.message)))?;
            stage.factor = Some(scaling.factor());
            if stage.scaling.is_none() && scaling != RopeScaling::None {
                stage.scaling = Some(ScalingChoice::Kind(scaling.kind().to_string()));
            }
        }
        let sum = self.stages.iter().map(|s| s.steps).sum();
        if let Some(steps) = self.steps.filter(|steps| *steps != sum) {
            return usage(format!(
                "steps: expected {sum}, the sum over the stages given, or none; got {steps}"
            ));
        }
        self.steps = Some(sum);
        let last = self.stages.last().map_or(0, |s| s.context);
        if last != self.context {
            return usage(format!(
                "stages: expected the last one to reach the context {}, got {last}",
                self.context
            ));
        }
        if self.eval.contexts.is_empty() {
            let mut context = original.min(self.context);
            while context < self.context {
                self.eval.contexts.push(context);
                context *= 2;
            }
            self.eval.contexts.push(self.context);
        }
        self.eval.contexts.sort_unstable();
        self.eval.contexts.dedup();
        check_evaluation("eval.", &self.eval.contexts, self.eval.stride, self.eval.max_tokens)?;
        if let Some(stage) = self.stages.last() {
            for &context in &self.eval.contexts {
                if let Pattern::ShiftedSparse { group } = (StageConfig { context, ..stage.clone() }).pattern()
                    && group < 2
                {
                    return usage(format!(
                        "eval.contexts: at {context} tokens the last stage's group is {group}; expected at least 2"
                    ));
                }
            }
        }
        for (key, tokens) in [
            ("tokens_per_step", self.batch.tokens_per_step),
            ("micro_batch_tokens", self.batch.micro_batch_tokens),
        ] {
            if !(1..=MOST).contains(&tokens) {
                return usage(format!("batch.{key}: expected 1 to {MOST}, got {tokens}"));
            }
        }
        if self.checkpoint.every == 0 || self.checkpoint.keep == 0 {
            return usage("checkpoint: expected every and keep of at least 1, got 0".into());
        }
        if self.threads == Some(0) {
            return usage("threads: expected at least 1, got 0".into());
        }
        Ok(self)
    }

    /// A hash over the settings that decide the result; a checkpoint of another configuration is not resumed. What the
    /// settings name (base, text, threads, device) is compared by the job itself.
    pub fn identity(&self) -> Result<String> {
        let mut decisive = self.clone();
        decisive.base = PathBuf::new();
        decisive.data = Vec::new();
        decisive.out = PathBuf::new();
        decisive.checkpoint = CheckpointConfig::default();
        decisive.memory_budget_bytes = None;
        decisive.threads = None;
        config_hash_without(&decisive, &["device"])
    }
}

#[cfg(test)]
mod tests;
