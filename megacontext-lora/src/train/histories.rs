//! Histories to learn from: passages of text as gist trees, with the tokens behind them, or documents with planted facts.
//!
//! Which passages are held out follows from the document, not from the passage: parts of one document are never on both sides.
//! The held-out documents are split once more by the same rule, into those that the network is chosen by and those that it is
//! tested on; where that leaves a side without a passage, their passages are cut in half instead.
//!
//! Units: tokens. Errors: no text, or too little for one history on either side; what trees are made from.

use std::ops::Range;

use gistnet_adapter::GistNet;
use lensnet_adapter::focus::History;
use megacontext_base::context::{BaseModel, GistTree, Hierarchy};
use megacontext_base::decoder::Decoder;
use megacontext_base::random::Random;

use super::lensnet::{LensRunConfig, PLANTED};
use super::planted::Facts;
use crate::data::documents::{Document, tokenize};
use crate::data::packing::{held_out, split_holdout};
use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::extend::load_data;
use crate::jobs::{ModelDir, model_error};

/// Tokens of a history and of its future, before anything is made of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Passage {
    /// The history, then the future.
    pub tokens: Vec<u32>,
    /// Where the future begins.
    pub cursor: usize,
    /// The tokens that the future cannot be predicted without, where that is known.
    pub fact: Option<Range<u64>>,
}

impl Passage {
    /// The history with its gists, and the future.
    ///
    /// # Errors
    /// Those of the tree.
    pub fn history(
        &self,
        decoder: &Decoder,
        network: &GistNet,
        levels: u8,
        base: &BaseModel,
    ) -> Result<History> {
        let hierarchy = Hierarchy::new(network.config().block, levels).map_err(model_error)?;
        let mut tree = GistTree::new(hierarchy, network.config().width, base.clone()).map_err(model_error)?;
        tree.append(&self.tokens[..self.cursor], decoder, network).map_err(model_error)?;
        Ok(History { tree, future: self.tokens[self.cursor..].to_vec(), fact: self.fact.clone() })
    }
}

/// What each side is for, in errors, and in the names of the streams that draw from it.
const SIDES: [&str; 3] = ["to learn from", "held out", "held out to test on"];

/// Passages to learn from, to choose the network by, and to test it on: as many as a resolved run looks at, drawn by its seed.
///
/// # Errors
/// See the module.
pub fn read(
    config: &LensRunConfig,
    model: &ModelDir,
    block: usize,
    host: &dyn HostApi,
) -> Result<[Vec<Passage>; 3]> {
    let history = config.history.unwrap_or(0);
    let whole = history + config.horizon;
    let encode = model.encoder();
    let mut sides = [Vec::new(), Vec::new(), Vec::new()];
    let (planted, text): (Vec<&String>, Vec<&String>) =
        config.data.iter().partition(|source| source.starts_with(PLANTED));
    for source in planted {
        let Some(count) = source[PLANTED.len()..].parse::<u64>().ok().filter(|count| *count >= 3) else {
            return Err(PluginError::usage(format!(
                "data: expected {PLANTED}N with N documents, at least 3, got \"{source}\""
            )));
        };
        let facts = Facts::new(&model.tokenizer, block, history)?;
        let held_out = ((config.holdout * count as f64).round() as u64).clamp(2, count - 1);
        for number in 0..count {
            let made = facts.document(config.seed, number, config.horizon)?;
            let passage = Passage {
                cursor: made.history.len(),
                tokens: [made.history, made.future].concat(),
                fact: Some(made.fact),
            };
            let side = match number {
                number if number < held_out / 2 => 1,
                number if number < held_out => 2,
                _ => 0,
            };
            sides[side].push(passage);
        }
    }
    if !text.is_empty() || config.data.is_empty() {
        let text: Vec<String> = text.into_iter().cloned().collect();
        let (train, held) = split_holdout(load_data(&text, host)?, config.holdout, config.seed);
        let tests = held_out(&held.iter().collect::<Vec<_>>(), 0.5, config.seed, "test");
        let (test, validation): (Vec<_>, Vec<_>) = held.into_iter().zip(tests).partition(|(_, test)| *test);
        let documents = |of: Vec<(Document, bool)>| of.into_iter().map(|(document, _)| document).collect();
        for (side, documents) in sides.iter_mut().zip([train, documents(validation), documents(test)]) {
            for document in tokenize(&documents, &encode)? {
                side.extend(document.chunks_exact(whole).map(|part| Passage {
                    tokens: part.to_vec(),
                    cursor: history,
                    fact: None,
                }));
            }
        }
    }
    let [_, validation, test] = &mut sides;
    if validation.is_empty() || test.is_empty() {
        validation.append(test);
        *test = validation.split_off(validation.len() / 2);
    }
    for (what, side) in SIDES.into_iter().zip(&sides) {
        if side.is_empty() {
            return Err(PluginError::data(format!(
                "data: expected a document {what} of at least {whole} tokens, a history of {history} and a horizon of {}, got \
                 none; longer or more documents help, or a smaller --history",
                config.horizon
            )));
        }
    }
    // Which histories are looked at follows from the seed, and is spread over all text.
    let wanted = [
        config.labels.rounds * config.labels.histories,
        config.validation.histories,
        config.validation.test_histories,
    ];
    for ((what, side), wanted) in SIDES.into_iter().zip(&mut sides).zip(wanted) {
        let mut random = Random::named(config.seed, &format!("histories {what}"));
        gistnet_adapter::curriculum::shuffle(side, &mut random);
        side.truncate(wanted);
    }
    Ok(sides)
}
