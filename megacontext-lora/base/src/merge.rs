//! An adapter merged into its base: a plain model folder that any reader of its family loads.
//!
//! Source: W' = W + ΔW with the adapter's whole change of a weight ([`crate::lora::changed`]). Trained embeddings and norms replace the base's; the
//! adapter's RoPE scaling and context length go into `config.json`: a merged model without its scaling is broken.
//!
//! Tied models: where the adapter carries one embedding for both ends, the merged model stays tied. Where head and
//! embedding differ afterwards ([`Adapter::unties`]) it is written with a head of its own, `tie_word_embeddings` false,
//! and the report says so. Merging into a tied folder would change one end along with the other.
//!
//! Shapes: A [r, in], B [out, r], W [out, in]; products in f32. One weight at a time is in memory.
//! Errors: everything that [`Adapter::check_against`] refuses, damaged weights, a target that is not empty, the disk.
//!
//! Storing in f16 or bf16 rounds what was trained in f32; logits then differ from base + adapter by that rounding. Ask
//! for f32 to have them equal.

use std::path::Path;

use candle_core::Tensor;

use crate::adapter::Adapter;
use crate::config::DecoderConfig;
use crate::error::Result;
use crate::hf_export::write_model_streamed;
use crate::lora::{LoraModules, changed};
use crate::weights::{Dtype, Weights};

/// What a merge wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeReport {
    /// Storage type of the merged weights.
    pub dtype: Dtype,
    /// Weights that took up a LoRA product.
    pub merged: usize,
    /// Tensors replaced by trained ones.
    pub replaced: usize,
    /// The base was tied and the merged model is not.
    pub untied: bool,
    /// The configuration written.
    pub config: DecoderConfig,
}

/// Writes base + adapter as one model folder at `out`, which must not exist or be empty. `dtype` defaults to the base's
/// own (f32 where it mixes several). The tokenizer's files are copied from the base.
pub fn merge(
    weights: &Weights,
    base: &DecoderConfig,
    adapter: &Adapter,
    out: &Path,
    dtype: Option<Dtype>,
) -> Result<MergeReport> {
    let source = MergedTensors::new(weights, base, adapter)?;
    let dtype = match dtype {
        Some(dtype) => dtype,
        None => weights.common_dtype(base.tensors().iter().map(|(name, _)| name.as_str()))?,
    };
    let (mut merged, mut replaced) = (0, 0);
    write_model_streamed(out, &source.config, dtype, Some(weights.dir()), |name| {
        let (tensor, from) = source.tensor(name, |_| true)?;
        match from {
            From::Base => {}
            From::Lora => merged += 1,
            From::Trained => replaced += 1,
        }
        Ok(tensor)
    })?;
    Ok(MergeReport { dtype, merged, replaced, untied: source.untied, config: source.config })
}

/// Where a merged tensor's values come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum From {
    /// The base folder, unchanged.
    Base,
    /// The base folder and a LoRA product.
    Lora,
    /// The adapter, which trained it in full.
    Trained,
}

/// The tensors of base + adapter, one at a time.
pub(crate) struct MergedTensors<'a> {
    weights: &'a Weights,
    adapter: &'a Adapter,
    lora: LoraModules,
    /// The base's configuration as the result needs it: scaling and length of the adapter, tied or not.
    pub config: DecoderConfig,
    /// The base is tied and the result is not.
    pub untied: bool,
}

impl<'a> MergedTensors<'a> {
    /// Checks that the adapter is the base's and the weights are there.
    pub fn new(weights: &'a Weights, base: &DecoderConfig, adapter: &'a Adapter) -> Result<Self> {
        let untied = adapter.unties(base)?;
        let model = if untied { base.untied() } else { base.clone() };
        adapter.check_against(&model, &weights.fingerprint())?;
        weights.check(&base.tensors())?;
        let config = match &adapter.config.megacontext {
            Some(own) => model.extended(own.rope_scaling.clone(), own.context_length),
            None => model,
        };
        let scales = adapter.config.megacontext.as_ref().and_then(|own| own.sigma_scales.as_ref());
        let config = scales.map_or(config.clone(), |scales| config.with_sigma_scales(scales));
        let lora = adapter.lora().resolve(&config)?;
        Ok(Self { weights, adapter, lora, config, untied })
    }

    /// The tensor `name` of the result in f32, LoRA in it where `folds` says so of its module.
    pub fn tensor(&self, name: &str, folds: impl Fn(&str) -> bool) -> Result<(Tensor, From)> {
        let (base, from) = match self.adapter.tensors.get(name) {
            Some(trained) => (trained.clone(), From::Trained),
            None => {
                // A head that has just become one of its own begins as the embedding.
                let stored =
                    if self.weights.has(name) || !self.untied { name } else { self.config.embedding_name() };
                let shape = self.weights.shape(stored).map(<[usize]>::to_vec).unwrap_or_default();
                (self.weights.tensor_f32(stored, &shape)?, From::Base)
            }
        };
        if !folds(module_of(name)) {
            return Ok((base, from));
        }
        let factor = |name: &str| self.adapter.tensors.get(name).cloned();
        match changed(&self.lora, name, || Ok(base.clone()), factor)? {
            Some(merged) => Ok((merged, From::Lora)),
            None => Ok((base, from)),
        }
    }
}

/// The module that a weight belongs to.
pub(crate) fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}
