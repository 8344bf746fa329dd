//! Forward and backward: addresses checked, then one launch and three.

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{DevicePtr, DevicePtrMut, PushKernelArg};

use super::sizes::{Sizes, WIDTHS};
use super::{Document, Gradients, Mixed, OP, Operand, Own, Prepared, THREADS};
use crate::cuda::arguments::{self, AttentionArgs};
use crate::cuda::check::{ALIGNMENT, aligned, blocks, here, product, values};
use crate::cuda::device::{Device, config, launched};
use crate::cuda::stored::Stored;
use crate::error::{KernelError, Result};

/// Refuses an operand that the kernels cannot read: too short for [rows, entries, heads, width], or with a head that does
/// not begin at a multiple of 16 bytes.
fn operand<T: Stored>(
    device: &Device,
    what: &str,
    of: &Operand<'_, T>,
    [rows, entries, heads, width]: [usize; 4],
    address: CUdeviceptr,
) -> Result<arguments::Operand> {
    here(OP, what, &of.values, device)?;
    let dims = [rows, entries, heads];
    let last = dims.iter().zip(of.strides).try_fold(width, |last, (size, stride)| {
        size.saturating_sub(1).checked_mul(stride).and_then(|offset| last.checked_add(offset))
    });
    let enough = last.is_some_and(|last| last <= of.values.len());
    if dims.iter().all(|size| *size > 0) && !enough {
        let needed = last.map_or("more than can be counted".into(), |last| format!("at least {last}"));
        let shape = [rows, entries, heads, width];
        let expected = format!("{what} of {needed} values for {shape:?} with strides {:?}", of.strides);
        return Err(KernelError::shape(OP, expected, of.values.len().to_string()));
    }
    aligned(OP, what, address)?;
    for (name, (size, stride)) in ["rows", "entries", "heads"].iter().zip(dims.iter().zip(of.strides)) {
        if *size > 1 && !stride.is_multiple_of(ALIGNMENT as usize / size_of::<T>()) {
            let expected = format!("{what} with {name} at multiples of {ALIGNMENT} bytes");
            let got = format!("{} bytes apart", stride.saturating_mul(size_of::<T>()));
            return Err(KernelError::shape(OP, expected, got));
        }
    }
    let stride = |dim: usize| {
        if dims[dim] > 1 { i64::try_from(of.strides[dim]).unwrap_or(i64::MAX) } else { 0 }
    };
    Ok(arguments::Operand { data: address, row: stride(0), entry: stride(1), head: stride(2) })
}

/// As many warps as the rows need and a block's shared memory takes, at most `most`.
fn warps(
    device: &Device,
    rows: usize,
    rows_of_warp: usize,
    most: usize,
    bytes: impl Fn(usize) -> usize,
) -> Result<[usize; 2]> {
    let limit = device.shared_limit();
    let wanted = rows.div_ceil(rows_of_warp).clamp(1, most);
    let found = (1..=wanted).rev().find(|warps| bytes(*warps) <= limit).ok_or_else(|| {
        let expected = format!("a device whose blocks have at least {} bytes of shared memory", bytes(1));
        KernelError::shape(OP, expected, format!("{} with {limit}", device.name()))
    })?;
    Ok([found, bytes(found)])
}

impl Prepared {
    /// Tiles for operands of this storage type, and the place of their width.
    fn sizes<T: Stored>(&self) -> (Sizes, usize) {
        let place = WIDTHS.iter().position(|width| self.dims.width <= *width);
        let place = place.expect("a width of at most 256 was checked");
        (Sizes::new(T::KIND.bytes(), WIDTHS[place]), place)
    }

    /// The rows' shape with `heads` heads.
    fn shape(&self, heads: usize) -> [usize; 4] {
        [self.dims.batch, self.dims.entries, heads, self.dims.width]
    }

    /// What is the same in every launch; results and gradients are not in it.
    fn arguments(&self) -> AttentionArgs {
        AttentionArgs {
            entries: self.dims.entries as i32,
            heads: self.dims.heads as i32,
            kv_heads: self.dims.kv_heads as i32,
            width: self.dims.width as i32,
            scale: self.scale,
            ..AttentionArgs::default()
        }
    }

