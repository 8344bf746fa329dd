//! A GistNet as what a gist tree is made from.
//!
//! The tree asks for the gist of a block whenever one is complete, one or many at a time, and relies on each being the same
//! to the bit; [`GistNet::gists`] keeps that promise on the processor, and up to rounding on a GPU.

use megacontext_base::context::GistSource;
use megacontext_base::error::Result;

use crate::network::GistNet;

impl GistSource for GistNet {
    fn block(&self) -> usize {
        self.config().block
    }

    fn width(&self) -> usize {
        self.config().width
    }

    fn version(&self) -> u16 {
        self.gist_version()
    }

    fn gists(&self, children: &[f32], blocks: usize) -> Result<Vec<f32>> {
        Self::gists(self, children, blocks)
    }
}
