//! Every operation against finite differences of a plain f64 reference written out here.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use megacontext_kernels::linear::{Dropout, Lora, linear};
use megacontext_kernels::loss::{Gradient, IGNORE, head_cross_entropy};
use megacontext_kernels::{adamw, embedding, mlp, norm, rope, vjp};

/// Repeatable numbers in about [-1, 1].
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f64 / (1u64 << 23) as f64 - 1.0) as f32
        })
        .collect()
}

fn var(values: &[f32], dims: &[usize]) -> Result<Tensor> {
    Ok(Var::from_tensor(&Tensor::from_slice(values, dims, &Device::Cpu)?)?.as_tensor().clone())
}

fn plain(values: &[f32], dims: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_slice(values, dims, &Device::Cpu)?)
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Central differences of Σ probe·f(x) in f64, one input at a time.
fn differences(inputs: &[Vec<f32>], probe: &[f32], f: &dyn Fn(&[Vec<f64>]) -> Vec<f64>) -> Vec<Vec<f64>> {
    let base: Vec<Vec<f64>> = inputs.iter().map(|v| v.iter().map(|x| f64::from(*x)).collect()).collect();
    let value = |x: &[Vec<f64>]| f(x).iter().zip(probe).map(|(y, p)| y * f64::from(*p)).sum::<f64>();
    let step = 1e-5;
    (0..base.len())
        .map(|which| {
            (0..base[which].len())
                .map(|at| {
                    let mut moved = base.clone();
                    moved[which][at] += step;
                    let up = value(&moved);
                    moved[which][at] -= 2.0 * step;
                    (up - value(&moved)) / (2.0 * step)
                })
                .collect()
        })
        .collect()
}

fn close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let scale = want.iter().fold(1e-3f64, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*g) - w).abs() / scale;
        assert!(error < tolerance, "{what}[{i}]: got {g}, expected {w}");
    }
}

/// Runs `op`, checks its value and the gradients of all its inputs.
fn check(
    name: &str,
    shapes: &[&[usize]],
    op: &dyn Fn(&[Tensor]) -> Result<Tensor>,
    reference: &dyn Fn(&[Vec<f64>]) -> Vec<f64>,
) -> Result<()> {
    let values: Vec<Vec<f32>> =
        shapes.iter().enumerate().map(|(i, s)| numbers(s.iter().product(), i as u64 + 1)).collect();
    let inputs: Vec<Tensor> = values.iter().zip(shapes).map(|(v, s)| var(v, s)).collect::<Result<_>>()?;
    let y = op(&inputs)?;
    let wide: Vec<Vec<f64>> = values.iter().map(|v| v.iter().map(|x| f64::from(*x)).collect()).collect();
    close(&flat(&y), &reference(&wide), 1e-5, &format!("{name} value"));
    let probe = numbers(y.elem_count(), 99);
    let grads = vjp::seed(&y, plain(&probe, y.dims())?)?.backward()?;
    for (i, want) in differences(&values, &probe, reference).iter().enumerate() {
        let got = grads.get(&inputs[i]).unwrap_or_else(|| panic!("{name}: input {i} has no gradient"));
        close(&flat(got), want, 1e-4, &format!("{name} gradient {i}"));
    }
    // A gradient with stride 0, as a broadcast sum gives it.
    let grads = y.sum_all()?.backward()?;
    let ones = vec![1f32; y.elem_count()];
    for (i, want) in differences(&values, &ones, reference).iter().enumerate() {
        close(&flat(grads.get(&inputs[i]).unwrap()), want, 1e-4, &format!("{name} summed gradient {i}"));
    }
    Ok(())
}

fn matmul_t(x: &[f64], w: &[f64], inp: usize, out: usize) -> Vec<f64> {
    let mut y = Vec::new();
    for row in x.chunks(inp) {
        for o in 0..out {
            y.push(row.iter().zip(&w[o * inp..]).map(|(a, b)| a * b).sum());
        }
    }
    y
}

