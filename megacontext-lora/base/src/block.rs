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
use megacontext_kernels::gemm::Products;
use megacontext_kernels::linear::{Dropout, Layer, LayerGradients, LoraSlices, Scratch};
use megacontext_kernels::{mlp, norm, rope};

use crate::buffers::{Activation, Buffer, Saved, Workspace, sized};
use crate::config::LlamaConfig;
use crate::error::{BaseError, Result};
use crate::gradients::Gradients;
use crate::lora::LoraConfig;
use crate::params::{Group, Held, ParamStore};
use crate::random::{Random, mix};

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
    pub config: &'a LlamaConfig,
    pub params: &'a ParamStore,
    pub lora: Option<&'a LoraConfig>,
    pub attention: &'a Prepared,
    pub cos: &'a [f32],
    pub sin: &'a [f32],
    pub dropout_seed: Option<u64>,
    pub products: Products,
    /// N.
    pub entries: usize,
}

struct Linear<'a> {
    name: String,
    weight: Held<'a>,
    lora: Option<Lora<'a>>,
    out: usize,
    inp: usize,
}

struct Lora<'a> {
    a: Held<'a>,
    b: Held<'a>,
    rank: usize,
    scale: f32,
    dropout: Option<Dropout>,
}

/// A block's parameters, looked up once per pass.
pub(crate) struct Block<'a> {
    pass: &'a Pass<'a>,
    norms: [(String, Held<'a>); 2],
    linears: Vec<Linear<'a>>,
}

impl<'a> Block<'a> {
    pub(crate) fn new(layer: usize, pass: &'a Pass<'a>) -> Result<Self> {
        let path = |module: &str| format!("model.layers.{layer}.{module}");
        let norm = |module: &str| -> Result<(String, Held<'a>)> {
            let name = format!("{}.weight", path(module));
            let gain = pass.params.values(&name)?;
            Ok((name, gain))
        };
        let mut linears = Vec::with_capacity(LINEARS.len());
        for module in LINEARS {
            let name = path(module);
            let weight_name = format!("{name}.weight");
            let weight = pass.params.values(&weight_name)?;
            let Some(&[out, inp]) = pass.params.shape(&weight_name) else {
                let message = "expected a matrix [out, in]".to_string();
                return Err(BaseError::Parameter { name: weight_name, message });
            };
            let target = module.rsplit('.').next().unwrap_or(module);
            let lora = match pass.lora.filter(|l| l.applies(layer, target)) {
                None => None,
                Some(config) => {
                    let seed = |seed: u64| Random::named(mix(seed), &name).next_u64();
                    let dropped = pass.dropout_seed.filter(|_| config.dropout > 0.0);
                    Some(Lora {
                        a: pass.params.values(&format!("{name}.lora_A.weight"))?,
                        b: pass.params.values(&format!("{name}.lora_B.weight"))?,
                        rank: config.r,
                        scale: config.scale() as f32,
                        dropout: dropped.map(|s| Dropout { p: config.dropout, seed: seed(s) }),
                    })
                }
            };
            linears.push(Linear { name, weight, lora, out, inp });
        }
        Ok(Self { pass, norms: [norm(NORMS[0])?, norm(NORMS[1])?], linears })
    }

    fn layer(&self, which: usize) -> Result<Layer<'_>> {
        let l = &self.linears[which];
        let lora = match &l.lora {
            None => None,
            Some(lora) => Some(LoraSlices {
                a: lora.a.f32()?,
                b: lora.b.f32()?,
                rank: lora.rank,
                scale: lora.scale,
                dropout: lora.dropout,
            }),
        };
        let products = self.pass.products;
        Ok(Layer { weight: l.weight.weight(), out: l.out, inp: l.inp, lora, products })
    }

    /// `y` = linear `which` of `x`.
    fn project<S: Activation>(
        &self,
        which: usize,
        x: &[S],
        y: &mut Buffer<S>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let y = y.sized(self.pass.entries * self.linears[which].out)?;
        self.layer(which)?.forward(x, y, false, scratch);
        Ok(())
    }

    /// Gradients of linear `which`, whose input was `x` and whose result has the gradient `g`: of what learns, into
    /// `gradients`; of the input, added to or written over `dx` where it is wanted.
    fn project_back<S: Activation, G: Activation>(
        &self,
        which: usize,
        x: &[S],
        g: &[G],
        dx: Option<(&mut [f32], bool)>,
        scratch: &mut Scratch,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let l = &self.linears[which];
        let learns = |group| self.pass.params.learns(group);
        let mut taken: Vec<(String, Vec<f32>)> = Vec::with_capacity(2);
        let mut take = |suffix: &str, len: usize| {
            let name = format!("{}.{suffix}", l.name);
            let buffer = gradients.take(&name, len);
            taken.push((name, buffer));
        };
        match &l.lora {
            None if learns(Group::Base) => take("weight", l.out * l.inp),
            Some(lora) if learns(Group::Lora) => {
                take("lora_A.weight", lora.rank * l.inp);
                take("lora_B.weight", l.out * lora.rank);
            }
            _ => {}
        }
        let into = match &mut taken[..] {
            [(_, weight)] => LayerGradients { weight: Some(weight), a: None, b: None },
            [(_, a), (_, b)] => LayerGradients { weight: None, a: Some(a), b: Some(b) },
            _ => LayerGradients { weight: None, a: None, b: None },
        };
        self.layer(which)?.backward(x, g, dx, into, scratch);
        for (name, buffer) in taken {
            gradients.put(name, buffer);
        }
        Ok(())
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
        let dw = self.pass.params.learns(Group::Norms).then(|| &mut gradients.buffer(name, gain.len())[..]);
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
        let n = self.pass.entries;
        let Workspace { normed, gated, linear, .. } = ws;
        self.norm(0, x, normed)?;
        self.project(Q, normed, &mut saved.q, linear)?;
        self.project(K, normed, &mut saved.k, linear)?;
        self.project(V, normed, &mut saved.v, linear)?;
        self.rotate(&mut saved.q, c.num_attention_heads, 1.0);
        self.rotate(&mut saved.k, c.num_key_value_heads, 1.0);
        sized(&mut saved.mixed.out, saved.q.len());
        sized(&mut saved.mixed.lse, n * c.num_attention_heads);
        self.pass.attention.forward_into(&saved.q, &saved.k, &saved.v, &mut saved.mixed);
        let h = saved.h.sized(x.len())?;
        h.copy_from_slice(x);
        self.layer(O)?.forward(&saved.mixed.out, h, true, linear);

        self.norm(1, &saved.h, normed)?;
        self.project(GATE, normed, &mut saved.gate, linear)?;
        self.project(UP, normed, &mut saved.up, linear)?;
        let gated = gated.sized(saved.gate.len())?;
        mlp::swiglu_into(&saved.gate, &saved.up, gated);
        let y = y.sized(x.len())?;
        y.copy_from_slice(&saved.h);
        self.layer(DOWN)?.forward(gated, y, true, linear);
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
        self.project_back(DOWN, gated, d, Some((&mut *d_gated, false)), linear, gradients)?;
        mlp::swiglu_backward_in_place(&mut saved.gate, &mut saved.up, d_gated);
        self.norm(1, &saved.h, normed)?;
        let d_normed = d_normed.sized(x.len())?;
        self.project_back(GATE, normed, &saved.gate, Some((&mut *d_normed, false)), linear, gradients)?;
        self.project_back(UP, normed, &saved.up, Some((&mut *d_normed, true)), linear, gradients)?;
        self.norm_back(1, &saved.h, d_normed, d, gradients)?;

        let d_mixed = d_wide.sized(saved.mixed.out.len())?;
        self.project_back(O, &saved.mixed.out, d, Some((&mut *d_mixed, false)), linear, gradients)?;
        sized(&mut attention.q, saved.q.len());
        sized(&mut attention.k, saved.k.len());
        sized(&mut attention.v, saved.v.len());
        self.pass.attention.backward_into(&saved.q, &saved.k, &saved.v, &saved.mixed, d_mixed, attention);
        self.rotate(&mut attention.q, c.num_attention_heads, -1.0);
        self.rotate(&mut attention.k, c.num_key_value_heads, -1.0);
        self.norm(0, x, normed)?;
        let through = input_wanted || self.pass.params.learns(Group::Norms);
        for (which, g, add) in [(Q, &attention.q, false), (K, &attention.k, true), (V, &attention.v, true)] {
            let dx = through.then_some((&mut *d_normed, add));
            self.project_back(which, normed, g, dx, linear, gradients)?;
        }
        if through {
            self.norm_back(0, x, d_normed, d, gradients)?;
        }
        Ok(())
    }
}
