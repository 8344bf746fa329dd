//! What a GistNet is: its settings and which of them there are.
//!
//! Source: MegaContext's GistNet (its Python code) for every variant, and for the defaults (two blocks, mean pooling, MLP
//! head). Where that code cannot mean what it does, ours differs by default and equals it on demand
//! ([`GistNetConfig::original`]): attention within a block sees both ways here (causal attention makes the gist of a token
//! prepended to a block a constant), and rows of padding take no part (there they are zeros that heads pool with the rest).
//!
//! Errors: `BaseError::Network` in the words of the keys.

use megacontext_base::buffers::gpu::GpuBytes;
use megacontext_base::device::Device;
use megacontext_base::error::{BaseError, Result};
use megacontext_base::tower::TowerConfig;
use serde::{Deserialize, Serialize};

/// Entries of the blocks whose gists are made at a time, about.
const CHUNK_ENTRIES: usize = 1024;
/// Products of at most so many results are summed in another order by the matrix library.
const SMALL_PRODUCT: usize = 256;

/// The network's name in errors and files.
pub(crate) const NETWORK: &str = "gistnet";
/// What a stored history has 16 bits for.
const MOST_ENTRIES: usize = u16::MAX as usize;
/// Beyond this a number is damage rather than a width.
const WIDEST: usize = 1 << 24;

/// What stands between the entries of a block and its head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Nothing: the head reads the mean of the entries.
    Mean,
    /// Blocks of attention and MLP.
    #[default]
    Transformer,
}

/// How the entries of a block become one vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// Their mean.
    #[default]
    Mean,
    /// Their mean weighted by softmax(x·query), with a query that learns.
    Query,
    /// A token of the network's own is put before them; its place is read.
    Cls,
}

/// What is done to the pooled vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Head {
    /// W·z + b.
    Linear,
    /// W2·relu(W1·z + b1) + b2, 2E wide between.
    #[default]
    Mlp,
}

/// What becomes of rows that a mask calls padding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Padding {
    /// They take no part: the gist is that of the valid rows at their places.
    #[default]
    Excluded,
    /// As in the original: they are set to zero, keys among them get −10⁴ added to their scores, and heads pool them.
    Zeroed,
}

/// Settings of a GistNet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GistNetConfig {
    /// E: the base model's width.
    pub width: usize,
    /// Heads of attention, the base model's mostly.
    pub heads: usize,
    /// K: entries of a block, at least 2.
    #[serde(default = "default_block")]
    pub block: usize,
    /// What stands before the head.
    #[serde(default)]
    pub mode: Mode,
    /// Blocks of the transformer.
    #[serde(default = "default_layers")]
    pub layers: usize,
    /// Pooling; of the transformer only.
    #[serde(default)]
    pub pooling: Pooling,
    /// Head.
    #[serde(default)]
    pub head: Head,
    /// Do entries attend to earlier ones alone?
    #[serde(default)]
    pub causal: bool,
    /// Rows of padding.
    #[serde(default)]
    pub padding: Padding,
}

fn default_block() -> usize {
    32
}

fn default_layers() -> usize {
    2
}

impl GistNetConfig {
    /// The default network for a base model of this width and so many heads.
    pub fn new(width: usize, heads: usize) -> Self {
        Self {
            width,
            heads,
            block: default_block(),
            mode: Mode::default(),
            layers: default_layers(),
            pooling: Pooling::default(),
            head: Head::default(),
            causal: false,
            padding: Padding::default(),
        }
    }

    /// The same network computed as the original code does: causal, padding zeroed.
    pub fn original(self) -> Self {
        Self { causal: true, padding: Padding::Zeroed, ..self }
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
        if self.block > MOST_ENTRIES {
            return refuse(format!("block: expected at most {MOST_ENTRIES} entries, got {}", self.block));
        }
        if !(1..=WIDEST).contains(&self.width) {
            return refuse(format!("width: expected 1 to {WIDEST}, got {}", self.width));
        }
        match self.mode {
            Mode::Mean if self.pooling != Pooling::Mean => {
                refuse(format!("pooling: expected mean, since the mode is mean, got {}", self.pooling.name()))
            }
            Mode::Mean => Ok(()),
            Mode::Transformer => self.tower().check().or_else(refuse),
        }
    }

    /// The transformer's sizes.
    pub(crate) fn tower(&self) -> TowerConfig {
        TowerConfig { layers: self.layers, width: self.width, heads: self.heads, kv_heads: self.heads }
    }

