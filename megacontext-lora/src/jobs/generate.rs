//! The job `generate`: continuations of prompts, by a model with or without an adapter.
//!
//! Prompts begin with what the tokenizer's own template puts in front of a text. A row ends at any end token that
//! `config.json`, `generation_config.json` or the tokenizer names.
//!
//! The result says how many entries a second prompts (`prefill`) and new tokens (`decoding`, a row's first token belongs to
//! its prompt) took, reading of the model left out.

use std::path::{Path, PathBuf};
use std::time::Instant;

use megacontext_base::generate::{Generation, Sampling, room};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::device::OnDevice;
use super::evaluation::dense_name;
use super::parameters::{Model, Parameters};
use crate::error::{IoResultExt, PluginError, Result};
use crate::host::HostApi;
use crate::jobs::{ModelDir, model_error, to_value, with_threads};
use crate::train::plan::Generated;

/// Most tokens a row may get: far beyond any context.
const MOST_NEW: usize = 1 << 24;

/// What the job is told.
#[derive(Clone, Debug, Serialize)]
pub struct GenerateJob {
    /// The model.
    #[serde(flatten)]
    pub model: Model,
    /// The texts, and how they go on.
    #[serde(flatten)]
    pub asked: Asked,
}

/// What is continued, and how.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Asked {
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
}

impl Default for Asked {
    fn default() -> Self {
        Self {
            prompts: Vec::new(),
            prompt_file: None,
            max_new_tokens: 128,
            temperature: None,
            top_p: None,
            seed: 0,
            ignore_end: false,
        }
    }
}

/// Runs the job.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let mut params = Parameters::new(params)?;
    let job = GenerateJob { model: params.take()?, asked: params.take()? };
    params.end()?;
    with_threads(job.model.threads, || generate(&job, host))?
}

fn sampling(asked: &Asked) -> Result<Sampling> {
    let sampling = match (asked.temperature, asked.top_p) {
        (None, None) => Sampling::Greedy,
        (None, Some(top_p)) => {
            return Err(PluginError::usage(format!(
                "top_p: expected a temperature to draw with, got none beside top_p {top_p}"
            )));
        }
        (Some(temperature), top_p) => {
            Sampling::Nucleus { temperature, top_p: top_p.unwrap_or(1.0), seed: asked.seed }
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
    let GenerateJob { model: used, asked } = job;
    let sampling = sampling(asked)?;
    if !(1..=MOST_NEW).contains(&asked.max_new_tokens) {
        return Err(PluginError::usage(format!(
            "max_new_tokens: expected 1 to {MOST_NEW}, got {}",
            asked.max_new_tokens
        )));
    }
    let mut texts = asked.prompts.clone();
    if let Some(path) = &asked.prompt_file {
        texts.push(std::fs::read_to_string(path).at(path)?);
    }
    if texts.is_empty() {
        return Err(PluginError::usage("prompts: expected at least one text, got none"));
    }
    let model = ModelDir::open(&used.base)?;
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
    let end = if asked.ignore_end { Vec::new() } else { end_tokens(&model, &used.base) };
    if end.is_empty() && !asked.ignore_end {
        return Err(PluginError::model(
            "expected an end-of-sequence token in config.json, generation_config.json or tokenizer_config.json, got none; \
             to go on without, say ignore_end",
        ));
    }
    let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
    let rooms: Vec<usize> = lengths.iter().map(|length| room(*length, asked.max_new_tokens)).collect();
    let lora = model.lora_of(used.adapter.as_deref())?;
    let longest = rooms.iter().copied().max().unwrap_or(0);
    let generated = Generated {
        what: format!("the generation of {} rows of up to {longest} tokens", rooms.len()),
        model: &model.config,
        lora: lora.as_ref(),
        dtype: used.dtype,
        prompts: &lengths,
        rooms: &rooms,
    };
    let on = OnDevice::open(used.device, host)?.running(&model.config, host)?;
    generated.check(on.device())?;
    let (mut decoder, own, _) = model.decoder_with(used.adapter.as_deref(), used.dtype)?;
    on.take(&mut decoder)?;
    let scaling = used.asked_scaling(&model.config, longest)?.unwrap_or(own);
    let with = Generation { max_new_tokens: asked.max_new_tokens, end: &end, sampling, scaling: &scaling };
    let mut clock = Clock::new(lengths.iter().sum());
    let rows = decoder
        .generate(&prompts, &with, &mut |entries| {
            clock.ran(entries);
            !host.cancelled()
        })
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
        "base": used.base,
        "adapter": used.adapter,
        "dtype": used.dtype,
        "device": decoder.device().describe(),
        "rope": scaling.to_string(),
        "attention": dense_name(&model.config),
        "stated_context": model.config.max_position_embeddings,
        "cache_bytes": generated.cache_bytes(),
        "prefill": clock.prefill.told(),
        "decoding": clock.decoding.told(),
        "results": results,
    }))
}

/// Where the time of a generation goes: prompts are run in passes, new tokens one step at a time.
struct Clock {
    prompts: usize,
    last: Instant,
    prefill: Spent,
    decoding: Spent,
}

/// Entries that were run, and how long it took.
#[derive(Default)]
struct Spent {
    tokens: usize,
    seconds: f64,
}

impl Clock {
    /// Starts it before a generation from so many tokens of prompts.
    fn new(prompts: usize) -> Self {
        Self { prompts, last: Instant::now(), prefill: Spent::default(), decoding: Spent::default() }
    }

    /// So many entries were run since it was asked last.
    fn ran(&mut self, entries: usize) {
        let prefill = self.prefill.tokens < self.prompts;
        let spent = if prefill { &mut self.prefill } else { &mut self.decoding };
        spent.tokens += entries;
        spent.seconds += self.last.elapsed().as_secs_f64();
        self.last = Instant::now();
    }
}

impl Spent {
    /// As the result says it; no rate where nothing was run.
    fn told(&self) -> Value {
        let rate = (self.tokens > 0).then(|| self.tokens as f64 / self.seconds.max(1e-9));
        json!({ "tokens": self.tokens, "seconds": self.seconds, "tokens_per_s": rate })
    }
}
