//! Linear layers with LoRA over cuBLASLt, or over its loops on the emulated driver.

use anyhow::{Context, Result, ensure};
use half::{bf16, f16};
use libloading::os::unix::{Library, Symbol};
use megacontext_kernels::cuda::cudarc::driver::CudaView;
use megacontext_kernels::cuda::linear::{
    Dora, FactorGradients, Factors, Layer, LayerGradients, Lora, Products, Saved,
};
use megacontext_kernels::cuda::{Device, Stored};
use megacontext_kernels::linear::Dropout;

use crate::support::{Lease, bound, close_within, compiled, device_alone, preload, stored, values, widened};

/// cuBLASLt in plain loops; none without a compiler.
pub fn emulated() -> Result<Option<Library>> {
    compiled("cublaslt", "libcublasLt.so.12")?.map(|path| preload(&path)).transpose()
}

/// The products, and the emulated library where the device is emulated.
pub fn products<G>(lease: &Lease<'_, G>) -> Result<Option<(Products, Option<Library>)>> {
    let emulated = match lease.emulated {
        None => None,
        Some(_) => match emulated()? {
            None => return Ok(None),
            found => found,
        },
    };
    match Products::open(lease.device) {
        Ok(products) => Ok(Some((products, emulated))),
        Err(error) if emulated.is_none() && error.to_string().contains("no cuBLASLt") => {
            eprintln!("skipped: {error}");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// c [m, n] += factor·a·b in f64; `a` and `b` say how their values are found.
fn add(
    c: &mut [f64],
    [m, n, k]: [usize; 3],
    factor: f64,
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
) {
    for i in 0..m {
        for j in 0..n {
            let sum: f64 = (0..k).map(|l| f64::from(a(i, l)) * f64::from(b(l, j))).sum();
            c[i * n + j] += factor * sum;
        }
    }
}

/// LoRA and nothing else.
pub fn plain<'a, T>(a: &'a CudaView<'a, T>, b: &'a CudaView<'a, T>, rank: usize, scale: f32) -> Lora<'a, T> {
    Lora { a, b, rank, scale, dropout: None, initial: None, dora: None }
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|x| *x as f32).collect()
}

/// Forward and backward of one shape against f64 over operands as they are stored; `alone`, gradients of x and of the factors come from
/// calls of their own, and x begins between two multiples of four bytes.
fn layer<T: Stored, Y: Stored>(
    device: &Device,
    products: &Products,
    [n, out, inp, r]: [usize; 4],
    alone: bool,
) -> Result<()> {
    let what = format!("[{n}, {inp}] to {out}, rank {r}, {} to {}", T::KIND.name(), Y::KIND.name());
    let scale = 1.5;
    let make = |count: usize, seed| -> (Vec<T>, Vec<f32>) {
        let made: Vec<T> = stored(&values(count, seed));
        let wide = widened(&made);
        (made, wide)
    };
    let ((x, wx), (w, ww), (g, wg)) = (make(n * inp, 1), make(out * inp, 2), make(n * out, 3));
    let ((a, wa), (b, wb)) = (make(r * inp, 4), make(out * r, 5));
    let mut h = vec![0f64; n * r];
    add(&mut h, [n, r, inp], 1.0, |i, l| wx[i * inp + l], |l, j| wa[j * inp + l]);
    let mut y = vec![0f64; n * out];
    add(&mut y, [n, out, inp], 1.0, |i, l| wx[i * inp + l], |l, j| ww[j * inp + l]);
    add(&mut y, [n, out, r], scale, |i, l| h[i * r + l] as f32, |l, j| wb[j * r + l]);

    let (memory_w, memory_g) = (device.upload(&w)?, device.upload(&g)?);
    let memory_b = device.upload(if r > 0 { &b } else { &x })?;
    let dx0 = values(n * inp, 6);
    let before = usize::from(alone);
    let memory_x = device.upload(&[&x[..before], &x[..]].concat())?;
    let memory_a = device.upload(if r > 0 { &a } else { &x })?;
    let view_x = memory_x.try_slice(before..).context("a view")?;
    let (view_w, view_g) = (memory_w.as_view(), memory_g.as_view());
    let (view_a, view_b) = (memory_a.as_view(), memory_b.as_view());
    let lora = (r > 0).then_some(plain(&view_a, &view_b, r, scale as f32));
    let layer = Layer { weight: &view_w, shape: [out, inp], lora };
    let mut got_h = device.zeros::<T>((n * r).max(1))?;
    // What was there is not read.
    let mut got_y = device.upload(&vec![Y::put(f32::NAN); n * out])?;
    let mut room = got_h.as_view_mut();
    layer.forward(
        device,
        products,
        &view_x,
        (r > 0).then_some(&mut room),
        &mut got_y.as_view_mut(),
        false,
    )?;
    // Gradients, and perhaps y, are f32; what was stored in between was not.
    let bound = bound(T::KIND);
    close_within(&format!("y, {what}"), &device.download(&got_y)?, &narrow(&y), bound)?;

    let mut t = vec![0f64; n * r];
    add(&mut t, [n, r, out], 1.0, |i, l| wg[i * out + l], |l, j| wb[l * r + j]);
    let (a0, b0) = (values(r * inp, 7), values(out * r, 8));
    let wide = |of: &[f32]| of.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
    let (mut dx, mut da, mut db) = (wide(&dx0), wide(&a0), wide(&b0));
    add(&mut dx, [n, inp, out], 1.0, |i, l| wg[i * out + l], |l, j| ww[l * inp + j]);
    add(&mut dx, [n, inp, r], scale, |i, l| t[i * r + l] as f32, |l, j| wa[l * inp + j]);
    add(&mut da, [r, inp, n], scale, |i, l| t[l * r + i] as f32, |l, j| wx[l * inp + j]);
    add(&mut db, [out, r, n], scale, |i, l| wg[l * out + i], |l, j| h[l * r + j] as f32);

    let mut dw = wide(&values(out * inp, 9));
    let mut got_w = device.upload(&narrow(&dw))?;
    add(&mut dw, [out, inp, n], 1.0, |i, l| wg[l * out + i], |l, j| wx[l * inp + j]);

    let mut got_dx = device.upload(&dx0)?;
    let view_h = got_h.as_view();
    let saved = Saved { x: &view_x, reduced: (r > 0).then_some(&view_h), gradient: &view_g };
    let (mut into_x, mut into_w) = (got_dx.as_view_mut(), got_w.as_view_mut());
    if r == 0 {
        let into = LayerGradients { weight: Some(&mut into_w), ..LayerGradients::default() };
        layer.backward(device, products, saved, Some((&mut into_x, true)), into)?;
        close_within(&format!("dW, {what}"), &device.download(&got_w)?, &narrow(&dw), bound)?;
        return close_within(&format!("dx, {what}"), &device.download(&got_dx)?, &narrow(&dx), bound);
    }
    let (mut got_a, mut got_b) = (device.upload(&a0)?, device.upload(&b0)?);
    let (mut into_a, mut into_b) = (got_a.as_view_mut(), got_b.as_view_mut());
    let factors = Some(FactorGradients { a: &mut into_a, b: &mut into_b });
    if alone {
        layer.backward(device, products, saved, Some((&mut into_x, true)), LayerGradients::default())?;
        // x·Aᵀ is made again.
        let saved = Saved { reduced: None, ..saved };
        let into = LayerGradients { factors, ..LayerGradients::default() };
        layer.backward(device, products, saved, None, into)?;
    } else {
        let into = LayerGradients { factors, ..LayerGradients::default() };
        layer.backward(device, products, saved, Some((&mut into_x, true)), into)?;
    }
    for (name, got, expected) in [("dx", &got_dx, &dx), ("dA", &got_a, &da), ("dB", &got_b, &db)] {
        let got = device.download(got)?;
        close_within(&format!("{name}, {what}"), &got, &narrow(expected), bound)?;
    }
    Ok(())
}

#[test]
fn linear_layers() -> Result<()> {
    let Some(lease) = device_alone()? else { return Ok(()) };
    let Some((products, emulated)) = products(&lease)? else { return Ok(()) };
    let device = lease.device;
    for shape in [[5, 7, 11, 3], [16, 24, 8, 8], [1, 2, 3, 1], [33, 16, 40, 0], [2, 64, 32, 16]] {
        for alone in [false, true] {
            layer::<f32, f32>(device, &products, shape, alone)?;
            layer::<bf16, bf16>(device, &products, shape, alone)?;
            layer::<bf16, f32>(device, &products, shape, alone)?;
            layer::<f16, f16>(device, &products, shape, alone)?;
            layer::<f16, f32>(device, &products, shape, alone)?;
        }
    }
    drop(products);
    if let Some(library) = emulated {
        // SAFETY: the library is `cu/emulate/cublaslt.cpp`, and this is the function's type.
        let objects: Symbol<unsafe extern "C" fn() -> std::ffi::c_long> =
            unsafe { library.get(b"emulated_cublaslt_objects") }?;
        // SAFETY: it reads a counter.
        let left = unsafe { objects() };
        ensure!(left == 0, "{left} objects of cuBLASLt were not destroyed");
    }
    Ok(())
}

/// What layers say of products that belong to `other`.
pub fn refused_elsewhere(device: &Device, other: &Device) -> Result<String> {
    let products = Products::open(other)?;
    let (w, x) = (device.zeros::<f32>(4)?, device.zeros::<f32>(2)?);
    let (w, x) = (w.as_view(), x.as_view());
    let layer = Layer { weight: &w, shape: [2, 2], lora: None };
    let mut y = device.zeros::<f32>(2)?;
    let result = layer.forward(device, &products, &x, None, &mut y.as_view_mut(), false);
    Ok(result.err().context("products of another device")?.to_string())
}

#[test]
fn small_factors_beside_a_large_weight_are_not_lost() -> Result<()> {
    let Some(lease) = device_alone()? else { return Ok(()) };
    let Some((products, _emulated)) = products(&lease)? else { return Ok(()) };
    let device = lease.device;
    // x·Wᵀ = 1 + 2⁻⁸ lies exactly between two bf16 values, of which the even one is 1; LoRA's 2⁻¹² decides for the other.
    let x = device.upload(&[bf16::put(1.0), bf16::put(2f32.powi(-8))])?;
    let w = device.upload(&[bf16::put(1.0), bf16::put(1.0)])?;
    let a = device.upload(&[bf16::put(1.0), bf16::put(0.0)])?;
    let b = device.upload(&[bf16::put(2f32.powi(-12))])?;
    let (view_x, view_w, view_a, view_b) = (x.as_view(), w.as_view(), a.as_view(), b.as_view());
    let lora = Some(plain(&view_a, &view_b, 1, 1.0));
    let layer = Layer { weight: &view_w, shape: [1, 2], lora };
    let (mut h, mut y) = (device.zeros::<bf16>(1)?, device.zeros::<bf16>(1)?);
    layer.forward(device, &products, &view_x, Some(&mut h.as_view_mut()), &mut y.as_view_mut(), false)?;
    let got = device.download(&y)?[0].get();
    ensure!(got == 1.0 + 2f32.powi(-7), "expected 1.0078125, got {got}");
    // The 1 may also be there before: then neither part may be added to it alone.
    let w = device.upload(&[bf16::put(0.0), bf16::put(1.0)])?;
    let view_w = w.as_view();
    let layer = Layer { weight: &view_w, ..layer };
    let mut y = device.upload(&[bf16::put(1.0)])?;
    layer.forward(device, &products, &view_x, None, &mut y.as_view_mut(), true)?;
    let got = device.download(&y)?[0].get();
    ensure!(got == 1.0 + 2f32.powi(-7), "added up: expected 1.0078125, got {got}");
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let Some(lease) = device_alone()? else { return Ok(()) };
    let Some((products, _emulated)) = products(&lease)? else { return Ok(()) };
    let device = lease.device;
    let memory = device.zeros::<f32>(64)?;
    let of = |count: usize| memory.try_slice(0..count).context("a view");
    let (w, a, b, x, small) = (of(12)?, of(6)?, of(8)?, of(9)?, of(5)?);
    let lora = plain(&a, &b, 2, 1.0);
    let layer = Layer { weight: &w, shape: [4, 3], lora: Some(lora) };
    let bare = Layer { lora: None, ..layer };
    let (mut h, mut y) = (device.zeros::<f32>(6)?, device.zeros::<f32>(12)?);
    let mut says = |layer: Layer<'_, f32>, x, rooms: usize, result: usize, expected: &str| -> Result<()> {
        let (mut room, mut y) = (h.slice_mut(0..rooms.max(1)), y.slice_mut(0..result));
        let room = (rooms > 0).then_some(&mut room);
        let error =
            layer.forward(device, &products, x, room, &mut y, false).err().context("must be refused")?;
        ensure!(error.to_string() == expected, "expected {expected:?}, got {error}");
        Ok(())
    };
    says(
        layer,
        &small,
        6,
        12,
        "cuda linear: expected x of whole rows of 3 values, at least one value in each, got 5 values",
    )?;
    says(layer, &x, 6, 11, "cuda linear: expected y of 12 values, got 11")?;
    says(layer, &x, 5, 12, "cuda linear: expected room for x·Aᵀ of 6 values, got 5")?;
    says(bare, &x, 6, 12, "cuda linear: expected room for x·Aᵀ beside LoRA only, got a layer without LoRA")?;
    says(Layer { weight: &small, ..layer }, &x, 6, 12, "cuda linear: expected W of 12 values, got 5")?;
    says(
        Layer { lora: Some(Lora { rank: 3, ..lora }), ..layer },
        &x,
        6,
        12,
        "cuda linear: expected A of 9 values, got 6",
    )?;
    let none = of(0)?;
    let mut beside = |lora, expected: &str| says(Layer { lora: Some(lora), ..layer }, &x, 6, 12, expected);
    beside(plain(&none, &none, 0, 1.0), "cuda linear: expected a rank of at least 1, got 0")?;
    for (p, found) in [(1.0, "1"), (-0.5, "-0.5"), (f64::NAN, "NaN")] {
        let dropout = Some(Dropout { p, seed: 0 });
        beside(Lora { dropout, ..lora }, &format!("cuda linear: dropout: expected 0 <= p < 1, got {found}"))?;
    }
    let initial = Factors { a: &a, b: &b };
    beside(
        Lora { initial: Some(Factors { a: &b, ..initial }), ..lora },
        "cuda linear: expected the initial A of 6 values, got 8",
    )?;
    beside(
        Lora { initial: Some(Factors { b: &a, ..initial }), ..lora },
        "cuda linear: expected the initial B of 8 values, got 6",
    )?;
    let four = of(4)?;
    let dora = Dora { scale: &four, norms: &four };
    beside(
        Lora { dora: Some(Dora { scale: &small, ..dora }), ..lora },
        "cuda linear: expected DoRA's scales of 4 values, got 5",
    )?;
    beside(
        Lora { dora: Some(Dora { norms: &small, ..dora }), ..lora },
        "cuda linear: expected DoRA's lengths of 4 values, got 5",
    )?;
    beside(
        Lora { dora: Some(dora), initial: Some(initial), ..lora },
        "cuda linear: expected DoRA or PiSSA beside one weight, got both",
    )?;
    let mut narrow = device.zeros::<bf16>(12)?;
    let error = bare
        .forward(device, &products, &x, None, &mut narrow.as_view_mut(), false)
        .err()
        .context("must be refused")?;
    let expected = "cuda linear: expected y stored in f32, got bf16";
    ensure!(error.to_string() == expected, "expected {expected:?}, got {error}");
    let g = of(12)?;
    let saved = Saved { x: &x, reduced: None, gradient: &g };
    let mut memory = [(); 4].map(|()| device.zeros::<f32>(8)).into_iter().collect::<Result<Vec<_>, _>>()?;
    let [of_w, of_a, of_b, of_m] = &mut memory[..] else { anyhow::bail!("four") };
    let mut says =
        |layer: Layer<'_, f32>, saved, wanted: &str, sizes: [usize; 2], expected: &str| -> Result<()> {
            let (mut w, mut m) = (of_w.slice_mut(..sizes[0]), of_m.slice_mut(..sizes[0]));
            let (mut a, mut b) = (of_a.slice_mut(..sizes[0]), of_b.slice_mut(..sizes[1]));
            let into = match wanted {
                "x" => LayerGradients::default(),
                "W" => LayerGradients { weight: Some(&mut w), ..LayerGradients::default() },
                "m" => LayerGradients { magnitude: Some(&mut m), ..LayerGradients::default() },
                _ => {
                    let factors = Some(FactorGradients { a: &mut a, b: &mut b });
                    LayerGradients { factors, ..LayerGradients::default() }
                }
            };
            let mut x = device.zeros::<f32>(sizes[1])?;
            let mut x = x.as_view_mut();
            let dx = (wanted == "x").then_some((&mut x, false));
            let error =
                layer.backward(device, &products, saved, dx, into).err().context("must be refused")?;
            ensure!(error.to_string() == expected, "expected {expected:?}, got {error}");
            Ok(())
        };
    let scaled = Layer { lora: Some(Lora { dora: Some(dora), ..lora }), ..layer };
    let only = "cuda linear: expected gradients of factors beside LoRA only, got a layer without LoRA";
    says(bare, saved, "A, B", [6, 8], only)?;
    let only = "cuda linear: expected a gradient of magnitudes beside DoRA only, got a layer without DoRA";
    says(bare, saved, "m", [4, 8], only)?;
    says(layer, saved, "m", [4, 8], only)?;
    says(scaled, saved, "m", [3, 8], "cuda linear: expected the gradient of magnitudes of 4 values, got 3")?;
    says(bare, saved, "W", [7, 8], "cuda linear: expected the gradient of W of 12 values, got 7")?;
    says(bare, saved, "x", [6, 8], "cuda linear: expected the gradient of x of 9 values, got 8")?;
    says(layer, saved, "A, B", [5, 8], "cuda linear: expected the gradient of A of 6 values, got 5")?;
    says(layer, saved, "A, B", [6, 7], "cuda linear: expected the gradient of B of 8 values, got 7")?;
    let short = Saved { reduced: Some(&small), ..saved };
    says(layer, short, "A, B", [6, 8], "cuda linear: expected x·Aᵀ of 6 values, got 5")?;
    let short = Saved { gradient: &small, ..saved };
    says(layer, short, "A, B", [6, 8], "cuda linear: expected the gradient of y of 12 values, got 5")
}
