//! Small zeroed tensors of one call in one allocation, which one launch fills.

use tch::{Device, Kind, Tensor};

use crate::Result;

pub struct Zeros {
    words: Tensor, // i64
    next: i64,
}

impl Zeros {
    /// 64-bit words that `elements` of a dtype take.
    pub fn words(elements: i64, kind: Kind) -> i64 {
        (elements * kind.elt_size_in_bytes() as i64 + 7) / 8
    }

    pub fn new(words: i64, device: Device) -> Result<Zeros> {
        Ok(Zeros { words: Tensor::f_zeros([words], (Kind::Int64, device))?, next: 0 })
    }

    /// The next `elements` of a dtype, [elements]; an error where nobody has counted them.
    pub fn take(&mut self, elements: i64, kind: Kind) -> Result<Tensor> {
        let words = Zeros::words(elements, kind);
        let taken = self.words.f_narrow(0, self.next, words)?;
        self.next += words;
        Ok(taken.f_view_dtype(kind)?.f_narrow(0, 0, elements)?)
    }
}
