//! Choosing the next token from logits.
//!
//! Source: nucleus sampling (Holtzman et al. 2020). With temperature t, p = softmax(z/t); of the tokens in falling order of
//! p, those are kept that are needed to reach `top_p` (the one that crosses it among them), and one is drawn from what they
//! share. Greedy takes the largest logit, the lowest token id among equal ones.
//!
//! A draw depends on the seed, the row's number and how many tokens the row has so far, on nothing else: what a row gets
//! does not depend on the rows beside it, or on the order in which they end.
//!
//! Shapes: logits [V]. Errors: settings out of range; logits of which one is NaN or infinite.

use crate::error::{BaseError, Result};
use crate::random::Random;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Sampling {
    /// The most likely one.
    #[default]
    Greedy,
    /// One at random among the most likely ones.
    Nucleus {
        /// Divides the logits; above 0.
        temperature: f64,
        /// Share of the probability that is kept; above 0, at most 1.
        top_p: f64,
        /// Of the draws.
        seed: u64,
    },
}

impl Sampling {
    /// Refuses settings out of range.
    ///
    /// # Errors
    /// A temperature or share that is not a number, or out of its range.
    pub fn check(self) -> Result<()> {
        let refuse = |message: String| Err(BaseError::Input { message });
        match self {
            Self::Nucleus { temperature, .. } if !(temperature > 0.0 && temperature.is_finite()) => {
                refuse(format!("temperature: expected a number above 0, got {temperature}"))
            }
            Self::Nucleus { top_p, .. } if !(top_p > 0.0 && top_p <= 1.0) => {
                refuse(format!("top_p: expected a share above 0 and at most 1, got {top_p}"))
            }
            _ => Ok(()),
        }
    }

    /// The token that follows, for row `row` with `so_far` tokens generated.
    ///
    /// # Errors
    /// When a logit is not finite.
    pub fn choose(self, logits: &[f32], row: usize, so_far: usize) -> Result<u32> {
        if let Some(bad) = logits.iter().find(|z| !z.is_finite()) {
            return Err(BaseError::NonFinite {
                what: format!("logits of row {row}"),
                value: f64::from(*bad),
            });
        }
        Ok(match self {
            Self::Greedy => largest(logits),
            Self::Nucleus { temperature, top_p, seed } => {
                let draw = Random::named(seed, &format!("row {row} token {so_far}")).unit();
                nucleus(logits, temperature, top_p, draw)
            }
        })
    }
}

fn largest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().reduce(|best, z| if z.1 > best.1 { z } else { best });
    best.map_or(0, |(token, _)| token as u32)
}

/// `draw` is uniform in [0, 1).
fn nucleus(logits: &[f32], temperature: f64, top_p: f64, draw: f64) -> u32 {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut tokens: Vec<(u32, f64)> = logits
        .iter()
        .enumerate()
        .map(|(token, z)| (token as u32, (f64::from(z - top) / temperature).exp()))
        .collect();
    tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let total: f64 = tokens.iter().map(|(_, p)| p).sum();
    let (mut kept, mut share) = (0, 0.0);
    while kept < tokens.len() && (kept == 0 || share < top_p * total) {
        share += tokens[kept].1;
        kept += 1;
    }
    let mut left = draw * share;
    for (token, p) in &tokens[..kept] {
        left -= p;
        if left < 0.0 {
            return *token;
        }
    }
    // Rounding can leave a crumb.
    tokens[kept - 1].0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(Sampling::Greedy.choose(&[-1.0, 3.0, 3.0, 2.0], 0, 0).unwrap(), 1);
        assert_eq!(Sampling::Greedy.choose(&[-2.0, -1.0], 5, 9).unwrap(), 1);
    }

    #[test]
    fn a_nucleus_keeps_what_reaches_its_share_and_nothing_more() {
        // p = 1/2, 1/4, 1/8, 1/8 in some order.
        let logits = [0f32.ln(), 0.125f32.ln(), 0.5f32.ln(), 0.25f32.ln(), 0.125f32.ln()];
        let logits = logits.map(|z| z.max(-1e9));
        let kept = |top_p: f64| {
            let mut found: Vec<u32> =
                (0..400).map(|i| nucleus(&logits, 1.0, top_p, i as f64 / 400.0)).collect();
            found.sort_unstable();
            found.dedup();
            found
        };
        assert_eq!(kept(0.4), [2]);
        assert_eq!(kept(0.5), [2]);
        assert_eq!(kept(0.51), [2, 3]);
        assert_eq!(kept(0.76), [1, 2, 3]);
        assert_eq!(kept(1.0), [1, 2, 3, 4]);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.6f32.ln(), 0.3f32.ln(), 0.1f32.ln()];
        let sampling = Sampling::Nucleus { temperature: 1.0, top_p: 1.0, seed: 3 };
        let mut counts = [0f64; 3];
        for so_far in 0..20_000 {
            counts[sampling.choose(&logits, 7, so_far).unwrap() as usize] += 1.0 / 20_000.0;
        }
        for (count, p) in counts.iter().zip([0.6, 0.3, 0.1]) {
            // Four standard deviations of a binomial share.
            assert!((count - p).abs() < 4.0 * (p * (1.0 - p) / 20_000.0f64).sqrt(), "{counts:?}");
        }
    }

    #[test]
    fn a_low_temperature_is_greedy_and_a_high_one_is_level() {
        let logits = [1.0, 1.2, 0.9];
        let at = |temperature, draw| nucleus(&logits, temperature, 1.0, draw);
        assert!((0..100).all(|i| at(1e-3, f64::from(i) / 100.0) == 1));
        let hot: Vec<u32> = (0..3).map(|i| at(1e6, (f64::from(i) + 0.5) / 3.0)).collect();
        assert_eq!(hot, [1, 0, 2]);
    }

    #[test]
    fn a_draw_is_its_rows_and_places_own() {
        let logits = [0.0f32; 1000];
        let sampling = Sampling::Nucleus { temperature: 1.0, top_p: 1.0, seed: 3 };
        let token = sampling.choose(&logits, 2, 5).unwrap();
        assert_eq!(sampling.choose(&logits, 2, 5).unwrap(), token);
        assert_ne!(sampling.choose(&logits, 3, 5).unwrap(), token);
        assert_ne!(sampling.choose(&logits, 2, 6).unwrap(), token);
    }

    #[test]
    fn a_temperature_of_zero() {
        for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = Sampling::Nucleus { temperature, top_p: 1.0, seed: 0 }.check().unwrap_err();
            assert!(error.to_string().contains("temperature: expected a number above 0, got"), "{error}");
        }
    }

    #[test]
    fn a_share_out_of_range() {
        for top_p in [0.0, 1.5, f64::NAN] {
            let error = Sampling::Nucleus { temperature: 1.0, top_p, seed: 0 }.check().unwrap_err();
            assert!(error.to_string().contains("top_p: expected a share above 0 and at most 1"), "{error}");
        }
    }

    #[test]
    fn logits_that_are_not_numbers() {
        for sampling in [Sampling::Greedy, Sampling::Nucleus { temperature: 1.0, top_p: 0.5, seed: 0 }] {
            let error = sampling.choose(&[0.0, f32::NAN], 4, 0).unwrap_err().to_string();
            assert!(error.contains("logits of row 4: expected a finite number, got NaN"), "{error}");
        }
    }
}
