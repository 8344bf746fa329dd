//! `mclora` as a user meets it: exit codes, what goes to stdout and stderr, one clear message for each mistake.
//!
//! The model is a golden Llama of `integration-tests/fixtures` with a tokenizer of 64 words put beside it.

#![allow(clippy::unwrap_used)] // Helpers of tests, which the lint does not see as tests.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap() };
        let (from, base) = (fixture("tied_f32"), bench.path("base"));
        std::fs::create_dir(&base).unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(from.join(name), base.join(name)).unwrap();
        }
        let words: Vec<String> = (0..64).map(|i| format!("\"w{i}\":{i}")).collect();
        let tokenizer = format!(
            r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
                "pre_tokenizer":{{"type":"Whitespace"}},"post_processor":null,"decoder":null,
                "model":{{"type":"WordLevel","vocab":{{{}}},"unk_token":"w0"}}}}"#,
            words.join(",")
        );
        std::fs::write(base.join("tokenizer.json"), tokenizer).unwrap();
        let text: String = (0..4000).map(|i| format!("w{} ", (i * i + 7 * i) % 61 + 1)).collect();
        std::fs::write(bench.path("text.txt"), text).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs `mclora` in the folder, arguments separated by spaces.
    fn run(&self, arguments: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_mclora"))
            .args(arguments.split_whitespace())
            .current_dir(self.folder.path())
            .output()
            .unwrap()
    }

    /// The one error message of a command that must fail with this code.
    fn fails(&self, code: i32, arguments: &str) -> String {
        let output = self.run(arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments}: {stderr}");
        assert!(!stderr.contains("panicked"), "{arguments}: {stderr}");
        let errors: Vec<&str> = stderr.lines().filter(|l| l.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{arguments}: {stderr}");
        errors[0].to_owned()
    }

    /// The same for an `extend` that has all it needs but for `arguments`; nothing may be left behind.
    fn extend_fails(&self, code: i32, arguments: &str) -> String {
        let message = self
            .fails(code, &format!("extend --base base --data text.txt --context 64 --out run {arguments}"));
        assert!(!self.path("run").join("adapter").exists(), "{arguments}");
        message
    }

    fn succeeds(&self, arguments: &str) -> (String, String) {
        let output = self.run(arguments);
        let (out, err) =
            (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert!(output.status.success(), "{arguments}: {err}");
        (out, err)
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/llama").join(name)
}

fn plugin() -> PathBuf {
    let folder = Path::new(env!("CARGO_BIN_EXE_mclora")).parent().unwrap();
    megacontext_lora_abi::loader::find_in(folder).expect("cargo builds the library for this package's tests")
}

#[test]
fn every_command_has_help() {
    let bench = Bench::new();
    for command in [
        "",
        "quickstart",
        "extend",
        "eval",
        "eval ppl",
        "eval passkey",
        "eval gap",
        "train",
        "train gistnet",
        "train lensnet",
        "report",
        "generate",
        "merge",
        "export",
        "sweep",
        "logits",
        "pretrain",
        "plugin check",
        "bench",
        "bench attention",
        "bench step",
        "bench plan",
        "bench loss",
        "bench linear",
        "bench gist",
        "bench load",
    ] {
        let (out, _) = bench.succeeds(&format!("{command} --help"));
        assert!(out.contains("Usage: mclora"), "{command}: {out}");
    }
}

#[test]
fn an_unknown_flag_is_a_usage_error() {
    assert!(Bench::new().fails(2, "extend --frobnicate").contains("--frobnicate"));
}

#[test]
fn an_unknown_config_key_is_named() {
    let bench = Bench::new();
    std::fs::write(bench.path("c.toml"), "[lora]\nrnak = 2\n").unwrap();
    assert!(bench.extend_fails(2, "--config c.toml").contains("rnak"));
}

#[test]
fn a_config_that_is_not_toml_is_a_usage_error() {
    let bench = Bench::new();
    std::fs::write(bench.path("c.toml"), "context = = 2\n").unwrap();
    assert!(bench.extend_fails(2, "--config c.toml").contains("c.toml: line 1"));
}

#[test]
fn a_missing_base_is_refused() {
    let bench = Bench::new();
    assert!(bench.fails(2, "extend --data text.txt --context 64").contains("base"));
    assert!(bench.fails(1, "extend --base nowhere --data text.txt --context 64").contains("nowhere"));
}

#[test]
fn a_half_written_base_is_refused() {
    let bench = Bench::new();
    let file = bench.path("base").join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    assert!(bench.extend_fails(1, "").contains("model.safetensors"));
    std::fs::remove_file(&file).unwrap();
    assert!(bench.extend_fails(1, "").contains("model.safetensors"));
}

#[test]
fn rank_zero_is_refused() {
    assert!(Bench::new().extend_fails(2, "--rank 0").contains("rank"));
}

#[test]
fn a_group_of_zero_or_one_is_refused() {
    let bench = Bench::new();
    for group in [0, 1] {
        let message = bench.extend_fails(2, &format!("--stages 64:1:s2:{group}"));
        assert!(message.contains("group"), "{message}");
    }
}

#[test]
fn stages_that_miss_the_context_are_refused() {
    assert!(Bench::new().extend_fails(2, "--stages 48:1").contains("stages"));
}

#[test]
fn a_context_that_memory_cannot_hold_is_refused_with_the_numbers() {
    let message = Bench::new().extend_fails(1, "--memory 100kB");
    assert!(message.contains("100 kB"), "{message}");
}

#[test]
fn missing_data_is_refused() {
    assert!(
        Bench::new().fails(2, "extend --base base --data nowhere/*.txt --context 64").contains("nowhere")
    );
}

#[test]
fn empty_data_is_refused() {
    let bench = Bench::new();
    std::fs::write(bench.path("text.txt"), "").unwrap();
    assert!(bench.extend_fails(1, "").contains("text"));
}

#[test]
fn data_shorter_than_the_context_is_refused() {
    let bench = Bench::new();
    std::fs::write(bench.path("text.txt"), "w1 w2 w3").unwrap();
    bench.extend_fails(1, "");
}

#[test]
fn data_that_is_not_utf8_is_refused() {
    let bench = Bench::new();
    std::fs::write(bench.path("text.txt"), b"w1 \xff\xfe w2").unwrap();
    assert!(bench.extend_fails(1, "").contains("text.txt"));
}

#[test]
fn a_run_folder_that_is_not_empty_is_refused() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("run")).unwrap();
    std::fs::write(bench.path("run").join("mine.txt"), "mine").unwrap();
    bench.extend_fails(2, "");
    assert_eq!(std::fs::read_dir(bench.path("run")).unwrap().count(), 1);
}

