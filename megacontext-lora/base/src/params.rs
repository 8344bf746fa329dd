//! Parameters by name, each in one group, and which groups learn.
//!
//! Source: the alternating optimisation of MegaContext, where a phase swaps what is frozen. A phase names the groups that
//! learn. The decoder asks [`ParamStore::learns`] and makes gradients for those alone; a graph taped by candle takes its
//! parameters from [`ParamStore::read`], as leaves where they learn and detached where they do not. Nothing is copied when
//! the set changes: both views share one storage.
//!
//! Shapes: as in the Hugging Face checkpoint the name comes from; a linear weight is [out, in].
//! Errors: an unknown name, a shape that changes.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{CpuStorage, Storage, Tensor, Var};
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

    /// What a forward pass reads: a leaf if the parameter's group learns, detached otherwise.
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

    /// Names the groups that learn from here on; every other group is frozen.
    pub fn set_learning(&mut self, groups: impl IntoIterator<Item = Group>) {
        self.learning = groups.into_iter().collect();
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
            let (storage, layout) = param.leaf.storage_and_layout();
            let Storage::Cpu(CpuStorage::F32(data)) = &*storage else {
                return Err(BaseError::Parameter {
                    name: name.clone(),
                    message: format!("expected f32 on the CPU, got {:?}", param.leaf.dtype()),
                });
            };
            let start = layout.start_offset();
            for value in &data[start..start + layout.shape().elem_count()] {
                hash.update(value.to_le_bytes());
            }
        }
        Ok(hex(&hash.finalize()))
    }
}

fn unknown(name: &str) -> BaseError {
    BaseError::Parameter { name: name.to_string(), message: "no parameter of this name".to_string() }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
