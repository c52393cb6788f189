//! The launch of kernels/matmul_*.cu: its argument struct, name and grid.

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

use super::tickets::tickets;
use super::tile::Choice;
use super::{Layout, hopper};
use crate::ops::cuda::launch::{Executor, Launch};
use crate::ops::cuda::noise::{NO_ERROR, law_number};
use crate::ops::matmul_error::ErrorDraw;
use crate::{Error, Result};

/// `MatmulArgs` of kernels/include/matmul_tile.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MatmulArgs {
    a: *const c_void,
    b: *const c_void,
    c: *mut c_void,
    bias: *const c_void,
    keys: u64,
    seed: u64,
    sums: *mut c_void,
    partials: *mut c_void,
    tickets: *mut c_void,
    scales: *const c_void,
    amax: *const c_void,
    pub m: u32,
    pub n: u32,
    pub k: u32,
    law: u32,
    stream: u32,
    scale: f32,
    flags: u32,
    pub tiles_m: u32,
    pub tiles_n: u32,
    splits: u32,
    split_k: u32,
    unused: u32,
}

/// `MatmulFlags`.
const KEY_LIST: u32 = 1;
const ALIGNED_A: u32 = 2;
const ALIGNED_B: u32 = 4;
const ALIGNED_C: u32 = 8;
const F32: u32 = 16;
const ADDS: u32 = 32;
const A_ROWS_LAST: u32 = 64;
const B_ROWS_LAST: u32 = 128;

/// A checked product.
pub struct Call {
    pub layout: Layout,
    pub kind: Kind,
    pub choice: Choice,
    pub a: *mut c_void,
    pub b: *mut c_void,
    pub scales: *mut c_void,
    pub amax: *mut c_void,
    pub c: *mut c_void,
    pub bias: *mut c_void,
    pub sums: *mut c_void,
    pub keys: u64,
    /// i64 [m], or null: then row r has `keys` + r.
    pub key_list: *mut c_void,
    /// (m, n, k).
    pub sizes: (i64, i64, i64),
    pub error: Option<ErrorDraw>,
    /// What is written is f32.
    pub is_f32: bool,
    pub adds: bool,
}

/// What splits need: their sums f32, and a counter of each tile.
#[derive(Default)]
pub struct Workspace {
    partials: Option<Tensor>,
    tickets: Option<Tensor>,
}

impl Workspace {
    /// Of the calls of one launch, whose blocks run at the same time: of each its own.
    pub fn of(calls: &[&Call], device: Device) -> Result<Vec<Workspace>> {
        let counts: Vec<i64> = calls.iter().map(|call| call.counters()).collect();
        let all = match counts.iter().sum() {
            0 => None,
            total => Some(tickets(device, total)?),
        };
        let mut first = 0;
        let each = calls.iter().zip(counts).map(|(call, count)| {
            let Some(all) = all.as_ref().filter(|_| count > 0) else { return Ok(Workspace::default()) };
            let area = i64::from(call.choice.tile.m * call.choice.tile.n);
            let partials = Tensor::f_empty([count * i64::from(call.choice.splits) * area], (Kind::Float, device))?;
            let tickets = all.f_narrow(0, first, count)?;
            first += count;
            Ok(Workspace { partials: Some(partials), tickets: Some(tickets) })
        });
        each.collect()
    }

    pub fn tensors(self) -> impl Iterator<Item = Tensor> {
        self.partials.into_iter().chain(self.tickets)
    }
}

impl Call {
    /// Tiles, where they are split.
    fn counters(&self) -> i64 {
        let (tiles_m, tiles_n) = self.tiles();
        if self.choice.splits == 1 { 0 } else { i64::from(tiles_m) * i64::from(tiles_n) }
    }

