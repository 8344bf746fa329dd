//! What a model is shown of a history: entries of mixed levels that follow one another, edited within a budget.
//!
//! Source: MegaContext's working context. An entry is a node of the tree at the token its span begins with. Expanding puts
//! K children in the place of a gist, collapsing puts one parent in the place of K siblings; nothing else changes, and no
//! edit does half of it. Against the original: only aligned siblings collapse, so that the gist stands for exactly the
//! tokens that it replaces; the budget holds after every edit; nothing is cut off at the head to make it hold; and the
//! recent tail is protected by where spans end.
//!
//! Invariants, held after every call: an entry begins where the one before it ends, at a multiple of its span, and the tree
//! has its node; there are at most `budget` entries; what ends among the newest `protected` tokens is a token.
//!
//! Units: tokens for positions, coverage and the tail; entries for cost and budget; iterations of the allocator for ages.
//! Errors: entries that are no working context, edits that would make it none. Nothing has changed then.
//!
//! Left out on purpose: which edits are worth making (the focus allocator).

use std::fmt;
use std::ops::Range;

use super::hierarchy::{Hierarchy, Node};
use super::tree::GistTree;
use crate::error::{BaseError, Result};

/// An entry: which level, and where its span begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    /// The first token of its span.
    pub start: u64,
    /// Level; 0 is a token.
    pub lod: u8,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "level {} at token {}", self.lod, self.start)
    }
}

/// What a working context has to keep to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    budget: usize,
    protected: u64,
}

impl Limits {
    /// At most `budget` entries (W_max); the newest `protected` tokens stay tokens.
    pub fn new(budget: usize, protected: u64) -> Result<Self> {
        if budget == 0 {
            return fail("budget: expected at least 1 entry, got 0".into());
        }
        if protected > budget as u64 {
            return fail(format!(
                "budget: expected room for the {protected} protected tokens at least, got {budget} entries"
            ));
        }
        Ok(Self { budget, protected })
    }

    /// W_max, in entries.
    pub fn budget(self) -> usize {
        self.budget
    }

    /// The newest tokens that stay tokens.
    pub fn protected(self) -> u64 {
        self.protected
    }
}

/// How an entry came to be what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It has been so since the context was made, or its token came.
    Placed,
    /// The gist above it was expanded.
    Expanded,
    /// Its children were collapsed.
    Collapsed,
}

/// How long an entry has been what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residency {
    /// Iterations of the allocator since its last change.
    pub age: u32,
    /// That change.
    pub change: Change,
}

/// Entries of mixed levels, one after another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingContext {
    hierarchy: Hierarchy,
    limits: Limits,
    entries: Vec<Entry>,
    /// As many as entries.
    residency: Vec<Residency>,
}

pub(super) fn fail<T>(message: String) -> Result<T> {
    Err(BaseError::WorkingContext { message })
}

impl WorkingContext {
    /// A context of these entries over a tree.
    ///
    /// # Errors
    /// No entry at all; a level that the tree has not; a start that is no multiple of the span; a gap or an overlap; a span
    /// beyond the history; more entries than the budget; a gist in the protected tail.
    pub fn new(entries: Vec<Entry>, tree: &GistTree, limits: Limits) -> Result<Self> {
        let placed = Residency { age: 0, change: Change::Placed };
        let residency = vec![placed; entries.len()];
        let context = Self { hierarchy: tree.hierarchy(), limits, entries, residency };
        context.check(tree.len())?;
        Ok(context)
    }

    /// Holds every invariant, over a history of `tokens` tokens.
    fn check(&self, tokens: u64) -> Result<()> {
        self.check_tiling(tokens)?;
        self.check_limits()
    }

