//! Count-based baselines for held-out loss: unigram to 5-gram, with back-off to shorter contexts.
//!
//! Source: interpolated Kneser–Ney smoothing with three discounts per order ("modified", Chen and Goodman
//! 1999, section 3), the strongest of the classical n-gram models. For an n-gram (c, w), context c of n−1
//! tokens, with c' = c without its first:
//!
//! ```text
//! p_n(w | c) = max(a(c,w) − D(a(c,w)), 0) / A(c) + γ(c) · p_{n−1}(w | c'),      A(c) = Σ_w a(c,w)
//! γ(c)       = (D1·N1(c) + D2·N2(c) + D3·N3+(c)) / A(c),                        p_0 = 1 / vocabulary
//! ```
//!
//! a is the count at the highest order and the number of different left neighbours below it; N1, N2, N3+
//! count the words seen once, twice, more often after c; the discounts come from the counts of counts of the
//! order. A context that was never seen takes p_{n−1} as it is. So the probabilities after any context sum to
//! one, and none is zero.
//!
//! Storage: an n-gram is a `u64` of 12 bits per token, the last one lowest; each order is a sorted array of
//! these and one of their counts, so a context is a range found by bisection. 12 bytes per different n-gram
//! of each order; training sorts 8 bytes per token of text once per order.
//!
//! Units: nats. Errors: [`Kind::Usage`] for an order beyond 5, a vocabulary beyond 4096, no text, a token
//! outside the vocabulary. Left out: pruning, larger vocabularies, document borders in training (the text is
//! one run, EOS a token of it).
//!
//! [`Kind::Usage`]: crate::error::Kind::Usage

use rayon::prelude::*;

use crate::error::{PluginError, Result};

const BITS: u32 = 12;
const MAX_ORDER: usize = 5;
/// Largest vocabulary: a token has 12 bits in a key.
pub const MAX_VOCABULARY: usize = 1 << BITS;

/// A trained model.
#[derive(Debug)]
pub struct Ngram {
    /// `orders[n - 1]` holds the n-grams.
    orders: Vec<Order>,
    vocabulary: usize,
}

/// All n-grams of one length.
#[derive(Debug)]
struct Order {
    /// Ascending.
    keys: Vec<u64>,
    /// Of each key: occurrences (highest order) or different left neighbours.
    counts: Vec<u32>,
    /// What is taken from a count of 1, of 2, of 3 and more.
    discounts: [f64; 3],
}

impl Ngram {
    /// Counts the n-grams of `tokens` up to length `order`; `vocabulary` is how many different tokens there
    /// can be.
    pub fn train(tokens: &[u32], order: usize, vocabulary: usize) -> Result<Self> {
        if !(1..=MAX_ORDER).contains(&order) || !(1..=MAX_VOCABULARY).contains(&vocabulary) {
            return Err(PluginError::usage(format!(
                "n-gram baseline: expected an order of 1 to {MAX_ORDER} and a vocabulary of 1 to {MAX_VOCABULARY}, \
                 got order {order}, vocabulary {vocabulary}"
            )));
        }
        if tokens.len() < order {
            return Err(PluginError::usage(format!(
                "n-gram baseline: expected at least {order} tokens of text for order {order}, got {}",
                tokens.len()
            )));
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(PluginError::usage(format!(
                "n-gram baseline: expected tokens below the vocabulary of {vocabulary}, got {token}"
            )));
        }
        let pack = |gram: &[u32]| gram.iter().fold(0, |key, &token| key << BITS | u64::from(token));
        let mut highest: Vec<u64> = tokens.par_windows(order).map(pack).collect();
        highest.par_sort_unstable();
        let mut orders = vec![Order::count(highest)];
        for length in (1..order).rev() {
            // Each different (length + 1)-gram is one left neighbour of the n-gram that remains without its
            // first token.
            let mask = (1u64 << (BITS * length as u32)) - 1;
            let above = &orders[orders.len() - 1].keys;
            let mut keys: Vec<u64> = above.par_iter().map(|key| key & mask).collect();
            keys.par_sort_unstable();
            orders.push(Order::count(keys));
        }
        orders.reverse();
        Ok(Self { orders, vocabulary })
    }

    /// The probability of `token` after `context`, of which the last `order − 1` tokens count. It is zero for
    /// a token outside the vocabulary, and a context reaches back to the last such token at most.
    pub fn probability(&self, context: &[u32], token: u32) -> f64 {
        let outside = |token: &u32| *token as usize >= self.vocabulary;
        if outside(&token) {
            return 0.0;
        }
        let context = &context[context.iter().rposition(outside).map_or(0, |at| at + 1)..];
        let longest = context.len().min(self.orders.len() - 1);
        let mut probability = 1.0 / self.vocabulary as f64;
        for (length, order) in self.orders.iter().take(longest + 1).enumerate() {
            let context = context[context.len() - length..]
                .iter()
                .fold(0, |key, &token| key << BITS | u64::from(token));
            match order.interpolate(context, token, probability) {
                Some(better) => probability = better,
                // A context that was never seen is not the end of one that was.
                None => break,
            }
        }
        probability
    }

