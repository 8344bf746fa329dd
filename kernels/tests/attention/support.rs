//! Shared by the attention tests: seeded values, the kernels and the f64 reference side by side.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use megacontext_kernels::attention::reference::{self, Problem, Sizes};
use megacontext_kernels::attention::slices::{Gradients, Mixed, Prepared};
use megacontext_kernels::attention::{Options, Pattern, Rows, attention_with};
use megacontext_kernels::gemm::Products;
use megacontext_kernels::store::Store;

pub const BOTH: [Products; 2] = [Products::F32, Products::Bf16];
pub const SHIFTED: fn(usize) -> Pattern = |group| Pattern::ShiftedSparse { group };
/// Shifted sparse, seeing both ways.
pub const SHIFTED_BOTH: fn(usize) -> Pattern = |group| Pattern::ShiftedBidirectional { group };
pub const WINDOW: fn(usize) -> Pattern = |window| Pattern::SlidingWindow { window };

#[path = "seeded.rs"]
mod seeded;

pub use seeded::values;

pub fn random(dims: &[usize], seed: u64) -> Result<Tensor> {
    Ok(Tensor::from_vec(values(dims.iter().product(), seed), dims, &Device::Cpu)?)
}

pub fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?)
}

pub fn wide(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(flat(tensor)?.into_iter().map(f64::from).collect())
}

/// As values are stored.
pub fn stored<S: Store>(values: &[f32]) -> Vec<S> {
    values.iter().map(|x| S::put(*x)).collect()
}

pub fn widened<S: Store>(values: &[S]) -> Vec<f64> {
    values.iter().map(|x| f64::from(x.get())).collect()
}

/// How far kernels may be from the reference, of the largest value (but at least of 1, the size of the operands).
///
/// f32: a few roundings of 2⁻²⁴ in each of some hundred terms. bf16 keeps 8 bits: 2⁻⁹ for each rounded operand of a product,
/// and scores of size 2 or 3 are summed from them.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    pub forward: f64,
    pub gradient: f64,
}

impl Tolerance {
    pub fn of<S: Store>(products: Products) -> Self {
        match (products, S::EXACT) {
            (Products::F32, true) => Self { forward: 2e-6, gradient: 5e-6 },
            (Products::F32, false) => Self { forward: 1.0 / 256.0, gradient: 1.0 / 128.0 },
            (Products::Bf16, _) => Self { forward: 1.0 / 64.0, gradient: 1.0 / 32.0 },
        }
    }
}

/// One comparison: sizes, pattern, rows.
#[derive(Clone, Debug)]
pub struct Case {
    pub sizes: Sizes,
    pub pattern: Pattern,
    pub rows: Rows,
    pub slopes: Option<Vec<f32>>,
    pub scale: f64,
}

/// Everything an attention gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome<S> {
    pub out: Vec<S>,
    pub lse: Vec<f32>,
    pub gradients: [Vec<f32>; 3],
}

impl<S: PartialEq> Outcome<S> {
    pub fn new(mixed: Mixed<S>, gradients: Gradients) -> Self {
        let Gradients { q, k, v } = gradients;
        Self { out: mixed.out, lse: mixed.lse, gradients: [q, k, v] }
    }
}

impl Case {
    /// `sizes` is B, T, H, Hkv, D. The scale is not the reciprocal root of the width (it must not be hidden in a default),
    /// and large enough to make the probabilities uneven.
    pub fn new(sizes: [usize; 5], pattern: Pattern) -> Self {
        let [batch, entries, heads, kv_heads, width] = sizes;
        let sizes = Sizes { batch, entries, heads, kv_heads, width };
        Self { sizes, pattern, rows: Rows::default(), slopes: None, scale: 2.5 / (width as f64).sqrt() }
    }

    pub fn lengths(mut self, lengths: &[usize]) -> Self {
        self.rows.lengths = Some(lengths.to_vec());
        self
    }

    pub fn segments(mut self, segments: &[&[usize]]) -> Self {
        self.rows.segments = Some(segments.iter().map(|starts| starts.to_vec()).collect());
        self
    }

    pub fn slopes(mut self, slopes: &[f32]) -> Self {
        self.slopes = Some(slopes.to_vec());
        self
    }

    pub fn scale(mut self, scale: f64) -> Self {
        self.scale = scale;
        self
    }

    pub fn q_dims(&self) -> [usize; 4] {
        let s = &self.sizes;
        [s.batch, s.entries, s.heads, s.width]
    }

    pub fn kv_dims(&self) -> [usize; 4] {
        let s = &self.sizes;
        [s.batch, s.entries, s.kv_heads, s.width]
    }

    pub fn inputs(&self) -> Result<[Tensor; 3]> {
        Ok([random(&self.q_dims(), 1)?, random(&self.kv_dims(), 2)?, random(&self.kv_dims(), 3)?])
    }

    /// q, k, v and the gradient of the result as slices.
    pub fn operands(&self) -> [Vec<f32>; 4] {
        let (q, kv) = (self.q_dims().iter().product(), self.kv_dims().iter().product());
        [values(q, 1), values(kv, 2), values(kv, 3), values(q, 4)]
    }

