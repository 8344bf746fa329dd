//! A host that drives phases itself and saves as it goes, killed within phases and between them, ends with the same bytes.
//!
//! The host is a process of its own: the test marked as ignored, which goes on with whatever its folder holds.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::kills::{Torn, at_random};
use common::{Fixture, tree};
use megacontext_lora::error::Kind;
use megacontext_lora::host::HostApi;
use megacontext_lora::session::Session;
use serde_json::{Value, json};

/// Where the host finds its model, and where it works.
const BASE: &str = "MCLORA_TEST_BASE";
const OUT: &str = "MCLORA_TEST_OUT";
/// Steps of a phase.
const STEPS: u64 = 8;

struct Silent;

impl HostApi for Silent {
    fn event(&self, _: &str, _: &Value) {}

    fn cancelled(&self) -> bool {
        false
    }
}

/// The phases, as they are entered.
fn phases() -> [Value; 3] {
    [
        json!({ "groups": ["lora"], "lora": { "r": 2, "dropout": 0.25 }, "context": 64, "seed": 1 }),
        json!({ "groups": ["embeddings", "norms"], "seed": 2 }),
        json!({ "groups": ["lora"], "optimizer": { "lr": 1e-3 }, "seed": 3 }),
    ]
}

fn batch(step: u64) -> Value {
    let row = |r: u64| (0..33).map(|i| 1 + (i * 7 + r * 13 + step * 5) % 290).collect::<Vec<u64>>();
    json!({ "tokens": [row(0), row(1)] })
}

/// Has the host left this phase?
fn left(out: &Path, phase: usize) -> PathBuf {
    out.join(format!("left-{phase}"))
}

/// What a host does that may be killed at any time: it goes on after the last step that it saved.
fn drive(base: &Path, out: &Path) {
    fs::create_dir_all(out).unwrap();
    let session = Session::open(json!({ "base": base }), Arc::new(Silent)).unwrap();
    let saved = |phase: usize| out.join(format!("phase-{phase}"));
    // Phases that are over are gone through again without a step, for what each brought: its adapter, its optimiser's state.
    for (phase, settings) in phases().into_iter().enumerate() {
        session.enter_phase(settings).unwrap();
        match session.resume(&saved(phase)) {
            Ok(_) => {}
            // There is none yet; what a kill left of one has been removed.
            Err(error) if error.kind == Kind::Data => {}
            Err(error) => panic!("{error}"),
        }
        loop {
            let step = session.describe().unwrap()["steps"].as_u64().unwrap();
            if step == STEPS * (phase as u64 + 1) {
                break;
            }
            session.step(batch(step)).unwrap();
            session.save(&saved(phase)).unwrap();
        }
        session.leave_phase().unwrap();
        fs::write(left(out, phase), "").unwrap();
    }
    session.export(&out.join("adapter")).unwrap();
}

#[test]
#[ignore = "the host that the other tests kill"]
fn the_host() {
    let path = |name: &str| PathBuf::from(std::env::var_os(name).unwrap());
    drive(&path(BASE), &path(OUT));
}

fn host(fixture: &Fixture, out: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "the_host", "--ignored", "--nocapture"])
        .env(BASE, fixture.path("base"))
        .env(OUT, out);
    command
}

/// Fails unless both hosts left the same files.
fn same(whole: &Path, torn: &Path) {
    let files = |dir: &Path| {
        let mut files = tree(&dir.join("adapter"));
        files.extend(tree(&dir.join("phase-2")));
        files
            .into_iter()
            .map(|(path, bytes)| (path.strip_prefix(dir).unwrap().to_owned(), bytes))
            .collect::<Vec<_>>()
    };
    let (whole, torn) = (files(whole), files(torn));
    assert!(whole.len() > 5, "{}", whole.len());
    for ((path, a), (other, b)) in whole.iter().zip(&torn) {
        assert_eq!(path, other);
        assert!(a == b, "{} differs", path.display());
    }
    assert_eq!(whole.len(), torn.len());
}

#[test]
fn killed_within_phases_and_between_them_it_ends_with_the_same_bytes() {
    let fixture = Fixture::new();
    let start = |out: &Path| host(&fixture, out);
    let torn = fixture.path("torn");
    let saved = |phase: usize, step: u64| torn.join(format!("phase-{phase}/checkpoints/{step:08}")).exists();
    let killed = Torn::new(&fixture, "torn", &start).at_moments(&[
        ("in the first phase", &|| saved(0, 3)),
        ("after its last step", &|| saved(0, STEPS)),
        ("between the first and the second", &|| left(&torn, 0).exists()),
        ("in the second", &|| saved(1, STEPS + 2)),
        ("between the second and the third", &|| left(&torn, 1).exists()),
        ("in the third", &|| saved(2, 2 * STEPS + 5)),
    ]);
    assert!(killed.len() >= 4, "too few kills: {killed:?}");
    drive(&fixture.path("base"), &fixture.path("whole"));
    same(&fixture.path("whole"), &torn);
}

#[test]
fn killed_at_random_moments_it_ends_with_the_same_bytes() {
    let fixture = Fixture::new();
    at_random(&fixture, &|out| host(&fixture, out), &same);
}
