//! Weights of a Hugging Face folder: safetensors files, memory-mapped, read tensor by tensor.
//!
//! Source: the safetensors format and transformers' `model.safetensors.index.json` (`weight_map`: tensor → file).
//! `model.safetensors` is taken where it exists, else the index.
//!
//! A tensor that is stored as it is wanted is used where it lies in the mapping ([`Weights::mapped`]): nothing is read
//! before it is needed, and processes that use one file share its memory. Else f32, f16 and bf16 become f32 or bf16, as
//! asked for, in parallel and straight from the mapping: the only copy is the result, and the mapping's pages are given
//! back as soon as a tensor has been read.
//! Errors: `BaseError::Weights`, naming file and tensor. All files are checked when the folder is opened; shapes when a
//! tensor is read. Values are checked when they are converted, those of mapped tensors by [`MappedTensor::check_finite`]:
//! that reads them all.
//!
//! Left out on purpose: pickled weights (`.bin`, `.pt`): reading a pickle runs code.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use megacontext_kernels::linear::Weight;
use megacontext_kernels::store::{Store, bf16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::Metadata;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::config::DecoderConfig;
use crate::error::{BaseError, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// How much of each end of a tensor enters the fingerprint.
const SAMPLE: usize = 4096;

/// A storage type of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    BF16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The name in a safetensors header.
    pub fn safetensors_name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
        }
    }

    /// The name in a `config.json`.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    fn of(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::F32 => Some(Self::F32),
            safetensors::Dtype::F16 => Some(Self::F16),
            safetensors::Dtype::BF16 => Some(Self::BF16),
            _ => None,
        }
    }
}

/// One mapped safetensors file whose header has been checked.
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Mmap,
    /// Where the data starts in the file.
    data: usize,
    header: Metadata,
}

impl MappedFile {
    /// Maps and checks one file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(BaseError::io(path))?;
        let info = file.metadata().map_err(BaseError::io(path))?;
        if !info.is_file() {
            return Err(BaseError::weights(path, "expected a regular file"));
        }
        if info.len() < 8 {
            return Err(BaseError::weights(
                path,
                format!("expected a safetensors file, got {} bytes: the file is truncated", info.len()),
            ));
        }
        // SAFETY: the mapping is read-only and private to this value. Another process that shortens the file while it
        // is mapped would make reads fault; every reader of mapped weights accepts this, and we never write in place.
        let map = unsafe { Mmap::map(&file) }.map_err(BaseError::io(path))?;
        if let Some(name) = header_bytes(&map).and_then(repeated_key) {
            return Err(BaseError::tensor(
                path,
                &name,
                "expected each tensor once, the header names it twice",
            ));
        }
        let (header_len, header) =
            SafeTensors::read_metadata(&map).map_err(|e| BaseError::weights(path, explain(&map, &e)))?;
        for (name, info) in header.tensors() {
            // An empty tensor passes whatever its other dimensions say, and strides are made of these.
            let others = info.shape.iter().filter(|dim| **dim != 0);
            if others.copied().try_fold(1usize, usize::checked_mul).is_none() {
                let message = format!("expected dimensions that can be counted, got {:?}", info.shape);
                return Err(BaseError::tensor(path, &name, message));
            }
        }
        Ok(Self { path: path.to_path_buf(), map, data: 8 + header_len, header })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What its writer said about it.
    pub(crate) fn metadata(&self) -> Option<&HashMap<String, String>> {
        self.header.metadata().as_ref()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.header.info(name).map(|info| info.shape.as_slice())
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.header.info(name).is_some()
    }

    fn bytes(&self, name: &str) -> Option<&[u8]> {
        let (from, to) = self.header.info(name)?.data_offsets;
        self.map.get(self.data + from..self.data + to)
    }

