//! DoRA and PiSSA beside a frozen weight: values against f64, gradients against finite differences.

use megacontext_kernels::gemm::Products;
use megacontext_kernels::linear::{
    Dora, Dropout, Factors, Layer, LayerGradients, LoraShape, LoraSlices, Scratch, Weight, row_norms,
};
use megacontext_kernels::store::{Store, bf16};

use crate::support::{close, differences, matmul_t, numbers, rounded, wide};

const SCALE: f32 = 0.7;

/// Lengths of the rows of W + s·B·A in f64.
fn lengths(w: &[f64], a: &[f64], b: &[f64], [out, inp, rank]: [usize; 3]) -> Vec<f64> {
    let scale = f64::from(SCALE);
    (0..out)
        .map(|o| {
            let change = |i: usize| (0..rank).map(|r| b[o * rank + r] * a[r * inp + i]).sum::<f64>();
            (0..inp).map(|i| (w[o * inp + i] + scale * change(i)).powi(2)).sum::<f64>().sqrt()
        })
        .collect()
}

/// drop(x).
fn kept(x: &[f64], dropout: Option<Dropout>) -> Vec<f64> {
    let mut mask = vec![1f32; x.len()];
    if let Some(dropout) = dropout {
        dropout.apply(&mut mask);
    }
    x.iter().zip(mask).map(|(x, m)| x * f64::from(m)).collect()
}

struct Case {
    sizes: [usize; 4],
    w: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    m: Vec<f32>,
    x: Vec<f32>,
    g: Vec<f32>,
}

impl Case {
    fn new(sizes @ [n, out, inp, rank]: [usize; 4]) -> Self {
        Self {
            sizes,
            w: numbers(out * inp, 1),
            a: numbers(rank * inp, 2),
            b: numbers(out * rank, 3),
            m: numbers(out, 4).into_iter().map(|m| m + 2.0).collect(),
            x: numbers(n * inp, 5),
            g: numbers(n * out, 6),
        }
    }

    /// [O, I, r].
    fn matrix(&self) -> [usize; 3] {
        let [_, out, inp, rank] = self.sizes;
        [out, inp, rank]
    }

    fn lora(&self, dropout: Option<Dropout>) -> LoraSlices<'_> {
        let rank = self.sizes[3];
        LoraSlices { a: &self.a, b: &self.b, rank, scale: SCALE, dropout, initial: None, dora: None }
    }

    /// n and c = m/n.
    fn scales(&self, weight: Weight) -> (Vec<f32>, Vec<f32>) {
        let [_, out, inp, _] = self.sizes;
        let mut norms = vec![0f32; out];
        row_norms(weight, [out, inp], &self.lora(None), &mut norms);
        let scales = self.m.iter().zip(&norms).map(|(m, n)| m / n).collect();
        (norms, scales)
    }
}

#[test]
fn row_norms_are_those_of_f64() {
    for sizes in [[1, 1, 1, 1], [1, 7, 5, 2], [1, 33, 70, 8], [1, 5, 513, 3]] {
        let case = Case::new(sizes);
        let [_, out, inp, _] = sizes;
        let mut norms = vec![0f32; out];
        row_norms(Weight::F32(&case.w), [out, inp], &case.lora(None), &mut norms);
        let want = lengths(&wide(&case.w), &wide(&case.a), &wide(&case.b), case.matrix());
        close(&norms, &want, 1e-6, "norms");
        let w = rounded(&case.w);
        row_norms(Weight::Bf16(&w), [out, inp], &case.lora(None), &mut norms);
        let want = lengths(&wide(&w), &wide(&case.a), &wide(&case.b), case.matrix());
        close(&norms, &want, 1e-6, "norms of bf16");
    }
}

