//! What a model's passes run on: the processor, or a GPU.
//!
//! Names are PyTorch's: `cpu`, `cuda` (the first GPU), `cuda:N`; `auto` takes the first GPU where there is one that can be used, and
//! the processor otherwise, and says why. Nothing else falls back: a device that was named and cannot be had is an error.
//! GPUs take the feature `cuda` of this crate; without it nothing of CUDA is in the program.
//!
//! Parameters as they are stored, and files, are the host's whatever the device, so checkpoints and adapters of one device are those
//! of every other.

use std::fmt;
use std::str::FromStr;
#[cfg(feature = "cuda")]
use std::sync::{Arc, OnceLock};

use megacontext_kernels::gemm::{Products, measured_flops};
use serde::{Deserialize, Serialize};

use crate::config::DecoderConfig;
use crate::error::{BaseError, Result};

/// What was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The first GPU that can be used, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = BaseError;

    fn from_str(name: &str) -> Result<Self> {
        let number = |digits: &str| {
            let plain = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
            digits.parse().ok().filter(|_| plain)
        };
        let choice = match name {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            other => other.strip_prefix("cuda:").and_then(number).map(Self::Cuda),
        };
        choice.ok_or_else(|| BaseError::Device {
            message: format!("expected auto, cpu, cuda or cuda:N, got {name:?}"),
        })
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = BaseError;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        choice.to_string()
    }
}

/// What passes run on. Clones are the same device.
#[derive(Clone, Default)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// A GPU.
    #[cfg(feature = "cuda")]
    Cuda(Arc<Gpu>),
}

/// A GPU with the kernels loaded and cuBLASLt opened.
#[cfg(feature = "cuda")]
pub struct Gpu {
    pub(crate) device: megacontext_kernels::cuda::Device,
    pub(crate) products: megacontext_kernels::cuda::linear::Products,
}

#[cfg(feature = "cuda")]
impl Gpu {
    /// Of square products, made larger until one takes long enough to be told from its launch.
    fn measured_flops<T: megacontext_kernels::cuda::Stored>(&self) -> Result<f64> {
        use megacontext_kernels::cuda::linear::Layer;
        const SIZES: [usize; 5] = [128, 512, 2048, 4096, 8192];
        const LONG_ENOUGH: f64 = 2e-3;

        let device = &self.device;
        let mut speed = 0.0;
        for n in SIZES {
            let a = device.upload(&vec![T::put(0.5); n * n])?;
            let mut out = device.zeros::<T>(n * n)?;
            let weight = a.slice(..);
            let layer = Layer { weight: &weight, shape: [n, n], lora: None };
            let mut seconds = f64::INFINITY;
            for _ in 0..3 {
                device.synchronize()?;
                let start = std::time::Instant::now();
                layer.forward(device, &self.products, &a.slice(..), None, &mut out.slice_mut(..), false)?;
                device.synchronize()?;
                seconds = seconds.min(start.elapsed().as_secs_f64());
            }
            speed = 2.0 * (n * n * n) as f64 / seconds.max(1e-9);
            if seconds >= LONG_ENOUGH {
                break;
            }
        }
        Ok(speed)
    }
}

/// A device, and what there is to say about how it was chosen.
pub struct Opened {
    /// The device.
    pub device: Device,
    /// Why `auto` came to the processor.
    pub note: Option<String>,
}

impl DeviceChoice {
    /// Opens the device. A GPU's kernels are loaded, or compiled the first time ([`megacontext_kernels`]' `cuda`), which takes a
    /// minute or two.
    ///
    /// # Errors
    /// When a GPU was named that this program or this machine does not have.
    pub fn open(self) -> Result<Opened> {
        match self {
            Self::Cpu => Ok(Opened { device: Device::Cpu, note: None }),
            Self::Cuda(number) => Ok(Opened { device: gpu(number)?, note: None }),
            Self::Auto if !cfg!(feature = "cuda") => Ok(Opened { device: Device::Cpu, note: None }),
            Self::Auto => Ok(match gpu(0) {
                Ok(device) => Opened { device, note: None },
                Err(error) => Opened { device: Device::Cpu, note: Some(error.to_string()) },
            }),
        }
    }
}

