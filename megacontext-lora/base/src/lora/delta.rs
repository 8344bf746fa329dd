//! The whole change that an adapter makes to a weight, for merging and for hosts that ask.
//!
//! Sources: LoRA, ΔW = s·B·A; an embedding's (s·B·A)ᵀ; PiSSA's s·(B·A − B₀·A₀); DoRA's diag(m/n)·(W + s·B·A) − W with n the
//! lengths of the rows of W + s·B·A. Rows of tokens that learn by themselves take the table's rows' place.
//!
//! Shapes: a weight [out, in], an embedding [V, D]; A [r, in], B [out, r]. Products in f32.
//! Errors: a parameter that is missing or of another shape, a row of length 0 under DoRA.

use candle_core::Tensor;
use megacontext_kernels::cpu::Values;
use megacontext_kernels::linear::{LoraSlices, Weight, row_norms};

use super::{LoraKind, LoraModule, LoraModules};
use crate::error::{BaseError, Result};

fn missing(name: &str) -> BaseError {
    BaseError::Parameter {
        name: name.to_string(),
        message: "expected this parameter, there is none".to_string(),
    }
}

/// The parameter `name` of this shape, in f32.
fn parameter(name: &str, shape: &[usize], get: &impl Fn(&str) -> Option<Tensor>) -> Result<Tensor> {
    let tensor = get(name).ok_or_else(|| missing(name))?;
    if tensor.dims() != shape {
        let message = format!("expected shape {shape:?}, got {:?}", tensor.dims());
        return Err(BaseError::Parameter { name: name.to_string(), message });
    }
    Ok(tensor.to_dtype(candle_core::DType::F32)?.contiguous()?)
}

/// n [out], the lengths of the rows of W + s·B·A; refuses a row of length 0, which has no direction.
pub(crate) fn lengths(module: &LoraModule, weight: Weight, a: &[f32], b: &[f32]) -> Result<Vec<f32>> {
    let scale = module.scale as f32;
    let lora = LoraSlices { a, b, rank: module.rank, scale, dropout: None, initial: None, dora: None };
    let mut norms = vec![0f32; module.out];
    row_norms(weight, [module.out, module.inp], &lora, &mut norms);
    match norms.iter().position(|n| !(n.is_finite() && *n > 0.0)) {
        None => Ok(norms),
        Some(row) => Err(BaseError::Parameter {
            name: module.weight_name(),
            message: format!(
                "expected rows of a finite length above 0 for DoRA, got {} for row {row} of W + s·B·A",
                norms[row]
            ),
        }),
    }
}

/// The change of a module's weight, in f32 and of the weight's shape; `weight` is the base's, in f32, and `get` gives the
/// module's parameters by name.
///
/// # Errors
/// When a parameter is missing or of another shape.
pub fn delta(module: &LoraModule, weight: &Tensor, get: impl Fn(&str) -> Option<Tensor>) -> Result<Tensor> {
    let [factors, shape] = [[module.rank, module.inp], [module.out, module.rank]];
    let a_ri = parameter(&module.a_name(), &factors, &get)?;
    let b_or = parameter(&module.b_name(), &shape, &get)?;
    let product = (b_or.matmul(&a_ri)? * module.scale)?;
    let expected = match module.kind {
        LoraKind::Embedding => [module.inp, module.out],
        _ => [module.out, module.inp],
    };
    if weight.dims() != expected {
        let message = format!("expected shape {expected:?}, got {:?}", weight.dims());
        return Err(BaseError::Parameter { name: module.weight_name(), message });
    }
    if module.kind == LoraKind::Embedding {
        return Ok(product.t()?.contiguous()?);
    }
    if module.pissa {
        let [a, b] = module.fixed_names();
        let fixed = parameter(&b, &shape, &get)?.matmul(&parameter(&a, &factors, &get)?)?;
        return Ok((product - (fixed * module.scale)?)?);
    }
    if module.dora {
        let m = parameter(&module.magnitude_name(), &[module.out], &get)?;
        let w = weight.contiguous()?;
        let norms = lengths(module, Weight::F32(&Values::of(&w)?), &Values::of(&a_ri)?, &Values::of(&b_or)?)?;
        let norms = Tensor::from_vec(norms, module.out, w.device())?;
        let scale_o1 = (m / norms)?.reshape((module.out, 1))?;
        return Ok(((&w + product)?.broadcast_mul(&scale_o1)? - w)?);
    }
    Ok(product)
}

/// The model's tensor `name` as the adapter makes it, or none where it leaves it alone. `weight` gives the base's, in f32. The
/// head of a tied model is its embedding; ask by that name.
///
/// # Errors
/// As [`delta`].
pub fn changed(
    modules: &LoraModules,
    name: &str,
    weight: impl FnOnce() -> Result<Tensor>,
    get: impl Fn(&str) -> Option<Tensor>,
) -> Result<Option<Tensor>> {
    let module = super::module_of(name);
    if let Some(found) = modules.get(module) {
        let weight = weight()?;
        return Ok(Some((&weight + delta(found, &weight, get)?)?));
    }
    let Some(rows) = modules.rows(module) else { return Ok(None) };
    let values = parameter(&rows.name(), &[rows.ids.len(), rows.width], &get)?;
    let weight = weight()?;
    let mut table = weight.flatten_all()?.to_vec1::<f32>()?;
    for (row, id) in values.to_vec2::<f32>()?.iter().zip(&rows.ids) {
        table[*id as usize * rows.width..][..rows.width].copy_from_slice(row);
    }
    Ok(Some(Tensor::from_vec(table, weight.shape(), weight.device())?))
}
