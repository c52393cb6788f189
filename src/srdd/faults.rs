//! The search for faulty layers: every layer of a device is run on the clean model's input of it, so that a probe costs a layer and
//! not a model. One clean forward pass a prompt gives all inputs; then the device twice (fault_statistics.rs, fault_finder.rs), and
//! the probes of numerics.md section 6, which describe a layer but decide nothing: on healthy models they vary too much.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Serialize;
use tch::{Kind, Tensor};

use super::device::Device;
use super::fault_finder::{Suspect, suspects};
use super::fault_statistics::{Sample, Statistics};
use super::prompts::{Laid, normals_like};
use super::robust::{RobustZ, by_layer};
use crate::Result;
use crate::numerics::noise_key::{Phase, Purpose, stream};

#[derive(Clone, Debug, Serialize)]
pub struct FaultScan {
    /// What the device's arithmetic is.
    pub arm: String,
    /// Empty: none.
    pub suspects: Vec<Suspect>,
    pub probes: Vec<Probes>,
    /// Of the probes, by layer and probe.
    pub robust_z: Vec<BTreeMap<&'static str, RobustZ>>,
    /// Forward passes, or as many layers as one has.
    pub forward_passes: usize,
}

/// Of one layer, means over prompts.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Probes {
    pub layer: usize,
    /// std of the response to noise of 0.1 std at the input, over that noise's; and over the clean layer's.
    pub gain: f64,
    pub gain_ratio: f64,
    /// Fisher kurtosis of the output; and over the clean layer's.
    pub kurtosis: f64,
    pub kurtosis_ratio: f64,
    /// rms difference of two executions over the output's.
    pub instability: f64,
    /// Quantiles .001 and .999 of (response to +50 at the input) / 50.
    pub min_gain: f64,
    pub max_gain: f64,
    /// Share of elements that answer to +50 with less than .85 of the median answer.
    pub unresponsive_ratio: f64,
    /// Share of elements that hold the output's largest or least value.
    pub pile_up_ratio: f64,
}

