//! A session in plain Rust: reading calls, host-driven phases, roll-back, checkpoints, export, and the host's callbacks.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use common::{Fixture, VOCAB};
use megacontext_lora::error::{Kind, Result};
use megacontext_lora::host::{Answer, HostApi};
use megacontext_lora::jobs;
use megacontext_lora::session::{Context, Entries, Lent, Session};
use serde_json::{Value, json};

/// A host that brings text of its own and gives the answers it was made with.
struct Recorder {
    on_entered: Answer,
    on_left: Answer,
    heard: Mutex<Vec<String>>,
    /// Called upon from within the callbacks.
    session: OnceLock<Weak<Session>>,
}

impl Recorder {
    fn new(on_left: Answer) -> Arc<Self> {
        Self::answering(Answer::Continue, on_left)
    }

    fn answering(on_entered: Answer, on_left: Answer) -> Arc<Self> {
        Arc::new(Self { on_entered, on_left, heard: Mutex::default(), session: OnceLock::new() })
    }

    /// What a host may and may not do in a callback.
    fn call_back(&self) {
        let Some(session) = self.session.get().and_then(Weak::upgrade) else { return };
        session.describe().unwrap();
        session.evaluate(batch()).unwrap();
        let says = "before the host has answered";
        usage(session.step(batch()), says);
        usage(session.enter_phase(json!({ "groups": ["norms"] })), says);
        usage(session.leave_phase(), says);
        usage(session.save(Path::new("nowhere")), says);
        usage(session.resume(Path::new("nowhere")), says);
        usage(session.export(Path::new("nowhere")), says);
    }
}

impl HostApi for Recorder {
    fn event(&self, kind: &str, _: &Value) {
        // A build with CUDA says what it came to; that is not what these tests are about.
        if kind != "device" {
            self.heard.lock().unwrap().push(kind.to_string());
        }
    }

    fn cancelled(&self) -> bool {
        false
    }

    fn documents(&self, split: &str, start: u64, count: u64) -> Result<Vec<String>> {
        assert_eq!(split, "mine");
        let text = |n: u64| format!("Number {n} follows {}. ", n.wrapping_sub(1)).repeat(40 + n as usize % 7);
        Ok((start..(start + count).min(300)).map(text).collect())
    }

    fn phase_entered(&self, _: &Value) -> Answer {
        self.heard.lock().unwrap().push("entered".to_string());
        self.call_back();
        self.on_entered
    }

    fn phase_left(&self, _: &Value) -> Answer {
        self.heard.lock().unwrap().push("left".to_string());
        self.call_back();
        self.on_left
    }
}

fn open(fixture: &Fixture, adapter: Option<&str>, host: Arc<Recorder>) -> Session {
    Session::open(json!({ "base": fixture.path("base"), "adapter": adapter }), host).unwrap()
}

fn tokens(context: &[u32]) -> Context<'_> {
    Context { entries: Entries::Tokens(context), mu: None, sigma: None, lod: None, targets: None }
}

fn batch() -> Value {
    let row = |r: u32| (0..33).map(|i| 1 + (i * 7 + r * 13) % 40).collect::<Vec<u32>>();
    json!({ "tokens": [row(0), row(1), row(2)], "lr": 0.01 })
}

fn usage(result: Result<impl std::fmt::Debug>, says: &str) {
    let error = result.unwrap_err();
    assert!(error.kind == Kind::Usage && error.message.contains(says), "{:?} {error}", error.kind);
}

