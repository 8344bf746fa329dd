//! A run that is killed, interrupted or damaged ends with the bytes of a run that was left alone.
//!
//! The program is really killed (SIGKILL) while it evaluates, trains, writes checkpoints and writes the adapter, and taken
//! up again with `--resume` until it is done.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::kills::{Torn, at_random, resumed};
use common::{Fixture, Running, finish, mclora, metrics, read_json};
use serde_json::Value;

/// What the run reached, without what depends on the clock or the machine.
#[derive(Debug, PartialEq)]
struct Reached {
    adapter: Vec<u8>,
    adapter_config: String,
    perplexities: Vec<Value>,
    stages: Vec<(Value, Value)>,
    metrics: Vec<Value>,
}

impl Reached {
    fn of(run: &Path) -> Self {
        let summary = read_json(&run.join("summary.json"));
        let keys = ["perplexity", "perplexity_sparse", "sparse_dense_gap", "evaluated_tokens", "steps"];
        let stages = summary["stages"].as_array().unwrap();
        let mut metrics = metrics(run);
        for line in &mut metrics {
            line.as_object_mut().unwrap().retain(|key, _| !key.starts_with("wall_"));
        }
        assert!(run.join("report.html").is_file());
        Self {
            adapter: fs::read(run.join("adapter/adapter_model.safetensors")).unwrap(),
            adapter_config: fs::read_to_string(run.join("adapter/adapter_config.json")).unwrap(),
            perplexities: keys.iter().map(|key| summary[*key].clone()).collect(),
            stages: stages.iter().map(|s| (s["first_loss"].clone(), s["last_loss"].clone())).collect(),
            metrics,
        }
    }

    /// Fails unless both are the same; says what differs.
    #[track_caller]
    fn equals(&self, other: &Self) {
        for (number, (a, b)) in self.metrics.iter().zip(&other.metrics).enumerate() {
            assert_eq!(a, b, "line {} of metrics.jsonl", number + 1);
        }
        assert_eq!(self.metrics.len(), other.metrics.len(), "lines of metrics.jsonl");
        assert_eq!(self.perplexities, other.perplexities);
        assert_eq!(self.stages, other.stages);
        assert_eq!(self.adapter_config, other.adapter_config);
        assert!(self.adapter == other.adapter, "adapter_model.safetensors differs");
    }
}

/// The run that was left alone.
fn uninterrupted(fixture: &Fixture) -> Reached {
    mclora(&fixture.extend("whole")).success();
    let reached = Reached::of(&fixture.path("whole"));
    assert_eq!(reached.metrics.iter().filter(|line| line["kind"] == "train").count(), 24);
    reached
}

/// Steps done, as the metrics say.
fn step(run: &Path) -> u64 {
    metrics(run).last().map_or(0, |line| line["step"].as_u64().unwrap())
}

fn evaluations(run: &Path, model: &str) -> usize {
    metrics(run).iter().filter(|line| line["model"] == model).count()
}

