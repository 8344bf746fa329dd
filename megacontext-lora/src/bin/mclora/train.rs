//! `mclora train` and `mclora eval gist`: networks beside a frozen base model.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::args::Global;
use crate::args_gist::{EvalGist, TrainGistnet, What};
use crate::commands::{job, program, quoted};
use crate::failure::{Failure, Result};
use crate::params::{self, Params, bytes};
use crate::tables::{duration, table};

/// The run folder where none is named.
const DEFAULT_OUT: &str = "runs/gistnet";

pub fn gistnet(args: &TrainGistnet, global: &Global) -> Result<Value> {
    let (parameters, out) = parameters(args, global)?;
    let summary = job("train_gistnet", &parameters, global).map_err(|e| {
        e.resumable(|| format!("{} train gistnet --resume --out {}", program(), quoted(&out)))
    })?;
    if !global.json {
        print!("{}", finished(&summary, &out));
    }
    Ok(summary)
}

pub fn eval_gist(args: &EvalGist, global: &Global) -> Result<Value> {
    let mut params = Params::default();
    params.set_path("run", args.run.as_ref())?;
    params.set_path("base", args.base.as_ref())?;
    params.set_path("adapter", args.adapter.as_ref())?;
    params.set_path("network", args.network.as_ref())?;
    params.set_some("other_adapter", args.other_adapter.then_some(true));
    params.set_list("data", &args.data);
    params.set_some("context", args.context);
    params.set_some("horizon", args.horizon);
    params.set_some("block", args.block);
    params.set_some("passages", args.passages);
    params.set_some("sparse_group", args.sparse_group.as_deref().map(params::group).transpose()?);
    params.set_some("seed", args.seed);
    params.set_some("dtype", args.dtype.as_deref());
    params.set_some("threads", global.threads);
    params.set_some("device", global.device.as_deref());
    let result = job("eval_gist", &params.into_value(), global)?;
    if !global.json {
        print!("{}", stand_ins(&result, "blocks"));
    }
    Ok(result)
}

/// Parameters of a run so far: a settings file, or those of the run that is taken up, with the flags that all such runs have over
/// them.
pub fn begun(what: &What, default_out: &str, global: &Global) -> Result<Params> {
    let written = what.out.as_deref().unwrap_or(Path::new(default_out)).join("config.toml");
    let mut params = match &what.config {
        Some(path) => Params::from_toml(path)?,
        None if what.resume && written.is_file() => Params::from_toml(&written)?,
        None => Params::default(),
    };
    params.set_path("base", what.base.as_ref())?;
    params.set_path("adapter", what.adapter.as_ref())?;
    params.set_list("data", &what.data);
    params.set_path("out", what.out.as_ref())?;
    params.set_some("seed", what.seed);
    params.set_some("holdout", what.holdout);
    params.set_some("threads", global.threads);
    params.set_some("device", global.device.as_deref());
    params.set_some("resume", what.resume.then_some(true));
    Ok(params)
}

fn parameters(args: &TrainGistnet, global: &Global) -> Result<(Value, PathBuf)> {
    let mut params = begun(&args.what, DEFAULT_OUT, global)?;
    params.set_some("network.block", args.block);
    params.set_some("network.layers", args.layers);
    params.set_some("network.pooling", args.pooling.as_deref());
    params.set_some("network.head", args.head.as_deref());
    params.set_some("network.mode", args.mode.as_deref());
    params.set_some("context", args.context);
    params.set_some("stages", args.stages.as_deref().map(stages).transpose()?);
    params.set_some("attention", args.attention.as_deref());
    params.set_some("group", args.group.as_deref().map(params::group).transpose()?);
    params.set_some("passages_per_step", args.passages_per_step);
    params.set_some("spans_per_passage", args.spans_per_passage);
    params.set_some("optimizer.lr", args.lr);
    params.set_some("dtype", args.dtype.as_deref());
    params.set_some("memory_budget_bytes", args.memory.as_deref().map(bytes).transpose()?);
    params.set_some("validation.every", args.validate_every);
    params.set_some("validation.passages", args.validation_passages);
    params.set_some("validation.test_passages", args.test_passages);
    params.set_some("checkpoint.every", args.checkpoint_every);
    let out = PathBuf::from(params.text("out").unwrap_or(DEFAULT_OUT));
    Ok((params.into_value(), out))
}

/// `32:600,64:1200` as stages.
fn stages(list: &str) -> Result<Value> {
    let stage = |text: &str| -> Result<Value> {
        let numbers: Vec<Option<u64>> = text.split(':').map(|part| part.trim().parse().ok()).collect();
        match numbers[..] {
            [Some(horizon), Some(steps)] => Ok(json!({ "horizon": horizon, "steps": steps })),
            _ => Err(Failure::usage(format!(
                "--stages: expected HORIZON:STEPS, such as 32:600, separated by commas, got \"{text}\""
            ))),
        }
    };
    list.split(',').map(stage).collect::<Result<Vec<_>>>().map(Value::Array)
}

/// What blocks cost, by what stands for them: the table that the job made.
fn stand_ins(measured: &Value, of: &str) -> String {
    let validation = &measured["validation"];
    let cells = |row: &Value| -> Vec<String> {
        let row = row.as_array().into_iter().flatten();
        row.map(|cell| cell.as_str().unwrap_or_default().to_string()).collect()
    };
    let head = cells(&measured["table"]["head"]);
    let rows: Vec<Vec<String>> =
        measured["table"]["rows"].as_array().into_iter().flatten().map(cells).collect();
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    format!(
        "\nWhat a block costs over the next {} tokens (ΔNLL@{}), by what stands for it ({} {of}):\n\n{}\n",
        validation["horizon"],
        validation["horizon"],
        validation["blocks"],
        table(&head, &rows)
    )
}

/// What a finished run says to people.
fn finished(summary: &Value, run: &Path) -> String {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let mut text = stand_ins(&summary["test"], "test blocks, which nothing was chosen by");
    let seconds = number(&summary["seconds"]);
    let peak = number(&summary["peak_bytes"]) / 1e6;
    text += &format!(
        "{}, best at step {}. ",
        summary["ended"].as_str().unwrap_or_default(),
        summary["best_step"]
    );
    text += &format!("It took {} and at most {peak:.0} MB of memory.\n\n", duration(seconds));
    text += &format!("report    {}\n", run.join("report.html").display());
    text += &format!("network   {}\n", run.join("gistnet.safetensors").display());
    text += &format!("numbers   {}\n", run.join("summary.json").display());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_horizons_and_steps() {
        assert_eq!(
            stages("32:600, 64:10").unwrap(),
            json!([{ "horizon": 32, "steps": 600 }, { "horizon": 64, "steps": 10 }])
        );
        for bad in ["32", "32:", "a:3", "32:3:4", ""] {
            let error = stages(bad).unwrap_err();
            assert!(error.to_json().to_string().contains("expected HORIZON:STEPS"), "{bad}");
        }
    }
}
