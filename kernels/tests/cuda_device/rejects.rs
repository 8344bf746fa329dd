//! Everything that launches refuse, before anything is queued.

use anyhow::{Result, ensure};
use half::{bf16, f16};
use megacontext_kernels::adamw::{AdamW, Untouched};
use megacontext_kernels::attention::prefix::Continuations;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::cuda::attention::{Document, Gradients, Mixed, Operand, Own, Prepared};
use megacontext_kernels::cuda::cudarc::driver::CudaSlice;
use megacontext_kernels::cuda::{Device, adamw, loss, norm, rope};

use crate::support::device;

/// That it is refused with this text.
fn refused<T, E: std::fmt::Display>(result: Result<T, E>, expected: &str) -> Result<()> {
    let Err(error) = result else { anyhow::bail!("expected {expected:?}, was not refused") };
    ensure!(error.to_string() == expected, "expected {expected:?}, got {:?}", error.to_string());
    Ok(())
}

macro_rules! rejects {
    ($($name:ident($device:ident) $body:block)*) => {$(
        #[test]
        fn $name() -> Result<()> {
            let Some(lease) = device()? else { return Ok(()) };
            let $device = lease.device;
            $body
        }
    )*};
}

#[path = "rejects_rows.rs"]
mod of_rows;

const DIMS: [usize; 5] = [2, 9, 4, 2, 16];
const OF_Q: usize = 2 * 9 * 4 * 16;
const OF_KV: usize = 2 * 9 * 2 * 16;
const LSE: usize = 2 * 9 * 4;

fn prepared(device: &Device, dims: [usize; 5], pattern: Pattern, rows: Rows) -> Result<Prepared> {
    Ok(Prepared::new(device, dims, 0.25, pattern, &rows)?)
}

/// Operands of `DIMS`, row-major, from value number `from` of arrays of `count` values.
struct Arrays {
    q: CudaSlice<f32>,
    k: CudaSlice<f32>,
    v: CudaSlice<f32>,
}

impl Arrays {
    fn new(device: &Device) -> Result<Self> {
        Ok(Self { q: device.zeros(OF_Q)?, k: device.zeros(OF_KV)?, v: device.zeros(OF_KV)? })
    }

    fn own(&self) -> Own<'_, f32> {
        Own {
            q: Operand::row_major(self.q.as_view(), [9, 4, 16]),
            k: Operand::row_major(self.k.as_view(), [9, 2, 16]),
            v: Operand::row_major(self.v.as_view(), [9, 2, 16]),
        }
    }
}

/// Forward over `own` with results of the right sizes.
fn forward(device: &Device, own: &Own<'_, f32>) -> Result<()> {
    let prepared = prepared(device, DIMS, Pattern::Dense, Rows::default())?;
    let (mut out, mut lse) = (device.zeros::<f32>(OF_Q)?, device.zeros::<f32>(LSE)?);
    Ok(prepared.forward(device, own, None, &mut out, &mut lse)?)
}

