//! The GPU's benchmark on the host's build of the kernels: its calls are right, its rows say what they hold. No time of it
//! means anything here.

use std::time::Instant;

use temper::bench::cuda::{Cache, Formats, Model, Shapes, choices, rows};
use temper::bench::timing::Clock;
use temper::bench::{Options, Row};
use temper::ops::cpu::path::Path;
use temper::ops::cuda::matmul::{Layout, read_choices};

use crate::host::Shim;

const SHAPES: Shapes = Shapes {
    weights: &[((32, 64), Formats::All), ((16, 32), Formats::Weights)],
    products: &[(4, 64)],
    layer: &[(16, 32), (4, 32), (4, 32), (16, 32), (8, 16), (8, 16), (16, 16)],
    layers: 2,
    norms: (5, 64),
    models: &[Model { name: "tiny", linears: &[((24, 128), 2), ((128, 24), 1)], fused: &[(48, 128), (128, 128)] }],
    tokens: &[2, 70],
    square: 16,
    streams: &[(6, 64)],
    gates: &[(5, 72)],
    heads: &[(3, 4, 2, 16)],
    logits: &[(2, 70)],
    caches: &[Cache { rows: 2, heads: 4, kv_heads: 2, capacity: 40, dim: 64 }],
    rotated_bytes: 3 * 32 * 64 * 2,
};

const SMALL: Shapes = Shapes {
    models: &[Model { name: "tiny", linears: &[((24, 128), 1), ((128, 24), 1)], fused: &[(24, 128)] }],
    ..SHAPES
};

/// The wall's, for as few rounds as there can be.
struct Hasty;

impl Clock for Hasty {
    fn time_us(&self, work: &mut dyn FnMut() -> temper::Result<()>) -> temper::Result<f64> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed().as_secs_f64() * 1e6)
    }

    fn least_us(&self) -> f64 {
        0.0
    }

    fn seconds(&self) -> f64 {
        0.0
    }
}

fn measured(only: Option<&str>) -> Vec<Row> {
    let options = Options { path: Path::best(), only, progress: &|_| {} };
    rows(&Shim(0), &Hasty, &SHAPES, &options).unwrap()
}

#[test]
fn every_group_has_its_rows() {
    let mut rows = measured(None);
    // Of which other tests speak.
    rows.retain(|row| row.flops.is_none() && !SMALL_OPS.iter().any(|name| row.name.starts_with(name)));
    let count = |name: &str, dtype: &str| rows.iter().filter(|r| r.name.contains(name) && r.dtype == dtype).count();
    // 18 formats or outputs, the amax, a read and a copy; the second shape has four formats, in bf16 alone.
    assert_eq!((count("", "f16"), count("fake_quant", "f16")), (21, 18));
    assert_eq!(count("all linears", "bf16"), 4);
    assert_eq!(count("", "bf16"), 21 + 7 + 4);
    assert_eq!((count("noise", "f32 to bf16"), count("aqn", "f32")), (2, 1));
    let nvfp4 = rows.iter().find(|r| r.name == "fake_quant nvfp4" && r.dtype == "bf16").unwrap();
    assert_eq!(nvfp4.bytes, Some(3 * 32 * 64 * 2), "x twice and y");
    assert_eq!(nvfp4.baseline.as_deref(), Some("mxfp4"));
    assert!(nvfp4.copy_bandwidth_ratio.is_some() && nvfp4.torch_chain_ratio.is_some());
    let codes = rows.iter().find(|r| r.name == "fake_quant mxfp4 codes" && r.dtype == "bf16").unwrap();
    assert_eq!(codes.bytes, Some(32 * 64 * 2 + 32 * 64 / 2), "x, and half a byte an element");
}

#[test]
fn products_stand_beside_torchs_and_a_ceiling() {
    let rows = measured(Some("matmul"));
    let named = |name: &str| rows.iter().filter(|row| row.name == name).collect::<Vec<&Row>>();
    assert_eq!(named("torch matmul, square").len(), 1, "measured once");
    // Two shapes for two numbers of tokens; packed where k is a multiple of 128, backward above 64 tokens.
    for (name, count) in [
        ("torch linear forward, clean", 4),
        ("linear forward, noisy", 4),
        ("linear forward, clean", 4),
        ("linear mxfp4 weights, clean", 1),
        ("linear nvfp4 weights, noisy", 1),
        ("linear dX, noisy", 2),
        ("torch linear dW, clean", 2),
        ("layer of tiny forward, noisy", 1),
        ("layer of tiny dX and dW, noisy", 1),
        ("layer of tiny, decoding: linear nvfp4 weights, clean", 1),
    ] {
        assert_eq!(named(name).len(), count, "{name}");
    }
    assert!(rows.iter().all(|row| row.flops.is_some() && row.ceiling_ratio.is_some() != row.name.contains("square")));
    let noisy = named("linear forward, noisy")[0];
    assert_eq!(noisy.flops, Some(2.0 * (2 * 24 * 128) as f64));
    assert!(noisy.baseline_ratio.is_some() && noisy.torch_chain_ratio.is_some());
}

const SMALL_OPS: [&str; 5] = ["rms_norm", "swiglu", "rotary", "sample", "decode_attention"];

#[test]
fn small_operations_stand_beside_their_chains() {
    for (name, bytes) in [
        ("rms_norm of a sum", 4 * 2 * 6 * 64),
        ("rms_norm of a sum, backward", 4 * 2 * 6 * 64),
        ("swiglu", 3 * 2 * 5 * 72),
        ("swiglu, backward", 5 * 2 * 5 * 72),
        ("rotary", 2 * 2 * 3 * 6 * 16 + 2 * 4 * 3 * 16),
        ("sample", 4 * 2 * 70),
        ("decode_attention", 2 * 2 * 2 * 2 * 40 * 64),
    ] {
        let rows = measured(Some(name.split(',').next().unwrap()));
        let row = rows.iter().find(|row| row.name == name).unwrap();
        assert_eq!(row.bytes, Some(bytes), "{name}");
        assert!(row.torch_chain_ratio.is_some(), "{name}");
    }
}

#[test]
fn only_keeps_the_groups_that_contain_it() {
    assert!(measured(Some("aqn")).iter().all(|row| row.name.starts_with("aqn")));
    assert!(measured(Some("no such group")).is_empty());
}

#[test]
fn choices_are_found_for_every_product_and_can_be_read() {
    let options = Options { path: Path::best(), only: None, progress: &|_| {} };
    let found = choices(&Shim(0), &Hasty, &SMALL, &options).unwrap();
    let count = |layout: Layout| found.iter().filter(|c| c.layout == layout).count();
    // Two linears; with 70 tokens also their backward, with 2 tokens the one whose k is whole is packed.
    assert_eq!([Layout::Nt, Layout::Nn, Layout::Tn, Layout::NtMxfp4, Layout::NtNvfp4].map(count), [4, 2, 2, 1, 1]);
    let text = serde_json::to_string(&found).unwrap();
    assert_eq!(read_choices(&text).unwrap().len(), found.len());
}
