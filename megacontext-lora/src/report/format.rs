//! Numbers and text as the report shows them: few digits, units said, everything escaped.
//!
//! Left out on purpose: locales. Thousands are grouped by a comma, decimals follow a point, as in the rest of the project.

use std::fmt::Write;

/// Text as HTML: safe between tags and inside a quoted attribute.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// 1234567 as `1,234,567`.
pub(super) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// 1234567 as `1.23 M`; below ten thousand as it is.
pub(super) fn short_count(n: u64) -> String {
    let x = n as f64;
    match n {
        0..10_000 => count(n),
        10_000..1_000_000 => format!("{} k", three_digits(x / 1e3)),
        1_000_000..1_000_000_000 => format!("{} M", three_digits(x / 1e6)),
        _ => format!("{} G", three_digits(x / 1e9)),
    }
}

/// A context length, as an axis has room for it: `512`, `1,024`, `32k`.
pub(super) fn context(tokens: usize) -> String {
    if tokens >= 10_000 && tokens.is_multiple_of(1024) {
        format!("{}k", count((tokens / 1024) as u64))
    } else {
        count(tokens as u64)
    }
}

/// A perplexity.
pub(super) fn perplexity(x: f64) -> String {
    match x {
        x if !x.is_finite() => "not a number".into(),
        x if x >= 1e15 => format!("{x:.1e}"),
        x if x >= 1000.0 => count(x.round() as u64),
        x if x >= 100.0 => format!("{x:.1}"),
        x => format!("{x:.2}"),
    }
}

/// A relative change: 0.021 as `+2.1 %`, with a real minus sign.
pub(super) fn change(x: f64) -> String {
    if !x.is_finite() {
        return "not a number".into();
    }
    let tenths = (x * 1000.0).round() / 10.0;
    let sign = match tenths {
        t if t > 0.0 => "+",
        t if t < 0.0 => "\u{2212}",
        _ => "",
    };
    format!("{sign}{:.1}\u{a0}%", tenths.abs())
}

/// A share or a size of a change, without a sign: 0.304 as `30.4 %`.
pub(super) fn percent(x: f64) -> String {
    let digits = if x.abs() < 0.001 && x != 0.0 { 2 } else { 1 };
    format!("{:.digits$}\u{a0}%", x.abs() * 100.0)
}

/// Bytes as KiB, MiB or GiB.
pub(super) fn bytes(n: u64) -> String {
    let x = n as f64;
    match n {
        0..1024 => format!("{n} B"),
        1024..1_048_576 => format!("{} KiB", three_digits(x / 1024.0)),
        1_048_576..1_073_741_824 => format!("{} MiB", three_digits(x / 1_048_576.0)),
        _ => format!("{} GiB", three_digits(x / 1_073_741_824.0)),
    }
}

/// Seconds as `12.3 s`, `3 min 12 s` or `1 h 04 min`.
pub(super) fn seconds(x: f64) -> String {
    let whole = x.max(0.0).round() as u64;
    match x {
        x if !x.is_finite() => "an unknown time".into(),
        x if x < 10.0 => format!("{:.2} s", x.max(0.0)),
        x if x < 59.95 => format!("{x:.1} s"),
        x if x < 3599.5 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// A tick of an axis that steps by `step`: no more decimals than the step has.
pub(super) fn tick(x: f64, step: f64) -> String {
    if x.abs() >= 1000.0 && step >= 1.0 {
        return if x < 0.0 { format!("\u{2212}{}", count(-x as u64)) } else { count(x as u64) };
    }
    let digits = if step >= 1.0 || step <= 0.0 { 0 } else { (-step.log10()).ceil().min(6.0) as usize };
    format!("{x:.digits$}")
}

/// A learning rate: `2e-5`, `1.5e-3`.
pub(super) fn rate(x: f64) -> String {
    let text = format!("{x:.2e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    format!("{}e{exponent}", digits.trim_end_matches('0').trim_end_matches('.'))
}

/// An SVG coordinate, tenths of a unit.
pub(super) fn coordinate(out: &mut String, x: f64) {
    // Writing into a String cannot fail.
    let _ = write!(out, "{}", (x * 10.0).round() / 10.0);
}

fn three_digits(x: f64) -> String {
    match x {
        x if x >= 99.95 => format!("{x:.0}"),
        x if x >= 9.995 => format!("{x:.1}"),
        x => format!("{x:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_leave_its_place() {
        assert_eq!(escape("<a href=\"x\">&'\u{1}"), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;\u{fffd}");
    }

    #[test]
    fn numbers_have_few_digits() {
        assert_eq!([count(0), count(999), count(1_234_567)], ["0", "999", "1,234,567"]);
        assert_eq!(
            [short_count(9_999), short_count(12_345), short_count(4_200_000)],
            ["9,999", "12.3 k", "4.20 M"]
        );
        assert_eq!([context(1024), context(32768), context(10_000)], ["1,024", "32k", "10,000"]);
        assert_eq!([perplexity(12.345), perplexity(412.34), perplexity(2310.7)], ["12.35", "412.3", "2,311"]);
        assert_eq!(perplexity(f64::NAN), "not a number");
        assert_eq!(
            [change(0.0214), change(-0.3), change(0.0001)],
            ["+2.1\u{a0}%", "\u{2212}30.0\u{a0}%", "0.0\u{a0}%"]
        );
        assert_eq!([percent(0.5), percent(0.0004)], ["50.0\u{a0}%", "0.04\u{a0}%"]);
        assert_eq!([bytes(512), bytes(852_000_000), bytes(5 << 30)], ["512 B", "813 MiB", "5.00 GiB"]);
        assert_eq!([seconds(1.234), seconds(59.96), seconds(3840.0)], ["1.23 s", "1 min 00 s", "1 h 04 min"]);
        assert_eq!([tick(0.30000001, 0.1), tick(3.5, 0.5), tick(2000.0, 500.0)], ["0.3", "3.5", "2,000"]);
        assert_eq!([rate(2e-5), rate(0.0015), rate(0.0)], ["2e-5", "1.5e-3", "0e0"]);
    }
}
