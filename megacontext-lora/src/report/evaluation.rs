//! `report.html` of an evaluation: what came out, how it was measured, how to repeat it.
//!
//! The frame, the styles and the rules are those of a run's page: self-contained, escaped, for phone, desktop and paper.

use std::fmt::Write;

use serde_json::Value;

use super::format::{change, context, count, escape, percent, perplexity};
use super::heat::{depth_name, heat_map};
use super::html::{both, page};
use super::plots::perplexity_by_context;
use crate::run::folder::config_toml;
use crate::run::summary::{ByContext, Summary};
use crate::train::eval::{Gap, Perplexity};
use crate::train::passkey::Cell;

/// What an evaluation measured.
#[derive(Clone, Copy, Debug)]
pub enum Measured<'a> {
    /// Passkeys by length and depth.
    Passkey(&'a [Cell]),
    /// Perplexity by length.
    Perplexity(&'a [Perplexity]),
    /// Sparse against dense attention by length.
    Gap(&'a [Gap]),
}

/// What the page is made of.
#[derive(Clone, Copy, Debug)]
pub struct Page<'a> {
    /// The job's result: how it was measured.
    pub result: &'a Value,
    /// What the results depend on.
    pub identity: &'a Value,
    /// The results.
    pub measured: Measured<'a>,
}

/// The page.
pub fn render(of: &Page) -> String {
    let (title, headline, text, section) = match of.measured {
        Measured::Passkey(cells) => passkey(cells, of.result),
        Measured::Perplexity(results) => by_length(results),
        Measured::Gap(gaps) => gap(gaps),
    };
    let mut body = format!(
        "<header>\n<h1>{}</h1>\n<p class=\"facts\">{}</p>\n</header>\n<section class=\"verdict\">\n<h2>{}</h2>\n<p>{}</p>\n\
         </section>\n{section}",
        escape(&title),
        facts(of.result),
        escape(&headline),
        escape(&text)
    );
    body += &how(of);
    page(&title, &body)
}

fn text_of<'a>(result: &'a Value, key: &str) -> Option<&'a str> {
    result[key].as_str()
}

fn facts(result: &Value) -> String {
    let named = ["base", "adapter"].into_iter().filter_map(|key| {
        let path = text_of(result, key)?;
        Some(format!("{key} <b>{}</b>", escape(path)))
    });
    let plain = [("positions", "rope"), ("class", "dtype")].into_iter().filter_map(|(word, key)| {
        let value = text_of(result, key)?;
        Some(format!("{word} {}", escape(value)))
    });
    named.chain(plain).collect::<Vec<_>>().join(" \u{b7} ")
}

/// Title, headline, text, and the section with drawing and table.
type Parts = (String, String, String, String);

fn passkey(cells: &[Cell], result: &Value) -> Parts {
    let (right, all) =
        cells.iter().fold((0, 0), |(right, all), cell| (right + cell.right, all + cell.trials));
    let mut lengths: Vec<usize> = cells.iter().map(|cell| cell.length).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let of = |length: usize| cells.iter().filter(move |cell| cell.length == length);
    let complete =
        lengths.iter().copied().take_while(|length| of(*length).all(|cell| cell.right == cell.trials)).last();
    let headline = format!("{right} of {all} keys found.");
    let text = match complete {
        Some(length) if Some(&length) == lengths.last() => {
            format!("Every key was found at every length, up to {} tokens.", context(length))
        }
        Some(length) => format!("Every key was found up to {} tokens, not beyond.", context(length)),
        None => "Not even at the shortest length was every key found.".to_string(),
    };
    let stated = result["stated_context"]
        .as_u64()
        .map_or(String::new(), |stated| format!(" The model states a context of {} tokens.", count(stated)));
    let mut section = String::from("<section>\n<h2>Keys found by length and depth</h2>\n");
    section += &both(|size| heat_map(cells, size));
    section += "<div class=\"scroll\"><table>\n<thead><tr><th>Tokens</th><th>Depth</th><th>Found</th><th>Prompts</th>\
                <th>Share</th></tr></thead>\n<tbody>\n";
    for cell in cells {
        let _ = writeln!(
            section,
            "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            context(cell.length),
            depth_name(cell.depth),
            cell.right,
            cell.trials,
            percent(cell.accuracy())
        );
    }
    section += "</tbody>\n</table></div>\n";
    let wrong: Vec<_> = cells
        .iter()
        .flat_map(|cell| cell.answers.iter().filter(|answer| !answer.right).map(move |answer| (cell, answer)))
        .collect();
    if !wrong.is_empty() {
        section += "<details>\n<summary>What was said instead of the key</summary>\n<div class=\"scroll\"><table>\n<thead><tr>\
                    <th>Tokens</th><th>Depth</th><th>Key</th><th class=\"text\">Said</th></tr></thead>\n<tbody>\n";
        for (cell, answer) in wrong.iter().take(200) {
            let _ = writeln!(
                section,
                "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td class=\"text\">{}</td></tr>",
                context(cell.length),
                depth_name(cell.depth),
                escape(&answer.key),
                escape(&answer.said)
            );
        }
        section += "</tbody>\n</table></div>\n";
        if wrong.len() > 200 {
            let _ =
                writeln!(section, "<p class=\"note\">The first 200 of {}.</p>", count(wrong.len() as u64));
        }
        section += "</details>\n";
    }
    ("Passkey retrieval".to_string(), headline, text + &stated, section + "</section>\n")
}

