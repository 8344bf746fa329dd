//! NVIDIA's library of matrix products, opened when the first product is asked for.
//!
//! Source: the cuBLAS manual, chapter "Using the cuBLASLt API". It is looked for as NVRTC is, and not by cudarc, which knows the
//! names of one major version. Column-major, as there; [`super::linear`] turns it round.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtrMut};
use libloading::Library;

use super::error::{CudaError, loader_said};
use super::libraries::candidates;
use super::stored::Kind;

type Object = *mut c_void;
type Destroy = unsafe extern "C" fn(Object) -> c_int;
type Set = unsafe extern "C" fn(Object, c_int, *const c_void, usize) -> c_int;

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Heuristic {
    algorithm: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

/// The library's functions. It stays open: its code and its threads' state may be in use when the last handle goes.
struct Functions {
    create: unsafe extern "C" fn(*mut Object) -> c_int,
    destroy: Destroy,
    layout: unsafe extern "C" fn(*mut Object, c_int, u64, u64, i64) -> c_int,
    layout_destroy: Destroy,
    operation: unsafe extern "C" fn(*mut Object, c_int, c_int) -> c_int,
    operation_destroy: Destroy,
    operation_set: Set,
    preference: unsafe extern "C" fn(*mut Object) -> c_int,
    preference_destroy: Destroy,
    preference_set: Set,
    heuristic: unsafe extern "C" fn(
        Object,
        Object,
        Object,
        Object,
        Object,
        Object,
        Object,
        c_int,
        *mut Heuristic,
        *mut c_int,
    ) -> c_int,
    multiply: unsafe extern "C" fn(
        Object,
        Object,
        *const f32,
        *const c_void,
        Object,
        *const c_void,
        Object,
        *const f32,
        *const c_void,
        Object,
        *mut c_void,
        Object,
        *const [u64; 8],
        *mut c_void,
        usize,
        *mut c_void,
    ) -> c_int,
    version: unsafe extern "C" fn() -> usize,
    _library: ManuallyDrop<Library>,
}

// Numbers of the library's headers.
const COMPUTE_F32: c_int = 68;
const OPERATION_TRANSPOSE: [c_int; 2] = [3, 4];
const PREFERENCE_WORKSPACE: c_int = 1;
const PREFERENCE_REDUCTION: c_int = 3;
/// Partial sums are added in f32, and not in the result's type.
const REDUCTION_IN_COMPUTE_TYPE: u32 = 2;
const PREFERENCE_ALIGNMENT: [c_int; 4] = [5, 6, 7, 8];

fn number(kind: Kind) -> c_int {
    match kind {
        Kind::F32 => 0,
        Kind::F16 => 2,
        Kind::Bf16 => 14,
    }
}

/// What the library's numbers mean.
fn status(code: c_int) -> &'static str {
    match code {
        1 => "CUBLAS_STATUS_NOT_INITIALIZED",
        3 => "CUBLAS_STATUS_ALLOC_FAILED",
        7 => "CUBLAS_STATUS_INVALID_VALUE",
        8 => "CUBLAS_STATUS_ARCH_MISMATCH",
        11 => "CUBLAS_STATUS_MAPPING_ERROR",
        13 => "CUBLAS_STATUS_EXECUTION_FAILED",
        14 => "CUBLAS_STATUS_INTERNAL_ERROR",
        15 => "CUBLAS_STATUS_NOT_SUPPORTED",
        16 => "CUBLAS_STATUS_LICENSE_ERROR",
        _ => "a status that the manual does not name",
    }
}

fn checked(call: &'static str, code: c_int) -> Result<(), CudaError> {
    let reason = || format!("{} ({code})", status(code));
    if code == 0 { Ok(()) } else { Err(CudaError::Blas { call, reason: reason() }) }
}

/// As [`checked`], of a call for one product.
fn checked_for(call: &'static str, product: &Product, code: c_int) -> Result<(), CudaError> {
    let reason = || format!("{} ({code}) for {product}", status(code));
    if code == 0 { Ok(()) } else { Err(CudaError::Blas { call, reason: reason() }) }
}

/// One of the library's objects, destroyed at the end.
struct Owned(Object, Destroy);

impl Owned {
    fn new(
        call: &'static str,
        destroy: Destroy,
        make: impl FnOnce(*mut Object) -> c_int,
    ) -> Result<Self, CudaError> {
        let mut object = null_mut();
        checked(call, make(&raw mut object))?;
        Ok(Self(object, destroy))
    }

    fn set<T>(&self, call: &'static str, set: Set, attribute: c_int, value: &T) -> Result<(), CudaError> {
        // SAFETY: the object is alive, and the value is as large as is said.
        checked(call, unsafe { set(self.0, attribute, (&raw const *value).cast(), size_of::<T>()) })
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: made by the function that belongs to this one, and destroyed once.
        unsafe { (self.1)(self.0) };
    }
}

