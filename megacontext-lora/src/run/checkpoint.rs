//! Checkpoints that survive `kill -9`, and the choice of the one to resume from.
//!
//! `checkpoints/<step, 8 digits>/` holds
//! - `trainable.safetensors`: what learns, f32, by parameter name;
//! - `optimizer.safetensors`: `exp_avg.<name>`, `exp_avg_sq.<name>`;
//! - `state.json`: the trainer's own JSON (position in the data, random state, configuration hash, …), as given;
//! - `manifest.json`: format version, step, stage, seed, size and SHA-256 of every other file, and its own digest.
//!
//! It is built as a hidden sibling and renamed ([`megacontext_base::atomic`]). So a folder with a step's name is whole or was damaged later, and damage shows: by a
//! size, a digest, a file that is missing, a manifest that ends early. Resuming takes the newest whole one.
//!
//! The same tensors and state give the same bytes. Only one process may write a run ([`super::folder::RunFolder`] holds
//! the lock); what a killed one left half-written is removed here.
//!
//! Errors: `Io` with the path when the system refuses: nothing half-written stays and older checkpoints are untouched;
//! `Usage` when the configuration is not the one the run began with. Damage is no error but a warning.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use megacontext_base::atomic::{AtomicDir, is_leftover, previous};
use megacontext_base::error::BaseError;
use megacontext_base::gradients::Optimizer;
use megacontext_base::params::ParamStore;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use super::tensor_file::Named;
use super::tensor_file::{Stamp, read_stamped, read_tensors, write_bytes, write_tensors};
use crate::error::{IoResultExt, PluginError, Result};
use crate::jobs::model_error;

/// The layout described above.
pub const FORMAT_VERSION: u32 = 1;

const FOLDER: &str = "checkpoints";
const MANIFEST: &str = "manifest.json";
const TRAINABLE: &str = "trainable.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format_version: u32,
    step: u64,
    stage: Value,
    seed: Value,
    files: BTreeMap<String, Stamp>,
    /// SHA-256 of this manifest's JSON with an empty digest.
    digest: String,
}

impl Manifest {
    fn json(&self) -> Result<Vec<u8>> {
        let mut bytes =
            serde_json::to_vec_pretty(self).map_err(|e| PluginError::internal(format!("manifest: {e}")))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    fn sealed(mut self) -> Result<Self> {
        self.digest = String::new();
        self.digest = Stamp::of(&self.json()?).sha256;
        Ok(self)
    }
}

/// A checkpoint read back.
#[derive(Debug)]
pub struct Loaded {
    /// Its folder.
    pub path: PathBuf,
    /// Optimiser steps done when it was written.
    pub step: u64,
    /// The trainer's JSON, as given to [`save`].
    pub state: Value,
    /// What learns, in the order of the names.
    pub tensors: Vec<Named<'static>>,
    /// `exp_avg.<name>` and `exp_avg_sq.<name>`, in the order of the names.
    pub optim: Vec<Named<'static>>,
}

/// Writes the checkpoint of `step` and keeps the `keep` newest (at least this one). Returns its folder.
///
/// `state` must hold the text `config_hash`; `stage` and `seed`, where it has them, are repeated in the manifest. A
/// checkpoint of the same step is replaced. Later steps than this one can only be damaged ones that [`load_latest`]
/// passed over: they are removed.
pub fn save(
    run_dir: &Path,
    step: u64,
    state: &Value,
    tensors: &[Named],
    optim: &[Named],
    keep: usize,
) -> Result<PathBuf> {
    write(run_dir, step, state, tensors, optim, keep)
        .map_err(|e| e.context(format!("writing the checkpoint of step {step}")))
}

/// [`save`] of the named parameters as they stand, and of an optimiser's moments, without copying either.
///
/// # Errors
/// As [`save`], and when a parameter is not stored in f32: only those hold more than the base's folder does.
pub fn save_parameters(
    run_dir: &Path,
    step: u64,
    state: &Value,
    params: &ParamStore,
    names: &[&str],
    optimizer: Option<&Optimizer>,
    keep: usize,
) -> Result<PathBuf> {
    let held = names
        .iter()
        .map(|name| Ok((*name, params.shape(name).unwrap_or(&[]), params.values(name)?)))
        .collect::<std::result::Result<Vec<_>, BaseError>>()
        .map_err(model_error)?;
    let mut tensors = Vec::with_capacity(held.len());
    for (name, shape, values) in &held {
        let values = Cow::Borrowed(values.f32().map_err(model_error)?);
        tensors.push(Named { name: (*name).to_string(), shape: shape.to_vec(), values });
    }
    save(run_dir, step, state, &tensors, &moments(optimizer)?, keep)
}

/// The moments of an optimiser, where there is one, as tensors of a file.
pub fn moments(optimizer: Option<&Optimizer>) -> Result<Vec<Named<'_>>> {
    let Some(optimizer) = optimizer else { return Ok(Vec::new()) };
    let moments = optimizer.moments().map_err(model_error)?;
    Ok(moments.into_iter().map(|(name, values)| Named::flat(name, values)).collect())
}