type Probe = (&'static str, fn(&Probes) -> f64);
const PROBES: [Probe; 9] = [
    ("gain", |p| p.gain),
    ("gain_ratio", |p| p.gain_ratio),
    ("kurtosis", |p| p.kurtosis),
    ("kurtosis_ratio", |p| p.kurtosis_ratio),
    ("instability", |p| p.instability),
    ("min_gain", |p| p.min_gain),
    ("max_gain", |p| p.max_gain),
    ("unresponsive_ratio", |p| p.unresponsive_ratio),
    ("pile_up_ratio", |p| p.pile_up_ratio),
];

const PASSES: usize = 6; // 1 clean, 2 of the device, 3 probes
const NOISE: f64 = 0.1;
const BIAS: f64 = 50.0;

/// A layer's clean input and output, and the device's outputs, of every prompt.
pub struct Observed {
    pub x: Vec<Tensor>,
    pub y: Vec<Tensor>,
    pub d: [Vec<Tensor>; 2],
}

impl Observed {
    pub fn statistics(&self) -> Result<Statistics> {
        let values = |tensors: &[Tensor]| -> Result<Vec<f32>> {
            let all = Tensor::f_cat(tensors, 0)?.f_to_kind(Kind::Float)?.f_view([-1])?;
            Ok(Vec::<f32>::try_from(all.f_to_device(tch::Device::Cpu)?)?)
        };
        let mut first = 0;
        let rows = |tensor: &Tensor| {
            let range: Range<usize> = first..first + tensor.size()[0] as usize;
            first = range.end;
            range
        };
        let prompts: Vec<Range<usize>> = self.y.iter().map(rows).collect();
        let (x, y, d, again) = (values(&self.x)?, values(&self.y)?, values(&self.d[0])?, values(&self.d[1])?);
        let hidden = self.y.first().map_or(1, |y| y.size()[1] as usize);
        Ok(Sample { x: &x, y: &y, d: [&d, &again], hidden, prompts: &prompts }.statistics())
    }
}

/// What every layer reads and gives in the clean model: by prompt, layers + 1 residuals.
pub fn clean_residuals(clean: &Device, laid: &[Laid]) -> Result<Vec<Vec<Tensor>>> {
    laid.iter().map(|prompt| clean.residuals(prompt, 0)).collect()
}

/// # Errors
/// What libtorch answers.
pub fn scan_faults(
    clean: &Device,
    device: &Device,
    arm: &str,
    laid: &[Laid],
    progress: &mut dyn FnMut() -> Result<()>,
) -> Result<FaultScan> {
    let _no_grad = tch::no_grad_guard();
    let residuals = clean_residuals(clean, laid)?;
    let (mut statistics, mut probes) = (Vec::new(), Vec::new());
    for layer in 0..clean.model.blocks.len() {
        let run = |number: u32| -> Result<Vec<Tensor>> {
            laid.iter().zip(&residuals).map(|(prompt, of)| device.block(layer, &of[layer], prompt, number)).collect()
        };
        let part = |place: usize| residuals.iter().map(|of| of[place].shallow_clone()).collect();
        let observed = Observed { x: part(layer), y: part(layer + 1), d: [run(0)?, run(1)?] };
        statistics.push(observed.statistics()?);
        probes.push(probe(clean, device, layer, laid, &observed)?);
        progress()?;
    }
    let over_layers = |(name, value): (&'static str, fn(&Probes) -> f64)| (name, probes.iter().map(value).collect());
    let robust_z = by_layer(&PROBES.map(over_layers));
    let forward_passes = PASSES * laid.len();
    Ok(FaultScan { arm: arm.to_string(), suspects: suspects(&statistics), probes, robust_z, forward_passes })
}

fn probe(clean: &Device, device: &Device, layer: usize, laid: &[Laid], observed: &Observed) -> Result<Probes> {
    let mut sum = Probes { layer, ..Probes::default() };
    for (number, prompt) in laid.iter().enumerate() {
        let (x, y) = (&observed.x[number], &observed.y[number]);
        let (d, again) = (&observed.d[0][number], &observed.d[1][number]);
        // The same in every scan.
        let stream = stream(Purpose::Other, Phase::Shared, 3, layer as u32)?;
        let noise = normals_like(x, (0, stream), 0)?.f_mul_scalar(NOISE * std(x)?)?.f_to_kind(x.kind())?;
        let moved = x.f_add(&noise)?;
        let answer = std(&device.block(layer, &moved, prompt, 0)?.f_sub(d)?)? / std(&noise)?;
        let clean_answer = std(&clean.block(layer, &moved, prompt, 0)?.f_sub(y)?)? / std(&noise)?;
        let response = device.block(layer, &x.f_add_scalar(BIAS)?, prompt, 0)?.f_sub(d)?.f_div_scalar(BIAS)?;
        let response = response.f_to_kind(Kind::Float)?.f_view([-1])?;
        let median = f64::try_from(response.f_median()?)?;
        let sorted = response.f_sort(0, false)?.0;
        let quantile = |q: f64| -> Result<f64> {
            let place = (q * (sorted.numel() - 1) as f64).round() as i64;
            Ok(f64::try_from(sorted.f_get(place)?)?)
        };
        let share =
            |mask: Tensor| -> Result<f64> { Ok(f64::try_from(mask.f_to_kind(Kind::Double)?.f_mean(Kind::Double)?)?) };
        let ends = d.f_eq_tensor(&d.f_max()?)?.f_logical_or(&d.f_eq_tensor(&d.f_min()?)?)?;
        let kurtosis = fisher_kurtosis(d)?;
        sum.gain += answer;
        sum.gain_ratio += answer / clean_answer;
        sum.kurtosis += kurtosis;
        sum.kurtosis_ratio += kurtosis / fisher_kurtosis(y)?;
        sum.instability += rms(&d.f_sub(again)?)? / rms(d)?;
        sum.min_gain += quantile(0.001)?;
        sum.max_gain += quantile(0.999)?;
        sum.unresponsive_ratio += share(response.f_lt(0.85 * median)?)?;
        sum.pile_up_ratio += share(ends)?;
    }
    let n = laid.len() as f64;
    let Probes { gain, gain_ratio, kurtosis, kurtosis_ratio, instability, min_gain, max_gain, .. } = sum;
    Ok(Probes {
        layer,
        gain: gain / n,
        gain_ratio: gain_ratio / n,
        kurtosis: kurtosis / n,
        kurtosis_ratio: kurtosis_ratio / n,
        instability: instability / n,
        min_gain: min_gain / n,
        max_gain: max_gain / n,
        unresponsive_ratio: sum.unresponsive_ratio / n,
        pile_up_ratio: sum.pile_up_ratio / n,
    })
}

fn std(x: &Tensor) -> Result<f64> {
    Ok(f64::try_from(x.f_to_kind(Kind::Double)?.f_std(false)?)?)
}

fn rms(x: &Tensor) -> Result<f64> {
    Ok(f64::try_from(x.f_to_kind(Kind::Double)?.f_square()?.f_mean(Kind::Double)?)?.sqrt())
}

fn fisher_kurtosis(x: &Tensor) -> Result<f64> {
    let x = x.f_to_kind(Kind::Double)?;
    let around = x.f_sub(&x.f_mean(Kind::Double)?)?;
    let mean = |t: Tensor| -> Result<f64> { Ok(f64::try_from(t.f_mean(Kind::Double)?)?) };
    let square = around.f_square()?;
    Ok(mean(square.f_square()?)? / mean(square)?.powi(2) - 3.0)
}
