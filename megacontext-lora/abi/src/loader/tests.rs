//! One test per refusal that needs no plugin; `integration-tests` loads real ones.

use super::*;

fn refused(path: &Path, options: &LoadOptions) -> LoadError {
    let error = Plugin::load(path, options).expect_err("must be refused");
    let message = error.to_string();
    assert!(message.starts_with(&path.display().to_string()), "names the path: {message}");
    assert!(!message.contains('\n') && message.len() < 400, "one sentence: {message}");
    error
}

/// A shared library that is certainly mapped into this process and certainly no plugin.
#[cfg(target_os = "linux")]
fn system_library() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines()
        .filter_map(|line| line.split_once('/').map(|(_, path)| PathBuf::from(format!("/{path}"))))
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libc.so")))
}

#[test]
fn refuses_a_missing_file() {
    let folder = tempfile::tempdir().unwrap();
    let error = refused(&folder.path().join("none.so"), &LoadOptions::default());
    assert!(matches!(error, LoadError::Missing { .. }), "{error}");
}

#[test]
fn refuses_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let error = refused(folder.path(), &LoadOptions::default());
    assert!(matches!(error, LoadError::NotAFile { kind: "a folder", .. }), "{error}");
}

#[test]
#[cfg(unix)]
fn refuses_a_device() {
    let error = refused(Path::new("/dev/null"), &LoadOptions::default());
    assert!(matches!(error, LoadError::NotAFile { .. }), "{error}");
}

#[test]
fn refuses_an_empty_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = refused(file.path(), &LoadOptions::default());
    assert!(matches!(error, LoadError::NotALibrary { .. }), "{error}");
}

#[test]
#[cfg(target_os = "linux")]
fn refuses_text() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "This is a note, not a library.\n").unwrap();
    let error = refused(file.path(), &LoadOptions::default());
    assert!(error.to_string().contains("it is a text file"), "{error}");
}

#[test]
#[cfg(target_os = "linux")]
fn refuses_a_wrong_signature() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), [0u8, 1, 2, 3, 255, 254]).unwrap();
    let error = refused(file.path(), &LoadOptions::default());
    assert!(error.to_string().contains("ELF signature"), "{error}");
}

#[test]
fn refuses_a_file_beyond_the_limit() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), [0u8; 100]).unwrap();
    let error = refused(file.path(), &LoadOptions { max_size: 99, ..LoadOptions::default() });
    assert!(matches!(error, LoadError::TooLarge { size: 100, limit: 99, .. }), "{error}");
}

#[test]
fn refuses_another_digest() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "abc").unwrap();
    let error = refused(file.path(), &LoadOptions { sha256: Some([0; 32]), ..LoadOptions::default() });
    // FIPS 180-2, appendix B.1.
    let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    assert!(matches!(&error, LoadError::Digest { got, .. } if got == abc), "{error}");
    // The right digest lets it through to the next check.
    let options = LoadOptions::default().with_sha256_hex(abc).unwrap();
    assert!(!matches!(refused(file.path(), &options), LoadError::Digest { .. }));
}

#[test]
fn a_digest_in_hex_is_64_digits() {
    assert!(LoadOptions::default().with_sha256_hex("ab").is_none());
    assert!(LoadOptions::default().with_sha256_hex(&"zz".repeat(32)).is_none());
    assert_eq!(LoadOptions::default().with_sha256_hex(&"0F".repeat(32)).unwrap().sha256, Some([15; 32]));
}

#[test]
#[cfg(target_os = "linux")]
fn refuses_a_library_that_is_no_plugin() {
    let Some(path) = system_library() else {
        println!("skipped: no libc.so in /proc/self/maps");
        return;
    };
    let error = refused(&path, &LoadOptions::default());
    assert!(matches!(error, LoadError::NotAPlugin { symbol: VERSION_SYMBOL, .. }), "{error}");
}

#[test]
#[cfg(target_os = "linux")]
fn refuses_a_truncated_library() {
    let Some(path) = system_library() else {
        println!("skipped: no libc.so in /proc/self/maps");
        return;
    };
    let whole = std::fs::read(path).unwrap();
    for part in [63, 64, 1000, whole.len() / 2, whole.len() - 1] {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &whole[..part]).unwrap();
        let error = refused(file.path(), &LoadOptions::default());
        assert!(matches!(error, LoadError::Truncated { .. }), "{part} bytes: {error}");
    }
}

#[test]
#[cfg(unix)]
fn the_dynamic_loaders_refusal_is_one_line() {
    // Complete headers around nothing that can be mapped: only the dynamic loader can find out.
    let Ok(executable) = std::env::current_exe() else { return };
    match Plugin::load(&executable, &LoadOptions::default()) {
        Err(error @ (LoadError::Open { .. } | LoadError::NotALibrary { .. })) => {
            assert!(!error.to_string().contains('\n'), "{error}");
        }
        other => panic!("a program was taken for a library: {other:?}"),
    }
}

#[test]
fn version_lines_are_compared() {
    let path = Path::new("x.so");
    check_version_line(VERSION_LINE, path).unwrap();
    for other in [
        "megacontext-lora-abi 0.1.0 revision 999",
        "megacontext-lora-abi 0.1.0 revision 1",
        "megacontext-lora-abi 0.0.9 revision 2",
        "megacontext-lora-abi 9.0.0 revision 2",
        "megacontext-lora-abi 0.1 revision 2",
        "another-abi 0.1.0 revision 2",
        "",
    ] {
        let error = check_version_line(other, path).unwrap_err();
        assert!(error.to_string().contains(&format!("it says \"{other}\"")), "{error}");
    }
    assert!(compatible(&[0, 1, 0], &[0, 1, 7]) && !compatible(&[0, 1, 0], &[0, 2, 0]));
    assert!(compatible(&[1, 1, 0], &[1, 0, 7]) && !compatible(&[1, 0, 0], &[2, 0, 0]));
}

#[test]
fn the_newer_library_is_found() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(find_in(folder.path()), None);
    let (beside, deps) = (folder.path().join(library_file_name()), folder.path().join("deps"));
    std::fs::create_dir(&deps).unwrap();
    let inner = deps.join(library_file_name());
    std::fs::write(&inner, "").unwrap();
    assert_eq!(find_in(folder.path()), Some(inner.clone()));
    std::fs::write(&beside, "").unwrap();
    let age = |path: &Path, seconds| {
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
    };
    age(&beside, 10);
    age(&inner, 20);
    assert_eq!(find_in(folder.path()), Some(inner.clone()));
    age(&inner, 10);
    assert_eq!(find_in(folder.path()), Some(beside));
}
