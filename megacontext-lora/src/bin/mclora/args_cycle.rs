//! Flags of `mclora train CONFIG.toml`.

use std::path::PathBuf;

use clap::Args;

use crate::args_gist::TrainCommand;

/// Alternating optimisation of GistNet, LensNet and LoRA; or one of the networks alone, beside a frozen base model.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "Examples:
  mclora train configs/jt_cycle.toml --base models/small --data 'books/*.txt' --plan
  mclora train configs/jt_cycle.toml --base models/small --data 'books/*.txt' --out runs/cycle
  mclora train --resume --out runs/cycle
  mclora train gistnet --help")]
pub struct Train {
    #[command(subcommand)]
    pub network: Option<TrainCommand>,
    #[command(flatten)]
    pub cycle: TrainCycle,
}

/// A run of alternating optimisation.
#[derive(Debug, Clone, Args)]
pub struct TrainCycle {
    /// Settings; flags go over them
    #[arg(value_name = "CONFIG.toml")]
    pub config: Option<PathBuf>,
    /// Model folder: config.json, model.safetensors (or shards), tokenizer.json
    #[arg(long, value_name = "DIR", help_heading = "What")]
    pub base: Option<PathBuf>,
    /// Adapter on it, whose LoRA goes on learning
    #[arg(long, value_name = "DIR", help_heading = "What")]
    pub adapter: Option<PathBuf>,
    /// GistNet to begin with, gistnet.safetensors of a run
    #[arg(long, value_name = "FILE", help_heading = "What")]
    pub gistnet: Option<PathBuf>,
    /// LensNet to begin with, lensnet.safetensors of a run
    #[arg(long, value_name = "FILE", help_heading = "What")]
    pub lensnet: Option<PathBuf>,
    /// Text to learn from: files, folders, globs (text, markdown, source, JSONL with a text field); corpus:held-out is
    /// what the quickstart uses
    #[arg(long, value_name = "PATH", num_args = 1.., help_heading = "What")]
    pub data: Vec<String>,
    /// Run folder, absent or empty [default: runs/train]
    #[arg(long, value_name = "DIR", help_heading = "What")]
    pub out: Option<PathBuf>,
    /// Take up an interrupted run in the run folder, with the settings found there
    #[arg(long, help_heading = "What")]
    pub resume: bool,
    /// Say what the run will cost, and do nothing else
    #[arg(long, help_heading = "What")]
    pub plan: bool,
    /// Seed of initial weights, order of the text and everything drawn [default: 0]
    #[arg(long, value_name = "N", help_heading = "How")]
    pub seed: Option<u64>,
    /// Times through JT1, JT2 and JT3 [default: 3]
    #[arg(long, value_name = "N", help_heading = "How")]
    pub cycles: Option<u64>,
    /// At the end, the run again with each module frozen from its start, in turn
    #[arg(long, help_heading = "How")]
    pub ablation: bool,
    /// Precision of the base model: f32, mixed (f32 storage, bf16 products) or bf16 [default: f32]
    #[arg(long, value_name = "NAME", help_heading = "How")]
    pub dtype: Option<String>,
    /// Most memory to plan for, such as 8GB [default: what is free]
    #[arg(long, value_name = "SIZE", help_heading = "How")]
    pub memory: Option<String>,
}
