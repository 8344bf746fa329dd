//! What each of several working contexts loses against the baseline, brought to one scale over training.
//!
//! Source: MegaContext's training (its Python code, where the loss of LensNet never uses the outcome). With ℓ_v the loss of variant
//! v, ℓ_0 that of the baseline, w a weight that punishes what is worse than the baseline once more:
//!   ℓ'_v  = ℓ_v + w·max(0, ℓ_v − ℓ_0);
//!   adv_v = ℓ'_v − ℓ_0, above 0 where the baseline predicts better;
//!   norm  = (adv − μ)/√max(σ², 1e-6), with μ and σ² moving averages of the mean and the variance (of the population) of
//!           each batch's advantages, the baseline's 0 among them: E ← βE + (1 − β)·batch, the first batch as it is.
//!   Loss by level l: Σ_v ℓ'_v·s_v(l) / Σ_v s_v(l), s_v(l) the part of v's entries that is of level l.
//!
//! Units: nats per token. Errors: `BaseError::NonFinite` for a loss that is no number; nothing has changed then.

use megacontext_base::error::{BaseError, Result};
use serde::{Deserialize, Serialize};

use crate::metrics::mean;

/// Variance is taken for this at least.
const FLOOR: f64 = 1e-6;

/// Losses with what is worse than the baseline counted `weight` times more.
pub fn penalised(losses: &[f64], baseline: f64, weight: f64) -> Vec<f64> {
    losses.iter().map(|loss| loss + weight * (loss - baseline).max(0.0)).collect()
}

/// adv of each loss.
///
/// # Errors
/// A loss that is not finite.
pub fn advantages(losses: &[f64], baseline: f64) -> Result<Vec<f64>> {
    let finite = |what: String, value: f64| match value.is_finite() {
        true => Ok(value),
        false => Err(BaseError::NonFinite { what, value }),
    };
    finite("loss of the baseline".to_string(), baseline)?;
    let of = |(v, loss): (usize, &f64)| Ok(finite(format!("loss of variant {v}"), *loss)? - baseline);
    losses.iter().enumerate().map(of).collect()
}

/// The moving mean and variance of advantages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normaliser {
    /// β.
    pub beta: f64,
    /// μ and σ²; none before the first batch.
    pub moments: Option<[f64; 2]>,
}

impl Default for Normaliser {
    fn default() -> Self {
        Self { beta: 0.9, moments: None }
    }
}

impl Normaliser {
    /// Takes in a batch and gives it at the scale of all so far, this one included; of none, nothing changes.
    pub fn normalise(&mut self, advantages: &[f64]) -> Vec<f64> {
        if advantages.is_empty() {
            return Vec::new();
        }
        let centre = mean(advantages);
        let spread = mean(&advantages.iter().map(|a| (a - centre).powi(2)).collect::<Vec<_>>());
        let moved = |before: f64, now: f64| self.beta * before + (1.0 - self.beta) * now;
        let [mu, variance] = match self.moments {
            None => [centre, spread],
            Some([mu, variance]) => [moved(mu, centre), moved(variance, spread)],
        };
        self.moments = Some([mu, variance]);
        let deviation = variance.max(FLOOR).sqrt();
        advantages.iter().map(|a| (a - mu) / deviation).collect()
    }
}

/// The loss of each level that variants have entries of, by level; `variants` are the levels of each one's entries.
pub fn loss_by_level(losses: &[f64], variants: &[&[u8]]) -> Vec<Option<f64>> {
    let levels = variants.iter().flat_map(|lod| lod.iter()).max().map_or(0, |lod| usize::from(*lod) + 1);
    let of_level = |level: usize| {
        let share = |lod: &[u8]| {
            lod.iter().filter(|lod| usize::from(**lod) == level).count() as f64 / lod.len().max(1) as f64
        };
        let (mut sum, mut weight) = (0.0, 0.0);
        for (loss, lod) in losses.iter().zip(variants) {
            sum += loss * share(lod);
            weight += share(lod);
        }
        (weight > 0.0).then(|| sum / weight)
    };
    (0..levels).map(of_level).collect()
}
