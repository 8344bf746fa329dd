//! Text that every machine with a Rust toolchain has: the crates in the cargo registry, the toolchain's
//! documentation.
//!
//! It is what the embedded default model is pre-trained on, and what the quickstart adapts and measures with.
//! The two must not meet, so sources are held out by name:
//!
//! > A source is held out when the first byte of the SHA-256 of its name is divisible by 8 ([`is_held_out`]).
//!
//! A source is a crate (its name without version: all versions are on one side), a book of the documentation
//! (`rust-lang/book`, …) or a crate of the standard library (`rust-lang/std`, …). The rule needs no list, so
//! it separates a crate that another machine has from what was trained on here. What the rule cannot see is
//! text that crates share, so a held-out file goes when a pre-training file of this machine has the same
//! bytes, or at least half of its longer lines.
//!
//! Taken: `.rs` and `.md` files of the newest version of each crate; pages of the books and the standard
//! library's source pages as text ([`html`]). Passed over, because a small model would spend itself on them:
//! bindings (`*-sys`, `*_sys`, `windows*`, `winapi*`, `libc`), generated code (folders `gen` or `generated`,
//! `@generated` near the top), files under 200 bytes or over 256 KiB (after stripping HTML), mean line over
//! 200 bytes, tables (digits over 15 % or digits and punctuation over 40 % of what is not white space, or
//! over 10 % of bytes not ASCII), files whose bytes were seen before.
//!
//! Order: by name, so the same files give the same documents. Nothing here fails: files that cannot be read
//! are counted as passed over. Left out: source tarballs, git checkouts of dependencies, the `rust-src`
//! component.

pub mod html;

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::data::documents::{Document, crate_name};

/// Smallest and largest text that is taken, in bytes.
const TEXT_BYTES: std::ops::RangeInclusive<usize> = 200..=256 * 1024;
/// Source pages are several times their text; beyond this they are not even read.
const MAX_PAGE_BYTES: u64 = 4 * 1024 * 1024;
/// Lines at least this long (trimmed) count when held-out text is compared with training text.
const LONG_LINE_BYTES: usize = 24;
/// The books of the toolchain's documentation that are taken.
const BOOKS: [&str; 11] = [
    "book",
    "cargo",
    "clippy",
    "edition-guide",
    "embedded-book",
    "nomicon",
    "reference",
    "rust-by-example",
    "rustc",
    "rustdoc",
    "style-guide",
];

/// Which side of the hold-out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// What the embedded default was pre-trained on.
    Pretrain,
    /// What it never saw.
    HeldOut,
}

/// Whether the source of this name (a crate's without version) is held out: `sha256(name)[0] % 8 == 0`.
pub fn is_held_out(name: &str) -> bool {
    Sha256::digest(name)[0].is_multiple_of(8)
}

/// Where to look.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roots {
    /// Folders of unpacked crates (`$CARGO_HOME/registry/src/INDEX`).
    pub registries: Vec<PathBuf>,
    /// The toolchain's documentation (`share/doc/rust/html`).
    pub toolchain_docs: Option<PathBuf>,
}

impl Roots {
    /// This machine's: `$CARGO_HOME` (or `~/.cargo`), and the documentation of a toolchain under
    /// `$RUSTUP_HOME` (or `~/.rustup`; stable ones first), else the system's.
    pub fn find() -> Self {
        let home = |variable: &str, default: &str| {
            std::env::var_os(variable)
                .map(PathBuf::from)
                .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(default)))
        };
        let registries =
            home("CARGO_HOME", ".cargo").map_or_else(Vec::new, |cargo| folders(&cargo.join("registry/src")));
        let mut toolchains = home("RUSTUP_HOME", ".rustup")
            .map_or_else(Vec::new, |rustup| folders(&rustup.join("toolchains")));
        toolchains.sort_by_key(|path| {
            !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("stable"))
        });
        toolchains.extend(["/usr/local", "/usr"].map(PathBuf::from));
        let toolchain_docs =
            toolchains.into_iter().map(|root| root.join("share/doc/rust/html")).find(|docs| docs.is_dir());
        Self { registries, toolchain_docs }
    }
}

