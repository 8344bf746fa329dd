//! The focus allocator: makes expands and collapses of scores, within a budget and without going to and fro.
//!
//! Source: MegaContext's focus allocator, by the rules of its documents; its Python code knows neither alignment nor a
//! budget after every edit nor a cooldown. One round on given scores:
//!   candidates  an entry above level 0 with u > τe expands; K aligned siblings, all of them entries, that end before the
//!               protected tail, with a mean of u < −τc collapse. What cannot be done counts as 0 ([`legality::mask`]).
//!   cooldown    what collapsed less than `cooldown` iterations ago does not expand, what expanded does not collapse.
//!   order       expands by falling score, collapses by rising one, the lower index first where scores are equal.
//!   edits       in turn an expand and a collapse, an expand first; where one kind has run out, the other goes on. An
//!               expand that has no room waits for one collapse, which frees exactly what it needs; so the budget holds after
//!               every edit. An entry is in one edit of a round at most: what an edit made has no score yet.
//!   stochastic  each time, one of the k foremost candidates of the kind that is due, drawn by softmax(|u|/T).
//! With [`Collapses::Pay`] nothing collapses for its own sake: a score of −u stands for m − u nats that a collapse costs
//! ([`crate::counterfactual`]), so an expand that has no room is made with the best collapse where it is worth more than that,
//! both or neither; what collapses alone is what costs less than nothing.
//! A refocus is up to `rounds` of these, each on scores asked for anew, until one edits nothing; all of them together make at
//! most `max_edits` (N_diff).
//!
//! An iteration, in which ages and cooldown count, is a refocus and not a round: rounds are one decision, so that nothing
//! which a refocus did is undone in it. [`refocus`] lets one iteration pass before its first round; who calls [`allocate`]
//! alone calls [`WorkingContext::advance_residency`] before each.
//!
//! Shapes: W scores, one for each entry. Units: entries for costs, iterations for ages. Errors: settings out of range, scores
//! that are not as many as entries, no numbers or beyond ±1; then nothing has changed.
//! Left out on purpose: where scores come from (LensNet, an oracle, a host), and other allocators ([`crate::edits`]).

use std::ops::Range;

use megacontext_base::context::{Change, Entry, WorkingContext};
use megacontext_base::error::{BaseError, Result};
use megacontext_base::random::Random;
use serde::{Deserialize, Serialize};

use crate::edits::{self, Allocator};
use crate::legality;
use crate::metrics::{mean, quantile};

/// The allocator's name in errors.
const ALLOCATOR: &str = "focus allocator";

/// Which candidate is next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Kind {
    /// The foremost.
    #[default]
    Greedy,
    /// One of the foremost, by chance.
    Stochastic {
        /// T, in units of scores.
        #[serde(default = "temperature")]
        temperature: f32,
        /// k, how many of them.
        #[serde(default = "top_k")]
        top_k: usize,
    },
}

fn temperature() -> f32 {
    1.0
}

fn top_k() -> usize {
    4
}

/// What collapses are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Collapses {
    /// Room, now or later: they alternate with expands.
    #[default]
    Alternate,
    /// An expand that is worth more.
    Pay {
        /// m: at a score of −m a collapse costs nothing. The margin of the labels that scores were learned from.
        #[serde(default = "free")]
        free: f32,
        /// How much more an expand has to be worth than the collapse that pays for it costs, in units of scores.
        #[serde(default)]
        gain: f32,
    },
}

fn free() -> f32 {
    0.5
}

/// Settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AllocatorConfig {
    /// τe: scores above expand.
    pub expand_threshold: f32,
    /// τc: mean scores below −τc collapse.
    pub collapse_threshold: f32,
    /// N_diff: edits of a refocus, at most.
    pub max_edits: usize,
    /// Iterations before the opposite edit of a span.
    pub cooldown: u32,
    /// Rounds of a refocus, at most.
    pub rounds: usize,
    /// Which candidate is next.
    pub kind: Kind,
    /// What collapses are for.
    pub collapses: Collapses,
}

