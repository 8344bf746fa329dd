//! Working contexts: every edit of random sequences against a plain list of entries that is checked as a whole; rebuilding
//! against collapsing one block at a time; what a decoder is given; what is refused.

use megacontext_base::context::{
    Change, ContextInput, Entry, GistTree, Limits, NO_TOKEN, Node, Residency, TokenEmbeddings, WorkingContext,
};
use megacontext_base::rope::{Rope, RopeScaling, SigmaPreset, SigmaRule};
use proptest::prelude::*;

use super::support::{Kind, Plain, Table, cases, empty, grown, says, tokens};

fn entry(start: u64, lod: u8) -> Entry {
    Entry { start, lod }
}

fn limits(budget: usize, protected: u64) -> Limits {
    Limits::new(budget, protected).unwrap()
}

/// Is this list a working context over the tree, by the definition?
fn sound(entries: &[Entry], tree: &GistTree, limits: Limits) -> bool {
    let block = tree.hierarchy().block() as u64;
    let span = |e: &Entry| block.pow(u32::from(e.lod));
    let end = |e: &Entry| e.start + span(e);
    let Some(last) = entries.last() else { return false };
    let tail = end(last).saturating_sub(limits.protected());
    entries.len() <= limits.budget()
        && entries.windows(2).all(|pair| end(&pair[0]) == pair[1].start)
        && entries.iter().all(|e| {
            e.lod <= tree.hierarchy().levels()
                && e.start % span(e) == 0
                && tree.contains(Node { lod: e.lod, index: e.start / span(e) })
                && (e.lod == 0 || end(e) <= tail)
        })
}

/// An edit of a plain list: what replaces what; none where there is nothing of the kind to edit.
fn edited(entries: &[Entry], block: usize, expand: bool, at: usize) -> Option<(usize, Vec<Entry>)> {
    let first = *entries.get(at)?;
    if expand {
        let lod = first.lod.checked_sub(1)?;
        let span = (block as u64).pow(u32::from(lod));
        return Some((1, (0..block as u64).map(|n| entry(first.start + n * span, lod)).collect()));
    }
    let siblings = entries.get(at..at + block)?;
    siblings.iter().all(|e| e.lod == first.lod).then(|| (block, vec![entry(first.start, first.lod + 1)]))
}

fn input(context: &WorkingContext, tree: &GistTree) -> ContextInput {
    let rule = SigmaRule { block: tree.hierarchy().block(), ..SigmaRule::default() };
    context.input(tree, &Table { width: tree.width() }, &rule).unwrap()
}

#[derive(Clone, Debug)]
enum Step {
    Edit { expand: bool, at: usize },
    Iterate,
    Append(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (any::<bool>(), 0..60usize).prop_map(|(expand, at)| Step::Edit { expand, at }),
        2 => Just(Step::Iterate),
        1 => (0..9usize).prop_map(Step::Append),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(cases(4000))]

