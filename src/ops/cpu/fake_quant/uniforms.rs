//! The random bits of a row in bulk: numerics::generator's uniform_u16, or uniform_u8 in the upper halves, of n = column.
//!
//! One Philox call gives 16 bytes, which are 8 uniforms of 16 bits or 16 of 8 bits in the order of n.
#![allow(unsafe_code)]

use super::rows::SEGMENT;
#[cfg(target_arch = "x86_64")]
use super::uniforms_x86;
use crate::numerics::block_format::RoundingDraw;
use crate::numerics::format::Rounding;
use crate::numerics::generator::philox4x32_7;
use crate::ops::cpu::path::Path;

/// A key, and the stream and the kind of uniform under it.
#[derive(Clone, Copy)]
pub(super) struct Calls {
    pub seed: u64,
    pub stream: u32,
    pub token: u64,
    /// The first call, with its kind << 29.
    pub first: u32,
}

/// u of `cols` columns of a row from column `col` on, in units of 2^-16; what follows them in `out` is overwritten. `row`:
/// its position among the keys. `col`: a multiple of 16. `out` [SEGMENT].
pub(super) fn fill(
    path: Path,
    draw: &RoundingDraw,
    rounding: Rounding,
    row: usize,
    col: usize,
    cols: usize,
    out: &mut [u16],
) {
    let (seed, stream, token) = (draw.seed, draw.stream, draw.row_keys[row]);
    let calls = |kind: u32, first: usize| Calls { seed, stream, token, first: first as u32 | kind << 29 };
    let whole = |halves: usize| halves.next_multiple_of(VECTORS);
    if rounding != Rounding::Stochastic8 {
        return words(path, calls(2, col / 8), &mut out[..whole(cols)]);
    }
    let (mut pairs, count) = ([0; SEGMENT / 2], whole(cols / 2));
    words(path, calls(1, col / 16), &mut pairs[..count]);
    // Lower byte first, each as the upper byte of a half.
    for (pair, out) in pairs[..count].iter().zip(out.as_chunks_mut::<2>().0) {
        *out = [pair << 8, pair & 0xFF00];
    }
}

/// A multiple of the halves that vectors make at a time, so that little is left to do one by one.
const VECTORS: usize = 384;

/// The words of calls `first`.. as halves, lower half first.
fn words(path: Path, calls: Calls, out: &mut [u16]) {
    let done = vector_words(path, calls, out);
    for (call, halves) in out[done..].chunks_mut(8).enumerate() {
        let number = calls.first.wrapping_add((done / 8 + call) as u32);
        let key = [calls.seed as u32, (calls.seed >> 32) as u32];
        let x = philox4x32_7(key, [number, calls.stream, calls.token as u32, (calls.token >> 32) as u32]);
        for (n, half) in halves.iter_mut().enumerate() {
            *half = (x[n / 2] >> (16 * (n % 2))) as u16;
        }
    }
}

/// What vectors can do of it: how many halves are done, a multiple of 8.
fn vector_words(path: Path, calls: Calls, out: &mut [u16]) -> usize {
    #[cfg(target_arch = "x86_64")]
    match path.or_below() {
        Path::Portable => {}
        // SAFETY: or_below gives a path only where the CPU has its instructions.
        Path::Avx2 => return unsafe { uniforms_x86::words_avx2(calls, out) },
        // SAFETY: as above.
        Path::Avx512 => return unsafe { uniforms_x86::words_avx512(calls, out) },
    }
    let _ = (path, calls, out);
    0
}
