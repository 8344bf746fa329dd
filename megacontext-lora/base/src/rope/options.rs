//! Options of the positions beyond a scaling, all of them off by default: they change what a model was pre-trained with,
//! so a model has to learn them.
//!
//! Source: MegaContext's positional encoding. Part of a head may turn by the entry's level instead of its time; a few of
//! the slowest bands may be replaced by ultra-slow ones, which tell places apart over millions of tokens; ALiBi (Press et
//! al. 2022) lowers scores by distance.
//!
//! Units: periods in tokens. Errors: more bands asked for than there are, periods that are none.

use serde::{Deserialize, Serialize};

use super::sigma::SigmaRule;

/// The options, as they stand under `megacontext.positions` of a `config.json` and in a session's settings.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PositionOptions {
    /// How an entry's place and spread follow from where its span begins and its level.
    pub sigma: SigmaRule,
    /// Bands (pairs of elements) of every head that turn by the entry's level instead of its time: the last ones. Both
    /// parts have a geometric series of their own.
    pub lod_bands: usize,
    /// Replaces the slowest bands of time, as many as there are periods; their frequency is 2π / period and is not scaled.
    pub slow_periods: Vec<f64>,
    /// Lowers the scores of query head h by slope(h)·|i − j| in tokens, with ALiBi's own slopes.
    pub alibi: bool,
}

impl PositionOptions {
    /// Refuses what does not go with `bands` pairs of rotated elements.
    pub fn check(&self, bands: usize) -> Result<(), String> {
        self.sigma.check()?;
        if self.lod_bands >= bands && self.lod_bands > 0 {
            return Err(format!(
                "positions.lod_bands: expected less than the {bands} bands of a head, got {}",
                self.lod_bands
            ));
        }
        let left = bands - self.lod_bands;
        if self.slow_periods.len() > left {
            return Err(format!(
                "positions.slow_periods: expected at most {left}, the bands of time of a head, got {}",
                self.slow_periods.len()
            ));
        }
        if let Some(bad) = self.slow_periods.iter().find(|p| !p.is_finite() || **p <= 0.0) {
            return Err(format!("positions.slow_periods: expected positive numbers of tokens, got {bad}"));
        }
        Ok(())
    }

    /// Do these options leave a model's angles and scores as they are?
    pub fn is_plain(&self) -> bool {
        self.lod_bands == 0 && self.slow_periods.is_empty() && !self.alibi
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(options: PositionOptions, what: &str) {
        let error = options.check(4).unwrap_err();
        assert!(error.contains(what), "expected {what:?} in {error:?}");
    }

    #[test]
    fn a_lod_axis_as_wide_as_the_head_is_refused() {
        refused(
            PositionOptions { lod_bands: 4, ..Default::default() },
            "less than the 4 bands of a head, got 4",
        );
    }

    #[test]
    fn more_slow_bands_than_bands_of_time_are_refused() {
        let options = PositionOptions { lod_bands: 2, slow_periods: vec![1e6; 3], ..Default::default() };
        refused(options, "expected at most 2, the bands of time of a head, got 3");
    }

    #[test]
    fn a_period_of_zero_is_refused() {
        let options = PositionOptions { slow_periods: vec![1e6, 0.0], ..Default::default() };
        refused(options, "positive numbers of tokens, got 0");
    }
}
