//! Perplexity by context length.
//!
//! Source: the strided protocol of Press et al. 2021: windows of the full context move over a document by a stride,
//! and each token is scored once, in the first window that reaches it. Perplexity is exp of the mean NLL in nats per
//! token over all documents. Every model and context length scores the same tokens.
//!
//! Units: tokens, nats. Errors: documents too short to score anything.

use megacontext_base::buffers::Buffers;
use megacontext_base::decoder::{Decoder, Forward};
use megacontext_base::random::Random;
use megacontext_base::rope::RopeScaling;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::loss::IGNORE;
use serde::{Deserialize, Serialize};

use crate::data::packing::{Window, strided_windows};
use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::model_error;
use crate::run::summary::DocumentLoss;

/// How tokens are scored, as results say it.
pub const SCORING: &str = "strided, each token once, in the first window that reaches it";

/// Tokens evaluated in one forward pass, at least one window.
const BATCH_TOKENS: usize = 8192;

/// Windows of `context` tokens evaluated in one forward pass.
pub fn batch_rows(context: usize) -> usize {
    (BATCH_TOKENS / context).max(1)
}

/// What was measured, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// Window length in tokens.
    pub context: usize,
    /// Tokens the window moves by.
    pub stride: usize,
    /// `dense` or `s2 (group N)`.
    pub attention: String,
    /// Scaling of the positions.
    pub rope: String,
    /// [`SCORING`].
    pub scoring: String,
    /// Scored tokens.
    pub tokens: usize,
    /// Mean NLL in nats per token.
    pub nll: f64,
    /// exp(nll).
    pub perplexity: f64,
}

/// Sparse against dense attention at one length.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gap {
    /// Window length in tokens.
    pub context: usize,
    /// Measured with dense attention.
    pub dense: Perplexity,
    /// Measured with sparse attention, on the same tokens.
    pub sparse: Perplexity,
    /// Sparse perplexity over dense perplexity, less one (0.02: sparse is 2 % worse).
    pub gap: f64,
}

/// The gap at every length, of results that come in pairs: dense, then sparse.
pub fn gaps(results: &[Perplexity]) -> Vec<Gap> {
    let pairs = results.as_chunks::<2>().0;
    let gap = |[dense, sparse]: &[Perplexity; 2]| Gap {
        context: dense.context,
        gap: sparse.perplexity / dense.perplexity - 1.0,
        dense: dense.clone(),
        sparse: sparse.clone(),
    };
    pairs.iter().map(gap).collect()
}

/// How one perplexity is to be measured.
#[derive(Clone, Debug)]
pub struct Protocol {
    /// Window length in tokens.
    pub context: usize,
    /// Tokens the window moves by; none means half the context.
    pub stride: Option<usize>,
    /// Attention pattern.
    pub pattern: Pattern,
    /// Scaling of the positions.
    pub scaling: RopeScaling,
}

/// The word for a pattern in results and tables.
pub fn pattern_name(pattern: Pattern) -> String {
    match pattern {
        Pattern::Dense => "dense".to_string(),
        Pattern::ShiftedSparse { group } => format!("s2 (group {group})"),
        Pattern::SlidingWindow { window } => format!("sliding window ({window})"),
        Pattern::Bidirectional => "bidirectional".to_string(),
        Pattern::ShiftedBidirectional { group } => format!("bidirectional s2 (group {group})"),
    }
}

/// Chooses what to score: documents longer than `context` first, in an order drawn with `seed` so that they come from
/// everywhere, each cut to two contexts, until `max_tokens` tokens are scored. The same documents, context, budget and seed
/// always give the same choice.
pub fn select(documents: &[Vec<u32>], context: usize, max_tokens: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut order: Vec<&Vec<u32>> = documents.iter().collect();
    let mut random = Random::named(seed, "evaluation documents");
    for last in (1..order.len()).rev() {
        order.swap(last, random.below(last + 1));
    }
    let (long, short): (Vec<_>, Vec<_>) = order.into_iter().partition(|d| d.len() > context);
    let mut chosen = Vec::new();
    let mut left = max_tokens;
    for document in long.into_iter().chain(short) {
        if left == 0 {
            break;
        }
        let take = document.len().min(2 * context + 1).min(left + 1);
        if take < 2 {
            continue;
        }
        left -= take - 1;
        chosen.push(document[..take].to_vec());
    }
    chosen
}

