//! The weights of a small network (GistNet, LensNet) in one safetensors file, with what they are for in its metadata.
//!
//! Written whole or not at all ([`crate::atomic`]), tensors and metadata in order of name, so that the same network gives the
//! same bytes. Read strictly: every tensor that the network has, of its shape and finite, and no other.
//!
//! What a network belongs to ([`Identity`]) stands in the metadata: `base_fingerprint`; `adapter_fingerprint` of what was on
//! the base ([`crate::decoder::Decoder::adapter_fingerprint`], or `none`); `place_rule`, where entries stood; `gist_version`.
//! A file without the latter three is read as one that does not say: older ones do not.
//! Source: the safetensors format; values of its `__metadata__` are strings.
//! Errors: `BaseError::Weights`, naming file and tensor.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::atomic;
use crate::error::{BaseError, Result};
use crate::params::{Group, ParamStore};
use crate::rope::SigmaRule;
use crate::weights::MappedFile;

/// The fingerprint of an adapter where there is none.
pub const NO_ADAPTER: &str = "none";

/// What a network belongs to: what it learned beside.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Identity {
    /// Fingerprint of the base model's weights.
    pub base_fingerprint: String,
    /// Fingerprint of the adapter that was on them, or [`NO_ADAPTER`]; none where it is not stated.
    pub adapter_fingerprint: Option<String>,
    /// Where entries stood, and how vaguely; none where it is not stated.
    pub place_rule: Option<SigmaRule>,
    /// Version of the gists that it makes, or that it learned from; none where it is not stated.
    pub gist_version: Option<u16>,
}

impl Identity {
    /// Of a network for the base model of this fingerprint, which states nothing else.
    pub fn of_base(fingerprint: &str) -> Self {
        Self { base_fingerprint: fingerprint.to_string(), ..Self::default() }
    }

    /// Refuses the network `what` of the file at `path` where it states another adapter than the one of this fingerprint.
    ///
    /// # Errors
    /// As said.
    pub fn check_adapter(&self, wanted: &str, what: &str, path: &Path) -> Result<()> {
        match &self.adapter_fingerprint {
            Some(found) if found != wanted => {
                let message = format!(
                    "expected a {what} that was trained beside {}, got one that was trained beside {}: put on the base model \
                     what it was trained beside, or train another {what}",
                    adapter_called(wanted),
                    adapter_called(found)
                );
                Err(BaseError::weights(path, message))
            }
            _ => Ok(()),
        }
    }
}

/// What a caller asks of a file; what is none is not asked for, and a file that does not state it is not refused.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expected<'a> {
    /// K.
    pub block: Option<usize>,
    /// E: the base model's width.
    pub width: Option<usize>,
    /// Fingerprint of the base model's weights, which every file states.
    pub base_fingerprint: Option<&'a str>,
    /// Fingerprint of the adapter on them, or [`NO_ADAPTER`].
    pub adapter_fingerprint: Option<&'a str>,
    /// Version of the gists.
    pub gist_version: Option<u16>,
}

/// What a file says of its network, whichever it is.
#[derive(Clone, Copy, Debug)]
pub struct Stated<'a> {
    /// `gistnet` or `lensnet`.
    pub network: &'static str,
    /// Version of the file's format.
    pub format_version: u32,
    /// K.
    pub block: usize,
    /// E.
    pub width: usize,
    /// What it belongs to.
    pub identity: &'a Identity,
}

impl Stated<'_> {
    /// The metadata of a network with these settings.
    ///
    /// # Errors
    /// When the settings are no JSON.
    pub fn metadata(&self, config: &impl Serialize) -> Result<BTreeMap<String, String>> {
        let config = serde_json::to_string(config)
            .map_err(|e| BaseError::network(self.network, format!("settings: {e}")))?;
        let identity = self.identity;
        let mut metadata = vec![
            ("format", "pt".to_string()),
            ("network", self.network.to_string()),
            ("format_version", self.format_version.to_string()),
            ("config", config),
            ("block", self.block.to_string()),
            ("width", self.width.to_string()),
            ("base_fingerprint", identity.base_fingerprint.clone()),
        ];
        metadata.extend(identity.adapter_fingerprint.clone().map(|adapter| ("adapter_fingerprint", adapter)));
        metadata.extend(identity.place_rule.map(|rule| ("place_rule", json!(rule).to_string())));
        metadata.extend(identity.gist_version.map(|version| ("gist_version", version.to_string())));
        Ok(metadata.into_iter().map(|(key, value)| (key.to_string(), value)).collect())
    }
}

/// An opened file whose header has been checked.
pub struct NetworkFile {
    file: MappedFile,
}

