//! Finds, checks and opens a plugin.
//!
//! In this order, so that each failure has its own sentence: a regular file of a sane size; the SHA-256, if one was
//! given; complete ELF headers for this machine (Linux); the dynamic loader; the version line; the layout of every type
//! that crosses (abi_stable); the root module. A library is never unloaded: threads, thread locals and trait objects of
//! it may outlive every handle.
//!
//! The version line is an exported C symbol, [`VERSION_SYMBOL`], a NUL-terminated text such as
//! `megacontext-lora-abi 0.1.0 revision 2`. It is read before anything that depends on a layout.
//!
//! The digest protects against a wrong or damaged file. It does not protect against someone who can replace the file
//! between the check and the opening. Opening a library runs its code: load only what you trust.

mod elf;
mod error;

pub use error::LoadError;

use crate::error::AbiError;
use crate::host::{Host, host_box};
use crate::raw::PluginModuleRef;
use crate::session::Session;
use crate::{ABI_REVISION, VERSION_LINE, VERSION_SYMBOL};
use abi_stable::library::{AbiHeaderRef, LibraryError, ROOT_MODULE_LOADER_NAME_WITH_NUL};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// What to insist on when loading.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// The file's SHA-256, if it is known.
    pub sha256: Option<[u8; 32]>,
    /// Most bytes that the file may have.
    pub max_size: u64,
}

impl Default for LoadOptions {
    /// No digest, at most 1 GiB.
    fn default() -> Self {
        Self { sha256: None, max_size: 1 << 30 }
    }
}

impl LoadOptions {
    /// Insists on this SHA-256, 64 hexadecimal digits; `None` if it is not that.
    pub fn with_sha256_hex(mut self, hex: &str) -> Option<Self> {
        if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let mut digest = [0; 32];
        for (i, byte) in digest.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).ok()?;
        }
        self.sha256 = Some(digest);
        Some(self)
    }
}

/// How a plugin was built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildInfo {
    /// Version of the plugin's crate.
    pub crate_version: String,
    /// `rustc --version` of the compiler.
    pub rustc: String,
    /// Target triple.
    pub target: String,
    /// Cargo profile.
    pub profile: String,
    /// CPU features that the plugin uses or was compiled for.
    pub cpu_features: Vec<String>,
}

/// A loaded plugin. Cheap to copy; the library stays loaded until the process ends.
#[derive(Clone)]
pub struct Plugin {
    module: PluginModuleRef,
    path: PathBuf,
    version_line: String,
}

impl Plugin {
    /// Loads the plugin at `path`.
    pub fn load(path: impl AsRef<Path>, options: &LoadOptions) -> Result<Self, LoadError> {
        let path = path.as_ref();
        check_file(path, options)?;
        let library = open(path)?;
        let version_line = read_version_line(library, path)?;
        check_version_line(&version_line, path)?;
        let module = root_module(library, path)?;
        Ok(Self { module, path: path.to_owned(), version_line })
    }

    /// Opens a session. `config` is validated by the plugin; `{}` opens one without a model, for jobs that name theirs.
    pub fn open_session(&self, config: &serde_json::Value, host: impl Host) -> Result<Session, AbiError> {
        let open = self.module.open_session();
        open(config.to_string().as_str().into(), host_box(host)).into_result().map(Session::new)
    }

    /// Where it was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it said of itself before anything else was asked.
    pub fn version_line(&self) -> &str {
        &self.version_line
    }

    /// The revision of the ABI it was built with.
    pub fn abi_revision(&self) -> u32 {
        self.module.abi_revision()
    }

    /// How it was built.
    pub fn build_info(&self) -> BuildInfo {
        let raw = self.module.build_info()();
        BuildInfo {
            crate_version: raw.crate_version.into(),
            rustc: raw.rustc.into(),
            target: raw.target.into(),
            profile: raw.profile.into(),
            cpu_features: raw.cpu_features.into_iter().map(String::from).collect(),
        }
    }

