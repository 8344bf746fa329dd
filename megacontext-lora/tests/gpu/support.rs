//! A machine with the emulated GPU, and comparisons.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::{Fixture, Outcome, command, finish, numbers};
use crate::libraries::search_path;

/// What is said of the emulated GPU.
pub const GPU: &str = "cuda:0 (emulated device 0, compute capability 8.0)";

/// Of each value where what was learned decides what is learned next.
const BOUND: f64 = 1e-2;
/// Losses are near 6 in f32, and ΔNLL is a difference of two.
const ROUNDING: f64 = 2e-6;

/// A fixture's folder on a machine with the emulated GPU.
pub struct Machine {
    pub fixture: Fixture,
    search_path: OsString,
}

impl Machine {
    /// None without a compiler.
    pub fn new() -> Option<Self> {
        let search_path = search_path().unwrap()?;
        Some(Self { fixture: Fixture::new(), search_path })
    }

    /// The program on this machine.
    pub fn command<S: AsRef<str>>(&self, args: &[S]) -> Command {
        let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        let mut command = command(&args);
        command.env("LD_LIBRARY_PATH", &self.search_path);
        command.env("MEGACONTEXT_CUDA_CACHE", self.fixture.path("cache"));
        command
    }

    /// Runs it to its end.
    pub fn mclora<S: AsRef<str>>(&self, args: &[S]) -> Outcome {
        finish(self.command(args))
    }

    /// Runs it to its end, which is to do at least so many launches on the GPU: its results are to be close to the processor's, and
    /// those of the processor itself would be.
    #[track_caller]
    pub fn launches<S: AsRef<str>>(&self, args: &[S], least: u64) -> Outcome {
        let file = self.fixture.path("launches");
        fs::remove_file(&file).ok();
        let mut command = self.command(args);
        command.env("EMULATED_LAUNCHES", &file);
        let outcome = finish(command).success();
        // There is no file where nothing opened the driver.
        let launches: u64 = fs::read_to_string(&file).map_or(0, |text| text.trim().parse().unwrap());
        println!("{launches} launches");
        assert!(launches >= least, "expected at least {least} launches, got {launches}: {}", outcome.stderr);
        outcome
    }
}

/// The first line that a command says.
#[track_caller]
pub fn first_line(outcome: &Outcome) -> &str {
    outcome.stderr.lines().next().unwrap_or_else(|| panic!("nothing was said: {}", outcome.stdout))
}

/// Holds a number of two files against each other, within a part of the expected one's size or, below 1, of 1.
#[track_caller]
pub fn close(what: &str, got: &Value, expected: &Value, bound: f64) {
    let [got, expected] = [got, expected].map(|value| {
        let number = value.as_f64().filter(|number| number.is_finite());
        number.unwrap_or_else(|| panic!("{what}: expected a finite number, got {value}"))
    });
    let apart = (got - expected).abs();
    assert!(
        apart <= bound * expected.abs().max(1.0),
        "{what}: expected {expected} within {bound}, got {got}"
    );
}

/// Keys whose values are of the clock, the folder or the machine, or say numbers once more as text.
fn of_the_machine(key: &str) -> bool {
    key.starts_with("wall_")
        || [
            "seconds",
            "peak_bytes",
            "planned_bytes",
            "device",
            "adapter",
            "gistnet",
            "lensnet",
            "table",
            "device_memory",
        ]
        .contains(&key)
}

/// Holds everything in one value against the same in another.
#[track_caller]
pub fn close_all(at: &str, got: &Value, expected: &Value) {
    match (got, expected) {
        (Value::Object(got), Value::Object(expected)) => {
            assert!(got.keys().eq(expected.keys()), "{at}: {got:?} {expected:?}");
            for (key, expected) in expected.iter().filter(|(key, _)| !of_the_machine(key)) {
                close_all(&format!("{at}.{key}"), &got[key], expected);
            }
        }
        (Value::Array(got), Value::Array(expected)) => {
            assert_eq!(got.len(), expected.len(), "{at}");
            for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
                close_all(&format!("{at}.{i}"), got, expected);
            }
        }
        (Value::Number(got), Value::Number(expected)) if expected.is_f64() => {
            let (got, expected) = (got.as_f64().unwrap(), expected.as_f64().unwrap());
            let within = BOUND * expected.abs() + ROUNDING;
            assert!((got - expected).abs() <= within, "{at}: expected {expected} within {within}, got {got}");
        }
        _ => assert_eq!(got, expected, "{at}"),
    }
}

/// Holds what a run took of the GPU against what it was planned to, at most `most` times as much, cuBLASLt's own memory left out.
#[track_caller]
pub fn planned_well(summary: &Value, most: f64) {
    // As planned, and on a device of compute capability 8.0.
    let blas = [("planned_bytes", megacontext_base::buffers::gpu::BLAS), ("peak_bytes", 4 << 20)];
    let [planned, peak] =
        blas.map(|(key, own)| (summary["device_memory"][key].as_u64().unwrap() - own) as f64);
    println!("planned {planned}, at most {peak}");
    assert!((1.0..=most).contains(&(planned / peak)), "planned {planned}, at most {peak}");
}

/// Values of keys in the lines of a kind.
pub fn lines<'a>(metrics: &'a [Value], kind: &str) -> Vec<&'a Value> {
    metrics.iter().filter(|line| line["kind"] == kind).collect()
}

/// Holds every tensor of a file against the one of the same name, within a part of its greatest value.
#[track_caller]
pub fn close_tensors(got: &Path, expected: &Path, bound: f32) {
    let shapes = |path: &Path| -> BTreeMap<String, Vec<usize>> {
        let tensors = candle_core::safetensors::load(path, &candle_core::Device::Cpu).unwrap();
        tensors.into_iter().map(|(name, tensor)| (name, tensor.dims().to_vec())).collect()
    };
    let named = shapes(expected);
    assert!(!named.is_empty());
    assert_eq!(shapes(got), named);
    for name in named.keys() {
        let (got, expected) = (numbers(got, name), numbers(expected, name));
        let greatest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert!(
                (got - expected).abs() <= bound * greatest,
                "{name}: number {i}: expected {expected} within {bound} of {greatest}, got {got}"
            );
        }
    }
}
