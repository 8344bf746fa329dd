//! What a run that trains GistNet will hold, said before the base model is in memory.
//!
//! The model of memory: what the process holds when it plans stays (program, tokenizer, text); the base model with what is on
//! it comes on top, GistNet with its gradients and moments, the buffers of passes, which are kept from a pass over a document
//! to one over rows and back, packed operands of products, and the passages that are kept. Then either a step (passages that
//! are not kept, GistNet's graph, the rows of all its passages) or a validation (a passage of each pattern, the graph of as
//! many blocks as GistNet passes at a time), whichever takes more; or, before any of that, the adapter's tensors a second
//! time, while they are read.
//!
//! Counted as for the fullest step there can be: every passage as long as the context, every row with as many replaced
//! blocks as `run` allows, spans of the second level wherever there is room for them.
//!
//! Units: bytes. Errors: a plan beyond the budget, with the numbers and what would help.

use gistnet_adapter::curriculum::{Stage, places};
use gistnet_adapter::delta_nll::ENTRIES_AT_ONCE;
use gistnet_adapter::{GistNetConfig, Mode};

use gistnet_adapter::validate::{Baseline, LOOKED_AT};
use megacontext_base::buffers::gpu::{self, GpuBytes};
use megacontext_base::buffers::{PassShape, evaluation_bytes, training_bytes};
use megacontext_base::decoder::DocumentShape;
use megacontext_base::device::Device;
use serde::Serialize;

use super::{GistRunConfig, Passages};
use crate::error::{PluginError, Result};
use crate::jobs::Adapted;
use crate::train::device_plan::{DevicePlan, with_device};
use crate::train::plan::{F32, Load, available_bytes, bytes, count, resident_bytes};

/// Bytes that a run takes, by kind.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct GistPlan {
    /// What the process held when it planned, the text apart.
    pub program: u64,
    /// Tokens of the text, and tables of positions.
    pub data: u64,
    /// The base model, and what is on it.
    pub weights: u64,
    /// GistNet, its gradients and its optimiser's moments; the network that stability holds it to.
    pub network: u64,
    /// Passages that are kept.
    pub passages: u64,
    /// Buffers of passes over documents and over rows.
    pub passes: u64,
    /// Packed operands of products, all threads together.
    pub packed: u64,
    /// What a step holds besides: passages that are not kept, GistNet's graph, rows.
    pub step: u64,
    /// What a validation holds besides; not at the same time as a step.
    pub validation: u64,
    /// The most there is at one time.
    pub total: u64,
    /// What the run takes of a GPU, where its passes run on one.
    pub device: Option<DevicePlan>,
}

/// Values that GistNet's graph keeps of an entry and block of the transformer, in widths of the model: the stream and its
/// norm; q and k with their forms after rotation and norm, v; mixed values and their product; the stream and its norm once
/// more; two widths of 4 of the MLP and its product.
const KEPT_WIDTHS: u64 = 22;
/// The same of an entry for all blocks together: the children, and with a token before them; gradients on their way back, of
/// the MLP's two widths of 4 and the streams beside them.
const ONCE_WIDTHS: u64 = 2 + 10;

/// The same while the entropy of attention is looked at, beside one block's graph: queries, keys and values once more, and
/// those that are read in f64.
const ENTROPY_WIDTHS: u64 = 8 + 6;

/// Values per parameter of a network that learns, besides its own: gradients, two moments; and candle's gradients before they are
/// added up.
pub(in crate::train) const LEARNING: u64 = 4;

/// Bytes of GistNet's graph over `entries` entries of a model of this width, as far as it is the processor's.
pub(in crate::train) fn graph_bytes(
    network: &GistNetConfig,
    width: u64,
    entries: u64,
    device: &Device,
) -> u64 {
    let none = network.mode == Mode::Mean || network.goes_to(device);
    let layers = if none { 0 } else { network.layers as u64 };
    F32 * width * entries * (KEPT_WIDTHS * layers + ONCE_WIDTHS)
}

impl GistPlan {
    /// Plans a resolved run over the text to learn from, to choose by and to test on; what it would hold must fit.
    ///
    /// # Errors
    /// When it does not, with the numbers and what would help.
    pub(crate) fn new(
        config: &GistRunConfig,
        adapted: &Adapted,
        text: &Passages,
        held_out: &[Vec<u32>],
        test: &[Vec<u32>],
        device: &Device,
    ) -> Result<Self> {
        let tokens: usize = text.tokens.iter().chain(held_out).chain(test).map(Vec::len).sum();
        let program = resident_bytes().unwrap_or(0).saturating_sub(F32 * tokens as u64);
        let plan = Self::beside(config, adapted, text, held_out, tokens, program, device)?;
        // What the process holds is no longer free, and is part of the plan.
        let free = available_bytes().map(|free| free + resident_bytes().unwrap_or(0));
        let budget = config.memory_budget_bytes.or(free).unwrap_or(u64::MAX);
        let mut help = vec!["fewer passages_per_step", "fewer spans_per_passage", "a smaller context"];
        help.extend((config.passage_bytes > 0).then_some("fewer passage_bytes"));
        if let Some(plan) = &plan.device {
            plan.check(config.dtype, &help)?;
        }
        if plan.total > budget {
            help.extend((!config.dtype.stores_bf16()).then_some("--dtype bf16"));
            return Err(PluginError::memory(format!(
                "the run needs about {}, but may use {}: {}. What would help: {}",
                bytes(plan.total),
                bytes(budget),
                plan.kinds(),
                help.join(", ")
            )));
        }
        Ok(plan)
    }

