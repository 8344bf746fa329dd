//! ΔNLL@H: how much worse the base model predicts the next H tokens when spans before them are replaced.
//!
//! Source: MegaContext's substitution loss. With a span [t, e) of a document replaced by one entry, the future
//! F = x[e .. e+H) and NLL of F_j read from the entry before it,
//!   ΔNLL@H = (1/H)·Σ_j (NLL_replaced(F_j) − NLL_full(F_j)).
//! The full context is the document as it is, so its part is a constant and comes from the document's own pass. The
//! divergence form is (1/H)·Σ_j KL(full ‖ replaced). Both are means over H and over rows.
//!
//! Every row replaces spans of its own: one, or several before the same future, of any level (a span of level l stands for
//! K^l tokens). A row runs from its first span on, over the document's keys and values (see
//! [`megacontext_base::decoder::Document`]); of the future only the first H − 1 tokens are entries, since nothing is read
//! from the last.
//!
//! Under shifted sparse attention a group G of at least 2(H + 1) is wanted: then no boundary can hide the span from its
//! future in more than half of the heads.
//!
//! What can stand for a span: one entry at the place of a gist (whatever fills it: a gist, the mean of the span's
//! embeddings), the last m of its own tokens at their own places, nothing.
//!
//! Shapes: T tokens of the document, n rows, H horizon, K block, E model width, S slots to fill. Units: nats.
//! Errors: spans that are not aligned, not in order, or overlap; a horizon past the end; a document shorter than a block; a
//! group too small; vectors that are not S·E finite values.

use candle_core::{Device, Tensor};
use megacontext_base::buffers::Buffers;
use megacontext_base::decoder::{Continuation, Decoder, Document, Objective};
use megacontext_base::rope::{Entries, Rope, RopeScaling, RopeTables, SigmaRule};
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::loss::IGNORE;

use megacontext_base::error::{BaseError, Result};

const OP: &str = "ΔNLL@H";
/// Entries of rows that run together. More are faster and hold more at a time: measured at T 2048, all 2048 entries at once took
/// 0.8 of the time and 1.4 times the memory.
pub const ENTRIES_AT_ONCE: usize = 384;

fn refuse<T>(message: String) -> Result<T> {
    Err(BaseError::Input { message: format!("{OP}: {message}") })
}

/// Tokens that one entry of a level stands for: [start, start + K^lod).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// First token.
    pub start: usize,
    /// Level, at least 1.
    pub lod: u32,
}

/// What stands where a span was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StandIn {
    /// One entry, to be filled: see [`Rows::fill`].
    Entry,
    /// The last so many of the span's own tokens.
    LastTokens(usize),
    /// Nothing.
    Nothing,
}

/// What is measured, and on what.
pub struct DeltaNll<'a> {
    decoder: &'a Decoder,
    rope: Rope,
    rule: SigmaRule,
    pattern: Pattern,
    horizon: usize,
}

/// A document that has run, and its embeddings.
pub struct Passage {
    /// Keys, values and NLL.
    pub document: Document,
    /// Embeddings of its tokens, row-major [T, E].
    pub x_te: Vec<f32>,
}

impl Passage {
    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.document.bytes() + 4 * self.x_te.len() as u64
    }
}

/// An entry of a row that stands for a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Which row.
    pub row: usize,
    /// Which of the row's own entries.
    pub entry: usize,
    /// What it stands for.
    pub span: Span,
}

/// Rows over one document, of up to R own entries each.
pub struct Rows {
    width: usize,
    longest: usize,
    prefix: Vec<usize>,
    lengths: Vec<usize>,
    /// [n, R, E].
    x: Vec<f32>,
    /// Places and levels of all entries, n·R each.
    mu: Vec<f64>,
    sigma: Vec<f64>,
    lod: Vec<u32>,
    targets: Vec<u32>,
    teacher: Vec<usize>,
    /// First of the H scored entries of each row, and the first token that they predict.
    scored: Vec<(usize, usize)>,
    slots: Vec<Slot>,
}