/// Where a corpus comes from, fit to print.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Provenance {
    /// Sources (crates, books, standard-library crates) with at least one document.
    pub sources: usize,
    /// Documents.
    pub files: usize,
    /// Bytes of text.
    pub bytes: usize,
    /// Files looked at and passed over.
    pub passed_over: usize,
    /// Documents of the workspace itself, taken because there was too little else.
    pub own_files: usize,
}

impl fmt::Display for Provenance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} files, {:.1} MB, from {} crates and books on this machine",
            self.files,
            self.bytes as f64 / 1e6,
            self.sources
        )?;
        if self.own_files > 0 {
            write!(f, " ({} of them this project's own)", self.own_files)?;
        }
        write!(f, "; {} files passed over (tables, bindings, generated, repeated)", self.passed_over)
    }
}

/// Documents and where they come from.
#[derive(Debug, Clone, Default)]
pub struct Corpus {
    /// The documents, by name; the group of each is its source.
    pub documents: Vec<Document>,
    /// Where they come from.
    pub provenance: Provenance,
}

impl Corpus {
    fn new(documents: Vec<Document>, passed_over: usize) -> Self {
        let sources: HashSet<&str> = documents.iter().map(|document| document.group.as_str()).collect();
        let provenance = Provenance {
            sources: sources.len(),
            files: documents.len(),
            bytes: documents.iter().map(|document| document.text.len()).sum(),
            passed_over,
            own_files: 0,
        };
        Self { documents, provenance }
    }
}

/// One side of the hold-out; see the module's documentation.
pub fn discover(split: Split, roots: &Roots) -> Corpus {
    let (held_out, pretrain): (Vec<File>, Vec<File>) =
        list(roots).into_iter().partition(|file| is_held_out(&file.group));
    let mut seen = HashSet::new();
    let (pretrain, passed_over) = read(pretrain, &mut seen);
    if split == Split::Pretrain {
        return Corpus::new(pretrain, passed_over);
    }
    let (mut documents, mut passed_over) = read(held_out, &mut seen);
    let known: HashSet<u64> = pretrain
        .par_iter()
        .fold(HashSet::new, |mut lines, document| {
            lines.extend(long_lines(&document.text));
            lines
        })
        .reduce(HashSet::new, |a, b| {
            let (mut large, small) = if a.len() < b.len() { (b, a) } else { (a, b) };
            large.extend(small);
            large
        });
    let before = documents.len();
    documents.retain(|document| {
        let lines: HashSet<u64> = long_lines(&document.text).collect();
        lines.iter().filter(|&line| known.contains(line)).count() * 2 < lines.len().max(1)
    });
    passed_over += before - documents.len();
    Corpus::new(documents, passed_over)
}

/// What the quickstart works on: the held-out documents, and where they have fewer than `min_bytes` bytes,
/// the sources and documentation of the workspace at `workspace` too (no pre-training saw those).
pub fn quickstart_documents(min_bytes: usize, roots: &Roots, workspace: Option<&Path>) -> Corpus {
    let held_out = discover(Split::HeldOut, roots);
    let Some(workspace) = workspace.filter(|_| held_out.provenance.bytes < min_bytes) else {
        return held_out;
    };
    let mut files = Vec::new();
    list_folder(workspace, "workspace", "workspace", &["rs", "md"], &mut files);
    let mut seen = held_out.documents.iter().map(|document| Sha256::digest(&document.text).into()).collect();
    let (own, own_passed_over) = read(files, &mut seen);
    let own_files = own.len();
    let mut documents = held_out.documents;
    documents.extend(own);
    let mut corpus = Corpus::new(documents, held_out.provenance.passed_over + own_passed_over);
    corpus.provenance.own_files = own_files;
    corpus
}

/// A file that may become a document.
struct File {
    name: String,
    group: String,
    path: PathBuf,
}

