//! Attention, forward and backward: `cargo bench -p megacontext-kernels --bench attention`.
//!
//! Heads 9/3, D 64, groups of a quarter of the entries, random operands. Throughput is entries. For sizes, memory and other
//! shapes: `mclora bench attention`.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use megacontext_kernels::attention::slices::{Gradients, Mixed, Prepared};
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::precision::Precision;

mod support;
use support::random;

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const WIDTH: usize = 64;

fn attention(c: &mut Criterion) {
    for (name, lengths) in [("s2", [2048, 8192]), ("dense", [1024, 4096])] {
        let mut group = c.benchmark_group(format!("attention {name}"));
        group.sample_size(10);
        for n in lengths {
            let pattern = match name {
                "s2" => Pattern::ShiftedSparse { group: n / 4 },
                _ => Pattern::Dense,
            };
            let (q, d_out) = (random(1, n * HEADS * WIDTH), random(2, n * HEADS * WIDTH));
            let (k, v) = (random(3, n * KV_HEADS * WIDTH), random(4, n * KV_HEADS * WIDTH));
            group.throughput(Throughput::Elements(n as u64));
            for precision in [Precision::F32, Precision::Mixed] {
                let sizes = [1, n, HEADS, KV_HEADS, WIDTH];
                let prepared = Prepared::new(sizes, 0.125, pattern, &Rows::default())
                    .expect("sizes that agree")
                    .with_products(precision.products());
                let (mut mixed, mut gradients) = (Mixed::default(), Gradients::default());
                group.bench_function(BenchmarkId::new(format!("{precision} forward"), n), |b| {
                    b.iter(|| prepared.forward_into(black_box(&q), &k, &v, &mut mixed));
                });
                group.bench_function(BenchmarkId::new(format!("{precision} forward and backward"), n), |b| {
                    b.iter(|| {
                        prepared.forward_into(black_box(&q), &k, &v, &mut mixed);
                        prepared.backward_into(&q, &k, &v, &mixed, &d_out, &mut gradients);
                    });
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, attention);
criterion_main!(benches);
