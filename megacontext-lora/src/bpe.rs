//! Trains the small byte-level BPE of the embedded default model.
//!
//! Source: Sennrich, Haddow, Birch 2016 (BPE) over bytes with GPT-2's pre-tokenisation (Radford et al. 2019),
//! as the `tokenizers` crate does both: a text is first cut into words (with their leading space), numbers,
//! runs of punctuation and runs of white space, and no merge crosses a cut. Every byte has a token, so every
//! text has tokens and comes back exactly.
//!
//! The vocabulary: id 0 is [`END_OF_TEXT`] (the end token, and the only special one), then the 256 bytes,
//! then merges. It is written as `tokenizer.json` and `tokenizer_config.json`, which transformers'
//! `AutoTokenizer` loads as `PreTrainedTokenizerFast`.
//!
//! Trained on a sample, because counting words is the slow part: whole documents in a seeded order until 30
//! MB are full. Same documents, seed and crate version give the same files.
//!
//! Units: bytes of text, tokens. Errors: [`Kind::Usage`] for a vocabulary too small, [`Kind::Data`] for text
//! that yields too few merges, [`Kind::Io`]. Left out: normalisation, other pre-tokenisers, dropout.
//!
//! [`Kind::Usage`]: crate::error::Kind::Usage
//! [`Kind::Data`]: crate::error::Kind::Data
//! [`Kind::Io`]: crate::error::Kind::Io

use std::path::Path;

use megacontext_base::random::Random;
use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl,
};

use crate::data::documents::Document;
use crate::error::{IoResultExt, PluginError, Result};

/// The end token: it follows every document and has id 0.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The end token and one token per byte.
pub const SMALLEST_VOCABULARY: usize = 257;
/// Longer tokens are all indentation and rulers; they cost vocabulary that words need.
const MAX_TOKEN_BYTES: usize = 24;
/// Size of the sample.
const SAMPLE_BYTES: usize = 30_000_000;

/// What was trained.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Tokens in all.
    pub vocab_size: usize,
    /// Documents of the sample.
    pub documents: usize,
    /// Bytes of the sample.
    pub bytes: usize,
    /// Bytes of the sample per token, measured on its first documents (up to 1 MB).
    pub bytes_per_token: f64,
}

type Trained =
    TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// Trains on a sample of `documents` and writes `tokenizer.json` and `tokenizer_config.json` into the folder
/// `out`, which is created where missing. `vocab_size` counts all tokens, `seed` orders the sampling.
pub fn train(documents: &[Document], vocab_size: usize, seed: u64, out: &Path) -> Result<Summary> {
    train_on(sample(documents, SAMPLE_BYTES, seed), vocab_size, out)
}

fn train_on(sample: Vec<&str>, vocab_size: usize, out: &Path) -> Result<Summary> {
    if vocab_size < SMALLEST_VOCABULARY {
        return Err(PluginError::usage(format!(
            "tokenizer: expected a vocabulary of at least {SMALLEST_VOCABULARY} (the end token and 256 bytes), got {}",
            vocab_size
        )));
    }
    let bytes: usize = sample.iter().map(|text| text.len()).sum();
    let fail = |what: &str| {
        let what = what.to_string();
        move |error: tokenizers::Error| PluginError::internal(format!("tokenizer: {what}: {error}"))
    };

    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .max_token_length(Some(MAX_TOKEN_BYTES))
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .build();
    let mut tokenizer: Trained = TokenizerImpl::new(BPE::default());
    tokenizer
        .with_pre_tokenizer(Some(ByteLevel::new(false, true, true)))
        .with_decoder(Some(ByteLevel::default()));
    tokenizer.train(&mut trainer, sample.iter()).map_err(fail("training failed"))?;
    let trained = tokenizer.get_vocab_size(true);
    if trained != vocab_size {
        return Err(PluginError::data(format!(
            "tokenizer: expected {vocab_size} tokens, but {bytes} bytes of text yield {trained}: give more text"
        )));
    }

    let (mut measured, mut tokens) = (0, 0);
    for text in &sample {
        if measured >= 1_000_000 {
            break;
        }
        tokens += tokenizer.encode_fast(*text, false).map_err(fail("cannot encode its own sample"))?.len();
        measured += text.len();
    }

    let json = tokenizer.to_string(true).map_err(fail("cannot be written as JSON"))?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": null,
        "add_prefix_space": false,
        "clean_up_tokenization_spaces": false,
    });
    std::fs::create_dir_all(out).at(out)?;
    for (name, text) in [("tokenizer.json", json), ("tokenizer_config.json", format!("{config:#}\n"))] {
        let path = out.join(name);
        std::fs::write(&path, text).at(&path)?;
    }
    Ok(Summary {
        vocab_size,
        documents: sample.len(),
        bytes,
        bytes_per_token: measured as f64 / tokens.max(1) as f64,
    })
}

/// Whole documents in a seeded order until the sample is full.
fn sample(documents: &[Document], size: usize, seed: u64) -> Vec<&str> {
    let mut order: Vec<usize> = (0..documents.len()).collect();
    let mut random = Random::named(seed, "tokenizer sample");
    for last in (1..order.len()).rev() {
        order.swap(last, random.below(last + 1));
    }
    let mut bytes = 0;
    order
        .into_iter()
        .map(|index| documents[index].text.as_str())
        .take_while(|text| {
            let room = bytes < size;
            bytes += text.len();
            room
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use megacontext_base::tokenizer::Tokenizer;

    fn documents() -> Vec<Document> {
        let text = include_str!("data/packing.rs");
        text.split("\n\n").enumerate().map(|(i, part)| Document::new(format!("{i}"), part)).collect()
    }

    #[test]
    fn every_text_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let summary = train(&documents(), 400, 0, dir.path()).unwrap();
        assert_eq!(summary.vocab_size, 400);
        assert!(summary.bytes_per_token > 1.5, "{summary:?}");
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        assert_eq!(tokenizer.eos_id(), Some(0));
        assert_eq!(tokenizer.vocab_size(), 400);
        for text in [
            "fn main() {\n    let x = 1;\n}\n",
            " leading",
            "naïve 日本語 \u{1F980}\r\n\t\0",
            "<|endoftext|>",
            "",
        ] {
            let tokens = tokenizer.encode(text).unwrap();
            assert!(tokens.iter().all(|&token| token > 0 && token < 400), "{tokens:?}");
            assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
        }
    }

    #[test]
    fn same_seed_same_bytes() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let documents = documents();
        let part = || sample(&documents, 8000, 5);
        let first = train_on(part(), 400, one.path()).unwrap();
        assert_eq!(train_on(part(), 400, two.path()).unwrap(), first);
        assert!(first.documents < documents.len());
        assert_ne!(sample(&documents, 8000, 6), part());
        let read = |dir: &tempfile::TempDir| std::fs::read(dir.path().join("tokenizer.json")).unwrap();
        assert!(read(&one) == read(&two), "tokenizer.json differs");
    }

    #[test]
    fn refuses_a_vocabulary_without_room_for_the_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let error = train(&documents(), 256, 0, dir.path()).unwrap_err();
        assert!(error.kind == Kind::Usage && error.message.contains("257"), "{error}");
    }

    #[test]
    fn refuses_text_that_yields_too_few_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let error = train(&[Document::new("a", "a a a a")], 400, 0, dir.path()).unwrap_err();
        assert!(error.kind == Kind::Data && error.message.contains("expected 400 tokens"), "{error}");
        assert!(!dir.path().join("tokenizer.json").exists());
    }
}
