//! Sound inputs of every reader, which mutations and fuzzers begin with; `fuzz/corpus/` is made of them.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use gistnet_adapter::{GistNet, GistNetConfig, Identity, Mode, Pooling};
use lensnet_adapter::{LensNet, LensNetConfig};
use megacontext_base::adapter::{AdapterConfig, MegacontextKey, write_adapter};
use megacontext_base::config::DecoderConfig;
use megacontext_base::context::{CtxHeader, GistDtype};
use megacontext_base::lora::LoraConfig;
use megacontext_base::network_file::NO_ADAPTER;
use megacontext_base::rope::{RopeScaling, SigmaRule};
use megacontext_lora::run::checkpoint::{Named, save};
use megacontext_lora::untrusted::MODEL;
use serde_json::{Value, json};

/// Where the fuzz targets look for them.
pub fn corpus(reader: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(reader)
}

/// The files of a reader's corpus, in the order of their names.
pub fn stored(reader: &str) -> Vec<(String, Vec<u8>)> {
    let mut seeds: Vec<_> = fs::read_dir(corpus(reader))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
        })
        .collect();
    seeds.sort();
    seeds
}

/// All seeds of a reader, by name.
pub fn made(reader: &str) -> Vec<(String, Vec<u8>)> {
    let seeds: Vec<(&str, Vec<u8>)> = match reader {
        "model_config" => return model_configs(),
        "settings" => SETTINGS.map(|(name, text)| (name, text.as_bytes().to_vec())).to_vec(),
        "safetensors" => safetensors(),
        "adapter" => vec![("lora", adapter(false)), ("tied_and_norms", adapter(true))],
        "network" => networks(),
        "ctx" => vec![
            ("tokens", level(0, 9, None)),
            ("f16", level(1, 2, Some(GistDtype::F16))),
            ("bf16", level(1, 2, Some(GistDtype::Bf16))),
            ("f32", level(2, 1, Some(GistDtype::F32))),
            ("layout_b", layout_b()),
        ],
        "tree" => vec![("own", tree(true)), ("of_another_writer", tree(false))],
        "checkpoint" => vec![("as_written", checkpoint(0)), ("sealed", checkpoint(1))],
        "allocation" => ALLOCATIONS.map(|(name, text)| (name, text.as_bytes().to_vec())).to_vec(),
        "tensor_view" => vec![
            ("slice", view(0, &[5], &[1])),
            ("rows", view(3, &[4, 6], &[8, 1])),
            ("turned", view(1, &[3, 2, 4], &[1, 3, 6])),
            ("broadcast", view(2, &[7, 5], &[0, 1])),
            ("empty", view(0, &[0, 1 << 40, 1 << 40], &[1, 1, 1])),
            ("scalar", view(63, &[], &[])),
            ("far", view(0, &[1 << 60], &[0])),
        ],
        other => panic!("no seeds for {other}"),
    };
    seeds.into_iter().map(|(name, bytes)| (name.to_string(), bytes)).collect()
}

fn model_configs() -> Vec<(String, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures");
    let read = |name: &str| fs::read(root.join(name).join("config.json")).unwrap();
    let mut seeds: Vec<(String, Vec<u8>)> = [
        "llama/untied_f32_linear",
        "families/gpt_neox_f32",
        "families/qwen3_bf16_sharded",
        "families/gemma3_bf16",
        "families/mistral_window_bf16",
        "families/smollm3_bf16",
        "families/nanochat_bf16",
    ]
    .map(|name| (name.split_once('/').unwrap().1.to_string(), read(name)))
    .to_vec();
    let mut own: Value = serde_json::from_str(MODEL).unwrap();
    own["rope_scaling"] =
        json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16 });
    own["megacontext"] = json!({ "context_length": 64, "sigma_scales": [1.0, 0.5],
        "positions": { "sigma": { "preset": "original", "block": 4, "uniform": false } } });
    seeds.push(("yarn_and_own_keys".to_string(), own.to_string().into_bytes()));
    for (name, scaling) in [
        ("dynamic", json!({ "type": "dynamic", "factor": 2.0 })),
        (
            "llama3",
            json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32 }),
        ),
        (
            "longrope",
            json!({ "rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 32,
            "short_factor": [1.0, 1.0], "long_factor": [1.0, 2.0] }),
        ),
    ] {
        let mut value: Value = serde_json::from_str(MODEL).unwrap();
        value["rope_scaling"] = scaling;
        seeds.push((name.to_string(), value.to_string().into_bytes()));
    }
    seeds
}

