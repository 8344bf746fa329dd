//! The job `eval_ppl`: perplexity of a model, with or without an adapter, at several context lengths.
//!
//! Every length scores the same tokens, dense unless S²-Attn is asked for. Documents are used as they are given: hold
//! out what you want held out. Lengths can be interrupted and taken up ([`crate::run::cells`]).

use std::path::PathBuf;

use megacontext_base::rope::{RopeScaling, ScalingChoice};
use megacontext_kernels::precision::Precision;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::evaluation::{asked_scaling, hash_of, identity};
use crate::data::documents::tokenize;
use crate::error::Result;
use crate::host::HostApi;
use crate::jobs::{ModelDir, parse, to_value, with_threads};
use crate::report::evaluation::{Measured, Page, render};
use crate::run::cells::Cells;
use crate::train::config::{Attention, GroupSize, check_evaluation, pattern};
use crate::train::eval::{Perplexity, Protocol, SCORING, batch_rows, perplexity, select};
use crate::train::plan::check_forward;

/// What the job is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalPpl {
    /// Model folder.
    pub base: PathBuf,
    /// Adapter folder.
    pub adapter: Option<PathBuf>,
    /// Files, folders, globs, or `corpus:held-out`.
    pub data: Vec<String>,
    /// Context lengths in tokens.
    pub contexts: Vec<usize>,
    /// Tokens the window moves by; none means half the context.
    pub stride: Option<usize>,
    /// Stop after about so many scored tokens.
    pub max_tokens: usize,
    /// Seed of which documents are scored.
    pub seed: u64,
    /// Attention; dense is what the model is used with.
    pub attention: Attention,
    /// Group size for S²-Attn.
    pub group: GroupSize,
    /// Folder for results and report; none writes nothing.
    pub out: Option<PathBuf>,
    /// Take up the evaluation in that folder.
    pub resume: bool,
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

impl Default for EvalPpl {
    fn default() -> Self {
        Self {
            base: PathBuf::new(),
            adapter: None,
            data: Vec::new(),
            contexts: Vec::new(),
            stride: None,
            max_tokens: 65_536,
            seed: 0,
            attention: Attention::Dense,
            group: GroupSize::Part(0.25),
            out: None,
            resume: false,
            scaling: None,
            factor: None,
            dtype: Precision::F32,
            threads: None,
        }
    }
}

/// Runs the job.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let job: EvalPpl = parse(params)?;
    with_threads(job.threads, || evaluate(&job, host))?
}

fn evaluate(job: &EvalPpl, host: &dyn HostApi) -> Result<Value> {
    let attentions = [job.attention];
    let (cells, scaling, identity) = measure("eval_ppl", job, job, &attentions, host)?;
    let result = to_value(json!({
        "base": job.base,
        "adapter": job.adapter,
        "dtype": job.dtype,
        "rope": scaling.to_string(),
        "scoring": SCORING,
        "seed": job.seed,
        "results": cells.done(),
    }))?;
    let page = Page { result: &result, identity: &identity, measured: Measured::Perplexity(cells.done()) };
    cells.finish(&result, || render(&page))?;
    Ok(result)
}

/// Perplexity at every length with each of `attentions`; what was measured before is taken up. `settings` are those of the
/// job `name`.
pub(super) fn measure(
    name: &str,
    job: &EvalPpl,
    settings: &impl Serialize,
    attentions: &[Attention],
    host: &dyn HostApi,
) -> Result<(Cells<Perplexity>, RopeScaling, Value)> {
    check_evaluation("", &job.contexts, job.stride, job.max_tokens)?;
    let mut patterns = Vec::new();
    for &context in &job.contexts {
        for attention in attentions {
            patterns.push((context, pattern(*attention, job.group, context)?));
        }
    }
    let longest = job.contexts.iter().copied().max().unwrap_or(0);
    let model = ModelDir::open(&job.base)?;
    let entries = job.contexts.iter().map(|context| batch_rows(*context) * context).max().unwrap_or(0);
    check_forward("the evaluation", &model.config, job.dtype, entries, 0)?;
    let documents = super::extend::load_data(&job.data, host)?;
    let (decoder, own, _) = model.decoder_with(job.adapter.as_deref(), job.dtype)?;
    let asked = asked_scaling(&model.config, job.scaling.as_ref(), job.factor, longest)?;
    let scaling = asked.unwrap_or(own);
    let tokens = select(&tokenize(&documents, &model.encoder())?, longest, job.max_tokens, job.seed);
    let identity = identity(name, settings, &model, job.adapter.as_deref(), Some(hash_of(&tokens)))?;
    let mut cells: Cells<Perplexity> = Cells::open(job.out.as_deref(), job.resume, &identity)?;
    for (context, pattern) in patterns.into_iter().skip(cells.done().len()) {
        let protocol = Protocol { context, stride: job.stride, pattern, scaling: scaling.clone() };
        let result = perplexity(&decoder, &tokens, &protocol, host)?;
        host.event("evaluation", &to_value(&result)?);
        cells.push(result)?;
    }
    Ok((cells, scaling, identity))
}
