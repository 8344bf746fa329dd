//! Measured edits, lessons made of them, and a step over several lessons, against the plain way and differences.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use candle_core::{Device, Tensor};
use lensnet_adapter::allocator::AllocatorConfig;
use lensnet_adapter::counterfactual::{CounterfactualConfig, Scale, targets};
use lensnet_adapter::focus::{Focus, History, Policy, shows};
use lensnet_adapter::labels::Label;
use lensnet_adapter::trainer::{LensTrainer, Lesson, Objective, Seen, focus, score};
use lensnet_adapter::utility::{Trial, measure, trials};
use lensnet_adapter::{LensNet, LensNetConfig};
use megacontext_base::buffers::Buffers;
use megacontext_base::config::DecoderConfig;
use megacontext_base::context::{
    BaseModel, GistSource, GistTree, Hierarchy, HorizonLoss, Limits, WorkingContext,
};
use megacontext_base::decoder::Decoder;
use megacontext_base::gradients::AdamWConfig;
use megacontext_base::random::{Random, mix};
use megacontext_base::rope::SigmaRule;
use megacontext_base::weights::Weights;
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::precision::Precision;

const K: usize = 4;
const T: usize = 46;
const H: usize = 5;

/// Means of blocks.
struct Means {
    width: usize,
}

impl GistSource for Means {
    fn block(&self) -> usize {
        K
    }

    fn width(&self) -> usize {
        self.width
    }

    fn version(&self) -> u16 {
        0
    }

    fn gists(&self, children: &[f32], blocks: usize) -> megacontext_base::error::Result<Vec<f32>> {
        let mut gists = vec![0.0; blocks * self.width];
        for (at, child) in children.chunks_exact(self.width).enumerate() {
            let gist = &mut gists[at / K * self.width..][..self.width];
            gist.iter_mut().zip(child).for_each(|(gist, x)| *gist += x / K as f32);
        }
        Ok(gists)
    }
}

struct World {
    decoder: Decoder,
    history: History,
    rule: SigmaRule,
    allocator: AllocatorConfig,
}

impl World {
    fn new() -> Self {
        let dir =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../integration-tests/fixtures/llama/tied_f32");
        let config = DecoderConfig::from_dir(&dir).unwrap();
        let decoder =
            Decoder::from_weights(config, &Weights::open(&dir).unwrap(), Precision::F32, &[]).unwrap();
        let (width, vocabulary) = (decoder.config().hidden_size, decoder.config().vocab_size as u64);
        let tokens: Vec<u32> = (0..(T + H) as u64).map(|i| (mix(i + 1) % vocabulary) as u32).collect();
        let base = BaseModel { name: "tiny".into(), fingerprint: "0123456789abcdef".into() };
        let mut tree = GistTree::new(Hierarchy::new(K, 2).unwrap(), width, base).unwrap();
        tree.append(&tokens[..T], &decoder, &Means { width }).unwrap();
        let history = History { tree, future: tokens[T..].to_vec(), fact: Some(0..K as u64) };
        let rule = SigmaRule { block: K, ..SigmaRule::default() };
        Self { decoder, history, rule, allocator: AllocatorConfig::default() }
    }

    fn loss(&self) -> HorizonLoss<'_> {
        let scaling = &self.decoder.config().rope_scaling;
        HorizonLoss::new(&self.decoder, scaling, self.rule, Pattern::Dense).unwrap()
    }

    fn focus<'a>(&'a self, loss: &'a HorizonLoss<'a>) -> Focus<'a> {
        let limits = Limits::new(26, 6).unwrap();
        Focus { loss, allocator: &self.allocator, other: None, limits, refocuses: 2 }
    }
}

fn network(world: &World) -> LensNet {
    let config = LensNetConfig { block: K, ..LensNetConfig::new(world.decoder.config().hidden_size, 4) };
    LensNet::new(config, 5).unwrap()
}

#[test]
fn every_legal_edit_is_measured_and_nothing_else() {
    let world = World::new();
    let (loss, tree) = (world.loss(), &world.history.tree);
    let mut buffers = Buffers::default();
    let context = world.focus(&loss).begin(&world.history).unwrap();
    let found =
        measure(&loss, tree, &context, &world.history.future, None, &mut Random::new(0), &mut buffers)
            .unwrap();
    let one = |context: &WorkingContext| {
        loss.measure(tree, &[context], &world.history.future, &mut Buffers::default()).unwrap()[0]
    };
    assert!((found.now - one(&context)).abs() < 1e-6);
    // With room for anything, an edit is legal where the context itself takes it.
    let roomy = WorkingContext::new(context.entries().to_vec(), tree, Limits::new(T, 6).unwrap()).unwrap();
    let mut edits = 0;
    for at in 0..context.cost() {
        let mut expanded = roomy.clone();
        assert_eq!(found.measured[at].expanded.is_some(), expanded.expand(at).is_ok(), "expand {at}");
        if let Some(nll) = found.measured[at].expanded {
            assert!((nll - one(&expanded)).abs() < 1e-5, "expand {at}");
            edits += 1;
        }
        let first = roomy.siblings(at).map(|siblings| siblings.start);
        let mut collapsed = roomy.clone();
        let legal = first.is_some_and(|first| collapsed.collapse(first).is_ok());
        assert_eq!(found.measured[at].collapsed.is_some(), legal, "collapse {at}");
        if let Some(nll) = found.measured[at].collapsed {
            assert!((nll - one(&collapsed)).abs() < 1e-5, "collapse {at}");
            edits += usize::from(first == Some(at));
        }
    }
    let all = trials(&context, tree).unwrap();
    assert_eq!(all.len(), edits);
    assert!(all.iter().any(|trial| matches!(trial, Trial::Expand(_))), "{all:?}");
    assert!(all.iter().any(|trial| matches!(trial, Trial::Collapse(_))), "{all:?}");
    let few =
        measure(&loss, tree, &context, &world.history.future, Some(2), &mut Random::new(0), &mut buffers)
            .unwrap();
    let tried = |measured: &[lensnet_adapter::counterfactual::Measured]| {
        measured.iter().filter(|one| **one != Default::default()).count()
    };
    assert!(tried(&few.measured) < tried(&found.measured) && tried(&few.measured) >= 2);
}

