//! The families of models there are, and how each one's `config.json` is read.
//!
//! Source: the configurations of transformers 4 and 5 by the `model_type` they state; for nanochat's GPT the fields of its
//! own `GPTConfig`. A reader does two things: [`Family::standard`] says what the file says in the keys that Llama uses, so
//! that the rest is read once for all; [`Family::architecture`] fills in the description of a decoder. Keys that are absent
//! have the value that transformers gives them.
//!
//! | `model_type` | norm | feed-forward | q/k norm | positions | else |
//! |---|---|---|---|---|---|
//! | `llama` | RMS | SwiGLU | | | biases where stated |
//! | `mistral` | RMS | SwiGLU | | | sliding window |
//! | `qwen2` | RMS | SwiGLU | | | q, k, v biases; windows where switched on |
//! | `qwen3` | RMS | SwiGLU | gain, before rotation | | windows where switched on |
//! | `smollm3` | RMS | SwiGLU | | some blocks without | |
//! | `gpt_neox` | LayerNorm | GELU, biases | | part of a head | fused q, k, v; parallel residual |
//! | `gemma3_text` | RMS, 1 + g | gated GELU | gain, before rotation | two bases | sandwich norms, scaled embeddings, windows |
//! | `nanochat` | RMS, no gain | relu² | no gain, after rotation | by −θ | normed embeddings, capped logits |
//!
//! nanochat's own folder is our dialect, as the program itself writes no `config.json`:
//! `{"model_type": "nanochat", "vocab_size", "n_embd", "n_layer", "n_head", "n_kv_head" (n_head), "sequence_len"}`, with
//! `rope_theta` (10000), `rope_scaling`, `final_logit_softcapping` (15) and `tie_word_embeddings` (false) as elsewhere; its
//! feed-forward layers are 4·n_embd wide and its eps is f32's epsilon. A `nanochat` folder without `n_embd` is
//! transformers' form of the same model.
//!
//! Errors: what cannot be computed exactly is refused by key. Left out: training-time dropout, which transformers applies
//! only while training and these families leave at 0.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use crate::architecture::{Architecture, Layer, Mlp, NormKind, QkNorm, Residual, Rotation};
use crate::config::{DecoderConfig, Keys};
use crate::error::Result;
use crate::names::Names;

/// A family of decoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 1 to 3.
    Llama,
    /// Mistral 7B and its kin.
    Mistral,
    /// Qwen 2 and 2.5.
    Qwen2,
    /// Qwen 3.
    Qwen3,
    /// SmolLM3.
    SmolLm3,
    /// GPT-NeoX and Pythia.
    GptNeoX,
    /// Gemma 3, text only.
    Gemma3,
    /// nanochat's GPT in MegaContext's names and our dialect of `config.json`.
    NanochatGpt,
    /// nanochat's GPT as transformers writes it.
    Nanochat,
}

/// The `model_type`s that are read.
pub const MODEL_TYPES: [&str; 8] =
    ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt_neox", "gemma3_text", "nanochat"];

/// Keys by which mixtures of experts give themselves away.
const EXPERT_KEYS: [&str; 6] = [
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_topk",
];

