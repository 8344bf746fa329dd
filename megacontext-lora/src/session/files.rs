//! What a session writes and takes up again: checkpoints and the adapter.
//!
//! A checkpoint holds everything that is not as the base folder has it, whichever phase made it so, and what learns now;
//! so a session opened on the same base is, after resuming, the one that saved. Layout: [`crate::run::checkpoint`]. Its
//! `state.json` is ours: `config_hash`, `steps`, `begun_at`, `groups`, `seed`.
//!
//! A folder holds the newest checkpoint of one session and nothing of anybody else's: others are never overwritten.
//!
//! Errors: `Usage` for a folder that is somebody else's and for what cannot be written so; `Data` for a checkpoint that
//! does not fit; nothing has changed then.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::Ordering;

use candle_core::Tensor;
use megacontext_base::params::Group;
use megacontext_base::rope::SIGMA;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Session;
use crate::error::{IoResultExt, PluginError, Result};
use crate::jobs::{model_error, save_adapter, to_value};
use crate::run::checkpoint::{self, Named};
use crate::run::folder::{CONFIG, expect_run};
use crate::run::metrics::METRICS;

/// The folder and the file of the checkpoint's layout that are looked at before one is written.
const CHECKPOINTS: &str = "checkpoints";
const STATE: &str = "state.json";

/// What of a checkpoint's state is taken up.
#[derive(Deserialize)]
struct Saved {
    begun_at: u64,
    groups: Vec<Group>,
    seed: u64,
}

impl Session {
    /// Writes a checkpoint into `dir`, in the place of this session's earlier ones there.
    ///
    /// # Errors
    /// `Usage` where `dir` is a run's folder, or holds checkpoints of another configuration or of a later step.
    pub fn save(&self, dir: &Path) -> Result<Value> {
        // No other call may write into the same folder meanwhile.
        let l = self.change("save")?;
        let Some(phase) = &l.phase else {
            return Err(PluginError::usage("save: enter a phase first; outside one nothing learns"));
        };
        let identity = l.identity()?;
        refuse_runs(dir)?;
        refuse_others(dir, &identity, l.steps)?;
        let params = l.decoder.params();
        let mut names = Vec::new();
        for name in params.names() {
            if params.learns(l.model.config.group_of(name)) || l.differs(name)? {
                names.push(name);
            }
        }
        let state = json!({
            "config_hash": identity,
            "steps": l.steps,
            "begun_at": phase.begun_at,
            "groups": phase.groups,
            "seed": phase.seed,
        });
        let optimizer = l.optimizer.as_ref();
        let path = checkpoint::save_parameters(dir, l.steps, &state, params, &names, optimizer, 1)?;
        Ok(json!({ "path": path, "step": l.steps }))
    }

    /// Takes up the newest checkpoint in `dir`, made in a phase over the same groups: every parameter, the optimiser's
    /// moments, the count of steps, where the phase began and its seed. The optimiser's settings and the length of the
    /// phase stay those that this one was entered with; a roll-back goes back to before it was entered here.
    pub fn resume(&self, dir: &Path) -> Result<Value> {
        let mut l = self.overwrite("resume")?;
        let l = &mut *l;
        let Some(phase) = &l.phase else {
            return Err(PluginError::usage("resume: enter the phase first, with the groups that were saved"));
        };
        let mut warnings = Vec::new();
        let loaded =
            checkpoint::load_latest(dir, &l.identity()?, &mut |w| warnings.push(w))?.ok_or_else(|| {
                PluginError::data(format!("{}: expected a checkpoint, found none", dir.display()))
            })?;
        let data = |message: String| PluginError::data(format!("{}: {message}", loaded.path.display()));
        let saved: Saved = serde_json::from_value(loaded.state).map_err(|e| data(format!("{STATE}: {e}")))?;
        if saved.groups != phase.groups {
            return Err(PluginError::usage(format!(
                "{}: expected a checkpoint of a phase over {:?}, got one over {:?}",
                loaded.path.display(),
                phase.groups,
                saved.groups
            )));
        }
        if saved.begun_at > loaded.step {
            return Err(data(format!(
                "{STATE}: expected a phase begun by step {}, got {}",
                loaded.step, saved.begun_at
            )));
        }
        let params = l.decoder.params();
        let mut values = loaded.tensors;
        for Named { name, shape, .. } in &values {
            let expected = params.shape(name).ok_or_else(|| data(format!("the model has no {name}")))?;
            if expected != shape {
                return Err(data(format!("{name}: expected shape {expected:?}, got {shape:?}")));
            }
        }
        for name in params.names() {
            if values.iter().any(|v| v.name == name) {
                continue;
            }
            let group = l.model.config.group_of(name);
            if group == Group::Lora || params.learns(group) {
                return Err(data(format!("parameter {name} is not in it")));
            }
            // Saved by a session in which this was as in the base.
            if l.differs(name)? {
                let shape = params.shape(name).unwrap_or(&[]).to_vec();
                values.push(Named { name: name.to_string(), shape, values: l.base_values(name)?.into() });
            }
        }
        params.bring_home().map_err(model_error)?;
        let mut kept = Vec::new();
        for Named { name, .. } in &values {
            let known = phase.before.parameters.iter().any(|(n, _)| n == name);
            let fresh = phase.before.lora_attached && l.model.config.group_of(name) == Group::Lora;
            if let Some(now) = params.get(name).filter(|_| !known && !fresh) {
                kept.push((name.clone(), now.copy()?));
            }
        }

        // The optimiser checks its part before it changes; the rest has been checked above.
        if let Some(optimizer) = &mut l.optimizer {
            let moments = loaded.optim.into_iter().map(|m| (m.name, m.values.into_owned()));
            optimizer.import(l.decoder.params(), moments).map_err(model_error)?;
        }
        for Named { name, shape, values } in values {
            let group = l.model.config.group_of(&name);
            let params = l.decoder.params_mut();
            params.insert_values(name.as_str(), group, values.into_owned(), &shape).map_err(model_error)?;
            l.changed.insert(name);
        }
        l.steps = loaded.step;
        *l.unsaved.get_mut() = true;
        if let Some(phase) = &mut l.phase {
            phase.before.parameters.extend(kept);
            phase.begun_at = saved.begun_at;
            phase.seed = saved.seed;
        }
        Ok(json!({ "path": loaded.path, "step": loaded.step, "warnings": warnings }))
    }