#[test]
fn an_oracle_shows_what_its_scores_ask_for() {
    let world = World::new();
    let loss = world.loss();
    let focus = world.focus(&loss);
    let mut buffers = Buffers::default();
    let scale = Scale { unit: 0.02, margin: 0.01, signed: false };
    let choose = |policy, buffers: &mut Buffers| {
        focus.choose(policy, &world.history, &mut Random::new(1), buffers).unwrap()
    };
    let begun = choose(Policy::Recency, &mut buffers);
    assert!(begun.steps.is_empty());
    assert_eq!(begun.context.entries(), focus.begin(&world.history).unwrap().entries());
    let oracle = choose(Policy::Oracle(scale), &mut buffers);
    let first = &oracle.steps[0];
    let found = measure(
        &loss,
        &world.history.tree,
        &first.before,
        &world.history.future,
        None,
        &mut Random::new(0),
        &mut buffers,
    )
    .unwrap();
    let wanted = targets(found.now, &found.measured, scale).unwrap();
    for (score, wanted) in first.scores.iter().zip(wanted) {
        assert!((f64::from(*score) - wanted.unwrap_or(0.0)).abs() < 1e-6);
    }
    assert!(first.refocus.edits().count() > 0);
    // The same seed chooses the same, another one need not.
    let random =
        |seed| focus.choose(Policy::Random, &world.history, &mut Random::new(seed), &mut Buffers::default());
    assert_eq!(random(3).unwrap().context, random(3).unwrap().context);
    assert!(shows(&oracle.context, &(T as u64 - 6..T as u64)), "the protected tail");
}

#[test]
fn a_label_comes_back_from_its_line() {
    let world = World::new();
    let loss = world.loss();
    let focus = world.focus(&loss);
    let mut random = Random::new(2);
    let label = Label::of_edits(
        &focus,
        Policy::Random,
        (7, &world.history),
        Some(3),
        &mut random,
        &mut Buffers::default(),
    )
    .unwrap();
    let other: Vec<WorkingContext> = [Policy::Recency, Policy::Random]
        .map(|policy| {
            focus.choose(policy, &world.history, &mut random, &mut Buffers::default()).unwrap().context
        })
        .to_vec();
    let variants = Label::of_variants(&focus, &other, (8, &world.history), &mut Buffers::default()).unwrap();
    for (label, number) in [(label, 7), (variants, 8)] {
        let line = serde_json::to_string(&label).unwrap();
        let back: Label = serde_json::from_str(&line).unwrap();
        assert_eq!((&back, back.history()), (&label, number));
        let scale = Scale { unit: 1.0, margin: 0.5, signed: false };
        assert_eq!(
            back.lesson(&focus, &world.history, scale).unwrap(),
            label.lesson(&focus, &world.history, scale).unwrap()
        );
    }
}

/// Lessons of both kinds, of contexts of different lengths.
fn lessons(world: &World) -> Vec<Lesson> {
    let loss = world.loss();
    let focus = world.focus(&loss);
    let mut random = Random::new(4);
    let mut contexts = Vec::new();
    for policy in [Policy::Recency, Policy::Random, Policy::Random] {
        let chosen = focus.choose(policy, &world.history, &mut random, &mut Buffers::default()).unwrap();
        contexts.push(focus.seen(&chosen.context, &world.history).unwrap());
    }
    let recent = WorkingContext::recent(&world.history.tree, Limits::new(18, 6).unwrap()).unwrap();
    contexts.push(focus.seen(&recent, &world.history).unwrap());
    let targets = (0..contexts[0].len()).map(|at| (at % 3 != 0).then_some((at as f64 * 0.7).sin())).collect();
    vec![
        Lesson::Utilities { seen: contexts[0].clone(), targets },
        Lesson::Preference { seen: contexts, losses: vec![1.0, 0.4, 1.7, 0.9] },
    ]
}