/// What is made smaller: the mean over rows and horizons of weight_j·(nll·NLL + kl·KL).
#[derive(Clone, Debug, PartialEq)]
pub struct Substitution {
    /// Factor of ΔNLL@H.
    pub nll: f64,
    /// Factor of the divergence.
    pub kl: f64,
    /// Weight of each of the H positions; none means 1.
    pub weights: Option<Vec<f32>>,
}

impl Default for Substitution {
    fn default() -> Self {
        Self { nll: 1.0, kl: 0.0, weights: None }
    }
}

/// Losses of one row, H values each.
#[derive(Clone, Debug, PartialEq)]
pub struct RowLoss {
    /// NLL of the future behind what stands in.
    pub replaced: Vec<f32>,
    /// NLL of the future in the document as it is.
    pub full: Vec<f32>,
    /// KL(full ‖ replaced), where the document keeps what it takes and no objective says that it counts nothing.
    pub kl: Option<Vec<f32>>,
}

impl RowLoss {
    /// ΔNLL@H in nats.
    pub fn delta(&self) -> f64 {
        let difference = |(replaced, full): (&f32, &f32)| f64::from(*replaced) - f64::from(*full);
        self.replaced.iter().zip(&self.full).map(difference).sum::<f64>() / self.full.len() as f64
    }

    /// Mean divergence in nats.
    pub fn divergence(&self) -> Option<f64> {
        self.kl.as_ref().map(|kl| kl.iter().map(|kl| f64::from(*kl)).sum::<f64>() / kl.len() as f64)
    }
}

/// Losses of rows, and the gradient of what filled their slots.
#[derive(Debug)]
pub struct Measured {
    /// By row.
    pub rows: Vec<RowLoss>,
    /// [S, E], where an objective was given.
    pub d_slots: Option<Vec<f32>>,
}

impl Measured {
    /// The value of an objective on these rows, nats: that of the replaced contexts, less what no gist can change.
    pub fn objective(&self, of: &Substitution) -> f64 {
        let weight = |j: usize| of.weights.as_ref().map_or(1.0, |weights| f64::from(weights[j]));
        let row = |row: &RowLoss| -> f64 {
            let each = (0..row.full.len()).map(|j| {
                let delta = f64::from(row.replaced[j]) - f64::from(row.full[j]);
                let kl = row.kl.as_ref().map_or(0.0, |kl| f64::from(kl[j]));
                weight(j) * (of.nll * delta + of.kl * kl)
            });
            each.sum::<f64>() / row.full.len() as f64
        };
        self.rows.iter().map(row).sum::<f64>() / self.rows.len().max(1) as f64
    }

    /// Mean ΔNLL@H of the rows in nats.
    pub fn delta(&self) -> f64 {
        self.rows.iter().map(RowLoss::delta).sum::<f64>() / self.rows.len().max(1) as f64
    }
}

/// Refuses a group that could hide a replaced span from more than half of the heads.
pub fn check_group(pattern: Pattern, horizon: usize) -> Result<()> {
    match pattern {
        Pattern::ShiftedSparse { group } if group < 2 * (horizon + 1) => refuse(format!(
            "expected a group of at least 2·(H + 1) = {} for H = {horizon}, got {group}: a smaller one could hide the span \
             from its future in more than half of the heads",
            2 * (horizon + 1)
        )),
        _ => Ok(()),
    }
}

impl<'a> DeltaNll<'a> {
    /// Of a model whose positions are stretched by `scaling`, with entries placed by `rule` (whose `block` is K).
    ///
    /// # Errors
    /// A horizon of 0, a group that is too small for it, a rule that is none.
    pub fn new(
        decoder: &'a Decoder,
        scaling: &RopeScaling,
        rule: SigmaRule,
        pattern: Pattern,
        horizon: usize,
    ) -> Result<Self> {
        if horizon == 0 {
            return refuse("expected a horizon of at least 1 token, got 0".to_string());
        }
        rule.check().or_else(refuse)?;
        check_group(pattern, horizon)?;
        Ok(Self { decoder, rope: decoder.config().rope(scaling), rule, pattern, horizon })
    }

