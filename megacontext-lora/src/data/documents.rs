//! Documents from paths, folders and globs.
//!
//! A document is one text: a whole file, or one line of a `.jsonl` file (its string field `text`). What a
//! path means:
//!
//! - a file: it is read, whatever its extension, and must be valid;
//! - a folder: its files with a known text extension ([`TEXT_EXTENSIONS`]), recursively, links followed;
//!   hidden files and folders (a leading dot) and binary-looking files (a NUL byte in the first 8 KiB) are
//!   passed over;
//! - anything else is a glob (`*`, `?`, `[a-z]`, `**`): files of any extension, folders as above, hidden and
//!   binary-looking files passed over.
//!
//! The result is sorted by path, without repeats, so it depends on neither the order of arguments nor the
//! file system. Documents of white space only are dropped.
//!
//! Errors: a path or glob that matches nothing ([`Kind::Usage`]); no text at all, bytes that are not UTF-8, a
//! JSONL line that is not JSON or has no string `text` ([`Kind::Data`]); anything the file system refuses
//! ([`Kind::Io`]); a document that the tokenizer refuses, by name. Left out: archives, compressed files, HTML, other encodings.
//!
//! [`Kind::Usage`]: crate::error::Kind::Usage
//! [`Kind::Data`]: crate::error::Kind::Data
//! [`Kind::Io`]: crate::error::Kind::Io

use std::io::Read;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use crate::error::{IoResultExt, PluginError, Result};

/// Extensions that a walk through a folder takes: prose, source, configuration, JSONL.
pub const TEXT_EXTENSIONS: [&str; 46] = [
    "adoc", "bash", "c", "cc", "cfg", "clj", "cpp", "cs", "css", "cu", "cxx", "ex", "go", "h", "hpp", "hs",
    "ini", "java", "jl", "js", "jsonl", "jsx", "kt", "lua", "m", "md", "ml", "php", "pl", "proto", "py", "r",
    "rb", "rs", "rst", "scala", "sh", "sql", "swift", "tex", "toml", "ts", "tsx", "txt", "yaml", "yml",
];

/// How many bytes decide whether a file looks binary.
const SNIFF_BYTES: u64 = 8 * 1024;

/// One text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Where it comes from: the path, with `:LINE` for a line of a JSONL file.
    pub name: String,
    /// What must stay on one side of a hold-out split: see [`group_key`].
    pub group: String,
    /// The text.
    pub text: String,
}

impl Document {
    /// A document of a file; the group follows from the name.
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Self {
        let name = name.into();
        Self { group: group_key(&name), name, text: text.into() }
    }
}

/// The group of a document's name: for a file of a cargo registry (`…/registry/src/INDEX/CRATE-VERSION/…`)
/// the crate's name without its version, otherwise the file's name (with `:LINE` for a line of a JSONL file).
pub fn group_key(name: &str) -> String {
    let parts: Vec<&str> = name.split('/').collect();
    if let Some(at) = parts.windows(2).position(|pair| pair == ["registry", "src"])
        && let Some(folder) = parts.get(at + 3)
        && parts.len() > at + 4
    {
        return crate_name(folder).0.to_string();
    }
    parts.last().copied().unwrap_or(name).to_string()
}

/// Splits a registry folder `serde_json-1.0.150` into the crate's name and its version (empty when there is
/// none): the version begins after the first dash that a number and a dot follow.
pub fn crate_name(folder: &str) -> (&str, &str) {
    let is_version = |tail: &str| {
        let after = tail.trim_start_matches(|c: char| c.is_ascii_digit());
        after.len() < tail.len() && after.starts_with('.')
    };
    folder
        .match_indices('-')
        .find(|(at, _)| is_version(&folder[at + 1..]))
        .map_or((folder, ""), |(at, _)| (&folder[..at], &folder[at + 1..]))
}