/// Well-known encoder-decoders and encoders, which often do not say so in their file.
const ENCODER_DECODERS: [&str; 9] =
    ["t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "whisper", "encoder-decoder"];
const ENCODERS: [&str; 8] =
    ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta-v2", "modernbert", "albert"];

impl Family {
    /// The family of a file, or why there is none.
    pub(crate) fn of(keys: &Keys<'_>) -> Result<Self> {
        let known = MODEL_TYPES.map(|name| format!("\"{name}\"")).join(", ");
        let Some(value) = keys.get("model_type") else {
            return keys.fail(format!("model_type: expected one of {known}, the key is missing"));
        };
        let name = value.as_str().unwrap_or("");
        let refuse = |why: &str| keys.fail(format!("model_type: expected one of {known}, got {value}{why}"));
        let encoder_decoder = keys.get("is_encoder_decoder").and_then(Value::as_bool) == Some(true);
        if encoder_decoder || ENCODER_DECODERS.contains(&name) {
            return refuse(", an encoder-decoder; only decoders are read");
        }
        if ENCODERS.contains(&name) {
            return refuse(", an encoder; only decoders are read");
        }
        let experts =
            EXPERT_KEYS.into_iter().find(|key| keys.get(key).is_some_and(|v| v.as_u64() != Some(0)));
        if name.contains("moe") || name == "mixtral" || experts.is_some() {
            let by = experts.map_or_else(String::new, |key| format!(" ({key})"));
            return refuse(&format!(", a mixture of experts{by}; only dense models are read"));
        }
        Ok(match name {
            "llama" => Self::Llama,
            "mistral" => Self::Mistral,
            "qwen2" => Self::Qwen2,
            "qwen3" => Self::Qwen3,
            "smollm3" => Self::SmolLm3,
            "gpt_neox" => Self::GptNeoX,
            "gemma3_text" => Self::Gemma3,
            "nanochat" if keys.has("n_embd") => Self::NanochatGpt,
            "nanochat" => Self::Nanochat,
            "gemma2" => return refuse(", whose cap on attention scores is not computed"),
            "gemma3" => return refuse(", which has a vision tower; its text model alone is a gemma3_text"),
            _ => return refuse(""),
        })
    }

    /// As `model_type` names it.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::SmolLm3 => "smollm3",
            Self::GptNeoX => "gpt_neox",
            Self::Gemma3 => "gemma3_text",
            Self::NanochatGpt | Self::Nanochat => "nanochat",
        }
    }

    /// The class that `architectures` names.
    pub fn class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::SmolLm3 => "SmolLM3ForCausalLM",
            Self::GptNeoX => "GPTNeoXForCausalLM",
            Self::Gemma3 => "Gemma3ForCausalLM",
            Self::NanochatGpt => "GPT",
            Self::Nanochat => "NanoChatForCausalLM",
        }
    }

    /// Names of its tensors.
    fn names(self) -> &'static Names {
        match self {
            Self::GptNeoX => &Names::GPT_NEOX,
            Self::Gemma3 => &Names::GEMMA3,
            Self::NanochatGpt => &Names::NANOCHAT_GPT,
            Self::Nanochat => &Names::NANOCHAT,
            _ => &Names::LLAMA,
        }
    }

    /// Is the head the embedding where the file does not say?
    pub(crate) fn ties_by_default(self) -> bool {
        matches!(self, Self::SmolLm3 | Self::Gemma3)
    }

    /// The file's content in the keys that Llama uses.
    pub(crate) fn standard<'a>(self, keys: &Keys<'a>) -> Result<Cow<'a, Map<String, Value>>> {
        let mut out = keys.raw.clone();
        let mut default = |key: &str, value: Value| {
            if out.get(key).is_none_or(Value::is_null) {
                out.insert(key.to_string(), value);
            }
        };
        match self {
            Self::Llama | Self::Mistral | Self::Qwen2 => return Ok(Cow::Borrowed(keys.raw)),
            Self::Qwen3 => default("head_dim", json!(128)),
            Self::SmolLm3 => default_theta(&mut out, 2_000_000.0),
            Self::Nanochat => {}
            Self::GptNeoX => {
                out.remove("num_key_value_heads");
                out.remove("head_dim");
                out.insert("rms_norm_eps".into(), keys.get("layer_norm_eps").cloned().unwrap_or(json!(1e-5)));
                if let Some(theta) = keys.get("rotary_emb_base").filter(|_| !keys.has("rope_theta")) {
                    out.insert("rope_theta".into(), theta.clone());
                }
            }
            Self::Gemma3 => {
                default("head_dim", json!(256));
                if let Some(act) = keys.get("hidden_activation") {
                    out.insert("hidden_act".into(), act.clone());
                }
                // The nested form of transformers 5: one entry for each kind of block.
                if let Some(nested) = keys.get("rope_parameters").filter(|v| v.get("rope_type").is_none()) {
                    let entry = |kind: &str| nested.get(kind).cloned().unwrap_or(Value::Null);
                    let local = entry("sliding_attention");
                    if let Some(kind) = local.get("rope_type").filter(|v| v.as_str() != Some("default")) {
                        return keys.fail(format!(
                            "rope_parameters.sliding_attention.rope_type: expected \"default\", got {kind}"
                        ));
                    }
                    out.insert("rope_parameters".into(), entry("full_attention"));
                    if let Some(theta) = local.get("rope_theta").filter(|v| !v.is_null()) {
                        out.insert("rope_local_base_freq".into(), theta.clone());
                    }
                }
                default_theta(&mut out, 1_000_000.0);
            }
            Self::NanochatGpt => {
                let size = |key: &str| keys.size(key);
                let width = size("n_embd")?;
                for (key, value) in [
                    ("hidden_size", width),
                    ("intermediate_size", 4 * width),
                    ("num_hidden_layers", size("n_layer")?),
                    ("num_attention_heads", size("n_head")?),
                    ("num_key_value_heads", keys.size_or("n_kv_head", size("n_head")?)?),
                    ("max_position_embeddings", size("sequence_len")?),
                ] {
                    out.insert(key.into(), json!(value));
                }
                out.remove("head_dim");
                out.insert("rms_norm_eps".into(), json!(f64::from(f32::EPSILON)));
            }
        }
        Ok(Cow::Owned(out))
    }

    /// The description of a model of `layers` blocks with heads of `head_dim`; `keys` are those of [`Family::standard`].
    pub(crate) fn architecture(
        self,
        keys: &Keys<'_>,
        layers: usize,
        head_dim: usize,
    ) -> Result<Architecture> {
        let plain = Architecture {
            names: self.names(),
            norm: NormKind::Rms,
            mlp: Mlp::SwiGlu,
            qk_norm: QkNorm::None,
            residual: Residual::Sequential,
            fused_qkv: false,
            qkv_bias: false,
            out_bias: false,
            mlp_bias: false,
            rotary_width: head_dim,
            rotary_direction: 1.0,
            local_theta: None,
            layers: vec![Layer { window: None, rotation: Rotation::Global }; layers],
            query_scale: 1.0 / (head_dim as f64).sqrt(),
            embedding_scale: None,
            embedding_norm: false,
            softcap: None,
        };
        let windows = |layers: &mut [Layer], windows: Vec<Option<usize>>| {
            for (layer, window) in layers.iter_mut().zip(windows) {
                layer.window = window;
            }
        };
        let mut out = plain;
        let act = |known: &[(&str, Mlp)], default: &str| activation(keys, known, default);
        if self != Self::GptNeoX {
            refuse_partial(keys)?;
        }
        match self {
            Self::Llama => {
                out.mlp = act(&[("silu", Mlp::SwiGlu)], "silu")?;
                let bias = keys.flag("attention_bias")?;
                (out.qkv_bias, out.out_bias, out.mlp_bias) = (bias, bias, keys.flag("mlp_bias")?);
            }
            Self::Mistral => {
                out.mlp = act(&[("silu", Mlp::SwiGlu)], "silu")?;
                let window = keys.window(Some(4096))?;
                windows(&mut out.layers, vec![window; layers]);
            }
            Self::Qwen2 | Self::Qwen3 => {
                out.mlp = act(&[("silu", Mlp::SwiGlu)], "silu")?;
                if self == Self::Qwen2 {
                    out.qkv_bias = true;
                } else {
                    let bias = keys.flag("attention_bias")?;
                    (out.qkv_bias, out.out_bias) = (bias, bias);
                    out.qk_norm = QkNorm::BeforeRotary;
                }
                let on = keys.flag("use_sliding_window")?;
                let window = if on { keys.window(Some(4096))? } else { None };
                let first = keys.count_or("max_window_layers", 28)?;
                windows(&mut out.layers, layer_windows(keys, layers, window, |l| l >= first)?);
            }
            Self::SmolLm3 => {
                out.mlp = act(&[("silu", Mlp::SwiGlu)], "silu")?;
                let bias = keys.flag("attention_bias")?;
                (out.qkv_bias, out.out_bias, out.mlp_bias) = (bias, bias, keys.flag("mlp_bias")?);
                let rotates = rotating_layers(keys, layers)?;
                for (layer, rotates) in out.layers.iter_mut().zip(&rotates) {
                    layer.rotation = if *rotates { Rotation::Global } else { Rotation::None };
                }
                let on = keys.flag("use_sliding_window")?;
                let window = if on { keys.window(None)? } else { None };
                windows(&mut out.layers, layer_windows(keys, layers, window, |l| !rotates[l])?);
            }
            Self::GptNeoX => {
                let known = [
                    ("gelu", Mlp::Gelu),
                    ("gelu_new", Mlp::GeluTanh),
                    ("gelu_fast", Mlp::GeluTanh),
                    ("gelu_pytorch_tanh", Mlp::GeluTanh),
                ];
                out.mlp = act(&known, "gelu")?;
                out.norm = NormKind::Layer;
                out.fused_qkv = true;
                let bias = keys.flag_or("attention_bias", true)?;
                (out.qkv_bias, out.out_bias, out.mlp_bias) = (bias, bias, true);
                let parallel = keys.flag_or("use_parallel_residual", true)?;
                out.residual = if parallel { Residual::Parallel } else { Residual::Sequential };
                out.rotary_width = rotary_width(keys, head_dim)?;
            }
            Self::Gemma3 => {
                for key in ["attn_logit_softcapping", "use_bidirectional_attention"] {
                    if keys.get(key).is_some_and(|v| v.as_bool() != Some(false)) {
                        return keys.fail(format!("{key}: expected null or false, got {}", keys.raw[key]));
                    }
                }
                out.mlp = act(&[("gelu_pytorch_tanh", Mlp::GeGlu)], "gelu_pytorch_tanh")?;
                out.norm = NormKind::RmsOffset;
                out.qk_norm = QkNorm::BeforeRotary;
                out.residual = Residual::Sandwich;
                let bias = keys.flag("attention_bias")?;
                (out.qkv_bias, out.out_bias) = (bias, bias);
                out.query_scale = 1.0 / keys.positive("query_pre_attn_scalar", Some(256.0))?.sqrt();
                out.embedding_scale = Some((keys.size("hidden_size")? as f64).sqrt());
                out.softcap = keys.softcap(None)?;
                out.local_theta = Some(keys.positive("rope_local_base_freq", Some(10_000.0))?);
                let every = keys.size_or("sliding_window_pattern", 6)?;
                let window = keys.window(Some(4096))?;
                let windowed = layer_types(keys, layers, |l| (l + 1) % every != 0)?;
                for (layer, windowed) in out.layers.iter_mut().zip(windowed) {
                    if windowed {
                        *layer = Layer { window, rotation: Rotation::Local };
                    }
                }
            }
            Self::NanochatGpt | Self::Nanochat => {
                out.mlp = act(&[("relu2", Mlp::Relu2)], "relu2")?;
                out.norm = NormKind::RmsPlain;
                out.qk_norm = QkNorm::AfterRotary;
                let bias = keys.flag("attention_bias")?;
                (out.qkv_bias, out.out_bias) = (bias, bias);
                out.rotary_direction = -1.0;
                out.embedding_norm = true;
                out.softcap = keys.softcap(Some(15.0))?;
            }
        }
        Ok(out)
    }

    /// Moves what has been written in Llama's keys to where the family's readers look.
    pub(crate) fn place(self, out: &mut Map<String, Value>, config: &DecoderConfig) {
        match self {
            Self::GptNeoX => {
                if let Some(theta) = out.remove("rope_theta") {
                    out.insert("rotary_emb_base".into(), theta);
                }
                let share = partial_share(&config.raw);
                out.insert("rotary_pct".into(), json!(share));
                if let Some(rope) = out.get_mut("rope_parameters").and_then(Value::as_object_mut) {
                    rope.insert("partial_rotary_factor".into(), json!(share));
                }
            }
            Self::Gemma3 => {
                let local = config.architecture.local_theta;
                out.insert("rope_local_base_freq".into(), json!(local));
                let full = out.remove("rope_parameters");
                let sliding = json!({"rope_type": "default", "rope_theta": local});
                let nested = json!({"full_attention": full, "sliding_attention": sliding});
                out.insert("rope_parameters".into(), nested);
            }
            Self::NanochatGpt => {
                out.remove("max_position_embeddings");
                out.insert("sequence_len".into(), json!(config.max_position_embeddings));
            }
            _ => {}
        }
    }
}