/// Measures perplexity on tokenised documents.
///
/// # Errors
/// When no document has two tokens, or the host cancels.
pub fn perplexity(
    decoder: &Decoder,
    documents: &[Vec<u32>],
    protocol: &Protocol,
    host: &dyn HostApi,
) -> Result<Perplexity> {
    Ok(perplexity_by_document(decoder, documents, protocol, host)?.0)
}

/// As [`perplexity`], and the loss of each document.
pub fn perplexity_by_document(
    decoder: &Decoder,
    documents: &[Vec<u32>],
    protocol: &Protocol,
    host: &dyn HostApi,
) -> Result<(Perplexity, Vec<DocumentLoss>)> {
    let context = protocol.context;
    let stride = protocol.stride.unwrap_or(context / 2).clamp(1, context);
    let mut windows: Vec<(usize, Window)> = Vec::new();
    for (number, document) in documents.iter().enumerate() {
        if document.len() >= 2 {
            windows
                .extend(strided_windows(document.len(), context, stride)?.into_iter().map(|w| (number, w)));
        }
    }
    if windows.is_empty() {
        return Err(PluginError::data("evaluation: expected a document of at least 2 tokens, got none"));
    }
    let c = decoder.config();
    let mut losses = vec![DocumentLoss::default(); documents.len()];
    let mut buffers = Buffers::default();
    for batch in windows.chunks(batch_rows(context)) {
        if host.cancelled() {
            return Err(PluginError::cancelled("the host asked to stop during evaluation"));
        }
        let longest = batch.iter().map(|(_, w)| w.inputs().len()).max().unwrap_or(1);
        let mut tokens = vec![0u32; batch.len() * longest];
        let mut targets = vec![IGNORE; batch.len() * longest];
        for (row, (number, window)) in batch.iter().enumerate() {
            let document = &documents[*number];
            let inputs = window.inputs();
            tokens[row * longest..][..inputs.len()].copy_from_slice(&document[inputs]);
            for target in window.targets() {
                targets[row * longest + target - 1 - window.start] = document[target];
            }
            losses[*number].tokens += window.targets().len() as u64;
        }
        // Scalings that look at the length see the context's, however short the documents of a batch are.
        let mu: Vec<f64> = (0..longest).map(|p| p as f64).collect();
        let rope = c.rope(&protocol.scaling).sequence_in(&mu, context).map_err(model_error)?;
        let rows =
            Rows { lengths: Some(batch.iter().map(|(_, w)| w.inputs().len()).collect()), segments: None };
        let with = Forward { pattern: protocol.pattern, rope: &rope, rows: &rows, dropout_seed: None };
        let nll = decoder.score(&tokens, batch.len(), &targets, &with, &mut buffers).map_err(model_error)?;
        for ((number, _), row) in batch.iter().zip(nll.chunks(longest)) {
            losses[*number].nll += row.iter().map(|v| f64::from(*v)).sum::<f64>();
        }
    }
    losses.retain(|loss| loss.tokens > 0);
    let sum: f64 = losses.iter().map(|loss| loss.nll).sum();
    let scored = losses.iter().map(|loss| loss.tokens as usize).sum();
    let nll = sum / scored as f64;
    let result = Perplexity {
        context,
        stride,
        attention: pattern_name(protocol.pattern),
        rope: protocol.scaling.to_string(),
        scoring: SCORING.to_string(),
        tokens: scored,
        nll,
        perplexity: nll.exp(),
    };
    Ok((result, losses))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_documents_are_scored_first_and_the_budget_holds() {
        let documents = vec![vec![1; 5], vec![2; 100], vec![3; 1000], vec![4; 7]];
        let chosen = select(&documents, 50, 203, 0);
        assert_eq!(chosen.len(), 3);
        assert!(chosen[0].len() > 50 && chosen[1].len() > 50);
        assert!(chosen.iter().all(|d| d.len() <= 101));
        assert_eq!(chosen.iter().map(|d| d.len() - 1).sum::<usize>(), 203);
        assert_eq!(chosen, select(&documents, 50, 203, 0));
        let other = (1..20).map(|seed| select(&documents, 50, 203, seed)).find(|other| *other != chosen);
        assert!(other.is_some_and(|o| o.len() == 3), "another seed chooses otherwise");
    }
}
