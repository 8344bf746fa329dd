//! LensNet's file: `lensnet.safetensors`.
//!
//! Tensors under the original's names, in f32; the metadata says what they are: `network` (`lensnet`), `format_version`,
//! `config` (the settings as JSON), `block` and `width` (K and E), and what it belongs to ([`Identity`]): `base_fingerprint`
//! (of the weights among whose embeddings its entries lie), and where they are known `adapter_fingerprint`, `place_rule` and
//! the `gist_version` it learned from. Written whole or not at all, read strictly; the same network gives the same bytes.
//!
//! Errors: `BaseError::Weights`, naming the file, what was expected and what it holds.

use std::path::Path;

use megacontext_base::error::Result;
use megacontext_base::network_file::{self, NetworkFile, Stated};
use megacontext_base::params::Group;

pub use megacontext_base::network_file::{Expected, Identity};

use crate::config::{LensNetConfig, NETWORK};
use crate::network::LensNet;

/// Version of the file's format.
pub const FORMAT_VERSION: u32 = 1;

/// A network from a file.
pub struct Loaded {
    /// The network, frozen.
    pub network: LensNet,
    /// What it belongs to.
    pub identity: Identity,
}

impl LensNet {
    /// Writes the network, as one that belongs to `identity`.
    ///
    /// # Errors
    /// When a parameter is not finite, or the system refuses; then whatever was there is still there.
    pub fn save(&self, path: &Path, identity: &Identity) -> Result<()> {
        let stated = Stated {
            network: NETWORK,
            format_version: FORMAT_VERSION,
            block: self.config().block,
            width: self.config().width,
            identity,
        };
        let metadata = stated.metadata(self.config())?;
        network_file::write(path, self.params(), &metadata)
    }

    /// Reads a file that [`LensNet::save`] wrote.
    ///
    /// # Errors
    /// When it is cut short, of another network or format, says nothing of its base, has other K, E, another base,
    /// adapter or gist version than expected, or its tensors are not exactly those of its settings, each of its shape and finite.
    pub fn load(path: &Path, expected: Expected) -> Result<Loaded> {
        let file = NetworkFile::open(path)?;
        file.check_format(NETWORK, FORMAT_VERSION)?;
        let config: LensNetConfig = file.config("LensNet")?;
        let identity = file.identity(expected, [config.block, config.width], "LensNet", "")?;
        Ok(Loaded { network: Self::read(&file, config)?, identity })
    }

    /// Reads tensors alone, of a file whose metadata does not matter: a state dict of the original.
    ///
    /// # Errors
    /// When the file is cut short, or its tensors are not exactly those of these settings, each of its shape and finite.
    pub fn load_weights(path: &Path, config: LensNetConfig) -> Result<Self> {
        Self::read(&NetworkFile::open(path)?, config)
    }

    fn read(file: &NetworkFile, config: LensNetConfig) -> Result<Self> {
        config.check().map_err(|e| file.refuse(format!("metadata: config: {e}")))?;
        let params = file.parameters(config.tensors(), Group::Lensnet)?;
        Self::over(config, params)
    }
}
