//! Plain text from the two kinds of HTML page that the Rust toolchain's documentation is made of.
//!
//! Not a browser: the pages come from mdBook and rustdoc, well-formed, and only these rules are needed.
//!
//! - mdBook page: what is inside `<main>`. Headings get `#`s, list items `- `, listings a fence of three
//!   backticks, inline code single backticks; paragraphs are set apart by an empty line, white space outside
//!   listings is one space or line break.
//! - rustdoc source page: what is inside `<pre class="rust">`, without the line numbers (elements marked
//!   `data-nosnippet`). That is the source file again, byte for byte.
//!
//! `script`, `style`, `svg`, `nav`, `button` and `head` go with their content; entities are decoded (the five
//! of XML, `nbsp`, and numeric ones; others stay as they are). Tables become lines. Nothing here fails: a
//! page that is neither kind, or not in English (`<html lang>`), gives `None`.

/// The readable text of a page; `None` when it has none, or not in English.
pub fn page_text(html: &str) -> Option<String> {
    if !html.get(..html.len().min(400)).unwrap_or(html).contains("<html lang=\"en\"") {
        return None;
    }
    if let Some(source) = html.find("<pre class=\"rust\">") {
        let end = html[source..].find("</pre>")?;
        return Some(source_text(&html[source..source + end]));
    }
    let start = html.find("<main")?;
    let end = html[start..].find("</main>")?;
    let text = markup_text(&html[start..start + end]);
    (!text.is_empty()).then_some(text)
}

/// Elements that go with everything in them.
const DROPPED: [&str; 6] = ["script", "style", "svg", "nav", "button", "head"];

/// A tag, or the text between two.
enum Piece<'a> {
    Text(&'a str),
    Tag { name: &'a str, closing: bool, attributes: &'a str },
}

/// Cuts a page into tags and text; comments vanish.
fn pieces(html: &str) -> impl Iterator<Item = Piece<'_>> {
    let mut rest = html;
    std::iter::from_fn(move || {
        while let Some(after) = rest.strip_prefix("<!--") {
            rest = after.find("-->").map_or("", |end| &after[end + 3..]);
        }
        if rest.is_empty() {
            return None;
        }
        if let Some(tag) = rest.strip_prefix('<') {
            let end = tag.find('>').unwrap_or(tag.len());
            let inside = &tag[..end];
            rest = tag.get(end + 1..).unwrap_or("");
            let closing = inside.starts_with('/');
            let inside = inside.trim_start_matches('/');
            let cut = inside.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(inside.len());
            return Some(Piece::Tag { name: &inside[..cut], closing, attributes: &inside[cut..] });
        }
        let end = rest.find('<').unwrap_or(rest.len());
        let text = &rest[..end];
        rest = &rest[end..];
        Some(Piece::Text(text))
    })
}

fn source_text(html: &str) -> String {
    let mut out = String::with_capacity(html.len());
    let mut line_number = false;
    for piece in pieces(html) {
        match piece {
            Piece::Tag { name: "a", closing: false, attributes } => {
                line_number = attributes.contains("data-nosnippet")
            }
            Piece::Tag { name: "a", closing: true, .. } => line_number = false,
            Piece::Tag { .. } => {}
            Piece::Text(text) if !line_number => push_decoded(&mut out, text),
            Piece::Text(_) => {}
        }
    }
    out
}

fn markup_text(html: &str) -> String {
    let mut out = String::with_capacity(html.len() / 2);
    let mut dropped: Option<&str> = None;
    let mut listing = 0usize;
    for piece in pieces(html) {
        match piece {
            Piece::Tag { name, closing, .. } if dropped.is_some() => {
                if closing && dropped == Some(name) {
                    dropped = None;
                }
            }
            Piece::Text(_) if dropped.is_some() => {}
            Piece::Tag { name, closing: false, attributes } if DROPPED.contains(&name) => {
                if !attributes.ends_with('/') {
                    dropped = Some(name);
                }
            }
            Piece::Tag { name: "pre", closing: false, .. } => {
                if listing == 0 {
                    paragraph(&mut out);
                    out.push_str("```\n");
                }
                listing += 1;
            }
            Piece::Tag { name: "pre", closing: true, .. } => {
                listing = listing.saturating_sub(1);
                if listing == 0 {
                    line(&mut out);
                    out.push_str("```\n\n");
                }
            }
            Piece::Tag { .. } if listing > 0 => {}
            Piece::Tag { name: "code", .. } => out.push('`'),
            Piece::Tag { name, closing: false, .. } if heading(name).is_some() => {
                paragraph(&mut out);
                out.extend(std::iter::repeat_n('#', heading(name).unwrap_or(1)));
                out.push(' ');
            }
            Piece::Tag { name: "li", closing: false, .. } => {
                line(&mut out);
                out.push_str("- ");
            }
            Piece::Tag {
                name: "p" | "h1" | "h2" | "h3" | "h4" | "h5" | "h6" | "ul" | "ol" | "table" | "figure",
                ..
            } => {
                // A paragraph that opens a list item stays on the item's line.
                if !out.ends_with("- ") {
                    paragraph(&mut out);
                }
            }
            Piece::Tag { name: "br" | "tr" | "dt" | "dd" | "div" | "section" | "blockquote", .. } => {
                line(&mut out)
            }
            Piece::Tag { name: "td" | "th", closing: true, .. } => out.push_str(" | "),
            Piece::Tag { .. } => {}
            Piece::Text(text) if listing > 0 => push_decoded(&mut out, text),
            Piece::Text(text) => {
                let mut words = String::with_capacity(text.len());
                push_decoded(&mut words, text);
                for c in words.chars() {
                    if !c.is_whitespace() {
                        out.push(c);
                    } else if c == '\n' && out.ends_with(' ') && !out.ends_with("- ") {
                        out.pop();
                        out.push('\n');
                    } else if !out.is_empty() && !out.ends_with(char::is_whitespace) {
                        out.push(if c == '\n' { '\n' } else { ' ' });
                    }
                }
            }
        }
    }
    let mut text = out.trim().to_string();
    text.push('\n');
    if text.len() > 1 { text } else { String::new() }
}

