//! Arrays of lanes: what a loop over them becomes vectors.

/// `std::array::from_fn`, but always part of its caller: a call would be compiled without the instructions of the
/// caller's path.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // An iterator's `next` may stay a call as well.
pub(super) fn from_fn<V: Copy, const N: usize>(lane: impl Fn(usize) -> V) -> [V; N] {
    let mut lanes = [lane(0); N];
    for l in 0..N {
        lanes[l] = lane(l);
    }
    lanes
}