#[test]
fn a_run_folder_that_cannot_be_made_is_an_io_error() {
    let bench = Bench::new();
    std::fs::write(bench.path("run"), "a file").unwrap();
    assert!(bench.extend_fails(1, "").contains("run"));
    if Path::new("/proc/self").is_dir() {
        // Nobody may write there, not even root.
        assert!(
            bench
                .fails(1, "extend --base base --data text.txt --context 64 --out /proc/run")
                .contains("/proc/run")
        );
    }
}

#[test]
fn there_must_be_a_run_to_resume() {
    assert!(Bench::new().extend_fails(2, "--resume").contains("resume"));
}

#[test]
fn plugins_that_are_none_are_refused() {
    let bench = Bench::new();
    assert!(bench.fails(1, "--plugin none.so logits --base b --tokens t --out o").contains("no such file"));
    assert!(bench.fails(1, "plugin check text.txt").contains("text file"));
    assert!(bench.fails(1, "plugin check base").contains("a folder"));
    let whole = std::fs::read(plugin()).unwrap();
    std::fs::write(bench.path("half.so"), &whole[..whole.len() / 2]).unwrap();
    assert!(bench.fails(1, "plugin check half.so").contains("truncated"));
    assert!(bench.fails(2, "plugin check --sha256 abc").contains("64 hexadecimal digits"));
    let zeros = "0".repeat(64);
    assert!(bench.fails(1, &format!("plugin check --sha256 {zeros}")).contains("SHA-256"));
}

#[test]
fn the_plugin_beside_the_program_is_found() {
    let (out, err) = Bench::new().succeeds("plugin check --json");
    let told: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(told["abi_revision"], 2, "{told}");
    assert!(err.is_empty(), "{err}");
}

#[test]
fn with_json_an_error_is_an_object_on_stdout() {
    let output = Bench::new().run("extend --json --rank 0 --base base --data text.txt --context 64");
    assert_eq!(output.status.code(), Some(2));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["error"]["kind"], "usage", "{told}");
}

