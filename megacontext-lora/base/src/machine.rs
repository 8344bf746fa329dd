//! What the decoder's blocks ask of the machine that they run on.
//!
//! A block, a pass and a training step are written once ([`crate::block`], [`crate::decoder`]); what they are made of, buffers and
//! the operations on them, is a [`Machine`]'s: the processor's ([`Host`], the kernels' slices) or a GPU's (`Gpu`, the
//! kernels' `cuda`). Parameters as they are stored are the host's on every machine.
//!
//! Shapes: N = B·T entries; E model width, H query heads, G kv heads, D head width, F feed-forward width; row-major.
//! S is the storage of activations; gradients of the stream, of norms' inputs and of parameters are f32, those of queries, keys and
//! values are [`Machine::Heads`].
//! Errors: no memory; a parameter that is missing or stored otherwise; what a device cannot do.

#[cfg(feature = "cuda")]
pub(crate) mod gpu;
mod host;

use megacontext_kernels::attention::decode::CachedRow;
use megacontext_kernels::attention::prefix::Continuations;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::gemm::Products;

use crate::architecture::{Mlp, NormKind, Rotation};
use crate::block::Tables;
use crate::buffers::{Activation, Buffers, KeysValues, Scratch};
use crate::decoder::{Decoder, Document, Ran};
use crate::error::Result;
use crate::generate::{Held, KvCache};
use crate::gradients::Gradients;
use crate::params::ParamStore;
use crate::projection::Setting;
use crate::rope::Spread;

pub(crate) use host::Host;

/// How a pass attends, as it was asked for.
pub(crate) struct AttentionSpec<'a> {
    /// B, T, H, G, D.
    pub sizes: [usize; 5],
    /// Of scores.
    pub scale: f64,
    /// Which keys a query sees.
    pub pattern: Pattern,
    /// How products are computed.
    pub products: Products,
    /// ALiBi's slopes, one for each query head, and the places of a row's entries where they are not 0, 1, 2 …
    pub slopes: Option<(&'a [f32], Option<&'a [f32]>)>,
}

/// What a loss is of: tokens that should follow, and weights.
#[derive(Clone, Copy)]
pub(crate) struct Scored<'a> {
    /// The next token of each entry, `IGNORE` where nothing is scored.
    pub targets: &'a [u32],
    /// Weight of each entry; none means 1.
    pub weights: Option<&'a [f32]>,
}

/// A cross-entropy over the output head.
pub(crate) struct Loss<D> {
    /// NLL of every entry in nats, 0 where nothing is scored.
    pub nll: Vec<f32>,
    /// Scored entries.
    pub count: usize,
    /// The gradient of the hidden states, where a scale other than 0 was given.
    pub d_hidden: Option<D>,
}

impl<D> Loss<D> {
    /// Σ NLL, nats.
    pub fn sum(&self) -> f64 {
        self.nll.iter().map(|nll| f64::from(*nll)).sum()
    }
}

/// Hidden states that a divergence is from, one row of E values for each scored entry.
pub(crate) enum Teacher<'a, M: Machine, S: Activation> {
    /// Values of the host's.
    Given(&'a [f32]),
    /// Rows of these numbers.
    RowsOf(&'a M::Buffer<S>, &'a [usize]),
}

/// A divergence's gradient, where it is wanted: its scale, weights of all entries, and what it is added to.
pub(crate) type Wanted<'a, D> = Option<(f32, Option<&'a [f32]>, &'a mut D)>;

/// Buffers, and what the decoder does with them.
pub(crate) trait Machine: Sized {
    /// Values that were made by the machine, and stay in its memory.
    type Buffer<X: Activation>: Default;
    /// A norm, its parameters looked up.
    type Norm<'a>
    where
        Self: 'a;
    /// A linear layer, its parameters looked up.
    type Linear<'a>
    where
        Self: 'a;
    /// What linear layers work in.
    type Scratch: Default;
    /// Rotation tables.
    type Tables<'a>;
    /// Attention within rows, checked.
    type Within;
    /// Attention of rows that continue a document, checked.
    type Continuing;
    /// Attention of new entries over the caches of their rows, checked.
    type Cached;
    /// Gradients by parameter, while a step runs.
    type Gradients;
    /// Storage of the gradients of queries, keys and values.
    type Heads<S: Activation>: Activation;
    /// The gradient of the hidden states [N, E].
    type Hidden;

