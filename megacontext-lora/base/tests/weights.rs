//! Reading safetensors folders: values, and one test for each thing that is refused. Writing them again.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use megacontext_base::config::DecoderConfig;
use megacontext_base::hf_export::{Dtype, write_model_dir};
use megacontext_base::weights::Weights;
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/llama").join(name)
}

fn copy_of(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

/// A safetensors file from a header as text and data.
fn write_raw(path: &Path, header: &str, data: &[u8]) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    fs::write(path, bytes).unwrap();
}

fn single(header: &str, data: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_raw(&dir.path().join("model.safetensors"), header, data);
    dir
}

fn open_error(dir: &Path) -> String {
    Weights::open(dir).err().expect("must be refused").to_string()
}

#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "\"{part}\" is missing in: {message}");
    }
}

fn edit_index(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join("model.safetensors.index.json");
    let mut index: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    edit(&mut index);
    fs::write(&path, index.to_string()).unwrap();
}

#[test]
fn values_are_those_that_safetensors_reads() {
    for name in ["tied_f32", "tied_f16_linear_old_keys", "untied_bf16_sharded"] {
        let weights = Weights::open(&fixture(name)).unwrap();
        let mut seen = 0;
        for entry in fs::read_dir(fixture(name)).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_string_lossy().into_owned();
            if !(file.starts_with("model") && file.ends_with(".safetensors")) {
                continue;
            }
            for (tensor, value) in candle_core::safetensors::load(&path, &Device::Cpu).unwrap() {
                let value = value.to_dtype(DType::F32).unwrap();
                let ours = weights.tensor_f32(&tensor, value.dims()).unwrap();
                let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(values(&ours), values(&value), "{name} {tensor}");
                seen += 1;
            }
        }
        assert_eq!(seen, weights.names().count());
    }
}

#[test]
fn large_tensors_are_widened_in_pieces() {
    let n = 200_003;
    let data: Vec<u8> = (0..n).flat_map(|i| half::bf16::from_f32(i as f32).to_le_bytes()).collect();
    let header = json!({"a": {"dtype": "BF16", "shape": [n], "data_offsets": [0, 2 * n]}}).to_string();
    let dir = single(&header, &data);
    let values = Weights::open(dir.path()).unwrap().tensor_f32("a", &[n]).unwrap().to_vec1::<f32>().unwrap();
    assert!(values.iter().enumerate().all(|(i, v)| *v == half::bf16::from_f32(i as f32).to_f32()));
}

#[test]
fn fingerprint_depends_on_content_alone() {
    let reference = Weights::open(&fixture("untied_bf16_sharded")).unwrap();
    let config = DecoderConfig::from_dir(&fixture("untied_bf16_sharded")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let merged = dir.path().join("single");
    let tensors: Vec<_> = config
        .tensors()
        .into_iter()
        .map(|(name, shape)| (name.clone(), reference.tensor_f32(&name, &shape).unwrap()))
        .collect();
    write_model_dir(&merged, &config, tensors.clone(), Dtype::BF16, None).unwrap();
    assert_eq!(Weights::open(&merged).unwrap().fingerprint(), reference.fingerprint());
    assert_eq!(reference.fingerprint().len(), 64);
    assert_eq!(reference.common_dtype(reference.names()).unwrap(), Dtype::BF16);

    let wider = dir.path().join("wider");
    write_model_dir(&wider, &config, tensors.clone(), Dtype::F32, None).unwrap();
    assert_ne!(Weights::open(&wider).unwrap().fingerprint(), reference.fingerprint());
    let changed = dir.path().join("changed");
    let tensors = tensors.into_iter().map(|(name, t)| {
        let t = if name == "model.norm.weight" { (t * 1.5).unwrap() } else { t };
        (name, t)
    });
    write_model_dir(&changed, &config, tensors, Dtype::BF16, None).unwrap();
    assert_ne!(Weights::open(&changed).unwrap().fingerprint(), reference.fingerprint());
}

#[test]
fn written_folder_reads_back_and_has_its_companions() {
    let base = copy_of("tied_f32");
    fs::write(base.path().join("tokenizer.json"), "{}").unwrap();
    fs::write(base.path().join("generation_config.json"), "{}").unwrap();
    let config = DecoderConfig::from_dir(base.path()).unwrap();
    let weights = Weights::open(base.path()).unwrap();
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let tensors = config
        .tensors()
        .into_iter()
        .map(|(name, shape)| (name.clone(), weights.tensor_f32(&name, &shape).unwrap()));
    write_model_dir(&out, &config, tensors, Dtype::F32, Some(base.path())).unwrap();
    assert!(out.join("tokenizer.json").is_file() && out.join("generation_config.json").is_file());
    assert_eq!(Weights::open(&out).unwrap().fingerprint(), weights.fingerprint());
    let again = DecoderConfig::from_dir(&out).unwrap();
    assert_eq!(again.raw["torch_dtype"], "float32");
    assert_eq!(again.to_json(), Value::Object(again.raw.clone()));
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "no temporary folder may stay");
}

