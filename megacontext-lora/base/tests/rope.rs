//! Rotary positions against other implementations' numbers: transformers' frequencies of every scaling, exact angles far
//! out, and MegaContext's Gaussian tables.
//!
//! Where the numbers come from stands in integration-tests/fixtures/README.md.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use megacontext_base::config::DecoderConfig;
use megacontext_base::rope::{
    Entries, PositionOptions, Rope, RopeKeys, RopeScaling, SigmaPreset, SigmaRule, damping,
};
use megacontext_kernels::attention::alibi_slopes;
use megacontext_kernels::rope::rotate;
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures").join(name)
}

fn read(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture(name)).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// The tensors of a golden case, in f32.
fn golden(name: &str) -> HashMap<String, Tensor> {
    let path = fixture("megacontext").join(format!("{name}.safetensors"));
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn wide(tensor: &Tensor) -> Vec<f64> {
    values(tensor).into_iter().map(f64::from).collect()
}

/// Largest difference, absolute.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn llama(keys: &Value) -> Value {
    let mut config = json!({
        "model_type": "llama", "hidden_act": "silu", "vocab_size": 64, "intermediate_size": 32, "num_hidden_layers": 1,
    });
    config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    config
}

#[test]
fn frequencies_of_every_scaling_are_those_of_transformers() {
    let file = read("rope/transformers.json");
    let mut worst = 0f64;
    let mut kinds = Vec::new();
    for case in file["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        for version in ["new", "old"] {
            let config = DecoderConfig::from_json(&llama(&case[version]), Path::new("config.json")).unwrap();
            let rope = config.rope(&config.rope_scaling);
            kinds.push(config.rope_scaling.kind());
            for at in case["at"].as_array().unwrap() {
                let length = at["length"].as_u64().unwrap() as usize;
                let expected = numbers(&at["inv_freq"]);
                let got = rope.frequencies(length);
                assert_eq!(got.len(), expected.len());
                for (band, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    let relative = (got / expected - 1.0).abs();
                    // transformers computes in f32, where the dynamic base is a power of a power.
                    assert!(relative < 2e-6, "{name} {version} at {length}, band {band}: {got}, {expected}");
                    worst = worst.max(relative);
                }
                let amplitude = at["attention_scaling"].as_f64().unwrap();
                assert!((config.rope_scaling.attention_factor() / amplitude - 1.0).abs() < 1e-14, "{name}");
            }
        }
    }
    for kind in RopeScaling::KINDS.into_iter().filter(|k| *k != "ntk") {
        assert!(kinds.contains(&kind), "no case of {kind}");
    }
    println!("largest relative difference of a frequency: {worst:.1e}");
}

#[test]
fn a_written_config_keeps_the_frequencies_of_transformers() {
    for case in read("rope/transformers.json")["cases"].as_array().unwrap() {
        let config = DecoderConfig::from_json(&llama(&case["new"]), Path::new("config.json")).unwrap();
        let again = DecoderConfig::from_json(&config.to_json(), Path::new("config.json")).unwrap();
        assert_eq!(again.rope_scaling, config.rope_scaling, "{}", case["name"]);
        assert_eq!(again.rope_theta, config.rope_theta);
    }
}

#[test]
fn a_model_extended_with_ntk_is_exported_as_a_changed_base() {
    let plain = llama(&json!({
        "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "rope_theta": 10000.0,
    }));
    let config = DecoderConfig::from_json(&plain, Path::new("config.json")).unwrap();
    let extended = config.extended(RopeScaling::Ntk { factor: 8.0 }, 512);
    let written = extended.to_json();
    assert_eq!(written["rope_scaling"], Value::Null);
    assert_eq!(written["rope_parameters"]["rope_type"], "default");
    let expected = 10000.0 * 8f64.powf(16.0 / 14.0);
    assert!((written["rope_theta"].as_f64().unwrap() / expected - 1.0).abs() < 1e-14);
    // Any other reader sees the frequencies of the scaling; we see the scaling.
    let mut others = written.clone();
    others.as_object_mut().unwrap().remove("megacontext");
    let others = DecoderConfig::from_json(&others, Path::new("config.json")).unwrap();
    let frequencies = |c: &DecoderConfig| c.rope(&c.rope_scaling).frequencies(512);
    for (a, b) in frequencies(&others).iter().zip(frequencies(&extended)) {
        assert!((a / b - 1.0).abs() < 1e-14);
    }
    let ours = DecoderConfig::from_json(&written, Path::new("config.json")).unwrap();
    assert_eq!((ours.rope_theta, &ours.rope_scaling), (10000.0, &RopeScaling::Ntk { factor: 8.0 }));
    // Stretched twice as far it counts from the original.
    let further = ours.stretched().scaling(None, None, 1024).unwrap();
    assert_eq!(further, RopeScaling::Ntk { factor: 16.0 });
}

