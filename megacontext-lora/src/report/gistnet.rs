//! `report.html` of a run that trained GistNet: what gists cost beside everything else that could stand for a block, how that
//! went over the steps, and every metric with its definition.
//!
//! The frame, the styles and the rules are those of a run's page: self-contained, escaped, for phone, desktop and paper.

use std::fmt::Write;

use gistnet_adapter::costs::Mean;
use gistnet_adapter::metrics::COLLAPSE;
use gistnet_adapter::validate::{Baseline, SUBSTITUTED, Validation};

use super::format::{change, count, escape, percent, seconds};
use super::gist_curves::curves;
use super::html::{how_section, memory, metrics_section, page};
use super::stand_ins::{StandIns, signed_percent, with_error};
use crate::jobs::train_gistnet::GistSummary;
use crate::run::metrics::Record;

/// What the page is made of.
#[derive(Clone, Copy, Debug)]
pub struct GistReport<'a> {
    /// The outcome.
    pub summary: &'a GistSummary,
    /// What was measured on the way, in its order.
    pub records: &'a [Record],
    /// The settings as resolved, TOML.
    pub config: &'a str,
}

/// The page.
pub fn render(report: &GistReport) -> String {
    let s = report.summary;
    let h = s.test.validation.horizon;
    let title = format!("GistNet over {h} tokens");
    let facts = [
        format!("base <b>{}</b>", escape(&s.base)),
        format!("{} steps", count(s.steps)),
        seconds(s.seconds),
        format!("seed {}", s.seed),
    ];
    let mut body = format!(
        "<header>\n<h1>{}</h1>\n<p class=\"facts\">{}</p>\n</header>\n<section class=\"verdict\">\n<h2>{}</h2>\n<p>{}</p>\n\
         </section>\n",
        escape(&title),
        facts.join(" \u{b7} "),
        escape(&headline(s)),
        escape(&text(s))
    );
    body += &stand_ins(&s.test.table);
    body += &curves(report);
    body += &metrics(s);
    body += &how(report);
    page(&title, &body)
}

/// The outcome in a sentence.
fn headline(s: &GistSummary) -> String {
    let v = &s.test.validation;
    let Some(share) = s.recovered else {
        return "Deleting these blocks costs nothing: there is nothing that a gist could recover."
            .to_string();
    };
    if share <= 0.0 {
        return "Gists do not help yet: a block costs no less with its gist than without it.".to_string();
    }
    let dearer = |baseline| s.test.baselines.get(&baseline).is_some_and(|cost| *cost > v.delta_nll);
    let beyond = [
        (Baseline::Last4, "more than the block's last four tokens do"),
        (Baseline::Last2, "more than the block's last two tokens do"),
        (Baseline::LastToken, "more than the block's last token does"),
    ];
    let beyond = beyond.into_iter().find(|(baseline, _)| dearer(*baseline));
    let share = signed_percent(Some(share));
    match beyond {
        Some((baseline, text)) => {
            format!("A gist recovers {share} of what deleting its block costs, {text}{}.", doubt(v, baseline))
        }
        None => format!("A gist recovers {share} of what deleting its block costs."),
    }
}

/// Says so where a difference is within two of its standard errors.
fn doubt(v: &Validation, baseline: Baseline) -> &'static str {
    let clear = v.against.get(&baseline).is_some_and(|d| d.error.is_some_and(|e| d.mean.abs() > 2.0 * e));
    if clear { "" } else { " (by less than two standard errors)" }
}

fn text(s: &GistSummary) -> String {
    let v = &s.test.validation;
    let mut text = format!(
        "Replaced by its gist, a block costs {:.3} nats per token over the next {} tokens",
        v.delta_nll, v.horizon
    );
    let others = [
        (Baseline::Deleted, "deleted"),
        (Baseline::Mean, "replaced by the mean of its embeddings"),
        (Baseline::LastToken, "by its last token"),
    ];
    for (number, (baseline, what)) in others.into_iter().enumerate() {
        if let Some(cost) = s.test.baselines.get(&baseline) {
            let _ = write!(text, "{} {what} {cost:.3}", if number == 0 { ";" } else { "," });
        }
    }
    let _ = write!(
        text,
        ". Measured on {} blocks of held-out text that nothing was chosen by.",
        count(v.blocks as u64)
    );
    if v.diversity.is_some_and(|diversity| diversity < COLLAPSE) {
        text += " The gists are much alike: a contrastive term pushes them apart.";
    }
    text
}

