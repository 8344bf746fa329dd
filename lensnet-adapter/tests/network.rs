//! LensNet against finite differences; rows of other lengths, its own features, what it refuses, and its file.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use anyhow::{Context, Result};
use candle_core::Tensor;
use common::{close, gradients_hold, random, small};
use lensnet_adapter::{Contexts, Expected, Features, Head, Identity, LensNet, LensNetConfig};
use megacontext_base::gradients::Gradients;
use megacontext_base::params::Group;
use megacontext_base::rope::{RopeTables, SigmaRule};
use megacontext_base::tower::Angles;

const LOD: [u8; 12] = [2, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0];
const START: [u64; 12] = [0, 16, 20, 21, 22, 23, 0, 4, 8, 9, 0, 0];
const LENGTHS: [usize; 2] = [6, 4];

fn tables(net: &LensNet) -> Result<RopeTables> {
    Ok(net.angles(&LOD, &START, &SigmaRule { block: 4, ..SigmaRule::default() })?)
}

fn angles(tables: &RopeTables) -> Angles<'_> {
    Angles { cos: &tables.cos_nd, sin: &tables.sin_nd }
}

fn contexts(entries: &Tensor) -> Contexts<'_> {
    Contexts { entries_bwe: entries, lod: &LOD, start: &START, lengths: Some(&LENGTHS), tail: None }
}

/// Settings under which everything takes a path of its own.
fn variants() -> [LensNetConfig; 5] {
    [
        small(4),
        LensNetConfig { head: Head::Linear, ..small(4) },
        LensNetConfig { causal: true, group: Some(4), ..small(4) },
        LensNetConfig { group: Some(4), ..small(4) },
        small(4).original(),
    ]
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    for config in variants() {
        let what = format!("{config:?}");
        let mut net = LensNet::new(config, 3)?;
        let tables = tables(&net)?;
        let entries = random(&[2, 6, 16], 1);
        let probe = random(&[2, 6], 2);
        let scores = |net: &LensNet, of: &[Tensor]| Ok(net.forward(&contexts(&of[0]), angles(&tables))?);
        gradients_hold(&mut net, &what, &[("entries", entries)], &probe, &scores)?;
    }
    Ok(())
}

#[test]
fn a_row_scores_as_it_does_alone() -> Result<()> {
    // Groups that are smaller than every row: alone, a row no longer than its groups is dense.
    let shifted = [true, false].map(|causal| LensNetConfig { causal, group: Some(2), ..small(4) });
    for config in [small(4), LensNetConfig { causal: true, ..small(4) }].into_iter().chain(shifted) {
        let net = LensNet::new(config, 3)?;
        let tables = tables(&net)?;
        let entries = random(&[2, 6, 16], 1);
        let scores = net.forward(&contexts(&entries), angles(&tables))?;
        for (row, length) in LENGTHS.into_iter().enumerate() {
            let from = row * 6;
            let own = entries.narrow(0, row, 1)?.narrow(1, 0, length)?.contiguous()?;
            let cut = |table: &Tensor| table.narrow(0, from, length)?.contiguous();
            let (cos, sin) = (cut(&tables.cos_nd)?, cut(&tables.sin_nd)?);
            let of = Contexts {
                entries_bwe: &own,
                lod: &LOD[from..from + length],
                start: &START[from..from + length],
                lengths: None,
                tail: None,
            };
            let alone = net.forward(&of, Angles { cos: &cos, sin: &sin })?;
            let batched = scores.narrow(0, row, 1)?.narrow(1, 0, length)?;
            assert!(close(&alone, &batched)? < 1e-6);
        }
        assert_eq!(scores.get(1)?.narrow(0, 4, 2)?.to_vec1::<f32>()?, [0.0, 0.0]);
    }
    Ok(())
}

#[test]
fn causal_scores_know_nothing_of_later_entries_and_others_do() -> Result<()> {
    let entries = random(&[2, 6, 16], 1);
    let mut changed: Vec<f32> = entries.flatten_all()?.to_vec1()?;
    changed[5 * 16] += 1.0;
    let changed = Tensor::from_vec(changed, (2, 6, 16), entries.device())?;
    for causal in [true, false] {
        let net = LensNet::new(LensNetConfig { causal, ..small(4) }, 3)?;
        let tables = tables(&net)?;
        let first = |entries: &Tensor| -> Result<Tensor> {
            Ok(net.forward(&contexts(entries), angles(&tables))?.narrow(1, 0, 5)?.get(0)?)
        };
        let apart = close(&first(&entries)?, &first(&changed)?)?;
        assert_eq!(apart == 0.0, causal, "{apart}");
    }
    Ok(())
}