#[test]
fn an_extended_config_states_the_lengths_that_transformers_counts_from() {
    let plain = llama(&json!({
        "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "rope_theta": 10000.0,
    }));
    let config = DecoderConfig::from_json(&plain, Path::new("config.json")).unwrap();
    for (kind, stated) in [("linear", 512), ("dynamic", 64), ("yarn", 512), ("llama3", 512)] {
        let choice = megacontext_base::rope::ScalingChoice::Kind(kind.into());
        let scaling = config.stretched().scaling(Some(&choice), None, 512).unwrap();
        let written = config.extended(scaling.clone(), 512).to_json();
        assert_eq!(written["max_position_embeddings"], stated, "{kind}");
        let again = DecoderConfig::from_json(&written, Path::new("config.json")).unwrap();
        assert_eq!(
            (again.context(), again.original_context(), &again.rope_scaling),
            (512, 64, &scaling),
            "{kind}"
        );
    }
}

#[test]
fn angles_at_position_1e8_are_right_to_1e_6() {
    for case in read("rope/exact_angles.json").as_array().unwrap() {
        let number = |key: &str| case[key].as_f64().unwrap();
        let rope = Rope::new(number("width") as usize, number("theta"), RopeScaling::None);
        let position = [number("position")];
        let (cos, sin) = rope.values(&Entries { mu: &position, ..Entries::default() }).unwrap();
        let every = number("every") as usize;
        for (ours, exact) in [(cos, numbers(&case["cos"])), (sin, numbers(&case["sin"]))] {
            for (ours, exact) in ours.iter().step_by(every).zip(exact) {
                assert!((f64::from(*ours) - exact).abs() < 1e-6, "{case}: {ours}, exactly {exact}");
            }
        }
    }
}

/// The rule that MegaContext's code follows, with its K.
fn original(block: usize) -> SigmaRule {
    SigmaRule { preset: SigmaPreset::Original, block, uniform: false }
}

/// Tables of the golden entries, as the original's registry kind of this name makes them.
fn gaussian(kind: &str, width: usize, block: usize, starts: &[f64], lods: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let lod: Vec<u32> = lods.iter().map(|l| *l as u32).collect();
    let rule = original(block);
    let (mu, sigma): (Vec<f64>, Vec<f64>) = starts.iter().zip(&lod).map(|(s, l)| rule.place(*s, *l)).unzip();
    // The original's level part is as wide as its part of time; ours is a part of the head.
    let split = kind.contains("lod2d");
    let options = PositionOptions { lod_bands: if split { width / 2 } else { 0 }, ..Default::default() };
    let width = if split { 2 * width } else { width };
    let rope = Rope { options, ..Rope::new(width, 10000.0, RopeScaling::None) };
    let sigma = (kind != "simple").then_some(&sigma[..]);
    rope.values(&Entries { mu: &mu, sigma, lod: Some(&lod), ..Entries::default() }).unwrap()
}

#[test]
fn tables_of_every_registry_kind_are_megacontexts() {
    let golden = golden("rope");
    let (starts, lods) = (wide(&golden["in.positions"]), values(&golden["in.lods"]));
    let mut checked = 0;
    for key in golden.keys().filter(|k| k.starts_with("fp32.") && k.ends_with(".cos")) {
        let case = key.strip_suffix(".cos").unwrap();
        let (kind, sizes) = case["fp32.".len()..].split_once('.').unwrap();
        let sizes = sizes.trim_end_matches("_runtime").strip_prefix("hd").unwrap();
        let (width, block) = sizes.split_once("_k").unwrap();
        let (cos, sin) = gaussian(kind, width.parse().unwrap(), block.parse().unwrap(), &starts, &lods);
        for (ours, part) in [(cos, "cos"), (sin, "sin")] {
            let theirs = values(&golden[&format!("{case}.{part}")]);
            let bands = theirs.len() / starts.len();
            for ((ours, theirs), start) in ours.chunks(bands).zip(theirs.chunks(bands)).zip(&starts) {
                // Their angles are f32 products: wrong by 1e-7 of a position.
                let worst = difference(ours, theirs);
                assert!(worst < 1e-6f32.max(1e-7 * *start as f32), "{case}.{part} at {start}: {worst}");
            }
            checked += 1;
        }
    }
    assert_eq!(checked, 28, "14 configurations");
}

