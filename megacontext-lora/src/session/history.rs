//! A session's history: a gist tree that a host appends tokens to, and the GistNet that makes its gists.
//!
//! Source: MegaContext's tree, as `megacontext_base::context` has it. There is one history at a time; [`Session::open_tree`]
//! begins it, empty or as it was stored, and drops the one before. It is apart from phases: the network is frozen here, and
//! a host reads gists while a phase is open.
//!
//! Gists are made of the embeddings that the model has at the time. Where those have become others since (a phase trained
//! them, another adapter is in use), the newest whole block shows it: its gist is made again before every append, and a
//! history whose tokens it no longer stands for has to be begun anew.
//!
//! A network states what it learned beside: an adapter, and where entries stood. Another adapter than what is in use now is
//! refused unless the host says that it wants the network all the same, and so are other places than those of the
//! session's positions.
//!
//! Shapes: N blocks or nodes, K entries of a block, E model width. Units: tokens.
//! Errors: `Usage` for what does not fit, with what was expected, and where no history is open; `Model` for files. The
//! history is then what it was.
//!
//! Left out on purpose: training the network; choosing a working context, which is `lens`.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLockReadGuard, RwLockWriteGuard};

use gistnet_adapter::{Expected, GistNet, Identity};
use megacontext_base::context::{
    BaseModel, GistDtype, GistTree, Hierarchy, Node, StoreOptions, TreeFolder, WorkingContext, write_tree,
};
use megacontext_base::rope::SigmaRule;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::lens::Lens;
use super::{Loaded, Session, size};
use crate::error::{PluginError, Result};
use crate::jobs::device::network_beside;
use crate::jobs::{model_error, parse};
use crate::train::gistnet::PlaceSettings;

/// How far the gist of the newest block may be from what it was, relative to its own size ([`GistTree::verify`]). The same
/// embeddings give the same bytes; LoRA merged into them rounds them.
const SAME: f32 = 1e-3;
/// The same where 16 bits round: gists that were stored in them, embeddings that LoRA was merged into in class bf16.
const SAME_ROUNDED: f32 = 2e-2;