impl NetworkFile {
    /// Opens a file.
    ///
    /// # Errors
    /// When there is none, or it is no complete safetensors file.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { file: MappedFile::open(path)? })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// An entry of the metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.file.metadata()?.get(key).map(String::as_str)
    }

    /// An entry of the metadata that has to be there.
    ///
    /// # Errors
    /// When it is not.
    pub fn stated(&self, key: &str) -> Result<&str> {
        let missing = || self.refuse(format!("metadata: expected {key}, there is none: no network of ours"));
        self.metadata(key).ok_or_else(missing)
    }

    /// Refuses a file of another network or of another version of its format.
    ///
    /// # Errors
    /// As said.
    pub fn check_format(&self, network: &str, version: u32) -> Result<()> {
        for (key, wanted) in [("network", network), ("format_version", &version.to_string())] {
            let found = self.stated(key)?;
            if found != wanted {
                return Err(self.refuse(format!("metadata: expected {key} {wanted}, got {found}")));
            }
        }
        Ok(())
    }

    /// The settings of `what`.
    ///
    /// # Errors
    /// When they are missing, or no such settings.
    pub fn config<T: DeserializeOwned>(&self, what: &str) -> Result<T> {
        let refuse = |e| self.refuse(format!("metadata: config: expected settings of a {what}: {e}"));
        serde_json::from_str(self.stated("config")?).map_err(refuse)
    }

    /// What the network belongs to, refused where it is not what was expected, K and E among it. `what` is the network, `why`
    /// ends the message about the base.
    ///
    /// # Errors
    /// As said; when the file says nothing of its base, or something that no network of ours says.
    pub fn identity(
        &self,
        expected: Expected,
        [block, width]: [usize; 2],
        what: &str,
        why: &str,
    ) -> Result<Identity> {
        for (key, wanted, found) in [("block", expected.block, block), ("width", expected.width, width)] {
            if let Some(wanted) = wanted.filter(|wanted| *wanted != found) {
                return Err(self.refuse(format!("{key}: expected {wanted}, got a network of {found}")));
            }
        }
        let base = self.stated("base_fingerprint")?;
        if let Some(wanted) = expected.base_fingerprint.filter(|wanted| *wanted != base) {
            let message = format!("expected a {what} of the base model {wanted}, got one of {base}{why}");
            return Err(self.refuse(message));
        }
        let gist_version = self.metadata("gist_version").map(|stated| {
            let refuse =
                |_| self.refuse(format!("metadata: gist_version: expected 0 to {}, got {stated}", u16::MAX));
            stated.parse::<u16>().map_err(refuse)
        });
        let gist_version: Option<u16> = gist_version.transpose()?;
        if let Some((wanted, found)) = expected.gist_version.zip(gist_version).filter(|(a, b)| a != b) {
            return Err(
                self.refuse(format!("expected a {what} of gist version {wanted}, got one of {found}"))
            );
        }
        let place_rule = self.metadata("place_rule").map(|stated| {
            serde_json::from_str(stated).map_err(|e| {
                self.refuse(format!(
                    "metadata: place_rule: expected preset, block and uniform, got {stated}: {e}"
                ))
            })
        });
        let identity = Identity {
            base_fingerprint: base.to_string(),
            adapter_fingerprint: self.metadata("adapter_fingerprint").map(str::to_string),
            place_rule: place_rule.transpose()?,
            gist_version,
        };
        match expected.adapter_fingerprint {
            None => Ok(identity),
            Some(wanted) => identity.check_adapter(wanted, what, self.path()).map(|()| identity),
        }
    }

    /// The given tensors as parameters of a group.
    ///
    /// # Errors
    /// As [`NetworkFile::read`].
    pub fn parameters(&self, tensors: Vec<(String, Vec<usize>)>, group: Group) -> Result<ParamStore> {
        let values = self.read(&tensors)?;
        let mut params = ParamStore::new();
        for ((name, shape), values) in tensors.into_iter().zip(values) {
            params.insert_values(name, group, values, &shape)?;
        }
        Ok(params)
    }

    /// An error that blames this file.
    pub fn refuse(&self, message: impl Into<String>) -> BaseError {
        BaseError::weights(self.path(), message)
    }

    /// The values of the given tensors in their order, in f32.
    ///
    /// # Errors
    /// When one is missing, of another shape, not floating, or not finite; when there is a tensor that was not asked for.
    pub fn read(&self, expected: &[(String, Vec<usize>)]) -> Result<Vec<Vec<f32>>> {
        let mut others = self.file.names();
        others.retain(|name| !expected.iter().any(|(wanted, _)| wanted == name));
        others.sort();
        if let Some(other) = others.first() {
            let message = "expected only tensors of this network, it has none of this name";
            return Err(BaseError::tensor(self.path(), other, message));
        }
        let values = |(name, shape): &(String, Vec<usize>)| match self.file.shape(name) {
            None => {
                Err(BaseError::tensor(self.path(), name, "expected this tensor, there is none of this name"))
            }
            Some(found) if found != shape => {
                let message = format!("expected shape {shape:?}, got {found:?}");
                Err(BaseError::tensor(self.path(), name, message))
            }
            Some(_) => self.file.read::<f32>(name),
        };
        expected.iter().map(values).collect()
    }
}

/// An adapter by its fingerprint, in words.
pub fn adapter_called(fingerprint: &str) -> String {
    match fingerprint {
        NO_ADAPTER => "the base model alone".to_string(),
        other => format!("the adapter {}…", other.chars().take(12).collect::<String>()),
    }
}

/// Writes every parameter of `params`, in f32, and `metadata`.
///
/// # Errors
/// When a parameter is not finite, or the system refuses; then whatever was there is still there.
pub fn write(path: &Path, params: &ParamStore, metadata: &BTreeMap<String, String>) -> Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".to_string(), json!(metadata));
    let mut offset = 0;
    for name in params.names() {
        let values = params.values(name)?.to_f32();
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let message = format!("expected finite values, got {} at place {at}", values[at]);
            return Err(BaseError::Parameter { name: name.to_string(), message });
        }
        let end = offset + 4 * values.len();
        let shape = params.shape(name).unwrap_or(&[]);
        header
            .insert(name.to_string(), json!({"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut header =
        serde_json::to_vec(&Value::Object(header)).map_err(|e| BaseError::weights(path, e.to_string()))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    atomic::write_file_with(path, |file| {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let io = |result: std::io::Result<()>| result.map_err(BaseError::io(path));
        io(out.write_all(&(header.len() as u64).to_le_bytes()))?;
        io(out.write_all(&header))?;
        for name in params.names() {
            for value in params.values(name)?.to_f32() {
                io(out.write_all(&value.to_le_bytes()))?;
            }
        }
        io(out.flush())
    })
}