#[test]
fn rotation_by_minus_theta_is_megacontexts_and_so_is_the_norm_after_it() {
    let golden = golden("rope");
    let (heads, width) = (4, 16);
    for kind in ["simple", "gaussian"] {
        // With their tables: ours are held against them above.
        let table = |part: &str| values(&golden[&format!("fp32.{kind}.hd16_k32.{part}")]);
        let mut x = values(&golden["in.x"]);
        rotate(&mut x, heads, width, &table("cos"), &table("sin"), -1.0);
        let theirs = values(&golden[&format!("fp32.apply_rotary.{kind}")]);
        assert!(difference(&x, &theirs) < 1e-6, "{kind}: {}", difference(&x, &theirs));
        if kind == "gaussian" {
            let theirs = values(&golden["fp32.qknorm_after_rotary.gaussian"]);
            let mut normed = vec![0f32; x.len()];
            megacontext_kernels::norm::rms_forward_into(&x, &[1.0; 16], f32::EPSILON, &mut normed);
            assert!(difference(&normed, &theirs) < 5e-6, "{}", difference(&normed, &theirs));
        }
    }
}

#[test]
fn derived_positions_are_ours() {
    let golden = golden("pos_derived");
    let positions = wide(&golden["in.positions"]);
    let table = |scaling: RopeScaling| {
        let rope = Rope::new(16, 10000.0, scaling);
        positions
            .iter()
            .flat_map(|p| rope.frequencies(0).into_iter().map(move |w| p * w))
            .collect::<Vec<f64>>()
    };
    let close = |ours: &[f64], theirs: &Tensor, what: &str| {
        let theirs = wide(theirs);
        assert_eq!(ours.len(), theirs.len(), "{what}");
        for (ours, theirs) in ours.iter().zip(theirs) {
            assert!((ours - theirs).abs() <= 1e-6 * theirs.abs().max(1e-3), "{what}: {ours}, {theirs}");
        }
    };
    for factor in [2.0, 8.0] {
        let linear = table(RopeScaling::from_factor(factor).unwrap());
        close(&linear, &golden[&format!("derived.pi_s{factor}.theta")], "linear");
        close(&table(RopeScaling::Ntk { factor }), &golden[&format!("derived.ntk_s{factor}.theta")], "ntk");
        let omega = RopeScaling::Ntk { factor }.frequencies(10000.0, 16, 0);
        close(&omega, &golden[&format!("derived.ntk_s{factor}.inv_freq")], "ntk frequencies");
    }
    let omega = Rope::new(16, 10000.0, RopeScaling::None).frequencies(0);
    for sigma in [0, 1, 16, 32, 1024] {
        let keep: Vec<f64> = omega.iter().map(|w| damping(*w, f64::from(sigma))).collect();
        close(&keep, &golden[&format!("derived.decay_sigma{sigma}")], "damping");
    }
    let slopes: Vec<f64> = alibi_slopes(8).into_iter().map(f64::from).collect();
    close(&slopes, &golden["derived.alibi_paper_slopes_h8"], "slopes");
    // The original's slopes are twice the paper's at 8 heads: 2^-h instead of 2^-(h+1).
    let code: Vec<f64> = slopes.iter().map(|s| 2.0 * s).collect();
    close(&code, &golden["derived.alibi_code_slopes_h8"], "the original's slopes");
}

#[test]
fn alibi_biases_are_megacontexts_with_the_papers_sign_and_slopes() {
    let golden = golden("alibi_bias");
    let (starts, lods) = (wide(&golden["in.positions"]), values(&golden["in.lods"]));
    let (heads, n) = (4, starts.len());
    let theirs = values(&golden["fp32.bias"]);
    for (h, slope) in alibi_slopes(heads).into_iter().enumerate() {
        // 2^-h there, 2^(-8(h+1)/H) in the paper: for 4 heads 4^-(h+1).
        let ratio = 2f32.powi(-(h as i32)) / slope;
        for i in 0..n {
            for j in 0..=i {
                let ours = -slope * (starts[i] - starts[j]).abs() as f32;
                assert_eq!(-ours * ratio, theirs[(h * n + i) * n + j], "head {h}, {i} to {j}");
            }
        }
    }
    let (cos, sin) = gaussian("gaussian", 4, 64, &starts, &lods);
    assert!(difference(&cos, &values(&golden["fp32.cos"])) < 1e-6);
    assert!(difference(&sin, &values(&golden["fp32.sin"])) < 1e-6);
}

#[test]
fn rope_keys_are_written_for_both_versions() {
    let keys = RopeKeys { theta: 10000.0, scaling: RopeScaling::Linear { factor: 4.0 } };
    let mut config = serde_json::Map::new();
    keys.write(&mut config, 16);
    assert_eq!(
        Value::Object(config),
        json!({
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        })
    );
}
