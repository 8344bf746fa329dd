//! What the tests of this crate share: golden cases, small networks, random numbers.

// Each test file uses some of it.
#![allow(dead_code)]

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use lensnet_adapter::{LensNet, LensNetConfig};
use megacontext_base::random::Random;

/// One golden case.
pub struct Case(HashMap<String, Tensor>);

pub fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/megacontext")
}

pub fn golden(name: &str) -> Result<Case> {
    let path = folder().join(name).with_extension("safetensors");
    Ok(Case(candle_core::safetensors::load(path, &Device::Cpu)?))
}

impl Case {
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.0.get(name).with_context(|| format!("no {name} in the case"))
    }

    /// A leaf of this value.
    pub fn leaf(&self, name: &str) -> Result<Tensor> {
        Ok(Var::from_tensor(self.get(name)?)?.into_inner())
    }

    pub fn lods(&self, name: &str) -> Result<Vec<u8>> {
        Ok(self.integers(name)?.into_iter().map(|v| v as u8).collect())
    }

    pub fn starts(&self, name: &str) -> Result<Vec<u64>> {
        Ok(self.integers(name)?.into_iter().map(|v| v as u64).collect())
    }

    fn integers(&self, name: &str) -> Result<Vec<i64>> {
        Ok(self.get(name)?.to_dtype(DType::I64)?.flatten_all()?.to_vec1()?)
    }

    /// A network with the case's weights.
    pub fn network(&self, config: LensNetConfig) -> Result<LensNet> {
        let mut net = LensNet::new(config, 0)?;
        for (name, _) in net.config().tensors() {
            net.params_mut().set(&name, self.get(&format!("w.{name}"))?)?;
        }
        Ok(net)
    }
}

/// The largest difference.
pub fn close(a: &Tensor, b: &Tensor) -> Result<f64> {
    anyhow::ensure!(a.dims() == b.dims(), "shapes {:?} and {:?}", a.dims(), b.dims());
    Ok(f64::from((a - b)?.abs()?.max_all()?.to_scalar::<f32>()?))
}

/// The largest value.
pub fn size(of: &Tensor) -> Result<f64> {
    Ok(f64::from(of.abs()?.max_all()?.to_scalar::<f32>()?))
}

/// The network of the golden cases, but for what they vary.
pub fn small(block: usize) -> LensNetConfig {
    LensNetConfig { block, ..LensNetConfig::new(16, 2) }
}

/// Standard normal numbers.
pub fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut random = Random::new(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.normal() as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}
