//! The storage dtypes of fake quantization: as values, as bit patterns, and how a matrix of each is worked on.

#![allow(unsafe_code)]

use half::{bf16, f16, slice::HalfFloatSliceExt};
use std::ops::{BitAnd, BitOr};

use super::{FakeQuantStats, Task, job};
use crate::numerics::format::Format;
use crate::numerics::tensor_error::TensorErrorSums;
use crate::ops::cpu::arrays::from_fn;
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
    fn word(self) -> Self::Word;
    fn of_word(word: Self::Word) -> Self;
    #[inline(always)]
    fn magnitude(self) -> Self::Word {
        self.word() & Self::Word::of(Self::MAGNITUDE_BITS)
    }
    #[inline(always)]
    fn sign(self) -> Self::Word {
        self.word() & Self::Word::of(Self::MAGNITUDE_BITS + 1)
    }
    /// `UNIT` elements as words of 32 bits, of an f32 or two bf16: the halves of a word widen without shuffles.
    type Words: Copy + AsRef<[u32]> + AsMut<[u32]>;
    fn words(x: &[Self; UNIT]) -> Self::Words;
    fn of_words(words: Self::Words) -> [Self; UNIT];
    /// As many words, with the uniform of each element in its place.
    fn uniform_words(uniforms: &[u16; UNIT]) -> Self::Words;
    /// The magnitudes of a word through f(magnitude, uniform) >= 0, rounded to nearest even, with their signs.
    fn map(word: u32, uniforms: u32, f: impl FnMut(f32, u32) -> f32) -> u32;
    /// `map`, cut instead of rounded, without signs.
    fn map_and_cut(word: u32, uniforms: u32, f: impl FnMut(f32, u32) -> f32) -> u32;
}

/// Elements that are worked on at a time: a block of the mx formats, two of nvfp4.
pub(super) const UNIT: usize = 32;

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
    fn word(self) -> u32 {
        self.to_bits()
    }
    #[inline(always)]
    fn of_word(word: u32) -> f32 {
        f32::from_bits(word)
    }
    type Words = [u32; UNIT];
    #[inline(always)]
    fn words(x: &[f32; UNIT]) -> [u32; UNIT] {
        from_fn(|i| x[i].to_bits())
    }
    #[inline(always)]
    fn of_words(words: [u32; UNIT]) -> [f32; UNIT] {
        from_fn(|i| f32::from_bits(words[i]))
    }
    #[inline(always)]
    fn uniform_words(uniforms: &[u16; UNIT]) -> [u32; UNIT] {
        from_fn(|i| u32::from(uniforms[i]))
    }
    #[inline(always)]
    fn map(word: u32, uniforms: u32, f: impl FnMut(f32, u32) -> f32) -> u32 {
        f32::map_and_cut(word, uniforms, f) | word & 0x8000_0000
    }
    #[inline(always)]
    fn map_and_cut(word: u32, uniforms: u32, mut f: impl FnMut(f32, u32) -> f32) -> u32 {
        f(f32::from_bits(word & 0x7FFF_FFFF), uniforms).to_bits()
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
    #[inline(always)]
    fn word(self) -> u16 {
        self.to_bits()
    }
    #[inline(always)]
    fn of_word(word: u16) -> bf16 {
        bf16::from_bits(word)
    }
    type Words = [u32; UNIT / 2];
    #[inline(always)]
    fn words(x: &[bf16; UNIT]) -> [u32; UNIT / 2] {
        // SAFETY: both are as many bytes, of which every pattern is a value.
        unsafe { std::mem::transmute::<[bf16; UNIT], [u32; UNIT / 2]>(*x) }
    }
    #[inline(always)]
    fn of_words(words: [u32; UNIT / 2]) -> [bf16; UNIT] {
        // SAFETY: as above.
        unsafe { std::mem::transmute::<[u32; UNIT / 2], [bf16; UNIT]>(words) }
    }
    #[inline(always)]
    fn uniform_words(uniforms: &[u16; UNIT]) -> [u32; UNIT / 2] {
        // SAFETY: as above.
        unsafe { std::mem::transmute::<[u16; UNIT], [u32; UNIT / 2]>(*uniforms) }
    }
    #[inline(always)]
    fn map(word: u32, uniforms: u32, f: impl FnMut(f32, u32) -> f32) -> u32 {
        let rounded = |bits: u32| bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
        let [lower, upper] = halves(word, uniforms, f).map(rounded);
        lower >> 16 | upper & 0xFFFF_0000 | word & 0x8000_8000
    }
    #[inline(always)]
    fn map_and_cut(word: u32, uniforms: u32, f: impl FnMut(f32, u32) -> f32) -> u32 {
        let [lower, upper] = halves(word, uniforms, f);
        lower >> 16 | upper & 0xFFFF_0000
    }
}

/// f of the magnitudes in the lower and the upper half of a word.
#[inline(always)]
fn halves(word: u32, uniforms: u32, mut f: impl FnMut(f32, u32) -> f32) -> [u32; 2] {
    let magnitudes = word & 0x7FFF_7FFF;
    let lower = f(f32::from_bits(magnitudes << 16), uniforms & 0xFFFF);
    [lower.to_bits(), f(f32::from_bits(magnitudes & 0xFFFF_0000), uniforms >> 16).to_bits()]
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
    /// Of magnitudes: AVX2 compares signed numbers alone.
    fn is_below(self, other: Self) -> bool;
}

macro_rules! word {
    ($t:ty, $signed:ty) => {
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
            fn is_below(self, other: $t) -> bool {
                (self as $signed) < other as $signed
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
word!(u16, i16);
word!(u32, i32);

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