    #[test]
    fn edits_keep_every_invariant_and_refuse_what_would_not(
        (block, levels, n) in (2..5usize, 1..4u8, 1..120usize),
        (room, protected, newest) in (0..40usize, 0..20u64, 1..130u64),
        steps in steps(),
    ) {
        let table = Table { width: 1 };
        let source = Plain::new(Kind::Curved, block, 1, 0);
        let mut tree = empty(block, levels, 1);
        tree.append(&tokens(n, 1), &table, &source).unwrap();
        let limits = limits(protected as usize + room + 1, protected);
        let Ok(mut context) = WorkingContext::rebuild(&tree, limits, newest) else { return Ok(()) };
        prop_assert!(sound(context.entries(), &tree, limits));
        for step in steps {
            let before = context.clone();
            match step {
                Step::Iterate => {
                    context.advance_residency();
                    prop_assert_eq!(context.entries(), before.entries());
                    let older = |r: &Residency| Residency { age: r.age + 1, ..*r };
                    let expected: Vec<Residency> = before.residency().iter().map(older).collect();
                    prop_assert_eq!(context.residency(), expected);
                }
                Step::Append(n) => {
                    tree.append(&tokens(n, 2), &table, &source).unwrap();
                    let new = tree.len() - before.coverage().end;
                    let done = context.extend_to(&tree);
                    prop_assert_eq!(done.is_ok(), before.cost() as u64 + new <= limits.budget() as u64);
                    if done.is_ok() {
                        prop_assert_eq!(context.coverage(), before.coverage().start..tree.len());
                        prop_assert_eq!(&context.entries()[..before.cost()], before.entries());
                        prop_assert_eq!(&context.residency()[..before.cost()], before.residency());
                    } else {
                        prop_assert_eq!(&context, &before);
                    }
                }
                Step::Edit { expand, at } => {
                    let allowed = edited(before.entries(), block, expand, at).map(|(old, new)| {
                        let mut entries = before.entries().to_vec();
                        let mut residency = before.residency().to_vec();
                        let change = if expand { Change::Expanded } else { Change::Collapsed };
                        residency.splice(at..at + old, vec![Residency { age: 0, change }; new.len()]);
                        entries.splice(at..at + old, new);
                        (entries, residency)
                    });
                    let allowed = allowed.filter(|(entries, _)| sound(entries, &tree, limits));
                    let may = if expand { context.check_expand(at) } else { context.check_collapse(at) };
                    let done = if expand { context.expand(at) } else { context.collapse(at) };
                    prop_assert_eq!(may.map_err(|e| e.to_string()), done.map_err(|e| e.to_string()));
                    match allowed {
                        Some((entries, residency)) => {
                            prop_assert_eq!(context.entries(), entries);
                            prop_assert_eq!(context.residency(), residency);
                            prop_assert_eq!(context.coverage(), before.coverage());
                        }
                        None => prop_assert_eq!(&context, &before),
                    }
                }
            }
            prop_assert!(sound(context.entries(), &tree, limits));
            prop_assert_eq!(context.residency().len(), context.cost());
            let same = WorkingContext::new(context.entries().to_vec(), &tree, limits).unwrap();
            prop_assert_eq!(same.entries(), context.entries());
        }
    }

    #[test]
    fn a_list_of_entries_is_taken_if_and_only_if_it_is_a_working_context(
        (block, levels, n) in (2..4usize, 1..3u8, 1..50usize),
        (budget, protected, newest) in (1..40usize, 0..10u64, 1..60u64),
        spoil in prop::option::of((0..40usize, 0..50u64, 0..4u8)),
    ) {
        let tree = grown(block, levels, 1, n);
        let wide = limits(budget + 20, 0);
        let Ok(context) = WorkingContext::rebuild(&tree, wide, newest) else { return Ok(()) };
        let mut entries = context.entries().to_vec();
        if let Some((at, start, lod)) = spoil {
            let at = at % entries.len();
            entries[at] = entry(start, lod);
        }
        let limits = Limits::new(budget.max(protected as usize), protected).unwrap();
        let taken = WorkingContext::new(entries.clone(), &tree, limits);
        prop_assert_eq!(taken.is_ok(), sound(&entries, &tree, limits), "{:?}: {:?}", entries, taken.err());
    }

    #[test]
    fn rebuilding_is_collapsing_the_oldest_block_of_the_finest_level_until_it_fits(
        (block, levels, n) in (2..5usize, 1..4u8, 1..200usize),
        (room, protected, newest) in (0..80usize, 0..20u64, 1..220u64),
    ) {
        let tree = grown(block, levels, 1, n);
        let limits = limits(protected as usize + room + 1, protected);
        let start = tree.len().saturating_sub(newest);
        let mut entries: Vec<Entry> = (start..tree.len()).map(|start| entry(start, 0)).collect();
        let tight = Limits::new(entries.len().max(protected as usize), protected).unwrap();
        let mut lod = 0;
        while entries.len() > limits.budget() && lod < levels {
            let collapsed = (0..entries.len()).filter(|at| entries[*at].lod == lod).find_map(|at| {
                let (old, new) = edited(&entries, block, false, at)?;
                let mut entries = entries.clone();
                entries.splice(at..at + old, new);
                sound(&entries, &tree, tight).then_some(entries)
            });
            match collapsed {
                Some(collapsed) => entries = collapsed,
                None => lod += 1,
            }
        }
        match WorkingContext::rebuild(&tree, limits, newest) {
            Ok(context) => prop_assert_eq!(context.entries(), entries),
            Err(error) => {
                prop_assert!(entries.len() > limits.budget(), "{}", error);
                let said = format!("at least {} entries", entries.len());
                prop_assert!(error.to_string().contains(&said), "{}: {}", said, error);
            }
        }
    }

