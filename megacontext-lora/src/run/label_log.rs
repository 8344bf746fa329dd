//! `labels/round-N.jsonl`: labels as they are made, one a line, so that making them can be interrupted.
//!
//! The first line states what they hold for; a file that states something else is refused, because labels of other gists, another
//! base or other settings teach what is no longer true. A last line without its newline (torn by a kill) is dropped.
//!
//! Errors: `Io` with the path; `Data` for a file that states something else, or a broken line.

use std::fs::{File, OpenOptions, create_dir_all, read_to_string};
use std::io::Write;
use std::path::{Path, PathBuf};

use lensnet_adapter::labels::Label;
use serde_json::Value;

use crate::error::{IoResultExt, PluginError, Result};

/// The folder of labels in a run folder.
pub const LABELS: &str = "labels";

/// The file of one round, open at its end.
#[derive(Debug)]
pub struct LabelLog {
    path: PathBuf,
    file: File,
}

impl LabelLog {
    /// Opens the file of round `number` (from 1), or begins it; gives back the labels that are there.
    ///
    /// # Errors
    /// See the module.
    pub fn open(run: &Path, number: usize, stated: &Value) -> Result<(Self, Vec<Label>)> {
        let folder = run.join(LABELS);
        create_dir_all(&folder).at(&folder)?;
        let path = folder.join(format!("round-{number}.jsonl"));
        let text = if path.is_file() { read_to_string(&path).at(&path)? } else { String::new() };
        let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        let mut lines = whole.lines();
        if let Some(first) = lines.next() {
            let found: Value = serde_json::from_str(first)
                .map_err(|e| PluginError::data(format!("{}, line 1: {e}", path.display())))?;
            if found != *stated {
                let keys = stated.as_object().into_iter().flatten();
                let other =
                    keys.filter(|(key, value)| found[key.as_str()] != **value).map(|(key, _)| key.as_str());
                return Err(PluginError::data(format!(
                    "{}: expected labels of this run, got some of another {}; labels hold for what they were measured with: \
                     begin a new run in another folder",
                    path.display(),
                    other.collect::<Vec<_>>().join(", ")
                )));
            }
        }
        let label = |(number, line): (usize, &str)| {
            serde_json::from_str(line)
                .map_err(|e| PluginError::data(format!("{}, line {number}: {e}", path.display())))
        };
        let labels: Vec<Label> = (2..).zip(lines).map(label).collect::<Result<_>>()?;
        let mut file = OpenOptions::new().create(true).write(true).truncate(false).open(&path).at(&path)?;
        file.set_len(whole.len() as u64).at(&path)?;
        std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).at(&path)?;
        let mut log = Self { path, file };
        if whole.is_empty() {
            log.line(&stated.to_string())?;
        }
        Ok((log, labels))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds one label.
    ///
    /// # Errors
    /// See the module.
    pub fn append(&mut self, label: &Label) -> Result<()> {
        let line = serde_json::to_string(label).map_err(|e| PluginError::internal(format!("label: {e}")))?;
        self.line(&line)
    }

    fn line(&mut self, text: &str) -> Result<()> {
        self.file.write_all(format!("{text}\n").as_bytes()).at(&self.path)
    }

    /// Makes it durable.
    ///
    /// # Errors
    /// See the module.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_all().at(&self.path)
    }
}