    /// Holds that nodes of the tree follow one another.
    fn check_tiling(&self, tokens: u64) -> Result<()> {
        if self.entries.is_empty() {
            return fail("expected at least one entry, got none".into());
        }
        let mut next = None;
        for (at, entry) in self.entries.iter().enumerate() {
            if entry.lod > self.hierarchy.levels() {
                return fail(format!(
                    "entry {at}: expected a level of the tree, at most {}, got {}",
                    self.hierarchy.levels(),
                    entry.lod
                ));
            }
            let span = self.hierarchy.span(entry.lod);
            if !entry.start.is_multiple_of(span) {
                return fail(format!(
                    "entry {at}: expected a start that is a multiple of its span of {span} tokens, got {entry}"
                ));
            }
            if let Some(next) = next.filter(|next| *next != entry.start) {
                let what = if entry.start > next { "a gap" } else { "an overlap" };
                return fail(format!(
                    "entry {at}: expected to begin at token {next}, where the entry before it ends, got {entry}: {what} of {} \
                     tokens",
                    entry.start.abs_diff(next)
                ));
            }
            match entry.start.checked_add(span).filter(|end| *end <= tokens) {
                Some(end) => next = Some(end),
                None => {
                    return fail(format!(
                        "entry {at}: expected a span within the history of {tokens} tokens, got {entry}, {span} tokens long"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Holds budget and protected tail.
    fn check_limits(&self) -> Result<()> {
        self.check_budget(self.entries.len(), "the context")?;
        let tail = self.protected_from();
        match self.entries.iter().position(|entry| entry.lod > 0 && self.span_of(*entry).end > tail) {
            None => Ok(()),
            Some(at) => fail(format!(
                "entry {at}: expected tokens from token {tail} on, the protected tail, got {}",
                self.entries[at]
            )),
        }
    }

    fn check_budget(&self, entries: usize, what: &str) -> Result<()> {
        if entries <= self.limits.budget {
            return Ok(());
        }
        fail(format!("{what}: expected at most {} entries, the budget, got {entries}", self.limits.budget))
    }

    /// The same entries, as old as they are, within other limits.
    ///
    /// # Errors
    /// More entries than the budget; a gist in the protected tail.
    pub fn with_limits(&self, limits: Limits) -> Result<Self> {
        let context = Self { limits, ..self.clone() };
        context.check_limits()?;
        Ok(context)
    }

    /// A context of other entries for the same tokens, within the same limits; all of them new.
    ///
    /// # Errors
    /// As [`WorkingContext::new`]; entries for other tokens.
    pub fn with_entries(&self, entries: Vec<Entry>) -> Result<Self> {
        let residency = vec![Residency { age: 0, change: Change::Placed }; entries.len()];
        let context = Self { entries, residency, ..self.clone() };
        let expected = self.coverage();
        context.check_tiling(expected.end)?;
        let got = context.coverage();
        if expected != got {
            return fail(format!(
                "expected entries for the tokens {}..{}, got some for {}..{}",
                expected.start, expected.end, got.start, got.end
            ));
        }
        context.check_limits()?;
        Ok(context)
    }

    /// The entries.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Number of entries, which is the context's cost.
    pub fn cost(&self) -> usize {
        self.entries.len()
    }

    /// Budget and protected tail.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Block and levels of the tree that it is over.
    pub fn hierarchy(&self) -> Hierarchy {
        self.hierarchy
    }

    /// The tokens that the entries stand for together.
    pub fn coverage(&self) -> Range<u64> {
        match (self.entries.first(), self.entries.last()) {
            (Some(first), Some(last)) => first.start..self.span_of(*last).end,
            _ => 0..0,
        }
    }

    /// Where the protected tail begins: what ends after this token is a token.
    pub fn protected_from(&self) -> u64 {
        self.coverage().end.saturating_sub(self.limits.protected)
    }

    /// The tokens that an entry stands for.
    pub fn span_of(&self, entry: Entry) -> Range<u64> {
        entry.start..entry.start + self.hierarchy.span(entry.lod)
    }

    /// The tree's node of an entry.
    pub fn node_of(&self, entry: Entry) -> Node {
        self.hierarchy.node_at(entry.lod, entry.start)
    }

    /// The entry that stands for a token.
    pub fn index_at(&self, token: u64) -> Option<usize> {
        if !self.coverage().contains(&token) {
            return None;
        }
        self.entries.partition_point(|entry| entry.start <= token).checked_sub(1)
    }

    /// How long each entry has been what it is; as many as entries.
    pub fn residency(&self) -> &[Residency] {
        &self.residency
    }

    /// One iteration of the allocator has passed.
    pub fn advance_residency(&mut self) {
        for residency in &mut self.residency {
            residency.age = residency.age.saturating_add(1);
        }
    }

    /// The K entries that an entry would collapse together with: it and its siblings, if all of them are there as entries.
    pub fn siblings(&self, index: usize) -> Option<Range<usize>> {
        let entry = *self.entries.get(index)?;
        let parent = self.hierarchy.parent(self.node_of(entry))?;
        let start = self.hierarchy.tokens(parent).start;
        let before = usize::try_from((entry.start - start) / self.hierarchy.span(entry.lod)).ok()?;
        let first = index.checked_sub(before)?;
        let siblings = first..first + self.hierarchy.block();
        let entries = self.entries.get(siblings.clone())?;
        (entries[0].start == start && entries.iter().all(|e| e.lod == entry.lod)).then_some(siblings)
    }

    /// Whether [`WorkingContext::expand`] would do it, and if not, why.
    pub fn check_expand(&self, index: usize) -> Result<()> {
        let entry = self.entry(index, "expand")?;
        if entry.lod == 0 {
            return fail(format!("expand entry {index}: expected a gist, got {entry}, a token"));
        }
        self.check_budget(
            self.entries.len() + self.hierarchy.block() - 1,
            &format!("expand entry {index}, {entry}"),
        )
    }

    /// Whether [`WorkingContext::collapse`] would do it, and if not, why.
    pub fn check_collapse(&self, index: usize) -> Result<()> {
        let entry = self.entry(index, "collapse")?;
        let block = self.hierarchy.block();
        let Some(parent) = self.hierarchy.parent(self.node_of(entry)) else {
            return fail(format!(
                "collapse entry {index}: expected an entry below level {}, the tree's topmost, got {entry}",
                self.hierarchy.levels()
            ));
        };
        let span = self.hierarchy.tokens(parent);
        if entry.start != span.start {
            return fail(format!(
                "collapse entry {index}: expected the first of {block} siblings, at a multiple of {} tokens, got {entry}",
                span.end - span.start
            ));
        }
        if self.siblings(index).is_none() {
            let found = self.entries[index..].iter().take(block).take_while(|e| e.lod == entry.lod).count();
            return fail(format!(
                "collapse entry {index}: expected all {block} siblings as entries, got {found} from {entry} on"
            ));
        }
        let tail = self.protected_from();
        if span.end > tail {
            return fail(format!(
                "collapse entry {index}: expected a span that ends by token {tail}, where the protected tail begins, got \
                 {}..{}",
                span.start, span.end
            ));
        }
        Ok(())
    }

    fn entry(&self, index: usize, edit: &str) -> Result<Entry> {
        match self.entries.get(index) {
            Some(entry) => Ok(*entry),
            None => {
                fail(format!("{edit}: expected one of {} entries, got entry {index}", self.entries.len()))
            }
        }
    }

    /// Puts its K children in the place of the gist at `index`: K − 1 entries more.
    ///
    /// # Errors
    /// No such entry, a token, or no room for the children.
    pub fn expand(&mut self, index: usize) -> Result<()> {
        self.check_expand(index)?;
        let Entry { start, lod } = self.entries[index];
        let span = self.hierarchy.span(lod - 1);
        let children =
            (0..self.hierarchy.block() as u64).map(|n| Entry { start: start + n * span, lod: lod - 1 });
        self.entries.splice(index..=index, children);
        let young = Residency { age: 0, change: Change::Expanded };
        self.residency.splice(index..=index, std::iter::repeat_n(young, self.hierarchy.block()));
        Ok(())
    }

    /// Puts their parent in the place of the K siblings from `index` on: K − 1 entries fewer.
    ///
    /// # Errors
    /// No such entry; one of the topmost level, not the first of its siblings or without some of them; a span that ends in
    /// the protected tail.
    pub fn collapse(&mut self, index: usize) -> Result<()> {
        self.check_collapse(index)?;
        let siblings = index..index + self.hierarchy.block();
        let Entry { start, lod } = self.entries[index];
        self.entries.splice(siblings.clone(), [Entry { start, lod: lod + 1 }]);
        self.residency.splice(siblings, [Residency { age: 0, change: Change::Collapsed }]);
        Ok(())
    }

    /// Takes in the tokens that the history has got since, as tokens.
    ///
    /// # Errors
    /// No room for them (collapse first); a tree of other blocks or levels, or with fewer tokens than are covered.
    pub fn extend_to(&mut self, tree: &GistTree) -> Result<()> {
        self.check_tree(tree)?;
        let new = self.coverage().end..tree.len();
        let cost = self.entries.len() + (new.end - new.start) as usize;
        self.check_budget(cost, &format!("with the tokens {}..{}", new.start, new.end))?;
        self.entries.extend(new.map(|start| Entry { start, lod: 0 }));
        self.residency.resize(self.entries.len(), Residency { age: 0, change: Change::Placed });
        Ok(())
    }

    /// Is this the tree that the context is over?
    pub(super) fn check_tree(&self, tree: &GistTree) -> Result<()> {
        let say = |h: Hierarchy| format!("blocks of {} on {} levels", h.block(), h.levels());
        if tree.hierarchy() != self.hierarchy {
            return fail(format!(
                "expected a tree of {}, got {}",
                say(self.hierarchy),
                say(tree.hierarchy())
            ));
        }
        let end = self.coverage().end;
        if tree.len() < end {
            return fail(format!("expected a tree of at least {end} tokens, got {}", tree.len()));
        }
        Ok(())
    }
}