/// Puts the tensors of a checkpoint into the parameters that learn, and the moments into their optimiser.
///
/// # Errors
/// When a parameter is missing or has another shape.
pub fn restore_parameters(
    tensors: Vec<Named<'static>>,
    optim: Vec<Named<'static>>,
    params: &mut ParamStore,
    optimizer: &mut Optimizer,
) -> Result<()> {
    let mut held: BTreeMap<String, Named> =
        tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
    for (name, leaf) in params.trainable().map_err(model_error)? {
        let tensor = held.remove(&name).ok_or_else(|| {
            PluginError::data(format!("checkpoint: expected parameter {name}, which is not in it"))
        })?;
        if tensor.shape != leaf.dims() {
            return Err(PluginError::data(format!(
                "checkpoint: {name}: expected shape {:?}, got {:?}",
                leaf.dims(),
                tensor.shape
            )));
        }
        let Some(group) = params.group(&name) else { continue };
        let values = tensor.values.into_owned();
        params.insert_values(name, group, values, &tensor.shape).map_err(model_error)?;
    }
    let moments = optim.into_iter().map(|m| (m.name, m.values.into_owned()));
    optimizer.import(params, moments).map_err(model_error)
}

fn write(
    run_dir: &Path,
    step: u64,
    state: &Value,
    tensors: &[Named],
    optim: &[Named],
    keep: usize,
) -> Result<PathBuf> {
    if !state["config_hash"].is_string() {
        return Err(PluginError::internal("the state to save has no config_hash"));
    }
    let parent = run_dir.join(FOLDER);
    fs::create_dir_all(&parent).at(&parent)?;
    let target = parent.join(folder_name(step));
    // Dropped on every early return: removes what was written so far.
    let building = AtomicDir::new(&target).map_err(model_error)?;
    let mut files = BTreeMap::new();
    files.insert(TRAINABLE.to_owned(), write_tensors(&building.path().join(TRAINABLE), tensors)?);
    files.insert(OPTIMIZER.to_owned(), write_tensors(&building.path().join(OPTIMIZER), optim)?);
    let text = serde_json::to_vec_pretty(state).map_err(|e| PluginError::internal(format!("state: {e}")))?;
    files.insert(STATE.to_owned(), write_bytes(&building.path().join(STATE), &text)?);
    let manifest = Manifest {
        format_version: FORMAT_VERSION,
        step,
        stage: state["stage"].clone(),
        seed: state["seed"].clone(),
        files,
        digest: String::new(),
    };
    write_bytes(&building.path().join(MANIFEST), &manifest.sealed()?.json()?)?;
    building.commit().map_err(model_error)?;
    prune(&parent, step, keep)?;
    Ok(target)
}

