//! The storage dtypes of fake quantization: as values, as bit patterns, and how a matrix of each is worked on.

use half::{bf16, f16, slice::HalfFloatSliceExt};
use std::ops::{BitAnd, BitOr};

use super::{FakeQuantStats, Task, job};
use crate::numerics::format::Format;
use crate::numerics::tensor_error::TensorErrorSums;
use crate::ops::cpu::path::Path;

/// A storage dtype.
pub trait Storage: Copy + Send + Sync {
    /// Reads exactly.
    fn widen(x: &[Self], out: &mut [f32]);
    /// Rounds to nearest even.
    fn narrow(x: &[f32], out: &mut [Self]);
    /// `Task::run` of what it has checked.
    #[doc(hidden)]
    fn run(task: &Task, x: &[Self], cols: usize, out: &mut [Self]) -> (FakeQuantStats, TensorErrorSums);
    #[doc(hidden)]
    fn tensor_amax(path: Path, x: &[Self], cols: usize, format: Format) -> f32;
}

/// A storage dtype that the kernels work on: read exactly into f32, rounded to nearest even on the way back. Also as
/// bits: sign, 8 bits of exponent, mantissa.
pub(super) trait Element: Copy + Send + Sync {
    /// bf16 if true, f32 if false; the vector code loads and stores by it.
    const IS_BF16: bool;
    const ZERO: Self;
    const NAN: Self;
    /// An unsigned integer of its size.
    type Word: Word;
    const MANTISSA_BITS: u32;
    /// All bits but the sign.
    const MAGNITUDE_BITS: u32 = (1 << (8 + Self::MANTISSA_BITS)) - 1;
    const INFINITY: u32 = 0xFF << Self::MANTISSA_BITS;
    fn read(self) -> f32;
    fn round(value: f32) -> Self;
    fn word(self) -> Self::Word;
    fn of_word(word: Self::Word) -> Self;
}

impl Element for f32 {
    const IS_BF16: bool = false;
    const ZERO: f32 = 0.0;
    const NAN: f32 = f32::NAN;
    type Word = u32;
    const MANTISSA_BITS: u32 = 23;
    #[inline(always)]
    fn read(self) -> f32 {
        self
    }
    #[inline(always)]
    fn round(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn word(self) -> u32 {
        self.to_bits()
    }
    #[inline(always)]
    fn of_word(word: u32) -> f32 {
        f32::from_bits(word)
    }
}

impl Element for bf16 {
    const IS_BF16: bool = true;
    const ZERO: bf16 = bf16::ZERO;
    const NAN: bf16 = bf16::NAN;
    type Word = u16;
    const MANTISSA_BITS: u32 = 7;
    #[inline(always)]
    fn read(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    /// Finite values and infinities alone come here; NaN blocks are written as such.
    #[inline(always)]
    fn round(value: f32) -> bf16 {
        let bits = value.to_bits();
        bf16::from_bits((bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16) as u16)
    }
    #[inline(always)]
    fn word(self) -> u16 {
        self.to_bits()
    }
    #[inline(always)]
    fn of_word(word: u16) -> bf16 {
        bf16::from_bits(word)
    }
}

/// Arithmetic on bit patterns; sums, differences and shifts drop what does not fit.
pub(super) trait Word: Copy + Ord + Send + Sync + BitAnd<Output = Self> + BitOr<Output = Self> {
    const ZERO: Self;
    /// The low bits.
    fn of(value: u32) -> Self;
    fn plus(self, other: Self) -> Self;
    fn minus(self, other: Self) -> Self;
    fn shifted_right(self, bits: u32) -> Self;
    fn to_usize(self) -> usize;
}

macro_rules! word {
    ($t:ty) => {
        impl Word for $t {
            const ZERO: $t = 0;
            #[inline(always)]
            fn of(value: u32) -> $t {
                value as $t
            }
            #[inline(always)]
            fn plus(self, other: $t) -> $t {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn minus(self, other: $t) -> $t {
                self.wrapping_sub(other)
            }
            #[inline(always)]
            fn shifted_right(self, bits: u32) -> $t {
                self.wrapping_shr(bits)
            }
            #[inline(always)]
            fn to_usize(self) -> usize {
                self as usize
            }
        }
    };
}
word!(u16);
word!(u32);

impl Storage for f32 {
    fn widen(x: &[f32], out: &mut [f32]) {
        out.copy_from_slice(x);
    }
    fn narrow(x: &[f32], out: &mut [f32]) {
        out.copy_from_slice(x);
    }
    fn run(task: &Task, x: &[f32], cols: usize, out: &mut [f32]) -> (FakeQuantStats, TensorErrorSums) {
        job::run(task, x, cols, out)
    }
    fn tensor_amax(path: Path, x: &[f32], cols: usize, format: Format) -> f32 {
        job::tensor_amax(path, x, cols, format)
    }
}

impl Storage for bf16 {
    fn widen(x: &[bf16], out: &mut [f32]) {
        x.convert_to_f32_slice(out);
    }
    fn narrow(x: &[f32], out: &mut [bf16]) {
        out.convert_from_f32_slice(x);
    }
    fn run(task: &Task, x: &[bf16], cols: usize, out: &mut [bf16]) -> (FakeQuantStats, TensorErrorSums) {
        job::run(task, x, cols, out)
    }
    fn tensor_amax(path: Path, x: &[bf16], cols: usize, format: Format) -> f32 {
        job::tensor_amax(path, x, cols, format)
    }
}

/// f16 has no kernels of its own: its chunks are widened to f32 on the way in and narrowed on the way out.
impl Storage for f16 {
    fn widen(x: &[f16], out: &mut [f32]) {
        x.convert_to_f32_slice(out);
    }
    fn narrow(x: &[f32], out: &mut [f16]) {
        out.convert_from_f32_slice(x);
    }
    fn run(task: &Task, x: &[f16], cols: usize, out: &mut [f16]) -> (FakeQuantStats, TensorErrorSums) {
        job::run_widened(task, x, cols, out)
    }
    fn tensor_amax(path: Path, x: &[f16], cols: usize, format: Format) -> f32 {
        job::tensor_amax_widened(path, x, cols, format)
    }
}
