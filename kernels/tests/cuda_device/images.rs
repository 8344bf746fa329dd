//! NVRTC, which needs no GPU, on every file for both targets; its cache. Skipped with a line where there is no NVRTC.
//!
//! In processes of their own: NVRTC asks a driver that is open for its private tables (cuGetExportTable), which the emulated one
//! has not, and crashes.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use megacontext_kernels::cuda::Capability;
use megacontext_kernels::cuda::image::{Compiler, Module};

use crate::support::child;

const HOPPER: Capability = Capability { major: 9, minor: 0 };
const AMPERE: Capability = Capability { major: 8, minor: 0 };

fn compiler(cache: Option<&std::path::Path>) -> Option<Compiler> {
    match Compiler::new(99, "sm_90", cache.map(Into::into)) {
        Ok(compiler) => Some(compiler),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

fn alone(test: &str) -> Result<()> {
    let output = child(test, &[])?;
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    print!("{text}");
    ensure!(output.status.success(), "{test}: {}\n{text}{errors}", output.status);
    Ok(())
}

#[test]
fn every_file_compiles_for_both_targets() -> Result<()> {
    alone("images::compiles")
}

#[test]
#[ignore = "run by another, in a process of its own"]
fn compiles() -> Result<()> {
    let Some(compiler) = compiler(None) else { return Ok(()) };
    let (major, minor) = compiler.version();
    for capability in [AMPERE, HOPPER] {
        for module in Module::ALL {
            let start = Instant::now();
            let image = compiler.image(module, capability)?;
            let bytes = image.bytes.len();
            ensure!(image.bytes.starts_with(b"\x7fELF"), "{}: no cubin", module.name());
            let (name, target) = (module.name(), capability.target());
            println!("NVRTC {major}.{minor}: {name} for {target}: {bytes} bytes, {:.1?}", start.elapsed());
        }
    }
    Ok(())
}

#[test]
fn the_cache_gives_what_was_made_and_mends_what_is_damaged() -> Result<()> {
    alone("images::caches")
}

#[test]
#[ignore = "run by another, in a process of its own"]
fn caches() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Some(compiler) = compiler(Some(&folder.path().join("a/b"))) else { return Ok(()) };
    let made = compiler.image(Module::AdamW, HOPPER)?;
    ensure!(!made.origin.contains("cache"), "{}", made.origin);
    let again = compiler.image(Module::AdamW, HOPPER)?;
    ensure!(again.origin.contains("from the cache") && again.bytes == made.bytes, "{}", again.origin);
    let files: Vec<_> =
        fs::read_dir(folder.path().join("a/b"))?.flatten().map(|entry| entry.path()).collect();
    let [file] = &files[..] else { anyhow::bail!("one file, and nothing beside it: {files:?}") };
    let good = fs::read(file)?;
    let mut damaged = good.clone();
    *damaged.last_mut().context("a file with something in it")? ^= 1;
    for bad in [&damaged[..], &good[..good.len() - 1], &good[..10], &[]] {
        fs::write(file, bad)?;
        let mended = compiler.image(Module::AdamW, HOPPER)?;
        ensure!(!mended.origin.contains("cache") && mended.bytes == made.bytes, "{}", mended.origin);
        ensure!(fs::read(file)? == good, "the file is good again");
    }
    ensure!(compiler.image(Module::AdamW, AMPERE)?.origin == made.origin, "another target is another file");
    // A folder that cannot be written is no error.
    let in_a_file = Compiler::new(99, "sm_90", Some(file.join("below")))?;
    ensure!(in_a_file.image(Module::AdamW, HOPPER)?.bytes == made.bytes, "compiled without a cache");
    Ok(())
}

#[test]
fn without_a_fitting_compiler_the_error_says_what_was_tried() -> Result<()> {
    // NVRTC of CUDA 12 is too new for a driver of 11.
    let error = Compiler::new(11, "sm_90", None).err().context("none that old is looked for")?.to_string();
    let expected = "CUDA: no machine code for sm_90 that the driver takes is built in, and NVRTC, which would compile it, is \
                    not there: expected libnvrtc of CUDA 12.0 to 11 (tried: libnvrtc.so.12: ";
    ensure!(error.starts_with(expected), "{error}");
    Ok(())
}

#[test]
fn what_does_not_compile_comes_back_with_the_log() -> Result<()> {
    alone("images::refuses")
}

#[test]
#[ignore = "run by another, in a process of its own"]
fn refuses() -> Result<()> {
    let Some(compiler) = compiler(None) else { return Ok(()) };
    let none = Capability { major: 1, minor: 0 };
    let error = compiler.image(Module::AdamW, none).err().context("no such architecture")?.to_string();
    ensure!(error.contains(": adamw.cu for sm_10: NVRTC_ERROR_INVALID_OPTION\n"), "{error}");
    ensure!(error.contains("invalid value for --gpu-architecture"), "{error}");
    Ok(())
}
