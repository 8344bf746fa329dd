//! Biases, sums, and heads that lie together.

use megacontext_kernels::linear::Weight;
use megacontext_kernels::rows;

use crate::support::*;

const WIDTH: usize = 37;
const ROWS: usize = 1100;

#[test]
fn a_bias_reaches_every_row() {
    let (bias, y) = (numbers(WIDTH, 1), numbers(ROWS * WIDTH, 2));
    let mut filled = vec![0f32; y.len()];
    rows::fill(Weight::F32(&bias), &mut filled);
    let mut added = y.clone();
    rows::add_bias(Weight::F32(&bias), &mut added);
    for i in 0..y.len() {
        assert_eq!(filled[i], bias[i % WIDTH]);
        assert_eq!(added[i], y[i] + bias[i % WIDTH]);
    }
}

#[test]
fn a_bias_in_bf16_is_the_same_values() {
    let bias = rounded(&numbers(WIDTH, 1));
    let (wide, y) = (narrow(&bias), rounded(&numbers(ROWS * WIDTH, 2)));
    let (mut a, mut b) = (y.clone(), y);
    rows::add_bias(Weight::F32(&wide), &mut a);
    rows::add_bias(Weight::Bf16(&bias), &mut b);
    assert_eq!(a, b);
    rows::fill(Weight::F32(&wide), &mut a);
    rows::fill(Weight::Bf16(&bias), &mut b);
    assert_eq!(a, b);
}

#[test]
fn sums_over_rows_are_added() {
    let g = numbers(ROWS * WIDTH, 3);
    let mut sum = vec![1f32; WIDTH];
    rows::sum_rows(&g, &mut sum);
    let want: Vec<f64> =
        (0..WIDTH).map(|o| 1.0 + (0..ROWS).map(|r| f64::from(g[r * WIDTH + o])).sum::<f64>()).collect();
    close(&sum, &want, 1e-5, "sum");
    let half = rounded(&g);
    let (mut wide, mut narrowed) = (vec![0f32; WIDTH], vec![0f32; WIDTH]);
    rows::sum_rows(&narrow(&half), &mut wide);
    rows::sum_rows(&half, &mut narrowed);
    assert_eq!(wide, narrowed);
}

#[test]
fn streams_add_and_scale() {
    let (x, y) = (numbers(40_000, 1), numbers(40_000, 2));
    let mut sum = y.clone();
    rows::add_assign(&x, &mut sum);
    let mut scaled = x.clone();
    rows::scale(&mut scaled, 2.5);
    assert!((0..x.len()).all(|i| sum[i] == x[i] + y[i] && scaled[i] == 2.5 * x[i]));
}

#[test]
fn heads_come_apart_and_together() {
    let (n, heads, width) = (700, 3, 8);
    let fused = numbers(n * heads * 3 * width, 4);
    let mut parts = vec![vec![0f32; n * heads * width]; 3];
    let [q, k, v] = &mut parts[..] else { panic!("three parts") };
    rows::split_heads(&fused, width, heads, [q, k, v]);
    for (which, part) in parts.iter().enumerate() {
        for (at, value) in part.iter().enumerate() {
            let (entry_head, d) = (at / width, at % width);
            assert_eq!(*value, fused[(entry_head * 3 + which) * width + d]);
        }
    }
    let mut again = vec![0f32; fused.len()];
    rows::join_heads([&parts[0], &parts[1], &parts[2]], width, heads, &mut again);
    assert_eq!(again, fused);
}
