//! Folders and files that appear whole or not at all.
//!
//! Each is built as a hidden sibling of its target (`.NAME.….tmp`), every file and folder of it is synced to disk, and one
//! rename puts it in place. What an interruption leaves behind is the hidden sibling, never a half-written target;
//! [`is_leftover`] knows its name.
//!
//! Replacing an older folder takes two renames (the portable way). Between them the target is absent for a moment; the
//! older folder then lies beside it under the name that [`previous`] gives.
//!
//! Errors: `BaseError::Io` with the path the system refused; a full disk shows up before anything is in place.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::error::{BaseError, Result};

/// How a hidden sibling's name ends.
const BUILDING: &str = ".tmp";
/// How the name of an older folder ends while it is being replaced.
const ASIDE: &str = ".previous";

/// A folder being built. Dropped without [`AtomicDir::commit`], it vanishes.
pub struct AtomicDir {
    target: PathBuf,
    parent: PathBuf,
    temp: TempDir,
}

impl AtomicDir {
    /// Starts a folder that will become `target`. Its parent is created where missing.
    pub fn new(target: &Path) -> Result<Self> {
        let Some(name) = target.file_name() else {
            let source =
                io::Error::new(io::ErrorKind::InvalidInput, "expected the path of a folder to write");
            return Err(BaseError::Io { path: target.to_path_buf(), source });
        };
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        if parent.exists() && !parent.is_dir() {
            let message = format!("cannot be written: {} is not a directory", parent.display());
            let source = io::Error::new(io::ErrorKind::NotADirectory, message);
            return Err(BaseError::Io { path: target.to_path_buf(), source });
        }
        fs::create_dir_all(&parent).map_err(BaseError::io(&parent))?;
        let temp = hidden(&name.to_string_lossy(), 0o777, |builder| builder.tempdir_in(&parent))
            .map_err(BaseError::io(&parent))?;
        Ok(Self { target: target.to_path_buf(), parent, temp })
    }

    /// Where to write the files.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Puts the folder in place. An older one is replaced; the caller has made sure that it may be.
    pub fn commit(self) -> Result<()> {
        sync_tree(self.temp.path())?;
        let aside = previous(&self.target);
        let replacing = self.target.symlink_metadata().is_ok();
        if replacing {
            if aside.exists() {
                fs::remove_dir_all(&aside).map_err(BaseError::io(&aside))?;
            }
            fs::rename(&self.target, &aside).map_err(BaseError::io(&self.target))?;
        }
        if let Err(source) = fs::rename(self.temp.path(), &self.target) {
            if replacing {
                // Best effort: the error below is the one to report.
                fs::rename(&aside, &self.target).ok();
            }
            return Err(BaseError::Io { path: self.target.clone(), source });
        }
        // The hidden name is gone: nothing is left for the guard to remove.
        let _ = self.temp.keep();
        sync(&self.parent)?;
        if aside.exists() {
            fs::remove_dir_all(&aside).map_err(BaseError::io(&aside))?;
        }
        Ok(())
    }
}

/// Where the older folder lies while `target` is being replaced.
pub fn previous(target: &Path) -> PathBuf {
    let name = target.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    target.with_file_name(format!(".{name}{ASIDE}"))
}

/// Is this the name of something that an interrupted writer left behind?
pub fn is_leftover(name: &str) -> bool {
    name.starts_with('.') && (name.ends_with(BUILDING) || name.ends_with(ASIDE))
}

/// Writes a whole file or none. The folder it goes to has to exist.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    write_file_with(path, |file| file.write_all(bytes).map_err(BaseError::io(path)))
}

/// As [`write_file`], of what `write` writes. What it fails with is passed on, and there is no file then.
pub fn write_file_with(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mut file =
        hidden(&name, 0o666, |builder| builder.tempfile_in(parent)).map_err(BaseError::io(path))?;
    write(file.as_file_mut())?;
    file.as_file().sync_all().map_err(BaseError::io(path))?;
    file.persist(path).map_err(|e| BaseError::io(path)(e.error))?;
    sync(parent)
}

/// Makes something under a hidden name, with the permissions it would have under its own (less the umask).
fn hidden<T>(name: &str, mode: u32, make: impl FnOnce(&tempfile::Builder) -> io::Result<T>) -> io::Result<T> {
    let prefix = format!(".{name}.");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(BUILDING);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(mode));
    }
    #[cfg(not(unix))]
    let _ = mode;
    make(&builder)
}

/// Is there nothing at `path`, or an empty folder?
pub fn is_vacant(path: &Path) -> bool {
    match fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_none(),
        // Below a regular file nothing stands in the way yet; making the folder will say what does.
        Err(e) => {
            e.kind() == io::ErrorKind::NotFound
                || (e.kind() == io::ErrorKind::NotADirectory && !path.exists())
        }
    }
}

fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(BaseError::io(dir))? {
        let path = entry.map_err(BaseError::io(dir))?.path();
        if path.is_dir() { sync_tree(&path)? } else { sync(&path)? }
    }
    sync(dir)
}

/// Makes a file's content, or the names in a folder, durable.
pub fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(BaseError::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn appears_on_commit_and_leaves_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("a/b/out");
        let dir = AtomicDir::new(&target).unwrap();
        fs::write(dir.path().join("x"), "1").unwrap();
        assert!(!target.exists());
        dir.commit().unwrap();
        assert_eq!(fs::read_to_string(target.join("x")).unwrap(), "1");
        assert_eq!(entries(target.parent().unwrap()), ["out"]);
    }

    #[test]
    fn vanishes_without_commit() {
        let root = tempfile::tempdir().unwrap();
        let dir = AtomicDir::new(&root.path().join("out")).unwrap();
        fs::write(dir.path().join("x"), "1").unwrap();
        drop(dir);
        assert_eq!(entries(root.path()), [] as [&str; 0]);
    }

    #[test]
    fn replaces_whole() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        for (file, stale) in [("old", false), ("new", true)] {
            if stale {
                fs::create_dir(previous(&target)).unwrap();
            }
            let dir = AtomicDir::new(&target).unwrap();
            fs::write(dir.path().join(file), "1").unwrap();
            dir.commit().unwrap();
        }
        assert_eq!(entries(&target), ["new"]);
        assert_eq!(entries(root.path()), ["out"]);
    }

    #[test]
    fn a_file_is_replaced_and_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("summary.json");
        write_file(&path, b"one").unwrap();
        write_file(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(entries(dir.path()), ["summary.json"]);
        assert!(matches!(write_file(&dir.path().join("none/x"), b""), Err(BaseError::Io { .. })));
        fs::create_dir(dir.path().join("folder")).unwrap();
        assert!(matches!(write_file(&dir.path().join("folder"), b""), Err(BaseError::Io { .. })));
        assert_eq!(entries(dir.path()), ["folder", "summary.json"]);
    }

    #[test]
    fn leftovers_have_hidden_names_of_their_own() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        let building = AtomicDir::new(&target).unwrap();
        let name = building.path().file_name().unwrap().to_str().unwrap();
        assert!(is_leftover(name) && name.starts_with(".out."), "{name}");
        assert!(is_leftover(previous(&target).file_name().unwrap().to_str().unwrap()));
        assert!(!is_leftover("out") && !is_leftover(".lock") && !is_leftover("a.tmp"));
    }

    #[test]
    fn target_below_a_file_is_refused() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        let error = AtomicDir::new(&root.path().join("file/out")).err().unwrap().to_string();
        assert!(error.contains("file"), "{error}");
    }
}
