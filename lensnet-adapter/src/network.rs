//! The network: entries of working contexts in, scores out.
//!
//! Source: MegaContext's LensNet (its Python code). Entries [B, W, E] pass a [`Tower`], turned by the (damped) angles of their
//! positions; x is put beside the entry's features f (see [`crate::Features`]), and u = tanh(scorer([x, f])).
//!
//! Rows may be shorter than W: entries past a row's length are scored 0 and take no part. (The original fills rows up in
//! front with zeros, without a mask, which moves scores by up to 0.1.)
//!
//! Shapes: B working contexts, W entries, E width, D width of a head. Scores in [−1, 1].
//! Errors: `BaseError::Network` for entries that do not fit.
//! The older form, where entries look at tail gists instead of each other, is [`crate::dual`].

use candle_core::{DType, Device, Tensor};
use megacontext_base::device::Device as Place;
use megacontext_base::error::{BaseError, Result};
use megacontext_base::gradients::Gradients;
use megacontext_base::params::{Group, ParamStore};
use megacontext_base::random::Random;
use megacontext_base::rope::{Entries, Rope, RopeScaling, RopeTables, SigmaRule};
use megacontext_base::tower::{Angles, Sees, THETA, Tower, relu};
use megacontext_kernels::attention::Rows;
use megacontext_kernels::vjp;

use crate::config::{Kind, LEVEL_EMBED, LEVELS, LensNetConfig, NETWORK};
use crate::dual::{self, Tail};
use crate::{features, legality, scoring};

/// Entries of B working contexts of up to W entries, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Contexts<'a> {
    /// Embeddings and gists, [B, W, E].
    pub entries_bwe: &'a Tensor,
    /// Level of each, B·W of them, below [`LEVELS`].
    pub lod: &'a [u8],
    /// First token of each one's span, B·W of them.
    pub start: &'a [u64],
    /// Entries of each row; none means W.
    pub lengths: Option<&'a [usize]>,
    /// What the dual form reads beside the entries; the transformer does not look at it.
    pub tail: Option<Tail<'a>>,
}

/// A LensNet with its parameters.
pub struct LensNet {
    config: LensNetConfig,
    params: ParamStore,
    form: Form,
}

/// What lies before the head.
enum Form {
    Transformer(Tower),
    Dual,
}

impl Form {
    fn of(config: &LensNetConfig) -> Result<Self> {
        Ok(match config.kind {
            Kind::Transformer => Self::Transformer(Tower::new(NETWORK, config.tower())?),
            Kind::Dual => Self::Dual,
        })
    }
}

impl LensNet {
    /// A network as PyTorch would begin it: linear layers uniform in ±1/√in, embeddings of levels standard normal. The values
    /// depend on the seed and the names alone. Nothing learns yet.
    ///
    /// # Errors
    /// When there is no such network.
    pub fn new(config: LensNetConfig, seed: u64) -> Result<Self> {
        config.check()?;
        let form = Form::of(&config)?;
        let mut params = ParamStore::new();
        match &form {
            Form::Dual => dual::insert_parameters(&config, &mut params, seed)?,
            Form::Transformer(tower) => {
                tower.insert_parameters(&mut params, Group::Lensnet, seed)?;
                let mut random = Random::named(seed, LEVEL_EMBED);
                let levels = (0..LEVELS * config.width).map(|_| random.normal() as f32).collect();
                params.insert_values(LEVEL_EMBED, Group::Lensnet, levels, &[LEVELS, config.width])?;
                for layer in config.feature_layers().into_iter().flatten() {
                    layer.insert_parameters(&mut params, Group::Lensnet, seed)?;
                }
            }
        }
        for layer in config.scorer() {
            layer.insert_parameters(&mut params, Group::Lensnet, seed)?;
        }
        Ok(Self { config, params, form })
    }

    /// The network over parameters that are there, of the right names and shapes.
    pub(crate) fn over(config: LensNetConfig, params: ParamStore) -> Result<Self> {
        let form = Form::of(&config)?;
        Ok(Self { config, params, form })
    }

    /// Settings.
    pub fn config(&self) -> &LensNetConfig {
        &self.config
    }

    /// Parameters, all of group `lensnet`.
    pub fn params(&self) -> &ParamStore {
        &self.params
    }

    /// The transformer runs on this device from here on; what is behind it, all parameters and the dual form stay on the processor.
    ///
    /// # Errors
    /// When the device cannot run heads of this width; the network stays where it was then.
    pub fn set_device(&mut self, device: &Place) -> Result<()> {
        self.params.bring_home()?;
        match &mut self.form {
            Form::Transformer(tower) => tower.set_device(device),
            Form::Dual => Ok(()),
        }
    }

    /// What the transformer runs on.
    pub fn device(&self) -> Place {
        match &self.form {
            Form::Transformer(tower) => tower.device(),
            Form::Dual => Place::Cpu,
        }
    }

    /// Parameters, to let them learn or to change them.
    pub fn params_mut(&mut self) -> &mut ParamStore {
        &mut self.params
    }

    /// Angles of entries that `rule` places by their first tokens and levels, [B·W, D/2]. The dual form does not turn.
    ///
    /// # Errors
    /// When there are not as many levels as first tokens.
    pub fn angles(&self, lod: &[u8], start: &[u64], rule: &SigmaRule) -> Result<RopeTables> {
        let places = lod.iter().zip(start).map(|(lod, start)| rule.place(*start as f64, u32::from(*lod)));
        let (mu, sigma): (Vec<f64>, Vec<f64>) = places.unzip();
        if lod.len() != start.len() {
            return self.refuse(format!("start: expected {} positions, got {}", lod.len(), start.len()));
        }
        // The dual form's heads may be of any width.
        let rope = Rope::new((self.config.head_width() / 2 * 2).max(2), THETA, RopeScaling::None);
        rope.place(&Entries { mu: &mu, sigma: Some(&sigma), ..Entries::default() })
    }

