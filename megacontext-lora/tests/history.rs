//! A session's history: gists through the session are those of the network and of the base's tree, stored and taken up; what
//! is refused leaves it as it was.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::Fixture;
use gistnet_adapter::{GistNet, GistNetConfig, Identity};
use megacontext_base::rope::{SigmaPreset, SigmaRule};
use megacontext_kernels::precision::Precision;
use megacontext_lora::error::{Kind, Result};
use megacontext_lora::host::HostApi;
use megacontext_lora::jobs::ModelDir;
use megacontext_lora::session::Session;
use serde_json::{Value, json};

const BLOCK: usize = 4;
const WIDTH: usize = 32;

struct Silent;

impl HostApi for Silent {
    fn event(&self, _: &str, _: &Value) {}

    fn cancelled(&self) -> bool {
        false
    }
}

fn open(fixture: &Fixture) -> Session {
    Session::open(json!({ "base": fixture.path("base") }), Arc::new(Silent)).unwrap()
}

fn network(seed: u64, version: u16) -> GistNet {
    let mut network =
        GistNet::new(GistNetConfig { block: BLOCK, ..GistNetConfig::new(WIDTH, 4) }, seed).unwrap();
    network.set_gist_version(version);
    network
}

/// The network of this seed and version as a file for the fixture's base.
fn saved(fixture: &Fixture, session: &Session, name: &str, seed: u64, version: u16) -> String {
    let fingerprint = session.describe().unwrap()["fingerprint"].as_str().unwrap().to_string();
    network(seed, version).save(&fixture.path(name), &Identity::of_base(&fingerprint)).unwrap();
    fixture.at(name)
}

fn ids(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 37 + 11) % 300).collect()
}

fn gists(session: &Session, lod: u32, nodes: usize) -> Vec<f32> {
    let mut out = vec![0.0; nodes * WIDTH];
    session.tree_gists(lod, 0, &mut out).unwrap();
    out
}

#[track_caller]
fn refused(result: Result<impl std::fmt::Debug>, kind: Kind, parts: &[&str]) {
    let error = result.unwrap_err();
    assert_eq!(error.kind, kind, "{error}");
    for part in parts {
        assert!(error.message.contains(part), "\"{part}\" is missing in: {error}");
    }
}

#[test]
fn appended_tokens_become_the_networks_gists() {
    let fixture = Fixture::new();
    let session = open(&fixture);
    let file = saved(&fixture, &session, "gistnet.safetensors", 3, 5);
    let opened = session.open_tree(json!({ "network": file })).unwrap();
    assert_eq!(opened["nodes"], json!({ "LOD1": 0, "LOD2": 0 }));
    assert_eq!((&opened["gist_version"], &opened["base"]["name"]), (&json!(5), &json!("base")));
    let all = ids(39);
    assert_eq!(session.tree_append(&all[..17]).unwrap()["made"], json!([4, 1]));
    let described = session.tree_append(&all[17..]).unwrap();
    assert_eq!(described["made"], json!([5, 1]));
    assert_eq!((&described["tokens"], &described["stale"]), (&json!(39), &json!(0)));
    // By hand: embeddings, the network, the network again.
    let mut embedded = vec![0.0; all.len() * WIDTH];
    session.embed(&all, &mut embedded).unwrap();
    let by_hand = network(3, 5);
    let lod1 = by_hand.gists(&embedded[..36 * WIDTH], 9).unwrap();
    let lod2 = by_hand.gists(&lod1[..8 * WIDTH], 2).unwrap();
    assert_eq!((gists(&session, 1, 9), gists(&session, 2, 2)), (lod1.clone(), lod2.clone()));
    let mut some = vec![0.0; 2 * WIDTH];
    session.tree_gists(1, 4, &mut some).unwrap();
    assert_eq!(some, lod1[4 * WIDTH..6 * WIDTH]);
    // Blocks that are in no history.
    let mut out = vec![0.0; 9 * WIDTH];
    session.gists(&embedded[..36 * WIDTH], 0, &mut out).unwrap();
    assert_eq!(out, lod1);
    session.gists(&lod1[..8 * WIDTH], 1, &mut out[..2 * WIDTH]).unwrap();
    assert_eq!(out[..2 * WIDTH], lod2);
    session.gists(&[], 0, &mut []).unwrap();
}

