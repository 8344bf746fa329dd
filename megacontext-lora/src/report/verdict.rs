//! What the numbers say, in sentences. Every sentence is computed, none is assumed: a run that failed reads as one.
//!
//! A difference below one percent counts as none.

use super::format::{change, context, percent, perplexity};
use crate::run::summary::{ByContext, Summary};

/// Differences smaller than this are not called better or worse.
const NOTICEABLE: f64 = 0.01;

/// The report's opening.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// One line.
    pub headline: String,
    /// The numbers behind it.
    pub text: String,
}

/// The length the verdict is about: the target, or the longest one the adapted model was evaluated at.
pub(super) fn judged_context(summary: &Summary) -> Option<usize> {
    let adapted = &summary.perplexity.adapted;
    if adapted.contains_key(&summary.context) {
        return Some(summary.context);
    }
    adapted.keys().last().copied()
}

/// `adapted` over `other`, less one, at a length where both were measured.
pub(super) fn against(summary: &Summary, other: &ByContext, tokens: usize) -> Option<f64> {
    let ratio = summary.perplexity.adapted.get(&tokens)? / other.get(&tokens)?;
    ratio.is_finite().then_some(ratio - 1.0)
}

/// The verdict on a run.
pub fn verdict(summary: &Summary) -> Verdict {
    let Some(target) = judged_context(summary) else {
        return Verdict {
            headline: "Nothing was evaluated.".into(),
            text: "The adapted model has no perplexity in the summary, so this page shows what was trained and what \
                   it cost, not what it is worth."
                .into(),
        };
    };
    let p = &summary.perplexity;
    let tokens = context(target);
    let trained = summary.base.context;
    let adapted = p.adapted.get(&target).copied().unwrap_or(f64::NAN);
    let over_base = against(summary, &p.base, target);
    let over_interpolated = against(summary, &p.interpolated, target);
    let better = |x: Option<f64>| x.is_none_or(|x| x < -NOTICEABLE);

    let headline = if !adapted.is_finite() {
        format!("At {tokens} tokens the adapted model gives no usable numbers.")
    } else if !better(over_base) {
        format!("At {tokens} tokens the adapted model is no better than the base model as it came.")
    } else if !better(over_interpolated) {
        format!("At {tokens} tokens interpolation alone does as well: training added nothing there.")
    } else if trained > 0 && target > trained {
        format!("The context grew from {} to {tokens} tokens.", context(trained))
    } else {
        format!("The model got better at {tokens} tokens.")
    };

    let mut text = format!(
        "On held-out text of {tokens} tokens the adapted model has a perplexity of {}.",
        perplexity(adapted)
    );
    if let (Some(base), Some(over)) = (p.base.get(&target), over_base) {
        text += &format!(" The base model as it came has {} there", perplexity(*base));
        let times = base / adapted;
        text += &match () {
            () if times >= 2.0 => format!(", {times:.1} times as much"),
            () if over.abs() < NOTICEABLE => ", the same within one percent".into(),
            () => format!(" ({} for the adapted one)", change(over)),
        };
        text += if target > trained && trained > 0 && times >= 2.0 {
            ": it was never trained on positions that far out."
        } else {
            "."
        };
    }
    if let (Some(interpolated), Some(over)) = (p.interpolated.get(&target), over_interpolated) {
        text += &format!(
            " Squeezing the positions without any training (interpolation) gives {}; training {}.",
            perplexity(*interpolated),
            compare(over)
        );
    }
    if trained > 0
        && trained != target
        && let (Some(before), Some(after)) = (p.base.get(&trained), p.adapted.get(&trained))
        && let Some(over) = against(summary, &p.base, trained)
    {
        let price = match () {
            () if over > NOTICEABLE => format!("the price is {}", percent(over)),
            () if over < -NOTICEABLE => format!("it even gained {}", percent(over)),
            () => "nothing was lost".into(),
        };
        text += &format!(
            " At {} tokens, the length the base model was made for, {price} ({} before, {} after).",
            context(trained),
            perplexity(*before),
            perplexity(*after)
        );
    }
    if let Some(gap) = summary.sparse_dense_gap {
        text += &format!(
            " Training used sparse attention, the numbers above use dense attention; with the sparse one the adapted \
             model's perplexity is {}.",
            if gap.abs() < NOTICEABLE {
                format!("the same within one percent ({})", change(gap))
            } else {
                format!("{} {}", percent(gap), if gap > 0.0 { "higher" } else { "lower" })
            }
        );
    }
    Verdict { headline, text }
}

fn compare(over: f64) -> String {
    match over {
        x if x < -NOTICEABLE => format!("brings a further {} off", percent(x)),
        x if x > NOTICEABLE => format!("made it {} worse", percent(x)),
        _ => "changes that by less than one percent".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn a_good_run() {
        let verdict = verdict(&sample().summary);
        assert_eq!(verdict.headline, "The context grew from 256 to 1,024 tokens.");
        for part in [
            "perplexity of 20.31",
            "has 187.4 there, 9.2 times as much: it was never trained",
            "gives 29.73; training brings a further 31.7\u{a0}% off",
            "At 256 tokens, the length the base model was made for, the price is 1.3\u{a0}% (24.61 before, 24.94 after)",
            "1.8\u{a0}% higher",
        ] {
            assert!(verdict.text.contains(part), "{part}: {}", verdict.text);
        }
    }

    #[test]
    fn a_run_that_failed_reads_as_one() {
        let mut summary = sample().summary;
        summary.perplexity.adapted.insert(1024, 29.8);
        let said = verdict(&summary);
        assert!(said.headline.contains("interpolation alone does as well"), "{said:?}");
        assert!(said.text.contains("by less than one percent"), "{said:?}");
        summary.perplexity.adapted.insert(1024, 200.0);
        assert!(verdict(&summary).headline.contains("no better than the base"));
        summary.perplexity.adapted.insert(1024, f64::NAN);
        assert!(verdict(&summary).headline.contains("no usable numbers"));
        assert_eq!(verdict(&Summary::default()).headline, "Nothing was evaluated.");
    }
}
