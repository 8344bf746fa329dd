//! GELU, exact and by tanh, against f64 and finite differences.

use megacontext_kernels::gelu::{
    Gelu, geglu_backward_in_place, geglu_into, gelu_backward_in_place, gelu_into,
};

use crate::support::*;

/// erf by its Taylor series, which converges everywhere; good to 1e-9 for |x| < 5.
fn erf(x: f64) -> f64 {
    let mut term = x;
    let mut sum = x;
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

fn gelu(kind: Gelu, x: f64) -> f64 {
    match kind {
        Gelu::Exact => x * 0.5 * (1.0 + erf(x / 2f64.sqrt())),
        Gelu::Tanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
    }
}

const KINDS: [Gelu; 2] = [Gelu::Exact, Gelu::Tanh];

#[test]
fn gelu_is_right_from_minus_seven_to_seven() {
    let x: Vec<f32> = (-7000..=7000).map(|i| i as f32 * 1e-3).collect();
    for kind in KINDS {
        let mut out = vec![0f32; x.len()];
        gelu_into(kind, &x, &mut out);
        for (x, got) in x.iter().zip(&out) {
            let want = gelu(kind, f64::from(*x));
            assert!((f64::from(*got) - want).abs() < 2e-6, "{kind:?}({x}): got {got}, expected {want}");
        }
    }
}

#[test]
fn gelu_goes_to_its_limits() {
    for kind in KINDS {
        let mut out = [0f32; 5];
        gelu_into(kind, &[-1e4, 1e4, f32::NAN, 0.0, f32::INFINITY], &mut out);
        assert_eq!((out[1], out[3], out[4]), (1e4, 0.0, f32::INFINITY), "{kind:?}");
        assert!(out[0].abs() < 1e-30 && out[2].is_nan(), "{kind:?}");
    }
}

#[test]
fn gelu_matches_differences() {
    let n = 20_001;
    let x: Vec<f32> = numbers(n, 1).iter().map(|v| v * 4.0).collect();
    let g = numbers(n, 2);
    for kind in KINDS {
        let mut dx = x.clone();
        gelu_backward_in_place(kind, &mut dx, &g);
        let want: Vec<f64> = x.iter().zip(&g).map(|(x, g)| slope(kind, *x) * f64::from(*g)).collect();
        close(&dx, &want, 1e-5, "gradient");
    }
}

fn slope(kind: Gelu, x: f32) -> f64 {
    let (x, step) = (f64::from(x), 1e-4);
    (gelu(kind, x + step) - gelu(kind, x - step)) / (2.0 * step)
}

#[test]
fn gated_gelu_matches_differences() {
    let n = 20_001;
    let gate: Vec<f32> = numbers(n, 1).iter().map(|v| v * 4.0).collect();
    let (up, g) = (numbers(n, 2), numbers(n, 3));
    for kind in KINDS {
        let mut out = vec![0f32; n];
        geglu_into(kind, &gate, &up, &mut out);
        let value = |i: usize| gelu(kind, f64::from(gate[i]));
        close(&out, &(0..n).map(|i| value(i) * f64::from(up[i])).collect::<Vec<_>>(), 1e-5, "value");
        let (mut dgate, mut dup) = (gate.clone(), up.clone());
        geglu_backward_in_place(kind, &mut dgate, &mut dup, &g);
        let want = (0..n).map(|i| slope(kind, gate[i]) * f64::from(up[i] * g[i])).collect::<Vec<_>>();
        close(&dgate, &want, 1e-5, "gate");
        close(&dup, &(0..n).map(|i| value(i) * f64::from(g[i])).collect::<Vec<_>>(), 1e-5, "up");
    }
}

#[test]
fn gelu_reads_and_writes_bf16() {
    let n = 20_000;
    let (gate, up, g) = (rounded(&numbers(n, 1)), rounded(&numbers(n, 2)), numbers(n, 3));
    for kind in KINDS {
        let (gate32, up32) = (narrow(&gate), narrow(&up));
        let (mut want, mut got) = (vec![0f32; n], rounded(&vec![0f32; n]));
        gelu_into(kind, &gate32, &mut want);
        gelu_into(kind, &gate, &mut got);
        assert_eq!(got, rounded(&want));
        geglu_into(kind, &gate32, &up32, &mut want);
        geglu_into(kind, &gate, &up, &mut got);
        assert_eq!(got, rounded(&want));
        let (mut dx32, mut dx) = (gate32.clone(), gate.clone());
        gelu_backward_in_place(kind, &mut dx32, &g);
        gelu_backward_in_place(kind, &mut dx, &g);
        assert_eq!(dx, rounded(&dx32));
        let (mut dgate32, mut dup32, mut dgate, mut dup) = (gate32, up32, gate.clone(), up.clone());
        geglu_backward_in_place(kind, &mut dgate32, &mut dup32, &g);
        geglu_backward_in_place(kind, &mut dgate, &mut dup, &g);
        assert_eq!((dgate, dup), (rounded(&dgate32), rounded(&dup32)));
    }
}
