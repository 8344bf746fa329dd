//! What the tests of this crate share: golden cases, small networks, random numbers.

// Each test file uses some of it.
#![allow(dead_code)]

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use lensnet_adapter::{LensNet, LensNetConfig};
use megacontext_base::gradients::Gradients;
use megacontext_base::params::Group;
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

/// Holds the gradients of Σ scores·probe, of every parameter and of the named inputs, against finite differences along them.
pub fn gradients_hold(
    net: &mut LensNet,
    what: &str,
    inputs: &[(&str, Tensor)],
    probe: &Tensor,
    scores: &dyn Fn(&LensNet, &[Tensor]) -> Result<Tensor>,
) -> Result<()> {
    net.params_mut().set_learning([Group::Lensnet])?;
    let loss = |net: &LensNet, of: &[Tensor]| -> Result<f64> {
        let product = (scores(net, of)? * probe)?;
        Ok(product.flatten_all()?.to_vec1::<f32>()?.iter().map(|v| f64::from(*v)).sum())
    };
    let along = |name: &str, gradient: &Tensor, loss: &mut dyn FnMut(&Tensor) -> Result<f64>| -> Result<()> {
        let length = f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt();
        assert!(length > 1e-4, "{what}: {name}: a gradient of length {length}");
        let step = 2e-3;
        let mut side = |sign: f64| loss(&(gradient * (sign * step / length))?);
        let measured = (side(1.0)? - side(-1.0)?) / (2.0 * step);
        let off = (measured - length).abs() / length;
        assert!(off < 0.02, "{what}: {name}: gradient of length {length}, differences give {measured}");
        Ok(())
    };
    let fixed: Vec<Tensor> = inputs.iter().map(|(_, value)| value.clone()).collect();
    let mut gradients = Gradients::new();
    net.backward(&scores(net, &fixed)?, probe.clone(), &mut gradients)?;
    let names: Vec<String> = net.params().names().map(str::to_string).collect();
    assert_eq!(gradients.names().collect::<Vec<_>>(), names, "{what}");
    for name in names {
        let value = net.params().get(&name).context("value")?.copy()?;
        let gradient = gradients.get(&name).context("gradient")?;
        let gradient = Tensor::from_slice(gradient, value.shape(), value.device())?;
        along(&name, &gradient, &mut |by| {
            net.params_mut().set(&name, &(&value + by)?)?;
            loss(net, &fixed)
        })?;
        net.params_mut().set(&name, &value)?;
    }
    for (at, (name, value)) in inputs.iter().enumerate() {
        let mut of = fixed.clone();
        of[at] = Var::from_tensor(value)?.into_inner();
        let sum = (scores(net, &of)? * probe)?.sum_all()?;
        let gradient = sum.backward()?.get(&of[at]).context("input")?.clone();
        along(name, &gradient, &mut |by| {
            of[at] = (value + by)?;
            loss(net, &of)
        })?;
    }
    Ok(())
}
