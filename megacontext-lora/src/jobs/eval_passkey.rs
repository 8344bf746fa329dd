//! The job `eval_passkey`: how often a model finds a number that is hidden in a long text, by length and depth.
//!
//! The task and its prompts are [`crate::train::passkey`]'s. Prompts of a cell run in batches over a cache of keys and
//! values; cells can be interrupted and taken up ([`crate::run::cells`]).

use std::time::Instant;

use megacontext_base::decoder::Decoder;
use megacontext_base::device::Device;
use megacontext_base::generate::{Generation, Sampling, room};
use megacontext_base::rope::RopeScaling;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::device::OnDevice;
use super::evaluation::{another_device, dense_name, identity};
use super::generate::end_tokens;
use super::parameters::{Kept, Model, Parameters};
use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::{ModelDir, model_error, to_value, with_threads};
use crate::report::evaluation::{Measured, Page, render};
use crate::run::cells::Cells;
use crate::train::config::LONGEST_CONTEXT;
use crate::train::passkey::{ANSWER, Answer, Cell, Passkeys};
use crate::train::plan::Generated;

/// What a right answer is.
pub const SCORING: &str =
    "greedy decoding; right where the first thing said is the key's digits, all of them and no more";
/// Tokens of a batch where nothing else is asked for.
const BATCH_TOKENS: usize = 16_384;
/// Most prompts of a cell.
const MOST_TRIALS: usize = 10_000;

/// What the job is told.
#[derive(Clone, Debug, Serialize)]
pub struct EvalPasskey {
    /// The model.
    #[serde(flatten)]
    pub model: Model,
    /// What is asked.
    #[serde(flatten)]
    pub asked: Asked,
    /// Where results go.
    #[serde(flatten)]
    pub kept: Kept,
}

/// The questions.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Asked {
    /// Lengths of prompt and answer, tokens.
    pub lengths: Vec<usize>,
    /// Where the key stands, 0 at the beginning, 1 at the end.
    pub depths: Vec<f64>,
    /// Prompts of each length and depth.
    pub trials: usize,
    /// Seed of keys and texts.
    pub seed: u64,
    /// Prompts that run together; none means as many as come to 16384 tokens.
    pub batch: Option<usize>,
}

impl Default for Asked {
    fn default() -> Self {
        Self { lengths: Vec::new(), depths: vec![0.0, 0.25, 0.5, 0.75, 1.0], trials: 5, seed: 0, batch: None }
    }
}

impl Asked {
    fn check(&self) -> Result<()> {
        let usage = |message: String| Err(PluginError::usage(message));
        if self.lengths.is_empty() {
            return usage("lengths: expected at least one, got none".into());
        }
        if let Some(bad) = self.lengths.iter().find(|length| !(1..=LONGEST_CONTEXT).contains(*length)) {
            return usage(format!("lengths: expected 1 to {LONGEST_CONTEXT} tokens, got {bad}"));
        }
        if self.depths.is_empty() {
            return usage("depths: expected at least one, got none".into());
        }
        if let Some(bad) = self.depths.iter().find(|depth| !(0.0..=1.0).contains(*depth)) {
            return usage(format!("depths: expected numbers from 0 (beginning) to 1 (end), got {bad}"));
        }
        if !(1..=MOST_TRIALS).contains(&self.trials) {
            return usage(format!("trials: expected 1 to {MOST_TRIALS}, got {}", self.trials));
        }
        if self.batch == Some(0) {
            return usage("batch: expected at least 1 prompt, got 0".into());
        }
        for (what, twice) in [
            ("lengths", repeated(&self.lengths).map(|n| n.to_string())),
            ("depths", repeated(&self.depths).map(|d| d.to_string())),
        ] {
            if let Some(twice) = twice {
                return usage(format!("{what}: expected each once, got {twice} twice"));
            }
        }
        Ok(())
    }

    /// Prompts of this length that run together.
    fn rows(&self, length: usize) -> usize {
        self.batch.unwrap_or(BATCH_TOKENS / length).clamp(1, self.trials)
    }
}

fn repeated<T: PartialEq + Copy>(values: &[T]) -> Option<T> {
    values.iter().enumerate().find(|(at, value)| values[..*at].contains(value)).map(|(_, value)| *value)
}

/// Runs the job.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let mut params = Parameters::new(params)?;
    let job = EvalPasskey { model: params.take()?, asked: params.take()?, kept: params.take()? };
    params.end()?;
    with_threads(job.model.threads, || evaluate(&job, host))?
}

/// What all cells share.
struct Run<'a> {
    asked: &'a Asked,
    decoder: &'a Decoder,
    passkeys: Passkeys<'a>,
    scaling: &'a RopeScaling,
    end: &'a [u32],
    host: &'a dyn HostApi,
    /// Prompts in all, those that are answered, their tokens since the job began, and all that were to do then.
    prompts: usize,
    answered: usize,
    tokens: usize,
    tokens_to_do: usize,
    began: Instant,
}

