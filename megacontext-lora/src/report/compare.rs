//! The page that shows finished runs side by side, in the frame of all pages.

use std::fmt::Write;

use super::format::escape;
use super::html::page;
use crate::jobs::report::Comparison;

/// The page.
pub fn render(of: &Comparison) -> String {
    let title = format!("{} runs side by side", of.runs.len());
    let mut body = format!("<header>\n<h1>{}</h1>\n</header>\n", escape(&title));
    body += &section("What they came to", &of.runs, &of.kinds, &of.figures);
    if !of.settings.is_empty() {
        body += &section("Settings that differ", &of.runs, &of.kinds, &of.settings);
    }
    page(&title, &body)
}

fn section(title: &str, runs: &[String], kinds: &[String], rows: &[(String, Vec<String>)]) -> String {
    let mut out =
        format!("<section>\n<h2>{}</h2>\n<div class=\"scroll\"><table>\n<thead><tr><th></th>", escape(title));
    for (run, kind) in runs.iter().zip(kinds) {
        let _ = write!(out, "<th>{} <small>{}</small></th>", escape(run), escape(kind));
    }
    out += "</tr></thead>\n<tbody>\n";
    for (name, cells) in rows {
        let _ = write!(out, "<tr><th scope=\"row\">{}</th>", escape(name));
        for cell in cells {
            let _ = write!(out, "<td>{}</td>", escape(cell));
        }
        out += "</tr>\n";
    }
    out + "</tbody>\n</table></div>\n</section>\n"
}
