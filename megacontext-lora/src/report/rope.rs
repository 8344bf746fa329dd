//! A picture of rotary bands: how long each one's wave is before and after a scaling, and how much of it is left for
//! entries that stand for spans. A file of its own: it carries the page's colours, for light and for dark.
//!
//! Units: tokens. A band that does not turn (period beyond f64) is left out of its line.

use std::fmt::Write;

use super::axes::{Drawing, Scale, Size};
use super::format::count;

/// What is drawn.
pub struct RopePicture<'a> {
    /// What the scaling is called.
    pub scaling: &'a str,
    /// Wavelength of every band before and after it.
    pub waves: &'a [(f64, f64)],
    /// What is left of every band for entries of each level.
    pub damping: &'a [Vec<f64>],
    /// Tokens that an entry of each level stands for.
    pub spans: &'a [f64],
    /// The length that the model was pre-trained at, and that it is stretched to.
    pub lengths: (usize, usize),
}

const STYLE: &str = include_str!("report.css");

/// The picture as an SVG file.
pub fn rope_picture(picture: &RopePicture) -> String {
    let bands = picture.waves.len();
    let (left, right) = (64.0, Size::Wide.width() - 164.0);
    let x = Scale::linear((0.0, bands.max(2) as f64 - 1.0), (left + 8.0, right - 8.0));
    let label = format!("Wavelength and damping of {bands} rotary bands, scaling {}", picture.scaling);
    let mut drawing = Drawing::new(Size::Wide, 640.0, &label);
    waves(&mut drawing, picture, x, (left, right));
    damping(&mut drawing, picture, x, (left, right));
    let (ticks, step) = x.ticks(10);
    for value in ticks.into_iter().filter(|v| v.fract() == 0.0) {
        drawing.line("axis", (x.at(value), 590.0), (x.at(value), 595.0));
        drawing.text("tick", (x.at(value), 609.0), "middle", &super::format::tick(value, step.max(1.0)));
    }
    drawing.text("caption", ((left + right) / 2.0, 632.0), "middle", "band, fastest first");
    standalone(&drawing.finish())
}

fn waves(drawing: &mut Drawing, picture: &RopePicture, x: Scale, (left, right): (f64, f64)) {
    let (top, bottom) = (34.0, 330.0);
    let (original, context) = picture.lengths;
    let all = picture.waves.iter().flat_map(|(a, b)| [*a, *b]).chain([original as f64, context as f64]);
    let (low, high) =
        all.filter(|v| v.is_finite()).fold((f64::MAX, 0f64), |(low, high), v| (low.min(v), high.max(v)));
    let y = Scale::log((low / 1.6, high * 1.6), (bottom, top));
    drawing.text("caption", (4.0, 15.0), "start", "wavelength in tokens, log scale");
    for value in y.ticks(7).0 {
        drawing.line("grid", (left, y.at(value)), (right, y.at(value)));
        drawing.text("tick", (left - 8.0, y.at(value) + 4.0), "end", &tokens(value));
    }
    drawing.line("axis", (left, bottom), (right, bottom));
    let mut marks = vec![(original, format!("trained to {}", count(original as u64)))];
    if context != original {
        marks.push((context, format!("read to {}", count(context as u64))));
    }
    for (length, text) in marks {
        let at = y.at(length as f64);
        drawing.line("mark", (left, at), (right, at));
        drawing.text("note halo", (left + 8.0, at - 5.0), "start", &text);
    }
    let mut ends = Vec::new();
    for (shape, class, name) in [(0, "base", "as pre-trained"), (2, "adapted", picture.scaling)] {
        let of = |wave: &(f64, f64)| if class == "base" { wave.0 } else { wave.1 };
        let points = picture.waves.iter().map(of).enumerate().filter(|(_, wave)| wave.is_finite());
        let points: Vec<(usize, f64)> = points.collect();
        ends.extend(line(drawing, (shape, class, name), &points, x, y, tokens));
    }
    names(drawing, ends, right, (top, bottom));
}

fn damping(drawing: &mut Drawing, picture: &RopePicture, x: Scale, (left, right): (f64, f64)) {
    let (top, bottom) = (396.0, 590.0);
    let y = Scale::linear((0.0, 1.0), (bottom, top));
    drawing.text("caption", (4.0, 377.0), "start", "what is left of a band, by the level of an entry");
    for value in [0.0, 0.25, 0.5, 0.75, 1.0] {
        drawing.line("grid", (left, y.at(value)), (right, y.at(value)));
        drawing.text("tick", (left - 8.0, y.at(value) + 4.0), "end", &format!("{value:.2}"));
    }
    drawing.line("axis", (left, bottom), (right, bottom));
    let mut ends = Vec::new();
    for (lod, span) in picture.spans.iter().enumerate() {
        let class = ["base", "interpolated", "adapted", "sparse"][lod % 4];
        let span = tokens(*span);
        let name = format!("level {lod}: {span} token{}", if span == "1" { "" } else { "s" });
        let points: Vec<(usize, f64)> = picture.damping.iter().map(|kept| kept[lod]).enumerate().collect();
        ends.extend(line(drawing, (lod, class, &name), &points, x, y, |v| format!("{v:.3}")));
    }
    names(drawing, ends, right, (top, bottom));
}

