//! RoPE, norms, losses and the optimiser against the CPU's operations; memory.

use anyhow::{Result, ensure};
use candle_core::{Device as Candle, Tensor};
use half::{bf16, f16};
use megacontext_kernels::adamw::{self as cpu_adamw, AdamW, Untouched};
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::cuda::{Device, Stored, adamw, loss, norm, rope};
use megacontext_kernels::embedding::SparseRows;
use megacontext_kernels::gemm::Products;
use megacontext_kernels::linear::Weight;
use megacontext_kernels::loss as cpu_loss;
use megacontext_kernels::{norm as cpu_norm, rope as cpu_rope};

use crate::support::{close, close_within, device, device_alone, stored, values, widened};
use crate::{attention, rows};

fn rotations<T: Stored>(device: &Device) -> Result<()> {
    // Scalar and vectorised sizes; entries, positions, heads, width, rotated.
    for [entries, positions, heads, width, rotated] in
        [[5, 5, 3, 10, 10], [6, 3, 2, 14, 6], [7, 7, 3, 64, 64], [8, 4, 1, 80, 48], [1, 1, 1, 2, 2]]
    {
        for direction in [1.0, -1.0] {
            let what =
                format!("{entries} entries, {positions} positions, {heads} heads, {rotated} of {width}");
            let x: Vec<T> = stored(&values(entries * heads * width, 1));
            let (cos, sin) = (values(positions * rotated / 2, 2), values(positions * rotated / 2, 3));
            let mut expected = widened(&x);
            cpu_rope::rotate_part(&mut expected, heads, [width, rotated], &cos, &sin, direction);
            let mut got = device.upload(&x)?;
            let (cos, sin) = (device.upload(&cos)?, device.upload(&sin)?);
            rope::rotate(device, &mut got, heads, [width, rotated], [&cos, &sin], direction)?;
            close(&format!("rope, {what}"), &device.download(&got)?, &expected)?;

            let (g, omega) = (values(x.len(), 4), values(rotated / 2, 5));
            let mut sums: Vec<f64> = values(positions, 6).into_iter().map(f64::from).collect();
            let mut got = device.upload(&sums)?;
            cpu_rope::damping_gradient(&widened(&x), &g, heads, width, &omega, &mut sums);
            let (y, g, omega) = (device.upload(&x)?, device.upload(&g)?, device.upload(&omega)?);
            rope::damping_gradient(device, &y, &g, heads, width, &omega, &mut got)?;
            let narrow = |sums: Vec<f64>| sums.into_iter().map(|sum| sum as f32).collect::<Vec<f32>>();
            close_within(&format!("damping, {what}"), &narrow(device.download(&got)?), &narrow(sums), 1e-5)?;
        }
    }
    Ok(())
}

