//! The network: children of blocks in, gists out; and the way back.
//!
//! Source: MegaContext's GistNet (its Python code). Children [N, K, E] pass a [`Tower`] with rotary positions 0 … K−1 of their
//! own in every block (0 … K with a token prepended), then a head. Every block is on its own, and one network serves all
//! levels: children are embeddings of tokens or gists of the level below.
//!
//! Parameters learn by candle's tape: [`GistNet::forward`] gives gists with their graph, the loss over the base model gives
//! the gradient of the gists, and [`GistNet::backward`] walks from there into the parameters. They are all of one group,
//! so they learn after `params_mut().set_learning([Group::Gistnet])` and are frozen before.
//!
//! Shapes: N blocks, K entries of a block, T entries within the network (K, or K + 1), E width.
//! Errors: `BaseError::Network` for children and masks that do not fit.
//! Left out on purpose: dropout within the network (the original has none either).

use candle_core::{Device, Tensor};
use megacontext_base::device::Device as Place;
use megacontext_base::error::{BaseError, Result};
use megacontext_base::gradients::Gradients;
use megacontext_base::params::{Group, ParamStore};
use megacontext_base::rope::{Rope, RopeScaling, RopeTables};
use megacontext_base::tower::{Angles, Sees, THETA, Tower};
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::vjp;

use crate::config::{GistNetConfig, Mode, NETWORK, Padding};
use crate::head;
use crate::valid::{self, Compact};

pub(crate) const CLS_TOKEN: &str = "cls_token";
/// What the original adds to the scores of padded keys.
const PADDED: f32 = -1e4;

/// A GistNet with its parameters.
pub struct GistNet {
    config: GistNetConfig,
    params: ParamStore,
    /// The transformer and the angles of its places, where there is one.
    tower: Option<(Tower, RopeTables)>,
    gist_version: u16,
}

/// What enters the transformer.
struct Entered {
    x_nte: Tensor,
    /// None without a transformer.
    angles: Option<RopeTables>,
    rows: Rows,
    /// Entries that are pooled, where not all are.
    counted: Option<Tensor>,
    /// Bias of scores, where padding is masked by one.
    bias_ntt: Option<Tensor>,
}

impl GistNet {
    /// A network as PyTorch would begin it: linear layers uniform in ±1/√in, the query standard normal, the prepended token
    /// zero. The values depend on the seed and the names alone. Nothing learns yet.
    ///
    /// # Errors
    /// When there is no such network.
    pub fn new(config: GistNetConfig, seed: u64) -> Result<Self> {
        config.check()?;
        let mut params = ParamStore::new();
        if config.mode == Mode::Transformer {
            Tower::new(NETWORK, config.tower())?.insert_parameters(&mut params, Group::Gistnet, seed)?;
        }
        if config.prepends() {
            let e = config.width;
            params.insert_values(CLS_TOKEN, Group::Gistnet, vec![0f32; e], &[1, 1, e])?;
        }
        head::insert_parameters(&config, &mut params, seed)?;
        Self::over(config, params)
    }

    /// The network over parameters that are there, of the right names and shapes.
    pub(crate) fn over(config: GistNetConfig, params: ParamStore) -> Result<Self> {
        let tower = match config.mode {
            Mode::Mean => None,
            Mode::Transformer => {
                let sizes = config.tower();
                let places = rope(&config).sequence(config.entries())?;
                Some((Tower::new(NETWORK, sizes)?, places))
            }
        };
        Ok(Self { config, params, tower, gist_version: 0 })
    }

    /// Settings.
    pub fn config(&self) -> &GistNetConfig {
        &self.config
    }

    /// Parameters, all of group `gistnet`.
    pub fn params(&self) -> &ParamStore {
        &self.params
    }

    /// The transformer runs on this device from here on, the head and all parameters stay on the processor.
    ///
    /// # Errors
    /// When the device cannot run heads of this width; the network stays where it was then.
    pub fn set_device(&mut self, device: &Place) -> Result<()> {
        self.params.bring_home()?;
        self.tower.as_mut().map_or(Ok(()), |(tower, _)| tower.set_device(device))
    }

    /// What the transformer runs on.
    pub fn device(&self) -> Place {
        self.tower.as_ref().map_or(Place::Cpu, |(tower, _)| tower.device())
    }

    /// Parameters, to let them learn or to change them.
    pub fn params_mut(&mut self) -> &mut ParamStore {
        &mut self.params
    }

    /// Which gists these are: it rises whenever a phase has changed the network, and gists of a lesser one are stale.
    pub fn gist_version(&self) -> u16 {
        self.gist_version
    }

    /// States the version.
    pub fn set_gist_version(&mut self, version: u16) {
        self.gist_version = version;
    }

