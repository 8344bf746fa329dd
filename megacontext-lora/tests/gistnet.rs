//! `mclora train gistnet` as a user runs it: what it leaves, what it learns, that it can be killed, what it refuses.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::kills::{Torn, at_random, resumed};
use common::{Fixture, mclora, metrics, read_json, with};
use serde_json::Value;

fn fixture() -> Fixture {
    Fixture::new()
}

/// A run over the micro model: blocks of 4 tokens, horizons of 4 and 6, passages of 32 tokens.
fn run(fixture: &Fixture, out: &str) -> Vec<String> {
    let (base, data, out) = (fixture.at("base"), fixture.at("data"), fixture.at(out));
    #[rustfmt::skip]
    let args = [
        "train", "gistnet", "--base", &base, "--data", &data, "--out", &out, "--context", "32", "--block", "4",
        "--stages", "4:8,6:8", "--passages-per-step", "3", "--spans-per-passage", "3", "--validate-every", "4",
        "--validation-passages", "6", "--test-passages", "5", "--checkpoint-every", "3", "--threads", "2", "--seed", "7",
    ];
    args.map(str::to_owned).to_vec()
}

/// What a run reached, without what depends on the clock or the machine.
fn reached(run: &Path) -> (Vec<u8>, Value, Vec<Value>) {
    let summary = read_json(&run.join("summary.json"));
    let mut metrics = metrics(run);
    for line in &mut metrics {
        line.as_object_mut().unwrap().retain(|key, _| !key.starts_with("wall_"));
    }
    (fs::read(run.join("gistnet.safetensors")).unwrap(), summary["validation"].clone(), metrics)
}

#[test]
fn a_run_leaves_a_network_numbers_and_a_page() {
    let fixture = fixture();
    let mut args = run(&fixture, "gist");
    args.push("--json".to_string());
    let summary = mclora(&args).success().json();
    let folder = fixture.path("gist");
    for file in ["gistnet.safetensors", "config.toml", "metrics.jsonl", "summary.json", "report.html"] {
        assert!(folder.join(file).is_file(), "{file}");
    }
    let keys: Vec<&String> = summary["baselines"].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["deleted", "mean", "last_token", "last_2", "last_4"]);
    assert_eq!(summary["steps"], 16);
    assert_eq!(summary["validation"]["horizon"], 6);
    // All of a block's own tokens at their own places are the block itself.
    assert!(summary["baselines"]["last_4"].as_f64().unwrap().abs() < 1e-5, "{summary}");
    assert!(summary["validation"]["sparse_delta_nll"].is_number());
    // What is shown is of text that nothing was chosen by, and every number of it can be made from its blocks.
    let test = &summary["test"];
    assert_eq!(
        (&summary["held_out_passages"], &summary["test_passages"]),
        (&Value::from(6), &Value::from(5))
    );
    assert_ne!(test["validation"]["delta_nll"], summary["validation"]["delta_nll"]);
    let blocks: Vec<f64> =
        serde_json::from_value::<Vec<Vec<f64>>>(test["blocks"]["gist"].clone()).unwrap().concat();
    assert_eq!(test["validation"]["blocks"], blocks.len());
    let mean = blocks.iter().sum::<f64>() / blocks.len() as f64;
    assert!((test["validation"]["delta_nll"].as_f64().unwrap() - mean).abs() < 1e-9);
    assert_eq!(test["table"]["rows"].as_array().unwrap().len(), 6);
    let deleted = test["baselines"]["deleted"].as_f64().unwrap();
    assert_eq!(summary["recovered"].is_null(), deleted <= 0.0, "{summary}");
    assert!(summary["peak_bytes"].as_u64().unwrap() < summary["planned_bytes"].as_u64().unwrap() * 11 / 10);
    let kinds: Vec<Value> = metrics(&folder).iter().map(|line| line["kind"].clone()).collect();
    let count = |kind: &str| kinds.iter().filter(|k| **k == kind).count();
    assert_eq!([count("gist_baselines"), count("gist_step"), count("gist_validation")], [2, 16, 4]);
    let page = fs::read_to_string(folder.join("report.html")).unwrap();
    for part in ["its last token", "diversity", "What stands for a block", "<svg"] {
        assert!(page.contains(part), "{part}");
    }
}

