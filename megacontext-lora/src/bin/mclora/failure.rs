//! How a command fails: a kind, which decides the exit code, one message, and what to do next if that is known.

use megacontext_lora_abi::{AbiError, ErrorKind, LoadError};
use serde_json::{Value, json};
use std::fmt;
use std::path::Path;

/// Result of a command.
pub type Result<T> = std::result::Result<T, Failure>;

/// A failed command.
#[derive(Debug)]
pub struct Failure {
    kind: ErrorKind,
    message: String,
    hint: Option<String>,
}

impl Failure {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
    }

    /// A wrong flag or setting.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    /// A defect of this program.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// The file system refused.
    pub fn io(path: &Path, error: &std::io::Error) -> Self {
        Self::new(ErrorKind::Io, format!("{}: {error}", path.display()))
    }

    /// Says what to do next when the job was interrupted.
    #[must_use]
    pub fn resumable(mut self, command: impl FnOnce() -> String) -> Self {
        if self.kind == ErrorKind::Cancelled {
            self.hint = Some(format!("command: {}", command()));
        }
        self
    }

    pub fn exit_code(&self) -> u8 {
        match self.kind {
            ErrorKind::Usage => 2,
            ErrorKind::Cancelled => 130,
            _ => 1,
        }
    }

    pub fn to_json(&self) -> Value {
        json!({ "kind": self.kind.name(), "message": self.message, "hint": self.hint })
    }

    /// The failure that another run of this program told of with `--json`; none where `error` is no object.
    pub fn from_json(error: &Value) -> Option<Self> {
        let kind = ErrorKind::ALL.into_iter().find(|kind| error["kind"] == kind.name());
        let message = error["message"].as_str()?;
        Some(Self::new(kind.unwrap_or(ErrorKind::Internal), message))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n{hint}"),
            None => Ok(()),
        }
    }
}

impl From<AbiError> for Failure {
    fn from(error: AbiError) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

impl From<LoadError> for Failure {
    fn from(error: LoadError) -> Self {
        Self::new(ErrorKind::Io, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes() {
        assert_eq!(Failure::usage("x").exit_code(), 2);
        assert_eq!(Failure::new(ErrorKind::Cancelled, "x").exit_code(), 130);
        for kind in [ErrorKind::Data, ErrorKind::Model, ErrorKind::Io, ErrorKind::Memory, ErrorKind::Poisoned]
        {
            assert_eq!(Failure::new(kind, "x").exit_code(), 1);
        }
    }

    #[test]
    fn a_failure_survives_json() {
        let told = Failure::usage("n: expected 1, got 0").to_json();
        let failure = Failure::from_json(&told).unwrap();
        assert_eq!((failure.exit_code(), failure.to_string()), (2, "n: expected 1, got 0".into()));
        assert!(Failure::from_json(&Value::Null).is_none());
    }

    #[test]
    fn only_an_interrupted_job_says_how_to_go_on() {
        let hint = || "mclora extend --resume".to_owned();
        assert_eq!(Failure::usage("x").resumable(hint).to_string(), "x");
        let cancelled = Failure::new(ErrorKind::Cancelled, "stopped").resumable(hint);
        assert_eq!(cancelled.to_string(), "stopped\ncommand: mclora extend --resume");
    }
}
