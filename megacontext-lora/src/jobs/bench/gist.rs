//! What ΔNLL@H costs: all replaced blocks of a document as rows over one pass of it, against two whole passes per block.
//!
//! The model is a Llama of the given shape with random weights, frozen. A document of n tokens has `blocks` replaced blocks,
//! spread evenly, a horizon behind each. Shared: one forward pass over the document, then all rows at once, forward and
//! backward into what stands for the blocks: what a step of `mclora train gistnet` does, GistNet itself apart (it costs the
//! same either way; random vectors stand for its gists). Apart: per block one forward pass over the context up to the end of
//! its horizon, and one forward and backward over the same context with the block replaced. Blocks at an eighth, three, five and
//! seven eighths of the document are measured so and stand for all.
//!
//! `fb_ms` and `apart_ms` are for all blocks; memory is what each way takes beyond the model. `peak_device_MB` is of the first way,
//! with the model's copies on a GPU.

use megacontext_base::buffers::Buffers;
use megacontext_base::decoder::{Decoder, Forward};
use megacontext_base::device::DeviceChoice;
use megacontext_base::gradients::Gradients;
use megacontext_base::random::Random;
use megacontext_base::rope::{Entries, RopeScaling, RopeTables, SigmaRule};
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::loss::IGNORE;
use megacontext_kernels::precision::Precision;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use candle_core::{Device, Tensor};
use gistnet_adapter::curriculum::places;
use gistnet_adapter::delta_nll::{DeltaNll, Span, StandIn, Substitution};

use super::measure::{Memory, Times, megabytes, rounded};
use super::step::llama;
use super::{add, add_device, begin, check_common, group, kind, normals, within};
use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::device::OnDevice;
use crate::jobs::{model_error, with_threads};
use crate::train::config::{self, Attention, GroupSize};

/// Places, in eighths of the document, whose blocks are measured apart.
const MEASURED: [usize; 4] = [1, 3, 5, 7];

/// What is measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GistBench {
    /// Model width, blocks, query heads, kv heads, MLP width, vocabulary. The default is SmolLM2-135M's.
    pub shape: Vec<usize>,
    /// Tokens of the document.
    pub n: usize,
    /// Tokens after a block that are scored.
    pub horizon: usize,
    /// Replaced blocks.
    pub blocks: usize,
    /// Tokens of a block.
    pub block: usize,
    /// Shifted sparse, or dense causal.
    pub attn: Attention,
    /// Group of shifted sparse attention.
    pub group: GroupSize,
    /// Precision.
    pub dtype: Precision,
    /// Samples.
    pub reps: usize,
    /// Threads; none means all.
    pub threads: Option<usize>,
    /// What passes run on: `cpu`, `cuda:N`, or `auto`.
    pub device: DeviceChoice,
}

impl Default for GistBench {
    fn default() -> Self {
        Self {
            shape: vec![576, 30, 9, 3, 1536, 49152],
            n: 2048,
            horizon: 64,
            blocks: 32,
            block: 32,
            attn: Attention::Dense,
            group: GroupSize::Part(0.25),
            dtype: Precision::F32,
            reps: 3,
            threads: None,
            device: DeviceChoice::Auto,
        }
    }
}

/// Measures.
pub fn run(bench: &GistBench, host: &dyn HostApi) -> Result<Value> {
    check_common(bench.n, 1, bench.reps)?;
    within("horizon", bench.horizon, bench.n)?;
    within("block", bench.block, bench.n)?;
    let found = places(bench.n, bench.block, 1, bench.horizon);
    within("blocks", bench.blocks, found.len())?;
    let model = llama(&bench.shape, bench.n)?;
    let pattern = config::pattern(bench.attn, bench.group, bench.n)?;
    let rule = SigmaRule { block: bench.block, ..SigmaRule::default() };
    let on = OnDevice::open(bench.device, host)?.running(&model, host)?;
    let mut decoder = Decoder::random(model, 0, bench.dtype, &[]).map_err(model_error)?;
    on.take(&mut decoder)?;
    let delta = DeltaNll::new(&decoder, &RopeScaling::None, rule, pattern, bench.horizon)
        .map_err(|e| PluginError::usage(e.to_string()))?;
    let spans: Vec<Span> = (0..bench.blocks).map(|at| found[at * found.len() / bench.blocks]).collect();
    with_threads(bench.threads, || measured(bench, &decoder, &delta, rule, &spans, host))?
}