#[test]
fn a_stored_history_goes_on() {
    let fixture = Fixture::new();
    let session = open(&fixture);
    let file = saved(&fixture, &session, "gistnet.safetensors", 3, 0);
    session.open_tree(json!({ "network": file, "levels": 3, "name": "micro" })).unwrap();
    session.tree_append(&ids(90)).unwrap();
    let dir = fixture.at("tree");
    session.save_tree(json!({ "path": dir, "dtype": "f32", "complete": true })).unwrap();
    let before = [gists(&session, 1, 22), gists(&session, 2, 5), gists(&session, 3, 1)];
    let later = open(&fixture);
    let opened = later.open_tree(json!({ "network": file, "stored": dir, "name": "micro" })).unwrap();
    assert_eq!((&opened["tokens"], &opened["levels"]), (&json!(90), &json!(3)));
    assert_eq!([gists(&later, 1, 22), gists(&later, 2, 5), gists(&later, 3, 1)], before);
    for session in [&session, &later] {
        session.tree_append(&ids(50)).unwrap();
    }
    assert_eq!(gists(&later, 2, 8), gists(&session, 2, 8));
    // In 16 bits it goes on too, from rounded gists.
    session.save_tree(json!({ "path": dir })).unwrap();
    let opened = later.open_tree(json!({ "network": file, "stored": dir, "name": "micro" })).unwrap();
    assert_eq!(opened["tokens"], json!(140));
    let (exact, got) = (gists(&session, 1, 35), gists(&later, 1, 35));
    assert!(
        exact != got
            && exact.iter().zip(&got).all(|(e, g)| (e - g).abs() <= 2f32.powi(-11) * e.abs().max(1e-3))
    );
    assert_eq!(later.tree_append(&ids(4)).unwrap()["tokens"], json!(144));
}

#[test]
fn a_history_of_an_earlier_version_is_refused_or_refreshed() {
    let fixture = Fixture::new();
    let session = open(&fixture);
    let old = saved(&fixture, &session, "old.safetensors", 3, 0);
    let new = saved(&fixture, &session, "new.safetensors", 8, 1);
    session.open_tree(json!({ "network": old })).unwrap();
    session.tree_append(&ids(90)).unwrap();
    let before = gists(&session, 1, 22);
    let dir = fixture.at("tree");
    session.save_tree(json!({ "path": dir, "dtype": "f32" })).unwrap();
    let stale = session.open_tree(json!({ "network": new, "stored": dir }));
    refused(stale, Kind::Model, &["expected gists of version 1, got version 0: refresh the tree"]);
    assert_eq!(gists(&session, 1, 22), before);
    let opened = session.open_tree(json!({ "network": new, "stored": dir, "refresh": true })).unwrap();
    assert_eq!((&opened["gist_version"], &opened["stale"]), (&json!(1), &json!(0)));
    let refreshed = gists(&session, 1, 22);
    session.open_tree(json!({ "network": new })).unwrap();
    session.tree_append(&ids(90)).unwrap();
    assert_eq!(gists(&session, 1, 22), refreshed);
    assert_ne!(refreshed, before);
}

#[test]
fn embeddings_that_learned_are_noticed() {
    let fixture = Fixture::new();
    let session = open(&fixture);
    let file = saved(&fixture, &session, "gistnet.safetensors", 3, 0);
    session.open_tree(json!({ "network": file })).unwrap();
    let all = ids(41);
    session.tree_append(&all).unwrap();
    let before = gists(&session, 1, 10);
    let step = |groups: &[&str]| {
        session.enter_phase(json!({ "groups": groups })).unwrap();
        // Gists are there to be read meanwhile.
        assert_eq!(gists(&session, 1, 10), before);
        session.step(json!({ "tokens": [all], "lr": 0.05 })).unwrap();
        session.leave_phase().unwrap();
    };
    step(&["norms"]);
    session.tree_append(&[]).unwrap();
    step(&["embeddings"]);
    refused(
        session.tree_append(&[1]),
        Kind::Usage,
        &[
            "tree_append: expected the network and the embeddings that made the history's gists",
            "open_tree begins it anew",
        ],
    );
    assert_eq!(gists(&session, 1, 10), before);
    session.open_tree(json!({ "network": file })).unwrap();
    session.tree_append(&all).unwrap();
    assert_ne!(gists(&session, 1, 10), before);
}

