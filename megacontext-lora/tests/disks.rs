//! Disks that are full, that a file may not grow on, that cannot be written to: every job names the path, leaves nothing
//! half-written, and goes on where it was once there is room.
//!
//! A small file system is mounted where this process may do so. A limit on the size of files (`ulimit -f`) does the same
//! everywhere: a write beyond it fails as on a full disk, with "File too large".
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::{Fixture, Outcome, command, finish, mclora, tree, with};
use gistnet_adapter::{GistNet, GistNetConfig, Identity};
use megacontext_base::weights::Weights;
use megacontext_lora::error::Kind;
use megacontext_lora::host::HostApi;
use megacontext_lora::session::Session;
use serde_json::{Value, json};

/// Names of hidden files and folders, where an interrupted write would leave something.
fn hidden_in(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.') && name != ".lock").collect()
}

#[test]
fn output_that_cannot_be_written() {
    let fixture = Fixture::new();
    // Below a file nothing can be created, not even by root.
    fs::write(fixture.path("file"), "").unwrap();
    let run = fixture.at("file/run");
    mclora(&with(fixture.extend("run"), &[("--out", &run)])).refused(1, &[&run, "Not a directory"]);

    let adapter = fixture.adapter("trained");
    let (base, merged, logits) =
        (fixture.at("base"), fixture.at("file/merged"), fixture.at("file/x.safetensors"));
    mclora(&["merge", "--base", &base, "--adapter", &adapter, "--out", &merged])
        .refused(1, &[&merged, "is not a directory"]);
    fs::write(fixture.path("tokens.json"), "[1]").unwrap();
    let tokens = fixture.at("tokens.json");
    mclora(&["logits", "--base", &base, "--tokens", &tokens, "--out", &logits])
        .refused(1, &["/file", "directory"]);
    assert_eq!(fs::read(fixture.path("file")).unwrap(), b"");
}

#[test]
fn full_device() {
    let fixture = Fixture::new();
    let (base, tokens) = (fixture.at("base"), fixture.at("tokens.json"));
    fs::write(&tokens, "[1, 2, 3]").unwrap();
    mclora(&["logits", "--base", &base, "--tokens", &tokens, "--out", "/dev/full"])
        .refused(1, &["/dev/full: No space left on device"]);
}

/// A small file system of its own, gone when dropped.
struct Disk(PathBuf);

impl Disk {
    /// Nothing where this process may not mount one.
    fn mount(path: PathBuf, options: &str) -> Option<Self> {
        fs::create_dir(&path).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&path).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(path));
        }
        println!("skipped: this process may not mount a small disk to fill");
        None
    }

    fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        assert!(Command::new("mount").args(["-o", &options]).arg(&self.0).status().unwrap().success());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        Command::new("umount").arg(&self.0).status().ok();
    }
}

#[test]
fn full_disk_while_training() {
    let fixture = Fixture::new();
    let Some(disk) = Disk::mount(fixture.path("disk"), "size=400k") else { return };
    let out = fixture.at("disk/run");
    let args = with(fixture.extend("run"), &[("--out", &out)]);
    mclora(&args).refused(1, &["No space left on device", "disk/run/"]);
    let run = Path::new(&out);
    assert!(!run.join("adapter").exists() && !run.join("summary.json").exists());
    assert!(hidden_in(&run.join("checkpoints")).is_empty(), "no part of a checkpoint stays");

    // With room again the run goes on and ends as one that always had room.
    disk.remount("size=64m");
    mclora(&[&args[..], &["--resume".into()]].concat()).success();
    mclora(&fixture.extend("roomy")).success();
    let adapter = |dir: &Path| fs::read(dir.join("adapter/adapter_model.safetensors")).unwrap();
    assert!(adapter(run) == adapter(&fixture.path("roomy")));
}

