//! `mclora quickstart`: the embedded model grows from 256 to 1024 tokens of context, on text of this machine; then gists learn to
//! stand for spans of it, LensNet where to look closer, and LoRA to read the contexts that come of it: one warm start and one cycle.
//!
//! The model's files are part of the program. They are written to `OUT/base`, whole or not at all. The job `extend` runs into
//! `OUT/run`, the job `train` with the settings of `configs/quickstart.toml` into `OUT/cycle`: the same jobs that a user's own model
//! gets. `--smoke` is the same path with fewer steps and fewer scored tokens.

use crate::args::{Global, Quickstart};
use crate::commands::{finished, job, program, quoted};
use crate::failure::{Failure, Result};
use crate::params::{Params, utf8};
use crate::train_cycle;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The embedded model: file names and contents.
#[cfg(embedded_base)]
const BASE: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../../../../assets/tiny-llama/config.json")),
    ("model.safetensors", include_bytes!("../../../../assets/tiny-llama/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../../../assets/tiny-llama/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../../../assets/tiny-llama/tokenizer_config.json")),
];
/// Built without the model's files: there is nothing to start with.
#[cfg(not(embedded_base))]
const BASE: [(&str, &[u8]); 0] = [];

/// The cycle's settings.
const CYCLE: &str = include_str!("../../../../configs/quickstart.toml");

/// Where it goes unless told.
const DEFAULT_OUT: &str = "runs/quickstart";

/// What a model's folder is called while it is written: this and the process's number.
const BUILDING: &str = ".base-";

/// The context to reach, in tokens.
pub const CONTEXT: u64 = 1024;

/// What decides how long it takes.
struct Preset {
    stages: [(u64, u64); 2],
    tokens_per_step: u64,
    lr: f64,
    warmup_steps: u64,
    eval_tokens: u64,
    checkpoint_every: u64,
}

/// What is smaller in the cycle with `--smoke`.
const SMOKE_CYCLE: [(&str, u64); 13] = [
    ("warm_gistnet.steps", 4),
    ("warm_gistnet.batch", 2),
    ("warm_lensnet.steps", 4),
    ("warm_lensnet.batch", 2),
    ("warm_lensnet.labels.histories", 4),
    ("jt1.steps", 3),
    ("jt1.batch", 2),
    ("jt2.steps", 3),
    ("jt2.labels.histories", 4),
    ("jt3.steps", 3),
    ("jt3.batch", 2),
    ("validation.histories", 4),
    ("validation.test_histories", 4),
];

/// At most five minutes on two cores.
const FULL: Preset = Preset {
    stages: [(512, 60), (1024, 140)],
    tokens_per_step: 8192,
    lr: 1e-3,
    warmup_steps: 10,
    eval_tokens: 32_768,
    checkpoint_every: 30,
};

/// At most forty seconds.
const SMOKE: Preset = Preset {
    stages: [(512, 5), (1024, 5)],
    tokens_per_step: 4096,
    lr: 1e-3,
    warmup_steps: 2,
    eval_tokens: 4096,
    checkpoint_every: 5,
};

pub fn run(args: &Quickstart, global: &Global) -> Result<Value> {
    let out = match &args.out {
        Some(out) => out.clone(),
        None => default_out(Path::new(DEFAULT_OUT), args.resume),
    };
    let (base, run, cycle) = (out.join("base"), out.join("run"), out.join("cycle"));
    let resumable = || format!("{} quickstart --resume --out {}", program(), quoted(&out));
    write_base(&base)?;
    if !global.json && !args.resume {
        eprintln!(
            "A small language model that was trained on 256 tokens at a time learns to use {CONTEXT}, on text found on\n\
             this machine; then to work with gists in the place of spans. It takes {}; everything goes to {}.",
            if args.smoke { "about a minute" } else { "some minutes" },
            out.display()
        );
    }
    let extended = extended(args, &base, &run, global).map_err(|e| e.resumable(resumable))?;
    if !global.json {
        println!("{}", finished(&extended, &run));
    }
    let cycled = cycled(args, &base, &run, &cycle, global).map_err(|e| e.resumable(resumable))?;
    if !global.json {
        print!("{}", train_cycle::finished(&cycled, &cycle));
        println!("\n{}", next_command(&base, &run, &extended));
    }
    Ok(with_paths(extended, &cycled, &base, &run, &cycle))
}