    /// Storage type of a tensor, refused unless it is a floating type we read.
    pub(crate) fn dtype(&self, name: &str) -> Result<Dtype> {
        let info =
            self.header.info(name).ok_or_else(|| BaseError::tensor(&self.path, name, "no such tensor"))?;
        Dtype::of(info.dtype).ok_or_else(|| {
            let message = format!("expected dtype F32, F16 or BF16, got {:?}", info.dtype);
            BaseError::tensor(&self.path, name, message)
        })
    }

    /// A tensor's values in row-major order, whatever its shape.
    pub(crate) fn read<S: Store>(&self, name: &str) -> Result<Vec<S>> {
        let dtype = self.dtype(name)?;
        let bytes = self.bytes(name).ok_or_else(|| BaseError::tensor(&self.path, name, "no such tensor"))?;
        let values: Vec<S> = convert(bytes, dtype);
        self.release();
        match first_not_finite(&values) {
            None => Ok(values),
            Some(at) => Err(self.not_finite(name, at, values[at].get())),
        }
    }

    fn not_finite(&self, name: &str, at: usize, value: f32) -> BaseError {
        let message = format!(
            "expected finite values, got {value} at place {at}: the file is damaged or training diverged"
        );
        BaseError::tensor(&self.path, name, message)
    }

    /// A tensor widened to f32, whatever its shape.
    pub(crate) fn read_f32(&self, name: &str) -> Result<Tensor> {
        let values = self.read::<f32>(name)?;
        Ok(Tensor::from_vec(values, self.shape(name).unwrap_or(&[]), &Device::Cpu)?)
    }

    /// Gives the mapping's pages back to the system, which would count them as this process's memory: they are read
    /// from the file again where they are needed again.
    fn release(&self) {
        #[cfg(unix)]
        // SAFETY: the mapping is of a file, shared and never written to, so a page that is dropped comes back with the
        // file's bytes; slices into the mapping stay valid. Advice that the system does not take changes nothing.
        let _ = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }
}

/// A tensor used where it lies in its file: f32 or bf16 values, row-major. Keeps the file mapped.
#[derive(Clone)]
pub struct MappedTensor {
    file: Arc<MappedFile>,
    name: String,
    shape: Vec<usize>,
    narrow: bool,
}

impl MappedTensor {
    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Is it stored in bf16 (else in f32)?
    pub fn narrow(&self) -> bool {
        self.narrow
    }

    /// The values.
    pub fn weight(&self) -> Weight<'_> {
        let bytes = self.file.bytes(&self.name).unwrap_or(&[]);
        // Both casts were tried when this was made.
        if self.narrow {
            Weight::Bf16(bytemuck::try_cast_slice(bytes).unwrap_or(&[]))
        } else {
            Weight::F32(bytemuck::try_cast_slice(bytes).unwrap_or(&[]))
        }
    }

    /// Looks at every value.
    ///
    /// # Errors
    /// When one is NaN or infinite, naming it.
    pub fn check_finite(&self) -> Result<()> {
        let found = match self.weight() {
            Weight::F32(values) => first_not_finite(values).map(|at| (at, values[at])),
            Weight::Bf16(values) => first_not_finite(values).map(|at| (at, values[at].get())),
        };
        found.map_or(Ok(()), |(at, value)| Err(self.file.not_finite(&self.name, at, value)))
    }
}

/// The place of the first value that is NaN or infinite.
fn first_not_finite<S: Store>(values: &[S]) -> Option<usize> {
    const CHUNK: usize = 1 << 16;
    values.par_chunks(CHUNK).enumerate().find_map_first(|(chunk, values)| {
        // Over whole chunks without a way out, which compiles to vectors.
        let any = values.iter().fold(false, |any, v| any | !v.get().is_finite());
        let at = any.then(|| values.iter().position(|v| !v.get().is_finite()));
        at.flatten().map(|at| chunk * CHUNK + at)
    })
}

/// The weights of a model folder, mapped into memory.
pub struct Weights {
    dir: PathBuf,
    files: Vec<Arc<MappedFile>>,
    /// Tensor → position in `files`.
    place: BTreeMap<String, usize>,
}

