//! Linear layers and norms on a GPU: [`crate::projection`] and [`crate::norms`] over the kernels' `cuda`.
//!
//! Products are computed in the class's type P (f32 or bf16). Operands that are stored otherwise are converted first, into
//! [`Rooms`](super::buffer::Rooms); results are stored as S, gradients of parameters and of inputs in f32.

use megacontext_kernels::cuda::cudarc::driver::CudaSlice;
use megacontext_kernels::cuda::linear::{
    Dora, FactorGradients, Factors, Layer, LayerGradients, Lora, Saved, row_norms,
};
use megacontext_kernels::cuda::{Device, norm, rows};
use std::sync::Arc;

use super::buffer::{GpuBuffer, LinearRooms, stored_as};
use super::parameters::{Copied, Scales};
use super::{Gpu, GpuGradients};
use crate::architecture::NormKind;
use crate::buffers::Activation;
use crate::error::{BaseError, Result};
use crate::lora::LoraModule;
use crate::params::{Group, ParamStore};
use crate::projection::{Setting, dropout_of};

/// A linear layer; its parameters are looked up when it runs.
pub(crate) struct GpuLinear<'a> {
    pub(super) setting: Setting<'a>,
    name: String,
    shape: [usize; 2],
    bias: bool,
    module: Option<&'a LoraModule>,
}

/// What a layer reads in one class of products.
struct Operands<P> {
    weight: Arc<CudaSlice<P>>,
    lora: Option<LoraOperands<P>>,
}

struct LoraOperands<P> {
    factors: [Arc<CudaSlice<P>>; 2],
    initial: Option<[Arc<CudaSlice<P>>; 2]>,
    /// DoRA's c = m/n and n.
    dora: Option<Scales>,
}

impl<'a> GpuLinear<'a> {
    /// The layer `name` (without `.weight`).
    pub fn new(name: &str, setting: Setting<'a>) -> Result<Self> {
        let weight = format!("{name}.weight");
        let Some(&[out, inp]) = setting.params.shape(&weight) else {
            let message = "expected a matrix [out, in]".to_string();
            return Err(BaseError::Parameter { name: weight, message });
        };
        let bias = setting.params.contains(&format!("{name}.bias"));
        let module = setting.lora.and_then(|lora| lora.get(name));
        Ok(Self { setting, name: name.to_string(), shape: [out, inp], bias, module })
    }

    fn bias(&self) -> String {
        format!("{}.bias", self.name)
    }

    fn weight(&self) -> String {
        format!("{}.weight", self.name)
    }

    fn operands<P: Copied>(&self, gpu: &Gpu) -> Result<Operands<P>> {
        let params = self.setting.params;
        let get = |name: &str| gpu.parameters.values::<P>(gpu.kernels(), params, name);
        let weight = get(&self.weight())?;
        let Some(module) = self.module else { return Ok(Operands { weight, lora: None }) };
        let factors = [get(&module.a_name())?, get(&module.b_name())?];
        let initial = match module.pissa {
            false => None,
            true => {
                let [a, b] = module.fixed_names();
                Some([get(&a)?, get(&b)?])
            }
        };
        let mut operands = Operands { weight, lora: Some(LoraOperands { factors, initial, dora: None }) };
        if module.dora {
            let of = [self.weight(), module.a_name(), module.b_name(), module.magnitude_name()];
            let versions = of.map(|name| params.version(&name));
            let dora = gpu.parameters.scales(&self.name, versions, || self.scales(gpu, &operands))?;
            if let Some(lora) = &mut operands.lora {
                lora.dora = Some(dora);
            }
        }
        Ok(operands)
    }

    /// DoRA's c = m/n and n.
    fn scales<P: Copied>(&self, gpu: &Gpu, operands: &Operands<P>) -> Result<[CudaSlice<f32>; 2]> {
        let [out, _] = self.shape;
        let device = gpu.kernels();
        let mut norms = device.zeros::<f32>(out)?;
        self.layer(operands, false, |layer| {
            Ok(row_norms(device, gpu.products(), &layer, &mut norms.slice_mut(..))?)
        })?;
        let name = self.module.map(LoraModule::magnitude_name).unwrap_or_default();
        let magnitudes = self.setting.params.values(&name)?;
        let lengths = device.download(&norms)?;
        let scale: Vec<f32> = magnitudes.f32()?.iter().zip(&lengths).map(|(m, n)| m / n).collect();
        Ok([device.upload(&scale)?, norms])
    }

