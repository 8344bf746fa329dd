//! Attention: every pattern, forward and backward, against the CPU's kernels in f32 over the same values.

use anyhow::{Result, ensure};
use half::{bf16, f16};
use megacontext_kernels::attention::prefix::{self, Continuations, PrefixAttention};
use megacontext_kernels::attention::{Pattern, Rows, slices};
use megacontext_kernels::cuda::attention::{Document, Gradients, Mixed, Operand, Own, Prepared};
use megacontext_kernels::cuda::cudarc::driver::CudaSlice;
use megacontext_kernels::cuda::{Device, Stored};

use crate::support::{close, close_within, device, stored, values, widened};

#[derive(Clone, Debug, Default)]
pub struct Case {
    /// [B, T, H, Hkv, D].
    pub dims: [usize; 5],
    pub rows: Rows,
    pub slopes: bool,
    pub positions: bool,
    /// q, k and v lie side by side in one array, as one product of all three leaves them.
    pub packed: bool,
    /// Rows continue a document of so many entries.
    pub continues: Option<(usize, Continuations)>,
}

const PATTERNS: [Pattern; 8] = [
    Pattern::Dense,
    Pattern::ShiftedSparse { group: 8 },
    Pattern::ShiftedSparse { group: 5 },
    Pattern::ShiftedSparse { group: 50 },
    Pattern::SlidingWindow { window: 7 },
    Pattern::Bidirectional,
    Pattern::ShiftedBidirectional { group: 9 },
    Pattern::ShiftedBidirectional { group: 2 },
];

/// Seeded values of a storage type, there and here.
struct Tensor<T> {
    there: CudaSlice<T>,
    here: Vec<f32>,
}

impl<T: Stored> Tensor<T> {
    fn new(device: &Device, count: usize, seed: u64) -> Result<Self> {
        let values: Vec<T> = stored(&values(count, seed));
        Ok(Self { there: device.upload(&values)?, here: widened(&values) })
    }
}

/// [B·T, heads·D] of three operands side by side.
fn side_by_side(entries: usize, parts: [&[f32]; 3]) -> Vec<f32> {
    let mut all = Vec::new();
    for entry in 0..entries {
        for part in parts {
            let width = part.len() / entries;
            all.extend_from_slice(&part[entry * width..(entry + 1) * width]);
        }
    }
    all
}

/// Forward and backward of one case on the device, held against the CPU.
pub fn run<T: Stored>(device: &Device, case: &Case, pattern: Pattern) -> Result<()> {
    let what = format!("{pattern:?} {case:?}");
    let [batch, entries, heads, kv_heads, width] = case.dims;
    let scale = 1.7 / (width as f64).sqrt();
    let (of_q, of_kv) = (batch * entries * heads * width, batch * entries * kv_heads * width);
    let q = Tensor::<T>::new(device, of_q, 1)?;
    let k = Tensor::<T>::new(device, of_kv, 2)?;
    let v = Tensor::<T>::new(device, of_kv, 3)?;
    let d_out = Tensor::<T>::new(device, of_q, 4)?;
    let (document_entries, continuations) = match &case.continues {
        Some((entries, continuations)) => (*entries, Some(continuations)),
        None => (0, None),
    };
    let of_document = document_entries.max(1) * kv_heads * width;
    let document_k = Tensor::<T>::new(device, of_document, 5)?;
    let document_v = Tensor::<T>::new(device, of_document, 6)?;
    let slopes: Vec<f32> = (0..heads).map(|h| 0.3 / (h + 1) as f32).collect();
    let positions: Vec<f32> = (0..entries).map(|i| 1.5 * i as f32 - (i % 3) as f32).collect();

    // On the CPU.
    let (mut mixed, mut gradients) = (slices::Mixed::default(), slices::Gradients::default());
    if let Some(rows) = continuations {
        let mut cpu = PrefixAttention::new(case.dims, document_entries, scale, pattern, rows.clone())?;
        if case.slopes {
            cpu = cpu.with_slopes(&slopes)?;
        }
        let own = prefix::Own { q: &q.here[..], k: &k.here[..], v: &v.here[..] };
        let document = prefix::Document { k: &document_k.here[..], v: &document_v.here[..] };
        cpu.forward_into(own, document, &mut mixed);
        cpu.backward_into(own, document, &mixed, &d_out.here, &mut gradients);
    } else {
        let mut cpu = slices::Prepared::new(case.dims, scale, pattern, &case.rows)?;
        if case.slopes {
            cpu = cpu.with_slopes(&slopes)?;
        }
        if case.positions {
            cpu = cpu.with_positions(&positions)?;
        }
        cpu.forward_into(&q.here, &k.here, &v.here, &mut mixed);
        cpu.backward_into(&q.here, &k.here, &v.here, &mixed, &d_out.here, &mut gradients);
    }

    // On the device.
    let mut prepared = match continuations {
        Some(rows) => Prepared::continuing(device, case.dims, document_entries, scale, pattern, rows)?,
        None => Prepared::new(device, case.dims, scale, pattern, &case.rows)?,
    };
    if case.slopes {
        prepared = prepared.with_slopes(device, &slopes)?;
    }
    if case.positions {
        prepared = prepared.with_positions(device, &positions)?;
    }
    let together = if case.packed {
        let all = side_by_side(batch * entries, [&q.here, &k.here, &v.here]);
        Some(device.upload(&stored::<T>(&all))?)
    } else {
        None
    };
    let own = match &together {
        None => Own {
            q: Operand::row_major(q.there.as_view(), [entries, heads, width]),
            k: Operand::row_major(k.there.as_view(), [entries, kv_heads, width]),
            v: Operand::row_major(v.there.as_view(), [entries, kv_heads, width]),
        },
        Some(all) => {
            let entry = (heads + 2 * kv_heads) * width;
            let strides = [entries * entry, entry, width];
            let from = |at: usize| Operand { values: all.slice(at..), strides };
            Own { q: from(0), k: from(heads * width), v: from((heads + kv_heads) * width) }
        }
    };
    let document = continuations.map(|_| Document {
        k: Operand::row_major(document_k.there.as_view(), [document_entries, kv_heads, width]),
        v: Operand::row_major(document_v.there.as_view(), [document_entries, kv_heads, width]),
    });
    let mut out = device.zeros::<T>(of_q)?;
    let mut lse = device.zeros::<f32>(batch * entries * heads)?;
    prepared.forward(device, &own, document.as_ref(), &mut out, &mut lse)?;
    close(&format!("out, {what}"), &device.download(&out)?, &mixed.out)?;
    close_within(&format!("lse, {what}"), &device.download(&lse)?, &mixed.lse, 1e-4)?;

    let (mut dq, mut dk, mut dv) =
        (device.zeros::<T>(of_q)?, device.zeros::<T>(of_kv)?, device.zeros::<T>(of_kv)?);
    let saved = Mixed { out: out.as_view(), lse: lse.as_view() };
    let d_out = Operand::row_major(d_out.there.as_view(), [entries, heads, width]);
    let mut into = Gradients { q: dq.as_view_mut(), k: dk.as_view_mut(), v: dv.as_view_mut() };
    prepared.backward(device, &own, document.as_ref(), &saved, &d_out, &mut into)?;
    close(&format!("dq, {what}"), &device.download(&dq)?, &gradients.q)?;
    close(&format!("dk, {what}"), &device.download(&dk)?, &gradients.k)?;
    close(&format!("dv, {what}"), &device.download(&dv)?, &gradients.v)
}