#[test]
fn scaled_distances_are_the_same_wherever_a_context_begins() -> Result<()> {
    // With one angle for all only the features tell entries apart.
    let entries = random(&[1, 6, 16], 1);
    let score = |features, by: u64| -> Result<Tensor> {
        let net = LensNet::new(LensNetConfig { features, ..small(4) }, 3)?;
        let tables = net.angles(&LOD[..6], &[0; 6], &SigmaRule { block: 4, ..SigmaRule::default() })?;
        let start: Vec<u64> = START[..6].iter().map(|start| start + by).collect();
        let of = Contexts { entries_bwe: &entries, lod: &LOD[..6], start: &start, lengths: None, tail: None };
        Ok(net.forward(&of, angles(&tables))?)
    };
    assert!(close(&score(Features::Scaled, 0)?, &score(Features::Scaled, 64)?)? < 1e-7);
    assert!(close(&score(Features::Original, 0)?, &score(Features::Original, 64)?)? > 1e-3);
    Ok(())
}

#[test]
fn focus_scores_ask_for_nothing_impossible() -> Result<()> {
    let net = LensNet::new(small(4), 3)?;
    let tables = tables(&net)?;
    let entries = random(&[2, 6, 16], 1);
    let plain: Vec<f32> = net.forward(&contexts(&entries), angles(&tables))?.flatten_all()?.to_vec1()?;
    let legal = net.focus_scores(&contexts(&entries), angles(&tables), 2)?;
    assert!(plain.iter().zip(LOD).any(|(score, lod)| lod == 0 && *score > 0.0));
    for ((plain, legal), lod) in plain.iter().zip(legal).zip(LOD) {
        let expected = match lod {
            0 => plain.min(0.0),
            2 => plain.max(0.0),
            _ => *plain,
        };
        assert!((legal - expected).abs() < 1e-6, "{legal} and {expected}");
    }
    Ok(())
}

#[test]
fn scores_without_a_graph_are_those_with_one() -> Result<()> {
    // More rows than are worked on at a time, in rows of a length that does not divide them.
    let (b, w) = (3, 300);
    let lod: Vec<u8> = (0..b * w).map(|at| (at % 5 % 3) as u8).collect();
    let start: Vec<u64> = (0..b * w).map(|at| (at % w * 16) as u64).collect();
    let entries = random(&[b, w, 16], 1);
    for config in variants() {
        let net = LensNet::new(config, 3)?;
        let tables = net.angles(&lod, &start, &SigmaRule { block: 4, ..SigmaRule::default() })?;
        let shared = net.angles(&lod[..w], &start[..w], &SigmaRule { block: 4, ..SigmaRule::default() })?;
        for lengths in [None, Some(&[300, 1, 77][..])] {
            for tables in [&tables, &shared] {
                let of = Contexts { entries_bwe: &entries, lod: &lod, start: &start, lengths, tail: None };
                let taped: Vec<f32> = net.forward(&of, angles(tables))?.flatten_all()?.to_vec1()?;
                let mut legal = taped;
                lensnet_adapter::legality::mask(&mut legal, &lod, 2);
                let plain = net.focus_scores(&of, angles(tables), 2)?;
                let off = legal.iter().zip(&plain).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(off < 2e-6, "{:?}: {off} apart", net.config());
            }
        }
    }
    Ok(())
}

#[test]
fn angles_of_another_width_are_refused_without_a_graph_too() -> Result<()> {
    let net = LensNet::new(small(4), 3)?;
    let tables = LensNet::new(LensNetConfig::new(16, 4), 3)?.angles(&LOD, &START, &SigmaRule::default())?;
    let entries = random(&[2, 6, 16], 1);
    let expected = "rope: expected cos and sin of shape [6, 4] or [12, 4], got [12, 2] and [12, 2]";
    for error in [
        net.forward(&contexts(&entries), angles(&tables)).map(|_| ()).unwrap_err(),
        net.focus_scores(&contexts(&entries), angles(&tables), 2).map(|_| ()).unwrap_err(),
    ] {
        assert!(error.to_string().contains(expected), "{error}");
    }
    Ok(())
}

