//! A trainable Llama-family decoder: forward, and backward block by block.
//!
//! Source: the Llama architecture as `transformers` defines it (RMSNorm, rotary positions, grouped-query attention,
//! SwiGLU, no biases, tied or untied head). Attention pattern and positions are arguments of the forward pass.
//!
//! Shapes: B batch, T entries, E model width, H query heads, G kv heads, D head width, F feed-forward width,
//! V vocabulary; x_bte is the residual stream, tokens are row-major [B, T].
//! Units: loss in nats.
//!
//! Training walks the blocks explicitly instead of taping the model: the forward pass keeps what each block needs for its
//! own backward pass (see the private module `block`), the backward pass hands the gradient down from block to block.
//! With recomputation on (activation checkpointing, Chen et al. 2016) only the blocks' inputs survive the forward pass;
//! with it off their intermediate results do. Both give the same bits. Blocks below the lowest parameter that learns are
//! never walked back.
//!
//! Precision: a [`Precision`] decides how activations and frozen weights are stored and how products are computed; what
//! learns, gradients, sums, norms, softmax and the loss are f32 in every class. Embeddings given or asked for as tensors
//! are f32.
//!
//! Left out: KV cache and generation, other families.

use candle_core::{Device, Tensor};
use megacontext_kernels::attention::slices::Prepared;
use megacontext_kernels::attention::{Pattern, Rows, alibi_slopes};
use megacontext_kernels::cpu::Values;
use megacontext_kernels::linear::{Layer, Scratch as LinearScratch};
use megacontext_kernels::loss::{Gradient, head_cross_entropy};
use megacontext_kernels::precision::Precision;
use megacontext_kernels::store::{Store, bf16};
use megacontext_kernels::{embedding, norm};

use crate::block::{Block, Pass};
use crate::buffers::{Activation, Buffer, Buffers, Scratch};
use crate::config::DecoderConfig;
use crate::error::{BaseError, Result};
use crate::gradients::Gradients;
use crate::lora::LoraConfig;
use crate::params::{Group, ParamStore};
use crate::projection::Setting;
use crate::random::Random;
use crate::rope::{RopeTables, SIGMA, Spread};
use crate::weights::Weights;

mod merged;

use merged::Merged;

const FINAL_NORM: &str = "model.norm.weight";

/// What a forward pass is told besides its input.
#[derive(Clone, Copy)]
pub struct Forward<'a> {
    /// Which keys a query sees.
    pub pattern: Pattern,
    /// Rotation tables, [T, D/2] or [B·T, D/2].
    pub rope: &'a RopeTables,
    /// Row lengths and packed segments.
    pub rows: &'a Rows,
    /// Seed of LoRA's dropout; none switches dropout off (evaluation).
    pub dropout_seed: Option<u64>,
}

/// Loss of one micro-batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepLoss {
    /// Σ NLL in nats.
    pub sum: f64,
    /// Scored positions.
    pub count: usize,
}

/// A decoder with its parameters.
pub struct Decoder {
    config: DecoderConfig,
    params: ParamStore,
    lora: Option<LoraConfig>,
    precision: Precision,
    merged: Option<Merged>,
}

/// Is a parameter of this group stored in bf16 while it is frozen? Norms are not: they are small and f32 is what reads them.
pub fn stored_narrow(group: Group, precision: Precision) -> bool {
    precision.stores_bf16() && matches!(group, Group::Base | Group::Embeddings)
}

/// Brings one tensor of a folder into the store, mapped where it can stay in its file.
fn read_parameter(
    params: &mut ParamStore,
    weights: &Weights,
    name: String,
    group: Group,
    shape: &[usize],
    precision: Precision,
    learns: bool,
) -> Result<()> {
    let narrow = stored_narrow(group, precision) && !learns;
    if let Some(tensor) = weights.mapped(&name, shape, narrow)?.filter(|_| !learns) {
        params.insert_mapped(name, group, tensor)
    } else if narrow {
        let values = weights.values::<bf16>(&name, shape)?;
        params.insert_values(name, group, values, shape)
    } else {
        let values = weights.values::<f32>(&name, shape)?;
        params.insert_values(name, group, values, shape)
    }
}

