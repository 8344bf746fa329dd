//! The page's sections, in the order of a reader's questions: did it work, how well by length, how did training go, what
//! was trained, what did it cost, how do I read this, how do I repeat it.
//!
//! Styles are one sheet with two sets of colours. Tables that are wider than a phone scroll in their own box. Bars are
//! SVG rectangles of a percentage's width, so they need no drawing of their own for a phone.

use std::fmt::Write;

use super::RunReport;
use super::axes::{Size, marker_path};
use super::format::{bytes, change, context, count, escape, percent, perplexity, seconds, short_count};
use super::plots::{attention_name, loss_curve, perplexity_by_context, series};
use super::verdict::{against, judged_context, verdict};
use crate::run::summary::{ByContext, Summary};
use crate::train::device_plan::DeviceMemory;

/// The page.
pub fn render(report: &RunReport) -> String {
    let s = &report.summary;
    let title = if report.title.is_empty() { default_title(s) } else { report.title.clone() };
    let mut body = header(&escape(&title), s);
    body += &perplexity_section(s);
    body += &training_section(report);
    body += &groups_section(s);
    body += &cost_section(s);
    body += READING;
    body += &reproduce_section(report);
    page(&title, &body)
}

/// A page of this project: its title and what stands on it, HTML.
pub(super) fn page(title: &str, body: &str) -> String {
    let title = escape(title);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )
}

fn default_title(s: &Summary) -> String {
    if s.base.context > 0 && s.context != s.base.context {
        format!("Context extension, {} \u{2192} {} tokens", context(s.base.context), context(s.context))
    } else {
        format!("Adaptation at {} tokens", context(s.context))
    }
}

fn header(title: &str, s: &Summary) -> String {
    let verdict = verdict(s);
    let mut facts = vec![];
    if !s.base.path.is_empty() {
        facts.push(format!("base <b>{}</b>", escape(&s.base.path)));
    }
    facts.push(format!("{} steps", count(s.steps)));
    facts.push(seconds(s.seconds));
    facts.push(format!("seed {}", s.seed));
    let mut out = format!(
        "<header>\n<h1>{title}</h1>\n<p class=\"facts\">{}</p>\n</header>\n<section class=\"verdict\">\n<h2>{}</h2>\n\
         <p>{}</p>\n",
        facts.join(" \u{b7} "),
        escape(&verdict.headline),
        escape(&verdict.text)
    );
    let mut tiles: Vec<(String, String)> = vec![];
    if let Some(target) = judged_context(s) {
        let tokens = context(target);
        if let Some(value) = s.perplexity.adapted.get(&target) {
            tiles.push((perplexity(*value), format!("adapted perplexity at {tokens} tokens")));
        }
        if let Some(over) = against(s, &s.perplexity.base, target) {
            tiles.push((change(over), "against the base model there".into()));
        }
        if let Some(over) = against(s, &s.perplexity.interpolated, target) {
            tiles.push((change(over), "against interpolation alone there".into()));
        }
        if let (true, Some(over)) = (target != s.base.context, against(s, &s.perplexity.base, s.base.context))
        {
            tiles.push((
                change(over),
                format!("against the base model at {} tokens", context(s.base.context)),
            ));
        }
    }
    if !tiles.is_empty() {
        out += "<dl class=\"tiles\">\n";
        for (value, name) in tiles {
            let _ = writeln!(out, "<div><dt>{}</dt><dd>{}</dd></div>", escape(&name), escape(&value));
        }
        out += "</dl>\n";
    }
    out + "</section>\n"
}