impl Default for AllocatorConfig {
    fn default() -> Self {
        Self {
            expand_threshold: 0.2,
            collapse_threshold: 0.2,
            max_edits: 4,
            cooldown: 2,
            rounds: 3,
            kind: Kind::Greedy,
            collapses: Collapses::Alternate,
        }
    }
}

impl AllocatorConfig {
    /// Are these settings that mean something?
    ///
    /// # Errors
    /// The first that does not.
    pub fn check(&self) -> Result<()> {
        let thresholds =
            [("expand_threshold", self.expand_threshold), ("collapse_threshold", self.collapse_threshold)];
        for (key, value) in thresholds {
            if !(0.0..=1.0).contains(&value) {
                return refuse(format!("{key}: expected 0 to 1, got {value}"));
            }
        }
        for (key, value) in [("max_edits", self.max_edits), ("rounds", self.rounds)] {
            if value == 0 {
                return refuse(format!("{key}: expected at least 1, got 0"));
            }
        }
        if let Collapses::Pay { free, gain } = self.collapses {
            for (key, value) in [("free", free), ("gain", gain)] {
                if !(0.0..=2.0).contains(&value) {
                    return refuse(format!("collapses.pay.{key}: expected 0 to 2, got {value}"));
                }
            }
        }
        match self.kind {
            Kind::Stochastic { temperature, .. } if !(temperature.is_finite() && temperature > 0.0) => {
                refuse(format!("temperature: expected a number above 0, got {temperature}"))
            }
            Kind::Stochastic { top_k: 0, .. } => refuse("top_k: expected at least 1, got 0".to_string()),
            _ => Ok(()),
        }
    }
}

fn refuse<T>(message: String) -> Result<T> {
    Err(BaseError::network(ALLOCATOR, message))
}

/// What an edit does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// A gist becomes its K children.
    Expand,
    /// K siblings become their gist.
    Collapse,
}

/// An edit that was made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Edit {
    /// Which.
    pub action: Action,
    /// The gist, or the first of the siblings, as it was.
    pub entry: Entry,
    /// What it was made for: the gist's score, or the siblings' mean.
    pub score: f32,
    /// Iterations since the gist, or the youngest of the siblings, had changed.
    pub age: u32,
    /// Entries before.
    pub cost_before: usize,
    /// Entries after.
    pub cost_after: usize,
}

/// What could be done: entries of the context as the round found it.
#[derive(Clone, Debug)]
struct Candidate {
    entries: Range<usize>,
    entry: Entry,
    score: f32,
    age: u32,
}

/// One round: edits `context` by one score for each of its entries. Greedy rounds draw nothing from `random`.
///
/// # Errors
/// As the module says; nothing has changed then.
pub fn allocate(
    config: &AllocatorConfig,
    context: &mut WorkingContext,
    scores: &[f32],
    random: &mut Random,
) -> Result<Vec<Edit>> {
    config.check()?;
    check_scores(context, scores)?;
    let [expands, collapses] = candidates(config, context, scores);
    let free = vec![true; context.cost()];
    let mut round = Round { kind: config.kind, context, random, expands, collapses, free, edits: Vec::new() };
    match config.collapses {
        Collapses::Alternate => round.alternate(config.max_edits)?,
        Collapses::Pay { free, gain } => round.pay(config.max_edits, free, gain)?,
    }
    Ok(round.edits)
}

pub(crate) fn check_scores(context: &WorkingContext, scores: &[f32]) -> Result<()> {
    if scores.len() != context.cost() {
        return refuse(format!(
            "expected {} scores, one for each entry, got {}",
            context.cost(),
            scores.len()
        ));
    }
    if let Some(at) = scores.iter().position(|score| !score.is_finite()) {
        let what = format!("focus score of entry {at}");
        return Err(BaseError::NonFinite { what, value: f64::from(scores[at]) });
    }
    match scores.iter().position(|score| score.abs() > 1.0) {
        Some(at) => refuse(format!("focus score of entry {at}: expected −1 to 1, got {}", scores[at])),
        None => Ok(()),
    }
}

