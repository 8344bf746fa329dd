//! The job `report`: finished runs side by side, what they came to and which of their settings differ.
//!
//! Runs of different kinds may stand beside each other; a figure that one has not is a dash. A folder that holds runs itself, such as a
//! quickstart's, stands for them. Parameters: `runs`, folders; `out`, a page to write (none writes nothing).
//!
//! Units: nats per token, seconds, bytes. Errors: a folder that is no finished run, by its path and what it lacks.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use megacontext_base::atomic::write_file;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{IoResultExt, PluginError, Result};
use crate::host::HostApi;
use crate::jobs::{model_error, parse, to_value};
use crate::report::compare::render;
use crate::run::folder::CONFIG;
use crate::run::summary::SUMMARY;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Params {
    runs: Vec<PathBuf>,
    #[serde(default)]
    out: Option<PathBuf>,
}

/// Runs side by side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Their folders.
    pub runs: Vec<String>,
    /// What each is: `extend`, `train`, `train_gistnet`, `train_lensnet`.
    pub kinds: Vec<String>,
    /// What they came to: a name, and a cell for each run.
    pub figures: Vec<(String, Vec<String>)>,
    /// Settings that all have and that differ: a key, and a cell for each run.
    pub settings: Vec<(String, Vec<String>)>,
}

/// What is not there.
const NONE: &str = "\u{2013}";

/// Figures in the order of the table: name, where it stands in a summary, digits.
const FIGURES: [(&str, &str, usize); 20] = [
    ("loss@H of the policy's contexts, test", "/test/loss_at_h", 4),
    ("loss@H after the warm start", "/test_before/loss_at_h", 4),
    ("loss@H behind whole histories", "/test/full_loss", 4),
    ("loss@H, LensNet", "/focus_loss/lensnet", 4),
    ("loss@H, recency", "/focus_loss/recency", 4),
    ("loss@H, random focus", "/focus_loss/random", 4),
    ("loss@H, oracle", "/focus_loss/oracle", 4),
    ("\u{394}NLL@H, gist", "/delta_nll/gist", 4),
    ("\u{394}NLL@H, deleted", "/delta_nll/deleted", 4),
    ("\u{394}NLL@H, mean", "/delta_nll/mean", 4),
    ("\u{394}NLL@H, last token", "/delta_nll/last_token", 4),
    ("\u{394}NLL@H of gists, test", "/test/validation/delta_nll", 4),
    ("recovered of deletion", "/recovered", 3),
    ("swap rate", "/test/swap_rate", 3),
    ("sparse/dense gap", "/sparse_dense_gap", 4),
    ("steps", "/steps", 0),
    ("seconds", "/seconds", 0),
    ("peak bytes", "/peak_bytes", 0),
    ("seed", "/seed", 0),
    ("threads", "/threads", 0),
];

struct RunFiles {
    folder: PathBuf,
    summary: Value,
    settings: Value,
}

/// Runs the job.
pub fn run(params: Value, _host: &dyn HostApi) -> Result<Value> {
    let Params { runs, out } = parse(params)?;
    if runs.is_empty() {
        return Err(PluginError::usage("runs: expected at least one run folder, got none"));
    }
    let mut all = Vec::new();
    for folder in &runs {
        for folder in folders(folder) {
            all.push(RunFiles::read(folder)?);
        }
    }
    let comparison = compare(&all)?;
    if let Some(out) = out {
        write_file(&out, render(&comparison).as_bytes()).map_err(model_error)?;
    }
    to_value(&comparison)
}

/// The run of a folder, or the runs in it.
fn folders(folder: &Path) -> Vec<PathBuf> {
    if !folder.join(SUMMARY).is_file() {
        let inside: Vec<PathBuf> = ["run", "cycle"]
            .map(|name| folder.join(name))
            .into_iter()
            .filter(|run| run.join(SUMMARY).is_file())
            .collect();
        if !inside.is_empty() {
            return inside;
        }
    }
    vec![folder.to_path_buf()]
}

impl RunFiles {
    fn read(folder: PathBuf) -> Result<Self> {
        let path = folder.join(SUMMARY);
        if !path.is_file() {
            return Err(PluginError::data(format!(
                "{}: expected a finished run, whose {SUMMARY} says what it came to, found none",
                folder.display()
            )));
        }
        let text = std::fs::read_to_string(&path).at(&path)?;
        let summary: Value =
            serde_json::from_str(&text).map_err(|e| PluginError::data(format!("{}: {e}", path.display())))?;
        let path = folder.join(CONFIG);
        let text = if path.is_file() { std::fs::read_to_string(&path).at(&path)? } else { String::new() };
        let settings =
            toml::from_str(&text).map_err(|e| PluginError::data(format!("{}: {e}", path.display())))?;
        Ok(Self { folder, summary, settings })
    }

    fn kind(&self) -> Result<&'static str> {
        let has = |pointer: &str| self.summary.pointer(pointer).is_some();
        Ok(match () {
            () if has("/test_before") => "train",
            () if has("/perplexity") => "extend",
            () if has("/most_gap") => "train_gistnet",
            () if has("/focus_loss") => "train_lensnet",
            () => {
                return Err(PluginError::data(format!(
                    "{}: expected the summary of a run of extend, train, train gistnet or train lensnet, got another",
                    self.folder.join(SUMMARY).display()
                )));
            }
        })
    }
}

