//! A step of GistNet's training: its loss against the terms summed by hand, its gradient against differences of that loss.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

mod common;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use common::{decoder, random, tokens};
use gistnet_adapter::curriculum::Stage;
use gistnet_adapter::delta_nll::{Span, StandIn};
use gistnet_adapter::losses::{LossConfig, pooling, stability};
use gistnet_adapter::trainer::{GistTrainer, Lesson, Setting, StepReport};
use gistnet_adapter::{GistNet, GistNetConfig, Pooling};
use megacontext_base::buffers::Buffers;
use megacontext_base::decoder::Decoder;
use megacontext_base::gradients::AdamWConfig;
use megacontext_base::random::Random;
use megacontext_base::rope::{SigmaPreset, SigmaRule};
use megacontext_kernels::attention::Pattern;

const K: usize = 4;
const H: usize = 6;
const ROWS: usize = 5;
const SEED: u64 = 11;
/// The third has room for two blocks, fewer than rows are asked for; the last for none.
const LENGTHS: [usize; 4] = [60, 47, 19, 13];

/// Everything that a step's loss can have, but for dropout and what pushes neighbours apart.
fn stage() -> Stage {
    let loss = LossConfig {
        stability: 0.02,
        pooling: 0.05,
        boundary_positions: 2,
        boundary_weight: 2.0,
        ..LossConfig::default()
    };
    Stage { horizon: H, nll: 0.7, kl: 0.4, level2: 0.3, run: 3, loss, ..Stage::default() }
}

fn network(width: usize, seed: u64) -> Result<GistNet> {
    let config = GistNetConfig { block: K, pooling: Pooling::Cls, layers: 1, ..GistNetConfig::new(width, 4) };
    let mut network = GistNet::new(config, seed)?;
    network.params_mut().set("cls_token", &random(&[1, 1, width], 4))?;
    Ok(network)
}

struct Steps<'a> {
    decoder: &'a Decoder,
    trainer: GistTrainer<'a>,
    documents: Vec<Vec<u32>>,
}

impl<'a> Steps<'a> {
    fn new(decoder: &'a Decoder, budget: u64) -> Result<Self> {
        let width = decoder.config().hidden_size;
        let adamw = AdamWConfig { clip: 0.0, ..AdamWConfig::default() };
        let mut trainer = GistTrainer::new(decoder, setting(decoder), network(width, 3)?, adamw, budget)?;
        trainer.anchor(network(width, 8)?)?;
        let documents = LENGTHS.map(|length| tokens(decoder, length)).to_vec();
        Ok(Self { decoder, trainer, documents })
    }

    /// A step that moves nothing.
    fn step(&mut self, stage: &Stage) -> Result<StepReport> {
        let lessons: Vec<Lesson> = self
            .documents
            .iter()
            .enumerate()
            .map(|(number, tokens)| Lesson { number, tokens, rows: None })
            .collect();
        Ok(self.trainer.step(&lessons, stage, ROWS, 0.0, &mut Random::new(SEED))?)
    }

    /// Holds the gradient of every parameter against differences of the loss along it.
    fn differences(&mut self, what: &str, stage: &Stage) -> Result<()> {
        self.step(stage)?;
        let names: Vec<String> = self.trainer.network.params().names().map(str::to_string).collect();
        let gradients = self.trainer.gradients();
        let all: Vec<Vec<f32>> = names.iter().map(|name| gradients.get(name).unwrap().to_vec()).collect();
        for (name, gradient) in names.iter().zip(all) {
            let value = self.trainer.network.params().get(name).context("value")?.copy()?;
            let length = gradient.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            assert!(length > 1e-4, "{what}: {name}: a gradient of length {length}");
            let gradient = Tensor::from_vec(gradient, value.shape(), &Device::Cpu)?;
            // Far enough to be seen in f32, not so far that the loss bends.
            let far = (3e-4 / length).clamp(1e-3, 2e-2);
            let mut moved = |sign: f64| -> Result<f64> {
                let value = (&value + (&gradient * (sign * far / length))?)?;
                self.trainer.network.params_mut().set(name, &value)?;
                Ok(self.step(stage)?.loss)
            };
            let measured = (moved(1.0)? - moved(-1.0)?) / (2.0 * far);
            self.trainer.network.params_mut().set(name, &value)?;
            let off = (measured - length).abs() / length;
            assert!(off < 0.02, "{what}: {name}: gradient of length {length}, differences give {measured}");
        }
        Ok(())
    }
}

