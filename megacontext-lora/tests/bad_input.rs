//! Bad input: one test for each thing refused, named after it.
//!
//! Each runs the real program and asserts the exit code (2 for a wrong flag or setting, 1 otherwise), one message of one
//! line with what was expected, what was found and where, no panic, and nothing half-written.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::DType;
use common::{Fixture, Running, edit_json, edit_tensor, mclora, tree, truncate, with};
use megacontext_lora_abi::{VERSION_LINE, loader};
use serde_json::json;

impl Fixture {
    /// `extend` with some flags set otherwise is refused, and there is no run folder afterwards.
    #[track_caller]
    fn refuses(&self, flags: &[(&str, &str)], code: i32, facts: &[&str]) {
        mclora(&with(self.extend("run"), flags)).refused(code, facts);
        assert!(!self.path("run").exists(), "{:?}", tree(&self.path("run")).keys());
    }

    /// `extend` on the base folder `base` is refused.
    #[track_caller]
    fn refuses_base(&self, base: &str, facts: &[&str]) {
        self.refuses(&[("--base", &self.at(base))], 1, facts);
    }

    /// Evaluating, merging and computing logits with this base and this adapter are refused alike.
    #[track_caller]
    fn refuses_adapter(&self, base: &str, adapter: &str, facts: &[&str]) {
        let (base, data, tokens) = (self.at(base), self.at("data"), self.at("tokens.json"));
        let (merged, logits) = (self.at("merged"), self.at("logits.safetensors"));
        fs::write(&tokens, "[1, 2, 3]").unwrap();
        let model = ["--base", &base, "--adapter", adapter];
        let rest: [&[&str]; 3] = [
            &["eval", "ppl", "--data", &data, "--contexts", "64"],
            &["merge", "--out", &merged],
            &["logits", "--tokens", &tokens, "--out", &logits],
        ];
        for command in rest {
            mclora(&[command, &model].concat()).refused(1, facts);
        }
        assert!(!Path::new(&merged).exists() && !Path::new(&logits).exists());
        assert!(hidden_in(&self.path("")).is_empty());
    }
}

