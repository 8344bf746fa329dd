//! Documents as one token stream, training batches by number, hold-out by name, evaluation windows.
//!
//! Units: positions and lengths are tokens. A chunk of context `C` is `C + 1` tokens: `C` inputs, and the
//! same shifted by one as targets. Chunks of an epoch start `C` apart, so every token (but the stream's
//! edges) is a target once.
//!
//! Order of training data: the chunks of an epoch are shuffled by Fisher–Yates, and the whole grid is moved
//! by an offset below `C` so that chunk borders fall elsewhere in every epoch. Both come from SplitMix64
//! ([`megacontext_base::random::Random`]), keyed by (seed, stage, epoch). Chunk number `i` of a run is
//! therefore a function of `i`: resuming at step `n` needs `n`.
//!
//! Windows: Press, Smith, Lewis 2021, "Shortformer", section 3 (sliding-window evaluation). Errors:
//! [`Kind::Data`] for data shorter than the context, [`Kind::Usage`] for sizes of zero. Left out: packing
//! that respects document borders (best fit); use [`TokenStream::segments`] to hide borders instead.
//!
//! [`Kind::Data`]: crate::error::Kind::Data
//! [`Kind::Usage`]: crate::error::Kind::Usage

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use megacontext_base::random::Random;
use sha2::{Digest, Sha256};

use super::documents::Document;
use crate::error::{PluginError, Result};

/// Documents joined into one run of tokens, each followed by EOS.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenStream {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Where each document starts, ascending.
    pub starts: Vec<usize>,
}

impl TokenStream {
    /// Joins tokenised documents; every one, the last too, is followed by `eos`. Documents without tokens
    /// vanish.
    pub fn join(documents: &[Vec<u32>], eos: u32) -> Self {
        let mut stream = Self {
            tokens: Vec::with_capacity(documents.iter().map(|document| document.len() + 1).sum()),
            starts: Vec::with_capacity(documents.len()),
        };
        for document in documents.iter().filter(|document| !document.is_empty()) {
            stream.starts.push(stream.tokens.len());
            stream.tokens.extend_from_slice(document);
            stream.tokens.push(eos);
        }
        stream
    }

    /// How many tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Document borders inside `start .. start + length`, relative to `start`, ascending, the first always 0:
    /// the segments of a row in the sense of the attention kernels.
    pub fn segments(&self, start: usize, length: usize) -> Vec<usize> {
        let from = self.starts.partition_point(|&border| border <= start);
        let to = self.starts.partition_point(|&border| border < start + length);
        let inner = if from < to { &self.starts[from..to] } else { &[] };
        std::iter::once(0).chain(inner.iter().map(|border| border - start)).collect()
    }
}

/// Which chunks make up batch `i` of a stage; see the module's documentation.
#[derive(Debug)]
pub struct Batches {
    context: usize,
    micro_batch: usize,
    seed: u64,
    stage: usize,
    tokens: usize,
    chunks: usize,
    epochs: Mutex<Vec<Arc<Epoch>>>,
}

/// The order of one pass over the stream.
#[derive(Debug)]
struct Epoch {
    number: u64,
    offset: usize,
    order: Vec<u32>,
}

impl Batches {
    /// Batches of `micro_batch` chunks of `context` tokens over a stream of `tokens` tokens.
    pub fn new(tokens: usize, context: usize, micro_batch: usize, seed: u64, stage: usize) -> Result<Self> {
        if context == 0 || micro_batch == 0 {
            return Err(PluginError::usage(format!(
                "batches: expected a context and a micro-batch of at least 1, got context {context}, micro-batch {micro_batch}"
            )));
        }
        if tokens <= context {
            return Err(PluginError::data(format!(
                "the data is shorter than the context: {tokens} tokens, but one chunk of context {context} needs {}",
                context + 1
            )));
        }
        // Room for any offset below the context where the stream is long enough, else one chunk.
        let chunks = ((tokens - context) / context).max(1);
        Ok(Self { context, micro_batch, seed, stage, tokens, chunks, epochs: Mutex::new(Vec::new()) })
    }

