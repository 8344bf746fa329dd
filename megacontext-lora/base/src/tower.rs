//! The stack of blocks that GistNet and LensNet share, on candle's tape.
//!
//! What it is for: both networks are small (two blocks, mostly), read vectors instead of tokens, and learn while the base
//! model is frozen. So they are taped by candle, over the kernels' operations, instead of walked by hand as the decoder is.
//!
//! Source: MegaContext's block (its Python code; nanochat's GPT). For x [B, T, E], without any bias:
//!   n = rms(x);  q = rms(rot(n·Wqᵀ)), k = rms(rot(n·Wkᵀ)) per head, v = n·Wvᵀ;  x += (softmax(q·kᵀ/√D)·v)·Woᵀ;
//!   x += relu(rms(x)·W1ᵀ)²·W2ᵀ.
//! rms has no gain and eps 1.1920929e-7; rot turns the halves of a head by **−θ**; W1 is [4E, E]. There is no norm before the
//! first block and none after the last.
//!
//! Parameters live in a [`ParamStore`] under the original's names, `blocks.{i}.attn.{c_q,c_k,c_v,c_proj}.weight` and
//! `blocks.{i}.mlp.{c_fc,c_proj}.weight`. They begin as PyTorch's linear layers do, uniform in ±1/√in: the original gives
//! these networks no other start.
//!
//! Shapes: B rows, T entries, E width, H query heads, G kv heads, D = E/H head width. Units: none; angles come as tables.
//! Errors: `BaseError::Network` for settings that cannot be built; the kernels' own for shapes that do not agree.
//! Left out on purpose: LoRA, bf16, on the processor activation checkpointing: a batch of blocks is small beside a pass of the base.
//!
//! [`Tower::set_device`] moves the blocks to a GPU, where attention has a pattern (module `device`).

mod biased;
mod described;
#[cfg(feature = "cuda")]
mod device;
mod layers;
mod plain;

use candle_core::{Device as CandleDevice, Tensor};
use megacontext_kernels::attention::reference::{self, Problem};
use megacontext_kernels::attention::{Options, Pattern, Rows, attention_with};
use megacontext_kernels::gemm::Products;
use megacontext_kernels::linear::linear;
use megacontext_kernels::mlp::relu2;
use megacontext_kernels::norm::rms_norm;
use megacontext_kernels::rope::rope;

use crate::device::Device;
use crate::error::{BaseError, Result};
use crate::params::{Group, ParamStore};

pub use layers::{Affine, insert_uniform, relu, softplus};
pub use plain::{ROWS, product_into};

/// What the norms add to the mean square: f32's machine epsilon, as PyTorch's `rms_norm` does by default.
pub const EPS: f64 = 1.192_092_9e-7;
/// Base of the rotary frequencies.
pub const THETA: f64 = 10_000.0;

/// Sizes above these are damage rather than a network.
const MOST_LAYERS: usize = 4096;
const WIDEST: usize = 1 << 24;

/// Sizes of a tower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TowerConfig {
    /// Blocks, at least 1.
    pub layers: usize,
    /// E.
    pub width: usize,
    /// H; divides E into heads of an even width.
    pub heads: usize,
    /// G; divides H.
    pub kv_heads: usize,
}

impl TowerConfig {
    /// D.
    pub fn head_width(&self) -> usize {
        self.width / self.heads.max(1)
    }

    /// Refuses sizes that no tower has, in the words of their keys.
    pub fn check(&self) -> std::result::Result<(), String> {
        let Self { layers, width, heads, kv_heads } = *self;
        if !(1..=MOST_LAYERS).contains(&layers) {
            return Err(format!("layers: expected 1 to {MOST_LAYERS}, got {layers}"));
        }
        if width > WIDEST {
            return Err(format!("width: expected at most {WIDEST}, got {width}"));
        }
        if heads == 0 || width == 0 || !width.is_multiple_of(heads) {
            return Err(format!("heads: expected a divisor of the width {width}, got {heads}"));
        }
        let head = self.head_width();
        if !head.is_multiple_of(2) || head > 256 {
            return Err(format!("heads: expected heads of an even width of at most 256, got {head}"));
        }
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(format!("kv_heads: expected a divisor of the {heads} heads, got {kv_heads}"));
        }
        Ok(())
    }

    /// Names and shapes of the parameters, block by block.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (e, kv) = (self.width, self.kv_heads * self.head_width());
        let block = |layer: usize| {
            let named = move |part: &str, shape: [usize; 2]| (weight(layer, part), shape.to_vec());
            [
                named("attn.c_q", [e, e]),
                named("attn.c_k", [kv, e]),
                named("attn.c_v", [kv, e]),
                named("attn.c_proj", [e, e]),
                named("mlp.c_fc", [4 * e, e]),
                named("mlp.c_proj", [e, 4 * e]),
            ]
        };
        (0..self.layers).flat_map(block).collect()
    }
}

