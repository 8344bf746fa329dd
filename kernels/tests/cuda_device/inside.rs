//! Layouts of arguments and sizes of tiles against the C++ compiler's.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use megacontext_kernels::cuda::inside::{layouts, tiles};

use crate::emulated::compiler;

/// The lines that a program of `cu/emulate` prints, with single spaces.
fn printed(name: &str) -> Result<Option<Vec<String>>> {
    let Some(compiler) = compiler::compiler() else { return Ok(None) };
    let folder = tempfile::tempdir()?;
    let program = folder.path().join(name);
    compiler::compile(&compiler, name, &[], &program)?;
    let ran = Command::new(&program).output().with_context(|| program.display().to_string())?;
    ensure!(ran.status.success(), "{name}: {}", ran.status);
    let text = String::from_utf8(ran.stdout)?;
    Ok(Some(text.trim().lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()))
}

#[test]
fn arguments_lie_as_in_the_kernels() -> Result<()> {
    let Some(theirs) = printed("layout")? else { return Ok(()) };
    assert_eq!(theirs, layouts());
    Ok(())
}

#[test]
fn shared_memory_is_that_of_the_kernels() -> Result<()> {
    let Some(theirs) = printed("shared")? else { return Ok(()) };
    // After the line with the names of columns.
    assert_eq!(theirs[1..], tiles());
    Ok(())
}