fn heading(name: &str) -> Option<usize> {
    name.strip_prefix('h')?.parse().ok().filter(|level| (1..=6).contains(level))
}

/// Ends the line that is being written, if there is one.
fn line(out: &mut String) {
    out.truncate(out.trim_end_matches(' ').len());
    if !out.is_empty() && !out.ends_with('\n') {
        out.push('\n');
    }
}

/// Ends the paragraph that is being written, if there is one.
fn paragraph(out: &mut String) {
    line(out);
    if !out.is_empty() && !out.ends_with("\n\n") {
        out.push('\n');
    }
}

fn push_decoded(out: &mut String, mut text: &str) {
    while let Some(at) = text.find('&') {
        out.push_str(&text[..at]);
        text = &text[at..];
        // The longest that is decoded is `&#x10ffff;`; whatever is longer is not an entity.
        let entity = text.bytes().take(10).position(|byte| byte == b';').map(|end| &text[1..end]);
        let decoded = entity.and_then(|entity| match entity {
            "amp" => Some('&'),
            "lt" => Some('<'),
            "gt" => Some('>'),
            "quot" => Some('"'),
            "apos" => Some('\''),
            "nbsp" => Some(' '),
            _ => {
                let number = entity.strip_prefix('#')?;
                let code = match number.strip_prefix(['x', 'X']) {
                    Some(hex) => u32::from_str_radix(hex, 16).ok()?,
                    None => number.parse().ok()?,
                };
                char::from_u32(code)
            }
        });
        match (decoded, entity) {
            (Some(c), Some(entity)) => {
                out.push(c);
                text = &text[entity.len() + 2..];
            }
            _ => {
                out.push('&');
                text = &text[1..];
            }
        }
    }
    out.push_str(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn book_page_becomes_text() {
        let html = "<!DOCTYPE HTML>\n<html lang=\"en\"><head><title>T</title></head><body><nav>menu</nav><main>\n\
            <h2 id=\"x\"><a href=\"#x\">What &amp; Why</a></h2>\n<p>All <code>Vec&lt;T&gt;</code>\nhave to &#8217;manage&#x27;.</p>\
            <!-- note --><ul><li>one</li>\n<li><p>two</p></li></ul><script>var x = '<p>';</script>\n\
            <pre><pre class=\"playground\"><code>fn main() {\n    <span>x</span>();\n}</code></pre></pre><p>End &unknown; &</p></main></body></html>";
        let expected = "## What & Why\n\nAll `Vec<T>`\nhave to \u{2019}manage'.\n\n- one\n- two\n\n```\nfn main() {\n    x();\n}\n```\n\nEnd &unknown; &\n";
        assert_eq!(page_text(html).unwrap(), expected);
    }

    #[test]
    fn source_page_becomes_the_source() {
        let html = "<!DOCTYPE html><html lang=\"en\"><body><nav>x</nav><main><pre class=\"rust\"><code>\
            <a href=#1 id=1 data-nosnippet>1</a><span class=\"kw\">fn </span>a() -&gt; <a href=\"u8.html\">u8</a> {\n\
            <a href=#2 id=2 data-nosnippet>2</a>    1 &amp; 2\n<a href=#3 id=3 data-nosnippet>3</a>}\n</code></pre></main></body></html>";
        assert_eq!(page_text(html).unwrap(), "fn a() -> u8 {\n    1 & 2\n}\n");
    }

    #[test]
    fn other_pages_give_nothing() {
        assert_eq!(page_text("<html lang=\"ja\"><main><p>x</p></main></html>"), None);
        assert_eq!(page_text("<html lang=\"en\"><body>redirect</body></html>"), None);
        assert_eq!(page_text("<html lang=\"en\"><main></main></html>"), None);
    }

    #[test]
    fn broken_markup_does_not_panic() {
        for html in [
            "<html lang=\"en\"><main><p",
            "<html lang=\"en\"><main><!-- </main>",
            "<html lang=\"en\"><main>é&#xé;&</main>",
        ] {
            page_text(html);
        }
    }
}
