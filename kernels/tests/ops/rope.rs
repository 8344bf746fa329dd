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
