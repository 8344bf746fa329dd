//! Several adapters beside one base: loading, switching, unloading, and merging the one in use into the weights.
//!
//! Source: PEFT's `load_adapter`, `set_adapter`, `delete_adapter`, `merge_adapter`, `unmerge_adapter`. The base is read
//! once. An adapter that is not in use lies beside the model: its LoRA factors, the embeddings and norms it brought or
//! trained, its positions, and its optimiser's state. Switching moves those in and out without a copy; of the base only
//! what the adapter in use replaces is read again (mapped, where it can stay in its file).
//!
//! The adapter that a session was opened with, and one that a phase begins, is called `default`, as in PEFT. What a phase
//! trains belongs to the adapter in use. An adapter trained since it was loaded and not exported is only unloaded by
//! force.
//!
//! Units: none. Errors: `Usage` for a name that is taken or that there is not, for anything during a phase or while LoRA
//! is merged, and where the base's own weights were trained (an adapter is one for the base as it was); nothing has
//! changed then.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use megacontext_base::adapter::read_adapter;
use megacontext_base::gradients::{Gradients, Optimizer};
use megacontext_base::lora::LoraConfig;
use megacontext_base::params::{Group, ParamStore, Parameter};
use megacontext_base::rope::{RopeScaling, SIGMA};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Loaded, Session};
use crate::error::{PluginError, Result};
use crate::jobs::{model_error, parse};

/// What the first adapter of a session is called.
pub(super) const DEFAULT: &str = "default";

