//! Flags of `mclora train lensnet`.

use std::path::PathBuf;

use clap::Args;

use crate::args_gist::What;

/// Train LensNet: for every entry of a working context, whether a closer look is worth its room.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  mclora train lensnet --base models/small --gistnet runs/gist/gistnet.safetensors --data 'books/*.txt' --out runs/lens
  mclora train lensnet --base models/small --gistnet runs/gist/gistnet.safetensors --data planted:400 \\
      --history 1024 --budget 256 --horizon 8 --out runs/lens
  mclora train lensnet --resume --out runs/lens")]
pub struct TrainLensnet {
    #[command(flatten)]
    pub what: What,
    /// The network that makes gists: gistnet.safetensors of a run
    #[arg(long, value_name = "FILE", help_heading = "What")]
    pub gistnet: Option<PathBuf>,
    /// Tokens of a history [default: what the model, or the adapter, was trained for, less the horizon]
    #[arg(long, value_name = "N", help_heading = "Contexts")]
    pub history: Option<u64>,
    /// Tokens behind a history that are predicted [default: 32]
    #[arg(long, value_name = "H", help_heading = "Contexts")]
    pub horizon: Option<u64>,
    /// Entries of a working context [default: a quarter of the history]
    #[arg(long, value_name = "W", help_heading = "Contexts")]
    pub budget: Option<u64>,
    /// Newest tokens that stay tokens [default: 32]
    #[arg(long, value_name = "N", help_heading = "Contexts")]
    pub protected: Option<u64>,
    /// Levels of gists above the tokens [default: 2]
    #[arg(long, value_name = "N", help_heading = "Contexts")]
    pub levels: Option<u64>,
    /// Blocks of the transformer [default: 2]
    #[arg(long, value_name = "N", help_heading = "Network")]
    pub layers: Option<u64>,
    /// What an entry passes last: mlp or linear [default: mlp]
    #[arg(long, value_name = "NAME", help_heading = "Network")]
    pub head: Option<String>,
    /// transformer, or dual, whose entries and newest gists look at each other [default: transformer]
    #[arg(long, value_name = "NAME", help_heading = "Network")]
    pub kind: Option<String>,
    /// Shifted sparse attention in groups of so many entries
    #[arg(long, value_name = "G", help_heading = "Network")]
    pub group: Option<u64>,
    /// counterfactual (every edit of a context) or preference (several contexts) [default: counterfactual]
    #[arg(long, value_name = "NAME", help_heading = "Labels")]
    pub labels: Option<String>,
    /// Times that labels are made anew [default: 3]
    #[arg(long, value_name = "N", help_heading = "Labels")]
    pub rounds: Option<u64>,
    /// Histories measured in a round [default: 160]
    #[arg(long, value_name = "N", help_heading = "Labels")]
    pub label_histories: Option<u64>,
    /// Edits tried of a context, 0 for all [default: 0]
    #[arg(long, value_name = "N", help_heading = "Labels")]
    pub label_edits: Option<u64>,
    /// Optimiser steps after each round of labels [default: 120]
    #[arg(long, value_name = "N", help_heading = "How")]
    pub steps: Option<u64>,
    /// Labels of a step [default: 8]
    #[arg(long, value_name = "N", help_heading = "How")]
    pub batch: Option<u64>,
    /// Peak learning rate [default: 1e-3]
    #[arg(long, value_name = "LR", help_heading = "How")]
    pub lr: Option<f64>,
    /// Precision of the base model: f32, mixed (f32 storage, bf16 products) or bf16 [default: f32]
    #[arg(long, value_name = "NAME", help_heading = "How")]
    pub dtype: Option<String>,
    /// Most memory to plan for, such as 8GB [default: what is free]
    #[arg(long, value_name = "SIZE", help_heading = "How")]
    pub memory: Option<String>,
    /// Held-out histories that the network is chosen by [default: 32]
    #[arg(long, value_name = "N", help_heading = "Validation")]
    pub validation_histories: Option<u64>,
    /// Other held-out histories, on which the chosen network is measured once [default: 32]
    #[arg(long, value_name = "N", help_heading = "Validation")]
    pub test_histories: Option<u64>,
    /// Steps between checkpoints [default: 60]
    #[arg(long, value_name = "N", help_heading = "Validation")]
    pub checkpoint_every: Option<u64>,
}
