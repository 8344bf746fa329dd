//! Parameters in a GPU's memory: copies of the host's, made when a pass first needs them and again when they have changed.
//!
//! A copy is known by the parameter's name and the storage that it has here. Whether it still holds is asked of
//! [`ParamStore::version`]; a copy of what learns is written anew after every step of the optimiser, into the same memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use megacontext_kernels::cuda::cudarc::driver::CudaSlice;
use megacontext_kernels::cuda::{Device, rows};
use megacontext_kernels::linear::Weight;
use megacontext_kernels::store::bf16;

use super::buffer::Product;
use crate::buffers::gpu::PIECE;
use crate::error::{BaseError, Result};
use crate::params::ParamStore;

/// What a copy holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Form {
    /// The values.
    Values,
    /// One more than the values, for norms that store their gain so.
    OnePlus,
}

/// A copy, and of which values.
pub(crate) struct Copy<P> {
    version: u64,
    values: Arc<CudaSlice<P>>,
}

pub(crate) type Copies<P> = Mutex<BTreeMap<(String, Form), Copy<P>>>;

/// DoRA's c = m/n and n of a layer, and the versions of what they were made of.
pub(crate) type Scales = Arc<[CudaSlice<f32>; 2]>;

/// Copies of parameters, by name and storage.
#[derive(Default)]
pub(crate) struct Parameters {
    f32: Copies<f32>,
    bf16: Copies<bf16>,
    scales: Mutex<BTreeMap<String, ([u64; 4], Scales)>>,
}

/// A storage that copies may have.
pub(crate) trait Copied: Product {
    /// The copies that have it.
    fn copies(all: &Parameters) -> &Copies<Self>;
}

impl Copied for f32 {
    fn copies(all: &Parameters) -> &Copies<Self> {
        &all.f32
    }
}

impl Copied for bf16 {
    fn copies(all: &Parameters) -> &Copies<Self> {
        &all.bf16
    }
}

impl Parameters {
    /// The parameter `name`, stored as P.
    ///
    /// # Errors
    /// When there is none of this name, or no memory.
    pub fn values<P: Copied>(
        &self,
        device: &Device,
        params: &ParamStore,
        name: &str,
    ) -> Result<Arc<CudaSlice<P>>> {
        let version = params.version(name);
        if let Some(held) = self.held::<P>(name, version) {
            return Ok(held);
        }
        // Asked before a map is locked: who brings a parameter home looks in here while nobody else may ask for it.
        let newest = if params.is_away_on(name, self) { self.held::<f32>(name, version) } else { None };
        if let Some(newest) = newest {
            return self.copy(version, (name, Form::Values), |into| converted(device, &newest, into));
        }
        let here = params.values(name)?;
        self.copy(version, (name, Form::Values), |into| match here.weight() {
            Weight::F32(values) => upload(device, values, into),
            Weight::Bf16(values) => upload(device, values, into),
        })
    }

    /// The copy of a version, where there is one.
    pub fn held<P: Copied>(&self, name: &str, version: u64) -> Option<Arc<CudaSlice<P>>> {
        let copies = P::copies(self).lock().unwrap_or_else(PoisonError::into_inner);
        let copy = copies.get(&(name.to_string(), Form::Values));
        copy.filter(|copy| copy.version == version).map(|copy| copy.values.clone())
    }

