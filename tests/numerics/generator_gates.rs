//! The generator's law: moments, tails and the Kolmogorov-Smirnov distance (numerics.md section 4).

use temper::ops::cpu::normals::normals_into;

const ROW: usize = 1 << 14;

#[test]
fn moments_and_tails_at_1e8_draws() {
    let rows = 100_000_000usize.div_ceil(ROW);
    let mut z = vec![0f32; ROW];
    let (mut sums, mut beyond_3, mut beyond_4) = ([0f64; 4], 0u64, 0u64);
    for row in 0..rows {
        normals_into(20_260_101, 1 << 28, row as u64, &mut z);
        // Lanes, so that the sums vectorise.
        let mut lanes = [[0f64; 8]; 4];
        let (mut over_3, mut over_4) = ([0u32; 8], [0u32; 8]);
        for z in z.as_chunks::<8>().0 {
            for l in 0..8 {
                let (v, square) = (z[l] as f64, z[l] as f64 * z[l] as f64);
                lanes[0][l] += v;
                lanes[1][l] += square;
                lanes[2][l] += square * v;
                lanes[3][l] += square * square;
                over_3[l] += (z[l].abs() > 3.0) as u32;
                over_4[l] += (z[l].abs() > 4.0) as u32;
            }
        }
        for (sum, lanes) in sums.iter_mut().zip(&lanes) {
            *sum += lanes.iter().sum::<f64>();
        }
        beyond_3 += over_3.iter().sum::<u32>() as u64;
        beyond_4 += over_4.iter().sum::<u32>() as u64;
    }
    let n = (rows * ROW) as f64;
    let [mean, square, cube, fourth] = sums.map(|s| s / n);
    let variance = square - mean * mean;
    let kurtosis = fourth / (variance * variance);
    let skewness = cube - 3.0 * mean * square + 2.0 * mean.powi(3);
    for (name, value, expected, law) in [
        ("mean", mean, 0.0, 1.0),
        ("variance", variance, 1.0, 2.0),
        ("skewness", skewness, 0.0, 6.0),
        ("kurtosis", kurtosis, 3.0, 24.0),
    ] {
        let deviation = (value - expected) / f64::sqrt(law / n);
        println!("{name} {value:.6} ({deviation:+.2} standard errors)");
        assert!(deviation.abs() < 4.0, "{name} {value} deviates by {deviation} standard errors");
    }
    for (bound, count, truth) in [(3, beyond_3, 2.699_796_063_260_19e-3), (4, beyond_4, 6.334_248_366_624e-5)] {
        let (share, error) = (count as f64 / n, f64::sqrt(truth / n));
        println!("P(|z| > {bound}) {share:.6e}, normal {truth:.6e} ({:+.2} standard errors)", (share - truth) / error);
        assert!((share - truth).abs() < (4.0 * error).max(0.05 * truth));
    }
}

/// The normal distribution function by the series phi(x) (x + x^3/3 + x^5/15 + ...).
fn normal_cdf(x: f64) -> f64 {
    let (mut term, mut sum, mut n) = (x, x, 1.0);
    while term.abs() > 1e-18 && n < 400.0 {
        n += 2.0;
        term *= x * x / n;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt()
}

#[test]
fn kolmogorov_smirnov_at_1e6_draws() {
    let mut z = vec![0f32; 1_000_000];
    for (row, z) in z.chunks_mut(1000).enumerate() {
        normals_into(3, 7, row as u64, z);
    }
    z.sort_by(f32::total_cmp);
    let n = z.len() as f64;
    let mut distance = 0f64;
    for (i, &z) in z.iter().enumerate() {
        // A lattice of 2^-15: compare in the middle of its cell.
        let cdf = normal_cdf(z as f64);
        distance = distance.max((cdf - i as f64 / n).abs()).max((cdf - (i + 1) as f64 / n).abs());
    }
    let statistic = distance * n.sqrt();
    println!("sqrt(n) D = {statistic:.3} (1.36 at 5 %, 1.95 at .1 %)");
    assert!(statistic < 1.95);
}
