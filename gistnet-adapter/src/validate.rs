//! What gists cost on held-out text, beside everything else that could stand in their place.
//!
//! Source: MegaContext's list of metrics; definitions are those of [`Validation`]'s fields. Every stand-in is measured on the
//! same blocks, and its ΔNLL@H is kept block by block, so that a difference of two comes with its error ([`crate::costs`]).
//!
//! Which blocks: all aligned ones of a document that have an entry before them and a horizon behind them. Where there are more
//! than asked for, pairs of neighbours spread evenly: how far neighbours are from one another is one of the metrics.
//!
//! Each of the three ways to measure gists has its own deletion beside it, since what deleting costs differs: blocks under dense
//! attention, the same blocks under sparse attention, spans of the second level under dense attention.
//!
//! Units: nats per token where nothing else is said. Errors: no block with a horizon behind it; the base model's.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use megacontext_base::buffers::Buffers;
use megacontext_base::decoder::Decoder;
use megacontext_base::error::{BaseError, Result};
use serde::{Deserialize, Serialize};

use crate::config::{Mode, NETWORK};
use crate::costs::{Costs, Mean, recovered};
use crate::curriculum::places;
use crate::delta_nll::{DeltaNll, Passage, RowLoss, Span, StandIn};
use crate::metrics::{contrast_gap, diversity};
use crate::network::GistNet;
use crate::passages::Passages;
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

/// What needs no network: the costs of all else that could stand for the blocks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Baselines {
    /// Of blocks under dense attention.
    pub blocks: BTreeMap<Baseline, Costs>,
    /// Of deleting the same blocks under sparse attention, where it was asked for.
    pub sparse_deleted: Option<Costs>,
    /// Of deleting spans of the second level; none where no document has room for one.
    pub level2_deleted: Option<Costs>,
}

impl Baselines {
    /// Mean ΔNLL@H of each.
    pub fn means(&self) -> BTreeMap<Baseline, f64> {
        let of = |(baseline, costs): (&Baseline, &Costs)| Some((*baseline, costs.mean()?.mean));
        self.blocks.iter().filter_map(of).collect()
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
    /// Standard error of that mean over passages; none for fewer than two.
    pub delta_nll_error: Option<f64>,
    /// 1 − ΔNLL@H of gists / ΔNLL@H of deletion; none where deletion costs nothing.
    pub recovered: Option<f64>,
    /// ΔNLL@H of gists less that of each baseline, on the same blocks: below 0 the gist is better.
    #[serde(default)]
    pub against: BTreeMap<Baseline, Mean>,
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
    /// The same with those spans deleted.
    pub level2_deleted: Option<f64>,
    /// What gists of the second level recover of it.
    pub level2_recovered: Option<f64>,
    /// The same as `delta_nll`, documents and rows computed with shifted sparse attention; none where it was not asked for.
    pub sparse_delta_nll: Option<f64>,
    /// The same with the blocks deleted.
    pub sparse_deleted: Option<f64>,
    /// What gists recover of it.
    pub sparse_recovered: Option<f64>,
    /// NLL of the horizon in documents as they are.
    pub full_nll: f64,
    /// ΔNLL@H of every block; not written with the rest.
    #[serde(skip)]
    pub costs: Costs,
}

impl Validation {
    /// ΔNLL@H of sparse attention less that of dense.
    pub fn sparse_dense_gap(&self) -> Option<f64> {
        self.sparse_delta_nll.map(|sparse| sparse - self.delta_nll)
    }
}

/// Passages of held-out documents that need not be run again, under dense and under sparse attention.
pub struct Kept {
    dense: Passages,
    sparse: Passages,
}

impl Kept {
    /// None yet; at most so many bytes, of both together where sparse attention is measured.
    pub fn new(budget: u64, sparse: bool) -> Self {
        let of_sparse = if sparse { budget / 2 } else { 0 };
        Self { dense: Passages::new(budget - of_sparse), sparse: Passages::new(of_sparse) }
    }

