//! What a LensNet is: its settings and which of them there are.
//!
//! Source: MegaContext's LensNet (its Python code) for the network; its documents insist that scoring is not causal, the
//! code is. Its older documents have another form ([`Kind::Dual`]). Ours sees both ways by default and equals the code on demand ([`LensNetConfig::original`]). The features of
//! an entry differ likewise, see [`Features`].
//!
//! Errors: `BaseError::Network` in the words of the keys.

use megacontext_base::buffers::gpu::GpuBytes;
use megacontext_base::device::Device;
use megacontext_base::error::{BaseError, Result};
use megacontext_base::tower::{Affine, TowerConfig};
use megacontext_kernels::attention::Pattern;
use serde::{Deserialize, Serialize};

use crate::dual;

/// The network's name in errors and files.
pub(crate) const NETWORK: &str = "lensnet";
/// Levels that have an embedding.
pub const LEVELS: usize = 4;
pub(crate) const LEVEL_EMBED: &str = "level_embed.weight";

/// How entries are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Entries attend to each other ([`crate::LensNet`]).
    #[default]
    Transformer,
    /// Entries and tail gists attend to each other in turn ([`crate::dual`]).
    Dual,
}

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
    /// How entries are read.
    #[serde(default)]
    pub kind: Kind,
    /// E: the base model's width.
    pub width: usize,
    /// Heads of attention, the base model's mostly; of the dual form 8.
    pub heads: usize,
    /// K: tokens that an entry of level 1 stands for.
    #[serde(default = "default_block")]
    pub block: usize,
    /// L: the dual form's own width; the transformer has none.
    #[serde(default = "default_lens_width")]
    pub lens_width: usize,
    /// Blocks of the transformer: 2, 4, 8; stacks of the dual form: 1 to 3.
    #[serde(default = "default_layers")]
    pub layers: usize,
    /// Head.
    #[serde(default)]
    pub head: Head,
    /// Do entries attend to earlier ones alone?
    #[serde(default)]
    pub causal: bool,
    /// Shifted sparse attention in groups of so many entries, causal or not as the network is; none means dense. So is a
    /// batch whose rows are no wider than the group.
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

fn default_lens_width() -> usize {
    512
}

/// Stacks that the dual form may have.
const MOST_STACKS: usize = 3;

impl LensNetConfig {
    /// The default network for a base model of this width and so many heads.
    pub fn new(width: usize, heads: usize) -> Self {
        Self {
            kind: Kind::default(),
            width,
            heads,
            lens_width: default_lens_width(),
            block: default_block(),
            layers: default_layers(),
            head: Head::default(),
            causal: false,
            group: None,
            features: Features::default(),
        }
    }

    /// The default dual form for a base model of this width: one stack, 512 wide, eight heads, a linear head.
    pub fn dual(width: usize) -> Self {
        Self { kind: Kind::Dual, layers: 1, head: Head::Linear, ..Self::new(width, 8) }
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
        // A stored history has 16 bits for it.
        if self.block > usize::from(u16::MAX) {
            return refuse(format!("block: expected at most {} entries, got {}", u16::MAX, self.block));
        }
        if let Some(group) = self.group.filter(|group| *group < 2) {
            return refuse(format!("group: expected at least 2 entries, got {group}"));
        }
        match self.kind {
            Kind::Transformer => self.tower().check().or_else(refuse),
            Kind::Dual => self.check_dual().or_else(refuse),
        }
    }

    fn check_dual(&self) -> std::result::Result<(), String> {
        let Self { lens_width, heads, layers, .. } = *self;
        if self.width == 0 {
            return Err("width: expected at least 1, got 0".to_string());
        }
        if !(1..=MOST_STACKS).contains(&layers) {
            return Err(format!("layers: expected 1 to {MOST_STACKS} stacks of the dual form, got {layers}"));
        }
        if heads == 0 || lens_width == 0 || !lens_width.is_multiple_of(heads) {
            return Err(format!("heads: expected a divisor of the lens width {lens_width}, got {heads}"));
        }
        let never = |key: &str, expected: &str, got: String| {
            Err(format!("{key}: expected {expected} with the dual form, got {got}"))
        };
        if self.causal {
            return never("causal", "false", "true".to_string());
        }
        if let Some(group) = self.group {
            return never("group", "none", group.to_string());
        }
        if self.head != Head::Linear {
            return never("head", "linear", "mlp".to_string());
        }
        if self.features != Features::Scaled {
            return never("features", "scaled", "original".to_string());
        }
        Ok(())
    }

