//! A working context as a decoder reads it: embeddings and places.
//!
//! Source: MegaContext's working context: a token's embedding is the base's, a gist's is the tree's; the places follow the
//! rule for Gaussian positions ([`SigmaRule`]).
//!
//! Shapes: W entries, E model width. Units: tokens. Errors: a tree or a rule that is not the context's.

use super::source::{TokenEmbeddings, embedded};
use super::tree::GistTree;
use super::working::{WorkingContext, fail};
use crate::error::Result;
use crate::rope::{Entries, SigmaRule};

/// Stands in for the token of an entry that is a gist: what the loss takes for no target.
pub const NO_TOKEN: u32 = megacontext_kernels::loss::IGNORE;

/// What a model is given of a working context.
#[derive(Clone, Debug, PartialEq)]
pub struct ContextInput {
    /// Embeddings, [W, E] row-major.
    pub embeddings_we: Vec<f32>,
    /// The token of each entry, [`NO_TOKEN`] for gists.
    pub tokens_w: Vec<u32>,
    /// Centre of each in tokens.
    pub mu_w: Vec<f64>,
    /// Spread of each in tokens, at scale 1.
    pub sigma_w: Vec<f64>,
    /// Level of each.
    pub lod_w: Vec<u32>,
}

impl ContextInput {
    /// The entries' places for [`crate::rope::Rope::place`], with learned scales of the levels where there are such. The
    /// largest position says how long the sequence is.
    pub fn places<'a>(&'a self, scales: Option<&'a [f32]>) -> Entries<'a> {
        Entries { mu: &self.mu_w, sigma: Some(&self.sigma_w), lod: Some(&self.lod_w), scales, length: None }
    }
}

impl WorkingContext {
    /// The embeddings and places of all entries.
    ///
    /// # Errors
    /// A tree of other blocks or levels, or shorter than what is covered; embeddings of another width than the tree's; a
    /// rule with another block.
    pub fn input(
        &self,
        tree: &GistTree,
        embeddings: &dyn TokenEmbeddings,
        rule: &SigmaRule,
    ) -> Result<ContextInput> {
        self.check_tree(tree)?;
        let (block, width) = (tree.hierarchy().block(), tree.width());
        if rule.block != block {
            return fail(format!("positions.sigma.block: expected {block}, the tree's, got {}", rule.block));
        }
        if embeddings.width() != width {
            return fail(format!(
                "expected embeddings of width {width}, the tree's, got {}",
                embeddings.width()
            ));
        }
        let fine = self.entries().iter().filter(|entry| entry.lod == 0);
        let tokens: Vec<u32> = fine.map(|entry| tree.tokens()[entry.start as usize]).collect();
        let rows = embedded(embeddings, &tokens)?;
        let mut fine = tokens.iter().zip(rows.chunks_exact(width));
        let n = self.cost();
        let mut input = ContextInput {
            embeddings_we: Vec::with_capacity(n * width),
            tokens_w: Vec::with_capacity(n),
            mu_w: Vec::with_capacity(n),
            sigma_w: Vec::with_capacity(n),
            lod_w: Vec::with_capacity(n),
        };
        for entry in self.entries() {
            let gist = tree.gist(self.node_of(*entry)).map(|gist| (&NO_TOKEN, gist));
            let (token, row) = gist.or_else(|| fine.next()).expect("a gist of the tree or one of the tokens");
            input.tokens_w.push(*token);
            input.embeddings_we.extend_from_slice(row);
            let (mu, sigma) = rule.place(entry.start as f64, u32::from(entry.lod));
            input.mu_w.push(mu);
            input.sigma_w.push(sigma);
            input.lod_w.push(u32::from(entry.lod));
        }
        Ok(input)
    }
}
