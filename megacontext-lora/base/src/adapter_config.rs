//! `adapter_config.json` of an adapter folder.
//!
//! Source: PEFT 0.21's `LoraConfig`. Every key that PEFT's readers look at is written; keys we do not know are accepted
//! on reading, keys that change the numbers in a way we do not compute are refused by name.
//!
//! Units: lengths in tokens. Errors: `BaseError::Adapter` with the file.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::config::DecoderConfig;
use crate::error::{BaseError, Result};
use crate::lora::LoraConfig;
use crate::rope::{PositionOptions, RopeScaling, sigma_scales};

const FORMAT: u64 = 1;
const TYING: [&str; 2] = ["embed_tokens", "lm_head"];
/// Initialisations that leave the base as it is.
const PLAIN_INITS: [&str; 3] = ["gaussian", "orthogonal", "eva"];
/// Keys that must be absent, null, false or empty.
const UNSUPPORTED: [&str; 15] = [
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "lora_bias",
    "layers_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "exclude_modules",
    "loftq_config",
    "alora_invocation_tokens",
    "arrow_config",
    "use_qalora",
    "use_bdlora",
];

/// Our own key in `adapter_config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct MegacontextKey {
    /// `Weights::fingerprint` of the base.
    pub base_fingerprint: String,
    /// Scaling the adapter was trained with, counted from the original length.
    pub rope_scaling: RopeScaling,
    /// Scaling that the base's own `config.json` states; not checked where absent.
    pub base_rope_scaling: Option<RopeScaling>,
    /// Length the base was pre-trained at.
    pub original_max_position_embeddings: usize,
    /// Length the adapter was trained for.
    pub context_length: usize,
    /// What else was not as in a plain model's positions.
    pub positions: PositionOptions,
    /// Learned scales of sigma by level, where they were learned.
    pub sigma_scales: Option<Vec<f32>>,
}

/// What an adapter folder says about itself.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// Rank.
    pub r: usize,
    /// Strength before division by the rank.
    pub lora_alpha: f64,
    /// Dropout on the input of A while training.
    pub lora_dropout: f64,
    /// Linear layers that carry LoRA.
    pub target_modules: Vec<String>,
    /// Blocks that carry LoRA; none means all.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules trained in full.
    pub modules_to_save: Vec<String>,
    /// The base, for people and for tools that look it up.
    pub base_model_name_or_path: Option<String>,
    /// rsLoRA: alpha is divided by √r.
    pub use_rslora: bool,
    /// The trained embedding is the output head as well.
    pub ensure_weight_tying: bool,
    /// Our own key; none in an adapter of another tool.
    pub megacontext: Option<MegacontextKey>,
}

