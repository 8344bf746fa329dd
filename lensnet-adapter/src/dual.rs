//! The older form of LensNet: entries and a few tail gists look at each other in turn.
//!
//! Source: MegaContext's older documents; its code never had it. With X the entries and G the tail gists, both in a width L
//! of their own (512), a stack is
//!
//!   G' = softmax(G·Wqg (X·Wkx)ᵀ/√D)·X·Wvx     the gists gather what the entries hold,
//!   U  = softmax(X·Wqx (G'·Wkg)ᵀ/√D)·G'·Wvg   the entries read it off,
//!
//! and u = tanh(linear(x)) behind the last one. Cost grows with W, not with W².
//!
//! The documents leave open what follows, decided here:
//! - Entries come in as linear([entry, level, span, distance]), the features in 0 to 1: level/(levels − 1), span/K² (the
//!   documents' highest level) up to 1, and the distance to the cursor in lengths of the context. Gists come in by a linear
//!   layer of their own. Both have a bias; the six products of a stack have none.
//! - G' and U are added to G and X, and what the products read is rms-normed without gain, as in the other form. G' in the
//!   second line is the sum. So a network of several stacks is not one bottleneck after another.
//! - L splits into heads as usual, D = L/H; with one head 1/√D is the documents' 1/√512. There is no product behind the
//!   heads: the formulas have none.
//! - No rotary positions: distance is a feature, and there are no angles between entries and tail gists.
//! - Tail gists are the newest gist of level 2 and the newest five of level 1, fewer in a young history ([`tail_gists`]). A
//!   row without any is scored by its entries alone.
//!
//! Shapes: B rows, W entries, G tail gists, E base width, L = H·D lens width. Errors: operands that do not agree, by key.
//! Left out on purpose: a path without a graph; masks between entries (nothing here is causal).

use candle_core::{D, DType, Device, Tensor};
use megacontext_base::context::{GistTree, Node};
use megacontext_base::error::{BaseError, Result};
use megacontext_base::params::{Group, ParamStore};
use megacontext_base::tower::{Affine, EPS, insert_uniform};
use megacontext_kernels::linear::linear;
use megacontext_kernels::norm::rms_norm;

use crate::config::{LEVELS, LensNetConfig, NETWORK};
use crate::features;
use crate::network::Contexts;

/// Gists of level 1 among the tail gists.
pub const TAIL_BLOCKS: usize = 5;
/// Level of the tail gist that stands for most.
const ROOT: u8 = 2;
/// Level, span, distance.
const FEATURES: usize = 3;
/// The score of what is masked: finite, so that a row that sees nothing is no NaN.
const MASKED: f32 = -1e30;

/// What a stack multiplies by, as the formulas name it.
const PRODUCTS: [&str; 6] = ["w_qg", "w_kx", "w_vx", "w_qx", "w_kg", "w_vg"];

/// Gists of the recent past that the dual form reads beside the entries.
#[derive(Clone, Copy, Debug)]
pub struct Tail<'a> {
    /// [B, G, E].
    pub gists_bge: &'a Tensor,
    /// Gists of each row, 0 to G; none means G.
    pub lengths: Option<&'a [usize]>,
}

/// The tail gists of a history, [G, E] row-major: the newest gist of level 2, then the newest five of level 1, the oldest of
/// them first. Fewer where there are not so many yet.
pub fn tail_gists(tree: &GistTree) -> Vec<f32> {
    let newest = |lod: u8, most: u64| {
        let nodes = tree.nodes(lod);
        (nodes.saturating_sub(most)..nodes).map(move |index| Node { lod, index })
    };
    let nodes = newest(ROOT, 1).chain(newest(1, TAIL_BLOCKS as u64));
    nodes.filter_map(|node| tree.gist(node)).flatten().copied().collect()
}

