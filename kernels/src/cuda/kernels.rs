//! The kernels of `cu/` by storage type and size, loaded once.
//!
//! Those that may need more than 48 KiB of dynamic shared memory are told so here, once.

use std::sync::Arc;

use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::{CudaFunction, CudaModule};

use super::attention::sizes::{Sizes, WIDTHS};
use super::error::CudaError;
use super::image::Module;
use super::stored::Kind;

/// By [`Kind`].
type Kinds = [CudaFunction; 3];
/// By [`Kind`] and the place of a width in [`WIDTHS`].
type Widths = [[CudaFunction; WIDTHS.len()]; 3];
/// One value at a time, and vectors.
pub(super) type Forms = [CudaFunction; 2];

/// Storage of x and y for which there is a norm, with the values of a vector.
pub(super) const NORM_PAIRS: [(Kind, Kind, usize); 7] = [
    (Kind::F32, Kind::F32, 4),
    (Kind::Bf16, Kind::Bf16, 8),
    (Kind::F16, Kind::F16, 8),
    (Kind::F32, Kind::Bf16, 4),
    (Kind::F32, Kind::F16, 4),
    (Kind::Bf16, Kind::F32, 4),
    (Kind::F16, Kind::F32, 4),
];

/// RMSNorm's or LayerNorm's kernels.
pub(super) struct NormKernels {
    /// By place in [`NORM_PAIRS`].
    pub forward: [Forms; NORM_PAIRS.len()],
    pub backward: [Forms; 3],
}

/// All of them.
pub(super) struct Kernels {
    pub bounds: CudaFunction,
    pub forward: Widths,
    pub delta: Kinds,
    pub queries: Widths,
    pub keys: Widths,
    pub rope: [Forms; 3],
    pub damping: Kinds,
    /// RMSNorm, LayerNorm.
    pub norms: [NormKernels; 2],
    pub norm_sums: CudaFunction,
    pub nll: CudaFunction,
    pub kl: Kinds,
    pub adamw: CudaFunction,
    pub adamw_rows: CudaFunction,
    pub sum_of_squares: CudaFunction,
}

fn array<T, const N: usize>(make: impl FnMut(usize) -> Result<T, CudaError>) -> Result<[T; N], CudaError> {
    let made = (0..N).map(make).collect::<Result<Vec<T>, CudaError>>()?;
    Ok(made.try_into().unwrap_or_else(|_| unreachable!("N values were made")))
}

fn kinds<T>(mut make: impl FnMut(Kind) -> Result<T, CudaError>) -> Result<[T; 3], CudaError> {
    array(|kind| make(Kind::ALL[kind]))
}

impl Kernels {
    /// Looks every kernel up in the modules, which `module` loads, for a device whose blocks have `limit` bytes of dynamic
    /// shared memory at most.
    pub fn load(
        limit: usize,
        mut module: impl FnMut(Module) -> Result<Arc<CudaModule>, CudaError>,
    ) -> Result<Self, CudaError> {
        let [bounds, forward, backward] =
            [module(Module::Bounds)?, module(Module::Forward)?, module(Module::Backward)?];
        let [rope, norm, loss, adamw] =
            [module(Module::Rope)?, module(Module::Norm)?, module(Module::Loss)?, module(Module::AdamW)?];
        let get = |module: &Arc<CudaModule>, name: &str| {
            module.load_function(name).map_err(CudaError::call(format!("kernel {name}")))
        };
        let with_shared = |module: &Arc<CudaModule>, name: &str, bytes: usize| {
            let (function, bytes) = (get(module, name)?, bytes.min(limit));
            function
                .set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes as i32)
                .map_err(CudaError::call(format!("kernel {name}: {bytes} bytes of shared memory")))?;
            Ok(function)
        };
        let widths = |module: &Arc<CudaModule>, name: &str, bytes: fn(&Sizes) -> usize| {
            kinds(|kind| {
                array(|width| {
                    let sizes = Sizes::new(kind.bytes(), WIDTHS[width]);
                    let name = format!("{name}_{}_{}", kind.name(), WIDTHS[width]);
                    with_shared(module, &name, bytes(&sizes))
                })
            })
        };
        let forms = |first: &str, last: &str| -> Result<Forms, CudaError> {
            Ok([get(&norm, &format!("{first}_{last}"))?, get(&norm, &format!("{first}_vectors_{last}"))?])
        };
        let norms = |kind: &str| -> Result<NormKernels, CudaError> {
            Ok(NormKernels {
                forward: array(|pair| {
                    let (x, y, _) = NORM_PAIRS[pair];
                    let last = if x == y { x.name().into() } else { format!("{}_to_{}", x.name(), y.name()) };
                    forms(&format!("{kind}_forward"), &last)
                })?,
                backward: kinds(|x| {
                    let names = ["backward", "backward_vectors"];
                    array(|form| {
                        let name = format!("{kind}_{}_{}", names[form], x.name());
                        with_shared(&norm, &name, limit)
                    })
                })?,
            })
        };
        Ok(Self {
            bounds: get(&bounds, "attention_bounds")?,
            forward: widths(&forward, "attention_forward", |s| s.forward_bytes(s.forward_warps()))?,
            delta: kinds(|kind| get(&backward, &format!("attention_delta_{}", kind.name())))?,
            queries: widths(&backward, "attention_queries", |s| s.queries_bytes(s.backward_warps()))?,
            keys: widths(&backward, "attention_keys", |s| s.keys_bytes(s.backward_warps()))?,
            rope: kinds(|kind| {
                let name = kind.name();
                Ok([get(&rope, &format!("rope_{name}"))?, get(&rope, &format!("rope_vectors_{name}"))?])
            })?,
            damping: kinds(|kind| get(&rope, &format!("rope_damping_{}", kind.name())))?,
            norms: [norms("rms")?, norms("layer")?],
            norm_sums: get(&norm, "norm_sums")?,
            nll: get(&loss, "loss_nll")?,
            kl: kinds(|kind| get(&loss, &format!("loss_kl_{}", kind.name())))?,
            adamw: get(&adamw, "adamw")?,
            adamw_rows: get(&adamw, "adamw_rows")?,
            sum_of_squares: get(&adamw, "sum_of_squares")?,
        })
    }
}
