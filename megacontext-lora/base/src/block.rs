//! One decoder block, forward and backward, on a machine's buffers.
//!
//! Source: the block that [`crate::architecture`] describes, with LoRA (Hu et al. 2021) on its linear layers. In its
//! sequential form, which is Llama's:
//!   n = norm(x); q, k, v = linear(n), q and k normed and rotated; h = x + linear(attention(q, k, v));
//!   m = norm(h); y = h + W_down(f(m)), f(m) being silu(W_gate·m) ∘ W_up·m, or an activation of W_up·m alone.
//! Backward is the chain rule over these lines, last to first; normed inputs and the product that W_down reads are made
//! again instead of kept.
//!
//! Why not candle's tape: its backward allocates, zeroes and adds a whole tensor for every use of every operand, on one
//! thread. Here products add into their target, residuals are never copied, and all buffers live in a [`Workspace`] that
//! is reused from block to block and step to step. The tests hold it against the same block written as taped candle
//! operations, and against transformers' gradients.
//!
//! The block does not know what it runs on: buffers and operations are those of a [`Machine`].
//!
//! Shapes: N = B·T entries; E model width, Q = H·D, KV = G·D, F feed-forward width, r rank. Row-major. Activations are
//! stored as S (f32 or bf16); the gradients of the stream and of parameters are f32, those of q, k, v what the machine makes of
//! them, those of gate and up take the place of gate and up.
//! Errors: a parameter that is missing; shapes are fixed by the configuration.

use megacontext_kernels::attention::Pattern;

use crate::architecture::{Layer, QkNorm, Residual, Rotation};
use crate::buffers::{Activation, HeadGradients, KeysValues, Saved, Workspace};
use crate::config::{DecoderConfig, LinearPart, NormPart};
use crate::error::{BaseError, Result};
use crate::machine::Machine;
use crate::params::Group;
use crate::projection::Setting;
use crate::rope::Spread;

/// Rotation tables of a pass, cosines and sines.
#[derive(Clone, Copy)]
pub(crate) struct Tables<'a> {
    pub global: [&'a [f32]; 2],
    /// Of blocks that turn by a base of their own.
    pub local: Option<[&'a [f32]; 2]>,
}

/// What is the same for all blocks of a pass.
pub(crate) struct Pass<'a, M: Machine, S: Activation> {
    pub machine: &'a M,
    pub config: &'a DecoderConfig,
    pub setting: Setting<'a>,
    pub attending: Attending<'a, M, S>,
    pub tables: M::Tables<'a>,
    /// What the gradient of sigma needs, where it learns.
    pub spread: Option<&'a Spread>,
}

/// How the entries of a pass attend.
pub(crate) enum Attending<'a, M: Machine, S: Activation> {
    /// The caller attends, between [`Block::qkv`] and [`Block::rest`].
    Elsewhere,
    /// Within their rows.
    Rows(&'a ByWindow<M::Within>),
    /// Within their rows, which continue a document that has run: its keys and values are here, block by block.
    Document(&'a ByWindow<M::Continuing>, &'a [KeysValues<M, S>]),
}

/// Attention as it was checked: that of blocks without a window, and of those with each of the model's windows.
pub(crate) struct ByWindow<T> {
    full: T,
    windowed: Vec<(usize, T)>,
}

impl<T> ByWindow<T> {
    /// Of blocks that attend by `pattern`, made by `make`. Where it is dense, blocks that have a window keep to it.
    pub(crate) fn new(
        pattern: Pattern,
        config: &DecoderConfig,
        make: impl Fn(Pattern) -> Result<T>,
    ) -> Result<Self> {
        let windows = if pattern == Pattern::Dense { config.architecture.windows() } else { Vec::new() };
        let windowed = windows
            .into_iter()
            .map(|window| Ok((window, make(Pattern::SlidingWindow { window })?)))
            .collect::<Result<_>>()?;
        Ok(Self { full: make(pattern)?, windowed })
    }

