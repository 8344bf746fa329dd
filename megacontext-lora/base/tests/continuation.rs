//! Rows that continue a document against the same contexts run whole: the same losses, the same gradients.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use anyhow::Result;
use candle_core::{Device, Tensor};
use megacontext_base::buffers::Buffers;
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::{Continuation, Decoder, Document, DocumentShape, Forward, Objective};
use megacontext_base::gradients::Gradients;
use megacontext_base::params::Group;
use megacontext_base::random::Random;
use megacontext_base::rope::{Entries, RopeTables};
use megacontext_base::weights::Weights;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::loss::IGNORE;
use megacontext_kernels::precision::Precision;

mod models;

use models::FOLDERS;

/// Tokens of the document, of a replaced block, and behind it.
const T: usize = 40;
const K: usize = 4;
const H: usize = 7;

fn open(name: &str, precision: Precision) -> Result<Decoder> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures").join(name);
    Ok(Decoder::from_weights(DecoderConfig::from_dir(&dir)?, &Weights::open(&dir)?, precision, &[])?)
}

/// One row: where it leaves the document, its own entries, their places, what they should predict.
struct Row {
    prefix: usize,
    x: Vec<f32>,
    mu: Vec<f64>,
    sigma: Vec<f64>,
    targets: Vec<u32>,
    /// The entry of the document that predicts the same token.
    teacher: Vec<usize>,
}

struct Case {
    decoder: Decoder,
    tokens: Vec<u32>,
    width: usize,
}

impl Case {
    fn new(name: &str, precision: Precision) -> Result<Self> {
        let decoder = open(name, precision)?;
        let vocab = decoder.config().vocab_size as u32;
        let tokens = (0..T as u32).map(|i| (i * 37 + i * i * 5 + 11) % vocab).collect();
        let width = decoder.config().hidden_size;
        Ok(Self { decoder, tokens, width })
    }

