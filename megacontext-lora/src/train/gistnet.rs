//! Settings of a run that trains GistNet, as they stand in `config.toml` and in the parameters of the job `train_gistnet`,
//! and the text it learns from. What it will cost is in the module `plan`.
//!
//! A document is cut into passages of `context` tokens; what is left at its end is a passage too if a block and its horizon fit
//! in. Which passage comes when follows from the seed and the step alone, so a run that goes on stores no place in the data.
//!
//! Units: tokens, bytes, seconds. Errors: a value out of range, by key; text too short.

use std::path::PathBuf;

use gistnet_adapter::curriculum::{Stage, places, shuffle};
use gistnet_adapter::delta_nll::check_group;
use gistnet_adapter::{GistNetConfig, Head, Mode, Pooling};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::DocumentShape;
use megacontext_base::device::DeviceChoice;
use megacontext_base::random::Random;
use megacontext_base::rope::{SigmaPreset, SigmaRule};
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::precision::Precision;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::config::{
    Attention, CheckpointConfig, GroupSize, LONGEST_CONTEXT, MOST, OptimizerConfig, Schedule, pattern,
};
use crate::error::{PluginError, Result};
use crate::run::folder::config_hash_without;

mod plan;

pub use plan::GistPlan;
pub(in crate::train) use plan::{LEARNING, Rows, graph_bytes};

/// The network, but for what the base model decides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkSettings {
    /// K.
    pub block: usize,
    /// `transformer` or `mean`.
    pub mode: Mode,
    /// Blocks of the transformer.
    pub layers: usize,
    /// Heads; none means the base model's, where they divide its width evenly.
    pub heads: Option<usize>,
    /// `cls`, `query` or `mean`.
    pub pooling: Pooling,
    /// `mlp` or `linear`.
    pub head: Head,
    /// Do entries of a block attend to earlier ones alone?
    pub causal: bool,
}

impl Default for NetworkSettings {
    fn default() -> Self {
        Self {
            block: 32,
            mode: Mode::Transformer,
            layers: 2,
            heads: None,
            // The original's default is the mean. A token of its own can look for what matters: measured, it learns faster.
            pooling: Pooling::Cls,
            head: Head::Mlp,
            causal: false,
        }
    }
}

impl NetworkSettings {
    /// The network for a base model.
    pub fn of(&self, model: &DecoderConfig) -> GistNetConfig {
        GistNetConfig {
            block: self.block,
            mode: self.mode,
            layers: self.layers,
            pooling: self.pooling,
            head: self.head,
            causal: self.causal,
            ..GistNetConfig::new(model.hidden_size, self.heads.unwrap_or(model.num_attention_heads))
        }
    }
}

/// Where entries of a working context stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlaceSettings {
    /// `document` or `original`.
    pub preset: SigmaPreset,
    /// A gist's spread is span/√12 instead of its span.
    pub uniform: bool,
}

impl From<SigmaRule> for PlaceSettings {
    fn from(rule: SigmaRule) -> Self {
        Self { preset: rule.preset, uniform: rule.uniform }
    }
}

impl PlaceSettings {
    /// With blocks of K.
    pub fn rule(self, block: usize) -> SigmaRule {
        SigmaRule { preset: self.preset, block, uniform: self.uniform }
    }

    /// Do entries stand at the same places?
    pub fn same_as(self, other: Self) -> bool {
        // The spread of `original` is the span in any case.
        let spread = |places: Self| places.preset == SigmaPreset::Document && places.uniform;
        (self.preset, spread(self)) == (other.preset, spread(other))
    }
}

impl std::fmt::Display for PlaceSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match (self.preset, self.uniform) {
            (SigmaPreset::Document, false) => "document",
            (SigmaPreset::Document, true) => "document, uniform",
            (SigmaPreset::Original, _) => "original",
        })
    }
}

/// Groups of the sparse attention that a validation measures: in files `"auto"`, `"off"`, a part of the context, or tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum SparseGroup {
    /// Half the context; nothing where that is too small for the longest horizon.
    #[default]
    Auto,
    /// Nothing is measured.
    Off,
    /// Of this size; refused where that is too small for the longest horizon.
    Of(GroupSize),
}

