//! ΔNLL@H of rows against two plain passes over the whole contexts, as it is defined.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use anyhow::Result;
use common::plain::{Plain, Stands};
use common::{decoder, tokens};
use gistnet_adapter::delta_nll::{DeltaNll, Passage, Rows, Span, StandIn, Substitution, check_group};
use megacontext_base::buffers::Buffers;
use megacontext_base::decoder::Decoder;
use megacontext_base::random::Random;
use megacontext_base::rope::{SigmaPreset, SigmaRule};
use megacontext_kernels::attention::Pattern;

const T: usize = 60;
const K: usize = 4;
const H: usize = 6;
const RULE: SigmaRule = SigmaRule { preset: SigmaPreset::Document, block: K, uniform: false };

fn span(start: usize, lod: u32) -> Span {
    Span { start, lod }
}

/// Rows of one block, of several, of the second level, of both, at the document's beginning and before its end.
fn replaced() -> Vec<Vec<Span>> {
    vec![
        vec![span(8, 1)],
        vec![span(0, 1)],
        vec![span(48, 1)],
        vec![span(4, 1), span(12, 1), span(16, 1)],
        vec![span(16, 2)],
        vec![span(16, 2), span(36, 1)],
    ]
}

fn vectors(count: usize, width: usize) -> Vec<f32> {
    let mut random = Random::named(5, "what stands for spans");
    (0..count * width).map(|_| random.normal() as f32 * 0.4).collect()
}

fn largest(values: impl Iterator<Item = f32>) -> f32 {
    values.fold(0.0, |most, value| most.max(value.abs()))
}

fn compare(name: &str, pattern: Pattern, rule: SigmaRule) -> Result<()> {
    let decoder = decoder(name);
    let tokens = tokens(&decoder, T);
    let width = decoder.config().hidden_size;
    let c = decoder.config();
    let delta = DeltaNll::new(&decoder, &c.rope_scaling, rule, pattern, H)?;
    let plain = Plain { decoder: &decoder, tokens: &tokens, rule, pattern, horizon: H };
    let mut buffers = Buffers::default();
    let passage = delta.run(&tokens, false, &mut buffers)?;
    let replaced = replaced();
    let mut rows = delta.rows(&passage, &replaced, StandIn::Entry)?;
    let gists = vectors(rows.slots().len(), width);
    rows.fill(&gists)?;
    let objective = Substitution { nll: 0.5 * replaced.len() as f64, kl: 0.0, weights: None };
    let got = delta.measure(&passage, &rows, Some(&objective), &mut buffers)?;
    let (d, mut slot) = (got.d_slots.unwrap(), 0);
    let deleted: Vec<Vec<Span>> = replaced.iter().filter(|spans| spans[0].start > 0).cloned().collect();
    let without = delta.rows(&passage, &deleted, StandIn::Nothing)?;
    let without = delta.measure(&passage, &without, None, &mut buffers)?;
    let mut deleted = without.rows.iter();
    for (spans, row) in replaced.iter().zip(&got.rows) {
        let end = spans.last().map(|s| s.start + K.pow(s.lod)).unwrap();
        let own = &gists[slot * width..][..spans.len() * width];
        let (nll, d_own) = plain.replaced(spans, Stands::Vectors(own));
        let before = plain.full(end);
        let what = format!("{name} {pattern:?} {spans:?}");
        assert!(largest(row.replaced.iter().zip(&nll).map(|(a, b)| a - b)) < 1e-5, "{what}: replaced");
        assert!(largest(row.full.iter().zip(&before).map(|(a, b)| a - b)) < 1e-5, "{what}: full");
        let d = &d[slot * width..][..d_own.len()];
        let off = largest(d.iter().zip(&d_own).map(|(a, b)| a - b)) / largest(d_own.iter().copied());
        assert!(off < 1e-4, "{what}: gradients differ by {off} of the largest");
        slot += spans.len();
        if spans[0].start > 0 {
            let (nll, _) = plain.replaced(spans, Stands::Nothing);
            let row = deleted.next().unwrap();
            assert!(largest(row.replaced.iter().zip(&nll).map(|(a, b)| a - b)) < 1e-5, "{what}: deleted");
        }
    }
    Ok(())
}

