//! The decoder's two ends on a GPU: the embedding, and the losses over the output head.
//!
//! Logits are made a chunk at a time ([`chunk_rows`]), of scored entries only, as [`megacontext_kernels::loss`] does; they become their own
//! gradient in place. Logits that are asked for as such are made so too and go to the host, which caps them when all are there.
//! A head or an embedding that an adapter changes (LoRA, rows of its own), and a divergence under a cap of the logits, are the
//! host's: hidden states go there and their gradient comes back.

use std::sync::Arc;

use megacontext_kernels::cuda::cudarc::driver::{CudaSlice, CudaView, CudaViewMut};
use megacontext_kernels::cuda::linear::{Layer, LayerGradients, Saved};
use megacontext_kernels::cuda::loss::{Targets, cross_entropy, divergence};
use megacontext_kernels::cuda::{embedding, rows};
use megacontext_kernels::gemm::Products;
use megacontext_kernels::loss::{Gradient, IGNORE, softcap};
use megacontext_kernels::store::bf16;

use super::buffer::{GpuBuffer, stored_as};
use super::parameters::Copied;
use super::{Gpu, GpuGradients};
use crate::buffers::Activation;
use crate::buffers::gpu::chunk_rows;
use crate::decoder::Decoder;
use crate::error::{BaseError, Result};
use crate::lora::LoraModules;
use crate::machine::{Loss, Machine, Scored, Teacher, Wanted};
use crate::params::Group;

fn places(scored: &[usize]) -> Result<Vec<u32>> {
    let place = |at: &usize| {
        u32::try_from(*at).map_err(|_| BaseError::Device {
            message: format!("expected at most {} entries in a pass, got entry {at}", u32::MAX),
        })
    };
    scored.iter().map(place).collect()
}

fn weights_of(scored: &[usize], weights: Option<&[f32]>, scale: f32) -> Vec<f32> {
    scored.iter().map(|at| scale * weights.map_or(1.0, |weights| weights[*at])).collect()
}

impl Gpu {
    /// Does an adapter change the embedding?
    fn embedding_adapted(decoder: &Decoder) -> bool {
        decoder.lora_modules().is_some_and(LoraModules::changes_embedding)
    }

    /// Does an adapter change the head?
    fn head_adapted(decoder: &Decoder) -> bool {
        decoder.lora_modules().is_some_and(LoraModules::changes_head)
    }

    pub(super) fn gather_tokens<S: Activation>(
        &self,
        decoder: &Decoder,
        tokens: &[u32],
        out: &mut GpuBuffer<S>,
    ) -> Result<()> {
        let (config, device) = (decoder.config(), self.kernels());
        let width = config.hidden_size;
        if Self::embedding_adapted(decoder) {
            let mut values = vec![0f32; tokens.len() * width];
            decoder.gather(tokens, &mut values)?;
            return self.read(&values, out);
        }
        out.size(device, tokens.len() * width)?;
        let mut out = out.view_mut()?;
        let name = config.embedding_name();
        if decoder.precision().stores_bf16() {
            // Rounded as the activations are, so the copy that the head reads serves here too.
            let table = self.parameters.values::<bf16>(device, decoder.params(), name)?;
            embedding::gather(device, &*table, width, tokens, &mut out)?;
        } else {
            let table = self.parameters.values::<f32>(device, decoder.params(), name)?;
            embedding::gather(device, &*table, width, tokens, &mut out)?;
        }
        if let Some(scale) = decoder.embedding_scale() {
            rows::scale(device, &mut out, scale)?;
        }
        Ok(())
    }

    pub(super) fn scatter_tokens(
        &self,
        decoder: &Decoder,
        d: &mut GpuBuffer<f32>,
        tokens: &[u32],
        gradients: &mut GpuGradients,
    ) -> Result<()> {
        let (config, device) = (decoder.config(), self.kernels());
        if Self::embedding_adapted(decoder) {
            let mut d = self.to_host(d)?;
            return decoder.embedding_gradients(&mut d, tokens, &mut gradients.host);
        }
        if !decoder.params().learns(Group::Embeddings) {
            return Ok(());
        }
        let mut d = d.view_mut()?;
        if let Some(scale) = decoder.embedding_scale() {
            rows::scale(device, &mut d, scale)?;
        }
        let name = config.embedding_name();
        let table = gradients.of(device, name, config.vocab_size * config.hidden_size)?;
        Ok(embedding::scatter_add(device, &d, config.hidden_size, tokens, table)?)
    }

