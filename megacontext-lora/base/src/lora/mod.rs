//! LoRA: low-rank updates of frozen weights.
//!
//! Sources: LoRA (Hu et al. 2021), h = W·x + s·B·A·x with s = alpha/r; rsLoRA (Kalajdzievski 2023), s = alpha/√r; DoRA (Liu et
//! al. 2024) and PiSSA (Meng et al. 2024), whose formulas are [`megacontext_kernels::linear`]'s. An embedding E [V, D]
//! becomes E + s·(B·A)ᵀ with A [r, V] and B [D, r] (as PEFT has it); rows of tokens that learn alone replace the table's
//! (PEFT's trainable tokens). What is meant by names and patterns is `names`' to say, first values are `init`'s, and the
//! whole change of a weight is [`delta`]'s.
//!
//! [`LoraConfig`] is what a user says, [`LoraModule`] what it comes to on one model, and what all code works with.
//!
//! A tied head: with `ensure_weight_tying` what an embedding learns moves the head too, so that the model stays tied (the head
//! then is a linear layer with A' = Bᵀ and B' = Aᵀ). Without, the head stays at the base's values, as in PEFT.
//!
//! Shapes: r rank, A [r, in], B [out, r]; for an embedding in is V and out is D. Values f32.
//! Errors: rank 0, an unknown target, a block that does not exist, a pattern that means nothing, magnitudes where there are
//! none; each `BaseError::Lora`.
//! Left out: DoRA on embeddings and on the output head, PiSSA on the head, both at once.

mod delta;
mod init;
mod names;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub(crate) use self::delta::lengths;
pub use self::delta::{changed, delta};
pub use self::init::{LoraInit, plain};
use self::names::Matcher;
pub use self::names::{ALL_ATTENTION, ALL_LINEAR, Layers, Names, Patterns};
use crate::config::DecoderConfig;
use crate::error::{BaseError, Result};
use crate::params::ParamStore;

/// Where LoRA goes and how strong it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// Strength: the update is scaled by alpha / r.
    pub alpha: f64,
    /// Probability with which an input of A is zeroed while training.
    pub dropout: f64,
    /// The layers that carry LoRA: ends of names such as `q_proj`, a regular expression, `all-linear` or `all-attention`.
    pub target_modules: Names,
    /// Layers that do not, although `target_modules` means them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<Names>,
    /// Blocks that carry LoRA: numbers, `first:COUNT` or `last:COUNT`; none means all. What lies in no block is left out.
    pub layers: Option<Layers>,
    /// Name of the list of blocks, where `layers` counts another one's; none means any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_pattern: Option<Names>,
    /// Ranks of layers that differ from `r`, by pattern.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    pub rank_pattern: Patterns<usize>,
    /// Strengths of layers that differ from `alpha`, by pattern.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    pub alpha_pattern: Patterns<f64>,
    /// rsLoRA: the update is scaled by alpha / √r.
    pub use_rslora: bool,
    /// DoRA: the lengths of a weight's rows learn by themselves.
    pub use_dora: bool,
    /// First values of the factors.
    pub init: LoraInit,
    /// Rows of the embedding that learn, each by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trainable_token_indices: Option<TokenIndices>,
    /// What the embedding learns moves a tied head too.
    pub ensure_weight_tying: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            alpha: 16.0,
            dropout: 0.0,
            target_modules: Names::Pattern(ALL_ATTENTION.to_string()),
            exclude_modules: None,
            layers: None,
            layers_pattern: None,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            use_rslora: false,
            use_dora: false,
            init: LoraInit::Default,
            trainable_token_indices: None,
            ensure_weight_tying: true,
        }
    }
}

/// Token ids whose rows learn, as PEFT writes them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIndices {
    /// Rows of the embedding, and of a head tied to it.
    Embedding(Vec<u32>),
    /// Rows by module: the embedding, the head.
    Modules(BTreeMap<String, Vec<u32>>),
}

/// What a module is in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoraKind {
    /// A linear layer of a block.
    Linear,
    /// The table of token embeddings.
    Embedding,
    /// The output head, where it is no embedding.
    Head,
}

/// A module that carries LoRA.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraModule {
    /// Its name, without `.weight`.
    pub name: String,
    /// What it is.
    pub kind: LoraKind,
    /// The block it belongs to.
    pub layer: Option<usize>,
    /// Rows of B.
    pub out: usize,
    /// Columns of A.
    pub inp: usize,
    /// r.
    pub rank: usize,
    /// s.
    pub scale: f64,
    /// Dropout on A's input.
    pub dropout: f64,
    /// DoRA's magnitudes are there.
    pub dora: bool,
    /// PiSSA's fixed part is there.
    pub pissa: bool,
    /// An embedding whose change moves the tied head too.
    pub tied: bool,
}

