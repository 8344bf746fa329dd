//! What a run will cost, said before its first step: bytes by kind, and time.
//!
//! The model of memory: what the process holds when it plans (program, tokenizer, text) stays; the weights come on top, then
//! what learns with a gradient and two moments of its size; then either the buffers of a step or those of an evaluation,
//! which are let go before the other is made ([`megacontext_base::buffers`] counts them as they are allocated), and the
//! packed operands of products. Checkpoints and adapters are written from where the values are, without copies. The model
//! of time counts multiply-adds and divides by the speed of a product measured on this machine now, with an allowance for
//! everything that is no product.
//!
//! Units: bytes, seconds. Errors: a plan beyond the budget, with the numbers and what would help.

use std::time::Instant;

use megacontext_base::buffers::gpu::{self, GpuBytes};
use megacontext_base::buffers::{PassBytes, PassShape, evaluation_bytes, logits_bytes, training_bytes};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::stored_narrow;
use megacontext_base::device::Device;
use megacontext_base::generate::{KvCache, generation_bytes, pass_entries};
use megacontext_base::lora::LoraModules;
use megacontext_base::params::Group;
use megacontext_kernels::precision::Precision;
use serde::Serialize;

use crate::error::{PluginError, Result};
use crate::jobs::model_error;
use crate::train::config::{EmbeddingPolicy, ExtendConfig, Recompute};
use crate::train::device_plan::{DevicePlan, with_device};
use crate::train::eval::batch_rows;
use crate::train::work;

pub(crate) const F32: u64 = 4;

/// Bytes by kind, of the most expensive stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MemoryPlan {
    /// What the process held when it planned, the text apart.
    pub program: u64,
    /// Tokens of the text, and tables of positions.
    pub data: u64,
    /// Frozen weights.
    pub weights: u64,
    /// Parameters that learn, f32.
    pub trainables: u64,
    /// Gradients of what learns.
    pub gradients: u64,
    /// Moments of AdamW.
    pub optimizer: u64,
    /// Block inputs, and what blocks keep for their backward pass.
    pub activations: u64,
    /// Buffers that all blocks share.
    pub workspace: u64,
    /// A chunk of logits and the gradient of the hidden states.
    pub loss_chunk: u64,
    /// Packed operands of products and attention, all threads together.
    pub packed: u64,
    /// A pass of the evaluation; not at the same time as a step.
    pub evaluation: u64,
    /// The most there is at one time.
    pub total: u64,
    /// Whether blocks are recomputed.
    pub recompute: bool,
    /// Precision class.
    pub dtype: Precision,
}

impl MemoryPlan {
    /// The kinds with their names: what the total is made of.
    pub fn kinds(&self) -> [(&'static str, u64); 10] {
        let step = self.activations + self.workspace + self.loss_chunk;
        [
            ("program", self.program),
            ("data", self.data),
            ("weights", self.weights),
            ("trainables", self.trainables),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("workspace", self.workspace),
            ("loss_chunk", self.loss_chunk),
            ("packed", self.packed),
        ]
        .map(|(name, bytes)| {
            // Where an evaluation is the larger of the two, what it takes beyond a step counts as workspace.
            let beyond = if name == "workspace" { self.evaluation.saturating_sub(step) } else { 0 };
            (name, bytes + beyond)
        })
    }
}

/// What decides the memory of a run.
pub(crate) struct Load<'a> {
    pub model: &'a DecoderConfig,
    pub lora: Option<&'a LoraModules>,
    pub learning: &'a [Group],
    pub dtype: Precision,
    /// Tokens of a micro-batch.
    pub entries: usize,
    /// Tokens of a sequence.
    pub context: usize,
    /// Tokens of the largest pass of an evaluation.
    pub evaluated: usize,
    pub data_tokens: usize,
    /// What the process holds besides.
    pub program: u64,
    /// Passes run on a GPU.
    pub on_gpu: bool,
}

impl<'a> Load<'a> {
    /// Of a model that only reads, with nothing counted yet besides its values.
    fn reading(model: &'a DecoderConfig, lora: Option<&'a LoraModules>, dtype: Precision) -> Self {
        Self {
            model,
            lora,
            learning: &[],
            dtype,
            entries: 0,
            context: 0,
            evaluated: 0,
            data_tokens: 0,
            program: 0,
            on_gpu: false,
        }
    }