fn compare(all: &[RunFiles]) -> Result<Comparison> {
    let kinds = all.iter().map(|run| run.kind().map(str::to_string)).collect::<Result<Vec<_>>>()?;
    let mut figures: Vec<(String, Vec<String>)> = Vec::new();
    let mut row = |name: String, cells: Vec<Option<String>>| {
        if cells.iter().any(Option::is_some) {
            figures.push((name, cells.into_iter().map(|cell| cell.unwrap_or(NONE.to_string())).collect()));
        }
    };
    for model in ["base", "interpolated", "adapted"] {
        let of = |run: &RunFiles| run.summary["perplexity"][model].as_object().cloned().unwrap_or_default();
        let contexts: BTreeSet<u64> = all
            .iter()
            .flat_map(|run| of(run).keys().filter_map(|key| key.parse().ok()).collect::<Vec<u64>>())
            .collect();
        for context in contexts {
            let cell = |run: &RunFiles| {
                of(run).get(&context.to_string()).and_then(Value::as_f64).map(|value| format!("{value:.2}"))
            };
            row(format!("perplexity, {model}, {context} tokens"), all.iter().map(cell).collect());
        }
    }
    for (name, pointer, digits) in FIGURES {
        let cell = |run: &RunFiles| {
            run.summary.pointer(pointer).and_then(Value::as_f64).map(|value| format!("{value:.digits$}"))
        };
        row(name.to_string(), all.iter().map(cell).collect());
    }
    let undone = |run: &RunFiles| {
        let phases = run.summary["phases"].as_array()?;
        let own = phases.iter().filter(|phase| phase["without"].is_null());
        let undone = own.clone().filter(|phase| phase["verdict"]["kind"] != "kept").count();
        Some(format!("{undone} of {}", own.count()))
    };
    row("phases rolled back".to_string(), all.iter().map(undone).collect());
    let device =
        |run: &RunFiles| run.summary["device"].as_str().filter(|name| !name.is_empty()).map(str::to_string);
    row("device".to_string(), all.iter().map(device).collect());

    let flat: Vec<Vec<(String, String)>> = all.iter().map(|run| flattened(&run.settings)).collect();
    let keys: BTreeSet<&String> =
        flat.iter().flatten().map(|(key, _)| key).filter(|key| *key != "out").collect();
    let mut settings = Vec::new();
    for key in keys {
        let cell = |own: &Vec<(String, String)>| {
            own.iter().find(|(other, _)| other == key).map_or(NONE.to_string(), |(_, value)| value.clone())
        };
        let cells: Vec<String> = flat.iter().map(cell).collect();
        // Runs of different kinds have settings that mean nothing to each other.
        if cells.iter().any(|cell| *cell != cells[0]) && !cells.iter().any(|cell| cell == NONE) {
            settings.push((key.clone(), cells));
        }
    }
    let runs = all.iter().map(|run| run.folder.display().to_string()).collect();
    Ok(Comparison { runs, kinds, figures, settings })
}

/// Settings by dotted key.
fn flattened(settings: &Value) -> Vec<(String, String)> {
    fn walk(at: &str, value: &Value, into: &mut Vec<(String, String)>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    let key = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                    walk(&key, value, into);
                }
            }
            Value::String(text) => into.push((at.to_string(), text.clone())),
            other => into.push((at.to_string(), other.to_string())),
        }
    }
    let mut all = Vec::new();
    walk("", settings, &mut all);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn files(summary: Value, settings: Value) -> RunFiles {
        RunFiles { folder: PathBuf::from("runs/a"), summary, settings }
    }

    #[test]
    fn figures_stand_side_by_side_and_settings_only_where_they_differ() {
        let all = [
            files(
                json!({ "perplexity": { "base": { "256": 9.333, "64": 12.0 } }, "steps": 3 }),
                json!({ "seed": 1, "lora": { "r": 8 }, "out": "a" }),
            ),
            files(
                json!({ "test_before": {}, "test": { "loss_at_h": 2.5 }, "steps": 4, "phases": [
                    { "without": null, "verdict": { "kind": "kept" } }, { "without": null, "verdict": { "kind": "worse" } },
                    { "without": "lora", "verdict": { "kind": "worse" } },
                ] }),
                json!({ "seed": 1, "lora": { "r": 4 }, "out": "b" }),
            ),
        ];
        let found = compare(&all).unwrap();
        assert_eq!(found.kinds, ["extend", "train"]);
        let row = |name: &str| found.figures.iter().find(|(other, _)| other == name).unwrap().1.clone();
        assert_eq!(row("perplexity, base, 64 tokens"), ["12.00", NONE]);
        assert_eq!(row("loss@H of the policy's contexts, test"), [NONE, "2.5000"]);
        assert_eq!(row("steps"), ["3", "4"]);
        assert_eq!(row("phases rolled back"), [NONE, "1 of 2"]);
        assert_eq!(found.settings, [("lora.r".to_string(), vec!["8".to_string(), "4".to_string()])]);
    }

    #[test]
    fn a_folder_that_is_no_run_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = run(json!({ "runs": [folder.path()] }), &crate::host::Silent).unwrap_err();
        assert!(error.message.contains("expected a finished run"), "{error}");
        std::fs::write(folder.path().join(SUMMARY), "{}").unwrap();
        let error = run(json!({ "runs": [folder.path()] }), &crate::host::Silent).unwrap_err();
        assert!(error.message.contains("expected the summary of a run"), "{error}");
    }
}
