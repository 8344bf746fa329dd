//! `mclora bench`: measurements of this machine, one JSON line each.
//!
//! The plugin measures (its job `bench`); here are the flags, and in [`load`] what only a host can measure. Several lengths (`--n 2048,4096`) are measured in a process each, so that memory one
//! measurement leaves behind is not the next one's, and a plugin can only be loaded for the first time once.
//!
//! Lines go to stdout as they come; with `--json` one object `{"measurements": [...]}` at the end instead.

use crate::args::Global;
use crate::commands::job;
use crate::failure::{Failure, Result};
use crate::load::{self, LoadArgs};
use crate::params::{self, Params};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::{Command, Stdio};

#[derive(Debug, Clone, Subcommand)]
pub enum BenchCommand {
    /// Attention, forward and backward
    Attention(AttentionArgs),
    /// A whole training step: LoRA, embeddings and norms learn, AdamW included
    Step(StepArgs),
    /// What a step would take, without running it
    Plan(StepArgs),
    /// Cross-entropy over the output head, with the gradients of hidden states and head
    Loss(LossArgs),
    /// A frozen linear layer with LoRA, with the gradients of input and factors
    Linear(LinearArgs),
    /// The loss of gists: rows over one pass of a document, against two whole passes per block
    Gist(GistArgs),
    /// LensNet's scores of a working context
    Lens(LensArgs),
    /// Loading the plugin, a call into it that does no work, and opening a model
    Load(LoadArgs),
    /// One measurement from the parameters of the plugin's job, as JSON
    #[command(hide = true)]
    Job {
        /// `{"what": "attention", "n": 2048, ...}`
        params: String,
    },
}

/// Attention, forward and backward, on random q, k and v.
///
/// On the processor unless --device names a GPU; there in f32 or bf16.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  mclora bench attention --n 2048,4096,8192 --heads 9,3 --threads 2
  mclora bench attention --pattern dense --n 8192 --heads 16,16 --head-dim 128")]
pub struct AttentionArgs {
    /// s2 (shifted sparse) or dense (causal) [default: s2]
    #[arg(long, value_name = "NAME")]
    pattern: Option<String>,
    /// Entries; several with commas [default: 8192]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    n: Vec<u64>,
    /// Query heads and kv heads [default: 9,3]
    #[arg(long, value_name = "H,G", value_delimiter = ',')]
    heads: Vec<u64>,
    /// Width of a head [default: 64]
    #[arg(long, value_name = "N")]
    head_dim: Option<u64>,
    /// Group of s2: entries, or a part of them [default: 0.25]
    #[arg(long, value_name = "G")]
    group: Option<String>,
    /// Rows [default: 1]
    #[arg(long, value_name = "N")]
    batch: Option<u64>,
    #[command(flatten)]
    common: Common,
}

/// Flags of every measurement of an operation.
#[derive(Debug, Clone, Args)]
struct Common {
    /// Precision: f32, mixed (f32 storage, bf16 products) or bf16 [default: f32]
    #[arg(long, value_name = "NAME")]
    dtype: Option<String>,
    /// Quiet samples to take, out of at most three times as many [default: 3]
    #[arg(long, value_name = "N")]
    reps: Option<u64>,
}

/// A training step of a Llama with random weights and tied embeddings, on random tokens.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  mclora bench step --n 2048,4096 --threads 2
  mclora bench plan --shape 2048,16,32,8,8192,128256 --n 32768 --group 4096")]
pub struct StepArgs {
    /// Model width, blocks, query heads, kv heads, MLP width, vocabulary [default: 576,30,9,3,1536,49152, SmolLM2-135M's]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    shape: Vec<u64>,
    /// Tokens of a sequence; several with commas [default: 4096]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    n: Vec<u64>,
    /// s2 (shifted sparse) or dense (causal) [default: s2]
    #[arg(long, value_name = "NAME")]
    attn: Option<String>,
    /// Group of s2: tokens, or a part of the sequence [default: 0.25]
    #[arg(long, value_name = "G")]
    group: Option<String>,
    /// Precision: f32, mixed (f32 storage, bf16 products) or bf16 [default: f32]
    #[arg(long, value_name = "NAME")]
    dtype: Option<String>,
    /// Rank of LoRA on q, k, v and o [default: 8]
    #[arg(long, value_name = "R")]
    rank: Option<u64>,
    /// Keep what blocks compute instead of recomputing it in the backward pass
    #[arg(long)]
    no_checkpointing: bool,
    /// Sequences of a step [default: 1]
    #[arg(long, value_name = "N")]
    batch: Option<u64>,
    /// Quiet steps to time, out of at most three times as many [default: 2]
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
}

