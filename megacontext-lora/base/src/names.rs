//! The names of a model's tensors: those of its family's own folders, everywhere (weights, adapters, export, gradients).
//!
//! A [`Names`] maps the parts of the description in [`crate::architecture`] to modules; a tensor is its module's name and
//! `.weight` or `.bias`. From the two follow the list of tensors, the list of linear layers and the group of a name.
//!
//! Shapes: E model width, Q = H·D, KV = G·D, F feed-forward width, V vocabulary; a linear weight is [out, in].

use crate::architecture::{QkNorm, Residual};
use crate::config::{DecoderConfig, Linear};
use crate::params::Group;

/// A linear layer of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearPart {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Queries, keys and values at once, [H, 3, D].
    Qkv,
    /// Attention's output.
    Out,
    /// What gates, in a gated feed-forward layer.
    Gate,
    /// Into the feed-forward layer.
    Up,
    /// Out of it.
    Down,
}

/// A norm of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPart {
    /// Before attention.
    AttentionIn,
    /// Behind attention, in sandwich form.
    AttentionOut,
    /// Before the feed-forward layer.
    MlpIn,
    /// Behind it, in sandwich form.
    MlpOut,
    /// Of queries.
    Query,
    /// Of keys.
    Key,
}

/// The modules of a family, embedding and head with their `.weight`; empty where the family has no such part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    embedding: &'static str,
    final_norm: &'static str,
    head: &'static str,
    /// What a block's modules are under, before its number.
    blocks: &'static str,
    /// Q, K, V, Qkv, Out, Gate, Up, Down.
    linears: [&'static str; 8],
    /// AttentionIn, AttentionOut, MlpIn, MlpOut, Query, Key.
    norms: [&'static str; 6],
    /// Ends of names of tensors in a family's files that are no parameters.
    pub(crate) buffers: &'static [&'static str],
}

impl Names {
    /// Llama and all who took over its names.
    pub const LLAMA: Self = Self {
        embedding: "model.embed_tokens.weight",
        final_norm: "model.norm",
        head: "lm_head.weight",
        blocks: "model.layers",
        linears: [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ],
        norms: [
            "input_layernorm",
            "",
            "post_attention_layernorm",
            "",
            "self_attn.q_norm",
            "self_attn.k_norm",
        ],
        buffers: &[".rotary_emb.inv_freq"],
    };

    /// Gemma 3: norms on both sides of both halves.
    pub const GEMMA3: Self = Self {
        norms: [
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "self_attn.q_norm",
            "self_attn.k_norm",
        ],
        ..Self::LLAMA
    };

    /// GPT-NeoX and Pythia.
    pub const GPT_NEOX: Self = Self {
        embedding: "gpt_neox.embed_in.weight",
        final_norm: "gpt_neox.final_layer_norm",
        head: "embed_out.weight",
        blocks: "gpt_neox.layers",
        linears: [
            "",
            "",
            "",
            "attention.query_key_value",
            "attention.dense",
            "",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ],
        norms: ["input_layernorm", "", "post_attention_layernorm", "", "", ""],
        buffers: &[".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"],
    };

    /// nanochat's GPT as MegaContext names it.
    pub const NANOCHAT_GPT: Self = Self {
        embedding: "transformer.wte.weight",
        final_norm: "",
        head: "lm_head.weight",
        blocks: "transformer.h",
        linears: ["attn.c_q", "attn.c_k", "attn.c_v", "", "attn.c_proj", "", "mlp.c_fc", "mlp.c_proj"],
        norms: [""; 6],
        buffers: &[],
    };

    /// The stack of blocks of GistNet and LensNet ([`crate::tower`]), which is nanochat's without its ends.
    pub const TOWER: Self = Self { blocks: "blocks", ..Self::NANOCHAT_GPT };

    /// nanochat's GPT as transformers names it.
    pub const NANOCHAT: Self = Self {
        final_norm: "",
        linears: [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "",
            "self_attn.o_proj",
            "",
            "mlp.fc1",
            "mlp.fc2",
        ],
        norms: [""; 6],
        ..Self::LLAMA
    };
}

/// A linear layer of a block, with its sizes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinearShape {
    pub part: LinearPart,
    pub out: usize,
    pub inp: usize,
    pub bias: bool,
}

