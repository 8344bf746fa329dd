//! The sizes of the benchmarks, held against a slower path: gradients of sampled queries and keys, each formed in f64 from
//! every query and key that takes part.
//!
//! At levels of instructions below the machine's best only the shorter one is run.

#[path = "attention/support.rs"]
#[allow(dead_code)]
mod support;

use anyhow::Result;
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::attention::reference::{Gradients, Problem, Sizes, backward_of, forward_of, sees};
use megacontext_kernels::cpu::{best, level};
use megacontext_kernels::gemm::Products;
use support::{BOTH, Case, SHIFTED, close, widened};

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const WIDTH: usize = 64;

/// Every query that sees key `key` of kv head `kv_head` goes through f64; what they add up to is complete for that key, and
/// each one's own dq is complete too.
fn check(entries: usize, pattern: Pattern, samples: &[(usize, usize)]) -> Result<()> {
    let case = Case::new([1, entries, HEADS, KV_HEADS, WIDTH], pattern);
    let operands = case.operands();
    let [q, k, v, d_out] = operands.each_ref().map(|x| widened(x));
    let outcomes = BOTH.map(|products| (products, case.outcome::<f32>(&operands, products)));
    let problem: Problem<'_> = case.problem();
    let sizes: Sizes = case.sizes;
    for (key, kv_head) in samples.iter().copied() {
        let mut want = Gradients::zeros(&q, &k, &v);
        let (mut out, mut rows) = (Vec::new(), Vec::new());
        for head in kv_head * HEADS / KV_HEADS..(kv_head + 1) * HEADS / KV_HEADS {
            for i in (0..entries).filter(|i| sees(&sizes, pattern, &case.rows, 0, head, *i, key)) {
                backward_of(&q, &k, &v, &d_out, &problem, [0, head, i], &mut want);
                // The results of some of them.
                if i % 37 == 0 || i == entries - 1 {
                    out.extend(forward_of(&q, &k, &v, &problem, [0, head, i]));
                    rows.push((i * HEADS + head) * WIDTH);
                }
            }
        }
        let at = (key * KV_HEADS + kv_head) * WIDTH;
        let some = |values: &[f64]| -> Vec<f64> {
            rows.iter().flat_map(|row| values[*row..row + WIDTH].iter().copied()).collect()
        };
        for (products, got) in &outcomes {
            let got = got.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?;
            // Of the largest value among those compared: averages over many keys are small.
            let tolerance = match products {
                Products::F32 => 5e-6,
                Products::Bf16 => 1.0 / 64.0,
            };
            let compare = |part: &str, got: &[f64], want: &[f64]| {
                let size = want.iter().fold(0f64, |most, x| most.max(x.abs()));
                close(
                    &format!("T {entries} {pattern:?} {products:?} key {key}: {part}"),
                    got,
                    want,
                    tolerance * size,
                );
            };
            compare("out", &some(&widened(&got.out)), &out);
            compare("dq", &some(&widened(&got.gradients[0])), &some(&want.q));
            compare("dk", &widened(&got.gradients[1][at..at + WIDTH]), &want.k[at..at + WIDTH]);
            compare("dv", &widened(&got.gradients[2][at..at + WIDTH]), &want.v[at..at + WIDTH]);
        }
    }
    Ok(())
}

#[test]
fn dense_at_2048() -> Result<()> {
    check(2048, Pattern::Dense, &[(0, 0), (1023, 1), (2047, 2)])
}

#[test]
fn shifted_sparse_at_2048() -> Result<()> {
    check(2048, SHIFTED(512), &[(0, 2), (255, 0), (511, 1), (1600, 1), (2047, 2)])
}

#[test]
fn shifted_sparse_at_8192() -> Result<()> {
    if level() != best() {
        return Ok(());
    }
    check(8192, SHIFTED(2048), &[(1023, 0), (4096, 1), (8191, 2)])
}
