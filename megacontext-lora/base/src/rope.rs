//! Rotary positions: which angle a position gets, and how a context is stretched.
//!
//! Source: RoPE (Su et al. 2021), position interpolation (Chen et al. 2023), Gaussian damping (MegaContext's
//! positional encoding: a position known only as N(mu, sigma²) keeps the expectation of its rotation, which is the
//! rotation of mu shrunk by exp(−½(ω·sigma)²) in each band).
//!
//! Shapes: D head width, N positions. Units: mu and sigma in tokens, angles in radians.
//!
//! Angles are computed in f64 and stored in f32: in f32 the product of a position and a frequency is already wrong by
//! 1e-7 of the position. Errors: a scaling that is not known or not possible, as text for the caller to place.
//!
//! Left out here: scalings other than none and linear.

use candle_core::{Device, Tensor};
use serde_json::{Map, Value, json};

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
}

impl RopeScaling {
    /// Linear scaling, or none when the factor is 1.
    pub fn from_factor(factor: f64) -> Result<Self, String> {
        if !factor.is_finite() || factor < 1.0 {
            return Err(format!("rope factor: expected a finite number of at least 1, got {factor}"));
        }
        Ok(if factor == 1.0 { Self::None } else { Self::Linear { factor } })
    }

    /// Reads `rope_parameters` (transformers 5) or `rope_scaling` (older) of a `config.json`.
    pub fn from_hf(config: &Map<String, Value>) -> Result<Self, String> {
        let found = ["rope_parameters", "rope_scaling"]
            .iter()
            .find_map(|key| config.get(*key).filter(|v| !v.is_null()).map(|v| (*key, v)));
        let Some((key, value)) = found else { return Ok(Self::None) };
        let object =
            value.as_object().ok_or_else(|| format!("{key}: expected an object or null, got {value}"))?;
        let kind = object.get("rope_type").or_else(|| object.get("type"));
        let kind = match kind {
            None => "default",
            Some(v) => v.as_str().ok_or_else(|| format!("{key}.rope_type: expected a string, got {v}"))?,
        };
        match kind {
            "default" | "none" => Ok(Self::None),
            "linear" => {
                let factor = object
                    .get("factor")
                    .and_then(Value::as_f64)
                    .ok_or_else(|| format!("{key}: rope_type \"linear\" needs a number \"factor\""))?;
                Self::from_factor(factor).map_err(|e| format!("{key}: {e}"))
            }
            other => Err(format!("{key}.rope_type: expected \"default\" or \"linear\", got \"{other}\"")),
        }
    }

    /// The object for `rope_scaling` of a `config.json`; null when nothing is scaled.
    pub fn to_hf(&self) -> Value {
        match self {
            Self::None => Value::Null,
            Self::Linear { factor } => json!({"type": "linear", "rope_type": "linear", "factor": factor}),
        }
    }

    /// The stretch this scaling gives, 1 for none.
    pub fn factor(&self) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Linear { factor } => *factor,
        }
    }
}

impl std::fmt::Display for RopeScaling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Linear { factor } => write!(f, "linear x{factor}"),
        }
    }
}

/// Cosines and sines of N positions: two buffers of N·D/2 values, position-major.
///
/// `sigma` (same length as `mu`) damps each band by exp(−½(ω·sigma)²) with the scaled ω; `None` means certain
/// positions.
pub fn tables(omega: &[f64], mu: &[f64], sigma: Option<&[f64]>) -> (Vec<f32>, Vec<f32>) {
    let mut cos = Vec::with_capacity(mu.len() * omega.len());
    let mut sin = Vec::with_capacity(mu.len() * omega.len());
    for (n, &position) in mu.iter().enumerate() {
        let spread = sigma.map_or(0.0, |s| s[n]);
        for &w in omega {
            let keep = (-0.5 * (w * spread).powi(2)).exp();
            let (s, c) = (position * w).sin_cos();
            cos.push((c * keep) as f32);
            sin.push((s * keep) as f32);
        }
    }
    (cos, sin)
}

