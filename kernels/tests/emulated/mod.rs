//! The emulated device of `kernels/cu/emulate`, for tests of every crate that launches kernels: its libraries, compiled with the C++
//! compiler of the machine.

// Every test program uses its own part.
#![allow(dead_code)]

pub mod compiler;
pub mod libraries;

use std::path::{Path, PathBuf};

use anyhow::Result;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use megacontext_kernels::cuda::image::{Image, Module};

pub use libraries::compiled;

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