#[test]
fn reading_calls_agree_with_each_other() {
    let fixture = Fixture::new();
    let session = open(&fixture, None, Recorder::new(Answer::Continue));
    let ids = [5u32, 9, 17, 3, 250];
    let width = session.describe().unwrap()["hidden_size"].as_u64().unwrap() as usize;
    let mut embedded = vec![0f32; ids.len() * width];
    session.embed(&ids, &mut embedded).unwrap();
    let (mut a, mut b) = (vec![0f32; ids.len() * VOCAB], vec![0f32; ids.len() * VOCAB]);
    session.logits(tokens(&ids), &mut a).unwrap();
    session.logits(Context { entries: Entries::Embeddings(&embedded), ..tokens(&ids) }, &mut b).unwrap();
    assert_eq!(a, b);
    // NLL is minus the log-softmax of the same logits at the next token.
    let mut nll = vec![0f32; ids.len()];
    session.nll(tokens(&ids), &mut nll).unwrap();
    for i in 0..ids.len() - 1 {
        let row = &a[i * VOCAB..(i + 1) * VOCAB];
        let want =
            row.iter().map(|z| f64::from(*z).exp()).sum::<f64>().ln() - f64::from(row[ids[i + 1] as usize]);
        assert!((f64::from(nll[i]) - want).abs() < 1e-5);
    }
    assert!(nll[ids.len() - 1].is_nan());
    // Positions given outright are the ones counted; other positions give other logits.
    session.logits(Context { mu: Some(&[0., 1., 2., 3., 4.]), ..tokens(&ids) }, &mut b).unwrap();
    assert_eq!(a, b);
    session.logits(Context { mu: Some(&[0., 5., 9., 30., 31.]), ..tokens(&ids) }, &mut b).unwrap();
    assert_ne!(a, b);
    let half = session.describe().unwrap()["head_dim"].as_u64().unwrap() as usize / 2;
    let (mut cos, mut sin) = (vec![0f32; half], vec![0f32; half]);
    session.rope_tables(&[3.0], Some(&[0.0]), &mut cos, &mut sin).unwrap();
    assert!(cos.iter().zip(&sin).all(|(c, s)| (c * c + s * s - 1.0).abs() < 1e-6));
    session.rope_tables(&[3.0], Some(&[2.0]), &mut cos, &mut sin).unwrap();
    assert!(cos[0].hypot(sin[0]) < 0.2, "a spread of two tokens leaves e^-2 of the fastest band");
}

/// How the parameters of a group are stored.
fn stored(session: &Session, group: &str) -> Vec<String> {
    let groups = session.parameter_groups().unwrap();
    let parameters = groups[group]["parameters"].as_array().unwrap().clone();
    parameters.into_iter().map(|p| p["stored"].as_str().unwrap().to_string()).collect()
}

#[test]
fn in_bf16_what_learns_becomes_f32_and_a_roll_back_undoes_it() {
    let fixture = Fixture::new();
    let config = json!({ "base": fixture.path("base"), "dtype": "bf16" });
    let rolling_back = Session::open(config.clone(), Recorder::new(Answer::RollBack)).unwrap();
    let keeping = Session::open(config, Recorder::new(Answer::Continue)).unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    let values = |session: &Session| session.parameter(name).unwrap().1;
    let before = values(&keeping);
    for session in [&rolling_back, &keeping] {
        assert!(stored(session, "base").iter().all(|s| s == "bf16"));
        assert!(stored(session, "norms").iter().all(|s| s == "f32"));
        session.enter_phase(json!({ "groups": ["base"] })).unwrap();
        assert!(stored(session, "base").iter().all(|s| s == "f32"));
        assert!(stored(session, "embeddings").iter().all(|s| s == "bf16"));
        assert_eq!(values(session), before);
        session.step(batch()).unwrap();
        assert_ne!(values(session), before);
        session.leave_phase().unwrap();
    }
    assert!(stored(&rolling_back, "base").iter().all(|s| s == "bf16"));
    assert_eq!(values(&rolling_back), before);
    assert!(stored(&keeping, "base").iter().all(|s| s == "f32"));
    assert_ne!(values(&keeping), before);
    // The next phase swaps what learns; what was learned stays to the bit.
    let learned = values(&keeping);
    keeping.enter_phase(json!({ "groups": ["embeddings", "norms"] })).unwrap();
    keeping.step(batch()).unwrap();
    assert_eq!(values(&keeping), learned);
}

/// The values of a parameter in the test's hands, stored in f32.
fn lent_values(lent: &Lent) -> &[f32] {
    let shared = lent.shared();
    assert_eq!(shared.dtype(), candle_core::DType::F32);
    // SAFETY: as many f32 as the shape has, for as long as `lent` lives.
    unsafe { std::slice::from_raw_parts(shared.data().cast(), shared.shape().iter().product()) }
}

