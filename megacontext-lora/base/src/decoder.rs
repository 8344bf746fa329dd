//! A trainable decoder: forward, and backward block by block.
//!
//! Source: what [`crate::architecture`] describes, as `transformers` computes it. Attention pattern and positions are
//! arguments of the forward pass. Dense attention keeps to the windows of blocks that have one; every other pattern is taken
//! as it is, in every block.
//!
//! Shapes: B batch, T entries, E model width, H query heads, G kv heads, D head width, F feed-forward width,
//! V vocabulary; x_bte is the residual stream, tokens are row-major [B, T].
//! Units: loss in nats.
//!
//! Gradients are made in the private module `step`, rows that continue a document are run in `continuation`, text is
//! continued in [`crate::generate`].
//!
//! Precision: a [`Precision`] decides how activations and frozen weights are stored and how products are computed; what
//! learns, gradients, sums, norms, softmax and the loss are f32 in every class. Embeddings given or asked for as tensors
//! are f32.
//!
//! Left out: attention scores that are capped (Gemma 2).

use candle_core::{Device as CandleDevice, Tensor};
use megacontext_kernels::attention::{Pattern, Rows, alibi_slopes};
use megacontext_kernels::cpu::Values;
use megacontext_kernels::precision::Precision;
use megacontext_kernels::store::{Store, bf16};
use rayon::prelude::*;

use crate::block::{Attending, ByWindow, Pass, Tables};
use crate::buffers::{Activation, Buffers, Scratch};
use crate::config::DecoderConfig;
use crate::device::Device;
use crate::error::{BaseError, Result};
use crate::lora::{LoraConfig, LoraModules};
use crate::machine::{AttentionSpec, Machine, Scored, on_machine};
use crate::params::{Group, ParamStore};
use crate::projection::Setting;
use crate::random::Random;
use crate::rope::{RopeTables, SIGMA, Spread};
use crate::stack;
use crate::weights::Weights;

mod adapted;
mod continuation;
mod entries;
mod fingerprint;
mod merged;
mod step;

pub use continuation::{Continuation, ContinuationLoss, Document, DocumentShape, Objective};
pub(crate) use continuation::{Ran, RanAs};
pub use entries::{EntryLoss, EntryStep};

use adapted::Attached;
use merged::Merged;

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
    lora: Option<Attached>,
    precision: Precision,
    merged: Option<Merged>,
    device: Device,
    place: Place,
}

/// The machine of a decoder.
pub(crate) enum Place {
    /// The processor.
    Host,
    /// A GPU, with this decoder's parameters on it.
    #[cfg(feature = "cuda")]
    Gpu(Box<crate::machine::gpu::Gpu>),
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
        weights.refuse_others(&config)?;
        let mut params = ParamStore::new();
        for (name, shape) in config.tensors() {
            let group = config.group_of(&name);
            read_parameter(&mut params, weights, name, group, &shape, precision, learning.contains(&group))?;
        }
        if let Some(scales) = config.sigma_scales() {
            let levels = scales.len();
            params.insert_values(SIGMA, Group::Sigma, scales, &[levels])?;
        }
        Ok(Self {
            config,
            params,
            lora: None,
            precision,
            merged: None,
            device: Device::Cpu,
            place: Place::Host,
        })
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
        enum Made {
            Narrow(Vec<bf16>),
            Wide(Vec<f32>),
        }
        fn values<S: Store>(len: usize, mut next: impl FnMut() -> f32) -> Vec<S> {
            (0..len).map(|_| S::put(next())).collect()
        }
        let neutral = config.architecture.norm.neutral();
        let shrink = 1.0 / (2.0 * config.num_hidden_layers as f64).sqrt();
        // Every tensor has its own seed, so the values are the same whoever makes them.
        let make = |(name, shape): (String, Vec<usize>)| {
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
            let made = if stored_narrow(group, precision) && !learning.contains(&group) {
                Made::Narrow(values(len, next))
            } else {
                Made::Wide(values(len, next))
            };
            (name, group, made, shape)
        };
        let made: Vec<_> = config.tensors().into_par_iter().map(make).collect();
        let mut params = ParamStore::new();
        for (name, group, made, shape) in made {
            match made {
                Made::Narrow(values) => params.insert_values(name, group, values, &shape)?,
                Made::Wide(values) => params.insert_values(name, group, values, &shape)?,
            }
        }
        Ok(Self {
            config,
            params,
            lora: None,
            precision,
            merged: None,
            device: Device::Cpu,
            place: Place::Host,
        })
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
        let Some(config) = lora else {
            self.lora = None;
            return Ok(());
        };
        let modules = config.resolve(&self.config)?;
        for (name, shape) in modules.parameters().into_iter().chain(modules.fixed()) {
            let found = self.params.shape(&name);
            if found != Some(&shape) {
                let message = format!("expected shape {shape:?}, got {found:?}");
                return Err(BaseError::Parameter { name, message });
            }
        }
        self.lora = Some(Attached { config, modules });
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

