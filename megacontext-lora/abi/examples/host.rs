//! A host that brings its own text, lets the plugin alternate between GistNet, LensNet and LoRA, has a say in every phase, and
//! opens what came of it.
//!
//! ```text
//! cargo build --release && cargo run --release -p megacontext-lora-abi --example host -- \
//!     target/release/libmegacontext_lora.so assets/tiny-llama runs/host TEXT-FILE...
//! ```
//!
//! Every file is a document: a few dozen of at least 256 tokens, since some are held out. `touch runs/host.stop` stops the run
//! within a step; without that file, the same command goes on. The guide is `docs/host-guide.md`.

use anyhow::{Context, Result, bail, ensure};
use megacontext_lora_abi::{AbiError, Answer, ErrorKind, Host, LoadOptions, Plugin};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// What the plugin tells and asks.
struct Watcher {
    texts: Vec<String>,
    /// The run stops while this file is there.
    stop: PathBuf,
}

fn parsed(json: &str) -> Value {
    serde_json::from_str(json).unwrap_or_default()
}

impl Host for Watcher {
    fn event(&self, kind: &str, json: &str) {
        let event = parsed(json);
        match kind {
            "log" => eprintln!("{}", event["message"].as_str().unwrap_or_default()),
            "plan" | "evaluation" | "phase" => eprintln!("{}", event["text"].as_str().unwrap_or_default()),
            // Progress, checkpoints, labels, and whatever a later plugin tells.
            _ => {}
        }
    }

    fn cancelled(&self) -> bool {
        self.stop.exists()
    }

    fn documents(&self, split: &str, start: u64, count: u64) -> Result<Vec<String>, AbiError> {
        if split != "texts" {
            return Err(AbiError::new(ErrorKind::Data, format!("expected the split texts, got {split}")));
        }
        Ok(self.texts.iter().skip(start as usize).take(count as usize).cloned().collect())
    }

    fn hook(&self, kind: &str, json: &str) -> Answer {
        // The plugin undoes what is not finite by itself; this host is less patient.
        let wild = || parsed(json)["grad_norm"].as_f64().is_some_and(|norm| norm > 1e3);
        if kind == "step" && wild() { Answer::RollBack } else { Answer::Continue }
    }

    fn phase_left(&self, json: &str) -> Answer {
        // Neither may reading whole histories get worse by more than this host bears.
        let phase = parsed(json);
        let whole = |when: &str| phase[when]["full_loss"].as_f64().unwrap_or(f64::NAN);
        if whole("after") > whole("before") + 0.02 { Answer::RollBack } else { Answer::Continue }
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [library, base, out, files @ ..] = &arguments[..] else {
        bail!("usage: host LIBRARY MODEL-FOLDER RUN-FOLDER TEXT-FILE...");
    };
    let read = |file: &String| std::fs::read_to_string(file).with_context(|| file.clone());
    let texts = files.iter().map(read).collect::<Result<Vec<String>>>()?;

    let plugin = Plugin::load(library, &LoadOptions::default())?;
    let trains = plugin.capabilities().iter().any(|name| name == "job:train");
    ensure!(trains, "{library}: expected a plugin with job:train, got {}", plugin.version_line());

    // A job brings its own model, so the session needs none.
    let session = plugin.open_session(&json!({}), Watcher { texts, stop: format!("{out}.stop").into() })?;
    let labels = json!({ "rounds": 1, "histories": 48 });
    let settings = json!({
        "base": base, "data": ["host:texts"], "out": out, "resume": Path::new(out).join("config.toml").is_file(),
        "horizon": 32, "budget": 96, "cycles": 1,
        "warm_gistnet": { "steps": 60 }, "warm_lensnet": { "steps": 30, "labels": labels },
        "jt1": { "steps": 30 }, "jt2": { "steps": 30, "labels": labels }, "jt3": { "steps": 30 },
        "validation": { "histories": 32, "test_histories": 32 },
    });
    let summary = match session.run("train", &settings) {
        Err(error) if error.kind() == ErrorKind::Cancelled => {
            eprintln!("{error}");
            return Ok(());
        }
        other => other?,
    };
    let loss = |of: &Value| of["loss_at_h"].as_f64().unwrap_or(f64::NAN);
    for phase in summary["phases"].as_array().into_iter().flatten() {
        let [kind, verdict] =
            [&phase["kind"], &phase["verdict"]["kind"]].map(|v| v.as_str().unwrap_or_default());
        println!("{kind:<14}{:.4} -> {:.4}  {verdict}", loss(&phase["before"]), loss(&phase["after"]));
    }

    // The three files belong together: the networks are refused beside any other adapter.
    let trained = plugin.open_session(&json!({ "base": base, "adapter": summary["adapter"] }), ())?;
    let tree = trained.open_tree(&json!({ "network": summary["gistnet"] }))?;
    trained.open_lens(&json!({ "network": summary["lensnet"] }))?;
    println!("ready for histories: blocks of {}, gists of version {}", tree["block"], tree["gist_version"]);
    Ok(())
}