#[test]
fn full_disk_while_merging_and_writing_logits() {
    let fixture = Fixture::new();
    let adapter = fixture.adapter("trained");
    let Some(_disk) = Disk::mount(fixture.path("disk"), "size=40k") else { return };
    let (base, merged, logits) =
        (fixture.at("base"), fixture.at("disk/merged"), fixture.at("disk/x.safetensors"));
    let full = ["No space left on device", "/disk"];
    mclora(&["merge", "--base", &base, "--adapter", &adapter, "--out", &merged]).refused(1, &full);
    assert!(tree(&fixture.path("disk")).is_empty(), "{:?}", tree(&fixture.path("disk")).keys());

    let tokens = fixture.at("tokens.json");
    fs::write(&tokens, json!(vec![1; 100]).to_string()).unwrap();
    mclora(&["logits", "--base", &base, "--tokens", &tokens, "--out", &logits]).refused(1, &full);
    assert!(tree(&fixture.path("disk")).is_empty(), "{:?}", tree(&fixture.path("disk")).keys());
}

#[test]
fn read_only_disk() {
    let fixture = Fixture::new();
    let Some(_disk) = Disk::mount(fixture.path("disk"), "size=64k,ro") else { return };
    let run = fixture.at("disk/run");
    mclora(&with(fixture.extend("run"), &[("--out", &run)])).refused(1, &[&run, "Read-only file system"]);
}

/// Kilobytes that a file may have: settings and metrics fit, a checkpoint of the micro model does not.
const ROOM: u32 = 24;