impl DecoderConfig {
    fn names(&self) -> &'static Names {
        self.architecture.names
    }

    /// The module of a linear layer of a block.
    pub fn linear_module(&self, layer: usize, part: LinearPart) -> String {
        format!("{}.{layer}.{}", self.names().blocks, self.names().linears[part as usize])
    }

    /// The module of a norm of a block.
    pub fn norm_module(&self, layer: usize, part: NormPart) -> String {
        format!("{}.{layer}.{}", self.names().blocks, self.names().norms[part as usize])
    }

    /// The module of the last norm, before the output head.
    pub fn final_norm_module(&self) -> &'static str {
        self.names().final_norm
    }

    /// Name of the table of token embeddings, [V, E].
    pub fn embedding_name(&self) -> &'static str {
        self.names().embedding
    }

    /// Name of the output head's weight [V, E]: the embeddings' where it is tied to them.
    pub fn head_name(&self) -> &'static str {
        if self.tie_word_embeddings { self.embedding_name() } else { self.untied_head_name() }
    }

    /// Name of a head that is not tied to the embeddings, whether this model has one or not.
    pub fn untied_head_name(&self) -> &'static str {
        self.names().head
    }

    /// The linear layers of a block, in the order they run.
    pub(crate) fn linear_parts(&self) -> Vec<LinearShape> {
        let a = &self.architecture;
        let (e, f) = (self.hidden_size, self.intermediate_size);
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        let shape = |part, out, inp, bias| LinearShape { part, out, inp, bias };
        let mut parts = if a.fused_qkv {
            vec![shape(LinearPart::Qkv, q + 2 * kv, e, a.qkv_bias)]
        } else {
            let of = |part, out| shape(part, out, e, a.qkv_bias);
            vec![of(LinearPart::Q, q), of(LinearPart::K, kv), of(LinearPart::V, kv)]
        };
        parts.push(shape(LinearPart::Out, e, q, a.out_bias));
        if a.mlp.gated() {
            parts.push(shape(LinearPart::Gate, f, e, a.mlp_bias));
        }
        parts.push(shape(LinearPart::Up, f, e, a.mlp_bias));
        parts.push(shape(LinearPart::Down, e, f, a.mlp_bias));
        parts
    }

    /// The norms of a block that have parameters, and their widths.
    pub(crate) fn norm_parts(&self) -> Vec<(NormPart, usize)> {
        let a = &self.architecture;
        let mut parts = Vec::new();
        if !a.norm.has_gain() {
            return parts;
        }
        let e = self.hidden_size;
        parts.extend([(NormPart::AttentionIn, e), (NormPart::MlpIn, e)]);
        if a.residual == Residual::Sandwich {
            parts.extend([(NormPart::AttentionOut, e), (NormPart::MlpOut, e)]);
        }
        if a.qk_norm == QkNorm::BeforeRotary {
            parts.extend([(NormPart::Query, self.head_dim), (NormPart::Key, self.head_dim)]);
        }
        parts
    }

    /// Name and shape of every tensor of the model, sorted by name; the head only where it is not tied.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let e = self.hidden_size;
        let mut out = vec![(self.embedding_name().to_string(), vec![self.vocab_size, e])];
        let norm = self.architecture.norm;
        let mut add_norm = |module: &str, width: usize| {
            if norm.has_gain() {
                out.push((format!("{module}.weight"), vec![width]));
            }
            if norm.has_bias() {
                out.push((format!("{module}.bias"), vec![width]));
            }
        };
        for layer in 0..self.num_hidden_layers {
            for (part, width) in self.norm_parts() {
                add_norm(&self.norm_module(layer, part), width);
            }
        }
        add_norm(self.final_norm_module(), e);
        for layer in 0..self.num_hidden_layers {
            for linear in self.linear_parts() {
                let module = self.linear_module(layer, linear.part);
                out.push((format!("{module}.weight"), vec![linear.out, linear.inp]));
                if linear.bias {
                    out.push((format!("{module}.bias"), vec![linear.out]));
                }
            }
        }
        if !self.tie_word_embeddings {
            out.push((self.head_name().to_string(), vec![self.vocab_size, e]));
        }
        out.sort();
        out
    }

    /// Every linear layer of the model that can carry LoRA, block by block in the order they run, an untied output head
    /// last.
    pub fn linears(&self) -> Vec<Linear> {
        let mut out = Vec::new();
        for layer in 0..self.num_hidden_layers {
            out.extend(self.linear_parts().into_iter().map(|linear| Linear {
                name: self.linear_module(layer, linear.part),
                layer: Some(layer),
                out: linear.out,
                inp: linear.inp,
            }));
        }
        if !self.tie_word_embeddings {
            let head = self.names().head;
            let name = head.strip_suffix(".weight").unwrap_or(head).to_string();
            out.push(Linear { name, layer: None, out: self.vocab_size, inp: self.hidden_size });
        }
        out
    }

    /// The group of a parameter of this model, from its name; LoRA's factors, and rows of tokens that learn by
    /// themselves, carry their module's name. Biases of linear
    /// layers belong to their weights, those of norms to their gains.
    pub fn group_of(&self, name: &str) -> Group {
        if name.contains(".lora_") || name.contains(".token_adapter.") {
            return Group::Lora;
        }
        if name == crate::rope::SIGMA {
            return Group::Sigma;
        }
        let names = self.names();
        let Some(module) = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias")) else {
            return Group::Base;
        };
        let part = module.strip_prefix(names.blocks).and_then(|rest| rest.strip_prefix('.'));
        let part = part.and_then(|rest| rest.split_once('.')).map(|(_, part)| part);
        if name == names.embedding {
            Group::Embeddings
        } else if module == names.final_norm || part.is_some_and(|part| names.norms.contains(&part)) {
            Group::Norms
        } else {
            Group::Base
        }
    }

    /// Does this linear layer write to the residual stream? Such layers start smaller.
    pub(crate) fn writes_to_stream(&self, name: &str) -> bool {
        let names = self.names();
        let module = name.strip_suffix(".weight").unwrap_or(name);
        [LinearPart::Out, LinearPart::Down].into_iter().any(|part| {
            module.strip_suffix(names.linears[part as usize]).is_some_and(|rest| rest.ends_with('.'))
        })
    }
}
