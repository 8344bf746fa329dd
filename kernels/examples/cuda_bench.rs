//! Attention on a GPU, forward and backward, as a table: `cargo run --release --features cuda --example cuda_bench`.
//!
//! bf16, 32 query heads over 8 kv heads, one row of n entries, shifted sparse (groups of n/4) and dense. Times are medians
//! between events of the stream, after a warm-up, with the caches overwritten before each run. TFLOP/s count what the
//! pairs that are seen need: four operations per pair and value of a head forward, ten backward (five products), whatever
//! the kernels do.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use half::bf16;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::cuda::attention::{Gradients, Mixed, Operand, Own, Prepared};
use megacontext_kernels::cuda::cudarc::driver::CudaSlice;
use megacontext_kernels::cuda::cudarc::driver::sys::CUevent_flags;
use megacontext_kernels::cuda::{Device, probe};

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
/// More than any cache.
const OVERWRITTEN: usize = 256 << 20;
const MOST_RUNS: usize = 20;
/// Of one cell of the table, after which no further run begins.
const PATIENCE: Duration = Duration::from_secs(2);

/// Pairs of query and key that are seen, over all query heads.
fn pairs(n: usize, pattern: Pattern) -> f64 {
    let seen = |shifted: bool| -> u64 {
        (0..n)
            .map(|i| match pattern {
                Pattern::ShiftedSparse { group } if group < n => {
                    let shift = if shifted { group / 2 } else { 0 };
                    (if i < shift { i + 1 } else { (i - shift) % group + 1 }) as u64
                }
                _ => i as u64 + 1,
            })
            .sum()
    };
    (seen(false) * HEADS.div_ceil(2) as u64 + seen(true) * (HEADS / 2) as u64) as f64
}

/// The median of the time that `run` takes on the device, in seconds, and how many times it ran.
fn time(
    device: &Device,
    overwritten: &mut CudaSlice<u8>,
    mut run: impl FnMut() -> Result<()>,
) -> Result<(f64, usize)> {
    run()?;
    device.synchronize()?;
    let (start, mut times) = (Instant::now(), Vec::new());
    let flags = Some(CUevent_flags::CU_EVENT_DEFAULT);
    while times.len() < MOST_RUNS && (times.len() < 3 || start.elapsed() < PATIENCE) {
        device.stream().memset_zeros(overwritten)?;
        let before = device.stream().record_event(flags)?;
        run()?;
        let after = device.stream().record_event(flags)?;
        times.push(f64::from(before.elapsed_ms(&after)?) / 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok((times[times.len() / 2], times.len()))
}

/// Values in −1..1 that repeat.
fn values(device: &Device, count: usize) -> Result<CudaSlice<bf16>> {
    let values: Vec<bf16> =
        (0..count).map(|i| bf16::from_f32(((i * 7919) % 2003) as f32 / 1001.5 - 1.0)).collect();
    Ok(device.upload(&values)?)
}

fn cell(
    device: &Device,
    overwritten: &mut CudaSlice<u8>,
    n: usize,
    width: usize,
    pattern: Pattern,
) -> Result<()> {
    let (of_q, of_kv) = (n * HEADS * width, n * KV_HEADS * width);
    let [q, k, v, d_out] =
        [values(device, of_q)?, values(device, of_kv)?, values(device, of_kv)?, values(device, of_q)?];
    let scale = 1.0 / (width as f64).sqrt();
    let prepared = Prepared::new(device, [1, n, HEADS, KV_HEADS, width], scale, pattern, &Rows::default())?;
    let own = Own {
        q: Operand::row_major(q.as_view(), [n, HEADS, width]),
        k: Operand::row_major(k.as_view(), [n, KV_HEADS, width]),
        v: Operand::row_major(v.as_view(), [n, KV_HEADS, width]),
    };
    let (mut out, mut lse) = (device.zeros::<bf16>(of_q)?, device.zeros::<f32>(n * HEADS)?);
    let forward =
        time(device, overwritten, || Ok(prepared.forward(device, &own, None, &mut out, &mut lse)?))?;
    let [mut dq, mut dk, mut dv] = [device.zeros(of_q)?, device.zeros(of_kv)?, device.zeros(of_kv)?];
    let saved = Mixed { out: out.as_view(), lse: lse.as_view() };
    let d_out = Operand::row_major(d_out.as_view(), [n, HEADS, width]);
    let mut into = Gradients { q: dq.as_view_mut(), k: dk.as_view_mut(), v: dv.as_view_mut() };
    let backward =
        time(device, overwritten, || Ok(prepared.backward(device, &own, None, &saved, &d_out, &mut into)?))?;
    let rate = |operations: f64, seconds: f64| operations * width as f64 * pairs(n, pattern) / seconds / 1e12;
    println!(
        "{:<7} {width:>4} {n:>7} {:>11.3} {:>9.1} {:>5} {:>12.3} {:>9.1} {:>5}",
        if pattern == Pattern::Dense { "dense" } else { "s2" },
        forward.0 * 1e3,
        rate(4.0, forward.0),
        forward.1,
        backward.0 * 1e3,
        rate(10.0, backward.0),
        backward.1,
    );
    Ok(())
}

fn main() -> Result<()> {
    let devices = match probe() {
        Ok(devices) => devices,
        Err(error) => {
            println!("nothing to measure: {error}");
            return Ok(());
        }
    };
    let first = devices.first().context("the probe gives at least one device")?;
    let start = Instant::now();
    let device = Device::open(first.ordinal)?;
    println!(
        "{} ({}, {} MiB), kernels loaded in {:.1?}; bf16, {HEADS} query heads over {KV_HEADS} kv heads",
        first.name,
        first.capability.target(),
        first.memory_total >> 20,
        start.elapsed()
    );
    println!(
        "{:<7} {:>4} {:>7} {:>11} {:>9} {:>5} {:>12} {:>9} {:>5}",
        "pattern", "D", "n", "forward ms", "TFLOP/s", "runs", "backward ms", "TFLOP/s", "runs"
    );
    let mut overwritten = device.zeros::<u8>(OVERWRITTEN)?;
    for width in [64, 128] {
        for n in [8, 16, 32, 64, 128].map(|k| k << 10) {
            for pattern in [Pattern::ShiftedSparse { group: n / 4 }, Pattern::Dense] {
                cell(&device, &mut overwritten, n, width, pattern)?;
            }
        }
    }
    Ok(())
}
