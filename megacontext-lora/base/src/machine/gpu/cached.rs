//! Attention of new entries over caches on a GPU, which is attention of rows that continue a document: the caches of all rows are one
//! document, and each row sees of it what is its own.
//!
//! Neighbouring rows with as many new entries as each other go in one launch: all of a step of generation, and prompts that are cut
//! alike. A launch has one block of threads for each query head, row and tile of queries, so a single entry over a long cache is
//! read by few of them; the processor's cut into pieces of keys (Flash-Decoding) is not there.
//! In class mixed (f32 storage, bf16 products) the caches are rounded to bf16 anew for every step.
//!
//! Shapes: N new entries of all rows; C entries of all caches. Errors: what the kernels refuse.

use std::ops::Range;

use megacontext_kernels::attention::decode::CachedRow;
use megacontext_kernels::attention::prefix::Continuations;
use megacontext_kernels::cuda::attention::{Document, Operand, Own, Prepared};
use megacontext_kernels::gemm::Products;
use megacontext_kernels::store::bf16;

use super::Gpu;
use super::buffer::{GpuBuffer, Product, stored_as, written_as};
use crate::buffers::{Activation, KeysValues};
use crate::error::{BaseError, Result};
use crate::machine::AttentionSpec;

/// Attention over caches, checked: which keys each query sees lies on the device.
pub(crate) struct GpuCached {
    parts: Vec<Part>,
    rows: Vec<CachedRow>,
    /// H, G, D.
    heads: [usize; 3],
    capacity: usize,
    products: Products,
}

/// Rows that go in one launch.
struct Part {
    prepared: Prepared,
    /// New entries of each.
    entries: usize,
    /// Their places in [0, N).
    places: Range<usize>,
}

impl Part {
    /// Where its values lie, `width` of them for each entry.
    fn values(&self, width: usize) -> Range<usize> {
        self.places.start * width..self.places.end * width
    }
}

impl GpuCached {
    pub fn new(gpu: &Gpu, spec: &AttentionSpec, capacity: usize, rows: &[CachedRow]) -> Result<Self> {
        let (device, [_, _, heads, kv_heads, width]) = (gpu.kernels(), spec.sizes);
        let mut parts = Vec::new();
        let mut first = 0;
        for alike in rows.chunk_by(|a, b| a.entries == b.entries) {
            let entries = alike[0].entries;
            let continued = Continuations {
                prefix: alike.iter().map(|row| row.first + row.past).collect(),
                lengths: None,
                lower: Some(alike.iter().map(|row| row.first).collect()),
            };
            let sizes = [alike.len(), entries, heads, kv_heads, width];
            let mut prepared =
                Prepared::continuing(device, sizes, capacity, spec.scale, spec.pattern, &continued)?;
            if let Some((slopes, _)) = spec.slopes {
                prepared = prepared.with_slopes(device, slopes)?;
            }
            let end = first + alike.len() * entries;
            parts.push(Part { prepared, entries, places: first..end });
            first = end;
        }
        let heads = [heads, kv_heads, width];
        Ok(Self { parts, rows: rows.to_vec(), heads, capacity, products: spec.products })
    }

    /// What is mixed of q, k, v and the caches, which k and v are put into; the log-sum-exp of every query.
    pub fn forward<S: Activation>(
        &self,
        gpu: &Gpu,
        qkv: [&GpuBuffer<S>; 3],
        cache: &mut KeysValues<Gpu, S>,
        out: &mut GpuBuffer<S>,
        lse: &mut GpuBuffer<f32>,
    ) -> Result<()> {
        match self.products {
            Products::F32 => self.attend::<f32, S>(gpu, qkv, cache, out, lse)?,
            Products::Bf16 => self.attend::<bf16, S>(gpu, qkv, cache, out, lse)?,
        }
        let [_, k, v] = qkv;
        self.keep(gpu, k, &mut cache.k)?;
        self.keep(gpu, v, &mut cache.v)
    }

    fn attend<P: Product, S: Activation>(
        &self,
        gpu: &Gpu,
        [q, k, v]: [&GpuBuffer<S>; 3],
        cache: &KeysValues<Gpu, S>,
        out: &mut GpuBuffer<S>,
        lse: &mut GpuBuffer<f32>,
    ) -> Result<()> {
        let (device, [heads, kv_heads, width]) = (gpu.kernels(), self.heads);
        let mut rooms: [GpuBuffer<P>; 5] = Default::default();
        let [q_room, k_room, v_room, cached_k, cached_v] = &mut rooms;
        let q = stored_as(device, q.view()?, q_room)?;
        let k = stored_as(device, k.view()?, k_room)?;
        let v = stored_as(device, v.view()?, v_room)?;
        let cached = |values| Operand::row_major(values, [self.capacity, kv_heads, width]);
        let document = Document {
            k: cached(stored_as(device, cache.k.view()?, cached_k)?),
            v: cached(stored_as(device, cache.v.view()?, cached_v)?),
        };
        let (mut out, mut lse) = (out.view_mut()?, lse.view_mut()?);
        written_as::<_, P>(device, &mut out, &mut GpuBuffer::default(), |out| {
            for part in &self.parts {
                let of_kv = part.values(kv_heads * width);
                let own = |values, heads| Operand::row_major(values, [part.entries, heads, width]);
                let own = Own {
                    q: own(q.slice(part.values(heads * width)), heads),
                    k: own(k.slice(of_kv.clone()), kv_heads),
                    v: own(v.slice(of_kv), kv_heads),
                };
                let mut out = out.slice_mut(part.values(heads * width));
                let mut lse = lse.slice_mut(part.values(heads));
                part.prepared.forward(device, &own, Some(&document), &mut out, &mut lse)?;
            }
            Ok(())
        })
    }

    /// Puts the new entries' keys or values into the caches.
    fn keep<S: Activation>(&self, gpu: &Gpu, new: &GpuBuffer<S>, cache: &mut GpuBuffer<S>) -> Result<()> {
        let [_, kv_heads, width] = self.heads;
        let (new, mut cache, width) = (new.view()?, cache.view_mut()?, kv_heads * width);
        let mut from = 0;
        for row in &self.rows {
            let (to, len) = ((row.first + row.past) * width, row.entries * width);
            let copied = gpu
                .kernels()
                .stream()
                .memcpy_dtod(&new.slice(from..from + len), &mut cache.slice_mut(to..to + len));
            copied
                .map_err(|error| BaseError::Device { message: format!("keeping {len} values: {error}") })?;
            from += len;
        }
        Ok(())
    }
}
