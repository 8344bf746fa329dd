//! Slices that lie flush against pages without access: a read or write past them ends the process.

use std::ops::{Deref, DerefMut};

/// Which end of the slice touches the forbidden page; values in between are rounded to their alignment anyway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Before,
    After,
}

pub const SIDES: [Side; 2] = [Side::Before, Side::After];

/// A slice of `T` with a forbidden page on both sides, flush with the one on `Side`.
pub struct Guarded<T> {
    map: *mut libc::c_void,
    bytes: usize,
    first: *mut T,
    len: usize,
}

impl<T: Copy> Guarded<T> {
    pub fn new(values: &[T], side: Side) -> Self {
        let page = page();
        let inner = size_of_val(values).next_multiple_of(page);
        let bytes = inner + 2 * page;
        // SAFETY: a new anonymous mapping; the two calls forbid its first and last page; the copy fits between them, and
        // is aligned because pages and sizes of `T` are.
        unsafe {
            let (none, both) = (libc::PROT_NONE, libc::PROT_READ | libc::PROT_WRITE);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let map = libc::mmap(std::ptr::null_mut(), bytes, both, flags, -1, 0);
            assert_ne!(map, libc::MAP_FAILED, "{bytes} bytes");
            assert_eq!(libc::mprotect(map, page, none), 0);
            assert_eq!(libc::mprotect(map.add(page + inner), page, none), 0);
            let at = match side {
                Side::Before => page,
                Side::After => page + inner - size_of_val(values),
            };
            let first = map.add(at).cast::<T>();
            std::ptr::copy_nonoverlapping(values.as_ptr(), first, values.len());
            Self { map, bytes, first, len: values.len() }
        }
    }
}

fn page() -> usize {
    // SAFETY: asks for a constant of the system.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).expect("a page size")
}

impl<T> Deref for Guarded<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `new` put `len` values there; they live as long as the mapping, which is as long as this.
        unsafe { std::slice::from_raw_parts(self.first, self.len) }
    }
}

impl<T> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and this is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.first, self.len) }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's alone.
        unsafe { libc::munmap(self.map, self.bytes) };
    }
}
