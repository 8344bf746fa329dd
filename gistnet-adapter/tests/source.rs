//! Gists without a graph: the same to the bit however blocks come, and a tree made of them.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use anyhow::Result;
use candle_core::Tensor;
use common::{close, random, small};
use gistnet_adapter::{GistNet, GistNetConfig, Head, Mode, Pooling};
use megacontext_base::context::{BaseModel, GistTree, Hierarchy, TokenEmbeddings};
use megacontext_base::random::Random;

fn variants(block: usize, width: usize) -> Vec<GistNetConfig> {
    let plain = GistNetConfig { block, ..GistNetConfig::new(width, 2) };
    let mean = GistNetConfig { mode: Mode::Mean, ..plain.clone() };
    let mut all = vec![mean, GistNetConfig { causal: true, ..plain.clone() }];
    for pooling in [Pooling::Cls, Pooling::Query, Pooling::Mean] {
        for head in [Head::Linear, Head::Mlp] {
            all.push(GistNetConfig { pooling, head, ..plain.clone() });
        }
    }
    all
}

fn values(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.flatten_all()?.to_vec1()?)
}

#[test]
fn the_gist_of_a_block_depends_on_the_block_alone() -> Result<()> {
    // More blocks than are passed at a time, widths above and below that of products the matrix library sums otherwise.
    for (block, width, blocks) in [(8, 16, 150), (32, 64, 36), (128, 260, 9)] {
        let children = values(&random(&[blocks, block, width], 3))?;
        // Of the largest, the default alone.
        let least = if block == 128 { 7 } else { 0 };
        for config in variants(block, width).into_iter().skip(least) {
            let net = GistNet::new(config, 7)?;
            let whole = net.gists(&children, blocks)?;
            let mut random = Random::new(11);
            for largest in [1, 3, blocks] {
                let mut pieces = Vec::new();
                let mut at = 0;
                while at < blocks {
                    let count = (1 + random.below(largest)).min(blocks - at);
                    let part = &children[at * block * width..(at + count) * block * width];
                    pieces.extend(net.gists(part, count)?);
                    at += count;
                }
                let same = pieces.iter().zip(&whole).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same && pieces.len() == whole.len(), "{:?} in pieces up to {largest}", net.config());
            }
        }
    }
    Ok(())
}

#[test]
fn they_are_those_of_the_graph() -> Result<()> {
    let children = random(&[5, 8, 16], 3);
    for config in variants(8, 16) {
        let net = GistNet::new(config, 7)?;
        let plain = Tensor::from_vec(net.gists(&values(&children)?, 5)?, (5, 16), children.device())?;
        assert!(close(&plain, &net.forward(&children, None)?)? < 1e-6);
    }
    Ok(())
}

struct Table(Vec<f32>);

impl TokenEmbeddings for Table {
    fn width(&self) -> usize {
        16
    }

    fn embeddings(&self, tokens: &[u32]) -> megacontext_base::error::Result<Vec<f32>> {
        Ok(tokens.iter().flat_map(|t| self.0[*t as usize * 16..][..16].iter().copied()).collect())
    }
}

#[test]
fn a_tree_is_the_same_however_its_tokens_came() -> Result<()> {
    let net = GistNet::new(small(8), 7)?;
    let table = Table(values(&random(&[50, 16], 1))?);
    let tokens: Vec<u32> = (0..700).map(|i| i * 7 % 50).collect();
    let base = || BaseModel { name: "tiny".to_string(), fingerprint: "00".to_string() };
    let mut trees = Vec::new();
    for piece in [1, 37, 700] {
        let mut tree = GistTree::new(Hierarchy::new(8, 2)?, 16, base())?;
        for part in tokens.chunks(piece) {
            tree.append(part, &table, &net)?;
        }
        // 87 nodes of the first level and 10 of the second, each its children's gist to the bit.
        assert_eq!(tree.verify(.., &table, &net, 0.0)?, 97);
        trees.push(tree);
    }
    for level in [1, 2] {
        assert_eq!(trees[0].gists(level), trees[2].gists(level));
        assert_eq!(trees[1].gists(level), trees[2].gists(level));
    }
    Ok(())
}

#[test]
fn gists_that_are_no_numbers_are_refused() -> Result<()> {
    let net = GistNet::new(small(8), 7)?;
    let mut children = values(&random(&[3, 8, 16], 3))?;
    children[2 * 8 * 16] = f32::NAN;
    let error = net.gists(&children, 3).unwrap_err().to_string();
    assert!(error.contains("gist of block 2 (value 0 of 16): expected a finite number, got NaN"), "{error}");
    Ok(())
}

#[test]
fn children_that_are_not_so_many_blocks_are_refused() -> Result<()> {
    let net = GistNet::new(small(8), 7)?;
    let error = net.gists(&[0.0; 130], 1).unwrap_err().to_string();
    assert!(error.contains("children: expected 128 values, 1 blocks of 8 entries of 16, got 130"), "{error}");
    Ok(())
}

#[test]
fn no_blocks_have_no_gists() -> Result<()> {
    assert!(GistNet::new(small(8), 7)?.gists(&[], 0)?.is_empty());
    Ok(())
}