    /// Lets go of a copy in f32 beside which there is one in 16 bits: it was there for steps of the optimiser.
    pub fn let_go_of_wide(&self, name: &str) {
        let key = (name.to_string(), Form::Values);
        let narrow = self.bf16.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&key);
        if narrow {
            self.f32.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        }
    }

    /// Takes the copy in f32 out, to be written.
    ///
    /// # Errors
    /// As [`Parameters::values`].
    pub fn take_f32(&self, device: &Device, params: &ParamStore, name: &str) -> Result<CudaSlice<f32>> {
        let (version, values) = (params.version(name), self.values::<f32>(device, params, name)?);
        let mut copies = self.f32.lock().unwrap_or_else(PoisonError::into_inner);
        copies.remove(&(name.to_string(), Form::Values));
        drop(copies);
        let read = match Arc::try_unwrap(values) {
            Ok(values) => return Ok(values),
            Err(read) => read,
        };
        // Somebody still reads these.
        let copied = device.room(read.len()).map_err(BaseError::from).and_then(|mut values| {
            rows::convert(device, &*read, &mut values)?;
            Ok(values)
        });
        if copied.is_err() {
            // They may be the only newest ones.
            let copy = Copy { version, values: read };
            let mut copies = self.f32.lock().unwrap_or_else(PoisonError::into_inner);
            copies.insert((name.to_string(), Form::Values), copy);
        }
        copied
    }

    /// Puts the copy in f32 of a version back.
    pub fn put_f32(&self, name: &str, version: u64, values: CudaSlice<f32>) {
        let mut copies = self.f32.lock().unwrap_or_else(PoisonError::into_inner);
        copies.insert((name.to_string(), Form::Values), Copy { version, values: Arc::new(values) });
    }

    /// One more than the parameter `name`.
    ///
    /// # Errors
    /// As [`Parameters::values`].
    pub fn one_plus(&self, device: &Device, params: &ParamStore, name: &str) -> Result<Arc<CudaSlice<f32>>> {
        let held = params.values(name)?;
        self.copy(params.version(name), (name, Form::OnePlus), |into| {
            let values: Vec<f32> = held.f32()?.iter().map(|value| 1.0 + value).collect();
            upload(device, &values, into)
        })
    }

    /// As many ones.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn ones(&self, device: &Device, count: usize) -> Result<Arc<CudaSlice<f32>>> {
        // No parameter has a name with a space in it.
        let name = format!("{count} ones");
        self.copy(0, (&name, Form::Values), |into| upload(device, &vec![1f32; count], into))
    }

    /// DoRA's scales of the layer `name`; `make` finds them where there are none of these versions.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn scales(
        &self,
        name: &str,
        versions: [u64; 4],
        make: impl FnOnce() -> Result<[CudaSlice<f32>; 2]>,
    ) -> Result<Scales> {
        let mut all = self.scales.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, scales)) = all.get(name).filter(|(of, _)| *of == versions) {
            return Ok(scales.clone());
        }
        let scales = Arc::new(make()?);
        all.insert(name.to_string(), (versions, scales.clone()));
        Ok(scales)
    }

    /// The copy of this name and form; `upload` makes it where there is none of this version.
    fn copy<P: Copied>(
        &self,
        version: u64,
        (name, form): (&str, Form),
        upload: impl FnOnce(Option<CudaSlice<P>>) -> Result<CudaSlice<P>>,
    ) -> Result<Arc<CudaSlice<P>>> {
        let key = (name.to_string(), form);
        let mut copies = P::copies(self).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(copy) = copies.get(&key).filter(|copy| copy.version == version) {
            return Ok(copy.values.clone());
        }
        // Taken out first: where the upload fails, no copy is left that is not what it says.
        let before = copies.remove(&key).and_then(|copy| Arc::into_inner(copy.values));
        let values = Arc::new(upload(before)?);
        copies.insert(key, Copy { version, values: values.clone() });
        Ok(values)
    }
}

/// Values of the device stored as P.
fn converted<P: Product>(
    device: &Device,
    values: &CudaSlice<f32>,
    before: Option<CudaSlice<P>>,
) -> Result<CudaSlice<P>> {
    let mut into = match before.filter(|before| before.len() == values.len()) {
        Some(before) => before,
        None => device.room(values.len())?,
    };
    rows::convert(device, values, &mut into)?;
    Ok(into)
}

/// `values` on the device, stored as P.
fn upload<A: Product, P: Product>(
    device: &Device,
    values: &[A],
    before: Option<CudaSlice<P>>,
) -> Result<CudaSlice<P>> {
    if A::KIND == P::KIND {
        // Let go first, so that both are never there.
        drop(before);
        return Ok(device.upload(bytemuck::cast_slice::<A, P>(values))?);
    }
    let mut into = match before.filter(|before| before.len() == values.len()) {
        Some(before) => before,
        None => device.room(values.len())?,
    };
    for (at, piece) in values.chunks(PIECE).enumerate() {
        let uploaded = device.upload(piece)?;
        let first = at * PIECE;
        rows::convert(device, &uploaded, &mut into.slice_mut(first..first + piece.len()))?;
    }
    Ok(into)
}
