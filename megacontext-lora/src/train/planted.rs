//! Planted facts: documents in which one of several numbers, stated early or late, is asked for at the end. A working context
//! predicts the answer only where the span that states it is shown as tokens, so which span deserves a closer look has a known
//! answer.
//!
//! Source: passkey retrieval ([`super::passkey`]) with decoys, after the "needle" tests of long contexts. A document is sentences
//! about nothing in particular, one line for each of several names that states the name's number, and a question for one of
//! them. Every line lies in a block of its own (blocks of K tokens), so that one gist stands for it. The line asked for
//! is in the first half of the history; decoys are anywhere.
//!
//! Every document has a random stream of its own, by seed and number. What fills a block up is a line break.
//!
//! Units: tokens. Errors: a history without room for the lines, a block shorter than a line, a tokenizer that cannot spell them.

use std::ops::Range;

use megacontext_base::random::Random;
use megacontext_base::tokenizer::Tokenizer;

use super::passkey::SENTENCES;
use crate::error::{PluginError, Result};
use crate::jobs::model_error;

/// Names that numbers are stated of.
const NAMES: [&str; 12] = [
    "amber", "birch", "cedar", "dahlia", "ember", "fennel", "garnet", "hazel", "ivory", "juniper", "kelp",
    "laurel",
];
/// Lines of a document, the one that is asked for among them.
const LINES: usize = 6;

/// All text that documents are made of, but for numbers: what a tokenizer has to spell.
pub fn texts() -> impl Iterator<Item = String> {
    NAMES.into_iter().flat_map(|name| [line(name, ""), question(name)]).chain(SENTENCES.map(str::to_string))
}

fn line(name: &str, number: &str) -> String {
    format!("\nHere is the number of {name}: {name} is {number}. Keep it: {name}.\n")
}

fn question(name: &str) -> String {
    format!("\nWhat is the number of {name}?\nHere is the number of {name}: {name} is")
}

/// One document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planted {
    /// What is known, up to the question's last token: `history` tokens.
    pub history: Vec<u32>,
    /// What follows: the answer's first `horizon` tokens at most.
    pub future: Vec<u32>,
    /// The block of the history that states the answer.
    pub fact: Range<u64>,
}

/// Makes documents for one tokenizer.
pub struct Facts<'a> {
    tokenizer: &'a Tokenizer,
    filler: u32,
    block: usize,
    history: usize,
}

impl<'a> Facts<'a> {
    /// Documents of `history` tokens in blocks of `block`.
    ///
    /// # Errors
    /// When lines do not fit in blocks, or their blocks not in the history.
    pub fn new(tokenizer: &'a Tokenizer, block: usize, history: usize) -> Result<Self> {
        let encode = |text: &str| tokenizer.encode(text).map_err(model_error);
        let filler = match encode("\n")?.last() {
            Some(filler) => *filler,
            None => encode(".")?.last().copied().ok_or_else(|| {
                PluginError::model("planted: expected a tokenizer with a line break or a point, got neither")
            })?,
        };
        let (mut longest, mut asked) = (0, 0);
        for name in NAMES {
            longest = longest.max(encode(&line(name, "10000"))?.len() + 4);
            asked = asked.max(encode(&question(name))?.len());
        }
        if longest > block {
            return Err(PluginError::usage(format!(
                "planted: expected blocks of at least {longest} tokens, so that one holds a line, got {block}"
            )));
        }
        // Lines stand in every other block at most, and the one that is asked for in the first half.
        let least = 2 * (LINES + 1) * block + asked + tokenizer.opening().len();
        if history < least {
            return Err(PluginError::usage(format!(
                "history: expected at least {least} tokens, room for {LINES} lines in blocks of {block} and a question, got \
                 {history}"
            )));
        }
        Ok(Self { tokenizer, filler, block, history })
    }