impl AdapterConfig {
    /// The description of an adapter trained on `base`. `trained` are our names of the tensors trained in full
    /// (embeddings, norms, an untied head); anything that cannot be saved as a whole module is refused.
    pub fn new<'a>(
        lora: &LoraConfig,
        base: &DecoderConfig,
        trained: impl IntoIterator<Item = &'a str>,
        base_model: &Path,
        megacontext: MegacontextKey,
    ) -> Result<Self> {
        let fail = |message: String| Err(BaseError::Lora { message });
        let trained: Vec<&str> = trained.into_iter().collect();
        let norms = base.tensors().iter().filter(|(name, _)| name.ends_with("norm.weight")).count();
        let trained_norms = trained.iter().filter(|name| name.ends_with("norm.weight")).count();
        if trained_norms != 0 && trained_norms != norms {
            return fail(format!("expected all {norms} norms to be trained or none, got {trained_norms}"));
        }
        let mut modules_to_save = Vec::new();
        for module in ["embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm"] {
            if trained.iter().any(|name| Self::saved_module(name) == Some(module)) {
                modules_to_save.push(module.to_string());
            }
        }
        if let Some(other) = trained.iter().find(|name| Self::saved_module(name).is_none()) {
            return fail(format!("expected embeddings, norms or lm_head to be trained in full, got {other}"));
        }
        let embedding = modules_to_save.iter().any(|m| m == TYING[0]);
        let ensure_weight_tying = base.tie_word_embeddings && embedding;
        if ensure_weight_tying {
            modules_to_save.insert(1, TYING[1].to_string());
        }
        Ok(Self {
            r: lora.r,
            lora_alpha: lora.alpha,
            lora_dropout: lora.dropout,
            target_modules: lora.target_modules.clone(),
            layers_to_transform: lora.layers.clone(),
            modules_to_save,
            base_model_name_or_path: Some(base_model.to_string_lossy().into_owned()),
            use_rslora: false,
            ensure_weight_tying,
            megacontext: Some(megacontext),
        })
    }

    /// The entry of `modules_to_save` that covers a tensor trained in full.
    pub(crate) fn saved_module(name: &str) -> Option<&str> {
        let module = name.strip_suffix(".weight")?.rsplit('.').next()?;
        ["embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm"]
            .into_iter()
            .find(|known| *known == module)
    }

    /// Where LoRA sits and how strong it is; rsLoRA's alpha/√r is expressed as the equal alpha.
    pub fn lora(&self) -> LoraConfig {
        let root = if self.use_rslora { (self.r as f64).sqrt() } else { 1.0 };
        LoraConfig {
            r: self.r,
            alpha: self.lora_alpha * root,
            dropout: self.lora_dropout,
            target_modules: self.target_modules.clone(),
            layers: self.layers_to_transform.clone(),
        }
    }

    /// The file's content.
    pub fn to_json(&self) -> Value {
        let mut out = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model_name_or_path,
            "r": self.r,
            "lora_alpha": number(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules,
            "layers_to_transform": self.layers_to_transform,
            "modules_to_save": if self.modules_to_save.is_empty() { Value::Null } else { json!(self.modules_to_save) },
            "bias": "none",
            "fan_in_fan_out": false,
            "use_rslora": self.use_rslora,
            "use_dora": false,
            "rank_pattern": {},
            "alpha_pattern": {},
            "init_lora_weights": true,
            "ensure_weight_tying": self.ensure_weight_tying,
            "inference_mode": true,
        });
        if let Some(own) = &self.megacontext {
            out["megacontext"] = json!({
                "format": FORMAT,
                "base_fingerprint": own.base_fingerprint,
                "rope_scaling": own.rope_scaling.to_json(),
                "original_max_position_embeddings": own.original_max_position_embeddings,
                "context_length": own.context_length,
            });
            if own.positions != PositionOptions::default() {
                out["megacontext"]["positions"] = json!(own.positions);
            }
            if let Some(scales) = &own.sigma_scales {
                out["megacontext"]["sigma_scales"] = json!(scales);
            }
            if let Some(base) = &own.base_rope_scaling {
                out["megacontext"]["base_rope_scaling"] = base.to_json();
            }
        }
        out
    }

    /// Reads the file's content; `path` is where it came from, for messages.
    pub fn from_json(value: &Value, path: &Path) -> Result<Self> {
        let raw = value.as_object().ok_or_else(|| BaseError::adapter(path, "expected a JSON object"))?;
        let keys = Keys { raw, path, under: "" };
        match keys.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            _ => return keys.fail(format!("peft_type: expected \"LORA\", got {}", keys.shown("peft_type"))),
        }
        if keys.get("task_type").is_some_and(|v| v.as_str() != Some("CAUSAL_LM")) {
            return keys.fail(format!("task_type: expected \"CAUSAL_LM\", got {}", keys.shown("task_type")));
        }
        if keys.get("bias").is_some_and(|v| v.as_str() != Some("none")) {
            return keys.fail(format!("bias: expected \"none\", got {}", keys.shown("bias")));
        }
        for key in UNSUPPORTED {
            if keys.get(key).is_some_and(|v| !is_off(v)) {
                return keys
                    .fail(format!("{key}: this PEFT feature is not supported, got {}", keys.shown(key)));
            }
        }
        match keys.get("init_lora_weights") {
            None | Some(Value::Bool(_)) => {}
            Some(Value::String(name)) if PLAIN_INITS.contains(&name.as_str()) => {}
            Some(other) => {
                return keys.fail(format!(
                    "init_lora_weights: expected an initialisation that leaves the base as it is, got {other}; convert \
                     the adapter to plain LoRA with PEFT first"
                ));
            }
        }
        Ok(Self {
            r: keys.count("r")?,
            lora_alpha: keys.number("lora_alpha", 8.0)?,
            lora_dropout: keys.number("lora_dropout", 0.0)?,
            target_modules: keys.target_modules()?,
            layers_to_transform: keys.layers()?,
            modules_to_save: keys.strings("modules_to_save")?.unwrap_or_default(),
            base_model_name_or_path: keys
                .get("base_model_name_or_path")
                .and_then(Value::as_str)
                .map(str::to_string),
            use_rslora: keys.flag("use_rslora")?,
            ensure_weight_tying: keys.flag("ensure_weight_tying")?,
            megacontext: keys.get("megacontext").map(|own| own_key(own, path)).transpose()?,
        })
    }
}

