//! Next-token cross-entropy over the output head, in chunks of positions.
//!
//! Source: NLL_i = logsumexp_v(z_iv) − z_i,target with z = h·Wᵀ; dz = softmax(z) − onehot(target).
//! The logits of all positions never exist at once: a chunk's logits are made, turned into their own gradient in
//! place, multiplied back into the gradients of the hidden states and of the head, and forgotten.
//!
//! Shapes: h [N, E], W [V, E], targets N. Units: nats. Sums over positions in f64.
//! A target of [`IGNORE`] takes no part.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::cpu::{multiversion, tensor, with_values};
use crate::error::{KernelError, Result};
use crate::gemm::{Mat, matmul};
use crate::math::exp;

const OP: &str = "head_cross_entropy";

/// The target of a position that is not scored.
pub const IGNORE: u32 = u32::MAX;

/// Bytes of logits alive at one time; at least one position is always taken.
const LOGIT_BYTES: usize = 16 << 20;

/// Rows of logits alive at one time for a vocabulary of `vocab`.
pub fn chunk_rows(vocab: usize) -> usize {
    (LOGIT_BYTES / (4 * vocab.max(1))).clamp(1, 4096)
}

/// What the loss gives back.
pub struct HeadLoss {
    /// NLL of each position in nats, 0 where ignored.
    pub nll: Vec<f32>,
    /// Number of scored positions.
    pub count: usize,
    /// Gradient of `gradient_scale`·Σ NLL with respect to h, [N, E]; present when gradients were asked for.
    pub d_hidden: Option<Tensor>,
}

impl HeadLoss {
    /// Σ NLL in nats.
    pub fn sum(&self) -> f64 {
        self.nll.iter().map(|v| f64::from(*v)).sum()
    }
}

/// How gradients are wanted.
pub enum Gradient<'a> {
    /// None: evaluation.
    Skip,
    /// With respect to h only, of `scale`·Σ NLL.
    Hidden {
        /// Multiplies the gradient, for example 1 / number of tokens in the whole batch.
        scale: f32,
    },
    /// With respect to h and, added to the buffer [V·E], to the head.
    HiddenAndHead {
        /// As above.
        scale: f32,
        /// Row-major [V, E].
        head: &'a mut [f32],
    },
}

multiversion! {
    /// Returns the NLL of one row and, when `scale` is not 0, replaces its logits by their gradient.
    fn row(z: &mut [f32], target: usize, scale: f32) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let whole = z.len() / 16 * 16;
        for chunk in z[..whole].chunks_exact(16) {
            for i in 0..16 {
                lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
            }
        }
        let mut max = f32::NEG_INFINITY;
        for v in lanes.iter().chain(&z[whole..]) {
            max = if *v > max { *v } else { max };
        }
        let hit = z[target];
        let mut sums = [0f32; 16];
        for chunk in z[..whole].chunks_exact_mut(16) {
            for i in 0..16 {
                chunk[i] = exp(chunk[i] - max);
                sums[i] += chunk[i];
            }
        }
        let mut sum: f32 = sums.iter().sum();
        for v in &mut z[whole..] {
            *v = exp(*v - max);
            sum += *v;
        }
        if scale != 0.0 {
            let factor = scale / sum;
            for v in z.iter_mut() {
                *v *= factor;
            }
            z[target] -= scale;
        }
        max + sum.ln() - hit
    }
}

/// Cross-entropy of `targets` under softmax(h·Wᵀ).
///
/// # Errors
/// When shapes do not agree or a target is outside the vocabulary.
pub fn head_cross_entropy(
    h_ne: &Tensor,
    w_ve: &Tensor,
    targets: &[u32],
    mut gradient: Gradient,
) -> Result<HeadLoss> {
    let (&[n, width], &[vocab, w_width]) = (h_ne.dims(), w_ve.dims()) else {
        return Err(KernelError::shape(
            OP,
            "h [N, E] and W [V, E]",
            format!("{:?}, {:?}", h_ne.dims(), w_ve.dims()),
        ));
    };
    if width != w_width || targets.len() != n {
        return Err(KernelError::shape(
            OP,
            format!("W [V, {width}] and {n} targets"),
            format!("W {:?} and {} targets", w_ve.dims(), targets.len()),
        ));
    }
    if let Some(bad) = targets.iter().find(|t| **t != IGNORE && **t as usize >= vocab) {
        return Err(KernelError::argument(OP, format!("target: expected below {vocab}, got {bad}")));
    }
    if let Gradient::HiddenAndHead { head, .. } = &gradient
        && head.len() != vocab * width
    {
        let got = format!("{} values", head.len());
        return Err(KernelError::shape(OP, format!("a head gradient of {} values", vocab * width), got));
    }
    let scale = match &gradient {
        Gradient::Skip => 0.0,
        Gradient::Hidden { scale } | Gradient::HiddenAndHead { scale, .. } => *scale,
    };
    let rows = chunk_rows(vocab);
    let mut nll = vec![0f32; n];
    let mut d_hidden = (scale != 0.0).then(|| vec![0f32; n * width]);
    with_values(OP, h_ne, |h| {
        with_values(OP, w_ve, |w| {
            let mut logits = vec![0f32; rows.min(n) * vocab];
            let w = Mat::new(w, vocab, width);
            for first in (0..n).step_by(rows) {
                let count = rows.min(n - first);
                let h = Mat::new(&h[first * width..], count, width);
                let z = &mut logits[..count * vocab];
                matmul(z, h, w.t(), 1.0, false);
                z.par_chunks_mut(vocab).zip(&mut nll[first..first + count]).enumerate().for_each(
                    |(i, (z, nll))| match targets[first + i] {
                        IGNORE => z.fill(0.0),
                        target => *nll = row(z, target as usize, scale),
                    },
                );
                if let Some(d_hidden) = &mut d_hidden {
                    let z = Mat::new(z, count, vocab);
                    matmul(&mut d_hidden[first * width..][..count * width], z, w, 1.0, false);
                    if let Gradient::HiddenAndHead { head, .. } = &mut gradient {
                        matmul(head, z.t(), h, 1.0, true);
                    }
                }
            }
        })
    })
    .and_then(|r| r)?;
    let d_hidden = match d_hidden {
        Some(values) => Some(tensor(values, (n, width))?),
        None => None,
    };
    Ok(HeadLoss { nll, count: targets.iter().filter(|t| **t != IGNORE).count(), d_hidden })
}
