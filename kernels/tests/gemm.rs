//! Matrix products against sums in f64: every storage, both kinds of products, operands lying either way, sizes on both
//! sides of every cut that the packed products make.

#[path = "attention/support.rs"]
#[allow(dead_code)]
mod support;

use megacontext_kernels::gemm::{Mat, Products, matmul_with};
use megacontext_kernels::store::{Store, bf16};
use support::{BOTH, stored, values};

fn turned<S: Copy>(values: &[S], rows: usize, cols: usize) -> Vec<S> {
    (0..rows * cols).map(|i| values[(i % rows) * cols + i / rows]).collect()
}

/// `out` = scale·a·b (+ out) for both operands lying both ways, at sampled places where there are many.
fn check<A: Store, B: Store, C: Store>([m, k, n]: [usize; 3], products: Products, accumulate: bool) {
    const SCALE: f32 = 0.75;
    let (a, b) = (stored::<A>(&values(m * k, 1)), stored::<B>(&values(k * n, 2)));
    let before = stored::<C>(&values(m * n, 3));
    let (a_turned, b_turned) = (turned(&a, m, k), turned(&b, k, n));
    // Roundings of the operands (each 2⁻⁹, of either sign) in k terms of size at most 1; of sums in f32; of the result.
    let operands = if products == Products::Bf16 { 2f64.powi(-8) * (k as f64).sqrt() } else { 0.0 };
    let sums = 1e-6 + 1e-7 * k as f64;
    for turn in 0..4 {
        let a_mat = if turn % 2 == 0 { Mat::new(&a, m, k) } else { Mat::new(&a_turned, k, m).t() };
        let b_mat = if turn < 2 { Mat::new(&b, k, n) } else { Mat::new(&b_turned, n, k).t() };
        let mut out = before.clone();
        matmul_with(&mut out, a_mat, b_mat, SCALE, accumulate, products);
        for at in (0..m * n).step_by(1 + m * n * k / 500_000) {
            let (row, col) = (at / n, at % n);
            let product: f64 =
                (0..k).map(|i| f64::from(a[row * k + i].get()) * f64::from(b[i * n + col].get())).sum();
            let old = if accumulate { f64::from(before[at].get()) } else { 0.0 };
            let want = f64::from(SCALE) * product + old;
            let result = if C::EXACT { 0.0 } else { 2f64.powi(-8) * want.abs() };
            let got = f64::from(out[at].get());
            assert!(
                (got - want).abs() <= operands + sums + result,
                "{m}x{k}x{n} {:?}·{:?} to {:?} {products:?} turn {turn} accumulate {accumulate}: ({row}, {col}): \
                 expected {want}, got {got}",
                A::DTYPE,
                B::DTYPE,
                C::DTYPE
            );
        }
    }
}

fn check_all(sizes: [usize; 3]) {
    for products in BOTH {
        for accumulate in [false, true] {
            check::<f32, f32, f32>(sizes, products, accumulate);
            check::<bf16, f32, f32>(sizes, products, accumulate);
            check::<f32, bf16, f32>(sizes, products, accumulate);
            check::<f32, bf16, bf16>(sizes, products, accumulate);
            check::<bf16, bf16, bf16>(sizes, products, accumulate);
        }
    }
}

#[test]
fn products_match_f64_at_odd_sizes() {
    for m in [1, 2, 12, 13, 16, 17, 31, 33] {
        for (k, n) in [(1, 1), (2, 3), (7, 17), (16, 32), (31, 33), (33, 15), (64, 65), (100, 96)] {
            check_all([m, k, n]);
        }
    }
}

#[test]
fn products_match_f64_across_cuts_of_rows_and_depth() {
    // Rows of a task: 96. Words of depth at once: 192 and 2048, of one value or two.
    for sizes in [
        [95, 191, 40],
        [96, 192, 64],
        [97, 193, 33],
        [193, 385, 31],
        [20, 2047, 37],
        [33, 2049, 40],
        [17, 4097, 33],
    ] {
        check_all(sizes);
    }
}

#[test]
fn products_match_f64_across_slabs_of_columns() {
    // A slab of packed columns holds about a million words.
    check_all([3, 2048, 1100]);
}

#[test]
fn a_bf16_result_is_rounded_once_however_long_the_sum() {
    // Sums of equal terms: rounding between passes would stop them from growing.
    for products in BOTH {
        for k in [100, 5000, 20_000] {
            let (a, b) = (vec![bf16::put(1.0); 3 * k], vec![bf16::put(1.0 / 1024.0); k * 2]);
            let mut out = vec![bf16::put(0.0); 6];
            matmul_with(&mut out, Mat::new(&a, 3, k), Mat::new(&b, k, 2), 1.0, true, products);
            assert_eq!(out, vec![bf16::put(k as f32 / 1024.0); 6], "{products:?} {k}");
        }
    }
}

#[test]
fn products_of_nothing() {
    for products in BOTH {
        let one = [1f32; 4];
        let mut out = [5f32; 4];
        matmul_with(&mut out, Mat::new(&one, 2, 0), Mat::new(&one, 0, 2), 1.0, true, products);
        assert_eq!(out, [5.0; 4], "nothing is added");
        matmul_with(&mut out, Mat::new(&one, 0, 2), Mat::new(&one, 2, 2), 1.0, false, products);
        assert_eq!(out, [5.0; 4], "no rows are written");
        matmul_with(&mut out, Mat::new(&one, 2, 0), Mat::new(&one, 0, 2), 1.0, false, products);
        assert_eq!(out, [0.0; 4], "a sum of nothing is zero");
    }
}

#[test]
fn nan_and_infinity_stay_in_their_row_and_column() {
    let (m, k, n) = (40, 70, 50);
    for products in BOTH {
        for value in [f32::NAN, f32::INFINITY] {
            let (mut a, mut b) = (values(m * k, 1), values(k * n, 2));
            a[13 * k + 69] = value;
            b[3 * n + 33] = value;
            let mut out = vec![0f32; m * n];
            matmul_with(&mut out, Mat::new(&a, m, k), Mat::new(&b, k, n), 1.0, false, products);
            for (at, x) in out.iter().enumerate() {
                let reached = at / n == 13 || at % n == 33;
                assert_eq!(x.is_finite(), !reached, "{products:?} {value} at {}, {}", at / n, at % n);
            }
        }
    }
}

#[test]
fn the_same_bytes_whatever_the_threads() -> anyhow::Result<()> {
    let (m, k, n) = (150, 700, 130);
    let (a, b) = (stored::<bf16>(&values(m * k, 1)), values(k * n, 2));
    for products in BOTH {
        let run = || {
            let mut out = vec![0f32; m * n];
            matmul_with(&mut out, Mat::new(&a, m, k), Mat::new(&b, k, n), 1.0, false, products);
            out
        };
        let first = run();
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            assert!(pool.install(run) == first, "{threads} threads, {products:?}");
        }
    }
    Ok(())
}