fn setting(decoder: &Decoder) -> Setting {
    let rule = SigmaRule { preset: SigmaPreset::Document, block: K, uniform: false };
    Setting { scaling: decoder.config().rope_scaling.clone(), rule, pattern: Pattern::Dense }
}

/// The gist of a span's embeddings.
fn gist(network: &GistNet, x: &[f32], span: Span) -> Result<Vec<f32>> {
    let width = network.config().width;
    let count = K.pow(span.lod);
    let values = x[span.start * width..][..count * width].to_vec();
    let entries = Tensor::from_vec(values, (1, count, width), &Device::Cpu)?;
    Ok(network.hierarchy(&entries, span.lod)?.last().context("a level")?.flatten_all()?.to_vec1()?)
}

#[test]
fn the_loss_is_the_mean_over_all_rows_and_the_terms_on_gists() -> Result<()> {
    let (wide, longest, counts) = by_hand(stage())?;
    assert!(wide > 0 && longest > 1, "{wide} {longest} {counts:?}");
    Ok(())
}

#[test]
fn documents_with_fewer_rows_count_by_their_rows() -> Result<()> {
    let (wide, longest, counts) = by_hand(Stage { run: 1, ..stage() })?;
    assert!(wide > 0 && longest == 1, "{wide} {longest} {counts:?}");
    assert_eq!(counts[2..], [2, 0]);
    Ok(())
}

/// Holds a step's loss against the sum of its terms; says how many rows were of the second level, how many blocks a row
/// replaced at most, and how many rows each document had.
fn by_hand(stage: Stage) -> Result<(usize, usize, Vec<usize>)> {
    let decoder = decoder("llama/tied_f32");
    let width = decoder.config().hidden_size;
    let mut steps = Steps::new(&decoder, 0)?;
    let report = steps.step(&stage)?;

    let (mut random, mut buffers) = (Random::new(SEED), Buffers::default());
    let delta = setting(steps.decoder).delta_nll(&decoder, H)?;
    let (net, anchor) = (network(width, 3)?, network(width, 8)?);
    let weights = stage.loss.position_weights(H);
    let (mut sum, mut deltas, mut counts) = (0.0, 0.0, Vec::new());
    // Blocks of the first level, their gists and the anchor's.
    let (mut children, mut gists, mut before): (Vec<f32>, Vec<f32>, Vec<f32>) = Default::default();
    let (mut wide, mut longest) = (0, 0);
    for document in &steps.documents {
        let passage = delta.run(document, true, &mut buffers)?;
        let spans = stage.draw(document.len(), K, ROWS, &mut random);
        counts.push(spans.len());
        for spans in spans {
            let mut row = delta.rows(&passage, std::slice::from_ref(&spans), StandIn::Entry)?;
            let mut own = Vec::new();
            for span in &spans {
                let made = gist(&net, &passage.x_te, *span)?;
                if span.lod == 1 {
                    children.extend(&passage.x_te[span.start * width..][..K * width]);
                    gists.extend(&made);
                    before.extend(gist(&anchor, &passage.x_te, *span)?);
                }
                wide += usize::from(span.lod == 2);
                own.extend(made);
            }
            longest = longest.max(spans.len());
            row.fill(&own)?;
            let loss = &delta.measure(&passage, &row, None, &mut buffers)?.rows[0];
            let kl = loss.kl.as_ref().context("divergence")?;
            for j in 0..H {
                let cost = f64::from(loss.replaced[j]) - f64::from(loss.full[j]);
                let weighed = stage.nll * cost + stage.kl * f64::from(kl[j]);
                sum += f64::from(weights[j]) * weighed / H as f64;
            }
            deltas += loss.delta();
        }
    }
    let rows: usize = counts.iter().sum();
    let n = gists.len() / width;
    let of = |values: Vec<f32>| Tensor::from_vec(values, (n, width), &Device::Cpu);
    let (gists, before) = (of(gists)?, of(before)?);
    let children = Tensor::from_vec(children, (n, K, width), &Device::Cpu)?;
    let value = |term: Tensor| -> Result<f64> { Ok(f64::from(term.to_scalar::<f32>()?)) };
    let on_gists = 0.02 * value(stability(&gists, &before)?)? + 0.05 * value(pooling(&gists, &children)?)?;
    let want = sum / rows as f64 + on_gists;
    assert_eq!(report.rows, rows);
    assert!((report.loss - want).abs() < 2e-6 * want.abs().max(1.0), "{} by hand {want}", report.loss);
    let want = deltas / rows as f64;
    assert!((report.delta_nll - want).abs() < 2e-6, "{} by hand {want}", report.delta_nll);
    Ok((wide, longest, counts))
}

