//! Rotary positions.

use anyhow::Result;
use megacontext_kernels::rope;

use crate::support::*;

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
fn rotation_of_bf16_rounds_once() {
    let (entries, heads, width) = (6, 3, 10);
    let angles = numbers(entries * width / 2, 5);
    let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
    let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
    let mut x = rounded(&numbers(entries * heads * width, 6));
    let mut exact = narrow(&x);
    for direction in [1.0, -1.0] {
        rope::rotate(&mut exact, heads, width, &cos, &sin, direction);
        rope::rotate(&mut x, heads, width, &cos, &sin, direction);
        assert_eq!(x, rounded(&exact));
        exact = narrow(&x);
    }
}

#[test]
fn rope_refuses_another_rank() -> Result<()> {
    let x = plain(&[0.0; 6], &[2, 3])?;
    refuses(rope::rope(&x, &x, &x), "rank 4");
    Ok(())
}

#[test]
fn rope_refuses_an_odd_width() -> Result<()> {
    let (x, table) = (plain(&[0.0; 6], &[1, 2, 1, 3])?, plain(&[0.0; 2], &[2, 1])?);
    refuses(rope::rope(&x, &table, &table), "an even head width, got 3");
    Ok(())
}

#[test]
fn rope_refuses_tables_of_another_shape() -> Result<()> {
    let (x, table) = (plain(&[0.0; 8], &[1, 2, 1, 4])?, plain(&[0.0; 3], &[3, 1])?);
    refuses(rope::rope(&x, &table, &table), "cos and sin of shape [2, 2]");
    Ok(())
}

/// Σ probe·y over the rotated and damped output y of f64 inputs, by each position's sigma.
fn damped(x: &[f64], probe: &[f64], sigma: &[f64], heads: usize, omega: &[f64]) -> f64 {
    let (half, width) = (omega.len(), 2 * omega.len());
    let mut sum = 0.0;
    for (i, (head, probe)) in x.chunks(width).zip(probe.chunks(width)).enumerate() {
        let position = (i / heads) % sigma.len();
        for d in 0..half {
            let keep = (-0.5 * (omega[d] * sigma[position]).powi(2)).exp();
            let (s, c) = (1.7 * position as f64 * omega[d]).sin_cos();
            sum += keep * probe[d] * (head[d] * c - head[half + d] * s);
            sum += keep * probe[half + d] * (head[half + d] * c + head[d] * s);
        }
    }
    sum
}

#[test]
fn the_gradient_of_sigma_matches_differences() {
    // Widths around the lanes of a sum, two rows of a batch over one table.
    for (heads, half) in [(1, 1), (2, 3), (3, 8), (2, 13)] {
        let (positions, rows) = (5, 2);
        let omega: Vec<f64> = (0..half).map(|i| 10f64.powf(-(i as f64) / half as f64)).collect();
        let sigma: Vec<f64> = (0..positions).map(|p| 0.3 * p as f64).collect();
        let len = rows * positions * heads * 2 * half;
        let (x, g) = (numbers(len, 3), numbers(len, 4));
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for (position, sigma) in sigma.iter().enumerate() {
            for w in &omega {
                let keep = (-0.5 * (w * sigma).powi(2)).exp();
                let (s, c) = (1.7 * position as f64 * w).sin_cos();
                cos.push((keep * c) as f32);
                sin.push((keep * s) as f32);
            }
        }
        let mut y = x.clone();
        rope::rotate(&mut y, heads, 2 * half, &cos, &sin, 1.0);
        let squared: Vec<f32> = omega.iter().map(|w| (w * w) as f32).collect();
        let mut sums = vec![0.0; positions];
        rope::damping_gradient(&y, &g, heads, 2 * half, &squared, &mut sums);
        let (x, g) = (wide(&x), wide(&g));
        for position in 0..positions {
            let value = |moved: f64| {
                let mut sigma = sigma.clone();
                sigma[position] += moved;
                damped(&x, &g, &sigma, heads, &omega)
            };
            let want = (value(1e-5) - value(-1e-5)) / 2e-5;
            let got = -sigma[position] * sums[position];
            assert!((got - want).abs() < 1e-5, "{heads} heads, {half} bands, {position}: {got}, {want}");
        }
        // bf16 operands give what their values give.
        let rounded = rounded(&y);
        let (mut of_bf16, mut of_f32) = (vec![0.0; positions], vec![0.0; positions]);
        let g: Vec<f32> = g.iter().map(|g| *g as f32).collect();
        rope::damping_gradient(&rounded, &g, heads, 2 * half, &squared, &mut of_bf16);
        rope::damping_gradient(&narrow(&rounded), &g, heads, 2 * half, &squared, &mut of_f32);
        assert_eq!(of_bf16, of_f32);
    }
}

#[test]
fn a_part_of_a_head_turns_and_the_rest_stays() {
    let (entries, heads, width, rotated) = (5, 2, 10, 4);
    let x = numbers(entries * heads * width, 1);
    let (cos, sin) = (numbers(entries * rotated / 2, 2), numbers(entries * rotated / 2, 3));
    let mut turned = x.clone();
    rope::rotate_part(&mut turned, heads, [width, rotated], &cos, &sin, 1.0);
    for (i, (head, got)) in x.chunks(width).zip(turned.chunks(width)).enumerate() {
        let mut part = head[..rotated].to_vec();
        let at = i / heads * rotated / 2;
        rope::rotate(&mut part, 1, rotated, &cos[at..at + rotated / 2], &sin[at..at + rotated / 2], 1.0);
        assert_eq!(got[..rotated], part);
        assert_eq!(got[rotated..], head[rotated..]);
    }
}
