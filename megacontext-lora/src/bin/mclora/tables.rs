//! Results for people: aligned tables, numbers with sensible digits.

use serde_json::Value;

/// Lines of a table: first column to the left, the others to the right, two spaces between.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let columns = header.len();
    let width = |c: usize| {
        rows.iter()
            .map(|row| row.get(c).map_or(0, |cell| cell.chars().count()))
            .chain([header[c].chars().count()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |cells: Vec<&str>| {
        let cells: Vec<String> = cells
            .iter()
            .zip(&widths)
            .enumerate()
            .map(
                |(c, (cell, &width))| {
                    if c == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
                },
            )
            .collect();
        format!("  {}\n", cells.join("   ").trim_end())
    };
    let mut text = line(header.to_vec());
    for row in rows {
        text += &line(row.iter().map(String::as_str).collect());
    }
    text
}

/// Perplexity with the digits that mean something.
pub fn perplexity(value: f64) -> String {
    match value {
        v if !v.is_finite() => v.to_string(),
        v if v < 100.0 => format!("{v:.2}"),
        v if v < 1000.0 => format!("{v:.1}"),
        v if v < 1e7 => thousands(v.round() as u64),
        v => format!("{v:.2e}"),
    }
}

/// 1234567 as 1,234,567.
pub fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Seconds for people.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        0..=59 => format!("{whole} s"),
        60..=3599 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// One perplexity against another: `12 % lower than X`, `3.1 % higher than X`, `the same as X`.
pub fn against(value: f64, other: f64, name: &str) -> String {
    let percent = (value / other - 1.0) * 100.0;
    let digits = |p: f64| if p < 10.0 { format!("{p:.1} %") } else { format!("{p:.0} %") };
    match percent {
        p if p.abs() < 0.05 => format!("the same as {name}"),
        p if p < 0.0 => format!("{} lower than {name}", digits(-p)),
        p => format!("{} higher than {name}", digits(p)),
    }
}

/// The result of `eval_ppl`.
pub fn evaluation(result: &Value) -> String {
    let rows: Vec<Vec<String>> = result["results"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|r| {
            vec![
                thousands(r["context"].as_u64().unwrap_or(0)),
                r["attention"].as_str().unwrap_or("").to_owned(),
                r["perplexity"].as_f64().map_or("?".into(), perplexity),
                r["nll"].as_f64().map_or("?".into(), |n| format!("{n:.4}")),
                thousands(r["tokens"].as_u64().unwrap_or(0)),
                thousands(r["stride"].as_u64().unwrap_or(0)),
            ]
        })
        .collect();
    let header = ["context", "attention", "perplexity", "nats/token", "tokens scored", "stride"];
    format!("{}\n  {}; lower is better\n", table(&header, &rows), measured(result))
}

/// How something was measured, in a line.
fn measured(result: &Value) -> String {
    let of = |word: &str, key: &str| result[key].as_str().map(|text| format!("{word}: {text}"));
    let parts = [("attention", "attention"), ("positions", "rope"), ("scoring", "scoring")];
    parts.into_iter().filter_map(|(word, key)| of(word, key)).collect::<Vec<_>>().join("; ")
}

/// The result of `eval_gap`.
pub fn gap(result: &Value) -> String {
    let number = |value: &Value| value.as_f64().map_or("?".into(), perplexity);
    let rows: Vec<Vec<String>> = result["results"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|r| {
            vec![
                thousands(r["context"].as_u64().unwrap_or(0)),
                number(&r["dense"]["perplexity"]),
                number(&r["sparse"]["perplexity"]),
                r["gap"].as_f64().map_or("?".into(), |gap| format!("{:+.2} %", gap * 100.0)),
                r["sparse"]["attention"].as_str().unwrap_or("").to_owned(),
                thousands(r["dense"]["tokens"].as_u64().unwrap_or(0)),
            ]
        })
        .collect();
    let header = ["context", "dense", "sparse", "gap", "sparse attention", "tokens scored"];
    format!("{}\n  {}; the gap is sparse over dense\n", table(&header, &rows), measured(result))
}

/// The result of `eval_passkey`: depth down, length across.
pub fn passkey(result: &Value) -> String {
    let numbers = |key: &str| result[key].as_array().map(Vec::as_slice).unwrap_or_default();
    let lengths: Vec<u64> = numbers("lengths").iter().filter_map(Value::as_u64).collect();
    let depths: Vec<f64> = numbers("depths").iter().filter_map(Value::as_f64).collect();
    let share = |depth: f64, length: u64| {
        let cell = numbers("cells")
            .iter()
            .find(|cell| cell["length"].as_u64() == Some(length) && cell["depth"].as_f64() == Some(depth));
        cell.and_then(|cell| cell["accuracy"].as_f64()).map_or("-".into(), |a| format!("{:.0} %", a * 100.0))
    };
    let rows: Vec<Vec<String>> = depths
        .iter()
        .map(|depth| {
            std::iter::once(format!("{depth}"))
                .chain(lengths.iter().map(|length| share(*depth, *length)))
                .collect()
        })
        .collect();
    let lengths: Vec<String> = lengths.iter().map(|length| thousands(*length)).collect();
    let header: Vec<&str> =
        std::iter::once("depth / tokens").chain(lengths.iter().map(String::as_str)).collect();
    let all = result["accuracy"].as_f64().unwrap_or(0.0) * 100.0;
    format!(
        "Keys found, of {} each:\n\n{}\n  {all:.1} % in all\n  {}\n",
        result["trials"].as_u64().unwrap_or(0),
        table(&header, &rows),
        measured(result)
    )
}

/// The result of `rope`.
pub fn rope(result: &Value) -> String {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let short = |v: f64| match v {
        v if v >= 1e7 => format!("{v:.2e}"),
        v if v >= 100.0 => thousands(v.round() as u64),
        v => format!("{v:.2}"),
    };
    let rows: Vec<Vec<String>> = result["bands"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|band| {
            let mut row = vec![
                band["band"].to_string(),
                short(number(&band["wavelength_before"])),
                short(number(&band["wavelength_after"])),
                format!("{:.3e}", number(&band["omega_before"])),
                format!("{:.3e}", number(&band["omega_after"])),
                format!("{:.3}", number(&band["stretch"])),
            ];
            let kept = band["damping"].as_array().into_iter().flatten();
            row.extend(kept.map(|kept| format!("{:.4}", number(kept))));
            row
        })
        .collect();
    let header =
        ["band", "wavelength", "scaled", "omega", "scaled", "stretch", "left at lod 0", "lod 1", "lod 2"];
    let sigma: Vec<String> =
        result["sigma"].as_array().into_iter().flatten().map(|s| short(number(s))).collect();
    let mut text = format!(
        "\n{}\n  scaling {} of {}, base {}, rotated width {}; trained to {} tokens, shown at {}\n",
        table(&header, &rows),
        result["scaling"].as_str().unwrap_or("?"),
        result["own"].as_str().map_or("?".into(), |own| format!("a model with scaling {own}")),
        result["theta"],
        result["width"],
        thousands(result["original_context"].as_u64().unwrap_or(0)),
        thousands(result["context"].as_u64().unwrap_or(0)),
    );
    text += &format!(
        "  cosines and sines times {:.4}; sigma by level {} tokens (K {})\n",
        number(&result["attention_factor"]),
        sigma.join(", "),
        result["block"],
    );
    if let Some(plot) = result["plot"].as_str() {
        text += &format!("\npicture   {plot}\n");
    }
    text
}

/// The three models of a finished extension by context length, from its summary.
pub fn three_models(summary: &Value) -> String {
    let of = |model: &str, context: &str| {
        summary["perplexity"][model][context].as_f64().map_or("-".into(), perplexity)
    };
    let mut contexts: Vec<&String> =
        summary["perplexity"]["adapted"].as_object().into_iter().flat_map(|m| m.keys()).collect();
    contexts.sort_by_key(|c| c.parse::<u64>().unwrap_or(u64::MAX));
    let rows: Vec<Vec<String>> = contexts
        .into_iter()
        .map(|c| {
            let context = c.parse().map_or_else(|_| c.clone(), thousands);
            vec![context, of("base", c), of("interpolated", c), of("adapted", c)]
        })
        .collect();
    table(&["tokens of context", "base model", "interpolated", "adapted"], &rows)
}

/// One sentence for each column of [`three_models`]; says what the numbers say, good or bad.
pub fn verdict(summary: &Value) -> Vec<String> {
    let (short, long) = (summary["base"]["context"].as_u64(), summary["context"].as_u64());
    let (Some(short), Some(long)) = (short, long) else { return Vec::new() };
    let of = |model: &str, context: u64| summary["perplexity"][model][context.to_string()].as_f64();
    let mut lines = Vec::new();
    if let (Some(near), Some(far)) = (of("base", short), of("base", long)) {
        let (near_text, far_text) = (perplexity(near), perplexity(far));
        lines.push(if far > 1.1 * near {
            format!(
                "Base model: trained on {short} tokens, it is lost beyond them: perplexity {far_text} at {long}, \
                 {near_text} at {short}."
            )
        } else {
            format!("Base model: {far_text} at {long} tokens, {near_text} at the {short} that it was trained on.")
        });
    }
    if let (Some(base), Some(interpolated)) = (of("base", long), of("interpolated", long)) {
        lines.push(format!(
            "Interpolated: positions squeezed into the range that it knows, nothing learnt; at {long} tokens {}.",
            against(interpolated, base, "the base model")
        ));
    }
    if let (Some(interpolated), Some(adapted)) = (of("interpolated", long), of("adapted", long)) {
        let steps = summary["steps"].as_u64().unwrap_or(0);
        let at_long = against(adapted, interpolated, "interpolation alone");
        let mut line = format!("Adapted: after {steps} training steps, at {long} tokens {at_long}");
        if let (Some(before), Some(after)) = (of("base", short), of("adapted", short)) {
            line += &format!("; at {short} tokens {}", against(after, before, "the base model"));
        }
        lines.push(line + ".");
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn columns_line_up() {
        let text =
            table(&["a", "long"], &[vec!["1,024".into(), "2".into()], vec!["x".into(), "12345".into()]]);
        assert_eq!(text, "  a        long\n  1,024       2\n  x       12345\n");
    }

    #[test]
    fn numbers_are_short() {
        let shown: Vec<_> = [1.0, 99.994, 123.45, 4567.8, 1e9].into_iter().map(perplexity).collect();
        assert_eq!(shown, ["1.00", "99.99", "123.5", "4,568", "1.00e9"]);
        assert_eq!([duration(5.4), duration(75.0), duration(7260.0)], ["5 s", "1 min 15 s", "2 h 01 min"]);
        assert_eq!(
            [against(88.0, 100.0, "x"), against(103.14, 100.0, "x"), against(1.0, 1.0, "x")],
            ["12 % lower than x", "3.1 % higher than x", "the same as x"]
        );
    }

    #[test]
    fn passkeys_lie_depth_down_and_length_across() {
        let cell = |length, depth, accuracy| json!({"length": length, "depth": depth, "accuracy": accuracy});
        let text = passkey(&json!({
            "lengths": [512, 2048], "depths": [0.0, 0.5], "trials": 4, "accuracy": 0.75, "attention": "dense",
            "rope": "none", "scoring": "greedy",
            "cells": [cell(512, 0.0, 1.0), cell(512, 0.5, 0.75), cell(2048, 0.0, 0.25)],
        }));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "Keys found, of 4 each:");
        assert_eq!(lines[2], "  depth / tokens     512   2,048");
        assert_eq!(lines[3], "  0                100 %    25 %");
        assert_eq!(lines[4], "  0.5               75 %       -");
        assert_eq!(lines[6..], ["  75.0 % in all", "  attention: dense; positions: none; scoring: greedy"]);
    }

    #[test]
    fn a_gap_has_its_sign() {
        let of = |perplexity, attention: &str| json!({"perplexity": perplexity, "attention": attention, "tokens": 4096});
        let text = gap(&json!({
            "rope": "none", "scoring": "strided",
            "results": [{"context": 1024, "dense": of(20.0, "dense"), "sparse": of(20.5, "s2 (group 256)"), "gap": 0.025}],
        }));
        assert!(
            text.contains("1,024     20.00    20.50   +2.50 %     s2 (group 256)           4,096"),
            "{text}"
        );
    }

    fn summary(base: [f64; 2], interpolated: [f64; 2], adapted: [f64; 2]) -> Value {
        let by = |v: [f64; 2]| json!({ "256": v[0], "1024": v[1] });
        json!({
            "context": 1024, "steps": 100, "base": { "context": 256 },
            "perplexity": { "base": by(base), "interpolated": by(interpolated), "adapted": by(adapted) }
        })
    }

    #[test]
    fn a_verdict_follows_the_numbers() {
        let good = verdict(&summary([20.0, 900.0], [25.0, 30.0], [20.5, 18.0]));
        assert!(good[0].contains("lost beyond them: perplexity 900.0 at 1024, 20.00 at 256"), "{good:?}");
        assert!(good[1].contains("97 % lower than the base model"), "{good:?}");
        assert!(
            good[2].contains("40 % lower than interpolation alone; at 256 tokens 2.5 % higher"),
            "{good:?}"
        );
        let bad = verdict(&summary([20.0, 20.0], [25.0, 30.0], [20.0, 33.0]));
        assert!(!bad[0].contains("lost"), "{bad:?}");
        assert!(bad[1].contains("50 % higher"), "{bad:?}");
        assert!(
            bad[2].contains("10 % higher than interpolation alone; at 256 tokens the same as"),
            "{bad:?}"
        );
        assert!(verdict(&json!({})).is_empty());
    }

    #[test]
    fn the_three_models_stand_side_by_side_by_length() {
        let text = three_models(&summary([20.0, 900.0], [25.0, 30.0], [20.5, 18.0]));
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[1].trim_start().starts_with("256") && lines[2].trim_start().starts_with("1,024"),
            "{text}"
        );
        assert!(lines[2].ends_with("18.00"), "{text}");
    }
}
