//! Files that are no plugin, or not this one.

use integration_tests::{example_library, plugin};
use megacontext_lora_abi::{LoadError, LoadOptions, Plugin};
use std::path::Path;

fn refused(path: &Path, options: &LoadOptions) -> LoadError {
    let error = Plugin::load(path, options).expect_err("must be refused");
    let message = error.to_string();
    assert!(message.starts_with(&path.display().to_string()) && !message.contains('\n'), "{message}");
    error
}

#[test]
fn a_truncated_plugin_is_refused() {
    let whole = std::fs::read(plugin().unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for length in [100, 4096, whole.len() / 2, whole.len() - 1] {
        let path = folder.path().join("half.so");
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = refused(&path, &LoadOptions::default());
        assert!(matches!(error, LoadError::Truncated { .. }), "{length}: {error}");
    }
}

#[test]
fn a_plugin_of_another_version_is_refused() {
    let error = refused(&example_library("plugin_other_version").unwrap(), &LoadOptions::default());
    assert!(matches!(&error, LoadError::Version { got, .. } if got.ends_with("revision 999999")), "{error}");
}

#[test]
fn a_plugin_of_another_layout_is_refused_without_a_type_dump() {
    let error = refused(&example_library("plugin_other_layout").unwrap(), &LoadOptions::default());
    assert!(matches!(error, LoadError::Layout { .. }), "{error}");
    assert!(error.to_string().len() < 400, "{error}");
    assert!(
        error.details().contains("abi_revision"),
        "the findings are there for who asks: {}",
        error.details()
    );
}

#[test]
fn the_digest_is_insisted_on() {
    let path = plugin().unwrap();
    let wrong = LoadOptions { sha256: Some([7; 32]), ..LoadOptions::default() };
    let LoadError::Digest { got, .. } = refused(&path, &wrong) else { panic!("expected a digest error") };
    Plugin::load(&path, &LoadOptions::default().with_sha256_hex(&got).unwrap()).unwrap();
}
