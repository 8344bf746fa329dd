//! Parameters by name, each in one group, and which groups learn.
//!
//! Source: the alternating optimisation of MegaContext, where a phase swaps what is frozen. A phase names the groups that
//! learn. The decoder asks [`ParamStore::learns`] and makes gradients for those alone; a graph taped by candle finds what
//! learns as leaves in [`ParamStore::trainable`]. Nothing is copied when the set changes.
//!
//! Storage: f32, or bf16 for a frozen weight; a frozen weight may also lie in its file ([`ParamStore::insert_mapped`]), and
//! is read into memory when its group begins to learn. What learns is always f32, so a parameter stored in bf16 becomes f32
//! when its group begins to learn ([`ParamStore::set_learning`]): every bf16 is an f32, so no value changes, and it stays
//! f32 when the group is frozen again, since rounding then would throw away what was learned. Its bytes differ, and with
//! them the hash of its group.
//!
//! Shapes: as in the Hugging Face checkpoint the name comes from; a linear weight is [out, in].
//! Errors: an unknown name, a shape that changes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
#[cfg(feature = "cuda")]
use std::sync::{Mutex, PoisonError};

use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Storage, Tensor, Var};
use megacontext_kernels::linear::Weight;
use megacontext_kernels::store::{Store, bf16};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{BaseError, Result};
#[cfg(feature = "cuda")]
use crate::gradients::Gradients;
#[cfg(feature = "cuda")]
use crate::machine::gpu::{Gpu, Parameters};
use crate::weights::MappedTensor;

mod held;

pub use held::{Held, Shared};

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
}

impl std::fmt::Display for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

struct Param {
    group: Group,
    value: Stored,
    /// Shared with aliases, as the values are.
    version: Arc<Version>,
    #[cfg(feature = "cuda")]
    away: Arc<Away>,
}

impl Param {
    fn new(group: Group, value: Stored) -> Self {
        Self {
            group,
            value,
            version: Arc::new(Version::new()),
            #[cfg(feature = "cuda")]
            away: Arc::default(),
        }
    }

    /// The value, brought here first where a newer one lies on a GPU.
    fn here(&self, name: &str) -> Result<&Stored> {
        #[cfg(feature = "cuda")]
        self.away.bring(name, self.version.now(), &self.value)?;
        #[cfg(not(feature = "cuda"))]
        let _ = name;
        Ok(&self.value)
    }
}

/// The GPU on which a parameter has been written since it was written here.
#[cfg(feature = "cuda")]
#[derive(Default)]
struct Away(Mutex<Option<Gpu>>);

#[cfg(feature = "cuda")]
impl Away {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Gpu>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bring(&self, name: &str, version: u64, value: &Stored) -> Result<()> {
        let mut away = self.lock();
        let (Some(gpu), Stored::Leaf(leaf)) = (&*away, value) else { return Ok(()) };
        leaf.set(&Tensor::from_vec(gpu.written(name, version)?, leaf.dims(), &Device::Cpu)?)?;
        *away = None;
        Ok(())
    }
}

/// A number that no other parameter and no other value of this one has had: what a copy elsewhere is known by.
struct Version(AtomicU64);

impl Version {
    fn next() -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }

    fn new() -> Self {
        Self(AtomicU64::new(Self::next()))
    }

    fn renew(&self) {
        self.0.store(Self::next(), Ordering::Release);
    }

    #[cfg(feature = "cuda")]
    fn now(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

/// Where a parameter's values are.
enum Stored {
    /// In memory of its own.
    Leaf(Var),
    /// In the file it came from; frozen.
    Mapped(MappedTensor),
}

impl Stored {
    fn shape(&self) -> &[usize] {
        match self {
            Self::Leaf(leaf) => leaf.dims(),
            Self::Mapped(tensor) => tensor.shape(),
        }
    }

    fn count(&self) -> usize {
        self.shape().iter().product()
    }

    /// Could gradients be added to it as it is?
    fn can_learn(&self) -> bool {
        matches!(self, Self::Leaf(leaf) if leaf.dtype() == DType::F32)
    }

    /// The value outside any graph; a mapped one is copied.
    fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Leaf(leaf) => Ok(leaf.as_detached_tensor()),
            Self::Mapped(mapped) => Ok(match mapped.weight() {
                Weight::F32(values) => Tensor::from_slice(values, mapped.shape(), &Device::Cpu)?,
                Weight::Bf16(values) => {
                    let storage = Storage::Cpu(bf16::storage(values.to_vec()));
                    Tensor::from_storage(storage, mapped.shape(), BackpropOp::none(), false)
                }
            }),
        }
    }
}