fn plot(lines: [ByContext; 2]) -> String {
    let [dense, sparse] = lines;
    let mut summary = Summary::default();
    summary.perplexity.adapted = dense;
    summary.perplexity_sparse = sparse;
    both(|size| perplexity_by_context(&summary, size))
}

fn by_length(results: &[Perplexity]) -> Parts {
    let line: ByContext = results.iter().map(|r| (r.context, r.perplexity)).collect();
    let headline = match results.iter().max_by_key(|r| r.context) {
        Some(r) => format!("Perplexity {} at {} tokens.", perplexity(r.perplexity), context(r.context)),
        None => "Nothing was measured.".to_string(),
    };
    let best = results.iter().filter(|r| r.perplexity.is_finite()).min_by(|a, b| a.nll.total_cmp(&b.nll));
    let text = best.map_or(String::new(), |r| {
        format!(
            "The lowest is {} at {} tokens; lower is better.",
            perplexity(r.perplexity),
            context(r.context)
        )
    });
    let mut section = String::from("<section>\n<h2>Perplexity by context length</h2>\n");
    section += &plot([line, ByContext::new()]);
    section += "<div class=\"scroll\"><table>\n<thead><tr><th>Tokens</th><th class=\"text\">Attention</th><th>Perplexity</th>\
                <th>Nats per token</th><th>Tokens scored</th><th>Stride</th></tr></thead>\n<tbody>\n";
    for r in results {
        let _ = writeln!(
            section,
            "<tr><th scope=\"row\">{}</th><td class=\"text\">{}</td><td>{}</td><td>{:.4}</td><td>{}</td><td>{}</td></tr>",
            context(r.context),
            escape(&r.attention),
            perplexity(r.perplexity),
            r.nll,
            count(r.tokens as u64),
            count(r.stride as u64)
        );
    }
    ("Perplexity".to_string(), headline, text, section + "</tbody>\n</table></div>\n</section>\n")
}

fn gap(gaps: &[Gap]) -> Parts {
    let of = |value: fn(&Gap) -> f64| -> ByContext { gaps.iter().map(|g| (g.context, value(g))).collect() };
    let longest = gaps.iter().max_by_key(|g| g.context);
    let headline = longest.map_or("Nothing was measured.".to_string(), |g| {
        format!("{} at {} tokens: sparse against dense.", change(g.gap), context(g.context))
    });
    let mut section = String::from("<section>\n<h2>Sparse against dense attention</h2>\n");
    section += &plot([of(|g| g.dense.perplexity), of(|g| g.sparse.perplexity)]);
    section += "<div class=\"scroll\"><table>\n<thead><tr><th>Tokens</th><th>Dense</th><th>Sparse</th><th>Gap</th>\
                <th class=\"text\">Sparse attention</th><th>Tokens scored</th></tr></thead>\n<tbody>\n";
    for g in gaps {
        let _ = writeln!(
            section,
            "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{}</td><td class=\"text\">{}</td><td>{}</td></tr>",
            context(g.context),
            perplexity(g.dense.perplexity),
            perplexity(g.sparse.perplexity),
            change(g.gap),
            escape(&g.sparse.attention),
            count(g.dense.tokens as u64)
        );
    }
    let text = "Perplexity of the same weights on the same tokens, with the attention of training and with that of use. A \
                small gap says that training saw what use will see.";
    (
        "Sparse and dense attention".to_string(),
        headline,
        text.to_string(),
        section + "</tbody>\n</table></div>\n</section>\n",
    )
}

