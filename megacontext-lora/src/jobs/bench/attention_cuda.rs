//! [`super::attention`] on a GPU: the kernels alone, everything lies on the device.
//!
//! A run is queued and waited for, so times are those of a clock on the wall, launches and the wait among them. Results, log-sum-exp
//! and gradients are kept from one run to the next, as in a step. Gradients have the operands' storage type.
//!
//! Units: seconds, bytes. Errors: `mixed`, which is no storage; those of the kernels. Left out: other patterns.

use megacontext_base::device::Device;
use megacontext_base::error::BaseError;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::cuda::Stored;
use megacontext_kernels::cuda::attention::{Gradients, Mixed, Operand, Own, Prepared};
use megacontext_kernels::error::KernelError;
use megacontext_kernels::precision::Precision;
use megacontext_kernels::store::{Store, bf16};
use serde_json::Value;

use super::attention::AttentionBench;
use super::measure::Times;
use super::{add_device, begin, normals};
use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::{model_error, with_threads};

fn kernel_error(error: impl Into<KernelError>) -> PluginError {
    model_error(BaseError::from(error.into()))
}

/// Measures; `device` is a GPU.
pub fn run(
    bench: &AttentionBench,
    pattern: Pattern,
    heads: [usize; 2],
    device: &Device,
    host: &dyn HostApi,
) -> Result<Value> {
    with_threads(bench.threads, || match bench.dtype {
        Precision::F32 => measured::<f32>(bench, pattern, heads, device, host),
        Precision::Bf16 => measured::<bf16>(bench, pattern, heads, device, host),
        other => Err(PluginError::usage(format!(
            "dtype: expected f32 or bf16 for attention on {}, got {other}",
            device.name()
        ))),
    })?
}

fn measured<T: Stored + Store>(
    bench: &AttentionBench,
    pattern: Pattern,
    [heads, kv_heads]: [usize; 2],
    device: &Device,
    host: &dyn HostApi,
) -> Result<Value> {
    let Some(gpu) = device.kernels() else {
        return Err(PluginError::internal("bench: the device is a GPU"));
    };
    let (n, width) = (bench.n, bench.head_dim);
    let scale = 1.0 / (width as f64).sqrt();
    let sizes = [bench.batch, n, heads, kv_heads, width];
    let prepared = Prepared::new(gpu, sizes, scale, pattern, &Rows::default())
        .map_err(|e| PluginError::usage(e.to_string()))?;
    let len = |heads: usize| bench.batch * n * heads * width;
    device.forget_peak().map_err(model_error)?;
    let upload = |seed, heads| gpu.upload(&normals::<T>(seed, len(heads))).map_err(kernel_error);
    let (q, k, v) = (upload(1, heads)?, upload(2, kv_heads)?, upload(3, kv_heads)?);
    let d_out = upload(4, heads)?;
    // Memory only grew since it was forgotten, so the most is what there is.
    let idle = device.peak_bytes().map_err(model_error)?;

    let room = |heads| gpu.room::<T>(len(heads)).map_err(kernel_error);
    let (mut out, [mut dq, mut dk, mut dv]) =
        (room(heads)?, [room(heads)?, room(kv_heads)?, room(kv_heads)?]);
    let mut lse = gpu.room::<f32>(bench.batch * n * heads).map_err(kernel_error)?;
    let own = Own {
        q: Operand::row_major(q.as_view(), [n, heads, width]),
        k: Operand::row_major(k.as_view(), [n, kv_heads, width]),
        v: Operand::row_major(v.as_view(), [n, kv_heads, width]),
    };
    let d_out = Operand::row_major(d_out.as_view(), [n, heads, width]);
    let wait = || gpu.synchronize().map_err(kernel_error);
    let both = Times::of(bench.reps, host, || {
        prepared.forward(gpu, &own, None, &mut out, &mut lse).map_err(kernel_error)?;
        let mixed = Mixed { out: out.as_view(), lse: lse.as_view() };
        let mut into = Gradients { q: dq.as_view_mut(), k: dk.as_view_mut(), v: dv.as_view_mut() };
        prepared.backward(gpu, &own, None, &mixed, &d_out, &mut into).map_err(kernel_error)?;
        wait()
    })?;
    let mut result = begin("attention", bench.dtype)?;
    add_device(&mut result, device)?;
    let peak = device.peak_bytes().map_err(model_error)?;
    let extra = peak.zip(idle).map(|(peak, idle)| peak.saturating_sub(idle));
    let forward = Times::of(bench.reps, host, || {
        prepared.forward(gpu, &own, None, &mut out, &mut lse).map_err(kernel_error)?;
        wait()
    })?;
    bench.describe(&mut result, pattern, [heads, kv_heads], [&both, &forward], extra);
    Ok(Value::Object(result))
}
