//! Each input that attention refuses, with what it says.

#![allow(clippy::unwrap_used)]

#[path = "attention/support.rs"]
#[allow(dead_code)]
mod support;

use candle_core::{DType, Device, Tensor};
use megacontext_kernels::attention::{Pattern, Rows, attention};
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
    let got = with(Pattern::ShiftedSparse { group: 1 }, Rows::default());
    assert_eq!(got, "attention: expected a group of at least 2 entries, got 1");
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
