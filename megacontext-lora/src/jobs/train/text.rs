//! Text of a run of alternating optimisation: documents to learn from, to judge phases by, and to test on, cut into histories.
//!
//! Documents are split once, so that none is on two sides whatever the contexts are; they are cut anew for every context. A passage
//! is a history and the horizon behind it.
//!
//! Units: tokens, bytes. Errors: a side without a passage.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use gistnet_adapter::GistNet;
use gistnet_adapter::curriculum::shuffle;
use lensnet_adapter::focus::History;
use megacontext_base::context::BaseModel;
use megacontext_base::decoder::Decoder;
use megacontext_base::random::Random;

use crate::data::documents::{Document, tokenize};
use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::ModelDir;
use crate::jobs::extend::load_data;
use crate::jobs::gist_text::split;
use crate::train::cycle::CycleConfig;
use crate::train::histories::Passage;

/// Bytes of histories to learn from that are kept with their gists.
const KEPT_BYTES: u64 = 256 << 20;

/// Documents of the three sides, as tokens.
pub(super) struct Text {
    pub train: Vec<Vec<u32>>,
    pub validation: Vec<Vec<u32>>,
    pub test: Vec<Vec<u32>>,
}

impl Text {
    /// Reads and splits the text of a resolved run.
    ///
    /// # Errors
    /// See the module.
    pub fn read(config: &CycleConfig, model: &ModelDir, host: &dyn HostApi) -> Result<Self> {
        let documents: Vec<(usize, Document)> =
            load_data(&config.data, host)?.into_iter().map(|document| (0, document)).collect();
        let (train, held) = split(documents, config.holdout, config.seed, "");
        let (validation, test) = split(held, 0.5, config.seed, "test");
        let encode = model.encoder();
        let tokens = |side: Vec<(usize, Document)>| {
            let side: Vec<Document> = side.into_iter().map(|(_, document)| document).collect();
            tokenize(&side, &encode)
        };
        let text = Self { train: tokens(train)?, validation: tokens(validation)?, test: tokens(test)? };
        // What does not give a single passage is better known now than in a later cycle.
        for context in &config.contexts {
            text.cut(config, *context)?;
        }
        Ok(text)
    }

    /// All documents, in one order.
    pub fn documents(&self) -> impl Iterator<Item = &Vec<u32>> {
        self.train.iter().chain(&self.validation).chain(&self.test)
    }

    /// Histories of a context.
    ///
    /// # Errors
    /// A side without one.
    pub fn cut(&self, config: &CycleConfig, context: usize) -> Result<Data> {
        let cursor = context - config.horizon;
        let passages = |documents: &[Vec<u32>]| -> Vec<Passage> {
            let parts = documents.iter().flat_map(|document| document.chunks_exact(context));
            parts.map(|part| Passage { tokens: part.to_vec(), cursor, fact: None }).collect()
        };
        let [train, mut validation, mut test] =
            [&self.train, &self.validation, &self.test].map(|side| passages(side));
        if validation.is_empty() || test.is_empty() {
            validation.append(&mut test);
            test = validation.split_off(validation.len() / 2);
        }
        let sides = [
            ("to learn from", &train),
            ("held out", &test),
            ("held out, beside the one to test on,", &validation),
        ];
        for (what, side) in sides {
            if side.is_empty() {
                return Err(PluginError::data(format!(
                    "data: expected a document {what} of at least {context} tokens, a history and a horizon of {}, got none; longer \
                     or more documents help, or smaller contexts",
                    config.horizon
                )));
            }
        }
        let drawn = |mut side: Vec<Passage>, what: &str, count: usize| {
            shuffle(&mut side, &mut Random::named(config.seed, &format!("histories to {what}")));
            side.truncate(count);
            side
        };
        Ok(Data {
            context,
            validation: drawn(validation, "judge by", config.validation.histories),
            test: drawn(test, "test on", config.validation.test_histories),
            train,
            kept: RefCell::default(),
        })
    }
}

/// Histories of one context.
pub(super) struct Data {
    /// Tokens of a passage.
    pub context: usize,
    pub train: Vec<Passage>,
    pub validation: Vec<Passage>,
    pub test: Vec<Passage>,
    /// Of `train`, with gists of one network.
    kept: RefCell<(u64, BTreeMap<usize, Rc<History>>)>,
}

/// What makes gists of histories.
#[derive(Clone, Copy)]
pub(super) struct Maker<'a> {
    pub decoder: &'a Decoder,
    pub levels: u8,
    pub base: &'a BaseModel,
}

impl Maker<'_> {
    /// A history with its gists.
    pub fn make(&self, passage: &Passage, network: &GistNet) -> Result<History> {
        passage.history(self.decoder, network, self.levels, self.base)
    }
}

impl Data {
    /// A history to learn from, made once for all that ask for it until [`Data::forget`].
    pub fn history(&self, number: usize, maker: Maker, network: &GistNet) -> Result<Rc<History>> {
        if let Some(known) = self.kept.borrow().1.get(&number) {
            return Ok(known.clone());
        }
        let made = Rc::new(maker.make(&self.train[number], network)?);
        let mut kept = self.kept.borrow_mut();
        let nodes: u64 = (1..=maker.levels).map(|lod| made.tree.nodes(lod)).sum();
        let bytes = 4 * (nodes * made.tree.width() as u64 + self.context as u64);
        if kept.0 + bytes <= KEPT_BYTES {
            kept.0 += bytes;
            kept.1.insert(number, made.clone());
        }
        Ok(made)
    }

    /// Gists are others now.
    pub fn forget(&self) {
        *self.kept.borrow_mut() = (0, BTreeMap::new());
    }
}

/// Numbers of histories in the order of one phase: every one once before any comes again.
pub(super) struct Order {
    count: usize,
    seed: u64,
    phase: usize,
    /// Of the epoch that was asked for last.
    held: Option<(usize, Vec<usize>)>,
}

impl Order {
    pub fn new(count: usize, seed: u64, phase: usize) -> Self {
        Self { count, seed, phase, held: None }
    }

    /// The number at a place in the phase.
    pub fn at(&mut self, place: usize) -> usize {
        let epoch = place / self.count;
        if self.held.as_ref().is_none_or(|(of, _)| *of != epoch) {
            let mut order: Vec<usize> = (0..self.count).collect();
            let name = format!("order of histories in phase {}, epoch {epoch}", self.phase);
            shuffle(&mut order, &mut Random::named(self.seed, &name));
            self.held = Some((epoch, order));
        }
        self.held.as_ref().map_or(0, |(_, order)| order[place % self.count])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_history_comes_once_an_epoch_whatever_is_asked_first() {
        let mut order = Order::new(5, 3, 1);
        let all: Vec<usize> = (0..10).map(|at| order.at(at)).collect();
        for epoch in all.chunks(5) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4]);
        }
        assert_ne!(all[..5], all[5..]);
        // A run that goes on asks for the middle first.
        let mut resumed = Order::new(5, 3, 1);
        assert_eq!((7..10).map(|at| resumed.at(at)).collect::<Vec<_>>(), all[7..]);
    }
}
