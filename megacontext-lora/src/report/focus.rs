//! The picture of a working context over its refocuses: a strip of spans for each, as wide as the tokens they stand for and
//! coloured by level, with the scores that the refocus followed above.
//!
//! Levels are told apart by height as well as by colour: tokens fill the strip, gists less of it with every level. Scores
//! rise above their line where a closer look is asked for and hang below it where a coarser one is. What is too narrow to be
//! seen by itself is drawn together with its neighbours of the same level.
//!
//! Units: tokens across.

use std::ops::Range;

use lensnet_adapter::focus::Chosen;
use megacontext_base::context::{Entry, WorkingContext};

use super::axes::{Drawing, Scale, Size};
use super::format::count;

/// Narrowest piece, CSS pixels.
const LEAST: f64 = 2.0;
/// Heights of a strip, of the scores above it, and between two strips.
const STRIP: f64 = 22.0;
const SCORES: f64 = 34.0;
const GAP: f64 = 22.0;

/// A piece of a strip: neighbours of one level.
#[derive(Clone, Debug, PartialEq)]
struct Piece {
    tokens: Range<u64>,
    lod: u8,
    /// Mean score; none after the last refocus.
    score: Option<f32>,
    entries: usize,
}

/// One context and the scores that the next refocus followed.
#[derive(Clone, Debug, PartialEq)]
struct Strip {
    entries: Vec<Entry>,
    spans: Vec<Range<u64>>,
    scores: Vec<f32>,
}

/// A history's contexts, from the first to the one that was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    strips: Vec<Strip>,
    /// The tokens that the future cannot be predicted without, where that is known.
    fact: Option<Range<u64>>,
}

impl Picture {
    /// Of a context as it was chosen.
    pub fn of(chosen: &Chosen, fact: Option<Range<u64>>) -> Self {
        let strip = |context: &WorkingContext, scores: &[f32]| Strip {
            entries: context.entries().to_vec(),
            spans: context.entries().iter().map(|entry| context.span_of(*entry)).collect(),
            scores: scores.to_vec(),
        };
        let mut strips: Vec<Strip> =
            chosen.steps.iter().map(|step| strip(&step.before, &step.scores)).collect();
        strips.push(strip(&chosen.context, &[]));
        Self { strips, fact }
    }

    /// The drawing; nothing where there is no entry.
    pub(super) fn draw(&self, size: Size) -> Option<String> {
        let first =
            self.strips.iter().filter_map(|strip| strip.spans.first()).map(|span| span.start).min()?;
        let end = self.strips.iter().filter_map(|strip| strip.spans.last()).map(|span| span.end).max()?;
        let (left, right) = (4.0, size.width() - 4.0);
        let x = Scale::linear((first as f64, end as f64), (left, right));
        let row = |number: usize| 18.0 + number as f64 * (SCORES + STRIP + GAP);
        let bottom = row(self.strips.len()) - GAP + 8.0;
        let label = format!(
            "Working context of {} tokens over {} refocuses",
            count(end - first),
            self.strips.len() - 1
        );
        let mut drawing = Drawing::new(size, bottom + 24.0, &label);
        for (number, strip) in self.strips.iter().enumerate() {
            let top = row(number);
            let name = match number {
                0 => "at first".to_string(),
                1 => "after a refocus".to_string(),
                n => format!("after {n} refocuses"),
            };
            let entries = strip.entries.len();
            drawing.text("caption", (left, top), "start", &format!("{name}: {entries} entries"));
            let (middle, base) = (top + 4.0 + SCORES / 2.0, top + 8.0 + SCORES + STRIP);
            if !strip.scores.is_empty() {
                drawing.line("grid", (left, middle), (right, middle));
            }
            for piece in strip.pieces(&x) {
                let (from, to) = (x.at(piece.tokens.start as f64), x.at(piece.tokens.end as f64));
                let height = STRIP / f64::from(1 + piece.lod);
                let class = format!("lod{}", piece.lod.min(2));
                let gap = if to - from > 2.0 * LEAST { 0.8 } else { 0.0 };
                drawing.rect(&class, from, base - height, to - from - gap, height);
                if let Some(score) = piece.score {
                    let tall = f64::from(score.abs()) * SCORES / 2.0;
                    let above = if score > 0.0 { middle - tall } else { middle };
                    let class = if score > 0.0 { "closer" } else { "coarser" };
                    drawing.rect(class, from, above, to - from - gap, tall);
                }
            }
            if let Some(fact) = &self.fact {
                let under = base + 4.0;
                drawing.line(
                    "line adapted",
                    (x.at(fact.start as f64), under),
                    (x.at(fact.end as f64), under),
                );
            }
        }
        let (ticks, _) = x.ticks(6);
        for value in ticks {
            drawing.text("tick", (x.at(value), bottom + 16.0), "middle", &count(value as u64));
        }
        Some(drawing.finish())
    }
}

