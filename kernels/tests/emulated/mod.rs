//! The emulated device of `kernels/cu/emulate`, for tests of every crate that launches kernels: its libraries, compiled with the C++
//! compiler of the machine.

// Every test program uses its own part.
#![allow(dead_code)]

pub mod compiler;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use megacontext_kernels::cuda::image::{Image, Module};

use compiler::{compile, source};

/// A library of `cu/emulate` by its file's name, compiled under its SONAME if it is not newer than its sources; none without a
/// compiler.
pub fn compiled(name: &str, soname: &str) -> Result<Option<PathBuf>> {
    static BUILDING: Mutex<()> = Mutex::new(());
    static MADE: Mutex<BTreeMap<String, Option<PathBuf>>> = Mutex::new(BTreeMap::new());
    let _building = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(made) = MADE.lock().unwrap_or_else(PoisonError::into_inner).get(name) {
        return Ok(made.clone());
    }
    let made = match compiler::compiler() {
        None => None,
        Some(compiler) => {
            let to = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("emulated_{name}.so"));
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

/// The emulated driver.
pub fn driver() -> Result<Option<PathBuf>> {
    compiled("driver", "libcuda.so.1")
}

/// Opens an emulated library before anything asks for one: what asks for its SONAME then gets this one. Its
/// symbols are for no other library.
pub fn preload(path: &Path) -> Result<Library> {
    // SAFETY: the library is this crate's own, and its initialisers do nothing.
    Ok(unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }?)
}

/// What the emulated driver takes for the machine code of a file.
pub fn emulated_image(module: Module) -> Image {
    let text = format!("emulated device: {}\0", module.name());
    Image { bytes: text.into_bytes().into(), origin: "emulated".into() }
}