    /// That of a block with this window. Where windows are not honoured there are none to choose from.
    pub(crate) fn of(&self, window: Option<usize>) -> &T {
        let found = self.windowed.iter().find(|(of, _)| Some(*of) == window);
        found.map_or(&self.full, |(_, made)| made)
    }
}

fn no_attention() -> Result<()> {
    Err(BaseError::Input { message: "attention: expected a pattern for this pass, got none".to_string() })
}

/// A block's parameters, looked up once per pass.
pub(crate) struct Block<'p, 'a, M: Machine, S: Activation> {
    pass: &'p Pass<'a, M, S>,
    number: usize,
    layer: Layer,
    attention_in: M::Norm<'p>,
    attention_out: Option<M::Norm<'p>>,
    mlp_in: M::Norm<'p>,
    mlp_out: Option<M::Norm<'p>>,
    /// Of queries and keys.
    qk_norms: Option<[M::Norm<'p>; 2]>,
    /// What makes queries, keys and values: three layers, or one that gives them all, [H, 3, D].
    heads: Vec<M::Linear<'p>>,
    out: M::Linear<'p>,
    gate: Option<M::Linear<'p>>,
    up: M::Linear<'p>,
    down: M::Linear<'p>,
}

impl<'p, 'a, M: Machine, S: Activation> Block<'p, 'a, M, S> {
    pub(crate) fn new(layer: usize, pass: &'p Pass<'a, M, S>) -> Result<Self> {
        let (machine, c, params) = (pass.machine, pass.config, pass.setting.params);
        let a = &c.architecture;
        let (width, eps) = (c.hidden_size, c.rms_norm_eps);
        let linear = |part| machine.linear(&c.linear_module(layer, part), pass.setting);
        let norm = |part, width| machine.norm(a.norm, &c.norm_module(layer, part), width, eps, params);
        let behind = |part| (a.residual == Residual::Sandwich).then(|| norm(part, width)).transpose();
        let qk_norms = match a.qk_norm {
            QkNorm::None => None,
            QkNorm::BeforeRotary => {
                Some([norm(NormPart::Query, c.head_dim)?, norm(NormPart::Key, c.head_dim)?])
            }
            QkNorm::AfterRotary => {
                Some([machine.plain_norm(c.head_dim, eps)?, machine.plain_norm(c.head_dim, eps)?])
            }
        };
        let parts: &[LinearPart] = match a.fused_qkv {
            true => &[LinearPart::Qkv],
            false => &[LinearPart::Q, LinearPart::K, LinearPart::V],
        };
        let heads = parts.iter().map(|part| linear(*part)).collect::<Result<_>>()?;
        Ok(Self {
            pass,
            number: layer,
            layer: a.layers[layer],
            attention_in: norm(NormPart::AttentionIn, width)?,
            attention_out: behind(NormPart::AttentionOut)?,
            mlp_in: norm(NormPart::MlpIn, width)?,
            mlp_out: behind(NormPart::MlpOut)?,
            qk_norms,
            heads,
            out: linear(LinearPart::Out)?,
            gate: a.mlp.gated().then(|| linear(LinearPart::Gate)).transpose()?,
            up: linear(LinearPart::Up)?,
            down: linear(LinearPart::Down)?,
        })
    }

    /// What attention mixes, from queries, keys and values.
    fn attend(&self, saved: &mut Saved<M, S>) -> Result<()> {
        let machine = self.pass.machine;
        let Saved { q, k, v, mixed, lse, .. } = saved;
        let qkv = [&*q, &*k, &*v];
        match &self.pass.attending {
            Attending::Elsewhere => no_attention(),
            Attending::Rows(how) => machine.attend(how.of(self.layer.window), qkv, mixed, lse),
            Attending::Document(how, document) => {
                machine.attend_on(how.of(self.layer.window), qkv, &document[self.number], mixed, lse)
            }
        }
    }

