//! The command line. What a setting means and which values it takes is decided by the plugin; here are only their names,
//! so a flag that was not given is absent, and the default shown in its help is the plugin's.

use crate::args_cycle::Train;
use crate::args_gist::EvalGist;
use crate::bench::BenchCommand;
use crate::lora::LoraFlags;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Grow the context of a language model with LoRA (LongLoRA style), measure it, merge it.
///
/// Without a command it runs `quickstart`: a small model that comes with the program learns to read four times as much
/// text as it was trained for, in a few minutes on a CPU.
#[derive(Debug, Parser)]
#[command(
    name = "mclora",
    version,
    max_term_width = 110,
    after_help = "Examples:
  mclora                                          the small model, 256 to 1024 tokens, with a report
  mclora extend --base DIR --data docs/ --context 8192 --out runs/mine
  mclora eval ppl --base DIR --adapter runs/mine/adapter --data held-out.txt --contexts 2048,8192
  mclora eval passkey --base DIR --adapter runs/mine/adapter --lengths 2048,8192 --out runs/passkey
  mclora merge --base DIR --adapter runs/mine/adapter --out merged/
  mclora export --format lora-only --base DIR --adapter runs/mine/adapter --out exported/
  mclora rope --base DIR --scaling yarn --factor 8 --plot bands.svg
  mclora bench attention --n 2048,8192 --threads 2

Exit codes: 0 done, 2 a wrong flag or setting, 130 interrupted, 1 anything else."
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Flags of every command.
#[derive(Debug, Clone, Default, Args)]
pub struct Global {
    /// The plugin to load. Default: the library beside this program
    #[arg(long, global = true, value_name = "FILE")]
    pub plugin: Option<PathBuf>,
    /// Print the result as one JSON object on stdout, and events as JSON lines on stderr
    #[arg(long, global = true)]
    pub json: bool,
    /// Worker threads of quickstart, extend, sweep, pretrain, eval, generate and bench. Default: all cores
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<u64>,
    /// What the model's passes run on, of commands that run a model: cpu, cuda or cuda:N (a GPU; a build with CUDA) or auto (the
    /// first GPU that can be used, else the processor) [default: auto]
    #[arg(long, global = true, value_name = "NAME")]
    pub device: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// See it work: extend the small model that comes with the program
    Quickstart(Quickstart),
    /// Extend the context of a model: train a LoRA adapter in stages, write it with a report
    Extend(Box<Extend>),
    /// Which LoRA rank: a short run for each of several, compared on held-out text
    Sweep(Box<Sweep>),
    /// Alternating optimisation of GistNet, LensNet and LoRA, or one network beside a frozen base model
    Train(Box<Train>),
    /// Measure a model
    #[command(subcommand)]
    Eval(EvalCommand),
    /// Continue a text
    Generate(Generate),
    /// Fold an adapter into its base: a model folder that needs no adapter
    Merge(Merge),
    /// Write an adapter for readers that take LoRA factors alone: vLLM, llama.cpp
    Export(Export),
    /// Write the logits of given tokens, to compare with another implementation
    Logits(Logits),
    /// Show a model's rotary bands, before and after a scaling
    Rope(Rope),
    /// Train a small model from nothing, on the Rust sources and documentation of this machine
    Pretrain(Pretrain),
    /// Show finished runs side by side: what they came to, and which settings differ
    Report(Report),
    /// Measure this machine: kernels, training steps, loading; one JSON line each
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Look at a plugin
    #[command(subcommand)]
    Plugin(PluginCommand),
}

