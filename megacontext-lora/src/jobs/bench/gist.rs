//! What attention costs of ΔNLL@H, computed as short rows over one document against two whole passes per block.
//!
//! A document of n entries has `blocks` replaced blocks. Shared: one forward pass over the document, then one row of 1 + H
//! entries per block (its gist and the horizon) that continues the document before it, forward and backward, all rows at
//! once. Apart: per block one forward pass over the n entries as they are, and one forward and backward with the block
//! replaced; one block is measured and counted `blocks` times. Dense attention, one layer, no products around it.
//!
//! This is attention alone: there is no GistNet yet. Source of the shared form: [`megacontext_kernels::attention::prefix`].

use megacontext_kernels::attention::prefix::{Continuations, Document, Own, PrefixAttention};
use megacontext_kernels::attention::slices::{Gradients, Mixed, Prepared};
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::precision::Precision;
use megacontext_kernels::store::{Store, bf16};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::attention::head_counts;
use super::measure::{Memory, Times, megabytes, rounded};
use super::{add, begin, check_common, normals, within};
use crate::error::{PluginError, Result};
use crate::host::HostApi;
use crate::jobs::with_threads;

/// What is measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GistBench {
    /// Entries of the document.
    pub n: usize,
    /// Entries after a gist that are scored.
    pub horizon: usize,
    /// Replaced blocks.
    pub blocks: usize,
    /// Query heads, kv heads.
    pub heads: Vec<usize>,
    /// Width of a head.
    pub head_dim: usize,
    /// Precision.
    pub dtype: Precision,
    /// Samples.
    pub reps: usize,
    /// Threads; none means all.
    pub threads: Option<usize>,
}

impl Default for GistBench {
    fn default() -> Self {
        Self {
            n: 2048,
            horizon: 64,
            blocks: 32,
            heads: vec![9, 3],
            head_dim: 64,
            dtype: Precision::F32,
            reps: 3,
            threads: None,
        }
    }
}

/// Measures.
pub fn run(bench: &GistBench, host: &dyn HostApi) -> Result<Value> {
    check_common(bench.n, 1, bench.reps)?;
    within("horizon", bench.horizon, bench.n)?;
    within("blocks", bench.blocks, bench.n)?;
    let [heads, kv_heads] = head_counts(&bench.heads)?;
    let refused = |e: megacontext_kernels::error::KernelError| PluginError::usage(e.to_string());
    let (width, scale) = (bench.head_dim, 1.0 / (bench.head_dim as f64).sqrt());
    let products = bench.dtype.products();
    let whole = Prepared::new([1, bench.n, heads, kv_heads, width], scale, Pattern::Dense, &Rows::default())
        .map_err(refused)?
        .with_products(products);
    // Blocks all over the document.
    let prefix = (1..=bench.blocks).map(|block| block * bench.n / (bench.blocks + 1)).collect();
    let sizes = [bench.blocks, 1 + bench.horizon, heads, kv_heads, width];
    let rows = Continuations { prefix, ..Continuations::default() };
    let short = PrefixAttention::new(sizes, bench.n, scale, Pattern::Dense, rows)
        .map_err(refused)?
        .with_products(products);
    with_threads(bench.threads, || {
        if bench.dtype.stores_bf16() {
            measured::<bf16>(bench, [heads, kv_heads], &whole, &short, host)
        } else {
            measured::<f32>(bench, [heads, kv_heads], &whole, &short, host)
        }
    })?
}

fn measured<S: Store>(
    bench: &GistBench,
    [heads, kv_heads]: [usize; 2],
    whole: &Prepared,
    short: &PrefixAttention,
    host: &dyn HostApi,
) -> Result<Value> {
    let values = |seed, entries: usize, heads: usize| normals::<S>(seed, entries * heads * bench.head_dim);
    let document = [values(1, bench.n, heads), values(2, bench.n, kv_heads), values(3, bench.n, kv_heads)];
    let own = bench.blocks * (1 + bench.horizon);
    let rows = [values(4, own, heads), values(5, own, kv_heads), values(6, own, kv_heads)];
    let d_rows: Vec<f32> = normals(7, rows[0].len());
    let d_document: Vec<f32> = normals(8, document[0].len());

    let memory = Memory::start();
    let (mut mixed, mut gradients) = (Mixed::<S>::default(), Gradients::default());
    let (mut mixed_rows, mut gradients_of_rows) = (Mixed::<S>::default(), Gradients::default());
    let [q, k, v] = &document;
    let [own_q, own_k, own_v] = &rows;
    let (own, kv) = (Own { q: own_q, k: own_k, v: own_v }, Document { k, v });
    let shared = Times::of(bench.reps, host, || {
        whole.forward_into(q, k, v, &mut mixed);
        short.forward_into(own, kv, &mut mixed_rows);
        short.backward_into(own, kv, &mixed_rows, &d_rows, &mut gradients_of_rows);
        Ok(())
    })?;
    let extra = memory.extra();
    let block = Times::of(bench.reps, host, || {
        whole.forward_into(q, k, v, &mut mixed);
        whole.forward_into(q, k, v, &mut mixed);
        whole.backward_into(q, k, v, &mixed, &d_document, &mut gradients);
        Ok(())
    })?;
    let apart = block.median() * bench.blocks as f64;
    let mut result = begin("gist", bench.dtype)?;
    add(
        &mut result,
        json!({
            "kind": "attention", "B": bench.blocks, "H": heads, "Hkv": kv_heads, "d": bench.head_dim, "n": bench.n,
            "horizon": bench.horizon,
            "fb_ms": rounded(shared.median() * 1e3, 3), "best_ms": rounded(shared.best() * 1e3, 3),
            "apart_ms": rounded(apart * 1e3, 3), "cheaper": rounded(apart / shared.median(), 2),
            "peak_extra_MB": megabytes(extra),
        }),
    );
    shared.describe(&mut result);
    Ok(Value::Object(result))
}