/// The program, with no file allowed to grow beyond [`ROOM`].
fn cramped(args: &[String]) -> Outcome {
    let program = command(args);
    let mut shell = Command::new("sh");
    // In units of 512 bytes. Without the trap the system would kill the process instead of refusing the write.
    shell.args(["-c", &format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", 2 * ROOM)]);
    shell.arg(program.get_program()).args(program.get_args());
    finish(shell)
}

/// A GistNet for blocks of 4 that has learned nothing.
fn gistnet(fixture: &Fixture) -> String {
    let config = GistNetConfig { block: 4, ..GistNetConfig::new(32, 4) };
    let fingerprint = Weights::open(&fixture.path("base")).unwrap().fingerprint();
    let path = fixture.path("gistnet.safetensors");
    GistNet::new(config, 3).unwrap().save(&path, &Identity::of_base(&fingerprint)).unwrap();
    fixture.at("gistnet.safetensors")
}

/// `extend`, `train gistnet` and `train lensnet`, each with the file that it is for.
fn runs(fixture: &Fixture, out: &str) -> [(Vec<String>, &'static str); 3] {
    let (base, data, out, network) =
        (fixture.at("base"), fixture.at("data"), fixture.at(out), gistnet(fixture));
    #[rustfmt::skip]
    let gistnet = [
        "train", "gistnet", "--base", &base, "--data", &data, "--out", &out, "--context", "32", "--block", "4", "--stages", "4:6",
        "--passages-per-step", "2", "--spans-per-passage", "2", "--validate-every", "6", "--validation-passages", "3",
        "--test-passages", "2", "--checkpoint-every", "3", "--threads", "2", "--seed", "7",
    ];
    #[rustfmt::skip]
    let lensnet = [
        "train", "lensnet", "--base", &base, "--gistnet", &network, "--data", &data, "--out", &out, "--history", "40",
        "--budget", "24", "--horizon", "4", "--protected", "4", "--holdout", "0.2", "--rounds", "1", "--label-histories", "6",
        "--steps", "6", "--batch", "2", "--checkpoint-every", "3", "--validation-histories", "3", "--threads", "2", "--seed", "7",
    ];
    let extend =
        with(fixture.extend("x"), &[("--out", &out), ("--stages", "64:3,128:3"), ("--eval-tokens", "512")]);
    let own = |args: &[&str]| args.iter().map(|arg| (*arg).to_string()).collect();
    [
        (extend, "adapter/adapter_model.safetensors"),
        (own(&gistnet), "gistnet.safetensors"),
        (own(&lensnet), "lensnet.safetensors"),
    ]
}

#[test]
fn a_run_whose_files_may_not_grow_stops_whole_and_goes_on_with_room() {
    let fixture = Fixture::new();
    for (number, (args, result)) in runs(&fixture, "run").into_iter().enumerate() {
        let message = cramped(&args).refused(1, &["/run/", "File too large"]);
        let run = fixture.path("run");
        for dir in [run.clone(), run.join("checkpoints"), run.join("labels")] {
            assert!(hidden_in(&dir).is_empty(), "{message}: {:?}", hidden_in(&dir));
        }
        for file in [result, "adapter", "summary.json"] {
            assert!(!run.join(file).exists(), "{message}: {file}");
        }
        mclora(&[&args[..], &["--resume".to_string()]].concat()).success();
        let roomy = format!("roomy{number}");
        mclora(&runs(&fixture, &roomy)[number].0).success();
        let bytes = |run: &Path| fs::read(run.join(result)).unwrap();
        assert!(bytes(&run) == bytes(&fixture.path(&roomy)), "{result} differs");
        fs::remove_dir_all(&run).unwrap();
    }
}

#[test]
fn results_whose_files_may_not_grow_are_not_there_at_all() {
    let fixture = Fixture::new();
    let adapter = fixture.adapter("trained");
    let (base, tokens) = (fixture.at("base"), fixture.at("tokens.json"));
    fs::write(&tokens, json!(vec![1; 100]).to_string()).unwrap();
    fs::create_dir(fixture.path("out")).unwrap();
    let (merged, logits) = (fixture.at("out/merged"), fixture.at("out/x.safetensors"));
    for args in [
        ["merge", "--base", &base, "--adapter", &adapter, "--out", &merged],
        ["logits", "--base", &base, "--tokens", &tokens, "--out", &logits],
    ] {
        cramped(&args.map(str::to_owned)).refused(1, &["/out", "File too large"]);
        assert!(tree(&fixture.path("out")).is_empty(), "{:?}", tree(&fixture.path("out")).keys());
    }
}

#[test]
fn networks_below_a_file_are_refused() {
    let fixture = Fixture::new();
    fs::write(fixture.path("file"), "").unwrap();
    for (args, _) in runs(&fixture, "file/run") {
        mclora(&args).refused(1, &["file/run", "Not a directory"]);
    }
    assert_eq!(fs::read(fixture.path("file")).unwrap(), b"");
}

#[test]
fn a_run_on_a_disk_that_became_read_only_is_refused_and_left_as_it_was() {
    let fixture = Fixture::new();
    let Some(disk) = Disk::mount(fixture.path("disk"), "size=16m") else { return };
    let (args, _) = runs(&fixture, "disk/run")[0].clone();
    mclora(&args).success();
    fs::remove_file(fixture.path("disk/run/summary.json")).unwrap();
    let before = tree(&fixture.path("disk"));
    disk.remount("ro");
    let run = fixture.at("disk/run");
    mclora(&[&args[..], &["--resume".to_string()]].concat()).refused(1, &[&run, "Read-only file system"]);
    assert_eq!(tree(&fixture.path("disk")), before);
}

struct Silent;

impl HostApi for Silent {
    fn event(&self, _: &str, _: &Value) {}

    fn cancelled(&self) -> bool {
        false
    }
}

#[test]
fn what_a_session_cannot_write_it_says_and_it_goes_on() {
    let fixture = Fixture::new();
    fs::write(fixture.path("file"), "").unwrap();
    let session = Session::open(json!({ "base": fixture.path("base") }), Arc::new(Silent)).unwrap();
    let batch = json!({ "tokens": [(1..34).collect::<Vec<u32>>()] });
    session.enter_phase(json!({ "groups": ["lora"], "lora": { "r": 2 } })).unwrap();
    session.step(batch.clone()).unwrap();
    session.open_tree(json!({ "network": gistnet(&fixture) })).unwrap();
    session.tree_append(&(1..10).collect::<Vec<u32>>()).unwrap();
    // Below a file, and where the kernel lets nobody make anything.
    for out in [fixture.path("file/out"), PathBuf::from("/proc/megacontext-test")] {
        let errors = [
            session.save(&out).unwrap_err(),
            session.export(&out).unwrap_err(),
            session.save_tree(json!({ "path": out })).unwrap_err(),
        ];
        let place = out.parent().unwrap().to_str().unwrap();
        for error in errors {
            assert_eq!(error.kind, Kind::Io, "{error}");
            assert!(error.message.contains(place), "{error}");
        }
    }
    session.step(batch).unwrap();
    session.save(&fixture.path("saved")).unwrap();
}
