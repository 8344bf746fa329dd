//! The one error type inside the plugin.
//!
//! An error is a [`Kind`] (what sort of thing went wrong, which decides a host's exit code), a message (what
//! failed, what was expected, what was found) and a context (the larger job during which it happened,
//! outermost first, may be empty). The ABI glue turns it into the ABI's own error one to one; nothing else in
//! the plugin knows the ABI types.
//!
//! An I/O failure always names its path: there is deliberately no `From<std::io::Error>`, use
//! [`PluginError::io`]. A full disk or an unwritable folder is [`Kind::Io`], a file whose *content* is wrong
//! is [`Kind::Data`] (or `Model`, `Adapter`).

use std::fmt;
use std::path::Path;

/// What sort of thing went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A bad argument, flag or configuration key: the caller can mend it (hosts exit with 2).
    Usage,
    /// Training or evaluation text that cannot be used.
    Data,
    /// A base model that cannot be used: its folder is at fault, or what it computes is not finite.
    Model,
    /// An adapter's folder that cannot be used, or one made for another base.
    Adapter,
    /// The file system refused.
    Io,
    /// The job does not fit into the memory that it may use.
    Memory,
    /// The host asked to stop.
    Cancelled,
    /// An earlier panic left the session unusable.
    Poisoned,
    /// A defect of the plugin.
    Internal,
}

impl Kind {
    /// The kind as one lower-case word, as it stands in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Usage => "usage",
            Self::Data => "data",
            Self::Model => "model",
            Self::Adapter => "adapter",
            Self::Io => "io",
            Self::Memory => "memory",
            Self::Cancelled => "cancelled",
            Self::Poisoned => "poisoned",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An error of the plugin; see the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginError {
    /// What sort of thing went wrong.
    pub kind: Kind,
    /// What failed, what was expected, what was found, and where.
    pub message: String,
    /// During which larger job, outermost first; empty when nobody added one.
    pub context: String,
}

/// Result of the plugin's own functions.
pub type Result<T> = std::result::Result<T, PluginError>;

impl PluginError {
    /// An error of this kind.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), context: String::new() }
    }

    /// [`Kind::Usage`].
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// [`Kind::Data`].
    pub fn data(message: impl Into<String>) -> Self {
        Self::new(Kind::Data, message)
    }

    /// [`Kind::Model`].
    pub fn model(message: impl Into<String>) -> Self {
        Self::new(Kind::Model, message)
    }

    /// [`Kind::Adapter`].
    pub fn adapter(message: impl Into<String>) -> Self {
        Self::new(Kind::Adapter, message)
    }

    /// [`Kind::Memory`].
    pub fn memory(message: impl Into<String>) -> Self {
        Self::new(Kind::Memory, message)
    }

    /// [`Kind::Cancelled`].
    pub fn cancelled(message: impl Into<String>) -> Self {
        Self::new(Kind::Cancelled, message)
    }

    /// [`Kind::Poisoned`].
    pub fn poisoned(message: impl Into<String>) -> Self {
        Self::new(Kind::Poisoned, message)
    }

    /// [`Kind::Internal`].
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }

    /// [`Kind::Io`]: the file system's refusal, with the path it refused.
    pub fn io(path: impl AsRef<Path>, error: std::io::Error) -> Self {
        Self::new(Kind::Io, format!("{}: {error}", path.as_ref().display()))
    }

    /// The same error seen from one job further out: `context` goes in front of what stands there.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.context = if self.context.is_empty() {
            context.to_string()
        } else {
            format!("{context}: {}", self.context)
        };
        self
    }
}

impl fmt::Display for PluginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.context.is_empty() {
            write!(f, "{}: ", self.context)?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for PluginError {}

/// Adds what the plugin needs to know to a foreign result.
pub trait ResultExt<T> {
    /// Names the job during which it failed ([`PluginError::context`]).
    fn context(self, context: impl fmt::Display) -> Result<T>;
}

impl<T, E: Into<PluginError>> ResultExt<T> for std::result::Result<T, E> {
    fn context(self, context: impl fmt::Display) -> Result<T> {
        self.map_err(|error| error.into().context(context))
    }
}

/// Names the path of a file-system failure: `std::fs::read(path).at(path)?`.
pub trait IoResultExt<T> {
    /// The failure as [`Kind::Io`] with this path.
    fn at(self, path: impl AsRef<Path>) -> Result<T>;
}

impl<T> IoResultExt<T> for std::io::Result<T> {
    fn at(self, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|error| PluginError::io(path, error))
    }
}

/// Shapes and arguments are checked before a kernel runs, so what still arrives here is a defect:
/// [`Kind::Internal`].
impl From<megacontext_kernels::error::KernelError> for PluginError {
    fn from(error: megacontext_kernels::error::KernelError) -> Self {
        Self::internal(error.to_string())
    }
}

/// [`Kind::Internal`]; code that reads a model turns its own failures into [`Kind::Model`] first.
impl From<candle_core::Error> for PluginError {
    fn from(error: candle_core::Error) -> Self {
        Self::internal(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_goes_outermost_first() {
        let error =
            PluginError::data("x.jsonl: line 3 is not JSON").context("reading the data").context("extend");
        assert_eq!(error.to_string(), "extend: reading the data: x.jsonl: line 3 is not JSON");
        assert_eq!(error.kind.name(), "data");
    }

    #[test]
    fn io_names_its_path() {
        let error = std::fs::read("/no/such/file").at("/no/such/file").unwrap_err();
        assert_eq!(error.kind, Kind::Io);
        assert!(error.message.starts_with("/no/such/file: "), "{error}");
    }

    #[test]
    fn candle_and_kernel_errors_are_internal() {
        let candle: std::result::Result<(), _> = Err(candle_core::Error::Msg("no".into()));
        let error = ResultExt::context(candle, "forward").unwrap_err();
        assert_eq!((error.kind, error.context.as_str()), (Kind::Internal, "forward"));
        let kernel =
            megacontext_kernels::error::KernelError::Argument { op: "rope", message: "theta".into() };
        assert_eq!(PluginError::from(kernel).kind, Kind::Internal);
    }
}
