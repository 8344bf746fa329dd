//! A whole training step, and its plan without running it.
//!
//! The model is a Llama of the given shape with random weights and tied embeddings, LoRA on q, k, v and o; LoRA, embeddings
//! and norms learn. A step is the trainer's own: clear the gradients, embed, forward, loss over all positions, backward,
//! AdamW. It is what `mclora extend` runs, with random tokens in place of text.
//!
//! `idle_rss_MB` is before the first step, with the model in memory; `peak_rss_MB` is the most since then. `peak_device_MB` is the
//! same of a GPU, copies of the parameters among it.

use std::path::Path;

use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::Decoder;
use megacontext_base::device::DeviceChoice;
use megacontext_base::lora::{LoraConfig, LoraModules};
use megacontext_base::params::Group;
use megacontext_base::random::Random;
use megacontext_kernels::precision::Precision;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::measure::{Memory, Times, megabytes, rounded};
use super::{add, add_device, begin, check_common, group, kind, within};
use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::device::OnDevice;
use crate::jobs::{model_error, to_value, with_threads};
use crate::train::config::{
    self, Attention, BatchConfig, ExtendConfig, GroupSize, OptimizerConfig, Recompute, StageConfig,
};
use crate::train::trainer::Trainer;
use crate::train::{plan, work};

/// What is measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StepBench {
    /// Model width, blocks, query heads, kv heads, MLP width, vocabulary. The default is SmolLM2-135M's.
    pub shape: Vec<usize>,
    /// Tokens of a sequence.
    pub n: usize,
    /// Shifted sparse, or dense causal.
    pub attn: Attention,
    /// Group of shifted sparse attention.
    pub group: GroupSize,
    /// Precision.
    pub dtype: Precision,
    /// Rank of LoRA.
    pub rank: usize,
    /// Recompute blocks in the backward pass.
    pub checkpointing: bool,
    /// Steps to time, after the warm-up.
    pub steps: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// Threads; none means all.
    pub threads: Option<usize>,
    /// What a step's passes run on: `cpu`, `cuda:N`, or `auto`.
    pub device: DeviceChoice,
}

impl Default for StepBench {
    fn default() -> Self {
        Self {
            shape: vec![576, 30, 9, 3, 1536, 49152],
            n: 4096,
            attn: Attention::S2,
            group: GroupSize::Part(0.25),
            dtype: Precision::F32,
            rank: 8,
            checkpointing: true,
            steps: 2,
            batch: 1,
            threads: None,
            device: DeviceChoice::Auto,
        }
    }
}

/// A Llama of a shape, for sequences of `n` tokens.
pub(super) fn llama(shape: &[usize], n: usize) -> Result<DecoderConfig> {
    let &[hidden, layers, heads, kv_heads, intermediate, vocab] = shape else {
        return Err(PluginError::usage(format!(
            "shape: expected 6 numbers (model width, blocks, query heads, kv heads, MLP width, vocabulary), got {}",
            shape.len()
        )));
    };
    let config = json!({
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocab,
        "max_position_embeddings": n.max(8192), "rms_norm_eps": 1e-5, "rope_theta": 100_000.0,
        "tie_word_embeddings": true, "hidden_act": "silu",
    });
    DecoderConfig::from_json(&config, Path::new("shape")).map_err(|e| PluginError::usage(e.to_string()))
}

impl StepBench {
    fn check(&self) -> Result<()> {
        check_common(self.n, self.batch, 1)?;
        within("steps", self.steps, 1000)?;
        config::pattern(self.attn, self.group, self.n).map(|_| ())
    }

    fn model(&self) -> Result<DecoderConfig> {
        llama(&self.shape, self.n)
    }

    fn lora(&self, model: &DecoderConfig) -> Result<(LoraConfig, LoraModules)> {
        let lora = LoraConfig { r: self.rank, alpha: 2.0 * self.rank as f64, ..LoraConfig::default() };
        let modules = lora.resolve(model).map_err(|e| PluginError::usage(e.to_string()))?;
        Ok((lora, modules))
    }

    /// The fields that say what was asked.
    fn begin(&self, what: &str) -> Result<Map<String, Value>> {
        let mut result = begin(what, self.dtype)?;
        let shape: Vec<String> = self.shape.iter().map(usize::to_string).collect();
        let group = group(config::pattern(self.attn, self.group, self.n)?, self.n);
        add(
            &mut result,
            json!({
                "shape": shape.join(","), "attn": kind(self.attn), "B": self.batch, "n": self.n, "G": group,
                "r": self.rank, "ckpt": self.checkpointing,
            }),
        );
        Ok(result)
    }

    fn stage(&self, steps: usize) -> StageConfig {
        StageConfig {
            context: self.n,
            attention: self.attn,
            group: self.group,
            factor: None,
            scaling: None,
            steps,
        }
    }