fn how(of: &Page) -> String {
    let mut out = String::from(
        "<section>\n<h2>How it was measured</h2>\n<p>The same settings on the same files give the same results, whether or \
         not the evaluation was interrupted.</p>\n<dl class=\"pairs\">\n",
    );
    let result = of.result;
    let mut pairs: Vec<(&str, String)> = Vec::new();
    for (word, key) in
        [("attention", "attention"), ("positions", "rope"), ("scoring", "scoring"), ("precision", "dtype")]
    {
        pairs.extend(text_of(result, key).map(|value| (word, value.to_string())));
    }
    pairs.extend(result["seed"].as_u64().map(|seed| ("seed", seed.to_string())));
    for (word, key) in [
        ("base fingerprint", "base_fingerprint"),
        ("adapter SHA-256", "adapter_sha256"),
        ("text SHA-256", "data_sha256"),
        ("version", "version"),
    ] {
        pairs.extend(text_of(of.identity, key).map(|value| (word, value.to_string())));
    }
    for (word, value) in pairs {
        let _ = writeln!(out, "<div><dt>{word}</dt><dd>{}</dd></div>", escape(&value));
    }
    out += "</dl>\n";
    // Settings came from JSON: they are TOML without doubt.
    if let Ok(settings) = config_toml(&of.identity["settings"]) {
        let _ = writeln!(
            out,
            "<details>\n<summary>All settings (config.toml)</summary>\n<pre><code>{}</code></pre>\n</details>",
            escape(settings.trim_end())
        );
    }
    out + "</section>\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::passkey::Answer;
    use serde_json::json;

    fn whole(page: &str) {
        assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
        for absent in ["<script", "http://", "https://", "src=", "href=", "url(", "@import", "NaN"] {
            assert!(!page.contains(absent), "{absent}");
        }
        for tag in ["section", "svg", "table", "tr", "td", "div", "dl", "dd", "text", "figure", "details"] {
            let open = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
            assert_eq!(open, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }

    fn identity() -> Value {
        json!({"settings": {"seed": 3, "base": "<m>"}, "base_fingerprint": "abc", "version": "1"})
    }

    fn result() -> Value {
        json!({"base": "<m>&", "rope": "linear x4", "dtype": "f32", "attention": "dense", "scoring": "greedy", "seed": 3,
               "stated_context": 1024})
    }

    fn cell(length: usize, depth: f64, right: usize) -> Cell {
        let answers = (0..4).map(|n| Answer {
            key: format!("1234{n}"),
            said: "<script>alert('x')</script>".into(),
            right: n < right,
        });
        Cell::new(length, depth, answers.collect())
    }

    fn passkey_page(cells: &[Cell]) -> String {
        let page =
            render(&Page { result: &result(), identity: &identity(), measured: Measured::Passkey(cells) });
        whole(&page);
        page
    }

    #[test]
    fn passkeys_are_drawn_counted_and_said_what_was_said() {
        let page =
            passkey_page(&[cell(512, 0.0, 4), cell(512, 1.0, 4), cell(1024, 0.0, 3), cell(1024, 1.0, 4)]);
        assert!(
            page.contains("15 of 16 keys found.") && page.contains("up to 512 tokens, not beyond"),
            "{page}"
        );
        assert_eq!(page.matches("<svg class=\"plot").count(), 2);
        assert_eq!(page.matches("&lt;script&gt;").count(), 1);
        for fact in
            ["linear x4", "dense", "greedy", "abc", "states a context of 1,024 tokens", "&lt;m&gt;&amp;"]
        {
            assert!(page.contains(fact), "{fact}");
        }
        assert!(passkey_page(&[cell(512, 0.0, 4)]).contains("at every length, up to 512 tokens"));
        assert!(passkey_page(&[cell(512, 0.0, 0)]).contains("Not even at the shortest length"));
        passkey_page(&[]);
    }

    fn measured(context: usize, attention: &str, perplexity: f64) -> Perplexity {
        Perplexity {
            context,
            stride: context / 2,
            attention: attention.into(),
            rope: "none".into(),
            scoring: "strided".into(),
            tokens: 4096,
            nll: perplexity.ln(),
            perplexity,
        }
    }

    #[test]
    fn perplexities_and_gaps_are_drawn_and_listed() {
        let results = [measured(512, "dense", 20.0), measured(1024, "dense", 18.5)];
        let page = render(&Page {
            result: &result(),
            identity: &identity(),
            measured: Measured::Perplexity(&results),
        });
        whole(&page);
        assert!(page.contains("Perplexity 18.50 at 1,024 tokens.") && page.contains(">20.00<"), "{page}");
        let gap = Gap {
            context: 1024,
            dense: results[1].clone(),
            sparse: measured(1024, "s2 (group 256)", 20.35),
            gap: 0.1,
        };
        let page =
            render(&Page { result: &result(), identity: &identity(), measured: Measured::Gap(&[gap]) });
        whole(&page);
        assert!(page.contains("+10.0\u{a0}% at 1,024 tokens") && page.contains("s2 (group 256)"), "{page}");
    }
}