/// A parameter out of its store: its values, wherever they are, and its group. Putting it back copies nothing.
pub struct Parameter {
    param: Param,
    /// Had its values been looked at ([`ParamStore::check_mapped`])?
    looked: bool,
}

/// Gradients that stay where they are made.
#[cfg(feature = "cuda")]
struct Beside(Gradients);

#[cfg(feature = "cuda")]
impl Default for Beside {
    fn default() -> Self {
        Self(Gradients::staying())
    }
}

/// All parameters of a model, and the groups that learn at the moment.
#[derive(Default)]
pub struct ParamStore {
    params: BTreeMap<String, Param>,
    learning: BTreeSet<Group>,
    /// Have the values that lie in files been looked at?
    looked: OnceLock<()>,
    /// Gradients that arrived beside candle's tape.
    #[cfg(feature = "cuda")]
    beside: Arc<Mutex<Beside>>,
}

impl ParamStore {
    /// An empty store in which nothing learns.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a parameter, or replaces one of the same name. The value is copied once, into storage of its own.
    pub fn insert(&mut self, name: impl Into<String>, group: Group, tensor: Tensor) -> Result<()> {
        let leaf = Var::from_tensor(&tensor.detach())?;
        self.params.insert(name.into(), Param::new(group, Stored::Leaf(leaf)));
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
        self.params.insert(name, Param::new(group, Stored::Leaf(Var::from_tensor(&leaf)?)));
        Ok(())
    }

    /// Adds or replaces a parameter that stays in its file for as long as its group is frozen.
    ///
    /// # Errors
    /// When its group learns at the moment, or it is not finite and the others have been looked at already.
    pub fn insert_mapped(
        &mut self,
        name: impl Into<String>,
        group: Group,
        tensor: MappedTensor,
    ) -> Result<()> {
        let name = name.into();
        if self.learns(group) {
            let message = format!("expected a frozen group, got {group}, which learns: read it into memory");
            return Err(BaseError::Parameter { name, message });
        }
        self.look_at(&tensor)?;
        self.params.insert(name, Param::new(group, Stored::Mapped(tensor)));
        Ok(())
    }

    /// Looks at a newcomer where the others have been looked at, so that nobody has to look at all of them again.
    fn look_at(&self, tensor: &MappedTensor) -> Result<()> {
        if self.looked.get().is_some() { tensor.check_finite() } else { Ok(()) }
    }

    /// Looks at every value that lies in a file, the first time it is called: the decoder does before its first pass, so
    /// that opening a model reads none of it. Values in memory were looked at when they were read.
    ///
    /// # Errors
    /// When one is NaN or infinite.
    pub fn check_mapped(&self) -> Result<()> {
        if self.looked.get().is_some() {
            return Ok(());
        }
        self.params.values().try_for_each(|param| match &param.value {
            Stored::Leaf(_) => Ok(()),
            Stored::Mapped(tensor) => tensor.check_finite(),
        })?;
        self.looked.get_or_init(|| ());
        Ok(())
    }

    /// Bytes of parameters that lie in files: the system can take their memory back at any time.
    pub fn mapped_bytes(&self) -> u64 {
        let bytes = |tensor: &MappedTensor| {
            tensor.shape().iter().product::<usize>() as u64 * if tensor.narrow() { 2 } else { 4 }
        };
        let of = |param: &Param| match &param.value {
            Stored::Leaf(_) => 0,
            Stored::Mapped(tensor) => bytes(tensor),
        };
        self.params.values().map(of).sum()
    }