#[test]
fn killed_at_many_moments_it_ends_with_the_same_bytes() {
    let fixture = fixture();
    mclora(&run(&fixture, "whole")).success();
    let torn = fixture.path("torn");
    let lines =
        |kind: &str| metrics(&fixture.path("torn")).iter().filter(|line| line["kind"] == kind).count();
    let moments: [(&str, &dyn Fn() -> bool); 6] = [
        ("before anything is measured", &|| torn.join(".lock").exists()),
        ("after the baselines", &|| lines("gist_baselines") >= 1),
        ("in the first stage", &|| lines("gist_step") >= 2),
        ("after a validation", &|| lines("gist_validation") >= 1),
        ("in the second stage", &|| lines("gist_step") >= 10),
        ("after its validation", &|| lines("gist_validation") >= 3),
    ];
    let start = |out: &Path| resumed(run(&fixture, "torn"), out);
    let killed = Torn::new(&fixture, "torn", &start).at_moments(&moments);
    assert!(killed.len() >= 4, "too few kills: {killed:?}");
    same(&fixture.path("whole"), &torn);
}

#[test]
fn killed_at_random_moments_it_ends_with_the_same_bytes() {
    let fixture = fixture();
    let start = |out: &Path| resumed(run(&fixture, out.file_name().unwrap().to_str().unwrap()), out);
    at_random(&fixture, &start, &same);
}

/// Fails unless a run that was killed reached what one that was left alone did.
fn same(whole: &Path, torn: &Path) {
    let (whole, torn) = (reached(whole), reached(torn));
    for (number, (a, b)) in whole.2.iter().zip(&torn.2).enumerate() {
        assert_eq!(a, b, "line {} of metrics.jsonl", number + 1);
    }
    assert_eq!(whole.2.len(), torn.2.len(), "lines of metrics.jsonl");
    assert_eq!(whole.1, torn.1);
    assert!(whole.0 == torn.0, "gistnet.safetensors differs");
}

#[test]
fn on_the_embedded_base_gists_cost_less_than_means_and_much_less_than_deletion() {
    let fixture = fixture();
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let [base, docs, source] = ["assets/tiny-llama", "docs", "megacontext-lora"].map(|part| root.join(part));
    let out = fixture.at("gist");
    #[rustfmt::skip]
    let args = [
        "train", "gistnet", "--base", base.to_str().unwrap(), "--data", docs.to_str().unwrap(), source.to_str().unwrap(),
        "--out", &out, "--stages", "32:50", "--validate-every", "50", "--validation-passages", "24", "--seed", "1",
        "--threads", "2", "--json",
    ];
    let summary = mclora(&args).success().json();
    let of = |key: &str| summary["test"]["baselines"][key].as_f64().unwrap();
    let gist = summary["test"]["validation"]["delta_nll"].as_f64().unwrap();
    assert!(gist < 0.85 * of("deleted"), "gist {gist}, deleted {}", of("deleted"));
    assert!(gist < 0.98 * of("mean"), "gist {gist}, mean {}", of("mean"));
}

#[test]
fn a_context_too_short_for_a_block_and_its_horizon_is_refused() {
    let fixture = fixture();
    mclora(&with(run(&fixture, "out"), &[("--context", "13")]))
        .refused(2, &["context: expected at least 14 tokens", "got 13"]);
    assert!(!fixture.path("out").exists());
}

#[test]
fn a_group_too_small_for_the_horizon_is_refused() {
    let fixture = fixture();
    mclora(&with(run(&fixture, "out"), &[("--attention", "s2"), ("--group", "13")]))
        .refused(2, &["group", "at least 2·(H + 1) = 14 for H = 6, got 13"]);
    assert!(!fixture.path("out").exists());
}

#[test]
fn a_block_of_one_token_is_refused() {
    let fixture = fixture();
    mclora(&with(run(&fixture, "out"), &[("--block", "1")]))
        .refused(2, &["block: expected at least 2", "got 1"]);
}

#[test]
fn stages_that_are_none_are_refused() {
    let fixture = fixture();
    mclora(&with(run(&fixture, "out"), &[("--stages", "32")]))
        .refused(2, &["expected HORIZON:STEPS", "\"32\""]);
    mclora(&with(run(&fixture, "out"), &[("--stages", "4:0")]))
        .refused(2, &["steps: expected at least 1, got 0"]);
}

