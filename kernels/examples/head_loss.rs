//! Times the loss over the output head and its gradients: milliseconds, minimum of several runs.
//!
//! `cargo run --release -p megacontext-kernels --example head_loss -- [positions] [width] [vocabulary]`

use std::time::Instant;

use megacontext_kernels::gemm::Products;
use megacontext_kernels::linear::Weight;
use megacontext_kernels::loss::{Gradient, chunk_rows, head_cross_entropy};
use megacontext_kernels::store::{Store, bf16};

fn main() -> anyhow::Result<()> {
    let mut sizes = [2048usize, 576, 49_152];
    for (size, argument) in sizes.iter_mut().zip(std::env::args().skip(1)) {
        *size = argument.parse()?;
    }
    let [n, e, v] = sizes;
    let numbers =
        |n: usize, by: usize| (0..n).map(|i| (i * by % 1009) as f32 / 5000.0 - 0.1).collect::<Vec<_>>();
    let (h, w) = (numbers(n * e, 37), numbers(v * e, 53));
    let hb: Vec<bf16> = h.iter().map(|x| bf16::put(*x)).collect();
    let wb: Vec<bf16> = w.iter().map(|x| bf16::put(*x)).collect();
    let targets: Vec<u32> = (0..n).map(|i| (i * 7919 % v) as u32).collect();
    let mut head = vec![0f32; v * e];
    println!("N {n}, E {e}, V {v}, {} rows of logits at a time", chunk_rows(v));
    for (name, stored, products) in
        [("f32", false, Products::F32), ("mixed", false, Products::Bf16), ("bf16", true, Products::Bf16)]
    {
        for kind in ["nll", "d hidden", "d hidden, d head"] {
            let mut best = f64::INFINITY;
            for _ in 0..4 {
                let wanted = match kind {
                    "nll" => Gradient::Skip,
                    "d hidden" => Gradient::Hidden { scale: 1.0 },
                    _ => Gradient::HiddenAndHead { scale: 1.0, head: &mut head },
                };
                let start = Instant::now();
                let loss = if stored {
                    head_cross_entropy(&hb, Weight::Bf16(&wb), sizes, &targets, wanted, products)?
                } else {
                    head_cross_entropy(&h, Weight::F32(&w), sizes, &targets, wanted, products)?
                };
                best = best.min(start.elapsed().as_secs_f64() * 1e3);
                anyhow::ensure!(loss.sum().is_finite(), "the loss is not finite");
            }
            println!("{name:>6}  {kind:<17} {best:8.1} ms");
        }
    }
    Ok(())
}
