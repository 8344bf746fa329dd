//! Gradient buffers of the parameters that learn, and a step of AdamW over them.
//!
//! A buffer is as large as its parameter, is made when the first gradient arrives, and collects micro-batches until
//! the optimiser has used it. Optimiser state is kept per parameter and therefore per group: a group that pauses
//! keeps its moments and its own step count.
//!
//! Source: AdamW (Loshchilov and Hutter 2019); clipping by global norm (Pascanu et al. 2013).
//! Weight decay is left off for norms, embeddings and biases, as is usual.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use megacontext_kernels::{adamw, cpu};
use serde::{Deserialize, Serialize};

use crate::block::{Saved, Workspace};
use crate::error::{BaseError, Result};
use crate::params::{Group, ParamStore};

/// Gradients by parameter name, and the memory that the backward pass uses again from step to step.
#[derive(Default)]
pub struct Gradients {
    buffers: BTreeMap<String, Vec<f32>>,
    scratch: Scratch,
}

/// Buffers of a step: each block's input, what blocks keep from forward to backward, and what they share.
#[derive(Default)]
pub(crate) struct Scratch {
    pub inputs: Vec<Vec<f32>>,
    pub saved: Vec<Saved>,
    pub workspace: Workspace,
    pub stream: Vec<f32>,
}

impl Scratch {
    /// Room for a model of `layers` blocks of which those from `lowest` on are walked back.
    pub fn prepare(&mut self, layers: usize, lowest: usize, recompute: bool) {
        let walked = layers - lowest;
        self.inputs.resize_with(walked, Vec::new);
        self.saved.resize_with(if recompute { 1 } else { walked.max(1) }, Saved::default);
    }
}

impl Gradients {
    /// No gradients yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The scratch memory, to be given back with [`Gradients::put_scratch`].
    pub(crate) fn take_scratch(&mut self) -> Scratch {
        std::mem::take(&mut self.scratch)
    }

    pub(crate) fn put_scratch(&mut self, scratch: Scratch) {
        self.scratch = scratch;
    }

    /// The buffer of a parameter of `len` values, zeroed when new.
    pub fn buffer(&mut self, name: &str, len: usize) -> &mut Vec<f32> {
        self.buffers.entry(name.to_string()).or_insert_with(|| vec![0.0; len])
    }

    /// Adds a gradient.
    pub fn add(&mut self, name: &str, gradient: &Tensor) -> Result<()> {
        Ok(cpu::accumulate(self.buffer(name, gradient.elem_count()), gradient)?)
    }

    /// The gradient of a parameter, if one has arrived.
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.buffers.get(name).map(Vec::as_slice)
    }

    /// Names that have a gradient, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.buffers.keys().map(String::as_str)
    }

    /// Global L2 norm.
    pub fn norm(&self) -> f64 {
        self.buffers.values().map(|g| adamw::sum_of_squares(g)).sum::<f64>().sqrt()
    }

    /// Zeroes every buffer, keeping the memory.
    pub fn clear(&mut self) {
        for buffer in self.buffers.values_mut() {
            buffer.fill(0.0);
        }
    }
}

/// Settings of AdamW that stay for a whole run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, for weights that take part in products.
    pub weight_decay: f64,
    /// Largest global gradient norm; larger ones are scaled down to it. 0 switches clipping off.
    pub clip: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.0, clip: 1.0 }
    }
}

struct Moments {
    step: u64,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
}

/// AdamW over a [`ParamStore`].
pub struct Optimizer {
    config: AdamWConfig,
    state: BTreeMap<String, Moments>,
}

impl Optimizer {
    /// Fresh state.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, state: BTreeMap::new() }
    }

    /// Other settings from the next step on; moments and step counts stay.
    pub fn set_config(&mut self, config: AdamWConfig) {
        self.config = config;
    }

    /// One step on every parameter that has a gradient and learns; returns the gradient norm before clipping.
    ///
    /// # Errors
    /// When the norm is not finite: then nothing has been changed.
    pub fn step(&mut self, params: &ParamStore, gradients: &Gradients, lr: f64) -> Result<f64> {
        let norm = gradients.norm();
        if !norm.is_finite() {
            return Err(BaseError::NonFinite { what: "gradient norm".to_string(), value: norm });
        }
        let clip = self.config.clip;
        let gradient_scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
        for (name, parameter) in params.trainable() {
            let Some(gradient) = gradients.get(&name) else { continue };
            let decays =
                matches!(params.group(&name), Some(Group::Base | Group::Lora)) && parameter.rank() > 1;
            let moments = self.state.entry(name).or_insert_with(|| Moments {
                step: 0,
                exp_avg: vec![0.0; gradient.len()],
                exp_avg_sq: vec![0.0; gradient.len()],
            });
            moments.step += 1;
            let with = adamw::AdamW {
                lr,
                beta1: self.config.betas[0],
                beta2: self.config.betas[1],
                eps: self.config.eps,
                weight_decay: if decays { self.config.weight_decay } else { 0.0 },
                gradient_scale,
                step: moments.step,
            };
            adamw::step(&parameter, gradient, &mut moments.exp_avg, &mut moments.exp_avg_sq, with)?;
        }
        Ok(norm)
    }

    /// Everything a checkpoint needs: moments as tensors (`exp_avg.<name>`, `exp_avg_sq.<name>`, `step.<name>`).
    pub fn export(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = Vec::new();
        for (name, m) in &self.state {
            let flat = |v: &[f32]| Tensor::from_slice(v, v.len(), &Device::Cpu);
            tensors.push((format!("exp_avg.{name}"), flat(&m.exp_avg)?));
            tensors.push((format!("exp_avg_sq.{name}"), flat(&m.exp_avg_sq)?));
            // f32 like the rest of the file: exact up to 16.7 million steps.
            tensors.push((format!("step.{name}"), Tensor::new(&[m.step as f32], &Device::Cpu)?));
        }
        Ok(tensors)
    }

    /// The reverse of [`Optimizer::export`], checked against the parameters.
    pub fn import(&mut self, params: &ParamStore, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut state = BTreeMap::new();
        for (key, step) in tensors.iter().filter(|(k, _)| k.starts_with("step.")) {
            let name = &key["step.".len()..];
            let bad = |message: String| BaseError::Parameter { name: name.to_string(), message };
            let parameter = params.get(name).ok_or_else(|| bad("optimiser state for no parameter".into()))?;
            let moment = |prefix: &str| -> Result<Vec<f32>> {
                let tensor = tensors
                    .get(&format!("{prefix}.{name}"))
                    .ok_or_else(|| bad(format!("optimiser state has no {prefix}")))?;
                let values = tensor.flatten_all()?.to_vec1::<f32>()?;
                if values.len() != parameter.elem_count() {
                    return Err(bad(format!(
                        "{prefix}: expected {} values, got {}",
                        parameter.elem_count(),
                        values.len()
                    )));
                }
                Ok(values)
            };
            let moments = Moments {
                step: step.flatten_all()?.to_vec1::<f32>()?.first().copied().unwrap_or(0.0) as u64,
                exp_avg: moment("exp_avg")?,
                exp_avg_sq: moment("exp_avg_sq")?,
            };
            state.insert(name.to_string(), moments);
        }
        self.state = state;
        Ok(())
    }
}