/// Cross-entropy over the output head.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:
  mclora bench loss --n 4096 --width 576 --vocab 49152")]
pub struct LossArgs {
    /// Positions; several with commas [default: 4096]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    n: Vec<u64>,
    /// Model width [default: 576]
    #[arg(long, value_name = "N")]
    width: Option<u64>,
    /// Vocabulary [default: 49152]
    #[arg(long, value_name = "N")]
    vocab: Option<u64>,
    #[command(flatten)]
    common: Common,
}

/// A frozen linear layer with LoRA.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:
  mclora bench linear --n 4096 --in 576 --out 1536 --rank 0")]
pub struct LinearArgs {
    /// Entries; several with commas [default: 4096]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    n: Vec<u64>,
    /// Width of the input [default: 576]
    #[arg(long = "in", value_name = "N")]
    inp: Option<u64>,
    /// Width of the output [default: 576]
    #[arg(long, value_name = "N")]
    out: Option<u64>,
    /// Rank of LoRA, 0 for none [default: 8]
    #[arg(long, value_name = "R")]
    rank: Option<u64>,
    #[command(flatten)]
    common: Common,
}

/// ΔNLL@H of a frozen model, forward and backward into what stands for the blocks.
///
/// Every replaced block of a document costs a row of its gist and the horizon over keys and values that all blocks share
/// (fb_ms), instead of two passes over its context (apart_ms for all blocks).
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:
  mclora bench gist --n 2048 --horizon 64 --blocks 32")]
pub struct GistArgs {
    /// Model width, blocks, query heads, kv heads, MLP width, vocabulary [default: 576,30,9,3,1536,49152, SmolLM2-135M's]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    shape: Vec<u64>,
    /// Tokens of the document; several with commas [default: 2048]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    n: Vec<u64>,
    /// Tokens scored after a block [default: 64]
    #[arg(long, value_name = "H")]
    horizon: Option<u64>,
    /// Replaced blocks of the document [default: 32]
    #[arg(long, value_name = "N")]
    blocks: Option<u64>,
    /// Tokens of a block [default: 32]
    #[arg(long, value_name = "K")]
    block: Option<u64>,
    /// s2 (shifted sparse) or dense (causal) [default: dense]
    #[arg(long, value_name = "NAME")]
    attn: Option<String>,
    /// Group of s2: tokens, or a part of the document [default: 0.25]
    #[arg(long, value_name = "G")]
    group: Option<String>,
    #[command(flatten)]
    common: Common,
}

/// The scores of a made up working context, by random weights or a stored LensNet.
///
/// With --compare the same entries are scored by dense attention too; the line then says how far apart the scores are.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  mclora bench lens --n 8192 --shape 768,2,6 --threads 2
  mclora bench lens --n 8192,32768 --attn s2 --group 2048 --compare")]
