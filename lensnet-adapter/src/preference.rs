//! Learning from which of several working contexts over one history predicts better.
//!
//! Source: MegaContext's pairwise preference (its Python code, where an early return keeps it from ever being used). Variants
//! with losses ℓ make pairs (better, worse) with Δ = |ℓ_worse − ℓ_better|; the scores of the *worse* one are pushed towards
//! what the better one does:
//!   strength s = tanh(Δ). Where both have an entry at one position and the better one's level is lower, the entry of
//!   the worse one should expand, target +s; where it is higher, all entries of the worse one within the better one's next
//!   larger span should collapse, target −s, which overrides. Other entries have no target.
//!   preference = mean over targets t of softplus(−sign(t)·u·κ)·|t|·w,  κ = max(1, Δ)/τ, w the collapse weight where t < 0;
//!   rank       = max(0, m − (mean u over t > 0 − mean u over t < 0)), where there are both;
//!   budget     = D², D = (P − N)/(P + N + 1e-6), P = Σ span·max(u, 0), N = Σ span·max(−u, 0) over targets;
//!   smoothing  = (D − E)², E ← βE + (1−β)D from pair to pair, E without gradient, from 0 on;
//!   divergence = ½·mean[p'(ln p' − ln p) + p(ln p − ln p')], p = σ(u/τ) within 1e-6 of 0 and 1, p' the same of the previous
//!                policy's scores (one term of each Bernoulli, as there). The original overwrites p' by p first, so that it
//!                is always 0; here it is given, or there is none.
//! The loss is the mean over pairs of preference + weighted rest. Pairs without a target say nothing and are left out.
//!
//! Shapes: variants of W entries each, W their own; scores \[W\] on candle's tape. Units: losses in nats per token, spans and
//! positions in tokens. Errors: `BaseError::Network` for operands that do not agree.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use megacontext_base::error::{BaseError, Result};
use megacontext_base::tower::{relu, softplus};
use serde::{Deserialize, Serialize};

use crate::config::NETWORK;
use crate::features::span;

/// Keeps probabilities of the divergence from 0 and 1.
const EDGE: f64 = 1e-6;

/// Settings of the loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PreferenceConfig {
    /// Pairs taken, those with the best variant first.
    pub max_pairs: usize,
    /// Which part of the pairs without the best variant is looked at, largest Δ first.
    pub hard_negative_ratio: f64,
    /// τ.
    pub temperature: f64,
    /// How much a target that collapses counts beside one that expands.
    pub collapse_weight: f64,
    /// Of rank.
    pub rank_weight: f64,
    /// m.
    pub margin: f64,
    /// Of budget.
    pub budget_weight: f64,
    /// Of smoothing.
    pub smooth_weight: f64,
    /// β.
    pub smooth_beta: f64,
    /// Of the divergence from the previous policy.
    pub kl_weight: f64,
}

impl Default for PreferenceConfig {
    fn default() -> Self {
        Self {
            max_pairs: 8,
            hard_negative_ratio: 1.0,
            temperature: 1.0,
            collapse_weight: 1.0,
            rank_weight: 0.5,
            margin: 0.1,
            budget_weight: 0.1,
            smooth_weight: 0.0,
            smooth_beta: 0.9,
            kl_weight: 0.0,
        }
    }
}

/// Entries of a working context.
#[derive(Clone, Copy, Debug)]
pub struct Variant<'a> {
    /// Level of each.
    pub lod: &'a [u8],
    /// First token of each one's span.
    pub start: &'a [u64],
}

/// Two variants of which one predicts better.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair {
    /// The one of the lesser loss.
    pub better: usize,
    /// The other, whose scores learn.
    pub worse: usize,
    /// Δ, nats.
    pub delta: f64,
}

/// What one pair comes to, unweighted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairTerms {
    /// Preference.
    pub preference: f64,
    /// Rank.
    pub rank: f64,
    /// Budget.
    pub budget: f64,
    /// Smoothing.
    pub smooth: f64,
    /// Divergence.
    pub kl: f64,
    /// Mean of u·sign(t) over targets: above 0 the scores agree with the pair.
    pub alignment: f64,
}

/// The loss of one history's variants.
pub struct PreferenceLoss {
    /// A scalar on the tape; 0 where no pair has a target.
    pub loss: Tensor,
    /// Pairs that had a target, and what each came to.
    pub pairs: Vec<(Pair, PairTerms)>,
}

impl PreferenceLoss {
    /// Which part of the pairs the scores agree with; none without pairs.
    pub fn agreement(&self) -> Option<f64> {
        let agree = self.pairs.iter().filter(|(_, terms)| terms.alignment > 0.0).count();
        (!self.pairs.is_empty()).then(|| agree as f64 / self.pairs.len() as f64)
    }
}

