//! Machine code of the CUDA kernels into the library, where `MEGACONTEXT_CUDA_FATBINS` names the folder that
//! `scripts/cuda-build.sh` wrote; nothing otherwise, and nothing without the feature `cuda`.
//!
//! That folder has the sources beside the code, and they have to be these: code of other sources may lay its arguments out
//! differently.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

const VARIABLE: &str = "MEGACONTEXT_CUDA_FATBINS";
const MODULES: [&str; 11] = [
    "attention_bounds",
    "attention_forward",
    "attention_backward",
    "rope",
    "norm",
    "loss",
    "adamw",
    "rows",
    "mlp",
    "embedding",
    "dora",
];
const HEADERS: [&str; 3] = ["device.cuh", "products.cuh", "attention.cuh"];

fn read(path: &Path) -> Vec<u8> {
    println!("cargo:rerun-if-changed={}", path.display());
    fs::read(path).unwrap_or_else(|error| {
        panic!("{VARIABLE}: expected {}: {error}; scripts/cuda-build.sh writes it", path.display())
    })
}

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed={VARIABLE}");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let variable = |name| PathBuf::from(env::var_os(name).expect("cargo sets it for build scripts"));
    let (sources, out) = (variable("CARGO_MANIFEST_DIR").join("cu"), variable("OUT_DIR"));
    let mut cuda = 0i32;
    let mut text =
        "/// Fatbins by the names of their files.\nstatic FATBINS: &[(&str, &[u8])] = &[\n".to_string();
    if let Some(folder) = env::var_os(VARIABLE).filter(|folder| !folder.is_empty()) {
        let folder = fs::canonicalize(&folder)
            .unwrap_or_else(|error| panic!("{VARIABLE}={}: {error}", Path::new(&folder).display()));
        for name in MODULES.map(|name| format!("{name}.cu")).iter().map(String::as_str).chain(HEADERS) {
            if read(&folder.join(name)) != read(&sources.join(name)) {
                panic!(
                    "{VARIABLE}: expected code of this {name}, got that of another one in {}; run scripts/cuda-build.sh",
                    folder.display()
                );
            }
        }
        for name in MODULES {
            let path = folder.join(format!("{name}.fatbin"));
            read(&path);
            writeln!(text, "    ({name:?}, include_bytes!({path:?})),").expect("a string takes all");
        }
        let major = String::from_utf8_lossy(&read(&folder.join("cuda-major"))).trim().to_string();
        cuda = major.parse().unwrap_or_else(|_| {
            panic!("{VARIABLE}: expected the compiler's major version in cuda-major, got {major:?}")
        });
    }
    writeln!(text, "];\n/// The compiler's major version of CUDA.\nconst FATBINS_CUDA: i32 = {cuda};")
        .expect("a string takes all");
    fs::write(out.join("fatbins.rs"), text).expect("the folder for what is built can be written");
}