impl LoraModule {
    /// Name of A.
    pub fn a_name(&self) -> String {
        match self.kind {
            LoraKind::Embedding => format!("{}.lora_embedding_A", self.name),
            _ => format!("{}.lora_A.weight", self.name),
        }
    }

    /// Name of B.
    pub fn b_name(&self) -> String {
        match self.kind {
            LoraKind::Embedding => format!("{}.lora_embedding_B", self.name),
            _ => format!("{}.lora_B.weight", self.name),
        }
    }

    /// Name of DoRA's magnitudes m \[out\].
    pub fn magnitude_name(&self) -> String {
        format!("{}.lora_magnitude_vector", self.name)
    }

    /// Names of PiSSA's fixed A₀ and B₀, which no file holds.
    pub fn fixed_names(&self) -> [String; 2] {
        ["A", "B"].map(|which| format!("{}.pissa_{which}", self.name))
    }

    /// Name of the weight it changes.
    pub fn weight_name(&self) -> String {
        format!("{}.weight", self.name)
    }

    /// Name and shape of what learns.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let mut out =
            vec![(self.a_name(), vec![self.rank, self.inp]), (self.b_name(), vec![self.out, self.rank])];
        if self.dora {
            out.push((self.magnitude_name(), vec![self.out]));
        }
        out
    }

    /// Name and shape of what is there beside it and never learns.
    pub fn fixed(&self) -> Vec<(String, Vec<usize>)> {
        if !self.pissa {
            return Vec::new();
        }
        let [a, b] = self.fixed_names();
        vec![(a, vec![self.rank, self.inp]), (b, vec![self.out, self.rank])]
    }

    /// Number of values that learn.
    pub fn values(&self) -> usize {
        self.parameters().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}

/// Rows of a table that learn, each by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRows {
    /// Name of the table's module: the embedding or an untied head.
    pub module: String,
    /// Rows, in the order in which they are kept, each once.
    pub ids: Vec<u32>,
    /// D.
    pub width: usize,
    /// Whether the table is the embedding.
    pub embedding: bool,
    /// Whether they are rows of a tied head too.
    pub tied: bool,
}

impl TokenRows {
    /// Name of the values [ids, D] that stand in the rows' place.
    pub fn name(&self) -> String {
        format!("{}.token_adapter.trainable_tokens_delta", self.module)
    }

    /// Name of the table.
    pub fn weight_name(&self) -> String {
        format!("{}.weight", self.module)
    }
}

/// Everything an adapter adds to one model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoraModules {
    /// Modules with factors, in the model's order, the embedding first.
    pub modules: Vec<LoraModule>,
    /// Tables with rows that learn.
    pub tokens: Vec<TokenRows>,
    by_name: BTreeMap<String, usize>,
}

impl LoraModules {
    fn new(modules: Vec<LoraModule>, tokens: Vec<TokenRows>) -> Self {
        let by_name = modules.iter().enumerate().map(|(at, module)| (module.name.clone(), at)).collect();
        Self { modules, tokens, by_name }
    }

    /// The module of this name (without `.weight`).
    pub fn get(&self, name: &str) -> Option<&LoraModule> {
        self.by_name.get(name).map(|at| &self.modules[*at])
    }

    /// The embedding's or the head's module.
    pub fn of_kind(&self, kind: LoraKind) -> Option<&LoraModule> {
        self.modules.iter().find(|module| module.kind == kind)
    }

    /// The rows that learn of a table, by the name of its module.
    pub fn rows(&self, module: &str) -> Option<&TokenRows> {
        self.tokens.iter().find(|rows| rows.module == module)
    }

    /// Does it change the embedding?
    pub fn changes_embedding(&self) -> bool {
        let embedding = |module: &LoraModule| module.kind == LoraKind::Embedding;
        self.modules.iter().any(embedding) || self.tokens.iter().any(|rows| rows.embedding)
    }

    /// Does it change the output head, by itself or through the embedding that the head is tied to?
    pub fn changes_head(&self) -> bool {
        let head = |module: &LoraModule| module.kind == LoraKind::Head || module.tied;
        self.modules.iter().any(head) || self.tokens.iter().any(|rows| rows.tied || !rows.embedding)
    }

    /// Does anything in this block learn with the group?
    pub fn in_block(&self, layer: usize) -> bool {
        self.modules.iter().any(|module| module.layer == Some(layer))
    }

