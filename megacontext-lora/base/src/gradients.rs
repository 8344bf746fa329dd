//! Gradient buffers of the parameters that learn, and a step of AdamW over them.
//!
//! A buffer is as large as its parameter, is made when the first gradient arrives, and collects micro-batches until
//! the optimiser has used it. Optimiser state is kept per parameter and therefore per group: a group that pauses
//! keeps its moments and its own step count.
//!
//! Source: AdamW (Loshchilov and Hutter 2019); clipping by global norm (Pascanu et al. 2013).
//! Weight decay is left off for norms, embeddings (GistNet's prepended token and LensNet's levels among them) and biases,
//! as is usual.

use std::borrow::Cow;
use std::collections::BTreeMap;
#[cfg(feature = "cuda")]
use std::collections::btree_map::Entry;

use candle_core::Tensor;
use megacontext_kernels::adamw;
use megacontext_kernels::cpu::Values;
use megacontext_kernels::rows;
use serde::{Deserialize, Serialize};

use crate::buffers::Buffers;
use crate::error::{BaseError, Result};
#[cfg(feature = "cuda")]
use crate::machine::gpu::{
    Gpu,
    optimizer::{Remote, There},
};
use crate::params::{Group, ParamStore};

/// Gradients by parameter name, and the memory that the backward pass uses again from step to step.
#[derive(Default)]
pub struct Gradients {
    buffers: BTreeMap<String, Vec<f32>>,
    passes: Buffers,
    #[cfg(feature = "cuda")]
    stay: bool,
    #[cfg(feature = "cuda")]
    there: Option<There>,
}

