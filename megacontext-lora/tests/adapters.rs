//! A session with several adapters: switching without reading the base again, merging in memory, what is protected.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Fixture, VOCAB, edit_json, edit_tensor};
use megacontext_lora::error::{Kind, Result};
use megacontext_lora::host::{Answer, HostApi};
use megacontext_lora::session::{Context, Entries, Session};
use serde_json::{Value, json};

/// A host that answers every phase that ends in the same way.
struct Host(Answer);

impl HostApi for Host {
    fn event(&self, _: &str, _: &Value) {}
    fn cancelled(&self) -> bool {
        false
    }
    fn documents(&self, _: &str, _: u64, _: u64) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
    fn phase_entered(&self, _: &Value) -> Answer {
        Answer::Continue
    }
    fn phase_left(&self, _: &Value) -> Answer {
        self.0
    }
}

fn open(config: Value) -> Session {
    Session::open(config, Arc::new(Host(Answer::Continue))).unwrap()
}

fn on(fixture: &Fixture, adapter: Option<&str>) -> Session {
    open(json!({ "base": fixture.path("base"), "adapter": adapter }))
}

fn logits(session: &Session) -> Vec<f32> {
    let ids: Vec<u32> = (0..24).map(|i| 1 + (i * 11) % 290).collect();
    let mut out = vec![0f32; ids.len() * VOCAB];
    let context = Context { entries: Entries::Tokens(&ids), mu: None, sigma: None, lod: None, targets: None };
    session.logits(context, &mut out).unwrap();
    out
}

fn batch() -> Value {
    let row = |r: u32| (0..33).map(|i| 1 + (i * 7 + r * 13) % 40).collect::<Vec<u32>>();
    json!({ "tokens": [row(0), row(1)], "lr": 0.01 })
}

#[track_caller]
fn refused(result: Result<Value>, kind: Kind, says: &[&str]) {
    let error = result.unwrap_err();
    assert_eq!(error.kind, kind, "{error}");
    for part in says {
        assert!(error.message.contains(part), "\"{part}\" is missing in: {error}");
    }
}

/// Two adapters of one base: where they are.
fn two(fixture: &Fixture) -> (String, String) {
    let first = fixture.adapter("one");
    let args = common::with(
        fixture.extend("two"),
        &[("--stages", "64:4"), ("--context", "64"), ("--rank", "2"), ("--eval-tokens", "256")],
    );
    common::mclora(&args).success();
    (first, fixture.at("two/adapter"))
}

#[test]
fn switching_gives_each_adapter_its_own_logits_and_the_base_its_own() {
    let fixture = Fixture::new();
    let (one, two) = two(&fixture);
    let alone = [None, Some(one.as_str()), Some(&two)].map(|adapter| logits(&on(&fixture, adapter)));
    assert!(alone[0] != alone[1] && alone[1] != alone[2]);
    for dtype in ["f32", "bf16"] {
        let session = open(json!({ "base": fixture.path("base"), "dtype": dtype }));
        let bare = logits(&session);
        session.load_adapter(json!({ "name": "one", "path": one })).unwrap();
        let told = session.load_adapter(json!({ "name": "two", "path": two })).unwrap();
        assert_eq!(told, json!({ "active": null, "adapters": ["one", "two"] }));
        assert!(logits(&session) == bare, "loading alone changes nothing");
        let mut seen = Vec::new();
        for name in [Some("one"), Some("two"), None, Some("two"), Some("one"), None] {
            let told = session.set_adapter(json!({ "name": name })).unwrap();
            assert_eq!(told["active"], json!(name));
            seen.push(logits(&session));
            let told = session.describe().unwrap();
            assert_eq!((&told["adapter"], &told["adapters"]), (&json!(name), &json!(["one", "two"])));
            let (rope, context) = (told["rope"].as_str().unwrap(), told["context"].as_u64().unwrap());
            let expected = match name {
                Some("one") => ("linear x4", 128),
                Some(_) => ("linear x2", 64),
                None => ("none", 32),
            };
            assert_eq!((rope, context), expected);
        }
        assert!(seen[0] == seen[4] && seen[1] == seen[3] && seen[2] == bare && seen[5] == bare);
        if dtype == "f32" {
            assert_eq!([&seen[2], &seen[0], &seen[1]], [&alone[0], &alone[1], &alone[2]]);
        }
    }
}

#[test]
fn the_adapter_a_session_is_opened_with_is_the_default() {
    let fixture = Fixture::new();
    let (one, two) = two(&fixture);
    let session = on(&fixture, Some(&one));
    let with_one = logits(&session);
    session.load_adapter(json!({ "name": "two", "path": two })).unwrap();
    session.set_adapter(json!({ "name": "two" })).unwrap();
    assert!(logits(&session) == logits(&on(&fixture, Some(&two))));
    assert_eq!(session.describe().unwrap()["adapters"], json!(["default", "two"]));
    session.set_adapter(json!({ "name": "default" })).unwrap();
    assert!(logits(&session) == with_one);
    session.unload_adapter(json!({ "name": "default" })).unwrap();
    assert!(logits(&session) == logits(&on(&fixture, None)));
    session.unload_adapter(json!({ "name": "two" })).unwrap();
    assert_eq!(session.describe().unwrap()["adapters"], json!([]));
}

