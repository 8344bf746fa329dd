//! Which modules an adapter means: names and patterns, by PEFT's rules.
//!
//! Source: PEFT 0.21, `check_target_module_exists`, `get_pattern_key`, `_maybe_include_all_linear_layers`.
//! - A list entry means the module of that name and every module whose name ends with a point and the entry.
//! - Text that is no list is a regular expression for the whole name (look-around included), or `all-linear`: every linear
//!   layer but the output head. `all-attention` is ours, the attention's linear layers of any family; adapters are written
//!   with the names it stands for.
//! - Keys of rank and alpha patterns are regular expressions for the end of the name, from a point on; the first that fits
//!   counts.
//! - Block numbers leave out what lies in no block.
//!
//! Errors: `BaseError::Lora` for an expression that is none, an entry that means nothing.

use std::fmt;

use fancy_regex::Regex;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::config::{DecoderConfig, Linear};
use crate::error::{BaseError, Result};

/// Every linear layer of the blocks.
pub const ALL_LINEAR: &str = "all-linear";
/// Every linear layer of the blocks' attention.
pub const ALL_ATTENTION: &str = "all-attention";

/// Modules, by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a list of names, an expression, \"all-linear\" or \"all-attention\"")]
pub enum Names {
    /// Ends of names.
    List(Vec<String>),
    /// A regular expression, `all-linear` or `all-attention`.
    Pattern(String),
}

impl std::fmt::Display for Names {
    /// As a configuration has them.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::List(list) => write!(f, "{list:?}"),
            Self::Pattern(pattern) => write!(f, "the expression \"{pattern}\""),
        }
    }
}

impl Names {
    /// These ends of names.
    pub fn list<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        Self::List(names.into_iter().map(str::to_string).collect())
    }

    /// `all-linear` or `all-attention`, where it is one of them.
    fn keyword(&self) -> Option<&'static str> {
        match self {
            Self::Pattern(text) => {
                [ALL_LINEAR, ALL_ATTENTION].into_iter().find(|k| text.eq_ignore_ascii_case(k))
            }
            Self::List(_) => None,
        }
    }

    /// Is it a regular expression?
    pub fn is_expression(&self) -> bool {
        matches!(self, Self::Pattern(_)) && self.keyword().is_none()
    }

    /// The same without keywords: what PEFT reads for this model. Names are as short as they can be without meaning others.
    pub fn expanded(&self, model: &DecoderConfig) -> Self {
        let Some(keyword) = self.keyword() else { return self.clone() };
        let linears = model.linears();
        let (mut chosen, mut others) = (Vec::new(), Vec::new());
        for linear in &linears {
            if is_of(keyword, linear) { chosen.push(linear) } else { others.push(linear) }
        }
        let mut names: Vec<String> = Vec::new();
        for linear in chosen {
            let name = &linear.name;
            let ends = name.rmatch_indices('.').map(|(at, _)| &name[at + 1..]).chain([name.as_str()]);
            let alone = |end: &&str| !others.iter().any(|other| ends_with(&other.name, end));
            let shortest = ends.into_iter().find(alone).unwrap_or(name);
            if !names.iter().any(|known| known == shortest) {
                names.push(shortest.to_string());
            }
        }
        Self::List(names)
    }

    /// These and what `others` names.
    pub fn and(&self, others: &[&str]) -> Self {
        match self {
            Self::List(names) => {
                let more = others.iter().filter(|o| !names.iter().any(|n| n == *o)).map(|o| o.to_string());
                Self::List(names.iter().cloned().chain(more).collect())
            }
            Self::Pattern(pattern) => {
                let escaped: Vec<String> =
                    others.iter().map(|o| fancy_regex::escape(o).into_owned()).collect();
                Self::Pattern(format!(r"(?:{pattern})|(?:(?:.*\.)?(?:{}))", escaped.join("|")))
            }
        }
    }

    /// Prepared for matching.
    pub(super) fn matcher(&self, key: &str, model: &DecoderConfig) -> Result<Matcher> {
        Ok(match self.expanded(model) {
            Self::List(names) => Matcher::Ends(names),
            Self::Pattern(pattern) => {
                Matcher::Whole(expression(key, &pattern, &format!(r"\A(?:{pattern})\z"))?)
            }
        })
    }
}

