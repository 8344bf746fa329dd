//! Terms of GistNet's loss that need nothing but gists, and the weights of them all.
//!
//! Source: MegaContext's documents. With g_n the gist of block n:
//!   contrastive:  mean over pairs of neighbours of max(0, m − (1 − cos(g_a, g_b))), which pushes neighbours apart until
//!                 they are m away (two of its texts have the sign the other way round, which would pull them together);
//!   stability:    mean_n ‖g_n − g'_n‖², g' the gists that a checkpoint makes of the same blocks;
//!   pooling:      mean over n and E of (g_n − mean of block n)², a warm start: the mean is a fair first guess.
//! The loss over the base model (ΔNLL@H) is not here; [`LossConfig::position_weights`] says how its positions count.
//!
//! Every term is a scalar on candle's tape, differentiable in the gists alone: checkpoints and means of blocks are targets.
//! All of them are off unless a weight is set.
//!
//! Shapes: N blocks, K entries, E width, H future positions. Units: none, but for weights that multiply nats.
//! Errors: `BaseError::Network` for operands that do not agree.

use candle_core::{D, DType, Device, Tensor};
use megacontext_base::error::{BaseError, Result};
use serde::{Deserialize, Serialize};

use crate::config::NETWORK;

/// Added to squared lengths: the cosine of a gist that is zero is 0, and so is its gradient's size, not NaN.
const LENGTH_EPS: f64 = 1e-16;

/// Weights of the terms beside ΔNLL@H; a weight of 0 switches a term off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossConfig {
    /// Of the contrastive term; the documents use 0.05, later 0.08.
    pub contrastive: f64,
    /// m: how far apart, in 1 − cos, neighbours are left alone.
    pub margin: f64,
    /// Of stability; 0.01 where it is used.
    pub stability: f64,
    /// Of the pooling warm start.
    pub pooling: f64,
    /// Future positions at either end of the horizon that count more.
    pub boundary_positions: usize,
    /// How much more than the others they count; 1 switches it off, 2 where it is used.
    pub boundary_weight: f64,
}

impl Default for LossConfig {
    fn default() -> Self {
        Self {
            contrastive: 0.0,
            margin: 0.2,
            stability: 0.0,
            pooling: 0.0,
            boundary_positions: 4,
            boundary_weight: 1.0,
        }
    }
}

/// What the terms read.
#[derive(Clone, Copy, Debug)]
pub struct OnGists<'a> {
    /// The gists [N, E], with their graph.
    pub gists_ne: &'a Tensor,
    /// What they were made from, [N, K, E].
    pub children_nke: &'a Tensor,
    /// Rows of gists whose blocks follow one another in a document.
    pub neighbours: &'a [[usize; 2]],
    /// A checkpoint's gists of the same blocks, [N, E].
    pub checkpoint_ne: Option<&'a Tensor>,
}

impl LossConfig {
    /// Refuses settings that mean nothing.
    ///
    /// # Errors
    /// Names the key, what was expected and what came.
    pub fn check(&self) -> Result<()> {
        let at_least_zero = [
            ("contrastive", self.contrastive),
            ("margin", self.margin),
            ("stability", self.stability),
            ("pooling", self.pooling),
        ];
        for (key, value) in at_least_zero {
            if !(value.is_finite() && value >= 0.0) {
                return refuse(format!("{key}: expected a finite number of at least 0, got {value}"));
            }
        }
        if self.margin > 2.0 {
            return refuse(format!("margin: expected at most 2, the largest 1 - cos, got {}", self.margin));
        }
        if !(self.boundary_weight.is_finite() && self.boundary_weight > 0.0) {
            let got = self.boundary_weight;
            return refuse(format!("boundary_weight: expected a finite number above 0, got {got}"));
        }
        Ok(())
    }

    /// The weighted sum of the terms that are on, a scalar; none where none is.
    ///
    /// # Errors
    /// When operands do not agree, or stability is on and there is no checkpoint.
    pub fn on_gists(&self, of: &OnGists) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        let mut add = |weight: f64, term: &dyn Fn() -> Result<Tensor>| -> Result<()> {
            if weight != 0.0 {
                let weighted = (term()? * weight)?;
                sum = Some(match sum.take() {
                    None => weighted,
                    Some(sum) => (sum + weighted)?,
                });
            }
            Ok(())
        };
        add(self.contrastive, &|| contrastive(of.gists_ne, of.neighbours, self.margin))?;
        add(self.stability, &|| match of.checkpoint_ne {
            Some(checkpoint_ne) => stability(of.gists_ne, checkpoint_ne),
            None => refuse("stability: expected a checkpoint's gists of the same blocks, got none"),
        })?;
        add(self.pooling, &|| pooling(of.gists_ne, of.children_nke))?;
        Ok(sum)
    }

    /// How much each of `horizon` future positions counts: those at the ends as set, the others 1, all divided by their mean.
    /// So the weighted mean of NLLs stays a mean, in nats per position, and where every position is at an end nothing changes.
    pub fn position_weights(&self, horizon: usize) -> Vec<f32> {
        let ends = self.boundary_positions;
        let plain = |at: usize| {
            if at < ends || at + ends >= horizon { self.boundary_weight } else { 1.0 }
        };
        let mean = (0..horizon).map(plain).sum::<f64>() / horizon.max(1) as f64;
        (0..horizon).map(|at| (plain(at) / mean) as f32).collect()
    }
}

