//! Whether an ELF file is whole, and for this machine, before the dynamic loader maps it.
//!
//! dlopen maps what the headers promise: a file that was cut off loads, and the process dies of SIGBUS at the first
//! touch of a page that is not there. So every segment and section must lie inside the file.
//!
//! Source: System V ABI, ELF-64 object file format. Only 64-bit little-endian shared objects are accepted, which is what
//! Rust makes on every Linux that this project runs on. Relocations and symbols are left to the dynamic loader.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

/// `e_machine` of this build.
#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;
#[cfg(target_arch = "riscv64")]
const MACHINE: u16 = 243;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")))]
const MACHINE: u16 = 0;

/// What is wrong with the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ElfFault {
    /// Not an ELF shared library of 64 bits; says what instead.
    Foreign(String),
    /// Headers promise more bytes than the file has.
    Truncated {
        /// Bytes that the headers need.
        needed: u64,
    },
    /// For another CPU.
    Machine(u16),
    /// The file could not be read.
    Io(String),
}

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const SECTION_HEADER: usize = 64;
const ET_DYN: u16 = 3;
const SHT_NOBITS: u32 = 8;

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | (u64::from(u32_at(bytes, at + 4)) << 32)
}

/// Reads a header table after seeing that it lies inside the file.
fn table(file: &mut File, size: u64, offset: u64, entry: u16, count: u16) -> Result<Vec<u8>, ElfFault> {
    let length = u64::from(entry) * u64::from(count);
    let needed = offset.saturating_add(length);
    if needed > size {
        return Err(ElfFault::Truncated { needed });
    }
    let mut bytes = vec![0; length as usize];
    let io = |e: std::io::Error| ElfFault::Io(e.to_string());
    file.seek(SeekFrom::Start(offset)).map_err(io)?;
    file.read_exact(&mut bytes).map_err(io)?;
    Ok(bytes)
}

