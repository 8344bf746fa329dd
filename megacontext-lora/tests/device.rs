//! What models run on, as a user chooses it: names, refusals, what is said of it, and going on elsewhere.
//!
//! The default build has no CUDA. Built with it (`--features cuda`), the tests about a missing driver need a machine without one and
//! are skipped with a line elsewhere.

#![allow(clippy::unwrap_used)] // Helpers of tests, which the lint does not see as tests.

mod common;

use std::fs;

use common::{Fixture, mclora, metrics, read_json, tree, with};
use serde_json::{Value, json};

const CUDA: bool = cfg!(feature = "cuda");

/// An evaluation on a device.
fn ppl<'a>(base: &'a str, data: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["eval", "ppl", "--base", base, "--data", data, "--contexts", "32,64", "--max-tokens", "500"];
    [&args[..], more].concat()
}

/// What a GPU that is named is refused with, where there can be none.
fn no_gpu() -> Option<&'static str> {
    if !CUDA {
        return Some("expected a program built with the feature cuda for cuda:0, got one without it");
    }
    let told = mclora(&["plugin", "check", "--json"]).success().json();
    match told["no_gpu"].as_str() {
        Some(why) if why.contains("no driver") => Some("CUDA: no driver: libcuda.so.1 not found"),
        _ => {
            println!("skipped: there is a driver on this machine: {told}");
            None
        }
    }
}

#[test]
fn a_gpu_that_cannot_be_had_is_refused_before_anything_is_written() {
    let Some(why) = no_gpu() else { return };
    let fixture = Fixture::new();
    let (base, data, out) = (fixture.at("base"), fixture.at("data"), fixture.at("out"));
    let (cycle, tokens) = (fixture.at("cycle.toml"), fixture.at("tokens.json"));
    let settings = "contexts = [32]\nhorizon = 4\nbudget = 12\nprotected = 4\n[network]\nblock = 4\n";
    fs::write(&cycle, settings).unwrap();
    fs::write(&tokens, "[1, 2, 3]").unwrap();
    let before = tree(&fixture.path(""));
    let shape = ["--shape", "8,1,2,1,16,32"];
    let gist = [
        "train", "gistnet", "--block", "4", "--stages", "8:2", "--base", &base, "--data", &data, "--out",
        &out,
    ];
    let sweep = ["sweep", "--base", &base, "--data", &data, "--context", "64", "--ranks", "2", "--out", &out];
    let bench_gist = ["bench", "gist", "--n", "64", "--blocks", "1", "--block", "4", "--horizon", "4"];
    let mut commands: Vec<Vec<&str>> = vec![
        ppl(&base, &data, &["--out", &out]),
        gist.to_vec(),
        vec!["train", &cycle, "--base", &base, "--data", &data, "--out", &out],
        vec!["pretrain", "--out", &out, "--steps", "1"],
        sweep.to_vec(),
        [&["bench", "step", "--n", "16", "--steps", "1"][..], &shape].concat(),
        [&["bench", "plan", "--n", "16"][..], &shape].concat(),
        [&bench_gist[..], &shape].concat(),
        vec!["bench", "attention", "--n", "16", "--heads", "2,1", "--head-dim", "8"],
        vec!["generate", "--base", &base, "--prompt", "Anna", "--max-new-tokens", "2"],
        vec!["eval", "passkey", "--base", &base, "--lengths", "512", "--out", &out],
        vec!["logits", "--base", &base, "--tokens", &tokens, "--out", &out],
    ];
    let extend = fixture.extend("out");
    commands.push(extend.iter().map(String::as_str).collect());
    for mut args in commands {
        args.extend(["--device", "cuda:0"]);
        mclora(&args).refused(2, &["device: ", why]);
    }
    assert_eq!(tree(&fixture.path("")), before);
}

#[test]
fn a_name_of_no_device_is_refused_by_its_key() {
    let fixture = Fixture::new();
    let (base, data) = (fixture.at("base"), fixture.at("data"));
    for name in ["gpu", "cuda:x", "CPU", ""] {
        let expected = format!("error: device: expected auto, cpu, cuda or cuda:N, got {name:?}");
        let said = mclora(&ppl(&base, &data, &["--device", name])).refused(2, &[]);
        assert_eq!(said, expected);
    }
}

#[test]
fn a_command_without_a_model_takes_no_device() {
    for command in [&["merge", "--base", "b", "--adapter", "a", "--out", "o"][..], &["plugin", "check"]] {
        let args = [command, &["--device", "cpu"]].concat();
        mclora(&args)
            .refused(2, &["--device: expected none for a command that runs no passes of a model, got cpu"]);
    }
    let linear = ["bench", "linear", "--device", "cuda:0"];
    mclora(&linear).refused(2, &["--device: expected none", "got cuda:0"]);
}

