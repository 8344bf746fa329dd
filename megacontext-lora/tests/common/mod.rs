//! What the tests of the real program share: a micro model, a little text, and the program itself.
//!
//! Every test has a folder of its own with a random Llama of 30 k parameters (context 32, a BPE trained on the text of
//! the test), so tests do not see each other and nothing outlives them. The program is the built `mclora`, which finds the
//! built plugin beside itself; nothing is linked in.

// Each test program uses its own part of this.
#![allow(dead_code, clippy::unwrap_used)]

pub mod induction;
pub mod kills;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::Decoder;
use megacontext_base::hf_export::{Dtype, write_model_dir};
use megacontext_kernels::precision::Precision;
use megacontext_lora::bpe;
use megacontext_lora::data::documents::Document;
use serde_json::{Value, json};

/// Context the micro model states, tokens.
pub const ORIGINAL: usize = 32;
/// Context the tests extend it to, tokens.
pub const EXTENDED: usize = 128;
/// Entries of its tokenizer: the end token, 256 bytes, 43 merges.
pub const VOCAB: usize = 300;
/// Nothing here takes a tenth of this.
const PATIENCE: Duration = Duration::from_secs(120);

/// A folder with a model, text, and room for what a test writes.
pub struct Fixture {
    root: tempfile::TempDir,
}

impl Fixture {
    /// The model of seed 1 in `base/`, twelve texts in `data/`.
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let fixture = Self { root };
        fs::create_dir(fixture.path("data")).unwrap();
        for number in 0..12 {
            fs::write(fixture.path(&format!("data/{number:02}.txt")), text(number)).unwrap();
        }
        fixture.model("base", 1);
        fixture
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// The same as text.
    pub fn at(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Writes a micro model with random weights.
    pub fn model(&self, name: &str, seed: u64) {
        self.model_of(name, seed, json!({}));
    }

    /// The same with some keys of its `config.json` set otherwise.
    pub fn model_of(&self, name: &str, seed: u64, other: Value) {
        let dir = self.path(name);
        let mut value = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32,
            "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "hidden_act": "silu", "max_position_embeddings": ORIGINAL, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false, "bos_token_id": 0,
            "eos_token_id": 0,
        });
        for (key, other) in other.as_object().unwrap() {
            value[key] = other.clone();
        }
        let config = DecoderConfig::from_json(&value, &dir.join("config.json")).unwrap();
        let tokenizer = tempfile::tempdir().unwrap();
        let documents: Vec<Document> = (0..4).map(|n| Document::new(format!("{n}.txt"), text(n))).collect();
        bpe::train(&documents, VOCAB, 0, tokenizer.path()).unwrap();
        let decoder = Decoder::random(config.clone(), seed, Precision::F32, &[]).unwrap();
        let tensors = config.tensors().into_iter().map(|(name, _)| {
            let tensor = decoder.params().get(&name).unwrap();
            (name, tensor)
        });
        write_model_dir(&dir, &config, tensors, Dtype::F32, Some(tokenizer.path())).unwrap();
    }

    /// A copy of a folder of this folder, files only.
    pub fn copy(&self, from: &str, to: &str) -> PathBuf {
        let target = self.path(to);
        fs::create_dir(&target).unwrap();
        for entry in fs::read_dir(self.path(from)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), target.join(entry.file_name())).unwrap();
        }
        target
    }

    /// `extend` from 32 to 128 tokens in two stages of 12 steps, a checkpoint every 3, into the folder `out`.
    pub fn extend(&self, out: &str) -> Vec<String> {
        let (base, data, out) = (self.at("base"), self.at("data"), self.at(out));
        #[rustfmt::skip]
        let args = [
            "extend", "--base", &base, "--data", &data, "--out", &out, "--context", "128", "--stages", "64:12,128:12",
            "--tokens-per-step", "1024", "--lr", "3e-3", "--warmup", "3", "--rank", "4", "--eval-tokens", "4096",
            "--checkpoint-every", "3", "--threads", "2", "--seed", "7",
        ];
        args.map(str::to_owned).to_vec()
    }

    /// An adapter of one stage and two steps in the run folder `out`: where it is.
    pub fn adapter(&self, out: &str) -> String {
        let mut args = self.extend(out);
        args.extend(["--stages", "128:2", "--eval-tokens", "256"].map(str::to_owned));
        let once: Vec<String> = last_wins(args);
        mclora(&once).success();
        self.at(&format!("{out}/adapter"))
    }
}

/// Of a flag given twice the later value.
fn last_wins(args: Vec<String>) -> Vec<String> {
    let (command, flags) = args.split_first().unwrap();
    let mut values: BTreeMap<String, String> = BTreeMap::new();
    for pair in flags.chunks(2) {
        values.insert(pair[0].clone(), pair[1].clone());
    }
    std::iter::once(command.clone()).chain(values.into_iter().flat_map(|(k, v)| [k, v])).collect()
}

/// A command with other values of some of its flags, or with more of them.
pub fn with(mut args: Vec<String>, flags: &[(&str, &str)]) -> Vec<String> {
    for (key, value) in flags {
        match args.iter().position(|arg| arg == key) {
            Some(at) => args[at + 1] = value.to_string(),
            None => args.extend([key.to_string(), value.to_string()]),
        }
    }
    args
}

