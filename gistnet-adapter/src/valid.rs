//! Masks of padding: blocks of which only some entries are valid.
//!
//! The attention kernel knows rows with a length, so the valid entries of each block move to its front, in order, and keep
//! the positions they had ([`Compact`]). Of the others nothing is read, NaN included.
//!
//! Shapes: N blocks of K entries; a mask is N·K flags, row-major, true for valid.
//! Errors: a mask of another length, a block without a valid entry.

use candle_core::{Device, Tensor};
use megacontext_base::error::{BaseError, Result};

use crate::config::NETWORK;

/// Refuses masks that do not fit.
pub(crate) fn check(valid: &[bool], blocks: usize, block: usize) -> Result<()> {
    if valid.len() != blocks * block {
        let message = format!(
            "mask: expected {} flags, {blocks} blocks of {block}, got {}",
            blocks * block,
            valid.len()
        );
        return Err(BaseError::network(NETWORK, message));
    }
    match valid.chunks_exact(block).position(|row| !row.contains(&true)) {
        None => Ok(()),
        Some(n) => Err(BaseError::network(
            NETWORK,
            format!("mask: expected at least one valid entry in every block, got none in block {n}"),
        )),
    }
}

/// 1 for valid entries, 0 for others, [N, K].
pub(crate) fn flags(valid: &[bool], block: usize) -> Result<Tensor> {
    let flags: Vec<f32> = valid.iter().map(|v| f32::from(u8::from(*v))).collect();
    Ok(Tensor::from_vec(flags, (valid.len() / block, block), &Device::Cpu)?)
}

/// The valid entries of every block at its front.
pub(crate) struct Compact {
    /// Valid entries of each block.
    pub lengths: Vec<usize>,
    /// The place each entry had in its block, N·K of them; behind the valid ones the first of them stands again.
    pub places: Vec<usize>,
    block: usize,
}

impl Compact {
    /// Of a mask that has passed [`check`].
    pub fn new(valid: &[bool], block: usize) -> Self {
        let mut places = Vec::with_capacity(valid.len());
        let mut lengths = Vec::with_capacity(valid.len() / block);
        for row in valid.chunks_exact(block) {
            let first = places.len();
            places.extend((0..block).filter(|k| row[*k]));
            lengths.push(places.len() - first);
            // Every block has a valid entry: checked.
            places.resize(first + block, places[first]);
        }
        Self { lengths, places, block }
    }

    /// Moves the entries of `x_nke`; gradients move back.
    pub fn gather(&self, x_nke: &Tensor) -> Result<Tensor> {
        let (n, k, e) = x_nke.dims3()?;
        let place = |(at, place): (usize, &usize)| (at / self.block * self.block + place) as u32;
        let rows: Vec<u32> = self.places.iter().enumerate().map(place).collect();
        let rows = Tensor::from_vec(rows, n * k, &Device::Cpu)?;
        let flat = x_nke.contiguous()?.reshape((n * k, e))?;
        Ok(flat.index_select(&rows, 0)?.reshape((n, k, e))?)
    }

    /// 1 for the valid entries, which are in front, 0 for others, [N, K].
    pub fn flags(&self) -> Result<Tensor> {
        let flag = |at: usize| if at % self.block < self.lengths[at / self.block] { 1f32 } else { 0.0 };
        let flags: Vec<f32> = (0..self.places.len()).map(flag).collect();
        Ok(Tensor::from_vec(flags, (self.lengths.len(), self.block), &Device::Cpu)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MASK: [bool; 6] = [true, false, true, false, false, true];

    #[test]
    fn valid_entries_move_to_the_front_in_order() {
        let compact = Compact::new(&MASK, 3);
        assert_eq!((compact.lengths.clone(), compact.places.clone()), (vec![2, 1], vec![0, 2, 0, 2, 2, 2]));
        let x = Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap().reshape((2, 3, 1)).unwrap();
        let moved: Vec<f32> = compact.gather(&x).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!((&moved[..2], moved[3]), (&[0.0, 2.0][..], 5.0));
        let flags: Vec<f32> = compact.flags().unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(flags, [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn a_mask_of_another_length_is_refused() {
        let error = check(&MASK, 2, 4).unwrap_err().to_string();
        assert_eq!(error, "gistnet: mask: expected 8 flags, 2 blocks of 4, got 6");
    }

    #[test]
    fn a_block_without_a_valid_entry_is_refused() {
        let error = check(&[true, false, false, false], 2, 2).unwrap_err().to_string();
        assert!(error.contains("at least one valid entry in every block, got none in block 1"), "{error}");
    }
}