/// Checks the headers of `file`, which has `size` bytes.
pub(super) fn check(file: &mut File, size: u64) -> Result<(), ElfFault> {
    let mut magic = Vec::new();
    let io = |e: std::io::Error| ElfFault::Io(e.to_string());
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    file.by_ref().take(HEADER as u64).read_to_end(&mut magic).map_err(io)?;
    let header = magic;
    if header.is_empty() {
        return Err(ElfFault::Foreign("the file is empty".into()));
    }
    if !header.starts_with(b"\x7fELF") {
        let text = std::str::from_utf8(&header).is_ok_and(|t| !t.contains('\0'));
        let what = if text { "it is a text file" } else { "it does not begin with the ELF signature" };
        return Err(ElfFault::Foreign(what.into()));
    }
    if header.len() < HEADER {
        return Err(ElfFault::Truncated { needed: HEADER as u64 });
    }
    if (header[4], header[5]) != (2, 1) {
        return Err(ElfFault::Foreign("it is not a 64-bit little-endian ELF file".into()));
    }
    if u16_at(&header, 16) != ET_DYN {
        return Err(ElfFault::Foreign("it is an ELF file, but not a shared library".into()));
    }
    let machine = u16_at(&header, 18);
    if MACHINE != 0 && machine != MACHINE {
        return Err(ElfFault::Machine(machine));
    }
    let (phentsize, phnum) = (u16_at(&header, 54), u16_at(&header, 56));
    let (shentsize, shnum) = (u16_at(&header, 58), u16_at(&header, 60));
    if phnum == 0 || usize::from(phentsize) < PROGRAM_HEADER {
        return Err(ElfFault::Foreign("its program headers are missing".into()));
    }
    let programs = table(file, size, u64_at(&header, 32), phentsize, phnum)?;
    let mut needed = 0;
    for entry in programs.chunks_exact(phentsize.into()) {
        needed = needed.max(u64_at(entry, 8).saturating_add(u64_at(entry, 32)));
    }
    // A stripped library may have no section headers at all.
    if shnum != 0 {
        if usize::from(shentsize) < SECTION_HEADER {
            return Err(ElfFault::Foreign("its section headers are malformed".into()));
        }
        let sections = table(file, size, u64_at(&header, 40), shentsize, shnum)?;
        for entry in sections.chunks_exact(shentsize.into()) {
            if u32_at(entry, 4) != SHT_NOBITS {
                needed = needed.max(u64_at(entry, 24).saturating_add(u64_at(entry, 32)));
            }
        }
    }
    if needed > size {
        return Err(ElfFault::Truncated { needed });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// The smallest thing that passes: a header and one segment of 8 bytes.
    fn tiny(machine: u16) -> Vec<u8> {
        let mut bytes = vec![0u8; HEADER + PROGRAM_HEADER + 8];
        bytes[..4].copy_from_slice(b"\x7fELF");
        (bytes[4], bytes[5]) = (2, 1);
        bytes[16..18].copy_from_slice(&ET_DYN.to_le_bytes());
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes[32..40].copy_from_slice(&(HEADER as u64).to_le_bytes());
        bytes[54..56].copy_from_slice(&(PROGRAM_HEADER as u16).to_le_bytes());
        bytes[56..58].copy_from_slice(&1u16.to_le_bytes());
        let offset = (HEADER + PROGRAM_HEADER) as u64;
        bytes[HEADER + 8..HEADER + 16].copy_from_slice(&offset.to_le_bytes());
        bytes[HEADER + 32..HEADER + 40].copy_from_slice(&8u64.to_le_bytes());
        bytes
    }

    fn verdict(bytes: &[u8]) -> Result<(), ElfFault> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        check(&mut file, bytes.len() as u64)
    }

    #[test]
    fn a_whole_file_passes() {
        assert_eq!(verdict(&tiny(MACHINE)), Ok(()));
    }

    #[test]
    fn every_cut_is_found() {
        let bytes = tiny(MACHINE);
        for length in 4..bytes.len() {
            let verdict = verdict(&bytes[..length]);
            assert!(matches!(verdict, Err(ElfFault::Truncated { .. })), "cut to {length}: {verdict:?}");
        }
    }

    #[test]
    fn text_and_emptiness_are_named() {
        assert_eq!(verdict(b"#!/bin/sh\n"), Err(ElfFault::Foreign("it is a text file".into())));
        assert_eq!(verdict(b""), Err(ElfFault::Foreign("the file is empty".into())));
        assert!(matches!(verdict(b"MZ\0\0"), Err(ElfFault::Foreign(_))));
    }

    #[test]
    fn another_cpu_is_named() {
        assert_eq!(verdict(&tiny(8)), Err(ElfFault::Machine(8)));
    }

    #[test]
    fn an_executable_and_32_bits_are_refused() {
        let mut bytes = tiny(MACHINE);
        bytes[16] = 2;
        assert!(matches!(verdict(&bytes), Err(ElfFault::Foreign(_))));
        let mut bytes = tiny(MACHINE);
        bytes[4] = 1;
        assert!(matches!(verdict(&bytes), Err(ElfFault::Foreign(_))));
    }

    #[test]
    fn numbers_that_overflow_are_a_truncation() {
        let mut bytes = tiny(MACHINE);
        bytes[HEADER + 32..HEADER + 40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(verdict(&bytes), Err(ElfFault::Truncated { .. })));
        let mut bytes = tiny(MACHINE);
        bytes[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(verdict(&bytes), Err(ElfFault::Truncated { .. })));
    }

    #[test]
    fn sections_behind_the_end_are_a_truncation() {
        let mut bytes = tiny(MACHINE);
        let at = bytes.len() as u64;
        bytes[40..48].copy_from_slice(&at.to_le_bytes());
        bytes[58..60].copy_from_slice(&(SECTION_HEADER as u16).to_le_bytes());
        bytes[60..62].copy_from_slice(&1u16.to_le_bytes());
        assert_eq!(verdict(&bytes), Err(ElfFault::Truncated { needed: at + SECTION_HEADER as u64 }));
    }
}
