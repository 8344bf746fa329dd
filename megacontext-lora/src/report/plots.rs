//! The report's two plots: loss over steps, perplexity by context length. Each is drawn twice, for a desktop's and for a
//! phone's width; the page shows the one that fits.
//!
//! Series are told apart by colour (of one hue family each, safe for the common colour blindnesses), by marker and by
//! line style. A value that is not a finite number is left out of its line.

use super::axes::{Drawing, Scale, Size};
use super::format::{context, perplexity, rate, tick};
use crate::run::metrics::{Record, TrainRecord};
use crate::run::summary::{ByContext, Summary};

/// Class, name, and values of each line of the perplexity plot that has values; the position is the marker's shape.
pub(super) fn series(summary: &Summary) -> [(&'static str, &'static str, &ByContext); 4] {
    [
        ("base", "base model", &summary.perplexity.base),
        ("interpolated", "interpolated only", &summary.perplexity.interpolated),
        ("adapted", "adapted", &summary.perplexity.adapted),
        ("sparse", "adapted, sparse attention", &summary.perplexity_sparse),
    ]
}

/// Perplexity by context length; nothing when nothing was measured.
pub(super) fn perplexity_by_context(summary: &Summary, size: Size) -> Option<String> {
    let lines = series(summary);
    let valid = |line: &ByContext| -> Vec<(usize, f64)> {
        line.iter().map(|(c, p)| (*c, *p)).filter(|(c, p)| *c > 0 && p.is_finite() && *p > 0.0).collect()
    };
    let all: Vec<(usize, f64)> = lines.iter().flat_map(|(_, _, line)| valid(line)).collect();
    let (low, high) = bounds(all.iter().map(|p| p.1))?;
    let (shortest, longest) = bounds(all.iter().map(|p| p.0 as f64))?;

    let wide = size == Size::Wide;
    let (left, right, top, height) = if wide {
        (58.0, size.width() - 172.0, 26.0, 340.0)
    } else {
        (44.0, size.width() - 12.0, 26.0, 280.0)
    };
    let bottom = height - 44.0;
    let x = Scale::log((shortest, longest), (left + 24.0, right - 18.0));
    let y = Scale::log((low / 1.25, high * 1.12), (bottom, top));
    let label = format!(
        "Perplexity by context length for {} models, logarithmic axes",
        lines.iter().filter(|l| !l.2.is_empty()).count()
    );
    let mut drawing = Drawing::new(size, height, &label);

    let (ticks, step) = y.ticks(5);
    for value in ticks {
        drawing.line("grid", (left, y.at(value)), (right, y.at(value)));
        let text = if step > 0.0 { tick(value, step) } else { plain(value) };
        drawing.text("tick", (left - 8.0, y.at(value) + 4.0), "end", &text);
    }
    drawing.line("axis", (left, bottom), (right, bottom));
    let mut contexts: Vec<usize> = all.iter().map(|p| p.0).collect();
    contexts.sort_unstable();
    contexts.dedup();
    let mut free = f64::NEG_INFINITY;
    for tokens in contexts {
        let (at, text) = (x.at(tokens as f64), context(tokens));
        drawing.line("axis", (at, bottom), (at, bottom + 5.0));
        let half = text.len() as f64 * 3.4;
        if at - half > free {
            drawing.text("tick", (at, bottom + 19.0), "middle", &text);
            free = at + half + 4.0;
        }
    }
    drawing.text("caption", ((left + right) / 2.0, height - 7.0), "middle", "context length, tokens");
    drawing.text(
        "caption",
        (if wide { 4.0 } else { 0.0 }, 13.0),
        "start",
        "perplexity, log scale (lower is better)",
    );

    let trained = summary.base.context as f64;
    if trained >= shortest && trained < longest {
        let at = x.at(trained);
        drawing.line("mark", (at, top), (at, bottom));
        drawing.text("note halo", (at + 6.0, top + 11.0), "start", "base trained to here");
    }

    let mut ends = Vec::new();
    for (shape, (class, name, line)) in lines.into_iter().enumerate() {
        let points = valid(line);
        let drawn: Vec<_> = points.iter().map(|(c, p)| (x.at(*c as f64), y.at(*p))).collect();
        drawing.path(&format!("line {class}"), &drawn);
        for ((tokens, value), at) in points.iter().zip(&drawn) {
            let hint = format!("{name}, {} tokens: {}", context(*tokens), perplexity(*value));
            drawing.marker(&format!("dot {class}"), shape, *at, &hint);
        }
        if let (Some((_, value)), Some(at)) = (points.last(), drawn.last()) {
            ends.push((at.1, class, format!("{} {}", short_name(class), perplexity(*value))));
        }
    }
    if wide {
        for (at, class, text) in spread(ends, 17.0, (top, bottom)) {
            drawing.text(&format!("end {class}"), (right + 2.0, at + 4.0), "start", &text);
        }
    }
    Some(drawing.finish())
}

