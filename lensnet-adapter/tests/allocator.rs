//! The focus allocator: every invariant over random trees, contexts and scores; greedy rounds against a plain form that
//! looks at everything anew after each edit; what the rules say in small cases; what is refused.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

#[path = "common/trees.rs"]
mod trees;

use std::collections::HashMap;

use lensnet_adapter::allocator::{Action, AllocatorConfig, Collapses, Edit, Kind, allocate, refocus};
use megacontext_base::context::{Change, Entry, GistTree, Limits, Residency, WorkingContext};
use megacontext_base::error::Result;
use megacontext_base::random::{Random, mix};
use megacontext_base::rope::SigmaRule;
use proptest::prelude::*;
use trees::{Numbers, append, cases, limits, tree};

fn entry(start: u64, lod: u8) -> Entry {
    Entry { start, lod }
}

/// A plain context: entries with their last change, and a score where they were there when scores were given.
#[derive(Clone, Debug)]
struct Plain {
    block: usize,
    levels: u8,
    limits: Limits,
    entries: Vec<(Entry, Residency, Option<f32>)>,
}

impl Plain {
    fn of(context: &WorkingContext, scores: &[f32]) -> Self {
        let levels = context.hierarchy().levels();
        let legal = |e: Entry, u: f32| match e.lod {
            0 => u.min(0.0),
            lod if lod == levels => u.max(0.0),
            _ => u,
        };
        let entries = context.entries().iter().zip(context.residency()).enumerate();
        let entries = entries.map(|(at, (e, r))| (*e, *r, scores.get(at).map(|u| legal(*e, *u)))).collect();
        Self { block: context.hierarchy().block(), levels, limits: context.limits(), entries }
    }

    fn span(&self, lod: u8) -> u64 {
        (self.block as u64).pow(u32::from(lod))
    }

    fn tail(&self) -> u64 {
        let last = self.entries.last().unwrap().0;
        (last.start + self.span(last.lod)).saturating_sub(self.limits.protected())
    }

    /// Whether K whole siblings begin here, and all of what else a collapse needs.
    fn collapsible(&self, at: usize) -> bool {
        let Some(group) = self.entries.get(at..at + self.block) else { return false };
        let Entry { start, lod } = group[0].0;
        lod < self.levels
            && start % self.span(lod + 1) == 0
            && group.iter().all(|(e, ..)| e.lod == lod)
            && start + self.span(lod + 1) <= self.tail()
    }

    fn edit(&mut self, action: Action, at: usize) {
        let Entry { start, lod } = self.entries[at].0;
        let new = |e: Entry, change| (e, Residency { age: 0, change }, None);
        match action {
            Action::Expand => {
                let span = self.span(lod - 1);
                let children: Vec<_> = (0..self.block as u64)
                    .map(|n| new(entry(start + n * span, lod - 1), Change::Expanded))
                    .collect();
                self.entries.splice(at..=at, children);
            }
            Action::Collapse => {
                let parent = new(entry(start, lod + 1), Change::Collapsed);
                self.entries.splice(at..at + self.block, [parent]);
            }
        }
    }

    /// Candidates as they are now: where they begin, and their scores.
    fn candidates(&self, config: &AllocatorConfig, action: Action) -> Vec<(usize, f32)> {
        let rests = |r: &Residency, change| r.change == change && r.age < config.cooldown;
        let all = 0..self.entries.len();
        match action {
            Action::Expand => all
                .filter_map(|at| {
                    let (_, residency, score) = &self.entries[at];
                    let score = score.filter(|u| *u > config.expand_threshold)?;
                    (!rests(residency, Change::Collapsed)).then_some((at, score))
                })
                .collect(),
            Action::Collapse => all
                .filter(|at| self.collapsible(*at))
                .filter_map(|at| {
                    let group = &self.entries[at..at + self.block];
                    let scores: Option<Vec<f32>> = group.iter().map(|(_, _, score)| *score).collect();
                    let sum: f64 = scores?.into_iter().map(f64::from).sum();
                    let mean = (sum / self.block as f64) as f32;
                    let awake = !group.iter().any(|(_, r, _)| rests(r, Change::Expanded));
                    (mean < -config.collapse_threshold && awake).then_some((at, mean))
                })
                .collect(),
        }
    }

