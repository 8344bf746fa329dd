//! One level of a gist tree in a file: a header of 64 bytes and equal entries, so that any block is read by its offset.
//!
//! Source: MegaContext's storage format, version 1, of which two descriptions exist. All little-endian, packed:
//!
//! | offset | type | layout A | layout B |
//! |---|---|---|---|
//! | 0 | u32 | magic 0x4D434354, on disk `TCCM` | the same |
//! | 4 | u16 | version, 1 | the same |
//! | 6 | u16 | level | the same |
//! | 8 | u16 | block size K | the same |
//! | 10 | u16 | embedding width E | the same |
//! | 12 | u16 | dtype: 0 u32, 1 f16, 2 bf16, 3 f32 | the same |
//! | 14 | | u64 number of entries | 32 bytes model name |
//! | 22 | | 32 bytes model name | … |
//! | 46 | | … | 18 zeros |
//! | 54 | | 10 zeros | … |
//!
//! A name is UTF-8, padded with zeros. A is written; B is read where the header cannot be A's. B does not say how many
//! entries there are: the file's size does. A file whose name is not empty is never taken for the other layout, as where A
//! counts its entries B has its name, which then would have to go on after its end.
//!
//! Entries: a token is a u32 (level 0); a gist is E values of 2 or 4 bytes. In f16 a gist keeps 11 significant bits up to
//! 65504, in bf16 8 bits at any size, in f32 all of it.
//!
//! Errors: what does not fit the header, and files that are not exactly as long as it says. `std::fs` reads at offsets on
//! Unix alone, where the plugin runs.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use super::hierarchy::Node;
use crate::error::{BaseError, Result};

/// Bytes before the first entry.
pub const HEADER: u64 = 64;
const MAGIC: u32 = 0x4D43_4354;
const VERSION: u16 = 1;
/// Bytes of a model name.
const NAME: usize = 32;

/// How a gist's values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GistDtype {
    /// 11 significant bits, up to 65504: the format's own.
    #[default]
    F16,
    /// 8 significant bits, any size.
    Bf16,
    /// As computed.
    F32,
}

impl GistDtype {
    /// Bytes of a value.
    pub fn size(self) -> u64 {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// The value as it is read back.
    pub fn rounded(self, value: f32) -> f32 {
        match self {
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::Bf16 => bf16::from_f32(value).to_f32(),
            Self::F32 => value,
        }
    }
}

/// Which of the two descriptions a file follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Storage Format: with the number of entries.
    A,
    /// POC: without.
    B,
}

/// What a file says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CtxHeader {
    /// Level of the entries.
    pub lod: u8,
    /// K.
    pub block: usize,
    /// E.
    pub width: usize,
    /// How gists are stored; none on level 0, whose entries are tokens.
    pub dtype: Option<GistDtype>,
    /// Number of entries.
    pub entries: u64,
    /// The base model's name.
    pub model_name: String,
}

impl CtxHeader {
    /// Bytes of an entry.
    pub fn entry_bytes(&self) -> u64 {
        self.dtype.map_or(4, |dtype| self.width as u64 * dtype.size())
    }

    /// Where an entry begins, in bytes from the file's start.
    pub fn offset(&self, entry: u64) -> u64 {
        HEADER + entry * self.entry_bytes()
    }

    /// Bytes of the whole file; none where they are too many to say.
    pub fn file_bytes(&self) -> Option<u64> {
        self.entries.checked_mul(self.entry_bytes())?.checked_add(HEADER)
    }

    /// The header in layout A, or what of it does not fit there.
    pub fn encode(&self) -> std::result::Result<[u8; HEADER as usize], String> {
        let narrow = |what: &str, value: usize| {
            let most = u16::MAX;
            u16::try_from(value).map_err(|_| {
                format!("{what}: expected at most {most}, as its header has 16 bits for it, got {value}")
            })
        };
        let name = self.model_name.as_bytes();
        if name.is_empty() || name.len() > NAME || name.contains(&0) {
            return Err(format!(
                "model_name: expected 1 to {NAME} bytes without zeros, got {} in {:?}",
                name.len(),
                self.model_name
            ));
        }
        let dtype: u16 = match self.dtype {
            None => 0,
            Some(GistDtype::F16) => 1,
            Some(GistDtype::Bf16) => 2,
            Some(GistDtype::F32) => 3,
        };
        let mut bytes = [0; HEADER as usize];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        let words = [
            VERSION,
            u16::from(self.lod),
            narrow("block_size", self.block)?,
            narrow("embedding_dim", self.width)?,
            dtype,
        ];
        for (at, word) in words.into_iter().enumerate() {
            bytes[4 + 2 * at..6 + 2 * at].copy_from_slice(&word.to_le_bytes());
        }
        bytes[14..22].copy_from_slice(&self.entries.to_le_bytes());
        bytes[22..22 + name.len()].copy_from_slice(name);
        Ok(bytes)
    }