fn short_name(class: &str) -> &'static str {
    match class {
        "base" => "base",
        "interpolated" => "interpolated",
        "adapted" => "adapted",
        _ => "adapted, sparse",
    }
}

/// Loss and learning rate over the steps, the stages as bands; nothing when no step was recorded.
pub(super) fn loss_curve(records: &[Record], size: Size) -> Option<String> {
    let steps: Vec<&TrainRecord> = records
        .iter()
        .filter_map(|r| match r {
            Record::Train(r) if r.loss.is_finite() => Some(r),
            _ => None,
        })
        .collect();
    let last = steps.last()?.step as f64;
    let (low, high) = bounds(steps.iter().map(|r| r.loss))?;
    let (_, top_rate) = bounds(steps.iter().map(|r| r.lr)).unwrap_or((0.0, 0.0));

    let wide = size == Size::Wide;
    let (left, right, top) =
        if wide { (58.0, size.width() - 12.0, 46.0) } else { (40.0, size.width() - 8.0, 46.0) };
    let (bottom, rate_top, rate_bottom, height) =
        if wide { (290.0, 326.0, 372.0, 416.0) } else { (240.0, 278.0, 318.0, 362.0) };
    let x = Scale::linear((0.0, last), (left, right));
    let margin = (high - low).max(0.02) * 0.06;
    let y = Scale::linear((low - margin, high + margin), (bottom, top));
    let rate_y =
        Scale::linear((0.0, if top_rate > 0.0 { top_rate * 1.08 } else { 1.0 }), (rate_bottom, rate_top));
    let mut drawing =
        Drawing::new(size, height, &format!("Training loss and learning rate over {last} optimiser steps"));

    let mut free = left;
    for (i, (from, to, name)) in stages(records, &steps).into_iter().enumerate() {
        let (from, to) = (x.at(from as f64), x.at(to as f64));
        if i % 2 == 0 {
            drawing.rect("band", from, top - 20.0, to - from, rate_bottom - top + 20.0);
        }
        if i > 0 {
            drawing.line("mark", (from, top - 20.0), (from, rate_bottom));
        }
        for text in name {
            let needed = text.chars().count() as f64 * 6.4 + 10.0;
            if from >= free - 1.0 && needed <= to - from {
                drawing.text("note", (from + 6.0, top - 6.0), "start", &text);
                free = from + needed;
                break;
            }
        }
    }
    let (ticks, step) = y.ticks(5);
    for value in ticks {
        drawing.line("grid", (left, y.at(value)), (right, y.at(value)));
        drawing.text("tick", (left - 8.0, y.at(value) + 4.0), "end", &tick(value, step));
    }
    drawing.text("caption", (if wide { 4.0 } else { 0.0 }, 13.0), "start", "training loss, nats per token");
    drawing.text("caption", (if wide { 4.0 } else { 0.0 }, rate_top - 10.0), "start", "learning rate");
    drawing.text("tick", (right, rate_top - 10.0), "end", &format!("highest {}", rate(top_rate)));
    drawing.line("axis", (left, rate_bottom), (right, rate_bottom));
    let (ticks, step) = x.ticks(if wide { 8 } else { 4 });
    for value in ticks {
        drawing.line("axis", (x.at(value), rate_bottom), (x.at(value), rate_bottom + 5.0));
        drawing.text("tick", (x.at(value), rate_bottom + 19.0), "middle", &tick(value, step));
    }
    drawing.text("caption", ((left + right) / 2.0, height - 6.0), "middle", "optimiser step");

    let columns = (right - left) as usize;
    let raw: Vec<_> = steps.iter().map(|r| (x.at(r.step as f64), y.at(r.loss))).collect();
    drawing.path("line raw", &thin(&raw, columns));
    for run in smooth(&steps) {
        let points: Vec<_> = run.iter().map(|(step, loss)| (x.at(*step), y.at(*loss))).collect();
        drawing.path("line loss", &thin(&points, columns));
    }
    let rates: Vec<_> =
        steps.iter().filter(|r| r.lr.is_finite()).map(|r| (x.at(r.step as f64), rate_y.at(r.lr))).collect();
    drawing.path("line rate", &thin(&rates, columns));
    Some(drawing.finish())
}

