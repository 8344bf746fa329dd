//! Scales, ticks and the frame of a plot, in SVG user units (1 unit is 1 CSS pixel at the plot's own width).
//!
//! Colours and fonts are the page's: elements carry classes, never colours, so that one drawing serves light and dark.
//!
//! Left out on purpose: a plotting library. The `plotters` crate writes colours and font sizes into its SVG, which
//! neither follow the reader's colour scheme nor stay legible on a phone.

use std::fmt::Write;

use super::format::{coordinate, escape};

/// How a plot is drawn for the width it will be shown at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    /// A desktop's column.
    Wide,
    /// A phone.
    Narrow,
}

impl Size {
    pub const BOTH: [Self; 2] = [Self::Wide, Self::Narrow];

    /// Width of the drawing.
    pub fn width(self) -> f64 {
        match self {
            Self::Wide => 880.0,
            Self::Narrow => 350.0,
        }
    }

    pub fn class(self) -> &'static str {
        match self {
            Self::Wide => "wide",
            Self::Narrow => "narrow",
        }
    }
}

/// Maps values onto a line, linearly or by their logarithm.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scale {
    log: bool,
    /// Lowest and highest value.
    pub domain: (f64, f64),
    /// Where they are drawn.
    pub range: (f64, f64),
}

impl Scale {
    pub fn linear(domain: (f64, f64), range: (f64, f64)) -> Self {
        let (low, high) = domain;
        let domain = if high > low { domain } else { (low - 0.5, low + 0.5) };
        Self { log: false, domain, range }
    }

    /// Values are positive.
    pub fn log(domain: (f64, f64), range: (f64, f64)) -> Self {
        let (low, high) = domain;
        let domain = if high > low { domain } else { (low / 2.0, low * 2.0) };
        Self { log: true, domain, range }
    }

    pub fn at(&self, value: f64) -> f64 {
        let f = |x: f64| if self.log { x.ln() } else { x };
        let share = (f(value) - f(self.domain.0)) / (f(self.domain.1) - f(self.domain.0));
        self.range.0 + share * (self.range.1 - self.range.0)
    }

    /// Round values inside the domain, about `wanted` of them, and the step between them (0 for a log scale).
    pub fn ticks(&self, wanted: usize) -> (Vec<f64>, f64) {
        if self.log {
            let ticks = log_ticks(self.domain, wanted);
            if ticks.len() >= 3 {
                return (ticks, 0.0);
            }
        }
        linear_ticks(self.domain, wanted)
    }
}

fn linear_ticks((low, high): (f64, f64), wanted: usize) -> (Vec<f64>, f64) {
    let rough = (high - low) / wanted.max(1) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough * 0.999);
    let step = step.unwrap_or(10.0 * power);
    let first = (low / step).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    ((first..=last).map(|i| i as f64 * step).collect(), step)
}

fn log_ticks((low, high): (f64, f64), wanted: usize) -> Vec<f64> {
    let decades = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let inside = |multiples: &[f64], every: usize| -> Vec<f64> {
        let decades = decades.clone().step_by(every);
        let all = decades.flat_map(|d| multiples.iter().map(move |m| m * 10f64.powi(d)));
        all.filter(|t| *t >= low * 0.9999 && *t <= high * 1.0001).collect()
    };
    let choices: [(&[f64], usize); 6] = [
        (&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0], 1),
        (&[1.0, 2.0, 5.0], 1),
        (&[1.0, 3.0], 1),
        (&[1.0], 1),
        (&[1.0], 2),
        (&[1.0], 5),
    ];
    choices.iter().map(|(m, every)| inside(m, *every)).find(|t| t.len() <= wanted + 2).unwrap_or_default()
}

/// A drawing being made.
pub(super) struct Drawing {
    out: String,
}

impl Drawing {
    /// Opens the SVG. `label` says in words what it shows.
    pub fn new(size: Size, height: f64, label: &str) -> Self {
        let (width, class) = (size.width(), size.class());
        let out = format!(
            "<svg class=\"plot {class}\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">",
            escape(label)
        );
        Self { out }
    }

