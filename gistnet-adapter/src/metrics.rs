//! How gists of a set of blocks lie to one another.
//!
//! Source: the metrics of MegaContext's documents. With u_n the gists at length 1:
//!   diversity     1 − mean over pairs of u_a·u_b: above 0.5 is healthy, below 0.3 all gists are about to be one;
//!   contrast gap  mean of 1 − u_a·u_b over all pairs, less the mean over pairs of neighbours: above 0.1 the gists of blocks
//!                 that follow one another are more alike than those of any two.
//! Where the documents draw random pairs, all pairs are taken here: that is what the draw estimates, and it costs no more,
//! since Σ_{a<b} u_a·u_b = (‖Σ u‖² − Σ ‖u‖²)/2.
//!
//! Shapes: gists [N, E], row-major. Everything in f64. Attention entropy, which needs the network, is
//! [`crate::GistNet::attention_entropy`].

/// Below this, gists are collapsing into one.
pub const COLLAPSE: f64 = 0.3;

/// The gists at length 1; one that is zero stays zero, at a right angle to all.
fn units(gists: &[f32], width: usize) -> Vec<Vec<f64>> {
    let unit = |gist: &[f32]| {
        let length = gist.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
        gist.iter().map(|v| f64::from(*v) * scale).collect()
    };
    gists.chunks_exact(width.max(1)).map(unit).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// 1 − the mean cosine of all pairs of gists `width` wide; none of fewer than two.
pub fn diversity(gists: &[f32], width: usize) -> Option<f64> {
    let units = units(gists, width);
    let n = units.len() as f64;
    let mut sum = vec![0f64; width];
    let mut own = 0.0;
    for unit in &units {
        sum.iter_mut().zip(unit).for_each(|(sum, value)| *sum += value);
        own += dot(unit, unit);
    }
    (units.len() > 1).then(|| 1.0 - (dot(&sum, &sum) - own) / (n * (n - 1.0)))
}

/// How much further apart any two gists are than neighbours, in 1 − cos; none without a pair of neighbours.
///
/// # Panics
/// When a pair names a gist that there is none of.
pub fn contrast_gap(gists: &[f32], width: usize, neighbours: &[[usize; 2]]) -> Option<f64> {
    let any = diversity(gists, width)?;
    let units = units(gists, width);
    let apart: f64 = neighbours.iter().map(|[a, b]| 1.0 - dot(&units[*a], &units[*b])).sum();
    (!neighbours.is_empty()).then(|| any - apart / neighbours.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_gists_have_no_diversity_and_orthogonal_ones_have_one() {
        assert!(diversity(&[1.0, 2.0, 3.0, 6.0, 0.5, 1.0], 2).unwrap().abs() < 1e-12);
        assert!((diversity(&[2.0, 0.0, 0.0, 5.0], 2).unwrap() - 1.0).abs() < 1e-12);
        assert!((diversity(&[2.0, 0.0, -3.0, 0.0], 2).unwrap() - 2.0).abs() < 1e-12);
    }

    #[test]
    fn diversity_is_the_mean_over_pairs() {
        let gists = [0.3, -1.0, 2.0, 0.7, 0.1, 0.9, -0.4, 1.5, 1.1, -0.2, 0.0, 0.6];
        let cosine = |a: usize, b: usize| {
            let side = |n: usize| gists[3 * n..3 * n + 3].iter().map(|v: &f32| f64::from(*v));
            let length = |n: usize| side(n).map(|v| v * v).sum::<f64>().sqrt();
            side(a).zip(side(b)).map(|(a, b)| a * b).sum::<f64>() / (length(a) * length(b))
        };
        let pairs: Vec<[usize; 2]> = (0..4).flat_map(|a| (a + 1..4).map(move |b| [a, b])).collect();
        let mean = pairs.iter().map(|[a, b]| 1.0 - cosine(*a, *b)).sum::<f64>() / 6.0;
        assert!((diversity(&gists, 3).unwrap() - mean).abs() < 1e-12);
        let next = (cosine(0, 1) + cosine(1, 2)) / 2.0;
        let gap = contrast_gap(&gists, 3, &[[0, 1], [1, 2]]).unwrap();
        assert!((gap - (mean - (1.0 - next))).abs() < 1e-12);
    }

    #[test]
    fn a_gist_of_zeros_is_at_a_right_angle_to_all() {
        assert!((diversity(&[0.0, 0.0, 1.0, 0.0], 2).unwrap() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn one_gist_and_no_neighbours_say_nothing() {
        assert!(diversity(&[1.0, 0.0], 2).is_none());
        assert!(contrast_gap(&[1.0, 0.0, 0.0, 1.0], 2, &[]).is_none());
    }
}