    pub fn problem(&self) -> Problem<'_> {
        Problem {
            sizes: self.sizes,
            scale: self.scale,
            pattern: self.pattern,
            rows: &self.rows,
            slopes: self.slopes.as_deref(),
        }
    }

    pub fn options(&self, products: Products) -> Options<'_> {
        Options {
            scale: self.scale,
            pattern: self.pattern,
            rows: &self.rows,
            slopes: self.slopes.as_deref(),
            products,
        }
    }

    pub fn prepared(&self, products: Products) -> Result<Prepared> {
        let Sizes { batch, entries, heads, kv_heads, width } = self.sizes;
        let prepared =
            Prepared::new([batch, entries, heads, kv_heads, width], self.scale, self.pattern, &self.rows)?
                .with_products(products);
        Ok(match &self.slopes {
            Some(slopes) => prepared.with_slopes(slopes)?,
            None => prepared,
        })
    }

    /// Forward and backward on slices.
    pub fn outcome<S: Store>(
        &self,
        [q, k, v, d_out]: &[Vec<f32>; 4],
        products: Products,
    ) -> Result<Outcome<S>> {
        let prepared = self.prepared(products)?;
        let (q, k, v) = (stored::<S>(q), stored::<S>(k), stored::<S>(v));
        let (mut mixed, mut gradients) = (Mixed::default(), Gradients::default());
        prepared.forward_into(&q, &k, &v, &mut mixed);
        prepared.backward_into(&q, &k, &v, &mixed, d_out, &mut gradients);
        Ok(Outcome::new(mixed, gradients))
    }

    pub fn run(&self, [q, k, v]: &[Tensor; 3]) -> Result<Tensor> {
        Ok(attention_with(q, k, v, &self.options(Products::F32))?)
    }

    /// Gradients of Σ probe·result.
    pub fn gradients(&self, inputs: &[Tensor; 3], probe: &Tensor) -> Result<[Tensor; 3]> {
        let [q, k, v] = inputs;
        let (q, k, v) = (Var::from_tensor(q)?, Var::from_tensor(k)?, Var::from_tensor(v)?);
        let out = attention_with(&q, &k, &v, &self.options(Products::F32))?;
        let grads = (out.to_dtype(DType::F32)? * probe)?.sum_all()?.backward()?;
        let of = |var: &Var| -> Result<Tensor> {
            grads.get(var).cloned().ok_or_else(|| anyhow::anyhow!("expected a gradient"))
        };
        Ok([of(&q)?, of(&k)?, of(&v)?])
    }

    /// Holds forward and gradients, through the op and in f32, against the reference.
    pub fn check(&self) -> Result<()> {
        let inputs = self.inputs()?;
        let probe = random(&self.q_dims(), 4)?;
        let [q, k, v] = &inputs;
        let (q, k, v, probe_f64) = (wide(q)?, wide(k)?, wide(v)?, wide(&probe)?);
        let tolerance = Tolerance::of::<f32>(Products::F32);
        let want = reference::forward(&q, &k, &v, &self.problem());
        near(&format!("{self:?} forward"), &wide(&self.run(&inputs)?)?, &want, tolerance.forward);
        let got = self.gradients(&inputs, &probe)?;
        let want = reference::backward(&q, &k, &v, &probe_f64, &self.problem());
        for ((name, got), want) in ["q", "k", "v"].iter().zip(&got).zip([&want.q, &want.k, &want.v]) {
            near(&format!("{self:?} gradient of {name}"), &wide(got)?, want, tolerance.gradient);
        }
        Ok(())
    }

    /// The same on slices for a storage type, with all products.
    pub fn check_stored<S: Store>(&self) -> Result<()> {
        let operands = self.operands();
        let wide = operands.each_ref().map(|x| widened(&stored::<S>(x)));
        // The gradient of the result is f32 in every class.
        let [q, k, v, _] = &wide;
        let d_out = widened(&operands[3]);
        let forward = reference::forward(q, k, v, &self.problem());
        let backward = reference::backward(q, k, v, &d_out, &self.problem());
        for products in BOTH {
            let tolerance = Tolerance::of::<S>(products);
            let got = self.outcome::<S>(&operands, products)?;
            let what = |part: &str| format!("{self:?} {products:?} of {:?}: {part}", S::DTYPE);
            near(&what("forward"), &widened(&got.out), &forward, tolerance.forward);
            let [dq, dk, dv] = &got.gradients;
            for (name, got, want) in
                [("dq", dq, &backward.q), ("dk", dk, &backward.k), ("dv", dv, &backward.v)]
            {
                near(&what(name), &widened(got), want, tolerance.gradient);
            }
        }
        Ok(())
    }
}

/// Fails unless every pair differs by at most `tolerance`.
pub fn close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance, "{what}: value {i}: expected {want}, got {got}");
    }
}

/// Fails unless every pair differs by at most `tolerance` of the largest wanted value, or of 1.
pub fn near(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    let size = want.iter().fold(1f64, |most, x| most.max(x.abs()));
    close(what, got, want, tolerance * size);
}
