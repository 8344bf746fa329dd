//! Each input that attention refuses, with what it says.

#![allow(clippy::unwrap_used)]

#[path = "attention/support.rs"]
#[allow(dead_code)]
mod support;

use candle_core::{DType, Device, Tensor};
use megacontext_kernels::attention::prefix::{Continuations, PrefixAttention};
use megacontext_kernels::attention::{Options, Pattern, Rows, attention, attention_with};
use megacontext_kernels::gemm::Products;
use support::random;

fn zeros(dims: &[usize]) -> Tensor {
    Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap()
}

/// The message for q, k, v shapes.
fn shapes(q: &[usize], k: &[usize], v: &[usize]) -> String {
    let refused = attention(&zeros(q), &zeros(k), &zeros(v), 1.0, Pattern::Dense, &Rows::default());
    refused.unwrap_err().to_string()
}

/// The message for a pattern and rows, with two rows of eight entries.
fn with(pattern: Pattern, rows: Rows) -> String {
    let x = random(&[2, 8, 2, 4], 1).unwrap();
    attention(&x, &x, &x, 1.0, pattern, &rows).unwrap_err().to_string()
}

/// The message for slopes, with two query heads.
fn slopes(slopes: &[f32]) -> String {
    let x = random(&[2, 8, 2, 4], 1).unwrap();
    let (pattern, rows) = (Pattern::Dense, Rows::default());
    let options = Options { scale: 1.0, pattern, rows: &rows, slopes: Some(slopes), products: Products::F32 };
    attention_with(&x, &x, &x, &options).unwrap_err().to_string()
}

/// The message for two rows of eight entries, two heads of width four, that continue a document of ten.
fn continued(pattern: Pattern, rows: Continuations) -> String {
    PrefixAttention::new([2, 8, 2, 1, 4], 10, 1.0, pattern, rows).unwrap_err().to_string()
}

fn prefixes(prefix: &[usize]) -> Continuations {
    Continuations { prefix: prefix.to_vec(), ..Continuations::default() }
}

fn lengths(lengths: &[usize]) -> String {
    with(Pattern::Dense, Rows { lengths: Some(lengths.to_vec()), segments: None })
}

fn segments(segments: &[&[usize]]) -> String {
    let segments = segments.iter().map(|starts| starts.to_vec()).collect();
    with(Pattern::Dense, Rows { lengths: None, segments: Some(segments) })
}

#[test]
fn q_of_another_rank() {
    let got = shapes(&[2, 8, 4], &[2, 8, 1, 4], &[2, 8, 1, 4]);
    assert_eq!(got, "attention: expected q_bthd of rank 4 [B, T, H, D], got [2, 8, 4]");
}

#[test]
fn k_of_another_batch() {
    let got = shapes(&[2, 8, 2, 4], &[1, 8, 1, 4], &[1, 8, 1, 4]);
    assert_eq!(got, "attention: expected k_btgd [2, 8, kv heads, 4], got [1, 8, 1, 4]");
}

#[test]
fn k_of_another_length() {
    let got = shapes(&[2, 8, 2, 4], &[2, 9, 1, 4], &[2, 9, 1, 4]);
    assert_eq!(got, "attention: expected k_btgd [2, 8, kv heads, 4], got [2, 9, 1, 4]");
}

#[test]
fn k_of_another_width() {
    let got = shapes(&[2, 8, 2, 4], &[2, 8, 1, 5], &[2, 8, 1, 5]);
    assert_eq!(got, "attention: expected k_btgd [2, 8, kv heads, 4], got [2, 8, 1, 5]");
}

#[test]
fn k_of_another_rank() {
    let got = shapes(&[2, 8, 2, 4], &[2, 8, 4], &[2, 8, 4]);
    assert_eq!(got, "attention: expected k_btgd [2, 8, kv heads, 4], got [2, 8, 4]");
}

#[test]
fn v_of_another_shape_than_k() {
    let got = shapes(&[2, 8, 2, 4], &[2, 8, 1, 4], &[2, 8, 2, 4]);
    assert_eq!(got, "attention: expected v_btgd [2, 8, 1, 4], got [2, 8, 2, 4]");
}

#[test]
fn query_heads_that_do_not_divide() {
    let got = shapes(&[2, 8, 3, 4], &[2, 8, 2, 4], &[2, 8, 2, 4]);
    assert!(got.ends_with("got 3 query heads and 2 kv heads"), "{got}");
}

