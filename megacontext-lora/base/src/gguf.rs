//! A LoRA adapter as one GGUF file, which llama.cpp loads beside a converted base (`--lora FILE`).
//!
//! Source: llama.cpp's converter for PEFT adapters (`convert_lora_to_gguf.py`), its converter for base models, whose
//! changes to a weight's rows an update has to follow, and its reader (`src/llama-adapter.cpp`). The container is GGUF
//! version 2, as candle writes it; llama.cpp reads versions 2 and 3.
//!
//! | key | value |
//! |---|---|
//! | `general.type` | `adapter` |
//! | `general.architecture` | the base's, in llama.cpp's words; its reader refuses another |
//! | `general.file_type` | 0 for f32, 1 for f16 |
//! | `adapter.type` | `lora` |
//! | `adapter.lora.alpha` | alpha; the reader divides by the rank it finds in each `lora_b` |
//!
//! Tensors: `blk.N.attn_q.weight.lora_a` [r, in] and `….lora_b` [out, r] (GGUF states dimensions in reverse order), and
//! so on for the other linear layers.
//!
//! Rows: Llama-like architectures rotate neighbouring values in llama.cpp, (2i, 2i + 1), where Hugging Face's rotate the
//! halves of a head, (i, i + D/2). The base's converter therefore reorders the rows of q and k within each head, and B's
//! rows are q's and k's. GPT-NeoX's fused matrix holds q, k, v head by head; llama.cpp's holds all of q, then k, then v.
//!
//! Strength: the file has one alpha. Where a module's own strength is another one (patterns, rsLoRA), B is multiplied by
//! what is missing.
//!
//! Shapes: r rank, A [r, in], B [out, r], H heads, D head width. Errors: `BaseError::Adapter` for what such a file cannot
//! carry: modules trained in full (the reader ignores norms and refuses embeddings), LoRA on embeddings or on a tied
//! head, DoRA, a family that llama.cpp does not have. Positions are not in the file either: [`GgufReport::notes`] says
//! how to give them.
//!
//! Left out: quantised factors; the base itself.

use std::path::Path;

use candle_core::Tensor;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};

use crate::adapter::Adapter;
use crate::atomic::write_file_with;
use crate::config::DecoderConfig;
use crate::error::{BaseError, Result};
use crate::rope::RopeScaling;
use crate::weights::Dtype;

/// What an export wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufReport {
    /// The base's architecture in llama.cpp's words.
    pub architecture: &'static str,
    /// Linear layers whose update is in the file.
    pub modules: usize,
    /// What the file cannot carry and the reader has to be told, one sentence each.
    pub notes: Vec<String>,
}

/// How llama.cpp holds the rows of one linear layer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum RowOrder {
    /// As Hugging Face does.
    Same,
    /// Heads of two halves, woven together.
    Woven { heads: usize },
    /// q, k and v of each head, sorted into all q, all k, all v.
    Sorted { heads: usize },
}

/// What llama.cpp calls a family, and whether its converter weaves q and k.
fn architecture(model_type: &str) -> Option<(&'static str, bool)> {
    Some(match model_type {
        "llama" | "mistral" => ("llama", true),
        "smollm3" => ("smollm3", true),
        "qwen2" => ("qwen2", false),
        "qwen3" => ("qwen3", false),
        "gemma2" => ("gemma2", false),
        "gemma3_text" => ("gemma3", false),
        "gpt_neox" => ("gptneox", false),
        _ => return None,
    })
}

/// llama.cpp's name for a linear layer of a block, from the last part of ours.
fn layer_name(target: &str) -> Option<&'static str> {
    Some(match target {
        "q_proj" => "attn_q",
        "k_proj" => "attn_k",
        "v_proj" => "attn_v",
        "query_key_value" => "attn_qkv",
        "o_proj" | "dense" => "attn_output",
        "gate_proj" => "ffn_gate",
        "up_proj" | "dense_h_to_4h" => "ffn_up",
        "down_proj" | "dense_4h_to_h" => "ffn_down",
        _ => return None,
    })
}

/// Where row `row` of llama.cpp's matrix lies in Hugging Face's; `rows` is their number.
fn source_row(order: RowOrder, row: usize, rows: usize) -> usize {
    match order {
        RowOrder::Same => row,
        RowOrder::Woven { heads } => {
            let width = rows / heads;
            let (head, within) = (row / width, row % width);
            head * width + within % 2 * (width / 2) + within / 2
        }
        RowOrder::Sorted { heads } => {
            let width = rows / heads / 3;
            let (part, within) = (row / (heads * width), row % (heads * width));
            let (head, at) = (within / width, within % width);
            (head * 3 + part) * width + at
        }
    }
}