#[test]
fn a_shared_parameter_is_the_sessions_own_and_holds_off_who_would_write_it() {
    let fixture = Fixture::new();
    let session = open(&fixture, None, Recorder::new(Answer::RollBack));
    session.enter_phase(json!({ "groups": ["lora"] })).unwrap();
    session.step(batch()).unwrap();
    let name = "model.layers.0.self_attn.q_proj.lora_B.weight";
    let (shape, copied) = session.parameter(name).unwrap();
    let lent = session.shared_parameter(name).unwrap();
    assert_eq!((lent.shared().shape(), lent_values(&lent)), (&shape[..], &copied[..]));
    // No copy: the same memory as whoever asks next is given.
    let again = session.shared_parameter(name).unwrap();
    assert_eq!(again.shared().data(), lent.shared().data());
    // What would write it is refused, what reads is not.
    usage(session.step(batch()), "step: expected no shared parameter in the host's hands, got 2");
    for refused in [session.set_adapter(json!({ "name": null })), session.merge_adapter()] {
        usage(refused, "expected no shared parameter in the host's hands, got 2");
    }
    usage(session.resume(Path::new("nowhere")), "expected no shared parameter");
    session.evaluate(batch()).unwrap();
    drop(again);
    usage(session.step(batch()), "got 1 of shared_parameter");
    drop(lent);
    session.step(batch()).unwrap();
    // A phase that is undone while one is held leaves what is held as it was, and so does the session's end.
    let lent = session.shared_parameter(name).unwrap();
    let learned = session.parameter(name).unwrap().1;
    assert_ne!(learned, copied);
    session.leave_phase().unwrap();
    assert!(session.parameter(name).is_err(), "the phase brought its LoRA and took it away");
    drop(session);
    assert_eq!(lent_values(&lent), learned);
}

#[test]
fn a_shared_parameter_is_as_it_is_stored() {
    let fixture = Fixture::new();
    let config = json!({ "base": fixture.path("base"), "dtype": "bf16" });
    let session = Session::open(config, Recorder::new(Answer::Continue)).unwrap();
    let lent = session.shared_parameter("model.layers.0.mlp.up_proj.weight").unwrap();
    let (shape, copied) = session.parameter("model.layers.0.mlp.up_proj.weight").unwrap();
    assert_eq!((lent.shared().dtype(), lent.shared().shape()), (candle_core::DType::BF16, &shape[..]));
    let bits = lent.shared().data().cast::<u16>();
    for (at, value) in copied.iter().enumerate() {
        // SAFETY: as many bf16 as the shape has.
        assert_eq!(u32::from(unsafe { *bits.add(at) }) << 16, value.to_bits());
    }
    usage(
        session.shared_parameter("no.such").map(|_| ()),
        "shared_parameter: there is none named \"no.such\"",
    );
}

#[test]
fn in_bf16_a_checkpoint_brings_back_what_learned_in_f32() {
    let fixture = Fixture::new();
    let open = || {
        let config = json!({ "base": fixture.path("base"), "dtype": "bf16" });
        Session::open(config, Recorder::new(Answer::Continue)).unwrap()
    };
    let embedding = |session: &Session| session.parameter("model.embed_tokens.weight").unwrap().1;
    let first = open();
    first.enter_phase(json!({ "groups": ["embeddings"] })).unwrap();
    first.step(batch()).unwrap();
    first.leave_phase().unwrap();
    first.enter_phase(json!({ "groups": ["lora"], "lora": { "r": 2 } })).unwrap();
    first.step(batch()).unwrap();
    let dir = fixture.path("saved");
    first.save(&dir).unwrap();
    let second = open();
    second.enter_phase(json!({ "groups": ["lora"], "lora": { "r": 2 } })).unwrap();
    second.resume(&dir).unwrap();
    assert_eq!(embedding(&second), embedding(&first));
    assert_eq!(second.step(batch()).unwrap(), first.step(batch()).unwrap());
    // A session of another class is another configuration.
    let other =
        Session::open(json!({ "base": fixture.path("base") }), Recorder::new(Answer::Continue)).unwrap();
    other.enter_phase(json!({ "groups": ["lora"], "lora": { "r": 2 } })).unwrap();
    usage(other.resume(&dir), "another");
}

