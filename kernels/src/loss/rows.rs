//! Losses of one position over its row of logits, and their gradients in place.
//!
//! With p and q the softmaxes of teacher and student, z the logits and c the cap (z' = c·tanh(z/c), dz'/dz = 1 − (z'/c)²):
//!   NLL = lse(z) − z_target,            gradient softmax(z) − onehot(target);
//!   KL  = Σ p·(log p − log q),          gradient q − p.
//! NaN comes through, and an infinite logit gives NaN or infinity.

use crate::cpu::multiversion;
use crate::math::exp;
use crate::store::Store;

/// log Σ e^z as a maximum and the logarithm of a sum: z − max − log is exact for large z, z − (max + log) is not.
#[derive(Clone, Copy)]
pub(super) struct LogSum {
    max: f32,
    log: f32,
}

impl LogSum {
    fn of<S: Store>(z: &[S]) -> Self {
        let max = greatest(z);
        Self { max, log: exponentials(z, max).ln() }
    }
}

#[inline(always)]
fn tanh(x: f32) -> f32 {
    let t = exp(-2.0 * x.abs());
    ((1.0 - t) / (1.0 + t)).copysign(x)
}

multiversion! {
    /// z = cap·tanh(z/cap).
    pub(super) fn cap_row(z: &mut [f32], cap: f32) {
        for z in z {
            *z = cap * tanh(*z / cap);
        }
    }
}

multiversion! {
    /// The greatest value that is a number.
    fn greatest<S: Store>(z: &[S]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let whole = z.len() / 16 * 16;
        for chunk in z[..whole].chunks_exact(16) {
            for i in 0..16 {
                let v = chunk[i].get();
                lanes[i] = if v > lanes[i] { v } else { lanes[i] };
            }
        }
        let mut max = f32::NEG_INFINITY;
        for v in lanes.into_iter().chain(z[whole..].iter().map(|v| v.get())) {
            max = if v > max { v } else { max };
        }
        max
    }
}

multiversion! {
    /// Σ e^(z − max).
    fn exponentials<S: Store>(z: &[S], max: f32) -> f32 {
        let mut lanes = [0f32; 16];
        let whole = z.len() / 16 * 16;
        for chunk in z[..whole].chunks_exact(16) {
            for i in 0..16 {
                lanes[i] += exp(chunk[i].get() - max);
            }
        }
        let mut sum: f32 = lanes.iter().sum();
        for v in &z[whole..] {
            sum += exp(v.get() - max);
        }
        sum
    }
}

/// How the gradient goes through the cap: 1 − (z·inverse)², where 0 stands for no cap.
fn inverse(cap: Option<f32>) -> f32 {
    cap.map_or(0.0, |cap| 1.0 / cap)
}

multiversion! {
    /// z = scale·softmax(z), through the cap.
    fn softmax_gradient(z: &mut [f32], lse: LogSum, scale: f32, inverse: f32) {
        for z in z {
            let capped = *z * inverse;
            *z = scale * exp(*z - lse.max - lse.log) * (1.0 - capped * capped);
        }
    }
}

/// The NLL of one row of logits, already capped; unless `scale` is 0 they become `scale` times its gradient.
pub(super) fn nll(z: &mut [f32], target: usize, scale: f32, cap: Option<f32>) -> f32 {
    let lse = LogSum::of(z);
    let hit = z[target];
    if scale != 0.0 {
        let through = hit * inverse(cap);
        softmax_gradient(z, lse, scale, inverse(cap));
        z[target] -= scale * (1.0 - through * through);
    }
    (lse.max - hit) + lse.log
}

/// p·(log p − log q).
#[inline(always)]
fn term(z: f32, t: f32, lse: LogSum, t_lse: LogSum) -> f32 {
    let t = t - t_lse.max - t_lse.log;
    let p = exp(t);
    // What the teacher excludes adds nothing, though its logarithm is infinite.
    if p == 0.0 { 0.0 } else { p * (t - (z - lse.max - lse.log)) }
}

multiversion! {
    /// Σ p·(log p − log q).
    fn divergence<T: Store>(z: &[f32], t: &[T], lse: LogSum, t_lse: LogSum) -> f32 {
        let mut lanes = [0f32; 16];
        let whole = z.len().min(t.len()) / 16 * 16;
        for (z, t) in z[..whole].chunks_exact(16).zip(t[..whole].chunks_exact(16)) {
            for i in 0..16 {
                lanes[i] += term(z[i], t[i].get(), lse, t_lse);
            }
        }
        let mut sum: f32 = lanes.iter().sum();
        for (z, t) in z[whole..].iter().zip(&t[whole..]) {
            sum += term(*z, t.get(), lse, t_lse);
        }
        sum
    }
}

multiversion! {
    /// z = scale·(q − p), through the cap.
    fn divergence_gradient<T: Store>(z: &mut [f32], t: &[T], lse: LogSum, t_lse: LogSum, scale: f32, inverse: f32) {
        for (z, t) in z.iter_mut().zip(t) {
            let capped = *z * inverse;
            let apart = exp(*z - lse.max - lse.log) - exp(t.get() - t_lse.max - t_lse.log);
            *z = scale * apart * (1.0 - capped * capped);
        }
    }
}

/// KL(softmax(t) ‖ softmax(z)) of one row of logits, already capped; unless `scale` is 0 they become `scale` times its
/// gradient.
pub(super) fn kl<T: Store>(z: &mut [f32], t: &[T], scale: f32, cap: Option<f32>) -> f32 {
    let (lse, t_lse) = (LogSum::of(z), LogSum::of(t));
    let value = divergence(z, t, lse, t_lse);
    if scale != 0.0 {
        divergence_gradient(z, t, lse, t_lse, scale, inverse(cap));
    }
    value
}

multiversion! {
    /// Σ|x| and the greatest |x|; NaN or infinite when a value is.
    pub(super) fn magnitude<S: Store>(values: &[S]) -> (f32, f32) {
        let (mut sums, mut most) = ([0f32; 16], [0f32; 16]);
        let whole = values.len() / 16 * 16;
        for chunk in values[..whole].chunks_exact(16) {
            for i in 0..16 {
                let v = chunk[i].get().abs();
                sums[i] += v;
                most[i] = if v > most[i] { v } else { most[i] };
            }
        }
        let (mut sum, mut greatest) = (sums.iter().sum::<f32>(), most.into_iter().fold(0f32, f32::max));
        for v in &values[whole..] {
            let v = v.get().abs();
            sum += v;
            greatest = greatest.max(v);
        }
        // The greatest of some values ignores NaN; their sum does not.
        (sum, if sum.is_nan() { f32::NAN } else { greatest })
    }
}
