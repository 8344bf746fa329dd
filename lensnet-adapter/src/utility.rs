//! What a closer look, or a coarser one, at each entry of a working context is worth: every edit tried, and loss@H measured.
//!
//! Source: MegaContext's counterfactual labels (its older documents, JT2): for each action that the context allows, NLL over the
//! horizon of the edited context. All edited contexts share the beginning of the context that they come from, and run over
//! its keys and values (see [`HorizonLoss`]).
//!
//! An edit is legal where the tree has what it puts there and the protected tail stays. The budget does not count here: another
//! collapse may make the room, so what an expand is worth is worth knowing in a full context too.
//!
//! Shapes: W entries. Units: nats per token. Errors: those of the measuring.

use std::ops::Range;

use megacontext_base::buffers::Buffers;
use megacontext_base::context::{GistTree, HorizonLoss, Limits, WorkingContext};
use megacontext_base::error::Result;
use megacontext_base::random::Random;
use serde::{Deserialize, Serialize};

use crate::counterfactual::Measured;

/// One edit of a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trial {
    /// The gist at this index is expanded.
    Expand(usize),
    /// The siblings from this index on are collapsed.
    Collapse(usize),
}

/// A context measured: as it is, and with every tried edit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Utilities {
    /// Loss@H of the context as it is.
    pub now: f64,
    /// By entry: loss@H after its expand, and after the collapse that takes it in; none where not legal or not tried.
    pub measured: Vec<Measured>,
}

/// The same entries with room for one more expand.
fn roomy(context: &WorkingContext, tree: &GistTree) -> Result<WorkingContext> {
    let (limits, block) = (context.limits(), context.hierarchy().block());
    let budget = limits.budget().max(context.cost() + block - 1);
    WorkingContext::new(context.entries().to_vec(), tree, Limits::new(budget, limits.protected())?)
}

/// All legal edits of a context, whatever its budget says.
///
/// # Errors
/// When the context is not one over the tree.
pub fn trials(context: &WorkingContext, tree: &GistTree) -> Result<Vec<Trial>> {
    let context = roomy(context, tree)?;
    let each = (0..context.cost()).flat_map(|at| {
        let expand = context.check_expand(at).is_ok().then_some(Trial::Expand(at));
        let collapse = context.check_collapse(at).is_ok().then_some(Trial::Collapse(at));
        [expand, collapse]
    });
    Ok(each.flatten().collect())
}

/// Measures edits of a context, all of them or at most `most`, drawn by `random`. `future` is what follows.
///
/// # Errors
/// See the module.
pub fn measure(
    loss: &HorizonLoss,
    tree: &GistTree,
    context: &WorkingContext,
    future: &[u32],
    most: Option<usize>,
    random: &mut Random,
    buffers: &mut Buffers,
) -> Result<Utilities> {
    let mut all = trials(context, tree)?;
    if let Some(most) = most.filter(|most| *most < all.len()) {
        for at in 0..most {
            let other = at + random.below(all.len() - at);
            all.swap(at, other);
        }
        all.truncate(most);
    }
    let context = roomy(context, tree)?;
    let edited = all.iter().map(|trial| {
        let mut edited = context.clone();
        match trial {
            Trial::Expand(at) => edited.expand(*at),
            Trial::Collapse(at) => edited.collapse(*at),
        }?;
        Ok(edited)
    });
    let edited: Vec<WorkingContext> = edited.collect::<Result<_>>()?;
    let contexts: Vec<&WorkingContext> = std::iter::once(&context).chain(&edited).collect();
    let losses = loss.measure(tree, &contexts, future, buffers)?;
    let mut measured = vec![Measured::default(); context.cost()];
    for (trial, loss) in all.iter().zip(&losses[1..]) {
        match trial {
            Trial::Expand(at) => measured[*at].expanded = Some(*loss),
            Trial::Collapse(at) => {
                let siblings: Range<usize> = *at..*at + context.hierarchy().block();
                measured[siblings].iter_mut().for_each(|one| one.collapsed = Some(*loss));
            }
        }
    }
    Ok(Utilities { now: losses[0], measured })
}
