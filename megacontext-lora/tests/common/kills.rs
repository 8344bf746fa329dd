//! Runs that are killed (SIGKILL) and taken up again until they are done.
//!
//! A run is a command line that goes on where an earlier one was killed. [`Torn`] kills it at moments that a test names;
//! [`at_random`] at moments that a seed draws, as often as the suite's mode says: with `MCLORA_LONG=1` at least
//! [`MOST_KILLS`] times, else twice.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use megacontext_base::random::Random;

use super::{Fixture, Outcome, Running, command, finish};

/// The signal's number, as the system reports it.
const SIGKILL: i32 = 9;
/// Kills of a run in the suite's long mode.
pub const MOST_KILLS: usize = 24;

/// Is this the suite's long mode?
pub fn long() -> bool {
    std::env::var_os("MCLORA_LONG").is_some()
}

/// `mclora` with these arguments, and with `--resume` where a run began in its folder.
pub fn resumed(mut args: Vec<String>, out: &Path) -> Command {
    if out.join(".lock").exists() {
        args.push("--resume".to_string());
    }
    command(&args)
}

/// A run in the folder `out` that gets killed.
pub struct Torn<'a> {
    start: &'a dyn Fn(&Path) -> Command,
    out: PathBuf,
    log: PathBuf,
}

impl<'a> Torn<'a> {
    /// `start` makes the command, for the first time and for every other.
    pub fn new(fixture: &Fixture, out: &str, start: &'a dyn Fn(&Path) -> Command) -> Self {
        Self { start, out: fixture.path(out), log: fixture.path(&format!("{out}.log")) }
    }

    /// Runs it and kills it when the moment comes. Whether that was in time: it may be done before.
    #[track_caller]
    pub fn kill(&self, name: &str, moment: impl FnMut() -> bool) -> bool {
        let mut running = Running::spawn((self.start)(&self.out), self.log.clone());
        if running.wait_until(moment) {
            running.signal("KILL");
        }
        match running.end() {
            (None, Some(SIGKILL)) => true,
            // It was done before the signal came.
            (Some(0), None) => false,
            other => panic!("{name}: {other:?}: {}", running.said()),
        }
    }

    /// Kills it at every moment, each of which comes later in the run than the one before it, then lets it end. The names
    /// of the moments at which it was killed.
    #[track_caller]
    pub fn at_moments(&self, moments: &[(&'static str, &dyn Fn() -> bool)]) -> Vec<&'static str> {
        let killed = moments.iter().filter(|(name, moment)| self.kill(name, moment)).map(|(name, _)| *name);
        let killed: Vec<&str> = killed.collect();
        self.finish();
        killed
    }

    /// Lets it end.
    #[track_caller]
    pub fn finish(&self) -> Outcome {
        finish((self.start)(&self.out)).success()
    }
}

/// Runs what `start` makes once as it is, then kills it again and again, each time after some part of its first half that a
/// seed draws. Wherever it is done, `same` holds its folder against that of the run that was left alone, and another is
/// begun until there were kills enough.
#[track_caller]
pub fn at_random(fixture: &Fixture, start: &dyn Fn(&Path) -> Command, same: &dyn Fn(&Path, &Path)) {
    let kills = if long() { MOST_KILLS } else { 2 };
    let whole = fixture.path("left_alone");
    let began = Instant::now();
    finish(start(&whole)).success();
    let time = began.elapsed();
    let mut random = Random::new(7);
    let torn = Torn::new(fixture, "killed_at_random", start);
    let (mut killed, mut runs) = (0, 0);
    while killed < kills {
        let after = Duration::from_secs_f64(time.as_secs_f64() * 0.5 * random.unit());
        let start = Instant::now();
        if torn.kill(&format!("after {after:?}"), || start.elapsed() >= after) {
            killed += 1;
        } else {
            same(&whole, &torn.out);
            fs::remove_dir_all(&torn.out).unwrap();
            runs += 1;
            assert!(runs < 10 * kills, "{killed} kills in {runs} runs of {time:?}");
        }
    }
    torn.finish();
    same(&whole, &torn.out);
    println!("{killed} kills in {} runs", runs + 1);
}