#[test]
fn extend_evaluate_merge_and_compare() {
    let bench = Bench::new();
    let (out, _) = bench.succeeds(
        "extend --json --base base --data text.txt --out run --context 64 --stages 64:6 --lr 0.01 --warmup 1 \
         --tokens-per-step 256 --eval-tokens 500 --checkpoint-every 3 --threads 1",
    );
    let summary: Value = serde_json::from_str(&out).unwrap();
    assert!(summary["perplexity"]["adapted"]["64"].as_f64().unwrap() > 1.0, "{summary}");
    for file in ["config.toml", "summary.json", "report.html", "metrics.jsonl", "adapter/adapter_config.json"]
    {
        assert!(bench.path("run").join(file).is_file(), "{file}");
    }

    let (table, _) = bench.succeeds(
        "eval ppl --base base --adapter run/adapter --data text.txt --contexts 32,64 --max-tokens 500",
    );
    assert!(table.contains("perplexity") && table.contains("64"), "{table}");

    bench.succeeds("merge --base base --adapter run/adapter --out merged --dtype f32");
    std::fs::write(bench.path("tokens.json"), "[[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]]").unwrap();
    bench.succeeds("logits --base base --adapter run/adapter --tokens tokens.json --out a.safetensors");
    bench.succeeds("logits --base merged --tokens tokens.json --out b.safetensors");
    let logits = |name: &str| -> Vec<f32> {
        let bytes = std::fs::read(bench.path(name)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let data = file.tensor("logits").unwrap().data().to_vec();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let (adapted, merged) = (logits("a.safetensors"), logits("b.safetensors"));
    assert_eq!(adapted.len(), 2 * 5 * 64);
    let difference = adapted.iter().zip(&merged).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(difference < 1e-4, "{difference}");
    let config = std::fs::read_to_string(bench.path("merged").join("config.json")).unwrap();
    assert!(config.contains("linear"), "{config}");

    // Another base of the same shapes, and the same base with other positions.
    let (other, squeezed) = (bench.path("another"), bench.path("squeezed"));
    for folder in [&other, &squeezed] {
        std::fs::create_dir(folder).unwrap();
        std::fs::copy(bench.path("base").join("tokenizer.json"), folder.join("tokenizer.json")).unwrap();
    }
    let golden = fixture("untied_f32_linear");
    std::fs::copy(bench.path("base").join("config.json"), other.join("config.json")).unwrap();
    std::fs::copy(bench.path("base").join("model.safetensors"), squeezed.join("model.safetensors")).unwrap();
    let mut weights = std::fs::read(bench.path("base").join("model.safetensors")).unwrap();
    let last = weights.len() - 3;
    weights[last] ^= 0x40;
    std::fs::write(other.join("model.safetensors"), weights).unwrap();
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(bench.path("base").join("config.json")).unwrap()).unwrap();
    let linear: Value = serde_json::from_slice(&std::fs::read(golden.join("config.json")).unwrap()).unwrap();
    config["rope_parameters"] = linear["rope_parameters"].clone();
    std::fs::write(squeezed.join("config.json"), config.to_string()).unwrap();
    for base in ["another", "squeezed"] {
        let message = bench
            .fails(1, &format!("logits --base {base} --adapter run/adapter --tokens tokens.json --out c"));
        assert!(message.contains("adapter"), "{message}");
    }

    assert!(bench.fails(1, "merge --base base --adapter run/adapter --out merged").contains("merged"));
    assert!(bench.fails(1, "merge --base base --adapter base --out other").contains("base"));
    assert!(bench.fails(2, "merge --base base --adapter run/adapter --out other --dtype f8").contains("f8"));
    assert!(!bench.path("other").exists());
}

#[test]
fn flags_say_which_layers_carry_lora_and_how_much() {
    let bench = Bench::new();
    bench.succeeds(
        r"extend --base base --data text.txt --out run --context 64 --stages 64:1 --tokens-per-step 64 --eval-tokens 100
          --threads 1 --embeddings frozen --target-modules .*\.(?:q_proj|v_proj|up_proj) --exclude-modules 0.mlp.up_proj
          --rank-pattern v_proj=3 --rank-pattern [a-z]+_proj=2 --alpha-pattern up_proj=5",
    );
    let file = bench.path("run/adapter/adapter_config.json");
    let config: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!(config["target_modules"], r".*\.(?:q_proj|v_proj|up_proj)");
    assert_eq!(config["exclude_modules"].to_string(), r#"["0.mlp.up_proj"]"#);
    assert_eq!(config["rank_pattern"].to_string(), r#"{"v_proj":3,"[a-z]+_proj":2}"#);
    assert_eq!(config["alpha_pattern"].to_string(), r#"{"up_proj":5}"#);
    let bytes = std::fs::read(bench.path("run/adapter/adapter_model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let rank = |module: &str| {
        let name = format!("base_model.model.model.layers.{module}.lora_A.weight");
        tensors.tensor(&name).ok().map(|a| a.shape()[0])
    };
    assert_eq!(
        ["0.self_attn.q_proj", "1.self_attn.v_proj", "1.mlp.up_proj", "0.mlp.up_proj", "0.self_attn.k_proj"]
            .map(rank),
        [Some(2), Some(3), Some(2), None, None]
    );

    bench.succeeds(
        "extend --base base --data text.txt --out last --context 64 --stages 64:1 --tokens-per-step 64 --eval-tokens 100
         --threads 1 --layers last:1",
    );
    let file = bench.path("last/adapter/adapter_config.json");
    let config: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!(config["layers_to_transform"].to_string(), "[1]");
}

#[test]
#[cfg(unix)]
fn an_interrupted_run_says_how_to_go_on_and_leaves_a_checkpoint() {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;
    let bench = Bench::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_mclora"))
        .args(
            "extend --json --base base --data text.txt --out run --context 64 --stages 64:200000"
                .split_whitespace(),
        )
        .args("--tokens-per-step 128 --eval-tokens 200 --threads 1".split_whitespace())
        .current_dir(bench.folder.path())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|l| l.contains("\"progress\"")), "the training began");
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let rest: Vec<String> = lines.collect();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{rest:?}");
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["error"]["kind"], "cancelled");
    assert!(told["error"]["hint"].as_str().unwrap().contains("extend --resume --out run"), "{told}");

    assert!(bench.path("run").join("checkpoints").is_dir());
}