    /// The transformer's sizes.
    pub(crate) fn tower(&self) -> TowerConfig {
        TowerConfig { layers: self.layers, width: self.width, heads: self.heads, kv_heads: self.heads }
    }

    /// Do the transformer's blocks go to this device, rather than run on the processor?
    pub fn goes_to(&self, device: &Device) -> bool {
        self.kind != Kind::Dual && self.tower().goes_to(device)
    }

    /// What the network takes of a GPU beside a model, over `entries` entries that it sees together ([`TowerConfig::gpu_bytes`]).
    pub fn gpu_bytes(&self, device: &Device, entries: usize, learns: bool) -> GpuBytes {
        match self.kind {
            Kind::Transformer => self.tower().gpu_bytes(device, entries, learns),
            Kind::Dual => GpuBytes::default(),
        }
    }

    /// Width of a head.
    pub(crate) fn head_width(&self) -> usize {
        match self.kind {
            Kind::Transformer => self.tower().head_width(),
            Kind::Dual => self.lens_width / self.heads.max(1),
        }
    }

    /// Which keys an entry sees.
    pub fn pattern(&self) -> Pattern {
        match (self.group, self.causal) {
            (Some(group), true) => Pattern::ShiftedSparse { group },
            (Some(group), false) => Pattern::ShiftedBidirectional { group },
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
            Head::Linear if self.kind == Kind::Dual => {
                vec![Affine { name: "scorer", out: 1, inp: self.lens_width }]
            }
            Head::Linear => vec![Affine { name: "scorer", out: 1, inp: 2 * e }],
            Head::Mlp => vec![
                Affine { name: "scorer.0", out: middle, inp: 2 * e },
                Affine { name: "scorer.2", out: 1, inp: middle },
            ],
        }
    }

    /// Names and shapes of the parameters, as the original names them; of the dual form as [`crate::dual`] does.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = match self.kind {
            Kind::Dual => dual::tensors(self),
            Kind::Transformer => {
                let mut tensors = self.tower().tensors();
                tensors.push((LEVEL_EMBED.to_string(), vec![LEVELS, self.width]));
                let layers = self.feature_layers().into_iter().flatten();
                tensors.extend(layers.flat_map(|layer| layer.tensors()));
                tensors
            }
        };
        tensors.extend(self.scorer().into_iter().flat_map(|layer| layer.tensors()));
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
    fn the_dual_form_has_as_many_parameters_as_its_formulas() {
        // Two layers in with biases, six products, the head.
        let expected = 512 * (768 + 3 + 1) + 512 * (768 + 1) + 6 * 512 * 512 + 512 + 1;
        assert_eq!(LensNetConfig::dual(768).parameters(), expected);
    }

    #[test]
    fn settings_without_a_kind_are_a_transformers() {
        let config = serde_json::from_str::<LensNetConfig>(r#"{"width": 16, "heads": 2}"#).unwrap();
        assert_eq!(config, small());
    }

    #[test]
    fn an_unknown_kind_is_refused() {
        let error = serde_json::from_str::<LensNetConfig>(r#"{"kind": "both", "width": 16, "heads": 2}"#);
        assert!(error.unwrap_err().to_string().contains("unknown variant `both`"));
    }

    #[test]
    fn what_the_dual_form_has_not_is_refused() {
        let dual = LensNetConfig { lens_width: 16, ..LensNetConfig::dual(16) };
        let changed = |what: fn(&mut LensNetConfig), message: &str| {
            let mut config = dual.clone();
            what(&mut config);
            refused(config, message);
        };
        dual.check().unwrap();
        changed(|c| c.layers = 0, "layers: expected 1 to 3 stacks of the dual form, got 0");
        changed(|c| c.layers = 4, "layers: expected 1 to 3 stacks of the dual form, got 4");
        changed(|c| c.heads = 3, "heads: expected a divisor of the lens width 16, got 3");
        changed(|c| c.causal = true, "causal: expected false with the dual form, got true");
        changed(|c| c.group = Some(8), "group: expected none with the dual form, got 8");
        changed(|c| c.head = Head::Mlp, "head: expected linear with the dual form, got mlp");
        changed(
            |c| c.features = Features::Original,
            "features: expected scaled with the dual form, got original",
        );
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
        for causal in [true, false] {
            refused(LensNetConfig { group: Some(1), causal, ..small() }, "group: expected at least 2");
        }
    }
}
