//! A trainable Llama-family decoder: forward, and backward block by block.
//!
//! Source: the Llama architecture as `transformers` defines it (RMSNorm, rotary positions, grouped-query attention,
//! SwiGLU, no biases, tied or untied head). Attention pattern and positions are arguments of the forward pass.
//!
//! Shapes: B batch, T entries, E model width, H query heads, G kv heads, D head width, F feed-forward width,
//! V vocabulary; x_bte is the residual stream, tokens are row-major [B, T].
//! Units: loss in nats.
//!
//! Training walks the blocks explicitly instead of taping the whole model: the forward pass keeps each block's input,
//! the backward pass gives every block a small graph of its own, from its input to its output, and seeds it with
//! the gradient that came from above. With recomputation on (activation checkpointing, Chen et al. 2016) only the
//! inputs survive the forward pass; with it off the small graphs do. Both give the same bits. Blocks below the lowest
//! parameter that learns are never walked back.
//!
//! Left out: KV cache and generation, other families.

use std::collections::BTreeMap;

use candle_core::{Tensor, Var};
use megacontext_kernels::attention::{Pattern, Rows, attention};
use megacontext_kernels::linear::{Dropout, Lora, linear};
use megacontext_kernels::loss::{Gradient, head_cross_entropy};
use megacontext_kernels::{embedding, mlp, norm, rope, vjp};

use crate::config::LlamaConfig;
use crate::error::{BaseError, Result};
use crate::gradients::Gradients;
use crate::lora::LoraConfig;
use crate::params::{Group, ParamStore};
use crate::random::{Random, mix};
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

/// A block's input as a leaf, and its output in the same small graph.
struct BlockGraph {
    input: Tensor,
    output: Tensor,
    leaves: BTreeMap<String, Tensor>,
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

    /// One block. `leaf` hands out a parameter by name: detached for inference, as a leaf for training.
    fn block(
        &self,
        layer: usize,
        x_bte: &Tensor,
        with: &Forward,
        leaf: &mut dyn FnMut(&str) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let c = &self.config;
        let (b, t, _) = x_bte.dims3()?;
        let (h, g, d) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let path = |rest: &str| format!("model.layers.{layer}.{rest}");

        let n = norm::rms_norm(x_bte, &leaf(&path("input_layernorm.weight"))?, c.rms_norm_eps)?;
        let mut project = |x: &Tensor, target: &str| -> Result<Tensor> {
            let module = path(&format!("self_attn.{target}"));
            let w = leaf(&format!("{module}.weight"))?;
            let Some(lora) = self.lora.as_ref().filter(|l| l.applies(layer, target)) else {
                return Ok(linear(x, &w, None)?);
            };
            let a_ri = leaf(&format!("{module}.lora_A.weight"))?;
            let b_or = leaf(&format!("{module}.lora_B.weight"))?;
            let seed = |seed: u64| Random::named(mix(seed), &module).next_u64();
            let dropout = with.dropout_seed.map(|s| Dropout { p: lora.dropout, seed: seed(s) });
            Ok(linear(x, &w, Some(Lora { a_ri: &a_ri, b_or: &b_or, scale: lora.scale(), dropout }))?)
        };
        let q_bthd = project(&n, "q_proj")?.reshape((b, t, h, d))?;
        let k_btgd = project(&n, "k_proj")?.reshape((b, t, g, d))?;
        let v_btgd = project(&n, "v_proj")?.reshape((b, t, g, d))?;
        let q_bthd = rope::rope(&q_bthd, &with.rope.cos_nd, &with.rope.sin_nd)?;
        let k_btgd = rope::rope(&k_btgd, &with.rope.cos_nd, &with.rope.sin_nd)?;
        let scale = 1.0 / (d as f64).sqrt();
        let mixed = attention(&q_bthd, &k_btgd, &v_btgd, scale, with.pattern, with.rows)?;
        let x_bte = (x_bte + project(&mixed.reshape((b, t, h * d))?, "o_proj")?)?;

        let n = norm::rms_norm(&x_bte, &leaf(&path("post_attention_layernorm.weight"))?, c.rms_norm_eps)?;
        let gate = linear(&n, &leaf(&path("mlp.gate_proj.weight"))?, None)?;
        let up = linear(&n, &leaf(&path("mlp.up_proj.weight"))?, None)?;
        let down = linear(&mlp::swiglu(&gate, &up)?, &leaf(&path("mlp.down_proj.weight"))?, None)?;
        Ok((x_bte + down)?)
    }

    /// Residual stream after the last block and the final norm, [B, T, E]; builds no graph.
    pub fn hidden(&self, x_bte: &Tensor, with: &Forward) -> Result<Tensor> {
        let mut x = x_bte.detach();
        for layer in 0..self.config.num_hidden_layers {
            x = self.block(layer, &x, with, &mut |name| self.value(name))?;
        }
        Ok(norm::rms_norm(&x, &self.value(FINAL_NORM)?, self.config.rms_norm_eps)?)
    }