/// The fingerprint of an adapter on the fixture's base, as a job would have it in this class.
fn fingerprint(fixture: &Fixture, adapter: Option<&str>, precision: Precision) -> String {
    let model = ModelDir::open(&fixture.path("base")).unwrap();
    let (decoder, scaling, adapter) = model.decoder_with(adapter.map(Path::new), precision).unwrap();
    let names = adapter.iter().flat_map(|adapter| adapter.parameters(decoder.config()).map(|(name, _)| name));
    decoder.adapter_fingerprint(&model.config, &model.weights, &scaling, names).unwrap()
}

/// A network that was trained beside what has this fingerprint, at these places.
fn trained(fixture: &Fixture, session: &Session, adapter: &str, places: SigmaRule) -> String {
    let base = session.describe().unwrap()["fingerprint"].as_str().unwrap().to_string();
    let identity = Identity {
        adapter_fingerprint: Some(adapter.to_string()),
        place_rule: Some(places),
        ..Identity::of_base(&base)
    };
    network(3, 0).save(&fixture.path("trained.safetensors"), &identity).unwrap();
    fixture.at("trained.safetensors")
}

#[test]
fn a_network_trained_beside_another_adapter_is_refused_unless_it_is_wanted() {
    let fixture = Fixture::new();
    let dir = fixture.adapter("run");
    let own = fingerprint(&fixture, Some(&dir), Precision::F32);
    assert_eq!(own, fingerprint(&fixture, Some(&dir), Precision::Bf16));
    assert_eq!(fingerprint(&fixture, None, Precision::Bf16), "none");
    let called = format!("the adapter {}…", &own[..12]);
    let beside = |session: &Session, adapter: &str| json!({ "network": trained(&fixture, session, adapter, SigmaRule::default()) });
    let alone = open(&fixture);
    refused(
        alone.open_tree(beside(&alone, &own)),
        Kind::Model,
        &[
            "expected a GistNet that was trained beside the base model alone",
            &format!("got one that was trained beside {called}"),
            "other_adapter",
        ],
    );
    alone.open_tree(beside(&alone, "none")).unwrap();
    let mut wanted = beside(&alone, &own);
    wanted["other_adapter"] = json!(true);
    alone.open_tree(wanted).unwrap();
    // With the adapter it is the other way round, in another class and after switching too.
    let config = json!({ "base": fixture.path("base"), "adapter": dir, "dtype": "bf16" });
    let adapted = Session::open(config, Arc::new(Silent)).unwrap();
    adapted.open_tree(beside(&adapted, &own)).unwrap();
    refused(
        adapted.open_tree(beside(&adapted, "none")),
        Kind::Model,
        &[&format!("trained beside {called}, got one that was trained beside the base model alone")],
    );
    adapted.set_adapter(json!({ "name": null })).unwrap();
    adapted.open_tree(beside(&adapted, "none")).unwrap();
    adapted.set_adapter(json!({ "name": "default" })).unwrap();
    adapted.open_tree(beside(&adapted, &own)).unwrap();
    adapted.merge_adapter().unwrap();
    adapted.open_tree(beside(&adapted, &own)).unwrap();
    adapted.unmerge_adapter().unwrap();
    // Trained on, it is another.
    adapted.enter_phase(json!({ "groups": ["lora"] })).unwrap();
    adapted.step(json!({ "tokens": [ids(41)], "lr": 0.05 })).unwrap();
    adapted.leave_phase().unwrap();
    refused(adapted.open_tree(beside(&adapted, &own)), Kind::Model, &[&format!("beside {called}: put on")]);
}

