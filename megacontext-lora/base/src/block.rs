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
//! Shapes: N = B·T entries; E model width, Q = H·D, KV = G·D, F feed-forward width, r rank. Row-major, f32.
//! Errors: a parameter that is missing; shapes are fixed by the configuration.

use candle_core::Tensor;
use megacontext_kernels::attention::slices::{Mixed, Prepared};
use megacontext_kernels::cpu::Values;
use megacontext_kernels::gemm::{Mat, matmul};
use megacontext_kernels::linear::Dropout;
use megacontext_kernels::{attention, mlp, norm, rope};

use crate::config::LlamaConfig;
use crate::error::{BaseError, Result};
use crate::gradients::Gradients;
use crate::lora::LoraConfig;
use crate::params::{Group, ParamStore};
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
    /// N.
    pub entries: usize,
}

/// What the forward pass of a block leaves for its backward pass, besides the block's input.
#[derive(Default)]
pub(crate) struct Saved {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mixed: Mixed,
    h: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

/// Buffers that are free between blocks.
#[derive(Default)]
pub(crate) struct Workspace {
    normed: Vec<f32>,
    gated: Vec<f32>,
    narrow: Vec<f32>,
    wide: Vec<f32>,
    low: Vec<f32>,
    low_gradient: Vec<f32>,
    dropped: Vec<f32>,
    grads: attention::slices::Gradients,
}

/// A buffer of exactly `len` values; what is in it is whatever was there.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

struct Linear {
    name: String,
    weight: Tensor,
    lora: Option<[Tensor; 2]>,
    dropout: Option<Dropout>,
    scale: f32,
    out: usize,
    inp: usize,
}

/// A block's parameters, looked up once per pass.
pub(crate) struct Block<'a> {
    pass: &'a Pass<'a>,
    norms: [(String, Tensor); 2],
    linears: Vec<Linear>,
}

impl<'a> Block<'a> {
    pub(crate) fn new(layer: usize, pass: &'a Pass<'a>) -> Result<Self> {
        let get = |name: &str| {
            pass.params.get(name).ok_or_else(|| BaseError::Parameter {
                name: name.to_string(),
                message: "no parameter of this name".to_string(),
            })
        };
        let path = |module: &str| format!("model.layers.{layer}.{module}");
        let norm = |module: &str| -> Result<(String, Tensor)> {
            let name = format!("{}.weight", path(module));
            let gain = get(&name)?;
            Ok((name, gain))
        };
        let mut linears = Vec::with_capacity(LINEARS.len());
        for module in LINEARS {
            let name = path(module);
            let weight = get(&format!("{name}.weight"))?;
            let (out, inp) = weight.dims2()?;
            let target = module.rsplit('.').next().unwrap_or(module);
            let config = pass.lora.filter(|l| l.applies(layer, target));
            let lora = match config {
                Some(_) => {
                    Some([get(&format!("{name}.lora_A.weight"))?, get(&format!("{name}.lora_B.weight"))?])
                }
                None => None,
            };
            let seed = |seed: u64| Random::named(mix(seed), &name).next_u64();
            let dropout = config.and_then(|l| {
                pass.dropout_seed.filter(|_| l.dropout > 0.0).map(|s| Dropout { p: l.dropout, seed: seed(s) })
            });
            let scale = config.map_or(0.0, |l| l.scale() as f32);
            linears.push(Linear { name, weight, lora, dropout, scale, out, inp });
        }
        Ok(Self { pass, norms: [norm(NORMS[0])?, norm(NORMS[1])?], linears })
    }

    /// `y` (+)= linear `which` of `x`.
    fn project(&self, which: usize, x: &[f32], y: &mut Vec<f32>, add: bool, ws: &mut Lanes) -> Result<()> {
        let (n, l) = (self.pass.entries, &self.linears[which]);
        let y = sized(y, n * l.out);
        let w = Values::of(&l.weight)?;
        matmul(y, Mat::new(x, n, l.inp), Mat::new(&w, l.out, l.inp).t(), 1.0, add);
        let Some([a, b]) = &l.lora else { return Ok(()) };
        let rank = a.dims()[0];
        let (a, b) = (Values::of(a)?, Values::of(b)?);
        let x = match l.dropout {
            None => x,
            Some(dropout) => dropped(ws.dropped, dropout, x),
        };
        let low = sized(ws.low, n * rank);
        matmul(low, Mat::new(x, n, l.inp), Mat::new(&a, rank, l.inp).t(), 1.0, false);
        matmul(y, Mat::new(low, n, rank), Mat::new(&b, l.out, rank).t(), l.scale, true);
        Ok(())
    }

