//! Scalar functions, sums and conversions the compiler can vectorise.
//!
//! Source of the exponential: Cody–Waite reduction x = n·ln2 + r with ln2 split in two, then a polynomial for e^r on
//! [−ln2/2, ln2/2] (coefficients as in Cephes `expf`, Moshier). No step can overflow an integer, so that checked builds
//! vectorise it too.

use crate::cpu::multiversion;
use crate::store::Store;

/// e^x of one lane; inlines into loops that become vector code. Relative error below 2e-7; below −87.3 it is 0, above 88
/// it stays e^88, NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LEAST: f32 = -87.3;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // 1.5·2^23: adding it leaves the nearest integer in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let least = if x < LEAST { LEAST } else { x };
    let x_in = if least > 88.0 { 88.0 } else { least };
    let shifted = x_in * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x_in - n * LN2_HI - n * LN2_LO;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let value = p * r * r + r + 1.0;
    let two_to_n = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < LEAST { 0.0 } else { value * two_to_n }
}

/// 2^x of one lane; inlines into loops that become vector code. Relative error below 2e-7; below −126 it is 0, NaN stays
/// NaN. Meant for x ≤ 0: above 127 the result is not defined.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    // Written so that NaN comes through: a comparison with NaN is false.
    let x_in = if x < -126.0 { -126.0 } else { x };
    let shifted = x_in + ROUND;
    let r = x_in - (shifted - ROUND);
    // Taylor's coefficients ln(2)^k/k! on [−1/2, 1/2], the last ones adjusted to level the error.
    let mut p = 1.535_336_4e-4;
    p = p * r + 1.339_887_4e-3;
    p = p * r + 9.618_437e-3;
    p = p * r + 5.550_332_5e-2;
    p = p * r + 2.402_264_8e-1;
    p = p * r + 6.931_472e-1;
    p = p * r + 1.0;
    let two_to_n = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < -126.0 { 0.0 } else { p * two_to_n }
}

multiversion! {
    /// Σ a·b.
    pub(crate) fn dot<A: Store, B: Store>(a: &[A], b: &[B]) -> f32 {
        let mut lanes = [0f32; 16];
        let whole = a.len().min(b.len()) / 16 * 16;
        for (x, y) in a[..whole].chunks_exact(16).zip(b[..whole].chunks_exact(16)) {
            for i in 0..16 {
                lanes[i] += x[i].get() * y[i].get();
            }
        }
        let rest = a[whole..].iter().zip(&b[whole..]).map(|(x, y)| x.get() * y.get()).sum::<f32>();
        lanes.iter().sum::<f32>() + rest
    }
}

multiversion! {
    /// Values into another storage type.
    pub(crate) fn convert<A: Store, B: Store>(values: &[A], out: &mut [B]) {
        for (out, value) in out.iter_mut().zip(values) {
            *out = B::put(value.get());
        }
    }
}

multiversion! {
    /// out += values.
    pub(crate) fn add_row<S: Store>(out: &mut [S], values: &[f32]) {
        for (o, x) in out.iter_mut().zip(values) {
            *o = S::put(o.get() + x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{exp, exp2};

    #[test]
    fn exp2_is_close_to_libm_and_keeps_its_edges() {
        for i in 0..=1_260_000 {
            let x = i as f32 * -1e-4;
            let want = f64::from(x).exp2();
            let relative = ((f64::from(exp2(x)) - want) / want).abs();
            assert!(relative < 2e-7, "{x}: relative error {relative}");
        }
        assert_eq!(exp2(0.0), 1.0);
        assert_eq!(exp2(-1.0), 0.5);
        assert_eq!(exp2(-126.5), 0.0);
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
        assert!(exp2(f32::NAN).is_nan());
    }

    #[test]
    fn exp_is_close_to_libm_and_keeps_its_edges() {
        for i in -872_000..=880_000 {
            let x = i as f32 * 1e-4;
            let want = f64::from(x).exp();
            let relative = ((f64::from(exp(x)) - want) / want).abs();
            assert!(relative < 2e-7, "{x}: relative error {relative}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan() && exp(-f32::NAN).is_nan());
        assert!(exp(f32::INFINITY).is_finite());
    }
}
