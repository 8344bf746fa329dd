//! The job `generate`: continuations of prompts, by a model with or without an adapter.
//!
//! Prompts begin with what the tokenizer's own template puts in front of a text. A row ends at any end token that
//! `config.json`, `generation_config.json` or the tokenizer names.

use std::path::{Path, PathBuf};

use megacontext_base::buffers::PassShape;
use megacontext_base::generate::{Generation, KvCache, Sampling, generation_bytes, pass_entries, room};
use megacontext_base::rope::ScalingChoice;
use megacontext_kernels::precision::Precision;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::evaluation::{asked_scaling, dense_name};
use crate::error::{IoResultExt, PluginError, Result};
use crate::host::HostApi;
use crate::jobs::{ModelDir, model_error, parse, to_value, with_threads};
use crate::train::plan::check_beside_weights;

/// Most tokens a row may get: far beyond any context.
const MOST_NEW: usize = 1 << 24;

/// What the job is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerateJob {
    /// Model folder.
    pub base: PathBuf,
    /// Adapter folder.
    pub adapter: Option<PathBuf>,
    /// Texts to continue, each a row.
    pub prompts: Vec<String>,
    /// A file whose text is one more prompt.
    pub prompt_file: Option<PathBuf>,
    /// Most tokens that each row gets.
    pub max_new_tokens: usize,
    /// Draws tokens at this temperature; none takes the most likely one.
    pub temperature: Option<f64>,
    /// Share of the probability that draws keep; with a temperature only.
    pub top_p: Option<f64>,
    /// Seed of the draws.
    pub seed: u64,
    /// Go on past end tokens.
    pub ignore_end: bool,
    /// How positions are stretched, instead of as the adapter or the model says: a name, or a table as in `rope_scaling`.
    pub scaling: Option<ScalingChoice>,
    /// Stretch from the original context, instead of the adapter's or the model's own; with `scaling` alone that of the
    /// longest context.
    pub factor: Option<f64>,
    /// Precision class.
    pub dtype: Precision,
    /// Threads; none means all.
    pub threads: Option<usize>,
}

impl Default for GenerateJob {
    fn default() -> Self {
        Self {
            base: PathBuf::new(),
            adapter: None,
            prompts: Vec::new(),
            prompt_file: None,
            max_new_tokens: 128,
            temperature: None,
            top_p: None,
            seed: 0,
            ignore_end: false,
            scaling: None,
            factor: None,
            dtype: Precision::F32,
            threads: None,
        }
    }
}

/// Runs the job.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let job: GenerateJob = parse(params)?;
    with_threads(job.threads, || generate(&job, host))?
}

fn sampling(job: &GenerateJob) -> Result<Sampling> {
    let sampling = match (job.temperature, job.top_p) {
        (None, None) => Sampling::Greedy,
        (None, Some(top_p)) => {
            return Err(PluginError::usage(format!(
                "top_p: expected a temperature to draw with, got none beside top_p {top_p}"
            )));
        }
        (Some(temperature), top_p) => {
            Sampling::Nucleus { temperature, top_p: top_p.unwrap_or(1.0), seed: job.seed }
        }
    };
    sampling.check().map_err(|e| PluginError::usage(e.to_string().replace("decoder: ", "")))?;
    Ok(sampling)
}

/// Tokens that end a text, by whatever file names them.
pub(crate) fn end_tokens(model: &ModelDir, dir: &Path) -> Vec<u32> {
    let generation = std::fs::read(dir.join("generation_config.json")).ok();
    let generation: Option<Value> = generation.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let named = |value: Option<&Value>| -> Vec<u32> {
        let ids = match value {
            Some(Value::Array(ids)) => ids.iter().collect(),
            Some(id) => vec![id],
            None => Vec::new(),
        };
        ids.into_iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect()
    };
    let mut all = named(model.config.raw.get("eos_token_id"));
    all.extend(named(generation.as_ref().and_then(|file| file.get("eos_token_id"))));
    all.extend(model.config.eos_token_id);
    all.extend(model.tokenizer.eos_id());
    all.retain(|id| (*id as usize) < model.config.vocab_size);
    all.sort_unstable();
    all.dedup();
    all
}

fn generate(job: &GenerateJob, host: &dyn HostApi) -> Result<Value> {
    let sampling = sampling(job)?;
    if !(1..=MOST_NEW).contains(&job.max_new_tokens) {
        return Err(PluginError::usage(format!(
            "max_new_tokens: expected 1 to {MOST_NEW}, got {}",
            job.max_new_tokens
        )));
    }
    let mut texts = job.prompts.clone();
    if let Some(path) = &job.prompt_file {
        texts.push(std::fs::read_to_string(path).at(path)?);
    }
    if texts.is_empty() {
        return Err(PluginError::usage("prompts: expected at least one text, got none"));
    }
    let model = ModelDir::open(&job.base)?;
    let encode = |text: &String| -> Result<Vec<u32>> {
        let own = model.tokenizer.encode(text).map_err(model_error)?;
        Ok([model.tokenizer.opening(), &own].concat())
    };
    let prompts = texts.iter().map(encode).collect::<Result<Vec<_>>>()?;
    if let Some(row) = prompts.iter().position(Vec::is_empty) {
        return Err(PluginError::usage(format!(
            "prompts: expected a text of at least one token, got an empty one at {row}"
        )));
    }
    let end = if job.ignore_end { Vec::new() } else { end_tokens(&model, &job.base) };
    if end.is_empty() && !job.ignore_end {
        return Err(PluginError::model(
            "expected an end-of-sequence token in config.json, generation_config.json or tokenizer_config.json, got none; \
             to go on without, say ignore_end",
        ));
    }
    let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
    let rooms: Vec<usize> = lengths.iter().map(|length| room(*length, job.max_new_tokens)).collect();
    let pass = PassShape { entries: pass_entries(&lengths), precision: job.dtype, lora: None };
    let cache_bytes = KvCache::planned_bytes(&model.config, job.dtype, rooms.iter().sum());
    let needed = generation_bytes(&model.config, pass, &rooms);
    let what = format!(
        "the generation of {} rows of up to {} tokens",
        rooms.len(),
        rooms.iter().max().unwrap_or(&0)
    );
    check_beside_weights(&what, &model.config, job.dtype, needed, cache_bytes)?;
    let (decoder, own, _) = model.decoder_with(job.adapter.as_deref(), job.dtype)?;
    let longest = rooms.iter().copied().max().unwrap_or(0);
    let asked = asked_scaling(&model.config, job.scaling.as_ref(), job.factor, longest)?;
    let scaling = asked.unwrap_or(own);
    let with = Generation { max_new_tokens: job.max_new_tokens, end: &end, sampling, scaling: &scaling };
    let rows = decoder
        .generate(&prompts, &with, &mut |_| !host.cancelled())
        .map_err(model_error)?
        .ok_or_else(|| PluginError::cancelled("the host asked to stop while text was made"))?;
    let mut results = Vec::with_capacity(rows.len());
    for ((text, prompt), row) in texts.iter().zip(&prompts).zip(&rows) {
        results.push(json!({
            "prompt": text,
            "prompt_tokens": prompt.len(),
            "text": model.tokenizer.decode(&row.tokens).map_err(model_error)?,
            "tokens": row.tokens,
            "ended": row.ended.is_some(),
        }));
    }
    to_value(json!({
        "base": job.base,
        "adapter": job.adapter,
        "dtype": job.dtype,
        "rope": scaling.to_string(),
        "attention": dense_name(&model.config),
        "stated_context": model.config.max_position_embeddings,
        "cache_bytes": cache_bytes,
        "results": results,
    }))
}
