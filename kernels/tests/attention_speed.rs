//! Speed of attention, on request: `cargo test --release -p megacontext-kernels --test attention_speed -- --ignored
//! --nocapture`. Counts 4·D flops forward and 10·D backward per (query, key) pair that the pattern keeps.

use std::time::Instant;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use megacontext_kernels::attention::reference::{Sizes, sees};
use megacontext_kernels::attention::{Pattern, Rows, attention};

#[test]
#[ignore = "a measurement"]
fn speed() -> Result<()> {
    for (entries, pattern, heads, kv_heads) in [
        (4096, Pattern::ShiftedSparse { group: 1024 }, 9, 3),
        (4096, Pattern::ShiftedSparse { group: 256 }, 9, 3),
        (4096, Pattern::Dense, 9, 3),
        (4096, Pattern::ShiftedSparse { group: 1024 }, 8, 8),
    ] {
        let width = 64;
        let tensor = |heads: usize| -> Result<Var> {
            Ok(Var::from_tensor(&Tensor::randn(0f32, 1.0, (1, entries, heads, width), &Device::Cpu)?)?)
        };
        let (q, k, v) = (tensor(heads)?, tensor(kv_heads)?, tensor(kv_heads)?);
        let sizes = Sizes { batch: 1, entries, heads, kv_heads, width };
        let rows = Rows::default();
        let head_pairs = |h: usize| -> usize {
            (0..entries).map(|i| (0..=i).filter(|j| sees(&sizes, pattern, &rows, 0, h, i, *j)).count()).sum()
        };
        let (plain, shifted) = (head_pairs(0), head_pairs(heads - 1));
        let pairs = (plain * heads.div_ceil(2) + shifted * (heads / 2)) as f64;
        let (mut forward, mut backward) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..8 {
            let start = Instant::now();
            let out = attention(&q, &k, &v, 0.125, pattern, &rows)?;
            forward = forward.min(start.elapsed().as_secs_f64());
            let loss = out.sum_all()?;
            let start = Instant::now();
            loss.backward()?;
            backward = backward.min(start.elapsed().as_secs_f64());
        }
        println!(
            "T {entries} heads {heads}/{kv_heads} {pattern:?}: forward {:.1} ms {:.0} GFLOP/s, backward {:.1} ms {:.0} GFLOP/s",
            forward * 1e3,
            pairs * 4.0 * width as f64 / forward / 1e9,
            backward * 1e3,
            pairs * 10.0 * width as f64 / backward / 1e9,
        );
    }
    Ok(())
}
