//! AdamW.

use anyhow::Result;
use megacontext_kernels::adamw::{self, AdamW, Untouched};
use megacontext_kernels::embedding::SparseRows;

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

const WITH: AdamW =
    AdamW { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, gradient_scale: 0.5, step: 3 };

#[test]
fn a_step_on_rows_is_the_dense_step_or_leaves_the_others() -> Result<()> {
    // Rows enough for several tasks.
    let (vocab, width) = (700, 50);
    let mut rows = SparseRows::new(width);
    rows.add(&[0, 5, 650, 699, 5], &numbers(5 * width, 1))?;
    let mut gradient = vec![0f32; vocab * width];
    rows.add_to(&mut gradient)?;
    let start = numbers(vocab * width, 2);
    let moments =
        (numbers(vocab * width, 3), numbers(vocab * width, 4).iter().map(|v| v * v).collect::<Vec<_>>());
    let run = |untouched: Option<Untouched>| -> Result<[Vec<f32>; 3]> {
        let (table, (mut m, mut v)) = (plain(&start, &[vocab, width])?, moments.clone());
        match untouched {
            None => adamw::step(&table, &gradient, &mut m, &mut v, WITH)?,
            Some(untouched) => adamw::step_rows(&table, &rows, untouched, &mut m, &mut v, WITH)?,
        }
        Ok([flat(&table), m, v])
    };
    let dense = run(None)?;
    assert_eq!(run(Some(Untouched::Step))?, dense);
    let left = run(Some(Untouched::Leave))?;
    for (which, before) in [&start, &moments.0, &moments.1].into_iter().enumerate() {
        for id in 0..vocab {
            let row = id * width..(id + 1) * width;
            let touched = rows.ids().contains(&(id as u32));
            let want = if touched { &dense[which][row.clone()] } else { &before[row.clone()] };
            assert_eq!(&left[which][row], want, "row {id} of {which}");
        }
    }
    Ok(())
}

#[test]
fn adamw_refuses_a_gradient_of_another_size() -> Result<()> {
    let p = plain(&[0.0; 3], &[3])?;
    refuses(adamw::step(&p, &[0.0; 2], &mut [0.0; 3], &mut [0.0; 3], WITH), "a gradient of 3 values, got 2");
    Ok(())
}

#[test]
fn adamw_refuses_moments_of_another_size() -> Result<()> {
    let p = plain(&[0.0; 3], &[3])?;
    refuses(
        adamw::step(&p, &[0.0; 3], &mut [0.0; 2], &mut [0.0; 3], WITH),
        "moments of 3 values, got 2 and 3",
    );
    Ok(())
}

#[test]
fn adamw_refuses_a_parameter_that_is_not_f32() -> Result<()> {
    let p = plain(&[0.0; 3], &[3])?.to_dtype(candle_core::DType::F64)?;
    refuses(adamw::step(&p, &[0.0; 3], &mut [0.0; 3], &mut [0.0; 3], WITH), "a contiguous f32 parameter");
    Ok(())
}

#[test]
fn adamw_refuses_rows_of_another_width() -> Result<()> {
    let p = plain(&[0.0; 6], &[3, 2])?;
    let rows = SparseRows::new(3);
    refuses(
        adamw::step_rows(&p, &rows, Untouched::Leave, &mut [0.0; 6], &mut [0.0; 6], WITH),
        "rows of the table's 2 values, at least one, got 3",
    );
    Ok(())
}

#[test]
fn adamw_refuses_a_row_outside_the_table() -> Result<()> {
    let p = plain(&[0.0; 6], &[3, 2])?;
    let mut rows = SparseRows::new(2);
    rows.add(&[3], &[1.0, 1.0])?;
    refuses(
        adamw::step_rows(&p, &rows, Untouched::Step, &mut [0.0; 6], &mut [0.0; 6], WITH),
        "row: expected below 3, got 3",
    );
    assert_eq!(flat(&p), [0.0; 6]);
    Ok(())
}
