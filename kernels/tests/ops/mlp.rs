//! SwiGLU and relu².

use anyhow::Result;
use megacontext_kernels::mlp;

use crate::support::*;

#[test]
fn swiglu_matches_differences() -> Result<()> {
    check("swiglu", &[&[3, 37], &[3, 37]], &|x| Ok(mlp::swiglu(&x[0], &x[1])?), &|x| {
        x[0].iter().zip(&x[1]).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
    })
}

#[test]
fn relu2_matches_differences() -> Result<()> {
    check("relu2", &[&[3, 37]], &|x| Ok(mlp::relu2(&x[0])?), &|x| {
        x[0].iter().map(|z| z.max(0.0) * z.max(0.0)).collect()
    })
}

#[test]
fn nonlinearities_pass_nan_on() {
    let mut out = [0f32; 2];
    mlp::relu2_into(&[f32::NAN, -1.0], &mut out);
    assert!(out[0].is_nan() && out[1] == 0.0);
    mlp::swiglu_into(&[f32::NAN, -100.0], &[1.0, 1.0], &mut out);
    assert!(out[0].is_nan() && out[1].abs() < 1e-30);
}

#[test]
fn nonlinearities_read_and_write_bf16() {
    let n = 20_000;
    let (gate, up, g) = (rounded(&numbers(n, 1)), rounded(&numbers(n, 2)), numbers(n, 3));
    let (mut gate32, mut up32) = (narrow(&gate), narrow(&up));
    let (mut want, mut got) = (vec![0f32; n], rounded(&vec![0f32; n]));
    mlp::swiglu_into(&gate32, &up32, &mut want);
    mlp::swiglu_into(&gate, &up, &mut got);
    assert_eq!(got, rounded(&want));
    let (mut d_gate, mut d_up) = (gate.clone(), up.clone());
    mlp::swiglu_backward_in_place(&mut gate32, &mut up32, &g);
    mlp::swiglu_backward_in_place(&mut d_gate, &mut d_up, &g);
    assert_eq!((d_gate, d_up), (rounded(&gate32), rounded(&up32)));

    let mut x32 = narrow(&gate);
    mlp::relu2_into(&x32, &mut want);
    mlp::relu2_into(&gate, &mut got);
    assert_eq!(got, rounded(&want));
    let mut dx = gate.clone();
    mlp::relu2_backward_in_place(&mut x32, &g);
    mlp::relu2_backward_in_place(&mut dx, &g);
    assert_eq!(dx, rounded(&x32));
}

#[test]
fn nonlinearities_in_place_are_the_same() {
    let x = numbers(20_000, 1);
    let (mut want, mut got) = (vec![0f32; x.len()], x.clone());
    mlp::relu2_into(&x, &mut want);
    mlp::relu2_in_place(&mut got);
    assert_eq!(got, want);
    let mut got = x.clone();
    mlp::swiglu_into(&x, &vec![1.0; x.len()], &mut want);
    mlp::silu_in_place(&mut got);
    assert_eq!(got, want);
    let mut odd = [f32::NAN];
    mlp::relu2_in_place(&mut odd);
    assert!(odd[0].is_nan());
}

#[test]
fn swiglu_refuses_shapes_that_differ() -> Result<()> {
    refuses(mlp::swiglu(&plain(&[0.0; 6], &[2, 3])?, &plain(&[0.0; 2], &[2])?), "up [2, 3]");
    Ok(())
}
