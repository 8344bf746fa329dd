//! How far scores can be trusted: held against what edits were measured to be worth, and against what a context allows.
//!
//! Source: the validation of LensNet in MegaContext's documents, which name these and define few of them. Here:
//!   ranking     of pairs of entries with y_i > y_j + 0.1, the part with u_i > u_j; equal scores count one half;
//!   Pearson     the correlation of scores and utilities of all entries that have one;
//!   agreement   of pairs of variants, the part in which the worse one's scores point to the better one (mean of u·sign t > 0);
//!   balance     |P − N|/(P + N), P = Σ (K−1)·max(u, 0) where an entry can be expanded, N = Σ (K−1)/K·max(−u, 0) where it can
//!               be collapsed: 0 asks for as many entries as it gives back, 1 does one alone;
//!   legality    of all entries, the part that asks for nothing impossible: no token above τ, none of the topmost level
//!               below −τ.
//!
//! Shapes: one value for each entry. Everything in f64. Errors: none; a metric of too little is none.

/// How much further apart two utilities are when their order counts.
pub const APART: f64 = 0.1;

/// A part of a number of cases, over several contexts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Part {
    /// Cases for it; a half where it is neither.
    pub holds: f64,
    /// All cases.
    pub of: usize,
}

impl Part {
    /// The part; none of no cases.
    pub fn rate(self) -> Option<f64> {
        (self.of > 0).then(|| self.holds / self.of as f64)
    }
}

impl std::ops::AddAssign for Part {
    fn add_assign(&mut self, other: Self) {
        self.holds += other.holds;
        self.of += other.of;
    }
}

/// Pairs of one context's entries that scores rank as their utilities do; entries without one take no part.
pub fn ranking(scores: &[f32], utilities: &[Option<f64>]) -> Part {
    let known: Vec<(f32, f64)> =
        scores.iter().zip(utilities).filter_map(|(u, y)| Some((*u, (*y)?))).collect();
    let mut part = Part::default();
    for (high, better) in &known {
        for (low, _) in known.iter().filter(|(_, worse)| *better > worse + APART) {
            part.of += 1;
            part.holds += if high > low {
                1.0
            } else if high == low {
                0.5
            } else {
                0.0
            };
        }
    }
    part
}

/// Pearson's correlation of pairs; none of fewer than two, or where one side is constant.
pub fn pearson(pairs: &[[f64; 2]]) -> Option<f64> {
    let centre = [0, 1].map(|side| mean(&pairs.iter().map(|pair| pair[side]).collect::<Vec<_>>()));
    let sum = |a: usize, b: usize| {
        pairs.iter().map(|pair| (pair[a] - centre[a]) * (pair[b] - centre[b])).sum::<f64>()
    };
    let spread = (sum(0, 0) * sum(1, 1)).sqrt();
    (pairs.len() > 1 && spread > 0.0).then(|| sum(0, 1) / spread)
}

/// Pairs of variants that scores agree with, from each one's mean of u·sign t ([`crate::preference::PairTerms`]).
pub fn agreement(alignments: &[f64]) -> Part {
    Part { holds: alignments.iter().filter(|a| **a > 0.0).count() as f64, of: alignments.len() }
}

/// How one-sided the scores of one context are; none where they ask for nothing.
pub fn budget_balance(scores: &[f32], lod: &[u8], block: usize, max_lod: u8) -> Option<f64> {
    let grows = (block - 1) as f64;
    let sum = |sign: f32, legal: &dyn Fn(u8) -> bool| -> f64 {
        let legal = scores.iter().zip(lod).filter(|(_, lod)| legal(**lod));
        legal.map(|(u, _)| f64::from((sign * u).max(0.0))).sum()
    };
    let added = grows * sum(1.0, &|lod| lod > 0);
    let freed = grows / block as f64 * sum(-1.0, &|lod| lod < max_lod);
    (added + freed > 0.0).then(|| (added - freed).abs() / (added + freed))
}

/// Entries of one context whose scores, before a mask, ask for nothing impossible beyond `threshold` (τ).
pub fn legality(scores: &[f32], lod: &[u8], max_lod: u8, threshold: f32) -> Part {
    let impossible =
        |(u, lod): &(&f32, &u8)| (**lod == 0 && **u > threshold) || (**lod >= max_lod && **u < -threshold);
    let illegal = scores.iter().zip(lod).filter(impossible).count();
    Part { holds: (scores.len() - illegal) as f64, of: scores.len() }
}