#[test]
fn what_a_phase_trained_stays_with_its_adapter() {
    let fixture = Fixture::new();
    let (one, _) = two(&fixture);
    let session = on(&fixture, None);
    let bare = logits(&session);
    let parameters = json!({ "groups": ["lora", "embeddings", "norms"], "lora": { "r": 2 }, "context": 64 });
    session.enter_phase(parameters.clone()).unwrap();
    session.step(batch()).unwrap();
    session.leave_phase().unwrap();
    let trained = logits(&session);
    session.load_adapter(json!({ "name": "one", "path": one })).unwrap();
    session.set_adapter(json!({ "name": "one" })).unwrap();
    assert!(logits(&session) == logits(&on(&fixture, Some(&one))));
    session.set_adapter(json!({ "name": null })).unwrap();
    assert!(logits(&session) == bare);
    session.set_adapter(json!({ "name": "default" })).unwrap();
    assert!(logits(&session) == trained);
    // The optimiser's moments came along: the next step is that of a session that never switched.
    let steadfast = on(&fixture, None);
    steadfast.enter_phase(parameters.clone()).unwrap();
    steadfast.step(batch()).unwrap();
    steadfast.leave_phase().unwrap();
    for session in [&steadfast, &session] {
        session.enter_phase(parameters.clone()).unwrap();
    }
    let (a, b) = (steadfast.step(batch()).unwrap(), session.step(batch()).unwrap());
    assert_eq!(a["loss"], b["loss"]);
    for session in [&steadfast, &session] {
        session.leave_phase().unwrap();
    }
    assert!(logits(&steadfast) == logits(&session));
    // It is protected until it is exported.
    refused(
        session.unload_adapter(json!({ "name": "default" })),
        Kind::Usage,
        &["default", "not exported", "force"],
    );
    session.export(&fixture.path("exported")).unwrap();
    session.unload_adapter(json!({ "name": "default" })).unwrap();
    assert!(logits(&session) == bare);
}

#[test]
fn a_trained_adapter_beside_the_model_is_only_unloaded_by_force() {
    let fixture = Fixture::new();
    let session = on(&fixture, None);
    session.enter_phase(json!({ "groups": ["lora"], "lora": { "r": 2 } })).unwrap();
    session.step(batch()).unwrap();
    session.leave_phase().unwrap();
    session.set_adapter(json!({ "name": null })).unwrap();
    refused(session.unload_adapter(json!({ "name": "default" })), Kind::Usage, &["not exported"]);
    session.unload_adapter(json!({ "name": "default", "force": true })).unwrap();
}

#[test]
fn a_phase_that_is_rolled_back_leaves_no_adapter() {
    let fixture = Fixture::new();
    let config = json!({ "base": fixture.path("base") });
    let session = Session::open(config, Arc::new(Host(Answer::RollBack))).unwrap();
    session.enter_phase(json!({ "groups": ["lora"], "lora": { "r": 2 } })).unwrap();
    assert_eq!(session.describe().unwrap()["adapter"], "default");
    session.step(batch()).unwrap();
    session.leave_phase().unwrap();
    let told = session.describe().unwrap();
    assert_eq!((&told["adapter"], &told["adapters"]), (&Value::Null, &json!([])));
}

