//! Philox4x32 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11): a keyed bijection of a 128-bit
//! counter. temper uses 7 rounds, the fewest that pass BigCrush.

pub const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
pub const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
pub const ROUNDS: usize = 7;

/// Four output words for a key and a counter, by `ROUNDS` rounds.
#[inline]
pub fn philox4x32<const ROUNDS: usize>(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let (mut k, mut c) = (key, counter);
    for _ in 0..ROUNDS {
        let p0 = MULTIPLIERS[0] as u64 * c[0] as u64;
        let p1 = MULTIPLIERS[1] as u64 * c[2] as u64;
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
    }
    c
}

/// The generator's seven rounds.
#[inline]
pub fn philox4x32_7(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    philox4x32::<ROUNDS>(key, counter)
}