/// Names of hidden files and folders, where an interrupted write would leave something.
fn hidden_in(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

// Missing and half-written folders.

#[test]
fn missing_base_folder() {
    let fixture = Fixture::new();
    let missing = fixture.at("no-such-model");
    fixture.refuses_base("no-such-model", &[&missing, "expected a model folder", "does not exist"]);
}

#[test]
fn base_without_config_json() {
    let fixture = Fixture::new();
    fs::remove_file(fixture.copy("base", "half").join("config.json")).unwrap();
    fixture.refuses_base("half", &[&fixture.at("half"), "config.json", "there is none"]);
}

#[test]
fn base_without_weights() {
    let fixture = Fixture::new();
    fs::remove_file(fixture.copy("base", "half").join("model.safetensors")).unwrap();
    fixture.refuses_base("half", &[&fixture.at("half"), "expected model.safetensors"]);
}

#[test]
fn base_without_tokenizer() {
    let fixture = Fixture::new();
    fs::remove_file(fixture.copy("base", "half").join("tokenizer.json")).unwrap();
    fixture.refuses_base("half", &[&fixture.at("half/tokenizer.json"), "there is none"]);
}

#[test]
fn half_written_config_json() {
    let fixture = Fixture::new();
    truncate(&fixture.copy("base", "half").join("config.json"), 0.5);
    fixture.refuses_base("half", &[&fixture.at("half/config.json"), "expected complete JSON", "line"]);
}

#[test]
fn half_written_tokenizer_json() {
    let fixture = Fixture::new();
    truncate(&fixture.copy("base", "half").join("tokenizer.json"), 0.5);
    fixture.refuses_base("half", &[&fixture.at("half/tokenizer.json"), "expected a complete tokenizer"]);
}

#[test]
fn truncated_model_safetensors() {
    let fixture = Fixture::new();
    let path = fixture.copy("base", "half").join("model.safetensors");
    for part in [0.9, 0.01, 0.0] {
        truncate(&path, part);
        fixture.refuses_base("half", &[&fixture.at("half/model.safetensors"), "truncated"]);
    }
}

#[test]
fn half_written_adapter() {
    let fixture = Fixture::new();
    fixture.adapter("trained");
    fixture.copy("trained/adapter", "cut");
    truncate(&fixture.path("cut/adapter_model.safetensors"), 0.7);
    let path = fixture.at("cut/adapter_model.safetensors");
    fixture.refuses_adapter("base", &fixture.at("cut"), &[&path, "truncated"]);

    truncate(&fixture.path("cut/adapter_config.json"), 0.7);
    let path = fixture.at("cut/adapter_config.json");
    fixture.refuses_adapter("base", &fixture.at("cut"), &[&path, "expected complete JSON"]);

    fs::remove_file(fixture.path("cut/adapter_config.json")).unwrap();
    fixture.refuses_adapter(
        "base",
        &fixture.at("cut"),
        &[&fixture.at("cut"), "adapter_config.json", "there is none"],
    );
    fixture.refuses_adapter("base", &fixture.at("none"), &[&fixture.at("none"), "adapter_config.json"]);
}

// Tensors that do not fit.

#[test]
fn wrong_shape_in_a_base() {
    let fixture = Fixture::new();
    let path = fixture.copy("base", "odd").join("model.safetensors");
    edit_tensor(&path, "model.embed_tokens.weight", |t| t.t().unwrap().contiguous().unwrap());
    let facts =
        ["odd/model.safetensors", "model.embed_tokens.weight", "expected shape [300, 32]", "got [32, 300]"];
    fixture.refuses_base("odd", &facts);
}

#[test]
fn wrong_dtype_in_a_base() {
    let fixture = Fixture::new();
    let path = fixture.copy("base", "odd").join("model.safetensors");
    edit_tensor(&path, "model.norm.weight", |t| t.to_dtype(DType::I64).unwrap());
    let facts = ["odd/model.safetensors", "model.norm.weight", "expected dtype F32, F16 or BF16", "got I64"];
    fixture.refuses_base("odd", &facts);
}

const LORA_A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

#[test]
fn wrong_shape_in_an_adapter() {
    let fixture = Fixture::new();
    fixture.adapter("trained");
    let path = fixture.copy("trained/adapter", "odd").join("adapter_model.safetensors");
    edit_tensor(&path, LORA_A, |t| t.narrow(0, 0, 3).unwrap());
    let facts = ["odd/adapter_model.safetensors", LORA_A, "expected shape [4, 32]", "got [3, 32]"];
    fixture.refuses_adapter("base", &fixture.at("odd"), &facts);
}

#[test]
fn wrong_dtype_in_an_adapter() {
    let fixture = Fixture::new();
    fixture.adapter("trained");
    let path = fixture.copy("trained/adapter", "odd").join("adapter_model.safetensors");
    edit_tensor(&path, LORA_A, |t| t.to_dtype(DType::I64).unwrap());
    let facts = ["odd/adapter_model.safetensors", LORA_A, "expected dtype F32, F16 or BF16", "got I64"];
    fixture.refuses_adapter("base", &fixture.at("odd"), &facts);
}

#[test]
fn adapter_for_another_base() {
    let fixture = Fixture::new();
    let adapter = fixture.adapter("trained");
    fixture.model("other", 2);
    fixture.refuses_adapter(
        "other",
        &adapter,
        &[&adapter, "made for the base with fingerprint", &fixture.at("base")],
    );
}

#[test]
fn adapter_with_another_rope_scaling() {
    let fixture = Fixture::new();
    let adapter = fixture.adapter("trained");
    edit_json(&fixture.copy("base", "scaled").join("config.json"), |config| {
        config.as_object_mut().unwrap().remove("rope_parameters");
        config["rope_scaling"] = json!({"rope_type": "linear", "factor": 2.0});
    });
    let facts = [adapter.as_str(), "made for a base with RoPE scaling none", "got one with linear x2"];
    fixture.refuses_adapter("scaled", &adapter, &facts);
}

// Contexts.

#[test]
fn context_the_memory_cannot_hold() {
    let fixture = Fixture::new();
    // Forbidden by --memory, and beyond it by far.
    fixture.refuses(
        &[("--memory", "1MB")],
        1,
        &["needs about", "at context 128", "may use 1 MB", "activations", "--dtype bf16 (about"],
    );
    let flags = [
        ("--context", "16777216"),
        ("--stages", "16777216:1"),
        ("--eval-contexts", "64"),
        ("--memory", "2GiB"),
    ];
    fixture.refuses(
        &flags,
        1,
        &["needs about", "GB at context 16777216", "may use 2.1 GB", "What would help"],
    );
}

#[test]
fn context_out_of_range() {
    let fixture = Fixture::new();
    for context in ["0", "1", "16777217", "18446744073709551615"] {
        let expected = ["context: expected 2 to 16777216 tokens", &format!("got {context}")];
        let mut args = with(fixture.extend("run"), &[("--context", context)]);
        let stages = args.iter().position(|a| a == "--stages").unwrap();
        args.drain(stages..stages + 2);
        mclora(&args).refused(2, &expected);

        let stage = format!("{context}:1");
        fixture.refuses(&[("--stages", &stage)], 2, &expected);
        fixture.refuses(
            &[("--eval-contexts", context)],
            2,
            &["eval.contexts: expected 2 to 16777216 tokens"],
        );
        let (base, data) = (fixture.at("base"), fixture.at("data"));
        mclora(&["eval", "ppl", "--base", &base, "--data", &data, "--contexts", context])
            .refused(2, &["contexts: expected 2 to 16777216 tokens", expected[1]]);
    }
    assert!(!fixture.path("run").exists());
}

#[test]
fn stages_that_miss_the_context() {
    let facts = ["stages: expected the last one to reach the context 128", "got 64"];
    Fixture::new().refuses(&[("--stages", "64:2")], 2, &facts);
}

// Data.

#[test]
fn empty_data() {
    let fixture = Fixture::new();
    fs::create_dir(fixture.path("nothing")).unwrap();
    let nothing = fixture.at("nothing");
    fixture.refuses(&[("--data", &nothing)], 1, &["no text in the data", "0 file(s)", &nothing]);
    fs::write(fixture.path("nothing/a.txt"), "").unwrap();
    fs::write(fixture.path("nothing/b.txt"), " \n\n").unwrap();
    fixture.refuses(&[("--data", &nothing)], 1, &["no text in the data", "2 file(s)", &nothing]);
}

#[test]
fn data_that_is_not_there() {
    let fixture = Fixture::new();
    let missing = fixture.at("no-such.txt");
    fixture.refuses(&[("--data", &missing)], 2, &[&missing, "nothing matches"]);
}

#[test]
fn data_shorter_than_the_context() {
    let fixture = Fixture::new();
    fs::write(fixture.path("short.txt"), "One short sentence, and another one.").unwrap();
    let short = fixture.at("short.txt");
    fixture.refuses(
        &[("--data", &short)],
        1,
        &["the data is shorter than the context", "tokens", "context 64"],
    );
}

#[test]
fn data_that_is_not_utf8() {
    let fixture = Fixture::new();
    let path = fixture.path("data/99-latin1.txt");
    fs::write(&path, b"caf\xe9 au lait").unwrap();
    fixture.refuses(&[], 1, &[path.to_str().unwrap(), "expected UTF-8", "offset 3"]);
}

#[test]
fn data_with_a_broken_jsonl_line() {
    let fixture = Fixture::new();
    let path = fixture.path("data/99.jsonl");
    fs::write(&path, "{\"text\": \"one\"}\n{\"text\": \"tw").unwrap();
    fixture.refuses(&[], 1, &[path.to_str().unwrap(), "line 2 is not JSON"]);
}

// Settings.

#[test]
fn rank_0() {
    Fixture::new().refuses(&[("--rank", "0")], 2, &["rank", "expected at least 1", "got 0"]);
}

#[test]
fn group_of_0_and_of_1() {
    let fixture = Fixture::new();
    for group in ["0", "1"] {
        let got = format!("got {group}");
        let stages = format!("64:2,128:2:s2:{group}");
        fixture.refuses(
            &[("--stages", &stages)],
            2,
            &["stages[1].group", "expected at least 2 tokens", &got],
        );
        let (base, data) = (fixture.at("base"), fixture.at("data"));
        let args = ["eval", "ppl", "--base", &base, "--data", &data, "--contexts", "64", "--attention", "s2"];
        mclora(&[&args[..], &["--group", group]].concat())
            .refused(2, &["group: expected at least 2 tokens", &got]);
    }
}

#[test]
fn values_out_of_range() {
    let fixture = Fixture::new();
    let cases = [
        ("--lr", "0", "optimizer.lr: expected a positive number"),
        ("--lr", "nan", "optimizer.lr: invalid type"),
        ("--alpha", "0", "alpha: expected a positive number"),
        ("--dropout", "1", "dropout: expected 0 <= p < 1"),
        ("--schedule", "linear", "optimizer.schedule: unknown variant `linear`"),
        ("--target-modules", "q_proj,x_proj", "\"x_proj\""),
        ("--layers", "0,2", "layers: expected block numbers 0 to 1"),
        ("--holdout", "1", "holdout: expected a share between 0 and 1"),
        ("--stages", "64:0,128:1", "stages[0].steps: expected 1 to"),
        ("--stages", "128", "--stages: expected CONTEXT:STEPS"),
        ("--tokens-per-step", "0", "batch.tokens_per_step: expected 1 to"),
        ("--tokens-per-step", "18446744073709551615", "batch.tokens_per_step: expected 1 to"),
        ("--eval-tokens", "18446744073709551615", "eval.max_tokens: expected 1 to"),
        ("--eval-stride", "0", "eval.stride: expected at least 1 token"),
        ("--checkpoint-every", "0", "checkpoint"),
        ("--threads", "0", "threads: expected 1 to 1024"),
        ("--threads", "1000000", "threads: expected 1 to 1024"),
        ("--memory", "5 parsecs", "--memory"),
        ("--dtype", "fp16", "dtype: unknown variant `fp16`, expected one of `f32`, `mixed`, `bf16`"),
    ];
    for (flag, value, fact) in cases {
        println!("{flag} {value}");
        fixture.refuses(&[(flag, value)], 2, &[fact]);
    }
}

#[test]
fn unknown_config_key() {
    let fixture = Fixture::new();
    for (text, key) in [
        ("contxt = 128\n", "contxt"),
        ("[lora]\nrnak = 2\n", "lora.rnak"),
        ("[optimizer]\nlr2 = 1.0\n", "optimizer.lr2"),
    ] {
        fs::write(fixture.path("settings.toml"), text).unwrap();
        let config = fixture.at("settings.toml");
        fixture.refuses(&[("--config", &config)], 2, &["unknown field", key, "expected one of"]);
    }
}

#[test]
fn config_value_of_another_type() {
    let fixture = Fixture::new();
    for (text, fact) in [
        ("holdout = \"much\"\n", "holdout: invalid type: string \"much\""),
        ("[checkpoint]\nkeep = -1\n", "checkpoint.keep: invalid value: integer `-1`"),
        ("[lora]\ntarget_modules = 3\n", "lora.target_modules: expected a list of names"),
        ("seed = \n", "settings.toml: line 1"),
    ] {
        fs::write(fixture.path("settings.toml"), text).unwrap();
        let config = fixture.at("settings.toml");
        fixture.refuses(&[("--config", &config)], 2, &[fact]);
    }
}

#[test]
fn layers_that_no_model_or_not_this_one_has() {
    let fixture = Fixture::new();
    for (flag, value, facts) in [
        (
            "--target-modules",
            "(q_proj",
            &["target_modules", "expected a regular expression, got \"(q_proj\""][..],
        ),
        (
            "--target-modules",
            "r_proj",
            &["target_modules: expected names out of", "q_proj", "got \"r_proj\""],
        ),
        ("--target-modules", ".*r_proj", &["target_modules: expected to mean at least one", ".*r_proj"]),
        ("--exclude-modules", "all-linear", &["expected to mean at least one", "exclude_modules"]),
        ("--layers", "first:3", &["layers: expected 1 to 2 blocks", "got \"first:3\""]),
        ("--layers", "2", &["layers: expected block numbers 0 to 1", "got 2"]),
        ("--layers", "middle:2", &["--layers: expected block numbers", "got \"middle:2\""]),
        (
            "--rank-pattern",
            "r_proj=2",
            &["rank_pattern: expected patterns that mean a layer", "got \"r_proj\""],
        ),
        ("--rank-pattern", "q_proj=0", &["rank_pattern: expected ranks of at least 1", "got 0"]),
        ("--rank-pattern", "q_proj=x", &["--rank-pattern: expected REGEX=a rank", "got \"q_proj=x\""]),
        ("--alpha-pattern", "q_proj=0", &["alpha_pattern", "expected a positive number, got 0"]),
    ] {
        fixture.refuses(&[(flag, value)], 2, facts);
    }
}

#[test]
fn unknown_flag() {
    let outcome = mclora(&["extend", "--bse", "x"]);
    assert_eq!(outcome.status.code(), Some(2));
    assert!(outcome.stderr.contains("--bse") && !outcome.stderr.contains("panicked"), "{}", outcome.stderr);
}

#[test]
fn token_ids_that_do_not_exist() {
    let fixture = Fixture::new();
    let (base, tokens, out) = (fixture.at("base"), fixture.at("tokens.json"), fixture.at("out.safetensors"));
    for (text, facts) in [
        ("[1, 300]", &["expected token ids below 300", "got 300"][..]),
        ("[[1, 2], [3]]", &["expected rows of one length"]),
        ("[]", &["at least 1 token"]),
        ("[1, -2]", &["expected a list of token ids or a list of such lists", "got -2"]),
        ("[1, [2]]", &["expected a list of token ids or a list of such lists", "got [2]"]),
        ("[[1], 2]", &["expected a list of token ids or a list of such lists", "got 2"]),
        ("{\"tokens\": [1]}", &["expected a list of token ids or a list of such lists", "got {\"tokens\""]),
        ("{", &["expected a list of token ids or a list of such lists", "line 1"]),
    ] {
        fs::write(&tokens, text).unwrap();
        let message =
            mclora(&["logits", "--base", &base, "--tokens", &tokens, "--out", &out]).refused(1, facts);
        assert!(message.contains(&tokens), "{message}");
    }
    assert!(!Path::new(&out).exists());
}

// Plugins.

/// The built plugin, as `mclora` finds it.
fn plugin() -> PathBuf {
    loader::find_in(Path::new(env!("CARGO_BIN_EXE_mclora")).parent().unwrap())
        .expect("the plugin is built with the tests")
}

/// A copy of the plugin in which every occurrence of `from` reads `to`.
fn patched_plugin(fixture: &Fixture, from: &str, to: &str) -> String {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(plugin()).unwrap();
    let places: Vec<usize> = memchr_all(&bytes, from.as_bytes());
    assert!(!places.is_empty(), "\"{from}\" is not in the plugin");
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    }
    let path = fixture.at("patched.so");
    fs::write(&path, bytes).unwrap();
    path
}