    /// H.
    pub fn horizon(&self) -> usize {
        self.horizon
    }

    /// K.
    pub fn block(&self) -> usize {
        self.rule.block
    }

    /// Tokens that a span of this level stands for.
    pub fn tokens_of(&self, lod: u32) -> usize {
        self.rule.block.pow(lod)
    }

    fn tables(&self, mu: &[f64], sigma: &[f64], lod: &[u32], length: usize) -> Result<RopeTables> {
        let scales = self.decoder.sigma_scales();
        let entries = Entries {
            mu,
            sigma: Some(sigma),
            lod: Some(lod),
            scales: scales.as_deref(),
            length: Some(length),
        };
        self.rope.place(&entries)
    }

    /// Runs a document; `divergence` keeps what the KL form reads of it.
    ///
    /// # Errors
    /// One shorter than a block and its horizon.
    pub fn run(&self, tokens: &[u32], divergence: bool, buffers: &mut Buffers) -> Result<Passage> {
        let least = self.rule.block + self.horizon;
        if tokens.len() < least {
            return refuse(format!(
                "expected a document of at least {least} tokens (a block of {} and a horizon of {}), got {}",
                self.rule.block,
                self.horizon,
                tokens.len()
            ));
        }
        let (mu, sigma): (Vec<f64>, Vec<f64>) =
            (0..tokens.len()).map(|at| self.rule.place(at as f64, 0)).unzip();
        let rope = self.tables(&mu, &sigma, &vec![0; tokens.len()], tokens.len())?;
        let document = self.decoder.run_document(tokens, self.pattern, &rope, divergence, buffers)?;
        let x_te = self.decoder.embed(tokens, 1)?.flatten_all()?.to_vec1()?;
        Ok(Passage { document, x_te })
    }

    fn check_spans(&self, spans: &[Span], length: usize) -> Result<()> {
        if spans.is_empty() {
            return refuse("expected at least one span in every row, got none".to_string());
        }
        let mut end = 0;
        for span in spans {
            if span.lod == 0 {
                return refuse(format!("span at {}: expected a level of at least 1, got 0", span.start));
            }
            let tokens = self.tokens_of(span.lod);
            if !span.start.is_multiple_of(tokens) {
                return refuse(format!(
                    "span of level {}: expected a start that is a multiple of {tokens}, got {}",
                    span.lod, span.start
                ));
            }
            if span.start < end {
                return refuse(format!(
                    "expected spans in order that do not overlap, got one at {} after one that ends at {end}",
                    span.start
                ));
            }
            end = span.start + tokens;
        }
        if end + self.horizon > length {
            return refuse(format!(
                "expected a horizon of {} tokens behind the span that ends at {end}, got a document of {length}",
                self.horizon
            ));
        }
        Ok(())
    }

    /// Rows over a passage, each with its own spans replaced.
    ///
    /// # Errors
    /// See the module; with [`StandIn::Nothing`] or no own tokens a span at the document's very beginning, where nothing
    /// is left to predict from; more own tokens than a span has.
    pub fn rows(&self, passage: &Passage, replaced: &[Vec<Span>], stand_in: StandIn) -> Result<Rows> {
        let tokens = passage.document.tokens();
        let width = self.decoder.config().hidden_size;
        let mut all = Vec::with_capacity(replaced.len());
        let mut slots = Vec::new();
        for (number, spans) in replaced.iter().enumerate() {
            self.check_spans(spans, tokens.len())?;
            all.push(self.row(tokens, spans, stand_in, number, &mut slots)?);
        }
        let longest = all.iter().map(|row| row.entries.len()).max().unwrap_or(0);
        let n = all.len();
        let mut rows = Rows {
            width,
            longest,
            prefix: all.iter().map(|row| row.prefix).collect(),
            lengths: all.iter().map(|row| row.entries.len()).collect(),
            x: vec![0.0; n * longest * width],
            mu: vec![0.0; n * longest],
            sigma: vec![0.0; n * longest],
            lod: vec![0; n * longest],
            targets: vec![IGNORE; n * longest],
            teacher: vec![0; n * longest],
            scored: Vec::with_capacity(n),
            slots,
        };
        for (number, row) in all.iter().enumerate() {
            let first = number * longest;
            for (at, entry) in row.entries.iter().enumerate() {
                (rows.mu[first + at], rows.sigma[first + at]) =
                    self.rule.place(entry.start as f64, entry.lod);
                rows.lod[first + at] = entry.lod;
                if entry.lod == 0 {
                    let x = &passage.x_te[entry.start * width..][..width];
                    rows.x[(first + at) * width..][..width].copy_from_slice(x);
                }
            }
            let from = row.entries.len() - self.horizon;
            for j in 0..self.horizon {
                rows.targets[first + from + j] = tokens[row.end + j];
                rows.teacher[first + from + j] = row.end + j - 1;
            }
            rows.scored.push((from, row.end));
        }
        Ok(rows)
    }

