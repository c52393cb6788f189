//! The launch of kernels/matmul_sm90.cu: clusters of two blocks that stay, and go from tile to tile.

use super::kernel::{Call, MatmulArgs};
use super::tile::TileShape;
use super::{Choice, Layout};
use crate::Result;
use crate::ops::cuda::launch::{Boxes, Executor, Launch, TensorMap};

/// `MatmulSm90Args` of kernels/include/matmul_sm90.cuh, aligned to 64 bytes there.
#[repr(C)]
struct MatmulSm90Args {
    a: TensorMap,
    b: TensorMap,
    rest: MatmulArgs,
    unused: [u64; 7],
}

const _: () = assert!(size_of::<MatmulSm90Args>().is_multiple_of(64), "whole pieces of its alignment");

/// The efficiencies are an H200's over k (bench/results/2026-11-26-h200-kernels.json): 649 and 710 TFLOP/s.
const TILES: [TileShape; 2] = [TileShape::hopper(192, 3, 1.37), TileShape::hopper(128, 5, 1.49)];
const BLOCKS: u64 = 2; // of a cluster
const STEP_K: u32 = 64;

/// What a Hopper can choose besides, in bf16 where rows of both operands are aligned to 16 bytes.
pub fn hopper_choices() -> impl Iterator<Item = Choice> {
    TILES.into_iter().map(|tile| Choice { tile, splits: 1 })
}

/// Below it the start and the end of a tile outweigh what lies between.
const LEAST_K: i64 = 512;

/// What a Hopper takes where nothing was measured: the tile whose waves take least, if a third of the clusters have one and rows
/// fill half of it. None: the tiles of sm_80, which are smaller and can split k.
pub fn choose_hopper((m, n, k): (i64, i64, i64), multiprocessors: u32) -> Option<Choice> {
    let clusters = (u64::from(multiprocessors) / BLOCKS).max(1);
    let tiles = |tile: &TileShape| m.unsigned_abs().div_ceil(tile.m.into()) * n.unsigned_abs().div_ceil(tile.n.into());
    let cost = |tile: &TileShape| tiles(tile).div_ceil(clusters) as f64 * f64::from(tile.n) / tile.efficiency;
    let fills = |tile: &TileShape| 2 * m > i64::from(tile.m) && 3 * tiles(tile) >= clusters;
    let full = TILES.into_iter().filter(|tile| k >= LEAST_K && fills(tile));
    full.min_by(|a, b| cost(a).total_cmp(&cost(b))).map(|tile| Choice { tile, splits: 1 })
}

pub fn launch(call: &Call, executor: &dyn Executor, args: MatmulArgs) -> Result<Launch> {
    let (tile, (m, n, k)) = (call.choice.tile, (args.m, args.n, args.k));
    let boxes = |from, (rows, columns): (u32, u32), box_rows| Boxes {
        from,
        rows: rows.into(),
        columns: columns.into(),
        box_rows,
    };
    // kBoxA and kBoxB: of B, each block of a cluster brings half.
    let with_k_last = |rows: u32| rows / BLOCKS as u32;
    let a = match call.layout {
        Layout::Tn => boxes(call.a, (k, m), STEP_K),
        _ => boxes(call.a, (m, k), with_k_last(tile.m)),
    };
    let b = match call.layout {
        Layout::Nn | Layout::Tn => boxes(call.b, (k, n), with_k_last(STEP_K)),
        _ => boxes(call.b, (n, k), with_k_last(tile.n)),
    };
    let clusters = u64::from(args.tiles_m) * u64::from(args.tiles_n);
    let fitting = u64::from(executor.properties()?.multiprocessors) / BLOCKS;
    let blocks = clusters.min(fitting.max(1)) * BLOCKS;
    // SAFETY: the call's pointers are to the matrices that its sizes say.
    let (a, b) = unsafe { (executor.tensor_map(&a)?, executor.tensor_map(&b)?) };
    let layout = match call.layout {
        Layout::Nn => "nn",
        Layout::Tn => "tn",
        _ => "nt",
    };
    let kernel = format!("matmul_sm90_{layout}_{}x{}_bf16", tile.m, tile.n);
    let args = MatmulSm90Args { a, b, rest: args, unused: [0; 7] };
    Ok(Launch::new("matmul_sm90", kernel, blocks as u32, &args).with_blocks_of(tile.threads, tile.shared_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On 132 multiprocessors, as an H100 and an H200 have.
    #[test]
    fn a_hopper_takes_its_own_tiles_where_they_fill_it() {
        let chosen = |sizes| choose_hopper(sizes, 132).map(|choice| choice.tile.n);
        for (sizes, columns) in [
            ((16384, 8960, 1536), Some(128)), // 68 waves of 128 columns, 46 of 192
            ((640, 3072, 1536), Some(192)),   // a wave of 192 columns, two of 128
            ((640, 1536, 8960), Some(128)),   // one wave of either
            ((4096, 256, 1536), Some(128)),
            ((640, 256, 1536), None),
            ((64, 8960, 1536), None),
            ((16384, 1536, 256), None),
        ] {
            assert_eq!(chosen(sizes), columns, "{sizes:?}");
        }
    }
}
