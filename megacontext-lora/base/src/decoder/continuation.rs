//! Rows that continue one document: what the model predicts after entries other than the document's own, at the price of
//! those entries alone.
//!
//! Source: MegaContext's ΔNLL@H, which replaces a block of a document and asks how much worse the tokens behind it are
//! predicted. Attention is causal, so everything before the block is the same in both contexts. The document runs once,
//! without a graph: its keys and values and the NLL of every token are kept ([`Decoder::run_document`]). Each row then is
//! the document's first `prefix` entries, as they were computed, and R entries of its own
//! ([`Decoder::continue_document`]): n rows cost n·R entries instead of n·(T + R), and the loss is the same number.
//! Gradients are those of the rows' own entries, through the frozen model.
//!
//! The losses, per own entry: next-token NLL, and KL(document ‖ row) from what the model said at a stated place of the
//! document as it is.
//!
//! Shapes: T entries of the document, n rows of R entries, E model width, V vocabulary, W rotated width.
//! Units: nats, entries. Errors: sizes that do not agree; a model in which something learns, because the document's keys and
//! values are constants here; ALiBi, whose distances would have to follow entries that stand for more than one token.
//! Left out: gradients for the model's parameters; several documents in a call.

use candle_core::{Device, Tensor};
use megacontext_kernels::attention::prefix::Continuations;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::cpu::Values;
use megacontext_kernels::loss::IGNORE;
use megacontext_kernels::precision::Precision;
use megacontext_kernels::store::bf16;

use super::step::StepInput;
use super::{Decoder, Forward, HeldTables};
use crate::block::{Attending, Block, ByWindow};
use crate::buffers::{Activation, Buffers, ByStorage, KeysValues, Scratch, keys_values_bytes};
use crate::config::DecoderConfig;
use crate::error::{BaseError, Result};
use crate::gradients::Gradients;
use crate::machine::{AttentionSpec, Host, Machine, Scored, Teacher, on_machine};
use crate::params::Group;
use crate::rope::RopeTables;

/// A document that has run: tokens, or entries of any level.
pub struct Document {
    entries: usize,
    /// None of a document of entries.
    tokens: Vec<u32>,
    pattern: Pattern,
    /// NLL of every next token, T − 1 values; of entries, that of each one's target.
    nll: Vec<f32>,
    pub(crate) host: RanAs<Host>,
    #[cfg(feature = "cuda")]
    pub(crate) gpu: RanAs<crate::machine::gpu::Gpu>,
}

/// What a document leaves on one machine in one storage.
pub(crate) struct Ran<M: Machine, S: Activation> {
    blocks: Vec<KeysValues<M, S>>,
    /// The final norm's output [T, E], where a divergence from it is wanted.
    hidden: Option<M::Buffer<S>>,
}

impl<M: Machine, S: Activation> Default for Ran<M, S> {
    fn default() -> Self {
        Self { blocks: Vec::new(), hidden: None }
    }
}

impl<M: Machine, S: Activation> Ran<M, S> {
    fn bytes(&self) -> u64 {
        self.blocks.iter().map(KeysValues::bytes).sum::<u64>() + self.hidden.as_ref().map_or(0, M::bytes)
    }
}

/// What a document leaves on one machine.
pub(crate) type RanAs<M> = ByStorage<Ran<M, f32>, Ran<M, bf16>>;

impl<M: Machine> RanAs<M> {
    fn keeps_hidden(&self) -> bool {
        self.f32.hidden.is_some() || self.bf16.hidden.is_some()
    }
}

/// How large a document is.
#[derive(Clone, Copy, Debug)]
pub struct DocumentShape {
    /// T.
    pub entries: usize,
    /// Class.
    pub precision: Precision,
    /// Are its hidden states kept?
    pub hidden: bool,
}

