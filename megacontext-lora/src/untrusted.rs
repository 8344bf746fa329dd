//! Every reader of what others made, as a function over bytes: for fuzzers, and for the suite's bounded run of the same.
//!
//! | reader | bytes |
//! |---|---|
//! | [`model_config()`] | a model's `config.json` |
//! | [`settings()`] | a job's settings, JSON or TOML, resolved for a small model |
//! | [`safetensors()`] | a weights file, header and data |
//! | [`adapter()`] | *parts*: `adapter_config.json`, `adapter_model.safetensors` |
//! | [`network()`] | `gistnet.safetensors` or `lensnet.safetensors` |
//! | [`ctx()`] | a `.ctx` file |
//! | [`tree()`] | *parts*: `metadata.json`, `LOD0.ctx`, `LOD1.ctx`, … |
//! | [`checkpoint()`] | a byte, then *parts*: `state.json`, `trainable.safetensors`, `optimizer.safetensors`, `manifest.json` |
//! | [`allocation()`] | what a host's focus allocator answers, JSON |
//! | [`tensor_view()`] | a view as a host may hand it over: element type, device, address, rank, dimensions, strides |
//!
//! *Parts*: each begins with its length, u32 little-endian; what is said to be longer than it is ends with the bytes.
//!
//! What holds for all: they return, with `Ok` or with one clear sentence; they do not panic, and nothing is allocated that
//! the size of the input does not justify, whatever a header says. The fuzz targets (`fuzz/`) call nothing else, and
//! `tests/untrusted.rs` calls the same on every build. Readers of files get files, in a folder that is removed afterwards,
//! so that mapping and sizes are part of what is tried.
//!
//! Left out: tokenizers, Parquet tables and pickles (the first two are parsed by their own crates, the last by nobody).

use std::fs;
use std::path::Path;

use gistnet_adapter::{Expected, GistNet};
use lensnet_adapter::LensNet;
use lensnet_adapter::edits::{Allocator, follow};
use megacontext_base::adapter::{self, read_adapter};
use megacontext_base::config::DecoderConfig;
use megacontext_base::context::{
    BaseModel, CtxFile, Entry, GistSource, GistTree, Hierarchy, Limits, TokenEmbeddings, TreeFolder,
    WorkingContext,
};
use megacontext_base::weights::Weights;
use megacontext_lora_abi::tensor::hostile;
use serde_json::Value;
use tempfile::TempDir;

use crate::host::HostApi;
use crate::host_allocator::HostAllocator;
use crate::jobs::{parse, pretrain::PretrainConfig};
use crate::run::checkpoint;
use crate::session::SessionConfig;
use crate::train::config::ExtendConfig;
use crate::train::cycle::CycleConfig;
use crate::train::gistnet::GistRunConfig;
use crate::train::lensnet::LensRunConfig;

/// What a reader made of its bytes: nothing, or why it refused them.
pub type Verdict = Result<(), String>;

/// Reads bytes as something that others made.
pub type Reader = fn(&[u8]) -> Verdict;

/// All readers by name, which is that of the fuzz target and of the folder of its corpus.
pub const READERS: [(&str, Reader); 10] = [
    ("model_config", model_config),
    ("settings", settings),
    ("safetensors", safetensors),
    ("adapter", adapter),
    ("network", network),
    ("ctx", ctx),
    ("tree", tree),
    ("checkpoint", checkpoint),
    ("allocation", allocation),
    ("tensor_view", tensor_view),
];

/// A Llama of two blocks, which settings and adapters are held against.
pub const MODEL: &str = r#"{"model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12,
"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": 0}"#;

/// Width of a head above which no tables are made: they are as large as the model says.
const WIDEST: usize = 1 << 12;
/// Positions of tables, tokens of a context.
const POSITIONS: usize = 3;

fn text(error: impl ToString) -> String {
    error.to_string()
}

fn json_of(bytes: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(bytes).map_err(text)
}

fn model() -> Result<DecoderConfig, String> {
    DecoderConfig::from_json(&json_of(MODEL.as_bytes())?, Path::new("config.json")).map_err(text)
}

