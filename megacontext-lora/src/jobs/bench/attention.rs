//! Attention alone, forward and backward.
//!
//! Shapes: q [B, n, H, d], k and v [B, n, Hkv, d] as a projection leaves them; gradients of all three.

use megacontext_kernels::attention::slices::Prepared;
use megacontext_kernels::attention::{Pattern, Rows};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::measure::{Memory, Times, megabytes, rounded};
use super::{Dtype, add, begin, check_common, group, kind, normals, within};
use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::with_threads;
use crate::train::config::{self, Attention, GroupSize};
use crate::train::work::{ATTENTION_BACKWARD, attention_forward};

/// What is measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttentionBench {
    /// Shifted sparse, or dense causal.
    pub pattern: Attention,
    /// Entries.
    pub n: usize,
    /// Query heads, kv heads.
    pub heads: Vec<usize>,
    /// Width of a head.
    pub head_dim: usize,
    /// Group of shifted sparse attention.
    pub group: GroupSize,
    /// Precision.
    pub dtype: Dtype,
    /// Rows.
    pub batch: usize,
    /// Samples.
    pub reps: usize,
    /// Threads; none means all.
    pub threads: Option<usize>,
}

impl Default for AttentionBench {
    fn default() -> Self {
        Self {
            pattern: Attention::S2,
            n: 8192,
            heads: vec![9, 3],
            head_dim: 64,
            group: GroupSize::Part(0.25),
            dtype: Dtype::F32,
            batch: 1,
            reps: 3,
            threads: None,
        }
    }
}

/// Measures.
pub fn run(bench: &AttentionBench, host: &dyn HostApi) -> Result<Value> {
    check_common(bench.n, bench.batch, bench.reps)?;
    let &[heads, kv_heads] = bench.heads.as_slice() else {
        return Err(PluginError::usage(format!(
            "heads: expected query heads and kv heads, 2 numbers, got {}",
            bench.heads.len()
        )));
    };
    within("heads", heads, 4096)?;
    within("heads", kv_heads, 4096)?;
    let pattern = config::pattern(bench.pattern, bench.group, bench.n)?;
    let scale = 1.0 / (bench.head_dim as f64).sqrt();
    let sizes = [bench.batch, bench.n, heads, kv_heads, bench.head_dim];
    let prepared = Prepared::new(sizes, scale, pattern, &Rows::default())
        .map_err(|e| PluginError::usage(e.to_string()))?;
    with_threads(bench.threads, || measured(bench, pattern, &prepared, [heads, kv_heads], host))?
}

fn measured(
    bench: &AttentionBench,
    pattern: Pattern,
    prepared: &Prepared,
    [heads, kv_heads]: [usize; 2],
    host: &dyn HostApi,
) -> Result<Value> {
    let values = |seed, heads: usize| normals(seed, bench.batch * bench.n * heads * bench.head_dim);
    let (q, k, v, d_out) = (values(1, heads), values(2, kv_heads), values(3, kv_heads), values(4, heads));
    let memory = Memory::start();
    let both = Times::of(bench.reps, host, || {
        let mixed = prepared.forward(&q, &k, &v);
        std::hint::black_box(prepared.backward(&q, &k, &v, &mixed, &d_out));
        Ok(())
    })?;
    let extra = memory.extra();
    let forward = Times::of(bench.reps, host, || {
        std::hint::black_box(prepared.forward(&q, &k, &v));
        Ok(())
    })?;
    let flops = bench.batch as f64
        * attention_forward(pattern, bench.n, heads, bench.head_dim)
        * (1.0 + ATTENTION_BACKWARD);
    let mut result = begin("attention", bench.dtype)?;
    add(
        &mut result,
        json!({
            "kind": kind(bench.pattern), "B": bench.batch, "H": heads, "Hkv": kv_heads, "d": bench.head_dim,
            "n": bench.n, "G": group(pattern, bench.n),
            "fb_ms": rounded(both.median() * 1e3, 3), "best_ms": rounded(both.best() * 1e3, 3),
            "fwd_ms": rounded(forward.median() * 1e3, 3), "peak_extra_MB": megabytes(extra),
            "gflops": rounded(flops / both.median() / 1e9, 1), "gflop_total": rounded(flops / 1e9, 3),
        }),
    );
    both.describe(&mut result);
    Ok(Value::Object(result))
}