#[test]
fn no_query_heads() {
    let got = shapes(&[2, 8, 0, 4], &[2, 8, 1, 4], &[2, 8, 1, 4]);
    assert!(got.ends_with("got 0 query heads and 1 kv heads"), "{got}");
}

#[test]
fn no_kv_heads() {
    let got = shapes(&[2, 8, 2, 4], &[2, 8, 0, 4], &[2, 8, 0, 4]);
    assert!(got.ends_with("got 2 query heads and 0 kv heads"), "{got}");
}

#[test]
fn a_head_width_of_zero() {
    let got = shapes(&[2, 8, 2, 0], &[2, 8, 2, 0], &[2, 8, 2, 0]);
    assert_eq!(got, "attention: expected a head width of 1 to 256, got 0");
}

#[test]
fn a_head_width_above_256() {
    let got = shapes(&[1, 1, 1, 257], &[1, 1, 1, 257], &[1, 1, 1, 257]);
    assert_eq!(got, "attention: expected a head width of 1 to 256, got 257");
}

#[test]
fn operands_that_are_not_f32() {
    let x = zeros(&[1, 2, 1, 4]);
    let half = x.to_dtype(DType::F16).unwrap();
    let got = attention(&x, &half, &x, 1.0, Pattern::Dense, &Rows::default()).unwrap_err().to_string();
    assert_eq!(got, "attention: expected k as f32 on the CPU, got F16 on Cpu");
}

#[test]
fn a_group_of_zero() {
    let got = with(Pattern::ShiftedSparse { group: 0 }, Rows::default());
    assert_eq!(got, "attention: expected a group of at least 2 entries, got 0");
}

#[test]
fn a_group_of_one() {
    for pattern in [Pattern::ShiftedSparse { group: 1 }, Pattern::ShiftedBidirectional { group: 1 }] {
        let got = with(pattern, Rows::default());
        assert_eq!(got, "attention: expected a group of at least 2 entries, got 1");
    }
}

#[test]
fn too_few_lengths() {
    assert_eq!(lengths(&[8]), "attention: expected 2 row lengths, got 1");
}

#[test]
fn too_many_lengths() {
    assert_eq!(lengths(&[8, 8, 8]), "attention: expected 2 row lengths, got 3");
}

#[test]
fn a_length_beyond_t() {
    assert_eq!(lengths(&[8, 9]), "attention: row 1: expected a length of at most T = 8, got 9");
}

#[test]
fn segments_of_another_batch() {
    assert_eq!(segments(&[&[0]]), "attention: expected segments for 2 rows, got 1");
}

#[test]
fn no_segments() {
    assert_eq!(
        segments(&[&[0], &[]]),
        "attention: row 1: expected the first segment to start at 0, got none"
    );
}

#[test]
fn segments_that_do_not_start_at_zero() {
    assert_eq!(
        segments(&[&[1, 4], &[0]]),
        "attention: row 0: expected the first segment to start at 0, got 1"
    );
}

#[test]
fn segments_that_do_not_ascend() {
    let got = segments(&[&[0, 4, 4], &[0]]);
    assert_eq!(got, "attention: row 0: expected ascending segment starts, got 4 after 4");
}

#[test]
fn segments_that_fall() {
    let got = segments(&[&[0], &[0, 5, 3]]);
    assert_eq!(got, "attention: row 1: expected ascending segment starts, got 3 after 5");
}

#[test]
fn a_segment_beyond_t() {
    let got = segments(&[&[0, 8], &[0]]);
    assert_eq!(got, "attention: row 0: expected segment starts below T = 8, got 8");
}

#[test]
fn a_window_of_zero() {
    let got = with(Pattern::SlidingWindow { window: 0 }, Rows::default());
    assert_eq!(got, "attention: expected a window of at least 1 entry, got 0");
}

#[test]
fn k_of_f32_beside_q_of_bf16() {
    let x = zeros(&[1, 2, 1, 4]);
    let half = x.to_dtype(DType::BF16).unwrap();
    let got = attention(&half, &x, &half, 1.0, Pattern::Dense, &Rows::default()).unwrap_err().to_string();
    assert_eq!(got, "attention: expected k as bf16 on the CPU, got F32 on Cpu");
}