impl Serialize for SparseGroup {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Auto => to.serialize_str("auto"),
            Self::Off => to.serialize_str("off"),
            Self::Of(group) => group.serialize(to),
        }
    }
}

impl<'de> Deserialize<'de> for SparseGroup {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        let value = Value::deserialize(from)?;
        match value.as_str() {
            Some("auto") => return Ok(Self::Auto),
            Some("off") => return Ok(Self::Off),
            _ if value.is_null() => return Ok(Self::Off),
            _ => {}
        }
        serde_json::from_value(value.clone()).map(Self::Of).map_err(|_| {
            let message = "expected \"auto\", \"off\", a part of the context or a number of tokens";
            serde::de::Error::custom(format!("{message}, got {value}"))
        })
    }
}

/// Validation while training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ValidationSettings {
    /// Steps between two; the last step of a stage is always followed by one.
    pub every: usize,
    /// Held-out passages that the network is chosen by.
    pub passages: usize,
    /// Held-out passages of other documents, measured once at the end.
    pub test_passages: usize,
    /// Most blocks of a passage.
    pub blocks: usize,
    /// Ends a stage whose ΔNLL@H rose so many times in a row; 0 never does. The next stage goes on from there, as it does
    /// from a stage that has done its steps.
    pub stop_after_rises: usize,
    /// Measure shifted sparse attention as well.
    pub sparse_group: SparseGroup,
    /// Warns when ΔNLL@H under sparse and dense attention differ by more nats than this.
    pub most_gap: f64,
}

impl Default for ValidationSettings {
    fn default() -> Self {
        Self {
            every: 100,
            passages: 32,
            test_passages: 32,
            blocks: 16,
            stop_after_rises: 3,
            sparse_group: SparseGroup::Auto,
            most_gap: 0.1,
        }
    }
}

/// Everything a run is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GistRunConfig {
    /// The base model's folder.
    pub base: PathBuf,
    /// An adapter on it.
    pub adapter: Option<PathBuf>,
    /// Sources of text: files, folders, globs; `corpus:held-out` stands for text found on this machine.
    pub data: Vec<String>,
    /// The run folder.
    pub out: PathBuf,
    /// Tokens of a passage; none means the context that model and adapter were trained for.
    pub context: Option<usize>,
    /// Share of the documents kept for validation.
    pub holdout: f64,
    /// Seed of initial weights, order of the text and drawn spans.
    pub seed: u64,
    /// The network.
    pub network: NetworkSettings,
    /// Where entries stand.
    pub places: PlaceSettings,
    /// Attention while training.
    pub attention: Attention,
    /// Group of `s2`.
    pub group: GroupSize,
    /// Passages of a step.
    pub passages_per_step: usize,
    /// Spans of a passage and step.
    pub spans_per_passage: usize,
    /// The curriculum.
    pub stages: Vec<Stage>,
    /// Optimiser and learning rate.
    pub optimizer: OptimizerConfig,
    /// Validation.
    pub validation: ValidationSettings,
    /// When to write checkpoints.
    pub checkpoint: CheckpointConfig,
    /// Bytes of passages that are kept instead of run again.
    pub passage_bytes: u64,
    /// Precision class of the base model.
    pub dtype: Precision,
    /// Refuse to run beyond this many bytes; none means what the machine has free.
    pub memory_budget_bytes: Option<u64>,
    /// Threads; none means all cores.
    pub threads: Option<usize>,
    /// What passes run on: `cpu`, `cuda:N`, or `auto`.
    pub device: DeviceChoice,
}

impl Default for GistRunConfig {
    fn default() -> Self {
        Self {
            base: PathBuf::new(),
            adapter: None,
            data: Vec::new(),
            out: PathBuf::from("runs/gistnet"),
            context: None,
            holdout: 0.1,
            seed: 0,
            network: NetworkSettings::default(),
            places: PlaceSettings::default(),
            attention: Attention::Dense,
            group: GroupSize::Part(0.5),
            passages_per_step: 8,
            spans_per_passage: 16,
            stages: vec![Stage::default()],
            optimizer: OptimizerConfig {
                lr: 3e-3,
                schedule: Schedule::Cosine,
                warmup_steps: 50,
                betas: [0.9, 0.999],
                weight_decay: 0.01,
                ..OptimizerConfig::default()
            },
            validation: ValidationSettings::default(),
            checkpoint: CheckpointConfig { every: 100, keep: 2 },
            passage_bytes: 512 << 20,
            dtype: Precision::F32,
            memory_budget_bytes: None,
            threads: None,
            device: DeviceChoice::Auto,
        }
    }
}

