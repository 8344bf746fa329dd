//! The memory of forward and backward passes, used again from block to block and step to step, and how much it is.
//!
//! Buffers are mapped from the system, not taken from the heap: a heap keeps blocks that were let go between others that
//! were not, and then an evaluation comes on top of the step that went before it. Every buffer has exactly the length that the shapes ask for, so that what a pass will hold can be said before it runs:
//! [`training_bytes`] and [`evaluation_bytes`] count what `sized` makes. The tests compare the two.
//!
//! Shapes: N = B·T entries; E model width, Q = H·D, KV = G·D, F feed-forward width, H heads, r rank, V vocabulary.
//! S is the storage of activations: f32, or bf16 in the precision class of that name. Gradients are f32.

pub mod gpu;

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use megacontext_kernels::attention::prefix::Document;
use megacontext_kernels::embedding;
use megacontext_kernels::linear::{self, LoraShape};
use megacontext_kernels::loss::chunk_rows;
use megacontext_kernels::precision::Precision;
use megacontext_kernels::store::{Store, bf16};
use memmap2::MmapMut;

use crate::architecture::{QkNorm, Residual};
use crate::config::DecoderConfig;
use crate::decoder::{Ran, RanAs};
use crate::error::{BaseError, Result};
use crate::generate::{Held, HeldAs};
use crate::lora::{LoraKind, LoraModules};
use crate::machine::{Host, Machine};

/// Values in memory of their own, which goes back to the system with them.
pub(crate) struct Buffer<S> {
    map: Option<MmapMut>,
    len: usize,
    stored: PhantomData<S>,
}

impl<S> Default for Buffer<S> {
    fn default() -> Self {
        Self { map: None, len: 0, stored: PhantomData }
    }
}

impl<S: Activation> Buffer<S> {
    /// A buffer of exactly `len` values; what is in it is whatever was there. One that is too small is let go before its
    /// successor is made.
    ///
    /// # Errors
    /// When the system has no more memory.
    pub fn sized(&mut self, len: usize) -> Result<&mut [S]> {
        let bytes = len * size_of::<S>();
        if self.map.as_ref().is_none_or(|map| map.len() < bytes) {
            *self = Self::default();
            // Nothing can be mapped in length 0.
            let map = MmapMut::map_anon(bytes.max(1))
                .map_err(|source| BaseError::OutOfMemory { bytes: bytes as u64, source })?;
            self.map = Some(map);
        }
        self.len = len;
        Ok(&mut *self)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.map.as_ref().map_or(0, |map| map.len() as u64)
    }
}

impl<S: Activation> Deref for Buffer<S> {
    type Target = [S];

    fn deref(&self) -> &[S] {
        self.map.as_ref().map_or(&[], |map| bytemuck::cast_slice(&map[..self.len * size_of::<S>()]))
    }
}

impl<S: Activation> DerefMut for Buffer<S> {
    fn deref_mut(&mut self) -> &mut [S] {
        let bytes = self.len * size_of::<S>();
        self.map.as_mut().map_or(&mut [], |map| bytemuck::cast_slice_mut(&mut map[..bytes]))
    }
}

/// What the forward pass of a block leaves for its backward pass, besides the block's input.
pub(crate) struct Saved<M: Machine, S: Activation> {
    pub q: M::Buffer<S>,
    pub k: M::Buffer<S>,
    pub v: M::Buffer<S>,
    /// What the norms of queries and keys read, where there are such.
    pub plain_q: M::Buffer<S>,
    pub plain_k: M::Buffer<S>,
    /// What attention mixed, [N, H, D], and the log-sum-exp of every query, [N, H].
    pub mixed: M::Buffer<S>,
    pub lse: M::Buffer<f32>,
    /// The stream between the halves of a block, where they do not stand side by side.
    pub h: M::Buffer<S>,
    /// What the norms behind the halves read, where there are such.
    pub attended: M::Buffer<S>,
    pub fed: M::Buffer<S>,
    /// Empty where nothing gates.
    pub gate: M::Buffer<S>,
    pub up: M::Buffer<S>,
}

