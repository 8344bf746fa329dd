//! A host that relies on the plugin: what happens around it when something panics, blocks, refuses, stops, or runs beside it.
//! Through the built library, as a host outside uses it.
//!
//! The panic inside the plugin is injected by `MEGACONTEXT_FAULT` (`fault.rs` of the plugin), in a process of its own: the
//! tests marked as ignored are those processes.

#![allow(clippy::unwrap_used)] // Helpers of tests, which the lint does not see as tests.

use gistnet_adapter::{GistNet, GistNetConfig, Identity};
use integration_tests::{model_with_tokenizer, plugin};
use megacontext_lora_abi::{
    AbiError, Answer, ErrorKind, Host, LoadOptions, Plugin, Session, TensorView, TensorViewMut,
};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

fn load() -> Plugin {
    Plugin::load(plugin().unwrap(), &LoadOptions::default()).unwrap()
}

/// A folder with a model, and text of words that follow one another by a rule and some chance.
struct Fixture(tempfile::TempDir);

impl Fixture {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        model_with_tokenizer("llama/tied_f32", 64, &folder.path("base")).unwrap();
        for number in 0..4 {
            std::fs::write(folder.path(&format!("{number}.txt")), text(number, 3000)).unwrap();
        }
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn data(&self) -> Value {
        json!((0..4).map(|n| self.path(&format!("{n}.txt"))).collect::<Vec<_>>())
    }

    /// `extend` from 32 to 64 tokens in six steps.
    fn extend(&self, out: &str) -> Value {
        json!({
            "base": self.path("base"), "data": self.data(), "out": self.path(out), "context": 64, "steps": 6, "seed": 7,
            "threads": 1, "batch": { "tokens_per_step": 256 }, "eval": { "max_tokens": 200, "baselines": false },
        })
    }

    /// `train_gistnet` in six steps.
    fn gistnet(&self, out: &str) -> Value {
        json!({
            "base": self.path("base"), "data": self.data(), "out": self.path(out), "context": 32, "seed": 7, "threads": 1,
            "network": { "block": 4 }, "stages": [{ "horizon": 4, "steps": 6 }], "passages_per_step": 2,
            "spans_per_passage": 2, "validation": { "every": 6, "passages": 2, "test_passages": 2 },
        })
    }

    /// `train_lensnet` with six labels and six steps.
    fn lensnet(&self, out: &str) -> Value {
        let network = self.path("gistnet.safetensors");
        let config = GistNetConfig { block: 4, ..GistNetConfig::new(32, 4) };
        let told = self.open(()).describe().unwrap();
        let identity = Identity::of_base(told["fingerprint"].as_str().unwrap());
        GistNet::new(config, 3).unwrap().save(&network, &identity).unwrap();
        json!({
            "base": self.path("base"), "gistnet": network, "data": self.data(), "out": self.path(out), "history": 28,
            "budget": 16, "horizon": 4, "protected": 4, "holdout": 0.25, "levels": 1, "steps": 6, "batch": 2, "seed": 7,
            "threads": 1, "labels": { "rounds": 1, "histories": 6 }, "validation": { "histories": 2 },
        })
    }

    fn open(&self, host: impl Host) -> Session {
        load().open_session(&json!({ "base": self.path("base") }), host).unwrap()
    }
}

fn text(number: u64, words: usize) -> String {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut word = 1;
    let mut out = String::new();
    for _ in 0..words {
        // Xorshift, Marsaglia 2003.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word = if state.is_multiple_of(4) { 1 + (state >> 33) % 63 } else { 1 + word * 5 % 63 };
        out += &format!("w{word} ");
    }
    out
}

/// A host that does something in its callbacks, and counts the steps it hears of.
struct Doing<F> {
    what: F,
    steps: AtomicUsize,
}

