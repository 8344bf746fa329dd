//! A history of tokens with its gists: appended to, refreshed when gists become others, never shortened.
//!
//! Source: MegaContext's tree; against it, an append makes every node that it completes, on every level, exactly once,
//! however many tokens come together. What does not fill a block stays on the level below; nothing is padded.
//!
//! Invariant: a node is the source's gist of its children, and of their version (tokens have none), so a subtree is of one
//! version. Hence a refresh takes whole subtrees, and an append refuses to put a node over stale ones.
//!
//! Shapes: K block, E model width, N nodes of a level; gists [N, E] row-major f32. Units: tokens.
//! Errors: a source or embeddings of other sizes, values that are no numbers, versions that do not go together. The tree is
//! then what it was.
//!
//! Left out on purpose: forgetting (the history only grows) and files (`folder`).

use std::ops::{Bound, Range, RangeBounds};

use super::hierarchy::{Hierarchy, Node};
use super::source::{GistSource, TokenEmbeddings, embedded};
use crate::error::{BaseError, Result};

/// Values of children that are handed to a source in one call, at most, where a block is not larger: 16 MiB.
const CALL: usize = 4 << 20;

/// Which model's embedding space gists live in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseModel {
    /// What people call it.
    pub name: String,
    /// [`crate::weights::Weights::fingerprint`].
    pub fingerprint: String,
}

/// A history of tokens and its gists.
#[derive(Clone, Debug, PartialEq)]
pub struct GistTree {
    hierarchy: Hierarchy,
    width: usize,
    base: BaseModel,
    tokens: Vec<u32>,
    /// Those above the tokens, the lowest first.
    levels: Vec<Level>,
}

/// The nodes of one level.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Level {
    /// [N, E].
    pub gists: Vec<f32>,
    /// Version of the source that made each, N of them.
    pub versions: Vec<u16>,
}

fn fail<T>(message: String) -> Result<T> {
    Err(BaseError::Tree { message })
}

impl GistTree {
    /// An empty history of a model of width `width` (E).
    pub fn new(hierarchy: Hierarchy, width: usize, base: BaseModel) -> Result<Self> {
        if width == 0 {
            return fail("width: expected at least 1, got 0".into());
        }
        let levels = vec![Level::default(); usize::from(hierarchy.levels())];
        Ok(Self { hierarchy, width, base, tokens: Vec::new(), levels })
    }

    /// A tree of what was stored: as many nodes as the tokens complete, each of its children's version.
    pub(super) fn from_parts(
        hierarchy: Hierarchy,
        width: usize,
        base: BaseModel,
        tokens: Vec<u32>,
        levels: Vec<Level>,
    ) -> Result<Self> {
        let tree = Self { levels, tokens, ..Self::new(hierarchy, width, base)? };
        if tree.levels.len() != usize::from(hierarchy.levels()) {
            return fail(format!("expected {} levels, got {}", hierarchy.levels(), tree.levels.len()));
        }
        for (lod, level) in (1..).zip(&tree.levels) {
            let nodes = tree.hierarchy.nodes(tree.len(), lod) as usize;
            if [level.gists.len(), level.versions.len()] != [nodes * width, nodes] {
                return fail(format!(
                    "level {lod}: expected {nodes} nodes of {width} values over {} tokens, got {} values and {} versions",
                    tree.tokens.len(),
                    level.gists.len(),
                    level.versions.len()
                ));
            }
        }
        tree.check_versions()?;
        Ok(tree)
    }

    /// Block and levels.
    pub fn hierarchy(&self) -> Hierarchy {
        self.hierarchy
    }

    /// E.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The model whose space the gists live in.
    pub fn base(&self) -> &BaseModel {
        &self.base
    }

    /// Tokens of the history.
    pub fn len(&self) -> u64 {
        self.tokens.len() as u64
    }

    /// Is there no token yet?
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of nodes of a level; those of level 0 are the tokens.
    pub fn nodes(&self, lod: u8) -> u64 {
        if lod > self.hierarchy.levels() { 0 } else { self.hierarchy.nodes(self.len(), lod) }
    }

    /// Is there such a node?
    pub fn contains(&self, node: Node) -> bool {
        node.index < self.nodes(node.lod)
    }

    /// The node of a level that stands for a token, if it is whole.
    pub fn node_at(&self, lod: u8, token: u64) -> Option<Node> {
        let at = (lod <= self.hierarchy.levels()).then(|| self.hierarchy.node_at(lod, token));
        at.filter(|node| self.contains(*node))
    }

    /// The node above, if it is whole.
    pub fn parent(&self, node: Node) -> Option<Node> {
        self.hierarchy.parent(node).filter(|parent| self.contains(*parent))
    }

