//! What the driver, the device or the compiler refused.

use cudarc::driver::DriverError;

use super::device::Capability;

/// Why there is no device, or what it refused.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// The driver's library is not on this machine.
    #[error("CUDA: no driver: libcuda.so.1 not found ({reason})")]
    NoDriver {
        /// What the dynamic loader says.
        reason: String,
    },
    /// The driver is older than the functions that are called.
    #[error(
        "CUDA: the driver is too old: expected one for CUDA 12.0 or newer, got one for CUDA {major}.{minor}"
    )]
    OldDriver {
        /// CUDA's version.
        major: i32,
        /// CUDA's version.
        minor: i32,
    },
    /// The driver sees no device.
    #[error("CUDA: the driver is there, but no device")]
    NoDevice,
    /// There are devices, but not this one.
    #[error("CUDA: expected a device number below {count}, got {ordinal}")]
    NoSuchDevice {
        /// What was asked for.
        ordinal: usize,
        /// Devices that there are.
        count: usize,
    },
    /// The kernels need what this device does not have.
    #[error("CUDA: device {ordinal} ({name}): expected compute capability 8.0 or newer, got {capability}")]
    OldDevice {
        /// Its number.
        ordinal: usize,
        /// Its name.
        name: String,
        /// What it has.
        capability: Capability,
    },
    /// Memory for no values.
    #[error("CUDA: expected memory for at least one value, got none")]
    Empty,
    /// Memory that is not this device's.
    #[error("expected memory of cuda:{ordinal}, got {got}")]
    Foreign {
        /// The device's number.
        ordinal: usize,
        /// Whose memory it is.
        got: String,
    },
    /// A stream that is none of this device's.
    #[error("expected a stream of cuda:{ordinal}, got {stream:#x}: {}", said(.error))]
    Stream {
        /// The device's number.
        ordinal: usize,
        /// The stream's number.
        stream: usize,
        /// What the driver says.
        error: DriverError,
    },
    /// A call of the driver failed.
    #[error("CUDA: {call}: {}", said(.error))]
    Call {
        /// What was called.
        call: String,
        /// What came back.
        error: DriverError,
    },
    /// No fatbins were built in, and no compiler is there.
    #[error(
        "CUDA: no machine code for {target} that the driver takes is built in, and NVRTC, which would compile it, is not \
         there: expected libnvrtc of CUDA 12.0 to {newest} (tried: {tried})"
    )]
    NoCompiler {
        /// The device's architecture.
        target: String,
        /// The newest version whose code the driver takes.
        newest: i32,
        /// Libraries, and what was wrong with them.
        tried: String,
    },
    /// There is no library of matrix products.
    #[error("CUDA: no cuBLASLt: expected libcublasLt of CUDA 12.0 to {newest} (tried: {tried})")]
    NoBlas {
        /// The newest version that the driver runs.
        newest: i32,
        /// Libraries, and what was wrong with them.
        tried: String,
    },
    /// cuBLASLt refused a call.
    #[error("CUDA: {call}: {reason}")]
    Blas {
        /// What was called.
        call: &'static str,
        /// What came back, and for which product.
        reason: String,
    },
    /// NVRTC refused a source.
    #[error("CUDA: NVRTC {version}: {file} for {target}: {reason}\n{log}")]
    Compile {
        /// NVRTC's version.
        version: String,
        /// The source.
        file: String,
        /// The architecture.
        target: String,
        /// NVRTC's name for what happened.
        reason: String,
        /// What it printed.
        log: String,
    },
    /// The driver does not take the machine code.
    #[error("CUDA: {module} for {target}, {origin}: {}", said(.error))]
    Image {
        /// The kernels' file.
        module: &'static str,
        /// The device's architecture.
        target: String,
        /// Where the code came from.
        origin: String,
        /// What the driver says.
        error: DriverError,
    },
}

impl CudaError {
    /// For `map_err`.
    pub(super) fn call(call: impl Into<String>) -> impl FnOnce(DriverError) -> Self {
        move |error| Self::Call { call: call.into(), error }
    }
}

/// The driver's name and text for an error.
fn said(error: &DriverError) -> String {
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
    format!("{:?} ({})", error.0, text.unwrap_or_else(|_| "no text".into()))
}

/// What the dynamic loader says: libloading's own text is without it.
pub(super) fn loader_said(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |source| source.to_string())
}
