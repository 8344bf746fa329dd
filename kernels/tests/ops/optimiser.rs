//! AdamW.

use anyhow::Result;
use megacontext_kernels::adamw;

use crate::support::*;

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
