//! `report.html` of a run that trained LensNet: loss@H of the contexts that it chooses beside those of other policies, pictures
//! of contexts as it chose them, and every metric with its definition.
//!
//! The frame, the styles and the rules are those of a run's page: self-contained, escaped, for phone, desktop and paper.

use std::fmt::Write;

use lensnet_adapter::validate::{Reference, Validation};

use super::format::{count, escape, percent, seconds};
use super::html::{both, how_section, memory, metrics_section, page};
use crate::jobs::train_lensnet::LensSummary;
use crate::run::metrics::Record;

pub use super::focus::Picture;

/// What the page is made of.
#[derive(Clone, Copy, Debug)]
pub struct LensReport<'a> {
    /// The outcome.
    pub summary: &'a LensSummary,
    /// What was measured on the way, in its order.
    pub records: &'a [Record],
    /// Contexts of test histories as the best network chose them.
    pub pictures: &'a [Picture],
    /// The settings as resolved, TOML.
    pub config: &'a str,
}

/// The page.
pub fn render(report: &LensReport) -> String {
    let s = report.summary;
    let title = format!("LensNet: where to look in {} tokens", count(s.history as u64));
    let facts = [
        format!("base <b>{}</b>", escape(&s.base)),
        format!("{} labels, {} steps", count(s.labels as u64), count(s.steps)),
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
    body += &policies(s);
    body += &pictures(report.pictures);
    body += &course(report.records);
    body += &metrics(&s.test);
    body += &how(report);
    page(&title, &body)
}

/// Whether a difference is beyond two of its standard errors.
fn clear(v: &Validation, reference: Reference) -> Option<bool> {
    let difference = v.against.get(&reference)?;
    (difference.mean.abs() > 2.0 * difference.error).then_some(difference.mean < 0.0)
}

/// The outcome in a sentence.
fn headline(s: &LensSummary) -> String {
    let against = |reference, name: &str| match clear(&s.test, reference) {
        Some(true) => format!("better than {name}"),
        Some(false) => format!("worse than {name}"),
        None => format!("not to be told from {name}"),
    };
    format!(
        "LensNet's contexts predict what follows {}, and {}.",
        against(Reference::Random, "random focus"),
        against(Reference::Recency, "recency")
    )
}

fn text(s: &LensSummary) -> String {
    let v = &s.test;
    let of = |name: &str| s.focus_loss.get(name).copied().unwrap_or(f64::NAN);
    let oracle = s.focus_loss.get("oracle").map_or(String::new(), |loss| {
        format!(", {loss:.3} behind contexts that follow what every edit was measured to be worth")
    });
    let mut text = format!(
        "With {} entries for {} tokens, the next {} tokens cost {:.3} nats each behind contexts that LensNet chose; {:.3} behind the \
         newest tokens and coarse gists of the rest, {:.3} behind random focus{oracle}. Measured on {} held-out histories that nothing \
         was chosen by.",
        s.budget,
        count(s.history as u64),
        s.horizon,
        of("lensnet"),
        of("recency"),
        of("random"),
        v.histories
    );
    if let Some(shown) = v.facts_shown {
        let others = ["recency", "random", "oracle"].map(|policy| {
            let share = s.facts_shown.get(policy).map_or("\u{2013}".to_string(), |share| percent(*share));
            format!("{policy} {share}")
        });
        let _ = write!(
            text,
            " The planted fact that the answer needs is shown as tokens in {} of them ({}).",
            percent(shown),
            others.join(", ")
        );
    }
    text
}

/// Name of a policy for people.
pub(super) fn policy_name(policy: &str) -> &'static str {
    match policy {
        "lensnet" => "LensNet",
        "recency" => "recency (newest fine, the rest coarse)",
        "random" => "random focus",
        _ => "oracle (follows measured worth)",
    }
}

/// Table of policies, the dearest first.
fn policies(s: &LensSummary) -> String {
    let mut rows: Vec<(&str, f64)> = s.focus_loss.iter().map(|(name, loss)| (name.as_str(), *loss)).collect();
    rows.sort_by(|a, b| b.1.total_cmp(&a.1));
    let planted = !s.facts_shown.is_empty();
    let mut out = format!(
        "<section>\n<h2>Who chooses the context, and what it costs</h2>\n<div class=\"scroll\"><table>\n<thead><tr>\
         <th>Contexts chosen by</th><th>loss@{}, nats per token</th><th>LensNet less this</th>{}</tr></thead>\n<tbody>\n",
        s.horizon,
        if planted { "<th>Fact shown</th>" } else { "" }
    );
    for (policy, loss) in rows {
        let own = policy == "lensnet";
        let reference = Reference::ALL.into_iter().find(|reference| reference.name() == policy);
        let difference = reference.and_then(|reference| s.test.against.get(&reference));
        let difference = difference.map_or("\u{2013}".to_string(), |difference| {
            format!("{:+.4} \u{b1} {:.4}", difference.mean, difference.error)
        });
        let class = if own { " class=\"best\"" } else { "" };
        let loss = if own { format!("<b>{loss:.4}</b>") } else { format!("{loss:.4}") };
        let _ = write!(
            out,
            "<tr><th scope=\"row\">{}</th><td{class}>{loss}</td><td>{difference}</td>",
            policy_name(policy)
        );
        if planted {
            let shown = s.facts_shown.get(policy).map_or("\u{2013}".to_string(), |share| percent(*share));
            let _ = write!(out, "<td>{shown}</td>");
        }
        out += "</tr>\n";
    }
    let _ = write!(
        out,
        "</tbody>\n</table></div>\n<p class=\"note\">All contexts begin the same and keep to the same budget. Differences are paired, \
         history by history, with their standard error. Nothing was chosen by these histories; the network is the best of the \
         validations on {} others, where its loss is {:.4}.</p>\n</section>\n",
        s.held_out_histories, s.validation.loss_at_h
    );
    out
}

