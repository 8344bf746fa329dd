//! The description of a model: `config.json` of a Hugging Face folder.
//!
//! Source: the keys of transformers' configurations, releases 4 and 5 (which moved `rope_theta` and `rope_scaling` into
//! `rope_parameters`; both are read, and both are written). What is said by a family in its own way is the matter of the
//! module `families`; the names of tensors that of the module `names`.
//!
//! Units: lengths in tokens, widths in elements. Errors: `BaseError::Config`, naming file and key. Everything that
//! would change the numbers and is not implemented is refused, never ignored.
//!
//! Our own key `megacontext.original_max_position_embeddings` records the length a model was pre-trained at, once its
//! `max_position_embeddings` says the extended length.
//!
//! Left out: quantised weights.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::architecture::Architecture;
use crate::error::{BaseError, Result};
pub use crate::families::Family;
pub use crate::names::{LinearPart, NormPart};
use crate::rope::{PositionOptions, Rope, RopeKeys, RopeScaling, Stretched, sigma_scales};

/// Sizes above these are damage rather than a model; below them no product of sizes overflows.
pub(crate) const LARGEST: u64 = 1 << 24;
const MOST_LAYERS: usize = 4096;

/// A decoder's shape and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Whose names and keys the folder uses.
    pub family: Family,
    /// What the decoder is made of.
    pub architecture: Architecture,
    /// V: rows of the embedding.
    pub vocab_size: usize,
    /// E: model width.
    pub hidden_size: usize,
    /// Width inside the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// H: query heads.
    pub num_attention_heads: usize,
    /// G: key/value heads, a divisor of H.
    pub num_key_value_heads: usize,
    /// D: width of a head, even.
    pub head_dim: usize,
    /// Added to the mean square, or the variance, under the root of a norm.
    pub rms_norm_eps: f64,
    /// RoPE base.
    pub rope_theta: f64,
    /// Context length the model states, in tokens.
    pub max_position_embeddings: usize,
    /// Is the output head the embedding?
    pub tie_word_embeddings: bool,
    /// How positions are stretched.
    pub rope_scaling: RopeScaling,
    /// What else is not as in a plain model's positions: our own key `megacontext.positions`.
    pub positions: PositionOptions,
    /// Begin-of-sequence token, if stated.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence token, if stated; the first where several are.
    pub eos_token_id: Option<u32>,
    /// The whole file as read, so that nothing is lost on writing.
    pub raw: Map<String, Value>,
}

