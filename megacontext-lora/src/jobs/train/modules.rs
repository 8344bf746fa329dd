//! The modules of a run, their parameters in checkpoints, and the optimiser states of those that pause.
//!
//! A checkpoint holds what can learn of all modules (`gistnet/…`, `lensnet/…`, `model/…`) and the moments of the one that learns at
//! the moment. Moments of a module that pauses lie in `moments/<module>-<phase>.safetensors`, so that only one module's are in
//! memory; a phase that is rolled back leaves the file of the one before in force.
//!
//! Errors: `Io` with the path; a file that is not the one that was written.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use gistnet_adapter::GistNet;
use lensnet_adapter::LensNet;
use megacontext_base::decoder::Decoder;
use megacontext_base::error::BaseError;
use megacontext_base::gradients::{AdamWConfig, Optimizer};
use megacontext_base::params::{Group, ParamStore};
use serde::{Deserialize, Serialize};

use crate::error::{IoResultExt, PluginError, Result};
use crate::jobs::model_error;
use crate::run::checkpoint;
use crate::run::tensor_file::{Named, Stamp, read_tensors, write_tensors};

/// All that learns in a run at some time.
pub(super) struct Modules {
    pub decoder: Decoder,
    pub gistnet: GistNet,
    pub lensnet: LensNet,
}

/// A module's parameters in a file.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    module: &'static str,
    params: &'a ParamStore,
    groups: &'a [Group],
}

/// Of all modules; `model` are the base model's groups that JT3 trains.
pub(super) fn parts<'a>(
    decoder: &'a Decoder,
    gistnet: &'a GistNet,
    lensnet: &'a LensNet,
    model: &'a [Group],
) -> [Part<'a>; 3] {
    [
        Part { module: "gistnet", params: gistnet.params(), groups: &[Group::Gistnet] },
        Part { module: "lensnet", params: lensnet.params(), groups: &[Group::Lensnet] },
        Part { module: "model", params: decoder.params(), groups: model },
    ]
}

/// The module's word in files.
pub(super) fn word(module: Group) -> &'static str {
    match module {
        Group::Gistnet => "gistnet",
        Group::Lensnet => "lensnet",
        _ => "model",
    }
}

impl Modules {
    pub fn parts<'a>(&'a self, model: &'a [Group]) -> [Part<'a>; 3] {
        parts(&self.decoder, &self.gistnet, &self.lensnet, model)
    }

    /// By their words in files.
    pub fn stores(&self) -> [(&'static str, &ParamStore); 3] {
        parts(&self.decoder, &self.gistnet, &self.lensnet, &[]).map(|part| (part.module, part.params))
    }

    /// Puts back what a file holds of any module.
    pub fn put(&mut self, tensors: Vec<Named<'static>>) -> Result<()> {
        for tensor in tensors {
            let (module, name) = tensor.name.split_once('/').unwrap_or(("", &tensor.name));
            let params = match module {
                "gistnet" => self.gistnet.params_mut(),
                "lensnet" => self.lensnet.params_mut(),
                _ => self.decoder.params_mut(),
            };
            let (Some(group), Some(shape)) = (params.group(name), params.shape(name)) else {
                return Err(PluginError::data(format!(
                    "{}: expected a parameter of the run, got another",
                    tensor.name
                )));
            };
            if shape != tensor.shape {
                return Err(PluginError::data(format!(
                    "{}: expected shape {shape:?}, got {:?}",
                    tensor.name, tensor.shape
                )));
            }
            let values = tensor.values.into_owned();
            params.insert_values(name, group, values, &tensor.shape).map_err(model_error)?;
        }
        Ok(())
    }
}

/// Calls `f` with the tensors of some parts, borrowed.
pub(super) fn with_named<R>(parts: &[Part], f: impl FnOnce(&[Named]) -> Result<R>) -> Result<R> {
    let mut held = Vec::new();
    for part in parts {
        let in_groups =
            |name: &&str| part.params.group(name).is_some_and(|group| part.groups.contains(&group));
        for name in part.params.names().filter(in_groups) {
            let values = part.params.values(name).map_err(model_error)?;
            held.push((format!("{}/{name}", part.module), part.params.shape(name).unwrap_or(&[]), values));
        }
    }
    let named = held
        .iter()
        .map(|(name, shape, values)| {
            let values = Cow::Borrowed(values.f32()?);
            Ok(Named { name: name.clone(), shape: shape.to_vec(), values })
        })
        .collect::<std::result::Result<Vec<_>, BaseError>>()
        .map_err(model_error)?;
    f(&named)
}

/// A file of tensors in the run folder, and what it held when it was written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Stored {
    /// Its name in the run folder.
    pub file: String,
    stamp: Stamp,
}

impl Stored {
    /// Writes a file beside its place and renames it.
    pub fn write(run: &Path, file: String, tensors: &[Named]) -> Result<Self> {
        let path = run.join(&file);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).at(parent)?;
        }
        let building = path.with_extension("building");
        if building.exists() {
            fs::remove_file(&building).at(&building)?;
        }
        let stamp = write_tensors(&building, tensors)?;
        fs::rename(&building, &path).at(&path)?;
        Ok(Self { file, stamp })
    }

    /// Reads it.
    ///
    /// # Errors
    /// When it is not what was written.
    pub fn read(&self, run: &Path) -> Result<Vec<Named<'static>>> {
        let path = run.join(&self.file);
        read_tensors(&path, &self.stamp).map_err(|e| {
            PluginError::data(format!("{}: {e}; begin a new run in another folder", path.display()))
        })
    }
}

/// Optimiser states of modules, as files.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Moments {
    files: BTreeMap<String, Stored>,
}

impl Moments {
    /// Keeps a module's state after a phase.
    pub fn keep(&mut self, run: &Path, module: Group, phase: usize, optimizer: &Optimizer) -> Result<()> {
        let tensors = checkpoint::moments(Some(optimizer))?;
        let file = format!("moments/{}-{phase}.safetensors", word(module));
        let stored = Stored::write(run, file, &tensors)?;
        self.files.insert(word(module).to_string(), stored);
        Ok(())
    }

    /// A module's optimiser, as it was left.
    pub fn take_up(
        &self,
        run: &Path,
        module: Group,
        params: &ParamStore,
        adamw: AdamWConfig,
    ) -> Result<Optimizer> {
        let mut optimizer = Optimizer::new(adamw);
        if let Some(stored) = self.files.get(word(module)) {
            let moments = stored.read(run)?.into_iter().map(|m| (m.name, m.values.into_owned()));
            optimizer.import(params, moments).map_err(model_error)?;
        }
        Ok(optimizer)
    }

    /// Forgets all, for a pass that begins from the warm start again.
    pub fn only(&mut self, kept: &Self) {
        self.files = kept.files.clone();
    }

    /// Removes files of moments that neither this nor the state before it speaks of.
    pub fn tidy(&self, run: &Path, others: &[&Self]) -> Result<()> {
        let folder = run.join("moments");
        if !folder.is_dir() {
            return Ok(());
        }
        let known: Vec<PathBuf> = others
            .iter()
            .flat_map(|other| other.files.values())
            .chain(self.files.values())
            .map(|stored| run.join(&stored.file))
            .collect();
        for entry in fs::read_dir(&folder).at(&folder)? {
            let path = entry.at(&folder)?.path();
            if !known.contains(&path) {
                fs::remove_file(&path).at(&path)?;
            }
        }
        Ok(())
    }
}