/// Keys and values of one block, of entries that others continue.
pub(crate) struct KeysValues<M: Machine, S: Activation> {
    /// [C, G, D], rotated; C entries.
    pub k: M::Buffer<S>,
    /// [C, G, D].
    pub v: M::Buffer<S>,
}

impl<M: Machine, S: Activation> KeysValues<M, S> {
    /// Room for `entries` entries in each of the model's blocks.
    ///
    /// # Errors
    /// When there is no more memory.
    pub fn of_blocks(machine: &M, config: &DecoderConfig, entries: usize) -> Result<Vec<Self>> {
        let len = entries * config.num_key_value_heads * config.head_dim;
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for _ in 0..config.num_hidden_layers {
            let mut block = Self { k: M::Buffer::default(), v: M::Buffer::default() };
            machine.size(&mut block.k, len)?;
            machine.size(&mut block.v, len)?;
            blocks.push(block);
        }
        Ok(blocks)
    }

    pub fn bytes(&self) -> u64 {
        M::bytes(&self.k) + M::bytes(&self.v)
    }
}

impl<S: Activation> KeysValues<Host, S> {
    /// As a document that rows continue.
    pub fn document(&self) -> Document<'_, S> {
        Document { k: &self.k, v: &self.v }
    }
}

/// Bytes of keys and values of `entries` entries in all blocks.
pub fn keys_values_bytes(config: &DecoderConfig, precision: Precision, entries: usize) -> u64 {
    let stored = if precision.stores_bf16() { 2 } else { 4 };
    let entry = config.num_key_value_heads * config.head_dim * 2 * config.num_hidden_layers;
    entries as u64 * entry as u64 * stored
}

/// Gradients of queries, keys and values.
pub(crate) struct HeadGradients<M: Machine, S: Activation> {
    pub q: M::Buffer<M::Heads<S>>,
    pub k: M::Buffer<M::Heads<S>>,
    pub v: M::Buffer<M::Heads<S>>,
}

/// Buffers that are free between blocks.
pub(crate) struct Workspace<M: Machine, S: Activation> {
    pub normed: M::Buffer<S>,
    pub gated: M::Buffer<S>,
    pub d_normed: M::Buffer<f32>,
    pub d_wide: M::Buffer<f32>,
    pub heads: HeadGradients<M, S>,
    pub linear: M::Scratch,
}

/// All buffers of a pass whose activations are stored as S.
pub(crate) struct Scratch<M: Machine, S: Activation> {
    /// The input of every block that is walked back.
    pub inputs: Vec<M::Buffer<S>>,
    /// What blocks keep: one for all, or one each.
    pub saved: Vec<Saved<M, S>>,
    pub workspace: Workspace<M, S>,
    /// The residual stream before and after a block.
    pub x: M::Buffer<S>,
    pub stream: M::Buffer<S>,
    /// Gradient of the stream.
    pub d: M::Buffer<f32>,
}

// Derived, these would ask for a default machine.
macro_rules! empty {
    ($($of:ident { $($field:ident),* })*) => {$(
        impl<M: Machine, S: Activation> Default for $of<M, S> {
            fn default() -> Self {
                Self { $($field: Default::default()),* }
            }
        }
    )*};
}

empty! {
    Saved { q, k, v, plain_q, plain_k, mixed, lse, h, attended, fed, gate, up }
    KeysValues { k, v }
    HeadGradients { q, k, v }
    Workspace { normed, gated, d_normed, d_wide, heads, linear }
    Scratch { inputs, saved, workspace, x, stream, d }
}

impl<M: Machine, S: Activation> Scratch<M, S> {
    /// Room for a model of `layers` blocks of which those from `lowest` on are walked back.
    pub fn prepare(&mut self, layers: usize, lowest: usize, recompute: bool) {
        let walked = layers - lowest;
        self.inputs.resize_with(walked, M::Buffer::default);
        self.saved.resize_with(if recompute { 1 } else { walked.max(1) }, Saved::default);
    }