fn all<T: Stored>(device: &Device) -> Result<()> {
    let lengths = |lengths: &[usize]| Rows { lengths: Some(lengths.to_vec()), segments: None };
    let segments = |segments: &[&[usize]]| Some(segments.iter().map(|starts| starts.to_vec()).collect());
    for pattern in PATTERNS {
        // Odd lengths and heads, around the sizes of tiles.
        run::<T>(device, &Case { dims: [1, 1, 3, 1, 32], ..Case::default() }, pattern)?;
        let rows = lengths(&[33, 20]);
        run::<T>(device, &Case { dims: [2, 33, 4, 2, 40], rows, ..Case::default() }, pattern)?;
        let rows = Rows { lengths: None, segments: segments(&[&[0, 1, 30, 64]]) };
        run::<T>(device, &Case { dims: [1, 71, 3, 3, 64], rows, packed: true, ..Case::default() }, pattern)?;
        let rows = Rows { segments: segments(&[&[0, 3], &[0, 17, 35]]), ..lengths(&[0, 36]) };
        let dims = [2, 37, 2, 1, 32];
        let case = Case { dims, rows, slopes: true, positions: true, ..Case::default() };
        run::<T>(device, &case, pattern)?;
    }
    for width in [8, 72, 96, 104, 128, 136, 256] {
        let case = Case { dims: [1, 45, 2, 1, width], ..Case::default() };
        run::<T>(device, &case, Pattern::ShiftedSparse { group: 12 })?;
    }
    for (pattern, packed) in [(Pattern::Dense, true), (Pattern::ShiftedSparse { group: 64 }, false)] {
        // Several tiles and blocks.
        let dims = [1, 150, 2, 1, 64];
        run::<T>(device, &Case { dims, packed, slopes: !packed, ..Case::default() }, pattern)?;
    }
    Ok(())
}

fn continuing<T: Stored>(device: &Device) -> Result<()> {
    let patterns =
        [Pattern::Dense, Pattern::ShiftedSparse { group: 16 }, Pattern::SlidingWindow { window: 20 }];
    for pattern in patterns {
        let dims = [4, 19, 4, 2, 64];
        let prefix = vec![0, 40, 77, 100];
        let whole = Continuations { prefix: prefix.clone(), ..Continuations::default() };
        let parts =
            Continuations { prefix, lengths: Some(vec![19, 1, 0, 18]), lower: Some(vec![0, 33, 77, 0]) };
        for (rows, slopes) in [(whole, false), (parts, true)] {
            let case = Case { dims, slopes, continues: Some((100, rows)), ..Case::default() };
            run::<T>(device, &case, pattern)?;
        }
    }
    Ok(())
}

