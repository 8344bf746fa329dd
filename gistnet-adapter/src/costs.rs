//! What blocks cost, one by one, and what can be said of their mean.
//!
//! Blocks of one passage lie under the same text and are not independent; passages are what was drawn. So the standard error
//! counts passages: with s_i the sum over the n_i blocks of passage i, N = Σ n_i and m = Σ s_i / N,
//!   e² = c/(c − 1) · Σ (s_i − m·n_i)² / N²   over c passages
//! (Cochran 1977, Sampling Techniques, 6.3: the error of a ratio of sums). Two stand-ins are compared on the same blocks, by the
//! differences of their costs: blocks differ among themselves far more than stand-ins do.
//!
//! Units: nats per token. Left out on purpose: what another seed or another network would give.

use serde::{Deserialize, Serialize};

use crate::delta_nll::RowLoss;

/// A mean over blocks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// Its standard error over passages; none for fewer than two of them.
    pub error: Option<f64>,
}

/// ΔNLL@H of every measured block, by passage, in the order of passages and blocks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Costs(Vec<Vec<f64>>);

impl Costs {
    /// Adds the blocks of a passage.
    pub fn add(&mut self, rows: &[RowLoss]) {
        self.0.push(rows.iter().map(RowLoss::delta).collect());
    }

    /// Of given values.
    pub fn of(by_passage: Vec<Vec<f64>>) -> Self {
        Self(by_passage)
    }

    /// By passage.
    pub fn by_passage(&self) -> &[Vec<f64>] {
        &self.0
    }

    /// Of all blocks.
    pub fn values(&self) -> impl Iterator<Item = f64> + '_ {
        self.0.iter().flatten().copied()
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.0.iter().map(Vec::len).sum()
    }

    /// Their mean; none of none.
    pub fn mean(&self) -> Option<Mean> {
        let n = self.blocks() as f64;
        if n == 0.0 {
            return None;
        }
        let mean = self.values().sum::<f64>() / n;
        let with: Vec<&Vec<f64>> = self.0.iter().filter(|passage| !passage.is_empty()).collect();
        let off = |passage: &&Vec<f64>| passage.iter().map(|cost| cost - mean).sum::<f64>().powi(2);
        let c = with.len() as f64;
        let error = (with.len() > 1).then(|| (c / (c - 1.0) * with.iter().map(off).sum::<f64>()).sqrt() / n);
        Some(Mean { mean, error })
    }

    /// The mean of what these cost more than others on the same blocks; none where they are not the same blocks.
    pub fn less(&self, other: &Self) -> Option<Mean> {
        let same =
            self.0.len() == other.0.len() && self.0.iter().zip(&other.0).all(|(a, b)| a.len() == b.len());
        if !same {
            return None;
        }
        let passage = |(a, b): (&Vec<f64>, &Vec<f64>)| a.iter().zip(b).map(|(a, b)| a - b).collect();
        Self(self.0.iter().zip(&other.0).map(passage).collect()).mean()
    }
}

/// 1 − cost / cost of deletion; none where deletion costs nothing, so that there is nothing to recover.
pub fn recovered(cost: f64, deleted: f64) -> Option<f64> {
    (deleted > 0.0 && cost.is_finite() && deleted.is_finite()).then(|| 1.0 - cost / deleted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_counts_passages() {
        let costs = Costs::of(vec![vec![1.0, 2.0], vec![4.0], vec![0.5, 0.5, 1.0]]);
        let found = costs.mean().unwrap();
        // By hand: N 6, m 1.5; sums less m·n: 0, 2.5, −2.5; e² = 3/2 · 12.5 / 36.
        assert!((found.mean - 1.5).abs() < 1e-12);
        assert!((found.error.unwrap() - (1.5f64 * 12.5).sqrt() / 6.0).abs() < 1e-12);
    }

    #[test]
    fn blocks_of_one_each_have_the_usual_error() {
        let values = [0.3, -0.2, 0.9, 1.4];
        let found = Costs::of(values.iter().map(|v| vec![*v]).collect()).mean().unwrap();
        let spread: f64 = values.iter().map(|v| (v - 0.6f64).powi(2)).sum();
        assert!((found.mean - 0.6).abs() < 1e-12);
        assert!((found.error.unwrap() - (spread / 3.0 / 4.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn a_difference_is_that_of_the_same_blocks() {
        let (a, b) = (vec![vec![1.0, 5.0], vec![2.0]], vec![vec![0.75, 4.75], vec![1.75]]);
        let found = Costs::of(a.clone()).less(&Costs::of(b)).unwrap();
        assert!((found.mean - 0.25).abs() < 1e-12 && found.error.unwrap() < 1e-12);
        assert!(Costs::of(a.clone()).less(&Costs::of(vec![vec![1.0], vec![5.0, 2.0]])).is_none());
        assert!(Costs::of(a).less(&Costs::default()).is_none());
    }

    #[test]
    fn one_passage_has_no_error_and_none_no_mean() {
        assert_eq!(Costs::of(vec![vec![1.0, 3.0], vec![]]).mean(), Some(Mean { mean: 2.0, error: None }));
        assert_eq!(Costs::of(vec![vec![]]).mean(), None);
    }

    #[test]
    fn where_deletion_costs_nothing_there_is_nothing_to_recover() {
        assert_eq!(recovered(0.25, 1.0), Some(0.75));
        assert_eq!(recovered(1.5, 1.0), Some(-0.5));
        for deleted in [0.0, -0.1, f64::NAN] {
            assert_eq!(recovered(0.25, deleted), None);
        }
        assert_eq!(recovered(f64::NAN, 1.0), None);
    }
}