impl Weights {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names, and checks every header.
    pub fn open(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            return Err(BaseError::weights(dir, "expected a model folder, there is none"));
        }
        let single = dir.join(SINGLE);
        if single.exists() {
            let file = Arc::new(MappedFile::open(&single)?);
            let place = file.names().into_iter().map(|name| (name, 0)).collect();
            return Ok(Self { dir: dir.to_path_buf(), files: vec![file], place });
        }
        let index = dir.join(INDEX);
        if index.exists() {
            return Self::open_shards(dir, &index);
        }
        let pickles = pickles_in(dir);
        Err(BaseError::weights(
            dir,
            match pickles.first() {
                Some(pickle) => format!(
                    "expected {SINGLE} or {INDEX}, got only {pickle}; weights are read from safetensors only, because \
                     reading a pickle runs code: convert the model with transformers' save_pretrained"
                ),
                None => format!("expected {SINGLE} or {INDEX}, there is neither"),
            },
        ))
    }

    fn open_shards(dir: &Path, index: &Path) -> Result<Self> {
        let text = fs::read_to_string(index).map_err(BaseError::io(index))?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|e| BaseError::weights(index, format!("expected complete JSON: {e}")))?;
        let map = value
            .get("weight_map")
            .and_then(Value::as_object)
            .filter(|map| !map.is_empty())
            .ok_or_else(|| BaseError::weights(index, "expected a non-empty object \"weight_map\""))?;
        if let Some(name) = repeated_index_key(&text) {
            return Err(BaseError::tensor(
                index,
                &name,
                "expected each tensor once, weight_map names it twice",
            ));
        }
        let mut files: Vec<Arc<MappedFile>> = Vec::new();
        let mut number: BTreeMap<&str, usize> = BTreeMap::new();
        let mut place = BTreeMap::new();
        for (tensor, shard) in map {
            let shard = shard.as_str().ok_or_else(|| {
                BaseError::tensor(index, tensor, format!("expected a file name in weight_map, got {shard}"))
            })?;
            let at = match number.get(shard) {
                Some(at) => *at,
                None => {
                    if Path::new(shard).file_name().is_none_or(|name| name != shard) {
                        let message = format!("expected the name of a file in this folder, got \"{shard}\"");
                        return Err(BaseError::tensor(index, tensor, message));
                    }
                    let path = dir.join(shard);
                    if !path.is_file() {
                        let message =
                            format!("expected the shard {shard} that the index names, there is none");
                        return Err(BaseError::tensor(index, tensor, message));
                    }
                    files.push(Arc::new(MappedFile::open(&path)?));
                    number.insert(shard, files.len() - 1);
                    files.len() - 1
                }
            };
            if !files[at].has(tensor) {
                let message =
                    format!("expected this tensor in {shard}, where the index puts it; it is not there");
                return Err(BaseError::tensor(index, tensor, message));
            }
            place.insert(tensor.clone(), at);
        }
        for (at, file) in files.iter().enumerate() {
            for name in file.names() {
                if let Some(other) = place.get(&name).filter(|other| **other != at) {
                    let message =
                        format!("expected each tensor once, it is also in {}", files[*other].path.display());
                    return Err(BaseError::tensor(&file.path, &name, message));
                }
            }
        }
        Ok(Self { dir: dir.to_path_buf(), files, place })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Names in sorted order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.place.keys().map(String::as_str)
    }

    /// Is there a tensor of this name?
    pub fn has(&self, name: &str) -> bool {
        self.place.contains_key(name)
    }

    /// Shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.files[*self.place.get(name)?].shape(name)
    }

    fn file(&self, name: &str) -> Result<&Arc<MappedFile>> {
        let at = self.place.get(name).ok_or_else(|| {
            let where_ = if self.files.len() == 1 { &self.files[0].path } else { &self.dir };
            BaseError::tensor(where_, name, "expected this tensor, there is none of this name")
        })?;
        Ok(&self.files[*at])
    }

    /// The file of a tensor, refused unless the tensor has the given shape.
    fn file_of_shape(&self, name: &str, shape: &[usize]) -> Result<&Arc<MappedFile>> {
        let file = self.file(name)?;
        match file.shape(name) {
            Some(found) if found == shape => Ok(file),
            found => {
                let message = format!("expected shape {shape:?}, got {:?}", found.unwrap_or(&[]));
                Err(BaseError::tensor(&file.path, name, message))
            }
        }
    }

    /// A tensor's values in row-major order, rounded to the type asked for; refused unless it has the given shape and is
    /// finite.
    pub fn values<S: Store>(&self, name: &str, shape: &[usize]) -> Result<Vec<S>> {
        self.file_of_shape(name, shape)?.read(name)
    }

    /// A tensor where it lies in its file, if it is stored there as wanted: in bf16 (`narrow`) or f32, little-endian as this
    /// machine, and at an address that its type can have. Refused unless it has the given shape.
    pub fn mapped(&self, name: &str, shape: &[usize], narrow: bool) -> Result<Option<MappedTensor>> {
        let file = self.file_of_shape(name, shape)?;
        let bytes = file.bytes(name).unwrap_or(&[]);
        let fits = match file.dtype(name)? {
            Dtype::BF16 => narrow && bytemuck::try_cast_slice::<u8, bf16>(bytes).is_ok(),
            Dtype::F32 => !narrow && bytemuck::try_cast_slice::<u8, f32>(bytes).is_ok(),
            Dtype::F16 => false,
        };
        let tensor =
            || MappedTensor { file: file.clone(), name: name.to_string(), shape: shape.to_vec(), narrow };
        Ok((fits && cfg!(target_endian = "little")).then(tensor))
    }

    /// A tensor widened to f32 on the CPU; refused unless it has the given shape.
    pub fn tensor_f32(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.values::<f32>(name, shape)?, shape, &Device::Cpu)?)
    }

    /// Checks, without reading data, that all of the given tensors are there with these shapes and a readable dtype.
    pub fn check(&self, expected: &[(String, Vec<usize>)]) -> Result<()> {
        for (name, shape) in expected {
            let file = self.file(name)?;
            file.dtype(name)?;
            let found = file.shape(name).unwrap_or(&[]);
            if found != shape {
                return Err(BaseError::tensor(
                    &file.path,
                    name,
                    format!("expected shape {shape:?} from config.json, got {found:?}"),
                ));
            }
        }
        Ok(())
    }

    /// Refuses tensors that the model has no place for: the folder is then another model's. A head beside tied embeddings
    /// and what the family's files carry besides parameters are passed over.
    pub fn refuse_others(&self, config: &DecoderConfig) -> Result<()> {
        let known: HashSet<String> = config.tensors().into_iter().map(|(name, _)| name).collect();
        let buffers = config.architecture.names.buffers;
        for name in self.names() {
            let buffer = buffers.iter().any(|end| name.ends_with(end)) || name == config.untied_head_name();
            if !known.contains(name) && !buffer {
                let family = config.family.model_type();
                let message =
                    format!("expected only tensors of this {family} model, it has none of this name");
                return Err(BaseError::tensor(&self.file(name)?.path, name, message));
            }
        }
        Ok(())
    }

    /// The storage type that holds every given tensor without loss: theirs when they share one, else f32.
    pub fn common_dtype<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Result<Dtype> {
        let mut common = None;
        for name in names {
            let dtype = self.file(name)?.dtype(name)?;
            if *common.get_or_insert(dtype) != dtype {
                return Ok(Dtype::F32);
            }
        }
        Ok(common.unwrap_or(Dtype::F32))
    }

    /// What tells one set of weights from another, cheaply: SHA-256, in lower-case hex, over every tensor in order of
    /// name. Each contributes `name \0 DTYPE \0 d0,d1,… \0`, the number of its bytes as u64 little-endian, and the
    /// first and the last 4096 bytes of its data (fewer where it is shorter). How tensors are spread over files does
    /// not matter.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for (name, at) in &self.place {
            let file = &self.files[*at];
            let (Some(info), Some(bytes)) = (file.header.info(name), file.bytes(name)) else { continue };
            let shape: Vec<String> = info.shape.iter().map(usize::to_string).collect();
            hash.update(format!("{name}\0{}\0{}\0", info.dtype, shape.join(",")));
            hash.update((bytes.len() as u64).to_le_bytes());
            let sample = bytes.len().min(SAMPLE);
            hash.update(&bytes[..sample]);
            hash.update(&bytes[bytes.len() - sample..]);
        }
        self.files.iter().for_each(|file| file.release());
        crate::params::hex(&hash.finalize())
    }
}

