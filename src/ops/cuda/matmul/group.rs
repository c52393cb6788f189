//! Products of few rows in one launch: q, k and v of a layer, gate and up. A step of decoding waits for launches more than for
//! anything else.

use tch::Kind;

use super::kernel::{MatmulArgs, Workspace};
use super::tile::{Choice, choose};
use super::{Layout, Product, checked, matmul};
use crate::ops::cuda::launch::{Executor, Launch, Prepared, Properties};
use crate::ops::cuda::noise::Destination;
use crate::{Error, Result};

/// `kGroup` of kernels/include/matmul_tile.cuh.
const MOST: usize = 3;

/// `MatmulGroup`.
#[repr(C)]
struct MatmulGroup {
    products: [MatmulArgs; MOST],
    first_block: [u32; MOST],
    count: u32,
}

/// Multiplies all, in one launch where [`choose_together`] finds a tile for it; each has the bits that it has alone with that tile.
///
/// # Errors
/// As [`matmul`].
pub fn matmul_together(executor: &dyn Executor, products: &[Product]) -> Result<()> {
    match choose_together(products, &*executor.properties()?)? {
        Some(choice) => prepare_together(executor, products, choice)?.run(executor),
        None => products.iter().try_for_each(|product| matmul(executor, product)),
    }
}

/// The tile and the splits with which two or three products go into one launch: forward ones in bf16 of the same rows and the same
/// k. None: no kernel takes them.
///
/// # Errors
/// `Runtime` for shapes that are not two matrices'.
pub fn choose_together(products: &[Product], properties: &Properties) -> Result<Option<Choice>> {
    let Some(first) = products.first() else { return Ok(None) };
    let ((m, mut columns, k), layout) = (first.sizes()?, first.layout);
    for product in &products[1..] {
        let (rows, n, inner) = product.sizes()?;
        if (rows, inner, product.layout) != (m, k, layout) {
            return Ok(None);
        }
        columns += n;
    }
    let is_forward = |p: &Product| p.a.kind() == Kind::BFloat16 && matches!(p.into, Destination::Store(_));
    if !(2..=MOST).contains(&products.len()) || m * columns == 0 || !products.iter().all(is_forward) {
        return Ok(None);
    }
    let choice = choose(layout, Kind::BFloat16, (m, columns, k), properties.multiprocessors);
    let has_kernel = match layout {
        Layout::Nt => choice.tile.m <= 64,
        Layout::NtMxfp4 | Layout::NtNvfp4 => choice.tile.m == 16,
        Layout::Nn | Layout::Tn => false,
    };
    Ok(has_kernel.then_some(choice))
}

/// The launch of all with a choice of [`choose_together`].
///
/// # Errors
/// As [`matmul`]; `Runtime` where their number has no kernel.
pub fn prepare_together(executor: &dyn Executor, products: &[Product], choice: Choice) -> Result<Prepared> {
    let (mut memory, mut calls) = (Vec::new(), Vec::new());
    for product in products {
        let (call, tensors) = checked(executor, product, choice)?;
        memory.extend(tensors);
        calls.push(call);
    }
    let workspaces = Workspace::of(&calls.iter().collect::<Vec<_>>(), executor.device())?;
    let (mut all, mut first_block, mut blocks) = (Vec::new(), [0; MOST], 0u32);
    for ((call, workspace), first) in calls.iter().zip(workspaces).zip(&mut first_block) {
        let (args, of_call) = call.args(&workspace)?;
        *first = blocks;
        blocks += of_call;
        all.push(args);
        memory.extend(workspace.tensors());
    }
    let (Some(first), Some(call), 1..=MOST) = (all.first(), calls.first(), products.len()) else {
        return Err(Error::Runtime(format!("matmul: found {} products, expected 1 to {MOST}", products.len())));
    };
    let group = MatmulGroup {
        products: std::array::from_fn(|i| *all.get(i).unwrap_or(first)),
        first_block,
        count: products.len() as u32,
    };
    let (file, kernel) = call.kernel();
    let launch = Launch::new(file, format!("{kernel}_group"), blocks, &group);
    let launch = launch.with_blocks_of(choice.tile.threads, choice.tile.shared_bytes);
    // SAFETY: `checked` has checked everything that is pointed to; it is in `memory`.
    Ok(unsafe { Prepared::new(vec![launch], executor.device(), memory) })
}
