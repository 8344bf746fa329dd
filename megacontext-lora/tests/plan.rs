//! The memory plans of `extend`, of `train gistnet` and of `train` against the peak of the real program, in the precision classes.
//!
//! What is large differs from case to case. Of `extend`: activations of all blocks; an evaluation beside a large vocabulary that
//! learns; frozen weights. Of `train gistnet`: GistNet's graph; passages that are kept; the base model, with an adapter whose
//! trained tensors are larger than the base's. Of `train`: GistNet's graph; frozen weights with both networks; embeddings that learn. Both
//! sides of the plan are held, to a tenth, of `train` to 15 %. The peak is the system's VmHWM at the end of
//! the run, as the summary has it.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Fixture, mclora, with};
use serde_json::{Value, json};

/// The plan's total and the peak, bytes.
fn planned_and_measured(name: &str, model: Value, flags: &[(&str, &str)]) -> (f64, f64) {
    let fixture = Fixture::new();
    fixture.model_of("model", 1, model);
    let base = fixture.at("model");
    let more = [
        ("--lr", "1e-4"),
        ("--checkpoint-every", "1"),
        ("--eval-tokens", "16384"),
        ("--holdout", "0.5"),
        ("--base", &base),
    ];
    let args = with(fixture.extend("run"), &more);
    let mut args = with(args, flags);
    args.push("--json".to_owned());
    let summary = mclora(&args).success().json();
    let kinds = summary["planned_bytes"].as_object().unwrap();
    let planned = kinds.values().map(|bytes| bytes.as_f64().unwrap()).sum();
    let measured = summary["peak_bytes"].as_f64().unwrap();
    println!("{name}: planned {:.0} MB, measured {:.0} MB: {kinds:?}", planned / 1e6, measured / 1e6);
    (planned, measured)
}

#[track_caller]
fn within(share: f64, (planned, measured): (f64, f64)) {
    assert!((planned / measured - 1.0).abs() < share, "planned {planned}, measured {measured}");
}

#[track_caller]
fn within_a_tenth(found: (f64, f64)) {
    within(0.1, found);
}

