//! Linear layers with dropout, PiSSA, DoRA and trained weights against the CPU's, over the operands as they are stored.

use anyhow::{Result, ensure};
use half::{bf16, f16};
use megacontext_kernels::cuda::linear::{
    Dora, FactorGradients, Factors, Layer, LayerGradients, Lora, Products, Saved, row_norms,
};
use megacontext_kernels::cuda::{Device, Stored};
use megacontext_kernels::gemm::Products as CpuProducts;
use megacontext_kernels::linear::{self as cpu, Dropout, LoraSlices, Scratch, Weight};

use crate::linear::products;
use crate::support::{bound, close_within, device_alone, stored, values, widened};

/// What lies beside the weight.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Beside {
    Nothing,
    Lora,
    Pissa,
    Dora,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    beside: Beside,
    dropout: bool,
    /// Results and the gradient of x are added to what is there.
    accumulate: bool,
    /// drop(x)·Aᵀ is kept.
    kept: bool,
}

const CASES: [Case; 10] = {
    const fn case(beside: Beside, dropout: bool, accumulate: bool, kept: bool) -> Case {
        Case { beside, dropout, accumulate, kept }
    }
    [
        case(Beside::Nothing, false, false, false),
        case(Beside::Nothing, false, true, false),
        case(Beside::Lora, false, true, true),
        case(Beside::Lora, true, false, true),
        case(Beside::Lora, true, true, false),
        case(Beside::Pissa, false, false, true),
        case(Beside::Pissa, true, true, false),
        case(Beside::Dora, false, false, false),
        case(Beside::Dora, false, true, true),
        case(Beside::Dora, true, true, false),
    ]
};

const SCALE: f32 = 1.5;

fn layer<T: Stored, Y: Stored>(
    device: &Device,
    products: &Products,
    [n, out, inp, r]: [usize; 4],
    case: Case,
) -> Result<()> {
    let what = format!("[{n}, {inp}] to {out}, rank {r}, {} to {}, {case:?}", T::KIND.name(), Y::KIND.name());
    let make = |count: usize, seed| -> (Vec<T>, Vec<f32>) {
        let made: Vec<T> = stored(&values(count, seed));
        let wide = widened(&made);
        (made, wide)
    };
    let ((x, wide_x), (w, wide_w), (g, wide_g)) = (make(n * inp, 1), make(out * inp, 2), make(n * out, 3));
    let ((a, wide_a), (b, wide_b)) = (make(r * inp, 4), make(out * r, 5));
    let ((a0, wide_a0), (b0, wide_b0)) = (make(r * inp, 6), make(out * r, 7));
    let dropout = case.dropout.then_some(Dropout { p: 0.4, seed: 77 });
    let (weight, shape) = (Weight::F32(&wide_w), [out, inp]);

    let [x, w, g, a, b, a0, b0] = [
        device.upload(&x)?,
        device.upload(&w)?,
        device.upload(&g)?,
        device.upload(&a)?,
        device.upload(&b)?,
        device.upload(&a0)?,
        device.upload(&b0)?,
    ];
    let [x, w, g, a, b, a0, b0] = [&x, &w, &g, &a, &b, &a0, &b0].map(|memory| memory.as_view());
    let on_device = Lora { a: &a, b: &b, rank: r, scale: SCALE, dropout, initial: None, dora: None };
    let on_cpu =
        LoraSlices { a: &wide_a, b: &wide_b, rank: r, scale: SCALE, dropout, initial: None, dora: None };

    let (mut norms, magnitudes) = (vec![0f32; out], values(out, 8));
    cpu::row_norms(weight, shape, &on_cpu, &mut norms);
    let mut memory = device.zeros::<f32>(out)?;
    let plain = Layer { weight: &w, shape, lora: Some(on_device) };
    row_norms(device, products, &plain, &mut memory.as_view_mut())?;
    close_within(&format!("lengths, {what}"), &device.download(&memory)?, &norms, 1e-5)?;
    let scales: Vec<f32> = magnitudes.iter().zip(&norms).map(|(m, n)| (2.0 + m) / n).collect();
    let of_scales = device.upload(&scales)?;
    let (of_scales, of_norms) = (of_scales.as_view(), memory.as_view());

    let (dora, initial) = (case.beside == Beside::Dora, case.beside == Beside::Pissa);
    let on_cpu = LoraSlices {
        initial: initial.then_some(cpu::Factors { a: &wide_a0, b: &wide_b0 }),
        dora: dora.then_some(cpu::Dora { scale: &scales, norms: &norms }),
        ..on_cpu
    };
    let on_device = Lora {
        initial: initial.then_some(Factors { a: &a0, b: &b0 }),
        dora: dora.then_some(Dora { scale: &of_scales, norms: &of_norms }),
        ..on_device
    };
    let lora = case.beside != Beside::Nothing;
    let on_cpu = cpu::Layer { weight, out, inp, lora: lora.then_some(on_cpu), products: CpuProducts::F32 };
    let on_device = Layer { weight: &w, shape, lora: lora.then_some(on_device) };

    let before: Vec<Y> = stored(&values(n * out, 9));
    let mut expected = widened(&before);
    on_cpu.forward(&wide_x, &mut expected, case.accumulate, &mut Scratch::default());
    // What is not added to is not read.
    let mut y = device.upload(&if case.accumulate { before } else { vec![Y::put(f32::NAN); n * out] })?;
    let mut h = device.zeros::<T>(n * r)?;
    let mut room = h.as_view_mut();
    let room = (lora && case.kept).then_some(&mut room);
    on_device.forward(device, products, &x, room, &mut y.as_view_mut(), case.accumulate)?;
    let bound = bound(T::KIND);
    close_within(&format!("y, {what}"), &device.download(&y)?, &expected, bound)?;

    let starts = [(n * inp, 10), (out * inp, 11), (r * inp, 12), (out * r, 13), (out, 14)];
    let [mut dx, mut dw, mut da, mut db, mut dm] = starts.map(|(count, seed)| values(count, seed));
    let got_x = if case.accumulate { dx.clone() } else { vec![f32::NAN; n * inp] };
    let [mut got_x, mut got_w, mut got_a, mut got_b, mut got_m] = [
        device.upload(&got_x)?,
        device.upload(&dw)?,
        device.upload(&da)?,
        device.upload(&db)?,
        device.upload(&dm)?,
    ];
    let into = cpu::LayerGradients {
        weight: Some(&mut dw),
        a: lora.then_some(&mut da),
        b: lora.then_some(&mut db),
        magnitude: dora.then_some(&mut dm),
    };
    on_cpu.backward(&wide_x, &wide_g, Some((&mut dx, case.accumulate)), into, &mut Scratch::default());
    {
        let (mut into_w, mut into_a) = (got_w.as_view_mut(), got_a.as_view_mut());
        let (mut into_b, mut into_m) = (got_b.as_view_mut(), got_m.as_view_mut());
        let into = LayerGradients {
            weight: Some(&mut into_w),
            factors: lora.then_some(FactorGradients { a: &mut into_a, b: &mut into_b }),
            magnitude: dora.then_some(&mut into_m),
        };
        let view = h.as_view();
        let saved = Saved { x: &x, reduced: (lora && case.kept).then_some(&view), gradient: &g };
        let dx = Some((&mut got_x.as_view_mut(), case.accumulate));
        on_device.backward(device, products, saved, dx, into)?;
    }
    let results =
        [("dx", got_x, dx), ("dW", got_w, dw), ("dA", got_a, da), ("dB", got_b, db), ("dm", got_m, dm)];
    for (name, got, expected) in results {
        close_within(&format!("{name}, {what}"), &device.download(&got)?, &expected, bound)?;
    }
    Ok(())
}

