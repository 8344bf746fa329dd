//! Learning how vague positions are: the gradient of the whole model, and that nothing else moves.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use anyhow::Result;
use megacontext_base::config::DecoderConfig;
use megacontext_base::decoder::{Decoder, Forward};
use megacontext_base::gradients::{AdamWConfig, Gradients, Optimizer};
use megacontext_base::params::Group;
use megacontext_base::rope::{Entries, PositionOptions, RopeScaling, RopeTables, SIGMA, SigmaRule};
use megacontext_base::weights::Weights;
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::loss::IGNORE;
use megacontext_kernels::precision::Precision;

/// Levels of a working context: old spans as gists of 4 and 16 tokens, then tokens.
const LOD: [u32; 12] = [2, 2, 1, 1, 2, 1, 0, 0, 1, 0, 0, 0];
const LEVELS: usize = 3;

struct Case {
    decoder: Decoder,
    scaling: RopeScaling,
    tokens: Vec<u32>,
    targets: Vec<u32>,
}

impl Case {
    fn new(precision: Precision, scaling: RopeScaling, options: PositionOptions) -> Result<Self> {
        Self::of("llama/tied_f32", precision, scaling, options)
    }

    fn of(
        folder: &str,
        precision: Precision,
        scaling: RopeScaling,
        options: PositionOptions,
    ) -> Result<Self> {
        let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures");
        let dir = fixtures.join(folder);
        let mut config = DecoderConfig::from_dir(&dir)?;
        config.positions = options;
        let mut decoder = Decoder::from_weights(config, &Weights::open(&dir)?, precision, &[])?;
        decoder.attach_sigma(LEVELS)?;
        let vocab = decoder.config().vocab_size as u32;
        let tokens: Vec<u32> = (0..2 * LOD.len() as u32).map(|i| (i * 29 + 3) % vocab).collect();
        let target = |i: usize| if (i + 1).is_multiple_of(LOD.len()) { IGNORE } else { tokens[i + 1] };
        let targets = (0..tokens.len()).map(target).collect();
        Ok(Self { decoder, scaling, tokens, targets })
    }

    fn tables(&self, scales: &[f32]) -> RopeTables {
        let c = self.decoder.config();
        let (mu, sigma) = c.positions.sigma.tile(&LOD);
        let entries =
            Entries { mu: &mu, sigma: Some(&sigma), lod: Some(&LOD), scales: Some(scales), length: None };
        c.rope(&self.scaling).place(&entries).unwrap()
    }

    fn gradients(&self, recompute: bool) -> Result<(f64, Gradients)> {
        let rope = self.tables(&self.decoder.sigma_scales().unwrap());
        let rows = Rows::default();
        let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
        let mut gradients = Gradients::new();
        let loss = self.decoder.accumulate_gradients(
            &self.tokens,
            2,
            &self.targets,
            &with,
            1.0,
            recompute,
            &mut gradients,
        )?;
        Ok((loss.sum, gradients))
    }

    /// Σ NLL at other scales.
    fn loss(&self, scales: &[f32]) -> f64 {
        let rope = self.tables(scales);
        let rows = Rows::default();
        let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
        let x = self.decoder.embed(&self.tokens, 2).unwrap();
        let nll = self.decoder.nll(&x, &self.targets, &with).unwrap();
        nll.iter().map(|v| f64::from(*v)).sum()
    }
}

fn rule() -> SigmaRule {
    SigmaRule { block: 4, uniform: true, ..SigmaRule::default() }
}

/// Holds the gradient of every scale against differences of the loss.
fn check(mut case: Case, what: &str) -> Result<()> {
    case.decoder.params_mut().set_learning([Group::Sigma])?;
    let scales = [1.0, 0.8, 0.3];
    case.decoder.params_mut().set(SIGMA, &candle_core::Tensor::new(&scales, &candle_core::Device::Cpu)?)?;
    for recompute in [false, true] {
        let (_, gradients) = case.gradients(recompute)?;
        assert_eq!(gradients.names().collect::<Vec<_>>(), [SIGMA]);
        let got = gradients.get(SIGMA).unwrap();
        // Tokens are certain under `document`: their scale changes nothing.
        assert_eq!(got[0], 0.0);
        for level in 1..LEVELS {
            let at = |moved: f32| {
                let mut scales = scales;
                scales[level] += moved;
                case.loss(&scales)
            };
            // Fourth order, as the loss is f32.
            let h = 0.006;
            let want = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * f64::from(h));
            let error = (f64::from(got[level]) - want).abs() / want.abs().max(0.2);
            assert!(error < 5e-3, "{what}, level {level}: got {}, differences {want}", got[level]);
        }
    }
    Ok(())
}