#[test]
fn scores_that_are_no_numbers_are_refused() -> Result<()> {
    let net = LensNet::new(small(4), 3)?;
    let tables = tables(&net)?;
    let mut entries: Vec<f32> = random(&[2, 6, 16], 1).flatten_all()?.to_vec1()?;
    entries[6 * 16] = f32::NAN;
    let entries = Tensor::from_vec(entries, (2, 6, 16), &candle_core::Device::Cpu)?;
    let error = net.focus_scores(&contexts(&entries), angles(&tables), 2).unwrap_err().to_string();
    assert!(error.contains("focus score of entry 6: expected a finite number, got NaN"), "{error}");
    Ok(())
}

fn refused(of: &Contexts, what: &str) -> Result<()> {
    let net = LensNet::new(small(4), 3)?;
    let tables = tables(&net)?;
    let error = net.forward(of, angles(&tables)).unwrap_err().to_string();
    assert!(error.starts_with("lensnet: ") && error.contains(what), "expected {what:?} in {error:?}");
    Ok(())
}

#[test]
fn entries_of_another_width_are_refused() -> Result<()> {
    refused(
        &contexts(&random(&[2, 6, 8], 1)),
        "entries: expected [B, W, 16], B and W at least 1, got [2, 6, 8]",
    )
}

#[test]
fn levels_of_fewer_entries_are_refused() -> Result<()> {
    let entries = random(&[2, 6, 16], 1);
    let of = Contexts { lod: &LOD[..11], ..contexts(&entries) };
    refused(&of, "lod: expected 12 values, 2 rows of 6, got 11")
}

#[test]
fn positions_of_fewer_entries_are_refused() -> Result<()> {
    let entries = random(&[2, 6, 16], 1);
    let of = Contexts { start: &START[..11], ..contexts(&entries) };
    refused(&of, "start: expected 12 values, 2 rows of 6, got 11")
}

#[test]
fn a_level_without_an_embedding_is_refused() -> Result<()> {
    let entries = random(&[2, 6, 16], 1);
    let mut lod = LOD;
    lod[3] = 4;
    let of = Contexts { lod: &lod, ..contexts(&entries) };
    refused(&of, "lod: expected a level below 4, got 4")
}

#[test]
fn lengths_of_fewer_rows_are_refused() -> Result<()> {
    let entries = random(&[2, 6, 16], 1);
    let of = Contexts { lengths: Some(&[6]), ..contexts(&entries) };
    refused(&of, "lengths: expected 2, one for each row, got 1")
}

#[test]
fn a_row_longer_than_it_is_wide_is_refused() -> Result<()> {
    let entries = random(&[2, 6, 16], 1);
    let of = Contexts { lengths: Some(&[6, 7]), ..contexts(&entries) };
    refused(&of, "lengths: expected 1 to 6 entries in every row, got [6, 7]")
}

#[test]
fn a_row_without_entries_is_refused() -> Result<()> {
    let entries = random(&[2, 6, 16], 1);
    let of = Contexts { lengths: Some(&[6, 0]), ..contexts(&entries) };
    refused(&of, "lengths: expected 1 to 6 entries in every row, got [6, 0]")
}

#[test]
fn angles_of_fewer_positions_are_refused() -> Result<()> {
    let net = LensNet::new(small(4), 3)?;
    let error = net.angles(&LOD, &START[..3], &SigmaRule::default()).unwrap_err().to_string();
    assert!(error.contains("start: expected 12 positions, got 3"), "{error}");
    Ok(())
}

#[test]
fn a_frozen_network_has_no_way_back() -> Result<()> {
    let net = LensNet::new(small(4), 3)?;
    let tables = tables(&net)?;
    let scores = net.forward(&contexts(&random(&[2, 6, 16], 1)), angles(&tables))?;
    let error = net.backward(&scores, scores.clone(), &mut Gradients::new()).unwrap_err().to_string();
    assert!(error.contains("backward: expected a network that learns, got a frozen one"), "{error}");
    Ok(())
}

