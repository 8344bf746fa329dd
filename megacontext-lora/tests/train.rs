//! Alternating optimisation as a host and a user run it: what a run leaves, what it learns, how phases are kept and undone, that it
//! can be stopped and killed anywhere, what it refuses.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use common::kills::{Torn, at_random, resumed as taken_up};
use common::{Fixture, mclora, metrics, numbers, read_json};
use megacontext_lora::error::{Kind, PluginError};
use megacontext_lora::host::{Answer, HostApi};
use megacontext_lora::jobs;
use serde_json::{Value, json};

/// One cycle over histories of 40 tokens in 24 entries, gists of 4.
fn settings(fixture: &Fixture, out: &str) -> Value {
    json!({
        "base": fixture.at("base"), "data": [fixture.at("data")], "out": fixture.at(out), "contexts": [44], "horizon": 4,
        "budget": 24, "protected": 4, "holdout": 0.2, "seed": 7, "threads": 2, "cycles": 1,
        "network": { "block": 4, "layers": 1 }, "lens": { "layers": 1 },
        "lora": { "r": 2 },
        "warm_gistnet": { "steps": 8, "batch": 2, "spans": 3 },
        "warm_lensnet": { "steps": 5, "batch": 2, "labels": { "rounds": 1, "histories": 6 } },
        "jt1": { "steps": 6, "batch": 2, "spans": 3 },
        "jt2": { "steps": 4, "batch": 2, "labels": { "rounds": 2, "histories": 5 } },
        "jt3": { "steps": 6, "batch": 2, "teacher": 0.2 },
        "judge": { "tolerance": 1.0, "full_tolerance": 1.0 },
        "validation": { "histories": 6, "test_histories": 6, "spans": 3, "sparse_group": 12 },
        "checkpoint": { "every": 3 },
    })
}

/// Sets what stands under a path of keys.
fn set(mut settings: Value, path: &str, value: Value) -> Value {
    let pointer = format!("/{}", path.replace('.', "/"));
    match settings.pointer_mut(&pointer) {
        Some(place) => *place = value,
        None => {
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            settings.pointer_mut(parent).unwrap()[key] = value;
        }
    }
    settings
}

