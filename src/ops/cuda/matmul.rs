//! The noisy matrix product on a CUDA device: kernels/matmul_*.cu, in one launch C = round(law(A B^T) + bias), or
//! C += law(A B^T) in f32. The error is made where the product's sums lie in registers, and never stored.
#![allow(unsafe_code)]

mod group;
mod hopper;
mod kernel;
mod measured;
mod packed;
mod tickets;
mod tile;

use std::ffi::c_void;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::launch::{Executor, Needs, Prepared, Properties};
use super::noise::{Destination, sums_pointer};
use crate::numerics::format::Format;
use crate::ops::matmul_error::{ErrorDraw, RowKeys};
use crate::{Error, Result};
pub use group::{choose_together, matmul_together, prepare_together};
use hopper::{choose_hopper, hopper_choices};
use kernel::{Call, Workspace};
pub use measured::{MeasuredChoice, choices_of_others, read_choices};
pub use packed::PackedWeight;
pub use tile::{Choice, TileShape, choices, choose};

/// How the operands of C [m, n] = A B^T are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// a [m, k], b [n, k]: y = x W^T.
    Nt,
    /// a [m, k], b [k, n]: dX = dY W.
    Nn,
    /// a [k, m], b [k, n]: dW = dY^T x.
    Tn,
    /// As `Nt`, where b is held as codes and scales: y = x Q^T.
    NtMxfp4,
    NtNvfp4,
}

impl Layout {
    /// Of a packed b: its family and block.
    pub fn packed_format(self) -> Option<Format> {
        match self {
            Layout::NtMxfp4 => Some(Format::MXFP4),
            Layout::NtNvfp4 => Some(Format::NVFP4),
            Layout::Nt | Layout::Nn | Layout::Tn => None,
        }
    }
}

/// A product and where it goes.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    pub layout: Layout,
    pub a: &'a Tensor, // bf16, f16 or f32, contiguous
    pub b: &'a Tensor, // of the dtype of a; packed: codes u8 [n, k / 2], low nibble first
    /// With a packed b alone.
    pub scales: Option<PackedScales<'a>>,
    /// [m, n]: of the dtype of a, or f32; with `Add` f32.
    pub into: Destination<'a>,
    pub bias: Option<&'a Tensor>, // [n] f32; not with `Add`
    pub error: Option<&'a ErrorDraw>,
    pub keys: &'a RowKeys, // [m]; read where there is an error
    /// Of `noise::new_sums` of one matrix, added to: what the error was.
    pub sums: Option<&'a Tensor>,
}

/// What a [`PackedWeight`] has besides its codes.
#[derive(Clone, Copy)]
pub struct PackedScales<'a> {
    pub of_blocks: &'a Tensor,    // u8 [n, blocks of k]: E8M0 or E4M3
    pub amax: Option<&'a Tensor>, // f32 [1], in NVFP4
}

/// k of a packed product is a multiple of this: of a stage, kPackedK of kernels/include/matmul_w4.cuh.
pub const PACKED_K: i64 = 128;

/// Multiplies. With a packed b: bf16 alone, and k a multiple of [`PACKED_K`].
///
/// # Errors
/// `Runtime` naming the tensor of the wrong device, dtype, shape, strides or alignment; `Unavailable` without kernels or
/// driver.
pub fn matmul(executor: &dyn Executor, product: &Product) -> Result<()> {
    prepare(executor, product)?.run(executor)
}

/// The launch of [`matmul`].
///
/// # Errors
/// As [`matmul`].
pub fn prepare(executor: &dyn Executor, product: &Product) -> Result<Prepared> {
    prepare_as(executor, product, product.choice(executor)?)
}

/// [`prepare`] with a tile and splits of the caller's.
///
/// # Errors
/// As [`matmul`].
pub fn prepare_as(executor: &dyn Executor, product: &Product, choice: Choice) -> Result<Prepared> {
    let (call, mut memory) = checked(executor, product, choice)?;
    let (m, n, _) = call.sizes;
    let mut launches = Vec::new();
    if m * n > 0 {
        for workspace in Workspace::of(&[&call], executor.device())? {
            launches.push(call.launch(executor, &workspace)?);
            memory.extend(workspace.tensors());
        }
    }
    // SAFETY: `checked` has checked everything that is pointed to; it is in `memory`.
    Ok(unsafe { Prepared::new(launches, executor.device(), memory) })
}

