//! The CUDA kernels of `cu/`, compiled as plain C++ and run on an emulated device against f64 references: results, statistics
//! and gradients of all patterns and storage types at odd shapes, accesses outside their arrays, misaligned ones, and what
//! passes between threads without a barrier. Needs a C++17 compiler, and is skipped with a line where there is none.
//!
//! What this cannot show: speed, and what nvcc makes of the code (`docs/cuda.md`).
#![cfg(unix)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};

fn run(command: &mut Command) -> Result<Output> {
    command.output().with_context(|| format!("{command:?}"))
}

/// The compiler named by `CXX`, or the first one that is there.
fn compiler() -> Option<String> {
    let named = std::env::var("CXX").ok();
    let names = named.as_deref().into_iter().chain(["c++", "g++", "clang++"]);
    names
        .map(str::to_owned)
        .find(|name| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success()))
}

/// Compiles one program of `cu/emulate` and runs it; its own comparisons decide.
fn passes(name: &str) -> Result<()> {
    let Some(compiler) = compiler() else {
        eprintln!("skipped: no C++ compiler (c++, g++ or clang++) to emulate the CUDA kernels with");
        return Ok(());
    };
    let source: PathBuf =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("cu/emulate").join(name).with_extension("cpp");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cuda_emulated_{name}"));
    // A GPU takes no misaligned address; here one ends the program.
    let checks = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"];
    let compiled = run(Command::new(&compiler)
        .args(["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"])
        .args(checks)
        .arg("-o")
        .args([&program, &source]))?;
    ensure!(
        compiled.status.success(),
        "{compiler} {}:\n{}",
        source.display(),
        String::from_utf8_lossy(&compiled.stderr)
    );
    let ran = run(&mut Command::new(&program))?;
    let text = String::from_utf8_lossy(&ran.stdout);
    println!("{text}");
    ensure!(ran.status.success(), "{name}: {}\n{text}{}", ran.status, String::from_utf8_lossy(&ran.stderr));
    Ok(())
}

#[test]
fn the_emulated_device_sees_faults() -> Result<()> {
    passes("self")
}

#[test]
fn attention_equals_the_reference() -> Result<()> {
    passes("attention")
}

#[test]
fn ropes_norms_losses_and_steps_equal_the_reference() -> Result<()> {
    passes("ops")
}