const SETTINGS: [(&str, &str); 6] = [
    (
        "extend.toml",
        "base = \"model\"\ndata = [\"text\"]\ncontext = 256\nholdout = 0.1\nseed = 7\n\n[lora]\nr = 4\nalpha = 8.0\n\
         target_modules = [\"q_proj\", \"v_proj\"]\nrank_pattern = { \".*v_proj\" = 2 }\n\n[optimizer]\nlr = 3e-4\n\
         warmup_steps = 2\nschedule = \"cosine\"\n\n[[stages]]\ncontext = 128\nsteps = 4\ngroup = 0.25\n\n[[stages]]\n\
         context = 256\nsteps = 4\nattention = \"dense\"\nscaling = \"yarn\"\nfactor = 4.0\n\n[eval]\ncontexts = [64, 256]\n\
         max_tokens = 1000\n",
    ),
    (
        "extend.json",
        r#"{"base": "model", "data": ["text"], "context": 512, "steps": 40, "embeddings": "frozen", "batch":
{"tokens_per_step": 1024, "micro_batch_tokens": 512}, "checkpoint": {"every": 3, "keep": 2}, "threads": 2}"#,
    ),
    (
        "gistnet.toml",
        "base = \"model\"\ndata = [\"text\", \"more\"]\ncontext = 64\nattention = \"s2\"\ngroup = 20\npassages_per_step = 3\n\
         spans_per_passage = 2\n\n[network]\nblock = 4\nlayers = 1\npooling = \"mean\"\n\n[[stages]]\nhorizon = 4\nsteps = 8\n\
         mix = [1.0, 2.0]\n\n[[stages]]\nhorizon = 6\nsteps = 8\nlevel2 = 0.5\n\n[validation]\nevery = 4\npassages = 6\n\
         sparse_group = 32\n\n[places]\npreset = \"original\"\n",
    ),
    (
        "lensnet.toml",
        "base = \"model\"\ngistnet = \"gistnet.safetensors\"\ndata = [\"text\"]\nhistory = 40\nbudget = 24\nhorizon = 4\n\
         protected = 4\nlevels = 2\nsteps = 6\nbatch = 2\n\n[labels]\nkind = \"preference\"\nrounds = 2\nhistories = 12\n\
         variants = 4\nexplore = 0.5\n\n[validation]\nhistories = 6\nrefocuses = 2\n",
    ),
    (
        "train.toml",
        "base = \"model\"\ndata = [\"text\"]\ncontexts = [44, 64]\nhorizon = 4\nbudget = 24\nprotected = 4\ncycles \
         = 2\nablation = true\n\n[network]\nblock = 4\nlayers = 1\n\n[jt1]\nsteps = 6\nwhole = 0.25\n\n[jt2]\nste\
         ps = 4\nlabels = { rounds = 2, histories = 5 }\n\n[jt3]\nsteps = 6\ngroups = [\"lora\", \"norms\"]\nteach\
         er = 0.2\n\n[jt3.optimizer]\nlr = 3e-4\n\n[judge]\ntolerance = 0.01\n",
    ),
    ("session.json", r#"{"base": "model", "adapter": "adapter", "dtype": "bf16"}"#),
];

const ALLOCATIONS: [(&str, &str); 2] = [
    (
        "edits",
        r#"{"edits": [{"action": "expand", "start": 9, "lod": 2}, {"action": "expand", "start": 12, "lod": 1},
{"action": "collapse", "start": 12, "lod": 0}]}"#,
    ),
    (
        "entries",
        r#"{"entries": [[0, 2], [9, 1], [12, 0], [13, 0], [14, 0], [15, 1], [18, 2], [27, 2], [36, 0], [37, 0], [38, 0],
[39, 0]]}"#,
    ),
];

/// A safetensors file of these tensors: name, type, shape, data.
fn file_of(tensors: &[(&str, &str, &[usize], Vec<u8>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".to_string(), json!({ "format": "pt" }));
    let mut end = 0;
    for (name, dtype, shape, data) in tensors {
        let start = end;
        end += data.len();
        let info = json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] });
        header.insert(name.to_string(), info);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    tensors.iter().for_each(|(.., data)| bytes.extend(data));
    bytes
}

