//! Cosines and sines of positions.
//!
//! Angles are computed in f64 and stored in f32: in f32 the product of a position and a frequency is already wrong by 1e-7
//! of the position. In f64 an angle at position 1e8 is right to 1e-7.
//!
//! A sequence's length, which `dynamic` and `longrope` look at, is the largest position and one, unless it is stated.
//!
//! Shapes: W rotated width of a head, N positions; tables [N, W/2], position-major; time's bands first, then those of the
//! level. Errors: lengths that differ, positions and spreads that are not finite, a level beyond those there are.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::options::PositionOptions;
use super::scaling::RopeScaling;
use super::sigma::{MOST_LEVELS, Spread};
use crate::error::{BaseError, Result};

/// Where entries stand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Entries<'a> {
    /// Centre of each in tokens, N of them.
    pub mu: &'a [f64],
    /// Spread of each in tokens, at scale 1; none means certain positions.
    pub sigma: Option<&'a [f64]>,
    /// Level of each; none means tokens.
    pub lod: Option<&'a [u32]>,
    /// Scale of every level's spread: the value of the parameter [`super::SIGMA`]; none means 1. With scales the tables
    /// carry what the parameter's gradient needs.
    pub scales: Option<&'a [f32]>,
    /// Length of the sequence in tokens; none means the largest position and one.
    pub length: Option<usize>,
}

/// Rotation tables as the decoder reads them: `cos` and `sin` of shape [N, W/2].
#[derive(Clone, Debug)]
pub struct RopeTables {
    /// Cosines, damped where positions are uncertain, [N, W/2].
    pub cos_nd: Tensor,
    /// Sines, likewise.
    pub sin_nd: Tensor,
    /// Cosines and sines of blocks that turn by a base of their own, where a model has such.
    pub local: Option<[Tensor; 2]>,
    /// Centres of the entries where they are not 0, 1, 2, …: what ALiBi counts distances by.
    pub mu: Option<Arc<Vec<f32>>>,
    /// What the gradient of sigma needs, where it was made with scales.
    pub spread: Option<Arc<Spread>>,
}

/// What a model turns its heads by: the rotated width, the base of the frequencies and how they are stretched.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Rotated elements of a head, D where the whole head turns; even.
    pub width: usize,
    /// Base of the geometric series of frequencies.
    pub theta: f64,
    /// Stretch.
    pub scaling: RopeScaling,
    /// Base of the frequencies of blocks that turn by tables of their own, which no scaling stretches (Gemma 3's windowed
    /// blocks).
    pub local_theta: Option<f64>,
    /// Whatever is not as in a plain model.
    pub options: PositionOptions,
}

impl Rope {
    /// A plain model's, stretched by `scaling`.
    pub fn new(width: usize, theta: f64, scaling: RopeScaling) -> Self {
        Self { width, theta, scaling, local_theta: None, options: PositionOptions::default() }
    }

    /// The angular frequency of every band of time in a sequence of `length` tokens, radians per token: W/2 of them, less
    /// those that turn by the level.
    pub fn frequencies(&self, length: usize) -> Vec<f64> {
        let width = self.width - 2 * self.options.lod_bands;
        let mut omega = self.scaling.frequencies(self.theta, width, length);
        let slow = &self.options.slow_periods;
        let first = omega.len() - slow.len();
        for (w, period) in omega[first..].iter_mut().zip(slow) {
            *w = std::f64::consts::TAU / period;
        }
        omega
    }

    /// The rope of blocks that turn by tables of their own.
    fn local(&self) -> Option<Self> {
        self.local_theta.map(|theta| Self {
            theta,
            scaling: RopeScaling::None,
            local_theta: None,
            ..self.clone()
        })
    }

    /// The angular frequency of every band that turns by the level, radians per level.
    pub fn lod_frequencies(&self) -> Vec<f64> {
        RopeScaling::None.frequencies(self.theta, 2 * self.options.lod_bands, 0)
    }

    /// Cosines and sines of entries: two buffers of N·W/2 values.
    pub fn values(&self, entries: &Entries) -> Result<(Vec<f32>, Vec<f32>)> {
        check(entries)?;
        Ok(self.turn(entries))
    }

    fn turn(&self, entries: &Entries) -> (Vec<f32>, Vec<f32>) {
        let n = entries.mu.len();
        let omega = self.frequencies(entries.length.unwrap_or_else(|| length_of(entries.mu)));
        let by_level = self.lod_frequencies();
        let amplitude = self.scaling.attention_factor();
        let (mut cos, mut sin) =
            (Vec::with_capacity(n * self.width / 2), Vec::with_capacity(n * self.width / 2));
        for (at, &position) in entries.mu.iter().enumerate() {
            let spread = entries.spread(at);
            let mut put = |angle: f64, keep: f64| {
                let (s, c) = angle.sin_cos();
                cos.push((c * keep) as f32);
                sin.push((s * keep) as f32);
            };
            for &w in &omega {
                put(position * w, amplitude * damping(w, spread));
            }
            for &w in &by_level {
                put(f64::from(entries.level(at)) * w, amplitude);
            }
        }
        (cos, sin)
    }

