//! What a stage of GistNet's training asks, and which spans of a document it replaces.
//!
//! Source: MegaContext's curriculum: horizons of 32, 64 and 128 tokens, a contrastive term from the second stage on, dropout,
//! and a step to the next stage when the loss improves by less than 5 % over 1000 steps. The mix of a stage's text is a weight
//! for each of the run's sources.
//!
//! Spans are drawn from all aligned blocks that have an entry before them and a horizon behind them inside the document. A row
//! replaces one of them; a span of the second level in a stated share of rows, where the document has room; or a run of
//! neighbouring blocks of up to a stated length, as a working context does.
//!
//! Dropout leaves entries of blocks out of what GistNet sees, at least one staying: the gist of a block must not hang on any
//! one token.
//!
//! Units: tokens, steps. Errors: a setting out of range, by key.

use megacontext_base::error::{BaseError, Result};
use megacontext_base::random::Random;
use serde::{Deserialize, Serialize};

use crate::config::NETWORK;
use crate::delta_nll::Span;
use crate::losses::LossConfig;

/// One stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Stage {
    /// H.
    pub horizon: usize,
    /// Optimiser steps, fewer where the stage advances.
    pub steps: usize,
    /// How often each of the run's sources is drawn from, one number each; empty means as often as it has text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mix: Vec<f64>,
    /// Share of a block's entries that GistNet does not see.
    pub dropout: f64,
    /// Factor of ΔNLL@H.
    pub nll: f64,
    /// Factor of its divergence form.
    pub kl: f64,
    /// Terms on gists alone, and how positions of the horizon count.
    pub loss: LossConfig,
    /// Share of rows whose span is of the second level.
    pub level2: f64,
    /// Most neighbouring blocks that a row replaces.
    pub run: usize,
    /// Goes on to the next stage when the mean loss of so many steps is not lower than that of as many before by at least
    /// `improvement`; 0 never does.
    pub patience_steps: usize,
    /// See there; a share.
    pub improvement: f64,
}

impl Default for Stage {
    fn default() -> Self {
        Self {
            horizon: 32,
            steps: 600,
            mix: Vec::new(),
            dropout: 0.0,
            nll: 1.0,
            kl: 0.0,
            loss: LossConfig::default(),
            level2: 0.0,
            run: 1,
            patience_steps: 0,
            improvement: 0.05,
        }
    }
}

impl Stage {
    /// Refuses settings that mean nothing.
    ///
    /// # Errors
    /// Names the key, what was expected and what came.
    pub fn check(&self, sources: usize) -> Result<()> {
        let refuse = |message: String| Err(BaseError::network(NETWORK, message));
        for (key, value) in [("horizon", self.horizon), ("steps", self.steps), ("run", self.run)] {
            if value == 0 {
                return refuse(format!("{key}: expected at least 1, got 0"));
            }
        }
        for (key, value, most) in [
            ("dropout", self.dropout, 0.99),
            ("level2", self.level2, 1.0),
            ("improvement", self.improvement, 1.0),
        ] {
            if !(0.0..=most).contains(&value) {
                return refuse(format!("{key}: expected 0 to {most}, got {value}"));
            }
        }
        let factors = [self.nll, self.kl];
        if factors.iter().any(|f| !f.is_finite() || *f < 0.0) || factors == [0.0; 2] {
            return refuse(format!(
                "nll, kl: expected numbers of at least 0, one of them above it, got {} and {}",
                self.nll, self.kl
            ));
        }
        if !self.mix.is_empty() {
            if self.mix.len() != sources {
                return refuse(format!(
                    "mix: expected a number for each of {sources} sources of data, got {}",
                    self.mix.len()
                ));
            }
            if self.mix.iter().any(|m| !m.is_finite() || *m < 0.0) || self.mix.iter().sum::<f64>() <= 0.0 {
                return refuse(format!(
                    "mix: expected numbers of at least 0 and a sum above it, got {:?}",
                    self.mix
                ));
            }
        }
        self.loss.check()
    }

    /// Has the stage stopped getting better, by its losses so far?
    pub fn advances(&self, losses: &[f64]) -> bool {
        let n = self.patience_steps;
        if n == 0 || losses.len() < 2 * n {
            return false;
        }
        let mean = |part: &[f64]| part.iter().sum::<f64>() / n as f64;
        let (before, after) = (mean(&losses[losses.len() - 2 * n..][..n]), mean(&losses[losses.len() - n..]));
        // A loss may be below 0: a share of its size is meant.
        before - after < self.improvement * before.abs().max(f64::MIN_POSITIVE)
    }

