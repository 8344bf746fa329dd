//! One decoder block, forward and backward, on plain buffers.
//!
//! Source: the Llama block, with LoRA (Hu et al. 2021) on the attention projections:
//!   n = rms(x)·g₁; q, k, v = linear(n), q and k rotated; h = x + linear(attention(q, k, v));
//!   m = rms(h)·g₂; y = h + W_down(silu(W_gate·m) ∘ W_up·m).
//! Backward is the chain rule over these lines, last to first; normed inputs and the gated product are made again
//! instead of kept.
//!
//! Why not candle's tape: its backward allocates, zeroes and adds a whole tensor for every use of every operand, on one
//! thread. Here products add into their target, residuals are never copied, and all buffers live in a [`Workspace`] that
//! is reused from block to block and step to step. The tests hold it against the same block written as taped candle
//! operations.
//!
//! Shapes: N = B·T entries; E model width, Q = H·D, KV = G·D, F feed-forward width, r rank. Row-major. Activations are
//! stored as S (f32 or bf16); the gradients of the stream, of q, k, v and of parameters are f32, those of gate and up take
//! the place of gate and up.
//! Errors: a parameter that is missing; shapes are fixed by the configuration.

use megacontext_kernels::attention::slices::Prepared;
use megacontext_kernels::{mlp, norm, rope};

use crate::architecture::Rotation;
use crate::buffers::{Activation, Buffer, Saved, Workspace, sized};
use crate::config::DecoderConfig;
use crate::error::Result;
use crate::gradients::Gradients;
use crate::params::{Group, Held};
use crate::projection::{Projection, Setting};
use crate::rope::Spread;

/// The linear layers of a block, in the order they are held here.
const LINEARS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];
const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;
const NORMS: [&str; 2] = ["input_layernorm", "post_attention_layernorm"];

/// What is the same for all blocks of a pass.
pub(crate) struct Pass<'a> {
    pub config: &'a DecoderConfig,
    pub setting: Setting<'a>,
    pub attention: &'a Prepared,
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    /// What the gradient of sigma needs, where it learns.
    pub spread: Option<&'a Spread>,
}

