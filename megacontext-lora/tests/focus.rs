//! LensNet over a session's history: scores are the network's, a context is edited within its limits as the history grows, a
//! host's allocator takes the place of the plugin's; what is refused leaves the held context as it was.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use common::Fixture;
use gistnet_adapter::{GistNet, GistNetConfig};
use lensnet_adapter::trainer::{Seen, focus};
use lensnet_adapter::{Identity, LensNet, LensNetConfig};
use megacontext_base::rope::{SigmaPreset, SigmaRule};
use megacontext_lora::error::{Kind, PluginError, Result};
use megacontext_lora::host::HostApi;
use megacontext_lora::session::Session;
use serde_json::{Value, json};

const BLOCK: usize = 4;
const WIDTH: usize = 32;
const RULE: SigmaRule = SigmaRule { preset: SigmaPreset::Document, block: BLOCK, uniform: false };

type Answer = Box<dyn Fn(&Value) -> Result<Option<Value>> + Send + Sync>;

/// A host that remembers what it is told, and answers as it was told to.
#[derive(Default)]
struct Host {
    events: Mutex<Vec<(String, Value)>>,
    asked: Mutex<Vec<Value>>,
    answer: Mutex<Option<Answer>>,
}

impl HostApi for Host {
    fn event(&self, kind: &str, value: &Value) {
        self.events.lock().unwrap().push((kind.to_string(), value.clone()));
    }

    fn cancelled(&self) -> bool {
        false
    }

    fn allocate(&self, question: &Value) -> Result<Option<Value>> {
        self.asked.lock().unwrap().push(question.clone());
        // Taken out, so that an answer may make the session ask again.
        let answer = self.answer.lock().unwrap().take();
        let given = answer.as_ref().map_or(Ok(None), |answer| answer(question));
        self.answer.lock().unwrap().get_or_insert_with(|| answer.unwrap_or_else(|| Box::new(|_| Ok(None))));
        given
    }
}

impl Host {
    fn answers(&self, answer: impl Fn(&Value) -> Result<Option<Value>> + Send + Sync + 'static) {
        *self.answer.lock().unwrap() = Some(Box::new(answer));
    }

    fn events(&self) -> Vec<Value> {
        let events = self.events.lock().unwrap();
        events.iter().filter(|(kind, _)| kind == "focus_allocator").map(|(_, event)| event.clone()).collect()
    }
}

fn gistnet() -> GistNet {
    GistNet::new(GistNetConfig { block: BLOCK, ..GistNetConfig::new(WIDTH, 4) }, 3).unwrap()
}

fn lensnet() -> LensNet {
    LensNet::new(LensNetConfig { block: BLOCK, ..LensNetConfig::new(WIDTH, 4) }, 5).unwrap()
}

fn ids(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 37 + 11) % 300).collect()
}

/// A session with a history of `tokens` tokens.
struct Case {
    fixture: Fixture,
    host: Arc<Host>,
    session: Session,
    base: String,
}

impl Case {
    fn new(tokens: u32) -> Self {
        let fixture = Fixture::new();
        let host = Arc::new(Host::default());
        let session = Session::open(json!({ "base": fixture.path("base") }), host.clone()).unwrap();
        let base = session.describe().unwrap()["fingerprint"].as_str().unwrap().to_string();
        let case = Self { fixture, host, session, base };
        gistnet().save(&case.fixture.path("gistnet.safetensors"), &Identity::of_base(&case.base)).unwrap();
        case.open_tree(&ids(tokens));
        case
    }

    fn open_tree(&self, tokens: &[u32]) {
        self.session.open_tree(json!({ "network": self.fixture.at("gistnet.safetensors") })).unwrap();
        self.session.tree_append(tokens).unwrap();
    }

    fn saved(&self, network: &LensNet, identity: &Identity) -> Value {
        network.save(&self.fixture.path("lensnet.safetensors"), identity).unwrap();
        json!({ "network": self.fixture.at("lensnet.safetensors") })
    }

    fn identity(&self) -> Identity {
        Identity::of_base(&self.base)
    }

    fn open_lens(&self) {
        let params = self.saved(&lensnet(), &Identity { gist_version: Some(0), ..self.identity() });
        self.session.open_lens(params).unwrap();
    }

