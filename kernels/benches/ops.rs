//! Products and the operations around them: `cargo bench -p megacontext-kernels --bench ops`.
//!
//! Sizes of a step of SmolLM2-135M at 2048 tokens. Throughput of products is multiply-adds, elsewhere values.

use std::hint::black_box;

use candle_core::{Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use megacontext_kernels::gemm::{Mat, matmul_with};
use megacontext_kernels::linear::Weight;
use megacontext_kernels::loss::{Gradient, head_cross_entropy};
use megacontext_kernels::precision::Precision;
use megacontext_kernels::{adamw, norm};

mod support;
use support::random;

const TOKENS: usize = 2048;
const WIDTH: usize = 576;

fn gemm(c: &mut Criterion) {
    let mut group = c.benchmark_group("gemm");
    group.sample_size(20);
    // Large; down the MLP; LoRA down and up.
    for [m, k, n] in [[1024, 1024, 1024], [TOKENS, 1536, WIDTH], [TOKENS, WIDTH, 8], [TOKENS, 8, WIDTH]] {
        let (a, b) = (random(1, m * k), random(2, k * n));
        let mut out = vec![0f32; m * n];
        group.throughput(Throughput::Elements((m * k * n) as u64));
        for precision in [Precision::F32, Precision::Mixed] {
            group.bench_function(BenchmarkId::new(precision.name(), format!("{m}x{k}x{n}")), |bench| {
                bench.iter(|| {
                    let (a, b) = (Mat::new(black_box(&a), m, k), Mat::new(&b, k, n));
                    matmul_with(&mut out, a, b, 1.0, false, precision.products());
                });
            });
        }
    }
    group.finish();
}

fn norms(c: &mut Criterion) {
    let (x, g) = (random(1, TOKENS * WIDTH), random(2, TOKENS * WIDTH));
    let gain = random(3, WIDTH);
    let (mut out, mut dx, mut dw) = (vec![0f32; x.len()], vec![0f32; x.len()], vec![0f32; WIDTH]);
    let mut group = c.benchmark_group("rms norm");
    group.throughput(Throughput::Elements(x.len() as u64));
    group.bench_function("forward", |b| {
        b.iter(|| norm::rms_forward_into(black_box(&x), &gain, 1e-5, &mut out));
    });
    group.bench_function("backward", |b| {
        b.iter(|| norm::rms_backward_add(black_box(&x), &gain, &g, 1e-5, &mut dx, Some(&mut dw)));
    });
    group.finish();
}

fn loss(c: &mut Criterion) {
    let (positions, vocab) = (256, 49_152);
    let (h, w) = (random(1, positions * WIDTH), random(2, vocab * WIDTH));
    let sizes = [positions, WIDTH, vocab];
    let targets: Vec<u32> = (0..positions as u32).map(|i| i * 191 % vocab as u32).collect();
    let mut head = vec![0f32; vocab * WIDTH];
    let mut group = c.benchmark_group("loss over the head");
    group.sample_size(10).throughput(Throughput::Elements((positions * vocab) as u64));
    for precision in [Precision::F32, Precision::Mixed] {
        let products = precision.products();
        let run = |gradient: Gradient| {
            head_cross_entropy(black_box(&h), Weight::F32(&w), sizes, &targets, gradient, products)
                .expect("sizes that agree")
        };
        group.bench_function(format!("{precision} NLL"), |b| b.iter(|| run(Gradient::Skip)));
        group.bench_function(format!("{precision} NLL and gradients"), |b| {
            b.iter(|| run(Gradient::HiddenAndHead { scale: 1e-3, head: &mut head }));
        });
    }
    group.finish();
}

fn optimiser(c: &mut Criterion) {
    let n = 4 << 20;
    let parameter = Tensor::from_vec(random(1, n), n, &Device::Cpu).expect("a tensor");
    let gradient = random(2, n);
    let (mut first, mut second) = (vec![0f32; n], vec![0f32; n]);
    let mut group = c.benchmark_group("AdamW");
    group.throughput(Throughput::Elements(n as u64));
    let mut step = 0;
    group.bench_function("step", |b| {
        b.iter(|| {
            step += 1;
            let with = adamw::AdamW {
                lr: 1e-4,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.0,
                gradient_scale: 1.0,
                step,
            };
            adamw::step(&parameter, black_box(&gradient), &mut first, &mut second, with)
                .expect("sizes agree");
        });
    });
    group.finish();
}

criterion_group!(benches, gemm, norms, loss, optimiser);
criterion_main!(benches);