impl Command {
    /// Does it run passes of a model, so that `--device` has a meaning?
    pub fn has_passes(&self) -> bool {
        match self {
            Self::Quickstart(_)
            | Self::Extend(_)
            | Self::Sweep(_)
            | Self::Train(_)
            | Self::Eval(_)
            | Self::Generate(_)
            | Self::Logits(_)
            | Self::Pretrain(_) => true,
            Self::Bench(command) => command.has_passes(),
            Self::Merge(_) | Self::Export(_) | Self::Rope(_) | Self::Report(_) | Self::Plugin(_) => false,
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum EvalCommand {
    /// Perplexity by context length, every token scored once
    Ppl(EvalPpl),
    /// How often a number hidden in a long text is found, by length and depth
    Passkey(EvalPasskey),
    /// What sparse attention costs a model that is used with dense attention, by length
    Gap(EvalGap),
    /// What a GistNet costs the base model, beside everything else that could stand for a block
    Gist(EvalGist),
}

#[derive(Debug, Subcommand)]
pub enum PluginCommand {
    /// Check a plugin as loading does, and say what it is
    Check(PluginCheck),
}

/// See it work: the small model that comes with the program (trained on 256 tokens) learns to use 1024.
///
/// The text is found on this machine: sources and documentation that the model never saw.
#[derive(Debug, Clone, Default, Args)]
#[command(after_help = "Example:
  mclora quickstart --out runs/first && xdg-open runs/first/run/report.html")]
pub struct Quickstart {
    /// The same in well under a minute, with too few steps to learn much
    #[arg(long)]
    pub smoke: bool,
    /// Folder for the model and the run. Default: runs/quickstart, or the next free name beside it
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Take up an interrupted run in that folder
    #[arg(long)]
    pub resume: bool,
    /// How positions are stretched: linear, ntk, dynamic, yarn or llama3 [default: linear]
    #[arg(long, value_name = "NAME")]
    pub scaling: Option<String>,
    /// Precision: f32, mixed (products in bf16) or bf16 (frozen weights and activations too) [default: mixed]
    #[arg(long, value_name = "NAME")]
    pub dtype: Option<String>,
}

/// Extend the context of a model.
///
/// The model is a Hugging Face folder of a decoder (llama, mistral, qwen2, qwen3, smollm3, gpt_neox, gemma3_text or
/// nanochat by its `model_type`). Settings come from the flags, before them from --config, before
/// that from the defaults. The resolved settings are written to config.toml in the run folder.
#[derive(Debug, Clone, Default, Args)]
#[command(after_help = "Examples:
  mclora extend --base models/small --data 'docs/**/*.md' --context 8192
  mclora extend --base models/small --data corpus.jsonl --context 8192 --rank 16 --lr 1e-4 \\
      --stages 4096:200,8192:200 --out runs/mine
  mclora extend --config runs/mine/config.toml --seed 1 --out runs/again
  mclora extend --resume --out runs/mine")]
pub struct Extend {
    /// Model folder: config.json, model.safetensors (or shards), tokenizer.json
    #[arg(long, value_name = "DIR", help_heading = "What")]
    pub base: Option<PathBuf>,
    /// Text to train on: files, folders, globs (text, markdown, source, JSONL with a text field); corpus:held-out is
    /// what the quickstart uses
    #[arg(long, value_name = "PATH", num_args = 1.., help_heading = "What")]
    pub data: Vec<String>,
    /// Context to reach, in tokens
    #[arg(long, value_name = "N", help_heading = "What")]
    pub context: Option<u64>,
    /// Run folder, absent or empty [default: runs/extend]
    #[arg(long, value_name = "DIR", help_heading = "What")]
    pub out: Option<PathBuf>,
    /// Settings from a TOML file; flags go over them, and --context or --steps without --stages replace the file's stages
    /// by default ones
    #[arg(long, value_name = "FILE", help_heading = "What")]
    pub config: Option<PathBuf>,
    /// Take up an interrupted run in the run folder, with the settings found there
    #[arg(long, help_heading = "What")]
    pub resume: bool,
    /// Seed of initial values, data order and hold-out [default: 0]
    #[arg(long, value_name = "N", help_heading = "What")]
    pub seed: Option<u64>,
    /// Share of the documents held out for evaluation [default: 0.1]
    #[arg(long, value_name = "SHARE", help_heading = "What")]
    pub holdout: Option<f64>,

    #[command(flatten)]
    pub lora: LoraFlags,
    /// What of the embeddings learns: frozen, lora, full or new-tokens; the plan says what each costs [default: full]
    #[arg(long, value_name = "NAME", conflicts_with = "freeze_embeddings", help_heading = "What learns")]
    pub embeddings: Option<String>,
    /// Tokens whose rows learn under --embeddings new-tokens
    #[arg(long, value_name = "IDS", value_delimiter = ',', help_heading = "What learns")]
    pub new_tokens: Vec<u64>,
    /// Leave the token embeddings as they are: --embeddings frozen
    #[arg(long, help_heading = "What learns")]
    pub freeze_embeddings: bool,
    /// Leave the norms as they are
    #[arg(long, help_heading = "What learns")]
    pub freeze_norms: bool,

    /// Stages separated by commas, each CONTEXT:STEPS, then :s2 or :dense, then :GROUP if wanted; GROUP in tokens, or a part
    /// of the context such as 0.25 [default: the context doubles until it is reached]
    #[arg(long, value_name = "LIST", help_heading = "How")]
    pub stages: Option<String>,
    /// How positions are stretched: linear, ntk, dynamic, yarn, longrope or llama3, or a JSON object as in rope_scaling of a
    /// config.json [default: the model's own kind, or linear]
    #[arg(long, value_name = "NAME", help_heading = "How")]
    pub scaling: Option<String>,
    /// Stretch from the original context, in every stage [default: the stage's context / the original context; 1 for dynamic,
    /// which looks at the length itself]
    #[arg(long, value_name = "F", help_heading = "How")]
    pub factor: Option<f64>,
    /// Optimiser steps, shared out over the default stages [default: 300]
    #[arg(long, value_name = "N", help_heading = "How")]
    pub steps: Option<u64>,
    /// Peak learning rate [default: 2e-4]
    #[arg(long, value_name = "LR", help_heading = "How")]
    pub lr: Option<f64>,
    /// constant or cosine [default: constant]
    #[arg(long, value_name = "NAME", help_heading = "How")]
    pub schedule: Option<String>,
    /// Steps of warm-up at the start of every stage [default: 20]
    #[arg(long, value_name = "N", help_heading = "How")]
    pub warmup: Option<u64>,
    /// LoRA+: the learning rate of LoRA's B in learning rates of everything else [default: 1]
    #[arg(long, value_name = "RATIO", help_heading = "How")]
    pub lora_plus_lr_ratio: Option<f64>,
    /// Weight decay; never on norms, biases and embeddings [default: 0]
    #[arg(long, value_name = "W", help_heading = "How")]
    pub weight_decay: Option<f64>,
    /// Largest gradient norm, 0 for no clipping [default: 1]
    #[arg(long, value_name = "NORM", help_heading = "How")]
    pub clip: Option<f64>,
    /// Tokens of an optimiser step [default: 8192]
    #[arg(long, value_name = "N", help_heading = "How")]
    pub tokens_per_step: Option<u64>,
    /// Tokens in memory at once [default: 8192]
    #[arg(long, value_name = "N", help_heading = "How")]
    pub micro_batch_tokens: Option<u64>,
    /// Precision: f32; mixed, with products in bf16; bf16, with frozen weights and activations stored in it too. What
    /// learns and all sums are f32 in each [default: f32]
    #[arg(long, value_name = "NAME", help_heading = "How")]
    pub dtype: Option<String>,
    /// Recompute blocks in the backward pass: auto, on, off [default: auto]
    #[arg(long, value_name = "WHEN", help_heading = "How")]
    pub activation_checkpointing: Option<String>,
    /// Refuse to use more memory than this: bytes, or a number with MB, GB, MiB, GiB [default: what is free]
    #[arg(long, value_name = "SIZE", help_heading = "How")]
    pub memory: Option<String>,

    /// Context lengths to evaluate at [default: the original one and its doublings]
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "Evaluation and checkpoints")]
    pub eval_contexts: Vec<u64>,
    /// Tokens by which the evaluation's window moves [default: half the context]
    #[arg(long, value_name = "N", help_heading = "Evaluation and checkpoints")]
    pub eval_stride: Option<u64>,
    /// Tokens to score [default: 65536]
    #[arg(long, value_name = "N", help_heading = "Evaluation and checkpoints")]
    pub eval_tokens: Option<u64>,
    /// Steps between two checkpoints [default: 50]
    #[arg(long, value_name = "N", help_heading = "Evaluation and checkpoints")]
    pub checkpoint_every: Option<u64>,
    /// Checkpoints to keep [default: 2]
    #[arg(long, value_name = "N", help_heading = "Evaluation and checkpoints")]
    pub checkpoint_keep: Option<u64>,
}

/// Which LoRA rank.
///
/// A short run of `extend` for each rank, all with the same text, seed and steps, and alpha in proportion to the rank. It takes
/// the smallest rank whose held-out loss cannot be told from the best one's: the margin is one standard error of their
/// difference over the evaluated documents. Every setting of extend is one here. Without --base it is the small model that
/// comes with the program, as in quickstart.
#[derive(Debug, Clone, Default, Args)]
#[command(after_help = "Examples:
  mclora sweep
  mclora sweep --base models/small --data 'docs/**/*.md' --context 8192 --ranks 4,8,16,32 --budget-steps 400
  mclora sweep --base models/small --data corpus.jsonl --context 8192 --budget-seconds 3600 --out runs/ranks
  mclora sweep --resume --out runs/ranks")]
pub struct Sweep {
    /// Ranks to try [default: 4,8,16,32]
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "Sweep")]
    pub ranks: Vec<u64>,
    /// Optimiser steps of all ranks together, shared equally [default: 60 for each rank]
    #[arg(long, value_name = "N", help_heading = "Sweep")]
    pub budget_steps: Option<u64>,
    /// Seconds of all ranks together, about: the plan's estimate makes steps of them
    #[arg(long, value_name = "S", help_heading = "Sweep")]
    pub budget_seconds: Option<f64>,
    /// LoRA strength, alpha / rank, the same for all [default: 2]
    #[arg(long, value_name = "S", help_heading = "Sweep")]
    pub scale: Option<f64>,
    #[command(flatten)]
    pub extend: Extend,
}