/// Names in the folder of checkpoints.
fn checkpoints(run: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(run.join("checkpoints")) else { return Vec::new() };
    let mut names: Vec<String> = entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Whole checkpoints, the newest last.
fn whole_checkpoints(run: &Path) -> Vec<String> {
    checkpoints(run).into_iter().filter(|name| !name.starts_with('.')).collect()
}

/// Is the checkpoint of a step being written?
fn writes_checkpoint(run: &Path, step: u64) -> bool {
    checkpoints(run).iter().any(|name| name.starts_with(&format!(".{step:08}.")))
}

/// Has anything of the adapter reached the disk?
fn writes_adapter(run: &Path) -> bool {
    let Ok(entries) = fs::read_dir(run) else { return false };
    entries.flatten().any(|e| e.file_name().to_string_lossy().contains("adapter"))
}

/// The signal's number, as the system reports it.
const SIGKILL: i32 = 9;

/// When to kill; each comes later in the run than the one before it.
type Moment = (&'static str, fn(&Path) -> bool);
const MOMENTS: [Moment; 9] = [
    ("before anything is measured", |run| run.join(".lock").exists()),
    ("while the base model is measured", |run| evaluations(run, "base") >= 1),
    ("while the interpolated model is measured", |run| evaluations(run, "interpolated") >= 1),
    ("while the first stage trains", |run| step(run) >= 5),
    ("while a checkpoint is written", |run| writes_checkpoint(run, 9)),
    ("at the border of the stages", |run| step(run) >= 13),
    ("right after a checkpoint", |run| run.join("checkpoints/00000018").exists()),
    ("while the adapted model is measured", |run| evaluations(run, "adapted") >= 1),
    ("while the adapter is written", writes_adapter),
];

/// `extend`, from the second time on with `--resume`.
fn attempt(fixture: &Fixture, out: &str) -> Vec<String> {
    let mut args = fixture.extend(out);
    if fixture.path(out).join(".lock").exists() {
        args.push("--resume".into());
    }
    args
}

#[test]
fn killed_at_any_moment_and_resumed_gives_the_same_bytes() {
    let fixture = Fixture::new();
    let expected = uninterrupted(&fixture);
    let run = fixture.path("killed");
    let start = |out: &Path| resumed(fixture.extend(out.file_name().unwrap().to_str().unwrap()), out);
    let torn = Torn::new(&fixture, "killed", &start);
    let mut killed = Vec::new();
    for (name, moment) in MOMENTS {
        if torn.kill(name, || moment(&run)) {
            killed.push(name);
        }
        assert!(
            !run.join("adapter").exists() || run.join("adapter/adapter_model.safetensors").is_file(),
            "{name}: half an adapter"
        );
    }
    println!("killed {}", killed.join(", "));
    assert!(killed.len() >= 6, "too few kills: {killed:?}");
    let last = torn.finish();
    assert!(last.stderr.contains("resuming after step 24 of 24"), "{}", last.stderr);
    Reached::of(&run).equals(&expected);

    let hidden: Vec<_> = fs::read_dir(&run)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.') && name != ".lock")
        .collect();
    assert!(hidden.is_empty(), "left behind: {hidden:?}");
    assert_eq!(whole_checkpoints(&run), ["00000021", "00000024"]);
}

#[test]
fn killed_at_random_moments_it_ends_with_the_same_bytes() {
    let fixture = Fixture::new();
    let start = |out: &Path| resumed(fixture.extend(out.file_name().unwrap().to_str().unwrap()), out);
    at_random(&fixture, &start, &|whole, torn| Reached::of(torn).equals(&Reached::of(whole)));
}

#[test]
fn half_an_adapter_left_by_a_kill_does_not_stand_in_the_way() {
    let fixture = Fixture::new();
    let expected = uninterrupted(&fixture);
    // What a kill in the middle of writing the adapter leaves, whether or not the kills above hit that moment.
    let run = fixture.path("whole");
    fs::rename(run.join("adapter"), run.join(".adapter.a1b2c3.tmp")).unwrap();
    common::truncate(&run.join(".adapter.a1b2c3.tmp/adapter_model.safetensors"), 0.5);
    fs::remove_file(run.join("summary.json")).unwrap();
    fs::write(run.join(".summary.json.d4e5f6.tmp"), "{").unwrap();
    mclora(&attempt(&fixture, "whole")).success();
    Reached::of(&run).equals(&expected);
    assert!(!run.join(".adapter.a1b2c3.tmp").exists() && !run.join(".summary.json.d4e5f6.tmp").exists());
}

#[test]
fn damaged_newest_checkpoint_is_passed_over() {
    let fixture = Fixture::new();
    let expected = uninterrupted(&fixture);
    let run = fixture.path("damaged");
    let mut running = Running::start(&fixture.extend("damaged"), fixture.path("stderr"));
    assert!(running.wait_until(|| step(&run) >= 14));
    running.signal("KILL");
    assert_eq!(running.end(), (None, Some(SIGKILL)));

    let found = whole_checkpoints(&run);
    let [before, newest] = &found[..] else { panic!("expected two checkpoints: {found:?}") };
    let file = run.join("checkpoints").join(newest).join("trainable.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).unwrap();

    let resumed = mclora(&attempt(&fixture, "damaged")).success();
    let said =
        format!("{}: damaged checkpoint passed over: ", run.join("checkpoints").join(newest).display());
    assert!(resumed.stderr.contains(&said), "{}", resumed.stderr);
    assert!(resumed.stderr.contains("trainable.safetensors: expected SHA-256"), "{}", resumed.stderr);
    let step: u64 = before.parse().unwrap();
    assert!(resumed.stderr.contains(&format!("resuming after step {step} of 24")), "{}", resumed.stderr);
    Reached::of(&run).equals(&expected);
}

/// The command that an interrupted run tells the user to go on with.
fn told_command(stderr: &str) -> Command {
    let line = stderr.lines().find_map(|line| line.strip_prefix("command: "));
    let line = line.unwrap_or_else(|| panic!("no command to go on with: {stderr}"));
    let mut shell = Command::new("sh");
    shell.args(["-c", line]);
    shell
}

#[test]
fn interrupted_while_training_saves_and_says_how_to_go_on() {
    let fixture = Fixture::new();
    let expected = uninterrupted(&fixture);
    let run = fixture.path("interrupted");
    let mut running = Running::start(&fixture.extend("interrupted"), fixture.path("stderr"));
    assert!(running.wait_until(|| step(&run) >= 7));
    running.signal("INT");
    assert_eq!(running.end(), (Some(130), None), "{}", running.said());

    let said = running.said();
    let done = step(&run);
    assert!(said.contains(&format!("stopped after step {done} of 24")), "{said}");
    assert_eq!(whole_checkpoints(&run).last(), Some(&format!("{done:08}")), "{said}");
    let resumed = finish(told_command(&said)).success();
    assert!(resumed.stderr.contains(&format!("resuming after step {done} of 24")), "{}", resumed.stderr);
    Reached::of(&run).equals(&expected);
}

#[test]
fn interrupted_while_measuring_can_go_on() {
    let fixture = Fixture::new();
    // So many lengths that measuring goes on long after its first result is on disk.
    let lengths: Vec<String> = (8..=128).map(|n| n.to_string()).collect();
    let lengths = ("--eval-contexts", lengths.join(","));
    let measured = |args: Vec<String>| common::with(args, &[(lengths.0, &lengths.1)]);
    mclora(&measured(fixture.extend("whole"))).success();
    let expected = Reached::of(&fixture.path("whole"));
    let moments: [Moment; 2] =
        [("base", |run| evaluations(run, "base") >= 1), ("adapted", |run| evaluations(run, "adapted") >= 1)];
    let run: PathBuf = fixture.path("interrupted");
    for (name, moment) in moments {
        let mut args = measured(fixture.extend("interrupted"));
        if run.join(".lock").exists() {
            args.push("--resume".into());
        }
        let mut running = Running::start(&args, fixture.path("stderr"));
        assert!(running.wait_until(|| moment(&run)), "{name}: {}", running.said());
        running.signal("INT");
        assert_eq!(running.end(), (Some(130), None), "{name}: {}", running.said());
        assert!(!run.join("summary.json").exists() && !run.join("adapter").exists(), "{name}");
    }
    finish(told_command(&fs::read_to_string(fixture.path("stderr")).unwrap())).success();
    Reached::of(&run).equals(&expected);
}

#[test]
fn other_settings_are_not_resumed() {
    let fixture = Fixture::new();
    uninterrupted(&fixture);
    let run = fixture.path("whole");
    let before = common::tree(&run);
    let mut args = common::with(fixture.extend("whole"), &[("--seed", "8")]);
    args.push("--resume".into());
    mclora(&args).refused(2, &["checkpoints/00000024", "expected a checkpoint of this configuration"]);
    assert_eq!(common::tree(&run), before);
}

#[test]
fn other_text_or_another_base_under_the_same_names_is_not_resumed() {
    let fixture = Fixture::new();
    uninterrupted(&fixture);
    let run = fixture.path("whole");
    let before = common::tree(&run);
    let mut args = fixture.extend("whole");
    args.push("--resume".into());

    let extra = fixture.path("data/99.txt");
    fs::write(&extra, "A text that was not there before. ".repeat(50)).unwrap();
    mclora(&args).refused(2, &["the text of --data is not what the run began with", "sha256"]);
    fs::remove_file(&extra).unwrap();

    fs::remove_dir_all(fixture.path("base")).unwrap();
    fixture.model("base", 2);
    mclora(&args).refused(2, &["the base model is not what the run began with", "sha256"]);
    assert_eq!(common::tree(&run), before);
}
