//! Views as a careless or hostile host may hand them over, made of any bytes: for fuzzing, and the suite's bounded run of the
//! same (`megacontext_lora::untrusted`).
//!
//! A view that the check passes is held against 128-bit arithmetic; one that lies in memory which is really there is read and
//! filled besides, and every value has to come from its place and go to it. A view of memory that is not there cannot be told
//! from one of memory that is: such views are checked and never followed.

use std::ffi::c_void;
use std::{mem, slice};

use super::{DType, Device, DeviceKind, MAX_RANK, Stream, TensorError, TensorView, TensorViewMut};

/// Elements of the memory that views lie in.
const ARENA: usize = 64;
/// Most bytes that a view may ask to be copied here; what is behind a larger one is only checked.
const COPIED: usize = 1 << 16;

/// Takes bytes from the front, zeros where there are none left.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn next<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let n = N.min(self.0.len());
        out[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        out
    }

    fn byte(&mut self) -> u8 {
        u8::from_le_bytes(self.next())
    }
}

/// Makes a view of bytes: element type, device, address, rank, dimensions, strides, and a GPU's stream; zeros where there are
/// none left. It is checked, and read and filled where it lies in memory that is there. A GPU's is checked for its own device too,
/// and never followed.
///
/// # Errors
/// The check's.
///
/// # Panics
/// When the check passes what 128-bit arithmetic refuses, or values go elsewhere than to their places.
pub fn view(bytes: &[u8]) -> Result<(), TensorError> {
    let mut bytes = Bytes(bytes);
    let dtype = [DType::F32, DType::F64, DType::Bf16, DType::F16, DType::U32, DType::I64]
        [usize::from(bytes.byte() % 6)];
    let kind = if bytes.byte().is_multiple_of(8) { DeviceKind::Cuda } else { DeviceKind::Cpu };
    let device = Device { kind, id: i32::from(bytes.byte() % 2) };
    let mut arena: Vec<f32> = (0..ARENA).map(|i| i as f32).collect();
    let start = arena.as_mut_ptr();
    let (place, at) = (bytes.byte(), u64::from_le_bytes(bytes.next()));
    let data: *mut c_void = match place % 4 {
        0 => std::ptr::null_mut(),
        // Anywhere: such a view is checked and not followed.
        1 => at as *mut c_void,
        // Crooked by up to 7 bytes.
        2 => start.cast::<u8>().wrapping_add(at as usize % 8).cast(),
        _ => start.wrapping_add(at as usize % ARENA).cast(),
    };
    let rank = usize::from(bytes.byte() % 9);
    let mut dims = Vec::new();
    let mut strides = Vec::new();
    for _ in 0..rank {
        dims.push(u64::from_le_bytes(bytes.next()) as usize);
        strides.push(i64::from_le_bytes(bytes.next()) as isize);
    }
    let expected = vec![None; rank];
    let view = match kind {
        // SAFETY: the view is read only where `inside` holds: then shape and strides reach into the arena alone, which lives
        // on, holds initialised values and is used by no one else meanwhile.
        DeviceKind::Cpu => unsafe { TensorView::from_raw_parts(data, dtype, device, &dims, &strides) },
        DeviceKind::Cuda => {
            let stream = Stream::new(u64::from_le_bytes(bytes.next()) as usize);
            // SAFETY: nothing follows a GPU's view here.
            unsafe { TensorView::from_cuda(data as usize, dtype, device.id, stream, &dims, &strides) }
        }
    };
    let checked = view.check_on(device, "view", dtype, &expected);
    let count = dims.iter().try_fold(1i128, |n, d| n.checked_mul(*d as i128));
    // The span in elements; a dimension of 0 makes it empty whatever the others say.
    let last = dims.iter().zip(&strides).try_fold(0i128, |sum, (d, s)| {
        (*d as i128 - 1).checked_mul(*s as i128).and_then(|reach| sum.checked_add(reach))
    });
    let empty = dims.contains(&0);
    if checked.is_ok() {
        assert!(rank <= MAX_RANK && strides.iter().all(|s| *s >= 0));
        assert!(empty || !data.is_null());
        assert_eq!(data as usize % dtype.size(), 0);
        let size = dtype.size() as i128;
        assert!(empty || count.is_some_and(|n| n * size <= isize::MAX as i128), "{dims:?}");
        let end =
            last.and_then(|last| (last + 1).checked_mul(size)).map(|bytes| data as usize as i128 + bytes);
        assert!(empty || end.is_some_and(|end| end <= usize::MAX as i128), "{dims:?} {strides:?}");
    }
    let copied = count.filter(|n| (0..=COPIED as i128).contains(n)).map(|n| n as usize);
    if checked.is_ok() && copied.is_some() {
        let runs = view.runs(device, "view", dtype, &expected)?;
        let length = runs.length();
        assert!(runs.len() == 0 || length > 0);
        let in_runs = runs.flat_map(|from| from..from + length);
        assert!(in_runs.eq(places(&dims, &strides)), "{dims:?} {strides:?}");
    }
    let checked = if device == Device::CPU { checked } else { refused_on_the_host(&view, checked) };
    let from = (data as usize).wrapping_sub(start as usize) / mem::size_of::<f32>();
    let inside = dtype == DType::F32
        && place % 4 == 3
        && (empty || last.is_some_and(|last| from as i128 + last < ARENA as i128));
    if let (Ok(()), true, Some(count)) = (&checked, inside, copied) {
        let read = view.read::<f32>("view", &expected)?.into_owned();
        assert_eq!(read.len(), count);
        assert_eq!(read, places(&dims, &strides).map(|at| (from + at) as f32).collect::<Vec<f32>>());
        // SAFETY: as for the view; nothing reads the arena until the view has gone.
        let mut out = unsafe { TensorViewMut::from_raw_parts(data, DType::F32, device, &dims, &strides) };
        let filled = out.fill::<f32, _, TensorError>("out", &expected, |values| {
            values.iter_mut().zip(1..).for_each(|(v, n)| *v = -(n as f32));
            Ok(())
        });
        // SAFETY: the arena's own pointer and length; the view that wrote through it is not used any more.
        let now = unsafe { slice::from_raw_parts(start, ARENA) };
        let mut wanted: Vec<f32> = (0..ARENA).map(|i| i as f32).collect();
        if filled.is_ok() {
            places(&dims, &strides).zip(1..).for_each(|(at, n)| wanted[from + at] = -(n as f32));
        }
        assert_eq!(now, wanted, "{dims:?} {strides:?}");
    }
    checked
}

/// The host's check of a view of another device, which has to refuse it and not to read it.
fn refused_on_the_host(view: &TensorView, own: Result<(), TensorError>) -> Result<(), TensorError> {
    let expected = vec![None; view.shape().len()];
    assert!(view.check("view", view.dtype(), &expected).is_err());
    assert!(view.read::<f32>("view", &expected).is_err());
    if own.is_ok() {
        return view.check("view", view.dtype(), &expected);
    }
    own
}

/// The place of every element in row-major order, in elements.
fn places<'a>(dims: &'a [usize], strides: &'a [isize]) -> impl Iterator<Item = usize> + 'a {
    (0..dims.iter().product::<usize>()).map(move |n| {
        let place = |(n, at): (usize, usize), (d, s): (&usize, &isize)| (n / d, at + n % d * *s as usize);
        dims.iter().zip(strides).rev().fold((n, 0), place).1
    })
}