/// The base of the frequencies where the file does not say.
fn default_theta(out: &mut Map<String, Value>, theta: f64) {
    let nested = out.get("rope_parameters").and_then(|v| v.get("rope_theta")).is_some_and(|v| !v.is_null());
    if !nested && out.get("rope_theta").is_none_or(Value::is_null) {
        out.insert("rope_theta".into(), json!(theta));
    }
}

fn activation(keys: &Keys<'_>, known: &[(&str, Mlp)], default: &str) -> Result<Mlp> {
    let name = keys.get("hidden_act").map_or(Some(default), Value::as_str);
    match known.iter().find(|(known, _)| Some(*known) == name) {
        Some((_, mlp)) => Ok(*mlp),
        None => {
            let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
            let expected =
                if let [one] = names[..] { format!("\"{one}\"") } else { format!("one of {names:?}") };
            let got = keys.get("hidden_act").unwrap_or(&Value::Null);
            keys.fail(format!("hidden_act: expected {expected}, got {got}"))
        }
    }
}

/// The part of a head that rotates, as stated, where only whole heads are read.
fn refuse_partial(keys: &Keys<'_>) -> Result<()> {
    match stated_share(keys.raw).filter(|v| v.as_f64() != Some(1.0)) {
        Some(partial) => keys.fail(format!("partial_rotary_factor: expected 1, got {partial}")),
        None => Ok(()),
    }
}

