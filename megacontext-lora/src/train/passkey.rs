//! Passkey retrieval: a number is hidden in a long text, and the model is asked for it.
//!
//! Source: the task of Mohtashami and Jaggi 2023 ("Landmark attention") as LongLoRA's evaluation uses it; the wording is
//! ours. A prompt is an introduction, sentences about nothing in particular, one line that states the key, more sentences,
//! a question. A depth of 0 puts the line before all sentences, 1 after all of them, anything between behind that share of
//! them, to a sentence. The answer is decoded greedily, and right where its digits are the key's, all of them and no more.
//!
//! Lengths are exact: prompt and room for the answer ([`ANSWER`] tokens) come to `length` tokens, never more. Whole
//! sentences are taken; what they leave is filled with line breaks in front of the key's line. What the tokenizer puts in
//! front of a text (a begin token) counts.
//!
//! Every prompt has a random stream of its own, by seed, length, depth and trial: keys and sentences of one are not those of
//! another, and none depends on what else is measured.
//!
//! Units: tokens; depth as a share of the sentences. Errors: a length that has no room for the key's line and the
//! question, a tokenizer that cannot spell them.

use megacontext_base::random::Random;
use megacontext_base::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};

use crate::error::{PluginError, Result};
use crate::jobs::model_error;

/// Tokens of the length that are left for the answer: five digits in single tokens, a space before, and what follows.
pub const ANSWER: usize = 8;

const INTRODUCTION: &str = "There is a pass key somewhere in the text below. Find it and keep it in mind: you will be asked \
                            for it at the end.\n";
const QUESTION: &str = "\nWhat is the pass key?\nThe pass key is";
/// Nothing in them reads like a key, or like what is said about it.
pub(super) const SENTENCES: [&str; 12] = [
    "The river runs past the old mill and turns south.",
    "A grey cat sleeps on the wall in the sun.",
    "Children fly kites over the field behind the school.",
    "The baker opens early and sells out before noon.",
    "Rain falls on the roof and drips from the eaves.",
    "Two boats lie at the pier with their sails down.",
    "Bees hum in the clover along the path.",
    "The train stops here twice a day and waits a while.",
    "An owl calls from the pines when the light goes.",
    "Smoke rises from the farm and drifts over the hill.",
    "Somebody has painted the gate green again.",
    "The market fills up slowly, then all at once.",
];

/// All text that prompts are made of, but for keys: what a tokenizer has to spell.
pub fn texts() -> impl Iterator<Item = &'static str> {
    [INTRODUCTION, QUESTION, "The pass key is. Remember it. is the pass key."].into_iter().chain(SENTENCES)
}

/// One prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// `length` − [`ANSWER`] of them.
    pub tokens: Vec<u32>,
    /// Five digits.
    pub key: String,
}

/// What a model said to one prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The key that was hidden.
    pub key: String,
    /// What came, as text.
    pub said: String,
    /// Was it the key?
    pub right: bool,
}

/// Accuracy at one length and depth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Tokens of prompt and answer.
    pub length: usize,
    /// Where the key stood, 0 at the beginning, 1 at the end.
    pub depth: f64,
    /// Prompts.
    pub trials: usize,
    /// Right answers.
    pub right: usize,
    /// Each prompt's.
    pub answers: Vec<Answer>,
}

impl Cell {
    /// From the answers to a cell's prompts.
    pub fn new(length: usize, depth: f64, answers: Vec<Answer>) -> Self {
        let right = answers.iter().filter(|answer| answer.right).count();
        Self { length, depth, trials: answers.len(), right, answers }
    }

    /// Share of right answers.
    pub fn accuracy(&self) -> f64 {
        self.right as f64 / self.trials.max(1) as f64
    }
}

/// Makes prompts for one tokenizer.
pub struct Passkeys<'a> {
    tokenizer: &'a Tokenizer,
    /// What fills the place of a sentence that does not fit.
    filler: u32,
    /// Tokens of each sentence with the space before it.
    sizes: Vec<usize>,
}

