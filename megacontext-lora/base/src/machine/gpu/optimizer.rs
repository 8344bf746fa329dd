//! Steps of the optimiser on a GPU: for parameters whose gradients have stayed there.
//!
//! A parameter that is stepped here has its newest values here, in f32 whatever the class ([`super::parameters`]), and so have its
//! moments; copies that products read in 16 bits are made of them without crossing the bus. The host's values are behind from then
//! on, and are brought up to date when they are asked for ([`crate::params::ParamStore`]).
//!
//! Shapes: values of a parameter of any shape. Errors: no memory; sizes that do not agree.

use std::collections::BTreeMap;
use std::sync::Arc;

use megacontext_kernels::adamw::AdamW;
use megacontext_kernels::cuda::cudarc::driver::CudaSlice;
use megacontext_kernels::cuda::{Device as Kernels, adamw, rows};

use super::Gpu;
use super::parameters::Parameters;
use crate::device::Gpu as Opened;
use crate::error::{BaseError, Result};
use crate::gradients::Gradients;
use crate::params::ParamStore;

/// Gradients that have stayed on a GPU, by parameter.
pub(crate) struct There {
    gpu: Gpu,
    buffers: BTreeMap<String, CudaSlice<f32>>,
}

/// Values of the optimiser's that lie on a GPU. They hold on to the device, not to copies of parameters.
pub(crate) struct Remote {
    opened: Arc<Opened>,
    values: CudaSlice<f32>,
}

impl Remote {
    /// A copy for the host.
    pub fn to_host(&self) -> Result<Vec<f32>> {
        Ok(self.opened.device.download(&self.values)?)
    }
}

impl There {
    /// None yet.
    pub fn new(gpu: &Gpu) -> Self {
        Self { gpu: gpu.clone(), buffers: BTreeMap::new() }
    }

    /// Are they of the same model on the same device?
    pub fn is_on(&self, gpu: &Gpu) -> bool {
        Arc::ptr_eq(&self.gpu.opened, &gpu.opened) && Arc::ptr_eq(&self.gpu.parameters, &gpu.parameters)
    }

    fn kernels(&self) -> &Kernels {
        self.gpu.kernels()
    }

    /// Adds a gradient, which becomes the sum where it is the first.
    pub fn add(&mut self, name: String, gradient: CudaSlice<f32>) -> Result<()> {
        match self.buffers.get_mut(&name) {
            None => {
                self.buffers.insert(name, gradient);
            }
            Some(sum) => rows::add_assign(self.gpu.kernels(), &gradient, sum)?,
        }
        Ok(())
    }

    /// A gradient for the host, if there is one of this name.
    pub fn to_host(&self, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(gradient) = self.buffers.get(name) else { return Ok(None) };
        Ok(Some(self.kernels().download(gradient)?))
    }

    /// Makes room for the values that a step on this parameter writes.
    pub fn prepare(&self, params: &ParamStore, name: &str) -> Result<()> {
        self.gpu.parameters.values::<f32>(self.kernels(), params, name).map(drop)
    }

    /// Σ g².
    pub fn sum_of_squares(&self) -> Result<f64> {
        let each = self.buffers.values().map(|gradient| adamw::sum_of_squares(self.kernels(), gradient));
        Ok(each.sum::<megacontext_kernels::error::Result<f64>>()?)
    }

    /// One step on a parameter that has a gradient here, and on its moments.
    pub fn step(
        &self,
        params: &ParamStore,
        name: &str,
        [exp_avg, exp_avg_sq]: [&mut Remote; 2],
        with: &AdamW,
    ) -> Result<()> {
        let gradient = self.buffers.get(name).ok_or_else(|| BaseError::Parameter {
            name: name.to_string(),
            message: "expected a gradient on the GPU, got none".to_string(),
        })?;
        let (gpu, device) = (&self.gpu, self.kernels());
        let mut values = gpu.parameters.take_f32(device, params, name)?;
        let moments = [&mut exp_avg.values, &mut exp_avg_sq.values];
        let stepped = adamw::step(device, &mut values, gradient, moments, with);
        // Whatever came of it, nobody takes the values for those from before.
        params.written_on(name, gpu);
        gpu.parameters.put_f32(name, params.version(name), values);
        Ok(stepped?)
    }