fn saved() -> Result<(LensNet, tempfile::TempDir)> {
    let dir = tempfile::tempdir()?;
    let net = LensNet::new(LensNetConfig { causal: true, group: Some(8), ..small(4) }, 3)?;
    let identity = Identity {
        adapter_fingerprint: Some("none".to_string()),
        gist_version: Some(4),
        ..Identity::of_base("0123")
    };
    net.save(&dir.path().join("lensnet.safetensors"), &identity)?;
    Ok((net, dir))
}

/// Expects a saved network not to be read, after `change` of its bytes.
fn unread(expected: Expected, change: impl FnOnce(&mut Vec<u8>), what: &str) -> Result<()> {
    let (_, dir) = saved()?;
    let path = dir.path().join("lensnet.safetensors");
    let mut bytes = std::fs::read(&path)?;
    change(&mut bytes);
    std::fs::write(&path, bytes)?;
    let error = LensNet::load(&path, expected).err().context("an error")?.to_string();
    assert!(error.contains(what), "expected {what:?} in {error:?}");
    Ok(())
}

/// Overwrites one text in the header by another of its length.
fn replace(bytes: &mut [u8], from: &str, to: &str) {
    let at = bytes.windows(from.len()).position(|part| part == from.as_bytes()).expect("the text");
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
}

#[test]
fn what_is_saved_comes_back() -> Result<()> {
    let (net, dir) = saved()?;
    let path = dir.path().join("lensnet.safetensors");
    let expected = Expected {
        block: Some(4),
        width: Some(16),
        base_fingerprint: Some("0123"),
        adapter_fingerprint: Some("none"),
        gist_version: Some(4),
    };
    let loaded = LensNet::load(&path, expected)?;
    assert_eq!((loaded.network.config(), loaded.identity.base_fingerprint.as_str()), (net.config(), "0123"));
    assert_eq!((loaded.identity.gist_version, loaded.identity.place_rule), (Some(4), None));
    let hash = |net: &LensNet| net.params().group_hash(Group::Lensnet);
    assert_eq!(hash(&loaded.network)?, hash(&net)?);
    assert_eq!(hash(&LensNet::load_weights(&path, net.config().clone())?)?, hash(&net)?);
    Ok(())
}

#[test]
fn a_file_of_another_block_size_is_refused() -> Result<()> {
    let expected = Expected { block: Some(8), ..Expected::default() };
    unread(expected, |_| (), "block: expected 8, got a network of 4")
}

#[test]
fn a_file_of_another_width_is_refused() -> Result<()> {
    let expected = Expected { width: Some(8), ..Expected::default() };
    unread(expected, |_| (), "width: expected 8, got a network of 16")
}

#[test]
fn a_file_of_another_base_model_is_refused() -> Result<()> {
    let expected = Expected { base_fingerprint: Some("ff"), ..Expected::default() };
    unread(expected, |_| (), "expected a LensNet of the base model ff, got one of 0123")
}

#[test]
fn a_file_of_another_adapter_is_refused() -> Result<()> {
    let expected = Expected { adapter_fingerprint: Some("0123456789abcdef"), ..Expected::default() };
    let says =
        "trained beside the adapter 0123456789ab…, got one that was trained beside the base model alone";
    unread(expected, |_| (), says)
}

#[test]
fn a_file_of_another_gist_version_is_refused() -> Result<()> {
    let expected = Expected { gist_version: Some(5), ..Expected::default() };
    unread(expected, |_| (), "expected a LensNet of gist version 5, got one of 4")
}

#[test]
fn a_file_of_another_network_is_refused() -> Result<()> {
    let change = |bytes: &mut Vec<u8>| replace(bytes, "\"network\":\"lensnet\"", "\"network\":\"gistnet\"");
    unread(Expected::default(), change, "expected network lensnet, got gistnet")
}

#[test]
fn a_file_with_a_tensor_too_many_is_refused() -> Result<()> {
    let change = |bytes: &mut Vec<u8>| replace(bytes, "\\\"layers\\\":2", "\\\"layers\\\":1");
    unread(Expected::default(), change, "blocks.1.attn.c_k.weight: expected only tensors of this network")
}

#[test]
fn a_file_cut_short_is_refused() -> Result<()> {
    let change = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() - 1);
    unread(Expected::default(), change, "it is truncated or has something appended")
}

#[test]
fn a_file_with_a_value_that_is_no_number_is_refused() -> Result<()> {
    let change = |bytes: &mut Vec<u8>| {
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    };
    unread(Expected::default(), change, "expected finite values, got inf")
}