    /// Gradients of queries, keys and values for those of what was mixed.
    fn attend_back(
        &self,
        saved: &Saved<M, S>,
        d_mixed: &M::Buffer<f32>,
        d: &mut HeadGradients<M, S>,
    ) -> Result<()> {
        let machine = self.pass.machine;
        machine.size(&mut d.q, M::len(&saved.q))?;
        machine.size(&mut d.k, M::len(&saved.k))?;
        machine.size(&mut d.v, M::len(&saved.v))?;
        let (qkv, mixed) = ([&saved.q, &saved.k, &saved.v], (&saved.mixed, &saved.lse));
        let into = [&mut d.q, &mut d.k, &mut d.v];
        match &self.pass.attending {
            Attending::Elsewhere => no_attention(),
            Attending::Rows(how) => machine.attend_back(how.of(self.layer.window), qkv, mixed, d_mixed, into),
            Attending::Document(how, document) => {
                let document = &document[self.number];
                machine.attend_on_back(how.of(self.layer.window), qkv, document, mixed, d_mixed, into)
            }
        }
    }

    /// Rotates heads by the block's tables; `direction` is 1 forward and −1 back.
    fn rotate<X: Activation>(&self, x: &mut M::Buffer<X>, heads: usize, direction: f32) -> Result<()> {
        if self.layer.rotation == Rotation::None {
            return Ok(());
        }
        let (c, a) = (self.pass.config, &self.pass.config.architecture);
        let (widths, direction) = ([c.head_dim, a.rotary_width], direction * a.rotary_direction);
        self.pass.machine.rotate(x, heads, widths, &self.pass.tables, self.layer.rotation, direction)
    }

    fn forward_of(
        &self,
        linear: &M::Linear<'_>,
        x: &M::Buffer<S>,
        y: &mut M::Buffer<S>,
        room: &mut M::Scratch,
    ) -> Result<()> {
        self.pass.machine.linear_forward(linear, x, y, false, room)
    }

    /// Adds to `y`.
    fn add_to(
        &self,
        linear: &M::Linear<'_>,
        x: &M::Buffer<S>,
        y: &mut M::Buffer<S>,
        room: &mut M::Scratch,
    ) -> Result<()> {
        self.pass.machine.linear_forward(linear, x, y, true, room)
    }

    /// The block's output of `x` [N, E] into `y`; what backward needs into `saved`.
    pub(crate) fn forward(
        &self,
        x: &M::Buffer<S>,
        y: &mut M::Buffer<S>,
        saved: &mut Saved<M, S>,
        ws: &mut Workspace<M, S>,
    ) -> Result<()> {
        self.mix(x, saved, ws)?;
        self.rest(x, y, saved, ws)
    }

    /// What backward needs of `x` [N, E] into `saved` once more, as [`Block::forward`] left it. The output is of no use then,
    /// so the last product is left out where nothing behind it is kept; `y` holds no output afterwards.
    pub(crate) fn remake(
        &self,
        x: &M::Buffer<S>,
        y: &mut M::Buffer<S>,
        saved: &mut Saved<M, S>,
        ws: &mut Workspace<M, S>,
    ) -> Result<()> {
        self.mix(x, saved, ws)?;
        let machine = self.pass.machine;
        let Workspace { normed, linear, .. } = ws;
        let Saved { mixed, h, gate, up, .. } = &mut *saved;
        match self.pass.config.architecture.residual {
            Residual::Sequential => {
                machine.copy(x, h)?;
                self.add_to(&self.out, mixed, h, linear)?;
                machine.norm_forward(&self.mlp_in, h, normed)?;
                self.widen(normed, gate, up, linear)
            }
            Residual::Parallel => {
                machine.norm_forward(&self.mlp_in, x, normed)?;
                self.widen(normed, gate, up, linear)
            }
            Residual::Sandwich => self.rest(x, y, saved, ws),
        }
    }