    /// The buffers of this machine and storage.
    fn scratch<S: Activation>(buffers: &mut Buffers) -> &mut Scratch<Self, S>;
    /// What a document left on this machine in this storage.
    fn ran<S: Activation>(document: &Document) -> &Ran<Self, S>;
    /// Where it leaves that.
    fn ran_mut<S: Activation>(document: &mut Document) -> &mut Ran<Self, S>;
    /// What a cache holds on this machine in this storage.
    fn held<S: Activation>(cache: &mut KvCache) -> &mut Held<Self, S>;
    /// The same for reading.
    fn held_in<S: Activation>(cache: &KvCache) -> &Held<Self, S>;
    /// Runs a step whose gradients are added to `host`, or stay where they were made ([`Gradients::staying`]), when all of it has gone
    /// well.
    fn with_gradients<R>(
        &self,
        host: &mut Gradients,
        step: impl FnOnce(&mut Self::Gradients) -> Result<R>,
    ) -> Result<R>;

    /// Bytes that linear layers work in.
    fn scratch_bytes(scratch: &Self::Scratch) -> u64;
    /// Values in a buffer.
    fn len<X: Activation>(buffer: &Self::Buffer<X>) -> usize;
    /// Bytes that a buffer holds.
    fn bytes<X: Activation>(buffer: &Self::Buffer<X>) -> u64;
    /// Makes it exactly `len` values; what is in it is whatever was there.
    fn size<X: Activation>(&self, buffer: &mut Self::Buffer<X>, len: usize) -> Result<()>;
    /// `len` zeros.
    fn zeros(&self, buffer: &mut Self::Buffer<f32>, len: usize) -> Result<()>;
    /// `to` = `from`.
    fn copy<X: Activation>(&self, from: &Self::Buffer<X>, to: &mut Self::Buffer<X>) -> Result<()>;
    /// `y` += `x`, of one length.
    fn add<X: Activation>(&self, x: &Self::Buffer<X>, y: &mut Self::Buffer<X>) -> Result<()>;
    /// Values of the host's, rounded to X.
    fn read<X: Activation>(&self, values: &[f32], into: &mut Self::Buffer<X>) -> Result<()>;
    /// `out` = the rows of these numbers, of rows of `width` values.
    fn rows_of<X: Activation>(
        &self,
        from: &Self::Buffer<X>,
        width: usize,
        places: &[u32],
        out: &mut Self::Buffer<X>,
    ) -> Result<()>;
    /// A copy for the host.
    fn to_host<X: Activation>(&self, buffer: &Self::Buffer<X>) -> Result<Vec<f32>>;