#[test]
fn a_phase_learns_and_export_carries_it() {
    let fixture = Fixture::new();
    let host = Recorder::new(Answer::Continue);
    let session = open(&fixture, None, host.clone());
    usage(session.step(batch()), "enter a phase first");
    session.enter_phase(json!({ "groups": ["lora", "norms"], "lora": { "r": 4 }, "context": 64 })).unwrap();
    usage(session.enter_phase(json!({ "groups": ["lora"] })), "leave it first");
    let before = session.evaluate(batch()).unwrap()["nll"].as_f64().unwrap();
    for _ in 0..120 {
        session.step(batch()).unwrap();
    }
    let after = session.evaluate(batch()).unwrap()["nll"].as_f64().unwrap();
    assert!(after < 0.9 * before, "120 steps on one batch took the loss from {before} to {after} only");
    let left = session.leave_phase().unwrap();
    assert_eq!((left["steps"].as_u64(), left["rolled_back"].as_bool()), (Some(120), Some(false)));
    assert_eq!(*host.heard.lock().unwrap(), ["entered", "left"]);

    // What LoRA adds is what distinguishes the weight: not zero after training.
    let (shape, _) = session.parameter("model.layers.0.self_attn.q_proj.weight").unwrap();
    let mut delta = vec![0f32; shape.iter().product()];
    session.lora_delta("model.layers.0.self_attn.q_proj", &mut delta).unwrap();
    assert!(delta.iter().any(|v| *v != 0.0));
    usage(session.lora_delta("model.layers.0.mlp.up_proj", &mut delta), "expected one of");

    let adapter = fixture.path("exported");
    session.export(&adapter).unwrap();
    let again = open(&fixture, Some(adapter.to_str().unwrap()), Recorder::new(Answer::Continue));
    let loaded = again.evaluate(batch()).unwrap()["nll"].as_f64().unwrap();
    assert!((loaded - after).abs() < 1e-6, "exported {after}, loaded {loaded}");
}

#[test]
fn a_phase_rolled_back_never_was() {
    let fixture = Fixture::new();
    let session = open(&fixture, None, Recorder::new(Answer::RollBack));
    let (state, before) = (session.describe().unwrap(), session.evaluate(batch()).unwrap());
    let phase = json!({ "groups": ["lora", "embeddings", "norms"], "context": 128 });
    session.enter_phase(phase.clone()).unwrap();
    assert_ne!(session.evaluate(batch()).unwrap(), before, "positions are stretched");
    for _ in 0..3 {
        session.step(batch()).unwrap();
    }
    // What a checkpoint brings is rolled back with the rest.
    session.save(&fixture.path("saved")).unwrap();
    session.resume(&fixture.path("saved")).unwrap();
    assert_eq!(session.leave_phase().unwrap()["rolled_back"], json!(true));
    assert_eq!(session.evaluate(batch()).unwrap(), before);
    assert_eq!(session.describe().unwrap(), state);
    assert!(session.parameter("model.layers.0.self_attn.q_proj.lora_A.weight").is_err());
    usage(session.export(&fixture.path("adapter")), "carries no LoRA");

    let unwilling = open(&fixture, None, Recorder::answering(Answer::Stop, Answer::Continue));
    assert_eq!(unwilling.enter_phase(phase).unwrap_err().kind, Kind::Cancelled);
    assert_eq!(unwilling.describe().unwrap(), state);
    assert_eq!(unwilling.evaluate(batch()).unwrap(), before);
}

#[test]
fn a_host_may_read_but_not_change_a_session_that_is_asking_it() {
    let fixture = Fixture::new();
    let host = Recorder::new(Answer::Stop);
    let session = Arc::new(open(&fixture, None, host.clone()));
    host.session.set(Arc::downgrade(&session)).unwrap();
    session.enter_phase(json!({ "groups": ["lora"] })).unwrap();
    session.step(batch()).unwrap();
    let learned = session.evaluate(batch()).unwrap();
    // Stop ends the phase and keeps what was learned.
    assert_eq!(session.leave_phase().unwrap()["rolled_back"], json!(false));
    assert_eq!(session.evaluate(batch()).unwrap(), learned);
    assert_eq!(*host.heard.lock().unwrap(), ["entered", "left"]);
}

