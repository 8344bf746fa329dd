//! Inputs of the benchmarks.

/// Values in [−1, 1), never zero for long: SplitMix64 (Steele, Lea, Flood 2014).
pub fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let value = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(value).take(len).collect()
}
