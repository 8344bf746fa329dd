//! `mclora train lensnet`.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::args::Global;
use crate::args_lens::TrainLensnet;
use crate::commands::{job, program, quoted};
use crate::failure::Result;
use crate::params::bytes;
use crate::tables::{duration, table};
use crate::train::begun;

/// The run folder where none is named.
const DEFAULT_OUT: &str = "runs/lensnet";

pub fn lensnet(args: &TrainLensnet, global: &Global) -> Result<Value> {
    let (parameters, out) = parameters(args, global)?;
    let summary = job("train_lensnet", &parameters, global).map_err(|e| {
        e.resumable(|| format!("{} train lensnet --resume --out {}", program(), quoted(&out)))
    })?;
    if !global.json {
        print!("{}", finished(&summary, &out));
    }
    Ok(summary)
}

fn parameters(args: &TrainLensnet, global: &Global) -> Result<(Value, PathBuf)> {
    let mut params = begun(&args.what, DEFAULT_OUT, global)?;
    params.set_path("gistnet", args.gistnet.as_ref())?;
    params.set_some("history", args.history);
    params.set_some("horizon", args.horizon);
    params.set_some("budget", args.budget);
    params.set_some("protected", args.protected);
    params.set_some("levels", args.levels);
    params.set_some("network.layers", args.layers);
    params.set_some("network.head", args.head.as_deref());
    params.set_some("network.group", args.group);
    params.set_some("network.kind", args.kind.as_deref());
    params.set_some("labels.kind", args.labels.as_deref());
    params.set_some("labels.rounds", args.rounds);
    params.set_some("labels.histories", args.label_histories);
    params.set_some("labels.edits", args.label_edits);
    params.set_some("steps", args.steps);
    params.set_some("batch", args.batch);
    params.set_some("optimizer.lr", args.lr);
    params.set_some("dtype", args.dtype.as_deref());
    params.set_some("memory_budget_bytes", args.memory.as_deref().map(bytes).transpose()?);
    params.set_some("validation.histories", args.validation_histories);
    params.set_some("validation.test_histories", args.test_histories);
    params.set_some("checkpoint.every", args.checkpoint_every);
    let out = PathBuf::from(params.text("out").unwrap_or(DEFAULT_OUT));
    Ok((params.into_value(), out))
}

/// What a finished run says to people.
fn finished(summary: &Value, run: &Path) -> String {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let names = [
        ("random", "random focus"),
        ("recency", "recency (newest fine, the rest coarse)"),
        ("lensnet", "LensNet"),
        ("oracle", "oracle (follows measured worth)"),
    ];
    let planted = summary["facts_shown"].as_object().is_some_and(|shown| !shown.is_empty());
    let rows: Vec<Vec<String>> = names
        .into_iter()
        .filter(|(key, _)| summary["focus_loss"][key].is_number())
        .map(|(key, name)| {
            let mut row = vec![name.to_string(), format!("{:.4}", number(&summary["focus_loss"][key]))];
            let against = &summary["test"]["against"][key];
            row.push(match against["mean"].as_f64() {
                Some(mean) => format!("{mean:+.4} ± {:.4}", number(&against["error"])),
                None => String::new(),
            });
            if planted {
                row.push(format!("{:.0} %", 100.0 * number(&summary["facts_shown"][key])));
            }
            row
        })
        .collect();
    let horizon = summary["horizon"].as_u64().unwrap_or(0);
    let head = format!("loss@{horizon}, nats");
    let mut heads = vec!["context chosen by", head.as_str(), "LensNet less this"];
    if planted {
        heads.push("fact shown");
    }
    let mut text = format!(
        "\nWhat the next {horizon} tokens cost behind {} entries for {} tokens ({} held-out histories):\n\n{}\n",
        summary["budget"],
        summary["history"],
        summary["test_histories"],
        table(&heads, &rows)
    );
    let peak = number(&summary["peak_bytes"]) / 1e6;
    text += &format!(
        "Best at step {}. It took {} and at most {peak:.0} MB of memory.\n\n",
        summary["best_step"],
        duration(number(&summary["seconds"]))
    );
    text += &format!("report    {}\n", run.join("report.html").display());
    text += &format!("network   {}\n", run.join("lensnet.safetensors").display());
    text += &format!("labels    {}\n", run.join("labels").display());
    text += &format!("numbers   {}\n", run.join("summary.json").display());
    text
}