fn safetensors() -> Vec<(&'static str, Vec<u8>)> {
    let f32s = |n: usize| (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect::<Vec<u8>>();
    let halves = |n: usize| (0..n).flat_map(|i| (0x3c00 + i as u16).to_le_bytes()).collect::<Vec<u8>>();
    vec![
        ("f32", file_of(&[("a", "F32", &[2, 3], f32s(6)), ("b.weight", "F32", &[4], f32s(4))])),
        ("narrow", file_of(&[("a", "BF16", &[3, 2], halves(6)), ("b", "F16", &[], halves(1))])),
        ("empty_and_integers", file_of(&[("a", "F32", &[0, 3], Vec::new()), ("b", "I64", &[1], vec![1; 8])])),
        // No element, and dimensions that no machine can count.
        ("nothing_of_much", file_of(&[("a", "F32", &[0, 1 << 40, 1 << 40], Vec::new())])),
        ("not_finite", file_of(&[("a", "F32", &[1], f32::NAN.to_le_bytes().to_vec())])),
    ]
}

fn networks() -> Vec<(&'static str, Vec<u8>)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("network.safetensors");
    let identity = Identity {
        adapter_fingerprint: Some(NO_ADAPTER.to_string()),
        place_rule: Some(SigmaRule::default()),
        gist_version: Some(3),
        ..Identity::of_base("0123")
    };
    let gistnet = |mode, pooling| {
        let config = GistNetConfig { block: 3, layers: 1, mode, pooling, ..GistNetConfig::new(4, 2) };
        GistNet::new(config, 1).unwrap().save(&path, &identity).unwrap();
        fs::read(&path).unwrap()
    };
    let (mean, towers) = (gistnet(Mode::Mean, Pooling::Mean), gistnet(Mode::Transformer, Pooling::Cls));
    let config = LensNetConfig { block: 3, layers: 1, ..LensNetConfig::new(4, 2) };
    LensNet::new(config, 1).unwrap().save(&path, &identity).unwrap();
    vec![("gistnet_mean", mean), ("gistnet", towers), ("lensnet", fs::read(&path).unwrap())]
}

/// Bytes in parts, as the readers of several files take them.
fn parts<'a>(files: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for file in files {
        bytes.extend((file.len() as u32).to_le_bytes());
        bytes.extend(file);
    }
    bytes
}