    /// Where in the stream the chunks of batch `index` start: `micro_batch` positions, each with `context +
    /// 1` tokens from there on. A batch may straddle two epochs.
    pub fn starts(&self, index: u64) -> Vec<usize> {
        let first = index * self.micro_batch as u64;
        (first..first + self.micro_batch as u64)
            .map(|item| {
                let epoch = self.epoch(item / self.chunks as u64);
                let place = (item % self.chunks as u64) as usize;
                epoch.offset + epoch.order[place] as usize * self.context
            })
            .collect()
    }

    /// The chunks of batch `index`: `micro_batch` slices of `context + 1` tokens; inputs are all but the
    /// last, targets all but the first. `stream` is the one whose length was given to [`Batches::new`].
    pub fn rows<'a>(&self, stream: &'a [u32], index: u64) -> Vec<&'a [u32]> {
        self.starts(index).into_iter().map(|start| &stream[start..start + self.context + 1]).collect()
    }

    fn epoch(&self, number: u64) -> Arc<Epoch> {
        let mut epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(epoch) = epochs.iter().find(|epoch| epoch.number == number) {
            return epoch.clone();
        }
        let mut random = Random::named(self.seed, &format!("data stage {} epoch {number}", self.stage));
        let slack = self.tokens - 1 - self.chunks * self.context;
        let offset = random.below(slack.min(self.context - 1) + 1);
        let mut order: Vec<u32> = (0..self.chunks as u32).collect();
        for last in (1..order.len()).rev() {
            order.swap(last, random.below(last + 1));
        }
        let epoch = Arc::new(Epoch { number, offset, order });
        // Two are enough: a batch can straddle one border.
        if epochs.len() == 2 {
            epochs.remove(0);
        }
        epochs.push(epoch.clone());
        epoch
    }
}

/// Holds out a share of the documents: `(training, held out)`, each in the given order. The rule is [`held_out`]'s.
pub fn split_holdout(documents: Vec<Document>, fraction: f64, seed: u64) -> (Vec<Document>, Vec<Document>) {
    let sides = held_out(&documents.iter().collect::<Vec<_>>(), fraction, seed, "");
    let (mut training, mut held) = (Vec::new(), Vec::new());
    for (document, side) in documents.into_iter().zip(sides) {
        if side { held.push(document) } else { training.push(document) }
    }
    (training, held)
}

/// Which of the documents are held out.
///
/// A document's side depends on its group ([`Document::group`]) and the seed: the first eight bytes (big endian) of
/// `sha256(seed as 8 little-endian bytes, what, group)`, as a fraction of 2⁶⁴, lie below `fraction` when it is held out; `what`
/// tells splits of one seed apart. So adding documents of other text moves none, and no group is split. When the rule leaves a
/// side empty though `0 < fraction < 1` and there are two groups or more, the group with the lowest (highest) hash is held out
/// (trained on). Documents of a single group all stay on the side that the rule gives.
///
/// A text that stands in several documents, whatever their names and sources, is on one side: if any of them is trained on,
/// none is held out.
pub fn held_out(documents: &[&Document], fraction: f64, seed: u64, what: &str) -> Vec<bool> {
    let hash = |group: &str| {
        let digest =
            Sha256::new().chain_update(seed.to_le_bytes()).chain_update(what).chain_update(group).finalize();
        digest.iter().take(8).fold(0u64, |value, &byte| value << 8 | u64::from(byte))
    };
    let hashes: Vec<u64> = documents.iter().map(|document| hash(&document.group)).collect();
    let lowest = hashes.iter().copied().min().unwrap_or(0);
    let highest = hashes.iter().copied().max().unwrap_or(0);
    let rule = |value: u64| (value as f64) < fraction * 2f64.powi(64);
    let force = lowest != highest && fraction > 0.0 && fraction < 1.0;
    let by_group =
        |value: u64| if force { (rule(value) || value == lowest) && value != highest } else { rule(value) };
    let sides: Vec<bool> = hashes.into_iter().map(by_group).collect();
    let trained: HashSet<[u8; 32]> =
        documents.iter().zip(&sides).filter(|(_, held)| !**held).map(|(d, _)| content(d)).collect();
    documents
        .iter()
        .zip(sides)
        .map(|(document, held)| held && !trained.contains(&content(document)))
        .collect()
}

