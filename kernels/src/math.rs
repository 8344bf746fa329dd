//! An exponential the compiler can vectorise.
//!
//! Source: Cody–Waite reduction x = n·ln2 + r with ln2 split in two, then the degree-6 Taylor-like minimax of e^r on
//! [−ln2/2, ln2/2] (coefficients as in Cephes `expf`, Moshier). Relative error below 2e-7 for results that are normal
//! numbers; results below the smallest normal f32 are 0, above the largest +inf; NaN stays NaN.

/// e^x of one lane; inlines into loops that become vector code.
#[inline(always)]
pub fn exp_lane(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Adding and taking away 1.5·2^23 rounds to the nearest integer without a call.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-88.0, 88.8);
    let n = (clamped * LOG2_E + ROUND) - ROUND;
    let r = clamped - n * LN2_HI - n * LN2_LO;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let value = p * r * r + r + 1.0;
    // 2^n in two halves, so that n = 128 does not overflow before the product does.
    let half = (n as i32) >> 1;
    let two = |e: i32| f32::from_bits(((e + 127) as u32) << 23);
    let scaled = value * two(half) * two(n as i32 - half);
    let low = if x < -87.336_54 { 0.0 } else { scaled };
    let high = if x > 88.722_84 { f32::INFINITY } else { low };
    if x.is_nan() { x } else { high }
}

#[cfg(test)]
mod tests {
    use super::exp_lane;

    #[test]
    fn close_to_libm_everywhere() {
        let mut worst = 0f64;
        for i in -870_000..=887_000 {
            let x = i as f32 * 1e-4;
            let (got, want) = (f64::from(exp_lane(x)), f64::from(x).exp());
            worst = worst.max(((got - want) / want).abs());
        }
        assert!(worst < 2e-7, "relative error {worst}");
    }

    #[test]
    fn edges() {
        assert_eq!(exp_lane(0.0), 1.0);
        assert_eq!(exp_lane(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_lane(-1e30), 0.0);
        assert_eq!(exp_lane(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp_lane(100.0), f32::INFINITY);
        assert!(exp_lane(f32::NAN).is_nan());
    }
}