    /// What it can do, by name: jobs as `job:extend`, and features.
    pub fn capabilities(&self) -> Vec<String> {
        self.module.capabilities()().into_iter().map(String::from).collect()
    }
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugin").field("path", &self.path).field("version", &self.version_line).finish()
    }
}

/// The plugin's file name on this system: `libmegacontext_lora.so`, `.dylib`, or `megacontext_lora.dll`.
pub fn library_file_name() -> String {
    libloading::library_filename("megacontext_lora").to_string_lossy().into_owned()
}

/// The plugin in `folder` or in its `deps/`, where cargo leaves the library of a package that it builds for another
/// target. If both exist the newer one: the other is of an earlier build.
pub fn find_in(folder: &Path) -> Option<PathBuf> {
    let name = library_file_name();
    let modified = |path: &PathBuf| std::fs::metadata(path).and_then(|m| m.modified()).ok();
    // `max_by_key` takes the last of equals, so the folder itself comes last.
    [folder.join("deps").join(&name), folder.join(&name)]
        .into_iter()
        .filter(|path| path.is_file())
        .max_by_key(modified)
}

/// [`find_in`] for the folder of the running executable, and for the folder above if that one is `deps` (cargo's tests).
pub fn find_beside_executable() -> Option<PathBuf> {
    let executable = std::env::current_exe().ok()?;
    let folder = executable.parent()?;
    let folder = if folder.ends_with("deps") { folder.parent()? } else { folder };
    find_in(folder)
}

fn check_file(path: &Path, options: &LoadOptions) -> Result<(), LoadError> {
    let owned = || path.to_owned();
    let unreadable = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
            LoadError::Missing { path: owned() }
        }
        _ => LoadError::Unreadable { path: owned(), reason: e.to_string() },
    };
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        let kind = if metadata.is_dir() { "a folder" } else { "something that is not a regular file" };
        return Err(LoadError::NotAFile { path: owned(), kind });
    }
    let size = metadata.len();
    if size > options.max_size {
        return Err(LoadError::TooLarge { path: owned(), size, limit: options.max_size });
    }
    let mut file = File::open(path).map_err(unreadable)?;
    if let Some(expected) = options.sha256 {
        let got = digest(&mut file).map_err(unreadable)?;
        if got != expected {
            return Err(LoadError::Digest { path: owned(), expected: hex(&expected), got: hex(&got) });
        }
    }
    check_format(&mut file, size, path)
}

#[cfg(target_os = "linux")]
fn check_format(file: &mut File, size: u64, path: &Path) -> Result<(), LoadError> {
    let path = path.to_owned();
    elf::check(file, size).map_err(|fault| match fault {
        elf::ElfFault::Foreign(reason) => LoadError::NotALibrary { path, reason },
        elf::ElfFault::Truncated { needed } => LoadError::Truncated { path, size, needed },
        elf::ElfFault::Machine(machine) => LoadError::Machine { path, machine },
        elf::ElfFault::Io(reason) => LoadError::Unreadable { path, reason },
    })
}

/// Elsewhere the loader of the system checks the format itself.
#[cfg(not(target_os = "linux"))]
fn check_format(_file: &mut File, size: u64, path: &Path) -> Result<(), LoadError> {
    if size == 0 {
        return Err(LoadError::NotALibrary { path: path.to_owned(), reason: "the file is empty".into() });
    }
    Ok(())
}

fn digest(file: &mut File) -> std::io::Result<[u8; 32]> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().into()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Opens the library and forgets the handle, so that it stays.
fn open(path: &Path) -> Result<&'static libloading::Library, LoadError> {
    // A bare file name would be searched for along the system's library path instead of being opened.
    let absolute = std::path::absolute(path)
        .map_err(|e| LoadError::Unreadable { path: path.to_owned(), reason: e.to_string() })?;
    #[cfg(unix)]
    let opened = {
        use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
        // SAFETY: runs the initialisers of a library that the host chose to trust; see the module's documentation. All
        // symbols are bound at once, so that a missing one is an error here and no crash later.
        unsafe { Library::open(Some(&absolute), RTLD_NOW | RTLD_LOCAL) }.map(libloading::Library::from)
    };
    #[cfg(not(unix))]
    // SAFETY: as above.
    let opened = unsafe { libloading::Library::new(&absolute) };
    let library = opened.map_err(|e| LoadError::Open { path: path.to_owned(), reason: loader_reason(&e) })?;
    Ok(Box::leak(Box::new(library)))
}