/// Expands and collapses that the scores ask for and nothing but the budget forbids, each in its order.
fn candidates(config: &AllocatorConfig, context: &WorkingContext, scores: &[f32]) -> [Vec<Candidate>; 2] {
    let (entries, residency) = (context.entries(), context.residency());
    let hierarchy = context.hierarchy();
    let mut scores = scores.to_vec();
    let lods: Vec<u8> = entries.iter().map(|entry| entry.lod).collect();
    legality::mask(&mut scores, &lods, hierarchy.levels());
    let rests = |at: usize, last: Change| residency[at].change == last && residency[at].age < config.cooldown;
    let of = |range: Range<usize>, score: f32| Candidate {
        entry: entries[range.start],
        score,
        age: residency[range.clone()].iter().map(|r| r.age).min().unwrap_or(0),
        entries: range,
    };
    let mut expands: Vec<Candidate> = (0..entries.len())
        .filter(|at| scores[*at] > config.expand_threshold && !rests(*at, Change::Collapsed))
        .map(|at| of(at..at + 1, scores[at]))
        .collect();
    let tail = context.protected_from();
    let mut collapses = Vec::new();
    for (at, entry) in entries.iter().enumerate() {
        if entry.lod >= hierarchy.levels() {
            continue;
        }
        let span = hierarchy.span(entry.lod + 1);
        if !entry.start.is_multiple_of(span) || entry.start + span > tail {
            continue;
        }
        let Some(siblings) = context.siblings(at) else { continue };
        let sum: f64 = scores[siblings.clone()].iter().map(|score| f64::from(*score)).sum();
        let score = (sum / siblings.len() as f64) as f32;
        if score < -config.collapse_threshold && !siblings.clone().any(|at| rests(at, Change::Expanded)) {
            collapses.push(of(siblings, score));
        }
    }
    // Stable, so that of equal scores the lower index comes first.
    expands.sort_by(|a, b| b.score.total_cmp(&a.score));
    collapses.sort_by(|a, b| a.score.total_cmp(&b.score));
    [expands, collapses]
}

struct Round<'a> {
    kind: Kind,
    context: &'a mut WorkingContext,
    random: &'a mut Random,
    expands: Vec<Candidate>,
    collapses: Vec<Candidate>,
    /// Which entries, as the round found them, are in no edit yet.
    free: Vec<bool>,
    edits: Vec<Edit>,
}