/// Layers that read entries and gists.
fn readers(config: &LensNetConfig) -> [Affine; 2] {
    let (out, e) = (config.lens_width, config.width);
    [Affine { name: "entries_in", out, inp: e + FEATURES }, Affine { name: "gists_in", out, inp: e }]
}

fn weight(stack: usize, part: &str) -> String {
    format!("stacks.{stack}.{part}.weight")
}

/// Names and shapes of everything before the head.
pub(crate) fn tensors(config: &LensNetConfig) -> Vec<(String, Vec<usize>)> {
    let wide = config.lens_width;
    let stacks =
        (0..config.layers).flat_map(|stack| PRODUCTS.map(|part| (weight(stack, part), vec![wide, wide])));
    readers(config).into_iter().flat_map(|layer| layer.tensors()).chain(stacks).collect()
}

/// Fresh parameters of everything before the head.
pub(crate) fn insert_parameters(config: &LensNetConfig, params: &mut ParamStore, seed: u64) -> Result<()> {
    for layer in readers(config) {
        layer.insert_parameters(params, Group::Lensnet, seed)?;
    }
    for (name, shape) in tensors(config).into_iter().filter(|(name, _)| name.starts_with("stacks.")) {
        insert_uniform(params, Group::Lensnet, &name, &shape, shape[1], seed)?;
    }
    Ok(())
}

/// The tail gists of B rows, which fit them.
pub(crate) fn tail_of<'a>(config: &LensNetConfig, of: &Contexts<'a>, b: usize) -> Result<Tail<'a>> {
    let refuse = |message: String| Err(BaseError::network(NETWORK, message));
    let e = config.width;
    let Some(tail) = of.tail else {
        return refuse("tail: expected the tail gists that the dual form reads, got none".into());
    };
    let most = match tail.gists_bge.dims() {
        &[rows, most, width] if rows == b && width == e && most > 0 => most,
        other => return refuse(format!("tail: expected [{b}, G, {e}], G at least 1, got {other:?}")),
    };
    match tail.lengths {
        Some(lengths) if lengths.len() != b || lengths.iter().any(|length| *length > most) => refuse(
            format!("tail lengths: expected {b}, one of 0 to {most} gists for each row, got {lengths:?}"),
        ),
        _ => Ok(tail),
    }
}

/// The entries behind the last stack, [B·W, L]; operands have been checked.
pub(crate) fn forward(
    config: &LensNetConfig,
    params: &ParamStore,
    of: &Contexts,
    tail: Tail,
    lengths: &[usize],
) -> Result<Tensor> {
    let (b, w, _) = of.entries_bwe.dims3()?;
    let whole = vec![tail.gists_bge.dim(1)?; b];
    let entries = Side::new(of.entries_bwe, lengths)?;
    let gists = Side::new(tail.gists_bge, tail.lengths.unwrap_or(&whole))?;
    let [entries_in, gists_in] = readers(config);
    let features_bwf = Tensor::from_vec(normalised(config, of, lengths), (b, w, FEATURES), &Device::Cpu)?;
    let read = Tensor::cat(&[&entries.values(of.entries_bwe)?, &features_bwf], 2)?;
    let mut x_bwl = entries_in.apply(params, &read)?;
    let mut g_bgl = gists_in.apply(params, &gists.values(tail.gists_bge)?)?;
    let heads = Heads::new(config)?;
    for stack in 0..config.layers {
        let product = |part: &str, of: &Tensor| -> Result<Tensor> {
            Ok(linear(of, &params.taped(&weight(stack, part))?, None)?)
        };
        let (n_x, n_g) = (heads.norm(&x_bwl)?, heads.norm(&g_bgl)?);
        let [q, k, v] = [product("w_qg", &n_g)?, product("w_kx", &n_x)?, product("w_vx", &n_x)?];
        g_bgl = (g_bgl + heads.attend([&q, &k, &v], &entries)?)?;
        let n_g = heads.norm(&g_bgl)?;
        let [q, k, v] = [product("w_qx", &n_x)?, product("w_kg", &n_g)?, product("w_vg", &n_g)?];
        x_bwl = (x_bwl + heads.attend([&q, &k, &v], &gists)?)?;
    }
    Ok(x_bwl.reshape((b * w, config.lens_width))?)
}

