//! What small networks have besides blocks: linear layers with a bias, begun as PyTorch begins them, relu and softplus.
//!
//! Shapes: x [.., I], weight [O, I], bias \[O\]. Errors: a parameter that is missing, shapes that do not agree.

use candle_core::Tensor;
use megacontext_kernels::linear::linear;

use crate::error::Result;
use crate::params::{Group, ParamStore};
use crate::random::Random;

/// Adds a parameter that begins as those of PyTorch's linear layers do: uniform in ±1/√`fan_in`.
///
/// The values depend on the seed and the name alone.
pub fn insert_uniform(
    params: &mut ParamStore,
    group: Group,
    name: &str,
    shape: &[usize],
    fan_in: usize,
    seed: u64,
) -> Result<()> {
    let mut random = Random::named(seed, name);
    let bound = 1.0 / (fan_in as f64).sqrt();
    let values = (0..shape.iter().product::<usize>()).map(|_| random.uniform(-bound, bound) as f32).collect();
    params.insert_values(name, group, values, shape)
}

/// A linear layer with a bias: `{name}.weight` [O, I] and `{name}.bias` \[O\].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Affine {
    /// What its parameters' names begin with.
    pub name: &'static str,
    /// O.
    pub out: usize,
    /// I.
    pub inp: usize,
}

impl Affine {
    /// Names and shapes of its parameters.
    pub fn tensors(&self) -> [(String, Vec<usize>); 2] {
        [
            (format!("{}.weight", self.name), vec![self.out, self.inp]),
            (format!("{}.bias", self.name), vec![self.out]),
        ]
    }

    /// Adds fresh parameters.
    pub fn insert_parameters(&self, params: &mut ParamStore, group: Group, seed: u64) -> Result<()> {
        let insert = |(name, shape): (String, Vec<usize>)| {
            insert_uniform(params, group, &name, &shape, self.inp, seed)
        };
        self.tensors().into_iter().try_for_each(insert)
    }

    /// x·Wᵀ + b, [.., O].
    pub fn apply(&self, params: &ParamStore, x: &Tensor) -> Result<Tensor> {
        let product = linear(x, &params.taped(&format!("{}.weight", self.name))?, None)?;
        Ok(product.broadcast_add(&params.taped(&format!("{}.bias", self.name))?)?)
    }
}

/// max(x, 0), of which candle's own makes 0 where x is NaN: that has to show.
pub fn relu(x: &Tensor) -> Result<Tensor> {
    Ok(((x + x.abs()?)? * 0.5)?)
}

/// ln(1 + eˣ), without overflow: max(x, 0) + ln(1 + e^−|x|).
pub fn softplus(x: &Tensor) -> Result<Tensor> {
    Ok((relu(x)? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?)
}