impl Gradients {
    /// No gradients yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// No gradients yet. Those that a GPU makes stay there, for an [`Optimizer`] that steps there too: [`Gradients::get`] and
    /// [`Gradients::names`] know those alone that were made here.
    pub fn staying() -> Self {
        #[cfg(feature = "cuda")]
        return Self { stay: true, ..Self::default() };
        #[cfg(not(feature = "cuda"))]
        Self::default()
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn stay(&self) -> bool {
        self.stay
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn there(&self) -> Option<&There> {
        self.there.as_ref()
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn forget_there(&mut self, name: &str) {
        if let Some(there) = &mut self.there {
            there.forget(name);
        }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn there_mut(&mut self, gpu: &Gpu) -> &mut There {
        self.there.get_or_insert_with(|| There::new(gpu))
    }

    /// The memory of passes, to be given back with [`Gradients::put_passes`].
    pub(crate) fn take_passes(&mut self) -> Buffers {
        std::mem::take(&mut self.passes)
    }

    pub(crate) fn put_passes(&mut self, passes: Buffers) {
        self.passes = passes;
    }

    /// The memory of passes, kept from step to step.
    pub fn passes(&self) -> &Buffers {
        &self.passes
    }

    /// Lets the memory of passes go; the gradients stay. The next step makes it anew.
    pub fn release_passes(&mut self) {
        self.passes = Buffers::default();
    }

    /// Takes the buffer of a parameter of `len` values out, zeroed when new; [`Gradients::put`] brings it back.
    pub(crate) fn take(&mut self, name: &str, len: usize) -> Vec<f32> {
        self.buffers.remove(name).unwrap_or_else(|| vec![0.0; len])
    }

    pub(crate) fn put(&mut self, name: String, buffer: Vec<f32>) {
        self.buffers.insert(name, buffer);
    }

    /// The buffer of a parameter of `len` values, zeroed when new.
    pub fn buffer(&mut self, name: &str, len: usize) -> &mut Vec<f32> {
        self.buffers.entry(name.to_string()).or_insert_with(|| vec![0.0; len])
    }

    /// Adds to the gradient of a parameter.
    #[cfg(feature = "cuda")]
    pub(crate) fn add(&mut self, name: &str, gradient: &[f32]) {
        rows::add_assign(gradient, self.buffer(name, gradient.len()));
    }

    /// The gradient of a parameter, if one has arrived.
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.buffers.get(name).map(Vec::as_slice)
    }

    /// Names that have a gradient, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.buffers.keys().map(String::as_str)
    }

    /// Walks back from `loss`, a scalar on candle's tape, and adds the gradient of every parameter of `params` that learns; those
    /// that operations on the tape left with the store ([`crate::tower`] on a GPU) are among them.
    ///
    /// # Errors
    /// When `loss` is no scalar, or a parameter that learns gets no gradient: one that got lost would never learn, and
    /// nothing would say so. Then nothing has been added.
    pub fn add_backward(&mut self, loss: &Tensor, params: &ParamStore) -> Result<()> {
        if loss.rank() != 0 {
            let message = format!("loss: expected a scalar, got {:?}", loss.dims());
            return Err(BaseError::Input { message });
        }
        // Of a walk that failed nothing is taken for this one's.
        #[cfg(feature = "cuda")]
        drop(params.take_beside());
        let grads = loss.backward()?;
        #[cfg(feature = "cuda")]
        let mut beside = params.take_beside();
        #[cfg(not(feature = "cuda"))]
        let beside = Self::new();
        let arrived = |(name, leaf): (String, Tensor)| match grads.get(&leaf) {
            Some(gradient) => Ok((name, Some(gradient.contiguous()?))),
            None if beside.has(&name) => Ok((name, None)),
            None => Err(BaseError::Parameter {
                name,
                message: "expected a gradient, since it learns, got none from this loss".to_string(),
            }),
        };
        let arrived: Vec<(String, Option<Tensor>)> =
            params.leaves().into_iter().map(arrived).collect::<Result<_>>()?;
        #[cfg(feature = "cuda")]
        for (name, _) in arrived.iter().filter(|(_, gradient)| gradient.is_some()) {
            self.bring_home(name)?;
        }
        #[cfg(feature = "cuda")]
        if let Some(there) = beside.there.take() {
            self.take_over(there)?;
        }
        for (name, gradient) in arrived {
            let values = gradient.as_ref().map(Values::of).transpose()?;
            let of_both = [values.as_deref(), beside.get(&name)];
            for values in of_both.into_iter().flatten() {
                rows::add_assign(values, self.buffer(&name, values.len()));
            }
        }
        Ok(())
    }

    /// Is there a gradient of this name, wherever it lies?
    fn has(&self, name: &str) -> bool {
        #[cfg(feature = "cuda")]
        if self.there.as_ref().is_some_and(|there| there.has(name)) {
            return true;
        }
        self.buffers.contains_key(name)
    }

    /// Global L2 norm.
    ///
    /// # Errors
    /// What a GPU's driver says, where gradients stay there.
    pub fn norm(&self) -> Result<f64> {
        let here = self.buffers.values().map(|g| adamw::sum_of_squares(g)).sum::<f64>();
        #[cfg(feature = "cuda")]
        let there = self.there.as_ref().map_or(Ok(0.0), There::sum_of_squares)?;
        #[cfg(not(feature = "cuda"))]
        let there = 0.0;
        Ok((here + there).sqrt())
    }

    /// Zeroes every buffer, keeping the memory; a GPU's is let go.
    pub fn clear(&mut self) {
        #[cfg(feature = "cuda")]
        drop(self.there.take());
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
    /// LoRA+ (Hayou et al. 2024): the learning rate of LoRA's B of linear layers in learning rates of everything else.
    pub lora_plus_lr_ratio: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.0, clip: 1.0, lora_plus_lr_ratio: 1.0 }
    }
}

/// Both moments of a parameter, exp_avg and exp_avg_sq, where it is stepped.
enum Pair {
    Here([Vec<f32>; 2]),
    #[cfg(feature = "cuda")]
    There([Remote; 2]),
}

impl Pair {
    /// The values for reading.
    fn read(&self) -> Result<[Cow<'_, [f32]>; 2]> {
        match self {
            Self::Here([m, v]) => Ok([Cow::Borrowed(m), Cow::Borrowed(v)]),
            #[cfg(feature = "cuda")]
            Self::There([m, v]) => Ok([Cow::Owned(m.to_host()?), Cow::Owned(v.to_host()?)]),
        }
    }

    /// The values to be written here.
    fn here(&mut self) -> Result<&mut [Vec<f32>; 2]> {
        #[cfg(feature = "cuda")]
        if let Self::There([m, v]) = self {
            *self = Self::Here([m.to_host()?, v.to_host()?]);
        }
        match self {
            Self::Here(pair) => Ok(pair),
            #[cfg(feature = "cuda")]
            Self::There(_) => Err(BaseError::Device { message: "expected moments here".to_string() }),
        }
    }