rejects! {
    attention_of_a_width_that_is_no_multiple_of_8(device) {
        refused(prepared(device, [1, 4, 2, 1, 12], Pattern::Dense, Rows::default()),
            "cuda attention: expected a head width that is a multiple of 8, got 12")
    }
    attention_of_a_width_above_256(device) {
        refused(prepared(device, [1, 4, 2, 1, 264], Pattern::Dense, Rows::default()),
            "attention: expected a head width of 1 to 256, got 264")
    }
    attention_without_rows(device) {
        refused(prepared(device, [0, 4, 2, 1, 8], Pattern::Dense, Rows::default()),
            "cuda attention: expected at least one row and one entry, got 0 rows of 4")
    }
    attention_of_heads_that_share_no_kv_head(device) {
        refused(prepared(device, [1, 4, 3, 2, 8], Pattern::Dense, Rows::default()),
            "attention: expected query heads that are a multiple of the kv heads, both at least 1, got 3 query heads and 2 kv heads")
    }
    attention_of_more_heads_than_a_grid_has(device) {
        refused(prepared(device, [1, 1, 65_536, 1, 8], Pattern::Dense, Rows::default()),
            "cuda attention: expected at most 65535 query heads, got 65536")
    }
    attention_of_more_rows_than_a_grid_has(device) {
        refused(prepared(device, [70_000, 1, 1, 1, 8], Pattern::Dense, Rows::default()),
            "cuda attention: expected at most 65535 rows, got 70000")
    }
    attention_of_more_entries_than_an_int_has(device) {
        refused(prepared(device, [1, 1 << 30, 1, 1, 8], Pattern::Dense, Rows::default()),
            "attention: expected at most 1073741823 entries, got 1073741824")
    }
    attention_of_a_group_of_one(device) {
        refused(prepared(device, DIMS, Pattern::ShiftedSparse { group: 1 }, Rows::default()),
            "attention: expected a group of at least 2 entries, got 1")
    }
    attention_of_row_lengths_beyond_the_row(device) {
        let rows = Rows { lengths: Some(vec![9, 10]), segments: None };
        refused(prepared(device, DIMS, Pattern::Dense, rows),
            "attention: row 1: expected a length of at most T = 9, got 10")
    }
    attention_of_segments_that_do_not_ascend(device) {
        let rows = Rows { lengths: None, segments: Some(vec![vec![0, 3, 3], vec![0]]) };
        refused(prepared(device, DIMS, Pattern::Dense, rows),
            "attention: row 0: expected ascending segment starts, got 3 after 3")
    }
    attention_of_a_slope_too_few(device) {
        refused(prepared(device, DIMS, Pattern::Dense, Rows::default())?.with_slopes(device, &[0.5; 3]),
            "attention: expected 4 slopes, one per query head, got 3")
    }
    attention_of_a_position_that_is_not_finite(device) {
        let mut positions = [0.0; 9];
        positions[4] = f32::NAN;
        refused(prepared(device, DIMS, Pattern::Dense, Rows::default())?.with_positions(device, &positions),
            "attention: expected 9 finite positions, one per entry of a row, got NaN")
    }
    attention_of_a_prefix_beyond_the_document(device) {
        let rows = Continuations { prefix: vec![3, 8], ..Continuations::default() };
        refused(Prepared::continuing(device, DIMS, 7, 0.25, Pattern::Dense, &rows),
            "attention: row 1: expected a prefix of at most T = 7, got 8")
    }
    attention_of_rows_that_continue_a_document_both_ways(device) {
        let rows = Continuations { prefix: vec![3, 7], ..Continuations::default() };
        refused(Prepared::continuing(device, DIMS, 7, 0.25, Pattern::Bidirectional, &rows),
            "attention: expected a causal pattern for rows that continue a document, got bidirectional")
    }
    attention_of_positions_after_a_document(device) {
        let rows = Continuations { prefix: vec![3, 7], ..Continuations::default() };
        let prepared = Prepared::continuing(device, DIMS, 7, 0.25, Pattern::Dense, &rows)?;
        refused(prepared.with_positions(device, &[0.0; 9]),
            "cuda attention: expected rows of their own with positions, got rows that continue a document")
    }
    attention_without_its_document(device) {
        let rows = Continuations { prefix: vec![3, 7], ..Continuations::default() };
        let prepared = Prepared::continuing(device, DIMS, 7, 0.25, Pattern::Dense, &rows)?;
        let arrays = Arrays::new(device)?;
        let (mut out, mut lse) = (device.zeros::<f32>(OF_Q)?, device.zeros::<f32>(LSE)?);
        refused(prepared.forward(device, &arrays.own(), None, &mut out, &mut lse),
            "cuda attention: expected a document, got no document")
    }
    attention_with_a_document_of_others(device) {
        let prepared = prepared(device, DIMS, Pattern::Dense, Rows::default())?;
        let arrays = Arrays::new(device)?;
        let (mut out, mut lse) = (device.zeros::<f32>(OF_Q)?, device.zeros::<f32>(LSE)?);
        let document = Document {
            k: Operand::row_major(arrays.k.as_view(), [9, 2, 16]),
            v: Operand::row_major(arrays.v.as_view(), [9, 2, 16]),
        };
        refused(prepared.forward(device, &arrays.own(), Some(&document), &mut out, &mut lse),
            "cuda attention: expected no document, got a document")
    }
    attention_of_a_document_that_is_too_short(device) {
        let rows = Continuations { prefix: vec![3, 7], ..Continuations::default() };
        let prepared = Prepared::continuing(device, DIMS, 19, 0.25, Pattern::Dense, &rows)?;
        let arrays = Arrays::new(device)?;
        let (mut out, mut lse) = (device.zeros::<f32>(OF_Q)?, device.zeros::<f32>(LSE)?);
        let document = Document {
            k: Operand::row_major(arrays.k.as_view(), [19, 2, 16]),
            v: Operand::row_major(arrays.v.as_view(), [19, 2, 16]),
        };
        refused(prepared.forward(device, &arrays.own(), Some(&document), &mut out, &mut lse),
            "cuda attention: expected the document's k of at least 608 values for [1, 19, 2, 16] with strides [608, 32, 16], got 576")
    }
    attention_of_an_operand_that_is_too_short(device) {
        let arrays = Arrays::new(device)?;
        let mut own = arrays.own();
        own.k.values = arrays.k.slice(..OF_KV - 1);
        refused(forward(device, &own),
            "cuda attention: expected k of at least 576 values for [2, 9, 2, 16] with strides [288, 32, 16], got 575")
    }
    attention_of_strides_that_cannot_be_counted(device) {
        let arrays = Arrays::new(device)?;
        let mut own = arrays.own();
        own.v.strides = [usize::MAX, usize::MAX, 16];
        let max = usize::MAX;
        refused(forward(device, &own), &format!(
            "cuda attention: expected v of more than can be counted values for [2, 9, 2, 16] with strides [{max}, {max}, 16], got 576"))
    }
    attention_of_an_operand_that_begins_between(device) {
        let arrays = Arrays::new(device)?;
        let longer = device.zeros::<f32>(OF_Q + 1)?;
        let mut own = arrays.own();
        own.q.values = longer.slice(1..);
        refused(forward(device, &own),
            "cuda attention: expected q at a multiple of 16 bytes, got 4 bytes past one")
    }
    attention_of_entries_that_begin_between(device) {
        let arrays = Arrays::new(device)?;
        let longer = device.zeros::<f32>(2 * 9 * 33)?;
        let mut own = arrays.own();
        own.k = Operand { values: longer.as_view(), strides: [9 * 33 - 1, 33, 16] };
        refused(forward(device, &own),
            "cuda attention: expected k with entries at multiples of 16 bytes, got 132 bytes apart")
    }
    attention_of_results_of_another_size(device) {
        let prepared = prepared(device, DIMS, Pattern::Dense, Rows::default())?;
        let arrays = Arrays::new(device)?;
        let (mut out, mut lse) = (device.zeros::<f32>(OF_Q)?, device.zeros::<f32>(LSE)?);
        let mut short = device.zeros::<f32>(OF_Q - 16)?;
        refused(prepared.forward(device, &arrays.own(), None, &mut short, &mut lse),
            "cuda attention: expected out of 1152 values, got 1136")?;
        let mut short = device.zeros::<f32>(LSE + 1)?;
        refused(prepared.forward(device, &arrays.own(), None, &mut out, &mut short),
            "cuda attention: expected lse of 72 values, got 73")
    }
    attention_of_a_result_that_begins_between(device) {
        let prepared = prepared(device, DIMS, Pattern::Dense, Rows::default())?;
        let arrays = Arrays::new(device)?;
        let (mut out, mut lse) = (device.zeros::<f32>(OF_Q + 2)?, device.zeros::<f32>(LSE)?);
        refused(prepared.forward(device, &arrays.own(), None, &mut out.slice_mut(2..), &mut lse),
            "cuda attention: expected out at a multiple of 16 bytes, got 8 bytes past one")
    }
    attention_of_gradients_of_another_size(device) {
        let prepared = prepared(device, DIMS, Pattern::Dense, Rows::default())?;
        let arrays = Arrays::new(device)?;
        let (out, lse) = (device.zeros::<f32>(OF_Q)?, device.zeros::<f32>(LSE)?);
        let (mut dq, mut dk, mut dv) =
            (device.zeros::<f32>(OF_Q)?, device.zeros::<f32>(OF_KV)?, device.zeros::<f32>(OF_KV - 1)?);
        let saved = || Mixed { out: out.as_view(), lse: lse.as_view() };
        let d_out = Operand::row_major(out.as_view(), [9, 4, 16]);
        let mut into = Gradients { q: dq.as_view_mut(), k: dk.as_view_mut(), v: dv.as_view_mut() };
        refused(prepared.backward(device, &arrays.own(), None, &saved(), &d_out, &mut into),
            "cuda attention: expected dv of 576 values, got 575")?;
        let mut dv = device.zeros::<f32>(OF_KV)?;
        let mut into = Gradients { q: dq.as_view_mut(), k: dk.as_view_mut(), v: dv.as_view_mut() };
        let d_out = Operand::row_major(out.slice(16..), [9, 4, 16]);
        refused(prepared.backward(device, &arrays.own(), None, &saved(), &d_out, &mut into),
            "cuda attention: expected d_out of at least 1152 values for [2, 9, 4, 16] with strides [576, 64, 16], got 1136")?;
        let d_out = Operand::row_major(out.as_view(), [9, 4, 16]);
        let short = Mixed { out: out.slice(1..), lse: lse.as_view() };
        refused(prepared.backward(device, &arrays.own(), None, &short, &d_out, &mut into),
            "cuda attention: expected out of 1152 values, got 1151")
    }

    rope_of_an_odd_part(device) {
        let (mut x, table) = (device.zeros::<f32>(24)?, device.zeros::<f32>(6)?);
        refused(rope::rotate(device, &mut x, 2, [6, 5], [&table, &table], 1.0),
            "cuda rope: expected at least one head, and an even number of rotated values of 2 up to its width, got 2 heads, 5 of 6 values")
    }
    rope_of_more_than_a_head(device) {
        let (mut x, table) = (device.zeros::<f32>(24)?, device.zeros::<f32>(8)?);
        refused(rope::rotate(device, &mut x, 2, [6, 8], [&table, &table], 1.0),
            "cuda rope: expected at least one head, and an even number of rotated values of 2 up to its width, got 2 heads, 8 of 6 values")
    }
    rope_of_part_of_an_entry(device) {
        let (mut x, table) = (device.zeros::<f32>(23)?, device.zeros::<f32>(6)?);
        refused(rope::rotate(device, &mut x, 2, [6, 6], [&table, &table], 1.0),
            "cuda rope: expected x of whole rows of 12 values, at least one value in each, got 23 values")
    }
    rope_of_tables_of_part_of_a_position(device) {
        let (mut x, table) = (device.zeros::<f32>(24)?, device.zeros::<f32>(7)?);
        refused(rope::rotate(device, &mut x, 2, [6, 6], [&table, &table], 1.0),
            "cuda rope: expected tables of whole rows of 3 values, at least one value in each, got 7 values")
    }
    rope_of_tables_that_differ(device) {
        let mut x = device.zeros::<f32>(24)?;
        let (cos, sin) = (device.zeros::<f32>(6)?, device.zeros::<f32>(3)?);
        refused(rope::rotate(device, &mut x, 2, [6, 6], [&cos, &sin], 1.0),
            "cuda rope: expected sin of 6 values, got 3")
    }
    rope_of_empty_tables(device) {
        let (mut x, table) = (device.zeros::<f32>(24)?, device.zeros::<f32>(6)?);
        let none = table.slice(..0);
        refused(rope::rotate(device, &mut x, 2, [6, 6], [&none, &none], 1.0),
            "cuda rope: expected tables of at least one position, got none")
    }
    rope_in_no_direction(device) {
        let (mut x, table) = (device.zeros::<f32>(24)?, device.zeros::<f32>(6)?);
        refused(rope::rotate(device, &mut x, 2, [6, 6], [&table, &table], 0.5),
            "cuda rope: direction: expected 1 or -1, got 0.5")
    }
    damping_of_a_gradient_of_another_size(device) {
        let (y, g, omega) = (device.zeros::<f32>(24)?, device.zeros::<f32>(12)?, device.zeros::<f32>(3)?);
        let mut sums = device.zeros::<f64>(2)?;
        refused(rope::damping_gradient(device, &y, &g, 2, 6, &omega, &mut sums),
            "cuda rope: expected the gradient of 24 values, got 12")?;
        let omega = device.zeros::<f32>(4)?;
        refused(rope::damping_gradient(device, &y, &y, 2, 6, &omega, &mut sums),
            "cuda rope: expected at least one head, and an even number of rotated values of 2 up to its width, got 2 heads, 8 of 6 values")
    }

    norm_of_part_of_a_row(device) {
        let (x, gain, mut y) = (device.zeros::<f32>(23)?, device.zeros::<f32>(8)?, device.zeros::<f32>(23)?);
        refused(norm::rms_forward(device, &x, &gain, 1e-5, &mut y),
            "cuda rms_norm: expected x of whole rows of 8 values, at least one value in each, got 23 values")
    }
    norm_without_a_gain(device) {
        let (x, mut y) = (device.zeros::<f32>(24)?, device.zeros::<f32>(24)?);
        refused(norm::layer_forward(device, &x, &x.slice(..0), None, 1e-5, &mut y),
            "cuda layer_norm: expected x of whole rows of 0 values, at least one value in each, got 24 values")
    }
    norm_of_a_result_of_another_size(device) {
        let (x, gain, mut y) = (device.zeros::<f32>(24)?, device.zeros::<f32>(8)?, device.zeros::<f32>(16)?);
        refused(norm::layer_forward(device, &x, &gain, None, 1e-5, &mut y),
            "cuda layer_norm: expected y of 24 values, got 16")
    }
    norm_of_a_bias_of_another_size(device) {
        let (x, gain, mut y) = (device.zeros::<f32>(24)?, device.zeros::<f32>(8)?, device.zeros::<f32>(24)?);
        refused(norm::layer_forward(device, &x, &gain, Some(&x.as_view()), 1e-5, &mut y),
            "cuda layer_norm: expected the bias of 8 values, got 24")
    }
    norm_from_bf16_to_f16(device) {
        let (x, gain, mut y) = (device.zeros::<bf16>(24)?, device.zeros::<f32>(8)?, device.zeros::<f16>(24)?);
        refused(norm::rms_forward(device, &x, &gain, 1e-5, &mut y),
            "cuda rms_norm: expected y stored as x is, or one of the two in f32, got bf16 to f16")
    }
    norm_of_gradients_of_another_size(device) {
        let (x, gain) = (device.zeros::<f32>(24)?, device.zeros::<f32>(8)?);
        let (mut dx, mut sum, short) = (device.zeros::<f32>(24)?, device.zeros::<f32>(7)?, device.zeros::<f32>(23)?);
        refused(norm::rms_backward(device, &x, &gain, &short, 1e-5, &mut dx, None),
            "cuda rms_norm: expected the gradient of y of 24 values, got 23")?;
        refused(norm::rms_backward(device, &x, &gain, &x, 1e-5, &mut device.zeros::<f32>(8)?, None),
            "cuda rms_norm: expected the gradient of x of 24 values, got 8")?;
        refused(norm::layer_backward(device, &x, &gain, &x, 1e-5, &mut dx, [None, Some(sum.as_view_mut())]),
            "cuda layer_norm: expected the gradient of the bias of 8 values, got 7")
    }
    norm_of_sums_that_do_not_fit(device) {
        const WIDTH: usize = 200_000;
        let x = device.zeros::<f32>(WIDTH)?;
        let (mut dx, mut sum) = (device.zeros::<f32>(WIDTH)?, device.zeros::<f32>(WIDTH)?);
        let result = norm::rms_backward(device, &x, &x, &x, 1e-5, &mut dx, Some(sum.as_view_mut()));
        let error = result.err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(error.starts_with("cuda rms_norm: expected a width of at most ") && error.ends_with(", got 200000"), "{error}");
        Ok(())
    }

    loss_of_a_target_outside_the_vocabulary(device) {
        refused(loss::Targets::new(device, &[0, loss::IGNORE, 7], 7), "cuda loss: target: expected below 7, got 7")
    }
    loss_of_fewer_targets_than_rows(device) {
        let (mut z, scales, mut losses) = (device.zeros::<f32>(21)?, device.zeros::<f32>(3)?, device.zeros::<f32>(3)?);
        let targets = loss::Targets::new(device, &[0, 1, 2, 3], 7)?;
        refused(loss::cross_entropy(device, &mut z, &targets, 2, &scales, None, &mut losses),
            "cuda loss: expected targets for 3 rows, got 2 of 4 from number 2 on")?;
        refused(loss::cross_entropy(device, &mut z, &targets, 9, &scales, None, &mut losses),
            "cuda loss: expected targets for 3 rows, got 0 of 4 from number 9 on")
    }
    loss_of_part_of_a_row(device) {
        let (mut z, scales, mut losses) = (device.zeros::<f32>(20)?, device.zeros::<f32>(3)?, device.zeros::<f32>(3)?);
        let targets = loss::Targets::new(device, &[0, 1, 2], 7)?;
        refused(loss::cross_entropy(device, &mut z, &targets, 0, &scales, None, &mut losses),
            "cuda loss: expected logits of whole rows of 7 values, at least one value in each, got 20 values")
    }
    loss_of_sizes_that_differ(device) {
        let (mut z, three, two) = (device.zeros::<f32>(21)?, device.zeros::<f32>(3)?, device.zeros::<f32>(2)?);
        let mut losses = device.zeros::<f32>(3)?;
        let targets = loss::Targets::new(device, &[0, 1, 2], 7)?;
        refused(loss::cross_entropy(device, &mut z, &targets, 0, &two, None, &mut losses),
            "cuda loss: expected scales of 3 values, got 2")?;
        let mut short = device.zeros::<f32>(2)?;
        refused(loss::cross_entropy(device, &mut z, &targets, 0, &three, None, &mut short),
            "cuda loss: expected losses of 3 values, got 2")?;
        refused(loss::divergence(device, &mut z, 7, &three, &three, None, &mut losses),
            "cuda loss: expected the teacher's logits of 21 values, got 3")
    }
    loss_of_a_cap_of_nothing(device) {
        let (mut z, scales, mut losses) = (device.zeros::<f32>(21)?, device.zeros::<f32>(3)?, device.zeros::<f32>(3)?);
        let teacher = device.zeros::<f32>(21)?;
        for (cap, name) in [(0.0, "0"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
            refused(loss::divergence(device, &mut z, 7, &teacher, &scales, Some(cap), &mut losses),
                &format!("cuda loss: softcap: expected above 0, got {name}"))?;
        }
        Ok(())
    }

    a_step_of_sizes_that_differ(device) {
        let [mut p, g, mut m, mut v] = [device.zeros::<f32>(8)?, device.zeros::<f32>(7)?, device.zeros::<f32>(8)?, device.zeros::<f32>(6)?];
        refused(adamw::step(device, &mut p, &g, [&mut m, &mut v], &STEP),
            "cuda adamw: expected the gradient of 8 values, got 7")?;
        let g = device.zeros::<f32>(8)?;
        refused(adamw::step(device, &mut p, &g, [&mut m, &mut v], &STEP),
            "cuda adamw: expected the second moment of 8 values, got 6")
    }
    a_step_on_values_that_begin_between(device) {
        let [mut p, g, mut m, mut v] = [device.zeros::<f32>(8)?, device.zeros::<f32>(9)?, device.zeros::<f32>(8)?, device.zeros::<f32>(8)?];
        refused(adamw::step(device, &mut p, &g.slice(1..), [&mut m, &mut v], &STEP),
            "cuda adamw: expected the gradient at a multiple of 16 bytes, got 4 bytes past one")
    }
    a_step_of_rows_that_do_not_ascend(device) {
        refused(adamw::TouchedRows::new(device, &[1, 4, 4]), "cuda adamw: expected ascending rows, got 4 after 4")
    }
    a_step_of_a_row_outside_the_table(device) {
        let [mut p, g, mut m, mut v] = [device.zeros::<f32>(8)?, device.zeros::<f32>(4)?, device.zeros::<f32>(8)?, device.zeros::<f32>(8)?];
        let rows = adamw::TouchedRows::new(device, &[1, 4])?;
        refused(adamw::step_rows(device, &mut p, 2, &rows, &g, Untouched::Leave, [&mut m, &mut v], &STEP),
            "cuda adamw: row: expected below 4, got 4")
    }
    a_step_of_fewer_gradients_than_rows(device) {
        let [mut p, g, mut m, mut v] = [device.zeros::<f32>(8)?, device.zeros::<f32>(3)?, device.zeros::<f32>(8)?, device.zeros::<f32>(8)?];
        let rows = adamw::TouchedRows::new(device, &[1, 3])?;
        refused(adamw::step_rows(device, &mut p, 2, &rows, &g, Untouched::Leave, [&mut m, &mut v], &STEP),
            "cuda adamw: expected a gradient of at least 4 values, got 3")
    }
    a_step_of_part_of_a_row(device) {
        let [mut p, g, mut m, mut v] = [device.zeros::<f32>(8)?, device.zeros::<f32>(3)?, device.zeros::<f32>(8)?, device.zeros::<f32>(8)?];
        let rows = adamw::TouchedRows::new(device, &[])?;
        refused(adamw::step_rows(device, &mut p, 3, &rows, &g, Untouched::Leave, [&mut m, &mut v], &STEP),
            "cuda adamw: expected the table of whole rows of 3 values, at least one value in each, got 8 values")
    }

    memory_for_nothing(device) {
        refused(device.zeros::<f32>(0), "CUDA: expected memory for at least one value, got none")?;
        refused(device.upload::<f32>(&[]), "CUDA: expected memory for at least one value, got none")
    }
    memory_beyond_the_device(device) {
        let error = device.zeros::<f32>(1 << 46).err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(error.starts_with("CUDA: allocating 281474976710656 bytes: CUDA_ERROR_OUT_OF_MEMORY"), "{error}");
        Ok(())
    }
    a_device_that_is_not_there(_device) {
        let error = Device::open(4_000).err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(error.starts_with("CUDA: expected a device number below ") && error.ends_with(", got 4000"), "{error}");
        Ok(())
    }
}

const STEP: AdamW =
    AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0, gradient_scale: 1.0, step: 1 };