/// Rotation tables as the decoder reads them: `cos` and `sin` of shape [N, D/2].
#[derive(Clone, Debug)]
pub struct RopeTables {
    /// Cosines, damped where positions are uncertain, [N, D/2].
    pub cos_nd: Tensor,
    /// Sines, likewise.
    pub sin_nd: Tensor,
    /// Cosines and sines of blocks that turn by a base of their own, where a model has such.
    pub local: Option<[Tensor; 2]>,
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
}

impl Rope {
    /// The angular frequency of every band, D/2 of them, radians per token, scaling applied.
    pub fn frequencies(&self) -> Vec<f64> {
        let factor = self.scaling.factor();
        let power = |i: usize| self.theta.powf(-2.0 * i as f64 / self.width as f64);
        (0..self.width / 2).map(|i| power(i) / factor).collect()
    }

    /// Tables of the positions 0..n of a plain token sequence.
    pub fn sequence(&self, n: usize) -> candle_core::Result<RopeTables> {
        let mu: Vec<f64> = (0..n).map(|p| p as f64).collect();
        self.at(&mu, None)
    }

    /// Tables of given positions, N of them; `sigma` is their uncertainty, none where they are certain.
    pub fn at(&self, mu: &[f64], sigma: Option<&[f64]>) -> candle_core::Result<RopeTables> {
        let shape = (mu.len(), self.width / 2);
        let tensors = |frequencies: &[f64]| -> candle_core::Result<[Tensor; 2]> {
            let (cos, sin) = tables(frequencies, mu, sigma);
            Ok([Tensor::from_vec(cos, shape, &Device::Cpu)?, Tensor::from_vec(sin, shape, &Device::Cpu)?])
        };
        let [cos_nd, sin_nd] = tensors(&self.frequencies())?;
        let local = self.local_theta.map(|theta| {
            let rope = Self { theta, scaling: RopeScaling::None, local_theta: None, ..self.clone() };
            tensors(&rope.frequencies())
        });
        Ok(RopeTables { cos_nd, sin_nd, local: local.transpose()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope { width: 8, theta: 10000.0, scaling, local_theta: None }
    }

    #[test]
    fn linear_divides_every_angle() {
        let plain = tables(&rope(RopeScaling::None).frequencies(), &[3.0], None);
        let scaled = tables(&rope(RopeScaling::Linear { factor: 4.0 }).frequencies(), &[12.0], None);
        for (a, b) in plain.0.iter().zip(&scaled.0) {
            assert!((a - b).abs() < 1e-7);
        }
    }

    #[test]
    fn damping_keeps_certain_positions_and_kills_vague_ones() {
        let omega = rope(RopeScaling::None).frequencies();
        let (cos, sin) = tables(&omega, &[5.0, 5.0, 5.0], Some(&[0.0, 1.0, 1e9]));
        for band in 0..4 {
            let norm = |n: usize| (cos[n * 4 + band].powi(2) + sin[n * 4 + band].powi(2)).sqrt() as f64;
            assert!((norm(0) - 1.0).abs() < 1e-6);
            assert!((norm(1) - (-0.5 * omega[band].powi(2)).exp()).abs() < 1e-6);
            assert_eq!(norm(2), 0.0);
        }
    }

    #[test]
    fn factor_below_one_is_refused() {
        assert!(RopeScaling::from_factor(0.5).unwrap_err().contains("at least 1"));
    }

    #[test]
    fn unknown_rope_type_is_refused() {
        let config = json!({"rope_scaling": {"rope_type": "spiral"}});
        let error = RopeScaling::from_hf(config.as_object().unwrap()).unwrap_err();
        assert!(error.contains("spiral") && error.contains("linear"), "{error}");
    }

    #[test]
    fn hf_round_trip() {
        for scaling in [RopeScaling::None, RopeScaling::Linear { factor: 4.0 }] {
            let config = json!({ "rope_scaling": scaling.to_hf() });
            assert_eq!(RopeScaling::from_hf(config.as_object().unwrap()).unwrap(), scaling);
        }
    }
}
