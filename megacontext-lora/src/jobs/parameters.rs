//! Parameters that several jobs have, and how a job that is made of such parts reads them.
//!
//! serde's `flatten` knows neither unknown keys nor the place of an error, so a job takes its parts out of the object one
//! after the other (`Parameters`): what a part is called when it is written is what it is called when it is read, and what
//! nobody took is refused by name. Written, they are flattened.
//!
//! Units: tokens. Errors: `Usage`, with the key, what was expected and what came.

use std::path::PathBuf;

use megacontext_base::config::DecoderConfig;
use megacontext_base::device::DeviceChoice;
use megacontext_base::rope::{RopeScaling, ScalingChoice};
use megacontext_kernels::precision::Precision;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{parse, to_value};
use crate::error::{PluginError, Result};
use crate::train::config::stretched;

/// The model that a job uses, and how.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Model {
    /// Model folder.
    pub base: PathBuf,
    /// Adapter folder.
    pub adapter: Option<PathBuf>,
    /// How positions are stretched, instead of as the adapter or the model says: a name, or a table as in `rope_scaling`.
    pub scaling: Option<ScalingChoice>,
    /// Stretch from the original context, instead of the adapter's or the model's own; with `scaling` alone that of the
    /// longest context.
    pub factor: Option<f64>,
    /// Precision class.
    pub dtype: Precision,
    /// Threads; none means all.
    pub threads: Option<usize>,
    /// What passes run on: `cpu`, `cuda:N`, or `auto`.
    pub device: DeviceChoice,
}

impl Model {
    /// The scaling that is asked for, where one is: for contexts of up to `longest` tokens.
    pub(crate) fn asked_scaling(
        &self,
        config: &DecoderConfig,
        longest: usize,
    ) -> Result<Option<RopeScaling>> {
        let asked = self.scaling.is_some() || self.factor.is_some();
        asked.then(|| stretched(config, self.scaling.as_ref(), self.factor, longest)).transpose()
    }
}

/// Where a job that can be interrupted keeps what it measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Kept {
    /// Folder for results and report; none writes nothing.
    pub out: Option<PathBuf>,
    /// Take up the evaluation in that folder.
    pub resume: bool,
}

/// The text that perplexity is measured on.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Scored {
    /// Files, folders, globs, or `corpus:held-out`.
    pub data: Vec<String>,
    /// Context lengths in tokens.
    pub contexts: Vec<usize>,
    /// Tokens the window moves by; none means half the context.
    pub stride: Option<usize>,
    /// Stop after about so many scored tokens.
    pub max_tokens: usize,
    /// Seed of which documents are scored.
    pub seed: u64,
}

impl Default for Scored {
    fn default() -> Self {
        Self { data: Vec::new(), contexts: Vec::new(), stride: None, max_tokens: 65_536, seed: 0 }
    }
}

/// Parameters of a job, from which its parts take theirs.
pub(crate) struct Parameters {
    left: Map<String, Value>,
    known: Vec<String>,
}

impl Parameters {
    /// All of a job's.
    pub fn new(params: Value) -> Result<Self> {
        match params {
            Value::Object(left) => Ok(Self { left, known: Vec::new() }),
            other => Err(PluginError::usage(format!("parameters: expected an object, got {other}"))),
        }
    }

    /// The part of this type; its keys are those it is written with.
    pub fn take<T: Default + Serialize + DeserializeOwned>(&mut self) -> Result<T> {
        let Value::Object(keys) = to_value(T::default())? else {
            return Err(PluginError::internal("a part of a job's parameters is not an object"));
        };
        let mut part = Map::new();
        for (key, _) in keys {
            part.extend(self.left.shift_remove(&key).map(|value| (key.clone(), value)));
            self.known.push(key);
        }
        parse(Value::Object(part))
    }

    /// Refuses what no part took.
    pub fn end(self) -> Result<()> {
        match self.left.keys().next() {
            None => Ok(()),
            Some(key) => {
                let known = self.known.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
                Err(PluginError::usage(format!("{key}: unknown field `{key}`, expected one of {known}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(params: Value) -> Result<(Kept, Scored)> {
        let mut params = Parameters::new(params)?;
        let parts = (params.take()?, params.take()?);
        params.end()?;
        Ok(parts)
    }

    #[test]
    fn parts_take_their_own_keys() {
        let (kept, scored) = read(json!({ "stride": 4, "out": "o", "seed": 3 })).unwrap();
        assert_eq!((kept.out, kept.resume), (Some(PathBuf::from("o")), false));
        assert_eq!((scored.stride, scored.seed, scored.max_tokens), (Some(4), 3, 65_536));
    }

    #[test]
    fn an_unknown_key_is_refused_with_those_of_all_parts() {
        let error = read(json!({ "stride": 4, "oout": "o" })).unwrap_err().to_string();
        for part in ["oout: unknown field `oout`", "expected one of", "`out`", "`stride`"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_value_of_another_type_is_refused_by_its_key() {
        let error = read(json!({ "stride": "wide" })).unwrap_err().to_string();
        assert!(error.contains("stride: invalid type: string \"wide\""), "{error}");
    }

    #[test]
    fn parameters_that_are_no_object_are_refused() {
        assert!(read(json!([])).unwrap_err().to_string().contains("expected an object, got []"));
    }
}
