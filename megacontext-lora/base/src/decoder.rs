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
//! Left out: KV cache and generation, other families.

use candle_core::{Device, Tensor};
use megacontext_kernels::attention::slices::Prepared;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::cpu::Values;
use megacontext_kernels::gemm::Products;
use megacontext_kernels::linear::{Weight, linear};
use megacontext_kernels::loss::{Gradient, head_cross_entropy};
use megacontext_kernels::{embedding, norm};

use crate::block::{Block, Pass, Saved, Workspace};
use crate::config::LlamaConfig;
use crate::error::{BaseError, Result};
use crate::gradients::{Gradients, Scratch};
use crate::lora::LoraConfig;
use crate::params::{Group, ParamStore};
use crate::random::Random;
use crate::rope::RopeTables;
use crate::weights::Weights;

const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
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
    config: LlamaConfig,
    params: ParamStore,
    lora: Option<LoraConfig>,
}

impl Decoder {
    /// Reads a model folder's weights.
    pub fn from_weights(config: LlamaConfig, weights: &Weights) -> Result<Self> {
        let mut params = ParamStore::new();
        for (name, shape) in config.tensors() {
            params.insert(name.as_str(), Group::of_name(&name), weights.tensor_f32(&name, &shape)?)?;
        }
        Ok(Self { config, params, lora: None })
    }

    /// A model to pre-train: weights N(0, 0.02²), those that write to the residual stream divided by √(2·layers)
    /// (Radford et al. 2019), gains 1.
    pub fn random(config: LlamaConfig, seed: u64) -> Result<Self> {
        let mut params = ParamStore::new();
        let shrink = 1.0 / (2.0 * config.num_hidden_layers as f64).sqrt();
        for (name, shape) in config.tensors() {
            let mut random = Random::named(seed, &name);
            let group = Group::of_name(&name);
            let writes = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
            let std = 0.02 * if writes { shrink } else { 1.0 };
            let values: Vec<f32> = (0..shape.iter().product())
                .map(|_| if group == Group::Norms { 1.0 } else { (random.normal() * std) as f32 })
                .collect();
            params.insert(name, group, Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?)?;
        }
        Ok(Self { config, params, lora: None })
    }