/// Draws one line with its markers; returns where its name goes.
fn line<'a>(
    drawing: &mut Drawing,
    (shape, class, name): (usize, &'a str, &str),
    points: &[(usize, f64)],
    x: Scale,
    y: Scale,
    shown: impl Fn(f64) -> String,
) -> Option<(f64, &'a str, String)> {
    let drawn: Vec<(f64, f64)> = points.iter().map(|(band, v)| (x.at(*band as f64), y.at(*v))).collect();
    drawing.path(&format!("line {class}"), &drawn);
    for ((band, value), at) in points.iter().zip(&drawn) {
        drawing.marker(
            &format!("dot {class}"),
            shape,
            *at,
            &format!("{name}, band {band}: {}", shown(*value)),
        );
    }
    drawn.last().map(|at| (at.1, class, name.to_string()))
}

fn names(drawing: &mut Drawing, ends: Vec<(f64, &str, String)>, right: f64, limits: (f64, f64)) {
    for (at, class, text) in super::plots::spread(ends, 17.0, limits) {
        drawing.text(&format!("end {class}"), (right + 2.0, at + 4.0), "start", &text);
    }
}

/// A number of tokens with the digits that an axis has room for.
fn tokens(value: f64) -> String {
    match value {
        v if v >= 1e9 => format!("{v:.0e}"),
        v if v >= 1e6 => {
            format!("{:.3}", v / 1e6).trim_end_matches('0').trim_end_matches('.').to_string() + " M"
        }
        v if v >= 10.0 || v.fract() == 0.0 => count(v.round() as u64),
        v => format!("{v:.1}"),
    }
}

/// A drawing as a file: with a namespace, and with the page's colours for its classes.
fn standalone(drawing: &str) -> String {
    let light = palette(STYLE, 0);
    let dark = palette(STYLE, 1);
    let rules = |palette: &[(String, String)]| {
        let drawn = STYLE.lines().filter(|l| {
            ["svg text", ".grid", ".axis", ".mark", ".line", ".dot"].iter().any(|class| l.starts_with(class))
        });
        let mut out = String::from("svg { background: var(--card) }\n");
        drawn.for_each(|line| {
            let _ = writeln!(out, "{line}");
        });
        palette.iter().fold(out, |out, (name, value)| out.replace(&format!("var({name})"), value))
    };
    let style = format!(
        "<style>\n{}@media (prefers-color-scheme: dark) {{\n{}}}\n</style>",
        rules(&light),
        rules(&dark)
    );
    let open = drawing.find('>').map_or(drawing.len(), |at| at + 1);
    let head = drawing[..open]
        .replace("<svg ", "<svg xmlns=\"http://www.w3.org/2000/svg\" ")
        // The page hides one of two widths; here there is one.
        .replace("class=\"plot wide\"", "class=\"plot\"");
    format!("{head}\n{style}\n{}\n", &drawing[open..])
}

/// The names and values that the n-th `:root` of a style sheet sets.
fn palette(css: &str, n: usize) -> Vec<(String, String)> {
    let block = css.split(":root {").nth(n + 1).and_then(|rest| rest.split('}').next()).unwrap_or("");
    let pairs = block.split(';').filter_map(|pair| pair.split_once(':'));
    pairs.map(|(name, value)| (name.trim().to_string(), value.trim().to_string())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> String {
        let waves: Vec<(f64, f64)> = (0..8).map(|i| 10f64.powi(i)).map(|w| (w, 2.0 * w)).collect();
        let damping = vec![vec![1.0, 0.5, 0.1]; 8];
        rope_picture(&RopePicture {
            scaling: "yarn x2 <&>",
            waves: &waves,
            damping: &damping,
            spans: &[1.0, 32.0, 1024.0],
            lengths: (256, 512),
        })
    }

    #[test]
    fn the_file_stands_alone_in_light_and_dark() {
        let svg = picture();
        assert!(svg.starts_with("<svg xmlns="), "{svg}");
        assert!(!svg.contains("var("), "every colour is resolved");
        assert!(svg.contains("prefers-color-scheme: dark"));
        assert!(svg.contains("yarn x2 &lt;&amp;&gt;") && !svg.contains("<&>"));
    }

    #[test]
    fn every_band_has_a_marker_in_every_line() {
        assert_eq!(picture().matches("<title>").count(), 2 * 8 + 3 * 8);
    }

    #[test]
    fn a_band_that_never_turns_is_left_out() {
        let svg = rope_picture(&RopePicture {
            scaling: "none",
            waves: &[(6.0, 6.0), (f64::INFINITY, f64::INFINITY)],
            damping: &[vec![1.0], vec![1.0]],
            spans: &[1.0],
            lengths: (256, 256),
        });
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
