//! Products of slices against sums in f64: every storage, both kinds of products, all shapes the driver cuts differently.

use megacontext_kernels::gemm::{Mat, Products, matmul_with};
use megacontext_kernels::store::{Store, bf16};

use crate::support::numbers;

/// The largest |got − want| over the sum of the products' sizes, for out = 0.5·A·B (+ 1.5 when `accumulate`).
fn error<A: Store, B: Store, C: Store>([m, k, n]: [usize; 3], accumulate: bool, products: Products) -> f64 {
    let a: Vec<A> = numbers(m * k, 1).into_iter().map(A::put).collect();
    let b: Vec<B> = numbers(k * n, 2).into_iter().map(B::put).collect();
    let turned: Vec<B> = (0..k * n).map(|i| b[(i % k) * n + i / k]).collect();
    let mut worst = 0f64;
    for b_mat in [Mat::new(&b, k, n), Mat::new(&turned, n, k).t()] {
        let mut out = vec![C::put(1.5); m * n];
        matmul_with(&mut out, Mat::new(&a, m, k), b_mat, 0.5, accumulate, products);
        // Few rows and columns of a large product say as much as all.
        for i in (0..m).step_by((m / 7).max(1)) {
            for j in (0..n).step_by((n / 11).max(1)) {
                let terms = (0..k).map(|d| f64::from(a[i * k + d].get()) * f64::from(b[d * n + j].get()));
                let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
                let want = 0.5 * sum + if accumulate { 1.5 } else { 0.0 };
                worst = worst.max((f64::from(out[i * n + j].get()) - want).abs() / (size + 1.5));
            }
        }
    }
    worst
}

const SHAPES: [[usize; 3]; 7] =
    [[1, 1, 1], [1, 300, 70], [5, 33, 31], [97, 64, 32], [130, 577, 95], [20, 9000, 40], [200, 40, 700]];

#[test]
fn products_of_f32_are_close_to_sums_in_f64() {
    for shape in SHAPES {
        for accumulate in [false, true] {
            let got = error::<f32, f32, f32>(shape, accumulate, Products::F32);
            assert!(got < 1e-6, "{shape:?} accumulate {accumulate}: {got}");
            let got = error::<bf16, bf16, f32>(shape, accumulate, Products::F32);
            assert!(got < 1e-6, "{shape:?} bf16 operands, accumulate {accumulate}: {got}");
        }
    }
}

#[test]
fn operands_that_are_bf16_already_lose_nothing_in_bf16_products() {
    for shape in SHAPES {
        let got = error::<bf16, bf16, f32>(shape, true, Products::Bf16);
        assert!(got < 1e-6, "{shape:?}: {got}");
    }
}

#[test]
fn f32_operands_are_rounded_once_in_bf16_products() {
    for shape in SHAPES {
        let got = error::<f32, f32, f32>(shape, false, Products::Bf16);
        // Two operands, each off by at most 2⁻⁹ of itself.
        assert!(got < 2.1 / 512.0, "{shape:?}: {got}");
    }
}

#[test]
fn a_bf16_result_is_rounded_once_however_long_the_sum() {
    // Sums of equal terms: rounding between passes would stop them from growing.
    for products in [Products::F32, Products::Bf16] {
        for k in [100, 5000, 20_000] {
            let (a, b) = (vec![bf16::put(1.0); 3 * k], vec![bf16::put(1.0 / 1024.0); k * 2]);
            let mut out = vec![bf16::put(0.0); 6];
            matmul_with(&mut out, Mat::new(&a, 3, k), Mat::new(&b, k, 2), 1.0, true, products);
            assert_eq!(out, vec![bf16::put(k as f32 / 1024.0); 6], "{products:?} {k}");
        }
    }
}

#[test]
fn the_same_bytes_whatever_the_threads() {
    let (m, k, n) = (300, 700, 500);
    let (a, b) = (numbers(m * k, 3), numbers(k * n, 4));
    for products in [Products::F32, Products::Bf16] {
        let run = || {
            let mut out = vec![0f32; m * n];
            matmul_with(&mut out, Mat::new(&a, m, k), Mat::new(&b, k, n), 1.0, false, products);
            out
        };
        let first = run();
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            assert!(pool.install(run) == first, "{products:?} {threads} threads");
        }
    }
}
