//! Gaussian positions: where an entry stands, how vague that is, and how the vagueness learns.
//!
//! Source: MegaContext's Gaussian RoPE. An entry of level l stands for K^l tokens; its position is N(mu, sigma²), and the
//! expectation of its rotation is the rotation of mu damped by exp(−½(ω·sigma)²) in every band, with the scaled ω. Rules:
//!
//! - `document` (default): mu = start + ⌊span/2⌋; sigma 0 for a token, else the span, or span/√12, the deviation of a place
//!   that is uniform over the span, where `uniform` is set (the span itself damps every band faster than 1/span to nothing).
//! - `original`: mu = start, sigma = K^l, 1 for a token too: what the original code computes.
//!
//! Learning: sigma_n = scale\[lod_n\]·base_n with one trainable scale per level, the parameter [`SIGMA`]. With y the damped
//! and rotated output and g its gradient, ∂y/∂sigma = −ω²·sigma·y band by band, so that of an entry is
//! −sigma_n · Σ over heads and bands of ω²·(g₁·y₁ + g₂·y₂), over the queries and keys of every block.
//!
//! Units: tokens. Errors: a block or a sigma that is none, a level beyond those there are.

use megacontext_kernels::rope::damping_gradient;
use megacontext_kernels::store::Store;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::architecture::Rotation;
use crate::gradients::Gradients;

/// Name of the parameter that holds the scale of every level, as many values as levels; group `sigma`.
pub const SIGMA: &str = "rope.sigma";

/// Levels that a span may have: K^l of any useful K is beyond every document well before.
pub const MOST_LEVELS: usize = 16;

/// Which rule gives an entry's place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SigmaPreset {
    /// Centres of spans; tokens are certain.
    #[default]
    Document,
    /// Starts of spans; tokens have sigma 1.
    Original,
}

/// How an entry's place follows from where its span begins and its level.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SigmaRule {
    /// Which rule.
    pub preset: SigmaPreset,
    /// K: entries of a level that one of the next level stands for.
    pub block: usize,
    /// With `document`: sigma is span/√12 instead of the span.
    pub uniform: bool,
}

impl Default for SigmaRule {
    fn default() -> Self {
        Self { preset: SigmaPreset::Document, block: 32, uniform: false }
    }
}

impl SigmaRule {
    /// Refuses a block that is none.
    pub fn check(&self) -> Result<(), String> {
        if self.block < 2 {
            return Err(format!("positions.sigma.block: expected at least 2, got {}", self.block));
        }
        Ok(())
    }

    /// Tokens that an entry of this level stands for.
    pub fn span(&self, lod: u32) -> f64 {
        (self.block as f64).powi(lod as i32)
    }

    /// Centre and spread of an entry whose span begins at token `start`.
    pub fn place(&self, start: f64, lod: u32) -> (f64, f64) {
        let span = self.span(lod);
        match self.preset {
            SigmaPreset::Original => (start, span),
            SigmaPreset::Document => (start + (span / 2.0).floor(), self.sigma(lod)),
        }
    }

    /// Spread of an entry of this level.
    pub fn sigma(&self, lod: u32) -> f64 {
        match (self.preset, lod) {
            (SigmaPreset::Document, 0) => 0.0,
            (SigmaPreset::Document, _) if self.uniform => self.span(lod) / 12f64.sqrt(),
            _ => self.span(lod),
        }
    }

    /// Centres and spreads of entries whose spans follow one another from token 0 on.
    pub fn tile(&self, lod: &[u32]) -> (Vec<f64>, Vec<f64>) {
        let mut start = 0.0;
        let place = |lod: &u32| {
            let place = self.place(start, *lod);
            start += self.span(*lod);
            place
        };
        lod.iter().map(place).unzip()
    }
}

/// Reads learned scales from a file of ours: a list of finite numbers, one for every level.
pub fn sigma_scales(value: &Value) -> Result<Vec<f32>, String> {
    let list = value.as_array().filter(|list| (1..=MOST_LEVELS).contains(&list.len()));
    let number = |v: &Value| v.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
    let scales = list.and_then(|list| list.iter().map(number).collect::<Option<Vec<f32>>>());
    scales.ok_or_else(|| {
        format!("expected 1 to {MOST_LEVELS} finite numbers, one for every level, got {value}")
    })
}