/// Until blocks follow the whole description.
fn only_llama(config: &DecoderConfig) -> Result<()> {
    match config.family {
        crate::config::Family::Llama => Ok(()),
        other => {
            Err(BaseError::Input { message: format!("expected a llama model, got {}", other.model_type()) })
        }
    }
}

impl Decoder {
    /// Opens a model folder's weights. Those that are frozen and stored as they are used stay in their files, mapped, and
    /// are read when they are needed (the first pass looks at all of them, see [`ParamStore::check_mapped`]); the others
    /// are read now. In class bf16 those of linear layers and embeddings are stored in bf16 unless their group is in
    /// `learning`, the groups that are going to learn (a hint: see [`ParamStore::set_learning`]).
    pub fn from_weights(
        config: DecoderConfig,
        weights: &Weights,
        precision: Precision,
        learning: &[Group],
    ) -> Result<Self> {
        only_llama(&config)?;
        let mut params = ParamStore::new();
        for (name, shape) in config.tensors() {
            let group = config.group_of(&name);
            read_parameter(&mut params, weights, name, group, &shape, precision, learning.contains(&group))?;
        }
        Ok(Self { config, params, lora: None, precision, merged: None })
    }

    /// Reads one parameter of the model anew from its folder, as [`Decoder::from_weights`] did.
    ///
    /// # Errors
    /// When the model has no tensor of this name, or its group learns.
    pub fn reread(&mut self, weights: &Weights, name: &str) -> Result<()> {
        let group = self.config.group_of(name);
        let fail = |message: &str| {
            Err(BaseError::Parameter { name: name.to_string(), message: message.to_string() })
        };
        let Some((_, shape)) = self.config.tensors().into_iter().find(|(known, _)| known == name) else {
            return fail("expected a tensor of the model's folder");
        };
        if self.params.learns(group) {
            return fail("expected a frozen group, got one that learns");
        }
        read_parameter(&mut self.params, weights, name.to_string(), group, &shape, self.precision, false)
    }

    /// A model to pre-train: weights N(0, 0.02²), those that write to the residual stream divided by √(2·layers)
    /// (Radford et al. 2019), gains 1, biases 0. Stored as [`Decoder::from_weights`] does.
    pub fn random(
        config: DecoderConfig,
        seed: u64,
        precision: Precision,
        learning: &[Group],
    ) -> Result<Self> {
        fn values<S: Store>(len: usize, mut next: impl FnMut() -> f32) -> Vec<S> {
            (0..len).map(|_| S::put(next())).collect()
        }
        let mut params = ParamStore::new();
        let neutral = config.architecture.norm.neutral();
        let shrink = 1.0 / (2.0 * config.num_hidden_layers as f64).sqrt();
        for (name, shape) in config.tensors() {
            let mut random = Random::named(seed, &name);
            let group = config.group_of(&name);
            let std = 0.02 * if config.writes_to_stream(&name) { shrink } else { 1.0 };
            let bias = name.ends_with(".bias");
            let next = || match group {
                _ if bias => 0.0,
                Group::Norms => neutral,
                _ => (random.normal() * std) as f32,
            };
            let len = shape.iter().product();
            if stored_narrow(group, precision) && !learning.contains(&group) {
                params.insert_values(name, group, values::<bf16>(len, next), &shape)?;
            } else {
                params.insert_values(name, group, values::<f32>(len, next), &shape)?;
            }
        }
        Ok(Self { config, params, lora: None, precision, merged: None })
    }

    /// Gives a tied model an output head of its own, a copy of the embedding.
    ///
    /// # Errors
    /// When it has one already.
    pub fn untie(&mut self) -> Result<()> {
        let embedding = self.config.embedding_name();
        let config = self.config.untied();
        let head = config.head_name();
        let fail =
            |message: &str| BaseError::Parameter { name: head.to_string(), message: message.to_string() };
        if !self.config.tie_word_embeddings {
            return Err(fail("expected a tied model, got one with a head of its own"));
        }
        let copy = self.params.get(embedding).ok_or_else(|| fail("the model has no embedding"))?;
        self.params.insert(head, self.config.group_of(head), copy)?;
        self.config = config;
        Ok(())
    }