fn perplexity_section(s: &Summary) -> String {
    let p = &s.perplexity;
    let mut contexts: Vec<usize> = series(s).iter().flat_map(|(_, _, line)| line.keys().copied()).collect();
    contexts.sort_unstable();
    contexts.dedup();
    if contexts.is_empty() {
        return String::new();
    }
    let mut out = String::from("<section>\n<h2>Perplexity by context length</h2>\n");
    out += &legend(s);
    out += &both(|size| perplexity_by_context(s, size));
    out += "<div class=\"scroll\"><table>\n<thead><tr><th>Tokens</th><th>Base model</th><th>Interpolated only</th>\
            <th>Adapted</th><th>Adapted against base</th><th>\u{2026} against interpolated</th></tr></thead>\n<tbody>\n";
    for tokens in &contexts {
        let values = [&p.base, &p.interpolated, &p.adapted].map(|line| line.get(tokens).copied());
        let best = values.iter().flatten().copied().filter(|v| v.is_finite()).fold(f64::INFINITY, f64::min);
        let _ = write!(out, "<tr><th scope=\"row\">{}</th>", context(*tokens));
        for value in values {
            out += &match value {
                None => "<td class=\"none\">\u{2013}</td>".into(),
                Some(v) if v == best => {
                    format!("<td class=\"best\"><b>{}</b><small>best</small></td>", perplexity(v))
                }
                Some(v) => format!("<td>{}</td>", perplexity(v)),
            };
        }
        for other in [&p.base, &p.interpolated] {
            out += &against(s, other, *tokens)
                .map_or("<td class=\"none\">\u{2013}</td>".into(), |x| format!("<td>{}</td>", change(x)));
        }
        out += "</tr>\n";
    }
    out += "</tbody>\n</table></div>\n";
    out += &evaluation_note(s);
    out += &gap(s);
    out + "</section>\n"
}

fn evaluation_note(s: &Summary) -> String {
    let mut note = String::from("<p class=\"note\">Held-out text, every token scored once, dense attention.");
    if s.data.held_out_documents > 0 {
        let _ = write!(
            note,
            " {} held-out documents of {} tokens.",
            count(s.data.held_out_documents as u64),
            count(s.data.held_out_tokens)
        );
    }
    let mut scored: Vec<u64> = s.evaluated_tokens.values().copied().collect();
    scored.sort_unstable();
    if let (Some(least), Some(most)) = (scored.first(), scored.last()) {
        let range =
            if least == most { count(*most) } else { format!("{} to {}", count(*least), count(*most)) };
        let _ = write!(note, " Scored at each length: {range} tokens.");
    }
    note + "</p>\n"
}

fn gap(s: &Summary) -> String {
    let rows: Vec<(usize, f64, f64)> = s
        .perplexity_sparse
        .iter()
        .filter_map(|(tokens, sparse)| Some((*tokens, *s.perplexity.adapted.get(tokens)?, *sparse)))
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    let mut out = String::from(
        "<h3>Sparse in training, dense in use</h3>\n<p>Sparse attention made training cheaper; the adapted model is \
         used with dense attention. How far the two are apart:</p>\n<div class=\"scroll\"><table>\n<thead><tr>\
         <th>Tokens</th><th>Dense</th><th>Sparse</th><th>Gap</th></tr></thead>\n<tbody>\n",
    );
    for (tokens, dense, sparse) in rows {
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{}</td></tr>",
            context(tokens),
            perplexity(dense),
            perplexity(sparse),
            change(sparse / dense - 1.0)
        );
    }
    out + "</tbody>\n</table></div>\n"
}

fn legend(s: &Summary) -> String {
    let mut out = String::from("<ul class=\"legend\">\n");
    for (shape, (class, name, line)) in series(s).into_iter().enumerate() {
        let line: &ByContext = line;
        if !line.is_empty() {
            let _ = writeln!(
                out,
                "<li><svg viewBox=\"0 0 30 12\" aria-hidden=\"true\"><path class=\"line {class}\" d=\"M1 6L29 6\"/>\
                 <path class=\"dot {class}\" d=\"{}\"/></svg>{name}</li>",
                marker_path(shape, 15.0, 6.0)
            );
        }
    }
    out + "</ul>\n"
}

pub(super) fn both(draw: impl Fn(Size) -> Option<String>) -> String {
    let drawings: Vec<String> = Size::BOTH.into_iter().filter_map(draw).collect();
    if drawings.is_empty() { String::new() } else { format!("<figure>{}</figure>\n", drawings.join("\n")) }
}

