//! `report.html` of a run of alternating optimisation: what each phase changed, what stands for spans and who chooses contexts and
//! what that costs, which module the result hangs on, and every metric with its definition.
//!
//! The frame, the styles and the rules are those of a run's page: self-contained, escaped, for phone, desktop and paper.

use std::fmt::Write;

use super::axes::{Drawing, Scale, Size};
use super::format::{count, escape, percent, seconds, tick};
use super::html::{both, how_section, memory, metrics_section, page};
use super::lensnet::policy_name;
use crate::jobs::train::{CycleSummary, PhaseSummary, STAND_INS};
use crate::run::metrics::Record;
use crate::train::cycle::PhaseKind;

/// What the page is made of.
#[derive(Clone, Copy, Debug)]
pub struct CycleReport<'a> {
    /// The outcome.
    pub summary: &'a CycleSummary,
    /// What was measured on the way, in its order.
    pub records: &'a [Record],
    /// The settings as resolved, TOML.
    pub config: &'a str,
}

/// The page.
pub fn render(report: &CycleReport) -> String {
    let s = report.summary;
    let title =
        format!("Alternating optimisation at {} tokens in {} entries", count(s.context as u64), s.budget);
    let facts = [
        format!("base <b>{}</b>", escape(&s.base)),
        format!("{} {}, {} steps", s.cycles, if s.cycles == 1 { "cycle" } else { "cycles" }, count(s.steps)),
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
    body += &phases(s);
    body += &stand_ins(s);
    body += &policies(s);
    body += &ablation(s);
    body += &metrics(s);
    body += &how(report);
    page(&title, &body)
}

/// A signed number with a real minus sign.
fn signed(value: f64) -> String {
    format!("{value:+.4}").replace('-', "\u{2212}")
}

/// A phase in few words.
pub fn phase_name(phase: &PhaseSummary) -> String {
    let what = match phase.place.kind {
        PhaseKind::WarmGistnet => return "warm start, GistNet".to_string(),
        PhaseKind::WarmLensnet => return "warm start, LensNet".to_string(),
        PhaseKind::Jt1 => "JT1, GistNet",
        PhaseKind::Jt2 => "JT2, LensNet",
        PhaseKind::Jt3 => "JT3, LoRA",
    };
    format!("cycle {}, {what}", phase.place.cycle)
}

/// Phases of the run itself.
fn own(s: &CycleSummary) -> impl Iterator<Item = &PhaseSummary> {
    s.phases.iter().filter(|phase| phase.place.without.is_none())
}

/// The outcome in a sentence.
fn headline(s: &CycleSummary) -> String {
    let undone = own(s).filter(|phase| !phase.verdict.kept()).count();
    let undone = match undone {
        0 => "every phase was kept".to_string(),
        1 => "one phase was rolled back".to_string(),
        n => format!("{n} phases were rolled back"),
    };
    match &s.test_change {
        None => format!("Loss@{} at the end is {:.3} nats; {undone}.", s.horizon, s.test.loss_at_h),
        Some(change) => {
            let clear = change.mean.abs() > 2.0 * change.error;
            let what = match (clear, change.mean < 0.0) {
                (false, _) => "The cycles changed loss@H by no more than chance would".to_string(),
                (true, true) => format!("The cycles lowered loss@{} by {:.3} nats", s.horizon, -change.mean),
                (true, false) => format!("The cycles raised loss@{} by {:.3} nats", s.horizon, change.mean),
            };
            format!("{what}; {undone}.")
        }
    }
}

fn text(s: &CycleSummary) -> String {
    let mut text = format!(
        "With {} entries for histories of {} tokens, the next {} tokens cost {:.3} nats each on test documents that nothing was \
         chosen by ({:.3} after the warm start), {:.3} behind the whole history as tokens.",
        s.budget,
        count((s.context - s.horizon) as u64),
        s.horizon,
        s.test.loss_at_h,
        s.test_before.loss_at_h,
        s.test.full_loss
    );
    if let (Some(gist), Some(deleted)) = (s.delta_nll.get("gist"), s.delta_nll.get("deleted")) {
        let _ = write!(
            text,
            " A span that the policy collapsed costs {gist:.3} nats as a gist, {deleted:.3} when it is left out."
        );
    }
    text
}

/// What each phase changed, as picture and table.
fn phases(s: &CycleSummary) -> String {
    let mut out = String::from("<section>\n<h2>What each phase changed</h2>\n");
    out += &both(|size| steps(s, size));
    let _ = write!(
        out,
        "<div class=\"scroll\"><table>\n<thead><tr><th>Phase</th><th>loss@{} before</th><th>after</th><th>change</th>\
         <th></th><th>\u{394}NLL of gists</th><th>whole history</th><th>swap rate</th><th>tokens</th></tr></thead>\n<tbody>\n",
        s.horizon
    );
    for phase in own(s) {
        let gist = |of: &crate::jobs::train::Evaluation| {
            of.delta_nll.get("gist").map_or("\u{2013}".to_string(), |cost| format!("{cost:.3}"))
        };
        let kept = phase.verdict.kept();
        let class = if kept { "" } else { " class=\"undone\"" };
        let _ = writeln!(
            out,
            "<tr{class}><th scope=\"row\">{}</th><td>{:.4}</td><td>{:.4}</td><td>{} \u{b1} {:.4}</td><td>{}</td><td>{} \u{2192} {}</td>\
             <td>{:.3} \u{2192} {:.3}</td><td>{:.3}</td><td>{}</td></tr>",
            escape(&phase_name(phase)),
            phase.before.loss_at_h,
            phase.after.loss_at_h,
            signed(phase.change.mean),
            phase.change.error,
            if kept { "kept" } else { "rolled back" },
            gist(&phase.before),
            gist(&phase.after),
            phase.before.full_loss,
            phase.after.full_loss,
            phase.after.swap_rate,
            count(phase.context as u64)
        );
    }
    out += "</tbody>\n</table></div>\n";
    for phase in own(s).filter(|phase| !phase.verdict.kept()) {
        let _ = writeln!(
            out,
            "<p class=\"note\">{}: {}.</p>",
            escape(&phase_name(phase)),
            escape(&phase.verdict.text())
        );
    }
    out + "<p class=\"note\">On the histories that phases are judged by, the same before and after; changes \
           are paired, with their standard error. GistNet's phases are measured in the contexts that were chosen when they began; the next phase \
           begins with contexts chosen by the new gists. A phase that was rolled back left everything as it was before it.</p>\n</section>\n"
}

/// Loss@H from phase to phase.
fn steps(s: &CycleSummary, size: Size) -> Option<String> {
    let all: Vec<&PhaseSummary> = own(s).collect();
    let first = all.first()?;
    let mut now = first.before.loss_at_h;
    let mut points = vec![(0usize, now)];
    for (at, phase) in all.iter().enumerate() {
        if phase.verdict.kept() {
            now = phase.after.loss_at_h;
        }
        points.push((at + 1, now));
    }
    let tried = all.iter().map(|phase| phase.after.loss_at_h);
    let values =
        points.iter().map(|point| point.1).chain(tried).chain(all.iter().map(|phase| phase.after.full_loss));
    let (low, high) = values
        .filter(|value| value.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if !low.is_finite() {
        return None;
    }
    let wide = size == Size::Wide;
    let (left, right) = if wide { (58.0, size.width() - 150.0) } else { (44.0, size.width() - 12.0) };
    let (top, height) = (26.0, if wide { 300.0 } else { 260.0 });
    let bottom = height - 58.0;
    let room = (high - low).max(1e-2) * 0.12;
    let x = Scale::linear((0.0, all.len() as f64), (left, right));
    let y = Scale::linear((low - room, high + room), (bottom, top));
    let label = format!("Loss@{} from phase to phase", s.horizon);
    let mut drawing = Drawing::new(size, height, &label);
    let (ticks, step) = y.ticks(5);
    for value in ticks {
        drawing.line("grid", (left, y.at(value)), (right, y.at(value)));
        drawing.text("tick", (left - 8.0, y.at(value) + 4.0), "end", &tick(value, step));
    }
    drawing.line("axis", (left, bottom), (right, bottom));
    for (at, phase) in all.iter().enumerate() {
        let middle = x.at(at as f64 + 0.5);
        let name = match phase.place.kind {
            PhaseKind::WarmGistnet => "GistNet",
            PhaseKind::WarmLensnet => "LensNet",
            PhaseKind::Jt1 => "JT1",
            PhaseKind::Jt2 => "JT2",
            PhaseKind::Jt3 => "JT3",
        };
        let few = all.len() <= if wide { 16 } else { 6 };
        if few || phase.place.kind == PhaseKind::Jt1 {
            drawing.text("tick", (middle, bottom + 17.0), "middle", if few { name } else { "cycle" });
            let under =
                if phase.place.cycle == 0 { "warm".to_string() } else { phase.place.cycle.to_string() };
            drawing.text("tick", (middle, bottom + 32.0), "middle", &under);
        }
        if at > 0 && all[at - 1].place.cycle != phase.place.cycle {
            drawing.line("mark", (x.at(at as f64), top), (x.at(at as f64), bottom));
        }
    }
    drawing.text("caption", ((left + right) / 2.0, height - 7.0), "middle", "phases, cycle by cycle");
    drawing.text(
        "caption",
        (if wide { 4.0 } else { 0.0 }, 13.0),
        "start",
        &format!("loss@{}, nats per token (lower is better)", s.horizon),
    );
    let line: Vec<(f64, f64)> = points.iter().map(|(at, loss)| (x.at(*at as f64), y.at(*loss))).collect();
    let full: Vec<(f64, f64)> = all
        .iter()
        .enumerate()
        .map(|(at, phase)| {
            let held = if phase.verdict.kept() { &phase.after } else { &phase.before };
            (x.at(at as f64 + 1.0), y.at(held.full_loss))
        })
        .collect();
    drawing.path("line raw", &full);
    drawing.path("line adapted", &line);
    for (at, phase) in all.iter().enumerate() {
        let place = x.at(at as f64 + 1.0);
        let hint = format!("{}: {:.4}, {}", phase_name(phase), phase.after.loss_at_h, phase.verdict.text());
        if phase.verdict.kept() {
            drawing.marker("dot adapted", 0, (place, y.at(phase.after.loss_at_h)), &hint);
        } else if phase.after.loss_at_h.is_finite() {
            drawing.marker("dot base", 2, (place, y.at(phase.after.loss_at_h)), &hint);
        }
    }
    if wide {
        if let Some(end) = line.last() {
            drawing.text("end adapted", (right + 8.0, end.1 + 4.0), "start", &format!("contexts {now:.3}"));
        }
        if let (Some(end), Some(phase)) = (full.last(), all.last()) {
            let text = format!("whole history {:.3}", phase.after.full_loss);
            drawing.text("note", (right + 8.0, end.1 + 4.0), "start", &text);
        }
    }
    Some(drawing.finish())
}

fn stand_ins(s: &CycleSummary) -> String {
    if s.delta_nll.is_empty() {
        return String::new();
    }
    let name = |stand_in: &str| match stand_in {
        "gist" => "its gist",
        "deleted" => "nothing (deleted)",
        "mean" => "the mean of its embeddings",
        _ => "its last token",
    };
    let mut out = format!(
        "<section>\n<h2>What a collapsed span costs, by what stands for it</h2>\n<div class=\"scroll\"><table>\n<thead><tr>\
         <th>In the span's place</th><th>\u{394}NLL@{h} after the warm start</th><th>\u{394}NLL@{h} at the end</th></tr></thead>\n<tbody>\n",
        h = s.horizon
    );
    for stand_in in STAND_INS {
        let cell = |of: &std::collections::BTreeMap<String, f64>| {
            of.get(stand_in)
                .map_or("\u{2013}".to_string(), |cost| format!("{cost:.4}").replace('-', "\u{2212}"))
        };
        let (before, after) = (cell(&s.test_before.delta_nll), cell(&s.delta_nll));
        let after = if stand_in == "gist" { format!("<b>{after}</b>") } else { after };
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\">{}</th><td>{before}</td><td>{after}</td></tr>",
            name(stand_in)
        );
    }
    let _ = write!(
        out,
        "</tbody>\n</table></div>\n<p class=\"note\">Spans that the policy of the time shows as gists, each replaced by itself, on test \
         documents: {} after the warm start, {} at the end. Another policy collapses other spans.</p>\n</section>\n",
        s.test_before.spans, s.test.spans
    );
    out
}

fn policies(s: &CycleSummary) -> String {
    if s.focus_loss.is_empty() {
        return String::new();
    }
    let mut out = format!(
        "<section>\n<h2>Who chooses the context, and what it costs</h2>\n<div class=\"scroll\"><table>\n<thead><tr>\
         <th>Contexts chosen by</th><th>loss@{}, nats per token</th><th>LensNet less this</th></tr></thead>\n<tbody>\n",
        s.horizon
    );
    for (policy, loss) in crate::jobs::train::by_loss(&s.focus_loss) {
        let difference = s.focus_against.get(policy).map_or("\u{2013}".to_string(), |difference| {
            format!("{} \u{b1} {:.4}", signed(difference.mean), difference.error)
        });
        let loss = if policy == "lensnet" { format!("<b>{loss:.4}</b>") } else { format!("{loss:.4}") };
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\">{}</th><td>{loss}</td><td>{difference}</td></tr>",
            policy_name(policy)
        );
    }
    out + "</tbody>\n</table></div>\n<p class=\"note\">At the end, on test documents that nothing was chosen by; all contexts begin the \
           same and keep to the same budget. Differences are paired, with their standard error.</p>\n</section>\n"
}

