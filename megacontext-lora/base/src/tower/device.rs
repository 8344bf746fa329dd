//! The tower on a GPU: the decoder's blocks on its machine, as one operation of candle's tape.
//!
//! The tower's block is nanochat's, so [`DecoderConfig`] describes it and [`crate::stack`] walks it: sequential halves, plain norms,
//! norms of queries and keys after a rotation by −θ, relu². Only the blocks go there; what stands before and behind them (masks,
//! pooling, scorers) is a small part of the work and stays on the tape.
//!
//! candle's operations have three operands at most, and a tower has six parameters in each block. So the tape knows the input and
//! one parameter, by which it sees that there is something to walk back to; the gradients of all parameters are left with the
//! [`ParamStore`], where [`crate::gradients::Gradients::add_backward`] looks for them.
//! The blocks' inputs stay on the device until the way back, everything else is made again.
//!
//! Shapes: B rows, T entries, N = B·T, E width. Products are f32. Errors: no memory; tables that do not fit.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Device as CandleDevice, Layout, Shape, Tensor};
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::cpu::Values;
use megacontext_kernels::gemm::Products;

use super::plain::check_table;
use super::{Angles, Sees, Tower, weight};
use crate::block::{Attending, ByWindow, Pass, Tables};
use crate::buffers::Scratch;
use crate::config::DecoderConfig;
use crate::device::Device;
use crate::error::Result;
use crate::machine::gpu::Gpu;
use crate::machine::{AttentionSpec, Machine};
use crate::params::ParamStore;
use crate::projection::Setting;
use crate::stack::{self, Back};

type Within = ByWindow<<Gpu as Machine>::Within>;

/// A GPU with the parameters of one tower on it.
pub(super) struct OnGpu {
    pub(super) device: Device,
    machine: Gpu,
    config: DecoderConfig,
}

/// Rows of a call, and how they attend.
struct Call<'a> {
    params: &'a ParamStore,
    attention: &'a Within,
    angles: &'a [Tensor; 2],
    entries: usize,
}

impl Call<'_> {
    /// Runs `f` on the pass that this is.
    fn pass<R>(&self, on: &OnGpu, f: impl FnOnce(&Pass<Gpu, f32>) -> Result<R>) -> Result<R> {
        let Self { params, attention, angles: [cos, sin], entries } = *self;
        let (cos, sin) = (Values::of(cos)?, Values::of(sin)?);
        let tables = Tables { global: [&cos, &sin], local: None };
        let setting = Setting { params, lora: None, dropout_seed: None, products: Products::F32, entries };
        f(&Pass {
            machine: &on.machine,
            config: &on.config,
            setting,
            attending: Attending::Rows(attention),
            tables: on.machine.tables(tables)?,
            spread: None,
        })
    }
}

impl OnGpu {
    fn attention(&self, [batch, entries]: [usize; 2], pattern: Pattern, rows: &Rows) -> Result<Within> {
        let c = &self.config;
        let sizes = [batch, entries, c.num_attention_heads, c.num_key_value_heads, c.head_dim];
        ByWindow::new(pattern, c, |pattern| {
            let scale = c.architecture.query_scale;
            let spec = AttentionSpec { sizes, scale, pattern, products: Products::F32, slopes: None };
            self.machine.within(&spec, rows)
        })
    }

    /// The stream behind the last block of `values` [N, E]; with `keep`, the blocks' inputs.
    fn forward(&self, call: &Call, values: &[f32], keep: bool) -> Result<Made> {
        let mut scratch = Scratch::default();
        self.machine.read(values, &mut scratch.x)?;
        let lowest = if keep { 0 } else { self.config.num_hidden_layers };
        call.pass(self, |pass| stack::forward(pass, &mut scratch, lowest, true))?;
        let out = self.machine.to_host(&scratch.x)?;
        let kept = Scratch { inputs: scratch.inputs, ..Scratch::default() };
        Ok((out, kept))
    }
}

impl Tower {
    /// Blocks run on this device from here on; the processor's is where every tower begins. Parameters stay on the host, and are
    /// copied when blocks need them.
    ///
    /// # Errors
    /// When the device cannot run heads of this width; the tower stays where it was then.
    pub fn set_device(&mut self, device: &Device) -> Result<()> {
        let config = self.config.described();
        device.check(&config)?;
        self.on_gpu = match device {
            Device::Cpu => None,
            Device::Cuda(opened) => {
                Some(Arc::new(OnGpu { device: device.clone(), machine: Gpu::new(opened), config }))
            }
        };
        Ok(())
    }