/// The first of some bytes in parts, and what follows it.
fn part(bytes: &[u8]) -> (&[u8], &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk::<4>() else { return (bytes, &[]) };
    rest.split_at((u32::from_le_bytes(*length) as usize).min(rest.len()))
}

/// Bytes in parts, as the readers of several files take them.
pub fn parts<'a>(files: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for file in files {
        bytes.extend((file.len() as u32).to_le_bytes());
        bytes.extend(file);
    }
    bytes
}

/// A folder with the parts as files of these names; a file whose part is missing is, too.
fn folder(mut bytes: &[u8], names: &[&str]) -> Result<TempDir, String> {
    let dir = tempfile::tempdir().map_err(text)?;
    for name in names {
        if bytes.is_empty() {
            break;
        }
        let (file, rest) = part(bytes);
        fs::write(dir.path().join(name), file).map_err(text)?;
        bytes = rest;
    }
    Ok(dir)
}

/// A model's `config.json`, and that what is written of it is read as the same.
///
/// # Errors
/// The reader's.
///
/// # Panics
/// When a model that was read is another one after it was written.
pub fn model_config(bytes: &[u8]) -> Verdict {
    let read = |value: &Value| DecoderConfig::from_json(value, Path::new("config.json")).map_err(text);
    let config = read(&json_of(bytes)?)?;
    let shapes = config.tensors();
    assert!(shapes.iter().all(|(name, _)| !name.is_empty()));
    let written = config.to_json();
    let again = read(&written).unwrap_or_else(|e| panic!("{written} is not read again: {e}"));
    assert_eq!(
        (again.tensors(), again.original_context(), again.context()),
        (shapes, config.original_context(), config.context()),
        "{written}"
    );
    if config.head_dim <= WIDEST {
        config.rope(&config.rope_scaling).sequence(POSITIONS).map_err(text)?;
    }
    Ok(())
}

