//! The decoder's two ends under an adapter: embeddings and output head, with LoRA or rows of their own.
//!
//! Source: LoRA on a table and on a linear layer (Hu et al. 2021), PEFT's trainable tokens; the formulas are
//! [`megacontext_kernels::embedding`]'s and [`megacontext_kernels::loss`]'s. A head that is tied to an embedding with LoRA is a
//! linear layer with A' = Bᵀ [r, D] and B' = Aᵀ [V, r]: both are turned round once a pass, and their gradients back.
//!
//! Shapes: V vocabulary, D model width, r rank, A [r, V] and B [D, r] of the embedding, A [r, D] and B [V, r] of the head.
//! Errors: a parameter that is missing.

use megacontext_kernels::embedding::{self, LoraTable};
use megacontext_kernels::linear::{Dropout, LoraSlices};
use megacontext_kernels::loss::{
    Divergence, Gradient, Head, HeadGradients, HeadLoss, Rows, Targets, Teacher, head_cross_entropy,
    head_divergence, head_logits,
};
use megacontext_kernels::rows;
use megacontext_kernels::store::Store;

use super::Decoder;
use crate::error::Result;
use crate::gradients::Gradients;
use crate::lora::{LoraConfig, LoraKind, LoraModule, LoraModules, TokenRows};
use crate::machine::{Loss, Scored};
use crate::params::{Group, Held};
use crate::projection::dropout_of;

/// LoRA on a model: what was asked for and what it came to.
#[derive(Clone)]
pub(super) struct Attached {
    pub config: LoraConfig,
    pub modules: LoraModules,
}

/// Factors of the head, turned round where they are an embedding's.
pub(super) struct HeadLora<'a> {
    module: &'a LoraModule,
    a: Vec<f32>,
    b: Vec<f32>,
    dropout: Option<Dropout>,
}

/// `values` [rows, columns] turned round.
fn turned(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| values.iter().skip(c).step_by(columns).copied()).collect()
}

/// `into` [rows, columns] += `values` [columns, rows] turned round.
fn add_turned(values: &[f32], columns: usize, into: &mut [f32]) {
    let rows = into.len() / columns.max(1);
    for (at, into) in into.iter_mut().enumerate() {
        *into += values[at % columns * rows + at / columns];
    }
}

impl Decoder {
    /// Everything that LoRA adds, nothing where there is none.
    pub(super) fn adapted(&self) -> Option<&LoraModules> {
        self.lora.as_ref().map(|lora| &lora.modules)
    }

    fn embedding_module(&self) -> &str {
        let weight = self.config.embedding_name();
        weight.strip_suffix(".weight").unwrap_or(weight)
    }

    /// Rows of their own of the embedding or the head.
    fn own_rows(&self, embedding: bool) -> Option<&TokenRows> {
        self.adapted()?
            .tokens
            .iter()
            .find(|rows| if embedding { rows.embedding } else { rows.tied || !rows.embedding })
    }

    /// Does the embedding learn, or what an adapter adds to it?
    pub(super) fn embedding_learns(&self) -> bool {
        let adapted = self.adapted().is_some_and(LoraModules::changes_embedding);
        self.params.learns(Group::Embeddings) || (adapted && self.params.learns(Group::Lora))
    }

    /// Embeddings of tokens with their scale, row-major.
    pub(crate) fn gather<S: Store>(&self, tokens: &[u32], out: &mut [S]) -> Result<()> {
        self.gather_plain(tokens, out)?;
        if let Some(scale) = self.embedding_scale() {
            rows::scale(out, scale);
        }
        Ok(())
    }

    fn gather_plain<S: Store>(&self, tokens: &[u32], out: &mut [S]) -> Result<()> {
        let (params, width) = (&self.params, self.config.hidden_size);
        let table = params.values(self.config.embedding_name())?;
        if let Some(module) = self.adapted().and_then(|lora| lora.get(self.embedding_module())) {
            let (a, b) = (params.values(&module.a_name())?, params.values(&module.b_name())?);
            let lora = LoraTable { a: a.f32()?, b: b.f32()?, rank: module.rank, scale: module.scale as f32 };
            return Ok(lora.gather_into(table.weight(), width, tokens, out)?);
        }
        if let Some(rows) = self.own_rows(true) {
            let values = params.values(&rows.name())?;
            let own = Rows { ids: &rows.ids, values: values.f32()? };
            return Ok(embedding::gather_rows_into(table.weight(), own, width, tokens, out)?);
        }
        Ok(embedding::gather_into(table.weight(), width, tokens, out)?)
    }

