//! The uniform bits of stochastic rounding in bulk, equal to `numerics::generator::uniform_u16` and `uniform_u8`.
//!
//! One Philox call gives the 8 half words (16 bytes) of 8 (16) consecutive columns, in the order in which its output
//! words lie in memory. Sixteen calls run side by side.

use super::path::for_each_path;
use crate::numerics::philox::{MULTIPLIERS, ROUNDS, WEYL};

/// Calls side by side.
const LANES: usize = 16;
/// Their output words.
const WORDS: usize = 4 * LANES;
/// The kinds of numerics.md section 4a, in the call word.
const U8: u32 = 1 << 29;
const U16: u32 = 2 << 29;

/// Whose bits.
#[derive(Clone, Copy)]
pub(super) struct Key {
    pub seed: u64,
    pub stream: u32,
    pub token: u64,
}

/// Sixteen bits for each column, times 2^-16 the uniform; of a U8 the lower eight are 0.
pub(super) trait Kind {
    /// Fills `out` for columns 0..out.len().
    fn fill(key: Key, out: &mut [u16]);
}

pub(super) struct HalfWords;
pub(super) struct Bytes;

impl Kind for HalfWords {
    #[inline(always)]
    fn fill(key: Key, out: &mut [u16]) {
        for (group, out) in out.chunks_mut(2 * WORDS).enumerate() {
            let words = philox(key, U16 | (group * LANES) as u32);
            let mut halves = [0; 2 * WORDS];
            for i in 0..WORDS {
                halves[2 * i] = words[i] as u16;
                halves[2 * i + 1] = (words[i] >> 16) as u16;
            }
            out.copy_from_slice(&halves[..out.len()]);
        }
    }
}

impl Kind for Bytes {
    #[inline(always)]
    fn fill(key: Key, out: &mut [u16]) {
        for (group, out) in out.chunks_mut(4 * WORDS).enumerate() {
            let words = philox(key, U8 | (group * LANES) as u32);
            let mut bytes = [0; 4 * WORDS];
            for i in 0..WORDS {
                for k in 0..4 {
                    bytes[4 * i + k] = (words[i] << (24 - 8 * k) >> 24 << 8) as u16;
                }
            }
            out.copy_from_slice(&bytes[..out.len()]);
        }
    }
}

for_each_path! {
    /// Fills `out` for columns 0..out.len().
    pub(super) fn fill<K: Kind>(key: Key, out: &mut [u16]) {
        K::fill(key, out)
    }
}

/// The output words of calls first .. first + 16, in order.
#[inline(always)]
fn philox(key: Key, first: u32) -> [u32; WORDS] {
    let mut k = [key.seed as u32, (key.seed >> 32) as u32];
    let mut c = [[0; LANES], [key.stream; LANES], [key.token as u32; LANES], [(key.token >> 32) as u32; LANES]];
    for (lane, call) in c[0].iter_mut().enumerate() {
        *call = first.wrapping_add(lane as u32);
    }
    for _ in 0..ROUNDS {
        let mut next = [[0; LANES]; 4];
        for l in 0..LANES {
            let p0 = (MULTIPLIERS[0] as u64).wrapping_mul(c[0][l] as u64);
            let p1 = (MULTIPLIERS[1] as u64).wrapping_mul(c[2][l] as u64);
            next[0][l] = (p1 >> 32) as u32 ^ c[1][l] ^ k[0];
            next[1][l] = p1 as u32;
            next[2][l] = (p0 >> 32) as u32 ^ c[3][l] ^ k[1];
            next[3][l] = p0 as u32;
        }
        c = next;
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
    }
    let mut words = [0; WORDS];
    for l in 0..LANES {
        for i in 0..4 {
            words[4 * l + i] = c[i][l];
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numerics::generator::{uniform_u8, uniform_u16};
    use crate::ops::cpu::path::Path;

    #[test]
    fn equal_to_the_definition() {
        let key = Key { seed: 0x0123_4567_89AB_CDEF, stream: 5 << 28 | 77, token: 0xFEDC_BA98_7654_3210 };
        for path in Path::ALL {
            for columns in [1, 7, 8, 127, 128, 129, 256, 1000] {
                let mut out = vec![0; columns];
                fill::<HalfWords>(path, key, &mut out);
                let expected = |n| uniform_u16(key.seed, key.stream, key.token, n);
                assert!(out.iter().zip(0..).all(|(&found, n)| found == expected(n)), "{path:?} {columns}");
                fill::<Bytes>(path, key, &mut out);
                let expected = |n| u16::from(uniform_u8(key.seed, key.stream, key.token, n)) << 8;
                assert!(out.iter().zip(0..).all(|(&found, n)| found == expected(n)), "{path:?} {columns}");
            }
        }
    }
}
