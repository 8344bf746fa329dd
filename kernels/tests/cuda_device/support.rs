//! The device that tests run on, seeded values, comparisons.

use std::process::{Command, Output};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use anyhow::{Context, Result, bail, ensure};
use libloading::os::unix::Library;
use megacontext_kernels::cuda::{Device, Kind, Stored};

pub use crate::emulated::{compiled, driver, emulated_image, preload};

#[path = "../attention/seeded.rs"]
mod seeded;

pub use seeded::values;

/// A device, for as long as a test holds it. Drop what lies on it first.
pub struct Lease<'a, G> {
    pub device: &'a Device,
    /// The emulated driver, where the device is its.
    pub emulated: Option<&'a Library>,
    _guard: G,
}

static USERS: RwLock<()> = RwLock::new(());

struct Found {
    device: Device,
    emulated: Option<Library>,
}

/// This program again, to run one test alone.
pub fn child(test: &str, environment: &[(&str, &str)]) -> Result<Output> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"]);
    command.envs(environment.iter().copied()).output().with_context(|| format!("{command:?}"))
}

/// What the probe says in a process where nothing else was loaded.
pub fn probed() -> Result<String> {
    let output = child("probing::says", &[])?;
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().find(|line| line.contains("probe: ")).context(text.clone())?;
    Ok(line[line.find("probe: ").unwrap_or(0)..].to_string())
}

fn find() -> Result<Option<Found>> {
    let said = probed()?;
    if said.starts_with("probe: devices") {
        println!("{said}");
        return Ok(Some(Found { device: Device::open(0)?, emulated: None }));
    }
    ensure!(said.contains("no driver"), "the driver that is there cannot be used: {said}");
    let Some(path) = driver()? else { return Ok(None) };
    let library = preload(&path)?;
    let device = Device::open_with(0, |module, _, _| Ok(emulated_image(module)))?;
    Ok(Some(Found { device, emulated: Some(library) }))
}

fn lease<G>(guard: G) -> Result<Option<Lease<'static, G>>> {
    static FOUND: OnceLock<Result<Option<Found>, String>> = OnceLock::new();
    match FOUND.get_or_init(|| find().map_err(|error| format!("{error:#}"))) {
        Err(error) => bail!("{error}"),
        Ok(None) => Ok(None),
        Ok(Some(Found { device, emulated })) => {
            Ok(Some(Lease { device, emulated: emulated.as_ref(), _guard: guard }))
        }
    }
}

/// The device, together with others.
pub fn device() -> Result<Option<Lease<'static, RwLockReadGuard<'static, ()>>>> {
    lease(USERS.read().unwrap_or_else(PoisonError::into_inner))
}

/// The device, alone.
pub fn device_alone() -> Result<Option<Lease<'static, RwLockWriteGuard<'static, ()>>>> {
    lease(USERS.write().unwrap_or_else(PoisonError::into_inner))
}

/// As they are stored.
pub fn stored<T: Stored>(values: &[f32]) -> Vec<T> {
    values.iter().map(|x| T::put(*x)).collect()
}

/// As they were stored, in f32.
pub fn widened<T: Stored>(values: &[T]) -> Vec<f32> {
    values.iter().map(|x| x.get()).collect()
}

/// What results may be off by, relative to the greatest.
pub fn bound(kind: Kind) -> f32 {
    match kind {
        Kind::F32 => 1e-4,
        Kind::Bf16 => 2e-2,
        Kind::F16 => 5e-3,
    }
}

/// Greatest values below this are rounding's own: what is expected is 0, and operands are of size 1.
const NOTHING: f32 = 1e-5;

/// Holds `got` against `expected`; NaN never passes.
pub fn close<T: Stored>(what: &str, got: &[T], expected: &[f32]) -> Result<()> {
    close_within(what, got, expected, bound(T::KIND))
}

/// As [`close`], within another bound.
pub fn close_within<T: Stored>(what: &str, got: &[T], expected: &[f32], bound: f32) -> Result<()> {
    ensure!(got.len() == expected.len(), "{what}: {} values instead of {}", got.len(), expected.len());
    let greatest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    let greatest = if greatest < NOTHING { 1.0 } else { greatest };
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let got = got.get();
        let good = (got - expected).abs() <= bound * greatest || got == *expected;
        ensure!(
            good,
            "{what} {}: number {i}: expected {expected} within {bound} of {greatest}, got {got}",
            T::KIND.name()
        );
    }
    Ok(())
}
