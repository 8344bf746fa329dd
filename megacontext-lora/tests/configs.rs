//! The settings that come with the project: each is read as a user's would be and planned at the shapes that it is for, and says what
//! it will cost without running.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use megacontext_base::config::DecoderConfig;
use megacontext_base::device::Device;
use megacontext_lora::train::config::ExtendConfig;
use megacontext_lora::train::cycle::{CycleConfig, CyclePlan, PhaseKind};
use megacontext_lora::train::plan;
use serde_json::{Value, json};

/// Room for anything: what is looked at are the numbers, not this machine.
const ROOM: u64 = 1 << 42;

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs")
}

fn read(name: &str) -> Value {
    let text = fs::read_to_string(configs().join(name)).unwrap();
    serde_json::to_value(toml::from_str::<toml::Table>(&text).unwrap()).unwrap()
}

/// A Llama of these sizes.
fn model(
    width: usize,
    layers: usize,
    heads: [usize; 2],
    mlp: usize,
    vocab: usize,
    context: usize,
) -> DecoderConfig {
    let value = json!({
        "model_type": "llama", "vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
        "rms_norm_eps": 1e-5, "max_position_embeddings": context, "rope_theta": 10000.0,
        "tie_word_embeddings": true,
    });
    DecoderConfig::from_json(&value, Path::new("config.json")).unwrap()
}

fn planned(name: &str, model: &DecoderConfig, trained: usize) -> CyclePlan {
    let config = CycleConfig::from_json(read(name)).unwrap();
    let config = CycleConfig { memory_budget_bytes: Some(ROOM), ..config };
    let config = config.resolve(model, trained).unwrap();
    let lora = config.lora.clone().unwrap_or_default().resolve(model).unwrap();
    CyclePlan::new(&config, model, &lora, config.validation.histories, &Device::Cpu).unwrap()
}

fn check(plan: &CyclePlan, phases: usize, gigabytes: [f64; 2]) {
    assert_eq!(plan.phases.len(), phases);
    let total = plan.total as f64 / 1e9;
    assert!(total > gigabytes[0] && total < gigabytes[1], "{total} GB: {}", plan.text());
    for phase in &plan.phases {
        assert!(phase.seconds_per_step > 0.0 && phase.steps > 0, "{phase:?}");
        let labels = matches!(phase.kind, PhaseKind::WarmLensnet | PhaseKind::Jt2);
        assert_eq!(phase.label_seconds > 0.0, labels, "{phase:?}");
    }
}

#[test]
fn every_file_is_looked_at_here() {
    let mut names: Vec<String> = fs::read_dir(configs())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["jt_cycle.toml", "longlora_recipe.toml", "nanochat_run10.toml", "quickstart.toml"]);
}

#[test]
fn the_quickstarts_cycle() {
    // The embedded model, extended.
    let model = model(256, 6, [4, 2], 640, 4096, 256);
    check(&planned("quickstart.toml", &model, 1024), 5, [0.05, 2.0]);
}

#[test]
fn the_documents_cycle_at_three_billion() {
    let model = model(2048, 36, [16, 4], 11008, 128_256, 65_536);
    check(&planned("jt_cycle.toml", &model, 65_536), 5, [10.0, 60.0]);
}

#[test]
fn nanochats_run10() {
    let model = model(768, 12, [6, 6], 3072, 65_536, 2048);
    let plan = planned("nanochat_run10.toml", &model, 2048);
    check(&plan, 5, [1.0, 20.0]);
    // Twice the steps of a phase are twice its time.
    let jt1 = plan.phases.iter().find(|phase| phase.kind == PhaseKind::Jt1).unwrap();
    let warm = plan.phases.iter().find(|phase| phase.kind == PhaseKind::WarmGistnet).unwrap();
    assert_eq!([jt1.steps, warm.steps], [2000, 1000]);
}

#[test]
fn longloras_recipe_at_seven_billion() {
    let model = model(4096, 32, [32, 32], 11008, 32_000, 4096);
    let mut value = read("longlora_recipe.toml");
    value["memory_budget_bytes"] = json!(ROOM);
    value["data"] = json!(["books"]);
    let config = ExtendConfig::from_json(value).unwrap().resolve(&model).unwrap();
    let plan = plan::plan(&model, &config, 0, &Device::Cpu).unwrap();
    let total = plan.memory.total as f64 / 1e9;
    assert!(total > 14.0 && total < 80.0, "{total} GB");
    assert!(plan.seconds > 0.0);
}