/// Mean over pairs of max(0, `margin` − (1 − cos)), a scalar; 0 without pairs.
///
/// # Errors
/// When a pair names a gist that there is none of.
pub fn contrastive(gists_ne: &Tensor, neighbours: &[[usize; 2]], margin: f64) -> Result<Tensor> {
    let n = gists_ne.dim(0)?;
    if let Some(pair) = neighbours.iter().find(|pair| pair.iter().any(|row| *row >= n)) {
        return refuse(format!("neighbours: expected rows below {n}, got {pair:?}"));
    }
    if neighbours.is_empty() {
        return Ok(Tensor::zeros((), DType::F32, &Device::Cpu)?);
    }
    let side = |which: usize| -> Result<Tensor> {
        let rows: Vec<u32> = neighbours.iter().map(|pair| pair[which] as u32).collect();
        let rows = Tensor::from_vec(rows, neighbours.len(), &Device::Cpu)?;
        Ok(gists_ne.index_select(&rows, 0)?)
    };
    let (a, b) = (side(0)?, side(1)?);
    let length = |x: &Tensor| -> Result<Tensor> { Ok((x.sqr()?.sum(D::Minus1)? + LENGTH_EPS)?.sqrt()?) };
    let cosine = ((&a * &b)?.sum(D::Minus1)? / (length(&a)? * length(&b)?)?)?;
    Ok((cosine + (margin - 1.0))?.relu()?.mean_all()?)
}

/// Mean over blocks of the squared distance to a checkpoint's gists, a scalar.
///
/// # Errors
/// When the shapes differ.
pub fn stability(gists_ne: &Tensor, checkpoint_ne: &Tensor) -> Result<Tensor> {
    if gists_ne.dims() != checkpoint_ne.dims() {
        let (expected, got) = (gists_ne.dims(), checkpoint_ne.dims());
        return refuse(format!("stability: expected a checkpoint's gists {expected:?}, got {got:?}"));
    }
    Ok((gists_ne - checkpoint_ne.detach())?.sqr()?.sum(D::Minus1)?.mean_all()?)
}

/// Mean squared difference between gists and the means of their blocks, a scalar.
///
/// # Errors
/// When there are not as many blocks as gists, or not as wide.
pub fn pooling(gists_ne: &Tensor, children_nke: &Tensor) -> Result<Tensor> {
    let mean_ne = children_nke.detach().mean(1)?;
    if gists_ne.dims() != mean_ne.dims() {
        let (expected, got) = (gists_ne.dims(), children_nke.dims());
        return refuse(format!("pooling: expected blocks of gists {expected:?}, got {got:?}"));
    }
    Ok((gists_ne - mean_ne)?.sqr()?.mean_all()?)
}

fn refuse<T>(message: impl Into<String>) -> Result<T> {
    Err(BaseError::network(NETWORK, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(config: LossConfig, what: &str) {
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains(what), "expected {what:?} in {error:?}");
    }

    #[test]
    fn everything_is_off_by_default() {
        let gists = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
        let children = Tensor::ones((2, 4, 3), DType::F32, &Device::Cpu).unwrap();
        let of =
            OnGists { gists_ne: &gists, children_nke: &children, neighbours: &[[0, 1]], checkpoint_ne: None };
        assert!(LossConfig::default().on_gists(&of).unwrap().is_none());
        assert_eq!(LossConfig::default().position_weights(5), [1.0; 5]);
    }

    #[test]
    fn positions_at_the_ends_count_more_and_the_mean_stays() {
        let config = LossConfig { boundary_weight: 2.0, boundary_positions: 2, ..LossConfig::default() };
        let weights = config.position_weights(8);
        assert_eq!(
            weights.iter().map(|w| (w * 12.0).round() as u32).collect::<Vec<_>>(),
            [16, 16, 8, 8, 8, 8, 16, 16]
        );
        assert!((weights.iter().sum::<f32>() - 8.0).abs() < 1e-5);
        assert_eq!(config.position_weights(4), [1.0; 4]);
    }

    #[test]
    fn weights_below_zero_are_refused() {
        refused(
            LossConfig { stability: -0.1, ..LossConfig::default() },
            "stability: expected a finite number of at least 0, got -0.1",
        );
    }

    #[test]
    fn a_weight_that_is_no_number_is_refused() {
        refused(LossConfig { pooling: f64::NAN, ..LossConfig::default() }, "pooling: expected a finite");
    }

    #[test]
    fn a_margin_that_no_pair_reaches_is_refused() {
        refused(LossConfig { margin: 2.5, ..LossConfig::default() }, "margin: expected at most 2");
    }

    #[test]
    fn ends_that_count_nothing_are_refused() {
        refused(LossConfig { boundary_weight: 0.0, ..LossConfig::default() }, "boundary_weight: expected");
    }

    #[test]
    fn neighbours_that_there_are_none_of_are_refused() {
        let gists = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
        let error = contrastive(&gists, &[[1, 2]], 0.2).unwrap_err().to_string();
        assert!(error.contains("neighbours: expected rows below 2, got [1, 2]"), "{error}");
    }

    #[test]
    fn a_checkpoints_gists_of_other_blocks_are_refused() {
        let gists = |n| Tensor::ones((n, 3), DType::F32, &Device::Cpu).unwrap();
        let error = stability(&gists(2), &gists(3)).unwrap_err().to_string();
        assert!(error.contains("expected a checkpoint's gists [2, 3], got [3, 3]"), "{error}");
    }

    #[test]
    fn stability_without_a_checkpoint_is_refused() {
        let gists = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
        let children = Tensor::ones((2, 4, 3), DType::F32, &Device::Cpu).unwrap();
        let of = OnGists { gists_ne: &gists, children_nke: &children, neighbours: &[], checkpoint_ne: None };
        let error = LossConfig { stability: 0.01, ..LossConfig::default() }.on_gists(&of).unwrap_err();
        assert!(error.to_string().contains("stability: expected a checkpoint's gists"), "{error}");
    }
}