    /// Values of the host's brought here; as many zeros where there are none.
    pub fn remote(&self, values: Option<&[f32]>, len: usize) -> Result<Remote> {
        let values = match values {
            Some(values) => self.kernels().upload(values)?,
            None => self.kernels().zeros(len)?,
        };
        Ok(Remote { opened: self.gpu.opened.clone(), values })
    }

    /// Lets go of a gradient.
    pub fn forget(&mut self, name: &str) {
        self.buffers.remove(name);
    }

    /// Does a parameter have a gradient here?
    pub fn has(&self, name: &str) -> bool {
        self.buffers.contains_key(name)
    }
}

impl Gpu {
    /// Are these the parameters on it?
    pub fn has(&self, parameters: &Parameters) -> bool {
        std::ptr::eq(Arc::as_ptr(&self.parameters), parameters)
    }

    /// The values of a parameter that was written here, of this version, for the host. What only steps of the optimiser need of them
    /// is let go.
    pub fn written(&self, name: &str, version: u64) -> Result<Vec<f32>> {
        let values = self.parameters.held::<f32>(name, version).ok_or_else(|| BaseError::Parameter {
            name: name.to_string(),
            message: "expected its newest values on the GPU, got none".to_string(),
        })?;
        let written = self.kernels().download(&*values)?;
        drop(values);
        self.parameters.let_go_of_wide(name);
        Ok(written)
    }
}

impl Gradients {
    /// Moves a gradient here, where it has stayed on a GPU.
    pub(crate) fn bring_home(&mut self, name: &str) -> Result<()> {
        if let Some(gradient) = self.there().map(|there| there.to_host(name)).transpose()?.flatten() {
            self.forget_there(name);
            self.add(name, &gradient);
        }
        Ok(())
    }

    /// Adds gradients that stayed on a GPU: there, where these stay too, and otherwise here.
    pub(crate) fn take_over(&mut self, there: There) -> Result<()> {
        let There { gpu, buffers } = there;
        if self.stay() {
            return self.arrive(&gpu, buffers, &Gradients::new());
        }
        let mut arrived = Vec::with_capacity(buffers.len());
        for (name, gradient) in &buffers {
            arrived.push((name, gpu.kernels().download(gradient)?));
        }
        for (name, gradient) in arrived {
            self.add(name, &gradient);
        }
        Ok(())
    }

    /// Adds gradients of a pass on this GPU; those that the host has a part of are the host's.
    pub(crate) fn arrive(
        &mut self,
        gpu: &Gpu,
        made: BTreeMap<String, CudaSlice<f32>>,
        on_host: &Gradients,
    ) -> Result<()> {
        if self.there().is_some_and(|there| !there.is_on(gpu)) {
            let message = "expected gradients of one device and model, got another's beside them".to_string();
            return Err(BaseError::Device { message });
        }
        let (mine, theirs): (BTreeMap<_, _>, BTreeMap<_, _>) =
            made.into_iter().partition(|(name, _)| self.get(name).is_some() || on_host.get(name).is_some());
        let mut arrived = Vec::new();
        for (name, gradient) in &mine {
            arrived.push((name.clone(), gpu.kernels().download(gradient)?));
        }
        for name in on_host.names() {
            if let Some(before) = self.there().map(|there| there.to_host(name)).transpose()?.flatten() {
                arrived.push((name.to_string(), before));
            }
        }
        // Nothing has been changed so far, and nothing has to come from here on.
        for (name, gradient) in arrived {
            self.forget_there(&name);
            self.add(&name, &gradient);
        }
        for name in on_host.names() {
            self.add(name, on_host.get(name).unwrap_or_default());
        }
        for (name, gradient) in theirs {
            self.there_mut(gpu).add(name, gradient)?;
        }
        Ok(())
    }
}