#[test]
fn rows_give_the_two_pass_loss_and_its_gradient() -> Result<()> {
    for name in ["llama/tied_f32", "families/mistral_window_bf16", "families/nanochat_bf16"] {
        for pattern in
            [Pattern::Dense, Pattern::ShiftedSparse { group: 14 }, Pattern::ShiftedSparse { group: 32 }]
        {
            compare(name, pattern, RULE)?;
        }
    }
    Ok(())
}

#[test]
fn rows_give_the_two_pass_loss_with_the_original_places() -> Result<()> {
    let rule = SigmaRule { preset: SigmaPreset::Original, ..RULE };
    compare("llama/tied_f32", Pattern::Dense, rule)
}

fn setting(decoder: &Decoder) -> DeltaNll<'_> {
    DeltaNll::new(decoder, &decoder.config().rope_scaling, RULE, Pattern::Dense, H).unwrap()
}

fn passage(delta: &DeltaNll, decoder: &Decoder) -> Passage {
    delta.run(&tokens(decoder, T), false, &mut Buffers::default()).unwrap()
}

#[test]
fn a_spans_own_tokens_cost_nothing() -> Result<()> {
    let decoder = decoder("llama/tied_f32");
    let delta = setting(&decoder);
    let passage = passage(&delta, &decoder);
    let spans = [vec![span(8, 1)], vec![span(4, 1), span(20, 1)], vec![span(16, 2)]];
    let mut buffers = Buffers::default();
    let rows = delta.rows(&passage, &spans[..2], StandIn::LastTokens(K))?;
    let got = delta.measure(&passage, &rows, None, &mut buffers)?;
    assert!(got.delta().abs() < 1e-5, "{}", got.delta());
    let rows = delta.rows(&passage, &spans[2..], StandIn::LastTokens(K * K))?;
    assert!(delta.measure(&passage, &rows, None, &mut buffers)?.delta().abs() < 1e-5);
    Ok(())
}

#[test]
fn many_rows_give_what_each_gives_alone() -> Result<()> {
    let decoder = decoder("llama/tied_f32");
    let delta = setting(&decoder);
    let tokens = tokens(&decoder, 600);
    let mut buffers = Buffers::default();
    let passage = delta.run(&tokens, true, &mut buffers)?;
    // Far more entries than run at a time.
    let spans: Vec<Vec<Span>> = (1..140).map(|at| vec![span(at * K, 1)]).collect();
    let width = decoder.config().hidden_size;
    let gists = vectors(spans.len(), width);
    let weights: Vec<f32> = (0..H).map(|j| 0.5 + 0.2 * j as f32).collect();
    let objective =
        |n: usize| Substitution { nll: 0.7 * n as f64, kl: 0.3 * n as f64, weights: Some(weights.clone()) };
    let mut rows = delta.rows(&passage, &spans, StandIn::Entry)?;
    rows.fill(&gists)?;
    let all = delta.measure(&passage, &rows, Some(&objective(spans.len())), &mut buffers)?;
    let d = all.d_slots.unwrap();
    for at in [0, 70, 138] {
        let mut row = delta.rows(&passage, &spans[at..at + 1], StandIn::Entry)?;
        row.fill(&gists[at * width..][..width])?;
        let one = delta.measure(&passage, &row, Some(&objective(1)), &mut buffers)?;
        assert!(largest(all.rows[at].replaced.iter().zip(&one.rows[0].replaced).map(|(a, b)| a - b)) < 1e-5);
        let own = one.d_slots.unwrap();
        let off = largest(d[at * width..].iter().zip(&own).map(|(a, b)| a - b)) / largest(own.into_iter());
        assert!(off < 1e-4, "row {at}: gradients differ by {off} of the largest");
    }
    Ok(())
}

#[test]
fn means_are_means_of_embeddings() -> Result<()> {
    let decoder = decoder("llama/tied_f32");
    let delta = setting(&decoder);
    let passage = passage(&delta, &decoder);
    let rows = delta.rows(&passage, &[vec![span(8, 1)], vec![span(16, 2)]], StandIn::Entry)?;
    let means = rows.means(&passage, K);
    let width = decoder.config().hidden_size;
    let x = decoder.embed(passage.document.tokens(), 1)?.squeeze(0)?;
    for (number, (start, count)) in [(8, K), (16, K * K)].into_iter().enumerate() {
        let want: Vec<f32> = x.narrow(0, start, count)?.mean(0)?.to_vec1()?;
        assert!(largest(means[number * width..].iter().zip(&want).map(|(a, b)| a - b)) < 1e-6);
    }
    Ok(())
}

