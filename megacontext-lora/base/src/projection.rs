//! One linear layer of a model in a pass: its weight, its bias where it has one, LoRA where it is attached, and where its
//! gradients go.
//!
//! Source: y = x·Wᵀ + b + s·drop(x)·Aᵀ·Bᵀ (Hu et al. 2021), DoRA and PiSSA; the formulas and their backward are
//! [`megacontext_kernels::linear`]'s, those of the bias [`megacontext_kernels::rows`]'. DoRA's lengths are found anew for
//! every pass, since what they are lengths of has learned; the bias is not scaled by it.
//! This module finds the parameters by name and hands gradients to those that learn, and to no others.
//!
//! Shapes: N entries, W [out, in], b [out], A [r, in], B [out, r]; x [N, in], y [N, out]. Row-major. x and y are stored as S (f32 or
//! bf16), gradients of parameters and inputs are f32.
//! Errors: a parameter that is missing or not a matrix.

use megacontext_kernels::gemm::Products;
use megacontext_kernels::linear::{
    Dora, Dropout, Factors, Layer, LayerGradients, LoraSlices, Scratch, Weight,
};
use megacontext_kernels::rows;

use crate::buffers::{Activation, Buffer};
use crate::error::{BaseError, Result};
use crate::gradients::Gradients;
use crate::lora::{LoraModule, LoraModules, lengths};
use crate::params::{Group, Held, ParamStore};
use crate::random::{Random, mix};

/// What is the same for all linear layers of a pass.
#[derive(Clone, Copy)]
pub(crate) struct Setting<'a> {
    pub params: &'a ParamStore,
    pub lora: Option<&'a LoraModules>,
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
    lora: Option<Box<Lora<'a>>>,
    out: usize,
    inp: usize,
}

struct Lora<'a> {
    module: &'a LoraModule,
    a: Held<'a>,
    b: Held<'a>,
    initial: Option<[Held<'a>; 2]>,
    dora: Option<Scales>,
    dropout: Option<Dropout>,
}

/// DoRA's c = m/n and n, [out].
struct Scales {
    scale: Vec<f32>,
    norms: Vec<f32>,
}

/// The dropout of a module in a pass with this seed.
pub(crate) fn dropout_of(module: &LoraModule, seed: Option<u64>) -> Option<Dropout> {
    let seed = seed.filter(|_| module.dropout > 0.0)?;
    Some(Dropout { p: module.dropout, seed: Random::named(mix(seed), &module.name).next_u64() })
}

impl<'a> Lora<'a> {
    fn new(module: &'a LoraModule, weight: Weight, setting: Setting<'a>) -> Result<Self> {
        let params = setting.params;
        let (a, b) = (params.values(&module.a_name())?, params.values(&module.b_name())?);
        let initial = if module.pissa {
            let [a, b] = module.fixed_names();
            Some([params.values(&a)?, params.values(&b)?])
        } else {
            None
        };
        let dora = if module.dora {
            let norms = lengths(module, weight, a.f32()?, b.f32()?)?;
            let magnitudes = params.values(&module.magnitude_name())?;
            let scale = magnitudes.f32()?.iter().zip(&norms).map(|(m, n)| m / n).collect();
            Some(Scales { scale, norms })
        } else {
            None
        };
        Ok(Self { module, a, b, initial, dora, dropout: dropout_of(module, setting.dropout_seed) })
    }

    fn slices(&self) -> Result<LoraSlices<'_>> {
        let initial = match &self.initial {
            None => None,
            Some([a, b]) => Some(Factors { a: a.f32()?, b: b.f32()? }),
        };
        Ok(LoraSlices {
            a: self.a.f32()?,
            b: self.b.f32()?,
            rank: self.module.rank,
            scale: self.module.scale as f32,
            dropout: self.dropout,
            initial,
            dora: self.dora.as_ref().map(|Scales { scale, norms }| Dora { scale, norms }),
        })
    }
}

impl<'a> Projection<'a> {
    /// The linear layer `name` (without `.weight`).
    pub(crate) fn new(name: &str, setting: Setting<'a>) -> Result<Self> {
        let params = setting.params;
        let weight_name = format!("{name}.weight");
        let weight = params.values(&weight_name)?;
        let Some(&[out, inp]) = params.shape(&weight_name) else {
            let message = "expected a matrix [out, in]".to_string();
            return Err(BaseError::Parameter { name: weight_name, message });
        };
        let bias = format!("{name}.bias");
        let bias = if params.contains(&bias) { Some(params.values(&bias)?) } else { None };
        let module = setting.lora.and_then(|lora| lora.get(name));
        let lora =
            module.map(|module| Lora::new(module, weight.weight(), setting).map(Box::new)).transpose()?;
        Ok(Self { setting, name: name.to_string(), weight, bias, lora, out, inp })
    }

    fn layer(&self) -> Result<Layer<'_>> {
        let lora = self.lora.as_ref().map(|lora| lora.slices()).transpose()?;
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
        let params = self.setting.params;
        let [name, bias] = ["weight", "bias"].map(|of| format!("{}.{of}", self.name));
        if params.parameter_learns(&bias) {
            rows::sum_rows(g, gradients.buffer(&bias, self.out));
        }
        let mut take = |name: String, len: usize| {
            let buffer = gradients.take(&name, len);
            (name, buffer)
        };
        let mut weight = None;
        let mut factors = None;
        let mut magnitudes = None;
        match self.lora.as_deref() {
            None if params.parameter_learns(&name) => weight = Some(take(name, self.out * self.inp)),
            Some(Lora { module, dora, .. }) if params.learns(Group::Lora) => {
                let rank = module.rank;
                factors =
                    Some([take(module.a_name(), rank * self.inp), take(module.b_name(), self.out * rank)]);
                magnitudes = dora.as_ref().map(|_| take(module.magnitude_name(), self.out));
            }
            _ => {}
        }
        let (a, b) = match &mut factors {
            None => (None, None),
            Some([(_, a), (_, b)]) => (Some(&mut a[..]), Some(&mut b[..])),
        };
        let into = LayerGradients {
            weight: weight.as_mut().map(|(_, buffer)| &mut buffer[..]),
            a,
            b,
            magnitude: magnitudes.as_mut().map(|(_, buffer)| &mut buffer[..]),
        };
        self.layer()?.backward(x, g, dx, into, scratch);
        for (name, buffer) in factors.into_iter().flatten().chain(weight).chain(magnitudes) {
            gradients.put(name, buffer);
        }
        Ok(())
    }
}