#[test]
fn writing_into_a_folder_with_content_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("thesis.txt"), "x").unwrap();
    let config = DecoderConfig::from_dir(&fixture("tied_f32")).unwrap();
    let weights = Weights::open(&fixture("tied_f32")).unwrap();
    let tensors: Vec<_> = config
        .tensors()
        .into_iter()
        .map(|(name, shape)| (name.clone(), weights.tensor_f32(&name, &shape).unwrap()))
        .collect();
    let error = write_model_dir(dir.path(), &config, tensors, Dtype::F32, None).unwrap_err().to_string();
    says(&error, &["empty"]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn writing_with_a_tensor_missing_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let config = DecoderConfig::from_dir(&fixture("tied_f32")).unwrap();
    let error =
        write_model_dir(&root.path().join("out"), &config, [], Dtype::F32, None).unwrap_err().to_string();
    says(&error, &["model.embed_tokens.weight", "not given"]);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0, "nothing half-written may stay");
}

#[test]
fn writing_a_wrong_shape_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let config = DecoderConfig::from_dir(&fixture("tied_f32")).unwrap();
    let tensors = config
        .tensors()
        .into_iter()
        .map(|(name, _)| (name, Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap()));
    let error = write_model_dir(&root.path().join("out"), &config, tensors, Dtype::F32, None)
        .unwrap_err()
        .to_string();
    says(&error, &["model.embed_tokens.weight", "[64, 32]", "[3]"]);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0, "nothing half-written may stay");
}

#[test]
fn missing_folder_is_refused() {
    says(&open_error(Path::new("/no/such/folder")), &["/no/such/folder", "there is none"]);
}

#[test]
fn folder_without_weights_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    says(&open_error(dir.path()), &["model.safetensors", "there is neither"]);
}

#[test]
fn pickled_weights_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    says(&open_error(dir.path()), &["pytorch_model.bin", "safetensors only", "runs code"]);
}

#[test]
fn empty_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model.safetensors"), "").unwrap();
    says(&open_error(dir.path()), &["model.safetensors", "0 bytes", "truncated"]);
}

#[test]
fn truncated_data_is_refused() {
    let dir = copy_of("tied_f32");
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    says(&open_error(dir.path()), &["model.safetensors", "truncated"]);
}

#[test]
fn truncated_header_is_refused() {
    let dir = copy_of("tied_f32");
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..100]).unwrap();
    says(&open_error(dir.path()), &["model.safetensors", "header", "truncated"]);
}

#[test]
fn text_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model.safetensors"), "version https://git-lfs.github.com/spec/v1").unwrap();
    says(&open_error(dir.path()), &["model.safetensors", "another format"]);
}

#[test]
fn folder_in_place_of_the_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    says(&open_error(dir.path()), &["model.safetensors", "regular file"]);
}

#[test]
fn tensor_named_twice_is_refused() {
    let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    let dir = single(header, &[0; 8]);
    says(&open_error(dir.path()), &["tensor a", "twice"]);
}

#[test]
fn offsets_that_do_not_fit_the_shape_are_refused() {
    let dir = single(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, &[0; 8]);
    says(&open_error(dir.path()), &["offsets"]);
}

#[test]
fn overlapping_tensors_are_refused() {
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    let dir = single(header, &[0; 8]);
    says(&open_error(dir.path()), &["invalid offset"]);
}

