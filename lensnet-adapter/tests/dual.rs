//! The dual form against its formulas in f64 and finite differences; rows of other lengths, what it refuses, its file.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;

use anyhow::Result;
use candle_core::{Device, Tensor};
use common::{close, gradients_hold, random};
use lensnet_adapter::dual::tail_gists;
use lensnet_adapter::{Contexts, Expected, Identity, Kind, LensNet, LensNetConfig, Tail};
use megacontext_base::context::{BaseModel, GistSource, GistTree, Hierarchy, TokenEmbeddings};
use megacontext_base::params::Group;
use megacontext_base::rope::{RopeTables, SigmaRule};
use megacontext_base::tower::Angles;

const LOD: [u8; 12] = [2, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0];
const START: [u64; 12] = [0, 16, 20, 21, 22, 23, 0, 4, 8, 9, 0, 0];
const LENGTHS: [usize; 2] = [6, 4];
const GISTS: [usize; 2] = [3, 2];

fn config(layers: usize, heads: usize) -> LensNetConfig {
    LensNetConfig { block: 4, lens_width: 8, heads, layers, ..LensNetConfig::dual(16) }
}

fn tables(net: &LensNet) -> Result<RopeTables> {
    Ok(net.angles(&LOD, &START, &SigmaRule { block: 4, ..SigmaRule::default() })?)
}

fn scores(net: &LensNet, entries: &Tensor, gists: &Tensor) -> Result<Tensor> {
    let tables = tables(net)?;
    let tail = Some(Tail { gists_bge: gists, lengths: Some(&GISTS) });
    let of = Contexts { entries_bwe: entries, lod: &LOD, start: &START, lengths: Some(&LENGTHS), tail };
    Ok(net.forward(&of, Angles { cos: &tables.cos_nd, sin: &tables.sin_nd })?)
}

/// Rows of numbers.
type Rows = Vec<Vec<f64>>;

/// x·Wᵀ.
fn product(x: &Rows, w: &[f64]) -> Rows {
    let inp = x.first().map_or(1, Vec::len);
    let row = |x: &Vec<f64>| w.chunks(inp).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
    x.iter().map(row).collect()
}

fn norm(x: &Rows) -> Rows {
    let row = |x: &Vec<f64>| {
        let r = 1.0 / (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + 1.192_092_9e-7).sqrt();
        x.iter().map(|v| v * r).collect()
    };
    x.iter().map(row).collect()
}

/// What every query gathers, head by head.
fn attend(q: &Rows, k: &Rows, v: &Rows, heads: usize) -> Rows {
    let wide = q.first().map_or(0, Vec::len);
    let d = wide / heads;
    let row = |q: &Vec<f64>| {
        let mut out = vec![0.0; wide];
        for head in 0..heads {
            let of = head * d..(head + 1) * d;
            let dot =
                |k: &Vec<f64>| k[of.clone()].iter().zip(&q[of.clone()]).map(|(k, q)| k * q).sum::<f64>();
            let weights: Vec<f64> = k.iter().map(|k| (dot(k) / (d as f64).sqrt()).exp()).collect();
            let total: f64 = weights.iter().sum();
            for (weight, v) in weights.iter().zip(v) {
                for at in of.clone() {
                    out[at] += weight / total * v[at];
                }
            }
        }
        out
    };
    q.iter().map(row).collect()
}

fn add(a: &mut Rows, b: &Rows) {
    for (a, b) in a.iter_mut().zip(b) {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    }
}

/// Scores of one row by the formulas.
fn reference(net: &LensNet, entries: &Rows, gists: &Rows, lod: &[u8], start: &[u64]) -> Vec<f64> {
    let w: HashMap<String, Vec<f64>> = net
        .config()
        .tensors()
        .into_iter()
        .map(|(name, _)| {
            let values = net.params().values(&name).unwrap().to_f32();
            (name, values.into_iter().map(f64::from).collect())
        })
        .collect();
    let linear = |x: &Rows, name: &str| {
        let mut y = product(x, &w[&format!("{name}.weight")]);
        let bias = vec![w[&format!("{name}.bias")].clone(); y.len()];
        add(&mut y, &bias);
        y
    };
    let span = |lod: u8| 4f64.powi(i32::from(lod));
    let (first, last) = (start[0] as f64, start.len() - 1);
    let cursor = start[last] as f64 + span(lod[last]);
    let read: Rows = entries
        .iter()
        .enumerate()
        .map(|(at, x)| {
            let distance = (cursor - start[at] as f64) / (cursor - first);
            [x.clone(), vec![f64::from(lod[at]) / 3.0, (span(lod[at]) / 16.0).min(1.0), distance]].concat()
        })
        .collect();
    let (mut x, mut g) = (linear(&read, "entries_in"), linear(gists, "gists_in"));
    for stack in 0..net.config().layers {
        let by = |of: &Rows, part: &str| product(of, &w[&format!("stacks.{stack}.{part}.weight")]);
        let (n_x, n_g) = (norm(&x), norm(&g));
        let gathered = attend(&by(&n_g, "w_qg"), &by(&n_x, "w_kx"), &by(&n_x, "w_vx"), net.config().heads);
        add(&mut g, &gathered);
        let n_g = norm(&g);
        let read_off = attend(&by(&n_x, "w_qx"), &by(&n_g, "w_kg"), &by(&n_g, "w_vg"), net.config().heads);
        add(&mut x, &read_off);
    }
    linear(&x, "scorer").into_iter().map(|u| u[0].tanh()).collect()
}