    pub(crate) fn bytes(&self) -> u64 {
        let saved = |s: &Saved<M, S>| {
            let halves = [&s.h, &s.attended, &s.fed, &s.gate, &s.up];
            let heads = [&s.q, &s.k, &s.v, &s.plain_q, &s.plain_k, &s.mixed];
            heads.into_iter().chain(halves).map(M::bytes).sum::<u64>() + M::bytes(&s.lse)
        };
        let w = &self.workspace;
        let shared = self.inputs.iter().chain([&self.x, &self.stream, &w.normed, &w.gated]);
        shared.map(M::bytes).sum::<u64>()
            + self.saved.iter().map(saved).sum::<u64>()
            + [&self.d, &w.d_normed, &w.d_wide].into_iter().map(M::bytes).sum::<u64>()
            + [&w.heads.q, &w.heads.k, &w.heads.v].into_iter().map(M::bytes).sum::<u64>()
            + M::scratch_bytes(&w.linear)
    }
}

/// What there is once for each storage of activations; [`Activation`] knows which is whose.
#[derive(Default)]
pub(crate) struct ByStorage<F, B> {
    pub f32: F,
    pub bf16: B,
}

impl<F, B> ByStorage<F, B> {
    /// The bytes of both.
    pub fn bytes(&self, of_f32: impl Fn(&F) -> u64, of_bf16: impl Fn(&B) -> u64) -> u64 {
        of_f32(&self.f32) + of_bf16(&self.bf16)
    }
}

/// The buffers of passes on one machine.
pub(crate) type PassBuffers<M> = ByStorage<Scratch<M, f32>, Scratch<M, bf16>>;

/// Memory that passes use again. Dropped, it goes back to where it came from; the next pass makes it anew.
#[derive(Default)]
pub struct Buffers {
    pub(crate) host: PassBuffers<Host>,
    #[cfg(feature = "cuda")]
    pub(crate) gpu: PassBuffers<crate::machine::gpu::Gpu>,
}

impl Buffers {
    /// Bytes held on the host.
    pub fn bytes(&self) -> u64 {
        self.host.bytes(Scratch::bytes, Scratch::bytes)
    }

    /// Bytes held on a GPU.
    pub fn device_bytes(&self) -> u64 {
        #[cfg(feature = "cuda")]
        return self.gpu.bytes(Scratch::bytes, Scratch::bytes);
        #[cfg(not(feature = "cuda"))]
        0
    }
}

/// A storage of activations.
pub(crate) trait Activation: Store + bytemuck::Pod {
    /// The same on a GPU.
    #[cfg(feature = "cuda")]
    type OnGpu: megacontext_kernels::cuda::Stored;

    /// The buffers of this storage.
    fn scratch<M: Machine>(of: &mut PassBuffers<M>) -> &mut Scratch<M, Self>;
    /// What a document left in this storage.
    fn ran<M: Machine>(of: &RanAs<M>) -> &Ran<M, Self>;
    /// Where it leaves that.
    fn ran_mut<M: Machine>(of: &mut RanAs<M>) -> &mut Ran<M, Self>;
    /// What a cache holds in this storage.
    fn held<M: Machine>(of: &mut HeldAs<M>) -> &mut Held<M, Self>;
    /// The same for reading.
    fn held_in<M: Machine>(of: &HeldAs<M>) -> &Held<M, Self>;
}

macro_rules! activation {
    ($($stored:ident)*) => {$(
        impl Activation for $stored {
            #[cfg(feature = "cuda")]
            type OnGpu = Self;

            fn scratch<M: Machine>(of: &mut PassBuffers<M>) -> &mut Scratch<M, Self> {
                &mut of.$stored
            }

            fn ran<M: Machine>(of: &RanAs<M>) -> &Ran<M, Self> {
                &of.$stored
            }

            fn ran_mut<M: Machine>(of: &mut RanAs<M>) -> &mut Ran<M, Self> {
                &mut of.$stored
            }

            fn held<M: Machine>(of: &mut HeldAs<M>) -> &mut Held<M, Self> {
                &mut of.$stored
            }

            fn held_in<M: Machine>(of: &HeldAs<M>) -> &Held<M, Self> {
                &of.$stored
            }
        }
    )*};
}

