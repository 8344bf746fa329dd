//! Scalings in files: the keys of a Hugging Face `config.json`, and of our own files.
//!
//! Source: transformers 4 (`rope_theta`, `rope_scaling` with `type` or `rope_type`) and 5 (`rope_parameters` with
//! everything in it). Both are read; both are written, so that both versions compute our angles:
//!
//! - `dynamic` counts from `max_position_embeddings`, which therefore stays at the original length.
//! - `yarn` and `longrope` of some versions take their factor from `max_position_embeddings` / original length, which
//!   therefore says original·factor where that is a whole number; `longrope` also writes the original length at the top.
//! - `ntk` is not known to transformers: it is written as a changed `rope_theta`, and our own key `megacontext.ntk` says
//!   from which base and by which factor, so that a further stretch counts from the original.
//!
//! In our own files (an adapter's key) a scaling is the same object, with the types `none` and `ntk` besides.
//!
//! Errors: a type that is not known, naming those there are; a key that is missing, of another type or out of range; two
//! keys that contradict each other. As text for the caller to place.

use serde_json::{Map, Value, json};

use super::scaling::{Llama3, Longrope, RopeScaling, Yarn};

const ORIGINAL: &str = "original_max_position_embeddings";

/// What a `config.json` says about rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeKeys {
    /// Base of the frequencies, before any scaling.
    pub theta: f64,
    /// Scaling.
    pub scaling: RopeScaling,
}

impl RopeKeys {
    /// Reads the keys; `default_theta` is the base where none is stated.
    pub fn read(config: &Map<String, Value>, default_theta: f64) -> Result<Self, String> {
        let stated = |map: &Map<String, Value>, key: &str| map.get(key).filter(|v| !v.is_null()).cloned();
        let nested = stated(config, "rope_parameters");
        let inner = nested.as_ref().and_then(Value::as_object).and_then(|map| stated(map, "rope_theta"));
        let (key, value) = match (inner, stated(config, "rope_theta")) {
            (Some(inner), Some(outer)) if inner.as_f64() != outer.as_f64() => {
                return Err(format!(
                    "rope_theta: expected one value, got {outer} and rope_parameters.rope_theta = {inner}"
                ));
            }
            (Some(inner), _) => ("rope_parameters.rope_theta", inner),
            (None, Some(outer)) => ("rope_theta", outer),
            (None, None) => ("rope_theta", json!(default_theta)),
        };
        let theta = value
            .as_f64()
            .filter(|x| x.is_finite() && *x > 0.0)
            .ok_or_else(|| format!("{key}: expected a positive number, got {value}"))?;
        let scaling = RopeScaling::from_hf(config)?;
        if nested.is_some() && stated(config, "rope_scaling").is_some() {
            let mut old = config.clone();
            old.remove("rope_parameters");
            let old = RopeScaling::from_hf(&old)?;
            if old != scaling {
                return Err(format!(
                    "rope_scaling: expected the same as rope_parameters ({scaling}), got {old}; remove one of the two keys"
                ));
            }
        }
        let own = config.get("megacontext").and_then(|own| own.get("ntk")).filter(|v| !v.is_null());
        Self { theta, scaling }.with_ntk(own)
    }

    /// Puts an exported NTK scaling together again.
    fn with_ntk(self, own: Option<&Value>) -> Result<Self, String> {
        let Some(own) = own else { return Ok(self) };
        let number = |key: &str| {
            let value = own.get(key).and_then(Value::as_f64).filter(|x| x.is_finite() && *x >= 1.0);
            value.ok_or_else(|| format!("megacontext.ntk.{key}: expected a number of at least 1, got {own}"))
        };
        let (base, factor, scaled) = (number("rope_theta")?, number("factor")?, number("scaled_theta")?);
        if self.scaling != RopeScaling::None || (self.theta / scaled - 1.0).abs() > 1e-9 {
            return Err(format!(
                "rope_theta: expected {scaled}, what megacontext.ntk made of {base}, and no other scaling, got {} and {}; \
                 remove the key megacontext.ntk if they are meant",
                self.theta, self.scaling
            ));
        }
        Ok(Self { theta: base, scaling: RopeScaling::Ntk { factor } })
    }