macro_rules! of_each_kind {
    ($($name:ident, $case:ident::<$kind:ty>;)*) => {$(
        #[test]
        fn $name() -> Result<()> {
            device()?.map_or(Ok(()), |lease| $case::<$kind>(lease.device))
        }
    )*};
}

of_each_kind! {
    every_pattern_equals_the_cpu_in_f32, all::<f32>;
    every_pattern_equals_the_cpu_in_bf16, all::<bf16>;
    every_pattern_equals_the_cpu_in_f16, all::<f16>;
    rows_that_continue_a_document_equal_the_cpu_in_f32, continuing::<f32>;
    rows_that_continue_a_document_equal_the_cpu_in_bf16, continuing::<bf16>;
    rows_that_continue_a_document_equal_the_cpu_in_f16, continuing::<f16>;
    a_long_row_of_equal_scores_weighs_all_alike_in_f32, alike::<f32>;
    a_long_row_of_equal_scores_weighs_all_alike_in_bf16, alike::<bf16>;
}

/// Equal scores over a thousand tiles, of which the first half of the values are ones: what was gathered must not be rescaled by the
/// rounding of a largest score that stays.
fn alike<T: Stored>(device: &Device) -> Result<()> {
    const KEYS: usize = 32_768;
    const WIDTH: usize = 32;
    let filled = |count: usize, value: f32| device.upload(&stored::<T>(&vec![value; count]));
    let (q, k, v) = (filled(WIDTH, 1.0)?, filled(WIDTH, 2.171875)?, filled(WIDTH, 0.0)?);
    let keys = filled(KEYS * WIDTH, 2.171875)?;
    let halves = [vec![1f32; KEYS / 2 * WIDTH], vec![0f32; KEYS / 2 * WIDTH]].concat();
    let of_keys = device.upload(&stored::<T>(&halves))?;
    let rows = Continuations { prefix: vec![KEYS], ..Continuations::default() };
    // Scores of 100.3 in powers of two.
    let prepared = Prepared::continuing(device, [1, 1, 1, 1, WIDTH], KEYS, 1.0003, Pattern::Dense, &rows)?;
    let one = |values| Operand::row_major(values, [1, 1, WIDTH]);
    let own = Own { q: one(q.as_view()), k: one(k.as_view()), v: one(v.as_view()) };
    let many = |values| Operand::row_major(values, [KEYS, 1, WIDTH]);
    let document = Document { k: many(keys.as_view()), v: many(of_keys.as_view()) };
    let (mut out, mut lse) = (device.zeros::<T>(WIDTH)?, device.zeros::<f32>(1)?);
    prepared.forward(device, &own, Some(&document), &mut out, &mut lse)?;
    let got = widened(&device.download(&out)?);
    ensure!(got.iter().all(|value| (value - 0.5).abs() < 2e-3), "expected 0.5, got {}", got[0]);
    Ok(())
}

#[test]
fn the_same_inputs_give_the_same_bytes() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let device = lease.device;
    let dims = [2, 83, 4, 2, 64];
    let prepared = Prepared::new(device, dims, 0.125, Pattern::Dense, &Rows::default())?;
    let q = Tensor::<bf16>::new(device, 2 * 83 * 4 * 64, 1)?;
    let k = Tensor::<bf16>::new(device, 2 * 83 * 2 * 64, 2)?;
    let run = || -> Result<[Vec<bf16>; 4]> {
        let own = Own {
            q: Operand::row_major(q.there.as_view(), [83, 4, 64]),
            k: Operand::row_major(k.there.as_view(), [83, 2, 64]),
            v: Operand::row_major(k.there.as_view(), [83, 2, 64]),
        };
        let (mut out, mut lse) =
            (device.zeros::<bf16>(q.there.len())?, device.zeros::<f32>(q.there.len() / 64)?);
        prepared.forward(device, &own, None, &mut out, &mut lse)?;
        let (mut dq, mut dk, mut dv) = (
            device.zeros::<bf16>(q.there.len())?,
            device.zeros::<bf16>(k.there.len())?,
            device.zeros::<bf16>(k.there.len())?,
        );
        let saved = Mixed { out: out.as_view(), lse: lse.as_view() };
        let d_out = Operand::row_major(q.there.as_view(), [83, 4, 64]);
        let mut into = Gradients { q: dq.as_view_mut(), k: dk.as_view_mut(), v: dv.as_view_mut() };
        prepared.backward(device, &own, None, &saved, &d_out, &mut into)?;
        Ok([device.download(&out)?, device.download(&dq)?, device.download(&dk)?, device.download(&dv)?])
    };
    anyhow::ensure!(run()? == run()?, "two runs differ");
    Ok(())
}