#[test]
fn text_too_short_for_a_block_is_refused() {
    let fixture = fixture();
    fs::write(fixture.path("short.txt"), "Anna reads.").unwrap();
    let short = fixture.at("short.txt");
    mclora(&with(run(&fixture, "out"), &[("--data", &short)]))
        .refused(1, &["expected a document", "of at least 14 tokens"]);
    assert!(!fixture.path("out").exists());
}

#[test]
fn other_settings_are_refused_when_a_run_goes_on() {
    let fixture = fixture();
    mclora(&run(&fixture, "out")).success();
    let mut args = with(run(&fixture, "out"), &[("--lr", "1e-4")]);
    args.push("--resume".to_string());
    mclora(&args).refused(2, &["expected a checkpoint of this configuration"]);
}

#[test]
fn a_memory_budget_that_is_too_small_is_refused_with_the_plan() {
    let fixture = fixture();
    mclora(&with(run(&fixture, "out"), &[("--memory", "2MB")]))
        .refused(1, &["the run needs about", "may use 2 MB", "What would help", "fewer passages_per_step"]);
    assert!(!fixture.path("out").exists());
}

/// `eval gist` of a run's network.
fn evaluation(fixture: &Fixture, run: &str) -> Vec<String> {
    let (base, data) = (fixture.at("base"), fixture.at("data"));
    let network = fixture.at(&format!("{run}/gistnet.safetensors"));
    #[rustfmt::skip]
    let args = [
        "eval", "gist", "--base", &base, "--network", &network, "--data", &data, "--context", "32", "--horizon", "6",
        "--passages", "5", "--sparse-group", "16", "--threads", "2",
    ];
    args.map(str::to_owned).to_vec()
}

#[test]
fn a_stored_network_is_measured_again_and_the_same() {
    let fixture = fixture();
    mclora(&run(&fixture, "gist")).success();
    let mut args = evaluation(&fixture, "gist");
    args.push("--json".to_string());
    let [first, second] = [(); 2].map(|()| mclora(&args).success().json());
    assert_eq!(first, second);
    assert!(first["validation"]["delta_nll"].as_f64().unwrap().is_finite());
    assert!(first["validation"]["sparse_delta_nll"].is_number());
    assert!(first["baselines"]["last_4"].as_f64().unwrap().abs() < 1e-5, "{first}");
    assert_eq!((&first["block"], &first["passages"]), (&Value::from(4), &Value::from(5)));
    let text = mclora(&evaluation(&fixture, "gist")).success().stdout;
    assert!(text.contains("its gist") && text.contains("ΔNLL@6"), "{text}");
}

#[test]
fn a_run_is_measured_again_on_its_test_text_and_the_same() {
    let fixture = fixture();
    let mut args = run(&fixture, "gist");
    args.push("--json".to_string());
    let summary = mclora(&args).success().json();
    let run = fixture.at("gist");
    let again = mclora(&["eval", "gist", "--run", &run, "--threads", "2", "--json"]).success().json();
    for key in ["validation", "baselines", "table", "blocks"] {
        assert_eq!(again[key], summary["test"][key], "{key}");
    }
    assert_eq!(again["recovered"], summary["recovered"]);
    let text = mclora(&["eval", "gist", "--run", &run, "--threads", "2"]).success().stdout;
    assert!(text.contains("its gist") && text.contains("gist less this"), "{text}");

    mclora(&["eval", "gist", "--run", &run, "--horizon", "4"])
        .refused(2, &["run: expected nothing but threads"]);
    for document in fs::read_dir(fixture.path("data")).unwrap() {
        let path = document.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("the", "a")).unwrap();
    }
    mclora(&["eval", "gist", "--run", &run]).refused(1, &["the test text of", "is not what it was"]);
}

#[test]
fn a_run_that_is_not_finished_is_refused() {
    let fixture = fixture();
    mclora(&run(&fixture, "gist")).success();
    fs::remove_file(fixture.path("gist/summary.json")).unwrap();
    mclora(&["eval", "gist", "--run", &fixture.at("gist")]).refused(1, &["summary.json"]);
}