fn weight(layer: usize, part: &str) -> String {
    format!("blocks.{layer}.{part}.weight")
}

/// Which keys a query sees.
#[derive(Clone, Copy, Debug)]
pub enum Sees<'a> {
    /// Those of a pattern. Entries past a row's length are nobody's keys, and get nothing from attention themselves.
    Pattern(Pattern, &'a Rows),
    /// All, each score raised by `bias_btt` [B, T queries, T keys]. A plain T × T softmax: for parity with code that masks
    /// by large negative biases, where rows past their length take part.
    Bias(&'a Tensor),
}

/// Angles of the entries, as the rotation by +θ has them.
#[derive(Clone, Copy, Debug)]
pub struct Angles<'a> {
    /// Cosines, [T, D/2] for all rows or [B·T, D/2].
    pub cos: &'a Tensor,
    /// Sines, likewise.
    pub sin: &'a Tensor,
}

/// Blocks over the parameters of a [`ParamStore`].
#[derive(Clone, Debug)]
pub struct Tower {
    config: TowerConfig,
    /// The gain that the norms do not have, of the model's and of a head's width.
    ones_e: Tensor,
    ones_d: Tensor,
    #[cfg(feature = "cuda")]
    on_gpu: Option<std::sync::Arc<device::OnGpu>>,
}

impl Tower {
    /// A tower of these sizes.
    ///
    /// # Errors
    /// In the name of `network`, when there is none of these sizes.
    pub fn new(network: &'static str, config: TowerConfig) -> Result<Self> {
        config.check().map_err(|message| BaseError::Network { network, message })?;
        let ones = |width: usize| Tensor::from_vec(vec![1f32; width], width, &CandleDevice::Cpu);
        Ok(Self {
            config,
            ones_e: ones(config.width)?,
            ones_d: ones(config.head_width())?,
            #[cfg(feature = "cuda")]
            on_gpu: None,
        })
    }

    /// Blocks run on the processor, which is the only device that there is without the feature `cuda`.
    ///
    /// # Errors
    /// Never.
    #[cfg(not(feature = "cuda"))]
    pub fn set_device(&mut self, _: &Device) -> Result<()> {
        Ok(())
    }

    /// What blocks run on.
    pub fn device(&self) -> Device {
        #[cfg(feature = "cuda")]
        return self.on_gpu.as_ref().map_or(Device::Cpu, |on| on.device.clone());
        #[cfg(not(feature = "cuda"))]
        Device::Cpu
    }

    /// Its sizes.
    pub fn config(&self) -> &TowerConfig {
        &self.config
    }

    /// Adds fresh parameters to `params`; the values depend on the seed and the names alone.
    pub fn insert_parameters(&self, params: &mut ParamStore, group: Group, seed: u64) -> Result<()> {
        for (name, shape) in self.config.tensors() {
            insert_uniform(params, group, &name, &shape, shape[1], seed)?;
        }
        Ok(())
    }

