//! Writing a model folder that transformers (4 and 5) and our own reader load.
//!
//! `config.json`, one `model.safetensors` (metadata `format: pt`, which transformers asks for) and, copied from another
//! model folder, the tokenizer's and generation's files. The folder appears whole or not at all.
//!
//! Tensors are asked for one at a time and written at once, part by part, so that one of them in f32 is all the memory it
//! takes, and none where it is held anyway.
//! Errors: `BaseError::Weights` for a tensor that does not fit the configuration, `BaseError::Io` for the disk.
//!
//! Left out: sharding; one file of any size is valid.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use megacontext_kernels::cpu::Values;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::atomic::{AtomicDir, is_vacant};
use crate::config::DecoderConfig;
use crate::error::{BaseError, Result};
pub use crate::weights::Dtype;

/// Values turned into bytes at a time.
const PART: usize = 1 << 18;

/// Files of a model folder that belong to its tokenizer and its generation defaults.
const COMPANIONS: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
];

/// Writes a model folder from tensors that are all at hand; see [`write_model_streamed`].
pub fn write_model_dir(
    dir: &Path,
    config: &DecoderConfig,
    tensors: impl IntoIterator<Item = (String, Tensor)>,
    dtype: Dtype,
    tokenizer_from: Option<&Path>,
) -> Result<()> {
    let path = dir.join("model.safetensors");
    let mut given = BTreeMap::new();
    for (name, tensor) in tensors {
        if given.insert(name.clone(), tensor).is_some() {
            return Err(BaseError::tensor(&path, &name, "expected each tensor once, it is given twice"));
        }
    }
    let expected = config.tensors();
    for (name, _) in &expected {
        if !given.contains_key(name) {
            return Err(BaseError::tensor(
                &path,
                name,
                "expected this tensor for the model, it is not given",
            ));
        }
    }
    if let Some(name) = given.keys().find(|name| expected.iter().all(|(known, _)| known != *name)) {
        return Err(BaseError::tensor(
            &path,
            name,
            "expected only the model's own tensors, it has none of this name",
        ));
    }
    write_model_streamed(dir, config, dtype, tokenizer_from, |name| {
        given.remove(name).ok_or_else(|| BaseError::tensor(&path, name, "not given"))
    })
}

/// Writes a model folder, asking `load` for each tensor of `config.tensors()` in order of name.
///
/// Refuses a target that exists and is not empty. `tokenizer_from` is a model folder whose tokenizer files and
/// `generation_config.json` are copied.
pub fn write_model_streamed(
    dir: &Path,
    config: &DecoderConfig,
    dtype: Dtype,
    tokenizer_from: Option<&Path>,
    mut load: impl FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    if !is_vacant(dir) {
        let source = std::io::Error::new(
            std::io::ErrorKind::AlreadyExists,
            "expected a folder that does not exist yet or is empty; choose another name or remove it",
        );
        return Err(BaseError::Io { path: dir.to_path_buf(), source });
    }
    let building = AtomicDir::new(dir)?;
    let mut description = config.to_json();
    description["dtype"] = json!(dtype.torch_name());
    description["torch_dtype"] = json!(dtype.torch_name());
    write_json(&building.path().join("config.json"), &description)?;
    if let Some(from) = tokenizer_from {
        for name in COMPANIONS {
            let source = from.join(name);
            if source.is_file() {
                fs::copy(&source, building.path().join(name)).map_err(BaseError::io(&source))?;
            }
        }
    }
    let path = building.path().join("model.safetensors");
    write_safetensors(&path, &config.tensors(), dtype, |name, shape| {
        let tensor = load(name)?;
        if tensor.dims() != shape {
            let message = format!("expected shape {shape:?}, got {:?}", tensor.dims());
            return Err(BaseError::tensor(&dir.join("model.safetensors"), name, message));
        }
        Ok(tensor)
    })?;
    building.commit()
}

/// Writes pretty JSON with a final line feed.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    fs::write(path, format!("{value:#}\n")).map_err(BaseError::io(path))
}

/// Writes one safetensors file of one dtype, asking for each tensor when its turn comes.
pub(crate) fn write_safetensors(
    path: &Path,
    tensors: &[(String, Vec<usize>)],
    dtype: Dtype,
    mut load: impl FnMut(&str, &[usize]) -> Result<Tensor>,
) -> Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".to_string(), json!({"format": "pt"}));
    let mut offset = 0;
    for (name, shape) in tensors {
        let end = offset + shape.iter().product::<usize>() * dtype.size();
        header.insert(
            name.clone(),
            json!({"dtype": dtype.safetensors_name(), "shape": shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut header =
        serde_json::to_vec(&Value::Object(header)).map_err(|e| BaseError::weights(path, e.to_string()))?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let file = File::create(path).map_err(BaseError::io(path))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(BaseError::io(path))?;
    out.write_all(&header).map_err(BaseError::io(path))?;
    for (name, shape) in tensors {
        let tensor = load(name, shape)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
        for values in Values::of(&tensor)?.chunks(PART) {
            out.write_all(&narrow(values, dtype)).map_err(BaseError::io(path))?;
        }
    }
    out.into_inner().map_err(|e| e.into_error()).and_then(|f| f.sync_all()).map_err(BaseError::io(path))
}

/// f32 values to bytes as stored, little-endian, rounded to nearest even.
fn narrow(values: &[f32], dtype: Dtype) -> Vec<u8> {
    const CHUNK: usize = 1 << 16;
    let mut bytes = vec![0u8; values.len() * dtype.size()];
    bytes.par_chunks_mut(CHUNK * dtype.size()).zip(values.par_chunks(CHUNK)).for_each(|(out, values)| {
        match dtype {
            Dtype::F32 => {
                for (o, v) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                    *o = v.to_le_bytes();
                }
            }
            Dtype::F16 => {
                for (o, v) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                    *o = half::f16::from_f32(*v).to_le_bytes();
                }
            }
            Dtype::BF16 => {
                for (o, v) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                    *o = half::bf16::from_f32(*v).to_le_bytes();
                }
            }
        }
    });
    bytes
}
