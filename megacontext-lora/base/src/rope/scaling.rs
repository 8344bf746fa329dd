//! Scalings: how the frequencies of a model change so that it reads more than it was pre-trained for.
//!
//! Sources: position interpolation (Chen et al. 2023), NTK-aware and dynamic NTK scaling (bloc97 and emozilla 2023), YaRN
//! (Peng et al. 2023), LongRoPE (Ding et al. 2024), Llama 3.1's own; formulas and defaults as transformers 5 computes
//! them (`modeling_rope_utils`).
//!
//! With b the base, d the rotated width of a head, i a band: ω = b^(−2i/d), radians per token, in f64. Lengths in tokens.
//! Factors are stretches from the original length, never from a stretched one.
//!
//! Errors: values that make no scaling, as text for the caller to place.

use std::f64::consts::TAU;

/// YaRN's parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// Stretch, at least 1.
    pub factor: f64,
    /// Length that the model was pre-trained at.
    pub original: usize,
    /// Bands that turn more often than this over the original length keep their frequency.
    pub beta_fast: f64,
    /// Bands that turn less often than this are stretched in full.
    pub beta_slow: f64,
    /// Numerator of the attention factor, where both are stated and not 0.
    pub mscale: Option<f64>,
    /// Denominator of the attention factor.
    pub mscale_all_dim: Option<f64>,
    /// Attention factor, where it is stated instead of computed.
    pub attention_factor: Option<f64>,
    /// Are the ends of the ramp rounded to whole bands?
    pub truncate: bool,
}

impl Yarn {
    /// The paper's settings.
    pub fn new(factor: f64, original: usize) -> Self {
        Self {
            factor,
            original,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: None,
            mscale_all_dim: None,
            attention_factor: None,
            truncate: true,
        }
    }

    fn attention_factor(&self) -> f64 {
        let growth = |m: f64| if self.factor <= 1.0 { 1.0 } else { 0.1 * m * self.factor.ln() + 1.0 };
        let stated = |m: Option<f64>| m.filter(|m| *m != 0.0);
        match (self.attention_factor, stated(self.mscale), stated(self.mscale_all_dim)) {
            (Some(stated), _, _) => stated,
            (None, Some(mscale), Some(all)) => growth(mscale) / growth(all),
            _ => growth(1.0),
        }
    }

    /// First and last band of the ramp between kept and stretched frequencies.
    fn ramp(&self, theta: f64, width: usize) -> (f64, f64) {
        let width = width as f64;
        let band = |turns: f64| width * (self.original as f64 / (turns * TAU)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (band(self.beta_fast), band(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(width - 1.0));
        (low, if low == high { high + 0.001 } else { high })
    }

    fn stretch(&self, plain: &[f64], theta: f64) -> Vec<f64> {
        let (low, high) = self.ramp(theta, 2 * plain.len());
        let stretched = |(i, w): (usize, &f64)| {
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            w / self.factor * ramp + w * (1.0 - ramp)
        };
        plain.iter().enumerate().map(stretched).collect()
    }
}

/// LongRoPE's parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Longrope {
    /// Stretch, at least 1: what the attention factor is computed from.
    pub factor: f64,
    /// Length that the model was pre-trained at; longer sequences use `long_factor`.
    pub original: usize,
    /// Divisors of the bands, d/2 of them, for sequences up to `original`.
    pub short_factor: Vec<f64>,
    /// The same for longer ones.
    pub long_factor: Vec<f64>,
    /// Attention factor, where it is stated instead of computed.
    pub attention_factor: Option<f64>,
}

impl Longrope {
    fn attention_factor(&self) -> f64 {
        let computed = || (1.0 + self.factor.ln() / (self.original as f64).ln()).sqrt();
        self.attention_factor.unwrap_or_else(|| if self.factor <= 1.0 { 1.0 } else { computed() })
    }
}

/// The parameters of Llama 3.1's scaling.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama3 {
    /// Stretch, at least 1.
    pub factor: f64,
    /// Length that the model was pre-trained at.
    pub original: usize,
    /// Waves longer than `original` / this are stretched in full.
    pub low_freq_factor: f64,
    /// Waves shorter than `original` / this are kept; larger than `low_freq_factor`.
    pub high_freq_factor: f64,
}