#[test]
fn a_phase_that_cannot_be_is_refused_before_anything_changes() {
    let fixture = Fixture::new();
    let session = open(&fixture, None, Recorder::new(Answer::Continue));
    let state = session.describe().unwrap();
    for (phase, says) in [
        (json!({ "groups": ["lora"], "context": 1 }), "context: expected 2 to"),
        (json!({ "groups": ["lora"], "context": (1u64 << 24) + 1 }), "context: expected 2 to"),
        (json!({ "groups": ["lora"], "context": 64, "lora": { "r": 0 } }), "rank"),
        (json!({ "groups": ["lora"], "context": 64, "optimizer": { "lr": -1.0 } }), "optimizer.lr"),
        (json!({ "groups": ["norms"], "context": 64, "optimizer": { "schedule": "cosine" } }), "steps"),
        (json!({ "groups": ["norms"], "context": 64, "steps": 0 }), "steps"),
    ] {
        usage(session.enter_phase(phase), says);
        assert_eq!(session.describe().unwrap(), state);
    }
}

#[test]
fn every_phase_has_its_own_settings() {
    let fixture = Fixture::new();
    // lora_A of a second phase's first step; the first phase is the same everywhere.
    let second = |settings: Value| {
        let session = open(&fixture, None, Recorder::new(Answer::Continue));
        session.enter_phase(json!({ "groups": ["lora"], "lora": { "dropout": 0.5 } })).unwrap();
        session.step(batch()).unwrap();
        session.leave_phase().unwrap();
        session.enter_phase(settings).unwrap();
        session.step(batch()).unwrap();
        session.parameter("model.layers.0.self_attn.q_proj.lora_A.weight").unwrap().1
    };
    let plain = second(json!({ "groups": ["lora"] }));
    assert_eq!(plain, second(json!({ "groups": ["lora"] })));
    for other in [
        json!({ "groups": ["lora"], "optimizer": { "weight_decay": 0.5 } }),
        json!({ "groups": ["lora"], "optimizer": { "betas": [0.5, 0.5] } }),
        json!({ "groups": ["lora"], "optimizer": { "eps": 0.1 } }),
        json!({ "groups": ["lora"], "optimizer": { "clip": 1e-6 } }),
        json!({ "groups": ["lora"], "seed": 1 }),
    ] {
        assert_ne!(plain, second(other.clone()), "{other}");
    }

    // A cosine falls to a tenth over the steps of the phase, and stays there.
    let session = open(&fixture, None, Recorder::new(Answer::Continue));
    let cosine = json!({ "lr": 1.0e-3, "schedule": "cosine", "warmup_steps": 0 });
    session.enter_phase(json!({ "groups": ["norms"], "steps": 4, "optimizer": cosine })).unwrap();
    let step = || session.step(json!({ "tokens": batch()["tokens"] })).unwrap()["lr"].as_f64().unwrap();
    let rates: Vec<f64> = (0..6).map(|_| step()).collect();
    for (at, want) in [(0, 1.0e-3), (2, 5.5e-4), (4, 1.0e-4), (5, 1.0e-4)] {
        assert!((rates[at] - want).abs() < 1e-12, "{rates:?}");
    }
}

#[test]
fn a_trained_base_goes_without_lora_and_into_no_adapter() {
    let fixture = Fixture::new();
    let session = open(&fixture, None, Recorder::new(Answer::Continue));
    session.enter_phase(json!({ "groups": ["base"] })).unwrap();
    session.step(batch()).unwrap();
    session.leave_phase().unwrap();
    session.enter_phase(json!({ "groups": ["lora"] })).unwrap();
    usage(session.export(&fixture.path("adapter")), "the base's own weights were trained");
    session.leave_phase().unwrap();
    usage(session.enter_phase(json!({ "groups": ["base"] })), "has to stay frozen");
    usage(session.enter_phase(json!({ "groups": ["base", "norms"] })), "has to stay frozen");
}

