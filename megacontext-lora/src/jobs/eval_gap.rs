//! The job `eval_gap`: what shifted sparse attention costs a model that is used with dense attention, by length.
//!
//! Perplexity is measured with both on the same tokens; the gap is sparse over dense, less one. The model's weights are the
//! same: this says how far training saw what use will see. Lengths can be interrupted and taken up
//! ([`crate::run::cells`]).

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::eval_ppl::{Attending, Measurement, with_results};
use super::parameters::{Kept, Model, Parameters, Scored};
use crate::error::Result;
use crate::host::HostApi;
use crate::jobs::{to_value, with_threads};
use crate::report::evaluation::{Measured, Page, render};
use crate::train::config::{Attention, GroupSize};
use crate::train::eval::{Gap, gaps};

/// What the job is told.
#[derive(Clone, Debug, Serialize)]
pub struct EvalGap {
    /// The model.
    #[serde(flatten)]
    pub model: Model,
    /// The text.
    #[serde(flatten)]
    pub text: Scored,
    /// The sparse attention.
    #[serde(flatten)]
    pub sparse: Sparse,
    /// Where results go.
    #[serde(flatten)]
    pub kept: Kept,
}

/// The sparse attention.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Sparse {
    /// Group size.
    pub group: GroupSize,
}

impl Default for Sparse {
    fn default() -> Self {
        Self { group: Attending::default().group }
    }
}

/// Runs the job.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let mut params = Parameters::new(params)?;
    let job =
        EvalGap { model: params.take()?, text: params.take()?, sparse: params.take()?, kept: params.take()? };
    params.end()?;
    with_threads(job.model.threads, || evaluate(&job, host))?
}

fn evaluate(job: &EvalGap, host: &dyn HostApi) -> Result<Value> {
    let measurement = Measurement {
        job: "eval_gap",
        settings: to_value(job)?,
        model: &job.model,
        text: &job.text,
        kept: &job.kept,
        attentions: &[Attention::Dense, Attention::S2],
        group: job.sparse.group,
    };
    let (cells, result, identity) = measurement.run(host)?;
    let gaps: Vec<Gap> = gaps(cells.done());
    let result = with_results(result, to_value(&gaps)?);
    let page = Page { result: &result, identity: &identity, measured: Measured::Gap(&gaps) };
    cells.finish(&result, || render(&page))?;
    Ok(result)
}
