//! Tiles, threads and shared memory of the attention kernels: `Sizes` of `cu/attention.cuh`, in Rust.
//!
//! A test holds the bytes against those that the C++ compiler prints (`cu/emulate/shared.cpp`).

/// Head widths that kernels are compiled for; narrower heads run in the next one.
pub(in crate::cuda) const WIDTHS: [usize; 5] = [32, 64, 96, 128, 256];

/// Of a storage type's bytes and one of [`WIDTHS`].
#[derive(Clone, Copy, Debug)]
pub(in crate::cuda) struct Sizes {
    bytes: usize,
    width: usize,
}

impl Sizes {
    pub fn new(bytes: usize, width: usize) -> Self {
        Self { bytes, width }
    }

    fn half(&self) -> bool {
        self.bytes == 2
    }

    /// Bytes of a padded row in shared memory.
    fn row(&self) -> usize {
        self.bytes * self.width + 16
    }

    fn forward_keys(&self) -> usize {
        match (self.half(), self.width) {
            (true, ..=64) => 64,
            (true, _) | (false, ..=128) => 32,
            (false, _) => 16,
        }
    }

    /// Rows of the other operand in a tile of backward.
    fn backward_rows(&self) -> usize {
        match (self.half(), self.width) {
            (true, ..=64) => 64,
            (true, _) => 32,
            (false, _) => 16,
        }
    }

    /// Queries of a warp of forward.
    pub fn forward_queries(&self) -> usize {
        if self.half() && self.width <= 128 { 32 } else { 16 }
    }

    /// Blocks that make the parts of the same rows of dK and dV.
    pub fn parts(&self) -> usize {
        if self.width <= 128 { 1 } else { 2 }
    }

    pub fn forward_warps(&self) -> usize {
        4
    }

    pub fn backward_warps(&self) -> usize {
        if self.half() || self.width <= 128 { 4 } else { 2 }
    }

    /// Dynamic shared memory of a block of forward.
    pub fn forward_bytes(&self, warps: usize) -> usize {
        self.row() * (self.forward_queries() * warps + 4 * self.forward_keys())
    }

    /// Of a block that makes dQ.
    pub fn queries_bytes(&self, warps: usize) -> usize {
        self.row() * (2 * 16 * warps + 4 * self.backward_rows())
    }

    /// Of a block that makes dK and dV.
    pub fn keys_bytes(&self, warps: usize) -> usize {
        self.row() * (2 * 16 * warps + 4 * self.backward_rows()) + 2 * 4 * 4 * self.backward_rows()
    }
}
