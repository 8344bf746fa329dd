//! Scores that ask for nothing impossible, and for as much as they give.
//!
//! Source: MegaContext's LensNet at inference: a token cannot be expanded, an entry of the highest level not collapsed.
//! Expanding an entry of level at least 1 adds K − 1 entries; collapsing K siblings frees K − 1, so (K − 1)/K each.
//!
//! Shapes: one score and one level for each of W entries. Units: entries.

/// Lowers scores of tokens to 0 at most, and raises those of entries of level `max_lod` and above to 0 at least.
pub fn mask(scores: &mut [f32], lod: &[u8], max_lod: u8) {
    for (score, lod) in scores.iter_mut().zip(lod) {
        if *lod == 0 {
            *score = score.min(0.0);
        }
        if *lod >= max_lod {
            *score = score.max(0.0);
        }
    }
}

/// Entries that the scores would add and free if each were followed in part: Σ (K−1)·max(u, 0), Σ (K−1)/K·max(−u, 0).
pub fn demand(scores: &[f32], block: usize) -> [f64; 2] {
    let grows = (block - 1) as f64;
    let side = |sign: f32| scores.iter().map(|u| f64::from((sign * u).max(0.0))).sum::<f64>();
    [grows * side(1.0), grows / block as f64 * side(-1.0)]
}

/// Scales the heavier side down until as many entries are added as freed; nothing changes where one side is empty.
pub fn rebalance(scores: &mut [f32], block: usize) {
    let [added, freed] = demand(scores, block);
    if added <= 0.0 || freed <= 0.0 {
        return;
    }
    let [up, down] = [(freed / added).min(1.0) as f32, (added / freed).min(1.0) as f32];
    for score in scores {
        *score *= if *score > 0.0 { up } else { down };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_do_not_expand_and_the_highest_do_not_collapse() {
        let mut scores = [0.5, -0.5, 0.5, -0.5, 0.5, -0.5];
        mask(&mut scores, &[0, 0, 1, 1, 2, 2], 2);
        assert_eq!(scores, [0.0, -0.5, 0.5, -0.5, 0.5, 0.0]);
        // With tokens alone nothing can be done.
        let mut scores = [0.5, -0.5];
        mask(&mut scores, &[0, 0], 0);
        assert_eq!(scores, [0.0, 0.0]);
    }

    #[test]
    fn the_heavier_side_gives_way() {
        for scores in [[0.5f32, -0.1, -0.2, 0.9], [0.01, -0.9, -0.8, 0.02]] {
            let mut balanced = scores;
            rebalance(&mut balanced, 4);
            let [added, freed] = demand(&balanced, 4);
            assert!((added - freed).abs() < 1e-6, "{added} and {freed}");
            let [before, _] = demand(&scores, 4);
            assert!(added <= before + 1e-9);
            assert!(
                scores.iter().zip(&balanced).all(|(a, b)| a.signum() == b.signum() && b.abs() <= a.abs())
            );
        }
    }

    #[test]
    fn one_side_alone_stays() {
        let mut scores = [0.5, 0.25];
        rebalance(&mut scores, 4);
        assert_eq!(scores, [0.5, 0.25]);
    }
}
