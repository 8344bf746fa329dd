//! `extend` and `eval ppl`: what they reach, and runs that begin on one device and end on the other.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::common::{Fixture, Running, mclora, metrics, read_json, tree, with};
use crate::support::{GPU, Machine, close, close_tensors, first_line, lines, planned_well};

const LOSS: f64 = 1e-3;
const TENSOR: f32 = 1e-3;

/// From 32 to 64 tokens in two stages and three steps, a checkpoint after each.
fn extend(fixture: &Fixture, out: &str, device: &str) -> Vec<String> {
    #[rustfmt::skip]
    let flags = [
        ("--context", "64"), ("--stages", "48:1,64:2"), ("--tokens-per-step", "128"), ("--warmup", "1"),
        ("--eval-tokens", "128"), ("--eval-contexts", "64"), ("--checkpoint-every", "1"), ("--device", device),
    ];
    with(fixture.extend(out), &flags)
}

fn resume(fixture: &Fixture, out: &str, device: &str) -> Vec<String> {
    ["extend", "--resume", "--out", &fixture.at(out), "--device", device].map(str::to_owned).to_vec()
}

/// Names of files below a folder, without those that say when they were made.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = tree(folder)
        .into_keys()
        .map(|path| path.strip_prefix(folder).unwrap().display().to_string())
        .filter(|name| !name.contains("tfevents"))
        .collect();
    names.sort();
    assert!(!names.is_empty());
    names
}

/// Holds what one run reached against another's.
#[track_caller]
fn close_runs(got: &Path, expected: &Path) {
    let [got_lines, expected_lines] = [got, expected].map(metrics);
    for (kind, count) in [("train", 3), ("evaluation", 4)] {
        let (got, expected) = (lines(&got_lines, kind), lines(&expected_lines, kind));
        assert_eq!((got.len(), expected.len()), (count, count), "{kind}");
        for (number, (got, expected)) in got.iter().zip(expected).enumerate() {
            let measured = ["loss", "grad_norm", "perplexity"];
            for key in measured.into_iter().filter(|key| expected[*key].is_number()) {
                close(&format!("{kind} {number}: {key}"), &got[key], &expected[key], LOSS);
            }
            for key in ["step", "model", "context", "attention", "tokens", "lr"] {
                assert_eq!(got[key], expected[key], "{kind} {number}: {key}");
            }
        }
    }
    assert_eq!(names(got), names(expected));
    let file = "adapter/adapter_model.safetensors";
    close_tensors(&got.join(file), &expected.join(file), TENSOR);
    let file = "adapter/adapter_config.json";
    assert_eq!(fs::read_to_string(got.join(file)).unwrap(), fs::read_to_string(expected.join(file)).unwrap());
    let [got, expected] = [got, expected].map(|run| read_json(&run.join("summary.json")));
    if got["device_memory"].is_object() && got["device"] == GPU {
        planned_well(&got, 1.6);
    }
    let flat = |summary: &Value| -> BTreeMap<String, Value> {
        let models = summary["perplexity"].as_object().unwrap().iter();
        let each = models.flat_map(|(model, by)| by.as_object().unwrap().iter().map(move |of| (model, of)));
        each.map(|(model, (context, value))| (format!("{model} at {context}"), value.clone())).collect()
    };
    let (got, expected) = (flat(&got), flat(&expected));
    assert_eq!(got.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, expected) in &expected {
        close(name, &got[name], expected, LOSS);
    }
}

#[test]
fn extend_reaches_what_the_processor_does() {
    let Some(machine) = Machine::new() else { return };
    let fixture = &machine.fixture;
    let on_cpu = mclora(&extend(fixture, "cpu", "cpu")).success();
    assert_eq!(first_line(&on_cpu), "device: cpu");
    let on_gpu = machine.launches(&extend(fixture, "gpu", "cuda:0"), 150);
    assert_eq!(first_line(&on_gpu), format!("device: {GPU}"));
    let (cpu, gpu) = (fixture.path("cpu"), fixture.path("gpu"));
    assert_eq!(read_json(&cpu.join("summary.json"))["device"], "cpu");
    assert_eq!(read_json(&gpu.join("summary.json"))["device"], GPU);
    let report = fs::read_to_string(gpu.join("report.html")).unwrap();
    assert!(report.contains(GPU), "{report}");
    let config = fs::read_to_string(gpu.join("config.toml")).unwrap();
    assert!(config.contains("device = \"cuda:0\""), "{config}");
    close_runs(&gpu, &cpu);

    // The adapter that the device made, on either.
    let (base, data, adapter) = (fixture.at("base"), fixture.at("data"), fixture.at("gpu/adapter"));
    #[rustfmt::skip]
    let ppl = [
        "eval", "ppl", "--base", &base, "--adapter", &adapter, "--data", &data, "--contexts", "32,64", "--max-tokens", "150",
        "--json", "--device",
    ];
    let expected = mclora(&[&ppl[..], &["cpu"]].concat()).success().json();
    let got = machine.launches(&[&ppl[..], &["cuda:0"]].concat(), 30).json();
    assert_eq!((&expected["device"], &got["device"]), (&"cpu".into(), &GPU.into()));
    let [got, expected] = [&got, &expected].map(|told| told["results"].as_array().unwrap());
    assert_eq!((got.len(), expected.len()), (2, 2));
    for (got, expected) in got.iter().zip(expected) {
        close("perplexity", &got["perplexity"], &expected["perplexity"], LOSS);
        for key in ["context", "tokens"] {
            assert_eq!(got[key], expected[key], "{key}");
        }
    }
}

/// Kills a run after its first checkpoint of a step.
fn begin(machine: &Machine, out: &str, device: &str) {
    let fixture = &machine.fixture;
    let run = fixture.path(out);
    for _ in 0..50 {
        let command = machine.command(&extend(fixture, out, device));
        let mut running = Running::spawn(command, fixture.path("stderr"));
        let stopped = running.wait_until(|| run.join("checkpoints/00000001").exists());
        if stopped {
            running.signal("KILL");
        }
        running.end();
        // The processor may be done before it is seen.
        if stopped && !run.join("summary.json").exists() {
            return;
        }
        fs::remove_dir_all(&run).unwrap();
    }
    panic!("{device}: always done before it was stopped");
}

#[test]
fn what_began_on_one_device_goes_on_on_the_other() {
    let Some(machine) = Machine::new() else { return };
    let fixture = &machine.fixture;
    mclora(&extend(fixture, "whole", "cpu")).success();
    for (out, begins, ends, line) in [
        ("from_gpu", "cuda:0", "cpu", format!("begun on {GPU}, goes on on cpu: ")),
        ("from_cpu", "cpu", "cuda:0", format!("begun on cpu, goes on on {GPU}: ")),
    ] {
        begin(&machine, out, begins);
        // One step and an evaluation at least.
        let least = if ends == "cpu" { 0 } else { 50 };
        let resumed = machine.launches(&resume(fixture, out, ends), least);
        let said = |what: &str| resumed.stderr.lines().any(|said| said.starts_with(what));
        assert!(said(&line) && said("resuming after step "), "{}", resumed.stderr);
        assert!(!said("resuming after step 3"), "{}", resumed.stderr);
        close_runs(&fixture.path(out), &fixture.path("whole"));
    }
}
