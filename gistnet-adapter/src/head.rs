//! Heads of GistNet: pooling over the entries of a block, and what is done to the pooled vector.
//!
//! Source: MegaContext's heads (its Python code). Pooling of x [N, T, E] over the valid entries of each block:
//!   mean:  z = mean_t x;   query:  a = softmax_t(x·q) (unscaled), z = Σ_t a·x;   cls:  z = x at place 0.
//! Then linear, W·z + b, or MLP, W2·relu(W1·z + b1) + b2 with 2E between. The names of the parameters differ by pooling,
//! as they do there.
//!
//! Shapes: N blocks, T entries within the network, E width. Errors: the kernels' own.

use candle_core::{D, Tensor};
use megacontext_base::error::Result;
use megacontext_base::params::{Group, ParamStore};
use megacontext_base::random::Random;
use megacontext_base::tower::{Affine, relu};

use crate::config::{GistNetConfig, Head, Mode, Pooling};

const QUERY: &str = "head.query";
/// What is added to the score of an entry that is not valid: after softmax nothing is left of it, to the bit.
const NEVER: f32 = -1e30;

/// Which entries of each block are pooled: 1 where an entry counts, else 0, [N, T].
pub(crate) type Counted = Tensor;

/// The layers behind pooling.
fn layers(config: &GistNetConfig) -> Vec<Affine> {
    let e = config.width;
    let affine = |name, out, inp| Affine { name, out, inp };
    match (config.head, config.pooling) {
        (Head::Linear, _) => vec![affine("head.proj", e, e)],
        (Head::Mlp, Pooling::Mean) => vec![affine("head.mlp.0", 2 * e, e), affine("head.mlp.2", e, 2 * e)],
        (Head::Mlp, _) => vec![affine("head.proj.0", 2 * e, e), affine("head.proj.2", e, 2 * e)],
    }
}

fn has_query(config: &GistNetConfig) -> bool {
    config.mode == Mode::Transformer && config.pooling == Pooling::Query
}

/// Names and shapes of the parameters.
pub(crate) fn tensors(config: &GistNetConfig) -> Vec<(String, Vec<usize>)> {
    let query = has_query(config).then(|| (QUERY.to_string(), vec![config.width]));
    let layers = layers(config).into_iter().flat_map(|layer| layer.tensors());
    query.into_iter().chain(layers).collect()
}

/// Adds fresh parameters: the query standard normal, layers as PyTorch begins them.
pub(crate) fn insert_parameters(config: &GistNetConfig, params: &mut ParamStore, seed: u64) -> Result<()> {
    if has_query(config) {
        let mut random = Random::named(seed, QUERY);
        let values = (0..config.width).map(|_| random.normal() as f32).collect();
        params.insert_values(QUERY, Group::Gistnet, values, &[config.width])?;
    }
    layers(config).iter().try_for_each(|layer| layer.insert_parameters(params, Group::Gistnet, seed))
}

/// Gists [N, E] of what stands behind the transformer, or of the entries themselves, `x_nte`.
pub(crate) fn apply(
    config: &GistNetConfig,
    params: &ParamStore,
    x_nte: &Tensor,
    counted: Option<&Counted>,
) -> Result<Tensor> {
    let mut z_ne = pool(config.pooling, params, x_nte, counted)?;
    for (i, layer) in layers(config).into_iter().enumerate() {
        let z = if i == 0 { z_ne } else { relu(&z_ne)? };
        z_ne = layer.apply(params, &z)?;
    }
    Ok(z_ne)
}

fn pool(pooling: Pooling, params: &ParamStore, x_nte: &Tensor, counted: Option<&Counted>) -> Result<Tensor> {
    match (pooling, counted) {
        (Pooling::Cls, _) => Ok(x_nte.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?),
        (Pooling::Mean, None) => Ok(x_nte.mean(1)?),
        (Pooling::Mean, Some(counted_nt)) => {
            let share_nt = counted_nt.broadcast_div(&counted_nt.sum_keepdim(1)?)?;
            weighted(x_nte, &share_nt)
        }
        (Pooling::Query, counted) => {
            let scores_nt = x_nte.broadcast_mul(&params.taped(QUERY)?)?.sum(D::Minus1)?;
            let scores_nt = match counted {
                None => scores_nt,
                Some(counted_nt) => (scores_nt + counted_nt.affine(-f64::from(NEVER), f64::from(NEVER))?)?,
            };
            // A softmax does not change when all its scores move, so the largest needs no gradient.
            let moved = scores_nt.broadcast_sub(&scores_nt.max_keepdim(1)?.detach())?.exp()?;
            weighted(x_nte, &moved.broadcast_div(&moved.sum_keepdim(1)?)?)
        }
    }
}

/// Σ_t share · x, [N, E].
fn weighted(x_nte: &Tensor, share_nt: &Tensor) -> Result<Tensor> {
    Ok(x_nte.broadcast_mul(&share_nt.unsqueeze(2)?)?.sum(1)?)
}
