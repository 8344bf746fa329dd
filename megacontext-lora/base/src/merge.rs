//! An adapter merged into its base: a plain model folder that any reader of Llama models loads.
//!
//! Source: LoRA (Hu et al. 2021), W' = W + (alpha/r)·B·A. Trained embeddings and norms replace the base's; the
//! adapter's RoPE scaling and context length go into `config.json`: a merged model without its scaling is broken.
//! A tied model stays tied: its adapters carry one embedding for both ends.
//!
//! Shapes: A [r, in], B [out, r], W [out, in]; products in f32. One weight at a time is in memory.
//! Errors: everything that [`Adapter::check_against`] refuses, damaged weights, a target that is not empty, the disk.
//!
//! Storing in f16 or bf16 rounds what was trained in f32; logits then differ from base + adapter by that rounding. Ask
//! for f32 to have them equal.

use std::path::Path;

use crate::adapter::Adapter;
use crate::config::DecoderConfig;
use crate::error::{BaseError, Result};
use crate::hf_export::write_model_streamed;
use crate::weights::{Dtype, Weights};

/// What a merge wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct MergeReport {
    /// Storage type of the merged weights.
    pub dtype: Dtype,
    /// Linear layers that took up a LoRA product.
    pub merged: usize,
    /// Tensors replaced by trained ones.
    pub replaced: usize,
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
    adapter.check_against(base, &weights.fingerprint())?;
    let tensors = base.tensors();
    weights.check(&tensors)?;
    let dtype = match dtype {
        Some(dtype) => dtype,
        None => weights.common_dtype(tensors.iter().map(|(name, _)| name.as_str()))?,
    };
    let config = match &adapter.config.megacontext {
        Some(own) => base.extended(own.rope_scaling.clone(), own.context_length),
        None => base.clone(),
    };
    let scale = adapter.lora().scale();
    let (mut merged, mut replaced) = (0, 0);
    write_model_streamed(out, &config, dtype, Some(weights.dir()), |name| {
        if let Some(trained) = adapter.tensors.get(name) {
            replaced += 1;
            return Ok(trained.clone());
        }
        let shape = weights.shape(name).map(<[usize]>::to_vec).unwrap_or_default();
        let w_oi = weights.tensor_f32(name, &shape)?;
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let factor = |which: &str| adapter.tensors.get(&format!("{module}.lora_{which}.weight"));
        let (Some(a_ri), Some(b_or)) = (factor("A"), factor("B")) else { return Ok(w_oi) };
        merged += 1;
        let update_oi = (b_or.matmul(a_ri)? * scale)?;
        (w_oi + update_oi).map_err(BaseError::from)
    })?;
    Ok(MergeReport { dtype, merged, replaced, config })
}