/// The extension: run, taken up again, or read where it is done.
fn extended(args: &Quickstart, base: &Path, run: &Path, global: &Global) -> Result<Value> {
    let (written, done) = (run.join("config.toml"), run.join("summary.json"));
    if args.resume && done.is_file() {
        let text = std::fs::read_to_string(&done).map_err(|error| Failure::io(&done, &error))?;
        return serde_json::from_str(&text).map_err(|error| {
            Failure::usage(format!("{}: expected a run's summary: {error}", done.display()))
        });
    }
    let resume = args.resume && written.is_file();
    let mut params = if resume { Params::from_toml(&written)? } else { parameters(base, run, args.smoke)? };
    params.set("resume", resume);
    params.set_some("threads", global.threads);
    params.set_some("device", global.device.as_deref());
    params.set_some("dtype", args.dtype.as_deref());
    if !resume {
        params.set_some("scaling", args.scaling.as_deref());
    }
    job("extend", &params.into_value(), global)
}

/// The cycle on the extended model.
fn cycled(args: &Quickstart, base: &Path, run: &Path, cycle: &Path, global: &Global) -> Result<Value> {
    let written = cycle.join("config.toml");
    let resume = args.resume && written.is_file();
    let mut params = if resume { Params::from_toml(&written)? } else { cycle_parameters(args.smoke)? };
    if !resume {
        params.set("base", utf8(base)?);
        params.set("adapter", utf8(&run.join("adapter"))?);
        params.set("out", utf8(cycle)?);
        params.set_some("dtype", args.dtype.as_deref());
    }
    params.set("resume", resume);
    params.set_some("threads", global.threads);
    params.set_some("device", global.device.as_deref());
    job("train", &params.into_value(), global)
}

/// The cycle's settings, but for where things are.
fn cycle_parameters(smoke: bool) -> Result<Params> {
    let settings: Value = toml::from_str(CYCLE)
        .map_err(|error| Failure::internal(format!("configs/quickstart.toml: {error}")))?;
    let mut params = Params::from_value(settings);
    if smoke {
        SMOKE_CYCLE.iter().for_each(|(key, value)| params.set(key, *value));
    }
    Ok(params)
}

/// The first free name; to resume, the last one taken.
pub fn default_out(first: &Path, resume: bool) -> PathBuf {
    let name = |n: u32| match n {
        1 => first.to_path_buf(),
        n => PathBuf::from(format!("{}-{n}", first.display())),
    };
    let free = (1..u32::MAX).find(|&n| !name(n).exists()).unwrap_or(1);
    name(if resume { (free - 1).max(1) } else { free })
}

fn parameters(base: &Path, run: &Path, smoke: bool) -> Result<Params> {
    let preset = if smoke { &SMOKE } else { &FULL };
    let mut params = Params::default();
    params.set("base", utf8(base)?);
    params.set("data", vec!["corpus:held-out"]);
    params.set("out", utf8(run)?);
    params.set("context", CONTEXT);
    // Products in bf16 where the machine has them; as f32 elsewhere.
    params.set("dtype", "mixed");
    let stages: Vec<Value> =
        preset.stages.iter().map(|(context, steps)| json!({ "context": context, "steps": steps })).collect();
    params.set("stages", stages);
    params.set("optimizer.lr", preset.lr);
    params.set("optimizer.warmup_steps", preset.warmup_steps);
    params.set("optimizer.schedule", "cosine");
    params.set("batch.tokens_per_step", preset.tokens_per_step);
    params.set("eval.max_tokens", preset.eval_tokens);
    params.set("checkpoint.every", preset.checkpoint_every);
    Ok(params)
}

/// Writes the model's folder beside its place and renames it; a folder that is there already is left as it is.
pub fn write_base(base: &Path) -> Result<()> {
    if BASE.is_empty() {
        return Err(Failure::usage(
            "this program was built without its small model (assets/tiny-llama); use `mclora extend --base DIR`",
        ));
    }
    if base.exists() {
        return Ok(());
    }
    let parent = base.parent().unwrap_or(Path::new("."));
    remove_leftovers(parent);
    let building = parent.join(format!("{BUILDING}{}", std::process::id()));
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(&building)?;
        for (name, bytes) in BASE {
            std::fs::write(building.join(name), bytes)?;
            std::fs::File::open(building.join(name))?.sync_all()?;
        }
        std::fs::rename(&building, base)?;
        // The new name is on the disk when its folder is.
        std::fs::File::open(parent)?.sync_all()
    };
    write().map_err(|error| {
        let _ = std::fs::remove_dir_all(&building);
        Failure::io(base, &error)
    })
}

