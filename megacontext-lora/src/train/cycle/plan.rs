//! What a run of alternating optimisation will cost, said before the base model is in memory: bytes by kind, and time by phase.
//!
//! The model of memory: what the process holds when it plans stays; the base model with what is on it, both networks, the buffers
//! of passes, the histories' tokens and gists and packed operands come on top. Then the largest of what the kinds of phases hold
//! besides, since one runs at a time: passages and graphs, what walking back takes, gradients and moments of what learns. Moments of a
//! module that pauses are on the disk.
//!
//! The model of time: multiply-adds of passes over the base model and of the networks, over the speed of a product measured now,
//! with the allowance that plans of `extend` have. Judging phases comes on top.
//!
//! Units: bytes, seconds. Errors: a plan beyond the budget, with the numbers and what would help.

use gistnet_adapter::Mode;
use megacontext_base::buffers::gpu;
use megacontext_base::buffers::{PassBytes, PassShape, evaluation_bytes, keys_values_bytes, training_bytes};
use megacontext_base::config::DecoderConfig;
use megacontext_base::context::ENTRIES_AT_ONCE;
use megacontext_base::decoder::DocumentShape;
use megacontext_base::device::Device;
use megacontext_base::lora::LoraModules;
use megacontext_base::params::Group;
use megacontext_kernels::attention::Pattern;
use serde::Serialize;

use super::{CycleConfig, PhaseKind};
use crate::error::{PluginError, Result};
use crate::jobs::model_error;
use crate::train::device_plan::{DevicePlan, with_device};
use crate::train::gistnet::{LEARNING, Rows, graph_bytes};
use crate::train::plan::{
    ALLOWANCE, F32, available_bytes, bytes, count, duration, frozen_bytes, packed_bytes, resident_bytes,
};
use crate::train::work;

/// What one kind of phase takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PhaseCost {
    /// Which.
    pub kind: PhaseKind,
    /// Bytes that it holds besides what is always there.
    pub bytes: u64,
    /// Optimiser steps of one such phase.
    pub steps: usize,
    /// Seconds of a step, about.
    pub seconds_per_step: f64,
    /// Seconds of making its labels, about.
    pub label_seconds: f64,
}

/// What a run takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CyclePlan {
    /// What the process held when it planned.
    pub program: u64,
    /// The base model, and what is frozen on it.
    pub weights: u64,
    /// Both networks.
    pub networks: u64,
    /// Buffers of passes over histories and over contexts.
    pub passes: u64,
    /// Tokens and gists of all histories.
    pub histories: u64,
    /// Packed operands of products, all threads together.
    pub packed: u64,
    /// By kind of phase.
    pub phases: Vec<PhaseCost>,
    /// The most there is at one time.
    pub total: u64,
    /// Seconds of all phases, about.
    pub seconds: f64,
    /// What the run takes of a GPU, where its passes run on one.
    pub device: Option<DevicePlan>,
}

/// Values of an entry that LensNet's graph keeps, in widths of the model and per block.
const GRAPH_WIDTHS: u64 = 40;

