//! The job `export`: an adapter for readers that take LoRA factors alone.
//!
//! | format | writes | for |
//! |---|---|---|
//! | `lora-only` | the folders `OUT/base` and `OUT/adapter` ([`megacontext_base::lora_only`]) | vLLM, and llama.cpp's converters |
//! | `gguf` | the file `OUT` ([`megacontext_base::gguf`]) | llama.cpp, beside a converted base |
//!
//! Errors: a format or a number type that there is not; what the format cannot carry, with what to do instead.

use std::path::PathBuf;

use megacontext_base::adapter::read_adapter;
use megacontext_base::gguf::export_gguf;
use megacontext_base::lora_only::export_lora_only;
use megacontext_base::weights::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::merge::dtype_of;
use crate::jobs::{ModelDir, model_error, parse, to_value};

/// What the job is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Export {
    /// Model folder.
    pub base: PathBuf,
    /// Adapter folder.
    pub adapter: PathBuf,
    /// What to write; must not exist, a folder may be empty.
    pub out: PathBuf,
    /// `lora-only` or `gguf`.
    pub format: Format,
    /// `f32` (the default), `f16` or, of a patched base, `bf16`.
    pub dtype: Option<String>,
}

/// What to write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// A base with everything but LoRA on blocks put in, and an adapter with the rest.
    #[default]
    LoraOnly,
    /// llama.cpp's adapter file.
    Gguf,
}

impl Default for Export {
    fn default() -> Self {
        Self {
            base: PathBuf::new(),
            adapter: PathBuf::new(),
            out: PathBuf::new(),
            format: Format::default(),
            dtype: None,
        }
    }
}

/// Runs the job.
pub fn run(params: Value, _: &dyn HostApi) -> Result<Value> {
    let job: Export = parse(params)?;
    for (key, path) in [("adapter", &job.adapter), ("out", &job.out)] {
        if path.as_os_str().is_empty() {
            return Err(PluginError::usage(format!("{key}: expected a path, got none")));
        }
    }
    let dtype = dtype_of(job.dtype.as_deref())?;
    if job.format == Format::Gguf && dtype == Dtype::BF16 {
        return Err(PluginError::usage("dtype: a GGUF adapter is written in f32 or f16, got \"bf16\""));
    }
    let model = ModelDir::open(&job.base)?;
    let adapter = read_adapter(&job.adapter).map_err(model_error)?;
    match job.format {
        Format::LoraOnly => {
            let report = export_lora_only(&model.weights, &model.config, &adapter, &job.out, dtype)
                .map_err(model_error)?;
            to_value(json!({
                "format": job.format,
                "base": report.base,
                "adapter": report.adapter,
                "dtype": dtype.torch_name(),
                "modules": report.modules,
                "patched": report.patched,
                "untied": report.untied,
                "rope": report.config.rope_scaling.to_string(),
                "max_position_embeddings": report.config.max_position_embeddings,
            }))
        }
        Format::Gguf => {
            let untied = adapter.unties(&model.config).map_err(model_error)?;
            let config = if untied { model.config.untied() } else { model.config };
            adapter.check_against(&config, &model.weights.fingerprint()).map_err(model_error)?;
            let report = export_gguf(&config, &adapter, &job.out, dtype).map_err(model_error)?;
            to_value(json!({
                "format": job.format,
                "file": job.out,
                "dtype": dtype.torch_name(),
                "architecture": report.architecture,
                "modules": report.modules,
                "notes": report.notes,
            }))
        }
    }
}
