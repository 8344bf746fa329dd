//! `mclora train CONFIG.toml`: alternating optimisation.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::args::Global;
use crate::args_cycle::TrainCycle;
use crate::commands::{job, program, quoted};
use crate::failure::{Failure, Result};
use crate::params::{Params, bytes};
use crate::tables::{duration, table};

/// The run folder where none is named.
const DEFAULT_OUT: &str = "runs/train";

pub fn run(args: &TrainCycle, global: &Global) -> Result<Value> {
    let (parameters, out) = parameters(args, global)?;
    let summary = job("train", &parameters, global)
        .map_err(|e| e.resumable(|| format!("{} train --resume --out {}", program(), quoted(&out))))?;
    if !global.json && !args.plan {
        print!("{}", finished(&summary, &out));
    }
    Ok(summary)
}

fn parameters(args: &TrainCycle, global: &Global) -> Result<(Value, PathBuf)> {
    let written = args.out.as_deref().unwrap_or(Path::new(DEFAULT_OUT)).join("config.toml");
    let mut params = match &args.config {
        Some(path) => Params::from_toml(path)?,
        None if args.resume && written.is_file() => Params::from_toml(&written)?,
        None if args.resume => {
            return Err(Failure::usage(format!(
                "train: {}: expected the settings of the run to take up, found none; name them again",
                written.display()
            )));
        }
        None if args.base.is_none() => {
            return Err(Failure::usage(
                "train: expected settings, such as configs/jt_cycle.toml, or --base and --data, or `gistnet` or `lensnet` for one \
                 network alone, got none; see mclora train --help",
            ));
        }
        None => Params::default(),
    };
    params.set_path("base", args.base.as_ref())?;
    params.set_path("adapter", args.adapter.as_ref())?;
    params.set_path("gistnet", args.gistnet.as_ref())?;
    params.set_path("lensnet", args.lensnet.as_ref())?;
    params.set_list("data", &args.data);
    params.set_path("out", args.out.as_ref())?;
    params.set_some("resume", args.resume.then_some(true));
    params.set_some("plan_only", args.plan.then_some(true));
    params.set_some("seed", args.seed);
    params.set_some("cycles", args.cycles);
    params.set_some("ablation", args.ablation.then_some(true));
    params.set_some("dtype", args.dtype.as_deref());
    params.set_some("memory_budget_bytes", args.memory.as_deref().map(bytes).transpose()?);
    params.set_some("threads", global.threads);
    params.set_some("device", global.device.as_deref());
    let out = PathBuf::from(params.text("out").unwrap_or(DEFAULT_OUT));
    Ok((params.into_value(), out))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

fn with_error(of: &Value) -> String {
    match of["mean"].as_f64() {
        Some(mean) => format!("{mean:+.4} ± {:.4}", number(&of["error"])),
        None => String::new(),
    }
}

/// What each phase changed, what stands for spans and who chooses contexts and what that costs.
fn tables(summary: &Value) -> String {
    let horizon = &summary["horizon"];
    let loss = format!("loss@{horizon}");
    let rows: Vec<Vec<String>> = summary["phases"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|phase| phase["without"].is_null())
        .map(|phase| {
            let name = match phase["kind"].as_str().unwrap_or_default() {
                "warm_gistnet" => "warm start, GistNet".to_string(),
                "warm_lensnet" => "warm start, LensNet".to_string(),
                kind => format!("cycle {}, {}", phase["cycle"], kind.to_uppercase()),
            };
            let kept = phase["verdict"]["kind"] == "kept";
            let gist = |of: &str| number(&phase[of]["delta_nll"]["gist"]);
            vec![
                name,
                format!("{:.4}", number(&phase["before"]["loss_at_h"])),
                format!("{:.4}", number(&phase["after"]["loss_at_h"])),
                with_error(&phase["change"]),
                format!("{:.3} -> {:.3}", gist("before"), gist("after")),
                if kept { "kept" } else { "rolled back" }.to_string(),
            ]
        })
        .collect();
    let heads = ["phase", loss.as_str(), "after", "change", "ΔNLL of gists", ""];
    let mut text = format!(
        "\nWhat each phase changed, on the histories that phases are judged by:\n\n{}",
        table(&heads, &rows)
    );

    let names = [
        ("deleted", "nothing (deleted)"),
        ("last_token", "its last token"),
        ("mean", "the mean of its embeddings"),
        ("gist", "its gist"),
    ];
    let rows: Vec<Vec<String>> = names
        .into_iter()
        .map(|(key, name)| vec![name.to_string(), format!("{:.4}", number(&summary["delta_nll"][key]))])
        .collect();
    let delta = format!("ΔNLL@{horizon}, nats");
    text += &format!(
        "\nWhat a span that the policy collapsed costs, by what stands for it ({} spans of test documents):\n\n{}",
        summary["test"]["spans"],
        table(&["in its place", delta.as_str()], &rows)
    );
    let names = [
        ("random", "random focus"),
        ("recency", "recency (newest fine, the rest coarse)"),
        ("lensnet", "LensNet"),
        ("oracle", "oracle (follows measured worth)"),
    ];
    let rows: Vec<Vec<String>> = names
        .into_iter()
        .map(|(key, name)| {
            let loss = format!("{:.4}", number(&summary["focus_loss"][key]));
            vec![name.to_string(), loss, with_error(&summary["focus_against"][key])]
        })
        .collect();
    let nats = format!("{loss}, nats");
    text += &format!(
        "\nWhat the next {horizon} tokens cost behind {} entries for {} tokens (test documents):\n\n{}",
        summary["budget"],
        number(&summary["context"]) - number(horizon),
        table(&["context chosen by", nats.as_str(), "LensNet less this"], &rows)
    );
    let ablation: Vec<Vec<String>> = summary["ablation"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|pass| {
            let frozen = pass["without"].as_str().unwrap_or_default().to_string();
            let change = &pass["change"];
            let change = format!("{:+.4} ± {:.4}", number(&change["mean"]), number(&change["error"]));
            vec![frozen, format!("{:.4}", number(&pass["test"]["loss_at_h"])), change]
        })
        .collect();
    if !ablation.is_empty() {
        let own = format!("{:.4}", number(&summary["test"]["loss_at_h"]));
        let own = vec!["nothing".to_string(), own, String::new()];
        let rows: Vec<Vec<String>> = [own].into_iter().chain(ablation).collect();
        text += &format!(
            "\nThe same run with a module frozen from its start:\n\n{}",
            table(&["frozen", nats.as_str(), "more than with all"], &rows)
        );
    }
    text
}

/// What a finished run says to people.
pub fn finished(summary: &Value, run: &Path) -> String {
    let mut text = tables(summary);
    let peak = number(&summary["peak_bytes"]) / 1e6;
    text += &format!(
        "\nEnded: {}. It took {} and at most {peak:.0} MB of memory.\n\n",
        summary["ended"].as_str().unwrap_or_default(),
        duration(number(&summary["seconds"]))
    );
    for (name, file) in [
        ("report ", "report.html"),
        ("adapter", "adapter"),
        ("GistNet", "gistnet.safetensors"),
        ("LensNet", "lensnet.safetensors"),
        ("numbers", "summary.json"),
    ] {
        text += &format!("{name}   {}\n", run.join(file).display());
    }
    text
}