    /// The foremost candidate that does not contain the entry `but`; the first of equal ones.
    fn best(&self, config: &AllocatorConfig, action: Action, but: Option<usize>) -> Option<(usize, f32)> {
        let wide = if action == Action::Collapse { self.block } else { 1 };
        self.candidates(config, action)
            .into_iter()
            .filter(|(at, _)| but.is_none_or(|but| !(*at..*at + wide).contains(&but)))
            .reduce(|best, next| if next.1.abs() > best.1.abs() { next } else { best })
    }

    /// A greedy round, by the rules.
    fn round(&mut self, config: &AllocatorConfig) -> Vec<(Action, Entry, f32)> {
        if let Collapses::Pay { free, gain } = config.collapses {
            return self.paid_round(config, free, gain);
        }
        let mut edits = Vec::new();
        let mut expand_is_due = true;
        while edits.len() < config.max_edits {
            let expand = self.best(config, Action::Expand, None);
            let collapse = self.best(config, Action::Collapse, None);
            let room = self.entries.len() + self.block - 1 <= self.limits.budget();
            let next = match (expand, collapse) {
                (None, None) => break,
                (Some(expand), None) if room => (Action::Expand, expand),
                (Some(_), None) => break,
                (None, Some(collapse)) => (Action::Collapse, collapse),
                (Some(expand), Some(_)) if expand_is_due && room => (Action::Expand, expand),
                (Some(expand), Some(collapse)) if expand_is_due => {
                    let other = self.best(config, Action::Collapse, Some(expand.0));
                    // It pays for the expand, which is due still.
                    edits.push(self.made(Action::Collapse, other.unwrap_or(collapse)));
                    continue;
                }
                (Some(_), Some(collapse)) => (Action::Collapse, collapse),
            };
            expand_is_due = next.0 == Action::Collapse;
            edits.push(self.made(next.0, next.1));
        }
        edits
    }

    /// The same where collapses only pay.
    fn paid_round(&mut self, config: &AllocatorConfig, free: f32, gain: f32) -> Vec<(Action, Entry, f32)> {
        let mut edits = Vec::new();
        while edits.len() < config.max_edits {
            let Some((at, worth)) = self.best(config, Action::Expand, None) else { break };
            let wanted = self.entries[at].0;
            if self.entries.len() + self.block - 1 > self.limits.budget() {
                let Some(payer) = self.best(config, Action::Collapse, Some(at)) else { break };
                let cost = free + payer.1;
                if worth - cost <= gain || edits.len() + 2 > config.max_edits {
                    break;
                }
                edits.push(self.made(Action::Collapse, payer));
            }
            let at = self.entries.iter().position(|(e, ..)| *e == wanted).unwrap();
            edits.push(self.made(Action::Expand, (at, worth)));
        }
        while edits.len() < config.max_edits {
            match self.best(config, Action::Collapse, None) {
                Some(collapse) if collapse.1 < -free => edits.push(self.made(Action::Collapse, collapse)),
                _ => break,
            }
        }
        edits
    }

    fn made(&mut self, action: Action, (at, score): (usize, f32)) -> (Action, Entry, f32) {
        let entry = self.entries[at].0;
        self.edit(action, at);
        (action, entry, score)
    }

    fn matches(&self, context: &WorkingContext) -> bool {
        context.entries().iter().eq(self.entries.iter().map(|(e, ..)| e))
            && context.residency().iter().eq(self.entries.iter().map(|(_, r, _)| r))
    }
}

