//! What an entry is besides its vector: its level, how many tokens it stands for, and where it stands.
//!
//! Source: MegaContext's LensNet: f = level_embed[lod] + span_mlp(span) + dist_mlp(distance), with MLPs of one SiLU. How
//! span and distance are measured is [`Features`]: the original feeds 1, 32, 1024 as they are, and divides positions by
//! the largest of the whole batch, so that a row's scores depend on its neighbours in the batch.
//!
//! Shapes: N = B·W entries, row-major; features [N, E]. Units: positions and spans in tokens.

use candle_core::{Device, Tensor};
use megacontext_base::error::Result;
use megacontext_base::params::ParamStore;

use crate::config::{Features, LEVEL_EMBED, LensNetConfig};
use crate::network::Contexts;

/// Tokens that an entry of this level stands for.
pub(crate) fn span(block: usize, lod: u8) -> f64 {
    (block as f64).powi(i32::from(lod))
}

/// The span of an entry of this level, as the MLP reads it.
pub(crate) fn measured_span(config: &LensNetConfig, lod: u8) -> f32 {
    let span = span(config.block, lod);
    match config.features {
        Features::Original => span as f32,
        Features::Scaled => (span.log2() / 10.0) as f32,
    }
}

/// Span and distance of every entry, as the MLPs read them.
pub(crate) fn measured(config: &LensNetConfig, of: &Contexts, lengths: &[usize]) -> [Vec<f32>; 2] {
    let spans = of.lod.iter().map(|lod| measured_span(config, *lod)).collect();
    match config.features {
        Features::Original => {
            let largest = of.start.iter().copied().max().unwrap_or(0).max(1) as f64;
            let distance = of.start.iter().map(|start| (*start as f64 / largest) as f32).collect();
            [spans, distance]
        }
        Features::Scaled => {
            let width = of.lod.len() / lengths.len().max(1);
            let mut distance = Vec::with_capacity(of.start.len());
            for (row, length) in lengths.iter().enumerate() {
                let from = row * width;
                let last = from + length.saturating_sub(1);
                let first = of.start[from] as f64;
                let cursor = of.start[last] as f64 + span(config.block, of.lod[last]);
                let far = (cursor - first).max(1.0);
                // What is behind a row's length is scored by nobody; it is at the cursor.
                distance.extend((0..width).map(|at| {
                    if at < *length { ((cursor - of.start[from + at] as f64) / far) as f32 } else { 0.0 }
                }));
            }
            [spans, distance]
        }
    }
}

/// The features [N, E].
pub(crate) fn apply(
    config: &LensNetConfig,
    params: &ParamStore,
    of: &Contexts,
    lengths: &[usize],
) -> Result<Tensor> {
    let n = of.lod.len();
    let lods: Vec<u32> = of.lod.iter().map(|lod| u32::from(*lod)).collect();
    let lods = Tensor::from_vec(lods, n, &Device::Cpu)?;
    let mut features_ne = params.taped(LEVEL_EMBED)?.index_select(&lods, 0)?;
    for (values, [first, second]) in measured(config, of, lengths).into_iter().zip(config.feature_layers()) {
        let values_n1 = Tensor::from_vec(values, (n, 1), &Device::Cpu)?;
        let middle = first.apply(params, &values_n1)?.silu()?;
        features_ne = (features_ne + second.apply(params, &middle)?)?;
    }
    Ok(features_ne)
}