    /// Puts the keys into a `config.json` whose other keys are written; `width` is the rotated width of a head.
    pub fn write(&self, config: &mut Map<String, Value>, width: usize) {
        let theta = match self.scaling {
            RopeScaling::Ntk { factor } => {
                let scaled = self.theta * factor.powf(width as f64 / (width as f64 - 2.0));
                let own = config.entry("megacontext").or_insert_with(|| json!({}));
                own["ntk"] = json!({ "rope_theta": self.theta, "factor": factor, "scaled_theta": scaled });
                scaled
            }
            _ => {
                if let Some(own) = config.get_mut("megacontext").and_then(Value::as_object_mut) {
                    own.remove("ntk");
                }
                self.theta
            }
        };
        let scaling = self.scaling.to_hf();
        let mut parameters = config
            .get("rope_parameters")
            .and_then(|old| old.get("partial_rotary_factor"))
            .map(|partial| Map::from_iter([("partial_rotary_factor".to_string(), partial.clone())]))
            .unwrap_or_default();
        match &scaling {
            Value::Object(keys) => {
                parameters
                    .extend(keys.iter().filter(|(k, _)| *k != "type").map(|(k, v)| (k.clone(), v.clone())));
            }
            _ => {
                parameters.insert("rope_type".into(), json!("default"));
            }
        }
        parameters.insert("rope_theta".into(), json!(theta));
        if let RopeScaling::Longrope(longrope) = &self.scaling {
            config.insert(ORIGINAL.into(), json!(longrope.original));
        } else {
            config.shift_remove(ORIGINAL);
        }
        config.insert("rope_theta".into(), json!(theta));
        config.insert("rope_scaling".into(), scaling);
        config.insert("rope_parameters".into(), Value::Object(parameters));
    }
}

impl RopeScaling {
    /// Reads `rope_parameters` (transformers 5) or `rope_scaling` (older) of a `config.json`.
    pub fn from_hf(config: &Map<String, Value>) -> Result<Self, String> {
        let found = ["rope_parameters", "rope_scaling"]
            .iter()
            .find_map(|key| config.get(*key).filter(|v| !v.is_null()).map(|v| (*key, v)));
        let Some((key, value)) = found else { return Ok(Self::None) };
        let object =
            value.as_object().ok_or_else(|| format!("{key}: expected an object or null, got {value}"))?;
        let length = |key: &str| config.get(key).and_then(Value::as_u64).map(|n| n as usize);
        Self::from_parameters(object, length(ORIGINAL), length("max_position_embeddings"))
            .map_err(|e| format!("{key}: {e}"))
    }