/// Scores that a seed gives an entry in a round: in steps of 0.1 for ties, or any.
fn scores(context: &WorkingContext, seed: u64, round: usize) -> Vec<f32> {
    let steps = seed.is_multiple_of(2);
    let tilt = (mix(seed) % 3) as f32 - 1.0;
    let of = |e: &Entry| {
        // Siblings mostly agree, so that groups have a mean to speak of.
        let group = e.start / (context.hierarchy().block() as u64).pow(u32::from(e.lod) + 1);
        let draw = |what: u64| (mix(seed ^ mix(what) ^ round as u64) >> 40) as f32 / (1 << 23) as f32 - 1.0;
        let own = draw(e.start << 8 | u64::from(e.lod));
        let u = 0.7 * draw(group << 8 | 128 | u64::from(e.lod)) + 0.3 * own + 0.3 * tilt;
        let u = u.clamp(-1.0, 1.0);
        if steps { (u * 10.0).round() / 10.0 } else { u }
    };
    context.entries().iter().map(of).collect()
}

fn configs() -> impl Strategy<Value = AllocatorConfig> {
    let kind = prop_oneof![
        Just(Kind::Greedy),
        (0.01..2f32, 1..5usize).prop_map(|(temperature, top_k)| Kind::Stochastic { temperature, top_k }),
    ];
    let thresholds = prop::sample::select(vec![0.0, 0.1, 0.2, 0.5]);
    let pay = (0.0..1.2f32, 0.0..0.5f32).prop_map(|(free, gain)| Collapses::Pay { free, gain });
    let collapses = prop_oneof![Just(Collapses::Alternate), pay];
    (thresholds.clone(), thresholds, 1..7usize, 0..4u32, 1..4usize, kind, collapses).prop_map(
        |(expand_threshold, collapse_threshold, max_edits, cooldown, rounds, kind, collapses)| {
            AllocatorConfig {
                expand_threshold,
                collapse_threshold,
                max_edits,
                cooldown,
                rounds,
                kind,
                collapses,
            }
        },
    )
}

/// A tree and a context over it, some way from where rebuilding put it.
fn start(
    (block, levels, n): (usize, u8, usize),
    (room, protected, newest): (usize, u64, u64),
    walk: &[(bool, usize)],
) -> Option<(GistTree, WorkingContext)> {
    let tree = tree(block, levels, n);
    let limits = limits(protected as usize + room + 1, protected);
    let mut context = WorkingContext::rebuild(&tree, limits, newest).ok()?;
    for (expand, at) in walk {
        // Many of them cannot be done; what can be is.
        let at = at % context.cost();
        let _ = if *expand { context.expand(at) } else { context.collapse(at) };
    }
    Some((tree, context))
}

fn vectors(context: &WorkingContext, tree: &GistTree) -> Vec<f32> {
    let rule = SigmaRule { block: tree.hierarchy().block(), ..SigmaRule::default() };
    context.input(tree, &Numbers, &rule).unwrap().embeddings_we
}

/// Takes edits back, the last one first, in a copy with room for it.
fn undone(context: &WorkingContext, tree: &GistTree, edits: &[Edit]) -> WorkingContext {
    let wide = limits(context.cost() + edits.len() * tree.hierarchy().block() + 1, 0);
    let mut copy = WorkingContext::new(context.entries().to_vec(), tree, wide).unwrap();
    for edit in edits.iter().rev() {
        let at = copy.index_at(edit.entry.start).unwrap();
        match edit.action {
            Action::Expand => copy.collapse(at).unwrap(),
            Action::Collapse => copy.expand(at).unwrap(),
        }
    }
    copy
}

