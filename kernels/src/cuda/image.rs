//! Where the machine code of the kernels comes from.
//!
//! Built in, when `MEGACONTEXT_CUDA_FATBINS` named the folder that `scripts/cuda-build.sh` writes as this crate was built:
//! code for sm_80 and sm_90, which every device of capability 8.x and 9.x runs under a driver of at least the compiler's
//! major version of CUDA. Otherwise compiled by NVRTC from the sources, which are always built in, for the device's own
//! architecture: a minute or two, once. The result is kept in `$MEGACONTEXT_CUDA_CACHE`, else `$XDG_CACHE_HOME/megacontext/cuda`, else `~/.cache/megacontext/cuda`, under a hash of
//! sources, options, architecture and NVRTC's version. A file there that is damaged is made again. A folder that cannot be
//! read or written costs the time of compiling and is no error.
//!
//! Errors: no NVRTC ([`CudaError::NoCompiler`]), or what it says of the source ([`CudaError::Compile`]).

use std::borrow::Cow;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::device::Capability;
use super::error::CudaError;
use super::nvrtc::{Nvrtc, Source};

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// A file of `cu/`: what is loaded at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Module {
    /// attention_bounds.cu
    Bounds,
    /// attention_forward.cu
    Forward,
    /// attention_backward.cu
    Backward,
    /// rope.cu
    Rope,
    /// norm.cu
    Norm,
    /// loss.cu
    Loss,
    /// adamw.cu
    AdamW,
    /// rows.cu
    Rows,
    /// mlp.cu
    Mlp,
    /// embedding.cu
    Embedding,
    /// dora.cu
    Dora,
}

macro_rules! text {
    ($name:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/cu/", $name))
    };
}

/// What the sources include, by name.
const HEADERS: [(&str, &str); 3] = [
    ("device.cuh", text!("device.cuh")),
    ("products.cuh", text!("products.cuh")),
    ("attention.cuh", text!("attention.cuh")),
];

/// What the built-in code is for, as in scripts/cuda-build.sh.
const BUILT_FOR: [i32; 2] = [8, 9];

impl Module {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Bounds,
        Self::Forward,
        Self::Backward,
        Self::Rope,
        Self::Norm,
        Self::Loss,
        Self::AdamW,
        Self::Rows,
        Self::Mlp,
        Self::Embedding,
        Self::Dora,
    ];

    /// The file's name without its ending.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bounds => "attention_bounds",
            Self::Forward => "attention_forward",
            Self::Backward => "attention_backward",
            Self::Rope => "rope",
            Self::Norm => "norm",
            Self::Loss => "loss",
            Self::AdamW => "adamw",
            Self::Rows => "rows",
            Self::Mlp => "mlp",
            Self::Embedding => "embedding",
            Self::Dora => "dora",
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Bounds => text!("attention_bounds.cu"),
            Self::Forward => text!("attention_forward.cu"),
            Self::Backward => text!("attention_backward.cu"),
            Self::Rope => text!("rope.cu"),
            Self::Norm => text!("norm.cu"),
            Self::Loss => text!("loss.cu"),
            Self::AdamW => text!("adamw.cu"),
            Self::Rows => text!("rows.cu"),
            Self::Mlp => text!("mlp.cu"),
            Self::Embedding => text!("embedding.cu"),
            Self::Dora => text!("dora.cu"),
        }
    }

    /// The built-in code, if there is some that such a device and a driver of this major version of CUDA take.
    pub fn built_in(self, capability: Capability, driver: i32) -> Option<&'static [u8]> {
        let (_, bytes) = FATBINS.iter().find(|(name, _)| *name == self.name())?;
        (BUILT_FOR.contains(&capability.major) && driver >= FATBINS_CUDA).then_some(*bytes)
    }
}

/// Machine code, and where it came from for messages.
pub struct Image {
    /// A fatbin or a cubin.
    pub bytes: Cow<'static, [u8]>,
    /// For example `built in`.
    pub origin: String,
}

