//! Named f32 tensors as a safetensors file, the same tensors always as the same bytes.
//!
//! Written in the order of the names, straight from the values through a writer that counts and hashes, and read in the
//! same way into the values: a checkpoint needs no second copy of anything and no second reading. The layout is the one of the safetensors
//! format (8-byte little-endian header length, JSON header padded with spaces to 8 bytes, data); any reader takes it.
//!
//! Errors: `Io` with the file's path when the system refuses, `Internal` for values that are not as many as the
//! shape says or a name given twice. Reading reports a plain reason: the caller decides whether a damaged file is fatal.
//!
//! Left out on purpose: other dtypes (what learns is f32), reading by mapping (a checkpoint is read once, whole).

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use megacontext_base::params::hex;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::error::{IoResultExt, PluginError, Result};

/// Size and SHA-256 of a file, as a manifest holds them.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Stamp {
    /// Bytes.
    pub size: u64,
    /// Lower-case hex of the SHA-256 of the content.
    pub sha256: String,
}

impl Stamp {
    /// The stamp of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self { size: bytes.len() as u64, sha256: hex(&Sha256::digest(bytes)) }
    }
}

/// Passes bytes on in either direction, counting and hashing them.
struct Stamping<W> {
    inner: W,
    hash: Sha256,
    size: u64,
}

impl<W> Stamping<W> {
    fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new(), size: 0 }
    }

    fn stamp(self) -> Stamp {
        Stamp { size: self.size, sha256: hex(&self.hash.finalize()) }
    }
}

impl<R: Read> Read for Stamping<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(bytes)?;
        self.hash.update(&bytes[..n]);
        self.size += n as u64;
        Ok(n)
    }
}

impl<W: Write> Write for Stamping<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.size += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Writes a new file with these bytes and makes it durable.
pub(super) fn write_bytes(path: &Path, bytes: &[u8]) -> Result<Stamp> {
    let mut file = File::create_new(path).at(path)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).at(path)?;
    Ok(Stamp::of(bytes))
}

/// Values with a name and a shape, row-major; borrowed where they are only to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct Named<'a> {
    /// Unique in a file.
    pub name: String,
    /// Its product is the number of values.
    pub shape: Vec<usize>,
    /// The values.
    pub values: Cow<'a, [f32]>,
}

impl<'a> Named<'a> {
    /// A list of values.
    pub fn flat(name: String, values: Cow<'a, [f32]>) -> Self {
        Self { name, shape: vec![values.len()], values }
    }
}

/// Writes a new safetensors file with these tensors and makes it durable.
pub(crate) fn write_tensors(path: &Path, tensors: &[Named]) -> Result<Stamp> {
    let file = File::create_new(path).at(path)?;
    let mut writer = Stamping::new(file);
    stream(&mut writer, path, tensors)?;
    writer.inner.sync_all().at(path)?;
    Ok(writer.stamp())
}

fn stream(writer: &mut impl Write, path: &Path, tensors: &[Named]) -> Result<()> {
    let mut sorted: Vec<&Named> = tensors.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    let mut header = Map::new();
    let mut end = 0;
    for Named { name, shape, values } in &sorted {
        if shape.iter().product::<usize>() != values.len() {
            let got = values.len();
            return Err(PluginError::internal(format!(
                "tensor {name}: expected {shape:?} values, got {got}"
            )));
        }
        let start = end;
        end += values.len() * 4;
        let info = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]});
        if header.insert(name.clone(), info).is_some() {
            return Err(PluginError::internal(format!("tensor {name} is given twice")));
        }
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    writer.write_all(&(header.len() as u64).to_le_bytes()).at(path)?;
    writer.write_all(&header).at(path)?;
    let mut buffer = Vec::with_capacity(1 << 16);
    for part in sorted.iter().flat_map(|tensor| tensor.values.chunks(1 << 14)) {
        buffer.clear();
        buffer.extend(part.iter().flat_map(|x| x.to_le_bytes()));
        writer.write_all(&buffer).at(path)?;
    }
    writer.flush().at(path)
}

/// Opens a file that must have the size of its stamp; the error is the reason in words.
fn open_stamped(path: &Path, stamp: &Stamp) -> std::result::Result<File, String> {
    let size = fs::metadata(path).map_err(|e| e.to_string())?.len();
    if size != stamp.size {
        return Err(format!("expected {} bytes, got {size}", stamp.size));
    }
    File::open(path).map_err(|e| e.to_string())
}

fn compare(stamp: &Stamp, got: &Stamp) -> std::result::Result<(), String> {
    if got == stamp {
        return Ok(());
    }
    Err(format!("expected SHA-256 {}, got {}", stamp.sha256, got.sha256))
}

/// Reads a file and holds it against its stamp; the error is the reason in words.
pub(super) fn read_stamped(path: &Path, stamp: &Stamp) -> std::result::Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    open_stamped(path, stamp)?.read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    compare(stamp, &Stamp::of(&bytes))?;
    Ok(bytes)
}

