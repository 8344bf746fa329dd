//! Labels for LensNet as runs make them: which context of a history is measured, and what a table of labels says.
//!
//! A label follows from its settings, the policy of the time and the random state it is given. Units: nats per token. Errors:
//! those of choosing and measuring.

use lensnet_adapter::LensNet;
use lensnet_adapter::allocator::Action;
use lensnet_adapter::counterfactual::{Measured, Scale, targets, unit};
use lensnet_adapter::focus::{Focus, History, Policy};
use lensnet_adapter::labels::Label;
use lensnet_adapter::utility::{Utilities, measure};
use lensnet_adapter::variants::{VariantConfig, variants};
use megacontext_base::buffers::Buffers;
use megacontext_base::context::{Hierarchy, Limits, WorkingContext};
use megacontext_base::random::Random;

use serde_json::{Value, json};

use super::lensnet::{LabelKind, LabelSettings};
use crate::error::Result;
use crate::jobs::model_error;
use crate::run::labels;

/// Histories whose edits say what a score of 1 stands for.
pub(crate) const LOOKED_AT: usize = 24;

/// What every edit of the context that a history begins with comes to, for [`unit_of`].
pub(crate) fn begun_utilities(
    focus: &Focus,
    history: &History,
    seed: u64,
    buffers: &mut Buffers,
) -> Result<Utilities> {
    let begun = focus.begin(history).map_err(model_error)?;
    let mut random = Random::new(seed);
    measure(focus.loss, &history.tree, &begun, &history.future, None, &mut random, buffers)
        .map_err(model_error)
}

/// What the best expands of a few contexts save, in nats: what a score of 1 stands for.
pub(crate) fn unit_of(found: &[Utilities]) -> f64 {
    unit(found.iter().map(|one| (one.now, &one.measured[..])))
}

/// Measures one history: the context that `learned` chooses, or recency where nothing is learned yet, or random focus in the share
/// of cases that explores; with `preference` variants of the history besides.
pub(crate) fn label_of(
    settings: &LabelSettings,
    focus: &Focus,
    learned: Option<&LensNet>,
    history: (usize, &History),
    random: &mut Random,
    buffers: &mut Buffers,
) -> Result<Label> {
    let explores = random.unit() < settings.explore;
    let policy = match learned {
        _ if explores => Policy::Random,
        None => Policy::Recency,
        Some(network) => Policy::Lens(network),
    };
    // So many refocuses that contexts of all ages at which the policy decides come up: from those that every history begins with to
    // those before its last refocus.
    let focus = Focus { refocuses: random.below(focus.refocuses), ..*focus };
    match settings.kind {
        LabelKind::Counterfactual => {
            let most = (settings.edits > 0).then_some(settings.edits);
            Label::of_edits(&focus, policy, history, most, random, buffers).map_err(model_error)
        }
        LabelKind::Preference => {
            let chosen = focus.choose(policy, history.1, random, buffers).map_err(model_error)?;
            let protected = focus.limits.protected();
            let config =
                VariantConfig { count: settings.variants, recent: protected, ..VariantConfig::default() };
            let tree = &history.1.tree;
            let whole = Limits::new(tree.len() as usize, protected)
                .and_then(|limits| WorkingContext::recent(tree, limits))
                .map_err(model_error)?;
            let budget = focus.limits.budget();
            let mut contexts = vec![chosen.context];
            contexts.extend(variants(&config, &whole, tree, budget, random).map_err(model_error)?);
            Label::of_variants(&focus, &contexts, history, buffers).map_err(model_error)
        }
    }
}

/// A round's labels as rows of a table: one for every edit that was measured.
pub(crate) fn rows(
    round: &[Label],
    hierarchy: Hierarchy,
    scale: Scale,
    timestamp_ms: i64,
) -> Result<Vec<labels::Label>> {
    let mut rows = Vec::new();
    for (context, label) in (0..).zip(round) {
        let Label::Utilities { history, entries, utilities } = label else { continue };
        let wanted = targets(utilities.now, &utilities.measured, scale).map_err(model_error)?;
        for (at, (start, lod)) in entries.iter().enumerate() {
            let Measured { expanded, collapsed } = utilities.measured[at];
            let first = *lod < hierarchy.levels() && start.is_multiple_of(hierarchy.span(lod + 1));
            let edits =
                [(Action::Expand, expanded, *lod), (Action::Collapse, collapsed.filter(|_| first), lod + 1)];
            rows.extend(edits.into_iter().filter_map(|(action, nll, node)| {
                let nll = nll?;
                Some(labels::Label {
                    block: hierarchy.node_at(node, *start),
                    action,
                    delta_nll: nll - utilities.now,
                    timestamp_ms,
                    document: *history as u64,
                    context,
                    entry_start: *start,
                    lod: *lod,
                    nll_now: utilities.now,
                    target: wanted[at].unwrap_or(0.0),
                })
            }));
        }
    }
    Ok(rows)
}

/// A label as hosts are told of it: which document, which context of the round, loss@H of the context as it is, and how many
/// edits were measured, or the lengths and losses of all variants. All siblings of a block carry what their collapse came to.
pub(crate) fn told(label: &Label, round: usize, context: usize, block: usize) -> Value {
    let mut told = json!({ "round": round + 1, "document": label.history(), "context": context });
    match label {
        Label::Utilities { utilities, .. } => {
            let measured = &utilities.measured;
            told["kind"] = json!("counterfactual");
            told["entries"] = json!(measured.len());
            told["expands"] = json!(measured.iter().filter(|one| one.expanded.is_some()).count());
            let collapses = measured.iter().filter(|one| one.collapsed.is_some()).count() / block;
            told["collapses"] = json!(collapses);
            told["nll_now"] = json!(utilities.now);
        }
        Label::Variants { contexts, losses, .. } => {
            told["kind"] = json!("preference");
            told["entries"] = json!(contexts.iter().map(Vec::len).collect::<Vec<_>>());
            told["losses"] = json!(losses);
            told["nll_now"] = json!(losses.first());
        }
    }
    told
}