fn norms<X: Stored, Y: Stored>(device: &Device) -> Result<()> {
    const EPS: f32 = 1e-3;
    for [rows, width] in [[5, 37], [7, 1040], [1, 8], [300, 24]] {
        let what = format!("[{rows}, {width}] of {}", X::KIND.name());
        // A mean that is not small against the deviation.
        let x: Vec<X> = stored(&values(rows * width, 1).iter().map(|x| 3.0 * x + 2.0).collect::<Vec<_>>());
        let (gain, bias) = (values(width, 2), values(width, 3));
        let wide = widened(&x);
        let (x, w, b) = (device.upload(&x)?, device.upload(&gain)?, device.upload(&bias)?);
        let mut y = device.zeros::<Y>(rows * width)?;
        let mut expected = vec![0f32; rows * width];
        cpu_norm::rms_forward_into(&wide, &gain, EPS, &mut expected);
        norm::rms_forward(device, &x, &w, EPS, &mut y)?;
        close(&format!("rms, {what}"), &device.download(&y)?, &expected)?;
        cpu_norm::layer_forward_into(&wide, &gain, Some(&bias), EPS, &mut expected);
        norm::layer_forward(device, &x, &w, Some(&b.as_view()), EPS, &mut y)?;
        close(&format!("layer, {what}"), &device.download(&y)?, &expected)?;
        cpu_norm::layer_forward_into(&wide, &gain, None, EPS, &mut expected);
        norm::layer_forward(device, &x, &w, None, EPS, &mut y)?;
        close(&format!("layer without bias, {what}"), &device.download(&y)?, &expected)?;
        if X::KIND != Y::KIND {
            continue;
        }
        let g = values(rows * width, 4);
        let gradient = device.upload(&g)?;
        let (start, sum) = (values(rows * width, 5), values(width, 6));
        for learns in [false, true] {
            let (mut dx, mut dw, mut db) = (start.clone(), sum.clone(), sum.clone());
            let (mut got_x, mut got_w, mut got_b) =
                (device.upload(&dx)?, device.upload(&dw)?, device.upload(&db)?);
            cpu_norm::rms_backward_add(&wide, &gain, &g, EPS, &mut dx, learns.then_some(&mut dw[..]));
            let into = learns.then(|| got_w.as_view_mut());
            norm::rms_backward(device, &x, &w, &gradient, EPS, &mut got_x, into)?;
            close(&format!("rms dx, {what}"), &device.download(&got_x)?, &dx)?;
            close(&format!("rms dw, {what}"), &device.download(&got_w)?, &dw)?;
            let parts = [learns.then_some(&mut dw[..]), learns.then_some(&mut db[..])];
            let [to_w, to_b] = parts;
            cpu_norm::layer_backward_add(&wide, &gain, &g, EPS, &mut dx, to_w, to_b);
            let into = [learns.then(|| got_w.as_view_mut()), learns.then(|| got_b.as_view_mut())];
            norm::layer_backward(device, &x, &w, &gradient, EPS, &mut got_x, into)?;
            close(&format!("layer dx, {what}"), &device.download(&got_x)?, &dx)?;
            close(&format!("layer dw, {what}"), &device.download(&got_w)?, &dw)?;
            close(&format!("layer db, {what}"), &device.download(&got_b)?, &db)?;
            // The bias alone.
            let to_b = learns.then_some(&mut db[..]);
            cpu_norm::layer_backward_add(&wide, &gain, &g, EPS, &mut dx, None, to_b);
            let into = [None, learns.then(|| got_b.as_view_mut())];
            norm::layer_backward(device, &x, &w, &gradient, EPS, &mut got_x, into)?;
            close(&format!("layer db alone, {what}"), &device.download(&got_b)?, &db)?;
        }
    }
    Ok(())
}

/// The head that gives its hidden states as logits.
fn identity(vocab: usize) -> Vec<f32> {
    (0..vocab * vocab).map(|i| if i / vocab == i % vocab { 1.0 } else { 0.0 }).collect()
}

fn losses<T: Stored>(device: &Device) -> Result<()> {
    for (vocab, cap, size) in
        [(1, None, 4.0), (5, Some(15.0), 4.0), (97, None, 90.0), (300, Some(15.0), 40.0)]
    {
        let rows = 4;
        let what = format!("[{rows}, {vocab}], cap {cap:?}");
        let scaled = |seed| values(rows * vocab, seed).iter().map(|x| x * size).collect::<Vec<f32>>();
        let (z, t) = (scaled(1), stored::<T>(&scaled(2)));
        // One that is not scored, one without weight.
        let ids: Vec<u32> =
            (0..rows).map(|r| if r == 1 { cpu_loss::IGNORE } else { (r * 31 % vocab) as u32 }).collect();
        let scales: Vec<f32> = (0..rows).map(|r| if r == 2 { 0.0 } else { 0.5 + 0.25 * r as f32 }).collect();
        let (eye, sizes) = (identity(vocab), [rows, vocab, vocab]);
        let head = cpu_loss::Head { softcap: cap, ..cpu_loss::Head::from(Weight::F32(&eye)) };
        let targets = cpu_loss::Targets { ids: &ids, weights: Some(&scales) };
        let wanted = || cpu_loss::Gradient::Hidden { scale: 1.0 };
        let expected = cpu_loss::head_cross_entropy(&z, head, sizes, targets, wanted(), Products::F32)?;
        let mut logits = device.upload(&z)?;
        let mut got = device.zeros::<f32>(rows)?;
        let on_device = device.upload(&scales)?;
        // The first target belongs to a row before these.
        let mut shifted = vec![0];
        shifted.extend(&ids);
        let targets = loss::Targets::new(device, &shifted, vocab)?;
        loss::cross_entropy(device, &mut logits, &targets, 1, &on_device, cap, &mut got)?;
        close(&format!("nll, {what}"), &device.download(&got)?, &expected.nll)?;
        let gradient = expected.d_hidden.unwrap_or_default();
        close(&format!("nll gradient, {what}"), &device.download(&logits)?, &gradient)?;

        let teacher = cpu_loss::Teacher::Logits(&widened(&t)[..]);
        let expected =
            cpu_loss::head_divergence(&z, head, sizes, teacher, Some(&scales), wanted(), Products::F32)?;
        let mut logits = device.upload(&z)?;
        let teacher = device.upload(&t)?;
        loss::divergence(device, &mut logits, vocab, &teacher, &on_device, cap, &mut got)?;
        close(&format!("kl, {what}"), &device.download(&got)?, &expected.kl)?;
        let gradient = expected.d_hidden.unwrap_or_default();
        close(&format!("kl gradient, {what}"), &device.download(&logits)?, &gradient)?;
    }
    Ok(())
}