    /// Calls `f` with the layer, in training with its dropout.
    fn layer<P: Copied, R>(
        &self,
        operands: &Operands<P>,
        training: bool,
        f: impl FnOnce(Layer<'_, P>) -> Result<R>,
    ) -> Result<R> {
        let weight = operands.weight.slice(..);
        let (Some(module), Some(lora)) = (self.module, &operands.lora) else {
            return f(Layer { weight: &weight, shape: self.shape, lora: None });
        };
        let [a, b] = lora.factors.each_ref().map(|factor| factor.slice(..));
        let initial = lora.initial.as_ref().map(|pair| pair.each_ref().map(|factor| factor.slice(..)));
        let dora = lora.dora.as_ref().map(|pair| pair.each_ref().map(|values| values.slice(..)));
        let lora = Lora {
            a: &a,
            b: &b,
            rank: module.rank,
            scale: module.scale as f32,
            dropout: dropout_of(module, self.setting.dropout_seed.filter(|_| training)),
            initial: initial.as_ref().map(|[a, b]| Factors { a, b }),
            dora: dora.as_ref().map(|[scale, norms]| Dora { scale, norms }),
        };
        f(Layer { weight: &weight, shape: self.shape, lora: Some(lora) })
    }

    /// `y` = this layer of `x`, or += it where `add`.
    pub fn forward<P: Copied, S: Activation>(
        &self,
        gpu: &Gpu,
        x: &GpuBuffer<S>,
        y: &mut GpuBuffer<S>,
        add: bool,
        rooms: &mut LinearRooms,
    ) -> Result<()> {
        let device = gpu.kernels();
        y.size(device, self.setting.entries * self.shape[0])?;
        let mut y = y.view_mut()?;
        if self.bias {
            let bias = gpu.parameters.values::<f32>(device, self.setting.params, &self.bias())?;
            if add {
                rows::add_bias(device, &*bias, &mut y)?;
            } else {
                rows::fill(device, &*bias, &mut y)?;
            }
        }
        let x = stored_as::<_, P>(device, x.view()?, &mut P::rooms(rooms).x)?;
        self.layer(&self.operands::<P>(gpu)?, true, |layer| {
            Ok(layer.forward(device, gpu.products(), &x, None, &mut y, add || self.bias)?)
        })
    }

    /// Gradients, as [`crate::projection::Projection::backward`].
    pub fn backward<P: Copied, S: Activation, G: Activation>(
        &self,
        gpu: &Gpu,
        x: &GpuBuffer<S>,
        g: &GpuBuffer<G>,
        dx: Option<(&mut GpuBuffer<f32>, bool)>,
        rooms: &mut LinearRooms,
        gradients: &mut GpuGradients,
    ) -> Result<()> {
        let device = gpu.kernels();
        let params = self.setting.params;
        if self.bias && params.parameter_learns(&self.bias()) {
            rows::sum_rows(device, &g.view()?, gradients.of(device, &self.bias(), self.shape[0])?)?;
        }
        let [out, inp] = self.shape;
        let module = self.module.filter(|_| params.learns(Group::Lora));
        let weight_learns = self.module.is_none() && params.parameter_learns(&self.weight());
        let magnitude_learns = module.filter(|module| module.dora);
        let mut taken: Vec<(String, CudaSlice<f32>)> = Vec::new();
        let mut take = |name: String, len: usize| -> Result<()> {
            let buffer = gradients.take(device, &name, len)?;
            taken.push((name, buffer));
            Ok(())
        };
        if weight_learns {
            take(self.weight(), out * inp)?;
        }
        if let Some(module) = module {
            take(module.a_name(), module.rank * inp)?;
            take(module.b_name(), out * module.rank)?;
        }
        if let Some(module) = magnitude_learns {
            take(module.magnitude_name(), out)?;
        }

        let mut dx = match dx {
            None => None,
            Some((dx, add)) => {
                dx.size(device, x.len())?;
                Some((dx.view_mut()?, add))
            }
        };
        let rooms = P::rooms(rooms);
        let x = stored_as::<_, P>(device, x.view()?, &mut rooms.x)?;
        let g = stored_as::<_, P>(device, g.view()?, &mut rooms.g)?;
        {
            let mut views: Vec<_> = taken.iter_mut().map(|(_, buffer)| buffer.slice_mut(..)).collect();
            let mut views = views.iter_mut();
            let weight = if weight_learns { views.next() } else { None };
            let factors = match module {
                None => None,
                Some(_) => views.next().zip(views.next()).map(|(a, b)| FactorGradients { a, b }),
            };
            let magnitude = magnitude_learns.and_then(|_| views.next());
            let into = LayerGradients { weight, factors, magnitude };
            let saved = Saved { x: &x, reduced: None, gradient: &g };
            let dx = dx.as_mut().map(|(dx, add)| (dx, *add));
            self.layer(&self.operands::<P>(gpu)?, true, |layer| {
                Ok(layer.backward(device, gpu.products(), saved, dx, into)?)
            })?;
        }
        for (name, buffer) in taken {
            gradients.put(name, buffer);
        }
        Ok(())
    }
}

/// A norm, its parameters on the device.
pub(crate) struct GpuNorm {
    layer: bool,
    eps: f32,
    scale: Arc<CudaSlice<f32>>,
    bias: Option<Arc<CudaSlice<f32>>>,
    /// Where the gradients of gain and bias go, where they learn.
    learning: [Option<String>; 2],
}

impl GpuNorm {
    /// As [`crate::norms::Norm::new`].
    pub fn new(
        gpu: &Gpu,
        kind: NormKind,
        module: &str,
        width: usize,
        eps: f64,
        params: &ParamStore,
    ) -> Result<Self> {
        let device = gpu.kernels();
        let (gain, bias) = (format!("{module}.weight"), format!("{module}.bias"));
        let scale = match kind {
            _ if !kind.has_gain() => gpu.parameters.ones(device, width)?,
            NormKind::RmsOffset => gpu.parameters.one_plus(device, params, &gain)?,
            _ => gpu.parameters.values(device, params, &gain)?,
        };
        let learns = params.learns(Group::Norms);
        let learning =
            [(kind.has_gain() && learns).then_some(gain), (kind.has_bias() && learns).then(|| bias.clone())];
        let bias = kind.has_bias().then(|| gpu.parameters.values(device, params, &bias)).transpose()?;
        Ok(Self { layer: kind == NormKind::Layer, eps: eps as f32, scale, bias, learning })
    }

