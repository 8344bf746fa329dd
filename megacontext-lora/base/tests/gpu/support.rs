//! The device, models on it and beside it, comparisons.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use libloading::os::unix::Library;
use megacontext_base::buffers::gpu::{BLAS, GpuBytes};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::{Decoder, Forward, StepLoss};
use megacontext_base::device::Device;
use megacontext_base::gradients::Gradients;
use megacontext_base::lora::LoraConfig;
use megacontext_base::params::Group;
use megacontext_base::random::Random;
use megacontext_base::rope::RopeTables;
use megacontext_base::weights::Weights;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::cuda;
use megacontext_kernels::loss::IGNORE;
use megacontext_kernels::precision::Precision;

use crate::emulated::{compiled, driver, emulated_image, preload};

/// Without what cuBLASLt works in, which was there before.
pub fn without_blas(said: GpuBytes) -> GpuBytes {
    GpuBytes { weights: said.weights - BLAS, ..said }
}

/// A device for one test at a time.
pub struct Lease {
    pub device: Device,
    driver: Option<&'static Library>,
    _alone: MutexGuard<'static, ()>,
}

/// The emulated device's account of its memory.
pub struct Memory(&'static Library);

impl Memory {
    /// Bytes that live.
    pub fn now(&self) -> Result<u64> {
        // SAFETY: the library is `cu/emulate/driver.cpp`, and this is the function's type.
        let bytes = unsafe { self.0.get::<extern "C" fn() -> usize>(b"emulated_bytes") }?;
        Ok(bytes() as u64)
    }
}

impl Lease {
    /// Holds the fullest moment, beside what there was before, against what was said of it.
    pub fn took(&self, what: &str, before: u64, said: GpuBytes) -> Result<()> {
        let most = (self.device.peak_bytes()?.unwrap_or(0) - before) as f64;
        let share = said.total() as f64 / most;
        ensure!((0.85..=1.15).contains(&share), "{what}: planned {said:?}, measured {most}");
        Ok(())
    }

    /// None on a GPU.
    pub fn memory(&self) -> Option<Memory> {
        self.driver.map(Memory)
    }
}

struct Found {
    device: Device,
    /// What the emulated device is made of: driver, cuBLASLt.
    libraries: Vec<Library>,
}

fn find() -> Result<Option<Found>> {
    match cuda::probe() {
        Ok(devices) => {
            println!("on {}", devices[0].name);
            return Ok(Some(Found {
                device: Device::with_kernels(cuda::Device::open(0)?)?,
                libraries: Vec::new(),
            }));
        }
        Err(cuda::CudaError::NoDriver { .. }) => {}
        Err(error) => bail!("the driver that is there cannot be used: {error}"),
    }
    let (Some(driver), Some(blas)) = (driver()?, compiled("cublaslt", "libcublasLt.so.12")?) else {
        return Ok(None);
    };
    let libraries = vec![preload(&driver)?, preload(&blas)?];
    let opened = cuda::Device::open_with(0, |module, _, _| Ok(emulated_image(module)))?;
    Ok(Some(Found { device: Device::with_kernels(opened)?, libraries }))
}

/// The device, alone; none where there is neither one nor a compiler.
pub fn device() -> Result<Option<Lease>> {
    static ALONE: Mutex<()> = Mutex::new(());
    static FOUND: OnceLock<Result<Option<Found>, String>> = OnceLock::new();
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    match FOUND.get_or_init(|| find().map_err(|error| format!("{error:#}"))) {
        Err(error) => bail!("{error}"),
        Ok(None) => Ok(None),
        Ok(Some(found)) => {
            Ok(Some(Lease { device: found.device.clone(), driver: found.libraries.first(), _alone }))
        }
    }
}

/// Where the models are: on another machine than this program was built on, a folder that the environment names.
const FIXTURES: &str = "MEGACONTEXT_FIXTURES";

pub fn open(folder: &str, precision: Precision, learning: &[Group]) -> Result<Decoder> {
    let own = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures");
    let dir = std::env::var_os(FIXTURES).map_or_else(own, PathBuf::from).join(folder);
    let mut decoder =
        Decoder::from_weights(DecoderConfig::from_dir(&dir)?, &Weights::open(&dir)?, precision, learning)?;
    decoder.params_mut().set_learning(learning.iter().copied())?;
    Ok(decoder)
}

/// LoRA whose B is not 0, on every linear layer.
pub fn attach(decoder: &mut Decoder, lora: LoraConfig) -> Result<()> {
    decoder.attach_lora(lora, 7)?;
    let names: Vec<String> = decoder.params().names().map(String::from).collect();
    for name in names.iter().filter(|name| name.ends_with(".lora_B.weight") || name.contains("embedding_B")) {
        let mut random = Random::named(5, name);
        let value = decoder.params().get(name).context("a factor")?;
        let values: Vec<f32> = (0..value.elem_count()).map(|_| random.normal() as f32 * 0.05).collect();
        let value = candle_core::Tensor::from_vec(values, value.shape(), &candle_core::Device::Cpu)?;
        decoder.params_mut().set(name, &value)?;
    }
    Ok(())
}

/// A micro-batch.
pub struct Case {
    pub batch: usize,
    pub tokens: Vec<u32>,
    pub targets: Vec<u32>,
    pub rope: RopeTables,
    pub rows: Rows,
    pub pattern: Pattern,
    pub dropout_seed: Option<u64>,
    pub recompute: bool,
}

impl Case {
    /// Two rows of `length` tokens, of which some are not scored.
    pub fn new(decoder: &Decoder, length: usize, pattern: Pattern) -> Result<Self> {
        let c = decoder.config();
        let vocab = c.vocab_size as u32;
        let batch = 2;
        let count = (batch * length) as u32;
        let tokens: Vec<u32> = (0..count).map(|i| (i * 37 + i * i * 5 + 11) % vocab).collect();
        let targets = (0..count).map(|i| if i % 9 == 4 { IGNORE } else { (i * 13 + 3) % vocab }).collect();
        let rope = c.rope(&c.rope_scaling).sequence(length)?;
        let rows = Rows::default();
        Ok(Self { batch, tokens, targets, rope, rows, pattern, dropout_seed: None, recompute: true })
    }

    pub fn forward(&self) -> Forward<'_> {
        Forward { pattern: self.pattern, rope: &self.rope, rows: &self.rows, dropout_seed: self.dropout_seed }
    }

    pub fn gradients(&self, decoder: &Decoder) -> Result<(StepLoss, Gradients)> {
        let mut gradients = Gradients::new();
        let loss = self.accumulate(decoder, &mut gradients)?;
        Ok((loss, gradients))
    }

    /// Adds to gradients that there are.
    pub fn accumulate(&self, decoder: &Decoder, gradients: &mut Gradients) -> Result<StepLoss> {
        let (tokens, targets, with) = (&self.tokens, &self.targets, self.forward());
        let scale = 1.0 / tokens.len() as f64;
        Ok(decoder.accumulate_gradients(
            tokens,
            self.batch,
            targets,
            &with,
            scale,
            self.recompute,
            gradients,
        )?)
    }
}

/// ‖a − b‖ / ‖b‖.
pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let apart: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let length: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    (apart / length.max(1e-30)).sqrt()
}

/// Holds `got` against `expected`, within `bound` of the greatest value; NaN never passes.
pub fn close(what: &str, got: &[f32], expected: &[f32], bound: f32) -> Result<()> {
    ensure!(got.len() == expected.len(), "{what}: {} values instead of {}", got.len(), expected.len());
    let greatest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    let greatest = if greatest < 1e-7 { 1.0 } else { greatest };
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        ensure!(
            (got - expected).abs() <= bound * greatest,
            "{what}: number {i}: expected {expected} within {bound} of {greatest}, got {got}"
        );
    }
    Ok(())
}

/// Holds all gradients against others of the same names.
pub fn close_gradients(what: &str, got: &Gradients, expected: &Gradients, bound: f32) -> Result<()> {
    let names = |gradients: &Gradients| gradients.names().map(String::from).collect::<Vec<_>>();
    ensure!(!names(expected).is_empty() && names(got) == names(expected), "{what}: {:?}", names(got));
    for name in expected.names() {
        close(&format!("{what}: {name}"), got.get(name).unwrap(), expected.get(name).unwrap(), bound)?;
    }
    Ok(())
}
