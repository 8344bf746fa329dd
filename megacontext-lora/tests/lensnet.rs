//! `mclora train lensnet` as a user runs it: what it leaves, what it learns, that it can be killed, what it refuses.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::{Fixture, induction, mclora, metrics, read_json};
use serde_json::{Value, json};

/// A model that finds planted facts, in `induction/`, and means as gists of blocks of 32.
fn planted() -> Fixture {
    let fixture = Fixture::new();
    induction::write(&fixture.path("induction"), json!({}));
    induction::write_gistnet(&fixture.path("induction"), 32);
    fixture
}

/// A run over documents of 512 tokens, 16 blocks of which one states the answer.
fn run(fixture: &Fixture, out: &str) -> Vec<String> {
    let (base, out) = (fixture.at("induction"), fixture.at(out));
    let gistnet = fixture.at("induction/gistnet.safetensors");
    #[rustfmt::skip]
    let args = [
        "train", "lensnet", "--base", &base, "--gistnet", &gistnet, "--data", "planted:20", "--out", &out,
        "--history", "512", "--budget", "160", "--horizon", "6", "--holdout", "0.2", "--rounds", "2",
        "--label-histories", "4", "--label-edits", "4", "--steps", "3", "--batch", "2", "--checkpoint-every", "2",
        "--threads", "2", "--seed", "7",
    ];
    args.map(str::to_owned).to_vec()
}

/// The command with other values of some of its flags, or with more of them.
fn with(mut args: Vec<String>, flags: &[(&str, &str)]) -> Vec<String> {
    for (key, value) in flags {
        match args.iter().position(|arg| arg == key) {
            Some(at) => args[at + 1] = value.to_string(),
            None => args.extend([key.to_string(), value.to_string()]),
        }
    }
    args
}

/// What a run reached, without what depends on the clock or the machine.
fn reached(run: &Path) -> (Vec<u8>, Value, Vec<Value>) {
    let summary = read_json(&run.join("summary.json"));
    let mut metrics = metrics(run);
    for line in &mut metrics {
        line.as_object_mut().unwrap().retain(|key, _| !key.starts_with("wall_"));
    }
    (fs::read(run.join("lensnet.safetensors")).unwrap(), summary["validation"].clone(), metrics)
}

#[test]
fn a_run_leaves_a_network_labels_numbers_and_a_page() {
    let fixture = planted();
    let summary = mclora(&with(run(&fixture, "lens"), &[]).into_iter().chain(["--json".into()]).collect::<Vec<_>>());
    let summary = summary.success().json();
    let folder = fixture.path("lens");
    for file in [
        "lensnet.safetensors", "config.toml", "metrics.jsonl", "summary.json", "report.html", "references.json",
        "labels/round-1.jsonl", "labels/round-2.jsonl",
    ] {
        assert!(folder.join(file).is_file(), "{file}");
    }
    let keys: Vec<&String> = summary["focus_loss"].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["lensnet", "oracle", "random", "recency"]);
    assert_eq!([&summary["labels"], &summary["steps"]], [&json!(8), &json!(6)]);
    assert_eq!(summary["facts_shown"]["recency"], 0.0);
    let page = fs::read_to_string(folder.join("report.html")).unwrap();
    for part in ["Where it looked", "ranking accuracy", "oracle", "<svg"] {
        assert!(page.contains(part), "{part}");
    }
}
