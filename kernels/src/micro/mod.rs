//! The innermost loop of every product here: a small block of C += A·B over packed operands.
//!
//! Packed operands are rows of 32-bit words. In f32 a word is one value; in bf16 it is a pair of neighbours along the
//! depth (the inner, summed dimension), because that is what AVX-512's and AMX's bf16 instructions multiply: products of
//! bf16 values, summed in f32. All instruction sets read the same layout:
//!
//!   A [rows, words], one row of the product after the other, depth across;
//!   B [words, lanes], depth down, columns of the product across;
//!   C [rows, lanes] in f32.
//!
//! Lanes come in vectors of 16, at most [`LANES`] at a time. AMX works on tiles of 16 rows by 16 words, so packed buffers
//! are padded: A and C have room for a multiple of [`ROWS`] rows, and A and B for a multiple of [`Engine::depth_words`]
//! words, zero past the depth in use. What lies in the padding rows of C is not defined.
//!
//! Sources: Goto and van de Geijn 2008 (packing, register blocks); Intel's optimisation manual (AMX tiles, pairs).

mod aligned;
#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(crate) mod pack;
mod tiles;
mod vectors;
mod words;

pub(crate) use aligned::Aligned;
pub(crate) use words::transpose;

use crate::cpu::{self, Level};
use crate::store::Store;

/// Most lanes of a block: two vectors of AVX-512.
pub(crate) const LANES: usize = 32;
/// Rows of A and C are padded to a multiple of this.
pub(crate) const ROWS: usize = 16;

/// How products are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// In f32.
    #[default]
    F32,
    /// Operands rounded to bf16, products summed in f32, where the machine has instructions for it; in f32 elsewhere.
    Bf16,
}

/// Which words operands are packed into, and what multiplies them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    /// Words are f32 values.
    F32(Level),
    /// Words are pairs of bf16 values.
    Pairs(Level),
}

impl Engine {
    /// The engine for these products on this machine.
    pub fn new(products: Products) -> Self {
        match (products, cpu::level()) {
            (Products::Bf16, level) if level >= Level::Avx512Bf16 => Self::Pairs(level),
            (_, _) => Self::F32(cpu::vectors()),
        }
    }

    /// Values along the depth in a word.
    pub fn values(self) -> usize {
        match self {
            Self::F32(_) => 1,
            Self::Pairs(_) => 2,
        }
    }

    /// A value as products read it.
    pub fn value<S: Store>(self, x: S) -> f32 {
        match self {
            Self::F32(_) => x.get(),
            Self::Pairs(_) => f32::from_bits(u32::from(x.bits()) << 16),
        }
    }

    /// Words that hold `depth` values, padding included.
    pub fn words(self, depth: usize) -> usize {
        let words = depth.div_ceil(self.values());
        match self {
            Self::F32(_) => words,
            Self::Pairs(_) => words.next_multiple_of(16),
        }
    }

    /// Whether blocks are multiplied in tiles.
    pub fn works_on_tiles(self) -> bool {
        matches!(self, Self::Pairs(Level::Amx | Level::SoftwareTiles))
    }

    /// Makes this thread ready; undone when the guard is dropped. Around a whole task, not around a block.
    pub fn enter(self) -> Guard {
        #[cfg(target_arch = "x86_64")]
        if self == Self::Pairs(Level::Amx) {
            amx::configure();
            return Guard { tiles: true };
        }
        Guard { tiles: false }
    }

    /// C (+)= A·B for `rows` rows, `lanes` (16 or 32) columns and `words` words of depth; row strides in words.
    ///
    /// # Safety
    /// For pairs with rows rounded up to [`ROWS`] and words to 16, for f32 as they are: A readable for rows × words at
    /// stride `lda`, B for words × lanes at `ldb`, C writable (and initialised when `add`) for rows × lanes at `ldc`,
    /// and nothing past the last of these; C overlaps neither; `enter`'s guard is alive on this thread.
    #[inline]
    pub unsafe fn block(self, block: Block) {
        debug_assert!(block.lanes == 16 || block.lanes == 32);
        // SAFETY: the caller's promise; `Engine::new` took a level that this machine has.
        unsafe {
            match self {
                Self::F32(level) => vectors::block(level, block),
                #[cfg(target_arch = "x86_64")]
                Self::Pairs(Level::Amx) => tiles::block::<amx::Hardware>(block),
                Self::Pairs(Level::SoftwareTiles) => tiles::block::<tiles::Software>(block),
                Self::Pairs(level) => vectors::block(level, block),
            }
        }
    }
}

/// Operands of [`Engine::block`].
#[derive(Clone, Copy)]
pub(crate) struct Block {
    pub rows: usize,
    pub lanes: usize,
    pub words: usize,
    pub a: *const u32,
    pub lda: usize,
    pub b: *const u32,
    pub ldb: usize,
    pub c: *mut f32,
    pub ldc: usize,
    pub add: bool,
}

/// The same words, without moving anything.
pub(crate) fn bits(values: &[f32]) -> &[u32] {
    // SAFETY: f32 and u32 have one size and alignment, and every bit pattern is a u32.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
}

/// The same words, without moving anything.
pub(crate) fn bits_mut(values: &mut [f32]) -> &mut [u32] {
    // SAFETY: f32 and u32 have one size and alignment, and every bit pattern is a value of both.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), values.len()) }
}

/// See [`Engine::enter`].
pub(crate) struct Guard {
    tiles: bool,
}

impl Drop for Guard {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.tiles {
            amx::release();
        }
    }
}

#[cfg(test)]
mod tests;
