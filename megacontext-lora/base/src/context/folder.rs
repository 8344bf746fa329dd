//! A gist tree in a folder: `LOD0.ctx`, `LOD1.ctx`, …, and `metadata.json`.
//!
//! Source: MegaContext's storage format; the files are described in `ctx`. `metadata.json` has its keys, and under
//! `megacontext` what they do not say: the base's fingerprint, and the gist version of every node, as runs
//! `[version, nodes]` of each level. A folder without that (another writer's) is known by the model's name alone, and its
//! gists are of version 0.
//!
//! A folder appears whole or not at all ([`crate::atomic`]): a writer that is killed leaves the older one to be read, if
//! need be from the name it has while it is being replaced.
//!
//! Rounding: in f16 and bf16 a gist is read back as the nearest value of that type. A stored parent is then the rounded gist
//! of the exact children, not to the bit that of the rounded ones: [`GistTree::verify`] needs a tolerance, and how much a
//! source makes of the difference is its own matter. In f32 the tree comes back to the bit.
//!
//! Units: bytes, tokens. Errors: [`BaseError::TreeFile`] with the file or folder. Nothing is written then.
//!
//! Left out on purpose: changing gists in place, which a crash could leave half done.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ctx::{CtxFile, CtxHeader, GistDtype, check_values, write_gists, write_tokens};
use super::hierarchy::Hierarchy;
use super::source::GistSource;
use super::tree::{BaseModel, GistTree, Level};
use crate::atomic::{self, AtomicDir};
use crate::error::{BaseError, Result};

const METADATA: &str = "metadata.json";
/// Of what we add to `metadata.json`.
const FORMAT: u32 = 1;

/// How a tree is stored.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Type of the gists' values.
    pub dtype: GistDtype,
    /// Where the network is that made the gists, for readers.
    pub gistnet_checkpoint: Option<String>,
    /// Whether the history is whole: nothing is going to be appended.
    pub ingestion_complete: bool,
    /// The time that the metadata says.
    pub now: SystemTime,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            dtype: GistDtype::default(),
            gistnet_checkpoint: None,
            ingestion_complete: false,
            now: SystemTime::now(),
        }
    }
}

/// `metadata.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Metadata {
    /// Version of the format: 1.
    pub version: Value,
    /// When the folder was first written, UTC.
    pub created_at: String,
    /// The base model's name.
    pub model_name: String,
    /// E.
    pub embedding_dim: usize,
    /// K.
    pub block_size: usize,
    /// `LOD0`, `LOD1`, …
    pub levels: BTreeMap<String, LevelMetadata>,
    /// Where the network is that made the gists.
    #[serde(default)]
    pub gistnet_checkpoint: Option<String>,
    /// Whether nothing is going to be appended.
    #[serde(default)]
    pub ingestion_complete: bool,
    /// When it was last written, UTC.
    #[serde(default)]
    pub last_modified: String,
    /// What the format has no keys for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub megacontext: Option<OwnMetadata>,
}

/// What `metadata.json` says of a level.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LevelMetadata {
    /// Whole blocks of tokens, level 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_blocks: Option<u64>,
    /// Tokens, level 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_tokens: Option<u64>,
    /// Gists, levels above.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_gists: Option<u64>,
    /// The file's size.
    pub file_size_bytes: u64,
}

/// What the format has no keys for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OwnMetadata {
    /// Version of these keys.
    pub format: u32,
    /// [`crate::weights::Weights::fingerprint`] of the base.
    pub base_fingerprint: String,
    /// For `LOD1` and above, versions of the nodes in order, as runs `[version, nodes]`.
    pub gist_versions: BTreeMap<String, Vec<(u16, u64)>>,
}

fn fail<T>(path: &Path, message: impl Into<String>) -> Result<T> {
    Err(BaseError::TreeFile { path: path.to_path_buf(), message: message.into() })
}

fn level_name(lod: u8) -> String {
    format!("LOD{lod}")
}

fn file_of(dir: &Path, lod: u8) -> PathBuf {
    dir.join(format!("{}.ctx", level_name(lod)))
}