/// First and last step of every stage, and its names from long to short.
fn stages(records: &[Record], steps: &[&TrainRecord]) -> Vec<(u64, u64, Vec<String>)> {
    let mut found: Vec<(usize, u64, u64, Vec<String>)> = Vec::new();
    for step in steps {
        match found.last_mut() {
            Some((stage, _, to, _)) if *stage == step.stage => *to = step.step,
            _ => {
                let from = found.last().map_or(0, |(_, _, to, _)| *to);
                let tokens = context(step.context);
                let mut names = vec![format!("{tokens} tokens"), tokens];
                let attention = records.iter().find_map(|r| match r {
                    Record::Stage(r) if r.stage == step.stage => Some(r.attention.as_str()),
                    _ => None,
                });
                if let Some(attention) = attention {
                    names.insert(
                        0,
                        format!("{} tokens, {}", context(step.context), attention_name(attention)),
                    );
                }
                found.push((step.stage, from, step.step, names));
            }
        }
    }
    found.into_iter().map(|(_, from, to, names)| (from, to, names)).collect()
}

/// `s2` as its readers know it.
pub(super) fn attention_name(name: &str) -> &str {
    if name == "s2" { "shifted sparse" } else { name }
}

/// Straight lines fitted to the neighbouring steps, a twentieth of the run each way; one line a stage, so that a stage's
/// own loss never mixes with the next one's. A fit follows a slope at the ends, where a mean would lag behind it.
fn smooth(steps: &[&TrainRecord]) -> Vec<Vec<(f64, f64)>> {
    let half = (steps.len() / 20).max(2);
    steps
        .chunk_by(|a, b| a.stage == b.stage)
        .map(|run| {
            (0..run.len())
                .map(|i| {
                    let window = &run[i.saturating_sub(half)..(i + half + 1).min(run.len())];
                    (run[i].step as f64, fit(window, run[i].step as f64))
                })
                .collect()
        })
        .collect()
}

/// The least-squares line through the losses of these steps, at `step`.
fn fit(window: &[&TrainRecord], step: f64) -> f64 {
    let n = window.len() as f64;
    let mean_step = window.iter().map(|r| r.step as f64).sum::<f64>() / n;
    let mean_loss = window.iter().map(|r| r.loss).sum::<f64>() / n;
    let (mut covariance, mut variance) = (0.0, 0.0);
    for r in window {
        let d = r.step as f64 - mean_step;
        covariance += d * (r.loss - mean_loss);
        variance += d * d;
    }
    let slope = if variance > 0.0 { covariance / variance } else { 0.0 };
    mean_loss + slope * (step - mean_step)
}

