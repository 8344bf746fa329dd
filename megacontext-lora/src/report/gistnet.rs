//! `report.html` of a run that trained GistNet: what gists cost beside everything else that could stand for a block, how that
//! went over the steps, and every metric with its definition.
//!
//! The frame, the styles and the rules are those of a run's page: self-contained, escaped, for phone, desktop and paper.

use std::fmt::Write;

use gistnet_adapter::metrics::COLLAPSE;
use gistnet_adapter::validate::{Baseline, SUBSTITUTED, Validation};

use super::axes::{Drawing, Scale, Size};
use super::format::{bytes, count, escape, percent, seconds, tick};
use super::html::{both, page};
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
    let h = s.validation.horizon;
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
    body += &stand_ins(s);
    body += &course(report);
    body += &metrics(&s.validation);
    body += &how(report);
    page(&title, &body)
}

/// The outcome in a sentence.
fn headline(s: &GistSummary) -> String {
    let best = s.baselines.iter().filter(|(b, _)| **b != Baseline::Deleted);
    let cheaper = best.filter(|(_, delta)| **delta < s.validation.delta_nll).count();
    if !s.recovered.is_finite() || s.recovered <= 0.0 {
        return "Gists do not help yet: a block costs no less with its gist than without it.".to_string();
    }
    let share = percent(s.recovered);
    match cheaper {
        0 => format!(
            "A gist recovers {share} of what deleting its block costs, more than the block's last four tokens do."
        ),
        _ => format!("A gist recovers {share} of what deleting its block costs."),
    }
}

fn text(s: &GistSummary) -> String {
    let of = |baseline| s.baselines.get(&baseline).copied().unwrap_or(f64::NAN);
    let mut text = format!(
        "Replaced by its gist, a block costs {:.3} nats per token over the next {} tokens; deleted {:.3}, replaced by the mean of \
         its embeddings {:.3}, by its last token {:.3}. Measured on {} held-out blocks.",
        s.validation.delta_nll,
        s.validation.horizon,
        of(Baseline::Deleted),
        of(Baseline::Mean),
        of(Baseline::LastToken),
        count(s.validation.blocks as u64)
    );
    if s.validation.diversity.is_some_and(|diversity| diversity < COLLAPSE) {
        text += " The gists are much alike: a contrastive term pushes them apart.";
    }
    text
}

fn name(baseline: Baseline) -> &'static str {
    match baseline {
        Baseline::Deleted => "nothing (deleted)",
        Baseline::Mean => "mean of its embeddings",
        Baseline::LastToken => "its last token",
        Baseline::Last2 => "its last 2 tokens",
        Baseline::Last4 => "its last 4 tokens",
    }
}

/// Table of what stands for a block, the dearest first.
fn stand_ins(s: &GistSummary) -> String {
    let deleted = s.baselines.get(&Baseline::Deleted).copied();
    let mut rows: Vec<(&str, f64)> = s.baselines.iter().map(|(b, delta)| (name(*b), *delta)).collect();
    rows.push(("its gist", s.validation.delta_nll));
    rows.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut out = String::from(
        "<section>\n<h2>What stands for a block, and what it costs</h2>\n<div class=\"scroll\"><table>\n<thead><tr>\
         <th>In the block's place</th><th>\u{394}NLL, nats per token</th><th>Recovered</th></tr></thead>\n<tbody>\n",
    );
    for (name, delta) in rows {
        let own = name == "its gist";
        let recovered = deleted.map_or("\u{2013}".to_string(), |deleted| percent(1.0 - delta / deleted));
        let class = if own { " class=\"best\"" } else { "" };
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\">{name}</th><td{class}>{}</td><td>{recovered}</td></tr>",
            if own { format!("<b>{delta:.4}</b>") } else { format!("{delta:.4}") }
        );
    }
    out + "</tbody>\n</table></div>\n<p class=\"note\">Recovered is 1 less the cost over that of deleting the block. Tokens stand \
           at their own places; the mean and the gist are one entry, at the gist's place. The network is the best of all validations on\n           these blocks.</p>\n</section>\n"
}

/// ΔNLL@H over the steps, with what else could stand for a block as level lines.
fn course(report: &GistReport) -> String {
    let plot = both(|size| curve(report, size));
    if plot.is_empty() {
        return String::new();
    }
    format!(
        "<section>\n<h2>How it went</h2>\n{plot}<p class=\"note\">Line with points: held-out text. Thin line: the steps' own blocks. \
         Level lines: the same held-out blocks with something else in their place. A stage with another horizon is another \
         measure.</p>\n</section>\n"
    )
}