    /// The values to be written where a gradient has stayed.
    #[cfg(feature = "cuda")]
    fn there(&mut self, there: &There) -> Result<&mut [Remote; 2]> {
        if let Self::Here([m, v]) = self {
            *self = Self::There([there.remote(Some(m), m.len())?, there.remote(Some(v), v.len())?]);
        }
        match self {
            Self::There(pair) => Ok(pair),
            Self::Here(_) => Err(BaseError::Device { message: "expected moments on the GPU".to_string() }),
        }
    }
}

struct Moments {
    step: u64,
    pair: Pair,
}

/// Do weights of this group and name decay? Rows of tokens and of levels are embeddings, and so is a token of a network's
/// own.
fn decays(group: Group, name: &str) -> bool {
    const EMBEDDINGS: [&str; 3] = [".trainable_tokens_delta", "cls_token", "level_embed.weight"];
    matches!(group, Group::Base | Group::Lora | Group::Gistnet | Group::Lensnet)
        && !EMBEDDINGS.iter().any(|end| name.ends_with(end))
}

/// AdamW over a [`ParamStore`]. A parameter whose gradient stays on a GPU is stepped there, and its moments go there with it.
pub struct Optimizer {
    config: AdamWConfig,
    state: BTreeMap<String, Moments>,
}

impl Optimizer {
    /// Fresh state.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, state: BTreeMap::new() }
    }

    /// The same once more, with moments of its own, which lie here.
    ///
    /// # Errors
    /// What a GPU's driver says, where moments lie there.
    pub fn copy(&self) -> Result<Self> {
        let copied = |(name, moments): (&String, &Moments)| {
            let pair = Pair::Here(moments.pair.read()?.map(Cow::into_owned));
            Ok((name.clone(), Moments { step: moments.step, pair }))
        };
        let state = self.state.iter().map(copied).collect::<Result<_>>()?;
        Ok(Self { config: self.config.clone(), state })
    }

    /// Other settings from the next step on; moments and step counts stay.
    pub fn set_config(&mut self, config: AdamWConfig) {
        self.config = config;
    }

    /// One step on every parameter that has a gradient and learns; returns the gradient norm before clipping.
    ///
    /// # Errors
    /// When the norm is not finite, a gradient has parts here and on a GPU, or there is no memory for moments: then nothing has been
    /// changed.
    pub fn step(&mut self, params: &ParamStore, gradients: &Gradients, lr: f64) -> Result<f64> {
        let norm = gradients.norm()?;
        if !norm.is_finite() {
            return Err(BaseError::NonFinite { what: "gradient norm".to_string(), value: norm });
        }
        #[cfg(feature = "cuda")]
        self.make_room(params, gradients)?;
        let clip = self.config.clip;
        let gradient_scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
        for (name, parameter) in params.leaves() {
            #[cfg(feature = "cuda")]
            let there = gradients.there().filter(|there| there.has(&name));
            #[cfg(not(feature = "cuda"))]
            let there: Option<()> = None;
            let gradient = gradients.get(&name);
            if gradient.is_none() && there.is_none() {
                continue;
            }
            let decays =
                parameter.rank() > 1 && params.group(&name).is_some_and(|group| decays(group, &name));
            let faster = if name.ends_with(".lora_B.weight") { self.config.lora_plus_lr_ratio } else { 1.0 };
            let len = parameter.elem_count();
            let step = self.state.get(&name).map_or(0, |moments| moments.step) + 1;
            let with = adamw::AdamW {
                lr: lr * faster,
                beta1: self.config.betas[0],
                beta2: self.config.betas[1],
                eps: self.config.eps,
                weight_decay: if decays { self.config.weight_decay } else { 0.0 },
                gradient_scale,
                step,
            };
            #[cfg(feature = "cuda")]
            if let Some(there) = there {
                let moments = self.moments_there(there, &name, len)?;
                let [m, v] = moments.pair.there(there)?;
                there.step(params, &name, [m, v], &with)?;
                moments.step = step;
                continue;
            }
            let Some(gradient) = gradient else { continue };
            let moments = self
                .state
                .entry(name.clone())
                .or_insert_with(|| Moments { step: 0, pair: Pair::Here([vec![0.0; len], vec![0.0; len]]) });
            let [m, v] = moments.pair.here()?;
            params.bring(&name)?;
            let stepped = adamw::step(&parameter, gradient, m, v, with);
            params.written(&name);
            stepped?;
            moments.step = step;
        }
        Ok(norm)
    }

