//! Rows, activations and embeddings against the CPU's operations.

use anyhow::{Result, ensure};
use half::{bf16, f16};
use megacontext_kernels::cuda::mlp::Activation;
use megacontext_kernels::cuda::{Device, Stored, embedding, mlp, rows};
use megacontext_kernels::gelu::{
    Gelu, geglu_backward_in_place, geglu_into, gelu_backward_in_place, gelu_into,
};
use megacontext_kernels::linear::Weight;
use megacontext_kernels::{embedding as cpu_embedding, mlp as cpu_mlp, rows as cpu_rows};

use crate::support::{close, close_within, device, stored, values, widened};

/// Rows and widths: one value at a time, vectors, a short one at the end, one row.
const SIZES: [[usize; 2]; 6] = [[3, 37], [5, 48], [1, 37], [3, 7], [300, 24], [1, 1]];

fn streams<X: Stored, Y: Stored>(device: &Device) -> Result<()> {
    for [count, width] in SIZES {
        let what = format!("[{count}, {width}] of {}", X::KIND.name());
        let (x, bias): (Vec<X>, Vec<X>) = (stored(&values(count * width, 1)), stored(&values(width, 2)));
        let start: Vec<Y> = stored(&values(count * width, 3));
        let (wide, wide_bias) = (widened(&x), widened(&bias));
        let (x, bias) = (device.upload(&x)?, device.upload(&bias)?);
        // What was there is not read.
        let mut y = device.upload(&vec![Y::put(f32::NAN); count * width])?;
        rows::convert(device, &x, &mut y)?;
        close_within(&format!("convert, {what}"), &device.download(&y)?, &widened(&stored::<Y>(&wide)), 0.0)?;

        let mut expected = widened(&start);
        cpu_rows::add_assign(&wide, &mut expected);
        let mut y = device.upload(&start)?;
        rows::add_assign(device, &x, &mut y)?;
        close(&format!("add, {what}"), &device.download(&y)?, &expected)?;

        let mut expected = vec![0f32; count * width];
        cpu_rows::fill(Weight::F32(&wide_bias), &mut expected);
        let mut y = device.upload(&vec![Y::put(f32::NAN); count * width])?;
        rows::fill(device, &bias, &mut y)?;
        close(&format!("fill, {what}"), &device.download(&y)?, &expected)?;

        let mut expected = widened(&start);
        cpu_rows::add_bias(Weight::F32(&wide_bias), &mut expected);
        let mut y = device.upload(&start)?;
        rows::add_bias(device, &bias, &mut y)?;
        close(&format!("add bias, {what}"), &device.download(&y)?, &expected)?;
    }
    Ok(())
}

/// Ids that come several times, or all alike.
const IDS: [&[u32]; 3] = [&[6, 0, 1, 6, 6, 1], &[2; 9], &[]];

fn gathers<W: Stored, X: Stored>(device: &Device) -> Result<()> {
    for (width, ids) in [1, 37, 48].into_iter().flat_map(|width| IDS.map(|ids| (width, ids))) {
        let table: Vec<W> = stored(&values(7 * width, 1));
        let mut expected = vec![0f32; ids.len() * width];
        cpu_embedding::gather_into(Weight::F32(&widened(&table)), width, ids, &mut expected)?;
        let table = device.upload(&table)?;
        let mut out = device.upload(&vec![X::put(f32::NAN); (ids.len() * width).max(1)])?;
        embedding::gather(device, &table, width, ids, &mut out.slice_mut(..ids.len() * width))?;
        let got = device.download(&out.slice(..ids.len() * width))?;
        let expected = widened(&stored::<X>(&expected));
        close_within(&format!("{ids:?} of width {width} of {}", W::KIND.name()), &got, &expected, 0.0)?;
    }
    Ok(())
}

fn pairs<X: Stored, Y: Stored>(device: &Device) -> Result<()> {
    streams::<X, Y>(device)?;
    gathers::<X, Y>(device)
}