proptest! {
    #![proptest_config(cases(6000))]

    #[test]
    fn every_invariant_holds_over_many_refocuses(
        shape in (2..5usize, 1..4u8, 1..140usize),
        room in (0..50usize, 0..20u64, 1..150u64),
        walk in prop::collection::vec((any::<bool>(), 0..80usize), 0..12),
        config in configs(),
        seeds in prop::collection::vec((any::<u64>(), 0..6usize), 1..8),
    ) {
        let Some((mut tree, mut context)) = start(shape, room, &walk) else { return Ok(()) };
        let limits = context.limits();
        let mut random = Random::new(shape.2 as u64);
        // The last edit of every span that was one entry or K.
        let mut last: HashMap<Entry, (usize, Action)> = HashMap::new();
        for (iteration, (seed, appended)) in seeds.into_iter().enumerate() {
            append(&mut tree, appended);
            // Where there is no room for them they wait.
            let _ = context.extend_to(&tree);
            let before = context.clone();
            let mut seen = Vec::new();
            let mut again = (context.clone(), random.clone());
            let score = |seen: &WorkingContext, rounds: &mut Vec<WorkingContext>| -> Result<Vec<f32>> {
                let u = scores(seen, seed, rounds.len());
                rounds.push(seen.clone());
                Ok(u)
            };
            let done = refocus(&config, &mut context, &mut |c| score(c, &mut seen), &mut random).unwrap();

            // Same seed, same result.
            let mut count = Vec::new();
            let same =
                refocus(&config, &mut again.0, &mut |c| score(c, &mut count), &mut again.1).unwrap();
            prop_assert_eq!(&same, &done);
            prop_assert_eq!(&again.0, &context);
            prop_assert_eq!(again.1.next_u64(), random.clone().next_u64());

            // Rounds: of the edits that are left, until none is made.
            let total = done.edits().count();
            prop_assert!(total <= config.max_edits && done.rounds.len() <= config.rounds);
            prop_assert!(done.rounds.iter().all(|round| !round.is_empty()));
            let stopped = total == config.max_edits || seen.len() == config.rounds;
            prop_assert_eq!(seen.len(), done.rounds.len() + usize::from(!stopped || seen.len() > done.rounds.len()));

            // Every edit by itself, replayed on a plain list.
            let mut plain = Plain::of(&before, &[]);
            plain.entries.iter_mut().for_each(|(_, r, _)| r.age += 1);
            for (round, edits) in done.rounds.iter().enumerate() {
                prop_assert!(plain.matches(&seen[round]), "round {} saw another context", round);
                let of_round = Plain::of(&seen[round], &scores(&seen[round], seed, round));
                if let Collapses::Pay { free, gain } = config.collapses {
                    // A collapse costs less than nothing, or pays for the expand behind it.
                    for (at, edit) in edits.iter().enumerate().filter(|(_, e)| e.action == Action::Collapse) {
                        let pays = |next: &Edit| next.action == Action::Expand && next.score - (free + edit.score) > gain;
                        prop_assert!(edit.score < -free || edits.get(at + 1).is_some_and(pays));
                    }
                }
                for edit in edits {
                    let Edit { action, entry, score, age, .. } = *edit;
                    prop_assert_eq!(edit.cost_before, plain.entries.len());
                    let at = plain.entries.iter().position(|(e, ..)| *e == entry).unwrap();
                    // What it was made for is a score of the round, beyond its threshold.
                    let candidates = of_round.candidates(&config, action);
                    let asked = candidates.iter().find(|(at, _)| of_round.entries[*at].0 == entry);
                    prop_assert_eq!(asked.map(|(_, u)| *u), Some(score));
                    match action {
                        Action::Expand => prop_assert!(entry.lod > 0 && score > config.expand_threshold),
                        Action::Collapse => prop_assert!(plain.collapsible(at) && score < -config.collapse_threshold),
                    }
                    let wide = if action == Action::Expand { 1 } else { plain.block };
                    let youngest = plain.entries[at..at + wide].iter().map(|(_, r, _)| r.age).min();
                    prop_assert_eq!(youngest, Some(age));
                    // No reversal within the cooldown.
                    let span = match action {
                        Action::Expand => entry,
                        Action::Collapse => Entry { lod: entry.lod + 1, ..entry },
                    };
                    if let Some((then, other)) = last.insert(span, (iteration, action)) {
                        prop_assert!(other != action && iteration - then >= config.cooldown as usize);
                    }
                    plain.edit(action, at);
                    prop_assert_eq!(edit.cost_after, plain.entries.len());
                    prop_assert!(edit.cost_after <= limits.budget());
                    // A working context after every edit: tiling, alignment, levels, tail, budget.
                    let entries: Vec<Entry> = plain.entries.iter().map(|(e, ..)| *e).collect();
                    let whole = WorkingContext::new(entries, &tree, limits);
                    prop_assert!(whole.is_ok(), "{:?}", whole.err());
                    prop_assert_eq!(whole.unwrap().coverage(), before.coverage());
                }
            }
            prop_assert!(plain.matches(&context));
            prop_assert_eq!(context.residency().len(), context.cost());

            // Taken back, everything is as it was, vectors too.
            let edits: Vec<Edit> = done.edits().copied().collect();
            let back = undone(&context, &tree, &edits);
            prop_assert_eq!(back.entries(), before.entries());
            prop_assert_eq!(vectors(&back, &tree), vectors(&before, &tree));

            // The report.
            prop_assert_eq!((done.wc_length_before, done.wc_length), (before.cost(), context.cost()));
            prop_assert_eq!(done.num_expand + done.num_collapse, total);
            let grown = context.cost() as i64 - before.cost() as i64;
            let steps = done.num_expand as i64 - done.num_collapse as i64;
            prop_assert_eq!(grown, steps * (plain.block as i64 - 1));
            prop_assert_eq!(done.swap_rate, total as f64 / before.cost() as f64);
            prop_assert!(done.utilization <= 1.0);
        }
    }

    #[test]
    fn a_greedy_round_is_the_plain_form(
        shape in (2..5usize, 1..4u8, 1..140usize),
        room in (0..50usize, 0..20u64, 1..150u64),
        walk in prop::collection::vec((any::<bool>(), 0..80usize), 0..12),
        (config, ages, seed) in (configs(), 0..4u32, any::<u64>()),
    ) {
        let Some((_, mut context)) = start(shape, room, &walk) else { return Ok(()) };
        (0..ages).for_each(|_| context.advance_residency());
        let u = scores(&context, seed, 0);
        let mut plain = Plain::of(&context, &u);
        let greedy = AllocatorConfig { kind: Kind::Greedy, ..config.clone() };
        let expected = plain.round(&greedy);
        // Of the one foremost there is no choice.
        let one = Kind::Stochastic { temperature: 1.0, top_k: 1 };
        for kind in [Kind::Greedy, one] {
            let mut edited = context.clone();
            let config = AllocatorConfig { kind, ..config.clone() };
            let edits = allocate(&config, &mut edited, &u, &mut Random::new(seed)).unwrap();
            let edits: Vec<_> = edits.iter().map(|e| (e.action, e.entry, e.score)).collect();
            prop_assert_eq!(&edits, &expected);
            prop_assert!(plain.matches(&edited));
        }
    }
}

