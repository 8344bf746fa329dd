//! The whole job on a micro model, measured: extend, evaluate, merge, compare logits.
//!
//! The base is random, so all that it can learn is the text's tokens and their neighbours: enough to see the loss fall and
//! the perplexity at the long context with it, and to hold every number that the program prints against another that was
//! computed on another way.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;

use common::{EXTENDED, Fixture, ORIGINAL, VOCAB, mclora, metrics, numbers, read_json, with};
use megacontext_lora::data::documents::load;
use megacontext_lora::data::packing::split_holdout;
use serde_json::{Value, json};

const LENGTHS: [&str; 3] = ["32", "64", "128"];

struct Run {
    fixture: Fixture,
    summary: Value,
}

impl Run {
    /// Two stages of 20 steps.
    fn new() -> Self {
        let fixture = Fixture::new();
        let mut args = with(fixture.extend("run"), &[("--stages", "64:20,128:20"), ("--lr", "5e-3")]);
        args.push("--json".into());
        let summary = mclora(&args).success().json();
        Self { fixture, summary }
    }

    /// `eval ppl --json` of the base with more flags.
    fn evaluate(&self, data: &[String], flags: &[&str]) -> Value {
        let base = self.fixture.at("base");
        let mut args =
            vec!["eval", "ppl", "--json", "--base", &base, "--contexts", "32,64,128", "--threads", "2"];
        args.extend(["--max-tokens", "4096", "--data"]);
        args.extend(data.iter().map(String::as_str));
        args.extend(flags);
        mclora(&args).success().json()
    }

    /// The files that the run held out.
    fn held_out(&self) -> Vec<String> {
        let documents = load(&[self.fixture.at("data")]).unwrap();
        split_holdout(documents, 0.1, 7).1.into_iter().map(|document| document.name).collect()
    }
}

fn perplexities(result: &Value) -> Vec<f64> {
    result["results"].as_array().unwrap().iter().map(|r| r["perplexity"].as_f64().unwrap()).collect()
}

#[track_caller]
fn close(a: f64, b: f64) {
    assert!((a / b - 1.0).abs() < 1e-6, "{a} and {b}");
}

#[test]
fn extending_a_micro_model() {
    let run = Run::new();
    let (fixture, summary) = (&run.fixture, &run.summary);
    let folder = fixture.path("run");

    // The result is the file.
    assert_eq!(*summary, read_json(&folder.join("summary.json")));
    for name in ["config.toml", "metrics.jsonl", "report.html", "adapter/adapter_config.json"] {
        assert!(folder.join(name).is_file(), "{name}");
    }
    assert!(
        fs::read_dir(&folder)
            .unwrap()
            .any(|e| { e.unwrap().file_name().to_string_lossy().starts_with("events.out.tfevents.") })
    );

    // Everything that a run has to say of itself, and that it makes sense.
    for model in ["base", "interpolated", "adapted"] {
        let lengths: Vec<&String> = summary["perplexity"][model].as_object().unwrap().keys().collect();
        assert_eq!(lengths, LENGTHS, "{model}");
    }
    assert!(summary["sparse_dense_gap"].as_f64().unwrap().abs() < 0.5);
    assert!(summary["seconds"].as_f64().unwrap() > 0.0);
    assert!(summary["peak_bytes"].as_u64().unwrap() > 1_000_000);
    assert_eq!(
        (&summary["seed"], &summary["context"], &summary["threads"]),
        (&json!(7), &json!(EXTENDED), &json!(2))
    );
    assert_eq!((&summary["steps"], &summary["base"]["context"]), (&json!(40), &json!(ORIGINAL)));

    // It learnt.
    let stages = summary["stages"].as_array().unwrap();
    assert_eq!(stages.iter().map(|s| s["context"].as_u64().unwrap()).collect::<Vec<_>>(), [64, 128]);
    assert_eq!(stages.iter().map(|s| s["factor"].as_f64().unwrap()).collect::<Vec<_>>(), [2.0, 4.0]);
    assert!(stages.iter().all(|s| s["attention"] == "s2"));
    let (first, last) = (stages[0]["first_loss"].as_f64().unwrap(), stages[1]["last_loss"].as_f64().unwrap());
    println!("loss {first:.3} to {last:.3} nats per token");
    assert!((first - (VOCAB as f64).ln()).abs() < 0.5, "a random model knows nothing: {first}");
    assert!(last < 0.85 * first, "the loss fell from {first} to {last} only");
    let at = |model: &str| summary["perplexity"][model]["128"].as_f64().unwrap();
    println!(
        "perplexity at 128: base {}, interpolated {}, adapted {}",
        at("base"),
        at("interpolated"),
        at("adapted")
    );
    assert!(at("adapted") < 0.5 * at("interpolated"), "{summary}");

    // What was frozen did not learn, what was not did.
    let trained = |name: &str| {
        summary["groups"].as_array().unwrap().iter().find(|g| g["name"] == name).unwrap()["trained"].clone()
    };
    assert_eq!(
        ["base", "embeddings", "norms", "lora"].map(trained),
        [false, true, true, true].map(Value::Bool)
    );

    // The log holds one line a step with a finite loss, and tokens add up.
    let steps: Vec<Value> = metrics(&folder).into_iter().filter(|line| line["kind"] == "train").collect();
    assert_eq!(steps.len(), 40);
    assert!(steps.iter().all(|line| line["loss"].as_f64().unwrap().is_finite()));
    assert_eq!(steps[39]["tokens"], json!(40 * 1024));
}