#[test]
fn v_of_bf16_beside_q_of_f32() {
    let x = zeros(&[1, 2, 1, 4]);
    let half = x.to_dtype(DType::BF16).unwrap();
    let got = attention(&x, &x, &half, 1.0, Pattern::Dense, &Rows::default()).unwrap_err().to_string();
    assert_eq!(got, "attention: expected v as f32 on the CPU, got BF16 on Cpu");
}

#[test]
fn too_few_slopes() {
    assert_eq!(slopes(&[0.5]), "attention: expected 2 slopes, one per query head, got 1");
}

#[test]
fn too_many_slopes() {
    assert_eq!(slopes(&[0.5, 0.25, 0.1]), "attention: expected 2 slopes, one per query head, got 3");
}

#[test]
fn a_slope_of_nan() {
    assert_eq!(slopes(&[0.5, f32::NAN]), "attention: expected finite slopes, got [0.5, NaN]");
}

#[test]
fn an_infinite_slope() {
    assert_eq!(slopes(&[f32::INFINITY, 0.5]), "attention: expected finite slopes, got [inf, 0.5]");
}

#[test]
fn too_few_prefixes() {
    assert_eq!(continued(Pattern::Dense, prefixes(&[3])), "attention: expected 2 prefixes, got 1");
}

#[test]
fn too_many_prefixes() {
    assert_eq!(continued(Pattern::Dense, prefixes(&[3, 4, 5])), "attention: expected 2 prefixes, got 3");
}

#[test]
fn a_prefix_beyond_the_document() {
    assert_eq!(
        continued(Pattern::Dense, prefixes(&[10, 11])),
        "attention: row 1: expected a prefix of at most T = 10, got 11"
    );
}

#[test]
fn a_lower_bound_beyond_the_prefix() {
    let rows = Continuations { lower: Some(vec![4, 0]), ..prefixes(&[3, 3]) };
    assert_eq!(
        continued(Pattern::Dense, rows),
        "attention: row 0: expected a lower bound of at most its prefix 3, got 4"
    );
}

#[test]
fn too_few_lower_bounds() {
    let rows = Continuations { lower: Some(vec![0]), ..prefixes(&[3, 3]) };
    assert_eq!(continued(Pattern::Dense, rows), "attention: expected 2 lower bounds, got 1");
}

#[test]
fn a_continuation_longer_than_its_row() {
    let rows = Continuations { lengths: Some(vec![8, 9]), ..prefixes(&[3, 3]) };
    assert_eq!(
        continued(Pattern::Dense, rows),
        "attention: row 1: expected a length of at most R = 8, got 9"
    );
}

#[test]
fn too_many_lengths_of_continuations() {
    let rows = Continuations { lengths: Some(vec![8, 8, 8]), ..prefixes(&[3, 3]) };
    assert_eq!(continued(Pattern::Dense, rows), "attention: expected 2 row lengths, got 3");
}

#[test]
fn continuations_of_a_bidirectional_pattern() {
    assert_eq!(
        continued(Pattern::Bidirectional, prefixes(&[3, 3])),
        "attention: expected a causal pattern for rows that continue a document, got bidirectional"
    );
}

#[test]
fn continuations_of_a_group_of_one() {
    assert_eq!(
        continued(Pattern::ShiftedSparse { group: 1 }, prefixes(&[3, 3])),
        "attention: expected a group of at least 2 entries, got 1"
    );
}

#[test]
fn continuations_of_query_heads_that_do_not_divide() {
    let got = PrefixAttention::new([1, 8, 3, 2, 4], 10, 1.0, Pattern::Dense, prefixes(&[3]));
    let got = got.unwrap_err().to_string();
    assert!(got.ends_with("got 3 query heads and 2 kv heads"), "{got}");
}

#[test]
fn continuations_of_a_head_width_above_256() {
    let got = PrefixAttention::new([1, 8, 1, 1, 257], 10, 1.0, Pattern::Dense, prefixes(&[3]));
    assert_eq!(got.unwrap_err().to_string(), "attention: expected a head width of 1 to 256, got 257");
}

#[test]
fn slopes_of_continuations_for_other_heads() {
    let prepared = PrefixAttention::new([1, 8, 2, 1, 4], 10, 1.0, Pattern::Dense, prefixes(&[3])).unwrap();
    let got = prepared.with_slopes(&[1.0]).unwrap_err().to_string();
    assert_eq!(got, "attention: expected 2 slopes, one per query head, got 1");
}