/// Hash of a document's text.
fn content(document: &Document) -> [u8; 32] {
    Sha256::digest(document.text.as_bytes()).into()
}

/// One evaluation window over a run of tokens.
///
/// The model reads [`Window::inputs`] (at most `context` tokens); of its predictions those for
/// [`Window::targets`] are scored. The logits at input position `t` predict the token at `t + 1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// First token.
    pub start: usize,
    /// One past the last token, which is a target only.
    pub end: usize,
    /// First token that is scored; above `start`.
    pub score_from: usize,
}

impl Window {
    /// The tokens that the model reads.
    pub fn inputs(&self) -> std::ops::Range<usize> {
        self.start..self.end - 1
    }

    /// The tokens whose negative log-likelihood counts.
    pub fn targets(&self) -> std::ops::Range<usize> {
        self.score_from..self.end
    }
}

/// Windows over `len` tokens such that each token except the first is scored exactly once, with at most
/// `context` tokens before it and, from the second window on, at least `min(its position, context − stride +
/// 1)`.
///
/// The first window scores all of its tokens; each next one moves on by `stride` (the last by what is left)
/// and scores only those. `1 ≤ stride ≤ context`; `stride = context` scores disjoint chunks. Fewer than two
/// tokens give no window.
pub fn strided_windows(len: usize, context: usize, stride: usize) -> Result<Vec<Window>> {
    if stride == 0 || stride > context {
        return Err(PluginError::usage(format!(
            "evaluation windows: expected 1 <= stride <= context, got stride {stride}, context {context}"
        )));
    }
    let mut windows = Vec::new();
    let mut scored = 1;
    while scored < len {
        let end = if scored == 1 { context + 1 } else { scored + stride }.min(len);
        windows.push(Window { start: end.saturating_sub(context + 1), end, score_from: scored });
        scored = end;
    }
    Ok(windows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn documents_are_joined_by_eos() {
        let stream = TokenStream::join(&[vec![1, 2], vec![], vec![3]], 9);
        assert_eq!(stream.tokens, [1, 2, 9, 3, 9]);
        assert_eq!(stream.starts, [0, 3]);
    }

    #[test]
    fn segments_are_relative_and_start_at_zero() {
        let stream = TokenStream::join(&[vec![1; 4], vec![2; 2], vec![3; 7]], 0); // borders 0, 5, 8
        assert_eq!(stream.segments(0, 16), [0, 5, 8]);
        assert_eq!(stream.segments(2, 4), [0, 3]);
        assert_eq!(stream.segments(5, 3), [0]);
        assert_eq!(stream.segments(5, 4), [0, 3]);
        assert_eq!(stream.segments(9, 4), [0]);
    }

    #[test]
    fn an_epoch_visits_every_chunk_once() {
        let batches = Batches::new(1003, 10, 3, 7, 0).unwrap();
        let chunks = batches.chunks;
        assert_eq!(chunks, 99);
        let mut offsets = std::collections::BTreeSet::new();
        for epoch in 0..3u64 {
            let per_epoch = chunks as u64 / 3;
            let mut starts: Vec<usize> = (epoch * per_epoch..(epoch + 1) * per_epoch)
                .flat_map(|index| batches.starts(index))
                .collect();
            assert!(!starts.is_sorted(), "the order is shuffled");
            starts.sort_unstable();
            assert!(starts.windows(2).all(|pair| pair[1] - pair[0] == 10));
            assert!(starts[0] < 10 && starts[98] + 11 <= 1003);
            offsets.insert(starts[0]);
        }
        assert!(offsets.len() > 1, "epochs start at different offsets");
    }

    #[test]
    fn a_batch_depends_on_its_number_alone() {
        let one = Batches::new(5000, 16, 5, 3, 1).unwrap();
        let forward: Vec<_> = (0..300).map(|index| one.starts(index)).collect();
        let other = Batches::new(5000, 16, 5, 3, 1).unwrap();
        for index in (0..300).rev() {
            assert_eq!(other.starts(index), forward[index as usize]);
        }
        assert_ne!(Batches::new(5000, 16, 5, 4, 1).unwrap().starts(0), forward[0]);
        assert_ne!(Batches::new(5000, 16, 5, 3, 2).unwrap().starts(0), forward[0]);
    }

    #[test]
    fn rows_are_inputs_and_targets() {
        let stream: Vec<u32> = (0..100).collect();
        let batches = Batches::new(stream.len(), 8, 2, 0, 0).unwrap();
        for row in batches.rows(&stream, 4) {
            assert_eq!(row.len(), 9);
            assert!(row.windows(2).all(|pair| pair[1] == pair[0] + 1));
        }
    }

    #[test]
    fn the_shortest_data_is_one_chunk() {
        let batches = Batches::new(9, 8, 2, 0, 0).unwrap();
        assert_eq!(batches.starts(0), [0, 0]);
    }

    #[test]
    fn refuses_data_shorter_than_the_context() {
        let error = Batches::new(8, 8, 1, 0, 0).unwrap_err();
        assert_eq!(error.kind, Kind::Data);
        assert!(error.message.contains("8 tokens") && error.message.contains("context 8"), "{error}");
    }

    #[test]
    fn refuses_sizes_of_zero() {
        assert_eq!(Batches::new(8, 0, 1, 0, 0).unwrap_err().kind, Kind::Usage);
        assert_eq!(Batches::new(8, 4, 0, 0, 0).unwrap_err().kind, Kind::Usage);
    }

    #[test]
    fn holdout_keeps_groups_whole_and_is_stable() {
        let documents: Vec<Document> = (0..400)
            .map(|i| Document {
                group: format!("g{}", i / 4),
                ..Document::new(format!("{i}"), format!("x{i}"))
            })
            .collect();
        let (training, held) = split_holdout(documents.clone(), 0.2, 1);
        assert_eq!(training.len() + held.len(), 400);
        assert!((40..=120).contains(&held.len()), "{}", held.len());
        assert!(training.iter().all(|t| held.iter().all(|h| h.group != t.group)));
        let (_, fewer) = split_holdout(documents[..200].to_vec(), 0.2, 1);
        assert!(held.starts_with(&fewer), "adding documents moves none");
        assert_ne!(split_holdout(documents, 0.2, 2).1, held);
    }

    #[test]
    fn holdout_leaves_neither_side_empty() {
        let documents = vec![Document::new("a.txt", "a"), Document::new("b.txt", "b")];
        for fraction in [1e-9, 0.5, 1.0 - 1e-9] {
            let (training, held) = split_holdout(documents.clone(), fraction, 0);
            assert_eq!((training.len(), held.len()), (1, 1));
        }
        assert_eq!(split_holdout(documents, 0.0, 0).1.len(), 0);
    }

    #[test]
    fn a_text_under_two_names_is_on_one_side() {
        let text = |i: usize| format!("text {i}");
        let first = (0..200).map(|i| Document::new(format!("here/{i}.txt"), text(i)));
        let again = (0..200).map(|i| Document::new(format!("there/copy of {i}.md"), text(i)));
        let documents: Vec<Document> = first.chain(again).collect();
        let (training, held) = split_holdout(documents, 0.4, 3);
        assert!((10..200).contains(&held.len()), "{}", held.len());
        assert!(held.iter().all(|h| training.iter().all(|t| t.text != h.text)));
    }

    #[test]
    fn windows_score_each_token_once() {
        for len in 0..40 {
            for context in 1..12 {
                for stride in 1..=context {
                    let windows = strided_windows(len, context, stride).unwrap();
                    let mut scored = vec![0; len];
                    for (number, window) in windows.iter().enumerate() {
                        assert!(window.start < window.score_from && window.score_from < window.end);
                        assert!(window.inputs().len() <= context && window.end <= len);
                        window.targets().for_each(|token| scored[token] += 1);
                        for token in window.targets() {
                            let seen = token - window.start;
                            assert!(number == 0 || seen >= token.min(context - stride + 1));
                        }
                    }
                    assert!(scored.iter().enumerate().all(|(token, &times)| times == usize::from(token > 0)));
                }
            }
        }
    }

    #[test]
    fn refuses_a_stride_outside_the_context() {
        assert_eq!(strided_windows(10, 4, 0).unwrap_err().kind, Kind::Usage);
        assert_eq!(strided_windows(10, 4, 5).unwrap_err().kind, Kind::Usage);
    }
}
