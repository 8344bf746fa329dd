//! Adapter folders: PEFT's own is read, ours reads back, merging is the formula; one test for each thing refused.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use megacontext_base::adapter::{Adapter, AdapterConfig, MegacontextKey, read_adapter, write_adapter};
use megacontext_base::config::DecoderConfig;
use megacontext_base::hf_export::Dtype;
use megacontext_base::lora::{LoraConfig, Names};
use megacontext_base::merge::merge;
use megacontext_base::params::{Group, ParamStore};
use megacontext_base::rope::RopeScaling;
use megacontext_base::weights::Weights;
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/llama").join(name)
}

#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "\"{part}\" is missing in: {message}");
    }
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Some deterministic numbers.
fn filled(shape: &[usize], seed: usize) -> Tensor {
    let n: usize = shape.iter().product();
    let data: Vec<f32> = (0..n).map(|i| ((i * 37 + seed * 101) % 97) as f32 / 97.0 - 0.5).collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

struct Made {
    root: tempfile::TempDir,
    base: DecoderConfig,
    weights: Weights,
    config: AdapterConfig,
    tensors: Vec<(String, Tensor)>,
}

impl Made {
    /// An adapter for a golden folder with everything LongLoRA trains.
    fn on(name: &str) -> Self {
        let base = DecoderConfig::from_dir(&fixture(name)).unwrap();
        let weights = Weights::open(&fixture(name)).unwrap();
        let lora = LoraConfig { r: 3, alpha: 6.0, ..LoraConfig::default() };
        let mut tensors = Vec::new();
        for (name, shape) in lora.resolve(&base).unwrap().parameters() {
            tensors.push((name, filled(&shape, tensors.len())));
        }
        for (name, shape) in base.tensors() {
            if matches!(base.group_of(&name), Group::Embeddings | Group::Norms) {
                tensors.push((name, filled(&shape, tensors.len())));
            }
        }
        let own = MegacontextKey {
            base_fingerprint: weights.fingerprint(),
            rope_scaling: RopeScaling::Linear { factor: 4.0 },
            base_rope_scaling: Some(base.rope_scaling.clone()),
            base_rope_theta: Some(base.rope_theta),
            original_max_position_embeddings: base.original_context(),
            context_length: 128,
            positions: Default::default(),
            sigma_scales: None,
        };
        let trained: Vec<&str> =
            tensors.iter().map(|(name, _)| name.as_str()).filter(|name| !name.contains("lora_")).collect();
        let config = AdapterConfig::new(&lora, &base, trained, &fixture(name), own).unwrap();
        Self { root: tempfile::tempdir().unwrap(), base, weights, config, tensors }
    }

    fn dir(&self) -> PathBuf {
        self.root.path().join("adapter")
    }

    fn write(&self) -> PathBuf {
        write_adapter(&self.dir(), &self.config, &self.tensors).unwrap();
        self.dir()
    }

    fn check(&self) -> Result<Adapter, String> {
        let adapter = read_adapter(&self.dir()).map_err(|e| e.to_string())?;
        adapter.check_against(&self.base, &self.weights.fingerprint()).map_err(|e| e.to_string())?;
        Ok(adapter)
    }

    fn refused(&self) -> String {
        self.check().err().expect("must be refused")
    }
}

fn edit_config(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join("adapter_config.json");
    let mut value: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(&path, value.to_string()).unwrap();
}

fn edit_tensors(dir: &Path, edit: impl FnOnce(&mut std::collections::HashMap<String, Tensor>)) {
    let path = dir.join("adapter_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    edit(&mut tensors);
    fs::remove_file(&path).unwrap();
    candle_core::safetensors::save(&tensors, &path).unwrap();
}

/// What a refusal says after `adapter_config.json` was changed.
fn refused_config(edit: impl FnOnce(&mut Value)) -> String {
    let made = Made::on("tied_f32");
    edit_config(&made.write(), edit);
    made.refused()
}

fn refused_tensors(edit: impl FnOnce(&mut std::collections::HashMap<String, Tensor>)) -> String {
    let made = Made::on("tied_f32");
    edit_tensors(&made.write(), edit);
    made.refused()
}

const KEY_A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

#[test]
fn ours_reads_back_tied_and_untied() {
    for name in ["tied_f32", "untied_bf16_sharded"] {
        let made = Made::on(name);
        made.write();
        let adapter = made.check().unwrap();
        let mut sorted = made.config.clone();
        sorted.lora.target_modules = Names::list(["k_proj", "o_proj", "q_proj", "v_proj"]);
        assert_eq!(adapter.config, sorted);
        let read: Vec<(&str, Vec<f32>)> =
            adapter.parameters(&made.base).map(|(n, t)| (n, values(t))).collect();
        let mut written: Vec<(&str, Vec<f32>)> =
            made.tensors.iter().map(|(n, t)| (n.as_str(), values(t))).collect();
        written.sort_by_key(|(name, _)| *name);
        assert_eq!(read, written);
        assert_eq!(adapter.rope_scaling(), Some(&RopeScaling::Linear { factor: 4.0 }));
        assert_eq!(fs::read_dir(made.root.path()).unwrap().count(), 1, "no temporary folder may stay");
    }
}

#[test]
fn tied_embedding_is_written_twice_for_peft() {
    let made = Made::on("tied_f32");
    let file =
        candle_core::safetensors::load(made.write().join("adapter_model.safetensors"), &Device::Cpu).unwrap();
    let head = &file["base_model.model.lm_head.weight"];
    assert_eq!(values(head), values(&file["base_model.model.model.embed_tokens.weight"]));
    assert!(file.values().all(|t| t.dtype() == DType::F32));
    let modules = ["embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm"];
    assert_eq!(made.config.modules_to_save, modules);
    assert!(made.config.lora.ensure_weight_tying);
}

#[test]
fn lora_alone_saves_no_modules() {
    let made = Made::on("tied_f32");
    let own = made.config.megacontext.clone().unwrap();
    let config = AdapterConfig::new(&made.config.lora(), &made.base, [], Path::new("base"), own).unwrap();
    assert!(config.modules_to_save.is_empty() && !config.lora.ensure_weight_tying);
    let tensors: Vec<_> = made.tensors.iter().filter(|(name, _)| name.contains("lora_")).cloned().collect();
    write_adapter(&made.dir(), &config, &tensors).unwrap();
    assert_eq!(made.check().unwrap().tensors.len(), tensors.len());
    assert_eq!(config.to_json()["modules_to_save"], Value::Null);
}

#[test]
fn peft_adapter_is_read() {
    let adapter = read_adapter(&fixture("tied_f32_peft")).unwrap();
    let base = DecoderConfig::from_dir(&fixture("tied_f32")).unwrap();
    adapter.check_against(&base, "whatever: PEFT does not record its base").unwrap();
    assert_eq!(adapter.lora().scale(), 3.0);
    assert!(adapter.parameters(&base).all(|(name, _)| name != "lm_head.weight"));
    let mut params = ParamStore::new();
    adapter.load_into(&base, &mut params).unwrap();
    assert_eq!(params.group("model.layers.1.self_attn.v_proj.lora_B.weight"), Some(Group::Lora));
    assert_eq!(params.group("model.embed_tokens.weight"), Some(Group::Embeddings));
    assert_eq!(params.group("model.norm.weight"), Some(Group::Norms));
}

#[test]
fn rslora_is_kept_and_scales_by_the_root() {
    let made = Made::on("tied_f32");
    edit_config(&made.write(), |c| c["use_rslora"] = json!(true));
    assert!((made.check().unwrap().lora().scale() - 6.0 / 3f64.sqrt()).abs() < 1e-12);
}

#[test]
fn writing_replaces_an_older_adapter_and_keeps_other_files() {
    let made = Made::on("tied_f32");
    let dir = made.write();
    fs::write(dir.join("notes.md"), "mine").unwrap();
    let mut newer = made.config.clone();
    newer.lora.alpha = 9.0;
    write_adapter(&dir, &newer, &made.tensors).unwrap();
    assert_eq!(made.check().unwrap().config.lora.alpha, 9.0);
    assert_eq!(fs::read_to_string(dir.join("notes.md")).unwrap(), "mine");
    assert_eq!(fs::read_dir(made.root.path()).unwrap().count(), 1);
}

#[test]
fn merging_is_the_formula_and_writes_the_scaling() {
    for (name, dtype) in [("tied_f32", Dtype::F32), ("untied_bf16_sharded", Dtype::BF16)] {
        let made = Made::on(name);
        made.write();
        let adapter = made.check().unwrap();
        let kept = merge(&made.weights, &made.base, &adapter, &made.root.path().join("kept"), None).unwrap();
        assert_eq!(kept.dtype, dtype);
        let out = made.root.path().join("merged");
        let report = merge(&made.weights, &made.base, &adapter, &out, Some(Dtype::F32)).unwrap();
        assert_eq!(report.merged, 8);
        let config = DecoderConfig::from_dir(&out).unwrap();
        assert_eq!(config.rope_scaling, RopeScaling::Linear { factor: 4.0 });
        assert_eq!((config.max_position_embeddings, config.original_context()), (128, 32));
        assert_eq!(config.tie_word_embeddings, made.base.tie_word_embeddings);
        let merged = Weights::open(&out).unwrap();
        merged.check(&config.tensors()).unwrap();
        assert_eq!(merged.names().count(), config.tensors().len());
        let given = |name: &str| made.tensors.iter().find(|(n, _)| n == name).map(|(_, t)| t);
        for (name, shape) in config.tensors() {
            let found = values(&merged.tensor_f32(&name, &shape).unwrap());
            let module = name.strip_suffix(".weight").unwrap();
            let expected: Vec<f32> = match given(&format!("{module}.lora_A.weight")) {
                None => values(given(&name).unwrap_or(&made.weights.tensor_f32(&name, &shape).unwrap())),
                Some(a) => {
                    let w = values(&made.weights.tensor_f32(&name, &shape).unwrap());
                    let (a, b) = (values(a), values(given(&format!("{module}.lora_B.weight")).unwrap()));
                    let (out, inp) = (shape[0], shape[1]);
                    let sum = |o: usize, i: usize| (0..3).map(|r| b[o * 3 + r] * a[r * inp + i]).sum::<f32>();
                    (0..out * inp).map(|at| w[at] + 2.0 * sum(at / inp, at % inp)).collect()
                }
            };
            for (f, e) in found.iter().zip(&expected) {
                assert!((f - e).abs() < 1e-5, "{name}: {f} {e}");
            }
        }
    }
}

#[test]
fn merging_into_a_folder_with_content_is_refused() {
    let made = Made::on("tied_f32");
    made.write();
    let adapter = made.check().unwrap();
    let error = merge(&made.weights, &made.base, &adapter, &made.dir(), None).unwrap_err().to_string();
    says(&error, &["empty"]);
    made.check().unwrap();
}

#[test]
fn merging_onto_another_base_is_refused() {
    let made = Made::on("tied_f32");
    made.write();
    let adapter = made.check().unwrap();
    let other = Weights::open(&fixture("tied_f16_linear_old_keys")).unwrap();
    let out = made.root.path().join("merged");
    let error = merge(&other, &made.base, &adapter, &out, None).unwrap_err().to_string();
    says(&error, &["fingerprint"]);
    assert!(!out.exists());
}

#[test]
fn writing_over_a_folder_that_is_no_adapter_is_refused() {
    let made = Made::on("tied_f32");
    fs::create_dir(made.dir()).unwrap();
    fs::write(made.dir().join("thesis.txt"), "x").unwrap();
    let error = write_adapter(&made.dir(), &made.config, &made.tensors).unwrap_err().to_string();
    says(&error, &["older adapter"]);
    assert_eq!(fs::read_dir(made.root.path()).unwrap().count(), 1);
    assert!(made.dir().join("thesis.txt").is_file());
}

#[test]
fn writing_a_tensor_nobody_listed_is_refused() {
    let made = Made::on("tied_f32");
    let mut tensors = made.tensors.clone();
    tensors.push(("model.layers.0.mlp.up_proj.weight".into(), filled(&[48, 32], 0)));
    let error = write_adapter(&made.dir(), &made.config, &tensors).unwrap_err().to_string();
    says(&error, &["mlp.up_proj.weight"]);
    assert!(!made.dir().exists());
}

#[test]
fn some_norms_trained_is_refused() {
    let made = Made::on("tied_f32");
    let own = made.config.megacontext.clone().unwrap();
    let error =
        AdapterConfig::new(&made.config.lora(), &made.base, ["model.norm.weight"], Path::new("b"), own)
            .unwrap_err()
            .to_string();
    says(&error, &["all 5 norms", "got 1"]);
}

#[test]
fn linear_weight_trained_in_full_is_refused() {
    let made = Made::on("tied_f32");
    let own = made.config.megacontext.clone().unwrap();
    let trained = ["model.layers.0.mlp.up_proj.weight"];
    let error = AdapterConfig::new(&made.config.lora(), &made.base, trained, Path::new("b"), own)
        .unwrap_err()
        .to_string();
    says(&error, &["up_proj"]);
}

#[test]
fn missing_folder_is_refused() {
    says(&Made::on("tied_f32").refused(), &["adapter_config.json", "there is none"]);
}

#[test]
fn interrupted_replacement_is_explained() {
    let made = Made::on("tied_f32");
    fs::rename(made.write(), made.root.path().join(".adapter.previous")).unwrap();
    says(&made.refused(), &[".adapter.previous", "rename"]);
}

#[test]
fn half_written_config_is_refused() {
    let made = Made::on("tied_f32");
    let path = made.write().join("adapter_config.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, &text[..text.len() / 2]).unwrap();
    says(&made.refused(), &["adapter_config.json", "complete JSON"]);
}

#[test]
fn missing_tensor_file_is_refused() {
    let made = Made::on("tied_f32");
    fs::remove_file(made.write().join("adapter_model.safetensors")).unwrap();
    says(&made.refused(), &["adapter_model.safetensors", "there is none"]);
}

#[test]
fn pickled_tensors_are_refused() {
    let made = Made::on("tied_f32");
    let dir = made.write();
    fs::rename(dir.join("adapter_model.safetensors"), dir.join("adapter_model.bin")).unwrap();
    says(&made.refused(), &["adapter_model.bin", "runs code"]);
}

#[test]
fn truncated_tensor_file_is_refused() {
    let made = Made::on("tied_f32");
    let path = made.write().join("adapter_model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 4]).unwrap();
    says(&made.refused(), &["adapter_model.safetensors", "truncated"]);
}

#[test]
fn other_base_is_refused() {
    let made = Made::on("tied_f32");
    made.write();
    let error = read_adapter(&made.dir()).unwrap().check_against(&made.base, "0123456789abcdef").unwrap_err();
    says(&error.to_string(), &["fingerprint", "0123456789ab…", "tied_f32"]);
}

#[test]
fn base_with_other_rope_scaling_is_refused() {
    let made = Made::on("tied_f32");
    made.write();
    let base = made.base.extended(RopeScaling::Linear { factor: 8.0 }, 256);
    let error =
        read_adapter(&made.dir()).unwrap().check_against(&base, &made.weights.fingerprint()).unwrap_err();
    says(&error.to_string(), &["RoPE scaling none", "linear x8"]);
}

#[test]
fn missing_lora_factor_is_refused() {
    let error = refused_tensors(|t| {
        t.remove(KEY_A);
    });
    says(&error, &[KEY_A, "there is none"]);
}

#[test]
fn missing_saved_module_is_refused() {
    let error = refused_tensors(|t| {
        t.remove("base_model.model.model.layers.1.input_layernorm.weight");
    });
    says(&error, &["layers.1.input_layernorm.weight", "there is none"]);
}

#[test]
fn unexpected_tensor_is_refused() {
    let error = refused_tensors(|t| {
        t.insert("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight".into(), filled(&[3, 32], 0));
    });
    says(&error, &["mlp.up_proj.lora_A.weight", "do not account for"]);
}

#[test]
fn layer_beyond_the_base_is_refused() {
    let error = refused_tensors(|t| {
        let tensor = t[KEY_A].clone();
        t.insert(KEY_A.replace("layers.0", "layers.7"), tensor);
    });
    says(&error, &["layers.7"]);
}

#[test]
fn key_without_peft_prefix_is_refused() {
    let error = refused_tensors(|t| {
        let tensor = t.remove(KEY_A).unwrap();
        t.insert("q_proj.lora_A.weight".into(), tensor);
    });
    says(&error, &["base_model.model.", "q_proj.lora_A.weight"]);
}

#[test]
fn wrong_shape_is_refused() {
    let error = refused_tensors(|t| {
        t.insert(KEY_A.into(), filled(&[3, 31], 0));
    });
    says(&error, &[KEY_A, "[3, 32]", "[3, 31]"]);
}

#[test]
fn rank_other_than_stated_is_refused() {
    says(&refused_config(|c| c["r"] = json!(2)), &["lora_A", "[2, 32]", "[3, 32]"]);
}

#[test]
fn wrong_dtype_is_refused() {
    let error = refused_tensors(|t| {
        t.insert(KEY_A.into(), Tensor::zeros((3, 32), DType::I64, &Device::Cpu).unwrap());
    });
    says(&error, &["lora_A", "F32, F16 or BF16", "I64"]);
}

#[test]
fn head_that_unties_the_base_is_refused() {
    let error = refused_tensors(|t| {
        t.insert("base_model.model.lm_head.weight".into(), filled(&[64, 32], 5));
    });
    says(&error, &["lm_head.weight", "tied", "untie"]);
}

#[test]
fn head_left_at_the_base_is_refused() {
    let made = Made::on("tied_f32");
    let dir = made.write();
    edit_tensors(&dir, |t| {
        t.remove("base_model.model.lm_head.weight");
    });
    edit_config(&dir, |c| {
        c["ensure_weight_tying"] = json!(false);
        c["modules_to_save"] = json!(["embed_tokens", "norm"]);
    });
    says(&made.refused(), &["lm_head.weight", "tied", "PEFT"]);
}

#[test]
fn rank_zero_is_refused() {
    says(&refused_config(|c| c["r"] = json!(0)), &["r:", "positive", "got 0"]);
}

#[test]
fn alpha_that_is_no_number_is_refused() {
    says(&refused_config(|c| c["lora_alpha"] = json!("much")), &["lora_alpha", "much"]);
}

#[test]
fn other_peft_type_is_refused() {
    says(&refused_config(|c| c["peft_type"] = json!("IA3")), &["LORA", "IA3"]);
}

#[test]
fn other_task_is_refused() {
    says(&refused_config(|c| c["task_type"] = json!("SEQ_CLS")), &["CAUSAL_LM", "SEQ_CLS"]);
}

#[test]
fn trained_biases_are_refused() {
    says(&refused_config(|c| c["bias"] = json!("all")), &["bias", "none", "all"]);
}

#[test]
fn initialisation_that_changes_the_base_is_refused() {
    says(&refused_config(|c| c["init_lora_weights"] = json!("pissa")), &["init_lora_weights", "pissa"]);
}

#[test]
fn unknown_target_is_refused() {
    says(&refused_config(|c| c["target_modules"] = json!(["c_attn"])), &["target_modules", "c_attn"]);
}

#[test]
fn block_beyond_the_base_is_refused() {
    says(&refused_config(|c| c["layers_to_transform"] = json!([2])), &["0 to 1", "got 2"]);
}

#[test]
fn saved_module_that_does_not_exist_is_refused() {
    says(&refused_config(|c| c["modules_to_save"] = json!(["embed"])), &["modules_to_save", "\"embed\""]);
}

#[test]
fn saved_linear_module_is_refused() {
    says(&refused_config(|c| c["modules_to_save"] = json!(["up_proj"])), &["modules_to_save", "up_proj"]);
}

#[test]
fn own_key_of_another_version_is_refused() {
    says(
        &refused_config(|c| c["megacontext"]["format"] = json!(2)),
        &["megacontext.format", "another version"],
    );
}

#[test]
fn own_key_without_scaling_is_refused() {
    let error = refused_config(|c| {
        c["megacontext"].as_object_mut().unwrap().remove("rope_scaling");
    });
    says(&error, &["megacontext.rope_scaling", "missing"]);
}

#[test]
fn own_key_with_unknown_scaling_is_refused() {
    let error = refused_config(|c| c["megacontext"]["rope_scaling"] = json!({"rope_type": "spiral"}));
    says(&error, &["megacontext.rope_scaling", "spiral"]);
}

#[test]
fn own_key_without_fingerprint_is_refused() {
    says(&refused_config(|c| c["megacontext"]["base_fingerprint"] = json!(7)), &["base_fingerprint", "7"]);
}