impl Llama3 {
    /// Meta's settings.
    pub fn new(factor: f64, original: usize) -> Self {
        Self { factor, original, low_freq_factor: 1.0, high_freq_factor: 4.0 }
    }

    fn stretch(&self, w: f64) -> f64 {
        let (wave, original) = (TAU / w, self.original as f64);
        if wave < original / self.high_freq_factor {
            w
        } else if wave > original / self.low_freq_factor {
            w / self.factor
        } else {
            let smooth =
                (original / wave - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
            (1.0 - smooth) * w / self.factor + smooth * w
        }
    }
}

/// How positions beyond the pre-trained length are mapped to angles.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Angles as pre-trained.
    None,
    /// Position interpolation: every angle divided by `factor` (Chen et al. 2023, eq. 4).
    Linear {
        /// Stretch, at least 1, always counted from the original context length.
        factor: f64,
    },
    /// NTK-aware: the base becomes b·factor^(d/(d−2)), so that the slowest band is stretched by `factor` and the fastest
    /// not at all.
    Ntk {
        /// Stretch, at least 1.
        factor: f64,
    },
    /// Dynamic NTK: for a sequence of S tokens the base becomes b·(factor·S/L − (factor − 1))^(d/(d−2)), S at least L.
    Dynamic {
        /// Stretch at twice the original length, less 1; with 1 the stretch is S/L.
        factor: f64,
        /// L: length that the model was pre-trained at.
        original: usize,
    },
    /// YaRN: slow bands are stretched, fast ones kept, and cosines and sines are multiplied by an attention factor.
    Yarn(Yarn),
    /// LongRoPE: every band has its own divisor.
    Longrope(Longrope),
    /// Llama 3.1's: slow bands are stretched, fast ones kept.
    Llama3(Llama3),
}

impl RopeScaling {
    /// Names of all kinds, as they stand in settings and in `rope_type`.
    pub const KINDS: [&str; 7] = ["none", "linear", "ntk", "dynamic", "yarn", "longrope", "llama3"];

    /// Linear scaling, or none when the factor is 1.
    pub fn from_factor(factor: f64) -> Result<Self, String> {
        check_factor(factor)?;
        Ok(if factor == 1.0 { Self::None } else { Self::Linear { factor } })
    }

