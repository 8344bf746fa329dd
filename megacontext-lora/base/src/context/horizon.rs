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
//! Left out: gradients (GistNet's are `gistnet-adapter`'s).

use candle_core::{Device, Tensor};
use megacontext_kernels::attention::Pattern;
use megacontext_kernels::loss::IGNORE;

use super::input::ContextInput;
use super::source::TokenEmbeddings;
use super::tree::GistTree;
use super::working::{WorkingContext, fail};
use crate::buffers::Buffers;
use crate::decoder::{Continuation, Decoder, Document};
use crate::error::{BaseError, Result};
use crate::rope::{Entries, Rope, RopeScaling, RopeTables, SigmaRule};

/// Entries of contexts that run together, but for one that is longer by itself.
const ENTRIES_AT_ONCE: usize = 512;

/// What measures contexts: a model, and how it places entries.
pub struct HorizonLoss<'a> {
    decoder: &'a Decoder,
    rope: Rope,
    rule: SigmaRule,
    pattern: Pattern,
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
