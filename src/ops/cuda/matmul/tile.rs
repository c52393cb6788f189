//! Which tile a product is cut into, and into how many splits of k.

use tch::Kind;

use super::Layout;

/// A tile of C, as a kernel has it: `MatmulTile` of kernels/include/matmul.cuh.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TileShape {
    pub m: u32,
    pub n: u32,
    pub threads: u32,
    pub shared_bytes: u32,
    /// k of a stage.
    pub step_k: u32,
    /// Blocks of threads that fit a multiprocessor.
    pub resident: u32,
    /// Of a cluster of two blocks, of instructions of sm_90a.
    pub is_hopper: bool,
    /// Multiplications a clock and multiprocessor, over the 1024 that an A100 can do.
    pub(super) efficiency: f64,
}

impl TileShape {
    /// Stages of 64 k, the sums of a tile, barriers, the sums of eight warps' noise: kSharedBytes of
    /// kernels/include/matmul_sm90.cuh.
    pub(super) const fn hopper(n: u32, stages: u32, efficiency: f64) -> TileShape {
        let shared_bytes = stages * (128 + n) * 64 * 2 + 128 * n * 4 + (2 * stages + 4) * 8 + 8 * 5 * 8;
        TileShape { m: 256, n, threads: 384, shared_bytes, step_k: 64, resident: 1, is_hopper: true, efficiency }
    }
}

/// Four stages of 32 k in 16 bits.
const fn dense(m: u32, n: u32, resident: u32, efficiency: f64) -> TileShape {
    TileShape {
        m,
        n,
        threads: 128,
        shared_bytes: 4 * (m + n) * 32 * 2,
        step_k: 32,
        resident,
        is_hopper: false,
        efficiency,
    }
}

/// Three stages of 128 k: A in 16 bits, the weight's codes in 4 and its scales.
const fn packed(m: u32, scales_of_row: u32, resident: u32, efficiency: f64) -> TileShape {
    let shared_bytes = 3 * (m * 256 + 256 * (64 + scales_of_row));
    TileShape { m, n: 256, threads: 128, shared_bytes, step_k: 128, resident, is_hopper: false, efficiency }
}

const LARGE: TileShape = dense(128, 128, 2, 0.85);
const MEDIUM: TileShape = dense(64, 128, 3, 0.7);
const DECODE_32: TileShape = dense(32, 256, 2, 0.4);
const DECODE_16: TileShape = dense(16, 256, 2, 0.4);
/// Of matmul_f32, which has static shared memory and no stages.
const F32: TileShape = TileShape {
    m: 128,
    n: 64,
    threads: 256,
    shared_bytes: 0,
    step_k: 32,
    resident: 2,
    is_hopper: false,
    efficiency: 0.05,
};
const MXFP4: [TileShape; 3] = [packed(64, 4, 1, 0.65), packed(32, 4, 2, 0.5), packed(16, 4, 2, 0.3)];
const NVFP4: [TileShape; 3] = [packed(64, 8, 1, 0.5), packed(32, 8, 2, 0.35), packed(16, 8, 2, 0.2)];

/// A tile and a number of splits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    pub tile: TileShape,
    /// Blocks of threads that share a tile of C, each with a part of k.
    pub splits: u32,
}

impl Choice {
    /// k of a split, a multiple of a stage's.
    pub fn split_k(&self, k: i64) -> u32 {
        (k as u32).div_ceil(self.splits).next_multiple_of(self.tile.step_k).max(self.tile.step_k)
    }
}

/// k of a split is at least this: a shorter one costs more than it gains.
const LEAST_SPLIT_K: u32 = 256;
const MOST_SPLITS: u32 = 32;

