//! Tensors that change hands: memory of the giver, with the function that releases it.
//!
//! Source: DLPack 1.0 (`DLManagedTensorVersioned`, dlpack.h), field for field, so that [`OwnedTensor::into_raw`] can be
//! put into a Python capsule named `dltensor_versioned` and read by PyTorch, NumPy or JAX without a copy.
//!
//! The receiver reads through [`OwnedTensor::view`] and drops the value when done; the release function runs in the
//! library that allocated the memory. Shape in elements, row-major, outermost dimension first. The pointer is aligned to
//! the element; DLPack's wish for 256 bytes is not kept (nor is it by others).
//!
//! A tensor may lie on a GPU ([`OwnedTensor::of_cuda_owner`]): device type and number go out and come in as they are, and who
//! reads values on the host is refused. DLPack's struct names no stream: what writes such a tensor is done before it is given.
//!
//! Left out: reading DLPack tensors of other makers with dtypes with lanes, or on other devices than the CPU and CUDA's.

use crate::tensor::{DType, Device, DeviceKind, Element, TensorError, TensorView, contiguous_strides};
use abi_stable::StableAbi;
use std::ffi::c_void;
use std::ptr::NonNull;

/// The DLPack version that is written: 1.0.
pub const DLPACK_VERSION: DlPackVersion = DlPackVersion { major: 1, minor: 0 };

/// `DLPackVersion`.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Copy, PartialEq, Eq)]
pub struct DlPackVersion {
    /// Another major version is another layout.
    pub major: u32,
    /// Another minor version adds dtypes or devices.
    pub minor: u32,
}

/// `DLDevice`.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Copy, PartialEq, Eq)]
pub struct DlDevice {
    /// `DLDeviceType`: 1 CPU, 2 CUDA.
    pub device_type: i32,
    /// Which of that type.
    pub device_id: i32,
}

/// `DLDataType`.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, Copy, PartialEq, Eq)]
pub struct DlDataType {
    /// 0 signed, 1 unsigned, 2 float, 4 bfloat.
    pub code: u8,
    /// Bits of one element.
    pub bits: u8,
    /// Elements of a vector type; 1 here.
    pub lanes: u16,
}

impl From<DType> for DlDataType {
    fn from(dtype: DType) -> Self {
        let code = match dtype {
            DType::I64 => 0,
            DType::U32 => 1,
            DType::F32 | DType::F64 | DType::F16 => 2,
            DType::Bf16 => 4,
        };
        Self { code, bits: (dtype.size() * 8) as u8, lanes: 1 }
    }
}

impl DlDataType {
    fn dtype(self) -> Option<DType> {
        [DType::F32, DType::F64, DType::Bf16, DType::F16, DType::U32, DType::I64]
            .into_iter()
            .find(|&d| Self::from(d) == self)
    }
}

/// `DLTensor`.
#[repr(C)]
#[derive(StableAbi, Debug)]
pub struct DlTensor {
    /// First byte of the allocation.
    pub data: *mut c_void,
    /// Where it lies.
    pub device: DlDevice,
    /// Number of dimensions.
    pub ndim: i32,
    /// Element type.
    pub dtype: DlDataType,
    /// `ndim` lengths.
    pub shape: *mut i64,
    /// `ndim` strides in elements.
    pub strides: *mut i64,
    /// From `data` to the first element.
    pub byte_offset: u64,
}

/// `DLManagedTensorVersioned`.
#[repr(C)]
#[derive(StableAbi, Debug)]
pub struct DlManagedTensorVersioned {
    /// Read this before anything else.
    pub version: DlPackVersion,
    /// Belongs to the deleter.
    pub manager_ctx: *mut c_void,
    /// Frees the tensor and this struct, whose address is its argument.
    pub deleter: Option<unsafe extern "C" fn(*mut c_void)>,
    /// Bit 0: read-only.
    pub flags: u64,
    /// The tensor.
    pub dl_tensor: DlTensor,
}

/// `DLPACK_FLAG_BITMASK_READ_ONLY`: the receiver must not write.
pub const READ_ONLY: u64 = 1;

/// What a released tensor gives back: what keeps the values alive, and the arrays that the DLPack struct points into.
struct Holding<O> {
    managed: DlManagedTensorVersioned,
    _owner: O,
    shape: Vec<i64>,
    strides: Vec<i64>,
}

unsafe extern "C" fn release<O>(managed: *mut c_void) {
    // SAFETY: `managed` is the `manager_ctx` chain's own box: `OwnedTensor::of_owner::<O>` stored this very function next to
    // the pointer of the box, and DLPack allows one call.
    unsafe {
        let context = (*managed.cast::<DlManagedTensorVersioned>()).manager_ctx;
        drop(Box::from_raw(context.cast::<Holding<O>>()));
    }
}

