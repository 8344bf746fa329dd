//! Shared by the attention tests: seeded values, the op and the f64 reference side by side.

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use megacontext_kernels::attention::reference::{self, Sizes};
use megacontext_kernels::attention::{Pattern, Rows, attention};

/// Values in −1..1 from a small generator (splitmix64), the same on every machine.
pub fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    (0..count)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            (z >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

pub fn random(dims: &[usize], seed: u64) -> Result<Tensor> {
    Ok(Tensor::from_vec(values(dims.iter().product(), seed), dims, &Device::Cpu)?)
}

pub fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1::<f32>()?)
}

pub fn wide(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(flat(tensor)?.into_iter().map(f64::from).collect())
}

/// One comparison: sizes, pattern, rows.
#[derive(Clone, Debug)]
pub struct Case {
    pub sizes: Sizes,
    pub pattern: Pattern,
    pub rows: Rows,
}

impl Case {
    /// `sizes` is B, T, H, Hkv, D.
    pub fn new(sizes: [usize; 5], pattern: Pattern) -> Self {
        let [batch, entries, heads, kv_heads, width] = sizes;
        Self { sizes: Sizes { batch, entries, heads, kv_heads, width }, pattern, rows: Rows::default() }
    }

    pub fn lengths(mut self, lengths: &[usize]) -> Self {
        self.rows.lengths = Some(lengths.to_vec());
        self
    }

    pub fn segments(mut self, segments: &[&[usize]]) -> Self {
        self.rows.segments = Some(segments.iter().map(|starts| starts.to_vec()).collect());
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

    /// Not the reciprocal root of the width: the scale must not be hidden in a default. Wide enough to make the
    /// probabilities uneven.
    pub fn scale(&self) -> f64 {
        2.5 / (self.sizes.width as f64).sqrt()
    }

    pub fn run(&self, [q, k, v]: &[Tensor; 3]) -> Result<Tensor> {
        Ok(attention(q, k, v, self.scale(), self.pattern, &self.rows)?)
    }

    /// Gradients of Σ probe·result.
    pub fn gradients(&self, inputs: &[Tensor; 3], probe: &Tensor) -> Result<[Tensor; 3]> {
        let [q, k, v] = inputs;
        let (q, k, v) = (Var::from_tensor(q)?, Var::from_tensor(k)?, Var::from_tensor(v)?);
        let out = attention(&q, &k, &v, self.scale(), self.pattern, &self.rows)?;
        let grads = (out * probe)?.sum_all()?.backward()?;
        let of = |var: &Var| -> Result<Tensor> {
            grads.get(var).cloned().ok_or_else(|| anyhow::anyhow!("expected a gradient"))
        };
        Ok([of(&q)?, of(&k)?, of(&v)?])
    }

    /// Holds forward and gradients against the reference.
    pub fn check(&self) -> Result<()> {
        self.check_inputs(&self.inputs()?)
    }

    pub fn check_inputs(&self, inputs: &[Tensor; 3]) -> Result<()> {
        let [q, k, v] = inputs;
        let (q, k, v) = (wide(q)?, wide(k)?, wide(v)?);
        let want = reference::forward(&q, &k, &v, &self.sizes, self.scale(), self.pattern, &self.rows);
        close(&format!("{self:?} forward"), &wide(&self.run(inputs)?)?, &want, 1e-5);
        let probe = random(&self.q_dims(), 4)?;
        let got = self.gradients(inputs, &probe)?;
        let want = reference::backward(
            &q,
            &k,
            &v,
            &wide(&probe)?,
            &self.sizes,
            self.scale(),
            self.pattern,
            &self.rows,
        );
        for ((name, got), want) in ["q", "k", "v"].iter().zip(&got).zip([&want.q, &want.k, &want.v]) {
            let size = want.iter().fold(0f64, |most, x| most.max(x.abs()));
            close(&format!("{self:?} gradient of {name}"), &wide(got)?, want, 1e-4 * size.max(1e-3));
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
