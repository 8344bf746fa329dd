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

/// Storage of operand and result where the two may differ, with the values of a vector.
pub(super) const PAIRS: [(Kind, Kind, usize); 7] = [
    (Kind::F32, Kind::F32, 4),
    (Kind::Bf16, Kind::Bf16, 8),
    (Kind::F16, Kind::F16, 8),
    (Kind::F32, Kind::Bf16, 4),
    (Kind::F32, Kind::F16, 4),
    (Kind::Bf16, Kind::F32, 4),
    (Kind::F16, Kind::F32, 4),
];

/// By place in [`PAIRS`].
pub(super) type Pairs = [Forms; PAIRS.len()];

/// RMSNorm's or LayerNorm's kernels.
pub(super) struct NormKernels {
    pub forward: Pairs,
    pub backward: [Forms; 3],
}

/// Those of rows.cu.
pub(super) struct RowsKernels {
    pub convert: Pairs,
    pub add: Pairs,
    pub fill: Pairs,
    pub add_bias: Pairs,
    pub scale: [Forms; 3],
    pub sum_piece: [Forms; 3],
    pub sum: CudaFunction,
    pub split: [Forms; 3],
    pub join: [Forms; 3],
    pub dropout: [Forms; 3],
    pub dropout_add: Forms,
}

/// Those of dora.cu.
pub(super) struct DoraKernels {
    pub columns: Pairs,
    pub lengths: CudaFunction,
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
    pub rows: RowsKernels,
    pub mlp_forward: [Forms; 3],
    pub mlp_backward: [Forms; 3],
    pub gather: Pairs,
    pub scatter: Forms,
    pub dora: DoraKernels,
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
        let [rows, mlp, embedding, dora] =
            [module(Module::Rows)?, module(Module::Mlp)?, module(Module::Embedding)?, module(Module::Dora)?];
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
        let forms = |module: &Arc<CudaModule>, first: &str, last: &str| -> Result<Forms, CudaError> {
            Ok([get(module, &format!("{first}_{last}"))?, get(module, &format!("{first}_vectors_{last}"))?])
        };
        let by_kind = |module: &Arc<CudaModule>, first: &str| kinds(|kind| forms(module, first, kind.name()));
        let by_pair = |module: &Arc<CudaModule>, first: &str| -> Result<Pairs, CudaError> {
            array(|pair| {
                let (x, y, _) = PAIRS[pair];
                let last = if x == y { x.name().into() } else { format!("{}_to_{}", x.name(), y.name()) };
                forms(module, first, &last)
            })
        };
        let norms = |kind: &str| -> Result<NormKernels, CudaError> {
            Ok(NormKernels {
                forward: by_pair(&norm, &format!("{kind}_forward"))?,
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
            rope: by_kind(&rope, "rope")?,
            damping: kinds(|kind| get(&rope, &format!("rope_damping_{}", kind.name())))?,
            norms: [norms("rms")?, norms("layer")?],
            norm_sums: get(&norm, "norm_sums")?,
            nll: get(&loss, "loss_nll")?,
            kl: kinds(|kind| get(&loss, &format!("loss_kl_{}", kind.name())))?,
            adamw: get(&adamw, "adamw")?,
            adamw_rows: get(&adamw, "adamw_rows")?,
            sum_of_squares: get(&adamw, "sum_of_squares")?,
            rows: RowsKernels {
                convert: by_pair(&rows, "rows_convert")?,
                add: by_pair(&rows, "rows_add")?,
                fill: by_pair(&rows, "rows_fill")?,
                add_bias: by_pair(&rows, "rows_add_bias")?,
                scale: by_kind(&rows, "rows_scale")?,
                sum_piece: by_kind(&rows, "rows_sum_piece")?,
                sum: get(&rows, "rows_sum")?,
                split: by_kind(&rows, "rows_split")?,
                join: by_kind(&rows, "rows_join")?,
                dropout: by_kind(&rows, "rows_dropout")?,
                dropout_add: forms(&rows, "rows_dropout_add", "f32")?,
            },
            mlp_forward: by_kind(&mlp, "mlp_forward")?,
            mlp_backward: by_kind(&mlp, "mlp_backward")?,
            gather: by_pair(&embedding, "embedding_gather")?,
            scatter: [get(&embedding, "embedding_scatter")?, get(&embedding, "embedding_scatter_vectors")?],
            dora: DoraKernels {
                columns: by_pair(&dora, "dora_columns")?,
                lengths: get(&dora, "dora_lengths")?,
            },
        })
    }
}
