//! `train gistnet`, `eval gist` and `train lensnet`: networks whose blocks run where the base model's do.

use std::fs;

use serde_json::{Value, json};

use crate::common::{Fixture, mclora, metrics, read_json};
use crate::support::{GPU, Machine, close_all, close_tensors, first_line, planned_well};

/// Of tensors of a network that has learned.
const TENSOR: f32 = 1e-3;

/// Settings in a file, and the command that runs them on a device.
fn command(fixture: &Fixture, kind: &str, settings: &Value, out: &str, device: &str) -> Vec<String> {
    let path = fixture.at(&format!("{kind}.toml"));
    fs::write(&path, toml::to_string(settings).unwrap()).unwrap();
    let out = fixture.at(out);
    let args = ["train", kind, "--config", &path, "--out", &out, "--threads", "2", "--device", device];
    args.map(str::to_owned).to_vec()
}

/// Blocks of 4 of which some entries are not seen, spans of two levels, a second stage that is held to what the first left.
fn gistnet(fixture: &Fixture, heads: usize) -> Value {
    json!({
        "base": fixture.at("base"), "data": [fixture.at("data")], "context": 40, "seed": 7,
        "network": { "block": 4, "layers": 2, "heads": heads },
        "stages": [
            { "horizon": 4, "steps": 2, "dropout": 0.3 },
            { "horizon": 4, "steps": 2, "level2": 0.5, "kl": 0.2, "loss": { "stability": 0.1 } },
        ],
        "passages_per_step": 2, "spans_per_passage": 2,
        "validation": { "every": 2, "passages": 2, "test_passages": 2 },
        "checkpoint": { "every": 2 }, "optimizer": { "lr": 1e-3 },
    })
}

#[test]
fn gistnet_learns_and_is_measured_as_on_the_processor() {
    let Some(machine) = Machine::new() else { return };
    let fixture = &machine.fixture;
    let settings = gistnet(fixture, 4);
    mclora(&command(fixture, "gistnet", &settings, "cpu", "cpu")).success();
    let ran = machine.launches(&command(fixture, "gistnet", &settings, "gpu", "cuda:0"), 500);
    assert_eq!(first_line(&ran), format!("device: {GPU}"));
    assert!(!ran.stderr.contains("runs on the processor"), "{}", ran.stderr);
    let (cpu, gpu) = (fixture.path("cpu"), fixture.path("gpu"));
    close_all("line", &metrics(&gpu).into(), &metrics(&cpu).into());
    let [got, expected] = [&gpu, &cpu].map(|run| read_json(&run.join("summary.json")));
    planned_well(&got, 1.6);
    for key in ["validation", "test", "baselines"] {
        close_all(key, &got[key], &expected[key]);
    }
    close_tensors(&gpu.join("gistnet.safetensors"), &cpu.join("gistnet.safetensors"), TENSOR);

    let (base, data, network) =
        (fixture.at("base"), fixture.at("data"), fixture.at("cpu/gistnet.safetensors"));
    #[rustfmt::skip]
    let args = [
        "eval", "gist", "--base", &base, "--data", &data, "--network", &network, "--context", "40", "--horizon", "4",
        "--passages", "2", "--json",
    ];
    let expected = mclora(&[&args[..], &["--device", "cpu"]].concat()).success().json();
    let got = machine.launches(&[&args[..], &["--device", "cuda:0"]].concat(), 50).json();
    close_all("eval gist", &got, &expected);
}

#[test]
fn a_network_that_the_gpu_cannot_run_stays_on_the_processor_and_says_so() {
    let Some(machine) = Machine::new() else { return };
    let ran = machine
        .launches(&command(&machine.fixture, "gistnet", &gistnet(&machine.fixture, 8), "gpu", "cuda:0"), 200);
    let expected = "GistNet runs on the processor: device: cuda:0: expected heads whose width is a multiple of 8 up to 256, got 4";
    assert!(ran.stderr.contains(expected), "{}", ran.stderr);
}

#[test]
fn lensnet_learns_as_on_the_processor() {
    let Some(machine) = Machine::new() else { return };
    let fixture = &machine.fixture;
    let short = json!({ "network": { "block": 4, "layers": 1 }, "stages": [{ "horizon": 4, "steps": 1 }] });
    let mut of_gists = gistnet(fixture, 4);
    of_gists.as_object_mut().unwrap().extend(short.as_object().unwrap().clone());
    mclora(&command(fixture, "gistnet", &of_gists, "gists", "cpu")).success();
    let settings = json!({
        "base": fixture.at("base"), "data": [fixture.at("data")], "gistnet": fixture.at("gists/gistnet.safetensors"),
        "history": 40, "budget": 24, "horizon": 4, "protected": 4, "holdout": 0.2, "steps": 2, "batch": 2, "seed": 7,
        "network": { "layers": 2 }, "labels": { "rounds": 2, "histories": 3 }, "preference": { "kl_weight": 0.1 },
        "validation": { "histories": 2, "test_histories": 2 }, "checkpoint": { "every": 2 },
    });
    mclora(&command(fixture, "lensnet", &settings, "cpu", "cpu")).success();
    let ran = machine.launches(&command(fixture, "lensnet", &settings, "gpu", "cuda:0"), 500);
    assert!(!ran.stderr.contains("runs on the processor"), "{}", ran.stderr);
    let (cpu, gpu) = (fixture.path("cpu"), fixture.path("gpu"));
    close_all("line", &metrics(&gpu).into(), &metrics(&cpu).into());
    close_tensors(&gpu.join("lensnet.safetensors"), &cpu.join("lensnet.safetensors"), TENSOR);
    // Plans have passes of 512 entries at least, and as many blocks of gists as are made at a time in long histories.
    planned_well(&read_json(&gpu.join("summary.json")), 6.0);
}