    /// The header of a file of `size` bytes, or why it is none.
    pub fn decode(bytes: &[u8; HEADER as usize], size: u64) -> std::result::Result<(Self, Layout), String> {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let magic = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        if magic != MAGIC {
            return Err(format!("expected the magic number {MAGIC:#010x} of a .ctx file, got {magic:#010x}"));
        }
        if word(4) != VERSION {
            return Err(format!("version: expected {VERSION}, got {}", word(4)));
        }
        let lod =
            u8::try_from(word(6)).map_err(|_| format!("level: expected at most 255, got {}", word(6)))?;
        let (block, width) = (usize::from(word(8)), usize::from(word(10)));
        if block < 2 || width == 0 {
            return Err(format!(
                "expected a block of at least 2 and a width of at least 1, got {block} and {width}"
            ));
        }
        let dtype = match (lod, word(12)) {
            (0, 0) => None,
            (1.., 1) => Some(GistDtype::F16),
            (1.., 2) => Some(GistDtype::Bf16),
            (1.., 3) => Some(GistDtype::F32),
            (0, other) => return Err(format!("dtype: expected 0 (u32) for tokens, got {other}")),
            (_, other) => {
                return Err(format!("dtype: expected 1, 2 or 3 (f16, bf16, f32) for gists, got {other}"));
            }
        };
        let header = |entries, model_name| Self { lod, block, width, dtype, entries, model_name };
        let a = name(&bytes[22..54]).filter(|_| bytes[54..].iter().all(|b| *b == 0)).map(|name| {
            let entries = bytes[14..22].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
            header(entries, name)
        });
        if let Some(a) = a.as_ref().filter(|a| a.file_bytes() == Some(size)) {
            return Ok((a.clone(), Layout::A));
        }
        let b = name(&bytes[14..46]).filter(|name| !name.is_empty() && bytes[46..].iter().all(|b| *b == 0));
        match (a, b) {
            (_, Some(name)) => {
                let each = header(0, String::new()).entry_bytes();
                let entries = size.saturating_sub(HEADER);
                if !entries.is_multiple_of(each) {
                    return Err(format!(
                        "expected {HEADER} bytes and whole entries of {each}, got {size} bytes: it is cut short or has \
                         something appended"
                    ));
                }
                Ok((header(entries / each, name), Layout::B))
            }
            (Some(a), None) => Err(match a.file_bytes() {
                Some(expected) => format!(
                    "expected {expected} bytes for {} entries of {}, got {size}: {}",
                    a.entries,
                    a.entry_bytes(),
                    if size < expected { "it is cut short" } else { "it has something appended" }
                ),
                None => format!("expected a number of entries that fits a file, got {}", a.entries),
            }),
            (None, None) => Err("expected a model name in UTF-8, padded with zeros, got other bytes".into()),
        }
    }
}

/// A name that is padded with zeros.
fn name(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    let (name, padding) = bytes.split_at(end);
    let name = std::str::from_utf8(name).ok()?;
    padding.iter().all(|b| *b == 0).then(|| name.to_string())
}

fn fail<T>(path: &Path, message: impl Into<String>) -> Result<T> {
    Err(BaseError::TreeFile { path: path.to_path_buf(), message: message.into() })
}

/// An open `.ctx` file, whole by its size.
#[derive(Debug)]
pub struct CtxFile {
    path: PathBuf,
    file: File,
    header: CtxHeader,
    layout: Layout,
}