impl DocumentShape {
    /// Bytes that a document of this shape holds.
    pub fn bytes(self, config: &DecoderConfig) -> u64 {
        let stored = if self.precision.stores_bf16() { 2 } else { 4 };
        let hidden = if self.hidden { stored * (self.entries * config.hidden_size) as u64 } else { 0 };
        keys_values_bytes(config, self.precision, self.entries) + hidden + 8 * self.entries as u64
    }
}

impl Document {
    /// T.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// Its tokens, T of them; none where it is one of entries.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The NLL of token i + 1, given those up to i, in nats: T − 1 values. Of a document of entries the NLL of every entry's
    /// target, T values, 0 where nothing is scored.
    pub fn nll(&self) -> &[f32] {
        &self.nll
    }

    /// The attention it ran with, and rows that continue it run with.
    pub fn pattern(&self) -> Pattern {
        self.pattern
    }

    /// Are its hidden states kept, which a divergence from it takes?
    pub fn keeps_hidden(&self) -> bool {
        #[cfg(feature = "cuda")]
        if self.gpu.keeps_hidden() {
            return true;
        }
        self.host.keeps_hidden()
    }

    /// Bytes held on the host.
    pub fn bytes(&self) -> u64 {
        self.host.bytes(Ran::bytes, Ran::bytes) + 4 * (self.tokens.len() + self.nll.len()) as u64
    }

    /// Bytes held on a GPU.
    pub fn device_bytes(&self) -> u64 {
        #[cfg(feature = "cuda")]
        return self.gpu.bytes(Ran::bytes, Ran::bytes);
        #[cfg(not(feature = "cuda"))]
        0
    }
}

/// Rows that continue a document.
#[derive(Clone, Copy)]
pub struct Continuation<'a> {
    /// Entries of the document before each of the n rows.
    pub prefix: &'a [usize],
    /// Own entries of each row that count; none means all R.
    pub lengths: Option<&'a [usize]>,
    /// The rows' own entries, [n, R, E].
    pub x_nre: &'a Tensor,
    /// Their rotation tables, [n·R, W/2].
    pub rope: &'a RopeTables,
    /// The token that each entry should predict, n·R of them, [`IGNORE`] where nothing is scored.
    pub targets: &'a [u32],
    /// The entry of the document whose prediction each scored entry is compared with; none where no divergence is wanted.
    pub teacher: Option<&'a [usize]>,
}

/// What is made smaller: Σ over scored entries of weight·(nll·NLL + kl·KL).
#[derive(Clone, Copy, Debug)]
pub struct Objective<'a> {
    /// Factor of NLL.
    pub nll: f32,
    /// Factor of KL(document ‖ row).
    pub kl: f32,
    /// Weight of each entry, n·R of them; none means 1.
    pub weights: Option<&'a [f32]>,
}

/// Losses of rows.
#[derive(Debug)]
pub struct ContinuationLoss {
    /// NLL of each entry's target in nats, n·R of them, 0 where nothing is scored.
    pub nll: Vec<f32>,
    /// KL(document ‖ row) of each entry in nats, likewise, where it was asked for.
    pub kl: Option<Vec<f32>>,
    /// Gradient of the objective for the rows' own entries, [n, R, E], where there was one.
    pub d_nre: Option<Tensor>,
}

/// Groups of the model's parameters.
const GROUPS: [Group; 5] = [Group::Base, Group::Embeddings, Group::Norms, Group::Lora, Group::Sigma];

fn input<T>(message: String) -> Result<T> {
    Err(BaseError::Input { message })
}