impl<F: Fn(&str, usize) -> Doings + Send + Sync + 'static> Doing<F> {
    /// `what` gets the callback's name and how many steps there have been.
    fn new(what: F) -> Arc<Self> {
        Arc::new(Self { what, steps: AtomicUsize::new(0) })
    }

    fn call(&self, name: &str) -> Doings {
        let done = (self.what)(name, self.steps.load(Ordering::SeqCst));
        assert!(!matches!(done, Doings::Panic), "a callback with a bug");
        done
    }
}

/// What a callback comes to.
#[derive(Clone, Copy)]
enum Doings {
    Nothing,
    Panic,
    Cancel,
    Refuse,
    Answer(Answer),
}

impl<F: Fn(&str, usize) -> Doings + Send + Sync + 'static> Host for Doing<F> {
    fn event(&self, kind: &str, _: &str) {
        if kind == "progress" {
            self.steps.fetch_add(1, Ordering::SeqCst);
            self.call("event");
        }
    }

    fn cancelled(&self) -> bool {
        matches!(self.call("cancelled"), Doings::Cancel)
    }

    fn documents(&self, split: &str, start: u64, count: u64) -> Result<Vec<String>, AbiError> {
        if matches!(self.call("documents"), Doings::Refuse) {
            return Err(AbiError::new(ErrorKind::Io, format!("{split}: the library is closed")));
        }
        Ok((start..(start + count).min(4)).map(|number| text(number, 3000)).collect())
    }

    fn phase_entered(&self, _: &str) -> Answer {
        if let Doings::Answer(answer) = self.call("phase_entered") { answer } else { Answer::Continue }
    }

    fn phase_left(&self, _: &str) -> Answer {
        if let Doings::Answer(answer) = self.call("phase_left") { answer } else { Answer::Continue }
    }
}

/// A door that one thread waits at until another opens it.
#[derive(Default)]
struct Door {
    open: Mutex<bool>,
    moved: Condvar,
}

impl Door {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.moved.notify_all();
    }

    fn wait(&self) {
        let open = self.open.lock().unwrap();
        let (open, _) = self.moved.wait_timeout_while(open, Duration::from_secs(60), |open| !*open).unwrap();
        assert!(*open, "nobody came");
    }
}

fn batch(number: u32) -> Value {
    let row: Vec<u32> = (0..17).map(|i| 1 + (i * 7 + number * 13) % 60).collect();
    json!({ "tokens": [row] })
}

fn lora_phase() -> Value {
    json!({ "groups": ["lora"], "lora": { "r": 2 }, "optimizer": { "lr": 0.01, "warmup_steps": 1 } })
}

/// Losses of some steps of a session's phase, what was learned, and logits.
fn phase_of(session: &Session) -> (Vec<Value>, Vec<f32>, Vec<f32>) {
    session.enter_phase(&lora_phase()).unwrap();
    let losses = (0..30).map(|n| session.step(&batch(n)).unwrap()).collect();
    session.leave_phase().unwrap();
    let factor = session.parameter("model.layers.0.self_attn.q_proj.lora_B.weight").unwrap();
    let mut logits = vec![0f32; 8 * 64];
    let tokens: Vec<u32> = (1..9).collect();
    session
        .logits(
            megacontext_lora_abi::ContextView::tokens(&tokens),
            TensorViewMut::new(&mut logits, &[8, 64]).unwrap(),
        )
        .unwrap();
    (losses, factor.to_vec::<f32>().unwrap(), logits)
}

/// The bytes that a job has left.
fn result(folder: &Path, file: &str) -> Vec<u8> {
    std::fs::read(folder.join(file)).unwrap()
}

#[test]
fn two_sessions_in_two_threads_give_what_they_give_alone() {
    let fixture = Fixture::new();
    let job = |out: &str| {
        fixture.open(()).run("extend", &fixture.extend(out)).unwrap();
        result(&fixture.path(out), "adapter/adapter_model.safetensors")
    };
    let phase = || phase_of(&fixture.open(()));
    let (job_alone, phase_alone) = (job("alone"), phase());
    for round in 0..3 {
        let (job, phases) = std::thread::scope(|scope| {
            let job = scope.spawn(|| job(&format!("beside{round}")));
            let phases = scope.spawn(|| [phase(), phase()]);
            (job.join().unwrap(), phases.join().unwrap())
        });
        assert!(job == job_alone, "round {round}: the job's adapter differs");
        assert!(phases.iter().all(|phase| *phase == phase_alone), "round {round}: the phase differs");
    }
    // And two phases beside each other.
    let both =
        std::thread::scope(|scope| [(); 2].map(|()| scope.spawn(phase)).map(|phase| phase.join().unwrap()));
    assert!(both.iter().all(|phase| *phase == phase_alone));
}

