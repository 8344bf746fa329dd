//! Positions through the program and through a session: scalings from extension to merged model, the table and the picture
//! of bands, options of positions, learning sigma.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::{EXTENDED, Fixture, ORIGINAL, VOCAB, edit_json, mclora, numbers, read_json, with};
use megacontext_lora::error::Kind;
use megacontext_lora::host::{Answer, HostApi};
use megacontext_lora::session::{Context, Entries, Session};
use serde_json::{Value, json};

/// A scaling as the flag takes it, for the micro model's four bands.
fn flag(kind: &str) -> String {
    match kind {
        "longrope" => json!({
            "rope_type": "longrope", "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 1.5, 2.5, 4.0],
        })
        .to_string(),
        other => other.to_string(),
    }
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn every_scaling_goes_from_extension_to_merged_model() {
    let fixture = Fixture::new();
    let base = fixture.at("base");
    let tokens = fixture.at("tokens.json");
    fs::write(&tokens, json!((0..EXTENDED).map(|i| (i * 37 + 11) % VOCAB).collect::<Vec<_>>()).to_string())
        .unwrap();
    let logits = |flags: &[&str], name: &str| {
        let out = fixture.at(name);
        mclora(&[&["logits", "--tokens", &tokens, "--out", &out], flags].concat()).success();
        numbers(&fixture.path(name), "logits")
    };
    let plain = logits(&["--base", &base], "plain.safetensors");
    let kinds = [("ntk", 4.0), ("dynamic", 1.0), ("yarn", 4.0), ("longrope", 4.0), ("llama3", 4.0)];
    for (kind, factor) in kinds {
        let (adapter, merged) =
            (fixture.at(&format!("{kind}/adapter")), fixture.at(&format!("{kind}-merged")));
        let args = with(
            fixture.extend(kind),
            &[
                ("--stages", "128:1"),
                ("--eval-tokens", "256"),
                ("--eval-contexts", "128"),
                ("--scaling", &flag(kind)),
            ],
        );
        mclora(&args).success();
        let own = &read_json(Path::new(&adapter).join("adapter_config.json").as_path())["megacontext"];
        assert_eq!(
            (&own["rope_scaling"]["rope_type"], &own["rope_scaling"]["factor"]),
            (&json!(kind), &json!(factor))
        );
        let summary = read_json(&fixture.path(&format!("{kind}/summary.json")));
        assert_eq!(summary["stages"][0]["rope"], json!(format!("{kind} x{factor}")), "{summary}");

        mclora(&["merge", "--base", &base, "--adapter", &adapter, "--out", &merged]).success();
        let of_adapter = logits(&["--base", &base, "--adapter", &adapter], "adapter.safetensors");
        let of_merged = logits(&["--base", &merged], "merged.safetensors");
        assert!(apart(&of_merged, &of_adapter) < 1e-4, "{kind}: {}", apart(&of_merged, &of_adapter));
        assert!(apart(&plain, &of_adapter) > 1e-3, "{kind}: the scaling changes something");

        // The merged model, taken twice as far, counts from the original.
        let out = mclora(&["rope", "--base", &merged, "--context", "256", "--json"]).success().json();
        let further = if kind == "dynamic" { 1.0 } else { 8.0 };
        assert_eq!(out["scaling"], json!(format!("{kind} x{further}")), "{kind}");
        assert_eq!(out["original_context"], json!(ORIGINAL), "{kind}");
    }
}

#[test]
fn an_adapter_of_one_scaling_is_refused_on_a_base_of_another() {
    let fixture = Fixture::new();
    let adapter = fixture.adapter("trained");
    for (kind, named) in [("yarn", "yarn x2"), ("dynamic", "dynamic x2"), ("llama3", "llama3 x2")] {
        edit_json(&fixture.copy("base", kind).join("config.json"), |config| {
            config.as_object_mut().unwrap().remove("rope_parameters");
            let scaling =
                json!({"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
            config["rope_scaling"] = scaling;
        });
        let facts =
            [adapter.as_str(), "made for a base with RoPE scaling none", &format!("got one with {named}")];
        let (base, tokens, out) = (fixture.at(kind), fixture.at("tokens.json"), fixture.at("l.safetensors"));
        fs::write(&tokens, "[1, 2]").unwrap();
        mclora(&["logits", "--base", &base, "--adapter", &adapter, "--tokens", &tokens, "--out", &out])
            .refused(1, &facts);
    }
}

#[test]
fn an_adapter_of_one_rope_theta_is_refused_on_a_base_of_another() {
    let fixture = Fixture::new();
    let adapter = fixture.adapter("trained");
    edit_json(&fixture.copy("base", "other").join("config.json"), |config| {
        config["rope_theta"] = json!(500.0);
        config["rope_parameters"]["rope_theta"] = json!(500.0);
    });
    let (base, tokens, out) = (fixture.at("other"), fixture.at("tokens.json"), fixture.at("l.safetensors"));
    fs::write(&tokens, "[1, 2]").unwrap();
    mclora(&["logits", "--base", &base, "--adapter", &adapter, "--tokens", &tokens, "--out", &out])
        .refused(1, &[&adapter, "made for a base with rope_theta 10000, got one with 500"]);
}

#[test]
fn perplexity_of_a_scaling_is_measured_without_training() {
    let fixture = Fixture::new();
    let (base, data) = (fixture.at("base"), fixture.at("data"));
    let eval = [
        "eval",
        "ppl",
        "--base",
        &base,
        "--data",
        &data,
        "--contexts",
        "128",
        "--max-tokens",
        "512",
        "--json",
    ];
    let result = mclora(&[&eval[..], &["--scaling", "yarn", "--factor", "8"]].concat()).success().json();
    assert_eq!(result["rope"], json!("yarn x8"));
    let result = mclora(&[&eval[..], &["--scaling", "ntk"]].concat()).success().json();
    assert_eq!(result["rope"], json!("ntk x4"));
}

#[test]
fn bands_are_shown_as_a_table_an_object_and_a_picture() {
    let fixture = Fixture::new();
    // Only config.json is looked at.
    let base = fixture.copy("base", "bare");
    fs::remove_file(base.join("model.safetensors")).unwrap();
    fs::remove_file(base.join("tokenizer.json")).unwrap();
    let (base, plot) = (fixture.at("bare"), fixture.at("bands.svg"));
    let args = ["rope", "--base", &base, "--scaling", "linear", "--factor", "8", "--plot", &plot];
    let text = mclora(&args).success().stdout;
    assert!(text.contains("wavelength") && text.contains("linear x8") && text.contains("8.000"), "{text}");
    let picture = fs::read_to_string(&plot).unwrap();
    assert!(picture.starts_with("<svg xmlns=") && picture.contains("linear x8"));
    let result = mclora(&[&args[..], &["--json"]].concat()).success().json();
    let bands = result["bands"].as_array().unwrap();
    assert_eq!(bands.len(), 4);
    let number = |band: usize, key: &str| bands[band][key].as_f64().unwrap();
    assert!((number(0, "wavelength_before") - std::f64::consts::TAU).abs() < 1e-12);
    assert!((number(3, "stretch") - 8.0).abs() < 1e-12);
    // exp(−½(32/8)²) is left of the fastest band for a gist of 32 tokens.
    assert!((bands[0]["damping"][1].as_f64().unwrap() - (-8f64).exp()).abs() < 1e-12);
    assert_eq!(bands[0]["damping"][0], json!(1.0));
}

#[test]
fn bad_scalings_are_refused() {
    let fixture = Fixture::new();
    let base = fixture.at("base");
    let cases: [(&[&str], &str); 7] = [
        (
            &["--scaling", "spiral", "--factor", "8"],
            "expected one of none, linear, ntk, dynamic, yarn, longrope, llama3",
        ),
        (&["--scaling", "yarn"], "expected a factor or a context beside it, got neither"),
        (&["--scaling", "yarn", "--factor", "0.5"], "at least 1, got 0.5"),
        (&["--scaling", "longrope", "--factor", "2"], "short_factor and long_factor"),
        (&["--scaling", "{\"rope_type\": 3}", "--factor", "2"], "expected a string \"rope_type\""),
        (&["--scaling", "{rope", "--factor", "2"], "expected a name or a JSON object"),
        (&["--block", "1"], "positions.sigma.block: expected at least 2, got 1"),
    ];
    for (flags, says) in cases {
        mclora(&[&["rope", "--base", &base], flags].concat()).refused(2, &[says]);
    }
    let args = with(fixture.extend("run"), &[("--scaling", "spiral")]);
    mclora(&args).refused(2, &["stages[0]", "got \"spiral\""]);
    assert!(!fixture.path("run").exists());
}

fn session(fixture: &Fixture, config: Value) -> Session {
    let mut whole = json!({ "base": fixture.path("base") });
    whole.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
    Session::open(whole, Arc::new(Leaving(Answer::Continue))).unwrap()
}

fn logits(session: &Session, mu: Option<&[f64]>, sigma: Option<&[f64]>, lod: Option<&[u32]>) -> Vec<f32> {
    let ids = [5u32, 9, 17, 3, 250];
    let mut out = vec![0f32; ids.len() * VOCAB];
    let context = Context { entries: Entries::Tokens(&ids), mu, sigma, lod, targets: None };
    session.logits(context, &mut out).unwrap();
    out
}

#[test]
fn levels_place_entries_by_the_sessions_rule() {
    let fixture = Fixture::new();
    let rule = |preset: &str| json!({ "positions": { "sigma": { "preset": preset, "block": 4 } } });
    let document = session(&fixture, rule("document"));
    let lod: &[u32] = &[1, 1, 0, 0, 0];
    let placed = logits(&document, None, None, Some(lod));
    let (mu, sigma) = ([2.0, 6.0, 8.0, 9.0, 10.0], [4.0, 4.0, 0.0, 0.0, 0.0]);
    assert_eq!(placed, logits(&document, Some(&mu), Some(&sigma), None));
    assert_ne!(placed, logits(&document, Some(&mu), None, None));
    let original = session(&fixture, rule("original"));
    let (mu, sigma) = ([0.0, 4.0, 8.0, 9.0, 10.0], [4.0, 4.0, 1.0, 1.0, 1.0]);
    assert_eq!(logits(&original, None, None, Some(lod)), logits(&original, Some(&mu), Some(&sigma), None));
}

#[test]
fn options_of_positions_change_a_sessions_logits() {
    let fixture = Fixture::new();
    let lod: &[u32] = &[1, 1, 0, 0, 0];
    let plain = logits(&session(&fixture, json!({})), None, None, Some(lod));
    for options in [json!({ "alibi": true }), json!({ "lod_bands": 1 }), json!({ "slow_periods": [30.0] })] {
        let with = session(&fixture, json!({ "positions": options.clone() }));
        assert_ne!(plain, logits(&with, None, None, Some(lod)), "{options}");
        assert_eq!(with.describe().unwrap()["positions"].as_object().unwrap().len(), 4);
    }
    // Distances are those of places, not of numbers.
    let alibi = session(&fixture, json!({ "positions": { "alibi": true } }));
    let counted = logits(&alibi, None, None, None);
    assert_eq!(counted, logits(&alibi, Some(&[0., 1., 2., 3., 4.]), None, None));
    // A shift of everything turns all alike and changes no distance.
    let shifted = logits(&alibi, Some(&[7., 8., 9., 10., 11.]), None, None);
    assert!(apart(&counted, &shifted) < 1e-4, "{}", apart(&counted, &shifted));
}

#[test]
fn bad_positions_of_a_session_are_refused() {
    let fixture = Fixture::new();
    for (positions, says) in [
        (json!({ "lod_bands": 4 }), "positions.lod_bands: expected less than the 4 bands"),
        (json!({ "slow_periods": [-1.0] }), "positions.slow_periods: expected positive"),
        (json!({ "sigma": { "block": 1 } }), "positions.sigma.block: expected at least 2"),
        (json!({ "alibis": true }), "alibis"),
    ] {
        let config = json!({ "base": fixture.path("base"), "positions": positions });
        let error = Session::open(config, Arc::new(Leaving(Answer::Continue))).err().unwrap();
        assert!(error.kind == Kind::Usage && error.message.contains(says), "{error}");
    }
    let session = session(&fixture, json!({}));
    let mut out = vec![0f32; 2 * VOCAB];
    for (lod, says) in
        [(&[0u32][..], "lod: expected 2 values, got 1"), (&[0, 99], "lod: expected a level below 16, got 99")]
    {
        let entries = Entries::Tokens(&[1, 2]);
        let error = session
            .logits(Context { entries, mu: None, sigma: None, lod: Some(lod), targets: None }, &mut out)
            .unwrap_err();
        assert!(error.kind == Kind::Usage && error.message.contains(says), "{error}");
    }
}

/// A host that answers so when a phase is left.
struct Leaving(Answer);

impl HostApi for Leaving {
    fn event(&self, _: &str, _: &Value) {}

    fn cancelled(&self) -> bool {
        false
    }

    fn phase_left(&self, _: &Value) -> Answer {
        self.0
    }
}

/// Old spans as gists of 4 tokens, then tokens.
fn batch() -> Value {
    let row = |r: u32| (0..33).map(|i| 1 + (i * 7 + r * 13) % 40).collect::<Vec<u32>>();
    let lod: Vec<u32> = (0..33).map(|i| u32::from(i < 16)).collect();
    json!({ "tokens": [row(0), row(1), row(2)], "lod": lod, "lr": 0.05 })
}

#[test]
fn sigma_learns_in_a_phase_is_rolled_back_saved_and_carried_by_the_adapter() {
    let fixture = Fixture::new();
    let config =
        || json!({ "base": fixture.path("base"), "positions": { "sigma": { "block": 4, "uniform": true } } });
    let scales = |session: &Session| session.describe().unwrap()["sigma_scales"].clone();
    let nll = |session: &Session| session.evaluate(batch()).unwrap()["nll"].as_f64().unwrap();
    for answer in [Answer::RollBack, Answer::Continue] {
        let session = Session::open(config(), Arc::new(Leaving(answer))).unwrap();
        let before = nll(&session);
        session.enter_phase(json!({ "groups": ["sigma", "lora"], "lora": { "r": 2 } })).unwrap();
        assert_eq!(scales(&session), json!([1.0, 1.0, 1.0, 1.0]));
        for _ in 0..5 {
            session.step(batch()).unwrap();
        }
        assert!(nll(&session) < before - 0.05, "{} from {before}", nll(&session));
        let learned = scales(&session);
        assert!(learned[1] != json!(1.0), "{learned}");
        assert_eq!((&learned[0], &learned[2], &learned[3]), (&json!(1.0), &json!(1.0), &json!(1.0)));
        let saved = fixture.path("saved");
        session.save(&saved).unwrap();
        let after = nll(&session);
        session.leave_phase().unwrap();
        if answer == Answer::RollBack {
            assert_eq!(scales(&session), json!([1.0, 1.0, 1.0, 1.0]));
            assert_eq!(nll(&session), before);
            let resumed = Session::open(config(), Arc::new(Leaving(Answer::Continue))).unwrap();
            resumed.enter_phase(json!({ "groups": ["sigma", "lora"], "lora": { "r": 2 } })).unwrap();
            resumed.resume(&saved).unwrap();
            assert_eq!((scales(&resumed), nll(&resumed)), (learned, after));
            fs::remove_dir_all(saved).unwrap();
            continue;
        }
        let adapter = fixture.path("adapter");
        session.export(&adapter).unwrap();
        let mut loading = config();
        loading["adapter"] = json!(adapter);
        let loaded = Session::open(loading, Arc::new(Leaving(Answer::Continue))).unwrap();
        assert_eq!((scales(&loaded), nll(&loaded)), (learned, after));
        // The same adapter on the plain positions of the base is refused.
        let plain = json!({ "base": fixture.path("base"), "adapter": adapter });
        let error = Session::open(plain, Arc::new(Leaving(Answer::Continue))).err().unwrap();
        assert!(error.kind == Kind::Adapter && error.message.contains("made for the positions"), "{error}");
    }
}