impl GistRunConfig {
    /// The longest horizon of all stages.
    pub fn longest_horizon(&self) -> usize {
        self.stages.iter().map(|stage| stage.horizon).max().unwrap_or(0)
    }

    /// Where entries stand, K among it.
    pub fn rule(&self) -> SigmaRule {
        self.places.rule(self.network.block)
    }

    /// Steps of all stages where none advances early.
    pub fn steps(&self) -> usize {
        self.stages.iter().map(|stage| stage.steps).sum()
    }

    /// Fills in what depends on the model and refuses what does not fit it; `trained` is the context that it was trained for.
    pub fn resolve(mut self, model: &DecoderConfig, trained: usize) -> Result<Self> {
        let usage = |message: String| Err(PluginError::usage(message));
        let network = self.network.of(model);
        network.check().map_err(|e| PluginError::usage(format!("network: {e}")))?;
        self.network.heads = Some(network.heads);
        if self.stages.is_empty() {
            return usage("stages: expected at least one, got none".to_string());
        }
        for (number, stage) in (1..).zip(&self.stages) {
            stage
                .check(self.data.len())
                .map_err(|e| PluginError::usage(format!("stages, number {number}: {e}")))?;
        }
        for (number, stage) in (1..).zip(&self.stages) {
            for (key, value, most) in
                [("horizon", stage.horizon, LONGEST_CONTEXT), ("steps", stage.steps, MOST)]
            {
                if value > most {
                    return usage(format!(
                        "stages, number {number}: {key}: expected at most {most}, got {value}"
                    ));
                }
            }
        }
        let context = *self.context.get_or_insert(trained);
        if context > LONGEST_CONTEXT {
            return usage(format!("context: expected at most {LONGEST_CONTEXT} tokens, got {context}"));
        }
        let least = 2 * self.network.block + self.longest_horizon();
        if context < least {
            return usage(format!(
                "context: expected at least {least} tokens, for an entry, a block of {} and a horizon of {}, got {context}",
                self.network.block,
                self.longest_horizon()
            ));
        }
        for (key, value) in [
            ("passages_per_step", self.passages_per_step),
            ("spans_per_passage", self.spans_per_passage),
            ("validation.every", self.validation.every),
            ("validation.passages", self.validation.passages),
            ("validation.test_passages", self.validation.test_passages),
            ("validation.blocks", self.validation.blocks),
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
        if !self.validation.most_gap.is_finite() || self.validation.most_gap < 0.0 {
            let got = self.validation.most_gap;
            return usage(format!("validation.most_gap: expected a number of at least 0, got {got}"));
        }
        self.optimizer.validate()?;
        let patterns = [("group", Some(self.pattern()?)), ("validation.sparse_group", self.sparse()?)];
        for (key, pattern) in patterns {
            let Some(pattern) = pattern else { continue };
            check_group(pattern, self.longest_horizon())
                .map_err(|e| PluginError::usage(format!("{key}: {e}")))?;
        }
        Ok(self)
    }

    /// Attention while training.
    ///
    /// # Errors
    /// A group that is none.
    pub fn pattern(&self) -> Result<Pattern> {
        pattern(self.attention, self.group, self.context.unwrap_or(0))
    }

    /// Sparse attention of the validation, where it is measured.
    ///
    /// # Errors
    /// A group that is none.
    pub fn sparse(&self) -> Result<Option<Pattern>> {
        let of = |group| pattern(Attention::S2, group, self.context.unwrap_or(0)).map(Some);
        match self.validation.sparse_group {
            SparseGroup::Off => Ok(None),
            SparseGroup::Of(group) => of(group),
            SparseGroup::Auto => {
                let fits = |pattern: &Pattern| check_group(*pattern, self.longest_horizon()).is_ok();
                Ok(of(GroupSize::Part(0.5))?.filter(fits))
            }
        }
    }

    /// What a run says before it begins where it cannot measure sparse attention, though nobody asked it not to.
    pub fn no_sparse(&self) -> Option<String> {
        let left_out = self.validation.sparse_group == SparseGroup::Auto && self.sparse().ok()?.is_none();
        left_out.then(|| {
            let (context, horizon) = (self.context.unwrap_or(0), self.longest_horizon());
            format!(
                "sparse attention is not measured: half of a passage of {context} tokens is less than the 2·(H + 1) = {} that \
                 a group needs for H = {horizon}; a longer context, or validation.sparse_group, helps",
                2 * (horizon + 1)
            )
        })
    }

    /// What a run says before it begins where a stage wants spans of the second level that some passages have no room for.
    ///
    /// # Errors
    /// When none has.
    pub fn check_level2(&self, passages: &Passages) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        for (number, stage) in (1..).zip(&self.stages).filter(|(_, stage)| stage.level2 > 0.0) {
            let drawn = |source: usize| stage.mix.get(source).is_none_or(|weight| *weight > 0.0);
            let lengths: Vec<usize> = passages
                .tokens
                .iter()
                .zip(&passages.sources)
                .filter(|(_, source)| drawn(**source))
                .map(|(tokens, _)| tokens.len())
                .collect();
            let block = self.network.block;
            let room = |length: &&usize| !places(**length, block, 2, stage.horizon).is_empty();
            let with = lengths.iter().filter(room).count();
            let least = 2 * block * block + stage.horizon;
            if with == 0 {
                return Err(PluginError::usage(format!(
                    "stages, number {number}: level2: expected passages of at least {least} tokens, for an entry of the second \
                     level before the replaced one ({} tokens each) and a horizon of {}, got at most {}: a longer context and \
                     longer documents, or level2 = 0, help",
                    block * block,
                    stage.horizon,
                    lengths.iter().max().unwrap_or(&0)
                )));
            }
            if with < lengths.len() {
                warnings.push(format!(
                    "stage {number}: {with} of {} passages have the {least} tokens that a span of the second level takes; the \
                     others replace spans of the first alone, whatever level2 says",
                    lengths.len()
                ));
            }
        }
        Ok(warnings)
    }

