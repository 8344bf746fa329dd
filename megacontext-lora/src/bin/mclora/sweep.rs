//! `mclora sweep`: the job of that name, with the embedded model where no other is named.
//!
//! Without `--base` it goes as in quickstart: the model's files to `OUT/base`, the sweep to `OUT/run`, text found on this
//! machine.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::args::{Extend, Global, Sweep};
use crate::commands::{job, program, quoted};
use crate::failure::{Failure, Result};
use crate::params::{self, Params, utf8};
use crate::quickstart::{CONTEXT, default_out, write_base};
use crate::tables::{duration, perplexity, table, thousands};

/// Where it goes unless told.
const DEFAULT_OUT: &str = "runs/sweep";

pub fn run(args: &Sweep, global: &Global) -> Result<Value> {
    let lora = &args.extend.lora;
    for (flag, given) in [("--rank", lora.rank.is_some()), ("--alpha", lora.alpha.is_some())] {
        if given {
            return Err(Failure::usage(format!(
                "{flag}: a sweep tries the ranks of --ranks, each with alpha = scale times rank (--scale); expected no {flag}"
            )));
        }
    }
    let out = match &args.extend.out {
        Some(out) => out.clone(),
        None => default_out(Path::new(DEFAULT_OUT), args.extend.resume),
    };
    let named = args.extend.base.is_some() || args.extend.config.is_some();
    let embedded = !named && !out.join("config.toml").is_file();
    let folder = if embedded { out.join("run") } else { out.clone() };
    let (parameters, taken_up) = parameters(args, global, &folder, embedded.then(|| out.join("base")))?;
    if embedded && !taken_up {
        write_base(&out.join("base"))?;
    }
    let summary = job("sweep", &parameters, global)
        .map_err(|e| e.resumable(|| format!("{} sweep --resume --out {}", program(), quoted(&out))))?;
    if !global.json {
        print!("{}", finished(&summary, &folder));
    }
    Ok(summary)
}

/// The job's parameters, and whether they are those of a sweep that began earlier.
fn parameters(
    args: &Sweep,
    global: &Global,
    folder: &Path,
    embedded: Option<PathBuf>,
) -> Result<(Value, bool)> {
    let extend = Extend { out: Some(folder.to_path_buf()), ..args.extend.clone() };
    let taken_up = extend.resume && folder.join("config.toml").is_file();
    let (value, _) = params::extend(&extend, global)?;
    let mut params = Params::from_value(value);
    params.set_list("ranks", &args.ranks);
    params.set_some("budget_steps", args.budget_steps);
    params.set_some("budget_seconds", args.budget_seconds);
    params.set_some("scale", args.scale);
    if let Some(base) = embedded {
        params.set_default("base", utf8(&base)?);
        params.set_default("data", vec!["corpus:held-out"]);
        params.set_default("context", CONTEXT);
        params.set_default("optimizer.lr", 1e-3);
        params.set_default("optimizer.warmup_steps", 10);
        params.set_default("optimizer.schedule", "cosine");
        params.set_default("eval.max_tokens", 32_768);
        params.set_default("checkpoint.every", 30);
    }
    Ok((params.into_value(), taken_up))
}

/// What a finished sweep says to people.
fn finished(summary: &Value, folder: &Path) -> String {
    let number = |value: &Value| value.as_u64().map_or("?".into(), thousands);
    let choice = &summary["choice"];
    let rows: Vec<Vec<String>> = summary["ranks"]
        .as_array()
        .into_iter()
        .flatten()
        .zip(choice["standings"].as_array().into_iter().flatten())
        .map(|(rank, standing)| {
            let four = |value: &Value| value.as_f64().map_or("-".into(), |x| format!("{x:.4}"));
            let mark = if standing["rank"] == choice["rank"] { " <-" } else { "" };
            vec![
                format!("{}{mark}", rank["rank"]),
                four(&standing["loss"]),
                rank["perplexity"].as_f64().map_or("?".into(), perplexity),
                if standing["rank"] == choice["best"] { "best".into() } else { four(&standing["behind"]) },
                four(&standing["margin"]),
                number(&rank["lora_parameters"]),
                rank["seconds"].as_f64().map_or("?".into(), duration),
                format!("{:.0} MB", rank["peak_bytes"].as_f64().unwrap_or(0.0) / 1e6),
            ]
        })
        .collect();
    let header =
        ["rank", "nats/token", "perplexity", "behind", "margin", "LoRA parameters", "training", "memory"];
    format!(
        "\nHeld-out loss at {} tokens after {} steps each (lower is better):\n\n{}\nTake rank {}: {}.\n\
         The rule: {}.\n\nreport    {}\nnumbers   {}\nnext      {}\n",
        number(&summary["context"]),
        number(&summary["steps"]),
        table(&header, &rows),
        choice["rank"],
        choice["reason"].as_str().unwrap_or("?"),
        summary["rule"].as_str().unwrap_or("?"),
        folder.join("report.html").display(),
        folder.join("summary.json").display(),
        summary["next_command"].as_str().unwrap_or("?")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_embedded_model_brings_defaults_that_flags_go_over() {
        let of = |extend: Extend, embedded: bool| {
            let args = Sweep { ranks: vec![2, 4], extend, ..Sweep::default() };
            let base = embedded.then(|| PathBuf::from("o/base"));
            parameters(&args, &Global::default(), Path::new("o/run"), base).unwrap().0
        };
        let plain = of(Extend::default(), true);
        assert_eq!((&plain["base"], &plain["context"]), (&json!("o/base"), &json!(CONTEXT)));
        assert_eq!((&plain["ranks"], &plain["out"]), (&json!([2, 4]), &json!("o/run")));
        let own = of(Extend { lr: Some(0.5), context: Some(512), ..Extend::default() }, true);
        assert_eq!((&own["optimizer"]["lr"], &own["context"]), (&json!(0.5), &json!(512)));
        assert_eq!(own["optimizer"]["warmup_steps"], json!(10));
        assert_eq!(of(Extend::default(), false), json!({ "out": "o/run", "ranks": [2, 4] }));
    }

    #[test]
    fn the_chosen_rank_is_marked() {
        let summary = json!({
            "context": 1024, "steps": 60, "rule": "r", "next_command": "n",
            "ranks": [
                { "rank": 4, "perplexity": 8.0, "lora_parameters": 1000, "seconds": 5.0, "peak_bytes": 7e8 },
                { "rank": 8, "perplexity": 7.9, "lora_parameters": 2000, "seconds": 6.0, "peak_bytes": 8e8 },
            ],
            "choice": { "rank": 4, "best": 8, "reason": "because", "standings": [
                { "rank": 4, "loss": 2.0794, "behind": 0.01, "margin": 0.02 },
                { "rank": 8, "loss": 2.0694, "behind": 0.0, "margin": null },
            ] },
        });
        let text = finished(&summary, Path::new("o"));
        assert!(text.contains("4 <-") && text.contains("Take rank 4: because."), "{text}");
        assert!(
            text.lines().any(|l| l.contains("2.0694") && l.contains("best") && l.contains("2,000")),
            "{text}"
        );
    }
}