/// Runs one of the ignored tests below with a fault in the plugin.
#[track_caller]
fn with_fault(fault: &str, test: &str) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env("MEGACONTEXT_FAULT", fault)
        .output()
        .unwrap();
    let said = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (said(&output.stdout), said(&output.stderr));
    assert!(output.status.success() && stdout.contains("1 passed"), "{fault}: {stdout}\n{stderr}");
    assert!(stderr.contains("an injected fault"), "{fault}: nothing was injected: {stderr}");
}

#[test]
fn a_panic_inside_is_an_error_and_the_host_goes_on() {
    with_fault("step", "a_step_that_panics");
    // In the middle of a job, in a thread of its pool.
    with_fault("progress", "a_job_that_panics");
}

/// What the host does after the call that panicked.
fn goes_on(fixture: &Fixture, broken: &Session, error: &AbiError) {
    assert_eq!(error.kind(), ErrorKind::Internal, "{error}");
    assert!(error.message().contains("an injected fault"), "{error}");
    let mut out = [0f32; 32];
    let answers = [
        broken.check().unwrap_err(),
        broken.describe().unwrap_err(),
        broken.step(&batch(0)).unwrap_err(),
        broken.leave_phase().unwrap_err(),
        broken.run("extend", &fixture.extend("none")).unwrap_err(),
        broken.embed(TensorView::of(&[1u32]), TensorViewMut::new(&mut out, &[1, 32]).unwrap()).unwrap_err(),
    ];
    assert!(answers.iter().all(|e| e.kind() == ErrorKind::Poisoned), "{answers:?}");
    assert!(!fixture.path("none").exists());
    // The fault comes once: the next session is sound.
    let next = fixture.open(());
    next.check().unwrap();
    let (losses, ..) = phase_of(&next);
    let loss = |n: usize| losses[n]["loss"].as_f64().unwrap();
    assert!(losses.len() == 30 && loss(29).is_finite(), "{losses:?}");
}

#[test]
#[ignore = "needs MEGACONTEXT_FAULT=step; run by a_panic_inside_is_an_error_and_the_host_goes_on"]
fn a_step_that_panics() {
    let fixture = Fixture::new();
    let (broken, beside) = (fixture.open(()), fixture.open(()));
    broken.enter_phase(&lora_phase()).unwrap();
    let error = broken.step(&batch(0)).unwrap_err();
    // A session that was open meanwhile is not touched.
    beside.check().unwrap();
    beside.evaluate(&batch(0)).unwrap();
    goes_on(&fixture, &broken, &error);
}

#[test]
#[ignore = "needs MEGACONTEXT_FAULT=progress; run by a_panic_inside_is_an_error_and_the_host_goes_on"]
fn a_job_that_panics() {
    let fixture = Fixture::new();
    let broken = fixture.open(());
    let error = broken.run("extend", &fixture.extend("run")).unwrap_err();
    goes_on(&fixture, &broken, &error);
    // The run's folder is free again and can be taken up.
    let mut again = fixture.extend("run");
    again["resume"] = json!(true);
    fixture.open(()).run("extend", &again).unwrap();
    fixture.open(()).run("extend", &fixture.extend("whole")).unwrap();
    let adapter = |out: &str| result(&fixture.path(out), "adapter/adapter_model.safetensors");
    assert!(adapter("run") == adapter("whole"));
}

