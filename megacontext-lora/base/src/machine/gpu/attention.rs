//! Attention on a GPU, over the kernels' `cuda::attention`.
//!
//! In class mixed (f32 storage, bf16 products) operands are rounded to bf16 for the kernels, and results are f32 again.

use megacontext_kernels::attention::Rows;
use megacontext_kernels::attention::prefix::Continuations;
use megacontext_kernels::cuda::attention::{Document, Gradients, Mixed, Operand, Own, Prepared};
use megacontext_kernels::gemm::Products;
use megacontext_kernels::store::bf16;

use super::Gpu;
use super::buffer::{GpuBuffer, Product, stored_as, written_as};
use crate::buffers::{Activation, KeysValues};
use crate::error::Result;
use crate::machine::AttentionSpec;

/// Attention, checked: which keys each query sees lies on the device.
pub(crate) struct GpuAttention {
    prepared: Prepared,
    /// B, T, H, G, D.
    sizes: [usize; 5],
    /// Of the document that rows continue.
    entries: usize,
    products: Products,
}

/// What backward reads and where it writes, besides the operands.
pub(crate) struct Backward<'a, S: Activation> {
    pub mixed: (&'a GpuBuffer<S>, &'a GpuBuffer<f32>),
    pub d_mixed: &'a GpuBuffer<f32>,
    pub into: [&'a mut GpuBuffer<S>; 3],
}

impl GpuAttention {
    /// Within rows.
    pub fn within(gpu: &Gpu, spec: &AttentionSpec, rows: &Rows) -> Result<Self> {
        let device = gpu.kernels();
        let mut prepared = Prepared::new(device, spec.sizes, spec.scale, spec.pattern, rows)?;
        if let Some((slopes, positions)) = spec.slopes {
            prepared = prepared.with_slopes(device, slopes)?;
            if let Some(positions) = positions {
                prepared = prepared.with_positions(device, positions)?;
            }
        }
        Ok(Self { prepared, sizes: spec.sizes, entries: 0, products: spec.products })
    }

    /// Of rows that continue a document of `entries` entries.
    pub fn continuing(gpu: &Gpu, spec: &AttentionSpec, entries: usize, rows: &Continuations) -> Result<Self> {
        let device = gpu.kernels();
        let prepared = Prepared::continuing(device, spec.sizes, entries, spec.scale, spec.pattern, rows)?;
        Ok(Self { prepared, sizes: spec.sizes, entries, products: spec.products })
    }

    /// What is mixed of q, k, v, and the log-sum-exp of every query.
    pub fn forward<S: Activation>(
        &self,
        gpu: &Gpu,
        qkv: [&GpuBuffer<S>; 3],
        document: Option<&KeysValues<Gpu, S>>,
        out: &mut GpuBuffer<S>,
        lse: &mut GpuBuffer<f32>,
    ) -> Result<()> {
        match self.products {
            Products::F32 => self.forward_as::<f32, S>(gpu, qkv, document, out, lse),
            Products::Bf16 => self.forward_as::<bf16, S>(gpu, qkv, document, out, lse),
        }
    }

    /// The gradients of q, k and v.
    pub fn backward<S: Activation>(
        &self,
        gpu: &Gpu,
        qkv: [&GpuBuffer<S>; 3],
        document: Option<&KeysValues<Gpu, S>>,
        what: Backward<'_, S>,
    ) -> Result<()> {
        match self.products {
            Products::F32 => self.backward_as::<f32, S>(gpu, qkv, document, what),
            Products::Bf16 => self.backward_as::<bf16, S>(gpu, qkv, document, what),
        }
    }

    /// Calls `f` with the operands, stored as P.
    fn operands<P: Product, S: Activation>(
        &self,
        gpu: &Gpu,
        [q, k, v]: [&GpuBuffer<S>; 3],
        document: Option<&KeysValues<Gpu, S>>,
        f: impl FnOnce(&Own<'_, P>, Option<&Document<'_, P>>) -> Result<()>,
    ) -> Result<()> {
        let (device, [_, entries, heads, kv_heads, width]) = (gpu.kernels(), self.sizes);
        let (of_q, of_kv) = ([entries, heads, width], [entries, kv_heads, width]);
        let mut rooms: [GpuBuffer<P>; 5] = Default::default();
        let [q_room, k_room, v_room, document_k, document_v] = &mut rooms;
        let own = Own {
            q: Operand::row_major(stored_as(device, q.view()?, q_room)?, of_q),
            k: Operand::row_major(stored_as(device, k.view()?, k_room)?, of_kv),
            v: Operand::row_major(stored_as(device, v.view()?, v_room)?, of_kv),
        };
        let document = match document {
            None => None,
            Some(document) => {
                let of_document = [self.entries, kv_heads, width];
                let k = stored_as(device, document.k.view()?, document_k)?;
                let v = stored_as(device, document.v.view()?, document_v)?;
                Some(Document {
                    k: Operand::row_major(k, of_document),
                    v: Operand::row_major(v, of_document),
                })
            }
        };
        f(&own, document.as_ref())
    }

    fn forward_as<P: Product, S: Activation>(
        &self,
        gpu: &Gpu,
        qkv: [&GpuBuffer<S>; 3],
        document: Option<&KeysValues<Gpu, S>>,
        out: &mut GpuBuffer<S>,
        lse: &mut GpuBuffer<f32>,
    ) -> Result<()> {
        let device = gpu.kernels();
        let (mut out, mut lse) = (out.view_mut()?, lse.view_mut()?);
        self.operands::<P, S>(gpu, qkv, document, |own, document| {
            written_as::<_, P>(device, &mut out, &mut GpuBuffer::default(), |out| {
                Ok(self.prepared.forward(device, own, document, out, &mut lse)?)
            })
        })
    }

    fn backward_as<P: Product, S: Activation>(
        &self,
        gpu: &Gpu,
        qkv: [&GpuBuffer<S>; 3],
        document: Option<&KeysValues<Gpu, S>>,
        Backward { mixed: (out, lse), d_mixed, into: [dq, dk, dv] }: Backward<'_, S>,
    ) -> Result<()> {
        let (device, [_, entries, heads, _, width]) = (gpu.kernels(), self.sizes);
        let (mut out_room, mut d_room) = (GpuBuffer::default(), GpuBuffer::default());
        let mixed = Mixed { out: stored_as::<_, P>(device, out.view()?, &mut out_room)?, lse: lse.view()? };
        let d_out = stored_as::<_, P>(device, d_mixed.view()?, &mut d_room)?;
        let d_out = Operand::row_major(d_out, [entries, heads, width]);
        let (mut dq, mut dk, mut dv) = (dq.view_mut()?, dk.view_mut()?, dv.view_mut()?);
        let mut rooms: [GpuBuffer<P>; 3] = Default::default();
        let [q_room, k_room, v_room] = &mut rooms;
        self.operands::<P, S>(gpu, qkv, document, |own, document| {
            written_as::<_, P>(device, &mut dq, q_room, |dq| {
                written_as::<_, P>(device, &mut dk, k_room, |dk| {
                    written_as::<_, P>(device, &mut dv, v_room, |dv| {
                        let mut gradients =
                            Gradients { q: dq.slice_mut(..), k: dk.slice_mut(..), v: dv.slice_mut(..) };
                        let prepared = &self.prepared;
                        Ok(prepared.backward(device, own, document, &mixed, &d_out, &mut gradients)?)
                    })
                })
            })
        })
    }
}