/// A tensor whose memory belongs to whoever holds this value. Dropping it calls the release function.
#[repr(transparent)]
#[derive(StableAbi, Debug)]
pub struct OwnedTensor {
    managed: NonNull<DlManagedTensorVersioned>,
}

// SAFETY: the value owns what it points to, or keeps it alive, and `release` may run on any thread: owners are Send and Sync.
unsafe impl Send for OwnedTensor {}
// SAFETY: through a shared reference the memory is only read.
unsafe impl Sync for OwnedTensor {}

impl OwnedTensor {
    /// Takes over a row-major vector; the product of `shape` must be its length.
    pub fn new<T: Element>(mut values: Vec<T>, shape: &[usize]) -> Result<Self, TensorError> {
        TensorView::new(&values, shape)?;
        let data = values.as_mut_ptr().cast();
        // SAFETY: the pointer is that of the vector's own memory, which moving the vector does not move, and whose length was held
        // against the shape; nobody else has it.
        Ok(unsafe { Self::of_owner(values, T::DTYPE, data, shape, 0) })
    }

    /// Lends row-major values of `owner`, which is dropped when the receiver releases the tensor: nothing is copied. With
    /// [`READ_ONLY`] among the `flags` the receiver is told not to write.
    ///
    /// # Safety
    /// `data` points to as many values of `dtype` as `shape` has, aligned and initialised, which stay where they are and are written
    /// by nobody else until `owner` is dropped, whichever thread that happens on.
    pub unsafe fn of_owner<O: Send + Sync + 'static>(
        owner: O,
        dtype: DType,
        data: *mut c_void,
        shape: &[usize],
        flags: u64,
    ) -> Self {
        Self::of_device(owner, Device::CPU, dtype, data, shape, flags)
    }

    /// Lends row-major values in a GPU's memory, at `address` of the device `id`; otherwise as [`OwnedTensor::of_owner`].
    ///
    /// # Safety
    /// As there, of that device's memory; the work that writes the values is done.
    pub unsafe fn of_cuda_owner<O: Send + Sync + 'static>(
        owner: O,
        id: i32,
        dtype: DType,
        address: usize,
        shape: &[usize],
        flags: u64,
    ) -> Self {
        let device = Device { kind: DeviceKind::Cuda, id };
        Self::of_device(owner, device, dtype, std::ptr::without_provenance_mut(address), shape, flags)
    }

    fn of_device<O: Send + Sync + 'static>(
        owner: O,
        device: Device,
        dtype: DType,
        data: *mut c_void,
        shape: &[usize],
        flags: u64,
    ) -> Self {
        let mut holding = Box::new(Holding {
            managed: DlManagedTensorVersioned {
                version: DLPACK_VERSION,
                manager_ctx: std::ptr::null_mut(),
                deleter: Some(release::<O>),
                flags,
                dl_tensor: DlTensor {
                    data,
                    device: DlDevice { device_type: device.kind as i32, device_id: device.id },
                    ndim: shape.len() as i32,
                    dtype: dtype.into(),
                    shape: std::ptr::null_mut(),
                    strides: std::ptr::null_mut(),
                    byte_offset: 0,
                },
            },
            _owner: owner,
            // A dimension of real values fits: the product of the others is at least 1, or the tensor is empty.
            shape: shape.iter().map(|&d| i64::try_from(d).unwrap_or(i64::MAX)).collect(),
            strides: contiguous_strides(shape)[..shape.len()].iter().map(|&s| s as i64).collect(),
        });
        holding.managed.dl_tensor.shape = holding.shape.as_mut_ptr();
        holding.managed.dl_tensor.strides = holding.strides.as_mut_ptr();
        let holding = Box::into_raw(holding);
        // SAFETY: `holding` comes from a box, so it is valid and ours; its fields are written before anyone else sees it.
        let managed = unsafe {
            (*holding).managed.manager_ctx = holding.cast();
            NonNull::new_unchecked(&raw mut (*holding).managed)
        };
        Self { managed }
    }

    /// May the receiver only read?
    pub fn read_only(&self) -> bool {
        self.managed().flags & READ_ONLY != 0
    }

    fn managed(&self) -> &DlManagedTensorVersioned {
        // SAFETY: the pointer is valid until the release function runs, which is in `drop` or behind `into_raw`.
        unsafe { self.managed.as_ref() }
    }

    /// The dimensions, outermost first; empty if the giver's struct is not one that this version reads.
    pub fn shape(&self) -> Vec<usize> {
        self.array(self.managed().dl_tensor.shape).iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect()
    }

    fn array(&self, start: *mut i64) -> &[i64] {
        let ndim = usize::try_from(self.managed().dl_tensor.ndim).unwrap_or(0);
        if ndim == 0 || start.is_null() || self.managed().version.major != DLPACK_VERSION.major {
            return &[];
        }
        // SAFETY: DLPack promises `ndim` entries behind a non-null shape or strides for as long as the tensor lives.
        unsafe { std::slice::from_raw_parts(start, ndim) }
    }

    /// The tensor as a view, to be read with [`TensorView::read`] where it lies on the CPU.
    pub fn view(&self) -> Result<TensorView<'_>, TensorError> {
        let tensor = &self.managed().dl_tensor;
        let foreign =
            |got| TensorError::Shape { what: "owned tensor".into(), expected: "DLPack 1".into(), got };
        if self.managed().version.major != DLPACK_VERSION.major {
            return Err(foreign(format!("DLPack {}", self.managed().version.major)));
        }
        let dtype = tensor.dtype.dtype().ok_or_else(|| foreign(format!("{:?}", tensor.dtype)))?;
        let kind = match tensor.device.device_type {
            1 => DeviceKind::Cpu,
            2 => DeviceKind::Cuda,
            other => return Err(foreign(format!("device type {other}"))),
        };
        let device = Device { kind, id: tensor.device.device_id };
        let shape = self.shape();
        let strides: Vec<isize> = match self.array(tensor.strides) {
            [] => contiguous_strides(&shape)[..shape.len().min(crate::tensor::MAX_RANK)].to_vec(),
            strides => strides.iter().map(|&s| s as isize).collect(),
        };
        let data = tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize).cast();
        // SAFETY: the giver promised (DLPack) that shape and strides reach only into memory that lives until release,
        // which the borrow of self holds off, and that no one writes.
        Ok(unsafe { TensorView::from_raw_parts(data, dtype, device, &shape, &strides) })
    }

    /// Checks and copies the values in row-major order.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>, TensorError> {
        let dims = vec![None; self.shape().len()];
        Ok(self.view()?.read("owned tensor", &dims)?.into_owned())
    }

    /// Hands over the DLPack struct: from now on the receiver calls its deleter, once.
    pub fn into_raw(self) -> *mut DlManagedTensorVersioned {
        let raw = self.managed.as_ptr();
        std::mem::forget(self);
        raw
    }

    /// Takes over a DLPack struct.
    ///
    /// # Safety
    /// `raw` is a valid `DLManagedTensorVersioned` that may be released from any thread, and no one else releases it. What writes
    /// memory of a GPU is done.
    pub unsafe fn from_raw(raw: NonNull<DlManagedTensorVersioned>) -> Self {
        Self { managed: raw }
    }
}