/// Removes what programs that were killed left of a model's folder. Where the system shows its processes in /proc, the
/// folder of one that still runs is left alone. What cannot be removed is in nobody's way.
fn remove_leftovers(parent: &Path) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(id) = name.to_str().and_then(|n| n.strip_prefix(BUILDING)?.parse::<u32>().ok()) else {
            continue;
        };
        if id == std::process::id() || !Path::new("/proc").join(id.to_string()).exists() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn next_command(base: &Path, run: &Path, summary: &Value) -> String {
    let contexts: Vec<&str> = summary["perplexity"]["adapted"]
        .as_object()
        .into_iter()
        .flat_map(|m| m.keys())
        .map(String::as_str)
        .collect();
    format!(
        "Next, try it on text of your own:\n  {} eval ppl --base {} --adapter {} --data FILE.txt --contexts {}\n\
         or on a model of your own:\n  {} extend --help",
        program(),
        quoted(base),
        quoted(&run.join("adapter")),
        contexts.join(","),
        program()
    )
}

/// The extension's summary, with what the cycle adds to it.
fn with_paths(mut summary: Value, cycled: &Value, base: &Path, run: &Path, cycle: &Path) -> Value {
    if let Value::Object(map) = &mut summary {
        map.insert(
            "paths".into(),
            json!({
                "base": base, "run": run, "report": run.join("report.html"), "adapter": run.join("adapter"), "cycle": cycle,
                "cycle_report": cycle.join("report.html"), "cycle_adapter": cycle.join("adapter"),
                "gistnet": cycle.join("gistnet.safetensors"), "lensnet": cycle.join("lensnet.safetensors"),
            }),
        );
        for key in ["delta_nll", "focus_loss", "phases"] {
            map.insert(key.into(), cycled[key].clone());
        }
        map.insert("cycle".into(), cycled.clone());
    }
    summary
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_folder_is_the_next_free_one() {
        let folder = tempfile::tempdir().unwrap();
        let first = folder.path().join("quickstart");
        assert_eq!(default_out(&first, false), first);
        assert_eq!(default_out(&first, true), first);
        std::fs::create_dir(&first).unwrap();
        let second = folder.path().join("quickstart-2");
        assert_eq!(default_out(&first, false), second);
        assert_eq!(default_out(&first, true), first);
        std::fs::create_dir(&second).unwrap();
        assert_eq!(default_out(&first, true), second);
        assert_eq!(default_out(&first, false), folder.path().join("quickstart-3"));
    }

    #[test]
    fn smoke_is_the_same_path_with_smaller_numbers() {
        let of = |smoke| parameters(Path::new("b"), Path::new("r"), smoke).unwrap().into_value();
        let (full, smoke) = (of(false), of(true));
        let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&full), keys(&smoke));
        assert_eq!(full["context"], smoke["context"]);
        assert_eq!(full["stages"][1]["context"], json!(CONTEXT));
    }

    #[test]
    fn the_cycles_smoke_changes_settings_that_there_are() {
        let settings = cycle_parameters(false).unwrap().into_value();
        for (key, value) in SMOKE_CYCLE {
            let place = settings.pointer(&format!("/{}", key.replace('.', "/")));
            assert!(place.and_then(Value::as_u64).is_some_and(|full| full > value), "{key}: {place:?}");
        }
    }

    #[test]
    fn leftovers_of_dead_programs_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        // No system has a process of the last number.
        for name in [".base-4294967295", ".base-x", ".other", "base"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            std::fs::write(folder.path().join(name).join("config.json"), "{").unwrap();
        }
        remove_leftovers(folder.path());
        remove_leftovers(&folder.path().join("none"));
        let mut left: Vec<_> =
            std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [".base-x", ".other", "base"]);
    }

    #[test]
    #[cfg(embedded_base)]
    fn the_model_is_written_whole() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("out").join("base");
        write_base(&base).unwrap();
        assert_eq!(std::fs::read_dir(base.parent().unwrap()).unwrap().count(), 1);
        for (name, bytes) in BASE {
            assert_eq!(std::fs::read(base.join(name)).unwrap(), bytes, "{name}");
        }
        write_base(&base).unwrap();
    }
}