    /// Blocks that [`crate::GistNet::gists`] passes at a time, at least and at most. A product of few results is summed in another
    /// order, and so is one of a single row: fewer blocks than the first never come alone.
    pub(crate) fn blocks_at_once(&self) -> [usize; 2] {
        let least = (SMALL_PRODUCT / self.width + 1).max(2);
        [least, (CHUNK_ENTRIES / self.block).max(least)]
    }

    /// Entries that the network sees at a time at most where gists are made for nobody to learn from.
    pub fn entries_at_once(&self) -> usize {
        self.blocks_at_once()[1] * self.entries()
    }

    /// Do the transformer's blocks go to this device, rather than run on the processor?
    pub fn goes_to(&self, device: &Device) -> bool {
        self.mode != Mode::Mean && self.tower().goes_to(device)
    }

    /// What the network takes of a GPU beside a model, over `entries` entries that it sees together ([`TowerConfig::gpu_bytes`]).
    pub fn gpu_bytes(&self, device: &Device, entries: usize, learns: bool) -> GpuBytes {
        match self.mode {
            Mode::Transformer => self.tower().gpu_bytes(device, entries, learns),
            Mode::Mean => GpuBytes::default(),
        }
    }

    /// Entries that a block of K comes to within the network.
    pub(crate) fn entries(&self) -> usize {
        self.block + usize::from(self.prepends())
    }

    /// Is a token put before the entries?
    pub(crate) fn prepends(&self) -> bool {
        self.mode == Mode::Transformer && self.pooling == Pooling::Cls
    }

    /// Names and shapes of the parameters, as the original names them.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = match self.mode {
            Mode::Mean => Vec::new(),
            Mode::Transformer => self.tower().tensors(),
        };
        if self.prepends() {
            tensors.push((crate::network::CLS_TOKEN.to_string(), vec![1, 1, self.width]));
        }
        tensors.extend(crate::head::tensors(self));
        tensors
    }

    /// Number of values that learn.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}

impl Pooling {
    /// The word used in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Query => "query",
            Self::Cls => "cls",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(config: GistNetConfig, what: &str) {
        let error = config.check().unwrap_err().to_string();
        assert!(error.starts_with("gistnet: ") && error.contains(what), "expected {what:?} in {error:?}");
    }

    fn small() -> GistNetConfig {
        GistNetConfig::new(16, 2)
    }

    #[test]
    fn left_out_keys_have_the_originals_defaults() {
        let config: GistNetConfig = serde_json::from_str(r#"{"width": 16, "heads": 2}"#).unwrap();
        assert_eq!(config, small());
        assert_eq!((config.block, config.layers, config.causal), (32, 2, false));
    }

    #[test]
    fn an_unknown_key_is_refused() {
        let error = serde_json::from_str::<GistNetConfig>(r#"{"width": 16, "heads": 2, "poling": "mean"}"#);
        assert!(error.unwrap_err().to_string().contains("unknown field `poling`"));
    }

    #[test]
    fn the_run_of_twelve_layers_has_as_many_parameters_as_the_original() {
        assert_eq!(GistNetConfig::new(768, 6).parameters(), 16_517_376);
    }

    #[test]
    fn a_block_of_one_is_refused() {
        refused(GistNetConfig { block: 1, ..small() }, "block: expected at least 2 entries, got 1");
    }

    #[test]
    fn heads_that_do_not_divide_the_width_are_refused() {
        refused(GistNetConfig { heads: 3, ..small() }, "heads: expected a divisor of the width 16, got 3");
    }

    #[test]
    fn heads_of_an_odd_width_are_refused() {
        refused(GistNetConfig { heads: 16, ..small() }, "heads of an even width of at most 256, got 1");
    }

    #[test]
    fn no_layers_are_refused() {
        refused(GistNetConfig { layers: 0, ..small() }, "layers: expected 1 to 4096, got 0");
    }

    #[test]
    fn a_width_of_zero_is_refused() {
        refused(GistNetConfig { width: 0, ..small() }, "width: expected 1 to 16777216, got 0");
    }

    #[test]
    fn pooling_by_query_without_a_transformer_is_refused() {
        let config = GistNetConfig { mode: Mode::Mean, pooling: Pooling::Query, ..small() };
        refused(config, "pooling: expected mean, since the mode is mean, got query");
    }
}
