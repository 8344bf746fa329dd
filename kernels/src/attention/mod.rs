//! Attention over long sequences: dense causal, shifted sparse causal, sliding window and bidirectional, differentiable.
//!
//! Sources: exact tiled attention with an online softmax (Dao 2023, FlashAttention-2) and shifted sparse attention
//! (Chen et al. 2024, LongLoRA). Shifted sparse attention is written here as causal attention with a lower bound
//! per head, so nothing is rolled and nothing wraps around:
//!
//!   shift(h)    = 0 for the first ceil(H/2) query heads, else floor(G/2)
//!   start(i, h) = 0 if i < shift(h), else shift(h) + G·floor((i − shift(h))/G)
//!   query i of head h sees keys max(start(i, h), segment start of i) ..= i
//!
//! A group G of at least T is dense causal attention, in every head. The same groups exist without causality, for networks
//! that read both ways ([`Pattern::ShiftedBidirectional`]): query i sees all keys of its group.
//!
//! Shapes: q [B, T, H, D]; k and v [B, T, Hkv, D] with H a multiple of Hkv (query head h reads kv head
//! h / (H/Hkv) in place); the result is [B, T, H, D]. T is counted in entries, and so is G. Any T below 2³¹, any H,
//! D from 1 to 256, f32 or bf16 on the CPU. Operands may have any strides. Gradients are summed in f32.
//!
//! Scores may be lowered by ALiBi's slope·|i − j| per head (Press et al. 2022).
//!
//! Memory: beyond the result, one log-sum-exp per query and head, and tiles per thread. No T × T matrix exists.
//! Threads: the work is split into fixed pieces with one owner for each output, so the same inputs give the same
//! bytes however many threads run. NaN and infinity propagate from what a query sees, and from nothing else.
//!
//! [`prefix`] is the same attention for short rows that continue one document, without its queries; [`decode`] for new
//! entries of rows that each have a cache of keys and values.
//!
//! Errors: see [`attention`]. Left out: dropout, learned biases, other devices and dtypes.

mod backward;
pub mod decode;
mod forward;
mod op;
mod panel;
mod pattern;
pub mod prefix;
pub mod reference;
pub mod slices;
mod softmax;
mod view;

pub use op::{Options, attention, attention_with};
pub use pattern::{Pattern, Rows, alibi_slopes};

use crate::error::{KernelError, Result};
pub(crate) use pattern::OP;

/// [B, T, H, Hkv, D].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dims {
    pub batch: usize,
    pub entries: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub width: usize,
}

impl Dims {
    /// Refuses head counts and widths the kernels are not made for.
    pub fn check(self, slopes: Option<&[f32]>) -> Result<()> {
        let Self { entries, heads, kv_heads, width, .. } = self;
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(KernelError::shape(
                OP,
                "query heads that are a multiple of the kv heads, both at least 1",
                format!("{heads} query heads and {kv_heads} kv heads"),
            ));
        }
        if width == 0 || width > 256 {
            return Err(KernelError::shape(OP, "a head width of 1 to 256", format!("{width}")));
        }
        if entries > i32::MAX as usize / 2 {
            return Err(KernelError::shape(OP, "at most 1073741823 entries", format!("{entries}")));
        }
        match slopes {
            Some(slopes) if slopes.len() != heads => Err(KernelError::argument(
                OP,
                format!("expected {heads} slopes, one per query head, got {}", slopes.len()),
            )),
            Some(slopes) if slopes.iter().any(|s| !s.is_finite()) => {
                Err(KernelError::argument(OP, format!("expected finite slopes, got {slopes:?}")))
            }
            _ => Ok(()),
        }
    }

    /// Refuses anything but one finite place for each entry of a row.
    pub fn check_positions(self, positions: &[f32]) -> Result<()> {
        if positions.len() != self.entries || positions.iter().any(|p| !p.is_finite()) {
            let what = format!("expected {} finite positions, one per entry of a row", self.entries);
            let bad = positions.iter().find(|p| !p.is_finite());
            let got = bad.map_or_else(|| positions.len().to_string(), f32::to_string);
            return Err(KernelError::argument(OP, format!("{what}, got {got}")));
        }
        Ok(())
    }
}

/// Panels of each head that a forward task works on: enough to share the packing of keys, few enough to stay in the
/// cache.
fn forward_panels(group: usize) -> usize {
    (32 / group).clamp(4, 16)
}