    /// Values that stay frozen, in bytes, and number of values that learn.
    fn parameters(&self) -> (u64, u64) {
        let (mut frozen, mut learning) = (0, 0);
        for (name, shape) in self.model.tensors() {
            let group = self.model.group_of(&name);
            let values = shape.iter().product::<usize>() as u64;
            if self.learning.contains(&group) {
                learning += values;
            } else {
                frozen += values * if stored_narrow(group, self.dtype) { 2 } else { F32 };
            }
        }
        let lora = self.lora.map_or(0, |lora| lora.values() as u64);
        let fixed = self.lora.map_or(0, |lora| values(&lora.fixed())) * F32;
        if self.learning.contains(&Group::Lora) {
            (frozen + fixed, learning + lora)
        } else {
            (frozen + fixed + lora * F32, learning)
        }
    }

    /// Blocks that are walked back: all that lie above something that learns.
    fn walked(&self) -> usize {
        let layers = self.model.num_hidden_layers;
        let lowest = match self.lora {
            Some(lora) if self.learning == [Group::Lora] => lora.lowest_block().unwrap_or(layers),
            _ => 0,
        };
        layers - lowest.min(layers)
    }

    pub fn memory(&self, recompute: bool) -> MemoryPlan {
        let (weights, learning) = self.parameters();
        let pass = |entries| PassShape { entries, precision: self.dtype, lora: self.lora };
        let step = training_bytes(self.model, pass(self.entries), self.walked(), recompute);
        let evaluation = match self.evaluated {
            0 => PassBytes::default(),
            entries => evaluation_bytes(self.model, pass(entries)),
        };
        // On a GPU they lie there, and gradients with them, but for those of ends that an adapter changes. Moments come for
        // checkpoints.
        let step = match self.on_gpu {
            true => PassBytes { loss: self.loss_here(step), ..PassBytes::default() },
            false => step,
        };
        let gradients = if self.on_gpu && !self.ends_here() { 0 } else { learning * F32 };
        let evaluation = if self.on_gpu { PassBytes::default() } else { evaluation };
        let mut plan = MemoryPlan {
            program: self.program,
            data: (self.data_tokens + self.context * table_widths(self.model)) as u64 * F32,
            weights,
            trainables: learning * F32,
            gradients,
            optimizer: 2 * learning * F32,
            activations: step.activations,
            workspace: step.workspace,
            loss_chunk: step.loss,
            packed: packed_bytes(),
            evaluation: evaluation.total(),
            total: 0,
            recompute,
            dtype: self.dtype,
        };
        plan.total = plan.kinds().into_iter().map(|(_, bytes)| bytes).sum();
        plan
    }

    /// What a loss takes of the host where passes run on a GPU: a head that an adapter changes is the host's, and hidden
    /// states come here for it.
    fn loss_here(&self, step: PassBytes) -> u64 {
        let hidden = 2 * F32 * (self.entries * self.model.hidden_size) as u64;
        if self.ends_here() { step.loss + hidden } else { 0 }
    }

    /// Is the embedding or the head the host's on every device?
    fn ends_here(&self) -> bool {
        self.lora.is_some_and(|lora| lora.changes_head() || lora.changes_embedding())
    }

    /// What the fullest pass takes of a GPU.
    fn device_bytes(&self, recompute: bool) -> GpuBytes {
        let pass = |entries| PassShape { entries, precision: self.dtype, lora: self.lora };
        let (walked, learning) = (self.walked(), self.learning);
        let step = gpu::training_bytes(self.model, pass(self.entries), walked, recompute, learning);
        let optimizer = gpu::optimizer_bytes(self.model, self.dtype, learning, self.lora, true);
        let step = step.with_optimizer(optimizer);
        // Its buffers are made when a step's have been let go.
        let evaluation = gpu::evaluation_bytes(self.model, pass(self.evaluated)).with_optimizer(optimizer);
        if evaluation.total() > step.total() { evaluation } else { step }
    }
}

