//! Text of a run that trains GistNet: to learn from, to choose the network by, to test it on.
//!
//! Documents of all sources are split together, so that the same document is on one side however many sources name it
//! ([`held_out`]). The held-out ones are split once more by the same rule; where that leaves a side without a passage, their
//! passages are cut in half instead. Which passages are measured follows from the seed, and is spread over all of a side's text.
//!
//! Units: tokens. Errors: a side without a passage.

use crate::data::documents::{Document, tokenize};
use crate::data::packing::held_out;
use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::ModelDir;
use crate::jobs::extend::load_data;
use crate::train::gistnet::{GistRunConfig, Passages};

/// The three sides.
pub(crate) struct GistText {
    /// To learn from.
    pub train: Passages,
    /// To choose by.
    pub validation: Vec<Vec<u32>>,
    /// To test on.
    pub test: Vec<Vec<u32>>,
}

/// Documents with the number of their source.
pub(crate) type Documents = Vec<(usize, Document)>;

/// Reads and splits the text of a resolved run.
pub(crate) fn read_text(config: &GistRunConfig, model: &ModelDir, host: &dyn HostApi) -> Result<GistText> {
    if config.data.is_empty() {
        load_data(&[], host)?;
    }
    let mut documents = Documents::new();
    for (source, data) in config.data.iter().enumerate() {
        let of_source = load_data(std::slice::from_ref(data), host)?;
        documents.extend(of_source.into_iter().map(|document| (source, document)));
    }
    let context = config.context.unwrap_or(0);
    let least = 2 * config.network.block + config.longest_horizon();
    let encode = model.encoder();
    let passages = |documents: Documents| -> Result<Passages> {
        let (sources, documents): (Vec<usize>, Vec<Document>) = documents.into_iter().unzip();
        let mut side = Passages::default();
        for (source, tokens) in sources.into_iter().zip(tokenize(&documents, &encode)?) {
            side.add(&[tokens], source, context, least);
        }
        Ok(side)
    };
    let (train, held) = split(documents, config.holdout, config.seed, "");
    let train = passages(train)?;
    let (validation, test) = split(held, 0.5, config.seed, "test");
    let [mut validation, mut test] = [passages(validation)?, passages(test)?];
    if validation.tokens.is_empty() || test.tokens.is_empty() {
        let mut all = Passages::default();
        for side in [validation, test] {
            all.tokens.extend(side.tokens);
            all.sources.extend(side.sources);
        }
        let half = all.tokens.len() / 2;
        test = Passages { tokens: all.tokens.split_off(half), sources: all.sources.split_off(half) };
        validation = all;
    }
    let sides = [
        ("to learn from", &train),
        ("held out", &test),
        ("held out, beside the one to test on,", &validation),
    ];
    for (what, side) in sides {
        if side.tokens.is_empty() {
            return Err(PluginError::data(format!(
                "data: expected a document {what} of at least {least} tokens, for an entry, a block and a horizon, got none; \
                 more or longer documents help, or a smaller network.block or horizon"
            )));
        }
    }
    Ok(GistText {
        train,
        validation: validation.drawn(config.validation.passages, config.seed),
        test: test.drawn(config.validation.test_passages, config.seed),
    })
}

/// Those that are not held out, and those that are.
pub(crate) fn split(documents: Documents, fraction: f64, seed: u64, what: &str) -> (Documents, Documents) {
    let all: Vec<&Document> = documents.iter().map(|(_, document)| document).collect();
    let sides = held_out(&all, fraction, seed, what);
    let (mut rest, mut held) = (Vec::new(), Vec::new());
    for (document, side) in documents.into_iter().zip(sides) {
        if side { held.push(document) } else { rest.push(document) }
    }
    (rest, held)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_same_document_of_two_sources_is_on_one_side() {
        let text = |i: usize| format!("document {i}");
        let first = (0..120).map(|i| (0, Document::new(format!("books/{i}.txt"), text(i))));
        // The second source has half of them, as lines of one file.
        let second = (0..60).map(|i| (1, Document::new(format!("all.jsonl:{i}"), text(i))));
        let (rest, held) = split(first.chain(second).collect(), 0.5, 7, "");
        let (validation, test) = split(held, 0.5, 7, "test");
        let texts = |documents: &Documents| -> HashSet<String> {
            documents.iter().map(|(_, document)| document.text.clone()).collect()
        };
        let sides = [&rest, &validation, &test].map(texts);
        assert!(sides.iter().all(|side| side.len() >= 10), "{:?}", sides.each_ref().map(HashSet::len));
        assert_eq!(sides.iter().map(HashSet::len).sum::<usize>(), 120);
        assert_eq!([&rest, &validation, &test].map(Vec::len).iter().sum::<usize>(), 180);
    }
}
