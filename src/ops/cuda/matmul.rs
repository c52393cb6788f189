//! The noisy matrix product on a CUDA device: kernels/matmul_*.cu, in one launch C = round(law(A B^T) + bias), or
//! C += law(A B^T) in f32. The error is made where the product's sums lie in registers, and never stored.
#![allow(unsafe_code)]

mod kernel;
mod tile;

use tch::{Kind, Tensor};

use super::launch::{Executor, Needs, Prepared};
use super::noise::{Destination, SUMS};
use crate::ops::matmul_error::{ErrorDraw, RowKeys};
use crate::{Error, Result};
use kernel::Call;
pub use tile::{Choice, TileShape, choices, choose};

/// How the operands of C [m, n] = A B^T are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// a [m, k], b [n, k]: y = x W^T.
    Nt,
    /// a [m, k], b [k, n]: dX = dY W.
    Nn,
    /// a [k, m], b [k, n]: dW = dY^T x.
    Tn,
}

/// A product and where it goes.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    pub layout: Layout,
    pub a: &'a Tensor, // bf16, f16 or f32, contiguous
    pub b: &'a Tensor, // of the dtype of a
    /// [m, n]: of the dtype of a, or f32; with `Add` f32.
    pub into: Destination<'a>,
    pub bias: Option<&'a Tensor>, // [n] f32; not with `Add`
    pub error: Option<&'a ErrorDraw>,
    pub keys: &'a RowKeys, // [m]; read where there is an error
    /// f64 [1, SUMS], added to: what the error was.
    pub sums: Option<&'a Tensor>,
}

/// Multiplies.
///
/// # Errors
/// `Runtime` naming the tensor of the wrong device, dtype, shape or strides; `Unavailable` without kernels or driver.
pub fn matmul(executor: &dyn Executor, product: &Product) -> Result<()> {
    let (m, n, k) = product.sizes()?;
    let choice = choose(product.layout, product.a.kind(), (m, n, k), executor.multiprocessors()?);
    prepare(executor, product, choice)?.run(executor)
}

/// The launch of [`matmul`], with a choice of the tile.
///
/// # Errors
/// As [`matmul`].
pub fn prepare(executor: &dyn Executor, product: &Product, choice: Choice) -> Result<Prepared> {
    let device = executor.device();
    let (m, n, k) = product.sizes()?;
    let kind = product.a.kind();
    if ![Kind::BFloat16, Kind::Half, Kind::Float].contains(&kind) {
        return Err(Error::Runtime(format!("matmul: a: found dtype {kind:?}, expected BFloat16, Half or Float")));
    }
    let needs =
        |name, kind: Kind, shape: &[i64], tensor: &Tensor| Needs { name, kinds: &[kind], shape, device }.check(tensor);
    let (shape_a, shape_b) = match product.layout {
        Layout::Nt => ([m, k], [n, k]),
        Layout::Nn => ([m, k], [k, n]),
        Layout::Tn => ([k, m], [k, n]),
    };
    let a = needs("matmul: a", kind, &shape_a, product.a)?;
    let b = needs("matmul: b", kind, &shape_b, product.b)?;
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
    let bias = product.bias.map_or(Ok(null), |bias| needs("matmul: bias", Kind::Float, &[n], bias))?;
    let sums = product.sums.map_or(Ok(null), |sums| needs("matmul: sums", Kind::Double, &[1, SUMS], sums))?;
    let mut memory: Vec<Tensor> = [product.a, product.b, out].map(Tensor::shallow_clone).into();
    memory.extend([product.bias, product.sums].into_iter().flatten().map(Tensor::shallow_clone));
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
    let mut call =
        Call { layout: product.layout, kind, choice, a, b, c, bias, sums, keys: keys.unwrap_or(0), key_list };
    let launches = match m * n {
        0 => Vec::new(),
        _ => {
            let (partials, tickets) = call.workspace((m, n, k), device)?;
            let launch = call.launch((m, n, k), product.error, out_kind == Kind::Float, adds, &partials, &tickets);
            memory.extend(partials.into_iter().chain(tickets));
            vec![launch?]
        }
    };
    // SAFETY: `Needs` has checked device, dtype, shape and strides of everything that is pointed to; it is in `memory`.
    Ok(unsafe { Prepared::new(launches, device, memory) })
}

impl Product<'_> {
    /// (m, n, k).
    fn sizes(&self) -> Result<(i64, i64, i64)> {
        let (a, b) = (self.a.size(), self.b.size());
        match (self.layout, &a[..], &b[..]) {
            (Layout::Nt, &[m, k], &[n, _]) => Ok((m, n, k)),
            (Layout::Nn, &[m, k], &[_, n]) => Ok((m, n, k)),
            (Layout::Tn, &[k, m], &[_, n]) => Ok((m, n, k)),
            _ => Err(Error::Runtime(format!("matmul: found shapes {a:?} and {b:?}, expected two matrices"))),
        }
    }
}
