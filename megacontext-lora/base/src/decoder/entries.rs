//! A training step over entries of mixed levels: what a working context shows, and the tokens behind it.
//!
//! Source: MegaContext's JT3: NLL of the horizon behind a context of tokens and gists, and (optional) the divergence from a
//! teacher that saw the history whole. Gists are given, as the entries' vectors, and get no gradient; token embeddings do
//! where their group learns. Hidden states are enough of a teacher: its output head is the model's own, so the head must not
//! learn beside a divergence.
//!
//! Shapes: T entries, E model width, n scored entries. Units: nats. Errors: shapes that do not agree, no scored entry, a loss
//! that is not finite, a head that learns beside a divergence; then no gradient has been added.

use megacontext_kernels::loss::IGNORE;

use super::step::StepInput;
use super::{Decoder, Forward, HeldTables};
use crate::block::Attending;
use crate::buffers::{Activation, Scratch};
use crate::error::{BaseError, Result};
use crate::gradients::Gradients;
use crate::machine::{Machine, Scored, Teacher, on_machine};
use crate::params::Group;

/// Entries, what they should predict, and what is made smaller: Σ over scored entries of nll·NLL + kl·KL(teacher ‖ model).
#[derive(Clone, Copy, Debug)]
pub struct EntryStep<'a> {
    /// Row-major [T, E].
    pub x_te: &'a [f32],
    /// The token of each entry, [`IGNORE`] for a gist.
    pub tokens: &'a [u32],
    /// The token that each entry should predict, [`IGNORE`] where nothing is scored.
    pub targets: &'a [u32],
    /// Factor of NLL, above 0.
    pub nll: f64,
    /// Factor of the divergence.
    pub kl: f64,
    /// Final hidden states of the teacher, [n, E], one for each scored entry; needed where `kl` is not 0.
    pub teacher: Option<&'a [f32]>,
}

/// What a step over entries came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EntryLoss {
    /// Σ NLL of scored entries, nats.
    pub nll: f64,
    /// Σ KL(teacher ‖ model) of scored entries, nats, where there was a teacher.
    pub kl: Option<f64>,
    /// Scored entries.
    pub count: usize,
}

fn refuse<T>(message: String) -> Result<T> {
    Err(BaseError::Input { message: format!("entries: {message}") })
}

impl Decoder {
    /// Does the output head learn, or something that an adapter adds to it?
    fn head_learns(&self) -> bool {
        let name = self.config.head_name();
        let whole = self.params.parameter_learns(name);
        whole || (self.params.learns(Group::Lora) && self.adapted().is_some_and(|lora| lora.changes_head()))
    }

    /// Forward and backward over the entries of one context: adds the gradients to `gradients`. `recompute` as in
    /// [`Decoder::accumulate_gradients`].
    ///
    /// # Errors
    /// See the module.
    pub fn accumulate_entries(
        &self,
        step: &EntryStep,
        with: &Forward,
        recompute: bool,
        gradients: &mut Gradients,
    ) -> Result<EntryLoss> {
        if [Group::Base, Group::Lora].into_iter().any(|group| self.params.learns(group)) {
            self.refuse_merged("accumulate_entries")?;
        }
        let (width, entries) = (self.config.hidden_size, step.targets.len());
        let scored: Vec<usize> = (0..entries).filter(|at| step.targets[*at] != IGNORE).collect();
        if scored.is_empty() {
            return refuse("expected at least one that is scored, got none".to_string());
        }
        if step.x_te.len() != entries * width || step.tokens.len() != entries {
            return refuse(format!(
                "expected {entries} of width {width} and as many tokens, got {} values and {} tokens",
                step.x_te.len(),
                step.tokens.len()
            ));
        }
        if step.kl != 0.0 || step.teacher.is_some() {
            let got = step.teacher.map_or(0, <[f32]>::len);
            if got != scored.len() * width {
                return refuse(format!(
                    "expected the teacher's hidden states of {} scored entries, {} values, got {got}",
                    scored.len(),
                    scored.len() * width
                ));
            }
            if step.kl != 0.0 && self.head_learns() {
                return refuse(
                    "expected an output head that is frozen, since the teacher has the same, got one that learns".into(),
                );
            }
        }
        let mut buffers = gradients.take_passes();
        let loss = on_machine!(self, |machine: M, S| {
            machine.with_gradients(gradients, |gradients| {
                let scratch = M::scratch::<S>(&mut buffers);
                self.over_entries(machine, step, &scored, with, recompute, scratch, gradients)
            })
        });
        gradients.put_passes(buffers);
        loss
    }

    fn over_entries<M: Machine, S: Activation>(
        &self,
        machine: &M,
        step: &EntryStep,
        scored: &[usize],
        with: &Forward,
        recompute: bool,
        scratch: &mut Scratch<M, S>,
        gradients: &mut M::Gradients,
    ) -> Result<EntryLoss> {
        let (width, entries) = (self.config.hidden_size, step.targets.len());
        let attention = self.prepare(machine, 1, entries, with)?;
        let tables = HeldTables::of(with.rope)?;
        let spread = self.learning_spread(with.rope)?;
        let attending = Attending::Rows(&attention);
        let pass = self.pass(machine, attending, tables.slices(), spread, entries, with.dropout_seed)?;
        let input = StepInput::Entries(step.x_te);
        let loss = self.walk(&pass, input, recompute, scratch, gradients, |hidden, gradients| {
            let seed = with.dropout_seed;
            // The divergence first: it can fail, and it adds nothing.
            let (mut d_teacher, mut kl) = (None, None);
            if let Some(teacher) = step.teacher {
                if step.kl != 0.0 {
                    d_teacher = Some(machine.no_gradient(M::len(hidden))?);
                }
                let wanted = d_teacher.as_mut().map(|d| (step.kl as f32, None, d));
                let says = Teacher::Given(teacher);
                let found = machine.divergence(self, hidden, scored, says, wanted)?;
                let found: f64 = found.iter().map(|kl| f64::from(*kl)).sum();
                if !found.is_finite() {
                    return Err(BaseError::NonFinite { what: "divergence".to_string(), value: found });
                }
                kl = Some(found);
            }
            let targets = Scored { targets: step.targets, weights: None };
            let found = machine.head_loss(self, hidden, targets, step.nll as f32, seed, Some(gradients))?;
            let sum = found.sum();
            if !sum.is_finite() {
                return Err(BaseError::NonFinite { what: "loss".to_string(), value: sum });
            }
            let Some(mut d_hidden) = found.d_hidden else {
                return refuse(format!("expected a factor of NLL other than 0, got {}", step.nll));
            };
            if let Some(d) = d_teacher {
                machine.add_hidden(&d, &mut d_hidden)?;
            }
            Ok((EntryLoss { nll: sum, kl, count: found.count }, d_hidden))
        })?;
        if !self.embedding_learns() {
            return Ok(loss);
        }
        // What reached the tokens among the entries goes on into their embeddings.
        let (places, tokens): (Vec<u32>, Vec<u32>) =
            (0u32..).zip(step.tokens).filter(|(_, token)| **token != IGNORE).unzip();
        let mut d = M::Buffer::default();
        machine.rows_of(&scratch.d, width, &places, &mut d)?;
        machine.embedding_gradients(self, &mut d, &tokens, gradients)?;
        Ok(loss)
    }
}
