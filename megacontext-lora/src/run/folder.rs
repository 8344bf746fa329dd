//! The run folder: one run, one writer, and small files that are whole or absent.
//!
//! A new run wants an absent or empty folder, a resumed one a folder in which a run began. Either holds an exclusive
//! lock on the hidden file `.lock` (flock, released by the system when the process dies) until it is dropped. The lock
//! file is the first thing a run writes, so it also is the sign that a run began: one that was killed before it wrote
//! anything else can be resumed.
//!
//! Errors: `Usage` for a folder that is in use, not empty, or holds no run; `Io` with the path otherwise.
//!
//! Left out on purpose: locks across machines (network file systems give no promise), removing anyone's files.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use megacontext_base::atomic::{is_leftover, write_file};
use serde::Serialize;
use serde_json::Value;

use super::tensor_file::Stamp;
use crate::error::{IoResultExt, PluginError, Result};
use crate::jobs::model_error;

const LOCK: &str = ".lock";

/// The run's settings as resolved, TOML.
pub const CONFIG: &str = "config.toml";

/// A run folder that this process alone writes to, for as long as the value lives.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    _lock: File,
}

impl RunFolder {
    /// [`RunFolder::resume`] or [`RunFolder::create`].
    pub fn open(path: impl Into<PathBuf>, resume: bool) -> Result<Self> {
        if resume { Self::resume(path) } else { Self::create(path) }
    }