    /// Mean negative log-likelihood in nats of every token of the documents but each one's first. To have
    /// those scored too, put EOS in front of the documents.
    ///
    /// Infinite when a token lies outside the vocabulary, NaN when there is none to score.
    pub fn nll_per_token(&self, documents: &[Vec<u32>]) -> f64 {
        let sums: Vec<(f64, usize)> = documents
            .par_iter()
            .map(|document| {
                let nll = |at: usize| {
                    let from = at.saturating_sub(self.orders.len() - 1);
                    -self.probability(&document[from..at], document[at]).ln()
                };
                ((1..document.len()).map(nll).sum(), document.len().saturating_sub(1))
            })
            .collect();
        // Added up in the order of the documents: the same bits at any thread count.
        let (nats, tokens) = sums.into_iter().fold((0.0, 0), |(nats, n), (more, m)| (nats + more, n + m));
        nats / tokens as f64
    }
}

impl Order {
    /// Counts equal neighbours of sorted keys.
    fn count(sorted: Vec<u64>) -> Self {
        let mut keys = sorted;
        let mut counts: Vec<u32> = Vec::new();
        let mut kept = 0;
        for at in 0..keys.len() {
            if kept > 0 && keys[kept - 1] == keys[at] {
                counts[kept - 1] = counts[kept - 1].saturating_add(1);
            } else {
                keys[kept] = keys[at];
                counts.push(1);
                kept += 1;
            }
        }
        keys.truncate(kept);
        keys.shrink_to_fit();
        let mut of_counts = [0.0f64; 4];
        for &count in counts.iter().filter(|&&count| count <= 4) {
            of_counts[count as usize - 1] += 1.0;
        }
        Self { keys, counts, discounts: discounts(of_counts) }
    }

    /// The probability of `token` at this order, given that of the order below; `None` after an unseen
    /// context.
    fn interpolate(&self, context: u64, token: u32, below: f64) -> Option<f64> {
        let first = context << BITS;
        let from = self.keys.partition_point(|&key| key < first);
        // Ranges are short but for the shortest contexts: look for the end nearby first.
        let mut reach = 16;
        while from + reach < self.keys.len() && self.keys[from + reach] >> BITS == context {
            reach *= 2;
        }
        let rest = &self.keys[from..self.keys.len().min(from + reach)];
        let keys = &rest[..rest.partition_point(|&key| key >> BITS == context)];
        if keys.is_empty() {
            return None;
        }
        let counts = &self.counts[from..from + keys.len()];
        let (mut total, mut taken) = (0u64, 0.0);
        for &count in counts {
            total += u64::from(count);
            taken += self.discount(count);
        }
        let seen = keys
            .binary_search(&(first | u64::from(token)))
            .map_or(0.0, |at| f64::from(counts[at]) - self.discount(counts[at]));
        Some((seen + taken * below) / total as f64)
    }

    fn discount(&self, count: u32) -> f64 {
        self.discounts[count.clamp(1, 3) as usize - 1]
    }
}

