//! One decoder block, forward and backward, on plain buffers.
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
//! Shapes: N = B·T entries; E model width, Q = H·D, KV = G·D, F feed-forward width, r rank. Row-major. Activations are
//! stored as S (f32 or bf16); the gradients of the stream, of q, k, v and of parameters are f32, those of gate and up take
//! the place of gate and up.
//! Errors: a parameter that is missing; shapes are fixed by the configuration.

use megacontext_kernels::attention::Pattern;
use megacontext_kernels::attention::prefix::{Own, PrefixAttention};
use megacontext_kernels::attention::slices::{Gradients as AttentionGradients, Prepared};
use megacontext_kernels::gelu::{
    Gelu, geglu_backward_in_place, geglu_into, gelu_backward_in_place, gelu_into,
};
use megacontext_kernels::{mlp, rope, rows};

use crate::architecture::{Layer, Mlp, QkNorm, Residual, Rotation};
use crate::buffers::{Activation, Buffer, KeysValues, Saved, Workspace, sized};
use crate::config::{DecoderConfig, LinearPart, NormPart};
use crate::error::{BaseError, Result};
use crate::gradients::Gradients;
use crate::norms::Norm;
use crate::params::Group;
use crate::projection::{Projection, Setting};
use crate::rope::Spread;

/// Rotation tables of a pass, cosines and sines.
#[derive(Clone, Copy)]
pub(crate) struct Tables<'a> {
    pub global: [&'a [f32]; 2],
    /// Of blocks that turn by a base of their own.
    pub local: Option<[&'a [f32]; 2]>,
}

/// What is the same for all blocks of a pass.
pub(crate) struct Pass<'a, S> {
    pub config: &'a DecoderConfig,
    pub setting: Setting<'a>,
    pub attending: Attending<'a, S>,
    pub tables: Tables<'a>,
    /// What the gradient of sigma needs, where it learns.
    pub spread: Option<&'a Spread>,
}

