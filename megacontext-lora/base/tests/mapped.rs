//! Frozen weights that stay in their files: what they cost in memory, and that they are the same weights.
//!
//! A file of its own, because it measures the most memory of its process.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use candle_core::{Device, Tensor};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::Decoder;
use megacontext_base::params::Group;
use megacontext_base::weights::Weights;
use megacontext_kernels::precision::Precision;
use serde_json::{Map, Value, json};

/// Tests that measure memory must not run beside others.
static ALONE: Mutex<()> = Mutex::new(());

fn config(hidden: usize, layers: usize, vocab: usize) -> DecoderConfig {
    let value = json!({
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": hidden / 64, "num_key_value_heads": hidden / 64,
        "max_position_embeddings": 2048, "tie_word_embeddings": true
    });
    DecoderConfig::from_json(&value, Path::new("config.json")).unwrap()
}

/// A folder's `model.safetensors` in bf16: zeros, in a file without blocks on the disk.
fn hollow_folder(dir: &Path, config: &DecoderConfig) -> u64 {
    let mut header = Map::new();
    let mut end = 0;
    for (name, shape) in config.tensors() {
        let start = end;
        end += 2 * shape.iter().product::<usize>() as u64;
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let mut header = serde_json::to_vec(&Value::Object(header)).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    let size = 8 + header.len() as u64 + end;
    file.set_len(size).unwrap();
    size
}

/// Most memory of this process so far, in bytes; none where the system does not say.
fn peak() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[test]
fn opening_reads_nothing_and_reading_holds_one_copy() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let dir = tempfile::tempdir().unwrap();
    let config = config(1024, 16, 32_000);
    let size = hollow_folder(dir.path(), &config);
    let Some(before) = peak() else { return println!("skipped: no /proc/self/status") };
    let started = Instant::now();
    let weights = Weights::open(dir.path()).unwrap();
    let decoder = Decoder::from_weights(config, &weights, Precision::Bf16, &[]).unwrap();
    let opened = peak().unwrap() - before;
    println!(
        "opened {:.2} GB in {:.1?}, {:.1} MB more",
        size as f64 / 1e9,
        started.elapsed(),
        opened as f64 / 1e6
    );
    // Norms are read into f32; everything else stays where it is.
    assert!(opened < size / 20, "opening took {opened} bytes of memory for a file of {size}");
    let started = Instant::now();
    decoder.params().check_mapped().unwrap();
    let read = peak().unwrap() - before;
    println!(
        "looked at all of it in {:.1?}, {:.3} of its size",
        started.elapsed(),
        read as f64 / size as f64
    );
    assert!(read < size + size / 20, "reading took {read} bytes of memory for a file of {size}");
    assert!(decoder.params().mapped_bytes() > size * 9 / 10);
}

#[test]
fn a_group_that_learns_leaves_its_file_alone() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/llama/tied_f32");
    let config = DecoderConfig::from_dir(&dir).unwrap();
    let weights = Weights::open(&dir).unwrap();
    let mut decoder = Decoder::from_weights(config, &weights, Precision::F32, &[]).unwrap();
    let before = decoder.params().group_hash(Group::Base).unwrap();
    let mapped = decoder.params().mapped_bytes();
    assert!(mapped > 0);
    decoder.params_mut().set_learning([Group::Base]).unwrap();
    assert_eq!(decoder.params().group_hash(Group::Base).unwrap(), before);
    assert!(decoder.params().mapped_bytes() < mapped);
    let (name, leaf) = decoder.params().trainable().unwrap().remove(0);
    let zeros = Tensor::zeros(leaf.shape(), leaf.dtype(), &Device::Cpu).unwrap();
    decoder.params_mut().set(&name, &zeros).unwrap();
    assert_ne!(decoder.params().group_hash(Group::Base).unwrap(), before);
    let again = weights.tensor_f32(&name, leaf.dims()).unwrap();
    assert!(
        again.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap() > 0.0,
        "the file has changed"
    );
}

#[test]
fn a_mapped_parameter_of_a_group_that_learns_is_refused() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/llama/tied_f32");
    let config = DecoderConfig::from_dir(&dir).unwrap();
    let weights = Weights::open(&dir).unwrap();
    let mut decoder = Decoder::from_weights(config, &weights, Precision::F32, &[]).unwrap();
    decoder.params_mut().set_learning([Group::Embeddings]).unwrap();
    let name = "model.embed_tokens.weight";
    let shape = decoder.params().shape(name).unwrap().to_vec();
    let tensor = weights.mapped(name, &shape, false).unwrap().unwrap();
    let error = decoder.params_mut().insert_mapped(name, Group::Embeddings, tensor).unwrap_err().to_string();
    assert!(error.contains("expected a frozen group, got embeddings"), "{error}");
}

/// A folder like the fixture's with one value of one tensor replaced.
fn with_value(value: f32) -> (tempfile::TempDir, DecoderConfig) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/llama/tied_f32");
    let config = DecoderConfig::from_dir(&dir).unwrap();
    let mut bytes = fs::read(dir.join("model.safetensors")).unwrap();
    let header_len = u64::from_le_bytes(*bytes.first_chunk::<8>().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
    let offset = header["model.layers.0.mlp.up_proj.weight"]["data_offsets"][0].as_u64().unwrap() as usize;
    let at = 8 + header_len + offset + 7 * 4;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    let copy = tempfile::tempdir().unwrap();
    fs::write(copy.path().join("model.safetensors"), bytes).unwrap();
    (copy, config)
}

#[test]
fn a_nan_in_mapped_weights_is_refused_before_the_first_pass() {
    let (dir, config) = with_value(f32::NAN);
    let weights = Weights::open(dir.path()).unwrap();
    let decoder = Decoder::from_weights(config, &weights, Precision::F32, &[]).unwrap();
    let error = decoder.params().check_mapped().unwrap_err().to_string();
    for part in [
        "model.safetensors",
        "model.layers.0.mlp.up_proj.weight",
        "expected finite values, got NaN at place 7",
    ] {
        assert!(error.contains(part), "\"{part}\" is missing in: {error}");
    }
}

#[test]
fn an_infinity_in_converted_weights_is_refused_when_they_are_read() {
    let (dir, config) = with_value(f32::INFINITY);
    let weights = Weights::open(dir.path()).unwrap();
    let error = Decoder::from_weights(config, &weights, Precision::Bf16, &[]).err().unwrap().to_string();
    assert!(error.contains("expected finite values, got inf at place 7"), "{error}");
}