impl Decoder {
    /// Runs a document, for rows to continue it; `hidden` keeps its final hidden states as well, for a divergence from it.
    ///
    /// # Errors
    /// Fewer than two tokens, unknown tokens, tables of another length; no memory.
    pub fn run_document(
        &self,
        tokens: &[u32],
        pattern: Pattern,
        rope: &RopeTables,
        hidden: bool,
        buffers: &mut Buffers,
    ) -> Result<Document> {
        if tokens.len() < 2 {
            return input(format!("document: expected at least 2 tokens, got {}", tokens.len()));
        }
        let targets: Vec<u32> = tokens[1..].iter().copied().chain([IGNORE]).collect();
        let of = StepInput::Tokens(tokens);
        let mut document = self.run_input(of, &targets, pattern, rope, hidden, buffers)?;
        document.tokens = tokens.to_vec();
        document.nll.pop();
        Ok(document)
    }

    /// Runs a document of entries [T, E] of any level, as [`Decoder::run_document`] one of tokens. `targets` is the token that
    /// each should predict, [`IGNORE`] where nothing is scored.
    ///
    /// # Errors
    /// As there; no entry, or not one target for each.
    pub fn run_entries(
        &self,
        x_te: &[f32],
        targets: &[u32],
        pattern: Pattern,
        rope: &RopeTables,
        buffers: &mut Buffers,
    ) -> Result<Document> {
        let width = self.config.hidden_size;
        if targets.is_empty() || x_te.len() != targets.len() * width {
            return input(format!(
                "document: expected at least 1 entry and as many targets, got {} values of width {width} and {} targets",
                x_te.len(),
                targets.len()
            ));
        }
        self.run_input(StepInput::Entries(x_te), targets, pattern, rope, false, buffers)
    }

    fn run_input(
        &self,
        of: StepInput,
        targets: &[u32],
        pattern: Pattern,
        rope: &RopeTables,
        hidden: bool,
        buffers: &mut Buffers,
    ) -> Result<Document> {
        on_machine!(self, |machine: M, S| {
            self.run_in::<M, S>(machine, of, targets, pattern, rope, hidden, M::scratch(buffers))
        })
    }

    fn run_in<M: Machine, S: Activation>(
        &self,
        machine: &M,
        of: StepInput,
        targets: &[u32],
        pattern: Pattern,
        rope: &RopeTables,
        hidden: bool,
        scratch: &mut Scratch<M, S>,
    ) -> Result<Document> {
        let (c, entries) = (&self.config, targets.len());
        let with = Forward { pattern, rope, rows: &Rows::default(), dropout_seed: None };
        let attention = self.prepare(machine, 1, entries, &with)?;
        let tables = HeldTables::of(rope)?;
        let attending = Attending::Rows(&attention);
        let pass = self.pass(machine, attending, tables.slices(), None, entries, None)?;
        let mut ran = Ran { blocks: KeysValues::of_blocks(machine, c, entries)?, hidden: None };
        scratch.prepare(c.num_hidden_layers, c.num_hidden_layers, true);
        self.read_input(machine, of, &mut scratch.x)?;
        let Scratch { saved, workspace, x, stream, .. } = scratch;
        let saved = &mut saved[0];
        self.enter(machine, x, stream)?;
        for (layer, kept) in ran.blocks.iter_mut().enumerate() {
            Block::new(layer, &pass)?.forward(x, stream, saved, workspace)?;
            // The block's own buffers become the document's; those of the document serve the next block.
            std::mem::swap(&mut kept.k, &mut saved.k);
            std::mem::swap(&mut kept.v, &mut saved.v);
            std::mem::swap(x, stream);
        }
        let last = self.final_norm(machine, x, &mut workspace.normed)?;
        let nll = self.nll_of(machine, last, targets)?;
        if hidden {
            let mut kept = M::Buffer::default();
            machine.copy(last, &mut kept)?;
            ran.hidden = Some(kept);
        }
        let mut document = Document {
            entries,
            tokens: Vec::new(),
            pattern,
            nll,
            host: RanAs::default(),
            #[cfg(feature = "cuda")]
            gpu: RanAs::default(),
        };
        *M::ran_mut(&mut document) = ran;
        Ok(document)
    }

