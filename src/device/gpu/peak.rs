//! The dense bf16 rate of tensor cores by a card's name: the ceiling that a model's FLOP/s are a share of.
//!
//! NVIDIA's data sheets, without sparsity, f32 accumulation, at boost clock. A card that is not here has no ceiling:
//! a wrong one would be worse. A MIG slice has a part of its card's, so it has none either.

/// What the name (as NVML and CUDA write it) must contain, and TFLOP/s; the first that fits.
const DENSE_BF16_TFLOPS: [(&[&str], f64); 14] = [
    (&["B200"], 2250.0),
    (&["H200", "NVL"], 835.0),
    (&["H200"], 989.0),
    (&["H100", "PCIE"], 756.0),
    (&["H100", "NVL"], 835.0),
    (&["H100"], 989.0),
    (&["H800"], 989.0),
    (&["A100"], 312.0),
    (&["A800"], 312.0),
    (&["A30"], 165.0),
    (&["A10"], 125.0),
    (&["L40S"], 362.0),
    (&["L4"], 121.0),
    (&["RTX", "4090"], 165.2),
];

/// FLOP/s of products of dense bf16 matrices; None where the card's are not known.
pub fn dense_bf16_flop_per_s(name: &str) -> Option<f64> {
    let words: Vec<String> = name.split([' ', '-']).map(str::to_ascii_uppercase).collect();
    let has = |part: &&str| words.iter().any(|word| word == part);
    if has(&"MIG") {
        return None;
    }
    let found = DENSE_BF16_TFLOPS.iter().find(|(parts, _)| parts.iter().all(has));
    found.map(|(_, tflops)| tflops * 1e12)
}

#[cfg(test)]
mod tests {
    use super::dense_bf16_flop_per_s;

    #[test]
    fn names_as_nvml_writes_them() {
        for (name, tflops) in [
            ("NVIDIA A100-SXM4-80GB", Some(312.0)),
            ("NVIDIA A100 80GB PCIe", Some(312.0)),
            ("NVIDIA H100 80GB HBM3", Some(989.0)),
            ("NVIDIA H100 PCIe", Some(756.0)),
            ("NVIDIA H100 NVL", Some(835.0)),
            ("NVIDIA H200", Some(989.0)),
            ("NVIDIA H200 NVL", Some(835.0)),
            ("NVIDIA H20", None),
            ("NVIDIA L40S", Some(362.0)),
            ("NVIDIA L40", None),
            ("NVIDIA A10G", None),
            ("NVIDIA GeForce RTX 4090", Some(165.2)),
            ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
            ("Tesla V100-SXM2-16GB", None),
            ("cpu", None),
        ] {
            assert_eq!(dense_bf16_flop_per_s(name), tflops.map(|t| t * 1e12), "{name}");
        }
    }
}