fn is_of(keyword: &str, linear: &Linear) -> bool {
    let attention = |part: &str| part.contains("attn") || part.contains("attention");
    linear.layer.is_some() && (keyword == ALL_LINEAR || linear.name.split('.').any(attention))
}

fn ends_with(name: &str, end: &str) -> bool {
    name == end || name.strip_suffix(end).is_some_and(|rest| rest.ends_with('.'))
}

fn expression(key: &str, pattern: &str, whole: &str) -> Result<Regex> {
    Regex::new(whole).map_err(|e| BaseError::Lora {
        message: format!("{key}: expected a regular expression, got \"{pattern}\": {e}"),
    })
}

/// [`Names`] prepared for matching.
pub(super) enum Matcher {
    Ends(Vec<String>),
    Whole(Regex),
}

impl Matcher {
    /// Does it mean this module? An expression that is too hard to decide means nothing.
    pub fn means(&self, name: &str) -> bool {
        match self {
            Self::Ends(ends) => ends.iter().any(|end| ends_with(name, end)),
            Self::Whole(regex) => regex.is_match(name).unwrap_or(false),
        }
    }

    /// The entries of a list that mean none of `names`.
    pub fn idle<'a>(&'a self, names: &[&str]) -> Vec<&'a str> {
        match self {
            Self::Whole(_) => Vec::new(),
            Self::Ends(ends) => {
                let idle = |end: &&String| !names.iter().any(|name| ends_with(name, end));
                ends.iter().filter(idle).map(String::as_str).collect()
            }
        }
    }
}

/// Values by pattern, in order: rank or alpha of modules that differ from the rest.
#[derive(Clone, Debug, PartialEq)]
pub struct Patterns<T>(pub Vec<(String, T)>);

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy> Patterns<T> {
    /// None at all?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The same patterns with other values.
    #[must_use]
    pub fn map(&self, f: impl Fn(T) -> T) -> Self {
        Self(self.0.iter().map(|(key, value)| (key.clone(), f(*value))).collect())
    }

    /// Those that mean one of these modules.
    pub(super) fn meaning(&self, names: &[&str]) -> Result<Self> {
        let matchers = self.matchers("pattern")?;
        let means = |regex: &Regex| names.iter().any(|name| regex.is_match(name).unwrap_or(false));
        let kept = matchers.iter().filter(|(_, regex, _)| means(regex));
        Ok(Self(kept.map(|(pattern, _, value)| (pattern.to_string(), *value)).collect()))
    }

    /// Prepared for matching.
    pub(super) fn matchers(&self, key: &str) -> Result<Vec<(&str, Regex, T)>> {
        let prepared = self.0.iter().map(|(pattern, value)| {
            let whole = format!(r"\A(?:.*\.)?(?:{pattern})\z");
            Ok((pattern.as_str(), expression(key, pattern, &whole)?, *value))
        });
        prepared.collect()
    }
}

impl<T: Serialize> Serialize for Patterns<T> {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        struct InOrder<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for InOrder<T> {
            type Value = Patterns<T>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a table of patterns and numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Patterns(entries))
            }
        }
        from.deserialize_map(InOrder(std::marker::PhantomData))
    }
}

/// Some of a model's blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layers {
    /// These, by number from 0.
    These(Vec<usize>),
    /// So many from the first on.
    First(usize),
    /// So many up to the last.
    Last(usize),
}

impl From<Vec<usize>> for Layers {
    fn from(layers: Vec<usize>) -> Self {
        Self::These(layers)
    }
}

