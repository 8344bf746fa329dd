//! The commands that are one job each, and `plugin check`.

use crate::args::{
    EvalGap, EvalPasskey, EvalPpl, Evaluated, Export, Extend, Generate, Global, Logits, Merge, PluginCheck,
    Pretrain, Report, Rope,
};
use crate::failure::{Failure, Result};
use crate::progress::{Reporter, catch_interrupts};
use crate::{params, tables};
use megacontext_lora_abi::{ErrorKind, LoadOptions, Plugin, loader};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The plugin that `--plugin` names, or the one beside this program.
pub fn plugin_path(global: &Global) -> Result<PathBuf> {
    global.plugin.clone().or_else(loader::find_beside_executable).ok_or_else(|| {
        let place = std::env::current_exe().ok().and_then(|e| e.parent().map(|p| p.display().to_string()));
        Failure::new(
            ErrorKind::Io,
            format!(
                "{}: not found in {}; build it with `cargo build --release`, or name one with --plugin",
                loader::library_file_name(),
                place.unwrap_or_else(|| "this program's folder".into())
            ),
        )
    })
}

/// Loads the plugin, runs one job with progress on stderr.
pub fn job(kind: &str, parameters: &Value, global: &Global) -> Result<Value> {
    let plugin = Plugin::load(plugin_path(global)?, &LoadOptions::default())?;
    catch_interrupts();
    let session = plugin.open_session(&json!({}), Reporter::new(global.json))?;
    Ok(session.run(kind, parameters)?)
}

/// How this program was called, for commands to copy.
pub fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "mclora".into())
}

/// A path as a shell takes it.
pub fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// Prints for people what `text` says; machines get the result itself.
fn show(global: &Global, text: impl FnOnce() -> String) {
    if !global.json {
        print!("{}", text());
    }
}

pub fn report(args: &Report, global: &Global) -> Result<Value> {
    let runs = args.runs.iter().map(|run| params::utf8(run)).collect::<Result<Vec<_>>>()?;
    let out = args.out.as_deref().map(params::utf8).transpose()?;
    let found = job("report", &json!({ "runs": runs, "out": out }), global)?;
    let texts = |value: &Value| -> Vec<String> {
        let cells = value.as_array().into_iter().flatten();
        cells.map(|cell| cell.as_str().unwrap_or_default().to_string()).collect()
    };
    let rows = |key: &str| -> Vec<Vec<String>> {
        let row =
            |row: &Value| [vec![row[0].as_str().unwrap_or_default().to_string()], texts(&row[1])].concat();
        found[key].as_array().into_iter().flatten().map(row).collect()
    };
    show(global, || {
        let runs = texts(&found["runs"]);
        let heads: Vec<&str> = std::iter::once("").chain(runs.iter().map(String::as_str)).collect();
        let mut text = format!("{}\n", tables::table(&heads, &rows("figures")));
        let settings = rows("settings");
        if !settings.is_empty() {
            text += &format!("Settings that differ:\n\n{}\n", tables::table(&heads, &settings));
        }
        if let Some(out) = &args.out {
            text += &format!("page      {}\n", out.display());
        }
        text
    });
    Ok(found)
}

pub fn extend(args: &Extend, global: &Global) -> Result<Value> {
    let (parameters, out) = params::extend(args, global)?;
    let summary = job("extend", &parameters, global)
        .map_err(|e| e.resumable(|| format!("{} extend --resume --out {}", program(), quoted(&out))))?;
    show(global, || finished(&summary, &out));
    Ok(summary)
}

/// What a finished extension says to people.
pub fn finished(summary: &Value, run: &Path) -> String {
    let mut text =
        format!("\nPerplexity on held-out text (lower is better):\n\n{}\n", tables::three_models(summary));
    for line in tables::verdict(summary) {
        text += &format!("{line}\n");
    }
    if let Some(gap) = summary["sparse_dense_gap"].as_f64() {
        text += &format!(
            "It was trained with sparse attention and is used with dense; with sparse its perplexity at the full context \
             is {}.\n",
            tables::against(1.0 + gap, 1.0, "with dense")
        );
    }
    let seconds = summary["seconds"].as_f64().unwrap_or(0.0);
    let peak = summary["peak_bytes"].as_f64().unwrap_or(0.0) / 1e6;
    text += &format!("It took {} and at most {peak:.0} MB of memory.\n\n", tables::duration(seconds));
    text += &format!("report    {}\n", run.join("report.html").display());
    text += &format!("adapter   {}\n", run.join("adapter").display());
    text += &format!("numbers   {}\n", run.join("summary.json").display());
    text
}

