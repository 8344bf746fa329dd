//! What a run will cost, said before its first step: bytes by kind, and time.
//!
//! The model of memory (f32, CPU): weights and LoRA factors are resident; what learns also has a gradient and two
//! moments of its size, and while a checkpoint is written copies of them. A step holds each block's input, what one block
//! (every block without recomputation) keeps for its backward pass, buffers that all blocks share, and one chunk of
//! logits; an evaluation holds one block's buffers for its own batch. The model of time counts multiply-adds and divides
//! by the speed of a product measured on this machine now, with an allowance for everything that is no product.
//!
//! Units: bytes, seconds. Errors: a plan beyond the budget, with the numbers and what would help.

use std::time::Instant;

use megacontext_base::config::LlamaConfig;
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::gemm::measured_flops;
use megacontext_kernels::loss::chunk_rows;
use serde::Serialize;

use crate::error::{PluginError, Result};
use crate::train::config::{ExtendConfig, Recompute};
use crate::train::eval::BATCH_TOKENS;

const F32: u64 = 4;

/// Bytes by kind, of the most expensive stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MemoryPlan {
    /// Base weights and LoRA factors.
    pub weights: u64,
    /// Gradients of what learns.
    pub gradients: u64,
    /// Moments of AdamW.
    pub optimizer: u64,
    /// Block inputs, and what blocks keep for their backward pass.
    pub activations: u64,
    /// Buffers that all blocks share.
    pub workspace: u64,
    /// A chunk of logits and the gradients around the head.
    pub loss_chunk: u64,
    /// A pass of the evaluation; not at the same time as a step.
    pub evaluation: u64,
    /// Copies while a checkpoint is written.
    pub checkpoint: u64,
    /// Tokenised text.
    pub data: u64,
    /// The most there is at one time.
    pub total: u64,
    /// Whether blocks are recomputed.
    pub recompute: bool,
}

/// Sizes that decide the plan.
struct Step {
    tokens: u64,
    context: u64,
}

fn memory(
    model: &LlamaConfig,
    config: &ExtendConfig,
    step: &Step,
    data_tokens: u64,
    recompute: bool,
) -> MemoryPlan {
    let weights: u64 = model.tensors().iter().map(|(_, s)| s.iter().product::<usize>() as u64).sum();
    let lora: u64 = config.lora.modules(model).iter().map(|(_, o, i)| (config.lora.r * (o + i)) as u64).sum();
    let trained = trained(model, config, lora);
    let (e, f) = (model.hidden_size as u64, model.intermediate_size as u64);
    let q = (model.num_attention_heads * model.head_dim) as u64;
    let kv = (model.num_key_value_heads * model.head_dim) as u64;
    let heads = model.num_attention_heads as u64;
    // Kept by a block: q, k, v, the mixed values and their log-sum-exp, the middle of the residual stream, gate and up.
    let kept = 2 * q + 2 * kv + heads + e + 2 * f;
    // Shared: the stream twice, its gradient, normed input and its gradient; the gated product and its gradient; the
    // gradients of q, k, v; LoRA's low-rank values and theirs.
    let shared = 5 * e + 2 * f.max(q) + q + 2 * kv + heads + 2 * config.lora.r as u64;
    let layers = model.num_hidden_layers as u64;
    let vocab = model.vocab_size as u64;
    let chunk = chunk_rows(model.vocab_size).min(step.tokens as usize) as u64 * vocab;
    let blocks = if recompute { 1 } else { layers };
    let evaluated =
        config.eval.contexts.iter().copied().map(|c| c.max(BATCH_TOKENS) as u64).max().unwrap_or(0);
    let head_gradient = if config.train_embeddings && model.tie_word_embeddings { vocab * e } else { 0 };
    let mut plan = MemoryPlan {
        weights: (weights + lora) * F32,
        gradients: trained * F32,
        optimizer: 2 * trained * F32,
        activations: step.tokens * (layers * e + blocks * kept) * F32,
        workspace: step.tokens * shared * F32,
        loss_chunk: (chunk + 2 * step.tokens * e + head_gradient) * F32,
        evaluation: evaluation_bytes(model, evaluated),
        checkpoint: 4 * trained * F32,
        data: data_tokens * F32 + step.context * model.head_dim as u64 * F32,
        total: 0,
        recompute,
    };
    let step_bytes = plan.activations + plan.workspace + plan.loss_chunk;
    let busy = (step_bytes + plan.checkpoint).max(plan.evaluation);
    plan.total = plan.weights + plan.gradients + plan.optimizer + busy + plan.data;
    plan
}

