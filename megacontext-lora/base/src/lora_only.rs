//! An adapter for readers that take LoRA factors alone: a base folder with everything else put in, and an adapter that
//! carries the factors.
//!
//! vLLM refuses an adapter with `modules_to_save`; llama.cpp's converter refuses trained embeddings, and its reader passes
//! over norms. LongLoRA adapters have both, and stretched positions, which no adapter format states. So the trained
//! embeddings, norms and head, LoRA on embedding and head, and the RoPE scaling go into a copy of the base; what is left is
//! LoRA on the linear layers of blocks. Patched base and LoRA-only adapter together compute what base and adapter did, and
//! several adapters of one base no longer share it.
//!
//! Layout: `OUT/base` (a model folder), `OUT/adapter` (PEFT's format, `modules_to_save` null, made for `OUT/base` by
//! fingerprint and scaling).
//!
//! Shapes: as in [`crate::merge`]. Errors: as there, and `BaseError::Adapter` for an adapter that has no LoRA on blocks, or
//! DoRA.

use std::path::{Path, PathBuf};

use candle_core::Tensor;

use crate::adapter::{Adapter, MegacontextKey, write_adapter};
use crate::atomic::{AtomicDir, is_vacant};
use crate::config::DecoderConfig;
use crate::error::{BaseError, Result};
use crate::hf_export::write_model_streamed;
use crate::merge::{From, MergedTensors};
use crate::weights::{Dtype, Weights};

/// What an export wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraOnlyReport {
    /// The patched base.
    pub base: PathBuf,
    /// The adapter for it.
    pub adapter: PathBuf,
    /// Tensors of the base that are no longer what they were.
    pub patched: Vec<String>,
    /// Linear layers that the adapter acts on.
    pub modules: usize,
    /// The base was tied and the patched one is not.
    pub untied: bool,
    /// The patched base's configuration.
    pub config: DecoderConfig,
}

/// Writes `OUT/base` and `OUT/adapter`; `out` must not exist or be empty. Both appear together or not at all.
pub fn export_lora_only(
    weights: &Weights,
    base: &DecoderConfig,
    adapter: &Adapter,
    out: &Path,
    dtype: Dtype,
) -> Result<LoraOnlyReport> {
    let source = MergedTensors::new(weights, base, adapter)?;
    if adapter.lora().use_dora {
        let message = "expected plain LoRA, got DoRA (use_dora), which readers of LoRA alone do not compute: merge the \
                       adapter instead";
        return Err(BaseError::adapter(&adapter.dir, message));
    }
    if !is_vacant(out) {
        let message =
            "expected a folder that does not exist yet or is empty; choose another name or remove it";
        let source = std::io::Error::new(std::io::ErrorKind::AlreadyExists, message);
        return Err(BaseError::Io { path: out.to_path_buf(), source });
    }
    let blocks: Vec<String> =
        source.config.linears().into_iter().filter(|l| l.layer.is_some()).map(|l| l.name).collect();
    let in_block = |module: &str| blocks.iter().any(|block| block == module);
    let kept: Vec<(String, Tensor)> = adapter
        .tensors
        .iter()
        .filter(|(name, _)| name.split_once(".lora_").is_some_and(|(module, _)| in_block(module)))
        .map(|(name, tensor)| (name.clone(), tensor.clone()))
        .collect();
    let mut modules: Vec<&str> =
        kept.iter().filter_map(|(name, _)| Some(name.split_once(".lora_")?.0)).collect();
    modules.dedup();
    if modules.is_empty() {
        let message =
            "expected LoRA on the linear layers of blocks, there is none: merge the adapter instead";
        return Err(BaseError::adapter(&adapter.dir, message));
    }

    let building = AtomicDir::new(out)?;
    let (base_dir, adapter_dir) = (building.path().join("base"), building.path().join("adapter"));
    let mut patched = Vec::new();
    write_model_streamed(&base_dir, &source.config, dtype, Some(weights.dir()), |name| {
        let (tensor, from) = source.tensor(name, |module| !in_block(module))?;
        if from != From::Base {
            patched.push(name.to_string());
        }
        Ok(tensor)
    })?;

    let mut config = adapter.config.clone();
    config.modules_to_save = Vec::new();
    config.base_model_name_or_path = Some(out.join("base").to_string_lossy().into_owned());
    let resolved = adapter.lora().resolve(&source.config)?;
    let left: Vec<_> = resolved.modules.iter().filter(|module| module.layer.is_some()).collect();
    config.lora = adapter.lora().only_on(&left)?;
    config.lora.ensure_weight_tying = false;
    config.megacontext = Some(MegacontextKey {
        base_fingerprint: Weights::open(&base_dir)?.fingerprint(),
        rope_scaling: source.config.rope_scaling.clone(),
        base_rope_scaling: Some(source.config.rope_scaling.clone()),
        base_rope_theta: Some(source.config.rope_theta),
        original_max_position_embeddings: source.config.original_context(),
        context_length: source.config.context(),
        positions: source.config.positions.clone(),
        sigma_scales: source.config.sigma_scales(),
    });
    write_adapter(&adapter_dir, &config, &kept)?;
    let modules = modules.len();
    building.commit()?;
    Ok(LoraOnlyReport {
        base: out.join("base"),
        adapter: out.join("adapter"),
        patched,
        modules,
        untied: source.untied,
        config: source.config,
    })
}