#[test]
fn dora_matches_f64_and_differences_with_the_norms_held() {
    for (sizes, dropout) in
        [([6, 7, 5, 2], None), ([6, 7, 5, 2], Some(Dropout { p: 0.4, seed: 3 })), ([9, 130, 33, 3], None)]
    {
        let case = Case::new(sizes);
        let [n, out, inp, rank] = sizes;
        let (norms, scale) = case.scales(Weight::F32(&case.w));
        // n is a constant of the backward pass: the reference takes it from the values as they stand.
        let held = lengths(&wide(&case.w), &wide(&case.a), &wide(&case.b), case.matrix());
        let reference = |v: &[Vec<f64>]| {
            let up = matmul_t(&matmul_t(&kept(&v[0], dropout), &v[1], inp, rank), &v[2], rank, out);
            let y = matmul_t(&v[0], &wide(&case.w), inp, out);
            let z = y.iter().zip(up).map(|(y, u)| y + f64::from(SCALE) * u);
            z.enumerate().map(|(i, z)| z * v[3][i % out] / held[i % out]).collect::<Vec<f64>>()
        };
        let inputs = [case.x.clone(), case.a.clone(), case.b.clone(), case.m.clone()];
        let value = reference(&inputs.each_ref().map(|v| wide(v)));
        let lora = LoraSlices { dora: Some(Dora { scale: &scale, norms: &norms }), ..case.lora(dropout) };
        let weight = Weight::F32(&case.w);
        let layer = Layer { weight, out, inp, lora: Some(lora), products: Products::F32 };
        let scratch = &mut Scratch::default();
        let mut y = vec![1f32; n * out];
        layer.forward(&case.x, &mut y, false, scratch);
        close(&y, &value, 1e-5, "result");
        layer.forward(&case.x, &mut y, true, scratch);
        close(&y, &value.iter().map(|v| 2.0 * v).collect::<Vec<_>>(), 1e-5, "added result");

        let want = differences(&inputs, &case.g, &reference);
        let [mut dx, mut da, mut db, mut dm] = inputs.each_ref().map(|v| vec![1f32; v.len()]);
        let into =
            LayerGradients { weight: None, a: Some(&mut da), b: Some(&mut db), magnitude: Some(&mut dm) };
        layer.backward(&case.x, &case.g, Some((&mut dx, true)), into, scratch);
        for (i, got) in [&dx, &da, &db, &dm].into_iter().enumerate() {
            let want: Vec<f64> = want[i].iter().map(|v| v + 1.0).collect();
            close(got, &want, 1e-4, &format!("gradient {i}"));
        }
        let (before, mut alone) = (da.clone(), vec![0f32; out]);
        let into = LayerGradients { magnitude: Some(&mut alone), ..Default::default() };
        layer.backward(&case.x, &case.g, None, into, scratch);
        close(&alone, &want[3], 1e-4, "dm alone");
        assert_eq!(da, before);
        layer.backward(&case.x, &case.g, Some((&mut dx, false)), LayerGradients::default(), scratch);
        close(&dx, &want[0], 1e-4, "dx written over");
    }
}

#[test]
fn dora_whose_magnitudes_are_the_lengths_is_lora() {
    let case = Case::new([17, 40, 24, 4]);
    let [n, out, inp, _] = case.sizes;
    let (norms, _) = case.scales(Weight::F32(&case.w));
    let ones = vec![1f32; out];
    let weight = Weight::F32(&case.w);
    let plain = Layer { weight, out, inp, lora: Some(case.lora(None)), products: Products::F32 };
    let dora = LoraSlices { dora: Some(Dora { scale: &ones, norms: &norms }), ..case.lora(None) };
    let dora = Layer { lora: Some(dora), ..plain };
    let scratch = &mut Scratch::default();
    let [mut a, mut b] = [vec![0f32; n * out], vec![0f32; n * out]];
    plain.forward(&case.x, &mut a, false, scratch);
    dora.forward(&case.x, &mut b, false, scratch);
    assert_eq!(a, b);
}

#[test]
fn dora_stored_in_bf16_is_the_f64_one_rounded_once() {
    let case = Case::new([33, 70, 40, 3]);
    let [n, out, inp, rank] = case.sizes;
    let (w, x, g) = (rounded(&case.w), rounded(&case.x), rounded(&case.g));
    let weight = Weight::Bf16(&w);
    let (norms, scale) = case.scales(weight);
    let lora = LoraSlices { dora: Some(Dora { scale: &scale, norms: &norms }), ..case.lora(None) };
    let layer = Layer { weight, out, inp, lora: Some(lora), products: Products::F32 };
    let held = lengths(&wide(&w), &wide(&case.a), &wide(&case.b), case.matrix());
    let up = matmul_t(&matmul_t(&wide(&x), &wide(&case.a), inp, rank), &wide(&case.b), rank, out);
    let z = matmul_t(&wide(&x), &wide(&w), inp, out);
    let z: Vec<f64> = z.iter().zip(up).map(|(y, u)| y + f64::from(SCALE) * u).collect();
    let base = rounded(&numbers(n * out, 9));
    let mut y = base.clone();
    layer.forward(&x, &mut y, true, &mut Scratch::default());
    for (i, y) in y.iter().enumerate() {
        let want = f64::from(base[i].get()) + z[i] * f64::from(case.m[i % out]) / held[i % out];
        let least = (f64::from(bf16::put(want as f32).get()) - want).abs();
        assert!((f64::from(y.get()) - want).abs() <= least + 1e-5, "{y} is not {want} rounded once");
    }
    let mut dm = vec![0f32; out];
    let into = LayerGradients { magnitude: Some(&mut dm), ..Default::default() };
    layer.backward(&x, &g, None, into, &mut Scratch::default());
    let want: Vec<f64> = (0..out)
        .map(|o| (0..n).map(|i| f64::from(g[i * out + o].get()) * z[i * out + o]).sum::<f64>() / held[o])
        .collect();
    close(&dm, &want, 1e-5, "dm");
}