impl CyclePlan {
    /// Plans a resolved run over `histories` histories; what it would hold must fit.
    ///
    /// # Errors
    /// When it does not.
    pub fn new(
        config: &CycleConfig,
        model: &DecoderConfig,
        lora: &LoraModules,
        histories: usize,
        device: &Device,
    ) -> Result<Self> {
        let e = model.hidden_size as u64;
        let context = config.longest();
        let budget = config.budget_of(context);
        let block = config.network.block;
        let (gist, lens) = (config.network.of(model), config.lens.of(model, block));
        let learns = |group: Group| config.jt3.steps > 0 && config.jt3.groups.contains(&group);
        let whole: u64 = model
            .tensors()
            .iter()
            .filter(|(name, _)| learns(model.group_of(name)))
            .map(|(_, shape)| shape.iter().product::<usize>() as u64)
            .sum();
        let learning = whole + if learns(Group::Lora) { lora.values() as u64 } else { 0 };

        // Bytes.
        let pass = |entries| PassShape { entries, precision: config.dtype, lora: Some(lora) };
        let values = F32 * context as u64 * e;
        let passage =
            values + DocumentShape { entries: context, precision: config.dtype, hidden: true }.bytes(model);
        let held = |bytes: PassBytes| bytes.activations + bytes.workspace;
        // Buffers that all phases use one after another: of whole histories, and of contexts that are measured together.
        let shown = budget + config.horizon;
        let together = (ENTRIES_AT_ONCE / shown).max(1) * shown;
        let read = evaluation_bytes(model, pass((context + config.horizon).max(together)));
        let on_gpu = !device.is_cpu();
        let passes = if on_gpu { 0 } else { held(read) + read.loss };
        // What walking back takes besides.
        let trained = |entries: usize| {
            if on_gpu {
                return 0;
            }
            let (own, trained) = (
                evaluation_bytes(model, pass(entries)),
                training_bytes(model, pass(entries), model.num_hidden_layers, true),
            );
            held(trained).saturating_sub(held(own)) + trained.loss.saturating_sub(read.loss)
        };
        // Blocks that a step of GistNet makes gists of at least, where whole contexts are drawn.
        let of_whole = |kind: PhaseKind| {
            let whole = config.gist_phase(kind).whole > 0.0 && !kind.warm();
            if whole { context / block } else { 0 }
        };
        // Entries that a step of a network sees.
        let seen_by_gistnet = |kind: PhaseKind| {
            let phase = config.gist_phase(kind);
            let padded = block + usize::from(gist.mode == Mode::Transformer);
            phase.batch * phase.spans.max(of_whole(kind)) * padded
        };
        let seen_by_lensnet = |kind: PhaseKind| {
            let phase = config.lens_phase(kind);
            phase.batch * phase.labels.contexts() * (budget + block)
        };
        let bytes_of = |kind: PhaseKind| match kind {
            PhaseKind::WarmGistnet | PhaseKind::Jt1 => {
                let phase = config.gist_phase(kind);
                let rows = Rows {
                    count: phase.spans,
                    longest: config.horizon.max(if of_whole(kind) > 0 { shown } else { 0 }),
                };
                phase.batch as u64 * if on_gpu { values } else { passage }
                    + graph_bytes(&gist, e, seen_by_gistnet(kind) as u64, device)
                    + (phase.batch as u64 + 1) * rows.bytes(e)
                    + trained(rows.at_once())
                    + LEARNING * F32 * gist.parameters() as u64
            }
            PhaseKind::WarmLensnet | PhaseKind::Jt2 => {
                let blocks = if lens.goes_to(device) { 0 } else { lens.layers as u64 };
                let graph = F32 * seen_by_lensnet(kind) as u64 * e * GRAPH_WIDTHS * (blocks + 1);
                let labels = keys_values_bytes(model, config.dtype, context);
                graph.max(labels) + LEARNING * F32 * lens.parameters() as u64
            }
            // Weights that are stored narrow become wide; gradients, two moments.
            PhaseKind::Jt3 => {
                let widened = if config.dtype.stores_bf16() { whole } else { 0 };
                trained(shown) + F32 * (widened + 3 * learning)
            }
        };

        // Passes over histories, over contexts that are measured together, over contexts that are learned from.
        let groups: Vec<Group> = config.jt3.groups.iter().copied().filter(|group| learns(*group)).collect();
        let step =
            gpu::training_bytes(model, pass(shown.max(together)), model.num_hidden_layers, true, &groups);
        let optimizer = gpu::optimizer_bytes(model, config.dtype, &groups, Some(lora), true);
        let read_there = gpu::evaluation_bytes(model, pass((context + config.horizon).max(together)));
        // Histories that a step of GistNet runs, or the labels of one.
        let documents = config.jt1.batch.max(1) as u64 * (passage - values);
        let divergence = gpu::divergence_bytes(model, pass(shown.max(together)));
        // Both networks, and as a phase began the one that it trains.
        let gist_there = [PhaseKind::WarmGistnet, PhaseKind::Jt1].map(seen_by_gistnet).into_iter().max();
        let lens_there = [PhaseKind::WarmLensnet, PhaseKind::Jt2].map(seen_by_lensnet).into_iter().max();
        let (gist_there, lens_there) = (gist_there.unwrap_or(0), lens_there.unwrap_or(0));
        let on_device = step
            .beside(read_there)
            .with_optimizer(optimizer)
            .with(gist.gpu_bytes(device, gist_there, true))
            .with(lens.gpu_bytes(device, lens_there, true))
            .with(gist.gpu_bytes(device, gist.entries_at_once(), false))
            .with(lens.gpu_bytes(device, budget + block, false));
        let device_plan = DevicePlan::of(device, on_device, documents + divergence)?;

        // Time.
        let speed = device.measured_flops(config.dtype.products()).map_err(model_error)?;
        let seconds = |flops: f64| flops / speed * ALLOWANCE;
        let read = |entries: usize| forward_flops(model, entries);
        let step = |entries| {
            let head = learns(Group::Embeddings) && model.tie_word_embeddings;
            work::step(model, lora, entries, Pattern::Dense, true, head).total()
        };
        let chosen =
            (config.refocuses * config.allocator.rounds) as f64 * 2.0 * (lens.parameters() * budget) as f64;
        let cost = |kind: PhaseKind| {
            let (step_flops, label_flops) = match kind {
                PhaseKind::WarmGistnet | PhaseKind::Jt1 => {
                    let phase = config.gist_phase(kind);
                    let whole = if kind.warm() { 0.0 } else { phase.whole };
                    let singly = (1.0 - whole) * (phase.spans * (1 + config.horizon)) as f64;
                    let entries = singly + whole * (budget + config.horizon) as f64;
                    let spans = (1.0 - whole) * phase.spans as f64 + whole * (context / block) as f64;
                    let of_history = read(context)
                        + 4.0 * read(1) * entries
                        + 6.0 * gist.parameters() as f64 * spans * block as f64
                        + if kind.warm() { 0.0 } else { chosen };
                    (phase.batch as f64 * of_history, 0.0)
                }
                PhaseKind::WarmLensnet | PhaseKind::Jt2 => {
                    let phase = config.lens_phase(kind);
                    let contexts = phase.batch * phase.labels.contexts();
                    let edits = match phase.labels.edits {
                        0 => context / block,
                        most => most.min(context / block),
                    };
                    let labels = (phase.labels.histories * phase.labels.rounds) as f64;
                    let label = read(budget + config.horizon) * (1.0 + edits as f64 / 2.0) + chosen;
                    (6.0 * lens.parameters() as f64 * (contexts * budget) as f64, labels * label)
                }
                PhaseKind::Jt3 => {
                    let contexts = if config.jt3.keep_alive > 0.0 { 2.0 } else { 1.0 };
                    (config.jt3.batch as f64 * (contexts * step(budget + config.horizon) + chosen), 0.0)
                }
            };
            PhaseCost {
                kind,
                bytes: bytes_of(kind),
                steps: config.steps_of(kind),
                seconds_per_step: seconds(step_flops),
                label_seconds: seconds(label_flops),
            }
        };
        let places = config.phases();
        let mut kinds: Vec<PhaseKind> = places.iter().map(|place| place.kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let phases: Vec<PhaseCost> = kinds.into_iter().map(cost).collect();
        let of = |kind: PhaseKind| phases.iter().find(|cost| cost.kind == kind);
        let seconds = places
            .iter()
            .filter_map(|place| of(place.kind))
            .map(|cost| cost.label_seconds + cost.steps as f64 * cost.seconds_per_step)
            .sum();

        let nodes = (context / block * 2) as u64;
        let (gist, lens) = (gist.parameters() as u64, lens.parameters() as u64);
        let mut plan = Self {
            program: resident_bytes().unwrap_or(0),
            weights: frozen_bytes(model, Some(lora), config.dtype),
            networks: F32 * (gist + lens),
            passes,
            histories: histories as u64 * (F32 * context as u64 + nodes * (F32 * e + 2)),
            packed: packed_bytes(),
            phases,
            total: 0,
            seconds,
            device: device_plan,
        };
        plan.total = plan.sum();
        let free = available_bytes().map(|free| free + plan.program);
        let allowed = config.memory_budget_bytes.or(free).unwrap_or(u64::MAX);
        let mut help = vec!["smaller batches", "a smaller budget of entries", "shorter contexts"];
        if let Some(plan) = &plan.device {
            plan.check(config.dtype, &help)?;
        }
        if plan.total > allowed {
            help.extend((!config.dtype.stores_bf16()).then_some("--dtype bf16"));
            return Err(PluginError::memory(format!(
                "the run needs about {}, but may use {}: {}. What would help: {}",
                bytes(plan.total),
                bytes(allowed),
                plan.kinds(),
                help.join(", ")
            )));
        }
        Ok(plan)
    }

    fn sum(&self) -> u64 {
        let largest = self.phases.iter().map(|phase| phase.bytes).max().unwrap_or(0);
        let always = self.program + self.weights + self.networks + self.passes;
        always + self.histories + self.packed + largest
    }

    fn kinds(&self) -> String {
        let largest = self.phases.iter().max_by_key(|phase| phase.bytes);
        let largest = largest
            .map_or("nothing".to_string(), |phase| format!("{} {}", phase.kind.name(), bytes(phase.bytes)));
        format!(
            "program {}, weights {}, networks {}, passes {}, histories {}, packed {}, and the largest phase, {}",
            bytes(self.program),
            bytes(self.weights),
            bytes(self.networks),
            bytes(self.passes),
            bytes(self.histories),
            bytes(self.packed),
            largest
        )
    }

    /// The plan for people: memory, then a line for each kind of phase.
    pub fn text(&self) -> String {
        let text = format!(
            "plan: at most about {} of memory ({}); about {} of training",
            bytes(self.total),
            self.kinds(),
            duration(self.seconds)
        );
        let mut text = with_device(text, self.device.as_ref());
        for phase in &self.phases {
            text += &format!(
                "\n  {:<13} {} steps, about {:.3} s each",
                phase.kind.name(),
                count(phase.steps as u64),
                phase.seconds_per_step
            );
            if phase.label_seconds > 0.0 {
                text += &format!("; labels about {}", duration(phase.label_seconds));
            }
        }
        text
    }
}

/// FLOPs of a forward pass over one row of entries.
fn forward_flops(model: &DecoderConfig, entries: usize) -> f64 {
    let linears = model.linears().into_iter().filter(|linear| linear.layer.is_some());
    let weights: usize = linears.map(|linear| linear.out * linear.inp).sum();
    let head = model.hidden_size * model.vocab_size;
    let heads = model.num_attention_heads;
    let attention = work::attention_forward(Pattern::Dense, entries, heads, model.head_dim);
    2.0 * (weights + head) as f64 * entries as f64 + model.num_hidden_layers as f64 * attention
}