fn curve(report: &GistReport, size: Size) -> Option<String> {
    let horizon = report.summary.validation.horizon;
    let mut validations: Vec<(f64, f64)> = Vec::new();
    let mut steps: Vec<(f64, f64)> = Vec::new();
    for record in report.records {
        match record {
            Record::GistValidation(r) if r.validation.delta_nll.is_finite() => {
                validations.push((r.step as f64, r.validation.delta_nll));
            }
            Record::GistStep(r) if r.delta_nll.is_finite() => steps.push((r.step as f64, r.delta_nll)),
            _ => {}
        }
    }
    let last = steps.last()?.0;
    let levels: Vec<(&str, f64)> = [Baseline::Deleted, Baseline::Mean, Baseline::LastToken, Baseline::Last4]
        .into_iter()
        .filter_map(|b| Some((name(b), *report.summary.baselines.get(&b)?)))
        .collect();
    let smooth: Vec<(f64, f64)> = steps
        .chunks((steps.len() / 120).max(1))
        .map(|part| {
            let n = part.len() as f64;
            (part.iter().map(|p| p.0).sum::<f64>() / n, part.iter().map(|p| p.1).sum::<f64>() / n)
        })
        .collect();
    let values = validations.iter().chain(&smooth).map(|p| p.1).chain(levels.iter().map(|l| l.1));
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    let wide = size == Size::Wide;
    let (left, right, top, height) = if wide {
        (58.0, size.width() - 190.0, 26.0, 340.0)
    } else {
        (44.0, size.width() - 12.0, 26.0, 290.0)
    };
    let bottom = height - 44.0;
    let room = (high - low).max(1e-3) * 0.08;
    let x = Scale::linear((0.0, last), (left, right));
    let y = Scale::linear(((low - room).min(0.0), high + room), (bottom, top));
    let mut drawing =
        Drawing::new(size, height, &format!("\u{394}NLL@{horizon} over {last} optimiser steps"));
    let (ticks, step) = y.ticks(5);
    for value in ticks {
        drawing.line("grid", (left, y.at(value)), (right, y.at(value)));
        drawing.text("tick", (left - 8.0, y.at(value) + 4.0), "end", &tick(value, step));
    }
    drawing.line("axis", (left, bottom), (right, bottom));
    let (ticks, step) = x.ticks(6);
    for value in ticks {
        drawing.line("axis", (x.at(value), bottom), (x.at(value), bottom + 5.0));
        drawing.text("tick", (x.at(value), bottom + 19.0), "middle", &tick(value, step));
    }
    drawing.text("caption", ((left + right) / 2.0, height - 7.0), "middle", "optimiser steps");
    let edge = if wide { 4.0 } else { 0.0 };
    drawing.text("caption", (edge, 13.0), "start", "\u{394}NLL, nats per token (lower is better)");
    let mut ends: Vec<(f64, &str, String)> = Vec::new();
    for (name, value) in &levels {
        drawing.line("mark", (left, y.at(*value)), (right, y.at(*value)));
        ends.push((y.at(*value), "note", format!("{name} {value:.3}")));
        if !wide {
            drawing.text("note halo", (left + 4.0, y.at(*value) - 4.0), "start", name);
        }
    }
    let at = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
        points.iter().map(|(s, v)| (x.at(*s), y.at(*v))).collect()
    };
    drawing.path("line raw", &at(&smooth));
    drawing.path("line adapted", &at(&validations));
    for ((step, value), place) in validations.iter().zip(at(&validations)) {
        drawing.marker("dot adapted", 0, place, &format!("step {step}: {value:.4} nats per token"));
    }
    if let Some((_, value)) = validations.last() {
        ends.push((y.at(*value), "end adapted", format!("gist {value:.3}")));
    }
    if wide {
        for (at, class, text) in super::plots::spread(ends, 17.0, (top, bottom)) {
            drawing.text(class, (right + 4.0, at + 4.0), "start", &text);
        }
    }
    Some(drawing.finish())
}

/// Every metric with what it means.
fn metrics(v: &Validation) -> String {
    let number = |value: Option<f64>| value.map_or("\u{2013}".to_string(), |value| format!("{value:.3}"));
    let rows = [
        (
            "\u{394}NLL@H",
            format!("{:.4} \u{b1} {:.4}", v.delta_nll, v.delta_nll_error),
            "how much worse each of the next H tokens is predicted, nats; with the standard error over blocks".to_string(),
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
            percent(v.degradation),
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
            "a span of K\u{b2} tokens replaced by one entry; below 2 is wanted; none where no document has room".to_string(),
        ),
        (
            "sparse less dense",
            number(v.sparse_dense_gap()),
            "\u{394}NLL@H under shifted sparse attention less that under dense".to_string(),
        ),
    ];
    let mut out = String::from(
        "<section>\n<h2>All metrics</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th>Metric</th><th>Value</th>\
         <th>What it is</th></tr></thead>\n<tbody>\n",
    );
    for (name, value, meaning) in rows {
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\">{name}</th><td>{value}</td><td class=\"words\">{meaning}</td></tr>"
        );
    }
    out + "</tbody>\n</table></div>\n</section>\n"
}

fn how(report: &GistReport) -> String {
    let s = report.summary;
    let pairs = [
        ("ended", s.ended.clone()),
        ("best network", format!("step {} ({})", count(s.best_step), s.network)),
        ("parameters", count(s.parameters as u64)),
        (
            "text",
            format!("{} passages to learn from, {} held out", count(s.passages as u64), s.held_out_passages),
        ),
        ("sources", s.data.join(", ")),
        ("memory", format!("planned {}, at most {} used", bytes(s.planned_bytes), bytes(s.peak_bytes))),
        ("base fingerprint", s.base_fingerprint.clone()),
        ("gist version", s.gist_version.to_string()),
        ("threads", s.threads.to_string()),
    ];
    let mut out = String::from("<section>\n<h2>How it was made</h2>\n<dl class=\"pairs\">\n");
    for (word, value) in pairs {
        let _ = writeln!(out, "<div><dt>{word}</dt><dd>{}</dd></div>", escape(&value));
    }
    let _ = write!(
        out,
        "</dl>\n<details>\n<summary>All settings (config.toml)</summary>\n<pre><code>{}</code></pre>\n</details>\n</section>\n",
        escape(report.config.trim_end())
    );
    out
}