#[test]
fn callbacks_that_panic_end_their_job_and_nothing_else() {
    let fixture = Fixture::new();
    for callback in ["event", "cancelled", "documents", "phase_entered", "phase_left"] {
        let host = Doing::new(move |name, _| if name == callback { Doings::Panic } else { Doings::Nothing });
        let session = fixture.open(host.clone());
        let mut job = fixture.extend(callback);
        job["data"] = json!(["host:mine"]);
        let error = session.run("extend", &job).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{callback}: {error}");
        assert!(
            host.steps.load(Ordering::SeqCst) <= if callback == "phase_left" { 6 } else { 1 },
            "{callback}"
        );
        assert!(!fixture.path(callback).join("adapter").exists(), "{callback}");
        session.check().unwrap();
        session.describe().unwrap();
    }
}

#[test]
fn callbacks_of_a_phase_that_panic_leave_the_session_as_their_answer_says() {
    let fixture = Fixture::new();
    let untouched = fixture.open(()).evaluate(&batch(0)).unwrap();
    for callback in ["phase_entered", "phase_left"] {
        let host = Doing::new(move |name, _| if name == callback { Doings::Panic } else { Doings::Nothing });
        let session = fixture.open(host);
        let entered = session.enter_phase(&lora_phase());
        if callback == "phase_entered" {
            // As Stop: the phase was not begun.
            assert_eq!(entered.unwrap_err().kind(), ErrorKind::Cancelled);
            assert_eq!(session.evaluate(&batch(0)).unwrap(), untouched);
        } else {
            entered.unwrap();
            session.step(&batch(0)).unwrap();
            let learned = session.evaluate(&batch(0)).unwrap();
            // As Stop: what was learned stays.
            assert_eq!(session.leave_phase().unwrap()["rolled_back"], json!(false));
            assert_eq!(session.evaluate(&batch(0)).unwrap(), learned);
            assert_ne!(learned, untouched);
        }
        assert_eq!(session.describe().unwrap()["phase"], Value::Null);
        session.check().unwrap();
    }
}

#[test]
fn callbacks_that_refuse_end_their_job_with_their_own_words() {
    let fixture = Fixture::new();
    let session = fixture
        .open(Doing::new(|name, _| if name == "documents" { Doings::Refuse } else { Doings::Nothing }));
    for (job, mut params) in [("extend", fixture.extend("out")), ("train_gistnet", fixture.gistnet("out"))] {
        params["data"] = json!(["host:mine"]);
        let error = session.run(job, &params).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Data, "{job}: {error}");
        assert!(error.message().contains("mine: the library is closed"), "{job}: {error}");
        assert!(!fixture.path("out").join("adapter").exists());
        session.check().unwrap();
    }
    for answer in [Answer::Stop, Answer::RollBack] {
        let host = Doing::new(move |name, _| match name {
            "phase_entered" => Doings::Answer(answer),
            _ => Doings::Nothing,
        });
        let session = fixture.open(host);
        assert_eq!(session.enter_phase(&lora_phase()).unwrap_err().kind(), ErrorKind::Cancelled);
        let name = format!("{answer:?}");
        let error = session.run("extend", &fixture.extend(&name)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        assert!(!fixture.path(&name).join("adapter").exists());
        session.check().unwrap();
    }
}

#[test]
fn a_callback_that_blocks_holds_up_its_own_job_and_nobody_else() {
    let fixture = Fixture::new();
    let (blocked, release) = (Arc::new(Door::default()), Arc::new(Door::default()));
    let stop = Arc::new(AtomicBool::new(false));
    let host = Doing::new({
        let (blocked, release, stop) = (blocked.clone(), release.clone(), stop.clone());
        move |name, steps| match name {
            "event" if steps == 2 => {
                blocked.open();
                release.wait();
                Doings::Nothing
            }
            "cancelled" if stop.load(Ordering::SeqCst) => Doings::Cancel,
            _ => Doings::Nothing,
        }
    });
    let session = fixture.open(host.clone());
    let error = std::thread::scope(|scope| {
        let job = scope.spawn(|| session.run("extend", &fixture.extend("run")).unwrap_err());
        blocked.wait();
        // While the host dawdles in its job: the same session, another one, another one's job.
        session.evaluate(&batch(0)).unwrap();
        phase_of(&session);
        let other = fixture.open(());
        phase_of(&other);
        other.run("extend", &fixture.extend("other")).unwrap();
        assert!(!job.is_finished());
        stop.store(true, Ordering::SeqCst);
        release.open();
        job.join().unwrap()
    });
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
    assert_eq!(host.steps.load(Ordering::SeqCst), 2, "no step after the one it was stopped in");
}