/// A column-major matrix in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Matrix {
    pub kind: Kind,
    pub rows: usize,
    pub columns: usize,
    pub leading: usize,
    /// The largest power of two, up to 256, that its address is a multiple of.
    pub alignment: u32,
}

/// d (m × n) = alpha·op(a)·op(b) + beta·d.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Product {
    pub a: Matrix,
    pub b: Matrix,
    pub d: Matrix,
    /// Whether a and b are transposed.
    pub transposed: [bool; 2],
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [m, n] = [self.d.rows, self.d.columns];
        let k = if self.transposed[0] { self.a.rows } else { self.a.columns };
        let aligned = [self.a.alignment, self.b.alignment, self.d.alignment];
        write!(
            f,
            "a product of {n} x {k} and {k} x {m} values, {} to {}, at multiples of {aligned:?} bytes",
            self.a.kind.name(),
            self.d.kind.name()
        )
    }
}

/// The largest power of two up to 256 that divides an address.
pub(super) fn alignment(address: CUdeviceptr) -> u32 {
    1 << address.trailing_zeros().min(8)
}

/// The library, with a handle, memory to work in, and the algorithms it has chosen: one for each product that has come, sizes and
/// alignments included.
pub(super) struct CublasLt {
    context: Arc<CudaContext>,
    functions: Functions,
    handle: Object,
    workspace: Mutex<CudaSlice<u8>>,
    chosen: Mutex<HashMap<Product, [u64; 8]>>,
}

// SAFETY: the manual says that a handle may be used by several threads at once; what it works in is behind a lock.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // Its context has to be the current one, and what was queued has to be done. Errors of work that was queued are told where
        // it is waited for.
        let _ = self.context.bind_to_thread().and_then(|()| self.context.synchronize());
        // SAFETY: made by `create`, and destroyed once; its functions are still there.
        unsafe { (self.functions.destroy)(self.handle) };
    }
}

impl CublasLt {
    /// Opens the library of a CUDA up to the major version `newest`, with `workspace` bytes to work in.
    pub fn open(newest: i32, stream: &Arc<CudaStream>, workspace: usize) -> Result<Self, CudaError> {
        let mut tried = Vec::new();
        for name in candidates("cublasLt", newest) {
            // SAFETY: a library of this name is cuBLASLt, whose initialisers may run anywhere, and the types of its functions
            // are those of cublasLt.h.
            match unsafe { Library::new(&name).and_then(|library| Functions::of(library)) } {
                Ok(functions) => {
                    // SAFETY: it takes nothing and gives a number: 10000·major + 100·minor + patch.
                    let version = unsafe { (functions.version)() };
                    if (12..=newest.max(12)).contains(&((version / 10_000) as i32)) {
                        return Self::over(functions, stream, workspace);
                    }
                    tried.push(format!("{name}: of CUDA {}.{}", version / 10_000, version / 100 % 100));
                }
                Err(error) => tried.push(format!("{name}: {}", loader_said(&error))),
            }
        }
        Err(CudaError::NoBlas { newest, tried: tried.join("; ") })
    }

    fn over(functions: Functions, stream: &Arc<CudaStream>, workspace: usize) -> Result<Self, CudaError> {
        stream.context().bind_to_thread().map_err(CudaError::call("cuCtxSetCurrent"))?;
        // SAFETY: no product reads what it has not written there.
        let memory = unsafe { stream.alloc::<u8>(workspace) }
            .map_err(CudaError::call(format!("allocating {workspace} bytes")))?;
        let mut handle = null_mut();
        // SAFETY: `handle` outlives the call; a context is current.
        checked("cublasLtCreate", unsafe { (functions.create)(&raw mut handle) })?;
        let context = stream.context().clone();
        Ok(Self { context, functions, handle, workspace: Mutex::new(memory), chosen: Mutex::default() })
    }