#[test]
fn rms_norm_matches_differences() -> Result<()> {
    for width in [1, 5, 16, 33] {
        check("rms_norm", &[&[2, 3, width], &[width]], &|x| Ok(norm::rms_norm(&x[0], &x[1], 1e-3)?), &|x| {
            let mut y = Vec::new();
            for row in x[0].chunks(width) {
                let mean = row.iter().map(|v| v * v).sum::<f64>() / width as f64;
                let r = 1.0 / (mean + f64::from(1e-3f32)).sqrt();
                y.extend(row.iter().zip(&x[1]).map(|(v, w)| v * r * w));
            }
            y
        })?;
    }
    Ok(())
}

#[test]
fn swiglu_matches_differences() -> Result<()> {
    check("swiglu", &[&[3, 37], &[3, 37]], &|x| Ok(mlp::swiglu(&x[0], &x[1])?), &|x| {
        x[0].iter().zip(&x[1]).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
    })
}

#[test]
fn rope_matches_differences() -> Result<()> {
    let (t, half) = (4, 3);
    let angles: Vec<f64> = (0..t * half).map(|i| 0.3 * i as f64).collect();
    let cos: Vec<f32> = angles.iter().map(|a| a.cos() as f32).collect();
    let sin: Vec<f32> = angles.iter().map(|a| a.sin() as f32).collect();
    let (cos_t, sin_t) = (plain(&cos, &[t, half])?, plain(&sin, &[t, half])?);
    check("rope", &[&[2, t, 2, 2 * half]], &|x| Ok(rope::rope(&x[0], &cos_t, &sin_t)?), &|x| {
        let mut y = vec![0.0; x[0].len()];
        for (i, head) in x[0].chunks(2 * half).enumerate() {
            let position = (i / 2) % t;
            for d in 0..half {
                let (c, s) = (f64::from(cos[position * half + d]), f64::from(sin[position * half + d]));
                y[i * 2 * half + d] = head[d] * c - head[half + d] * s;
                y[i * 2 * half + half + d] = head[half + d] * c + head[d] * s;
            }
        }
        y
    })
}

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
fn head_cross_entropy_matches_differences_in_chunks() -> Result<()> {
    let (n, e, v) = (9, 5, 21);
    let targets: Vec<u32> = (0..n as u32).map(|i| if i == 3 { IGNORE } else { i * 2 % v as u32 }).collect();
    let reference = |x: &[Vec<f64>]| {
        let logits = matmul_t(&x[0], &x[1], e, v);
        let nll = |(i, row): (usize, &[f64])| match targets[i] {
            IGNORE => 0.0,
            t => row.iter().map(|z| z.exp()).sum::<f64>().ln() - row[t as usize],
        };
        vec![logits.chunks(v).enumerate().map(nll).sum::<f64>()]
    };
    let (h, w) = (numbers(n * e, 1), numbers(v * e, 2));
    let want = differences(&[h.clone(), w.clone()], &[0.5], &reference);
    let mut head = vec![0f32; v * e];
    let (h, w) = (plain(&h, &[n, e])?, plain(&w, &[v, e])?);
    let gradient = Gradient::HiddenAndHead { scale: 0.5, head: &mut head };
    let loss = head_cross_entropy(&h, &w, &targets, gradient)?;
    assert_eq!(loss.count, n - 1);
    assert_eq!(loss.nll[3], 0.0);
    close(&flat(&loss.d_hidden.unwrap()), &want[0], 1e-4, "d hidden");
    close(&head, &want[1], 1e-4, "d head");
    let again = head_cross_entropy(&h, &w, &targets, Gradient::Skip)?;
    assert_eq!(again.nll, loss.nll);
    assert!(again.d_hidden.is_none());
    Ok(())
}

