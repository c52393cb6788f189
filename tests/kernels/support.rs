//! Inputs that can make a kernel fail, and comparison by bits.

use std::path::PathBuf;

use half::{bf16, f16};
use tch::{Device, Kind, Tensor};

/// A small generator of test inputs (64-bit LCG, upper bits); not the generator under test.
pub struct Lcg(pub u64);

impl Lcg {
    pub fn next_u32(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 32) as u32
    }

    /// Roughly normal: a sum of four uniforms in -1..1.
    pub fn value(&mut self) -> f32 {
        (0..4).map(|_| self.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0).sum()
    }
}

/// [rows, cols] with ordinary values, outliers, E2M1 ties at several scales, zeros of both signs, subnormals, the
/// largest floats and, where asked, NaN and infinities.
pub fn nasty(rows: usize, cols: usize, seed: u64, nonfinite: bool) -> Vec<f32> {
    let mut rng = Lcg(seed);
    let ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0, 0.5, 1.5, 3.0];
    let mut x: Vec<f32> = (0..rows * cols)
        .map(|i| match i / 16 % 9 {
            0 | 1 => rng.value() * 0.02,
            2 => ties[rng.next_u32() as usize % ties.len()] * if rng.next_u32() & 1 == 0 { 1.0 } else { -1.0 },
            3 => ties[rng.next_u32() as usize % ties.len()] / 64.0,
            4 => [0.0, -0.0][rng.next_u32() as usize % 2],
            5 => f32::from_bits(rng.next_u32() & 0x807F_FFFF),
            6 => rng.value() * 1e-30,
            7 => rng.value() * 10.0,
            _ => f32::from_bits(rng.next_u32() & 0xBFFF_FFFF),
        })
        .collect();
    if nonfinite {
        for (at, bad) in [(5, f32::NAN), (x.len() / 2, f32::INFINITY), (x.len() - 1, f32::NEG_INFINITY)] {
            x[at] = bad;
        }
    }
    x
}

/// Equal bits, where any NaN equals any NaN.
pub fn assert_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let same = f.to_bits() == e.to_bits() || (f.is_nan() && e.is_nan());
        assert!(same, "{what}: element {i}: found {f:e} ({:08x}), expected {e:e} ({:08x})", f.to_bits(), e.to_bits());
    }
}

/// x [rows, cols] as a tensor of a dtype: f32, bf16 or f16.
pub fn tensor(x: &[f32], rows: usize, cols: usize, kind: Kind) -> Tensor {
    assert_eq!(x.len(), rows * cols);
    Tensor::from_slice(x).view([rows as i64, cols as i64]).to_kind(kind)
}

/// The values of a tensor, read exactly.
pub fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor.to_device(Device::Cpu).to_kind(Kind::Float).flatten(0, -1)).unwrap()
}

/// Values after rounding to a dtype, by the half crate.
pub fn rounded(x: &[f32], kind: Kind) -> Vec<f32> {
    let round = |v: &f32| match kind {
        Kind::BFloat16 => bf16::from_f32(*v).to_f32(),
        Kind::Half => f16::from_f32(*v).to_f32(),
        _ => *v,
    };
    x.iter().map(round).collect()
}

/// A file of the shared test data, or None with a printed reason.
pub fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("TEMPER_SHARED")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let file = root.join(path);
    if !file.is_file() {
        println!("skipped: {} is absent", file.display());
        return None;
    }
    Some(file)
}