    pub fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        self.path(class, &[from, to]);
    }

    pub fn rect(&mut self, class: &str, x: f64, y: f64, width: f64, height: f64) {
        self.open("rect", class);
        for (name, value) in [("x", x), ("y", y), ("width", width), ("height", height)] {
            self.attribute(name, value);
        }
        self.out.push_str("/>");
    }

    /// An open line through the points.
    pub fn path(&mut self, class: &str, points: &[(f64, f64)]) {
        if points.is_empty() {
            return;
        }
        self.open("path", class);
        self.out.push_str(" d=\"");
        for (i, (x, y)) in points.iter().enumerate() {
            self.out.push(if i == 0 { 'M' } else { 'L' });
            coordinate(&mut self.out, *x);
            self.out.push(' ');
            coordinate(&mut self.out, *y);
        }
        self.out.push_str("\"/>");
    }

    /// A point's marker, told apart by shape as well as by colour; `hint` shows under the pointer.
    pub fn marker(&mut self, class: &str, shape: usize, (x, y): (f64, f64), hint: &str) {
        self.open("path", class);
        self.out.push_str(" d=\"");
        self.out.push_str(&marker_path(shape, x, y));
        let _ = write!(self.out, "\"><title>{}</title></path>", escape(hint));
    }

    /// `anchor` is `start`, `middle` or `end`.
    pub fn text(&mut self, class: &str, (x, y): (f64, f64), anchor: &str, text: &str) {
        self.open("text", class);
        self.attribute("x", x);
        self.attribute("y", y);
        let _ = write!(self.out, " text-anchor=\"{anchor}\">{}</text>", escape(text));
    }

    /// Text in the middle of its place; `hint` shows under the pointer.
    pub fn hinted_text(&mut self, class: &str, (x, y): (f64, f64), text: &str, hint: &str) {
        self.open("text", class);
        self.attribute("x", x);
        self.attribute("y", y);
        let _ = write!(
            self.out,
            " text-anchor=\"middle\"><title>{}</title>{}</text>",
            escape(hint),
            escape(text)
        );
    }

    pub fn finish(mut self) -> String {
        self.out.push_str("</svg>");
        self.out
    }

    fn open(&mut self, element: &str, class: &str) {
        let _ = write!(self.out, "<{element} class=\"{class}\"");
    }

    fn attribute(&mut self, name: &str, value: f64) {
        let _ = write!(self.out, " {name}=\"");
        coordinate(&mut self.out, value);
        self.out.push('"');
    }
}

/// Circle, square, triangle, diamond around a point.
pub(super) fn marker_path(shape: usize, x: f64, y: f64) -> String {
    let points: &[(f64, f64)] = match shape % 4 {
        0 => return format!("M{:.1} {y:.1}a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0 -8.4 0Z", x - 4.2),
        1 => &[(-3.9, -3.9), (3.9, -3.9), (3.9, 3.9), (-3.9, 3.9)],
        2 => &[(0.0, -5.0), (4.8, 3.6), (-4.8, 3.6)],
        _ => &[(0.0, -5.0), (5.0, 0.0), (0.0, 5.0), (-5.0, 0.0)],
    };
    let mut out = String::new();
    for (i, (dx, dy)) in points.iter().enumerate() {
        let _ = write!(out, "{}{:.1} {:.1}", if i == 0 { 'M' } else { 'L' }, x + dx, y + dy);
    }
    out.push('Z');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_ticks_are_round_and_inside() {
        let scale = Scale::linear((0.0, 237.0), (0.0, 1.0));
        assert_eq!(scale.ticks(5), (vec![0.0, 50.0, 100.0, 150.0, 200.0], 50.0));
        assert_eq!(Scale::linear((3.0, 3.0), (0.0, 1.0)).at(3.0), 0.5);
    }

    #[test]
    fn log_ticks_thin_out_with_the_decades() {
        let ticks = |low, high| Scale::log((low, high), (0.0, 1.0)).ticks(6).0;
        assert_eq!(ticks(9.0, 450.0), [10.0, 20.0, 50.0, 100.0, 200.0]);
        assert_eq!(ticks(1.0, 1e5), [1.0, 10.0, 100.0, 1e3, 1e4, 1e5]);
        assert_eq!(ticks(11.0, 14.0), [11.0, 11.5, 12.0, 12.5, 13.0, 13.5, 14.0]);
        assert!(ticks(1.0, 1e300).len() < 100);
        assert_eq!(Scale::log((1.0, 100.0), (0.0, 10.0)).at(10.0), 5.0);
    }
}