#[test]
fn head_cross_entropy_survives_large_logits_and_passes_nan_on() -> Result<()> {
    let h = plain(&[1e4, f32::NAN], &[2, 1])?;
    let w = plain(&[1.0, -1.0], &[2, 1])?;
    let nll = head_cross_entropy(&h, &w, &[1, 0], Gradient::Skip)?.nll;
    assert_eq!(nll[0], 2e4);
    assert!(nll[1].is_nan());
    Ok(())
}

#[test]
fn head_cross_entropy_refuses_a_target_outside_the_vocabulary() -> Result<()> {
    let h = plain(&[0.0; 2], &[1, 2])?;
    let error = head_cross_entropy(&h, &plain(&[0.0; 6], &[3, 2])?, &[3], Gradient::Skip).err().unwrap();
    assert!(error.to_string().contains("below 3, got 3"), "{error}");
    Ok(())
}

#[test]
fn embedding_gathers_rows_and_adds_their_gradients() -> Result<()> {
    let table = plain(&[0., 1., 2., 3., 4., 5.], &[3, 2])?;
    let rows = embedding::gather(&table, &[2, 0, 2])?;
    assert_eq!(flat(&rows), [4., 5., 0., 1., 4., 5.]);
    let mut gradient = vec![0f32; 6];
    embedding::scatter_add(&rows, &[2, 0, 2], &mut gradient)?;
    assert_eq!(gradient, [0., 1., 0., 0., 8., 10.]);
    let error = embedding::gather(&table, &[3]).err().unwrap();
    assert!(error.to_string().contains("below 3, got 3"), "{error}");
    Ok(())
}

#[test]
fn adamw_matches_the_formulas() -> Result<()> {
    let parameter = var(&[1.0, -2.0, 3.0], &[3])?;
    let view = parameter.detach();
    let (mut m, mut v) = (vec![0f32; 3], vec![0f32; 3]);
    let (mut p64, mut m64, mut v64) = (vec![1.0f64, -2.0, 3.0], [0f64; 3], [0f64; 3]);
    for step in 1..=5u64 {
        let gradient = [0.1 * step as f32, -0.2, 0.0];
        let with = adamw::AdamW {
            lr: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            gradient_scale: 0.5,
            step,
        };
        adamw::step(&parameter, &gradient, &mut m, &mut v, with)?;
        for i in 0..3 {
            let g = f64::from(gradient[i]) * 0.5;
            p64[i] *= 1.0 - 0.01 * 0.1;
            m64[i] = 0.9 * m64[i] + 0.1 * g;
            v64[i] = 0.95 * v64[i] + 0.05 * g * g;
            let (mh, vh) =
                (m64[i] / (1.0 - 0.9f64.powi(step as i32)), v64[i] / (1.0 - 0.95f64.powi(step as i32)));
            p64[i] -= 0.01 * mh / (vh.sqrt() + 1e-8);
        }
    }
    close(&flat(&parameter), &p64, 1e-6, "adamw");
    assert_eq!(flat(&view), flat(&parameter), "a frozen view shares the storage");
    Ok(())
}

#[test]
fn shapes_that_do_not_agree_are_refused() -> Result<()> {
    let x = plain(&[0.0; 6], &[2, 3])?;
    let says = |error: megacontext_kernels::error::KernelError, what: &str| {
        assert!(error.to_string().contains(what), "{error}");
    };
    says(linear(&x, &plain(&[0.0; 4], &[2, 2])?, None).err().unwrap(), "x [.., 2]");
    says(norm::rms_norm(&x, &plain(&[0.0; 2], &[2])?, 1e-5).err().unwrap(), "gain of shape [3]");
    says(mlp::swiglu(&x, &plain(&[0.0; 2], &[2])?).err().unwrap(), "up [2, 3]");
    says(rope::rope(&x, &x, &x).err().unwrap(), "rank 4");
    says(vjp::seed(&x, plain(&[0.0; 2], &[2])?).err().unwrap(), "gradient [2, 3]");
    Ok(())
}