    /// The moments of a parameter whose gradient has stayed on a GPU, of `len` values, there.
    #[cfg(feature = "cuda")]
    fn moments_there(&mut self, there: &There, name: &str, len: usize) -> Result<&mut Moments> {
        let moments = match self.state.entry(name.to_string()) {
            Entry::Occupied(moments) => moments.into_mut(),
            Entry::Vacant(none) => {
                let pair = Pair::There([there.remote(None, len)?, there.remote(None, len)?]);
                none.insert(Moments { step: 0, pair })
            }
        };
        moments.pair.there(there)?;
        Ok(moments)
    }

    /// Gets all the memory of a GPU that a step takes, so that it does not end in the middle.
    #[cfg(feature = "cuda")]
    fn make_room(&mut self, params: &ParamStore, gradients: &Gradients) -> Result<()> {
        let Some(there) = gradients.there() else { return Ok(()) };
        for (name, parameter) in params.leaves().into_iter().filter(|(name, _)| there.has(name)) {
            if gradients.get(&name).is_some_and(|here| here.iter().any(|value| *value != 0.0)) {
                let message = "expected a gradient in one place, got parts here and on a GPU".to_string();
                return Err(BaseError::Parameter { name, message });
            }
            self.moments_there(there, &name, parameter.elem_count())?;
            there.prepare(params, &name)?;
        }
        Ok(())
    }

    /// Brings all moments here: nothing is stepped for now.
    ///
    /// # Errors
    /// What a GPU's driver says, where moments lie there.
    pub fn bring_home(&mut self) -> Result<()> {
        self.state.values_mut().try_for_each(|moments| moments.pair.here().map(drop))
    }

    /// Everything a checkpoint needs: `exp_avg.<name>`, `exp_avg_sq.<name>`, `step.<name>`, borrowed where it lies here.
    ///
    /// # Errors
    /// What a GPU's driver says, where moments lie there.
    pub fn moments(&self) -> Result<Vec<(String, Cow<'_, [f32]>)>> {
        let mut all = Vec::with_capacity(3 * self.state.len());
        // A step that failed may have made room for some that there are none of.
        for (name, moments) in self.state.iter().filter(|(_, moments)| moments.step > 0) {
            let [m, v] = moments.pair.read()?;
            all.push((format!("exp_avg.{name}"), m));
            all.push((format!("exp_avg_sq.{name}"), v));
            // f32 like the rest of the file: exact up to 16.7 million steps.
            all.push((format!("step.{name}"), Cow::Owned(vec![moments.step as f32])));
        }
        Ok(all)
    }

    /// The reverse of [`Optimizer::moments`], checked against the parameters. On an error nothing has changed.
    pub fn import(
        &mut self,
        params: &ParamStore,
        moments: impl IntoIterator<Item = (String, Vec<f32>)>,
    ) -> Result<()> {
        let mut moments: BTreeMap<String, Vec<f32>> = moments.into_iter().collect();
        let names: Vec<String> =
            moments.keys().filter_map(|key| key.strip_prefix("step.")).map(str::to_string).collect();
        let mut state = BTreeMap::new();
        for name in names {
            let bad = |message: String| BaseError::Parameter { name: name.clone(), message };
            let shape = params.shape(&name).ok_or_else(|| bad("optimiser state for no parameter".into()))?;
            let mut take = |prefix: &str, len: usize| -> Result<Vec<f32>> {
                let values = moments
                    .remove(&format!("{prefix}.{name}"))
                    .ok_or_else(|| bad(format!("optimiser state has no {prefix}")))?;
                if values.len() != len {
                    return Err(bad(format!("{prefix}: expected {len} values, got {}", values.len())));
                }
                Ok(values)
            };
            let len = shape.iter().product();
            let read = Moments {
                step: take("step", 1)?[0] as u64,
                pair: Pair::Here([take("exp_avg", len)?, take("exp_avg_sq", len)?]),
            };
            state.insert(name.clone(), read);
        }
        self.state = state;
        Ok(())
    }
}