    /// The gists [N, E] of blocks of `children_nke`, with their graph: differentiable in the children and in every parameter
    /// where the group learns. `valid` [N, K] flags entries that are no padding; none means all.
    ///
    /// # Errors
    /// When the children are not [N, K, E] f32, or the mask does not fit.
    pub fn forward(&self, children_nke: &Tensor, valid: Option<&[bool]>) -> Result<Tensor> {
        let Entered { x_nte, angles, rows, counted, bias_ntt } = self.enter(children_nke, valid)?;
        let x_nte = match self.tower.as_ref().zip(angles.as_ref()) {
            None => x_nte,
            Some(((tower, _), angles)) => {
                let sees = match &bias_ntt {
                    None => Sees::Pattern(self.pattern(), &rows),
                    Some(bias) => Sees::Bias(bias),
                };
                tower.forward(&self.params, &x_nte, tables(angles), sees)?
            }
        };
        head::apply(&self.config, &self.params, &x_nte, counted.as_ref())
    }

    /// Gists of `levels` levels over `entries_nse` [N, K^levels, E], lowest level first: [N, K^(levels−1), E] … [N, 1, E].
    /// Every level is made from the one below, with one graph through all of them.
    ///
    /// # Errors
    /// When there are no levels, or not so many entries.
    pub fn hierarchy(&self, entries_nse: &Tensor, levels: u32) -> Result<Vec<Tensor>> {
        let (n, s, e) = entries_nse.dims3()?;
        let k = self.config.block;
        let span = k.checked_pow(levels).filter(|span| levels > 0 && *span == s).ok_or_else(|| {
            let message = format!(
                "hierarchy: expected at least 1 level and {k}^levels entries, got {levels} levels and {s} entries"
            );
            BaseError::network(NETWORK, message)
        })?;
        let mut gists = Vec::new();
        let (mut below, mut count) = (entries_nse.clone(), span);
        while count > 1 {
            count /= k;
            below = self.forward(&below.reshape((n * count, k, e))?, None)?.reshape((n, count, e))?;
            gists.push(below.clone());
        }
        Ok(gists)
    }

    /// Walks back from gists of [`GistNet::forward`] (or of [`GistNet::hierarchy`]) whose gradient is `d_gists`, and from the
    /// terms of the loss on gists alone, a scalar on the tape, where there are such; adds the gradient of every parameter.
    ///
    /// # Errors
    /// When the gradient is not of the gists' shape, or the network is frozen; then nothing has been added.
    pub fn backward(
        &self,
        gists: &Tensor,
        d_gists: Tensor,
        on_gists: Option<&Tensor>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        if !self.params.learns(Group::Gistnet) {
            let message = "backward: expected a network that learns, got a frozen one";
            return Err(BaseError::network(NETWORK, message));
        }
        let seeded = vjp::seed(gists, d_gists)?;
        let loss = match on_gists {
            None => seeded,
            Some(term) => (seeded + term)?,
        };
        gradients.add_backward(&loss, &self.params)
    }

    /// The gists [N, E] of `blocks` blocks, given their `children` [N, K, E], row-major; nothing is kept for a way back where
    /// the network is frozen.
    ///
    /// The gist of a block depends on its children alone, to the bit, however blocks are gathered into calls; on a GPU up to the
    /// order of sums, which its library chooses by the size of a call.
    ///
    /// # Errors
    /// When sizes do not agree, or a gist is not finite.
    pub fn gists(&self, children: &[f32], blocks: usize) -> Result<Vec<f32>> {
        let (k, e) = (self.config.block, self.config.width);
        if children.len() != blocks * k * e {
            let message = format!(
                "children: expected {} values, {blocks} blocks of {k} entries of {e}, got {}",
                blocks * k * e,
                children.len()
            );
            return Err(BaseError::network(NETWORK, message));
        }
        let [least, many] = self.config.blocks_at_once();
        let mut gists = Vec::with_capacity(blocks * e);
        for chunk in children.chunks((many * k * e).max(1)) {
            let count = chunk.len() / (k * e);
            let mut padded = chunk.to_vec();
            padded.resize(count.max(least) * k * e, 0.0);
            let children_nke = Tensor::from_vec(padded, (count.max(least), k, e), &Device::Cpu)?;
            let made: Vec<f32> = self.forward(&children_nke, None)?.flatten_all()?.to_vec1()?;
            gists.extend_from_slice(&made[..count * e]);
        }
        match gists.iter().position(|value| !value.is_finite()) {
            None => Ok(gists),
            Some(at) => {
                let what = format!("gist of block {} (value {} of {e})", at / e, at % e);
                Err(BaseError::NonFinite { what, value: f64::from(gists[at]) })
            }
        }
    }

