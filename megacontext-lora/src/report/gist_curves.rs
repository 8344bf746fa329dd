//! How training GistNet went: ΔNLL@H, diversity of gists, and the gap between sparse and dense attention, over the steps. Each is
//! drawn for a desktop and for a phone. A value that is not finite is left out of its line.
//!
//! Units: nats per token; 1 − cos for diversity.

use gistnet_adapter::metrics::COLLAPSE;
use gistnet_adapter::validate::{Baseline, Validation};

use super::axes::{Drawing, Scale, Size};
use super::format::tick;
use super::gistnet::GistReport;
use super::html::both;
use super::plots::spread;
use super::stand_ins::name;
use crate::run::metrics::Record;

/// Points of the thin line, about.
const SMOOTHED: usize = 120;
/// Room that a label of a line takes, units.
const LABEL: f64 = 17.0;

/// One drawing.
struct Curve {
    /// In words.
    label: String,
    /// What the values are.
    caption: String,
    /// By step, as validated.
    validated: Vec<(f64, f64)>,
    /// By step, as trained on.
    trained: Vec<(f64, f64)>,
    /// Level lines.
    levels: Vec<(String, f64)>,
    /// Steps after which the horizon is another, and which.
    horizons: Vec<(f64, usize)>,
    /// The last step.
    last: f64,
    /// Of the line.
    name: &'static str,
    height: [f64; 2],
}

/// The section; nothing where no step was recorded.
pub(super) fn curves(report: &GistReport) -> String {
    let Some(all) = Curve::all(report) else { return String::new() };
    let mut out = String::from("<section>\n<h2>How it went</h2>\n");
    for curve in all {
        out += &both(|size| curve.draw(size));
    }
    out + "<p class=\"note\">Lines with points: the held-out text that the network was chosen by. Thin line: the steps' own blocks. \
           Level lines: the same held-out blocks with something else in their place, or the bounds of what is healthy. A stage with \
           another horizon is another measure.</p>\n</section>\n"
}

impl Curve {
    /// Those that there is something to draw of.
    fn all(report: &GistReport) -> Option<[Self; 3]> {
        let s = report.summary;
        let steps = || {
            report.records.iter().filter_map(|record| match record {
                Record::GistStep(r) => Some(r),
                _ => None,
            })
        };
        let last = steps().next_back()?.step as f64;
        let validated = |of: &dyn Fn(&Validation) -> Option<f64>| -> Vec<(f64, f64)> {
            let point = |record: &Record| match record {
                Record::GistValidation(r) => Some((r.step as f64, of(&r.validation)?)),
                _ => None,
            };
            report.records.iter().filter_map(point).filter(|(_, value)| value.is_finite()).collect()
        };
        let trained: Vec<(f64, f64)> =
            steps().filter(|r| r.delta_nll.is_finite()).map(|r| (r.step as f64, r.delta_nll)).collect();
        let mut horizons: Vec<(f64, usize)> = Vec::new();
        let mut before = None;
        for step in steps() {
            if before.is_some_and(|horizon| horizon != step.horizon) {
                horizons.push((step.step as f64 - 1.0, step.horizon));
            }
            before = Some(step.horizon);
        }
        let levels = [Baseline::Deleted, Baseline::Mean, Baseline::LastToken, Baseline::Last4];
        let levels = levels.into_iter().filter_map(|b| Some((name(b).to_string(), *s.baselines.get(&b)?)));
        let levels = levels.filter(|(_, value)| value.is_finite());
        let curve = |label: &str, caption: &str, validated, levels, name| Self {
            label: format!("{label} over {last} optimiser steps"),
            caption: caption.to_string(),
            validated,
            trained: Vec::new(),
            levels,
            horizons: horizons.clone(),
            last,
            name,
            height: [230.0, 220.0],
        };
        let h = s.validation.horizon;
        let cost = curve(
            &format!("\u{394}NLL@{h}"),
            "\u{394}NLL, nats per token (lower is better)",
            validated(&|v| Some(v.delta_nll)),
            levels.collect(),
            "gist",
        );
        let diversity = curve(
            "Diversity of gists",
            "diversity of gists, 1 less the mean cosine (below 0.3 they collapse)",
            validated(&|v| v.diversity),
            vec![("collapse".to_string(), COLLAPSE)],
            "gists",
        );
        let gap = curve(
            "Sparse less dense attention",
            "\u{394}NLL under sparse attention less that under dense, nats",
            validated(&Validation::sparse_dense_gap),
            vec![("bound".to_string(), s.most_gap), ("bound".to_string(), -s.most_gap)],
            "gap",
        );
        Some([Self { trained, height: [340.0, 290.0], ..cost }, diversity, gap])
    }