    /// The attached LoRA and `tensors`, all that is to be saved with it, as files hold them: PiSSA as the plain LoRA that it
    /// is.
    ///
    /// # Errors
    /// When none is attached.
    pub fn saved_lora(&self, tensors: Vec<(String, Tensor)>) -> Result<(LoraConfig, Vec<(String, Tensor)>)> {
        match &self.lora {
            None => Err(BaseError::Lora { message: "expected LoRA to save, none is attached".to_string() }),
            Some(lora) => crate::lora::plain(&lora.config, &lora.modules, tensors, &self.params),
        }
    }

    /// Sizes and settings.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Precision class.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// What passes run on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// Passes run on this device from here on; the processor's is where every decoder begins. Parameters stay on the host, and
    /// are copied as passes need them.
    ///
    /// # Errors
    /// When the device cannot run this model as it stands; it stays where it was then.
    pub fn set_device(&mut self, device: &Device) -> Result<()> {
        device.check(&self.config)?;
        self.params.bring_home()?;
        self.place = match device {
            Device::Cpu => Place::Host,
            #[cfg(feature = "cuda")]
            Device::Cuda(gpu) => Place::Gpu(Box::new(crate::machine::gpu::Gpu::new(gpu))),
        };
        self.device = device.clone();
        Ok(())
    }

