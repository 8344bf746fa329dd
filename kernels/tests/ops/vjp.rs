//! Seeding a backward pass.

use anyhow::Result;
use megacontext_kernels::vjp;

use crate::support::*;

#[test]
fn a_seed_refuses_a_gradient_of_another_shape() -> Result<()> {
    let x = plain(&[0.0; 6], &[2, 3])?;
    refuses(vjp::seed(&x, plain(&[0.0; 2], &[2])?), "gradient [2, 3]");
    Ok(())
}
