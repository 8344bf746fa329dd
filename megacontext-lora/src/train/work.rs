//! How much a training step computes: floating-point operations by part, for plans and measurements.
//!
//! A multiply-add counts two. Attention counts the pairs of a query and a key that the pattern lets see each other, as
//! length²/2 of each group; its backward pass is two and a half forward passes. A frozen weight takes a forward pass and
//! the input's gradient, what learns takes its own gradient too, recomputation one more forward pass. Everything that is
//! no product (norms, rotations, softmax, optimiser) counts nothing.
//!
//! Units: FLOPs. T entries, G group, D head width, E model width, F feed-forward width, V vocabulary.

use megacontext_base::architecture::Layer;
use megacontext_base::config::DecoderConfig;
use megacontext_base::lora::{LoraKind, LoraModules};
use megacontext_kernels::attention::Pattern;

/// FLOPs of one sequence, forward and backward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Projections and MLP.
    pub linear: f64,
    /// LoRA's two factors.
    pub lora: f64,
    /// The output head.
    pub lm_head: f64,
    /// Attention.
    pub attn: f64,
}

impl Work {
    /// Of everything.
    pub fn total(&self) -> f64 {
        self.linear + self.lora + self.lm_head + self.attn
    }

    /// `times` as much.
    #[must_use]
    pub fn times(self, times: f64) -> Self {
        Self {
            linear: self.linear * times,
            lora: self.lora * times,
            lm_head: self.lm_head * times,
            attn: self.attn * times,
        }
    }
}

/// Backward of attention in forward passes.
pub const ATTENTION_BACKWARD: f64 = 2.5;

/// FLOPs of attention's forward pass over one row of `entries`.
pub fn attention_forward(pattern: Pattern, entries: usize, heads: usize, width: usize) -> f64 {
    // Two products of D multiply-adds for each pair, and length²/2 pairs.
    let causal = |length: usize| 2.0 * width as f64 * (length as f64).powi(2);
    // Lengths of the groups: one of `first`, then whole ones, then what is left.
    let grouped = |first: usize, group: usize| {
        let first = first.min(entries);
        let whole = (entries - first) / group;
        causal(first) + whole as f64 * causal(group) + causal((entries - first) % group)
    };
    match pattern {
        Pattern::ShiftedSparse { group } if group < entries => {
            let plain = heads.div_ceil(2);
            plain as f64 * grouped(0, group) + (heads - plain) as f64 * grouped(group / 2, group)
        }
        Pattern::ShiftedBidirectional { group } if group < entries => {
            2.0 * attention_forward(Pattern::ShiftedSparse { group }, entries, heads, width)
        }
        Pattern::Bidirectional | Pattern::ShiftedBidirectional { .. } => heads as f64 * 2.0 * causal(entries),
        Pattern::SlidingWindow { window } if window < entries => {
            heads as f64 * (causal(window) + 4.0 * width as f64 * (window * (entries - window)) as f64)
        }
        _ => heads as f64 * causal(entries),
    }
}

