//! An NVIDIA GPU as a [`Machine`], over the kernels' `cuda`.
//!
//! What lies on the device: activations and their gradients, copies of the parameters ([`parameters`]), gradients of what learns. When
//! all of a pass has gone well its gradients are added to those of the passes before it: to the host's, or, where nobody but the
//! optimiser reads them ([`Gradients::staying`]), to the device's, and the optimiser steps there ([`optimizer`]). So a pass that
//! fails changes nothing, and what a checkpoint holds does not depend on the device.
//!
//! Products are f32 or bf16 with sums in f32, as the class says ([`megacontext_kernels::precision`]). Differences from the processor:
//! gradients of queries, keys and values have the storage of activations; in class bf16 gradients of the stream are rounded to
//! bf16 where a product reads them; low-rank values of LoRA likewise.
//! Errors: what the kernels refuse, and models whose heads are not a multiple of 8 values wide, or wider than 256.

mod attention;
mod buffer;
mod cached;
mod ends;
mod linear;
pub(crate) mod optimizer;
mod parameters;

use std::collections::BTreeMap;
use std::sync::Arc;

use megacontext_kernels::attention::Rows;
use megacontext_kernels::attention::decode::CachedRow;
use megacontext_kernels::attention::prefix::Continuations;
use megacontext_kernels::cuda::cudarc::driver::CudaSlice;
use megacontext_kernels::cuda::linear::Products as Blas;
use megacontext_kernels::cuda::{Device as Kernels, embedding, mlp, rope, rows};
use megacontext_kernels::gemm::Products;
use megacontext_kernels::store::bf16;

use self::attention::{Backward, GpuAttention};
use self::buffer::{GpuBuffer, LinearRooms};
use self::cached::GpuCached;
use self::linear::{GpuLinear, GpuNorm};
pub(crate) use self::parameters::Parameters;
use super::host::no_local_tables;
use super::{AttentionSpec, Loss, Machine, Scored, Teacher, Wanted};
use crate::architecture::{Mlp, NormKind, Rotation};
use crate::block::Tables;
use crate::buffers::{Activation, Buffers, KeysValues, Scratch};
use crate::decoder::{Decoder, Document, Ran};
use crate::device::Gpu as Opened;
use crate::error::{BaseError, Result};
use crate::generate::{Held, KvCache};
use crate::gradients::Gradients;
use crate::params::ParamStore;
use crate::projection::Setting;
use crate::rope::Spread;

/// A GPU, with the parameters of one decoder or network on it. Clones are the same.
#[derive(Clone)]
pub(crate) struct Gpu {
    opened: Arc<Opened>,
    parameters: Arc<Parameters>,
}

impl Gpu {
    /// For one model, whose parameters are copied when passes need them.
    pub fn new(opened: &Arc<Opened>) -> Self {
        Self { opened: opened.clone(), parameters: Arc::default() }
    }

    fn kernels(&self) -> &Kernels {
        &self.opened.device
    }

    fn products(&self) -> &Blas {
        &self.opened.products
    }
}

/// Gradients by parameter while a step runs.
#[derive(Default)]
pub(crate) struct GpuGradients {
    on_device: BTreeMap<String, CudaSlice<f32>>,
    /// Those that the host makes.
    host: Gradients,
}

impl GpuGradients {
    /// Takes the buffer of a parameter of `len` values out, zeroed when new; [`GpuGradients::put`] brings it back.
    fn take(&mut self, device: &Kernels, name: &str, len: usize) -> Result<CudaSlice<f32>> {
        match self.on_device.remove(name) {
            Some(buffer) => Ok(buffer),
            None => Ok(device.zeros(len)?),
        }
    }

    fn put(&mut self, name: String, buffer: CudaSlice<f32>) {
        self.on_device.insert(name, buffer);
    }

    /// The buffer of a parameter of `len` values, zeroed when new.
    fn of(&mut self, device: &Kernels, name: &str, len: usize) -> Result<&mut CudaSlice<f32>> {
        let buffer = self.take(device, name, len)?;
        Ok(self.on_device.entry(name.to_string()).insert_entry(buffer).into_mut())
    }
}

/// Rotation tables on the device, cosines and sines.
pub(crate) struct GpuTables {
    global: [CudaSlice<f32>; 2],
    local: Option<[CudaSlice<f32>; 2]>,
}