#[cfg(feature = "cuda")]
fn gpu(number: usize) -> Result<Device> {
    use megacontext_kernels::cuda::Device as Opened;

    let refused = |error: &dyn fmt::Display| BaseError::Device { message: error.to_string() };
    let opened = Opened::open(number).map_err(|error| refused(&error))?;
    Device::with_kernels(opened).map_err(|error| refused(&error))
}

#[cfg(not(feature = "cuda"))]
fn gpu(number: usize) -> Result<Device> {
    Err(BaseError::Device {
        message: format!(
            "expected a program built with the feature cuda for cuda:{number}, got one without it"
        ),
    })
}

/// A GPU of this machine, whether or not it can be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FoundGpu {
    /// As [`DeviceChoice`] names it: `cuda:0`.
    pub device: String,
    /// What it is: `NVIDIA H200`.
    pub name: String,
    /// `9.0`.
    pub compute_capability: String,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Why the kernels do not run on it; none where they do.
    pub unusable: Option<String>,
}

/// The GPUs of this machine, looked for when this is first asked, and kept.
///
/// # Errors
/// Why there is none, in a sentence.
#[cfg(feature = "cuda")]
pub fn gpus() -> std::result::Result<&'static [FoundGpu], &'static str> {
    use megacontext_kernels::cuda::{Capability, probe};

    static FOUND: OnceLock<std::result::Result<Vec<FoundGpu>, String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let found = probe().map_err(|error| error.to_string())?;
        let gpu = |info: megacontext_kernels::cuda::DeviceInfo| FoundGpu {
            device: DeviceChoice::Cuda(info.ordinal).to_string(),
            name: info.name,
            compute_capability: info.capability.to_string(),
            memory_bytes: info.memory_total as u64,
            unusable: (info.capability < Capability::LEAST).then(|| {
                format!("expected compute capability {} or newer, got {}", Capability::LEAST, info.capability)
            }),
        };
        Ok(found.into_iter().map(gpu).collect())
    });
    found.as_deref().map_err(String::as_str)
}

/// See the other form: this program has no CUDA.
///
/// # Errors
/// Always.
#[cfg(not(feature = "cuda"))]
pub fn gpus() -> std::result::Result<&'static [FoundGpu], &'static str> {
    Err("built without the feature cuda")
}

impl Device {
    /// A GPU whose kernels have been loaded.
    ///
    /// # Errors
    /// When there is no cuBLASLt that it can use.
    #[cfg(feature = "cuda")]
    pub fn with_kernels(device: megacontext_kernels::cuda::Device) -> Result<Self> {
        let products = megacontext_kernels::cuda::linear::Products::open(&device)?;
        Ok(Self::Cuda(Arc::new(Gpu { device, products })))
    }

    /// The kernels' device of a GPU; none for the processor.
    #[cfg(feature = "cuda")]
    pub fn kernels(&self) -> Option<&megacontext_kernels::cuda::Device> {
        match self {
            Self::Cpu => None,
            Self::Cuda(gpu) => Some(&gpu.device),
        }
    }

    /// As [`DeviceChoice`] names it: `cpu`, `cuda:0`.
    pub fn name(&self) -> String {
        match self {
            Self::Cpu => "cpu".to_string(),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => format!("cuda:{}", gpu.device.ordinal()),
        }
    }

    /// The name and what it is: `cuda:0 (NVIDIA H200, compute capability 9.0)`.
    pub fn describe(&self) -> String {
        match self {
            Self::Cpu => self.name(),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => {
                let (name, capability) = (gpu.device.name(), gpu.device.capability());
                format!("{} ({name}, compute capability {capability})", self.name())
            }
        }
    }