/// Refuses to train without LoRA what does not fit; nothing is measured or planned for time.
pub(crate) fn check_training(load: &Load, device: &Device) -> Result<()> {
    if let Some(plan) = DevicePlan::of(device, load.device_bytes(false), 0)? {
        plan.check(load.dtype, &["fewer tokens_per_step", "a smaller model"])?;
    }
    let plan = load.memory(false);
    match available_bytes().map(|free| free + resident_bytes().unwrap_or(0)) {
        Some(budget) if plan.total > budget => Err(PluginError::memory(format!(
            "the job needs about {} at context {}, but may use {}: {}. What would help: fewer tokens_per_step, a smaller \
             model",
            bytes(plan.total),
            load.context,
            bytes(budget),
            by_kind(&plan)
        ))),
        _ => Ok(()),
    }
}

/// Bytes of a model that only reads, an adapter's LoRA among them.
pub(crate) fn frozen_bytes(model: &DecoderConfig, lora: Option<&LoraModules>, dtype: Precision) -> u64 {
    Load::reading(model, lora, dtype).parameters().0
}

/// Values of a position's rotation tables, cosines and sines: twice where some blocks have their own.
fn table_widths(model: &DecoderConfig) -> usize {
    let a = &model.architecture;
    a.rotary_width * if a.local_theta.is_some() { 2 } else { 1 }
}

/// Packed operands: of products a slab for all threads and a block for each, of attention a few tiles for each.
pub(crate) fn packed_bytes() -> u64 {
    const SLAB: u64 = 4 << 20;
    const THREAD: u64 = 4 << 20;
    SLAB + THREAD * rayon::current_num_threads() as u64
}

fn values(tensors: &[(String, Vec<usize>)]) -> u64 {
    tensors.iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum()
}

/// What a job of forward passes has besides them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Beside {
    /// Bytes of the host's, on every device.
    pub host: u64,
    /// Documents that rows continue, where passes run.
    pub documents: u64,
    /// A network's on a GPU.
    pub network: GpuBytes,
}

/// Refuses a job of forward passes over `entries` tokens that does not fit.
pub(crate) fn check_forward(
    what: &str,
    model: &DecoderConfig,
    dtype: Precision,
    entries: usize,
    beside: Beside,
    device: &Device,
) -> Result<()> {
    let program = resident_bytes().unwrap_or(0);
    let load = Load {
        model,
        lora: None,
        learning: &[],
        dtype,
        entries: 0,
        context: entries,
        evaluated: entries,
        data_tokens: 0,
        program: 0,
        on_gpu: !device.is_cpu(),
    };
    let pass = PassShape { entries, precision: dtype, lora: None };
    let there = gpu::evaluation_bytes(model, pass).with(beside.network);
    if let Some(plan) = DevicePlan::of(device, there, beside.documents)? {
        plan.check(dtype, &["fewer tokens at a time"])?;
    }
    let plan = load.memory(true);
    let documents = if device.is_cpu() { beside.documents } else { 0 };
    let needed = plan.total + beside.host + documents;
    match available_bytes() {
        Some(free) if needed > free => {
            let mut help = vec!["fewer tokens at a time".to_string()];
            help.extend((!dtype.stores_bf16()).then(|| "--dtype bf16".to_string()));
            Err(PluginError::memory(format!(
                "{what} needs about {} for {entries} tokens at a time beside the {} there are ({} of it weights), but {} \
                 are free. What would help: {}",
                bytes(needed),
                bytes(program),
                bytes(plan.weights),
                bytes(free),
                help.join(", ")
            )))
        }
        _ => Ok(()),
    }
}

/// Rows that a job generates together.
pub(crate) struct Generated<'a> {
    /// What it is, for people.
    pub what: String,
    pub model: &'a DecoderConfig,
    pub lora: Option<&'a LoraModules>,
    pub dtype: Precision,
    /// Tokens of each prompt, and entries that each row comes to.
    pub prompts: &'a [usize],
    pub rooms: &'a [usize],
}

