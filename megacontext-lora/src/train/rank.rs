//! Which LoRA rank to take, from the losses of several on the same held-out documents.
//!
//! Source: the one-standard-error rule (Breiman et al. 1984, Classification and Regression Trees, 3.4.3): of all models
//! that cannot be told from the best, take the smallest. Ranks are compared document by document, since documents differ
//! far more among themselves than ranks do: with s_i the difference of the two losses on document i in nats, t_i its
//! tokens, N = Σ t_i and d = Σ s_i / N the difference in nats per token, the standard error of d as a ratio of sums is
//!
//!   e² = n / (n − 1) · Σ (s_i − d·t_i)² / N²
//!
//! over n documents (Cochran 1977, Sampling Techniques, 6.3). The margin of a rank is one e of its difference to the best
//! rank. A single document has no spread: then the margin is 0 and the best rank is taken.
//!
//! What this does not see: another seed, more steps. The margin says what the text can tell, not what training varies by.
//!
//! Units: nats per token.

use serde::{Deserialize, Serialize};

use crate::run::summary::DocumentLoss;

/// The rule in a sentence, for reports.
pub const RULE: &str = "the smallest rank whose held-out loss is within its margin of the best rank's; the margin is one \
                        standard error of the difference to the best, over the evaluated documents";

/// How a rank compares with the best one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Standing {
    /// The rank.
    pub rank: usize,
    /// Mean loss.
    pub loss: f64,
    /// Loss above the best rank's.
    pub behind: f64,
    /// One standard error of that; none for the best rank itself and where there is one document only.
    pub margin: Option<f64>,
    /// Cannot be told from the best.
    pub within: bool,
}

/// The rank to take, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// The rank to take.
    pub rank: usize,
    /// The rank with the lowest loss.
    pub best: usize,
    /// In words.
    pub reason: String,
    /// All ranks, ascending.
    pub standings: Vec<Standing>,
}

/// Mean loss over documents.
pub fn mean_loss(losses: &[DocumentLoss]) -> f64 {
    let tokens: u64 = losses.iter().map(|l| l.tokens).sum();
    losses.iter().map(|l| l.nll).sum::<f64>() / tokens as f64
}

/// One standard error of the difference of two mean losses on the same documents; none for fewer than two documents.
fn standard_error(one: &[DocumentLoss], other: &[DocumentLoss]) -> Option<f64> {
    let n = one.len() as f64;
    if one.len() < 2 {
        return None;
    }
    let tokens: f64 = one.iter().map(|l| l.tokens as f64).sum();
    let differences = || one.iter().zip(other).map(|(a, b)| (a.nll - b.nll, a.tokens as f64));
    let mean = differences().map(|(s, _)| s).sum::<f64>() / tokens;
    let spread: f64 = differences().map(|(s, t)| (s - mean * t).powi(2)).sum();
    Some((n / (n - 1.0) * spread).sqrt() / tokens)
}