/// The history of a session.
pub(super) struct History {
    pub(super) network: GistNet,
    network_path: PathBuf,
    pub(super) tree: GistTree,
    /// [`SAME`] or [`SAME_ROUNDED`].
    tolerance: f32,
    /// What scores working contexts over it.
    pub(super) lens: Option<Lens>,
    /// The working context that the session edits.
    pub(super) context: Option<WorkingContext>,
    /// Tells this history with its LensNet from those that come later.
    pub(super) id: Arc<()>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OpenTree {
    /// `gistnet.safetensors`.
    network: PathBuf,
    /// Levels above the tokens of a new history; a stored one has its own.
    levels: Option<u8>,
    /// What the base is called in files; none means the name of its folder.
    name: Option<String>,
    /// Folder of a stored history.
    stored: Option<PathBuf>,
    /// Whether gists of earlier versions are made anew; else they are refused.
    #[serde(default)]
    refresh: bool,
    /// Take a network that was trained beside another adapter than what is on the base now.
    #[serde(default)]
    other_adapter: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SaveTree {
    path: PathBuf,
    #[serde(default)]
    dtype: GistDtype,
    /// Nothing is going to be appended.
    #[serde(default)]
    complete: bool,
}

/// Refuses a network whose entries stood otherwise than those of the session do.
pub(super) fn check_places(call: &str, stated: Option<SigmaRule>, own: SigmaRule) -> Result<()> {
    let Some(stated) = stated else { return Ok(()) };
    let (trained, now) = (PlaceSettings::from(stated), PlaceSettings::from(own));
    if trained.same_as(now) {
        return Ok(());
    }
    Err(PluginError::usage(format!(
        "{call}: expected a network trained with the places of the session's positions ({now}), got one trained with \
         {trained}: open the session with such positions.sigma, or train another network"
    )))
}

/// Refuses the network `what` where it states another adapter than what is on the base now.
pub(super) fn check_adapter(identity: &Identity, loaded: &Loaded, what: &str, path: &Path) -> Result<()> {
    if identity.adapter_fingerprint.is_none() {
        return Ok(());
    }
    identity.check_adapter(&loaded.adapter_fingerprint()?, what, path).map_err(|error| {
        let error = model_error(error);
        let message = format!("{}; other_adapter = true takes it all the same", error.message);
        PluginError { message, ..error }
    })
}

pub(super) fn none_open(call: &str) -> PluginError {
    PluginError::usage(format!("{call}: expected an open history, there is none; open_tree begins one"))
}

impl History {
    fn new(network: GistNet, network_path: PathBuf, tree: GistTree, tolerance: f32) -> Self {
        Self { network, network_path, tree, tolerance, lens: None, context: None, id: Arc::default() }
    }

    fn describe(&self) -> Value {
        let (tree, version) = (&self.tree, self.network.gist_version());
        let nodes: Map<String, Value> = (1..=tree.hierarchy().levels())
            .map(|lod| (format!("LOD{lod}"), tree.nodes(lod).into()))
            .collect();
        json!({
            "tokens": tree.len(),
            "block": tree.hierarchy().block(),
            "width": tree.width(),
            "levels": tree.hierarchy().levels(),
            "nodes": nodes,
            "gist_version": version,
            "stale": tree.stale(version),
            "base": { "name": tree.base().name, "fingerprint": tree.base().fingerprint },
            "network": self.network_path,
            "lens": self.lens.as_ref().map(|lens| &lens.path),
            "working_context": self.context.as_ref().map(WorkingContext::cost),
        })
    }

    /// Refuses where the newest whole block's gist would be another now.
    pub(super) fn check_embeddings(&self, call: &str, loaded: &Loaded) -> Result<()> {
        let Some(last) = self.tree.nodes(1).checked_sub(1) else { return Ok(()) };
        let newest = Node { lod: 1, index: last };
        let span = self.tree.hierarchy().tokens(newest);
        self.tree.verify(span, &loaded.decoder, &self.network, self.tolerance).map(drop).map_err(|error| {
            PluginError::usage(format!(
                "{call}: expected the network and the embeddings that made the history's gists, but they make others now: \
                 open_tree begins it anew ({error})"
            ))
        })
    }
}

impl Session {
    pub(super) fn history(&self) -> RwLockReadGuard<'_, Option<History>> {
        self.history.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn history_mut(&self) -> RwLockWriteGuard<'_, Option<History>> {
        self.history.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// K and E of the open history, for `call`.
    pub fn tree_sizes(&self, call: &str) -> Result<(usize, usize)> {
        let guard = self.history();
        let tree = &guard.as_ref().ok_or_else(|| none_open(call))?.tree;
        Ok((tree.hierarchy().block(), tree.width()))
    }

    /// Begins a history: `{network, levels, name, stored, refresh, other_adapter}`, all but `network` optional. The network has
    /// to be one of this base, trained beside what is on it now (unless `other_adapter` is true) and with the places of the
    /// session's positions. Returns its description: `tokens`, `block`, `width`, `levels`, `nodes` by level, `gist_version`,
    /// `stale` nodes, `base`, `network`, `lens` and entries of the `working_context` where there are such.
    pub fn open_tree(&self, params: Value) -> Result<Value> {
        let OpenTree { network: path, levels, name, stored, refresh, other_adapter } = parse(params)?;
        let l = self.read()?;
        let fingerprint = l.model.weights.fingerprint();
        let expected = Expected {
            block: None,
            width: Some(l.decoder.config().hidden_size),
            base_fingerprint: Some(&fingerprint),
            ..Expected::default()
        };
        let loaded = GistNet::load(&path, expected).map_err(model_error)?;
        if !other_adapter {
            check_adapter(&loaded.identity, &l, "GistNet", &path)?;
        }
        check_places("open_tree", loaded.identity.place_rule, l.model.config.positions.sigma)?;
        let mut network = loaded.network;
        let placed = network.set_device(l.decoder.device());
        let folder = || Some(l.dir.canonicalize().ok()?.file_name()?.to_string_lossy().into_owned());
        let name = name.or_else(folder).unwrap_or_else(|| "base".to_string());
        let base = BaseModel { name, fingerprint: fingerprint.clone() };
        let rounds = l.decoder.precision().stores_bf16();
        let same = |stored_narrow: bool| if stored_narrow || rounds { SAME_ROUNDED } else { SAME };
        let mut history = match stored {
            None => {
                let hierarchy =
                    Hierarchy::new(network.config().block, levels.unwrap_or(2)).map_err(model_error)?;
                let tree = GistTree::new(hierarchy, network.config().width, base).map_err(model_error)?;
                History::new(network, path, tree, same(false))
            }
            Some(dir) => {
                let folder = TreeFolder::open(&dir).map_err(model_error)?;
                let has = folder.hierarchy().levels();
                if let Some(levels) = levels.filter(|levels| *levels != has) {
                    return Err(PluginError::usage(format!(
                        "open_tree: levels: expected {has}, as the stored history has, got {levels}"
                    )));
                }
                if !refresh {
                    folder.check_source(&network).map_err(model_error)?;
                }
                let tree = folder.load(&base).map_err(model_error)?;
                let narrow = folder.file(1).is_some_and(|file| file.header().dtype != Some(GistDtype::F32));
                History::new(network, path, tree, same(narrow))
            }
        };
        if refresh {
            history.tree.refresh(.., &l.decoder, &history.network).map_err(model_error)?;
        }
        history.check_embeddings("open_tree", &l)?;
        let described = history.describe();
        *self.history_mut() = Some(history);
        // The host may ask the session when it is told.
        drop(l);
        network_beside("GistNet", placed, &*self.host);
        Ok(described)
    }

    /// Adds tokens to the history and makes every gist that they complete. Returns its description, and under `made` how
    /// many nodes each level got.
    pub fn tree_append(&self, tokens: &[u32]) -> Result<Value> {
        let l = self.read()?;
        l.check_tokens(tokens)?;
        let mut guard = self.history_mut();
        let history = guard.as_mut().ok_or_else(|| none_open("tree_append"))?;
        history.check_embeddings("tree_append", &l)?;
        let made = history.tree.append(tokens, &l.decoder, &history.network).map_err(model_error)?;
        let mut described = history.describe();
        described["made"] = json!(made);
        Ok(described)
    }

    /// The gists of nodes `first` … of a level into `out`, [N, E].
    pub fn tree_gists(&self, lod: u32, first: u64, out: &mut [f32]) -> Result<()> {
        let guard = self.history();
        let tree = &guard.as_ref().ok_or_else(|| none_open("tree_gists"))?.tree;
        let width = tree.width();
        let levels = tree.hierarchy().levels();
        let Some(lod) = u8::try_from(lod).ok().filter(|lod| (1..=levels).contains(lod)) else {
            return Err(PluginError::usage(format!("tree_gists: lod: expected 1 to {levels}, got {lod}")));
        };
        size("tree_gists: out, rows of the model's width", out.len() / width * width, out.len())?;
        let (nodes, n) = (tree.nodes(lod), (out.len() / width) as u64);
        let Some(end) = first.checked_add(n).filter(|end| *end <= nodes) else {
            return Err(PluginError::usage(format!(
                "tree_gists: expected a range of the {nodes} nodes of level {lod}, got {n} from {first} on"
            )));
        };
        out.copy_from_slice(&tree.gists(lod)[first as usize * width..end as usize * width]);
        Ok(())
    }

    /// The gists of blocks, `entries` [N, K, E], into `out`, [N, E]. The entries are of level `lod`: embeddings of tokens, 0,
    /// or gists. One network makes those of every level.
    pub fn gists(&self, entries: &[f32], lod: u32, out: &mut [f32]) -> Result<()> {
        let guard = self.history();
        let history = guard.as_ref().ok_or_else(|| none_open("gists"))?;
        let config = history.network.config();
        let levels = u32::from(history.tree.hierarchy().levels());
        if lod >= levels {
            return Err(PluginError::usage(format!(
                "gists: lod: expected entries below level {levels}, the topmost, got {lod}"
            )));
        }
        let each = config.block * config.width;
        if !entries.len().is_multiple_of(each) {
            return Err(PluginError::usage(format!(
                "gists: expected blocks of {} entries of width {}, got {} values",
                config.block,
                config.width,
                entries.len()
            )));
        }
        let blocks = entries.len() / each;
        size("gists: out", blocks * config.width, out.len())?;
        if let Some(bad) = entries.iter().find(|v| !v.is_finite()) {
            return Err(PluginError::usage(format!("gists: entries: expected finite numbers, got {bad}")));
        }
        if blocks > 0 {
            out.copy_from_slice(&history.network.gists(entries, blocks).map_err(model_error)?);
        }
        Ok(())
    }

    /// Stores the history in a folder of its own: `{path, dtype, complete}`, dtype `f16` (the default), `bf16` or `f32`.
    pub fn save_tree(&self, params: Value) -> Result<Value> {
        let SaveTree { path, dtype, complete } = parse(params)?;
        let guard = self.history();
        let history = guard.as_ref().ok_or_else(|| none_open("save_tree"))?;
        let options = StoreOptions {
            dtype,
            gistnet_checkpoint: Some(history.network_path.display().to_string()),
            ingestion_complete: complete,
            ..StoreOptions::default()
        };
        write_tree(Path::new(&path), &history.tree, &options).map_err(model_error)?;
        let mut described = history.describe();
        described["path"] = json!(path);
        Ok(described)
    }
}
