//! The processor as a [`Machine`]: buffers are memory mapped from the system, operations are the kernels' on slices.

use megacontext_kernels::attention::Rows;
use megacontext_kernels::attention::decode::{Cache, CacheAttention, CachedRow};
use megacontext_kernels::attention::prefix::{Continuations, Own, PrefixAttention};
use megacontext_kernels::attention::slices::Prepared;
use megacontext_kernels::gelu::{
    Gelu, geglu_backward_in_place, geglu_into, gelu_backward_in_place, gelu_into,
};
use megacontext_kernels::loss::Gradient;
use megacontext_kernels::{linear, mlp, rope, rows};

use super::{AttentionSpec, Loss, Machine, Scored, Teacher, Wanted};
use crate::architecture::{Mlp, NormKind, Rotation};
use crate::block::Tables;
use crate::buffers::{Activation, Buffer, Buffers, KeysValues, Scratch};
use crate::decoder::{Decoder, Document, Ran};
use crate::error::{BaseError, Result};
use crate::generate::{Held, KvCache};
use crate::gradients::Gradients;
use crate::norms::Norm;
use crate::params::ParamStore;
use crate::projection::{Projection, Setting};
use crate::rope::Spread;

/// The processor.
pub(crate) struct Host;

/// Row `at` of rows of `width` values, for each of `places`.
fn rows_of<S: Copy>(from: &[S], places: impl Iterator<Item = usize>, width: usize) -> Vec<S> {
    places.flat_map(|at| from[at * width..][..width].iter().copied()).collect()
}

impl Machine for Host {
    type Buffer<X: Activation> = Buffer<X>;
    type Norm<'a> = Norm<'a>;
    type Linear<'a> = Projection<'a>;
    type Scratch = linear::Scratch;
    type Tables<'a> = Tables<'a>;
    type Within = Prepared;
    type Continuing = PrefixAttention;
    type Cached = CacheAttention;
    type Gradients = Gradients;
    type Heads<S: Activation> = f32;
    type Hidden = Vec<f32>;

    fn scratch<S: Activation>(buffers: &mut Buffers) -> &mut Scratch<Self, S> {
        S::scratch(&mut buffers.host)
    }

    fn ran<S: Activation>(document: &Document) -> &Ran<Self, S> {
        S::ran(&document.host)
    }

    fn ran_mut<S: Activation>(document: &mut Document) -> &mut Ran<Self, S> {
        S::ran_mut(&mut document.host)
    }

    fn held<S: Activation>(cache: &mut KvCache) -> &mut Held<Self, S> {
        S::held(&mut cache.host)
    }

    fn held_in<S: Activation>(cache: &KvCache) -> &Held<Self, S> {
        S::held_in(&cache.host)
    }

    fn with_gradients<R>(
        &self,
        host: &mut Gradients,
        step: impl FnOnce(&mut Gradients) -> Result<R>,
    ) -> Result<R> {
        step(host)
    }

    fn scratch_bytes(scratch: &linear::Scratch) -> u64 {
        scratch.bytes()
    }

    fn len<X: Activation>(buffer: &Buffer<X>) -> usize {
        buffer.len()
    }

    fn bytes<X: Activation>(buffer: &Buffer<X>) -> u64 {
        buffer.bytes()
    }

    fn size<X: Activation>(&self, buffer: &mut Buffer<X>, len: usize) -> Result<()> {
        buffer.sized(len).map(|_| ())
    }

    fn zeros(&self, buffer: &mut Buffer<f32>, len: usize) -> Result<()> {
        buffer.sized(len)?.fill(0.0);
        Ok(())
    }

    fn copy<X: Activation>(&self, from: &Buffer<X>, to: &mut Buffer<X>) -> Result<()> {
        rows::copy(from, to.sized(from.len())?);
        Ok(())
    }

    fn add<X: Activation>(&self, x: &Buffer<X>, y: &mut Buffer<X>) -> Result<()> {
        rows::add_assign(x, y);
        Ok(())
    }

    fn read<X: Activation>(&self, values: &[f32], into: &mut Buffer<X>) -> Result<()> {
        for (into, value) in into.sized(values.len())?.iter_mut().zip(values) {
            *into = X::put(*value);
        }
        Ok(())
    }

