//! Codes, scales and values of compressed-tensors and torchao, element codes of ml_dtypes and torch, on fresh random
//! inputs. Everything must be equal but what quantizer_quirks.rs names; the agreement is printed as counts.
//!
//! TEMPER_ORACLE_SEED repeats the inputs of a run.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::SystemTime;

use half::bf16;
use temper::model::checkpoint::{Checkpoint, StoredDtype, TensorBytes, TensorSpec, write_safetensors};
use temper::numerics::block_format::fake_quant;
use temper::numerics::format::{Family, Format};
use temper::numerics::{e2m1, e4m3, e8m0};

use crate::expected::{python, python_has, scratch};
use crate::quantizer_inputs::{COLS, Input, ROWS, codec_values, inputs};
use crate::quantizer_quirks::{Block, of_block, of_element};

/// A library's rule, the format that it is, and whether it is compared on moderate finite inputs alone (see `Input`).
const RULES: [(&str, &str, bool); 14] = [
    ("torchao.mxfp4_floor", "mxfp4", false),
    ("torchao.mxfp4_even", "mxfp4:even", false),
    ("torchao.mxfp4_rceil", "mxfp4:rceil", false),
    ("torchao.mxfp8_floor", "mxfp8", false),
    ("torchao.mxfp8_even", "mxfp8:even", false),
    ("torchao.mxfp8_rceil", "mxfp8:rceil", false),
    ("compressed_tensors.mxfp4", "mxfp4:even", false),
    ("compressed_tensors.mxfp8", "mxfp8:even", false),
    ("torchao.fp8_row", "fp8", true),
    ("torchao.fp8_tensor", "fp8:tensor", true),
    ("compressed_tensors.fp8_row", "fp8", true),
    ("compressed_tensors.fp8_tensor", "fp8:tensor", true),
    ("torchao.nvfp4", "nvfp4", true),
    ("compressed_tensors.nvfp4", "nvfp4", true),
];

/// Elements of one rule over all inputs.
#[derive(Default)]
struct Agreement {
    equal: usize,
    /// Under a quirk's condition, and how many of those differ.
    quirks: BTreeMap<&'static str, (usize, usize)>,
    unexpected: usize,
    example: Option<String>,
}

fn seed() -> u64 {
    let given =
        std::env::var("TEMPER_ORACLE_SEED").ok().map(|text| text.parse().expect("TEMPER_ORACLE_SEED: a number"));
    given.unwrap_or_else(|| SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64)
}

/// What the libraries make of `inputs` and `codec`; None, and a line that says why, without them.
fn libraries(inputs: &[Input], codec: &[f32]) -> Option<Checkpoint> {
    if let Err(reason) = python_has("torch, ml_dtypes, compressed_tensors, torchao, safetensors") {
        println!("skipped: {reason}");
        return None;
    }
    let dir = scratch("oracle_quantizers");
    let (source, target) = (dir.join("in.safetensors"), dir.join("out.safetensors"));
    let f32_bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut tensors = vec![TensorBytes {
        spec: TensorSpec::new("codec", StoredDtype::F32, &[codec.len()]),
        data: Cow::Owned(f32_bytes(codec)),
    }];
    for input in inputs {
        let (dtype, data) = match input.is_bf16 {
            true => (StoredDtype::BF16, input.values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()),
            false => (StoredDtype::F32, f32_bytes(&input.values)),
        };
        let spec = TensorSpec::new(input.name.as_str(), dtype, &[ROWS, COLS]);
        tensors.push(TensorBytes { spec, data: Cow::Owned(data) });
    }
    write_safetensors(&source, &tensors).unwrap();
    let output = python("quantize.py", &[source.to_str().unwrap(), target.to_str().unwrap()]);
    assert!(output.status.success(), "quantize.py failed: {}", String::from_utf8_lossy(&output.stderr));
    Some(Checkpoint::open(&target).unwrap())
}

#[test]
fn quantizers_agree_with_the_libraries() {
    let seed = seed();
    let (inputs, codec) = (inputs(seed), codec_values(seed));
    let Some(found) = libraries(&inputs, &codec) else { return };
    println!("inputs of TEMPER_ORACLE_SEED={seed}");
    compare_codecs(&found, &codec);
    let mut unexpected = Vec::new();
    for (rule, format, moderate) in RULES {
        let mut agreement = Agreement::default();
        for input in inputs.iter().filter(|input| !moderate || (input.moderate && input.finite)) {
            compare(&found, input, rule, format.parse().unwrap(), &mut agreement);
        }
        let Agreement { equal, quirks, unexpected: count, example } = agreement;
        println!("{rule} = {format}: {equal} elements equal, {count} differ");
        for (quirk, (under, differ)) in quirks {
            println!("    quirk: {quirk}: {differ} of {under} elements differ");
        }
        unexpected.extend(example);
    }
    assert!(unexpected.is_empty(), "TEMPER_ORACLE_SEED={seed}\n{}", unexpected.join("\n"));
}