    /// Queries, keys and values of `x` [N, E] and what attention mixes of them, into `saved`.
    fn mix(&self, x: &M::Buffer<S>, saved: &mut Saved<M, S>, ws: &mut Workspace<M, S>) -> Result<()> {
        self.qkv(x, saved, ws)?;
        self.size_mixed(saved)?;
        self.attend(saved)
    }

    /// Room for what attention mixes.
    pub(crate) fn size_mixed(&self, saved: &mut Saved<M, S>) -> Result<()> {
        let (machine, heads) = (self.pass.machine, self.pass.config.num_attention_heads);
        machine.size(&mut saved.mixed, M::len(&saved.q))?;
        machine.size(&mut saved.lse, self.pass.setting.entries * heads)
    }

    /// Queries, keys and values of `x` [N, E], normed and rotated, into `saved`.
    pub(crate) fn qkv(
        &self,
        x: &M::Buffer<S>,
        saved: &mut Saved<M, S>,
        ws: &mut Workspace<M, S>,
    ) -> Result<()> {
        let (machine, c) = (self.pass.machine, self.pass.config);
        let Workspace { normed, gated, linear, .. } = ws;
        machine.norm_forward(&self.attention_in, x, normed)?;
        let Saved { q, k, v, plain_q, plain_k, .. } = saved;
        // Where q and k are normed, backward needs them as they were before.
        let (first_q, first_k) =
            if self.qk_norms.is_some() { (&mut *plain_q, &mut *plain_k) } else { (&mut *q, &mut *k) };
        match &self.heads[..] {
            [to_all] => {
                self.forward_of(to_all, normed, gated, linear)?;
                machine.split_heads(gated, [c.num_attention_heads, c.head_dim], [first_q, first_k, v])?;
            }
            layers => {
                for (layer, made) in layers.iter().zip([first_q, first_k, v]) {
                    self.forward_of(layer, normed, made, linear)?;
                }
            }
        }
        let sides = [(q, plain_q, c.num_attention_heads), (k, plain_k, c.num_key_value_heads)];
        for (which, (x, plain, heads)) in sides.into_iter().enumerate() {
            match (&self.qk_norms, c.architecture.qk_norm) {
                (None, _) => self.rotate(x, heads, 1.0)?,
                (Some(norms), QkNorm::AfterRotary) => {
                    self.rotate(plain, heads, 1.0)?;
                    machine.norm_forward(&norms[which], plain, x)?;
                }
                (Some(norms), _) => {
                    machine.norm_forward(&norms[which], plain, x)?;
                    self.rotate(x, heads, 1.0)?;
                }
            }
        }
        Ok(())
    }

    /// The block's output of `x` [N, E] into `y`, from what attention mixed.
    pub(crate) fn rest(
        &self,
        x: &M::Buffer<S>,
        y: &mut M::Buffer<S>,
        saved: &mut Saved<M, S>,
        ws: &mut Workspace<M, S>,
    ) -> Result<()> {
        let machine = self.pass.machine;
        let Workspace { normed, gated, linear, .. } = ws;
        let Saved { mixed, h, attended, fed, gate, up, .. } = saved;
        match self.pass.config.architecture.residual {
            Residual::Sequential => {
                machine.copy(x, h)?;
                self.add_to(&self.out, mixed, h, linear)?;
                machine.norm_forward(&self.mlp_in, h, normed)?;
                machine.copy(h, y)?;
                self.feed(normed, gate, up, gated, linear)?;
                self.add_to(&self.down, gated, y, linear)
            }
            Residual::Parallel => {
                machine.norm_forward(&self.mlp_in, x, normed)?;
                machine.copy(x, y)?;
                self.add_to(&self.out, mixed, y, linear)?;
                self.feed(normed, gate, up, gated, linear)?;
                self.add_to(&self.down, gated, y, linear)
            }
            Residual::Sandwich => {
                let (Some(attention_out), Some(mlp_out)) = (&self.attention_out, &self.mlp_out) else {
                    return Err(BaseError::Input {
                        message: "block: expected norms behind both halves".into(),
                    });
                };
                self.forward_of(&self.out, mixed, attended, linear)?;
                machine.norm_forward(attention_out, attended, h)?;
                machine.add(x, h)?;
                machine.norm_forward(&self.mlp_in, h, normed)?;
                self.feed(normed, gate, up, gated, linear)?;
                self.forward_of(&self.down, gated, fed, linear)?;
                machine.norm_forward(mlp_out, fed, y)?;
                machine.add(h, y)
            }
        }
    }