    /// LoRA, if attached and not merged into the weights.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.lora.as_ref().map(|lora| &lora.config)
    }

    /// What LoRA comes to on this model, if attached and not merged into the weights.
    pub fn lora_modules(&self) -> Option<&LoraModules> {
        self.adapted()
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

    /// What token embeddings are multiplied by. In class bf16 it is rounded as transformers rounds it there.
    pub(crate) fn embedding_scale(&self) -> Option<f32> {
        let scale = self.config.architecture.embedding_scale? as f32;
        Some(if self.precision.stores_bf16() { bf16::put(scale).get() } else { scale })
    }

    /// The norm of what enters the first block, where there is one.
    fn entry_norm<'a, M: Machine>(&'a self, machine: &'a M) -> Result<Option<M::Norm<'a>>> {
        let c = &self.config;
        c.architecture.embedding_norm.then(|| machine.plain_norm(c.hidden_size, c.rms_norm_eps)).transpose()
    }

    /// Makes the stream in `x` what the first block reads.
    pub(crate) fn enter<M: Machine, S: Activation>(
        &self,
        machine: &M,
        x: &mut M::Buffer<S>,
        other: &mut M::Buffer<S>,
    ) -> Result<()> {
        if let Some(norm) = self.entry_norm(machine)? {
            machine.norm_forward(&norm, x, other)?;
            std::mem::swap(x, other);
        }
        Ok(())
    }

    /// Embeddings of tokens, [B, T, E], outside any graph.
    pub fn embed(&self, tokens: &[u32], batch: usize) -> Result<Tensor> {
        let length = Self::length(tokens, batch)?;
        let mut rows = vec![0f32; tokens.len() * self.config.hidden_size];
        self.gather(tokens, &mut rows)?;
        Ok(Tensor::from_vec(rows, (batch, length, self.config.hidden_size), &CandleDevice::Cpu)?)
    }

    /// Refuses rotation tables that are neither those of a row nor of all rows.
    fn check_tables(&self, batch: usize, length: usize, rope: &RopeTables) -> Result<()> {
        let half = self.config.architecture.rotary_width / 2;
        let local = rope.local.iter().flatten();
        for table in [&rope.cos_nd, &rope.sin_nd].into_iter().chain(local) {
            if table.dims() != [length, half] && table.dims() != [batch * length, half]
                || table.dims() != rope.cos_nd.dims()
            {
                return Err(BaseError::Input {
                    message: format!(
                        "rope tables: expected [{length}, {half}] or [{}, {half}], got {:?} and {:?}",
                        batch * length,
                        rope.cos_nd.dims(),
                        table.dims()
                    ),
                });
            }
        }
        Ok(())
    }

    fn prepare<M: Machine>(
        &self,
        machine: &M,
        batch: usize,
        length: usize,
        with: &Forward,
    ) -> Result<ByWindow<M::Within>> {
        let c = &self.config;
        self.check_tables(batch, length, with.rope)?;
        self.params.check_mapped()?;
        let sizes = [batch, length, c.num_attention_heads, c.num_key_value_heads, c.head_dim];
        let slopes = c.positions.alibi.then(|| alibi_slopes(c.num_attention_heads));
        let positions = match with.rope.mu.as_deref() {
            Some(mu) if slopes.is_some() && mu.len() != length => {
                return Err(BaseError::Input {
                    message: format!(
                        "rope tables: with ALiBi expected one position for each of {length} entries, the same in every \
                         row, got {}",
                        mu.len()
                    ),
                });
            }
            mu => mu.map(Vec::as_slice),
        };
        let slopes = slopes.as_deref().map(|slopes| (slopes, positions));
        ByWindow::new(with.pattern, c, |pattern| {
            let (scale, products) = (c.architecture.query_scale, self.precision.products());
            machine.within(&AttentionSpec { sizes, scale, pattern, products, slopes }, with.rows)
        })
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

    pub(crate) fn pass<'a, M: Machine, S: Activation>(
        &'a self,
        machine: &'a M,
        attending: Attending<'a, M, S>,
        tables: Tables<'a>,
        spread: Option<&'a Spread>,
        entries: usize,
        dropout_seed: Option<u64>,
    ) -> Result<Pass<'a, M, S>> {
        let products = self.precision.products();
        let setting = Setting { params: &self.params, lora: self.adapted(), dropout_seed, products, entries };
        let tables = machine.tables(tables)?;
        Ok(Pass { machine, config: &self.config, setting, attending, tables, spread })
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
    fn blocks<M: Machine, S: Activation>(
        &self,
        pass: &Pass<M, S>,
        scratch: &mut Scratch<M, S>,
        lowest: usize,
        recompute: bool,
    ) -> Result<()> {
        self.enter(pass.machine, &mut scratch.x, &mut scratch.stream)?;
        stack::forward(pass, scratch, lowest, recompute)
    }

    fn last_norm<'a, M: Machine>(&'a self, machine: &'a M) -> Result<M::Norm<'a>> {
        let c = &self.config;
        machine.norm(c.architecture.norm, c.final_norm_module(), c.hidden_size, c.rms_norm_eps, &self.params)
    }

    /// The final norm of the stream, in the buffer that blocks use for their normed input.
    pub(crate) fn final_norm<'s, M: Machine, S: Activation>(
        &self,
        machine: &M,
        x: &M::Buffer<S>,
        normed: &'s mut M::Buffer<S>,
    ) -> Result<&'s M::Buffer<S>> {
        machine.norm_forward(&self.last_norm(machine)?, x, normed)?;
        Ok(normed)
    }

    /// The forward pass over the stream in `scratch.x`; the result is the final norm's.
    fn forward<'s, M: Machine, S: Activation>(
        &self,
        machine: &M,
        [batch, length]: [usize; 2],
        with: &Forward,
        scratch: &'s mut Scratch<M, S>,
    ) -> Result<&'s M::Buffer<S>> {
        let attention = self.prepare(machine, batch, length, with)?;
        let tables = HeldTables::of(with.rope)?;
        let attending = Attending::Rows(&attention);
        let pass = self.pass(machine, attending, tables.slices(), None, batch * length, None)?;
        self.blocks(&pass, scratch, self.config.num_hidden_layers, true)?;
        let Scratch { workspace, x, .. } = scratch;
        self.final_norm(machine, x, &mut workspace.normed)
    }

    /// As [`Decoder::forward`], of a stream given as a tensor.
    fn forward_of<'s, M: Machine, S: Activation>(
        &self,
        machine: &M,
        x_bte: &Tensor,
        with: &Forward,
        scratch: &'s mut Scratch<M, S>,
    ) -> Result<&'s M::Buffer<S>> {
        let (batch, length) = self.stream(x_bte)?;
        let given = x_bte.contiguous()?;
        machine.read(&Values::of(&given)?, &mut scratch.x)?;
        self.forward(machine, [batch, length], with, scratch)
    }

    /// Residual stream after the last block and the final norm, [B, T, E]; builds no graph.
    pub fn hidden(&self, x_bte: &Tensor, with: &Forward) -> Result<Tensor> {
        let mut buffers = Buffers::default();
        let values = on_machine!(self, |machine: M, S| {
            let hidden = self.forward_of::<M, S>(machine, x_bte, with, M::scratch(&mut buffers))?;
            machine.to_host(hidden)?
        });
        Ok(Tensor::from_vec(values, x_bte.shape(), &CandleDevice::Cpu)?)
    }

    /// Logits of every position, [B, T, V]; for short inputs, as they are held whole.
    pub fn logits(&self, x_bte: &Tensor, with: &Forward) -> Result<Tensor> {
        let (batch, length) = self.stream(x_bte)?;
        let mut buffers = Buffers::default();
        let logits = on_machine!(self, |machine: M, S| {
            let hidden = self.forward_of::<M, S>(machine, x_bte, with, M::scratch(&mut buffers))?;
            machine.logits(self, hidden)?
        });
        Ok(Tensor::from_vec(logits, (batch, length, self.config.vocab_size), &CandleDevice::Cpu)?)
    }

    /// NLL in nats of `targets` (row-major [B, T]; `IGNORE` gives 0) at every position; builds no graph.
    pub fn nll(&self, x_bte: &Tensor, targets: &[u32], with: &Forward) -> Result<Vec<f32>> {
        let mut buffers = Buffers::default();
        on_machine!(self, |machine: M, S| {
            let hidden = self.forward_of::<M, S>(machine, x_bte, with, M::scratch(&mut buffers))?;
            self.nll_of(machine, hidden, targets)
        })
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
        let length = Self::length(tokens, batch)?;
        on_machine!(self, |machine: M, S| {
            let scratch = M::scratch::<S>(buffers);
            machine.gather(self, tokens, &mut scratch.x)?;
            self.nll_of(machine, self.forward(machine, [batch, length], with, scratch)?, targets)
        })
    }

    /// NLL of `targets`.
    fn nll_of<M: Machine, S: Activation>(
        &self,
        machine: &M,
        hidden: &M::Buffer<S>,
        targets: &[u32],
    ) -> Result<Vec<f32>> {
        Ok(machine.head_loss(self, hidden, Scored { targets, weights: None }, 0.0, None, None)?.nll)
    }
}

/// Rotation tables, borrowed for a pass.
pub(crate) struct HeldTables<'a> {
    global: [Values<'a>; 2],
    local: Option<[Values<'a>; 2]>,
}

impl<'a> HeldTables<'a> {
    pub fn of(rope: &'a RopeTables) -> Result<Self> {
        let pair = |a: &'a Tensor, b: &'a Tensor| -> Result<_> { Ok([Values::of(a)?, Values::of(b)?]) };
        let local = rope.local.as_ref().map(|[cos, sin]| pair(cos, sin)).transpose()?;
        Ok(Self { global: pair(&rope.cos_nd, &rope.sin_nd)?, local })
    }

    pub fn slices(&self) -> Tables<'_> {
        Tables {
            global: [&self.global[0], &self.global[1]],
            local: self.local.as_ref().map(|[cos, sin]| [&**cos, &**sin]),
        }
    }
}
