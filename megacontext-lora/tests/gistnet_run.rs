//! The run that trains GistNet, with a host that looks on and stops it: what its stages do, what a stopped or damaged run goes
//! on with, which settings there are not.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Fixture, metrics, read_json, truncate};
use gistnet_adapter::{Expected, GistNet};
use megacontext_base::random::Random;
use megacontext_lora::error::{Kind, PluginError, Result};
use megacontext_lora::host::HostApi;
use megacontext_lora::jobs;
use serde_json::{Value, json};

type Moment = dyn Fn(&str, &Value) -> bool + Send + Sync;

/// A host that keeps what it is told, and asks to stop from the first event on that is the moment.
struct Watching {
    moment: Box<Moment>,
    stopping: AtomicBool,
    said: Mutex<Vec<String>>,
}

impl Watching {
    fn until(moment: impl Fn(&str, &Value) -> bool + Send + Sync + 'static) -> Self {
        Self { moment: Box::new(moment), stopping: AtomicBool::new(false), said: Mutex::default() }
    }

    fn on() -> Self {
        Self::until(|_, _| false)
    }

    /// Was something said that has this in it?
    fn heard(&self, part: &str) -> bool {
        self.said.lock().unwrap().iter().any(|said| said.contains(part))
    }
}

impl HostApi for Watching {
    fn event(&self, kind: &str, value: &Value) {
        if kind == "log" {
            self.said.lock().unwrap().push(value["message"].as_str().unwrap().to_string());
        }
        if (self.moment)(kind, value) {
            self.stopping.store(true, Ordering::Release);
        }
    }

