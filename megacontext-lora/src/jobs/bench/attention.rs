//! Attention alone, forward and backward.
//!
//! Shapes: q [B, n, H, d], k and v [B, n, Hkv, d] as a projection leaves them; gradients of all three. On the processor unless a
//! GPU is named ([`super::attention_cuda`]).

use megacontext_base::device::{Device, DeviceChoice};
use megacontext_kernels::attention::slices::{Gradients, Mixed, Prepared};
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::precision::Precision;
use megacontext_kernels::store::{Store, bf16};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::measure::{Memory, Times, megabytes, rounded};
use super::{add, add_device, begin, check_common, group, kind, normals, within};
use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::device::OnDevice;
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
    pub dtype: Precision,
    /// Rows.
    pub batch: usize,
    /// Samples.
    pub reps: usize,
    /// Threads; none means all.
    pub threads: Option<usize>,
    /// What it runs on: `cpu`, `cuda:N` or `auto`; none means the processor.
    pub device: Option<DeviceChoice>,
}

impl Default for AttentionBench {
    fn default() -> Self {
        Self {
            pattern: Attention::S2,
            n: 8192,
            heads: vec![9, 3],
            head_dim: 64,
            group: GroupSize::Part(0.25),
            dtype: Precision::F32,
            batch: 1,
            reps: 3,
            threads: None,
            device: None,
        }
    }
}

/// Query heads and kv heads.
pub(super) fn head_counts(heads: &[usize]) -> Result<[usize; 2]> {
    let &[heads, kv_heads] = heads else {
        return Err(PluginError::usage(format!(
            "heads: expected query heads and kv heads, 2 numbers, got {}",
            heads.len()
        )));
    };
    within("heads", heads, 4096)?;
    within("heads", kv_heads, 4096)?;
    Ok([heads, kv_heads])
}

/// Measures.
pub fn run(bench: &AttentionBench, host: &dyn HostApi) -> Result<Value> {
    check_common(bench.n, bench.batch, bench.reps)?;
    let [heads, kv_heads] = head_counts(&bench.heads)?;
    let pattern = config::pattern(bench.pattern, bench.group, bench.n)?;
    // Nobody is told of a device that nobody named.
    let on = bench.device.map(|device| OnDevice::open(device, host)).transpose()?;
    #[cfg(feature = "cuda")]
    if let Some(on) = on.as_ref().filter(|on| !on.device().is_cpu()) {
        return super::attention_cuda::run(bench, pattern, [heads, kv_heads], on.device(), host);
    }
    drop(on);
    let scale = 1.0 / (bench.head_dim as f64).sqrt();
    let sizes = [bench.batch, bench.n, heads, kv_heads, bench.head_dim];
    let prepared = Prepared::new(sizes, scale, pattern, &Rows::default())
        .map_err(|e| PluginError::usage(e.to_string()))?
        .with_products(bench.dtype.products());
    let heads = [heads, kv_heads];
    with_threads(bench.threads, || {
        if bench.dtype.stores_bf16() {
            measured::<bf16>(bench, pattern, &prepared, heads, host)
        } else {
            measured::<f32>(bench, pattern, &prepared, heads, host)
        }
    })?
}

fn measured<S: Store>(
    bench: &AttentionBench,
    pattern: Pattern,
    prepared: &Prepared,
    [heads, kv_heads]: [usize; 2],
    host: &dyn HostApi,
) -> Result<Value> {
    let len = |heads: usize| bench.batch * bench.n * heads * bench.head_dim;
    let (q, k, v): (Vec<S>, Vec<S>, Vec<S>) =
        (normals(1, len(heads)), normals(2, len(kv_heads)), normals(3, len(kv_heads)));
    let d_out: Vec<f32> = normals(4, len(heads));
    let memory = Memory::start();
    // As in a step: results and gradients are kept from one run to the next, and written anew.
    let (mut mixed, mut gradients) = (Mixed::<S>::default(), Gradients::default());
    let both = Times::of(bench.reps, host, || {
        prepared.forward_into(&q, &k, &v, &mut mixed);
        prepared.backward_into(&q, &k, &v, &mixed, &d_out, &mut gradients);
        Ok(())
    })?;
    let extra = memory.extra();
    let forward = Times::of(bench.reps, host, || {
        prepared.forward_into(&q, &k, &v, &mut mixed);
        Ok(())
    })?;
    let mut result = begin("attention", bench.dtype)?;
    add_device(&mut result, &Device::Cpu)?;
    bench.describe(&mut result, pattern, [heads, kv_heads], [&both, &forward], extra);
    Ok(Value::Object(result))
}

impl AttentionBench {
    /// The fields of forward and backward together, and of forward alone.
    pub(super) fn describe(
        &self,
        result: &mut Map<String, Value>,
        pattern: Pattern,
        [heads, kv_heads]: [usize; 2],
        [both, forward]: [&Times; 2],
        extra: Option<u64>,
    ) {
        let forward_flops = attention_forward(pattern, self.n, heads, self.head_dim);
        let flops = self.batch as f64 * forward_flops * (1.0 + ATTENTION_BACKWARD);
        let fields = json!({
            "kind": kind(self.pattern), "B": self.batch, "H": heads, "Hkv": kv_heads, "d": self.head_dim,
            "n": self.n, "G": group(pattern, self.n),
            "fb_ms": rounded(both.median() * 1e3, 3), "best_ms": rounded(both.best() * 1e3, 3),
            "fwd_ms": rounded(forward.median() * 1e3, 3), "peak_extra_MB": megabytes(extra),
            "gflops": rounded(flops / both.median() / 1e9, 1), "gflop_total": rounded(flops / 1e9, 3),
        });
        add(result, fields);
        both.describe(result);
    }
}