#[test]
fn the_models_gradient_of_sigma_matches_differences() -> Result<()> {
    let plain = PositionOptions { sigma: rule(), ..Default::default() };
    let split = PositionOptions { lod_bands: 1, alibi: true, ..plain.clone() };
    let slow = PositionOptions { slow_periods: vec![60.0], ..plain.clone() };
    let yarn = RopeScaling::Yarn(megacontext_base::rope::scaling::Yarn::new(4.0, 16));
    for (options, scaling) in [
        (plain.clone(), RopeScaling::None),
        (plain, yarn),
        (split, RopeScaling::Linear { factor: 2.0 }),
        (slow, RopeScaling::None),
    ] {
        let what = format!("{scaling}, {options:?}");
        check(Case::new(Precision::F32, scaling, options)?, &what)?;
    }
    Ok(())
}

#[test]
fn every_familys_gradient_of_sigma_matches_differences() -> Result<()> {
    // Part of a head turns; blocks that do not turn; two bases; heads turn by −θ and are normed after it.
    for folder in ["gpt_neox_f32", "smollm3_bf16", "gemma3_bf16", "nanochat_bf16"] {
        let options = PositionOptions { sigma: rule(), ..Default::default() };
        let scaling = RopeScaling::Linear { factor: 2.0 };
        check(Case::of(&format!("families/{folder}"), Precision::F32, scaling, options)?, folder)?;
    }
    Ok(())
}

#[test]
fn sigma_learns_and_nothing_else_moves() -> Result<()> {
    for precision in [Precision::F32, Precision::Bf16] {
        let options = PositionOptions { sigma: rule(), ..Default::default() };
        let mut case = Case::new(precision, RopeScaling::None, options)?;
        case.decoder.params_mut().set_learning([Group::Sigma])?;
        let frozen = |case: &Case| {
            let groups = [Group::Base, Group::Embeddings, Group::Norms];
            groups.map(|group| case.decoder.params().group_hash(group).unwrap())
        };
        let before = frozen(&case);
        let mut optimizer = Optimizer::new(AdamWConfig::default());
        let (first, _) = case.gradients(true)?;
        for _ in 0..40 {
            let (_, gradients) = case.gradients(true)?;
            optimizer.step(case.decoder.params(), &gradients, 0.02)?;
        }
        let (last, _) = case.gradients(true)?;
        let scales = case.decoder.sigma_scales().unwrap();
        assert_eq!(scales[0], 1.0);
        assert!(scales[1] != 1.0 && scales[2] != 1.0, "{scales:?}");
        println!("{precision:?}: Σ NLL {first} to {last} at scales {scales:?}");
        assert!(last < first - 0.05, "{precision:?}: Σ NLL {first} to {last} at scales {scales:?}");
        assert_eq!(frozen(&case), before);
    }
    Ok(())
}

#[test]
fn tables_of_another_number_of_scales_are_refused() -> Result<()> {
    let mut case = Case::new(Precision::F32, RopeScaling::None, PositionOptions::default())?;
    case.decoder.params_mut().set_learning([Group::Sigma])?;
    let rope = case.tables(&[1.0; LEVELS + 1]);
    let rows = Rows::default();
    let with = Forward { pattern: Pattern::Dense, rope: &rope, rows: &rows, dropout_seed: None };
    let mut gradients = Gradients::new();
    let error = case
        .decoder
        .accumulate_gradients(&case.tokens, 2, &case.targets, &with, 1.0, true, &mut gradients)
        .unwrap_err()
        .to_string();
    assert!(error.contains("expected 3 scales of sigma, got 4"), "{error}");
    Ok(())
}
