//! `results.jsonl`: what an evaluation has measured so far, one JSON object a line, so that it can be interrupted.
//!
//! The first line says what the results depend on: settings, weights, adapter, text; and the device, which may be another when
//! the evaluation is taken up. Every further line is a cell: one
//! result, measured whole. A cell is on disk before the next one begins. Taken up again, an evaluation goes on after the
//! last whole line (a line torn by a kill is cut off) and ends with the files of one that was never interrupted; nothing
//! that depends on the clock is written. Without a folder, cells are kept in memory.
//!
//! Errors: `Usage` for a folder that holds something else, and for settings that differ from those the folder was begun
//! with, naming the first one; `Data` for a line that is not a cell; `Io` with the path.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::folder::{CONFIG, RunFolder, config_toml};
use crate::error::{IoResultExt, PluginError, Result};
use crate::report::REPORT;

/// The cells of an evaluation, in the order they were measured.
pub const RESULTS: &str = "results.jsonl";
/// The whole result of a finished evaluation.
pub const RESULT: &str = "result.json";
/// Key of the first line that may be another when an evaluation is taken up.
const DEVICE: &str = "device";

/// Cells that were measured, in a folder or in memory.
#[derive(Debug)]
pub struct Cells<T> {
    done: Vec<T>,
    began_on: Option<String>,
    on_disk: Option<OnDisk>,
}

#[derive(Debug)]
struct OnDisk {
    folder: RunFolder,
    path: PathBuf,
    file: File,
}

impl<T: Serialize + DeserializeOwned> Cells<T> {
    /// Begins in an absent or empty folder, or takes up (`resume`) what is in one; none keeps cells in memory. `identity`
    /// is what the results depend on, its `settings` are written as `config.toml`.
    pub fn open(out: Option<&Path>, resume: bool, identity: &Value) -> Result<Self> {
        let Some(out) = out else {
            if resume {
                return Err(PluginError::usage("resume: expected the evaluation's folder in out, got none"));
            }
            return Ok(Self { done: Vec::new(), began_on: None, on_disk: None });
        };
        let folder = RunFolder::open(out, resume)?;
        let path = folder.path().join(RESULTS);
        let (mut done, mut began_on) = (Vec::new(), None);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(PluginError::io(&path, e)),
        };
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        for (number, line) in (1..).zip(text[..whole].lines()) {
            let bad = |e| PluginError::data(format!("{}: line {number}: {e}", path.display()));
            if number == 1 {
                let mut was: Value = serde_json::from_str(line).map_err(bad)?;
                // The results are the device's only in their last bits; folders of older versions do not say it.
                let device =
                    was.as_object_mut().and_then(|was| was.insert(DEVICE.into(), identity[DEVICE].clone()));
                began_on = device.and_then(|device| device.as_str().map(str::to_string));
                same(&was, identity, &path)?;
            } else {
                done.push(serde_json::from_str(line).map_err(bad)?);
            }
        }
        folder.write(CONFIG, config_toml(&identity["settings"])?.as_bytes())?;
        let file = OpenOptions::new().create(true).append(true).open(&path).at(&path)?;
        file.set_len(whole as u64).at(&path)?;
        let mut on_disk = OnDisk { folder, path, file };
        if whole == 0 {
            on_disk.line(identity)?;
        }
        Ok(Self { done, began_on, on_disk: Some(on_disk) })
    }

    /// What was measured so far.
    pub fn done(&self) -> &[T] {
        &self.done
    }

    /// The device that the evaluation began on, where it is taken up and that is known.
    pub fn began_on(&self) -> Option<&str> {
        self.began_on.as_deref()
    }

    /// Keeps one more cell.
    pub fn push(&mut self, cell: T) -> Result<()> {
        if let Some(on_disk) = &mut self.on_disk {
            on_disk.line(&cell)?;
        }
        self.done.push(cell);
        Ok(())
    }

    /// Writes the result and its page, where there is a folder.
    pub fn finish(&self, result: &Value, page: impl FnOnce() -> String) -> Result<()> {
        let Some(on_disk) = &self.on_disk else { return Ok(()) };
        on_disk.folder.write_json(RESULT, result)?;
        on_disk.folder.write(REPORT, page().as_bytes())?;
        Ok(())
    }
}

impl OnDisk {
    fn line(&mut self, value: &impl Serialize) -> Result<()> {
        let mut bytes =
            serde_json::to_vec(value).map_err(|e| PluginError::internal(format!("{RESULTS}: {e}")))?;
        bytes.push(b'\n');
        self.file.write_all(&bytes).and_then(|()| self.file.sync_data()).at(&self.path)
    }
}