    /// The lowest block with something that learns; 0 where the embedding has something.
    pub fn lowest_block(&self) -> Option<usize> {
        let blocks = || self.modules.iter().filter_map(|module| module.layer).min();
        if self.changes_embedding() { Some(0) } else { blocks() }
    }

    /// Name and shape of everything that learns, and that an adapter's file holds.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let rows = self.tokens.iter().map(|rows| (rows.name(), vec![rows.ids.len(), rows.width]));
        self.modules.iter().flat_map(LoraModule::parameters).chain(rows).collect()
    }

    /// Name and shape of what is there beside it and never learns.
    pub fn fixed(&self) -> Vec<(String, Vec<usize>)> {
        self.modules.iter().flat_map(LoraModule::fixed).collect()
    }

    /// Number of values that learn.
    pub fn values(&self) -> usize {
        self.parameters().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}

fn module_of(weight: &str) -> &str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

impl LoraConfig {
    /// s of a rank and a strength.
    fn scale_of(&self, alpha: f64, rank: usize) -> f64 {
        alpha / if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 }
    }

    /// s of every module that no pattern names.
    pub fn scale(&self) -> f64 {
        self.scale_of(self.alpha, self.r)
    }

    /// Refuses what cannot be built on this model.
    pub fn validate(&self, config: &DecoderConfig) -> Result<()> {
        self.resolve(config).map(|_| ())
    }

    /// Refuses values that fit no model.
    fn validate_values(&self) -> Result<()> {
        let fail = |message: String| Err(BaseError::Lora { message });
        if self.r == 0 {
            return fail("r (rank): expected at least 1, got 0".into());
        }
        if let Some((pattern, _)) = self.rank_pattern.0.iter().find(|(_, rank)| *rank == 0) {
            return fail(format!("rank_pattern: expected ranks of at least 1, got 0 for \"{pattern}\""));
        }
        let alphas = self
            .alpha_pattern
            .0
            .iter()
            .map(|(pattern, alpha)| (format!("alpha_pattern \"{pattern}\""), *alpha));
        for (key, alpha) in alphas.chain([("alpha".to_string(), self.alpha)]) {
            if !alpha.is_finite() || alpha <= 0.0 {
                return fail(format!("{key}: expected a positive number, got {alpha}"));
            }
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return fail(format!("dropout: expected 0 <= p < 1, got {}", self.dropout));
        }
        if let Names::List(names) = &self.target_modules {
            if names.is_empty() {
                return fail("target_modules: expected at least one layer name, got none".into());
            }
            if let Some(twice) = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name)) {
                return fail(format!("target_modules: \"{}\" is named twice", twice.1));
            }
        } else if self.target_modules.is_expression() && self.layers.is_some() {
            return fail(
                "layers: expected null beside a regular expression in target_modules (put the block numbers into it), as \
                 PEFT does"
                    .into(),
            );
        }
        if self.use_dora && self.init == LoraInit::Pissa {
            return fail("init: expected \"default\" or \"gaussian\" with use_dora, got \"pissa\"".into());
        }
        Ok(())
    }

    /// What it comes to on this model.
    ///
    /// # Errors
    /// For everything that cannot be built on it.
    pub fn resolve(&self, config: &DecoderConfig) -> Result<LoraModules> {
        self.validate_values()?;
        let fail = |message: String| Err(BaseError::Lora { message });
        let candidates = self.candidates(config);
        let names: Vec<&str> = candidates.iter().map(|module| module.name.as_str()).collect();
        let targets = self.target_modules.matcher("target_modules", config)?;
        if let [unknown, ..] = targets.idle(&names)[..] {
            let head = if config.tie_word_embeddings { "; the head is tied to the embedding" } else { "" };
            return fail(format!(
                "target_modules: expected names out of {:?}, got \"{unknown}\"{head}",
                short_names(&names)
            ));
        }
        let excluded =
            self.exclude_modules.as_ref().map(|n| n.matcher("exclude_modules", config)).transpose()?;
        let layers = self.layers.as_ref().map(|l| l.numbers(config.num_hidden_layers)).transpose()?;
        let list = self.layers_pattern.as_ref().map(block_list).transpose()?;
        let chosen = |module: &LoraModule| {
            let in_block = match (&layers, module.layer) {
                (None, _) => true,
                (Some(_), None) => false,
                (Some(layers), Some(layer)) => {
                    layers.contains(&layer) && list.as_ref().is_none_or(|list| list.means(&module.name))
                }
            };
            in_block
                && targets.means(&module.name)
                && !excluded.as_ref().is_some_and(|excluded| excluded.means(&module.name))
        };
        let mut modules: Vec<LoraModule> = candidates.iter().filter(|m| chosen(m)).cloned().collect();
        if modules.is_empty() {
            return fail(format!(
                "target_modules: expected to mean at least one of {:?}, got {}, which with exclude_modules and layers \
                 means none; an expression has to match a module's whole name, a list its last part",
                short_names(&names),
                self.target_modules
            ));
        }
        self.apply_patterns(&mut modules)?;
        for module in &modules {
            self.check_module(module)?;
        }
        let tokens = self.token_rows(config, &modules)?;
        Ok(LoraModules::new(modules, tokens))
    }

    /// Every module of the model that could carry LoRA.
    fn candidates(&self, config: &DecoderConfig) -> Vec<LoraModule> {
        let module = |name: &str, kind, layer, out, inp| LoraModule {
            name: name.to_string(),
            kind,
            layer,
            out,
            inp,
            rank: self.r,
            scale: self.scale(),
            dropout: self.dropout,
            dora: self.use_dora,
            pissa: self.init == LoraInit::Pissa && kind != LoraKind::Embedding,
            tied: kind == LoraKind::Embedding && config.tie_word_embeddings && self.ensure_weight_tying,
        };
        let embedding = module_of(config.embedding_name());
        let mut out =
            vec![module(embedding, LoraKind::Embedding, None, config.hidden_size, config.vocab_size)];
        for linear in config.linears() {
            let kind = if linear.layer.is_some() { LoraKind::Linear } else { LoraKind::Head };
            out.push(module(&linear.name, kind, linear.layer, linear.out, linear.inp));
        }
        out
    }

    fn apply_patterns(&self, modules: &mut [LoraModule]) -> Result<()> {
        let ranks = self.rank_pattern.matchers("rank_pattern")?;
        let alphas = self.alpha_pattern.matchers("alpha_pattern")?;
        let fits = |regex: &fancy_regex::Regex, name: &str| regex.is_match(name).unwrap_or(false);
        let idle = |key: &str, pattern: &str| BaseError::Lora {
            message: format!(
                "{key}: expected patterns that mean a layer with LoRA, got \"{pattern}\", which means none"
            ),
        };
        for (pattern, regex, _) in &ranks {
            if !modules.iter().any(|module| fits(regex, &module.name)) {
                return Err(idle("rank_pattern", pattern));
            }
        }
        for (pattern, regex, _) in &alphas {
            if !modules.iter().any(|module| fits(regex, &module.name)) {
                return Err(idle("alpha_pattern", pattern));
            }
        }
        for module in modules {
            let rank = ranks.iter().find(|(_, regex, _)| fits(regex, &module.name));
            let alpha = alphas.iter().find(|(_, regex, _)| fits(regex, &module.name));
            module.rank = rank.map_or(self.r, |(_, _, rank)| *rank);
            module.scale = self.scale_of(alpha.map_or(self.alpha, |(_, _, alpha)| *alpha), module.rank);
        }
        Ok(())
    }

    fn check_module(&self, module: &LoraModule) -> Result<()> {
        let fail = |message: String| Err(BaseError::Lora { message });
        let (widest, narrowest) = (module.out.max(module.inp), module.out.min(module.inp));
        let name = &module.name;
        if module.rank > widest {
            return fail(format!(
                "r (rank): expected at most {widest}, the width of {name}, got {}",
                module.rank
            ));
        }
        if module.dora && module.kind != LoraKind::Linear {
            return fail(format!("use_dora: expected linear layers of blocks as targets, got {name}"));
        }
        if module.pissa && module.kind == LoraKind::Head {
            return fail(format!("init \"pissa\": expected linear layers of blocks as targets, got {name}"));
        }
        if module.pissa && module.rank > narrowest {
            return fail(format!(
                "init \"pissa\": expected ranks up to {narrowest} for {name} [{}, {}], got {}",
                module.out, module.inp, module.rank
            ));
        }
        Ok(())
    }

    /// Tables with rows that learn.
    fn token_rows(&self, config: &DecoderConfig, modules: &[LoraModule]) -> Result<Vec<TokenRows>> {
        let fail =
            |message: String| Err(BaseError::Lora { message: format!("trainable_token_indices: {message}") });
        let Some(indices) = &self.trainable_token_indices else { return Ok(Vec::new()) };
        let embedding = module_of(config.embedding_name());
        let head = module_of(config.untied_head_name());
        let given: Vec<(&str, &Vec<u32>)> = match indices {
            TokenIndices::Embedding(ids) => vec![(embedding, ids)],
            TokenIndices::Modules(map) => {
                let means = |module: &str, key: &str| module == key || module.ends_with(&format!(".{key}"));
                if let Some(other) = map.keys().find(|key| !means(embedding, key) && !means(head, key)) {
                    return fail(format!("expected {embedding} or {head}, got \"{other}\""));
                }
                let of =
                    |module| map.iter().find(|(key, _)| means(module, key)).map(|(_, ids)| (module, ids));
                [of(embedding), of(head)].into_iter().flatten().collect()
            }
        };
        if given.is_empty() {
            return fail("expected token ids, got none".into());
        }
        let mut out: Vec<TokenRows> = Vec::new();
        for (module, ids) in given {
            if ids.is_empty() {
                return fail("expected token ids, got []".into());
            }
            if let Some(bad) = ids.iter().find(|id| **id as usize >= config.vocab_size) {
                return fail(format!("expected ids below the vocabulary's {}, got {bad}", config.vocab_size));
            }
            if let Some((_, twice)) = ids.iter().enumerate().find(|(at, id)| ids[..*at].contains(id)) {
                return fail(format!("expected each id once, got {twice} twice"));
            }
            if config.tie_word_embeddings && module != embedding {
                // The head of a tied model takes the embedding's rows.
                if out.first().is_none_or(|rows| rows.ids != *ids) {
                    return fail(format!(
                        "expected the embedding's ids for {module} too, which is tied to it, got {ids:?}"
                    ));
                }
                continue;
            }
            if modules.iter().any(|m| m.name == module) {
                return fail(format!(
                    "expected {module} without LoRA of its own, but target_modules means it"
                ));
            }
            out.push(TokenRows {
                module: module.to_string(),
                ids: ids.clone(),
                width: config.hidden_size,
                embedding: module == embedding,
                tied: config.tie_word_embeddings && module == embedding,
            });
        }
        Ok(out)
    }

    /// This with LoRA on the embedding too. PEFT leaves what lies in no block out of `layers`, so blocks are then named in
    /// full.
    pub fn with_embedding(&self, config: &DecoderConfig) -> Result<Self> {
        let embedding = module_of(config.embedding_name());
        let mut out = self.clone();
        if self.layers.is_some() {
            let modules = self.resolve(config)?.modules;
            out.target_modules = Names::list(modules.iter().map(|module| module.name.as_str()));
            (out.layers, out.layers_pattern) = (None, None);
        }
        let end = embedding.rsplit('.').next().unwrap_or(embedding);
        out.target_modules = out.target_modules.expanded(config).and(&[end]);
        Ok(out)
    }

    /// The same LoRA on these modules alone, named in full; patterns that mean none of them are left out.
    pub fn only_on(&self, modules: &[&LoraModule]) -> Result<Self> {
        let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
        let mut out = self.clone();
        out.target_modules = Names::list(names.iter().copied());
        (out.exclude_modules, out.layers, out.layers_pattern) = (None, None, None);
        out.trainable_token_indices = None;
        out.rank_pattern = self.rank_pattern.meaning(&names)?;
        out.alpha_pattern = self.alpha_pattern.meaning(&names)?;
        Ok(out)
    }

    /// Adds freshly initialised factors to `params`, which holds the model's weights. The values depend on `seed`, the
    /// module's name and, for DoRA and PiSSA, its weight alone.
    pub fn attach(&self, config: &DecoderConfig, params: &mut ParamStore, seed: u64) -> Result<()> {
        init::attach(self, &self.resolve(config)?, params, seed)
    }
}

/// Ends of names, each once.
fn short_names<'a>(names: &[&'a str]) -> Vec<&'a str> {
    let mut out: Vec<&str> = Vec::new();
    for name in names {
        let end = name.rsplit('.').next().unwrap_or(name);
        if !out.contains(&end) {
            out.push(end);
        }
    }
    out
}

/// Names of lists of blocks, as what stands in front of a number in a module's name.
fn block_list(names: &Names) -> Result<Matcher> {
    let lists: Vec<String> = match names {
        Names::List(lists) => lists.clone(),
        Names::Pattern(list) => vec![list.clone()],
    };
    let lists = lists.join("|");
    let whole = format!(r"\A(?:.*?\.)?(?:{lists})\.\d+\..*\z");
    let regex = fancy_regex::Regex::new(&whole).map_err(|e| BaseError::Lora {
        message: format!("layers_pattern: expected a regular expression, got \"{lists}\": {e}"),
    })?;
    Ok(Matcher::Whole(regex))
}