fn measured(
    bench: &GistBench,
    decoder: &Decoder,
    delta: &DeltaNll,
    rule: SigmaRule,
    spans: &[Span],
    host: &dyn HostApi,
) -> Result<Value> {
    let c = decoder.config();
    let mut random = Random::new(5);
    let tokens: Vec<u32> = (0..bench.n).map(|_| random.below(c.vocab_size) as u32).collect();
    let gists: Vec<f32> = normals::<f32>(7, spans.len() * c.hidden_size).iter().map(|v| v * 0.02).collect();
    let replaced: Vec<Vec<Span>> = spans.iter().map(|span| vec![*span]).collect();
    let pattern = config::pattern(bench.attn, bench.group, bench.n)?;

    decoder.device().forget_peak().map_err(model_error)?;
    let memory = Memory::start();
    let mut buffers = Buffers::default();
    let shared = Times::of(bench.reps, host, || {
        let passage = delta.run(&tokens, false, &mut buffers).map_err(model_error)?;
        let mut rows = delta.rows(&passage, &replaced, StandIn::Entry).map_err(model_error)?;
        rows.fill(&gists).map_err(model_error)?;
        delta.measure(&passage, &rows, Some(&Substitution::default()), &mut buffers).map_err(model_error)?;
        Ok(())
    })?;
    let extra = memory.extra();
    let mut result = begin("gist", bench.dtype)?;
    add_device(&mut result, decoder.device())?;
    drop(buffers);

    let apart = Apart { decoder, tokens: &tokens, rule, pattern, horizon: bench.horizon };
    let memory = Memory::start();
    let mut seconds = 0.0;
    let mut gradients = Gradients::new();
    for eighth in MEASURED {
        let at = eighth * spans.len() / 8;
        let gist = &gists[at * c.hidden_size..][..c.hidden_size];
        let mut buffers = Buffers::default();
        let times =
            Times::of(bench.reps, host, || apart.block(spans[at], gist, &mut buffers, &mut gradients))?;
        seconds += times.median() / MEASURED.len() as f64;
    }
    let apart_extra = memory.extra();
    let all = seconds * spans.len() as f64;
    let shape: Vec<String> = bench.shape.iter().map(usize::to_string).collect();
    add(
        &mut result,
        json!({
            "shape": shape.join(","), "attn": kind(bench.attn), "B": spans.len(), "n": bench.n,
            "G": group(pattern, bench.n), "horizon": bench.horizon, "K": bench.block,
            "fb_ms": rounded(shared.median() * 1e3, 3), "best_ms": rounded(shared.best() * 1e3, 3),
            "block_ms": rounded(shared.median() * 1e3 / spans.len() as f64, 3),
            "apart_ms": rounded(all * 1e3, 3), "cheaper": rounded(all / shared.median(), 2),
            "peak_extra_MB": megabytes(extra), "apart_extra_MB": megabytes(apart_extra),
        }),
    );
    shared.describe(&mut result);
    Ok(Value::Object(result))
}

/// Blocks one by one, each with its contexts whole.
struct Apart<'a> {
    decoder: &'a Decoder,
    tokens: &'a [u32],
    rule: SigmaRule,
    pattern: Pattern,
    horizon: usize,
}

impl Apart<'_> {
    fn tables(&self, places: &[(f64, f64)]) -> Result<RopeTables> {
        let (mu, sigma): (Vec<f64>, Vec<f64>) = places.iter().copied().unzip();
        let entries =
            Entries { mu: &mu, sigma: Some(&sigma), length: Some(self.tokens.len()), ..Entries::default() };
        self.decoder.config().rope(&RopeScaling::None).place(&entries).map_err(model_error)
    }

    fn block(
        &self,
        span: Span,
        gist: &[f32],
        buffers: &mut Buffers,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let width = self.decoder.config().hidden_size;
        let end = span.start + self.rule.block;
        let whole = &self.tokens[..end + self.horizon];
        let rows = Rows::default();
        let mut targets = vec![IGNORE; whole.len()];
        targets[end - 1..end - 1 + self.horizon].copy_from_slice(&self.tokens[end..end + self.horizon]);
        let places: Vec<(f64, f64)> = (0..whole.len()).map(|at| self.rule.place(at as f64, 0)).collect();
        let rope = self.tables(&places)?;
        let with = Forward { pattern: self.pattern, rope: &rope, rows: &rows, dropout_seed: None };
        self.decoder.score(whole, 1, &targets, &with, buffers).map_err(model_error)?;

        let embed = |tokens: &[u32]| -> Result<Vec<f32>> {
            Ok(self.decoder.embed(tokens, 1).map_err(model_error)?.flatten_all()?.to_vec1()?)
        };
        let mut x = embed(&self.tokens[..span.start])?;
        x.extend_from_slice(gist);
        x.extend(embed(&self.tokens[end..end + self.horizon - 1])?);
        let mut places: Vec<(f64, f64)> = (0..span.start).map(|at| self.rule.place(at as f64, 0)).collect();
        places.push(self.rule.place(span.start as f64, 1));
        places.extend((end..end + self.horizon - 1).map(|at| self.rule.place(at as f64, 0)));
        let n = places.len();
        let mut targets = vec![IGNORE; n];
        targets[span.start..].copy_from_slice(&self.tokens[end..end + self.horizon]);
        let rope = self.tables(&places)?;
        let with = Forward { pattern: self.pattern, rope: &rope, rows: &rows, dropout_seed: None };
        let x = Tensor::from_vec(x, (1, n, width), &Device::Cpu)?;
        let scale = 1.0 / self.horizon as f64;
        self.decoder.entry_gradients(&x, &targets, &with, scale, true, gradients).map_err(model_error)?;
        Ok(())
    }
}