/// Writes the LoRA factors of an adapter for `base` as a GGUF file at `out`, which must not exist. `dtype` is f32 or f16.
///
/// # Errors
/// What such a file cannot carry (see the module), before anything is written. Call [`Adapter::check_against`] first.
pub fn export_gguf(base: &DecoderConfig, adapter: &Adapter, out: &Path, dtype: Dtype) -> Result<GgufReport> {
    if out.symlink_metadata().is_ok() {
        let message = "expected no file there yet; choose another name or remove it";
        let source = std::io::Error::new(std::io::ErrorKind::AlreadyExists, message);
        return Err(BaseError::Io { path: out.to_path_buf(), source });
    }
    let refuse = |message: String| Err(BaseError::adapter(&adapter.dir, message));
    let (stored, file_type) = match dtype {
        Dtype::F32 => (GgmlDType::F32, 0u32),
        Dtype::F16 => (GgmlDType::F16, 1),
        Dtype::BF16 => return refuse("a GGUF adapter is written in f32 or f16, got bf16".to_string()),
    };
    let model_type = base.raw.get("model_type").and_then(|v| v.as_str()).unwrap_or("llama");
    let Some((architecture, woven)) = architecture(model_type) else {
        return refuse(format!(
            "llama.cpp has no architecture for the family \"{model_type}\"; merge the adapter instead (mclora merge)"
        ));
    };
    if let Some(name) = adapter.tensors.keys().find(|name| !name.contains(".lora_")) {
        return refuse(format!(
            "a GGUF adapter carries LoRA only, this one also carries {name} trained in full; write a base with those \
             put in and an adapter without them first (mclora export --format lora-only), then export that adapter"
        ));
    }

    let lora = adapter.lora().resolve(base)?;
    let alpha = adapter.config.lora.alpha;
    let mut tensors: Vec<(String, QTensor)> = Vec::new();
    for (name, a_ri) in &adapter.tensors {
        let Some(module) = name.strip_suffix(".lora_A.weight") else {
            if name.ends_with(".lora_B.weight") {
                continue;
            }
            return refuse(format!(
                "a GGUF adapter carries LoRA on linear layers only, got {name}; merge the adapter instead (mclora merge)"
            ));
        };
        let Some(b_or) = adapter.tensors.get(&format!("{module}.lora_B.weight")) else {
            return refuse(format!("expected tensor {module}.lora_B.weight beside {name}, there is none"));
        };
        let (named, order) = place(base, module, woven).map_err(|m| BaseError::adapter(&adapter.dir, m))?;
        let rank = a_ri.dim(0)?;
        let scale = lora.get(module).map_or(0.0, |module| module.scale);
        let missing = scale * rank as f64 / alpha;
        let b_or = if missing == 1.0 { b_or.clone() } else { (b_or * missing)? };
        tensors.push((format!("{named}.weight.lora_a"), QTensor::quantize(a_ri, stored)?));
        tensors
            .push((format!("{named}.weight.lora_b"), QTensor::quantize(&reordered(&b_or, order)?, stored)?));
    }
    let text = |text: &str| Value::String(text.to_string());
    let metadata = [
        ("general.architecture", text(architecture)),
        ("general.type", text("adapter")),
        ("general.file_type", Value::U32(file_type)),
        ("adapter.type", text("lora")),
        ("adapter.lora.alpha", Value::F32(alpha as f32)),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    write_file_with(out, |file| Ok(gguf_file::write(file, &metadata, &tensors)?))?;
    let notes = position_note(base, adapter).into_iter().collect();
    Ok(GgufReport { architecture, modules: tensors.len() / 2, notes })
}

/// A module's name without `.weight`, and the order of its rows.
fn place(base: &DecoderConfig, module: &str, woven: bool) -> std::result::Result<(String, RowOrder), String> {
    let parts: Vec<&str> = module.split('.').collect();
    let layer =
        parts.windows(2).find(|pair| pair[0] == "layers").and_then(|pair| pair[1].parse::<usize>().ok());
    let target = parts.last().copied().unwrap_or(module);
    let (Some(layer), Some(named)) = (layer, layer_name(target)) else {
        let tied = base.tie_word_embeddings;
        return match layer {
            None if !tied && format!("{module}.weight") == base.head_name() => {
                Ok(("output".to_string(), RowOrder::Same))
            }
            _ => Err(format!(
                "a GGUF adapter carries LoRA on the linear layers of blocks{}, got one on {module}; merge the adapter \
                 instead (mclora merge)",
                if tied { "" } else { " and on the head" }
            )),
        };
    };
    let order = match target {
        "q_proj" if woven => RowOrder::Woven { heads: base.num_attention_heads },
        "k_proj" if woven => RowOrder::Woven { heads: base.num_key_value_heads },
        "query_key_value" => RowOrder::Sorted { heads: base.num_attention_heads },
        _ => RowOrder::Same,
    };
    Ok((format!("blk.{layer}.{named}"), order))
}

/// B with its rows in llama.cpp's order.
fn reordered(b_or: &Tensor, order: RowOrder) -> Result<Tensor> {
    if order == RowOrder::Same {
        return Ok(b_or.clone());
    }
    let rows = b_or.dim(0)?;
    let from: Vec<u32> = (0..rows).map(|row| source_row(order, row, rows) as u32).collect();
    Ok(b_or.index_select(&Tensor::new(from, b_or.device())?, 0)?)
}

/// What to tell the reader where the adapter was trained with other positions than the base's file states.
fn position_note(base: &DecoderConfig, adapter: &Adapter) -> Option<String> {
    let scaling = adapter.rope_scaling().filter(|scaling| **scaling != base.rope_scaling)?;
    let flags = match scaling {
        RopeScaling::Linear { factor } => format!("--rope-scaling linear --rope-scale {factor}"),
        _ => "a base whose config.json states it (mclora export --format lora-only writes one)".to_string(),
    };
    Some(format!(
        "the adapter was trained with RoPE scaling {scaling}, which a GGUF adapter cannot carry and this base's \
         configuration does not state: llama.cpp needs {flags}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn woven_rows_pair_the_halves_of_each_head() {
        let order = RowOrder::Woven { heads: 2 };
        let rows: Vec<usize> = (0..12).map(|row| source_row(order, row, 12)).collect();
        assert_eq!(rows, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
    }

    #[test]
    fn sorted_rows_bring_q_then_k_then_v() {
        // Two heads of width 2: q0 k0 v0 q1 k1 v1.
        let order = RowOrder::Sorted { heads: 2 };
        let rows: Vec<usize> = (0..12).map(|row| source_row(order, row, 12)).collect();
        assert_eq!(rows, [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
    }
}