activation! { f32 bf16 }

/// Bytes of the buffers of a pass, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassBytes {
    /// Inputs of blocks, and what blocks keep for their backward pass.
    pub activations: u64,
    /// What all blocks share, the streams and their gradients among it.
    pub workspace: u64,
    /// Logits alive at one time, NLL, the gradient of the hidden states, and what an adapter on the head adds: made and let
    /// go by the loss. What LoRA on the embedding makes, where that is more.
    pub loss: u64,
}

impl PassBytes {
    /// Of all kinds.
    pub fn total(self) -> u64 {
        self.activations + self.workspace + self.loss
    }
}

struct Sizes {
    stored: u64,
    n: u64,
    e: u64,
    q: u64,
    kv: u64,
    f: u64,
    heads: u64,
    /// Queries and keys are kept from before their norms.
    qk_norms: bool,
    residual: Residual,
    gated: bool,
    /// The widest of what is made within a block: the feed-forward layer's, or q, k and v together.
    wide: u64,
}

impl Sizes {
    fn of(config: &DecoderConfig, precision: Precision, entries: usize) -> Self {
        let a = &config.architecture;
        let q = (config.num_attention_heads * config.head_dim) as u64;
        let f = config.intermediate_size as u64;
        Self {
            stored: if precision.stores_bf16() { 2 } else { 4 },
            n: entries as u64,
            e: config.hidden_size as u64,
            q,
            kv: (config.num_key_value_heads * config.head_dim) as u64,
            f,
            heads: config.num_attention_heads as u64,
            qk_norms: a.qk_norm != QkNorm::None,
            residual: a.residual,
            gated: a.mlp.gated(),
            wide: if a.fused_qkv { f.max(3 * q) } else { f },
        }
    }

    /// What one block keeps: q, mixed values; k, v; q and k before their norms; the middle of the stream and what the norms
    /// behind the halves read; gate, up; log-sum-exps.
    fn kept(&self) -> u64 {
        let heads = 2 * self.q + 2 * self.kv + if self.qk_norms { self.q + self.kv } else { 0 };
        let streams = match self.residual {
            Residual::Parallel => 0,
            Residual::Sequential => self.e,
            Residual::Sandwich => 3 * self.e,
        };
        let fed = if self.gated { 2 * self.f } else { self.f };
        self.n * (self.stored * (heads + streams + fed) + 4 * self.heads)
    }

    /// The stream before and after a block, the normed input, the widest product.
    fn forward(&self) -> u64 {
        self.n * self.stored * (3 * self.e + self.wide)
    }

    /// Logits and hidden states of a chunk, and every position's NLL and place; with gradients, those of the chunk's and
    /// of all hidden states too.
    fn loss(&self, vocab: usize, gradients: bool) -> u64 {
        let chunk = (chunk_rows(vocab) as u64).min(self.n);
        let forward = 4 * chunk * vocab as u64 + self.stored * chunk * self.e + 12 * self.n;
        forward + if gradients { 4 * self.e * (chunk + self.n) } else { 0 }
    }
}

/// What a pass is.
#[derive(Clone, Copy, Debug)]
pub struct PassShape<'a> {
    /// Tokens in it.
    pub entries: usize,
    /// Class.
    pub precision: Precision,
    /// What LoRA comes to, where it is attached.
    pub lora: Option<&'a LoraModules>,
}