fn sums_and_heads<T: Stored>(device: &Device) -> Result<()> {
    for [count, width] in [SIZES[0], SIZES[1], SIZES[4], [1, 8], [700, 3]] {
        let what = format!("[{count}, {width}]");
        let g: Vec<T> = stored(&values(count * width, 1));
        let mut expected = values(width, 2);
        let mut sum = device.upload(&expected)?;
        cpu_rows::sum_rows(&widened(&g), &mut expected);
        let mut on_device = device.upload(&g)?;
        rows::sum_rows(device, &on_device, &mut sum)?;
        close(&format!("sum of rows, {what}, {}", T::KIND.name()), &device.download(&sum)?, &expected)?;

        let mut expected = widened(&g);
        cpu_rows::scale(&mut expected, -0.75);
        rows::scale(device, &mut on_device, -0.75)?;
        close(&format!("scale, {what}"), &device.download(&on_device)?, &expected)?;
    }
    for [entries, heads, width] in [[3, 2, 5], [2, 3, 16], [1, 1, 1]] {
        let count = entries * heads * width;
        let fused: Vec<T> = stored(&values(3 * count, 1));
        let wide = widened(&fused);
        let mut expected = [vec![0f32; count], vec![0f32; count], vec![0f32; count]];
        cpu_rows::split_heads(&wide, width, heads, expected.each_mut().map(|part| &mut part[..]));
        let on_device = device.upload(&fused)?;
        let mut parts = [device.zeros::<T>(count)?, device.zeros::<T>(count)?, device.zeros::<T>(count)?];
        let [mut q, mut k, mut v] = parts.each_mut().map(|part| part.as_view_mut());
        rows::split_heads(device, &on_device, width, heads, [&mut q, &mut k, &mut v])?;
        for (part, expected) in parts.iter().zip(&expected) {
            close_within("a part of fused heads", &device.download(part)?, expected, 0.0)?;
        }
        let mut back = device.zeros::<T>(3 * count)?;
        let [q, k, v] = parts.each_ref().map(|part| part.as_view());
        rows::join_heads(device, [&q, &k, &v], width, heads, &mut back)?;
        close_within("fused heads", &device.download(&back)?, &wide, 0.0)?;
    }
    Ok(())
}

const ACTIVATIONS: [Activation; 5] =
    [Activation::SwiGlu, Activation::GeGlu, Activation::Gelu, Activation::GeluTanh, Activation::Relu2];

fn cpu_forward(activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    match activation {
        Activation::SwiGlu => cpu_mlp::swiglu_into(gate, up, out),
        Activation::GeGlu => geglu_into(Gelu::Tanh, gate, up, out),
        Activation::Gelu => gelu_into(Gelu::Exact, up, out),
        Activation::GeluTanh => gelu_into(Gelu::Tanh, up, out),
        Activation::Relu2 => cpu_mlp::relu2_into(up, out),
    }
}

fn cpu_backward(activation: Activation, gate: &mut [f32], up: &mut [f32], g: &[f32]) {
    match activation {
        Activation::SwiGlu => cpu_mlp::swiglu_backward_in_place(gate, up, g),
        Activation::GeGlu => geglu_backward_in_place(Gelu::Tanh, gate, up, g),
        Activation::Gelu => gelu_backward_in_place(Gelu::Exact, up, g),
        Activation::GeluTanh => gelu_backward_in_place(Gelu::Tanh, up, g),
        Activation::Relu2 => cpu_mlp::relu2_backward_in_place(up, g),
    }
}

fn activations<T: Stored>(device: &Device) -> Result<()> {
    for (activation, count) in ACTIVATIONS.into_iter().flat_map(|a| [1, 7, 64, 515, 3000].map(|n| (a, n))) {
        let what = format!("{activation:?} of {count} values");
        // Far into the tails.
        let far = |seed| values(count, seed).iter().map(|x| 12.0 * x).collect::<Vec<f32>>();
        let (gate, up): (Vec<T>, Vec<T>) = (stored(&far(1)), stored(&far(2)));
        let (mut wide_gate, mut wide_up) = (widened(&gate), widened(&up));
        let mut expected = vec![0f32; count];
        cpu_forward(activation, &wide_gate, &wide_up, &mut expected);
        let (mut gate, mut up) = (device.upload(&gate)?, device.upload(&up)?);
        let mut out = device.upload(&vec![T::put(f32::NAN); count])?;
        let gated = activation.gated();
        let view = gate.as_view();
        mlp::forward(device, activation, gated.then_some(&view), &up.as_view(), &mut out.as_view_mut())?;
        close(&what, &device.download(&out)?, &expected)?;

        let g = values(count, 3);
        cpu_backward(activation, &mut wide_gate, &mut wide_up, &g);
        let g = device.upload(&g)?;
        let (mut view, mut up_view) = (gate.as_view_mut(), up.as_view_mut());
        let view = gated.then_some(&mut view);
        mlp::backward_in_place(device, activation, view, &mut up_view, &g.as_view())?;
        close(&format!("gradient of gate, {what}"), &device.download(&gate)?, &wide_gate)?;
        close(&format!("gradient of up, {what}"), &device.download(&up)?, &wide_up)?;
    }
    Ok(())
}