/// A host that hears everything and gives prepared answers.
#[derive(Default)]
struct Watching {
    heard: Mutex<Vec<(String, Value)>>,
    /// Phase, and what is answered when it is entered or left.
    entered: Option<(&'static str, Answer)>,
    left: Option<(&'static str, Answer)>,
    /// Kind of a moment, how many of them pass, and what is answered to the next.
    hook: Option<(&'static str, usize, Answer)>,
    /// Asks to stop at the n-th event of a kind.
    stop_at: Option<(&'static str, usize)>,
    stopped: AtomicBool,
}

impl HostApi for Watching {
    fn event(&self, kind: &str, value: &Value) {
        let mut heard = self.heard.lock().unwrap();
        heard.push((kind.to_string(), value.clone()));
        if let Some((stop, count)) = self.stop_at
            && heard.iter().filter(|(kind, _)| kind == stop).count() >= count
        {
            self.stopped.store(true, Ordering::Relaxed);
        }
    }

    fn cancelled(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    fn phase_entered(&self, value: &Value) -> Answer {
        self.heard.lock().unwrap().push(("entered".to_string(), value.clone()));
        match self.entered {
            Some((phase, answer)) if value["phase"] == phase => answer,
            _ => Answer::Continue,
        }
    }

    fn hook(&self, kind: &str, value: &Value) -> Answer {
        let mut heard = self.heard.lock().unwrap();
        heard.push((format!("hook {kind}"), value.clone()));
        let count = heard.iter().filter(|(other, _)| *other == format!("hook {kind}")).count();
        match self.hook {
            Some((asked, pass, answer)) if asked == kind && count == pass + 1 => answer,
            _ => Answer::Continue,
        }
    }

    fn phase_left(&self, value: &Value) -> Answer {
        self.heard.lock().unwrap().push(("left".to_string(), value.clone()));
        match self.left {
            Some((phase, answer)) if value["phase"] == phase => answer,
            _ => Answer::Continue,
        }
    }
}

impl Watching {
    /// What was heard of a kind.
    fn all(&self, kind: &str) -> Vec<Value> {
        let heard = self.heard.lock().unwrap();
        heard.iter().filter(|(other, _)| other == kind).map(|(_, value)| value.clone()).collect()
    }
}

fn run(settings: &Value, host: &Watching) -> Result<Value, PluginError> {
    jobs::run("train", settings.clone(), host)
}

fn resumed(settings: &Value) -> Value {
    set(settings.clone(), "resume", json!(true))
}

/// Every file that a run ends with, without what depends on the clock, the folder or the machine.
fn reached(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> =
        ["gistnet.safetensors", "lensnet.safetensors", "adapter/adapter_model.safetensors"]
            .into_iter()
            .chain(["labels/round-1.jsonl", "labels/round-2.jsonl", "labels/round-3.jsonl"])
            .map(|name| (name.to_string(), fs::read(folder.join(name)).unwrap()))
            .collect();
    let mut lines = metrics(folder);
    for line in &mut lines {
        line.as_object_mut().unwrap().retain(|key, _| !key.starts_with("wall_"));
    }
    for (number, line) in lines.iter().enumerate() {
        files.push((format!("line {} of metrics.jsonl", number + 1), line.to_string().into_bytes()));
    }
    let mut summary = read_json(&folder.join("summary.json"));
    for key in ["seconds", "peak_bytes", "planned_bytes", "adapter", "gistnet", "lensnet"] {
        summary.as_object_mut().unwrap().remove(key);
    }
    files.push(("summary.json".to_string(), summary.to_string().into_bytes()));
    files
}

fn assert_same(whole: &[(String, Vec<u8>)], torn: &[(String, Vec<u8>)]) {
    assert_eq!(whole.len(), torn.len());
    for ((name, a), (_, b)) in whole.iter().zip(torn) {
        assert!(a == b, "{name}: {} and {}", String::from_utf8_lossy(a), String::from_utf8_lossy(b));
    }
}

#[test]
fn a_cycle_leaves_an_adapter_both_networks_and_a_page() {
    let fixture = Fixture::new();
    let host = Watching::default();
    let summary = run(&settings(&fixture, "cycle"), &host).unwrap();
    let folder = fixture.path("cycle");
    for file in [
        "gistnet.safetensors",
        "lensnet.safetensors",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "config.toml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "labels/round-1.jsonl",
        "labels/round-1.parquet",
        "labels/round-3.parquet",
    ] {
        assert!(folder.join(file).is_file(), "{file}");
    }
    let kinds: Vec<&str> =
        summary["phases"].as_array().unwrap().iter().map(|phase| phase["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["warm_gistnet", "warm_lensnet", "jt1", "jt2", "jt3"]);
    assert_eq!(summary["steps"], 8 + 5 + 6 + 2 * 4 + 6);
    // Gists were made anew twice.
    assert_eq!(host.all("labels_stale").len(), 2);
    assert_eq!(summary["gist_version"], summary["phases"][0]["gist_version"].as_u64().unwrap() + 1);
    for key in ["gist", "deleted", "mean", "last_token"] {
        assert!(summary["delta_nll"][key].as_f64().unwrap().is_finite(), "{key}");
    }
    let loss = |policy: &str| summary["focus_loss"][policy].as_f64().unwrap();
    assert!(loss("oracle") < loss("random"), "{}", summary["focus_loss"]);
    assert_eq!(loss("lensnet"), summary["test"]["loss_at_h"].as_f64().unwrap());
    assert!(summary["test"]["sparse_dense_gap"].is_f64());
    // Each phase was entered and left once, and told what it trains.
    let groups: Vec<Value> = host.all("entered").iter().map(|phase| phase["groups"].clone()).collect();
    assert_eq!(
        groups,
        [json!(["gistnet"]), json!(["lensnet"]), json!(["gistnet"]), json!(["lensnet"]), json!(["lora"])]
    );
    assert_eq!(host.all("left").len(), 5);
    let [peak, planned] = ["peak_bytes", "planned_bytes"].map(|key| summary[key].as_u64().unwrap());
    // The process holds other tests' memory too.
    assert!(peak > 0 && planned > 0);
    let page = fs::read_to_string(folder.join("report.html")).unwrap();
    for part in ["What each phase changed", "cycle 1, JT3, LoRA", "whole history", "<svg"] {
        assert!(page.contains(part), "{part}");
    }
    // What was written goes together: the networks are those of this adapter.
    let (base, adapter) = (fixture.at("base"), fixture.at("cycle/adapter"));
    let network = fixture.at("cycle/gistnet.safetensors");
    let data = fixture.at("data");
    #[rustfmt::skip]
    let args = [
        "eval", "gist", "--base", &base, "--adapter", &adapter, "--network", &network, "--data", &data, "--context", "44",
        "--horizon", "4", "--json",
    ];
    mclora(&args).success();
}

#[test]
fn stopped_at_every_kind_of_moment_it_ends_with_the_same_bytes() {
    let fixture = Fixture::new();
    run(&settings(&fixture, "whole"), &Watching::default()).unwrap();
    let whole = reached(&fixture.path("whole"));
    let torn = settings(&fixture, "torn");
    // One after another: at the first event of each kind, and in the middle of labels and steps.
    let moments =
        [("log", 1), ("progress", 3), ("evaluation", 1), ("progress", 4), ("checkpoint", 2), ("progress", 9)];
    let mut begun = false;
    let mut stops = 0;
    for at in moments.into_iter().cycle().take(18) {
        let host = Watching { stop_at: Some(at), ..Watching::default() };
        let settings = if begun { resumed(&torn) } else { torn.clone() };
        match run(&settings, &host) {
            Ok(_) => break,
            Err(error) => {
                assert_eq!(error.kind, Kind::Cancelled, "{error}");
                stops += 1;
            }
        }
        begun = true;
    }
    assert!(stops >= 6, "{stops} stops");
    run(&resumed(&torn), &Watching::default()).ok();
    assert_same(&whole, &reached(&fixture.path("torn")));
}

#[test]
fn a_host_can_drive_it_a_few_steps_at_a_time() {
    let fixture = Fixture::new();
    run(&settings(&fixture, "whole"), &Watching::default()).unwrap();
    let driven = set(settings(&fixture, "driven"), "pause_after", json!(7));
    let mut calls = 1;
    let mut outcome = run(&driven, &Watching::default());
    while let Err(error) = outcome {
        assert_eq!(error.kind, Kind::Cancelled, "{error}");
        calls += 1;
        outcome = run(&resumed(&driven), &Watching::default());
    }
    assert_eq!(calls, 5, "33 steps by 7");
    assert_same(&reached(&fixture.path("whole")), &reached(&fixture.path("driven")));
}

#[test]
fn killed_at_many_moments_it_ends_with_the_same_bytes() {
    let fixture = Fixture::new();
    run(&settings(&fixture, "whole"), &Watching::default()).unwrap();
    let whole = reached(&fixture.path("whole"));
    let config = fixture.at("cycle.toml");
    let mut file = settings(&fixture, "torn");
    file.as_object_mut().unwrap().remove("threads");
    fs::write(&config, toml::to_string(&file).unwrap()).unwrap();
    let torn = fixture.path("torn");
    let steps =
        |phase: &str| metrics(&fixture.path("torn")).iter().filter(|line| line["phase"] == phase).count();
    let phases = || metrics(&fixture.path("torn")).iter().filter(|line| line["kind"] == "phase").count();
    let labels = |round: usize| {
        let path = torn.join(format!("labels/round-{round}.jsonl"));
        fs::read_to_string(path).map_or(0, |text| text.lines().count())
    };
    let moments: [(&str, &dyn Fn() -> bool); 8] = [
        ("before anything is measured", &|| torn.join(".lock").exists()),
        ("in the warm start of GistNet", &|| steps("warm_gistnet") >= 5),
        ("between phases", &|| phases() >= 1),
        ("while labels are made", &|| labels(1) >= 3),
        ("in JT1", &|| steps("jt1") >= 4),
        ("while labels are made anew", &|| labels(3) >= 2),
        ("in JT3", &|| steps("jt3") >= 2),
        ("after the last phase", &|| phases() >= 5),
    ];
    let start = start(&fixture, &config);
    let killed = Torn::new(&fixture, "torn", &start).at_moments(&moments);
    assert!(killed.len() >= 4, "too few kills: {killed:?}");
    assert_same(&whole, &reached(&torn));
}

/// The command of a run with settings from a file, taken up where it was begun.
fn start<'f>(fixture: &'f Fixture, config: &'f str) -> impl Fn(&Path) -> Command + 'f {
    move |out| {
        let out_flag = fixture.at(out.file_name().unwrap().to_str().unwrap());
        taken_up(["train", config, "--threads", "2", "--out", &out_flag].map(str::to_owned).to_vec(), out)
    }
}

#[test]
fn killed_at_random_moments_it_ends_with_the_same_bytes() {
    let fixture = Fixture::new();
    let config = fixture.at("cycle.toml");
    let mut file = settings(&fixture, "any");
    file.as_object_mut().unwrap().remove("threads");
    fs::write(&config, toml::to_string(&file).unwrap()).unwrap();
    let same = |whole: &Path, torn: &Path| assert_same(&reached(whole), &reached(torn));
    at_random(&fixture, &start(&fixture, &config), &same);
}

#[test]
fn a_phase_that_makes_it_worse_is_undone() {
    let fixture = Fixture::new();
    let wild = set(settings(&fixture, "wild"), "jt3.optimizer", json!({ "lr": 3.0, "warmup_steps": 1 }));
    let wild = set(set(wild, "judge.tolerance", json!(0.0)), "jt3.teacher", json!(0.0));
    let host = Watching::default();
    let summary = run(&wild, &host).unwrap();
    let phase = &summary["phases"][4];
    assert_ne!(phase["verdict"]["kind"], "kept", "{phase}");
    let told = host.all("left").pop().unwrap();
    assert_eq!([&told["phase"], &told["kept"]], [&json!("jt3"), &json!(false)]);
    // LoRA is as it began: B is 0.
    let adapter = fixture.path("wild/adapter/adapter_model.safetensors");
    let bytes = fs::read(&adapter).unwrap();
    let all = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let factors: Vec<&str> = all.names().into_iter().filter(|name| name.contains("lora_B")).collect();
    assert!(!factors.is_empty());
    for name in factors {
        assert!(numbers(&adapter, name).iter().all(|v| *v == 0.0), "{name}");
    }
    // And what came to before it is what it ends with.
    let other = set(settings(&fixture, "other"), "jt3.steps", json!(0));
    let other = run(&set(other, "judge.tolerance", json!(0.0)), &Watching::default()).unwrap();
    assert_eq!(summary["test"]["losses"], other["test"]["losses"]);
    assert_eq!(summary["gist_version"], other["gist_version"]);
}

#[test]
fn a_step_that_is_not_finite_undoes_its_phase_and_says_so() {
    let fixture = Fixture::new();
    let wild = set(settings(&fixture, "wild"), "jt3.optimizer", json!({ "lr": 1e30, "warmup_steps": 1 }));
    let wild = set(wild, "jt3.teacher", json!(0.0));
    let host = Watching::default();
    let summary = run(&wild, &host).unwrap();
    let verdict = &summary["phases"][4]["verdict"];
    assert_eq!(verdict["kind"], "not_finite", "{verdict}");
    assert!(verdict["message"].as_str().unwrap().contains("finite"), "{verdict}");
    let said = host.all("phase").pop().unwrap()["text"].as_str().unwrap().to_string();
    assert!(said.contains("JT3") && said.contains("rolled back"), "{said}");
    assert!(summary["test"]["loss_at_h"].as_f64().unwrap().is_finite());
}

#[test]
fn a_host_undoes_leaves_out_and_stops_phases() {
    let fixture = Fixture::new();
    let host = Watching {
        left: Some(("jt1", Answer::RollBack)),
        entered: Some(("jt3", Answer::RollBack)),
        ..Watching::default()
    };
    let summary = run(&settings(&fixture, "told"), &host).unwrap();
    let kinds: Vec<&Value> =
        summary["phases"].as_array().unwrap().iter().map(|phase| &phase["kind"]).collect();
    assert_eq!(kinds, ["warm_gistnet", "warm_lensnet", "jt1", "jt2"]);
    assert_eq!(summary["phases"][2]["verdict"]["kind"], "host");
    assert_eq!(summary["gist_version"], summary["phases"][0]["gist_version"]);

    let stopping = Watching { left: Some(("jt2", Answer::Stop)), ..Watching::default() };
    let stopped = settings(&fixture, "stopped");
    let error = run(&stopped, &stopping).unwrap_err();
    assert_eq!(error.kind, Kind::Cancelled);
    assert!(error.message.contains("JT2"), "{error}");
    // The phase itself is kept: only the next ones are left.
    let host = Watching::default();
    run(&resumed(&stopped), &host).unwrap();
    assert_eq!(host.all("entered").len(), 1);
}

#[test]
fn a_host_answers_at_every_moment() {
    let fixture = Fixture::new();
    let host = Watching::default();
    run(&settings(&fixture, "heard"), &host).unwrap();
    let counts = ["phase_entering", "step", "evaluation", "labels_stale"]
        .map(|kind| host.all(&format!("hook {kind}")).len());
    assert_eq!(counts, [5, 33, 5, 2]);
    assert!(!host.all("hook checkpoint").is_empty());
    // The third step of the first phase undoes it; the stale labels of JT1 undo that; JT2 is left out.
    let cases = [
        ("undone", "step", 2, 0, "warm_gistnet"),
        ("stale", "labels_stale", 1, 2, "jt1"),
        ("measured", "evaluation", 3, 3, "jt2"),
    ];
    for (out, kind, pass, phase, name) in cases {
        let host = Watching { hook: Some((kind, pass, Answer::RollBack)), ..Watching::default() };
        let summary = run(&settings(&fixture, out), &host).unwrap();
        let found = &summary["phases"][phase];
        assert_eq!([&found["kind"], &found["verdict"]["kind"]], [&json!(name), &json!("host")], "{kind}");
    }
    let host = Watching { hook: Some(("phase_entering", 3, Answer::RollBack)), ..Watching::default() };
    let summary = run(&settings(&fixture, "left"), &host).unwrap();
    assert_eq!(summary["phases"][3]["kind"], "jt3");
    for (out, kind) in [("a", "phase_entering"), ("b", "step"), ("c", "evaluation"), ("d", "checkpoint")] {
        let host = Watching { hook: Some((kind, 1, Answer::Stop)), ..Watching::default() };
        let stopped = settings(&fixture, out);
        assert_eq!(run(&stopped, &host).unwrap_err().kind, Kind::Cancelled, "{kind}");
        run(&resumed(&stopped), &Watching::default()).unwrap();
        assert_same(&reached(&fixture.path("heard")), &reached(&fixture.path(out)));
    }
}

#[test]
fn contexts_rise_between_cycles_and_ablations_begin_from_the_start() {
    let fixture = Fixture::new();
    let mut long = settings(&fixture, "long");
    long["cycles"] = json!(2);
    long["contexts"] = json!([44, 68]);
    long["ablation"] = json!(true);
    long["jt3"]["groups"] = json!(["lora", "embeddings", "norms", "sigma"]);
    long["jt3"]["teacher"] = json!(0.0);
    long["judge"]["plateau"] = json!(0.0);
    let summary = run(&long, &Watching::default()).unwrap();
    let phases = summary["phases"].as_array().unwrap();
    assert_eq!(phases.len(), 2 + 2 * 3 + 2 * (1 + 2 * 2) + 2 * 2);
    let contexts: Vec<u64> = phases.iter().take(8).map(|phase| phase["context"].as_u64().unwrap()).collect();
    assert_eq!(contexts, [44, 44, 44, 44, 44, 68, 68, 68]);
    // Between cycles of another length nothing is compared.
    assert!(summary["test_change"].is_null());
    let frozen: Vec<&Value> =
        summary["ablation"].as_array().unwrap().iter().map(|pass| &pass["without"]).collect();
    assert_eq!(frozen, ["gistnet", "lensnet", "lora"]);
    // The first phases of two passes that do the same came to the same.
    let first = |without: &str, kind: &str| {
        let found = phases.iter().find(|phase| phase["without"] == without && phase["kind"] == kind);
        found.unwrap()["after"]["losses"].clone()
    };
    let own = |kind: &str| {
        let found = phases.iter().find(|phase| phase["without"].is_null() && phase["kind"] == kind);
        found.unwrap()["after"]["losses"].clone()
    };
    assert_eq!(first("lensnet", "jt1").as_array().unwrap().len(), own("jt1").as_array().unwrap().len());
    assert_eq!(first("lensnet", "warm_gistnet"), own("warm_gistnet"));
    assert_ne!(first("gistnet", "jt2"), own("jt2"));
    // LoRA's pass goes on from the warm start, the others from the modules as they began.
    let before = |without: Value, kind: &str| {
        let of = |phase: &&Value| phase["without"] == without && phase["kind"] == kind;
        phases.iter().find(of).unwrap()["before"]["losses"].clone()
    };
    assert_eq!(before(json!("lora"), "jt1"), before(Value::Null, "jt1"));
    assert_eq!(before(json!("gistnet"), "warm_lensnet"), before(Value::Null, "warm_gistnet"));
    for pass in summary["ablation"].as_array().unwrap() {
        let [test, own] = [&pass["test"], &summary["test"]].map(|of| of["loss_at_h"].as_f64().unwrap());
        assert!((pass["change"]["mean"].as_f64().unwrap() - (test - own)).abs() < 1e-9, "{pass}");
    }
    // What learned with LoRA is in the adapter.
    let text = fs::read_to_string(fixture.path("long/adapter/adapter_config.json")).unwrap();
    for part in ["embed_tokens", "norm", "sigma_scales"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn it_goes_on_from_an_adapter_and_networks_of_another_run() {
    let fixture = Fixture::new();
    let first = settings(&fixture, "first");
    run(&first, &Watching::default()).unwrap();
    let mut second = settings(&fixture, "second");
    second.as_object_mut().unwrap().remove("lora");
    second["adapter"] = json!(fixture.at("first/adapter"));
    second["gistnet"] = json!(fixture.at("first/gistnet.safetensors"));
    second["lensnet"] = json!(fixture.at("first/lensnet.safetensors"));
    second["warm_gistnet"]["steps"] = json!(0);
    second["warm_lensnet"]["steps"] = json!(0);
    let summary = run(&second, &Watching::default()).unwrap();
    let before = summary["test_before"]["losses"].clone();
    assert_eq!(before, read_json(&fixture.path("first/summary.json"))["test"]["losses"]);
}

#[test]
fn the_plan_is_told_and_nothing_is_written() {
    let fixture = Fixture::new();
    let plan = run(&set(settings(&fixture, "none"), "plan_only", json!(true)), &Watching::default()).unwrap();
    assert!(plan["total"].as_u64().unwrap() > 0);
    assert_eq!(plan["phases"].as_array().unwrap().len(), 5);
    let text = plan["text"].as_str().unwrap();
    assert!(text.contains("jt3") && text.contains("labels about"), "{text}");
    assert!(!fixture.path("none").exists());
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_written() {
    let fixture = Fixture::new();
    let plain = settings(&fixture, "refused");
    let cases = [
        ("contexts", json!([68, 44]), "contexts: expected lengths that never fall, got [68, 44]"),
        ("contexts", json!([12]), "contexts: expected 16 to"),
        ("contexts", json!([100_000]), "got none; longer or more documents help"),
        ("budget", json!(3), "budget: expected room for the 4 protected tokens at least, got 3"),
        ("horizon", json!(0), "horizon: expected at least 1, got 0"),
        ("jt1.batch", json!(0), "jt1.batch: expected at least 1, got 0"),
        ("jt1.whole", json!(1.5), "jt1.whole: expected a share from 0 to 1, got 1.5"),
        ("jt2.labels.explore", json!(2.0), "jt2.labels.explore: expected a share from 0 to 1, got 2"),
        (
            "jt3.groups",
            json!(["base", "lora"]),
            "jt3.groups: expected lora, embeddings, norms or sigma, got base",
        ),
        ("jt3.groups", json!(["norms"]), "jt3.groups: expected lora among them"),
        ("jt3.groups", json!(["lora", "embeddings"]), "jt3.teacher: expected 0 where the embeddings learn"),
        ("jt3.optimizer", json!({ "lr": -1.0 }), "jt3.optimizer.lr: expected a positive number, got -1"),
        ("judge.tolerance", json!(-0.1), "judge.tolerance: expected a number of at least 0, got -0.1"),
        ("cycles", json!(-1), "cycles: "),
        ("adapter", json!("nowhere"), "nowhere"),
        ("gistnet", json!("nowhere.safetensors"), "nowhere.safetensors"),
        ("memory_budget_bytes", json!(1_000_000), "the run needs about"),
    ];
    for (path, value, says) in cases {
        let error = run(&set(plain.clone(), path, value), &Watching::default()).unwrap_err();
        assert!(error.message.contains(says), "{path}: {error}");
        assert!(!fixture.path("refused").exists(), "{path}");
    }
}

#[test]
fn another_text_or_adapter_is_refused_on_resume() {
    let fixture = Fixture::new();
    let paused = set(settings(&fixture, "paused"), "pause_after", json!(5));
    assert_eq!(run(&paused, &Watching::default()).unwrap_err().kind, Kind::Cancelled);
    let other = set(resumed(&paused), "seed", json!(8));
    let error = run(&other, &Watching::default()).unwrap_err();
    assert!(error.message.contains("of this configuration"), "{error}");
    fs::write(fixture.path("data/new.txt"), common::text(77)).unwrap();
    let error = run(&resumed(&paused), &Watching::default()).unwrap_err();
    assert!(error.message.contains("the text of --data is not what the run began with"), "{error}");
}
