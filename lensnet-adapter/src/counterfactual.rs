//! Learning from what every legal expand and collapse of a working context is worth, measured one by one.
//!
//! Source: MegaContext's counterfactual labels (its older documents), with the NLL over the horizon of the context as it is,
//! n, and of the edited one, n':
//!   expand:    y = max(0, n − n')/s, what the closer look saves;
//!   collapse:  y = −max(0, m − (n' − n))/s, the more negative the less it costs, 0 from a cost of m on. (The documents have
//!              −max(0, n' − n): there the costliest collapse gets the lowest score, and so is made first.)
//! s is how many nats a score of 1 stands for. The documents have no s: a score is a nat there, and the allocator's threshold
//! of 0.2 asks an expand to save 0.2 nats on every token, which on text hardly any span does; s brings what there is to be
//! saved into the range that scores have ([`unit()`]), and m follows it.
//! An entry that can do both keeps the larger of the two. Targets beyond ±1, which no score reaches, become ±1. The loss of
//! scores u over the entries M that have a target:
//!   regression  mean over M of (u − y)²;
//!   rank        mean over pairs of M with y_i > y_j + 0.1 of softplus(u_j − u_i);
//!   budget      ((P − N)/(P + N + 1e-6))², P = Σ (K−1)·max(u, 0) where an entry can be expanded, N = Σ (K−1)/K·max(−u, 0)
//!               where it can be collapsed: entries added and freed;
//!   illegal     Σ max(u, 0) over tokens + Σ max(−u, 0) over the highest level.
//!
//! Shapes: W entries; u \[W\] on candle's tape. Units: nats per token; scores have none. Errors: `BaseError::Network` for
//! operands that do not agree, `BaseError::NonFinite` for a measurement that is no number.
//! Left out on purpose: measuring, which needs the base model.

use candle_core::{Device, Tensor};
use megacontext_base::error::{BaseError, Result};
use megacontext_base::tower::{relu, softplus};
use serde::{Deserialize, Serialize};

use crate::config::NETWORK;
use crate::preference::{constant, zero};

/// How much further apart two targets are when their order counts.
const APART: f64 = 0.1;

/// Settings of labels and loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CounterfactualConfig {
    /// s, nats per token that a score of 1 stands for; none means what [`unit()`] finds before the first labels.
    pub unit: Option<f64>,
    /// m in units of s.
    pub margin: f64,
    /// Do targets keep their sign where an entry can do one thing alone?
    pub signed: bool,
    /// Of rank.
    pub rank_weight: f64,
    /// Pairs that rank looks at, at most; of more, every second, third, … is taken.
    pub max_rank_pairs: usize,
    /// Of budget.
    pub budget_weight: f64,
    /// Of illegal.
    pub illegal_weight: f64,
}

impl Default for CounterfactualConfig {
    fn default() -> Self {
        Self {
            unit: None,
            margin: 0.5,
            signed: false,
            rank_weight: 0.5,
            max_rank_pairs: 65_536,
            budget_weight: 0.1,
            illegal_weight: 0.3,
        }
    }
}

/// What was measured of one entry: NLL over the horizon after an edit, nats per token; none where it is not legal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// After expanding it.
    pub expanded: Option<f64>,
    /// After collapsing it with its siblings.
    pub collapsed: Option<f64>,
}

/// What nats come to as targets.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scale {
    /// s, nats per token.
    pub unit: f64,
    /// m, nats per token.
    pub margin: f64,
    /// Is nothing cut off at 0 where an entry can do one thing alone?
    pub signed: bool,
}

impl CounterfactualConfig {
    /// The scale of targets, where a score of 1 stands for `unit` nats unless the settings say otherwise.
    pub fn scale(&self, unit: f64) -> Scale {
        let unit = self.unit.unwrap_or(unit);
        Scale { unit, margin: self.margin * unit, signed: self.signed }
    }
}

/// Nats that a score of 1 can stand for: what the best expand of a context saves, the median of these contexts. 1 where none
/// saves anything.
pub fn unit<'a>(contexts: impl Iterator<Item = (f64, &'a [Measured])>) -> f64 {
    let best = |(now, measured): (f64, &'a [Measured])| {
        let saved = measured.iter().filter_map(|one| Some(now - one.expanded?));
        saved.filter(|saved| saved.is_finite() && *saved > 0.0).max_by(f64::total_cmp)
    };
    let mut all: Vec<f64> = contexts.filter_map(best).collect();
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(1.0)
}