    /// What the feed-forward layer's last linear layer reads, into `gated`.
    fn feed(
        &self,
        normed: &M::Buffer<S>,
        gate: &mut M::Buffer<S>,
        up: &mut M::Buffer<S>,
        gated: &mut M::Buffer<S>,
        linear: &mut M::Scratch,
    ) -> Result<()> {
        self.widen(normed, gate, up, linear)?;
        self.activate(gate, up, gated)
    }

    /// The feed-forward layer's first linear layers.
    fn widen(
        &self,
        normed: &M::Buffer<S>,
        gate: &mut M::Buffer<S>,
        up: &mut M::Buffer<S>,
        linear: &mut M::Scratch,
    ) -> Result<()> {
        if let Some(to_gate) = &self.gate {
            self.forward_of(to_gate, normed, gate, linear)?;
        }
        self.forward_of(&self.up, normed, up, linear)
    }

    fn activate(&self, gate: &M::Buffer<S>, up: &M::Buffer<S>, out: &mut M::Buffer<S>) -> Result<()> {
        self.pass.machine.activate(self.pass.config.architecture.mlp, gate, up, out)
    }

    /// Backward: `d` is the gradient of the output and becomes that of the input `x`, which is complete only when
    /// `input_wanted`; gradients of what learns are added to `gradients`. `saved` is used up.
    pub(crate) fn backward(
        &self,
        x: &M::Buffer<S>,
        d: &mut M::Buffer<f32>,
        saved: &mut Saved<M, S>,
        ws: &mut Workspace<M, S>,
        gradients: &mut M::Gradients,
        input_wanted: bool,
    ) -> Result<()> {
        let machine = self.pass.machine;
        let parallel = self.pass.config.architecture.residual == Residual::Parallel;
        self.feed_back(x, d, saved, ws, gradients)?;
        // The gradient of the stream that the feed-forward half read: `d` and what came through its norm. Side by side,
        // attention's half takes its own gradient from `d` before that is added.
        if !parallel {
            machine.norm_backward(&self.mlp_in, &saved.h, &ws.d_normed, d, gradients)?;
        }
        let Workspace { normed, d_normed, d_wide, heads, linear, .. } = ws;
        let mixed = &saved.mixed;
        match &self.attention_out {
            None => machine.linear_backward(&self.out, mixed, d, Some((d_wide, false)), linear, gradients)?,
            Some(norm) => {
                machine.zeros(d_normed, M::len(x))?;
                machine.norm_backward(norm, &saved.attended, d, d_normed, gradients)?;
                let dx = Some((&mut *d_wide, false));
                machine.linear_backward(&self.out, mixed, d_normed, dx, linear, gradients)?;
            }
        }
        if parallel {
            machine.norm_backward(&self.mlp_in, x, d_normed, d, gradients)?;
        }
        self.attend_back(saved, d_wide, heads)?;
        self.heads_back(saved, heads, d_wide, gradients)?;

        machine.norm_forward(&self.attention_in, x, normed)?;
        let through = input_wanted || self.pass.setting.params.learns(Group::Norms);
        match &self.heads[..] {
            [layer] => {
                let c = self.pass.config;
                let parts = [&heads.q, &heads.k, &heads.v];
                machine.join_heads::<S>(parts, [c.num_attention_heads, c.head_dim], d_wide)?;
                let dx = through.then_some((&mut *d_normed, false));
                machine.linear_backward(layer, normed, d_wide, dx, linear, gradients)?;
            }
            layers => {
                let sides = [&heads.q, &heads.k, &heads.v];
                for (which, (layer, g)) in layers.iter().zip(sides).enumerate() {
                    let dx = through.then_some((&mut *d_normed, which > 0));
                    machine.linear_backward(layer, normed, g, dx, linear, gradients)?;
                }
            }
        }
        if through {
            machine.norm_backward(&self.attention_in, x, d_normed, d, gradients)?;
        }
        Ok(())
    }

