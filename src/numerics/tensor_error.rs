//! Error metrics of a quantized tensor: x original, q dequantized, e = q - x; f64 sums (numerics.md section 3).
//!
//! sqnr_db = 10 log10(sum x^2 / sum e^2); relative_error = mean(|e| / (|x| + 1e-10)), biased by zeros, kept because
//! users know it; cosine = <x,q> / (|x| |q|); deadzone_ratio = share of nonzero x with q = 0;
//! saturation_ratio = share of elements clamped by the format; gain = <x,q> / <x,x>.

use serde::Serialize;

/// The metrics. An exact copy has an infinite `sqnr_db`; an empty tensor gives NaN ratios (both null in JSON).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TensorError {
    pub sqnr_db: f64,
    pub mse: f64,
    pub rmse: f64,
    pub relative_error: f64,
    pub cosine: f64,
    pub max_abs_error: f64,
    pub deadzone_ratio: f64,
    pub saturation_ratio: f64,
    pub gain: f64,
}

/// A metric by which formats are compared.
#[derive(Clone, Copy)]
pub struct Metric {
    /// As in the JSON.
    pub name: &'static str,
    pub more_is_better: bool,
    pub value: fn(&TensorError) -> f64,
}

pub const METRICS: [Metric; 8] = [
    Metric { name: "sqnr_db", more_is_better: true, value: |e| e.sqnr_db },
    Metric { name: "mse", more_is_better: false, value: |e| e.mse },
    Metric { name: "rmse", more_is_better: false, value: |e| e.rmse },
    Metric { name: "relative_error", more_is_better: false, value: |e| e.relative_error },
    Metric { name: "cosine", more_is_better: true, value: |e| e.cosine },
    Metric { name: "max_abs_error", more_is_better: false, value: |e| e.max_abs_error },
    Metric { name: "deadzone_ratio", more_is_better: false, value: |e| e.deadzone_ratio },
    Metric { name: "saturation_ratio", more_is_better: false, value: |e| e.saturation_ratio },
];

impl Metric {
    /// Less where the format is better.
    pub fn cost(&self, error: &TensorError) -> f64 {
        let value = (self.value)(error);
        if self.more_is_better { -value } else { value }
    }
}

impl TensorError {
    /// The mean of each metric, over the errors where it is finite (an all-zero tensor has no SQNR); NaN where it is so in
    /// none, null in JSON.
    pub fn mean(errors: &[&TensorError]) -> TensorError {
        let mean = |metric: fn(&TensorError) -> f64| {
            let values: Vec<f64> = errors.iter().map(|error| metric(error)).filter(|v| v.is_finite()).collect();
            values.iter().sum::<f64>() / values.len() as f64
        };
        TensorError {
            sqnr_db: mean(|e| e.sqnr_db),
            mse: mean(|e| e.mse),
            rmse: mean(|e| e.rmse),
            relative_error: mean(|e| e.relative_error),
            cosine: mean(|e| e.cosine),
            max_abs_error: mean(|e| e.max_abs_error),
            deadzone_ratio: mean(|e| e.deadzone_ratio),
            saturation_ratio: mean(|e| e.saturation_ratio),
            gain: mean(|e| e.gain),
        }
    }
}

/// Sums from which the metrics follow; sums of parts merge. Elements where x or q is not finite are counted in
/// `nonfinite` and enter no other sum.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TensorErrorSums {
    pub elements: u64,
    pub x_sq: f64,
    pub q_sq: f64,
    pub x_q: f64,
    pub error_sq: f64,
    pub relative: f64,
    pub max_abs_error: f64,
    pub nonzero: u64,
    pub deadzone: u64,
    pub saturated: u64,
    pub nonfinite: u64,
}

impl TensorErrorSums {
    /// The sums of x against q, equally long; `saturated` comes from the quantizer.
    pub fn of(x: &[f32], q: &[f32], saturated: u64) -> TensorErrorSums {
        let mut sums = TensorErrorSums { saturated, ..Default::default() };
        sums.add(x, q);
        sums
    }

    /// Adds the elements of x against q, equally long.
    pub fn add(&mut self, x: &[f32], q: &[f32]) {
        for (&x, &q) in x.iter().zip(q) {
            self.add_element(x as f64, q as f64);
        }
    }

    /// Adds the sums of another part.
    pub fn merge(&mut self, other: &TensorErrorSums) {
        self.elements += other.elements;
        self.x_sq += other.x_sq;
        self.q_sq += other.q_sq;
        self.x_q += other.x_q;
        self.error_sq += other.error_sq;
        self.relative += other.relative;
        self.max_abs_error = self.max_abs_error.max(other.max_abs_error);
        self.nonzero += other.nonzero;
        self.deadzone += other.deadzone;
        self.saturated += other.saturated;
        self.nonfinite += other.nonfinite;
    }

    /// The metrics of everything added.
    pub fn finish(&self) -> TensorError {
        let n = self.elements as f64;
        let mse = self.error_sq / n;
        TensorError {
            sqnr_db: 10.0 * (self.x_sq / self.error_sq).log10(),
            mse,
            rmse: mse.sqrt(),
            relative_error: self.relative / n,
            cosine: self.x_q / (self.x_sq.sqrt() * self.q_sq.sqrt()),
            max_abs_error: self.max_abs_error,
            deadzone_ratio: self.deadzone as f64 / (self.nonzero as f64).max(1.0),
            saturation_ratio: self.saturated as f64 / n,
            gain: self.x_q / self.x_sq,
        }
    }

    fn add_element(&mut self, x: f64, q: f64) {
        if !x.is_finite() || !q.is_finite() {
            self.nonfinite += 1;
            return;
        }
        let error = q - x;
        self.elements += 1;
        self.x_sq += x * x;
        self.q_sq += q * q;
        self.x_q += x * q;
        self.error_sq += error * error;
        self.relative += error.abs() / (x.abs() + 1e-10);
        self.max_abs_error = self.max_abs_error.max(error.abs());
        self.nonzero += (x != 0.0) as u64;
        self.deadzone += (x != 0.0 && q == 0.0) as u64;
    }
}
