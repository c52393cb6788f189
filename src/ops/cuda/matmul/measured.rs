//! Choices that were measured to be fastest: choices.json, which `temper bench kernels --device cuda --choices FILE` writes and
//! which is built in. A product without an entry has the model of hopper.rs or tile.rs.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::{Choice, Layout, choices, hopper_choices};
use crate::{Error, Result};

/// The fastest choice for a product of bf16 on a device.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredChoice {
    /// As CUDA calls the device.
    pub gpu: String,
    pub layout: Layout,
    pub m: i64,
    pub n: i64,
    pub k: i64,
    /// [m, n] of the tile.
    pub tile: [u32; 2],
    pub splits: u32,
}

impl MeasuredChoice {
    /// None where no kernel is of that kind, as after a change of the kernels.
    fn choice(&self) -> Option<Choice> {
        let all = choices(self.layout, tch::Kind::BFloat16, self.k).into_iter().chain(hopper_choices());
        let is_it = |c: &Choice| [c.tile.m, c.tile.n] == self.tile && c.splits == self.splits;
        let mut usable = all.filter(|c| !c.tile.is_hopper || self.layout.packed_format().is_none());
        usable.find(is_it)
    }

    /// How far this m is from another, as a factor.
    fn distance(&self, m: i64) -> f64 {
        (self.m as f64 / m as f64).ln().abs()
    }
}

static BUILT_IN: LazyLock<Vec<MeasuredChoice>> =
    LazyLock::new(|| read_choices(include_str!("choices.json")).unwrap_or_default());

/// Beyond this factor of m another choice may be better.
const FARTHEST: f64 = 2.0;

/// Of the same n and k, by the nearest m.
pub fn choice(gpu: &str, layout: Layout, sizes: (i64, i64, i64)) -> Option<Choice> {
    nearest(&BUILT_IN, gpu, layout, sizes)
}

fn nearest(known: &[MeasuredChoice], gpu: &str, layout: Layout, (m, n, k): (i64, i64, i64)) -> Option<Choice> {
    let same = known.iter().filter(|e| e.gpu == gpu && e.layout == layout && (e.n, e.k) == (n, k));
    let near = same.filter(|e| e.distance(m) <= FARTHEST.ln());
    near.min_by(|a, b| a.distance(m).total_cmp(&b.distance(m)))?.choice()
}

/// Of the text of choices.json.
///
/// # Errors
/// `Runtime` saying what is wrong with it.
pub fn read_choices(text: &str) -> Result<Vec<MeasuredChoice>> {
    let read: Vec<MeasuredChoice> =
        serde_json::from_str(text).map_err(|e| Error::Runtime(format!("choices.json: {e}")))?;
    match read.iter().find(|entry| entry.choice().is_none()) {
        Some(entry) => Err(Error::Runtime(format!("choices.json: no kernel is of the kind of {entry:?}"))),
        None => Ok(read),
    }
}

/// The built-in ones of other devices.
pub fn choices_of_others(gpu: &str) -> Vec<MeasuredChoice> {
    BUILT_IN.iter().filter(|entry| entry.gpu != gpu).cloned().collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_built_in_can_be_read() {
        read_choices(include_str!("choices.json")).unwrap();
    }

    #[test]
    fn the_nearest_of_the_same_device_layout_and_weight() {
        let entry = |m, tile, splits| {
            format!(r#"{{"gpu":"G","layout":"nt","m":{m},"n":1536,"k":8960,"tile":{tile},"splits":{splits}}}"#)
        };
        let text = format!("[{},{}]", entry(8, "[16, 256]", 8), entry(4096, "[256, 192]", 1));
        let known = read_choices(&text).unwrap();
        let found = |gpu, layout, sizes| nearest(&known, gpu, layout, sizes);
        let small = found("G", Layout::Nt, (5, 1536, 8960)).unwrap();
        assert_eq!((small.tile.m, small.splits, small.tile.is_hopper), (16, 8, false));
        assert!(found("G", Layout::Nt, (8000, 1536, 8960)).unwrap().tile.is_hopper);
        for (gpu, layout, sizes) in [
            ("H", Layout::Nt, (8, 1536, 8960)),
            ("G", Layout::Nn, (8, 1536, 8960)),
            ("G", Layout::Nt, (8, 1536, 1536)),
            ("G", Layout::Nt, (100, 1536, 8960)),
        ] {
            assert!(found(gpu, layout, sizes).is_none(), "{gpu} {layout:?} {sizes:?}");
        }
        let wrong = format!("[{}]", entry(8, "[48, 256]", 8));
        assert!(read_choices(&wrong).unwrap_err().to_string().contains("no kernel"));
    }
}