    /// Runs rows that continue a document; with an objective, its gradient for the rows' own entries too. `recompute`
    /// switches activation checkpointing on.
    ///
    /// # Errors
    /// See the module; a loss that is not finite.
    pub fn continue_document(
        &self,
        document: &Document,
        rows: &Continuation,
        objective: Option<Objective>,
        recompute: bool,
        buffers: &mut Buffers,
    ) -> Result<ContinuationLoss> {
        self.check_continuation(document, rows, objective)?;
        on_machine!(self, |machine: M, S| {
            self.continue_in::<M, S>(machine, document, rows, objective, recompute, M::scratch(buffers))
        })
    }

    fn check_continuation(
        &self,
        document: &Document,
        rows: &Continuation,
        objective: Option<Objective>,
    ) -> Result<()> {
        let (n, entries) = self.stream(rows.x_nre)?;
        if let Some(group) = GROUPS.into_iter().find(|group| self.params.learns(*group)) {
            return input(format!(
                "rows of a document: expected a frozen model, but its group {group} learns"
            ));
        }
        if self.config.positions.alibi {
            return input("rows of a document: expected a model without ALiBi, got one with it".to_string());
        }
        let counts = [
            ("prefixes", Some(rows.prefix.len()), n),
            ("targets", Some(rows.targets.len()), n * entries),
            ("teacher's entries", rows.teacher.map(<[usize]>::len), n * entries),
            ("weights", objective.and_then(|o| o.weights).map(<[f32]>::len), n * entries),
        ];
        for (what, got, expected) in counts {
            if let Some(got) = got.filter(|got| *got != expected) {
                return input(format!("rows of a document: expected {expected} {what}, got {got}"));
            }
        }
        let wants_kl = objective.is_some_and(|objective| objective.kl != 0.0);
        if wants_kl && rows.teacher.is_none() {
            return input(
                "rows of a document: expected the teacher's entries for a divergence, got none".into(),
            );
        }
        if let Some(teacher) = rows.teacher {
            if !document.keeps_hidden() {
                return input(
                    "rows of a document: expected one that keeps its hidden states, got one without".into(),
                );
            }
            let scored = teacher.iter().zip(rows.targets).filter(|(_, target)| **target != IGNORE);
            if let Some((at, _)) = scored.into_iter().find(|(at, _)| **at >= document.entries) {
                return input(format!(
                    "rows of a document: expected teacher's entries below {}, got {at}",
                    document.entries
                ));
            }
        }
        Ok(())
    }

    fn continue_in<M: Machine, S: Activation>(
        &self,
        machine: &M,
        document: &Document,
        rows: &Continuation,
        objective: Option<Objective>,
        recompute: bool,
        scratch: &mut Scratch<M, S>,
    ) -> Result<ContinuationLoss> {
        let c = &self.config;
        let (n, entries) = self.stream(rows.x_nre)?;
        let ran = M::ran::<S>(document);
        if ran.blocks.is_empty() {
            return input(
                "rows of a document: expected one that ran in the model's class and on its device, got another's"
                    .into(),
            );
        }
        self.check_tables(n, entries, rows.rope)?;
        let sizes = [n, entries, c.num_attention_heads, c.num_key_value_heads, c.head_dim];
        let continued = Continuations {
            prefix: rows.prefix.to_vec(),
            lengths: rows.lengths.map(<[usize]>::to_vec),
            lower: None,
        };
        let attention = ByWindow::new(document.pattern, c, |pattern| {
            let (scale, products) = (c.architecture.query_scale, self.precision.products());
            let spec = AttentionSpec { sizes, scale, pattern, products, slopes: None };
            machine.continuing(&spec, document.entries, &continued)
        })?;
        let tables = HeldTables::of(rows.rope)?;
        let attending = Attending::Document(&attention, &ran.blocks);
        let pass = self.pass(machine, attending, tables.slices(), None, n * entries, None)?;
        let x = rows.x_nre.contiguous()?;
        let x = Values::of(&x)?;
        let Some(objective) = objective else {
            machine.read(&x, &mut scratch.x)?;
            self.blocks(&pass, scratch, c.num_hidden_layers, true)?;
            let hidden = self.final_norm(machine, &scratch.x, &mut scratch.workspace.normed)?;
            let nll = self.nll_of(machine, hidden, rows.targets)?;
            let kl = match rows.teacher {
                None => None,
                Some(teacher) => {
                    Some(self.divergence_from(machine, hidden, ran, rows.targets, teacher, None)?.0)
                }
            };
            return Ok(ContinuationLoss { nll, kl, d_nre: None });
        };
        // Nothing of the model learns, so nothing is added here.
        let losses = machine.with_gradients(&mut Gradients::new(), |gradients| {
            self.walk(&pass, StepInput::Entries(&x), recompute, scratch, gradients, |hidden, _| {
                self.continuation_loss(machine, hidden, ran, rows, objective)
            })
        })?;
        let d = Tensor::from_vec(machine.to_host(&scratch.d)?, rows.x_nre.shape(), &Device::Cpu)?;
        Ok(ContinuationLoss { d_nre: Some(d), ..losses })
    }