    /// Attaches LoRA whose factors are already, or will be, parameters `<module>.lora_A.weight` and `lora_B`.
    pub fn set_lora(&mut self, lora: Option<LoraConfig>) -> Result<()> {
        if let Some(lora) = &lora {
            lora.validate(&self.config)?;
            for (module, out, inp) in lora.modules(&self.config) {
                for (name, shape) in [("lora_A", [lora.r, inp]), ("lora_B", [out, lora.r])] {
                    let name = format!("{module}.{name}.weight");
                    let found = self.params.get(&name).map(|t| t.dims().to_vec());
                    if found.as_deref() != Some(&shape) {
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

    /// Sizes and settings.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// LoRA, if attached.
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

    fn head_name(&self) -> &'static str {
        if self.config.tie_word_embeddings { EMBED } else { HEAD }
    }

    fn value(&self, name: &str) -> Result<Tensor> {
        self.params.get(name).ok_or_else(|| BaseError::Parameter {
            name: name.to_string(),
            message: "no parameter of this name".to_string(),
        })
    }

    /// Embeddings of tokens, [B, T, E], outside any graph.
    pub fn embed(&self, tokens: &[u32], batch: usize) -> Result<Tensor> {
        if batch == 0 || !tokens.len().is_multiple_of(batch) {
            return Err(BaseError::Input {
                message: format!("tokens: expected a multiple of the {batch} rows, got {}", tokens.len()),
            });
        }
        let rows = embedding::gather(&self.value(EMBED)?, tokens)?;
        Ok(rows.reshape((batch, tokens.len() / batch, self.config.hidden_size))?)
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
        let sizes = [batch, length, c.num_attention_heads, c.num_key_value_heads, c.head_dim];
        let scale = 1.0 / (c.head_dim as f64).sqrt();
        Ok(Prepared::new(sizes, scale, with.pattern, with.rows)?)
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

    fn final_norm(&self, x: &[f32]) -> Result<Vec<f32>> {
        let gain = self.value(FINAL_NORM)?;
        let mut out = vec![0f32; x.len()];
        norm::rms_forward_into(x, &Values::of(&gain)?, self.config.rms_norm_eps as f32, &mut out);
        Ok(out)
    }

    /// Residual stream after the last block and the final norm, [B, T, E]; builds no graph.
    pub fn hidden(&self, x_bte: &Tensor, with: &Forward) -> Result<Tensor> {
        let (batch, length) = self.stream(x_bte)?;
        let attention = self.prepare(batch, length, with)?;
        let (cos, sin) = (Values::of(&with.rope.cos_nd)?, Values::of(&with.rope.sin_nd)?);
        let pass = self.pass(&attention, &cos, &sin, batch * length, None);
        let mut x = Values::of(&x_bte.contiguous()?)?.to_vec();
        let (mut y, mut saved, mut workspace) = (Vec::new(), Saved::default(), Workspace::default());
        for layer in 0..self.config.num_hidden_layers {
            Block::new(layer, &pass)?.forward(&x, &mut y, &mut saved, &mut workspace)?;
            std::mem::swap(&mut x, &mut y);
        }
        Ok(Tensor::from_vec(self.final_norm(&x)?, x_bte.shape(), &Device::Cpu)?)
    }

    fn pass<'a>(
        &'a self,
        attention: &'a Prepared,
        cos: &'a [f32],
        sin: &'a [f32],
        entries: usize,
        dropout_seed: Option<u64>,
    ) -> Pass<'a> {
        let lora = self.lora.as_ref();
        Pass { config: &self.config, params: &self.params, lora, attention, cos, sin, dropout_seed, entries }
    }

    /// Logits of every position, [B, T, V]; for short inputs, as they are held whole.
    pub fn logits(&self, x_bte: &Tensor, with: &Forward) -> Result<Tensor> {
        Ok(linear(&self.hidden(x_bte, with)?, &self.value(self.head_name())?, None)?)
    }

    /// NLL in nats of `targets` (row-major [B, T]; `IGNORE` gives 0) at every position; builds no graph.
    pub fn nll(&self, x_bte: &Tensor, targets: &[u32], with: &Forward) -> Result<Vec<f32>> {
        let hidden = self.hidden(x_bte, with)?;
        let head = self.value(self.head_name())?;
        let sizes = [targets.len(), self.config.hidden_size, self.config.vocab_size];
        let head = Values::of(&head)?;
        let head = Weight::F32(&head);
        let loss =
            head_cross_entropy(&Values::of(&hidden)?, head, sizes, targets, Gradient::Skip, Products::F32)?;
        Ok(loss.nll)
    }

    /// Does anything below block `layer` (or its own input) learn?
    fn learns_below(&self, layer: usize) -> bool {
        self.params.learns(Group::Embeddings) || (0..layer).any(|l| self.block_learns(l))
    }

    fn block_learns(&self, layer: usize) -> bool {
        let lora = self.lora.as_ref().is_some_and(|l| l.target_modules.iter().any(|t| l.applies(layer, t)));
        self.params.learns(Group::Base)
            || self.params.learns(Group::Norms)
            || (lora && self.params.learns(Group::Lora))
    }

    /// Forward and backward of one micro-batch of `batch` rows of tokens: adds the gradients of `scale`·Σ NLL to
    /// `gradients`. `targets` are the next tokens, `IGNORE` where nothing is scored.
    ///
    /// `recompute` switches activation checkpointing on: less memory, one more forward pass.
    ///
    /// # Errors
    /// When shapes do not agree or the loss is not finite; then nothing has been added.
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
        let c = &self.config;
        let embedded = self.embed(tokens, batch)?;
        let entries = tokens.len();
        let attention = self.prepare(batch, entries / batch, with)?;
        let (cos, sin) = (Values::of(&with.rope.cos_nd)?, Values::of(&with.rope.sin_nd)?);
        let pass = self.pass(&attention, &cos, &sin, entries, with.dropout_seed);
        let layers = c.num_hidden_layers;
        let lowest = (0..layers).find(|l| self.learns_below(*l) || self.block_learns(*l)).unwrap_or(layers);
        let mut scratch = gradients.take_scratch();
        scratch.prepare(layers, lowest, recompute);

        let Scratch { inputs, saved, workspace, stream } = &mut scratch;
        let mut x = Values::of(&embedded)?.to_vec();
        drop(embedded);
        for layer in 0..layers {
            let place = if recompute { 0 } else { layer.saturating_sub(lowest) };
            Block::new(layer, &pass)?.forward(&x, stream, &mut saved[place], workspace)?;
            if layer >= lowest {
                // The input is kept, and its buffer of the step before carries the stream on.
                std::mem::swap(&mut inputs[layer - lowest], &mut x);
            }
            std::mem::swap(&mut x, stream);
        }

        let hidden = self.final_norm(&x)?;
        let head = self.value(self.head_name())?;
        let scale = scale as f32;
        let head_learns = self.params.group(self.head_name()).is_some_and(|g| self.params.learns(g));
        let gradient = if head_learns {
            let head = gradients.buffer(self.head_name(), head.elem_count());
            Gradient::HiddenAndHead { scale, head }
        } else {
            Gradient::Hidden { scale }
        };
        let sizes = [entries, c.hidden_size, c.vocab_size];
        let head = Values::of(&head)?;
        let loss = head_cross_entropy(&hidden, Weight::F32(&head), sizes, targets, gradient, Products::F32)?;
        drop(hidden);
        let sum = loss.sum();
        if !sum.is_finite() {
            return Err(BaseError::NonFinite { what: "loss".to_string(), value: sum });
        }
        let d_hidden = loss.d_hidden.ok_or_else(|| BaseError::Input {
            message: "scale: expected a gradient scale other than 0, got 0".to_string(),
        })?;

        let gain = self.value(FINAL_NORM)?;
        let gain = Values::of(&gain)?;
        let norms_learn = self.params.learns(Group::Norms);
        let mut d = vec![0f32; entries * c.hidden_size];
        let dw = norms_learn.then(|| &mut gradients.buffer(FINAL_NORM, gain.len())[..]);
        norm::rms_backward_add(&x, &gain, &d_hidden, c.rms_norm_eps as f32, &mut d, dw);
        drop(d_hidden);
        for layer in (lowest..layers).rev() {
            let block = Block::new(layer, &pass)?;
            let input = &inputs[layer - lowest];
            let place = if recompute { 0 } else { layer - lowest };
            if recompute && layer + 1 < layers {
                block.forward(input, stream, &mut saved[place], workspace)?;
            }
            let wanted = self.learns_below(layer);
            block.backward(input, &mut d, &mut saved[place], workspace, gradients, wanted)?;
        }
        gradients.put_scratch(scratch);

        if self.params.learns(Group::Embeddings) {
            let table = gradients.buffer(EMBED, c.vocab_size * c.hidden_size);
            embedding::scatter_add(&d, c.hidden_size, tokens, table)?;
        }
        Ok(StepLoss { sum, count: loss.count })
    }
}