    fn cancelled(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

fn after_step(step: u64) -> Watching {
    Watching::until(move |kind, value| kind == "progress" && value["step"] == step)
}

/// Blocks of 4 tokens, horizons of 4 and 6, passages of 32 tokens.
fn settings(fixture: &Fixture, out: &str) -> Value {
    json!({
        "base": fixture.path("base"), "data": [fixture.path("data")], "out": fixture.path(out), "context": 32,
        "network": { "block": 4 }, "stages": [{ "horizon": 4, "steps": 8 }, { "horizon": 6, "steps": 8 }],
        "passages_per_step": 3, "spans_per_passage": 3, "validation": { "every": 4, "passages": 6 },
        "checkpoint": { "every": 3 }, "optimizer": { "lr": 3e-3 }, "threads": 2, "seed": 7,
    })
}

/// The same with other top-level settings.
fn with(mut settings: Value, more: Value) -> Value {
    settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    settings
}

fn train(settings: &Value, host: &Watching) -> Result<Value> {
    jobs::run("train_gistnet", settings.clone(), host)
}

fn resumed(settings: &Value) -> Value {
    with(settings.clone(), json!({ "resume": true }))
}

#[track_caller]
fn refused(result: Result<Value>, kind: Kind, parts: &[&str]) -> PluginError {
    let error = result.unwrap_err();
    assert_eq!(error.kind, kind, "{error}");
    for part in parts {
        assert!(error.message.contains(part), "\"{part}\" is missing in: {error}");
    }
    error
}

/// The network's bytes, and the metrics without what depends on the clock.
fn reached(out: &Path) -> (Vec<u8>, Vec<Value>) {
    let mut metrics = metrics(out);
    for line in &mut metrics {
        line.as_object_mut().unwrap().retain(|key, _| !key.starts_with("wall_"));
    }
    (fs::read(out.join("gistnet.safetensors")).unwrap(), metrics)
}

#[track_caller]
fn same(whole: &Path, torn: &Path) {
    let (whole, torn) = (reached(whole), reached(torn));
    for (number, (a, b)) in whole.1.iter().zip(&torn.1).enumerate() {
        assert_eq!(a, b, "line {} of metrics.jsonl", number + 1);
    }
    assert_eq!(whole.1.len(), torn.1.len());
    assert!(whole.0 == torn.0, "gistnet.safetensors differs");
}

/// What the newest checkpoint knows, and its step.
fn newest(out: &Path) -> (String, Value) {
    let names = fs::read_dir(out.join("checkpoints")).unwrap();
    let name = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).max().unwrap();
    let state = read_json(&out.join("checkpoints").join(&name).join("state.json"));
    (name, state)
}

#[test]
fn stopped_in_every_place_it_goes_on_and_ends_with_the_same_bytes() {
    let fixture = Fixture::new();
    let whole = settings(&fixture, "whole");
    train(&whole, &Watching::on()).unwrap();
    let torn = settings(&fixture, "torn");
    let measuring = |horizon: u64| {
        let says = format!("could stand for a block, over {horizon} tokens");
        Watching::until(move |kind, value| {
            kind == "log" && value["message"].as_str().unwrap().contains(&says)
        })
    };
    let places = [
        ("measuring what else there is", measuring(4), "00000000", false),
        ("stepping", after_step(2), "00000002", false),
        ("validating", after_step(4), "00000004", true),
        ("stepping to where a checkpoint is", after_step(6), "00000006", false),
        ("validating at the end of a stage", after_step(8), "00000008", true),
        ("measuring for another horizon", measuring(6), "00000008", false),
        ("validating in the second stage", after_step(12), "00000012", true),
        ("validating at the end", after_step(16), "00000016", true),
    ];
    for (number, (place, host, checkpoint, due)) in places.into_iter().enumerate() {
        let settings = if number == 0 { torn.clone() } else { resumed(&torn) };
        refused(train(&settings, &host), Kind::Cancelled, &["go on with --resume"]);
        let (name, state) = newest(&fixture.path("torn"));
        assert_eq!((name.as_str(), &state["validation_due"]), (checkpoint, &json!(due)), "{place}");
    }
    train(&resumed(&torn), &Watching::on()).unwrap();
    same(&fixture.path("whole"), &fixture.path("torn"));
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_the_one_before() {
    let fixture = Fixture::new();
    train(&settings(&fixture, "whole"), &Watching::on()).unwrap();
    for file in ["trainable.safetensors", "state.json", "manifest.json"] {
        let torn = settings(&fixture, &format!("torn-{file}"));
        refused(train(&torn, &after_step(11)), Kind::Cancelled, &[]);
        let out = fixture.path(&format!("torn-{file}"));
        let (name, _) = newest(&out);
        assert_eq!(name, "00000011");
        truncate(&out.join("checkpoints").join(name).join(file), 0.5);
        let host = Watching::on();
        train(&resumed(&torn), &host).unwrap();
        assert!(host.heard("damaged checkpoint passed over") && host.heard("resuming after step 9 of 16"));
        same(&fixture.path("whole"), &out);
    }
}

#[test]
fn other_text_base_or_adapter_is_refused_when_a_run_goes_on() {
    let fixture = Fixture::new();
    let torn = settings(&fixture, "torn");
    refused(train(&torn, &after_step(5)), Kind::Cancelled, &[]);
    let before = common::tree(&fixture.path("torn"));
    let again = |more: Value| train(&with(resumed(&torn), more), &Watching::on());
    let adapter = fixture.adapter("adapted");
    refused(
        again(json!({ "adapter": adapter })),
        Kind::Usage,
        &["resume: --adapter: expected what the run began with"],
    );
    fixture.model("other", 99);
    refused(
        again(json!({ "base": fixture.path("other") })),
        Kind::Usage,
        &["resume: the base model is not what the run began with"],
    );
    fs::create_dir(fixture.path("text")).unwrap();
    for number in 20..32 {
        fs::write(fixture.path(&format!("text/{number}.txt")), common::text(number)).unwrap();
    }
    refused(
        again(json!({ "data": [fixture.path("text")] })),
        Kind::Usage,
        &["resume: the text of --data is not what the run began with"],
    );
    assert!(before == common::tree(&fixture.path("torn")), "the run folder changed");
    again(json!({})).unwrap();
}

/// How far the gists of two networks are apart, in root mean squares of the second's.
fn apart(a: &Path, b: &Path) -> f64 {
    let [a, b] = [a, b].map(|path| GistNet::load(path, Expected::default()).unwrap().network);
    let mut random = Random::new(4);
    let children: Vec<f32> = (0..16 * 4 * 32).map(|_| 0.02 * random.normal() as f32).collect();
    let [a, b] = [a, b].map(|network| network.gists(&children, 16).unwrap());
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
    (squares(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / squares(&mut b.iter().copied())).sqrt()
}

#[test]
fn stability_holds_gists_to_those_the_stage_began_with() {
    let fixture = Fixture::new();
    // One validation, at the end: the network in the file is the last one.
    let of = |out: &str, stability: f64| {
        let more = json!({
            "stages": [{ "horizon": 4, "steps": 16, "loss": { "stability": stability } }],
            "validation": { "every": 100, "passages": 6 }, "optimizer": { "lr": 1e-2, "warmup_steps": 0 },
        });
        with(settings(&fixture, out), more)
    };
    train(&of("free", 1e-9), &Watching::on()).unwrap();
    train(&of("held", 100.0), &Watching::on()).unwrap();
    let start = fixture.path("held/stage-1-start.safetensors");
    assert!(fs::read(&start).unwrap() == fs::read(fixture.path("free/stage-1-start.safetensors")).unwrap());
    let [free, held] =
        ["free", "held"].map(|run| apart(&fixture.path(run).join("gistnet.safetensors"), &start));
    assert!(held < 0.5 * free, "held {held}, free {free}");
    // Taken up in the middle of the stage, it is held to the same.
    let torn = of("torn", 100.0);
    refused(train(&torn, &after_step(7)), Kind::Cancelled, &[]);
    train(&resumed(&torn), &Watching::on()).unwrap();
    same(&fixture.path("held"), &fixture.path("torn"));
}

/// Steps of each stage, from the metrics.
fn steps_of(out: &Path) -> Vec<usize> {
    let mut steps = vec![0; 2];
    for line in metrics(out).iter().filter(|line| line["kind"] == "gist_step") {
        steps[line["stage"].as_u64().unwrap() as usize] += 1;
    }
    steps
}

#[test]
fn a_stage_whose_loss_improves_no_more_makes_way_for_the_next() {
    let fixture = Fixture::new();
    let more = json!({ "stages": [
        { "horizon": 4, "steps": 40, "patience_steps": 3, "improvement": 1.0 },
        { "horizon": 6, "steps": 5 },
    ] });
    let settings = with(settings(&fixture, "run"), more);
    let host = Watching::on();
    let summary = train(&settings, &host).unwrap();
    let [first, second] = steps_of(&fixture.path("run"))[..] else { panic!("two stages") };
    assert!((6..40).contains(&first) && second == 5, "{first} and {second} steps");
    assert!(host.heard(&format!("stage 1 ends: its loss improved no more after {first} steps")));
    assert_eq!((&summary["ended"], &summary["steps"]), (&json!("all stages are done"), &json!(first + 5)));
    assert_eq!(summary["validation"]["horizon"], 6);
    // The step that ended the stage was measured.
    let validated = |line: &Value| line["kind"] == "gist_validation" && line["step"] == first;
    assert!(metrics(&fixture.path("run")).iter().any(validated));
}

#[test]
fn a_stage_whose_validations_rise_makes_way_for_the_next() {
    let fixture = Fixture::new();
    let more = json!({
        "stages": [{ "horizon": 4, "steps": 60 }, { "horizon": 6, "steps": 60 }],
        "validation": { "every": 2, "passages": 6, "stop_after_rises": 2 },
        "optimizer": { "lr": 0.3, "warmup_steps": 0 },
    });
    let settings = with(settings(&fixture, "run"), more);
    let host = Watching::on();
    let summary = train(&settings, &host).unwrap();
    let steps = steps_of(&fixture.path("run"));
    assert!(steps.iter().all(|steps| (6..60).contains(steps)), "{steps:?}");
    for stage in 0..2 {
        let of_stage = |line: &&Value| line["kind"] == "gist_validation" && line["stage"] == stage;
        let metrics = metrics(&fixture.path("run"));
        let deltas: Vec<f64> =
            metrics.iter().filter(of_stage).map(|line| line["delta_nll"].as_f64().unwrap()).collect();
        let [.., a, b, c] = deltas[..] else { panic!("three validations at least, got {deltas:?}") };
        assert!(a < b && b < c, "{deltas:?}");
        let rising = |three: &[f64]| three[0] < three[1] && three[1] < three[2];
        assert_eq!(deltas.windows(3).filter(|three| rising(three)).count(), 1, "{deltas:?}");
    }
    assert!(host.heard("stage 1 ends: its ΔNLL@H rose 2 times in a row"));
    assert!(
        summary["ended"].as_str().unwrap().contains("the last stage ended: its ΔNLL@H rose 2 times in a row")
    );
    // Resumed at its end, it stays ended.
    let again = train(&resumed(&settings), &Watching::on()).unwrap();
    assert_eq!((&again["ended"], &again["steps"]), (&summary["ended"], &summary["steps"]));
}

#[test]
fn a_mix_learns_from_the_sources_it_names() {
    let fixture = Fixture::new();
    // Texts of one length, so that everything but their words is the same.
    let write = |folder: &str, from: u64| {
        fs::create_dir(fixture.path(folder)).unwrap();
        for number in 0..6 {
            let text = common::text(from + number);
            let cut = text.floor_char_boundary(1200);
            fs::write(fixture.path(&format!("{folder}/{number}.txt")), &text[..cut]).unwrap();
        }
    };
    write("a", 40);
    write("b", 50);
    write("c", 60);
    let of = |out: &str, data: [&str; 2], mix: [f64; 2]| {
        let more = json!({
            "data": data.map(|name| fixture.path(name)),
            "stages": [{ "horizon": 4, "steps": 6, "mix": mix }],
            "validation": { "every": 100, "passages": 6 },
        });
        train(&with(settings(&fixture, out), more), &Watching::on()).unwrap();
        reached(&fixture.path(out)).0
    };
    let from_b = of("one", ["a", "b"], [0.0, 1.0]);
    assert!(from_b == of("two", ["c", "b"], [0.0, 1.0]), "text of weight 0 was learned from");
    assert!(from_b != of("three", ["a", "c"], [0.0, 1.0]));
    assert!(from_b != of("four", ["a", "b"], [1.0, 1.0]));
}

#[test]
fn settings_of_the_validation_out_of_range_are_refused() {
    let fixture = Fixture::new();
    for (key, value, says) in [
        ("every", json!(0), "validation.every: expected at least 1, got 0"),
        ("passages", json!(0), "validation.passages: expected at least 1, got 0"),
        ("blocks", json!(0), "validation.blocks: expected at least 1, got 0"),
        ("most_gap", json!(-0.1), "validation.most_gap: expected a number of at least 0, got -0.1"),
        ("sparse_group", json!(13), "expected a group of at least 2·(H + 1) = 14"),
        ("sparse_group", json!(1.5), "expected a part of the context, 0 < group <= 1, got 1.5"),
        (
            "sparse_group",
            json!("half"),
            "expected \"auto\", \"off\", a part of the context or a number of tokens",
        ),
        ("evry", json!(4), "validation.evry: unknown field"),
    ] {
        let settings = with(settings(&fixture, "out"), json!({ "validation": { key: value } }));
        refused(train(&settings, &Watching::on()), Kind::Usage, &[says]);
        assert!(!fixture.path("out").exists());
    }
}

#[test]
fn a_context_too_small_for_a_sparse_group_leaves_the_sparse_metric_out() {
    let fixture = Fixture::new();
    let short = |out: &str, validation: Value| {
        let stages = json!([{ "horizon": 6, "steps": 2 }]);
        with(settings(&fixture, out), json!({ "context": 20, "stages": stages, "validation": validation }))
    };
    let host = Watching::on();
    let summary = train(&short("auto", json!({ "passages": 6 })), &host).unwrap();
    assert!(host.heard(
        "sparse attention is not measured: half of a passage of 20 tokens is less than the 2·(H + 1) = 14"
    ));
    assert_eq!(summary["validation"]["sparse_delta_nll"], Value::Null);
    // Asked for, it is refused; and nothing is said where nobody asked for it.
    let half = short("half", json!({ "passages": 6, "sparse_group": 0.5 }));
    refused(train(&half, &Watching::on()), Kind::Usage, &["validation.sparse_group", "got 10"]);
    for off in [json!("off"), Value::Null] {
        let settings = short(&format!("off{off}"), json!({ "passages": 6, "sparse_group": off }));
        let host = Watching::on();
        train(&settings, &host).unwrap();
        assert!(!host.heard("sparse attention"));
        train(&resumed(&settings), &Watching::on()).unwrap();
    }
}

#[test]
fn spans_of_the_second_level_without_room_for_them_are_refused_or_told() {
    let fixture = Fixture::new();
    let of = |out: &str, context: u64| {
        let stages = json!([{ "horizon": 4, "steps": 2, "level2": 0.5 }]);
        with(settings(&fixture, out), json!({ "context": context, "stages": stages }))
    };
    refused(
        train(&of("none", 35), &Watching::on()),
        Kind::Usage,
        &["stages, number 1: level2: expected passages of at least 36 tokens", "got at most 35"],
    );
    assert!(!fixture.path("none").exists());
    fs::write(fixture.path("data/short.txt"), "Anna reads the letter in the garden.").unwrap();
    let host = Watching::on();
    train(&of("some", 36), &host).unwrap();
    assert!(
        host.heard("warning: stage 1: ")
            && host.heard("have the 36 tokens that a span of the second level takes")
    );
}