/// All candidate files, by name.
fn list(roots: &Roots) -> Vec<File> {
    let mut newest: BTreeMap<String, (Version, PathBuf)> = BTreeMap::new();
    for folder in roots.registries.iter().flat_map(|registry| folders(registry)) {
        let folder_name =
            folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let (name, version) = crate_name(&folder_name);
        if is_bindings(name) {
            continue;
        }
        let version = Version::parse(version);
        if newest.get(name).is_none_or(|(known, _)| *known < version) {
            newest.insert(name.to_string(), (version, folder));
        }
    }
    let mut files = Vec::new();
    for (name, (_, folder)) in &newest {
        let folder_name =
            folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        list_folder(folder, &format!("registry/{folder_name}"), name, &["rs", "md"], &mut files);
    }
    if let Some(docs) = &roots.toolchain_docs {
        for book in BOOKS {
            let group = format!("rust-lang/{book}");
            list_folder(&docs.join(book), &format!("rust-docs/{book}"), &group, &["html"], &mut files);
        }
        for folder in folders(&docs.join("src")) {
            let name = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            // `core_arch` and the like hold generated intrinsics: the filters of `usable` see to them.
            list_folder(
                &folder,
                &format!("rust-docs/src/{name}"),
                &format!("rust-lang/{name}"),
                &["html"],
                &mut files,
            );
        }
    }
    files
}

fn list_folder(folder: &Path, prefix: &str, group: &str, extensions: &[&str], files: &mut Vec<File>) {
    let entries = walkdir::WalkDir::new(folder).sort_by_file_name().into_iter().filter_entry(|entry| {
        let name = entry.file_name().to_string_lossy();
        entry.depth() == 0
            || !(name.starts_with('.')
                || entry.file_type().is_dir() && ["target", "gen", "generated"].contains(&&*name))
    });
    for entry in entries.flatten().filter(|entry| entry.file_type().is_file()) {
        let path = entry.path();
        let known =
            path.extension().is_some_and(|extension| extensions.iter().any(|known| extension == *known));
        // `print.html` is the whole book once more, `toc.html` its menu.
        let repeats = ["print.html", "toc.html", "404.html"].iter().any(|name| entry.file_name() == *name);
        if known && !repeats {
            let tail = path.strip_prefix(folder).unwrap_or(path).to_string_lossy().into_owned();
            files.push(File {
                name: format!("{prefix}/{tail}"),
                group: group.to_string(),
                path: path.to_path_buf(),
            });
        }
    }
}

/// Reads candidates in parallel, drops those that are not usable or whose text is in `seen`, and counts
/// these.
fn read(files: Vec<File>, seen: &mut HashSet<[u8; 32]>) -> (Vec<Document>, usize) {
    let total = files.len();
    let texts: Vec<Option<([u8; 32], Document)>> = files
        .into_par_iter()
        .map(|file| {
            let is_html = file.path.extension().is_some_and(|extension| extension == "html");
            let limit = if is_html { MAX_PAGE_BYTES } else { *TEXT_BYTES.end() as u64 };
            if std::fs::metadata(&file.path).ok()?.len() > limit {
                return None;
            }
            let mut text = String::from_utf8(std::fs::read(&file.path).ok()?).ok()?;
            if is_html {
                text = html::page_text(&text)?;
            }
            if text.contains('\r') {
                text = text.replace("\r\n", "\n");
            }
            usable(&text).then(|| {
                (Sha256::digest(&text).into(), Document { name: file.name, group: file.group, text })
            })
        })
        .collect();
    let documents: Vec<Document> = texts
        .into_iter()
        .flatten()
        .filter(|(hash, _)| seen.insert(*hash))
        .map(|(_, document)| document)
        .collect();
    let passed_over = total - documents.len();
    (documents, passed_over)
}

fn folders(root: &Path) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(root)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    folders
}

