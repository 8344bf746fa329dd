//! The loss over the output head.

use anyhow::Result;
use megacontext_kernels::loss::{Gradient, IGNORE, head_cross_entropy};

use crate::support::*;

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