    /// The kind's name, one of [`RopeScaling::KINDS`].
    pub fn kind(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Linear { .. } => "linear",
            Self::Ntk { .. } => "ntk",
            Self::Dynamic { .. } => "dynamic",
            Self::Yarn(_) => "yarn",
            Self::Longrope(_) => "longrope",
            Self::Llama3(_) => "llama3",
        }
    }

    /// The factor of this scaling, 1 for none.
    pub fn factor(&self) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Linear { factor } | Self::Ntk { factor } | Self::Dynamic { factor, .. } => *factor,
            Self::Yarn(yarn) => yarn.factor,
            Self::Longrope(longrope) => longrope.factor,
            Self::Llama3(llama3) => llama3.factor,
        }
    }

    /// The pre-trained length, where the scaling states it.
    pub fn original(&self) -> Option<usize> {
        match self {
            Self::None | Self::Linear { .. } | Self::Ntk { .. } => None,
            Self::Dynamic { original, .. } => Some(*original),
            Self::Yarn(yarn) => Some(yarn.original),
            Self::Longrope(longrope) => Some(longrope.original),
            Self::Llama3(llama3) => Some(llama3.original),
        }
    }

    /// What cosines and sines are multiplied by.
    pub fn attention_factor(&self) -> f64 {
        match self {
            Self::Yarn(yarn) => yarn.attention_factor(),
            Self::Longrope(longrope) => longrope.attention_factor(),
            _ => 1.0,
        }
    }

    /// Up to which length kinds that look at the length of a sequence use their setting for short ones; 0 for the others,
    /// whose frequencies never depend on it.
    pub fn unscaled_up_to(&self) -> usize {
        match self {
            Self::Dynamic { original, .. } => *original,
            Self::Longrope(longrope) => longrope.original,
            _ => 0,
        }
    }

    /// Refuses values out of range, and what does not go with a rotated width of `width` elements and the base `theta`.
    pub fn check(&self, theta: f64, width: usize) -> Result<(), String> {
        check_factor(self.factor())?;
        let at_least_4 = |kind: &str| match width {
            0..4 => Err(format!("rope_type \"{kind}\": expected a rotated width of at least 4, got {width}")),
            _ => Ok(()),
        };
        let positive = |key: &str, value: f64| {
            if value.is_finite() && value > 0.0 {
                Ok(())
            } else {
                Err(format!("{key}: expected a positive number, got {value}"))
            }
        };
        if self.original() == Some(0) {
            return Err("original_max_position_embeddings: expected a positive number, got 0".into());
        }
        match self {
            Self::None | Self::Linear { .. } => Ok(()),
            Self::Ntk { .. } => at_least_4("ntk"),
            Self::Dynamic { .. } => at_least_4("dynamic"),
            Self::Yarn(yarn) => {
                positive("beta_fast", yarn.beta_fast)?;
                positive("beta_slow", yarn.beta_slow)?;
                if yarn.beta_fast < yarn.beta_slow {
                    return Err(format!(
                        "beta_fast: expected at least beta_slow = {}, got {}",
                        yarn.beta_slow, yarn.beta_fast
                    ));
                }
                if let Some(factor) = yarn.attention_factor {
                    positive("attention_factor", factor)?;
                }
                for (key, value) in [("mscale", yarn.mscale), ("mscale_all_dim", yarn.mscale_all_dim)] {
                    if let Some(bad) = value.filter(|m| !m.is_finite() || *m < 0.0) {
                        return Err(format!("{key}: expected a number of at least 0, got {bad}"));
                    }
                }
                if theta <= 1.0 {
                    return Err(format!("rope_theta: rope_type \"yarn\" expects more than 1, got {theta}"));
                }
                Ok(())
            }
            Self::Longrope(longrope) => {
                let lists =
                    [("short_factor", &longrope.short_factor), ("long_factor", &longrope.long_factor)];
                for (key, list) in lists {
                    if list.len() != width / 2 {
                        return Err(format!(
                            "{key}: expected {} numbers, one for each band, got {}",
                            width / 2,
                            list.len()
                        ));
                    }
                    list.iter().try_for_each(|value| positive(key, *value))?;
                }
                if longrope.original < 2 {
                    return Err(format!(
                        "original_max_position_embeddings: expected at least 2, got {}",
                        longrope.original
                    ));
                }
                longrope.attention_factor.map_or(Ok(()), |factor| positive("attention_factor", factor))
            }
            Self::Llama3(llama3) => {
                positive("low_freq_factor", llama3.low_freq_factor)?;
                positive("high_freq_factor", llama3.high_freq_factor)?;
                if llama3.low_freq_factor >= llama3.high_freq_factor {
                    return Err(format!(
                        "low_freq_factor: expected less than high_freq_factor = {}, got {}",
                        llama3.high_freq_factor, llama3.low_freq_factor
                    ));
                }
                Ok(())
            }
        }
    }

    /// The angular frequency of every band, `width`/2 of them, radians per token, in a sequence of `length` tokens.
    pub fn frequencies(&self, theta: f64, width: usize, length: usize) -> Vec<f64> {
        let series = |base: f64| -> Vec<f64> {
            (0..width / 2).map(|i| base.powf(-2.0 * i as f64 / width as f64)).collect()
        };
        let plain = || series(theta);
        let exponent = width as f64 / (width as f64 - 2.0);
        match self {
            Self::None => plain(),
            Self::Linear { factor } => plain().into_iter().map(|w| w / factor).collect(),
            Self::Ntk { factor } => series(theta * factor.powf(exponent)),
            Self::Dynamic { factor, original } => {
                let longer = length.max(*original) as f64 / *original as f64;
                series(theta * (factor * longer - (factor - 1.0)).powf(exponent))
            }
            Self::Yarn(yarn) => yarn.stretch(&plain(), theta),
            Self::Longrope(longrope) => {
                let long = length > longrope.original;
                let divisors = if long { &longrope.long_factor } else { &longrope.short_factor };
                plain().iter().zip(divisors).map(|(w, divisor)| w / divisor).collect()
            }
            Self::Llama3(llama3) => plain().into_iter().map(|w| llama3.stretch(w)).collect(),
        }
    }
}