fn evaluate(job: &EvalPasskey, host: &dyn HostApi) -> Result<Value> {
    let EvalPasskey { model: used, asked, kept } = job;
    asked.check()?;
    let model = ModelDir::open(&used.base)?;
    let passkeys = Passkeys::new(&model.tokenizer)?;
    let least = passkeys.least()?;
    if let Some(short) = asked.lengths.iter().find(|length| **length < least) {
        return Err(PluginError::usage(format!(
            "lengths: expected at least {least} tokens, room for the key's line, the question and the answer, got {short}"
        )));
    }
    let longest = asked.lengths.iter().copied().max().unwrap_or(0);
    let scaling = used.asked_scaling(&model.config, longest)?;
    let on = OnDevice::open(used.device, host)?.running(&model.config, host)?;
    check_memory(job, &model, on.device())?;
    let end = end_tokens(&model, &used.base);
    let identity = identity("eval_passkey", job, &model, used.adapter.as_deref(), on.device(), None)?;
    // An adapter that does not fit is refused before a folder is made.
    let (mut decoder, own, _) = model.decoder_with(used.adapter.as_deref(), used.dtype)?;
    on.take(&mut decoder)?;
    let scaling = scaling.unwrap_or(own);
    let mut cells: Cells<Cell> = Cells::open(kept.out.as_deref(), kept.resume, &identity)?;
    let now = decoder.device().describe();
    if let Some(warning) = cells.began_on().and_then(|began| another_device(began, &now)) {
        host.event("log", &json!({ "message": warning }));
    }

    let grid: Vec<(usize, f64)> =
        asked.lengths.iter().flat_map(|length| asked.depths.iter().map(|depth| (*length, *depth))).collect();
    let left = &grid[cells.done().len().min(grid.len())..];
    let mut run = Run {
        asked,
        decoder: &decoder,
        passkeys,
        scaling: &scaling,
        end: &end,
        host,
        prompts: grid.len() * asked.trials,
        answered: cells.done().len() * asked.trials,
        tokens: 0,
        tokens_to_do: left.iter().map(|(length, _)| length * asked.trials).sum(),
        began: Instant::now(),
    };
    for (length, depth) in left {
        let cell = run.cell(*length, *depth)?;
        let mut event = summary(&cell);
        event["text"] = json!(format!(
            "  length {length:>7}  depth {depth:<5}  {} of {} keys found",
            cell.right, cell.trials
        ));
        host.event("cell", &event);
        cells.push(cell)?;
    }
    let (right, all) =
        cells.done().iter().fold((0, 0), |(right, all), cell| (right + cell.right, all + cell.trials));
    let result = to_value(json!({
        "base": used.base,
        "adapter": used.adapter,
        "dtype": used.dtype,
        "device": now,
        "rope": scaling.to_string(),
        "attention": dense_name(&model.config),
        "scoring": SCORING,
        "seed": asked.seed,
        "trials": asked.trials,
        "lengths": asked.lengths,
        "depths": asked.depths,
        "stated_context": model.config.max_position_embeddings,
        "accuracy": right as f64 / all.max(1) as f64,
        "cells": cells.done().iter().map(summary).collect::<Vec<Value>>(),
    }))?;
    let page = Page { result: &result, identity: &identity, measured: Measured::Passkey(cells.done()) };
    cells.finish(&result, || render(&page))?;
    Ok(result)
}

fn summary(cell: &Cell) -> Value {
    json!({
        "length": cell.length, "depth": cell.depth, "trials": cell.trials, "right": cell.right,
        "accuracy": cell.accuracy(),
    })
}

/// Refuses lengths whose batches do not fit.
fn check_memory(job: &EvalPasskey, model: &ModelDir, device: &Device) -> Result<()> {
    let lora = model.lora_of(job.model.adapter.as_deref())?;
    for &length in &job.asked.lengths {
        let rows = job.asked.rows(length);
        let generated = Generated {
            what: format!("the evaluation of {rows} prompts of {length} tokens at a time"),
            model: &model.config,
            lora: lora.as_ref(),
            dtype: job.model.dtype,
            prompts: &vec![length - ANSWER; rows],
            rooms: &vec![room(length - ANSWER, ANSWER); rows],
        };
        generated.check(device)?;
    }
    Ok(())
}

impl Run<'_> {
    fn cell(&mut self, length: usize, depth: f64) -> Result<Cell> {
        let mut answers: Vec<Answer> = Vec::with_capacity(self.asked.trials);
        let trials: Vec<usize> = (0..self.asked.trials).collect();
        for batch in trials.chunks(self.asked.rows(length)) {
            let prompts = batch
                .iter()
                .map(|trial| self.passkeys.prompt(self.asked.seed, length, depth, *trial))
                .collect::<Result<Vec<_>>>()?;
            let rows: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.tokens.clone()).collect();
            let with = Generation {
                max_new_tokens: ANSWER,
                end: self.end,
                sampling: Sampling::Greedy,
                scaling: self.scaling,
            };
            let host = self.host;
            let said = self
                .decoder
                .generate(&rows, &with, &mut |_| !host.cancelled())
                .map_err(model_error)?
                .ok_or_else(|| PluginError::cancelled("the host asked to stop during the evaluation"))?;
            for (prompt, said) in prompts.iter().zip(&said) {
                answers.push(self.passkeys.judge(&prompt.key, &said.tokens)?);
            }
            self.answered += batch.len();
            self.tokens += batch.len() * length;
            self.progress(length, depth);
        }
        Ok(Cell::new(length, depth, answers))
    }

    fn progress(&self, length: usize, depth: f64) {
        let seconds = self.began.elapsed().as_secs_f64();
        let speed = self.tokens as f64 / seconds.max(1e-9);
        self.host.event(
            "progress",
            &json!({
                "step": self.answered, "steps": self.prompts, "context": length, "depth": depth,
                "tokens_per_s": speed, "eta_s": (self.tokens_to_do - self.tokens) as f64 / speed,
            }),
        );
    }
}
