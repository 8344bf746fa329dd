//! Beginning a run, or taking an interrupted one up: its state, its logs, and the checkpoint that it goes on from.
//!
//! Everything that a run depends on beside its settings is held against what it began with before anything is written. Units:
//! none. Errors: a checkpoint of other settings, weights, text or networks; files that cannot be read or written.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{PluginError, Result};
use crate::jobs::evaluation::Inputs;
use crate::run::Telemetry;
use crate::run::checkpoint::{Loaded, load_latest};
use crate::run::folder::{CONFIG, RunFolder, config_toml};

/// What a checkpoint of a run knows besides tensors.
pub(crate) trait Resumable: DeserializeOwned {
    /// Hash of the settings that the result depends on.
    fn config_hash(&self) -> &str;

    /// Weights and text.
    fn inputs(&self) -> &Inputs;

    /// Hashes of what else was given: an adapter, networks.
    fn began_with(&self) -> &[String] {
        &[]
    }

    /// Lines of the metrics.
    fn metric_lines(&self) -> u64;
}

/// A run that can go on.
pub(crate) struct Begun<S> {
    pub state: S,
    pub telemetry: Telemetry,
    /// What it goes on from; none for a fresh one.
    pub loaded: Option<Loaded>,
    /// What the user should know of it.
    pub warnings: Vec<String>,
}

/// Begins in `folder` with the state `fresh`, or goes on from the newest checkpoint there, where there is one and `resume` says
/// so. `given` names what [`Resumable::began_with`] is about, in the error where it is another.
///
/// # Errors
/// See the module.
pub(crate) fn begin<S: Resumable>(
    folder: &RunFolder,
    config: &impl Serialize,
    fresh: S,
    resume: bool,
    given: &str,
) -> Result<Begun<S>> {
    let toml = config_toml(config)?;
    let mut warnings = Vec::new();
    let mut loaded = None;
    if resume {
        loaded = load_latest(folder.path(), fresh.config_hash(), &mut |w| warnings.push(w))?;
    }
    let Some(found) = &loaded else {
        folder.write(CONFIG, toml.as_bytes())?;
        return Ok(Begun { state: fresh, telemetry: Telemetry::create(folder, &toml)?, loaded, warnings });
    };
    let state: S = serde_json::from_value(found.state.clone())
        .map_err(|e| PluginError::data(format!("{}: state.json: {e}", found.path.display())))?;
    warnings.extend(state.inputs().check(fresh.inputs())?);
    if state.began_with() != fresh.began_with() {
        return Err(PluginError::usage(format!(
            "resume: {given}: expected what the run began with, got another; name the same, or begin a new run in another folder"
        )));
    }
    let telemetry = Telemetry::resume(folder, &toml, state.metric_lines(), &mut |w| warnings.push(w))?;
    Ok(Begun { state, telemetry, loaded, warnings })
}
