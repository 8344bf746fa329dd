//! Gathering rows, and their gradients.

use anyhow::Result;
use megacontext_kernels::embedding;

use crate::support::*;

#[test]
fn embedding_gathers_rows_and_adds_their_gradients() -> Result<()> {
    let table = plain(&[0., 1., 2., 3., 4., 5.], &[3, 2])?;
    let rows = embedding::gather(&table, &[2, 0, 2])?;
    assert_eq!(flat(&rows), [4., 5., 0., 1., 4., 5.]);
    let mut gradient = vec![0f32; 6];
    embedding::scatter_add(&rows, &[2, 0, 2], &mut gradient)?;
    assert_eq!(gradient, [0., 1., 0., 0., 8., 10.]);
    let error = embedding::gather(&table, &[3]).err().unwrap();
    assert!(error.to_string().contains("below 3, got 3"), "{error}");
    Ok(())
}
