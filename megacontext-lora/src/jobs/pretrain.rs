//! The job `pretrain`: a small model from nothing, on text that every machine with this toolchain has.
//!
//! It is how the embedded base model was made. The corpus ([`crate::corpus`]) is split by crate name; a byte-level BPE
//! is trained on a sample of the training side; the model is trained with the project's own decoder on packed
//! documents with dense attention; then its loss on held-out crates is compared with n-gram models of the same tokens.
//!
//! Units: tokens, nats per token. Errors: as the parts'.

use std::path::PathBuf;
use std::time::Instant;

use megacontext_base::config::LlamaConfig;
use megacontext_base::decoder::Decoder;
use megacontext_base::hf_export::write_model_dir;
use megacontext_base::params::Group;
use megacontext_base::rope::RopeScaling;
use megacontext_base::tokenizer::Tokenizer;
use megacontext_base::weights::Dtype;
use megacontext_kernels::attention::Pattern;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::corpus::{self, Split};
use crate::data::documents::tokenize;
use crate::data::packing::TokenStream;
use crate::error::{IoResultExt, PluginError, Result};
use crate::host::HostApi;
use crate::jobs::{model_error, parse, to_value};
use crate::ngram::Ngram;
use crate::train::config::{BatchConfig, OptimizerConfig, Schedule, StageConfig};
use crate::train::eval::{Protocol, perplexity, select};
use crate::train::plan::since;
use crate::train::trainer::Trainer;

/// What the job is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PretrainConfig {
    /// Folder of the finished model; must not exist.
    pub out: PathBuf,
    /// Vocabulary of the tokenizer.
    pub vocab_size: usize,
    /// E.
    pub hidden_size: usize,
    /// F.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// H.
    pub num_attention_heads: usize,
    /// G.
    pub num_key_value_heads: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Length of the training sequences in tokens.
    pub context: usize,
    /// Optimiser steps.
    pub steps: usize,
    /// Tokens of a step.
    pub tokens_per_step: usize,
    /// Peak learning rate of the cosine.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Stop after so many seconds even if steps are left; the schedule follows the clock then. 0 for no limit.
    pub seconds: f64,
    /// Seed.
    pub seed: u64,
    /// Threads; none means all.
    pub threads: Option<usize>,
}

impl Default for PretrainConfig {
    fn default() -> Self {
        Self {
            out: PathBuf::from("runs/pretrain"),
            vocab_size: 4096,
            hidden_size: 256,
            intermediate_size: 688,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            rope_theta: 10_000.0,
            context: 256,
            steps: 1500,
            tokens_per_step: 8192,
            lr: 2e-3,
            weight_decay: 0.1,
            seconds: 0.0,
            seed: 0,
            threads: None,
        }
    }
}

/// Runs the job.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let config: PretrainConfig = parse(params)?;
    super::with_threads(config.threads, || pretrain(&config, host))?
}

fn model_config(c: &PretrainConfig) -> Result<LlamaConfig> {
    let value = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": c.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": true,
        "attention_bias": false,
        "mlp_bias": false,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    });
    LlamaConfig::from_json(&value, &c.out.join("config.json")).map_err(|e| PluginError::usage(e.to_string()))
}

