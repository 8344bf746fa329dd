//! What a host compiles against to use the MegaContext LoRA plugin: a loader, a session, callbacks, tensor views.
//!
//! The plugin is a shared library built by another compiler run, perhaps another compiler. So nothing of Rust's own
//! unstable ABI crosses: every type's layout is checked when the library is opened (abi_stable), numbers cross as borrowed
//! views or DLPack tensors, requests and answers as JSON, and no panic crosses in either direction. This crate does not
//! know candle.
//!
//! # A host in a few lines
//!
//! ```no_run
//! use megacontext_lora_abi::{LoadOptions, Plugin, loader};
//! use serde_json::json;
//!
//! let path = loader::find_beside_executable().expect("the plugin lies beside this program");
//! let plugin = Plugin::load(path, &LoadOptions::default())?;
//! let session = plugin.open_session(&json!({ "base": "models/tiny-llama" }), ())?;
//! println!("{}", session.describe()?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | You want to | Use |
//! |---|---|
//! | run a whole job (extend, evaluate, merge) | [`Session::run`] |
//! | see its progress, stop it | [`Host`] |
//! | run a working context yourself | [`Session::logits`], [`Session::nll`] with a [`ContextView`] |
//! | switch between adapters of one base | [`Session::load_adapter`], [`Session::set_adapter`], [`Session::merge_adapter`] |
//! | drive the training yourself | [`Session::enter_phase`], [`Session::step`], [`Session::leave_phase`] |
//! | keep a history with its gists, and choose what of it the model sees | [`Session::open_tree`], [`Session::open_lens`], [`Session::refocus`] |
//! | choose that yourself | [`Session::focus_scores`], [`Host::allocate`] |
//! | own the forward pass | [`Session::embed`], [`Session::rope_tables`], [`Session::lora_delta`], [`Session::parameter`] |
//! | read what a running job has learned | [`Host::parameters`] |
//! | implement a plugin | [`raw`], [`parameters`] |
//!
//! Errors: loading fails with [`LoadError`], everything after that with [`AbiError`].
//!
//! Views and owned tensors can lie on a GPU ([`TensorView::from_cuda`], [`OwnedTensor::of_cuda_owner`]) with an explicit stream;
//! the plugin takes views of the CPU and of the GPU that a session's passes run on, and refuses others before anything is changed.

pub mod context;
pub mod dlpack;
pub mod error;
pub mod host;
pub mod loader;
pub mod parameters;
pub mod raw;
pub mod session;
pub mod tensor;

pub use context::{ContextView, EntriesView, NO_TARGET};
pub use dlpack::OwnedTensor;
pub use error::{AbiError, ErrorKind};
pub use host::{Answer, Host};
pub use loader::{BuildInfo, LoadError, LoadOptions, Plugin};
pub use parameters::JobParameters;
pub use session::Session;
pub use tensor::{DType, Device, DeviceKind, Stream, TensorError, TensorView, TensorViewMut};

/// Raised by every change to the ABI that is not an addition at the end.
/// 2: tensor views carry a stream.
pub const ABI_REVISION: u32 = 2;

/// What a plugin of this crate says of itself.
pub const VERSION_LINE: &str = concat!("megacontext-lora-abi ", env!("CARGO_PKG_VERSION"), " revision 2");

/// The C symbol under which a plugin exports its version line: NUL-terminated bytes.
pub const VERSION_SYMBOL: &str = "megacontext_lora_abi_line";

/// [`VERSION_LINE`] with its NUL, for a plugin to export as a `static`.
pub const VERSION_BYTES: [u8; VERSION_LINE.len() + 1] = {
    let mut bytes = [0; VERSION_LINE.len() + 1];
    let mut i = 0;
    while i < VERSION_LINE.len() {
        bytes[i] = VERSION_LINE.as_bytes()[i];
        i += 1;
    }
    bytes
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_the_revision() {
        assert!(VERSION_LINE.ends_with(&format!(" revision {ABI_REVISION}")));
        assert_eq!(&VERSION_BYTES[..VERSION_LINE.len()], VERSION_LINE.as_bytes());
        assert_eq!(VERSION_BYTES[VERSION_LINE.len()], 0);
    }
}
