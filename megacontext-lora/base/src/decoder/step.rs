//! A training step: the loss of a micro-batch, and the gradients of everything that learns.
//!
//! Training walks the blocks explicitly instead of taping the model: the forward pass keeps what each block needs for its
//! own backward pass (see the private module `block`), the backward pass hands the gradient down from block to block.
//! With recomputation on (activation checkpointing, Chen et al. 2016) only the blocks' inputs survive the forward pass;
//! with it off their intermediate results do. Both give the same bits. Blocks below the lowest parameter that learns are
//! never walked back.
//!
//! Shapes: as in [`super`]. Units: loss in nats. Errors: shapes that do not agree, a loss that is not finite; then no
//! gradient has been added.

use candle_core::{Device, Tensor};
use megacontext_kernels::cpu::Values;

use super::{Decoder, Forward, HeldTables, StepLoss};
use crate::block::{Attending, Pass};
use crate::buffers::{Activation, Scratch};
use crate::error::{BaseError, Result};
use crate::gradients::Gradients;
use crate::machine::{Machine, Scored, on_machine};
use crate::params::Group;
use crate::rope::SIGMA;
use crate::stack::Back;

impl Decoder {
    /// Does anything below block `layer` (or its own input) learn?
    fn learns_below(&self, layer: usize) -> bool {
        self.embedding_learns() || (0..layer).any(|l| self.block_learns(l))
    }

    fn block_learns(&self, layer: usize) -> bool {
        let lora = self.adapted().is_some_and(|lora| lora.in_block(layer));
        self.params.learns(Group::Base)
            || self.params.learns(Group::Norms)
            || (self.params.learns(Group::Sigma) && self.params.contains(SIGMA))
            || (lora && self.params.learns(Group::Lora))
    }

    /// The lowest block that is walked back: blocks below it and their inputs do not learn.
    pub fn lowest_learning_block(&self) -> usize {
        let layers = self.config.num_hidden_layers;
        (0..layers).find(|l| self.learns_below(*l) || self.block_learns(*l)).unwrap_or(layers)
    }

    /// Forward and backward of one micro-batch of `batch` rows of tokens: adds the gradients of `scale`·Σ NLL to
    /// `gradients`. `targets` are the next tokens, `IGNORE` where nothing is scored.
    ///
    /// `recompute` switches activation checkpointing on: less memory, one more forward pass.
    ///
    /// # Errors
    /// When shapes do not agree, the loss is not finite, or LoRA is merged into weights that learn; then nothing has been
    /// added.
    pub fn accumulate_gradients(
        &self,
        tokens: &[u32],
        batch: usize,
        targets: &[u32],
        with: &Forward,
        scale: f64,
        recompute: bool,
        gradients: &mut Gradients,
    ) -> Result<StepLoss> {
        if [Group::Base, Group::Lora].into_iter().any(|group| self.params.learns(group)) {
            self.refuse_merged("accumulate_gradients")?;
        }
        let length = Self::length(tokens, batch)?;
        if targets.len() != tokens.len() {
            let message = format!("targets: expected {batch} rows of {length}, got {} in all", targets.len());
            return Err(BaseError::Input { message });
        }
        let input = StepInput::Tokens(tokens);
        let step = Step { input, batch, targets, with, scale: scale as f32, recompute };
        self.accumulate_step(&step, gradients)
    }

    /// As [`Decoder::accumulate_gradients`], of given entries [B, T, E]; the gradient of the entries comes with the loss.
    ///
    /// # Errors
    /// As there.
    pub fn entry_gradients(
        &self,
        x_bte: &Tensor,
        targets: &[u32],
        with: &Forward,
        scale: f64,
        recompute: bool,
        gradients: &mut Gradients,
    ) -> Result<(StepLoss, Tensor)> {
        let (batch, length) = self.stream(x_bte)?;
        if targets.len() != batch * length {
            let message = format!("targets: expected {batch} rows of {length}, got {} in all", targets.len());
            return Err(BaseError::Input { message });
        }
        let x = x_bte.contiguous()?;
        let input = Values::of(&x)?;
        let input = StepInput::Entries(&input);
        let step = Step { input, batch, targets, with, scale: scale as f32, recompute };
        let loss = self.accumulate_step(&step, gradients)?;
        let d = on_machine!(self, |machine: M, S| {
            let mut buffers = gradients.take_passes();
            let d = machine.to_host(&M::scratch::<S>(&mut buffers).d);
            gradients.put_passes(buffers);
            d?
        });
        Ok((loss, Tensor::from_vec(d, x_bte.shape(), &Device::Cpu)?))
    }

    fn accumulate_step(&self, step: &Step, gradients: &mut Gradients) -> Result<StepLoss> {
        let mut buffers = gradients.take_passes();
        let loss = on_machine!(self, |machine: M, S| {
            machine.with_gradients(gradients, |gradients| {
                self.accumulate::<M, S>(machine, step, M::scratch(&mut buffers), gradients)
            })
        });
        gradients.put_passes(buffers);
        loss
    }

