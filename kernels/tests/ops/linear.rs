//! Linear layers, with and without LoRA.

use anyhow::Result;
use candle_core::{Device, Tensor};
use megacontext_kernels::gemm::Products;
use megacontext_kernels::linear::{
    Dropout, Layer, LayerGradients, Lora, LoraSlices, Scratch, Weight, linear,
};
use megacontext_kernels::store::{Store, bf16};

use crate::support::*;

#[test]
fn linear_trained_matches_differences() -> Result<()> {
    check("linear", &[&[2, 3, 5], &[7, 5]], &|x| Ok(linear(&x[0], &x[1], None)?), &|x| {
        matmul_t(&x[0], &x[1], 5, 7)
    })
}

#[test]
fn linear_with_lora_matches_differences_and_leaves_the_frozen_weight_alone() -> Result<()> {
    let w = numbers(7 * 5, 42);
    let frozen = plain(&w, &[7, 5])?;
    let wide: Vec<f64> = w.iter().map(|v| f64::from(*v)).collect();
    check(
        "lora",
        &[&[4, 5], &[2, 5], &[7, 2]],
        &|x| {
            let lora = Lora { a_ri: &x[1], b_or: &x[2], scale: 1.5, dropout: None };
            Ok(linear(&x[0], &frozen, Some(lora))?)
        },
        &|x| {
            let low = matmul_t(&x[0], &x[1], 5, 2);
            let up = matmul_t(&low, &x[2], 2, 7);
            matmul_t(&x[0], &wide, 5, 7).iter().zip(up).map(|(y, u)| y + 1.5 * u).collect()
        },
    )?;
    let x = var(&numbers(20, 1), &[4, 5])?;
    let grads = linear(&x, &frozen, None)?.sum_all()?.backward()?;
    assert!(grads.get(&frozen).is_none(), "a frozen weight got a gradient");
    Ok(())
}

#[test]
fn dropout_is_repeatable_unbiased_and_differentiable() -> Result<()> {
    let (rows, inp, out) = (64, 128, 4);
    let frozen = Tensor::zeros((out, inp), candle_core::DType::F32, &Device::Cpu)?;
    let x = var(&vec![1.0; rows * inp], &[rows, inp])?;
    let a = var(&vec![1.0; inp], &[1, inp])?;
    let b = var(&vec![1.0; out], &[out, 1])?;
    let run = |seed| {
        let dropout = Some(Dropout { p: 0.25, seed });
        linear(&x, &frozen, Some(Lora { a_ri: &a, b_or: &b, scale: 1.0, dropout }))
    };
    let y = run(1)?;
    assert_eq!(flat(&y), flat(&run(1)?));
    assert_ne!(flat(&y), flat(&run(2)?));
    let mean = flat(&y).iter().sum::<f32>() / (rows * out) as f32;
    assert!((mean - inp as f32).abs() < 3.0, "the mean of {inp} ones after dropout is {mean}");
    // All weights are one, so the gradient of x shows the mask: 0 or out/(1-p), and sums to what the forward kept.
    let dx = flat(y.sum_all()?.backward()?.get(&x).unwrap());
    let keep = out as f32 / 0.75;
    assert!(dx.iter().all(|v| *v == 0.0 || (v - keep).abs() < 1e-4));
    let kept: f32 = dx[..inp].iter().sum::<f32>() / out as f32;
    assert!((kept - flat(&y)[0]).abs() < 1e-3, "backward used another mask than forward");
    Ok(())
}

#[test]
fn linear_refuses_an_input_of_another_width() -> Result<()> {
    refuses(linear(&plain(&[0.0; 6], &[2, 3])?, &plain(&[0.0; 4], &[2, 2])?, None), "x [.., 2]");
    Ok(())
}