    fn level(&self, lod: u8) -> Option<&Level> {
        self.levels.get(usize::from(lod).checked_sub(1)?)
    }

    /// All gists of a level, [N, E]; empty for level 0 and beyond the topmost.
    pub fn gists(&self, lod: u8) -> &[f32] {
        self.level(lod).map_or(&[], |level| &level.gists)
    }

    /// The gist of a node, \[E\]; none where there is no such node, or it is a token.
    pub fn gist(&self, node: Node) -> Option<&[f32]> {
        let at = usize::try_from(node.index).ok()?.checked_mul(self.width)?;
        self.level(node.lod)?.gists.get(at..at.checked_add(self.width)?)
    }

    /// The version of the source that made each node of a level.
    pub fn versions(&self, lod: u8) -> &[u16] {
        self.level(lod).map_or(&[], |level| &level.versions)
    }

    /// Nodes made by another version than this one, over all levels.
    pub fn stale(&self, version: u16) -> usize {
        self.levels.iter().flat_map(|level| &level.versions).filter(|v| **v != version).count()
    }

    /// Refuses a tree of another base model.
    pub fn check_base(&self, base: &BaseModel) -> Result<()> {
        if self.base == *base {
            return Ok(());
        }
        let say = |base: &BaseModel| format!("{:?} with fingerprint {:?}", base.name, base.fingerprint);
        fail(format!("expected a tree of the base model {}, got one of {}", say(base), say(&self.base)))
    }

    /// Refuses a source that is not the one that made all nodes: its sizes, its version.
    pub fn check_source(&self, source: &dyn GistSource) -> Result<()> {
        self.check_sizes(source)?;
        let version = source.version();
        match self.levels.iter().flat_map(|level| &level.versions).find(|v| **v != version) {
            None => Ok(()),
            Some(other) => fail(format!(
                "expected nodes of gist version {version}, got {} of other versions, such as {other}: refresh the tree",
                self.stale(version)
            )),
        }
    }

    fn check_sizes(&self, source: &dyn GistSource) -> Result<()> {
        let (expected, got) = ([self.hierarchy.block(), self.width], [source.block(), source.width()]);
        if expected == got {
            return Ok(());
        }
        fail(format!(
            "expected gists of {} entries of width {}, got a source for {} entries of width {}",
            expected[0], expected[1], got[0], got[1]
        ))
    }

    fn check_made_from(&self, embeddings: &dyn TokenEmbeddings, source: &dyn GistSource) -> Result<()> {
        self.check_sizes(source)?;
        if embeddings.width() != self.width {
            return fail(format!("expected embeddings of width {}, got {}", self.width, embeddings.width()));
        }
        let newest = self.levels.iter().flat_map(|level| &level.versions).max();
        match newest.filter(|newest| **newest > source.version()) {
            None => Ok(()),
            Some(newest) => fail(format!(
                "expected a source of gist version {newest} or later, as the tree has such nodes, got version {}",
                source.version()
            )),
        }
    }

