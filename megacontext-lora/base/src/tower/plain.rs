//! The tower's forward pass on plain buffers, for vectors that nobody walks back from.
//!
//! What [`Tower::forward`] computes by a pattern, without a tensor for every step: norms, products and relu² go over some
//! rows at a time, so that what lies between them stays in the cache, and products are added straight into the stream. Whole
//! are only the stream, queries, keys, values and what attention mixes.
//!
//! Shapes: n = B·T entries, row-major; x [n, E]; queries [n, H, D], keys and values [n, G, D]. Errors: those of
//! [`Tower::forward`].

use candle_core::Tensor;
use megacontext_kernels::attention::slices::{Mixed, Prepared};
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::cpu::Values;
use megacontext_kernels::error::KernelError;
use megacontext_kernels::gemm::Products;
use megacontext_kernels::linear::{Layer, Scratch};
use megacontext_kernels::mlp::relu2_in_place;
use megacontext_kernels::norm::rms_forward_into;
use megacontext_kernels::rope::rotate;

use super::{Angles, EPS, Tower, TowerConfig, weight};
use crate::error::Result;
use crate::params::ParamStore;

/// Rows that norms and products work on at a time: enough for a product at full speed, few enough for the cache.
pub const ROWS: usize = 512;

/// y [rows, O] (+)= x·Wᵀ for the parameter W [O, I] of this name.
///
/// # Errors
/// When there is none of this name.
pub fn product_into(
    params: &ParamStore,
    name: &str,
    [out, inp]: [usize; 2],
    x: &[f32],
    y: &mut [f32],
    accumulate: bool,
) -> Result<()> {
    let held = params.values(name)?;
    let layer = Layer { weight: held.weight(), out, inp, lora: None, products: Products::F32 };
    layer.forward(x, y, accumulate, &mut Scratch::default());
    Ok(())
}

/// What all blocks of a pass share.
struct Pass<'a> {
    params: &'a ParamStore,
    prepared: Prepared,
    /// Rows of D/2 values, one for each entry of a row or of all rows.
    cos: Values<'a>,
    sin: Values<'a>,
}

/// Buffers that blocks use again.
struct Buffers {
    normed: Vec<f32>,
    wide: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mixed: Mixed,
}

impl Tower {
    /// `x_bte`, the entries of `batch` rows, becomes the stream behind the last block.
    ///
    /// # Errors
    /// As [`Tower::forward`].
    pub fn forward_in_place(
        &self,
        params: &ParamStore,
        x_bte: &mut [f32],
        batch: usize,
        angles: Angles,
        pattern: Pattern,
        rows: &Rows,
    ) -> Result<()> {
        let TowerConfig { layers, width, heads, kv_heads } = self.config;
        let (n, d) = (x_bte.len() / width, self.config.head_width());
        let entries = n / batch.max(1);
        if x_bte.len() != batch * entries * width {
            let expected = format!("{batch} rows of entries of width {width}");
            let got = format!("{} values", x_bte.len());
            return Err(KernelError::Shape { op: "tower", expected, got }.into());
        }
        let (cos, sin) = (angles.cos.contiguous()?, angles.sin.contiguous()?);
        check_table(&cos, &sin, [entries, n, d / 2])?;
        #[cfg(feature = "cuda")]
        if let Some(on) = &self.on_gpu {
            let sizes = [batch, entries];
            return self.forward_in_place_on(on, params, x_bte, sizes, [cos, sin], (pattern, rows));
        }
        let prepared = Prepared::new([batch, entries, heads, kv_heads, d], self.scale(), pattern, rows)?;
        let pass = Pass { params, prepared, cos: Values::of(&cos)?, sin: Values::of(&sin)? };
        let chunk = ROWS.min(n);
        let zeros = |len: usize| vec![0f32; len];
        let mut buffers = Buffers {
            normed: zeros(chunk * width),
            wide: zeros(chunk * 4 * width),
            q: zeros(n * width),
            k: zeros(n * kv_heads * d),
            v: zeros(n * kv_heads * d),
            mixed: Mixed::default(),
        };
        (0..layers).try_for_each(|layer| self.block_in_place(&pass, layer, x_bte, &mut buffers))
    }

    fn block_in_place(&self, pass: &Pass, layer: usize, x: &mut [f32], buffers: &mut Buffers) -> Result<()> {
        let (e, kv) = (self.config.width, self.config.kv_heads * self.config.head_width());
        let Buffers { normed, wide, q, k, v, mixed } = buffers;
        let product = |part: &str, sizes: [usize; 2], x: &[f32], y: &mut [f32], add: bool| {
            product_into(pass.params, &weight(layer, part), sizes, x, y, add)
        };
        let ones = self.ones_e.to_vec1::<f32>()?;
        let norm = |x: &[f32], normed: &mut [f32]| rms_forward_into(x, &ones, EPS as f32, normed);

        for (i, rows) in x.chunks(ROWS * e).enumerate() {
            let (first, count) = (i * ROWS, rows.len() / e);
            let normed = &mut normed[..rows.len()];
            norm(rows, normed);
            for (part, width, out) in [("attn.c_q", e, &mut *q), ("attn.c_k", kv, &mut *k)] {
                let flat = &mut wide[..count * width];
                product(part, [width, e], normed, flat, false)?;
                self.turn(pass, first, width, flat, &mut out[first * width..][..count * width])?;
            }
            product("attn.c_v", [kv, e], normed, &mut v[first * kv..][..count * kv], false)?;
        }
        pass.prepared.forward_into(q, k, v, mixed);
        for (rows, mixed) in x.chunks_mut(ROWS * e).zip(mixed.out.chunks(ROWS * e)) {
            product("attn.c_proj", [e, e], mixed, rows, true)?;
            let (normed, wide) = (&mut normed[..rows.len()], &mut wide[..4 * rows.len()]);
            norm(rows, normed);
            product("mlp.c_fc", [4 * e, e], normed, wide, false)?;
            relu2_in_place(wide);
            product("mlp.c_proj", [e, 4 * e], wide, rows, true)?;
        }
        Ok(())
    }

    /// `out` = rms over each head of `flat`, whose entries from place `first` on are turned by −θ.
    fn turn(&self, pass: &Pass, first: usize, width: usize, flat: &mut [f32], out: &mut [f32]) -> Result<()> {
        let d = self.config.head_width();
        let (half, heads) = (d / 2, width / d);
        let places = pass.cos.len() / half;
        let mut done = 0;
        while done < flat.len() / width {
            // Up to the end of a row, where the tables are those of one.
            let place = (first + done) % places;
            let count = (places - place).min(flat.len() / width - done);
            let table = place * half..(place + count) * half;
            let part = &mut flat[done * width..][..count * width];
            rotate(part, heads, d, &pass.cos[table.clone()], &pass.sin[table], -1.0);
            done += count;
        }
        rms_forward_into(flat, &self.ones_d.to_vec1::<f32>()?, EPS as f32, out);
        Ok(())
    }
}

pub(super) fn check_table(cos: &Tensor, sin: &Tensor, [entries, n, half]: [usize; 3]) -> Result<()> {
    let fits = cos.dims() == [entries, half] || cos.dims() == [n, half];
    if fits && cos.dims() == sin.dims() {
        return Ok(());
    }
    let expected = format!("cos and sin of shape [{entries}, {half}] or [{n}, {half}]");
    let got = format!("{:?} and {:?}", cos.dims(), sin.dims());
    Err(KernelError::Shape { op: "rope", expected, got }.into())
}
