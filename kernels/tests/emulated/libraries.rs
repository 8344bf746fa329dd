//! The libraries of the emulated device: compiled once, under the names that programs look for, in a folder of their own.

// Every test program uses its own part.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

use super::compiler::{compile, compiler, source};

/// What each is called in `cu/emulate`, and as a library.
const ALL: [(&str, &str); 3] =
    [("driver", "libcuda.so.1"), ("nvrtc", "libnvrtc.so.12"), ("cublaslt", "libcublasLt.so.12")];

/// A library of `cu/emulate` by its file's name, compiled under its SONAME if it is not newer than its sources; none without a
/// compiler.
pub fn compiled(name: &str, soname: &str) -> Result<Option<PathBuf>> {
    static BUILDING: Mutex<()> = Mutex::new(());
    static MADE: Mutex<BTreeMap<String, Option<PathBuf>>> = Mutex::new(BTreeMap::new());
    let _building = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(made) = MADE.lock().unwrap_or_else(PoisonError::into_inner).get(name) {
        return Ok(made.clone());
    }
    let made = match compiler() {
        None => None,
        Some(compiler) => {
            let to = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated").join(soname);
            fs::create_dir_all(to.parent().context("a folder")?)?;
            let folder = source(name);
            let folder = folder.parent().context("a folder")?;
            let changed = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
            let sources = [folder, folder.parent().context("a folder")?];
            let files = sources.iter().map(fs::read_dir).collect::<std::io::Result<Vec<_>>>()?;
            let newest =
                files.into_iter().flatten().flatten().filter_map(|entry| changed(&entry.path())).max();
            if changed(&to).is_none_or(|made| Some(made) < newest) {
                // Under another name first, since two programs may do this at once.
                let beside = to.with_extension(format!("{}.so", std::process::id()));
                let soname = format!("-Wl,-soname,{soname}");
                compile(&compiler, name, &["-shared", "-fPIC", &soname], &beside)?;
                fs::rename(beside, &to)?;
            }
            Some(to)
        }
    };
    MADE.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_string(), made.clone());
    Ok(made)
}

/// The folder of all of them, for the `LD_LIBRARY_PATH` of a program that opens a device as it would anywhere.
pub fn folder() -> Result<Option<PathBuf>> {
    let mut folder = None;
    for (name, soname) in ALL {
        let Some(library) = compiled(name, soname)? else { return Ok(None) };
        folder = library.parent().map(Path::to_path_buf);
    }
    Ok(folder)
}

/// That folder before what the loader searches here already.
pub fn search_path() -> Result<Option<std::ffi::OsString>> {
    let Some(folder) = folder()? else { return Ok(None) };
    let before = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    // An empty entry would be the folder that a program is started in.
    let others = std::env::split_paths(&before).filter(|path| !path.as_os_str().is_empty());
    Ok(Some(std::env::join_paths(std::iter::once(folder).chain(others))?))
}