    /// Mean entropy, in bits, of what the entries of a block attend to, for every layer: 0 to log2 of the entries seen. None
    /// without a transformer. Brute force, for a look at a few blocks.
    ///
    /// # Errors
    /// As [`GistNet::forward`]; when padding is masked by a bias.
    pub fn attention_entropy(&self, children_nke: &Tensor, valid: Option<&[bool]>) -> Result<Vec<f64>> {
        let entered = self.enter(children_nke, valid)?;
        if entered.bias_ntt.is_some() {
            let message = "attention_entropy: expected padding that is excluded, got zeroed";
            return Err(BaseError::network(NETWORK, message));
        }
        let Some(((tower, _), angles)) = self.tower.as_ref().zip(entered.angles.as_ref()) else {
            return Ok(Vec::new());
        };
        let Entered { x_nte, rows, .. } = &entered;
        tower.attention_entropy(&self.params, x_nte, tables(angles), self.pattern(), rows)
    }

    fn pattern(&self) -> Pattern {
        if self.config.causal { Pattern::Dense } else { Pattern::Bidirectional }
    }

    /// Checks the operands and sets up what the transformer and the head read.
    fn enter(&self, children_nke: &Tensor, valid: Option<&[bool]>) -> Result<Entered> {
        let (k, e) = (self.config.block, self.config.width);
        let n = match children_nke.dims() {
            &[n, entries, width] if (entries, width) == (k, e) && n > 0 => n,
            other => {
                let message = format!("children: expected [N, {k}, {e}] with N of at least 1, got {other:?}");
                return Err(BaseError::network(NETWORK, message));
            }
        };
        let plain = |x_nte: Tensor| Entered {
            x_nte,
            angles: self.tower.as_ref().map(|(_, places)| places.clone()),
            rows: Rows::default(),
            counted: None,
            bias_ntt: None,
        };
        let Some(valid) = valid else {
            return Ok(plain(self.prepend(children_nke.clone())?));
        };
        valid::check(valid, n, k)?;
        match self.config.padding {
            Padding::Excluded => self.excluded(children_nke, &Compact::new(valid, k)),
            Padding::Zeroed => {
                let flags_nk = valid::flags(valid, k)?;
                let zeroed = children_nke.broadcast_mul(&flags_nk.unsqueeze(2)?)?;
                let bias_ntt = Some(self.bias(valid, n)?);
                Ok(Entered { bias_ntt, ..plain(self.prepend(zeroed)?) })
            }
        }
    }

    /// Rows of padding leave: valid entries stand in front, at the angles of the places they had.
    fn excluded(&self, children_nke: &Tensor, compact: &Compact) -> Result<Entered> {
        let before = usize::from(self.config.prepends());
        let x_nte = self.prepend(compact.gather(children_nke)?)?;
        let lengths = compact.lengths.iter().map(|length| length + before).collect();
        let places: Vec<f64> = compact
            .places
            .chunks_exact(self.config.block)
            .flat_map(|block| (0..before).chain(block.iter().map(move |place| place + before)))
            .map(|place| place as f64)
            .collect();
        let angles = match self.config.mode {
            Mode::Mean => None,
            Mode::Transformer => Some(rope(&self.config).at(&places, None)?),
        };
        let rows = Rows { lengths: Some(lengths), segments: None };
        // With a token prepended its place is read, and nothing is pooled.
        let counted = if before == 1 { None } else { Some(compact.flags()?) };
        Ok(Entered { x_nte, angles, rows, counted, bias_ntt: None })
    }

    /// The token of the network's own before the entries of each block, where there is one.
    fn prepend(&self, x_nke: Tensor) -> Result<Tensor> {
        if !self.config.prepends() {
            return Ok(x_nke);
        }
        let (n, _, e) = x_nke.dims3()?;
        let cls_n1e = self.params.taped(CLS_TOKEN)?.broadcast_as((n, 1, e))?;
        Ok(Tensor::cat(&[&cls_n1e, &x_nke], 1)?)
    }

    /// The original's mask as biases of scores [N, T, T]: of padded keys, and of later ones where attention is causal.
    fn bias(&self, valid: &[bool], n: usize) -> Result<Tensor> {
        let (k, t) = (self.config.block, self.config.entries());
        let before = t - k;
        let mut bias = Vec::with_capacity(n * t * t);
        for block in valid.chunks_exact(k) {
            for (i, j) in (0..t).flat_map(|i| (0..t).map(move |j| (i, j))) {
                let padded = j >= before && !block[j - before];
                bias.push(match (self.config.causal && j > i, padded) {
                    (true, _) => f32::NEG_INFINITY,
                    (false, true) => PADDED,
                    (false, false) => 0.0,
                });
            }
        }
        Ok(Tensor::from_vec(bias, (n, t, t), &Device::Cpu)?)
    }
}

fn tables(angles: &RopeTables) -> Angles<'_> {
    Angles { cos: &angles.cos_nd, sin: &angles.sin_nd }
}

fn rope(config: &GistNetConfig) -> Rope {
    Rope::new(config.tower().head_width(), THETA, RopeScaling::None)
}
