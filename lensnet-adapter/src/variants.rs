//! Working contexts to compare: the newest tokens alone, and random coarser views of more of them, at the same length.
//!
//! Source: MegaContext's training variants. The baseline is the newest L tokens. A variant begins with a context that covers more
//! and has random nodes of it collapsed until L entries are left: of level 1, with probability 0.1 of level 2. Against the
//! original, whose runs begin anywhere, so that most of its gists stand for other tokens than they replace: only whole nodes of
//! the tree collapse.
//!
//! Length: an edit frees a multiple of K − 1 entries, so L is met exactly where it is that far from the length before
//! ([`length`] gives such); else a variant has the next fewer, more than L − (K − 1). A node of level 2 is only taken where this
//! stays so. Where no node of the level drawn is left, the lowest level that has one gives it; so a variant is found whenever
//! the coarsest view is short enough.
//!
//! Units: entries for lengths, tokens for what is protected. Errors: `BaseError::Network` for settings that mean nothing and
//! lengths that nothing reaches; `BaseError::WorkingContext` where the protected tail is not of tokens.
//! Left out on purpose: what contexts lose (the base model says), and how many variants are alike: short contexts have few.

use std::ops::Range;

use megacontext_base::context::{Entry, GistTree, Hierarchy, Limits, Node, WorkingContext};
use megacontext_base::error::{BaseError, Result};
use megacontext_base::random::Random;
use serde::{Deserialize, Serialize};

/// The name of this in errors.
const VARIANTS: &str = "working context variants";

/// Settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VariantConfig {
    /// How many.
    pub count: usize,
    /// Probability that a node of level 2 is collapsed rather than one of level 1.
    pub level2: f64,
    /// The newest tokens that stay tokens.
    pub recent: u64,
}

impl Default for VariantConfig {
    fn default() -> Self {
        Self { count: 4, level2: 0.1, recent: 128 }
    }
}

impl VariantConfig {
    /// Are these settings that mean something?
    ///
    /// # Errors
    /// When the probability is none.
    pub fn check(&self) -> Result<()> {
        match (0.0..=1.0).contains(&self.level2) {
            true => Ok(()),
            false => refuse(format!("level2: expected a probability, 0 to 1, got {}", self.level2)),
        }
    }
}

fn refuse<T>(message: String) -> Result<T> {
    Err(BaseError::network(VARIANTS, message))
}

/// L after a part `progress` of training, from 0.9 to 0.75 of `most` entries: the longest that `most` is a multiple of K − 1
/// away from.
pub fn length(most: usize, block: usize, progress: f64) -> usize {
    let progress = progress.clamp(0.0, 1.0);
    let wanted = most as f64 * (0.9 * (1.0 - progress) + 0.75 * progress);
    exact(most, block, wanted as usize)
}

/// The largest number up to `wanted` that is a multiple of K − 1 below `from`; 0 where there is none.
fn exact(from: usize, block: usize, wanted: usize) -> usize {
    let step = block.saturating_sub(1).max(1);
    from.saturating_sub(from.saturating_sub(wanted).div_ceil(step) * step)
}

/// The newest `length` tokens, as tokens.
///
/// # Errors
/// When there are none, or the protected ones are more.
pub fn baseline(config: &VariantConfig, tree: &GistTree, length: usize) -> Result<WorkingContext> {
    WorkingContext::recent(tree, Limits::new(length, config.recent)?)
}

/// Random coarser views of `context`, of `length` entries or the next fewer, which is also their budget. The coverage is kept.
///
/// # Errors
/// Settings or a tree that do not fit; a gist among the recent tokens; a length that is 0, the protected tail alone exceeds, or
/// not even the coarsest view has.
pub fn variants(
    config: &VariantConfig,
    context: &WorkingContext,
    tree: &GistTree,
    length: usize,
    random: &mut Random,
) -> Result<Vec<WorkingContext>> {
    config.check()?;
    let limits = Limits::new(length, config.recent)?;
    let wide = Limits::new(context.cost().max(config.recent as usize), config.recent)?;
    let start = WorkingContext::new(context.entries().to_vec(), tree, wide)?;
    (0..config.count)
        .map(|_| {
            let mut variant = start.clone();
            coarsen(config, &mut variant, length, random)?;
            WorkingContext::new(variant.entries().to_vec(), tree, limits)
        })
        .collect()
}

/// Collapses random nodes until there are `length` entries or the next fewer.
fn coarsen(
    config: &VariantConfig,
    context: &mut WorkingContext,
    length: usize,
    random: &mut Random,
) -> Result<()> {
    let hierarchy = context.hierarchy();
    let least = exact(context.cost(), hierarchy.block(), length);
    while context.cost() > length {
        let spare = context.cost() - least;
        let drawn = if random.unit() < config.level2 { 2 } else { 1 };
        let others = (1..=hierarchy.levels()).filter(|lod| *lod != drawn);
        let levels = (drawn <= hierarchy.levels()).then_some(drawn).into_iter().chain(others);
        let mut open = Vec::new();
        for lod in levels {
            open = collapsible(context, lod, spare);
            if !open.is_empty() {
                break;
            }
        }
        if open.is_empty() {
            return refuse(format!(
                "length: expected at least {}, the entries of the coarsest view of tokens {}..{}, got {length}",
                context.cost(),
                context.coverage().start,
                context.coverage().end
            ));
        }
        collapse(context, open[random.below(open.len())])?;
    }
    Ok(())
}

/// Nodes of a level that are whole in the context, end before the protected tail, are not entries or parts of one yet, and free at
/// most `spare` entries.
fn collapsible(context: &WorkingContext, lod: u8, spare: usize) -> Vec<Node> {
    let hierarchy = context.hierarchy();
    let span = hierarchy.span(lod);
    let nodes = context.coverage().start.div_ceil(span)..context.protected_from() / span;
    let finer = |node: &Node| {
        entries_of(context, hierarchy, *node)
            .is_some_and(|entries| entries.len() > 1 && entries.len() - 1 <= spare)
    };
    nodes.map(|index| Node { lod, index }).filter(finer).collect()
}

/// The entries that a node would replace: more than one where it is neither an entry nor part of one.
fn entries_of(context: &WorkingContext, hierarchy: Hierarchy, node: Node) -> Option<Range<usize>> {
    let tokens = hierarchy.tokens(node);
    Some(context.index_at(tokens.start)?..context.index_at(tokens.end - 1)? + 1)
}

/// Makes one entry of a node, from below.
fn collapse(context: &mut WorkingContext, node: Node) -> Result<()> {
    let hierarchy = context.hierarchy();
    if let Some(children) = hierarchy.children(node) {
        let start = hierarchy.tokens(node).start;
        for index in children {
            let child = Node { lod: node.lod - 1, index };
            if entries_of(context, hierarchy, child).is_some_and(|entries| entries.len() > 1) {
                collapse(context, child)?;
            }
        }
        let at = context.index_at(start).expect("collapses keep what a context covers");
        debug_assert_eq!(context.entries()[at], Entry { start, lod: node.lod - 1 });
        context.collapse(at)?;
    }
    Ok(())
}