#[test]
fn the_fixed_part_of_pissa_is_taken_off_and_never_learns() {
    for dropout in [None, Some(Dropout { p: 0.4, seed: 8 })] {
        let case = Case::new([6, 7, 5, 2]);
        let [n, out, inp, rank] = case.sizes;
        let (a0, b0) = (numbers(rank * inp, 12), numbers(out * rank, 13));
        let reference = |v: &[Vec<f64>]| {
            let up = matmul_t(&matmul_t(&kept(&v[0], dropout), &v[1], inp, rank), &v[2], rank, out);
            let off = matmul_t(&matmul_t(&v[0], &wide(&a0), inp, rank), &wide(&b0), rank, out);
            let y = matmul_t(&v[0], &wide(&case.w), inp, out);
            let low = up.iter().zip(off).map(|(u, o)| f64::from(SCALE) * (u - o));
            y.iter().zip(low).map(|(y, low)| y + low).collect::<Vec<f64>>()
        };
        let inputs = [case.x.clone(), case.a.clone(), case.b.clone()];
        let value = reference(&inputs.each_ref().map(|v| wide(v)));
        let lora = LoraSlices { initial: Some(Factors { a: &a0, b: &b0 }), ..case.lora(dropout) };
        let weight = Weight::F32(&case.w);
        let layer = Layer { weight, out, inp, lora: Some(lora), products: Products::F32 };
        let scratch = &mut Scratch::default();
        let mut y = vec![1f32; n * out];
        layer.forward(&case.x, &mut y, true, scratch);
        close(&y, &value.iter().map(|v| v + 1.0).collect::<Vec<_>>(), 1e-5, "result");
        let mut stored = rounded(&vec![0f32; n * out]);
        layer.forward(&case.x, &mut stored, false, scratch);
        for (stored, want) in stored.iter().zip(&value) {
            let least = (f64::from(bf16::put(*want as f32).get()) - want).abs();
            assert!((f64::from(stored.get()) - want).abs() <= least + 1e-5);
        }
        let want = differences(&inputs, &case.g, &reference);
        let [mut dx, mut da, mut db] = inputs.each_ref().map(|v| vec![1f32; v.len()]);
        let into = LayerGradients { a: Some(&mut da), b: Some(&mut db), ..Default::default() };
        layer.backward(&case.x, &case.g, Some((&mut dx, true)), into, scratch);
        for (i, got) in [&dx, &da, &db].into_iter().enumerate() {
            let want: Vec<f64> = want[i].iter().map(|v| v + 1.0).collect();
            close(got, &want, 1e-4, &format!("gradient {i}"));
        }
    }
}

#[test]
fn buffers_are_those_planned() {
    for (dora, initial) in [(false, false), (true, false), (false, true)] {
        for backward in [false, true] {
            let case = Case::new([19, 24, 16, 3]);
            let [n, out, inp, rank] = case.sizes;
            let weight = Weight::F32(&case.w);
            let (norms, scale) = case.scales(weight);
            let lora = LoraSlices {
                dora: dora.then_some(Dora { scale: &scale, norms: &norms }),
                initial: initial.then_some(Factors { a: &case.a, b: &case.b }),
                ..case.lora(None)
            };
            let layer = Layer { weight, out, inp, lora: Some(lora), products: Products::F32 };
            let (mut scratch, mut y) = (Scratch::default(), vec![0f32; n * out]);
            layer.forward(&case.x, &mut y, false, &mut scratch);
            if backward {
                let (mut dx, mut db) = (vec![0f32; n * inp], vec![0f32; out * rank]);
                let into = LayerGradients { b: Some(&mut db), ..Default::default() };
                layer.backward(&case.x, &case.g, Some((&mut dx, false)), into, &mut scratch);
            }
            let shape = LoraShape { out, rank, dora, initial };
            let planned = Scratch::planned_bytes(n, &[shape], false, backward);
            assert_eq!(scratch.bytes(), planned, "dora {dora}, initial {initial}, backward {backward}");
        }
    }
}