#[test]
fn evaluation_gives_the_numbers_of_the_summary() {
    let run = Run::new();
    let held_out = run.held_out();
    assert!(!held_out.is_empty() && held_out.len() < 12);
    let adapter = run.fixture.at("run/adapter");
    let models: [(&str, &[&str]); 3] =
        [("base", &[]), ("interpolated", &["--factor", "4"]), ("adapted", &["--adapter", &adapter])];
    for (model, flags) in models {
        let measured = perplexities(&run.evaluate(&held_out, flags));
        for (length, measured) in LENGTHS.iter().zip(&measured) {
            close(*measured, run.summary["perplexity"][model][length].as_f64().unwrap());
        }
        assert_eq!(measured, perplexities(&run.evaluate(&held_out, flags)), "{model}: twice the same");
    }
    let sparse = run.evaluate(&held_out, &["--adapter", &adapter, "--attention", "s2", "--group", "0.25"]);
    for (length, measured) in LENGTHS.iter().zip(perplexities(&sparse)) {
        close(measured, run.summary["perplexity_sparse"][length].as_f64().unwrap());
    }
}

#[test]
fn merged_model_has_the_logits_of_base_and_adapter() {
    let run = Run::new();
    let fixture = &run.fixture;
    let [base, adapter, merged] = ["base", "run/adapter", "merged"].map(|name| fixture.at(name));
    let tokens: Vec<usize> = (0..EXTENDED).map(|i| (i * 37 + 11) % VOCAB).collect();
    fs::write(fixture.path("tokens.json"), json!([tokens, tokens]).to_string()).unwrap();
    let tokens = fixture.at("tokens.json");

    let report = mclora(&[
        "merge",
        "--base",
        &base,
        "--adapter",
        &adapter,
        "--out",
        &merged,
        "--dtype",
        "f32",
        "--json",
    ])
    .success()
    .json();
    assert_eq!((&report["merged"], &report["dtype"]), (&json!(8), &json!("float32")));
    let config = read_json(&fixture.path("merged/config.json"));
    assert_eq!(config["rope_scaling"]["factor"], json!(4.0), "{config}");
    assert_eq!(config["rope_scaling"]["rope_type"], json!("linear"), "{config}");
    assert_eq!(config["max_position_embeddings"], json!(EXTENDED));
    assert!(fixture.path("merged/tokenizer.json").is_file());

    let logits = |flags: &[&str], name: &str| {
        let out = fixture.at(name);
        let args = [flags, &["--tokens", &tokens, "--out", &out, "--json"]].concat();
        let report = mclora(&[&["logits"], &args[..]].concat()).success().json();
        assert_eq!(report["shape"], json!([2, EXTENDED, VOCAB]));
        numbers(&fixture.path(name), "logits")
    };
    let of_adapter = logits(&["--base", &base, "--adapter", &adapter], "adapter.safetensors");
    let of_merged = logits(&["--base", &merged], "merged.safetensors");
    let of_base = logits(&["--base", &base], "base.safetensors");
    let apart = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    println!(
        "merged differs by {}, base by {}",
        apart(&of_merged, &of_adapter),
        apart(&of_base, &of_adapter)
    );
    assert_eq!(of_adapter.len(), 2 * EXTENDED * VOCAB);
    assert!(apart(&of_merged, &of_adapter) < 1e-4);
    assert!(apart(&of_base, &of_adapter) > 0.1, "the adapter changes something");
}

#[test]
fn json_is_one_object_also_when_it_fails() {
    let fixture = Fixture::new();
    let mut args = with(fixture.extend("run"), &[("--rank", "0")]);
    args.push("--json".into());
    let outcome = mclora(&args);
    assert_eq!(outcome.status.code(), Some(2));
    let error = &outcome.json()["error"];
    assert_eq!(error["kind"], json!("usage"));
    assert!(error["message"].as_str().unwrap().contains("rank"), "{error}");
    // Lines on stderr are JSON, too, but for the message for people.
    for line in outcome.stderr.lines().filter(|line| !line.starts_with("error: ")) {
        serde_json::from_str::<Value>(line).unwrap();
    }
}