#[test]
fn layers_equal_the_cpu() -> Result<()> {
    let Some(lease) = device_alone()? else { return Ok(()) };
    let Some((products, _emulated)) = products(&lease)? else { return Ok(()) };
    let device = lease.device;
    // All rows at once, then two at a time and the last one alone.
    for (products, sizes) in [
        (products, vec![[5, 7, 11, 3], [16, 24, 8, 8], [2, 64, 32, 16]]),
        (Products::open(device)?.holding(2 * 11), vec![[5, 11, 11, 3], [5, 8, 16, 4]]),
    ] {
        for (sizes, case) in sizes.into_iter().flat_map(|sizes| CASES.map(|case| (sizes, case))) {
            layer::<f32, f32>(device, &products, sizes, case)?;
            layer::<bf16, bf16>(device, &products, sizes, case)?;
            layer::<bf16, f32>(device, &products, sizes, case)?;
            layer::<f16, f16>(device, &products, sizes, case)?;
        }
    }
    Ok(())
}

/// Factors that have not moved from PiSSA's initial ones leave the weight as it is, to the byte.
#[test]
fn initial_factors_take_themselves_off() -> Result<()> {
    let Some(lease) = device_alone()? else { return Ok(()) };
    let Some((products, _emulated)) = products(&lease)? else { return Ok(()) };
    let device = lease.device;
    let [n, out, inp, r] = [6, 9, 13, 4];
    let made = |count, seed| device.upload(&stored::<bf16>(&values(count, seed)));
    let [x, w, a, b] = [made(n * inp, 1)?, made(out * inp, 2)?, made(r * inp, 3)?, made(out * r, 4)?];
    let [x, w, a, b] = [&x, &w, &a, &b].map(|memory| memory.as_view());
    let initial = Some(Factors { a: &a, b: &b });
    let lora = Lora { a: &a, b: &b, rank: r, scale: 64.0, dropout: None, initial, dora: None };
    let bare = Layer { weight: &w, shape: [out, inp], lora: None };
    let mut results = [device.zeros::<bf16>(n * out)?, device.zeros::<bf16>(n * out)?];
    for (layer, y) in [bare, Layer { lora: Some(lora), ..bare }].into_iter().zip(&mut results) {
        layer.forward(device, &products, &x, None, &mut y.as_view_mut(), false)?;
    }
    let [bare, with] = [device.download(&results[0])?, device.download(&results[1])?];
    ensure!(bare == with, "{bare:?} without, {with:?} with the factors");
    Ok(())
}

/// Nothing comes out of no outputs, and a gradient that is written over becomes zero.
#[test]
fn layers_without_outputs_have_a_gradient_of_zero() -> Result<()> {
    let Some(lease) = device_alone()? else { return Ok(()) };
    let Some((products, _emulated)) = products(&lease)? else { return Ok(()) };
    let device = lease.device;
    let memory = device.upload(&values(6, 1))?;
    let (x, none) = (memory.as_view(), memory.slice(..0));
    let layer = Layer { weight: &none, shape: [0, 3], lora: None };
    for (accumulate, expected) in [(true, values(6, 2)), (false, vec![0.0; 6])] {
        let mut dx = device.upload(&values(6, 2))?;
        let saved = Saved { x: &x, reduced: None, gradient: &none };
        let into = Some((&mut dx.as_view_mut(), accumulate));
        layer.backward(device, &products, saved, into, LayerGradients::default())?;
        ensure!(device.download(&dx)? == expected, "accumulate {accumulate}");
    }
    Ok(())
}
