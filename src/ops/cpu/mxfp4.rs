//! MXFP4 on the bits of x, in lanes as wide as x: bf16 -> bf16 (16 bits), f32 -> f32 (32 bits); blocks of 32.
//!
//! With B = the bits of 2^k and m = those of |x|, the order of magnitudes is the order of bits, and a scaled magnitude
//! a = |x| 2^-k lies below a bound c where m lies below the bits of c 2^k, which are B plus a constant. So
//! y = 0 (a <= 1/4), 2^k / 2 (a < 3/4), 2^k (a < 1), 6 2^k (a > 6), else m rounded to one mantissa bit, ties to even.
//! No element is widened and nothing is multiplied. All of this holds while 2^k / 4 is a normal number; blocks of
//! other sizes, and NaN and infinity, take the definition's steps.

use super::element::{Element, Word};
use super::fake_quant::Counts;
use super::fake_quant_portable::mxfp4_block;
use super::path::for_each_path;
use crate::numerics::format::MxScaleRule;

const BLOCK: usize = 32;
/// Blocks after which counts leave their lanes, which hold 16 bits.
const COUNTED_BLOCKS: usize = 1 << 14;

for_each_path! {
    /// Whole rows: x, out [rows, cols].
    pub(super) fn mxfp4_rows<T: Element>(x: &[T], cols: usize, rule: MxScaleRule, out: &mut [T]) -> Counts {
        let mut counts = Counts::default();
        for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
            let (blocks, tail) = x.as_chunks::<BLOCK>();
            let (out_blocks, out_tail) = out.as_chunks_mut::<BLOCK>();
            for (blocks, out) in blocks.chunks(COUNTED_BLOCKS).zip(out_blocks.chunks_mut(COUNTED_BLOCKS)) {
                quantize_blocks(blocks, rule, out, &mut counts);
            }
            if !tail.is_empty() {
                let (mut padded, mut y) = ([T::ZERO; BLOCK], [T::ZERO; BLOCK]);
                padded[..tail.len()].copy_from_slice(tail);
                quantize_blocks(&[padded], rule, std::slice::from_mut(&mut y), &mut counts);
                out_tail.copy_from_slice(&y[..tail.len()]);
            }
        }
        counts
    }
}

#[inline(always)]
fn quantize_blocks<T: Element>(x: &[[T; BLOCK]], rule: MxScaleRule, out: &mut [[T; BLOCK]], counts: &mut Counts) {
    let m = T::MANTISSA_BITS;
    // The carry of this sum into the exponent is the rule: never, from mantissa 1.75 on, above mantissa 1.5.
    let rounds_up = T::Word::of(match rule {
        MxScaleRule::Floor => 0,
        MxScaleRule::Even => 1 << (m - 2),
        MxScaleRule::Rceil => (1 << (m - 1)) - 1,
    });
    let mut saturated = [T::Word::ZERO; BLOCK];
    for (x, out) in x.iter().zip(out) {
        let mut magnitudes = [T::Word::ZERO; BLOCK];
        let mut amax = T::Word::ZERO;
        for i in 0..BLOCK {
            magnitudes[i] = x[i].word() & T::Word::of(T::MAGNITUDE_BITS);
            amax = amax.max(magnitudes[i]);
        }
        // Smallest amax whose k, by any rule, leaves 2^k / 4 normal: exponent field 5.
        if amax < T::Word::of(5 << m) || amax >= T::Word::of(T::INFINITY) {
            mxfp4_block(x, rule, out, counts);
            continue;
        }
        let power = amax.plus(rounds_up) & T::Word::of(T::INFINITY);
        let one = power.minus(T::Word::of(2 << m)); // 2^k
        let six = power.plus(T::Word::of(1 << (m - 1))); // 1.5 * 2^(k+2)
        let (three_quarters, half, quarter) =
            (one.minus(T::Word::of(1 << (m - 1))), one.minus(T::Word::of(1 << m)), one.minus(T::Word::of(2 << m)));
        for i in 0..BLOCK {
            let a = magnitudes[i];
            saturated[i] = saturated[i].plus(if a > six { T::Word::of(1) } else { T::Word::ZERO });
            let odd = a.shifted_right(m - 1) & T::Word::of(1);
            let rounded = a.plus(T::Word::of((1 << (m - 2)) - 1)).plus(odd) & T::Word::of(T::MAGNITUDE_BITS << (m - 1));
            let from_one = rounded.min(six).max(one);
            let below = if a > quarter { half } else { T::Word::ZERO };
            let y = if a >= three_quarters { from_one } else { below };
            out[i] = T::of_word(y | (x[i].word() & T::Word::of(T::MAGNITUDE_BITS + 1)));
        }
    }
    for lane in saturated {
        counts.saturated += lane.to_usize();
    }
}
