//! The two operations that a step spends its products in besides attention: a linear layer, and the loss over the head.
//!
//! `linear`: y = x·Wᵀ + s·x·AᵀBᵀ, and the gradients of x, A and B, over a frozen W: x [n, in], W [out, in], A [r, in],
//! B [out, r]. Rank 0 leaves LoRA out. `loss`: cross-entropy over the head in chunks, NLL, and the gradients of the hidden
//! states and of the head: h [n, E], W [V, E]. In class bf16 x, W of `linear`, y and h are stored in bf16; what learns (A, B,
//! the head) and all gradients are f32.

use megacontext_base::random::Random;
use megacontext_kernels::linear::{Layer, LayerGradients, LoraSlices, Scratch, Weight};
use megacontext_kernels::loss::{Gradient, head_cross_entropy};
use megacontext_kernels::precision::Precision;
use megacontext_kernels::store::{Store, bf16};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::measure::{Memory, Times, megabytes, rounded};
use super::{add, begin, check_common, normals, within};
use crate::error::Result;
use crate::host::HostApi;
use crate::jobs::with_threads;

/// Widths above these are a slip of the pen.
const WIDEST: usize = 1 << 20;

/// What `linear` measures.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LinearBench {
    /// Entries.
    pub n: usize,
    /// Width of the input.
    pub inp: usize,
    /// Width of the output.
    pub out: usize,
    /// Rank of LoRA, 0 for none.
    pub rank: usize,
    /// Precision.
    pub dtype: Precision,
    /// Samples.
    pub reps: usize,
    /// Threads; none means all.
    pub threads: Option<usize>,
}

impl Default for LinearBench {
    fn default() -> Self {
        Self { n: 4096, inp: 576, out: 576, rank: 8, dtype: Precision::F32, reps: 3, threads: None }
    }
}

/// What `loss` measures.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossBench {
    /// Positions.
    pub n: usize,
    /// Model width.
    pub width: usize,
    /// Vocabulary.
    pub vocab: usize,
    /// Precision.
    pub dtype: Precision,
    /// Samples.
    pub reps: usize,
    /// Threads; none means all.
    pub threads: Option<usize>,
}

impl Default for LossBench {
    fn default() -> Self {
        Self { n: 4096, width: 576, vocab: 49152, dtype: Precision::F32, reps: 3, threads: None }
    }
}

/// The fields of a measured forward and backward.
fn timed(both: &Times, forward: &Times, extra: Option<u64>, flops: f64) -> Value {
    json!({
        "fb_ms": rounded(both.median() * 1e3, 3), "best_ms": rounded(both.best() * 1e3, 3),
        "fwd_ms": rounded(forward.median() * 1e3, 3), "peak_extra_MB": megabytes(extra),
        "gflops": rounded(flops / both.median() / 1e9, 1), "gflop_total": rounded(flops / 1e9, 3),
    })
}

/// Measures a linear layer.
pub fn linear(bench: &LinearBench, host: &dyn HostApi) -> Result<Value> {
    check_common(bench.n, 1, bench.reps)?;
    within("inp", bench.inp, WIDEST)?;
    within("out", bench.out, WIDEST)?;
    if bench.rank > 0 {
        within("rank", bench.rank, bench.inp.max(bench.out))?;
    }
    with_threads(bench.threads, || {
        let len = bench.out * bench.inp;
        if bench.dtype.stores_bf16() {
            measured_linear::<bf16>(bench, Weight::Bf16(&normals(2, len)), host)
        } else {
            measured_linear::<f32>(bench, Weight::F32(&normals(2, len)), host)
        }
    })?
}

fn measured_linear<S: Store>(bench: &LinearBench, weight: Weight<'_>, host: &dyn HostApi) -> Result<Value> {
    let &LinearBench { n, inp, out, rank, .. } = bench;
    let x: Vec<S> = normals(1, n * inp);
    let (a, b): (Vec<f32>, Vec<f32>) = (normals(3, rank * inp), normals(4, out * rank));
    let g: Vec<f32> = normals(5, n * out);
    let lora = (rank > 0).then_some(LoraSlices {
        a: &a,
        b: &b,
        rank,
        scale: 2.0,
        dropout: None,
        initial: None,
        dora: None,
    });
    let layer = Layer { weight, out, inp, lora, products: bench.dtype.products() };
    let memory = Memory::start();
    // As in a step: results and buffers are kept from one run to the next, the factors' gradients added up.
    let mut scratch = Scratch::default();
    let (mut y, mut dx) = (vec![S::default(); n * out], vec![0f32; n * inp]);
    let (mut da, mut db) = (vec![0f32; a.len()], vec![0f32; b.len()]);
    let both = Times::of(bench.reps, host, || {
        layer.forward(&x, &mut y, false, &mut scratch);
        let into = LayerGradients { a: Some(&mut da), b: Some(&mut db), ..Default::default() };
        layer.backward(&x, &g, Some((&mut dx, false)), into, &mut scratch);
        Ok(())
    })?;
    let extra = memory.extra();
    let forward = Times::of(bench.reps, host, || {
        layer.forward(&x, &mut y, false, &mut scratch);
        Ok(())
    })?;
    // W twice (y and dx), LoRA's two factors three times (forward, their inputs' gradient, their own).
    let flops = 2.0 * n as f64 * (2.0 * (inp * out) as f64 + 3.0 * (rank * (inp + out)) as f64);
    let mut result = begin("linear", bench.dtype)?;
    add(&mut result, json!({ "n": n, "in": inp, "out": out, "r": rank }));
    add(&mut result, timed(&both, &forward, extra, flops));
    both.describe(&mut result);
    Ok(Value::Object(result))
}

/// Measures the loss over the output head.
pub fn loss(bench: &LossBench, host: &dyn HostApi) -> Result<Value> {
    check_common(bench.n, 1, bench.reps)?;
    within("width", bench.width, WIDEST)?;
    within("vocab", bench.vocab, WIDEST)?;
    with_threads(bench.threads, || {
        if bench.dtype.stores_bf16() {
            measured_loss::<bf16>(bench, host)
        } else {
            measured_loss::<f32>(bench, host)
        }
    })?
}

fn measured_loss<S: Store>(bench: &LossBench, host: &dyn HostApi) -> Result<Value> {
    let &LossBench { n, width, vocab, .. } = bench;
    let h: Vec<S> = normals(1, n * width);
    let w: Vec<f32> = normals(2, vocab * width);
    let (weight, sizes, products) = (Weight::F32(&w), [n, width, vocab], bench.dtype.products());
    let mut random = Random::new(3);
    let targets: Vec<u32> = (0..n).map(|_| random.below(vocab) as u32).collect();
    let scale = 1.0 / n as f32;
    let memory = Memory::start();
    let mut head = vec![0f32; vocab * width];
    let both = Times::of(bench.reps, host, || {
        let gradient = Gradient::HiddenAndHead { scale, head: &mut head };
        std::hint::black_box(head_cross_entropy(&h, weight, sizes, &targets, gradient, products)?);
        Ok(())
    })?;
    let extra = memory.extra();
    let forward = Times::of(bench.reps, host, || {
        std::hint::black_box(head_cross_entropy(&h, weight, sizes, &targets, Gradient::Skip, products)?);
        Ok(())
    })?;
    let flops = 3.0 * 2.0 * (n * width) as f64 * vocab as f64;
    let mut result = begin("loss", bench.dtype)?;
    add(&mut result, json!({ "n": n, "E": width, "V": vocab }));
    add(&mut result, timed(&both, &forward, extra, flops));
    both.describe(&mut result);
    Ok(Value::Object(result))
}