fn of_one_kind<T: Stored>(device: &Device) -> Result<()> {
    pairs::<T, T>(device)?;
    sums_and_heads::<T>(device)?;
    activations::<T>(device)
}

/// Every operation once.
pub fn everything(device: &Device) -> Result<()> {
    of_one_kind::<bf16>(device)?;
    scatters(device)
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
    rows_activations_and_embeddings_equal_the_cpu_in_f32, of_one_kind::<f32>;
    rows_activations_and_embeddings_equal_the_cpu_in_bf16, of_one_kind::<bf16>;
    rows_activations_and_embeddings_equal_the_cpu_in_f16, of_one_kind::<f16>;
    rows_and_embeddings_equal_the_cpu_from_f32_to_bf16, pairs::<f32, bf16>;
    rows_and_embeddings_equal_the_cpu_from_f32_to_f16, pairs::<f32, f16>;
    rows_and_embeddings_equal_the_cpu_from_bf16_to_f32, pairs::<bf16, f32>;
    rows_and_embeddings_equal_the_cpu_from_f16_to_f32, pairs::<f16, f32>;
    gradients_of_embeddings_are_the_bytes_of_the_cpu, scatters;
    what_begins_at_an_odd_place_is_worked_on_there, odd_places;
}

fn scatters(device: &Device) -> Result<()> {
    for (width, ids) in [1, 37, 48, 1028].into_iter().flat_map(|width| IDS.map(|ids| (width, ids))) {
        let (gradient, mut table) = (values(ids.len().max(1) * width, 1), values(7 * width, 2));
        let mut got = device.upload(&table)?;
        let on_device = device.upload(&gradient)?;
        let count = ids.len() * width;
        cpu_embedding::scatter_add(&gradient[..count], width, ids, &mut table)?;
        embedding::scatter_add(device, &on_device.slice(..count), width, ids, &mut got)?;
        ensure!(device.download(&got)? == table, "{ids:?} of width {width}");
    }
    Ok(())
}

/// Values that begin between vectors are taken one at a time, and nothing beside them is touched.
fn odd_places(device: &Device) -> Result<()> {
    let x: Vec<bf16> = stored(&values(65, 1));
    let on_device = device.upload(&x)?;
    let mut y = device.zeros::<f32>(66)?;
    rows::convert(device, &on_device.slice(1..), &mut y.slice_mut(1..65))?;
    let got = device.download(&y)?;
    ensure!(got[0] == 0.0 && got[65] == 0.0 && got[1..65] == widened(&x[1..]), "convert");
    let (up, mut out) = (device.upload(&x)?, device.zeros::<bf16>(66)?);
    mlp::forward(device, Activation::Relu2, None, &up.slice(1..), &mut out.slice_mut(1..65))?;
    let mut expected = vec![0f32; 64];
    cpu_mlp::relu2_into(&widened(&x[1..]), &mut expected);
    let got = device.download(&out)?;
    ensure!(got[0].get() == 0.0 && got[65].get() == 0.0, "values beside the view were written");
    close("relu2", &got[1..65], &expected)?;
    let mut table = device.zeros::<f32>(4 * 8 + 1)?;
    let rows_of_ids = device.upload(&values(2 * 8, 2))?;
    embedding::scatter_add(device, &rows_of_ids, 8, &[3, 3], &mut table.slice_mut(1..))?;
    let got = device.download(&table)?;
    ensure!(got[..25].iter().all(|x| *x == 0.0) && got[25..].iter().all(|x| *x != 0.0), "scatter");
    Ok(())
}