/// Writes a tree into a folder of its own; an older tree there is replaced.
///
/// # Errors
/// A folder with something else in it; a width or a block of more than 16 bits; a model name that is empty or longer than
/// 32 bytes; values beyond f16 where that is the type. What was there stays.
pub fn write_tree(dir: &Path, tree: &GistTree, options: &StoreOptions) -> Result<()> {
    let older = match dir_of(dir) {
        Some(there) if !atomic::is_vacant(&there) => {
            if !there.join(METADATA).is_file() || !file_of(&there, 0).is_file() {
                return fail(dir, "expected no folder, an empty one or that of a gist tree, got another");
            }
            read_metadata(&there).ok()
        }
        _ => None,
    };
    let headers = headers_of(tree, options.dtype).or_else(|message| fail(dir, message))?;
    let metadata = metadata_of(tree, &headers, options, older);
    let text = serde_json::to_string_pretty(&metadata).expect("strings and numbers are JSON");
    let new = AtomicDir::new(dir)?;
    for header in &headers {
        let path = file_of(new.path(), header.lod);
        match header.dtype {
            None => write_tokens(&path, header, tree.tokens())?,
            Some(dtype) => write_gists(&path, header, dtype, tree.gists(header.lod))?,
        }
    }
    let path = new.path().join(METADATA);
    fs::write(&path, text + "\n").map_err(BaseError::io(&path))?;
    new.commit()
}

/// The header of every level's file, or what does not fit them.
fn headers_of(tree: &GistTree, dtype: GistDtype) -> std::result::Result<Vec<CtxHeader>, String> {
    let hierarchy = tree.hierarchy();
    let header = |lod: u8| {
        check_values(dtype, lod, tree.width(), tree.gists(lod))?;
        let header = CtxHeader {
            lod,
            block: hierarchy.block(),
            width: tree.width(),
            dtype: (lod > 0).then_some(dtype),
            entries: tree.nodes(lod),
            model_name: tree.base().name.clone(),
        };
        header.encode().map(|_| header)
    };
    (0..=hierarchy.levels()).map(header).collect()
}

fn metadata_of(
    tree: &GistTree,
    headers: &[CtxHeader],
    options: &StoreOptions,
    older: Option<Metadata>,
) -> Metadata {
    let level = |header: &CtxHeader| LevelMetadata {
        num_blocks: (header.lod == 0).then(|| header.entries / header.block as u64),
        num_tokens: (header.lod == 0).then_some(header.entries),
        num_gists: (header.lod > 0).then_some(header.entries),
        file_size_bytes: header.offset(header.entries),
    };
    let now = utc(options.now);
    Metadata {
        version: 1.into(),
        created_at: older.map_or_else(|| now.clone(), |older| older.created_at),
        model_name: tree.base().name.clone(),
        embedding_dim: tree.width(),
        block_size: tree.hierarchy().block(),
        levels: headers.iter().map(|header| (level_name(header.lod), level(header))).collect(),
        gistnet_checkpoint: options.gistnet_checkpoint.clone(),
        ingestion_complete: options.ingestion_complete,
        last_modified: now,
        megacontext: Some(OwnMetadata {
            format: FORMAT,
            base_fingerprint: tree.base().fingerprint.clone(),
            gist_versions: (1..=tree.hierarchy().levels())
                .map(|lod| (level_name(lod), runs(tree.versions(lod))))
                .collect(),
        }),
    }
}

fn runs(versions: &[u16]) -> Vec<(u16, u64)> {
    versions.chunk_by(|a, b| a == b).map(|run| (run[0], run.len() as u64)).collect()
}

/// Where a folder is: under its name, or where it lies while it is being replaced.
fn dir_of(dir: &Path) -> Option<PathBuf> {
    [dir.to_path_buf(), atomic::previous(dir)].into_iter().find(|dir| dir.exists())
}

fn read_metadata(dir: &Path) -> Result<Metadata> {
    let path = dir.join(METADATA);
    let text = fs::read_to_string(&path).map_err(BaseError::io(&path))?;
    let metadata: Metadata = serde_json::from_str(&text)
        .or_else(|e| fail(&path, format!("expected the metadata of a gist tree: {e}")))?;
    if ![Value::from(1), "1".into(), "1.0".into()].contains(&metadata.version) {
        return fail(&path, format!("version: expected 1, got {}", metadata.version));
    }
    match &metadata.megacontext {
        Some(own) if own.format != FORMAT => {
            fail(&path, format!("megacontext.format: expected {FORMAT}, got {}", own.format))
        }
        _ => Ok(metadata),
    }
}

