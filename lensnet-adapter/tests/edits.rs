//! Edits that another allocator chose, and room for new tokens: every invariant over random trees and contexts; what is refused.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

#[path = "common/trees.rs"]
mod trees;

use lensnet_adapter::allocator::{Action, AllocatorConfig, decide};
use lensnet_adapter::edits::{Allocator, Wanted, follow, towards};
use lensnet_adapter::room::{make_room, widen};
use megacontext_base::context::{Change, Entry, GistTree, Residency, WorkingContext};
use megacontext_base::error::Result;
use megacontext_base::random::Random;
use proptest::prelude::*;
use trees::{append, cases, limits, tree};

fn entry(start: u64, lod: u8) -> Entry {
    Entry { start, lod }
}

fn wanted(action: Action, start: u64, lod: u8) -> Wanted {
    Wanted { action, entry: entry(start, lod) }
}

/// Random edits of the context, and an iteration between two of them.
fn shaken(context: &WorkingContext, random: &mut Random) -> WorkingContext {
    let mut shaken = context.clone();
    for _ in 0..random.below(12) {
        let at = random.below(shaken.cost());
        // What is not legal is not made.
        let _ = if random.below(2) == 0 { shaken.expand(at) } else { shaken.collapse(at) };
        shaken.advance_residency();
    }
    shaken
}

/// A tree with a context of it.
fn begun(block: usize, levels: u8, tokens: usize, seed: u64) -> (GistTree, WorkingContext, Random) {
    let tree = tree(block, levels, tokens);
    let context = WorkingContext::recent(&tree, limits(tokens, 3)).unwrap();
    let mut random = Random::new(seed);
    (tree, shaken(&context, &mut random), random)
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn edits_lead_to_any_context_of_the_same_tokens(
        block in 2usize..5, levels in 1u8..4, tokens in 12usize..80, seed in any::<u64>(),
    ) {
        let (_, from, mut random) = begun(block, levels, tokens, seed);
        let to = shaken(&shaken(&from, &mut random), &mut random);
        // The budget is the larger of the two: there is not one entry to spare on the way.
        let limits = limits(from.cost().max(to.cost()), 3);
        let from = from.with_limits(limits).unwrap();
        let scores = vec![0.25; from.cost()];
        let edits = towards(&from, to.entries()).unwrap();
        let mut context = from.clone();
        let made = follow(&mut context, &scores, &edits).unwrap();
        prop_assert_eq!(context.entries(), to.entries());
        prop_assert!(made.iter().all(|edit| edit.cost_after <= limits.budget()));
        prop_assert!(made.iter().all(|edit| edit.score.is_nan() || edit.score == 0.25));
        // What stayed is as old as it was, what changed is new.
        for (entry, residency) in context.entries().iter().zip(context.residency()) {
            let stayed = from.entries().iter().position(|other| other == entry);
            match stayed {
                Some(at) => prop_assert_eq!(*residency, from.residency()[at]),
                None => prop_assert!(residency.age == 0 && residency.change != Change::Placed),
            }
        }
    }

    #[test]
    fn new_tokens_find_room(
        block in 2usize..5, levels in 1u8..4, tokens in 12usize..80, new in 1usize..20, seed in any::<u64>(),
    ) {
        let (mut tree, from, mut random) = begun(block, levels, tokens, seed);
        append(&mut tree, new);
        let protected = random.below(new + 4) as u64;
        let wide = widen(&from, &tree, limits(from.cost(), protected.min(3))).unwrap();
        prop_assert_eq!(wide.coverage(), 0..tree.len());
        prop_assert_eq!(wide.cost(), from.cost() + new);
        let scores: Vec<f32> = (0..wide.cost()).map(|_| random.uniform(-1.0, 1.0) as f32).collect();
        let limits = limits(from.cost(), protected.min(3));
        let mut context = wide.clone();
        let mut asked = 0;
        let made = make_room(&mut context, limits, 2, &mut |shown| {
            asked += 1;
            Ok(if asked == 1 { scores.clone() } else { vec![0.0; shown.cost()] })
        });
        match made {
            Ok(edits) => {
                prop_assert!(context.cost() <= limits.budget() && context.cost() + block > limits.budget() + 1);
                prop_assert_eq!(context.coverage(), wide.coverage());
                prop_assert_eq!(context.limits(), limits);
                prop_assert!(edits.iter().all(|edit| edit.action == Action::Collapse));
            }
            // Only where nothing can collapse any more.
            Err(error) => {
                prop_assert!(error.to_string().contains("budget: expected room for"), "{}", error);
                prop_assert_eq!(context, wide);
            }
        }
    }
}

