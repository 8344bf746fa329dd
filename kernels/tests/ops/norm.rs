//! RMSNorm and LayerNorm.

use anyhow::Result;
use megacontext_kernels::norm;

use crate::support::*;

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

/// LayerNorm in f64.
fn layer(x: &[f64], w: &[f64], b: Option<&[f64]>, eps: f64) -> Vec<f64> {
    let width = w.len();
    let mut y = Vec::new();
    for row in x.chunks(width) {
        let mean = row.iter().sum::<f64>() / width as f64;
        let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / width as f64;
        let r = 1.0 / (variance + eps).sqrt();
        y.extend((0..width).map(|i| (row[i] - mean) * r * w[i] + b.map_or(0.0, |b| b[i])));
    }
    y
}

#[test]
fn layer_norm_matches_differences() -> Result<()> {
    let eps = f64::from(1e-2f32);
    for width in [1, 5, 16, 33] {
        let (x, row): (&[usize], &[usize]) = (&[2, 3, width], &[width]);
        check(
            "layer_norm",
            &[x, row, row],
            &|x| Ok(norm::layer_norm(&x[0], &x[1], Some(&x[2]), eps)?),
            &|x| layer(&x[0], &x[1], Some(&x[2]), eps),
        )?;
        check(
            "layer_norm without bias",
            &[x, row],
            &|x| Ok(norm::layer_norm(&x[0], &x[1], None, eps)?),
            &|x| layer(&x[0], &x[1], None, eps),
        )?;
    }
    Ok(())
}

#[test]
fn norms_read_and_write_bf16() {
    let (width, rows) = (37, 3);
    let x = rounded(&numbers(rows * width, 1));
    let (w, b, g) = (numbers(width, 2), numbers(width, 3), numbers(rows * width, 4));
    // bf16 in and f32 out is the f32 operation on the same values; bf16 out is that, rounded.
    let exact = narrow(&x);
    let n = rows * width;
    let (mut want, mut got, mut stored) = (vec![0f32; n], vec![0f32; n], rounded(&vec![0f32; n]));
    norm::rms_forward_into(&exact, &w, 1e-5, &mut want);
    norm::rms_forward_into(&x, &w, 1e-5, &mut got);
    norm::rms_forward_into(&x, &w, 1e-5, &mut stored);
    assert_eq!(got, want);
    assert_eq!(stored, rounded(&want));
    norm::layer_forward_into(&exact, &w, Some(&b), 1e-5, &mut want);
    norm::layer_forward_into(&x, &w, Some(&b), 1e-5, &mut got);
    norm::layer_forward_into(&x, &w, Some(&b), 1e-5, &mut stored);
    assert_eq!(got, want);
    assert_eq!(stored, rounded(&want));

    let (mut want, mut got) = (vec![1f32; n], vec![1f32; n]);
    let (mut want_w, mut got_w) = (vec![2f32; width], vec![2f32; width]);
    norm::rms_backward_add(&exact, &w, &g, 1e-5, &mut want, Some(&mut want_w));
    norm::rms_backward_add(&x, &w, &g, 1e-5, &mut got, Some(&mut got_w));
    assert_eq!((got, got_w), (want, want_w));
}

#[test]
fn norm_backward_adds_and_leaves_out_what_is_frozen() {
    let (width, rows) = (5, 40);
    let (x, w, g) = (numbers(rows * width, 1), numbers(width, 2), numbers(rows * width, 3));
    let n = rows * width;
    let (mut once, mut twice) = (vec![0f32; n], vec![0f32; n]);
    let (mut dw, mut db) = (vec![0f32; width], vec![0f32; width]);
    norm::layer_backward_add(&x, &w, &g, 1e-5, &mut once, None, Some(&mut db));
    norm::layer_backward_add(&x, &w, &g, 1e-5, &mut twice, Some(&mut dw), None);
    assert_eq!(once, twice);
    norm::layer_backward_add(&x, &w, &g, 1e-5, &mut twice, None, None);
    close(&twice, &once.iter().map(|v| 2.0 * f64::from(*v)).collect::<Vec<_>>(), 1e-6, "added twice");
    let sums: Vec<f64> = (0..width).map(|i| (0..rows).map(|r| f64::from(g[r * width + i])).sum()).collect();
    close(&db, &sums, 1e-5, "bias");
}

#[test]
fn a_norm_refuses_a_gain_of_another_width() -> Result<()> {
    let x = plain(&[0.0; 6], &[2, 3])?;
    refuses(norm::rms_norm(&x, &plain(&[0.0; 2], &[2])?, 1e-5), "gain of shape [3]");
    refuses(norm::layer_norm(&x, &plain(&[0.0; 2], &[2])?, None, 1e-5), "gain of shape [3]");
    Ok(())
}

#[test]
fn a_norm_refuses_a_bias_of_another_width() -> Result<()> {
    let (x, w) = (plain(&[0.0; 6], &[2, 3])?, plain(&[0.0; 3], &[3])?);
    refuses(norm::layer_norm(&x, &w, Some(&plain(&[0.0; 2], &[2])?), 1e-5), "bias of shape [3]");
    Ok(())
}

#[test]
fn a_norm_refuses_bf16_tensors() -> Result<()> {
    let (x, w) = (plain(&[0.0; 6], &[2, 3])?.to_dtype(candle_core::DType::BF16)?, plain(&[0.0; 3], &[3])?);
    refuses(norm::rms_norm(&x, &w, 1e-5), "f32 operands, got BF16");
    Ok(())
}
