//! Variants over random trees: their length, what they cover, what they leave alone; and how often each level is drawn.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

#[path = "common/trees.rs"]
mod trees;

use lensnet_adapter::variants::{VariantConfig, baseline, length, variants};
use megacontext_base::context::{Entry, GistTree, WorkingContext};
use megacontext_base::random::Random;
use proptest::prelude::*;
use trees::{cases, limits, tree};

fn tokens(tree: &GistTree, most: usize) -> WorkingContext {
    WorkingContext::recent(tree, limits(most, 0)).unwrap()
}

proptest! {
    #![proptest_config(cases(1500))]

    #[test]
    fn variants_have_the_length_and_keep_the_rest(
        (block, levels, n) in (2..6usize, 1..4u8, 1..200usize),
        (most, cut, recent) in (1..220usize, 0.0..1.0f64, 0..40u64),
        (level2, walk, seed) in (0.0..=1.0f64, prop::collection::vec(any::<usize>(), 0..6), any::<u64>()),
    ) {
        let tree = tree(block, levels, n);
        let mut context = WorkingContext::recent(&tree, limits(most.max(recent as usize), recent)).unwrap();
        for at in walk {
            let _ = context.collapse(at % context.cost());
        }
        let wanted = ((context.cost() as f64 * cut) as usize).max(recent as usize).max(1);
        let config = VariantConfig { count: 3, level2, recent };
        let made = variants(&config, &context, &tree, wanted, &mut Random::new(seed));
        let coarsest = {
            let mut coarsest = context.clone();
            while let Some(at) = (0..coarsest.cost()).find(|at| coarsest.check_collapse(*at).is_ok()) {
                coarsest.collapse(at).unwrap();
            }
            coarsest.cost()
        };
        let Ok(made) = made else {
            let said = format!("length: expected at least {coarsest}, ");
            let error = made.unwrap_err().to_string();
            prop_assert!(coarsest > wanted && error.contains(&said), "{}: {}", wanted, error);
            return Ok(());
        };
        prop_assert!(coarsest <= wanted);
        prop_assert_eq!(made.len(), 3);
        for variant in &made {
            let (before, after) = (context.cost(), variant.cost());
            prop_assert!(after <= wanted && (after == before || after + block - 1 > wanted));
            prop_assert_eq!((before - after) % (block - 1), 0);
            if (before - wanted.min(before)) % (block - 1) == 0 {
                prop_assert_eq!(after, wanted.min(before));
            }
            prop_assert_eq!(variant.coverage(), context.coverage());
            prop_assert_eq!(variant.limits(), limits(wanted, recent));
            // Nothing becomes finer, and what is new is whole nodes: the context made of the entries says so.
            for entry in variant.entries() {
                let old = context.entries()[context.index_at(entry.start).unwrap()];
                prop_assert!(old.start == entry.start && old.lod <= entry.lod);
            }
            prop_assert!(WorkingContext::new(variant.entries().to_vec(), &tree, variant.limits()).is_ok());
            let tail = context.coverage().end.saturating_sub(recent);
            let of_tail = |c: &WorkingContext| -> Vec<Entry> {
                c.entries().iter().filter(|e| e.start >= tail).copied().collect()
            };
            prop_assert_eq!(of_tail(variant), of_tail(&context));
        }
        let again = variants(&config, &context, &tree, wanted, &mut Random::new(seed)).unwrap();
        prop_assert_eq!(again, made);
    }

    #[test]
    fn lengths_are_reached_exactly((most, block) in (1..4000usize, 2..40usize), progress in 0.0..=1.0f64) {
        let found = length(most, block, progress);
        let wanted = ((0.9 - 0.15 * progress) * most as f64) as usize;
        prop_assert!(found == 0 || (most - found).is_multiple_of(block - 1));
        prop_assert!(found <= wanted + 1 && found + block > wanted);
    }
}