    /// The feed-forward half's backward, from `d` to the gradient of its normed input in `ws.d_normed`.
    fn feed_back(
        &self,
        x: &M::Buffer<S>,
        d: &M::Buffer<f32>,
        saved: &mut Saved<M, S>,
        ws: &mut Workspace<M, S>,
        gradients: &mut M::Gradients,
    ) -> Result<()> {
        let (machine, a) = (self.pass.machine, &self.pass.config.architecture);
        let Workspace { normed, gated, d_normed, d_wide, linear, .. } = ws;
        let Saved { h, fed, gate, up, .. } = saved;
        self.activate(gate, up, gated)?;
        let d_gated = Some((&mut *d_wide, false));
        match &self.mlp_out {
            None => machine.linear_backward(&self.down, gated, d, d_gated, linear, gradients)?,
            Some(norm) => {
                machine.zeros(d_normed, M::len(x))?;
                machine.norm_backward(norm, fed, d, d_normed, gradients)?;
                machine.linear_backward(&self.down, gated, d_normed, d_gated, linear, gradients)?;
            }
        }
        machine.activate_back(a.mlp, gate, up, d_wide)?;
        let read = if a.residual == Residual::Parallel { x } else { h };
        machine.norm_forward(&self.mlp_in, read, normed)?;
        if let Some(layer) = &self.gate {
            machine.linear_backward(layer, normed, gate, Some((&mut *d_normed, false)), linear, gradients)?;
        }
        let dx = Some((d_normed, self.gate.is_some()));
        machine.linear_backward(&self.up, normed, up, dx, linear, gradients)
    }

    /// Back through the rotation whose result was `turned`, in place.
    fn rotate_back(
        &self,
        turned: &M::Buffer<S>,
        d: &mut M::Buffer<M::Heads<S>>,
        heads: usize,
        gradients: &mut M::Gradients,
    ) -> Result<()> {
        if let Some(spread) = self.pass.spread {
            let sizes = [heads, self.pass.config.head_dim];
            let machine = self.pass.machine;
            machine.spread_backward(spread, self.layer.rotation, turned, d, sizes, gradients)?;
        }
        self.rotate(d, heads, -1.0)
    }

    /// Back through the rotation and the norms of queries and keys, in place.
    fn heads_back(
        &self,
        saved: &Saved<M, S>,
        d: &mut HeadGradients<M, S>,
        d_wide: &mut M::Buffer<f32>,
        gradients: &mut M::Gradients,
    ) -> Result<()> {
        let c = self.pass.config;
        let after = c.architecture.qk_norm == QkNorm::AfterRotary;
        let sides = [
            (&mut d.q, &saved.q, &saved.plain_q, c.num_attention_heads),
            (&mut d.k, &saved.k, &saved.plain_k, c.num_key_value_heads),
        ];
        for (which, (d, normed, plain, heads)) in sides.into_iter().enumerate() {
            let turned = if after { plain } else { normed };
            if !after {
                self.rotate_back(turned, d, heads, gradients)?;
            }
            if let Some(norms) = &self.qk_norms {
                self.pass.machine.heads_norm_backward(&norms[which], plain, d, d_wide, gradients)?;
            }
            if after {
                self.rotate_back(turned, d, heads, gradients)?;
            }
        }
        Ok(())
    }
}