/// 0 of nothing.
pub fn mean(values: &[f64]) -> f64 {
    // A sum of nothing is −0 in Rust.
    (0.0 + values.iter().sum::<f64>()) / values.len().max(1) as f64
}

/// The value below which a part `q` in [0, 1] of all lies, linear between two of them; none of nothing.
pub fn quantile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    let place = q.clamp(0.0, 1.0) * last as f64;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    Some(sorted[below] + (sorted[above] - sorted[below]) * place.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranking_counts_pairs_that_are_apart() {
        // Pairs apart: (0.5, 0.3), (0.5, 0.0), (0.3, 0.0). Scores put the first right, tie the second, the third wrong.
        let utilities = [Some(0.5), Some(0.3), None, Some(0.0), Some(0.45)];
        let part = ranking(&[0.2, 0.1, 0.9, 0.2, 0.2], &utilities);
        // With 0.45: (0.45, 0.3) right, (0.45, 0.0) tied; 0.5 and 0.45 are too close.
        assert_eq!(part, Part { holds: 3.0, of: 5 });
        assert_eq!(part.rate(), Some(0.6));
        assert_eq!(ranking(&[1.0, 0.0], &[Some(0.1), Some(0.05)]).rate(), None);
    }

    #[test]
    fn parts_add_up_over_contexts() {
        let mut sum = Part { holds: 1.5, of: 2 };
        sum += Part { holds: 1.0, of: 3 };
        assert_eq!(sum.rate(), Some(0.5));
    }

    #[test]
    fn correlation_of_five_points() {
        // x̄ = 3, ȳ = 3.6; Σdxdy = 6, Σdx² = 10, Σdy² = 9.2.
        let pairs = [[1.0, 2.0], [2.0, 4.0], [3.0, 3.0], [4.0, 4.0], [5.0, 5.0]];
        assert!((pearson(&pairs).unwrap() - 6.0 / 52f64.sqrt()).abs() < 1e-12);
        assert!((pearson(&[[0.0, 3.0], [1.0, 1.0]]).unwrap() + 1.0).abs() < 1e-12);
        assert_eq!(pearson(&[[0.0, 3.0], [0.0, 1.0]]), None);
        assert_eq!(pearson(&[[0.0, 3.0]]), None);
    }

    #[test]
    fn agreement_is_a_mean_above_zero() {
        assert_eq!(agreement(&[0.1, -0.2, 0.0, 0.4]).rate(), Some(0.5));
        assert_eq!(agreement(&[]).rate(), None);
    }

    #[test]
    fn balance_counts_what_can_be_done() {
        // K 4: added 3·(0.5 + 0.25) = 2.25, freed 0.75·(1 + 0.5) = 1.125; the token's wish and the topmost's count nothing.
        let balance = budget_balance(&[0.5, 0.25, -1.0, -0.5, 0.9, -0.9], &[1, 2, 0, 1, 0, 2], 4, 2).unwrap();
        assert!((balance - 1.125 / 3.375).abs() < 1e-12);
        assert_eq!(budget_balance(&[0.5], &[1], 4, 2), Some(1.0));
        assert_eq!(budget_balance(&[0.5, 0.0], &[0, 1], 4, 2), None);
    }

    #[test]
    fn legality_is_of_all_entries() {
        let (scores, lod) = ([0.5, -0.5, 0.5, -0.5, 0.1], [0, 0, 2, 2, 0]);
        assert_eq!(legality(&scores, &lod, 2, 0.2).rate(), Some(0.6));
        assert_eq!(legality(&scores, &lod, 2, 0.0).rate(), Some(0.4));
    }

    #[test]
    fn quantiles_lie_between_values() {
        let values = [0.33, 0.99, -0.2, 0.33];
        assert!((quantile(&values, 0.95).unwrap() - 0.891).abs() < 1e-12);
        assert_eq!((quantile(&values, 0.0), quantile(&values, 1.0)), (Some(-0.2), Some(0.99)));
        assert_eq!(quantile(&[], 0.5), None);
    }
}
