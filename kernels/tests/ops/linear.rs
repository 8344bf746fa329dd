//! Linear layers, with and without LoRA.

use anyhow::Result;
use candle_core::{Device, Tensor};
use megacontext_kernels::linear::{Dropout, Lora, linear};

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