/// A block's parameters, looked up once per pass.
pub(crate) struct Block<'a> {
    pass: &'a Pass<'a>,
    norms: [(String, Held<'a>); 2],
    linears: Vec<Projection<'a>>,
    rotation: Rotation,
}

impl<'a> Block<'a> {
    pub(crate) fn new(layer: usize, pass: &'a Pass<'a>) -> Result<Self> {
        let path = |module: &str| format!("model.layers.{layer}.{module}");
        let norm = |module: &str| -> Result<(String, Held<'a>)> {
            let name = format!("{}.weight", path(module));
            let gain = pass.setting.params.values(&name)?;
            Ok((name, gain))
        };
        let linears = LINEARS.into_iter().map(|module| Projection::new(layer, &path(module), pass.setting));
        let linears = linears.collect::<Result<Vec<_>>>()?;
        let rotation = pass.config.architecture.layers[layer].rotation;
        Ok(Self { pass, norms: [norm(NORMS[0])?, norm(NORMS[1])?], linears, rotation })
    }

    fn norm<S: Activation>(&self, which: usize, x: &[S], out: &mut Buffer<S>) -> Result<()> {
        let gain = self.norms[which].1.f32()?;
        norm::rms_forward_into(x, gain, self.pass.config.rms_norm_eps as f32, out.sized(x.len())?);
        Ok(())
    }

    fn norm_back<S: Activation>(
        &self,
        which: usize,
        x: &[S],
        g: &[f32],
        dx: &mut [f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (name, gain) = &self.norms[which];
        let gain = gain.f32()?;
        let dw = self
            .pass
            .setting
            .params
            .learns(Group::Norms)
            .then(|| &mut gradients.buffer(name, gain.len())[..]);
        norm::rms_backward_add(x, gain, g, self.pass.config.rms_norm_eps as f32, dx, dw);
        Ok(())
    }

    fn rotate<S: Activation>(&self, x: &mut [S], heads: usize, direction: f32) {
        rope::rotate(x, heads, self.pass.config.head_dim, self.pass.cos, self.pass.sin, direction);
    }

    /// The block's output of `x` [N, E] into `y`; what backward needs into `saved`.
    pub(crate) fn forward<S: Activation>(
        &self,
        x: &[S],
        y: &mut Buffer<S>,
        saved: &mut Saved<S>,
        ws: &mut Workspace<S>,
    ) -> Result<()> {
        let c = self.pass.config;
        let n = self.pass.setting.entries;
        let Workspace { normed, gated, linear, .. } = ws;
        self.norm(0, x, normed)?;
        self.linears[Q].forward(normed, &mut saved.q, linear)?;
        self.linears[K].forward(normed, &mut saved.k, linear)?;
        self.linears[V].forward(normed, &mut saved.v, linear)?;
        self.rotate(&mut saved.q, c.num_attention_heads, 1.0);
        self.rotate(&mut saved.k, c.num_key_value_heads, 1.0);
        sized(&mut saved.mixed.out, saved.q.len());
        sized(&mut saved.mixed.lse, n * c.num_attention_heads);
        self.pass.attention.forward_into(&saved.q, &saved.k, &saved.v, &mut saved.mixed);
        let h = saved.h.sized(x.len())?;
        h.copy_from_slice(x);
        self.linears[O].forward_add(&saved.mixed.out, h, linear)?;

        self.norm(1, &saved.h, normed)?;
        self.linears[GATE].forward(normed, &mut saved.gate, linear)?;
        self.linears[UP].forward(normed, &mut saved.up, linear)?;
        let gated = gated.sized(saved.gate.len())?;
        mlp::swiglu_into(&saved.gate, &saved.up, gated);
        let y = y.sized(x.len())?;
        y.copy_from_slice(&saved.h);
        self.linears[DOWN].forward_add(gated, y, linear)?;
        Ok(())
    }

    /// Backward: `d` is the gradient of the output and becomes that of the input `x`, which is complete only when
    /// `input_wanted`; gradients of what learns are added to `gradients`. `saved` is used up.
    pub(crate) fn backward<S: Activation>(
        &self,
        x: &[S],
        d: &mut [f32],
        saved: &mut Saved<S>,
        ws: &mut Workspace<S>,
        gradients: &mut Gradients,
        input_wanted: bool,
    ) -> Result<()> {
        let c = self.pass.config;
        let Workspace { normed, gated, d_normed, d_wide, attention, linear } = ws;

        let gated = gated.sized(saved.gate.len())?;
        mlp::swiglu_into(&saved.gate, &saved.up, gated);
        let d_gated = d_wide.sized(saved.gate.len())?;
        self.linears[DOWN].backward(gated, d, Some((&mut *d_gated, false)), linear, gradients)?;
        mlp::swiglu_backward_in_place(&mut saved.gate, &mut saved.up, d_gated);
        self.norm(1, &saved.h, normed)?;
        let d_normed = d_normed.sized(x.len())?;
        self.linears[GATE].backward(normed, &saved.gate, Some((&mut *d_normed, false)), linear, gradients)?;
        self.linears[UP].backward(normed, &saved.up, Some((&mut *d_normed, true)), linear, gradients)?;
        self.norm_back(1, &saved.h, d_normed, d, gradients)?;

        let d_mixed = d_wide.sized(saved.mixed.out.len())?;
        self.linears[O].backward(&saved.mixed.out, d, Some((&mut *d_mixed, false)), linear, gradients)?;
        sized(&mut attention.q, saved.q.len());
        sized(&mut attention.k, saved.k.len());
        sized(&mut attention.v, saved.v.len());
        self.pass.attention.backward_into(&saved.q, &saved.k, &saved.v, &saved.mixed, d_mixed, attention);
        if let Some(spread) = self.pass.spread {
            let (rotation, heads) = (self.rotation, c.num_attention_heads);
            spread.backward(rotation, &saved.q, &attention.q, heads, c.head_dim, gradients);
            let heads = c.num_key_value_heads;
            spread.backward(rotation, &saved.k, &attention.k, heads, c.head_dim, gradients);
        }
        self.rotate(&mut attention.q, c.num_attention_heads, -1.0);
        self.rotate(&mut attention.k, c.num_key_value_heads, -1.0);
        self.norm(0, x, normed)?;
        let through = input_wanted || self.pass.setting.params.learns(Group::Norms);
        for (which, g, add) in [(Q, &attention.q, false), (K, &attention.k, true), (V, &attention.v, true)] {
            let dx = through.then_some((&mut *d_normed, add));
            self.linears[which].backward(normed, g, dx, linear, gradients)?;
        }
        if through {
            self.norm_back(0, x, d_normed, d, gradients)?;
        }
        Ok(())
    }
}