    /// Gradients of linear `which`, whose input was `x` and whose result has the gradient `g`: of what learns, into
    /// `gradients`; of the input, added to or written over `dx` where it is wanted.
    fn project_back(
        &self,
        which: usize,
        x: &[f32],
        g: &[f32],
        dx: Option<(&mut [f32], bool)>,
        ws: &mut Lanes,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (n, l) = (self.pass.entries, &self.linears[which]);
        let learns = |group| self.pass.params.learns(group);
        let g = Mat::new(g, n, l.out);
        let weight = &l.weight;
        if learns(Group::Base) && l.lora.is_none() {
            let dw = gradients.buffer(&format!("{}.weight", l.name), l.out * l.inp);
            matmul(dw, g.t(), Mat::new(x, n, l.inp), 1.0, true);
        }
        let mut dx = dx;
        if let Some((dx, add)) = &mut dx {
            let w = Values::of(weight)?;
            matmul(dx, g, Mat::new(&w, l.out, l.inp), 1.0, *add);
        }
        let Some([a, b]) = &l.lora else { return Ok(()) };
        let rank = a.dims()[0];
        let (a, b) = (Values::of(a)?, Values::of(b)?);
        let low_gradient = sized(ws.low_gradient, n * rank);
        matmul(low_gradient, g, Mat::new(&b, l.out, rank), l.scale, false);
        let low_gradient = Mat::new(low_gradient, n, rank);
        if learns(Group::Lora) {
            let low = sized(ws.low, n * rank);
            let x = match l.dropout {
                None => x,
                Some(dropout) => dropped(ws.dropped, dropout, x),
            };
            let x = Mat::new(x, n, l.inp);
            matmul(low, x, Mat::new(&a, rank, l.inp).t(), l.scale, false);
            matmul(
                gradients.buffer(&format!("{}.lora_A.weight", l.name), rank * l.inp),
                low_gradient.t(),
                x,
                1.0,
                true,
            );
            let db = gradients.buffer(&format!("{}.lora_B.weight", l.name), l.out * rank);
            matmul(db, g.t(), Mat::new(low, n, rank), 1.0, true);
        }
        if let Some((dx, _)) = dx {
            let a = Mat::new(&a, rank, l.inp);
            match l.dropout {
                None => matmul(dx, low_gradient, a, 1.0, true),
                Some(dropout) => {
                    let through = sized(ws.dropped, n * l.inp);
                    matmul(through, low_gradient, a, 1.0, false);
                    dropout.apply(through);
                    for (sum, value) in dx.iter_mut().zip(through) {
                        *sum += *value;
                    }
                }
            }
        }
        Ok(())
    }

    fn norm(&self, which: usize, x: &[f32], out: &mut Vec<f32>) -> Result<()> {
        let gain = Values::of(&self.norms[which].1)?;
        norm::rms_forward_into(x, &gain, self.pass.config.rms_norm_eps as f32, sized(out, x.len()));
        Ok(())
    }