    #[test]
    fn collapsing_what_was_expanded_gives_the_same_entries_and_embeddings(
        (block, levels, n) in (2..5usize, 1..4u8, 1..120usize),
        (room, at) in (0..30usize, 0..60usize),
    ) {
        let tree = grown(block, levels, 2, n);
        let limits = limits(room + 1, 0);
        let Ok(context) = WorkingContext::rebuild(&tree, limits, u64::MAX) else { return Ok(()) };
        let at = at % context.cost();
        let before = input(&context, &tree);
        let mut there = WorkingContext::new(
            context.entries().to_vec(), &tree, Limits::new(limits.budget() + block, 0).unwrap(),
        ).unwrap();
        if there.expand(at).is_ok() {
            prop_assert_eq!(there.siblings(at + block - 1), Some(at..at + block));
            there.collapse(at).unwrap();
            prop_assert_eq!(there.entries(), context.entries());
            prop_assert_eq!(input(&there, &tree), before.clone());
        }
        if there.collapse(at).is_ok() {
            there.expand(at).unwrap();
            prop_assert_eq!(there.entries(), context.entries());
            prop_assert_eq!(input(&there, &tree), before);
        }
    }
}

/// Tokens 0 … 26 of a tree with blocks of 3: a gist of 9, two of 3, twelve tokens.
fn mixed() -> (GistTree, Vec<Entry>) {
    let tree = grown(3, 2, 2, 27);
    let mut entries = vec![entry(0, 2), entry(9, 1), entry(12, 1)];
    entries.extend((15..27).map(|start| entry(start, 0)));
    (tree, entries)
}

#[test]
fn a_decoder_is_given_the_trees_gists_and_the_tokens_embeddings() {
    let (tree, entries) = mixed();
    let context = WorkingContext::new(entries, &tree, limits(15, 12)).unwrap();
    assert_eq!((context.cost(), context.coverage(), context.protected_from()), (15, 0..27, 15));
    let input = input(&context, &tree);
    let mut expected = tree.gist(Node { lod: 2, index: 0 }).unwrap().to_vec();
    expected.extend_from_slice(&tree.gists(1)[3 * 2..5 * 2]);
    expected.extend(Table { width: 2 }.embeddings(&tree.tokens()[15..]).unwrap());
    assert_eq!(input.embeddings_we, expected);
    assert_eq!(input.tokens_w[..3], [NO_TOKEN; 3]);
    assert_eq!(input.tokens_w[3..], tree.tokens()[15..]);
    assert_eq!(input.lod_w[..4], [2, 1, 1, 0]);
    // Spans that follow one another from token 0 on: the rule has a word for that.
    let rule = SigmaRule { block: 3, ..SigmaRule::default() };
    assert_eq!((input.mu_w.clone(), input.sigma_w.clone()), rule.tile(&input.lod_w));
    let rope = Rope::new(8, 10000.0, RopeScaling::None);
    let tables = rope.place(&input.places(Some(&[1.0, 0.5, 0.5]))).unwrap();
    assert_eq!(tables.cos_nd.dims(), [15, 4]);
    let original = SigmaRule { preset: SigmaPreset::Original, ..rule };
    let original = context.input(&tree, &Table { width: 2 }, &original).unwrap();
    assert_eq!(original.mu_w[..4], [0.0, 9.0, 12.0, 15.0]);
    assert_eq!(original.sigma_w[..4], [9.0, 3.0, 3.0, 1.0]);
}

#[test]
fn the_baseline_is_the_newest_tokens() {
    let tree = grown(3, 2, 2, 27);
    let context = WorkingContext::recent(&tree, limits(10, 4)).unwrap();
    assert_eq!(context.coverage(), 17..27);
    assert!(context.entries().iter().all(|e| e.lod == 0));
    assert_eq!(WorkingContext::recent(&tree, limits(100, 4)).unwrap().coverage(), 0..27);
}