impl Round<'_> {
    /// Expands that are worth what they cost, then collapses that cost less than nothing.
    fn pay(&mut self, most: usize, free: f32, gain: f32) -> Result<()> {
        while self.edits.len() < most {
            let Some(expand) = self.draw(Action::Expand, None) else { break };
            if !self.has_room() {
                let payer = self.draw(Action::Collapse, Some(expand.entries.start));
                let worth = |payer: &Candidate| expand.score - (free + payer.score);
                let payer = payer.filter(|payer| worth(payer) > gain && self.edits.len() + 2 <= most);
                let Some(payer) = payer else { break };
                self.apply(Action::Collapse, &payer)?;
            }
            self.apply(Action::Expand, &expand)?;
        }
        while self.edits.len() < most {
            let Some(collapse) = self.draw(Action::Collapse, None).filter(|next| next.score < -free) else {
                break;
            };
            self.apply(Action::Collapse, &collapse)?;
        }
        Ok(())
    }

    fn alternate(&mut self, most: usize) -> Result<()> {
        let mut due = Action::Expand;
        let mut waiting: Option<Candidate> = None;
        while self.edits.len() < most {
            if due == Action::Collapse {
                due = Action::Expand;
                if let Some(collapse) = self.draw(Action::Collapse, None) {
                    self.apply(Action::Collapse, &collapse)?;
                    continue;
                }
            }
            let expand = waiting.take().or_else(|| self.draw(Action::Expand, None));
            match expand {
                Some(expand) if self.has_room() => {
                    self.apply(Action::Expand, &expand)?;
                    due = Action::Collapse;
                }
                Some(expand) => {
                    let at = expand.entries.start;
                    let payer =
                        self.draw(Action::Collapse, Some(at)).or_else(|| self.draw(Action::Collapse, None));
                    let Some(payer) = payer else { return Ok(()) };
                    self.apply(Action::Collapse, &payer)?;
                    waiting = self.free[at].then_some(expand);
                }
                None => {
                    let Some(collapse) = self.draw(Action::Collapse, None) else { return Ok(()) };
                    self.apply(Action::Collapse, &collapse)?;
                }
            }
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        self.context.cost() + self.context.hierarchy().block() - 1 <= self.context.limits().budget()
    }

    /// The next of these candidates, of those whose entries are free and which leave the entry `but` alone.
    fn draw(&mut self, action: Action, but: Option<usize>) -> Option<Candidate> {
        let list = match action {
            Action::Expand => &self.expands,
            Action::Collapse => &self.collapses,
        };
        let mut open = list.iter().filter(|candidate| {
            self.free[candidate.entries.clone()].iter().all(|free| *free)
                && but.is_none_or(|but| !candidate.entries.contains(&but))
        });
        match self.kind {
            Kind::Greedy => open.next().cloned(),
            Kind::Stochastic { temperature, top_k } => {
                let foremost: Vec<&Candidate> = open.take(top_k).collect();
                let largest = foremost.first()?.score.abs();
                // Of one, or at temperatures that leave one, this is the greedy choice.
                let weights: Vec<f64> = foremost
                    .iter()
                    .map(|c| (f64::from(c.score.abs() - largest) / f64::from(temperature)).exp())
                    .collect();
                let mut left = self.random.unit() * weights.iter().sum::<f64>();
                let at = weights.iter().position(|weight| {
                    left -= weight;
                    left < 0.0
                });
                // Rounding may leave a little behind the last.
                at.map_or(foremost.last(), |at| foremost.get(at)).map(|c| (*c).clone())
            }
        }
    }

    fn apply(&mut self, action: Action, candidate: &Candidate) -> Result<()> {
        let entry = candidate.entry;
        let at = self.context.index_at(entry.start).expect("edits keep what a context covers");
        let cost_before = self.context.cost();
        match action {
            Action::Expand => self.context.expand(at)?,
            Action::Collapse => self.context.collapse(at)?,
        }
        self.free[candidate.entries.clone()].fill(false);
        let cost_after = self.context.cost();
        let Candidate { score, age, .. } = *candidate;
        self.edits.push(Edit { action, entry, score, age, cost_before, cost_after });
        Ok(())
    }
}

/// A refocus and what it came to: the fields of MegaContext's event `focus_allocator`.
#[derive(Clone, Debug, PartialEq)]
pub struct Refocus {
    /// Edits of every round that made some.
    pub rounds: Vec<Vec<Edit>>,
    /// Expands.
    pub num_expand: usize,
    /// Collapses.
    pub num_collapse: usize,
    /// Edits over the entries that there were before.
    pub swap_rate: f64,
    /// Entries before.
    pub wc_length_before: usize,
    /// Entries after.
    pub wc_length: usize,
    /// Entries after, over the budget.
    pub utilization: f64,
    /// Mean age of entries after, iterations.
    pub residency_mean: f64,
    /// That of the oldest twentieth, at least.
    pub residency_p95: f64,
    /// Mean of the first round's scores.
    pub score_mean: f64,
    /// Their standard deviation, of the population.
    pub score_std: f64,
    /// Mean of their magnitudes.
    pub score_abs_mean: f64,
    /// The lowest of them.
    pub score_min: f64,
    /// The highest of them.
    pub score_max: f64,
}

impl Refocus {
    /// All edits, in their order.
    pub fn edits(&self) -> impl Iterator<Item = &Edit> {
        self.rounds.iter().flatten()
    }
}

