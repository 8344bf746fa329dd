//! GistNet's file: what is written comes back to the bit, and everything else is refused by one error that says why.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::path::Path;

use anyhow::Result;
use candle_core::{Device, Tensor};
use common::{Case, close, golden, random, small};
use gistnet_adapter::{Expected, GistNet, GistNetConfig, Head, Identity, Pooling};
use megacontext_base::params::Group;
use megacontext_base::rope::{SigmaPreset, SigmaRule};
use tempfile::TempDir;

const BASE: &str = "0123abcd";
const ADAPTER: &str = "89abcdef01234567";

fn identity() -> Identity {
    Identity {
        adapter_fingerprint: Some(ADAPTER.to_string()),
        place_rule: Some(SigmaRule { preset: SigmaPreset::Original, block: 8, uniform: false }),
        ..Identity::of_base(BASE)
    }
}

/// A saved network, and where.
fn saved() -> Result<(GistNet, TempDir)> {
    let dir = tempfile::tempdir()?;
    let mut net = GistNet::new(small(8), 3)?;
    net.set_gist_version(4);
    net.save(&dir.path().join("gistnet.safetensors"), &identity())?;
    Ok((net, dir))
}

fn refused(path: &Path, expected: Expected, what: &str) {
    let error = GistNet::load(path, expected).err().expect("an error").to_string();
    assert!(error.contains(what), "expected {what:?} in {error:?}");
    assert!(error.contains(&*path.to_string_lossy()), "{error:?} does not name the file");
}

/// Saves a network, changes the file, and expects a refusal.
fn damaged(change: impl FnOnce(&mut Vec<u8>), what: &str) -> Result<()> {
    let (_, dir) = saved()?;
    let path = dir.path().join("gistnet.safetensors");
    let mut bytes = std::fs::read(&path)?;
    change(&mut bytes);
    std::fs::write(&path, bytes)?;
    refused(&path, Expected::default(), what);
    Ok(())
}

/// Overwrites one text in the header by another of its length.
fn replace(bytes: &mut [u8], from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|part| part == from.as_bytes()).expect("the text");
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
}

#[test]
fn what_is_saved_comes_back() -> Result<()> {
    let (net, dir) = saved()?;
    let path = dir.path().join("gistnet.safetensors");
    let expected = Expected {
        block: Some(8),
        width: Some(16),
        base_fingerprint: Some(BASE),
        adapter_fingerprint: Some(ADAPTER),
        gist_version: Some(4),
    };
    let loaded = GistNet::load(&path, expected)?;
    assert_eq!(loaded.network.config(), net.config());
    assert_eq!(loaded.identity, Identity { gist_version: Some(4), ..identity() });
    assert_eq!(loaded.network.gist_version(), 4);
    let hash = |net: &GistNet| net.params().group_hash(Group::Gistnet);
    assert_eq!(hash(&loaded.network)?, hash(&net)?);
    let children = random(&[3, 8, 16], 1);
    assert_eq!(close(&net.forward(&children, None)?, &loaded.network.forward(&children, None)?)?, 0.0);
    Ok(())
}

#[test]
fn the_same_network_gives_the_same_bytes() -> Result<()> {
    let (net, dir) = saved()?;
    let again = dir.path().join("again.safetensors");
    net.save(&again, &identity())?;
    assert_eq!(std::fs::read(dir.path().join("gistnet.safetensors"))?, std::fs::read(again)?);
    Ok(())
}

#[test]
fn a_state_dict_of_the_original_is_read() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let case = golden("gist_bidir_k8_query_linear")?;
    let config = GistNetConfig { pooling: Pooling::Query, head: Head::Linear, ..small(8) };
    let tensors = config.tensors();
    let state: Result<HashMap<String, Tensor>> = tensors
        .into_iter()
        .map(|(name, _)| Ok((name.clone(), case.get(&format!("w.{name}"))?.clone())))
        .collect();
    let path = dir.path().join("original.safetensors");
    candle_core::safetensors::save(&state?, &path)?;
    let net = GistNet::load_weights(&path, config)?;
    let gists = net.forward(case.get("in.blocks")?, None)?;
    assert!(close(&gists, case.get("derived.out")?)? < 2e-5);
    refused(&path, Expected::default(), "metadata: expected network, there is none: no network of ours");
    Ok(())
}

#[test]
fn an_interrupted_save_leaves_the_old_file() -> Result<()> {
    let (mut net, dir) = saved()?;
    let path = dir.path().join("gistnet.safetensors");
    let before = std::fs::read(&path)?;
    let broken = Tensor::full(f32::NAN, 16, &Device::Cpu)?;
    net.params_mut().set("head.mlp.2.bias", &broken)?;
    let error = net.save(&path, &identity()).unwrap_err().to_string();
    assert!(
        error.contains("head.mlp.2.bias") && error.contains("expected finite values, got NaN"),
        "{error}"
    );
    assert_eq!(std::fs::read(&path)?, before);
    assert_eq!(std::fs::read_dir(dir.path())?.count(), 1);
    Ok(())
}

#[test]
fn another_block_size_is_refused() -> Result<()> {
    let (_, dir) = saved()?;
    let expected = Expected { block: Some(32), ..Expected::default() };
    refused(&dir.path().join("gistnet.safetensors"), expected, "block: expected 32, got a network of 8");
    Ok(())
}