/// The pairs of variants with these losses, in the order in which they are taken: those with the best variant, then the
/// others, each by falling Δ.
pub fn pairs(losses: &[f64], config: &PreferenceConfig) -> Vec<Pair> {
    let mut order: Vec<usize> = (0..losses.len()).collect();
    order.sort_by(|a, b| losses[*a].total_cmp(&losses[*b]));
    let pair = |better: usize, worse: usize| Pair { better, worse, delta: losses[worse] - losses[better] };
    let by_delta = |pairs: &mut Vec<Pair>| pairs.sort_by(|a, b| b.delta.total_cmp(&a.delta));
    let Some((best, others)) = order.split_first() else { return Vec::new() };
    let mut first: Vec<Pair> = others.iter().map(|worse| pair(*best, *worse)).collect();
    let mut rest: Vec<Pair> = others
        .iter()
        .enumerate()
        .flat_map(|(i, better)| others[i + 1..].iter().map(move |worse| (*better, *worse)))
        .map(|(better, worse)| pair(better, worse))
        .collect();
    by_delta(&mut first);
    by_delta(&mut rest);
    rest.truncate((config.hard_negative_ratio * rest.len() as f64).ceil() as usize);
    first.append(&mut rest);
    first.truncate(config.max_pairs);
    first
}

/// The targets of the worse variant's entries, 0 where there is none: + to expand, − to collapse.
pub fn targets(better: Variant, worse: Variant, delta: f64, block: usize, max_lod: u8) -> Vec<f64> {
    let strength = delta.abs().tanh();
    let level: HashMap<u64, u8> = better.start.iter().copied().zip(better.lod.iter().copied()).collect();
    let mut targets = vec![0.0; worse.lod.len()];
    let entry = |at: usize| (worse.lod[at], worse.start[at]);
    let desired = |at: usize| level.get(&worse.start[at]).copied().unwrap_or(worse.lod[at]);
    for (at, target) in targets.iter_mut().enumerate() {
        if desired(at) < worse.lod[at] {
            *target = strength;
        }
    }
    for at in 0..targets.len() {
        let (lod, start) = entry(at);
        if desired(at) > lod && lod < max_lod {
            let parent = (block as u64).saturating_pow(u32::from(lod) + 1);
            for (other, target) in targets.iter_mut().enumerate() {
                let (other_lod, other_start) = entry(other);
                if other_lod == lod && other_start / parent == start / parent {
                    *target = -strength;
                }
            }
        }
    }
    targets
}

/// The loss of one history: `scores` \[W\] of every variant, as the network gives them, with their graph; `previous`, where
/// there are such, those of the policy before, without one.
///
/// # Errors
/// When there is not one score for every entry, or not one list of them for every variant that a pair names.
pub fn loss(
    scores: &[Tensor],
    variants: &[Variant],
    pairs: &[Pair],
    previous: Option<&[Tensor]>,
    block: usize,
    max_lod: u8,
    config: &PreferenceConfig,
) -> Result<PreferenceLoss> {
    check(scores, variants, pairs, previous)?;
    let mut sum: Option<Tensor> = None;
    let mut taken = Vec::new();
    let mut smoothed = 0.0;
    for pair in pairs {
        let worse = variants[pair.worse];
        let targets = targets(variants[pair.better], worse, pair.delta, block, max_lod);
        if targets.iter().all(|target| *target == 0.0) {
            continue;
        }
        let u = &scores[pair.worse];
        let of = OfPair { u, targets: &targets, delta: pair.delta, config };
        let preference = of.preference()?;
        let rank = of.rank()?;
        let balance = of.balance(worse.lod, block)?;
        let measured = scalar(&balance)?;
        smoothed = config.smooth_beta * smoothed + (1.0 - config.smooth_beta) * measured;
        let smooth = (&balance - smoothed)?.sqr()?;
        let budget = balance.sqr()?;
        let kl = match previous {
            Some(previous) => divergence(u, &previous[pair.worse], config.temperature)?,
            None => zero()?,
        };
        let terms = [
            (&preference, 1.0),
            (&rank, config.rank_weight),
            (&budget, config.budget_weight),
            (&smooth, config.smooth_weight),
            (&kl, config.kl_weight),
        ];
        for (term, weight) in terms.into_iter().filter(|(_, weight)| *weight != 0.0) {
            let weighted = (term * weight)?;
            sum = Some(match sum {
                None => weighted,
                Some(sum) => (sum + weighted)?,
            });
        }
        let terms = PairTerms {
            preference: scalar(&preference)?,
            rank: scalar(&rank)?,
            budget: scalar(&budget)?,
            smooth: scalar(&smooth)?,
            kl: scalar(&kl)?,
            alignment: of.alignment()?,
        };
        taken.push((*pair, terms));
    }
    let loss = match sum {
        None => zero()?,
        Some(sum) => (sum / taken.len() as f64)?,
    };
    Ok(PreferenceLoss { loss, pairs: taken })
}