/// The newest whole checkpoint of the run, or nothing when there is none.
///
/// Each damaged one that was passed over is told to `warn` with the reason; hidden leftovers of a killed process are
/// removed. A whole checkpoint of another configuration is a `Usage` error.
pub fn load_latest(
    run_dir: &Path,
    expected_config_hash: &str,
    warn: &mut dyn FnMut(String),
) -> Result<Option<Loaded>> {
    let parent = run_dir.join(FOLDER);
    for (_, hidden) in list(&parent, |name| is_leftover(name).then_some(()))? {
        remove(&hidden)?;
    }
    let mut steps = list(&parent, step_of)?;
    steps.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    for (step, path) in steps {
        match read(&path, step) {
            Ok(loaded) => {
                let found = loaded.state["config_hash"].as_str().unwrap_or("none");
                if found != expected_config_hash {
                    return Err(PluginError::usage(format!(
                        "{}: expected a checkpoint of this configuration ({expected_config_hash}), got one of another \
                         ({found}); resume with the settings the run began with, or choose another folder",
                        path.display()
                    )));
                }
                return Ok(Some(loaded));
            }
            Err(reason) => warn(format!("{}: damaged checkpoint passed over: {reason}", path.display())),
        }
    }
    Ok(None)
}

fn read(path: &Path, step: u64) -> std::result::Result<Loaded, String> {
    let bytes = fs::read(path.join(MANIFEST)).map_err(|e| format!("{MANIFEST}: {e}"))?;
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|e| format!("{MANIFEST}: {e}"))?;
    if manifest.format_version != FORMAT_VERSION {
        let got = manifest.format_version;
        return Err(format!("{MANIFEST}: expected format version {FORMAT_VERSION}, got {got}"));
    }
    let digest = manifest.digest.clone();
    let manifest = manifest.sealed().map_err(|e| e.to_string())?;
    if manifest.digest != digest {
        return Err(format!("{MANIFEST}: expected its digest to be {}, got {digest}", manifest.digest));
    }
    if manifest.step != step {
        return Err(format!("{MANIFEST}: expected step {step}, got {}", manifest.step));
    }
    let stamp =
        |name: &str| manifest.files.get(name).ok_or_else(|| format!("{MANIFEST}: does not list {name}"));
    let tensors =
        |name: &str| read_tensors(&path.join(name), stamp(name)?).map_err(|e| format!("{name}: {e}"));
    let bytes = read_stamped(&path.join(STATE), stamp(STATE)?).map_err(|e| format!("{STATE}: {e}"))?;
    Ok(Loaded {
        path: path.to_path_buf(),
        step,
        state: serde_json::from_slice(&bytes).map_err(|e| format!("{STATE}: {e}"))?,
        tensors: tensors(TRAINABLE)?,
        optim: tensors(OPTIMIZER)?,
    })
}

/// Puts a manifest over the files of a checkpoint's folder, whatever they hold: fuzzing gets behind the digests by it.
pub(crate) fn seal(path: &Path, step: u64) -> Result<()> {
    let mut files = BTreeMap::new();
    for name in [TRAINABLE, OPTIMIZER, STATE] {
        if let Ok(bytes) = fs::read(path.join(name)) {
            files.insert(name.to_owned(), Stamp::of(&bytes));
        }
    }
    let (stage, seed, digest) = (Value::Null, Value::Null, String::new());
    let manifest = Manifest { format_version: FORMAT_VERSION, step, stage, seed, files, digest };
    let target = path.join(MANIFEST);
    fs::write(&target, manifest.sealed()?.json()?).at(&target)
}

fn prune(parent: &Path, newest: u64, keep: usize) -> Result<()> {
    let mut steps = list(parent, step_of)?;
    steps.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
    let (later, kept) = steps.split_at(steps.partition_point(|(step, _)| *step > newest));
    for (_, path) in later.iter().chain(kept.iter().skip(keep.max(1))) {
        remove(path)?;
    }
    Ok(())
}

/// Removes a folder so that an interruption cannot leave a part of it under its own name.
fn remove(path: &Path) -> Result<()> {
    let mut target = path.to_path_buf();
    if !path.file_name().is_some_and(|name| is_leftover(&name.to_string_lossy())) {
        target = previous(path);
        if target.exists() {
            fs::remove_dir_all(&target).at(&target)?;
        }
        fs::rename(path, &target).at(path)?;
    }
    if target.is_dir() {
        fs::remove_dir_all(&target).at(&target)
    } else {
        fs::remove_file(&target).at(&target)
    }
}