fn greedy() -> (AllocatorConfig, Random) {
    (AllocatorConfig::default(), Random::new(0))
}

/// Blocks of 4: gists of 4 over 32 tokens, and scores of them.
fn gists(budget: usize, wishes: &[(usize, f32)]) -> (WorkingContext, Vec<f32>) {
    let tree = tree(4, 2, 32);
    let entries = (0..8).map(|n| entry(4 * n, 1)).collect();
    let mut scores = vec![0.0; 8];
    wishes.iter().for_each(|(at, u)| scores[*at] = *u);
    (WorkingContext::new(entries, &tree, limits(budget, 0)).unwrap(), scores)
}

fn actions(edits: &[Edit]) -> Vec<(Action, u64)> {
    edits.iter().map(|edit| (edit.action, edit.entry.start)).collect()
}

#[test]
fn a_collapse_pays_for_an_expand_that_has_no_room() {
    let (config, mut random) = greedy();
    let all = [(0, 0.9), (1, 0.5), (4, -0.5), (5, -0.5), (6, -0.5), (7, -0.5)];
    let (mut context, u) = gists(8, &all);
    let edits = allocate(&config, &mut context, &u, &mut random).unwrap();
    assert_eq!(actions(&edits), [(Action::Collapse, 16), (Action::Expand, 0)]);
    assert_eq!([edits[0].cost_after, edits[1].cost_after], [5, 8]);
    // With room the expand comes first, and the next one after the collapse.
    let (mut context, u) = gists(11, &all);
    let edits = allocate(&config, &mut context, &u, &mut random).unwrap();
    assert_eq!(actions(&edits), [(Action::Expand, 0), (Action::Collapse, 16), (Action::Expand, 4)]);
}

