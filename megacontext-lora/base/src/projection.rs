//! One linear layer of a model in a pass: its weight, its bias where it has one, LoRA where it is attached, and where its
//! gradients go.
//!
//! Source: y = x·Wᵀ + b + s·drop(x)·Aᵀ·Bᵀ (Hu et al. 2021); the formulas and their backward are
//! [`megacontext_kernels::linear`]'s, those of the bias [`megacontext_kernels::rows`]'.
//! This module finds the parameters by name and hands gradients to those that learn, and to no others.
//!
//! Shapes: N entries, W [out, in], b [out], A [r, in], B [out, r]; x [N, in], y [N, out]. Row-major. x and y are stored as S (f32 or
//! bf16), gradients of parameters and inputs are f32.
//! Errors: a parameter that is missing or not a matrix.

use megacontext_kernels::gemm::Products;
use megacontext_kernels::linear::{Dropout, Layer, LayerGradients, LoraSlices, Scratch};
use megacontext_kernels::rows;

use crate::buffers::{Activation, Buffer};
use crate::error::{BaseError, Result};
use crate::gradients::Gradients;
use crate::lora::LoraConfig;
use crate::params::{Group, Held, ParamStore};
use crate::random::{Random, mix};

/// What is the same for all linear layers of a pass.
#[derive(Clone, Copy)]
pub(crate) struct Setting<'a> {
    pub params: &'a ParamStore,
    pub lora: Option<&'a LoraConfig>,
    pub dropout_seed: Option<u64>,
    pub products: Products,
    /// N.
    pub entries: usize,
}

/// A linear layer, its parameters looked up.
pub(crate) struct Projection<'a> {
    setting: Setting<'a>,
    name: String,
    weight: Held<'a>,
    bias: Option<Held<'a>>,
    lora: Option<Lora<'a>>,
    out: usize,
    inp: usize,
}

struct Lora<'a> {
    a: Held<'a>,
    b: Held<'a>,
    rank: usize,
    scale: f32,
    dropout: Option<Dropout>,
}

impl<'a> Projection<'a> {
    /// The linear layer `name` (without `.weight`) of block `layer`.
    pub(crate) fn new(layer: usize, name: &str, setting: Setting<'a>) -> Result<Self> {
        let params = setting.params;
        let weight_name = format!("{name}.weight");
        let weight = params.values(&weight_name)?;
        let Some(&[out, inp]) = params.shape(&weight_name) else {
            let message = "expected a matrix [out, in]".to_string();
            return Err(BaseError::Parameter { name: weight_name, message });
        };
        let bias = format!("{name}.bias");
        let bias = if params.contains(&bias) { Some(params.values(&bias)?) } else { None };
        let target = name.rsplit('.').next().unwrap_or(name);
        let lora = match setting.lora.filter(|l| l.applies(layer, target)) {
            None => None,
            Some(config) => {
                let seed = |seed: u64| Random::named(mix(seed), name).next_u64();
                let dropped = setting.dropout_seed.filter(|_| config.dropout > 0.0);
                Some(Lora {
                    a: params.values(&format!("{name}.lora_A.weight"))?,
                    b: params.values(&format!("{name}.lora_B.weight"))?,
                    rank: config.r,
                    scale: config.scale() as f32,
                    dropout: dropped.map(|s| Dropout { p: config.dropout, seed: seed(s) }),
                })
            }
        };
        Ok(Self { setting, name: name.to_string(), weight, bias, lora, out, inp })
    }

    fn layer(&self) -> Result<Layer<'_>> {
        let lora = match &self.lora {
            None => None,
            Some(lora) => Some(LoraSlices {
                a: lora.a.f32()?,
                b: lora.b.f32()?,
                rank: lora.rank,
                scale: lora.scale,
                dropout: lora.dropout,
            }),
        };
        let products = self.setting.products;
        Ok(Layer { weight: self.weight.weight(), out: self.out, inp: self.inp, lora, products })
    }

    /// `y` [N, out] = this layer of `x` [N, in].
    pub(crate) fn forward<S: Activation>(
        &self,
        x: &[S],
        y: &mut Buffer<S>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let y = y.sized(self.setting.entries * self.out)?;
        if let Some(bias) = &self.bias {
            rows::fill(bias.weight(), y);
        }
        self.layer()?.forward(x, y, self.bias.is_some(), scratch);
        Ok(())
    }

    /// This layer of `x` [N, in], added to `y` [N, out].
    pub(crate) fn forward_add<S: Activation>(
        &self,
        x: &[S],
        y: &mut [S],
        scratch: &mut Scratch,
    ) -> Result<()> {
        if let Some(bias) = &self.bias {
            rows::add_bias(bias.weight(), y);
        }
        self.layer()?.forward(x, y, true, scratch);
        Ok(())
    }

    /// Gradients for an input `x` whose result has the gradient `g`: of what learns, into `gradients`; of the input, added
    /// to (`true`) or written over `dx` where it is wanted.
    pub(crate) fn backward<S: Activation, G: Activation>(
        &self,
        x: &[S],
        g: &[G],
        dx: Option<(&mut [f32], bool)>,
        scratch: &mut Scratch,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let learns = |group| self.setting.params.learns(group);
        if self.bias.is_some() && learns(Group::Base) {
            rows::sum_rows(g, gradients.buffer(&format!("{}.bias", self.name), self.out));
        }
        let mut taken: Vec<(String, Vec<f32>)> = Vec::with_capacity(2);
        let mut take = |suffix: &str, len: usize| {
            let name = format!("{}.{suffix}", self.name);
            let buffer = gradients.take(&name, len);
            taken.push((name, buffer));
        };
        match &self.lora {
            None if learns(Group::Base) => take("weight", self.out * self.inp),
            Some(lora) if learns(Group::Lora) => {
                take("lora_A.weight", lora.rank * self.inp);
                take("lora_B.weight", self.out * lora.rank);
            }
            _ => {}
        }
        let into = match &mut taken[..] {
            [(_, weight)] => LayerGradients { weight: Some(weight), a: None, b: None },
            [(_, a), (_, b)] => LayerGradients { weight: None, a: Some(a), b: Some(b) },
            _ => LayerGradients { weight: None, a: None, b: None },
        };
        self.layer()?.backward(x, g, dx, into, scratch);
        for (name, buffer) in taken {
            gradients.put(name, buffer);
        }
        Ok(())
    }
}