    /// Every parent has its children's version.
    fn check_versions(&self) -> Result<()> {
        for (lod, pair) in (2..).zip(self.levels.windows(2)) {
            let blocks = pair[0].versions.chunks_exact(self.hierarchy.block());
            for (index, (parent, children)) in pair[1].versions.iter().zip(blocks).enumerate() {
                if let Some(other) = children.iter().find(|child| *child != parent) {
                    let node = Node { lod, index: index as u64 };
                    return fail(format!(
                        "{node}: expected children of its gist version {parent}, got one of version {other}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Adds tokens and makes every node that they complete, the lowest level first. Returns how many nodes each level got.
    ///
    /// # Errors
    /// Sizes that differ; a token without embedding; gists that are not as many as asked for, or no numbers; nodes of
    /// another version that would get a sibling or a parent of the source's (refresh them first). The tree is unchanged.
    pub fn append(
        &mut self,
        tokens: &[u32],
        embeddings: &dyn TokenEmbeddings,
        source: &dyn GistSource,
    ) -> Result<Vec<usize>> {
        self.check_made_from(embeddings, source)?;
        self.check_siblings(source.version())?;
        let before = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        let grown = self.grow(before, embeddings, source);
        if grown.is_err() {
            self.tokens.truncate(before);
            for (lod, level) in (1..).zip(&mut self.levels) {
                let nodes = self.hierarchy.nodes(before as u64, lod) as usize;
                level.gists.truncate(nodes * self.width);
                level.versions.truncate(nodes);
            }
        }
        grown
    }

    /// Nodes that wait for siblings have to be of the version that those will have.
    fn check_siblings(&self, version: u16) -> Result<()> {
        for lod in 1..self.hierarchy.levels() {
            let first = self.nodes(lod + 1) as usize * self.hierarchy.block();
            if let Some(other) = self.versions(lod)[first..].iter().find(|v| **v != version) {
                let node = Node { lod, index: first as u64 };
                return fail(format!(
                    "append: expected siblings of gist version {version}, got version {other} from {node} on: refresh the \
                     tree from token {} on",
                    self.hierarchy.tokens(node).start
                ));
            }
        }
        Ok(())
    }

    fn grow(
        &mut self,
        before: usize,
        embeddings: &dyn TokenEmbeddings,
        source: &dyn GistSource,
    ) -> Result<Vec<usize>> {
        let (block, width) = (self.hierarchy.block(), self.width);
        // Tokens that complete nothing yet are looked at now: later it would be another append that fails.
        let whole = self.tokens.len() / block * block;
        embedded(embeddings, &self.tokens[whole.max(before)..])?;
        let mut made = Vec::with_capacity(self.levels.len());
        for lod in 1..=self.hierarchy.levels() {
            let (below, level) = self.levels.split_at_mut(usize::from(lod) - 1);
            let below = below.last();
            let level = &mut level[0];
            let first = level.versions.len();
            let last = self.hierarchy.nodes(self.tokens.len() as u64, lod) as usize;
            for nodes in calls(first..last, block * width) {
                let children = nodes.start * block..nodes.end * block;
                let at = Node { lod, index: nodes.start as u64 };
                let gists = match below {
                    None => {
                        let children = embedded(embeddings, &self.tokens[children])?;
                        gists_of(source, &children, nodes.len(), |n| at.after(n))?
                    }
                    Some(below) => {
                        let children = &below.gists[children.start * width..children.end * width];
                        gists_of(source, children, nodes.len(), |n| at.after(n))?
                    }
                };
                level.gists.extend_from_slice(&gists);
            }
            level.versions.resize(last, source.version());
            made.push(last - first);
        }
        Ok(made)
    }

    /// Makes anew the nodes over a range of tokens (`..` for all) that are of an earlier version than the source's, the
    /// lowest level first. The range is widened to whole subtrees, so that no parent stays that does not follow from its
    /// children. Returns how many nodes of each level were made.
    ///
    /// Takes the memory of the nodes it makes once more, until all of them are there.
    ///
    /// # Errors
    /// As for [`GistTree::append`], and a range beyond the history. The tree is unchanged.
    pub fn refresh(
        &mut self,
        tokens: impl RangeBounds<u64>,
        embeddings: &dyn TokenEmbeddings,
        source: &dyn GistSource,
    ) -> Result<Vec<usize>> {
        self.check_made_from(embeddings, source)?;
        let range = self.whole_subtrees(self.range(tokens)?);
        let (block, width, version) = (self.hierarchy.block(), self.width, source.version());
        let mut fresh: Vec<(Vec<usize>, Vec<f32>)> = Vec::with_capacity(self.levels.len());
        for (lod, level) in (1..).zip(&self.levels) {
            let nodes = self.nodes_within(&range, lod);
            let stale: Vec<usize> = nodes.filter(|node| level.versions[*node] != version).collect();
            let mut gists = Vec::with_capacity(stale.len() * width);
            for call in calls(0..stale.len(), block * width) {
                let number = |n: usize| Node { lod, index: stale[call.start + n] as u64 };
                let made = match fresh.last() {
                    None => {
                        let tokens: Vec<u32> = stale[call.clone()]
                            .iter()
                            .flat_map(|node| &self.tokens[node * block..(node + 1) * block])
                            .copied()
                            .collect();
                        gists_of(source, &embedded(embeddings, &tokens)?, call.len(), number)?
                    }
                    // A stale node's children are all stale, and those that have a parent come before those that wait for
                    // one: the n-th stale node's children are the n-th block of the level below.
                    Some((_, below)) => {
                        let children = &below[call.start * block * width..call.end * block * width];
                        gists_of(source, children, call.len(), number)?
                    }
                };
                gists.extend_from_slice(&made);
            }
            fresh.push((stale, gists));
        }
        let mut made = Vec::with_capacity(fresh.len());
        for (level, (stale, gists)) in self.levels.iter_mut().zip(fresh) {
            for (node, gist) in stale.iter().zip(gists.chunks_exact(width)) {
                level.gists[node * width..(node + 1) * width].copy_from_slice(gist);
                level.versions[*node] = version;
            }
            made.push(stale.len());
        }
        Ok(made)
    }

    /// Holds the nodes over a range of tokens against the source: each of its version has to be the gist of its children.
    /// `tolerance` is how far a value may be from it, relative to the value or, where that is more, to the gist's root mean
    /// square: 0 for a tree that was made here, more for one that was stored in 16 bits. Returns how many nodes were held;
    /// those of other versions cannot be.
    ///
    /// # Errors
    /// The first node that is not its children's gist, or not of their version.
    pub fn verify(
        &self,
        tokens: impl RangeBounds<u64>,
        embeddings: &dyn TokenEmbeddings,
        source: &dyn GistSource,
        tolerance: f32,
    ) -> Result<usize> {
        self.check_made_from(embeddings, source)?;
        self.check_versions()?;
        let range = self.range(tokens)?;
        let (block, width) = (self.hierarchy.block(), self.width);
        let mut held = 0;
        for (lod, level) in (1..).zip(&self.levels) {
            for nodes in calls(self.nodes_within(&range, lod), block * width) {
                let at = Node { lod, index: nodes.start as u64 };
                let children = nodes.start * block..nodes.end * block;
                let owned;
                let children = if lod == 1 {
                    owned = embedded(embeddings, &self.tokens[children])?;
                    &owned
                } else {
                    &self.gists(lod - 1)[children.start * width..children.end * width]
                };
                let expected = gists_of(source, children, nodes.len(), |n| at.after(n))?;
                let got = &level.gists[nodes.start * width..nodes.end * width];
                let pairs = expected.chunks_exact(width).zip(got.chunks_exact(width));
                for (node, (expected, got)) in nodes.clone().zip(pairs) {
                    if level.versions[node] != source.version() {
                        continue;
                    }
                    // Embeddings may be of any size, and gists are of theirs.
                    let scale = root_mean_square(expected);
                    let far = |(e, g): (&f32, &f32)| (e - g).abs() > tolerance * e.abs().max(scale);
                    if let Some(at) = expected.iter().zip(got).position(far) {
                        let node = Node { lod, index: node as u64 };
                        return fail(format!(
                            "{node}: expected the gist of its children, {} at {at}, got {}",
                            expected[at], got[at]
                        ));
                    }
                    held += 1;
                }
            }
        }
        Ok(held)
    }

    /// A range of tokens as numbers, refused where it goes beyond the history.
    fn range(&self, tokens: impl RangeBounds<u64>) -> Result<Range<u64>> {
        let start = match tokens.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match tokens.end_bound() {
            Bound::Included(last) => last.saturating_add(1),
            Bound::Excluded(end) => *end,
            Bound::Unbounded => self.len(),
        };
        if start > end || end > self.len() {
            return fail(format!("expected a range of the {} tokens, got {start}..{end}", self.len()));
        }
        Ok(start..end)
    }

    /// The range, widened to the topmost nodes that stand for its ends.
    fn whole_subtrees(&self, range: Range<u64>) -> Range<u64> {
        if range.is_empty() {
            return range;
        }
        let topmost = |token: u64| {
            let node = (0..=self.hierarchy.levels()).rev().find_map(|lod| self.node_at(lod, token));
            self.hierarchy.tokens(node.expect("a token of the history is a node of level 0"))
        };
        topmost(range.start).start..topmost(range.end - 1).end
    }

    /// The nodes of a level all of whose tokens are in a range.
    fn nodes_within(&self, range: &Range<u64>, lod: u8) -> Range<usize> {
        let span = self.hierarchy.span(lod);
        range.start.div_ceil(span) as usize..(range.end / span).max(range.start.div_ceil(span)) as usize
    }
}

fn root_mean_square(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
    (sum / values.len().max(1) as f64).sqrt() as f32
}

/// Nodes in runs whose children have about [`CALL`] values.
fn calls(nodes: Range<usize>, children: usize) -> impl Iterator<Item = Range<usize>> {
    let step = (CALL / children).max(1);
    let end = nodes.end;
    nodes.step_by(step).map(move |from| from..(from + step).min(end))
}

/// What the source makes of `blocks` blocks, refused where it is not a finite gist for each; `node` says which the n-th is.
fn gists_of(
    source: &dyn GistSource,
    children: &[f32],
    blocks: usize,
    node: impl Fn(usize) -> Node,
) -> Result<Vec<f32>> {
    let gists = source.gists(children, blocks)?;
    let width = source.width();
    if gists.len() != blocks * width {
        return fail(format!(
            "gists of {blocks} blocks from {}: expected {} values ({width} each), got {}",
            node(0),
            blocks * width,
            gists.len()
        ));
    }
    if let Some(at) = gists.iter().position(|v| !v.is_finite()) {
        return fail(format!("gist of {}: expected finite numbers, got {}", node(at / width), gists[at]));
    }
    Ok(gists)
}