    pub(super) fn cross_entropy<S: Activation>(
        &self,
        decoder: &Decoder,
        hidden: &GpuBuffer<S>,
        scored: Scored,
        scale: f32,
        dropout_seed: Option<u64>,
        parts: Option<&mut GpuGradients>,
    ) -> Result<Loss<GpuBuffer<f32>>> {
        if Self::head_adapted(decoder) {
            let hidden = self.to_host(hidden)?;
            let parts = parts.map(|gradients| &mut gradients.host);
            let Loss { nll, count, d_hidden } =
                decoder.head_loss(&hidden, scored, scale, dropout_seed, parts)?;
            let d_hidden = match d_hidden {
                None => None,
                Some(values) => {
                    let mut d_hidden = GpuBuffer::default();
                    self.read(&values, &mut d_hidden)?;
                    Some(d_hidden)
                }
            };
            return Ok(Loss { nll, count, d_hidden });
        }
        match decoder.precision().products() {
            Products::F32 => self.cross_entropy_as::<f32, S>(decoder, hidden, scored, scale, parts),
            Products::Bf16 => self.cross_entropy_as::<bf16, S>(decoder, hidden, scored, scale, parts),
        }
    }

    fn cross_entropy_as<P: Copied, S: Activation>(
        &self,
        decoder: &Decoder,
        hidden: &GpuBuffer<S>,
        Scored { targets, weights }: Scored,
        scale: f32,
        mut parts: Option<&mut GpuGradients>,
    ) -> Result<Loss<GpuBuffer<f32>>> {
        let config = decoder.config();
        let (vocab, width) = (config.vocab_size, config.hidden_size);
        if hidden.len() != targets.len() * width {
            let message = format!(
                "targets: expected one for each of {} entries, got {}",
                hidden.len() / width,
                targets.len()
            );
            return Err(BaseError::Input { message });
        }
        let scored: Vec<usize> = (0..targets.len()).filter(|at| targets[*at] != IGNORE).collect();
        let ids: Vec<u32> = scored.iter().map(|at| targets[*at]).collect();
        let name = config.head_name();
        let learns = decoder.params().parameter_learns(name);
        let mut d_weight = match &mut parts {
            Some(gradients) if learns => Some(gradients.take(self.kernels(), name, vocab * width)?),
            _ => None,
        };
        let mut d_hidden = GpuBuffer::default();
        if scale != 0.0 {
            self.zeros(&mut d_hidden, hidden.len())?;
        }
        let mut nll = vec![0f32; targets.len()];
        if !scored.is_empty() {
            let device = self.kernels();
            let on_device = Targets::new(device, &ids, vocab)?;
            let cap = config.architecture.softcap.map(|cap| cap as f32);
            let scales = weights_of(&scored, weights, scale);
            let head = Head::<P>::new(self, decoder)?;
            let mut first = 0;
            for part in scored.chunks(chunk_rows(vocab)) {
                let part_places = places(part)?;
                let x = head.rows(hidden, &part_places)?;
                let x = x.view()?;
                let mut logits = head.logits(&x)?;
                let part_scales = device.upload(&scales[first..first + part.len()])?;
                let mut losses = device.zeros::<f32>(part.len())?;
                cross_entropy(
                    device,
                    &mut logits.view_mut()?,
                    &on_device,
                    first,
                    &part_scales,
                    cap,
                    &mut losses,
                )?;
                if scale != 0.0 {
                    let d_weight = d_weight.as_mut().map(|d_weight| d_weight.slice_mut(..));
                    head.back(&x, &logits, d_weight, &part_places, &mut d_hidden)?;
                }
                let losses = device.download(&losses)?;
                for (at, loss) in part.iter().zip(losses) {
                    nll[*at] = loss;
                }
                first += part.len();
            }
        }
        if let (Some(gradients), Some(d_weight)) = (parts, d_weight) {
            gradients.put(name.to_string(), d_weight);
        }
        let d_hidden = (scale != 0.0).then_some(d_hidden);
        Ok(Loss { nll, count: scored.len(), d_hidden })
    }