/// ½·mean[p'(ln p' − ln p) + p(ln p − ln p')] of scores `u` \[W\] against those of the policy before, a scalar; differentiable
/// in `u` alone.
///
/// # Errors
/// When there is not one score before for every score.
pub fn divergence(u: &Tensor, before: &Tensor, temperature: f64) -> Result<Tensor> {
    if u.dims() != before.dims() {
        let message = format!("previous scores: expected {:?}, got {:?}", u.dims(), before.dims());
        return Err(BaseError::network(NETWORK, message));
    }
    let probability = |u: &Tensor| -> Result<Tensor> {
        let p = ((((u / -temperature)?.exp()? + 1.0)?).recip())?;
        Ok(p.clamp(EDGE, 1.0 - EDGE)?)
    };
    let (p, q) = (probability(u)?, probability(&before.detach())?);
    let gap = (q.log()? - p.log()?)?;
    Ok(((&q * &gap)? - (&p * &gap)?)?.mean_all()?.affine(0.5, 0.0)?)
}

/// The worse variant of one pair.
struct OfPair<'a> {
    u: &'a Tensor,
    targets: &'a [f64],
    delta: f64,
    config: &'a PreferenceConfig,
}

impl OfPair<'_> {
    /// A constant for every entry, from its target.
    fn of_targets(&self, f: impl Fn(f64) -> f64) -> Result<Tensor> {
        constant(self.targets.iter().map(|target| f(*target)))
    }

    fn preference(&self) -> Result<Tensor> {
        let count = self.targets.iter().filter(|target| **target != 0.0).count() as f64;
        let steep = self.delta.max(1.0) / self.config.temperature;
        let sign = |target: f64| if target == 0.0 { 0.0 } else { target.signum() };
        let z = (self.u * self.of_targets(|target| -sign(target) * steep)?)?;
        let weight = |target: f64| {
            let side = if target < 0.0 { self.config.collapse_weight } else { 1.0 };
            target.abs() * side / count
        };
        Ok((softplus(&z)? * self.of_targets(weight)?)?.sum_all()?)
    }

    fn rank(&self) -> Result<Tensor> {
        let count = |sign: f64| self.targets.iter().filter(|target| **target * sign > 0.0).count() as f64;
        let (up, down) = (count(1.0), count(-1.0));
        if up == 0.0 || down == 0.0 {
            return zero();
        }
        let share = |target: f64| match target {
            t if t > 0.0 => -1.0 / up,
            t if t < 0.0 => 1.0 / down,
            _ => 0.0,
        };
        let lag = (self.u * self.of_targets(share)?)?.sum_all()?;
        relu(&(lag + self.config.margin)?)
    }

    /// D.
    fn balance(&self, lod: &[u8], block: usize) -> Result<Tensor> {
        let counted = |(lod, target): (&u8, &f64)| if *target == 0.0 { 0.0 } else { span(block, *lod) };
        let spans = constant(lod.iter().zip(self.targets).map(counted))?;
        let weighted = (self.u * spans)?;
        let (up, down) = (relu(&weighted)?.sum_all()?, relu(&weighted.neg()?)?.sum_all()?);
        Ok(((&up - &down)? / ((up + down)? + 1e-6)?)?)
    }

    fn alignment(&self) -> Result<f64> {
        let u: Vec<f32> = self.u.to_vec1()?;
        let signed = u.iter().zip(self.targets).filter(|(_, target)| **target != 0.0);
        let signed: Vec<f64> = signed.map(|(u, target)| f64::from(*u) * target.signum()).collect();
        Ok(signed.iter().sum::<f64>() / signed.len().max(1) as f64)
    }
}

pub(crate) fn constant(values: impl Iterator<Item = f64>) -> Result<Tensor> {
    let values: Vec<f32> = values.map(|value| value as f32).collect();
    let count = values.len();
    Ok(Tensor::from_vec(values, count, &Device::Cpu)?)
}

pub(crate) fn zero() -> Result<Tensor> {
    Ok(Tensor::zeros((), DType::F32, &Device::Cpu)?)
}

fn scalar(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.to_scalar::<f32>()?))
}

fn check(scores: &[Tensor], variants: &[Variant], pairs: &[Pair], previous: Option<&[Tensor]>) -> Result<()> {
    let refuse = |message: String| Err(BaseError::network(NETWORK, message));
    let lists = [("scores", Some(scores)), ("previous scores", previous)];
    for (what, list) in lists.into_iter().filter_map(|(what, list)| Some((what, list?))) {
        if list.len() != variants.len() {
            return refuse(format!(
                "{what}: expected those of {} variants, got {}",
                variants.len(),
                list.len()
            ));
        }
        for (i, (scores, variant)) in list.iter().zip(variants).enumerate() {
            if scores.dims() != [variant.lod.len()] {
                let entries = variant.lod.len();
                return refuse(format!(
                    "{what} of variant {i}: expected [{entries}], got {:?}",
                    scores.dims()
                ));
            }
        }
    }
    for (i, variant) in variants.iter().enumerate() {
        if variant.lod.len() != variant.start.len() {
            let (expected, got) = (variant.lod.len(), variant.start.len());
            return refuse(format!("start of variant {i}: expected {expected} positions, got {got}"));
        }
    }
    match pairs.iter().find(|pair| pair.better.max(pair.worse) >= variants.len()) {
        Some(pair) => refuse(format!("pairs: expected variants below {}, got {pair:?}", variants.len())),
        None => Ok(()),
    }
}