#[test]
fn lora_that_has_not_learned_is_no_adapter() {
    let fixture = Fixture::new();
    let session = open(&fixture);
    let file = trained(&fixture, &session, "none", SigmaRule::default());
    session.enter_phase(json!({ "groups": ["lora", "norms", "embeddings"] })).unwrap();
    session.leave_phase().unwrap();
    session.open_tree(json!({ "network": file })).unwrap();
    for groups in [["norms"], ["lora"]] {
        session.enter_phase(json!({ "groups": groups })).unwrap();
        session.step(json!({ "tokens": [ids(41)], "lr": 0.05 })).unwrap();
        session.leave_phase().unwrap();
        refused(session.open_tree(json!({ "network": file })), Kind::Model, &["beside the adapter "]);
    }
}

#[test]
fn a_network_trained_with_other_places_is_refused() {
    let fixture = Fixture::new();
    let session = open(&fixture);
    let original = SigmaRule { preset: SigmaPreset::Original, block: BLOCK, uniform: false };
    let file = trained(&fixture, &session, "none", original);
    refused(
        session.open_tree(json!({ "network": file })),
        Kind::Usage,
        &["places of the session's positions (document), got one trained with original"],
    );
    let config = json!({ "base": fixture.path("base"), "positions": { "sigma": { "preset": "original" } } });
    let session = Session::open(config, Arc::new(Silent)).unwrap();
    session.open_tree(json!({ "network": file })).unwrap();
}

#[test]
fn calls_without_a_history_are_refused() {
    let fixture = Fixture::new();
    let session = open(&fixture);
    let says = ["expected an open history, there is none; open_tree begins one"];
    refused(session.tree_append(&[1]), Kind::Usage, &says);
    refused(session.tree_gists(1, 0, &mut []), Kind::Usage, &says);
    refused(session.gists(&[], 0, &mut []), Kind::Usage, &says);
    refused(session.save_tree(json!({ "path": fixture.at("tree") })), Kind::Usage, &says);
    assert!(!fixture.path("tree").exists());
    let bare = Session::open(json!({}), Arc::new(Silent)).unwrap();
    refused(bare.open_tree(json!({ "network": "x" })), Kind::Usage, &["opened without a base"]);
    refused(bare.tree_append(&[1]), Kind::Usage, &["opened without a base"]);
}

/// A session with a history of 41 tokens, which `call` must not change.
fn unchanged(call: impl FnOnce(&Fixture, &Session)) {
    let fixture = Fixture::new();
    let session = open(&fixture);
    let file = saved(&fixture, &session, "gistnet.safetensors", 3, 0);
    session.open_tree(json!({ "network": file })).unwrap();
    session.tree_append(&ids(41)).unwrap();
    let before = gists(&session, 1, 10);
    call(&fixture, &session);
    assert_eq!(session.tree_append(&[]).unwrap()["tokens"], json!(41));
    assert_eq!(gists(&session, 1, 10), before);
}

#[test]
fn a_token_beyond_the_vocabulary_is_refused() {
    unchanged(|_, s| {
        refused(s.tree_append(&[3, 300]), Kind::Usage, &["token id: expected below 300, got 300"])
    });
}

#[test]
fn nodes_that_are_not_there_are_refused() {
    unchanged(|_, s| {
        let mut out = vec![0.0; 2 * WIDTH];
        refused(
            s.tree_gists(1, 9, &mut out),
            Kind::Usage,
            &["range of the 10 nodes of level 1, got 2 from 9 on"],
        );
        refused(s.tree_gists(1, u64::MAX, &mut out), Kind::Usage, &["range of the 10 nodes"]);
        refused(s.tree_gists(0, 0, &mut out), Kind::Usage, &["lod: expected 1 to 2, got 0"]);
        refused(s.tree_gists(3, 0, &mut out), Kind::Usage, &["lod: expected 1 to 2, got 3"]);
        refused(
            s.tree_gists(1, 0, &mut out[1..]),
            Kind::Usage,
            &["rows of the model's width: expected 32 values, got 63"],
        );
    });
}