    /// Refuses a model that the device's kernels cannot run.
    ///
    /// # Errors
    /// With what they can.
    pub fn check(&self, config: &DecoderConfig) -> Result<()> {
        let width = config.head_dim;
        if self.is_cpu() || (width.is_multiple_of(8) && width <= 256) {
            return Ok(());
        }
        Err(BaseError::Device {
            message: format!(
                "{}: expected heads whose width is a multiple of 8 up to 256, got {width}; the processor takes it",
                self.name()
            ),
        })
    }

    /// A GPU's number and the bytes that can be had on it now; none for the processor.
    ///
    /// # Errors
    /// When the driver does not say.
    pub fn memory(&self) -> Result<Option<(usize, u64)>> {
        match self {
            Self::Cpu => Ok(None),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => {
                let number = gpu.device.ordinal();
                let free = gpu.device.free_bytes()?;
                Ok(Some((number, free)))
            }
        }
    }

    /// The most bytes of a GPU's memory that were in use at one time since [`Device::forget_peak`]; none for the processor.
    ///
    /// # Errors
    /// What the driver says.
    pub fn peak_bytes(&self) -> Result<Option<u64>> {
        match self {
            Self::Cpu => Ok(None),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => Ok(gpu.device.most_bytes()?),
        }
    }

    /// Counts a GPU's memory from what is in use now.
    ///
    /// # Errors
    /// What the driver says.
    pub fn forget_peak(&self) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => Ok(gpu.device.forget_most_bytes()?),
        }
    }

    /// Waits for everything that was queued on a GPU.
    ///
    /// # Errors
    /// What the driver says.
    pub fn wait(&self) -> Result<()> {
        match self {
            Self::Cpu => Ok(()),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => Ok(gpu.device.synchronize()?),
        }
    }

    /// Floating-point operations per second of matrix products on this device now, for planning.
    ///
    /// # Errors
    /// When a GPU refuses a product.
    pub fn measured_flops(&self, products: Products) -> Result<f64> {
        match self {
            Self::Cpu => Ok(measured_flops(products)),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => match products {
                Products::F32 => gpu.measured_flops::<f32>(),
                Products::Bf16 => gpu.measured_flops::<megacontext_kernels::store::bf16>(),
            },
        }
    }

    /// Is it the processor?
    pub fn is_cpu(&self) -> bool {
        matches!(self, Self::Cpu)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.describe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ["auto", "cpu", "cuda:0", "cuda:11"] {
            let choice: DeviceChoice = name.parse().expect("a device");
            assert_eq!(choice.to_string(), name);
        }
        assert_eq!("cuda".parse::<DeviceChoice>().expect("a device"), DeviceChoice::Cuda(0));
        for name in ["", "gpu", "cuda:", "cuda:+1", "cuda:-1", "cuda:x", "CPU", "cuda:99999999999999999999"] {
            let error = name.parse::<DeviceChoice>().expect_err("no device").to_string();
            assert_eq!(error, format!("device: expected auto, cpu, cuda or cuda:N, got {name:?}"));
        }
    }

    #[test]
    fn the_processor_is_always_there() {
        let opened = DeviceChoice::Cpu.open().expect("the processor");
        assert!(opened.device.is_cpu() && opened.note.is_none());
    }

    #[test]
    fn looking_for_gpus_gives_the_same_each_time() {
        assert_eq!(gpus(), gpus());
        match gpus() {
            Ok(found) => assert!(found.iter().all(|gpu| gpu.device.starts_with("cuda:"))),
            Err(why) => assert!(!why.is_empty()),
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_the_feature_a_gpu_is_refused_and_auto_is_the_processor() {
        let error = DeviceChoice::Cuda(1).open().err().expect("no GPU").to_string();
        assert_eq!(
            error,
            "device: expected a program built with the feature cuda for cuda:1, got one without it"
        );
        assert!(DeviceChoice::Auto.open().expect("the processor").device.is_cpu());
    }
}
