//! Why a plugin was not loaded: one sentence each, the cause and where.

use std::path::PathBuf;

/// Why a plugin was not loaded. `Display` is one sentence; [`LoadError::details`] has what a developer may want besides.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The fields are what their names say; the sentences say the rest.
pub enum LoadError {
    /// No such file.
    #[error("{}: no such file", path.display())]
    Missing { path: PathBuf },
    /// A folder, a socket, …
    #[error("{}: expected a file, got {kind}", path.display())]
    NotAFile { path: PathBuf, kind: &'static str },
    /// The file cannot be read.
    #[error("{}: cannot be read: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: String },
    /// Larger than allowed.
    #[error("{}: {size} bytes, more than the {limit} that are allowed for a plugin", path.display())]
    TooLarge { path: PathBuf, size: u64, limit: u64 },
    /// Not the file that was meant.
    #[error("{}: SHA-256 is {got}, expected {expected}", path.display())]
    Digest { path: PathBuf, expected: String, got: String },
    /// Not a shared library.
    #[error("{}: not a shared library: {reason}", path.display())]
    NotALibrary { path: PathBuf, reason: String },
    /// Cut off.
    #[error("{}: truncated: it has {size} bytes, its headers need {needed}", path.display())]
    Truncated { path: PathBuf, size: u64, needed: u64 },
    /// For another CPU.
    #[error("{}: built for another machine (ELF machine {machine}, this is {})", path.display(), std::env::consts::ARCH)]
    Machine { path: PathBuf, machine: u16 },
    /// The dynamic loader refused it.
    #[error("{}: the dynamic loader refused it: {reason}", path.display())]
    Open { path: PathBuf, reason: String },
    /// A library, but not one of ours.
    #[error("{}: a shared library, but not a MegaContext plugin (it does not export {symbol})", path.display())]
    NotAPlugin { path: PathBuf, symbol: &'static str },
    /// Of another revision or version.
    #[error("{}: a plugin of another version: it says \"{got}\", this host speaks \"{expected}\"", path.display())]
    Version { path: PathBuf, expected: String, got: String },
    /// Same version, other types.
    #[error(
        "{}: the version agrees but the types are laid out differently; \
         build the plugin and the host from the same sources", path.display()
    )]
    Layout { path: PathBuf, details: String },
    /// The plugin's own start failed.
    #[error("{}: the plugin failed while starting", path.display())]
    Start { path: PathBuf, details: String },
}

impl LoadError {
    /// What a developer may want besides the sentence: the layout checker's findings, many lines. Empty for most.
    pub fn details(&self) -> &str {
        match self {
            Self::Layout { details, .. } | Self::Start { details, .. } => details,
            _ => "",
        }
    }
}