/// A stored tree whose files are whole and go together; what they hold is read when asked for.
#[derive(Debug)]
pub struct TreeFolder {
    dir: PathBuf,
    metadata: Metadata,
    hierarchy: Hierarchy,
    /// Every level's, tokens first.
    files: Vec<CtxFile>,
    /// Versions of the nodes of levels 1 and above.
    versions: Vec<Vec<u16>>,
}

impl TreeFolder {
    /// Opens a folder: reads its metadata and the headers of its files.
    ///
    /// # Errors
    /// Files that are missing, not whole, or contradict the metadata or each other.
    pub fn open(dir: &Path) -> Result<Self> {
        let dir = dir_of(dir).unwrap_or_else(|| dir.to_path_buf());
        let metadata = read_metadata(&dir)?;
        let path = dir.join(METADATA);
        let levels = u8::try_from(metadata.levels.len().saturating_sub(1)).unwrap_or(u8::MAX);
        let names: Vec<String> = (0..=levels).map(level_name).collect();
        if metadata.levels.is_empty() || !names.iter().all(|name| metadata.levels.contains_key(name)) {
            let got: Vec<&str> = metadata.levels.keys().map(String::as_str).collect();
            return fail(&path, format!("levels: expected LOD0, LOD1 and so on, got {}", got.join(", ")));
        }
        let hierarchy =
            Hierarchy::new(metadata.block_size, levels).or_else(|e| fail(&path, e.to_string()))?;
        let mut files = Vec::with_capacity(names.len());
        let mut versions = Vec::with_capacity(names.len());
        for (lod, name) in (0..).zip(&names) {
            let file = CtxFile::open(&file_of(&dir, lod))?;
            let tokens = files.first().map_or(file.header().entries, |file: &CtxFile| file.header().entries);
            let nodes = hierarchy.nodes(tokens, lod);
            check_file(&file_of(&dir, lod), &metadata, &metadata.levels[name], lod, nodes, file.header())?;
            files.push(file);
            if lod > 0 {
                versions.push(read_versions(&metadata, name, nodes).or_else(|message| fail(&path, message))?);
            }
        }
        Ok(Self { dir, metadata, hierarchy, files, versions })
    }

    /// `metadata.json`.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Block and levels.
    pub fn hierarchy(&self) -> Hierarchy {
        self.hierarchy
    }

    /// The file of a level.
    pub fn file(&self, lod: u8) -> Option<&CtxFile> {
        self.files.get(usize::from(lod))
    }

    /// The versions of a level's nodes.
    pub fn versions(&self, lod: u8) -> &[u16] {
        usize::from(lod).checked_sub(1).and_then(|at| self.versions.get(at)).map_or(&[], Vec::as_slice)
    }

    /// Some of the tokens, read from their place.
    pub fn tokens(&self, tokens: Range<u64>) -> Result<Vec<u32>> {
        self.files[0].tokens(tokens)
    }

    /// Some of the gists of a level, [N, E], read from their place.
    pub fn gists(&self, lod: u8, nodes: Range<u64>) -> Result<Vec<f32>> {
        match self.file(lod) {
            Some(file) => file.gists(nodes),
            None => fail(
                &self.dir,
                format!("expected a level of the tree, at most {}, got {lod}", self.hierarchy.levels()),
            ),
        }
    }

    /// Refuses a tree of another base model: by name, and by fingerprint where the folder has one.
    pub fn check_base(&self, base: &BaseModel) -> Result<()> {
        let name = &self.metadata.model_name;
        if *name != base.name {
            return fail(
                &self.dir,
                format!("expected a tree of the base model {:?}, got one of {name:?}", base.name),
            );
        }
        match self.metadata.megacontext.as_ref().filter(|own| own.base_fingerprint != base.fingerprint) {
            None => Ok(()),
            Some(own) => fail(
                &self.dir,
                format!(
                    "expected a tree of the base model with fingerprint {:?}, got {:?}",
                    base.fingerprint, own.base_fingerprint
                ),
            ),
        }
    }