#[test]
fn the_original_sizes() {
    // run10: 2048 tokens, blocks of 32, three quarters of them.
    let tree = tree(32, 2, 3000);
    let context = tokens(&tree, 2048);
    let wanted = length(2048, 32, 1.0);
    assert_eq!(wanted, 2048 - 17 * 31);
    assert_eq!(length(2048, 32, 0.0), 2048 - 7 * 31);
    let config = VariantConfig { count: 8, ..VariantConfig::default() };
    let made = variants(&config, &context, &tree, wanted, &mut Random::new(1)).unwrap();
    for (at, variant) in made.iter().enumerate() {
        assert_eq!((variant.cost(), variant.coverage()), (wanted, 952..3000));
        assert!(variant.entries()[wanted - 128..].iter().all(|e| e.lod == 0));
        assert!(!made[..at].contains(variant), "two of eight are the same");
    }
    let newest = baseline(&config, &tree, wanted).unwrap();
    assert_eq!((newest.cost(), newest.coverage()), (wanted, 3000 - wanted as u64..3000));
    assert!(newest.entries().iter().all(|e| e.lod == 0));
}

#[test]
fn level_two_is_drawn_as_often_as_asked() {
    let tree = tree(4, 2, 4096);
    let context = tokens(&tree, 4096);
    // 15 entries fewer are one node of level 2, or five of level 1; after the first of those, 12 fewer are the node of level 2
    // around it, if the second draw says so.
    let config = VariantConfig { count: 2000, level2: 0.1, recent: 0 };
    let made = variants(&config, &context, &tree, 4096 - 15, &mut Random::new(2)).unwrap();
    let second = made.iter().filter(|v| v.entries().iter().any(|e| e.lod == 2)).count();
    let (part, draws) = (0.1 + 0.9 * 0.1, 2000.0f64);
    let (expected, sigma) = (draws * part, (draws * part * (1.0 - part)).sqrt());
    assert!((second as f64 - expected).abs() < 4.0 * sigma, "{second}, expected {expected} ± {sigma}");
    // And everywhere: the nodes' mean place is the middle.
    let starts: Vec<f64> = made
        .iter()
        .flat_map(|v| v.entries().iter().filter(|e| e.lod == 1).map(|e| e.start as f64).collect::<Vec<_>>())
        .collect();
    let mean = starts.iter().sum::<f64>() / starts.len() as f64;
    let sigma = 4096.0 / 12f64.sqrt() / (starts.len() as f64).sqrt();
    assert!((mean - 2046.0).abs() < 4.0 * sigma, "{mean} ± {sigma}");
}

#[test]
fn a_length_that_nothing_reaches_is_refused() {
    let tree = tree(4, 1, 64);
    let config = VariantConfig { count: 1, level2: 0.1, recent: 0 };
    let error = variants(&config, &tokens(&tree, 64), &tree, 15, &mut Random::new(0)).unwrap_err();
    let expected = "working context variants: length: expected at least 16, the entries of the coarsest view of tokens 0..64, got 15";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_length_below_the_protected_tail_is_refused() {
    let tree = tree(4, 1, 256);
    let config = VariantConfig::default();
    let error = variants(&config, &tokens(&tree, 256), &tree, 127, &mut Random::new(0)).unwrap_err();
    assert!(error.to_string().contains("room for the 128 protected tokens at least, got 127"), "{error}");
    assert!(baseline(&config, &tree, 127).is_err());
}

#[test]
fn a_gist_among_the_recent_tokens_is_refused() {
    let tree = tree(4, 1, 64);
    let mut context = tokens(&tree, 64);
    context.collapse(40).unwrap();
    let config = VariantConfig { count: 1, level2: 0.1, recent: 24 };
    let error = variants(&config, &context, &tree, 40, &mut Random::new(0)).unwrap_err().to_string();
    assert!(
        error.contains("expected tokens from token 40 on, the protected tail, got level 1 at token 40"),
        "{error}"
    );
}

#[test]
fn a_probability_that_is_none_is_refused() {
    let tree = tree(4, 1, 64);
    let config = VariantConfig { level2: f64::NAN, recent: 0, ..VariantConfig::default() };
    let error =
        variants(&config, &tokens(&tree, 64), &tree, 40, &mut Random::new(0)).unwrap_err().to_string();
    assert_eq!(error, "working context variants: level2: expected a probability, 0 to 1, got NaN");
}
