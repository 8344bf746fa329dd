//! Gathering rows, and their gradients.

use anyhow::Result;
use candle_core::DType;
use megacontext_kernels::embedding::{SparseRows, gather, gather_into, scatter_add};
use megacontext_kernels::linear::Weight;

use crate::support::*;

#[test]
fn embedding_gathers_rows_and_adds_their_gradients() -> Result<()> {
    let table = plain(&[0., 1., 2., 3., 4., 5.], &[3, 2])?;
    let rows = flat(&gather(&table, &[2, 0, 2])?);
    assert_eq!(rows, [4., 5., 0., 1., 4., 5.]);
    let mut gradient = vec![1f32; 6];
    scatter_add(&rows, 2, &[2, 0, 2], &mut gradient)?;
    assert_eq!(gradient, [1., 2., 1., 1., 9., 11.]);
    Ok(())
}

#[test]
fn gathering_goes_between_storage_types() -> Result<()> {
    let (vocab, width, ids) = (40, 33, [3, 39, 0, 3]);
    let table = numbers(vocab * width, 1);
    let stored = rounded(&table);
    let (mut exact, mut narrowed) = (vec![0f32; ids.len() * width], rounded(&vec![0f32; ids.len() * width]));
    gather_into(Weight::F32(&table), width, &ids, &mut exact)?;
    for (row, id) in exact.chunks(width).zip(ids) {
        assert_eq!(row, &table[id as usize * width..][..width]);
    }
    gather_into(Weight::F32(&table), width, &ids, &mut narrowed)?;
    assert_eq!(narrowed, rounded(&exact));
    gather_into(Weight::Bf16(&stored), width, &ids, &mut exact)?;
    assert_eq!(rounded(&exact), narrowed);
    Ok(())
}

#[test]
fn scattering_adds_in_token_order_on_any_number_of_threads() -> Result<()> {
    // Few ids, many tokens, and blocks of rows of which most get none.
    let (vocab, width, n) = (5000, 20, 3000);
    let ids: Vec<u32> = (0..n as u32).map(|i| i * i % 97 * 51).collect();
    let (rows, base) = (numbers(n * width, 1), numbers(vocab * width, 2));
    let mut want = base.clone();
    for (row, id) in rows.chunks(width).zip(&ids) {
        for (sum, value) in want[*id as usize * width..].iter_mut().zip(row) {
            *sum += value;
        }
    }
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        let mut got = base.clone();
        pool.install(|| scatter_add(&rows, width, &ids, &mut got))?;
        assert_eq!(got, want);
    }
    Ok(())
}

#[test]
fn sparse_rows_are_the_touched_rows_of_the_dense_gradient() -> Result<()> {
    let (vocab, width) = (50, 7);
    let mut sparse = SparseRows::new(width);
    let mut dense = vec![0f32; vocab * width];
    // Two micro-batches that share some rows and repeat others.
    for (seed, ids) in [(1, vec![7u32, 3, 7, 49, 3, 3]), (2, vec![0, 49, 8, 8])] {
        let rows = numbers(ids.len() * width, seed);
        sparse.add(&ids, &rows)?;
        scatter_add(&rows, width, &ids, &mut dense)?;
    }
    assert_eq!(sparse.ids(), [0, 3, 7, 8, 49]);
    let mut got = vec![0f32; vocab * width];
    sparse.add_to(&mut got)?;
    assert_eq!(got, dense);
    for (id, row) in sparse.ids().iter().zip(sparse.values().chunks(width)) {
        assert_eq!(row, &dense[*id as usize * width..][..width]);
    }
    sparse.clear();
    assert_eq!(sparse, SparseRows::new(width));
    Ok(())
}

#[test]
fn embedding_refuses_an_id_outside_the_table() -> Result<()> {
    let table = plain(&[0.; 6], &[3, 2])?;
    refuses(gather(&table, &[3]), "below 3, got 3");
    let mut buffer = vec![0f32; 6];
    refuses(scatter_add(&[1.0; 4], 2, &[0, 3], &mut buffer), "below 3, got 3");
    assert_eq!(buffer, [0.0; 6]);
    let mut sparse = SparseRows::new(2);
    sparse.add(&[3], &[1.0; 2])?;
    refuses(sparse.add_to(&mut buffer), "below 3, got 3");
    Ok(())
}

#[test]
fn embedding_refuses_rows_that_are_not_one_for_each_id() {
    let table = [0f32; 6];
    refuses(gather_into(Weight::F32(&table), 2, &[0], &mut [0f32; 4]), "1 rows of 2 values");
    refuses(scatter_add(&[0.0; 4], 2, &[0], &mut [0.0; 6]), "1 rows of 2 values");
    refuses(SparseRows::new(2).add(&[0], &[0.0; 3]), "1 rows of 2 values");
}

#[test]
fn embedding_refuses_a_table_of_broken_rows() {
    refuses(gather_into(Weight::F32(&[0.0; 5]), 2, &[0], &mut [0f32; 2]), "whole rows of 2 values, got 5");
    refuses(scatter_add(&[0.0; 2], 2, &[0], &mut [0.0; 5]), "whole rows of 2 values, got 5");
}

#[test]
fn gathering_refuses_a_bf16_tensor() -> Result<()> {
    refuses(gather(&plain(&[0.; 6], &[3, 2])?.to_dtype(DType::BF16)?, &[0]), "f32 operands, got BF16");
    Ok(())
}
