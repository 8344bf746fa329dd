//! What gists cost on held-out text, beside everything else that could stand in their place.
//!
//! Source: MegaContext's list of metrics; definitions are those of [`Validation`]'s fields. Every stand-in is measured on the
//! same blocks: all aligned blocks of the same documents.
//!
//! Units: nats per token where nothing else is said. Errors: no block with a horizon behind it; the base model's.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use megacontext_base::buffers::Buffers;
use megacontext_base::decoder::Decoder;
use megacontext_base::error::{BaseError, Result};
use serde::{Deserialize, Serialize};

use crate::config::{Mode, NETWORK};
use crate::curriculum::places;
use crate::delta_nll::{DeltaNll, Passage, RowLoss, Span, StandIn};
use crate::metrics::{contrast_gap, diversity};
use crate::network::GistNet;
use crate::trainer::{Setting, gists_of};

/// ΔNLL@H of a block whose loss is below this counts as substituted.
pub const SUBSTITUTED: f64 = 1.0;
/// Blocks whose attention is looked at.
pub const LOOKED_AT: usize = 64;

/// What else can stand for a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// Nothing.
    Deleted,
    /// The mean of its embeddings, at a gist's place.
    Mean,
    /// Its last token, at its own place.
    LastToken,
    /// Its last two tokens.
    #[serde(rename = "last_2")]
    Last2,
    /// Its last four tokens.
    #[serde(rename = "last_4")]
    Last4,
}

impl Baseline {
    /// All, from the plainest on.
    pub const ALL: [Self; 5] = [Self::Deleted, Self::Mean, Self::LastToken, Self::Last2, Self::Last4];

    /// Most of a block's own tokens that stand for it.
    pub const MOST_TOKENS: usize = 4;

    /// The word used in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deleted => "deleted",
            Self::Mean => "mean",
            Self::LastToken => "last_token",
            Self::Last2 => "last_2",
            Self::Last4 => "last_4",
        }
    }

    fn stand_in(self) -> StandIn {
        match self {
            Self::Deleted => StandIn::Nothing,
            Self::Mean => StandIn::Entry,
            Self::LastToken => StandIn::LastTokens(1),
            Self::Last2 => StandIn::LastTokens(2),
            Self::Last4 => StandIn::LastTokens(4),
        }
    }
}

/// What a network was measured to cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// H.
    pub horizon: usize,
    /// Blocks measured.
    pub blocks: usize,
    /// Mean ΔNLL@H of gists.
    pub delta_nll: f64,
    /// Standard error of that mean, blocks taken as independent.
    pub delta_nll_error: f64,
    /// Share of blocks whose ΔNLL@H is below [`SUBSTITUTED`].
    pub substitutability: f64,
    /// exp(mean NLL with gists) / exp(mean NLL without).
    pub perplexity_ratio: f64,
    /// NLL with gists over NLL without, less 1.
    pub degradation: f64,
    /// 1 − mean cosine of pairs of gists.
    pub diversity: Option<f64>,
    /// How much further apart any two gists are than neighbours, in 1 − cos.
    pub contrast_gap: Option<f64>,
    /// Mean entropy of GistNet's attention, bits, over its blocks; none without a transformer.
    pub attention_entropy: Option<f64>,
    /// Mean ΔNLL@H with spans of the second level replaced; none where no document has room for one.
    pub level2_delta_nll: Option<f64>,
    /// The same as `delta_nll`, documents and rows computed with shifted sparse attention; none where it was not asked for.
    pub sparse_delta_nll: Option<f64>,
    /// NLL of the horizon in documents as they are.
    pub full_nll: f64,
}

impl Validation {
    /// ΔNLL@H of sparse attention less that of dense.
    pub fn sparse_dense_gap(&self) -> Option<f64> {
        self.sparse_delta_nll.map(|sparse| sparse - self.delta_nll)
    }
}

/// Held-out text, and how it is measured.
pub struct Validator<'a> {
    /// The frozen base model.
    pub decoder: &'a Decoder,
    /// How contexts are computed.
    pub setting: &'a Setting,
    /// Shifted sparse attention to measure as well.
    pub sparse: Option<Setting>,
    /// Tokens of each document.
    pub documents: &'a [Vec<u32>],
    /// H.
    pub horizon: usize,
    /// Most blocks of a document.
    pub most_blocks: usize,
}

/// Means over blocks as they come in.
#[derive(Default)]
struct Sums {
    deltas: Vec<f64>,
    replaced: f64,
    full: f64,
}

impl Sums {
    fn add(&mut self, rows: &[RowLoss]) {
        for row in rows {
            let mean =
                |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
            self.deltas.push(row.delta());
            self.replaced += mean(&row.replaced);
            self.full += mean(&row.full);
        }
    }

    fn count(&self) -> f64 {
        self.deltas.len().max(1) as f64
    }

    fn mean(&self) -> Option<f64> {
        (!self.deltas.is_empty()).then(|| self.deltas.iter().sum::<f64>() / self.count())
    }

    fn error(&self, mean: f64) -> f64 {
        let variance =
            self.deltas.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / (self.count() - 1.0).max(1.0);
        (variance / self.count()).sqrt()
    }
}

