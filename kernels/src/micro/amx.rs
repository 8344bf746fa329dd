//! AMX from stable Rust: the operating system's permission, the tile configuration, and the five instructions in use.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volumes 1 (ch. 18) and 2. Linux hands tile
//! registers to a process that asks for them (`arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`, Linux 5.16); other
//! systems count as machines without AMX.
//!
//! Tile registers are named in the instructions and live from one `asm!` to the next: the compiler never uses them.

use std::arch::asm;

use super::tiles::Tiles;

/// `ldtilecfg`'s 64 bytes: palette 1, eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

static CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Whether this machine has AMX with bf16 and this process may use it.
pub(crate) fn usable() -> bool {
    has_instructions() && permitted()
}

fn has_instructions() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    const OSXSAVE: u32 = 1 << 27;
    const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    const TILE_CONFIGURATION_AND_DATA: u64 = 1 << 17 | 1 << 18;

    #[target_feature(enable = "xsave")]
    fn enabled_state() -> u64 {
        // SAFETY: reads a register that the caller has made sure exists (OSXSAVE).
        unsafe { _xgetbv(0) }
    }

    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let features = __cpuid_count(7, 0).edx;
    // SAFETY: OSXSAVE is set, so the instruction exists.
    let state = unsafe { enabled_state() };
    features & AMX_BF16_AND_TILE == AMX_BF16_AND_TILE
        && state & TILE_CONFIGURATION_AND_DATA == TILE_CONFIGURATION_AND_DATA
}

#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: isize = 0x1023;
    const XFEATURE_XTILEDATA: isize = 18;
    let result: isize;
    // SAFETY: a system call with two integer arguments that touches no memory of ours; the kernel changes rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// Configures this thread's tiles.
pub(super) fn configure() {
    // SAFETY: only reached at a level that `usable` has confirmed; reads 64 static bytes.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly));
    }
}

/// Gives this thread's tiles back, so that the system need not save them.
pub(super) fn release() {
    // SAFETY: as above; touches no memory.
    unsafe {
        asm!("tilerelease", options(nostack, nomem));
    }
}

/// The processor's tiles, configured by [`configure`].
pub(super) struct Hardware;

impl Tiles for Hardware {
    #[inline(always)]
    fn new() -> Self {
        Self
    }

    #[inline(always)]
    fn zero<const T: u8>(&mut self) {
        // SAFETY: changes a tile register only.
        unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, nomem)) };
    }

    #[inline(always)]
    unsafe fn load<const T: u8>(&mut self, from: *const u32, stride: usize) {
        // SAFETY: reads what the caller promises to be readable.
        unsafe {
            asm!(
                "tileloadd tmm{t}, [{from} + {stride}*1]",
                t = const T,
                from = in(reg) from,
                stride = in(reg) stride * 4,
                options(nostack, readonly),
            );
        }
    }

    #[inline(always)]
    unsafe fn store<const T: u8>(&self, to: *mut u32, stride: usize) {
        // SAFETY: writes what the caller promises to be writable.
        unsafe {
            asm!(
                "tilestored [{to} + {stride}*1], tmm{t}",
                t = const T,
                to = in(reg) to,
                stride = in(reg) stride * 4,
                options(nostack),
            );
        }
    }

    #[inline(always)]
    fn multiply<const C: u8, const A: u8, const B: u8>(&mut self) {
        // SAFETY: changes a tile register only.
        unsafe {
            asm!(
                "tdpbf16ps tmm{c}, tmm{a}, tmm{b}",
                c = const C,
                a = const A,
                b = const B,
                options(nostack, nomem),
            );
        }
    }
}