impl<'a> Passkeys<'a> {
    /// Looks at the tokenizer.
    ///
    /// # Errors
    /// When it has no token for a line break, nor for a point.
    pub fn new(tokenizer: &'a Tokenizer) -> Result<Self> {
        let last = |text: &str| tokenizer.encode(text).map(|ids| ids.last().copied()).map_err(model_error);
        let Some(filler) = last("\n")?.or(last(".")?) else {
            return Err(PluginError::model(
                "passkey: expected a tokenizer with a line break or a point, got neither",
            ));
        };
        let size =
            |text: &&str| tokenizer.encode(&format!(" {text}")).map(|ids| ids.len()).map_err(model_error);
        let sizes = SENTENCES.iter().map(size).collect::<Result<_>>()?;
        Ok(Self { tokenizer, filler, sizes })
    }

    /// The least length that has room for a prompt of this seed's: introduction, the key's line, the question, the answer.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn least(&self) -> Result<usize> {
        // Keys differ in how many tokens their digits are.
        const SPARE: usize = 2 * 4;
        Ok(self.assemble("10000", &[], 0)?.iter().map(Vec::len).sum::<usize>() + SPARE + ANSWER)
    }

    /// Tokens before the place of the filler, and after it.
    fn assemble(&self, key: &str, sentences: &[usize], before: usize) -> Result<[Vec<u32>; 2]> {
        let text = |chosen: &[usize]| chosen.iter().map(|s| SENTENCES[*s]).collect::<Vec<_>>().join(" ");
        let encode = |text: &str| self.tokenizer.encode(text).map_err(model_error);
        let mut head = self.tokenizer.opening().to_vec();
        head.extend(encode(&format!("{INTRODUCTION}{}", text(&sentences[..before])))?);
        let line = format!("\nThe pass key is {key}. Remember it. {key} is the pass key.\n");
        Ok([head, encode(&format!("{line}{}{QUESTION}", text(&sentences[before..])))?])
    }

    /// The prompt of one trial.
    ///
    /// # Errors
    /// When the length has no room for it.
    pub fn prompt(&self, seed: u64, length: usize, depth: f64, trial: usize) -> Result<Prompt> {
        let mut random = Random::named(seed, &format!("passkey length {length} depth {depth} trial {trial}"));
        let key = (10_000 + random.below(90_000)).to_string();
        let wanted = length.saturating_sub(ANSWER);
        let bare: usize = self.assemble(&key, &[], 0)?.iter().map(Vec::len).sum();
        if bare > wanted {
            return Err(PluginError::usage(format!(
                "lengths: expected at least {} tokens, room for the key's line, the question and the answer, got {length}",
                bare + ANSWER
            )));
        }
        let mut sentences = Vec::new();
        let mut left = wanted - bare;
        loop {
            let next = random.below(SENTENCES.len());
            if self.sizes[next] > left {
                break;
            }
            left -= self.sizes[next];
            sentences.push(next);
        }
        // Sentences side by side can come to other tokens than each alone.
        loop {
            let before = (depth * sentences.len() as f64).round() as usize;
            let [head, tail] = self.assemble(&key, &sentences, before)?;
            if let Some(missing) = wanted.checked_sub(head.len() + tail.len()) {
                let tokens = [head, vec![self.filler; missing], tail].concat();
                return Ok(Prompt { tokens, key });
            }
            if sentences.pop().is_none() {
                return Err(PluginError::internal(format!(
                    "passkey: a prompt that fits {length} tokens no more"
                )));
            }
        }
    }

    /// Whether the key was said.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn judge(&self, key: &str, said: &[u32]) -> Result<Answer> {
        let said = self.tokenizer.decode(said).map_err(model_error)?;
        let text = said.trim_start();
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        Ok(Answer { key: key.to_string(), right: &text[..digits] == key, said })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn tokenizer() -> Tokenizer {
        let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-llama");
        Tokenizer::from_dir(&assets).unwrap()
    }

    fn text(tokenizer: &Tokenizer, prompt: &Prompt) -> String {
        tokenizer.decode(&prompt.tokens).unwrap()
    }

    #[test]
    fn a_prompt_has_exactly_its_length_and_says_what_it_should() {
        let tokenizer = tokenizer();
        let passkeys = Passkeys::new(&tokenizer).unwrap();
        let least = passkeys.least().unwrap();
        for length in (least..least + 60).chain([999, 4096]) {
            for depth in [0.0, 0.3, 1.0] {
                let prompt = passkeys.prompt(1, length, depth, 0).unwrap();
                assert_eq!(prompt.tokens.len() + ANSWER, length);
                let text = text(&tokenizer, &prompt);
                let line = format!("The pass key is {0}. Remember it. {0} is the pass key.\n", prompt.key);
                assert_eq!(text.matches(&line).count(), 1, "{text}");
                assert_eq!(text.matches(&prompt.key).count(), 2);
                assert!(
                    text.starts_with("There is a pass key") && text.ends_with("The pass key is"),
                    "{text}"
                );
                assert!(prompt.key.len() == 5 && prompt.key.bytes().all(|b| b.is_ascii_digit()));
                // No sentence is cut.
                let filler = text.replace(INTRODUCTION, "").replace(&line, "").replace(QUESTION, "");
                let rest = SENTENCES.iter().fold(filler, |text, sentence| text.replace(sentence, ""));
                assert_eq!(rest.trim(), "", "{text}");
            }
        }
    }

    #[test]
    fn depth_is_where_the_line_stands() {
        let tokenizer = tokenizer();
        let passkeys = Passkeys::new(&tokenizer).unwrap();
        for depth in [0.0, 0.25, 0.5, 0.9, 1.0] {
            let text = text(&tokenizer, &passkeys.prompt(3, 6000, depth, 1).unwrap());
            let at = text.find("Remember it").unwrap() as f64 / text.len() as f64;
            assert!((at - depth).abs() < 0.03, "depth {depth}: at {at}");
        }
    }

    #[test]
    fn trials_are_seeded_by_seed_length_depth_and_number() {
        let tokenizer = tokenizer();
        let passkeys = Passkeys::new(&tokenizer).unwrap();
        let key = |seed, length, depth, trial| passkeys.prompt(seed, length, depth, trial).unwrap().key;
        let mut keys = vec![
            key(0, 500, 0.5, 0),
            key(1, 500, 0.5, 0),
            key(0, 501, 0.5, 0),
            key(0, 500, 0.25, 0),
            key(0, 500, 0.5, 1),
        ];
        assert_eq!(keys[0], key(0, 500, 0.5, 0));
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 5);
    }

    #[test]
    fn an_answer_is_right_when_its_digits_are_the_keys() {
        let tokenizer = tokenizer();
        let passkeys = Passkeys::new(&tokenizer).unwrap();
        let right = |said: &str| passkeys.judge("12345", &tokenizer.encode(said).unwrap()).unwrap().right;
        for said in [" 12345", "12345.", " 12345. Remember", "\n12345\n"] {
            assert!(right(said), "{said}");
        }
        for said in ["", " 1234", " 123456", " 54321", " the 12345", "1 2345"] {
            assert!(!right(said), "{said}");
        }
    }

    #[test]
    fn a_length_without_room_is_refused() {
        let tokenizer = tokenizer();
        let passkeys = Passkeys::new(&tokenizer).unwrap();
        for length in [0, ANSWER, 40] {
            let error = passkeys.prompt(0, length, 0.5, 0).unwrap_err().to_string();
            assert!(
                error.contains("lengths: expected at least") && error.contains(&format!("got {length}")),
                "{error}"
            );
        }
    }
}