#[test]
fn the_device_is_said_where_it_was_named_and_stands_in_results() {
    let fixture = Fixture::new();
    let (base, data) = (fixture.at("base"), fixture.at("data"));
    let named = mclora(&ppl(&base, &data, &["--device", "cpu"])).success();
    assert_eq!(named.stderr.lines().next(), Some("device: cpu"), "{}", named.stderr);
    let told = mclora(&ppl(&base, &data, &["--device", "cpu", "--json"])).success();
    assert_eq!(told.json()["device"], "cpu");
    let event: Value = serde_json::from_str(told.stderr.lines().next().unwrap()).unwrap();
    let expected = json!({
        "device": "cpu", "description": "cpu", "asked": "cpu", "note": null, "text": "device: cpu"
    });
    assert_eq!(event, json!({ "event": "device", "data": expected }));

    let auto = mclora(&ppl(&base, &data, &["--device", "auto"])).success();
    let silent = mclora(&ppl(&base, &data, &[])).success();
    assert_eq!((&auto.stdout, &auto.stderr), (&silent.stdout, &silent.stderr));
    if !CUDA {
        assert!(!auto.stderr.contains("device"), "{}", auto.stderr);
        assert_eq!(auto.stdout, named.stdout);
    } else if no_gpu().is_some() {
        let first = auto.stderr.lines().next().unwrap();
        assert!(first.starts_with("device: cpu (no GPU: CUDA: no driver: libcuda.so.1 not found"), "{first}");
        assert_eq!(auto.stdout, named.stdout);
    }
}

#[test]
fn a_run_says_its_device_and_goes_on_where_another_is_named() {
    let fixture = Fixture::new();
    let run = fixture.path("run");
    let args = with(fixture.extend("run"), &[("--stages", "128:2"), ("--eval-tokens", "256")]);
    mclora(&with(args, &[("--device", "cpu")])).success();
    let config = fs::read_to_string(run.join("config.toml")).unwrap();
    assert!(config.contains("device = \"cpu\""), "{config}");
    assert_eq!(read_json(&run.join("summary.json"))["device"], "cpu");
    let report = fs::read_to_string(run.join("report.html")).unwrap();
    assert!(report.contains("<dt>device</dt>"), "{report}");

    // Another name for where it runs is another setting, and no other run.
    let lines = metrics(&run).len();
    let out = fixture.at("run");
    let resumed = mclora(&["extend", "--resume", "--out", &out, "--device", "auto"]).success();
    assert!(resumed.stderr.contains("resuming after step 2 of 2"), "{}", resumed.stderr);
    assert!(metrics(&run).len() >= lines);
}

#[test]
fn an_evaluation_that_goes_on_on_another_device_says_so() {
    let fixture = Fixture::new();
    let (base, data, out) = (fixture.at("base"), fixture.at("data"), fixture.at("out"));
    let whole = mclora(&ppl(&base, &data, &["--out", &out, "--device", "cpu"])).success();
    let results = fixture.path("out/results.jsonl");
    let text = fs::read_to_string(&results).unwrap();
    assert!(text.lines().next().unwrap().contains("\"device\":\"cpu\""), "{text}");
    let other = "cuda:0 (NVIDIA H200, compute capability 9.0)";
    fs::write(&results, text.replacen("\"device\":\"cpu\"", &format!("\"device\":\"{other}\""), 1)).unwrap();
    let again = mclora(&["eval", "ppl", "--resume", "--out", &out, "--device", "cpu"]).success();
    let line = format!("begun on {other}, goes on on cpu: the result may differ a little");
    assert!(again.stderr.lines().any(|said| said == line), "{}", again.stderr);
    assert_eq!(again.stdout, whole.stdout);
    // The same device again, and nothing to say.
    fs::write(&results, text).unwrap();
    let again = mclora(&["eval", "ppl", "--resume", "--out", &out, "--device", "cpu"]).success();
    assert!(!again.stderr.contains("begun on"), "{}", again.stderr);
}

#[test]
fn capabilities_name_the_devices() {
    let told = mclora(&["plugin", "check", "--json"]).success().json();
    let names: Vec<&str> =
        told["capabilities"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert!(names.contains(&"device:cpu"), "{names:?}");
    assert_eq!(names.contains(&"built:cuda"), CUDA, "{names:?}");
    assert_eq!(told["devices"][0], json!({ "device": "cpu" }));
    let gpus = told["devices"].as_array().unwrap().len() - 1;
    assert_eq!(gpus == 0, told["no_gpu"].is_string(), "{told}");
    assert!(names.iter().filter(|name| name.starts_with("device:cuda:")).count() <= gpus, "{names:?}");
    let text = mclora(&["plugin", "check"]).success().stdout;
    if !CUDA {
        assert_eq!(told["no_gpu"], "built without the feature cuda");
        assert!(text.ends_with("GPU           none: built without the feature cuda\n"), "{text}");
    } else if no_gpu().is_some() {
        assert!(text.contains("GPU           none: CUDA: no driver: libcuda.so.1 not found"), "{text}");
    }
}
