//! The job `pretrain`: a small model from nothing, on text that every machine with this toolchain has.
//!
//! It is how the embedded base model was made. The corpus ([`crate::corpus`]) is split by crate name; a byte-level BPE
//! is trained on a sample of the training side; the model is trained with the project's own decoder on packed
//! documents with dense attention and written; then its loss on held-out crates is compared with n-gram models of the
//! same tokens. The n-gram models hold 12 bits per token: beyond a vocabulary of [`MAX_VOCABULARY`] their losses are null.
//!
//! What can be refused is refused before the first step: settings, the folder, text too short. There are no checkpoints:
//! a job that the host stops while it trains writes nothing. Stopped later, or failing while it measures, it leaves the
//! finished model, and the error says so.
//!
//! Units: tokens, nats per token, seconds. Errors: [`Kind::Usage`] for a setting out of range or a folder that exists;
//! [`Kind::Data`] where the machine has too little text; [`Kind::Cancelled`]; otherwise as the parts'.
//!
//! [`Kind::Usage`]: crate::error::Kind::Usage
//! [`Kind::Data`]: crate::error::Kind::Data
//! [`Kind::Cancelled`]: crate::error::Kind::Cancelled

use std::path::{Path, PathBuf};
use std::time::Instant;

use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::Decoder;
use megacontext_base::device::DeviceChoice;
use megacontext_base::hf_export::write_model_dir;
use megacontext_base::params::Group;
use megacontext_base::rope::RopeScaling;
use megacontext_base::tokenizer::Tokenizer;
use megacontext_base::weights::Dtype;
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::precision::Precision;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::bpe::SMALLEST_VOCABULARY;
use crate::corpus::{self, Roots, Split};
use crate::data::documents::tokenize;
use crate::data::packing::TokenStream;
use crate::error::{IoResultExt, PluginError, Result};
use crate::host::HostApi;
use crate::jobs::device::OnDevice;
use crate::jobs::{model_error, parse, to_value};
use crate::ngram::{MAX_VOCABULARY, Ngram};
use crate::train::config::{BatchConfig, LONGEST_CONTEXT, OptimizerConfig, Schedule, StageConfig};
use crate::train::eval::{Protocol, batch_rows, perplexity, select};
use crate::train::plan::{Load, check_training, resident_bytes, since};
use crate::train::trainer::Trainer;

/// Most steps, and most tokens of a step: far beyond any run, and no product of sizes overflows.
const MOST: usize = 1 << 32;
/// How many held-out tokens are scored, about.
const SCORED_TOKENS: usize = 200_000;
/// Steps of linear warm-up.
const WARMUP_STEPS: usize = 100;

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
    /// Stop after so many seconds even if steps are left, 0 for no limit. The learning rate follows the steps, not the
    /// clock: a run that ends early ends before its rate has fallen.
    pub seconds: f64,
    /// Seed.
    pub seed: u64,
    /// Precision class; everything learns, so all weights stay f32 and `bf16` is about activations alone.
    pub dtype: Precision,
    /// Threads; none means all.
    pub threads: Option<usize>,
    /// What passes run on: `cpu`, `cuda:N`, or `auto`.
    pub device: DeviceChoice,
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
            dtype: Precision::F32,
            threads: None,
            device: DeviceChoice::Auto,
        }
    }
}

impl PretrainConfig {
    /// What the optimiser is told.
    fn optimizer(&self) -> OptimizerConfig {
        OptimizerConfig {
            lr: self.lr,
            schedule: Schedule::Cosine,
            warmup_steps: WARMUP_STEPS,
            weight_decay: self.weight_decay,
            ..Default::default()
        }
    }

    /// Refuses values out of range, by key.
    pub fn validate(&self) -> Result<()> {
        let usage = |message: String| Err(PluginError::usage(message));
        if self.out.as_os_str().is_empty() {
            return usage("out: expected a folder, got none".to_string());
        }
        for (key, value, least, most) in [
            ("vocab_size", self.vocab_size, SMALLEST_VOCABULARY, LONGEST_CONTEXT),
            ("hidden_size", self.hidden_size, 1, LONGEST_CONTEXT),
            ("intermediate_size", self.intermediate_size, 1, LONGEST_CONTEXT),
            ("num_hidden_layers", self.num_hidden_layers, 1, LONGEST_CONTEXT),
            ("num_attention_heads", self.num_attention_heads, 1, LONGEST_CONTEXT),
            ("num_key_value_heads", self.num_key_value_heads, 1, LONGEST_CONTEXT),
            ("context", self.context, 2, LONGEST_CONTEXT),
            ("steps", self.steps, 1, MOST),
            ("tokens_per_step", self.tokens_per_step, 1, MOST),
        ] {
            if !(least..=most).contains(&value) {
                return usage(format!("{key}: expected {least} to {most}, got {value}"));
            }
        }
        if !self.seconds.is_finite() || self.seconds < 0.0 {
            return usage(format!("seconds: expected 0 (no limit) or more, got {}", self.seconds));
        }
        // The optimiser's settings stand at the top level here.
        self.optimizer().validate().map_err(|mut error| {
            error.message = error.message.trim_start_matches("optimizer.").to_string();
            error
        })
    }
}