    fn accumulate<M: Machine, S: Activation>(
        &self,
        machine: &M,
        step: &Step,
        scratch: &mut Scratch<M, S>,
        gradients: &mut M::Gradients,
    ) -> Result<StepLoss> {
        let with = step.with;
        let entries = step.targets.len();
        let attention = self.prepare(machine, step.batch, entries / step.batch, with)?;
        let tables = HeldTables::of(with.rope)?;
        let spread = self.learning_spread(with.rope)?;
        let attending = Attending::Rows(&attention);
        let pass = self.pass(machine, attending, tables.slices(), spread, entries, with.dropout_seed)?;
        self.walk(&pass, step.input, step.recompute, scratch, gradients, |hidden, gradients| {
            self.step_loss(machine, hidden, step, gradients)
        })
    }

    /// Forward and backward through all that a pass walks; `loss` gives a value and the gradient of the hidden states. The
    /// gradient of given entries is left in `scratch.d`.
    pub(super) fn walk<M: Machine, S: Activation, L>(
        &self,
        pass: &Pass<M, S>,
        input: StepInput,
        recompute: bool,
        scratch: &mut Scratch<M, S>,
        gradients: &mut M::Gradients,
        loss: impl FnOnce(&M::Buffer<S>, &mut M::Gradients) -> Result<(L, M::Hidden)>,
    ) -> Result<L> {
        let (machine, c) = (pass.machine, &self.config);
        let len = pass.setting.entries * c.hidden_size;
        let given = matches!(input, StepInput::Entries(_));
        let lowest = if given { 0 } else { self.lowest_learning_block() };
        self.read_input(machine, input, &mut scratch.x)?;
        self.blocks(pass, scratch, lowest, recompute)?;
        let Scratch { workspace, x, d, .. } = &mut *scratch;
        let hidden = self.final_norm(machine, x, &mut workspace.normed)?;
        let (loss, d_hidden) = loss(hidden, gradients)?;
        machine.zeros(d, len)?;
        machine.hidden_backward(&self.last_norm(machine)?, x, &d_hidden, d, gradients)?;
        drop(d_hidden);
        let wanted = |layer| given || self.learns_below(layer);
        Back { lowest, recompute, fresh: true, wanted }.walk(pass, scratch, gradients)?;
        if !given && !self.embedding_learns() {
            return Ok(loss);
        }
        let Scratch { workspace, stream, d, .. } = scratch;
        if let Some(norm) = self.entry_norm(machine)? {
            // What it read is made again instead of kept.
            self.read_input(machine, input, stream)?;
            machine.zeros(&mut workspace.d_normed, len)?;
            machine.norm_backward(&norm, stream, d, &mut workspace.d_normed, gradients)?;
            machine.copy(&workspace.d_normed, d)?;
        }
        if let StepInput::Tokens(tokens) = input {
            machine.embedding_gradients(self, d, tokens, gradients)?;
        }
        Ok(loss)
    }

    pub(super) fn read_input<M: Machine, S: Activation>(
        &self,
        machine: &M,
        input: StepInput,
        out: &mut M::Buffer<S>,
    ) -> Result<()> {
        match input {
            StepInput::Tokens(tokens) => machine.gather(self, tokens, out),
            StepInput::Entries(values) => machine.read(values, out),
        }
    }

    /// The loss over the output head, and the gradient of the hidden states.
    fn step_loss<M: Machine, S: Activation>(
        &self,
        machine: &M,
        hidden: &M::Buffer<S>,
        step: &Step,
        gradients: &mut M::Gradients,
    ) -> Result<(StepLoss, M::Hidden)> {
        let (scored, seed) = (Scored { targets: step.targets, weights: None }, step.with.dropout_seed);
        let loss = machine.head_loss(self, hidden, scored, step.scale, seed, Some(gradients))?;
        let sum = loss.sum();
        if !sum.is_finite() {
            return Err(BaseError::NonFinite { what: "loss".to_string(), value: sum });
        }
        let d_hidden = loss.d_hidden.ok_or_else(|| BaseError::Input {
            message: "scale: expected a gradient scale other than 0, got 0".to_string(),
        })?;
        Ok((StepLoss { sum, count: loss.count }, d_hidden))
    }
}

/// What enters the first block.
#[derive(Clone, Copy)]
pub(super) enum StepInput<'a> {
    /// Tokens, whose embeddings may learn.
    Tokens(&'a [u32]),
    /// Embeddings [B, T, E], whose gradient is wanted.
    Entries(&'a [f32]),
}

/// What [`Decoder::accumulate_gradients`] is given.
struct Step<'a> {
    input: StepInput<'a>,
    batch: usize,
    targets: &'a [u32],
    with: &'a Forward<'a>,
    scale: f32,
    recompute: bool,
}