#[test]
fn shape_that_overflows_is_refused() {
    let header = format!(r#"{{"a":{{"dtype":"F32","shape":[{0},{0}],"data_offsets":[0,8]}}}}"#, u64::MAX / 2);
    let dir = single(&header, &[0; 8]);
    says(&open_error(dir.path()), &["overflow"]);
}

#[test]
fn wrong_dtype_is_refused() {
    let dir = single(r#"{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#, &[0; 8]);
    let weights = Weights::open(dir.path()).unwrap();
    let error = weights.tensor_f32("a", &[1]).unwrap_err().to_string();
    says(&error, &["model.safetensors", "tensor a", "F32, F16 or BF16", "I64"]);
    assert!(weights.check(&[("a".into(), vec![1])]).is_err());
}

#[test]
fn wrong_shape_is_refused() {
    let weights = Weights::open(&fixture("tied_f32")).unwrap();
    let error = weights.tensor_f32("model.norm.weight", &[33]).unwrap_err().to_string();
    says(&error, &["model.safetensors", "tensor model.norm.weight", "[33]", "[32]"]);
    let error = weights.check(&[("model.norm.weight".into(), vec![33])]).unwrap_err().to_string();
    says(&error, &["model.norm.weight", "[33]", "[32]", "config.json"]);
}

#[test]
fn absent_tensor_is_refused() {
    let weights = Weights::open(&fixture("tied_f32")).unwrap();
    let error = weights.tensor_f32("lm_head.weight", &[64, 32]).unwrap_err().to_string();
    says(&error, &["lm_head.weight", "none of this name", "model.safetensors"]);
}

#[test]
fn missing_shard_is_refused() {
    let dir = copy_of("untied_bf16_sharded");
    fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    says(&open_error(dir.path()), &["index.json", "model-00002-of-00002.safetensors", "there is none"]);
}

#[test]
fn truncated_shard_is_refused() {
    let dir = copy_of("untied_bf16_sharded");
    let path = dir.path().join("model-00002-of-00002.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    says(&open_error(dir.path()), &["model-00002-of-00002.safetensors", "truncated"]);
}

#[test]
fn index_pointing_at_a_missing_tensor_is_refused() {
    let dir = copy_of("untied_bf16_sharded");
    edit_index(dir.path(), |index| {
        index["weight_map"]["model.ghost.weight"] = json!("model-00001-of-00002.safetensors");
    });
    says(&open_error(dir.path()), &["index.json", "model.ghost.weight", "it is not there"]);
}

#[test]
fn tensor_in_two_shards_is_refused() {
    let dir = copy_of("untied_bf16_sharded");
    fs::copy(dir.path().join("model-00001-of-00002.safetensors"), dir.path().join("copy.safetensors"))
        .unwrap();
    let reference = Weights::open(dir.path()).unwrap();
    let first = candle_core::safetensors::load(dir.path().join("copy.safetensors"), &Device::Cpu).unwrap();
    let tensor = reference.names().find(|name| first.contains_key(*name)).unwrap().to_string();
    edit_index(dir.path(), |index| index["weight_map"][tensor] = json!("copy.safetensors"));
    says(&open_error(dir.path()), &["each tensor once", "also in"]);
}

#[test]
fn index_naming_a_tensor_twice_is_refused() {
    let dir = copy_of("untied_bf16_sharded");
    let path = dir.path().join("model.safetensors.index.json");
    let text = fs::read_to_string(&path).unwrap();
    let text = text.replacen(
        "\"weight_map\": {",
        "\"weight_map\": { \"model.norm.weight\": \"model-00001-of-00002.safetensors\",",
        1,
    );
    fs::write(&path, text).unwrap();
    says(&open_error(dir.path()), &["index.json", "model.norm.weight", "twice"]);
}

#[test]
fn half_written_index_is_refused() {
    let dir = copy_of("untied_bf16_sharded");
    let path = dir.path().join("model.safetensors.index.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, &text[..text.len() / 2]).unwrap();
    says(&open_error(dir.path()), &["index.json", "complete JSON"]);
}

#[test]
fn index_without_a_map_is_refused() {
    let dir = copy_of("untied_bf16_sharded");
    edit_index(dir.path(), |index| index["weight_map"] = json!({}));
    says(&open_error(dir.path()), &["index.json", "weight_map"]);
}

#[test]
fn index_leaving_the_folder_is_refused() {
    let dir = copy_of("untied_bf16_sharded");
    edit_index(dir.path(), |index| index["weight_map"]["model.norm.weight"] = json!("../model.safetensors"));
    says(&open_error(dir.path()), &["model.norm.weight", "in this folder", "../model.safetensors"]);
}