fn activation(mlp: Mlp) -> mlp::Activation {
    match mlp {
        Mlp::SwiGlu => mlp::Activation::SwiGlu,
        Mlp::GeGlu => mlp::Activation::GeGlu,
        Mlp::Gelu => mlp::Activation::Gelu,
        Mlp::GeluTanh => mlp::Activation::GeluTanh,
        Mlp::Relu2 => mlp::Activation::Relu2,
    }
}

impl Machine for Gpu {
    type Buffer<X: Activation> = GpuBuffer<X>;
    type Norm<'a> = GpuNorm;
    type Linear<'a> = GpuLinear<'a>;
    type Scratch = LinearRooms;
    type Tables<'a> = GpuTables;
    type Within = GpuAttention;
    type Continuing = GpuAttention;
    type Cached = GpuCached;
    type Gradients = GpuGradients;
    type Heads<S: Activation> = S;
    type Hidden = GpuBuffer<f32>;

    fn scratch<S: Activation>(buffers: &mut Buffers) -> &mut Scratch<Self, S> {
        S::scratch(&mut buffers.gpu)
    }

    fn ran<S: Activation>(document: &Document) -> &Ran<Self, S> {
        S::ran(&document.gpu)
    }

    fn ran_mut<S: Activation>(document: &mut Document) -> &mut Ran<Self, S> {
        S::ran_mut(&mut document.gpu)
    }

    fn held<S: Activation>(cache: &mut KvCache) -> &mut Held<Self, S> {
        S::held(&mut cache.gpu)
    }

    fn held_in<S: Activation>(cache: &KvCache) -> &Held<Self, S> {
        S::held_in(&cache.gpu)
    }

    fn with_gradients<R>(
        &self,
        host: &mut Gradients,
        step: impl FnOnce(&mut GpuGradients) -> Result<R>,
    ) -> Result<R> {
        let mut made = GpuGradients::default();
        let result = step(&mut made)?;
        if host.stay() {
            host.arrive(self, made.on_device, &made.host)?;
            return Ok(result);
        }
        let mut arrived = Vec::with_capacity(made.on_device.len());
        for (name, gradient) in &made.on_device {
            arrived.push((name, self.kernels().download(gradient)?));
        }
        for (name, gradient) in arrived {
            host.add(name, &gradient);
        }
        for name in made.host.names() {
            host.add(name, made.host.get(name).unwrap_or_default());
        }
        Ok(result)
    }

    fn scratch_bytes(scratch: &LinearRooms) -> u64 {
        scratch.bytes()
    }

    fn len<X: Activation>(buffer: &GpuBuffer<X>) -> usize {
        buffer.len()
    }

    fn bytes<X: Activation>(buffer: &GpuBuffer<X>) -> u64 {
        buffer.bytes()
    }

    fn size<X: Activation>(&self, buffer: &mut GpuBuffer<X>, len: usize) -> Result<()> {
        buffer.size(self.kernels(), len)
    }

    fn zeros(&self, buffer: &mut GpuBuffer<f32>, len: usize) -> Result<()> {
        buffer.size(self.kernels(), len)?;
        self.kernels()
            .stream()
            .memset_zeros(&mut buffer.view_mut()?)
            .map_err(|error| BaseError::Device { message: format!("clearing {len} values: {error}") })
    }

    fn copy<X: Activation>(&self, from: &GpuBuffer<X>, to: &mut GpuBuffer<X>) -> Result<()> {
        to.size(self.kernels(), from.len())?;
        Ok(rows::convert(self.kernels(), &from.view()?, &mut to.view_mut()?)?)
    }

    fn add<X: Activation>(&self, x: &GpuBuffer<X>, y: &mut GpuBuffer<X>) -> Result<()> {
        Ok(rows::add_assign(self.kernels(), &x.view()?, &mut y.view_mut()?)?)
    }

    fn read<X: Activation>(&self, values: &[f32], into: &mut GpuBuffer<X>) -> Result<()> {
        into.size(self.kernels(), values.len())?;
        if values.is_empty() {
            return Ok(());
        }
        let given = self.kernels().upload(values)?;
        Ok(rows::convert(self.kernels(), &given, &mut into.view_mut()?)?)
    }

