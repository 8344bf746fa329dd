//! Errors as they cross the ABI: a kind that decides what a host does, a message, a context.
//!
//! The message says what failed, what was expected and what was found, with the path if there is one. The context says
//! during which larger job it happened, outermost first; it may be empty. Text owns its memory on the side that made
//! it and frees itself there.

use abi_stable::StableAbi;
use abi_stable::std_types::RString;
use std::fmt;

/// What sort of thing went wrong.
#[repr(u8)]
#[derive(StableAbi, Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A bad argument, flag or configuration key: the caller can mend it. `mclora` exits with 2.
    Usage,
    /// Text or token data that cannot be used.
    Data,
    /// A base model that cannot be used: its folder is at fault, or what it computes is not finite.
    Model,
    /// An adapter's folder that cannot be used, or one made for another base.
    Adapter,
    /// The file system refused.
    Io,
    /// The job does not fit into the memory that it may use.
    Memory,
    /// The host asked to stop, and the job stopped in good order.
    Cancelled,
    /// An earlier call panicked: the session answers nothing else from then on. Open another.
    Poisoned,
    /// A defect of the plugin.
    Internal,
}

impl ErrorKind {
    /// Every kind, in the order of the ABI.
    pub const ALL: [Self; 9] = [
        Self::Usage,
        Self::Data,
        Self::Model,
        Self::Adapter,
        Self::Io,
        Self::Memory,
        Self::Cancelled,
        Self::Poisoned,
        Self::Internal,
    ];

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

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An error that crossed, or is about to cross, the ABI. `Display` prints context and message on one line.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, PartialEq, Eq)]
pub struct AbiError {
    kind: ErrorKind,
    message: RString,
    context: RString,
}

impl AbiError {
    /// An error of this kind with an empty context.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into().into(), context: RString::new() }
    }

    /// What a plugin of an earlier build answers to a call that it does not have.
    pub(crate) fn not_there(call: &str) -> Self {
        Self::new(
            ErrorKind::Usage,
            format!("{call}: the plugin is of an earlier build, which does not have this call"),
        )
    }

    /// The same error with this context in place of its own.
    #[must_use]
    pub fn with_context(mut self, context: impl Into<String>) -> Self {
        self.context = context.into().into();
        self
    }

    /// What sort of thing went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What failed, what was expected, what was found, and where.
    pub fn message(&self) -> &str {
        self.message.as_str()
    }

    /// During which larger job, outermost first; may be empty.
    pub fn context(&self) -> &str {
        self.context.as_str()
    }
}

impl fmt::Display for AbiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.context.is_empty() {
            write!(f, "{}: ", self.context)?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for AbiError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_puts_the_context_first() {
        let error = AbiError::new(ErrorKind::Data, "a.txt: not UTF-8");
        assert_eq!(error.to_string(), "a.txt: not UTF-8");
        assert_eq!(error.with_context("extend").to_string(), "extend: a.txt: not UTF-8");
    }

    #[test]
    fn names_are_distinct_lower_case_words() {
        let mut names: Vec<_> = ErrorKind::ALL.iter().map(|k| k.name()).collect();
        assert!(names.iter().all(|n| n.chars().all(|c| c.is_ascii_lowercase())));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ErrorKind::ALL.len());
    }
}