/// A section with every metric: name, value, what it is.
pub(super) fn metrics_section(rows: &[(&str, String, String)]) -> String {
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

/// A section on how a run came about: words with their values, and the settings as TOML.
pub(super) fn how_section(pairs: &[(&str, String)], config: &str) -> String {
    let mut out = String::from("<section>\n<h2>How it was made</h2>\n<dl class=\"pairs\">\n");
    for (word, value) in pairs {
        let _ = writeln!(out, "<div><dt>{word}</dt><dd>{}</dd></div>", escape(value));
    }
    let _ = write!(
        out,
        "</dl>\n<details>\n<summary>All settings (config.toml)</summary>\n<pre><code>{}</code></pre>\n</details>\n</section>\n",
        escape(config.trim_end())
    );
    out
}

fn training_section(report: &RunReport) -> String {
    let s = &report.summary;
    let plot = both(|size| loss_curve(&report.records, size));
    if plot.is_empty() && s.stages.is_empty() {
        return String::new();
    }
    let mut out = String::from("<section>\n<h2>How training went</h2>\n");
    if !plot.is_empty() {
        out += &plot;
        out += "<p class=\"note\">Thin line: each step. Thick line: its trend. Bands: stages.</p>\n";
    }
    if !s.stages.is_empty() {
        out += "<div class=\"scroll\"><table>\n<thead><tr><th>Stage</th><th>Tokens of context</th><th class=\"text\">Attention</th>\
                <th>RoPE scaling</th><th>Steps</th><th>Tokens trained</th><th>Loss, first \u{2192} last</th><th>Time</th>\
                </tr></thead>\n<tbody>\n";
        for (i, stage) in s.stages.iter().enumerate() {
            let group = stage.group.map(|g| format!(", groups of {}", count(g as u64))).unwrap_or_default();
            let _ = writeln!(
                out,
                "<tr><th scope=\"row\">{}</th><td>{}</td><td class=\"text\">{}{group}</td><td>{}</td><td>{}</td>\
                 <td>{}</td><td>{:.3} \u{2192} {:.3}</td><td>{}</td></tr>",
                i + 1,
                context(stage.context),
                escape(attention_name(&stage.attention)),
                escape(&if stage.rope.is_empty() {
                    format!("x{}", stage.factor)
                } else {
                    stage.rope.clone()
                }),
                count(stage.steps),
                short_count(stage.tokens),
                stage.first_loss,
                stage.last_loss,
                seconds(stage.seconds)
            );
        }
        out += "</tbody>\n</table></div>\n";
    }
    let d = &s.data;
    if d.train_documents > 0 {
        let sources: Vec<String> = d.sources.iter().map(|p| format!("<code>{}</code>", escape(p))).collect();
        let _ = writeln!(
            out,
            "<p class=\"note\">Text: {} documents, {} tokens{}{}.</p>",
            count(d.train_documents as u64),
            count(d.train_tokens),
            if sources.is_empty() { "" } else { ", from " },
            sources.join(", ")
        );
    }
    out + "</section>\n"
}

fn groups_section(s: &Summary) -> String {
    let total: u64 = s.groups.iter().map(|g| g.parameters).sum();
    if total == 0 {
        return String::new();
    }
    let trained: u64 = s.groups.iter().filter(|g| g.trained).map(|g| g.parameters).sum();
    let mut groups: Vec<_> = s.groups.iter().filter(|g| g.parameters > 0).collect();
    groups.sort_by_key(|g| (!g.trained, std::cmp::Reverse(g.parameters)));
    let mut out = format!(
        "<section>\n<h2>What was trained</h2>\n<p>{} of {} parameters learnt ({}). The others were frozen: they took \
         part in no gradient and are unchanged to the last bit.</p>\n",
        short_count(trained),
        short_count(total),
        percent(trained as f64 / total as f64)
    );
    let rows = groups.iter().map(|g| Bar {
        class: if g.trained { "trained" } else { "frozen" },
        name: g.name.clone(),
        detail: if g.trained { "trained".into() } else { "frozen".into() },
        share: g.parameters as f64 / total as f64,
        value: short_count(g.parameters),
        remark: percent(g.parameters as f64 / total as f64),
    });
    out += &bars("Parameters by group", rows.collect());
    out + "</section>\n"
}

fn cost_section(s: &Summary) -> String {
    let mut out = format!(
        "<section>\n<h2>What it cost</h2>\n<p>{} in all on {} {}, {} of memory at its peak.</p>\n",
        seconds(s.seconds),
        s.threads,
        if s.threads == 1 { "thread" } else { "threads" },
        bytes(s.peak_bytes)
    );
    let mut times: Vec<(String, String, f64)> = s
        .stages
        .iter()
        .enumerate()
        .map(|(i, g)| (format!("stage {}", i + 1), format!("{} tokens", context(g.context)), g.seconds))
        .collect();
    times.extend(s.seconds_by_part.iter().map(|(name, x)| (name.clone(), String::new(), *x)));
    let sum: f64 = times.iter().map(|t| t.2).sum();
    let whole = sum.max(s.seconds);
    if whole > 0.0 && !times.is_empty() {
        if s.seconds - sum > 0.01 * whole {
            times.push(("other".into(), String::new(), s.seconds - sum));
        }
        let rows = times.into_iter().map(|(name, detail, x)| Bar {
            class: "cost",
            name,
            detail,
            share: x / whole,
            value: seconds(x),
            remark: percent(x / whole),
        });
        out += &bars("Time", rows.collect());
    }
    let planned: u64 = s.planned_bytes.values().sum();
    let mut kinds: Vec<_> = s.planned_bytes.iter().filter(|(_, n)| **n > 0).collect();
    kinds.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
    if planned > 0 {
        let rows = kinds.into_iter().map(|(name, n)| Bar {
            class: "cost",
            name: name.replace('_', " "),
            detail: String::new(),
            share: *n as f64 / planned as f64,
            value: bytes(*n),
            remark: percent(*n as f64 / planned as f64),
        });
        let there = s.device_memory.map_or(String::new(), |there| format!("; of the GPU {}", there.text()));
        let title = format!("Memory as planned before the first step, {} in all{there}", bytes(planned));
        out += &bars(&title, rows.collect());
    }
    out + "</section>\n"
}

/// What a run held, and of a GPU, where its passes ran on one.
pub(super) fn memory(planned: u64, peak: u64, there: Option<DeviceMemory>) -> String {
    let here = DeviceMemory { planned_bytes: planned, peak_bytes: peak }.text();
    there.map_or(here.clone(), |there| format!("{here}; of the GPU {}", there.text()))
}

pub(super) struct Bar {
    pub class: &'static str,
    pub name: String,
    pub detail: String,
    /// Of the full width, 0 to 1.
    pub share: f64,
    pub value: String,
    pub remark: String,
}

pub(super) fn bars(caption: &str, rows: Vec<Bar>) -> String {
    let mut out = format!("<table class=\"bars\">\n<caption>{}</caption>\n<tbody>\n", escape(caption));
    for row in rows {
        let width = (row.share.clamp(0.0, 1.0) * 1000.0).round() / 10.0;
        let detail = if row.detail.is_empty() {
            String::new()
        } else {
            format!(" <small>{}</small>", escape(&row.detail))
        };
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\">{}{detail}</th><td class=\"bar\"><svg aria-hidden=\"true\"><rect class=\"track\" \
             width=\"100%\" height=\"100%\" rx=\"3\"/><rect class=\"{}\" width=\"max(2px, {width}%)\" height=\"100%\" \
             rx=\"3\"/></svg></td><td>{}</td><td class=\"share\">{}</td></tr>",
            escape(&row.name),
            row.class,
            escape(&row.value),
            escape(&row.remark)
        );
    }
    out + "</tbody>\n</table>\n"
}