fn ablation(s: &CycleSummary) -> String {
    if s.ablation.is_empty() {
        return String::new();
    }
    let mut out = format!(
        "<section>\n<h2>Does freezing a module hurt?</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th>Frozen from the \
         start</th><th>loss@{}</th><th>more than with all three</th></tr></thead>\n<tbody>\n",
        s.horizon
    );
    let _ = writeln!(
        out,
        "<tr><th scope=\"row\">nothing</th><td><b>{:.4}</b></td><td>\u{2013}</td></tr>",
        s.test.loss_at_h
    );
    for pass in &s.ablation {
        let Some(difference) = &pass.change else { continue };
        let name = pass.without.map_or("nothing".to_string(), |group| group.to_string());
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\">{}</th><td>{:.4}</td><td>{} \u{b1} {:.4}</td></tr>",
            escape(&name),
            pass.test.loss_at_h,
            signed(difference.mean),
            difference.error
        );
    }
    out + "</tbody>\n</table></div>\n<p class=\"note\">The same run again, its warm start included, one module left as it began: a \
           GistNet of random weights, recency in LensNet's place, LoRA as the adapter had it. On test documents, paired, with standard \
           errors.</p>\n</section>\n"
}

/// Every metric with what it means.
fn metrics(s: &CycleSummary) -> String {
    let e = &s.test;
    let mut rows = vec![
        (
            "loss@H",
            format!("{:.4}", e.loss_at_h),
            "mean NLL of the next H tokens behind the chosen contexts, nats".to_string(),
        ),
        (
            "whole history",
            format!("{:.4}", e.full_loss),
            "the same behind all tokens of the history: what no budget would cost".to_string(),
        ),
        (
            "\u{394}NLL degradation",
            format!("{:.4}", e.delta_nll_degradation),
            "the first less the second: what the budget costs; at most 0.1 is wanted".to_string(),
        ),
        (
            "swap rate",
            format!("{:.3}", e.swap_rate),
            "edits of a refocus over entries; at most 0.25 is wanted".to_string(),
        ),
        (
            "residency",
            format!("{:.2}", e.residency_mean),
            "mean refocuses since an entry last changed; contexts here are young".to_string(),
        ),
        ("utilization", percent(e.utilization), "entries over the budget; 80 to 100 % is wanted".to_string()),
    ];
    if let Some(gap) = e.sparse_dense_gap {
        rows.push((
            "sparse less dense",
            signed(gap),
            "loss@H of the same contexts under shifted sparse attention less that under dense, nats"
                .to_string(),
        ));
    }
    metrics_section(&rows)
}

fn how(report: &CycleReport) -> String {
    let s = report.summary;
    let [train, validation, test] = s.histories;
    let pairs = [
        ("ended", s.ended.clone()),
        ("adapter", s.adapter.clone()),
        ("GistNet", s.gistnet.clone()),
        ("LensNet", s.lensnet.clone()),
        (
            "histories",
            format!("{} to learn from, {validation} to judge by, {test} to test on", count(train as u64)),
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