#[test]
fn activations_of_all_blocks_in_f32() {
    within_a_tenth(planned_and_measured(
        "activations",
        json!({ "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6 }),
        &[
            ("--context", "1024"),
            ("--stages", "1024:2"),
            ("--eval-contexts", "256"),
            ("--tokens-per-step", "4096"),
            ("--activation-checkpointing", "off"),
            ("--dtype", "f32"),
        ],
    ));
}

#[test]
fn an_evaluation_beside_a_large_vocabulary_in_mixed() {
    within_a_tenth(planned_and_measured(
        "evaluation",
        json!({ "vocab_size": 24_576, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2 }),
        &[
            ("--context", "512"),
            ("--stages", "512:3"),
            ("--eval-contexts", "512"),
            ("--tokens-per-step", "1024"),
            ("--activation-checkpointing", "on"),
            ("--dtype", "mixed"),
        ],
    ));
}

#[test]
fn frozen_weights_in_bf16() {
    within_a_tenth(planned_and_measured(
        "weights",
        json!({ "vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12 }),
        &[
            ("--context", "256"),
            ("--stages", "256:2"),
            ("--eval-contexts", "256"),
            ("--eval-tokens", "1024"),
            ("--tokens-per-step", "1024"),
            ("--activation-checkpointing", "on"),
            ("--dtype", "bf16"),
        ],
    ));
}

/// The plan's total and the peak of `train gistnet` over a model, bytes; `adapter` puts a trained one on it.
fn gistnet(name: &str, model: Value, adapter: bool, flags: &[(&str, &str)]) -> (f64, f64) {
    let fixture = Fixture::new();
    fixture.model_of("model", 1, model);
    let (base, data, out) = (fixture.at("model"), fixture.at("data"), fixture.at("gist"));
    #[rustfmt::skip]
    let args = [
        "--base", &base, "--data", &data, "--out", &out, "--block", "16", "--stages", "16:2", "--validate-every", "2",
        "--validation-passages", "4", "--threads", "2",
    ];
    let mut args: Vec<String> = args.map(str::to_owned).to_vec();
    if adapter {
        let flags =
            [("--base", base.as_str()), ("--stages", "128:1"), ("--eval-tokens", "256"), ("--lr", "1e-4")];
        mclora(&with(fixture.extend("adapted"), &flags)).success();
        args.extend(["--adapter".to_owned(), fixture.at("adapted/adapter")]);
    }
    args.insert(0, "gistnet".to_owned());
    let mut args = with(args, flags);
    args.insert(0, "train".to_owned());
    args.push("--json".to_owned());
    let summary = mclora(&args).success().json();
    let of = |key: &str| summary[key].as_f64().unwrap();
    println!(
        "{name}: planned {:.0} MB, measured {:.0} MB",
        of("planned_bytes") / 1e6,
        of("peak_bytes") / 1e6
    );
    (of("planned_bytes"), of("peak_bytes"))
}

#[test]
fn gistnets_graph_in_f32() {
    within_a_tenth(gistnet(
        "graph",
        json!({ "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3 }),
        false,
        &[("--context", "320"), ("--passages-per-step", "12"), ("--spans-per-passage", "18")],
    ));
}

#[test]
fn passages_that_are_kept_in_mixed() {
    within_a_tenth(gistnet(
        "passages",
        json!({ "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 12,
            "num_key_value_heads": 4 }),
        false,
        &[
            ("--context", "512"),
            ("--stages", "16:6"),
            ("--passages-per-step", "6"),
            ("--spans-per-passage", "4"),
            ("--dtype", "mixed"),
        ],
    ));
}

#[test]
fn a_base_with_an_adapter_in_bf16() {
    within_a_tenth(gistnet(
        "adapted",
        json!({ "vocab_size": 16_384, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8 }),
        true,
        &[
            ("--context", "128"),
            ("--passages-per-step", "2"),
            ("--spans-per-passage", "4"),
            ("--dtype", "bf16"),
        ],
    ));
}

/// The plan's total and the peak of `train` over a model, bytes: one cycle over histories of `context` tokens in a quarter of the room,
/// with `batch` labels in a step of LensNet.
fn cycle(name: &str, model: Value, [context, batch]: [usize; 2], settings: &str) -> (f64, f64) {
    let fixture = Fixture::new();
    fixture.model_of("model", 1, model);
    let file = fixture.path("cycle.toml");
    let lens = format!("{{ steps = 1, batch = {batch}, labels = {{ rounds = 1, histories = 2 }} }}");
    let common = format!(
        "contexts = [{}]\nhorizon = 16\nbudget = {}\nprotected = 16\ncycles = 1\nholdout = 0.5\nthreads = 2\n\
         warm_lensnet = {lens}\njt2 = {lens}\nvalidation = {{ histories = 2, test_histories = 2 }}\n",
        context + 16,
        context / 4,
    );
    std::fs::write(&file, common + settings).unwrap();
    let (base, data, out) = (fixture.at("model"), fixture.at("data"), fixture.at("cycle"));
    let file = file.display().to_string();
    let args = ["train", &file, "--base", &base, "--data", &data, "--out", &out, "--json"];
    let summary = mclora(&args.map(str::to_owned)).success().json();
    let of = |key: &str| summary[key].as_f64().unwrap();
    println!(
        "{name}: planned {:.0} MB, measured {:.0} MB",
        of("planned_bytes") / 1e6,
        of("peak_bytes") / 1e6
    );
    (of("planned_bytes"), of("peak_bytes"))
}

#[test]
fn a_cycle_whose_gistnet_is_large_in_f32() {
    within(
        0.15,
        cycle(
            "cycle, graph",
            json!({ "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3 }),
            [256, 1],
            r#"
                network = { block = 16, layers = 2 }
                warm_gistnet = { steps = 2, batch = 8, spans = 12 }
                jt1 = { steps = 2, batch = 8, spans = 12, whole = 1.0 }
                jt3 = { steps = 1, batch = 1 }
            "#,
        ),
    );
}

#[test]
fn a_cycle_over_a_large_base_in_bf16() {
    within(
        0.15,
        cycle(
            "cycle, weights",
            json!({ "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10 }),
            [128, 1],
            r#"
                dtype = "bf16"
                network = { block = 16, layers = 1 }
                lens = { layers = 1 }
                warm_gistnet = { steps = 1, batch = 1, spans = 2 }
                jt1 = { steps = 1, batch = 1, spans = 2, whole = 1.0 }
                jt3 = { steps = 1, batch = 1 }
            "#,
        ),
    );
}

#[test]
fn a_cycle_that_adapts_embeddings_in_mixed() {
    within(
        0.15,
        cycle(
            "cycle, embeddings",
            json!({ "vocab_size": 24_576, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2 }),
            [512, 2],
            r#"
                dtype = "mixed"
                network = { block = 16, layers = 1 }
                lens = { layers = 1 }
                warm_gistnet = { steps = 1, batch = 2, spans = 4 }
                jt1 = { steps = 1, batch = 2, spans = 4 }
                jt3 = { steps = 2, batch = 2, groups = ["lora", "embeddings", "norms"], keep_alive = 0.1 }
            "#,
        ),
    );
}