/// The call of a product, whose tensors have device, dtype, shape, strides and alignment as its kernels want them; and the tensors.
fn checked(executor: &dyn Executor, product: &Product, choice: Choice) -> Result<(Call, Vec<Tensor>)> {
    let device = executor.device();
    let (m, n, k) = product.sizes()?;
    let kind = product.a.kind();
    let packed = product.layout.packed_format();
    let kinds: &[Kind] = if packed.is_some() { &[Kind::BFloat16] } else { &[Kind::BFloat16, Kind::Half, Kind::Float] };
    if !kinds.contains(&kind) {
        return Err(Error::Runtime(format!("matmul: a: found dtype {kind:?}, expected one of {kinds:?}")));
    }
    let needs =
        |name, kind: Kind, shape: &[i64], tensor: &Tensor| Needs { name, kinds: &[kind], shape, device }.check(tensor);
    let (shape_a, shape_b, kind_b) = match product.layout {
        Layout::Nt => ([m, k], [n, k], kind),
        Layout::Nn => ([m, k], [k, n], kind),
        Layout::Tn => ([k, m], [k, n], kind),
        Layout::NtMxfp4 | Layout::NtNvfp4 => ([m, k], [n, k / 2], Kind::Uint8),
    };
    let a = needs("matmul: a", kind, &shape_a, product.a)?;
    let b = needs("matmul: b", kind_b, &shape_b, product.b)?;
    let out = match product.into {
        Destination::Store(out) | Destination::Add(out) => out,
    };
    let adds = matches!(product.into, Destination::Add(_));
    let out_kind = if out.kind() == Kind::Float || adds { Kind::Float } else { kind };
    let c = needs("matmul: out", out_kind, &[m, n], out)?;
    if adds && product.bias.is_some() {
        return Err(Error::Runtime("matmul: found a sum with a bias, expected one without".into()));
    }
    let null = std::ptr::null_mut();
    let (scales, amax) = packed.map_or(Ok((null, null)), |format| product.scales(format, device))?;
    let bias = product.bias.map_or(Ok(null), |bias| needs("matmul: bias", Kind::Float, &[n], bias))?;
    let sums = product.sums.map_or(Ok(null), |sums| sums_pointer("matmul: sums", sums, 1, device))?;
    let mut memory: Vec<Tensor> = [product.a, product.b, out].map(Tensor::shallow_clone).into();
    memory.extend([product.bias, product.sums].into_iter().flatten().map(Tensor::shallow_clone));
    let of_b = product.scales.map_or([None, None], |scales| [Some(scales.of_blocks), scales.amax]);
    memory.extend(of_b.into_iter().flatten().map(Tensor::shallow_clone));
    let keys = match (product.error, product.keys.first_of_consecutive()) {
        (None, _) => Some(0),
        (Some(_), _) if product.keys.len() as i64 != m => {
            return Err(Error::Runtime(format!("matmul: {} row keys for {m} rows", product.keys.len())));
        }
        (Some(_), first) => first,
    };
    let key_list = match keys {
        Some(_) => null,
        None => {
            let keys = product.keys.on_device(device)?;
            let list = needs("matmul: keys", Kind::Int64, &[m], &keys)?;
            memory.push(keys);
            list
        }
    };
    if choice.tile.is_hopper && !product.fits_hopper() {
        return Err(Error::Runtime("matmul: found operands for which sm_90a has no kernel".into()));
    }
    let call = Call {
        layout: product.layout,
        kind,
        choice,
        a,
        b,
        scales,
        amax,
        c,
        bias,
        sums,
        keys: keys.unwrap_or(0),
        key_list,
        sizes: (m, n, k),
        error: product.error.cloned(),
        is_f32: out_kind == Kind::Float,
        adds,
    };
    Ok((call, memory))
}

