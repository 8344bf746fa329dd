//! The host's callbacks: what the plugin tells becomes a progress bar, plain lines or JSON lines; Ctrl-C becomes
//! `cancelled`.
//!
//! A bar needs a terminal on stderr. Otherwise a line is printed at most every few seconds, so that a log file stays
//! readable. Everything here goes to stderr; stdout belongs to the result.

use crate::tables::{duration, perplexity};
use indicatif::{ProgressBar, ProgressStyle};
use megacontext_lora_abi::Host;
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// At most one plain progress line in this time.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Set by the first Ctrl-C.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on the first Ctrl-C asks the job to stop in good order, the second ends the process.
pub fn catch_interrupts() {
    let handler = || {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        eprintln!("\ninterrupted: stopping after this step (again to stop at once)");
    };
    // If another handler is there already, the default stays: the process ends.
    let _ = ctrlc::set_handler(handler);
}

enum Style {
    Bar(ProgressBar),
    Lines(Mutex<Option<Instant>>),
    Json,
}

/// What mclora is to the plugin.
pub struct Reporter {
    style: Style,
    /// What was said of the device; a sweep's runs would say the same again.
    device: Mutex<String>,
}

impl Reporter {
    /// JSON lines if asked for, else a bar on a terminal, else plain lines.
    pub fn new(json: bool) -> Self {
        let style = if json {
            Style::Json
        } else if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(Duration::from_millis(120));
            Style::Bar(bar)
        } else {
            Style::Lines(Mutex::new(None))
        };
        Self { style, device: Mutex::default() }
    }

    fn say(&self, text: &str) {
        match &self.style {
            Style::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            Style::Lines(_) | Style::Json => eprintln!("{text}"),
        }
    }

    fn device(&self, text: &str) {
        let mut said = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        if !text.is_empty() && *said != text {
            self.say(text);
            text.clone_into(&mut said);
        }
    }

    fn progress(&self, event: &Value) {
        let (step, steps) = (event["step"].as_u64().unwrap_or(0), event["steps"].as_u64().unwrap_or(0));
        match &self.style {
            Style::Bar(bar) => {
                if bar.length() != Some(steps) {
                    bar.set_length(steps);
                    if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}") {
                        bar.set_style(style);
                    }
                }
                bar.set_position(step);
                bar.set_message(status(event));
                if step == steps {
                    // What follows has no steps: back to a spinner, with the numbers left standing above it.
                    bar.suspend(|| eprintln!("step {step}/{steps}  {}", status(event)));
                    bar.set_message("");
                    bar.set_style(ProgressStyle::default_spinner());
                }
            }
            Style::Lines(last) => {
                let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                if step == steps || last.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
                    *last = Some(Instant::now());
                    eprintln!("step {step}/{steps}  {}", status(event));
                }
            }
            Style::Json => {}
        }
    }
}

/// The numbers of a progress event on one line.
fn status(event: &Value) -> String {
    let mut parts = Vec::new();
    if let Some(rank) = event["rank"].as_u64() {
        parts.push(format!("rank {rank}"));
    }
    if let (Some(stage), Some(stages @ 2..)) = (event["stage"].as_u64(), event["stages"].as_u64()) {
        parts.push(format!("stage {stage}/{stages}"));
    }
    if let (Some(phase), Some(cycle)) = (event["phase"].as_str(), event["cycle"].as_u64()) {
        parts.push(if cycle == 0 { phase.to_string() } else { format!("cycle {cycle} {phase}") });
    }
    if event["labels"].is_u64() {
        parts.push("making labels".to_string());
    }
    if let Some(context) = event["context"].as_u64() {
        parts.push(format!("context {context}"));
    }
    if let Some(depth) = event["depth"].as_f64() {
        parts.push(format!("depth {depth}"));
    }
    if let Some(loss) = event["loss"].as_f64() {
        parts.push(format!("loss {loss:.3}"));
    }
    if let (Some(delta), Some(horizon)) = (event["delta_nll"].as_f64(), event["horizon"].as_u64()) {
        parts.push(format!("ΔNLL@{horizon} {delta:.3}"));
    }
    if let Some(speed) = event["blocks_per_s"].as_f64() {
        parts.push(format!("{speed:.0} blocks/s"));
    }
    if let Some(speed) = event["tokens_per_s"].as_f64() {
        parts.push(format!("{speed:.0} tokens/s"));
    }
    if let Some(left) = event["eta_s"].as_f64() {
        parts.push(format!("{} left", duration(left)));
    }
    parts.join("  ")
}

/// An evaluation event on one line.
fn evaluation(event: &Value) -> String {
    let model = event["model"].as_str().map_or(String::new(), |m| format!("{m:<13} "));
    format!(
        "  {model}context {:>6}  {:<16} perplexity {}",
        event["context"].as_u64().unwrap_or(0),
        event["attention"].as_str().unwrap_or(""),
        event["perplexity"].as_f64().map_or("?".into(), perplexity)
    )
}

impl Host for Reporter {
    fn event(&self, kind: &str, json: &str) {
        let Ok(event) = serde_json::from_str::<Value>(json) else { return };
        if matches!(self.style, Style::Json) {
            return eprintln!("{}", json!({ "event": kind, "data": event }));
        }
        match kind {
            "progress" => self.progress(&event),
            "evaluation" => match event["text"].as_str() {
                Some(text) => self.say(text),
                None => self.say(&evaluation(&event)),
            },
            "device" => self.device(event["text"].as_str().unwrap_or_default()),
            "log" => self.say(event["message"].as_str().unwrap_or_default()),
            "plan" | "cell" | "validation" | "phase" => self.say(event["text"].as_str().unwrap_or_default()),
            // Checkpoints show in the run folder; what a later plugin may tell besides is not for this host.
            _ => {}
        }
    }

    fn cancelled(&self) -> bool {
        INTERRUPTED.load(Ordering::SeqCst)
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        if let Style::Bar(bar) = &self.style {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_says_what_it_knows() {
        let event = json!({
            "stage": 1, "stages": 2, "context": 512, "loss": 2.71049, "tokens_per_s": 1234.5, "eta_s": 75.0
        });
        assert_eq!(status(&event), "stage 1/2  context 512  loss 2.710  1234 tokens/s  1 min 15 s left");
        assert_eq!(status(&json!({ "stage": 1, "stages": 1 })), "");
        assert_eq!(status(&json!({ "rank": 8, "context": 512 })), "rank 8  context 512");
    }

    #[test]
    fn an_evaluation_line_names_the_model() {
        let event = json!({ "model": "base", "context": 1024, "attention": "dense", "perplexity": 12.345 });
        assert_eq!(evaluation(&event), "  base          context   1024  dense            perplexity 12.35");
    }
}
