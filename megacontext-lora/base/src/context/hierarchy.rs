//! Which tokens an entry stands for: the arithmetic of a K-ary history.
//!
//! Source: MegaContext's tree. Node i of level l stands for the tokens i·K^l … (i + 1)·K^l; its children are the nodes
//! i·K … (i + 1)·K of level l − 1, its parent is node ⌊i/K⌋ of level l + 1. A level has only whole nodes: what is left over
//! stays on the level below.
//!
//! Units: tokens. Errors: a block or a number of levels that is none, spans beyond what positions can say exactly.

use crate::error::{BaseError, Result};
use std::fmt;
use std::ops::Range;

/// The longest span: positions are f64 in the end, and exact up to here.
const LONGEST: u64 = 1 << 53;

/// Block size and number of levels above the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    block: usize,
    levels: u8,
}

/// A node: entry `index` of level `lod`, counted from the first token on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    /// Level; 0 is a token.
    pub lod: u8,
    /// Place in the level.
    pub index: u64,
}

impl Node {
    /// One number for the node: the level in the topmost byte, the index below.
    pub fn id(self) -> u64 {
        u64::from(self.lod) << 56 | self.index
    }

    /// The node `n` places later on the same level.
    pub fn after(self, n: usize) -> Self {
        Self { index: self.index + n as u64, ..self }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "node {} of level {}", self.index, self.lod)
    }
}

impl Hierarchy {
    /// Blocks of `block` (K, at least 2) on `levels` levels above the tokens (at least 1).
    pub fn new(block: usize, levels: u8) -> Result<Self> {
        let fail = |message: String| Err(BaseError::Tree { message });
        if block < 2 {
            return fail(format!("block: expected at least 2 entries, got {block}"));
        }
        if levels == 0 {
            return fail("levels: expected at least 1 above the tokens, got 0".into());
        }
        let span = (block as u64).checked_pow(u32::from(levels)).filter(|span| *span <= LONGEST);
        if span.is_none() {
            return fail(format!(
                "levels: expected spans of at most {LONGEST} tokens, got blocks of {block} on {levels} levels"
            ));
        }
        Ok(Self { block, levels })
    }

    /// K: entries of a level that one of the next stands for.
    pub fn block(self) -> usize {
        self.block
    }

    /// The topmost level.
    pub fn levels(self) -> u8 {
        self.levels
    }

    /// Tokens that an entry of this level stands for, K^lod. The level is one of the hierarchy's.
    pub fn span(self, lod: u8) -> u64 {
        debug_assert!(lod <= self.levels, "level {lod} of {}", self.levels);
        (self.block as u64).pow(u32::from(lod))
    }

    /// Whole nodes that a level has over `tokens` tokens.
    pub fn nodes(self, tokens: u64, lod: u8) -> u64 {
        tokens / self.span(lod)
    }

    /// The node of a level that stands for a token, among others.
    pub fn node_at(self, lod: u8, token: u64) -> Node {
        Node { lod, index: token / self.span(lod) }
    }

    /// The tokens that a node stands for.
    pub fn tokens(self, node: Node) -> Range<u64> {
        let span = self.span(node.lod);
        node.index * span..(node.index + 1) * span
    }

    /// The nodes of the level below that a node is the gist of; none for a token.
    pub fn children(self, node: Node) -> Option<Range<u64>> {
        let block = self.block as u64;
        (node.lod > 0).then(|| node.index * block..(node.index + 1) * block)
    }

    /// The node that stands for this one and its siblings; none on the topmost level. Whether there are siblings enough for
    /// it to exist is the tree's to say.
    pub fn parent(self, node: Node) -> Option<Node> {
        let block = self.block as u64;
        (node.lod < self.levels).then(|| Node { lod: node.lod + 1, index: node.index / block })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_know_their_parent_and_tile_its_span() {
        let hierarchy = Hierarchy::new(4, 3).unwrap();
        for lod in 1..=3 {
            for index in 0..20 {
                let node = Node { lod, index };
                let children: Vec<Node> =
                    hierarchy.children(node).unwrap().map(|index| Node { lod: lod - 1, index }).collect();
                assert_eq!(children.len(), 4);
                let mut next = hierarchy.tokens(node).start;
                for child in children {
                    assert_eq!(hierarchy.parent(child), Some(node));
                    assert_eq!(hierarchy.tokens(child).start, next);
                    assert_eq!(hierarchy.node_at(lod - 1, next), child);
                    next = hierarchy.tokens(child).end;
                }
                assert_eq!(next, hierarchy.tokens(node).end);
            }
        }
        assert_eq!(hierarchy.children(Node { lod: 0, index: 7 }), None);
        assert_eq!(hierarchy.parent(Node { lod: 3, index: 7 }), None);
    }

    #[test]
    fn levels_have_whole_nodes_only() {
        let hierarchy = Hierarchy::new(8, 2).unwrap();
        assert_eq!([0, 1, 2].map(|lod| hierarchy.nodes(69, lod)), [69, 8, 1]);
        assert_eq!([0, 1, 2].map(|lod| hierarchy.nodes(63, lod)), [63, 7, 0]);
    }

    #[test]
    fn a_nodes_number_has_the_level_on_top() {
        assert_eq!(Node { lod: 2, index: 5 }.id(), 0x0200_0000_0000_0005);
        assert!(Node { lod: 1, index: u64::MAX >> 8 }.id() < Node { lod: 2, index: 0 }.id());
    }

    #[test]
    fn a_block_of_one_is_refused() {
        let error = Hierarchy::new(1, 2).unwrap_err().to_string();
        assert_eq!(error, "gist tree: block: expected at least 2 entries, got 1");
    }

    #[test]
    fn a_tree_without_levels_is_refused() {
        let error = Hierarchy::new(32, 0).unwrap_err().to_string();
        assert_eq!(error, "gist tree: levels: expected at least 1 above the tokens, got 0");
    }

    #[test]
    fn spans_beyond_exact_positions_are_refused() {
        assert!(Hierarchy::new(32, 10).is_ok());
        let error = Hierarchy::new(32, 11).unwrap_err().to_string();
        assert!(error.contains("at most 9007199254740992 tokens, got blocks of 32 on 11 levels"), "{error}");
        assert!(Hierarchy::new(usize::MAX, 255).is_err());
    }
}
