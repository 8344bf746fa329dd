//! First values of an adapter's parameters, and PiSSA's way back to plain LoRA.
//!
//! Sources: LoRA as PyTorch gives it, A uniform in ±1/√in (`kaiming_uniform_` with a = √5) and B zero; PEFT's `gaussian`, A of
//! deviation 1/r; an embedding's A zero and B standard normal (as an embedding's rows are, and as PEFT has it); DoRA's m, the
//! lengths of the weight's rows; rows of tokens, the table's own. So each changes nothing at first.
//!
//! PiSSA (Meng et al. 2024): of W = U·S·Vᵀ the r largest singular values make A = √(S/s)·Vᵀ and B = U·√(S/s); with the rest of W
//! frozen the model starts where it was, and what learns first is what W does most. The first values stay beside the
//! weight as a fixed part that is taken off (see [`megacontext_kernels::linear`]).
//!
//! Saving PiSSA: no reader could rebuild the rest of W to the bit, since singular vectors are not. So it is written as the
//! plain LoRA that it is against the base as it came, W + s·(B·A − B₀·A₀): factors [A; A₀] and [B, −B₀] of rank 2r with the same
//! s, as PEFT converts it ([`plain`]). Training it further goes on from there as plain LoRA.
//!
//! The values depend on a seed, the module's name and, for DoRA and PiSSA, its weight: not on threads.
//! Errors: a weight whose singular values cannot be found (it is not finite).

use candle_core::{DType, Device, Tensor};
use faer::Mat;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::delta::lengths;
use super::{LoraConfig, LoraKind, LoraModule, LoraModules};
use crate::error::{BaseError, Result};
use crate::params::{Group, ParamStore};
use crate::random::Random;

/// How factors begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoraInit {
    /// A uniform, B zero.
    #[default]
    Default,
    /// A normal, B zero.
    Gaussian,
    /// The weight's largest singular values.
    Pissa,
}

/// A [r, in] and B [out, r], row-major.
type Factors = (Vec<f32>, Vec<f32>);

fn fresh(init: LoraInit, module: &LoraModule, params: &ParamStore, seed: u64) -> Result<Factors> {
    let mut random = Random::named(seed, &module.name);
    let (a, b) = (module.rank * module.inp, module.out * module.rank);
    if module.kind == LoraKind::Embedding {
        return Ok((vec![0.0; a], (0..b).map(|_| random.normal() as f32).collect()));
    }
    Ok(match init {
        LoraInit::Default => {
            let bound = 1.0 / (module.inp as f64).sqrt();
            ((0..a).map(|_| random.uniform(-bound, bound) as f32).collect(), vec![0.0; b])
        }
        LoraInit::Gaussian => {
            let deviation = 1.0 / module.rank as f64;
            ((0..a).map(|_| (random.normal() * deviation) as f32).collect(), vec![0.0; b])
        }
        LoraInit::Pissa => principal(module, &params.values(&module.weight_name())?.to_f32())?,
    })
}

/// The factors of the best approximation of W [out, in] of rank r: s·B·A.
fn principal(module: &LoraModule, w: &[f32]) -> Result<Factors> {
    let (out, inp, rank) = (module.out, module.inp, module.rank);
    let matrix = Mat::<f32>::from_fn(out, inp, |o, i| w[o * inp + i]);
    let finite = w.iter().all(|value| value.is_finite());
    let svd = finite.then(|| matrix.thin_svd().ok()).flatten().ok_or_else(|| BaseError::Parameter {
        name: module.weight_name(),
        message: "expected finite values for PiSSA, found no singular values".to_string(),
    })?;
    let (u, s, v) = (svd.U(), svd.S().column_vector(), svd.V());
    let root: Vec<f32> = (0..rank).map(|r| (s[r] / module.scale as f32).sqrt()).collect();
    let a = (0..rank * inp).map(|at| root[at / inp] * v[(at % inp, at / inp)]).collect();
    let b = (0..out * rank).map(|at| u[(at / rank, at % rank)] * root[at % rank]).collect();
    Ok((a, b))
}