fn reproduce_section(report: &RunReport) -> String {
    let s = &report.summary;
    let mut out = String::from(
        "<section>\n<h2>How to repeat it</h2>\n<p>The same command, seed, number of threads and versions on the same \
         text give an adapter of the same bytes, whether or not the run was interrupted.</p>\n",
    );
    if !s.command.is_empty() {
        let _ = writeln!(out, "<pre><code>{}</code></pre>", escape(&s.command));
    }
    out += "<dl class=\"pairs\">\n";
    let mut pairs: Vec<(String, String)> =
        vec![("seed".into(), s.seed.to_string()), ("threads".into(), s.threads.to_string())];
    if !s.device.is_empty() {
        pairs.push(("device".into(), s.device.clone()));
    }
    if s.base.parameters > 0 {
        let shape = format!(
            "{} parameters, {} layers of width {}, {} tokens of vocabulary, trained to {} tokens",
            short_count(s.base.parameters),
            s.base.layers,
            s.base.hidden_size,
            count(s.base.vocab_size as u64),
            context(s.base.context)
        );
        pairs.push(("base".into(), shape));
    }
    if !s.base.fingerprint.is_empty() {
        pairs.push(("base fingerprint".into(), s.base.fingerprint.clone()));
    }
    pairs.extend(s.versions.iter().map(|(name, version)| (name.clone(), version.clone())));
    for (name, value) in pairs {
        let _ = writeln!(out, "<div><dt>{}</dt><dd>{}</dd></div>", escape(&name), escape(&value));
    }
    out += "</dl>\n";
    if !report.config.is_empty() {
        let _ = writeln!(
            out,
            "<details>\n<summary>All settings (config.toml)</summary>\n<pre><code>{}</code></pre>\n</details>",
            escape(report.config.trim_end())
        );
    }
    out + "</section>\n"
}

