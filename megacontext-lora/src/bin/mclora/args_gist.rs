//! Flags of `mclora train` and `mclora eval gist`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub enum TrainCommand {
    /// GistNet: one entry learns to stand for a block of tokens, measured by what the base model loses with it
    Gistnet(Box<TrainGistnet>),
    /// LensNet: which spans of a history deserve a closer look, learned from what it costs to look away
    Lensnet(Box<crate::args_lens::TrainLensnet>),
}

/// What a network beside a frozen base model is trained on, and where.
#[derive(Debug, Clone, Args)]
pub struct What {
    /// Model folder: config.json, model.safetensors (or shards), tokenizer.json
    #[arg(long, value_name = "DIR", help_heading = "What")]
    pub base: Option<PathBuf>,
    /// Adapter on it
    #[arg(long, value_name = "DIR", help_heading = "What")]
    pub adapter: Option<PathBuf>,
    /// Text to learn from: files, folders, globs (text, markdown, source, JSONL with a text field); corpus:held-out is
    /// what the quickstart uses; for LensNet also planted:N, N documents with a fact that is asked for at the end
    #[arg(long, value_name = "PATH", num_args = 1.., help_heading = "What")]
    pub data: Vec<String>,
    /// Run folder, absent or empty [default: runs/gistnet, runs/lensnet]
    #[arg(long, value_name = "DIR", help_heading = "What")]
    pub out: Option<PathBuf>,
    /// Settings from a TOML file; flags go over them
    #[arg(long, value_name = "FILE", help_heading = "What")]
    pub config: Option<PathBuf>,
    /// Take up an interrupted run in the run folder, with the settings found there
    #[arg(long, help_heading = "What")]
    pub resume: bool,
    /// Seed of initial weights, order of the text and everything drawn [default: 0]
    #[arg(long, value_name = "N", help_heading = "What")]
    pub seed: Option<u64>,
    /// Share of the documents held out for validation [default: 0.1]
    #[arg(long, value_name = "SHARE", help_heading = "What")]
    pub holdout: Option<f64>,
}

/// Train GistNet: blocks of a text become single entries, at the least cost to what the frozen base model predicts next.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  mclora train gistnet --base models/small --data 'books/*.txt' --out runs/gist
  mclora train gistnet --base models/small --adapter runs/mine/adapter --data corpus.jsonl --context 2048 \\
      --stages 32:2000,64:2000 --dtype mixed --out runs/gist
  mclora train gistnet --resume --out runs/gist")]
pub struct TrainGistnet {
    #[command(flatten)]
    pub what: What,
    /// Tokens that become one entry [default: 32]
    #[arg(long, value_name = "K", help_heading = "Network")]
    pub block: Option<u64>,
    /// Blocks of the transformer [default: 2]
    #[arg(long, value_name = "N", help_heading = "Network")]
    pub layers: Option<u64>,
    /// How a block becomes one vector: cls, query or mean [default: cls]
    #[arg(long, value_name = "NAME", help_heading = "Network")]
    pub pooling: Option<String>,
    /// What the vector passes last: mlp or linear [default: mlp]
    #[arg(long, value_name = "NAME", help_heading = "Network")]
    pub head: Option<String>,
    /// transformer, or mean for no transformer at all [default: transformer]
    #[arg(long, value_name = "NAME", help_heading = "Network")]
    pub mode: Option<String>,
    /// Tokens of a passage [default: the context that the model, or the adapter, was trained for]
    #[arg(long, value_name = "N", help_heading = "How")]
    pub context: Option<u64>,
    /// Stages separated by commas, each HORIZON:STEPS [default: 32:600]
    #[arg(long, value_name = "LIST", help_heading = "How")]
    pub stages: Option<String>,
    /// dense, or s2 for shifted sparse attention [default: dense]
    #[arg(long, value_name = "NAME", help_heading = "How")]
    pub attention: Option<String>,
    /// Group of s2: tokens, or a part of the passage [default: 0.5]
    #[arg(long, value_name = "G", help_heading = "How")]
    pub group: Option<String>,
    /// Passages of a step [default: 8]
    #[arg(long, value_name = "N", help_heading = "How")]
    pub passages_per_step: Option<u64>,
    /// Replaced spans of a passage and step [default: 16]
    #[arg(long, value_name = "N", help_heading = "How")]
    pub spans_per_passage: Option<u64>,
    /// Peak learning rate [default: 3e-3]
    #[arg(long, value_name = "LR", help_heading = "How")]
    pub lr: Option<f64>,
    /// Precision of the base model: f32, mixed (f32 storage, bf16 products) or bf16 [default: f32]
    #[arg(long, value_name = "NAME", help_heading = "How")]
    pub dtype: Option<String>,
    /// Most memory to plan for, such as 8GB [default: what is free]
    #[arg(long, value_name = "SIZE", help_heading = "How")]
    pub memory: Option<String>,
    /// Steps between validations [default: 100]
    #[arg(long, value_name = "N", help_heading = "Validation")]
    pub validate_every: Option<u64>,
    /// Held-out passages that the network is chosen by [default: 32]
    #[arg(long, value_name = "N", help_heading = "Validation")]
    pub validation_passages: Option<u64>,
    /// Held-out passages of other documents, measured once at the end [default: 32]
    #[arg(long, value_name = "N", help_heading = "Validation")]
    pub test_passages: Option<u64>,
    /// Steps between checkpoints [default: 100]
    #[arg(long, value_name = "N", help_heading = "Validation")]
    pub checkpoint_every: Option<u64>,
}

/// ΔNLL@H of a stored GistNet on a text.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  mclora eval gist --run runs/gist
  mclora eval gist --base models/small --network runs/gist/gistnet.safetensors --data held-out.txt")]
pub struct EvalGist {
    /// A finished run: its network on its test text, with its settings
    #[arg(long, value_name = "DIR")]
    pub run: Option<PathBuf>,
    /// Model folder
    #[arg(long, value_name = "DIR", required_unless_present = "run")]
    pub base: Option<PathBuf>,
    /// Adapter on it
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// The network: gistnet.safetensors of a run
    #[arg(long, value_name = "FILE", required_unless_present = "run")]
    pub network: Option<PathBuf>,
    /// Measure the network although it was trained beside another adapter, or beside none
    #[arg(long)]
    pub other_adapter: bool,
    /// Text: files, folders, globs, or corpus:held-out
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub data: Vec<String>,
    /// Tokens of a passage [default: the context that the model, or the adapter, was trained for]
    #[arg(long, value_name = "N")]
    pub context: Option<u64>,
    /// Tokens after a block that are scored [default: 32]
    #[arg(long, value_name = "H")]
    pub horizon: Option<u64>,
    /// Tokens of a block, to be refused if the network has other blocks
    #[arg(long, value_name = "K")]
    pub block: Option<u64>,
    /// Passages to measure [default: 32]
    #[arg(long, value_name = "N")]
    pub passages: Option<u64>,
    /// Measure shifted sparse attention of this group as well: tokens, or a part of the passage
    #[arg(long, value_name = "G")]
    pub sparse_group: Option<String>,
    /// Seed of which passages are measured [default: 0]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Precision: f32, mixed or bf16 [default: f32]
    #[arg(long, value_name = "NAME")]
    pub dtype: Option<String>,
}
