//! The job `eval_ppl`: perplexity of a model, with or without an adapter, at several context lengths.
//!
//! Every length scores the same tokens, dense unless S²-Attn is asked for. Documents are used as they are given: hold
//! out what you want held out. Lengths can be interrupted and taken up ([`crate::run::cells`]).

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::device::OnDevice;
use super::evaluation::{another_device, hash_of, identity};
use super::parameters::{Kept, Model, Parameters, Scored};
use crate::data::documents::tokenize;
use crate::error::Result;
use crate::host::HostApi;
use crate::jobs::{ModelDir, to_value, with_threads};
use crate::report::evaluation::{Measured, Page, render};
use crate::run::cells::Cells;
use crate::train::config::{Attention, GroupSize, check_evaluation, pattern};
use crate::train::eval::{Perplexity, Protocol, SCORING, batch_rows, perplexity, select};
use crate::train::plan::{Beside, check_forward};

/// What the job is told.
#[derive(Clone, Debug, Serialize)]
pub struct EvalPpl {
    /// The model.
    #[serde(flatten)]
    pub model: Model,
    /// The text.
    #[serde(flatten)]
    pub text: Scored,
    /// Dense, as the model is used, or as it was trained.
    #[serde(flatten)]
    pub attending: Attending,
    /// Where results go.
    #[serde(flatten)]
    pub kept: Kept,
}

/// How the model attends.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Attending {
    /// Attention; dense is what the model is used with.
    pub attention: Attention,
    /// Group size for S²-Attn.
    pub group: GroupSize,
}

impl Default for Attending {
    fn default() -> Self {
        Self { attention: Attention::Dense, group: GroupSize::Part(0.25) }
    }
}

impl EvalPpl {
    fn read(params: Value) -> Result<Self> {
        let mut params = Parameters::new(params)?;
        let job = Self {
            model: params.take()?,
            text: params.take()?,
            attending: params.take()?,
            kept: params.take()?,
        };
        params.end()?;
        Ok(job)
    }
}

/// Runs the job.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let job = EvalPpl::read(params)?;
    with_threads(job.model.threads, || evaluate(&job, host))?
}

fn evaluate(job: &EvalPpl, host: &dyn HostApi) -> Result<Value> {
    let measurement = Measurement {
        job: "eval_ppl",
        settings: to_value(job)?,
        model: &job.model,
        text: &job.text,
        kept: &job.kept,
        attentions: &[job.attending.attention],
        group: job.attending.group,
    };
    let (cells, result, identity) = measurement.run(host)?;
    let result = with_results(result, to_value(cells.done())?);
    let page = Page { result: &result, identity: &identity, measured: Measured::Perplexity(cells.done()) };
    cells.finish(&result, || render(&page))?;
    Ok(result)
}

/// Perplexity of a model on a text at every length with each of some kinds of attention.
pub(super) struct Measurement<'a> {
    /// The job's name and all its settings.
    pub job: &'a str,
    pub settings: Value,
    pub model: &'a Model,
    pub text: &'a Scored,
    pub kept: &'a Kept,
    pub attentions: &'a [Attention],
    pub group: GroupSize,
}

impl Measurement<'_> {
    /// What was measured, now or before it was taken up; the result's keys but for `results`; and what it all depends on.
    pub fn run(&self, host: &dyn HostApi) -> Result<(Cells<Perplexity>, Value, Value)> {
        let Scored { contexts, stride, max_tokens, seed, .. } = self.text;
        check_evaluation("", contexts, *stride, *max_tokens)?;
        let mut patterns = Vec::new();
        for &context in contexts {
            for attention in self.attentions {
                patterns.push((context, pattern(*attention, self.group, context)?));
            }
        }
        let longest = contexts.iter().copied().max().unwrap_or(0);
        let (adapter, dtype) = (self.model.adapter.as_deref(), self.model.dtype);
        let model = ModelDir::open(&self.model.base)?;
        let entries = contexts.iter().map(|context| batch_rows(*context) * context).max().unwrap_or(0);
        let on = OnDevice::open(self.model.device, host)?.running(&model.config, host)?;
        check_forward("the evaluation", &model.config, dtype, entries, Beside::default(), on.device())?;
        let documents = super::extend::load_data(&self.text.data, host)?;
        let (mut decoder, own, _) = model.decoder_with(adapter, dtype)?;
        on.take(&mut decoder)?;
        let scaling = self.model.asked_scaling(&model.config, longest)?.unwrap_or(own);
        let tokens = select(&tokenize(&documents, &model.encoder())?, longest, *max_tokens, *seed);
        let data = Some(hash_of(&tokens));
        let identity = identity(self.job, &self.settings, &model, adapter, decoder.device(), data)?;
        let mut cells: Cells<Perplexity> =
            Cells::open(self.kept.out.as_deref(), self.kept.resume, &identity)?;
        let now = decoder.device().describe();
        if let Some(warning) = cells.began_on().and_then(|began| another_device(began, &now)) {
            host.event("log", &json!({ "message": warning }));
        }
        for (context, pattern) in patterns.into_iter().skip(cells.done().len()) {
            let protocol = Protocol { context, stride: *stride, pattern, scaling: scaling.clone() };
            let result = perplexity(&decoder, &tokens, &protocol, host)?;
            host.event("evaluation", &to_value(&result)?);
            cells.push(result)?;
        }
        let result = json!({
            "base": self.model.base,
            "adapter": adapter,
            "dtype": dtype,
            "device": now,
            "rope": scaling.to_string(),
            "scoring": SCORING,
            "seed": seed,
        });
        Ok((cells, result, identity))
    }
}

/// A result with its `results`.
pub(super) fn with_results(mut result: Value, results: Value) -> Value {
    result["results"] = results;
    result
}