    /// Gradients of the embedding's parameters for those of its rows, `d` [N, D], which is used up.
    pub(crate) fn embedding_gradients(
        &self,
        d: &mut [f32],
        tokens: &[u32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let c = &self.config;
        if let Some(scale) = self.embedding_scale() {
            rows::scale(d, scale);
        }
        if self.params.learns(Group::Embeddings) {
            let table = gradients.buffer(c.embedding_name(), c.vocab_size * c.hidden_size);
            embedding::scatter_add(d, c.hidden_size, tokens, table)?;
        }
        if !self.params.learns(Group::Lora) {
            return Ok(());
        }
        if let Some(module) = self.adapted().and_then(|lora| lora.get(self.embedding_module())) {
            let (a_name, b_name) = (module.a_name(), module.b_name());
            let (a, b) = (self.params.values(&a_name)?, self.params.values(&b_name)?);
            let (a, b) = (a.f32()?, b.f32()?);
            let lora = LoraTable { a, b, rank: module.rank, scale: module.scale as f32 };
            let (mut da, mut db) = (gradients.take(&a_name, a.len()), gradients.take(&b_name, b.len()));
            let added = lora.gradients(d, c.hidden_size, tokens, &mut da, &mut db);
            gradients.put(a_name, da);
            gradients.put(b_name, db);
            added?;
        }
        if let Some(rows) = self.own_rows(true) {
            let into = gradients.buffer(&rows.name(), rows.ids.len() * rows.width);
            embedding::scatter_rows(d, c.hidden_size, tokens, &rows.ids, into)?;
        }
        Ok(())
    }

    /// LoRA on the head, or on the embedding it is tied to.
    pub(super) fn head_lora(&self, dropout_seed: Option<u64>) -> Result<Option<HeadLora<'_>>> {
        let Some(lora) = self.adapted() else { return Ok(None) };
        let Some(module) = lora.modules.iter().find(|m| m.kind == LoraKind::Head || m.tied) else {
            return Ok(None);
        };
        let (a, b) = (self.params.values(&module.a_name())?, self.params.values(&module.b_name())?);
        let (a, b) = (a.f32()?, b.f32()?);
        Ok(Some(match module.kind {
            LoraKind::Embedding => {
                HeadLora { module, a: turned(b, module.rank), b: turned(a, module.inp), dropout: None }
            }
            _ => HeadLora { module, a: a.to_vec(), b: b.to_vec(), dropout: dropout_of(module, dropout_seed) },
        }))
    }

    /// Calls `f` with the output head, and whether its weight learns.
    pub(super) fn with_head<R>(
        &self,
        lora: Option<&HeadLora>,
        f: impl FnOnce(Head) -> Result<R>,
    ) -> Result<R> {
        let weight = self.params.values(self.config.head_name())?;
        let rows = self.own_rows(false);
        let values: Option<Held> = rows.map(|rows| self.params.values(&rows.name())).transpose()?;
        let own = match (rows, &values) {
            (Some(rows), Some(values)) => Some(Rows { ids: &rows.ids, values: values.f32()? }),
            _ => None,
        };
        let lora = lora.map(|lora| LoraSlices {
            a: &lora.a,
            b: &lora.b,
            rank: lora.module.rank,
            scale: lora.module.scale as f32,
            dropout: lora.dropout,
            initial: None,
            dora: None,
        });
        let softcap = self.config.architecture.softcap.map(|cap| cap as f32);
        f(Head { weight: weight.weight(), softcap, lora: lora.as_ref(), rows: own })
    }

    /// Sizes of the output head's product for `entries` positions: [N, E, V].
    pub(super) fn head_sizes(&self, entries: usize) -> [usize; 3] {
        [entries, self.config.hidden_size, self.config.vocab_size]
    }

    /// Logits [N, V] of hidden states.
    pub(crate) fn logits_of<S: Store>(&self, hidden: &[S]) -> Result<Vec<f32>> {
        let sizes = self.head_sizes(hidden.len() / self.config.hidden_size);
        let lora = self.head_lora(None)?;
        self.with_head(lora.as_ref(), |head| Ok(head_logits(hidden, head, sizes, self.precision.products())?))
    }

