//! Buffers of 32-bit words that begin at a line of the cache.
//!
//! A vector of 64 bytes, or a row of a tile, that straddles two lines costs two accesses; the heap hands out addresses that
//! are multiples of 16. On a Sapphire Rapids a product in AMX tiles over operands that straddle runs at half the speed.
//!
//! Units: words. Left out: everything a buffer of packed operands does not need.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// Words of a cache line.
const WORDS: usize = 16;

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u32; WORDS]);

/// A type that is any 32 bits, zero bits being its default.
///
/// # Safety
/// Size 4, alignment at most 64, every bit pattern valid.
pub(crate) unsafe trait Word: Copy + Default {}

// SAFETY: 4 bytes, every pattern is a u32.
unsafe impl Word for u32 {}
// SAFETY: 4 bytes, every pattern is an f32.
unsafe impl Word for f32 {}

/// As much of `Vec<T>` as packed operands need, its first word at a multiple of 64 bytes.
pub(crate) struct Aligned<T> {
    lines: Vec<Line>,
    len: usize,
    of: PhantomData<T>,
}

impl<T> Default for Aligned<T> {
    fn default() -> Self {
        Self { lines: Vec::new(), len: 0, of: PhantomData }
    }
}

impl<T: Word> Aligned<T> {
    /// `len` zeroes.
    pub fn zeroed(len: usize) -> Self {
        let mut new = Self::default();
        new.resize(len);
        new
    }

    /// Holds `len` words from now on: new ones are zero where the buffer grows beyond what it has ever held, and whatever
    /// was there before otherwise.
    pub fn resize(&mut self, len: usize) {
        if self.lines.len() * WORDS < len {
            self.lines.resize(len.div_ceil(WORDS), Line([0; WORDS]));
        }
        self.len = len;
    }

    /// Holds `len` words, all zero.
    pub fn resize_zeroed(&mut self, len: usize) {
        self.resize(len);
        self.fill(T::default());
    }

    /// Holds at least `len` words.
    pub fn reserve(&mut self, len: usize) {
        self.resize(len.max(self.len));
    }
}

impl<T: Word> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` words lie in the lines, and `Word` says that any bits are a T.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl<T: Word> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above; the lines are borrowed as uniquely as this is.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::Aligned;

    #[test]
    fn begins_at_a_line_and_holds_what_it_is_told() {
        for len in [0, 1, 15, 16, 17, 100_000] {
            let mut buffer = Aligned::<f32>::zeroed(len);
            assert_eq!((buffer.as_ptr() as usize % 64, buffer.len()), (0, len));
            assert!(buffer.iter().all(|x| *x == 0.0));
            buffer.fill(1.0);
            buffer.resize(len + 40);
            assert!(buffer[..len].iter().all(|x| *x == 1.0));
            buffer.resize_zeroed(len + 1);
            assert!(buffer.len() == len + 1 && buffer.iter().all(|x| *x == 0.0));
            buffer.reserve(len);
            assert_eq!(buffer.len(), len + 1);
        }
    }
}
