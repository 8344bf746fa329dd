//! A long history at several resolutions, and the working context that a model is shown of it.
//!
//! Source: MegaContext's gist tree, working context and storage format. The base model's crate holds them because both
//! adapters use them; it does not know how a gist is made: a [`GistSource`] says.
//!
//! | to | look at |
//! |---|---|
//! | know which tokens an entry stands for, its children, its parent | [`Hierarchy`], [`Node`] |
//! | keep a history with its gists, appended to and refreshed | [`GistTree`] |
//! | choose what a model is shown, and edit it | [`WorkingContext`], [`Limits`] |
//! | feed it to a decoder | [`WorkingContext::input`], [`ContextInput::places`] |
//! | know how well it predicts what follows | [`HorizonLoss`] |
//! | store a tree, read it or a block of it | [`write_tree`], [`TreeFolder`], [`CtxFile`] |
//! | give a tree what it is made from | [`GistSource`], [`TokenEmbeddings`] |
//!
//! Words: an entry of level (LOD) 0 is a token; one of level l is the gist of K entries of level l − 1, so it stands for
//! K^l tokens. K is the block size. E is the base model's width: gists live in its embedding space.
//!
//! Units: tokens for positions, spans and coverage; entries for costs. Errors: [`crate::error::BaseError`], before anything
//! has changed.
//!
//! Left out on purpose: networks (GistNet, LensNet), scores and the choice of edits (the focus allocator).

mod ctx;
mod folder;
mod hierarchy;
mod horizon;
mod input;
mod rebuild;
mod source;
mod tree;
mod working;

pub use ctx::{CtxFile, CtxHeader, GistDtype, HEADER, Layout};
pub use folder::{LevelMetadata, Metadata, OwnMetadata, StoreOptions, TreeFolder, write_tree};
pub use hierarchy::{Hierarchy, Node};
pub use horizon::{ENTRIES_AT_ONCE, HorizonLoss, HorizonObjective, HorizonStep};
pub use input::{ContextInput, NO_TOKEN};
pub use source::{GistSource, TokenEmbeddings};
pub use tree::{BaseModel, GistTree};
pub use working::{Change, Entry, Limits, Residency, WorkingContext};
