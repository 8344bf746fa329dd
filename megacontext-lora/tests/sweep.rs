//! `mclora sweep` on a micro model: what it reports follows from its runs, an interrupted one ends the same, bad input.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;

use common::{Fixture, Running, mclora, read_json};
use megacontext_lora::run::summary::DocumentLoss;
use megacontext_lora::train::rank::{choose, mean_loss};
use serde_json::{Value, json};

/// `sweep` over ranks 1, 2 and 4 into the folder `out`; a checkpoint at every step.
fn sweep(fixture: &Fixture, out: &str) -> Vec<String> {
    let (base, data, out) = (fixture.at("base"), fixture.at("data"), fixture.at(out));
    #[rustfmt::skip]
    let args = [
        "sweep", "--base", &base, "--data", &data, "--out", &out, "--context", "64", "--ranks", "4,1,2", "--lr", "3e-3",
        "--warmup", "1", "--tokens-per-step", "256", "--eval-tokens", "1500", "--checkpoint-every", "1", "--threads", "1",
        "--seed", "7", "--holdout", "0.5",
    ];
    args.map(str::to_owned).to_vec()
}

fn and(mut args: Vec<String>, more: &[&str]) -> Vec<String> {
    args.extend(more.iter().map(|s| s.to_string()));
    args
}

/// A file of settings.
fn settings(fixture: &Fixture, file: &str) -> Value {
    toml::from_str(&fs::read_to_string(fixture.path(file)).unwrap()).unwrap()
}

/// What of a summary does not depend on the clock, the machine and the folder.
fn lasting(mut summary: Value) -> Value {
    for key in ["seconds", "next_command", "base", "data"] {
        summary.as_object_mut().unwrap().shift_remove(key);
    }
    for rank in summary["ranks"].as_array_mut().unwrap() {
        for key in ["seconds", "peak_bytes", "planned_bytes", "folder"] {
            rank.as_object_mut().unwrap().shift_remove(key);
        }
    }
    summary
}