    /// The loss of `scored` entries; where `scale` is not 0, gradients of `scale` times it for the hidden states and, into `parts`, for
    /// what learns of the head.
    pub(crate) fn head_loss<S: Store>(
        &self,
        hidden: &[S],
        scored: Scored,
        scale: f32,
        dropout_seed: Option<u64>,
        parts: Option<&mut Gradients>,
    ) -> Result<Loss<Vec<f32>>> {
        let targets = Targets { ids: scored.targets, weights: scored.weights };
        let Some(gradients) = parts else {
            let wanted = if scale == 0.0 { Gradient::Skip } else { Gradient::Hidden { scale } };
            let lora = self.head_lora(dropout_seed)?;
            return self.cross_entropy(hidden, lora.as_ref(), targets, wanted);
        };
        let name = self.config.head_name();
        let sizes = self.head_sizes(targets.ids.len());
        let weight_learns = self.params.parameter_learns(name);
        let lora_learns = self.params.learns(Group::Lora);
        let lora = self.head_lora(dropout_seed)?;
        let rows = self.own_rows(false).filter(|_| lora_learns);
        let factors = lora.as_ref().filter(|_| lora_learns);
        let mut weight = weight_learns.then(|| gradients.take(name, sizes[1] * sizes[2]));
        let mut own = rows.map(|rows| gradients.take(&rows.name(), rows.ids.len() * rows.width));
        let tied = factors.is_some_and(|lora| lora.module.tied);
        let mut pair = factors.map(|lora| {
            let (a, b) = (lora.a.len(), lora.b.len());
            let take = |gradients: &mut Gradients, name: String, len| {
                if tied { vec![0f32; len] } else { gradients.take(&name, len) }
            };
            (take(gradients, lora.module.a_name(), a), take(gradients, lora.module.b_name(), b))
        });
        let (a, b) = match &mut pair {
            None => (None, None),
            Some((a, b)) => (Some(&mut a[..]), Some(&mut b[..])),
        };
        let into = HeadGradients { weight: weight.as_deref_mut(), a, b, rows: own.as_deref_mut() };
        let wanted = Gradient::HiddenAndParts { scale, into };
        let loss = self.cross_entropy(hidden, lora.as_ref(), targets, wanted);
        if let Some(weight) = weight {
            gradients.put(name.to_string(), weight);
        }
        if let (Some(rows), Some(own)) = (rows, own) {
            gradients.put(rows.name(), own);
        }
        if let (Some(lora), Some((a, b))) = (factors, pair) {
            let module = lora.module;
            if tied {
                // The head's A is the embedding's B turned round, and the other way about.
                add_turned(&a, module.rank, gradients.buffer(&module.b_name(), a.len()));
                add_turned(&b, module.inp, gradients.buffer(&module.a_name(), b.len()));
            } else {
                gradients.put(module.a_name(), a);
                gradients.put(module.b_name(), b);
            }
        }
        loss
    }

    fn cross_entropy<S: Store>(
        &self,
        hidden: &[S],
        lora: Option<&HeadLora>,
        targets: Targets,
        wanted: Gradient,
    ) -> Result<Loss<Vec<f32>>> {
        let (sizes, products) = (self.head_sizes(targets.ids.len()), self.precision.products());
        let found = self.with_head(lora, |head| {
            Ok(head_cross_entropy(hidden, head, sizes, targets, wanted, products)?)
        })?;
        let HeadLoss { nll, count, d_hidden } = found;
        Ok(Loss { nll, count, d_hidden })
    }

    /// KL(teacher ‖ model) of every row of hidden states, given the teacher's.
    pub(crate) fn head_divergence<S: Store, T: Store>(
        &self,
        hidden: &[S],
        teacher: &[T],
        weights: Option<&[f32]>,
        wanted: Gradient,
    ) -> Result<Divergence> {
        let width = self.config.hidden_size;
        let sizes = self.head_sizes(hidden.len() / width);
        let lora = self.head_lora(None)?;
        self.with_head(lora.as_ref(), |head| {
            let teacher = Teacher::Hidden { h: teacher, width, head };
            Ok(head_divergence(hidden, head, sizes, teacher, weights, wanted, self.precision.products())?)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turning_twice_gives_back() {
        let values: Vec<f32> = (0..6).map(|v| v as f32).collect();
        assert_eq!(turned(&values, 3), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        assert_eq!(turned(&turned(&values, 3), 2), values);
        let mut into = vec![1f32; 6];
        add_turned(&turned(&values, 3), 3, &mut into);
        assert_eq!(into, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }
}
