//! Standard normals in bulk, bitwise equal to `numerics::generator::normal`: AVX2 where the CPU has it, else a table.
//!
//! The unit of work is one 64-column block of one token: 4 Philox calls of 16 values. Both versions use that a table
//! digit is odd(n) = 2 e + 1 with e in i8, so 6 odd(l) + 5 odd(h) = 2 (6 e_l + 5 e_h) + 11, and S = sum over k, i of
//! w (6 e_l + 5 e_h) + 11/2 sum w, whose last term vanishes except in row r = 0, where it is 22 sum_i COEF[v][i] BASE[i^v].
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use super::normals_avx2;
use crate::numerics::generator::{BASE, COEF, COLUMN_BLOCK, TABLE_HIGH, TABLE_LOW, odd};
use crate::numerics::philox::philox4x32_7;

pub use super::path::Path;

/// Fills `out` with the normals of columns 0..out.len() of one token.
pub fn normals_into(seed: u64, stream: u32, token: u64, out: &mut [f32]) {
    normals_into_by(Path::best(), seed, stream, token, out);
}

/// `normals_into` by a chosen implementation, or the fastest below it that the CPU has.
pub fn normals_into_by(path: Path, seed: u64, stream: u32, token: u64, out: &mut [f32]) {
    let whole = out.len() / COLUMN_BLOCK * COLUMN_BLOCK;
    let (blocks, tail) = out.split_at_mut(whole);
    fill_blocks(path, seed, stream, &|unit| (token, unit as u32), blocks);
    if !tail.is_empty() {
        let mut last = [0f32; COLUMN_BLOCK];
        fill_blocks(path, seed, stream, &|_| (token, (whole / COLUMN_BLOCK) as u32), &mut last);
        tail.copy_from_slice(&last[..tail.len()]);
    }
}

/// Fills `out` [units, 64]: unit u holds the columns of block `key(u).1` of token `key(u).0`.
pub(super) fn fill_blocks(path: Path, seed: u64, stream: u32, key: &dyn Fn(usize) -> (u64, u32), out: &mut [f32]) {
    debug_assert_eq!(out.len() % COLUMN_BLOCK, 0);
    #[cfg(target_arch = "x86_64")]
    if path.or_below() >= Path::Avx2 {
        // Twice as wide, with AVX-512, was no faster where it was measured (Zen 4).
        // SAFETY: or_below gives a path only where the CPU has its instructions.
        return unsafe { normals_avx2::fill_blocks(seed, stream, key, out) };
    }
    let _ = path;
    for (unit, block) in out.as_chunks_mut::<COLUMN_BLOCK>().0.iter_mut().enumerate() {
        let (token, index) = key(unit);
        portable_block(seed, stream, token, index, block);
    }
}

/// e of a table digit: odd = 2 e + 1.
pub(super) const fn half_digit(table: &[i32; 4], nibble: u32) -> i32 {
    (odd(table, nibble) - 1) / 2
}

/// 11/2 sum of the weights of row 0, by v.
pub(super) const ROW_ZERO_OFFSET: [i32; 4] = {
    let mut offset = [0; 4];
    let mut v = 0;
    while v < 4 {
        let mut i = 0;
        while i < 4 {
            offset[v] += 22 * COEF[v][i] * BASE[i ^ v];
            i += 1;
        }
        v += 1;
    }
    offset
};

/// For each byte of a word, by its value: sum over its two nibbles of COEF BASE (6 e_l or 5 e_h), for v = 0..3.
static BYTE_SUMS: [[[i32; 4]; 256]; 4] = byte_sums();

const fn byte_sums() -> [[[i32; 4]; 256]; 4] {
    let mut sums = [[[0; 4]; 256]; 4];
    let mut byte = 0;
    while byte < 4 {
        let (table, factor) = if byte < 2 { (&TABLE_LOW, 6) } else { (&TABLE_HIGH, 5) };
        let mut value = 0;
        while value < 256 {
            let mut v = 0;
            while v < 4 {
                let i = 2 * (byte % 2);
                let first = COEF[v][i] * BASE[i ^ v] * half_digit(table, value as u32 & 15);
                let second = COEF[v][i + 1] * BASE[(i + 1) ^ v] * half_digit(table, value as u32 >> 4);
                sums[byte][value][v] = factor * (first + second);
                v += 1;
            }
            value += 1;
        }
        byte += 1;
    }
    sums
}

fn portable_block(seed: u64, stream: u32, token: u64, block: u32, out: &mut [f32; COLUMN_BLOCK]) {
    for q in 0..4 {
        let counter = [4 * block + q, stream, token as u32, (token >> 32) as u32];
        let x = philox4x32_7([seed as u32, (seed >> 32) as u32], counter);
        let p = x.map(word_sums); // [k][v]
        for v in 0..4 {
            let (a, b, c, d) = (p[0][v], p[1][v], p[2][v], p[3][v]);
            let s = [(a + b) + (c + d) + ROW_ZERO_OFFSET[v], (a - b) + (c - d), (a + b) - (c + d), (b - a) + (c - d)];
            for (r, s) in s.into_iter().enumerate() {
                let j = 4 * v + r;
                out[8 * (j / 2) + 2 * q as usize + j % 2] = s as f32 * (1.0 / 32768.0);
            }
        }
    }
}

fn word_sums(word: u32) -> [i32; 4] {
    let bytes = word.to_le_bytes();
    let t = [0, 1, 2, 3].map(|b| &BYTE_SUMS[b][bytes[b] as usize]);
    [0, 1, 2, 3].map(|v| (t[0][v] + t[1][v]) + (t[2][v] + t[3][v]))
}