/// The targets of entries, given the NLL of the context as it is: none where nothing is legal.
///
/// # Errors
/// When a measurement is not finite.
pub fn targets(now: f64, measured: &[Measured], scale: Scale) -> Result<Vec<Option<f64>>> {
    let finite = |what: String, value: f64| match value.is_finite() {
        true => Ok(value),
        false => Err(BaseError::NonFinite { what, value }),
    };
    finite("NLL of the working context".to_string(), now)?;
    let Scale { unit, margin, signed } = scale;
    let of_entry = |(at, measured): (usize, &Measured)| {
        let nll = |edit: &str, value: Option<f64>| {
            value.map(|value| finite(format!("NLL after {edit} entry {at}"), value)).transpose()
        };
        let alone = measured.expanded.is_none() || measured.collapsed.is_none();
        let least = if signed && alone { -1.0 } else { 0.0 };
        let expand = nll("expanding", measured.expanded)?.map(|nll| ((now - nll) / unit).clamp(least, 1.0));
        let collapse = nll("collapsing", measured.collapsed)?
            .map(|nll| -((margin - (nll - now)) / unit).clamp(least, 1.0));
        Ok(match (expand, collapse) {
            (Some(expand), Some(collapse)) if -collapse > expand => Some(collapse),
            (expand, collapse) => expand.or(collapse),
        })
    };
    measured.iter().enumerate().map(of_entry).collect()
}

/// The terms of one context's loss, each a scalar on the tape, unweighted.
pub struct Terms {
    /// Regression.
    pub regression: Tensor,
    /// Rank.
    pub rank: Tensor,
    /// Budget.
    pub budget: Tensor,
    /// Illegal.
    pub illegal: Tensor,
}

impl Terms {
    /// The weighted sum.
    ///
    /// # Errors
    /// None but candle's own.
    pub fn loss(&self, config: &CounterfactualConfig) -> Result<Tensor> {
        let rest = [
            (&self.rank, config.rank_weight),
            (&self.budget, config.budget_weight),
            (&self.illegal, config.illegal_weight),
        ];
        rest.into_iter()
            .try_fold(self.regression.clone(), |sum, (term, weight)| Ok((sum + (term * weight)?)?))
    }
}

/// The loss of the scores `u` \[W\] of one working context against its targets.
///
/// # Errors
/// When there is not one score, one level and one place for a target for every entry.
pub fn terms(
    u: &Tensor,
    targets: &[Option<f64>],
    lod: &[u8],
    block: usize,
    max_lod: u8,
    config: &CounterfactualConfig,
) -> Result<Terms> {
    let w = lod.len();
    if u.dims() != [w] || targets.len() != w {
        let message = format!(
            "counterfactual: expected {w} scores and targets, one for every level, got {:?} and {}",
            u.dims(),
            targets.len()
        );
        return Err(BaseError::network(NETWORK, message));
    }
    let at = |legal: &dyn Fn(u8) -> bool, weight: f64| {
        constant(lod.iter().map(|lod| if legal(*lod) { weight } else { 0.0 }))
    };
    let sum =
        |sign: f64, weights: Tensor| -> Result<Tensor> { Ok((relu(&(u * sign)?)? * weights)?.sum_all()?) };
    let grows = (block - 1) as f64;
    let added = sum(1.0, at(&|lod| lod > 0, grows)?)?;
    let freed = sum(-1.0, at(&|lod| lod < max_lod, grows / block as f64)?)?;
    let balance = ((&added - &freed)? / ((added + freed)? + 1e-6)?)?;
    let impossible = (sum(1.0, at(&|lod| lod == 0, 1.0)?)? + sum(-1.0, at(&|lod| lod >= max_lod, 1.0)?)?)?;
    Ok(Terms {
        regression: regression(u, targets)?,
        rank: rank(u, targets, config.max_rank_pairs)?,
        budget: balance.sqr()?,
        illegal: impossible,
    })
}

fn regression(u: &Tensor, targets: &[Option<f64>]) -> Result<Tensor> {
    let count = targets.iter().flatten().count();
    if count == 0 {
        return zero();
    }
    let share = constant(targets.iter().map(|y| if y.is_some() { 1.0 / count as f64 } else { 0.0 }))?;
    let y = constant(targets.iter().map(|y| y.unwrap_or(0.0)))?;
    Ok(((u - y)?.sqr()? * share)?.sum_all()?)
}

fn rank(u: &Tensor, targets: &[Option<f64>], most: usize) -> Result<Tensor> {
    let known: Vec<(u32, f64)> =
        targets.iter().enumerate().filter_map(|(at, y)| Some((at as u32, (*y)?))).collect();
    let pairs = || {
        known.iter().flat_map(|(i, high)| {
            known.iter().filter(move |(_, low)| *high > low + APART).map(move |(j, _)| (*i, *j))
        })
    };
    let count = pairs().count();
    if count == 0 || most == 0 {
        return zero();
    }
    let (higher, lower): (Vec<u32>, Vec<u32>) = pairs().step_by(count.div_ceil(most)).unzip();
    let of = |rows: Vec<u32>| -> Result<Tensor> {
        let count = rows.len();
        Ok(u.index_select(&Tensor::from_vec(rows, count, &Device::Cpu)?, 0)?)
    };
    Ok(softplus(&(of(lower)? - of(higher)?)?)?.mean_all()?)
}
