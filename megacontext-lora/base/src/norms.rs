//! One norm of a model in a pass: its parameters, and where their gradients go.
//!
//! The formulas are [`megacontext_kernels::norm`]'s; the kinds are [`NormKind`]'s. A gain stored as its distance from 1 is
//! one plus it here, and has its gradient; a norm without gain scales by 1.
//!
//! Shapes: rows of E (or D) values; x stored as S (f32 or bf16), gradients f32.
//! Errors: a parameter that is missing or stored in bf16.

use megacontext_kernels::norm;

use crate::architecture::NormKind;
use crate::buffers::Activation;
use crate::error::Result;
use crate::gradients::Gradients;
use crate::params::{Group, Held, ParamStore};

/// A norm, its parameters looked up.
pub(crate) struct Norm<'a> {
    kind: NormKind,
    eps: f32,
    learns: bool,
    gain: Option<(String, Held<'a>)>,
    bias: Option<(String, Held<'a>)>,
    /// What rows are scaled by, where it is not the parameter itself.
    scale: Option<Vec<f32>>,
}

impl<'a> Norm<'a> {
    /// The norm of rows of `width` values whose parameters are those of `module`.
    pub(crate) fn new(
        kind: NormKind,
        module: &str,
        width: usize,
        eps: f64,
        params: &'a ParamStore,
    ) -> Result<Self> {
        let held = |suffix: &str, there: bool| -> Result<Option<(String, Held<'a>)>> {
            let name = format!("{module}.{suffix}");
            Ok(if there { Some((name.clone(), params.values(&name)?)) } else { None })
        };
        let gain = held("weight", kind.has_gain())?;
        let scale = match (&gain, kind) {
            (Some((_, gain)), NormKind::RmsOffset) => Some(gain.f32()?.iter().map(|g| 1.0 + g).collect()),
            (Some(_), _) => None,
            (None, _) => Some(vec![1.0; width]),
        };
        let bias = held("bias", kind.has_bias())?;
        Ok(Self { kind, eps: eps as f32, learns: params.learns(Group::Norms), gain, bias, scale })
    }

    /// x/rms(x) over rows of `width` values.
    pub(crate) fn plain(width: usize, eps: f64) -> Self {
        let scale = Some(vec![1.0; width]);
        Self { kind: NormKind::RmsPlain, eps: eps as f32, learns: false, gain: None, bias: None, scale }
    }

    fn scale(&self) -> Result<&[f32]> {
        match (&self.scale, &self.gain) {
            (Some(scale), _) => Ok(scale),
            (None, Some((_, gain))) => gain.f32(),
            (None, None) => Ok(&[]),
        }
    }

    /// The norm of `x` into `out`.
    pub(crate) fn forward<S: Activation>(&self, x: &[S], out: &mut [S]) -> Result<()> {
        let scale = self.scale()?;
        match self.kind {
            NormKind::Layer => {
                let bias = self.bias.as_ref().map(|(_, bias)| bias.f32()).transpose()?;
                norm::layer_forward_into(x, scale, bias, self.eps, out);
            }
            _ => norm::rms_forward_into(x, scale, self.eps, out),
        }
        Ok(())
    }

    /// For the gradient `g` of the norm of `x`: adds that of `x` to `dx`, and those of the parameters, where they learn, to
    /// `gradients`.
    pub(crate) fn backward<S: Activation>(
        &self,
        x: &[S],
        g: &[f32],
        dx: &mut [f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let scale = self.scale()?;
        let mut take = |held: &Option<(String, Held)>| {
            let held = held.as_ref().filter(|_| self.learns);
            held.map(|(name, _)| (name.clone(), gradients.take(name, scale.len())))
        };
        let (mut gain, mut bias) = (take(&self.gain), take(&self.bias));
        let dw = gain.as_mut().map(|(_, buffer)| &mut buffer[..]);
        match self.kind {
            NormKind::Layer => {
                let db = bias.as_mut().map(|(_, buffer)| &mut buffer[..]);
                norm::layer_backward_add(x, scale, g, self.eps, dx, dw, db);
            }
            _ => norm::rms_backward_add(x, scale, g, self.eps, dx, dw),
        }
        for (name, buffer) in [gain, bias].into_iter().flatten() {
            gradients.put(name, buffer);
        }
        Ok(())
    }
}
