//! The heat map of a passkey evaluation: depth down, length across, the share of keys found in each field.
//!
//! A field's colour is one hue in eleven strengths, and the number stands in it, so that nothing depends on colours alone.

use super::axes::{Drawing, Size};
use super::format::{context, percent};
use crate::train::passkey::Cell;

/// Strengths of the hue, 0 and full among them.
const STRENGTHS: f64 = 10.0;

/// The map; nothing where there are no cells.
pub(super) fn heat_map(cells: &[Cell], size: Size) -> Option<String> {
    let mut lengths: Vec<usize> = cells.iter().map(|cell| cell.length).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let mut depths: Vec<f64> = cells.iter().map(|cell| cell.depth).collect();
    depths.sort_by(f64::total_cmp);
    depths.dedup();
    if cells.is_empty() {
        return None;
    }
    let wide = size == Size::Wide;
    let (left, right, top) = (if wide { 70.0 } else { 44.0 }, size.width() - 8.0, 28.0);
    let field = (right - left) / lengths.len() as f64;
    let row = if wide { 38.0 } else { 32.0 };
    let bottom = top + row * depths.len() as f64;
    let (right_answers, trials) =
        cells.iter().fold((0, 0), |(right, all), cell| (right + cell.right, all + cell.trials));
    let label = format!(
        "Passkeys found by length and depth, {} lengths and {} depths, {} in all",
        lengths.len(),
        depths.len(),
        percent(right_answers as f64 / trials.max(1) as f64)
    );
    let mut drawing = Drawing::new(size, bottom + 44.0, &label);
    drawing.text(
        "caption",
        (if wide { 4.0 } else { 0.0 }, 13.0),
        "start",
        "depth of the key, 0 % is the beginning",
    );
    let room = field - 4.0;
    for cell in cells {
        let across = lengths.iter().position(|length| *length == cell.length).unwrap_or(0) as f64;
        let down = depths.iter().position(|depth| *depth == cell.depth).unwrap_or(0) as f64;
        let (x, y) = (left + across * field, top + down * row);
        let strength = (cell.accuracy() * STRENGTHS).round() as usize;
        drawing.rect("heat ground", x + 1.0, y + 1.0, field - 2.0, row - 2.0);
        drawing.rect(&format!("heat h{strength}"), x + 1.0, y + 1.0, field - 2.0, row - 2.0);
        let share = format!("{:.0} %", cell.accuracy() * 100.0);
        let counts = format!("{} of {}", cell.right, cell.trials);
        let fits = |text: &str| text.chars().count() as f64 * 6.6 <= room;
        let text = if fits(&share) { share } else { format!("{:.0}", cell.accuracy() * 100.0) };
        let class = if strength >= 6 { "field strong" } else { "field" };
        drawing.hinted_text(
            class,
            (x + field / 2.0, y + row / 2.0 + 4.0),
            &text,
            &format!("{} tokens, depth {}: {counts}", context(cell.length), depth_name(cell.depth)),
        );
    }
    for (down, depth) in depths.iter().enumerate() {
        let y = top + (down as f64 + 0.5) * row + 4.0;
        drawing.text("tick", (left - 8.0, y), "end", &depth_name(*depth));
    }
    let mut free = f64::NEG_INFINITY;
    for (across, length) in lengths.iter().enumerate() {
        let (at, text) = (left + (across as f64 + 0.5) * field, context(*length));
        let half = text.len() as f64 * 3.4;
        if at - half > free {
            drawing.text("tick", (at, bottom + 17.0), "middle", &text);
            free = at + half + 4.0;
        }
    }
    drawing.text("caption", ((left + right) / 2.0, bottom + 37.0), "middle", "length, tokens");
    Some(drawing.finish())
}

/// A depth as a share of the text.
pub(super) fn depth_name(depth: f64) -> String {
    let percent = (depth * 1000.0).round() / 10.0;
    format!("{percent}\u{a0}%")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(length: usize, depth: f64, right: usize) -> Cell {
        Cell { length, depth, trials: 4, right, answers: Vec::new() }
    }

    #[test]
    fn every_cell_is_a_field_with_its_number() {
        let cells = [cell(256, 0.0, 4), cell(256, 0.5, 3), cell(1024, 0.0, 0), cell(1024, 0.5, 1)];
        for size in Size::BOTH {
            let map = heat_map(&cells, size).unwrap();
            for (class, times) in
                [("\"heat h10\"", 1), ("\"heat h8\"", 1), ("\"heat h0\"", 1), ("\"heat h3\"", 1)]
            {
                assert_eq!(map.matches(class).count(), times, "{class}: {map}");
            }
            for text in ["100 %<", "75 %<", "25 %<", ">0 %<", "1,024 tokens, depth 50\u{a0}%: 1 of 4"] {
                assert!(map.contains(text), "{text}: {map}");
            }
            assert_eq!(map.matches("field strong").count(), 2);
        }
        assert!(heat_map(&[], Size::Wide).is_none());
    }

    #[test]
    fn many_lengths_keep_their_labels_apart() {
        let cells: Vec<Cell> = (1..=40).map(|n| cell(n * 1000, 0.0, 2)).collect();
        let map = heat_map(&cells, Size::Narrow).unwrap();
        assert!(map.matches("class=\"tick\"").count() < 20, "{map}");
        assert_eq!(map.matches("heat h5").count(), 40);
    }
}
