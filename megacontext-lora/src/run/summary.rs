//! `summary.json`: what a finished run was, what it reached and what it cost.
//!
//! The trainer fills it, hosts print it, the report draws it. Units are in the names or said at the field: tokens, bytes,
//! seconds, nats. Perplexities map context length (tokens) to perplexity; in JSON the lengths are keys such as `"256"`.
//!
//! Errors: `Io` and `Data` with the path when it is read back.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{IoResultExt, PluginError, Result};
use crate::train::device_plan::DeviceMemory;

/// The file's name in a run folder.
pub const SUMMARY: &str = "summary.json";

/// Perplexity by context length in tokens.
pub type ByContext = BTreeMap<usize, f64>;

/// A finished run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Perplexity of the three models, dense attention, each held-out token scored once.
    pub perplexity: Perplexity,
    /// The same for the adapted model, evaluated with the sparse attention that it was trained with.
    pub perplexity_sparse: ByContext,
    /// Sparse perplexity over dense perplexity, less one, of the adapted model at `context` (0.02: sparse is 2 % worse).
    /// Absent when no stage was sparse.
    pub sparse_dense_gap: Option<f64>,
    /// Loss of each evaluated document at `context`: the adapted model, dense attention.
    #[serde(default)]
    pub held_out_losses: Vec<DocumentLoss>,
    /// Tokens scored at each context length.
    pub evaluated_tokens: BTreeMap<usize, u64>,
    /// Seconds from start to end, evaluation and writing included, pauses of an interrupted run excluded.
    pub seconds: f64,
    /// Seconds by what they were spent on; the stages' own are in `stages`.
    pub seconds_by_part: BTreeMap<String, f64>,
    /// Most memory the process held at once, bytes.
    pub peak_bytes: u64,
    /// The plan's bytes by kind (weights, gradients, optimizer, activations, …).
    pub planned_bytes: BTreeMap<String, u64>,
    /// Bytes of a GPU as planned and at the peak, where passes ran on one.
    #[serde(default)]
    pub device_memory: Option<DeviceMemory>,
    /// Seed of everything random.
    pub seed: u64,
    /// Worker threads.
    pub threads: usize,
    /// What passes ran on, at last: `cpu`, `cuda:0 (…)`; empty in summaries of older versions.
    #[serde(default)]
    pub device: String,
    /// Optimiser steps.
    pub steps: u64,
    /// Target context length, tokens.
    pub context: usize,
    /// The command line or job that repeats the run.
    pub command: String,
    /// The stages in their order.
    pub stages: Vec<StageSummary>,
    /// The parameter groups.
    pub groups: Vec<GroupSummary>,
    /// The model the run began with.
    pub base: BaseSummary,
    /// The text.
    pub data: DataSummary,
    /// Versions of what computed, by name.
    pub versions: BTreeMap<String, String>,
}

/// Perplexity of the three models by context length.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// The base model as it came.
    pub base: ByContext,
    /// The base model with its positions interpolated, not trained.
    pub interpolated: ByContext,
    /// The base model with the adapter.
    pub adapted: ByContext,
}

/// What a model lost on one document.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct DocumentLoss {
    /// Tokens scored.
    pub tokens: u64,
    /// Their NLL in nats, all together.
    pub nll: f64,
}

/// One stage of training.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StageSummary {
    /// Context length, tokens.
    pub context: usize,
    /// `s2` or `dense`.
    pub attention: String,
    /// Group size of `s2`, tokens.
    pub group: Option<usize>,
    /// RoPE factor.
    pub factor: f64,
    /// RoPE scaling in words; empty in summaries of older versions.
    #[serde(default)]
    pub rope: String,
    /// Optimiser steps.
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Mean loss of its first steps, nats per token.
    pub first_loss: f64,
    /// Mean loss of its last steps, nats per token.
    pub last_loss: f64,
    /// Seconds.
    pub seconds: f64,
}

/// One parameter group.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct GroupSummary {
    /// `base`, `embeddings`, `norms`, `lora`, …
    pub name: String,
    /// Tensors.
    pub tensors: u64,
    /// Numbers in them.
    pub parameters: u64,
    /// Did it learn?
    pub trained: bool,
}

/// The model a run began with.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BaseSummary {
    /// Its folder.
    pub path: String,
    /// Its weights' fingerprint.
    pub fingerprint: String,
    /// Numbers in it.
    pub parameters: u64,
    /// Context length it was trained for, tokens.
    pub context: usize,
    /// Decoder blocks.
    pub layers: usize,
    /// Model width.
    pub hidden_size: usize,
    /// Vocabulary.
    pub vocab_size: usize,
}

/// The text of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DataSummary {
    /// Paths and globs as given.
    pub sources: Vec<String>,
    /// Documents trained on.
    pub train_documents: usize,
    /// Tokens in them.
    pub train_tokens: u64,
    /// Documents held out.
    pub held_out_documents: usize,
    /// Tokens in them.
    pub held_out_tokens: u64,
}

impl Summary {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).at(path)?;
        serde_json::from_slice(&bytes).map_err(|e| PluginError::data(format!("{}: {e}", path.display())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_lengths_are_keys_in_their_numeric_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SUMMARY);
        let mut summary = Summary { seed: 7, ..Summary::default() };
        summary.perplexity.adapted = [(1024, 12.5), (256, 14.25)].into();
        summary.evaluated_tokens = [(256, 9)].into();
        let text = serde_json::to_string(&summary).unwrap();
        assert!(text.contains(r#""adapted":{"256":14.25,"1024":12.5}"#), "{text}");
        std::fs::write(&path, text).unwrap();
        assert_eq!(Summary::read(&path).unwrap(), summary);
        std::fs::write(&path, "{").unwrap();
        assert!(Summary::read(&path).unwrap_err().message.contains(SUMMARY));
    }
}