fn is_bindings(name: &str) -> bool {
    name == "libc"
        || name.ends_with("-sys")
        || name.ends_with("_sys")
        || name.starts_with("windows")
        || name.starts_with("winapi")
}

/// Whether a text is prose or code that people wrote, by the measures in the module's documentation.
fn usable(text: &str) -> bool {
    let bytes = text.as_bytes();
    if !TEXT_BYTES.contains(&bytes.len()) {
        return false;
    }
    let (mut lines, mut spaces, mut digits, mut letters, mut beyond_ascii) = (1, 0, 0, 0, 0);
    for byte in bytes {
        match byte {
            b'\n' => {
                lines += 1;
                spaces += 1;
            }
            b' ' | b'\t' | b'\r' => spaces += 1,
            b'0'..=b'9' => digits += 1,
            b'a'..=b'z' | b'A'..=b'Z' => letters += 1,
            0x80.. => beyond_ascii += 1,
            _ => {}
        }
    }
    let visible = (bytes.len() - spaces).max(1);
    let marks = visible - letters - beyond_ascii;
    bytes.len() / lines <= 200
        && marks * 100 <= visible * 40
        && digits * 100 <= visible * 15
        && beyond_ascii * 10 <= bytes.len()
        && !text.lines().take(10).any(|line| line.contains("@generated"))
}

fn long_lines(text: &str) -> impl Iterator<Item = u64> + '_ {
    text.lines().map(str::trim).filter(|line| line.len() >= LONG_LINE_BYTES).map(|line| {
        let mut hasher = DefaultHasher::new();
        line.hash(&mut hasher);
        hasher.finish()
    })
}

/// A crate's version, ordered as cargo orders them as far as the newest is concerned.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version {
    numbers: Vec<u64>,
    released: bool,
    rest: String,
}