    /// Attaches LoRA whose factors are already, or will be, parameters `<module>.lora_A.weight` and `lora_B`.
    ///
    /// # Errors
    /// When a factor is missing or has another shape, or LoRA is merged into the weights.
    pub fn set_lora(&mut self, lora: Option<LoraConfig>) -> Result<()> {
        self.refuse_merged("set_lora")?;
        if let Some(lora) = &lora {
            lora.validate(&self.config)?;
            for (module, out, inp) in lora.modules(&self.config) {
                for (name, shape) in [("lora_A", [lora.r, inp]), ("lora_B", [out, lora.r])] {
                    let name = format!("{module}.{name}.weight");
                    let found = self.params.shape(&name);
                    if found != Some(&shape) {
                        return Err(BaseError::Parameter {
                            name,
                            message: format!("expected shape {shape:?}, got {found:?}"),
                        });
                    }
                }
            }
        }
        self.lora = lora;
        Ok(())
    }

    /// Attaches fresh LoRA factors.
    pub fn attach_lora(&mut self, lora: LoraConfig, seed: u64) -> Result<()> {
        lora.attach(&self.config, &mut self.params, seed)?;
        self.set_lora(Some(lora))
    }

    /// Adds the trainable scales of sigma, 1 for each of `levels` levels, where there are none yet.
    pub fn attach_sigma(&mut self, levels: usize) -> Result<()> {
        if self.params.contains(SIGMA) {
            return Ok(());
        }
        self.params.insert_values(SIGMA, Group::Sigma, vec![1f32; levels], &[levels])
    }

    /// The scales of sigma by level, if the model has them.
    pub fn sigma_scales(&self) -> Option<Vec<f32>> {
        self.params.values(SIGMA).ok().map(|scales| scales.to_f32())
    }