/// The tensors of a safetensors file in the order of their names, read once and held against its stamp; the error is the
/// reason in words.
pub(crate) fn read_tensors(path: &Path, stamp: &Stamp) -> std::result::Result<Vec<Named<'static>>, String> {
    let mut reader = Stamping::new(open_stamped(path, stamp)?);
    let tensors = parse(&mut reader, stamp.size);
    // Whatever is wrong with the content, that it is not what was written says more.
    io::copy(&mut reader, &mut io::sink()).map_err(|e| e.to_string())?;
    compare(stamp, &reader.stamp())?;
    tensors
}

fn parse(reader: &mut impl Read, size: u64) -> std::result::Result<Vec<Named<'static>>, String> {
    let mut take = |len: usize| {
        let mut bytes = vec![0; len];
        reader.read_exact(&mut bytes).map_err(|e| e.to_string()).map(|()| bytes)
    };
    let stated = take(8)?.try_into().map_or(0, u64::from_le_bytes);
    let header = usize::try_from(stated)
        .ok()
        .filter(|_| stated <= size.saturating_sub(8))
        .ok_or_else(|| format!("expected a header within {size} bytes, got {stated}"))?;
    let header: Metadata = serde_json::from_slice(&take(header)?).map_err(|e| format!("header: {e}"))?;
    let mut tensors = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    // In the order of their places, which lie side by side: reading the header has made sure of that.
    for name in header.offset_keys() {
        let Some(info) = header.info(&name).filter(|info| info.dtype == Dtype::F32) else {
            return Err(format!("tensor {name}: expected F32"));
        };
        let (from, to) = info.data_offsets;
        let mut left = to - from;
        // Made for what is there, whatever the header says.
        let mut values = Vec::with_capacity(left.min(size as usize) / 4);
        while left > 0 {
            let part = &mut buffer[..left.min(1 << 16)];
            reader.read_exact(part).map_err(|e| e.to_string())?;
            left -= part.len();
            values.extend(part.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
        }
        tensors.push(Named { name, shape: info.shape.clone(), values: Cow::Owned(values) });
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn named(name: &str, values: &[f32], shape: &[usize]) -> Named<'static> {
        Named { name: name.to_owned(), shape: shape.to_vec(), values: Cow::Owned(values.to_vec()) }
    }

    #[test]
    fn round_trip_of_empty_and_special_values() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let values = [1., f32::MIN_POSITIVE / 2., -0.0, f32::INFINITY, 5., 6.];
        let long: Vec<f32> = (0..50_000).map(|i| i as f32).collect();
        let tensors = [
            named("z", &values, &[2, 3]),
            named("a", &long, &[50, 1000]),
            named("m", &[], &[0, 3]),
            named("b", &[7.], &[]),
        ];
        let stamp = write_tensors(&path, &tensors).unwrap();
        let read = read_tensors(&path, &stamp).unwrap();
        assert_eq!(read.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "b", "m", "z"]);
        assert_eq!(
            (&read[0], &read[1], &read[2], &read[3]),
            (&tensors[1], &tensors[3], &tensors[2], &tensors[0])
        );
        assert!(read[3].values[2].is_sign_negative());
        let file = fs::read(&path).unwrap();
        let other = safetensors::SafeTensors::deserialize(&file).unwrap();
        assert_eq!(other.tensor("z").unwrap().shape(), [2, 3]);
    }

    #[test]
    fn bytes_do_not_depend_on_the_order_given() {
        let dir = tempfile::tempdir().unwrap();
        let mut tensors: Vec<_> =
            (0..20u8).map(|i| named(&format!("n{i}"), &[f32::from(i)], &[1, 1])).collect();
        let first = write_tensors(&dir.path().join("a"), &tensors).unwrap();
        tensors.reverse();
        assert_eq!(write_tensors(&dir.path().join("b"), &tensors).unwrap(), first);
    }

    #[test]
    fn full_disk_is_io_with_the_path() {
        let mut full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = stream(&mut full, Path::new("/dev/full"), &[named("a", &[1.], &[1, 1])]).unwrap_err();
        assert_eq!(error.kind, Kind::Io);
        assert!(error.message.starts_with("/dev/full: "), "{error}");
    }

    #[test]
    fn other_shapes_and_double_names_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = write_tensors(&dir.path().join("a"), &[named("w", &[0.; 2], &[3])]).unwrap_err();
        assert!(error.message.contains("tensor w: expected [3] values, got 2"), "{error}");
        let one = named("w", &[1.], &[1]);
        let error = write_tensors(&dir.path().join("b"), &[one.clone(), one]).unwrap_err();
        assert!(error.message.contains("twice"), "{error}");
    }

    #[test]
    fn a_file_of_another_content_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        for (bytes, says) in [
            (&b"\xff\xff\xff\xff\xff\xff\xff\x00{}"[..], "expected a header within"),
            (b"\x02\0\0\0\0\0\0\0[]", "header: "),
            (b"\x02\0\0", "failed to fill"),
        ] {
            fs::write(&path, bytes).unwrap();
            let error = read_tensors(&path, &Stamp::of(bytes)).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