/// At most two points a column, the lowest and the highest: what is drawn looks the same and stays small.
fn thin(points: &[(f64, f64)], columns: usize) -> Vec<(f64, f64)> {
    if points.len() <= columns * 2 {
        return points.to_vec();
    }
    let mut kept = Vec::new();
    for column in points.chunk_by(|a, b| a.0.floor() == b.0.floor()) {
        let pick = |better: fn(f64, f64) -> bool| {
            (0..column.len()).reduce(|a, b| if better(column[b].1, column[a].1) { b } else { a })
        };
        let mut ends = [pick(|b, a| b < a).unwrap_or(0), pick(|b, a| b > a).unwrap_or(0)];
        ends.sort_unstable();
        kept.push(column[ends[0]]);
        if ends[1] != ends[0] {
            kept.push(column[ends[1]]);
        }
    }
    kept
}

fn bounds(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|v| v.is_finite()).fold(None, |b, v| {
        let (low, high) = b.unwrap_or((v, v));
        Some((low.min(v), high.max(v)))
    })
}

/// Moves labels apart to `gap`, inside the limits where they fit.
pub(super) fn spread<A, B>(
    mut labels: Vec<(f64, A, B)>,
    gap: f64,
    (top, bottom): (f64, f64),
) -> Vec<(f64, A, B)> {
    labels.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut free = top;
    for label in &mut labels {
        label.0 = label.0.max(free);
        free = label.0 + gap;
    }
    let mut free = bottom;
    for label in labels.iter_mut().rev() {
        label.0 = label.0.min(free);
        free = label.0 - gap;
    }
    labels
}

/// A tick of a log axis: powers of ten and small multiples of them.
fn plain(value: f64) -> String {
    if !(1e-3..1e6).contains(&value) {
        format!("{value:e}")
    } else if value >= 1.0 {
        tick(value.round(), 1.0)
    } else {
        format!("{}", (value * 1e4).round() / 1e4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_moved_apart_and_stay_inside() {
        let labels = vec![(95.0, 'c', ()), (94.0, 'b', ()), (10.0, 'a', ())];
        let placed: Vec<_> = spread(labels, 10.0, (0.0, 100.0)).into_iter().map(|l| (l.0, l.1)).collect();
        assert_eq!(placed, [(10.0, 'a'), (90.0, 'b'), (100.0, 'c')]);
    }

    #[test]
    fn smoothing_follows_a_slope_to_its_ends_and_stays_in_its_stage() {
        let steps: Vec<TrainRecord> = crate::report::sample()
            .records
            .into_iter()
            .filter_map(|r| if let Record::Train(r) = r { Some(r) } else { None })
            .map(|r| TrainRecord { loss: r.stage as f64 * 10.0 - r.step as f64, ..r })
            .collect();
        let steps: Vec<&TrainRecord> = steps.iter().collect();
        let runs = smooth(&steps);
        assert_eq!(runs.iter().map(Vec::len).collect::<Vec<_>>(), [60, 90, 10]);
        for (step, (at, loss)) in steps.iter().zip(runs.concat()) {
            assert!(step.step as f64 == at && (step.loss - loss).abs() < 1e-9, "{at}: {loss}");
        }
    }

    #[test]
    fn thinning_keeps_the_extremes() {
        let points: Vec<_> = (0..10_000)
            .map(|i| (f64::from(i) / 100.0, if i == 5_555 { 9.0 } else { f64::from(i % 7) }))
            .collect();
        let kept = thin(&points, 100);
        assert!(kept.len() <= 201 && kept.iter().any(|p| p.1 == 9.0));
        assert!(kept.is_sorted_by(|a, b| a.0 <= b.0));
        assert_eq!(thin(&points[..50], 100), points[..50]);
    }
}