#[test]
fn a_step_over_lessons_of_both_kinds_follows_the_differences() {
    let world = World::new();
    let lessons = lessons(&world);
    assert_ne!(lessons_len(&lessons[1]).iter().min(), lessons_len(&lessons[1]).iter().max());
    let adamw = AdamWConfig { clip: 0.0, ..AdamWConfig::default() };
    let objective = Objective { counterfactual: CounterfactualConfig::default(), ..Objective::default() };
    let trainer =
        || LensTrainer::new(network(&world), world.rule, 2, objective.clone(), adamw.clone()).unwrap();
    let mut first = trainer();
    let begun = first.step(&lessons, 0.0).unwrap();
    assert_eq!(begun.contexts, 5);
    // After one step the first moment is (1 − β1) times the gradient.
    let gradients: Vec<(String, Vec<f32>)> = first
        .optimizer
        .moments()
        .unwrap()
        .into_iter()
        .filter_map(|(name, values)| {
            let name = name.strip_prefix("exp_avg.")?.to_string();
            Some((name, values.iter().map(|v| v / (1.0 - adamw.betas[0]) as f32).collect()))
        })
        .collect();
    let mut random = Random::new(9);
    for (name, gradient) in &gradients {
        // Along one random direction for each parameter: a sum over all of its values.
        let direction: Vec<f32> = gradient.iter().map(|_| random.uniform(-1.0, 1.0) as f32).collect();
        let along: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        let at = |step: f32| {
            let mut moved = trainer();
            let params = moved.network.params_mut();
            let shape = params.shape(name).unwrap().to_vec();
            let values: Vec<f32> = params.get(name).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let values: Vec<f32> = values.iter().zip(&direction).map(|(v, d)| v + step * d).collect();
            params.set(name, &Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap();
            moved.step(&lessons, 0.0).unwrap().loss
        };
        let h = 4e-4;
        let measured = (at(h) - at(-h)) / f64::from(2.0 * h);
        let off = (along - measured).abs();
        assert!(off < 2e-3 + 0.03 * measured.abs(), "{name}: {along}, measured {measured}");
    }
}

fn lessons_len(lesson: &Lesson) -> Vec<usize> {
    match lesson {
        Lesson::Utilities { seen, .. } => vec![seen.len()],
        Lesson::Preference { seen, .. } => seen.iter().map(Seen::len).collect(),
    }
}

#[test]
fn steps_bring_scores_to_their_targets() {
    let world = World::new();
    let lesson = lessons(&world).remove(0);
    let Lesson::Utilities { seen, targets } = &lesson else { panic!("a lesson of utilities") };
    let adamw = AdamWConfig::default();
    // Regression alone: the other terms ask for something else than these targets.
    let alone = CounterfactualConfig {
        rank_weight: 0.0,
        budget_weight: 0.0,
        illegal_weight: 0.0,
        ..Default::default()
    };
    let objective = Objective { counterfactual: alone, ..Objective::default() };
    let mut trainer = LensTrainer::new(network(&world), world.rule, 2, objective, adamw).unwrap();
    let error = |network: &LensNet| {
        let scores: Vec<f32> = score(network, &[seen], &world.rule).unwrap()[0].to_vec1().unwrap();
        let known = scores.iter().zip(targets).filter_map(|(u, y)| Some((f64::from(*u) - (*y)?).powi(2)));
        known.clone().sum::<f64>() / known.count() as f64
    };
    let before = error(&trainer.network);
    for _ in 0..150 {
        trainer.step(std::slice::from_ref(&lesson), 3e-3).unwrap();
    }
    let after = error(&trainer.network);
    assert!(after < 0.25 * before, "{before} to {after}");
    // The allocator reads nothing impossible.
    let scores = focus(&trainer.network, seen, &world.rule, 2).unwrap();
    assert!(scores.iter().zip(&seen.lod).all(|(u, lod)| *lod > 0 || *u <= 0.0));
}

#[test]
fn a_step_without_lessons_is_refused() {
    let world = World::new();
    let mut trainer =
        LensTrainer::new(network(&world), world.rule, 2, Objective::default(), AdamWConfig::default())
            .unwrap();
    let error = trainer.step(&[], 1e-3).unwrap_err().to_string();
    assert!(error.contains("expected a step of at least one lesson"), "{error}");
}

#[test]
fn fewer_losses_than_contexts_are_refused() {
    let world = World::new();
    let mut lesson = lessons(&world).remove(1);
    if let Lesson::Preference { losses, .. } = &mut lesson {
        losses.pop();
    }
    let mut trainer =
        LensTrainer::new(network(&world), world.rule, 2, Objective::default(), AdamWConfig::default())
            .unwrap();
    let error = trainer.step(&[lesson], 1e-3).unwrap_err().to_string();
    assert!(error.contains("preference: expected 4 losses, got 3"), "{error}");
}

#[test]
fn places_of_other_blocks_are_refused() {
    let world = World::new();
    let rule = SigmaRule { block: 8, ..SigmaRule::default() };
    let made = LensTrainer::new(network(&world), rule, 2, Objective::default(), AdamWConfig::default());
    let error = made.err().unwrap().to_string();
    assert!(error.contains("expected places of blocks of 4, the network's, got 8"), "{error}");
}