    /// Bytes of held-out passages that are kept from one validation to the next, at most half of those for all passages.
    pub fn validation_bytes(&self, model: &DecoderConfig) -> u64 {
        let attentions = if matches!(self.sparse(), Ok(Some(_))) { 2 } else { 1 };
        let passages = (attentions * self.validation.passages) as u64;
        let all = passages.saturating_mul(self.bytes_of_passage(model, false));
        all.min(self.passage_bytes / 2)
    }

    /// Bytes of a passage, with what the divergence form reads of it or without.
    fn bytes_of_passage(&self, model: &DecoderConfig, hidden: bool) -> u64 {
        let entries = self.context.unwrap_or(0);
        let shape = DocumentShape { entries, precision: self.dtype, hidden };
        shape.bytes(model) + 4 * (entries * model.hidden_size) as u64
    }

    /// Hash of what the result depends on.
    ///
    /// # Errors
    /// When the settings are no JSON.
    pub fn identity(&self) -> Result<String> {
        let beside =
            ["base", "adapter", "data", "out", "threads", "device", "memory_budget_bytes", "passage_bytes"];
        config_hash_without(self, &beside)
    }
}

/// Passages by source.
#[derive(Clone, Debug, Default)]
pub struct Passages {
    /// Their tokens.
    pub tokens: Vec<Vec<u32>>,
    /// The source of each.
    pub sources: Vec<usize>,
}

impl Passages {
    /// Cuts the documents of a source into passages of `context` tokens; shorter ones have at least `least`.
    pub fn add(&mut self, documents: &[Vec<u32>], source: usize, context: usize, least: usize) {
        for document in documents {
            for part in document.chunks(context).filter(|part| part.len() >= least) {
                self.tokens.push(part.to_vec());
                self.sources.push(source);
            }
        }
    }

