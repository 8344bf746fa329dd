//! All blocks of a pass, there and back: what the decoder and, on a GPU, the networks beside it share.
//!
//! With `recompute` (activation checkpointing, Chen et al. 2016) one block's values are kept at a time and made again from its
//! input on the way back; otherwise those of every block that is walked back.
//!
//! Shapes: N entries, E width; the stream and its gradient are [N, E]. Errors: those of [`Block`].

use crate::block::{Block, Pass};
use crate::buffers::{Activation, Scratch};
use crate::error::Result;
use crate::machine::Machine;

/// The stream in `scratch.x` through all blocks. Inputs of those from `lowest` on are kept for the way back.
pub(crate) fn forward<M: Machine, S: Activation>(
    pass: &Pass<M, S>,
    scratch: &mut Scratch<M, S>,
    lowest: usize,
    recompute: bool,
) -> Result<()> {
    let layers = pass.config.num_hidden_layers;
    scratch.prepare(layers, lowest, recompute);
    let Scratch { inputs, saved, workspace, x, stream, .. } = scratch;
    for layer in 0..layers {
        let place = if recompute { 0 } else { layer.saturating_sub(lowest) };
        Block::new(layer, pass)?.forward(x, stream, &mut saved[place], workspace)?;
        if layer >= lowest {
            // The input is kept, and its buffer of the step before carries the stream on.
            std::mem::swap(&mut inputs[layer - lowest], x);
        }
        std::mem::swap(x, stream);
    }
    Ok(())
}

/// A way back through the blocks from `lowest` on.
pub(crate) struct Back<F> {
    pub lowest: usize,
    pub recompute: bool,
    /// Are the last block's values still there, as [`forward`] left them?
    pub fresh: bool,
    /// Is the gradient of this block's input wanted?
    pub wanted: F,
}

impl<F: Fn(usize) -> bool> Back<F> {
    /// `scratch.d`, the gradient of what the last block gave, becomes that of the lowest one's input; gradients of what learns
    /// are added to `gradients`.
    pub fn walk<M: Machine, S: Activation>(
        &self,
        pass: &Pass<M, S>,
        scratch: &mut Scratch<M, S>,
        gradients: &mut M::Gradients,
    ) -> Result<()> {
        let layers = pass.config.num_hidden_layers;
        let Scratch { inputs, saved, workspace, stream, d, .. } = scratch;
        for layer in (self.lowest..layers).rev() {
            let block = Block::new(layer, pass)?;
            let input = &inputs[layer - self.lowest];
            let place = if self.recompute { 0 } else { layer - self.lowest };
            if self.recompute && !(self.fresh && layer + 1 == layers) {
                block.remake(input, stream, &mut saved[place], workspace)?;
            }
            block.backward(input, d, &mut saved[place], workspace, gradients, (self.wanted)(layer))?;
        }
        Ok(())
    }
}
