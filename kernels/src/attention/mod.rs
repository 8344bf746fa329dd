//! Attention over long sequences: dense causal, shifted sparse causal and bidirectional, differentiable.
//!
//! Sources: exact tiled attention with an online softmax (Dao 2023, FlashAttention-2) and shifted sparse attention
//! (Chen et al. 2024, LongLoRA). Shifted sparse attention is written here as causal attention with a lower bound
//! per head, so nothing is rolled and nothing wraps around:
//!
//!   shift(h)    = 0 for the first ceil(H/2) query heads, else floor(G/2)
//!   start(i, h) = 0 if i < shift(h), else shift(h) + G·floor((i − shift(h))/G)
//!   query i of head h sees keys max(start(i, h), segment start of i) ..= i
//!
//! A group G of at least T is dense causal attention, in every head.
//!
//! Shapes: q [B, T, H, D]; k and v [B, T, Hkv, D] with H a multiple of Hkv (query head h reads kv head
//! h / (H/Hkv) in place); the result is [B, T, H, D]. T is counted in entries, and so is G. Any T, any H,
//! D from 1 to 256, f32 on the CPU. Operands may have any strides.
//!
//! Memory: beyond the result, one log-sum-exp per query and head, and a tile per thread. No T × T matrix exists.
//! Threads: the work is split into fixed pieces with one owner for each output, so the same inputs give the same
//! bytes however many threads run. NaN and infinity propagate from what a query sees, and from nothing else.
//!
//! Errors: see [`attention`]. Left out: dropout, additive biases, other devices and dtypes.

mod backward;
mod forward;
mod op;
mod pattern;
pub mod reference;
pub mod slices;
mod tile;

pub use op::attention;
pub use pattern::{Pattern, Rows};
