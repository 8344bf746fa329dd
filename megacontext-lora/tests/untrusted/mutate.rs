//! Sound inputs made unsound: bits, cuts, splices, and numbers set to extremes, in binary and in text.

/// Numbers at which sizes, counts and offsets go wrong.
const EXTREMES: [u64; 16] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 40,
    1 << 53,
    1 << 60,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// What stands where a value of a text stood.
const TEXTS: [&str; 16] = [
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "\"é\"",
    "-1",
    "0",
    "0.5",
    "1e999",
    "-0.0",
    "nan",
    "1152921504606846976",
    "18446744073709551615",
    "18446744073709551616",
    "[[[[1]]]]",
];

/// One change: its kind, where, and with what.
pub type Change = (u8, u32, u64);

/// Applies changes in their order; `other` is what is spliced from.
pub fn mutated(mut bytes: Vec<u8>, changes: &[Change], other: &[u8]) -> Vec<u8> {
    for &(kind, at, value) in changes {
        let length = bytes.len();
        if length == 0 {
            return bytes;
        }
        let at = at as usize % length;
        let extreme = EXTREMES[value as usize % EXTREMES.len()];
        match kind % 11 {
            0 => bytes[at] ^= 1 << (value % 8),
            1 => bytes[at] = [0, 1, 0x20, 0x7f, 0x80, 0xff, b'"', b'{'][value as usize % 8],
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..(at + value as usize % 16).min(length))),
            4 => drop(bytes.splice(at..at, value.to_le_bytes())),
            5 => {
                let from = value as usize % (other.len() + 1);
                bytes.truncate(at);
                bytes.extend(&other[from..]);
            }
            6 => put(&mut bytes, at, &(extreme as u32).to_le_bytes()),
            7 => put(&mut bytes, at, &extreme.to_le_bytes()),
            8 => word(&mut bytes, at, &extreme.to_string()),
            9 => word(&mut bytes, at, TEXTS[value as usize % TEXTS.len()]),
            _ => {
                let again = bytes[at..(at + value as usize % 64).min(length)].to_vec();
                drop(bytes.splice(at..at, again));
            }
        }
    }
    bytes
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    let n = value.len().min(bytes.len() - at);
    bytes[at..at + n].copy_from_slice(&value[..n]);
}

/// Replaces the first number or word at or after a place.
fn word(bytes: &mut Vec<u8>, at: usize, text: &str) {
    let of_word = |b: &u8| b.is_ascii_alphanumeric() || b"_.+-".contains(b);
    let Some(start) = bytes[at..].iter().position(|b| b.is_ascii_digit() || of_word(b)).map(|n| at + n)
    else {
        return;
    };
    let end = bytes[start..].iter().position(|b| !of_word(b)).map_or(bytes.len(), |n| start + n);
    bytes.splice(start..end, text.bytes());
}
