//! What of the embeddings learns, end to end: `extend` under every policy, on the micro model.
//!
//! Each run's loss falls, what its policy lets learn changes and nothing else does, and its adapter, read again, gives the
//! perplexity that the run measured. A micro model of random weights says nothing about which policy is worth what.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;

use common::{Fixture, VOCAB, mclora, numbers, read_json, text, tree, with};
use megacontext_base::tokenizer::Tokenizer;
use megacontext_lora::data::documents::load;
use megacontext_lora::data::packing::split_holdout;
use serde_json::Value;

/// Width of the micro model.
const WIDTH: usize = 32;
const EMBEDDING: &str = "model.embed_tokens.weight";
/// Carries no LoRA in these runs.
const UP: &str = "model.layers.0.mlp.up_proj.weight";
/// A run under a policy; the summary, and the base and merged model's folders.
struct Run {
    fixture: Fixture,
    summary: Value,
}

impl Run {
    /// 24 steps of one stage, norms frozen; the training loss falls by more than `margin` nats.
    fn new(policy: &str, margin: f64, more: &[&str]) -> Self {
        let fixture = Fixture::new();
        let base = tree(&fixture.path("base"));
        let flags = [("--stages", "64:24"), ("--context", "64"), ("--lr", "1e-2"), ("--embeddings", policy)];
        let mut args = with(fixture.extend("run"), &flags);
        args.extend(more.iter().chain(&["--freeze-norms", "--json"]).map(|arg| arg.to_string()));
        let summary = mclora(&args).success().json();
        assert!(tree(&fixture.path("base")) == base, "the base's files are others now");
        let (base, adapter, merged) = (fixture.at("base"), fixture.at("run/adapter"), fixture.at("merged"));
        mclora(&["merge", "--base", &base, "--adapter", &adapter, "--out", &merged]).success();
        let run = Self { fixture, summary };
        run.learns(margin);
        run.reads_back();
        run
    }

    fn learns(&self, margin: f64) {
        let stage = &self.summary["stages"][0];
        let (first, last) = (stage["first_loss"].as_f64().unwrap(), stage["last_loss"].as_f64().unwrap());
        println!("{:?}: {first:.3} to {last:.3}", self.learning());
        assert!(last < first - margin, "{first} to {last}");
        let perplexity = |model: &str| self.summary["perplexity"][model]["64"].as_f64().unwrap();
        assert!(
            perplexity("adapted").ln() < perplexity("interpolated").ln() - margin,
            "{}",
            self.summary["perplexity"]
        );
        // What carries no LoRA and is not named by the policy.
        assert!(self.rows_changed(UP).is_empty());
        assert!(self.rows_changed("model.norm.weight").is_empty());
        assert!(!self.rows_changed("model.layers.0.self_attn.q_proj.weight").is_empty());
    }

    /// The adapter, read by another process, scores what the run measured.
    fn reads_back(&self) {
        let fixture = &self.fixture;
        let (base, adapter) = (fixture.at("base"), fixture.at("run/adapter"));
        let tokens = fixture.at("tokens.json");
        std::fs::write(&tokens, "[5, 9, 2, 77, 256, 280, 299, 31, 5, 9, 2, 77]").unwrap();
        let logits = |model: &str, flags: &[&str], out: &str| {
            let out = fixture.at(out);
            let args = ["logits", "--base", model, "--tokens", &tokens, "--out", &out];
            mclora(&[&args[..], flags].concat()).success();
            numbers(out.as_ref(), "logits")
        };
        let adapted = logits(&base, &["--adapter", &adapter], "adapted.safetensors");
        let merged = logits(&fixture.at("merged"), &[], "merged.safetensors");
        let gap = adapted.iter().zip(&merged).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(adapted.len() == 12 * VOCAB && gap < 1e-4, "{gap}");
        // The documents that the run held out.
        let held_out = split_holdout(load(&[fixture.at("data")]).unwrap(), 0.1, 7).1;
        let mut args =
            vec!["eval", "ppl", "--json", "--base", &base, "--adapter", &adapter, "--contexts", "64"];
        args.extend(["--max-tokens", "4096", "--data"]);
        args.extend(held_out.iter().map(|document| document.name.as_str()));
        let again = mclora(&args).success().json()["results"][0]["perplexity"].as_f64().unwrap();
        let measured = self.summary["perplexity"]["adapted"]["64"].as_f64().unwrap();
        assert!((again / measured - 1.0).abs() < 1e-6, "{again} {measured}");
    }

