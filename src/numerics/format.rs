//! The grammar of block formats: `FORMAT[:option[,option]]`, one spelling in config, scan and quantize.
//!
//! mxfp4[:floor|even|rceil][,sr|sr8|half_away][,2d]   mxfp8[:floor|even|rceil][,sr|sr8]
//! nvfp4[:4over6] | nvfp4[:sr|sr8][,2d]               fp8[:row|tensor]                    nvfp4_single_level
//!
//! Options come in any order; `Display` gives one spelling, which parses back. `sr` needs `rceil` (nothing may clip),
//! which it takes by itself; `4over6` stands alone, since it weighs two scales of one block by nearest rounding.

use crate::{Error, bail_input, input_error};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::{fmt, str::FromStr};

/// How an MX block's power-of-two scale follows from its largest magnitude m * 2^e, 1 <= m < 2, and the element's
/// largest exponent emax (2 in E2M1, 8 in E4M3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MxScaleRule {
    /// 2^(e-emax): OCP Microscaling Formats 1.0. Magnitudes above the element's maximum saturate.
    #[default]
    Floor,
    /// 2^(e-emax + [m >= 1.75]): compressed-tensors, vLLM.
    Even,
    /// 2^(e-emax + [m > the element's largest mantissa]), 1.5 in E2M1, 1.75 in E4M3: FlashInfer, fouroversix. Nothing
    /// saturates.
    Rceil,
}

/// Element code, block and kind of scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// E2M1 in blocks of 32 with an E8M0 scale.
    Mxfp4 { rule: MxScaleRule },
    /// E4M3 in blocks of 32 with an E8M0 scale.
    Mxfp8 { rule: MxScaleRule },
    /// E2M1 in blocks of 16 with an E4M3 scale under one f32 scale per tensor. `four_over_six`: the better of two block
    /// scales, which map the block's amax to 6 or to 4.
    Nvfp4 { four_over_six: bool },
    /// What the original Python system called NVFP4 (numerics/original.rs): reproduces its figures, nothing else.
    Nvfp4SingleLevel,
    /// E4M3 with one f32 scale per row, or per tensor.
    Fp8 { per_tensor: bool },
}

/// How a scaled magnitude becomes an element.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// To nearest, ties to the even code.
    #[default]
    NearestEven,
    /// To nearest, ties away from zero: the original's rule (numerics/original.rs).
    HalfAway,
    /// Up with the probability of the fraction, by 16 random bits.
    Stochastic16,
    /// By 8 random bits, as the hardware does: biased by up to 1/256 of a step.
    Stochastic8,
}

impl Rounding {
    /// Whether it draws random bits (numerics/stochastic_rounding.rs).
    pub fn is_stochastic(self) -> bool {
        matches!(self, Rounding::Stochastic16 | Rounding::Stochastic8)
    }
}

/// A format: what the grammar can say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    pub family: Family,
    pub rounding: Rounding,
    /// One block scale per square tile instead of per run along a row: W and its transpose then quantize identically.
    pub two_d: bool,
}

/// What the grammar accepts, for error messages and help.
pub const AVAILABLE: &str = "mxfp4[:floor|even|rceil][,sr|sr8|half_away][,2d], mxfp8[:floor|even|rceil][,sr|sr8], \
    nvfp4[:4over6], nvfp4[:sr|sr8][,2d], fp8[:row|tensor], nvfp4_single_level";

/// Every format that the grammar can say, in its canonical spelling: what a check of all formats goes through.
pub const SPELLINGS: [&str; 31] = [
    "mxfp4",
    "mxfp4:even",
    "mxfp4:rceil",
    "mxfp4:sr",
    "mxfp4:sr8",
    "mxfp4:half_away",
    "mxfp4:even,half_away",
    "mxfp4:rceil,half_away",
    "mxfp4:2d",
    "mxfp4:even,2d",
    "mxfp4:rceil,2d",
    "mxfp4:sr,2d",
    "mxfp4:sr8,2d",
    "mxfp4:half_away,2d",
    "mxfp4:even,half_away,2d",
    "mxfp4:rceil,half_away,2d",
    "mxfp8",
    "mxfp8:even",
    "mxfp8:rceil",
    "mxfp8:sr",
    "mxfp8:sr8",
    "nvfp4",
    "nvfp4:4over6",
    "nvfp4:sr",
    "nvfp4:sr8",
    "nvfp4:2d",
    "nvfp4:sr,2d",
    "nvfp4:sr8,2d",
    "fp8",
    "fp8:tensor",
    "nvfp4_single_level",
];

impl Format {
    pub const MXFP4: Format = Format::nearest(Family::Mxfp4 { rule: MxScaleRule::Floor });
    pub const NVFP4: Format = Format::nearest(Family::Nvfp4 { four_over_six: false });
    pub const NVFP4_SINGLE_LEVEL: Format = Format::nearest(Family::Nvfp4SingleLevel);

    const fn nearest(family: Family) -> Format {
        Format { family, rounding: Rounding::NearestEven, two_d: false }
    }

    /// Consecutive elements of a row of `cols` that share a scale: 32 or 16, the whole row in fp8.
    pub fn block_size(self, cols: usize) -> usize {
        match self.family {
            Family::Mxfp4 { .. } | Family::Mxfp8 { .. } => 32,
            Family::Nvfp4 { .. } | Family::Nvfp4SingleLevel => 16,
            Family::Fp8 { .. } => cols.max(1),
        }
    }

