//! What the tests of this crate share: golden cases, small networks, random numbers.

// Each test file uses some of it.
#![allow(dead_code, clippy::unwrap_used)]

pub mod plain;

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use gistnet_adapter::{GistNet, GistNetConfig};
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::Decoder;
use megacontext_base::random::Random;
use megacontext_base::weights::Weights;
use megacontext_kernels::precision::Precision;

/// One golden case.
pub struct Case(HashMap<String, Tensor>);

pub fn golden(name: &str) -> Result<Case> {
    let path = Case::folder().join(name).with_extension("safetensors");
    Ok(Case(candle_core::safetensors::load(path, &Device::Cpu)?))
}

impl Case {
    pub fn folder() -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/megacontext")
    }

    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.0.get(name).with_context(|| format!("no {name} in the case"))
    }

    /// A leaf of this value.
    pub fn leaf(&self, name: &str) -> Result<Tensor> {
        Ok(Var::from_tensor(self.get(name)?)?.into_inner())
    }

    pub fn mask(&self, name: &str) -> Result<Option<Vec<bool>>> {
        let Some(mask) = self.0.get(name) else { return Ok(None) };
        let flags: Vec<u8> = mask.to_dtype(DType::U8)?.flatten_all()?.to_vec1()?;
        Ok(Some(flags.into_iter().map(|flag| flag != 0).collect()))
    }

    /// A network with the case's weights.
    pub fn network(&self, config: GistNetConfig) -> Result<GistNet> {
        self.network_of("w.", config)
    }

    pub fn network_of(&self, prefix: &str, config: GistNetConfig) -> Result<GistNet> {
        let mut net = GistNet::new(config, 0)?;
        for (name, _) in net.config().tensors() {
            net.params_mut().set(&name, self.get(&format!("{prefix}{name}"))?)?;
        }
        Ok(net)
    }
}

/// The largest difference.
pub fn close(a: &Tensor, b: &Tensor) -> Result<f64> {
    anyhow::ensure!(a.dims() == b.dims(), "shapes {:?} and {:?}", a.dims(), b.dims());
    Ok(f64::from((a - b)?.abs()?.max_all()?.to_scalar::<f32>()?))
}

/// The network of the golden cases, but for what they vary.
pub fn small(block: usize) -> GistNetConfig {
    GistNetConfig { block, ..GistNetConfig::new(16, 2) }
}

/// Standard normal numbers.
pub fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut random = Random::new(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.normal() as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// A model of the fixtures.
pub fn decoder(name: &str) -> Decoder {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures").join(name);
    let config = DecoderConfig::from_dir(&dir).unwrap();
    Decoder::from_weights(config, &Weights::open(&dir).unwrap(), Precision::F32, &[]).unwrap()
}

/// A document.
pub fn tokens(decoder: &Decoder, length: usize) -> Vec<u32> {
    let vocab = decoder.config().vocab_size as u32;
    (0..length as u32).map(|i| (i * 41 + i * i * 3 + 7) % vocab).collect()
}
