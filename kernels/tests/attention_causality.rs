//! No output of a causal pattern depends on a later input, through one layer or several.

#[path = "attention/support.rs"]
#[allow(dead_code)]
mod support;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use megacontext_kernels::attention::{Options, Pattern, Rows, attention_with};
use megacontext_kernels::gemm::Products;
use support::{BOTH, SHIFTED, WINDOW, flat, random};

const HEADS: usize = 3;
const WIDTH: usize = 4;

/// Layers of attention with a residual; q, k and v are all made from the input.
#[derive(Clone, Copy, Debug)]
struct Stack<'a> {
    layers: usize,
    pattern: Pattern,
    rows: &'a Rows,
    products: Products,
    scale: f64,
}

impl Stack<'_> {
    fn run(&self, x: &Tensor) -> Result<Tensor> {
        let Self { pattern, rows, products, scale, .. } = *self;
        let options = Options { scale, pattern, rows, slopes: Some(&[0.01, 0.0, 0.1]), products };
        let mut x = x.clone();
        for _ in 0..self.layers {
            let (k, v) = (x.narrow(2, 0, 1)?, x.narrow(2, 1, 1)?);
            x = (attention_with(&x, &k, &v, &options)? + &x)?;
        }
        Ok(x)
    }
}

/// Causal patterns, through one layer and several, for both products. The larger scale makes scores that move the running
/// top of the online softmax at many tiles.
fn stacks(entries: usize, rows: &Rows) -> impl Iterator<Item = Stack<'_>> {
    let groups = [2, 3, 8, 64, entries / 2, entries - 1, entries, 2 * entries];
    let windows = [1, 2, 31, 64, entries / 2, entries + 1];
    let patterns = std::iter::once(Pattern::Dense)
        .chain(groups.into_iter().filter(|group| *group >= 2).map(SHIFTED))
        .chain(windows.into_iter().map(WINDOW));
    patterns.flat_map(move |pattern| {
        BOTH.into_iter().flat_map(move |products| {
            [(1, 40.0), (2, 0.7), (3, 4.0)].map(|(layers, scale)| Stack {
                layers,
                pattern,
                rows,
                products,
                scale,
            })
        })
    })
}

/// Lengths on both sides of a panel (32), a tile (64) and a block (256 or 512) of the kernels.
const LENGTHS: [usize; 7] = [5, 24, 33, 65, 130, 300, 600];

#[test]
fn outputs_before_a_changed_entry_are_bit_identical() -> Result<()> {
    let rows = Rows::default();
    for entries in LENGTHS {
        let x = random(&[1, entries, HEADS, WIDTH], 7)?;
        for stack in stacks(entries, &rows) {
            let before = flat(&stack.run(&x)?)?;
            let row = HEADS * WIDTH;
            for j in (0..entries).step_by(entries / 5) {
                let mut values = flat(&x)?;
                values[j * row..(j + 1) * row].iter_mut().for_each(|x| *x = -3.0 * *x + 0.5);
                let changed = Tensor::from_vec(values, x.dims(), &Device::Cpu)?;
                let after = flat(&stack.run(&changed)?)?;
                assert_eq!(after[..j * row], before[..j * row], "T {entries} {stack:?} j {j}");
                assert_ne!(after[j * row..], before[j * row..], "the entry itself does change");
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_of_later_entries_are_exactly_zero() -> Result<()> {
    let rows = Rows::default();
    for entries in LENGTHS.into_iter().chain([1100]) {
        let x = Var::from_tensor(&random(&[1, entries, HEADS, WIDTH], 7)?)?;
        // At the longest, one in ten of the stacks.
        for stack in stacks(entries, &rows).step_by(if entries > 1000 { 10 } else { 1 }) {
            let out = stack.run(&x)?;
            for i in (0..entries).step_by(entries / 4) {
                let grads = out.narrow(1, i, 1)?.sum_all()?.backward()?;
                let gradient = flat(grads.get(&x).expect("a gradient"))?;
                let (own, later) = gradient.split_at((i + 1) * HEADS * WIDTH);
                assert!(later.iter().all(|g| *g == 0.0), "T {entries} {stack:?} i {i}");
                assert!(own.iter().any(|g| *g != 0.0), "T {entries} {stack:?} i {i}: its own gradient");
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
        let stack = Stack { layers: 3, pattern, rows: &rows, products: Products::F32, scale: 0.7 };
        let out = stack.run(&x)?;
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