    /// Rows of a weight that are not the base's in the merged model.
    fn rows_changed(&self, name: &str) -> Vec<u32> {
        let read = |model: &str| numbers(&self.fixture.path(model).join("model.safetensors"), name);
        let (base, merged) = (read("base"), read("merged"));
        assert_eq!(base.len(), merged.len());
        let pairs = base.chunks(WIDTH).zip(merged.chunks(WIDTH)).zip(0..);
        pairs.filter(|((base, merged), _)| base != merged).map(|(_, row)| row).collect()
    }

    fn learning(&self) -> Vec<&str> {
        let groups = self.summary["groups"].as_array().unwrap();
        groups.iter().filter(|g| g["trained"] == true).map(|g| g["name"].as_str().unwrap()).collect()
    }

    fn adapter(&self) -> Value {
        read_json(&self.fixture.path("run/adapter/adapter_config.json"))
    }
}

#[test]
fn frozen_embeddings_stay_as_they_were() {
    let run = Run::new("frozen", 0.08, &[]);
    assert_eq!(run.learning(), ["lora"]);
    assert!(run.rows_changed(EMBEDDING).is_empty());
}

#[test]
fn the_table_learns_in_full() {
    let run = Run::new("full", 1.0, &[]);
    assert_eq!(run.learning(), ["embeddings", "lora"]);
    // Every row of a tied table is a row of the head, which every position's loss moves.
    assert_eq!(run.rows_changed(EMBEDDING).len(), VOCAB);
    assert_eq!(run.adapter()["modules_to_save"].to_string(), r#"["embed_tokens","lm_head"]"#);
}

#[test]
fn lora_beside_the_table_learns() {
    let run = Run::new("lora", 1.0, &[]);
    assert_eq!(run.learning(), ["lora"]);
    assert_eq!(run.rows_changed(EMBEDDING).len(), VOCAB);
    let targets = run.adapter()["target_modules"].to_string();
    assert!(targets.contains("embed_tokens"), "{targets}");
    assert!(run.adapter()["modules_to_save"].is_null());
}

#[test]
fn rows_of_new_tokens_learn_and_no_others() {
    let tokenizer = Tokenizer::from_dir(&Fixture::new().path("base")).unwrap();
    let ids: BTreeSet<u32> = tokenizer.encode(&text(0)).unwrap().into_iter().take(20).collect();
    let listed = ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let run = Run::new("new-tokens", 0.5, &["--new-tokens", &listed]);
    assert_eq!(run.learning(), ["lora"]);
    assert_eq!(run.rows_changed(EMBEDDING), ids.into_iter().collect::<Vec<_>>());
}

#[test]
fn a_policy_that_other_settings_rule_out_is_no_choice_in_the_plan() {
    let fixture = Fixture::new();
    let mut args =
        with(fixture.extend("run"), &[("--stages", "64:1"), ("--context", "64"), ("--eval-tokens", "64")]);
    args.extend(["--dora", "--json"].map(str::to_owned));
    let told = mclora(&args).success();
    let plan = told.stderr.lines().find(|line| line.contains("\"plan\"")).unwrap();
    for (policy, there) in [("frozen", true), ("full", true), ("lora", false)] {
        assert_eq!(plan.contains(&format!("\"policy\":\"{policy}\"")), there, "{policy}: {plan}");
    }
}