    /// [`Tower::forward`] on the GPU.
    pub(super) fn forward_on(
        &self,
        on: &Arc<OnGpu>,
        params: &ParamStore,
        x_bte: &Tensor,
        angles: Angles,
        (pattern, rows): (Pattern, &Rows),
    ) -> Result<Tensor> {
        let (batch, entries, _) = x_bte.dims3()?;
        let angles = [angles.cos.contiguous()?, angles.sin.contiguous()?];
        check_table(&angles[0], &angles[1], [entries, batch * entries, self.config.head_width() / 2])?;
        let attention = on.attention([batch, entries], pattern, rows)?;
        let leaf = params.taped(&weight(0, "attn.c_q"))?;
        let call = Call { params, attention: &attention, angles: &angles, entries: batch * entries };
        let x_bte = x_bte.contiguous()?;
        let keep = leaf.track_op() || x_bte.track_op();
        let (values, kept) = on.forward(&call, &Values::of(&x_bte)?, keep)?;
        if !keep {
            return Ok(Tensor::from_vec(values, x_bte.shape(), &CandleDevice::Cpu)?);
        }
        let walked = Walked {
            on: on.clone(),
            params: params.alias()?,
            attention,
            angles,
            made: Mutex::new(Some((values, kept))),
        };
        Ok(x_bte.apply_op2(&leaf, walked)?)
    }

    /// [`Tower::forward_in_place`] on the GPU.
    pub(super) fn forward_in_place_on(
        &self,
        on: &OnGpu,
        params: &ParamStore,
        x_bte: &mut [f32],
        [batch, entries]: [usize; 2],
        angles: [Tensor; 2],
        (pattern, rows): (Pattern, &Rows),
    ) -> Result<()> {
        let attention = on.attention([batch, entries], pattern, rows)?;
        let call = Call { params, attention: &attention, angles: &angles, entries: batch * entries };
        let (values, _) = on.forward(&call, x_bte, false)?;
        x_bte.copy_from_slice(&values);
        Ok(())
    }
}

/// What a forward pass gave, until the tape has it, and the blocks' inputs, until they have been walked back.
type Made = (Vec<f32>, Scratch<Gpu, f32>);

/// A forward pass that was run, on the tape.
struct Walked {
    on: Arc<OnGpu>,
    params: ParamStore,
    attention: Within,
    angles: [Tensor; 2],
    made: Mutex<Option<Made>>,
}

impl Walked {
    fn made(&self) -> MutexGuard<'_, Option<Made>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The gradient of the input [N, E] for that of the result, `d`, where it is `wanted`.
    fn back(
        &self,
        scratch: &mut Scratch<Gpu, f32>,
        d: &[f32],
        entries: usize,
        wanted: bool,
    ) -> Result<Option<Vec<f32>>> {
        let machine = &self.on.machine;
        machine.read(d, &mut scratch.d)?;
        // Room for one block's values.
        scratch.saved.resize_with(1, Default::default);
        let call = Call { params: &self.params, attention: &self.attention, angles: &self.angles, entries };
        call.pass(&self.on, |pass| {
            let wanted = |layer| wanted || layer > 0;
            let back = Back { lowest: 0, recompute: true, fresh: false, wanted };
            self.params.with_beside(|beside| {
                machine.with_gradients(beside, |gradients| back.walk(pass, scratch, gradients))
            })
        })?;
        wanted.then(|| machine.to_host(&scratch.d)).transpose()
    }
}

fn twice() -> candle_core::Error {
    candle_core::Error::msg("tower: expected one forward and one backward pass for each graph, got another")
}

impl CustomOp2 for Walked {
    fn name(&self) -> &'static str {
        "tower-on-gpu"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        of: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let mut made = self.made();
        let (values, _) = made.as_mut().ok_or_else(twice)?;
        Ok((CpuStorage::F32(std::mem::take(values)), of.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _: &Tensor,
        _: &Tensor,
        d: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, mut scratch) = self.made().take().ok_or_else(twice)?;
        let d = d.contiguous()?;
        let entries = d.elem_count() / self.on.config.hidden_size;
        let back = Values::of(&d)
            .map_err(Into::into)
            .and_then(|d| self.back(&mut scratch, &d, entries, x.track_op()));
        let dx = back.map_err(candle_core::Error::wrap)?;
        let dx = dx.map(|values| Tensor::from_vec(values, x.shape(), &CandleDevice::Cpu)).transpose()?;
        Ok((dx, None))
    }
}

impl std::fmt::Debug for OnGpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OnGpu").field("device", &self.device).finish_non_exhaustive()
    }
}

/// Which rows, where attention has a pattern that the device has.
pub(super) fn on_device<'a>(sees: Sees<'a>) -> Option<(Pattern, &'a Rows)> {
    match sees {
        Sees::Pattern(pattern, rows) => Some((pattern, rows)),
        Sees::Bias(_) => None,
    }
}