    /// The context that it works in.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Queues a product.
    ///
    /// # Safety
    /// The matrices lie at these addresses, in memory of the stream's context that lives until the product is done; nobody else
    /// uses d meanwhile.
    pub unsafe fn multiply(
        &self,
        stream: &Arc<CudaStream>,
        product: &Product,
        [a, b, d]: [CUdeviceptr; 3],
        alpha: f32,
        beta: f32,
    ) -> Result<(), CudaError> {
        let f = &self.functions;
        stream.context().bind_to_thread().map_err(CudaError::call("cuCtxSetCurrent"))?;
        // SAFETY: `to` is where the new object goes.
        let operation = Owned::new("cublasLtMatmulDescCreate", f.operation_destroy, |to| unsafe {
            (f.operation)(to, COMPUTE_F32, number(Kind::F32))
        })?;
        for (attribute, transposed) in OPERATION_TRANSPOSE.into_iter().zip(product.transposed) {
            let value = c_int::from(transposed);
            operation.set("cublasLtMatmulDescSetAttribute", f.operation_set, attribute, &value)?;
        }
        let layout = |of: &Matrix| {
            Owned::new("cublasLtMatrixLayoutCreate", f.layout_destroy, |to| {
                // SAFETY: as above.
                unsafe {
                    (f.layout)(to, number(of.kind), of.rows as u64, of.columns as u64, of.leading as i64)
                }
            })
        };
        let layouts = [layout(&product.a)?, layout(&product.b)?, layout(&product.d)?];
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = workspace.num_bytes();
        let algorithm = self.algorithm(product, &operation, &layouts, bytes)?;
        let (memory, _guard) = workspace.device_ptr_mut(stream);
        let [la, lb, ld] = &layouts;
        // SAFETY: all objects are alive; alpha and beta are read before this returns; the caller's promise for the matrices. The
        // workspace is this library's alone, and products follow one another on the stream.
        let code = unsafe {
            (f.multiply)(
                self.handle,
                operation.0,
                &raw const alpha,
                a as *const c_void,
                la.0,
                b as *const c_void,
                lb.0,
                &raw const beta,
                d as *const c_void,
                ld.0,
                d as *mut c_void,
                ld.0,
                &raw const algorithm,
                memory as *mut c_void,
                bytes,
                stream.cu_stream().cast(),
            )
        };
        checked_for("cublasLtMatmul", product, code)
    }

    /// What the library thinks is fastest: asked once for each product.
    fn algorithm(
        &self,
        product: &Product,
        operation: &Owned,
        [a, b, d]: &[Owned; 3],
        workspace: usize,
    ) -> Result<[u64; 8], CudaError> {
        let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(algorithm) = chosen.get(product) {
            return Ok(*algorithm);
        }
        let f = &self.functions;
        // SAFETY: `to` is where the new object goes.
        let preference = Owned::new("cublasLtMatmulPreferenceCreate", f.preference_destroy, |to| unsafe {
            (f.preference)(to)
        })?;
        const SET: &str = "cublasLtMatmulPreferenceSetAttribute";
        preference.set(SET, f.preference_set, PREFERENCE_WORKSPACE, &workspace)?;
        preference.set(SET, f.preference_set, PREFERENCE_REDUCTION, &REDUCTION_IN_COMPUTE_TYPE)?;
        // Without these the library takes every address for a multiple of 256.
        let of = [&product.a, &product.b, &product.d, &product.d].map(|matrix| matrix.alignment);
        for (attribute, alignment) in PREFERENCE_ALIGNMENT.into_iter().zip(of) {
            preference.set(SET, f.preference_set, attribute, &alignment)?;
        }
        let (mut found, mut count) = (Heuristic::default(), 0);
        // SAFETY: all objects are alive, and there is room for the one result that is asked for.
        let code = unsafe {
            (f.heuristic)(
                self.handle,
                operation.0,
                a.0,
                b.0,
                d.0,
                d.0,
                preference.0,
                1,
                &raw mut found,
                &raw mut count,
            )
        };
        const FIND: &str = "cublasLtMatmulAlgoGetHeuristic";
        checked_for(FIND, product, code)?;
        if count == 0 {
            return Err(CudaError::Blas {
                call: FIND,
                reason: format!("expected an algorithm for {product}, got none"),
            });
        }
        checked_for(FIND, product, found.state)?;
        chosen.insert(*product, found.algorithm);
        Ok(found.algorithm)
    }
}

impl Functions {
    /// # Safety
    /// The library is cuBLASLt.
    unsafe fn of(library: Library) -> Result<Self, libloading::Error> {
        // SAFETY: the caller's promise; each function has the type that cublasLt.h declares, and the library is kept.
        unsafe {
            Ok(Self {
                create: *library.get(b"cublasLtCreate")?,
                destroy: *library.get(b"cublasLtDestroy")?,
                layout: *library.get(b"cublasLtMatrixLayoutCreate")?,
                layout_destroy: *library.get(b"cublasLtMatrixLayoutDestroy")?,
                operation: *library.get(b"cublasLtMatmulDescCreate")?,
                operation_destroy: *library.get(b"cublasLtMatmulDescDestroy")?,
                operation_set: *library.get(b"cublasLtMatmulDescSetAttribute")?,
                preference: *library.get(b"cublasLtMatmulPreferenceCreate")?,
                preference_destroy: *library.get(b"cublasLtMatmulPreferenceDestroy")?,
                preference_set: *library.get(b"cublasLtMatmulPreferenceSetAttribute")?,
                heuristic: *library.get(b"cublasLtMatmulAlgoGetHeuristic")?,
                multiply: *library.get(b"cublasLtMatmul")?,
                version: *library.get(b"cublasLtGetVersion")?,
                _library: ManuallyDrop::new(library),
            })
        }
    }
}