fn memchr_all(bytes: &[u8], needle: &[u8]) -> Vec<usize> {
    let first = needle[0];
    (0..bytes.len().saturating_sub(needle.len()))
        .filter(|at| bytes[*at] == first && bytes[*at..].starts_with(needle))
        .collect()
}

/// Checking the plugin and using it are refused alike, and nothing is written.
#[track_caller]
fn refuses_plugin(fixture: &Fixture, path: &str, facts: &[&str]) {
    let facts: Vec<&str> = facts.iter().copied().chain([path]).collect();
    mclora(&["plugin", "check", path]).refused(1, &facts);
    fixture.refuses(&[("--plugin", path)], 1, &facts);
}

#[test]
fn the_built_plugin_passes() {
    let path = plugin();
    let checked = mclora(&["plugin", "check", "--json"]).success().json();
    assert_eq!(checked["path"], json!(path), "mclora finds the same one");
    assert_eq!(checked["version_line"], json!(VERSION_LINE));
}

#[test]
fn plugin_that_is_missing() {
    let fixture = Fixture::new();
    refuses_plugin(&fixture, &fixture.at("none.so"), &["no such file"]);
}

#[test]
fn plugin_that_is_text() {
    let fixture = Fixture::new();
    fs::write(fixture.path("note.so"), "This is a note, not a library.\n").unwrap();
    refuses_plugin(&fixture, &fixture.at("note.so"), &["not a shared library", "text file"]);
}

