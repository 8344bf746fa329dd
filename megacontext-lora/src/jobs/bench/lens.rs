//! What LensNet's scores cost: one working context of n entries in, n scores out, as an allocator asks for them.
//!
//! The context is made up: random embeddings, levels that tile a history ([`tiled`]), angles of the document preset, made
//! beforehand. Weights are random unless a stored LensNet is named. `files` leaves network, context and scores behind, so that
//! the peer (`scripts/peer/lens.py`) can score the same entries by the same weights and hold its scores against ours.
//!
//! With `compare` the same network scores the same context by dense attention too, and the result says how far shifted
//! sparse attention is from it: correlations, differences, and how much of the [`TOP`] with the largest |u| is the same.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use lensnet_adapter::metrics::pearson;
use lensnet_adapter::{Contexts, Expected, Head, Identity, LensNet, LensNetConfig};
use megacontext_base::random::Random;
use megacontext_base::rope::{RopeTables, SigmaRule};
use megacontext_base::tower::Angles;
use megacontext_kernels::precision::Precision;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::measure::{Memory, Times, megabytes, rounded};
use super::{add, begin, check_common, group, kind, normals, within};
use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::{model_error, with_threads};
use crate::train::config::{self, Attention, GroupSize};
use crate::train::work::attention_forward;

/// Levels above tokens in the made up context.
const LEVELS: u8 = 2;
/// Part of the entries that is looked at for what an allocator would consider first.
const TOP: usize = 32;
/// What files are written as, where there is no base model.
const NO_BASE: &str = "bench";

/// What is measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LensBench {
    /// Width, blocks, heads. The default is MegaContext's run of twelve layers.
    pub shape: Vec<usize>,
    /// W: entries of the working context.
    pub n: usize,
    /// Entries attend to earlier ones alone.
    pub causal: bool,
    /// Shifted sparse, or dense.
    pub attn: Attention,
    /// Group of shifted sparse attention.
    pub group: GroupSize,
    /// A stored LensNet, instead of `shape` and random weights.
    pub network: Option<PathBuf>,
    /// Score by dense attention too, and say how far apart the scores are.
    pub compare: bool,
    /// A folder that gets `lensnet.safetensors` and `context.safetensors`.
    pub files: Option<PathBuf>,
    /// Precision: f32 is all that LensNet computes in.
    pub dtype: Precision,
    /// Samples.
    pub reps: usize,
    /// Threads; none means all.
    pub threads: Option<usize>,
}

impl Default for LensBench {
    fn default() -> Self {
        Self {
            shape: vec![768, 2, 6],
            n: 8192,
            causal: false,
            attn: Attention::Dense,
            group: GroupSize::Part(0.25),
            network: None,
            compare: false,
            files: None,
            dtype: Precision::F32,
            reps: 3,
            threads: None,
        }
    }
}

/// Measures.
pub fn run(bench: &LensBench, host: &dyn HostApi) -> Result<Value> {
    check_common(bench.n, 1, bench.reps)?;
    if bench.dtype != Precision::F32 {
        let got = json!(bench.dtype);
        return Err(PluginError::usage(format!("dtype: expected \"f32\" for LensNet, got {got}")));
    }
    let net = network(bench)?;
    with_threads(bench.threads, || measured(bench, &net, host))?
}

/// The network that is measured, with the pattern asked for.
fn network(bench: &LensBench) -> Result<LensNet> {
    // Refuses a group that is none.
    config::pattern(bench.attn, bench.group, bench.n)?;
    let settings = |config: LensNetConfig| LensNetConfig {
        causal: bench.causal,
        group: (bench.attn == Attention::S2).then(|| bench.group.tokens(bench.n)),
        ..config
    };
    if let Some(path) = &bench.network {
        let loaded = LensNet::load(path, Expected::default()).map_err(model_error)?;
        return with(&loaded.network, settings(loaded.network.config().clone()));
    }
    let &[width, layers, heads] = &bench.shape[..] else {
        return Err(PluginError::usage(format!(
            "shape: expected 3 numbers (width, blocks, heads), got {}",
            bench.shape.len()
        )));
    };
    for (key, size) in [("width", width), ("blocks", layers), ("heads", heads)] {
        within(&format!("shape: {key}"), size, 1 << 16)?;
    }
    let config = settings(LensNetConfig { layers, ..LensNetConfig::new(width, heads) });
    LensNet::new(config, 0).map_err(|e| PluginError::usage(e.to_string()))
}

/// The network's weights under other settings that need the same ones.
fn with(net: &LensNet, config: LensNetConfig) -> Result<LensNet> {
    let mut other = LensNet::new(config, 0).map_err(model_error)?;
    for name in net.params().names() {
        let value = net.params().get(name).ok_or_else(|| PluginError::internal("lens: a weight is gone"))?;
        other.params_mut().set(name, &value).map_err(model_error)?;
    }
    Ok(other)
}

