//! Times the products of [`megacontext_kernels::skinny`] beside the general ones: milliseconds, minimum of several runs.
//!
//! `cargo run --release -p megacontext-kernels --example skinny`

use std::time::Instant;

use megacontext_kernels::gemm::{Mat, matmul};
use megacontext_kernels::skinny;
use megacontext_kernels::store::{Store, bf16};

fn least(mut f: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..15 {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64() * 1e3);
    }
    best
}

fn main() {
    println!(
        "     n     I   r |  down:  gemm  skinny  bf16 |  up:  gemm  skinny  bf16 |  outer:  gemm  skinny  bf16"
    );
    for n in [2048, 8192] {
        for width in [576, 1536] {
            for rank in [8, 16, 64] {
                let x: Vec<f32> = (0..n * width).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
                let m: Vec<f32> = (0..rank * width).map(|i| (i % 13) as f32 / 130.0).collect();
                let xb: Vec<bf16> = x.iter().map(|v| bf16::put(*v)).collect();
                let mut low = vec![0.1f32; n * rank];
                let (mut y, mut yb) = (x.clone(), xb.clone());
                let mut out = vec![0f32; rank * width];
                let (x_mat, m_mat) = (Mat::new(&x, n, width), Mat::new(&m, rank, width));
                let times = [
                    least(|| matmul(&mut low, x_mat, m_mat.t(), 0.5, false)),
                    least(|| skinny::down(&x, m_mat, 0.5, None, &mut low)),
                    least(|| skinny::down(&xb, m_mat, 0.5, None, &mut low)),
                    least(|| matmul(&mut y, Mat::new(&low, n, rank), m_mat, 0.5, true)),
                    least(|| skinny::up_add(&low, m_mat, None, &mut y)),
                    least(|| skinny::up_add(&low, m_mat, None, &mut yb)),
                    least(|| matmul(&mut out, Mat::new(&low, n, rank).t(), x_mat, 1.0, true)),
                    least(|| skinny::outer_add(&low, rank, &x, width, None, &mut out, false)),
                    least(|| skinny::outer_add(&low, rank, &xb, width, None, &mut out, false)),
                ];
                print!("{n:6} {width:5} {rank:3} |");
                for three in times.chunks(3) {
                    print!(" {:8.3} {:8.3} {:8.3}  |", three[0], three[1], three[2]);
                }
                println!();
            }
        }
    }
}