#[test]
fn plugin_that_is_truncated() {
    let fixture = Fixture::new();
    let path = fixture.path("cut.so");
    fs::copy(plugin(), &path).unwrap();
    for part in [0.999, 0.5] {
        truncate(&path, part);
        refuses_plugin(&fixture, &fixture.at("cut.so"), &["truncated", "bytes, its headers need"]);
    }
}

#[test]
fn plugin_that_is_another_library() {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let Some(libc) = maps.split_whitespace().find(|word| word.contains("/libc.so")) else {
        println!("skipped: no libc.so is mapped into this process");
        return;
    };
    refuses_plugin(&Fixture::new(), libc, &["not a MegaContext plugin"]);
}

#[test]
fn plugin_of_another_crate_version() {
    let fixture = Fixture::new();
    let version = format!("megacontext-lora-abi {}", env!("CARGO_PKG_VERSION"));
    let other = version.replace(env!("CARGO_PKG_VERSION"), "9.9.9");
    let path = patched_plugin(&fixture, &version, &other);
    refuses_plugin(
        &fixture,
        &path,
        &["another version", "it says \"megacontext-lora-abi 9.9.9", VERSION_LINE],
    );
}

#[test]
fn plugin_of_another_revision() {
    let fixture = Fixture::new();
    let path = patched_plugin(&fixture, VERSION_LINE, &VERSION_LINE.replace("revision 2", "revision 3"));
    refuses_plugin(&fixture, &path, &["another version", "revision 3", VERSION_LINE]);
}