fn pictures(all: &[Picture]) -> String {
    let drawn: Vec<String> = all.iter().map(|picture| both(|size| picture.draw(size))).collect();
    if drawn.iter().all(String::is_empty) {
        return String::new();
    }
    let key = |class: &str, name: &str| {
        format!(
            "<li><svg viewBox=\"0 0 30 12\" aria-hidden=\"true\"><rect class=\"{class}\" width=\"30\" height=\"12\"/></svg>{name}</li>"
        )
    };
    format!(
        "<section>\n<h2>Where it looked</h2>\n<ul class=\"legend\">{}{}{}</ul>\n{}<p class=\"note\">Held-out histories, oldest token to \
         the left, positions in tokens. A strip is a working context; above it are the scores that the next refocus followed: up asks \
         for a closer look, down for a coarser one. A line below marks a planted fact.</p>\n</section>\n",
        key("lod0", "tokens"),
        key("lod1", "gists"),
        key("lod2", "gists of gists"),
        drawn.concat()
    )
}

/// Every validation.
fn course(records: &[Record]) -> String {
    let mut rows = String::new();
    let number = |value: Option<f64>| value.map_or("\u{2013}".to_string(), |value| format!("{value:.3}"));
    for record in records {
        let Record::LensValidation(r) = record else { continue };
        let v = &r.validation;
        let _ = writeln!(
            rows,
            "<tr><th scope=\"row\">{}</th><td>{:.4}</td><td>{}</td><td>{}</td><td>{:.3}</td></tr>",
            count(r.step),
            v.loss_at_h,
            number(v.ranking_accuracy),
            number(v.pearson),
            v.swap_rate
        );
    }
    if rows.is_empty() {
        return rows;
    }
    format!(
        "<section>\n<h2>How it went</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th>Steps</th><th>loss@H</th><th>Ranking</th>\
         <th>Pearson</th><th>Swap rate</th></tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n</section>\n"
    )
}

/// Every metric with what it means.
fn metrics(v: &Validation) -> String {
    let number = |value: Option<f64>| value.map_or("\u{2013}".to_string(), |value| format!("{value:.3}"));
    let share = |value: Option<f64>| value.map_or("\u{2013}".to_string(), percent);
    let rows = [
        (
            "loss@H",
            format!("{:.4}", v.loss_at_h),
            "mean NLL of the next H tokens behind LensNet's contexts, nats",
        ),
        (
            "of the oracle",
            share(v.of_oracle),
            "how much of what the oracle gains over recency LensNet gains; none where the oracle gains nothing",
        ),
        (
            "ranking accuracy",
            share(v.ranking_accuracy),
            "of pairs of entries whose measured worth differs by more than 0.1, those that the scores rank the same",
        ),
        ("Pearson", number(v.pearson), "correlation of scores with measured worth"),
        (
            "budget balance",
            number(v.budget_balance),
            "|P \u{2212} N|/(P + N) of entries that scores ask for and give back; 0 is balanced",
        ),
        ("legality", share(v.legality_rate), "part of the scores that ask for nothing impossible"),
        (
            "swap rate",
            format!("{:.3}", v.swap_rate),
            "edits of a refocus over entries; at most 0.25 is wanted",
        ),
        ("residency", format!("{:.2}", v.residency_mean), "mean refocuses since an entry last changed"),
        ("utilization", percent(v.utilization), "entries over the budget; 80 to 100 % is wanted"),
    ]
    .map(|(name, value, meaning): (&str, String, &str)| (name, value, meaning.to_string()));
    metrics_section(&rows)
}

fn how(report: &LensReport) -> String {
    let s = report.summary;
    let pairs = [
        ("best network", format!("step {} ({})", count(s.best_step), s.network)),
        ("parameters", count(s.parameters as u64)),
        ("a score of 1 stands for", format!("{:.4} nats per token", s.unit)),
        (
            "histories",
            format!(
                "{} to learn from, {} to choose by, {} to test on",
                count(s.histories as u64),
                s.held_out_histories,
                s.test_histories
            ),
        ),
        ("sources", s.data.join(", ")),
        ("GistNet", s.gistnet.clone()),
        ("memory", memory(s.planned_bytes, s.peak_bytes, s.device_memory)),
        ("base fingerprint", s.base_fingerprint.clone()),
        ("gist version", s.gist_version.to_string()),
        ("threads", s.threads.to_string()),
        ("device", s.device.clone()),
    ];
    how_section(&pairs, report.config)
}