impl CtxFile {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// A file that is not there, is none of the kind, or is not exactly as long as its header says.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(BaseError::io(path))?;
        let size = file.metadata().map_err(BaseError::io(path))?.len();
        if size < HEADER {
            return fail(path, format!("expected a header of {HEADER} bytes, got {size}: it is cut short"));
        }
        let mut bytes = [0; HEADER as usize];
        file.read_exact_at(&mut bytes, 0).map_err(BaseError::io(path))?;
        match CtxHeader::decode(&bytes, size) {
            Ok((header, layout)) => Ok(Self { path: path.to_path_buf(), file, header, layout }),
            Err(message) => fail(path, message),
        }
    }

    /// What the file says of itself.
    pub fn header(&self) -> &CtxHeader {
        &self.header
    }

    /// Which description it follows.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    fn read(&self, entries: Range<u64>) -> Result<Vec<u8>> {
        let known = self.header.entries;
        if entries.start > entries.end || entries.end > known {
            return fail(
                &self.path,
                format!("expected a range of its {known} entries, got {}..{}", entries.start, entries.end),
            );
        }
        let mut bytes = vec![0; ((entries.end - entries.start) * self.header.entry_bytes()) as usize];
        self.file
            .read_exact_at(&mut bytes, self.header.offset(entries.start))
            .map_err(BaseError::io(&self.path))?;
        Ok(bytes)
    }

    /// Some of the tokens, read from their place.
    ///
    /// # Errors
    /// A file of gists; a range beyond its entries.
    pub fn tokens(&self, entries: Range<u64>) -> Result<Vec<u32>> {
        if self.header.dtype.is_some() {
            return fail(&self.path, format!("expected tokens, level 0, got level {}", self.header.lod));
        }
        Ok(self.read(entries)?.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect())
    }

    /// Some of the gists, [N, E], read from their place.
    ///
    /// # Errors
    /// A file of tokens; a range beyond its entries; a value that is no finite number.
    pub fn gists(&self, entries: Range<u64>) -> Result<Vec<f32>> {
        let Some(dtype) = self.header.dtype else {
            return fail(&self.path, "expected gists, got level 0, tokens");
        };
        let first = entries.start;
        let bytes = self.read(entries)?;
        let gists: Vec<f32> = match dtype {
            GistDtype::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            GistDtype::Bf16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            GistDtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        };
        if let Some(at) = gists.iter().position(|v| !v.is_finite()) {
            let node = Node { lod: self.header.lod, index: first }.after(at / self.header.width);
            return fail(&self.path, format!("gist of {node}: expected finite numbers, got {}", gists[at]));
        }
        Ok(gists)
    }
}

/// Refuses values that would not be finite as they are stored.
pub(super) fn check_values(
    dtype: GistDtype,
    lod: u8,
    width: usize,
    gists: &[f32],
) -> std::result::Result<(), String> {
    match gists.iter().position(|v| !dtype.rounded(*v).is_finite()) {
        None => Ok(()),
        Some(at) => {
            let node = Node { lod, index: 0 }.after(at / width);
            Err(format!(
                "gist of {node}: expected values that f16 can hold, at most 65504, got {}; store it in bf16 or f32",
                gists[at]
            ))
        }
    }
}

/// Writes a file of tokens.
pub(super) fn write_tokens(path: &Path, header: &CtxHeader, tokens: &[u32]) -> Result<()> {
    write(path, header, |out| tokens.iter().try_for_each(|token| out.write_all(&token.to_le_bytes())))
}

/// Writes a file of gists [N, E].
pub(super) fn write_gists(path: &Path, header: &CtxHeader, dtype: GistDtype, gists: &[f32]) -> Result<()> {
    write(path, header, |out| {
        gists.iter().try_for_each(|value| match dtype {
            GistDtype::F16 => out.write_all(&f16::from_f32(*value).to_le_bytes()),
            GistDtype::Bf16 => out.write_all(&bf16::from_f32(*value).to_le_bytes()),
            GistDtype::F32 => out.write_all(&value.to_le_bytes()),
        })
    })
}

fn write(
    path: &Path,
    header: &CtxHeader,
    entries: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
) -> Result<()> {
    let bytes = header.encode().or_else(|message| fail(path, message))?;
    let write = || {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
        out.write_all(&bytes)?;
        entries(&mut out)?;
        out.into_inner().map_err(std::io::IntoInnerError::into_error).map(drop)
    };
    write().map_err(BaseError::io(path))
}