#[test]
fn plugin_with_another_layout() {
    let fixture = Fixture::new();
    // The layout that travels with the library names the fields of its types: here one has another name, as if it had been
    // built from other sources of the same version.
    let path = patched_plugin(&fixture, "abi_revision", "abi_revisiom");
    refuses_plugin(&fixture, &path, &["the version agrees but the types are laid out differently"]);
}

// Folders.

#[test]
fn output_folder_that_holds_something() {
    let fixture = Fixture::new();
    let adapter = fixture.adapter("trained");
    fs::create_dir(fixture.path("thesis")).unwrap();
    fs::write(fixture.path("thesis/chapter-1.md"), "It was a dark night.").unwrap();
    let before = tree(&fixture.path("thesis"));
    let (base, out) = (fixture.at("base"), fixture.at("thesis"));
    mclora(&with(fixture.extend("run"), &[("--out", &out)]))
        .refused(2, &[&out, "expected an empty folder", "chapter-1.md"]);
    mclora(&["merge", "--base", &base, "--adapter", &adapter, "--out", &out]).refused(1, &[&out, "is empty"]);
    assert_eq!(tree(&fixture.path("thesis")), before);
}

#[test]
fn resuming_where_no_run_began() {
    let fixture = Fixture::new();
    let out = fixture.at("run");
    // With all settings and with none: what is missing is the run.
    let settings = fixture.extend("run");
    for args in [&settings[..], &["extend", "--out", &out].map(str::to_owned)] {
        mclora(&[args, &["--resume".into()]].concat())
            .refused(2, &[&out, "expected a run to resume", "no such folder"]);
    }
    fs::create_dir(&out).unwrap();
    mclora(&["extend", "--resume", "--out", &out]).refused(2, &[&out, "a folder in which none began"]);
    assert!(tree(&fixture.path("run")).is_empty());
}

#[test]
fn folder_that_another_run_holds() {
    let fixture = Fixture::new();
    let run = fixture.path("run");
    let mut first = Running::start(&fixture.extend("run"), fixture.path("stderr"));
    assert!(first.wait_until(|| run.join("checkpoints/00000000").exists()));
    mclora(&[&fixture.extend("run")[..], &["--resume".into()]].concat())
        .refused(2, &[run.to_str().unwrap(), "another run holds"]);
    assert_eq!(first.end(), (Some(0), None), "the first is not disturbed: {}", first.said());
}
