//! From flags and TOML to the JSON parameters of a job.
//!
//! A TOML file gives an object, every flag that was given sets one key of it, by its path. Nothing is checked that the
//! plugin checks: an unknown key in the file travels on and comes back as the plugin's error. Only what JSON cannot say
//! is read here: the shorthand for stages, sizes with a unit, a group in tokens or as a part.

use crate::args::{
    EvalGap, EvalPasskey, EvalPpl, Evaluated, Export, Extend, Generate, Global, Logits, Merge, Pretrain,
    Rope, Scored, Used,
};
use crate::failure::{Failure, Result};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Where `extend` writes when nothing says otherwise; the plugin's own default.
const DEFAULT_OUT: &str = "runs/extend";

/// Parameters under construction.
#[derive(Debug, Default)]
pub struct Params(Map<String, Value>);

impl Params {
    /// The settings of a TOML file.
    pub fn from_toml(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Failure::io(path, &e))?;
        Self::parse_toml(&text).map_err(|message| Failure::usage(format!("{}: {message}", path.display())))
    }

    fn parse_toml(text: &str) -> std::result::Result<Self, String> {
        match toml::from_str::<Value>(text) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(other) => Err(format!("expected a table, got {other}")),
            Err(error) => {
                let line = error.span().map(|s| text[..s.start.min(text.len())].matches('\n').count() + 1);
                let place = line.map_or(String::new(), |n| format!("line {n}: "));
                Err(format!("{place}{}", error.message()))
            }
        }
    }

    /// Sets the key at a dotted path. Whatever stands in the way of the path and is no object is replaced.
    pub fn set(&mut self, path: &str, value: impl Into<Value>) {
        let mut keys: Vec<&str> = path.split('.').collect();
        let Some(last) = keys.pop() else { return };
        let mut map = &mut self.0;
        for key in keys {
            let entry = map.entry(key).or_insert_with(|| json!({}));
            if !entry.is_object() {
                *entry = json!({});
            }
            let Value::Object(inner) = entry else { return };
            map = inner;
        }
        map.insert(last.to_owned(), value.into());
    }

    /// Sets it if there is a value.
    pub fn set_some<T: Into<Value>>(&mut self, path: &str, value: Option<T>) {
        if let Some(value) = value {
            self.set(path, value);
        }
    }

    /// Sets it if the list is not empty.
    pub fn set_list<T: Into<Value> + Clone>(&mut self, path: &str, values: &[T]) {
        if !values.is_empty() {
            self.set(path, values.to_vec());
        }
    }

    /// A path, where it is given and can be text.
    pub fn set_path(&mut self, path: &str, value: Option<&PathBuf>) -> Result<()> {
        match value {
            Some(value) => {
                self.set(path, utf8(value)?);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// An object made elsewhere, to be completed.
    pub fn from_value(value: Value) -> Self {
        match value {
            Value::Object(map) => Self(map),
            _ => Self::default(),
        }
    }

    /// Sets the key at a dotted path where nothing is there yet.
    pub fn set_default(&mut self, path: &str, value: impl Into<Value>) {
        let there = path.split('.').try_fold(None, |at: Option<&Value>, key| match at {
            None => self.0.get(key).map(Some),
            Some(value) => value.get(key).map(Some),
        });
        if there.is_none() {
            self.set(path, value);
        }
    }

    /// The value of a top-level key that is text.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.as_str()
    }

    /// Forgets a top-level key.
    fn remove(&mut self, key: &str) {
        self.0.shift_remove(key);
    }

    /// Forgets keys of every stage.
    fn forget_in_stages(&mut self, keys: &[&str]) {
        let stages = self.0.get_mut("stages").and_then(Value::as_array_mut);
        for stage in stages.into_iter().flatten().filter_map(Value::as_object_mut) {
            keys.iter().for_each(|key| {
                stage.shift_remove(*key);
            });
        }
    }

    /// The finished object.
    pub fn into_value(self) -> Value {
        Value::Object(self.0)
    }
}

/// A path as JSON can carry it.
pub fn utf8(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| Failure::usage(format!("{}: expected a path in UTF-8", path.display())))
}

