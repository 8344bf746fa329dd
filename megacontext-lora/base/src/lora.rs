//! LoRA: low-rank updates of frozen linear layers.
//!
//! Source: Hu et al. 2021, h = W·x + (alpha/r)·B·A·x with A [r, in] uniform as PyTorch's `kaiming_uniform_(a=√5)`
//! gives it (bounds ±1/√in) and B [out, r] zero, so that an untrained adapter changes nothing.
//!
//! Shapes: r rank, A [r, in], B [out, r]. Errors: rank 0, an unknown target, a layer that does not exist.

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::config::{DecoderConfig, Linear};
use crate::error::{BaseError, Result};
use crate::params::{Group, ParamStore};
use crate::random::Random;

/// The linear layers of a block that can carry LoRA, with the sub-module they live in.
pub const TARGETS: [(&str, &str); 4] =
    [("self_attn", "q_proj"), ("self_attn", "k_proj"), ("self_attn", "v_proj"), ("self_attn", "o_proj")];

/// Where LoRA goes and how strong it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// Strength: the update is scaled by alpha / r.
    pub alpha: f64,
    /// Probability with which an input of A is zeroed while training.
    pub dropout: f64,
    /// Names of the linear layers, for example `q_proj`.
    pub target_modules: Vec<String>,
    /// Blocks that carry LoRA; none means all.
    pub layers: Option<Vec<usize>>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            alpha: 16.0,
            dropout: 0.0,
            target_modules: TARGETS.iter().map(|(_, name)| name.to_string()).collect(),
            layers: None,
        }
    }
}

impl LoraConfig {
    /// alpha / r.
    pub fn scale(&self) -> f64 {
        self.alpha / self.r as f64
    }

    /// Does block `layer` carry LoRA on `target`?
    pub fn applies(&self, layer: usize, target: &str) -> bool {
        self.target_modules.iter().any(|t| t == target)
            && self.layers.as_ref().is_none_or(|layers| layers.contains(&layer))
    }

    /// Refuses what cannot be built on this model.
    pub fn validate(&self, config: &DecoderConfig) -> Result<()> {
        let fail = |message: String| Err(BaseError::Lora { message });
        if self.r == 0 {
            return fail("r (rank): expected at least 1, got 0".into());
        }
        let widest = config.hidden_size.max(config.num_attention_heads * config.head_dim);
        if self.r > widest {
            return fail(format!(
                "r (rank): expected at most {widest}, the width of the model, got {}",
                self.r
            ));
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 {
            return fail(format!("alpha: expected a positive number, got {}", self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return fail(format!("dropout: expected 0 <= p < 1, got {}", self.dropout));
        }
        if self.target_modules.is_empty() {
            return fail("target_modules: expected at least one layer name, got none".into());
        }
        for (at, target) in self.target_modules.iter().enumerate() {
            if !TARGETS.iter().any(|(_, name)| name == target) {
                let known: Vec<&str> = TARGETS.iter().map(|(_, name)| *name).collect();
                return fail(format!("target_modules: expected names out of {known:?}, got \"{target}\""));
            }
            if self.target_modules[..at].contains(target) {
                return fail(format!("target_modules: \"{target}\" is named twice"));
            }
        }
        if let Some(layers) = &self.layers {
            if layers.is_empty() {
                return fail("layers: expected at least one block number or null for all, got []".into());
            }
            if let Some(bad) = layers.iter().find(|l| **l >= config.num_hidden_layers) {
                let last = config.num_hidden_layers - 1;
                return fail(format!("layers: expected block numbers 0 to {last}, got {bad}"));
            }
        }
        Ok(())
    }

    /// Every layer that carries LoRA on this model: (module name, out width, in width).
    pub fn modules(&self, config: &DecoderConfig) -> Vec<(String, usize, usize)> {
        let carries = |l: &Linear| l.layer.is_some_and(|layer| self.applies(layer, l.target()));
        config.linears().into_iter().filter(carries).map(|l| (l.name, l.out, l.inp)).collect()
    }

    /// Adds freshly initialised factors to `params`. The values depend on `seed` and the module's name alone.
    pub fn attach(&self, config: &DecoderConfig, params: &mut ParamStore, seed: u64) -> Result<()> {
        self.validate(config)?;
        for (module, out, inp) in self.modules(config) {
            let mut random = Random::named(seed, &module);
            let bound = 1.0 / (inp as f64).sqrt();
            let a: Vec<f32> = (0..self.r * inp).map(|_| random.uniform(-bound, bound) as f32).collect();
            let a_ri = Tensor::from_vec(a, (self.r, inp), &Device::Cpu)?;
            let b_or = Tensor::zeros((out, self.r), candle_core::DType::F32, &Device::Cpu)?;
            params.insert(format!("{module}.lora_A.weight"), Group::Lora, a_ri)?;
            params.insert(format!("{module}.lora_B.weight"), Group::Lora, b_or)?;
        }
        Ok(())
    }
}
