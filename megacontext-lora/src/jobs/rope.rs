//! The job `rope`: the rotary bands of a model, before and after a scaling, and what is left of them for entries that stand
//! for spans; as numbers, and as a picture where asked. Needs `config.json` alone.
//!
//! Units: wavelengths in tokens, frequencies in radians per token. Errors: those of a model's configuration, a scaling that
//! is not possible, a file that cannot be written.

use std::f64::consts::TAU;
use std::path::PathBuf;

use megacontext_base::atomic::write_file;
use megacontext_base::config::DecoderConfig;
use megacontext_base::rope::{RopeScaling, ScalingChoice, SigmaRule, damping};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::{model_error, parse};
use crate::report::{RopePicture, rope_picture};
use crate::train::config::{LONGEST_CONTEXT, stretched};

/// Levels that are shown: tokens, gists, gists of gists.
const LEVELS: u32 = 3;

/// What the job is told.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RopeJob {
    /// Model folder.
    pub base: PathBuf,
    /// How positions are stretched: a name, or a table as in `rope_scaling`; none shows the model's own.
    pub scaling: Option<ScalingChoice>,
    /// Stretch from the original context.
    pub factor: Option<f64>,
    /// Length of the sequence, which `dynamic` and `longrope` look at; none means original context · factor.
    pub context: Option<usize>,
    /// K: entries of a level that one of the next level stands for; none means the model's, 32 unless it says.
    pub block: Option<usize>,
    /// Take span/√12 as a span's sigma instead of the span.
    pub uniform: bool,
    /// File for a picture, SVG.
    pub plot: Option<PathBuf>,
}

/// Runs the job.
pub fn run(params: Value, _: &dyn HostApi) -> Result<Value> {
    let job: RopeJob = parse(params)?;
    if job.base.as_os_str().is_empty() {
        return Err(PluginError::usage("base: expected a model folder, got none"));
    }
    if let Some(bad) = job.context.filter(|c| !(1..=LONGEST_CONTEXT).contains(c)) {
        return Err(PluginError::usage(format!(
            "context: expected 1 to {LONGEST_CONTEXT} tokens, got {bad}"
        )));
    }
    let config = DecoderConfig::from_dir(&job.base).map_err(model_error)?;
    let original = config.original_context();
    let (scaling, context) = scaling(&job, &config)?;
    let rule = SigmaRule {
        block: job.block.unwrap_or(config.positions.sigma.block),
        uniform: job.uniform || config.positions.sigma.uniform,
        ..config.positions.sigma
    };
    rule.check().map_err(PluginError::usage)?;

    let before = config.rope(&RopeScaling::None).frequencies(context);
    let after = config.rope(&scaling).frequencies(context);
    let sigma: Vec<f64> = (0..LEVELS).map(|lod| rule.sigma(lod)).collect();
    let kept: Vec<Vec<f64>> = after.iter().map(|w| sigma.iter().map(|s| damping(*w, *s)).collect()).collect();
    let bands: Vec<Value> = (0..after.len())
        .map(|band| {
            json!({
                "band": band,
                "omega_before": before[band],
                "omega_after": after[band],
                "wavelength_before": TAU / before[band],
                "wavelength_after": TAU / after[band],
                "stretch": before[band] / after[band],
                "damping": kept[band],
            })
        })
        .collect();
    let name = scaling.to_string();
    if let Some(path) = &job.plot {
        let waves: Vec<(f64, f64)> = before.iter().zip(&after).map(|(b, a)| (TAU / b, TAU / a)).collect();
        let spans: Vec<f64> = (0..LEVELS).map(|lod| rule.span(lod)).collect();
        let picture = rope_picture(&RopePicture {
            scaling: &name,
            waves: &waves,
            damping: &kept,
            spans: &spans,
            lengths: (original, context),
        });
        write_file(path, picture.as_bytes()).map_err(model_error)?;
    }
    Ok(json!({
        "base": job.base,
        "own": config.rope_scaling.to_string(),
        "scaling": name,
        "parameters": scaling.to_json(),
        "theta": config.rope_theta,
        "width": config.architecture.rotary_width,
        "attention_factor": scaling.attention_factor(),
        "original_context": original,
        "context": context,
        "positions": config.positions,
        "block": rule.block,
        "sigma": sigma,
        "bands": bands,
        "plot": job.plot,
    }))
}

/// The scaling to show, and the length of the sequence.
fn scaling(job: &RopeJob, config: &DecoderConfig) -> Result<(RopeScaling, usize)> {
    let original = config.original_context();
    let reach = |factor: f64| ((original as f64 * factor.max(1.0)).round() as usize).min(LONGEST_CONTEXT);
    if job.scaling.is_none() && job.factor.is_none() && job.context.is_none() {
        return Ok((config.rope_scaling.clone(), config.context()));
    }
    let stated = match &job.scaling {
        Some(ScalingChoice::Parameters(given)) => given.get("factor").and_then(Value::as_f64),
        _ => None,
    };
    let none = matches!(&job.scaling, Some(ScalingChoice::Kind(kind)) if kind == "none");
    let context = match (job.context, job.factor.or(stated)) {
        (Some(context), _) => context,
        (None, Some(factor)) => reach(factor),
        (None, None) if none => original,
        (None, None) => {
            return Err(PluginError::usage("scaling: expected a factor or a context beside it, got neither"));
        }
    };
    Ok((stretched(config, job.scaling.as_ref(), job.factor, context)?, context))
}
