//! What a LensNet is: its settings and which of them there are.
//!
//! Source: MegaContext's LensNet (its Python code) for the network; its documents insist that scoring is not causal, the
//! code is. Ours sees both ways by default and equals the code on demand ([`LensNetConfig::original`]). The features of
//! an entry differ likewise, see [`Features`].
//!
//! Errors: `BaseError::Network` in the words of the keys.

use megacontext_base::error::{BaseError, Result};
use megacontext_base::tower::{Affine, TowerConfig};
use megacontext_kernels::attention::Pattern;
use serde::{Deserialize, Serialize};

/// The network's name in errors and files.
pub(crate) const NETWORK: &str = "lensnet";
/// Levels that have an embedding.
pub const LEVELS: usize = 4;
pub(crate) const LEVEL_EMBED: &str = "level_embed.weight";

/// What makes a score of an entry's vector and its features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Head {
    /// One linear layer.
    Linear,
    /// Two, max(E, 128) wide between.
    #[default]
    Mlp,
}

/// How span and distance of an entry enter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Features {
    /// log2(span)/10, and the distance to the cursor (the end of the context) in lengths of the context: a row's features
    /// are its own, and 1024 tokens are 1.
    #[default]
    Scaled,
    /// As in the original: the span in tokens, and the position in units of the largest in the whole batch.
    Original,
}

/// Settings of a LensNet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LensNetConfig {
    /// E: the base model's width.
    pub width: usize,
    /// Heads of attention, the base model's mostly.
    pub heads: usize,
    /// K: tokens that an entry of level 1 stands for.
    #[serde(default = "default_block")]
    pub block: usize,
    /// Blocks of the transformer: 2, 4, 8.
    #[serde(default = "default_layers")]
    pub layers: usize,
    /// Head.
    #[serde(default)]
    pub head: Head,
    /// Do entries attend to earlier ones alone?
    #[serde(default)]
    pub causal: bool,
    /// Shifted sparse attention in groups of so many entries, which is causal; none means dense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<usize>,
    /// Features.
    #[serde(default)]
    pub features: Features,
}

fn default_block() -> usize {
    32
}

fn default_layers() -> usize {
    2
}

impl LensNetConfig {
    /// The default network for a base model of this width and so many heads.
    pub fn new(width: usize, heads: usize) -> Self {
        Self {
            width,
            heads,
            block: default_block(),
            layers: default_layers(),
            head: Head::default(),
            causal: false,
            group: None,
            features: Features::default(),
        }
    }

    /// The same network computed as the original code does: causal, with its features.
    pub fn original(self) -> Self {
        Self { causal: true, features: Features::Original, ..self }
    }

    /// Refuses settings that no network has.
    ///
    /// # Errors
    /// Names the key, what was expected and what came.
    pub fn check(&self) -> Result<()> {
        let refuse = |message: String| Err(BaseError::network(NETWORK, message));
        if self.block < 2 {
            return refuse(format!("block: expected at least 2 entries, got {}", self.block));
        }
        match self.group {
            Some(group) if group < 2 => {
                return refuse(format!("group: expected at least 2 entries, got {group}"));
            }
            Some(_) if !self.causal => {
                return refuse(
                    "group: expected causal, since shifted sparse attention is, got causal = false".into(),
                );
            }
            _ => {}
        }
        self.tower().check().or_else(refuse)
    }

    /// The transformer's sizes.
    pub(crate) fn tower(&self) -> TowerConfig {
        TowerConfig { layers: self.layers, width: self.width, heads: self.heads, kv_heads: self.heads }
    }

    /// Which keys an entry sees.
    pub(crate) fn pattern(&self) -> Pattern {
        match (self.group, self.causal) {
            (Some(group), _) => Pattern::ShiftedSparse { group },
            (None, true) => Pattern::Dense,
            (None, false) => Pattern::Bidirectional,
        }
    }

    /// Both layers of the MLP that reads the span, then of the one that reads the distance.
    pub(crate) fn feature_layers(&self) -> [[Affine; 2]; 2] {
        let e = self.width;
        let layers =
            |first, second| [Affine { name: first, out: e, inp: 1 }, Affine { name: second, out: e, inp: e }];
        [layers("span_mlp.0", "span_mlp.2"), layers("dist_mlp.0", "dist_mlp.2")]
    }

    /// The layers of the head.
    pub(crate) fn scorer(&self) -> Vec<Affine> {
        let (e, middle) = (self.width, self.width.max(128));
        match self.head {
            Head::Linear => vec![Affine { name: "scorer", out: 1, inp: 2 * e }],
            Head::Mlp => vec![
                Affine { name: "scorer.0", out: middle, inp: 2 * e },
                Affine { name: "scorer.2", out: 1, inp: middle },
            ],
        }
    }

    /// Names and shapes of the parameters, as the original names them.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = self.tower().tensors();
        tensors.push((LEVEL_EMBED.to_string(), vec![LEVELS, self.width]));
        let layers = self.feature_layers().into_iter().flatten().chain(self.scorer());
        tensors.extend(layers.flat_map(|layer| layer.tensors()));
        tensors
    }

    /// Number of values that learn.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(config: LensNetConfig, what: &str) {
        let error = config.check().unwrap_err().to_string();
        assert!(error.starts_with("lensnet: ") && error.contains(what), "expected {what:?} in {error:?}");
    }

    fn small() -> LensNetConfig {
        LensNetConfig::new(16, 2)
    }

    #[test]
    fn the_run_of_twelve_layers_has_as_many_parameters_as_the_original() {
        assert_eq!(LensNetConfig::new(768, 6).parameters(), 16_524_289);
    }

    #[test]
    fn an_unknown_key_is_refused() {
        let error = serde_json::from_str::<LensNetConfig>(r#"{"width": 16, "heads": 2, "layer": 4}"#);
        assert!(error.unwrap_err().to_string().contains("unknown field `layer`"));
    }

    #[test]
    fn a_block_of_one_is_refused() {
        refused(LensNetConfig { block: 1, ..small() }, "block: expected at least 2 entries, got 1");
    }

    #[test]
    fn heads_that_do_not_divide_the_width_are_refused() {
        refused(LensNetConfig { heads: 3, ..small() }, "heads: expected a divisor of the width 16, got 3");
    }

    #[test]
    fn a_group_of_one_is_refused() {
        refused(LensNetConfig { group: Some(1), causal: true, ..small() }, "group: expected at least 2");
    }

    #[test]
    fn shifted_sparse_attention_that_sees_both_ways_is_refused() {
        refused(LensNetConfig { group: Some(8), ..small() }, "group: expected causal");
    }
}