fn stated_share(raw: &Map<String, Value>) -> Option<&Value> {
    let nested = raw.get("rope_parameters").and_then(|v| v.get("partial_rotary_factor"));
    [nested, raw.get("partial_rotary_factor"), raw.get("rotary_pct")]
        .into_iter()
        .flatten()
        .find(|v| !v.is_null())
}

/// GPT-NeoX's share of a head that rotates; a quarter where the file does not say.
fn partial_share(raw: &Map<String, Value>) -> f64 {
    stated_share(raw).and_then(Value::as_f64).unwrap_or(0.25)
}

fn rotary_width(keys: &Keys<'_>, head_dim: usize) -> Result<usize> {
    let share = partial_share(keys.raw);
    let width = (head_dim as f64 * share) as usize;
    if !(share > 0.0 && share <= 1.0) || width == 0 || !width.is_multiple_of(2) {
        return keys.fail(format!(
            "rotary_pct: expected a share of head_dim = {head_dim} above 0 and at most 1 that is an even number of \
             elements, got {share}"
        ));
    }
    Ok(width)
}

/// Which blocks see a window: as `layer_types` says, else as the family does.
fn layer_types(keys: &Keys<'_>, layers: usize, default: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
    let Some(types) = keys.get("layer_types") else { return Ok((0..layers).map(default).collect()) };
    let list = types.as_array().map(Vec::as_slice).unwrap_or_default();
    if list.len() != layers {
        return keys.fail(format!("layer_types: expected one for each of {layers} blocks, got {types}"));
    }
    list.iter()
        .map(|kind| match kind.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => keys.fail(format!(
                "layer_types: expected \"full_attention\" or \"sliding_attention\", got {kind}"
            )),
        })
        .collect()
}

fn layer_windows(
    keys: &Keys<'_>,
    layers: usize,
    window: Option<usize>,
    default: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>> {
    // Where windows are switched off, transformers lists every block as full.
    let windowed = layer_types(keys, layers, |l| window.is_some() && default(l))?;
    Ok(windowed.into_iter().map(|windowed| window.filter(|_| windowed)).collect())
}

/// SmolLM3's blocks that rotate.
fn rotating_layers(keys: &Keys<'_>, layers: usize) -> Result<Vec<bool>> {
    let Some(value) = keys.get("no_rope_layers") else {
        let every = keys.size_or("no_rope_layer_interval", 4)?;
        return Ok((0..layers).map(|l| (l + 1) % every != 0).collect());
    };
    let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
    let flags: Option<Vec<bool>> = list.iter().take(layers).map(|v| v.as_u64().map(|n| n != 0)).collect();
    match flags.filter(|flags| flags.len() == layers) {
        Some(flags) => Ok(flags),
        None => keys.fail(format!(
            "no_rope_layers: expected a 1 (rotates) or 0 for each of {layers} blocks, got {value}"
        )),
    }
}