/// The parameters of `extend`, and its run folder.
pub fn extend(args: &Extend, global: &Global) -> Result<(Value, PathBuf)> {
    let mut params = match &args.config {
        Some(path) => Params::from_toml(path)?,
        None => resumed(args)?,
    };
    params.set_path("base", args.base.as_ref())?;
    params.set_list("data", &args.data);
    params.set_some("context", args.context);
    params.set_path("out", args.out.as_ref())?;
    params.set_some("seed", args.seed);
    params.set_some("holdout", args.holdout);
    args.lora.set(&mut params)?;
    params.set_some("embeddings", args.embeddings.as_deref().or(args.freeze_embeddings.then_some("frozen")));
    params.set_list("new_tokens", &args.new_tokens);
    params.set_some("optimizer.lora_plus_lr_ratio", args.lora_plus_lr_ratio);
    params.set_some("train_norms", args.freeze_norms.then_some(false));
    if args.config.is_some() && (args.context.is_some() || args.steps.is_some()) {
        // The file's stages were made for its own context and steps: without them the plugin makes new ones.
        params.remove("stages");
    }
    if args.config.is_some() && args.stages.is_some() {
        params.remove("steps");
    }
    params.set_some("stages", args.stages.as_deref().map(stages).transpose()?);
    params.set_some("steps", args.steps);
    if args.scaling.is_some() || args.factor.is_some() {
        // The file's stages hold what it resolved for itself.
        params.forget_in_stages(&["scaling", "factor"]);
    }
    params.set_some("scaling", args.scaling.as_deref().map(scaling).transpose()?);
    params.set_some("factor", args.factor);
    params.set_some("optimizer.lr", args.lr);
    params.set_some("optimizer.schedule", args.schedule.as_deref());
    params.set_some("optimizer.warmup_steps", args.warmup);
    params.set_some("optimizer.weight_decay", args.weight_decay);
    params.set_some("optimizer.clip", args.clip);
    params.set_some("batch.tokens_per_step", args.tokens_per_step);
    params.set_some("batch.micro_batch_tokens", args.micro_batch_tokens);
    params.set_some("dtype", args.dtype.as_deref());
    params.set_some("activation_checkpointing", args.activation_checkpointing.as_deref());
    params.set_some("memory_budget_bytes", args.memory.as_deref().map(bytes).transpose()?);
    params.set_list("eval.contexts", &args.eval_contexts);
    params.set_some("eval.stride", args.eval_stride);
    params.set_some("eval.max_tokens", args.eval_tokens);
    params.set_some("checkpoint.every", args.checkpoint_every);
    params.set_some("checkpoint.keep", args.checkpoint_keep);
    params.set_some("threads", global.threads);
    params.set_some("device", global.device.as_deref());
    params.set_some("resume", args.resume.then_some(true));
    let out = PathBuf::from(params.text("out").unwrap_or(DEFAULT_OUT));
    Ok((params.into_value(), out))
}

/// A resumed run goes on with the settings that it wrote, if it got so far.
fn resumed(args: &Extend) -> Result<Params> {
    let written = args.out.as_deref().unwrap_or(Path::new(DEFAULT_OUT)).join("config.toml");
    if args.resume && written.is_file() { Params::from_toml(&written) } else { Ok(Params::default()) }
}

/// What all evaluations are told; one that is taken up goes on with the settings that it wrote.
fn evaluated(of: &Evaluated, global: &Global) -> Result<Params> {
    let written =
        of.out.as_deref().map(|out| out.join("config.toml")).filter(|path| of.resume && path.is_file());
    let mut params = written.as_deref().map(Params::from_toml).transpose()?.unwrap_or_default();
    params.set_path("base", of.base.as_ref())?;
    params.set_path("out", of.out.as_ref())?;
    params.set_some("resume", of.resume.then_some(true));
    used(&of.used, global, &mut params)?;
    Ok(params)
}

/// How the model of an evaluation or a generation is used.
fn used(of: &Used, global: &Global, params: &mut Params) -> Result<()> {
    params.set_path("adapter", of.adapter.as_ref())?;
    params.set_some("scaling", of.scaling.as_deref().map(scaling).transpose()?);
    params.set_some("factor", of.factor);
    params.set_some("dtype", of.dtype.as_deref());
    params.set_some("threads", global.threads);
    params.set_some("device", global.device.as_deref());
    Ok(())
}

fn scored(text: &Scored, params: &mut Params) {
    params.set_list("data", &text.data);
    params.set_list("contexts", &text.contexts);
    params.set_some("stride", text.stride);
    params.set_some("max_tokens", text.max_tokens);
    params.set_some("seed", text.seed);
}

/// The parameters of `eval_ppl`.
pub fn eval_ppl(args: &EvalPpl, global: &Global) -> Result<Value> {
    let mut params = evaluated(&args.of, global)?;
    scored(&args.text, &mut params);
    params.set_some("attention", args.attention.as_deref());
    params.set_some("group", args.group.as_deref().map(group).transpose()?);
    Ok(params.into_value())
}