    fn row(
        &self,
        tokens: &[u32],
        spans: &[Span],
        stand_in: StandIn,
        number: usize,
        slots: &mut Vec<Slot>,
    ) -> Result<Row> {
        let mut entries: Vec<Span> = Vec::new();
        let mut at = spans[0].start;
        let mut prefix = at;
        let token = |start| Span { start, lod: 0 };
        for span in spans {
            entries.extend((at..span.start).map(token));
            let own = self.tokens_of(span.lod);
            at = span.start + own;
            match stand_in {
                StandIn::Entry => {
                    slots.push(Slot { row: number, entry: entries.len(), span: *span });
                    entries.push(*span);
                }
                StandIn::LastTokens(count) if count > own => {
                    return refuse(format!("expected at most the {own} tokens of a span, got {count}"));
                }
                StandIn::LastTokens(count) => entries.extend((at - count..at).map(token)),
                StandIn::Nothing => {}
            }
        }
        if entries.is_empty() {
            // The future is then predicted from the entry before the span.
            if prefix == 0 {
                return refuse(
                    "expected an entry before a span that nothing stands for, got the span at 0".into(),
                );
            }
            prefix -= 1;
            entries.push(token(prefix));
        }
        entries.extend((at..at + self.horizon - 1).map(token));
        debug_assert!(at + self.horizon <= tokens.len());
        Ok(Row { prefix, entries, end: at })
    }

