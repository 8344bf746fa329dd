//! A working context as it comes from a host, read whole before anything is computed.

use std::borrow::Cow;

use megacontext_base::device::Device;
use megacontext_lora_abi::tensor::{Memory, check_disjoint};
use megacontext_lora_abi::{ContextView, EntriesView, TensorView};

use super::tensors;
use crate::error::Result;
use crate::session::{Context, Entries};

/// The arrays behind a [`ContextView`], checked.
pub(super) struct OwnedContext<'a> {
    tokens: Option<Cow<'a, [u32]>>,
    embeddings: Option<Cow<'a, [f32]>>,
    mu: Option<Cow<'a, [f64]>>,
    sigma: Option<Cow<'a, [f64]>>,
    lod: Option<Cow<'a, [u32]>>,
    targets: Option<Cow<'a, [u32]>>,
    /// Entries.
    pub length: usize,
}

impl<'a> OwnedContext<'a> {
    /// Reads the views for a session on `device`; `outs` must not lie over one another, nor over any of them.
    pub fn read(device: &Device, view: &ContextView<'a>, outs: &[(&str, Memory)]) -> Result<Self> {
        let (mut tokens, mut embeddings) = (None, None);
        let entries = match view.entries() {
            EntriesView::Tokens(view) => {
                tokens = Some(tensors::read(device, &view, "tokens", &[None])?);
                view
            }
            EntriesView::Embeddings(view) => {
                embeddings = Some(tensors::read(device, &view, "embeddings", &[None, None])?);
                view
            }
        };
        let length = entries.shape()[0];
        let optional = |view: Option<TensorView<'a>>| view.map(|v| v.memory());
        let ranges = [
            ("entries", Some(entries.memory())),
            ("mu", optional(view.mu())),
            ("sigma", optional(view.sigma())),
            ("lod", optional(view.lod())),
            ("targets", optional(view.targets())),
        ];
        let inputs: Vec<_> = ranges.into_iter().filter_map(|(name, range)| Some((name, range?))).collect();
        check_disjoint(outs, &inputs)?;
        let dims = [Some(length)];
        let places = |view: Option<TensorView<'a>>, what| {
            view.map(|view| tensors::read::<f64>(device, &view, what, &dims)).transpose()
        };
        let numbers = |view: Option<TensorView<'a>>, what| {
            view.map(|view| tensors::read::<u32>(device, &view, what, &dims)).transpose()
        };
        Ok(Self {
            tokens,
            embeddings,
            mu: places(view.mu(), "mu")?,
            sigma: places(view.sigma(), "sigma")?,
            lod: numbers(view.lod(), "lod")?,
            targets: numbers(view.targets(), "targets")?,
            length,
        })
    }

    /// As the session takes it.
    pub fn context(&self) -> Context<'_> {
        let entries = match (&self.tokens, &self.embeddings) {
            (Some(tokens), _) => Entries::Tokens(tokens),
            (None, Some(embeddings)) => Entries::Embeddings(embeddings),
            (None, None) => Entries::Tokens(&[]),
        };
        Context {
            entries,
            mu: self.mu.as_deref(),
            sigma: self.sigma.as_deref(),
            lod: self.lod.as_deref(),
            targets: self.targets.as_deref(),
        }
    }
}
