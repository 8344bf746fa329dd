//! GistNet's file: `gistnet.safetensors`.
//!
//! Tensors under the original's names, in f32; the metadata says what they are: `network` (`gistnet`), `format_version`,
//! `config` (the settings as JSON), `block` and `width` (K and E, for readers that look no further), and what it belongs to
//! ([`Identity`]): `base_fingerprint` (of the weights whose embeddings the gists live among), `gist_version`, and, but in
//! older files, `adapter_fingerprint` and `place_rule`. It is written whole or not at all, and the same network gives the
//! same bytes.
//!
//! Read strictly: see [`GistNet::load`]. A bare state dict of the original, saved as safetensors, has no metadata;
//! [`GistNet::load_weights`] reads it under settings that the caller states.
//!
//! Errors: `BaseError::Weights`, naming the file, what was expected and what it holds.

use std::path::Path;

use megacontext_base::error::Result;
use megacontext_base::network_file::{self, NetworkFile, Stated};
use megacontext_base::params::Group;

pub use megacontext_base::network_file::{Expected, Identity};

use crate::config::{GistNetConfig, NETWORK};
use crate::network::GistNet;

/// Version of the file's format.
pub const FORMAT_VERSION: u32 = 1;

/// A network from a file.
pub struct Loaded {
    /// The network, frozen, with its version stated.
    pub network: GistNet,
    /// What the file says besides.
    pub identity: Identity,
}

impl GistNet {
    /// Writes the network, as one that belongs to `identity`; the gist version is the network's own.
    ///
    /// # Errors
    /// When a parameter is not finite, or the system refuses; then whatever was there is still there.
    pub fn save(&self, path: &Path, identity: &Identity) -> Result<()> {
        let identity = Identity { gist_version: Some(self.gist_version()), ..identity.clone() };
        let stated = Stated {
            network: NETWORK,
            format_version: FORMAT_VERSION,
            block: self.config().block,
            width: self.config().width,
            identity: &identity,
        };
        network_file::write(path, self.params(), &stated.metadata(self.config())?)
    }

    /// Reads a file that [`GistNet::save`] wrote.
    ///
    /// # Errors
    /// When it is cut short, of another network or format, says nothing of its base or its version, has other K, E, another
    /// base, adapter or version than expected, or its tensors are not exactly those of its settings, each of its shape and
    /// finite.
    pub fn load(path: &Path, expected: Expected) -> Result<Loaded> {
        let file = NetworkFile::open(path)?;
        file.check_format(NETWORK, FORMAT_VERSION)?;
        let config: GistNetConfig = file.config("GistNet")?;
        file.stated("gist_version")?;
        let why = ": its gists live among the embeddings of that model";
        let identity = file.identity(expected, [config.block, config.width], "GistNet", why)?;
        let mut network = Self::read(&file, config)?;
        network.set_gist_version(identity.gist_version.unwrap_or_default());
        Ok(Loaded { network, identity })
    }

    /// Reads tensors alone, of a file whose metadata does not matter: a state dict of the original.
    ///
    /// # Errors
    /// When the file is cut short, or its tensors are not exactly those of these settings, each of its shape and finite.
    pub fn load_weights(path: &Path, config: GistNetConfig) -> Result<Self> {
        Self::read(&NetworkFile::open(path)?, config)
    }

    fn read(file: &NetworkFile, config: GistNetConfig) -> Result<Self> {
        config.check().map_err(|e| file.refuse(format!("metadata: config: {e}")))?;
        let params = file.parameters(config.tensors(), Group::Gistnet)?;
        Self::over(config, params)
    }
}