    /// Numbers of the passages of a step: every passage once before any comes again, or drawn by the stage's mix.
    pub fn of_step(&self, step: usize, count: usize, mix: &[f64], seed: u64) -> Vec<usize> {
        let n = self.tokens.len();
        if mix.is_empty() {
            let (mut numbers, mut held) = (Vec::with_capacity(count), None);
            for at in step * count..(step + 1) * count {
                let epoch = at / n;
                let (_, order) = match held.take() {
                    Some((of, order)) if of == epoch => held.insert((of, order)),
                    _ => held.insert((epoch, self.order(epoch, seed))),
                };
                numbers.push(order[at % n]);
            }
            return numbers;
        }
        let mut random = Random::named(seed, &format!("mix of step {step}"));
        let by_source: Vec<Vec<usize>> =
            (0..mix.len()).map(|source| (0..n).filter(|at| self.sources[*at] == source).collect()).collect();
        let weight = |source: usize| if by_source[source].is_empty() { 0.0 } else { mix[source] };
        let sum: f64 = (0..mix.len()).map(weight).sum();
        let mut draw = || {
            let mut left = random.unit() * sum;
            let mut chosen = 0;
            for source in (0..mix.len()).filter(|source| weight(*source) > 0.0) {
                chosen = source;
                left -= weight(source);
                if left < 0.0 {
                    break;
                }
            }
            by_source[chosen][random.below(by_source[chosen].len())]
        };
        (0..count).map(|_| draw()).collect()
    }

    /// So many passages, drawn from all by the seed.
    pub fn drawn(&self, count: usize, seed: u64) -> Vec<Vec<u32>> {
        let all = self.of_step(0, self.tokens.len(), &[], seed);
        all.into_iter().take(count).map(|at| self.tokens[at].clone()).collect()
    }

    fn order(&self, epoch: usize, seed: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.tokens.len()).collect();
        shuffle(&mut order, &mut Random::named(seed, &format!("order of passages in epoch {epoch}")));
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passages() -> Passages {
        let mut passages = Passages::default();
        passages.add(&[(0..25).collect(), (0..8).collect()], 0, 10, 5);
        passages.add(&[(0..30).collect()], 1, 10, 5);
        passages
    }

    #[test]
    fn documents_are_cut_and_short_ends_dropped() {
        let lengths: Vec<usize> = passages().tokens.iter().map(Vec::len).collect();
        assert_eq!(lengths, [10, 10, 5, 8, 10, 10, 10]);
        assert_eq!(passages().sources, [0, 0, 0, 0, 1, 1, 1]);
    }

    #[test]
    fn every_passage_comes_once_an_epoch() {
        let passages = passages();
        let mut seen: Vec<usize> = (0..7).flat_map(|step| passages.of_step(step, 2, &[], 3)).collect();
        assert_ne!(seen[..7], seen[7..]);
        for epoch in seen.chunks_mut(7) {
            epoch.sort_unstable();
            assert_eq!(epoch, [0, 1, 2, 3, 4, 5, 6]);
        }
    }

    #[test]
    fn seeds_share_no_order() {
        let mut passages = Passages::default();
        passages.add(&[(0..200).collect()], 0, 2, 1);
        // Another seed's later epoch is not this one's first.
        let of = |epoch: usize, seed: u64| passages.of_step(epoch, 100, &[], seed);
        assert_ne!(of(0, 1), of(1, 0));
        assert_ne!(of(0, 0), of(0, 1));
    }

    #[test]
    fn a_mix_draws_from_its_sources() {
        let passages = passages();
        let of = |mix: &[f64]| -> Vec<usize> {
            let drawn = (0..200).flat_map(|step| passages.of_step(step, 2, mix, 3));
            drawn.map(|at| passages.sources[at]).collect()
        };
        assert!(of(&[0.0, 1.0]).iter().all(|source| *source == 1));
        let share = of(&[3.0, 1.0]).iter().filter(|source| **source == 0).count() as f64 / 400.0;
        assert!((share - 0.75).abs() < 0.07, "{share}");
    }
}