/// Bytes that a forward pass over `tokens` tokens holds besides the weights.
pub fn evaluation_bytes(model: &LlamaConfig, tokens: u64) -> u64 {
    let (e, f) = (model.hidden_size as u64, model.intermediate_size as u64);
    let q = (model.num_attention_heads * model.head_dim) as u64;
    let kv = (model.num_key_value_heads * model.head_dim) as u64;
    let chunk = chunk_rows(model.vocab_size).min(tokens as usize) as u64 * model.vocab_size as u64;
    (tokens * (2 * q + 2 * kv + 6 * e + 3 * f) + chunk) * F32
}

/// Refuses an evaluation at `context` tokens that does not fit beside the weights.
pub fn check_evaluation(model: &LlamaConfig, context: usize) -> Result<()> {
    let weights: u64 =
        model.tensors().iter().map(|(_, s)| s.iter().product::<usize>() as u64).sum::<u64>() * F32;
    let needed = weights + evaluation_bytes(model, context.max(BATCH_TOKENS) as u64);
    match available_bytes() {
        Some(free) if needed > free => Err(PluginError::memory(format!(
            "the evaluation needs about {} at context {context} ({} of it weights), but {} are free. What would help: a \
             smaller context",
            bytes(needed),
            bytes(weights),
            bytes(free)
        ))),
        _ => Ok(()),
    }
}

fn trained(model: &LlamaConfig, config: &ExtendConfig, lora: u64) -> u64 {
    let e = model.hidden_size as u64;
    let embeddings = if config.train_embeddings { model.vocab_size as u64 * e } else { 0 };
    let norms = if config.train_norms { (2 * model.num_hidden_layers as u64 + 1) * e } else { 0 };
    lora + embeddings + norms
}

/// Multiply-adds of forward and backward of one sequence, times two: FLOPs.
fn flops(model: &LlamaConfig, context: u64, pattern: Pattern, recompute: bool) -> f64 {
    let (e, f) = (model.hidden_size as f64, model.intermediate_size as f64);
    let q = (model.num_attention_heads * model.head_dim) as f64;
    let kv = (model.num_key_value_heads * model.head_dim) as f64;
    let linear = 2.0 * (e * (2.0 * q + 2.0 * kv) + 3.0 * e * f);
    let keys = match pattern {
        Pattern::ShiftedSparse { group } => (group as f64).min(context as f64) / 2.0,
        _ => context as f64 / 2.0,
    };
    let attention = 4.0 * keys * q;
    let head = 2.0 * e * model.vocab_size as f64;
    let layers = model.num_hidden_layers as f64;
    let again = if recompute { 1.0 } else { 0.0 };
    // Frozen weights: forward and the input's gradient; attention's backward is two and a half forwards.
    context as f64 * (layers * (linear * (2.0 + again) + attention * (3.5 + again)) + head * 3.0)
}

/// What a run will cost.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Bytes by kind.
    pub memory: MemoryPlan,
    /// Bytes the run may use.
    pub budget: u64,
    /// Seconds of training, about; evaluation comes on top.
    pub seconds: f64,
    /// Parameters that learn.
    pub trained: u64,
    /// Parameters in all.
    pub parameters: u64,
}