#[test]
fn the_report_follows_from_the_runs_and_an_interrupted_sweep_ends_the_same() {
    let fixture = Fixture::new();
    let told = mclora(&and(sweep(&fixture, "whole"), &["--json", "--budget-steps", "14"])).success().json();

    // 14 steps for three ranks: 4 each, ascending.
    assert_eq!(told["steps"], 4);
    let ranks = told["ranks"].as_array().unwrap();
    assert_eq!(ranks.iter().map(|r| r["rank"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 4]);
    let mut losses: Vec<(usize, Vec<DocumentLoss>)> = Vec::new();
    for rank in ranks {
        let r = rank["rank"].as_u64().unwrap();
        let run = fixture.path(&format!("whole/rank-{r}"));
        let summary = read_json(&run.join("summary.json"));
        assert_eq!(rank["alpha"].as_f64().unwrap(), 2.0 * r as f64);
        // q and o 32 × 32, k and v 16 × 32, in two blocks.
        assert_eq!(rank["lora_parameters"].as_u64().unwrap(), 2 * r * (64 + 48 + 48 + 64));
        assert!(rank["parameters"].as_u64() > rank["lora_parameters"].as_u64());
        assert!(rank["seconds"].as_f64().unwrap() > 0.0 && rank["peak_bytes"].as_u64().unwrap() > 1_000_000);
        assert_eq!(summary["context"], 64);
        // Only the first run measures what all are compared with.
        assert_eq!(summary["perplexity"]["base"].as_object().unwrap().len(), usize::from(r == 1));
        let documents: Vec<DocumentLoss> =
            serde_json::from_value(summary["held_out_losses"].clone()).unwrap();
        assert!(documents.len() >= 4, "{documents:?}");
        let loss = rank["loss"].as_f64().unwrap();
        assert!((loss - mean_loss(&documents)).abs() < 1e-12);
        let told = summary["perplexity"]["adapted"]["64"].as_f64().unwrap();
        assert!((told.ln() - loss).abs() < 1e-6, "{told} {loss}");
        let adapter = read_json(&run.join("adapter/adapter_config.json"));
        assert_eq!(adapter["r"].as_u64().unwrap(), r);
        losses.push((r as usize, documents));
    }
    let borrowed: Vec<(usize, &[DocumentLoss])> = losses.iter().map(|(r, l)| (*r, &l[..])).collect();
    assert_eq!(told["choice"], serde_json::to_value(choose(&borrowed).unwrap()).unwrap());
    assert!(told["interpolated_perplexity"].as_f64().unwrap() > 1.0);
    let page = fs::read_to_string(fixture.path("whole/report.html")).unwrap();
    assert!(page.contains(&format!("Take rank {}.", told["choice"]["rank"])));
    assert_eq!(read_json(&fixture.path("whole/summary.json")), told);
    let next = settings(&fixture, "whole/extend.toml");
    assert_eq!(next["lora"]["r"], told["choice"]["rank"]);
    assert_eq!((&next["context"], &next["optimizer"]["lr"]), (&json!(64), &json!(3e-3)));
    assert_eq!((next.get("steps"), &next["out"]), (None, &json!("runs/extend")));
    assert!(told["next_command"].as_str().unwrap().ends_with("whole/extend.toml"));

    // Interrupted while the second rank trains.
    let args = and(sweep(&fixture, "broken"), &["--budget-steps", "14"]);
    let mut running = Running::start(&args, fixture.path("stderr"));
    let checkpoints = fixture.path("broken/rank-2/checkpoints");
    assert!(running.wait_until(|| checkpoints.is_dir()), "{}", running.said());
    running.signal("INT");
    let (code, _) = running.end();
    assert_eq!(code, Some(130), "{}", running.said());
    assert!(running.said().contains("sweep --resume --out"), "{}", running.said());
    assert!(fixture.path("broken/rank-1/summary.json").is_file());
    assert!(!fixture.path("broken/summary.json").exists());
    let first = fs::read(fixture.path("broken/rank-1/summary.json")).unwrap();
    let out = fixture.at("broken");
    let again = mclora(&["sweep", "--resume", "--out", &out, "--json"]).success();
    assert_eq!(lasting(again.json()), lasting(told));
    assert_eq!(
        fs::read(fixture.path("broken/rank-1/summary.json")).unwrap(),
        first,
        "a finished rank is kept"
    );
    for rank in ["rank-1", "rank-2", "rank-4"] {
        let adapter = format!("{rank}/adapter/adapter_model.safetensors");
        let read = |out: &str| fs::read(fixture.path(out).join(&adapter)).unwrap();
        assert!(read("whole") == read("broken"), "{rank}: other bytes");
    }

    // Other settings are another sweep.
    mclora(&["sweep", "--resume", "--out", &out, "--lr", "1e-4"]).refused(2, &["resume", "config.toml"]);
    mclora(&["sweep", "--resume", "--out", &out, "--ranks", "1,2"]).refused(2, &["resume", "config.toml"]);
}

#[test]
fn seconds_become_steps_before_the_first_one() {
    let fixture = Fixture::new();
    let told = mclora(&and(sweep(&fixture, "run"), &["--json", "--budget-seconds", "1e-6"]));
    assert_eq!(told.json()["error"]["kind"], "usage");
    assert!(told.stderr.contains("budget_seconds: expected at least"), "{}", told.stderr);
    assert!(!fixture.path("run").exists());
    // A micro model takes milliseconds a step: half a second is some steps, and not the default number but by accident.
    let args = and(sweep(&fixture, "run"), &["--json", "--budget-seconds", "0.5"]);
    let told = mclora(&args).success().json();
    assert!(told["steps"].as_u64().unwrap() >= 1);
    let config = settings(&fixture, "run/config.toml");
    assert_eq!(config["steps"], told["steps"]);
    assert_eq!(config["budget_seconds"], json!(0.5));
}

#[test]
fn strength_is_the_same_where_patterns_say_rank_or_alpha() {
    let fixture = Fixture::new();
    let run = |out: &str, more: &[&str]| {
        let args = common::with(sweep(&fixture, out), &[("--ranks", "1,4"), ("--budget-steps", "2")]);
        mclora(&and(args, more)).success();
        [1, 4].map(|rank| read_json(&fixture.path(&format!("{out}/rank-{rank}/adapter/adapter_config.json"))))
    };
    let ranks = run(
        "ranks",
        &["--rank-pattern", "q_proj=2", "--rank-pattern", "[a-z]+_proj=3", "--layers", "last:1"],
    );
    for adapter in ranks {
        // The first that fits counts, so their order has to last through files and calls.
        assert_eq!(adapter["rank_pattern"].to_string(), r#"{"q_proj":2,"[a-z]+_proj":3}"#);
        assert_eq!(adapter["alpha_pattern"].to_string(), r#"{"q_proj":4,"[a-z]+_proj":6}"#);
        assert_eq!(adapter["layers_to_transform"], json!([1]));
    }
    // Of rank 8 and alpha 32 where nothing else is said: strength 4.
    let [one, four] = run("alphas", &["--alpha-pattern", "q_proj=32"]);
    let strengths =
        |adapter: &Value| [&adapter["lora_alpha"], &adapter["alpha_pattern"]["q_proj"]].map(Value::as_f64);
    assert_eq!(strengths(&one), [Some(2.0), Some(4.0)]);
    assert_eq!(strengths(&four), [Some(8.0), Some(16.0)]);
}

#[test]
fn patterns_of_rank_and_of_alpha_at_once_are_refused() {
    refused(
        &["--rank-pattern", "q_proj=2", "--alpha-pattern", "q_proj=2"],
        &["lora.alpha_pattern", "lora.rank_pattern", "got both"],
    );
}

/// What a sweep is refused with before it makes its folder.
#[track_caller]
fn refused(more: &[&str], facts: &[&str]) {
    let fixture = Fixture::new();
    let args: Vec<String> = sweep(&fixture, "run");
    mclora(&and(args, more)).refused(2, facts);
    assert!(!fixture.path("run").exists());
}

#[test]
fn a_rank_of_zero_is_refused() {
    let fixture = Fixture::new();
    let args = common::with(sweep(&fixture, "run"), &[("--ranks", "0,4")]);
    mclora(&args).refused(2, &["ranks", "got 0"]);
}

#[test]
fn a_rank_named_twice_is_refused() {
    let fixture = Fixture::new();
    let args = common::with(sweep(&fixture, "run"), &[("--ranks", "4,8,4")]);
    mclora(&args).refused(2, &["ranks", "got 4 twice"]);
}

#[test]
fn a_rank_wider_than_the_model_is_refused_by_its_number() {
    let fixture = Fixture::new();
    let args = common::with(sweep(&fixture, "run"), &[("--ranks", "4,4096")]);
    mclora(&args).refused(2, &["rank 4096", "expected at most 32"]);
    assert!(!fixture.path("run").exists());
}

#[test]
fn two_budgets_are_refused() {
    refused(
        &["--budget-steps", "12", "--budget-seconds", "5"],
        &["budget_steps, budget_seconds", "got both"],
    );
}

#[test]
fn a_budget_beside_steps_is_refused() {
    refused(&["--budget-steps", "12", "--steps", "4"], &["steps, budget_steps", "got both"]);
}

#[test]
fn a_budget_beside_stages_is_refused() {
    refused(&["--budget-steps", "12", "--stages", "64:4"], &["stages, budget_steps", "got both"]);
}

#[test]
fn a_budget_of_fewer_steps_than_ranks_is_refused() {
    refused(&["--budget-steps", "2"], &["budget_steps", "at least 3", "got 2"]);
}

#[test]
fn a_strength_of_zero_is_refused() {
    refused(&["--scale", "0"], &["scale", "positive"]);
}

#[test]
fn a_single_rank_or_alpha_is_refused() {
    refused(&["--rank", "4"], &["--rank", "--ranks"]);
    refused(&["--alpha", "4"], &["--alpha", "--scale"]);
}

#[test]
fn a_folder_with_content_is_refused() {
    let fixture = Fixture::new();
    mclora(&sweep(&fixture, "data")).refused(2, &["expected an empty folder"]);
}

#[test]
fn there_must_be_a_sweep_to_resume() {
    let fixture = Fixture::new();
    let out = fixture.at("none");
    mclora(&["sweep", "--resume", "--out", &out]).refused(2, &["expected a run to resume"]);
}
