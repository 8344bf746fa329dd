//! What a validation finds against the same by hand: two plain passes over whole contexts, and every metric by its definition.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{Device, Tensor};
use common::plain::{Plain, Stands, mean};
use common::{decoder, random, tokens};
use gistnet_adapter::costs::Costs;
use gistnet_adapter::delta_nll::Span;
use gistnet_adapter::trainer::Setting;
use gistnet_adapter::validate::{Baseline, Baselines, Kept, SUBSTITUTED, Validation, Validator};
use gistnet_adapter::{GistNet, GistNetConfig, Mode, Pooling};
use megacontext_base::buffers::Buffers;
use megacontext_base::decoder::Decoder;
use megacontext_base::rope::{SigmaPreset, SigmaRule};
use megacontext_kernels::attention::Pattern;

const K: usize = 4;
const H: usize = 6;
const RULE: SigmaRule = SigmaRule { preset: SigmaPreset::Document, block: K, uniform: false };
const SPARSE: Pattern = Pattern::ShiftedSparse { group: 14 };
/// The third has no room for a block.
const LENGTHS: [usize; 4] = [60, 34, 13, 42];
/// First tokens of the blocks that are measured, at most six: pairs of neighbours where there are more.
const BLOCKS: [&[usize]; 4] =
    [&[4, 8, 20, 24, 36, 40], &[4, 8, 12, 16, 20, 24], &[], &[4, 8, 12, 16, 24, 28]];
/// The same of the second level, which spans 16 tokens.
const WIDE: [&[usize]; 4] = [&[16, 32], &[], &[], &[16]];

/// A model that is so sure of itself that replacing a block can cost more than a nat.
fn sure() -> Decoder {
    let mut decoder = decoder("llama/tied_f32");
    let name = "model.norm.weight";
    let scaled = (decoder.params().get(name).unwrap() * 6.0).unwrap();
    decoder.params_mut().set(name, &scaled).unwrap();
    decoder
}

fn setting(decoder: &Decoder, pattern: Pattern) -> Setting {
    Setting { scaling: decoder.config().rope_scaling.clone(), rule: RULE, pattern }
}

fn network(decoder: &Decoder) -> GistNet {
    let width = decoder.config().hidden_size;
    let config = GistNetConfig { block: K, pooling: Pooling::Cls, layers: 2, ..GistNetConfig::new(width, 4) };
    let mut network = GistNet::new(config, 3).unwrap();
    network.params_mut().set("cls_token", &random(&[1, 1, width], 4)).unwrap();
    network
}

fn documents(decoder: &Decoder) -> Vec<Vec<u32>> {
    LENGTHS.iter().map(|length| tokens(decoder, *length)).collect()
}

fn validated(
    decoder: &Decoder,
    network: &GistNet,
    documents: &[Vec<u32>],
    kept: &mut Kept,
) -> (Baselines, Validation) {
    let dense = setting(decoder, Pattern::Dense);
    let validator = Validator {
        decoder,
        setting: &dense,
        sparse: Some(setting(decoder, SPARSE)),
        documents,
        horizon: H,
        most_blocks: 6,
    };
    let mut buffers = Buffers::default();
    let baselines = validator.baselines(kept, &mut buffers, &mut || true).unwrap().unwrap();
    let found = validator.measure(network, &baselines, kept, &mut buffers, &mut || true).unwrap().unwrap();
    (baselines, found)
}

#[track_caller]
fn close(what: &str, got: f64, want: f64) {
    assert!((got - want).abs() < 2e-5 * want.abs().max(1.0), "{what}: {got}, by hand {want}");
}

