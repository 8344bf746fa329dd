//! The job `logits`: logits of given tokens, written to a file, for comparison with another implementation.
//!
//! Shapes: tokens T or B×T of equal length; the file holds `tokens` [B, T] (i64) and `logits` [B, T, V] (f32), dense.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use megacontext_base::atomic::write_file;
use megacontext_base::decoder::Forward;
use megacontext_base::device::DeviceChoice;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::precision::Precision;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{IoResultExt, PluginError, Result};
use crate::host::HostApi;
use crate::jobs::device::OnDevice;
use crate::jobs::{ModelDir, model_error, parse, to_value};
use crate::train::plan::{Beside, check_forward};

/// What the job is told.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogitsJob {
    /// Model folder.
    pub base: PathBuf,
    /// Adapter folder.
    pub adapter: Option<PathBuf>,
    /// JSON file: a list of token ids, or a list of such lists of one length.
    pub tokens: PathBuf,
    /// The safetensors file to write.
    pub out: PathBuf,
    /// Precision class.
    pub dtype: Precision,
    /// What passes run on: `cpu`, `cuda:N`, or `auto`.
    pub device: DeviceChoice,
}

/// The rows of the tokens' file; an error says what was expected and what came instead.
fn read_rows(text: &str) -> std::result::Result<Vec<Vec<u32>>, String> {
    const EXPECTED: &str = "expected a list of token ids or a list of such lists, as JSON";
    let instead = |got: &Value| {
        let mut got = got.to_string();
        if got.len() > 40 {
            got.truncate(got.floor_char_boundary(40));
            got.push('…');
        }
        format!("{EXPECTED}, got {got}")
    };
    let id =
        |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| instead(value));
    let row = |values: &[Value]| values.iter().map(id).collect::<std::result::Result<Vec<u32>, String>>();
    let value: Value = serde_json::from_str(text).map_err(|e| format!("{EXPECTED}: {e}"))?;
    let list = value.as_array().ok_or_else(|| instead(&value))?;
    if list.first().is_some_and(Value::is_array) {
        return list.iter().map(|v| row(v.as_array().ok_or_else(|| instead(v))?)).collect();
    }
    Ok(vec![row(list)?])
}

/// A file appears whole or not at all; a device or a pipe is written to as it is.
fn write(out: &Path, bytes: &[u8]) -> Result<()> {
    if out.metadata().is_ok_and(|m| !m.is_file() && !m.is_dir()) {
        return std::fs::write(out, bytes).at(out);
    }
    write_file(out, bytes).map_err(model_error)
}

/// Runs the job.
pub fn run(params: Value, host: &dyn HostApi) -> Result<Value> {
    let job: LogitsJob = parse(params)?;
    let text = std::fs::read_to_string(&job.tokens).at(&job.tokens)?;
    let bad = |message: String| PluginError::data(format!("{}: {message}", job.tokens.display()));
    let rows = read_rows(&text).map_err(bad)?;
    let length = rows.first().map_or(0, Vec::len);
    if length == 0 || rows.iter().any(|r| r.len() != length) {
        return Err(bad("expected rows of one length, at least 1 token each".to_string()));
    }
    let model = ModelDir::open(&job.base)?;
    let vocab = model.config.vocab_size;
    let flat: Vec<u32> = rows.iter().flatten().copied().collect();
    if let Some(id) = flat.iter().find(|id| **id as usize >= vocab) {
        return Err(bad(format!("expected token ids below {vocab}, got {id}")));
    }
    // The logits whole, twice: as they are and as the file's bytes.
    let beside = Beside { host: 2 * 4 * (flat.len() * vocab) as u64, ..Beside::default() };
    let on = OnDevice::open(job.device, host)?.running(&model.config, host)?;
    check_forward("the job", &model.config, job.dtype, flat.len(), beside, on.device())?;
    let (mut decoder, scaling, _) = model.decoder_with(job.adapter.as_deref(), job.dtype)?;
    on.take(&mut decoder)?;
    let c = decoder.config();
    let rope = c.rope(&scaling).sequence(length)?;
    let all = Rows::default();
    let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &all, dropout_seed: None };
    let x = decoder.embed(&flat, rows.len()).map_err(model_error)?;
    let logits = decoder.logits(&x, &with).map_err(model_error)?;
    let ids: Vec<i64> = flat.iter().map(|t| i64::from(*t)).collect();
    let tensors = HashMap::from([
        ("tokens".to_string(), Tensor::from_vec(ids, (rows.len(), length), &Device::Cpu)?),
        ("logits".to_string(), logits),
    ]);
    let bytes =
        safetensors::serialize(&tensors, None).map_err(|e| PluginError::internal(format!("logits: {e}")))?;
    write(&job.out, &bytes)?;
    to_value(json!({
        "out": job.out, "shape": [rows.len(), length, vocab], "rope": scaling.to_string(), "attention": "dense",
        "dtype": job.dtype, "device": decoder.device().describe(),
    }))
}