macro_rules! on_the_device {
    ($($name:ident, $run:expr;)*) => {$(
        #[test]
        fn $name() -> Result<()> {
            device()?.map_or(Ok(()), |lease| $run(lease.device))
        }
    )*};
}

on_the_device! {
    rope_equals_the_cpu_in_f32, rotations::<f32>;
    rope_equals_the_cpu_in_bf16, rotations::<bf16>;
    rope_equals_the_cpu_in_f16, rotations::<f16>;
    norms_equal_the_cpu_in_f32, norms::<f32, f32>;
    norms_equal_the_cpu_in_bf16, norms::<bf16, bf16>;
    norms_equal_the_cpu_in_f16, norms::<f16, f16>;
    norms_equal_the_cpu_from_f32_to_bf16, norms::<f32, bf16>;
    norms_equal_the_cpu_from_f32_to_f16, norms::<f32, f16>;
    norms_equal_the_cpu_from_bf16_to_f32, norms::<bf16, f32>;
    norms_equal_the_cpu_from_f16_to_f32, norms::<f16, f32>;
    losses_equal_the_cpu_with_a_teacher_in_f32, losses::<f32>;
    losses_equal_the_cpu_with_a_teacher_in_bf16, losses::<bf16>;
    losses_equal_the_cpu_with_a_teacher_in_f16, losses::<f16>;
}

/// A step of AdamW with everything in it.
fn with(step: u64) -> AdamW {
    AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, gradient_scale: 0.5, step }
}

#[test]
fn steps_equal_the_cpu() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let device = lease.device;
    for count in [1usize, 7, 128, 515, 1030] {
        for step in [1, 10] {
            let what = format!("{count} values, step {step}");
            let (p, g, mut m) = (values(count, 1), values(count, 2), values(count, 3));
            let mut v: Vec<f32> = values(count, 4).into_iter().map(f32::abs).collect();
            let [mut got_p, got_g, mut got_m, mut got_v] =
                [device.upload(&p)?, device.upload(&g)?, device.upload(&m)?, device.upload(&v)?];
            let parameter = Tensor::new(&p[..], &Candle::Cpu)?;
            cpu_adamw::step(&parameter, &g, &mut m, &mut v, with(step))?;
            adamw::step(device, &mut got_p, &got_g, [&mut got_m, &mut got_v], &with(step))?;
            close(&format!("p, {what}"), &device.download(&got_p)?, &parameter.to_vec1::<f32>()?)?;
            close(&format!("m, {what}"), &device.download(&got_m)?, &m)?;
            close(&format!("v, {what}"), &device.download(&got_v)?, &v)?;
        }
    }
    Ok(())
}