impl Drop for OwnedTensor {
    fn drop(&mut self) {
        if let Some(deleter) = self.managed().deleter {
            // SAFETY: this value owns the tensor, and drop runs once; DLPack's deleter takes the struct's address.
            unsafe { deleter(self.managed.as_ptr().cast()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_dlpacks() {
        use std::mem::{offset_of, size_of};
        assert_eq!(size_of::<DlTensor>(), 48);
        assert_eq!(offset_of!(DlTensor, ndim), 16);
        assert_eq!(offset_of!(DlTensor, dtype), 20);
        assert_eq!(offset_of!(DlTensor, shape), 24);
        assert_eq!(offset_of!(DlTensor, byte_offset), 40);
        assert_eq!(offset_of!(DlManagedTensorVersioned, manager_ctx), 8);
        assert_eq!(offset_of!(DlManagedTensorVersioned, deleter), 16);
        assert_eq!(offset_of!(DlManagedTensorVersioned, flags), 24);
        assert_eq!(offset_of!(DlManagedTensorVersioned, dl_tensor), 32);
        assert_eq!(size_of::<DlManagedTensorVersioned>(), 80);
    }

    #[test]
    fn values_go_in_and_come_out() {
        let tensor = OwnedTensor::new(vec![1f32, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3]).unwrap();
        assert_eq!(tensor.shape(), [2, 3]);
        assert_eq!(tensor.to_vec::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert!(matches!(tensor.to_vec::<u32>(), Err(TensorError::DType { .. })));
        // SAFETY: the pointer was just handed over and nobody released it.
        let again = unsafe { OwnedTensor::from_raw(NonNull::new(tensor.into_raw()).unwrap()) };
        assert_eq!(again.to_vec::<f32>().unwrap()[5], 6.0);
    }

    #[test]
    fn a_scalar_and_an_empty_tensor_survive() {
        assert_eq!(OwnedTensor::new(vec![3f64], &[]).unwrap().to_vec::<f64>().unwrap(), [3.0]);
        let empty = OwnedTensor::new(Vec::<u32>::new(), &[0, 4]).unwrap();
        assert_eq!(empty.shape(), [0, 4]);
        assert!(empty.to_vec::<u32>().unwrap().is_empty());
    }

    #[test]
    fn refuses_a_length_that_is_not_the_shapes() {
        assert!(matches!(OwnedTensor::new(vec![1f32], &[2]), Err(TensorError::Length { .. })));
    }

    #[test]
    fn release_runs_once_and_on_any_thread() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        static RELEASED: AtomicUsize = AtomicUsize::new(0);
        unsafe extern "C" fn count(managed: *mut c_void) {
            RELEASED.fetch_add(1, Ordering::SeqCst);
            // SAFETY: the same box that `OwnedTensor::new` made.
            unsafe { release::<Vec<f32>>(managed) };
        }
        let mut tensor = OwnedTensor::new(vec![1f32], &[1]).unwrap();
        // SAFETY: the struct is ours until it is dropped.
        unsafe { tensor.managed.as_mut().deleter = Some(count) };
        std::thread::spawn(move || drop(tensor)).join().unwrap();
        assert_eq!(RELEASED.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn lent_values_are_the_owners_until_released() {
        let owner = std::sync::Arc::new(vec![1f32, 2.0, 3.0]);
        let data = owner.as_ptr().cast_mut().cast();
        // SAFETY: three values, kept by the count, and written by nobody.
        let lent = unsafe { OwnedTensor::of_owner(owner.clone(), DType::F32, data, &[3], READ_ONLY) };
        assert!(lent.read_only() && !OwnedTensor::new(vec![1f32], &[1]).unwrap().read_only());
        assert_eq!(std::sync::Arc::strong_count(&owner), 2);
        let view = lent.view().unwrap();
        let read = view.read::<f32>("lent", &[Some(3)]).unwrap();
        assert!(std::ptr::eq(read.as_ptr(), owner.as_ptr()), "expected the owner's memory, not a copy");
        drop(read);
        drop(lent);
        assert_eq!(std::sync::Arc::strong_count(&owner), 1);
    }

    #[test]
    fn a_gpus_tensor_keeps_its_device_and_is_not_read_on_the_host() {
        let owner = std::sync::Arc::new(());
        // SAFETY: nothing follows the address: the tensor is looked at, refused and released.
        let tensor = unsafe {
            OwnedTensor::of_cuda_owner(owner.clone(), 3, DType::Bf16, 0x7f00_0000_0100, &[2, 3], READ_ONLY)
        };
        let raw = tensor.into_raw();
        // SAFETY: the struct is whole until it is released.
        let device = unsafe { (*raw).dl_tensor.device };
        assert_eq!(device, DlDevice { device_type: 2, device_id: 3 });
        // SAFETY: the pointer was just handed over and nobody released it.
        let again = unsafe { OwnedTensor::from_raw(NonNull::new(raw).unwrap()) };
        let view = again.view().unwrap();
        let cuda = Device { kind: DeviceKind::Cuda, id: 3 };
        assert_eq!((view.device(), view.address(), view.stream()), (cuda, 0x7f00_0000_0100, None));
        assert_eq!((view.shape(), view.strides(), again.read_only()), (&[2, 3][..], &[3, 1][..], true));
        view.check_on(cuda, "lent", DType::Bf16, &[Some(2), Some(3)]).unwrap();
        let error = again.to_vec::<half::bf16>().unwrap_err();
        assert_eq!(error.to_string(), "owned tensor: expected memory on cpu, got cuda:3");
        drop(again);
        assert_eq!(std::sync::Arc::strong_count(&owner), 1);
    }

    #[test]
    fn refuses_a_device_of_another_kind() {
        let mut tensor = OwnedTensor::new(vec![1f32], &[1]).unwrap();
        // SAFETY: the struct is ours until it is dropped.
        unsafe { tensor.managed.as_mut().dl_tensor.device.device_type = 10 };
        let error = tensor.view().unwrap_err();
        assert!(error.to_string().contains("device type 10"), "{error}");
    }

    #[test]
    fn refuses_another_major_version() {
        let mut tensor = OwnedTensor::new(vec![1f32], &[1]).unwrap();
        // SAFETY: the struct is ours until it is dropped.
        unsafe { tensor.managed.as_mut().version.major = 2 };
        assert!(tensor.view().unwrap_err().to_string().contains("DLPack 2"));
    }
}