/// A working context with its angles.
struct Made {
    entries_bwe: Tensor,
    lod: Vec<u8>,
    start: Vec<u64>,
    tables: RopeTables,
}

impl Made {
    fn new(net: &LensNet, n: usize) -> Result<Self> {
        let config = net.config();
        let entries = normals::<f32>(1, n * config.width);
        let entries_bwe = Tensor::from_vec(entries, (1, n, config.width), &Device::Cpu)?;
        let (lod, start) = tiled(n, config.block, 2);
        let rule = SigmaRule { block: config.block, ..SigmaRule::default() };
        let tables = net.angles(&lod, &start, &rule).map_err(model_error)?;
        Ok(Self { entries_bwe, lod, start, tables })
    }

    fn scores(&self, net: &LensNet) -> Result<Vec<f32>> {
        let of = Contexts {
            entries_bwe: &self.entries_bwe,
            lod: &self.lod,
            start: &self.start,
            lengths: None,
            tail: None,
        };
        let angles = Angles { cos: &self.tables.cos_nd, sin: &self.tables.sin_nd };
        net.focus_scores(&of, angles, LEVELS).map_err(model_error)
    }

    /// What the peer reads.
    fn write(&self, folder: &Path, net: &LensNet, scores: &[f32]) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(|e| PluginError::io(folder, e))?;
        net.save(&folder.join("lensnet.safetensors"), &Identity::of_base(NO_BASE)).map_err(model_error)?;
        let n = scores.len();
        let start: Vec<i64> = self.start.iter().map(|start| *start as i64).collect();
        let tensors: HashMap<&str, Tensor> = HashMap::from([
            ("entries", self.entries_bwe.clone()),
            ("lod", Tensor::from_slice(&self.lod, n, &Device::Cpu)?),
            ("start", Tensor::from_vec(start, n, &Device::Cpu)?),
            ("cos", self.tables.cos_nd.clone()),
            ("sin", self.tables.sin_nd.clone()),
            ("scores", Tensor::from_slice(scores, n, &Device::Cpu)?),
        ]);
        Ok(candle_core::safetensors::save(&tensors, folder.join("context.safetensors"))?)
    }
}

/// Levels and starts of `n` entries that follow one another from token 0 on: nodes of the highest level, half of them opened,
/// and of what is in them one in sixteen again; an eighth of the entries, the newest, are tokens.
fn tiled(n: usize, block: usize, seed: u64) -> (Vec<u8>, Vec<u64>) {
    let mut random = Random::new(seed);
    let block = block as u64;
    let (mut lod, mut start, mut next) = (Vec::with_capacity(n), Vec::with_capacity(n), 0u64);
    let mut put = |level: u8| {
        lod.push(level);
        start.push(next);
        next += block.pow(u32::from(level));
        lod.len()
    };
    let coarse = n - n / 8;
    let mut len = 0;
    'nodes: while len < coarse {
        if random.below(2) == 0 {
            len = put(LEVELS);
            continue;
        }
        for _ in 0..block {
            let tokens = random.below(16) == 0;
            for _ in 0..if tokens { block } else { 1 } {
                if len == n {
                    break 'nodes;
                }
                len = put(if tokens { 0 } else { LEVELS - 1 });
            }
        }
    }
    while len < n {
        len = put(0);
    }
    (lod, start)
}

fn measured(bench: &LensBench, net: &LensNet, host: &dyn HostApi) -> Result<Value> {
    let made = Made::new(net, bench.n)?;
    let memory = Memory::start();
    let mut scores = Vec::new();
    let times = Times::of(bench.reps, host, || {
        scores = made.scores(net)?;
        Ok(())
    })?;
    let extra = memory.extra();
    let flops = work(net.config(), bench.n);
    let mut result = begin("lens", bench.dtype)?;
    let LensNetConfig { width, layers, heads, causal, .. } = *net.config();
    add(
        &mut result,
        json!({
            "shape": format!("{width},{layers},{heads}"), "attn": kind(bench.attn), "causal": causal, "B": 1,
            "n": bench.n, "G": group(net.config().pattern(), bench.n),
            "fwd_ms": rounded(times.median() * 1e3, 3), "best_ms": rounded(times.best() * 1e3, 3),
            "peak_extra_MB": megabytes(extra),
            "gflops": rounded(flops / times.median() / 1e9, 1), "gflop_total": rounded(flops / 1e9, 3),
        }),
    );
    times.describe(&mut result);
    if let Some(folder) = &bench.files {
        made.write(folder, net, &scores)?;
    }
    if bench.compare {
        let dense = with(net, LensNetConfig { group: None, ..net.config().clone() })?;
        let mut dense_scores = Vec::new();
        let times = Times::of(bench.reps, host, || {
            dense_scores = made.scores(&dense)?;
            Ok(())
        })?;
        add(&mut result, json!({ "dense_ms": rounded(times.median() * 1e3, 3) }));
        add(&mut result, agreement(&scores, &dense_scores));
    }
    Ok(Value::Object(result))
}

