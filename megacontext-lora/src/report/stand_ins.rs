//! The table of what can stand for a block and what that costs, as cells of text: one logic for the page, the command line and
//! any other host.
//!
//! Units: nats per token.

use gistnet_adapter::costs::{Mean, recovered};
use gistnet_adapter::validate::{Baseline, Baselines, Validation};
use serde::{Deserialize, Serialize};

/// What is not known.
const NONE: &str = "\u{2013}";

/// Rows of as many cells as the head has, the dearest first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StandIns {
    /// What the columns are.
    pub head: Vec<String>,
    /// Cells.
    pub rows: Vec<Vec<String>>,
    /// Which row is the gist's.
    pub gist: usize,
}

/// A baseline in words.
pub fn name(baseline: Baseline) -> &'static str {
    match baseline {
        Baseline::Deleted => "nothing (deleted)",
        Baseline::Mean => "mean of its embeddings",
        Baseline::LastToken => "its last token",
        Baseline::Last2 => "its last 2 tokens",
        Baseline::Last4 => "its last 4 tokens",
    }
}

/// 0.463 as `46.3 %`, with a minus sign below 0.
pub fn signed_percent(share: Option<f64>) -> String {
    let text = |share: f64| minus(format!("{:.1}\u{a0}%", 100.0 * share));
    share.filter(|share| share.is_finite()).map_or(NONE.to_string(), text)
}

/// A number's text with a real minus sign.
fn minus(text: String) -> String {
    text.replace('-', "\u{2212}")
}

/// A mean with its standard error.
pub fn with_error(found: Mean) -> String {
    minus(match found.error {
        Some(error) => format!("{:.4} \u{b1} {error:.4}", found.mean),
        None => format!("{:.4}", found.mean),
    })
}

impl StandIns {
    /// Of a validation and the baselines of the same blocks.
    pub fn new(validation: &Validation, baselines: &Baselines) -> Self {
        let deleted = baselines.blocks.get(&Baseline::Deleted).and_then(|costs| costs.mean());
        let own = Mean { mean: validation.delta_nll, error: validation.delta_nll_error };
        let others = baselines.blocks.iter().filter_map(|(baseline, costs)| {
            let less = validation.against.get(baseline).map_or(NONE.to_string(), |found| with_error(*found));
            Some((name(*baseline), costs.mean()?, less))
        });
        let mut rows: Vec<(&str, Mean, String)> = others.collect();
        rows.push(("its gist", own, NONE.to_string()));
        rows.sort_by(|a, b| b.1.mean.total_cmp(&a.1.mean));
        let gist = rows.iter().position(|row| row.0 == "its gist").unwrap_or(0);
        let cells = |(name, found, less): (&str, Mean, String)| {
            let share = deleted.and_then(|deleted| recovered(found.mean, deleted.mean));
            vec![name.to_string(), with_error(found), signed_percent(share), less]
        };
        Self {
            head: ["in its place", "\u{394}NLL, nats per token", "recovered", "gist less this"]
                .map(str::to_string)
                .to_vec(),
            rows: rows.into_iter().map(cells).collect(),
            gist,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use gistnet_adapter::costs::Costs;

    use super::*;

    fn validation(delta_nll: f64, against: BTreeMap<Baseline, Mean>) -> Validation {
        let value = serde_json::json!({
            "horizon": 32, "blocks": 4, "delta_nll": delta_nll, "delta_nll_error": 0.01, "substitutability": 1.0,
            "perplexity_ratio": 1.2, "degradation": 0.1, "full_nll": 2.0,
        });
        Validation { against, ..serde_json::from_value(value).unwrap() }
    }

    fn baselines(deleted: f64) -> Baselines {
        let costs = |mean: f64| Costs::of(vec![vec![mean - 0.1, mean + 0.1], vec![mean, mean]]);
        Baselines {
            blocks: [(Baseline::Deleted, costs(deleted)), (Baseline::LastToken, costs(0.3))].into(),
            ..Baselines::default()
        }
    }

    #[test]
    fn the_dearest_comes_first_and_says_what_is_recovered() {
        let against = [(Baseline::LastToken, Mean { mean: -0.1, error: Some(0.02) })].into();
        let table = StandIns::new(&validation(0.2, against), &baselines(0.4));
        let names: Vec<&str> = table.rows.iter().map(|row| row[0].as_str()).collect();
        assert_eq!(names, ["nothing (deleted)", "its last token", "its gist"]);
        assert_eq!(table.gist, 2);
        assert_eq!(table.rows[1][2..], ["25.0\u{a0}%", "\u{2212}0.1000 \u{b1} 0.0200"]);
        assert_eq!(table.rows[2][1..], ["0.2000 \u{b1} 0.0100", "50.0\u{a0}%", NONE]);
        assert!(table.rows.iter().all(|row| row.len() == table.head.len()));
    }

    #[test]
    fn a_stand_in_dearer_than_deletion_recovers_less_than_nothing() {
        let table = StandIns::new(&validation(0.6, BTreeMap::new()), &baselines(0.4));
        assert_eq!((table.gist, table.rows[0][2].as_str()), (0, "\u{2212}50.0\u{a0}%"));
    }

    #[test]
    fn where_deletion_costs_nothing_nothing_is_said_to_be_recovered() {
        for deleted in [0.0, -0.2] {
            let table = StandIns::new(&validation(0.2, BTreeMap::new()), &baselines(deleted));
            assert!(table.rows.iter().all(|row| row[2] == NONE), "{table:?}");
        }
    }
}