impl Refocus {
    /// What `rounds` came to, which left `after` of `before` entries and began with `scores`.
    fn of(before: usize, after: &WorkingContext, scores: &[f32], rounds: Vec<Vec<Edit>>) -> Self {
        let scores: Vec<f64> = scores.iter().map(|score| f64::from(*score)).collect();
        let score_mean = mean(&scores);
        let count = |action| rounds.iter().flatten().filter(|edit| edit.action == action).count();
        let ages: Vec<f64> = after.residency().iter().map(|r| f64::from(r.age)).collect();
        Self {
            num_expand: count(Action::Expand),
            num_collapse: count(Action::Collapse),
            swap_rate: rounds.iter().map(Vec::len).sum::<usize>() as f64 / before as f64,
            wc_length_before: before,
            wc_length: after.cost(),
            utilization: after.cost() as f64 / after.limits().budget() as f64,
            residency_mean: mean(&ages),
            residency_p95: quantile(&ages, 0.95).unwrap_or(0.0),
            score_mean,
            score_std: mean(&scores.iter().map(|u| (u - score_mean).powi(2)).collect::<Vec<_>>()).sqrt(),
            score_abs_mean: mean(&scores.iter().map(|u| u.abs()).collect::<Vec<_>>()),
            score_min: scores.iter().copied().fold(f64::INFINITY, f64::min),
            score_max: scores.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            rounds,
        }
    }
}

/// One refocus of `context`: an iteration passes, then rounds of `score` (one for each entry of what it is shown) and
/// [`allocate`], until one edits nothing or N_diff edits are made.
///
/// # Errors
/// As [`allocate`], and what `score` fails with; in any round, nothing has changed then.
pub fn refocus(
    config: &AllocatorConfig,
    context: &mut WorkingContext,
    score: &mut dyn FnMut(&WorkingContext) -> Result<Vec<f32>>,
    random: &mut Random,
) -> Result<Refocus> {
    let mut edited = context.clone();
    edited.advance_residency();
    let report = decide(None, config, &mut edited, score, random)?;
    *context = edited;
    Ok(report)
}

/// [`refocus`] of a context whose iteration has passed. Another allocator is shown the context once, with its scores; its edits are
/// checked by the context's own rules and made; only where it leaves the choice does [`allocate`] choose.
///
/// # Errors
/// As [`refocus`] and [`edits::follow`], and what the other allocator fails with; nothing has changed then.
pub fn decide(
    other: Option<&dyn Allocator>,
    config: &AllocatorConfig,
    context: &mut WorkingContext,
    score: &mut dyn FnMut(&WorkingContext) -> Result<Vec<f32>>,
    random: &mut Random,
) -> Result<Refocus> {
    config.check()?;
    let first = score(context)?;
    check_scores(context, &first)?;
    let before = context.cost();
    let chosen = other.map_or(Ok(None), |other| other.choose(context, &first))?;
    if let Some(wanted) = chosen {
        let edits = edits::follow(context, &first, &wanted)?;
        let rounds = if edits.is_empty() { Vec::new() } else { vec![edits] };
        return Ok(Refocus::of(before, context, &first, rounds));
    }
    let mut edited = context.clone();
    let mut drawn = random.clone();
    let mut rounds: Vec<Vec<Edit>> = Vec::new();
    let mut left = config.max_edits;
    for round in 0..config.rounds {
        let again = if round == 0 { None } else { Some(score(&edited)?) };
        let config = AllocatorConfig { max_edits: left, ..config.clone() };
        let edits = allocate(&config, &mut edited, again.as_ref().unwrap_or(&first), &mut drawn)?;
        left -= edits.len();
        let done = edits.is_empty();
        if !done {
            rounds.push(edits);
        }
        if done || left == 0 {
            break;
        }
    }
    let report = Refocus::of(before, &edited, &first, rounds);
    *context = edited;
    *random = drawn;
    Ok(report)
}