    fn norm_back(
        &self,
        which: usize,
        x: &[f32],
        g: &[f32],
        dx: &mut [f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (name, gain) = &self.norms[which];
        let gain = Values::of(gain)?;
        let dw = self.pass.params.learns(Group::Norms).then(|| gradients.buffer(name, gain.len()));
        norm::rms_backward_add(x, &gain, g, self.pass.config.rms_norm_eps as f32, dx, dw.map(|v| &mut v[..]));
        Ok(())
    }

    fn rotate(&self, x: &mut [f32], heads: usize, direction: f32) {
        rope::rotate(x, heads, self.pass.config.head_dim, self.pass.cos, self.pass.sin, direction);
    }

    /// The block's output of `x` [N, E] into `y`; what backward needs into `saved`.
    pub(crate) fn forward(
        &self,
        x: &[f32],
        y: &mut Vec<f32>,
        saved: &mut Saved,
        ws: &mut Workspace,
    ) -> Result<()> {
        let c = self.pass.config;
        let Workspace { normed, gated, low, low_gradient, dropped, .. } = ws;
        let lanes = &mut Lanes { low, low_gradient, dropped };
        self.norm(0, x, normed)?;
        self.project(Q, normed, &mut saved.q, false, lanes)?;
        self.project(K, normed, &mut saved.k, false, lanes)?;
        self.project(V, normed, &mut saved.v, false, lanes)?;
        self.rotate(&mut saved.q, c.num_attention_heads, 1.0);
        self.rotate(&mut saved.k, c.num_key_value_heads, 1.0);
        self.pass.attention.forward_into(&saved.q, &saved.k, &saved.v, &mut saved.mixed);
        saved.h.clear();
        saved.h.extend_from_slice(x);
        self.project(O, &saved.mixed.out, &mut saved.h, true, lanes)?;

        self.norm(1, &saved.h, normed)?;
        self.project(GATE, normed, &mut saved.gate, false, lanes)?;
        self.project(UP, normed, &mut saved.up, false, lanes)?;
        let width = saved.gate.len();
        mlp::swiglu_into(&saved.gate, &saved.up, sized(gated, width));
        y.clear();
        y.extend_from_slice(&saved.h);
        self.project(DOWN, gated, y, true, lanes)
    }

    /// Backward: `d` is the gradient of the output and becomes that of the input `x`, which is complete only when
    /// `input_wanted`; gradients of what learns are added to `gradients`. `saved` is used up.
    pub(crate) fn backward(
        &self,
        x: &[f32],
        d: &mut [f32],
        saved: &mut Saved,
        ws: &mut Workspace,
        gradients: &mut Gradients,
        input_wanted: bool,
    ) -> Result<()> {
        let c = self.pass.config;
        let n = self.pass.entries;
        let Workspace { normed, gated, narrow, wide, low, low_gradient, dropped, grads } = ws;
        let lanes = &mut Lanes { low, low_gradient, dropped };

        let width = saved.gate.len();
        mlp::swiglu_into(&saved.gate, &saved.up, sized(gated, width));
        let d_gated = sized(wide, width);
        self.project_back(DOWN, gated, d, Some((d_gated, false)), lanes, gradients)?;
        mlp::swiglu_backward_in_place(&mut saved.gate, &mut saved.up, d_gated);
        self.norm(1, &saved.h, normed)?;
        let d_normed = sized(narrow, n * c.hidden_size);
        self.project_back(GATE, normed, &saved.gate, Some((d_normed, false)), lanes, gradients)?;
        self.project_back(UP, normed, &saved.up, Some((d_normed, true)), lanes, gradients)?;
        self.norm_back(1, &saved.h, d_normed, d, gradients)?;

        let mixed_width = saved.mixed.out.len();
        let d_mixed = sized(wide, mixed_width);
        self.project_back(O, &saved.mixed.out, d, Some((d_mixed, false)), lanes, gradients)?;
        self.pass.attention.backward_into(&saved.q, &saved.k, &saved.v, &saved.mixed, d_mixed, grads);
        self.rotate(&mut grads.q, c.num_attention_heads, -1.0);
        self.rotate(&mut grads.k, c.num_key_value_heads, -1.0);
        self.norm(0, x, normed)?;
        let through = input_wanted || self.pass.params.learns(Group::Norms);
        let d_normed = sized(narrow, n * c.hidden_size);
        for (which, g, add) in [(Q, &grads.q, false), (K, &grads.k, true), (V, &grads.v, true)] {
            let dx = if through { Some((&mut d_normed[..], add)) } else { None };
            self.project_back(which, normed, g, dx, lanes, gradients)?;
        }
        if through {
            self.norm_back(0, x, d_normed, d, gradients)?;
        }
        Ok(())
    }
}

/// The part of the workspace that LoRA uses.
struct Lanes<'a> {
    low: &'a mut Vec<f32>,
    low_gradient: &'a mut Vec<f32>,
    dropped: &'a mut Vec<f32>,
}

fn dropped<'b>(buffer: &'b mut Vec<f32>, dropout: Dropout, x: &[f32]) -> &'b [f32] {
    buffer.clear();
    buffer.extend_from_slice(x);
    dropout.apply(buffer);
    buffer
}
