//! Random damage to a file: bytes flipped, cut, repeated, and pieces of other text put in.

use proptest::prelude::*;
use proptest::sample::Index;

/// One change; positions are relative, so that they shrink and fit any length.
#[derive(Clone, Debug)]
pub enum Damage {
    Flip(Index, u8),
    Cut(Index, usize),
    Repeat(Index, usize),
    Insert(Index, Vec<u8>),
    Truncate(Index),
}

/// Up to eight changes; `words` are inserted where chance alone would never find them.
pub fn damage(words: &'static [&'static str]) -> impl Strategy<Value = Vec<Damage>> {
    let at = || any::<Index>();
    let word = proptest::sample::select(words).prop_map(|word| word.as_bytes().to_vec());
    let one = prop_oneof![
        4 => (at(), any::<u8>()).prop_map(|(at, mask)| Damage::Flip(at, mask)),
        2 => (at(), 1usize..40).prop_map(|(at, length)| Damage::Cut(at, length)),
        2 => (at(), 1usize..40).prop_map(|(at, length)| Damage::Repeat(at, length)),
        4 => (at(), word).prop_map(|(at, word)| Damage::Insert(at, word)),
        1 => (at(), proptest::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        1 => at().prop_map(Damage::Truncate),
    ];
    proptest::collection::vec(one, 0..8)
}

pub fn apply(mut bytes: Vec<u8>, changes: &[Damage]) -> Vec<u8> {
    for change in changes {
        if bytes.is_empty() {
            return bytes;
        }
        let length = bytes.len();
        match change {
            Damage::Flip(at, mask) => bytes[at.index(length)] ^= mask,
            Damage::Cut(at, count) => {
                let start = at.index(length);
                bytes.drain(start..(start + count).min(length));
            }
            Damage::Repeat(at, count) => {
                let start = at.index(length);
                let piece = bytes[start..(start + count).min(length)].to_vec();
                bytes.splice(start..start, piece);
            }
            Damage::Insert(at, piece) => {
                let start = at.index(length);
                bytes.splice(start..start, piece.iter().copied());
            }
            Damage::Truncate(at) => bytes.truncate(at.index(length)),
        }
    }
    bytes
}