    pub(super) fn divergence_from<S: Activation>(
        &self,
        decoder: &Decoder,
        hidden: &GpuBuffer<S>,
        scored: &[usize],
        teacher: Teacher<'_, Self, S>,
        wanted: Wanted<'_, GpuBuffer<f32>>,
    ) -> Result<Vec<f32>> {
        if Self::head_adapted(decoder) || decoder.config().architecture.softcap.is_some() {
            return self.divergence_on_host(decoder, hidden, scored, teacher, wanted);
        }
        match decoder.precision().products() {
            Products::F32 => self.divergence_as::<f32, S>(decoder, hidden, scored, teacher, wanted),
            Products::Bf16 => self.divergence_as::<bf16, S>(decoder, hidden, scored, teacher, wanted),
        }
    }

    fn divergence_as<P: Copied, S: Activation>(
        &self,
        decoder: &Decoder,
        hidden: &GpuBuffer<S>,
        scored: &[usize],
        teacher: Teacher<'_, Self, S>,
        mut wanted: Wanted<'_, GpuBuffer<f32>>,
    ) -> Result<Vec<f32>> {
        let (vocab, width) = (decoder.config().vocab_size, decoder.config().hidden_size);
        let device = self.kernels();
        let scales = match &wanted {
            None => vec![0.0; scored.len()],
            Some((scale, weights, _)) => weights_of(scored, *weights, *scale),
        };
        let head = Head::<P>::new(self, decoder)?;
        let mut kl = Vec::with_capacity(scored.len());
        for part in scored.chunks(chunk_rows(vocab)) {
            let first = kl.len();
            let part_places = places(part)?;
            let x = head.rows(hidden, &part_places)?;
            let x = x.view()?;
            let mut logits = head.logits(&x)?;
            let said = match &teacher {
                Teacher::Given(values) => {
                    let values = &values[first * width..][..part.len() * width];
                    let mut given = GpuBuffer::<f32>::default();
                    self.read(values, &mut given)?;
                    let mut room = GpuBuffer::default();
                    head.logits(&stored_as(device, given.view()?, &mut room)?)?
                }
                Teacher::RowsOf(values, all) => {
                    head.logits(&head.rows(values, &places(&all[first..first + part.len()])?)?.view()?)?
                }
            };
            let part_scales = device.upload(&scales[first..first + part.len()])?;
            let mut losses = device.zeros::<f32>(part.len())?;
            let (said, cap) = (said.view()?, None);
            divergence(device, &mut logits.view_mut()?, vocab, &said, &part_scales, cap, &mut losses)?;
            if let Some((.., into)) = &mut wanted {
                head.back(&x, &logits, None, &part_places, into)?;
            }
            kl.extend(device.download(&losses)?);
        }
        Ok(kl)
    }

    fn divergence_on_host<S: Activation>(
        &self,
        decoder: &Decoder,
        hidden: &GpuBuffer<S>,
        scored: &[usize],
        teacher: Teacher<'_, Self, S>,
        wanted: Wanted<'_, GpuBuffer<f32>>,
    ) -> Result<Vec<f32>> {
        let (width, scored_places) = (decoder.config().hidden_size, places(scored)?);
        let mut rows = GpuBuffer::default();
        self.rows_of(hidden, width, &scored_places, &mut rows)?;
        let student = self.to_host(&rows)?;
        let teacher = match teacher {
            Teacher::Given(values) => values.to_vec(),
            Teacher::RowsOf(values, all) => {
                self.rows_of(values, width, &places(all)?, &mut rows)?;
                self.to_host(&rows)?
            }
        };
        let weights =
            wanted.as_ref().and_then(|(_, weights, _)| weights.map(|w| weights_of(scored, Some(w), 1.0)));
        let gradient = match &wanted {
            None => Gradient::Skip,
            Some((scale, ..)) => Gradient::Hidden { scale: *scale },
        };
        let found = decoder.head_divergence(&student, &teacher, weights.as_deref(), gradient)?;
        if let (Some((.., into)), Some(d)) = (wanted, &found.d_hidden) {
            let device = self.kernels();
            let d = device.upload(d)?;
            embedding::scatter_add(device, &d, width, &scored_places, &mut into.view_mut()?)?;
        }
        Ok(found.kl)
    }

