//! The C++ compiler that emulates CUDA's kernels for tests.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The compiler named by `CXX`, or the first one that is there; says so where there is none.
pub fn compiler() -> Option<String> {
    let named = std::env::var("CXX").ok();
    let names = named.as_deref().into_iter().chain(["c++", "g++", "clang++"]);
    let found = names
        .map(str::to_owned)
        .find(|name| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success()));
    if found.is_none() {
        eprintln!("skipped: no C++ compiler (c++, g++ or clang++) to emulate the CUDA kernels with");
    }
    found
}

/// A file of `cu/emulate`.
pub fn source(name: &str) -> PathBuf {
    // The package under test is `kernels`, or lies somewhere beside it.
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let folder = beside.map(|at| at.join("kernels/cu/emulate")).find(|folder| folder.is_dir());
    folder.unwrap_or_default().join(name).with_extension("cpp")
}

/// Compiles one of them. A GPU takes no misaligned address; in what comes out one ends the program.
pub fn compile(compiler: &str, name: &str, further: &[&str], to: &Path) -> Result<()> {
    let mut command = Command::new(compiler);
    command
        .args(["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"])
        .args(["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"])
        .args(further)
        .arg("-o")
        .args([to, &source(name)]);
    let compiled = command.output().with_context(|| format!("{command:?}"))?;
    let said = String::from_utf8_lossy(&compiled.stderr);
    ensure!(compiled.status.success(), "{compiler} {}:\n{said}", source(name).display());
    Ok(())
}
