//! What a decoder takes of a GPU's memory, said before a pass runs.
//!
//! Counted as the machine of the private module `machine::gpu` allocates it: copies of the parameters in the storage that reads them, what
//! blocks keep and share, gradients of what learns for as long as a step runs, and the most that one call of a linear layer, of
//! attention or of the loss has beside its operands; and what the optimiser has between steps.
//!
//! Shapes: as in [`super`]; P is the storage of products, f32 or bf16. Units: bytes.
//! Left out: what the driver takes for its context, and rounding of allocations.

use megacontext_kernels::linear::LoraShape;
use megacontext_kernels::precision::Precision;
use serde::Serialize;

use super::{PassShape, Sizes, keys_values_bytes};
use crate::config::DecoderConfig;
use crate::lora::{LoraKind, LoraModules};
use crate::params::Group;

/// Logits alive at one time, in bytes of f32.
pub const LOGIT_BYTES: usize = 256 << 20;
/// f32 sums of a linear layer that are rounded a part of the rows at a time.
const PART: u64 = 8 << 20;
/// Values of a parameter that are copied to the device at a time, where they are stored otherwise there.
pub const PIECE: usize = 8 << 20;
/// What cuBLASLt works in, on Hopper; less on what came before it.
pub const BLAS: u64 = 32 << 20;

/// Entries whose logits are alive at one time.
pub fn chunk_rows(vocab: usize) -> usize {
    (LOGIT_BYTES / (4 * vocab.max(1))).clamp(1, 1 << 16)
}

/// Bytes on a GPU, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GpuBytes {
    /// Copies of parameters, what learns among them, and what products work in.
    pub weights: u64,
    /// Gradients of what learns.
    pub gradients: u64,
    /// Moments of what learns, its values in f32 where products read 16 bits, and gradients of the micro-batches before.
    pub optimizer: u64,
    /// Inputs of blocks, and what blocks keep for their backward pass.
    pub activations: u64,
    /// What all blocks share, rotation tables and attention's bounds among it.
    pub workspace: u64,
    /// The most that a single call has beside its operands, over the gradients that there are by then: the loss's logits, mostly.
    pub passing: u64,
}

impl GpuBytes {
    /// Of passes of one model whose buffers are there at one time, and which run one after another.
    pub fn beside(self, other: Self) -> Self {
        Self {
            weights: self.weights.max(other.weights),
            gradients: self.gradients.max(other.gradients),
            optimizer: self.optimizer.max(other.optimizer),
            activations: self.activations + other.activations,
            workspace: self.workspace + other.workspace,
            passing: self.passing.max(other.passing),
        }
    }

    /// With what another model has there, whose calls and this one's come one after another.
    pub fn with(self, other: Self) -> Self {
        Self {
            weights: self.weights + other.weights,
            gradients: self.gradients + other.gradients,
            optimizer: self.optimizer + other.optimizer,
            activations: self.activations + other.activations,
            workspace: self.workspace + other.workspace,
            passing: self.passing.max(other.passing),
        }
    }

    /// With an optimiser that steps there ([`optimizer_bytes`]).
    pub fn with_optimizer(self, bytes: u64) -> Self {
        Self { optimizer: self.optimizer + bytes, ..self }
    }

    /// Of all kinds.
    pub fn total(self) -> u64 {
        let Self { weights, gradients, optimizer, activations, workspace, passing } = self;
        weights + gradients + optimizer + activations + workspace + passing
    }
}

/// Storage of products.
fn stored(precision: Precision) -> u64 {
    if precision == Precision::F32 { 4 } else { 2 }
}

fn count(shape: &[usize]) -> u64 {
    shape.iter().product::<usize>() as u64
}

/// Is this tensor of LoRA's read by linear layers of the device? What changes embedding and head is the host's.
fn on_device(lora: &LoraModules, name: &str) -> bool {
    let linear = lora.modules.iter().filter(|module| module.kind == LoraKind::Linear);
    linear.into_iter().any(|module| {
        let [a, b] = module.fixed_names();
        [module.a_name(), module.b_name(), a, b].iter().any(|own| own == name)
    })
}

/// Copies of a model's parameters.
pub fn weights_bytes(config: &DecoderConfig, precision: Precision, lora: Option<&LoraModules>) -> u64 {
    let product = stored(precision);
    let (embedding, head) = (config.embedding_name(), config.head_name());
    // Rows of tokens are gathered as activations are stored, and read by the head as products are.
    let table = if precision.stores_bf16() { 2 } else { 4 };
    let of = |(name, shape): (String, Vec<usize>)| {
        let values = count(&shape);
        match config.group_of(&name) {
            Group::Norms => 4 * values,
            _ if name.ends_with(".bias") => 4 * values,
            _ if name == embedding && embedding == head && table != product => (table + product) * values,
            _ if name == embedding => table * values,
            _ => product * values,
        }
    };
    let factors = lora.map_or(0, |lora| {
        let all = lora.parameters().into_iter().chain(lora.fixed());
        all.filter(|(name, _)| on_device(lora, name)).map(|(_, shape)| product * count(&shape)).sum()
    });
    config.tensors().into_iter().map(of).sum::<u64>() + factors + BLAS
}

