//! The embedded model learns the same in every precision class.
//!
//! It is trained from 256 to 512 tokens of context on prose in which a few names come back again and again. Measured: the
//! mean loss of the last four of twelve steps. It has to end two nats below the first in each class, and within 0.01 nats of
//! f32's on the same batches (measured: 0.0005).

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use megacontext_base::lora::LoraConfig;
use megacontext_base::params::Group;
use megacontext_kernels::precision::Precision;
use megacontext_lora::jobs::ModelDir;
use megacontext_lora::train::config::{BatchConfig, OptimizerConfig, default_stages};
use megacontext_lora::train::trainer::Trainer;

const STEPS: usize = 12;
const GROUPS: [Group; 3] = [Group::Lora, Group::Embeddings, Group::Norms];

/// Losses of every step.
fn curve(precision: Precision) -> Vec<f64> {
    let model = ModelDir::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny-llama")).unwrap();
    let stream: Vec<u32> =
        (0..12).flat_map(|number| model.tokenizer.encode(&common::text(number)).unwrap()).collect();
    let mut decoder = model.decoder(precision, &GROUPS).unwrap();
    decoder.attach_lora(LoraConfig::default(), 1).unwrap();
    let settings = OptimizerConfig { lr: 2e-3, warmup_steps: 2, ..Default::default() };
    let batch = BatchConfig { tokens_per_step: 2048, micro_batch_tokens: 2048 };
    let stages = default_stages(256, 512, STEPS);
    let mut trainer = Trainer::new(decoder, &GROUPS, settings, batch, stages, stream, 1, true).unwrap();
    (0..STEPS).map(|_| trainer.step().unwrap().loss).collect()
}

fn mean(losses: &[f64]) -> f64 {
    losses.iter().sum::<f64>() / losses.len() as f64
}

#[test]
fn losses_of_mixed_and_bf16_end_where_those_of_f32_do() {
    let end = |curve: &[f64]| mean(&curve[STEPS - 4..]);
    let exact = curve(Precision::F32);
    assert!(end(&exact) < exact[0] - 2.0, "{exact:?}");
    for precision in [Precision::Mixed, Precision::Bf16] {
        let rounded = curve(precision);
        assert!(end(&rounded) < rounded[0] - 2.0, "{precision}: {rounded:?}");
        let apart = (end(&rounded) - end(&exact)).abs();
        assert!(apart < 0.01, "{precision}: ends {apart} nats from f32");
    }
}