    /// The spans of `count` rows over a document of `length` tokens, K being `block`: without repeats as far as there are
    /// enough. None where the document has no room for any.
    pub fn draw(&self, length: usize, block: usize, count: usize, random: &mut Random) -> Vec<Vec<Span>> {
        let mut blocks = places(length, block, 1, self.horizon);
        let mut wide = places(length, block, 2, self.horizon);
        for list in [&mut blocks, &mut wide] {
            shuffle(list, random);
        }
        let (mut narrow, mut wide) = (blocks.iter().copied().cycle(), wide.into_iter());
        let mut rows = Vec::new();
        while rows.len() < count && !blocks.is_empty() {
            if rows.len() == blocks.len() && self.run == 1 {
                break;
            }
            let second = if random.unit() < self.level2 { wide.next() } else { None };
            let Some(last) = second.or_else(|| narrow.next()) else { break };
            if second.is_some() {
                rows.push(vec![last]);
                continue;
            }
            // A run ends at the drawn block and keeps an entry before its first one.
            let most = (last.start / block).min(self.run);
            let run = 1 + random.below(most);
            let first = last.start / block + 1 - run;
            rows.push((first..first + run).map(|at| Span { start: at * block, lod: 1 }).collect());
        }
        rows
    }
}

/// All aligned spans of a level that have an entry before them and a horizon behind them.
pub fn places(length: usize, block: usize, lod: u32, horizon: usize) -> Vec<Span> {
    let tokens = block.pow(lod);
    let starts = (tokens..).step_by(tokens).take_while(|start| start + tokens + horizon <= length);
    starts.map(|start| Span { start, lod }).collect()
}

/// A permutation drawn by Fisher and Yates.
pub fn shuffle<T>(list: &mut [T], random: &mut Random) {
    for at in (1..list.len()).rev() {
        list.swap(at, random.below(at + 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_have_an_entry_before_and_a_horizon_behind() {
        let starts = |lod, horizon| -> Vec<usize> {
            places(100, 8, lod, horizon).iter().map(|span| span.start).collect()
        };
        assert_eq!(starts(1, 12), [8, 16, 24, 32, 40, 48, 56, 64, 72, 80]);
        assert_eq!(starts(1, 13), [8, 16, 24, 32, 40, 48, 56, 64, 72]);
        assert!(starts(2, 12).is_empty());
        assert_eq!(places(140, 8, 2, 12), [Span { start: 64, lod: 2 }]);
    }

    #[test]
    fn rows_are_drawn_without_repeats_and_keep_an_entry_before_them() {
        let stage = Stage { horizon: 4, run: 3, level2: 0.3, ..Stage::default() };
        let mut random = Random::new(1);
        let mut longest = 0;
        for _ in 0..200 {
            let rows = stage.draw(200, 4, 9, &mut random);
            assert_eq!(rows.len(), 9);
            for (at, row) in rows.iter().enumerate() {
                assert!(!rows[..at].contains(row), "a row twice: {rows:?}");
            }
            for row in &rows {
                assert!(row[0].start > 0);
                assert!(row.windows(2).all(|pair| pair[0].start + 4 == pair[1].start));
                longest = longest.max(row.len());
                let last = row[row.len() - 1];
                assert!(last.start + 4usize.pow(last.lod) + 4 <= 200);
            }
        }
        assert_eq!(longest, 3);
    }

    #[test]
    fn a_short_document_gives_as_many_rows_as_it_has_blocks() {
        let stage = Stage { horizon: 4, ..Stage::default() };
        assert_eq!(stage.draw(20, 4, 9, &mut Random::new(1)).len(), 3);
        assert!(stage.draw(8, 4, 9, &mut Random::new(1)).is_empty());
    }

    #[test]
    fn a_stage_advances_when_it_stops_improving() {
        let stage = Stage { patience_steps: 3, ..Stage::default() };
        assert!(!stage.advances(&[1.0, 1.0, 1.0, 0.9, 0.9]));
        assert!(!stage.advances(&[1.0, 1.0, 1.0, 0.9, 0.9, 0.9]));
        assert!(stage.advances(&[1.0, 1.0, 1.0, 0.97, 0.97, 0.97]));
        assert!(stage.advances(&[-1.0; 6]) && stage.advances(&[0.0; 6]));
        assert!(!stage.advances(&[-1.0, -1.0, -1.0, -1.2, -1.2, -1.2]));
        assert!(!Stage::default().advances(&[1.0; 4000]));
    }

    #[test]
    fn settings_out_of_range_are_refused_by_key() {
        let refused = |stage: Stage, key: &str| {
            let error = stage.check(2).unwrap_err().to_string();
            assert!(error.contains(key), "expected {key} in {error}");
        };
        refused(Stage { horizon: 0, ..Stage::default() }, "horizon: expected at least 1, got 0");
        refused(Stage { steps: 0, ..Stage::default() }, "steps: expected at least 1, got 0");
        refused(Stage { dropout: 1.0, ..Stage::default() }, "dropout: expected 0 to 0.99, got 1");
        refused(Stage { level2: -0.1, ..Stage::default() }, "level2: expected 0 to 1, got -0.1");
        refused(Stage { nll: 0.0, ..Stage::default() }, "nll, kl: expected numbers");
        refused(
            Stage { mix: vec![1.0], ..Stage::default() },
            "a number for each of 2 sources of data, got 1",
        );
        refused(Stage { mix: vec![0.0, 0.0], ..Stage::default() }, "a sum above it");
        Stage::default().check(2).unwrap();
    }
}
