//! Timing and memory of one piece of work.
//!
//! After a warm-up, a sample is one run of the work, or as many as fill `SAMPLE` when it is short. The median is over the samples during
//! which other processes used less than `QUIET` cores, or over all where none was so quiet; the best is over all. Memory
//! is VmHWM of this process, reset through `/proc/self/clear_refs`, less the RSS before the work ran for the first time:
//! what the work keeps from run to run counts as its own.
//!
//! Units: seconds, bytes. Memory and the load of others are unknown where there is no `/proc`.

use std::hint::black_box;
use std::time::Instant;

use serde_json::{Map, Value, json};

use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::train::plan::{peak_bytes, resident_bytes};

/// Shortest sample, seconds: the kernel counts processor time in hundredths.
const SAMPLE: f64 = 0.2;
/// Cores that others may use during a quiet sample.
const QUIET: f64 = 0.15;

/// Memory from a moment on.
pub struct Memory {
    idle: Option<u64>,
    reset: bool,
}

impl Memory {
    /// From now on; whatever is resident now is idle.
    pub fn start() -> Self {
        let reset = std::fs::write("/proc/self/clear_refs", "5").is_ok();
        Self { idle: resident_bytes(), reset }
    }

    /// What was resident at the start.
    pub fn idle(&self) -> Option<u64> {
        self.idle
    }

    /// The most since the start.
    pub fn peak(&self) -> Option<u64> {
        self.reset.then(peak_bytes).flatten()
    }

    /// The most since the start beyond what was idle.
    pub fn extra(&self) -> Option<u64> {
        Some(self.peak()?.saturating_sub(self.idle?))
    }
}

/// Megabytes with one digit, or null.
pub fn megabytes(bytes: Option<u64>) -> Value {
    bytes.map_or(Value::Null, |bytes| json!(rounded(bytes as f64 / 1e6, 1)))
}

/// With so many digits after the point.
pub fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

/// A run of so many seconds needs no warm-up.
const LONG: f64 = 60.0;

/// Times of the samples.
pub struct Times {
    /// Seconds of one run, and cores that others used.
    samples: Vec<(f64, Option<f64>)>,
}

impl Times {
    /// Runs the work once to warm up, then `reps` quiet samples of it, in at most three times as many. A first run longer
    /// than `LONG` is a sample itself, and `reps` are all there are.
    pub fn of(reps: usize, host: &dyn HostApi, work: impl FnMut() -> Result<()>) -> Result<Self> {
        Self::sample(reps, SAMPLE, host, work)
    }

    fn sample(
        reps: usize,
        shortest: f64,
        host: &dyn HostApi,
        mut work: impl FnMut() -> Result<()>,
    ) -> Result<Self> {
        let mut run = |times: usize| -> Result<f64> {
            if host.cancelled() {
                return Err(PluginError::cancelled("bench: stopped between two runs"));
            }
            let start = Instant::now();
            for _ in 0..times {
                black_box(work()?);
            }
            Ok(start.elapsed().as_secs_f64())
        };
        let mut sample = |runs: usize| -> Result<(f64, Option<f64>)> {
            let before = processor_times();
            let seconds = run(runs)?;
            let others =
                before.zip(processor_times()).map(|(before, after)| after.others_since(before, seconds));
            Ok((seconds / runs as f64, others))
        };
        let warm_up = sample(1)?;
        let runs = (shortest / warm_up.0.max(1e-9)).ceil().clamp(1.0, 1e6) as usize;
        // A run of minutes is no longer for being the first one.
        let (mut samples, most) =
            if warm_up.0 < LONG { (Vec::new(), 3 * reps) } else { (vec![warm_up], reps) };
        while samples.len() < most && samples.iter().filter(|s| is_quiet(s)).count() < reps {
            samples.push(sample(runs)?);
        }
        Ok(Self { samples })
    }

    fn quiet(&self) -> Vec<f64> {
        self.samples.iter().filter(|s| is_quiet(s)).map(|s| s.0).collect()
    }

    /// The median of the quiet samples, of all where there is none.
    pub fn median(&self) -> f64 {
        let quiet = self.quiet();
        median(if quiet.is_empty() { self.samples.iter().map(|s| s.0).collect() } else { quiet })
    }

    /// The shortest of all.
    pub fn best(&self) -> f64 {
        self.samples.iter().map(|s| s.0).fold(f64::INFINITY, f64::min)
    }