#[test]
fn an_expand_is_not_paid_for_with_itself() {
    let (config, mut random) = greedy();
    // The first four want to collapse on average, more than the last four; the first of them wants to expand.
    let u = [0.9, -1.0, -1.0, -1.0, -0.3, -0.3, -0.3, -0.3];
    let (mut context, _) = gists(8, &[]);
    let edits = allocate(&config, &mut context, &u, &mut random).unwrap();
    assert_eq!(actions(&edits), [(Action::Collapse, 16), (Action::Expand, 0)]);
}

#[test]
fn a_collapse_that_only_pays_costs_less_than_what_it_pays_for() {
    let (config, mut random) = greedy();
    let paying = |free, gain| AllocatorConfig { collapses: Collapses::Pay { free, gain }, ..config.clone() };
    let wishes = |expand: f32| [(0, expand), (4, -0.3), (5, -0.3), (6, -0.3), (7, -0.3)];
    let mut made = |config: &AllocatorConfig, budget: usize, expand: f32| {
        let (mut context, u) = gists(budget, &wishes(expand));
        actions(&allocate(config, &mut context, &u, &mut random).unwrap())
    };
    let pair = [(Action::Collapse, 16), (Action::Expand, 0)];
    // The collapse costs 0.5 - 0.3 = 0.2.
    assert_eq!(made(&paying(0.5, 0.0), 8, 0.4), pair);
    assert_eq!(made(&paying(0.5, 0.0), 8, 0.21), pair);
    assert_eq!(made(&paying(0.75, 0.0), 8, 0.4), []);
    assert_eq!(made(&paying(0.5, 0.25), 8, 0.4), []);
    // Where there is room nothing pays, and what costs something is left alone.
    assert_eq!(made(&paying(0.5, 0.0), 11, 0.4), [(Action::Expand, 0)]);
    assert_eq!(made(&config, 11, 0.4), [(Action::Expand, 0), (Action::Collapse, 16)]);
    // What costs less than nothing collapses by itself.
    assert_eq!(made(&paying(0.25, 0.0), 11, 0.4), [(Action::Expand, 0), (Action::Collapse, 16)]);
    // Of a pair there is no half.
    let one = AllocatorConfig { max_edits: 1, ..paying(0.5, 0.0) };
    assert_eq!(made(&one, 8, 0.9), []);
}

#[test]
fn equal_scores_go_by_the_lower_index() {
    let (config, mut random) = greedy();
    let config = AllocatorConfig { max_edits: 2, ..config };
    let (mut context, u) = gists(64, &[(6, 0.5), (2, 0.5), (5, 0.5)]);
    let edits = allocate(&config, &mut context, &u, &mut random).unwrap();
    assert_eq!(actions(&edits), [(Action::Expand, 8), (Action::Expand, 20)]);
}

#[test]
fn a_score_of_the_threshold_itself_edits_nothing() {
    let (config, mut random) = greedy();
    let (mut context, u) = gists(64, &[(0, 0.2), (4, -0.2), (5, -0.2), (6, -0.2), (7, -0.2)]);
    assert_eq!(allocate(&config, &mut context, &u, &mut random).unwrap(), []);
    let (mut context, u) = gists(64, &[(0, 0.21), (4, -0.21), (5, -0.2), (6, -0.2), (7, -0.2)]);
    assert_eq!(allocate(&config, &mut context, &u, &mut random).unwrap().len(), 2);
}

#[test]
fn what_was_expanded_collapses_two_refocuses_later() {
    let (config, mut random) = greedy();
    let (mut context, _) = gists(64, &[]);
    let mut made = Vec::new();
    for iteration in 0..5 {
        let wish = if iteration == 0 { 0.9 } else { -0.7 };
        // The span of the first block, whatever stands for it.
        let mut score = |c: &WorkingContext| {
            Ok(c.entries().iter().map(|e| if e.start < 4 { wish } else { 0.0 }).collect())
        };
        let done = refocus(&config, &mut context, &mut score, &mut random).unwrap();
        made.push(actions(&done.edits().copied().collect::<Vec<_>>()));
    }
    assert_eq!(made[0], [(Action::Expand, 0)]);
    assert_eq!((made[1].len(), &made[2][..]), (0, &[(Action::Collapse, 0)][..]));
    assert_eq!((made[3].len(), made[4].len()), (0, 0));
}