/// Gradients of the groups that learn.
pub fn gradient_bytes(config: &DecoderConfig, learning: &[Group], lora: Option<&LoraModules>) -> u64 {
    let whole = config.tensors().into_iter().filter(|(name, _)| learning.contains(&config.group_of(name)));
    let whole: u64 = whole.map(|(_, shape)| count(&shape)).sum();
    let factors = lora.filter(|_| learning.contains(&Group::Lora)).map_or(0, |lora| {
        let all = lora.parameters().into_iter();
        let on_device = |name: &str| on_device(lora, name) || name.ends_with(".lora_magnitude_vector");
        all.filter(|(name, _)| on_device(name)).map(|(_, shape)| count(&shape)).sum()
    });
    4 * (whole + factors)
}

/// What an optimiser has of the groups that learn; `several` micro-batches come before a step.
pub fn optimizer_bytes(
    config: &DecoderConfig,
    precision: Precision,
    learning: &[Group],
    lora: Option<&LoraModules>,
    several: bool,
) -> u64 {
    let gradients = gradient_bytes(config, learning, lora);
    // Norms and biases are read in f32.
    let narrow = |(name, _): &(String, Vec<usize>)| {
        learning.contains(&config.group_of(name))
            && config.group_of(name) != Group::Norms
            && !name.ends_with(".bias")
    };
    let values = match precision {
        Precision::F32 => 0,
        _ => {
            let whole = config.tensors().into_iter().filter(narrow).map(|(_, shape)| 4 * count(&shape));
            whole.sum::<u64>() + gradients - gradient_bytes(config, learning, None)
        }
    };
    let before = if several { gradients } else { 0 };
    2 * gradients + values + before
}

impl Sizes {
    /// What linear layers convert operands into: inputs, where activations are not stored as products are, and walking back
    /// gradients.
    fn rooms(&self, precision: Precision, backward: bool, fused: bool) -> u64 {
        let x = match precision {
            Precision::Mixed => self.e.max(self.q).max(self.f),
            _ => 0,
        };
        let g = match precision {
            _ if !backward => 0,
            Precision::F32 => 0,
            // Those of gate, up, q, k and v are f32 too.
            Precision::Mixed => self.e.max(self.wide).max(self.q).max(self.kv),
            Precision::Bf16 => self.e.max(if fused { 3 * self.q } else { 0 }),
        };
        2 * self.n * (x + g)
    }

    /// What one call of attention has beside its operands.
    fn attending(&self, precision: Precision, backward: bool) -> u64 {
        let delta = if backward { 4 * self.heads } else { 0 };
        let copies = match (precision, backward) {
            (Precision::F32, _) | (Precision::Bf16, false) => 0,
            (Precision::Bf16, true) if self.qk_norms => 4 * self.q,
            (Precision::Bf16, true) => 2 * self.q,
            (Precision::Mixed, false) => 2 * (2 * self.q + 2 * self.kv),
            (Precision::Mixed, true) => 2 * (4 * self.q + 4 * self.kv),
        };
        self.n * (delta + copies)
    }

    /// What one call of a linear layer with LoRA has beside its operands.
    fn adapting(&self, precision: Precision, shapes: &[LoraShape], backward: bool) -> u64 {
        let product = stored(precision);
        let of = |shape: &LoraShape| {
            let (out, rank) = (shape.out as u64, shape.rank as u64);
            let reduced = product * self.n * rank * if backward || shape.initial { 2 } else { 1 };
            let part = (PART / out.max(1)).max(1).min(self.n);
            let narrow = precision.stores_bf16() || shape.dora;
            let sums = if narrow { 4 * part * out } else { 0 };
            let scaled = if shape.dora && backward { product * self.n * out } else { 0 };
            reduced + sums + scaled
        };
        shapes.iter().map(of).max().unwrap_or(0)
    }

    /// Logits of a chunk, their rows and, with gradients, the logits' as products read them and the rows'; the hidden states' gradient.
    fn losing(&self, precision: Precision, vocab: usize, backward: bool) -> u64 {
        let product = stored(precision);
        let chunk = (chunk_rows(vocab) as u64).min(self.n);
        let logits = 4 * chunk * vocab as u64;
        let rows = product * chunk * self.e;
        if !backward {
            return logits + rows;
        }
        let rounded = if product == 4 { 0 } else { product * chunk * vocab as u64 };
        logits + rows + rounded + 4 * chunk * self.e + 4 * self.n * self.e
    }
}

