//! perturb.cu against w + RN(scale z), bit for bit.

use temper::numerics::generator;

use crate::host::{self, LAUNCHES};
use crate::support::{Lcg, assert_bits};

#[test]
fn the_product_is_rounded_then_the_sum() {
    for (rows, cols) in [(1, 1), (1, 63), (4, 64), (3, 129), (17, 200)] {
        let mut rng = Lcg(cols as u64);
        let w: Vec<f32> = (0..rows * cols).map(|_| 1.0 + rng.value() * 0.01).collect();
        let tokens: Vec<u64> = (0..rows as u64).map(|r| 7 << 32 | r).collect();
        for scale in [1e-2f32, 1e-5, 0.0] {
            let definition = |(i, &w): (usize, &f32)| {
                let z = generator::normal(42, 0x4000_0003, tokens[i / cols], (i % cols) as u32);
                w + scale * z
            };
            let expected: Vec<f32> = w.iter().enumerate().map(definition).collect();
            for launch in LAUNCHES {
                let found = host::perturb_f32(launch, &w, &tokens, cols, scale, 42, 0x4000_0003);
                assert_bits(&found, &expected, &format!("[{rows}, {cols}] scale {scale} {launch:?}"));
            }
        }
    }
}
