//! The random bits of a row in bulk: numerics::generator's uniform_u16, or uniform_u8 in the upper halves, of n = column.
//!
//! One Philox call gives 16 bytes, which are 8 uniforms of 16 bits or 16 of 8 bits in the order of n.
#![allow(unsafe_code)]

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
    /// Kind << 29: or'ed into the number of a call.
    pub tag: u32,
}

/// u of every column of a row, in units of 2^-16. `row`: its position among the keys.
pub(super) fn fill(path: Path, draw: &RoundingDraw, rounding: Rounding, row: usize, out: &mut [u16]) {
    let calls = |kind: u32| Calls { seed: draw.seed, stream: draw.stream, token: draw.row_keys[row], tag: kind << 29 };
    if rounding != Rounding::Stochastic8 {
        return words(path, calls(2), out);
    }
    let mut pairs = vec![0; out.len().div_ceil(2)];
    words(path, calls(1), &mut pairs);
    for (out, pair) in out.chunks_mut(2).zip(pairs) {
        for (byte, u) in out.iter_mut().enumerate() {
            *u = if byte == 0 { pair << 8 } else { pair & 0xFF00 };
        }
    }
}

/// The words of calls 0, 1, ... as halves, lower half first.
fn words(path: Path, calls: Calls, out: &mut [u16]) {
    let done = vector_words(path, calls, out);
    for (call, halves) in out[done..].chunks_mut(8).enumerate() {
        let number = (done / 8 + call) as u32 | calls.tag;
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