/// The parameters of `eval_gap`.
pub fn eval_gap(args: &EvalGap, global: &Global) -> Result<Value> {
    let mut params = evaluated(&args.of, global)?;
    scored(&args.text, &mut params);
    params.set_some("group", args.group.as_deref().map(group).transpose()?);
    Ok(params.into_value())
}

/// The parameters of `eval_passkey`.
pub fn eval_passkey(args: &EvalPasskey, global: &Global) -> Result<Value> {
    let mut params = evaluated(&args.of, global)?;
    params.set_list("lengths", &args.lengths);
    params.set_list("depths", &args.depths);
    params.set_some("trials", args.trials);
    params.set_some("seed", args.seed);
    params.set_some("batch", args.batch);
    Ok(params.into_value())
}

/// The parameters of `generate`.
pub fn generate(args: &Generate, global: &Global) -> Result<Value> {
    let mut params = Params::default();
    params.set_path("base", Some(&args.base))?;
    params.set_list("prompts", &args.prompt);
    params.set_path("prompt_file", args.prompt_file.as_ref())?;
    params.set_some("max_new_tokens", args.max_new_tokens);
    params.set_some("temperature", args.temperature);
    params.set_some("top_p", args.top_p);
    params.set_some("seed", args.seed);
    params.set_some("ignore_end", args.ignore_end.then_some(true));
    used(&args.used, global, &mut params)?;
    Ok(params.into_value())
}

/// The parameters of `merge`.
pub fn merge(args: &Merge) -> Result<Value> {
    let mut params = Params::default();
    params.set_path("base", Some(&args.base))?;
    params.set_path("adapter", Some(&args.adapter))?;
    params.set_path("out", Some(&args.out))?;
    params.set_some("dtype", args.dtype.as_deref());
    Ok(params.into_value())
}

/// The parameters of `export`.
pub fn export(args: &Export) -> Result<Value> {
    let mut params = Params::default();
    params.set("format", args.format.as_str());
    params.set_path("base", Some(&args.base))?;
    params.set_path("adapter", Some(&args.adapter))?;
    params.set_path("out", Some(&args.out))?;
    params.set_some("dtype", args.dtype.as_deref());
    Ok(params.into_value())
}

/// The parameters of `logits`.
pub fn logits(args: &Logits, global: &Global) -> Result<Value> {
    let mut params = Params::default();
    params.set_path("base", Some(&args.base))?;
    params.set_path("adapter", args.adapter.as_ref())?;
    params.set_path("tokens", Some(&args.tokens))?;
    params.set_path("out", Some(&args.out))?;
    params.set_some("dtype", args.dtype.as_deref());
    params.set_some("device", global.device.as_deref());
    Ok(params.into_value())
}

/// The parameters of `rope`.
pub fn rope(args: &Rope) -> Result<Value> {
    let mut params = Params::default();
    params.set_path("base", Some(&args.base))?;
    params.set_some("scaling", args.scaling.as_deref().map(scaling).transpose()?);
    params.set_some("factor", args.factor);
    params.set_some("context", args.context);
    params.set_some("block", args.block);
    params.set_some("uniform", args.uniform.then_some(true));
    params.set_path("plot", args.plot.as_ref())?;
    Ok(params.into_value())
}

/// The parameters of `pretrain`.
pub fn pretrain(args: &Pretrain, global: &Global) -> Result<Value> {
    let mut params = args.config.as_deref().map(Params::from_toml).transpose()?.unwrap_or_default();
    params.set_path("out", args.out.as_ref())?;
    params.set_some("vocab_size", args.vocab_size);
    params.set_some("hidden_size", args.hidden_size);
    params.set_some("intermediate_size", args.intermediate_size);
    params.set_some("num_hidden_layers", args.layers);
    params.set_some("num_attention_heads", args.heads);
    params.set_some("num_key_value_heads", args.kv_heads);
    params.set_some("rope_theta", args.rope_theta);
    params.set_some("context", args.context);
    params.set_some("steps", args.steps);
    params.set_some("tokens_per_step", args.tokens_per_step);
    params.set_some("lr", args.lr);
    params.set_some("weight_decay", args.weight_decay);
    params.set_some("seconds", args.seconds);
    params.set_some("seed", args.seed);
    params.set_some("dtype", args.dtype.as_deref());
    params.set_some("threads", global.threads);
    params.set_some("device", global.device.as_deref());
    Ok(params.into_value())
}