#[test]
fn the_gradient_is_that_of_the_whole_loss() -> Result<()> {
    let decoder = decoder("llama/tied_f32");
    Steps::new(&decoder, 1 << 30)?.differences("all terms", &stage())
}

#[test]
fn the_gradient_is_that_of_the_whole_loss_with_dropout_and_neighbours_apart() -> Result<()> {
    let decoder = decoder("llama/tied_f32");
    let loss = LossConfig { contrastive: 0.3, margin: 1.8, ..stage().loss };
    let stage = Stage { dropout: 0.3, run: 1, loss, ..stage() };
    let mut steps = Steps::new(&decoder, 1 << 30)?;
    assert!(steps.step(&stage)?.loss != steps.step(&Stage { dropout: 0.0, ..stage.clone() })?.loss);
    steps.differences("dropout", &stage)
}

#[test]
fn passages_that_are_kept_give_the_same_step() -> Result<()> {
    let decoder = decoder("llama/tied_f32");
    let of = |budget: u64| -> Result<[StepReport; 2]> {
        let mut steps = Steps::new(&decoder, budget)?;
        Ok([steps.step(&stage())?, steps.step(&stage())?])
    };
    let kept = of(1 << 30)?;
    assert_eq!(kept[0], kept[1]);
    assert_eq!(kept, of(0)?);
    Ok(())
}

#[test]
fn rows_that_a_lesson_brings_are_those_that_are_measured() -> Result<()> {
    let decoder = decoder("llama/tied_f32");
    let mut steps = Steps::new(&decoder, 0)?;
    let stage = Stage { horizon: H, ..Stage::default() };
    let own = [vec![Span { start: 8, lod: 1 }, Span { start: 20, lod: 1 }], vec![Span { start: 16, lod: 2 }]];
    let tokens = steps.documents[0].clone();
    let lesson = Lesson { number: 0, tokens: &tokens, rows: Some(&own) };
    let report = steps.trainer.step(&[lesson], &stage, ROWS, 0.0, &mut Random::new(SEED))?;
    let delta = setting(&decoder).delta_nll(&decoder, H)?;
    let mut buffers = Buffers::default();
    let passage = delta.run(&tokens, false, &mut buffers)?;
    let mut rows = delta.rows(&passage, &own, StandIn::Entry)?;
    let gists: Vec<f32> = rows
        .slots()
        .iter()
        .map(|slot| gist(&steps.trainer.network, &passage.x_te, slot.span))
        .collect::<Result<Vec<_>>>()?
        .concat();
    rows.fill(&gists)?;
    let expected = delta.measure(&passage, &rows, None, &mut buffers)?.delta();
    assert_eq!(report.rows, 2);
    assert!((report.delta_nll - expected).abs() < 1e-5, "{} for {expected}", report.delta_nll);
    Ok(())
}