/// The dynamic loader's own words, in one line.
fn loader_reason(error: &libloading::Error) -> String {
    let text = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Longest version line that is read.
const MAX_LINE: usize = 128;

fn read_version_line(library: &'static libloading::Library, path: &Path) -> Result<String, LoadError> {
    let foreign = || LoadError::NotAPlugin { path: path.to_owned(), symbol: VERSION_SYMBOL };
    // SAFETY: the symbol's value is taken as an address and read as bytes below; no type of the plugin is assumed.
    let symbol = unsafe { library.get::<*const u8>(VERSION_SYMBOL.as_bytes()) }.map_err(|_| foreign())?;
    let start: *const u8 = *symbol;
    if start.is_null() {
        return Err(foreign());
    }
    let mut line = Vec::new();
    for i in 0..MAX_LINE {
        // SAFETY: the symbol is ours by its name, and a text of it ends with NUL; reading stops there.
        match unsafe { start.add(i).read() } {
            0 => return String::from_utf8(line).map_err(|_| foreign()),
            byte => line.push(byte),
        }
    }
    Err(foreign())
}

/// The line must be of the same crate and revision, and of a version that Cargo would call compatible.
fn check_version_line(line: &str, path: &Path) -> Result<(), LoadError> {
    if parse_line(line).is_some_and(|(version, revision)| {
        revision == ABI_REVISION
            && parse_line(VERSION_LINE).is_some_and(|(ours, _)| compatible(&ours, &version))
    }) {
        return Ok(());
    }
    Err(LoadError::Version { path: path.to_owned(), expected: VERSION_LINE.to_owned(), got: line.to_owned() })
}

/// (version, revision) of `megacontext-lora-abi 0.1.0 revision 2`.
fn parse_line(line: &str) -> Option<([u32; 3], u32)> {
    let words: Vec<_> = line.split(' ').collect();
    let ["megacontext-lora-abi", version, "revision", revision] = words[..] else { return None };
    let version: Vec<u32> = version.split('.').map(|n| n.parse().ok()).collect::<Option<_>>()?;
    Some((version.try_into().ok()?, revision.parse().ok()?))
}

fn compatible(ours: &[u32; 3], theirs: &[u32; 3]) -> bool {
    if ours[0] == 0 { ours[..2] == theirs[..2] } else { ours[0] == theirs[0] }
}

fn root_module(library: &'static libloading::Library, path: &Path) -> Result<PluginModuleRef, LoadError> {
    let path = path.to_owned();
    let name = ROOT_MODULE_LOADER_NAME_WITH_NUL;
    // SAFETY: abi_stable's export macro declares this symbol as a static `LibHeader`, which begins with an `AbiHeader`;
    // the value of the symbol is the static's address, which is what `AbiHeaderRef` is. The library is never unloaded.
    let header: AbiHeaderRef = match unsafe { library.get::<AbiHeaderRef>(name.as_bytes()) } {
        Ok(symbol) => *symbol,
        Err(_) => return Err(LoadError::NotAPlugin { path, symbol: name.trim_end_matches('\0') }),
    };
    let sort = |error: LibraryError| match error {
        LibraryError::RootModule { .. } => {
            LoadError::Start { path: path.clone(), details: error.to_string() }
        }
        // Header, C ABI, version strings, layout: whatever is left is a difference between the two builds.
        _ => LoadError::Layout { path: path.clone(), details: error.to_string() },
    };
    let header = header.upgrade().map_err(sort)?;
    header.ensure_layout::<PluginModuleRef>().map_err(sort)?;
    header.init_root_module::<PluginModuleRef>().map_err(sort)
}

#[cfg(test)]
mod tests;