    fn scores(&self, entries: &[(i64, u32)]) -> Result<Vec<f32>> {
        let (start, lod): (Vec<i64>, Vec<u32>) = entries.iter().copied().unzip();
        let mut out = vec![9.0; entries.len()];
        self.session.focus_scores(&start, &lod, &mut out)?;
        Ok(out)
    }

    /// What the session says of its held context.
    fn held(&self) -> Value {
        self.session.tree_append(&[]).unwrap()["working_context"].clone()
    }
}

/// Entries as they stand in an answer.
fn entries(answer: &Value) -> Vec<(i64, u32)> {
    serde_json::from_value(answer["entries"].clone()).unwrap()
}

/// The last `tokens` of 16·n + … tokens fine, everything before as gists of the second level.
fn coarse(gists: i64, tokens: i64) -> Vec<(i64, u32)> {
    let tail = (16 * gists..16 * gists + tokens).map(|start| (start, 0));
    (0..gists).map(|n| (16 * n, 2)).chain(tail).collect()
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
fn scores_are_the_networks() {
    let case = Case::new(41);
    case.open_lens();
    let described = case.session.tree_append(&[]).unwrap();
    assert_eq!(described["lens"], json!(case.fixture.at("lensnet.safetensors")));
    let context: Vec<(i64, u32)> = [(16, 2), (32, 1), (36, 0), (37, 0), (38, 0), (39, 0), (40, 0)].to_vec();
    // By hand: embeddings, gists of gists.
    let tokens = ids(41);
    let mut embedded = vec![0.0; 41 * WIDTH];
    case.session.embed(&tokens, &mut embedded).unwrap();
    let lod1 = gistnet().gists(&embedded[..40 * WIDTH], 10).unwrap();
    let lod2 = gistnet().gists(&lod1[..8 * WIDTH], 2).unwrap();
    let entries_we = [&lod2[WIDTH..2 * WIDTH], &lod1[8 * WIDTH..9 * WIDTH], &embedded[36 * WIDTH..]].concat();
    let seen = Seen {
        entries_we,
        lod: context.iter().map(|(_, lod)| *lod as u8).collect(),
        start: context.iter().map(|(start, _)| *start as u64).collect(),
        tail_ge: Vec::new(),
    };
    let expected = focus(&lensnet(), &seen, &RULE, 2).unwrap();
    assert_eq!(case.scores(&context).unwrap(), expected);
    assert!(expected[0] >= 0.0 && expected[2..].iter().all(|u| *u <= 0.0));
    assert!(expected.iter().any(|u| *u != 0.0));
    // Phases that let nothing of the embeddings learn leave them there.
    case.session.enter_phase(json!({ "groups": ["norms"] })).unwrap();
    assert_eq!(case.scores(&context).unwrap(), expected);
}

#[test]
fn a_held_context_follows_scores_and_takes_in_new_tokens() {
    let case = Case::new(38);
    // Two gists of 16 tokens and 6 tokens; 14 entries at most, of which the newest 4 stay tokens.
    let begun = coarse(2, 6);
    let settings = json!({ "budget": 14, "protected": 4, "entries": begun, "tag": "infer_1" });
    let scores = [0.5, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    let answer = case.session.refocus(settings, Some(&scores)).unwrap();
    let edit = |start: i64, score: f32, before: usize, after: usize| {
        json!({
            "action": "expand", "start": start, "lod": 2, "score": score, "age": 1, "cost_before": before,
            "cost_after": after,
        })
    };
    assert_eq!(answer["edits"], json!([edit(16, 0.9, 8, 11), edit(0, 0.5, 11, 14)]));
    let lod1: Vec<(i64, u32)> = (0..8).map(|n| (4 * n, 1)).collect();
    assert_eq!(entries(&answer), [&lod1[..], &begun[2..]].concat());
    let event = &answer["focus_allocator"];
    assert_eq!(case.host.events(), std::slice::from_ref(event));
    let expected = json!({
        "tag": "infer_1", "source": "host", "allocator": "plugin", "edits": 2, "num_expand": 2, "num_collapse": 0, "num_room": 0,
        "swap_rate": 0.25, "wc_length_before": 8, "wc_length": 14, "utilization": 1.0, "score_min": 0.0,
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&event[key], value, "{key}");
    }
    assert_eq!(case.held(), json!(14));

    // Seven tokens more, and room for none: two groups of siblings or more have to go. What has just expanded goes last, so the
    // first block of tokens does, though it scores higher; of the others the lower.
    case.session.tree_append(&ids(7)).unwrap();
    let mut scores = vec![0.0; 21];
    scores[..8].fill(-0.1);
    scores[4..8].fill(-0.15);
    let again = || json!({ "budget": 14, "protected": 4 });
    refused(
        case.session.refocus(again(), Some(&scores[..14])),
        Kind::Usage,
        &["refocus: scores, one for each entry: expected 21 values, got 14"],
    );
    let answer = case.session.refocus(again(), Some(&scores)).unwrap();
    let room: Vec<(u64, u64)> = answer["room"]
        .as_array()
        .unwrap()
        .iter()
        .map(|edit| (edit["start"].as_u64().unwrap(), edit["lod"].as_u64().unwrap()))
        .collect();
    assert_eq!(room, [(32, 0), (36, 0), (16, 1)]);
    assert_eq!(answer["focus_allocator"]["num_room"], json!(3));
    let expected =
        [&lod1[..4], &[(16, 2), (32, 1), (36, 1)], &(40..45).map(|start| (start, 0)).collect::<Vec<_>>()];
    assert_eq!(entries(&answer), expected.concat());
    // Nothing new, nothing asked for: only an iteration passes.
    let scores = vec![0.0; 12];
    let answer = case.session.refocus(again(), Some(&scores)).unwrap();
    assert_eq!((&answer["edits"], &answer["room"]), (&json!([]), &json!([])));
    // A smaller budget makes room too; the whole history anew is as fine as the budget allows.
    let scores: Vec<f32> = (0..12).map(|at| if at < 4 { -0.1 } else { 0.0 }).collect();
    let answer = case.session.refocus(json!({ "budget": 10, "protected": 4 }), Some(&scores)).unwrap();
    assert_eq!(entries(&answer).len(), 9);
    let whole = json!({ "budget": 100, "anew": true });
    let answer = case.session.refocus(whole, Some(&[0.0; 45])).unwrap();
    assert_eq!(entries(&answer), (0..45).map(|start| (start, 0)).collect::<Vec<_>>());
}

#[test]
fn a_context_follows_lensnet() {
    let case = Case::new(90);
    case.open_lens();
    // The network has learned nothing: everything that it says counts.
    let allocator = json!({ "expand_threshold": 0.0, "collapse_threshold": 0.0, "rounds": 1 });
    let settings = json!({ "budget": 40, "protected": 8, "allocator": allocator });
    let answer = case.session.refocus(settings.clone(), None).unwrap();
    assert!(!answer["edits"].as_array().unwrap().is_empty(), "{answer}");
    assert_eq!(answer["focus_allocator"]["source"], json!("lensnet"));
    // The same by the scores of the context that it began with, which the host was shown.
    let asked = case.host.asked.lock().unwrap()[0].clone();
    let scores = case.scores(&entries(&asked)).unwrap();
    assert_eq!(serde_json::from_value::<Vec<f32>>(asked["scores"].clone()).unwrap(), scores);
    let mut anew = settings.clone();
    anew["anew"] = json!(true);
    let given = case.session.refocus(anew.clone(), Some(&scores)).unwrap();
    assert_eq!((&given["edits"], &given["entries"]), (&answer["edits"], &answer["entries"]));
    // Drawn by the seed.
    let drawn = |seed: u64| {
        let mut settings = anew.clone();
        settings["seed"] = json!(seed);
        settings["allocator"]["kind"] = json!({ "stochastic": { "temperature": 10.0 } });
        case.session.refocus(settings, None).unwrap()["edits"].clone()
    };
    assert_eq!(drawn(1), drawn(1));
    assert!((2..12).any(|seed| drawn(seed) != drawn(1)));
    // And on from there, as the history grows beyond the budget.
    for _ in 0..6 {
        case.session.tree_append(&ids(20)).unwrap();
        let answer = case.session.refocus(settings.clone(), None).unwrap();
        let (length, all) = (answer["focus_allocator"]["wc_length"].as_u64().unwrap(), entries(&answer));
        assert!(length <= 40 && all.len() as u64 == length, "{length}");
        assert!(all[all.len() - 8..].iter().all(|(_, lod)| *lod == 0));
    }
    assert_eq!(case.session.tree_append(&[]).unwrap()["tokens"], json!(210));
}

#[test]
fn a_hosts_allocator_takes_the_place_of_the_plugins() {
    let case = Case::new(38);
    let begun = coarse(2, 6);
    let refocus = |scores: &[f32]| {
        let settings = json!({ "budget": 14, "protected": 4, "entries": begun });
        case.session.refocus(settings, Some(scores))
    };
    let scores = [0.5, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    // Edits: the second as the plugin would not, below its threshold and against its order.
    case.host.answers(|question| {
        assert_eq!(question["scores"].as_array().unwrap().len(), 8);
        assert_eq!(question["residency"][0], json!([1, "placed"]));
        for (key, value) in [("budget", 14), ("protected", 4), ("block", 4), ("levels", 2)] {
            assert_eq!(question[key], json!(value));
        }
        Ok(Some(json!({
            "edits": [
                { "action": "expand", "start": 0, "lod": 2 }, { "action": "expand", "start": 8, "lod": 1, "why": "mine" },
            ],
        })))
    });
    let answer = refocus(&scores).unwrap();
    let expected = [&[(0, 1), (4, 1), (8, 0), (9, 0), (10, 0), (11, 0), (12, 1)], &begun[1..]].concat();
    assert_eq!(entries(&answer), expected);
    assert_eq!(answer["edits"][0]["score"], json!(0.5));
    // It came of the first edit, and has no score.
    assert_eq!(answer["edits"][1]["score"], Value::Null);
    let event = &answer["focus_allocator"];
    assert_eq!(
        (&event["allocator"], &event["num_expand"], &event["swap_rate"]),
        (&json!("host"), &json!(2), &json!(0.25))
    );
    // The context in the end.
    let wanted = expected.clone();
    case.host.answers(move |_| Ok(Some(json!({ "entries": wanted }))));
    let same = refocus(&scores).unwrap();
    assert_eq!((&same["entries"], &same["edits"]), (&answer["entries"], &answer["edits"]));
    // No edit is an answer too; none leaves it to the plugin.
    case.host.answers(|_| Ok(Some(json!({ "edits": [] }))));
    assert_eq!(entries(&refocus(&scores).unwrap()), begun);
    case.host.answers(|_| Ok(None));
    let answer = refocus(&scores).unwrap();
    assert_eq!((&answer["focus_allocator"]["allocator"], entries(&answer).len()), (&json!("plugin"), 14));
}

/// A case with a held context of 8 entries, 14 at most, in which the host answers `answer`.
#[track_caller]
fn answered(answer: Value, parts: &[&str]) {
    let case = Case::new(38);
    let settings = || json!({ "budget": 14, "protected": 4 });
    let mut begin = settings();
    begin["entries"] = json!(coarse(2, 6));
    let before = case.session.refocus(begin, Some(&[0.0; 8])).unwrap();
    case.host.answers(move |_| Ok(Some(answer.clone())));
    refused(case.session.refocus(settings(), Some(&[0.0; 8])), Kind::Usage, parts);
    case.host.answers(|_| Ok(None));
    let after = case.session.refocus(settings(), Some(&[0.0; 8])).unwrap();
    assert_eq!(after["entries"], before["entries"]);
    // The refused one was no iteration: two have passed.
    assert_eq!(after["focus_allocator"]["residency_mean"], json!(2.0));
    assert_eq!(case.host.events().len(), 2);
}

#[test]
fn a_hosts_edits_beyond_the_budget_are_refused() {
    let edit = |start: u64, lod: u8| json!({ "action": "expand", "start": start, "lod": lod });
    answered(
        json!({ "edits": [edit(0, 2), edit(16, 2), edit(4, 1)] }),
        &["edit 2: expand entry 1, level 1 at token 4: expected at most 14 entries, the budget, got 17"],
    );
}

#[test]
fn a_hosts_edit_of_the_protected_tail_is_refused() {
    answered(
        json!({ "edits": [{ "action": "collapse", "start": 32, "lod": 0 }] }),
        &["edit 0", "expected a span that ends by token 34, where the protected tail begins, got 32..36"],
    );
}

#[test]
fn a_hosts_edit_of_no_entry_is_refused() {
    answered(
        json!({ "edits": [{ "action": "expand", "start": 4, "lod": 1 }] }),
        &["edit 0: expected an entry of the context, got level 1 at token 4"],
    );
}

#[test]
fn a_hosts_context_with_a_gap_is_refused() {
    answered(
        json!({ "entries": coarse(2, 6)[1..] }),
        &["the host's focus allocator", "expected entries for the tokens 0..38, got some for 16..38"],
    );
    let mut gap = coarse(2, 6);
    gap.remove(1);
    answered(json!({ "entries": gap }), &["expected to begin at token 16", "a gap of 16 tokens"]);
}

#[test]
fn a_hosts_answer_that_is_none_is_refused() {
    answered(json!({ "edit": [] }), &["expected an answer with either edits or entries, got neither"]);
    answered(json!({ "edits": [], "entries": [] }), &["either edits or entries, got both"]);
    answered(
        json!({ "edits": [{ "action": "drop", "start": 0, "lod": 2 }] }),
        &["the host's focus allocator", "unknown variant `drop`"],
    );
}

#[test]
fn a_hosts_failure_ends_the_refocus() {
    let case = Case::new(38);
    case.host.answers(|_| Err(PluginError::usage("no plan today")));
    let settings = json!({ "budget": 14, "entries": coarse(2, 6) });
    refused(
        case.session.refocus(settings, Some(&[0.0; 8])),
        Kind::Usage,
        &["the host's focus allocator: no plan today"],
    );
    assert_eq!(case.held(), Value::Null);
}

#[test]
fn a_host_reads_while_it_is_asked_and_may_not_change_what_it_is_asked_about() {
    let Case { fixture, host, session, base } = Case::new(38);
    let case = Arc::new(Case { fixture, host: host.clone(), session, base });
    case.open_lens();
    let inside: Arc<OnceLock<Result<Value>>> = Arc::default();
    let (weak, kept) = (Arc::downgrade(&case), inside.clone());
    host.answers(move |question| {
        let case = weak.upgrade().unwrap();
        // Scores of another context, gists, the description: nothing waits for the refocus to end.
        case.scores(&entries(question)).unwrap();
        case.session.tree_gists(1, 0, &mut [0.0; WIDTH]).unwrap();
        assert_eq!(case.held(), Value::Null);
        kept.set(case.session.refocus(json!({ "budget": 12 }), None)).unwrap();
        Ok(Some(json!({ "edits": [] })))
    });
    refused(
        case.session.refocus(json!({ "budget": 14 }), None),
        Kind::Usage,
        &["refocus: expected the history, LensNet and working context that it began with"],
    );
    assert!(inside.get().unwrap().is_ok());
    assert!(case.held().as_u64().unwrap() <= 12);
}

#[test]
fn another_history_drops_lensnet_and_the_context() {
    let case = Case::new(38);
    case.open_lens();
    case.session.refocus(json!({ "budget": 14 }), None).unwrap();
    assert_ne!(case.held(), Value::Null);
    case.open_tree(&ids(38));
    let described = case.session.tree_append(&[]).unwrap();
    assert_eq!((&described["lens"], &described["working_context"]), (&Value::Null, &Value::Null));
    let says = ["expected an open LensNet, there is none; open_lens reads one"];
    refused(case.session.refocus(json!({ "budget": 14 }), None), Kind::Usage, &says);
    refused(case.scores(&[(0, 0)]), Kind::Usage, &says);
}

#[test]
fn calls_without_a_history_are_refused() {
    let fixture = Fixture::new();
    let host = Arc::new(Host::default());
    let session = Session::open(json!({ "base": fixture.path("base") }), host.clone()).unwrap();
    let says = ["expected an open history, there is none; open_tree begins one"];
    refused(session.open_lens(json!({ "network": "x" })), Kind::Usage, &says);
    refused(session.focus_scores(&[0], &[0], &mut [0.0]), Kind::Usage, &says);
    refused(session.refocus(json!({ "budget": 14 }), None), Kind::Usage, &says);
    let bare = Session::open(json!({}), host).unwrap();
    refused(bare.open_lens(json!({ "network": "x" })), Kind::Usage, &["opened without a base"]);
    refused(bare.refocus(json!({ "budget": 14 }), None), Kind::Usage, &["opened without a base"]);
}

#[test]
fn a_lensnet_of_other_gists_is_refused() {
    let case = Case::new(38);
    case.open_lens();
    let stale = case.saved(&lensnet(), &Identity { gist_version: Some(3), ..case.identity() });
    refused(
        case.session.open_lens(stale),
        Kind::Model,
        &["lensnet.safetensors", "expected a LensNet of gist version 0, got one of 3"],
    );
    // The one before is still there.
    case.scores(&[(0, 2), (16, 1)]).unwrap();
}

#[test]
fn a_lensnet_of_another_base_block_or_adapter_is_refused() {
    let case = Case::new(38);
    let open = |network: &LensNet, identity: &Identity| case.session.open_lens(case.saved(network, identity));
    refused(open(&lensnet(), &Identity::of_base("another")), Kind::Model, &["another"]);
    let wide = LensNet::new(LensNetConfig { block: 8, ..LensNetConfig::new(WIDTH, 4) }, 1).unwrap();
    refused(open(&wide, &case.identity()), Kind::Model, &["block: expected 4, got a network of 8"]);
    let adapted = Identity { adapter_fingerprint: Some("0123456789abcdef".into()), ..case.identity() };
    refused(
        open(&lensnet(), &adapted),
        Kind::Model,
        &["expected a LensNet that was trained beside the base model alone", "other_adapter = true"],
    );
    let mut wanted = case.saved(&lensnet(), &adapted);
    wanted["other_adapter"] = json!(true);
    assert_eq!(case.session.open_lens(wanted).unwrap()["config"]["block"], json!(4));
    refused(case.session.open_lens(json!({ "netwrk": "x" })), Kind::Usage, &["netwrk"]);
}

#[test]
fn a_lensnet_trained_with_other_places_is_refused() {
    let case = Case::new(38);
    let places = SigmaRule { preset: SigmaPreset::Original, ..RULE };
    let params = case.saved(&lensnet(), &Identity { place_rule: Some(places), ..case.identity() });
    refused(
        case.session.open_lens(params),
        Kind::Usage,
        &[
            "open_lens: expected a network trained with the places",
            "(document), got one trained with original",
        ],
    );
}

#[test]
fn a_lensnet_for_fewer_levels_than_the_history_has_is_refused() {
    let case = Case::new(0);
    let network = case.fixture.at("gistnet.safetensors");
    case.session.open_tree(json!({ "network": network, "levels": 4 })).unwrap();
    let params = case.saved(&lensnet(), &case.identity());
    refused(
        case.session.open_lens(params),
        Kind::Usage,
        &["open_lens: expected a history of at most 3 levels above the tokens, got 4"],
    );
}

#[test]
fn embeddings_that_learned_are_noticed() {
    let case = Case::new(41);
    case.open_lens();
    case.session.enter_phase(json!({ "groups": ["embeddings"] })).unwrap();
    case.session.step(json!({ "tokens": [ids(41)], "lr": 0.05 })).unwrap();
    case.session.leave_phase().unwrap();
    let says = ["expected the network and the embeddings that made the history's gists"];
    refused(case.scores(&[(0, 2), (16, 1)]), Kind::Usage, &says);
    refused(case.session.refocus(json!({ "budget": 20 }), None), Kind::Usage, &says);
    assert!(Path::new(&case.fixture.path("lensnet.safetensors")).exists());
}

/// What both calls that take entries say of these.
#[track_caller]
fn entries_refused(entries: &[(i64, u32)], part: &str) {
    let case = Case::new(38);
    case.open_lens();
    let before = case.session.refocus(json!({ "budget": 14 }), None).unwrap();
    refused(case.scores(entries), Kind::Usage, &[part]);
    refused(case.session.refocus(json!({ "budget": 14, "entries": entries }), None), Kind::Usage, &[part]);
    assert_eq!(case.held(), before["focus_allocator"]["wc_length"]);
}

#[test]
fn overlapping_entries_are_refused() {
    entries_refused(&[(0, 2), (12, 1)], "entry 1: expected to begin at token 16");
    entries_refused(&[(0, 1), (0, 1)], "an overlap of 4 tokens");
}

#[test]
fn gapped_entries_are_refused() {
    entries_refused(&[(0, 1), (8, 1)], "a gap of 4 tokens");
}

#[test]
fn unaligned_entries_are_refused() {
    entries_refused(&[(2, 1)], "entry 0: expected a start that is a multiple of its span of 4 tokens");
}

#[test]
fn a_level_beyond_the_tree_is_refused() {
    entries_refused(&[(0, 3)], "entry 0: expected a level of the tree, at most 2, got 3");
    entries_refused(&[(0, 1), (4, 300)], "entry 1: expected a level below 4, got 300");
}

#[test]
fn entries_beyond_the_history_are_refused() {
    entries_refused(&[(36, 1)], "entry 0: expected a span within the history of 38 tokens");
    entries_refused(&[(-4, 1)], "entry 0: expected a first token of at least 0, got -4");
    entries_refused(&[], "expected at least one entry, got none");
}

#[test]
fn entries_that_are_not_as_many_as_their_levels_are_refused() {
    let case = Case::new(38);
    case.open_lens();
    let mut out = [0.0; 2];
    let s = &case.session;
    refused(
        s.focus_scores(&[0, 4], &[1], &mut out),
        Kind::Usage,
        &["focus_scores: lod: expected 2 values, got 1"],
    );
    refused(
        s.focus_scores(&[0], &[1], &mut out),
        Kind::Usage,
        &["focus_scores: out: expected 1 values, got 2"],
    );
}

/// What a refocus of a held context of 14 entries says; the context stays.
#[track_caller]
fn refocus_refused(params: Value, scores: Option<&[f32]>, kind: Kind, parts: &[&str]) {
    let case = Case::new(38);
    let begun = case.session.refocus(json!({ "budget": 40 }), Some(&[0.0; 38])).unwrap();
    refused(case.session.refocus(params, scores), kind, parts);
    assert_eq!(case.held(), begun["focus_allocator"]["wc_length"]);
    assert_eq!(case.host.events().len(), 1);
}

#[test]
fn a_budget_smaller_than_the_tail_is_refused() {
    refocus_refused(
        json!({ "budget": 8, "protected": 9 }),
        Some(&[0.0; 38]),
        Kind::Usage,
        &["budget: expected room for the 9 protected tokens at least, got 8 entries"],
    );
    refocus_refused(
        json!({ "budget": 0 }),
        Some(&[0.0; 38]),
        Kind::Usage,
        &["budget: expected at least 1 entry"],
    );
}

#[test]
fn a_budget_that_nothing_reaches_is_refused() {
    let says = [
        "budget: expected room for 8 entries at least, the coarsest view of the tokens 0..38 with 3 protected ones, got 5",
    ];
    refocus_refused(json!({ "budget": 5, "protected": 3 }), Some(&[0.0; 38]), Kind::Usage, &says);
    let anew = json!({ "budget": 5, "protected": 3, "anew": true });
    refocus_refused(
        anew,
        Some(&[0.0; 7]),
        Kind::Usage,
        &["budget: expected at least 8 entries for 38 tokens"],
    );
}

#[test]
fn scores_that_are_no_scores_are_refused() {
    for (bad, told) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (1.5, "1.5"), (-2.0, "-2")] {
        let mut scores = [0.0; 38];
        scores[7] = bad;
        refocus_refused(
            json!({ "budget": 40 }),
            Some(&scores),
            Kind::Usage,
            &[&format!("refocus: scores: expected numbers from -1 to 1, got {told} for entry 7")],
        );
    }
}

#[test]
fn settings_that_there_are_not_are_refused() {
    let refused = |params: Value, part: &str| refocus_refused(params, Some(&[0.0; 38]), Kind::Usage, &[part]);
    refused(json!({}), "budget");
    refused(json!({ "budget": 40, "protectd": 1 }), "protectd");
    refused(
        json!({ "budget": 40, "allocator": { "expand_threshold": 2 } }),
        "expand_threshold: expected 0 to 1, got 2",
    );
    refused(json!({ "budget": 40, "allocator": { "max_edit": 2 } }), "max_edit");
    refused(json!({ "budget": 40, "anew": true, "entries": [] }), "either entries or anew, got both");
}