    /// How clean they are: quiet samples, and the median of the cores that others used.
    pub fn describe(&self, into: &mut Map<String, Value>) {
        let others: Vec<f64> = self.samples.iter().filter_map(|s| s.1).collect();
        into.insert("n_clean".into(), json!(self.quiet().len()));
        let other = (!others.is_empty()).then(|| rounded(median(others), 2));
        into.insert("other".into(), json!(other));
    }
}

fn is_quiet(sample: &(f64, Option<f64>)) -> bool {
    sample.1.is_none_or(|cores| cores < QUIET)
}

/// The middle value, or the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n => (values[(n - 1) / 2] + values[n / 2]) / 2.0,
    }
}

/// Processor seconds since the machine and since this process started.
#[derive(Clone, Copy, Debug)]
struct ProcessorTimes {
    machine: f64,
    own: f64,
}

impl ProcessorTimes {
    /// Cores that others used in the `seconds` since `before`.
    fn others_since(self, before: Self, seconds: f64) -> f64 {
        ((self.machine - before.machine - (self.own - before.own)) / seconds).max(0.0)
    }
}

/// Linux gives user space hundredths of a second, whatever its own clock.
const TICKS_PER_SECOND: f64 = 100.0;

fn processor_times() -> Option<ProcessorTimes> {
    let machine = std::fs::read_to_string("/proc/stat").ok()?;
    let own = std::fs::read_to_string("/proc/self/stat").ok()?;
    parse_processor_times(&machine, &own)
}

/// From `/proc/stat` (user, nice, system, idle, iowait, irq, softirq, steal) and `/proc/self/stat` (fields 14 and 15,
/// counted behind the program's name, which may hold anything).
fn parse_processor_times(machine: &str, own: &str) -> Option<ProcessorTimes> {
    let numbers: Vec<f64> =
        machine.lines().next()?.split_whitespace().skip(1).map_while(|n| n.parse().ok()).collect();
    let busy: f64 =
        numbers.iter().enumerate().filter(|(i, _)| matches!(i, 0..3 | 5..8)).map(|(_, n)| n).sum();
    let fields: Vec<&str> = own.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
    Some(ProcessorTimes {
        machine: busy / TICKS_PER_SECOND,
        own: (field(14)? + field(15)?) / TICKS_PER_SECOND,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Silent(bool);

    impl HostApi for Silent {
        fn event(&self, _: &str, _: &Value) {}
        fn cancelled(&self) -> bool {
            self.0
        }
    }

    #[test]
    fn the_work_is_run_once_before_the_samples_and_once_in_each_that_is_long_enough() {
        let mut runs = 0;
        let times = Times::sample(2, 0.0, &Silent(false), || {
            runs += 1;
            Ok(())
        })
        .unwrap();
        assert!((2..=6).contains(&times.samples.len()), "{:?}", times.samples);
        assert_eq!(runs, 1 + times.samples.len());
        assert!(times.best() <= times.median());
    }

    #[test]
    fn a_cancelled_measurement_stops() {
        let error = Times::of(1, &Silent(true), || Ok(())).err().unwrap();
        assert_eq!(error.kind, crate::error::Kind::Cancelled);
    }

    #[test]
    fn quiet_samples_decide_the_median_where_there_are_any() {
        let times = Times { samples: vec![(1.0, Some(0.9)), (2.0, Some(0.0)), (4.0, Some(0.1))] };
        assert_eq!((times.median(), times.best()), (3.0, 1.0));
        let mut told = Map::new();
        times.describe(&mut told);
        assert_eq!(Value::Object(told), json!({ "n_clean": 2, "other": 0.1 }));
        let times = Times { samples: vec![(1.0, Some(0.9)), (2.0, Some(0.8)), (4.0, Some(1.1))] };
        assert_eq!(times.median(), 2.0);
    }

    #[test]
    fn memory_held_at_once_shows_in_the_peak_after_it_is_gone() {
        let memory = Memory::start();
        if !memory.reset {
            return;
        }
        drop(black_box(vec![1u8; 64 << 20]));
        assert!(memory.extra().unwrap() >= 60 << 20, "{:?}", memory.extra());
    }

    #[test]
    fn others_are_the_machine_less_this_process() {
        let own = |ticks: u32| format!("1 (a) b) c) R 1 1 1 0 -1 0 0 0 0 0 {ticks} 50 7 7");
        let machine = |user: u32| format!("cpu  {user} 0 100 9999 9999 0 0 0 0 0\ncpu0 1 1 1 1\n");
        let before = parse_processor_times(&machine(1000), &own(100)).unwrap();
        let after = parse_processor_times(&machine(1300), &own(200)).unwrap();
        assert_eq!(after.others_since(before, 2.0), 1.0);
    }
}