    /// Measures rows; with an objective, its gradient for what fills their slots too.
    ///
    /// # Errors
    /// Those of the base model; weights of another horizon.
    pub fn measure(
        &self,
        passage: &Passage,
        rows: &Rows,
        objective: Option<&Substitution>,
        buffers: &mut Buffers,
    ) -> Result<Measured> {
        let n = rows.prefix.len();
        let mut weights = None;
        if let Some(each) = objective.and_then(|objective| objective.weights.as_ref()) {
            if each.len() != self.horizon {
                let (expected, got) = (self.horizon, each.len());
                return refuse(format!("expected weights of {expected} positions, got {got}"));
            }
            let mut all = vec![0f32; n * rows.longest];
            for (number, (from, _)) in rows.scored.iter().enumerate() {
                all[number * rows.longest + from..][..each.len()].copy_from_slice(each);
            }
            weights = Some(all);
        }
        let share = 1.0 / (n * self.horizon) as f64;
        // A document may keep what a divergence reads although nothing asks for one any more.
        let diverges = passage.document.keeps_hidden() && objective.is_none_or(|of| of.kl != 0.0);
        let (mut nll, mut d) = (Vec::with_capacity(n * rows.longest), Vec::new());
        let mut kl = Vec::new();
        // So many rows at a time that what is kept for their way back stays small beside the document.
        let at_once = (ENTRIES_AT_ONCE / rows.longest.max(1)).max(1);
        for first in (0..n).step_by(at_once) {
            let last = (first + at_once).min(n);
            let entries = first * rows.longest..last * rows.longest;
            let values = &rows.x[entries.start * rows.width..entries.end * rows.width];
            let x_nre = Tensor::from_slice(values, (last - first, rows.longest, rows.width), &Device::Cpu)?;
            let length = passage.document.tokens().len();
            let [mu, sigma] = [&rows.mu, &rows.sigma].map(|all| &all[entries.clone()]);
            let continuation = Continuation {
                prefix: &rows.prefix[first..last],
                lengths: Some(&rows.lengths[first..last]),
                x_nre: &x_nre,
                rope: &self.tables(mu, sigma, &rows.lod[entries.clone()], length)?,
                targets: &rows.targets[entries.clone()],
                teacher: diverges.then_some(&rows.teacher[entries.clone()]),
            };
            let with = objective.map(|objective| Objective {
                nll: (objective.nll * share) as f32,
                kl: (objective.kl * share) as f32,
                weights: weights.as_ref().map(|weights| &weights[entries.clone()]),
            });
            let made =
                self.decoder.continue_document(&passage.document, &continuation, with, true, buffers)?;
            nll.extend(made.nll);
            kl.extend(made.kl.unwrap_or_default());
            if let Some(made) = made.d_nre {
                d.extend(made.flatten_all()?.to_vec1::<f32>()?);
            }
        }
        let losses = rows.scored.iter().enumerate().map(|(number, (from, end))| {
            let of = |values: &[f32]| values[number * rows.longest + from..][..self.horizon].to_vec();
            RowLoss {
                replaced: of(&nll),
                full: passage.document.nll()[end - 1..][..self.horizon].to_vec(),
                kl: (!kl.is_empty()).then(|| of(&kl)),
            }
        });
        let losses = losses.collect();
        let of = |slot: &Slot| {
            let at = (slot.row * rows.longest + slot.entry) * rows.width;
            d[at..at + rows.width].iter().copied()
        };
        let d_slots = objective.map(|_| rows.slots.iter().flat_map(of).collect());
        Ok(Measured { rows: losses, d_slots })
    }
}

/// One row before it is filled up to the longest.
struct Row {
    prefix: usize,
    entries: Vec<Span>,
    /// First token of the future.
    end: usize,
}

impl Rows {
    /// The entries that stand for spans, S of them, in the order of rows.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Number of rows, and of own entries that the longest has.
    pub fn dims(&self) -> (usize, usize) {
        (self.prefix.len(), self.longest)
    }

    /// Fills the slots with vectors, row-major [S, E].
    ///
    /// # Errors
    /// Another number of values, or one that is not finite: then nothing has been filled.
    pub fn fill(&mut self, vectors: &[f32]) -> Result<()> {
        let expected = self.slots.len() * self.width;
        if vectors.len() != expected {
            return refuse(format!(
                "expected {} vectors of {} values, got {} values",
                self.slots.len(),
                self.width,
                vectors.len()
            ));
        }
        if let Some(at) = vectors.iter().position(|value| !value.is_finite()) {
            return refuse(format!("expected finite gists, got {} in gist {}", vectors[at], at / self.width));
        }
        for (slot, vector) in self.slots.iter().zip(vectors.chunks_exact(self.width)) {
            let at = (slot.row * self.longest + slot.entry) * self.width;
            self.x[at..at + self.width].copy_from_slice(vector);
        }
        Ok(())
    }

    /// Means of the embeddings of the slots' spans, [S, E]: the plainest thing that can stand for them.
    pub fn means(&self, passage: &Passage, block: usize) -> Vec<f32> {
        let mean = |slot: &Slot| {
            let tokens = block.pow(slot.span.lod);
            let x = &passage.x_te[slot.span.start * self.width..][..tokens * self.width];
            let mut mean = vec![0f64; self.width];
            for row in x.chunks_exact(self.width) {
                mean.iter_mut().zip(row).for_each(|(mean, value)| *mean += f64::from(*value));
            }
            mean.into_iter().map(move |sum| (sum / tokens as f64) as f32)
        };
        self.slots.iter().flat_map(mean).collect()
    }
}