/// A scaling: a name, or the JSON object that describes it.
pub fn scaling(text: &str) -> Result<Value> {
    if !text.trim_start().starts_with('{') {
        return Ok(json!(text));
    }
    serde_json::from_str(text).map_err(|e| {
        Failure::usage(format!("--scaling: expected a name or a JSON object, got \"{text}\": {e}"))
    })
}

/// `512:150,1024:150:s2:0.25` as a list of stages.
fn stages(text: &str) -> Result<Value> {
    let bad = |stage: &str| {
        Failure::usage(format!(
            "--stages: expected CONTEXT:STEPS[:s2|dense[:GROUP]], got \"{stage}\" in \"{text}\""
        ))
    };
    let mut stages = Vec::new();
    for stage in text.split(',') {
        let parts: Vec<&str> = stage.trim().split(':').collect();
        let (context, steps, rest) = match parts[..] {
            [context, steps, ref rest @ ..] if rest.len() <= 2 => (context, steps, rest),
            _ => return Err(bad(stage)),
        };
        let number = |part: &str| part.parse::<u64>().map_err(|_| bad(stage));
        let mut entry = json!({ "context": number(context)?, "steps": number(steps)? });
        if let Some(attention) = rest.first() {
            entry["attention"] = json!(attention);
        }
        if let Some(part) = rest.get(1) {
            entry["group"] = group(part).map_err(|_| bad(stage))?;
        }
        stages.push(entry);
    }
    Ok(Value::Array(stages))
}

/// A group of S²-Attn: a whole number is tokens, one with a point a part of the context.
pub fn group(text: &str) -> Result<Value> {
    if let Ok(tokens) = text.parse::<u64>() {
        return Ok(json!(tokens));
    }
    match text.parse::<f64>() {
        Ok(part) if part.is_finite() => Ok(json!(part)),
        _ => Err(Failure::usage(format!(
            "group: expected a number of tokens, or a part of the context such as 0.25, got \"{text}\""
        ))),
    }
}