impl PassShape<'_> {
    /// LoRA's low-rank values and, walking back, their gradients.
    fn lora(&self, backward: bool) -> u64 {
        let Some(lora) = self.lora else { return 0 };
        let in_block = lora.modules.iter().filter(|module| module.layer.is_some());
        let shapes: Vec<LoraShape> = in_block
            .map(|m| LoraShape { out: m.out, rank: m.rank, dora: m.dora, initial: m.pissa })
            .collect();
        linear::Scratch::planned_bytes(self.entries, &shapes, self.precision.stores_bf16(), backward)
    }

    /// What an adapter on the output head makes for `chunk` positions at a time: the factors it works with, which are copies
    /// (where they are a tied embedding's turned round, gradients too), low-rank values, logits of own rows, and what
    /// dropout left.
    fn head(&self, chunk: u64, width: u64, backward: bool) -> u64 {
        let Some(lora) = self.lora.filter(|_| chunk > 0) else { return 0 };
        let twice = if backward { 2 } else { 1 };
        let module = lora.modules.iter().find(|m| m.kind == LoraKind::Head || m.tied);
        let factors = module.map_or(0, |m| {
            let copies = (m.rank * (m.inp + m.out)) as u64 * if m.tied { twice } else { 1 };
            let dropped = if backward && m.dropout > 0.0 && !m.tied { 2 * chunk * width } else { 0 };
            copies + twice * chunk * m.rank as u64 + dropped
        });
        let own = lora.tokens.iter().find(|rows| rows.tied || !rows.embedding);
        4 * (factors + own.map_or(0, |rows| chunk * rows.ids.len() as u64))
    }

    /// What LoRA on the embedding makes: low-rank values, in bf16 of as many rows as are summed in f32 at a time, and those.
    fn embedding(&self, width: u64, backward: bool) -> u64 {
        let Some(module) = self.lora.and_then(|lora| lora.of_kind(LoraKind::Embedding)) else { return 0 };
        let (entries, rank) = (self.entries as u64, module.rank as u64);
        let summed = entries.min((embedding::HELD as u64 / width.max(1)).max(1));
        let forward = if self.precision.stores_bf16() { summed * (width + rank) } else { entries * rank };
        4 * if backward { forward.max(2 * entries * rank) } else { forward }
    }

    /// What the loss makes, an adapter's part in it; or what the embedding makes at another time, if that is more.
    fn ends(&self, s: &Sizes, vocab: usize, backward: bool) -> u64 {
        let chunk = (chunk_rows(vocab) as u64).min(s.n);
        (s.loss(vocab, backward) + self.head(chunk, s.e, backward)).max(self.embedding(s.e, backward))
    }
}

/// What a step's buffers take: `walked` blocks are walked back.
pub fn training_bytes(config: &DecoderConfig, pass: PassShape, walked: usize, recompute: bool) -> PassBytes {
    let s = Sizes::of(config, pass.precision, pass.entries);
    let blocks = if recompute { 1 } else { walked.max(1) } as u64;
    // The stream's gradient and the normed input's; the widest product's or the mixed values'; those of q, k and v.
    let backward = 4 * s.n * (2 * s.e + s.wide.max(s.q) + s.q + 2 * s.kv);
    PassBytes {
        activations: s.n * s.stored * s.e * walked as u64 + blocks * s.kept(),
        workspace: s.forward() + backward + pass.lora(true),
        loss: pass.ends(&s, config.vocab_size, true),
    }
}

/// What a forward pass alone takes.
pub fn evaluation_bytes(config: &DecoderConfig, pass: PassShape) -> PassBytes {
    let s = Sizes::of(config, pass.precision, pass.entries);
    PassBytes {
        activations: s.kept(),
        workspace: s.forward() + pass.lora(false),
        loss: pass.ends(&s, config.vocab_size, false),
    }
}

/// What the model's ends make while a pass runs and `rows` of its entries get logits, which are among it.
pub fn logits_bytes(config: &DecoderConfig, pass: PassShape, rows: usize) -> u64 {
    let (rows, width) = (rows as u64, config.hidden_size as u64);
    let logits = 2 * 4 * rows * config.vocab_size as u64;
    (logits + pass.head(rows, width, false)).max(pass.embedding(width, false))
}