    /// The losses of rows, and the objective's gradient for their hidden states.
    fn continuation_loss<M: Machine, S: Activation>(
        &self,
        machine: &M,
        hidden: &M::Buffer<S>,
        ran: &Ran<M, S>,
        rows: &Continuation,
        objective: Objective,
    ) -> Result<(ContinuationLoss, M::Hidden)> {
        let scored = Scored { targets: rows.targets, weights: objective.weights };
        let loss = machine.head_loss(self, hidden, scored, objective.nll, None, None)?;
        if !loss.sum().is_finite() {
            return Err(BaseError::NonFinite { what: "loss".to_string(), value: loss.sum() });
        }
        let mut d_hidden = match loss.d_hidden {
            Some(d_hidden) => d_hidden,
            None => machine.no_gradient(M::len(hidden))?,
        };
        let kl = match rows.teacher {
            None => None,
            Some(teacher) => {
                let wanted = (objective.kl != 0.0).then_some((objective, &mut d_hidden));
                let (kl, sum) = self.divergence_from(machine, hidden, ran, rows.targets, teacher, wanted)?;
                if !sum.is_finite() {
                    return Err(BaseError::NonFinite { what: "divergence".to_string(), value: sum });
                }
                Some(kl)
            }
        };
        Ok((ContinuationLoss { nll: loss.nll, kl, d_nre: None }, d_hidden))
    }

    /// KL(document ‖ row) of scored entries, 0 at others, and its sum; its gradient is added where it is wanted.
    fn divergence_from<M: Machine, S: Activation>(
        &self,
        machine: &M,
        hidden: &M::Buffer<S>,
        ran: &Ran<M, S>,
        targets: &[u32],
        teacher: &[usize],
        wanted: Option<(Objective, &mut M::Hidden)>,
    ) -> Result<(Vec<f32>, f64)> {
        let scored: Vec<usize> = (0..targets.len()).filter(|at| targets[*at] != IGNORE).collect();
        let places: Vec<usize> = scored.iter().map(|at| teacher[*at]).collect();
        let Some(of_document) = &ran.hidden else {
            return input(
                "rows of a document: expected one that keeps its hidden states, got one without".into(),
            );
        };
        let wanted = wanted.map(|(objective, into)| (objective.kl, objective.weights, into));
        let says = Teacher::RowsOf(of_document, &places);
        let found = machine.divergence(self, hidden, &scored, says, wanted)?;
        let mut kl = vec![0f32; targets.len()];
        for (at, value) in scored.iter().zip(&found) {
            kl[*at] = *value;
        }
        let sum = found.iter().map(|kl| f64::from(*kl)).sum();
        Ok((kl, sum))
    }
}
