//! Text to tokens and back: a thin layer over `tokenizers` for the `tokenizer.json` of a model folder.
//!
//! Nothing is added that the text does not say: no begin or end token, no padding, no truncation; and a special token
//! that is spelled out in the text (`</s>` in a web page) is encoded as ordinary text, so that data cannot end a
//! document by quoting. Whoever joins documents puts the end token between them himself, see [`Tokenizer::eos_id`].
//!
//! Units: token ids below the vocabulary size. Errors: `BaseError::Tokenizer`.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{BaseError, Result};

/// Names that an end token has where no file says which one it is.
const USUAL_END_TOKENS: [&str; 3] = ["</s>", "<|endoftext|>", "<|end_of_text|>"];

/// The tokenizer of a model.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    eos: Option<u32>,
    opening: Vec<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model folder.
    ///
    /// The end token is `eos_token_id` of `config.json`; without one, `eos_token` of `tokenizer_config.json` or
    /// `special_tokens_map.json`; without these, `</s>`, `<|endoftext|>` or `<|end_of_text|>` where the
    /// vocabulary has it.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(BaseError::tokenizer(&path, "expected this file, there is none"));
            }
            Err(e) => return Err(BaseError::io(&path)(e)),
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| BaseError::tokenizer(&path, format!("expected a complete tokenizer: {e}")))?;
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| BaseError::tokenizer(&path, format!("cannot switch truncation off: {e}")))?;
        inner.set_encode_special_tokens(true);
        let eos = end_token(dir, &inner);
        let opening = opening(&inner);
        Ok(Self { inner, path, eos, opening })
    }

    /// Token ids of a text, without any that the text does not spell.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|e| BaseError::tokenizer(&self.path, format!("cannot encode a text: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, special ones spelled out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        if let Some(bad) = ids.iter().find(|id| self.inner.id_to_token(**id).is_none()) {
            let message = format!("expected token ids of this vocabulary, got {bad}");
            return Err(BaseError::tokenizer(&self.path, message));
        }
        self.inner
            .decode(ids, false)
            .map_err(|e| BaseError::tokenizer(&self.path, format!("cannot decode tokens: {e}")))
    }

    /// The token that ends a document, if there is one.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// What the tokenizer's own template puts in front of a text: a begin token for Llama, nothing for many. Encoding does
    /// not; whoever makes a prompt puts it there himself.
    pub fn opening(&self) -> &[u32] {
        &self.opening
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

fn opening(tokenizer: &tokenizers::Tokenizer) -> Vec<u32> {
    // Any text will do whose own tokens can be found again.
    let ids = |special| tokenizer.encode_fast("a", special).map(|e| e.get_ids().to_vec()).unwrap_or_default();
    let (plain, whole) = (ids(false), ids(true));
    let at = (0..whole.len()).find(|at| !plain.is_empty() && whole[*at..].starts_with(&plain));
    whole[..at.unwrap_or(0)].to_vec()
}

fn end_token(dir: &Path, tokenizer: &tokenizers::Tokenizer) -> Option<u32> {
    let read = |file: &str| -> Option<Value> { serde_json::from_slice(&fs::read(dir.join(file)).ok()?).ok() };
    let stated = read("config.json").and_then(|config| {
        let id = config.get("eos_token_id")?;
        let id = id.as_array().map_or(Some(id), |list| list.first())?;
        u32::try_from(id.as_u64()?).ok().filter(|id| tokenizer.id_to_token(*id).is_some())
    });
    let named = || {
        ["tokenizer_config.json", "special_tokens_map.json"].iter().find_map(|file| {
            let value = read(file)?;
            let token = value.get("eos_token")?;
            let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
            tokenizer.token_to_id(text)
        })
    };
    let usual = || USUAL_END_TOKENS.iter().find_map(|token| tokenizer.token_to_id(token));
    stated.or_else(named).or_else(usual)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": [{"id": 4, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}],
            "normalizer": null,
            "pre_tokenizer": null,
            "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [4], "tokens": ["</s>"]}}},
            "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": {"<": 0, "/": 1, "s": 2, ">": 3}, "merges": []}
        });
        fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        dir
    }

    #[test]
    fn nothing_is_added_and_spelled_special_tokens_are_text() {
        let dir = folder();
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        assert_eq!(tokenizer.encode("s></s>").unwrap(), [2, 3, 0, 1, 2, 3]);
        assert_eq!(tokenizer.decode(&[2, 4]).unwrap(), "s</s>");
        assert_eq!(tokenizer.vocab_size(), 5);
    }

    #[test]
    fn end_token_is_looked_up_in_order() {
        let dir = folder();
        let eos = || Tokenizer::from_dir(dir.path()).unwrap().eos_id();
        assert_eq!(eos(), Some(4));
        fs::write(dir.path().join("tokenizer_config.json"), r#"{"eos_token": {"content": "s"}}"#).unwrap();
        assert_eq!(eos(), Some(2));
        fs::write(dir.path().join("config.json"), r#"{"eos_token_id": [3, 1]}"#).unwrap();
        assert_eq!(eos(), Some(3));
        fs::write(dir.path().join("config.json"), r#"{"eos_token_id": 77}"#).unwrap();
        assert_eq!(eos(), Some(2));
    }

    #[test]
    fn the_opening_is_what_the_template_puts_first() {
        let dir = folder();
        let opening = || Tokenizer::from_dir(dir.path()).unwrap().opening().to_vec();
        // The template of this folder puts its token behind the text.
        assert_eq!(opening(), [0u32; 0]);
        let path = dir.path().join("tokenizer.json");
        let mut file: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        file["model"]["vocab"]["a"] = json!(5);
        let single = file["post_processor"]["single"].as_array_mut().unwrap();
        single.swap(0, 1);
        fs::write(&path, file.to_string()).unwrap();
        assert_eq!(opening(), [4]);
    }

    #[test]
    fn missing_tokenizer_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::from_dir(dir.path()).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json") && error.contains("there is none"), "{error}");
    }

    #[test]
    fn half_written_tokenizer_is_refused() {
        let dir = folder();
        let path = dir.path().join("tokenizer.json");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() / 2]).unwrap();
        let error = Tokenizer::from_dir(dir.path()).err().unwrap().to_string();
        assert!(error.contains("expected a complete tokenizer"), "{error}");
    }

    #[test]
    fn unknown_id_is_refused_when_decoding() {
        let dir = folder();
        let error = Tokenizer::from_dir(dir.path()).unwrap().decode(&[9]).unwrap_err().to_string();
        assert!(error.contains("got 9"), "{error}");
    }
}
