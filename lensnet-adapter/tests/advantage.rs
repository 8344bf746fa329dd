//! Advantages against the original's, batch by batch.

// A test stops at the first thing that is not as it should be.
#![allow(clippy::unwrap_used)]

use lensnet_adapter::advantage::{Normaliser, advantages, loss_by_level, penalised};
use lensnet_adapter::metrics::{mean, quantile};
use serde_json::Value;

/// The original computes in f32.
const OFF: f64 = 2e-6;

fn numbers(of: &Value) -> Vec<f64> {
    of.as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect()
}

#[track_caller]
fn close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < OFF, "{found}, expected {expected}");
    }
}

/// Levels of the entries of a layout: gists at these positions, tokens between.
fn levels(layout: &Value, tokens: u64, block: u64) -> Vec<u8> {
    let gists: Vec<(u64, u8)> = layout
        .as_array()
        .unwrap()
        .iter()
        .map(|gist| (gist[0].as_u64().unwrap(), gist[1].as_u64().unwrap() as u8))
        .collect();
    let mut levels = Vec::new();
    let mut at = 0;
    while at < tokens {
        let lod = gists.iter().find(|(start, _)| *start == at).map_or(0, |(_, lod)| *lod);
        levels.push(lod);
        at += block.pow(u32::from(lod));
    }
    levels
}

#[test]
fn advantages_and_their_scale_equal_the_originals() {
    let path =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../integration-tests/fixtures/megacontext/advantage.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut normaliser = Normaliser { beta: golden["beta"].as_f64().unwrap(), ..Normaliser::default() };
    let count = |key: &str| golden[key].as_u64().unwrap();
    let layouts: Vec<Vec<u8>> = golden["layouts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layout| levels(layout, count("num_tokens"), count("block_size")))
        .collect();
    let layouts: Vec<&[u8]> = layouts.iter().map(Vec::as_slice).collect();
    for step in golden["steps"].as_array().unwrap() {
        let raw = numbers(&step["raw_losses"]);
        let baseline = raw[0];
        let losses = penalised(&raw, baseline, golden["gist_delta_weight"].as_f64().unwrap());
        close(&losses, &numbers(&step["token_loss_value"]));
        let found = advantages(&losses, baseline).unwrap();
        close(&found, &numbers(&step["adv_delta"]));
        // Its metrics are of the variants without the baseline.
        let others = &found[1..];
        let spread = mean(&others.iter().map(|a| (a - mean(others)).powi(2)).collect::<Vec<_>>()).sqrt();
        let metrics = [mean(others), quantile(others, 0.95).unwrap(), spread, mean(&losses)];
        let keys = ["adv_delta_mean", "adv_delta_p95", "adv_delta_std", "variant_loss_mean"];
        close(&metrics, &keys.map(|key| step[key].as_f64().unwrap()));
        close(&normaliser.normalise(&found), &numbers(&step["norm_adv_delta"]));
        let moments = ["ema_mean", "ema_var"].map(|key| step[key].as_f64().unwrap());
        close(&normaliser.moments.unwrap(), &moments);
        let by_level: Vec<f64> = loss_by_level(&losses, &layouts).into_iter().map(Option::unwrap).collect();
        close(&by_level, &["0", "1", "2"].map(|level| step["lod_metrics"][level].as_f64().unwrap()));
        for (level, key) in [(1, "1"), (2, "2")] {
            let delta = step["lod_delta_metrics"][key].as_f64().unwrap();
            close(&[by_level[level] - baseline], &[delta]);
        }
    }
}

#[test]
fn equal_advantages_are_not_blown_up() {
    let mut normaliser = Normaliser::default();
    assert!(normaliser.normalise(&[]).is_empty());
    assert_eq!(normaliser.moments, None);
    assert_eq!(normaliser.normalise(&[0.5, 0.5]), [0.0, 0.0]);
    // σ² is taken for 1e-6: μ = 0.9·0.5 + 0.1·0.5.
    let found = normaliser.normalise(&[0.501, 0.499]);
    assert!((found[0] - 1.0).abs() < 1e-6 && (found[1] + 1.0).abs() < 1e-6, "{found:?}");
}

#[test]
fn a_level_that_no_variant_has_loses_nothing_that_could_be_told() {
    assert_eq!(loss_by_level(&[1.0, 3.0], &[&[0, 2], &[0, 0]]), [Some(7.0 / 3.0), None, Some(1.0)]);
    assert!(loss_by_level(&[], &[]).is_empty());
}

#[test]
fn a_loss_that_is_no_number_is_refused() {
    let error = advantages(&[1.0, f64::NAN], 1.0).unwrap_err().to_string();
    assert_eq!(error, "loss of variant 1: expected a finite number, got NaN");
    let error = advantages(&[1.0], f64::INFINITY).unwrap_err().to_string();
    assert_eq!(error, "loss of the baseline: expected a finite number, got inf");
}