/// Adds the parameters of `modules` to `params`, which holds the model's weights.
pub(super) fn attach(
    config: &LoraConfig,
    modules: &LoraModules,
    params: &mut ParamStore,
    seed: u64,
) -> Result<()> {
    let held: &ParamStore = params;
    // Each in one thread, so that its values do not depend on how many there are.
    let made: Vec<(Factors, Option<Vec<f32>>)> = modules
        .modules
        .par_iter()
        .map(|module| {
            let (a, b) = fresh(config.init, module, held, seed)?;
            let magnitudes = match module.dora {
                false => None,
                true => Some(lengths(module, held.values(&module.weight_name())?.weight(), &a, &b)?),
            };
            Ok(((a, b), magnitudes))
        })
        .collect::<Result<_>>()?;
    let mut rows = Vec::new();
    for tokens in &modules.tokens {
        let table = held.values(&tokens.weight_name())?.to_f32();
        let own = tokens.ids.iter().flat_map(|id| &table[*id as usize * tokens.width..][..tokens.width]);
        rows.push((tokens.name(), own.copied().collect::<Vec<f32>>(), [tokens.ids.len(), tokens.width]));
    }
    for (module, ((a, b), magnitudes)) in modules.modules.iter().zip(made) {
        let shapes = [[module.rank, module.inp], [module.out, module.rank]];
        if module.pissa {
            for (name, (values, shape)) in
                module.fixed_names().into_iter().zip([(&a, shapes[0]), (&b, shapes[1])])
            {
                params.insert_values(name, Group::Base, values.clone(), &shape)?;
            }
        }
        params.insert_values(module.a_name(), Group::Lora, a, &shapes[0])?;
        params.insert_values(module.b_name(), Group::Lora, b, &shapes[1])?;
        if let Some(magnitudes) = magnitudes {
            params.insert_values(module.magnitude_name(), Group::Lora, magnitudes, &[module.out])?;
        }
    }
    for (name, values, shape) in rows {
        params.insert_values(name, Group::Lora, values, &shape)?;
    }
    Ok(())
}

/// The same adapter without PiSSA's fixed part: settings and tensors of plain LoRA that change the base as it came alike.
/// `tensors` are all that is saved, `params` holds the fixed part.
///
/// # Errors
/// When a factor or its fixed part is missing.
pub fn plain(
    config: &LoraConfig,
    modules: &LoraModules,
    tensors: Vec<(String, Tensor)>,
    params: &ParamStore,
) -> Result<(LoraConfig, Vec<(String, Tensor)>)> {
    if config.init != LoraInit::Pissa {
        return Ok((config.clone(), tensors));
    }
    // s = alpha/r or alpha/√r has to stay while r doubles.
    let wider = if config.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
    let mut out = config.clone();
    out.init = LoraInit::Default;
    out.r *= 2;
    out.alpha *= wider;
    out.rank_pattern = out.rank_pattern.map(|rank| 2 * rank);
    out.alpha_pattern = out.alpha_pattern.map(|alpha| wider * alpha);
    for module in modules.modules.iter().filter(|module| !module.pissa) {
        // An embedding has no fixed part: its rank and strength stay.
        let strength =
            module.scale * if config.use_rslora { (module.rank as f64).sqrt() } else { module.rank as f64 };
        let name = module.name.replace('.', r"\.");
        out.rank_pattern.0.insert(0, (name.clone(), module.rank));
        out.alpha_pattern.0.insert(0, (name, strength));
    }
    let mut given: Vec<(String, Tensor)> = tensors;
    for module in modules.modules.iter().filter(|module| module.pissa) {
        let [a_fixed, b_fixed] = module.fixed_names();
        for (name, fixed, axis, sign) in
            [(module.a_name(), a_fixed, 0, 1.0), (module.b_name(), b_fixed, 1, -1.0)]
        {
            let missing = |name: &str| BaseError::Parameter {
                name: name.to_string(),
                message: "expected this parameter to write PiSSA as plain LoRA, there is none".to_string(),
            };
            let fixed = params.get(&fixed).ok_or_else(|| missing(&fixed))?.to_device(&Device::Cpu)?;
            let fixed = (fixed.to_dtype(DType::F32)? * sign)?;
            let place = given.iter_mut().find(|(given, _)| *given == name).ok_or_else(|| missing(&name))?;
            place.1 = Tensor::cat(&[&place.1, &fixed], axis)?;
        }
    }
    Ok((out, given))
}