fn folder_name(step: u64) -> String {
    format!("{step:08}")
}

fn step_of(name: &str) -> Option<u64> {
    let step = name.parse().ok()?;
    (folder_name(step) == name).then_some(step)
}

/// The entries of a folder whose name means something; none where there is no folder.
fn list<T>(parent: &Path, meaning: impl Fn(&str) -> Option<T>) -> Result<Vec<(T, PathBuf)>> {
    let entries = match fs::read_dir(parent) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.at(parent)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.at(parent)?;
        if let Some(meant) = entry.file_name().to_str().and_then(&meaning) {
            found.push((meant, entry.path()));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use serde_json::json;

    fn tensors(value: f32) -> [Named<'static>; 2] {
        ["b", "a"].map(|name| Named {
            name: name.into(),
            shape: vec![3, 2],
            values: Cow::Owned(vec![value; 6]),
        })
    }

    fn state(step: u64) -> Value {
        json!({"config_hash": "c", "seed": 7, "stage": 1, "position": {"step": step, "x": 0.1}})
    }

    fn put(dir: &Path, step: u64, keep: usize) -> PathBuf {
        save(dir, step, &state(step), &tensors(step as f32), &tensors(-(step as f32)), keep).unwrap()
    }

    fn latest(dir: &Path) -> (Option<Loaded>, Vec<String>) {
        let mut warnings = Vec::new();
        (load_latest(dir, "c", &mut |w| warnings.push(w)).unwrap(), warnings)
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir.join(FOLDER))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Damages the newest of two checkpoints and expects the older one, and `reason` in the warning.
    fn passes_over(damage: impl FnOnce(&Path), reason: &str) {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), 10, 5);
        damage(&put(dir.path(), 20, 5));
        let (loaded, warnings) = latest(dir.path());
        assert_eq!(loaded.unwrap().step, 10);
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("00000020") && warnings[0].contains(reason), "{warnings:?}");
        // Going on from there replaces the damaged one.
        put(dir.path(), 20, 5);
        assert_eq!(latest(dir.path()).0.unwrap().step, 20);
    }

    #[test]
    fn newest_comes_back_as_saved() {
        let dir = tempfile::tempdir().unwrap();
        assert!(latest(dir.path()).0.is_none());
        put(dir.path(), 10, 5);
        let path = put(dir.path(), 20, 5);
        let (loaded, warnings) = latest(dir.path());
        let loaded = loaded.unwrap();
        assert_eq!((loaded.path, loaded.step, loaded.state), (path, 20, state(20)));
        assert_eq!(loaded.tensors.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((&loaded.optim[0].shape[..], &loaded.optim[0].values[..]), (&[3, 2][..], &[-20.; 6][..]));
        assert!(warnings.is_empty());
    }

    #[test]
    fn same_content_same_bytes() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (a, b) = (put(a.path(), 3, 1), put(b.path(), 3, 1));
        for file in [MANIFEST, TRAINABLE, OPTIMIZER, STATE] {
            assert_eq!(fs::read(a.join(file)).unwrap(), fs::read(b.join(file)).unwrap(), "{file}");
        }
    }

    #[test]
    fn prunes_to_the_newest_and_never_below_one() {
        let dir = tempfile::tempdir().unwrap();
        for step in [1, 2, 3, 100_000_000] {
            put(dir.path(), step, 2);
        }
        assert_eq!(names(dir.path()), ["00000003", "100000000"]);
        put(dir.path(), 100_000_001, 0);
        assert_eq!(names(dir.path()), ["100000001"]);
    }

    #[test]
    fn leftovers_of_a_killed_process_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let whole = put(dir.path(), 10, 5);
        let partial = dir.path().join(FOLDER).join(".00000020.abc.tmp");
        fs::create_dir(&partial).unwrap();
        fs::copy(whole.join(TRAINABLE), partial.join(TRAINABLE)).unwrap();
        let (loaded, warnings) = latest(dir.path());
        assert_eq!((loaded.unwrap().step, warnings.len()), (10, 0));
        assert_eq!(names(dir.path()), ["00000010"]);
    }

    #[test]
    fn flipped_byte_is_passed_over() {
        for file in [TRAINABLE, OPTIMIZER, STATE] {
            passes_over(
                |dir| {
                    let mut bytes = fs::read(dir.join(file)).unwrap();
                    let middle = bytes.len() / 2;
                    bytes[middle] ^= 1;
                    fs::write(dir.join(file), bytes).unwrap();
                },
                &format!("{file}: expected SHA-256"),
            );
        }
    }

    #[test]
    fn shorter_file_is_passed_over() {
        passes_over(
            |dir| fs::OpenOptions::new().write(true).open(dir.join(TRAINABLE)).unwrap().set_len(9).unwrap(),
            "trainable.safetensors: expected 176 bytes, got 9",
        );
    }

    #[test]
    fn missing_file_is_passed_over() {
        passes_over(|dir| fs::remove_file(dir.join(STATE)).unwrap(), "state.json: No such file");
    }

    #[test]
    fn manifest_cut_short_is_passed_over() {
        passes_over(
            |dir| fs::OpenOptions::new().write(true).open(dir.join(MANIFEST)).unwrap().set_len(60).unwrap(),
            "manifest.json: EOF",
        );
        passes_over(|dir| fs::remove_file(dir.join(MANIFEST)).unwrap(), "manifest.json: No such file");
    }

    #[test]
    fn edited_manifest_is_passed_over() {
        passes_over(
            |dir| {
                let text = fs::read_to_string(dir.join(MANIFEST)).unwrap();
                fs::write(dir.join(MANIFEST), text.replace("\"seed\": 7", "\"seed\": 8")).unwrap();
            },
            "manifest.json: expected its digest",
        );
    }

    #[test]
    fn renamed_checkpoint_is_passed_over() {
        passes_over(
            |dir| {
                fs::remove_dir_all(dir).unwrap();
                let older = dir.with_file_name("00000010");
                fs::create_dir(dir).unwrap();
                for file in [MANIFEST, TRAINABLE, OPTIMIZER, STATE] {
                    fs::copy(older.join(file), dir.join(file)).unwrap();
                }
            },
            "expected step 20, got 10",
        );
    }

    #[test]
    fn other_configuration_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), 10, 5);
        let error = load_latest(dir.path(), "other", &mut |_| ()).unwrap_err();
        assert_eq!(error.kind, Kind::Usage);
        assert!(error.message.contains("another") && error.message.contains("(c)"), "{error}");
    }

    #[test]
    fn all_damaged_is_none_with_warnings() {
        let dir = tempfile::tempdir().unwrap();
        for step in [1, 2] {
            fs::remove_file(put(dir.path(), step, 5).join(MANIFEST)).unwrap();
        }
        let (loaded, warnings) = latest(dir.path());
        assert!(loaded.is_none());
        assert_eq!(warnings.len(), 2);
    }

    #[test]
    fn failure_leaves_nothing_half_written_and_the_older_one_whole() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), 10, 1);
        // The second file cannot be written: the first one is there by then.
        let wide = [Named { name: "w".into(), shape: vec![2], values: Cow::Owned(vec![0.; 3]) }];
        let error = save(dir.path(), 20, &state(20), &tensors(1.), &wide, 1).unwrap_err();
        assert_eq!(error.context, "writing the checkpoint of step 20");
        assert_eq!(names(dir.path()), ["00000010"]);
        assert_eq!(latest(dir.path()).0.unwrap().step, 10);
    }

    #[test]
    fn folder_that_cannot_be_written_is_io_with_the_path() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FOLDER), "a file where the folder should be").unwrap();
        let error = save(dir.path(), 1, &state(1), &tensors(1.), &[], 1).unwrap_err();
        assert_eq!(error.kind, Kind::Io);
        assert!(error.message.contains(&dir.path().join(FOLDER).display().to_string()), "{error}");
    }

    #[test]
    fn state_without_a_configuration_hash_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(save(dir.path(), 1, &json!({}), &[], &[], 1).unwrap_err().kind, Kind::Internal);
    }
}