/// The files that `patterns` mean, sorted, without repeats.
pub fn expand(patterns: &[String]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for pattern in patterns {
        let path = Path::new(pattern);
        match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => walk(path, &mut files)?,
            Ok(_) => files.push(path.to_path_buf()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => expand_glob(pattern, &mut files)?,
            Err(error) => return Err(PluginError::io(path, error)),
        }
    }
    files.sort();
    files.dedup();
    Ok(files)
}

/// Reads the documents that `patterns` mean, in the order of [`expand`] (lines of a JSONL file in their
/// order).
pub fn load(patterns: &[String]) -> Result<Vec<Document>> {
    let files = expand(patterns)?;
    let parts: Vec<Result<Vec<Document>>> = files.par_iter().map(|path| read_file(path)).collect();
    let mut documents = Vec::new();
    for part in parts {
        documents.extend(part?);
    }
    if documents.is_empty() {
        return Err(PluginError::data(format!(
            "no text in the data: expected at least one document that is not empty, found none in {} file(s) of [{}]",
            files.len(),
            patterns.join(", ")
        )));
    }
    Ok(documents)
}

/// Reads one file: one document, or one per line when its extension is `jsonl`.
pub fn read_file(path: &Path) -> Result<Vec<Document>> {
    let bytes = std::fs::read(path).at(path)?;
    let name = path.display().to_string();
    let mut text = String::from_utf8(bytes).map_err(|error| {
        PluginError::data(format!(
            "{name}: expected UTF-8 text, but the byte at offset {} is not",
            error.utf8_error().valid_up_to()
        ))
    })?;
    if text.starts_with('\u{feff}') {
        text.remove(0);
    }
    if path.extension().is_some_and(|e| e == "jsonl") {
        return read_jsonl(&name, &text);
    }
    Ok(if text.trim().is_empty() { Vec::new() } else { vec![Document::new(name, text)] })
}

fn read_jsonl(name: &str, text: &str) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim().is_empty() {
            continue;
        }
        let value: serde_json::Value = serde_json::from_str(line)
            .map_err(|error| PluginError::data(format!("{name}: line {number} is not JSON: {error}")))?;
        let Some(text) = value.get("text").and_then(serde_json::Value::as_str) else {
            let got = match value.get("text") {
                Some(other) => format!("\"text\" is {other}"),
                None => "there is none".to_string(),
            };
            return Err(PluginError::data(format!(
                "{name}: line {number}: expected an object with a string field \"text\", but {got}"
            )));
        };
        if !text.trim().is_empty() {
            documents.push(Document::new(format!("{name}:{number}"), text));
        }
    }
    Ok(documents)
}

/// Tokenises all documents in parallel; the order of the result is theirs.
///
/// # Errors
/// That of the first document, in their order, which `encode` refuses; the message begins with its name.
pub fn tokenize(
    documents: &[Document],
    encode: &(dyn Fn(&str) -> Result<Vec<u32>> + Sync),
) -> Result<Vec<Vec<u32>>> {
    let all: Vec<Result<Vec<u32>>> = documents.par_iter().map(|document| encode(&document.text)).collect();
    let named = |(document, tokens): (&Document, Result<Vec<u32>>)| {
        tokens.map_err(|mut error| {
            error.message = format!("{}: {}", document.name, error.message);
            error
        })
    };
    documents.iter().zip(all).map(named).collect()
}

fn is_hidden(name: &std::ffi::OsStr) -> bool {
    name.to_str().is_some_and(|name| name.len() > 1 && name.starts_with('.') && name != "..")
}