#[test]
fn steps_of_rows_equal_the_cpu() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let device = lease.device;
    let (vocab, width) = (11, 5);
    let touched: [&[u32]; 3] = [&[], &[0, 3, 10], &[4]];
    for (ids, untouched) in touched.iter().flat_map(|ids| [(ids, Untouched::Step), (ids, Untouched::Leave)]) {
        let what = format!("{ids:?} {untouched:?}");
        let (p, mut m) = (values(vocab * width, 1), values(vocab * width, 3));
        let mut v: Vec<f32> = values(vocab * width, 4).into_iter().map(f32::abs).collect();
        let mut rows = SparseRows::new(width);
        rows.add(ids, &values(ids.len() * width, 2))?;
        let [mut got_p, mut got_m, mut got_v] = [device.upload(&p)?, device.upload(&m)?, device.upload(&v)?];
        let table = Tensor::from_vec(p, (vocab, width), &Candle::Cpu)?;
        cpu_adamw::step_rows(&table, &rows, untouched, &mut m, &mut v, with(3))?;
        let on_device = adamw::TouchedRows::new(device, rows.ids())?;
        // A buffer with room for more rows.
        let mut gradient = rows.values().to_vec();
        gradient.resize(width * 4, f32::NAN);
        let gradient = device.upload(&gradient)?;
        let moments = [&mut got_m, &mut got_v];
        adamw::step_rows(device, &mut got_p, width, &on_device, &gradient, untouched, moments, &with(3))?;
        let expected = table.flatten_all()?.to_vec1::<f32>()?;
        close(&format!("p, {what}"), &device.download(&got_p)?, &expected)?;
        close(&format!("m, {what}"), &device.download(&got_m)?, &m)?;
        close(&format!("v, {what}"), &device.download(&got_v)?, &v)?;
    }
    Ok(())
}

#[test]
fn sums_of_squares_equal_the_cpu() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    for count in [1, 5, 16_384, 40_001] {
        let g = values(count, 1);
        let expected = cpu_adamw::sum_of_squares(&g);
        let got = adamw::sum_of_squares(lease.device, &lease.device.upload(&g)?)?;
        ensure!((got - expected).abs() <= 1e-12 * expected, "{count}: expected {expected}, got {got}");
    }
    Ok(())
}

/// A view that begins at an odd place is read one value at a time.
#[test]
fn views_are_read_where_they_begin() -> Result<()> {
    let Some(lease) = device()? else { return Ok(()) };
    let device = lease.device;
    let (rows, width) = (3, 64);
    let x: Vec<bf16> = stored(&values(1 + rows * width, 1));
    let gain = values(width, 2);
    let mut expected = vec![0f32; rows * width];
    cpu_norm::rms_forward_into(&widened(&x[1..]), &gain, 1e-5, &mut expected);
    let (x, gain) = (device.upload(&x)?, device.upload(&gain)?);
    let mut y = device.zeros::<bf16>(2 + rows * width)?;
    norm::rms_forward(device, &x.slice(1..), &gain, 1e-5, &mut y.slice_mut(1..1 + rows * width))?;
    let got = device.download(&y)?;
    close("y", &got[1..1 + rows * width], &expected)?;
    ensure!(got[0].get() == 0.0 && got[1 + rows * width].get() == 0.0, "values beside the view were written");
    Ok(())
}

#[test]
fn every_allocation_is_given_back() -> Result<()> {
    let Some(lease) = device_alone()? else { return Ok(()) };
    let Some(driver) = lease.emulated else {
        println!("skipped: a GPU's driver does not count allocations");
        return Ok(());
    };
    // SAFETY: the function has this type in driver.cpp.
    let count = unsafe { driver.get::<extern "C" fn() -> usize>(b"emulated_allocations")? };
    ensure!(count() == 0, "{} allocations of other tests", count());
    let case = attention::Case { dims: [2, 40, 4, 2, 32], slopes: true, ..Default::default() };
    attention::run::<bf16>(lease.device, &case, Pattern::ShiftedSparse { group: 16 })?;
    norms::<f32, f32>(lease.device)?;
    losses::<f32>(lease.device)?;
    rows::everything(lease.device)?;
    let held = lease.device.upload(&[1f32, 2.0])?;
    ensure!(adamw::sum_of_squares(lease.device, &held)? == 5.0 && count() == 1, "{} allocations", count());
    // Refusals hold nothing either.
    let refused = norm::rms_forward(lease.device, &held, &held, 0.0, &mut lease.device.zeros::<f32>(3)?);
    ensure!(refused.is_err() && count() == 1, "{} allocations after a refusal", count());
    drop(held);
    ensure!(count() == 0, "{} allocations are left", count());
    Ok(())
}