/// NVRTC and the cache of what it made.
pub struct Compiler {
    nvrtc: Nvrtc,
    cache: Option<PathBuf>,
}

/// The folder of the cache, if the environment has a place for it.
pub fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value: &OsString| !value.is_empty());
    let of = |name: &str, rest: &str| set(name).map(|folder| Path::new(&folder).join(rest));
    set("MEGACONTEXT_CUDA_CACHE")
        .map(PathBuf::from)
        .or_else(|| of("XDG_CACHE_HOME", "megacontext/cuda"))
        .or_else(|| of("HOME", ".cache/megacontext/cuda"))
}

impl Compiler {
    /// NVRTC of CUDA 12.0 up to the major version `newest`, for `target` as errors name it.
    ///
    /// # Errors
    /// [`CudaError::NoCompiler`].
    pub fn new(newest: i32, target: &str, cache: Option<PathBuf>) -> Result<Self, CudaError> {
        Ok(Self { nvrtc: Nvrtc::open(newest, target)?, cache })
    }

    /// NVRTC's version.
    pub fn version(&self) -> (i32, i32) {
        self.nvrtc.version()
    }

    /// A cubin of the file for exactly this architecture, from the cache where it has one.
    ///
    /// # Errors
    /// [`CudaError::Compile`].
    pub fn image(&self, module: Module, capability: Capability) -> Result<Image, CudaError> {
        let options = ["--std=c++17".into(), format!("--gpu-architecture={}", capability.target())];
        let file = self.cache.as_ref().map(|folder| folder.join(self.file(module, &options)));
        let (major, minor) = self.nvrtc.version();
        if let Some(bytes) = file.as_deref().and_then(read) {
            return Ok(Image {
                bytes: bytes.into(),
                origin: format!("NVRTC {major}.{minor}, from the cache"),
            });
        }
        let name = format!("{}.cu", module.name());
        let source = Source { name: &name, text: module.text(), headers: &HEADERS };
        let bytes = self.nvrtc.compile(source, &options, &capability.target())?;
        if let Some(file) = file {
            // What cannot be kept is compiled again the next time.
            let _ = write(&file, &bytes);
        }
        Ok(Image { bytes: bytes.into(), origin: format!("NVRTC {major}.{minor}") })
    }

    /// The name of the cache's file.
    fn file(&self, module: Module, options: &[String]) -> String {
        let (major, minor) = self.nvrtc.version();
        let mut hash = Sha256::new();
        let parts = [module.name(), module.text()].into_iter().map(str::to_owned);
        let headers = HEADERS.iter().flat_map(|(name, text)| [name.to_string(), text.to_string()]);
        let version = format!("NVRTC {major}.{minor}");
        for part in parts.chain(headers).chain(options.iter().cloned()).chain([version]) {
            // Lengths between, so that no two lists of parts are one text.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        let digest = hash.finalize();
        let key: String = digest[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{}-{key}.cubin", module.name())
    }
}

const DIGEST: usize = 32;

/// The code in a file of the cache: after its own SHA-256, so that a damaged file is none.
fn read(file: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(file).ok()?;
    let code = bytes.get(DIGEST..).filter(|code| !code.is_empty())?;
    let good = Sha256::digest(code)[..] == bytes[..DIGEST];
    good.then(|| bytes.split_off(DIGEST))
}

/// Beside the file first, then under its name: others see all of it or none.
fn write(file: &Path, code: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)?;
    }
    let beside = file.with_extension(format!("{}.tmp", std::process::id()));
    let mut out = fs::File::create(&beside)?;
    let written = out.write_all(&Sha256::digest(code)).and_then(|()| out.write_all(code));
    let kept = written.and_then(|()| out.sync_all()).and_then(|()| fs::rename(&beside, file));
    if kept.is_err() {
        let _ = fs::remove_file(&beside);
    }
    kept
}