fn rows_of(of: &Tensor, row: usize, length: usize) -> Rows {
    let values: Vec<Vec<f32>> = of.get(row).unwrap().to_vec2().unwrap();
    values[..length].iter().map(|x| x.iter().map(|v| f64::from(*v)).collect()).collect()
}

#[test]
fn scores_are_those_of_the_formulas() -> Result<()> {
    let (entries, gists) = (random(&[2, 6, 16], 1), random(&[2, 3, 16], 2));
    for (layers, heads) in [(1, 1), (1, 4), (3, 2)] {
        let net = LensNet::new(config(layers, heads), 3)?;
        let found: Vec<Vec<f32>> = scores(&net, &entries, &gists)?.to_vec2()?;
        for row in 0..2 {
            let (from, length) = (row * 6, LENGTHS[row]);
            let (x, g) = (rows_of(&entries, row, length), rows_of(&gists, row, GISTS[row]));
            let wanted = reference(&net, &x, &g, &LOD[from..from + length], &START[from..from + length]);
            for (found, wanted) in found[row].iter().zip(&wanted) {
                assert!((f64::from(*found) - wanted).abs() < 2e-6, "{layers} stacks: {found} and {wanted}");
            }
            assert!(found[row][length..].iter().all(|u| *u == 0.0));
        }
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    for (layers, heads) in [(1, 4), (2, 2)] {
        let mut net = LensNet::new(config(layers, heads), 3)?;
        let inputs = [("entries", random(&[2, 6, 16], 1)), ("gists", random(&[2, 3, 16], 2))];
        let what = format!("{layers} stacks");
        let of = |net: &LensNet, of: &[Tensor]| scores(net, &of[0], &of[1]);
        gradients_hold(&mut net, &what, &inputs, &random(&[2, 6], 5), &of)?;
    }
    Ok(())
}

#[test]
fn a_row_scores_as_it_does_alone_whatever_lies_past_it() -> Result<()> {
    let net = LensNet::new(config(2, 2), 3)?;
    let (entries, gists) = (random(&[2, 6, 16], 1), random(&[2, 3, 16], 2));
    let spoilt = |of: &Tensor, row: usize, from: usize| -> Result<Tensor> {
        let mut values: Vec<f32> = of.flatten_all()?.to_vec1()?;
        let n = of.dim(1)?;
        values[(row * n + from) * 16..(row + 1) * n * 16].fill(f32::NAN);
        Ok(Tensor::from_vec(values, of.shape(), &Device::Cpu)?)
    };
    let batch = scores(&net, &spoilt(&entries, 1, 4)?, &spoilt(&gists, 1, 2)?)?;
    let tables = tables(&net)?;
    for (row, length) in LENGTHS.into_iter().enumerate() {
        let from = row * 6;
        let own = entries.narrow(0, row, 1)?.narrow(1, 0, length)?.contiguous()?;
        let tail = gists.narrow(0, row, 1)?.narrow(1, 0, GISTS[row])?.contiguous()?;
        let of = Contexts {
            entries_bwe: &own,
            lod: &LOD[from..from + length],
            start: &START[from..from + length],
            lengths: None,
            tail: Some(Tail { gists_bge: &tail, lengths: None }),
        };
        let alone = net.forward(&of, Angles { cos: &tables.cos_nd, sin: &tables.sin_nd })?;
        let off = close(&alone, &batch.narrow(0, row, 1)?.narrow(1, 0, length)?)?;
        assert!(off < 1e-6, "row {row}: {off}");
    }
    Ok(())
}

#[test]
fn a_row_without_tail_gists_is_scored_by_its_entries() -> Result<()> {
    let net = LensNet::new(config(1, 2), 3)?;
    let tables = tables(&net)?;
    let entries = random(&[2, 6, 16], 1);
    let score = |gists: &Tensor| -> Result<Tensor> {
        let tail = Some(Tail { gists_bge: gists, lengths: Some(&[0, 1]) });
        let of = Contexts { entries_bwe: &entries, lod: &LOD, start: &START, lengths: None, tail };
        Ok(net.forward(&of, Angles { cos: &tables.cos_nd, sin: &tables.sin_nd })?)
    };
    let (a, b) = (score(&random(&[2, 1, 16], 2))?, score(&random(&[2, 1, 16], 3))?);
    assert_eq!(close(&a.get(0)?, &b.get(0)?)?, 0.0);
    assert!(a.get(0)?.to_vec1::<f32>()?.iter().all(|u| u.is_finite() && *u != 0.0));
    assert!(close(&a.get(1)?, &b.get(1)?)? > 1e-4);
    Ok(())
}

#[test]
fn focus_scores_ask_for_nothing_impossible() -> Result<()> {
    let net = LensNet::new(config(1, 2), 3)?;
    let tables = tables(&net)?;
    let (entries, gists) = (random(&[2, 6, 16], 1), random(&[2, 3, 16], 2));
    let tail = Some(Tail { gists_bge: &gists, lengths: None });
    let of = Contexts { entries_bwe: &entries, lod: &LOD, start: &START, lengths: None, tail };
    let angles = Angles { cos: &tables.cos_nd, sin: &tables.sin_nd };
    let mut plain: Vec<f32> = net.forward(&of, angles)?.flatten_all()?.to_vec1()?;
    let legal = net.focus_scores(&of, angles, 2)?;
    assert_ne!(plain, legal);
    lensnet_adapter::legality::mask(&mut plain, &LOD, 2);
    assert_eq!(plain, legal);
    Ok(())
}

fn refused(tail: Option<Tail>, what: &str) -> Result<()> {
    let net = LensNet::new(config(1, 2), 3)?;
    let tables = tables(&net)?;
    let entries = random(&[2, 6, 16], 1);
    let of = Contexts { entries_bwe: &entries, lod: &LOD, start: &START, lengths: None, tail };
    let error =
        net.forward(&of, Angles { cos: &tables.cos_nd, sin: &tables.sin_nd }).unwrap_err().to_string();
    assert!(error.starts_with("lensnet: ") && error.contains(what), "expected {what:?} in {error:?}");
    Ok(())
}

#[test]
fn no_tail_gists_are_refused() -> Result<()> {
    refused(None, "tail: expected the tail gists that the dual form reads, got none")
}

#[test]
fn tail_gists_of_fewer_rows_or_another_width_are_refused() -> Result<()> {
    for dims in [[1, 3, 16], [2, 3, 8]] {
        let gists = random(&dims, 1);
        let what = format!("tail: expected [2, G, 16], G at least 1, got {dims:?}");
        refused(Some(Tail { gists_bge: &gists, lengths: None }), &what)?;
    }
    Ok(())
}

#[test]
fn lengths_of_tail_gists_that_are_none_are_refused() -> Result<()> {
    let gists = random(&[2, 3, 16], 1);
    for lengths in [&[3][..], &[3, 4]] {
        let what = format!("tail lengths: expected 2, one of 0 to 3 gists for each row, got {lengths:?}");
        refused(Some(Tail { gists_bge: &gists, lengths: Some(lengths) }), &what)?;
    }
    Ok(())
}

#[test]
fn what_is_saved_comes_back() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("lensnet.safetensors");
    let net = LensNet::new(config(2, 4), 3)?;
    net.save(&path, &Identity::of_base("0123"))?;
    let loaded = LensNet::load(&path, Expected::default())?.network;
    assert_eq!((loaded.config(), loaded.config().kind), (net.config(), Kind::Dual));
    let hash = |net: &LensNet| net.params().group_hash(Group::Lensnet);
    assert_eq!(hash(&loaded)?, hash(&net)?);
    Ok(())
}