    /// The norm of rows of `width` values whose parameters are those of `module`.
    fn norm<'a>(
        &'a self,
        kind: NormKind,
        module: &str,
        width: usize,
        eps: f64,
        params: &'a ParamStore,
    ) -> Result<Self::Norm<'a>>;
    /// x/rms(x) over rows of `width` values.
    fn plain_norm(&self, width: usize, eps: f64) -> Result<Self::Norm<'_>>;
    /// `out` = the norm of `x`.
    fn norm_forward<S: Activation>(
        &self,
        norm: &Self::Norm<'_>,
        x: &Self::Buffer<S>,
        out: &mut Self::Buffer<S>,
    ) -> Result<()>;
    /// Adds the gradient of the norm's input `x` to `dx`, and those of what learns to `gradients`.
    fn norm_backward<S: Activation>(
        &self,
        norm: &Self::Norm<'_>,
        x: &Self::Buffer<S>,
        g: &Self::Buffer<f32>,
        dx: &mut Self::Buffer<f32>,
        gradients: &mut Self::Gradients,
    ) -> Result<()>;
    /// `d`, the gradient of the norm of `x`, becomes that of `x`; `room` is used.
    fn heads_norm_backward<S: Activation>(
        &self,
        norm: &Self::Norm<'_>,
        x: &Self::Buffer<S>,
        d: &mut Self::Buffer<Self::Heads<S>>,
        room: &mut Self::Buffer<f32>,
        gradients: &mut Self::Gradients,
    ) -> Result<()>;
    /// As [`Machine::norm_backward`], of the final norm.
    fn hidden_backward<S: Activation>(
        &self,
        norm: &Self::Norm<'_>,
        x: &Self::Buffer<S>,
        g: &Self::Hidden,
        dx: &mut Self::Buffer<f32>,
        gradients: &mut Self::Gradients,
    ) -> Result<()>;

    /// The linear layer `name` (without `.weight`).
    fn linear<'a>(&'a self, name: &str, setting: Setting<'a>) -> Result<Self::Linear<'a>>;
    /// `y` = the layer of `x`, or += it where `add`.
    fn linear_forward<S: Activation>(
        &self,
        linear: &Self::Linear<'_>,
        x: &Self::Buffer<S>,
        y: &mut Self::Buffer<S>,
        add: bool,
        scratch: &mut Self::Scratch,
    ) -> Result<()>;
    /// Gradients for an input `x` whose result has the gradient `g`: of what learns, into `gradients`; of the input, added to
    /// (`true`) or written over `dx` where it is wanted. `dx` is of `x`'s length then.
    fn linear_backward<S: Activation, G: Activation>(
        &self,
        linear: &Self::Linear<'_>,
        x: &Self::Buffer<S>,
        g: &Self::Buffer<G>,
        dx: Option<(&mut Self::Buffer<f32>, bool)>,
        scratch: &mut Self::Scratch,
        gradients: &mut Self::Gradients,
    ) -> Result<()>;

    /// Checks attention within rows.
    fn within(&self, spec: &AttentionSpec, rows: &Rows) -> Result<Self::Within>;
    /// Checks attention of rows that continue a document of `entries` entries.
    fn continuing(
        &self,
        spec: &AttentionSpec,
        entries: usize,
        rows: &Continuations,
    ) -> Result<Self::Continuing>;
    /// Checks attention of the new entries of `rows`, N of them in all one after the other, over caches of `capacity` entries
    /// together.
    fn caching(&self, spec: &AttentionSpec, capacity: usize, rows: &[CachedRow]) -> Result<Self::Cached>;
    /// What attention within rows mixes of q, k, v, and each query's log-sum-exp.
    fn attend<S: Activation>(
        &self,
        how: &Self::Within,
        qkv: [&Self::Buffer<S>; 3],
        out: &mut Self::Buffer<S>,
        lse: &mut Self::Buffer<f32>,
    ) -> Result<()>;
    /// The gradients of q, k, v for that of what was mixed.
    fn attend_back<S: Activation>(
        &self,
        how: &Self::Within,
        qkv: [&Self::Buffer<S>; 3],
        mixed: (&Self::Buffer<S>, &Self::Buffer<f32>),
        d_mixed: &Self::Buffer<f32>,
        into: [&mut Self::Buffer<Self::Heads<S>>; 3],
    ) -> Result<()>;
    /// As [`Machine::attend`], of rows that continue a document.
    fn attend_on<S: Activation>(
        &self,
        how: &Self::Continuing,
        qkv: [&Self::Buffer<S>; 3],
        document: &KeysValues<Self, S>,
        out: &mut Self::Buffer<S>,
        lse: &mut Self::Buffer<f32>,
    ) -> Result<()>;
    /// As [`Machine::attend_back`], of rows that continue a document.
    fn attend_on_back<S: Activation>(
        &self,
        how: &Self::Continuing,
        qkv: [&Self::Buffer<S>; 3],
        document: &KeysValues<Self, S>,
        mixed: (&Self::Buffer<S>, &Self::Buffer<f32>),
        d_mixed: &Self::Buffer<f32>,
        into: [&mut Self::Buffer<Self::Heads<S>>; 3],
    ) -> Result<()>;
    /// Puts the new entries' k and v into the caches, and attends over them as [`Machine::attend`]. Log-sum-exps are written where the
    /// machine makes them.
    fn attend_cached<S: Activation>(
        &self,
        how: &Self::Cached,
        qkv: [&Self::Buffer<S>; 3],
        cache: &mut KeysValues<Self, S>,
        out: &mut Self::Buffer<S>,
        lse: &mut Self::Buffer<f32>,
    ) -> Result<()>;

    /// Tables where the machine reads them.
    fn tables<'a>(&self, tables: Tables<'a>) -> Result<Self::Tables<'a>>;
    /// Turns the first `rotated` of the `width` values of each head, in place; `direction` is 1 or −1.
    fn rotate<X: Activation>(
        &self,
        x: &mut Self::Buffer<X>,
        heads: usize,
        widths: [usize; 2],
        tables: &Self::Tables<'_>,
        rotation: Rotation,
        direction: f32,
    ) -> Result<()>;
    /// Adds to `gradients` what heads that were `turned`, and their gradient `d`, say about the scales of sigma.
    fn spread_backward<S: Activation>(
        &self,
        spread: &Spread,
        rotation: Rotation,
        turned: &Self::Buffer<S>,
        d: &Self::Buffer<Self::Heads<S>>,
        heads: [usize; 2],
        gradients: &mut Self::Gradients,
    ) -> Result<()>;

    /// `out` = the feed-forward layer's activation of `up`, and of `gate` where it gates.
    fn activate<S: Activation>(
        &self,
        mlp: Mlp,
        gate: &Self::Buffer<S>,
        up: &Self::Buffer<S>,
        out: &mut Self::Buffer<S>,
    ) -> Result<()>;
    /// `gate` and `up` become their own gradients, given that of what they were activated to.
    fn activate_back<S: Activation>(
        &self,
        mlp: Mlp,
        gate: &mut Self::Buffer<S>,
        up: &mut Self::Buffer<S>,
        g: &Self::Buffer<f32>,
    ) -> Result<()>;
    /// [N, H, 3, D] apart into q, k and v [N, H, D].
    fn split_heads<S: Activation>(
        &self,
        fused: &Self::Buffer<S>,
        heads: [usize; 2],
        parts: [&mut Self::Buffer<S>; 3],
    ) -> Result<()>;
    /// The transpose of [`Machine::split_heads`].
    fn join_heads<S: Activation>(
        &self,
        parts: [&Self::Buffer<Self::Heads<S>>; 3],
        heads: [usize; 2],
        fused: &mut Self::Buffer<f32>,
    ) -> Result<()>;

    /// Embeddings of tokens with their scale.
    fn gather<S: Activation>(
        &self,
        decoder: &Decoder,
        tokens: &[u32],
        out: &mut Self::Buffer<S>,
    ) -> Result<()>;
    /// Gradients of the embedding's parameters for those of its rows, `d` [N, E], which is used up.
    fn embedding_gradients(
        &self,
        decoder: &Decoder,
        d: &mut Self::Buffer<f32>,
        tokens: &[u32],
        gradients: &mut Self::Gradients,
    ) -> Result<()>;
    /// Logits [N, V] of hidden states, for the host.
    fn logits<S: Activation>(&self, decoder: &Decoder, hidden: &Self::Buffer<S>) -> Result<Vec<f32>>;
    /// NLL of `scored` entries of hidden states; the gradient of `scale`·Σ weight·NLL for the hidden states, where that is not 0, and
    /// with `parts` for what learns of the head.
    fn head_loss<S: Activation>(
        &self,
        decoder: &Decoder,
        hidden: &Self::Buffer<S>,
        scored: Scored,
        scale: f32,
        dropout_seed: Option<u64>,
        parts: Option<&mut Self::Gradients>,
    ) -> Result<Loss<Self::Hidden>>;
    /// KL(teacher ‖ model) of the `scored` entries in nats; the gradient of `scale`·Σ weight·KL is added to the hidden states'
    /// where it is wanted.
    fn divergence<S: Activation>(
        &self,
        decoder: &Decoder,
        hidden: &Self::Buffer<S>,
        scored: &[usize],
        teacher: Teacher<'_, Self, S>,
        wanted: Wanted<'_, Self::Hidden>,
    ) -> Result<Vec<f32>>;
    /// A gradient of hidden states that is 0.
    fn no_gradient(&self, len: usize) -> Result<Self::Hidden>;
    /// `into` += `d`.
    fn add_hidden(&self, d: &Self::Hidden, into: &mut Self::Hidden) -> Result<()>;
}

/// Runs `$body` with `$M` the machine's type, `$S` the storage of its activations and `$machine` the machine of a decoder.
macro_rules! on_machine {
    ($decoder:expr, |$machine:ident: $M:ident, $S:ident| $body:expr) => {{
        match ($decoder.place(), $decoder.precision().stores_bf16()) {
            ($crate::decoder::Place::Host, false) => {
                type $M = $crate::machine::Host;
                type $S = f32;
                let $machine = &$crate::machine::Host;
                $body
            }
            ($crate::decoder::Place::Host, true) => {
                type $M = $crate::machine::Host;
                type $S = megacontext_kernels::store::bf16;
                let $machine = &$crate::machine::Host;
                $body
            }
            #[cfg(feature = "cuda")]
            ($crate::decoder::Place::Gpu($machine), false) => {
                type $M = $crate::machine::gpu::Gpu;
                type $S = f32;
                let $machine: &$M = $machine;
                $body
            }
            #[cfg(feature = "cuda")]
            ($crate::decoder::Place::Gpu($machine), true) => {
                type $M = $crate::machine::gpu::Gpu;
                type $S = megacontext_kernels::store::bf16;
                let $machine: &$M = $machine;
                $body
            }
        }
    }};
}
pub(crate) use on_machine;
