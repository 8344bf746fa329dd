//! What tells an adapted model from the one in its folder, in one short text.
//!
//! A network that learned beside a model (GistNet, LensNet) learned beside whatever was on it: LoRA's factors and their
//! strength, tensors of the folder that were trained in full, scales of sigma, a stretch of positions. All of that enters
//! the fingerprint, and nothing else: a model that is as its folder says has [`NO_ADAPTER`]. Whether the adapter was read
//! from a folder or trained in a session makes no difference, and neither does the precision class: weights and embeddings,
//! which one class holds in bf16, enter rounded to it.
//!
//! LoRA whose B is still zero changes nothing and does not enter.
//!
//! Units: none. Errors: a tensor that is named and not there.
//! Left out on purpose: that PiSSA in a session and the plain LoRA it is saved as are the same function; they differ here.

use megacontext_kernels::linear::Weight;
use megacontext_kernels::store::{Store, bf16};
use sha2::{Digest, Sha256};

use super::{Decoder, stored_narrow};
use crate::config::DecoderConfig;
use crate::error::Result;
use crate::network_file::NO_ADAPTER;
use crate::params::{Group, hex};
use crate::rope::{RopeScaling, SIGMA};
use crate::weights::Weights;
use megacontext_kernels::precision::Precision;

/// A hash that knows whether anything has entered it.
#[derive(Default)]
struct Entered {
    hash: Sha256,
    any: bool,
}

impl Entered {
    fn add(&mut self, what: &str, values: impl ExactSizeIterator<Item = f32>) {
        self.any = true;
        self.hash.update(format!("{what}\0{}\0", values.len()));
        values.for_each(|value| self.hash.update(value.to_bits().to_le_bytes()));
    }
}

impl Decoder {
    /// The fingerprint of what is on this model: lower-case hex, or [`NO_ADAPTER`]. `base` and `weights` are its folder's,
    /// `scaling` is how its positions are stretched, `replaced` names the folder's tensors that may have become others.
    ///
    /// # Errors
    /// When one of them is not there.
    pub fn adapter_fingerprint<'n>(
        &self,
        base: &DecoderConfig,
        weights: &Weights,
        scaling: &RopeScaling,
        replaced: impl IntoIterator<Item = &'n str>,
    ) -> Result<String> {
        let mut entered = Entered::default();
        let lora = self.merged.as_ref().map(|merged| &merged.lora).or(self.lora.as_ref());
        for module in lora.iter().flat_map(|lora| &lora.modules.modules) {
            let held = |name: String| Ok((self.params.values(&name)?.to_f32(), name));
            let learned = module.parameters().into_iter().map(|(name, _)| held(name));
            let learned = learned.collect::<Result<Vec<(Vec<f32>, String)>>>()?;
            let plain = !module.dora && !module.pissa;
            if plain
                && learned.iter().any(|(b, name)| *name == module.b_name() && b.iter().all(|v| *v == 0.0))
            {
                continue;
            }
            let fixed = module.fixed().into_iter().map(|(name, _)| held(name));
            let fixed = fixed.collect::<Result<Vec<(Vec<f32>, String)>>>()?;
            for (values, name) in learned.into_iter().chain(fixed) {
                entered.add(&format!("{name} at {}", module.scale), values.into_iter());
            }
        }
        for rows in lora.iter().flat_map(|lora| &lora.modules.tokens) {
            let name = rows.name();
            let values = self.params.values(&name)?.to_f32();
            entered.add(&format!("{name} of {:?}", rows.ids), values.into_iter());
        }
        let mut replaced: Vec<&str> = replaced.into_iter().collect();
        replaced.sort_unstable();
        replaced.dedup();
        for name in replaced {
            if !matches!(base.group_of(name), Group::Lora | Group::Sigma) {
                self.enter_replaced(name, base, weights, &mut entered)?;
            }
        }
        if let Some(scales) = self.sigma_scales() {
            let of_base = base.sigma_scales().unwrap_or_default();
            let own = scales.len().max(of_base.len());
            let level = |scales: &[f32], at: usize| scales.get(at).copied().unwrap_or(1.0);
            if (0..own).any(|at| level(&scales, at) != level(&of_base, at)) {
                entered.add(SIGMA, scales.into_iter());
            }
        }
        if *scaling != base.rope_scaling {
            entered.add(&scaling.to_json().to_string(), std::iter::empty());
        }
        Ok(if entered.any { hex(&entered.hash.finalize()) } else { NO_ADAPTER.to_string() })
    }

    /// A tensor of the folder, where it is no longer what the folder holds.
    fn enter_replaced(
        &self,
        name: &str,
        base: &DecoderConfig,
        weights: &Weights,
        entered: &mut Entered,
    ) -> Result<()> {
        let narrow = stored_narrow(base.group_of(name), Precision::Bf16);
        let round = |value: f32| if narrow { bf16::put(value).get() } else { value };
        let held = self.params.values(name)?;
        let now: Vec<f32> = match held.weight() {
            Weight::F32(values) => values.iter().map(|value| round(*value)).collect(),
            Weight::Bf16(values) => values.iter().map(|value| value.get()).collect(),
        };
        // A head that an adapter gave to a tied model was the embedding.
        let tied = base.tie_word_embeddings && name == base.untied_head_name();
        let was = if tied { base.embedding_name() } else { name };
        let was = if weights.has(was) {
            weights.values::<f32>(was, self.params.shape(name).unwrap_or(&[]))?
        } else {
            Vec::new()
        };
        let same = was.len() == now.len() && was.iter().zip(&now).all(|(was, now)| round(*was) == *now);
        if !same {
            entered.add(name, now.into_iter());
        }
        Ok(())
    }
}