#[test]
fn what_is_worth_least_makes_room_and_what_just_expanded_goes_last() {
    let mut tree = tree(4, 2, 16);
    let mut context = WorkingContext::recent(&tree, limits(16, 0)).unwrap();
    // The first block has been expanded in this iteration, the third in an earlier one.
    for (start, iterations) in [(8, 3), (0, 0)] {
        let at = context.index_at(start).unwrap();
        context.collapse(at).unwrap();
        context.expand(at).unwrap();
        (0..iterations).for_each(|_| context.advance_residency());
    }
    append(&mut tree, 4);
    let limits = limits(16, 0);
    let by_block = [-0.9, -0.2, -0.5, 0.0, -0.4];
    let mut score = |shown: &WorkingContext| {
        Ok(shown.entries().iter().map(|e| by_block[(e.start / 4) as usize]).collect::<Vec<f32>>())
    };
    let mut wide = widen(&context, &tree, limits).unwrap();
    let edits = make_room(&mut wide, limits, 2, &mut score).unwrap();
    assert_eq!(edits.iter().map(|edit| edit.entry).collect::<Vec<_>>(), [entry(8, 0), entry(16, 0)]);
    assert_eq!(edits.iter().map(|edit| edit.score).collect::<Vec<_>>(), [-0.5, -0.4]);
    assert_eq!((wide.cost(), edits[1].cost_after), (14, 14));
    // Without a cooldown the lowest goes first.
    let mut wide = widen(&context, &tree, limits).unwrap();
    let edits = make_room(&mut wide, limits, 0, &mut score).unwrap();
    assert_eq!(edits.iter().map(|edit| edit.entry.start).collect::<Vec<_>>(), [0, 8]);
}

#[test]
fn a_longer_tail_is_held_to_where_the_new_tokens_end() {
    let mut tree = tree(4, 1, 8);
    let mut context = WorkingContext::recent(&tree, limits(8, 0)).unwrap();
    context.collapse(4).unwrap();
    assert!(widen(&context, &tree, limits(8, 3)).is_err());
    append(&mut tree, 3);
    assert_eq!(widen(&context, &tree, limits(8, 3)).unwrap().cost(), 8);
}

/// What an allocator answers, whatever it is shown.
struct Always(Option<Vec<Wanted>>);

impl Allocator for Always {
    fn choose(&self, context: &WorkingContext, scores: &[f32]) -> Result<Option<Vec<Wanted>>> {
        assert_eq!(context.cost(), scores.len());
        Ok(self.0.clone())
    }
}

#[test]
fn another_allocator_chooses_or_leaves_the_choice() {
    let tree = tree(4, 1, 16);
    let entries = [0, 4, 8, 12].map(|start| entry(start, 1)).to_vec();
    let begun = WorkingContext::new(entries, &tree, limits(10, 0)).unwrap();
    let decide = |other: Option<&dyn Allocator>| {
        let mut context = begun.clone();
        let mut score = |shown: &WorkingContext| {
            Ok(shown.entries().iter().map(|e| if e.lod == 1 { 0.9 } else { 0.0 }).collect())
        };
        let mut random = Random::new(1);
        let done = decide(other, &AllocatorConfig::default(), &mut context, &mut score, &mut random).unwrap();
        (context, done)
    };
    // By the rules it would be the first.
    let third = Always(Some(vec![wanted(Action::Expand, 8, 1)]));
    let (context, done) = decide(Some(&third));
    assert_eq!(context.cost(), 7);
    assert_eq!(context.entries()[2], entry(8, 0));
    assert_eq!((done.num_expand, done.swap_rate, done.wc_length), (1, 0.25, 7));
    assert_eq!(done.edits().next().unwrap().score, 0.9);
    let (context, done) = decide(Some(&Always(Some(Vec::new()))));
    assert_eq!((&context, done.num_expand, done.rounds.len()), (&begun, 0, 0));
    let left = decide(Some(&Always(None)));
    assert_eq!(left, decide(None));
    assert_eq!(left.1.num_expand, 2);
}