/// FLOPs of a training step over one sequence of `entries`; `head_learns` where the output head gets a gradient.
pub fn step(
    model: &DecoderConfig,
    lora: &LoraModules,
    entries: usize,
    pattern: Pattern,
    recompute: bool,
    head_learns: bool,
) -> Work {
    let e = model.hidden_size as f64;
    let linears = model.linears().into_iter().filter(|l| l.layer.is_some());
    let weights: usize = linears.map(|l| l.out * l.inp).sum();
    let n = entries as f64;
    let again = if recompute { 1.0 } else { 0.0 };
    let carried = || lora.modules.iter().filter(|module| module.kind != LoraKind::Embedding);
    let factors: usize = carried().map(|module| module.rank * (module.out + module.inp)).sum();
    // PiSSA's fixed part takes no gradient of its own.
    let fixed: usize = carried().filter(|m| m.pissa).map(|m| m.rank * (m.out + m.inp)).sum();
    // DoRA makes results again for the magnitudes' gradient.
    let again_dora: usize =
        carried().filter(|module| module.dora).map(|module| module.out * module.inp).sum();
    // Dense attention keeps to the windows of blocks that have one.
    let of_block = |block: &Layer| match (pattern, block.window) {
        (Pattern::Dense, Some(window)) => Pattern::SlidingWindow { window },
        _ => pattern,
    };
    let forward: f64 = model
        .architecture
        .layers
        .iter()
        .map(|block| attention_forward(of_block(block), entries, model.num_attention_heads, model.head_dim))
        .sum();
    Work {
        linear: 2.0 * weights as f64 * n * (2.0 + again),
        lora: 2.0 * n * (factors as f64 * (3.0 + again) + fixed as f64 * (2.0 + again) + again_dora as f64),
        lm_head: 2.0 * e * model.vocab_size as f64 * n * if head_learns { 3.0 } else { 2.0 },
        attn: forward * (1.0 + again + ATTENTION_BACKWARD),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_counted_group_by_group() {
        let of = |pattern, entries| attention_forward(pattern, entries, 2, 1) / 2.0;
        assert_eq!(of(Pattern::Dense, 10), 200.0);
        assert_eq!(of(Pattern::Bidirectional, 10), 400.0);
        assert_eq!(of(Pattern::ShiftedBidirectional { group: 4 }, 10), 144.0);
        assert_eq!(of(Pattern::ShiftedBidirectional { group: 16 }, 10), 400.0);
        // Head 0: 4, 4, 2; head 1: 2, 4, 4.
        assert_eq!(of(Pattern::ShiftedSparse { group: 4 }, 10), 36.0 + 36.0);
        // Head 0: 4, 4; head 1: 2, 4, 2.
        assert_eq!(of(Pattern::ShiftedSparse { group: 4 }, 8), 32.0 + 24.0);
        assert_eq!(of(Pattern::ShiftedSparse { group: 16 }, 10), 200.0);
        // A triangle of 4, then 6 queries that see 4 keys each.
        assert_eq!(of(Pattern::SlidingWindow { window: 4 }, 10), 32.0 + 4.0 * 24.0);
        assert_eq!(of(Pattern::SlidingWindow { window: 10 }, 10), 200.0);
    }

    #[test]
    fn a_step_counts_every_part() {
        let model = DecoderConfig::from_json(
            &serde_json::json!({
                "model_type": "llama", "vocab_size": 10, "hidden_size": 4, "intermediate_size": 6,
                "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
                "max_position_embeddings": 8, "rope_theta": 10000.0, "tie_word_embeddings": true,
            }),
            std::path::Path::new("test"),
        )
        .unwrap();
        let lora = megacontext_base::lora::LoraConfig { r: 1, ..Default::default() }.resolve(&model).unwrap();
        let work = step(&model, &lora, 8, Pattern::Dense, true, true);
        // q and o 4×4, k and v 4×2, three of 4×6: 120 weights a layer.
        assert_eq!(work.linear, 2.0 * 2.0 * 120.0 * 8.0 * 3.0);
        assert_eq!(work.lora, 2.0 * 2.0 * (8.0 + 6.0 + 6.0 + 8.0) * 8.0 * 4.0);
        assert_eq!(work.lm_head, 2.0 * 40.0 * 8.0 * 3.0);
        assert_eq!(work.attn, 2.0 * (2.0 * 2.0 * 2.0 * 64.0) * 4.5);
        assert_eq!(work.total(), work.linear + work.lora + work.lm_head + work.attn);
        assert_eq!(work.times(2.0).total(), 2.0 * work.total());
        let plain = step(&model, &lora, 8, Pattern::Dense, false, false);
        assert_eq!(plain.linear, work.linear / 3.0 * 2.0);
        assert_eq!(plain.lm_head, work.lm_head / 3.0 * 2.0);
    }
}