/// How a model is used.
#[derive(Debug, Clone, Default, Args)]
pub struct Used {
    /// Adapter folder (PEFT)
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// How positions are stretched: linear, ntk, dynamic, yarn, longrope or llama3, or a JSON object as in rope_scaling of a
    /// config.json [default: as the adapter, or the model, says]
    #[arg(long, value_name = "NAME")]
    pub scaling: Option<String>,
    /// Stretch from the original context [default: as the adapter, or the model, says; with --scaling alone that of the
    /// longest context]
    #[arg(long, value_name = "F")]
    pub factor: Option<f64>,
    /// Precision: f32, mixed (products in bf16) or bf16 (storage too) [default: f32]
    #[arg(long, value_name = "NAME")]
    pub dtype: Option<String>,
}

/// The model of an evaluation, and where its results go.
#[derive(Debug, Clone, Default, Args)]
pub struct Evaluated {
    /// Model folder
    #[arg(long, value_name = "DIR", required_unless_present = "resume")]
    pub base: Option<PathBuf>,
    #[command(flatten)]
    pub used: Used,
    /// Folder for results and a report, absent or empty [default: nothing is written]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Take up the interrupted evaluation in the folder, with the settings found there
    #[arg(long, requires = "out")]
    pub resume: bool,
}

/// The text that perplexity is measured on.
#[derive(Debug, Clone, Default, Args)]
pub struct Scored {
    /// Text to score: files, folders, globs
    #[arg(long, value_name = "PATH", num_args = 1.., required_unless_present = "resume")]
    pub data: Vec<String>,
    /// Context lengths in tokens
    #[arg(long, value_name = "LIST", value_delimiter = ',', required_unless_present = "resume")]
    pub contexts: Vec<u64>,
    /// Tokens by which the window moves [default: half the context]
    #[arg(long, value_name = "N")]
    pub stride: Option<u64>,
    /// Stop after about so many tokens [default: 65536]
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u64>,
    /// Seed of which documents are scored [default: 0]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

/// Perplexity by context length.
///
/// A window of the context's length moves over every document; each token is scored once, in the first window that
/// reaches it. Every length scores the same tokens. Attention is dense unless asked otherwise.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  mclora eval ppl --base models/small --data book.txt --contexts 2048,4096,8192
  mclora eval ppl --base models/small --adapter runs/mine/adapter --data 'held-out/*.txt' --contexts 8192 --json
  mclora eval ppl --resume --out runs/ppl")]
pub struct EvalPpl {
    #[command(flatten)]
    pub of: Evaluated,
    #[command(flatten)]
    pub text: Scored,
    /// dense, or s2 as in training [default: dense]
    #[arg(long, value_name = "NAME")]
    pub attention: Option<String>,
    /// Group of s2: tokens, or a part of the context [default: 0.25]
    #[arg(long, value_name = "G")]
    pub group: Option<String>,
}

/// Sparse against dense attention by context length.
///
/// Perplexity of the same weights on the same tokens with shifted sparse attention, as in training, and with dense
/// attention, as in use.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:
  mclora eval gap --base models/small --adapter runs/mine/adapter --data book.txt --contexts 2048,8192 --out runs/gap")]
pub struct EvalGap {
    #[command(flatten)]
    pub of: Evaluated,
    #[command(flatten)]
    pub text: Scored,
    /// Group of the sparse attention: tokens, or a part of the context [default: 0.25]
    #[arg(long, value_name = "G")]
    pub group: Option<String>,
}

/// Passkey retrieval by length and depth.
///
/// A number is stated in one line of a long text, and asked for at its end; right is an answer whose digits are the
/// number's. Prompt and answer come to exactly the length. Keys and texts are drawn by seed, length, depth and trial.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  mclora eval passkey --base models/small --lengths 1024,2048,4096
  mclora eval passkey --base models/small --adapter runs/mine/adapter --lengths 8192,16384,32768 \\
      --depths 0,0.1,0.5,0.9,1 --trials 10 --dtype bf16 --out runs/passkey
  mclora eval passkey --resume --out runs/passkey")]
pub struct EvalPasskey {
    #[command(flatten)]
    pub of: Evaluated,
    /// Lengths of prompt and answer in tokens
    #[arg(long, value_name = "LIST", value_delimiter = ',', required_unless_present = "resume")]
    pub lengths: Vec<u64>,
    /// Where the key stands: 0 at the beginning, 1 at the end [default: 0,0.25,0.5,0.75,1]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub depths: Vec<f64>,
    /// Prompts of each length and depth [default: 5]
    #[arg(long, value_name = "N")]
    pub trials: Option<u64>,
    /// Seed of keys and texts [default: 0]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Prompts that run together [default: as many as come to 16384 tokens]
    #[arg(long, value_name = "N")]
    pub batch: Option<u64>,
}

/// Continue a text.
///
/// Greedy unless a temperature is given. Ends at the model's end token, or after --max-new-tokens.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  mclora generate --base models/small --prompt 'Once upon a time' --max-new-tokens 50
  mclora generate --base models/small --adapter runs/mine/adapter --prompt-file book.txt --temperature 0.8 --top-p 0.95")]
pub struct Generate {
    /// Model folder
    #[arg(long, value_name = "DIR")]
    pub base: PathBuf,
    #[command(flatten)]
    pub used: Used,
    /// Text to continue; given more than once, each is continued
    #[arg(long, value_name = "TEXT", required_unless_present = "prompt_file")]
    pub prompt: Vec<String>,
    /// File whose text is continued
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// Most tokens to make [default: 128]
    #[arg(long, value_name = "N")]
    pub max_new_tokens: Option<u64>,
    /// Draw tokens, at this temperature [default: the most likely one is taken]
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// Draw among the most likely tokens that have this share of the probability [default: 1]
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Seed of the draws [default: 0]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Go on past end tokens
    #[arg(long)]
    pub ignore_end: bool,
}

/// Fold an adapter into its base.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:
  mclora merge --base models/small --adapter runs/mine/adapter --out models/small-8k")]
pub struct Merge {
    /// Model folder
    #[arg(long, value_name = "DIR")]
    pub base: PathBuf,
    /// Adapter folder (PEFT)
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,
    /// Folder to write, absent or empty
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// f32, f16 or bf16; the short ones round the merged weights [default: f32]
    #[arg(long, value_name = "NAME")]
    pub dtype: Option<String>,
}

/// Write an adapter for readers that take LoRA factors alone.
///
/// lora-only writes two folders: OUT/base, a copy of the base with trained embeddings and norms put in and the scaling of
/// positions in its config.json, and OUT/adapter, a PEFT adapter for it without modules_to_save. gguf writes one file that
/// llama.cpp loads beside a converted base; an adapter with trained embeddings or norms goes through lora-only first.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  mclora export --format lora-only --base models/small --adapter runs/mine/adapter --out export
  mclora export --format gguf --base export/base --adapter export/adapter --out small.gguf")]
pub struct Export {
    /// lora-only or gguf
    #[arg(long, value_name = "NAME")]
    pub format: String,
    /// Model folder
    #[arg(long, value_name = "DIR")]
    pub base: PathBuf,
    /// Adapter folder (PEFT)
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,
    /// What to write: for lora-only a folder, absent or empty; for gguf a file that is not there
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// f32, f16 or bf16 (gguf: f32 or f16) [default: f32]
    #[arg(long, value_name = "NAME")]
    pub dtype: Option<String>,
}

/// Write the logits of given tokens.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:
  echo '[[1, 15, 27], [4, 8, 99]]' > tokens.json
  mclora logits --base models/small --tokens tokens.json --out logits.safetensors")]
pub struct Logits {
    /// Model folder
    #[arg(long, value_name = "DIR")]
    pub base: PathBuf,
    /// Adapter folder (PEFT)
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// JSON: a list of token ids, or a list of such lists of one length
    #[arg(long, value_name = "FILE")]
    pub tokens: PathBuf,
    /// The safetensors file to write: tokens [B, T] and logits [B, T, V]
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Precision: f32, mixed (products in bf16) or bf16 (storage too) [default: f32]
    #[arg(long, value_name = "NAME")]
    pub dtype: Option<String>,
}

/// Show a model's rotary bands: wavelengths before and after a scaling, and what is left of each band for entries that stand
/// for spans (MegaContext's gists). Needs config.json alone.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  mclora rope --base models/small
  mclora rope --base models/small --scaling yarn --factor 8 --plot bands.svg")]
pub struct Rope {
    /// Model folder
    #[arg(long, value_name = "DIR")]
    pub base: PathBuf,
    /// linear, ntk, dynamic, yarn, longrope or llama3, or a JSON object as in rope_scaling of a config.json [default: the
    /// model's own]
    #[arg(long, value_name = "NAME")]
    pub scaling: Option<String>,
    /// Stretch from the original context
    #[arg(long, value_name = "F")]
    pub factor: Option<f64>,
    /// Length of the sequence in tokens, which dynamic and longrope look at [default: original context * factor]
    #[arg(long, value_name = "N")]
    pub context: Option<u64>,
    /// Tokens that a gist stands for [default: 32]
    #[arg(long, value_name = "K")]
    pub block: Option<u64>,
    /// Take span / sqrt(12) as a span's spread instead of the span
    #[arg(long)]
    pub uniform: bool,
    /// Write a picture, SVG
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
}

/// Train a small model from nothing: tokenizer, Llama, comparison with n-gram models of the same tokens.
///
/// The model is written when training ends. Interrupted while it trains, it writes nothing and cannot be resumed; --seconds
/// ends it early with a model.
#[derive(Debug, Clone, Default, Args)]
#[command(after_help = "Example:
  mclora pretrain --out models/tiny --steps 2000")]
pub struct Pretrain {
    /// Folder of the finished model; must not exist [default: runs/pretrain]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Settings from a TOML file; flags go over them
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Entries of the tokenizer; above 4096 there is no comparison with n-gram models [default: 4096]
    #[arg(long, value_name = "N")]
    pub vocab_size: Option<u64>,
    /// Model width [default: 256]
    #[arg(long, value_name = "N")]
    pub hidden_size: Option<u64>,
    /// Width of the MLP [default: 688]
    #[arg(long, value_name = "N")]
    pub intermediate_size: Option<u64>,
    /// Blocks [default: 4]
    #[arg(long, value_name = "N")]
    pub layers: Option<u64>,
    /// Query heads [default: 4]
    #[arg(long, value_name = "N")]
    pub heads: Option<u64>,
    /// Key and value heads [default: 2]
    #[arg(long, value_name = "N")]
    pub kv_heads: Option<u64>,
    /// Base of the rotary frequencies [default: 10000]
    #[arg(long, value_name = "THETA")]
    pub rope_theta: Option<f64>,
    /// Length of the training sequences in tokens [default: 256]
    #[arg(long, value_name = "N")]
    pub context: Option<u64>,
    /// Optimiser steps [default: 1500]
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Tokens of a step [default: 8192]
    #[arg(long, value_name = "N")]
    pub tokens_per_step: Option<u64>,
    /// Peak learning rate of the cosine [default: 2e-3]
    #[arg(long, value_name = "LR")]
    pub lr: Option<f64>,
    /// Weight decay [default: 0.1]
    #[arg(long, value_name = "W")]
    pub weight_decay: Option<f64>,
    /// Stop after so many seconds; the learning rate follows the steps all the same [default: no limit]
    #[arg(long, value_name = "S")]
    pub seconds: Option<f64>,
    /// Seed [default: 0]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Precision: f32, mixed (products in bf16) or bf16 (activations too; weights learn and stay f32) [default: f32]
    #[arg(long, value_name = "NAME")]
    pub dtype: Option<String>,
}

/// Check a plugin as loading does, and say what it is.
#[derive(Debug, Clone, Args)]
pub struct PluginCheck {
    /// The library. Default: the one that the other commands would load
    pub path: Option<PathBuf>,
    /// Insist on this SHA-256
    #[arg(long, value_name = "HEX")]
    pub sha256: Option<String>,
    /// If it is refused for its types, print the layout checker's findings too
    #[arg(long)]
    pub details: bool,
}

/// Show finished runs side by side: what they came to, and which of their settings differ.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Example:
  mclora report runs/quickstart runs/mine --out compare.html")]
pub struct Report {
    /// Run folders, or folders of runs such as a quickstart's
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,
    /// Write a page besides
    #[arg(long, value_name = "FILE.html")]
    pub out: Option<PathBuf>,
}