    /// x/rms(x) over rows of `width` values.
    pub fn plain(gpu: &Gpu, width: usize, eps: f64) -> Result<Self> {
        let scale = gpu.parameters.ones(gpu.kernels(), width)?;
        Ok(Self { layer: false, eps: eps as f32, scale, bias: None, learning: [None, None] })
    }

    /// The norm of `x` into `out`.
    pub fn forward<S: Activation>(
        &self,
        device: &Device,
        x: &GpuBuffer<S>,
        out: &mut GpuBuffer<S>,
    ) -> Result<()> {
        out.size(device, x.len())?;
        let (x, mut out) = (x.view()?, out.view_mut()?);
        if self.layer {
            let bias = self.bias.as_ref().map(|bias| bias.slice(..));
            norm::layer_forward(device, &x, &*self.scale, bias.as_ref(), self.eps, &mut out)?;
        } else {
            norm::rms_forward(device, &x, &*self.scale, self.eps, &mut out)?;
        }
        Ok(())
    }

    /// Adds the gradient of `x` to `dx`, and those of what learns to `gradients`.
    pub fn backward<S: Activation>(
        &self,
        device: &Device,
        x: &GpuBuffer<S>,
        g: &GpuBuffer<f32>,
        dx: &mut GpuBuffer<f32>,
        gradients: &mut GpuGradients,
    ) -> Result<()> {
        let width = self.scale.len();
        let mut taken = [None, None];
        for (taken, name) in taken.iter_mut().zip(&self.learning) {
            if let Some(name) = name {
                *taken = Some(gradients.take(device, name, width)?);
            }
        }
        {
            let (x, g, mut dx) = (x.view()?, g.view()?, dx.view_mut()?);
            let sums = taken.each_mut().map(|sum| sum.as_mut().map(|sum| sum.slice_mut(..)));
            if self.layer {
                norm::layer_backward(device, &x, &*self.scale, &g, self.eps, &mut dx, sums)?;
            } else {
                let [gain, _] = sums;
                norm::rms_backward(device, &x, &*self.scale, &g, self.eps, &mut dx, gain)?;
            }
        }
        for (name, sum) in self.learning.iter().zip(taken) {
            if let (Some(name), Some(sum)) = (name, sum) {
                gradients.put(name.clone(), sum);
            }
        }
        Ok(())
    }
}