/// What the gradient of the scales needs of a pass.
#[derive(Clone, Debug)]
pub struct Spread {
    /// ω² of every band, 0 where it is not damped.
    pub(super) omega_squared: Vec<f32>,
    /// The same of blocks that turn by tables of their own.
    pub(super) local: Option<Vec<f32>>,
    /// Spread of every entry at scale 1.
    pub(super) base: Vec<f64>,
    /// Spread of every entry as it went into the tables.
    pub(super) sigma: Vec<f64>,
    /// Level of every entry.
    pub(super) lod: Vec<u32>,
    /// Number of scales.
    pub(super) levels: usize,
}

impl Spread {
    /// Number of scales.
    pub fn levels(&self) -> usize {
        self.levels
    }

    /// Adds what one operand (`y`, N entries of `heads`·`width` values), rotated as the block does it, says about the
    /// scales, given the gradient `g` of it.
    pub(crate) fn backward<S: Store>(
        &self,
        rotation: Rotation,
        y: &[S],
        g: &[f32],
        heads: usize,
        width: usize,
        gradients: &mut Gradients,
    ) {
        let Some(omega_squared) = self.omega_squared(rotation) else { return };
        let mut sums = vec![0f64; self.entries()];
        damping_gradient(y, g, heads, width, omega_squared, &mut sums);
        self.add(&sums, gradients);
    }

    /// ω² of every band of blocks that turn so, 0 where it is not damped; none where they do not turn.
    pub(crate) fn omega_squared(&self, rotation: Rotation) -> Option<&[f32]> {
        match (rotation, &self.local) {
            (Rotation::None, _) => None,
            (Rotation::Local, Some(local)) => Some(local),
            _ => Some(&self.omega_squared),
        }
    }

    /// Entries that tables were made for.
    pub(crate) fn entries(&self) -> usize {
        self.base.len()
    }

    /// Adds to the scales' gradient what each entry's sum of [`damping_gradient`] says.
    pub(crate) fn add(&self, sums: &[f64], gradients: &mut Gradients) {
        let scales = gradients.buffer(SIGMA, self.levels);
        for (n, sum) in sums.iter().enumerate() {
            scales[self.lod[n] as usize] -= (self.base[n] * self.sigma[n] * sum) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn document_places_centres_and_tokens_are_certain() {
        let rule = SigmaRule::default();
        assert_eq!(rule.place(64.0, 0), (64.0, 0.0));
        assert_eq!(rule.place(64.0, 1), (80.0, 32.0));
        assert_eq!(rule.place(1024.0, 2), (1536.0, 1024.0));
        let uniform = SigmaRule { uniform: true, ..rule };
        assert!((uniform.place(64.0, 1).1 - 32.0 / 12f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn original_places_starts_and_tokens_have_sigma_one() {
        let rule = SigmaRule { preset: SigmaPreset::Original, ..SigmaRule::default() };
        assert_eq!(rule.place(64.0, 0), (64.0, 1.0));
        assert_eq!(rule.place(64.0, 1), (64.0, 32.0));
    }

    #[test]
    fn spans_follow_one_another() {
        let (mu, sigma) = SigmaRule { block: 4, ..SigmaRule::default() }.tile(&[2, 1, 0, 0]);
        assert_eq!(mu, [8.0, 18.0, 20.0, 21.0]);
        assert_eq!(sigma, [16.0, 4.0, 0.0, 0.0]);
    }

    #[test]
    fn scales_that_are_no_list_of_numbers_are_refused() {
        for bad in ["3", "[]", "[1.0, \"a\"]", "[1e300]"] {
            let error = sigma_scales(&serde_json::from_str(bad).unwrap()).unwrap_err();
            assert!(error.contains("one for every level"), "{error}");
        }
        assert_eq!(sigma_scales(&serde_json::json!([1.0, 0.5])).unwrap(), [1.0, 0.5]);
    }

    #[test]
    fn a_block_of_one_is_refused() {
        let error = SigmaRule { block: 1, ..SigmaRule::default() }.check().unwrap_err();
        assert!(error.contains("positions.sigma.block: expected at least 2, got 1"), "{error}");
    }
}