    /// Refuses a source that is not the one that made all gists: its block and width, its version.
    pub fn check_source(&self, source: &dyn GistSource) -> Result<()> {
        let (block, width) = (self.hierarchy.block(), self.metadata.embedding_dim);
        if [source.block(), source.width()] != [block, width] {
            return fail(
                &self.dir,
                format!(
                    "expected a tree for gists of {} entries of width {}, got one of {block} entries of width {width}",
                    source.block(),
                    source.width()
                ),
            );
        }
        match self.versions.iter().flatten().find(|v| **v != source.version()) {
            None => Ok(()),
            Some(other) => fail(
                &self.dir,
                format!(
                    "expected gists of version {}, got version {other}: refresh the tree",
                    source.version()
                ),
            ),
        }
    }

    /// Reads the whole tree, which has to be one of this base.
    ///
    /// # Errors
    /// As [`TreeFolder::check_base`]; gists that are no numbers; a parent of another version than its children.
    pub fn load(&self, base: &BaseModel) -> Result<GistTree> {
        self.check_base(base)?;
        let all = |file: &CtxFile| 0..file.header().entries;
        let level = |(file, versions): (&CtxFile, &Vec<u16>)| -> Result<Level> {
            Ok(Level { gists: file.gists(all(file))?, versions: versions.clone() })
        };
        let tokens = self.files[0].tokens(all(&self.files[0]))?;
        let levels = self.files[1..].iter().zip(&self.versions).map(level).collect::<Result<_>>()?;
        GistTree::from_parts(self.hierarchy, self.metadata.embedding_dim, base.clone(), tokens, levels)
            .or_else(|e| fail(&self.dir, e.to_string()))
    }
}

/// Refuses a file that is not the level that the metadata and the number of tokens say.
fn check_file(
    path: &Path,
    metadata: &Metadata,
    level: &LevelMetadata,
    lod: u8,
    nodes: u64,
    header: &CtxHeader,
) -> Result<()> {
    let counted = if lod == 0 { level.num_tokens } else { level.num_gists };
    let number = |what: &str, expected: u64, got: u64| {
        if expected == got { Ok(()) } else { fail(path, format!("{what}: expected {expected}, got {got}")) }
    };
    number("level", lod.into(), header.lod.into())?;
    number("block_size", metadata.block_size as u64, header.block as u64)?;
    number("embedding_dim", metadata.embedding_dim as u64, header.width as u64)?;
    number("entries", counted.unwrap_or(nodes), header.entries)?;
    number("entries over the tokens of LOD0", nodes, header.entries)?;
    number("file_size_bytes", level.file_size_bytes, header.offset(header.entries))?;
    if header.model_name != metadata.model_name {
        return fail(
            path,
            format!("model_name: expected {:?}, got {:?}", metadata.model_name, header.model_name),
        );
    }
    Ok(())
}

fn read_versions(metadata: &Metadata, name: &str, nodes: u64) -> std::result::Result<Vec<u16>, String> {
    let Some(own) = &metadata.megacontext else { return Ok(vec![0; nodes as usize]) };
    let runs = own.gist_versions.get(name).map_or(&[][..], Vec::as_slice);
    let total = runs.iter().try_fold(0u64, |sum, run| sum.checked_add(run.1));
    if total != Some(nodes) {
        return Err(format!(
            "megacontext.gist_versions.{name}: expected runs over {nodes} nodes, got {}",
            total.map_or("more than there can be".into(), |total| total.to_string())
        ));
    }
    Ok(runs.iter().flat_map(|(version, n)| std::iter::repeat_n(*version, *n as usize)).collect())
}

/// A time as `2026-01-31T23:59:59Z` (proleptic Gregorian calendar).
fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (mut days, second) = (seconds / 86400, seconds % 86400);
    let leap = |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{:02}-{:02}T{hour:02}:{minute:02}:{:02}Z", month + 1, days + 1, second % 60)
}

#[cfg(test)]
mod tests {
    use super::utc;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn times_are_those_of_the_calendar() {
        // `date -u -d @N +%FT%TZ`
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_827_696, "2000-02-29T12:34:56Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }
}