/// Bytes as stored, little-endian, to values.
fn convert<S: Store>(bytes: &[u8], dtype: Dtype) -> Vec<S> {
    const CHUNK: usize = 1 << 16;
    let mut values = vec![S::default(); bytes.len() / dtype.size()];
    let convert = |(out, bytes): (&mut [S], &[u8])| match dtype {
        Dtype::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *o = S::put(f32::from_le_bytes(*b));
            }
        }
        Dtype::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = S::put(half::f16::from_le_bytes(*b).to_f32());
            }
        }
        Dtype::BF16 => {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *o = S::put(bf16::from_le_bytes(*b).get());
            }
        }
    };
    if values.len() <= CHUNK {
        convert((&mut values, bytes));
    } else {
        values.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK * dtype.size())).for_each(convert);
    }
    values
}

/// The JSON part of a safetensors file, where it is all there.
fn header_bytes(map: &[u8]) -> Option<&[u8]> {
    let stated = usize::try_from(u64::from_le_bytes(*map.first_chunk::<8>()?)).ok()?;
    map.get(8..stated.checked_add(8)?)
}

/// Why a file is not a complete safetensors file.
fn explain(map: &[u8], error: &safetensors::SafeTensorError) -> String {
    use safetensors::SafeTensorError as E;
    let size = map.len();
    let stated = map.first_chunk::<8>().map_or(0, |n| u64::from_le_bytes(*n));
    match error {
        E::InvalidHeaderLength => format!(
            "expected a safetensors file, its header is said to take {stated} bytes but the file has {size}: it is \
             truncated or of another format"
        ),
        E::HeaderTooLarge => format!(
            "expected a safetensors file, the first 8 bytes give a header of {stated} bytes: the file is damaged or of \
             another format"
        ),
        E::MetadataIncompleteBuffer => format!(
            "expected exactly the data that the header describes, but the file has {size} bytes: it is truncated or \
             has something appended; copy it again"
        ),
        E::TensorInvalidInfo => {
            format!("expected data offsets that fit dtype and shape of every tensor: {error}")
        }
        other => format!("expected a sound safetensors file: {other}"),
    }
}

fn pickles_in(dir: &Path) -> Vec<String> {
    let mut found: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| [".bin", ".pt", ".pth", ".ckpt"].iter().any(|end| name.ends_with(end)))
        .collect();
    found.sort();
    found
}

/// The first key that a JSON object names twice; JSON parsers silently keep the last.
struct Repeated(Option<String>);

impl<'de> Deserialize<'de> for Repeated {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Repeated;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Repeated, A::Error> {
                let mut seen = HashSet::new();
                let mut repeated = None;
                while let Some((key, _)) = map.next_entry::<String, IgnoredAny>()? {
                    if repeated.is_none() && seen.contains(&key) {
                        repeated = Some(key);
                    } else {
                        seen.insert(key);
                    }
                }
                Ok(Repeated(repeated))
            }
        }
        from.deserialize_map(Keys)
    }
}

fn repeated_key(header: &[u8]) -> Option<String> {
    serde_json::from_slice::<Repeated>(header).ok()?.0
}

fn repeated_index_key(index: &str) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: Repeated,
    }
    serde_json::from_str::<Index>(index).ok()?.weight_map.0
}
