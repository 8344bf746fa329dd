//! Loss@H: how well the next H tokens of a history are predicted from what working contexts show of it.
//!
//! Source: MegaContext's loss@H, which its focus labels and its phases are judged by. The future F = x[e .. e+H) begins where
//! the contexts end; NLL of F_0 is read from a context's last entry, that of F_j from F_{j−1}:
//!   loss@H = (1/H)·Σ_j NLL(F_j).
//! Of the future only the first H − 1 tokens are entries, since nothing is read from the last.
//!
//! Several contexts over one history share their beginning mostly. Attention is causal, so the first of them runs whole, with
//! its future, and each other one runs from the first entry on in which it differs, over the keys and values of the first
//! (see [`crate::decoder::Document`]). The numbers are those of every context run by itself.
//!
//! Shapes: W entries of a context, H horizon, n other contexts. Units: nats per token. Errors: no future; contexts that end
//! at different tokens, or are not over the tree; what the decoder refuses.
//! The same contexts are what LoRA learns from ([`HorizonLoss::accumulate`]); gists get no gradient here (GistNet's are
//! `gistnet-adapter`'s).

use candle_core::{Device, Tensor};
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::loss::IGNORE;

use super::input::ContextInput;
use super::source::TokenEmbeddings;
use super::tree::GistTree;
use super::working::{Limits, WorkingContext, fail};
use crate::buffers::Buffers;
use crate::decoder::{Continuation, Decoder, Document, EntryStep, Forward};
use crate::error::{BaseError, Result};
use crate::gradients::Gradients;
use crate::rope::{Entries, Rope, RopeScaling, RopeTables, SigmaRule};

/// Entries of contexts that run together, but for one that is longer by itself.
pub const ENTRIES_AT_ONCE: usize = 512;

/// What measures contexts: a model, and how it places entries.
pub struct HorizonLoss<'a> {
    decoder: &'a Decoder,
    rope: Rope,
    rule: SigmaRule,
    pattern: Pattern,
}

/// What is made smaller for one context: weight·(loss@H + kl·KL@H), KL being the mean divergence from a teacher that is given.
#[derive(Clone, Copy, Debug)]
pub struct HorizonObjective<'a> {
    /// Factor of the whole.
    pub weight: f64,
    /// Factor of the divergence.
    pub kl: f64,
    /// The teacher's hidden states, [H, E]: see [`HorizonLoss::teacher`]. Needed where `kl` is not 0.
    pub teacher: Option<&'a [f32]>,
    /// Seed of LoRA's dropout; none switches it off.
    pub dropout_seed: Option<u64>,
    /// Activation checkpointing.
    pub recompute: bool,
}

/// What one context came to in a training step, nats per token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HorizonStep {
    /// loss@H.
    pub loss: f64,
    /// KL@H, where there was a teacher.
    pub kl: Option<f64>,
}

/// Entries as the decoder is given them, the future among them.
struct Shown {
    input: ContextInput,
    targets: Vec<u32>,
}

impl Shown {
    fn len(&self) -> usize {
        self.targets.len()
    }
}

impl<'a> HorizonLoss<'a> {
    /// Of a model whose positions are stretched by `scaling`, with entries placed by `rule` (whose `block` is the tree's).
    ///
    /// # Errors
    /// A rule that is none.
    pub fn new(
        decoder: &'a Decoder,
        scaling: &RopeScaling,
        rule: SigmaRule,
        pattern: Pattern,
    ) -> Result<Self> {
        rule.check().map_err(|message| BaseError::Input { message })?;
        Ok(Self { decoder, rope: decoder.config().rope(scaling), rule, pattern })
    }

    /// Where entries stand.
    pub fn rule(&self) -> &SigmaRule {
        &self.rule
    }

