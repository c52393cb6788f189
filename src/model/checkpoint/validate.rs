//! A packed checkpoint that another library made against our quantization of the weights that it was made from.
//!
//! Per linear and rule (rules.rs): how many codes and block scales differ, whether the tensor scale is the same, and the
//! SQNR against the weights, of the rule's values and of the stored ones (both before they are rounded to a dtype). The
//! tensor amax is that of the linear and its siblings (q/k/v, gate/up), or the linear's own where the stored scale says
//! so; where neither gives the stored scale, blocks are compared under the stored one.

pub mod formats;
pub mod rules;

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;

use super::quantize::{DEFAULT_EXCLUDED, fused_group, natural_key};
use super::{Checkpoint, PackedView, StoredDtype};
use crate::model::config::quantization::PackedLayout;
use crate::numerics::format::Format;
use crate::numerics::packed::{StoredScale, dequantize, pack_codes};
use crate::numerics::tensor_error::TensorErrorSums;
use crate::ops::cpu::fake_quant::{error_sums, tensor_amax};
use crate::{Result, bail_input};
use rules::Rule;

/// Elements that one thread quantizes at a time.
const PIECE_ELEMENTS: usize = 1 << 17;

/// What a reference is.
pub enum Reference {
    /// Its weights are MODEL's, bit for bit: whoever loads it quantizes them then.
    Unmodified,
    Packed(Comparison),
}

/// All packed linears of a reference.
#[derive(Clone, Debug)]
pub struct Comparison {
    pub layout: PackedLayout,
    pub tensors: Vec<ComparedTensor>,
    /// Linears that the reference holds unpacked.
    pub unpacked: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ComparedTensor {
    pub name: String,
    pub shape: [usize; 2],
    pub rules: Vec<RuleOutcome>,
    /// Of the stored codes and scales, against MODEL's weights.
    pub reference_sqnr_db: f64,
}

/// A rule on one tensor.
#[derive(Clone, Debug, Serialize)]
pub struct RuleOutcome {
    pub rule: &'static str,
    pub codes_differing: usize,
    pub codes: usize,
    pub scales_differing: usize,
    pub scales: usize,
    pub tensor_scale: TensorScaleOutcome,
    pub sqnr_db: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TensorScaleOutcome {
    /// MXFP4 has none.
    None,
    /// Equal, from the amax over siblings (or of a linear that has none).
    Equal,
    /// Equal, from the amax of this linear alone, which has siblings.
    EqualUnshared,
    Differs,
}

/// One rule over all tensors.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RuleSummary {
    pub rule: &'static str,
    pub tensors_reproduced: usize,
    pub codes_differing_ratio: f64,
    pub scales_differing_ratio: f64,
    pub tensor_scales_differing: usize,
    pub mean_sqnr_db: f64,
}

impl RuleOutcome {
    pub fn reproduces(&self) -> bool {
        self.codes_differing == 0 && self.scales_differing == 0 && self.tensor_scale != TensorScaleOutcome::Differs
    }