#[test]
fn blocks_that_are_not_whole_are_refused() {
    unchanged(|_, s| {
        let mut out = vec![0.0; WIDTH];
        let block = vec![0.5; BLOCK * WIDTH];
        refused(
            s.gists(&block[1..], 0, &mut out),
            Kind::Usage,
            &["expected blocks of 4 entries of width 32, got 127 values"],
        );
        refused(s.gists(&block, 0, &mut out[1..]), Kind::Usage, &["gists: out: expected 32 values, got 31"]);
        refused(
            s.gists(&block, 2, &mut out),
            Kind::Usage,
            &["expected entries below level 2, the topmost, got 2"],
        );
        let spoiled: Vec<f32> =
            block.iter().enumerate().map(|(i, v)| if i == 9 { f32::NAN } else { *v }).collect();
        refused(s.gists(&spoiled, 0, &mut out), Kind::Usage, &["entries: expected finite numbers, got NaN"]);
    });
}

#[test]
fn a_network_of_another_base_or_width_is_refused() {
    unchanged(|fixture, s| {
        let path = fixture.path("other.safetensors");
        network(3, 0).save(&path, &Identity::of_base("another")).unwrap();
        let open = || s.open_tree(json!({ "network": path }));
        refused(open(), Kind::Model, &["other.safetensors", "another"]);
        GistNet::new(GistNetConfig::new(16, 4), 1)
            .unwrap()
            .save(&path, &Identity::of_base("another"))
            .unwrap();
        refused(open(), Kind::Model, &["width: expected 32, got a network of 16"]);
        std::fs::remove_file(&path).unwrap();
        assert!(open().is_err());
    });
}

#[test]
fn a_stored_history_of_another_base_block_or_depth_is_refused() {
    unchanged(|fixture, s| {
        let dir = fixture.at("tree");
        s.save_tree(json!({ "path": dir, "dtype": "f32" })).unwrap();
        let network = fixture.at("gistnet.safetensors");
        let open = |more: Value| {
            let mut params = json!({ "network": network, "stored": dir });
            params.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            s.open_tree(params)
        };
        refused(
            open(json!({ "name": "large" })),
            Kind::Model,
            &["base model \"large\", got one of \"base\""],
        );
        refused(
            open(json!({ "levels": 3 })),
            Kind::Usage,
            &["levels: expected 2, as the stored history has, got 3"],
        );
        let fingerprint = s.describe().unwrap()["fingerprint"].as_str().unwrap().to_string();
        let wide = fixture.path("wide.safetensors");
        let config = GistNetConfig { block: 8, ..GistNetConfig::new(WIDTH, 4) };
        GistNet::new(config, 1).unwrap().save(&wide, &Identity::of_base(&fingerprint)).unwrap();
        let other =
            |refresh: bool| s.open_tree(json!({ "network": wide, "stored": dir, "refresh": refresh }));
        refused(
            other(false),
            Kind::Model,
            &["gists of 8 entries of width 32, got one of 4 entries of width 32"],
        );
        refused(other(true), Kind::Usage, &["expected gists of 4 entries", "got a source for 8 entries"]);
        // Another network that says the same version.
        let same = saved(fixture, s, "same.safetensors", 8, 0);
        refused(
            s.open_tree(json!({ "network": same, "stored": dir })),
            Kind::Usage,
            &["open_tree: expected the network and the embeddings that made the history's gists"],
        );
    });
}

#[test]
fn settings_that_there_are_not_are_refused() {
    unchanged(|fixture, s| {
        let network = fixture.at("gistnet.safetensors");
        refused(s.open_tree(json!({})), Kind::Usage, &["network"]);
        refused(s.open_tree(json!({ "network": network, "levls": 2 })), Kind::Usage, &["levls"]);
        refused(
            s.open_tree(json!({ "network": network, "levels": 0 })),
            Kind::Usage,
            &["at least 1 above the tokens"],
        );
        refused(s.save_tree(json!({ "path": fixture.at("x"), "dtype": "f64" })), Kind::Usage, &["f64"]);
        let long = "n".repeat(33);
        s.save_tree(json!({ "path": fixture.at("tree") })).unwrap();
        let renamed = Fixture::new();
        let other = open(&renamed);
        let file = saved(&renamed, &other, "gistnet.safetensors", 3, 0);
        other.open_tree(json!({ "network": file, "name": long })).unwrap();
        let path = renamed.at("tree");
        refused(
            other.save_tree(json!({ "path": path })),
            Kind::Model,
            &["model_name: expected 1 to 32 bytes"],
        );
        assert!(!Path::new(&path).exists());
    });
}