/// A layer with everything: sizes n, O, I and r.
struct Case {
    sizes: [usize; 4],
    w: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Case {
    fn new(sizes @ [_, out, inp, rank]: [usize; 4]) -> Self {
        Self { sizes, w: numbers(out * inp, 1), a: numbers(rank * inp, 2), b: numbers(out * rank, 3) }
    }

    fn layer<'a>(&'a self, weight: Weight<'a>, dropout: Option<Dropout>, products: Products) -> Layer<'a> {
        let [_, out, inp, rank] = self.sizes;
        let lora =
            LoraSlices { a: &self.a, b: &self.b, rank, scale: 0.7, dropout, initial: None, dora: None };
        Layer { weight, out, inp, lora: (rank > 0).then_some(lora), products }
    }

    /// y in f64 for this x and this W.
    fn result(&self, x: &[f64], w: &[f64]) -> Vec<f64> {
        let [_, out, inp, rank] = self.sizes;
        let y = matmul_t(x, w, inp, out);
        if rank == 0 {
            return y;
        }
        let up = matmul_t(&matmul_t(x, &wide(&self.a), inp, rank), &wide(&self.b), rank, out);
        y.iter().zip(up).map(|(y, u)| y + 0.7f32 as f64 * u).collect()
    }
}

#[test]
fn a_layer_stored_in_bf16_is_the_f64_one_rounded_once() {
    for sizes in [[5, 7, 9, 0], [33, 70, 40, 3], [64, 33, 130, 16]] {
        let case = Case::new(sizes);
        let [n, out, inp, _] = sizes;
        let (w, x) = (rounded(&case.w), rounded(&numbers(n * inp, 4)));
        let want = case.result(&wide(&x), &wide(&w));
        let base = rounded(&numbers(n * out, 5));
        // f32 products of bf16 values are exact, so only the result is rounded.
        let layer = case.layer(Weight::Bf16(&w), None, Products::F32);
        let mut exact = vec![0f32; n * out];
        layer.forward(&x, &mut exact, false, &mut Scratch::default());
        close(&exact, &want, 2e-6, "f32 result");
        let mut stored = base.clone();
        layer.forward(&x, &mut stored, false, &mut Scratch::default());
        let far = |got: &[bf16], want: &[f64]| {
            for (g, w) in got.iter().zip(want) {
                let error = (f64::from(g.get()) - w).abs();
                let least = (f64::from(bf16::put(*w as f32).get()) - w).abs();
                assert!(error <= least + 1e-5, "{g} is not {w} rounded once");
            }
        };
        far(&stored, &want);
        stored.copy_from_slice(&base);
        layer.forward(&x, &mut stored, true, &mut Scratch::default());
        far(&stored, &wide(&base).iter().zip(&want).map(|(b, w)| b + w).collect::<Vec<_>>());
    }
}

#[test]
fn loras_part_is_not_lost_in_the_rounding_of_bf16() {
    // Each value of W·x lies between two bf16 values; LoRA adds a twentieth of their distance. On average that must
    // arrive, which it does not where W·x is rounded first.
    let (n, inp) = (4096, 16);
    let x = numbers(n * inp, 1);
    let (w, a, b) = (numbers(inp, 2), vec![0f32; inp].iter().map(|_| 1.0).collect::<Vec<f32>>(), [1.0f32]);
    let mut sums = [0f64; 2];
    for (scale, sum) in [0.0, 2e-4].into_iter().zip(&mut sums) {
        let lora =
            Some(LoraSlices { a: &a, b: &b, rank: 1, scale, dropout: None, initial: None, dora: None });
        let layer = Layer { weight: Weight::F32(&w), out: 1, inp, lora, products: Products::F32 };
        let mut y = rounded(&vec![0f32; n]);
        let ones: Vec<f32> = x.iter().map(|v| v.abs()).collect();
        layer.forward(&ones, &mut y, false, &mut Scratch::default());
        *sum = wide(&y).iter().sum();
    }
    let want = x.iter().map(|v| 2e-4 * f64::from(v.abs())).sum::<f64>();
    let got = sums[1] - sums[0];
    assert!((got / want - 1.0).abs() < 0.2, "LoRA added {got} in all, expected {want}");
}

#[test]
fn bf16_products_stay_within_rounding() {
    let case = Case::new([40, 50, 96, 4]);
    let [n, out, inp, _] = case.sizes;
    let (x, g) = (numbers(n * inp, 4), numbers(n * out, 5));
    let layer = case.layer(Weight::F32(&case.w), None, Products::Bf16);
    let mut y = vec![0f32; n * out];
    layer.forward(&x, &mut y, false, &mut Scratch::default());
    close(&y, &case.result(&wide(&x), &wide(&case.w)), 2.0 * BF16, "mixed result");
    let exact = case.layer(Weight::F32(&case.w), None, Products::F32);
    let (mut dx, mut want) = (vec![0f32; n * inp], vec![0f32; n * inp]);
    layer.backward(&x, &g, Some((&mut dx, false)), LayerGradients::default(), &mut Scratch::default());
    exact.backward(&x, &g, Some((&mut want, false)), LayerGradients::default(), &mut Scratch::default());
    close(&dx, &wide(&want), 2.0 * BF16, "mixed gradient");
}

#[test]
fn a_layer_matches_differences_adds_and_leaves_out_what_is_frozen() {
    for dropout in [None, Some(Dropout { p: 0.4, seed: 3 })] {
        let case = Case::new([6, 7, 5, 2]);
        let [n, out, inp, rank] = case.sizes;
        let (x, g) = (numbers(n * inp, 4), numbers(n * out, 5));
        let kept = |x: &[f64]| -> Vec<f64> {
            let mut mask = vec![1f32; x.len()];
            if let Some(dropout) = dropout {
                dropout.apply(&mut mask);
            }
            x.iter().zip(mask).map(|(x, m)| x * f64::from(m)).collect()
        };
        let reference = |v: &[Vec<f64>]| {
            let up = matmul_t(&matmul_t(&kept(&v[0]), &v[2], inp, rank), &v[3], rank, out);
            let y = matmul_t(&v[0], &v[1], inp, out);
            y.iter().zip(up).map(|(y, u)| y + f64::from(0.7f32) * u).collect()
        };
        let inputs = [x.clone(), case.w.clone(), case.a.clone(), case.b.clone()];
        let want = differences(&inputs, &g, &reference);
        let layer = case.layer(Weight::F32(&case.w), dropout, Products::F32);
        let mut y = vec![1f32; n * out];
        layer.forward(&x, &mut y, true, &mut Scratch::default());
        let result = reference(&inputs.each_ref().map(|v| wide(v)));
        close(&y, &result.iter().map(|v| v + 1.0).collect::<Vec<_>>(), 1e-5, "added result");

        // Every gradient starts at one; the second pass writes dx over.
        let [mut dx, mut dw, mut da, mut db] = inputs.each_ref().map(|v| vec![1f32; v.len()]);
        let into =
            LayerGradients { weight: Some(&mut dw), a: Some(&mut da), b: Some(&mut db), magnitude: None };
        let scratch = &mut Scratch::default();
        layer.backward(&x, &g, Some((&mut dx, true)), into, scratch);
        for (i, got) in [&dx, &dw, &da, &db].into_iter().enumerate() {
            let want: Vec<f64> = want[i].iter().map(|v| v + 1.0).collect();
            close(got, &want, 1e-4, &format!("gradient {i}"));
        }
        layer.backward(&x, &g, Some((&mut dx, false)), LayerGradients::default(), scratch);
        close(&dx, &want[0], 1e-4, "dx written over");
        let before = da.clone();
        let into = LayerGradients { b: Some(&mut db), ..Default::default() };
        layer.backward(&x, &g, None, into, scratch);
        close(&db, &want[3].iter().map(|v| 2.0 * v + 1.0).collect::<Vec<_>>(), 1e-4, "dB twice");
        assert_eq!(da, before);
    }
}

#[test]
fn dropout_is_a_function_of_seed_and_place() {
    let (p, seed) = (0.3, 77u64);
    let mut values = vec![1f32; 40_000];
    Dropout { p, seed }.apply(&mut values);
    for (i, value) in values.iter().enumerate() {
        // SplitMix64 of the place.
        let z = seed.wrapping_add((i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let kept = (z >> 32) as f64 >= p * 4_294_967_296.0 - 1.0;
        assert_eq!(*value, if kept { (1.0 / 0.7) as f32 } else { 0.0 }, "place {i}");
    }
}

#[test]
fn linear_refuses_factors_that_do_not_fit() -> Result<()> {
    let (x, w) = (plain(&[0.0; 6], &[2, 3])?, plain(&[0.0; 12], &[4, 3])?);
    let (a, b) = (plain(&[0.0; 6], &[2, 3])?, plain(&[0.0; 4], &[4, 1])?);
    let lora = Lora { a_ri: &a, b_or: &b, scale: 1.0, dropout: None };
    refuses(linear(&x, &w, Some(lora)), "LoRA A [r, 3] and B [4, r]");
    Ok(())
}

#[test]
fn linear_refuses_lora_on_a_weight_that_learns() -> Result<()> {
    let (x, w) = (plain(&[0.0; 6], &[2, 3])?, var(&[0.0; 12], &[4, 3])?);
    let (a, b) = (plain(&[0.0; 3], &[1, 3])?, plain(&[0.0; 4], &[4, 1])?);
    let lora = Lora { a_ri: &a, b_or: &b, scale: 1.0, dropout: None };
    refuses(linear(&x, &w, Some(lora)), "has to be frozen");
    Ok(())
}

#[test]
fn linear_refuses_dropout_of_everything() -> Result<()> {
    let (x, w) = (plain(&[0.0; 6], &[2, 3])?, plain(&[0.0; 12], &[4, 3])?);
    let (a, b) = (plain(&[0.0; 3], &[1, 3])?, plain(&[0.0; 4], &[4, 1])?);
    let lora = Lora { a_ri: &a, b_or: &b, scale: 1.0, dropout: Some(Dropout { p: 1.0, seed: 1 }) };
    refuses(linear(&x, &w, Some(lora)), "0 <= p < 1, got 1");
    Ok(())
}