/// `8GiB`, `500 MB`, `1073741824`.
pub fn bytes(text: &str) -> Result<Value> {
    let bad = || Failure::usage(format!("--memory: expected a size such as 8GiB or 500MB, got \"{text}\""));
    let digits = text.trim().find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.trim().len());
    let (number, unit) = text.trim().split_at(digits);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" | "k" => 1e3,
        "mb" | "m" => 1e6,
        "gb" | "g" => 1e9,
        "kib" => 1024.0,
        "mib" => 1048576.0,
        "gib" => 1073741824.0,
        _ => return Err(bad()),
    };
    let size = number.parse::<f64>().map_err(|_| bad())? * factor;
    if !size.is_finite() || size >= u64::MAX as f64 {
        return Err(bad());
    }
    Ok(json!(size as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    fn extend_of(line: &str) -> Result<Value> {
        let cli = Cli::try_parse_from(line.split_whitespace()).expect("a command line that clap accepts");
        match cli.command {
            Some(Command::Extend(args)) => Ok(extend(&args, &cli.global)?.0),
            other => panic!("not extend: {other:?}"),
        }
    }

    fn toml_file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn only_given_flags_become_keys() {
        let params =
            extend_of("mclora extend --base m --data a b --context 1024 --rank 4 --lr 1e-3").unwrap();
        assert_eq!(
            params,
            json!({
                "base": "m", "data": ["a", "b"], "context": 1024, "lora": {"r": 4}, "optimizer": {"lr": 1e-3}
            })
        );
    }

    #[test]
    fn flags_go_over_the_file_key_by_key() {
        let file =
            toml_file("context = 512\nseed = 3\n[lora]\nr = 2\nalpha = 4.0\n[eval]\ncontexts = [1, 2]\n");
        let line = format!(
            "mclora extend --config {} --context 1024 --alpha 8 --eval-contexts 256,1024 --threads 2",
            file.path().display()
        );
        assert_eq!(
            extend_of(&line).unwrap(),
            json!({
                "context": 1024, "seed": 3, "lora": {"r": 2, "alpha": 8.0},
                "eval": {"contexts": [256, 1024]}, "threads": 2
            })
        );
    }

    #[test]
    fn stages_of_the_file_yield_to_context_and_steps() {
        let file = toml_file("context = 512\nsteps = 9\n[[stages]]\ncontext = 512\nsteps = 9\n");
        let with = |flags: &str| {
            extend_of(&format!("mclora extend --config {} {flags}", file.path().display())).unwrap()
        };
        let own = json!([{ "context": 512, "steps": 9 }]);
        assert_eq!(with("--lr 1e-3")["stages"], own);
        assert_eq!(with("--context 1024"), json!({ "context": 1024, "steps": 9 }));
        assert_eq!(with("--steps 20"), json!({ "context": 512, "steps": 20 }));
        assert_eq!(
            with("--stages 512:3"),
            json!({ "context": 512, "stages": [{ "context": 512, "steps": 3 }] })
        );
        let given = with("--context 1024 --steps 20 --stages 1024:3");
        assert_eq!(given["stages"], json!([{ "context": 1024, "steps": 3 }]));
    }

    #[test]
    fn a_scaling_goes_over_what_the_file_resolved_for_its_stages() {
        let file = toml_file("[[stages]]\ncontext = 512\nsteps = 9\nfactor = 2.0\nscaling = \"linear\"\n");
        let line = format!("mclora extend --config {} --scaling yarn --factor 4", file.path().display());
        assert_eq!(
            extend_of(&line).unwrap(),
            json!({ "stages": [{ "context": 512, "steps": 9 }], "scaling": "yarn", "factor": 4.0 })
        );
    }

    #[test]
    fn a_scaling_is_a_name_or_an_object() {
        assert_eq!(scaling("yarn").unwrap(), json!("yarn"));
        let object = r#"{"rope_type": "yarn", "beta_fast": 16}"#;
        assert_eq!(scaling(object).unwrap(), json!({ "rope_type": "yarn", "beta_fast": 16 }));
        let error = scaling("{rope_type}").unwrap_err();
        assert!(error.to_string().contains("--scaling: expected a name or a JSON object"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn an_unknown_key_travels_on_to_the_plugin() {
        let file = toml_file("contxt = 512\n[lora]\nrnak = 2\n");
        let params = extend_of(&format!("mclora extend --config {}", file.path().display())).unwrap();
        assert_eq!(params, json!({ "contxt": 512, "lora": { "rnak": 2 } }));
    }

    #[test]
    fn broken_toml_names_file_and_line() {
        let file = toml_file("context = 512\nseed = = 3\n");
        let error = extend_of(&format!("mclora extend --config {}", file.path().display())).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let message = error.to_string();
        assert!(
            message.contains("line 2") && message.contains(&file.path().display().to_string()),
            "{message}"
        );
        assert!(!message.contains('\n'), "{message}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = extend_of("mclora extend --config /no/such.toml").unwrap_err();
        assert!(error.to_string().starts_with("/no/such.toml: "), "{error}");
        assert_eq!(error.exit_code(), 1);
    }

    #[test]
    fn resuming_takes_up_the_settings_of_the_run_folder() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.toml"), "context = 512\nout = \"elsewhere\"\n").unwrap();
        let out = folder.path().display().to_string();
        let params = extend_of(&format!("mclora extend --resume --out {out}")).unwrap();
        assert_eq!(params, json!({ "context": 512, "out": out, "resume": true }));
        // Without --resume the folder's settings are nobody's business.
        assert_eq!(extend_of(&format!("mclora extend --out {out}")).unwrap(), json!({ "out": out }));
    }

    #[test]
    fn stages_have_a_shorthand() {
        let params =
            extend_of("mclora extend --stages 512:150,1024:50:dense,2048:5:s2:0.5,4096:5:s2:256").unwrap();
        assert_eq!(
            params["stages"],
            json!([
                { "context": 512, "steps": 150 },
                { "context": 1024, "steps": 50, "attention": "dense" },
                { "context": 2048, "steps": 5, "attention": "s2", "group": 0.5 },
                { "context": 4096, "steps": 5, "attention": "s2", "group": 256 },
            ])
        );
        for bad in ["512", "a:1", "512:1:s2:x", "512:1:s2:1:2", "512:1,", ""] {
            let error = stages(bad).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{bad}");
            assert!(error.to_string().contains("--stages"), "{error}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, size) in [("1", 1u64), ("2kB", 2000), ("1.5 GiB", 1610612736), ("500MB", 500_000_000)] {
            assert_eq!(bytes(text).unwrap(), json!(size), "{text}");
        }
        for bad in ["", "GB", "5 parsecs", "-1", "1e99GB"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_group_is_tokens_or_a_part() {
        assert_eq!(group("256").unwrap(), json!(256));
        assert_eq!(group("0.25").unwrap(), json!(0.25));
        assert!(group("NaN").is_err() && group("wide").is_err());
    }
}
