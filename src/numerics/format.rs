//! The grammar of block formats: `FORMAT[:option[,option]]`, one spelling in config, scan and quantize.
//!
//! `mxfp4` (= `mxfp4:floor`), `mxfp4:even`, `mxfp4:rceil`, `nvfp4`, `nvfp4_single_level`.

use crate::{Error, bail_input};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::{fmt, str::FromStr};

/// How an MX block's power-of-two scale follows from its largest magnitude m * 2^e, 1 <= m < 2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MxScaleRule {
    /// 2^(e-2): OCP Microscaling Formats 1.0. Magnitudes above 6 * 2^(e-2) saturate.
    #[default]
    Floor,
    /// 2^(e-2 + [m >= 1.75]): compressed-tensors, vLLM.
    Even,
    /// 2^(e-2 + [m > 1.5]): FlashInfer, fouroversix. Nothing saturates.
    Rceil,
}

/// A block format: the element code is E2M1 in all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// Blocks of 32 with an E8M0 scale.
    Mxfp4 { rule: MxScaleRule },
    /// Blocks of 16 with an E4M3 scale under one f32 scale per tensor.
    Nvfp4,
    /// What the original Python system called NVFP4 (numerics/original.rs): reproduces its figures, nothing else.
    Nvfp4SingleLevel,
}

/// What the grammar accepts, for error messages and help.
pub const AVAILABLE: &str = "mxfp4, mxfp4:floor, mxfp4:even, mxfp4:rceil, nvfp4, nvfp4_single_level";

impl Format {
    /// Consecutive elements of a row that share a block scale.
    pub fn block_size(self) -> usize {
        match self {
            Format::Mxfp4 { .. } => 32,
            Format::Nvfp4 | Format::Nvfp4SingleLevel => 16,
        }
    }

    /// Blocks in a row of `cols` elements; the last one may be ragged.
    pub fn blocks_per_row(self, cols: usize) -> usize {
        cols.div_ceil(self.block_size())
    }
}

impl FromStr for Format {
    type Err = Error;

    /// Fails with `Error::Input` on an unknown spelling, naming what exists.
    fn from_str(text: &str) -> Result<Format, Error> {
        let (family, options) = match text.split_once(':') {
            Some((family, options)) => (family, options.split(',').collect::<Vec<_>>()),
            None => (text, Vec::new()),
        };
        match family {
            "mxfp4" | "nvfp4" | "nvfp4_single_level" => {}
            "mxfp8" | "fp8" => bail_input!("format `{text}` is known but not available yet; available: {AVAILABLE}"),
            _ => bail_input!("unknown format `{text}`, expected one of {AVAILABLE}"),
        }
        let mut rule = None;
        for option in options {
            let chosen = match (family, option) {
                ("mxfp4", "floor") => MxScaleRule::Floor,
                ("mxfp4", "even") => MxScaleRule::Even,
                ("mxfp4", "rceil") => MxScaleRule::Rceil,
                ("mxfp4", "sr" | "2d" | "half_away") | ("nvfp4", "sr" | "2d" | "4over6") => {
                    bail_input!(
                        "format `{text}`: option `{option}` is known but not available yet; available: {AVAILABLE}"
                    )
                }
                _ => bail_input!("format `{text}`: unknown option `{option}`, expected one of {AVAILABLE}"),
            };
            if rule.replace(chosen).is_some() {
                bail_input!("format `{text}`: more than one scale rule, expected one of {AVAILABLE}");
            }
        }
        Ok(match family {
            "mxfp4" => Format::Mxfp4 { rule: rule.unwrap_or_default() },
            "nvfp4" => Format::Nvfp4,
            _ => Format::Nvfp4SingleLevel,
        })
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            Format::Mxfp4 { rule: MxScaleRule::Floor } => "mxfp4",
            Format::Mxfp4 { rule: MxScaleRule::Even } => "mxfp4:even",
            Format::Mxfp4 { rule: MxScaleRule::Rceil } => "mxfp4:rceil",
            Format::Nvfp4 => "nvfp4",
            Format::Nvfp4SingleLevel => "nvfp4_single_level",
        })
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