    pub(super) fn logits_of<S: Activation>(
        &self,
        decoder: &Decoder,
        hidden: &GpuBuffer<S>,
    ) -> Result<Vec<f32>> {
        if Self::head_adapted(decoder) {
            return decoder.logits_of(&self.to_host(hidden)?);
        }
        match decoder.precision().products() {
            Products::F32 => self.logits_as::<f32, S>(decoder, hidden),
            Products::Bf16 => self.logits_as::<bf16, S>(decoder, hidden),
        }
    }

    fn logits_as<P: Copied, S: Activation>(
        &self,
        decoder: &Decoder,
        hidden: &GpuBuffer<S>,
    ) -> Result<Vec<f32>> {
        let (device, config) = (self.kernels(), decoder.config());
        let width = config.hidden_size;
        let entries = hidden.len() / width;
        let head = Head::<P>::new(self, decoder)?;
        let (hidden, mut room) = (hidden.view()?, GpuBuffer::default());
        let mut logits = Vec::with_capacity(entries * config.vocab_size);
        for first in (0..entries).step_by(chunk_rows(config.vocab_size)) {
            let end = entries.min(first + chunk_rows(config.vocab_size));
            let x = stored_as(device, hidden.slice(first * width..end * width), &mut room)?;
            logits.extend(device.download(&head.logits(&x)?.view()?)?);
        }
        if let Some(cap) = config.architecture.softcap {
            softcap(&mut logits, cap as f32);
        }
        Ok(logits)
    }
}

/// The output head in one class of products.
struct Head<'a, P: Copied> {
    gpu: &'a Gpu,
    weight: Arc<CudaSlice<P>>,
    vocab: usize,
    width: usize,
}

impl<'a, P: Copied> Head<'a, P> {
    fn new(gpu: &'a Gpu, decoder: &Decoder) -> Result<Self> {
        let config = decoder.config();
        let weight = gpu.parameters.values::<P>(gpu.kernels(), decoder.params(), config.head_name())?;
        Ok(Self { gpu, weight, vocab: config.vocab_size, width: config.hidden_size })
    }

    fn layer<R>(&self, f: impl FnOnce(Layer<'_, P>) -> Result<R>) -> Result<R> {
        let weight = self.weight.slice(..);
        f(Layer { weight: &weight, shape: [self.vocab, self.width], lora: None })
    }

    /// Rows of hidden states, as products read them.
    fn rows<S: Activation>(&self, hidden: &GpuBuffer<S>, places: &[u32]) -> Result<GpuBuffer<P>> {
        let device = self.gpu.kernels();
        let mut rows = GpuBuffer::<P>::default();
        rows.size(device, places.len() * self.width)?;
        embedding::gather(device, &hidden.view()?, self.width, places, &mut rows.view_mut()?)?;
        Ok(rows)
    }

    /// Logits [n, V] in f32 of rows `x` [n, E].
    fn logits(&self, x: &CudaView<'_, P>) -> Result<GpuBuffer<f32>> {
        let device = self.gpu.kernels();
        let mut logits = GpuBuffer::default();
        logits.size(device, x.len() / self.width * self.vocab)?;
        self.layer(|layer| {
            Ok(layer.forward(device, self.gpu.products(), x, None, &mut logits.view_mut()?, false)?)
        })?;
        Ok(logits)
    }

    /// For logits that have become their gradient: adds that of the rows `x` to `d_hidden` at their places, and that of the weight
    /// to `d_weight`.
    fn back(
        &self,
        x: &CudaView<'_, P>,
        logits: &GpuBuffer<f32>,
        d_weight: Option<CudaViewMut<'_, f32>>,
        places: &[u32],
        d_hidden: &mut GpuBuffer<f32>,
    ) -> Result<()> {
        let device = self.gpu.kernels();
        let (mut room, mut d_rows) = (GpuBuffer::default(), GpuBuffer::<f32>::default());
        let gradient = stored_as::<_, P>(device, logits.view()?, &mut room)?;
        d_rows.size(device, x.len())?;
        let mut d_weight = d_weight;
        self.layer(|layer| {
            let into = LayerGradients { weight: d_weight.as_mut(), ..LayerGradients::default() };
            let saved = Saved { x, reduced: None, gradient: &gradient };
            let mut d_rows = d_rows.view_mut()?;
            Ok(layer.backward(device, self.gpu.products(), saved, Some((&mut d_rows, false)), into)?)
        })?;
        let d_hidden = &mut d_hidden.view_mut()?;
        Ok(embedding::scatter_add(device, &d_rows.view()?, self.width, places, d_hidden)?)
    }
}