const READING: &str = "<section class=\"reading\">\n<h2>How to read this</h2>\n<dl>\n\
<div><dt>Perplexity</dt><dd>How unsure the model is of the next token, on average: at a perplexity of 20 as unsure as in \
a fair choice among 20 tokens. Lower is better. It depends on the text and on the tokenizer, so compare it only within \
this page.</dd></div>\n\
<div><dt>Context length</dt><dd>How many tokens the model sees at once. More context should lower the perplexity; a rise \
beyond the length a model was trained for shows that it cannot use positions that far out.</dd></div>\n\
<div><dt>Base model</dt><dd>The model as it came, without any change.</dd></div>\n\
<div><dt>Interpolated only</dt><dd>The same weights, but positions are squeezed so that the longer text falls into the \
range of positions the model knows. No training.</dd></div>\n\
<div><dt>Adapted</dt><dd>Interpolated, then trained on long text: small low-rank matrices (LoRA) in the attention, and, \
where chosen, the embeddings and norms. This is what the adapter folder holds.</dd></div>\n\
<div><dt>Shifted sparse attention</dt><dd>In training each token looks only at its own group of neighbours; half of the \
heads use groups moved by half a group, so that information still travels along the whole text. It saves time; in use \
the model attends to everything.</dd></div>\n\
<div><dt>Loss</dt><dd>The logarithm of the perplexity on the training text, in nats per token. It may jump where a new \
stage brings longer text and another position scale.</dd></div>\n\
</dl>\n</section>\n";

const STYLE: &str = include_str!("report.css");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn page_is_whole_and_asks_for_nothing() {
        let page = render(&sample());
        assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
        for absent in [
            "<script", "http://", "https://", "src=", "href=", "url(", "@import", "NaN", "inf ", "infL",
            "inf\"",
        ] {
            assert!(!page.contains(absent), "{absent}");
        }
        for tag in ["section", "svg", "table", "tr", "td", "div", "dl", "dd", "text", "figure", "details"] {
            let open = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
            assert_eq!(open, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        assert_eq!(page.matches("<svg class=\"plot").count(), 4);
        // 256 tokens: base and interpolated are the same model, both are marked.
        assert_eq!(page.matches("<td class=\"best\">").count(), 4);
        assert!(page.len() < 200_000, "{} bytes", page.len());
    }

    #[test]
    fn text_from_outside_is_escaped() {
        let mut report = sample();
        let evil = "</style><script>alert('x')</script>\"&";
        report.title = evil.into();
        report.config = evil.into();
        let s = &mut report.summary;
        for field in [&mut s.command, &mut s.base.path, &mut s.base.fingerprint, &mut s.stages[0].attention] {
            *field = evil.into();
        }
        s.groups[0].name = evil.into();
        s.data.sources = vec![evil.into()];
        s.seconds_by_part.insert(evil.into(), 3.0);
        s.planned_bytes.insert(evil.into(), 3 << 30);
        s.versions.insert(evil.into(), evil.into());
        if let crate::run::metrics::Record::Stage(stage) = &mut report.records[0] {
            stage.attention = evil.into();
        }
        let page = render(&report);
        assert!(!page.contains("<script") && !page.contains("alert('x')"));
        assert!(page.matches("&lt;script&gt;").count() >= 11);
    }

    #[test]
    fn empty_and_broken_runs_still_make_a_page() {
        let page = render(&RunReport::default());
        assert!(page.contains("Nothing was evaluated.") && !page.contains("NaN"));
        let mut report = sample();
        let bad = [(256, f64::NAN), (512, f64::INFINITY), (1024, 0.0)];
        report.summary.perplexity.base = bad.into();
        report.summary.perplexity.adapted = bad.into();
        report.summary.seconds = f64::NAN;
        let page = render(&report);
        assert!(page.contains("not a number") && !page.contains("NaN"));
        report.summary.perplexity.interpolated = [(1024, 3.0)].into();
        render(&report);
    }
}
