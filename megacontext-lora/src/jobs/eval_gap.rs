//! The job `eval_gap`: what shifted sparse attention costs a model that is used with dense attention, by length.
//!
//! Perplexity is measured with both on the same tokens; the gap is sparse over dense, less one. The model's weights are the
//! same: this says how far training saw what use will see. Lengths can be interrupted and taken up
//! ([`crate::run::cells`]).

use std::path::PathBuf;

use megacontext_base::rope::ScalingChoice;
use megacontext_kernels::precision::Precision;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::eval_ppl::{EvalPpl, measure};
use crate::error::Result;
use crate::host::HostApi;
use crate::jobs::{parse, to_value, with_threads};
use crate::report::evaluation::{Measured, Page, render};
use crate::train::config::{Attention, GroupSize};
use crate::train::eval::{Gap, SCORING, gaps};

/// What the job is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalGap {
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
    /// Group size of the sparse attention.
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

impl Default for EvalGap {
    fn default() -> Self {
        let EvalPpl { max_tokens, group, .. } = EvalPpl::default();
        Self {
            base: PathBuf::new(),
            adapter: None,
            data: Vec::new(),
            contexts: Vec::new(),
            stride: None,
            max_tokens,
            seed: 0,
            group,
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
    let job: EvalGap = parse(params)?;
    with_threads(job.threads, || evaluate(&job, host))?
}

fn evaluate(job: &EvalGap, host: &dyn HostApi) -> Result<Value> {
    let given = job.clone();
    let each = EvalPpl {
        base: given.base,
        adapter: given.adapter,
        data: given.data,
        contexts: given.contexts,
        stride: given.stride,
        max_tokens: given.max_tokens,
        seed: given.seed,
        attention: Attention::Dense,
        group: given.group,
        out: given.out,
        resume: given.resume,
        scaling: given.scaling,
        factor: given.factor,
        dtype: given.dtype,
        threads: given.threads,
    };
    let (cells, scaling, identity) =
        measure("eval_gap", &each, job, &[Attention::Dense, Attention::S2], host)?;
    let gaps: Vec<Gap> = gaps(cells.done());
    let result = to_value(json!({
        "base": job.base,
        "adapter": job.adapter,
        "dtype": job.dtype,
        "rope": scaling.to_string(),
        "scoring": SCORING,
        "seed": job.seed,
        "results": gaps,
    }))?;
    let page = Page { result: &result, identity: &identity, measured: Measured::Gap(&gaps) };
    cells.finish(&result, || render(&page))?;
    Ok(result)
}
