//! Repeatable inputs, finite differences in f64, and comparisons.

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use megacontext_kernels::store::{Store, bf16};
use megacontext_kernels::vjp;

/// Repeatable numbers in about [-1, 1].
pub fn numbers(n: usize, seed: u64) -> Vec<f32> {
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

pub fn var(values: &[f32], dims: &[usize]) -> Result<Tensor> {
    Ok(Var::from_tensor(&Tensor::from_slice(values, dims, &Device::Cpu)?)?.as_tensor().clone())
}

pub fn plain(values: &[f32], dims: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_slice(values, dims, &Device::Cpu)?)
}

pub fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Central differences of Σ probe·f(x) in f64, one input at a time.
pub fn differences(inputs: &[Vec<f32>], probe: &[f32], f: &dyn Fn(&[Vec<f64>]) -> Vec<f64>) -> Vec<Vec<f64>> {
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

pub fn close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let scale = want.iter().fold(1e-3f64, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*g) - w).abs() / scale;
        assert!(error < tolerance, "{what}[{i}]: got {g}, expected {w}");
    }
}

/// Runs `op`, checks its value and the gradients of all its inputs.
pub fn check(
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

pub fn matmul_t(x: &[f64], w: &[f64], inp: usize, out: usize) -> Vec<f64> {
    let mut y = Vec::new();
    for row in x.chunks(inp) {
        for o in 0..out {
            y.push(row.iter().zip(&w[o * inp..]).map(|(a, b)| a * b).sum());
        }
    }
    y
}

/// The refusal of an operation says `what`.
pub fn refuses<T>(result: megacontext_kernels::error::Result<T>, what: &str) {
    let error = result.err().unwrap_or_else(|| panic!("expected a refusal that says {what:?}")).to_string();
    assert!(error.contains(what), "expected {what:?} in {error:?}");
}

/// The same values stored in bf16.
pub fn rounded(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|v| bf16::put(*v)).collect()
}

/// Values in f64.
pub fn wide<S: Store>(values: &[S]) -> Vec<f64> {
    values.iter().map(|v| f64::from(v.get())).collect()
}

/// Values in f32.
pub fn narrow<S: Store>(values: &[S]) -> Vec<f32> {
    values.iter().map(|v| v.get()).collect()
}

/// Relative error of a value rounded to bf16: half of a unit in the last of 8 bits.
pub const BF16: f64 = 1.0 / 256.0;