/// Chen and Goodman's equation 26, `of_counts[i]` being how many n-grams have a count of i + 1. Too few
/// n-grams can make the estimates undefined or leave their range: these become 0.5, 1, 1.5.
fn discounts(of_counts: [f64; 4]) -> [f64; 3] {
    let [n1, n2, ..] = of_counts;
    let y = n1 / (n1 + 2.0 * n2);
    std::array::from_fn(|i| {
        let count = i as f64 + 1.0;
        let estimate = count - (count + 1.0) * y * of_counts[i + 1] / of_counts[i];
        // Not a number fails both comparisons.
        if estimate > 0.0 && estimate < count { estimate } else { count / 2.0 }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use megacontext_base::random::Random;
    use std::collections::{HashMap, HashSet};

    /// Text of a Markov chain: each token makes its neighbours likely.
    fn text(length: usize, vocabulary: usize, seed: u64) -> Vec<u32> {
        let mut random = Random::new(seed);
        let mut last = 0;
        (0..length)
            .map(|_| {
                last =
                    if random.unit() < 0.7 { last * 3 + random.below(3) } else { random.below(vocabulary) }
                        % vocabulary;
                last as u32
            })
            .collect()
    }

    #[test]
    fn probabilities_sum_to_one_after_any_context() {
        let vocabulary = 13;
        let tokens = text(3000, vocabulary - 1, 1); // the last token never occurs
        for order in 1..=5 {
            let model = Ngram::train(&tokens, order, vocabulary).unwrap();
            let unseen = [12, 12, 12, 12];
            let mixed = [tokens[5], 12, tokens[6], tokens[7]];
            for context in [&tokens[100..104], &tokens[2996..], &tokens[..2], &[], &unseen, &mixed] {
                let sum: f64 = (0..vocabulary as u32).map(|token| model.probability(context, token)).sum();
                assert!((sum - 1.0).abs() < 1e-12, "order {order}, {context:?}: {sum}");
                assert!((0..vocabulary as u32).all(|token| model.probability(context, token) > 0.0));
            }
        }
    }

    #[test]
    fn bigrams_equal_the_formula_on_hash_maps() {
        let tokens = text(500, 20, 2);
        let model = Ngram::train(&tokens, 2, 20).unwrap();
        let mut bigrams: HashMap<(u32, u32), f64> = HashMap::new();
        tokens.windows(2).for_each(|pair| *bigrams.entry((pair[0], pair[1])).or_default() += 1.0);
        let of_counts = |counts: &[f64]| {
            std::array::from_fn(|i| counts.iter().filter(|&&c| c == i as f64 + 1.0).count() as f64)
        };
        let neighbours: Vec<f64> =
            (0..20).map(|w| bigrams.keys().filter(|pair| pair.1 == w).count() as f64).collect();
        let high = discounts(of_counts(&bigrams.values().copied().collect::<Vec<_>>()));
        let low = discounts(of_counts(&neighbours));
        let take = |d: [f64; 3], count: f64| if count == 0.0 { 0.0 } else { d[(count as usize).min(3) - 1] };
        let kinds: f64 = neighbours.iter().sum();
        let low_mass: f64 = neighbours.iter().map(|&count| take(low, count)).sum();
        for context in 0..20 {
            let counts: Vec<f64> =
                (0..20).map(|w| bigrams.get(&(context, w)).copied().unwrap_or(0.0)).collect();
            let total: f64 = counts.iter().sum();
            let mass: f64 = counts.iter().map(|&count| take(high, count)).sum();
            for w in 0..20 {
                let unigram = (neighbours[w] - take(low, neighbours[w]) + low_mass / 20.0) / kinds;
                let expected = (counts[w] - take(high, counts[w]) + mass * unigram) / total;
                let got = model.probability(&[7, context], w as u32);
                assert!((got - expected).abs() < 1e-12, "{context} {w}: {got} {expected}");
            }
        }
    }

    #[test]
    fn n_grams_are_all_there() {
        let tokens = text(2000, 50, 3);
        let model = Ngram::train(&tokens, 5, 50).unwrap();
        for (order, n) in model.orders.iter().zip(1..) {
            let different: HashSet<&[u32]> = tokens.windows(n).skip(5 - n).collect();
            assert_eq!(order.keys.len(), different.len(), "{n}-grams");
            assert!(order.keys.is_sorted());
        }
        assert_eq!(model.orders[4].counts.iter().sum::<u32>(), 1996);
    }

    #[test]
    fn longer_contexts_help_on_text_with_structure() {
        let (train, test) = (text(60_000, 40, 4), text(5000, 40, 5));
        let loss =
            |order| Ngram::train(&train, order, 40).unwrap().nll_per_token(std::slice::from_ref(&test));
        let (one, two, five) = (loss(1), loss(2), loss(5));
        // A chain of order one: bigrams learn all there is, and 5-grams lose little by looking further.
        assert!(two < one - 0.5 && (five - two).abs() < 0.3, "{one} {two} {five}");
        assert!(one < 40f64.ln() + 1e-3);
    }

    #[test]
    fn the_largest_vocabulary_fits() {
        let tokens: Vec<u32> = (0..5000).map(|i| 4095 - (i * 37) % 4096).collect();
        let model = Ngram::train(&tokens, 5, 4096).unwrap();
        assert!(model.probability(&tokens[..4], tokens[4]) > 0.1);
    }

    #[test]
    fn refuses_an_order_beyond_five() {
        assert_eq!(Ngram::train(&[0; 10], 6, 4).unwrap_err().kind, Kind::Usage);
        assert_eq!(Ngram::train(&[0; 10], 0, 4).unwrap_err().kind, Kind::Usage);
    }

    #[test]
    fn refuses_a_vocabulary_beyond_twelve_bits() {
        assert_eq!(Ngram::train(&[0; 10], 2, 4097).unwrap_err().kind, Kind::Usage);
    }

    #[test]
    fn refuses_tokens_outside_the_vocabulary() {
        let error = Ngram::train(&[0, 1, 4, 2], 2, 4).unwrap_err();
        assert!(error.message.contains("got 4"), "{error}");
        let model = Ngram::train(&[0, 1, 2], 2, 4).unwrap();
        assert_eq!(model.nll_per_token(&[vec![0, 9]]), f64::INFINITY);
        assert_eq!(model.probability(&[9], 1), model.probability(&[], 1));
    }

    #[test]
    fn refuses_text_shorter_than_the_order() {
        assert!(Ngram::train(&[0, 1], 3, 4).unwrap_err().message.contains("got 2"));
    }
}