impl Layers {
    /// Their numbers in a model of `count` blocks.
    ///
    /// # Errors
    /// When there is none, or one is not in the model.
    pub fn numbers(&self, count: usize) -> Result<Vec<usize>> {
        let fail = |message: String| Err(BaseError::Lora { message: format!("layers: {message}") });
        match self {
            Self::These(layers) => match layers.iter().find(|layer| **layer >= count) {
                _ if layers.is_empty() => {
                    fail("expected at least one block number or null for all, got []".into())
                }
                Some(bad) => fail(format!("expected block numbers 0 to {}, got {bad}", count - 1)),
                None => Ok(layers.clone()),
            },
            Self::First(n) | Self::Last(n) if !(1..=count).contains(n) => {
                fail(format!("expected 1 to {count} blocks, got \"{self}\""))
            }
            Self::First(n) => Ok((0..*n).collect()),
            Self::Last(n) => Ok((count - n..count).collect()),
        }
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::These(layers) => write!(f, "{layers:?}"),
            Self::First(n) => write!(f, "first:{n}"),
            Self::Last(n) => write!(f, "last:{n}"),
        }
    }
}

impl Serialize for Layers {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::These(layers) => layers.serialize(to),
            named => to.collect_str(named),
        }
    }
}

impl<'de> Deserialize<'de> for Layers {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected block numbers, \"first:COUNT\" or \"last:COUNT\"")]
        enum Written {
            List(Vec<usize>),
            One(usize),
            Text(String),
        }
        match Written::deserialize(from)? {
            Written::List(layers) => Ok(Self::These(layers)),
            Written::One(layer) => Ok(Self::These(vec![layer])),
            Written::Text(text) => {
                let parsed =
                    text.split_once(':').and_then(|(which, count)| match (which, count.parse().ok()?) {
                        ("first", count) => Some(Self::First(count)),
                        ("last", count) => Some(Self::Last(count)),
                        _ => None,
                    });
                parsed.ok_or_else(|| {
                    D::Error::custom(format!(
                        "layers: expected block numbers, \"first:COUNT\" or \"last:COUNT\", got \"{text}\""
                    ))
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_of_names_begin_at_a_point() {
        assert!(ends_with("model.layers.0.self_attn.q_proj", "q_proj"));
        assert!(ends_with("model.layers.0.self_attn.q_proj", "self_attn.q_proj"));
        assert!(ends_with("lm_head", "lm_head"));
        assert!(!ends_with("model.layers.0.self_attn.qq_proj", "q_proj"));
        assert!(!ends_with("layers.0.mlp.dense_h_to_4h", "4h"));
    }

    #[test]
    fn layers_read_every_form() {
        let read = |text: &str| serde_json::from_str::<Layers>(text).map_err(|e| e.to_string());
        assert_eq!(read("[0, 2]"), Ok(Layers::These(vec![0, 2])));
        assert_eq!(read("3"), Ok(Layers::These(vec![3])));
        assert_eq!(read("\"first:2\"").unwrap().numbers(5).unwrap(), [0, 1]);
        assert_eq!(read("\"last:2\"").unwrap().numbers(5).unwrap(), [3, 4]);
        assert_eq!(serde_json::to_string(&Layers::Last(2)).unwrap(), "\"last:2\"");
        for bad in ["\"2\"", "\"middle:2\"", "\"last:x\""] {
            assert!(read(bad).unwrap_err().contains("first:COUNT"), "{bad}");
        }
        assert!(
            Layers::Last(6)
                .numbers(5)
                .unwrap_err()
                .to_string()
                .contains("expected 1 to 5 blocks, got \"last:6\"")
        );
        assert!(Layers::First(0).numbers(5).is_err() && Layers::These(vec![]).numbers(5).is_err());
    }

    #[test]
    fn patterns_keep_their_order() {
        let patterns: Patterns<usize> = serde_json::from_str(r#"{"z": 1, "a": 2}"#).unwrap();
        assert_eq!(patterns.0, [("z".to_string(), 1), ("a".to_string(), 2)]);
        assert_eq!(serde_json::to_string(&patterns).unwrap(), r#"{"z":1,"a":2}"#);
    }
}