impl DecoderConfig {
    /// Reads `config.json` of a model folder.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            let what = if dir.exists() { "is a file" } else { "does not exist" };
            return Err(BaseError::config(
                dir,
                format!(
                    "expected a model folder with config.json, model.safetensors and tokenizer.json, but the path \
                     {what}"
                ),
            ));
        }
        let path = dir.join("config.json");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(BaseError::config(
                    dir,
                    "expected a file config.json in this folder, there is none",
                ));
            }
            Err(e) if e.kind() == std::io::ErrorKind::InvalidData => {
                return Err(BaseError::config(&path, "expected UTF-8 JSON, got bytes that are not UTF-8"));
            }
            Err(e) => return Err(BaseError::io(&path)(e)),
        };
        let value: Value = serde_json::from_str(&text).map_err(|e| {
            BaseError::config(&path, format!("expected complete JSON: {e}; copy the file again"))
        })?;
        Self::from_json(&value, &path)
    }

    /// Reads a configuration; `path` is where it came from, for messages.
    pub fn from_json(value: &Value, path: &Path) -> Result<Self> {
        let raw = value.as_object().ok_or_else(|| BaseError::config(path, "expected a JSON object"))?;
        let file = Keys { raw, path };
        let family = Family::of(&file)?;
        let standard = family.standard(&file)?;
        let keys = Keys { raw: &standard, path };
        if keys.has("quantization_config") {
            return keys
                .fail("quantization_config: expected f32, f16 or bf16 weights, got a quantised model");
        }

        let hidden_size = keys.size("hidden_size")?;
        let num_attention_heads = keys.size("num_attention_heads")?;
        let num_key_value_heads = keys.size_or("num_key_value_heads", num_attention_heads)?;
        if num_attention_heads % num_key_value_heads != 0 {
            return keys.fail(format!(
                "num_key_value_heads: expected a divisor of num_attention_heads = \
                 {num_attention_heads}, got {num_key_value_heads}"
            ));
        }
        if !keys.has("head_dim") && hidden_size % num_attention_heads != 0 {
            return keys.fail(format!(
                "num_attention_heads: expected a divisor of hidden_size = {hidden_size} (no head_dim is given), \
                 got {num_attention_heads}"
            ));
        }
        let head_dim = keys.size_or("head_dim", hidden_size / num_attention_heads)?;
        if head_dim % 2 != 0 {
            return keys
                .fail(format!("head_dim: expected an even number (RoPE turns pairs), got {head_dim}"));
        }
        if num_attention_heads * head_dim > LARGEST as usize {
            return keys.fail(format!(
                "head_dim: expected at most {LARGEST} over all {num_attention_heads} heads, got {head_dim} each"
            ));
        }
        let num_hidden_layers = keys.size("num_hidden_layers")?;
        if num_hidden_layers > MOST_LAYERS {
            return keys
                .fail(format!("num_hidden_layers: expected at most {MOST_LAYERS}, got {num_hidden_layers}"));
        }
        let architecture = family.architecture(&keys, num_hidden_layers, head_dim)?;
        let RopeKeys { theta: rope_theta, scaling: rope_scaling } =
            RopeKeys::read(keys.raw, 10000.0).map_err(|e| BaseError::config(path, e))?;
        rope_scaling
            .check(rope_theta, architecture.rotary_width)
            .map_err(|e| BaseError::config(path, format!("rope_parameters: {e}")))?;
        if let Some(original) = rope_scaling.original().filter(|n| *n as u64 > LARGEST) {
            return keys.fail(format!(
                "original_max_position_embeddings: expected a whole number from 1 to {LARGEST}, got {original}"
            ));
        }
        let positions = keys.positions(architecture.rotary_width / 2)?;
        let config = Self {
            family,
            architecture,
            vocab_size: keys.size("vocab_size")?,
            hidden_size,
            intermediate_size: keys.size("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: keys.positive("rms_norm_eps", Some(1e-6))?,
            rope_theta,
            max_position_embeddings: keys.size("max_position_embeddings")?,
            tie_word_embeddings: keys.flag_or("tie_word_embeddings", family.ties_by_default())?,
            rope_scaling,
            positions,
            bos_token_id: keys.token("bos_token_id")?,
            eos_token_id: keys.token("eos_token_id")?,
            raw: raw.clone(),
        };
        for (key, id) in [("bos_token_id", config.bos_token_id), ("eos_token_id", config.eos_token_id)] {
            if let Some(id) = id.filter(|id| *id as usize >= config.vocab_size) {
                return keys.fail(format!(
                    "{key}: expected an id below vocab_size = {}, got {id}",
                    config.vocab_size
                ));
            }
        }
        for key in ["original_max_position_embeddings", "context_length"] {
            if let Some(bad) = config.own(key).filter(|v| v.as_u64().is_none_or(|n| n == 0 || n > LARGEST)) {
                return keys.fail(format!("megacontext.{key}: expected a positive number, got {bad}"));
            }
        }
        if let Some(scales) = config.own("sigma_scales") {
            sigma_scales(scales)
                .map_err(|e| BaseError::config(path, format!("megacontext.sigma_scales: {e}")))?;
        }
        Ok(config)
    }

    /// The configuration as JSON: the file as read, with this value's fields put in. RoPE is written the old way
    /// (`rope_theta`, `rope_scaling`) and the new way (`rope_parameters`), so that transformers 4 and 5 agree.
    pub fn to_json(&self) -> Value {
        let mut out = self.raw.clone();
        let mut put = |key: &str, value: Value| {
            out.insert(key.to_string(), value);
        };
        put("model_type", json!(self.family.model_type()));
        put("architectures", json!([self.family.class()]));
        put("vocab_size", json!(self.vocab_size));
        // The others keep what their file says, in their own keys.
        if self.family == Family::Llama {
            put("hidden_act", json!("silu"));
            put("attention_bias", json!(self.architecture.qkv_bias));
            put("mlp_bias", json!(self.architecture.mlp_bias));
            put("hidden_size", json!(self.hidden_size));
            put("intermediate_size", json!(self.intermediate_size));
            put("num_hidden_layers", json!(self.num_hidden_layers));
            put("num_attention_heads", json!(self.num_attention_heads));
            put("num_key_value_heads", json!(self.num_key_value_heads));
            put("head_dim", json!(self.head_dim));
            put("rms_norm_eps", json!(self.rms_norm_eps));
        }
        put("max_position_embeddings", json!(self.max_position_embeddings));
        put("tie_word_embeddings", json!(self.tie_word_embeddings));
        put("bos_token_id", json!(self.bos_token_id));
        // A list of end tokens stays a list as long as its first is ours.
        if first_token(self.raw.get("eos_token_id")) != self.eos_token_id.map(u64::from)
            || !self.raw.contains_key("eos_token_id")
        {
            put("eos_token_id", json!(self.eos_token_id));
        }
        if self.positions != PositionOptions::default() {
            own_keys(&mut out)["positions"] = json!(self.positions);
        }
        let rope = RopeKeys { theta: self.rope_theta, scaling: self.rope_scaling.clone() };
        rope.write(&mut out, self.architecture.rotary_width);
        self.family.place(&mut out, self);
        Value::Object(out)
    }

    /// The length the model was pre-trained at, in tokens, from which every stretch is counted.
    ///
    /// Our own record if there is one; else what its scaling states; else `max_position_embeddings`, which by the
    /// convention of Hugging Face stays at the pre-trained length when linear scaling is added.
    pub fn original_context(&self) -> usize {
        self.own_length("original_max_position_embeddings")
            .or(self.rope_scaling.original())
            .unwrap_or(self.max_position_embeddings)
    }

    /// The length the model is for, in tokens: our own record if there is one, else `max_position_embeddings`.
    pub fn context(&self) -> usize {
        self.own_length("context_length").unwrap_or(self.max_position_embeddings)
    }

    fn own_length(&self, key: &str) -> Option<usize> {
        self.own(key).and_then(Value::as_u64).map(|n| n as usize)
    }

    /// The same model stretched to `context` tokens: scaling and stated length replaced, the pre-trained length kept on
    /// record.
    pub fn extended(&self, rope_scaling: RopeScaling, context: usize) -> Self {
        let original = self.original_context();
        let mut out = self.clone();
        let own = own_keys(&mut out.raw);
        own["original_max_position_embeddings"] = json!(original);
        own["context_length"] = json!(context);
        out.max_position_embeddings = rope_scaling.stated_length(context, original);
        out.rope_scaling = rope_scaling;
        out
    }

    /// Learned scales of sigma by level, where the model has them.
    pub fn sigma_scales(&self) -> Option<Vec<f32>> {
        self.own("sigma_scales").and_then(|value| sigma_scales(value).ok())
    }

    /// The same model with these scales of sigma.
    pub fn with_sigma_scales(&self, scales: &[f32]) -> Self {
        let mut out = self.clone();
        own_keys(&mut out.raw)["sigma_scales"] = json!(scales);
        out
    }

    /// The same model with an output head of its own.
    pub fn untied(&self) -> Self {
        Self { tie_word_embeddings: false, ..self.clone() }
    }

    /// The model's rotary positions, stretched by `scaling`: its own is [`DecoderConfig::rope_scaling`].
    pub fn rope(&self, scaling: &RopeScaling) -> Rope {
        Rope {
            options: self.positions.clone(),
            local_theta: self.architecture.local_theta,
            ..Rope::new(self.architecture.rotary_width, self.rope_theta, scaling.clone())
        }
    }

    /// What a further stretch of this model begins with.
    pub fn stretched(&self) -> Stretched<'_> {
        Stretched {
            own: &self.rope_scaling,
            original: self.original_context(),
            stated: self.max_position_embeddings,
            theta: self.rope_theta,
            width: self.architecture.rotary_width,
        }
    }

    fn own(&self, key: &str) -> Option<&Value> {
        self.raw.get("megacontext")?.get(key)
    }
}

