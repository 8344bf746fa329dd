//! Errors of the operations in this crate.
//!
//! Every error names the operation, what it expected and what it was given, so that a caller can show it as it is.

/// What an operation refused, and why.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Operand shapes (or dtypes, or devices) do not agree.
    #[error("{op}: expected {expected}, got {got}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// What it needs, for example `k_btgd [2, 16, 1, 64]`.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// An argument that is not a tensor is out of its range.
    #[error("{op}: {message}")]
    Argument {
        /// The operation.
        op: &'static str,
        /// Range and value.
        message: String,
    },
    /// The GPU's driver or compiler refused something underneath.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(Box<crate::cuda::CudaError>),
    /// candle refused something underneath.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl KernelError {
    pub(crate) fn shape(op: &'static str, expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self::Shape { op, expected: expected.into(), got: got.into() }
    }

    pub(crate) fn argument(op: &'static str, message: impl Into<String>) -> Self {
        Self::Argument { op, message: message.into() }
    }
}

#[cfg(feature = "cuda")]
impl From<crate::cuda::CudaError> for KernelError {
    fn from(error: crate::cuda::CudaError) -> Self {
        Self::Cuda(Box::new(error))
    }
}

impl From<KernelError> for candle_core::Error {
    fn from(error: KernelError) -> Self {
        match error {
            KernelError::Candle(inner) => inner,
            other => candle_core::Error::wrap(other),
        }
    }
}

/// Result of an operation of this crate.
pub type Result<T> = std::result::Result<T, KernelError>;