    /// The model.
    pub fn decoder(&self) -> &'a Decoder {
        self.decoder
    }

    /// Loss@H of each context over `tree`, H being the tokens of `future`.
    ///
    /// # Errors
    /// See the module.
    pub fn measure(
        &self,
        tree: &GistTree,
        contexts: &[&WorkingContext],
        future: &[u32],
        buffers: &mut Buffers,
    ) -> Result<Vec<f64>> {
        let Some((first, others)) = contexts.split_first() else { return Ok(Vec::new()) };
        if future.is_empty() {
            return fail("loss@H: expected a future of at least 1 token, got none".to_string());
        }
        let end = first.coverage().end;
        if let Some(other) = others.iter().find(|other| other.coverage().end != end) {
            return fail(format!(
                "loss@H: expected contexts that end at one token, got one that ends at {end} and one at {}",
                other.coverage().end
            ));
        }
        let length = end as usize + future.len();
        let shown = self.show(tree, first, future)?;
        let rope = self.tables(&shown.input, length)?;
        let document = self.decoder.run_entries(
            &shown.input.embeddings_we,
            &shown.targets,
            self.pattern,
            &rope,
            buffers,
        )?;
        let mean = |nll: &[f32]| nll.iter().map(|v| f64::from(*v)).sum::<f64>() / future.len() as f64;
        let mut losses = vec![mean(document.nll()); contexts.len()];

        // Of each other context the first entry that is not the first context's, the longest rest before shorter ones.
        let mut rows: Vec<(usize, usize)> = others
            .iter()
            .enumerate()
            .filter(|(_, other)| other.entries() != first.entries())
            .map(|(at, other)| {
                let pairs = first.entries().iter().zip(other.entries());
                (at, pairs.take_while(|(a, b)| a == b).count())
            })
            .collect();
        rows.sort_by_key(|(at, prefix)| (std::cmp::Reverse(others[*at].cost() - prefix), *at));
        let mut rest = &rows[..];
        while let Some((at, prefix)) = rest.first() {
            let longest = others[*at].cost() - prefix + future.len() - 1;
            let (now, later) = rest.split_at((ENTRIES_AT_ONCE / longest).clamp(1, rest.len()));
            rest = later;
            let nll = self.continued(tree, others, now, longest, future, length, &document, buffers)?;
            for ((at, _), nll) in now.iter().zip(nll.chunks_exact(longest)) {
                losses[at + 1] = mean(nll);
            }
        }
        Ok(losses)
    }

    fn whole(tree: &GistTree) -> Result<WorkingContext> {
        WorkingContext::recent(tree, Limits::new(tree.len() as usize, 0)?)
    }

    /// What the model as it is says of the future behind the whole history, as final hidden states of the H entries that it is
    /// read from, [H, E]: a teacher for [`HorizonLoss::accumulate`].
    ///
    /// # Errors
    /// See the module.
    pub fn teacher(&self, tree: &GistTree, future: &[u32]) -> Result<Vec<f32>> {
        let shown = self.show(tree, &Self::whole(tree)?, future)?;
        let width = self.decoder.config().hidden_size;
        let rope = self.tables(&shown.input, tree.len() as usize + future.len())?;
        let x = Tensor::from_vec(shown.input.embeddings_we, (1, shown.targets.len(), width), &Device::Cpu)?;
        let with = Forward { pattern: self.pattern, rope: &rope, rows: &Rows::default(), dropout_seed: None };
        let hidden: Vec<f32> = self.decoder.hidden(&x, &with)?.flatten_all()?.to_vec1()?;
        Ok(hidden[hidden.len() - future.len() * width..].to_vec())
    }

    /// One context of a training step of the model: loss@H forward and backward, into the gradients of what learns.
    ///
    /// # Errors
    /// See the module; those of [`Decoder::accumulate_entries`].
    pub fn accumulate(
        &self,
        tree: &GistTree,
        context: &WorkingContext,
        future: &[u32],
        objective: &HorizonObjective,
        gradients: &mut Gradients,
    ) -> Result<HorizonStep> {
        if future.is_empty() {
            return fail("loss@H: expected a future of at least 1 token, got none".to_string());
        }
        let shown = self.show(tree, context, future)?;
        let rope = self.tables(&shown.input, context.coverage().end as usize + future.len())?;
        let each = objective.weight / future.len() as f64;
        let step = EntryStep {
            x_te: &shown.input.embeddings_we,
            tokens: &shown.input.tokens_w,
            targets: &shown.targets,
            nll: each,
            kl: each * objective.kl,
            teacher: objective.teacher,
        };
        let with = Forward {
            pattern: self.pattern,
            rope: &rope,
            rows: &Rows::default(),
            dropout_seed: objective.dropout_seed,
        };
        let found = self.decoder.accumulate_entries(&step, &with, objective.recompute, gradients)?;
        let h = future.len() as f64;
        Ok(HorizonStep { loss: found.nll / h, kl: found.kl.map(|kl| kl / h) })
    }

    /// NLL of rows over the first context, [n, longest], 0 where nothing is scored.
    fn continued(
        &self,
        tree: &GistTree,
        contexts: &[&WorkingContext],
        rows: &[(usize, usize)],
        longest: usize,
        future: &[u32],
        length: usize,
        document: &Document,
        buffers: &mut Buffers,
    ) -> Result<Vec<f32>> {
        let width = self.decoder.config().hidden_size;
        let all = rows.len() * longest;
        let mut x = vec![0f32; all * width];
        let mut targets = vec![IGNORE; all];
        let mut places = ContextInput {
            embeddings_we: Vec::new(),
            tokens_w: Vec::new(),
            mu_w: vec![0.0; all],
            sigma_w: vec![0.0; all],
            lod_w: vec![0; all],
        };
        let mut lengths = Vec::with_capacity(rows.len());
        for (row, (at, prefix)) in rows.iter().enumerate() {
            let shown = self.show(tree, contexts[*at], future)?;
            let (own, first) = (shown.len() - prefix, row * longest);
            x[first * width..][..own * width].copy_from_slice(&shown.input.embeddings_we[prefix * width..]);
            targets[first..][..own].copy_from_slice(&shown.targets[*prefix..]);
            places.mu_w[first..][..own].copy_from_slice(&shown.input.mu_w[*prefix..]);
            places.sigma_w[first..][..own].copy_from_slice(&shown.input.sigma_w[*prefix..]);
            places.lod_w[first..][..own].copy_from_slice(&shown.input.lod_w[*prefix..]);
            lengths.push(own);
        }
        let prefix: Vec<usize> = rows.iter().map(|(_, prefix)| *prefix).collect();
        let continuation = Continuation {
            prefix: &prefix,
            lengths: Some(&lengths),
            x_nre: &Tensor::from_vec(x, (rows.len(), longest, width), &Device::Cpu)?,
            rope: &self.tables(&places, length)?,
            targets: &targets,
            teacher: None,
        };
        Ok(self.decoder.continue_document(document, &continuation, None, true, buffers)?.nll)
    }

    /// A context and the part of the future that is read from.
    fn show(&self, tree: &GistTree, context: &WorkingContext, future: &[u32]) -> Result<Shown> {
        let mut input = context.input(tree, self.decoder, &self.rule)?;
        let mut targets = vec![IGNORE; context.cost() - 1];
        targets.extend_from_slice(future);
        let read = &future[..future.len() - 1];
        input.embeddings_we.extend(TokenEmbeddings::embeddings(self.decoder, read)?);
        let end = context.coverage().end;
        for (start, token) in (end..).zip(read) {
            let (mu, sigma) = self.rule.place(start as f64, 0);
            input.tokens_w.push(*token);
            input.mu_w.push(mu);
            input.sigma_w.push(sigma);
            input.lod_w.push(0);
        }
        Ok(Shown { input, targets })
    }

    fn tables(&self, input: &ContextInput, length: usize) -> Result<RopeTables> {
        let scales = self.decoder.sigma_scales();
        self.rope.place(&Entries { length: Some(length), ..input.places(scales.as_deref()) })
    }
}
