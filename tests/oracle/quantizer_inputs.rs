//! Fresh random matrices of all kinds for the quantizers, and every input worth encoding for the element codecs.

use half::bf16;

use crate::random::Random;

pub const ROWS: usize = 48;
pub const COLS: usize = 256;

fn finite_bits(random: &mut Random) -> f32 {
    let value = f32::from_bits(random.next() as u32);
    if value.is_finite() { value } else { 1.0 }
}

/// A matrix [ROWS, COLS].
pub struct Input {
    pub name: String,
    pub values: Vec<f32>,
    pub is_bf16: bool,
    /// Magnitudes that every library's scales hold: nvfp4 and fp8 are compared on these.
    pub moderate: bool,
    pub finite: bool,
}

impl Input {
    /// Rounds to the matrix's dtype.
    pub fn round(&self, v: f32) -> f32 {
        if self.is_bf16 { bf16::from_f32(v).to_f32() } else { v }
    }
}

/// Every kind in f32 and bf16.
pub fn inputs(seed: u64) -> Vec<Input> {
    let mut random = Random(seed);
    let mut all = Vec::new();
    type Kind = (&'static str, bool, fn(&mut Random, usize) -> f32);
    let kinds: [Kind; 8] = [
        ("normal", true, |random, _| random.normal()),
        ("heavy_tails", true, |random, _| (f64::from(random.normal()) / random.uniform().sqrt()) as f32),
        ("weights", true, |random, _| random.normal() * 0.02),
        // Row 7 is all zero.
        ("zeros_and_outliers", true, |random, i| match random.below(20) {
            0 if i / COLS != 7 => random.normal() * 100.0,
            n if n < 12 || i / 64 % 3 == 0 || i / COLS == 7 => [0.0, -0.0][n % 2],
            _ => random.normal(),
        }),
        ("ties", true, |random, i| tie(random) * 2f32.powi((i / 32 % 13) as i32 - 6)),
        ("bits", false, |random, _| finite_bits(random)),
        ("subnormal", false, |random, _| f32::from_bits(random.below(1 << 25) as u32 | (random.below(2) as u32) << 31)),
        ("nan_and_infinity", false, |random, _| match random.below(100) {
            0 => [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][random.below(3)],
            _ => random.normal(),
        }),
    ];
    for (kind, moderate, value) in kinds {
        let values: Vec<f32> = (0..ROWS * COLS).map(|i| value(&mut random, i)).collect();
        push(&mut all, kind, moderate, values);
    }
    push(&mut all, "amax_walk", false, amax_walk(&mut random));
    all
}

fn push(all: &mut Vec<Input>, kind: &str, moderate: bool, values: Vec<f32>) {
    for is_bf16 in [false, true] {
        let round = |v: &f32| if is_bf16 { bf16::from_f32(*v).to_f32() } else { *v };
        // f32's largest values round to infinity in bf16.
        let finite_round = |v: &f32| if v.is_finite() && !round(v).is_finite() { 1.0 } else { round(v) };
        let values: Vec<f32> = values.iter().map(finite_round).collect();
        let finite = values.iter().all(|v| v.is_finite());
        let name = format!("{kind}.{}", if is_bf16 { "bf16" } else { "f32" });
        all.push(Input { name, values, is_bf16, moderate, finite });
    }
}

/// On a tie of E2M1 or E4M3, or a place beside one.
fn tie(random: &mut Random) -> f32 {
    let ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 4.0, 1.0625, 5.75, 6.75];
    let value: f32 = ties[random.below(ties.len())];
    let value = match random.below(4) {
        0 => value.next_up(),
        1 => value.next_down(),
        _ => value,
    };
    if random.below(2) == 0 { value } else { -value }
}

/// Blocks of 32 whose amax has every exponent, and the mantissas at which the scale rules switch.
fn amax_walk(random: &mut Random) -> Vec<f32> {
    const MANTISSAS: [u32; 10] =
        [0, 1, 0x3F_FFFF, 0x40_0000, 0x40_0001, 0x5F_FFFF, 0x60_0000, 0x60_0001, 0x78_0000, 0x7F_FFFF];
    let blocks = (0..ROWS * COLS / 32).map(|_| {
        let (exponent, at) = (random.below(255) as u32, random.below(10));
        let amax = f32::from_bits(exponent << 23 | MANTISSAS[at]);
        let mut block: Vec<f32> = (0..32).map(|_| amax * (2.0 * random.uniform() - 1.0) as f32).collect();
        block[random.below(32)] = amax;
        block
    });
    blocks.flatten().collect()
}

/// Every bf16 value (NaN included), random f32 bits, and every E4M3 and E2M1 tie with its neighbours.
pub fn codec_values(seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    let mut values: Vec<f32> = (0..=u16::MAX).map(|bits| bf16::from_bits(bits).to_f32()).collect();
    values.extend((0..100_000).map(|_| finite_bits(&mut random)));
    values.extend((0..100_000).map(|_| random.normal() * 2f32.powi(random.below(16) as i32 - 8)));
    for byte in 0..0x7E {
        let tie = (temper::numerics::e4m3::decode(byte) + temper::numerics::e4m3::decode(byte + 1)) / 2.0;
        values.extend([tie, tie.next_up(), tie.next_down(), -tie]);
    }
    values
}