#[test]
fn targets_alone_may_be_left_out() {
    let fixture = Fixture::new();
    let session = open(&fixture, None, Recorder::new(Answer::Continue));
    let none = u32::MAX;
    let all = session.evaluate(json!({ "tokens": [[1, 2, 3], [4, 5, 6]] })).unwrap();
    let a = json!({ "tokens": [[1, 2, 3], [4, 5, none]] });
    let last = session.evaluate(json!({ "tokens": [[4, 5, 6]] })).unwrap()["nll"].as_f64().unwrap();
    let but_last = session.evaluate(json!({ "tokens": [[4, 5]] })).unwrap()["nll"].as_f64().unwrap();
    let part = session.evaluate(a.clone()).unwrap();
    assert_eq!((all["tokens"].as_u64(), part["tokens"].as_u64()), (Some(4), Some(3)));
    let want = (all["nll"].as_f64().unwrap() * 4.0 - (2.0 * last - but_last)) / 3.0;
    assert!((part["nll"].as_f64().unwrap() - want).abs() < 1e-5, "{part} {want}");
    session.enter_phase(json!({ "groups": ["lora"] })).unwrap();
    let step = session.step(a).unwrap();
    assert_eq!(step["tokens"], json!(3));
    assert!((step["loss"].as_f64().unwrap() - want).abs() < 1e-5);
    usage(session.step(json!({ "tokens": [[1, none, 3]] })), "token id: expected below 300");
    usage(session.evaluate(json!({ "tokens": [[none, 3]] })), "token id: expected below 300");
    usage(session.evaluate(json!({ "tokens": [[3, none]] })), "at least one target");
    usage(session.embed(&[none], &mut [0.0; 32]), "token id: expected below 300");
    usage(session.step(json!({ "tokens": [[1, 2]], "lr": -0.1 })), "lr: expected 0 or more");
}

#[test]
fn a_phase_goes_on_from_its_checkpoint_with_the_same_numbers() {
    let fixture = Fixture::new();
    let phase = json!({ "groups": ["lora", "norms"], "seed": 3 });
    let whole = open(&fixture, None, Recorder::new(Answer::Continue));
    whole.enter_phase(phase.clone()).unwrap();
    for _ in 0..3 {
        whole.step(batch()).unwrap();
    }
    whole.save(&fixture.path("saved")).unwrap();
    let expected: Vec<Value> = (0..3).map(|_| whole.step(batch()).unwrap()).collect();

    let later = open(&fixture, None, Recorder::new(Answer::Continue));
    later.enter_phase(phase).unwrap();
    assert_eq!(later.resume(&fixture.path("saved")).unwrap()["step"], json!(3));
    let got: Vec<Value> = (0..3).map(|_| later.step(batch()).unwrap()).collect();
    assert_eq!(got, expected);

    let other = open(&fixture, None, Recorder::new(Answer::Continue));
    other.enter_phase(json!({ "groups": ["norms"] })).unwrap();
    usage(other.resume(&fixture.path("saved")), "configuration");
}

#[test]
fn a_checkpoint_holds_what_earlier_phases_learned() {
    let fixture = Fixture::new();
    let steps = |session: &Session, n: usize| (0..n).for_each(|_| drop(session.step(batch()).unwrap()));
    let session = open(&fixture, None, Recorder::new(Answer::Continue));
    session.enter_phase(json!({ "groups": ["lora", "norms", "embeddings"] })).unwrap();
    steps(&session, 3);
    session.leave_phase().unwrap();
    session.enter_phase(json!({ "groups": ["lora"], "seed": 5 })).unwrap();
    steps(&session, 2);
    session.save(&fixture.path("saved")).unwrap();
    let expected = session.evaluate(batch()).unwrap();

    // A session that has gone elsewhere meanwhile is all the same the one that saved.
    let later = open(&fixture, None, Recorder::new(Answer::Continue));
    later.enter_phase(json!({ "groups": ["lora", "norms"] })).unwrap();
    steps(&later, 1);
    usage(later.resume(&fixture.path("saved")), "expected a checkpoint of a phase over");
    later.leave_phase().unwrap();
    later.enter_phase(json!({ "groups": ["lora"] })).unwrap();
    later.resume(&fixture.path("saved")).unwrap();
    assert_eq!(later.evaluate(batch()).unwrap(), expected);
    assert_eq!(later.step(batch()).unwrap(), session.step(batch()).unwrap());
    // The phase began at step 3 of the session that saved.
    assert_eq!(later.leave_phase().unwrap()["steps"], json!(3));

    // And the other way round: what the saved one had not touched is as in the base again.
    let plain = open(&fixture, None, Recorder::new(Answer::Continue));
    plain.enter_phase(json!({ "groups": ["lora"] })).unwrap();
    steps(&plain, 1);
    plain.save(&fixture.path("plain")).unwrap();
    let expected = plain.evaluate(batch()).unwrap();
    later.enter_phase(json!({ "groups": ["lora"] })).unwrap();
    assert_ne!(later.evaluate(batch()).unwrap(), expected);
    later.resume(&fixture.path("plain")).unwrap();
    assert_eq!(later.evaluate(batch()).unwrap(), expected);
    assert_eq!(later.leave_phase().unwrap()["steps"], json!(1));
}