/// FLOPs of the products, by the formulas.
fn work(config: &LensNetConfig, n: usize) -> f64 {
    let (n_f, e, heads) = (n as f64, config.width as f64, config.heads);
    let blocks = 24.0 * n_f * e * e + attention_forward(config.pattern(), n, heads, config.width / heads);
    let middle = e.max(128.0);
    let head = match config.head {
        Head::Linear => 2.0 * e,
        Head::Mlp => middle * (2.0 * e + 1.0),
    };
    config.layers as f64 * blocks + 2.0 * n_f * (2.0 * e * (e + 1.0) + head)
}

/// How close scores are to those of dense attention.
fn agreement(scores: &[f32], dense: &[f32]) -> Value {
    let wide = |of: &[f32]| of.iter().map(|u| f64::from(*u)).collect::<Vec<f64>>();
    let (a, b) = (wide(scores), wide(dense));
    let apart = a.iter().zip(&b).map(|(a, b)| (a - b).abs());
    let n = a.len().max(1) as f64;
    let correlation = |a: &[f64], b: &[f64]| {
        let pairs: Vec<[f64; 2]> = a.iter().zip(b).map(|(a, b)| [*a, *b]).collect();
        pearson(&pairs).map(|found| rounded(found, 4))
    };
    json!({
        "pearson": correlation(&a, &b), "spearman": correlation(&ranks(&a), &ranks(&b)),
        "mean_apart": rounded(apart.clone().sum::<f64>() / n, 6), "most_apart": rounded(apart.fold(0.0, f64::max), 6),
        "dense_size": rounded(b.iter().map(|u| u.abs()).sum::<f64>() / n, 6),
        "top_overlap": rounded(overlap(&a, &b, a.len().div_ceil(TOP)), 4),
    })
}

/// The rank of each value; equal ones share the middle of theirs.
fn ranks(of: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..of.len()).collect();
    order.sort_by(|a, b| of[*a].total_cmp(&of[*b]));
    let mut ranks = vec![0.0; of.len()];
    let mut before = 0;
    for same in order.chunk_by(|a, b| of[*a] == of[*b]) {
        same.iter().for_each(|at| ranks[*at] = before as f64 + (same.len() - 1) as f64 / 2.0);
        before += same.len();
    }
    ranks
}

/// Share of the `most` entries with the largest |u| that both have in common.
fn overlap(a: &[f64], b: &[f64], most: usize) -> f64 {
    let top = |of: &[f64]| {
        let mut order: Vec<usize> = (0..of.len()).collect();
        order.sort_by(|a, b| of[*b].abs().total_cmp(&of[*a].abs()));
        order.truncate(most);
        order
    };
    let (a, b) = (top(a), top(b));
    a.iter().filter(|at| b.contains(at)).count() as f64 / most.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_tile_a_history() {
        for n in [1, 7, 100, 8192] {
            let (lod, start) = tiled(n, 32, 2);
            assert_eq!((lod.len(), start.len()), (n, n));
            for (at, (lod, begin)) in lod.iter().zip(&start).enumerate() {
                let span = 32u64.pow(u32::from(*lod));
                assert!(begin.is_multiple_of(span), "n {n}, entry {at}");
                if let Some(next) = start.get(at + 1) {
                    assert_eq!(begin + span, *next, "n {n}, entry {at}");
                }
            }
        }
        let (lod, _) = tiled(8192, 32, 2);
        let of = |level: u8| lod.iter().filter(|lod| **lod == level).count();
        assert!(of(0) > 1024 && of(1) > 1024 && of(2) > 16, "{} {} {}", of(0), of(1), of(2));
    }

    #[test]
    fn correlations_by_hand() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 0.0]), [2.5, 1.0, 2.5, 0.0]);
        let found = agreement(&[0.1, 0.2, 0.3, 0.4], &[0.1, 0.4, 0.9, 0.16]);
        assert_eq!(found["spearman"], json!(0.4));
        assert_eq!((&found["most_apart"], &found["mean_apart"]), (&json!(0.6), &json!(0.26)));
        assert_eq!(overlap(&[0.1, -0.9, 0.5, 0.0], &[0.7, -0.8, 0.1, 0.0], 2), 0.5);
    }

    #[test]
    fn work_is_that_of_the_formulas() {
        // One block: 24·n·E², attention 4·n²·E; features 4·n·E·(E + 1), head 4·n·E·128 + 256·n.
        let config = LensNetConfig { layers: 1, ..LensNetConfig::new(8, 2) };
        let expected = 24 * 10 * 64 + 4 * 100 * 8 + 4 * 10 * 8 * 9 + 4 * 10 * 8 * 128 + 256 * 10;
        assert_eq!(work(&config, 10), f64::from(expected));
    }
}