    /// The plan beside `program` bytes that the process holds already, the text's `tokens` not among them.
    fn beside(
        config: &GistRunConfig,
        adapted: &Adapted,
        text: &Passages,
        held_out: &[Vec<u32>],
        tokens: usize,
        program: u64,
        device: &Device,
    ) -> Result<Self> {
        let (model, e) = (&adapted.config, adapted.config.hidden_size as u64);
        let context = config.context.unwrap_or(0);
        let load = Load {
            model,
            lora: adapted.lora.as_ref(),
            learning: &[],
            dtype: config.dtype,
            entries: 0,
            context,
            evaluated: 0,
            data_tokens: tokens,
            program,
            on_gpu: !device.is_cpu(),
        };
        let base = load.memory(true);
        let network = config.network.of(model);
        let graph = |entries: u64| graph_bytes(&network, e, entries, device);
        let anchor = u64::from(config.stages.iter().any(|stage| stage.loss.stability != 0.0));
        let of_network = (1 + LEARNING + anchor) * F32 * network.parameters() as u64;

        let hidden = config.stages.iter().any(|stage| stage.kl != 0.0);
        // The entries' values, which are the host's on every device.
        let values = |entries: usize| F32 * entries as u64 * e;
        let passage = |entries: usize, hidden: bool| {
            let shape = DocumentShape { entries, precision: config.dtype, hidden };
            shape.bytes(model) + values(entries)
        };
        // Of the held-out text, one for each pattern.
        let patterns = 1 + u64::from(!matches!(config.sparse(), Ok(None)));
        let validated: u64 = held_out.iter().map(|tokens| patterns * passage(tokens.len(), false)).sum();
        let validated_values: u64 = held_out.iter().map(|tokens| patterns * values(tokens.len())).sum();
        let for_validation = config.validation_bytes(model);
        let for_steps = config.passage_bytes - for_validation;
        let (mut kept, mut kept_values, mut fresh) = (0, 0, 0);
        // No more than the steps come by, the longest where they are not all.
        let mut lengths: Vec<usize> = text.tokens.iter().map(Vec::len).collect();
        lengths.sort_unstable_by_key(|length| std::cmp::Reverse(*length));
        for length in lengths.into_iter().take(config.steps() * config.passages_per_step) {
            let bytes = passage(length, hidden);
            if kept + bytes <= for_steps {
                kept += bytes;
                kept_values += values(length);
            } else {
                fresh += 1;
            }
        }
        let validated_kept = validated.min(for_validation);
        let kept = kept + validated_kept;
        // As large a part of them as of all.
        let share = validated_kept as f64 / validated.max(1) as f64;
        let kept_values = kept_values + (validated_values as f64 * share) as u64;
        let fresh = fresh.min(config.passages_per_step as u64);
        let (fresh, fresh_values) = (fresh * passage(context, hidden), fresh * values(context));
        let validating = patterns * passage(context, false);
        let [fresh_here, validating_here] = match device.is_cpu() {
            true => [fresh, validating],
            false => [fresh_values, patterns * values(context)],
        };

        let steps: Vec<Fullest> =
            config.stages.iter().map(|stage| Fullest::of(config, stage, context)).collect();
        let most = |of: &dyn Fn(&Fullest) -> u64| steps.iter().map(of).max().unwrap_or(0);
        let step = fresh_here + most(&|step| graph(step.seen) + step.rows_bytes(e));
        let longest = config.longest_horizon();
        let measured = Rows {
            count: config.validation.blocks.min(places(context, network.block, 1, longest).len()),
            longest: longest - 1 + Baseline::MOST_TOKENS,
        };
        // Blocks of a passage pass GistNet at most so many at a time; then the attention of some of all is looked at.
        let blocks = measured.count.max(network.block * places(context, network.block, 2, longest).len());
        let chunk = (blocks * network.block).min(network.entries_at_once());
        let looked_at = (held_out.len() * measured.count).min(LOOKED_AT) * (network.block + 1);
        let looked_at = F32 * e * looked_at as u64 * (KEPT_WIDTHS + ENTROPY_WIDTHS);
        let validation = (validating_here + measured.bytes(e) + graph(chunk as u64)).max(looked_at);

        let pass =
            |entries: usize| PassShape { entries, precision: config.dtype, lora: adapted.lora.as_ref() };
        let learned = steps.iter().map(|step| step.rows.at_once()).max().unwrap_or(0);
        let trained = training_bytes(model, pass(learned), model.num_hidden_layers, true);
        // The buffers of rows serve documents too, those that walk back apart.
        let [own, larger] = [learned, context.max(learned).max(measured.at_once())]
            .map(|entries| evaluation_bytes(model, pass(entries)));
        let held = trained.activations + trained.workspace + larger.activations + larger.workspace;
        let passes = held - own.activations - own.workspace + trained.loss.max(larger.loss);
        let on_gpu = gpu::training_bytes(model, pass(learned), model.num_hidden_layers, true, &[])
            .beside(gpu::evaluation_bytes(model, pass(context.max(learned).max(measured.at_once()))));
        // Documents of a step, or of a validation, beside those that are kept, and what a divergence from them takes.
        let validating_there = validating - patterns * values(context);
        let documents = kept - kept_values + (fresh - fresh_values).max(validating_there);
        let divergence = if hidden { gpu::divergence_bytes(model, pass(learned)) } else { 0 };
        // All graphs of a step are there together; what stability holds gists to has none. A validation has none either, and the
        // best network is measured beside the last one in the end.
        let seen = most(&|step| step.seen) as usize;
        let held_to = if anchor > 0 { network.gpu_bytes(device, seen, false) } else { GpuBytes::default() };
        let best = network.gpu_bytes(device, chunk, false);
        let on_gpu = on_gpu.with(network.gpu_bytes(device, seen, true)).with(best).with(held_to);
        let device = DevicePlan::of(device, on_gpu, documents + divergence)?;
        // Of what is kept no more than the entries' values is left here.
        let (passes, kept) = match device {
            None => (passes, kept),
            Some(_) => (0, kept_values),
        };

        let mut plan = Self {
            program,
            data: base.data,
            weights: base.weights + adapted.beyond,
            network: of_network,
            passages: kept,
            passes,
            packed: base.packed,
            step,
            validation,
            total: 0,
            device,
        };
        let model = plan.program + plan.data + plan.weights;
        let running =
            plan.network + plan.passages + plan.passes + plan.packed + plan.step.max(plan.validation);
        plan.total = model + running.max(adapted.read);
        Ok(plan)
    }