    /// Reads the object that describes a scaling. `top_original` is a model's `original_max_position_embeddings`, which
    /// goes before the object's own, `max_position` its `max_position_embeddings`, which stands in for it.
    pub fn from_parameters(
        object: &Map<String, Value>,
        top_original: Option<usize>,
        max_position: Option<usize>,
    ) -> Result<Self, String> {
        let keys = Keys(object);
        let kind = match object.get("rope_type").or_else(|| object.get("type")).filter(|v| !v.is_null()) {
            None => "default",
            Some(v) => v.as_str().ok_or_else(|| format!("rope_type: expected a string, got {v}"))?,
        };
        let factor = || {
            let factor = keys.number("factor")?;
            factor.ok_or_else(|| format!("rope_type \"{kind}\" needs a number \"factor\""))
        };
        let original = || {
            top_original
                .map_or_else(|| keys.length(ORIGINAL), |n| Ok(Some(n)))?
                .or(max_position)
                .ok_or_else(|| format!("rope_type \"{kind}\" needs a number \"{ORIGINAL}\""))
        };
        let scaling = match kind {
            "default" | "none" => Self::None,
            "linear" => Self::from_factor(factor()?)?,
            "ntk" => Self::Ntk { factor: factor()? },
            // Here transformers looks at max_position_embeddings alone.
            "dynamic" => {
                Self::Dynamic { factor: factor()?, original: max_position.map_or_else(original, Ok)? }
            }
            "yarn" => Self::Yarn(Yarn {
                beta_fast: keys.number("beta_fast")?.unwrap_or(32.0),
                beta_slow: keys.number("beta_slow")?.unwrap_or(1.0),
                mscale: keys.number("mscale")?,
                mscale_all_dim: keys.number("mscale_all_dim")?,
                attention_factor: keys.number("attention_factor")?,
                truncate: keys.flag("truncate")?.unwrap_or(true),
                ..Yarn::new(factor()?, original()?)
            }),
            "longrope" | "su" => {
                let original = original()?;
                let stretch = max_position.map(|n| n as f64 / original as f64);
                let factor = keys.number("factor")?.or(stretch).map_or_else(factor, Ok)?;
                Self::Longrope(Longrope {
                    factor,
                    original,
                    short_factor: keys.numbers("short_factor")?,
                    long_factor: keys.numbers("long_factor")?,
                    attention_factor: keys.number("attention_factor")?,
                })
            }
            "llama3" => Self::Llama3(Llama3 {
                factor: factor()?,
                original: original()?,
                low_freq_factor: keys.needed(kind, "low_freq_factor")?,
                high_freq_factor: keys.needed(kind, "high_freq_factor")?,
            }),
            other => {
                return Err(format!(
                    "rope_type: expected \"default\" or one of {}, got \"{other}\"",
                    Self::KINDS.join(", ")
                ));
            }
        };
        super::scaling::check_factor(scaling.factor())?;
        Ok(scaling)
    }

    /// The object for `rope_scaling` of a `config.json`; null when nothing is scaled, or only `rope_theta` is.
    pub fn to_hf(&self) -> Value {
        match self {
            Self::None | Self::Ntk { .. } => Value::Null,
            Self::Dynamic { factor, .. } => {
                json!({"type": "dynamic", "rope_type": "dynamic", "factor": factor})
            }
            other => other.to_json(),
        }
    }

    /// The object for our own files: complete, whatever the kind; null for none.
    pub fn to_json(&self) -> Value {
        let mut out = json!({"type": self.kind(), "rope_type": self.kind(), "factor": self.factor()});
        if let Some(original) = self.original() {
            out[ORIGINAL] = json!(original);
        }
        let mut put = |key: &str, value: Option<f64>| {
            if let Some(value) = value {
                out[key] = json!(value);
            }
        };
        match self {
            Self::None => return Value::Null,
            Self::Linear { .. } | Self::Ntk { .. } | Self::Dynamic { .. } => {}
            Self::Yarn(yarn) => {
                put("beta_fast", Some(yarn.beta_fast));
                put("beta_slow", Some(yarn.beta_slow));
                put("mscale", yarn.mscale);
                put("mscale_all_dim", yarn.mscale_all_dim);
                put("attention_factor", yarn.attention_factor);
                if !yarn.truncate {
                    out["truncate"] = json!(false);
                }
            }
            Self::Longrope(longrope) => {
                put("attention_factor", longrope.attention_factor);
                out["short_factor"] = json!(longrope.short_factor);
                out["long_factor"] = json!(longrope.long_factor);
            }
            Self::Llama3(llama3) => {
                put("low_freq_factor", Some(llama3.low_freq_factor));
                put("high_freq_factor", Some(llama3.high_freq_factor));
            }
        }
        out
    }

    /// Reads what [`RopeScaling::to_json`] wrote.
    pub fn from_json(value: &Value) -> Result<Self, String> {
        match value {
            Value::Null => Ok(Self::None),
            Value::Object(object) => Self::from_parameters(object, None, None),
            other => Err(format!("expected an object or null, got {other}")),
        }
    }

    /// The `max_position_embeddings` to write for a model stretched to `context` tokens from `original`; see the module.
    pub fn stated_length(&self, context: usize, original: usize) -> usize {
        let reach = self.original().map_or(0.0, |n| n as f64 * self.factor());
        match self {
            Self::Dynamic { .. } => original,
            Self::Yarn(_) | Self::Longrope(_) if reach.fract() == 0.0 => reach as usize,
            _ => context,
        }
    }
}