/// Runs an evaluation and shows its table; interrupted, it says how to go on.
fn evaluation(
    kind: &str,
    parameters: &Value,
    of: &Evaluated,
    global: &Global,
    text: fn(&Value) -> String,
) -> Result<Value> {
    let result = job(kind, parameters, global).map_err(|e| match &of.out {
        Some(out) => {
            let name = kind.trim_start_matches("eval_");
            e.resumable(|| format!("{} eval {name} --resume --out {}", program(), quoted(out)))
        }
        None => e,
    })?;
    show(global, || {
        let report = of.out.as_ref().map(|out| format!("report  {}\n", out.join("report.html").display()));
        format!("\n{}{}", text(&result), report.unwrap_or_default())
    });
    Ok(result)
}

pub fn eval_ppl(args: &EvalPpl, global: &Global) -> Result<Value> {
    evaluation("eval_ppl", &params::eval_ppl(args, global)?, &args.of, global, tables::evaluation)
}

pub fn eval_gap(args: &EvalGap, global: &Global) -> Result<Value> {
    evaluation("eval_gap", &params::eval_gap(args, global)?, &args.of, global, tables::gap)
}

pub fn eval_passkey(args: &EvalPasskey, global: &Global) -> Result<Value> {
    evaluation("eval_passkey", &params::eval_passkey(args, global)?, &args.of, global, tables::passkey)
}

pub fn generate(args: &Generate, global: &Global) -> Result<Value> {
    let result = job("generate", &params::generate(args, global)?, global)?;
    show(global, || {
        let rows = result["results"].as_array().map(Vec::as_slice).unwrap_or_default();
        let texts = rows.iter().map(|row| row["text"].as_str().unwrap_or_default());
        texts.map(|text| format!("{text}\n")).collect::<Vec<_>>().join("\n")
    });
    Ok(result)
}

pub fn merge(args: &Merge, global: &Global) -> Result<Value> {
    let result = job("merge", &params::merge(args)?, global)?;
    show(global, || {
        format!(
            "merged model  {}\npositions     {}, up to {} tokens\n{}",
            args.out.display(),
            result["rope"].as_str().unwrap_or("?"),
            result["max_position_embeddings"],
            untied(&result)
        )
    });
    Ok(result)
}

/// A line for a model that lost the tie between embedding and head.
fn untied(result: &Value) -> &'static str {
    if result["untied"] == true {
        "head          its own from now on: it is no longer the embedding (tie_word_embeddings is false in config.json)\n"
    } else {
        ""
    }
}

