//! Parameters by name, each in one group, and which groups learn.
//!
//! Source: the alternating optimisation of MegaContext, where a phase swaps what is frozen. A phase names the groups that
//! learn. The decoder asks [`ParamStore::learns`] and makes gradients for those alone; a graph taped by candle takes its
//! parameters from [`ParamStore::read`], as leaves where they learn and detached where they do not. Nothing is copied when
//! the set changes: both views share one storage.
//!
//! Storage: f32, or bf16 for a frozen weight. What learns is always f32, so a parameter stored in bf16 becomes f32 when its
//! group begins to learn ([`ParamStore::set_learning`]): every bf16 is an f32, so no value changes, and it stays f32 when
//! the group is frozen again, since rounding then would throw away what was learned. Its bytes differ, and with them the
//! hash of its group.
//!
//! Shapes: as in the Hugging Face checkpoint the name comes from; a linear weight is [out, in].
//! Errors: an unknown name, a shape that changes.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Storage, StorageRef, Tensor, Var};
use megacontext_kernels::linear::Weight;
use megacontext_kernels::store::Store;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{BaseError, Result};

/// Which set of parameters a parameter belongs to. It belongs to exactly one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// Linear weights of the base model, an untied output head among them.
    Base,
    /// Token embeddings (and with them a tied output head).
    Embeddings,
    /// Gains of the normalisations.
    Norms,
    /// LoRA factors.
    Lora,
    /// GistNet.
    Gistnet,
    /// LensNet.
    Lensnet,
    /// Per-lod position uncertainty.
    Sigma,
}

impl Group {
    /// The word used in configurations, files and telemetry.
    pub fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Embeddings => "embeddings",
            Self::Norms => "norms",
            Self::Lora => "lora",
            Self::Gistnet => "gistnet",
            Self::Lensnet => "lensnet",
            Self::Sigma => "sigma",
        }
    }

    /// The group of a decoder parameter, from its name.
    pub fn of_name(name: &str) -> Self {
        if name.contains(".lora_") {
            Self::Lora
        } else if name.ends_with("embed_tokens.weight") {
            Self::Embeddings
        } else if name.ends_with("norm.weight") {
            Self::Norms
        } else {
            Self::Base
        }
    }
}

impl std::fmt::Display for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

struct Param {
    group: Group,
    leaf: Var,
}

/// All parameters of a model, and the groups that learn at the moment.
#[derive(Default)]
pub struct ParamStore {
    params: BTreeMap<String, Param>,
    learning: BTreeSet<Group>,
}

impl ParamStore {
    /// An empty store in which nothing learns.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a parameter, or replaces one of the same name. The value is copied once, into storage of its own.
    pub fn insert(&mut self, name: impl Into<String>, group: Group, tensor: Tensor) -> Result<()> {
        let leaf = Var::from_tensor(&tensor.detach())?;
        self.params.insert(name.into(), Param { group, leaf });
        Ok(())
    }

    /// Adds or replaces a parameter of the given values, row-major, without copying them.
    ///
    /// # Errors
    /// When their number is not the shape's.
    pub fn insert_values<S: Store>(
        &mut self,
        name: impl Into<String>,
        group: Group,
        values: Vec<S>,
        shape: &[usize],
    ) -> Result<()> {
        let name = name.into();
        if values.len() != shape.iter().product::<usize>() {
            let message = format!("expected {shape:?} values, got {}", values.len());
            return Err(BaseError::Parameter { name, message });
        }
        let storage = Storage::Cpu(S::storage(values));
        let leaf = Tensor::from_storage(storage, shape, BackpropOp::none(), true);
        self.params.insert(name, Param { group, leaf: Var::from_tensor(&leaf)? });
        Ok(())
    }

    /// Removes a parameter; true if there was one.
    pub fn remove(&mut self, name: &str) -> bool {
        self.params.remove(name).is_some()
    }

