//! `report.html` of a sweep over LoRA ranks: which rank to take, held-out loss against rank, what each cost.
//!
//! The frame, the styles and the rules are those of a run's page: self-contained, escaped, for phone, desktop and paper.

use std::fmt::Write;

use super::axes::{Drawing, Scale, Size};
use super::format::{bytes, context, count, escape, percent, perplexity, seconds, short_count, tick};
use super::html::{Bar, bars, both, page};
use crate::jobs::sweep::{RankSummary, SweepSummary};
use crate::train::rank::Standing;

/// The page; `config` are the settings as TOML.
pub fn render(s: &SweepSummary, config: &str) -> String {
    let title = format!("Which LoRA rank, at {} tokens", context(s.context));
    let mut body = header(&title, s);
    body += &losses(s);
    body += &costs(s);
    body += &reading(s);
    body += &reproduce(s, config);
    page(&title, &body)
}

fn header(title: &str, s: &SweepSummary) -> String {
    let facts = [
        format!("base <b>{}</b>", escape(&s.base)),
        format!("{} steps each", count(s.steps)),
        seconds(s.seconds),
        format!("seed {}", s.seed),
    ];
    format!(
        "<header>\n<h1>{}</h1>\n<p class=\"facts\">{}</p>\n</header>\n<section class=\"verdict\">\n<h2>Take rank {}.</h2>\n\
         <p>{}.</p>\n</section>\n",
        escape(title),
        facts.join(" \u{b7} "),
        s.choice.rank,
        escape(&sentence(&s.choice.reason))
    )
}

/// With a capital in front.
fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

fn losses(s: &SweepSummary) -> String {
    let mut out = String::from("<section>\n<h2>Held-out loss by rank</h2>\n");
    out += &both(|size| loss_by_rank(s, size));
    out += "<div class=\"scroll\"><table>\n<thead><tr><th>Rank</th><th>Loss, nats per token</th><th>Perplexity</th>\
            <th>Behind the best</th><th>Margin</th><th class=\"text\">Can be told from the best</th></tr></thead>\n<tbody>\n";
    for (rank, standing) in s.ranks.iter().zip(&s.choice.standings) {
        let best = standing.rank == s.choice.best;
        let chosen = standing.rank == s.choice.rank;
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\">{}{}</th><td{}>{:.4}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"text\">{}</td></tr>",
            standing.rank,
            if chosen { " <small>chosen</small>" } else { "" },
            if chosen { " class=\"best\"" } else { "" },
            standing.loss,
            perplexity(rank.perplexity),
            if best { "\u{2013}".to_string() } else { format!("{:.4}", standing.behind) },
            standing.margin.map_or("\u{2013}".to_string(), |m| format!("{m:.4}")),
            match (best, standing.within) {
                (true, _) => "it is the best",
                (false, true) => "no",
                (false, false) => "yes",
            }
        );
    }
    out += "</tbody>\n</table></div>\n";
    let _ = writeln!(
        out,
        "<p class=\"note\">Held-out text, dense attention at {} tokens, every token scored once: {} documents, {} tokens, the \
         same for all ranks.{}</p>",
        context(s.context),
        count(s.documents as u64),
        count(s.tokens),
        compared(s)
    );
    out + "</section>\n"
}

/// The perplexities that ranks are compared with.
fn compared(s: &SweepSummary) -> String {
    let mut out = String::new();
    for (name, value) in
        [("The base model", s.base_perplexity), ("interpolation without training", s.interpolated_perplexity)]
    {
        if let Some(value) = value {
            out += if out.is_empty() { " " } else { ", " };
            let _ = write!(out, "{name}: perplexity {}", perplexity(value));
        }
    }
    if out.is_empty() { out } else { out + "." }
}

