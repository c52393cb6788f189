//! What training changed in each layer: ||after - before|| / ||before|| over the layer's tensors, and the share of elements
//! that differ.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;

use super::summary::layer_of;
use crate::model::checkpoint::{Checkpoint, TensorView, is_readable_float};
use crate::{Result, bail_input};

#[derive(Clone, Debug, Serialize)]
pub struct Changes {
    pub layers: Vec<LayerChange>,
    /// Of embedding, final norm and head.
    pub outside_layers: Change,
    pub all: Change,
}

#[derive(Clone, Debug, Serialize)]
pub struct LayerChange {
    pub layer: usize,
    #[serde(flatten)]
    pub change: Change,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Change {
    pub relative_change: f64,
    pub changed_elements_ratio: f64,
}

/// f64 sums of before^2 and (after - before)^2.
#[derive(Clone, Copy, Default)]
struct Sums {
    before_sq: f64,
    change_sq: f64,
    changed: u64,
    elements: u64,
}

impl Sums {
    fn add(self, other: Sums) -> Sums {
        Sums {
            before_sq: self.before_sq + other.before_sq,
            change_sq: self.change_sq + other.change_sq,
            changed: self.changed + other.changed,
            elements: self.elements + other.elements,
        }
    }

    fn finish(self) -> Change {
        let ratio = |a: f64, b: f64| if b == 0.0 { 0.0 } else { a / b };
        Change {
            relative_change: ratio(self.change_sq, self.before_sq).sqrt(),
            changed_elements_ratio: ratio(self.changed as f64, self.elements as f64),
        }
    }
}

/// `progress` is told the bytes of each tensor of `before`.
///
/// # Errors
/// `Input` naming a tensor that only one of them has, or that has another shape there.
pub fn changes(
    before: &Checkpoint,
    after: &Checkpoint,
    progress: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Changes> {
    for (one, other) in [(before, after), (after, before)] {
        if let Some(name) = one.names().find(|name| !other.contains(name)) {
            bail_input!(
                "{}: tensor {name}: missing, found in {}",
                other.file_of("").display(),
                one.file_of(name).display()
            );
        }
    }
    let mut of_layers: BTreeMap<Option<usize>, Sums> = BTreeMap::new();
    for name in before.names() {
        let (a, b) = (before.tensor(name)?, after.tensor(name)?);
        if !is_readable_float(a.dtype) || !is_readable_float(b.dtype) {
            continue;
        }
        if a.shape != b.shape {
            let file = after.file_of(name).display();
            bail_input!("{file}: tensor {name}: found shape {:?}, expected {:?}", b.shape, a.shape);
        }
        let sums = of_layers.entry(layer_of(name)).or_default();
        *sums = sums.add(of_tensor(&a, &b)?);
        before.release(a.data);
        after.release(b.data);
        progress(a.data.len())?;
    }
    let all = of_layers.values().copied().fold(Sums::default(), Sums::add).finish();
    let outside_layers = of_layers.remove(&None).unwrap_or_default().finish();
    let layers = of_layers.into_iter().filter_map(|(layer, sums)| Some((layer?, sums)));
    let layers = layers.map(|(layer, sums)| LayerChange { layer, change: sums.finish() }).collect();
    Ok(Changes { layers, outside_layers, all })
}

fn of_tensor(before: &TensorView, after: &TensorView) -> Result<Sums> {
    const PIECE: usize = 1 << 16;
    let (a, b) = (before.to_f32()?, after.to_f32()?);
    let pieces: Vec<Sums> = a
        .par_chunks(PIECE)
        .zip(b.par_chunks(PIECE))
        .map(|(a, b)| {
            let mut sums = Sums { elements: a.len() as u64, ..Sums::default() };
            for (&a, &b) in a.iter().zip(b) {
                let (before, change) = (f64::from(a), f64::from(b) - f64::from(a));
                sums.before_sq += before * before;
                sums.change_sq += change * change;
                sums.changed += u64::from(a != b);
            }
            sums
        })
        .collect();
    // In their order: the same whatever the number of threads.
    Ok(pieces.into_iter().fold(Sums::default(), Sums::add))
}