#[test]
fn a_single_held_out_passage_is_refused() {
    let fixture = fixture();
    // Two documents: one is learned from, the other is one passage long.
    for name in ["long", "short"] {
        fs::create_dir_all(fixture.path("two")).unwrap();
        let text: String = common::text(1).chars().take(if name == "long" { 2000 } else { 60 }).collect();
        fs::write(fixture.path(&format!("two/{name}.txt")), text).unwrap();
    }
    let two = fixture.at("two");
    let outcomes: Vec<_> = ["1", "2", "3", "4"]
        .map(|seed| mclora(&with(run(&fixture, "out"), &[("--data", &two), ("--seed", seed)])))
        .into_iter()
        .filter(|outcome| outcome.stderr.contains("beside the one to test on"))
        .collect();
    assert!(!outcomes.is_empty());
}

#[test]
fn a_network_for_other_blocks_is_refused() {
    let fixture = fixture();
    mclora(&run(&fixture, "gist")).success();
    mclora(&with(evaluation(&fixture, "gist"), &[("--block", "8")])).refused(1, &["8", "4"]);
}

#[test]
fn a_network_of_another_base_is_refused() {
    let fixture = fixture();
    mclora(&run(&fixture, "gist")).success();
    fixture.model("other", 99);
    let other = fixture.at("other");
    mclora(&with(evaluation(&fixture, "gist"), &[("--base", &other)]))
        .refused(1, &["expected a GistNet of the base model"]);
}

#[test]
fn a_network_trained_beside_an_adapter_is_one_for_that_adapter() {
    let fixture = fixture();
    let adapter = fixture.adapter("adapted");
    let beside = ("--adapter", adapter.as_str());
    mclora(&with(run(&fixture, "gist"), &[beside, ("--stages", "4:2")])).success();
    let alone = evaluation(&fixture, "gist");
    let says = [
        "expected a GistNet that was trained beside the base model alone, got one that was trained beside the adapter ",
        "--other-adapter",
    ];
    mclora(&alone).refused(1, &says);
    for dtype in ["f32", "bf16"] {
        mclora(&with(alone.clone(), &[beside, ("--dtype", dtype)])).success();
    }
    let mut wanted = alone.clone();
    wanted.push("--other-adapter".to_string());
    mclora(&wanted).success();
    mclora(&with(run(&fixture, "plain"), &[("--stages", "4:2")])).success();
    mclora(&with(evaluation(&fixture, "plain"), &[beside]))
        .refused(1, &["got one that was trained beside the base model alone"]);
}

#[test]
fn a_network_is_measured_with_the_places_it_was_trained_with() {
    let fixture = fixture();
    fs::write(fixture.path("places.toml"), "[places]\npreset = \"original\"\n").unwrap();
    let config = fixture.at("places.toml");
    mclora(&with(run(&fixture, "gist"), &[("--config", &config), ("--stages", "4:2")])).success();
    let mut args = evaluation(&fixture, "gist");
    args.push("--json".to_string());
    let result = mclora(&args).success().json();
    assert_eq!(result["places"], serde_json::json!({ "preset": "original", "uniform": false }));
}

#[test]
fn a_file_that_is_no_network_is_refused() {
    let fixture = fixture();
    fs::create_dir(fixture.path("none")).unwrap();
    fs::write(fixture.path("none/gistnet.safetensors"), "no network").unwrap();
    let outcome = mclora(&evaluation(&fixture, "none"));
    assert!(
        !outcome.status.success() && outcome.stderr.contains("gistnet.safetensors"),
        "{}",
        outcome.stderr
    );
}

#[test]
fn a_horizon_longer_than_every_passage_is_refused() {
    let fixture = fixture();
    mclora(&run(&fixture, "gist")).success();
    mclora(&with(evaluation(&fixture, "gist"), &[("--horizon", "25")]))
        .refused(2, &["context: expected at least 33 tokens", "a horizon of 25, got 32"]);
}

#[test]
fn a_sparse_group_too_small_for_the_horizon_is_refused() {
    let fixture = fixture();
    mclora(&run(&fixture, "gist")).success();
    mclora(&with(evaluation(&fixture, "gist"), &[("--sparse-group", "13")]))
        .refused(2, &["sparse_group", "at least 2·(H + 1) = 14"]);
}