    /// The arguments and the blocks of threads; the tensors of `workspace` are pointed to.
    ///
    /// # Errors
    /// `Runtime` for sizes beyond one launch.
    pub fn args(&self, workspace: &Workspace) -> Result<(MatmulArgs, u32)> {
        let ((tiles_m, tiles_n), (m, n, k)) = (self.tiles(), self.sizes);
        let splits = self.choice.splits;
        let blocks = u64::from(tiles_m) * u64::from(tiles_n) * u64::from(splits);
        let (Ok(m), Ok(n), Ok(k), Ok(blocks)) =
            (u32::try_from(m), u32::try_from(n), u32::try_from(k), u32::try_from(blocks))
        else {
            return Err(Error::Runtime(format!("matmul: [{m}, {k}] x [{k}, {n}] is too large for one launch")));
        };
        let error = self.error.as_ref();
        let size = self.kind.elt_size_in_bytes();
        // The last dimension of each operand.
        let (last_a, last_b) = match self.layout {
            Layout::Nt | Layout::NtMxfp4 | Layout::NtNvfp4 => (k, k),
            Layout::Nn => (k, n),
            Layout::Tn => (m, n),
        };
        let aligned = |pointer: *mut c_void, last: u32, size: usize, to: usize| {
            (pointer as usize).is_multiple_of(to) && (last as usize * size).is_multiple_of(to)
        };
        let out_size = if self.is_f32 { 4 } else { size };
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        let flags = flag(!self.key_list.is_null(), KEY_LIST)
            | flag(aligned(self.a, last_a, size, 16), ALIGNED_A)
            | flag(aligned(self.b, last_b, size, 16), ALIGNED_B)
            | flag(aligned(self.c, n, out_size, 8) && aligned(self.bias, 0, 0, 8), ALIGNED_C)
            | flag(self.is_f32, F32)
            | flag(self.adds, ADDS)
            | flag(self.layout == Layout::Tn, A_ROWS_LAST)
            | flag(matches!(self.layout, Layout::Nn | Layout::Tn), B_ROWS_LAST);
        let pointer = |tensor: &Option<Tensor>| tensor.as_ref().map_or(std::ptr::null_mut(), Tensor::data_ptr);
        let args = MatmulArgs {
            a: self.a,
            b: self.b,
            c: self.c,
            bias: self.bias,
            keys: if self.key_list.is_null() { self.keys } else { self.key_list as u64 },
            seed: error.map_or(0, |draw| draw.seed),
            sums: self.sums,
            partials: pointer(&workspace.partials),
            tickets: pointer(&workspace.tickets),
            scales: self.scales,
            amax: self.amax,
            m,
            n,
            k,
            law: error.map_or(NO_ERROR, |draw| law_number(draw.law)),
            stream: error.map_or(0, |draw| draw.stream),
            scale: error.map_or(0.0, |draw| draw.scale),
            flags,
            tiles_m,
            tiles_n,
            splits,
            split_k: self.choice.split_k(i64::from(k)),
            unused: 0,
        };
        Ok((args, blocks))
    }

    pub fn launch(&self, executor: &dyn Executor, workspace: &Workspace) -> Result<Launch> {
        let (args, blocks) = self.args(workspace)?;
        let tile = self.choice.tile;
        if tile.is_hopper {
            return hopper::launch(self, executor, args);
        }
        let (file, kernel) = self.kernel();
        Ok(Launch::new(file, kernel, blocks, &args).with_blocks_of(tile.threads, tile.shared_bytes))
    }

    fn tiles(&self) -> (u32, u32) {
        let (tile, (m, n, _)) = (self.choice.tile, self.sizes);
        ((m as u32).div_ceil(tile.m), (n as u32).div_ceil(tile.n))
    }

    /// File and name.
    pub fn kernel(&self) -> (&'static str, String) {
        let (m, n) = (self.choice.tile.m, self.choice.tile.n);
        let (file, layout) = match self.layout {
            Layout::Nt => ("matmul_nt", "nt"),
            Layout::Nn => ("matmul_nn", "nn"),
            Layout::Tn => ("matmul_tn", "tn"),
            Layout::NtMxfp4 => return ("matmul_w4", format!("matmul_w4_{m}x{n}_mxfp4")),
            Layout::NtNvfp4 => return ("matmul_w4", format!("matmul_w4_{m}x{n}_nvfp4")),
        };
        match self.kind {
            Kind::BFloat16 => (file, format!("matmul_{layout}_{m}x{n}_bf16")),
            Kind::Half => (file, format!("matmul_{layout}_{m}x{n}_f16")),
            _ => ("matmul_f32", "matmul_f32".to_string()),
        }
    }
}