    fn draw(&self, size: Size) -> Option<String> {
        let smooth: Vec<(f64, f64)> = self
            .trained
            .chunks((self.trained.len() / SMOOTHED).max(1))
            .map(|part| {
                let n = part.len() as f64;
                (part.iter().map(|p| p.0).sum::<f64>() / n, part.iter().map(|p| p.1).sum::<f64>() / n)
            })
            .collect();
        if self.validated.is_empty() && smooth.is_empty() {
            return None;
        }
        let values = self.validated.iter().chain(&smooth).map(|p| p.1).chain(self.levels.iter().map(|l| l.1));
        let (low, high) = values.fold((0f64, 0f64), |(low, high), v| (low.min(v), high.max(v)));
        let wide = size == Size::Wide;
        let (left, right) = if wide { (58.0, size.width() - 190.0) } else { (44.0, size.width() - 12.0) };
        let (top, height) = (26.0, self.height[usize::from(!wide)]);
        let bottom = height - 44.0;
        let room = (high - low).max(1e-3) * 0.08;
        let x = Scale::linear((0.0, self.last), (left, right));
        let y = Scale::linear((if low < 0.0 { low - room } else { 0.0 }, high + room), (bottom, top));
        let mut drawing = Drawing::new(size, height, &self.label);
        let (ticks, step) = y.ticks(5);
        for value in ticks {
            drawing.line(
                if value == 0.0 { "axis" } else { "grid" },
                (left, y.at(value)),
                (right, y.at(value)),
            );
            drawing.text("tick", (left - 8.0, y.at(value) + 4.0), "end", &tick(value, step));
        }
        drawing.line("axis", (left, bottom), (right, bottom));
        let (ticks, step) = x.ticks(6);
        for value in ticks {
            drawing.line("axis", (x.at(value), bottom), (x.at(value), bottom + 5.0));
            drawing.text("tick", (x.at(value), bottom + 19.0), "middle", &tick(value, step));
        }
        drawing.text("caption", ((left + right) / 2.0, height - 7.0), "middle", "optimiser steps");
        drawing.text("caption", (if wide { 4.0 } else { 0.0 }, 13.0), "start", &self.caption);
        for (step, horizon) in &self.horizons {
            drawing.line("mark", (x.at(*step), top), (x.at(*step), bottom));
            drawing.text("note halo", (x.at(*step) + 4.0, top + 10.0), "start", &format!("H {horizon}"));
        }
        let mut ends: Vec<(f64, &str, String)> = Vec::new();
        let mut taken: Vec<f64> = Vec::new();
        for (name, value) in &self.levels {
            let at = y.at(*value);
            drawing.line("mark", (left, at), (right, at));
            ends.push((at, "note", format!("{name} {value:.3}")));
            // On a phone labels stand in the drawing, where there is room for them.
            if !wide && taken.iter().all(|other| (other - at).abs() > 13.0) {
                drawing.text("note halo", (right - 2.0, at - 4.0), "end", name);
                taken.push(at);
            }
        }
        let at = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
            points.iter().map(|(s, v)| (x.at(*s), y.at(*v))).collect()
        };
        drawing.path("line raw", &at(&smooth));
        drawing.path("line adapted", &at(&self.validated));
        for ((step, value), place) in self.validated.iter().zip(at(&self.validated)) {
            drawing.marker("dot adapted", 0, place, &format!("step {step}: {value:.4}"));
        }
        if let Some((_, value)) = self.validated.last() {
            ends.push((y.at(*value), "end adapted", format!("{} {value:.3}", self.name)));
        }
        if wide {
            for (at, class, text) in spread(ends, LABEL, (top, bottom)) {
                drawing.text(class, (right + 4.0, at + 4.0), "start", &text);
            }
        }
        Some(drawing.finish())
    }
}