    fn tokens(&self) -> BatchConfig {
        let tokens = self.n * self.batch;
        BatchConfig { tokens_per_step: tokens, micro_batch_tokens: tokens }
    }
}

/// More steps than are ever sampled.
const ENDLESS: usize = 1 << 40;

/// Measures steps.
pub fn run(bench: &StepBench, host: &dyn HostApi) -> Result<Value> {
    bench.check()?;
    let model = bench.model()?;
    let lora = bench.lora(&model)?;
    with_threads(bench.threads, || measured(bench, model, lora, host))?
}

fn measured(
    bench: &StepBench,
    model: DecoderConfig,
    (lora, modules): (LoraConfig, LoraModules),
    host: &dyn HostApi,
) -> Result<Value> {
    let pattern = config::pattern(bench.attn, bench.group, bench.n)?;
    let work =
        work::step(&model, &modules, bench.n, pattern, bench.checkpointing, true).times(bench.batch as f64);
    let mut random = Random::new(5);
    let stream = (0..bench.n * bench.batch + 1).map(|_| random.below(model.vocab_size) as u32).collect();
    let learning = [Group::Lora, Group::Embeddings, Group::Norms];
    let on = OnDevice::open(bench.device, host)?.running(&model, host)?;
    let mut decoder = Decoder::random(model, 0, bench.dtype, &learning).map_err(model_error)?;
    decoder.attach_lora(lora, 0).map_err(model_error)?;
    on.take(&mut decoder)?;
    let mut trainer = Trainer::new(
        decoder,
        &learning,
        OptimizerConfig { lr: 2e-5, warmup_steps: 0, ..OptimizerConfig::default() },
        bench.tokens(),
        vec![bench.stage(ENDLESS)],
        stream,
        0,
        bench.checkpointing,
    )?;
    trainer.decoder.device().forget_peak().map_err(model_error)?;
    let memory = Memory::start();
    let mut loss = None;
    let times = Times::of(bench.steps, host, || {
        let report = trainer.step()?;
        loss.get_or_insert(report.loss);
        trainer.decoder.device().wait().map_err(model_error)
    })?;
    let tokens = (bench.n * bench.batch) as f64;
    let mut result = bench.begin("lora_step")?;
    add_device(&mut result, trainer.decoder.device())?;
    let tera = |flops: f64| rounded(flops / 1e12, 6);
    let parts = json!({
        "linear": tera(work.linear), "lora": tera(work.lora), "lm_head": tera(work.lm_head), "attn": tera(work.attn),
    });
    add(
        &mut result,
        json!({
            "step_s": rounded(times.median(), 4), "best_s": rounded(times.best(), 4),
            "tok_s": rounded(tokens / times.median(), 1),
            "peak_rss_MB": megabytes(memory.peak()), "idle_rss_MB": megabytes(memory.idle()),
            "tflop": tera(work.total()), "tflop_parts": parts,
            "gflops": rounded(work.total() / times.median() / 1e9, 1), "loss": loss.map(|l| rounded(l, 4)),
        }),
    );
    times.describe(&mut result);
    Ok(Value::Object(result))
}

/// Plans a run of such steps, evaluations apart, without making the model. What the process has no room for is said like
/// everything else; what a GPU has no room for is refused, with the numbers.
pub fn plan(bench: &StepBench, host: &dyn HostApi) -> Result<Value> {
    bench.check()?;
    let model = bench.model()?;
    let on = OnDevice::open(bench.device, host)?.running(&model, host)?;
    let run = ExtendConfig {
        context: bench.n,
        lora: bench.lora(&model)?.0,
        batch: bench.tokens(),
        stages: vec![bench.stage(bench.steps)],
        dtype: bench.dtype,
        activation_checkpointing: if bench.checkpointing { Recompute::On } else { Recompute::Off },
        // Said whether it fits or not.
        memory_budget_bytes: Some(u64::MAX),
        ..ExtendConfig::default()
    };
    let tokens = bench.n * bench.batch;
    let plan = with_threads(bench.threads, || plan::plan(&model, &run, tokens, on.device()))??;
    let mut result = bench.begin("plan")?;
    add(
        &mut result,
        json!({
            "device": on.device().describe(), "peak_rss_MB": megabytes(Some(plan.memory.total)), "step_s": rounded(plan.seconds / bench.steps as f64, 4),
            "trained": plan.trained, "parameters": plan.parameters, "bytes": to_value(&plan.memory)?,
            "free_MB": megabytes(plan::available_bytes()),
        }),
    );
    if let Some(plan) = &plan.device {
        let peak = megabytes(Some(plan.total));
        add(&mut result, json!({ "peak_device_MB": peak, "device_bytes": to_value(plan)? }));
    }
    Ok(Value::Object(result))
}
