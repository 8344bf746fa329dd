//! `adapter_config.json` of an adapter folder.
//!
//! Source: PEFT 0.21's `LoraConfig`. Every key that PEFT's readers look at is written; keys we do not know are accepted
//! on reading, keys that change the numbers in a way we do not compute are refused by name.
//!
//! Units: lengths in tokens. Errors: `BaseError::Adapter` with the file.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::config::{DecoderConfig, LARGEST};
use crate::error::{BaseError, Result};
use crate::lora::{Layers, LoraConfig, LoraInit, LoraKind, Names, Patterns, TokenIndices};
use crate::params::Group;
use crate::rope::{PositionOptions, RopeScaling, sigma_scales};

const FORMAT: u64 = 1;
/// Initialisations that leave the base as it is.
const PLAIN_INITS: [&str; 3] = ["gaussian", "orthogonal", "eva"];
/// Keys that must be absent, null, false or empty.
const UNSUPPORTED: [&str; 13] = [
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "loftq_config",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "use_qalora",
    "use_bdlora",
    "megatron_config",
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
    /// Base of the frequencies that the base's own `config.json` states; not checked where absent.
    pub base_rope_theta: Option<f64>,
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
    /// Where LoRA sits and how strong it is; `ensure_weight_tying` in it is the adapter's, of modules trained in full too.
    pub lora: LoraConfig,
    /// Modules trained in full.
    pub modules_to_save: Vec<String>,
    /// The base, for people and for tools that look it up.
    pub base_model_name_or_path: Option<String>,
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
        let is_norm = |name: &str| base.group_of(name) == Group::Norms;
        let tensors = base.tensors();
        let norms = tensors.iter().filter(|(name, _)| is_norm(name)).count();
        let trained_norms = trained.iter().filter(|name| is_norm(name)).count();
        if trained_norms != 0 && trained_norms != norms {
            return fail(format!("expected all {norms} norms to be trained or none, got {trained_norms}"));
        }
        if let Some(other) = trained.iter().find(|name| Self::saved_module(base, name).is_none()) {
            return fail(format!(
                "expected embeddings, norms or {} to be trained in full, got {other}",
                base.untied_head_name()
            ));
        }
        let mut modules_to_save: Vec<String> = Vec::new();
        let ends = |wanted: &dyn Fn(&str) -> bool, into: &mut Vec<String>| {
            for name in trained.iter().filter(|name| wanted(name)) {
                let module = Self::saved_module(base, name).unwrap_or_default();
                if !into.iter().any(|known| known == module) {
                    into.push(module.to_string());
                }
            }
        };
        ends(&|name| name == base.embedding_name(), &mut modules_to_save);
        let embedding = !modules_to_save.is_empty();
        if base.tie_word_embeddings && embedding {
            let head = Self::saved_module(base, base.untied_head_name()).unwrap_or_default();
            modules_to_save.push(head.to_string());
        } else {
            ends(&|name| name == base.untied_head_name(), &mut modules_to_save);
        }
        ends(&is_norm, &mut modules_to_save);
        let mut lora = lora.clone();
        lora.target_modules = lora.target_modules.expanded(base);
        if let Some(layers) = &lora.layers {
            lora.layers = Some(layers.numbers(base.num_hidden_layers)?.into());
        }
        let adapts_embedding = lora.resolve(base)?.of_kind(LoraKind::Embedding).is_some();
        lora.ensure_weight_tying =
            base.tie_word_embeddings && (embedding || (adapts_embedding && lora.ensure_weight_tying));
        Ok(Self {
            lora,
            modules_to_save,
            base_model_name_or_path: Some(base_model.to_string_lossy().into_owned()),
            megacontext: Some(megacontext),
        })
    }

    /// The entry of `modules_to_save` that covers a tensor trained in full.
    pub(crate) fn saved_module<'a>(base: &DecoderConfig, name: &'a str) -> Option<&'a str> {
        let whole = matches!(base.group_of(name), Group::Embeddings | Group::Norms)
            || name == base.untied_head_name();
        let module = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias"))?;
        whole.then(|| module.rsplit('.').next()).flatten()
    }

    /// Where LoRA sits and how strong it is. As in PEFT, what is trained in full carries no LoRA besides.
    pub fn lora(&self) -> LoraConfig {
        let mut lora = self.lora.clone();
        if !self.modules_to_save.is_empty() {
            let saved: Vec<&str> = self.modules_to_save.iter().map(String::as_str).collect();
            let excluded = lora.exclude_modules.unwrap_or(Names::List(Vec::new()));
            lora.exclude_modules = Some(excluded.and(&saved));
        }
        lora
    }

    /// The file's content.
    pub fn to_json(&self) -> Value {
        let lora = &self.lora;
        let names = |names: &Option<Names>| names.as_ref().map_or(Value::Null, |names| json!(names));
        let alphas: Map<String, Value> =
            lora.alpha_pattern.0.iter().map(|(pattern, alpha)| (pattern.clone(), number(*alpha))).collect();
        let mut out = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model_name_or_path,
            "r": lora.r,
            "lora_alpha": number(lora.alpha),
            "lora_dropout": lora.dropout,
            "target_modules": lora.target_modules,
            "exclude_modules": names(&lora.exclude_modules),
            "layers_to_transform": lora.layers,
            "layers_pattern": names(&lora.layers_pattern),
            "modules_to_save": if self.modules_to_save.is_empty() { Value::Null } else { json!(self.modules_to_save) },
            "trainable_token_indices": lora.trainable_token_indices,
            "bias": "none",
            "fan_in_fan_out": false,
            "use_rslora": lora.use_rslora,
            "use_dora": lora.use_dora,
            "rank_pattern": lora.rank_pattern,
            "alpha_pattern": alphas,
            "init_lora_weights": true,
            "ensure_weight_tying": lora.ensure_weight_tying,
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
            if let Some(theta) = own.base_rope_theta {
                out["megacontext"]["base_rope_theta"] = json!(theta);
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
                    "init_lora_weights: expected an initialisation that leaves the base as it is, got {other}; convert the \
                     adapter to plain LoRA with PEFT first (save_pretrained's path_initial_model_for_weight_conversion)"
                ));
            }
        }
        let lora = LoraConfig {
            r: keys.count("r")?,
            alpha: keys.number("lora_alpha", 8.0)?,
            dropout: keys.number("lora_dropout", 0.0)?,
            target_modules: keys.target_modules()?,
            exclude_modules: keys.names("exclude_modules")?,
            layers: keys.layers()?.map(Layers::These),
            layers_pattern: keys.names("layers_pattern")?,
            rank_pattern: keys.patterns("rank_pattern", "a rank of at least 1", |v| {
                v.as_u64().filter(|n| *n > 0).and_then(|n| usize::try_from(n).ok())
            })?,
            alpha_pattern: keys
                .patterns("alpha_pattern", "a positive number", |v| v.as_f64().filter(|x| *x > 0.0))?,
            use_rslora: keys.flag("use_rslora")?,
            use_dora: keys.flag("use_dora")?,
            init: LoraInit::Default,
            trainable_token_indices: keys.token_indices()?,
            ensure_weight_tying: keys.flag("ensure_weight_tying")?,
        };
        Ok(Self {
            lora,
            modules_to_save: keys.strings("modules_to_save")?.unwrap_or_default(),
            base_model_name_or_path: keys
                .get("base_model_name_or_path")
                .and_then(Value::as_str)
                .map(str::to_string),
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
        base_rope_theta: keys
            .get("base_rope_theta")
            .map(|value| match value.as_f64().filter(|x| x.is_finite() && *x > 0.0) {
                Some(theta) => Ok(theta),
                None => {
                    keys.fail(format!("megacontext.base_rope_theta: expected a positive number, got {value}"))
                }
            })
            .transpose()?,
        original_max_position_embeddings: keys.length("original_max_position_embeddings")?,
        context_length: keys.length("context_length")?,
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

    /// A number of tokens, with the same limit as those of a model.
    fn length(&self, key: &str) -> Result<usize> {
        match self.count(key)? {
            n if n as u64 <= LARGEST => Ok(n),
            n => self.fail(format!("{}{key}: expected at most {LARGEST}, got {n}", self.under)),
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

    /// Names or a pattern; PEFT writes sets in any order.
    fn names(&self, key: &str) -> Result<Option<Names>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(pattern)) if pattern.is_empty() => Ok(None),
            Some(Value::String(pattern)) => Ok(Some(Names::Pattern(pattern.clone()))),
            Some(Value::Array(list)) if list.is_empty() => Ok(None),
            Some(_) => Ok(self.strings(key)?.map(|mut list| {
                list.sort();
                list.dedup();
                Names::List(list)
            })),
        }
    }

    fn target_modules(&self) -> Result<Names> {
        match self.names("target_modules")? {
            Some(names) => Ok(names),
            None => self.fail(format!(
                "target_modules: expected a list of names or a pattern, got {}",
                self.shown("target_modules")
            )),
        }
    }

    fn patterns<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Patterns<T>> {
        let Some(value) = self.get(key) else { return Ok(Patterns::default()) };
        let Some(map) = value.as_object() else {
            return self.fail(format!("{key}: expected an object, got {value}"));
        };
        let mut out = Vec::with_capacity(map.len());
        for (pattern, value) in map {
            match read(value) {
                Some(value) => out.push((pattern.clone(), value)),
                None => {
                    return self.fail(format!("{key}: expected {expected} for \"{pattern}\", got {value}"));
                }
            }
        }
        Ok(Patterns(out))
    }

    fn token_indices(&self) -> Result<Option<TokenIndices>> {
        let key = "trainable_token_indices";
        let Some(value) = self.get(key).filter(|v| !is_off(v)) else { return Ok(None) };
        match serde_json::from_value(value.clone()) {
            Ok(indices) => Ok(Some(indices)),
            Err(_) => self.fail(format!("{key}: expected token ids, or token ids by module, got {value}")),
        }
    }

    fn layers(&self) -> Result<Option<Vec<usize>>> {
        let key = "layers_to_transform";
        let Some(value) = self.get(key).filter(|v| !is_off(v)) else { return Ok(None) };
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