    /// Tables of the positions 0..n of a plain token sequence.
    pub fn sequence(&self, n: usize) -> candle_core::Result<RopeTables> {
        let mu: Vec<f64> = (0..n).map(|p| p as f64).collect();
        self.tables(&Entries { mu: &mu, length: Some(n), ..Entries::default() })
    }

    /// Tables of given positions, N of them; `sigma` is their uncertainty, none where they are certain.
    pub fn at(&self, mu: &[f64], sigma: Option<&[f64]>) -> Result<RopeTables> {
        self.place(&Entries { mu, sigma, ..Entries::default() })
    }

    /// Tables of certain positions in a sequence of `length` tokens, whatever the largest of them is.
    pub fn sequence_in(&self, mu: &[f64], length: usize) -> Result<RopeTables> {
        self.place(&Entries { mu, length: Some(length), ..Entries::default() })
    }

    /// Tables of entries.
    pub fn place(&self, entries: &Entries) -> Result<RopeTables> {
        check(entries)?;
        let mu = Some(Arc::new(entries.mu.iter().map(|mu| *mu as f32).collect()));
        let spread = entries.scales.map(|scales| Arc::new(self.spread(entries, scales)));
        Ok(RopeTables { mu, spread, ..self.tables(entries)? })
    }

    fn tables(&self, entries: &Entries) -> candle_core::Result<RopeTables> {
        let shape = (entries.mu.len(), self.width / 2);
        let tensors = |rope: &Self| -> candle_core::Result<[Tensor; 2]> {
            let (cos, sin) = rope.turn(entries);
            let tensor = |values: Vec<f32>| Tensor::from_vec(values, shape, &Device::Cpu);
            Ok([tensor(cos)?, tensor(sin)?])
        };
        let [cos_nd, sin_nd] = tensors(self)?;
        let local = self.local().map(|rope| tensors(&rope)).transpose()?;
        Ok(RopeTables { cos_nd, sin_nd, local, mu: None, spread: None })
    }

    fn spread(&self, entries: &Entries, scales: &[f32]) -> Spread {
        let n = entries.mu.len();
        let length = entries.length.unwrap_or_else(|| length_of(entries.mu));
        let squares = |rope: &Self| {
            let mut squares: Vec<f32> = rope.frequencies(length).iter().map(|w| (w * w) as f32).collect();
            squares.resize(self.width / 2, 0.0);
            squares
        };
        Spread {
            omega_squared: squares(self),
            local: self.local().map(|rope| squares(&rope)),
            base: entries.sigma.map_or_else(|| vec![0.0; n], <[f64]>::to_vec),
            sigma: (0..n).map(|at| entries.spread(at)).collect(),
            lod: (0..n).map(|at| entries.level(at)).collect(),
            levels: scales.len(),
        }
    }
}

/// How much of a band of frequency `w` is left when the position is uncertain by `sigma`.
pub fn damping(w: f64, sigma: f64) -> f64 {
    (-0.5 * (w * sigma).powi(2)).exp()
}

/// Tokens of a sequence that reaches to the largest of these positions.
fn length_of(mu: &[f64]) -> usize {
    mu.iter().copied().fold(0.0, f64::max).floor() as usize + 1
}

impl Entries<'_> {
    fn level(&self, at: usize) -> u32 {
        self.lod.map_or(0, |lod| lod[at])
    }

    fn spread(&self, at: usize) -> f64 {
        let scale = self.scales.map_or(1.0, |scales| f64::from(scales[self.level(at) as usize]));
        self.sigma.map_or(0.0, |sigma| sigma[at] * scale)
    }
}

