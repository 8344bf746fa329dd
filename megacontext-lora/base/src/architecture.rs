//! What a decoder is made of, as data: the one description that [`crate::decoder`] runs and trains.
//!
//! A family of models (module `families`) is a reader that fills this in from `config.json`, and a map of names (module
//! `names`). Nothing else knows families: blocks ask this description what to do.
//!
//! With n = norm(x), the residual forms are
//!   sequential  h = x + attention(norm₁(x)),              y = h + mlp(norm₂(h))              (Llama and most others);
//!   parallel    y = x + attention(norm₁(x)) + mlp(norm₂(x))                                  (Wang and Komatsuzaki 2021);
//!   sandwich    h = x + norm₂(attention(norm₁(x))),       y = h + norm₄(mlp(norm₃(h)))       (Gemma 2 and 3).
//!
//! Shapes: D head width, E model width. Units: windows in entries.
//! Left out: a cap on attention scores (Gemma 2), experts, encoders, learned absolute positions, ALiBi.

use crate::names::Names;

/// A normalisation over the last dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// x/rms(x)·g (Zhang and Sennrich 2019).
    Rms,
    /// x/rms(x)·(1 + g): Gemma stores gains as their distance from 1.
    RmsOffset,
    /// x/rms(x), no parameters.
    RmsPlain,
    /// (x − mean)/deviation·g + b (Ba et al. 2016).
    Layer,
}

impl NormKind {
    /// Is there a parameter `weight`?
    pub fn has_gain(self) -> bool {
        self != Self::RmsPlain
    }

    /// Is there a parameter `bias`?
    pub fn has_bias(self) -> bool {
        self == Self::Layer
    }

    /// The gain as stored with which the norm scales by 1.
    pub fn neutral(self) -> f32 {
        if self == Self::RmsOffset { 0.0 } else { 1.0 }
    }
}

/// The feed-forward layer between its linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mlp {
    /// silu(gate)·up (Shazeer 2020).
    SwiGlu,
    /// gelu(gate)·up with GELU by tanh.
    GeGlu,
    /// GELU of one layer, exact (Hendrycks and Gimpel 2016).
    Gelu,
    /// GELU of one layer, by tanh.
    GeluTanh,
    /// relu(x)² of one layer (So et al. 2021).
    Relu2,
}

impl Mlp {
    /// Are there two layers in, of which one gates the other?
    pub fn gated(self) -> bool {
        matches!(self, Self::SwiGlu | Self::GeGlu)
    }
}

/// Norms of queries and keys, over each head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// The model's norm with a gain \[D\] shared by the heads, before rotation.
    BeforeRotary,
    /// x/rms(x), after rotation.
    AfterRotary,
}

/// How the two halves of a block join the stream; the formulas stand above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residual {
    /// One half after the other.
    Sequential,
    /// Both halves on the block's input.
    Parallel,
    /// One after the other, with a norm behind each.
    Sandwich,
}

/// Which tables a block's queries and keys are rotated by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// None: the block sees order through the causal mask alone.
    None,
    /// The model's, which scalings stretch.
    Global,
    /// Those of [`Architecture::local_theta`], never stretched.
    Local,
}

/// What differs from block to block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Keys a query sees in dense attention, its own included; none means all before it.
    pub window: Option<usize>,
    /// Rotary positions.
    pub rotation: Rotation,
}

/// A decoder's description.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// What its parameters are called.
    pub names: &'static Names,
    /// Norms of blocks and the final one.
    pub norm: NormKind,
    /// Feed-forward layers.
    pub mlp: Mlp,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// Residual form.
    pub residual: Residual,
    /// One linear layer makes queries, keys and values, laid out [H, 3, D].
    pub fused_qkv: bool,
    /// Biases on the layers that make queries, keys and values.
    pub qkv_bias: bool,
    /// A bias on attention's output layer.
    pub out_bias: bool,
    /// Biases on the feed-forward layers.
    pub mlp_bias: bool,
    /// Elements of a head that rotate, from its first on; even.
    pub rotary_width: usize,
    /// +1 for a rotation by +θ, −1 for one by −θ.
    pub rotary_direction: f32,
    /// Base of the frequencies of blocks that rotate by tables of their own.
    pub local_theta: Option<f64>,
    /// Block by block.
    pub layers: Vec<Layer>,
    /// Multiplies q·k.
    pub query_scale: f64,
    /// Multiplies token embeddings.
    pub embedding_scale: Option<f64>,
    /// Is what enters the first block normed (without gain)?
    pub embedding_norm: bool,
    /// c where logits are c·tanh(z/c).
    pub softcap: Option<f64>,
}

impl Architecture {
    /// The distinct windows of blocks, ascending.
    pub fn windows(&self) -> Vec<usize> {
        let mut windows: Vec<usize> = self.layers.iter().filter_map(|l| l.window).collect();
        windows.sort_unstable();
        windows.dedup();
        windows
    }
}
