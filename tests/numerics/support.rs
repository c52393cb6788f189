//! Test data: the shared vectors, a cheap generator, and inputs that are able to fail.

pub use crate::random::Random;
use safetensors::{Dtype, SafeTensors};
use std::path::PathBuf;
pub use temper::numerics::format::SPELLINGS as FORMATS;

/// A file under ../shared (or $TEMPER_SHARED); prints why and gives None where it is absent.
pub fn shared(file: &str) -> Option<PathBuf> {
    let root = std::env::var_os("TEMPER_SHARED")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared"));
    let path = root.join(file);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {} is absent", path.display());
    None
}

/// A tensor of a safetensors file as f32 (exact from bf16).
pub fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap();
    match tensor.dtype() {
        Dtype::F32 => tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::BF16 => {
            let halves = tensor.data().as_chunks().0.iter();
            halves.map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
        }
        other => panic!("{name} is {other:?}"),
    }
}

impl Random {
    /// Values that hit ties, zeros of both signs, subnormals, outliers and scales far apart.
    pub fn nasty(&mut self) -> f32 {
        let sign = if self.next() & 1 == 0 { 1.0 } else { -1.0 };
        match self.below(12) {
            0 => 0.0 * sign,
            1 => f32::from_bits(self.below(1 << 23) as u32) * sign,
            2 => f32::MIN_POSITIVE * sign,
            3 => self.normal() * 1e3,
            4..=7 => {
                let ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0];
                ties[self.below(ties.len())] * sign
            }
            _ => self.normal(),
        }
    }
}