/// About 1500 tokens of prose in which names, announced at the start, come back again and again.
pub fn text(number: u64) -> String {
    const NAMES: [&str; 8] = ["Anna", "Boris", "Clara", "Dmitri", "Elena", "Fedor", "Galina", "Hugo"];
    const VERBS: [&str; 6] = ["reads", "writes", "paints", "forgets", "finds", "hides"];
    const THINGS: [&str; 8] =
        ["the letter", "a map", "the lantern", "an apple", "the key", "a song", "the door", "a coin"];
    const PLACES: [&str; 5] = ["in the garden", "by the river", "under the bridge", "at home", "on the hill"];
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1;
    let mut below = move |n: usize| {
        // Xorshift, Marsaglia 2003.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as usize % n
    };
    let cast = [NAMES[below(8)], NAMES[below(8)]];
    let mut out = format!("Chapter {number}, of {} and {}.\n\n", cast[0], cast[1]);
    for sentence in 1..=80 {
        let (verb, thing, place) = (VERBS[below(6)], THINGS[below(8)], PLACES[below(5)]);
        out += &format!(
            "{} {verb} {thing} {place}.{}",
            cast[below(2)],
            if sentence % 8 == 0 { "\n\n" } else { " " }
        );
    }
    out
}

/// How a command ended.
#[derive(Debug)]
pub struct Outcome {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// Fails unless the command did what it was asked to.
    #[track_caller]
    pub fn success(self) -> Self {
        assert!(self.status.success(), "{}\nstdout: {}\nstderr: {}", self.status, self.stdout, self.stderr);
        self
    }

    /// What `--json` printed: one JSON object, nothing else.
    #[track_caller]
    pub fn json(&self) -> Value {
        let value: Value = serde_json::from_str(&self.stdout)
            .unwrap_or_else(|e| panic!("stdout is not one JSON value ({e}): {}", self.stdout));
        assert!(value.is_object(), "{value}");
        value
    }

    /// Fails unless the command was refused with this exit code and one message of one line that names all `facts`.
    /// Returns the message.
    #[track_caller]
    pub fn refused(&self, code: i32, facts: &[&str]) -> String {
        assert_eq!(
            self.status.code(),
            Some(code),
            "{}\nstdout: {}\nstderr: {}",
            self.status,
            self.stdout,
            self.stderr
        );
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        assert_eq!(self.stdout, "", "stdout");
        let errors: Vec<&str> = self.stderr.lines().filter(|l| l.starts_with("error: ")).collect();
        let last = self.stderr.lines().last();
        assert!(
            errors.len() == 1 && last == Some(errors[0]),
            "expected one error, in one line, at the end: {}",
            self.stderr
        );
        for fact in facts {
            assert!(errors[0].contains(fact), "\"{fact}\" is missing in: {}", errors[0]);
        }
        errors[0].to_owned()
    }
}

/// The program with these arguments.
pub fn command<S: AsRef<OsStr>>(args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mclora"));
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs the program to its end.
pub fn mclora<S: AsRef<OsStr>>(args: &[S]) -> Outcome {
    finish(command(args))
}

/// Runs a command to its end.
pub fn finish(mut command: Command) -> Outcome {
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Outcome { status: output.status, stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// The program while it runs. Killed when dropped.
pub struct Running {
    child: Child,
    stderr: PathBuf,
}

impl Running {
    /// Starts it; what it says goes to the file `stderr`.
    pub fn start<S: AsRef<OsStr>>(args: &[S], stderr: PathBuf) -> Self {
        Self::spawn(command(args), stderr)
    }

    /// The same with any command.
    pub fn spawn(mut command: Command, stderr: PathBuf) -> Self {
        let log = File::create(&stderr).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        Self { child, stderr }
    }

    /// Waits for a moment; `false` when the program ended before it came.
    pub fn wait_until(&mut self, mut moment: impl FnMut() -> bool) -> bool {
        let start = Instant::now();
        while !moment() {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(start.elapsed() < PATIENCE, "the moment never came; it said: {}", self.said());
            std::thread::sleep(Duration::from_micros(200));
        }
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends a signal by its name, without SIG.
    pub fn signal(&self, name: &str) {
        // The shell's own `kill`: the child has not been waited for, so its process id is still its own.
        let line = format!("kill -{name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &line]).status().unwrap().success(), "{line}");
    }

    /// Waits for the end: exit code, signal.
    pub fn end(&mut self) -> (Option<i32>, Option<i32>) {
        let status = self.child.wait().unwrap();
        (status.code(), status.signal())
    }

    /// What it said on stderr so far.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

/// Every file below a folder with its content, to see that nothing changed; nothing where there is no folder.
pub fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let Ok(entries) = fs::read_dir(dir) else { return files };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.insert(path.clone(), Vec::new());
            files.extend(tree(&path));
        } else {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    files
}

/// The lines of a run's `metrics.jsonl`, whole ones.
pub fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A JSON file.
pub fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Changes a JSON file.
pub fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = read_json(path);
    edit(&mut value);
    fs::write(path, format!("{value:#}\n")).unwrap();
}

/// Replaces one tensor of a safetensors file.
pub fn edit_tensor(path: &Path, name: &str, edit: impl FnOnce(&Tensor) -> Tensor) {
    let mut tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let changed = edit(tensors.get(name).unwrap_or_else(|| panic!("no tensor {name}: {:?}", tensors.keys())));
    tensors.insert(name.to_owned(), changed);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// A tensor of a safetensors file, flat.
pub fn numbers(path: &Path, name: &str) -> Vec<f32> {
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    tensors[name].to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Cuts a file to a part of its length.
pub fn truncate(path: &Path, part: f64) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len((length as f64 * part) as u64).unwrap();
}