    fn distance(&self) -> (bool, usize, usize) {
        (!self.reproduces(), self.codes_differing, self.scales_differing)
    }
}

impl Comparison {
    /// The rule that comes nearest on a tensor; among equals the one that does over all.
    pub fn best<'a>(&self, tensor: &'a ComparedTensor) -> Option<&'a RuleOutcome> {
        let order: Vec<&str> = self.summaries().iter().map(|summary| summary.rule).collect();
        let place = |outcome: &RuleOutcome| order.iter().position(|rule| *rule == outcome.rule).unwrap_or(order.len());
        tensor.rules.iter().min_by_key(|outcome| (outcome.distance(), place(outcome)))
    }

    /// The rules that reproduce every tensor.
    pub fn reproducing(&self) -> Vec<&'static str> {
        let all = self.summaries().into_iter().filter(|summary| summary.tensors_reproduced == self.tensors.len());
        all.map(|summary| summary.rule).collect()
    }

    /// The rules, nearest first; a rule that was not applied to every tensor (dtypes differ) is left out.
    pub fn summaries(&self) -> Vec<RuleSummary> {
        let names = self.tensors.first().into_iter().flat_map(|tensor| tensor.rules.iter().map(|r| r.rule));
        let mut all: Vec<RuleSummary> = names.filter_map(|name| self.summary(name)).collect();
        all.sort_by(|a, b| {
            let key = |s: &RuleSummary| (s.codes_differing_ratio, s.scales_differing_ratio);
            let reproduced = b.tensors_reproduced.cmp(&a.tensors_reproduced);
            reproduced.then(key(a).partial_cmp(&key(b)).unwrap_or(std::cmp::Ordering::Equal))
        });
        all
    }

    fn summary(&self, rule: &'static str) -> Option<RuleSummary> {
        let outcomes: Option<Vec<&RuleOutcome>> =
            self.tensors.iter().map(|tensor| tensor.rules.iter().find(|r| r.rule == rule)).collect();
        let outcomes = outcomes?;
        let sum = |count: fn(&RuleOutcome) -> usize| outcomes.iter().map(|o| count(o)).sum::<usize>() as f64;
        let sqnr: Vec<f64> = outcomes.iter().map(|o| o.sqnr_db).filter(|v| v.is_finite()).collect();
        Some(RuleSummary {
            rule,
            tensors_reproduced: outcomes.iter().filter(|o| o.reproduces()).count(),
            codes_differing_ratio: sum(|o| o.codes_differing) / sum(|o| o.codes),
            scales_differing_ratio: sum(|o| o.scales_differing) / sum(|o| o.scales),
            tensor_scales_differing: outcomes.iter().filter(|o| o.tensor_scale == TensorScaleOutcome::Differs).count(),
            mean_sqnr_db: sqnr.iter().sum::<f64>() / sqnr.len() as f64,
        })
    }
}

