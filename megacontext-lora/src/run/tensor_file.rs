//! Named f32 tensors as a safetensors file, the same tensors always as the same bytes.
//!
//! Written in the order of the names, straight from the tensors' storage through a writer that counts and hashes, so
//! that a checkpoint needs no second copy of the weights and no second reading. The layout is the one of the safetensors
//! format (8-byte little-endian header length, JSON header padded with spaces to 8 bytes, data); any reader takes it.
//!
//! Errors: `Io` with the file's path when the system refuses, `Internal` for a tensor that is not f32 on the CPU or a
//! name given twice. Reading reports a plain reason: the caller decides whether a damaged file is fatal.
//!
//! Left out on purpose: other dtypes (what learns is f32), reading by mapping (a checkpoint is read once).

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use megacontext_base::params::hex;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::error::{IoResultExt, PluginError, Result};

/// Size and SHA-256 of a file, as a manifest holds them.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Stamp {
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

/// Passes bytes on, counting and hashing them.
struct Stamping<W> {
    inner: W,
    hash: Sha256,
    size: u64,
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

/// Writes a new safetensors file with these tensors and makes it durable.
pub(super) fn write_tensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<Stamp> {
    let file = File::create_new(path).at(path)?;
    let mut writer = Stamping { inner: file, hash: Sha256::new(), size: 0 };
    stream(&mut writer, path, tensors)?;
    writer.inner.sync_all().at(path)?;
    Ok(Stamp { size: writer.size, sha256: hex(&writer.hash.finalize()) })
}

fn stream(writer: &mut impl Write, path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let mut sorted: Vec<&(String, Tensor)> = tensors.iter().collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    let mut header = Map::new();
    let mut end = 0;
    for (name, tensor) in &sorted {
        if tensor.dtype() != DType::F32 || !tensor.device().is_cpu() {
            let got = format!("{:?} on {:?}", tensor.dtype(), tensor.device().location());
            return Err(PluginError::internal(format!("tensor {name}: expected f32 on the CPU, got {got}")));
        }
        let start = end;
        end += tensor.elem_count() * 4;
        let info = json!({"dtype": "F32", "shape": tensor.dims(), "data_offsets": [start, end]});
        if header.insert(name.clone(), info).is_some() {
            return Err(PluginError::internal(format!("tensor {name} is given twice")));
        }
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    writer.write_all(&(header.len() as u64).to_le_bytes()).at(path)?;
    writer.write_all(&header).at(path)?;
    let mut buffer = Vec::with_capacity(1 << 16);
    for (_, tensor) in sorted {
        let tensor = tensor.contiguous()?;
        let (storage, layout) = tensor.storage_and_layout();
        let (Storage::Cpu(CpuStorage::F32(values)), Some((from, to))) =
            (&*storage, layout.contiguous_offsets())
        else {
            return Err(PluginError::internal("a contiguous f32 tensor on the CPU has another storage"));
        };
        for part in values[from..to].chunks(1 << 14) {
            buffer.clear();
            buffer.extend(part.iter().flat_map(|x| x.to_le_bytes()));
            writer.write_all(&buffer).at(path)?;
        }
    }
    writer.flush().at(path)
}

/// Reads a file and holds it against its stamp; the error is the reason in words.
pub(super) fn read_stamped(path: &Path, stamp: &Stamp) -> std::result::Result<Vec<u8>, String> {
    let name = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let size = fs::metadata(path).map_err(|e| format!("{name}: {e}"))?.len();
    if size != stamp.size {
        return Err(format!("{name}: expected {} bytes, got {size}", stamp.size));
    }
    let bytes = fs::read(path).map_err(|e| format!("{name}: {e}"))?;
    let got = Stamp::of(&bytes);
    if got != *stamp {
        return Err(format!("{name}: expected SHA-256 {}, got {}", stamp.sha256, got.sha256));
    }
    Ok(bytes)
}

/// The tensors of a safetensors file in the order of their names; the error is the reason in words.
pub(super) fn parse_tensors(bytes: &[u8]) -> std::result::Result<Vec<(String, Tensor)>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    let mut tensors = Vec::with_capacity(file.len());
    for (name, view) in file.iter() {
        if view.dtype() != Dtype::F32 {
            return Err(format!("tensor {name}: expected F32, got {:?}", view.dtype()));
        }
        let (values, _) = view.data().as_chunks::<4>();
        let values: Vec<f32> = values.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let tensor = Tensor::from_vec(values, view.shape(), &Device::Cpu)
            .map_err(|e| format!("tensor {name}: {e}"))?;
        tensors.push((name.to_owned(), tensor));
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn tensor(values: &[f32], shape: (usize, usize)) -> Tensor {
        Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn round_trip_of_strided_empty_and_special_values() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let a = tensor(&[1., f32::MIN_POSITIVE / 2., -0.0, f32::INFINITY, 5., 6.], (2, 3));
        let tensors = vec![
            ("z".to_owned(), a.t().unwrap()),
            ("a".to_owned(), a.narrow(0, 1, 1).unwrap()),
            ("m".to_owned(), Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap()),
        ];
        let stamp = write_tensors(&path, &tensors).unwrap();
        let read = parse_tensors(&read_stamped(&path, &stamp).unwrap()).unwrap();
        assert_eq!(read.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>(), ["a", "m", "z"]);
        assert_eq!(read[0].1.to_vec2::<f32>().unwrap(), [[f32::INFINITY, 5., 6.]]);
        assert_eq!(read[1].1.dims(), [0, 3]);
        let z = read[2].1.to_vec2::<f32>().unwrap();
        assert_eq!(z, [[1., f32::INFINITY], [f32::MIN_POSITIVE / 2., 5.], [-0.0, 6.]]);
        assert!(z[2][0].is_sign_negative());
    }

    #[test]
    fn bytes_do_not_depend_on_the_order_given() {
        let dir = tempfile::tempdir().unwrap();
        let mut tensors: Vec<_> =
            (0..20u8).map(|i| (format!("n{i}"), tensor(&[f32::from(i)], (1, 1)))).collect();
        let first = write_tensors(&dir.path().join("a"), &tensors).unwrap();
        tensors.reverse();
        assert_eq!(write_tensors(&dir.path().join("b"), &tensors).unwrap(), first);
    }

    #[test]
    fn full_disk_is_io_with_the_path() {
        let mut full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error =
            stream(&mut full, Path::new("/dev/full"), &[("a".into(), tensor(&[1.], (1, 1)))]).unwrap_err();
        assert_eq!(error.kind, Kind::Io);
        assert!(error.message.starts_with("/dev/full: "), "{error}");
    }

    #[test]
    fn other_dtypes_and_double_names_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let wide = Tensor::zeros(2, DType::F64, &Device::Cpu).unwrap();
        let error = write_tensors(&dir.path().join("a"), &[("w".into(), wide)]).unwrap_err();
        assert!(error.message.contains("tensor w: expected f32"), "{error}");
        let one = tensor(&[1.], (1, 1));
        let error = write_tensors(&dir.path().join("b"), &[("w".into(), one.clone()), ("w".into(), one)])
            .unwrap_err();
        assert!(error.message.contains("twice"), "{error}");
    }
}