#[test]
fn merging_in_memory_and_back_restores_every_weight() {
    let fixture = Fixture::new();
    let (one, two) = two(&fixture);
    let session = on(&fixture, Some(&one));
    let name = "model.layers.0.self_attn.q_proj.weight";
    let (before, adapted) = (session.parameter(name).unwrap(), logits(&session));
    assert_eq!(session.merge_adapter().unwrap(), json!({ "adapter": "default", "merged": 8 }));
    assert_eq!(session.describe().unwrap()["merged"], true);
    assert_ne!(session.parameter(name).unwrap(), before);
    let gap = logits(&session).iter().zip(&adapted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(gap > 0.0 && gap < 1e-4, "{gap}");
    // Whatever would read or change LoRA waits.
    session.load_adapter(json!({ "name": "two", "path": two })).unwrap();
    let says = &["unmerge it first"];
    refused(session.merge_adapter(), Kind::Usage, says);
    refused(session.set_adapter(json!({ "name": "two" })), Kind::Usage, says);
    refused(session.unload_adapter(json!({ "name": "default" })), Kind::Usage, says);
    refused(session.enter_phase(json!({ "groups": ["lora"] })), Kind::Usage, says);
    refused(session.export(&fixture.path("exported")), Kind::Usage, says);
    let mut delta = vec![0f32; 32 * 32];
    let error = session.lora_delta("model.layers.0.self_attn.q_proj", &mut delta).unwrap_err();
    assert!(error.message.contains("unmerge it first"), "{error}");
    assert_eq!(session.unmerge_adapter().unwrap(), json!({ "adapter": "default", "unmerged": 8 }));
    assert_eq!(session.parameter(name).unwrap(), before);
    assert!(logits(&session) == adapted);
    refused(session.unmerge_adapter(), Kind::Usage, &["expected merged LoRA"]);
}

#[test]
fn nothing_is_switched_during_a_phase() {
    let fixture = Fixture::new();
    let (one, _) = two(&fixture);
    let session = on(&fixture, None);
    session.load_adapter(json!({ "name": "one", "path": one })).unwrap();
    session.enter_phase(json!({ "groups": ["lora"], "lora": { "r": 2 } })).unwrap();
    session.step(batch()).unwrap();
    let trained = logits(&session);
    let says = &["a phase over", "leave it first"];
    refused(session.set_adapter(json!({ "name": "one" })), Kind::Usage, says);
    refused(session.unload_adapter(json!({ "name": "default", "force": true })), Kind::Usage, says);
    refused(session.merge_adapter(), Kind::Usage, says);
    assert!(logits(&session) == trained);
    // One that is not in use may come and go.
    session.unload_adapter(json!({ "name": "one" })).unwrap();
}

#[test]
fn a_trained_base_takes_no_other_adapter() {
    let fixture = Fixture::new();
    let (one, _) = two(&fixture);
    let session = on(&fixture, None);
    session.load_adapter(json!({ "name": "one", "path": one })).unwrap();
    session.enter_phase(json!({ "groups": ["base"] })).unwrap();
    session.step(batch()).unwrap();
    session.leave_phase().unwrap();
    let trained = logits(&session);
    refused(session.set_adapter(json!({ "name": "one" })), Kind::Usage, &["base's own weights were trained"]);
    assert!(logits(&session) == trained);
}

#[test]
fn a_name_that_is_taken_is_refused() {
    let fixture = Fixture::new();
    let (one, two) = two(&fixture);
    let session = on(&fixture, Some(&one));
    session.load_adapter(json!({ "name": "two", "path": two })).unwrap();
    for name in ["default", "two"] {
        refused(session.load_adapter(json!({ "name": name, "path": one })), Kind::Usage, &[name, "taken"]);
    }
}

#[test]
fn an_empty_name_is_refused() {
    let fixture = Fixture::new();
    let session = on(&fixture, None);
    refused(session.load_adapter(json!({ "name": "", "path": "x" })), Kind::Usage, &["expected a name"]);
}

#[test]
fn a_name_that_there_is_not_is_refused() {
    let fixture = Fixture::new();
    let session = on(&fixture, Some(&fixture.adapter("one")));
    for result in
        [session.set_adapter(json!({ "name": "two" })), session.unload_adapter(json!({ "name": "two" }))]
    {
        refused(result, Kind::Usage, &["default", "two"]);
    }
    assert_eq!(session.describe().unwrap()["adapter"], "default");
}

#[test]
fn an_adapter_of_another_base_is_refused() {
    let fixture = Fixture::new();
    let one = fixture.adapter("one");
    fixture.model("other", 2);
    let session = open(json!({ "base": fixture.path("other") }));
    refused(session.load_adapter(json!({ "name": "one", "path": one })), Kind::Adapter, &["fingerprint"]);
    assert_eq!(session.describe().unwrap()["adapters"], json!([]));
}

#[test]
fn an_adapter_that_unties_the_model_is_refused_beside_it() {
    let fixture = Fixture::new();
    let one = fixture.adapter("one");
    edit_json(&Path::new(&one).join("adapter_config.json"), |c| c["ensure_weight_tying"] = false.into());
    let head = "base_model.model.lm_head.weight";
    edit_tensor(&Path::new(&one).join("adapter_model.safetensors"), head, |t| (t * 1.5).unwrap());
    let session = on(&fixture, None);
    refused(session.load_adapter(json!({ "name": "one", "path": one })), Kind::Adapter, &["head of its own"]);
    // Opened with it, a session keeps it.
    let session = on(&fixture, Some(&one));
    refused(session.set_adapter(json!({ "name": null })), Kind::Usage, &["head of its own"]);
    session.enter_phase(json!({ "groups": ["lora"] })).unwrap();
    session.step(batch()).unwrap();
    session.leave_phase().unwrap();
    session.export(&fixture.path("exported")).unwrap();
    let again = on(&fixture, Some(&fixture.at("exported")));
    assert!(logits(&again) == logits(&session));
}