/// Loss by rank with margins, rank on a logarithmic axis; nothing where no loss is a number.
fn loss_by_rank(s: &SweepSummary, size: Size) -> Option<String> {
    let points: Vec<&Standing> = s.choice.standings.iter().filter(|p| p.loss.is_finite()).collect();
    let reach = |p: &Standing| p.margin.filter(|m| m.is_finite()).unwrap_or(0.0);
    let low = points.iter().map(|p| p.loss - reach(p)).fold(f64::INFINITY, f64::min);
    let high = points.iter().map(|p| p.loss + reach(p)).fold(f64::NEG_INFINITY, f64::max);
    let (first, last) = (points.first()?.rank as f64, points.last()?.rank as f64);

    let wide = size == Size::Wide;
    let (left, right, top, height) = if wide {
        (70.0, size.width() - 150.0, 26.0, 320.0)
    } else {
        (52.0, size.width() - 14.0, 26.0, 270.0)
    };
    let bottom = height - 44.0;
    let room = (high - low).max(1e-4) * 0.15;
    let x = Scale::log((first, last), (left + 24.0, right - 18.0));
    let y = Scale::linear((low - room, high + room), (bottom, top));
    let label = format!("Held-out loss of {} LoRA ranks, rank on a logarithmic axis", points.len());
    let mut drawing = Drawing::new(size, height, &label);

    let (ticks, step) = y.ticks(5);
    for value in ticks {
        drawing.line("grid", (left, y.at(value)), (right, y.at(value)));
        drawing.text("tick", (left - 8.0, y.at(value) + 4.0), "end", &tick(value, step));
    }
    drawing.line("axis", (left, bottom), (right, bottom));
    for p in &points {
        let at = x.at(p.rank as f64);
        drawing.line("axis", (at, bottom), (at, bottom + 5.0));
        drawing.text("tick", (at, bottom + 19.0), "middle", &count(p.rank as u64));
    }
    drawing.text("caption", ((left + right) / 2.0, height - 7.0), "middle", "LoRA rank");
    let edge = if wide { 4.0 } else { 0.0 };
    drawing.text("caption", (edge, 13.0), "start", "held-out loss, nats per token (lower is better)");

    if let Some(best) = points.iter().find(|p| p.rank == s.choice.best) {
        drawing.line("mark", (left, y.at(best.loss)), (right, y.at(best.loss)));
        // Where it is the chosen one too, that label says so.
        if wide && best.rank != s.choice.rank {
            drawing.text(
                "note",
                (right + 4.0, y.at(best.loss) + 4.0),
                "start",
                &format!("best: rank {}", best.rank),
            );
        }
    }
    let at = |p: &Standing| (x.at(p.rank as f64), y.at(p.loss));
    let line: Vec<(f64, f64)> = points.iter().map(|p| at(p)).collect();
    drawing.path("line interpolated", &line);
    for p in &points {
        let (middle, margin) = (x.at(p.rank as f64), reach(p));
        if margin > 0.0 {
            let (from, to) = (y.at(p.loss - margin), y.at(p.loss + margin));
            drawing.line("line raw", (middle, from), (middle, to));
            for end in [from, to] {
                drawing.line("line raw", (middle - 5.0, end), (middle + 5.0, end));
            }
        }
        let chosen = p.rank == s.choice.rank;
        let hint = format!("rank {}: {:.4} nats per token, {:.4} behind the best", p.rank, p.loss, p.behind);
        drawing.marker(
            if chosen { "dot adapted" } else { "dot interpolated" },
            usize::from(chosen) * 3,
            at(p),
            &hint,
        );
        if chosen {
            let (from, anchor) =
                if p.rank as f64 == last && !wide { (-10.0, "end") } else { (10.0, "start") };
            drawing.text(
                "end adapted halo",
                (at(p).0 + from, at(p).1 - 9.0),
                anchor,
                if p.rank == s.choice.best { "chosen, the best" } else { "chosen" },
            );
        }
    }
    Some(drawing.finish())
}

fn costs(s: &SweepSummary) -> String {
    let mut out = String::from("<section>\n<h2>What each rank cost</h2>\n");
    let rows = |value: fn(&RankSummary) -> f64,
                text: fn(&RankSummary) -> String,
                detail: fn(&RankSummary) -> String| {
        let most = s.ranks.iter().map(value).fold(0.0, f64::max);
        let row = |r: &RankSummary| Bar {
            class: if r.rank == s.choice.rank { "trained" } else { "cost" },
            name: format!("rank {}", r.rank),
            detail: detail(r),
            share: if most > 0.0 { value(r) / most } else { 0.0 },
            value: text(r),
            remark: if most > 0.0 { percent(value(r) / most) } else { String::new() },
        };
        s.ranks.iter().map(row).collect::<Vec<_>>()
    };
    out += &bars(
        "Parameters of LoRA",
        rows(
            |r| r.lora_parameters as f64,
            |r| short_count(r.lora_parameters),
            |r| format!("{} learn", short_count(r.parameters)),
        ),
    );
    out += &bars("Time of training", rows(|r| r.seconds, |r| seconds(r.seconds), |_| String::new()));
    out += &bars(
        "Memory at the peak",
        rows(
            |r| r.peak_bytes as f64,
            |r| bytes(r.peak_bytes),
            |r| format!("planned {}", bytes(r.planned_bytes)),
        ),
    );
    out + "</section>\n"
}