/// How the entries of a pass attend.
#[derive(Clone, Copy)]
pub(crate) enum Attending<'a, S> {
    /// The caller attends, between [`Block::qkv`] and [`Block::rest`].
    Elsewhere,
    /// Within their rows.
    Rows(&'a ByWindow<Prepared>),
    /// Within their rows, which continue a document that has run: its keys and values are here, block by block.
    Document(&'a ByWindow<PrefixAttention>, &'a [KeysValues<S>]),
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
pub(crate) struct Block<'a, S> {
    pass: &'a Pass<'a, S>,
    number: usize,
    layer: Layer,
    attention_in: Norm<'a>,
    attention_out: Option<Norm<'a>>,
    mlp_in: Norm<'a>,
    mlp_out: Option<Norm<'a>>,
    /// Of queries and keys.
    qk_norms: Option<[Norm<'a>; 2]>,
    /// What makes queries, keys and values: three layers, or one that gives them all, [H, 3, D].
    heads: Vec<Projection<'a>>,
    out: Projection<'a>,
    gate: Option<Projection<'a>>,
    up: Projection<'a>,
    down: Projection<'a>,
}

impl<'a, S: Activation> Block<'a, S> {
    pub(crate) fn new(layer: usize, pass: &'a Pass<'a, S>) -> Result<Self> {
        let (c, params) = (pass.config, pass.setting.params);
        let a = &c.architecture;
        let (width, eps) = (c.hidden_size, c.rms_norm_eps);
        let linear = |part| Projection::new(&c.linear_module(layer, part), pass.setting);
        let norm = |part, width| Norm::new(a.norm, &c.norm_module(layer, part), width, eps, params);
        let behind = |part| (a.residual == Residual::Sandwich).then(|| norm(part, width)).transpose();
        let qk_norms = match a.qk_norm {
            QkNorm::None => None,
            QkNorm::BeforeRotary => {
                Some([norm(NormPart::Query, c.head_dim)?, norm(NormPart::Key, c.head_dim)?])
            }
            QkNorm::AfterRotary => Some([Norm::plain(c.head_dim, eps), Norm::plain(c.head_dim, eps)]),
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
    fn attend(&self, saved: &mut Saved<S>) -> Result<()> {
        let Saved { q, k, v, mixed, .. } = saved;
        match self.pass.attending {
            Attending::Elsewhere => return no_attention(),
            Attending::Rows(attention) => attention.of(self.layer.window).forward_into(q, k, v, mixed),
            Attending::Document(attention, document) => {
                let (own, document) = (Own { q, k, v }, document[self.number].document());
                attention.of(self.layer.window).forward_into(own, document, mixed);
            }
        }
        Ok(())
    }

    /// Gradients of queries, keys and values for those of what was mixed.
    fn attend_back(&self, saved: &Saved<S>, d_mixed: &[f32], d: &mut AttentionGradients) -> Result<()> {
        let Saved { q, k, v, mixed, .. } = saved;
        match self.pass.attending {
            Attending::Elsewhere => return no_attention(),
            Attending::Rows(attention) => {
                attention.of(self.layer.window).backward_into(q, k, v, mixed, d_mixed, d);
            }
            Attending::Document(attention, document) => {
                let (own, document) = (Own { q, k, v }, document[self.number].document());
                attention.of(self.layer.window).backward_into(own, document, mixed, d_mixed, d);
            }
        }
        Ok(())
    }

    /// Rotates heads by the block's tables; `direction` is 1 forward and −1 back.
    fn rotate<X: Activation>(&self, x: &mut [X], heads: usize, direction: f32) -> Result<()> {
        let tables = match self.layer.rotation {
            Rotation::None => return Ok(()),
            Rotation::Global => self.pass.tables.global,
            Rotation::Local => self.pass.tables.local.ok_or_else(|| BaseError::Input {
                message: "rope tables: expected tables of the blocks with a base of their own, got none"
                    .to_string(),
            })?,
        };
        let (c, [cos, sin]) = (self.pass.config, tables);
        let a = &c.architecture;
        rope::rotate_part(x, heads, [c.head_dim, a.rotary_width], cos, sin, direction * a.rotary_direction);
        Ok(())
    }

    /// The block's output of `x` [N, E] into `y`; what backward needs into `saved`.
    pub(crate) fn forward(
        &self,
        x: &[S],
        y: &mut Buffer<S>,
        saved: &mut Saved<S>,
        ws: &mut Workspace<S>,
    ) -> Result<()> {
        self.mix(x, saved, ws)?;
        self.rest(x, y, saved, ws)
    }

    /// What backward needs of `x` [N, E] into `saved` once more, as [`Block::forward`] left it. The output is of no use then,
    /// so the last product is left out where nothing behind it is kept; `y` holds no output afterwards.
    pub(crate) fn remake(
        &self,
        x: &[S],
        y: &mut Buffer<S>,
        saved: &mut Saved<S>,
        ws: &mut Workspace<S>,
    ) -> Result<()> {
        self.mix(x, saved, ws)?;
        let Workspace { normed, linear, .. } = ws;
        let Saved { mixed, h, gate, up, .. } = &mut *saved;
        match self.pass.config.architecture.residual {
            Residual::Sequential => {
                let h = h.sized(x.len())?;
                rows::copy(x, h);
                self.out.forward_add(&mixed.out, h, linear)?;
                let normed = normed.sized(x.len())?;
                self.mlp_in.forward(h, normed)?;
                self.widen(normed, gate, up, linear)
            }
            Residual::Parallel => {
                let normed = normed.sized(x.len())?;
                self.mlp_in.forward(x, normed)?;
                self.widen(normed, gate, up, linear)
            }
            Residual::Sandwich => self.rest(x, y, saved, ws),
        }
    }

    /// Queries, keys and values of `x` [N, E] and what attention mixes of them, into `saved`.
    fn mix(&self, x: &[S], saved: &mut Saved<S>, ws: &mut Workspace<S>) -> Result<()> {
        self.qkv(x, saved, ws)?;
        sized(&mut saved.mixed.out, saved.q.len());
        sized(&mut saved.mixed.lse, self.pass.setting.entries * self.pass.config.num_attention_heads);
        self.attend(saved)
    }

    /// Queries, keys and values of `x` [N, E], normed and rotated, into `saved`.
    pub(crate) fn qkv(&self, x: &[S], saved: &mut Saved<S>, ws: &mut Workspace<S>) -> Result<()> {
        let c = self.pass.config;
        let Workspace { normed, gated, linear, .. } = ws;
        let normed = normed.sized(x.len())?;
        self.attention_in.forward(x, normed)?;
        let Saved { q, k, v, plain_q, plain_k, .. } = saved;
        // Where q and k are normed, backward needs them as they were before.
        let (first_q, first_k) =
            if self.qk_norms.is_some() { (&mut *plain_q, &mut *plain_k) } else { (&mut *q, &mut *k) };
        match &self.heads[..] {
            [to_all] => {
                to_all.forward(normed, gated, linear)?;
                let len = self.pass.setting.entries * c.num_attention_heads * c.head_dim;
                let parts = [first_q.sized(len)?, first_k.sized(len)?, v.sized(len)?];
                rows::split_heads(gated, c.head_dim, c.num_attention_heads, parts);
            }
            layers => {
                for (layer, made) in layers.iter().zip([first_q, first_k, v]) {
                    layer.forward(normed, made, linear)?;
                }
            }
        }
        let sides = [(q, plain_q, c.num_attention_heads), (k, plain_k, c.num_key_value_heads)];
        for (which, (x, plain, heads)) in sides.into_iter().enumerate() {
            match (&self.qk_norms, c.architecture.qk_norm) {
                (None, _) => self.rotate(x, heads, 1.0)?,
                (Some(norms), QkNorm::AfterRotary) => {
                    self.rotate(plain, heads, 1.0)?;
                    norms[which].forward(plain, x.sized(plain.len())?)?;
                }
                (Some(norms), _) => {
                    norms[which].forward(plain, x.sized(plain.len())?)?;
                    self.rotate(x, heads, 1.0)?;
                }
            }
        }
        Ok(())
    }

    /// The block's output of `x` [N, E] into `y`, from what attention mixed.
    pub(crate) fn rest(
        &self,
        x: &[S],
        y: &mut Buffer<S>,
        saved: &mut Saved<S>,
        ws: &mut Workspace<S>,
    ) -> Result<()> {
        let Workspace { normed, gated, linear, .. } = ws;
        let y = y.sized(x.len())?;
        let normed = normed.sized(x.len())?;
        let Saved { mixed, h, attended, fed, gate, up, .. } = saved;
        match self.pass.config.architecture.residual {
            Residual::Sequential => {
                let h = h.sized(x.len())?;
                rows::copy(x, h);
                self.out.forward_add(&mixed.out, h, linear)?;
                self.mlp_in.forward(h, normed)?;
                rows::copy(h, y);
                self.feed(normed, gate, up, gated, linear)?;
                self.down.forward_add(gated, y, linear)
            }
            Residual::Parallel => {
                self.mlp_in.forward(x, normed)?;
                rows::copy(x, y);
                self.out.forward_add(&mixed.out, y, linear)?;
                self.feed(normed, gate, up, gated, linear)?;
                self.down.forward_add(gated, y, linear)
            }
            Residual::Sandwich => {
                let (Some(attention_out), Some(mlp_out)) = (&self.attention_out, &self.mlp_out) else {
                    return Err(BaseError::Input {
                        message: "block: expected norms behind both halves".into(),
                    });
                };
                let h = h.sized(x.len())?;
                self.out.forward(&mixed.out, attended, linear)?;
                attention_out.forward(attended, h)?;
                rows::add_assign(x, h);
                self.mlp_in.forward(h, normed)?;
                self.feed(normed, gate, up, gated, linear)?;
                self.down.forward(gated, fed, linear)?;
                mlp_out.forward(fed, y)?;
                rows::add_assign(h, y);
                Ok(())
            }
        }
    }

    /// What the feed-forward layer's last linear layer reads, into `gated`.
    fn feed(
        &self,
        normed: &[S],
        gate: &mut Buffer<S>,
        up: &mut Buffer<S>,
        gated: &mut Buffer<S>,
        linear: &mut megacontext_kernels::linear::Scratch,
    ) -> Result<()> {
        self.widen(normed, gate, up, linear)?;
        self.activate(gate, up, gated)
    }

    /// The feed-forward layer's first linear layers.
    fn widen(
        &self,
        normed: &[S],
        gate: &mut Buffer<S>,
        up: &mut Buffer<S>,
        linear: &mut megacontext_kernels::linear::Scratch,
    ) -> Result<()> {
        if let Some(to_gate) = &self.gate {
            to_gate.forward(normed, gate, linear)?;
        }
        self.up.forward(normed, up, linear)
    }

    fn activate(&self, gate: &[S], up: &[S], out: &mut Buffer<S>) -> Result<()> {
        let out = out.sized(up.len())?;
        match self.pass.config.architecture.mlp {
            Mlp::SwiGlu => mlp::swiglu_into(gate, up, out),
            Mlp::GeGlu => geglu_into(Gelu::Tanh, gate, up, out),
            Mlp::Gelu => gelu_into(Gelu::Exact, up, out),
            Mlp::GeluTanh => gelu_into(Gelu::Tanh, up, out),
            Mlp::Relu2 => mlp::relu2_into(up, out),
        }
        Ok(())
    }

    /// `gate` and `up` become their own gradients, given that of what they were activated to.
    fn activate_back(&self, gate: &mut [S], up: &mut [S], g: &[f32]) {
        match self.pass.config.architecture.mlp {
            Mlp::SwiGlu => mlp::swiglu_backward_in_place(gate, up, g),
            Mlp::GeGlu => geglu_backward_in_place(Gelu::Tanh, gate, up, g),
            Mlp::Gelu => gelu_backward_in_place(Gelu::Exact, up, g),
            Mlp::GeluTanh => gelu_backward_in_place(Gelu::Tanh, up, g),
            Mlp::Relu2 => mlp::relu2_backward_in_place(up, g),
        }
    }

    /// Backward: `d` is the gradient of the output and becomes that of the input `x`, which is complete only when
    /// `input_wanted`; gradients of what learns are added to `gradients`. `saved` is used up.
    pub(crate) fn backward(
        &self,
        x: &[S],
        d: &mut [f32],
        saved: &mut Saved<S>,
        ws: &mut Workspace<S>,
        gradients: &mut Gradients,
        input_wanted: bool,
    ) -> Result<()> {
        let parallel = self.pass.config.architecture.residual == Residual::Parallel;
        self.feed_back(x, d, saved, ws, gradients)?;
        // The gradient of the stream that the feed-forward half read: `d` and what came through its norm. Side by side,
        // attention's half takes its own gradient from `d` before that is added.
        if !parallel {
            self.mlp_in.backward(&saved.h, &ws.d_normed, d, gradients)?;
        }
        let Workspace { normed, d_normed, d_wide, attention, linear, .. } = ws;
        let d_mixed = d_wide.sized(saved.mixed.out.len())?;
        match &self.attention_out {
            None => {
                self.out.backward(&saved.mixed.out, d, Some((&mut *d_mixed, false)), linear, gradients)?
            }
            Some(norm) => {
                let d_attended = d_normed.sized(x.len())?;
                d_attended.fill(0.0);
                norm.backward(&saved.attended, d, d_attended, gradients)?;
                let d_attended = &*d_attended;
                self.out.backward(
                    &saved.mixed.out,
                    d_attended,
                    Some((&mut *d_mixed, false)),
                    linear,
                    gradients,
                )?;
            }
        }
        if parallel {
            self.mlp_in.backward(x, d_normed, d, gradients)?;
        }
        sized(&mut attention.q, saved.q.len());
        sized(&mut attention.k, saved.k.len());
        sized(&mut attention.v, saved.v.len());
        self.attend_back(saved, d_mixed, attention)?;
        self.heads_back(saved, attention, d_wide, gradients)?;

        let normed = normed.sized(x.len())?;
        self.attention_in.forward(x, normed)?;
        let through = input_wanted || self.pass.setting.params.learns(Group::Norms);
        let d_normed = d_normed.sized(x.len())?;
        match &self.heads[..] {
            [layer] => {
                let c = self.pass.config;
                let d_fused = d_wide.sized(3 * attention.q.len())?;
                let parts = [&attention.q[..], &attention.k, &attention.v];
                rows::join_heads(parts, c.head_dim, c.num_attention_heads, d_fused);
                let dx = through.then_some((&mut *d_normed, false));
                layer.backward(normed, &*d_fused, dx, linear, gradients)?;
            }
            layers => {
                let sides = [&attention.q, &attention.k, &attention.v];
                for (which, (layer, g)) in layers.iter().zip(sides).enumerate() {
                    let dx = through.then_some((&mut *d_normed, which > 0));
                    layer.backward(normed, g, dx, linear, gradients)?;
                }
            }
        }
        if through {
            self.attention_in.backward(x, d_normed, d, gradients)?;
        }
        Ok(())
    }

    /// The feed-forward half's backward, from `d` to the gradient of its normed input in `ws.d_normed`.
    fn feed_back(
        &self,
        x: &[S],
        d: &[f32],
        saved: &mut Saved<S>,
        ws: &mut Workspace<S>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let Workspace { normed, gated, d_normed, d_wide, linear, .. } = ws;
        let Saved { h, fed, gate, up, .. } = saved;
        self.activate(gate, up, gated)?;
        let d_gated = d_wide.sized(up.len())?;
        match &self.mlp_out {
            None => self.down.backward(gated, d, Some((&mut *d_gated, false)), linear, gradients)?,
            Some(norm) => {
                let d_fed = d_normed.sized(x.len())?;
                d_fed.fill(0.0);
                norm.backward(fed, d, d_fed, gradients)?;
                self.down.backward(gated, &*d_fed, Some((&mut *d_gated, false)), linear, gradients)?;
            }
        }
        self.activate_back(gate, up, d_gated);
        let parallel = self.pass.config.architecture.residual == Residual::Parallel;
        let normed = normed.sized(x.len())?;
        self.mlp_in.forward(if parallel { x } else { &h[..] }, normed)?;
        let d_normed = d_normed.sized(x.len())?;
        if let Some(layer) = &self.gate {
            layer.backward(normed, gate, Some((&mut *d_normed, false)), linear, gradients)?;
        }
        self.up.backward(normed, up, Some((&mut *d_normed, self.gate.is_some())), linear, gradients)
    }

    /// Back through the rotation whose result was `turned`, in place.
    fn rotate_back(
        &self,
        turned: &[S],
        d: &mut [f32],
        heads: usize,
        gradients: &mut Gradients,
    ) -> Result<()> {
        if let Some(spread) = self.pass.spread {
            spread.backward(self.layer.rotation, turned, d, heads, self.pass.config.head_dim, gradients);
        }
        self.rotate(d, heads, -1.0)
    }

    /// Back through the rotation and the norms of queries and keys, in place.
    fn heads_back(
        &self,
        saved: &Saved<S>,
        d: &mut AttentionGradients,
        d_wide: &mut Buffer<f32>,
        gradients: &mut Gradients,
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
                let dx = d_wide.sized(d.len())?;
                dx.fill(0.0);
                norms[which].backward(plain, d, dx, gradients)?;
                rows::copy(dx, d);
            }
            if after {
                self.rotate_back(turned, d, heads, gradients)?;
            }
        }
        Ok(())
    }
}