/// The first of some bytes in parts as an edit leaves it, the others as they are.
pub fn with_first_part(bytes: &[u8], edit: impl Fn(&str) -> String) -> Vec<u8> {
    let (length, rest) = bytes.split_first_chunk::<4>().unwrap();
    let (first, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
    [parts([edit(std::str::from_utf8(first).unwrap()).as_bytes()]), rest.to_vec()].concat()
}

/// A safetensors file whose header is as an edit leaves it.
pub fn with_header(bytes: &[u8], edit: impl Fn(&str) -> String) -> Vec<u8> {
    let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header = edit(std::str::from_utf8(header).unwrap());
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

fn files(dir: &Path, names: &[&str]) -> Vec<u8> {
    let files: Vec<Vec<u8>> = names.iter().map(|name| fs::read(dir.join(name)).unwrap()).collect();
    parts(files.iter().map(Vec::as_slice))
}

fn adapter(whole: bool) -> Vec<u8> {
    let base =
        DecoderConfig::from_json(&serde_json::from_str(MODEL).unwrap(), Path::new("config.json")).unwrap();
    let lora = LoraConfig { r: 2, alpha: 4.0, ..LoraConfig::default() };
    let mut shapes = lora.resolve(&base).unwrap().parameters();
    let norms: Vec<String> =
        base.tensors().into_iter().map(|(name, _)| name).filter(|n| n.contains("norm")).collect();
    let mut trained: Vec<&str> = Vec::new();
    if whole {
        trained.push(base.embedding_name());
        trained.extend(norms.iter().map(String::as_str));
        shapes.extend(base.tensors().into_iter().filter(|(name, _)| trained.contains(&name.as_str())));
    }
    let own = MegacontextKey {
        base_fingerprint: "0123".to_string(),
        rope_scaling: RopeScaling::Linear { factor: 4.0 },
        base_rope_scaling: Some(RopeScaling::None),
        base_rope_theta: Some(base.rope_theta),
        original_max_position_embeddings: base.original_context(),
        context_length: 256,
        positions: Default::default(),
        sigma_scales: whole.then(|| vec![1.0, 0.5]),
    };
    let config = AdapterConfig::new(&lora, &base, trained, Path::new("model"), own).unwrap();
    let tensors: Vec<(String, Tensor)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let values: Vec<f32> = (0..shape.iter().product()).map(|i| i as f32 / 64.0).collect();
            (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("adapter");
    write_adapter(&dir, &config, &tensors).unwrap();
    files(&dir, &["adapter_config.json", "adapter_model.safetensors"])
}

const BLOCK: usize = 3;
const WIDTH: usize = 2;

/// One level of a history of nine tokens in blocks of three.
fn level(lod: u8, entries: u64, dtype: Option<GistDtype>) -> Vec<u8> {
    let header =
        CtxHeader { lod, block: BLOCK, width: WIDTH, dtype, entries, model_name: "micro".to_string() };
    let mut bytes = header.encode().unwrap().to_vec();
    for value in 0..entries * if dtype.is_some() { WIDTH as u64 } else { 1 } {
        match dtype {
            None => bytes.extend((value as u32).to_le_bytes()),
            Some(GistDtype::F16 | GistDtype::Bf16) => bytes.extend((0x3c00 + value as u16).to_le_bytes()),
            Some(GistDtype::F32) => bytes.extend((value as f32).to_le_bytes()),
        }
    }
    bytes
}

/// The other description of the format: the name where the number of entries would be.
fn layout_b() -> Vec<u8> {
    let mut bytes = level(0, 3, None);
    bytes[14..64].fill(0);
    bytes[14..19].copy_from_slice(b"micro");
    bytes
}

fn tree(own: bool) -> Vec<u8> {
    let levels = [level(0, 9, None), level(1, 3, Some(GistDtype::F32)), level(2, 1, Some(GistDtype::F32))];
    let size = |at: usize| levels[at].len();
    let mut metadata = json!({
        "version": 1, "created_at": "2026-01-31T23:59:59Z", "model_name": "micro", "embedding_dim": WIDTH,
        "block_size": BLOCK, "ingestion_complete": true,
        "levels": {
            "LOD0": { "num_blocks": 3, "num_tokens": 9, "file_size_bytes": size(0) },
            "LOD1": { "num_gists": 3, "file_size_bytes": size(1) },
            "LOD2": { "num_gists": 1, "file_size_bytes": size(2) },
        },
    });
    if own {
        metadata["megacontext"] = json!({ "format": 1, "base_fingerprint": "0123",
            "gist_versions": { "LOD1": [[4, 3]], "LOD2": [[4, 1]] } });
    }
    let metadata = metadata.to_string();
    parts([metadata.as_bytes()].into_iter().chain(levels.iter().map(Vec::as_slice)))
}

fn checkpoint(first: u8) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let named = |name: &str, shape: &[usize]| Named {
        name: name.to_string(),
        shape: shape.to_vec(),
        values: (0..shape.iter().product()).map(|i| i as f32).collect::<Vec<_>>().into(),
    };
    let tensors = [named("a.lora_A.weight", &[2, 3]), named("b", &[4])];
    let moments = [named("exp_avg.b", &[4]), named("exp_avg_sq.b", &[4])];
    let state = json!({ "config_hash": "settings", "seed": 7, "stage": 1 });
    let path = save(dir.path(), 7, &state, &tensors, &moments, 1).unwrap();
    let names = ["state.json", "trainable.safetensors", "optimizer.safetensors", "manifest.json"];
    [vec![first], files(&path, &names)].concat()
}

/// A view of F32 on the CPU that begins at an element of the reader's memory.
pub fn view(at: u64, dims: &[u64], strides: &[i64]) -> Vec<u8> {
    let mut bytes = vec![0, 1, 0, 3];
    bytes.extend(at.to_le_bytes());
    bytes.push(dims.len() as u8);
    for (dim, stride) in dims.iter().zip(strides) {
        bytes.extend(dim.to_le_bytes());
        bytes.extend(stride.to_le_bytes());
    }
    bytes
}