impl Generated<'_> {
    /// Bytes of keys and values.
    pub fn cache_bytes(&self) -> u64 {
        KvCache::planned_bytes(self.model, self.dtype, self.rooms.iter().sum())
    }

    /// Refuses what does not fit, on the processor and where passes run.
    pub fn check(&self, device: &Device) -> Result<()> {
        let Self { what, model, lora, dtype, prompts, rooms } = self;
        let pass = PassShape { entries: pass_entries(prompts), precision: *dtype, lora: *lora };
        let mut help = vec!["shorter or fewer rows at a time"];
        if let Some(plan) = DevicePlan::of(device, gpu::generation_bytes(model, pass, rooms), 0)? {
            plan.check(*dtype, &help)?;
        }
        // On a GPU the host chooses tokens, and does what an adapter on embedding or head asks for.
        let (needed, cache) = match device.is_cpu() {
            true => (generation_bytes(model, pass, rooms), self.cache_bytes()),
            false => (logits_bytes(model, pass, rooms.len()), 0),
        };
        let plan = Load::reading(model, *lora, *dtype).memory(true);
        let total = plan.total.saturating_add(needed);
        match available_bytes() {
            Some(free) if total > free => {
                help.extend((!dtype.stores_bf16()).then_some("--dtype bf16"));
                Err(PluginError::memory(format!(
                    "{what} needs about {} ({} of it keys and values, {} weights), but {} are free. What would help: {}",
                    bytes(total),
                    bytes(cache),
                    bytes(plan.weights),
                    bytes(free),
                    help.join(", ")
                )))
            }
            _ => Ok(()),
        }
    }
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
    /// What each policy for the embeddings would take.
    pub embeddings: Vec<EmbeddingCost>,
    /// What the run takes of a GPU, where its passes run on one.
    pub device: Option<DevicePlan>,
}

/// What a policy for the embeddings takes, everything else as it is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EmbeddingCost {
    /// Its word in settings.
    pub policy: &'static str,
    /// Whether it is the run's.
    pub chosen: bool,
    /// Bytes of the whole run.
    pub total: u64,
    /// Parameters that learn.
    pub trained: u64,
}

/// Plans a run on this device whose text is not read yet, choosing recomputation when told `auto`.
///
/// # Errors
/// When it cannot fit.
pub fn plan(
    model: &DecoderConfig,
    config: &ExtendConfig,
    data_tokens: usize,
    device: &Device,
) -> Result<Plan> {
    plan_beside(model, config, data_tokens, resident_bytes().unwrap_or(0), device)
}