#[test]
fn a_phase_that_waits_for_its_host_is_read_meanwhile_and_not_changed() {
    let fixture = Fixture::new();
    let (blocked, release) = (Arc::new(Door::default()), Arc::new(Door::default()));
    let host = Doing::new({
        let (blocked, release) = (blocked.clone(), release.clone());
        move |name, _| {
            if name == "phase_entered" {
                blocked.open();
                release.wait();
            }
            Doings::Nothing
        }
    });
    let session = fixture.open(host);
    std::thread::scope(|scope| {
        let entered = scope.spawn(|| session.enter_phase(&lora_phase()));
        blocked.wait();
        let start = Instant::now();
        session.describe().unwrap();
        session.evaluate(&batch(0)).unwrap();
        let error = session.step(&batch(0)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
        phase_of(&fixture.open(()));
        assert!(!entered.is_finished() && start.elapsed() < Duration::from_secs(50));
        release.open();
        entered.join().unwrap().unwrap();
    });
    session.step(&batch(0)).unwrap();
    session.leave_phase().unwrap();
}

#[test]
fn a_job_stops_within_one_step_of_being_asked() {
    let fixture = Fixture::new();
    // LensNet's labels are told of like steps: the third is one, the ninth is a step.
    for (job, params, moment) in [
        ("extend", fixture.extend("extend"), 3),
        ("train_gistnet", fixture.gistnet("gistnet"), 3),
        ("train_lensnet", fixture.lensnet("labels"), 3),
        ("train_lensnet", fixture.lensnet("lensnet"), 9),
    ] {
        // By another thread: after a step has been told of, some time in the next one or before it.
        let asked = Arc::new(AtomicBool::new(false));
        let reached = Arc::new(Door::default());
        let host = Doing::new({
            let (asked, reached) = (asked.clone(), reached.clone());
            move |name, steps| {
                if name == "event" && steps == moment {
                    reached.open();
                }
                if name == "cancelled" && asked.load(Ordering::SeqCst) {
                    Doings::Cancel
                } else {
                    Doings::Nothing
                }
            }
        });
        let session = fixture.open(host.clone());
        let (result, at) = std::thread::scope(|scope| {
            let running = scope.spawn(|| {
                let result = session.run(job, &params);
                reached.open();
                result
            });
            reached.wait();
            asked.store(true, Ordering::SeqCst);
            let at = host.steps.load(Ordering::SeqCst);
            (running.join().unwrap(), at)
        });
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{job}: {error}");
        let after = host.steps.load(Ordering::SeqCst) - at;
        assert!(after <= 1, "{job}: {after} steps after it was asked to stop");
        // In good order: it goes on from where it was.
        let mut again = params;
        again["resume"] = json!(true);
        fixture.open(()).run(job, &again).unwrap();
        session.check().unwrap();
    }
}

#[test]
fn a_job_that_does_not_fit_is_refused_with_its_plan() {
    let fixture = Fixture::new();
    let session = fixture.open(());
    for (job, mut params) in [
        ("extend", fixture.extend("out")),
        ("train_gistnet", fixture.gistnet("out")),
        ("train_lensnet", fixture.lensnet("out")),
    ] {
        params["memory_budget_bytes"] = json!(200_000);
        let error = session.run(job, &params).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Memory, "{job}: {error}");
        for part in ["the run needs about", "What would help"] {
            assert!(error.message().contains(part), "{job}: {error}");
        }
        assert!(!fixture.path("out").exists());
        session.check().unwrap();
    }
}