    /// The stream [B, T, E] behind the last block; differentiable in `x_bte` and in every parameter that learns.
    ///
    /// # Errors
    /// When shapes do not agree or a parameter is missing.
    pub fn forward(&self, params: &ParamStore, x_bte: &Tensor, angles: Angles, sees: Sees) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let (Some(on), Some(attending)) = (&self.on_gpu, device::on_device(sees)) {
            return self.forward_on(on, params, x_bte, angles, attending);
        }
        let back = angles.back()?;
        let mut x_bte = x_bte.clone();
        for layer in 0..self.config.layers {
            x_bte = self.block(params, layer, &x_bte, &back, sees)?;
        }
        Ok(x_bte)
    }

    fn block(
        &self,
        params: &ParamStore,
        layer: usize,
        x_bte: &Tensor,
        back: &[Tensor; 2],
        sees: Sees,
    ) -> Result<Tensor> {
        let apply = |part: &str, x: &Tensor| -> Result<Tensor> {
            Ok(linear(x, &params.taped(&weight(layer, part))?, None)?)
        };
        let [q, k, v] = self.heads(params, layer, x_bte, back)?;
        let scale = self.scale();
        let mixed_bthd = match sees {
            Sees::Pattern(pattern, rows) => {
                let options = Options { scale, pattern, rows, slopes: None, products: Products::F32 };
                attention_with(&q, &k, &v, &options)?
            }
            Sees::Bias(bias_btt) => biased::attention([&q, &k, &v], scale, bias_btt)?,
        };
        let x_bte = (x_bte + apply("attn.c_proj", &mixed_bthd.reshape(x_bte.shape())?)?)?;
        let wide_btf = relu2(&apply("mlp.c_fc", &self.norm(&x_bte)?)?)?;
        Ok((&x_bte + apply("mlp.c_proj", &wide_btf)?)?)
    }

    /// Queries [B, T, H, D], keys and values [B, T, G, D] of a block whose input is `x_bte`.
    fn heads(
        &self,
        params: &ParamStore,
        layer: usize,
        x_bte: &Tensor,
        [cos, sin]: &[Tensor; 2],
    ) -> Result<[Tensor; 3]> {
        let (b, t, _) = x_bte.dims3()?;
        let n_bte = self.norm(x_bte)?;
        let split = |part: &str, heads: usize| -> Result<Tensor> {
            let wide = linear(&n_bte, &params.taped(&weight(layer, part))?, None)?;
            Ok(wide.reshape((b, t, heads, self.config.head_width()))?)
        };
        let turned = |x_bthd: Tensor| -> Result<Tensor> {
            Ok(rms_norm(&rope(&x_bthd, cos, sin)?, &self.ones_d, EPS)?)
        };
        let TowerConfig { heads, kv_heads, .. } = self.config;
        Ok([
            turned(split("attn.c_q", heads)?)?,
            turned(split("attn.c_k", kv_heads)?)?,
            split("attn.c_v", kv_heads)?,
        ])
    }

    fn norm(&self, x_bte: &Tensor) -> Result<Tensor> {
        Ok(rms_norm(x_bte, &self.ones_e, EPS)?)
    }

    fn scale(&self) -> f64 {
        1.0 / (self.config.head_width() as f64).sqrt()
    }

    /// Mean entropy, in bits, of what the queries of each block attend to: 0 where all look at one key, log2 of the keys
    /// that are seen where they look at all alike. One value per block, over all rows, heads and valid entries.
    ///
    /// By brute force in f64 from the queries and keys of the forward pass: a metric for short rows, not part of training.
    ///
    /// # Errors
    /// As [`Tower::forward`].
    pub fn attention_entropy(
        &self,
        params: &ParamStore,
        x_bte: &Tensor,
        angles: Angles,
        pattern: Pattern,
        rows: &Rows,
    ) -> Result<Vec<f64>> {
        let TowerConfig { layers, heads, kv_heads, .. } = self.config;
        let (batch, entries, _) = x_bte.dims3()?;
        let back = angles.back()?;
        let sizes = reference::Sizes { batch, entries, heads, kv_heads, width: self.config.head_width() };
        let problem = Problem { sizes, scale: self.scale(), pattern, rows, slopes: None };
        let wide = |x: &Tensor| -> Result<Vec<f64>> {
            let values: Vec<f32> = x.flatten_all()?.to_vec1()?;
            Ok(values.into_iter().map(f64::from).collect())
        };
        let mut x_bte = x_bte.detach();
        let mut of_blocks = Vec::with_capacity(layers);
        for layer in 0..layers {
            let [q, k, _] = self.heads(params, layer, &x_bte, &back)?;
            let (q, k) = (wide(&q)?, wide(&k)?);
            let (mut bits, mut queries) = (0.0, 0usize);
            for b in 0..batch {
                let valid = rows.lengths.as_ref().map_or(entries, |lengths| lengths[b]);
                for (h, i) in (0..heads).flat_map(|h| (0..valid).map(move |i| (h, i))) {
                    let seen = problem.probabilities(&q, &k, [b, h, i]);
                    bits -= seen.iter().filter(|(_, p)| *p > 0.0).map(|(_, p)| p * p.log2()).sum::<f64>();
                    queries += 1;
                }
            }
            of_blocks.push(bits / queries.max(1) as f64);
            x_bte = self.block(params, layer, &x_bte, &back, Sees::Pattern(pattern, rows))?.detach();
        }
        Ok(of_blocks)
    }
}

impl Angles<'_> {
    /// Tables of the rotation by −θ, as the kernel, which turns by +θ, reads them.
    fn back(&self) -> Result<[Tensor; 2]> {
        Ok([self.cos.clone(), self.sin.neg()?])
    }
}
