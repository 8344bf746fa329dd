//! The loss as it is defined: whole contexts written out entry by entry and run in two plain passes.

use candle_core::{Device, Tensor};
use gistnet_adapter::delta_nll::Span;
use megacontext_base::decoder::{Decoder, Forward};
use megacontext_base::gradients::Gradients;
use megacontext_base::rope::{Entries, SigmaRule};
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::loss::IGNORE;

/// A document, and how contexts over it are computed.
#[derive(Clone, Copy)]
pub struct Plain<'a> {
    pub decoder: &'a Decoder,
    pub tokens: &'a [u32],
    pub rule: SigmaRule,
    pub pattern: Pattern,
    pub horizon: usize,
}

/// What stands where spans were.
#[derive(Clone, Copy)]
pub enum Stands<'a> {
    /// Vectors, one a span.
    Vectors(&'a [f32]),
    /// The last so many of its tokens.
    LastTokens(usize),
    Nothing,
}

impl Plain<'_> {
    fn embedded(&self, at: usize) -> Vec<f32> {
        self.decoder.embed(&self.tokens[at..at + 1], 1).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    /// One past the last token of a span.
    pub fn end(&self, span: Span) -> usize {
        span.start + self.rule.block.pow(span.lod)
    }

    /// NLL of the future of one row, and the gradient of ½·ΔNLL@H for the vectors that stand for its spans.
    pub fn replaced(&self, spans: &[Span], stands: Stands) -> (Vec<f32>, Vec<f32>) {
        let (decoder, tokens, horizon) = (self.decoder, self.tokens, self.horizon);
        let width = decoder.config().hidden_size;
        let (mut x, mut lod, mut starts, mut at, mut places) = (vec![], vec![], vec![], 0, vec![]);
        let end = spans.last().map(|span| self.end(*span)).unwrap();
        while at < end + horizon {
            let mut from = at;
            if let Some(number) = spans.iter().position(|span| span.start == at) {
                let after = self.end(spans[number]);
                from = match stands {
                    Stands::Vectors(vectors) => {
                        places.push(starts.len());
                        x.extend_from_slice(&vectors[number * width..][..width]);
                        lod.push(spans[number].lod);
                        starts.push(at as f64);
                        after
                    }
                    Stands::LastTokens(count) => after - count,
                    Stands::Nothing => after,
                };
                at = after;
            } else {
                at += 1;
            }
            for token in from..at {
                x.extend(self.embedded(token));
                lod.push(0);
                starts.push(token as f64);
            }
        }
        let n = lod.len();
        // Filled up to the document's length: nothing looks ahead, and groups are those of the document.
        while lod.len() < tokens.len() {
            x.extend(self.embedded(0));
            starts.push(at as f64);
            lod.push(0);
            at += 1;
        }
        let (mu, sigma): (Vec<f64>, Vec<f64>) =
            starts.iter().zip(&lod).map(|(start, lod)| self.rule.place(*start, *lod)).unzip();
        let c = decoder.config();
        let entries = Entries {
            mu: &mu,
            sigma: Some(&sigma),
            lod: Some(&lod),
            scales: None,
            length: Some(tokens.len()),
        };
        let rope = c.rope(&c.rope_scaling).place(&entries).unwrap();
        let mut targets = vec![IGNORE; lod.len()];
        // The future's last token is an entry here, from which nothing is read.
        for j in 0..horizon {
            targets[n - 1 - horizon + j] = tokens[end + j];
        }
        let rows = Rows::default();
        let with = Forward { pattern: self.pattern, rope: &rope, rows: &rows, dropout_seed: None };
        let x = Tensor::from_vec(x, (1, lod.len(), width), &Device::Cpu).unwrap();
        let nll = decoder.nll(&x, &targets, &with).unwrap();
        let mut gradients = Gradients::new();
        let scale = 0.5 / horizon as f64;
        let (_, d) = decoder.entry_gradients(&x, &targets, &with, scale, false, &mut gradients).unwrap();
        let d: Vec<f32> = d.flatten_all().unwrap().to_vec1().unwrap();
        let d = places.iter().flat_map(|at| d[at * width..][..width].to_vec()).collect();
        (nll[n - 1 - horizon..n - 1].to_vec(), d)
    }

    /// NLL of the future behind `end` in the document as it is.
    pub fn full(&self, end: usize) -> Vec<f32> {
        let (tokens, c) = (self.tokens, self.decoder.config());
        let (mu, sigma): (Vec<f64>, Vec<f64>) =
            (0..tokens.len()).map(|at| self.rule.place(at as f64, 0)).unzip();
        let entries =
            Entries { mu: &mu, sigma: Some(&sigma), length: Some(tokens.len()), ..Entries::default() };
        let rope = c.rope(&c.rope_scaling).place(&entries).unwrap();
        let rows = Rows::default();
        let with = Forward { pattern: self.pattern, rope: &rope, rows: &rows, dropout_seed: None };
        let x = self.decoder.embed(tokens, 1).unwrap();
        let targets: Vec<u32> = tokens[1..].iter().copied().chain([IGNORE]).collect();
        self.decoder.nll(&x, &targets, &with).unwrap()[end - 1..][..self.horizon].to_vec()
    }

    /// ΔNLL@H of one row.
    pub fn delta(&self, spans: &[Span], stands: Stands) -> f64 {
        let replaced = self.replaced(spans, stands).0;
        let full = self.full(self.end(*spans.last().unwrap()));
        mean(&replaced) - mean(&full)
    }
}

pub fn mean(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len() as f64
}
