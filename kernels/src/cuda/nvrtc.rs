//! NVIDIA's run-time compiler, opened when it is needed.
//!
//! Source: the NVRTC manual. Its library is looked for here and not by cudarc, which knows the names of one major version
//! and panics without them: code of a newer CUDA than the driver's is of no use, and either of 12 and 13 may be what is
//! there.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};

use libloading::Library;

use super::error::{CudaError, loader_said};
use super::libraries::candidates;

type Program = *mut c_void;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Get = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// A translation unit; it includes headers by their names.
pub(super) struct Source<'a> {
    pub name: &'a str,
    pub text: &'a str,
    pub headers: &'a [(&'a str, &'a str)],
}

/// The library's functions, which live as long as it.
pub(super) struct Nvrtc {
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: Size,
    log: Get,
    code_size: Size,
    code: Get,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    text: unsafe extern "C" fn(c_int) -> *const c_char,
    version: (i32, i32),
    _library: Library,
    /// What it opens by name alone, wherever it lies itself.
    _builtins: Option<Library>,
}

/// A program that is destroyed at the end.
struct Owned<'a>(&'a Nvrtc, Program);

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        // SAFETY: the program came from `create` and is destroyed once.
        unsafe { (self.0.destroy)(&raw mut self.1) };
    }
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("sources, names and options are without zeros")
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

impl Nvrtc {
    /// The first library of CUDA 12.0 up to the major version `newest`.
    pub fn open(newest: i32, target: &str) -> Result<Self, CudaError> {
        let mut tried = Vec::new();
        for name in candidates("nvrtc", newest) {
            // SAFETY: a library of this name is NVRTC, whose initialisers may run anywhere.
            let library = match unsafe { Library::new(&name) } {
                Ok(library) => library,
                Err(error) => {
                    tried.push(loader_said(&error));
                    continue;
                }
            };
            // SAFETY: the types of the functions are those of nvrtc.h.
            match unsafe { Self::of(library) } {
                Ok(nvrtc) if nvrtc.version.0 < 12 || nvrtc.version.0 > newest => {
                    let (major, minor) = nvrtc.version;
                    tried.push(format!("{name}: of CUDA {major}.{minor}"));
                }
                Ok(nvrtc) => return Ok(nvrtc.with_builtins(&name)),
                Err(error) => tried.push(format!("{name}: {}", loader_said(&error))),
            }
        }
        Err(CudaError::NoCompiler { target: target.into(), newest, tried: tried.join("; ") })
    }

    /// # Safety
    /// The library is NVRTC.
    unsafe fn of(library: Library) -> Result<Self, libloading::Error> {
        // SAFETY: the caller's promise; each function has the type that nvrtc.h declares, and the library is kept.
        unsafe {
            let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int =
                *library.get(b"nvrtcVersion")?;
            let (mut major, mut minor) = (0, 0);
            version(&raw mut major, &raw mut minor);
            Ok(Self {
                create: *library.get(b"nvrtcCreateProgram")?,
                compile: *library.get(b"nvrtcCompileProgram")?,
                log_size: *library.get(b"nvrtcGetProgramLogSize")?,
                log: *library.get(b"nvrtcGetProgramLog")?,
                code_size: *library.get(b"nvrtcGetCUBINSize")?,
                code: *library.get(b"nvrtcGetCUBIN")?,
                destroy: *library.get(b"nvrtcDestroyProgram")?,
                text: *library.get(b"nvrtcGetErrorString")?,
                version: (major, minor),
                _library: library,
                _builtins: None,
            })
        }
    }

    /// Opens the library of built-in headers that lies beside `name`, where that is a path: NVRTC asks for it by name, and
    /// gets what is open.
    fn with_builtins(mut self, name: &str) -> Self {
        let (major, minor) = self.version;
        if let Some(folder) = Path::new(name).parent().filter(|folder| !folder.as_os_str().is_empty()) {
            let path = folder.join(format!("libnvrtc-builtins.so.{major}.{minor}"));
            // SAFETY: this library is data, and belongs to the one that is open. If it is not here, NVRTC says what it
            // misses.
            self._builtins = unsafe { Library::new(path) }.ok();
        }
        self
    }

    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// A cubin of `source`; the options name an architecture.
    pub fn compile(
        &self,
        source: Source<'_>,
        options: &[String],
        target: &str,
    ) -> Result<Vec<u8>, CudaError> {
        let refused = |code: c_int, log: String| {
            // SAFETY: the library gives a text without end for every number.
            let reason = unsafe { CStr::from_ptr((self.text)(code)) }.to_string_lossy().into_owned();
            let version = format!("{}.{}", self.version.0, self.version.1);
            let (file, target) = (source.name.to_string(), target.to_string());
            CudaError::Compile { version, file, target, reason, log }
        };
        let (text, name) = (c_string(source.text), c_string(source.name));
        let (names, texts): (Vec<CString>, Vec<CString>) =
            source.headers.iter().map(|(name, text)| (c_string(name), c_string(text))).unzip();
        let options: Vec<CString> = options.iter().map(|option| c_string(option)).collect();
        let mut program: Program = null_mut();
        let (texts, names, count) = (pointers(&texts), pointers(&names), source.headers.len() as c_int);
        let (texts, names) = if count == 0 { (null(), null()) } else { (texts.as_ptr(), names.as_ptr()) };
        // SAFETY: all strings end with a zero and outlive the program; the lists have `count` of them.
        let code =
            unsafe { (self.create)(&raw mut program, text.as_ptr(), name.as_ptr(), count, texts, names) };
        if code != 0 {
            return Err(refused(code, String::new()));
        }
        let program = Owned(self, program);
        let options = pointers(&options);
        // SAFETY: the program is alive, and the options are as many as is said.
        let code = unsafe { (self.compile)(program.1, options.len() as c_int, options.as_ptr()) };
        if code != 0 {
            let log = self.bytes(&program, self.log_size, self.log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_string();
            return Err(refused(code, log));
        }
        self.bytes(&program, self.code_size, self.code).map_err(|code| refused(code, String::new()))
    }

    /// What `get` writes, `size` bytes of it.
    fn bytes(&self, program: &Owned<'_>, size: Size, get: Get) -> Result<Vec<u8>, c_int> {
        let mut length = 0;
        // SAFETY: the program is alive.
        let code = unsafe { size(program.1, &raw mut length) };
        if code != 0 {
            return Err(code);
        }
        let mut bytes = vec![0u8; length];
        // SAFETY: the program is alive, and there are as many bytes as it said.
        match unsafe { get(program.1, bytes.as_mut_ptr().cast()) } {
            0 => Ok(bytes),
            code => Err(code),
        }
    }
}