    fn kinds(&self) -> String {
        format!(
            "program and text {}, weights {}, GistNet {}, passages {}, passes {}, a step {}, a validation {}",
            bytes(self.program + self.data),
            bytes(self.weights),
            bytes(self.network),
            bytes(self.passages),
            bytes(self.passes + self.packed),
            bytes(self.step),
            bytes(self.validation)
        )
    }

    /// The plan in a sentence.
    pub fn text(&self, steps: usize, parameters: usize) -> String {
        let text = format!(
            "plan: at most about {} of memory ({}); {steps} steps; {} parameters of GistNet learn",
            bytes(self.total),
            self.kinds(),
            count(parameters as u64)
        );
        with_device(text, self.device.as_ref())
    }
}

/// Rows over one document.
#[derive(Clone, Copy)]
pub(in crate::train) struct Rows {
    pub count: usize,
    /// Entries of the longest.
    pub longest: usize,
}

impl Rows {
    /// Entries that run together.
    pub fn at_once(self) -> usize {
        self.count.min((ENTRIES_AT_ONCE / self.longest.max(1)).max(1)) * self.longest
    }

    /// Their own entries.
    pub fn bytes(self, width: u64) -> u64 {
        F32 * width * (self.count * self.longest) as u64
    }
}

/// The fullest step of a stage.
struct Fullest {
    /// Of a passage.
    rows: Rows,
    passages: usize,
    /// Entries that GistNet sees, over all levels.
    seen: u64,
}

impl Fullest {
    fn of(config: &GistRunConfig, stage: &Stage, context: usize) -> Self {
        let k = config.network.block;
        let [narrow, wide] = [1, 2].map(|lod| places(context, k, lod, stage.horizon).len());
        let count = config.spans_per_passage;
        let count = if stage.run == 1 { count.min(narrow) } else { count };
        let run = stage.run.min(narrow.max(1));
        let wide = if stage.level2 > 0.0 { count.min(wide) } else { 0 };
        // A token before a block's own; a span of the second level is K blocks and one over them.
        let block = k as u64 + u64::from(config.network.mode == Mode::Transformer);
        let blocks = (count - wide) * run + wide * (k + 1);
        Self {
            rows: Rows { count, longest: stage.horizon - 1 + run },
            passages: config.passages_per_step,
            seen: (config.passages_per_step * blocks) as u64 * block,
        }
    }

    /// The rows of all passages, and the gradient of those of one.
    fn rows_bytes(&self, width: u64) -> u64 {
        (self.passages as u64 + 1) * self.rows.bytes(width)
    }
}