/// Runs the job.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let config: PretrainConfig = parse(params)?;
    super::with_threads(config.threads, || pretrain(&config, &Roots::find(), host))?
}

fn model_config(c: &PretrainConfig) -> Result<DecoderConfig> {
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
    DecoderConfig::from_json(&value, &c.out.join("config.json"))
        .map_err(|e| PluginError::usage(e.to_string()))
}

/// Refuses a folder that exists or cannot be made, before hours go into what belongs there.
fn check_out(out: &Path) -> Result<()> {
    if out.exists() {
        return Err(PluginError::usage(format!("out: expected a new folder, {} exists", out.display())));
    }
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).at(parent)?;
    tempfile::tempfile_in(parent).at(parent)?;
    Ok(())
}

/// Held-out loss of an n-gram model of the same tokens, nats per token; none beyond the vocabulary that it can count.
fn baseline(stream: &[u32], order: usize, vocabulary: usize, scored: &[Vec<u32>]) -> Result<Option<f64>> {
    if vocabulary > MAX_VOCABULARY {
        return Ok(None);
    }
    Ok(Some(Ngram::train(stream, order, vocabulary)?.nll_per_token(scored)))
}

/// The job, on the text below `roots`.
fn pretrain(c: &PretrainConfig, roots: &Roots, host: &dyn HostApi) -> Result<Value> {
    let say = |message: String| host.event("log", &json!({ "message": message }));
    c.validate()?;
    let model = model_config(c)?;
    check_out(&c.out)?;
    let on = OnDevice::open(c.device, host)?.running(&model, host)?;
    let training = corpus::discover(Split::Pretrain, roots);
    let held_out = corpus::discover(Split::HeldOut, roots);
    let (training_text, held_out_text) = (training.provenance.to_string(), held_out.provenance.to_string());
    say(format!("training text: {training_text}"));
    say(format!("held-out text: {held_out_text}"));
    for (side, found) in [("training", &training), ("held-out", &held_out)] {
        if found.documents.is_empty() {
            return Err(PluginError::data(format!(
                "{side} text: expected crates in the cargo registry or the toolchain's documentation on this machine, \
                 got {}",
                found.provenance
            )));
        }
    }

    let work = tempfile::tempdir().at(std::env::temp_dir())?;
    say(format!("training a byte-level BPE of {} entries", c.vocab_size));
    crate::bpe::train(&training.documents, c.vocab_size, c.seed, work.path())?;
    let tokenizer = Tokenizer::from_dir(work.path()).map_err(model_error)?;
    let encode = |text: &str| tokenizer.encode(text).map_err(model_error);
    let eos = tokenizer.eos_id().ok_or_else(|| PluginError::internal("the new tokenizer has no eos"))?;
    let stream = TokenStream::join(&tokenize(&training.documents, &encode)?, eos).tokens;
    let held_out = tokenize(&held_out.documents, &encode)?;
    let held_out_tokens: usize = held_out.iter().map(Vec::len).sum();
    say(format!("{} training tokens, {held_out_tokens} held out", stream.len()));
    let scored = select(&held_out, c.context, SCORED_TOKENS, 0);
    if scored.is_empty() {
        return Err(PluginError::data(format!(
            "held-out text: expected a document of at least 2 tokens, got {held_out_tokens} tokens in {} documents",
            held_out.len()
        )));
    }
    drop(held_out);

    let groups = [Group::Base, Group::Embeddings, Group::Norms];
    let batch =
        BatchConfig { tokens_per_step: c.tokens_per_step, micro_batch_tokens: c.tokens_per_step.min(8192) };
    let load = Load {
        model: &model,
        lora: None,
        learning: &groups,
        dtype: c.dtype,
        entries: batch.shape(c.context).0 * c.context,
        context: c.context,
        evaluated: batch_rows(c.context) * c.context,
        data_tokens: 0,
        program: resident_bytes().unwrap_or(0),
        on_gpu: !on.device().is_cpu(),
    };
    check_training(&load, on.device())?;
    let mut decoder = Decoder::random(model.clone(), c.seed, c.dtype, &groups).map_err(model_error)?;
    on.take(&mut decoder)?;
    let stage = StageConfig {
        context: c.context,
        attention: crate::train::config::Attention::Dense,
        group: crate::train::config::GroupSize::Part(1.0),
        factor: None,
        scaling: None,
        steps: c.steps,
    };
    let mut trainer =
        Trainer::new(decoder, &groups, c.optimizer(), batch, vec![stage], stream, c.seed, false)?;
    say(format!(
        "training {} steps; there are no checkpoints: interrupted before the last step, nothing is written",
        c.steps
    ));
    let start = Instant::now();
    let (mut smooth, mut seen) = (f64::NAN, 0);
    while trainer.step_count() < c.steps {
        if host.cancelled() {
            return Err(PluginError::cancelled("the host asked to stop; nothing was written"));
        }
        let report = trainer.step()?;
        seen += report.tokens;
        smooth = if smooth.is_nan() { report.loss } else { 0.95 * smooth + 0.05 * report.loss };
        let seconds = since(start);
        host.event(
            "progress",
            &json!({
                "job": "pretrain", "stage": 1, "stages": 1, "step": report.step, "steps": c.steps,
                "loss": smooth, "lr": report.lr, "context": c.context,
                "tokens_per_s": seen as f64 / seconds,
                "eta_s": seconds / report.step as f64 * (c.steps - report.step) as f64,
            }),
        );
        if c.seconds > 0.0 && seconds > c.seconds {
            say(format!("stopping after {seconds:.0} s at step {}", report.step));
            break;
        }
    }
    let steps = trainer.step_count();
    let seconds = since(start);

    // The passes' memory goes with the trainer, before the evaluation makes its own.
    let (decoder, stream) = trainer.into_parts();
    decoder.params().bring_home().map_err(model_error)?;
    let tensors =
        model.tensors().into_iter().filter_map(|(name, _)| decoder.params().get(&name).map(|t| (name, t)));
    write_model_dir(&c.out, &model, tensors, Dtype::BF16, Some(work.path())).map_err(model_error)?;
    say(format!("the model is in {}", c.out.display()));

    say("measuring held-out loss against n-grams of the same tokens".to_string());
    let protocol =
        Protocol { context: c.context, stride: None, pattern: Pattern::Dense, scaling: RopeScaling::None };
    let measure = || {
        let ours = perplexity(&decoder, &scored, &protocol, host)?;
        let unigram = baseline(&stream, 1, c.vocab_size, &scored)?;
        let five = baseline(&stream, 5, c.vocab_size, &scored)?;
        Ok((ours, unigram, five))
    };
    let (ours, unigram, five) = measure().map_err(|error: PluginError| {
        error.context(format!("{}: the model is written; measuring it", c.out.display()))
    })?;
    to_value(json!({
        "model": c.out,
        "parameters": decoder.params().count_by_group().values().sum::<usize>(),
        "steps": steps,
        "tokens_seen": seen,
        "tokens_available": stream.len(),
        "seconds": seconds,
        "device": decoder.device().describe(),
        "training_text": training_text,
        "held_out_text": held_out_text,
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use megacontext_base::random::Random;

    use super::*;
    use crate::error::Kind;
    use crate::jobs::ModelDir;

    /// Counts steps; asks to stop after one of them, or when the model is about to be measured.
    #[derive(Default)]
    struct Host {
        steps: AtomicUsize,
        stop_at_step: Option<usize>,
        stop_when_measuring: bool,
        stopped: AtomicBool,
    }

    impl HostApi for Host {
        fn event(&self, kind: &str, json: &Value) {
            let message = json["message"].as_str().unwrap_or_default();
            if kind == "progress" {
                self.steps.fetch_add(1, Ordering::SeqCst);
            }
            if self.stop_at_step.is_some_and(|at| self.steps.load(Ordering::SeqCst) >= at)
                || self.stop_when_measuring && message.starts_with("measuring")
            {
                self.stopped.store(true, Ordering::SeqCst);
            }
        }

        fn cancelled(&self) -> bool {
            self.stopped.load(Ordering::SeqCst)
        }
    }

    /// Sentences that no other seed has.
    fn text(seed: u64) -> String {
        const WORDS: [&str; 16] = [
            "river", "stone", "bridge", "walks", "under", "over", "the", "a", "quiet", "lantern", "finds",
            "letter", "garden", "winter", "slowly", "again",
        ];
        let mut random = Random::named(seed, "text of a test");
        let mut line = || {
            let words: Vec<&str> = (0..9).map(|_| WORDS[random.below(WORDS.len())]).collect();
            words.join(" ") + ".\n"
        };
        (0..30).map(|_| line()).collect()
    }

    /// Crates with one text each: three to train on, and so many held out.
    fn registry(held_out: usize) -> (tempfile::TempDir, Roots) {
        let dir = tempfile::tempdir().unwrap();
        let names =
            |side: bool| (0..).map(|i| format!("crate{i}")).filter(move |n| corpus::is_held_out(n) == side);
        for (seed, name) in names(false).take(3).chain(names(true).take(held_out)).enumerate() {
            let path = dir.path().join(format!("index/{name}-1.0.0/README.md"));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text(seed as u64)).unwrap();
        }
        let roots = Roots { registries: vec![dir.path().join("index")], toolchain_docs: None };
        (dir, roots)
    }

    fn micro(dir: &tempfile::TempDir) -> PretrainConfig {
        PretrainConfig {
            out: dir.path().join("models/micro"),
            vocab_size: 280,
            hidden_size: 16,
            intermediate_size: 32,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            context: 16,
            steps: 5,
            tokens_per_step: 64,
            ..Default::default()
        }
    }

    #[test]
    fn five_steps_give_a_model_and_its_losses() {
        let (dir, roots) = registry(2);
        let config = micro(&dir);
        let host = Host::default();
        let result = pretrain(&config, &roots, &host).unwrap();
        assert_eq!((&result["steps"], &result["tokens_seen"]), (&json!(5), &json!(5 * 64)));
        assert_eq!(host.steps.load(Ordering::SeqCst), 5);
        let said = |key: &str| result[key].as_str().unwrap().to_owned();
        assert!(said("training_text").starts_with("3 files"), "{}", said("training_text"));
        assert!(said("held_out_text").starts_with("2 files"), "{}", said("held_out_text"));
        let nll = |key: &str| result["held_out"][key].as_f64().unwrap();
        // Five steps of warm-up move nothing far from the uniform distribution; counts know the text.
        assert!((nll("model_nll") - 280f64.ln()).abs() < 0.5, "{result}");
        assert!(
            nll("five_gram_nll") < nll("unigram_nll") && nll("unigram_nll") < nll("model_nll"),
            "{result}"
        );
        let model = ModelDir::open(&config.out).unwrap();
        assert_eq!((model.config.vocab_size, model.tokenizer.vocab_size()), (280, 280));
        model.decoder(Precision::F32, &[]).unwrap();

        let error = pretrain(&config, &roots, &host).unwrap_err();
        assert!(error.kind == Kind::Usage && error.message.contains("expected a new folder"), "{error}");
    }

    #[test]
    fn stopped_while_training_it_writes_nothing_and_later_it_keeps_the_model() {
        let (dir, roots) = registry(1);
        let config = micro(&dir);
        let training = Host { stop_at_step: Some(2), ..Default::default() };
        let error = pretrain(&config, &roots, &training).unwrap_err();
        assert!(error.kind == Kind::Cancelled && error.message.contains("nothing was written"), "{error}");
        assert_eq!(training.steps.load(Ordering::SeqCst), 2);
        assert!(!config.out.exists());
        let measuring = Host { stop_when_measuring: true, ..Default::default() };
        let error = pretrain(&config, &roots, &measuring).unwrap_err();
        assert!(
            error.kind == Kind::Cancelled && error.to_string().contains("the model is written"),
            "{error}"
        );
        ModelDir::open(&config.out).unwrap();
    }

    #[test]
    fn a_machine_without_text_is_refused_before_training() {
        let (dir, roots) = registry(0);
        for (roots, side) in [(roots, "held-out text: "), (Roots::default(), "training text: ")] {
            let host = Host::default();
            let error = pretrain(&micro(&dir), &roots, &host).unwrap_err();
            assert!(error.kind == Kind::Data && error.message.starts_with(side), "{error}");
            assert_eq!(host.steps.load(Ordering::SeqCst), 0);
        }
    }

    #[test]
    fn settings_out_of_range_are_refused_by_key() {
        for (key, value) in [
            ("out", json!("")),
            ("vocab_size", json!(256)),
            ("hidden_size", json!(0)),
            ("intermediate_size", json!(0)),
            ("num_hidden_layers", json!(0)),
            ("num_attention_heads", json!(0)),
            ("num_key_value_heads", json!(0)),
            ("context", json!(1)),
            ("steps", json!(0)),
            ("tokens_per_step", json!(0)),
            ("lr", json!(0.0)),
            ("weight_decay", json!(-1.0)),
            ("seconds", json!(-0.5)),
        ] {
            let config: PretrainConfig = parse(json!({ key: value })).unwrap();
            let error = config.validate().unwrap_err();
            assert_eq!(error.kind, Kind::Usage);
            assert!(error.message.starts_with(&format!("{key}: expected ")), "{error}");
        }
        PretrainConfig::default().validate().unwrap();
    }

    #[test]
    fn a_large_vocabulary_has_no_baseline() {
        let scored = [vec![0, 1, 2]];
        let stream = [0, 1, 2, 3, 4, 0, 1, 2];
        assert_eq!(baseline(&stream, 5, MAX_VOCABULARY + 1, &scored).unwrap(), None);
        assert!(baseline(&stream, 5, MAX_VOCABULARY, &scored).unwrap().unwrap().is_finite());
    }
}