impl Validator<'_> {
    /// Blocks of a document that are measured: spread evenly where there are more than asked for.
    fn spans(&self, length: usize, lod: u32) -> Vec<Vec<Span>> {
        let all = places(length, self.setting.rule.block, lod, self.horizon);
        let count = all.len().min(self.most_blocks);
        (0..count).map(|n| vec![all[n * all.len() / count.max(1)]]).collect()
    }

    fn no_blocks<T>(&self) -> Result<T> {
        let message = format!(
            "validation: expected a held-out document of at least {} tokens, for an entry, a block and a horizon, got none",
            2 * self.setting.rule.block + self.horizon
        );
        Err(BaseError::network(NETWORK, message))
    }

    /// ΔNLL@H of everything that needs no network. `going` is asked before every document whether to go on.
    ///
    /// # Errors
    /// See the module; none where the answer was no.
    pub fn baselines(
        &self,
        buffers: &mut Buffers,
        going: &mut dyn FnMut() -> bool,
    ) -> Result<Option<BTreeMap<Baseline, f64>>> {
        let delta = self.setting.delta_nll(self.decoder, self.horizon)?;
        let block = self.setting.rule.block;
        let wanted: Vec<Baseline> = Baseline::ALL
            .into_iter()
            .filter(|baseline| !matches!(baseline.stand_in(), StandIn::LastTokens(m) if m > block))
            .collect();
        let mut sums: BTreeMap<Baseline, Sums> = BTreeMap::new();
        for tokens in self.documents {
            if !going() {
                return Ok(None);
            }
            let spans = self.spans(tokens.len(), 1);
            if spans.is_empty() {
                continue;
            }
            let passage = delta.run(tokens, false, buffers)?;
            for baseline in &wanted {
                let mut rows = delta.rows(&passage, &spans, baseline.stand_in())?;
                if *baseline == Baseline::Mean {
                    let means = rows.means(&passage, block);
                    rows.fill(&means)?;
                }
                let measured = delta.measure(&passage, &rows, None, buffers)?;
                sums.entry(*baseline).or_default().add(&measured.rows);
            }
        }
        let means: BTreeMap<Baseline, f64> =
            sums.into_iter().filter_map(|(baseline, sums)| Some((baseline, sums.mean()?))).collect();
        if means.is_empty() { self.no_blocks() } else { Ok(Some(means)) }
    }

    /// What a network costs. `going` as in [`Validator::baselines`].
    ///
    /// # Errors
    /// See the module.
    pub fn measure(
        &self,
        network: &GistNet,
        buffers: &mut Buffers,
        going: &mut dyn FnMut() -> bool,
    ) -> Result<Option<Validation>> {
        let (block, width) = (self.setting.rule.block, self.decoder.config().hidden_size);
        let dense = self.setting.delta_nll(self.decoder, self.horizon)?;
        let sparse =
            self.sparse.as_ref().map(|setting| setting.delta_nll(self.decoder, self.horizon)).transpose()?;
        let (mut of_level, mut sparse_sums) = ([Sums::default(), Sums::default()], Sums::default());
        let (mut gists, mut neighbours, mut looked_at): (Vec<f32>, Vec<[usize; 2]>, Vec<f32>) =
            Default::default();
        for tokens in self.documents {
            if !going() {
                return Ok(None);
            }
            let spans = self.spans(tokens.len(), 1);
            if spans.is_empty() {
                continue;
            }
            let passage = dense.run(tokens, false, buffers)?;
            for (lod, sums) in (1..).zip(&mut of_level) {
                let spans = self.spans(tokens.len(), lod);
                if spans.is_empty() {
                    continue;
                }
                let (made, losses) = with_gists(&dense, network, &passage, &spans, buffers)?;
                sums.add(&losses);
                if lod == 1 {
                    let first = gists.len() / width;
                    let follow = |pair: &[Vec<Span>]| pair[0][0].start + block == pair[1][0].start;
                    let pairs = spans.windows(2).enumerate().filter(|(_, pair)| follow(pair));
                    neighbours.extend(pairs.map(|(at, _)| [first + at, first + at + 1]));
                    gists.extend(made);
                    for spans in spans.iter().take(LOOKED_AT - looked_at.len() / (block * width)) {
                        looked_at.extend(&passage.x_te[spans[0].start * width..][..block * width]);
                    }
                }
            }
            if let Some(sparse) = &sparse {
                let passage = sparse.run(tokens, false, buffers)?;
                sparse_sums.add(&with_gists(sparse, network, &passage, &spans, buffers)?.1);
            }
        }
        let [first, second] = &of_level;
        let Some(delta_nll) = first.mean() else { return self.no_blocks() };
        let (replaced, full) = (first.replaced / first.count(), first.full / first.count());
        let attention_entropy = match network.config().mode {
            Mode::Mean => None,
            Mode::Transformer => {
                let shape = (looked_at.len() / (block * width), block, width);
                let entropies =
                    network.attention_entropy(&Tensor::from_vec(looked_at, shape, &Device::Cpu)?, None)?;
                Some(entropies.iter().sum::<f64>() / entropies.len().max(1) as f64)
            }
        };
        Ok(Some(Validation {
            horizon: self.horizon,
            blocks: first.deltas.len(),
            delta_nll,
            delta_nll_error: first.error(delta_nll),
            substitutability: first.deltas.iter().filter(|d| **d < SUBSTITUTED).count() as f64
                / first.count(),
            perplexity_ratio: (replaced - full).exp(),
            degradation: replaced / full - 1.0,
            diversity: diversity(&gists, width),
            contrast_gap: contrast_gap(&gists, width, &neighbours),
            attention_entropy,
            level2_delta_nll: second.mean(),
            sparse_delta_nll: sparse_sums.mean(),
            full_nll: full,
        }))
    }
}

/// The gists of spans of a passage, [S, E], and what they cost.
fn with_gists(
    delta: &DeltaNll,
    network: &GistNet,
    passage: &Passage,
    spans: &[Vec<Span>],
    buffers: &mut Buffers,
) -> Result<(Vec<f32>, Vec<RowLoss>)> {
    let mut rows = delta.rows(passage, spans, StandIn::Entry)?;
    let gists = gists_of(network, &rows, passage)?;
    rows.fill(&gists)?;
    Ok((gists, delta.measure(passage, &rows, None, buffers)?.rows))
}