#[test]
fn a_long_history_is_rebuilt_within_its_budget() {
    let tree = grown(32, 3, 1, 200_000);
    let context = WorkingContext::rebuild(&tree, limits(8192, 128), u64::MAX).unwrap();
    assert_eq!(context.coverage(), 0..200_000);
    assert!(context.cost() <= 8192 && context.cost() + 31 > 8192, "{}", context.cost());
    assert!(context.entries()[context.cost() - 128..].iter().all(|e| e.lod == 0));
}

#[test]
fn entries_and_siblings_are_found() {
    let (tree, entries) = mixed();
    let context = WorkingContext::new(entries, &tree, limits(15, 0)).unwrap();
    let at = |token| context.index_at(token);
    assert_eq!([at(0), at(8), at(9), at(14), at(15), at(26)], [0, 0, 1, 2, 3, 14].map(Some));
    assert_eq!(at(27), None);
    assert_eq!(context.siblings(3), Some(3..6));
    assert_eq!(context.siblings(5), Some(3..6));
    // Topmost; a sibling is still expanded; beyond.
    assert_eq!([context.siblings(0), context.siblings(1), context.siblings(15)], [None, None, None]);
    let late = WorkingContext::recent(&tree, limits(8, 0)).unwrap();
    assert_eq!([late.siblings(0), late.siblings(1), late.siblings(2)], [None, None, Some(2..5)]);
}

/// The mixed context with one change to its entries is refused.
#[track_caller]
fn refused(limits: Limits, change: impl FnOnce(&mut Vec<Entry>), parts: &[&str]) {
    let (tree, mut entries) = mixed();
    change(&mut entries);
    says(WorkingContext::new(entries, &tree, limits), parts);
}

#[test]
fn overlapping_entries_are_refused() {
    refused(
        limits(20, 0),
        |e| e[3].start = 14,
        &["entry 3: expected to begin at token 15", "got level 0 at token 14: an overlap of 1 tokens"],
    );
}

#[test]
fn gapped_entries_are_refused() {
    refused(
        limits(20, 0),
        |e| {
            e.remove(1);
        },
        &["entry 1: expected to begin at token 9", "level 1 at token 12: a gap of 3 tokens"],
    );
}

#[test]
fn unaligned_entries_are_refused() {
    refused(
        limits(20, 0),
        |e| e[1].start = 10,
        &["entry 1: expected a start that is a multiple of its span of 3 tokens, got level 1 at token 10"],
    );
}

#[test]
fn a_lod_beyond_the_tree_is_refused() {
    refused(limits(20, 0), |e| e[0].lod = 3, &["entry 0: expected a level of the tree, at most 2, got 3"]);
}

#[test]
fn an_entry_beyond_the_history_is_refused() {
    refused(limits(20, 0), |e| e.push(entry(27, 1)), &["entry 15", "within the history of 27 tokens"]);
    refused(limits(20, 0), |e| e.push(entry(27, 0)), &["got level 0 at token 27, 1 tokens long"]);
}

#[test]
fn a_context_over_its_budget_is_refused() {
    refused(limits(14, 0), |_| {}, &["expected at most 14 entries, the budget, got 15"]);
}

#[test]
fn a_gist_in_the_protected_tail_is_refused() {
    refused(
        limits(20, 13),
        |_| {},
        &["entry 2: expected tokens from token 14 on, the protected tail, got level 1 at token 12"],
    );
}

#[test]
fn a_context_without_entries_is_refused() {
    refused(limits(20, 0), Vec::clear, &["expected at least one entry, got none"]);
    says(WorkingContext::recent(&empty(3, 2, 2), limits(5, 0)), &["expected at least one entry, got none"]);
    says(WorkingContext::rebuild(&empty(3, 2, 2), limits(5, 0), 9), &["at least one entry, got none"]);
}

#[test]
fn a_budget_smaller_than_the_protected_tail_is_refused() {
    says(
        Limits::new(127, 128),
        &["working context: budget: expected room for the 128 protected tokens at least, got 127 entries"],
    );
    says(Limits::new(0, 0), &["budget: expected at least 1 entry, got 0"]);
}

