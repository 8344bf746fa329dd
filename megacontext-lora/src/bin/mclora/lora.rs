//! The flags that say what LoRA is, shared by `extend` and `sweep`.
//!
//! Which modules an entry means, and what a pattern may be, is the plugin's to say (`lora` of its settings, by PEFT's rules).
//! Here is only what a command line cannot carry as it stands: text that is a list or a regular expression, `PATTERN=VALUE`,
//! blocks by number or by count. Errors: usage, with the flag, what was expected and what came.

use std::fmt::Display;
use std::str::FromStr;

use clap::Args;
use serde_json::{Map, Value, json};

use crate::failure::{Failure, Result};
use crate::params::Params;

const HEADING: &str = "What learns";

/// What LoRA is, and on which layers.
#[derive(Debug, Clone, Default, Args)]
pub struct LoraFlags {
    /// LoRA rank [default: 8]
    #[arg(long, value_name = "R", help_heading = HEADING)]
    pub rank: Option<u64>,
    /// LoRA strength: updates are scaled by alpha / rank [default: 16]
    #[arg(long, value_name = "A", help_heading = HEADING)]
    pub alpha: Option<f64>,
    /// Rank of the layers that a regular expression means by the end of their names, such as 'mlp\..*=4'; may be given more
    /// than once, the first that fits counts
    #[arg(long, value_name = "REGEX=R", help_heading = HEADING)]
    pub rank_pattern: Vec<String>,
    /// Strength of the layers that a regular expression means, as --rank-pattern
    #[arg(long, value_name = "REGEX=A", help_heading = HEADING)]
    pub alpha_pattern: Vec<String>,
    /// LoRA dropout [default: 0]
    #[arg(long, value_name = "P", help_heading = HEADING)]
    pub dropout: Option<f64>,
    /// Layers that carry LoRA: ends of their names separated by commas, all-linear, all-attention, or a regular expression for
    /// whole names (as PEFT: anything with one of ^ $ * + ? ( ) [ ] { } | \ in it) [default: all-attention]
    #[arg(long, value_name = "NAMES", help_heading = HEADING)]
    pub target_modules: Option<String>,
    /// Layers that do not, although --target-modules means them; written as there
    #[arg(long, value_name = "NAMES", help_heading = HEADING)]
    pub exclude_modules: Option<String>,
    /// Blocks that carry LoRA: numbers from 0 separated by commas, first:COUNT or last:COUNT (first:2 and last:2 are
    /// MegaContext's choices for joint training) [default: all]
    #[arg(long, value_name = "BLOCKS", help_heading = HEADING)]
    pub layers: Option<String>,
    /// rsLoRA: updates are scaled by alpha / sqrt(rank)
    #[arg(long, help_heading = HEADING)]
    pub rslora: bool,
    /// DoRA: the lengths of a weight's rows learn by themselves
    #[arg(long, help_heading = HEADING)]
    pub dora: bool,
    /// First values of LoRA: default, gaussian or pissa [default: default]
    #[arg(long, value_name = "NAME", help_heading = HEADING)]
    pub init: Option<String>,
}

impl LoraFlags {
    /// Sets the keys of the flags that were given.
    pub fn set(&self, params: &mut Params) -> Result<()> {
        params.set_some("lora.r", self.rank);
        params.set_some("lora.alpha", self.alpha);
        params
            .set_some("lora.rank_pattern", patterns::<u64>("--rank-pattern", "a rank", &self.rank_pattern)?);
        params.set_some(
            "lora.alpha_pattern",
            patterns::<f64>("--alpha-pattern", "a number", &self.alpha_pattern)?,
        );
        params.set_some("lora.dropout", self.dropout);
        let named = |flag, text: &Option<String>| text.as_deref().map(|text| names(flag, text)).transpose();
        params.set_some("lora.target_modules", named("--target-modules", &self.target_modules)?);
        params.set_some("lora.exclude_modules", named("--exclude-modules", &self.exclude_modules)?);
        params.set_some("lora.layers", self.layers.as_deref().map(layers).transpose()?);
        params.set_some("lora.use_rslora", self.rslora.then_some(true));
        params.set_some("lora.use_dora", self.dora.then_some(true));
        params.set_some("lora.init", self.init.as_deref());
        Ok(())
    }
}

/// Names of modules: a list, or text that stands for many.
fn names(flag: &str, text: &str) -> Result<Value> {
    let text = text.trim();
    let expression = text.contains(['^', '$', '*', '+', '?', '(', ')', '[', ']', '{', '}', '|', '\\']);
    let word = text.starts_with("all-") && !text.contains(',');
    if expression || word {
        return Ok(json!(text));
    }
    let list: Vec<&str> = text.split(',').map(str::trim).collect();
    if list.contains(&"") {
        return Err(Failure::usage(format!(
            "{flag}: expected names separated by commas, or a regular expression, got \"{text}\""
        )));
    }
    Ok(json!(list))
}