    /// The operands in `x`, checked, and what was made on the device before; then `run`.
    fn with_operands<T: Stored>(
        &self,
        device: &Device,
        own: &Own<'_, T>,
        document: Option<&Document<'_, T>>,
        run: impl FnOnce(AttentionArgs) -> Result<()>,
    ) -> Result<()> {
        here(OP, "the prepared bounds", &self.lo, device)?;
        let stream = device.stream();
        let (q, _q) = own.q.values.device_ptr(stream);
        let (k, _k) = own.k.values.device_ptr(stream);
        let (v, _v) = own.v.values.device_ptr(stream);
        let mut x = self.arguments();
        let [of_q, of_kv] = [self.shape(self.dims.heads), self.shape(self.dims.kv_heads)];
        x.q = operand(device, "q", &own.q, of_q, q)?;
        x.k = operand(device, "k", &own.k, of_kv, k)?;
        x.v = operand(device, "v", &own.v, of_kv, v)?;
        let _document = match (self.document, document) {
            (None, None) => None,
            (Some(entries), Some(document)) => {
                let of = [1, entries, self.dims.kv_heads, self.dims.width];
                let (k, k_guard) = document.k.values.device_ptr(stream);
                let (v, v_guard) = document.v.values.device_ptr(stream);
                x.document_k = operand(device, "the document's k", &document.k, of, k)?;
                x.document_v = operand(device, "the document's v", &document.v, of, v)?;
                Some([k_guard, v_guard])
            }
            (expected, got) => {
                let name = |there: bool| if there { "a document" } else { "no document" };
                let got = name(got.is_some());
                return Err(KernelError::argument(
                    OP,
                    format!("expected {}, got {got}", name(expected.is_some())),
                ));
            }
        };
        let ints = [self.prefix.as_ref(), self.lengths.as_ref(), Some(&self.lo), Some(&self.hi)];
        let ints = ints.map(|ints| ints.map(|ints| ints.device_ptr(stream)));
        let floats = [&self.slopes, &self.positions].map(|f| f.as_ref().map(|f| f.device_ptr(stream)));
        [x.prefix, x.lengths, x.lo, x.hi] = ints.each_ref().map(|i| i.as_ref().map_or(0, |(at, _)| *at));
        [x.slopes, x.positions] = floats.each_ref().map(|f| f.as_ref().map_or(0, |(at, _)| *at));
        run(x)
    }

    /// The forward pass: the result [B, T, H, D] into `out`, log-sum-exp [B, T, H] into `lse`; zeros past a row's length.
    /// Rows that continue a document take it, others none.
    ///
    /// # Errors
    /// When an operand is too short or misaligned, a result has another size, or memory belongs to another device.
    pub fn forward<T: Stored>(
        &self,
        device: &Device,
        own: &Own<'_, T>,
        document: Option<&Document<'_, T>>,
        out: &mut impl DevicePtrMut<T>,
        lse: &mut impl DevicePtrMut<f32>,
    ) -> Result<()> {
        let dims = self.dims;
        let queries = product(OP, "queries", &[dims.batch, dims.entries, dims.heads])?;
        values(OP, "out", queries * dims.width, out, device)?;
        values(OP, "lse", queries, lse, device)?;
        self.with_operands(device, own, document, |mut x| {
            let (out, _out) = out.device_ptr_mut(device.stream());
            let (lse, _lse) = lse.device_ptr_mut(device.stream());
            aligned(OP, "out", out)?;
            (x.out, x.lse) = (out, lse);
            let (sizes, place) = self.sizes::<T>();
            let rows = sizes.forward_queries();
            let [warps, shared] =
                warps(device, dims.entries, rows, sizes.forward_warps(), |warps| sizes.forward_bytes(warps))?;
            let tiles = blocks(OP, dims.entries, rows * warps)?;
            let grid = [tiles, dims.heads as u32, dims.batch as u32];
            let function = &device.kernels.forward[T::KIND as usize][place];
            // SAFETY: operands hold every row that their strides name, out has B·T·H·D values, lse, lo and hi one for each
            // query they have; addresses are aligned, and the block's shared memory is what its warps use.
            unsafe { device.launch(function, config(grid, 32 * warps as u32, shared), &x)? };
            Ok(())
        })
    }

