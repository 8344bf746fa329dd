//! A Llama whose weights are computed, not learnt, so that it finds what followed the last two tokens where they stood
//! before (an induction head, Elhage et al. 2021; Olsson et al. 2022): it solves passkeys of any length that its positions
//! reach.
//!
//! The stream has four parts of 64 and a constant: the token's code (random signs), those of the token before and of the
//! one before that, and the answer. Block 1: query and key are the same constant, the key turned on by one token (head 0) or
//! two (head 1) in the fast half of the bands, so that scores peak one or two tokens back, and values are codes. Block 2:
//! the query is (own code, code before), the key (code before, code before that), in bands too slow to notice distance;
//! values are codes, and go to the answer, which the head compares with every token's code. No feed-forward.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use gistnet_adapter::{GistNet, GistNetConfig, Head, Identity, Mode};
use megacontext_base::random::Random;
use megacontext_base::weights::Weights;
use megacontext_lora::train::{passkey, planted};
use serde_json::{Value, json};

const CODE: usize = 64;
const E: usize = 4 * CODE + 8;
const D: usize = 256;
const HEADS: usize = 2;
const THETA: f64 = 1e10;
/// The stream's constant.
const ONE: f32 = 8.0;
const CONSTANT: usize = 4 * CODE;

/// Words and signs of the texts of passkeys and planted facts, digits, and an end token at 0.
fn vocabulary() -> Vec<String> {
    let mut words: BTreeSet<String> = (0..10).map(|digit| digit.to_string()).collect();
    for text in passkey::texts().map(str::to_owned).chain(planted::texts()) {
        let spaced: String = text
            .chars()
            .flat_map(|c| if c.is_alphanumeric() { vec![c] } else { vec![' ', c, ' '] })
            .collect();
        words.extend(spaced.split_whitespace().map(str::to_owned));
    }
    ["</s>".to_owned(), "<unk>".to_owned()].into_iter().chain(words).collect()
}

fn tokenizer(words: &[String]) -> Value {
    let vocabulary: serde_json::Map<String, Value> =
        words.iter().enumerate().map(|(id, word)| (word.clone(), json!(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Whitespace"}, {"type": "Digits", "individual_digits": true}
        ]},
        "post_processor": null, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    })
}

/// A matrix [rows, columns] of which some values are given.
struct Matrix {
    columns: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn new(rows: usize, columns: usize) -> Self {
        Self { columns, values: vec![0.0; rows * columns] }
    }

    fn set(&mut self, row: usize, column: usize, value: f32) {
        self.values[row * self.columns + column] = value;
    }

    fn tensor(self) -> Tensor {
        let rows = self.values.len() / self.columns;
        Tensor::from_vec(self.values, (rows, self.columns), &Device::Cpu).unwrap()
    }
}

/// Writes the model's folder; `other` are further keys of its `config.json`.
pub fn write(dir: &Path, other: Value) {
    let words = vocabulary();
    let mut random = Random::named(7, "codes");
    let code: Vec<Vec<f32>> = words
        .iter()
        .map(|_| (0..CODE).map(|_| if random.below(2) == 0 { -1.0 } else { 1.0 }).collect())
        .collect();
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    let (mut embedding, mut head) = (Matrix::new(words.len(), E), Matrix::new(words.len(), E));
    for (token, code) in code.iter().enumerate() {
        embedding.set(token, CONSTANT, ONE);
        for (d, sign) in code.iter().enumerate() {
            embedding.set(token, d, *sign);
            head.set(token, 3 * CODE + d, *sign);
        }
    }
    tensors.insert("model.embed_tokens.weight".into(), embedding.tensor());
    tensors.insert("lm_head.weight".into(), head.tensor());

    // Root mean squares of the stream where each block reads it: norms divide by them.
    let of = |codes: usize| ((codes * CODE) as f32 + ONE * ONE).sqrt() / (E as f32).sqrt();
    let rms = [of(1), of(3)];
    let new = || [Matrix::new(HEADS * D, E), Matrix::new(HEADS * D, E), Matrix::new(HEADS * D, E)];
    let ([mut q, mut k, mut v], mut o) = (new(), Matrix::new(E, HEADS * D));
    for head in 0..HEADS {
        let back = (head + 1) as f64;
        for band in 0..D / 4 {
            let omega = THETA.powf(-(band as f64) / (D / 2) as f64);
            q.set(head * D + band, CONSTANT, 400.0 * rms[0] / ONE);
            k.set(head * D + band, CONSTANT, (omega * back).cos() as f32 * rms[0] / ONE);
            k.set(head * D + D / 2 + band, CONSTANT, (omega * back).sin() as f32 * rms[0] / ONE);
        }
        for d in 0..CODE {
            v.set(head * D + d, d, rms[0]);
            o.set((head + 1) * CODE + d, head * D + d, 1.0);
        }
    }
    let first = [q, k, v, o];
    let ([mut q, mut k, mut v], mut o) = (new(), Matrix::new(E, HEADS * D));
    for d in 0..CODE {
        for part in 0..2 {
            let at = D / 4 + d + part * D / 2;
            q.set(at, part * CODE + d, 20.0 * rms[1]);
            k.set(at, (part + 1) * CODE + d, rms[1]);
        }
        v.set(d, d, rms[1]);
        o.set(3 * CODE + d, d, 1.0);
    }
    let ones = || Tensor::ones(E, candle_core::DType::F32, &Device::Cpu).unwrap();
    for (layer, matrices) in [first, [q, k, v, o]].into_iter().enumerate() {
        let name = |module: &str| format!("model.layers.{layer}.{module}.weight");
        for (module, matrix) in ["q_proj", "k_proj", "v_proj", "o_proj"].into_iter().zip(matrices) {
            tensors.insert(name(&format!("self_attn.{module}")), matrix.tensor());
        }
        tensors.insert(name("mlp.gate_proj"), Matrix::new(8, E).tensor());
        tensors.insert(name("mlp.up_proj"), Matrix::new(8, E).tensor());
        tensors.insert(name("mlp.down_proj"), Matrix::new(E, 8).tensor());
        tensors.insert(name("input_layernorm"), ones());
        tensors.insert(name("post_attention_layernorm"), ones());
    }
    tensors.insert("model.norm.weight".into(), ones());

    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": words.len(), "hidden_size": E,
        "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "head_dim": D, "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": THETA,
        "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false, "bos_token_id": null, "eos_token_id": 0,
    });
    for (key, other) in other.as_object().unwrap() {
        config[key] = other.clone();
    }
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), format!("{config:#}\n")).unwrap();
    fs::write(dir.join("tokenizer.json"), tokenizer(&words).to_string()).unwrap();
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
}

/// Writes a GistNet for that model beside it, `gistnet.safetensors`: a gist is the mean of its block's embeddings, and so the
/// mean of its tokens' codes. Nothing is learnt.
pub fn write_gistnet(dir: &Path, block: usize) {
    let config =
        GistNetConfig { block, mode: Mode::Mean, head: Head::Linear, ..GistNetConfig::new(E, HEADS) };
    let mut network = GistNet::new(config, 0).unwrap();
    let params = network.params_mut();
    params.set("head.proj.weight", &Tensor::eye(E, DType::F32, &Device::Cpu).unwrap()).unwrap();
    params.set("head.proj.bias", &Tensor::zeros(E, DType::F32, &Device::Cpu).unwrap()).unwrap();
    let fingerprint = Weights::open(dir).unwrap().fingerprint();
    network.save(&dir.join("gistnet.safetensors"), &Identity::of_base(&fingerprint)).unwrap();
}
