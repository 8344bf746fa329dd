//! The CUDA kernels of `cu/`, compiled as plain C++ and run on an emulated device against f64 references: results, statistics
//! and gradients of all patterns and storage types at odd shapes, accesses outside their arrays, misaligned ones, and what
//! passes between threads without a barrier. Needs a C++17 compiler, and is skipped with a line where there is none.
//!
//! What this cannot show: speed, and what nvcc makes of the code (`docs/cuda.md`).
#![cfg(unix)]

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

#[path = "emulated/compiler.rs"]
mod compiler;

/// Compiles one program of `cu/emulate` and runs it; its own comparisons decide.
fn passes(name: &str) -> Result<()> {
    let Some(compiler) = compiler::compiler() else { return Ok(()) };
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cuda_emulated_{name}"));
    compiler::compile(&compiler, name, &[], &program)?;
    let ran = Command::new(&program).output().with_context(|| program.display().to_string())?;
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

#[test]
fn rows_activations_and_embeddings_equal_the_reference() -> Result<()> {
    passes("rows")
}