/// Applies the rule. `ranks` are ascending, their losses those of the same documents in the same order; none for no ranks.
pub fn choose(ranks: &[(usize, &[DocumentLoss])]) -> Option<Choice> {
    let loss = |at: usize| mean_loss(ranks[at].1);
    let best = (0..ranks.len()).min_by(|a, b| loss(*a).total_cmp(&loss(*b)))?;
    let standings: Vec<Standing> = (0..ranks.len())
        .map(|at| {
            let behind = loss(at) - loss(best);
            let margin = if at == best { None } else { standard_error(ranks[at].1, ranks[best].1) };
            let within = at == best || behind <= margin.unwrap_or(0.0);
            Standing { rank: ranks[at].0, loss: loss(at), behind, margin, within }
        })
        .collect();
    let chosen = standings.iter().find(|s| s.within)?;
    let (first, last) = (standings.first()?.rank, standings.last()?.rank);
    let lowest = standings[best];
    let mut reason = match (chosen.rank == lowest.rank, chosen.margin) {
        (true, _) if first == lowest.rank => format!("rank {first}, the smallest tried, has the lowest loss"),
        (true, _) => format!(
            "rank {} has the lowest loss, and every smaller one is behind it by more than its margin",
            lowest.rank
        ),
        (false, margin) => format!(
            "rank {} has the lowest loss; rank {} is {:.4} nats per token behind it, within its margin of {:.4}, and no \
             smaller one is within its own",
            lowest.rank,
            chosen.rank,
            chosen.behind,
            margin.unwrap_or(0.0)
        ),
    };
    if ranks[best].1.len() < 2 {
        reason +=
            "; one evaluated document has no spread, so the margin is 0: more documents would tell more";
    } else if first < last && chosen.rank == last {
        reason += "; it is the largest tried: a larger one may do better still";
    } else if first < last && chosen.rank == first {
        reason += "; a smaller one may do as well";
    }
    Some(Choice { rank: chosen.rank, best: lowest.rank, reason, standings })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Documents of these tokens, each losing `mean` and something of its own.
    fn losses(mean: f64, own: &[(u64, f64)]) -> Vec<DocumentLoss> {
        own.iter()
            .map(|(tokens, own)| DocumentLoss { tokens: *tokens, nll: *tokens as f64 * (mean + own) })
            .collect()
    }

    /// Documents of very different difficulty, as in life.
    const HARD: [f64; 4] = [2.0, -1.0, 0.5, -1.5];

    fn with(mean: f64, noise: [f64; 4]) -> Vec<DocumentLoss> {
        let own: Vec<(u64, f64)> = (0..4).map(|i| (100 + 50 * i as u64, HARD[i] + noise[i])).collect();
        losses(mean, &own)
    }

    fn chosen(ranks: &[(usize, Vec<DocumentLoss>)]) -> Choice {
        let borrowed: Vec<(usize, &[DocumentLoss])> = ranks.iter().map(|(r, l)| (*r, &l[..])).collect();
        choose(&borrowed).unwrap()
    }

    #[test]
    fn the_error_is_that_of_the_paired_difference() {
        // Equal lengths: the textbook standard error of four differences 0.1, 0.3, 0.1, 0.3 is 0.1155 / 2.
        let own =
            |noise: [f64; 4]| -> Vec<(u64, f64)> { (0..4).map(|i| (100, HARD[i] + noise[i])).collect() };
        let error =
            standard_error(&losses(3.0, &own([0.1, 0.3, 0.1, 0.3])), &losses(3.0, &own([0.0; 4]))).unwrap();
        assert!((error - (0.04f64 / 3.0).sqrt() / 2.0).abs() < 1e-12, "{error}");
        // The same difference everywhere is known exactly, however different the documents.
        assert!(standard_error(&with(3.2, [0.0; 4]), &with(3.0, [0.0; 4])).unwrap() < 1e-12);
    }

    #[test]
    fn a_smaller_rank_within_its_margin_is_taken() {
        let choice = chosen(&[
            (4, with(3.2, [0.0; 4])),
            (8, with(3.001, [0.05, -0.05, 0.04, -0.02])),
            (16, with(3.0, [0.0; 4])),
        ]);
        assert_eq!((choice.rank, choice.best), (8, 16));
        assert_eq!(choice.standings.iter().map(|s| s.within).collect::<Vec<_>>(), [false, true, true]);
        assert!(
            choice.reason.contains("rank 8 is") && choice.reason.contains("within its margin"),
            "{choice:?}"
        );
    }

    #[test]
    fn a_small_but_certain_difference_counts() {
        let choice =
            chosen(&[(4, with(3.01, [0.0; 4])), (8, with(3.0, [0.0; 4])), (16, with(3.05, [0.0; 4]))]);
        assert_eq!((choice.rank, choice.best), (8, 8));
        assert!(choice.reason.contains("every smaller one is behind"), "{choice:?}");
    }

    #[test]
    fn the_ends_of_the_range_are_pointed_out() {
        let falling = chosen(&[(4, with(3.2, [0.0; 4])), (8, with(3.0, [0.0; 4]))]);
        assert!(falling.rank == 8 && falling.reason.contains("a larger one may do better"), "{falling:?}");
        let flat = chosen(&[(4, with(3.0, [0.0; 4])), (8, with(3.1, [0.0; 4]))]);
        assert!(flat.rank == 4 && flat.reason.contains("a smaller one may do as well"), "{flat:?}");
    }

    #[test]
    fn one_document_has_no_margin() {
        let one = |mean: f64| losses(mean, &[(100, 0.0)]);
        let choice = chosen(&[(4, one(3.0001)), (8, one(3.0))]);
        assert_eq!(choice.rank, 8);
        assert_eq!(choice.standings[0].margin, None);
        assert!(choice.reason.contains("one evaluated document"), "{choice:?}");
    }

    #[test]
    fn equal_losses_take_the_smallest_and_nothing_takes_nothing() {
        assert_eq!(chosen(&[(4, with(3.0, [0.0; 4])), (8, with(3.0, [0.0; 4]))]).rank, 4);
        assert!(choose(&[]).is_none());
    }
}
