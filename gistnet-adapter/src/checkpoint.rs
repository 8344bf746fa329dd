//! GistNet's file: `gistnet.safetensors`.
//!
//! Tensors under the original's names, in f32; the metadata says what they are: `network` (`gistnet`), `format_version`,
//! `config` (the settings as JSON), `block` and `width` (K and E, for readers that look no further), `base_fingerprint` (of
//! the weights whose embeddings the gists live among) and `gist_version`. It is written whole or not at all, and the same
//! network gives the same bytes.
//!
//! Read strictly: see [`GistNet::load`]. A bare state dict of the original, saved as safetensors, has no metadata;
//! [`GistNet::load_weights`] reads it under settings that the caller states.
//!
//! Errors: `BaseError::Weights`, naming the file, what was expected and what it holds.

use std::collections::BTreeMap;
use std::path::Path;

use megacontext_base::error::{BaseError, Result};
use megacontext_base::network_file::{self, NetworkFile};
use megacontext_base::params::{Group, ParamStore};

use crate::config::{GistNetConfig, NETWORK};
use crate::network::GistNet;

/// Version of the file's format.
pub const FORMAT_VERSION: u32 = 1;

/// What a caller asks of a file; what is none is not asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expected<'a> {
    /// K.
    pub block: Option<usize>,
    /// E: the base model's width.
    pub width: Option<usize>,
    /// Fingerprint of the base model's weights.
    pub base_fingerprint: Option<&'a str>,
}

/// Whose gists a network makes, and which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Fingerprint of the base model's weights.
    pub base_fingerprint: String,
    /// Version of the gists.
    pub gist_version: u16,
}

/// A network from a file.
pub struct Loaded {
    /// The network, frozen, with its version stated.
    pub network: GistNet,
    /// What the file says besides.
    pub identity: Identity,
}

impl GistNet {
    /// Writes the network, as one for the base model of this fingerprint.
    ///
    /// # Errors
    /// When a parameter is not finite, or the system refuses; then whatever was there is still there.
    pub fn save(&self, path: &Path, base_fingerprint: &str) -> Result<()> {
        let config = serde_json::to_string(self.config())
            .map_err(|e| BaseError::network(NETWORK, format!("settings: {e}")))?;
        let metadata: BTreeMap<String, String> = [
            ("format", "pt".to_string()),
            ("network", NETWORK.to_string()),
            ("format_version", FORMAT_VERSION.to_string()),
            ("config", config),
            ("block", self.config().block.to_string()),
            ("width", self.config().width.to_string()),
            ("base_fingerprint", base_fingerprint.to_string()),
            ("gist_version", self.gist_version().to_string()),
        ]
        .map(|(key, value)| (key.to_string(), value))
        .into();
        network_file::write(path, self.params(), &metadata)
    }

    /// Reads a file that [`GistNet::save`] wrote.
    ///
    /// # Errors
    /// When it is cut short, of another network or format, says nothing of its base, has other K, E or another base than
    /// expected, or its tensors are not exactly those of its settings, each of its shape and finite.
    pub fn load(path: &Path, expected: Expected) -> Result<Loaded> {
        let file = NetworkFile::open(path)?;
        file.check_format(NETWORK, FORMAT_VERSION)?;
        let config: GistNetConfig = serde_json::from_str(file.stated("config")?)
            .map_err(|e| file.refuse(format!("metadata: config: expected settings of a GistNet: {e}")))?;
        let base_fingerprint = file.stated("base_fingerprint")?.to_string();
        let gist_version = file.stated("gist_version")?;
        let gist_version: u16 = gist_version.parse().map_err(|_| {
            file.refuse(format!("metadata: gist_version: expected 0 to 65535, got {gist_version}"))
        })?;
        let sides = [("block", expected.block, config.block), ("width", expected.width, config.width)];
        for (key, wanted, found) in sides {
            if let Some(wanted) = wanted.filter(|wanted| *wanted != found) {
                return Err(file.refuse(format!("{key}: expected {wanted}, got a network of {found}")));
            }
        }
        if let Some(wanted) = expected.base_fingerprint
            && wanted != base_fingerprint
        {
            let message = format!(
                "expected a GistNet of the base model {wanted}, got one of {base_fingerprint}: its gists live among the \
                 embeddings of that model"
            );
            return Err(file.refuse(message));
        }
        let mut network = Self::read(&file, config)?;
        network.set_gist_version(gist_version);
        Ok(Loaded { network, identity: Identity { base_fingerprint, gist_version } })
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
        let tensors = config.tensors();
        let values = file.read(&tensors)?;
        let mut params = ParamStore::new();
        for ((name, shape), values) in tensors.into_iter().zip(values) {
            params.insert_values(name, Group::Gistnet, values, &shape)?;
        }
        Self::over(config, params)
    }
}
