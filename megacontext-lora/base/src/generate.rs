//! Generating text: prompts in, continuations out, over a cache of keys and values.
//!
//! Rows may have any lengths. A row's continuation is what it would be alone: rows share nothing but the products that
//! run them together, so their logits differ from those of a row alone by rounding only (1e-5 in f32), and a row that has
//! ended takes part in nothing any more. Padded batches, to the left or to the right, become rows by [`unpad`]. Attention is
//! dense, or the sliding window that the model states; training's sparse pattern has no place here.
//!
//! `step` runs prompts and new tokens, `cache` holds keys and values, `sampling` chooses.
//!
//! Units: tokens. Errors: no prompts, an empty prompt, tokens that the model does not have, no tokens to make, settings out
//! of range, logits that are not finite. Left out: beams, speculative decoding, growing a cache.

mod cache;
mod sampling;
mod step;

use crate::decoder::Decoder;
use crate::error::{BaseError, Result};
use crate::rope::RopeScaling;

pub use cache::KvCache;
pub(crate) use cache::{Held, HeldAs};
pub use sampling::Sampling;
pub use step::{Addition, PASS, PIECE, generation_bytes, pass_entries};

/// What generation is told besides its prompts.
#[derive(Clone, Copy, Debug)]
pub struct Generation<'a> {
    /// Most tokens that each row gets, at least 1.
    pub max_new_tokens: usize,
    /// Tokens that end a row; none means that every row gets all its tokens.
    pub end: &'a [u32],
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// How positions are stretched.
    pub scaling: &'a RopeScaling,
}

/// What a row got.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Continuation {
    /// The new tokens, without the one that ended the row.
    pub tokens: Vec<u32>,
    /// The token that ended it; none where the row got as many tokens as it may.
    pub ended: Option<u32>,
}

/// Entries that a row of `prompt` tokens comes to: the last token that it gets is not run any more.
pub fn room(prompt: usize, max_new_tokens: usize) -> usize {
    (prompt + max_new_tokens).saturating_sub(1)
}

/// The rows of a padded batch: `tokens` and `mask` are [B, T], row-major; a row's own tokens are those with a mask of 1, all
/// side by side, with padding to their left or to their right.
///
/// # Errors
/// When sizes do not agree, a mask has a hole, or a row is all padding.
pub fn unpad(tokens: &[u32], mask: &[u8], batch: usize) -> Result<Vec<Vec<u32>>> {
    let refuse = |message: String| Err(BaseError::Input { message });
    if batch == 0 || tokens.is_empty() || !tokens.len().is_multiple_of(batch) || mask.len() != tokens.len() {
        return refuse(format!(
            "padded batch: expected tokens and a mask of one size, a multiple of the {batch} rows, got {} and {}",
            tokens.len(),
            mask.len()
        ));
    }
    let length = tokens.len() / batch;
    let mut rows = Vec::with_capacity(batch);
    for (row, (tokens, mask)) in tokens.chunks_exact(length).zip(mask.chunks_exact(length)).enumerate() {
        let first = mask.iter().position(|m| *m != 0);
        let last = mask.iter().rposition(|m| *m != 0);
        let (Some(first), Some(last)) = (first, last) else {
            return refuse(format!(
                "padded batch: row {row}: expected at least one token, got padding alone"
            ));
        };
        if let Some(hole) = mask[first..=last].iter().position(|m| *m == 0) {
            return refuse(format!(
                "padded batch: row {row}: expected padding to the left or to the right, got a hole at {}",
                first + hole
            ));
        }
        rows.push(tokens[first..=last].to_vec());
    }
    Ok(rows)
}

impl Decoder {
    /// Continues each prompt. `going` is asked after every pass over the prompts and every step, with the entries that it
    /// ran, whether to go on; none where it said no.
    ///
    /// # Errors
    /// See the module.
    pub fn generate(
        &self,
        prompts: &[Vec<u32>],
        with: &Generation,
        going: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Option<Vec<Continuation>>> {
        let refuse = |message: String| Err(BaseError::Input { message });
        if prompts.is_empty() {
            return refuse("prompts: expected at least one, got none".to_string());
        }
        if let Some(row) = prompts.iter().position(Vec::is_empty) {
            return refuse(format!("prompts: row {row}: expected at least one token, got none"));
        }
        if with.max_new_tokens == 0 {
            return refuse("max_new_tokens: expected at least 1, got 0".to_string());
        }
        with.sampling.check()?;
        let rooms: Vec<usize> = prompts.iter().map(|p| room(p.len(), with.max_new_tokens)).collect();
        let mut cache = KvCache::new(self, self.config().rope(with.scaling), &rooms)?;
        let whole: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let Some(mut logits) = self.prefill(&mut cache, &whole, going)? else { return Ok(None) };
        let mut rows = vec![Continuation::default(); prompts.len()];
        // Rows that still grow, in the order of their logits.
        let mut growing: Vec<usize> = (0..rows.len()).collect();
        for made in 1..=with.max_new_tokens {
            let mut next = Vec::with_capacity(growing.len());
            for (row, logits) in growing.iter().zip(logits.chunks_exact(self.config().vocab_size)) {
                let token = with.sampling.choose(logits, *row, made - 1)?;
                if with.end.contains(&token) {
                    rows[*row].ended = Some(token);
                } else {
                    rows[*row].tokens.push(token);
                    next.push(*row);
                }
            }
            growing = next;
            if growing.is_empty() || made == with.max_new_tokens {
                break;
            }
            let new: Vec<Addition> = growing
                .iter()
                .map(|row| Addition { row: *row, tokens: last(&rows[*row].tokens), logits: true })
                .collect();
            logits = self.advance(&mut cache, &new)?;
            if !going(new.len()) {
                return Ok(None);
            }
        }
        Ok(Some(rows))
    }
}

fn last(tokens: &[u32]) -> &[u32] {
    &tokens[tokens.len().saturating_sub(1)..]
}
