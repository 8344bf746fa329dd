//! What kernels take, in the layout of the structs of the same names in `cu/`.
//!
//! Addresses are [`CUdeviceptr`]s, 0 for null. A test holds sizes and offsets against those of the C++ compiler.

use cudarc::driver::DeviceRepr;
use cudarc::driver::sys::CUdeviceptr;

/// Strides in values; those of D are 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Operand {
    pub data: CUdeviceptr,
    pub row: i64,
    pub entry: i64,
    pub head: i64,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct AttentionArgs {
    pub q: Operand,
    pub k: Operand,
    pub v: Operand,
    pub d_out: Operand,
    pub document_k: Operand,
    pub document_v: Operand,
    pub prefix: CUdeviceptr,
    pub lengths: CUdeviceptr,
    pub lo: CUdeviceptr,
    pub hi: CUdeviceptr,
    pub slopes: CUdeviceptr,
    pub positions: CUdeviceptr,
    pub out: CUdeviceptr,
    pub lse: CUdeviceptr,
    pub delta: CUdeviceptr,
    pub dq: CUdeviceptr,
    pub dk: CUdeviceptr,
    pub dv: CUdeviceptr,
    pub entries: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub width: i32,
    pub scale: f32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct BoundsArgs {
    pub pattern: i32,
    pub size: i32,
    pub batch: i32,
    pub entries: i32,
    pub lengths: CUdeviceptr,
    pub offsets: CUdeviceptr,
    pub segments: CUdeviceptr,
    pub prefix: CUdeviceptr,
    pub floor: CUdeviceptr,
    pub document: i32,
    pub lo: CUdeviceptr,
    pub hi: CUdeviceptr,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct RopeArgs {
    pub x: CUdeviceptr,
    pub cos: CUdeviceptr,
    pub sin: CUdeviceptr,
    pub entries: i64,
    pub positions: i32,
    pub heads: i32,
    pub width: i32,
    pub rotated: i32,
    pub direction: f32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct DampingArgs {
    pub y: CUdeviceptr,
    pub gradient: CUdeviceptr,
    pub omega_squared: CUdeviceptr,
    pub sums: CUdeviceptr,
    pub entries: i64,
    pub positions: i32,
    pub heads: i32,
    pub width: i32,
    pub bands: i32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct NormArgs {
    pub x: CUdeviceptr,
    pub gain: CUdeviceptr,
    pub bias: CUdeviceptr,
    pub y: CUdeviceptr,
    pub gradient: CUdeviceptr,
    pub dx: CUdeviceptr,
    pub partials: CUdeviceptr,
    pub rows: i64,
    pub width: i32,
    pub rows_per_block: i32,
    pub eps: f32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct LossArgs {
    pub logits: CUdeviceptr,
    pub targets: CUdeviceptr,
    pub teacher: CUdeviceptr,
    pub scales: CUdeviceptr,
    pub losses: CUdeviceptr,
    pub vocab: i32,
    pub cap: f32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct AdamWArgs {
    pub p: CUdeviceptr,
    pub g: CUdeviceptr,
    pub m: CUdeviceptr,
    pub v: CUdeviceptr,
    pub count: i64,
    pub decay: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub step_size: f32,
    pub root_scale: f32,
    pub eps: f32,
    pub gradient_scale: f32,
    pub ids: CUdeviceptr,
    pub touched: i32,
    pub width: i32,
    pub step_untouched: i32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct RowsArgs {
    pub x: CUdeviceptr,
    pub y: CUdeviceptr,
    pub count: i64,
    pub width: i64,
    pub factor: f32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct SumArgs {
    pub g: CUdeviceptr,
    pub z: CUdeviceptr,
    pub norms: CUdeviceptr,
    pub partials: CUdeviceptr,
    pub sum: CUdeviceptr,
    pub rows: i64,
    pub width: i64,
    pub rows_per_piece: i64,
    pub pieces: i32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct HeadsArgs {
    pub fused: CUdeviceptr,
    pub q: CUdeviceptr,
    pub k: CUdeviceptr,
    pub v: CUdeviceptr,
    pub heads: i64,
    pub width: i64,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct MlpArgs {
    pub gate: CUdeviceptr,
    pub up: CUdeviceptr,
    pub out: CUdeviceptr,
    pub gradient: CUdeviceptr,
    pub count: i64,
    pub activation: i32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct GatherArgs {
    pub table: CUdeviceptr,
    pub ids: CUdeviceptr,
    pub out: CUdeviceptr,
    pub count: i64,
    pub width: i64,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct ScatterArgs {
    pub rows: CUdeviceptr,
    pub table: CUdeviceptr,
    pub ids: CUdeviceptr,
    pub starts: CUdeviceptr,
    pub places: CUdeviceptr,
    pub width: i64,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct DropoutArgs {
    pub x: CUdeviceptr,
    pub y: CUdeviceptr,
    pub count: i64,
    pub first: u64,
    pub seed: u64,
    pub threshold: u64,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct ColumnsArgs {
    pub x: CUdeviceptr,
    pub c: CUdeviceptr,
    pub y: CUdeviceptr,
    pub count: i64,
    pub width: i64,
    pub add: i32,
}

// SAFETY: these are plain C structs of numbers and device addresses, as the kernels declare them.
unsafe impl DeviceRepr for AttentionArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for BoundsArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for RopeArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for DampingArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for NormArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for LossArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for AdamWArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for RowsArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for SumArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for HeadsArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for MlpArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for GatherArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for ScatterArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for DropoutArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for ColumnsArgs {}
