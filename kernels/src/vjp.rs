//! Seeding a backward pass with a given gradient (a vector-Jacobian product).
//!
//! candle's `backward` starts from a scalar with gradient one. Activation checkpointing needs to start from the
//! gradient of a block's output instead: [`seed`] makes a scalar whose backward is that gradient.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use crate::error::{KernelError, Result};

struct Seed {
    gradient: Mutex<Option<Tensor>>,
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "vjp-seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(self.gradient.lock().unwrap_or_else(|e| e.into_inner()).take())
    }
}

/// A scalar (value 0) whose backward gives `output` the gradient `gradient`. One backward per seed.
///
/// # Errors
/// When the two shapes differ.
pub fn seed(output: &Tensor, gradient: Tensor) -> Result<Tensor> {
    if output.shape() != gradient.shape() {
        return Err(KernelError::shape(
            "vjp",
            format!("gradient {:?}", output.dims()),
            format!("{:?}", gradient.dims()),
        ));
    }
    Ok(output.apply_op1(Seed { gradient: Mutex::new(Some(gradient)) })?)
}