impl std::fmt::Display for RopeScaling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            other => write!(f, "{} x{}", other.kind(), other.factor()),
        }
    }
}

/// Refuses what is no stretch.
pub(super) fn check_factor(factor: f64) -> Result<(), String> {
    if factor.is_finite() && factor >= 1.0 {
        return Ok(());
    }
    Err(format!("rope factor: expected a finite number of at least 1, got {factor}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(scaling: RopeScaling, what: &str) {
        let error = scaling.check(10000.0, 8).unwrap_err();
        assert!(error.contains(what), "expected {what:?} in {error:?}");
    }

    #[test]
    fn factor_below_one_is_refused() {
        assert!(RopeScaling::from_factor(0.5).unwrap_err().contains("at least 1"));
        refused(RopeScaling::Yarn(Yarn::new(0.5, 64)), "at least 1, got 0.5");
        refused(RopeScaling::Ntk { factor: f64::NAN }, "at least 1, got NaN");
    }

    #[test]
    fn longrope_list_of_another_length_is_refused() {
        let longrope = Longrope {
            factor: 4.0,
            original: 64,
            short_factor: vec![1.0; 4],
            long_factor: vec![1.0; 5],
            attention_factor: None,
        };
        refused(RopeScaling::Longrope(longrope), "long_factor: expected 4 numbers, one for each band, got 5");
    }

    #[test]
    fn longrope_divisor_of_zero_is_refused() {
        let longrope = Longrope {
            factor: 4.0,
            original: 64,
            short_factor: vec![1.0, 1.0, 0.0, 1.0],
            long_factor: vec![1.0; 4],
            attention_factor: None,
        };
        refused(RopeScaling::Longrope(longrope), "short_factor: expected a positive number, got 0");
    }

    #[test]
    fn llama3_with_low_above_high_is_refused() {
        let llama3 = Llama3 { low_freq_factor: 4.0, ..Llama3::new(8.0, 64) };
        refused(
            RopeScaling::Llama3(llama3),
            "low_freq_factor: expected less than high_freq_factor = 4, got 4",
        );
    }

    #[test]
    fn yarn_with_fast_below_slow_is_refused() {
        let yarn = Yarn { beta_fast: 0.5, ..Yarn::new(8.0, 64) };
        refused(RopeScaling::Yarn(yarn), "beta_fast: expected at least beta_slow = 1, got 0.5");
    }

    #[test]
    fn ntk_of_a_single_band_is_refused() {
        let error = RopeScaling::Ntk { factor: 2.0 }.check(10000.0, 2).unwrap_err();
        assert!(error.contains("rotated width of at least 4, got 2"), "{error}");
    }

    #[test]
    fn ntk_stretches_the_slowest_band_by_the_factor_and_the_fastest_not_at_all() {
        let plain = RopeScaling::None.frequencies(10000.0, 16, 0);
        let ntk = RopeScaling::Ntk { factor: 8.0 }.frequencies(10000.0, 16, 0);
        assert_eq!(ntk[0], 1.0);
        assert!((plain[7] / ntk[7] - 8.0).abs() < 1e-12);
    }

    #[test]
    fn dynamic_leaves_short_sequences_alone_and_grows_with_the_length() {
        let dynamic = RopeScaling::Dynamic { factor: 1.0, original: 64 };
        let plain = RopeScaling::None.frequencies(10000.0, 16, 0);
        assert_eq!(dynamic.frequencies(10000.0, 16, 64), plain);
        // With factor 1 the stretch is that of the length.
        let ntk = RopeScaling::Ntk { factor: 3.0 }.frequencies(10000.0, 16, 0);
        for (a, b) in dynamic.frequencies(10000.0, 16, 192).iter().zip(&ntk) {
            assert!((a / b - 1.0).abs() < 1e-14);
        }
    }

    #[test]
    fn yarns_attention_factor_is_the_papers() {
        let factor = RopeScaling::Yarn(Yarn::new(8.0, 64)).attention_factor();
        assert!((factor - 1.207944154167984).abs() < 1e-15);
    }
}