    /// Rows that share a block scale: 1 but in 2-D tiles, which are square.
    pub fn block_rows(self) -> usize {
        if self.two_d { self.block_size(0) } else { 1 }
    }

    /// Blocks in a row of `cols` elements; the last one may be ragged.
    pub fn blocks_per_row(self, cols: usize) -> usize {
        cols.div_ceil(self.block_size(cols))
    }

    /// Whether a scale follows from the largest magnitude of the whole tensor (see `block_format::TensorScale`).
    pub fn has_tensor_scale(self) -> bool {
        matches!(self.family, Family::Nvfp4 { .. } | Family::Fp8 { per_tensor: true })
    }
}

impl FromStr for Format {
    type Err = Error;

    /// Fails with `Error::Input` on an unknown spelling, naming what exists.
    fn from_str(text: &str) -> Result<Format, Error> {
        let (name, options) = match text.split_once(':') {
            Some((name, options)) => (name, options.split(',').collect::<Vec<_>>()),
            None => (text, Vec::new()),
        };
        let known: &[&str] = match name {
            "mxfp4" => &["floor", "even", "rceil", "sr", "sr8", "half_away", "2d"],
            "mxfp8" => &["floor", "even", "rceil", "sr", "sr8"],
            "nvfp4" => &["4over6", "sr", "sr8", "2d"],
            "fp8" => &["row", "tensor"],
            "nvfp4_single_level" => &[],
            _ => bail_input!("unknown format `{text}`, expected one of {AVAILABLE}"),
        };
        if let Some(unknown) = options.iter().find(|option| !known.contains(option)) {
            bail_input!("format `{text}`: {name} has no option `{unknown}`, expected one of {AVAILABLE}");
        }
        // At most one of a group, once.
        let one_of = |group: &[&'static str]| -> Result<Option<&'static str>, Error> {
            let mut chosen = options.iter().filter_map(|option| group.iter().find(|name| *name == option));
            match (chosen.next(), chosen.next()) {
                (Some(_), Some(_)) => Err(input_error!(
                    "format `{text}`: found more than one of {}, expected one of {AVAILABLE}",
                    group.join(", ")
                )),
                (first, _) => Ok(first.copied()),
            }
        };
        let rounding = match one_of(&["sr", "sr8", "half_away"])? {
            Some("sr") => Rounding::Stochastic16,
            Some("sr8") => Rounding::Stochastic8,
            Some(_) => Rounding::HalfAway,
            None => Rounding::NearestEven,
        };
        let rule = match (one_of(&["floor", "even", "rceil"])?, rounding.is_stochastic()) {
            (Some("rceil"), _) | (None, true) => MxScaleRule::Rceil,
            (Some(rule), true) => bail_input!(
                "format `{text}`: sr with {rule}, expected rceil (it is taken by itself): under another rule magnitudes \
                 clip and the mean is lost; expected one of {AVAILABLE}"
            ),
            (Some("even"), false) => MxScaleRule::Even,
            _ => MxScaleRule::Floor,
        };
        let two_d = one_of(&["2d"])?.is_some();
        let four_over_six = one_of(&["4over6"])?.is_some();
        if four_over_six && options.len() > 1 {
            bail_input!("format `{text}`: 4over6 takes no other option, expected one of {AVAILABLE}");
        }
        let per_tensor = one_of(&["row", "tensor"])? == Some("tensor");
        let family = match name {
            "mxfp4" => Family::Mxfp4 { rule },
            "mxfp8" => Family::Mxfp8 { rule },
            "nvfp4" => Family::Nvfp4 { four_over_six },
            "fp8" => Family::Fp8 { per_tensor },
            _ => Family::Nvfp4SingleLevel,
        };
        Ok(Format { family, rounding, two_d })
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (name, first) = match self.family {
            Family::Mxfp4 { rule } => ("mxfp4", self.rule_option(rule)),
            Family::Mxfp8 { rule } => ("mxfp8", self.rule_option(rule)),
            Family::Nvfp4 { four_over_six } => ("nvfp4", four_over_six.then_some("4over6")),
            Family::Nvfp4SingleLevel => ("nvfp4_single_level", None),
            Family::Fp8 { per_tensor } => ("fp8", per_tensor.then_some("tensor")),
        };
        let rounding = match self.rounding {
            Rounding::NearestEven => None,
            Rounding::HalfAway => Some("half_away"),
            Rounding::Stochastic16 => Some("sr"),
            Rounding::Stochastic8 => Some("sr8"),
        };
        let options: Vec<&str> = [first, rounding, self.two_d.then_some("2d")].into_iter().flatten().collect();
        let separator = if options.is_empty() { "" } else { ":" };
        f.pad(&format!("{name}{separator}{}", options.join(",")))
    }
}

impl Format {
    /// The rule's word where it is not what the other options imply.
    fn rule_option(self, rule: MxScaleRule) -> Option<&'static str> {
        match rule {
            MxScaleRule::Floor => None,
            MxScaleRule::Even => Some("even"),
            MxScaleRule::Rceil => (!self.rounding.is_stochastic()).then_some("rceil"),
        }
    }
}

impl Serialize for Format {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Format {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Format, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
