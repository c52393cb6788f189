//! Normal values and uniform bits as pure functions of (seed, stream, token, column): numerics.md section 4a, the
//! definition. Frozen: changing a bit means a new `NOISE_VERSION`.
//!
//! Key = (seed lo, seed hi), counter = (call, stream, token lo, token hi), words x0..x3. One call gives 16 normals:
//! column c uses call 4 floor(c/64) + (floor(c/2) mod 4) and value j = 2 (floor(c/8) mod 8) + (c mod 2) of it, which
//! is how an mma accumulator lays out its columns. With v = floor(j/4), r = j mod 4 and the nibbles l = (x_k >> 4i) & 15,
//! h = (x_k >> (16 + 4i)) & 15:
//!
//!   S = 1/2 sum over k, i of ROW[r][k] COEF[v][i] BASE[i xor v] (6 odd(TL, l) + 5 odd(TH, h)),   z = S / 32768
//!
//! z is exact in f32: the 16 values are orthogonal integer combinations of 32 table digits whose distribution was
//! searched to match the normal law. Never take bits from z, nor use one (seed, stream, token) for two purposes.

pub use super::philox::philox4x32_7;

/// Stands in run.json.
pub const NOISE_VERSION: u32 = 1;

/// Normals that share a layout: columns come in blocks of this many.
pub const COLUMN_BLOCK: usize = 64;

pub const TABLE_LOW: [i32; 4] = [121, 29, 23, 17];
pub const TABLE_HIGH: [i32; 4] = [126, 118, 106, 82];
pub const BASE: [i32; 4] = [12, 17, 19, 20];
pub const COEF: [[i32; 4]; 4] = [[1, 1, 1, 1], [1, -1, 1, -1], [1, -1, -1, 1], [-1, -1, 1, 1]];
pub const ROW: [[i32; 4]; 4] = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [-1, 1, 1, -1]];

/// The standard normal value of a column.
pub fn normal(seed: u64, stream: u32, token: u64, column: u32) -> f32 {
    normal_integer(seed, stream, token, column) as f32 / 32768.0
}

/// S of a column: the normal value times 2^15.
pub fn normal_integer(seed: u64, stream: u32, token: u64, column: u32) -> i32 {
    let call = 4 * (column / 64) + (column / 2) % 4;
    let j = 2 * ((column / 8) % 8) + column % 2;
    combine(words(seed, stream, token, call), (j / 4) as usize, (j % 4) as usize)
}

/// Byte `n` of the uniform bytes under a key.
pub fn uniform_u8(seed: u64, stream: u32, token: u64, n: u32) -> u8 {
    let x = words(seed, stream, token, n >> 4 | 1 << 29);
    (x[(n >> 2 & 3) as usize] >> (8 * (n & 3))) as u8
}

/// Half word `n` of the uniform half words under a key.
pub fn uniform_u16(seed: u64, stream: u32, token: u64, n: u32) -> u16 {
    let x = words(seed, stream, token, n >> 3 | 2 << 29);
    (x[(n >> 1 & 3) as usize] >> (16 * (n & 1))) as u16
}

/// Word `n` of the uniform words under a key.
pub fn uniform_u32(seed: u64, stream: u32, token: u64, n: u32) -> u32 {
    words(seed, stream, token, n >> 2 | 3 << 29)[(n & 3) as usize]
}

/// Half word `n` in fragment order: a thread that holds columns 8i + 2q + {0,1} of a row draws from its own calls.
pub fn uniform_u16_fragment(seed: u64, stream: u32, token: u64, n: u32) -> u16 {
    let x = words(seed, stream, token, (4 * (n >> 5) + (n >> 1 & 3)) | 4 << 29);
    (x[(n >> 3 & 3) as usize] >> (16 * (n & 1))) as u16
}

/// The uniform of sampling, in [0, 1): word 0 with its upper 24 bits kept, times 2^-32.
pub fn uniform_f32(seed: u64, stream: u32, token: u64) -> f32 {
    (uniform_u32(seed, stream, token, 0) >> 8) as f32 / 16_777_216.0
}

fn words(seed: u64, stream: u32, token: u64, call: u32) -> [u32; 4] {
    philox4x32_7([seed as u32, (seed >> 32) as u32], [call, stream, token as u32, (token >> 32) as u32])
}

fn combine(x: [u32; 4], v: usize, r: usize) -> i32 {
    let mut sum = 0;
    for (k, word) in x.into_iter().enumerate() {
        for i in 0..4 {
            let (low, high) = (word >> (4 * i) & 15, word >> (16 + 4 * i) & 15);
            let weight = ROW[r][k] * COEF[v][i] * BASE[i ^ v];
            sum += weight * (6 * odd(&TABLE_LOW, low) + 5 * odd(&TABLE_HIGH, high));
        }
    }
    sum / 2 // even: each weight enters with an odd factor, and the weights of a row sum to an even number
}

/// +-(2d + 1), d = table[n mod 4] for n < 8 and 0 above, minus where bit 2 of n is set.
pub const fn odd(table: &[i32; 4], nibble: u32) -> i32 {
    let d = if nibble < 8 { table[(nibble & 3) as usize] } else { 0 };
    if nibble & 4 != 0 { -(2 * d + 1) } else { 2 * d + 1 }
}