/// Table of what stands for a block.
fn stand_ins(table: &StandIns) -> String {
    let mut out = String::from(
        "<section>\n<h2>What stands for a block, and what it costs</h2>\n<div class=\"scroll\"><table>\n<thead><tr>",
    );
    for head in &table.head {
        let _ = write!(out, "<th>{}</th>", escape(head));
    }
    out += "</tr></thead>\n<tbody>\n";
    for (number, row) in table.rows.iter().enumerate() {
        out += "<tr>";
        for (column, cell) in row.iter().enumerate() {
            let cell = escape(cell);
            out += &match column {
                0 => format!("<th scope=\"row\">{cell}</th>"),
                1 if number == table.gist => format!("<td class=\"best\"><b>{cell}</b></td>"),
                _ => format!("<td>{cell}</td>"),
            };
        }
        out += "</tr>\n";
    }
    out + "</tbody>\n</table></div>\n<p class=\"note\">Recovered is 1 less the cost over that of deleting the block. The last column \
           compares on the same blocks: below 0 the gist is better. Behind \u{b1} stands one standard error over passages. Tokens \
           stand at their own places; the mean and the gist are one entry, at the gist's place.</p>\n</section>\n"
}

/// Every metric with what it means.
fn metrics(s: &GistSummary) -> String {
    let (v, chosen) = (&s.test.validation, &s.validation);
    let number = |value: Option<f64>| value.map_or("\u{2013}".to_string(), |value| format!("{value:.3}"));
    let beside = |deleted: Option<f64>, share: Option<f64>, what: &str| {
        let deleted = deleted?;
        Some(format!("{what}; deleted {deleted:.3}, so {} recovered", signed_percent(share)))
    };
    let rows = [
        (
            "\u{394}NLL@H",
            with_error(Mean { mean: v.delta_nll, error: v.delta_nll_error }),
            format!(
                "how much worse each of the next H tokens is predicted, nats, with one standard error over passages; {:.4} on the \
                 blocks that the network was chosen by, the lowest of several validations",
                chosen.delta_nll
            ),
        ),
        (
            "substitutability",
            percent(v.substitutability),
            format!("share of blocks that cost less than {SUBSTITUTED:.0} nat per token; above 90 % is wanted of prose"),
        ),
        (
            "perplexity ratio",
            format!("{:.3}", v.perplexity_ratio),
            "perplexity of the horizon with gists over that without; below 1.5 is wanted".to_string(),
        ),
        (
            "degradation",
            change(v.degradation),
            "loss of the horizon with gists over that without, less 1; at most 5 % for a working system".to_string(),
        ),
        (
            "diversity",
            number(v.diversity),
            format!("1 less the mean cosine of pairs of gists; above 0.5 is wanted, below {COLLAPSE} they have collapsed"),
        ),
        (
            "contrast gap",
            number(v.contrast_gap),
            "how much further apart any two gists are than neighbours, in 1 \u{2212} cos; above 0.1 is wanted".to_string(),
        ),
        (
            "attention entropy",
            number(v.attention_entropy),
            "bits, of GistNet's own attention over a block; 2 to 4 is usual".to_string(),
        ),
        (
            "\u{394}NLL@H, second level",
            number(v.level2_delta_nll),
            beside(v.level2_deleted, v.level2_recovered, "a span of K\u{b2} tokens replaced by one entry; below 2 is wanted")
                .unwrap_or("no document has room for a span of K\u{b2} tokens".to_string()),
        ),
        (
            "\u{394}NLL@H, sparse attention",
            number(v.sparse_delta_nll),
            beside(v.sparse_deleted, v.sparse_recovered, "the same blocks under shifted sparse attention")
                .unwrap_or("not measured".to_string()),
        ),
        (
            "sparse less dense",
            number(v.sparse_dense_gap()),
            format!("\u{394}NLL@H under sparse attention less that under dense; a run warns beyond \u{b1}{}", s.most_gap),
        ),
    ];
    metrics_section(&rows)
}

