//! Biases by places that the caller gives, instead of by entries' numbers: working contexts whose entries stand for spans.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

use megacontext_kernels::attention::slices::{Gradients, Mixed, Prepared};
use megacontext_kernels::attention::{Pattern, Rows};

const SIZES: [usize; 5] = [2, 45, 4, 2, 8];
const SLOPES: [f32; 4] = [0.5, 0.0, 0.03125, 0.25];

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn operands() -> [Vec<f32>; 4] {
    let [b, t, h, g, d] = SIZES;
    [
        numbers(b * t * h * d, 1),
        numbers(b * t * g * d, 2),
        numbers(b * t * g * d, 3),
        numbers(b * t * h * d, 4),
    ]
}

fn prepared(slopes: &[f32]) -> Prepared {
    let made = Prepared::new(SIZES, 0.4, Pattern::Dense, &Rows::default()).unwrap();
    made.with_slopes(slopes).unwrap()
}

fn run(prepared: &Prepared, [q, k, v, probe]: &[Vec<f32>; 4]) -> (Vec<f32>, [Vec<f32>; 3]) {
    let (mut mixed, mut gradients) = (Mixed::default(), Gradients::default());
    prepared.forward_into(q, k, v, &mut mixed);
    prepared.backward_into(q, k, v, &mixed, probe, &mut gradients);
    (mixed.out, [gradients.q, gradients.k, gradients.v])
}

/// Σ probe·attention in f64, from the definition.
fn reference(x: &[Vec<f64>; 4], positions: &[f32]) -> f64 {
    let [b, t, h, g, d] = SIZES;
    let [q, k, v, probe] = x;
    let mut sum = 0.0;
    for row in 0..b {
        for head in 0..h {
            let at = |i: usize| ((row * t + i) * h + head) * d;
            let kv = |j: usize| ((row * t + j) * g + head / (h / g)) * d;
            for i in 0..t {
                let score = |j: usize| {
                    let product: f64 = (0..d).map(|c| q[at(i) + c] * k[kv(j) + c]).sum();
                    let distance = f64::from((positions[i] - positions[j]).abs());
                    (0.4 * product - f64::from(SLOPES[head]) * distance).exp()
                };
                let weights: Vec<f64> = (0..=i).map(score).collect();
                let total: f64 = weights.iter().sum();
                for c in 0..d {
                    let mixed: f64 = weights.iter().enumerate().map(|(j, w)| w / total * v[kv(j) + c]).sum();
                    sum += probe[at(i) + c] * mixed;
                }
            }
        }
    }
    sum
}

#[test]
fn places_twice_as_far_apart_are_slopes_twice_as_steep() {
    let operands = operands();
    let twice: Vec<f32> = (0..SIZES[1]).map(|i| 2.0 * i as f32 + 7.0).collect();
    let far = run(&prepared(&SLOPES).with_positions(&twice).unwrap(), &operands);
    let steep = run(&prepared(&SLOPES.map(|s| 2.0 * s)), &operands);
    assert_eq!(far, steep);
}

#[test]
fn irregular_places_match_the_definition_and_its_differences() {
    let operands = operands();
    let positions: Vec<f32> = (0..SIZES[1]).map(|i| (i * i) as f32 / 9.0 + i as f32 % 3.0).collect();
    let (out, gradients) = run(&prepared(&SLOPES).with_positions(&positions).unwrap(), &operands);
    let wide = operands.clone().map(|x| x.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>());
    let value: f64 = out.iter().zip(&wide[3]).map(|(o, p)| f64::from(*o) * p).sum();
    let want = reference(&wide, &positions);
    assert!((value - want).abs() < 1e-4 * want.abs().max(1.0), "{value}, {want}");
    for (which, gradient) in gradients.iter().enumerate() {
        for at in (0..gradient.len()).step_by(gradient.len() / 7) {
            let moved = |by: f64| {
                let mut x = wide.clone();
                x[which][at] += by;
                reference(&x, &positions)
            };
            let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            let got = f64::from(gradient[at]);
            assert!((got - want).abs() < 1e-4, "operand {which} at {at}: {got}, {want}");
        }
    }
}

#[test]
fn another_number_of_places_is_refused() {
    let error = prepared(&SLOPES).with_positions(&[0.0; 44]).unwrap_err().to_string();
    assert!(error.contains("expected 45 finite positions, one per entry of a row, got 44"), "{error}");
}

#[test]
fn a_place_that_is_not_finite_is_refused() {
    let mut positions = vec![0.0; SIZES[1]];
    positions[3] = f32::NAN;
    let error = prepared(&SLOPES).with_positions(&positions).unwrap_err().to_string();
    assert!(error.contains("expected 45 finite positions, one per entry of a row, got NaN"), "{error}");
}