#[test]
fn save_overwrites_nothing_but_its_own() {
    let fixture = Fixture::new();
    let saved = fixture.path("saved");
    let session = open(&fixture, None, Recorder::new(Answer::RollBack));
    session.enter_phase(json!({ "groups": ["norms"] })).unwrap();
    for _ in 0..2 {
        session.step(batch()).unwrap();
        session.save(&saved).unwrap();
    }
    session.save(&saved).unwrap();
    session.leave_phase().unwrap();
    session.enter_phase(json!({ "groups": ["norms"] })).unwrap();
    session.step(batch()).unwrap();
    usage(session.save(&saved), "got one of step 2");
    // A damaged one does not count.
    let manifest = saved.join("checkpoints/00000002/manifest.json");
    let whole = fs::read(&manifest).unwrap();
    fs::write(&manifest, b"{").unwrap();
    session.save(&saved).unwrap();
    assert!(!manifest.exists() && whole.len() > 1);

    let other = open(&fixture, None, Recorder::new(Answer::Continue));
    other.enter_phase(json!({ "groups": ["lora"] })).unwrap();
    for _ in 0..3 {
        other.step(batch()).unwrap();
    }
    usage(other.save(&saved), "another folder");
    for sign in ["config.toml", "metrics.jsonl", ".lock"] {
        let run = fixture.path(&format!("run-{sign}"));
        fs::create_dir(&run).unwrap();
        fs::write(run.join(sign), "").unwrap();
        usage(other.save(&run), "got a run's");
        assert!(!run.join("checkpoints").exists());
    }
}

#[test]
fn the_hosts_own_documents_are_trained_on_and_its_word_is_final() {
    let fixture = Fixture::new();
    let job = |out: &str| {
        json!({
            "base": fixture.path("base"), "data": ["host:mine"], "out": fixture.path(out), "context": 64, "steps": 2,
            "batch": { "tokens_per_step": 256 }, "eval": { "max_tokens": 200 },
        })
    };
    let host = Recorder::new(Answer::Continue);
    let summary = jobs::run("extend", job("taken"), &*host).unwrap();
    let documents = |key: &str| summary["data"][key].as_u64().unwrap();
    assert_eq!(documents("train_documents") + documents("held_out_documents"), 300);
    assert!(fixture.path("taken/adapter").is_dir());
    let host = Recorder::new(Answer::RollBack);
    let error = jobs::run("extend", job("refused"), &*host).unwrap_err();
    assert_eq!(error.kind, Kind::Cancelled);
    assert!(!fixture.path("refused/adapter").exists());
}

#[test]
fn sizes_that_do_not_fit_are_refused_before_anything_is_written() {
    let fixture = Fixture::new();
    let session = open(&fixture, None, Recorder::new(Answer::Continue));
    let mut out = vec![7f32; 3];
    usage(session.embed(&[1, 2], &mut out), "expected 64 values, got 3");
    usage(session.logits(tokens(&[1]), &mut out), "expected 300 values, got 3");
    usage(session.logits(tokens(&[300]), &mut out), "expected below 300, got 300");
    usage(session.nll(tokens(&[]), &mut out), "at least 1");
    usage(session.rope_tables(&[f64::NAN], None, &mut [0.0; 4], &mut [0.0; 4]), "finite");
    usage(session.rope_tables(&[1.0], Some(&[-1.0]), &mut [0.0; 4], &mut [0.0; 4]), "at least 0");
    assert_eq!(out, [7.0; 3]);
    let jobs_only = Session::open(json!({}), Recorder::new(Answer::Continue)).unwrap();
    usage(jobs_only.embed(&[1], &mut out), "without a base");
    usage(session.enter_phase(json!({ "groups": ["gistnet"] })), "gistnet");
    usage(session.enter_phase(json!({ "groups": ["lora", "base"] })), "has to stay frozen");
    usage(session.run("dance", json!({})), "dance");
}