fn pretrain(c: &PretrainConfig, host: &dyn HostApi) -> Result<Value> {
    let say = |message: String| host.event("log", &json!({ "message": message }));
    let model = model_config(c)?;
    if c.out.exists() {
        return Err(PluginError::usage(format!("out: expected a new folder, {} exists", c.out.display())));
    }
    let roots = corpus::Roots::find();
    let training = corpus::discover(Split::Pretrain, &roots);
    let held_out = corpus::discover(Split::HeldOut, &roots);
    say(format!("training text: {}", training.provenance));
    say(format!("held-out text: {}", held_out.provenance));
    let (training, held_out) = (training.documents, held_out.documents);

    let work = tempfile::tempdir().at(std::env::temp_dir())?;
    say(format!("training a byte-level BPE of {} entries", c.vocab_size));
    crate::bpe::train(&training, c.vocab_size, c.seed, work.path())?;
    let tokenizer = Tokenizer::from_dir(work.path()).map_err(model_error)?;
    let encode = |text: &str| tokenizer.encode(text).unwrap_or_default();
    let eos = tokenizer.eos_id().ok_or_else(|| PluginError::internal("the new tokenizer has no eos"))?;
    let stream = TokenStream::join(&tokenize(&training, &encode), eos).tokens;
    let held_out = tokenize(&held_out, &encode);
    say(format!(
        "{} training tokens, {} held out",
        stream.len(),
        held_out.iter().map(Vec::len).sum::<usize>()
    ));

    let decoder = Decoder::random(model.clone(), c.seed).map_err(model_error)?;
    let stage = |steps| StageConfig {
        context: c.context,
        attention: crate::train::config::Attention::Dense,
        group: crate::train::config::GroupSize::Part(1.0),
        factor: None,
        steps,
    };
    let settings = OptimizerConfig {
        lr: c.lr,
        schedule: Schedule::Cosine,
        warmup_steps: 100,
        weight_decay: c.weight_decay,
        ..Default::default()
    };
    let batch =
        BatchConfig { tokens_per_step: c.tokens_per_step, micro_batch_tokens: c.tokens_per_step.min(8192) };
    let mut trainer = Trainer::new(
        decoder,
        &[Group::Base, Group::Embeddings, Group::Norms],
        settings,
        batch,
        vec![stage(c.steps)],
        stream,
        c.seed,
        false,
    )?;
    let start = Instant::now();
    let mut smooth = f64::NAN;
    while trainer.step_count() < c.steps {
        if host.cancelled() {
            return Err(PluginError::cancelled("the host asked to stop; nothing was written"));
        }
        let report = trainer.step()?;
        smooth = if smooth.is_nan() { report.loss } else { 0.95 * smooth + 0.05 * report.loss };
        let seconds = since(start);
        host.event(
            "progress",
            &json!({
                "job": "pretrain", "stage": 1, "stages": 1, "step": report.step, "steps": c.steps,
                "loss": smooth, "lr": report.lr, "context": c.context,
                "tokens_per_s": (report.step * report.tokens) as f64 / seconds,
                "eta_s": seconds / report.step as f64 * (c.steps - report.step) as f64,
            }),
        );
        if c.seconds > 0.0 && seconds > c.seconds {
            say(format!("stopping after {seconds:.0} s at step {}", report.step));
            break;
        }
    }
    let steps = trainer.step_count();
    let seen = steps * c.tokens_per_step;
    let seconds = since(start);

    say("measuring held-out loss against n-grams of the same tokens".to_string());
    let scored = select(&held_out, c.context, 200_000);
    let protocol =
        Protocol { context: c.context, stride: None, pattern: Pattern::Dense, scaling: RopeScaling::None };
    let ours = perplexity(&trainer.decoder, &scored, &protocol, host)?;
    let (decoder, stream) = trainer.into_parts();
    let unigram = Ngram::train(&stream, 1, c.vocab_size)?.nll_per_token(&scored);
    let five = Ngram::train(&stream, 5, c.vocab_size)?.nll_per_token(&scored);
    let tensors =
        model.tensors().into_iter().filter_map(|(name, _)| decoder.params().get(&name).map(|t| (name, t)));
    write_model_dir(&c.out, &model, tensors, Dtype::BF16, Some(work.path())).map_err(model_error)?;
    to_value(json!({
        "model": c.out,
        "parameters": decoder.params().count_by_group().values().sum::<usize>(),
        "steps": steps,
        "tokens_seen": seen,
        "tokens_available": stream.len(),
        "seconds": seconds,
        "held_out": {
            "tokens": ours.tokens,
            "model_nll": ours.nll,
            "model_perplexity": ours.perplexity,
            "unigram_nll": unigram,
            "five_gram_nll": five,
        },
        "config": to_value(c)?,
    }))
}