/// The gist of a span, level by level.
fn gist(network: &GistNet, decoder: &Decoder, tokens: &[u32], span: Span) -> Vec<f32> {
    let count = K.pow(span.lod);
    let x = decoder.embed(&tokens[span.start..span.start + count], 1).unwrap();
    let levels = network.hierarchy(&x, span.lod).unwrap();
    levels.last().unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// ΔNLL@H of spans of one level, by passage, by hand; documents without any are left out.
fn by_hand(
    decoder: &Decoder,
    documents: &[Vec<u32>],
    starts: &[&[usize]],
    lod: u32,
    pattern: Pattern,
    stands: &dyn Fn(&[u32], Span) -> Vec<f32>,
) -> Costs {
    let of = |(tokens, starts): (&Vec<u32>, &&[usize])| -> Vec<f64> {
        let plain = Plain { decoder, tokens, rule: RULE, pattern, horizon: H };
        let cost = |start: &usize| {
            let span = Span { start: *start, lod };
            let vector = stands(tokens, span);
            let stands = if vector.is_empty() { Stands::Nothing } else { Stands::Vectors(&vector) };
            plain.delta(&[span], stands)
        };
        starts.iter().map(cost).collect()
    };
    Costs::of(documents.iter().zip(starts).map(of).filter(|passage| !passage.is_empty()).collect())
}

fn same(what: &str, got: &Costs, want: &Costs) {
    assert_eq!(got.by_passage().len(), want.by_passage().len(), "{what}");
    for (number, (got, want)) in got.by_passage().iter().zip(want.by_passage()).enumerate() {
        assert_eq!(got.len(), want.len(), "{what}: passage {number}");
        for (got, want) in got.iter().zip(want) {
            close(&format!("{what}: passage {number}"), *got, *want);
        }
    }
}

#[test]
fn every_metric_is_what_it_is_by_hand() -> Result<()> {
    let decoder = sure();
    let documents = documents(&decoder);
    let network = network(&decoder);
    let (baselines, found) = validated(&decoder, &network, &documents, &mut Kept::new(0, true));

    // Costs of everything, block by block.
    let hand = |starts: &[&[usize]], lod, pattern, stands: &dyn Fn(&[u32], Span) -> Vec<f32>| {
        by_hand(&decoder, &documents, starts, lod, pattern, stands)
    };
    let own = |tokens: &[u32], span: Span| gist(&network, &decoder, tokens, span);
    let nothing = |_: &[u32], _: Span| Vec::new();
    let means = |tokens: &[u32], span: Span| -> Vec<f32> {
        let x = decoder.embed(&tokens[span.start..span.start + K], 1).unwrap();
        x.squeeze(0).unwrap().mean(0).unwrap().to_vec1().unwrap()
    };
    let costs = hand(&BLOCKS, 1, Pattern::Dense, &own);
    same("gists", &found.costs, &costs);
    let deleted = hand(&BLOCKS, 1, Pattern::Dense, &nothing);
    same("deleted", &baselines.blocks[&Baseline::Deleted], &deleted);
    same("mean", &baselines.blocks[&Baseline::Mean], &hand(&BLOCKS, 1, Pattern::Dense, &means));
    let wide = hand(&WIDE, 2, Pattern::Dense, &own);
    let wide_deleted = hand(&WIDE, 2, Pattern::Dense, &nothing);
    same("second level, deleted", baselines.level2_deleted.as_ref().unwrap(), &wide_deleted);
    let sparse = hand(&BLOCKS, 1, SPARSE, &own);
    let sparse_deleted = hand(&BLOCKS, 1, SPARSE, &nothing);
    same("sparse, deleted", baselines.sparse_deleted.as_ref().unwrap(), &sparse_deleted);

    // Their means.
    let average = |costs: &Costs| costs.values().sum::<f64>() / costs.values().count() as f64;
    assert_eq!((found.horizon, found.blocks), (H, 18));
    close("ΔNLL@H", found.delta_nll, average(&costs));
    let sums = costs.by_passage().iter().map(|p| p.iter().sum::<f64>() - average(&costs) * p.len() as f64);
    let error = (3.0 / 2.0 * sums.map(|s| s * s).sum::<f64>()).sqrt() / 18.0;
    close("its error", found.delta_nll_error.unwrap(), error);
    close("second level", found.level2_delta_nll.unwrap(), average(&wide));
    close("second level, deleted", found.level2_deleted.unwrap(), average(&wide_deleted));
    close("sparse", found.sparse_delta_nll.unwrap(), average(&sparse));
    close("sparse, deleted", found.sparse_deleted.unwrap(), average(&sparse_deleted));
    close("gap", found.sparse_dense_gap().unwrap(), average(&sparse) - average(&costs));
    let mut told = 0;
    for (what, got, cost, deleted) in [
        ("recovered", found.recovered, &costs, &deleted),
        ("recovered of the second level", found.level2_recovered, &wide, &wide_deleted),
        ("recovered under sparse attention", found.sparse_recovered, &sparse, &sparse_deleted),
    ] {
        let want = (average(deleted) > 0.0).then(|| 1.0 - average(cost) / average(deleted));
        assert_eq!(got.is_some(), want.is_some(), "{what}: {got:?}, by hand {want:?}");
        told += usize::from(got.is_some());
        if let (Some(got), Some(want)) = (got, want) {
            close(what, got, want);
        }
    }
    assert!(told > 0, "the model tells nothing of what is recovered");
    let below = costs.values().filter(|cost| *cost < SUBSTITUTED).count();
    assert!(below > 0 && below < 18, "the model tells nothing of substitutability: {below} of 18");
    close("substitutability", found.substitutability, below as f64 / 18.0);

    // Pairs of costs.
    assert_eq!(found.against.len(), Baseline::ALL.len());
    let less: Vec<f64> = costs.values().zip(deleted.values()).map(|(a, b)| a - b).collect();
    close("gist less deleted", found.against[&Baseline::Deleted].mean, less.iter().sum::<f64>() / 18.0);

    // Losses: of the same contexts.
    let (mut replaced, mut full, mut gists): (f64, f64, Vec<Vec<f32>>) = Default::default();
    let mut next = Vec::new();
    for (tokens, starts) in documents.iter().zip(BLOCKS) {
        let plain = Plain { decoder: &decoder, tokens, rule: RULE, pattern: Pattern::Dense, horizon: H };
        for (number, start) in starts.iter().enumerate() {
            let span = Span { start: *start, lod: 1 };
            let vector = own(tokens, span);
            replaced += mean(&plain.replaced(&[span], Stands::Vectors(&vector)).0) / 18.0;
            full += mean(&plain.full(start + K)) / 18.0;
            if number > 0 && starts[number - 1] + K == *start {
                next.push([gists.len() - 1, gists.len()]);
            }
            gists.push(vector);
        }
    }
    close("loss", found.full_nll, full);
    close("perplexity ratio", found.perplexity_ratio, replaced.exp() / full.exp());
    close("degradation", found.degradation, (replaced - full) / full);

    // Gists.
    let apart = |a: usize, b: usize| {
        let product = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let (a, b) = (&gists[a], &gists[b]);
        1.0 - product(a, b) / (product(a, a) * product(b, b)).sqrt()
    };
    let pairs: Vec<f64> =
        (0..18).flat_map(|a| (0..a).map(move |b| (a, b))).map(|(a, b)| apart(a, b)).collect();
    let diversity = pairs.iter().sum::<f64>() / pairs.len() as f64;
    close("diversity", found.diversity.unwrap(), diversity);
    assert_eq!(next.len(), 3 + 5 + 4);
    let neighbours = next.iter().map(|[a, b]| apart(*a, *b)).sum::<f64>() / next.len() as f64;
    close("contrast gap", found.contrast_gap.unwrap(), diversity - neighbours);
    Ok(())
}

#[test]
fn own_tokens_cost_what_they_cost_in_their_own_places() {
    let decoder = sure();
    let documents = documents(&decoder);
    let (baselines, _) = validated(&decoder, &network(&decoder), &documents, &mut Kept::new(0, true));
    for (baseline, count) in [(Baseline::LastToken, 1), (Baseline::Last2, 2), (Baseline::Last4, 4)] {
        let by_passage = documents.iter().zip(BLOCKS).filter(|(_, starts)| !starts.is_empty());
        let hand = by_passage.map(|(tokens, starts)| {
            let plain = Plain { decoder: &decoder, tokens, rule: RULE, pattern: Pattern::Dense, horizon: H };
            let cost =
                |start: &usize| plain.delta(&[Span { start: *start, lod: 1 }], Stands::LastTokens(count));
            starts.iter().map(cost).collect()
        });
        same(baseline.name(), &baselines.blocks[&baseline], &Costs::of(hand.collect()));
    }
    // All four tokens of a block are the block.
    assert!(baselines.blocks[&Baseline::Last4].values().all(|cost| cost.abs() < 2e-5));
}

#[test]
fn the_entropy_of_attention_that_looks_at_all_alike_is_that_of_as_many_keys() {
    let decoder = decoder("llama/tied_f32");
    let documents = documents(&decoder);
    let mut network = network(&decoder);
    let width = decoder.config().hidden_size;
    let of = |network: &GistNet| validated(&decoder, network, &documents, &mut Kept::new(0, true)).1;
    // The mean over blocks of the mean over layers, by the network's own account of the blocks that are measured.
    let blocks = documents.iter().zip(BLOCKS).flat_map(|(tokens, starts)| {
        starts.iter().map(|start| decoder.embed(&tokens[*start..start + K], 1).unwrap())
    });
    let blocks = Tensor::cat(&blocks.collect::<Vec<_>>(), 0).unwrap();
    let layers = network.attention_entropy(&blocks, None).unwrap();
    close("entropy", of(&network).attention_entropy.unwrap(), layers.iter().sum::<f64>() / 2.0);
    for layer in 0..2 {
        let zero = Tensor::zeros((width, width), candle_core::DType::F32, &Device::Cpu).unwrap();
        network.params_mut().set(&format!("blocks.{layer}.attn.c_q.weight"), &zero).unwrap();
    }
    // Four entries and the network's own.
    close("entropy", of(&network).attention_entropy.unwrap(), 5f64.log2());
    let mean = GistNet::new(GistNetConfig { block: K, mode: Mode::Mean, ..GistNetConfig::new(width, 4) }, 1);
    assert!(of(&mean.unwrap()).attention_entropy.is_none());
}

#[test]
fn passages_that_are_kept_give_the_same_numbers() {
    let decoder = decoder("llama/tied_f32");
    let (documents, network) = (documents(&decoder), network(&decoder));
    let of = |kept: &mut Kept| validated(&decoder, &network, &documents, kept);
    let mut all = Kept::new(1 << 30, true);
    let first = of(&mut all);
    // Three documents under two attentions.
    assert_eq!(all.count(), 6);
    assert_eq!(first, of(&mut all));
    let mut none = Kept::new(0, true);
    assert_eq!(first, of(&mut none));
    assert_eq!(none.count(), 0);
}

#[test]
fn without_sparse_attention_and_long_documents_there_is_nothing_to_say_of_them() {
    let decoder = decoder("llama/tied_f32");
    let documents = vec![tokens(&decoder, 30)];
    let dense = setting(&decoder, Pattern::Dense);
    let validator = Validator {
        decoder: &decoder,
        setting: &dense,
        sparse: None,
        documents: &documents,
        horizon: H,
        most_blocks: 1,
    };
    let (mut kept, mut buffers) = (Kept::new(0, false), Buffers::default());
    let baselines = validator.baselines(&mut kept, &mut buffers, &mut || true).unwrap().unwrap();
    assert_eq!((&baselines.sparse_deleted, &baselines.level2_deleted), (&None, &None));
    let network = network(&decoder);
    let found =
        validator.measure(&network, &baselines, &mut kept, &mut buffers, &mut || true).unwrap().unwrap();
    let none = [
        found.sparse_delta_nll,
        found.sparse_recovered,
        found.level2_delta_nll,
        found.level2_recovered,
        found.delta_nll_error,
        found.diversity,
        found.contrast_gap,
    ];
    assert_eq!(none, [None; 7]);
    assert_eq!(found.blocks, 1);
    let errors: BTreeMap<Baseline, Option<f64>> = found.against.iter().map(|(b, m)| (*b, m.error)).collect();
    assert!(errors.len() == 5 && errors.values().all(Option::is_none), "{errors:?}");
}

#[test]
fn documents_without_room_for_a_block_are_refused() {
    let decoder = decoder("llama/tied_f32");
    let documents = vec![tokens(&decoder, 13)];
    let dense = setting(&decoder, Pattern::Dense);
    let validator = Validator {
        decoder: &decoder,
        setting: &dense,
        sparse: None,
        documents: &documents,
        horizon: H,
        most_blocks: 4,
    };
    let (mut kept, mut buffers) = (Kept::new(0, false), Buffers::default());
    let error = validator.baselines(&mut kept, &mut buffers, &mut || true).unwrap_err().to_string();
    assert!(error.contains("expected a held-out document of at least 14 tokens"), "{error}");
    let stopped = validator.baselines(&mut kept, &mut buffers, &mut || false).unwrap();
    assert!(stopped.is_none());
}