    /// Document number `number` of a seed, with at most `horizon` tokens of the answer.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn document(&self, seed: u64, number: u64, horizon: usize) -> Result<Planted> {
        let mut random = Random::named(seed, &format!("planted document {number}"));
        let encode = |text: &str| self.tokenizer.encode(text).map_err(model_error);
        let names = draw(NAMES.len(), LINES, &mut random);
        let numbers: Vec<String> =
            names.iter().map(|_| (10_000 + random.below(90_000)).to_string()).collect();
        let question = encode(&question(NAMES[names[0]]))?;
        let mut history = self.tokenizer.opening().to_vec();
        let end = self.history - question.len();
        // Blocks that are whole before the question; the first may hold what the tokenizer puts in front.
        let blocks = end / self.block;
        let first = 1 + random.below(blocks / 2 - 1);
        let mut places = vec![first];
        let others: Vec<usize> = (1..blocks).filter(|at| *at != first).collect();
        places.extend(draw(others.len(), LINES - 1, &mut random).into_iter().map(|at| others[at]));
        let mut lines: Vec<(usize, usize)> = places.into_iter().zip(0..).collect();
        lines.sort_unstable();
        for (place, which) in lines {
            self.fill(&mut history, place * self.block, &mut random)?;
            let line = encode(&line(NAMES[names[which]], &numbers[which]))?;
            if line.len() > self.block {
                return Err(PluginError::internal("planted: a line that is longer than a block"));
            }
            history.extend(line);
            history.resize((place + 1) * self.block, self.filler);
        }
        self.fill(&mut history, end, &mut random)?;
        history.extend(question);
        let mut future = encode(&format!(" {}.", numbers[0]))?;
        future.truncate(horizon);
        let fact = (first * self.block) as u64..((first + 1) * self.block) as u64;
        Ok(Planted { history, future, fact })
    }

    /// Sentences up to `end`, and line breaks where no sentence fits.
    fn fill(&self, tokens: &mut Vec<u32>, end: usize, random: &mut Random) -> Result<()> {
        loop {
            let sentence = SENTENCES[random.below(SENTENCES.len())];
            let sentence = self.tokenizer.encode(&format!(" {sentence}")).map_err(model_error)?;
            if tokens.len() + sentence.len() > end {
                tokens.resize(end, self.filler);
                return Ok(());
            }
            tokens.extend(sentence);
        }
    }
}

/// `count` different numbers below `n`, in random order.
fn draw(n: usize, count: usize, random: &mut Random) -> Vec<usize> {
    let mut all: Vec<usize> = (0..n).collect();
    for at in 0..count {
        let other = at + random.below(n - at);
        all.swap(at, other);
    }
    all.truncate(count);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn tokenizer() -> Tokenizer {
        Tokenizer::from_dir(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-llama")).unwrap()
    }

    #[test]
    fn the_fact_is_where_it_is_said_to_be_and_nowhere_else() {
        let tokenizer = tokenizer();
        let facts = Facts::new(&tokenizer, 64, 1200).unwrap();
        for number in 0..40 {
            let made = facts.document(3, number, 8).unwrap();
            assert_eq!(made.history.len(), 1200);
            assert!(!made.future.is_empty() && made.future.len() <= 8);
            let text = |tokens: &[u32]| tokenizer.decode(tokens).unwrap();
            let fact = text(&made.history[made.fact.start as usize..made.fact.end as usize]);
            let whole = text(&made.history);
            let name = whole.rsplit(' ').nth(1).unwrap();
            assert!(NAMES.contains(&name), "{whole}");
            let answer = text(&made.future);
            let answer = answer.trim().trim_end_matches('.');
            assert!(fact.contains(&format!("{name} is {answer}.")), "{fact} asked for {name}: {answer}");
            assert_eq!(whole.matches(answer).count(), 1, "{whole}");
            assert_eq!(whole.matches("Keep it:").count(), LINES);
            assert!(made.fact.start.is_multiple_of(64) && made.fact.end <= 600);
        }
    }

    #[test]
    fn documents_are_seeded_by_seed_and_number() {
        let tokenizer = tokenizer();
        let facts = Facts::new(&tokenizer, 64, 1200).unwrap();
        let of = |seed, number| facts.document(seed, number, 8).unwrap();
        assert_eq!(of(1, 2), of(1, 2));
        assert_ne!(of(1, 2), of(1, 3));
        assert_ne!(of(1, 2), of(2, 2));
    }

    #[test]
    fn a_block_shorter_than_a_line_is_refused() {
        let error = Facts::new(&tokenizer(), 4, 1200).err().unwrap().to_string();
        assert!(error.contains("planted: expected blocks of at least") && error.contains("got 4"), "{error}");
    }

    #[test]
    fn a_history_without_room_is_refused() {
        let error = Facts::new(&tokenizer(), 64, 500).err().unwrap().to_string();
        assert!(error.contains("history: expected at least") && error.contains("got 500"), "{error}");
    }
}