/// All choices for a product, the plainest first.
pub fn choices(layout: Layout, kind: Kind, k: i64) -> Vec<Choice> {
    let tiles: &[TileShape] = match (kind, layout) {
        (Kind::Float, _) => return vec![Choice { tile: F32, splits: 1 }],
        (_, Layout::NtMxfp4) => &MXFP4,
        (_, Layout::NtNvfp4) => &NVFP4,
        (Kind::BFloat16, Layout::Nt) => &[LARGE, MEDIUM, DECODE_32, DECODE_16],
        (Kind::BFloat16, _) => &[LARGE, MEDIUM],
        _ => &[LARGE],
    };
    let of_tile = |&tile: &TileShape| {
        let splits = (1..=MOST_SPLITS).filter(move |&splits| {
            let split_k = Choice { tile, splits }.split_k(k);
            // Every split has work, and enough of it.
            splits == 1 || split_k >= LEAST_SPLIT_K && (splits - 1) * split_k < k as u32
        });
        splits.map(move |splits| Choice { tile, splits })
    };
    tiles.iter().flat_map(of_tile).collect()
}

/// The choice that a simple model of the machine finds fastest. In clocks of an A100: a multiprocessor multiplies 1024 pairs
/// of 16 bits a clock at best and less in small tiles, blocks of threads come in waves, and splits write and read their sums.
pub fn choose(layout: Layout, kind: Kind, (m, n, k): (i64, i64, i64), multiprocessors: u32) -> Choice {
    let processors = f64::from(multiprocessors.max(1));
    let cost = |choice: &Choice| {
        let Choice { tile, splits } = *choice;
        let tiles = (m as f64 / f64::from(tile.m)).ceil() * (n as f64 / f64::from(tile.n)).ceil();
        let area = f64::from(tile.m * tile.n);
        let block = area * f64::from(choice.split_k(k)) / (1024.0 * tile.efficiency) + area / 16.0 + 1000.0;
        let blocks = tiles * f64::from(splits);
        let of_wave = processors * f64::from(tile.resident);
        let waves = (blocks / of_wave).floor() * f64::from(tile.resident);
        let rest = ((blocks % of_wave) / processors).ceil();
        let sums = if splits > 1 { blocks * area * 8.0 / (processors * 16.0) + 2000.0 } else { 0.0 };
        (waves + rest) * block + sums
    };
    let choices = choices(layout, kind, k);
    let cheapest = choices.iter().min_by(|a, b| cost(a).total_cmp(&cost(b)));
    cheapest.copied().unwrap_or(Choice { tile: LARGE, splits: 1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const A100: u32 = 108;

    #[test]
    fn large_products_take_large_tiles_and_no_splits() {
        for layout in [Layout::Nt, Layout::Nn, Layout::Tn] {
            assert_eq!(choose(layout, Kind::BFloat16, (4096, 8960, 1536), A100), Choice { tile: LARGE, splits: 1 });
        }
    }

    #[test]
    fn a_decoding_step_takes_flat_tiles_and_splits_that_fill_the_machine() {
        for (layout, tile) in [(Layout::Nt, DECODE_16), (Layout::NtMxfp4, MXFP4[2]), (Layout::NtNvfp4, NVFP4[2])] {
            for rows in [1, 8, 16] {
                let choice = choose(layout, Kind::BFloat16, (rows, 1536, 8960), A100);
                assert_eq!(choice.tile, tile, "{rows}: {choice:?}");
                assert!(choice.splits * 6 >= A100, "{rows}: {choice:?}");
            }
        }
    }

    #[test]
    fn splits_cover_k_and_none_is_empty() {
        for (layout, k) in
            [Layout::Nt, Layout::NtMxfp4].into_iter().flat_map(|l| [1, 32, 100, 8960, 8961].map(|k| (l, k)))
        {
            for choice in choices(layout, Kind::BFloat16, k) {
                let split_k = choice.split_k(k);
                assert!(
                    split_k.is_multiple_of(choice.tile.step_k) && choice.splits * split_k >= k as u32,
                    "{choice:?}"
                );
                assert!((choice.splits - 1) * split_k < k as u32, "{k}: {choice:?}");
            }
        }
    }
}