/// Plans a run, choosing recomputation when told `auto`.
///
/// # Errors
/// When it cannot fit.
pub fn plan(model: &LlamaConfig, config: &ExtendConfig, data_tokens: usize) -> Result<Plan> {
    let widest = config
        .stages
        .iter()
        .map(|s| {
            let (rows, _) = config.batch.shape(s.context);
            Step { tokens: (rows * s.context) as u64, context: s.context as u64 }
        })
        .max_by_key(|s| s.tokens)
        .ok_or_else(|| PluginError::usage("stages: expected at least one, got none"))?;
    let budget = match config.memory_budget_bytes {
        Some(bytes) => bytes,
        None => available_bytes().unwrap_or(u64::MAX),
    };
    let with = |recompute| memory(model, config, &widest, data_tokens as u64, recompute);
    let memory = match config.activation_checkpointing {
        Recompute::On => with(true),
        Recompute::Off => with(false),
        Recompute::Auto => Some(with(false)).filter(|p| p.total <= budget / 2).unwrap_or_else(|| with(true)),
    };
    if memory.total > budget {
        let mut help = vec!["a smaller --context"];
        if config.batch.shape(widest.context as usize).0 > 1 {
            help.push("a smaller batch.micro_batch_tokens");
        }
        if !memory.recompute {
            help.push("activation_checkpointing = \"on\"");
        }
        if config.train_embeddings {
            help.push("train_embeddings = false");
        }
        return Err(PluginError::memory(format!(
            "the run needs about {} at context {}, but may use {}: {}. What would help: {}",
            bytes(memory.total),
            widest.context,
            bytes(budget),
            by_kind(&memory),
            help.join(", ")
        )));
    }
    let speed = measured_flops(megacontext_kernels::gemm::Products::F32);
    let seconds = config
        .stages
        .iter()
        .map(|stage| {
            let (rows, micro) = config.batch.shape(stage.context);
            let sequences = (rows * micro * stage.steps) as f64;
            sequences * flops(model, stage.context as u64, stage.pattern(), memory.recompute)
        })
        .sum::<f64>()
        / speed
        * ALLOWANCE;
    let lora: u64 = config.lora.modules(model).iter().map(|(_, o, i)| (config.lora.r * (o + i)) as u64).sum();
    let parameters = memory.weights / F32;
    Ok(Plan { memory, budget, seconds, trained: trained(model, config, lora), parameters })
}

/// Measured: a step takes about so many times as long as its products alone would.
const ALLOWANCE: f64 = 2.5;

impl Plan {
    /// One line for people.
    pub fn text(&self) -> String {
        format!(
            "plan: about {} of memory ({}), {} free; about {} of training; {} of {} parameters learn",
            bytes(self.memory.total),
            by_kind(&self.memory),
            if self.budget == u64::MAX { "an unknown amount".to_string() } else { bytes(self.budget) },
            duration(self.seconds),
            count(self.trained),
            count(self.parameters)
        )
    }
}

fn by_kind(p: &MemoryPlan) -> String {
    format!(
        "weights {}, gradients {}, optimizer {}, activations {}{}, workspace {}, loss chunk {}, checkpoint {}, data {}; \
         an evaluation {}",
        bytes(p.weights),
        bytes(p.gradients),
        bytes(p.optimizer),
        bytes(p.activations),
        if p.recompute { " with recomputation" } else { "" },
        bytes(p.workspace),
        bytes(p.loss_chunk),
        bytes(p.checkpoint),
        bytes(p.data),
        bytes(p.evaluation)
    )
}

/// A number of bytes for people.
pub fn bytes(n: u64) -> String {
    match n {
        0..=999_999 => format!("{:.0} kB", n as f64 / 1e3),
        1_000_000..=999_999_999 => format!("{:.0} MB", n as f64 / 1e6),
        _ => format!("{:.1} GB", n as f64 / 1e9),
    }
}

/// A count for people.
pub fn count(n: u64) -> String {
    match n {
        0..=9_999 => n.to_string(),
        10_000..=999_999 => format!("{:.0} k", n as f64 / 1e3),
        1_000_000..=999_999_999 => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.2} B", n as f64 / 1e9),
    }
}

/// A time for people.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}

/// Memory that programs can still get, from `/proc/meminfo`; none where there is no such file.
pub fn available_bytes() -> Option<u64> {
    proc_kilobytes("/proc/meminfo", "MemAvailable:")
}

/// The largest resident size of this process so far (VmHWM).
pub fn peak_bytes() -> Option<u64> {
    proc_kilobytes("/proc/self/status", "VmHWM:")
}

fn proc_kilobytes(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|l| l.starts_with(key))?;
    line[key.len()..].trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kb| kb * 1024)
}

/// Seconds since a moment.
pub fn since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(bytes(1_500_000_000), "1.5 GB");
        assert_eq!(bytes(2_000), "2 kB");
        assert_eq!(count(4_000_000), "4.0 M");
        assert_eq!(duration(7200.0), "2.0 h");
    }

    #[test]
    fn this_process_has_a_peak() {
        if cfg!(target_os = "linux") {
            assert!(peak_bytes().unwrap() > 1_000_000);
        }
    }
}
