//! A stretch as a user asks for it: a kind by name, or a kind with its parameters, and a factor.
//!
//! Factors count from the original length: a linear x8 model taken to twice its length gets 16. What a model's own
//! scaling states besides its factor (YaRN's bounds, Llama 3.1's) is kept when the same kind is asked for; an attention
//! factor that was stated for the old factor is computed anew.
//!
//! Errors: a kind that is not known, a factor below 1, parameters that a kind needs and nobody gives.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::scaling::{Llama3, Longrope, RopeScaling, Yarn, check_factor};

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ScalingChoice {
    /// One of [`RopeScaling::KINDS`].
    Kind(String),
    /// An object as in `rope_scaling` of a `config.json`; its `factor` may be left out.
    Parameters(Map<String, Value>),
}

/// The model that is to be stretched.
#[derive(Clone, Copy, Debug)]
pub struct Stretched<'a> {
    /// Its own scaling.
    pub own: &'a RopeScaling,
    /// The length it was pre-trained at.
    pub original: usize,
    /// The length that it states.
    pub stated: usize,
    /// Base of its frequencies.
    pub theta: f64,
    /// Rotated width of a head.
    pub width: usize,
}

impl Stretched<'_> {
    /// The scaling for a context of `context` tokens. Without a choice it is the model's own kind, or linear; without a
    /// factor it is context / original length, and 1 for `dynamic`, which looks at the length itself.
    pub fn scaling(
        &self,
        choice: Option<&ScalingChoice>,
        factor: Option<f64>,
        context: usize,
    ) -> Result<RopeScaling, String> {
        let mut parameters = Map::new();
        let kind = match choice {
            None if *self.own == RopeScaling::None => "linear".to_string(),
            None => self.own.kind().to_string(),
            Some(ScalingChoice::Kind(kind)) => kind.clone(),
            Some(ScalingChoice::Parameters(given)) => {
                parameters = given.clone();
                let kind = given.get("rope_type").or_else(|| given.get("type")).and_then(Value::as_str);
                kind.ok_or("scaling: expected a string \"rope_type\" among its parameters, got none")?
                    .to_string()
            }
        };
        let stated = parameters.get("factor").and_then(Value::as_f64);
        let factor = factor.or(stated).unwrap_or_else(|| self.default_factor(&kind, context));
        check_factor(factor)?;
        let scaling = match (kind.as_str(), &parameters) {
            (_, given) if !given.is_empty() => {
                let mut given = given.clone();
                given.insert("factor".into(), factor.into());
                let original = given.contains_key("original_max_position_embeddings");
                RopeScaling::from_parameters(&given, None, (!original).then_some(self.original))
                    .map_err(|e| format!("scaling: {e}"))?
            }
            ("none", _) => RopeScaling::None,
            ("linear", _) => RopeScaling::from_factor(factor)?,
            ("ntk", _) if factor == 1.0 => RopeScaling::None,
            ("ntk", _) => RopeScaling::Ntk { factor },
            ("dynamic", _) => RopeScaling::Dynamic { factor, original: self.original },
            ("yarn", _) => RopeScaling::Yarn(match self.own {
                RopeScaling::Yarn(own) => Yarn { factor, attention_factor: None, ..own.clone() },
                _ => Yarn::new(factor, self.original),
            }),
            ("llama3", _) => RopeScaling::Llama3(match self.own {
                RopeScaling::Llama3(own) => Llama3 { factor, ..own.clone() },
                _ => Llama3::new(factor, self.original),
            }),
            ("longrope", _) => RopeScaling::Longrope(self.longrope(factor)?),
            (other, _) => {
                return Err(format!(
                    "scaling: expected one of {}, got \"{other}\"",
                    RopeScaling::KINDS.join(", ")
                ));
            }
        };
        scaling.check(self.theta, self.width)?;
        Ok(scaling)
    }

    fn default_factor(&self, kind: &str, context: usize) -> f64 {
        let grown = match (kind, self.own) {
            ("dynamic", _) => 1.0,
            // Its factor is not its lengths' quotient: 8 takes Llama 3.1 from 8k to 128k.
            ("llama3", RopeScaling::Llama3(own)) if self.stated > own.original => {
                own.factor * context as f64 / self.stated as f64
            }
            _ => context as f64 / self.original as f64,
        };
        grown.max(1.0)
    }

    /// The divisors of a LongRoPE model were searched for, there is no formula: those of its own are stretched further
    /// where they stretch at all, all by the same.
    fn longrope(&self, factor: f64) -> Result<Longrope, String> {
        let RopeScaling::Longrope(own) = self.own else {
            return Err("scaling: longrope needs its lists of divisors, which have to be searched for: give an object with \
                        rope_type, short_factor and long_factor instead of the name"
                .into());
        };
        let further = factor / own.factor;
        let long =
            own.long_factor.iter().map(|d| if *d > 1.0 { (d * further).max(1.0) } else { *d }).collect();
        Ok(Longrope { factor, long_factor: long, attention_factor: None, ..own.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn stretched(own: &RopeScaling) -> Stretched<'_> {
        Stretched { own, original: 4096, stated: 4096, theta: 10000.0, width: 8 }
    }

    fn named(kind: &str) -> Option<ScalingChoice> {
        Some(ScalingChoice::Kind(kind.into()))
    }

    #[test]
    fn a_scaled_model_is_stretched_from_its_original_length() {
        let own = RopeScaling::Linear { factor: 8.0 };
        let further = stretched(&own).scaling(None, None, 2 * 8 * 4096).unwrap();
        assert_eq!(further, RopeScaling::Linear { factor: 16.0 });
    }

    #[test]
    fn every_kind_can_be_asked_for_by_name() {
        let longrope = RopeScaling::Longrope(Longrope {
            factor: 2.0,
            original: 4096,
            short_factor: vec![1.0; 4],
            long_factor: vec![1.0, 2.0, 2.0, 3.0],
            attention_factor: None,
        });
        for kind in RopeScaling::KINDS {
            let own = if kind == "longrope" { longrope.clone() } else { RopeScaling::None };
            let scaling = stretched(&own).scaling(named(kind).as_ref(), Some(8.0), 32768).unwrap();
            assert_eq!(scaling.kind(), kind);
            assert_eq!(scaling.factor(), if kind == "none" { 1.0 } else { 8.0 });
        }
    }

    #[test]
    fn a_models_own_bounds_are_kept_and_its_attention_factor_is_not() {
        let own =
            RopeScaling::Yarn(Yarn { beta_fast: 20.0, attention_factor: Some(1.5), ..Yarn::new(4.0, 4096) });
        let further = stretched(&own).scaling(None, None, 8 * 4096).unwrap();
        assert_eq!(further, RopeScaling::Yarn(Yarn { beta_fast: 20.0, ..Yarn::new(8.0, 4096) }));
    }

    #[test]
    fn llama3_multiplies_its_own_factor() {
        let own = RopeScaling::Llama3(Llama3::new(8.0, 8192));
        let model = Stretched { original: 8192, stated: 131_072, ..stretched(&own) };
        assert_eq!(model.scaling(None, None, 262_144).unwrap().factor(), 16.0);
    }

    #[test]
    fn parameters_go_with_a_factor() {
        let given = json!({"rope_type": "yarn", "beta_fast": 16.0});
        let Value::Object(given) = given else { unreachable!() };
        let choice = ScalingChoice::Parameters(given);
        let scaling = stretched(&RopeScaling::None).scaling(Some(&choice), None, 16384).unwrap();
        assert_eq!(scaling, RopeScaling::Yarn(Yarn { beta_fast: 16.0, ..Yarn::new(4.0, 4096) }));
    }

    #[test]
    fn unknown_kind_is_refused_naming_those_there_are() {
        let error = stretched(&RopeScaling::None).scaling(named("spiral").as_ref(), None, 8192).unwrap_err();
        assert!(error.contains("yarn, longrope, llama3, got \"spiral\""), "{error}");
    }

    #[test]
    fn factor_below_one_is_refused() {
        let error =
            stretched(&RopeScaling::None).scaling(named("yarn").as_ref(), Some(0.9), 8192).unwrap_err();
        assert!(error.contains("at least 1, got 0.9"), "{error}");
    }

    #[test]
    fn longrope_without_lists_is_refused() {
        let error =
            stretched(&RopeScaling::None).scaling(named("longrope").as_ref(), None, 8192).unwrap_err();
        assert!(error.contains("short_factor and long_factor"), "{error}");
    }
}