/// [`plan`] beside `program` bytes that the process holds already, the tokens not among them.
pub fn plan_beside(
    model: &DecoderConfig,
    config: &ExtendConfig,
    data_tokens: usize,
    program: u64,
    device: &Device,
) -> Result<Plan> {
    let (entries, context) = config
        .stages
        .iter()
        .map(|s| (config.batch.shape(s.context).0 * s.context, s.context))
        .max()
        .ok_or_else(|| PluginError::usage("stages: expected at least one, got none"))?;
    let evaluated = config.eval.contexts.iter().map(|context| {
        let stride = config.eval.stride.unwrap_or(context / 2).clamp(1, *context);
        let windows = (config.eval.max_tokens / stride).max(1);
        batch_rows(*context).min(windows) * context
    });
    let resolved =
        |config: &ExtendConfig| config.lora.resolve(model).map_err(|e| PluginError::usage(e.to_string()));
    let evaluated = evaluated.max().unwrap_or(0);
    let on_gpu = !device.is_cpu();
    let memory_of = |groups: &[Group], lora: &LoraModules, dtype, recompute| {
        let load = Load {
            model,
            lora: Some(lora),
            learning: groups,
            dtype,
            entries,
            context,
            evaluated,
            data_tokens,
            program,
            on_gpu,
        };
        (load.memory(recompute), load.device_bytes(recompute))
    };
    let (groups, lora) = (config.groups(), resolved(config)?);
    // What the process holds is no longer free, and is part of the plan.
    let free = available_bytes().map(|free| free + resident_bytes().unwrap_or(0));
    let budget = config.memory_budget_bytes.or(free).unwrap_or(u64::MAX);
    let with = |recompute| memory_of(&groups, &lora, config.dtype, recompute).0;
    let of_device =
        |recompute| DevicePlan::of(device, memory_of(&groups, &lora, config.dtype, recompute).1, 0);
    let memory = match config.activation_checkpointing {
        Recompute::On => with(true),
        Recompute::Off => with(false),
        // The passes are the GPU's, and so is the choice.
        Recompute::Auto => match of_device(false)? {
            Some(plan) => with(plan.total > plan.free / 2),
            None => Some(with(false)).filter(|p| p.total <= budget / 2).unwrap_or_else(|| with(true)),
        },
    };
    let device_plan = of_device(memory.recompute)?;
    let mut embeddings = Vec::new();
    for policy in EmbeddingPolicy::ALL {
        if policy == EmbeddingPolicy::NewTokens && config.new_tokens.is_empty() {
            continue;
        }
        // A policy that the other settings rule out, as DoRA does LoRA on the embedding, is no choice here.
        let Ok(other) = config.with_policy(policy, model) else { continue };
        let Ok(lora) = resolved(&other) else { continue };
        let plan = memory_of(&other.groups(), &lora, config.dtype, memory.recompute).0;
        embeddings.push(EmbeddingCost {
            policy: policy.name(),
            chosen: policy == config.policy(),
            total: plan.total,
            trained: plan.trainables / F32,
        });
    }
    if memory.total > budget {
        let narrow = memory_of(&groups, &lora, Precision::Bf16, memory.recompute).0.total;
        let mut help = vec!["a smaller --context".to_string()];
        if config.batch.shape(context).0 > 1 {
            help.push("a smaller batch.micro_batch_tokens".to_string());
        }
        if !memory.recompute {
            help.push("activation_checkpointing = \"on\"".to_string());
        }
        if narrow < memory.total {
            help.push(format!("--dtype bf16 (about {})", bytes(narrow)));
        }
        for cost in embeddings.iter().filter(|cost| cost.total < memory.total) {
            help.push(format!("--embeddings {} (about {})", cost.policy, bytes(cost.total)));
        }
        return Err(PluginError::memory(format!(
            "the run needs about {} at context {context}, but may use {}: {}. What would help: {}",
            bytes(memory.total),
            bytes(budget),
            by_kind(&memory),
            help.join(", ")
        )));
    }
    if let Some(plan) = &device_plan {
        let mut help = vec!["a smaller --context", "a smaller batch.micro_batch_tokens"];
        help.extend((!memory.recompute).then_some("activation_checkpointing = \"on\""));
        plan.check(config.dtype, &help)?;
    }
    let speed = device.measured_flops(config.dtype.products()).map_err(model_error)?;
    let head_learns = config.policy() == EmbeddingPolicy::Full && model.tie_word_embeddings;
    let seconds = config
        .stages
        .iter()
        .map(|stage| {
            let (rows, micro) = config.batch.shape(stage.context);
            let sequences = (rows * micro * stage.steps) as f64;
            let (recompute, pattern) = (memory.recompute, stage.pattern());
            sequences * work::step(model, &lora, stage.context, pattern, recompute, head_learns).total()
        })
        .sum::<f64>()
        / speed
        * ALLOWANCE;
    let parameters = values(&model.tensors()) + lora.values() as u64;
    let trained = memory.trainables / F32;
    Ok(Plan { trained, memory, budget, seconds, parameters, embeddings, device: device_plan })
}

/// Measured: a step takes about so many times as long as its products alone would.
pub(crate) const ALLOWANCE: f64 = 1.3;

impl Plan {
    /// Two lines for people: the run, and what the embeddings cost.
    pub fn text(&self) -> String {
        let costs = self.embeddings.iter().map(|cost| {
            let chosen = if cost.chosen { " (chosen)" } else { "" };
            format!("{}{chosen} {}, {} learn", cost.policy, bytes(cost.total), count(cost.trained))
        });
        let text = format!(
            "plan: about {} of memory ({}), {} free; about {} of training; {} of {} parameters learn\n\
             embeddings: {}",
            bytes(self.memory.total),
            by_kind(&self.memory),
            if self.budget == u64::MAX { "an unknown amount".to_string() } else { bytes(self.budget) },
            duration(self.seconds),
            count(self.trained),
            count(self.parameters),
            costs.collect::<Vec<_>>().join("; ")
        );
        with_device(text, self.device.as_ref())
    }
}

fn by_kind(p: &MemoryPlan) -> String {
    let kinds = p.kinds().map(|(name, n)| {
        let remark = if name == "activations" && p.recompute { " with recomputation" } else { "" };
        format!("{} {}{remark}", name.replace('_', " "), bytes(n))
    });
    format!("{}; in {}", kinds.join(", "), p.dtype)
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

/// What this process holds in memory now (VmRSS).
pub fn resident_bytes() -> Option<u64> {
    proc_kilobytes("/proc/self/status", "VmRSS:")
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