impl Product<'_> {
    /// The choice that was measured to be fastest on such a device, else the one that a model of the machine finds so.
    fn choice(&self, executor: &dyn Executor) -> Result<Choice> {
        let (sizes, properties) = (self.sizes()?, executor.properties()?);
        let measured = match self.a.kind() {
            Kind::BFloat16 => measured::choice(&properties.name, self.layout, sizes),
            _ => None,
        };
        let fits_hopper = properties.is_hopper && self.fits_hopper();
        let usable = measured.filter(|choice| !choice.tile.is_hopper || fits_hopper);
        let of_hopper = || choose_hopper(sizes, properties.multiprocessors).filter(|_| fits_hopper);
        let of_any = || choose(self.layout, self.a.kind(), sizes, properties.multiprocessors);
        Ok(usable.or_else(of_hopper).unwrap_or_else(of_any))
    }

    /// Whether [`matmul`] takes a kernel of sm_90a for it.
    ///
    /// # Errors
    /// `Runtime` for shapes that are not two matrices'.
    pub fn is_for_hopper(&self, executor: &dyn Executor) -> Result<bool> {
        Ok(self.choice(executor)?.tile.is_hopper)
    }

    /// All choices, the plainest first.
    ///
    /// # Errors
    /// `Runtime` for shapes that are not two matrices'.
    pub fn choices(&self, properties: &Properties) -> Result<Vec<Choice>> {
        let (_, _, k) = self.sizes()?;
        let hoppers = hopper_choices().filter(|_| properties.is_hopper && self.fits_hopper());
        Ok(choices(self.layout, self.a.kind(), k).into_iter().chain(hoppers).collect())
    }

    /// Whether the kernels of sm_90a take such operands.
    pub fn fits_hopper(&self) -> bool {
        let is_aligned = |t: &Tensor| {
            let row = t.size().last().copied().unwrap_or(0) as usize * t.kind().elt_size_in_bytes();
            (t.data_ptr() as usize).is_multiple_of(16) && row.is_multiple_of(16) && t.numel() > 0
        };
        let is_dense = self.layout.packed_format().is_none();
        is_dense && self.a.kind() == Kind::BFloat16 && is_aligned(self.a) && is_aligned(self.b)
    }

    /// Pointers to the scales of blocks and of the tensor of a packed b; and that all is as its kernels want it.
    fn scales(&self, format: Format, device: Device) -> Result<(*mut c_void, *mut c_void)> {
        let bad = |what: String| Error::Runtime(format!("matmul: {what} with a packed b"));
        let (_, n, k) = self.sizes()?;
        if k % PACKED_K != 0 {
            return Err(bad(format!("k: found {k}, expected a multiple of {PACKED_K}")));
        }
        let scales = self.scales.ok_or_else(|| bad("scales: found none, expected them".into()))?;
        let needs = |name, kind: Kind, shape: &[i64], tensor: &Tensor| {
            Needs { name, kinds: &[kind], shape, device }.check(tensor)
        };
        let block = format.block_size(0) as i64;
        let of_blocks = needs("matmul: scales", Kind::Uint8, &[n, k / block], scales.of_blocks)?;
        let amax = match (self.layout, scales.amax) {
            (Layout::NtNvfp4, Some(amax)) => needs("matmul: amax", Kind::Float, &[1], amax)?,
            (Layout::NtNvfp4, None) => return Err(bad("amax: found none, expected NVFP4's".into())),
            _ => std::ptr::null_mut(),
        };
        let aligned = |tensor: &Tensor| (tensor.data_ptr() as usize).is_multiple_of(16);
        match [("a", self.a), ("b", self.b), ("scales", scales.of_blocks)].into_iter().find(|(_, t)| !aligned(t)) {
            Some((name, _)) => Err(bad(format!("{name}: found an address that is no multiple of 16, expected one"))),
            None => Ok((of_blocks, amax)),
        }
    }

    /// (m, n, k).
    ///
    /// # Errors
    /// `Runtime` for shapes that are not two matrices'.
    pub fn sizes(&self) -> Result<(i64, i64, i64)> {
        let (a, b) = (self.a.size(), self.b.size());
        match (self.layout, &a[..], &b[..]) {
            (Layout::Nt | Layout::NtMxfp4 | Layout::NtNvfp4, &[m, k], &[n, _]) => Ok((m, n, k)),
            (Layout::Nn, &[m, k], &[_, n]) => Ok((m, n, k)),
            (Layout::Tn, &[k, m], &[_, n]) => Ok((m, n, k)),
            _ => Err(Error::Runtime(format!("matmul: found shapes {a:?} and {b:?}, expected two matrices"))),
        }
    }
}