#[test]
fn rounds_ask_again_and_share_the_edits() {
    let (config, mut random) = greedy();
    let tree = tree(2, 3, 16);
    let top: Vec<Entry> = [entry(0, 3), entry(8, 3)].to_vec();
    let mut context = WorkingContext::new(top, &tree, limits(16, 0)).unwrap();
    let mut asked = Vec::new();
    let mut score = |c: &WorkingContext| {
        asked.push(c.cost());
        // Only what stands for token 0.
        Ok(c.entries().iter().map(|e| if e.start == 0 && e.lod > 0 { 0.5 } else { 0.0 }).collect())
    };
    let done = refocus(&config, &mut context, &mut score, &mut random).unwrap();
    assert_eq!(asked, [2, 3, 4]);
    assert_eq!(context.entries()[..2], [entry(0, 0), entry(1, 0)]);
    assert_eq!((done.rounds.len(), done.swap_rate), (3, 1.5));
    assert_eq!((done.score_mean, done.score_std, done.score_abs_mean), (0.25, 0.25, 0.25));
    assert_eq!((done.score_min, done.score_max), (0.0, 0.5));
    // Two edits are all there are, whatever the rounds.
    let config = AllocatorConfig { max_edits: 2, ..config };
    let top: Vec<Entry> = [entry(0, 3), entry(8, 3)].to_vec();
    let mut context = WorkingContext::new(top, &tree, limits(16, 0)).unwrap();
    let mut all = |c: &WorkingContext| Ok(vec![0.5; c.cost()]);
    let done = refocus(&config, &mut context, &mut all, &mut random).unwrap();
    assert_eq!((done.rounds.len(), done.num_expand), (1, 2));
}

#[test]
fn draws_are_a_softmax_over_the_foremost() {
    let kind = Kind::Stochastic { temperature: 0.25, top_k: 3 };
    let config = AllocatorConfig { max_edits: 1, kind, ..AllocatorConfig::default() };
    let wishes = [(1, 0.5), (3, 0.9), (4, 0.7), (6, 0.3)];
    let (context, u) = gists(64, &wishes);
    let mut random = Random::new(3);
    let draws = 20_000;
    let mut counts: HashMap<u64, f64> = HashMap::new();
    for _ in 0..draws {
        let edits = allocate(&config, &mut context.clone(), &u, &mut random).unwrap();
        *counts.entry(edits[0].entry.start / 4).or_default() += 1.0 / f64::from(draws);
    }
    let weights: Vec<(u64, f64)> =
        [(1, 0.5), (3, 0.9), (4, 0.7)].iter().map(|(at, u)| (*at, f64::exp(u / 0.25))).collect();
    let sum: f64 = weights.iter().map(|(_, w)| w).sum();
    assert_eq!(counts.len(), 3);
    for (at, weight) in weights {
        let (expected, found) = (weight / sum, counts[&at]);
        let sigma = (expected * (1.0 - expected) / f64::from(draws)).sqrt();
        assert!((found - expected).abs() < 4.0 * sigma, "{at}: {found}, expected {expected} ± {sigma}");
    }
}

#[test]
fn settings_are_read_strictly_and_have_defaults() {
    let config: AllocatorConfig = serde_json::from_str("{}").unwrap();
    assert_eq!(config, AllocatorConfig::default());
    let text = r#"{"max_edits": 2, "kind": {"stochastic": {"temperature": 0.5}}}"#;
    let config: AllocatorConfig = serde_json::from_str(text).unwrap();
    assert_eq!(config.kind, Kind::Stochastic { temperature: 0.5, top_k: 4 });
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<AllocatorConfig>(&text).unwrap(), config);
    let text = r#"{"collapses": {"pay": {"gain": 0.25}}}"#;
    let config: AllocatorConfig = serde_json::from_str(text).unwrap();
    assert_eq!(config.collapses, Collapses::Pay { free: 0.5, gain: 0.25 });
    for text in [r#"{"max_edit": 2}"#, r#"{"kind": {"stochastic": {"k": 4}}}"#, r#"{"kind": "gready"}"#] {
        assert!(serde_json::from_str::<AllocatorConfig>(text).is_err(), "{text}");
    }
}