/// Level, span and distance of every entry, each in 0 to 1, [B·W, 3].
fn normalised(config: &LensNetConfig, of: &Contexts, lengths: &[usize]) -> Vec<f32> {
    let [_, distance] = features::measured(config, of, lengths);
    let highest = features::span(config.block, ROOT);
    let of_entry = |(lod, distance): (&u8, f32)| {
        let span = (features::span(config.block, *lod) / highest).min(1.0);
        [f32::from(*lod) / (LEVELS - 1) as f32, span as f32, distance]
    };
    of.lod.iter().zip(distance).flat_map(of_entry).collect()
}

/// Which of N places of each row there are.
struct Side {
    /// [B, N], 1 where there is something.
    valid_bn: Tensor,
    all: bool,
}

impl Side {
    fn new(of_bne: &Tensor, lengths: &[usize]) -> Result<Self> {
        let (b, n, _) = of_bne.dims3()?;
        let valid: Vec<u8> = (0..b * n).map(|at| u8::from(at % n < lengths[at / n])).collect();
        let all = lengths.iter().all(|length| *length == n);
        Ok(Self { valid_bn: Tensor::from_vec(valid, (b, n), &Device::Cpu)?, all })
    }

    /// The values, zero where there is nothing: whatever lies there takes no part, NaN neither.
    fn values(&self, of_bne: &Tensor) -> Result<Tensor> {
        if self.all {
            return Ok(of_bne.clone());
        }
        let valid = self.valid_bn.unsqueeze(2)?.broadcast_as(of_bne.shape())?.contiguous()?;
        Ok(valid.where_cond(of_bne, &of_bne.zeros_like()?)?)
    }
}

/// How L is split.
struct Heads {
    heads: usize,
    width: usize,
    ones_l: Tensor,
}

impl Heads {
    fn new(config: &LensNetConfig) -> Result<Self> {
        let wide = config.lens_width;
        let ones_l = Tensor::ones(wide, DType::F32, &Device::Cpu)?;
        Ok(Self { heads: config.heads, width: wide / config.heads, ones_l })
    }

    fn norm(&self, x: &Tensor) -> Result<Tensor> {
        Ok(rms_norm(x, &self.ones_l, EPS)?)
    }

    /// softmax(q·kᵀ/√D)·v over the keys that there are, [B, queries, L]; zeros where there are none.
    fn attend(&self, [q, k, v]: [&Tensor; 3], keys: &Side) -> Result<Tensor> {
        let (b, queries, wide) = q.dims3()?;
        let n = k.dim(1)?;
        let split = |x: &Tensor| -> Result<Tensor> {
            let each = x.reshape((b, x.dim(1)?, self.heads, self.width))?;
            Ok(each.transpose(1, 2)?.contiguous()?)
        };
        let (q, k, v) = (split(q)?, split(k)?, split(v)?);
        let scores = (q.matmul(&k.t()?)? * (1.0 / (self.width as f64).sqrt()))?;
        let valid = keys.valid_bn.reshape((b, 1, 1, n))?.broadcast_as(scores.shape())?.contiguous()?;
        let scores = valid.where_cond(&scores, &Tensor::full(MASKED, scores.shape(), &Device::Cpu)?)?;
        // A softmax does not change when all its scores move, so the largest needs no gradient.
        let moved = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let seen = (moved * valid.to_dtype(DType::F32)?)?;
        let total = (seen.sum_keepdim(D::Minus1)? + f64::from(f32::MIN_POSITIVE))?;
        let mixed_bhqd = seen.broadcast_div(&total)?.matmul(&v)?;
        Ok(mixed_bhqd.transpose(1, 2)?.contiguous()?.reshape((b, queries, wide))?)
    }
}