    /// Names in sorted order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.params.keys().map(String::as_str)
    }

    /// Is there a parameter of this name?
    pub fn contains(&self, name: &str) -> bool {
        self.params.contains_key(name)
    }

    /// The group of a parameter.
    pub fn group(&self, name: &str) -> Option<Group> {
        self.params.get(name).map(|p| p.group)
    }

    /// The value of a parameter, outside any graph.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.params.get(name).map(|p| p.leaf.as_detached_tensor())
    }

    /// The values of a parameter, borrowed as they are stored.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn values(&self, name: &str) -> Result<Held<'_>> {
        let param = self.params.get(name).ok_or_else(|| unknown(name))?;
        Held::of(name, &param.leaf)
    }

    /// Shape of a parameter.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.params.get(name).map(|p| p.leaf.dims())
    }

    /// What a taped graph reads: a leaf if the parameter's group learns, detached otherwise.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let param = self.params.get(name).ok_or_else(|| unknown(name))?;
        Ok(if self.learning.contains(&param.group) {
            param.leaf.as_tensor().clone()
        } else {
            param.leaf.as_detached_tensor()
        })
    }

    /// Overwrites a value, keeping name, group and identity.
    pub fn set(&self, name: &str, value: &Tensor) -> Result<()> {
        let param = self.params.get(name).ok_or_else(|| unknown(name))?;
        if param.leaf.shape() != value.shape() {
            return Err(BaseError::Parameter {
                name: name.to_string(),
                message: format!("expected shape {:?}, got {:?}", param.leaf.dims(), value.dims()),
            });
        }
        param.leaf.set(&value.to_dtype(param.leaf.dtype())?.contiguous()?)?;
        Ok(())
    }

    /// Names the groups that learn from here on; every other group is frozen. Returns how many values stored in bf16
    /// became f32 for it.
    pub fn set_learning(&mut self, groups: impl IntoIterator<Item = Group>) -> Result<usize> {
        let learning: BTreeSet<Group> = groups.into_iter().collect();
        let mut widened = 0;
        for param in self.params.values_mut() {
            if learning.contains(&param.group) && param.leaf.dtype() != DType::F32 {
                let values = param.leaf.as_detached_tensor().to_dtype(DType::F32)?;
                param.leaf = Var::from_tensor(&values)?;
                widened += param.leaf.elem_count();
            }
        }
        self.learning = learning;
        Ok(widened)
    }

    /// Nothing learns from here on.
    pub fn freeze(&mut self) {
        self.learning.clear();
    }

    /// The groups that learn.
    pub fn learning(&self) -> impl Iterator<Item = Group> + '_ {
        self.learning.iter().copied()
    }

    /// Does this group learn?
    pub fn learns(&self, group: Group) -> bool {
        self.learning.contains(&group)
    }

    /// The parameters that learn, by name, as leaves.
    pub fn trainable(&self) -> Vec<(String, Tensor)> {
        self.params
            .iter()
            .filter(|(_, p)| self.learning.contains(&p.group))
            .map(|(name, p)| (name.clone(), p.leaf.as_tensor().clone()))
            .collect()
    }

    /// Number of values per group, in group order.
    pub fn count_by_group(&self) -> BTreeMap<Group, usize> {
        let mut counts = BTreeMap::new();
        for param in self.params.values() {
            *counts.entry(param.group).or_insert(0) += param.leaf.elem_count();
        }
        counts
    }

    /// SHA-256 over the names and bytes of every parameter of a group: proof that a frozen group stayed as it was.
    pub fn group_hash(&self, group: Group) -> Result<String> {
        let mut hash = Sha256::new();
        for (name, param) in self.params.iter().filter(|(_, p)| p.group == group) {
            hash.update(name.as_bytes());
            match Held::of(name, &param.leaf)?.weight() {
                Weight::F32(values) => values.iter().for_each(|value| hash.update(value.to_le_bytes())),
                Weight::Bf16(values) => values.iter().for_each(|value| hash.update(value.to_le_bytes())),
            }
        }
        Ok(hex(&hash.finalize()))
    }
}

/// The values of a parameter, borrowed for as long as this lives.
pub struct Held<'a> {
    storage: StorageRef<'a>,
    name: String,
    start: usize,
    len: usize,
}

impl<'a> Held<'a> {
    fn of(name: &str, tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let stored = matches!(&*storage, Storage::Cpu(CpuStorage::F32(_) | CpuStorage::BF16(_)));
        let Some((start, end)) = layout.contiguous_offsets().filter(|_| stored) else {
            return Err(BaseError::Parameter {
                name: name.to_string(),
                message: format!("expected contiguous f32 or bf16 on the CPU, got {:?}", tensor.dtype()),
            });
        };
        Ok(Self { storage, name: name.to_string(), start, len: end - start })
    }

    /// The values as they are stored, row-major.
    pub fn weight(&self) -> Weight<'_> {
        let range = self.start..self.start + self.len;
        match &*self.storage {
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

fn unknown(name: &str) -> BaseError {
    BaseError::Parameter { name: name.to_string(), message: "no parameter of this name".to_string() }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