pub struct LensArgs {
    /// Width, blocks, heads [default: 768,2,6]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    shape: Vec<u64>,
    /// Entries of the working context; several with commas [default: 8192]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    n: Vec<u64>,
    /// Entries attend to earlier ones alone
    #[arg(long)]
    causal: bool,
    /// s2 (shifted sparse) or dense [default: dense]
    #[arg(long, value_name = "NAME")]
    attn: Option<String>,
    /// Group of s2: entries, or a part of the context [default: 0.25]
    #[arg(long, value_name = "G")]
    group: Option<String>,
    /// A stored LensNet instead of --shape and random weights
    #[arg(long, value_name = "FILE", conflicts_with = "shape")]
    network: Option<PathBuf>,
    /// Score by dense attention too, and say how far apart the scores are
    #[arg(long)]
    compare: bool,
    /// Leave the network, the context and its scores in this folder
    #[arg(long, value_name = "DIR")]
    files: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

impl BenchCommand {
    /// Can it measure a GPU? The others measure operations and networks on the processor.
    pub fn has_passes(&self) -> bool {
        matches!(self, Self::Attention(_) | Self::Step(_) | Self::Plan(_) | Self::Gist(_))
    }
}

/// Runs the command: prints the measurements, or returns them where `--json` is given.
pub fn run(command: &BenchCommand, global: &Global) -> Result<Value> {
    match command {
        BenchCommand::Attention(args) => each(attention(args, global)?, &args.n, global),
        BenchCommand::Step(args) => each(step("step", args, global)?, &args.n, global),
        BenchCommand::Plan(args) => each(step("plan", args, global)?, &args.n, global),
        BenchCommand::Loss(args) => each(loss(args, global)?, &args.n, global),
        BenchCommand::Linear(args) => each(linear(args, global)?, &args.n, global),
        BenchCommand::Gist(args) => each(gist(args, global)?, &args.n, global),
        BenchCommand::Lens(args) => each(lens(args, global)?, &args.n, global),
        BenchCommand::Load(args) => load::run(args, global),
        BenchCommand::Job { params } => {
            let params = serde_json::from_str(params)
                .map_err(|e| Failure::usage(format!("bench job: expected parameters as JSON: {e}")))?;
            Ok(all(vec![printed(job("bench", &params, global)?, global)]))
        }
    }
}

fn attention(args: &AttentionArgs, global: &Global) -> Result<Params> {
    let mut params = start("attention", global);
    params.set_some("pattern", args.pattern.as_deref());
    params.set_list("heads", &args.heads);
    params.set_some("head_dim", args.head_dim);
    params.set_some("group", args.group.as_deref().map(params::group).transpose()?);
    params.set_some("batch", args.batch);
    params.set_some("device", global.device.as_deref());
    set_common(&mut params, &args.common);
    Ok(params)
}

fn step(what: &str, args: &StepArgs, global: &Global) -> Result<Params> {
    let mut params = start(what, global);
    params.set_list("shape", &args.shape);
    params.set_some("attn", args.attn.as_deref());
    params.set_some("group", args.group.as_deref().map(params::group).transpose()?);
    params.set_some("dtype", args.dtype.as_deref());
    params.set_some("rank", args.rank);
    params.set_some("checkpointing", args.no_checkpointing.then_some(false));
    params.set_some("batch", args.batch);
    params.set_some("steps", args.steps);
    params.set_some("device", global.device.as_deref());
    Ok(params)
}

fn loss(args: &LossArgs, global: &Global) -> Result<Params> {
    let mut params = start("loss", global);
    params.set_some("width", args.width);
    params.set_some("vocab", args.vocab);
    set_common(&mut params, &args.common);
    Ok(params)
}

fn linear(args: &LinearArgs, global: &Global) -> Result<Params> {
    let mut params = start("linear", global);
    params.set_some("inp", args.inp);
    params.set_some("out", args.out);
    params.set_some("rank", args.rank);
    set_common(&mut params, &args.common);
    Ok(params)
}

fn gist(args: &GistArgs, global: &Global) -> Result<Params> {
    let mut params = start("gist", global);
    params.set_some("horizon", args.horizon);
    params.set_some("blocks", args.blocks);
    params.set_some("device", global.device.as_deref());
    params.set_some("block", args.block);
    params.set_list("shape", &args.shape);
    params.set_some("attn", args.attn.as_deref());
    params.set_some("group", args.group.as_deref().map(params::group).transpose()?);
    set_common(&mut params, &args.common);
    Ok(params)
}

fn lens(args: &LensArgs, global: &Global) -> Result<Params> {
    let mut params = start("lens", global);
    params.set_list("shape", &args.shape);
    params.set_some("causal", args.causal.then_some(true));
    params.set_some("attn", args.attn.as_deref());
    params.set_some("group", args.group.as_deref().map(params::group).transpose()?);
    params.set_path("network", args.network.as_ref())?;
    params.set_some("compare", args.compare.then_some(true));
    params.set_path("files", args.files.as_ref())?;
    set_common(&mut params, &args.common);
    Ok(params)
}

fn start(what: &str, global: &Global) -> Params {
    let mut params = Params::default();
    params.set("what", what);
    params.set_some("threads", global.threads);
    params
}

fn set_common(params: &mut Params, common: &Common) {
    params.set_some("dtype", common.dtype.as_deref());
    params.set_some("reps", common.reps);
}

/// One measurement for each length, each in a process of its own where there are several.
fn each(params: Params, lengths: &[u64], global: &Global) -> Result<Value> {
    let mut params = params.into_value();
    if let [n] = lengths {
        params["n"] = json!(n);
    }
    if lengths.len() < 2 {
        return Ok(all(vec![printed(job("bench", &params, global)?, global)]));
    }
    let mut measurements = Vec::new();
    for n in lengths {
        params["n"] = json!(n);
        let measurement = in_another_process(&["job".into(), params.to_string()], global)?;
        measurements.push(printed(measurement, global));
    }
    Ok(all(measurements))
}

/// Prints a measurement, one line, unless `--json` wants all of them at the end.
pub fn printed(measurement: Value, global: &Global) -> Value {
    if !global.json {
        println!("{measurement}");
    }
    measurement
}

/// The result of the command.
pub fn all(measurements: Vec<Value>) -> Value {
    json!({ "measurements": measurements })
}

/// The measurement of `mclora bench ARGS` in a process of its own.
pub fn in_another_process(args: &[String], global: &Global) -> Result<Value> {
    let io = |e: std::io::Error| Failure::internal(format!("bench: cannot run this program again: {e}"));
    let mut command = Command::new(std::env::current_exe().map_err(io)?);
    if let Some(plugin) = &global.plugin {
        command.arg("--plugin").arg(plugin);
    }
    command.args(["--json", "bench"]).args(args).stdin(Stdio::null());
    let output = command.output().map_err(io)?;
    let mut answer: Value = serde_json::from_slice(&output.stdout).map_err(|_| {
        let said = String::from_utf8_lossy(&output.stderr);
        Failure::internal(format!(
            "bench: the measuring process ended with {}: {}",
            output.status,
            said.trim()
        ))
    })?;
    if let Some(failure) = Failure::from_json(&answer["error"]) {
        return Err(failure);
    }
    match &mut answer["measurements"] {
        Value::Array(measurements) if measurements.len() == 1 => Ok(measurements.remove(0)),
        other => Err(Failure::internal(format!("bench: expected one measurement, got {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    fn params_of(line: &str) -> Result<Value> {
        let cli = Cli::try_parse_from(line.split_whitespace()).expect("a command line that clap accepts");
        let Some(Command::Bench(command)) = cli.command else { panic!("not bench: {line}") };
        let params = match &command {
            BenchCommand::Attention(args) => attention(args, &cli.global)?,
            BenchCommand::Step(args) => step("step", args, &cli.global)?,
            BenchCommand::Plan(args) => step("plan", args, &cli.global)?,
            BenchCommand::Loss(args) => loss(args, &cli.global)?,
            BenchCommand::Linear(args) => linear(args, &cli.global)?,
            BenchCommand::Gist(args) => gist(args, &cli.global)?,
            BenchCommand::Lens(args) => lens(args, &cli.global)?,
            other => panic!("no job: {other:?}"),
        };
        Ok(params.into_value())
    }

    #[test]
    fn only_given_flags_become_keys() {
        assert_eq!(params_of("mclora bench attention").unwrap(), json!({ "what": "attention" }));
        assert_eq!(
            params_of(
                "mclora bench attention --pattern dense --heads 9,3 --head-dim 64 --group 256 --dtype f32 --threads 2"
            )
            .unwrap(),
            json!({
                "what": "attention", "threads": 2, "pattern": "dense", "heads": [9, 3], "head_dim": 64, "group": 256,
                "dtype": "f32"
            })
        );
        assert_eq!(
            params_of(
                "mclora bench step --shape 8,1,2,1,16,32 --attn s2 --group 0.5 --rank 2 --no-checkpointing"
            )
            .unwrap(),
            json!({
                "what": "step", "shape": [8, 1, 2, 1, 16, 32], "attn": "s2", "group": 0.5, "rank": 2,
                "checkpointing": false
            })
        );
        assert_eq!(params_of("mclora bench plan --steps 3").unwrap(), json!({ "what": "plan", "steps": 3 }));
        assert_eq!(params_of("mclora bench loss --vocab 9").unwrap(), json!({ "what": "loss", "vocab": 9 }));
        assert_eq!(params_of("mclora bench linear --in 9").unwrap(), json!({ "what": "linear", "inp": 9 }));
        assert_eq!(
            params_of("mclora bench gist --blocks 9").unwrap(),
            json!({ "what": "gist", "blocks": 9 })
        );
        assert_eq!(
            params_of("mclora bench lens --causal --attn s2 --compare --files x").unwrap(),
            json!({ "what": "lens", "causal": true, "attn": "s2", "compare": true, "files": "x" })
        );
    }

    #[test]
    fn a_group_that_is_no_number_is_a_usage_error() {
        assert_eq!(params_of("mclora bench attention --group wide").unwrap_err().exit_code(), 2);
    }
}
