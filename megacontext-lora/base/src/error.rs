//! Errors of this crate.
//!
//! Each says what was refused, what was expected, what was found and, for files, where; so that a caller can show it
//! as it is. Nothing here is recoverable by trying again except `Io`.

use std::path::{Path, PathBuf};

use megacontext_kernels::error::KernelError;

/// What went wrong while reading, building or writing a model.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// A `config.json` that is missing, damaged, or describes a model that is not supported.
    #[error("model configuration {}: {message}", path.display())]
    Config {
        /// The file or folder.
        path: PathBuf,
        /// Key, expectation and finding.
        message: String,
    },
    /// Weights that are missing, damaged, or do not fit the configuration.
    #[error("weights {}{}: {message}", path.display(), in_tensor(tensor))]
    Weights {
        /// The file, or the folder when no one file is to blame.
        path: PathBuf,
        /// The tensor, where one is to blame.
        tensor: Option<String>,
        /// Expectation and finding.
        message: String,
    },
    /// A tokenizer that is missing, damaged, or fails on a text.
    #[error("tokenizer {}: {message}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Expectation and finding.
        message: String,
    },
    /// An adapter folder that is missing, damaged, not supported, or made for another base.
    #[error("adapter {}: {message}", path.display())]
    Adapter {
        /// The folder or the file in it.
        path: PathBuf,
        /// Expectation and finding.
        message: String,
    },
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// LoRA settings that cannot be built.
    #[error("lora: {message}")]
    Lora {
        /// Setting, expectation and value.
        message: String,
    },
    /// A parameter that does not exist, or a value that does not fit it.
    #[error("parameter {name}: {message}")]
    Parameter {
        /// The parameter.
        name: String,
        /// Expectation and finding.
        message: String,
    },
    /// The system has no more memory.
    #[error("expected {bytes} bytes of memory for a buffer, got none: {source}")]
    OutOfMemory {
        /// How much was asked for.
        bytes: u64,
        /// What the system said.
        source: std::io::Error,
    },
    /// A loss or gradient that is NaN or infinite.
    #[error("{what}: expected a finite number, got {value}")]
    NonFinite {
        /// Which quantity.
        what: String,
        /// Its value.
        value: f64,
    },
    /// A device that there is not, or that cannot do what was asked of it.
    #[error("device: {message}")]
    Device {
        /// Expectation and finding.
        message: String,
    },
    /// An argument of the decoder that does not fit.
    #[error("decoder: {message}")]
    Input {
        /// Argument, expectation and value.
        message: String,
    },
    /// A gist tree that cannot be built, extended or used so.
    #[error("gist tree: {message}")]
    Tree {
        /// Which thing, expectation and finding.
        message: String,
    },
    /// A working context that is none, or an edit of one that would make it so.
    #[error("working context: {message}")]
    WorkingContext {
        /// Which entry or limit, expectation and finding.
        message: String,
    },
    /// A `.ctx` file or a tree's folder that is missing, damaged, of another tree, or cannot be written so.
    #[error("gist tree {}: {message}", path.display())]
    TreeFile {
        /// The file or folder.
        path: PathBuf,
        /// Expectation and finding.
        message: String,
    },
    /// A setting or an input of a small network (GistNet, LensNet) that does not fit it.
    #[error("{network}: {message}")]
    Network {
        /// The network.
        network: &'static str,
        /// Setting or argument, expectation and value.
        message: String,
    },
    /// An operation refused its operands.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// candle failed underneath.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

#[cfg(feature = "cuda")]
impl From<megacontext_kernels::cuda::CudaError> for BaseError {
    fn from(error: megacontext_kernels::cuda::CudaError) -> Self {
        Self::Kernel(error.into())
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, BaseError>;

impl BaseError {
    pub(crate) fn config(path: &Path, message: impl Into<String>) -> Self {
        Self::Config { path: path.to_path_buf(), message: message.into() }
    }

    pub(crate) fn weights(path: &Path, message: impl Into<String>) -> Self {
        Self::Weights { path: path.to_path_buf(), tensor: None, message: message.into() }
    }

    pub(crate) fn tensor(path: &Path, tensor: &str, message: impl Into<String>) -> Self {
        Self::Weights { path: path.to_path_buf(), tensor: Some(tensor.to_string()), message: message.into() }
    }

    /// What a small network refuses.
    pub fn network(network: &'static str, message: impl Into<String>) -> Self {
        Self::Network { network, message: message.into() }
    }

    pub(crate) fn tokenizer(path: &Path, message: impl Into<String>) -> Self {
        Self::Tokenizer { path: path.to_path_buf(), message: message.into() }
    }

    pub(crate) fn adapter(path: &Path, message: impl Into<String>) -> Self {
        Self::Adapter { path: path.to_path_buf(), message: message.into() }
    }

    /// For `map_err` on file operations: `fs::read(p).map_err(BaseError::io(p))`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }
}

fn in_tensor(tensor: &Option<String>) -> String {
    tensor.as_ref().map_or_else(String::new, |name| format!(", tensor {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_place() {
        let error = BaseError::tensor(Path::new("/m/model.safetensors"), "model.norm.weight", "truncated");
        assert_eq!(error.to_string(), "weights /m/model.safetensors, tensor model.norm.weight: truncated");
        let error = BaseError::weights(Path::new("/m"), "no weights");
        assert_eq!(error.to_string(), "weights /m: no weights");
        let error = BaseError::io(Path::new("/m/x"))(std::io::Error::other("disk gone"));
        assert_eq!(error.to_string(), "/m/x: disk gone");
    }
}
