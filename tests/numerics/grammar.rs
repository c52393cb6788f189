//! The format grammar and the noise keys' fields.

use crate::support::FORMATS;
use temper::numerics::format::{Family, Format, MxScaleRule, Rounding};
use temper::numerics::noise_key::{Phase, Purpose, row_key, stream, token_key};

#[test]
fn formats_round_trip() {
    for text in FORMATS {
        let format: Format = text.parse().unwrap();
        assert_eq!(format.to_string(), text);
        let json = serde_json::to_string(&format).unwrap();
        assert_eq!(json, format!("\"{text}\""));
        assert_eq!(serde_json::from_str::<Format>(&json).unwrap(), format);
    }
    for (text, canonical) in [
        ("mxfp4:floor", "mxfp4"),
        ("mxfp4:rceil,sr", "mxfp4:sr"),
        ("mxfp4:2d,sr8,rceil", "mxfp4:sr8,2d"),
        ("mxfp4:half_away,floor", "mxfp4:half_away"),
        ("nvfp4:2d,sr", "nvfp4:sr,2d"),
        ("fp8:row", "fp8"),
    ] {
        assert_eq!(text.parse::<Format>().unwrap().to_string(), canonical);
    }
}

#[test]
fn the_list_of_formats_is_complete() {
    let rules = [MxScaleRule::Floor, MxScaleRule::Even, MxScaleRule::Rceil];
    let mut families: Vec<Family> =
        rules.into_iter().flat_map(|rule| [Family::Mxfp4 { rule }, Family::Mxfp8 { rule }]).collect();
    families.extend([false, true].map(|four_over_six| Family::Nvfp4 { four_over_six }));
    families.extend([false, true].map(|per_tensor| Family::Fp8 { per_tensor }));
    families.push(Family::Nvfp4SingleLevel);
    let roundings = [Rounding::NearestEven, Rounding::HalfAway, Rounding::Stochastic16, Rounding::Stochastic8];
    let mut said = Vec::new();
    for family in families {
        for rounding in roundings {
            for two_d in [false, true] {
                let format = Format { family, rounding, two_d };
                // A combination that the grammar has no words for is spelt as another, or not at all.
                if format.to_string().parse::<Format>().is_ok_and(|parsed| parsed == format) {
                    said.push(format.to_string());
                }
            }
        }
    }
    let mut listed = FORMATS.map(String::from).to_vec();
    said.sort();
    listed.sort();
    assert_eq!(said, listed);
}

#[test]
fn bad_formats_say_what_exists() {
    for text in [
        "",
        "int4",
        "MXFP4",
        "mxfp4:",
        "mxfp4:odd",
        "nvfp4:even",
        "mxfp4:even,floor",
        "mxfp4:sr,sr",
        "mxfp4:sr,sr8",
        "mxfp4:floor,sr",
        "mxfp4:even,sr8",
        "mxfp4:sr,half_away",
        "mxfp4:4over6",
        "mxfp8:2d",
        "mxfp8:half_away",
        "mxfp8:floor,sr",
        "nvfp4:4over6,2d",
        "nvfp4:sr,4over6",
        "nvfp4:half_away",
        "nvfp4:2d,2d",
        "fp8:sr",
        "fp8:2d",
        "fp8:row,tensor",
        "nvfp4_single_level:sr",
        "nvfp4,sr",
        "mxfp4:even ",
    ] {
        let error = text.parse::<Format>().unwrap_err();
        assert!(error.to_string().contains("expected one of mxfp4["), "{error}");
        assert!(!error.to_string().contains('\n'));
        assert_eq!(error.exit_code(), 2);
    }
}

#[test]
fn keys_pack_their_fields() {
    let key = stream(Purpose::MatmulDw, Phase::Update, 2, 0x12345).unwrap();
    assert_eq!(key, 3 << 28 | 4 << 24 | 2 << 22 | 0x12345);
    let token = token_key(0xFFFF, (1 << 22) - 1, 255, (1 << 18) - 1).unwrap();
    assert_eq!(token, u64::MAX);
    assert_eq!(token_key(1, 2, 3, 4).unwrap(), 1 << 48 | 2 << 26 | 3 << 18 | 4);
    assert_eq!(row_key(7, 9), 7 << 32 | 9);
}

#[test]
fn a_field_out_of_range_is_an_error() {
    assert!(stream(Purpose::Aqn, Phase::Shared, 4, 0).is_err());
    assert!(stream(Purpose::Aqn, Phase::Shared, 0, 1 << 22).is_err());
    for fields in [[1 << 16, 0, 0, 0], [0, 1 << 22, 0, 0], [0, 0, 256, 0], [0, 0, 0, 1 << 18]] {
        let error = token_key(fields[0], fields[1], fields[2], fields[3]).unwrap_err();
        assert!(error.to_string().contains("out of range"), "{error}");
    }
}