#[test]
fn a_budget_that_the_coarsest_entries_exceed_is_refused() {
    let tree = grown(3, 2, 2, 27);
    // Two gists of 9, one of 3, and 6 tokens of which 5 are protected.
    let parts = ["expected at least 9 entries for 27 tokens of which 5 are protected, got 8"];
    says(WorkingContext::rebuild(&tree, limits(8, 5), u64::MAX), &parts);
    assert_eq!(WorkingContext::rebuild(&tree, limits(9, 5), u64::MAX).unwrap().cost(), 9);
}

/// An edit of the mixed context is refused, and it stays what it was.
#[track_caller]
fn edit_refused(
    limits: Limits,
    edit: impl FnOnce(&mut WorkingContext) -> megacontext_base::error::Result<()>,
    part: &str,
) {
    let (tree, entries) = mixed();
    let mut context = WorkingContext::new(entries, &tree, limits).unwrap();
    let before = context.clone();
    says(edit(&mut context), &[part]);
    assert_eq!(context, before);
}

#[test]
fn expanding_a_token_is_refused() {
    edit_refused(limits(20, 0), |c| c.expand(3), "expand entry 3: expected a gist, got level 0 at token 15");
}

#[test]
fn expanding_beyond_the_budget_is_refused() {
    edit_refused(
        limits(16, 0),
        |c| c.expand(1),
        "expand entry 1, level 1 at token 9: expected at most 16 entries, the budget, got 17",
    );
}

#[test]
fn edits_of_entries_that_are_not_there_are_refused() {
    edit_refused(limits(20, 0), |c| c.expand(15), "expand: expected one of 15 entries, got entry 15");
    edit_refused(limits(20, 0), |c| c.collapse(99), "collapse: expected one of 15 entries, got entry 99");
}

#[test]
fn collapsing_from_the_middle_of_siblings_is_refused() {
    edit_refused(
        limits(20, 0),
        |c| c.collapse(4),
        "collapse entry 4: expected the first of 3 siblings, at a multiple of 3 tokens, got level 0 at token 16",
    );
}

#[test]
fn collapsing_without_all_siblings_is_refused() {
    edit_refused(
        limits(20, 0),
        |c| c.collapse(1),
        "collapse entry 1: expected all 3 siblings as entries, got 2 from level 1 at token 9 on",
    );
}

#[test]
fn collapsing_the_topmost_level_is_refused() {
    edit_refused(limits(20, 0), |c| c.collapse(0), "expected an entry below level 2, the tree's topmost");
}

#[test]
fn collapsing_the_protected_tail_is_refused() {
    edit_refused(
        limits(20, 10),
        |c| c.collapse(3),
        "collapse entry 3: expected a span that ends by token 17, where the protected tail begins, got 15..18",
    );
}

#[test]
fn new_tokens_beyond_the_budget_are_refused() {
    let (mut tree, entries) = mixed();
    let mut context = WorkingContext::new(entries, &tree, limits(16, 0)).unwrap();
    let before = context.clone();
    tree.append(&[1, 2], &Table { width: 2 }, &Plain::new(Kind::Curved, 3, 2, 0)).unwrap();
    says(
        context.extend_to(&tree),
        &["with the tokens 27..29: expected at most 16 entries, the budget, got 17"],
    );
    assert_eq!(context, before);
    context.collapse(3).unwrap();
    context.extend_to(&tree).unwrap();
    assert_eq!((context.cost(), context.coverage()), (15, 0..29));
}

#[test]
fn another_tree_is_refused() {
    let (tree, entries) = mixed();
    let mut context = WorkingContext::new(entries, &tree, limits(20, 0)).unwrap();
    let before = context.clone();
    let table = Table { width: 2 };
    let rule = SigmaRule { block: 3, ..SigmaRule::default() };
    for (other, part) in [
        (grown(3, 1, 2, 27), "expected a tree of blocks of 3 on 2 levels, got blocks of 3 on 1 levels"),
        (grown(3, 2, 2, 26), "expected a tree of at least 27 tokens, got 26"),
    ] {
        says(context.extend_to(&other), &[part]);
        says(context.input(&other, &table, &rule), &[part]);
    }
    assert_eq!(context, before);
    let coarse = SigmaRule { block: 32, ..rule };
    says(context.input(&tree, &table, &coarse), &["positions.sigma.block: expected 3, the tree's, got 32"]);
    says(context.input(&tree, &Table { width: 5 }, &rule), &["embeddings of width 2, the tree's, got 5"]);
}