/// Element codecs on one value after the other, and E8M0 on every byte.
fn compare_codecs(found: &Checkpoint, codec: &[f32]) {
    type Rule = (&'static str, fn(f32) -> f32);
    let rules: [Rule; 3] = [
        ("ml_dtypes.e2m1", |x| e2m1::decode(e2m1::encode(x))),
        ("ml_dtypes.e4m3", |x| e4m3::decode(e4m3::encode(x))),
        ("torch.e4m3", |x| e4m3::decode(e4m3::encode(x))),
    ];
    for (rule, ours) in rules {
        let theirs = found.tensor_f32(&format!("codec/{rule}")).unwrap();
        let mut quirks = 0;
        for (&x, &theirs) in codec.iter().zip(&theirs) {
            let ours = ours(x);
            if rule == "ml_dtypes.e2m1" && x.is_nan() {
                // E2M1 has no NaN: PTX gives +6, as numerics.md says.
                assert_eq!(theirs, 0.0);
                quirks += 1;
                continue;
            }
            let same = ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan());
            assert!(same, "{rule}: {x:e} is {theirs}, ours {ours}");
        }
        println!("{rule}: {} values equal, signs of zero included; {quirks} NaN became 0", theirs.len() - quirks);
    }
    for rule in ["ml_dtypes.e8m0_values", "torch.e8m0_values"] {
        for (byte, theirs) in found.tensor_f32(&format!("codec/{rule}")).unwrap().into_iter().enumerate() {
            let ours = e8m0::decode(byte as u8);
            assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "{rule}: byte {byte}");
        }
        println!("{rule}: 256 bytes equal");
    }
}

fn compare(found: &Checkpoint, input: &Input, rule: &str, format: Format, agreement: &mut Agreement) {
    let read = |part: &str| found.tensor_f32(&format!("{}/{rule}.{part}", input.name)).unwrap();
    let (elements, scales, dq) = (read("elements"), read("scales"), read("dq"));
    let ours = fake_quant(&input.values, ROWS, COLS, format);
    let (size, blocks) = (format.block_size(COLS), format.blocks_per_row(COLS));
    let nvfp4 = matches!(format.family, Family::Nvfp4 { .. });
    let per_tensor = format.family == Family::Fp8 { per_tensor: true };
    for (index, values) in input.values.chunks(size).enumerate() {
        let byte = ours.block_scales.get(index).copied();
        let scale = match byte {
            Some(byte) if nvfp4 => e4m3::decode(byte),
            Some(byte) => e8m0::decode(byte),
            None => ours.fp8_scales[index],
        };
        let their_scale = if per_tensor { scales[0] } else { scales[index] };
        // What shares a scale decides whether it is a quirk's.
        let shared = if per_tensor { &input.values } else { values };
        let block = Block { values: shared, byte, tensor_encode_scale: ours.tensor_encode_scale };
        let block_quirk = of_block(rule, format, &block);
        for (i, &x) in values.iter().enumerate() {
            let at = index * size + i;
            let value = format.decode_element(ours.codes[at]);
            // The sign of zero is not part of it. nvfp4's factors of y are multiplied in another order.
            let same_y = match nvfp4 {
                true => (ours.dequantized[at] - dq[at]).abs() <= 4.0 * f32::EPSILON * dq[at].abs(),
                false if format.has_e4m3_elements() && byte.is_none() => equal(ours.dequantized[at], dq[at]),
                false => equal(input.round(ours.dequantized[at]), dq[at]),
            };
            // A NaN block is one by its scale or its values; what its codes are is nobody's business.
            let nan = ours.dequantized[at].is_nan() && dq[at].is_nan();
            let same = nan || (equal(value, elements[at]) && equal(scale, their_scale) && same_y);
            match block_quirk.or_else(|| of_element(rule, x, &block)) {
                Some(quirk) => {
                    let (under, differ) = agreement.quirks.entry(quirk).or_default();
                    *under += 1;
                    *differ += usize::from(!same);
                }
                None if same => agreement.equal += 1,
                None => {
                    agreement.unexpected += 1;
                    agreement.example.get_or_insert(format!(
                        "{} {rule}: row {} block {} element {i} x {x:e} ({:#x}): code {value}, scale {scale:e}, y {:e}; \
                         theirs {}, {their_scale:e}, {:e}",
                        input.name,
                        index / blocks,
                        index % blocks,
                        x.to_bits(),
                        ours.dequantized[at],
                        elements[at],
                        dq[at]
                    ));
                }
            }
        }
    }
}

fn equal(a: f32, b: f32) -> bool {
    a == b || (a.is_nan() && b.is_nan())
}
