//! Values of parameters in others' hands: borrowed for a pass, or kept whatever becomes of the store.

use std::ffi::c_void;

use candle_core::{CpuStorage, DType, Storage, StorageRef, Tensor};
use megacontext_kernels::linear::Weight;
use megacontext_kernels::store::Store;

use super::Stored;
use crate::error::{BaseError, Result};
use crate::weights::MappedTensor;

/// The values of a parameter, borrowed for as long as this lives.
pub struct Held<'a> {
    name: String,
    place: Place<'a>,
}

enum Place<'a> {
    Memory { storage: StorageRef<'a>, start: usize, len: usize },
    File(&'a MappedTensor),
}

impl<'a> Held<'a> {
    pub(super) fn of(name: &str, value: &'a Stored) -> Result<Self> {
        let place = match value {
            Stored::Mapped(tensor) => Place::File(tensor),
            Stored::Leaf(leaf) => {
                let (storage, layout) = leaf.storage_and_layout();
                let stored = matches!(&*storage, Storage::Cpu(CpuStorage::F32(_) | CpuStorage::BF16(_)));
                let Some((start, end)) = layout.contiguous_offsets().filter(|_| stored) else {
                    return Err(BaseError::Parameter {
                        name: name.to_string(),
                        message: format!(
                            "expected contiguous f32 or bf16 on the CPU, got {:?}",
                            leaf.dtype()
                        ),
                    });
                };
                Place::Memory { storage, start, len: end - start }
            }
        };
        Ok(Self { name: name.to_string(), place })
    }

    /// The values as they are stored, row-major.
    pub fn weight(&self) -> Weight<'_> {
        let (storage, range) = match &self.place {
            Place::File(tensor) => return tensor.weight(),
            Place::Memory { storage, start, len } => (storage, *start..start + len),
        };
        match &**storage {
            Storage::Cpu(CpuStorage::BF16(values)) => Weight::Bf16(&values[range]),
            Storage::Cpu(CpuStorage::F32(values)) => Weight::F32(&values[range]),
            _ => Weight::F32(&[]),
        }
    }

    /// A copy in f32.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.weight() {
            Weight::F32(values) => values.to_vec(),
            Weight::Bf16(values) => values.iter().map(|v| v.get()).collect(),
        }
    }

    /// The values of a parameter that is stored in f32.
    ///
    /// # Errors
    /// When it is stored in bf16.
    pub fn f32(&self) -> Result<&[f32]> {
        match self.weight() {
            Weight::F32(values) => Ok(values),
            Weight::Bf16(_) => Err(BaseError::Parameter {
                name: self.name.clone(),
                message: "expected f32, got bf16".to_string(),
            }),
        }
    }
}

/// A parameter's own memory, kept for as long as this lives, whatever becomes of the store.
pub struct Shared {
    data: *const c_void,
    dtype: DType,
    shape: Vec<usize>,
    _keeper: Keeper,
}

/// What the memory belongs to.
enum Keeper {
    Memory { _tensor: Tensor },
    File { _mapped: MappedTensor },
}

// SAFETY: the pointer is into memory that the keeper shares in and that nobody writes (the promise of `ParamStore::share`).
unsafe impl Send for Shared {}
// SAFETY: as above; it is only read.
unsafe impl Sync for Shared {}

impl Shared {
    /// Of this value.
    ///
    /// # Safety
    /// As for [`super::ParamStore::share`].
    pub(super) unsafe fn of(name: &str, value: &Stored) -> Result<Self> {
        let (data, dtype) = match Held::of(name, value)?.weight() {
            Weight::F32(values) => (values.as_ptr().cast(), DType::F32),
            Weight::Bf16(values) => (values.as_ptr().cast(), DType::BF16),
        };
        let keeper = match value {
            Stored::Leaf(leaf) => Keeper::Memory { _tensor: leaf.as_detached_tensor() },
            Stored::Mapped(mapped) => Keeper::File { _mapped: mapped.clone() },
        };
        Ok(Self { data, dtype, shape: value.shape().to_vec(), _keeper: keeper })
    }

    /// The first value.
    pub fn data(&self) -> *const c_void {
        self.data
    }

    /// F32 or BF16.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions, row-major.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
}