/// Compares `reference` with the quantization of `model`'s weights. `progress(name)` is called before each tensor; its
/// error ends the work.
///
/// # Errors
/// `Error::Input` where `model` is packed itself, lacks a weight that the reference has, or has it in another shape or
/// dtype, and where the reference is neither packed nor equal to `model`.
pub fn compare(
    model: &Checkpoint,
    reference: &Checkpoint,
    progress: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Reference> {
    if let Some(layout) = model.packed_layout() {
        bail_input!(
            "{}: found packed weights ({layout}), expected the weights that REFERENCE was made from",
            model.path().display()
        );
    }
    let Some(layout) = reference.packed_layout() else {
        check_unmodified(model, reference)?;
        return Ok(Reference::Unmodified);
    };
    let mut names: Vec<&str> = reference.packed_names().collect();
    names.sort_by_key(|name| natural_key(name));
    let mut amax = BTreeMap::new();
    for &name in &names {
        amax.insert(name, amax_of(model, reference, name)?);
    }
    let mut shared: BTreeMap<String, f32> = BTreeMap::new();
    for (name, &amax) in &amax {
        let largest = shared.entry(group_of(name)).or_insert(0.0);
        *largest = largest.max(amax);
    }
    let mut tensors = Vec::with_capacity(names.len());
    for &name in &names {
        progress(name)?;
        if let Some(view) = reference.packed_weight(name)? {
            tensors.push(compare_tensor(name, model, &view, [shared[&group_of(name)], amax[name]])?);
        }
    }
    let linear = |name: &&str| {
        name.ends_with("proj.weight") && !name.split('.').any(|component| DEFAULT_EXCLUDED.contains(&component))
    };
    let unpacked = model.names().filter(linear).filter(|name| !amax.contains_key(name)).map(str::to_string).collect();
    Ok(Reference::Packed(Comparison { layout, tensors, unpacked }))
}

fn group_of(name: &str) -> String {
    fused_group(name).unwrap_or_else(|| name.to_string())
}

/// The largest finite magnitude of a weight of MODEL that REFERENCE packs.
fn amax_of(model: &Checkpoint, reference: &Checkpoint, name: &str) -> Result<f32> {
    let (weight, spec) = (model.tensor(name)?, reference.parameter_spec(name)?);
    if weight.shape != spec.shape {
        let file = model.file_of(name).display();
        bail_input!("{file}: tensor {name}: found {:?}, expected {:?} as in REFERENCE", weight.shape, spec.shape);
    }
    Ok(tensor_amax(&model.tensor_f32(name)?, spec.shape[1], Format::NVFP4))
}

/// `amax`: over the siblings, and of the tensor alone.
fn compare_tensor(name: &str, model: &Checkpoint, view: &PackedView, amax: [f32; 2]) -> Result<ComparedTensor> {
    let x = model.tensor_f32(name)?;
    let rules = Rule::of(view.kind, model.tensor(name)?.dtype);
    let outcomes = rules.into_iter().map(|rule| compare_rule(rule, &x, view, amax)).collect();
    let sums = error_sums(&x, &view.values());
    model.release(model.tensor(name)?.data);
    Ok(ComparedTensor {
        name: name.to_string(),
        shape: view.shape,
        rules: outcomes,
        reference_sqnr_db: sums.finish().sqnr_db,
    })
}

fn compare_rule(rule: Rule, x: &[f32], view: &PackedView, [shared, own]: [f32; 2]) -> RuleOutcome {
    let (shared, own) = (rule.tensor_scale(shared), rule.tensor_scale(own));
    let (scale, tensor_scale) = match view.scale {
        StoredScale::PowerOfTwo => (view.scale, TensorScaleOutcome::None),
        stored if shared.agrees(stored) => (shared, TensorScaleOutcome::Equal),
        stored if own.agrees(stored) => (own, TensorScaleOutcome::EqualUnshared),
        stored => (stored, TensorScaleOutcome::Differs),
    };
    let block = view.kind.block_size();
    // Whole blocks: rows are whole blocks, one after the other.
    let piece = PIECE_ELEMENTS.next_multiple_of(block);
    let stored = view.codes.par_chunks(piece / 2).zip(view.block_scales.par_chunks(piece / block));
    let parts: Vec<(usize, usize, TensorErrorSums)> = x
        .par_chunks(piece)
        .zip(stored)
        .map(|(x, (stored_codes, stored_scales))| {
            let (codes, scales) = rule.quantize(x, scale);
            let packed = pack_codes(&codes);
            let mut values = vec![0.0; x.len()];
            dequantize(&packed, &scales, scale, block, &mut values);
            let halves = |a: &u8, b: &u8| ((a ^ b) & 15 != 0) as usize + ((a ^ b) >> 4 != 0) as usize;
            let codes_differing = packed.iter().zip(stored_codes).map(|(a, b)| halves(a, b)).sum();
            let scales_differing = scales.iter().zip(stored_scales).filter(|(a, b)| a != b).count();
            (codes_differing, scales_differing, error_sums(x, &values))
        })
        .collect();
    let mut sums = TensorErrorSums::default();
    parts.iter().for_each(|part| sums.merge(&part.2));
    RuleOutcome {
        rule: rule.name(),
        codes_differing: parts.iter().map(|part| part.0).sum(),
        codes: x.len(),
        scales_differing: parts.iter().map(|part| part.1).sum(),
        scales: view.block_scales.len(),
        tensor_scale,
        sqnr_db: sums.finish().sqnr_db,
    }
}

/// Every tensor of MODEL is in REFERENCE with the same bits.
fn check_unmodified(model: &Checkpoint, reference: &Checkpoint) -> Result<()> {
    for name in model.names() {
        let (ours, theirs) = (model.tensor(name)?, reference.tensor(name)?);
        if (ours.dtype, ours.shape, ours.data) != (theirs.dtype, theirs.shape, theirs.data) {
            bail_input!(
                "{}: tensor {name}: found values that are not packed and differ from MODEL's, expected packed weights",
                reference.file_of(name).display()
            );
        }
    }
    Ok(())
}
