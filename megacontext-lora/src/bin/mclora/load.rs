//! `mclora bench load`: what loading the plugin costs, a call into it, and opening a model with it.
//!
//! A library is loaded for the first time once in a process, so each sample is a process of its own, and the medians are
//! told. Memory is the most that the process held (VmHWM) beyond what it held before the model was opened; pages of a mapped
//! file count once they were touched.
//!
//! Units: milliseconds, nanoseconds, 10⁶ bytes. Errors: those of loading and opening.

use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use megacontext_lora_abi::{LoadOptions, Plugin};
use serde_json::{Value, json};

use crate::args::Global;
use crate::bench::{all, in_another_process, printed};
use crate::commands::plugin_path;
use crate::failure::{Failure, Result};
use crate::params::{Params, utf8};

/// Calls that are timed together.
const CALLS: u32 = 200_000;
/// Fields whose median is told.
const MEASURED: [&str; 5] = ["load_ms", "open_ms", "call_ns", "base_open_ms", "base_extra_MB"];

/// Loading the plugin in a fresh process, from opening the file to an open session, and a call that does no work; with --base
/// also a session over that model, until it answers.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:
  mclora bench load --base models/small --dtype bf16")]
pub struct LoadArgs {
    /// Processes to load it in
    #[arg(long, value_name = "N", default_value_t = 5)]
    reps: u64,
    /// Model folder to open
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// Precision of the model: f32, mixed or bf16 [default: f32]
    #[arg(long, value_name = "NAME", requires = "base")]
    dtype: Option<String>,
}

/// The middle one of several processes that loaded it; in this one where only one is wanted.
pub fn run(args: &LoadArgs, global: &Global) -> Result<Value> {
    if !(1..=1000).contains(&args.reps) {
        return Err(Failure::usage(format!("--reps: expected 1 to 1000, got {}", args.reps)));
    }
    if args.reps == 1 {
        return Ok(all(vec![printed(here(args, global)?, global)]));
    }
    let mut again = vec!["load".to_owned(), "--reps=1".to_owned()];
    if let Some(base) = &args.base {
        again.extend(["--base".to_owned(), utf8(base)?.to_owned()]);
    }
    again.extend(args.dtype.iter().flat_map(|dtype| ["--dtype".to_owned(), dtype.clone()]));
    let samples =
        (0..args.reps).map(|_| in_another_process(&again, global)).collect::<Result<Vec<Value>>>()?;
    let field = |key: &str| -> Vec<f64> {
        let mut values: Vec<f64> = samples.iter().filter_map(|s| s[key].as_f64()).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let mut result = samples.first().cloned().unwrap_or_default();
    for key in MEASURED {
        let values = field(key);
        if let Some(middle) = values.get(values.len() / 2) {
            result[key] = json!(middle);
        }
    }
    result["best_ms"] = json!(field("load_ms").first());
    result["reps"] = json!(args.reps);
    Ok(all(vec![printed(result, global)]))
}

/// Loads the plugin into this process, where it must not have been loaded before.
fn here(args: &LoadArgs, global: &Global) -> Result<Value> {
    let path = plugin_path(global)?;
    let start = Instant::now();
    let plugin = Plugin::load(&path, &LoadOptions::default())?;
    let loaded = start.elapsed();
    let session = plugin.open_session(&json!({}), ())?;
    let opened = start.elapsed();
    let calls = || -> Result<f64> {
        let start = Instant::now();
        for _ in 0..CALLS {
            black_box(&session).check()?;
        }
        Ok(start.elapsed().as_secs_f64() / f64::from(CALLS) * 1e9)
    };
    calls()?;
    let call =
        (0..5).map(|_| calls()).collect::<Result<Vec<f64>>>()?.into_iter().fold(f64::INFINITY, f64::min);
    let mut result = json!({
        "lib": "megacontext", "what": "load", "profile": plugin.build_info().profile,
        "load_ms": milliseconds(opened), "best_ms": milliseconds(opened), "open_ms": milliseconds(opened - loaded),
        "call_ns": (call * 10.0).round() / 10.0, "reps": 1,
    });
    if let Some(base) = &args.base {
        open(&plugin, base, args.dtype.as_deref(), &mut result)?;
    }
    Ok(result)
}

/// Opens a session over a model and adds what that took.
fn open(plugin: &Plugin, base: &Path, dtype: Option<&str>, result: &mut Value) -> Result<()> {
    let mut config = Params::default();
    config.set("base", utf8(base)?);
    config.set_some("dtype", dtype);
    let before = most_memory();
    let start = Instant::now();
    let session = plugin.open_session(&config.into_value(), ())?;
    session.check()?;
    result["base_open_ms"] = json!(milliseconds(start.elapsed()));
    let extra = before.zip(most_memory()).map(|(before, after)| after.saturating_sub(before));
    result["base_extra_MB"] = json!(extra.map(megabytes));
    result["base_file_MB"] = json!(megabytes(weight_bytes(base)?));
    result["dtype"] = json!(dtype.unwrap_or("f32"));
    Ok(())
}

/// Bytes of a folder's weight files.
fn weight_bytes(dir: &Path) -> Result<u64> {
    let failed = |e: std::io::Error| Failure::io(dir, &e);
    let mut bytes = 0;
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            bytes += fs::metadata(&path).map_err(|e| Failure::io(&path, &e))?.len();
        }
    }
    Ok(bytes)
}

/// The most memory this process held so far, bytes; none where the system does not say.
fn most_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn megabytes(bytes: u64) -> f64 {
    (bytes as f64 / 1e5).round() / 10.0
}