fn how(report: &GistReport) -> String {
    let s = report.summary;
    let pairs = [
        ("ended", s.ended.clone()),
        ("best network", format!("step {} ({})", count(s.best_step), s.network)),
        ("parameters", count(s.parameters as u64)),
        (
            "text",
            format!(
                "{} passages to learn from, {} to choose by, {} to test on",
                count(s.passages as u64),
                s.held_out_passages,
                s.test_passages
            ),
        ),
        ("sources", s.data.join(", ")),
        ("memory", memory(s.planned_bytes, s.peak_bytes, s.device_memory)),
        ("base fingerprint", s.base_fingerprint.clone()),
        ("gist version", s.gist_version.to_string()),
        ("threads", s.threads.to_string()),
        ("device", s.device.clone()),
    ];
    how_section(&pairs, report.config)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    struct Sample {
        summary: GistSummary,
        records: Vec<Record>,
        config: String,
    }

    fn sample() -> Sample {
        let text = include_str!("../../examples/sample_gist_report.json");
        let mut value: Value = serde_json::from_str(text).unwrap();
        let mut take = |key: &str| value[key].take();
        Sample {
            summary: serde_json::from_value(take("summary")).unwrap(),
            records: serde_json::from_value(take("records")).unwrap(),
            config: serde_json::from_value(take("config")).unwrap(),
        }
    }

    fn drawn(sample: &Sample) -> String {
        render(&GistReport { summary: &sample.summary, records: &sample.records, config: &sample.config })
    }

    #[test]
    fn the_page_is_whole_and_draws_all_three_curves() {
        let page = drawn(&sample());
        assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
        for tag in ["section", "svg", "table", "tr", "td", "div", "dl", "dd", "text", "figure", "details"] {
            let open = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
            assert_eq!(open, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        for absent in ["NaN", "inf ", "<script", "http://", "https://"] {
            assert!(!page.contains(absent), "{absent}");
        }
        // Each for a desktop and for a phone.
        assert_eq!(page.matches("<svg class=\"plot").count(), 6);
        for part in ["collapse 0.300", "bound 0.100", "bound -0.100", "\u{394}NLL@32 over", "gist less this"]
        {
            assert!(page.contains(part), "{part}");
        }
    }

    #[test]
    fn what_was_not_measured_is_not_drawn() {
        let mut sample = sample();
        for record in &mut sample.records {
            if let Record::GistValidation(r) = record {
                (r.validation.sparse_delta_nll, r.validation.diversity) = (None, Some(f64::NAN));
            }
        }
        let page = drawn(&sample);
        assert_eq!(page.matches("<svg class=\"plot").count(), 2);
        assert!(!page.contains("NaN"));
        sample.records.clear();
        assert!(!drawn(&sample).contains("<svg class=\"plot"));
    }

    #[test]
    fn the_headline_says_what_can_be_said() {
        let mut s = sample().summary;
        assert_eq!(
            headline(&s),
            "A gist recovers 44.6\u{a0}% of what deleting its block costs, more than the block's last token does."
        );
        s.test.validation.against.entry(Baseline::LastToken).and_modify(|d| d.error = Some(0.02));
        assert!(headline(&s).contains("last token does (by less than two standard errors)."));
        s.recovered = Some(-0.1);
        assert!(headline(&s).starts_with("Gists do not help yet"));
        s.recovered = None;
        assert!(headline(&s).starts_with("Deleting these blocks costs nothing"));
    }

    #[test]
    fn text_from_outside_is_escaped() {
        let mut sample = sample();
        let evil = "</style><script>alert('x')</script>\"&";
        for field in [&mut sample.config, &mut sample.summary.base, &mut sample.summary.network] {
            *field = evil.to_string();
        }
        (sample.summary.ended, sample.summary.data) = (evil.to_string(), vec![evil.to_string()]);
        sample.summary.test.table.rows[0][0] = evil.to_string();
        let page = drawn(&sample);
        assert!(!page.contains("<script") && page.matches("&lt;script&gt;").count() >= 6);
    }
}
