//! The job `bench`: how fast the kernels and a training step are on this machine, and what memory they take.
//!
//! Parameters are `what` and the settings of that measurement; the result is one flat object, whose field names are those
//! that the scripts for PyTorch under `scripts/peer` print, so that a line of ours stands beside a line of theirs:
//!
//! | field | |
//! |---|---|
//! | `lib`, `what`, `dtype`, `threads` | what was measured |
//! | `device` | of `step`, `gist`, `plan` and `attention`: what passes ran on |
//! | `peak_device_MB` | where that is a GPU: the most of its memory that was in use, copies of the parameters among it |
//! | `B`, `H`, `Hkv`, `d`, `n`, `G` | rows, query heads, kv heads, head width, entries, group (n for dense) |
//! | `fb_ms`, `fwd_ms`, `best_ms` | median forward and backward, forward alone, best forward and backward |
//! | `step_s`, `best_s`, `tok_s` | a whole step, tokens per second |
//! | `block_ms` | of `gist`: for each replaced block |
//! | `apart_ms`, `cheaper`, `apart_extra_MB` | of `gist`: the same as two whole passes per block, how many times that costs, its memory |
//! | `dense_ms`, `pearson`, `spearman`, `mean_apart`, `most_apart`, `dense_size`, `top_overlap` | of `lens` with `compare`, see `bench/lens.rs` |
//! | `device_bytes` | of `plan` on a GPU: bytes there by kind, and what is free |
//! | `peak_extra_MB` | most memory of forward and backward beyond the idle inputs, 10⁶ bytes; the GPU's where one was measured |
//! | `peak_rss_MB`, `idle_rss_MB` | most memory of the process in a step; before the first one |
//! | `gflops`, `gflop_total`, `tflop`, `tflop_parts` | FLOPs by [`crate::train::work`], per second of the median |
//! | `n_clean`, `other` | samples that other processes left alone; cores that those used |
//! | `cpu`, `profile` | instruction set chosen, how the plugin was built (figures of `debug` say nothing) |
//!
//! Inputs are random and never zero. A warm-up runs first ([`measure`]). That what is timed computes the right thing is the
//! business of the tests, at these sizes too; nothing is checked here.
//!
//! Errors: sizes that do not fit, by key. Left out: GistNet itself.

use megacontext_base::device::Device;
use megacontext_base::random::{Random, mix};
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::cpu;
use megacontext_kernels::precision::Precision;
use megacontext_kernels::store::Store;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::{model_error, parse};
use crate::train::config::{Attention, LONGEST_CONTEXT};

mod attention;
#[cfg(feature = "cuda")]
mod attention_cuda;
mod gist;
mod lens;
pub mod measure;
mod ops;
mod step;

/// What can be measured.
pub const WHATS: [&str; 7] = ["attention", "step", "loss", "linear", "gist", "lens", "plan"];

/// Runs the job.
///
/// # Errors
/// When `what` is not one of [`WHATS`]; those of the measurement.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let Value::Object(mut params) = params else {
        return Err(PluginError::usage(format!("parameters: expected an object, got {params}")));
    };
    let what = params.remove("what").unwrap_or(Value::Null);
    let params = Value::Object(params);
    match what.as_str() {
        Some("attention") => attention::run(&parse(params)?, host),
        Some("step") => step::run(&parse(params)?, host),
        Some("loss") => ops::loss(&parse(params)?, host),
        Some("linear") => ops::linear(&parse(params)?, host),
        Some("gist") => gist::run(&parse(params)?, host),
        Some("lens") => lens::run(&parse(params)?, host),
        Some("plan") => step::plan(&parse(params)?, host),
        _ => Err(PluginError::usage(format!("what: expected one of {WHATS:?}, got {what}"))),
    }
}

/// The fields that begin every result.
fn begin(what: &str, dtype: Precision) -> Result<Map<String, Value>> {
    let fields = json!({
        "lib": "megacontext", "what": what, "dtype": dtype, "threads": rayon::current_num_threads(),
        "cpu": cpu::level().name(), "profile": env!("MEGACONTEXT_PROFILE"),
    });
    match fields {
        Value::Object(map) => Ok(map),
        _ => Err(PluginError::internal("bench: the fields are an object")),
    }
}

/// What was measured on, and the most of a GPU's memory that was in use since `Device::forget_peak`.
fn add_device(map: &mut Map<String, Value>, device: &Device) -> Result<()> {
    add(map, json!({ "device": device.describe() }));
    if let Some(peak) = device.peak_bytes().map_err(model_error)? {
        add(map, json!({ "peak_device_MB": measure::megabytes(Some(peak)) }));
    }
    Ok(())
}

/// Adds fields to a result.
fn add(map: &mut Map<String, Value>, fields: Value) {
    if let Value::Object(fields) = fields {
        map.extend(fields);
    }
}

/// The peer's name for a pattern.
fn kind(attention: Attention) -> &'static str {
    match attention {
        Attention::S2 => "s2",
        Attention::Dense => "dense",
    }
}

/// Entries of a group; all of them for dense attention.
fn group(pattern: Pattern, n: usize) -> usize {
    match pattern {
        Pattern::ShiftedSparse { group } | Pattern::ShiftedBidirectional { group } => group.min(n),
        _ => n,
    }
}

/// Refuses a size out of range.
fn within(key: &str, value: usize, most: usize) -> Result<()> {
    if (1..=most).contains(&value) {
        return Ok(());
    }
    Err(PluginError::usage(format!("{key}: expected 1 to {most}, got {value}")))
}

/// Refuses entries, rows and repetitions out of range.
fn check_common(n: usize, batch: usize, reps: usize) -> Result<()> {
    within("n", n, LONGEST_CONTEXT)?;
    within("batch", batch, LONGEST_CONTEXT)?;
    within("reps", reps, 1000)
}

/// Values N(0, 1), made by all threads; the same seed gives the same values at any number of threads.
fn normals<S: Store>(seed: u64, len: usize) -> Vec<S> {
    const CHUNK: usize = 1 << 16;
    let mut values = vec![S::default(); len];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        let mut random = Random::new(seed ^ mix(chunk as u64));
        values.fill_with(|| S::put(random.normal() as f32));
    });
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_random_and_repeat() {
        let (a, b): (Vec<f32>, Vec<f32>) = (normals(1, 100_000), normals(1, 100_000));
        assert_eq!(a, b);
        assert_ne!(a[..10], normals::<f32>(2, 10)[..]);
        let mean = a.iter().map(|v| f64::from(*v)).sum::<f64>() / a.len() as f64;
        let square = a.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / a.len() as f64;
        assert!(mean.abs() < 0.02 && (square - 1.0).abs() < 0.02, "{mean} {square}");
    }
}
