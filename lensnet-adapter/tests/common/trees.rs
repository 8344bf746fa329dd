//! Trees whose gists are plain to compute.

// Each test file uses some of it.
#![allow(dead_code)]

use megacontext_base::context::{BaseModel, GistSource, GistTree, Hierarchy, Limits, TokenEmbeddings};
use megacontext_base::error::Result;
use proptest::test_runner::{Config, RngSeed};

/// So many random cases, the same ones every time.
pub fn cases(cases: u32) -> Config {
    Config { cases, rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..Config::default() }
}

/// A token's embedding is its number.
pub struct Numbers;

impl TokenEmbeddings for Numbers {
    fn width(&self) -> usize {
        1
    }

    fn embeddings(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        Ok(tokens.iter().map(|token| *token as f32).collect())
    }
}

/// A gist is the mean of its children.
struct Mean(usize);

impl GistSource for Mean {
    fn block(&self) -> usize {
        self.0
    }

    fn width(&self) -> usize {
        1
    }

    fn version(&self) -> u16 {
        0
    }

    fn gists(&self, children: &[f32], _: usize) -> Result<Vec<f32>> {
        Ok(children.chunks_exact(self.0).map(|block| block.iter().sum::<f32>() / self.0 as f32).collect())
    }
}

/// A tree of the tokens 0 … n − 1.
pub fn tree(block: usize, levels: u8, n: usize) -> GistTree {
    let base = BaseModel { name: "tiny".into(), fingerprint: "0123456789abcdef".into() };
    let mut tree = GistTree::new(Hierarchy::new(block, levels).unwrap(), 1, base).unwrap();
    append(&mut tree, n);
    tree
}

/// The next `n` tokens.
pub fn append(tree: &mut GistTree, n: usize) {
    let from = tree.len() as u32;
    let tokens: Vec<u32> = (from..from + n as u32).collect();
    let source = Mean(tree.hierarchy().block());
    tree.append(&tokens, &Numbers, &source).unwrap();
}

pub fn limits(budget: usize, protected: u64) -> Limits {
    Limits::new(budget, protected).unwrap()
}