    /// A folder for a new run: created, or empty.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        fs::create_dir_all(&path).at(&path)?;
        refuse_content(&path)?;
        let lock = lock(&path)?;
        // Another process may have run between the two lines above.
        refuse_content(&path)?;
        Ok(Self { path, _lock: lock })
    }

    /// The folder of a run that began earlier.
    pub fn resume(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        expect_run(&path)?;
        let lock = lock(&path)?;
        for entry in fs::read_dir(&path).at(&path)? {
            let entry = entry.at(&path)?;
            if !is_leftover(&entry.file_name().to_string_lossy()) {
                continue;
            }
            // A half-written adapter is a folder.
            let path = entry.path();
            if entry.file_type().at(&path)?.is_dir() {
                fs::remove_dir_all(&path).at(&path)?;
            } else {
                fs::remove_file(&path).at(&path)?;
            }
        }
        Ok(Self { path, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a file of the folder, whole or not at all; returns its path.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<PathBuf> {
        let path = self.path.join(name);
        write_file(&path, bytes).map_err(model_error)?;
        Ok(path)
    }

    /// Writes a file of the folder as indented JSON.
    pub fn write_json(&self, name: &str, value: &impl Serialize) -> Result<PathBuf> {
        let mut bytes = serde_json::to_vec_pretty(value)
            .map_err(|e| PluginError::internal(format!("{name} as JSON: {e}")))?;
        bytes.push(b'\n');
        self.write(name, &bytes)
    }
}

/// Refuses a path at which no run ever began, so that there is nothing to resume.
pub fn expect_run(path: &Path) -> Result<()> {
    if path.join(LOCK).is_file() {
        return Ok(());
    }
    let found = if path.is_dir() { "a folder in which none began" } else { "no such folder" };
    Err(PluginError::usage(format!(
        "{}: expected a run to resume, got {found}; start one without resuming",
        path.display()
    )))
}

/// Settings as TOML text. TOML has no null: what is null is left out.
pub fn config_toml(config: &impl Serialize) -> Result<String> {
    let mut value = to_value(config)?;
    strip_nulls(&mut value);
    toml::to_string_pretty(&value).map_err(|e| PluginError::internal(format!("settings as TOML: {e}")))
}

/// SHA-256 (hex) of settings; the order of their keys does not matter, nor does a null against an absent key.
pub fn config_hash(config: &impl Serialize) -> Result<String> {
    let mut value = to_value(config)?;
    strip_nulls(&mut value);
    value.sort_all_objects();
    Ok(Stamp::of(value.to_string().as_bytes()).sha256)
}

/// [`config_hash`] of what decides a result: without the keys `beside`, which say where things are and how they are run.
pub fn config_hash_without(config: &impl Serialize, beside: &[&str]) -> Result<String> {
    let mut value = to_value(config)?;
    if let Value::Object(map) = &mut value {
        map.retain(|key, _| !beside.contains(&key.as_str()));
    }
    config_hash(&value)
}

fn to_value(config: &impl Serialize) -> Result<Value> {
    serde_json::to_value(config).map_err(|e| PluginError::internal(format!("settings as JSON: {e}")))
}

fn strip_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(strip_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}

fn refuse_content(path: &Path) -> Result<()> {
    for entry in fs::read_dir(path).at(path)? {
        let name = entry.at(path)?.file_name();
        let name = name.to_string_lossy();
        if name != LOCK && !is_leftover(&name) {
            return Err(PluginError::usage(format!(
                "{}: expected an empty folder for a new run, got one that holds {name}; resume the run in it or choose \
                 another folder",
                path.display()
            )));
        }
    }
    Ok(())
}

fn lock(path: &Path) -> Result<File> {
    let file_path = path.join(LOCK);
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&file_path).at(&file_path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(PluginError::usage(format!(
            "{}: expected a folder that no one writes to, got one that another run holds",
            path.display()
        ))),
        // A file system without locks: one writer is then the user's care, as it would be without us.
        Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(e)) => Err(PluginError::io(file_path, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use serde_json::json;

    #[test]
    fn second_writer_is_refused_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/run");
        let first = RunFolder::create(&path).unwrap();
        for resume in [false, true] {
            let error = RunFolder::open(&path, resume).unwrap_err();
            assert_eq!(error.kind, Kind::Usage);
            assert!(error.message.contains("another run holds"), "{error}");
        }
        drop(first);
        RunFolder::resume(&path).unwrap();
    }

    #[test]
    fn folder_with_content_is_refused_and_left_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.md"), "").unwrap();
        let error = RunFolder::create(dir.path()).unwrap_err();
        assert_eq!(error.kind, Kind::Usage);
        assert!(error.message.contains("thesis.md"), "{error}");
        let error = RunFolder::resume(dir.path()).unwrap_err();
        assert!(error.message.contains("none began"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn resuming_nothing_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none");
        let error = RunFolder::resume(&path).unwrap_err();
        assert_eq!(error.kind, Kind::Usage);
        assert!(error.message.contains("no such folder"), "{error}");
        assert!(!path.exists());
    }

    #[test]
    fn file_in_the_way_is_io() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        fs::write(&path, "").unwrap();
        let error = RunFolder::create(&path).unwrap_err();
        assert_eq!(error.kind, Kind::Io);
        assert!(error.message.contains("run"), "{error}");
    }

    #[test]
    fn killed_before_the_first_file_can_be_resumed_or_begun_again() {
        let dir = tempfile::tempdir().unwrap();
        drop(RunFolder::create(dir.path()).unwrap());
        fs::write(dir.path().join(".config.toml.x1.tmp"), "half").unwrap();
        fs::create_dir(dir.path().join(".adapter.x2.tmp")).unwrap();
        fs::write(dir.path().join(".adapter.x2.tmp/adapter_config.json"), "half").unwrap();
        drop(RunFolder::create(dir.path()).unwrap());
        drop(RunFolder::resume(dir.path()).unwrap());
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, [LOCK]);
    }

    #[test]
    fn configuration_as_toml_and_as_hash() {
        let config = json!({"stages": [{"context": 512, "group": null}, {"context": 1024}],
            "lora": {"r": 8, "layers": null}, "seed": 7, "base": "a\"b", "lr": 2e-5});
        let back: Value = toml::from_str(&config_toml(&config).unwrap()).unwrap();
        assert_eq!(back["stages"], json!([{"context": 512}, {"context": 1024}]));
        assert_eq!((&back["lora"], &back["base"]), (&json!({"r": 8}), &json!("a\"b")));
        assert_eq!(config_hash(&back).unwrap(), config_hash(&config).unwrap());
        assert_ne!(config_hash(&json!({"seed": 8})).unwrap(), config_hash(&json!({"seed": 7})).unwrap());
    }
}