/// A gist is the mean of its children, and a token's embedding its number.
struct Means;

impl GistSource for Means {
    fn block(&self) -> usize {
        4
    }

    fn width(&self) -> usize {
        1
    }

    fn version(&self) -> u16 {
        1
    }

    fn gists(&self, children: &[f32], _: usize) -> megacontext_base::error::Result<Vec<f32>> {
        Ok(children.chunks(4).map(|four| four.iter().sum::<f32>() / 4.0).collect())
    }
}

impl TokenEmbeddings for Means {
    fn width(&self) -> usize {
        1
    }

    fn embeddings(&self, tokens: &[u32]) -> megacontext_base::error::Result<Vec<f32>> {
        Ok(tokens.iter().map(|token| *token as f32).collect())
    }
}

#[test]
fn tail_gists_are_the_newest_root_and_five_blocks() -> Result<()> {
    let base = BaseModel { name: "test".into(), fingerprint: "0".into() };
    let mut tree = GistTree::new(Hierarchy::new(4, 2)?, 1, base)?;
    let mut upto = |tokens: u32| -> Result<Vec<f32>> {
        let new: Vec<u32> = (tree.len() as u32..tokens).collect();
        tree.append(&new, &Means, &Means)?;
        Ok(tail_gists(&tree))
    };
    assert!(upto(3)?.is_empty());
    // Blocks of four begin at 0, 4, 8: their means are 1.5 more.
    assert_eq!(upto(9)?, [1.5, 5.5]);
    assert_eq!(upto(17)?, [7.5, 1.5, 5.5, 9.5, 13.5]);
    assert_eq!(upto(39)?, [23.5, 17.5, 21.5, 25.5, 29.5, 33.5]);
    Ok(())
}