pub fn export(args: &Export, global: &Global) -> Result<Value> {
    let result = job("export", &params::export(args)?, global)?;
    show(global, || {
        let text = |key: &str| result[key].as_str().unwrap_or("?").to_owned();
        if result["format"] == "gguf" {
            let notes = result["notes"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let notes: String = notes.map(|note| format!("note          {note}\n")).collect();
            return format!(
                "adapter       {}\nfor           {}, LoRA on {} linear layers\n{notes}",
                text("file"),
                text("architecture"),
                result["modules"]
            );
        }
        format!(
            "base          {}: {} tensors are no longer the original's\nadapter       {}: LoRA on {} linear layers\n\
             positions     {}, up to {} tokens\n{}",
            text("base"),
            result["patched"].as_array().map_or(0, Vec::len),
            text("adapter"),
            result["modules"],
            text("rope"),
            result["max_position_embeddings"],
            untied(&result)
        )
    });
    Ok(result)
}

pub fn logits(args: &Logits, global: &Global) -> Result<Value> {
    let result = job("logits", &params::logits(args, global)?, global)?;
    show(global, || format!("logits {} written to {}\n", result["shape"], args.out.display()));
    Ok(result)
}

pub fn rope(args: &Rope, global: &Global) -> Result<Value> {
    let result = job("rope", &params::rope(args)?, global)?;
    show(global, || tables::rope(&result));
    Ok(result)
}

pub fn pretrain(args: &Pretrain, global: &Global) -> Result<Value> {
    let result = job("pretrain", &params::pretrain(args, global)?, global)?;
    show(global, || {
        let held_out = &result["held_out"];
        let nll = |key: &str| held_out[key].as_f64().map_or("not measured".into(), |n| format!("{n:.3}"));
        let rows = [
            ("this model", "model_nll"),
            ("5-gram with backoff", "five_gram_nll"),
            ("unigram", "unigram_nll"),
        ]
        .map(|(name, key)| vec![name.to_owned(), nll(key)]);
        format!(
            "\nLoss on held-out text, nats per token (lower is better):\n\n{}\nmodel   {}\n",
            tables::table(&["", "nats/token"], &rows),
            result["model"].as_str().unwrap_or("?")
        )
    });
    Ok(result)
}

pub fn plugin_check(args: &PluginCheck, global: &Global) -> Result<Value> {
    let path = match &args.path {
        Some(path) => path.clone(),
        None => plugin_path(global)?,
    };
    let mut options = LoadOptions::default();
    if let Some(hex) = &args.sha256 {
        options = options.with_sha256_hex(hex).ok_or_else(|| {
            Failure::usage(format!("--sha256: expected 64 hexadecimal digits, got \"{hex}\""))
        })?;
    }
    let plugin = Plugin::load(&path, &options).map_err(|error| {
        if args.details && !error.details().is_empty() {
            eprintln!("{}", error.details());
        }
        Failure::from(error)
    })?;
    let build = plugin.build_info();
    let told = plugin.open_session(&json!({}), ())?.describe()?;
    show(global, || {
        format!(
            "plugin        {}\nversion       {}\nABI revision  {}\nbuilt         {} for {}, profile {}\n\
             CPU features  {}\ncan           {}\n{}",
            path.display(),
            plugin.version_line(),
            plugin.abi_revision(),
            build.rustc,
            build.target,
            build.profile,
            build.cpu_features.join(", "),
            plugin.capabilities().join(", "),
            gpus(&told)
        )
    });
    Ok(json!({
        "path": params::utf8(&path)?,
        "version_line": plugin.version_line(),
        "abi_revision": plugin.abi_revision(),
        "build": {
            "crate_version": build.crate_version, "rustc": build.rustc, "target": build.target,
            "profile": build.profile, "cpu_features": build.cpu_features,
        },
        "capabilities": plugin.capabilities(),
        "devices": told["devices"],
        "no_gpu": told["no_gpu"],
    }))
}

/// Lines about the GPUs that the plugin sees, or about why it sees none.
fn gpus(told: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    if let Some(why) = told["no_gpu"].as_str() {
        return format!("GPU           none: {why}\n");
    }
    let gpus = told["devices"].as_array().into_iter().flatten().filter(|device| device["name"].is_string());
    gpus.map(|gpu| {
        format!(
            "GPU           {}: {}, compute capability {}, {:.1} GB{}\n",
            text(&gpu["device"]),
            text(&gpu["name"]),
            text(&gpu["compute_capability"]),
            gpu["memory_bytes"].as_f64().unwrap_or(0.0) / 1e9,
            gpu["unusable"].as_str().map_or(String::new(), |why| format!("; not usable: {why}"))
        )
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_listed_or_missed_with_a_reason() {
        let none = json!({ "devices": [{ "device": "cpu" }], "no_gpu": "built without the feature cuda" });
        assert_eq!(gpus(&none), "GPU           none: built without the feature cuda\n");
        let two = json!({ "no_gpu": null, "devices": [
            { "device": "cpu" },
            { "device": "cuda:0", "name": "NVIDIA H200", "compute_capability": "9.0", "memory_bytes": 150_754_820_096u64,
              "unusable": null },
            { "device": "cuda:1", "name": "Old", "compute_capability": "7.5", "memory_bytes": 8_000_000_000u64,
              "unusable": "expected compute capability 8.0 or newer, got 7.5" },
        ] });
        assert_eq!(
            gpus(&two),
            "GPU           cuda:0: NVIDIA H200, compute capability 9.0, 150.8 GB\n\
             GPU           cuda:1: Old, compute capability 7.5, 8.0 GB; not usable: expected compute capability 8.0 or newer, \
             got 7.5\n"
        );
        // A plugin of before says nothing of devices.
        assert_eq!(gpus(&json!({})), "");
    }

    #[test]
    fn paths_are_quoted_when_they_need_it() {
        assert_eq!(quoted(Path::new("runs/a-1")), "runs/a-1");
        assert_eq!(quoted(Path::new("my runs/it's")), r"'my runs/it'\''s'");
    }
}