fn shapes(lora: Option<&LoraModules>) -> Vec<LoraShape> {
    let linear = lora.into_iter().flat_map(|lora| &lora.modules);
    let linear = linear.filter(|module| module.kind == LoraKind::Linear);
    linear.map(|m| LoraShape { out: m.out, rank: m.rank, dora: m.dora, initial: m.pissa }).collect()
}

/// A pass's bytes, walking back `walked` blocks or none; `ending` is what goes over the output head, of the pass's sizes mostly.
fn bytes(
    config: &DecoderConfig,
    pass: PassShape,
    ending: &Sizes,
    walked: Option<(usize, bool)>,
    learning: &[Group],
) -> GpuBytes {
    let s = Sizes::of(config, pass.precision, pass.entries);
    let (backward, fused) = (walked.is_some(), config.architecture.fused_qkv);
    let kept = match walked {
        None => s.kept(),
        Some((walked, recompute)) => {
            let blocks = if recompute { 1 } else { walked.max(1) } as u64;
            s.n * s.stored * s.e * walked as u64 + blocks * s.kept()
        }
    };
    let gradients = match backward {
        false => 0,
        true => s.n * (4 * (2 * s.e + s.wide.max(s.q)) + s.stored * (s.q + 2 * s.kv)),
    };
    let rotary = config.architecture.rotary_width as u64;
    let tables = 4 * s.n * rotary * if config.architecture.local_theta.is_some() { 2 } else { 1 };
    let bounds = 16 * s.n * (1 + config.architecture.windows().len() as u64);
    let call =
        s.attending(pass.precision, backward).max(s.adapting(pass.precision, &shapes(pass.lora), backward));
    // While the loss is made there is no gradient yet but the head's.
    let all = gradient_bytes(config, learning, pass.lora);
    let head = config.head_name();
    let head_values = (config.vocab_size * config.hidden_size) as u64;
    let head_learns = learning.contains(&config.group_of(head));
    let of_head = if head_learns { 4 * head_values } else { 0 };
    // The head's copy may be made anew before the logits are; where the embedding's serves, before anything else is there.
    let serves = head == config.embedding_name() && pass.precision.stores_bf16() && !head_learns;
    let copied =
        if pass.precision == Precision::F32 || serves { 0 } else { 4 * (PIECE as u64).min(head_values) };
    let loss = ending.losing(pass.precision, config.vocab_size, backward).max(copied) + of_head;
    GpuBytes {
        weights: weights_bytes(config, pass.precision, pass.lora),
        gradients: all,
        optimizer: 0,
        activations: kept,
        workspace: s.forward() + gradients + s.rooms(pass.precision, backward, fused) + tables + bounds,
        passing: loss.max(all + call) - all,
    }
}

/// What a step takes: `walked` blocks are walked back, and the gradients of what `learning` names are made.
pub fn training_bytes(
    config: &DecoderConfig,
    pass: PassShape,
    walked: usize,
    recompute: bool,
    learning: &[Group],
) -> GpuBytes {
    let ending = Sizes::of(config, pass.precision, pass.entries);
    bytes(config, pass, &ending, Some((walked, recompute)), learning)
}

/// What a divergence has beside a loss: the teacher's logits and rows, and the gradient that it is added to.
pub fn divergence_bytes(config: &DecoderConfig, pass: PassShape) -> u64 {
    let s = Sizes::of(config, pass.precision, pass.entries);
    let chunk = (chunk_rows(config.vocab_size) as u64).min(s.n);
    4 * chunk * (config.vocab_size as u64 + s.e) + 4 * s.n * s.e
}

/// What a forward pass alone takes.
pub fn evaluation_bytes(config: &DecoderConfig, pass: PassShape) -> GpuBytes {
    bytes(config, pass, &Sizes::of(config, pass.precision, pass.entries), None, &[])
}

/// What generating takes, as [`crate::generate::generation_bytes`]: keys and values of rows that become `rooms` entries long are among
/// the activations; the logits are those of one entry of every row.
pub fn generation_bytes(config: &DecoderConfig, pass: PassShape, rooms: &[usize]) -> GpuBytes {
    let entries = rooms.iter().sum();
    let ending = Sizes::of(config, pass.precision, rooms.len());
    let mut all = bytes(config, pass, &ending, None, &[]);
    all.activations += keys_values_bytes(config, pass.precision, entries);
    // The caches of a block as products read them, while it attends.
    if pass.precision == Precision::Mixed {
        let s = Sizes::of(config, pass.precision, pass.entries);
        let copies = keys_values_bytes(config, Precision::Bf16, entries) / config.num_hidden_layers as u64;
        all.passing = all.passing.max(copies + s.attending(pass.precision, false));
    }
    all
}