/// These settings and scores are refused in these words, and nothing changes.
#[track_caller]
fn refused(config: AllocatorConfig, scores: &[f32], expected: &str) {
    let (mut context, _) = gists(64, &[]);
    let (before, mut random) = (context.clone(), Random::new(5));
    let error = allocate(&config, &mut context, scores, &mut random).unwrap_err().to_string();
    assert_eq!(error, expected);
    let error =
        refocus(&config, &mut context, &mut |_| Ok(scores.to_vec()), &mut random).unwrap_err().to_string();
    assert_eq!(error, expected);
    assert_eq!(context, before);
    assert_eq!(random.next_u64(), Random::new(5).next_u64());
}

#[track_caller]
fn refused_scores(scores: &[f32], expected: &str) {
    refused(AllocatorConfig::default(), scores, expected);
}

#[test]
fn scores_of_fewer_entries_are_refused() {
    refused_scores(&[0.9; 7], "focus allocator: expected 8 scores, one for each entry, got 7");
}

#[test]
fn a_score_that_is_no_number_is_refused() {
    let mut scores = [0.9; 8];
    scores[3] = f32::NAN;
    refused_scores(&scores, "focus score of entry 3: expected a finite number, got NaN");
    scores[3] = f32::NEG_INFINITY;
    refused_scores(&scores, "focus score of entry 3: expected a finite number, got -inf");
}

#[test]
fn a_score_beyond_one_is_refused() {
    let mut scores = [0.9; 8];
    scores[7] = -1.5;
    refused_scores(&scores, "focus allocator: focus score of entry 7: expected −1 to 1, got -1.5");
}

#[test]
fn bad_scores_in_a_later_round_change_nothing() {
    let (config, mut random) = greedy();
    let (mut context, u) = gists(64, &[(0, 0.9)]);
    let before = context.clone();
    let mut rounds = 0;
    let mut score = |c: &WorkingContext| {
        rounds += 1;
        Ok(if rounds == 1 { u.clone() } else { vec![f32::NAN; c.cost()] })
    };
    assert!(refocus(&config, &mut context, &mut score, &mut random).is_err());
    assert_eq!((rounds, context), (2, before));
}

#[test]
fn settings_out_of_range_are_refused() {
    let config = AllocatorConfig::default();
    let u = [0.9; 8];
    let threshold = AllocatorConfig { expand_threshold: -0.1, ..config.clone() };
    refused(threshold, &u, "focus allocator: expand_threshold: expected 0 to 1, got -0.1");
    let threshold = AllocatorConfig { collapse_threshold: f32::NAN, ..config.clone() };
    refused(threshold, &u, "focus allocator: collapse_threshold: expected 0 to 1, got NaN");
    let none = AllocatorConfig { max_edits: 0, ..config.clone() };
    refused(none, &u, "focus allocator: max_edits: expected at least 1, got 0");
    let none = AllocatorConfig { rounds: 0, ..config.clone() };
    refused(none, &u, "focus allocator: rounds: expected at least 1, got 0");
    let kind = |temperature, top_k| Kind::Stochastic { temperature, top_k };
    let pay = |free, gain| AllocatorConfig { collapses: Collapses::Pay { free, gain }, ..config.clone() };
    refused(pay(-0.5, 0.0), &u, "focus allocator: collapses.pay.free: expected 0 to 2, got -0.5");
    refused(pay(0.5, f32::NAN), &u, "focus allocator: collapses.pay.gain: expected 0 to 2, got NaN");
    let cold = AllocatorConfig { kind: kind(0.0, 4), ..config.clone() };
    refused(cold, &u, "focus allocator: temperature: expected a number above 0, got 0");
    let none = AllocatorConfig { kind: kind(1.0, 0), ..config };
    refused(none, &u, "focus allocator: top_k: expected at least 1, got 0");
}