fn own_key(value: &Value, path: &Path) -> Result<MegacontextKey> {
    let raw = value.as_object().ok_or_else(|| BaseError::adapter(path, "megacontext: expected an object"))?;
    let keys = Keys { raw, path, under: "megacontext." };
    if raw.get("format").and_then(Value::as_u64) != Some(FORMAT) {
        return keys.fail(format!(
            "megacontext.format: expected {FORMAT}, got {}; the adapter was made by another version",
            keys.shown("format")
        ));
    }
    let scaling = |key: &str| {
        RopeScaling::from_json(raw.get(key).unwrap_or(&Value::Null))
            .map_err(|e| BaseError::adapter(path, format!("megacontext.{key}: {e}")))
    };
    if !raw.contains_key("rope_scaling") {
        return keys.fail("megacontext.rope_scaling: expected an object or null, the key is missing");
    }
    let Some(base_fingerprint) = raw.get("base_fingerprint").and_then(Value::as_str) else {
        return keys.fail(format!(
            "megacontext.base_fingerprint: expected a string, got {}",
            keys.shown("base_fingerprint")
        ));
    };
    Ok(MegacontextKey {
        base_fingerprint: base_fingerprint.to_string(),
        rope_scaling: scaling("rope_scaling")?,
        base_rope_scaling: if raw.contains_key("base_rope_scaling") {
            Some(scaling("base_rope_scaling")?)
        } else {
            None
        },
        original_max_position_embeddings: keys.count("original_max_position_embeddings")?,
        context_length: keys.count("context_length")?,
        positions: match keys.get("positions") {
            None => PositionOptions::default(),
            Some(value) => serde_json::from_value(value.clone())
                .map_err(|e| BaseError::adapter(path, format!("megacontext.positions: {e}")))?,
        },
        sigma_scales: keys
            .get("sigma_scales")
            .map(sigma_scales)
            .transpose()
            .map_err(|e| BaseError::adapter(path, format!("megacontext.sigma_scales: {e}")))?,
    })
}

/// Typed access to the keys of one object.
struct Keys<'a> {
    raw: &'a Map<String, Value>,
    path: &'a Path,
    under: &'static str,
}

impl Keys<'_> {
    fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(BaseError::adapter(self.path, message))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.raw.get(key).filter(|v| !v.is_null())
    }

    fn shown(&self, key: &str) -> String {
        self.raw.get(key).map_or_else(|| "nothing".to_string(), Value::to_string)
    }

    fn count(&self, key: &str) -> Result<usize> {
        match self.get(key).and_then(Value::as_u64).filter(|n| *n > 0).and_then(|n| usize::try_from(n).ok()) {
            Some(n) => Ok(n),
            None => {
                self.fail(format!("{}{key}: expected a positive number, got {}", self.under, self.shown(key)))
            }
        }
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => match value.as_f64().filter(|x| x.is_finite()) {
                Some(x) => Ok(x),
                None => self.fail(format!("{key}: expected a number, got {value}")),
            },
        }
    }

    fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => self.fail(format!("{key}: expected true or false, got {other}")),
        }
    }

    fn strings(&self, key: &str) -> Result<Option<Vec<String>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list = value.as_array().and_then(|list| {
            list.iter().map(|v| v.as_str().map(str::to_string)).collect::<Option<Vec<String>>>()
        });
        match list {
            Some(list) => Ok(Some(list)),
            None => self.fail(format!("{key}: expected a list of names, got {value}")),
        }
    }

    fn target_modules(&self) -> Result<Vec<String>> {
        match self.strings("target_modules")? {
            Some(mut list) => {
                // PEFT writes a set in any order.
                list.sort();
                Ok(list)
            }
            None => self.fail("target_modules: expected a list of names, the key is missing"),
        }
    }

    fn layers(&self) -> Result<Option<Vec<usize>>> {
        let key = "layers_to_transform";
        let Some(value) = self.get(key) else { return Ok(None) };
        let one = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        let list = match value {
            Value::Array(list) => list.iter().map(one).collect::<Option<Vec<usize>>>(),
            other => one(other).map(|n| vec![n]),
        };
        match list {
            Some(list) => Ok(Some(list)),
            None => self.fail(format!("{key}: expected block numbers, got {value}")),
        }
    }
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// Whole numbers as integers: PEFT declares `lora_alpha` as one.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}