fn refused_rows(spans: Vec<Span>, stand_in: StandIn) -> String {
    let decoder = decoder("llama/tied_f32");
    let delta = setting(&decoder);
    let passage = passage(&delta, &decoder);
    delta.rows(&passage, &[spans], stand_in).err().unwrap().to_string()
}

fn says(error: String, part: &str) {
    assert!(error.contains(part), "expected {part:?} in {error:?}");
}

#[test]
fn a_span_that_is_not_aligned_is_refused() {
    says(refused_rows(vec![span(6, 1)], StandIn::Entry), "a multiple of 4, got 6");
}

#[test]
fn spans_that_overlap_are_refused() {
    says(
        refused_rows(vec![span(16, 2), span(28, 1)], StandIn::Entry),
        "got one at 28 after one that ends at 32",
    );
}

#[test]
fn a_span_of_level_0_is_refused() {
    says(refused_rows(vec![span(8, 0)], StandIn::Entry), "expected a level of at least 1, got 0");
}

#[test]
fn a_horizon_past_the_end_is_refused() {
    says(
        refused_rows(vec![span(52, 1)], StandIn::Entry),
        "expected a horizon of 6 tokens behind the span that ends at 56",
    );
}

#[test]
fn a_row_without_spans_is_refused() {
    says(refused_rows(vec![], StandIn::Entry), "expected at least one span in every row, got none");
}

#[test]
fn nothing_for_the_first_block_is_refused() {
    says(refused_rows(vec![span(0, 1)], StandIn::Nothing), "got the span at 0");
}

#[test]
fn more_tokens_than_a_span_has_are_refused() {
    says(
        refused_rows(vec![span(8, 1)], StandIn::LastTokens(5)),
        "expected at most the 4 tokens of a span, got 5",
    );
}

#[test]
fn a_document_shorter_than_a_block_and_its_horizon_is_refused() {
    let decoder = decoder("llama/tied_f32");
    let delta = setting(&decoder);
    let error = delta.run(&tokens(&decoder, 9), false, &mut Buffers::default()).err().unwrap();
    says(
        error.to_string(),
        "expected a document of at least 10 tokens (a block of 4 and a horizon of 6), got 9",
    );
}

#[test]
fn a_group_that_could_hide_the_span_is_refused() {
    let error = check_group(Pattern::ShiftedSparse { group: 129 }, 64).unwrap_err().to_string();
    says(error, "expected a group of at least 2·(H + 1) = 130 for H = 64, got 129");
    check_group(Pattern::ShiftedSparse { group: 130 }, 64).unwrap();
}

fn refused_fill(change: impl Fn(&mut Vec<f32>)) -> String {
    let decoder = decoder("llama/tied_f32");
    let delta = setting(&decoder);
    let passage = passage(&delta, &decoder);
    let mut rows: Rows = delta.rows(&passage, &[vec![span(8, 1)]], StandIn::Entry).unwrap();
    let mut gists = vectors(1, decoder.config().hidden_size);
    change(&mut gists);
    rows.fill(&gists).unwrap_err().to_string()
}

#[test]
fn nan_gists_are_refused() {
    says(refused_fill(|gists| gists[3] = f32::NAN), "expected finite gists, got NaN in gist 0");
}

#[test]
fn gists_of_another_number_are_refused() {
    says(refused_fill(|gists| gists.truncate(5)), "got 5 values");
}

#[test]
fn weights_of_another_horizon_are_refused() {
    let decoder = decoder("llama/tied_f32");
    let delta = setting(&decoder);
    let passage = passage(&delta, &decoder);
    let rows = delta.rows(&passage, &[vec![span(8, 1)]], StandIn::LastTokens(1)).unwrap();
    let objective = Substitution { weights: Some(vec![1.0; 3]), ..Substitution::default() };
    let error = delta.measure(&passage, &rows, Some(&objective), &mut Buffers::default()).unwrap_err();
    says(error.to_string(), "expected weights of 6 positions, got 3");
}
