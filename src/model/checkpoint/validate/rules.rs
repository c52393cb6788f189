//! The rules under which libraries make NVFP4 and MXFP4, applied to rows of blocks: x [n] -> codes and block scales.

use super::StoredDtype;
use crate::numerics::block_scale::{block_scales, nonfinite_byte, tensor_encode_scale};
use crate::numerics::compressed_tensors::{self, ScaleDtype};
use crate::numerics::format::{Family, Format, MxScaleRule};
use crate::numerics::packed::{PackedKind, StoredScale};
use crate::numerics::{e2m1, model_opt};

/// How block scales and codes follow from the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// temper's NVFP4, that of TransformerEngine: G = 2688 / A, S = e4m3(b (G/6)), x times 1 / (S (1/G)).
    TransformerEngine,
    /// compressed-tensors' NVFP4, its scales computed in this dtype.
    CompressedTensors(ScaleDtype),
    /// ModelOpt's NVFP4.
    ModelOpt,
    /// MXFP4 under a rule for the exponent; compressed-tensors' is `even`.
    Mxfp4(MxScaleRule),
}

impl Rule {
    /// The rules of a layout; those in a tensor's own dtype where it is not f32.
    pub fn of(kind: PackedKind, dtype: StoredDtype) -> Vec<Rule> {
        match (kind, dtype) {
            (PackedKind::Mxfp4, _) => {
                [MxScaleRule::Floor, MxScaleRule::Even, MxScaleRule::Rceil].map(Rule::Mxfp4).to_vec()
            }
            (PackedKind::Nvfp4, dtype) => {
                let own = match dtype {
                    StoredDtype::BF16 => Some(ScaleDtype::Bf16),
                    StoredDtype::F16 => Some(ScaleDtype::F16),
                    _ => None,
                };
                let in_dtypes = [ScaleDtype::F32].into_iter().chain(own).map(Rule::CompressedTensors);
                [Rule::TransformerEngine].into_iter().chain(in_dtypes).chain([Rule::ModelOpt]).collect()
            }
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Rule::TransformerEngine => "te",
            Rule::CompressedTensors(ScaleDtype::F32) => "compressed_tensors",
            Rule::CompressedTensors(ScaleDtype::Bf16) => "compressed_tensors_bf16",
            Rule::CompressedTensors(ScaleDtype::F16) => "compressed_tensors_f16",
            Rule::ModelOpt => "modelopt",
            Rule::Mxfp4(MxScaleRule::Floor) => "floor",
            Rule::Mxfp4(MxScaleRule::Even) => "even",
            Rule::Mxfp4(MxScaleRule::Rceil) => "rceil",
        }
    }

    /// What the rule stores of the tensor amax.
    pub fn tensor_scale(self, amax: f32) -> StoredScale {
        match self {
            Rule::TransformerEngine => StoredScale::OverEncode(tensor_encode_scale(amax)),
            Rule::CompressedTensors(dtype) => {
                StoredScale::OverEncode(compressed_tensors::tensor_encode_scale(amax, dtype))
            }
            Rule::ModelOpt => StoredScale::TimesDecode(model_opt::tensor_decode_scale(amax)),
            Rule::Mxfp4(_) => StoredScale::PowerOfTwo,
        }
    }

    /// Codes [n], one a byte, and scale bytes of the blocks in x [n].
    pub fn quantize(self, x: &[f32], scale: StoredScale) -> (Vec<u8>, Vec<u8>) {
        let encode_scale = scale.encode_scale();
        let (format, block) = match self {
            Rule::CompressedTensors(dtype) => return compressed_tensors::quantize(x, encode_scale, dtype),
            Rule::ModelOpt => return model_opt::quantize(x, scale.decode_scale()),
            Rule::TransformerEngine => (Format::NVFP4, 16),
            Rule::Mxfp4(rule) => (Format { family: Family::Mxfp4 { rule }, ..Format::MXFP4 }, 32),
        };
        let (mut codes, mut scales) = (Vec::with_capacity(x.len()), Vec::with_capacity(x.len() / block));
        for x in x.chunks(block) {
            if x.iter().all(|v| v.is_finite()) {
                let amax = x.iter().fold(0.0, |a: f32, v| a.max(v.abs()));
                let scale = block_scales(format, amax, encode_scale).0;
                scales.extend(scale.byte);
                codes.extend(x.iter().map(|&x| e2m1::encode(scale.encode.apply(x))));
            } else {
                scales.extend(nonfinite_byte(format));
                codes.extend(x.iter().map(|_| e2m1::encode(f32::NAN)));
            }
        }
        (codes, scales)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numerics::block_format::{TensorScale, fake_quant_scaled};

    /// The rules that are temper's own are its definition's codes and scales, NaN blocks included.
    #[test]
    fn our_rules_are_the_definition() {
        let mut x: Vec<f32> = (0..512).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013).collect();
        x[70] = f32::NAN;
        x[200..232].fill(0.0);
        for (rule, format) in [(Rule::TransformerEngine, "nvfp4"), (Rule::Mxfp4(MxScaleRule::Even), "mxfp4:even")] {
            let format: Format = format.parse().unwrap_or(Format::NVFP4);
            let expected = fake_quant_scaled(&x, 4, 128, format, TensorScale::Amax(0.7));
            let (codes, scales) = rule.quantize(&x, rule.tensor_scale(0.7));
            assert_eq!((codes, scales), (expected.codes, expected.block_scales), "{format}");
        }
    }
}
