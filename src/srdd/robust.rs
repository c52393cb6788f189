//! Robust z scores over layers: z = (v - median) / (1.4826 max(MAD, .01 |median|, 1e-6)), MAD the median of |v - median|; of the
//! values, and of what each adds to the layer before it.

use std::collections::BTreeMap;

use serde::Serialize;

/// Of one layer and probe.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RobustZ {
    pub value: f64,
    /// Of the difference to the layer before; None in the first.
    pub difference: Option<f64>,
}

/// Of every value.
pub fn robust_z(values: &[f64]) -> Vec<f64> {
    let center = median(values.to_vec());
    let mad = median(values.iter().map(|v| (v - center).abs()).collect());
    let scale = 1.4826 * mad.max(0.01 * center.abs()).max(1e-6);
    values.iter().map(|v| (v - center) / scale).collect()
}

/// By layer and probe. `probes`: each with its values over layers.
pub fn by_layer(probes: &[(&'static str, Vec<f64>)]) -> Vec<BTreeMap<&'static str, RobustZ>> {
    let layers = probes.first().map_or(0, |(_, values)| values.len());
    let mut all = vec![BTreeMap::new(); layers];
    for (name, values) in probes {
        let differences: Vec<f64> = values.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let of_differences = robust_z(&differences);
        for (layer, value) in robust_z(values).into_iter().enumerate() {
            let difference = layer.checked_sub(1).map(|before| of_differences[before]);
            all[layer].insert(*name, RobustZ { value, difference });
        }
    }
    all
}

/// The ordinary median; 0 of nothing.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn z_is_by_hand() {
        // Median 3, |v - 3| = 2 1 0 1 97: MAD 1.
        let z = robust_z(&[1.0, 2.0, 3.0, 4.0, 100.0]);
        assert!((z[4] - 97.0 / 1.4826).abs() < 1e-12 && z[2] == 0.0);
        // All alike but one: the floor of one percent of the median.
        assert!((robust_z(&[10.0, 10.0, 10.0, 11.0])[3] - 1.0 / 0.14826).abs() < 1e-9);
        let layers = by_layer(&[("gain", vec![1.0, 2.0, 3.0, 10.0])]);
        assert_eq!(layers[0]["gain"].difference, None);
        // Differences 1 1 7: median 1, MAD 0, floor .01.
        assert!((layers[3]["gain"].difference.unwrap_or(0.0) - 6.0 / 0.014826).abs() < 1e-6);
    }
}
