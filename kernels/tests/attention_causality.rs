//! No output of a causal pattern depends on a later input, through one layer or several.

#[path = "attention/support.rs"]
#[allow(dead_code)]
mod support;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use megacontext_kernels::attention::{Pattern, Rows, attention};
use support::{flat, random};

const HEADS: usize = 3;
const WIDTH: usize = 4;

/// Layers of attention with a residual; q, k and v are all made from the input.
fn stack(x: &Tensor, layers: usize, pattern: Pattern, rows: &Rows) -> Result<Tensor> {
    let mut x = x.clone();
    for _ in 0..layers {
        let k = x.narrow(2, 0, 1)?;
        let v = x.narrow(2, 1, 1)?;
        x = (attention(&x, &k, &v, 0.7, pattern, rows)? + &x)?;
    }
    Ok(x)
}

fn patterns(entries: usize) -> Vec<Pattern> {
    let groups = [2, 3, 8, entries / 2, entries - 1, entries, 2 * entries];
    let shifted = groups.into_iter().filter(|g| *g >= 2).map(|group| Pattern::ShiftedSparse { group });
    std::iter::once(Pattern::Dense).chain(shifted).collect()
}

#[test]
fn outputs_before_a_changed_entry_are_bit_identical() -> Result<()> {
    for entries in [5, 24, 33, 300] {
        for pattern in patterns(entries) {
            for layers in 1..=3 {
                let rows = Rows::default();
                let x = random(&[1, entries, HEADS, WIDTH], 7)?;
                let before = flat(&stack(&x, layers, pattern, &rows)?)?;
                let row = HEADS * WIDTH;
                for j in (0..entries).step_by(entries / 5) {
                    let mut values = flat(&x)?;
                    values[j * row..(j + 1) * row].iter_mut().for_each(|x| *x = -2.0 * *x + 0.5);
                    let changed = Tensor::from_vec(values, x.dims(), &Device::Cpu)?;
                    let after = flat(&stack(&changed, layers, pattern, &rows)?)?;
                    assert_eq!(
                        after[..j * row],
                        before[..j * row],
                        "T {entries} {pattern:?} layers {layers} j {j}"
                    );
                    assert_ne!(after[j * row..], before[j * row..], "the entry itself does change");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_of_later_entries_are_exactly_zero() -> Result<()> {
    for entries in [7, 24, 300] {
        for pattern in patterns(entries) {
            for layers in 1..=3 {
                let x = Var::from_tensor(&random(&[1, entries, HEADS, WIDTH], 7)?)?;
                for i in (0..entries).step_by(entries / 4) {
                    let out = stack(&x, layers, pattern, &Rows::default())?;
                    let grads = out.narrow(1, i, 1)?.sum_all()?.backward()?;
                    let gradient = flat(grads.get(&x).expect("a gradient"))?;
                    let later = &gradient[(i + 1) * HEADS * WIDTH..];
                    assert!(later.iter().all(|g| *g == 0.0), "T {entries} {pattern:?} layers {layers} i {i}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn segments_do_not_see_each_other_through_layers() -> Result<()> {
    let rows = Rows { segments: Some(vec![vec![0, 9, 21]]), lengths: None };
    for pattern in [Pattern::Dense, Pattern::ShiftedSparse { group: 8 }, Pattern::Bidirectional] {
        let x = Var::from_tensor(&random(&[1, 30, HEADS, WIDTH], 7)?)?;
        let out = stack(&x, 3, pattern, &rows)?;
        let grads = out.narrow(1, 9, 12)?.sum_all()?.backward()?;
        let gradient = flat(grads.get(&x).expect("a gradient"))?;
        let row = HEADS * WIDTH;
        let outside = gradient[..9 * row].iter().chain(&gradient[21 * row..]);
        assert!(outside.into_iter().all(|g| *g == 0.0), "{pattern:?}");
    }
    Ok(())
}

#[test]
fn a_boundary_hides_a_key_in_no_more_than_half_of_the_heads() -> Result<()> {
    use megacontext_kernels::attention::reference::{Sizes, sees};
    let (entries, group) = (64, 8);
    for heads in [2, 3, 5, 8] {
        let sizes = Sizes { batch: 1, entries, heads, kv_heads: heads, width: 1 };
        let pattern = Pattern::ShiftedSparse { group };
        for i in 1..entries {
            let seeing =
                (0..heads).filter(|h| sees(&sizes, pattern, &Rows::default(), 0, *h, i, i - 1)).count();
            assert!(seeing >= heads / 2, "heads {heads}, entry {i}: {seeing} heads see the entry before");
        }
    }
    Ok(())
}