    /// Sizes and settings.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Precision class.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// LoRA, if attached and not merged into the weights.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_ref()
    }

    /// Parameters by name.
    pub fn params(&self) -> &ParamStore {
        &self.params
    }

    /// Parameters by name, to change which groups learn.
    pub fn params_mut(&mut self) -> &mut ParamStore {
        &mut self.params
    }

    /// Length of rows of tokens.
    fn length(tokens: &[u32], batch: usize) -> Result<usize> {
        if batch == 0 || !tokens.len().is_multiple_of(batch) {
            return Err(BaseError::Input {
                message: format!("tokens: expected a multiple of the {batch} rows, got {}", tokens.len()),
            });
        }
        Ok(tokens.len() / batch)
    }

    /// Embeddings of tokens, row-major.
    fn gather<S: Store>(&self, tokens: &[u32], out: &mut [S]) -> Result<()> {
        let width = self.config.hidden_size;
        Ok(embedding::gather_into(
            self.params.values(self.config.embedding_name())?.weight(),
            width,
            tokens,
            out,
        )?)
    }

    /// Embeddings of tokens, [B, T, E], outside any graph.
    pub fn embed(&self, tokens: &[u32], batch: usize) -> Result<Tensor> {
        let length = Self::length(tokens, batch)?;
        let mut rows = vec![0f32; tokens.len() * self.config.hidden_size];
        self.gather(tokens, &mut rows)?;
        Ok(Tensor::from_vec(rows, (batch, length, self.config.hidden_size), &Device::Cpu)?)
    }

    fn prepare(&self, batch: usize, length: usize, with: &Forward) -> Result<Prepared> {
        let c = &self.config;
        let half = c.head_dim / 2;
        let shape = |t: &Tensor| t.dims() == [length, half] || t.dims() == [batch * length, half];
        if !shape(&with.rope.cos_nd) || with.rope.cos_nd.dims() != with.rope.sin_nd.dims() {
            return Err(BaseError::Input {
                message: format!(
                    "rope tables: expected [{length}, {half}] or [{}, {half}], got {:?} and {:?}",
                    batch * length,
                    with.rope.cos_nd.dims(),
                    with.rope.sin_nd.dims()
                ),
            });
        }
        self.params.check_mapped()?;
        let sizes = [batch, length, c.num_attention_heads, c.num_key_value_heads, c.head_dim];
        let scale = 1.0 / (c.head_dim as f64).sqrt();
        let prepared =
            Prepared::new(sizes, scale, with.pattern, with.rows)?.with_products(self.precision.products());
        if !c.positions.alibi {
            return Ok(prepared);
        }
        let prepared = prepared.with_slopes(&alibi_slopes(c.num_attention_heads))?;
        match with.rope.mu.as_deref() {
            None => Ok(prepared),
            Some(mu) if mu.len() == length => Ok(prepared.with_positions(mu)?),
            Some(mu) => Err(BaseError::Input {
                message: format!(
                    "rope tables: with ALiBi expected one position for each of {length} entries, the same in every row, \
                     got {}",
                    mu.len()
                ),
            }),
        }
    }

    /// Batch and length of a residual stream.
    fn stream(&self, x_bte: &Tensor) -> Result<(usize, usize)> {
        match x_bte.dims() {
            &[batch, length, width] if width == self.config.hidden_size => Ok((batch, length)),
            other => Err(BaseError::Input {
                message: format!("entries: expected [B, T, {}], got {other:?}", self.config.hidden_size),
            }),
        }
    }

    fn pass<'a>(
        &'a self,
        attention: &'a Prepared,
        cos: &'a [f32],
        sin: &'a [f32],
        spread: Option<&'a Spread>,
        entries: usize,
        dropout_seed: Option<u64>,
    ) -> Pass<'a> {
        let products = self.precision.products();
        let setting =
            Setting { params: &self.params, lora: self.lora.as_ref(), dropout_seed, products, entries };
        Pass { config: &self.config, setting, attention, cos, sin, spread }
    }

    /// What the gradient of sigma needs, where it learns.
    fn learning_spread<'a>(&self, rope: &'a RopeTables) -> Result<Option<&'a Spread>> {
        let Some(spread) = rope.spread.as_deref().filter(|_| self.params.learns(Group::Sigma)) else {
            return Ok(None);
        };
        let levels = self.params.shape(SIGMA).map_or(0, |shape| shape[0]);
        if spread.levels() != levels {
            let message = format!("rope tables: expected {levels} scales of sigma, got {}", spread.levels());
            return Err(BaseError::Input { message });
        }
        Ok(Some(spread))
    }

    /// All blocks over the stream in `scratch.x`, which then holds the last one's output. The inputs of blocks from
    /// `lowest` on are kept, and what they need for their backward pass (with `recompute`: the last one only).
    fn blocks<S: Activation>(
        &self,
        pass: &Pass,
        scratch: &mut Scratch<S>,
        lowest: usize,
        recompute: bool,
    ) -> Result<()> {
        let layers = self.config.num_hidden_layers;
        scratch.prepare(layers, lowest, recompute);
        let Scratch { inputs, saved, workspace, x, stream, .. } = scratch;
        for layer in 0..layers {
            let place = if recompute { 0 } else { layer.saturating_sub(lowest) };
            Block::new(layer, pass)?.forward(x, stream, &mut saved[place], workspace)?;
            if layer >= lowest {
                // The input is kept, and its buffer of the step before carries the stream on.
                std::mem::swap(&mut inputs[layer - lowest], x);
            }
            std::mem::swap(x, stream);
        }
        Ok(())
    }

    /// The final norm of the stream, in the buffer that blocks use for their normed input.
    fn final_norm<'s, S: Activation>(&self, x: &[S], normed: &'s mut Buffer<S>) -> Result<&'s [S]> {
        let gain = self.params.values(FINAL_NORM)?;
        let normed = normed.sized(x.len())?;
        norm::rms_forward_into(x, gain.f32()?, self.config.rms_norm_eps as f32, normed);
        Ok(normed)
    }

    /// The forward pass over the stream in `scratch.x`; the result is the final norm's.
    fn forward<'s, S: Activation>(
        &self,
        batch: usize,
        length: usize,
        with: &Forward,
        scratch: &'s mut Scratch<S>,
    ) -> Result<&'s [S]> {
        let attention = self.prepare(batch, length, with)?;
        let (cos, sin) = (Values::of(&with.rope.cos_nd)?, Values::of(&with.rope.sin_nd)?);
        let pass = self.pass(&attention, &cos, &sin, None, batch * length, None);
        self.blocks(&pass, scratch, self.config.num_hidden_layers, true)?;
        let Scratch { workspace, x, .. } = scratch;
        self.final_norm(x, &mut workspace.normed)
    }

    /// As [`Decoder::forward`], of a stream given as a tensor.
    fn forward_of<'s, S: Activation>(
        &self,
        x_bte: &Tensor,
        with: &Forward,
        scratch: &'s mut Scratch<S>,
    ) -> Result<&'s [S]> {
        let (batch, length) = self.stream(x_bte)?;
        let given = x_bte.contiguous()?;
        let given = Values::of(&given)?;
        let x = scratch.x.sized(given.len())?;
        for (x, given) in x.iter_mut().zip(given.iter()) {
            *x = S::put(*given);
        }
        self.forward(batch, length, with, scratch)
    }

    /// Residual stream after the last block and the final norm, [B, T, E]; builds no graph.
    pub fn hidden(&self, x_bte: &Tensor, with: &Forward) -> Result<Tensor> {
        let mut buffers = Buffers::default();
        let values = if self.precision.stores_bf16() {
            let hidden = self.forward_of(x_bte, with, bf16::scratch(&mut buffers))?;
            hidden.iter().map(|v| v.get()).collect()
        } else {
            self.forward_of(x_bte, with, f32::scratch(&mut buffers))?.to_vec()
        };
        Ok(Tensor::from_vec(values, x_bte.shape(), &Device::Cpu)?)
    }

    fn logits_of<S: Store>(&self, hidden: &[S]) -> Result<Vec<f32>> {
        let (vocab, width) = (self.config.vocab_size, self.config.hidden_size);
        let head = self.params.values(self.config.head_name())?;
        let products = self.precision.products();
        let layer = Layer { weight: head.weight(), out: vocab, inp: width, lora: None, products };
        let mut logits = vec![0f32; hidden.len() / width * vocab];
        layer.forward(hidden, &mut logits, false, &mut LinearScratch::default());
        Ok(logits)
    }

    /// Logits of every position, [B, T, V]; for short inputs, as they are held whole.
    pub fn logits(&self, x_bte: &Tensor, with: &Forward) -> Result<Tensor> {
        let (batch, length) = self.stream(x_bte)?;
        let mut buffers = Buffers::default();
        let logits = if self.precision.stores_bf16() {
            self.logits_of(self.forward_of(x_bte, with, bf16::scratch(&mut buffers))?)?
        } else {
            self.logits_of(self.forward_of(x_bte, with, f32::scratch(&mut buffers))?)?
        };
        Ok(Tensor::from_vec(logits, (batch, length, self.config.vocab_size), &Device::Cpu)?)
    }

    /// Sizes of the output head's product for `entries` positions: [N, E, V].
    fn head_sizes(&self, entries: usize) -> [usize; 3] {
        [entries, self.config.hidden_size, self.config.vocab_size]
    }

    fn nll_of<S: Store>(&self, hidden: &[S], targets: &[u32]) -> Result<Vec<f32>> {
        let head = self.params.values(self.config.head_name())?;
        let sizes = self.head_sizes(targets.len());
        let products = self.precision.products();
        Ok(head_cross_entropy(hidden, head.weight(), sizes, targets, Gradient::Skip, products)?.nll)
    }

    /// NLL in nats of `targets` (row-major [B, T]; `IGNORE` gives 0) at every position; builds no graph.
    pub fn nll(&self, x_bte: &Tensor, targets: &[u32], with: &Forward) -> Result<Vec<f32>> {
        let mut buffers = Buffers::default();
        if self.precision.stores_bf16() {
            self.nll_of(self.forward_of(x_bte, with, bf16::scratch(&mut buffers))?, targets)
        } else {
            self.nll_of(self.forward_of(x_bte, with, f32::scratch(&mut buffers))?, targets)
        }
    }

    /// As [`Decoder::nll`], of tokens [B, T], in buffers that the next call can use again.
    pub fn score(
        &self,
        tokens: &[u32],
        batch: usize,
        targets: &[u32],
        with: &Forward,
        buffers: &mut Buffers,
    ) -> Result<Vec<f32>> {
        if self.precision.stores_bf16() {
            self.score_in::<bf16>(tokens, batch, targets, with, buffers)
        } else {
            self.score_in::<f32>(tokens, batch, targets, with, buffers)
        }
    }

    fn score_in<S: Activation>(
        &self,
        tokens: &[u32],
        batch: usize,
        targets: &[u32],
        with: &Forward,
        buffers: &mut Buffers,
    ) -> Result<Vec<f32>> {
        let length = Self::length(tokens, batch)?;
        let scratch = S::scratch(buffers);
        self.gather(tokens, scratch.x.sized(tokens.len() * self.config.hidden_size)?)?;
        self.nll_of(self.forward(batch, length, with, scratch)?, targets)
    }

    /// Does anything below block `layer` (or its own input) learn?
    fn learns_below(&self, layer: usize) -> bool {
        self.params.learns(Group::Embeddings) || (0..layer).any(|l| self.block_learns(l))
    }

    fn block_learns(&self, layer: usize) -> bool {
        let lora = self.lora.as_ref().is_some_and(|l| l.target_modules.iter().any(|t| l.applies(layer, t)));
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
        let step = Step { tokens, batch, targets, with, scale: scale as f32, recompute };
        let mut buffers = gradients.take_passes();
        let loss = if self.precision.stores_bf16() {
            self.accumulate(&step, bf16::scratch(&mut buffers), gradients)
        } else {
            self.accumulate(&step, f32::scratch(&mut buffers), gradients)
        };
        gradients.put_passes(buffers);
        loss
    }

    fn accumulate<S: Activation>(
        &self,
        step: &Step,
        scratch: &mut Scratch<S>,
        gradients: &mut Gradients,
    ) -> Result<StepLoss> {
        let (c, with, tokens) = (&self.config, step.with, step.tokens);
        let length = Self::length(tokens, step.batch)?;
        let attention = self.prepare(step.batch, length, with)?;
        let (cos, sin) = (Values::of(&with.rope.cos_nd)?, Values::of(&with.rope.sin_nd)?);
        let spread = self.learning_spread(with.rope)?;
        let pass = self.pass(&attention, &cos, &sin, spread, tokens.len(), with.dropout_seed);
        let layers = c.num_hidden_layers;
        let lowest = self.lowest_learning_block();
        self.gather(tokens, scratch.x.sized(tokens.len() * self.config.hidden_size)?)?;
        self.blocks(&pass, scratch, lowest, step.recompute)?;
        let Scratch { inputs, saved, workspace, x, stream, d } = scratch;

        let hidden = self.final_norm(x, &mut workspace.normed)?;
        let (loss, d_hidden) = self.head_loss(hidden, step, gradients)?;
        let gain = self.params.values(FINAL_NORM)?;
        let gain = gain.f32()?;
        let d = d.sized(tokens.len() * c.hidden_size)?;
        d.fill(0.0);
        let dw = self.params.learns(Group::Norms).then(|| &mut gradients.buffer(FINAL_NORM, gain.len())[..]);
        norm::rms_backward_add(x, gain, &d_hidden, c.rms_norm_eps as f32, d, dw);
        drop(d_hidden);
        for layer in (lowest..layers).rev() {
            let block = Block::new(layer, &pass)?;
            let input = &inputs[layer - lowest];
            let place = if step.recompute { 0 } else { layer - lowest };
            if step.recompute && layer + 1 < layers {
                block.forward(input, stream, &mut saved[place], workspace)?;
            }
            let wanted = self.learns_below(layer);
            block.backward(input, d, &mut saved[place], workspace, gradients, wanted)?;
        }
        if self.params.learns(Group::Embeddings) {
            let table = gradients.buffer(c.embedding_name(), c.vocab_size * c.hidden_size);
            embedding::scatter_add(d, c.hidden_size, tokens, table)?;
        }
        Ok(loss)
    }

    /// The loss over the output head, and the gradient of the hidden states.
    fn head_loss<S: Store>(
        &self,
        hidden: &[S],
        step: &Step,
        gradients: &mut Gradients,
    ) -> Result<(StepLoss, Vec<f32>)> {
        let name = self.config.head_name();
        let head = self.params.values(name)?;
        let learns = self.params.group(name).is_some_and(|g| self.params.learns(g));
        let wanted = if learns {
            let head = gradients.buffer(name, self.config.vocab_size * self.config.hidden_size);
            Gradient::HiddenAndHead { scale: step.scale, head }
        } else {
            Gradient::Hidden { scale: step.scale }
        };
        let sizes = self.head_sizes(step.targets.len());
        let products = self.precision.products();
        let loss = head_cross_entropy(hidden, head.weight(), sizes, step.targets, wanted, products)?;
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

/// What [`Decoder::accumulate_gradients`] is given.
struct Step<'a> {
    tokens: &'a [u32],
    batch: usize,
    targets: &'a [u32],
    with: &'a Forward<'a>,
    scale: f32,
    recompute: bool,
}