    /// Takes a parameter out, as it is.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn take(&mut self, name: &str) -> Result<Parameter> {
        self.params.get(name).ok_or_else(|| unknown(name))?.here(name)?;
        let param = self.params.remove(name).ok_or_else(|| unknown(name))?;
        Ok(Parameter { param, looked: self.looked.get().is_some() })
    }

    /// Puts a parameter that was taken out of a store in the place of whatever has this name.
    ///
    /// # Errors
    /// When its group learns and it cannot, because it is not in memory or not in f32; when it is not finite.
    pub fn put(&mut self, name: impl Into<String>, parameter: Parameter) -> Result<()> {
        let (name, Parameter { param, looked }) = (name.into(), parameter);
        if self.learns(param.group) && !param.value.can_learn() {
            let message = format!("expected a frozen group, got {}, which learns", param.group);
            return Err(BaseError::Parameter { name, message });
        }
        if let Stored::Mapped(tensor) = &param.value
            && !looked
        {
            self.look_at(tensor)?;
        }
        self.params.insert(name, param);
        Ok(())
    }

    /// Removes a parameter; true if there was one.
    pub fn remove(&mut self, name: &str) -> bool {
        self.params.remove(name).is_some()
    }

    /// A store of the same memory, with the same versions and groups that learn: for a graph, which outlives a borrow.
    ///
    /// # Errors
    /// When a parameter lies in a file.
    #[cfg(feature = "cuda")]
    pub(crate) fn alias(&self) -> Result<Self> {
        let alias = |(name, param): (&String, &Param)| match &param.value {
            Stored::Leaf(leaf) => {
                let (value, version) = (Stored::Leaf(leaf.clone()), param.version.clone());
                Ok((name.clone(), Param { group: param.group, value, version, away: param.away.clone() }))
            }
            Stored::Mapped(_) => {
                let message = "expected values in memory, got a file's".to_string();
                Err(BaseError::Parameter { name: name.clone(), message })
            }
        };
        Ok(Self {
            params: self.params.iter().map(alias).collect::<Result<_>>()?,
            learning: self.learning.clone(),
            looked: OnceLock::new(),
            beside: self.beside.clone(),
        })
    }

    /// Runs `add` on the gradients that no tape carries, of this store or one that it is an alias of, until they are taken.
    #[cfg(feature = "cuda")]
    pub(crate) fn with_beside<R>(&self, add: impl FnOnce(&mut Gradients) -> R) -> R {
        add(&mut self.beside.lock().unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Takes the gradients that were left.
    #[cfg(feature = "cuda")]
    pub(crate) fn take_beside(&self) -> Gradients {
        std::mem::take(&mut *self.beside.lock().unwrap_or_else(PoisonError::into_inner)).0
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

    /// Is there a parameter of this name whose group learns?
    pub fn parameter_learns(&self, name: &str) -> bool {
        self.group(name).is_some_and(|group| self.learns(group))
    }

    /// The value of a parameter, outside any graph: its own memory where it has some, a copy where it lies in a file.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.params.get(name).and_then(|p| p.here(name).ok()?.tensor().ok())
    }

    /// A parameter for a graph that candle tapes: its leaf where its group learns, else a value outside any graph.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn taped(&self, name: &str) -> Result<Tensor> {
        let param = self.params.get(name).ok_or_else(|| unknown(name))?;
        match param.here(name)? {
            Stored::Leaf(leaf) if self.learns(param.group) => Ok(leaf.as_tensor().clone()),
            value => value.tensor(),
        }
    }

    /// The values of a parameter, borrowed as they are stored.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn values(&self, name: &str) -> Result<Held<'_>> {
        let param = self.params.get(name).ok_or_else(|| unknown(name))?;
        Held::of(name, param.here(name)?)
    }

    /// A parameter's own memory: nothing is copied, and it outlives the store.
    ///
    /// # Errors
    /// When there is none of this name.
    ///
    /// # Safety
    /// While a [`Shared`] lives, nobody writes the parameter in place: no optimiser step, wherever it is made, no [`ParamStore::set`].
    /// Replacing and removing it are no writes.
    pub unsafe fn share(&self, name: &str) -> Result<Shared> {
        let param = self.params.get(name).ok_or_else(|| unknown(name))?;
        // SAFETY: the caller's promise.
        unsafe { Shared::of(name, param.here(name)?) }
    }

    /// Says that a parameter's values were written in place: the optimiser does.
    pub(crate) fn written(&self, name: &str) {
        if let Some(param) = self.params.get(name) {
            param.version.renew();
        }
    }

    /// A number that changes whenever the values of this name do, and that values of other names never have; 0 where there is
    /// none of this name.
    #[cfg(feature = "cuda")]
    pub(crate) fn version(&self, name: &str) -> u64 {
        self.params.get(name).map_or(0, |param| param.version.now())
    }

    /// The newest values of a parameter lie on a GPU from here on, until they are asked for here; its version is another.
    #[cfg(feature = "cuda")]
    pub(crate) fn written_on(&self, name: &str, gpu: &Gpu) {
        if let Some(param) = self.params.get(name) {
            param.version.renew();
            *param.away.lock() = Some(gpu.clone());
        }
    }

    /// Do the newest values of a parameter lie among these, on a GPU?
    #[cfg(feature = "cuda")]
    pub(crate) fn is_away_on(&self, name: &str, parameters: &Parameters) -> bool {
        let away = self.params.get(name).map(|param| param.away.lock());
        away.is_some_and(|away| away.as_ref().is_some_and(|gpu| gpu.has(parameters)))
    }

    /// Brings the newest values of one parameter here, where it is not.
    pub(crate) fn bring(&self, name: &str) -> Result<()> {
        self.params.get(name).map_or(Ok(()), |param| param.here(name).map(drop))
    }

    /// Brings the newest values of all parameters here.
    ///
    /// # Errors
    /// What a GPU's driver says.
    pub fn bring_home(&self) -> Result<()> {
        self.params.iter().try_for_each(|(name, param)| param.here(name).map(drop))
    }

    /// Shape of a parameter.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.params.get(name).map(|p| p.value.shape())
    }

    /// Overwrites a value, keeping name and group; a leaf stays the same leaf.
    pub fn set(&mut self, name: &str, value: &Tensor) -> Result<()> {
        let param = self.params.get_mut(name).ok_or_else(|| unknown(name))?;
        if param.value.shape() != value.dims() {
            return Err(BaseError::Parameter {
                name: name.to_string(),
                message: format!("expected shape {:?}, got {:?}", param.value.shape(), value.dims()),
            });
        }
        match &param.value {
            Stored::Leaf(leaf) => {
                let value = value.to_dtype(leaf.dtype())?.contiguous()?;
                #[cfg(feature = "cuda")]
                drop(param.away.lock().take());
                let written = leaf.set(&value);
                param.version.renew();
                written?;
            }
            Stored::Mapped(mapped) => {
                let dtype = if mapped.narrow() { DType::BF16 } else { DType::F32 };
                param.value = Stored::Leaf(Var::from_tensor(&value.detach().to_dtype(dtype)?)?);
                param.version.renew();
            }
        }
        Ok(())
    }

    /// Names the groups that learn from here on; every other group is frozen. Returns how many values stored in bf16
    /// became f32 for it.
    pub fn set_learning(&mut self, groups: impl IntoIterator<Item = Group>) -> Result<usize> {
        let learning: BTreeSet<Group> = groups.into_iter().collect();
        let mut widened = 0;
        for param in self.params.values_mut() {
            if learning.contains(&param.group) && !param.value.can_learn() {
                let values = param.value.tensor()?;
                widened += if values.dtype() == DType::F32 { 0 } else { values.elem_count() };
                param.value = Stored::Leaf(Var::from_tensor(&values.to_dtype(DType::F32)?)?);
                param.version.renew();
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

    /// The parameters that learn, by name, as leaves with their newest values.
    ///
    /// # Errors
    /// When values lie on a GPU and do not come ([`ParamStore::bring_home`]).
    pub fn trainable(&self) -> Result<Vec<(String, Tensor)>> {
        let learning = self.params.iter().filter(|(_, param)| self.learns(param.group));
        learning.into_iter().try_for_each(|(name, param)| param.here(name).map(drop))?;
        Ok(self.leaves())
    }

    /// The same, of which newer values may lie on a GPU.
    pub(crate) fn leaves(&self) -> Vec<(String, Tensor)> {
        self.params
            .iter()
            .filter(|(_, p)| self.learning.contains(&p.group))
            .filter_map(|(name, p)| match &p.value {
                Stored::Leaf(leaf) => Some((name.clone(), leaf.as_tensor().clone())),
                // A group that learns has none of these.
                Stored::Mapped(_) => None,
            })
            .collect()
    }

    /// Number of values per group, in group order.
    pub fn count_by_group(&self) -> BTreeMap<Group, usize> {
        let mut counts = BTreeMap::new();
        for param in self.params.values() {
            *counts.entry(param.group).or_insert(0) += param.value.count();
        }
        counts
    }

    /// SHA-256 over the names and bytes of every parameter of a group: proof that a frozen group stayed as it was.
    pub fn group_hash(&self, group: Group) -> Result<String> {
        let mut hash = Sha256::new();
        for (name, param) in self.params.iter().filter(|(_, p)| p.group == group) {
            hash.update(name.as_bytes());
            match Held::of(name, param.here(name)?)?.weight() {
                Weight::F32(values) => values.iter().for_each(|value| hash.update(value.to_le_bytes())),
                Weight::Bf16(values) => values.iter().for_each(|value| hash.update(value.to_le_bytes())),
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