fn check(entries: &Entries) -> Result<()> {
    let fail = |message: String| Err(BaseError::Input { message });
    let n = entries.mu.len();
    if let Some(bad) = entries.mu.iter().find(|p| !p.is_finite()) {
        return fail(format!("mu: expected finite positions, got {bad}"));
    }
    if let Some(sigma) = entries.sigma {
        if sigma.len() != n {
            return fail(format!("sigma: expected {n} values, one for each position, got {}", sigma.len()));
        }
        if let Some(bad) = sigma.iter().find(|s| !s.is_finite() || **s < 0.0) {
            return fail(format!("sigma: expected finite spreads of at least 0, got {bad}"));
        }
    }
    let levels = entries.scales.map_or(MOST_LEVELS, <[f32]>::len);
    if let Some(lod) = entries.lod {
        if lod.len() != n {
            return fail(format!("lod: expected {n} values, one for each position, got {}", lod.len()));
        }
        if let Some(bad) = lod.iter().find(|l| **l as usize >= levels) {
            return fail(format!("lod: expected a level below {levels}, got {bad}"));
        }
    }
    if levels == 0 {
        return fail("sigma scales: expected at least one level, got none".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope::new(8, 10000.0, scaling)
    }

    fn values(rope: &Rope, mu: &[f64], sigma: Option<&[f64]>) -> (Vec<f32>, Vec<f32>) {
        rope.values(&Entries { mu, sigma, ..Entries::default() }).unwrap()
    }

    fn refused(entries: Entries, what: &str) {
        let error = rope(RopeScaling::None).values(&entries).unwrap_err().to_string();
        assert!(error.contains(what), "expected {what:?} in {error:?}");
    }

    #[test]
    fn linear_divides_every_angle() {
        let plain = values(&rope(RopeScaling::None), &[3.0], None);
        let scaled = values(&rope(RopeScaling::Linear { factor: 4.0 }), &[12.0], None);
        for (a, b) in plain.0.iter().zip(&scaled.0) {
            assert!((a - b).abs() < 1e-7);
        }
    }

    #[test]
    fn damping_keeps_certain_positions_and_kills_vague_ones() {
        let rope = rope(RopeScaling::None);
        let omega = rope.frequencies(6);
        let (cos, sin) = values(&rope, &[5.0, 5.0, 5.0], Some(&[0.0, 1.0, 1e9]));
        for band in 0..4 {
            let norm = |n: usize| (cos[n * 4 + band].powi(2) + sin[n * 4 + band].powi(2)).sqrt() as f64;
            assert!((norm(0) - 1.0).abs() < 1e-6);
            assert!((norm(1) - (-0.5 * omega[band].powi(2)).exp()).abs() < 1e-6);
            assert_eq!(norm(2), 0.0);
        }
    }

    #[test]
    fn a_length_is_the_largest_position_and_one() {
        assert_eq!([length_of(&[]), length_of(&[0.0]), length_of(&[7.5, 3.0])], [1, 1, 8]);
        let rope = rope(RopeScaling::Dynamic { factor: 1.0, original: 4 });
        assert_eq!(values(&rope, &[7.0], None), {
            let mu: Vec<f64> = (0..8).map(f64::from).collect();
            let all = values(&rope, &mu, None);
            (all.0[28..].to_vec(), all.1[28..].to_vec())
        });
    }

    #[test]
    fn slow_bands_replace_the_slowest_and_are_not_scaled() {
        let mut rope = rope(RopeScaling::Linear { factor: 4.0 });
        let plain = rope.frequencies(1);
        rope.options.slow_periods = vec![1e6, 1e9];
        let omega = rope.frequencies(1);
        assert_eq!(omega[..2], plain[..2]);
        assert!((omega[2] * 1e6 - std::f64::consts::TAU).abs() < 1e-9);
        assert!((omega[3] * 1e9 - std::f64::consts::TAU).abs() < 1e-9);
    }

    #[test]
    fn the_lod_axis_turns_by_the_level_alone() {
        let mut rope = rope(RopeScaling::None);
        rope.options.lod_bands = 2;
        let entries = |lod: &'static [u32]| Entries {
            mu: &[3.0, 9.0],
            sigma: Some(&[2.0, 2.0]),
            lod: Some(lod),
            ..Entries::default()
        };
        let (cos, _) = rope.values(&entries(&[1, 1])).unwrap();
        assert_eq!(cos.len(), 8);
        // Undamped, the same wherever the entry stands, another for another level.
        assert_eq!(cos[2..4], cos[6..8]);
        assert_eq!(cos[2], 1f64.cos() as f32);
        assert_ne!(cos[2..4], rope.values(&entries(&[2, 2])).unwrap().0[2..4]);
        assert_ne!(cos[0], cos[4]);
    }

    #[test]
    fn positions_that_are_not_finite_are_refused() {
        refused(
            Entries { mu: &[1.0, f64::NAN], ..Entries::default() },
            "mu: expected finite positions, got NaN",
        );
    }

    #[test]
    fn sigma_below_zero_is_refused() {
        let entries = Entries { mu: &[1.0], sigma: Some(&[-1.0]), ..Entries::default() };
        refused(entries, "sigma: expected finite spreads of at least 0, got -1");
    }

    #[test]
    fn sigma_that_is_no_number_is_refused() {
        let entries = Entries { mu: &[1.0], sigma: Some(&[f64::NAN]), ..Entries::default() };
        refused(entries, "sigma: expected finite spreads of at least 0, got NaN");
    }

    #[test]
    fn sigma_of_another_length_is_refused() {
        let entries = Entries { mu: &[1.0], sigma: Some(&[1.0, 2.0]), ..Entries::default() };
        refused(entries, "sigma: expected 1 values, one for each position, got 2");
    }

    #[test]
    fn lod_of_another_length_is_refused() {
        let entries = Entries { mu: &[1.0], lod: Some(&[]), ..Entries::default() };
        refused(entries, "lod: expected 1 values, one for each position, got 0");
    }

    #[test]
    fn a_level_without_a_scale_is_refused() {
        let entries =
            Entries { mu: &[1.0], lod: Some(&[2]), scales: Some(&[1.0, 1.0]), ..Entries::default() };
        refused(entries, "lod: expected a level below 2, got 2");
    }
}