    /// The backward pass for the gradient `d_out` [B, T, H, D] of the result, into `gradients`; the document gets none.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn backward<T: Stored>(
        &self,
        device: &Device,
        own: &Own<'_, T>,
        document: Option<&Document<'_, T>>,
        mixed: &Mixed<'_, T>,
        d_out: &Operand<'_, T>,
        gradients: &mut Gradients<'_, T>,
    ) -> Result<()> {
        let dims = self.dims;
        let queries = product(OP, "queries", &[dims.batch, dims.entries, dims.heads])?;
        let keys = product(OP, "keys", &[dims.batch, dims.entries, dims.kv_heads, dims.width])?;
        values(OP, "out", queries * dims.width, &mixed.out, device)?;
        values(OP, "lse", queries, &mixed.lse, device)?;
        let Gradients { q: dq, k: dk, v: dv } = gradients;
        for (what, expected, of) in
            [("dq", queries * dims.width, &*dq), ("dk", keys, &*dk), ("dv", keys, &*dv)]
        {
            values(OP, what, expected, of, device)?;
        }
        // SAFETY: attention_delta writes all of it before the others read it.
        let mut delta = unsafe { device.unset::<f32>(queries)? };
        self.with_operands(device, own, document, |mut x| {
            let stream = device.stream();
            let (address, _d_out) = d_out.values.device_ptr(stream);
            x.d_out = operand(device, "d_out", d_out, self.shape(dims.heads), address)?;
            let (out, _out) = mixed.out.device_ptr(stream);
            let (lse, _lse) = mixed.lse.device_ptr(stream);
            let (dq, _dq) = dq.device_ptr_mut(stream);
            let (dk, _dk) = dk.device_ptr_mut(stream);
            let (dv, _dv) = dv.device_ptr_mut(stream);
            let (delta, _delta) = delta.device_ptr_mut(stream);
            for (what, address) in [("out", out), ("dq", dq), ("dk", dk), ("dv", dv)] {
                aligned(OP, what, address)?;
            }
            (x.out, x.lse, x.delta, x.dq, x.dk, x.dv) = (out, lse, delta, dq, dk, dv);
            self.launch_backward::<T>(device, &x, queries)
        })
    }

    fn launch_backward<T: Stored>(&self, device: &Device, x: &AttentionArgs, queries: usize) -> Result<()> {
        let dims = self.dims;
        let (sizes, place) = self.sizes::<T>();
        let kind = T::KIND as usize;
        let kernels = &device.kernels;
        let [batch, heads, kv_heads] = [dims.batch, dims.heads, dims.kv_heads].map(|size| size as u32);

        // Both first: what is refused is refused before anything is queued.
        let most = sizes.backward_warps();
        let [warps_of_queries, shared_of_queries] =
            warps(device, dims.entries, 16, most, |warps| sizes.queries_bytes(warps))?;
        let [warps_of_keys, shared_of_keys] =
            warps(device, dims.entries, 16, most, |warps| sizes.keys_bytes(warps))?;

        let config_of_delta = config([blocks(OP, queries, THREADS as usize / 32)?, 1, 1], THREADS, 0);
        let mut launch = device.stream().launch_builder(&kernels.delta[kind]);
        let batch_of_kernel = dims.batch as i32;
        launch.arg(x).arg(&batch_of_kernel);
        // SAFETY: out has B·T·H·D values, d_out those that its strides name, delta one for each query.
        launched(unsafe { launch.launch(config_of_delta) })?;

        let grid = [blocks(OP, dims.entries, 16 * warps_of_queries)?, heads, batch];
        let launch = config(grid, 32 * warps_of_queries as u32, shared_of_queries);
        // SAFETY: as in forward; dq has B·T·H·D values.
        unsafe { device.launch(&kernels.queries[kind][place], launch, x)? };

        let tiles = blocks(OP, dims.entries.div_ceil(16 * warps_of_keys) * sizes.parts(), 1)?;
        let launch = config([tiles, kv_heads, batch], 32 * warps_of_keys as u32, shared_of_keys);
        // SAFETY: as in forward; dk and dv have B·T·Hkv·D values.
        unsafe { device.launch(&kernels.keys[kind][place], launch, x)? };
        Ok(())
    }
}