/// Refuses to go on with results that depend on something else.
fn same(was: &Value, is: &Value, path: &Path) -> Result<()> {
    match difference("", was, is) {
        None => Ok(()),
        Some((key, was, is)) => Err(PluginError::usage(format!(
            "{key}: expected {was}, with which {} was begun, got {is}; go on with the same, or choose another folder",
            path.display()
        ))),
    }
}

/// The first place at which two values differ, with both; null and absent are the same.
fn difference(at: &str, was: &Value, is: &Value) -> Option<(String, Value, Value)> {
    if let (Value::Object(was), Value::Object(is)) = (was, is) {
        let keys = was.keys().chain(is.keys().filter(|key| !was.contains_key(*key)));
        let of =
            |map: &serde_json::Map<String, Value>, key: &str| map.get(key).cloned().unwrap_or(Value::Null);
        for key in keys {
            // Settings go by their own names.
            let place = match at {
                "" | "settings" => key.clone(),
                _ => format!("{at}.{key}"),
            };
            if let Some(found) = difference(&place, &of(was, key), &of(is, key)) {
                return Some(found);
            }
        }
        return None;
    }
    (was != is).then(|| (at.to_string(), was.clone(), is.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use serde_json::json;

    fn identity(seed: u64) -> Value {
        json!({"job": "x", "settings": {"seed": seed, "lengths": [1, 2], "adapter": null}, "base": "abc"})
    }

    fn open(dir: &Path, resume: bool, seed: u64) -> Result<Cells<Value>> {
        Cells::open(Some(dir), resume, &identity(seed))
    }

    #[test]
    fn what_was_measured_is_taken_up_and_a_torn_line_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(RESULTS);
        let mut cells = open(dir.path(), false, 1).unwrap();
        cells.push(json!({"n": 1})).unwrap();
        cells.push(json!({"n": 2})).unwrap();
        drop(cells);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&whole[..], b"{\"n\": 3"].concat()).unwrap();
        let mut cells = open(dir.path(), true, 1).unwrap();
        assert_eq!(cells.done(), [json!({"n": 1}), json!({"n": 2})]);
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        cells.push(json!({"n": 3})).unwrap();
        cells.finish(&json!({"all": 3}), || "page".into()).unwrap();
        drop(cells);
        assert_eq!(open(dir.path(), true, 1).unwrap().done().len(), 3);
        assert_eq!(std::fs::read_to_string(dir.path().join(REPORT)).unwrap(), "page");
    }

    #[test]
    fn killed_before_the_first_line_it_begins_again() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), false, 1).unwrap());
        for content in ["", "{\"job\": \"x\", \"sett"] {
            std::fs::write(dir.path().join(RESULTS), content).unwrap();
            assert_eq!(open(dir.path(), true, 2).unwrap().done().len(), 0);
            open(dir.path(), true, 2).unwrap();
        }
    }

    #[test]
    fn other_settings_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), false, 1).unwrap());
        let error = open(dir.path(), true, 2).unwrap_err();
        assert_eq!(error.kind, Kind::Usage);
        assert!(error.message.starts_with("seed: expected 1, with which "), "{error}");
        assert!(error.message.contains("got 2"), "{error}");
        let mut other = identity(1);
        other["base"] = json!("def");
        let error = Cells::<Value>::open(Some(dir.path()), true, &other).unwrap_err();
        assert!(error.message.starts_with("base: expected \"abc\""), "{error}");
    }

    #[test]
    fn a_folder_that_holds_something_is_refused_without_resume() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), false, 1).unwrap());
        assert_eq!(open(dir.path(), false, 1).unwrap_err().kind, Kind::Usage);
    }

    #[test]
    fn resuming_without_a_folder_is_refused() {
        let error = Cells::<Value>::open(None, true, &identity(1)).unwrap_err();
        assert_eq!(error.message, "resume: expected the evaluation's folder in out, got none");
    }

    #[test]
    fn a_line_that_is_no_cell_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), false, 1).unwrap());
        let path = dir.path().join(RESULTS);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{text}[1,\n")).unwrap();
        let error = open(dir.path(), true, 1).unwrap_err();
        assert!(error.kind == Kind::Data && error.message.contains("line 2: "), "{error}");
    }

    #[test]
    fn without_a_folder_cells_are_kept_in_memory() {
        let mut cells = Cells::open(None, false, &identity(1)).unwrap();
        cells.push(7u32).unwrap();
        cells.finish(&json!({}), || unreachable!("there is nowhere to write a page")).unwrap();
        assert_eq!(cells.done(), [7]);
    }
}