impl Version {
    fn parse(version: &str) -> Self {
        let version = version.split('+').next().unwrap_or(version);
        let (numbers, rest) = version.split_once('-').unwrap_or((version, ""));
        Self {
            numbers: numbers.split('.').map(|number| number.parse().unwrap_or(0)).collect(),
            released: rest.is_empty(),
            rest: rest.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODE: &str = "/// Adds two numbers and tells the caller what came out of it.\npub fn add(left: u64, right: u64) -> u64 {\n    \
        let sum_of_both = left + right;\n    println!(\"the sum is {sum_of_both}\");\n    sum_of_both\n}\n\n// A closing remark for size.\n";

    fn registry(files: &[(&str, String)]) -> (tempfile::TempDir, Roots) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join("index").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let roots = Roots { registries: vec![dir.path().join("index")], toolchain_docs: None };
        (dir, roots)
    }

    fn held_out_name() -> String {
        (0..).map(|i| format!("crate{i}")).find(|name| is_held_out(name)).unwrap()
    }

    fn training_name() -> String {
        (0..).map(|i| format!("crate{i}")).find(|name| !is_held_out(name)).unwrap()
    }

    fn names(corpus: &Corpus) -> Vec<&str> {
        corpus.documents.iter().map(|document| document.name.as_str()).collect()
    }

    #[test]
    fn the_rule_is_the_first_byte_of_the_hash() {
        // sha256("abc") begins with ba.
        assert!(!is_held_out("abc"));
        let held = (0..8000).filter(|i| is_held_out(&format!("c{i}"))).count();
        assert!((850..1150).contains(&held), "{held}");
    }

    #[test]
    fn splits_take_the_newest_version_and_share_no_text() {
        let (train, held) = (training_name(), held_out_name());
        let (_dir, roots) = registry(&[
            (&format!("{train}-1.9.0/src/lib.rs"), format!("{CODE}// old")),
            (&format!("{train}-1.10.0/src/lib.rs"), CODE.to_string()),
            (&format!("{train}-1.10.0/README.md"), CODE.replace("sum", "total")),
            (&format!("{held}-0.1.0/src/copy.rs"), CODE.to_string()),
            (
                &format!("{held}-0.1.0/src/near.rs"),
                format!("{CODE}// one more line that is only in this file\n"),
            ),
            (&format!("{held}-0.1.0/src/own.rs"), "/// A sentence that stands in no other file.\n".repeat(8)),
        ]);
        let pretrain = discover(Split::Pretrain, &roots);
        assert_eq!(
            names(&pretrain),
            [format!("registry/{train}-1.10.0/README.md"), format!("registry/{train}-1.10.0/src/lib.rs")]
        );
        assert!(pretrain.documents.iter().all(|document| document.group == train));
        let held_out = discover(Split::HeldOut, &roots);
        assert_eq!(names(&held_out), [format!("registry/{held}-0.1.0/src/own.rs")]);
        assert_eq!(held_out.provenance.passed_over, 2);
        assert!(
            held_out.provenance.to_string().starts_with("1 files, 0.0 MB, from 1 crates"),
            "{}",
            held_out.provenance
        );
    }

    #[test]
    fn bindings_generated_code_and_tables_are_passed_over() {
        let name = training_name();
        let (_dir, roots) = registry(&[
            ("windows-link-0.2.0/src/lib.rs", CODE.to_string()),
            ("some-sys-0.2.0/src/lib.rs", CODE.to_string()),
            (&format!("{name}-1.0.0/src/gen/a.rs"), CODE.to_string()),
            (&format!("{name}-1.0.0/src/b.rs"), format!("// @generated by a tool\n{CODE}")),
            (&format!("{name}-1.0.0/src/c.rs"), "0x1f, 0x2e, 0x3d,\n".repeat(50)),
            (&format!("{name}-1.0.0/src/d.rs"), "short".to_string()),
            (&format!("{name}-1.0.0/src/e.rs"), CODE.repeat(2000)),
            (&format!("{name}-1.0.0/src/f.rs"), CODE.replace('\n', " ")),
            (&format!("{name}-1.0.0/src/g.txt"), CODE.to_string()),
            (&format!("{name}-1.0.0/src/h.rs"), CODE.to_string()),
        ]);
        assert_eq!(names(&discover(Split::Pretrain, &roots)), [format!("registry/{name}-1.0.0/src/h.rs")]);
    }

    #[test]
    fn toolchain_pages_are_taken_as_text() {
        let dir = tempfile::tempdir().unwrap();
        let page = format!(
            "<html lang=\"en\"><main><p>{}</p></main></html>",
            "A sentence of the book.\n".repeat(20)
        );
        for path in ["book/ch01.html", "book/print.html", "unknown/ch01.html"] {
            std::fs::create_dir_all(dir.path().join(path).parent().unwrap()).unwrap();
            std::fs::write(dir.path().join(path), &page).unwrap();
        }
        let roots = Roots { registries: vec![], toolchain_docs: Some(dir.path().to_path_buf()) };
        let split = if is_held_out("rust-lang/book") { Split::HeldOut } else { Split::Pretrain };
        let corpus = discover(split, &roots);
        assert_eq!(names(&corpus), ["rust-docs/book/ch01.html"]);
        assert!(corpus.documents[0].text.starts_with("A sentence of the book."));
    }

    #[test]
    fn quickstart_falls_back_to_the_workspace() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("target")).unwrap();
        std::fs::write(dir.path().join("a.rs"), CODE).unwrap();
        std::fs::write(dir.path().join("target/b.rs"), CODE).unwrap();
        let corpus = quickstart_documents(100, &Roots::default(), Some(dir.path()));
        assert_eq!(names(&corpus), ["workspace/a.rs"]);
        assert_eq!(corpus.provenance.own_files, 1);
        assert!(quickstart_documents(0, &Roots::default(), Some(dir.path())).documents.is_empty());
    }

    #[test]
    fn versions_are_ordered() {
        let order = ["0.9.1", "0.10.0", "1.0.0-rc.3", "1.0.0", "1.2.1+spec-1.1.0"];
        assert!(order.windows(2).all(|pair| Version::parse(pair[0]) < Version::parse(pair[1])));
    }
}
