//! Blocks of bf16 pair products in AMX tiles, over hardware tiles or tiles in software.
//!
//! A tile is 16 rows of 16 words. Tiles 0 to 3 hold a 32 × 32 block of C, 4 and 5 two tiles of A, 6 and 7 two of B. One
//! walk serves both kinds of tiles, so that everything but the instructions themselves is tested on any machine.

use super::{Block, ROWS};

/// Words in a row of a tile, and rows of a tile.
const SIDE: usize = 16;

/// Eight tile registers.
pub(super) trait Tiles {
    /// Tiles ready for use.
    fn new() -> Self;
    /// Tile `T` becomes zero.
    fn zero<const T: u8>(&mut self);
    /// Tile `T` is read.
    ///
    /// # Safety
    /// 16 rows of 16 words at `from` with `stride` words between rows are readable.
    unsafe fn load<const T: u8>(&mut self, from: *const u32, stride: usize);
    /// Tile `T` is written.
    ///
    /// # Safety
    /// 16 rows of 16 words at `to` with `stride` words between rows are writable.
    unsafe fn store<const T: u8>(&self, to: *mut u32, stride: usize);
    /// C += A·B: c[m][n] += Σ_k a[m][k]₀·b[k][n]₀ + a[m][k]₁·b[k][n]₁.
    fn multiply<const C: u8, const A: u8, const B: u8>(&mut self);
}

/// # Safety
/// As [`super::Engine::block`].
pub(super) unsafe fn block<T: Tiles>(block: Block) {
    let Block { lanes, words, a, lda, b, ldb, c, ldc, add, .. } = block;
    let rows = block.rows.next_multiple_of(ROWS);
    let words = words.next_multiple_of(SIDE);
    let mut tiles = T::new();
    let t = &mut tiles;
    let c = c.cast::<u32>();
    let mut row = 0;
    while row < rows {
        let two_rows = rows - row > SIDE;
        let two_lanes = lanes > SIDE;
        // SAFETY: every tile lies in the padded operands by the caller's promise.
        unsafe {
            let (c0, c1) = (c.add(row * ldc), c.add((row + SIDE * usize::from(two_rows)) * ldc));
            if add {
                t.load::<0>(c0, ldc);
                if two_lanes {
                    t.load::<1>(c0.add(SIDE), ldc);
                }
                if two_rows {
                    t.load::<2>(c1, ldc);
                    if two_lanes {
                        t.load::<3>(c1.add(SIDE), ldc);
                    }
                }
            } else {
                t.zero::<0>();
                t.zero::<1>();
                t.zero::<2>();
                t.zero::<3>();
            }
            for word in (0..words).step_by(SIDE) {
                let a = a.add(row * lda + word);
                let b = b.add(word * ldb);
                t.load::<4>(a, lda);
                t.load::<6>(b, ldb);
                t.multiply::<0, 4, 6>();
                if two_lanes {
                    t.load::<7>(b.add(SIDE), ldb);
                    t.multiply::<1, 4, 7>();
                }
                if two_rows {
                    t.load::<5>(a.add(SIDE * lda), lda);
                    t.multiply::<2, 5, 6>();
                    if two_lanes {
                        t.multiply::<3, 5, 7>();
                    }
                }
            }
            t.store::<0>(c0, ldc);
            if two_lanes {
                t.store::<1>(c0.add(SIDE), ldc);
            }
            if two_rows {
                t.store::<2>(c1, ldc);
                if two_lanes {
                    t.store::<3>(c1.add(SIDE), ldc);
                }
            }
        }
        row += if two_rows { 2 * SIDE } else { SIDE };
    }
}

/// Tiles as plain arrays.
pub(super) struct Software([[[u32; SIDE]; SIDE]; 8]);

impl Tiles for Software {
    fn new() -> Self {
        Self([[[0; SIDE]; SIDE]; 8])
    }

    fn zero<const T: u8>(&mut self) {
        self.0[usize::from(T)] = [[0; SIDE]; SIDE];
    }

    unsafe fn load<const T: u8>(&mut self, from: *const u32, stride: usize) {
        for (row, values) in self.0[usize::from(T)].iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *values = unsafe { from.add(row * stride).cast::<[u32; SIDE]>().read() };
        }
    }

    unsafe fn store<const T: u8>(&self, to: *mut u32, stride: usize) {
        for (row, values) in self.0[usize::from(T)].iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { to.add(row * stride).cast::<[u32; SIDE]>().write(*values) };
        }
    }

    fn multiply<const C: u8, const A: u8, const B: u8>(&mut self) {
        let (a, b) = (self.0[usize::from(A)], self.0[usize::from(B)]);
        for (c, a) in self.0[usize::from(C)].iter_mut().zip(&a) {
            let mut sums = c.map(f32::from_bits);
            for (a, b) in a.iter().zip(&b) {
                let (a0, a1) = halves(*a);
                for (sum, b) in sums.iter_mut().zip(b) {
                    let (b0, b1) = halves(*b);
                    *sum += a0 * b0;
                    *sum += a1 * b1;
                }
            }
            *c = sums.map(f32::to_bits);
        }
    }
}

fn halves(word: u32) -> (f32, f32) {
    (f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000))
}