/// Settings of a job or a session, as JSON or as TOML, resolved for [`MODEL`].
///
/// # Errors
/// That of `extend` where they are no job's settings.
pub fn settings(bytes: &[u8]) -> Verdict {
    let model = model()?;
    let value = match json_of(bytes) {
        Ok(value) => value,
        Err(_) => {
            let toml = std::str::from_utf8(bytes).map_err(text)?;
            toml::from_str(toml).map_err(|e| e.message().to_string())?
        }
    };
    if !value.is_object() {
        return Err("expected a table of settings".into());
    }
    let trained = model.context();
    let identity = |result: crate::error::Result<String>| result.map(drop).map_err(text);
    let extend = ExtendConfig::from_json(value.clone()).and_then(|c| c.resolve(&model));
    let gistnet = parse::<GistRunConfig>(value.clone()).and_then(|c| c.resolve(&model, trained));
    let lensnet = parse::<LensRunConfig>(value.clone()).and_then(|c| c.resolve(&model, 4, trained));
    let cycle = CycleConfig::from_json(value.clone()).and_then(|c| c.resolve(&model, trained));
    let pretrain = parse::<PretrainConfig>(value.clone()).and_then(|c| c.validate());
    let session = parse::<SessionConfig>(value);
    if let Ok(config) = &gistnet {
        config.steps();
        config.validation_bytes(&model);
        identity(config.identity())?;
    }
    if let Ok(config) = &lensnet {
        config.all_steps();
        identity(config.identity())?;
    }
    if let Ok(config) = &cycle {
        config.phases();
        identity(config.identity())?;
    }
    let networks = gistnet.is_ok() || lensnet.is_ok() || cycle.is_ok();
    match extend {
        Ok(config) => identity(config.identity()),
        Err(_) if networks || pretrain.is_ok() || session.is_ok() => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// A weights file: its header, then every tensor, read, mapped and looked at.
///
/// # Errors
/// The reader's.
pub fn safetensors(bytes: &[u8]) -> Verdict {
    let dir = tempfile::tempdir().map_err(text)?;
    fs::write(dir.path().join("model.safetensors"), bytes).map_err(text)?;
    let weights = Weights::open(dir.path()).map_err(text)?;
    assert_eq!(weights.fingerprint().len(), 64);
    let mut refused = None;
    for name in weights.names() {
        let shape = weights.shape(name).unwrap_or(&[]).to_vec();
        let read = weights.tensor_f32(name, &shape).map(drop);
        let mapped = [false, true].map(|narrow| match weights.mapped(name, &shape, narrow)? {
            Some(tensor) => tensor.check_finite(),
            None => Ok(()),
        });
        refused = refused.or([read].into_iter().chain(mapped).find_map(Result::err));
    }
    refused.map_or(Ok(()), |error| Err(text(error)))
}

/// An adapter's folder, held against [`MODEL`].
///
/// # Errors
/// The reader's.
pub fn adapter(bytes: &[u8]) -> Verdict {
    let dir = folder(bytes, &[adapter::CONFIG_FILE, adapter::TENSOR_FILE])?;
    let adapter = read_adapter(dir.path()).map_err(text)?;
    let mut model = model()?;
    if adapter.unties(&model).map_err(text)? {
        model = model.untied();
    }
    let own = adapter.config.megacontext.as_ref();
    let fingerprint = own.map_or("", |own| own.base_fingerprint.as_str());
    adapter.check_against(&model, fingerprint).map_err(text)?;
    assert!(adapter.parameters(&model).all(|(name, _)| !name.is_empty()));
    let scaling = adapter.rope_scaling().unwrap_or(&model.rope_scaling);
    model.rope(scaling).sequence(POSITIONS).map(drop).map_err(text)
}

/// A network's file: GistNet's, or else LensNet's.
///
/// # Errors
/// GistNet's reader's, where the file is not LensNet's either.
pub fn network(bytes: &[u8]) -> Verdict {
    let dir = tempfile::tempdir().map_err(text)?;
    let path = dir.path().join("network.safetensors");
    fs::write(&path, bytes).map_err(text)?;
    let gistnet = GistNet::load(&path, Expected::default()).map(drop).map_err(text);
    let lensnet = LensNet::load(&path, Expected::default()).map(drop).map_err(text);
    if lensnet.is_ok() { lensnet } else { gistnet }
}

/// A file of one level of a history: its header, all of its entries, its last one, and one that is not there.
///
/// # Errors
/// The reader's.
pub fn ctx(bytes: &[u8]) -> Verdict {
    let dir = tempfile::tempdir().map_err(text)?;
    let path = dir.path().join("LOD0.ctx");
    fs::write(&path, bytes).map_err(text)?;
    let file = CtxFile::open(&path).map_err(text)?;
    let entries = file.header().entries;
    let read = |range| match file.header().dtype {
        None => file.tokens(range).map(|tokens| tokens.len()),
        Some(_) => file.gists(range).map(|values| values.len()),
    };
    assert!(read(entries..entries + 1).is_err());
    read(entries.saturating_sub(1)..entries).map_err(text)?;
    read(0..entries).map(drop).map_err(text)
}

/// A stored history: its metadata, every level's file, and the tree that they make.
///
/// # Errors
/// The reader's.
pub fn tree(bytes: &[u8]) -> Verdict {
    let dir = folder(bytes, &["metadata.json", "LOD0.ctx", "LOD1.ctx", "LOD2.ctx", "LOD3.ctx"])?;
    let stored = TreeFolder::open(dir.path()).map_err(text)?;
    let metadata = stored.metadata();
    let fingerprint = metadata.megacontext.as_ref().map_or("", |own| own.base_fingerprint.as_str());
    let base = BaseModel { name: metadata.model_name.clone(), fingerprint: fingerprint.to_string() };
    let tree = stored.load(&base).map_err(text)?;
    assert_eq!(tree.len(), stored.file(0).map_or(0, |file| file.header().entries));
    Ok(())
}

/// Step of the checkpoint that [`checkpoint`] reads.
const STEP: u64 = 7;

/// A run folder's checkpoint. An even first byte leaves the manifest as it is given; an odd one puts an honest one over the
/// other files, so that what is behind its digests is reached.
///
/// # Errors
/// Why it was passed over, or refused.
pub fn checkpoint(bytes: &[u8]) -> Verdict {
    let (first, bytes) = bytes.split_first().ok_or("expected a first byte, got none")?;
    let run = tempfile::tempdir().map_err(text)?;
    let dir = run.path().join(format!("checkpoints/{STEP:08}"));
    fs::create_dir_all(&dir).map_err(text)?;
    let files =
        folder(bytes, &["state.json", "trainable.safetensors", "optimizer.safetensors", "manifest.json"])?;
    for entry in fs::read_dir(files.path()).map_err(text)? {
        let path = entry.map_err(text)?.path();
        fs::rename(&path, dir.join(path.file_name().unwrap_or_default())).map_err(text)?;
    }
    if first % 2 == 1 {
        checkpoint::seal(&dir, STEP).map_err(text)?;
    }
    let mut passed_over = None;
    let loaded = checkpoint::load_latest(run.path(), "settings", &mut |why| passed_over = Some(why));
    match (loaded.map_err(text)?, passed_over) {
        (Some(loaded), _) => {
            let whole = |t: &checkpoint::Named| t.shape.iter().product::<usize>() == t.values.len();
            assert!(loaded.tensors.iter().chain(&loaded.optim).all(whole));
            Ok(())
        }
        (None, why) => Err(why.unwrap_or_else(|| "there is no checkpoint".to_string())),
    }
}

/// K, levels and tokens of the history that an allocator is asked about.
const HISTORY: (usize, u8, u32) = (3, 2, 40);

/// Gists of width 1 that are all 0, of tokens that are, too.
struct Zeros;

impl TokenEmbeddings for Zeros {
    fn width(&self) -> usize {
        1
    }

    fn embeddings(&self, tokens: &[u32]) -> megacontext_base::error::Result<Vec<f32>> {
        Ok(vec![0.0; tokens.len()])
    }
}

impl GistSource for Zeros {
    fn block(&self) -> usize {
        HISTORY.0
    }

    fn width(&self) -> usize {
        1
    }

    fn version(&self) -> u16 {
        0
    }

    fn gists(&self, _: &[f32], blocks: usize) -> megacontext_base::error::Result<Vec<f32>> {
        Ok(vec![0.0; blocks])
    }
}

/// A host whose allocator says the same whatever it is asked.
struct Answering(Value);

impl HostApi for Answering {
    fn event(&self, _: &str, _: &Value) {}

    fn cancelled(&self) -> bool {
        false
    }

    fn allocate(&self, _: &Value) -> crate::error::Result<Option<Value>> {
        Ok(Some(self.0.clone()))
    }
}

/// A focus allocator's answer about a context of four gists of the second level and four tokens, made where it can be.
///
/// # Errors
/// The plugin's about the answer.
pub fn allocation(bytes: &[u8]) -> Verdict {
    let host = Answering(json_of(bytes)?);
    let (block, levels, tokens) = HISTORY;
    let base = BaseModel { name: "micro".to_string(), fingerprint: String::new() };
    let hierarchy = Hierarchy::new(block, levels).map_err(text)?;
    let mut tree = GistTree::new(hierarchy, 1, base).map_err(text)?;
    tree.append(&(0..tokens).collect::<Vec<u32>>(), &Zeros, &Zeros).map_err(text)?;
    let gists = (0..4).map(|n| Entry { start: 9 * n, lod: 2 });
    let entries: Vec<Entry> = gists.chain((36..40).map(|start| Entry { start, lod: 0 })).collect();
    let scores = vec![0.0; entries.len()];
    let limits = Limits::new(20, 4).map_err(text)?;
    let mut context = WorkingContext::new(entries, &tree, limits).map_err(text)?;
    let covered = context.coverage();
    let wanted = HostAllocator::new(&host).choose(&context, &scores).map_err(text)?;
    let made = follow(&mut context, &scores, &wanted.unwrap_or_default()).map(drop).map_err(text);
    assert!(context.cost() <= limits.budget() && context.coverage() == covered);
    made
}

/// A view as a host may hand it over ([`hostile`]).
///
/// # Errors
/// The check's.
pub fn tensor_view(bytes: &[u8]) -> Verdict {
    hostile::view(bytes).map_err(text)
}