fn reading(s: &SweepSummary) -> String {
    format!(
        "<section class=\"reading\">\n<h2>How to read this</h2>\n<dl>\n<div><dt>The rule</dt><dd>{}.</dd></div>\n<div><dt>Margin</dt>\
         <dd>Ranks are compared document by document, so that hard and easy texts cancel out. How much the difference to the \
         best rank varies over documents says how well it is known: the margin is one standard error of it. It does not say \
         how much another seed or a longer training would change.</dd></div>\n<div><dt>Strength</dt><dd>Alpha grows with the \
         rank, so that alpha / rank is the same for all: ranks are compared, not strengths.</dd></div>\n</dl>\n</section>\n",
        escape(&sentence(&s.rule))
    )
}

fn reproduce(s: &SweepSummary, config: &str) -> String {
    let mut out = format!(
        "<section>\n<h2>What next</h2>\n<p>The chosen rank, trained as long as it deserves:</p>\n<pre><code>{}</code></pre>\n\
         <p class=\"note\">Each rank's own report, adapter and checkpoints:</p>\n<ul>\n",
        escape(&s.next_command)
    );
    for r in &s.ranks {
        let _ = writeln!(out, "<li><code>{}</code></li>", escape(&r.folder.display().to_string()));
    }
    let _ = writeln!(
        out,
        "</ul>\n<details>\n<summary>All settings (config.toml)</summary>\n<pre><code>{}</code></pre>\n</details>\n</section>",
        escape(config.trim_end())
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::summary::DocumentLoss;
    use crate::train::rank::{RULE, choose};

    fn sample(shift: [f64; 3]) -> SweepSummary {
        let losses: Vec<Vec<DocumentLoss>> = shift
            .iter()
            .enumerate()
            .map(|(r, shift)| {
                let own = |d: usize| 2.0 + d as f64 * 0.3 + shift + 0.002 * ((r * 7 + d * 5) % 4) as f64;
                (0..5).map(|d| DocumentLoss { tokens: 1000, nll: 1000.0 * own(d) }).collect()
            })
            .collect();
        let ranks = [4usize, 8, 16];
        let given: Vec<(usize, &[DocumentLoss])> =
            ranks.iter().copied().zip(losses.iter().map(|l| &l[..])).collect();
        let choice = choose(&given).unwrap();
        let of = |standing: &Standing| RankSummary {
            rank: standing.rank,
            alpha: 2.0 * standing.rank as f64,
            loss: standing.loss,
            perplexity: standing.loss.exp(),
            lora_parameters: 1000 * standing.rank as u64,
            parameters: 1_000_000 + 1000 * standing.rank as u64,
            seconds: 40.0 + standing.rank as f64,
            planned_bytes: 700 << 20,
            peak_bytes: 690 << 20,
            folder: format!("runs/<s>/rank-{}", standing.rank).into(),
        };
        SweepSummary {
            ranks: choice.standings.iter().map(of).collect(),
            choice,
            rule: RULE.into(),
            base_perplexity: Some(86.97),
            interpolated_perplexity: Some(46.3),
            context: 1024,
            steps: 60,
            documents: 5,
            tokens: 5000,
            seed: 0,
            threads: 2,
            device: "cpu".into(),
            seconds: 300.0,
            base: "<script>m</script>".into(),
            data: vec!["a&b".into()],
            next_command: "mclora extend --base <m> --rank 8".into(),
        }
    }

    #[test]
    fn page_is_whole_escaped_and_says_the_choice() {
        let s = sample([0.2, 0.0, 0.0005]);
        let page = render(&s, "a = \"<b>\"");
        assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
        for absent in ["<script", "http://", "https://", "src=", "href=", "url(", "@import", "NaN", "inf\""] {
            assert!(!page.contains(absent), "{absent}");
        }
        for tag in [
            "section", "svg", "table", "tr", "td", "div", "dl", "dd", "text", "figure", "details", "ul", "li",
        ] {
            let open = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
            assert_eq!(open, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        assert_eq!(page.matches("<svg class=\"plot").count(), 2);
        assert!(
            page.contains(&format!("Take rank {}.", s.choice.rank)) && page.contains("perplexity 86.97"),
            "{page}"
        );
        assert_eq!(page.matches("<small>chosen</small>").count(), 1);
        assert!(page.contains("&lt;script&gt;m") && page.contains("rank-16"));
    }

    #[test]
    fn a_sweep_of_one_rank_or_of_losses_that_are_no_numbers_still_makes_a_page() {
        let mut s = sample([0.0, 0.0, 0.0]);
        s.ranks.truncate(1);
        s.choice.standings.truncate(1);
        assert!(render(&s, "").contains("<svg class=\"plot"));
        for standing in &mut s.choice.standings {
            standing.loss = f64::NAN;
        }
        assert!(!render(&s, "").contains("<svg class=\"plot"));
    }
}
