//! Attention with a bias on every score, by plain tensor operations on candle's tape.
//!
//! For parity alone: the original masks padded keys by −10⁴ and lets padded queries take part, which no pattern of the
//! attention kernel expresses. Holds the T × T scores; for rows as short as a block.
//!
//! Shapes: q [B, T, H, D], k and v [B, T, G, D] (query head h reads kv head h/(H/G)), bias [B, T, T].

use candle_core::{D, Tensor};

use crate::error::Result;

/// softmax(scale·QKᵀ + bias)·V, [B, T, H, D].
pub(super) fn attention([q, k, v]: [&Tensor; 3], scale: f64, bias_btt: &Tensor) -> Result<Tensor> {
    let heads = q.dim(2)?;
    let q_bhtd = q.transpose(1, 2)?.contiguous()?;
    let [k_bhtd, v_bhtd] = [k, v].map(|kv| repeated(kv, heads));
    let (k_bhtd, v_bhtd) = (k_bhtd?, v_bhtd?);
    let scores = (q_bhtd.matmul(&k_bhtd.t()?)? * scale)?.broadcast_add(&bias_btt.unsqueeze(1)?)?;
    // A softmax does not change when all its scores move, so the largest needs no gradient.
    let moved = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let probabilities = moved.broadcast_div(&moved.sum_keepdim(D::Minus1)?)?;
    Ok(probabilities.matmul(&v_bhtd)?.transpose(1, 2)?.contiguous()?)
}

/// [B, T, G, D] as [B, H, T, D], each kv head once for every query head that reads it.
fn repeated(kv_btgd: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, t, g, d) = kv_btgd.dims4()?;
    let each = kv_btgd.unsqueeze(3)?.broadcast_as((b, t, g, heads / g, d))?;
    Ok(each.reshape((b, t, heads, d))?.transpose(1, 2)?.contiguous()?)
}