    /// Logits of every position, [B, T, V]; for short inputs, as they are held whole.
    pub fn logits(&self, x_bte: &Tensor, with: &Forward) -> Result<Tensor> {
        Ok(linear(&self.hidden(x_bte, with)?, &self.value(self.head_name())?, None)?)
    }

    /// NLL in nats of `targets` (row-major [B, T]; `IGNORE` gives 0) at every position; builds no graph.
    pub fn nll(&self, x_bte: &Tensor, targets: &[u32], with: &Forward) -> Result<Vec<f32>> {
        let hidden = self.hidden(x_bte, with)?.reshape(((), self.config.hidden_size))?;
        Ok(head_cross_entropy(&hidden, &self.value(self.head_name())?, targets, Gradient::Skip)?.nll)
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

    fn graph(&self, layer: usize, x_bte: &Tensor, with: &Forward) -> Result<BlockGraph> {
        let input = if self.learns_below(layer) {
            Var::from_tensor(&x_bte.detach())?.as_tensor().clone()
        } else {
            x_bte.detach()
        };
        let mut leaves = BTreeMap::new();
        let output = self.block(layer, &input, with, &mut |name| {
            let tensor = self.params.read(name)?;
            if tensor.is_variable() {
                leaves.insert(name.to_string(), tensor.clone());
            }
            Ok(tensor)
        })?;
        Ok(BlockGraph { input, output, leaves })
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
        let mut x = self.embed(tokens, batch)?;
        let layers = c.num_hidden_layers;
        let lowest = (0..layers).find(|l| self.learns_below(*l) || self.block_learns(*l)).unwrap_or(layers);
        let mut inputs: Vec<Tensor> = Vec::with_capacity(layers);
        let mut graphs: Vec<BlockGraph> = Vec::new();
        for layer in 0..layers {
            if layer >= lowest && !recompute {
                let graph = self.graph(layer, &x, with)?;
                x = graph.output.detach();
                graphs.push(graph);
            } else {
                if layer >= lowest {
                    inputs.push(x.clone());
                }
                x = self.block(layer, &x, with, &mut |name| self.value(name))?;
            }
        }

        let last = Var::from_tensor(&x)?;
        let gain = self.params.read(FINAL_NORM)?;
        let hidden = norm::rms_norm(last.as_tensor(), &gain, c.rms_norm_eps)?;
        let (_, t, width) = hidden.dims3()?;
        let flat = hidden.detach().reshape((batch * t, width))?;
        let head = self.value(self.head_name())?;
        let scale = scale as f32;
        let head_learns = self.params.group(self.head_name()).is_some_and(|g| self.params.learns(g));
        let mut head_gradient = head_learns.then(|| vec![0f32; head.elem_count()]);
        let gradient = match &mut head_gradient {
            Some(head) => Gradient::HiddenAndHead { scale, head },
            None => Gradient::Hidden { scale },
        };
        let loss = head_cross_entropy(&flat, &head, targets, gradient)?;
        let sum = loss.sum();
        if !sum.is_finite() {
            return Err(BaseError::NonFinite { what: "loss".to_string(), value: sum });
        }
        let d_hidden = loss.d_hidden.ok_or_else(|| BaseError::Input {
            message: "scale: expected a gradient scale other than 0, got 0".to_string(),
        })?;
        let grads = vjp::seed(&hidden, d_hidden.reshape(hidden.shape())?)?.backward()?;
        if gain.is_variable()
            && let Some(g) = grads.get(&gain)
        {
            gradients.add(FINAL_NORM, g)?;
        }
        let mut above = grads.get(last.as_tensor()).cloned();
        drop(grads);

        for layer in (lowest..layers).rev() {
            let Some(gradient) = above.take() else { break };
            let graph = if recompute {
                let input = inputs.pop().ok_or_else(missing_input)?;
                self.graph(layer, &input, with)?
            } else {
                graphs.pop().ok_or_else(missing_input)?
            };
            let grads = vjp::seed(&graph.output, gradient)?.backward()?;
            for (name, leaf) in &graph.leaves {
                let gradient = grads.get(leaf).ok_or_else(|| BaseError::Parameter {
                    name: name.clone(),
                    message: "it learns but received no gradient".to_string(),
                })?;
                gradients.add(name, gradient)?;
            }
            above = grads.get(&graph.input).cloned();
        }

        if let Some(head_gradient) = head_gradient {
            let buffer = gradients.buffer(self.head_name(), head_gradient.len());
            for (sum, value) in buffer.iter_mut().zip(head_gradient) {
                *sum += value;
            }
        }
        if let Some(dx) = above.filter(|_| self.params.learns(Group::Embeddings)) {
            let rows = dx.reshape((tokens.len(), c.hidden_size))?;
            embedding::scatter_add(&rows, tokens, gradients.buffer(EMBED, c.vocab_size * c.hidden_size))?;
        }
        Ok(StepLoss { sum, count: loss.count })
    }
}

fn missing_input() -> BaseError {
    BaseError::Input { message: "a block's input was not kept for the backward pass".to_string() }
}