    /// Number of passages that are held.
    pub fn count(&self) -> usize {
        self.dense.count() + self.sparse.count()
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

/// Costs and losses over blocks as they come in.
#[derive(Default)]
struct Sums {
    costs: Costs,
    replaced: f64,
    full: f64,
}

impl Sums {
    fn add(&mut self, rows: &[RowLoss]) {
        let mean = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
        for row in rows {
            self.replaced += mean(&row.replaced);
            self.full += mean(&row.full);
        }
        self.costs.add(rows);
    }

    fn mean(&self) -> Option<f64> {
        self.costs.mean().map(|found| found.mean)
    }
}

impl Validator<'_> {
    /// Spans of a document that are measured.
    fn spans(&self, length: usize, lod: u32) -> Vec<Vec<Span>> {
        let all = places(length, self.setting.rule.block, lod, self.horizon);
        paired(all.len(), self.most_blocks).into_iter().map(|at| vec![all[at]]).collect()
    }

    fn no_blocks<T>(&self) -> Result<T> {
        let message = format!(
            "validation: expected a held-out document of at least {} tokens, for an entry, a block and a horizon, got none",
            2 * self.setting.rule.block + self.horizon
        );
        Err(BaseError::network(NETWORK, message))
    }

    /// ΔNLL@H under dense attention and, where it was asked for, under sparse.
    fn measures(&self) -> Result<(DeltaNll<'_>, Option<DeltaNll<'_>>)> {
        let of = |setting: &Setting| setting.delta_nll(self.decoder, self.horizon);
        Ok((of(self.setting)?, self.sparse.as_ref().map(of).transpose()?))
    }

    /// ΔNLL@H of everything that needs no network. `going` is asked before every document whether to go on.
    ///
    /// # Errors
    /// See the module; none where the answer was no.
    pub fn baselines(
        &self,
        kept: &mut Kept,
        buffers: &mut Buffers,
        going: &mut dyn FnMut() -> bool,
    ) -> Result<Option<Baselines>> {
        let (dense, sparse) = self.measures()?;
        let block = self.setting.rule.block;
        let wanted: Vec<Baseline> = Baseline::ALL
            .into_iter()
            .filter(|baseline| !matches!(baseline.stand_in(), StandIn::LastTokens(m) if m > block))
            .collect();
        let mut found = Baselines::default();
        for (number, tokens) in self.documents.iter().enumerate() {
            if !going() {
                return Ok(None);
            }
            let spans = self.spans(tokens.len(), 1);
            if spans.is_empty() {
                continue;
            }
            let fresh = kept.dense.run(number, tokens, &dense, false, buffers)?;
            let passage = kept.dense.of(number, &fresh);
            for baseline in &wanted {
                let mut rows = dense.rows(passage, &spans, baseline.stand_in())?;
                if *baseline == Baseline::Mean {
                    let means = rows.means(passage, block);
                    rows.fill(&means)?;
                }
                let measured = dense.measure(passage, &rows, None, buffers)?;
                found.blocks.entry(*baseline).or_default().add(&measured.rows);
            }
            let wide = self.spans(tokens.len(), 2);
            if !wide.is_empty() {
                let rows = dense.rows(passage, &wide, StandIn::Nothing)?;
                let measured = dense.measure(passage, &rows, None, buffers)?;
                found.level2_deleted.get_or_insert_default().add(&measured.rows);
            }
            if let Some(sparse) = &sparse {
                let fresh = kept.sparse.run(number, tokens, sparse, false, buffers)?;
                let passage = kept.sparse.of(number, &fresh);
                let rows = sparse.rows(passage, &spans, StandIn::Nothing)?;
                let measured = sparse.measure(passage, &rows, None, buffers)?;
                found.sparse_deleted.get_or_insert_default().add(&measured.rows);
            }
        }
        if found.blocks.is_empty() { self.no_blocks() } else { Ok(Some(found)) }
    }

    /// What a network costs, beside baselines of the same documents. `going` as in [`Validator::baselines`].
    ///
    /// # Errors
    /// See the module.
    pub fn measure(
        &self,
        network: &GistNet,
        baselines: &Baselines,
        kept: &mut Kept,
        buffers: &mut Buffers,
        going: &mut dyn FnMut() -> bool,
    ) -> Result<Option<Validation>> {
        let (block, width) = (self.setting.rule.block, self.decoder.config().hidden_size);
        let (dense, sparse) = self.measures()?;
        let (mut first, mut second, mut under_sparse) = (Sums::default(), Sums::default(), Sums::default());
        let (mut gists, mut neighbours, mut looked_at): (Vec<f32>, Vec<[usize; 2]>, Vec<f32>) =
            Default::default();
        for (number, tokens) in self.documents.iter().enumerate() {
            if !going() {
                return Ok(None);
            }
            let spans = self.spans(tokens.len(), 1);
            if spans.is_empty() {
                continue;
            }
            let fresh = kept.dense.run(number, tokens, &dense, false, buffers)?;
            let passage = kept.dense.of(number, &fresh);
            let (made, losses) = with_gists(&dense, network, passage, &spans, buffers)?;
            first.add(&losses);
            let before = gists.len() / width;
            let follow = |pair: &[Vec<Span>]| pair[0][0].start + block == pair[1][0].start;
            let pairs = spans.windows(2).enumerate().filter(|(_, pair)| follow(pair));
            neighbours.extend(pairs.map(|(at, _)| [before + at, before + at + 1]));
            gists.extend(made);
            for spans in spans.iter().take(LOOKED_AT - looked_at.len() / (block * width)) {
                looked_at.extend(&passage.x_te[spans[0].start * width..][..block * width]);
            }
            let wide = self.spans(tokens.len(), 2);
            if !wide.is_empty() {
                second.add(&with_gists(&dense, network, passage, &wide, buffers)?.1);
            }
            if let Some(sparse) = &sparse {
                let fresh = kept.sparse.run(number, tokens, sparse, false, buffers)?;
                let passage = kept.sparse.of(number, &fresh);
                under_sparse.add(&with_gists(sparse, network, passage, &spans, buffers)?.1);
            }
        }
        let Some(found) = first.costs.mean() else { return self.no_blocks() };
        let (delta_nll, blocks) = (found.mean, first.costs.blocks());
        let (replaced, full) = (first.replaced / blocks as f64, first.full / blocks as f64);
        let attention_entropy = match network.config().mode {
            Mode::Mean => None,
            Mode::Transformer => {
                let shape = (looked_at.len() / (block * width), block, width);
                let entropies =
                    network.attention_entropy(&Tensor::from_vec(looked_at, shape, &Device::Cpu)?, None)?;
                Some(entropies.iter().sum::<f64>() / entropies.len().max(1) as f64)
            }
        };
        let mean = |costs: Option<&Costs>| costs.and_then(Costs::mean).map(|found| found.mean);
        let share = |cost: Option<f64>, deleted: Option<f64>| recovered(cost?, deleted?);
        let deleted = mean(baselines.blocks.get(&Baseline::Deleted));
        let (level2, level2_deleted) = (second.mean(), mean(baselines.level2_deleted.as_ref()));
        let (of_sparse, sparse_deleted) = (under_sparse.mean(), mean(baselines.sparse_deleted.as_ref()));
        let against = |(baseline, costs): (&Baseline, &Costs)| Some((*baseline, first.costs.less(costs)?));
        Ok(Some(Validation {
            horizon: self.horizon,
            blocks,
            delta_nll,
            delta_nll_error: found.error,
            recovered: share(Some(delta_nll), deleted),
            against: baselines.blocks.iter().filter_map(against).collect(),
            substitutability: first.costs.values().filter(|cost| *cost < SUBSTITUTED).count() as f64
                / blocks as f64,
            perplexity_ratio: (replaced - full).exp(),
            degradation: replaced / full - 1.0,
            diversity: diversity(&gists, width),
            contrast_gap: contrast_gap(&gists, width, &neighbours),
            attention_entropy,
            level2_delta_nll: level2,
            level2_deleted,
            level2_recovered: share(level2, level2_deleted),
            sparse_delta_nll: of_sparse,
            sparse_deleted,
            sparse_recovered: share(of_sparse, sparse_deleted),
            full_nll: full,
            costs: first.costs,
        }))
    }
}

/// Which of `all` blocks are measured, at most `most`: all, or pairs of neighbours spread evenly (and a last one alone where
/// `most` is odd).
fn paired(all: usize, most: usize) -> Vec<usize> {
    if all <= most {
        return (0..all).collect();
    }
    let runs = most.div_ceil(2);
    let first = |run: usize| run * all / runs;
    (0..runs).flat_map(|run| [first(run), first(run) + 1]).take(most).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_measured_in_pairs_of_neighbours() {
        assert_eq!(paired(5, 8), [0, 1, 2, 3, 4]);
        assert_eq!(paired(4, 4), [0, 1, 2, 3]);
        assert_eq!(paired(20, 4), [0, 1, 10, 11]);
        assert_eq!(paired(20, 5), [0, 1, 6, 7, 13]);
        assert_eq!(paired(20, 1), [0]);
        for all in 1..60 {
            for most in 1..20 {
                let chosen = paired(all, most);
                assert_eq!(chosen.len(), all.min(most));
                assert!(chosen.windows(2).all(|pair| pair[0] < pair[1]), "{all} {most}: {chosen:?}");
                assert!(chosen.iter().all(|at| *at < all), "{all} {most}: {chosen:?}");
            }
        }
    }
}
