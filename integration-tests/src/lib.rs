//! Where the built plugin is, for the tests of this package.
//!
//! Cargo builds the plugin's library for this package's tests because they depend on it, and leaves it in
//! `target/<profile>/deps`; a plain `cargo build` links it into `target/<profile>` as well. [`plugin`] takes the newer one.
//! Programs of other packages are not built for tests here, so the tests that run `mclora` live in the `megacontext-lora`
//! package (`tests/cli.rs`), where Cargo names it in `CARGO_BIN_EXE_mclora`.

use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// `target/<profile>`, where the running test was built.
fn profile_folder() -> Result<PathBuf> {
    let executable = std::env::current_exe().context("the test's own path")?;
    let folder = executable.ancestors().skip(1).find(|f| !f.ends_with("deps") && !f.ends_with("examples"));
    Ok(folder.context("a test lies in a target folder")?.to_owned())
}

/// The plugin that this test run has built.
pub fn plugin() -> Result<PathBuf> {
    let folder = profile_folder()?;
    megacontext_lora_abi::loader::find_in(&folder).with_context(|| {
        format!("{}: no plugin there; run `cargo build -p megacontext-lora`", folder.display())
    })
}

/// A library of this package's `examples/`. `cargo test` builds them unless it is told to run one test file only; then
/// Cargo is asked for it here.
pub fn example_library(name: &str) -> Result<PathBuf> {
    let folder = profile_folder()?;
    let file = format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let path = folder.join("examples").join(file);
    if !path.is_file() {
        let profile = if folder.ends_with("release") { "release" } else { "dev" };
        let target = folder.parent().context("a profile's folder lies in a target folder")?;
        let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["build", "-q", "-p", "integration-tests", "--example", name, "--profile", profile])
            .arg("--target-dir")
            .arg(target)
            .status()
            .context("running cargo")?;
        ensure!(status.success() && path.is_file(), "cargo did not build {}", path.display());
    }
    Ok(path)
}

/// A folder of this package's `fixtures/`.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// Copies a fixture's model to `folder` and gives it a tokenizer of `size` words (`w0`, `w1`, …, unknown ones are `w0`),
/// since the golden models come without one.
pub fn model_with_tokenizer(name: &str, size: usize, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    for entry in std::fs::read_dir(fixture(name))? {
        let entry = entry?;
        if entry.file_name() != "expected.safetensors" {
            std::fs::copy(entry.path(), folder.join(entry.file_name()))?;
        }
    }
    let words: Vec<String> = (0..size).map(|i| format!("\"w{i}\":{i}")).collect();
    let tokenizer = format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":{{"type":"Whitespace"}},"post_processor":null,"decoder":null,
            "model":{{"type":"WordLevel","vocab":{{{}}},"unk_token":"w0"}}}}"#,
        words.join(",")
    );
    std::fs::write(folder.join("tokenizer.json"), tokenizer)?;
    Ok(())
}
