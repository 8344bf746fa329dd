//! What a gist tree is made from: embeddings of tokens, and gists of blocks.
//!
//! Shapes: K block, E model width, N blocks; row-major f32.

use candle_core::Tensor;

use crate::decoder::Decoder;
use crate::error::{BaseError, Result};

/// Makes gists: one vector in the base model's embedding space for each block of K entries.
///
/// The gist of a block depends on the block alone, to the bit: however blocks are gathered into calls, each gets the same
/// gist. A tree relies on it, so that it does not matter how its tokens came. (Where gists are made on a GPU the last bits may
/// differ, and with them those of trees whose tokens came otherwise.)
pub trait GistSource {
    /// K, entries of a block.
    fn block(&self) -> usize;

    /// E, width of an entry and of a gist.
    fn width(&self) -> usize;

    /// Counts up whenever gists become others: whatever was made under a lesser version is stale.
    fn version(&self) -> u16;

    /// The gists [N, E] of `blocks` blocks, given their `children` [N, K, E]: embeddings of tokens, or gists of the level
    /// below.
    fn gists(&self, children: &[f32], blocks: usize) -> Result<Vec<f32>>;
}

/// Gives tokens their embeddings, as the base model's first block reads them.
pub trait TokenEmbeddings {
    /// E.
    fn width(&self) -> usize;

    /// The embeddings [N, E] of N tokens.
    ///
    /// # Errors
    /// A token that there is no embedding of.
    fn embeddings(&self, tokens: &[u32]) -> Result<Vec<f32>>;
}

impl TokenEmbeddings for Decoder {
    fn width(&self) -> usize {
        self.config().hidden_size
    }

    fn embeddings(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        if tokens.is_empty() {
            return Ok(Vec::new());
        }
        let embedded: Tensor = self.embed(tokens, 1)?;
        Ok(embedded.flatten_all()?.to_vec1()?)
    }
}

/// Embeddings of tokens, refused where there are fewer or more than there should be, or one is no number.
pub(super) fn embedded(from: &dyn TokenEmbeddings, tokens: &[u32]) -> Result<Vec<f32>> {
    let rows = from.embeddings(tokens)?;
    let expected = tokens.len() * from.width();
    if rows.len() != expected {
        return Err(BaseError::Tree {
            message: format!(
                "embeddings of {} tokens: expected {expected} values ({} each), got {}",
                tokens.len(),
                from.width(),
                rows.len()
            ),
        });
    }
    if let Some(at) = rows.iter().position(|v| !v.is_finite()) {
        let token = tokens[at / from.width()];
        return Err(BaseError::Tree {
            message: format!("embedding of token {token}: expected finite numbers, got {}", rows[at]),
        });
    }
    Ok(rows)
}