    /// The scores [B, W] with their graph: differentiable in the entries and in every parameter where the group learns.
    /// Angles are those of [`LensNet::angles`] or of a host. Past a row's length scores are 0.
    ///
    /// # Errors
    /// When the operands do not agree, or a level is beyond those there are.
    pub fn forward(&self, of: &Contexts, angles: Angles) -> Result<Tensor> {
        let (b, w) = self.check(of)?;
        let whole = vec![w; b];
        let lengths = of.lengths.unwrap_or(&whole);
        let mut z = match &self.form {
            Form::Transformer(tower) => {
                let rows = Rows { lengths: of.lengths.map(<[usize]>::to_vec), segments: None };
                let sees = Sees::Pattern(self.config.pattern(), &rows);
                let x_bwe = tower.forward(&self.params, of.entries_bwe, angles, sees)?;
                let features_ne = features::apply(&self.config, &self.params, of, lengths)?;
                Tensor::cat(&[&x_bwe.reshape((b * w, self.config.width))?, &features_ne], 1)?
            }
            Form::Dual => {
                let tail = dual::tail_of(&self.config, of, b)?;
                dual::forward(&self.config, &self.params, of, tail, lengths)?
            }
        };
        for (i, layer) in self.config.scorer().into_iter().enumerate() {
            z = layer.apply(&self.params, &if i == 0 { z } else { relu(&z)? })?;
        }
        let scores_bw = z.reshape((b, w))?.tanh()?;
        if lengths.iter().all(|length| *length == w) {
            return Ok(scores_bw);
        }
        let valid: Vec<u8> = (0..b * w).map(|at| u8::from(at % w < lengths[at / w])).collect();
        let valid_bw = Tensor::from_vec(valid, (b, w), &Device::Cpu)?;
        Ok(valid_bw.where_cond(&scores_bw, &Tensor::zeros((b, w), DType::F32, &Device::Cpu)?)?)
    }

    /// Walks back from scores of [`LensNet::forward`] whose gradient is `d_scores_bw`; adds the gradient of every parameter.
    ///
    /// # Errors
    /// When the gradient is not of the scores' shape, or the network is frozen; then nothing has been added.
    pub fn backward(&self, scores_bw: &Tensor, d_scores_bw: Tensor, gradients: &mut Gradients) -> Result<()> {
        if !self.params.learns(Group::Lensnet) {
            return self.refuse("backward: expected a network that learns, got a frozen one".to_string());
        }
        gradients.add_backward(&vjp::seed(scores_bw, d_scores_bw)?, &self.params)
    }

    /// The scores of one working context as an allocator reads them: what cannot be done scores 0 at most
    /// ([`legality::mask`]), levels go up to `max_lod`. Those of [`LensNet::forward`], but for rounding, on plain buffers.
    ///
    /// # Errors
    /// As [`LensNet::forward`]; when a score is not finite.
    pub fn focus_scores(&self, of: &Contexts, angles: Angles, max_lod: u8) -> Result<Vec<f32>> {
        let (b, w) = self.check(of)?;
        let whole = vec![w; b];
        let lengths = of.lengths.unwrap_or(&whole);
        let mut scores = match &self.form {
            Form::Transformer(tower) => {
                scoring::scores(&self.config, &self.params, tower, of, lengths, angles)?
            }
            Form::Dual => self.forward(of, angles)?.flatten_all()?.to_vec1()?,
        };
        if let Some(at) = scores.iter().position(|score| !score.is_finite()) {
            let what = format!("focus score of entry {at}");
            return Err(BaseError::NonFinite { what, value: f64::from(scores[at]) });
        }
        legality::mask(&mut scores, of.lod, max_lod);
        Ok(scores)
    }

    /// B and W of operands that agree.
    fn check(&self, of: &Contexts) -> Result<(usize, usize)> {
        let e = self.config.width;
        let (b, w) = match of.entries_bwe.dims() {
            &[b, w, width] if width == e && b > 0 && w > 0 => (b, w),
            other => {
                return self
                    .refuse(format!("entries: expected [B, W, {e}], B and W at least 1, got {other:?}"));
            }
        };
        for (what, found) in [("lod", of.lod.len()), ("start", of.start.len())] {
            if found != b * w {
                return self
                    .refuse(format!("{what}: expected {} values, {b} rows of {w}, got {found}", b * w));
            }
        }
        if let Some(lod) = of.lod.iter().find(|lod| usize::from(**lod) >= LEVELS) {
            return self.refuse(format!("lod: expected a level below {LEVELS}, got {lod}"));
        }
        match of.lengths {
            Some(lengths) if lengths.len() != b => {
                self.refuse(format!("lengths: expected {b}, one for each row, got {}", lengths.len()))
            }
            Some(lengths) if lengths.iter().any(|length| !(1..=w).contains(length)) => {
                self.refuse(format!("lengths: expected 1 to {w} entries in every row, got {lengths:?}"))
            }
            _ => Ok((b, w)),
        }
    }

    fn refuse<T>(&self, message: String) -> Result<T> {
        Err(BaseError::network(NETWORK, message))
    }
}
