//! Sources of gists that are plain to compute, and what tests share.

use std::cell::Cell;

use megacontext_base::context::{BaseModel, GistSource, GistTree, Hierarchy, TokenEmbeddings};
use megacontext_base::error::{BaseError, Result};
use megacontext_base::random::mix;
use proptest::test_runner::{Config, RngSeed};

/// So many random cases, the same ones every time.
pub fn cases(cases: u32) -> Config {
    Config { cases, rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..Config::default() }
}

pub const VOCABULARY: u32 = 1000;

/// Embeddings in [−1, 1) that a token's number says.
pub struct Table {
    pub width: usize,
}

impl TokenEmbeddings for Table {
    fn width(&self) -> usize {
        self.width
    }

    fn embeddings(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let mut rows = Vec::with_capacity(tokens.len() * self.width);
        for &token in tokens {
            if token >= VOCABULARY {
                return Err(BaseError::Input {
                    message: format!("expected a token below {VOCABULARY}, got {token}"),
                });
            }
            rows.extend(
                (0..self.width as u64)
                    .map(|at| (mix(u64::from(token) << 32 | at) >> 40) as f32 / (1u64 << 23) as f32 - 1.0),
            );
        }
        Ok(rows)
    }
}

/// How a [`Plain`] source makes a gist.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// The mean of the children.
    Mean,
    /// Neither linear nor blind to order: Σ (k + 1)·sin(x·(version + 1)) over the block, squashed.
    Curved,
}

/// A source that counts what it is asked for.
pub struct Plain {
    pub kind: Kind,
    pub block: usize,
    pub width: usize,
    pub version: u16,
    pub calls: Cell<usize>,
    pub blocks: Cell<usize>,
}

impl Plain {
    pub fn new(kind: Kind, block: usize, width: usize, version: u16) -> Self {
        Self { kind, block, width, version, calls: Cell::new(0), blocks: Cell::new(0) }
    }
}

impl GistSource for Plain {
    fn block(&self) -> usize {
        self.block
    }

    fn width(&self) -> usize {
        self.width
    }

    fn version(&self) -> u16 {
        self.version
    }

    fn gists(&self, children: &[f32], blocks: usize) -> Result<Vec<f32>> {
        assert_eq!(children.len(), blocks * self.block * self.width);
        assert!(blocks > 0);
        self.calls.set(self.calls.get() + 1);
        self.blocks.set(self.blocks.get() + blocks);
        let mut gists = vec![0.0; blocks * self.width];
        let rows = children.chunks_exact(self.block * self.width).zip(gists.chunks_exact_mut(self.width));
        for (block, gist) in rows {
            for (k, child) in block.chunks_exact(self.width).enumerate() {
                for (g, x) in gist.iter_mut().zip(child) {
                    *g += match self.kind {
                        Kind::Mean => x / self.block as f32,
                        Kind::Curved => (k + 1) as f32 * (x * f32::from(self.version + 1)).sin(),
                    };
                }
            }
            if self.kind == Kind::Curved {
                gist.iter_mut().for_each(|g| *g = g.tanh());
            }
        }
        Ok(gists)
    }
}

pub fn base() -> BaseModel {
    BaseModel { name: "tiny".into(), fingerprint: "0123456789abcdef".into() }
}

pub fn tokens(n: usize, seed: u64) -> Vec<u32> {
    (0..n as u64).map(|i| (mix(seed << 32 | i) % u64::from(VOCABULARY)) as u32).collect()
}

pub fn empty(block: usize, levels: u8, width: usize) -> GistTree {
    GistTree::new(Hierarchy::new(block, levels).unwrap(), width, base()).unwrap()
}

/// A tree of `n` tokens with curved gists of version 0.
pub fn grown(block: usize, levels: u8, width: usize, n: usize) -> GistTree {
    let mut tree = empty(block, levels, width);
    tree.append(&tokens(n, 7), &Table { width }, &Plain::new(Kind::Curved, block, width, 0)).unwrap();
    tree
}

#[track_caller]
pub fn says<T>(result: Result<T>, parts: &[&str]) {
    let error = result.err().expect("must be refused").to_string();
    for part in parts {
        assert!(error.contains(part), "\"{part}\" is missing in: {error}");
    }
}