/// A linear layer of a model, y = x·Wᵀ with W [out, in].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linear {
    /// Its module's name, without `.weight`.
    pub name: String,
    /// The block it belongs to; none for the output head.
    pub layer: Option<usize>,
    /// Width of the result.
    pub out: usize,
    /// Width of the input.
    pub inp: usize,
}

impl Linear {
    /// The last part of its name, by which PEFT's `target_modules` find it.
    pub fn target(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or(&self.name)
    }
}

/// Typed access to the keys of one file.
pub(crate) struct Keys<'a> {
    pub raw: &'a Map<String, Value>,
    pub path: &'a Path,
}

impl<'a> Keys<'a> {
    pub fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(BaseError::config(self.path, message))
    }

    /// Null counts as absent, as in transformers.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.raw.get(key).filter(|v| !v.is_null())
    }

    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    fn positions(&self, bands: usize) -> Result<PositionOptions> {
        let Some(value) = self.raw.get("megacontext").and_then(|own| own.get("positions")) else {
            return Ok(PositionOptions::default());
        };
        let options: PositionOptions = serde_json::from_value(value.clone())
            .map_err(|e| BaseError::config(self.path, format!("megacontext.positions: {e}")))?;
        options.check(bands).map_err(|e| BaseError::config(self.path, format!("megacontext.{e}")))?;
        Ok(options)
    }

    pub fn size(&self, key: &str) -> Result<usize> {
        let Some(value) = self.get(key) else {
            return self.fail(format!("{key}: expected a positive number, the key is missing"));
        };
        match value.as_u64() {
            Some(n) if n > 0 && n <= LARGEST => Ok(n as usize),
            _ => self.fail(format!("{key}: expected a whole number from 1 to {LARGEST}, got {value}")),
        }
    }

    pub fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        if self.has(key) { self.size(key) } else { Ok(default) }
    }

    /// A number of layers, 0 included.
    pub fn count_or(&self, key: &str, default: usize) -> Result<usize> {
        match self.get(key).map(|v| (v, v.as_u64())) {
            None => Ok(default),
            Some((_, Some(n))) if n <= LARGEST => Ok(n as usize),
            Some((value, _)) => {
                self.fail(format!("{key}: expected a whole number up to {LARGEST}, got {value}"))
            }
        }
    }

    /// The sliding window; null says that there is none, an absent key stands for the default.
    pub fn window(&self, default: Option<usize>) -> Result<Option<usize>> {
        match self.raw.get("sliding_window") {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(_) => self.size("sliding_window").map(Some),
        }
    }

    /// The cap on logits; null says that there is none, an absent key stands for the default.
    pub fn softcap(&self, default: Option<f64>) -> Result<Option<f64>> {
        let key = "final_logit_softcapping";
        match self.raw.get(key) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(value) => self.positive_value(key, value).map(Some),
        }
    }

    pub fn positive(&self, key: &str, default: Option<f64>) -> Result<f64> {
        match (self.get(key), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => self.fail(format!("{key}: expected a positive number, the key is missing")),
            (Some(value), _) => self.positive_value(key, value),
        }
    }

    pub fn positive_value(&self, key: &str, value: &Value) -> Result<f64> {
        match value.as_f64() {
            Some(x) if x.is_finite() && x > 0.0 => Ok(x),
            _ => self.fail(format!("{key}: expected a positive number, got {value}")),
        }
    }

    pub fn flag(&self, key: &str) -> Result<bool> {
        self.flag_or(key, false)
    }

    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => self.fail(format!("{key}: expected true or false, got {other}")),
        }
    }

    fn token(&self, key: &str) -> Result<Option<u32>> {
        let value = self.get(key);
        let Some(value) = value.filter(|v| v.as_array().is_none_or(|a| !a.is_empty())) else {
            return Ok(None);
        };
        match first_token(Some(value)).and_then(|id| u32::try_from(id).ok()) {
            Some(id) => Ok(Some(id)),
            None => self.fail(format!("{key}: expected a token id or a list of them, got {value}")),
        }
    }
}

/// Our own object among the keys of a file.
fn own_keys(raw: &mut Map<String, Value>) -> &mut Value {
    let own = raw.entry("megacontext").or_insert_with(|| json!({}));
    if !own.is_object() {
        *own = json!({});
    }
    own
}

fn first_token(value: Option<&Value>) -> Option<u64> {
    let value = value?;
    value.as_array().map_or(Some(value), |list| list.first()).and_then(Value::as_u64)
}