impl Strip {
    fn pieces(&self, x: &Scale) -> Vec<Piece> {
        let mut pieces: Vec<Piece> = Vec::new();
        for (at, (entry, span)) in self.entries.iter().zip(&self.spans).enumerate() {
            let score = self.scores.get(at).copied();
            let wide = |tokens: &Range<u64>| x.at(tokens.end as f64) - x.at(tokens.start as f64) >= LEAST;
            match pieces.last_mut() {
                Some(last) if last.lod == entry.lod && !wide(&last.tokens) => {
                    let n = last.entries as f32;
                    last.score = last.score.zip(score).map(|(mean, score)| (mean * n + score) / (n + 1.0));
                    last.tokens.end = span.end;
                    last.entries += 1;
                }
                _ => pieces.push(Piece { tokens: span.clone(), lod: entry.lod, score, entries: 1 }),
            }
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strip(levels: &[u8], scores: &[f32]) -> Strip {
        let mut start = 0;
        let (mut entries, mut spans) = (Vec::new(), Vec::new());
        for lod in levels {
            let span = 4u64.pow(u32::from(*lod));
            entries.push(Entry { start, lod: *lod });
            spans.push(start..start + span);
            start += span;
        }
        Strip { entries, spans, scores: scores.to_vec() }
    }

    #[test]
    fn every_level_and_score_is_drawn() {
        let picture = Picture {
            strips: vec![
                strip(&[2, 1, 0, 0, 0, 0], &[0.5, -0.5, 0.0, 0.0, -1.0, 0.25]),
                strip(&[1, 1, 1, 1], &[]),
            ],
            fact: Some(4..8),
        };
        for size in Size::BOTH {
            let drawn = picture.draw(size).unwrap();
            for (class, times) in [("lod2", 1), ("lod1", 5), ("lod0", 4), ("closer", 2), ("line adapted", 2)]
            {
                assert_eq!(drawn.matches(&format!("class=\"{class}\"")).count(), times, "{class}: {drawn}");
            }
            for text in ["at first: 6 entries", "after a refocus: 4 entries"] {
                assert!(drawn.contains(text), "{drawn}");
            }
        }
    }

    #[test]
    fn what_is_too_narrow_is_drawn_together() {
        let many = strip(&vec![0; 10_000], &vec![0.5; 10_000]);
        let x = Scale::linear((0.0, 10_000.0), (0.0, 800.0));
        let pieces = many.pieces(&x);
        assert!(pieces.len() <= 400, "{}", pieces.len());
        assert_eq!(pieces.iter().map(|piece| piece.entries).sum::<usize>(), 10_000);
        assert!(pieces.iter().all(|piece| (piece.score.unwrap() - 0.5).abs() < 1e-6));
    }

    #[test]
    fn nothing_is_drawn_of_nothing() {
        assert!(Picture { strips: Vec::new(), fact: None }.draw(Size::Wide).is_none());
    }
}