    fn rows_of<X: Activation>(
        &self,
        from: &Buffer<X>,
        width: usize,
        places: &[u32],
        out: &mut Buffer<X>,
    ) -> Result<()> {
        let out = out.sized(places.len() * width)?;
        for (out, place) in out.chunks_exact_mut(width).zip(places) {
            out.copy_from_slice(&from[*place as usize * width..][..width]);
        }
        Ok(())
    }

    fn to_host<X: Activation>(&self, buffer: &Buffer<X>) -> Result<Vec<f32>> {
        Ok(buffer.iter().map(|value| value.get()).collect())
    }

    fn norm<'a>(
        &'a self,
        kind: NormKind,
        module: &str,
        width: usize,
        eps: f64,
        params: &'a ParamStore,
    ) -> Result<Norm<'a>> {
        Norm::new(kind, module, width, eps, params)
    }

    fn plain_norm(&self, width: usize, eps: f64) -> Result<Norm<'_>> {
        Ok(Norm::plain(width, eps))
    }

    fn norm_forward<S: Activation>(&self, norm: &Norm, x: &Buffer<S>, out: &mut Buffer<S>) -> Result<()> {
        norm.forward(x, out.sized(x.len())?)
    }

    fn norm_backward<S: Activation>(
        &self,
        norm: &Norm,
        x: &Buffer<S>,
        g: &Buffer<f32>,
        dx: &mut Buffer<f32>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        norm.backward(x, g, dx, gradients)
    }

    fn heads_norm_backward<S: Activation>(
        &self,
        norm: &Norm,
        x: &Buffer<S>,
        d: &mut Buffer<f32>,
        room: &mut Buffer<f32>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let dx = room.sized(d.len())?;
        dx.fill(0.0);
        norm.backward(x, d, dx, gradients)?;
        rows::copy(dx, d);
        Ok(())
    }

    fn hidden_backward<S: Activation>(
        &self,
        norm: &Norm,
        x: &Buffer<S>,
        g: &Vec<f32>,
        dx: &mut Buffer<f32>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        norm.backward(x, g, dx, gradients)
    }

    fn linear<'a>(&'a self, name: &str, setting: Setting<'a>) -> Result<Projection<'a>> {
        Projection::new(name, setting)
    }

    fn linear_forward<S: Activation>(
        &self,
        linear: &Projection,
        x: &Buffer<S>,
        y: &mut Buffer<S>,
        add: bool,
        scratch: &mut linear::Scratch,
    ) -> Result<()> {
        if add { linear.forward_add(x, y, scratch) } else { linear.forward(x, y, scratch) }
    }

    fn linear_backward<S: Activation, G: Activation>(
        &self,
        linear: &Projection,
        x: &Buffer<S>,
        g: &Buffer<G>,
        dx: Option<(&mut Buffer<f32>, bool)>,
        scratch: &mut linear::Scratch,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let dx = match dx {
            None => None,
            Some((dx, add)) => Some((dx.sized(x.len())?, add)),
        };
        linear.backward(x, g, dx, scratch, gradients)
    }

    fn within(&self, spec: &AttentionSpec, rows: &Rows) -> Result<Prepared> {
        let prepared =
            Prepared::new(spec.sizes, spec.scale, spec.pattern, rows)?.with_products(spec.products);
        Ok(match spec.slopes {
            None => prepared,
            Some((slopes, None)) => prepared.with_slopes(slopes)?,
            Some((slopes, Some(positions))) => prepared.with_slopes(slopes)?.with_positions(positions)?,
        })
    }

    fn continuing(
        &self,
        spec: &AttentionSpec,
        entries: usize,
        rows: &Continuations,
    ) -> Result<PrefixAttention> {
        let made = PrefixAttention::new(spec.sizes, entries, spec.scale, spec.pattern, rows.clone())?;
        Ok(made.with_products(spec.products))
    }

    fn caching(&self, spec: &AttentionSpec, _: usize, rows: &[CachedRow]) -> Result<CacheAttention> {
        let [_, _, heads, kv_heads, width] = spec.sizes;
        let made = CacheAttention::new([heads, kv_heads, width], spec.scale, spec.pattern, rows.to_vec())?
            .with_products(spec.products);
        Ok(match spec.slopes {
            None => made,
            Some((slopes, _)) => made.with_slopes(slopes)?,
        })
    }

    fn attend<S: Activation>(
        &self,
        how: &Prepared,
        [q, k, v]: [&Buffer<S>; 3],
        out: &mut Buffer<S>,
        lse: &mut Buffer<f32>,
    ) -> Result<()> {
        how.forward_to(q, k, v, out, lse);
        Ok(())
    }

    fn attend_back<S: Activation>(
        &self,
        how: &Prepared,
        [q, k, v]: [&Buffer<S>; 3],
        (out, lse): (&Buffer<S>, &Buffer<f32>),
        d_mixed: &Buffer<f32>,
        [dq, dk, dv]: [&mut Buffer<f32>; 3],
    ) -> Result<()> {
        how.backward_to([q, k, v], out, lse, d_mixed, [dq, dk, dv]);
        Ok(())
    }

    fn attend_on<S: Activation>(
        &self,
        how: &PrefixAttention,
        [q, k, v]: [&Buffer<S>; 3],
        document: &KeysValues<Self, S>,
        out: &mut Buffer<S>,
        lse: &mut Buffer<f32>,
    ) -> Result<()> {
        how.forward_to(Own { q, k, v }, document.document(), out, lse);
        Ok(())
    }

    fn attend_on_back<S: Activation>(
        &self,
        how: &PrefixAttention,
        [q, k, v]: [&Buffer<S>; 3],
        document: &KeysValues<Self, S>,
        (out, lse): (&Buffer<S>, &Buffer<f32>),
        d_mixed: &Buffer<f32>,
        [dq, dk, dv]: [&mut Buffer<f32>; 3],
    ) -> Result<()> {
        how.backward_to(Own { q, k, v }, document.document(), out, lse, d_mixed, [dq, dk, dv]);
        Ok(())
    }

    fn attend_cached<S: Activation>(
        &self,
        how: &CacheAttention,
        [q, k, v]: [&Buffer<S>; 3],
        cache: &mut KeysValues<Self, S>,
        out: &mut Buffer<S>,
        lse: &mut Buffer<f32>,
    ) -> Result<()> {
        let (mut from, width) = (0, k.len() / how.entries().max(1));
        for row in how.rows() {
            let (to, len) = ((row.first + row.past) * width, row.entries * width);
            cache.k[to..][..len].copy_from_slice(&k[from..][..len]);
            cache.v[to..][..len].copy_from_slice(&v[from..][..len]);
            from += len;
        }
        how.forward_to(q, Cache { k: &cache.k, v: &cache.v }, out, lse);
        Ok(())
    }

    fn tables<'a>(&self, tables: Tables<'a>) -> Result<Tables<'a>> {
        Ok(tables)
    }

    fn rotate<X: Activation>(
        &self,
        x: &mut Buffer<X>,
        heads: usize,
        widths: [usize; 2],
        tables: &Tables,
        rotation: Rotation,
        direction: f32,
    ) -> Result<()> {
        if let Some([cos, sin]) = tables.of(rotation)? {
            rope::rotate_part(x, heads, widths, cos, sin, direction);
        }
        Ok(())
    }

    fn spread_backward<S: Activation>(
        &self,
        spread: &Spread,
        rotation: Rotation,
        turned: &Buffer<S>,
        d: &Buffer<f32>,
        [heads, width]: [usize; 2],
        gradients: &mut Gradients,
    ) -> Result<()> {
        spread.backward(rotation, turned, d, heads, width, gradients);
        Ok(())
    }

    fn activate<S: Activation>(
        &self,
        mlp: Mlp,
        gate: &Buffer<S>,
        up: &Buffer<S>,
        out: &mut Buffer<S>,
    ) -> Result<()> {
        let out = out.sized(up.len())?;
        match mlp {
            Mlp::SwiGlu => mlp::swiglu_into(gate, up, out),
            Mlp::GeGlu => geglu_into(Gelu::Tanh, gate, up, out),
            Mlp::Gelu => gelu_into(Gelu::Exact, up, out),
            Mlp::GeluTanh => gelu_into(Gelu::Tanh, up, out),
            Mlp::Relu2 => mlp::relu2_into(up, out),
        }
        Ok(())
    }

    fn activate_back<S: Activation>(
        &self,
        mlp: Mlp,
        gate: &mut Buffer<S>,
        up: &mut Buffer<S>,
        g: &Buffer<f32>,
    ) -> Result<()> {
        match mlp {
            Mlp::SwiGlu => mlp::swiglu_backward_in_place(gate, up, g),
            Mlp::GeGlu => geglu_backward_in_place(Gelu::Tanh, gate, up, g),
            Mlp::Gelu => gelu_backward_in_place(Gelu::Exact, up, g),
            Mlp::GeluTanh => gelu_backward_in_place(Gelu::Tanh, up, g),
            Mlp::Relu2 => mlp::relu2_backward_in_place(up, g),
        }
        Ok(())
    }

    fn split_heads<S: Activation>(
        &self,
        fused: &Buffer<S>,
        [heads, width]: [usize; 2],
        [q, k, v]: [&mut Buffer<S>; 3],
    ) -> Result<()> {
        let len = fused.len() / 3;
        rows::split_heads(fused, width, heads, [q.sized(len)?, k.sized(len)?, v.sized(len)?]);
        Ok(())
    }

    fn join_heads<S: Activation>(
        &self,
        [q, k, v]: [&Buffer<f32>; 3],
        [heads, width]: [usize; 2],
        fused: &mut Buffer<f32>,
    ) -> Result<()> {
        rows::join_heads([q, k, v], width, heads, fused.sized(3 * q.len())?);
        Ok(())
    }

    fn gather<S: Activation>(&self, decoder: &Decoder, tokens: &[u32], out: &mut Buffer<S>) -> Result<()> {
        decoder.gather(tokens, out.sized(tokens.len() * decoder.config().hidden_size)?)
    }

    fn embedding_gradients(
        &self,
        decoder: &Decoder,
        d: &mut Buffer<f32>,
        tokens: &[u32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        decoder.embedding_gradients(d, tokens, gradients)
    }

    fn logits<S: Activation>(&self, decoder: &Decoder, hidden: &Buffer<S>) -> Result<Vec<f32>> {
        decoder.logits_of(hidden)
    }

    fn head_loss<S: Activation>(
        &self,
        decoder: &Decoder,
        hidden: &Buffer<S>,
        scored: Scored,
        scale: f32,
        dropout_seed: Option<u64>,
        parts: Option<&mut Gradients>,
    ) -> Result<Loss<Vec<f32>>> {
        decoder.head_loss(hidden, scored, scale, dropout_seed, parts)
    }

    fn divergence<S: Activation>(
        &self,
        decoder: &Decoder,
        hidden: &Buffer<S>,
        scored: &[usize],
        teacher: Teacher<'_, Self, S>,
        wanted: Wanted<'_, Vec<f32>>,
    ) -> Result<Vec<f32>> {
        let width = decoder.config().hidden_size;
        let student = rows_of(hidden, scored.iter().copied(), width);
        let weights: Option<Vec<f32>> = wanted
            .as_ref()
            .and_then(|(_, weights, _)| *weights)
            .map(|weights| scored.iter().map(|at| weights[*at]).collect());
        let gradient = match &wanted {
            None => Gradient::Skip,
            Some((scale, ..)) => Gradient::Hidden { scale: *scale },
        };
        let found = match teacher {
            Teacher::Given(values) => {
                decoder.head_divergence(&student, values, weights.as_deref(), gradient)?
            }
            Teacher::RowsOf(values, places) => {
                let says = rows_of(values, places.iter().copied(), width);
                decoder.head_divergence(&student, &says, weights.as_deref(), gradient)?
            }
        };
        if let (Some((.., into)), Some(d)) = (wanted, &found.d_hidden) {
            for (at, d) in scored.iter().zip(d.chunks_exact(width)) {
                for (into, d) in into[at * width..][..width].iter_mut().zip(d) {
                    *into += d;
                }
            }
        }
        Ok(found.kl)
    }

    fn no_gradient(&self, len: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; len])
    }

    fn add_hidden(&self, d: &Vec<f32>, into: &mut Vec<f32>) -> Result<()> {
        rows::add_assign(d, into);
        Ok(())
    }
}

impl Tables<'_> {
    /// Cosines and sines of blocks that turn so; none where they do not turn.
    pub(crate) fn of(&self, rotation: Rotation) -> Result<Option<[&[f32]; 2]>> {
        match rotation {
            Rotation::None => Ok(None),
            Rotation::Global => Ok(Some(self.global)),
            Rotation::Local => self.local.map(Some).ok_or_else(no_local_tables),
        }
    }
}

/// What is said where blocks turn by a base of their own and there are no tables of it.
pub(crate) fn no_local_tables() -> BaseError {
    BaseError::Input {
        message: "rope tables: expected tables of the blocks with a base of their own, got none".to_string(),
    }
}