#[track_caller]
fn refused(edits: &[Wanted], expected: &str) {
    let tree = tree(4, 2, 20);
    let mut entries: Vec<Entry> = (0..4).map(|n| entry(4 * n, 1)).collect();
    entries.extend((16..20).map(|start| entry(start, 0)));
    let begun = WorkingContext::new(entries, &tree, limits(11, 4)).unwrap();
    let mut context = begun.clone();
    let error = follow(&mut context, &[0.0; 8], edits).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
    assert_eq!(context, begun);
}

#[test]
fn an_edit_of_no_entry_is_refused() {
    refused(
        &[wanted(Action::Expand, 0, 2)],
        "edit 0: expected an entry of the context, got level 2 at token 0",
    );
    refused(&[wanted(Action::Expand, 5, 1)], "edit 0: expected an entry of the context");
    refused(&[wanted(Action::Collapse, 99, 0)], "edit 0: expected an entry of the context");
    let twice = [wanted(Action::Expand, 4, 1); 2];
    refused(&twice, "edit 1: expected an entry of the context, got level 1 at token 4");
}

#[test]
fn an_expand_beyond_the_budget_is_refused() {
    let both = [wanted(Action::Expand, 4, 1), wanted(Action::Expand, 8, 1)];
    refused(
        &both,
        "edit 1: expand entry 5, level 1 at token 8: expected at most 11 entries, the budget, got 14",
    );
}

#[test]
fn an_expand_of_a_token_is_refused() {
    refused(
        &[wanted(Action::Expand, 17, 0)],
        "edit 0: expand entry 5: expected a gist, got level 0 at token 17",
    );
}

#[test]
fn a_collapse_of_the_protected_tail_or_without_all_siblings_is_refused() {
    refused(&[wanted(Action::Collapse, 16, 0)], "expected a span that ends by token 16");
    let both = [wanted(Action::Expand, 4, 1), wanted(Action::Collapse, 0, 1)];
    refused(&both, "edit 1: collapse entry 0: expected all 4 siblings as entries, got 1");
    refused(&[wanted(Action::Collapse, 4, 1)], "expected the first of 4 siblings");
}

#[test]
fn entries_that_are_no_context_of_the_same_tokens_are_refused() {
    let tree = tree(4, 1, 12);
    let context = WorkingContext::recent(&tree, limits(12, 2)).unwrap();
    let gists = |starts: &[u64]| starts.iter().map(|start| entry(*start, 1)).collect::<Vec<_>>();
    let with_tail = |starts: &[u64]| {
        let mut all = gists(starts);
        all.extend((8..12).map(|start| entry(start, 0)));
        all
    };
    let refused = |entries: &[Entry], expected: &str| {
        let error = towards(&context, entries).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    refused(&[], "expected at least one entry");
    refused(&with_tail(&[4]), "expected entries for the tokens 0..12, got some for 4..12");
    refused(&gists(&[0, 4]), "expected entries for the tokens 0..12, got some for 0..8");
    refused(&with_tail(&[0, 0]), "an overlap of 4 tokens");
    refused(&with_tail(&[0]), "a gap of 4 tokens");
    refused(&with_tail(&[0, 5]), "expected a start that is a multiple of its span");
    refused(&gists(&[0, 4, 8]), "expected tokens from token 10 on, the protected tail");
    refused(&[entry(0, 2)], "expected a level of the tree, at most 1, got 2");
    let placed = Residency { age: 0, change: Change::Placed };
    assert!(context.with_entries(with_tail(&[0, 4])).unwrap().residency().iter().all(|r| *r == placed));
}