    fn rows_of<X: Activation>(
        &self,
        from: &GpuBuffer<X>,
        width: usize,
        places: &[u32],
        out: &mut GpuBuffer<X>,
    ) -> Result<()> {
        out.size(self.kernels(), places.len() * width)?;
        Ok(embedding::gather(self.kernels(), &from.view()?, width, places, &mut out.view_mut()?)?)
    }

    fn to_host<X: Activation>(&self, buffer: &GpuBuffer<X>) -> Result<Vec<f32>> {
        let mut wide = GpuBuffer::<f32>::default();
        let values = buffer::stored_as::<_, f32>(self.kernels(), buffer.view()?, &mut wide)?;
        Ok(self.kernels().download(&values)?)
    }

    fn norm<'a>(
        &'a self,
        kind: NormKind,
        module: &str,
        width: usize,
        eps: f64,
        params: &'a ParamStore,
    ) -> Result<GpuNorm> {
        GpuNorm::new(self, kind, module, width, eps, params)
    }

    fn plain_norm(&self, width: usize, eps: f64) -> Result<GpuNorm> {
        GpuNorm::plain(self, width, eps)
    }

    fn norm_forward<S: Activation>(
        &self,
        norm: &GpuNorm,
        x: &GpuBuffer<S>,
        out: &mut GpuBuffer<S>,
    ) -> Result<()> {
        norm.forward(self.kernels(), x, out)
    }

    fn norm_backward<S: Activation>(
        &self,
        norm: &GpuNorm,
        x: &GpuBuffer<S>,
        g: &GpuBuffer<f32>,
        dx: &mut GpuBuffer<f32>,
        gradients: &mut GpuGradients,
    ) -> Result<()> {
        norm.backward(self.kernels(), x, g, dx, gradients)
    }

    fn heads_norm_backward<S: Activation>(
        &self,
        norm: &GpuNorm,
        x: &GpuBuffer<S>,
        d: &mut GpuBuffer<S>,
        room: &mut GpuBuffer<f32>,
        gradients: &mut GpuGradients,
    ) -> Result<()> {
        let mut g = GpuBuffer::<f32>::default();
        g.size(self.kernels(), d.len())?;
        rows::convert(self.kernels(), &d.view()?, &mut g.view_mut()?)?;
        self.zeros(room, d.len())?;
        norm.backward(self.kernels(), x, &g, room, gradients)?;
        Ok(rows::convert(self.kernels(), &room.view()?, &mut d.view_mut()?)?)
    }

    fn hidden_backward<S: Activation>(
        &self,
        norm: &GpuNorm,
        x: &GpuBuffer<S>,
        g: &GpuBuffer<f32>,
        dx: &mut GpuBuffer<f32>,
        gradients: &mut GpuGradients,
    ) -> Result<()> {
        norm.backward(self.kernels(), x, g, dx, gradients)
    }

    fn linear<'a>(&'a self, name: &str, setting: Setting<'a>) -> Result<GpuLinear<'a>> {
        GpuLinear::new(name, setting)
    }

    fn linear_forward<S: Activation>(
        &self,
        linear: &GpuLinear<'_>,
        x: &GpuBuffer<S>,
        y: &mut GpuBuffer<S>,
        add: bool,
        scratch: &mut LinearRooms,
    ) -> Result<()> {
        match linear.setting.products {
            Products::F32 => linear.forward::<f32, S>(self, x, y, add, scratch),
            Products::Bf16 => linear.forward::<bf16, S>(self, x, y, add, scratch),
        }
    }

    fn linear_backward<S: Activation, G: Activation>(
        &self,
        linear: &GpuLinear<'_>,
        x: &GpuBuffer<S>,
        g: &GpuBuffer<G>,
        dx: Option<(&mut GpuBuffer<f32>, bool)>,
        scratch: &mut LinearRooms,
        gradients: &mut GpuGradients,
    ) -> Result<()> {
        match linear.setting.products {
            Products::F32 => linear.backward::<f32, S, G>(self, x, g, dx, scratch, gradients),
            Products::Bf16 => linear.backward::<bf16, S, G>(self, x, g, dx, scratch, gradients),
        }
    }

    fn within(&self, spec: &AttentionSpec, rows: &Rows) -> Result<GpuAttention> {
        GpuAttention::within(self, spec, rows)
    }

    fn continuing(&self, spec: &AttentionSpec, entries: usize, rows: &Continuations) -> Result<GpuAttention> {
        GpuAttention::continuing(self, spec, entries, rows)
    }

    fn caching(&self, spec: &AttentionSpec, capacity: usize, rows: &[CachedRow]) -> Result<GpuCached> {
        GpuCached::new(self, spec, capacity, rows)
    }

    fn attend<S: Activation>(
        &self,
        how: &GpuAttention,
        qkv: [&GpuBuffer<S>; 3],
        out: &mut GpuBuffer<S>,
        lse: &mut GpuBuffer<f32>,
    ) -> Result<()> {
        how.forward(self, qkv, None, out, lse)
    }

    fn attend_back<S: Activation>(
        &self,
        how: &GpuAttention,
        qkv: [&GpuBuffer<S>; 3],
        mixed: (&GpuBuffer<S>, &GpuBuffer<f32>),
        d_mixed: &GpuBuffer<f32>,
        into: [&mut GpuBuffer<S>; 3],
    ) -> Result<()> {
        how.backward(self, qkv, None, Backward { mixed, d_mixed, into })
    }

    fn attend_on<S: Activation>(
        &self,
        how: &GpuAttention,
        qkv: [&GpuBuffer<S>; 3],
        document: &KeysValues<Self, S>,
        out: &mut GpuBuffer<S>,
        lse: &mut GpuBuffer<f32>,
    ) -> Result<()> {
        how.forward(self, qkv, Some(document), out, lse)
    }

    fn attend_on_back<S: Activation>(
        &self,
        how: &GpuAttention,
        qkv: [&GpuBuffer<S>; 3],
        document: &KeysValues<Self, S>,
        mixed: (&GpuBuffer<S>, &GpuBuffer<f32>),
        d_mixed: &GpuBuffer<f32>,
        into: [&mut GpuBuffer<S>; 3],
    ) -> Result<()> {
        how.backward(self, qkv, Some(document), Backward { mixed, d_mixed, into })
    }

    fn attend_cached<S: Activation>(
        &self,
        how: &GpuCached,
        qkv: [&GpuBuffer<S>; 3],
        cache: &mut KeysValues<Self, S>,
        out: &mut GpuBuffer<S>,
        lse: &mut GpuBuffer<f32>,
    ) -> Result<()> {
        how.forward(self, qkv, cache, out, lse)
    }

    fn tables<'a>(&self, tables: Tables<'a>) -> Result<GpuTables> {
        let pair = |[cos, sin]: [&[f32]; 2]| -> Result<[CudaSlice<f32>; 2]> {
            let upload = |values: &[f32]| -> Result<CudaSlice<f32>> {
                // A model without rotation has tables of no width.
                let none = [0f32];
                let values = if values.is_empty() { &none } else { values };
                Ok(self.kernels().upload(values)?)
            };
            Ok([upload(cos)?, upload(sin)?])
        };
        Ok(GpuTables { global: pair(tables.global)?, local: tables.local.map(pair).transpose()? })
    }

    fn rotate<X: Activation>(
        &self,
        x: &mut GpuBuffer<X>,
        heads: usize,
        widths: [usize; 2],
        tables: &GpuTables,
        rotation: Rotation,
        direction: f32,
    ) -> Result<()> {
        let [cos, sin] = match rotation {
            Rotation::None => return Ok(()),
            Rotation::Global => &tables.global,
            Rotation::Local => tables.local.as_ref().ok_or_else(no_local_tables)?,
        };
        Ok(rope::rotate(self.kernels(), &mut x.view_mut()?, heads, widths, [cos, sin], direction)?)
    }

    fn spread_backward<S: Activation>(
        &self,
        spread: &Spread,
        rotation: Rotation,
        turned: &GpuBuffer<S>,
        d: &GpuBuffer<S>,
        [heads, width]: [usize; 2],
        gradients: &mut GpuGradients,
    ) -> Result<()> {
        let Some(omega_squared) = spread.omega_squared(rotation) else { return Ok(()) };
        let device = self.kernels();
        let omega_squared = device.upload(omega_squared)?;
        let mut sums = device.zeros::<f64>(spread.entries())?;
        let mut room = GpuBuffer::<f32>::default();
        let d = buffer::stored_as::<_, f32>(device, d.view()?, &mut room)?;
        rope::damping_gradient(device, &turned.view()?, &d, heads, width, &omega_squared, &mut sums)?;
        spread.add(&device.download(&sums)?, &mut gradients.host);
        Ok(())
    }

    fn activate<S: Activation>(
        &self,
        mlp: Mlp,
        gate: &GpuBuffer<S>,
        up: &GpuBuffer<S>,
        out: &mut GpuBuffer<S>,
    ) -> Result<()> {
        out.size(self.kernels(), up.len())?;
        let gate = if mlp.gated() { Some(gate.view()?) } else { None };
        let out = &mut out.view_mut()?;
        Ok(mlp::forward(self.kernels(), activation(mlp), gate.as_ref(), &up.view()?, out)?)
    }

    fn activate_back<S: Activation>(
        &self,
        mlp: Mlp,
        gate: &mut GpuBuffer<S>,
        up: &mut GpuBuffer<S>,
        g: &GpuBuffer<f32>,
    ) -> Result<()> {
        let mut gate = if mlp.gated() { Some(gate.view_mut()?) } else { None };
        let (up, g) = (&mut up.view_mut()?, g.view()?);
        Ok(mlp::backward_in_place(self.kernels(), activation(mlp), gate.as_mut(), up, &g)?)
    }

    fn split_heads<S: Activation>(
        &self,
        fused: &GpuBuffer<S>,
        [heads, width]: [usize; 2],
        [q, k, v]: [&mut GpuBuffer<S>; 3],
    ) -> Result<()> {
        for part in [&mut *q, &mut *k, &mut *v] {
            part.size(self.kernels(), fused.len() / 3)?;
        }
        let parts = [&mut q.view_mut()?, &mut k.view_mut()?, &mut v.view_mut()?];
        Ok(rows::split_heads(self.kernels(), &fused.view()?, width, heads, parts)?)
    }

    fn join_heads<S: Activation>(
        &self,
        [q, k, v]: [&GpuBuffer<S>; 3],
        [heads, width]: [usize; 2],
        fused: &mut GpuBuffer<f32>,
    ) -> Result<()> {
        let mut joined = GpuBuffer::<S>::default();
        joined.size(self.kernels(), 3 * q.len())?;
        let parts = [&q.view()?, &k.view()?, &v.view()?];
        rows::join_heads(self.kernels(), parts, width, heads, &mut joined.view_mut()?)?;
        fused.size(self.kernels(), joined.len())?;
        Ok(rows::convert(self.kernels(), &joined.view()?, &mut fused.view_mut()?)?)
    }

    fn gather<S: Activation>(&self, decoder: &Decoder, tokens: &[u32], out: &mut GpuBuffer<S>) -> Result<()> {
        self.gather_tokens(decoder, tokens, out)
    }

    fn embedding_gradients(
        &self,
        decoder: &Decoder,
        d: &mut GpuBuffer<f32>,
        tokens: &[u32],
        gradients: &mut GpuGradients,
    ) -> Result<()> {
        self.scatter_tokens(decoder, d, tokens, gradients)
    }

    fn logits<S: Activation>(&self, decoder: &Decoder, hidden: &GpuBuffer<S>) -> Result<Vec<f32>> {
        self.logits_of(decoder, hidden)
    }

    fn head_loss<S: Activation>(
        &self,
        decoder: &Decoder,
        hidden: &GpuBuffer<S>,
        scored: Scored,
        scale: f32,
        dropout_seed: Option<u64>,
        parts: Option<&mut GpuGradients>,
    ) -> Result<Loss<GpuBuffer<f32>>> {
        self.cross_entropy(decoder, hidden, scored, scale, dropout_seed, parts)
    }

    fn divergence<S: Activation>(
        &self,
        decoder: &Decoder,
        hidden: &GpuBuffer<S>,
        scored: &[usize],
        teacher: Teacher<'_, Self, S>,
        wanted: Wanted<'_, GpuBuffer<f32>>,
    ) -> Result<Vec<f32>> {
        self.divergence_from(decoder, hidden, scored, teacher, wanted)
    }

    fn no_gradient(&self, len: usize) -> Result<GpuBuffer<f32>> {
        let mut none = GpuBuffer::default();
        self.zeros(&mut none, len)?;
        Ok(none)
    }

    fn add_hidden(&self, d: &GpuBuffer<f32>, into: &mut GpuBuffer<f32>) -> Result<()> {
        self.add(d, into)
    }
}
