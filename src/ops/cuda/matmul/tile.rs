//! Which tile a product is cut into, and into how many splits of k.

use tch::Kind;

use super::Layout;

/// A tile of C, as a kernel has it: `MatmulTile` of kernels/include/matmul.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileShape {
    pub m: u32,
    pub n: u32,
    pub threads: u32,
    pub shared_bytes: u32,
    /// Blocks of threads that fit a multiprocessor.
    pub resident: u32,
}

const fn tile(m: u32, n: u32, resident: u32) -> TileShape {
    // Four stages of 32 k in 16 bits.
    TileShape { m, n, threads: 128, shared_bytes: 4 * (m + n) * 32 * 2, resident }
}

const LARGE: TileShape = tile(128, 128, 2);
const MEDIUM: TileShape = tile(64, 128, 3);
const DECODE_32: TileShape = tile(32, 256, 2);
const DECODE_16: TileShape = tile(16, 256, 2);
/// Of matmul_f32, which has static shared memory and no stages.
const F32: TileShape = TileShape { m: 128, n: 64, threads: 256, shared_bytes: 0, resident: 2 };

/// A tile and a number of splits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub tile: TileShape,
    /// Blocks of threads that share a tile of C, each with a part of k.
    pub splits: u32,
}

impl Choice {
    /// k of a split, a multiple of the kernels' 32.
    pub fn split_k(&self, k: i64) -> u32 {
        (k as u32).div_ceil(self.splits).next_multiple_of(32).max(32)
    }
}

/// k of a split is at least this: a shorter one costs more than it gains.
const LEAST_SPLIT_K: u32 = 256;
const MOST_SPLITS: u32 = 32;

/// All choices for a product, the plainest first.
pub fn choices(layout: Layout, kind: Kind, k: i64) -> Vec<Choice> {
    let tiles: &[TileShape] = match (kind, layout) {
        (Kind::Float, _) => return vec![Choice { tile: F32, splits: 1 }],
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
        let efficiency = match tile {
            LARGE => 0.85,
            MEDIUM => 0.7,
            _ => 0.4,
        };
        let block = area * f64::from(choice.split_k(k)) / (1024.0 * efficiency) + area / 16.0 + 1000.0;
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
        for rows in [1, 8, 16] {
            let choice = choose(Layout::Nt, Kind::BFloat16, (rows, 1536, 8960), A100);
            assert_eq!(choice.tile, DECODE_16, "{rows}: {choice:?}");
            assert!(choice.splits * 6 >= A100, "{rows}: {choice:?}");
        }
    }

    #[test]
    fn splits_cover_k_and_none_is_empty() {
        for k in [1, 31, 32, 100, 1536, 8960, 8961] {
            for choice in choices(Layout::Nt, Kind::BFloat16, k) {
                let split_k = choice.split_k(k);
                assert!(split_k.is_multiple_of(32) && choice.splits * split_k >= k as u32, "{k}: {choice:?}");
                assert!((choice.splits - 1) * split_k < k as u32, "{k}: {choice:?}");
            }
        }
    }
}