/// `PATTERN=VALUE`, each, in order; none where none is given. A pattern may itself hold an equals sign.
fn patterns<T: FromStr + Into<Value>>(flag: &str, what: &str, given: &[String]) -> Result<Option<Value>> {
    let mut table = Map::new();
    for text in given {
        let parsed = text.rsplit_once('=').and_then(|(pattern, value)| {
            Some((pattern, value.trim().parse::<T>().ok()?)).filter(|_| !pattern.is_empty())
        });
        let Some((pattern, value)) = parsed else {
            return Err(Failure::usage(format!(
                "{flag}: expected REGEX={what}, such as 'down_proj=4', got \"{text}\""
            )));
        };
        if table.insert(pattern.to_owned(), value.into()).is_some() {
            return Err(Failure::usage(format!(
                "{flag}: expected each pattern once, got \"{pattern}\" twice"
            )));
        }
    }
    Ok((!table.is_empty()).then_some(Value::Object(table)))
}

/// Blocks: `0,3`, `first:2`, `last:2`.
fn layers(text: &str) -> Result<Value> {
    let bad = |got: &dyn Display| {
        Failure::usage(format!(
            "--layers: expected block numbers separated by commas, first:COUNT or last:COUNT, got \"{got}\""
        ))
    };
    if let Some((which, count)) = text.split_once(':') {
        let count: u64 = count.parse().map_err(|_| bad(&text))?;
        return match which {
            "first" | "last" => Ok(json!(format!("{which}:{count}"))),
            _ => Err(bad(&text)),
        };
    }
    let numbers = text.split(',').map(|number| number.trim().parse::<u64>().map_err(|_| bad(&text)));
    Ok(json!(numbers.collect::<Result<Vec<u64>>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lora(flags: LoraFlags) -> Value {
        let mut params = Params::default();
        flags.set(&mut params).unwrap();
        params.into_value()["lora"].clone()
    }

    fn refused(flags: LoraFlags, facts: &[&str]) {
        let error = flags.set(&mut Params::default()).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        for fact in facts.iter().chain(&["expected", "got"]) {
            assert!(error.to_string().contains(fact), "{fact}: {error}");
        }
    }

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn targets_are_a_list_a_word_or_an_expression() {
        let of = |text| lora(LoraFlags { target_modules: some(text), ..LoraFlags::default() });
        assert_eq!(of("q_proj,mlp.up_proj"), json!({ "target_modules": ["q_proj", "mlp.up_proj"] }));
        assert_eq!(of("all-linear"), json!({ "target_modules": "all-linear" }));
        // The comma belongs to the expression.
        let expression = r"model\.layers\.\d{1,2}\.self_attn\.(q|v)_proj";
        assert_eq!(of(expression), json!({ "target_modules": expression }));
        let excluded = LoraFlags { exclude_modules: some("k_proj, o_proj"), ..LoraFlags::default() };
        assert_eq!(lora(excluded), json!({ "exclude_modules": ["k_proj", "o_proj"] }));
    }

    #[test]
    fn patterns_keep_their_order_and_may_hold_an_equals_sign() {
        let flags = LoraFlags {
            rank_pattern: vec!["up_proj=2".into(), ".*_proj=3".into(), "a=b=4".into()],
            alpha_pattern: vec!["q_proj=1.5".into()],
            ..LoraFlags::default()
        };
        let text = lora(flags).to_string();
        let expected = r#"{"rank_pattern":{"up_proj":2,".*_proj":3,"a=b":4},"alpha_pattern":{"q_proj":1.5}}"#;
        assert_eq!(text, expected);
    }

    #[test]
    fn layers_are_numbers_or_a_count_from_an_end() {
        let of = |text| lora(LoraFlags { layers: some(text), ..LoraFlags::default() });
        assert_eq!(of("0,3"), json!({ "layers": [0, 3] }));
        assert_eq!(of("first:2"), json!({ "layers": "first:2" }));
        assert_eq!(of("last:2"), json!({ "layers": "last:2" }));
    }

    #[test]
    fn a_pattern_without_a_value_is_refused() {
        for bad in ["q_proj", "q_proj=", "=4", "q_proj=four", "q_proj=1.5", "q_proj=-1"] {
            let flags = LoraFlags { rank_pattern: vec![bad.into()], ..LoraFlags::default() };
            refused(flags, &["--rank-pattern", bad]);
        }
        let flags = LoraFlags { alpha_pattern: vec!["q_proj=x".into()], ..LoraFlags::default() };
        refused(flags, &["--alpha-pattern", "q_proj=x"]);
    }

    #[test]
    fn a_pattern_given_twice_is_refused() {
        let flags = LoraFlags { rank_pattern: vec!["q=1".into(), "q=2".into()], ..LoraFlags::default() };
        refused(flags, &["--rank-pattern", "\"q\" twice"]);
    }

    #[test]
    fn an_empty_name_is_refused() {
        for bad in ["", "q_proj,", ",q_proj"] {
            let flags = LoraFlags { target_modules: some(bad), ..LoraFlags::default() };
            refused(flags, &["--target-modules", bad]);
        }
    }

    #[test]
    fn blocks_that_are_neither_numbers_nor_a_count_are_refused() {
        for bad in ["", "1,", "-1", "middle:2", "last:x", "first:"] {
            let flags = LoraFlags { layers: some(bad), ..LoraFlags::default() };
            refused(flags, &["--layers", bad]);
        }
    }
}