/// Typed access to the keys of one object; null counts as absent.
struct Keys<'a>(&'a Map<String, Value>);

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn number(&self, key: &str) -> Result<Option<f64>, String> {
        let number = |v: &Value| v.as_f64().ok_or_else(|| format!("{key}: expected a number, got {v}"));
        self.get(key).map(number).transpose()
    }

    fn needed(&self, kind: &str, key: &str) -> Result<f64, String> {
        self.number(key)?.ok_or_else(|| format!("rope_type \"{kind}\" needs a number \"{key}\""))
    }

    fn length(&self, key: &str) -> Result<Option<usize>, String> {
        // Some files state lengths as 8192.0.
        let whole = |v: &Value| v.as_f64().filter(|x| x.fract() == 0.0 && *x >= 1.0 && *x <= 2f64.powi(53));
        let length = |v: &Value| {
            whole(v).map(|x| x as usize).ok_or_else(|| format!("{key}: expected a positive number, got {v}"))
        };
        self.get(key).map(length).transpose()
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        let flag = |v: &Value| v.as_bool().ok_or_else(|| format!("{key}: expected true or false, got {v}"));
        self.get(key).map(flag).transpose()
    }

    fn numbers(&self, key: &str) -> Result<Vec<f64>, String> {
        let list = self.get(key).and_then(Value::as_array);
        let numbers = list.and_then(|list| list.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>());
        numbers.ok_or_else(|| {
            format!(
                "rope_type \"longrope\" needs a list of numbers \"{key}\", got {}",
                self.get(key).map_or_else(|| "nothing".to_string(), Value::to_string)
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: Value) -> Result<RopeKeys, String> {
        RopeKeys::read(config.as_object().unwrap(), 10000.0)
    }

    fn refused(config: Value, what: &str) {
        let error = read(config).unwrap_err();
        assert!(error.contains(what), "expected {what:?} in {error:?}");
    }

    fn every_kind() -> Vec<RopeScaling> {
        vec![
            RopeScaling::None,
            RopeScaling::Linear { factor: 4.0 },
            RopeScaling::Ntk { factor: 3.0 },
            RopeScaling::Dynamic { factor: 2.5, original: 64 },
            RopeScaling::Yarn(Yarn::new(8.0, 64)),
            RopeScaling::Yarn(Yarn {
                mscale: Some(0.7),
                mscale_all_dim: Some(1.1),
                beta_fast: 24.0,
                truncate: false,
                ..Yarn::new(8.0, 64)
            }),
            RopeScaling::Longrope(Longrope {
                factor: 8.0,
                original: 64,
                short_factor: vec![1.0, 1.1, 1.2, 1.3],
                long_factor: vec![1.0, 2.0, 4.0, 8.1],
                attention_factor: Some(1.19),
            }),
            RopeScaling::Llama3(Llama3::new(8.0, 64)),
        ]
    }

    #[test]
    fn every_kind_survives_a_config_json() {
        for scaling in every_kind() {
            let keys = RopeKeys { theta: 500.0, scaling };
            let mut config = Map::new();
            config.insert("max_position_embeddings".into(), json!(keys.scaling.stated_length(512, 64)));
            keys.write(&mut config, 8);
            assert_eq!(read(Value::Object(config.clone())).unwrap(), keys, "{config:?}");
            // Each version's keys alone say the same.
            for (key, theta) in [("rope_scaling", "rope_parameters"), ("rope_parameters", "rope_theta")] {
                let mut one = config.clone();
                one.remove(key);
                if key == "rope_parameters" {
                    assert!(one.contains_key(theta));
                }
                assert_eq!(read(Value::Object(one)).unwrap(), keys, "without {key}: {config:?}");
            }
        }
    }

    #[test]
    fn every_kind_survives_our_own_files() {
        for scaling in every_kind() {
            let text = scaling.to_json().to_string();
            assert_eq!(RopeScaling::from_json(&serde_json::from_str(&text).unwrap()).unwrap(), scaling);
        }
    }

    #[test]
    fn a_longrope_model_without_factor_takes_it_from_its_lengths() {
        let config = json!({
            "max_position_embeddings": 512, "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "su", "short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0]},
        });
        let scaling = read(config).unwrap().scaling;
        assert_eq!((scaling.kind(), scaling.factor(), scaling.original()), ("longrope", 8.0, Some(64)));
    }

    #[test]
    fn yarn_without_an_original_length_takes_the_stated_one() {
        let config =
            json!({"max_position_embeddings": 512, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}});
        assert_eq!(read(config).unwrap().scaling, RopeScaling::Yarn(Yarn::new(2.0, 512)));
    }

    #[test]
    fn unknown_rope_type_is_refused_naming_those_there_are() {
        refused(
            json!({"rope_scaling": {"rope_type": "spiral"}}),
            "rope_scaling: rope_type: expected \"default\" or one of none, linear, ntk, dynamic, yarn, longrope, llama3, \
             got \"spiral\"",
        );
    }

    #[test]
    fn rope_type_that_is_no_string_is_refused() {
        refused(json!({"rope_scaling": {"rope_type": 3}}), "rope_type: expected a string, got 3");
    }

    #[test]
    fn scaling_that_is_no_object_is_refused() {
        refused(json!({"rope_scaling": 4.0}), "rope_scaling: expected an object or null, got 4.0");
    }

    #[test]
    fn missing_factor_is_refused() {
        for kind in ["linear", "ntk", "dynamic", "yarn", "llama3"] {
            let config = json!({"max_position_embeddings": 64, "rope_parameters": {"rope_type": kind}});
            refused(config, &format!("rope_parameters: rope_type \"{kind}\" needs a number \"factor\""));
        }
    }

    #[test]
    fn factor_below_one_in_a_file_is_refused() {
        for kind in ["linear", "ntk", "dynamic", "yarn"] {
            let config =
                json!({"max_position_embeddings": 64, "rope_scaling": {"type": kind, "factor": 0.5}});
            refused(config, "rope factor: expected a finite number of at least 1, got 0.5");
        }
    }

    #[test]
    fn factor_of_another_type_is_refused() {
        let config = json!({"rope_scaling": {"type": "linear", "factor": "8"}});
        refused(config, "factor: expected a number, got \"8\"");
    }

    #[test]
    fn missing_original_length_is_refused() {
        let config = json!({"rope_scaling": {"type": "yarn", "factor": 2.0}});
        refused(config, "rope_type \"yarn\" needs a number \"original_max_position_embeddings\"");
    }

    #[test]
    fn missing_longrope_list_is_refused() {
        let scaling = json!({"type": "longrope", "factor": 2.0, "short_factor": [1.0]});
        let config = json!({"max_position_embeddings": 64, "rope_scaling": scaling});
        refused(config, "needs a list of numbers \"long_factor\", got nothing");
    }

    #[test]
    fn missing_llama3_bounds_are_refused() {
        let config =
            json!({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}});
        refused(config, "rope_type \"llama3\" needs a number \"low_freq_factor\"");
    }

    #[test]
    fn two_scalings_that_differ_are_refused() {
        let config = json!({
            "rope_parameters": {"rope_type": "linear", "factor": 2.0},
            "rope_scaling": {"type": "linear", "factor": 4.0},
        });
        refused(config, "expected the same as rope_parameters (linear x2), got linear x4");
    }

    #[test]
    fn two_bases_that_differ_are_refused() {
        let config =
            json!({"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 6.0}});
        refused(config, "rope_theta: expected one value, got 5.0 and rope_parameters.rope_theta = 6.0");
    }

    #[test]
    fn ntk_record_that_does_not_fit_the_base_is_refused() {
        let ntk = json!({"rope_theta": 100.0, "factor": 2.0, "scaled_theta": 252.0});
        refused(
            json!({"rope_theta": 100.0, "megacontext": {"ntk": ntk}}),
            "expected 252, what megacontext.ntk made of 100",
        );
    }
}