    /// Writes the adapter as it stands, in PEFT's format.
    ///
    /// # Errors
    /// `Usage` without LoRA, and where the base's own weights have been trained: an adapter cannot carry those.
    pub fn export(&self, dir: &Path) -> Result<Value> {
        let l = self.look("export")?;
        l.refuse_merged("export")?;
        if l.decoder.lora().is_none() {
            return Err(PluginError::usage("export: the model carries no LoRA to write"));
        }
        let params = l.decoder.params();
        params.bring_home().map_err(model_error)?;
        // The model's own configuration: an adapter may have given it a head of its own.
        let base = l.decoder.config();
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        for name in params.names() {
            if !l.differs(name)? {
                continue;
            }
            // The scales of sigma are a line of adapter_config.json.
            let Some(tensor) = params.get(name).filter(|_| name != SIGMA) else { continue };
            if base.group_of(name) == Group::Base && name != base.untied_head_name() {
                return Err(PluginError::usage(format!(
                    "export: the base's own weights were trained, {name} is no longer as in {}; an adapter cannot carry \
                     that",
                    l.dir.display()
                )));
            }
            tensors.push((name.to_string(), tensor));
        }
        let written = save_adapter(dir, &l.model, &l.dir, &l.decoder, tensors, &l.scaling, l.context_length)?;
        l.unsaved.store(false, Ordering::Release);
        to_value(json!({ "path": dir, "tensors": written }))
    }
}

/// A run has its own checkpoints under the same name.
fn refuse_runs(dir: &Path) -> Result<()> {
    let found = [CONFIG, METRICS].into_iter().any(|name| dir.join(name).exists());
    if found || expect_run(dir).is_ok() {
        return Err(PluginError::usage(format!(
            "{}: expected a folder for a session's checkpoints, got a run's; choose another",
            dir.display()
        )));
    }
    Ok(())
}

/// Refuses a folder in which a checkpoint would be written over that is not an earlier one of ours.
fn refuse_others(dir: &Path, identity: &str, step: u64) -> Result<()> {
    let parent = dir.join(CHECKPOINTS);
    let entries = match std::fs::read_dir(&parent) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.at(&parent)?,
    };
    let mut later = false;
    for entry in entries {
        let entry = entry.at(&parent)?;
        let Some(found) = entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok()) else {
            continue;
        };
        later |= found > step;
        // A state that cannot be read makes a damaged checkpoint, and those do not count.
        let state = std::fs::read(entry.path().join(STATE)).unwrap_or_default();
        let state: Value = serde_json::from_slice(&state).unwrap_or_default();
        if let Some(hash) = state["config_hash"].as_str().filter(|hash| *hash != identity) {
            return Err(PluginError::usage(format!(
                "{}: expected checkpoints of this configuration ({identity}), got one of another ({hash}); choose \
                 another folder",
                entry.path().display()
            )));
        }
    }
    // Only a whole one counts, and finding that out means reading it.
    if later
        && let Some(newest) = checkpoint::load_latest(dir, identity, &mut |_| {})?
        && newest.step > step
    {
        return Err(PluginError::usage(format!(
            "{}: expected checkpoints up to step {step}, got one of step {}; resume from it or choose another folder",
            dir.display(),
            newest.step
        )));
    }
    Ok(())
}