fn looks_binary(path: &Path) -> Result<bool> {
    let mut head = Vec::new();
    std::fs::File::open(path).at(path)?.take(SNIFF_BYTES).read_to_end(&mut head).at(path)?;
    Ok(head.contains(&0))
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = walkdir::WalkDir::new(folder)
        .follow_links(true)
        .into_iter()
        .filter_entry(|entry| entry.depth() == 0 || !is_hidden(entry.file_name()));
    for entry in entries {
        let entry = entry.map_err(|error| {
            let path = error.path().unwrap_or(folder).to_path_buf();
            PluginError::io(path, error.into())
        })?;
        let path = entry.path();
        let known = path
            .extension()
            .and_then(|extension| extension.to_str())
            .is_some_and(|extension| TEXT_EXTENSIONS.contains(&extension.to_ascii_lowercase().as_str()));
        if entry.file_type().is_file() && known && !looks_binary(path)? {
            files.push(path.to_path_buf());
        }
    }
    Ok(())
}

fn expand_glob(pattern: &str, files: &mut Vec<PathBuf>) -> Result<()> {
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..Default::default() };
    let matches = glob::glob_with(pattern, options).map_err(|error| {
        PluginError::usage(format!("{pattern}: no such file or folder, and not a valid glob either: {error}"))
    })?;
    let mut any = false;
    for path in matches {
        let path = path.map_err(|error| {
            let path = error.path().display().to_string();
            PluginError::io(path, error.into())
        })?;
        any = true;
        if path.is_dir() {
            walk(&path, files)?;
        } else if !looks_binary(&path)? {
            files.push(path);
        }
    }
    if any {
        Ok(())
    } else {
        Err(PluginError::usage(format!(
            "{pattern}: expected a file, a folder or a glob, but nothing matches"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        dir
    }

    fn pattern(dir: &tempfile::TempDir, tail: &str) -> String {
        dir.path().join(tail).display().to_string()
    }

    fn names(dir: &tempfile::TempDir, documents: &[Document]) -> Vec<String> {
        let prefix = format!("{}/", dir.path().display());
        documents.iter().map(|document| document.name.replace(&prefix, "")).collect()
    }

    #[test]
    fn folder_is_walked_in_order_without_hidden_and_binary_files() {
        let dir = folder(&[
            ("b.md", b"B"),
            ("a/x.rs", b"fn x() {}"),
            ("a/.git/y.txt", b"hidden"),
            (".z.txt", b"hidden"),
            ("c.txt", b"with a \0 byte"),
            ("d.png", b"unknown extension"),
            ("e.txt", b" \n"),
        ]);
        let documents = load(&[pattern(&dir, "")]).unwrap();
        assert_eq!(names(&dir, &documents), ["a/x.rs", "b.md"]);
    }

    #[test]
    fn globs_files_and_folders_mix_without_repeats() {
        let dir = folder(&[("b.md", b"B"), ("a/x.rs", b"X"), ("odd.weird", b"W"), (".hid", b"H")]);
        let patterns =
            [pattern(&dir, "odd.weird"), pattern(&dir, "*"), pattern(&dir, "**/*.rs"), pattern(&dir, "b.md")];
        assert_eq!(names(&dir, &load(&patterns).unwrap()), ["a/x.rs", "b.md", "odd.weird"]);
    }

    #[test]
    fn jsonl_gives_a_document_per_line() {
        let dir = folder(&[(
            "d.jsonl",
            b"{\"text\": \"one\"}\n\n{\"text\": \"two\", \"id\": 2}\n{\"text\": \"\"}\n",
        )]);
        let documents = load(&[pattern(&dir, "d.jsonl")]).unwrap();
        assert_eq!(names(&dir, &documents), ["d.jsonl:1", "d.jsonl:3"]);
        assert_eq!(documents[1].text, "two");
        assert_eq!(documents[1].group, "d.jsonl:3");
    }

    #[test]
    fn byte_order_mark_is_removed() {
        let dir = folder(&[("a.txt", b"\xef\xbb\xbfhello")]);
        assert_eq!(load(&[pattern(&dir, "a.txt")]).unwrap()[0].text, "hello");
    }

    #[test]
    fn refuses_a_path_that_matches_nothing() {
        let dir = folder(&[]);
        let error = load(&[pattern(&dir, "none.txt")]).unwrap_err();
        assert_eq!(error.kind, Kind::Usage);
        assert!(error.message.contains("none.txt") && error.message.contains("nothing matches"), "{error}");
    }

    #[test]
    fn refuses_a_glob_that_matches_nothing() {
        let dir = folder(&[("a.txt", b"a")]);
        assert_eq!(load(&[pattern(&dir, "*.md")]).unwrap_err().kind, Kind::Usage);
    }

    #[test]
    fn refuses_a_malformed_glob() {
        let error = load(&["/no/such/[".to_string()]).unwrap_err();
        assert!(error.kind == Kind::Usage && error.message.contains("valid glob"), "{error}");
    }

    #[test]
    fn refuses_empty_data() {
        let dir = folder(&[("a.txt", b""), ("b.txt", b"\n\n")]);
        let error = load(&[pattern(&dir, "*.txt")]).unwrap_err();
        assert!(error.kind == Kind::Data && error.message.contains("2 file(s)"), "{error}");
    }

    #[test]
    fn refuses_a_file_that_is_not_utf8() {
        let dir = folder(&[("a.txt", b"caf\xe9")]);
        let error = load(&[pattern(&dir, "a.txt")]).unwrap_err();
        assert!(error.kind == Kind::Data && error.message.contains("offset 3"), "{error}");
    }

    #[test]
    fn refuses_a_jsonl_line_that_is_not_json() {
        let dir = folder(&[("a.jsonl", b"{\"text\": \"one\"}\nnot json\n")]);
        let error = load(&[pattern(&dir, "a.jsonl")]).unwrap_err();
        assert!(error.kind == Kind::Data && error.message.contains("line 2 is not JSON"), "{error}");
    }

    #[test]
    fn refuses_a_jsonl_line_without_text() {
        let dir = folder(&[("a.jsonl", b"{\"txt\": \"one\"}\n"), ("b.jsonl", b"{\"text\": 3}\n")]);
        let error = load(&[pattern(&dir, "a.jsonl")]).unwrap_err();
        assert!(
            error.kind == Kind::Data && error.message.contains("line 1") && error.message.contains("none"),
            "{error}"
        );
        let error = load(&[pattern(&dir, "b.jsonl")]).unwrap_err();
        assert!(error.message.contains("\"text\" is 3"), "{error}");
    }

    #[test]
    fn group_of_a_registry_file_is_its_crate() {
        assert_eq!(
            group_key("/home/user/.cargo/registry/src/index-1f/serde_json-1.0.150/src/lib.rs"),
            "serde_json"
        );
        assert_eq!(group_key("/x/registry/src/i/toml-1.2.1+spec-1.1.0/README.md"), "toml");
        assert_eq!(group_key("/x/src/lib.rs"), "lib.rs");
        assert_eq!(crate_name("wit-bindgen-0.57.1"), ("wit-bindgen", "0.57.1"));
        assert_eq!(crate_name("sha-1-0.10.1"), ("sha-1", "0.10.1"));
        assert_eq!(crate_name("base64"), ("base64", ""));
    }

    #[test]
    fn tokens_keep_the_order_of_the_documents() {
        let documents: Vec<Document> =
            (0..50).map(|i| Document::new(format!("{i}.txt"), "x".repeat(i))).collect();
        let tokens = tokenize(&documents, &|text| Ok(vec![text.len() as u32])).unwrap();
        assert_eq!(tokens, (0..50).map(|i| vec![i]).collect::<Vec<_>>());
    }

    #[test]
    fn a_document_that_the_tokenizer_refuses_is_named() {
        let documents: Vec<Document> =
            (0..50).map(|i| Document::new(format!("{i}.txt"), "x".repeat(i))).collect();
        let error = tokenize(&documents, &|text| match text.len() {
            7 | 30 => Err(PluginError::model("no token for it")),
            _ => Ok(Vec::new()),
        })
        .unwrap_err();
        assert_eq!((error.kind, error.message.as_str()), (Kind::Model, "7.txt: no token for it"));
    }
}