    fn embed(&self, tokens: &[u32]) -> Vec<f32> {
        let x = self.decoder.embed(tokens, 1).unwrap();
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// A row in which the blocks that begin at `blocks` are vectors of some length, followed by H − 1 tokens.
    fn row(&self, blocks: &[usize]) -> Row {
        let prefix = blocks[0];
        let mut random = Random::named(3, &format!("{blocks:?}"));
        let mut row = Row { prefix, x: vec![], mu: vec![], sigma: vec![], targets: vec![], teacher: vec![] };
        let last = blocks[blocks.len() - 1] + K;
        let mut at = prefix;
        while at < last + H - 1 {
            let scored = at + K >= last && at + 1 < T;
            if blocks.contains(&at) {
                row.x.extend((0..self.width).map(|_| random.normal() as f32 * 0.5));
                row.mu.push((at + K / 2) as f64);
                row.sigma.push(K as f64);
                at += K;
            } else {
                row.x.extend(self.embed(&self.tokens[at..at + 1]));
                row.mu.push(at as f64);
                row.sigma.push(0.0);
                at += 1;
            }
            let predicts = scored && at >= last;
            row.targets.push(if predicts { self.tokens[at] } else { IGNORE });
            row.teacher.push(if predicts { at - 1 } else { 0 });
        }
        row
    }

    fn tables(&self, mu: &[f64], sigma: &[f64]) -> RopeTables {
        let c = self.decoder.config();
        let entries = Entries { mu, sigma: Some(sigma), length: Some(T), ..Entries::default() };
        c.rope(&c.rope_scaling).place(&entries).unwrap()
    }

    fn document(&self, pattern: Pattern, hidden: bool) -> Document {
        let c = self.decoder.config();
        let rope = c.rope(&c.rope_scaling).sequence(T).unwrap();
        let mut buffers = Buffers::default();
        self.decoder.run_document(&self.tokens, pattern, &rope, hidden, &mut buffers).unwrap()
    }

    /// Losses [n·R] and gradients [n·R, E] of rows, shorter ones filled up.
    fn continued(&self, document: &Document, rows: &[Row], with: Objective, recompute: bool) -> Losses {
        let longest = rows.iter().map(|row| row.mu.len()).max().unwrap();
        let mut all =
            Row { prefix: 0, x: vec![], mu: vec![], sigma: vec![], targets: vec![], teacher: vec![] };
        for row in rows {
            let missing = longest - row.mu.len();
            all.x.extend(row.x.iter().copied().chain(vec![0.3; missing * self.width]));
            all.mu.extend(row.mu.iter().copied().chain(vec![0.0; missing]));
            all.sigma.extend(row.sigma.iter().copied().chain(vec![0.0; missing]));
            all.targets.extend(row.targets.iter().copied().chain(vec![IGNORE; missing]));
            all.teacher.extend(row.teacher.iter().copied().chain(vec![0; missing]));
        }
        let prefix: Vec<usize> = rows.iter().map(|row| row.prefix).collect();
        let lengths: Vec<usize> = rows.iter().map(|row| row.mu.len()).collect();
        let shape = (rows.len(), longest, self.width);
        let x_nre = Tensor::from_vec(all.x, shape, &Device::Cpu).unwrap();
        let rope = self.tables(&all.mu, &all.sigma);
        let rows = Continuation {
            prefix: &prefix,
            lengths: Some(&lengths),
            x_nre: &x_nre,
            rope: &rope,
            targets: &all.targets,
            teacher: (with.kl != 0.0).then_some(&all.teacher),
        };
        let mut buffers = Buffers::default();
        let made =
            self.decoder.continue_document(document, &rows, Some(with), recompute, &mut buffers).unwrap();
        let plain = self.decoder.continue_document(document, &rows, None, recompute, &mut buffers).unwrap();
        assert_eq!(made.nll, plain.nll, "with and without gradients");
        assert_eq!(made.kl, plain.kl, "with and without gradients");
        let d = made.d_nre.unwrap().flatten_all().unwrap().to_vec1().unwrap();
        Losses { nll: made.nll, kl: made.kl, d, longest }
    }

    /// The same of one row, run whole.
    fn whole(&self, row: &Row, pattern: Pattern) -> (Vec<f32>, Vec<f32>) {
        let mut x = self.embed(&self.tokens[..row.prefix]);
        x.extend(&row.x);
        let (mut mu, mut sigma): (Vec<f64>, Vec<f64>) = (0..row.prefix).map(|p| (p as f64, 0.0)).unzip();
        mu.extend(&row.mu);
        sigma.extend(&row.sigma);
        let mut targets: Vec<u32> =
            vec![IGNORE; row.prefix].into_iter().chain(row.targets.iter().copied()).collect();
        // Filled up to the document's length: nothing looks ahead, and groups are those of the document.
        let own = mu.len();
        x.resize(T * self.width, 0.1);
        mu.resize(T, T as f64);
        sigma.resize(T, 0.0);
        targets.resize(T, IGNORE);
        let rope = self.tables(&mu, &sigma);
        let rows = Rows::default();
        let with = Forward { pattern, rope: &rope, rows: &rows, dropout_seed: None };
        let x = Tensor::from_vec(x, (1, T, self.width), &Device::Cpu).unwrap();
        let nll = self.decoder.nll(&x, &targets, &with).unwrap();
        let mut gradients = Gradients::new();
        let (_, d) = self.decoder.entry_gradients(&x, &targets, &with, 0.5, false, &mut gradients).unwrap();
        let d: Vec<f32> = d.flatten_all().unwrap().to_vec1().unwrap();
        (nll[row.prefix..own].to_vec(), d[row.prefix * self.width..own * self.width].to_vec())
    }
}

struct Losses {
    nll: Vec<f32>,
    kl: Option<Vec<f32>>,
    d: Vec<f32>,
    longest: usize,
}

const HALF: Objective = Objective { nll: 0.5, kl: 0.0, weights: None };

fn largest(values: impl Iterator<Item = f32>) -> f32 {
    values.fold(0.0, |most, value| most.max(value.abs()))
}

/// Compares rows with the same contexts run whole.
fn compare(name: &str, pattern: Pattern, precision: Precision, [value, relative]: [f32; 2]) -> Result<()> {
    let case = Case::new(name, precision)?;
    let rows = [case.row(&[8]), case.row(&[1]), case.row(&[28]), case.row(&[4, 12, 20]), case.row(&[0])];
    let document = case.document(pattern, false);
    let got = case.continued(&document, &rows, HALF, true);
    for (number, row) in rows.iter().enumerate() {
        let (nll, d) = case.whole(row, pattern);
        let own = &got.nll[number * got.longest..][..nll.len()];
        let off = largest(own.iter().zip(&nll).map(|(a, b)| a - b));
        assert!(off <= value, "{name} {pattern:?} {precision:?} row {number}: NLL differs by {off}");
        let own = &got.d[number * got.longest * case.width..][..d.len()];
        let off = largest(own.iter().zip(&d).map(|(a, b)| a - b)) / largest(d.iter().copied());
        assert!(off <= relative, "{name} {pattern:?} {precision:?} row {number}: gradients differ by {off}");
    }
    Ok(())
}

#[test]
fn rows_equal_the_same_contexts_run_whole_in_every_family() -> Result<()> {
    for name in FOLDERS {
        for pattern in [Pattern::Dense, Pattern::ShiftedSparse { group: 16 }] {
            compare(name, pattern, Precision::F32, [1e-5, 1e-4])?;
        }
    }
    Ok(())
}

#[test]
fn rows_equal_the_same_contexts_run_whole_in_every_pattern() -> Result<()> {
    let sparse = [5, 8, 64].map(|group| Pattern::ShiftedSparse { group });
    for pattern in sparse.into_iter().chain([Pattern::SlidingWindow { window: 9 }]) {
        compare("llama/tied_f32", pattern, Precision::F32, [1e-5, 1e-4])?;
    }
    Ok(())
}

#[test]
fn rounded_classes_stay_near_the_same_contexts_run_whole() -> Result<()> {
    for (precision, off) in [(Precision::Mixed, 3e-2), (Precision::Bf16, 1e-1)] {
        compare("families/qwen3_bf16_sharded", Pattern::Dense, precision, [off, off])?;
    }
    Ok(())
}

#[test]
fn the_documents_own_losses_are_those_of_a_plain_pass() -> Result<()> {
    let case = Case::new("llama/tied_f32", Precision::F32)?;
    let c = case.decoder.config();
    let rope = c.rope(&c.rope_scaling).sequence(T)?;
    let rows = Rows::default();
    let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
    let x = case.decoder.embed(&case.tokens, 1)?;
    let targets: Vec<u32> = case.tokens[1..].iter().copied().chain([IGNORE]).collect();
    let nll = case.decoder.nll(&x, &targets, &with)?;
    let document = case.document(Pattern::Dense, true);
    assert_eq!(document.nll(), &nll[..T - 1]);
    let shape = DocumentShape { entries: T, precision: Precision::F32, hidden: true };
    assert_eq!(document.bytes(), shape.bytes(c) - 4);
    Ok(())
}

#[test]
fn nothing_replaced_costs_nothing() -> Result<()> {
    let case = Case::new("llama/tied_f32", Precision::F32)?;
    let document = case.document(Pattern::Dense, true);
    let at = 11;
    let row = Row {
        prefix: at,
        x: case.embed(&case.tokens[at..at + H]),
        mu: (at..at + H).map(|p| p as f64).collect(),
        sigma: vec![0.0; H],
        targets: case.tokens[at + 1..at + H + 1].to_vec(),
        teacher: (at..at + H).collect(),
    };
    let objective = Objective { nll: 0.0, kl: 1.0, weights: None };
    let got = case.continued(&document, &[row], objective, true);
    for (number, nll) in got.nll.iter().enumerate() {
        assert!((nll - document.nll()[at + number]).abs() < 1e-5);
    }
    assert!(largest(got.kl.unwrap().into_iter()) < 1e-6);
    assert!(largest(got.d.into_iter()) < 1e-5);
    Ok(())
}

#[test]
fn divergence_and_its_gradient_match_logits_and_differences() -> Result<()> {
    let case = Case::new("llama/tied_f32", Precision::F32)?;
    let document = case.document(Pattern::Dense, true);
    let weights: Vec<f32> = (0..H).map(|j| 0.5 + j as f32 * 0.1).collect();
    let objective = Objective { nll: 0.25, kl: 0.75, weights: Some(&weights) };
    let mut row = case.row(&[8]);
    let got = case.continued(&document, std::slice::from_ref(&row), objective, true);

    // The divergence from logits in f64.
    let c = case.decoder.config();
    let vocab = c.vocab_size;
    let logits = |x: Vec<f32>, mu: &[f64], sigma: &[f64]| -> Vec<f32> {
        let rope = case.tables(mu, sigma);
        let rows = Rows::default();
        let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
        let x = Tensor::from_vec(x, (1, mu.len(), case.width), &Device::Cpu).unwrap();
        case.decoder.logits(&x, &with).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    let log_p = |z: &[f32]| -> Vec<f64> {
        let most = z.iter().copied().fold(f32::MIN, f32::max) as f64;
        let sum: f64 = z.iter().map(|z| (f64::from(*z) - most).exp()).sum();
        z.iter().map(|z| f64::from(*z) - most - sum.ln()).collect()
    };
    let (mut mu, mut sigma): (Vec<f64>, Vec<f64>) = (0..T).map(|p| (p as f64, 0.0)).unzip();
    let full = logits(case.embed(&case.tokens), &mu, &sigma);
    (mu, sigma) = (0..8).map(|p| (p as f64, 0.0)).unzip();
    mu.extend(&row.mu);
    sigma.extend(&row.sigma);
    let replaced = logits([case.embed(&case.tokens[..8]), row.x.clone()].concat(), &mu, &sigma);
    for j in 0..H {
        let p = log_p(&full[row.teacher[j] * vocab..][..vocab]);
        let q = log_p(&replaced[(8 + j) * vocab..][..vocab]);
        let want: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
        let off = (f64::from(got.kl.as_ref().unwrap()[j]) - want).abs();
        assert!(off < 1e-5, "entry {j}: {off} from {want}");
    }

    // The gradient of both losses together, by differences of the objective.
    let value = |case: &Case, row: &Row| -> f64 {
        let got = case.continued(&document, std::slice::from_ref(row), objective, true);
        let kl = got.kl.unwrap();
        (0..H).map(|j| f64::from(weights[j]) * (0.25 * f64::from(got.nll[j]) + 0.75 * f64::from(kl[j]))).sum()
    };
    let size = largest(got.d.iter().copied());
    let step = 2e-2;
    for at in [0, 3, case.width + 1, 2 * case.width + 5] {
        let was = row.x[at];
        row.x[at] = was + step;
        let above = value(&case, &row);
        row.x[at] = was - step;
        let below = value(&case, &row);
        row.x[at] = was;
        let difference = ((above - below) / (2.0 * f64::from(step))) as f32;
        let off = (difference - got.d[at]).abs() / size;
        assert!(off < 1e-2, "value {at}: {difference} by differences, {} computed", got.d[at]);
    }
    Ok(())
}

#[test]
fn recomputation_gives_the_same_bits() -> Result<()> {
    let case = Case::new("families/gemma3_bf16", Precision::F32)?;
    let document = case.document(Pattern::Dense, false);
    let rows = [case.row(&[8]), case.row(&[4, 16])];
    let kept = case.continued(&document, &rows, HALF, false);
    let made_again = case.continued(&document, &rows, HALF, true);
    assert_eq!(kept.d, made_again.d);
    Ok(())
}

/// The error of running `rows`, changed by `change`.
fn refused(change: impl Fn(&mut Continuation, &mut Option<Objective>, &mut Case)) -> String {
    let mut case = Case::new("llama/tied_f32", Precision::F32).unwrap();
    let document = case.document(Pattern::Dense, false);
    let row = case.row(&[8]);
    let x = Tensor::from_vec(row.x.clone(), (1, row.mu.len(), case.width), &Device::Cpu).unwrap();
    let rope = case.tables(&row.mu, &row.sigma);
    let (prefix, mut objective) = ([row.prefix], Some(HALF));
    let mut rows = Continuation {
        prefix: &prefix,
        lengths: None,
        x_nre: &x,
        rope: &rope,
        targets: &row.targets,
        teacher: None,
    };
    change(&mut rows, &mut objective, &mut case);
    let mut buffers = Buffers::default();
    case.decoder.continue_document(&document, &rows, objective, true, &mut buffers).unwrap_err().to_string()
}

fn says(error: String, part: &str) {
    assert!(error.contains(part), "expected {part:?} in {error:?}");
}

#[test]
fn a_model_that_learns_is_refused() {
    let error = refused(|_, _, case| {
        case.decoder.params_mut().set_learning([Group::Norms]).unwrap();
    });
    says(error, "expected a frozen model, but its group norms learns");
}

#[test]
fn a_prefix_beyond_the_document_is_refused() {
    says(refused(|rows, _, _| rows.prefix = &[T + 1]), "expected a prefix of at most T = 40, got 41");
}

#[test]
fn prefixes_of_another_number_are_refused() {
    says(refused(|rows, _, _| rows.prefix = &[1, 2]), "expected 1 prefixes, got 2");
}

#[test]
fn targets_of_another_number_are_refused() {
    says(refused(|rows, _, _| rows.targets = &[1, 2]), "expected 7 targets, got 2");
}

#[test]
fn a_divergence_without_a_teacher_is_refused() {
    let error = refused(|_, objective, _| *objective = Some(Objective { kl: 1.0, ..HALF }));
    says(error, "expected the teacher's entries for a divergence, got none");
}

#[test]
fn a_divergence_from_a_document_without_hidden_states_is_refused() {
    says(refused(|rows, _, _| rows.teacher = Some(&[0; 7])), "expected one that keeps its hidden states");
}

#[test]
fn alibi_is_refused() {
    let mut case = Case::new("llama/tied_f32", Precision::F32).unwrap();
    let document = case.document(Pattern::Dense, false);
    let dir =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/llama/tied_f32");
    let mut config = DecoderConfig::from_dir(&dir).unwrap();
    config.positions.alibi = true;
    case.decoder = Decoder::from_weights(config, &Weights::open(&dir).unwrap(), Precision::F32, &[]).unwrap();
    let row = case.row(&[8]);
    let x_nre = Tensor::from_vec(row.x.clone(), (1, row.mu.len(), case.width), &Device::Cpu).unwrap();
    let rope = case.tables(&row.mu, &row.sigma);
    let rows = Continuation {
        prefix: &[8],
        lengths: None,
        x_nre: &x_nre,
        rope: &rope,
        targets: &row.targets,
        teacher: None,
    };
    let mut buffers = Buffers::default();
    let error = case.decoder.continue_document(&document, &rows, None, true, &mut buffers).unwrap_err();
    says(error.to_string(), "expected a model without ALiBi, got one with it");
}