#[test]
fn another_width_is_refused() -> Result<()> {
    let (_, dir) = saved()?;
    let expected = Expected { width: Some(64), ..Expected::default() };
    refused(&dir.path().join("gistnet.safetensors"), expected, "width: expected 64, got a network of 16");
    Ok(())
}

#[test]
fn another_base_model_is_refused() -> Result<()> {
    let (_, dir) = saved()?;
    let expected = Expected { base_fingerprint: Some("ffff"), ..Expected::default() };
    refused(
        &dir.path().join("gistnet.safetensors"),
        expected,
        "expected a GistNet of the base model ffff, got one of 0123abcd",
    );
    Ok(())
}

#[test]
fn another_adapter_is_refused() -> Result<()> {
    let (_, dir) = saved()?;
    let path = dir.path().join("gistnet.safetensors");
    let of = |adapter| Expected { adapter_fingerprint: Some(adapter), ..Expected::default() };
    let trained =
        "got one that was trained beside the adapter 89abcdef0123…: put on the base model what it was";
    refused(
        &path,
        of("none"),
        &format!("expected a GistNet that was trained beside the base model alone, {trained}"),
    );
    refused(&path, of("ff"), &format!("beside the adapter ff…, {trained}"));
    Ok(())
}

#[test]
fn another_gist_version_is_refused() -> Result<()> {
    let (_, dir) = saved()?;
    let expected = Expected { gist_version: Some(5), ..Expected::default() };
    let says = "expected a GistNet of gist version 5, got one of 4";
    refused(&dir.path().join("gistnet.safetensors"), expected, says);
    Ok(())
}

#[test]
fn an_older_file_says_nothing_of_adapter_and_places_and_is_read() -> Result<()> {
    let (net, dir) = saved()?;
    let path = dir.path().join("older.safetensors");
    net.save(&path, &Identity::of_base(BASE))?;
    let header = String::from_utf8_lossy(&std::fs::read(&path)?).into_owned();
    assert!(!header.contains("adapter_fingerprint") && !header.contains("place_rule"));
    let expected = Expected { adapter_fingerprint: Some("ff"), ..Expected::default() };
    let identity = GistNet::load(&path, expected)?.identity;
    assert_eq!(identity, Identity { gist_version: Some(4), ..Identity::of_base(BASE) });
    Ok(())
}

#[test]
fn places_that_there_are_not_are_refused() -> Result<()> {
    damaged(
        |bytes| replace(bytes, "original", "anywhere"),
        "place_rule: expected preset, block and uniform, got",
    )
}

#[test]
fn a_file_cut_short_is_refused() -> Result<()> {
    damaged(|bytes| bytes.truncate(bytes.len() - 4), "it is truncated or has something appended")
}

#[test]
fn another_network_is_refused() -> Result<()> {
    let change = |bytes: &mut Vec<u8>| replace(bytes, "\"network\":\"gistnet\"", "\"network\":\"lensnet\"");
    damaged(change, "expected network gistnet, got lensnet")
}

#[test]
fn another_format_version_is_refused() -> Result<()> {
    let change = |bytes: &mut Vec<u8>| replace(bytes, "\"format_version\":\"1\"", "\"format_version\":\"2\"");
    damaged(change, "expected format_version 1, got 2")
}

#[test]
fn settings_with_an_unknown_key_are_refused() -> Result<()> {
    damaged(
        |bytes| replace(bytes, "layers", "leyers"),
        "config: expected settings of a GistNet: unknown field",
    )
}

#[test]
fn settings_that_no_network_has_are_refused() -> Result<()> {
    let change = |bytes: &mut Vec<u8>| replace(bytes, "\\\"heads\\\":2", "\\\"heads\\\":3");
    damaged(change, "heads: expected a divisor of the width 16, got 3")
}

#[test]
fn a_gist_version_that_is_no_number_is_refused() -> Result<()> {
    let change = |bytes: &mut Vec<u8>| replace(bytes, "\"gist_version\":\"4\"", "\"gist_version\":\"x\"");
    damaged(change, "gist_version: expected 0 to 65535, got x")
}

#[test]
fn a_missing_tensor_is_refused() -> Result<()> {
    // Settings of three blocks, tensors of two.
    let change = |bytes: &mut Vec<u8>| replace(bytes, "\\\"layers\\\":2", "\\\"layers\\\":3");
    damaged(change, "tensor blocks.2.attn.c_q.weight: expected this tensor, there is none of this name")
}

#[test]
fn an_unknown_tensor_is_refused() -> Result<()> {
    let change = |bytes: &mut Vec<u8>| replace(bytes, "\\\"layers\\\":2", "\\\"layers\\\":1");
    damaged(change, "tensor blocks.1.attn.c_k.weight: expected only tensors of this network")
}

#[test]
fn a_tensor_of_another_shape_is_refused() -> Result<()> {
    let change = |bytes: &mut Vec<u8>| replace(bytes, "\"shape\":[64,16]", "\"shape\":[16,64]");
    damaged(change, "tensor blocks.0.mlp.c_fc.weight: expected shape [64, 16], got [16, 64]")
}

#[test]
fn a_value_that_is_no_number_is_refused() -> Result<()> {
    let change = |bytes: &mut Vec<u8>| {
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    };
    damaged(change, "tensor head.mlp.2.weight: expected finite values, got NaN at place 511")
}

#[test]
fn no_file_is_refused() {
    refused(&Case::folder().join("none.safetensors"), Expected::default(), "none.safetensors");
}
