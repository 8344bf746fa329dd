//! A working context as a host hands it over: its entries, where they stand, and what follows them.
//!
//! An entry is (embedding, mu, sigma, lod). Tokens are entries whose embedding the plugin looks up. Positions may stretch and
//! blur: mu is the centre of an entry in tokens, sigma its spread (0 for a token, positive for a gist that stands for a
//! span). lod is its level: 0 for a token, l for a gist of K^l tokens; with levels alone, entries follow one another and the
//! session's rule says where they stand and how vaguely. Source: MegaContext's working context.
//!
//! Shapes: T entries, E model width. Units: mu and sigma in tokens (f64: a position of ten million must stay exact).

use crate::tensor::TensorView;
use abi_stable::StableAbi;
use abi_stable::std_types::ROption::{self, RNone, RSome};

/// What the entries are.
#[repr(C, u8)]
#[derive(StableAbi, Debug, Clone, Copy)]
pub enum EntriesView<'a> {
    /// Token ids, U32 `[T]`.
    Tokens(TensorView<'a>),
    /// Embeddings in the base model's space, F32 `[T, E]`.
    Embeddings(TensorView<'a>),
}

/// One working context.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Copy)]
pub struct ContextView<'a> {
    entries: EntriesView<'a>,
    mu: ROption<TensorView<'a>>,
    sigma: ROption<TensorView<'a>>,
    targets: ROption<TensorView<'a>>,
    lod: ROption<TensorView<'a>>,
}

/// The target of an entry whose next token is not scored.
pub const NO_TARGET: u32 = u32::MAX;

impl<'a> ContextView<'a> {
    /// A context of tokens at the positions 0, 1, 2, …
    pub fn tokens(ids: &'a [u32]) -> Self {
        Self::new(EntriesView::Tokens(TensorView::of(ids)))
    }

    /// A context of these entries at the positions 0, 1, 2, …
    pub fn new(entries: EntriesView<'a>) -> Self {
        Self { entries, mu: RNone, sigma: RNone, targets: RNone, lod: RNone }
    }

    /// The centre of every entry, F64 `[T]`.
    #[must_use]
    pub fn with_mu(mut self, mu: TensorView<'a>) -> Self {
        self.mu = RSome(mu);
        self
    }

    /// The spread of every entry, F64 `[T]`, at least 0.
    #[must_use]
    pub fn with_sigma(mut self, sigma: TensorView<'a>) -> Self {
        self.sigma = RSome(sigma);
        self
    }

    /// The level of every entry, U32 `[T]`. Without mu the entries follow one another, without sigma their spreads are those
    /// of their spans; learned scales of the levels multiply either.
    #[must_use]
    pub fn with_lod(mut self, lod: TensorView<'a>) -> Self {
        self.lod = RSome(lod);
        self
    }

    /// The token that follows each entry, U32 `[T]`, [`NO_TARGET`] where none is scored. Without it tokens are scored by
    /// the token that follows them, the last one not at all; embeddings need it for `nll`.
    #[must_use]
    pub fn with_targets(mut self, targets: TensorView<'a>) -> Self {
        self.targets = RSome(targets);
        self
    }

    /// The entries.
    pub fn entries(&self) -> EntriesView<'a> {
        self.entries
    }

    /// The centres, if they are not 0, 1, 2, …
    pub fn mu(&self) -> Option<TensorView<'a>> {
        self.mu.into_option()
    }

    /// The spreads, if they are not 0.
    pub fn sigma(&self) -> Option<TensorView<'a>> {
        self.sigma.into_option()
    }

    /// The levels, if they are given.
    pub fn lod(&self) -> Option<TensorView<'a>> {
        self.lod.into_option()
    }

    /// The targets, if they are given.
    pub fn targets(&self) -> Option<TensorView<'a>> {
        self.targets.into_option()
    }
}