/// An adapter that is not in use.
pub(super) struct Resident {
    lora: Option<LoraConfig>,
    scaling: RopeScaling,
    context_length: usize,
    /// LoRA factors, and tensors of the base as the adapter has them.
    parameters: Vec<(String, Parameter)>,
    optimizer: Option<Optimizer>,
    /// Trained since it was loaded or exported.
    unsaved: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Load {
    name: String,
    path: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Set {
    /// None for the base alone.
    name: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Unload {
    name: String,
    #[serde(default)]
    force: bool,
}

impl Session {
    /// Reads an adapter and keeps it beside the model, not in use: `{name, path}`.
    pub fn load_adapter(&self, params: Value) -> Result<Value> {
        let Load { name, path } = parse(params)?;
        let mut l = self.change("load_adapter")?;
        if name.is_empty() {
            return Err(PluginError::usage("load_adapter: name: expected a name, got an empty one"));
        }
        if l.adapters.contains_key(&name) || l.active.as_ref() == Some(&name) {
            return Err(PluginError::usage(format!(
                "load_adapter: name: expected one that is free, \"{name}\" is taken; unload it first"
            )));
        }
        let resident = l.read_resident(&path)?;
        l.adapters.insert(name, resident);
        Ok(l.adapters_json())
    }

    /// Puts another adapter in use, or none: `{name: "…" | null}`.
    pub fn set_adapter(&self, params: Value) -> Result<Value> {
        let Set { name } = parse(params)?;
        let mut l = self.overwrite("set_adapter")?;
        if name != l.active {
            if let Some(name) = name.as_ref().filter(|name| !l.adapters.contains_key(*name)) {
                return Err(l.unknown("set_adapter", name));
            }
            l.refuse_switch("set_adapter")?;
            l.put_aside()?;
            if let Some(name) = name {
                l.put_in_use(name)?;
            }
        }
        Ok(l.adapters_json())
    }

    /// Forgets an adapter: `{name, force}`. The one in use is taken off the model first.
    pub fn unload_adapter(&self, params: Value) -> Result<Value> {
        let Unload { name, force } = parse(params)?;
        let mut l = self.overwrite("unload_adapter")?;
        let in_use = l.active.as_ref() == Some(&name);
        let unsaved = match l.adapters.get(&name) {
            _ if in_use => l.unsaved.load(Ordering::Acquire),
            Some(resident) => resident.unsaved,
            None => return Err(l.unknown("unload_adapter", &name)),
        };
        if unsaved && !force {
            return Err(PluginError::usage(format!(
                "unload_adapter: \"{name}\" was trained and not exported since; export it, or say force to lose that"
            )));
        }
        if in_use {
            l.refuse_switch("unload_adapter")?;
            l.put_aside()?;
        }
        l.adapters.remove(&name);
        Ok(l.adapters_json())
    }

    /// Merges the LoRA in use into the weights; its factors stay. Reading calls then take one product instead of three.
    pub fn merge_adapter(&self) -> Result<Value> {
        let mut l = self.overwrite("merge_adapter")?;
        l.refuse_phase("merge_adapter")?;
        let merged = l.decoder.merge_adapter().map_err(model_error)?;
        Ok(json!({ "adapter": l.active, "merged": merged }))
    }

    /// Takes it out again: every weight is, to the bit, what it was before.
    pub fn unmerge_adapter(&self) -> Result<Value> {
        let mut l = self.overwrite("unmerge_adapter")?;
        let unmerged = l.decoder.unmerge_adapter().map_err(model_error)?;
        Ok(json!({ "adapter": l.active, "unmerged": unmerged }))
    }
}

impl Loaded {
    /// The adapters there are, for `describe` and as the answer of the calls above.
    pub(super) fn adapters_json(&self) -> Value {
        let mut names: Vec<&String> = self.adapters.keys().chain(&self.active).collect();
        names.sort();
        json!({ "active": self.active, "adapters": names })
    }

    /// A name for an adapter that a phase begins.
    pub(super) fn free_name(&self) -> String {
        let numbered = (2..).map(|n| format!("{DEFAULT}-{n}"));
        let mut names = std::iter::once(DEFAULT.to_string()).chain(numbered);
        names.find(|name| !self.adapters.contains_key(name)).unwrap_or_default()
    }

    /// Refuses `call` while LoRA is merged into the weights.
    pub(super) fn refuse_merged(&self, call: &str) -> Result<()> {
        if self.decoder.is_merged() {
            return Err(PluginError::usage(format!(
                "{call}: LoRA is merged into the weights; unmerge it first (unmerge_adapter)"
            )));
        }
        Ok(())
    }

    fn refuse_phase(&self, call: &str) -> Result<()> {
        match &self.phase {
            None => Ok(()),
            Some(phase) => Err(PluginError::usage(format!(
                "{call}: a phase over {:?} is open and its parameters are learning; leave it first",
                phase.groups
            ))),
        }
    }

    /// Refuses to take what is on the model off it.
    fn refuse_switch(&self, call: &str) -> Result<()> {
        self.refuse_phase(call)?;
        self.refuse_merged(call)?;
        if self.decoder.config().tie_word_embeddings != self.model.config.tie_word_embeddings {
            return Err(PluginError::usage(format!(
                "{call}: the adapter that the session was opened with gave this tied model a head of its own, which cannot \
                 be taken off; open a session without it"
            )));
        }
        let head = self.decoder.config().untied_head_name();
        for name in self.changed.iter().filter(|name| name.as_str() != head) {
            if self.decoder.config().group_of(name) == Group::Base && self.differs(name)? {
                return Err(PluginError::usage(format!(
                    "{call}: the base's own weights were trained, {name} is no longer as in {}; adapters belong to the \
                     base as it was",
                    self.dir.display()
                )));
            }
        }
        Ok(())
    }

    fn unknown(&self, call: &str, name: &str) -> PluginError {
        let known = &self.adapters_json()["adapters"];
        PluginError::usage(format!("{call}: name: expected one of {known}, got \"{name}\""))
    }

    /// An adapter's folder, checked against the base.
    fn read_resident(&self, path: &Path) -> Result<Resident> {
        let adapter = read_adapter(path).map_err(model_error)?;
        let config = &self.model.config;
        if adapter.unties(config).map_err(model_error)? {
            return Err(PluginError::adapter(format!(
                "{}: gives this tied model a head of its own, which cannot be switched on and off; merge it into a model \
                 folder (mclora merge) and open that",
                path.display()
            )));
        }
        let weights = &self.model.weights;
        adapter.check_against(config, &weights.fingerprint()).map_err(model_error)?;
        // Against the file: in memory another adapter's values may stand.
        let of_base = |name: &str| weights.values::<f32>(name, weights.shape(name).unwrap_or(&[]));
        adapter.check_copies(config, of_base).map_err(model_error)?;
        let mut store = ParamStore::new();
        adapter.put_into(config, &mut store).map_err(model_error)?;
        let names: Vec<String> = store.names().map(str::to_string).collect();
        let take = |name: String| Ok((name.clone(), store.take(&name).map_err(model_error)?));
        let parameters = names.into_iter().map(take).collect::<Result<_>>()?;
        let own = adapter.config.megacontext.as_ref();
        Ok(Resident {
            lora: Some(adapter.lora()),
            scaling: own.map_or(&config.rope_scaling, |own| &own.rope_scaling).clone(),
            context_length: own.map_or(config.context(), |own| own.context_length),
            parameters,
            optimizer: None,
            unsaved: false,
        })
    }

    /// Takes what is on the model off it: into the adapters beside it where that has a name. The base is left.
    fn put_aside(&mut self) -> Result<()> {
        self.bring_home()?;
        let own = self.decoder.config().tensors();
        let is_own = |name: &str| own.iter().any(|(known, _)| known == name);
        let params = self.decoder.params();
        let is_lora = |name: &str| matches!(params.group(name), Some(Group::Lora | Group::Sigma));
        let names: Vec<String> = params
            .names()
            .filter(|name| is_lora(name) || is_own(name) && self.changed.contains(*name))
            .map(str::to_string)
            .collect();
        let lora = self.decoder.lora().cloned();
        self.decoder.set_lora(None).map_err(model_error)?;
        let mut parameters = Vec::with_capacity(names.len());
        for name in names {
            let parameter = self.decoder.params_mut().take(&name).map_err(model_error)?;
            if is_own(&name) {
                self.decoder.reread(&self.model.weights, &name).map_err(model_error)?;
            }
            if let Some(scales) = self.model.config.sigma_scales().filter(|_| name == SIGMA) {
                let levels = scales.len();
                let params = self.decoder.params_mut();
                params.insert_values(SIGMA, Group::Sigma, scales, &[levels]).map_err(model_error)?;
            }
            self.changed.remove(&name);
            parameters.push((name, parameter));
        }
        let config = &self.model.config;
        let resident = Resident {
            lora,
            scaling: std::mem::replace(&mut self.scaling, config.rope_scaling.clone()),
            context_length: std::mem::replace(&mut self.context_length, config.context()),
            parameters,
            optimizer: self.optimizer.take(),
            unsaved: std::mem::take(self.unsaved.get_mut()),
        };
        self.gradients = Gradients::staying();
        if let Some(name) = self.active.take() {
            self.adapters.insert(name, resident);
        }
        Ok(())
    }

    /// Puts an adapter from beside the model, which is the bare base, on it.
    fn put_in_use(&mut self, name: String) -> Result<()> {
        let Some(resident) = self.adapters.remove(&name) else {
            return Err(self.unknown("set_adapter", &name));
        };
        self.changed.extend(resident.parameters.iter().map(|(name, _)| name.clone()));
        for (name, parameter) in resident.parameters {
            self.decoder.params_mut().put(name, parameter).map_err(model_error)?;
        }
        self.decoder.set_lora(resident.lora).map_err(model_error)?;
        self.scaling = resident.scaling;
        self.context_length = resident.context_length;
        self.optimizer = resident.optimizer;
        self.unsaved = AtomicBool::new(resident.unsaved);
        self.active = Some(name);
        Ok(())
    }
}
